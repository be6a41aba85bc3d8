"""Three runs of ``python -m tests.field``: two healthy engines, and a wrong file."""

import pytest

from tests.field import broken, healthy, models, runs
from tests.test_collect import need


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> models.Models:
    return models.Models(tmp_path_factory.mktemp("models"))


def test_llama_cpp_with_4_bit_weights_is_healthy(made: models.Models) -> None:
    need("llama.cpp")
    case = healthy.llama_case("Q4_K", 20, "f16", 1e6, 1, 64, "on")
    row = runs.run(case, made)
    assert (row.verdict, row.wrong) == ("precision", ""), row.says
    assert "q8_K" in row.precision["linear"] and "kv float16" in row.precision["attention"]


def test_transformers_in_bfloat16_is_healthy(made: models.Models) -> None:
    need("transformers")
    case = next(c for c in healthy.transformers() if "bf16" in c.options)
    row = runs.run(case, made)
    assert (row.verdict, row.wrong) == ("precision", ""), row.says


def test_a_wrong_file_is_named(made: models.Models) -> None:
    need("llama.cpp")
    case = next(c for c in broken.WRONG if c.name == "q_rows_permuted_as_for_llama")
    row = runs.run_broken(case, "Q4_K", made)
    assert row.placed and row.named and row.alone, row.says


def test_every_pair_of_options_is_run() -> None:
    rows = healthy.covering(healthy.OPTIONS)
    for name, values in healthy.OPTIONS.items():
        for other, more in healthy.OPTIONS.items():
            found = {(row[name], row[other]) for row in rows}
            assert name == other or len(found) == len(values) * len(more)


def test_a_padded_model_has_room_for_its_heads() -> None:
    raw, tensors = models.padded_demo()
    assert raw["hidden_size"] == raw["num_attention_heads"] * raw["head_dim"] == 448
    assert tensors["model.norm.weight"].shape == (448,)
    assert len(broken.WRONG) >= 30
