"""Rows that wait for others on the device are the ones that would have come alone."""

from pathlib import Path

import numpy as np
import pytest

from qwen_jax import rows
from qwen_jax.engine import JaxEngine
from qwen_jax.padded import Padded
from qwen_jax.runtime import pick_device
from qwen_jax.weights import open_model
from stages.architecture import Key
from tests.tiny import write_checkpoint

PROMPT, LENGTH = 9, 50
STEPS = (4, 4, 1, *[1] * (LENGTH - PROMPT))
WINDOW = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}


@pytest.mark.parametrize("settings", [{}, WINDOW], ids=["full", "window"])
@pytest.mark.parametrize("logits", ["last", "all"])
def test_together_is_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict, logits: str
) -> None:
    """Of a batch, so that no axis is taken for another; calls of another length are not mixed."""
    model = open_model(write_checkpoint(tmp_path / "tiny", **settings))
    engine = JaxEngine(model, "float32", "xla", pick_device("cpu"), keep=True)
    batch = Padded.of([range(PROMPT), range(9, 9 - PROMPT, -1)], [range(LENGTH)] * 2)

    def run(together: int) -> tuple[dict[Key, np.ndarray], int]:
        monkeypatch.setattr(rows, "TOGETHER", together)
        found: dict[Key, np.ndarray] = {}
        count = 0

        def emit(stage: str, layer: int | None, value: np.ndarray, first: int) -> None:
            nonlocal count
            count += 1
            row = engine.arch.cached.stage[stage]
            axis = 1 + row.positions_at
            if row.row_axis == "T" and "S" in row.axes:
                assert value.shape[-1] == first + value.shape[axis]
                value = np.pad(value, [(0, 0)] * 3 + [(0, LENGTH - value.shape[-1])])
            before = found.get((stage, layer))
            assert first == (
                LENGTH - rows_of(stage, logits) if before is None else ends[stage, layer]
            )
            ends[stage, layer] = first + value.shape[axis]
            found[stage, layer] = value if before is None else np.concatenate([before, value], axis)

        ends: dict[Key, int] = {}
        engine.run_calls(batch, STEPS, "float32", logits, lambda *key: True, emit)
        assert set(ends.values()) == {LENGTH}
        return found, count

    (alone, many), (together, few) = run(1), run(32)
    assert few < many / 10
    assert alone.keys() == together.keys()
    for key, value in alone.items():
        assert value.tobytes() == together[key].tobytes(), key


def rows_of(stage: str, logits: str) -> int:
    """How many rows a stage has."""
    return LENGTH - PROMPT + 1 if (stage, logits) == ("lm_head", "last") else LENGTH
