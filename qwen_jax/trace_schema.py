"""The object of ``qwen_jax.trace --json`` and ``oracle.trace --json``."""

from typing import Literal

from msgspec import UNSET, UnsetType

from stages.entry import Entry
from stages.headroom import HeadroomEntry


class StageRow(Entry, frozen=True):
    """What is stored of a stage, over all layers; ``bytes`` are those of the tensors."""

    stage: str
    axes: list[str]
    shape: list[int]
    files: int
    bytes: int


class NextToken(Entry, frozen=True):
    """One of the most likely tokens after the last position."""

    token: int
    text: str | None
    logit: float | None
    probability: float | None


class Generated(Entry, frozen=True):
    """A token that was picked, and its text where the model has a tokenizer."""

    token: int
    text: str | None


class TraceResult(Entry, frozen=True):
    """``qwen_jax.trace --json`` and ``oracle.trace --json``, with and without ``--dry-run``.

    Attributes:
        refused: of a dry run, why the run itself would be; null if it would not.
    """

    schema: Literal[2]
    architecture: str
    model: str
    out: str
    dtype: str
    format: str
    tokens: list[int]
    positions: list[int]
    steps: list[int]
    cache: str | None
    layers: list[int]
    stages: list[StageRow]
    files: int
    bytes: int
    peak_memory_bytes: int
    file_bytes: int | UnsetType = UNSET
    top: list[NextToken] | UnsetType = UNSET
    generated: list[Generated] | UnsetType = UNSET
    refused: str | UnsetType | None = UNSET
    seconds: float | UnsetType = UNSET
    headroom: HeadroomEntry | UnsetType = UNSET


class BatchResult(Entry, frozen=True):
    """The same with ``--prompts``: the sequences of a batch."""

    schema: Literal[2]
    out: str
    sequences: list[TraceResult]
