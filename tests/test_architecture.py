"""The stage table is consistent with itself, and its lists parse as DESIGN says."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stages.table import (
    ALIASES,
    LAYER_INPUT,
    NAMES,
    QKV,
    STAGE,
    STAGES,
    TOKENS,
    axis_size,
    computation_order,
    parse_layers,
    parse_stages,
    stage_axes,
    stage_shape,
)

from stages import table
from stages.errors import UserError

# The stages in computation order, as people and foreign engines know them. A literal: renaming or
# reordering one changes every trace that there is.
ORDER = (
    "embedding attn_norm qkv_matmul qkv_bias q_post_rope k_post_rope attn_scores attn_softmax "
    "attention attn_out post_attn_residual ffn_norm ffn_gate ffn_up ffn_silu ffn_swigl ffn_out "
    "post_ffn_residual final_norm lm_head"
)
DIMS = {"T": 5, "S": 7, "N": 4, "K": 2, "H": 8, "D": 24, "F": 40, "V": 48}


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert message and message == message.strip() and len(message.splitlines()) == 1
    return message


def test_names_and_their_order():
    assert " ".join(NAMES) == ORDER
    assert len(NAMES) == len(STAGES) == 20


def test_inputs_are_values_of_earlier_stages():
    known = {TOKENS}
    for stage in STAGES:
        assert stage.inputs and set(stage.inputs) <= known, stage.name
        known |= {stage.name}
        if stage.scope == "start":  # what the first layer gets; later ones get a layer's output
            known |= {LAYER_INPUT}


def test_every_value_but_the_last_is_used():
    used = {name for stage in STAGES for name in stage.inputs} | {"embedding"}  # as layer_input
    assert set(NAMES) - used == {"lm_head"}


def test_scopes_come_in_order():
    assert [s.scope for s in STAGES] == sorted(
        (s.scope for s in STAGES), key=["start", "layer", "end"].index
    )
    assert STAGE["embedding"].layer_of(3) == 0
    assert STAGE["ffn_up"].layer_of(3) == 3
    assert STAGE["lm_head"].layer_of(3) is None


def test_axes_have_sizes():
    for stage in STAGES:
        assert all(axis_size(axis, DIMS) > 0 for axis in stage.axes), stage.name
    assert axis_size(QKV, DIMS) == 64
    assert axis_size("N*H", DIMS) == 32
    assert stage_shape(STAGE["attn_scores"], DIMS) == (4, 5, 7)
    assert stage_shape(STAGE["k_post_rope"], DIMS) == (5, 2, 8)


def test_only_lm_head_depends_on_the_kept_logits():
    assert stage_axes(STAGE["lm_head"], "last") == ("V",)
    assert stage_axes(STAGE["lm_head"], "all") == ("T", "V")
    assert stage_shape(STAGE["lm_head"], DIMS, "last") == (48,)
    for stage in STAGES[:-1]:
        assert stage_axes(stage, "last") == stage.axes


def test_every_row_and_axis_letter_is_explained():
    for stage in STAGES:
        assert stage.value.strip() == stage.value != "", stage.name
        for axis in stage.axes:
            letters = [letter for letter in axis if letter.isalpha()]
            assert all(f"{letter} " in (table.__doc__ or "") for letter in letters), stage.name


def test_computation_order():
    order = [(stage.name, layer) for stage, layer in computation_order(2)]
    assert order[:2] == [("embedding", 0), ("attn_norm", 0)]
    assert order[-3:] == [("post_ffn_residual", 1), ("final_norm", None), ("lm_head", None)]
    assert len(order) == len(set(order)) == 3 + 2 * 17


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("ffn_up", ("ffn_up",)),
        ("lm_head,embedding", ("embedding", "lm_head")),
        (" FFN_Up ,\tAttn_Norm\n", ("attn_norm", "ffn_up")),
        ("layer_output", ("post_ffn_residual",)),
        ("Layer_Output,final_norm", ("post_ffn_residual", "final_norm")),
        ("all", NAMES),
        (" ALL ", NAMES),
    ],
)
def test_stage_lists(text, names):
    assert parse_stages(text) == names


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
def test_wrong_stage_lists(text, says):
    with pytest.raises(UserError) as error:
        parse_stages(text)
    assert says in one_line(error)


@pytest.mark.parametrize("text", ["", "ffn_upp"])
def test_a_wrong_stage_list_is_answered_with_the_names(text):
    with pytest.raises(UserError) as error:
        parse_stages(text)
    for name in ("all", *NAMES):
        assert name in one_line(error)


@settings(deadline=None)
@given(st.sets(st.sampled_from(NAMES), min_size=1), st.randoms())
def test_any_order_and_case_of_names_gives_computation_order(names, random):
    shuffled = sorted(names, key=lambda name: random.random())
    spelled = [random.choice([str.upper, str.title, str.lower])(name) for name in shuffled]
    blanks = [random.choice(["", " ", "  "]) for _ in spelled]
    text = ",".join(blank + name + blank for name, blank in zip(spelled, blanks, strict=True))
    assert parse_stages(text) == tuple(name for name in NAMES if name in names)


def test_aliases_name_stages_and_hide_none():
    assert set(ALIASES.values()) <= set(NAMES)
    assert not set(ALIASES) & set(NAMES)


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
