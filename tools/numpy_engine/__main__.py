"""``python -m tools.numpy_engine FAULT``: a broken engine's dump, to try things on.

The engine is the small NumPy one of this folder; the dump is a foreign one, APRT files without a
manifest, of the embedded prompt unless ``--tokens`` is given. ``python -m tools.numpy_engine list``
lists the faults that the model can have.
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
    parser.add_argument(
        "--model", type=Path, default=DEMO, metavar="DIR", help="default: the demo model"
    )
    parser.add_argument("--tokens", metavar="IDS", help="such as 1,2,3")
    parser.add_argument("--first-position", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument(
        "--last-row",
        action="store_true",
        help="compute the end of the last layer for the last position alone",
    )
    parser.add_argument("--out", type=Path, default=Path("engine-dump"))
    args = parser.parse_args()
    try:
        loaded = engine.load(args.model)
    except (OSError, ValueError) as error:
        parser.error(f"--model: {error}")
    known = faults.of(loaded[0])
    if args.fault == "list":
        for name, fault in known.items():
            print(f"{name}: {fault.says}")
        return
    planted = known.get(args.fault)
    if planted is None and args.fault != "none":
        parser.error(f"{args.fault}: {loaded[0].architecture} has no such stage")
    if outside := [n for n in args.layers or () if not 0 <= n < loaded[0].layers]:
        parser.error(f"--layers {outside[0]}: layers go from 0 to {loaded[0].layers - 1}")
    tokens = read_tokens(parser, args.model, args.tokens)
    more = {"first_position": args.first_position, "last_row": args.last_row}
    faults.plant(loaded, tokens, planted, args.layers, args.mode, **more).dump(args.out)
    print(f"{args.out}/: {len(tokens)} tokens, {args.mode}, fault: {args.fault}")


def read_tokens(parser: argparse.ArgumentParser, model: Path, text: str | None) -> list[int]:
    """The ids given, or those of the embedded prompt."""
    if text:
        try:
            return [int(number) for number in text.split(",")]
        except ValueError:
            parser.error(f"--tokens {text}: expected ids such as 1,2,3")
    path = model / "tokenizer.json"
    if not path.exists():
        parser.error(f"{model} has no tokenizer.json; give --tokens")
    prompt = (DEMO / "prompt.txt").read_text(encoding="utf-8")
    return Tokenizer.from_file(str(path)).encode(prompt).ids


if __name__ == "__main__":
    main()
