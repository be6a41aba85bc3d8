"""What error costs, as data: of the softmax of each layer, and of the next token."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from stages.architecture import Key
from stages.entry import Entry

LARGEST = 5  # shares of which it is said where they come from
SLICES = 3  # heads, positions and channels that are named then
PATCHED = 3  # shares that are tried by making that stage exact
SEEN = 0.001  # nats: what is less changes nothing that anybody can see
LINEAR = 0.25  # of a share: how far off it may be and still be told as it is


class Nats(Entry, frozen=True):
    """The error of one layer's scores; of plainly sound ones, in a sample of their rows.

    Attributes:
        rms, max: in nats.
        head, position: where the largest one is; a position is a row of the sequence.
        variation: total variation between the softmax of the dumped scores and of the right ones,
            half the sum of |p - q|: mean over heads and positions. variation_max: the largest.
    """

    layer: int
    rms: float
    max: float
    head: int
    position: int
    variation: float
    variation_max: float


@dataclass(frozen=True, kw_only=True)
class Share:
    """What the error created at one stage of one layer does, in nats.

    Attributes:
        margin, logprob: by how much the chosen token gains.
        patched: how much of the margin goes when this stage alone is made exact; None where that
            was not tried.
        slices: {"head" | "position" | "channel": margin of each slice}, as far as known.
        tensors: margin by each of its parameters, where it has several.
        skipped_rows: how many rows of the sequence come before those of "position".
    """

    margin: float
    logprob: float
    slices: Mapping[str, np.ndarray]
    tensors: Mapping[str, float]
    skipped_rows: int
    patched: float | None = None

    @property
    def size(self) -> float:
        """What the stage does to the margin, as well as that is known."""
        return self.margin if self.linear or self.patched is None else self.patched

    @property
    def linear(self) -> bool:
        """Whether the share is what it was found to be."""
        if self.patched is None:
            return True
        most = max(abs(self.margin), abs(self.patched), SEEN)
        return abs(self.margin - self.patched) <= LINEAR * most

    @property
    def where(self) -> dict[str, list[dict[str, Any]]]:
        """{"heads" | "positions" | "channels": the slices that have most of it, largest first}."""
        found = {}
        for axis, parts in self.slices.items():
            first = self.skipped_rows if axis == "position" else 0
            largest = np.argsort(-np.abs(parts))[:SLICES]
            rows = [{"index": first + int(i), "share": float(parts[i])} for i in largest]
            found[axis + "s"] = [row for row in rows if row["share"]]
        return found


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What an exact forward has: margin, log-probability, and the token it puts first."""

    margin: float
    logprob: float
    first: int


@dataclass(frozen=True, kw_only=True)
class Harm:
    """What the error of a trace does to one token.

    Attributes:
        row: of the sequence, from 0 on, after which the token comes.
        token, against: the chosen one, and its rival.
        text, against_text: what they stand for, where there is a tokenizer.
        margin, logprob: of the dump, in nats.
        shares: of every stage that was measured.
        lost: the first stage, from the end, that cannot be passed: what lies before it in the
            computation has no share. None where nothing is lost.
        truth: of exact arithmetic; None where that was not computed.
    """

    row: int
    token: int
    against: int
    text: str | None
    against_text: str | None
    margin: float
    logprob: float
    shares: dict[Key, Share]
    lost: Key | None
    truth: Truth | None

    @property
    def sum(self) -> float:
        """Of all shares of the margin."""
        return sum(share.margin for share in self.shares.values())

    @property
    def logprob_sum(self) -> float:
        return sum(share.logprob for share in self.shares.values())

    @property
    def exact_margin(self) -> float:
        """Of exact arithmetic: computed, or as the shares predict it."""
        return self.truth.margin if self.truth else self.margin - self.sum

    @property
    def logprob_change(self) -> float:
        """How far the error moves the log-probability: computed, or the sum of the shares."""
        return self.logprob - self.truth.logprob if self.truth else self.logprob_sum

    @property
    def flips(self) -> bool:
        """Whether exact arithmetic puts the other of the two first; at a tie the token came."""
        return (self.exact_margin < 0) != (self.margin < 0)

    @property
    def largest(self) -> list[tuple[Key, Share]]:
        """Every share, the largest first."""
        return sorted(self.shares.items(), key=lambda pair: -abs(pair[1].size))

    def to_json(self) -> dict[str, Any]:
        """The object ``harm`` of ``--json``."""
        result: dict[str, Any] = {
            "position": self.row,
            "token": self.token,
            "against": self.against,
            "margin": self.margin,
            "exact_margin": self.exact_margin,
            "sum_of_shares": self.sum,
            "flips": self.flips,
            "logprob": self.logprob,
            "logprob_change": self.logprob_change,
            "checked": self.truth is not None,
            "shares": [
                _share(key, share, place < LARGEST)
                for place, (key, share) in enumerate(self.largest)
            ],
        }
        if self.lost:
            result["lost_before"] = {"stage": self.lost[0], "layer": self.lost[1]}
        return result


def _share(key: Key, share: Share, whole: bool) -> dict[str, Any]:
    row: dict[str, Any] = {
        "stage": key[0], "layer": key[1], "share": share.margin, "logprob": share.logprob,
    }  # fmt: skip
    if share.patched is not None:
        row |= {"patched": share.patched, "linear": share.linear}
    if share.tensors:
        row["tensors"] = dict(share.tensors)
    return row | ({"where": share.where} if whole else {})
