"""Going on with an interrupted trace: what of it is whole, and from which layer to compute."""

from collections.abc import Sequence
from pathlib import Path

from stages import manifest
from stages.architecture import Key
from stages.errors import UserError
from stages.manifest import Manifest
from stages.trace import Trace


def open_interrupted(directory: Path, header: Manifest, planned: Sequence[Key]) -> Trace | None:
    """What an interrupted trace in ``directory`` has finished; None where nothing was begun.

    ``planned`` is every (stage, layer) that the whole trace is to have.

    Raises:
        UserError: it is whole already, or was made in another way than ``header`` says or for
            other stages, so that the rest would not fit what is there.
    """
    if not (directory / manifest.PARTIAL).exists():
        if (directory / manifest.NAME).exists():
            raise UserError(
                f"--resume: {directory} is a whole trace; add --overwrite instead to replace it"
            )
        return None
    try:
        found = manifest.read(directory, manifest.PARTIAL)
    except UserError as error:
        raise UserError(f"--resume: {error}; start anew with --overwrite") from None
    differing = [
        name
        for name in Manifest.__struct_fields__
        if name not in ("files", "model", "producer", "planned")
        and getattr(found, name) != getattr(header, name)
    ]
    differing += [
        f"{name} ({was!r}, now {now!r})"
        for name in sorted(found.producer.keys() | header.producer.keys())
        if (was := found.producer.get(name)) != (now := header.producer.get(name))
    ]
    differing += [
        f"model {part}"
        for part in ("name", "config")
        if getattr(found.model, part) != getattr(header.model, part)
    ]
    if found.planned != tuple(planned):
        differing.append("stages or layers")
    if differing:
        raise UserError(
            f"--resume: the trace in {directory} was begun with other {', '.join(differing)}; "
            "use what it was begun with, or --overwrite to start anew"
        )
    entries = {(entry.stage, entry.layer): entry for entry in found.files}
    return Trace(directory, found, entries, found.model.config, found.tokens, found.positions)


def first_layer(trace: Trace, wanted: Sequence[Key]) -> int:
    """The layer to go on from: every wanted file of the layers before it is there and undamaged,
    and so is its input. 0 is to start anew."""
    whole: set[Key] = set()
    for key, entry in trace.entries.items():
        try:
            trace.read(*key)
        except UserError:  # cut off or changed after it was noted down
            continue
        whole.add((entry.stage, entry.layer))
    layers = trace.config["num_hidden_layers"]
    for layer in range(layers, 0, -1):
        before = {key for key in wanted if key[1] is not None and key[1] < layer}
        if before | {(trace.arch.layer_output.name, layer - 1)} <= whole:
            return layer
    return 0
