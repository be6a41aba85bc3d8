"""Whether what a command says with --json is what docs/schema/ says."""

import jsonschema
import msgspec

from stages.results import RESULTS
from tests.maintain import schemas


def as_described(name: str, content: bytes) -> None:
    """Raises if the JSON of the command ``name`` is not."""
    schema = msgspec.json.decode(schemas.render()[f"{name}.json"])
    msgspec.json.decode(content, type=RESULTS[name])
    jsonschema.validate(msgspec.json.decode(content), schema)
