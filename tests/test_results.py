"""What the commands say with --json is what docs/schema/ says, and that is made from the code."""

from pathlib import Path

import jsonschema
import msgspec
import pytest

import qwen_jax
import qwen_jax.trace
from stages import manifest
from tests.described import as_described
from tests.maintain import schemas
from tests.planted.faults import plant
from tools import convert, diff
from tools.localize.__main__ import main as localize

TOKENS = "5,6,7,8,9,10,11"


def test_schemas_are_those_of_the_code() -> None:
    written = {path.name: path.read_bytes() for path in schemas.FOLDER.iterdir()}
    assert written == schemas.render(), "run python -m tests.maintain.schemas"


def test_schemas_are_the_same_with_every_msgspec() -> None:
    """Keys of a dict that are a Literal are in the schema from 0.23 on, and not before."""
    written = {path.name: path.read_bytes() for path in schemas.FOLDER.iterdir()}
    assert not [name for name, text in written.items() if b"propertyNames" in text]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSON of every command, of sound and of broken traces."""
    at = tmp_path_factory.mktemp("results")
    demo = str(qwen_jax.weights.DEMO)
    plant(demo, [5, 6, 7, 8, 9, 10, 11], "ffn_up.row_corrupted", [1], "f32").dump(at / "broken")
    common = ["--tokens", TOKENS, "--json"]
    qwen_jax.trace.main(["--out", str(at / "a"), *common, str(at / "trace.json")])
    qwen_jax.trace.main(["--out", str(at / "b"), *common, str(at / "dry-trace.json"), "--dry-run"])
    diff.main([str(at / "a"), str(at / "a"), "--json", str(at / "diff.json")])
    broken = [str(at / "broken"), "--model", "demo", *common]
    localize([*broken, str(at / "localize.json")])
    localize([str(at / "a"), "--against-model", "demo", "--json", str(at / "clean-localize.json")])
    against = [str(at / "a"), "--against", str(at / "broken"), "--tokens", TOKENS]
    localize([*against, "--json", str(at / "against-localize.json")])
    convert.main([demo, str(at / "hf"), "--to", "hf", "--json", str(at / "convert.json")])
    return at


@pytest.mark.parametrize("name", ["localize", "diff", "trace", "convert"])
def test_json_is_as_described(folder: Path, name: str) -> None:
    """That of collect, parity and bench is looked at where those are run."""
    found = sorted(folder.glob(f"*{name}.json"))
    assert found
    for path in found:
        as_described(name, path.read_bytes())


def test_a_manifest_is_as_described(folder: Path) -> None:
    schema = msgspec.json.decode(schemas.render()["manifest.json"])
    jsonschema.validate(msgspec.json.decode((folder / "a" / manifest.NAME).read_bytes()), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"schema": 2}, schema)
