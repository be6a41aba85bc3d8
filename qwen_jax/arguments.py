"""The arguments that every command has: a model, and the tokens of one sequence."""

import argparse
from pathlib import Path

from qwen_jax.prompt import Prompt
from qwen_jax.weights import FORMS
from qwen_jax.weights.base import Weights
from stages import manifest
from stages.errors import UserError
from stages.open import open_trace
from stages.trace import Trace


def add_model_arguments(parser: argparse.ArgumentParser, batch: bool = False) -> None:
    """--model and the ways to give tokens; the same in every command."""
    forms = "; ".join(dict.fromkeys(form.says for form in FORMS[1:]))
    parser.add_argument(
        "--model",
        metavar="|".join(dict.fromkeys(form.spec for form in FORMS[1:] if form.spec != "DIR")),
        help=f"{forms}; default: the embedded demo model",
    )
    add_prompt_arguments(parser, batch)


def add_prompt_arguments(parser: argparse.ArgumentParser, batch: bool = False) -> None:
    """The ways to give tokens; with ``batch`` those of several sequences too."""
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="default: the embedded prompt")
    prompt.add_argument("--prompt-file", metavar="FILE", type=Path, help="prompt text, UTF-8")
    if batch:
        prompt.add_argument(
            "--prompts", metavar="FILE", type=Path, help="a batch: one prompt a line, UTF-8"
        )
    prompt.add_argument("--tokens", metavar="1,2,3|random:N", help="token ids instead of text")
    if batch:  # after the group, or its usage would not be shown as one
        parser.add_argument(
            "--chat", action="store_true", help="render text by the model's own chat template"
        )
    parser.add_argument(
        "--first-position",
        type=int,
        default=0,
        metavar="P",
        help="the position of the first token; default: 0",
    )


def prompt_of(args: argparse.Namespace) -> Prompt:
    """The prompt that the command line gives."""
    chat = getattr(args, "chat", False)  # of the commands that run a model
    return Prompt(args.prompt, args.prompt_file, args.tokens, args.first_position, chat)


def open_given(path: Path, prompt: Prompt, model: Weights | None) -> Trace:
    """Open a trace. ``model`` and the tokens are needed, and used, where it has no manifest."""
    needed = prompt.given or not (path / manifest.NAME).exists()
    layout = prompt.layout(model) if model is not None and needed else None
    return open_trace(path, layout)


def check_tokens(prompt: Prompt, trace: Trace, model: Weights) -> None:
    """Tokens on the command line must not contradict a manifest.

    Raises:
        UserError: they do.
    """
    if prompt.given and trace.manifest and trace.tokens != prompt.read(model):
        raise UserError(
            f"{trace.path}: was made with other tokens than the command line gives; its manifest "
            "knows them, so leave --tokens and --prompt away"
        )
