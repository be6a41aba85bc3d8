"""``python -m tests.planted.story``: the bug hunt of docs/story.md, on the demo model.

Writes ``four-bit``, the model in 4 bits; ``engine``, what a right engine computes with it; and
``gpu``, what the same engine computes when it reads lm_head transposed. Prints what the maintainers
looked at: the cosine of every stage of layer 0 with a float16 trace of the weights before.
"""

from pathlib import Path

from qwen_jax import open_model, trace_model
from qwen_jax.prompt import random_tokens
from qwen_jax.weights import DEMO
from tests.planted import faults
from tests.planted.checkpoints import four_bit_checkpoint
from tests.planted.matrix import cosine
from tools.numpy_engine import engine

BAR = 0.999


def main() -> None:
    model = open_model()
    tokens = list(random_tokens(64, model))  # --tokens random:64
    loaded = engine.load(four_bit_checkpoint(DEMO, Path("four-bit")))
    run = engine.Engine(*loaded).run(tokens)
    run.dump("engine")
    faults.plant(loaded, tokens, "lm_head.weight_transposed").dump("gpu")
    oracle = trace_model(model, tokens, dtype="float16", logits="last")
    print("stage                cosine with a float16 trace of the model before")
    for layer, stage in run.stages:
        if layer in (0, None):
            found = cosine(run.stages[layer, stage], oracle.read(stage, layer))
            print(f"{stage:20} {found:.7f}{'  below 0.999' if found < BAR else ''}")
    right = int(oracle.read("lm_head", None).argmax())
    same = int(run.stages[None, "lm_head"].argmax()) == right
    print(f"the next token is {'the same' if same else 'another one'}")


if __name__ == "__main__":
    main()
