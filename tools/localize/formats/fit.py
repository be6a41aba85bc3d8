"""Which number formats an engine computes in, found by trying; and its stages judged against them.

A stage with fewer bits than float32 leaves is emulated in each format of ``formats``. One that
brings the bits back is what the engine does, and from then on the stage, its slices and every
known mistake are judged against that: 6 bits become 24, and a small fault stands out again.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from qwen_jax.config import Config
from qwen_jax.local_error import ErrorSums, allowance, error_sums
from qwen_jax.replay import Measured, Replay
from stages import verdict
from stages.architecture import ACTIVATION, CACHE, ROTATION, SCORES, WEIGHTED_SUM, Key
from stages.architectures import any_stage
from stages.files import coarsest_dtype
from stages.verdict import LocalError
from tools.localize.formats.registry import (
    GRIDS,
    NUDGE,
    PLAIN_FORMAT,
    ROPE_BY_PRODUCTS,
    Format,
    choices,
    on_grid,
    side_by_side,
)
from tools.localize.stage_case import StageReplay

# What float32 leaves, of sums of products and of everything else: 21.9 and 24.2 at least were
# measured. A sequential sum of 19000 products has 18.6; there, formats are tried in vain.
PLAIN, PLAIN_OTHERS = 21.0, 22.5
PLAIN_ROTATION = 24.0  # tables that are made as Hugging Face makes them leave 25.1
# Bits that a format must bring back to be believed, and those that it must reach. Emulations of
# llama.cpp's products reach 20.7 to 25, its tables of RoPE 24.7.
CLEAR, CLEAR_OTHERS, CLEAR_ROTATION = 3.0, 2.0, 1.0
REACHED, REACHED_OTHERS = 19.0, 21.0
# Of a dump that lies on a 16-bit grid: a result rounded to it is the very same but where the last
# bit of float32 decides, one in thousands.
REACHED_ON_GRID = 12.0
PUT_AWAY = 40.0  # what is read back from a cache is what was put away, to the last bit
MEMBERS = 4  # stages of a segment that may have formats: each tries all of its own
SEARCHES = 4  # layers of one stage for which every format is tried
ALIKE = 4.0  # bits that layers of one format may differ by
HINTS = 4  # formats of other layers and stages that a stage is tried in
FINE = ("f32", "tf32/f16", "bf16")  # tried first: most engines have no coarser ones
CHANNELS = 768  # output channels of a linear stage that formats are tried on
ROWS = 96  # last rows of a stage with a product for every key

Formats = dict[Key, Format]


@dataclass
class Fitted:
    """What was found.

    Attributes:
        formats: of every stage of every layer that a format explains, missing stages included.
        by_item: the same for each stage that was judged: its own format and those of the missing
            stages behind it.
        lone: formats of single layers, whose siblings have none.
    """

    formats: Formats = field(default_factory=dict)
    by_item: dict[Key, list[Format]] = field(default_factory=dict)
    lone: dict[Key, list[Format]] = field(default_factory=dict)

    def explain(self, item: LocalError, format: Format) -> LocalError:
        """Enter a stage that a format explains; the item again."""
        self.formats[item.key] = format
        self.by_item[item.key] = [format]
        return item

    def forget(self, key: Key, segment: Sequence[Key] = ()) -> None:
        """Know nothing any more of a stage, and of missing ones behind it."""
        self.by_item.pop(key, None)
        for each in (key, *segment):
            self.formats.pop(each, None)

    def names(self, stage: str) -> list[Format]:
        """The formats of a stage over its layers, one of each name."""
        found = {f.name: f for key, fs in self.by_item.items() if key[0] == stage for f in fs}
        return list(found.values())

    def hints(self, item: LocalError, config: Config) -> list[Formats]:
        """What an item that no format explains may still be computed in: the formats of the same
        stage in other layers, then those of the same kind; of it, and of what is missing before."""
        if item.key in self.by_item:
            return []
        found: list[Formats] = []
        for key in (item.key, *item.segment):
            stage, formats = any_stage(key[0]), self.formats.items()
            near = [f for other, f in formats if other[0] == stage.name]
            near += [f for other, f in formats if any_stage(other[0]).kind is stage.kind]
            fitting = choices(stage, config)
            unique = [f for f in {id(f): f for f in near}.values() if f in fitting]
            found += [{key: f} for f in unique[:HINTS]]
        return found


def fit(
    replay: Replay,
    measured: Sequence[Measured],
    items: Sequence[LocalError],
    dtype: str,
    fitted: Fitted,
) -> list[LocalError]:
    """The items, those that a format explains judged against it. ``fitted`` has what is known
    already, and is added to."""
    judged = {item.key: item for item in items}
    sums = {(m.stage.name, m.layer): m for m in measured}
    by_stage: dict[str, list[LocalError]] = {}
    for item in items:
        if not item.born and item.key not in fitted.by_item and _low(item, dtype):
            by_stage.setdefault(item.name, []).append(item)
    for low in by_stage.values():
        stage = low[0].name
        known: list[dict[str, Format]] = []  # by the names of stages
        for key in fitted.by_item:
            if key[0] == stage and (of := {stage: fitted.formats[key]}) not in known:
                known.append(of)
        top = 0.0  # bits of the layer that a format explains best
        searches = 0
        # the middle one first: a fault lies at the ends
        middle = float(np.median([item.level for item in low]))
        for item in sorted(low, key=lambda item: abs(item.level - middle)):
            trial = _Trial(replay, item, sums[item.key], fitted.formats, dtype)
            if not trial.possible:
                continue
            found = trial.best([trial.here(formats) for formats in known])
            if (found is None or not trial.whole(found, top)) and searches < SEARCHES:
                searches += 1
                found = trial.better(found, trial.search())
            if found is None:
                continue
            top = max(top, trial.total(found))
            if (named := {key[0]: f for key, f in found.items()}) not in known:
                known.append(named)
            fitted.formats.update({k: f for k, f in found.items() if k not in fitted.formats})
            fitted.by_item[item.key] = list(found.values())
            if any(_changes(f) for f in found.values()):
                judged[item.key] = trial.judged(found)
    for stage in {item.name: None for item in items}:
        _give_up_lone(replay, stage, items, judged, fitted, dtype)
    _give_up_some_weights(replay, items, judged, fitted, dtype)
    return [judged[item.key] for item in items]


LONE = 2  # layers with the bits of float32, beside which a single one in a coarser format is odd


def _give_up_lone(
    replay: Replay,
    stage: str,
    items: Sequence[LocalError],
    judged: dict[Key, LocalError],
    fitted: Fitted,
    dtype: str,
) -> None:
    """A coarser format in one layer alone, while all others have float32, is no arithmetic of an
    engine's: that layer is judged as if nothing were known of it."""
    mine = [item for item in items if item.name == stage]
    found = [item for item in mine if item.key in fitted.by_item]
    plain = [i for i in mine if not i.born and i.exact_bits is None and not _low(i, dtype)]
    if len(plain) < LONE or len(found) != 1:
        return
    item = found[0]
    if verdict.coarsest(f.level for f in fitted.by_item[item.key]) != "f32":
        fitted.lone[item.key] = fitted.by_item[item.key]
        fitted.forget(item.key, item.segment)
        judged[item.key] = _as_it_is(replay, item, dtype)


