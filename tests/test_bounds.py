"""What rounding can do is no fault, what it cannot do is one, and a result says by how much."""

from pathlib import Path

import numpy as np
import pytest

from stages import aprt, verdict
from stages.architectures import any_stage
from stages.open import open_trace
from stages.verdict import LocalError
from tests.planted import faults
from tests.planted.matrix import make_bench
from tools.localize import Localization, localize
from tools.localize.result import faults as faulty
from tools.localize.result import sentence
from tools.numpy_engine import engine

LAYER, CHANNEL = 1, 3
LATE = 32  # a sum over so many keys may lose five bits


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bounds")


def scaled(directory: Path, factor: float) -> Localization:
    """What is said of an engine with one channel of one layer's attention scaled late on."""
    bench = make_bench("small", "f32", directory, length=64)
    dump = bench.right.dump(directory / f"dump-{factor}")
    path = engine.aprt_path(dump, LAYER, "attention")
    values = aprt.read(path, LAYER).copy().reshape(64, -1)
    values[LATE:, CHANNEL] *= np.float32(factor)
    engine.write_aprt(path, LAYER, values)
    return localize(open_trace(dump, bench.layout), bench.model)


def test_what_a_sum_over_the_keys_can_lose_is_odd(directory: Path) -> None:
    found = scaled(directory, 1 - 2.0**-19)
    assert found.verdict == "clean", sentence(found)
    (odd,) = found.odd
    assert odd.suspect.key == ("attention", LAYER) and 0 < odd.excess <= 1
    assert odd.suspect.masks["channel"].nonzero()[0].tolist() == [CHANNEL]
    (entry,) = found.to_json()["odd"]
    assert entry["stage"] == "attention" and entry["exceeds_bound"] <= 1
    assert "odd, no fault: layer 1 attention" in str(found)


def test_what_it_cannot_lose_is_a_fault(directory: Path) -> None:
    found = scaled(directory, 1 - 2.0**-12)
    (fault,) = faulty(found)
    assert (fault.stage, fault.layer) == ("attention", LAYER), sentence(found)
    # 2^-12 of a sum over 33 keys and more, of which rounding may take 33 2^-24 and more
    assert 10 < fault.to_json()["exceeds_bound"] < 2.0**12 / 32
    assert "times what rounding can do at most" in str(found)


def test_what_no_rounding_makes_has_no_factor(directory: Path) -> None:
    bench = make_bench("small", "f32", directory, length=24)
    found = bench.localize(bench.plant(faults.FAULTS["ffn_silu.nan"], "one"))
    (fault,) = faulty(found)
    assert "exceeds_bound" not in fault.to_json()


def test_coverage_counts_every_operation_once(directory: Path) -> None:
    bench = make_bench("small", "f32", directory, length=24)
    whole = bench.localize(bench.right).coverage
    total = whole.judged
    assert whole.through_a_gap == whole.not_dumped == 0
    gap = bench.localize(bench.right, ("attn_scores", "attn_softmax")).coverage
    layers = bench.model.config.num_hidden_layers
    assert (gap.judged, gap.through_a_gap, gap.not_dumped) == (total - 3 * layers, 3 * layers, 0)


def test_only_a_wrong_dump_is_called_so(directory: Path) -> None:
    bench = make_bench("small", "f32", directory, length=24)
    found = bench.localize(bench.plant(faults.FAULTS["attn_out.layout_transposed"], "one"))
    assert found.verdict == "dump" and found.wrong, sentence(found)
    assert sentence(found).startswith("dump: layer")


def of_scores(layer: int, bits: float) -> LocalError:
    stage = any_stage("attn_scores")
    nothing = {"slices": {}, "born_slices": {}, "dead_slices": {}}
    return LocalError(
        stage=stage,
        layer=layer,
        skipped_rows=0,
        bits=bits,
        level=bits,
        segment=(),
        born=0,
        **nothing,
    )


@pytest.mark.parametrize(("bits", "accused"), [((5.6, 5.3, 5.7), 0), ((5.2, 5.3, 5.1), 3)])
def test_layers_on_both_sides_of_a_class_are_one_class(bits, accused) -> None:
    items = [of_scores(layer, found) for layer, found in enumerate(bits)]
    assert len(verdict.suspects(items, "float32")) == accused
