"""The objects of ``--json``. Their definitions are their JSON Schema, published in docs/schema/.

What is only there where it has something to say is ``UNSET`` otherwise. Dicts with Literal keys are
none of theirs: versions of msgspec describe those differently.
"""

from msgspec import UNSET, Struct, UnsetType


class Entry(Struct, frozen=True, forbid_unknown_fields=True):
    """An object of ``--json``, or a part of one."""


class StageOfLayer(Entry, frozen=True):
    """A stage, and the layer it is of; null for a whole-model stage."""

    stage: str
    layer: int | None


class Axes(Entry, frozen=True):
    """Ranges on the axes of a stage, such as "3-5,7", or "all"."""

    heads: str | UnsetType = UNSET
    positions: str | UnsetType = UNSET
    channels: str | UnsetType = UNSET
