"""Which stages and layers a user asks for."""

import re

from stages.architecture import Architecture
from stages.errors import UserError


def parse_stages(text: str, architecture: Architecture) -> tuple[str, ...]:
    """The stage names of a comma-separated list, in computation order.

    Case-insensitive, blanks trimmed; ``all`` is every stage, ``layer_output`` an alias.

    Raises:
        UserError: an empty, unknown or repeated name.
    """
    names = architecture.names
    valid = f"valid names: all, {', '.join(names)}"
    chosen: set[str] = set()
    for token in text.split(","):
        name = token.strip().lower()
        name = architecture.aliases.get(name, name)
        if not name:
            raise UserError(f"--stages {text!r} has an empty name; {valid}")
        if name in {row.name for row in architecture.cache} - set(names):
            raise UserError(
                f"--stages: {name} is there only with a key/value cache: add --cache, --generate "
                "or --prefill-chunk"
            )
        if name != "all" and name not in names:
            raise UserError(f"--stages: unknown stage {token.strip()!r}; {valid}")
        for each in names if name == "all" else (name,):
            if each in chosen:
                raise UserError(f"--stages {text!r} names {each!r} twice; name each stage once")
            chosen.add(each)
    return tuple(name for name in names if name in chosen)


def parse_layers(text: str, num_layers: int) -> tuple[int, ...]:
    """The layer numbers of a list such as ``0,3-5`` or ``all``, ascending.

    Raises:
        UserError: not a number or range, a layer that the model does not have, or one named twice.
    """
    if text.strip().lower() == "all":
        return tuple(range(num_layers))
    chosen: list[int] = []
    for token in text.split(","):
        match = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", token.strip())
        if not match:
            raise UserError(f"--layers: {token.strip()!r} is no layer; write 0,3-5 or all")
        low, high = int(match[1]), int(match[2] or match[1])
        if low > high:
            raise UserError(f"--layers: {token.strip()!r} runs backwards; write {high}-{low}")
        if high >= num_layers:
            raise UserError(
                f"--layers: layer {high} does not exist; the model has {num_layers} layers, "
                f"0 to {num_layers - 1}"
            )
        chosen.extend(range(low, high + 1))
    if len(set(chosen)) < len(chosen):
        raise UserError(f"--layers {text!r} names a layer twice; name each layer once")
    return tuple(sorted(chosen))
