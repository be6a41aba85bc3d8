"""``python -m tools.numpy_engine FAULT``: a broken engine's dump, to try things on.

The engine is the small NumPy one of this folder; the dump is a foreign one, APRT files without a
manifest, of the embedded prompt unless ``--tokens`` is given; with ``--prefill-chunk`` or
``--decode`` call by call, in directories ``step-0000``, ``step-0001``, ... of it.
``python -m tools.numpy_engine list`` lists the faults that the model can have.
"""

import argparse
import signal
from pathlib import Path
from typing import Any, NoReturn

from tokenizers import Tokenizer

from tools.numpy_engine import engine

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "qwen_jax" / "demo"


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def main() -> None:
    """Plant one fault and write the dump."""
    parser = Parser(prog="python -m tools.numpy_engine", description=__doc__)
    parser.add_argument("fault", metavar="FAULT", help='its name, "none", or "list"')
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
    parser.add_argument("--prefill-chunk", type=int, metavar="C", help="tokens of a call")
    parser.add_argument("--decode", type=int, metavar="N", help="the last N tokens one by one")
    parser.add_argument("--cache", choices=[*engine.CACHES], help="default: exact, if any")
    parser.add_argument("--out", type=Path, default=Path("engine-dump"))
    args = parser.parse_args()
    known, cached = planted_faults()
    if not known and args.fault != "none":
        parser.error("faults are planted in a checkout of the project alone; here, give none")
    if args.fault not in ("list", "none", *known):
        parser.error(f"no fault {args.fault!r}; list shows those that there are")
    try:
        loaded = engine.load(args.model)
    except (OSError, ValueError) as error:
        parser.error(f"--model: {error}")
    known = {name: fault for name, fault in known.items() if fault.applies(loaded[0])}
    if args.fault == "list":
        print("\n".join(f"{name}: {fault.says}" for name, fault in known.items()))
        return
    planted = known.get(args.fault)
    if planted is None and args.fault != "none":
        parser.error(f"{args.fault}: this {loaded[0].architecture} has nothing to make it in")
    if args.fault in cached and not args.decode:
        parser.error(f"{args.fault}: is made in a decode; say how long with --decode N")
    if outside := [n for n in args.layers or () if not 0 <= n < loaded[0].layers]:
        parser.error(f"--layers {outside[0]}: layers go from 0 to {loaded[0].layers - 1}")
    tokens = read_tokens(parser, args.model, args.tokens)
    if outside := [token for token in tokens if not 0 <= token < loaded[0].vocabulary]:
        parser.error(f"token {outside[0]}: the model has 0 to {loaded[0].vocabulary - 1}")
    if args.first_position < 0:
        parser.error(f"--first-position {args.first_position}: positions begin at 0")
    more = {"first_position": args.first_position, "last_row": args.last_row}
    more |= {"steps": calls(parser, len(tokens), args.prefill_chunk, args.decode)}
    try:
        broken = engine.Engine(*loaded, args.mode)
        if planted:
            planted.apply(broken, args.layers)
        run = broken.run(tokens, "last", **more, cache=args.cache)
    except ValueError as error:
        parser.error(str(error))
    try:
        (run.dump_calls if len(run.steps) > 1 else run.dump)(args.out)
    except OSError as error:
        parser.error(f"--out {args.out}: {error.strerror}")
    said = f", {len(run.steps)} calls" if len(run.steps) > 1 else ""
    print(f"{args.out}/: {len(tokens)} tokens{said}, {args.mode}, fault: {args.fault}")


def planted_faults() -> tuple[dict[str, Any], set[str]]:
    """The faults that the tests plant, and which of them are made in a decode; nothing where this
    is installed without the tests."""
    if not (ROOT / "tests" / "planted").is_dir():
        return {}, set()
    from tests.planted import cache_faults, faults

    return faults.FAULTS | cache_faults.CACHE_FAULTS, {*cache_faults.CACHE_FAULTS}


def calls(
    parser: argparse.ArgumentParser, length: int, chunk: int | None, decoded: int | None
) -> tuple[int, ...]:
    """How many tokens each call is given."""
    prompt = length - (decoded or 0)
    if decoded is not None and not 0 < decoded < length:
        parser.error(f"--decode {decoded}: there are {length} tokens, of which one or more before")
    if chunk is not None and not 0 < chunk <= prompt:
        parser.error(f"--prefill-chunk {chunk}: the prompt has {prompt} tokens")
    size = chunk or prompt
    chunks = [min(size, prompt - first) for first in range(0, prompt, size)]
    return (*chunks, *[1] * (length - prompt))


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
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `list | head` ends it, without a word
    main()
