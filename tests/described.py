"""Whether what a command says with --json is what docs/schema/ says."""

import jsonschema
import msgspec

from tests.maintain import schemas


def as_described(name: str, content: bytes) -> None:
    """Raises if the JSON of the command ``name`` is not."""
    schema = msgspec.json.decode(schemas.render()[f"{name}.json"])
    msgspec.json.decode(content, type=schemas.RESULTS[name])
    jsonschema.validate(msgspec.json.decode(content), schema)