def _give_up_some_weights(
    replay: Replay,
    items: Sequence[LocalError],
    judged: dict[Key, LocalError],
    fitted: Fitted,
    dtype: str,
) -> None:
    """An engine that quantises weights does so in most of its linear layers: in fewer it is those
    tensors that are wrong, and they are judged as if nothing were known of them."""
    other = [k for k, found in fitted.by_item.items() if any(f.requantised for f in found)]
    if 2 * len(other) >= sum(item.stage.linear for item in items):
        return
    for item in items:
        if item.key in other:
            fitted.forget(item.key, item.segment)
            judged[item.key] = _as_it_is(replay, item, dtype)


def _as_it_is(replay: Replay, item: LocalError, dtype: str) -> LocalError:
    """The item against exact arithmetic, measured in full."""
    if item.exact_bits is None:
        return item
    (m,) = replay.exactly([item.key])
    return verdict.judge(
        m.stage, m.layer, m.sums, m.segment, m.stage.heads(replay.config.dims(1)),
        item.skipped_rows, dtype,
    )  # fmt: skip


def _low(item: LocalError, dtype: str) -> bool:
    """Whether a stage has fewer bits than its trace's precision leaves; of a cache any at all."""
    if item.stage.kind is CACHE:
        return item.bits < PUT_AWAY
    if item.stage.kind is ROTATION and dtype == "float32":
        return item.bits < PLAIN_ROTATION
    if dtype == "float32":
        if item.stage.kind is ACTIVATION and any(
            mask.any() for mask in verdict.bad_slices(item, verdict.NOMINAL[dtype]).values()
        ):
            return True  # approximations differ where the function is small
        return item.level < (PLAIN if item.sums_products else PLAIN_OTHERS)
    # of a 16-bit trace: products whose operands are coarser still
    return item.sums_products and item.level < verdict.NOMINAL[dtype] - 1.0


