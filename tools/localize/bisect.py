"""``--expect-stage``: is that fault there? The question of ``git bisect run``, in its exit codes.

To git, 1 to 127 is "bad" but for 125, which is "skip this one". So whatever keeps a commit from
being judged has to be 125: a 2 for a dump that is not there would blame the commit for the bug.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from stages.architecture import Architecture, Key, place_of
from stages.errors import UserError
from tools.localize.result import Localization

UNJUDGED = 125


class Unjudged(UserError):
    """What was asked cannot be told from this trace. Exit code 125."""

    exit_code = UNJUDGED


@contextmanager
def unjudged() -> Iterator[None]:
    """Whatever goes wrong in here, a bug of ours too, ends with 125."""
    try:
        yield
    except Exception as error:
        expected = isinstance(error, UserError)
        raise Unjudged(str(error) if expected else f"a bug in this program: {error!r}") from error


def asked(arch: Architecture, layers: int, stage: str, layer: int | None = None) -> set[Key]:
    """The stages that a question is about: of one layer, or of all.

    Raises:
        UserError: the model has no such stage or layer.
    """
    name = arch.aliases.get(stage.strip().lower(), stage.strip().lower())
    if name not in arch.stage:
        raise UserError(f"--expect-stage {stage!r}; the stages are {', '.join(arch.names)}")
    found = arch.stage[name]
    if layer is not None and (found.scope != "layer" or not 0 <= layer < layers):
        held = f"0 to {layers - 1}" if found.scope == "layer" else f"none for {name}"
        raise UserError(f"--expect-layer {layer}: layers are {held}")
    numbers = range(layers) if found.scope == "layer" and layer is None else [found.layer_of(layer)]
    return {(name, number) for number in numbers}


def there(report: Localization, keys: set[Key]) -> bool:
    """Whether error is created at one of these stages.

    A stage that was not dumped is judged together with those around it.

    Raises:
        Unjudged: one of them could not be measured, and none of the others is wrong.
    """
    judged = {key for item in report.items for key in (item.key, *item.segment)}
    if any(keys & {f.suspect.key, *f.suspect.item.segment} for f in report.findings):
        return True
    if missing := keys - judged:
        of = f" in {len(missing)} layers" if len(missing) > 1 else ""
        raise Unjudged(f"{report.trace.path}: {min(keys)[0]} could not be judged{of}")
    return False


def says(found: bool, stage: str, layer: int | None) -> str:
    """The answer in a sentence."""
    return f"expected at {place_of(stage, layer)}: {'it is there' if found else 'no fault there'}"
