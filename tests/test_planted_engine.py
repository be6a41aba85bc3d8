"""The planted-fault engine is right without a fault, and wrong exactly where one is planted."""

import ast
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import qwen_jax
from qwen_jax.weights import DEMO
from stages import aprt
from stages.architectures import ARCHITECTURES
from tests.conftest import ROOT
from tests.planted import checkpoints, faults
from tools.numpy_engine import __main__ as command
from tools.numpy_engine import engine
from tools.numpy_engine.engine import ARITHMETIC, LAYER_STAGES, OPERATIONS, Engine, Run, Shape

TOKENS = [0, *np.random.default_rng(3).integers(1, 192, 23).tolist()]
LAYER = 1


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Relative L2 norm of the difference."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))


Loaded = tuple[Shape, engine.Weights]


@pytest.fixture(scope="module", params=LAYER_STAGES)
def small(request, tmp_path_factory) -> Loaded:
    """A random model of each architecture, loaded."""
    more = checkpoints.QWEN3 if request.param == "qwen3" else {}
    return engine.load(checkpoints.random_checkpoint(tmp_path_factory.mktemp("small"), **more))


@pytest.fixture(scope="module")
def clean(small) -> dict[str, Run]:
    """A run without a fault, by mode."""
    return {mode: Engine(*small, mode).run(TOKENS, "all") for mode in ARITHMETIC}


@pytest.mark.parametrize("name", ["demo", "qwen3", "qwen3 at 1000, last row"])
def test_without_a_fault_it_equals_the_jax_forward(tmp_path, name):
    more = {"first_position": 1000} if "1000" in name else {}
    last_row = "last row" in name
    if name == "demo":
        model, tokens = DEMO, np.random.default_rng(0).integers(0, 2048, 64).tolist()
    else:
        model, tokens = checkpoints.random_checkpoint(tmp_path, **checkpoints.QWEN3), TOKENS
    theirs = qwen_jax.trace_model(model, tokens, logits="all", **more)
    run = Engine.open(model).run(tokens, "all", last_row=last_row, **more)
    assert {(stage, layer) for layer, stage in run.stages} == set(theirs.entries)
    short = {key for key, values in run.stages.items() if len(values) == 1}
    assert len(short) == (11 if last_row else 0)  # from attn_out of the last layer on
    for (layer, stage), values in run.stages.items():
        right = theirs.read(stage, layer)[-len(values) :]
        if stage == "attn_scores":
            values, right = np.tril(values), np.tril(right)
        # far on, the rounding of a frequency is a rotation of its own
        assert distance(values, right) <= (1e-5 if more else 2e-6), (layer, stage)


STEPS = {
    "decoded": (16, *[1] * 8),
    "in chunks": (9, 9, 6),
    "chunks and decoded": (7, 7, 6, 1, 1, 2),
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
KINDS: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": checkpoints.QWEN3,
    "sliding": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "yarn": {"rope_scaling": YARN},
}


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("kind", KINDS)
def test_in_calls_it_equals_the_jax_forward_in_one(tmp_path, kind, steps):
    model = checkpoints.random_checkpoint(tmp_path, **KINDS[kind])
    theirs = qwen_jax.trace_model(model, TOKENS, logits="all")
    run = Engine.open(model).run(TOKENS, "all", steps=STEPS[steps])
    assert (run.steps, run.cache, len(run.calls)) == (STEPS[steps], "float32", len(STEPS[steps]))
    for (layer, stage), values in run.stages.items():
        right = run.stages[layer, "k_post_rope"] if stage == "k_cache" else None
        if stage not in engine.CACHED:
            right = theirs.read(stage, layer)
        if stage == "attn_scores":
            values, right = np.tril(values), np.tril(right)
        if right is not None:
            assert distance(values, right) <= 2e-6, (layer, stage)
    last = run.calls[-1][1, "v_cache"]
    assert np.array_equal(last, run.stages[1, "v_cache"])  # no row changes once it is written


def test_its_stages_are_those_of_the_tables():
    for name, stages in LAYER_STAGES.items():
        assert stages == tuple(row.name for row in ARCHITECTURES[name].layer_stages)
    order = tuple(row.name for row in ARCHITECTURES["qwen2"].cached.layer_stages)
    cached = Engine(Shape("qwen2", 1, *[8] * 5, 1e-6, 1e4, False), {})._stages_of_a_layer
    assert tuple(cached(dict.fromkeys(engine.CACHED))) == order


