"""From what a user gives, text or ids, to tokens. Imports neither jax nor torch."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from operator import index
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from qwen_jax.weights import DEMO
from qwen_jax.weights.base import Weights
from stages.errors import UserError
from stages.manifest import LAST_POSITION
from stages.trace import Layout

DRAWN = re.compile("random:([1-9][0-9]{0,6})")


@dataclass(frozen=True)
class Prompt:
    """What a user says the tokens are: text, a file of text, or ids. Nothing at all stands for the
    embedded prompt.

    Attributes:
        tokens: ids, or text such as "1,2,3" or "random:64".
        first_position: the position of the first token.
        chat: render text by the tokenizer's own chat template.
    """

    text: str | None = None
    file: Path | None = None
    tokens: str | Iterable[int] | None = None
    first_position: int = 0
    chat: bool = False

    def __post_init__(self) -> None:
        """Raises UserError: the same thing is said in two ways."""
        if sum(each is not None for each in (self.text, self.file, self.tokens)) > 1:
            raise UserError("a prompt is text, a file or token ids; give one of them")

    @property
    def given(self) -> bool:
        return any(each is not None for each in (self.text, self.file, self.tokens))

    def read(self, model: Weights) -> tuple[int, ...]:
        """The token ids.

        Raises:
            UserError: not ids, an id outside the vocabulary, an empty prompt, or text without a
                tokenizer.
        """
        if isinstance(self.tokens, str):
            tokens = parse_tokens(self.tokens, model)
        elif self.tokens is not None:
            tokens = _ids(self.tokens)
        else:
            tokens = self._encoded(model)
        if not tokens:
            raise UserError("the prompt is empty; give at least one token")
        vocabulary = model.config.vocab_size
        if outside := [token for token in tokens if not 0 <= token < vocabulary]:
            raise UserError(
                f"token id {outside[0]} is outside the vocabulary; ids go from 0 to "
                f"{vocabulary - 1}"
            )
        return tokens

    def positions(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        """One for each token.

        Raises:
            UserError: some are below 0 or too large.
        """
        last = self.first_position + len(tokens) - 1
        if self.first_position < 0 or last > LAST_POSITION:
            raise UserError(
                f"--first-position {self.first_position}: expected 0 or more, and a last position "
                f"of at most {LAST_POSITION}"
            )
        return tuple(range(self.first_position, last + 1))

    def layout(self, model: Weights) -> Layout:
        """What a trace without manifest does not say of itself."""
        tokens, config = self.read(model), model.config
        return Layout(
            config=config.to_json(),
            dims=config.dims(len(tokens)),
            tokens=tokens,
            positions=self.positions(tokens),
        )

    def _encoded(self, model: Weights) -> tuple[int, ...]:
        tokenizer = load_tokenizer(model)
        if tokenizer is None:
            raise UserError(
                f"{model.name} {model.no_tokenizer}; give ids with --tokens 1,2,3, or let some be "
                "drawn with --tokens random:64"
            )
        text = self._read_text()
        if self.chat:
            from qwen_jax.chat import render

            # The template writes the special tokens itself.
            return tuple(tokenizer.encode(render(model, text), add_special_tokens=False).ids)
        return tuple(tokenizer.encode(text).ids)

    def _read_text(self) -> str:
        """The prompt as it is: no line ending is changed, no final newline taken off."""
        path = self.file or DEMO / "prompt.txt"
        try:
            if self.text is None:
                return path.read_bytes().decode()
            self.text.encode()  # fails where the shell gave bytes that are no text
            return self.text
        except UnicodeError as error:
            given = f"--prompt-file {path}" if self.text is None else "--prompt"
            raise UserError(f"{given}: not UTF-8 text: {error}") from None
        except OSError as error:
            raise UserError(f"--prompt-file {path}: {error.strerror}") from None


def _ids(given: Iterable[int]) -> tuple[int, ...]:
    try:
        return tuple(index(token) for token in given)
    except TypeError as error:
        raise UserError(f"token ids are whole numbers, as in (1, 2, 3): {error}") from None


def read_prompts(path: Path, first_position: int, chat: bool) -> list[Prompt]:
    """The prompts of a batch, one a line.

    Raises:
        UserError: no such file, not text, no line, or an empty one.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig").removesuffix("\n")
    except UnicodeError as error:
        raise UserError(f"--prompts {path}: not UTF-8 text: {error}") from None
    except OSError as error:
        raise UserError(f"--prompts {path}: {error.strerror}") from None
    if not text:
        raise UserError(f"--prompts {path}: is empty; expected a prompt a line")
    lines = [line.removesuffix("\r") for line in text.split("\n")]  # splitlines knows ten more ends
    if empty := [number for number, line in enumerate(lines, 1) if not line.strip()]:
        raise UserError(f"--prompts {path}: line {empty[0]} is empty; expected a prompt a line")
    return [Prompt(text=line, first_position=first_position, chat=chat) for line in lines]


@cache
def load_tokenizer(model: Weights) -> Tokenizer | None:
    """The model's tokenizer, or None if it has none. Read once a model.

    Raises:
        UserError: it is damaged.
    """
    return model.tokenizer()


def parse_tokens(text: str, model: Weights) -> tuple[int, ...]:
    """The ids of "1,2,3", or of "random:64": 64 that are drawn.

    Raises:
        UserError: neither.
    """
    if drawn := DRAWN.fullmatch(text.strip()):
        return random_tokens(int(drawn[1]), model)
    try:
        return tuple(int(token) for token in re.split(r"\s*,\s*|\s+", text.strip()))
    except ValueError:
        raise UserError(
            f"--tokens {text!r}: expected ids such as 1,2,3, or random:64 for 64 drawn ids"
        ) from None


def random_tokens(count: int, model: Weights) -> tuple[int, ...]:
    """Ids drawn from the whole vocabulary, once and for all: the same in every run."""
    drawn = np.random.default_rng(0).integers(model.config.vocab_size, size=count)
    return tuple(drawn.tolist())
