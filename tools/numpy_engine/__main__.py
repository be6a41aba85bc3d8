"""``python -m tools.numpy_engine FAULT``: a broken engine's dump of the demo model, to try things on.

The engine is the small NumPy one of this folder; the dump is a foreign one, APRT files without a
manifest, of the embedded prompt. ``python -m tools.numpy_engine list`` lists the faults.
"""

import argparse
from pathlib import Path

from tokenizers import Tokenizer

from tools.numpy_engine import engine, faults

DEMO = Path(__file__).parents[2] / "qwen_jax" / "demo"


def main() -> None:
    """Plant one fault and write the dump."""
    parser = argparse.ArgumentParser(prog="python -m tools.numpy_engine", description=__doc__)
    parser.add_argument("fault", choices=["list", "none", *faults.FAULTS], metavar="FAULT")
    parser.add_argument("--layers", type=int, nargs="*", help="default: every layer")
    parser.add_argument("--mode", default="f32", choices=list(engine.ARITHMETIC))
    parser.add_argument("--out", type=Path, default=Path("engine-dump"))
    args = parser.parse_args()
    if args.fault == "list":
        for name, fault in faults.FAULTS.items():
            print(f"{name}: {fault.says}")
        return
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    tokens = tokenizer.encode((DEMO / "prompt.txt").read_text(encoding="utf-8")).ids
    fault = None if args.fault == "none" else args.fault
    faults.plant(DEMO, tokens, fault, args.layers, args.mode).dump(args.out)
    print(f"{args.out}/: {len(tokens)} tokens, {args.mode}, fault: {args.fault}")


if __name__ == "__main__":
    main()