PLANTED = ("checkpoints", "faults", "cache_faults")


def test_it_shares_nothing_with_what_it_tries():
    ours = "tools.numpy_engine", "tests.planted"
    planted = (ROOT / "tests" / "planted" / f"{name}.py" for name in PLANTED)
    files = [*(ROOT / "tools" / "numpy_engine").glob("*.py"), *planted]
    assert len(files) == 6
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            roots = {name.partition(".")[0] for name in names if not name.startswith(ours)}
            assert not roots & {"qwen_jax", "stages", "tools", "oracle", "jax", "torch"}, path


# On these small checkpoints: 1/sqrt(16) is exact in 16 bits, nothing is as large as 65504, and the
# weights are float16 or coarser as they lie.
WITHOUT_EFFECT_HERE = (
    "attn_scores.scale_rounded",
    "ffn_swigl.saturated_to_65504",
    "ffn_gate.weight_f16",
    "ffn_up.weight_bf16",  # an engine of bfloat16 rounds them so itself
)


@pytest.mark.parametrize("mode", ["f32", "bf16"])
def test_a_fault_changes_its_stage_and_nothing_before_it(small, clean, mode):
    known, right = faults.of(small[0]), clean[mode].stages
    assert len(known) >= 180
    keys = list(right)
    for name, fault in known.items():
        wrong = faults.plant(small, TOKENS, fault, [LAYER], mode, "all")
        planted = fault.keys(Engine(*small), [LAYER])
        assert list(wrong.stages) == keys
        assert sorted(wrong.effects, key=str) == sorted(planted, key=str)

        same = [np.array_equal(right[key], wrong.stages[key], equal_nan=True) for key in right]
        first = min(keys.index(key) for key in planted)
        assert all(same[:first]), name
        if fault.dump:
            assert sum(same) == len(same) - 1, name
        if fault.clean:
            assert not faults.plain(wrong, mode), name
            continue
        if name == "ffn_out.bf16_in_one_layer" and mode == "bf16":
            continue  # the right precision there
        if name in WITHOUT_EFFECT_HERE:
            continue
        assert all(not same[keys.index(key)] for key in planted), name
        assert all(effect > 0 for effect in wrong.effects.values()), name
        if mode == "f32":
            assert faults.plain(wrong, mode) == planted, (name, wrong.peaks)


def test_a_fault_can_be_planted_in_every_layer(small):
    for fault in faults.of(small[0]).values():
        run = faults.plant(small, TOKENS, fault)
        layers = len(engine.keys_of(fault.stage, 3))
        assert len(run.effects) == layers * len(fault.stages), fault.name


def test_faults_cover_every_stage_and_say_what_they_are():
    known = {stage for f in faults.FAULTS.values() for stage in f.stages}
    assert known == set(OPERATIONS) - set(engine.CACHED)
    for fault in faults.FAULTS.values():
        assert fault.clean or fault.diagnosis or fault.shape, fault.name
        assert fault.says


@pytest.mark.parametrize(
    "mode, at_least, at_most",
    [("f32", 0, 0), ("blocked", 1e-8, 3e-6), ("online_softmax", 1e-8, 3e-6),
     ("f16_kv", 1e-5, 2e-3), ("tf32", 1e-4, 5e-3), ("f16", 1e-4, 5e-3),
     ("bf16", 1e-3, 5e-2), ("bf16_matmul", 1e-3, 5e-2), ("act8", 1e-3, 5e-2)],
)  # fmt: skip
def test_a_mode_is_as_precise_as_its_name_says(clean, mode, at_least, at_most):
    error = distance(clean[mode].stages[None, "lm_head"], clean["f32"].stages[None, "lm_head"])
    assert at_least <= error <= at_most


def test_16_bit_modes_store_what_their_format_can_hold(clean):
    for mode, dtype in (("bf16", ml_dtypes.bfloat16), ("f16", np.float16)):
        for key, values in clean[mode].stages.items():
            assert np.array_equal(values, values.astype(dtype).astype(np.float32)), (mode, key)


