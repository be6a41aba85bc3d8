"""The tables are consistent with themselves and with other people's, and their lists parse."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.config import from_hf
from stages import architecture
from stages.architecture import LAYER_INPUT, LINEAR, QKV, TOKENS, axis_size
from stages.architectures import ALL_NAMES, ARCHITECTURES, any_stage
from stages.architectures import architecture as by_name
from stages.errors import UserError
from stages.qwen2 import QWEN2
from stages.qwen3 import QWEN3
from stages.selection import parse_layers, parse_stages
from tests.tiny import hf_config

# The stages in computation order, as people and foreign engines know them. A literal: renaming or
# reordering one changes every trace that there is.
ORDER = {
    "qwen2": (
        "embedding attn_norm qkv_matmul qkv_bias q_post_rope k_post_rope attn_scores attn_softmax "
        "attention attn_out post_attn_residual ffn_norm ffn_gate ffn_up ffn_silu ffn_swigl ffn_out "
        "post_ffn_residual final_norm lm_head"
    ),
    "qwen3": (
        "embedding attn_norm qkv_matmul q_norm k_norm q_post_rope k_post_rope attn_scores "
        "attn_softmax attention attn_out post_attn_residual ffn_norm ffn_gate ffn_up ffn_silu "
        "ffn_swigl ffn_out post_ffn_residual final_norm lm_head"
    ),
}
DIMS = {"T": 5, "S": 7, "N": 4, "K": 2, "H": 8, "D": 24, "F": 40, "V": 48}
SQUARE = DIMS | {"S": 5}  # of a whole sequence

EACH = pytest.mark.parametrize("arch", ARCHITECTURES.values(), ids=list(ARCHITECTURES))
EVERY = [(arch, stage) for arch in ARCHITECTURES.values() for stage in arch.stages]
EVERY_STAGE = pytest.mark.parametrize(
    ("arch", "stage"), EVERY, ids=[f"{arch.name}-{stage.name}" for arch, stage in EVERY]
)


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert message and message == message.strip() and len(message.splitlines()) == 1
    return message


# --- the tables


def test_the_architectures():
    assert list(ARCHITECTURES) == list(ORDER) == ["qwen2", "qwen3"]
    assert (by_name("qwen2"), by_name("qwen3")) == (QWEN2, QWEN3)
    assert QWEN2.hf_class == "Qwen2ForCausalLM" and QWEN3.hf_class == "Qwen3ForCausalLM"
    with pytest.raises(UserError) as error:
        by_name("llama")
    assert "'llama'" in one_line(error) and "qwen2, qwen3" in one_line(error)


@EACH
def test_names_and_their_order(arch):
    assert " ".join(arch.names) == ORDER[arch.name]
    assert len(arch.names) == len(arch.stages) == {"qwen2": 20, "qwen3": 21}[arch.name]
    assert all(arch.stage[name].name == name for name in arch.names)


def test_one_order_that_all_architectures_share():
    cached = [arch.cached for arch in ARCHITECTURES.values()]
    assert set(ALL_NAMES) == {name for arch in cached for name in arch.names}
    assert len(set(ALL_NAMES)) == len(ALL_NAMES)
    for arch in ARCHITECTURES.values():
        assert tuple(name for name in ALL_NAMES if name in arch.names) == arch.names
    assert any_stage("qkv_bias") is QWEN2.stage["qkv_bias"]
    assert any_stage("q_norm") is QWEN3.stage["q_norm"]
    assert any_stage("attn_scores") is QWEN2.stage["attn_scores"]  # not the one with a cache


def test_a_cache_stands_between_its_input_and_attention():
    """Without one there are the twenty stages; with one, two more, and only attention's reading of
    keys and values changes."""
    for arch in ARCHITECTURES.values():
        cached = arch.cached
        assert set(cached.names) - set(arch.names) == {"k_cache", "v_cache"}
        changed = [n for n in arch.names if cached.stage[n] != arch.stage[n]]
        assert changed == ["attn_scores", "attention"]
        for name, cache in zip(changed, ("k_cache", "v_cache"), strict=True):
            assert cached.stage[name].keys == (cache,)
            assert arch.stage[name].keys == cached.stage[cache].inputs
        only_k = arch.with_cache({"k_cache"})
        assert only_k.stage["attention"] == arch.stage["attention"]
        assert only_k.stage["attn_scores"] == cached.stage["attn_scores"]


def test_what_qwen3_has_of_its_own():
    assert set(QWEN3.names) - set(QWEN2.names) == {"q_norm", "k_norm"}
    assert set(QWEN2.names) - set(QWEN3.names) == {"qkv_bias"}
    assert set(QWEN3.parameter) - set(QWEN2.parameter) == {"q_norm", "k_norm"}
    assert set(QWEN2.parameter) - set(QWEN3.parameter) == {"q_bias", "k_bias", "v_bias"}
    for name in ("q", "k"):
        norm = QWEN3.stage[f"{name}_norm"]
        assert (norm.inputs, norm.parameters) == (("qkv_matmul",), (f"{name}_norm",))
        assert QWEN3.stage[f"{name}_post_rope"].inputs == (f"{name}_norm",)
    assert QWEN3.stage["attention"].inputs == ("attn_softmax", "qkv_matmul")  # v has no norm


@EACH
def test_inputs_are_values_of_earlier_stages(arch):
    known = {TOKENS}
    for stage in arch.stages:
        assert stage.inputs and set(stage.inputs) <= known, stage.name
        assert set(stage.keys) | set(stage.unrounded) <= set(stage.inputs), stage.name
        known |= {stage.name}
        if stage.scope == "start":  # what the first layer gets; later ones get a layer's output
            known |= {LAYER_INPUT}


@EACH
def test_every_value_but_the_last_is_used(arch):
    used = {name for stage in arch.stages for name in stage.inputs}
    assert set(arch.names) - used == {"embedding", "lm_head"}  # the first as layer_input
    assert (arch.first.name, arch.head.name) == ("embedding", "lm_head")
    assert arch.layer_output.name == "post_ffn_residual"


@EACH
def test_every_parameter_is_used_once_and_in_its_scope(arch):
    used = [(name, stage.scope) for stage in arch.stages for name in stage.parameters]
    assert sorted(used) == sorted((each.name, each.scope) for each in arch.parameters)
    for name in arch.parameter:
        assert name in arch.used_by(name).parameters
    assert arch.embedding.name == "embed_tokens"
    assert [each.tied_to for each in arch.parameters if each.tied_to] == ["embed_tokens"]


@EACH
def test_a_linear_stage_is_its_weights_side_by_side(arch):
    for stage in arch.stages:
        assert stage.linear == (stage.kind is LINEAR)
        if stage.linear:
            shapes = [arch.parameter_shape(name, DIMS) for name in stage.parameters]
            (source,) = stage.inputs
            inner = {math.prod(axis_size(a, DIMS) for a in arch.axes_of(source)[1:])}
            assert {width for _, width in shapes} == inner, stage.name
            assert stage.shape(DIMS) == (5, sum(out for out, _ in shapes)), stage.name


@EACH
def test_scopes_come_in_order(arch):
    scopes = [s.scope for s in arch.stages]
    assert scopes == sorted(scopes, key=["start", "layer", "end"].index)
    assert arch.stages == (*arch.start_stages, *arch.layer_stages, *arch.end_stages)
    assert arch.stage["embedding"].layer_of(3) == 0
    assert arch.stage["ffn_up"].layer_of(3) == 3
    assert arch.stage["lm_head"].layer_of(3) is None


def test_axes_have_sizes():
    for arch in ARCHITECTURES.values():
        for stage in (*arch.stages, *arch.parameters):
            assert all(axis_size(axis, DIMS) > 0 for axis in stage.axes), stage.name
    for axis, size in ((QKV, 64), ("N*H", 32), ("H", 8), ("2K", 4), ("N+2K", 8), ("12K*H", 192)):
        assert axis_size(axis, DIMS) == size
    with pytest.raises(KeyError):
        axis_size("X", DIMS)
    assert QWEN2.stage["attn_scores"].shape(DIMS) == (4, 5, 7)
    assert QWEN2.stage["k_post_rope"].shape(DIMS) == (5, 2, 8)
    assert QWEN2.stage["qkv_bias"].shape(DIMS) == (5, 64)
    assert QWEN3.stage["q_norm"].shape(DIMS) == (5, 4, 8)
    assert QWEN3.stage["k_norm"].shape(DIMS) == (5, 2, 8)


@EACH
def test_only_the_last_rows_of_a_stage(arch):
    for stage in arch.stages:
        whole, last = stage.shape(DIMS), stage.shape(DIMS, rows=2)
        place = stage.axes.index("T")
        assert last == (*whole[:place], 2, *whole[place + 1 :]), stage.name
    assert arch.stage["attn_scores"].shape(DIMS, rows=1) == (4, 1, 7)  # S stays


@EACH
def test_only_lm_head_depends_on_the_kept_logits(arch):
    head = arch.stage["lm_head"]
    assert head.stored_axes("last") == ("V",)
    assert head.stored_axes("all") == ("T", "V")
    assert head.shape(DIMS, "last") == (48,)
    for stage in arch.stages[:-1]:
        assert not stage.last and stage.stored_axes("last") == stage.axes


@EACH
def test_every_row_and_axis_letter_is_explained(arch):
    for stage in arch.stages:
        assert stage.value.strip() == stage.value != "", stage.name
    for row in (*arch.stages, *arch.parameters):
        for axis in row.axes:
            letters = [letter for letter in axis if letter.isalpha()]
            assert all(f"{x} " in (architecture.__doc__ or "") for x in letters), row.name


@EACH
def test_computation_order(arch):
    order = [(stage.name, layer) for stage, layer in arch.computation_order(2)]
    assert order[:2] == [("embedding", 0), ("attn_norm", 0)]
    assert order[-3:] == [("post_ffn_residual", 1), ("final_norm", None), ("lm_head", None)]
    assert len(order) == len(set(order)) == 3 + 2 * {"qwen2": 17, "qwen3": 18}[arch.name]


# --- who reads what


@EACH
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_readers_are_those_whose_input_is_stored_there(arch, layers):
    order = [(stage.name, layer) for stage, layer in arch.computation_order(layers)]
    read = {key: list(arch.readers(*key, layers)) for key in order}
    wanted = {key: [] for key in order}
    for stage, layer in arch.computation_order(layers):
        for name in stage.inputs:
            if name != TOKENS:
                source = arch.stored_as(name, layer, layers)
                assert order.index(source) < order.index((stage.name, layer))
                wanted[source].append((stage.name, layer))
    assert read == wanted
    assert [key for key in order if not read[key]] == [("lm_head", None)]


def test_readers_of_some_stages():
    for arch in ARCHITECTURES.values():
        assert list(arch.readers("embedding", 0, 2)) == [
            ("attn_norm", 0), ("post_attn_residual", 0)
        ]  # fmt: skip
        assert list(arch.readers("post_ffn_residual", 0, 2)) == [
            ("attn_norm", 1), ("post_attn_residual", 1)
        ]  # fmt: skip
        assert list(arch.readers("post_ffn_residual", 1, 2)) == [("final_norm", None)]
    qkv = ["q_post_rope", "k_post_rope", "attention"]
    assert [name for name, _ in QWEN2.readers("qkv_bias", 1, 2)] == qkv
    qkv = ["q_norm", "k_norm", "attention"]
    assert [name for name, _ in QWEN3.readers("qkv_matmul", 1, 2)] == qkv


def test_the_keys_are_read_at_every_key_position():
    for arch in ARCHITECTURES.values():
        keys = {stage.name: stage.keys for stage in arch.stages if stage.keys}
        before = "qkv_bias" if arch is QWEN2 else "qkv_matmul"
        assert keys == {"attn_scores": ("k_post_rope",), "attention": (before,)}
    assert {stage.name: stage.unrounded for stage in QWEN2.stages if stage.unrounded} == {
        "qkv_bias": ("qkv_matmul",)
    }
    assert not any(stage.unrounded for stage in QWEN3.stages)


# --- a stage as a matrix, and its slices


def numbers(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def heads_of(stage):
    """Its head axis, found by hand: the axis, and how many heads."""
    counts = {"q_post_rope": 4, "q_norm": 4, "k_post_rope": 2, "k_norm": 2, "attention": 4}
    counts |= {"attn_scores": 4, "attn_softmax": 4, "qkv_matmul": 8, "qkv_bias": 8}
    return counts.get(stage.name)


@EVERY_STAGE
def test_how_many_heads(arch, stage):
    assert stage.heads(SQUARE) == heads_of(stage)
    assert stage.heads_lead == (stage.name in ("attn_scores", "attn_softmax"))


@EVERY_STAGE
@pytest.mark.parametrize("batch", [(), (1,)])
def test_a_stage_as_a_matrix(arch, stage, batch):
    value = numbers((*batch, *stage.shape(SQUARE)))
    matrix = stage.matrix(value)
    rows = 20 if stage.heads_lead else 5
    assert matrix.shape == (rows, value.size // rows)
    np.testing.assert_array_equal(matrix.reshape(-1), value.reshape(-1))


def slices_of(stage, value):
    """Axis -> the slices of a value, written out: [slices, what is in each]."""
    heads = heads_of(stage)
    if stage.heads_lead:
        order = {"position": (1, 0, 2), "head": (0, 1, 2), "channel": (2, 0, 1)}
        return {
            axis: value.transpose(p).reshape(value.shape[p[0]], -1) for axis, p in order.items()
        }
    flat = value.reshape(len(value), -1)
    found = {"position": flat, "channel": flat.T}
    if heads:
        found["head"] = flat.reshape(len(flat), heads, -1).swapaxes(0, 1).reshape(heads, -1)
    return found


@EVERY_STAGE
def test_sums_are_folded_to_slices(arch, stage):
    value = numbers(stage.shape(SQUARE)) ** 2
    matrix = stage.matrix(value)
    found = stage.fold(stage.heads(SQUARE), matrix.sum(1), matrix.sum(0))
    wanted = {axis: part.sum(1) for axis, part in slices_of(stage, value).items()}
    assert found.keys() == wanted.keys()
    for axis, sums in wanted.items():
        np.testing.assert_allclose(found[axis], sums, err_msg=axis)
    both = np.stack([matrix.sum(1), 2 * matrix.sum(1)]), np.stack([matrix.sum(0)] * 2)
    for axis, sums in stage.fold(stage.heads(SQUARE), *both).items():
        np.testing.assert_allclose(sums[0], wanted[axis], err_msg=axis)


@EVERY_STAGE
@pytest.mark.parametrize("batch", [(), (1,)])
def test_a_mask_of_slices_is_spread_over_the_value(arch, stage, batch):
    shape = (*batch, *stage.shape(SQUARE))
    places = np.arange(math.prod(shape)).reshape(shape)
    for axis, part in slices_of(stage, places.reshape(stage.shape(SQUARE))).items():
        mask = np.arange(len(part)) % 3 == 1
        spread = stage.spread(axis, mask, shape)
        assert spread.shape == shape and spread.dtype == bool
        assert sorted(places[spread]) == sorted(part[mask].reshape(-1)), axis


@EVERY_STAGE
def test_a_value_by_heads_and_back(arch, stage):
    heads = stage.heads(SQUARE)
    if not heads:
        return
    value = numbers((1, *stage.shape(SQUARE)))
    grid = stage.by_head(heads, value)
    assert grid.shape[:2] == (heads, 5)
    by_hand = slices_of(stage, value[0])["head"]
    np.testing.assert_array_equal(grid.reshape(heads, -1), by_hand)
    np.testing.assert_array_equal(stage.from_heads(grid, value.shape), value)


# --- parameters and tensors


@EACH
@pytest.mark.parametrize("tied", [False, True])
def test_tensors_are_those_of_transformers(arch, tied):
    transformers = pytest.importorskip("transformers")
    raw = hf_config(model_type=arch.name, tie_word_embeddings=tied)
    # whatever transformers makes of it: bias or not, norms, N*H (32) is not D (24)
    theirs = transformers.AutoConfig.for_model(**raw)
    model = getattr(transformers, arch.hf_class)(theirs)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if tied:
        assert wanted.pop("lm_head.weight") == wanted["model.embed_tokens.weight"]
    config = from_hf(raw)
    assert config.shapes == wanted
    for layer in (0, 1):
        named = config.tensor_names("layer", layer).values()
        assert set(named) == {name for name in wanted if f".layers.{layer}." in name}
    ends = {"embed_tokens": "model.embed_tokens.weight"}, {"norm": "model.norm.weight"}
    assert config.tensor_names("start") == ends[0]
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    assert config.tensor_names("end") == ends[1] | {"lm_head": head}


@EACH
def test_gguf_names_are_those_of_its_package(arch):
    gguf = pytest.importorskip("gguf")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.name.upper()], 3)
    for tensor, (parameter, layer) in arch.tensors(3, tied=False).items():
        stem, _, suffix = tensor.rpartition(".")
        assert parameter.gguf_name(layer) == f"{names.get_name(stem)}.{suffix}"


def test_the_module_of_a_parameter():
    assert QWEN2.parameter["q_bias"].module == "self_attn.q_proj"
    assert QWEN3.parameter["q_norm"].module == "self_attn.q_norm"
    assert QWEN2.parameter["embed_tokens"].module == "model.embed_tokens"


# --- lists of stages


@EACH
@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("ffn_up", ("ffn_up",)),
        ("lm_head,embedding", ("embedding", "lm_head")),
        (" FFN_Up ,\tAttn_Norm\n", ("attn_norm", "ffn_up")),
        ("layer_output", ("post_ffn_residual",)),
        ("Layer_Output,final_norm", ("post_ffn_residual", "final_norm")),
        ("all", None),
        (" ALL ", None),
    ],
)
def test_stage_lists(arch, text, names):
    assert parse_stages(text, arch) == (arch.names if names is None else names)


@EACH
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        ("  ", "empty"),
        ("ffn_up,", "empty"),
        ("ffn_up,,ffn_gate", "empty"),
        ("ffn_upp", "'ffn_upp'"),
        ("ffn_up ffn_gate", "'ffn_up ffn_gate'"),
        ("ffn_up\nffn_gate", "'ffn_up\\nffn_gate'"),
        ("ffn_up,FFN_UP", "'ffn_up' twice"),
        ("layer_output,post_ffn_residual", "'post_ffn_residual' twice"),
        ("all,ffn_up", "'ffn_up' twice"),
    ],
)
def test_wrong_stage_lists(arch, text, says):
    with pytest.raises(UserError) as error:
        parse_stages(text, arch)
    assert says in one_line(error)


@pytest.mark.parametrize(("text", "arch"), [("q_norm", QWEN2), ("qkv_bias", QWEN3)])
def test_a_stage_of_another_architecture(text, arch):
    with pytest.raises(UserError) as error:
        parse_stages(text, arch)
    assert f"unknown stage {text!r}" in one_line(error)


@EACH
@pytest.mark.parametrize("text", ["", "ffn_upp"])
def test_a_wrong_stage_list_is_answered_with_the_names(arch, text):
    with pytest.raises(UserError) as error:
        parse_stages(text, arch)
    for name in ("all", *arch.names):
        assert name in one_line(error)


@settings(deadline=None)
@given(st.sampled_from(list(ARCHITECTURES.values())), st.data(), st.randoms())
def test_any_order_and_case_of_names_gives_computation_order(arch, data, random):
    names = data.draw(st.sets(st.sampled_from(arch.names), min_size=1))
    shuffled = sorted(names, key=lambda name: random.random())
    spelled = [random.choice([str.upper, str.title, str.lower])(name) for name in shuffled]
    blanks = [random.choice(["", " ", "  "]) for _ in spelled]
    text = ",".join(blank + name + blank for name, blank in zip(spelled, blanks, strict=True))
    assert parse_stages(text, arch) == tuple(name for name in arch.names if name in names)


@EACH
def test_aliases_name_stages_and_hide_none(arch):
    assert arch.aliases
    assert set(arch.aliases.values()) <= set(arch.names)
    assert not set(arch.aliases) & set(arch.names)


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("all", (0, 1, 2, 3, 4, 5)),
        (" ALL ", (0, 1, 2, 3, 4, 5)),
        ("0", (0,)),
        ("5,0", (0, 5)),
        ("0,3-5", (0, 3, 4, 5)),
        (" 1 , 3-3 ", (1, 3)),
    ],
)
def test_layer_lists(text, layers):
    assert parse_layers(text, 6) == layers


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "''"),
        ("0,", "''"),
        ("x", "'x'"),
        ("1.5", "'1.5'"),
        ("-1", "'-1'"),
        ("1-", "'1-'"),
        ("1-2-3", "'1-2-3'"),
        ("0,all", "'all'"),
        ("6", "layer 6"),
        ("4-6", "0 to 5"),
        ("0-999999999", "6 layers"),
        ("9" * 5000, "no layer"),
        ("3-1", "write 1-3"),
        ("2,1-3", "twice"),
        ("1,1", "twice"),
    ],
)
def test_wrong_layer_lists(text, says):
    with pytest.raises(UserError) as error:
        parse_layers(text, 6)
    assert says in one_line(error)
