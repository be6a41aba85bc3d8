"""``python -m tests.maintain.schemas``: write docs/schema/ from the types that the code runs on."""

import inspect
from pathlib import Path

import msgspec

from qwen_jax import cli
from qwen_jax.trace_schema import BatchResult, TraceResult
from stages.entry import Entry
from stages.manifest import KIND, SCHEMA, Manifest
from tools.bench.measure import BenchResult
from tools.collect.recorder import CollectResult
from tools.convert import ConvertResult
from tools.difference import DiffResult
from tools.localize.schema import LocalizeResult
from tools.parity.invariance import InvarianceResult
from tools.parity.schema import ParityResult

RESULTS: dict[str, type[Entry]] = {
    "localize": LocalizeResult,
    "diff": DiffResult,
    "trace": TraceResult,
    "batch": BatchResult,
    "collect": CollectResult,
    "convert": ConvertResult,
    "parity": ParityResult,
    "invariance": InvarianceResult,
    "bench": BenchResult,
}
FOLDER = Path(__file__).parents[2] / "docs" / "schema"
DIALECT = "https://json-schema.org/draft/2020-12/schema"


def render() -> dict[str, bytes]:
    """File name -> JSON Schema, of the manifest and of what each command says with --json."""
    found = {name: msgspec.json.schema(kind) for name, kind in RESULTS.items()}
    manifest = msgspec.json.schema(Manifest)
    whole = manifest["$defs"]["Manifest"]
    whole["properties"] = {
        "schema": {"const": SCHEMA},
        "kind": {"const": KIND},
        **whole["properties"],
    }
    whole["required"] = ["schema", "kind", *whole["required"]]
    found["manifest"] = manifest
    for schema in found.values():
        for kind in schema[
            "$defs"
        ].values():  # a docstring is indented, but not from Python 3.13 on
            if "description" in kind:
                kind["description"] = inspect.cleandoc(kind["description"])
    return {
        f"{name}.json": msgspec.json.format(msgspec.json.encode({"$schema": DIALECT} | schema))
        + b"\n"
        for name, schema in found.items()
    }


def main(argv: list[str]) -> int:
    cli.Parser("tests.maintain.schemas", __doc__).parse_args(argv)
    FOLDER.mkdir(exist_ok=True)
    for name, content in render().items():
        (FOLDER / name).write_bytes(content)
        print(f"wrote {FOLDER / name}")
    return 0


if __name__ == "__main__":
    cli.run(main)