def test_only_attention_reads_the_rounded_cache(small, clean):
    stages = small[0].stages
    for stage in stages[: stages.index("attn_scores")]:
        assert np.array_equal(clean["f16_kv"].stages[0, stage], clean["f32"].stages[0, stage]), (
            stage
        )
    assert not np.array_equal(
        clean["f16_kv"].stages[0, "attn_scores"], clean["f32"].stages[0, "attn_scores"]
    )


def test_rounding_is_to_nearest_even():
    random = np.random.default_rng(0)
    x = random.standard_normal(10000).astype(np.float32) * np.exp2(random.integers(-60, 60, 10000))
    x = np.concatenate([x, [0, -0.0, np.inf, -np.inf, 1 + 2**-8, 1 + 3 * 2**-8]], dtype=np.float32)
    assert np.array_equal(engine.bf16(x), x.astype(ml_dtypes.bfloat16).astype(np.float32))
    assert np.isnan(engine.bf16(np.full(1, np.nan, np.float32)))[0]
    assert np.array_equal(engine.tf32(np.float32([1 + 2**-11, 1 + 3 * 2**-11])), [1, 1 + 2**-9])
    y = random.standard_normal((3, 70)).astype(np.float32)
    assert np.abs(engine.q8_0(y) - y).max() <= np.abs(y).max() / 127 * 0.51
    assert len(np.unique(engine.q8_0(y)[0, :32])) <= 32


def test_a_dump_is_a_foreign_trace(clean, tmp_path):
    run = clean["f32"]
    run.dump(tmp_path, omit={"qkv_matmul", "attn_softmax"})
    files = {
        path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()
    }
    assert len(files) == len(run.stages) - 2 * 3
    assert {"final_norm.bin", "lm_head.bin", "layer-0/embedding.bin"} <= files
    assert "layer-1/qkv_matmul.bin" not in files
    for (layer, stage), values in run.stages.items():
        path = engine.aprt_path(tmp_path, layer, stage)
        if path.exists():
            assert np.array_equal(aprt.read(path, layer), values.ravel())


def test_logits_of_the_last_position_are_the_default(small, clean):
    logits = Engine(*small).run(TOKENS).stages[None, "lm_head"]
    assert np.array_equal(logits, clean["f32"].stages[None, "lm_head"][-1])


ERRORS = {  # of the rows of k, relative, on the hard checkpoint, whose blocks hold its bias
    "float32": (0, 0), "float16": (1e-4, 4e-4), "bfloat16": (1e-3, 3e-3), "int8": (1e-3, 1e-2),
    "q8_0": (1e-3, 1e-2), "float8_e4m3fn": (1e-2, 4e-2), "float8_e5m2": (2e-2, 8e-2),
    "q4_0": (2e-2, 1e-1),
}  # fmt: skip


@pytest.mark.parametrize("cache", engine.CACHES)
def test_a_cache_is_as_precise_as_its_format(tmp_path, cache):
    model = Engine.open(checkpoints.hard_checkpoint(tmp_path))
    run = model.run(checkpoints.hard_tokens(24), steps=(16, *[1] * 8), cache=cache)
    low, high = ERRORS[cache]
    for layer in range(model.shape.layers):
        found, k = run.stages[layer, "k_cache"], run.stages[layer, "k_post_rope"]
        assert low <= distance(found, k) <= high
        assert np.array_equal(run.calls[-1][layer, "k_cache"], found)
    assert ERRORS.keys() == engine.CACHES.keys()


def test_a_format_that_the_heads_do_not_divide_is_refused(small):
    with pytest.raises(ValueError, match="blocks of 32, and heads have 16"):
        Engine(*small).run(TOKENS, cache="q4_0")
    with pytest.raises(ValueError, match="are not of 24 tokens"):
        Engine(*small).run(TOKENS, steps=(16, 7))


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ((), "the following arguments are required: FAULT"),
        (("nofault",), "no fault 'nofault'; list shows those that there are"),
        (("none", "--layers", "9"), "--layers 9: layers go from 0 to 4"),
        (("none", "--tokens", "1,99999"), "token 99999: the model has 0 to 2047"),
        (("none", "--tokens=-5"), "token -5: the model has 0 to 2047"),
        (("none", "--tokens", "1", "--first-position", "-3"), "-3: positions begin at 0"),
        (("none", "--tokens", "1", "--out", "/dev/null/x"), "--out /dev/null/x: Not a directory"),
        (("cache.kv_exchanged",), "is made in a decode; say how long with --decode N"),
    ],
)
def test_wrong_use_is_one_line(asked, says, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["x", *asked])
    with pytest.raises(SystemExit) as ended:
        command.main()
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and not out and not [*tmp_path.iterdir()]
    assert err.startswith("error: ") and err.count("\n") == 1 and says in err


