"""The stage table: the one list that the forward pass, the files, the diff, the replay and the
documentation all follow.

A stage is a pure function of earlier stages and parameters. A row says what a stage is called,
which values it is computed from, which axes its value has and what kind of arithmetic makes it.
*How* it is computed stands in ``qwen_jax/model.py``, one function per row, under the same name.

Axis letters (used everywhere in this project):

    B batch, T query position, S key position, N query heads, K key/value heads, G = N/K,
    H head size, D hidden, F intermediate, V vocabulary
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from stages.errors import UserError

LAYER_INPUT = "layer_input"  # the embedding, or the previous layer's post_ffn_residual
TOKENS = "tokens"


@dataclass(frozen=True, slots=True)
class Stage:
    """One row of the table.

    Attributes:
        name: what files, tables and command lines call it.
        scope: "start" (once, before the layers; stored under layer 0), "layer" (once a layer) or
            "end" (once, after the layers; stored outside the layer directories).
        inputs: the values it is a function of: earlier stages, or ``layer_input`` / ``tokens``.
        axes: its axes without the batch axis. A product such as ``N*H`` is one axis.
        kind: the arithmetic that makes it. Decides what rounding can act on, and so the scale
            that error is measured against (``qwen_jax.replay.size_squared``).
        value: one line for people.
    """

    name: str
    scope: str
    inputs: tuple[str, ...]
    axes: tuple[str, ...]
    kind: str
    value: str

    def layer_of(self, layer: int | None) -> int | None:
        """The layer number that this stage is stored under: ``None`` for an end stage."""
        return {"start": 0, "layer": layer, "end": None}[self.scope]


def _stage(name: str, scope: str, inputs: str, axes: str, kind: str, value: str) -> Stage:
    return Stage(name, scope, tuple(inputs.split()), tuple(axes.split()), kind, value)


QKV = "(N+2K)*H"  # q, k and v side by side on one axis

# fmt: off
STAGES: tuple[Stage, ...] = (
    _stage("embedding", "start", TOKENS, "T D", "lookup", "row lookup of the token ids"),
    _stage("attn_norm", "layer", LAYER_INPUT, "T D", "norm", "RMSNorm before attention"),
    _stage("qkv_matmul", "layer", "attn_norm", f"T {QKV}", "matmul",
           "q, k, v projections side by side, before the bias"),
    _stage("qkv_bias", "layer", "qkv_matmul", f"T {QKV}", "add", "after the bias"),
    _stage("q_post_rope", "layer", "qkv_bias", "T N H", "rotation",
           "rotated q (half-split pairs)"),
    _stage("k_post_rope", "layer", "qkv_bias", "T K H", "rotation",
           "rotated k (half-split pairs)"),
    _stage("attn_scores", "layer", "q_post_rope k_post_rope", "N T S", "scores",
           "q.k / sqrt(H), before the mask"),
    _stage("attn_softmax", "layer", "attn_scores", "N T S", "softmax",
           "softmax of the masked scores"),
    _stage("attention", "layer", "attn_softmax qkv_bias", "T N*H", "weighted_sum",
           "weighted sum of v, before the output projection"),
    _stage("attn_out", "layer", "attention", "T D", "matmul", "output projection"),
    _stage("post_attn_residual", "layer", f"{LAYER_INPUT} attn_out", "T D", "add",
           "layer input + attn_out"),
    _stage("ffn_norm", "layer", "post_attn_residual", "T D", "norm",
           "RMSNorm before the feed-forward block"),
    _stage("ffn_gate", "layer", "ffn_norm", "T F", "matmul", "gate projection"),
    _stage("ffn_up", "layer", "ffn_norm", "T F", "matmul", "up projection"),
    _stage("ffn_silu", "layer", "ffn_gate", "T F", "silu", "silu(gate)"),
    _stage("ffn_swigl", "layer", "ffn_silu ffn_up", "T F", "product", "silu(gate) * up"),
    _stage("ffn_out", "layer", "ffn_swigl", "T D", "matmul", "down projection"),
    _stage("post_ffn_residual", "layer", "post_attn_residual ffn_out", "T D", "add",
           "the layer's output"),
    _stage("final_norm", "end", "post_ffn_residual", "T D", "norm",
           "RMSNorm of the last layer's output"),
    _stage("lm_head", "end", "final_norm", "T V", "matmul",
           "logits; of the last position by default"),
)
# fmt: on

STAGE = {stage.name: stage for stage in STAGES}
NAMES = tuple(STAGE)
START_STAGES = tuple(s for s in STAGES if s.scope == "start")
LAYER_STAGES = tuple(s for s in STAGES if s.scope == "layer")
END_STAGES = tuple(s for s in STAGES if s.scope == "end")
ALIASES = {"layer_output": "post_ffn_residual"}


def computation_order(num_layers: int) -> Iterable[tuple[Stage, int | None]]:
    """Every (stage, layer it is stored under) of a model, in the order of computation."""
    yield from ((s, 0) for s in START_STAGES)
    yield from ((s, layer) for layer in range(num_layers) for s in LAYER_STAGES)
    yield from ((s, None) for s in END_STAGES)


def axis_size(axis: str, dims: Mapping[str, int]) -> int:
    """Size of an axis of the table, a letter or one of the two products.

    ``dims`` maps the letters T, S, N, K, H, D, F, V to sizes.
    """
    if axis == QKV:
        return (dims["N"] + 2 * dims["K"]) * dims["H"]
    if axis == "N*H":
        return dims["N"] * dims["H"]
    return dims[axis]


def stage_axes(stage: Stage, logits: str = "all") -> tuple[str, ...]:
    """The axes of a stored stage. ``lm_head`` has no T when only the last position is kept."""
    return ("V",) if stage.name == "lm_head" and logits == "last" else stage.axes


def stage_shape(stage: Stage, dims: Mapping[str, int], logits: str = "all") -> tuple[int, ...]:
    """The shape of one sequence's stage, without the batch axis."""
    return tuple(axis_size(axis, dims) for axis in stage_axes(stage, logits))


