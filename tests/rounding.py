"""``python -m tests.rounding``: the tables of docs/rounding.md, measured here and now."""

import importlib.metadata
import platform

import numpy as np

from qwen_jax import runtime, source
from stages.table import NAMES, STAGE


def main() -> None:
    """Trace the demo model with both engines in every dtype and print how far apart they are."""
    device = runtime.configure("cpu")
    from tests.traces import jax_trace, relative_l2, torch_trace, ulps, visible

    model = source.open_model(None)
    prompt = (source.DEMO / "prompt.txt").read_text(encoding="utf-8")
    tokens = tuple(source.load_tokenizer(model).encode(prompt).ids)
    last = model.config.num_hidden_layers - 1
    packages = ("jax", "jaxlib", "torch", "transformers", "numpy")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    print(f"{len(tokens)} tokens; {versions}; {_processor()}, {_count(device)} cores.")
    for dtype in ("bfloat16", "float16", "float32"):
        ours, theirs = (trace(model.directory, tokens, dtype) for trace in (jax_trace, torch_trace))
        head = ours["lm_head", None].argmax(-1) == theirs["lm_head", None].argmax(-1)
        print(f"\n### {dtype}\n\nSame arg-max at {head.sum()} of {len(head)} positions.\n")
        columns = "equal | within 1 ULP | relative L2"
        print(f"| stage | layer 0: {columns} | layer {last}: {columns} |\n|---|{'--:|' * 6}")
        for name in NAMES:
            cells = [f"`{name}`"]
            for layer in dict.fromkeys(STAGE[name].layer_of(layer) for layer in (0, last)):
                a, b = (visible(model.config, name, layer, t[name, layer]) for t in (ours, theirs))
                distance = ulps(a, b)
                cells += [_percent(distance == 0), _percent(distance <= 1)]
                cells += [f"{relative_l2(a, b):.1e}"]
            blank = [""] * (7 - len(cells))
            cells[1:1] = blank if STAGE[name].scope == "end" else []
            print(f"| {' | '.join(cells + (blank if STAGE[name].scope == 'start' else []))} |")


def _percent(hits: np.ndarray) -> str:
    """Rounded down, so that 100 % says all of them."""
    return f"{np.floor(hits.mean() * 1e5) / 1e3:.3f} %" if not hits.all() else "100 %"


def _count(device: object) -> int:
    return runtime.describe(device)["cpu_count"]


def _processor() -> str:
    from torch.backends.cpu import get_cpu_capability

    return f"{platform.machine()} with {get_cpu_capability()}"


if __name__ == "__main__":
    main()
