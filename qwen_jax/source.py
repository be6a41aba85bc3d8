"""From what a user types to a model and its tokens. Imports neither jax nor torch."""

import argparse
import re
from functools import cache
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from qwen_jax import synthetic
from qwen_jax.checkpoint import COMPANIONS, INDEX, SINGLE, Checkpoint
from qwen_jax.orbax_weights import OrbaxWeights, is_orbax
from qwen_jax.weights import Weights
from stages import manifest
from stages.errors import UserError
from stages.trace import Layout, Trace, open_trace

DEMO = Path(__file__).parent / "demo"
NOTE = "CONVERTING"  # the file of tools.convert in a directory that is its own and unfinished
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_FILES = [*COMPANIONS, SINGLE, INDEX, "model-*.safetensors"]


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """--model and the three ways to give tokens; the same in every command."""
    parser.add_argument(
        "--model",
        metavar="DIR|HUB_ID|synthetic:SIZE",
        help="a local Hugging Face directory, one that tools.convert has made, a hub id, or random "
        f"weights in the published size {', '.join(synthetic.SIZES)} (synthetic:7b:2 is its first "
        "2 layers); default: the embedded demo model",
    )
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="default: the embedded prompt")
    prompt.add_argument("--prompt-file", metavar="FILE", type=Path, help="prompt text, UTF-8")
    prompt.add_argument("--tokens", metavar="1,2,3|random:N", help="token ids instead of text")


def open_model(spec: str | None) -> Weights:
    """The weights that ``--model`` names: None is the demo model.

    Raises:
        UserError: no such model, another architecture, or files that are damaged or missing.
    """
    if spec is None or spec == "demo":
        return Checkpoint(DEMO, "demo")
    if spec.startswith(synthetic.PREFIX):
        return synthetic.open_synthetic(spec)
    if not Path(spec).exists() and HUB_ID.fullmatch(spec):
        return Checkpoint(_download(spec), spec.rpartition("/")[2])
    if (Path(spec) / NOTE).exists():
        raise UserError(
            f"{spec}: an unfinished conversion: run python -m tools.convert again, which starts "
            "anew there, or remove the directory"
        )
    return OrbaxWeights(Path(spec)) if is_orbax(Path(spec)) else Checkpoint(Path(spec))


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=HUB_FILES))
    except Exception as error:  # its own kinds, its HTTP library's and the file system's
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{hub_id}: neither a directory here nor to be had from the hub ({why})"
        ) from None


@cache
def load_tokenizer(model: Weights) -> Tokenizer | None:
    """The model's tokenizer, or None if it has no ``tokenizer.json``. Read once a model.

    Raises:
        UserError: the file is damaged.
    """
    if model.directory is None or not (model.directory / "tokenizer.json").exists():
        return None
    path = model.directory / "tokenizer.json"
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for a damaged file
        raise UserError(f"{path}: not a tokenizer: {error}") from None


def read_tokens(args: argparse.Namespace, model: Weights) -> tuple[int, ...]:
    """The token ids of --tokens, --prompt or --prompt-file; the embedded prompt without any.

    Raises:
        UserError: not ids, an id outside the vocabulary, an empty prompt, or text without a
            tokenizer.
    """
    if args.tokens is not None:
        tokens = _given_tokens(args.tokens, model)
    else:
        tokenizer = load_tokenizer(model)
        if tokenizer is None:
            raise UserError(
                f"{model.name} has no tokenizer.json; give ids with --tokens 1,2,3, or let some be "
                "drawn with --tokens random:64"
            )
        text = _prompt_text(args)
        tokens = tuple(tokenizer.encode(text).ids)
        if not tokens:
            raise UserError("the prompt is empty; give at least one token")
    vocabulary = model.config.vocab_size
    if outside := [token for token in tokens if not 0 <= token < vocabulary]:
        raise UserError(
            f"token id {outside[0]} is outside the vocabulary; ids go from 0 to {vocabulary - 1}"
        )
    return tokens


def _given_tokens(text: str, model: Weights) -> tuple[int, ...]:
    if drawn := re.fullmatch("random:([1-9][0-9]{0,6})", text):
        return random_tokens(int(drawn[1]), model)
    try:
        return tuple(int(token) for token in text.split(","))
    except ValueError:
        raise UserError(
            f"--tokens {text!r}: expected ids such as 1,2,3, or random:64 for 64 drawn ids"
        ) from None


def random_tokens(count: int, model: Weights) -> tuple[int, ...]:
    """Ids drawn from the whole vocabulary, once and for all: the same in every run."""
    drawn = np.random.default_rng(0).integers(model.config.vocab_size, size=count)
    return tuple(drawn.tolist())


def tokens_given(args: argparse.Namespace) -> bool:
    """Whether the command line says what the tokens are."""
    return any(x is not None for x in (args.tokens, args.prompt, args.prompt_file))


def foreign_layout(args: argparse.Namespace, model: Weights) -> Layout:
    """What a trace without manifest does not say of itself, from the command line."""
    tokens = read_tokens(args, model)
    config = model.config
    return Layout(config=config.to_json(), dims=config.dims(len(tokens)), tokens=tokens)


def open_given(args: argparse.Namespace, path: Path, model: Weights | None) -> Trace:
    """Open a trace. ``model`` and the tokens are needed, and used, where it has no manifest."""
    needed = tokens_given(args) or not (path / manifest.NAME).exists()
    layout = foreign_layout(args, model) if model is not None and needed else None
    return open_trace(path, layout)


def check_tokens(args: argparse.Namespace, trace: Trace, model: Weights) -> None:
    """Tokens on the command line must not contradict a manifest.

    Raises:
        UserError: they do.
    """
    if tokens_given(args) and trace.manifest and trace.tokens != read_tokens(args, model):
        raise UserError(
            f"{trace.path}: was made with other tokens than the command line gives; its manifest "
            "knows them, so leave --tokens and --prompt away"
        )


def _prompt_text(args: argparse.Namespace) -> str:
    """The prompt as it is: no line ending is changed, no final newline taken off."""
    path = args.prompt_file or DEMO / "prompt.txt"
    try:
        if args.prompt is None:
            return path.read_bytes().decode()
        args.prompt.encode()  # fails where the shell gave bytes that are no text
        return args.prompt
    except UnicodeError as error:
        given = f"--prompt-file {path}" if args.prompt is None else "--prompt"
        raise UserError(f"{given}: not UTF-8 text: {error}") from None
    except OSError as error:
        raise UserError(f"--prompt-file {path}: {error.strerror}") from None