def test_a_dump_by_calls_has_the_rows_of_each(small, tmp_path):
    run = Engine(*small).run(TOKENS, "all", steps=(22, 1, 1))
    run.dump_calls(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-000{n}" for n in range(3)]
    kept = aprt.read(tmp_path / "step-0001" / "layer-2" / "k_cache.bin", 2)
    assert np.array_equal(kept, run.stages[2, "k_cache"][:23].ravel())
    row = aprt.read(tmp_path / "step-0002" / "layer-0" / "embedding.bin", 0)
    assert np.array_equal(row, run.stages[0, "embedding"][23])


def test_weights_can_be_changed_after_loading(small, clean):
    def change(weights):
        weights["model.layers.1.mlp.up_proj.weight"] = weights[
            "model.layers.1.mlp.gate_proj.weight"
        ]

    run = Engine(*small, mutate=change).run(TOKENS, "all")
    planted = faults.plant(small, TOKENS, "ffn_up.gate_up_swapped", [1], logits="all")
    assert all(np.array_equal(run.stages[key], planted.stages[key]) for key in run.stages)
    assert not np.array_equal(run.stages[1, "ffn_up"], clean["f32"].stages[1, "ffn_up"])


def test_four_bit_weights_have_sixteen_steps(tmp_path):
    source = checkpoints.random_checkpoint(tmp_path / "source", seed=4)
    _, before = engine.load(source)
    _, after = engine.load(checkpoints.four_bit_checkpoint(source, tmp_path / "four"))
    name = "model.layers.0.mlp.down_proj.weight"
    assert all(len(np.unique(block)) <= 16 for block in after[name].reshape(-1, 32))
    assert 0.02 < distance(after[name], before[name]) < 0.12
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert np.array_equal(after[name], before[name])


def test_a_hard_qwen3_is_hard(tmp_path):
    model = Engine.open(checkpoints.hard_checkpoint(tmp_path, **checkpoints.QWEN3))
    rows = checkpoints.hardness(model, model.run(checkpoints.hard_tokens(48)))
    assert [round(row.bias) for row in rows] == [7, 1, 1, 7]
    assert all(0.05 < row.k < 0.2 for row in rows)
    assert all(row.first > 300 and 20 < row.others < 200 for row in rows[1:])
    assert rows[0].score > 30 and rows[-1].score > 30


def test_the_hard_checkpoint_is_hard(tmp_path):
    model = Engine.open(checkpoints.hard_checkpoint(tmp_path))
    tokens = checkpoints.hard_tokens(48)
    run = model.run(tokens)
    rows = checkpoints.hardness(model, run)
    assert [round(row.bias) for row in rows] == [35, 1, 1, 35]
    assert all(0.5 < row.k < 2 for row in rows)
    assert all(row.first > 300 and 20 < row.others < 200 for row in rows[1:])

    def cosine(name: str, layer: int) -> float:
        wrong = faults.plant((model.shape, model.weights), tokens, name, [layer])
        key = (layer, faults.FAULTS[name].stage)
        a, b = (x.stages[key].ravel().astype(np.float64) for x in (wrong, run))
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    # What a bar of 0.999 lets through, although all of it is plainly wrong.
    assert cosine("post_attn_residual.residual_subtracted", 3) > 0.999
    assert cosine("post_ffn_residual.residual_layer_input", 2) > 0.999
    assert cosine("k_post_rope.rope_theta", 3) > 0.99


def test_a_layer_that_is_not_there_is_refused(monkeypatch, tmp_path, capsys):
    """Rather than a dump without the fault that its last line speaks of."""
    out = tmp_path / "dump"
    asked = ["x", "attn_norm.norm_skipped", "--layers", "0", "5", "--out", str(out)]
    monkeypatch.setattr("sys.argv", asked)
    with pytest.raises(SystemExit):
        command.main()
    assert "--layers 5: layers go from 0 to 4" in capsys.readouterr().err and not out.exists()
