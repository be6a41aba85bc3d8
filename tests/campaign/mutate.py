"""Damage as it happens, and as somebody might make it on purpose. Every change is drawn from one
``random.Random``, so a case is found again by its seed and number."""

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

VALUES = [
    None, True, False, -1, 0, 1, 2, 3, 2**31 - 1, 2**31, 2**63, 2**70, 10**40, 0.5, -0.0, 1e308,
    "", "x", "x" * 3000, "\x1b[31mred\x1b[0m", "a\nb", "\u202e", "../../x", "/etc/hostname", "0",
    [], {}, [[]], [0], {"a": {}}, "float16", "bfloat16", "float64", "safetensors", "aprt", "qwen3",
]  # fmt: skip
NUMBERS = [-(2**31), -1, 0, 1, 2, 3, 7, 255, 4097, 3_000_000, 10**8, 2**31 - 1, 2**31, 2**63, 1e308]


def places(data: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every path in a tree of JSON but its root."""
    found = []
    pairs = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in pairs:
        found.append((*above, key))
        if isinstance(value, dict | list):
            found += places(value, (*above, key))
    return found


def json_tree(random: Random, data: Any) -> str:
    """The text of a tree after one change to it, or two."""
    data = copy.deepcopy(data)
    for _ in range(random.choice((1, 1, 1, 2))):
        if not (known := places(data)):
            break
        # a place of each depth as often: there are many more tokens than settings
        depth = random.choice(sorted({len(place) for place in known}))
        *above, key = random.choice([place for place in known if len(place) == depth])
        inner = data
        for step in above:
            inner = inner[step]
        kind = random.randrange(6)
        if kind == 0:
            del inner[key]
        elif kind == 1:
            inner[key] = random.choice(VALUES)
        elif kind == 2 and isinstance(inner[key], int | float):
            number = random.choice([inner[key] + 1, inner[key] - 1, *NUMBERS])
            inner[key] = number
        elif kind == 3 and isinstance(inner[key], list):
            random.shuffle(inner[key])
        elif kind == 4 and isinstance(inner[key], list) and inner[key]:
            inner[key].append(random.choice(inner[key]))
        else:
            other = data
            *above, last = random.choice(known)
            try:
                for step in above:
                    other = other[step]
                inner[key], other[last] = other[last], inner[key]
            except (KeyError, IndexError, TypeError):
                continue
    return json.dumps(data)


def json_text(random: Random, text: str) -> str:
    """Text that is JSON after a change that keeps it JSON, mostly."""
    try:
        data = json.loads(text)
    except ValueError:
        return text[: random.randrange(len(text) + 1)]
    kind = random.randrange(12)
    if kind == 0 and isinstance(data, dict) and data:  # a name twice
        name = random.choice(list(data))
        return text.rstrip()[:-1] + f", {json.dumps(name)}: {json.dumps(random.choice(VALUES))}}}"
    if kind == 1:
        return random.choice(
            ["", "[]", "null", "{", "NaN", "[" * 100_000, text * 2, "\ufeff" + text]
        )
    return json_tree(random, data)


def raw(random: Random, data: bytes) -> bytes:
    """Bytes after one change."""
    changed = bytearray(data)
    at = random.randrange(len(data)) if data else 0
    if random.random() < 0.5:  # where headers are
        at = min(at, random.randrange(256))
    kind = random.randrange(7)
    if kind == 0 and data:
        changed[at] ^= 1 << random.randrange(8)
    elif kind == 1:
        value = random.choice(NUMBERS[:-1])
        width = random.choice((1, 2, 4, 8))
        changed[at : at + width] = (int(value) % 256**width).to_bytes(width, "little")
    elif kind == 2:
        del changed[at:]
    elif kind == 3:
        changed += random.randbytes(random.choice((1, 4, 12, 4096)))
    elif kind == 4:
        del changed[at : at + random.choice((1, 4, 8, 100))]
    elif kind == 5:
        changed[at:at] = random.randbytes(random.choice((1, 4, 8)))
    else:
        end = at + random.choice((4, 8, 64))
        changed[at:end] = bytes(len(changed[at:end]))
    return bytes(changed)


def safetensors(random: Random, data: bytes) -> bytes:
    """A safetensors file with its header changed, its length right."""
    length = int.from_bytes(data[:8], "little")
    text = json_text(random, data[8 : 8 + length].decode()).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def content(random: Random, path: Path) -> None:
    """Change what a file holds."""
    data = path.read_bytes()
    if path.suffix == ".json" and random.random() < 0.85:
        text = json_text(random, data.decode())
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
    elif path.suffix == ".safetensors" and random.random() < 0.6:
        path.write_bytes(safetensors(random, data))
    else:
        path.write_bytes(raw(random, data))


def file(random: Random, path: Path) -> None:
    """Change what a file is."""
    others = [each for each in path.parent.iterdir() if each != path and each.is_file()]
    kind = random.randrange(9)
    if kind == 8 and others:  # two files have changed places
        other = random.choice(others)
        held = path.read_bytes()
        path.write_bytes(other.read_bytes())
        other.write_bytes(held)
        return
    path.unlink()
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        os.mkfifo(path)
    elif kind == 2:
        path.symlink_to("/dev/zero")
    elif kind == 3:
        path.symlink_to(path.name)
    elif kind == 4:
        path.symlink_to("/etc/hostname")
    elif kind == 5:
        path.write_bytes(b"")
    elif kind == 6 and others:
        shutil.copy(random.choice(others), path)


def directory(random: Random, root: Path) -> str:
    """Change something below ``root``; says what."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    # the few that describe as often as the many that hold values
    telling = [path for path in files if path.suffix in (".json", ".gguf", ".safetensors")]
    path = random.choice(random.choice([telling, files]) or files)
    change: Callable[[Random, Path], None] = content if random.random() < 0.85 else file
    change(random, path)
    return f"{change.__name__} of {path.relative_to(root)}"
