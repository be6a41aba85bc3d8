"""Mistake of which arithmetic: a part of an operation in fewer bits than the rest."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from tools.localize.formats.registry import half_angles
from tools.localize.mistakes.operands import (
    attention_scale,
)
from tools.localize.mistakes.registry import ALL, NORMS, ROPES, Candidates, Edit, mistake
from tools.localize.stage_case import StageReplay

# A mean square or a root that was kept in 16 bits is off by less: bfloat16 has lost 5 % of a sum.
NOT_UPCAST, ONE_UNIT = 0.1, 2.0**-12


@mistake("mean square kept in 16 bits: rows off by up to {}", NORMS, near=True, fitted=True)
def norm_not_upcast(case: StageReplay) -> Candidates:
    exact = case.exact
    along = (case.dump * exact).sum(-1, keepdims=True)
    factor = along / jnp.maximum((exact * exact).sum(-1, keepdims=True), 1e-300)
    off = float(jnp.abs(factor - 1).max())
    # one factor for all rows is another mistake
    if ONE_UNIT < off < NOT_UPCAST and float(factor.max() - factor.min()) > ONE_UNIT:
        yield Edit(f"{off:.2g}", exact * factor, factor.size)


@mistake("scale 1/sqrt(H) rounded to {}", "attn_scores", near=True)
def scale_rounded(case: StageReplay) -> Candidates:
    for name, dtype in (("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16)):
        rounded = float(np.asarray(attention_scale(case)).astype(dtype))
        if rounded != attention_scale(case):
            yield name, case.exact * (rounded / attention_scale(case))


@mistake("RoPE with {}: neighbours share an angle at late positions", ROPES)
def rope_angles_rounded(case: StageReplay) -> Candidates:
    for format in half_angles():
        yield format.says, case.in_format(format).exact


LARGEST_F16 = 65504.0


@mistake("{} elements clamped to 65504, where float16 ends", ALL, dump_only=None, priority=1)
def saturated_to_65504(case: StageReplay) -> Candidates:
    beyond = int((jnp.abs(case.exact) > LARGEST_F16).sum())
    if beyond:
        yield str(beyond), jnp.clip(case.exact, -LARGEST_F16, LARGEST_F16)