def parse_stages(text: str) -> tuple[str, ...]:
    """The stage names of a comma-separated list, in computation order.

    Case-insensitive, blanks trimmed; ``all`` is every stage, ``layer_output`` an alias.

    Raises:
        UserError: an empty, unknown or repeated name.
    """
    valid = f"valid names: all, {', '.join(NAMES)}"
    chosen = set()
    for token in text.split(","):
        name = token.strip().lower()
        name = ALIASES.get(name, name)
        if not name:
            raise UserError(f"--stages {text!r} has an empty name; {valid}")
        names = NAMES if name == "all" else (name,)
        if name != "all" and name not in STAGE:
            raise UserError(f"--stages: unknown stage {token.strip()!r}; {valid}")
        for each in names:
            if each in chosen:
                raise UserError(f"--stages {text!r} names {each!r} twice; name each stage once")
            chosen.add(each)
    return tuple(name for name in NAMES if name in chosen)


def parse_layers(text: str, num_layers: int) -> tuple[int, ...]:
    """The layer numbers of a list such as ``0,3-5`` or ``all``, ascending.

    Raises:
        UserError: not a number or range, a layer that the model does not have, or one named twice.
    """
    if text.strip().lower() == "all":
        return tuple(range(num_layers))
    chosen: list[int] = []
    for token in text.split(","):
        match = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", token.strip())
        if not match:
            raise UserError(f"--layers: {token.strip()!r} is no layer; write 0,3-5 or all")
        low, high = int(match[1]), int(match[2] or match[1])
        if low > high:
            raise UserError(f"--layers: {token.strip()!r} runs backwards; write {high}-{low}")
        if high >= num_layers:
            raise UserError(
                f"--layers: layer {high} does not exist; the model has {num_layers} layers, "
                f"0 to {num_layers - 1}"
            )
        chosen.extend(range(low, high + 1))
    if len(set(chosen)) < len(chosen):
        raise UserError(f"--layers {text!r} names a layer twice; name each layer once")
    return tuple(sorted(chosen))