def may_have_formats(item: LocalError, dtype: str) -> bool:
    """Whether ``fit`` may look for a format of an item that is estimated."""
    unsure = verdict.UNSURE_STAGE
    least = replace(item, level=item.level - unsure, bits=item.bits - unsure)
    return item.stage.kind.sums_products and _low(least, dtype)


def _changes(format: Format) -> bool:
    """Whether it does more than name the grid of a result."""
    return format is not GRID_FORMATS.get(format.name)


GRID_FORMATS = {
    name: Format(name, f"results in {name}", level) for name, (level, _) in GRIDS.items()
}


def rejudged(
    replay: Replay, measured: Measured, item: LocalError, fitted: Fitted, dtype: str
) -> LocalError:
    """An item that was measured in full, judged against the format that is known of it."""
    return _Trial(replay, item, measured, {}, dtype).judged({item.key: fitted.formats[item.key]})


class _Trial:
    """One stage of one layer, against formats."""

    def __init__(
        self,
        replay: Replay,
        item: LocalError,
        measured: Measured,
        formats: Mapping[Key, Format],
        dtype: str,
    ) -> None:
        self.replay, self.item, self.measured, self.dtype = replay, item, measured, dtype
        self.elsewhere = dict(formats)
        self.case = self._case({})
        self.possible = self.case.replayable and self.case.rows == measured.rows
        if not self.possible:
            return
        self.small = self._small(self.case)
        self._before = {frozenset[Any](): self.small}
        self._scores: dict[Any, np.ndarray] = {}
        grid = coarsest_dtype(np.asarray(self.small.dump, np.float32).ravel()[:65536])
        put_away = item.stage.kind is CACHE and dtype == "float32"  # the format is the cache's own
        self.grid = grid if grid in GRIDS and not put_away else None
        self.base = self._score(self.small)

    def _case(
        self, own: Mapping[Key, Format], narrow: bool = False, nudge: float = 0.0
    ) -> StageReplay:
        """The stage with these formats, and those of stages outside of its segment."""
        members = {self.item.key, *self.item.segment}
        others = {key: f for key, f in self.elsewhere.items() if key not in members}
        formats = others | dict(own)
        where = self.replay, self.item.stage, self.item.layer
        return StageReplay(*where, formats=formats, narrow=narrow, nudge=nudge)

    def _small(self, case: StageReplay) -> StageReplay:
        """The part of the stage that formats are tried on. The last rows are like all, unless the
        first call was computed in another way than the others."""
        if self.item.stage.kind in (SCORES, WEIGHTED_SUM) and case.rows > ROWS:
            return case if self._first_call_differs() else case.last(ROWS)
        return case.sampled(CHANNELS)

    def _first_call_differs(self) -> bool:
        levels, _ = self.item.slices["position"]
        first = self.case.bounds[0][:, 0] == 0
        if first.all() or not first.any():
            return False
        return bool(abs(np.median(levels[first]) - np.median(levels[~first])) > CLEAR)

    def _score(self, case: StageReplay) -> np.ndarray:
        """Significant bits of the dump against a case's value: of the whole, and of its middle row
        and channel. A fault in a few of those does not hide the format of the others."""
        exact = np.asarray(on_grid(case.exact, self.grid))
        dump, size = np.asarray(case.dump), np.asarray(case.size)
        if exact.shape != dump.shape:
            return np.full(3, -60.0)
        keep = np.asarray(case.finite) & np.isfinite(exact)
        with np.errstate(invalid="ignore"):
            error = case.stage.matrix(np.where(keep, np.square(dump - exact), 0.0))
            scale = case.stage.matrix(np.where(keep, size + np.square(exact), 0.0))
        scores = [float(verdict.bits(error.sum(), scale.sum()))]
        for axis in (0, 1):
            sums = scale.sum(axis)
            some = verdict.bits(error.sum(axis), sums)[sums > 0]
            scores.append(float(np.median(some)) if len(some) else -60.0)
        return np.array(scores)

    def _needed(self, formats: Iterable[Format]) -> float:
        """The bits that formats have to reach."""
        product = self.item.sums_products
        reached = REACHED_ON_GRID if self.grid else REACHED if product else REACHED_OTHERS
        if self.item.segment:  # what rounding itself leaves of a chain may be less
            reached = min(reached, self._chained() - 1.5)
        left = [f.leaves for f in formats if f.leaves is not None]
        return min([reached, *(bits - 1.0 for bits in left)])

    def _believed(self, scores: np.ndarray, formats: Iterable[Format]) -> bool:
        clear = CLEAR if self.item.sums_products else CLEAR_OTHERS
        if self.item.stage.kind is ROTATION and not self.item.segment:
            clear = CLEAR_ROTATION
        needed = np.maximum(self._needed(formats), self.base[: len(scores)] + clear)
        return bool((scores >= needed).any())

    def _chained(self) -> float:
        """The bits that rounding to the trace's precision leaves of a segment."""
        sums = self.measured.sums
        return float(verdict.bits(sums.expected_rows.sum(), sums.scale_rows.sum()))

    def here(self, formats: Mapping[str, Format]) -> Formats:
        """The formats of some stages, of this layer."""
        keys = {key[0]: key for key in (self.item.key, *self.item.segment)}
        return {keys[stage]: f for stage, f in formats.items() if stage in keys}

    def best(self, known: Sequence[Formats]) -> Formats | None:
        """The best of some sets of formats, if it is believed."""
        scored = [(self._tried(found), found) for found in known]
        if not scored:
            return None
        score, found = max(scored, key=lambda pair: pair[0].sum())
        return found if self._believed(score, found.values()) else None

    def _tried(self, found: Formats) -> np.ndarray:
        """The score of some formats; what is computed before the stage itself is kept for its own
        formats, which are tried with the same ones before it."""
        own = found.get(self.item.key)
        before = frozenset((key, f) for key, f in found.items() if key != self.item.key)
        if (before, own) not in self._scores:
            if before not in self._before:
                self._before = {frozenset(): self.small}
                self._before[before] = self._small(self._case(dict(before)))
            self._scores[before, own] = self._score(self._before[before].in_format(own))
        return self._scores[before, own]

    def total(self, found: Formats) -> float:
        """The bits of all of it."""
        return float(self._tried(found)[0])

    def whole(self, found: Formats, top: float = 0.0) -> bool:
        """Whether formats explain all of it, and not merely most rows and channels; and nearly as
        well as the layer with ``top`` bits."""
        scores = self._tried(found)[:1]
        top = min([top, *(f.leaves for f in found.values() if f.leaves is not None)])
        return self._believed(scores, found.values()) and scores[0] >= top - ALIKE

    def better(self, first: Formats | None, second: Formats | None) -> Formats | None:
        """The second if it explains clearly more than the first."""
        if first is None or second is None:
            return first or second
        gain = self._tried(second).sum() - self._tried(first).sum()
        return second if gain > CLEAR else first

    def search(self) -> Formats | None:
        """Every format that this stage, and the missing ones behind it, may have."""
        if (
            self.grid
            and self.item.level >= verdict.NOMINAL[self.grid] - 1.5
            and self.dtype == "float32"
        ):
            return {self.item.key: self._kept_v() or GRID_FORMATS[self.grid]}
        members = [self.item.key]
        if self.item.segment:
            members = [key for key in (self.item.key, *self.item.segment) if _may_have(key)]
        if not members or len(members) > MEMBERS:
            return None
        best = self._found(members, FINE) or self._found(members)
        several = self.item.stage.linear and len(self.case.weights) > 1 and not self.item.segment
        if several and (best is None or not self.whole(best)):
            best = self.better(best, self._by_weight())
        if best:
            return best
        loose = {self.item.key: ROPE_BY_PRODUCTS}
        lacks = self.item.stage.kind is ROTATION and self.item.bits < PLAIN_OTHERS
        if lacks and not self.grid:
            level = self.judged(loose).level
            if level >= REACHED_OTHERS:
                return loose
        return None

    def _found(self, members: Sequence[Key], levels: Collection[str] = ()) -> Formats | None:
        """The best formats of some stages, if they are believed; of some ``levels``, these have to
        explain all of it."""
        found: Formats = {}
        score = self.base
        for _ in range(2 if len(members) > 1 else 1):
            before = score
            # the member first whose format gains most; then the others, given that
            for _ in members:
                tried = [
                    (self._tried(found | {key: f}), key, f)
                    for key in members
                    if key not in found or len(members) > 1
                    for f in choices(
                        self.replay.arch.stage[key[0]], self.replay.config, self.case.has_calls
                    )
                    if found.get(key) is not f and (not levels or f.level in levels)
                ]
                top, key, format = _first_best(tried)
                if top.sum() <= score.sum() + 0.03:
                    break
                score, found = top, found | {key: format}
                if len(members) == 1 or self._finished(score):
                    break
            if score.sum() <= before.sum() + 0.03 or self._finished(score):
                break
        if not found or not self._believed(score, found.values()):
            return None
        return found if not levels or score.min() >= self._needed(found.values()) else None

    def _kept_v(self) -> Format | None:
        """Where a row attends to one key alone it is v as the cache holds it, and lies on a grid
        that no result is rounded to."""
        if self.item.stage.kind is not WEIGHTED_SUM:
            return None
        for format in choices(self.item.stage, self.replay.config):
            value = None if format.whole else self.small.in_format(format).exact
            if value is not None and bool((value == self.small.dump).all()):
                return format
        return None

    def _by_weight(self) -> Formats | None:
        """A format for each of the weights that stand side by side: their types may differ."""
        small = self.small
        options = [PLAIN_FORMAT, *choices(self.item.stage, self.replay.config)]
        values = [small.in_format(format).exact for format in options]
        ends = np.cumsum([len(w) for w in small.weights.values()])[:-1]
        dumps = jnp.split(small.dump, ends, -1)
        chosen = []
        for place, dump in enumerate(dumps):
            off = [
                float(jnp.square(dump - on_grid(jnp.split(v, ends, -1)[place], self.grid)).sum())
                for v in values
            ]
            chosen.append(options[int(np.argmin(off))])
        format = side_by_side(chosen)
        found = {self.item.key: format}
        return found if self._believed(self._tried(found), [format]) else None

    def _finished(self, scores: np.ndarray) -> bool:
        return bool(scores.min() >= verdict.NOMINAL["float32"] - 1.0) and not self.grid

    def judged(self, found: Formats) -> LocalError:
        """The stage judged against these formats."""
        case, replay = self._case(found), self.replay
        count = case.rows
        expected = case.expected()
        if self.item.segment:
            nudge = max(NUDGE, 4 * 2.0 ** -self._chained())
            # codes of missing stages that hang on a last bit, and what rounding in them does
            for other in (
                self._case(found, narrow=True),
                self._case(found, nudge=nudge),
                self._case(found, nudge=-nudge),
            ):
                expected = expected + jnp.square(other.exact - case.exact)
        else:
            known = allowance(
                case.stage, case.config, case.pos, replay.angles[-count:], case.inputs, case.exact,
                replay.dtype,
            )  # fmt: skip
            expected = expected + jnp.square(known)
        sums = error_sums(
            case.stage, case.dump, case.exact, case.size, case.pos, jnp.sqrt(expected)
        )
        sums = ErrorSums(**{name: np.asarray(getattr(sums, name)) for name in SUMS})
        if self.item.segment:
            before = self.measured.sums
            sums = sums.replace(
                expected_rows=sums.expected_rows + before.expected_rows,
                expected_columns=sums.expected_columns + before.expected_columns,
            )
        judged = verdict.judge(
            case.stage, self.item.layer, sums, self.item.segment, case.heads,
            self.item.skipped_rows, self.dtype,
        )  # fmt: skip
        return replace(judged, exact_bits=self.item.bits)


def _first_best(tried: list[tuple[np.ndarray, Key, Format]]) -> tuple[np.ndarray, Key, Format]:
    """The first one that is as good as the best: formats may differ in what does not occur, such as
    numbers too small for one of them."""
    best = max(scores.sum() for scores, _, _ in tried)
    return next(each for each in tried if each[0].sum() >= best - 0.5)


SUMS = tuple(ErrorSums.__dataclass_fields__)


def _may_have(key: Key) -> bool:
    """Whether formats of a stage of a segment are tried: those that others drown in."""
    kind = any_stage(key[0]).kind
    return kind.sums_products or kind in (ROTATION, CACHE)
