"""Traces on disk: written and read back exactly, never mixed, never whole when they are not."""

import contextlib
import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from msgspec.structs import replace
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from stages import manifest, writer
from stages.errors import UserError
from stages.manifest import Manifest, Model, WeightEntry
from stages.open import open_trace
from stages.trace import Layout
from stages.writer import TraceWriter
from tests.conftest import with_mount

CONFIG = {"architecture": "qwen2", "num_hidden_layers": 3}
MODEL = Model(name="tiny", config=CONFIG, weights={})
UP, HEAD = ("ffn_up", 1), ("lm_head", None)
FLOATS = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float64": np.float64,
}
PAIRS = [("aprt", "float32"), ("aprt", "bfloat16"), ("aprt", "float16")]
PAIRS += [("safetensors", dtype) for dtype in FLOATS]


def header(format="aprt", dtype="float32", tokens=(7, 0), cache=None):
    return Manifest(
        architecture="qwen2",
        format=format,
        dtype=dtype,
        logits="last",
        tokens=tokens,
        positions=tuple(range(len(tokens))),
        steps=(len(tokens),),
        cache=cache,
        model=MODEL,
        producer={"name": "test"},
        files=(),
    )


def write(directory, stages, overwrite=False, **kind):
    """A trace of {(stage, layer): array}."""
    with TraceWriter(directory, header(**kind), {}, planned(stages), overwrite) as trace:
        for key, array in stages.items():
            trace.add(*key, array)
        return trace.finish()


def planned(stages):
    return {key: (array.shape, str(array.dtype)) for key, array in stages.items()}


ONE = planned({UP: np.zeros((2, 5), np.float32)})


def values(seed=0, shape=(2, 5), dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def files(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def refusal(call, *args, **options):
    with pytest.raises(UserError) as error:
        call(*args, **options)
    message = str(error.value)
    assert len(message.splitlines()) == 1
    return message


def same_bits(a, b):
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    assert np.ascontiguousarray(a).tobytes() == np.ascontiguousarray(b).tobytes()


# --- round trips


@pytest.mark.parametrize(("format", "dtype"), PAIRS)
def test_round_trip(tmp_path, format, dtype):
    head, up = values(1, (48,), FLOATS[dtype]), values(2, (2, 5), FLOATS[dtype])
    written = write(tmp_path, {UP: up, HEAD: head}, format=format, dtype=dtype)
    trace = open_trace(tmp_path)
    assert trace.manifest == written
    assert list(trace.entries) == [UP, HEAD]
    assert (trace.tokens, trace.config, trace.dtype) == ((7, 0), CONFIG, dtype)
    stored = np.float32 if format == "aprt" else FLOATS[dtype]
    for key, array in ((UP, up), (HEAD, head)):
        assert trace.entries[key].dtype == dtype and trace.entries[key].shape == array.shape
        same_bits(trace.read(*key), array.astype(stored))


def test_where_the_files_lie(tmp_path):
    stages = {("embedding", 0): values(), ("ffn_up", 12): values(), HEAD: values(shape=(9,))}
    write(tmp_path / "a", stages)
    names = {"manifest.json", "layer-0/embedding.bin", "layer-12/ffn_up.bin", "lm_head.bin"}
    assert files(tmp_path / "a").keys() == names
    write(tmp_path / "s", stages, format="safetensors")
    assert files(tmp_path / "s").keys() == {"manifest.json", "stages.safetensors"}


def test_the_one_file_is_what_the_library_reads(tmp_path):
    """Of every dtype at once, though one is a few bytes long: each is aligned to its size."""
    stages = {
        ("embedding", 0): values(1, (2, 3), np.float16),
        ("ffn_up", 2): values(2, (2, 5), ml_dtypes.bfloat16),
        ("attn_scores", 2): values(3, (1, 2, 2)),
        ("final_norm", None): values(4, (2, 3), np.float64),
        HEAD: values(5, (9,)),
    }
    made = write(tmp_path, stages, format="safetensors")
    assert all(e.start % np.dtype(FLOATS[e.dtype]).itemsize == 0 for e in made.files)
    found = load_file(tmp_path / "stages.safetensors")
    names = ["layer-0/embedding", "layer-2/ffn_up", "layer-2/attn_scores", "final_norm"]
    assert found.keys() == {*names, "lm_head"}
    for name, (key, array) in zip([*names, "lm_head"], stages.items(), strict=True):
        same_bits(found[name], array)
        same_bits(open_trace(tmp_path).read(*key), array)
    size = (tmp_path / "stages.safetensors").stat().st_size
    assert size == 8 + int.from_bytes(
        (tmp_path / "stages.safetensors").read_bytes()[:8], "little"
    ) + sum(array.nbytes for array in stages.values())


def test_no_library_takes_an_unfinished_file_for_whole(tmp_path):
    with pytest.raises(KeyError), TraceWriter(tmp_path, header("safetensors"), {}, ONE) as trace:
        trace.add(*UP, values())
        trace._stop()
        with pytest.raises(SafetensorError):
            load_file(tmp_path / "stages.safetensors")
        raise KeyError


def tree_of(directory, stages):
    """A trace of safetensors as it was before: one file a stage."""
    made = write(directory, stages, format="safetensors")
    (directory / "stages.safetensors").unlink()
    entries = []
    for (stage, layer), entry in zip(stages, made.files, strict=True):
        path = f"{stage}.safetensors" if layer is None else f"layer-{layer}/{stage}.safetensors"
        (directory / path).parent.mkdir(exist_ok=True)
        save_file({stage: stages[stage, layer]}, directory / path)
        entries.append(replace(entry, path=path, start=None))
    manifest.write(directory, replace(made, files=tuple(entries)))


def test_the_tree_of_safetensors_files_that_was_written_before_is_read(tmp_path):
    tree_of(tmp_path, {UP: values(), HEAD: values(1, (9,))})
    same_bits(open_trace(tmp_path).read(*UP), values())
    same_bits(open_trace(tmp_path).read(*HEAD), values(1, (9,)))
    write(tmp_path, {UP: values()}, overwrite=True)
    assert files(tmp_path).keys() == {"manifest.json", "layer-1/ffn_up.bin"}


# --- stages that come row by row


@pytest.mark.parametrize("parts", [[(0, 3), (3, 4), (4, 5)], [(3, 5), (0, 1), (1, 3)]])
@pytest.mark.parametrize(("format", "dtype"), PAIRS)
def test_rows_in_parts_are_the_same_files(tmp_path, format, dtype, parts):
    """As a decode computes them, call by call, the keys of a call only those that there are."""
    lower = np.tril(np.ones((5, 5), bool))
    whole = {
        ("k_cache", 0): values(1, (5, 2, 4), FLOATS[dtype]),
        ("attn_scores", 0): np.where(lower, values(2, (3, 5, 5), FLOATS[dtype]), FLOATS[dtype](0)),
        UP: values(3, (5, 7), FLOATS[dtype]),
        HEAD: values(4, (9,), FLOATS[dtype]),
    }
    kind = {"format": format, "dtype": dtype, "tokens": tuple(range(5)), "cache": dtype}
    made = write(tmp_path / "whole", whole, **kind)
    with TraceWriter(tmp_path / "parts", header(**kind), {}, planned(whole)) as trace:
        for a, b in parts:
            for key, value in whole.items():
                if key[0] == "attn_scores":
                    trace.add(*key, value[:, a:b, :b], rows=slice(a, b))
                elif key != HEAD:
                    trace.add(*key, value[a:b], rows=slice(a, b))
        trace.add(*HEAD, whole[HEAD])
        assert trace.finish() == made
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


@pytest.mark.parametrize("format", ["aprt", "safetensors"])
def test_a_stage_without_all_of_its_rows_is_not_whole(tmp_path, format):
    stages = {UP: values(1, (5, 7)), ("ffn_up", 2): values(2, (5, 7))}
    kind = {"format": format, "tokens": tuple(range(5))}
    writer = TraceWriter(tmp_path, header(**kind), {}, planned(stages))
    with pytest.raises(RuntimeError, match="'ffn_up', 1"), writer as trace:
        trace.add("ffn_up", 2, stages["ffn_up", 2])
        for a, b in ((0, 2), (2, 4), (1, 3)):
            trace.add(*UP, stages[UP][a:b], slice(a, b))
        trace.finish()
    marked = manifest.read(tmp_path, manifest.PARTIAL)
    assert [entry.layer for entry in marked.files] == [2]
    assert "interrupted" in refusal(open_trace, tmp_path)


@pytest.mark.parametrize("rows", [None, slice(0, 1), slice(1, 4), slice(-1, 1)])
def test_a_value_that_is_not_what_was_planned(tmp_path, rows):
    writer = TraceWriter(tmp_path, header(), {}, ONE)
    with pytest.raises(RuntimeError, match=r"planned float32 \("), writer as trace:
        trace.add(*UP, values(shape=(3, 5) if rows is None else (2, 5)), rows)
        trace.finish()


@pytest.mark.parametrize("format", ["aprt", "safetensors"])
def test_nan_payloads_infinities_and_zeros(tmp_path, format):
    words = [0x7FC12345, 0x7F812345, 0xFFC00001, 0x7F800000, 0xFF800000, 0x80000000, 0, 1]
    array = np.array(words, np.uint32).reshape(2, 4).view(np.float32)
    write(tmp_path, {UP: array}, format=format)
    same_bits(open_trace(tmp_path).read(*UP), array)


def test_bfloat16_nan_payloads_in_safetensors(tmp_path):
    array = np.arange(2**16, dtype=np.uint16).reshape(2, -1).view(ml_dtypes.bfloat16)
    write(tmp_path, {UP: array}, format="safetensors", dtype="bfloat16")
    same_bits(open_trace(tmp_path).read(*UP), array)


@pytest.mark.parametrize("format", ["aprt", "safetensors"])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_values_that_are_not_contiguous(tmp_path, format, dtype):
    base = np.arange(24).astype(dtype).reshape(4, 6)
    views = {"ffn_up": base.T, "ffn_gate": base[::2, 1::3], "ffn_silu": base[::-1]}
    stages = {(name, 0): view for name, view in views.items()}
    kind = {"format": format, "dtype": np.dtype(dtype).name, "tokens": tuple(range(6))}
    write(tmp_path, stages, **kind)
    for name, view in views.items():
        assert open_trace(tmp_path).read(name, 0).tolist() == view.tolist()


@pytest.mark.parametrize("format", ["aprt", "safetensors"])
def test_empty_values(tmp_path, format):
    write(tmp_path, {UP: np.zeros((2, 0), np.float32)}, format=format)
    assert open_trace(tmp_path).read(*UP).shape == (2, 0)


def test_stages_read_in_computation_order_whatever_order_they_came_in(tmp_path):
    keys = [HEAD, ("final_norm", None), ("ffn_up", 2), ("ffn_gate", 2), ("ffn_up", 0)]
    stages = {key: values(shape=(9,) if key == HEAD else (2, 5)) for key in keys}
    write(tmp_path, stages)
    order = [("ffn_up", 0), ("ffn_gate", 2), ("ffn_up", 2), ("final_norm", None), HEAD]
    assert list(open_trace(tmp_path).entries) == order


@pytest.mark.parametrize(("format", "dtype"), PAIRS)
def test_the_same_values_give_the_same_bytes(tmp_path, format, dtype):
    for name in "ab":
        stages = {UP: values(dtype=FLOATS[dtype])}
        write(tmp_path / name, stages, format=format, dtype=dtype)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_bytes_counts_what_is_on_disk(tmp_path):
    stages = {UP: values(), HEAD: values(shape=(9,))}
    with TraceWriter(tmp_path, header(), {}, planned(stages)) as trace:
        for key, array in stages.items():
            trace.add(*key, array)
        trace.finish()
    found = files(tmp_path)
    found.pop("manifest.json")
    assert trace.bytes == sum(map(len, found.values())) == 12 + 40 + 12 + 36


@pytest.mark.parametrize("format", ["aprt", "safetensors"])
def test_the_last_rows_of_a_stage(tmp_path, format):
    """As many tokens as there are rows in the others; the axes are whole whatever is kept."""
    some = {("ffn_up", 2): values(2, (1, 5)), ("attn_scores", 2): values(3, (4, 2, 3))}
    stages = {UP: values(1, (3, 5)), **some, HEAD: values(4, (9,))}
    written = write(tmp_path, stages, format=format, tokens=(7, 0, 7))
    trace = open_trace(tmp_path)
    assert trace.manifest == written
    assert [entry.rows for entry in written.files] == [None, 1, 2, None]
    rows = {key: trace.rows_of(*key) for key in stages}
    assert rows == {UP: 3, ("ffn_up", 2): 1, ("attn_scores", 2): 2, HEAD: 1}
    for key, array in stages.items():
        same_bits(trace.read(*key), array)
        same_bits(trace.read_rows(*key), array if key != HEAD else array[None])


def test_hashes_that_come_to_be_known_are_written(tmp_path):
    """Weights are hashed as they are read, while stages are written."""
    hashes = {}
    with TraceWriter(tmp_path, header(), hashes, ONE) as trace:
        trace.add(*UP, values())
        for name in ("b", "a"):
            hashes[name] = WeightEntry(dtype="float32", shape=(2,), xxh3="0123456789abcdef")
        trace.finish()
    assert list(open_trace(tmp_path).manifest.model.weights) == ["a", "b"]


def test_the_mark_says_what_there_is_to_be_and_what_is_whole(tmp_path):
    hashes = {"a": WeightEntry(dtype="float32", shape=(2,), xxh3="0123456789abcdef")}
    both = ONE | {HEAD: ((9,), "float32")}
    with pytest.raises(KeyError), TraceWriter(tmp_path, header(), hashes, both) as trace:
        assert manifest.read(tmp_path, manifest.PARTIAL).files == ()
        trace.add(*UP, values())
        raise KeyError
    marked = manifest.read(tmp_path, manifest.PARTIAL)
    assert marked.planned == (UP, HEAD) and marked.model.weights == hashes
    assert [(entry.stage, entry.layer) for entry in marked.files] == [UP]


def test_kept_files_of_an_interrupted_trace(tmp_path):
    """They stay as they are and count as added; everything else of the trace goes."""
    stages = {("ffn_up", layer): values(layer) for layer in range(3)} | {HEAD: values(9, (9,))}
    with pytest.raises(KeyError), TraceWriter(tmp_path, header(), {}, planned(stages)) as trace:
        for layer in range(3):
            trace.add("ffn_up", layer, values(layer))
        raise KeyError
    before = files(tmp_path)
    kept = manifest.read(tmp_path, manifest.PARTIAL).files
    kept = [entry for entry in kept if entry.layer != 2]
    with TraceWriter(tmp_path, header(), {}, planned(stages), kept=kept) as trace:
        assert files(tmp_path).keys() == before.keys() - {"layer-2/ffn_up.bin"}
        trace.add("ffn_up", 2, values(2))
        trace.add(*HEAD, values(9, (9,)))
        trace.finish()
    assert trace.bytes == 3 * 52 + 48
    found = open_trace(tmp_path)
    assert list(found.entries) == list(stages)
    for key, array in stages.items():
        same_bits(found.read(*key), array)
    message = refusal(TraceWriter, tmp_path, header(), {}, planned(stages), kept=kept)
    assert "another process has just finished it" in message
    assert files(tmp_path).keys() == {
        "layer-0/ffn_up.bin", "layer-1/ffn_up.bin", "layer-2/ffn_up.bin", "lm_head.bin",
        "manifest.json"
    }  # fmt: skip


def test_a_stage_that_was_never_added(tmp_path):
    writer = TraceWriter(tmp_path, header(), {}, ONE)
    with pytest.raises(RuntimeError, match="ffn_up"), writer as trace:
        trace.finish()
    assert "interrupted" in refusal(open_trace, tmp_path)


# --- never two traces in one directory


def test_a_directory_that_holds_a_trace(tmp_path):
    write(tmp_path, {UP: values()})
    before = files(tmp_path)
    assert "--overwrite" in refusal(write, tmp_path, {HEAD: values()})
    assert files(tmp_path) == before


def test_overwriting_leaves_nothing_of_the_old_trace(tmp_path):
    old = {("ffn_up", layer): values() for layer in range(3)} | {HEAD: values(shape=(9,))}
    write(tmp_path, old, format="safetensors")
    new = values(1)
    write(tmp_path, {("ffn_gate", 0): new}, overwrite=True)
    assert files(tmp_path).keys() == {"manifest.json", "layer-0/ffn_gate.bin"}
    same_bits(open_trace(tmp_path).read("ffn_gate", 0), new)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["layer-0", "manifest.json"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "stranger",
    ["notes.txt", "ffn_up.npy", "layer-0/notes.txt", "layer-0/ffn_up.npy", "layer-x/ffn_up.bin",
     "layer-0/layer-0/ffn_up.bin", "other/ffn_up.bin", ".hidden", "manifest.json.bak"],
)  # fmt: skip
def test_a_directory_that_holds_anything_else(tmp_path, stranger, overwrite):
    write(tmp_path, {("ffn_up", 0): values()})
    (tmp_path / stranger).parent.mkdir(exist_ok=True, parents=True)
    (tmp_path / stranger).write_bytes(b"mine")
    before = files(tmp_path)
    message = refusal(write, tmp_path, {UP: values()}, overwrite=overwrite)
    assert repr(stranger.split("/")[0]) in message
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    "link",
    ["layer-0", "layer-0/ffn_up.bin", "lm_head.bin", "stages.safetensors", "manifest.json",
     "manifest.json.tmp", "manifest.json.partial", "manifest.json.partial.tmp"],
)  # fmt: skip
def test_overwriting_deletes_nothing_beyond_a_link(tmp_path, link):
    out, mine = tmp_path / "out", tmp_path / "mine"
    mine.mkdir()
    (mine / "ffn_up.bin").write_bytes(b"mine")
    (out / link).parent.mkdir(parents=True)
    (out / link).symlink_to(mine if link == "layer-0" else mine / "ffn_up.bin")
    message = refusal(write, out, {UP: values()}, overwrite=True)
    assert repr(link.split("/")[0]) in message
    assert [path.name for path in out.iterdir()] == [link.split("/")[0]]
    assert files(mine) == {"ffn_up.bin": b"mine"}


@pytest.mark.parametrize("name", ["manifest.json", "lm_head.bin", "stages.safetensors"])
@pytest.mark.parametrize("format", ["aprt", "safetensors"])
def test_a_pipe_is_neither_waited_for_nor_replaced(tmp_path, format, name):
    made = write(tmp_path, {HEAD: values(1, (9,))}, format=format)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    assert repr(name) in refusal(write, tmp_path, {UP: values()}, overwrite=True)
    if name in ("manifest.json", made.files[0].path):
        refusal(open_trace, tmp_path)
    assert (tmp_path / name).is_fifo()


@pytest.mark.parametrize("where", ["file", "file/below"])
def test_a_file_in_the_way(tmp_path, where):
    (tmp_path / "file").write_bytes(b"mine")
    assert f"--out {tmp_path / where}: " in refusal(write, tmp_path / where, {UP: values()})
    assert files(tmp_path) == {"file": b"mine"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_writers_at_once(tmp_path, overwrite):
    with TraceWriter(tmp_path, header(), {}, ONE) as first:
        first.add(*UP, values())
        message = refusal(TraceWriter, tmp_path, header(), {}, ONE, overwrite=overwrite)
        assert "another process is writing" in message
        first.finish()
    same_bits(open_trace(tmp_path).read(*UP), values())
    write(tmp_path, {UP: values(1)}, overwrite=True)  # the first is done


# --- never whole when it is not


class Crash(BaseException):
    """The process dies."""


class CrashInThread(Exception):
    """The same in a thread that writes, which hands it on to the one that adds."""


def crash_before(patch, number):
    """Let the process die, as it were, before its renaming or removing of this number."""
    calls = []

    def dying(real):
        def call(*args, **options):
            calls.append(real)
            if len(calls) > number:
                main = threading.current_thread() is threading.main_thread()
                raise Crash if main else CrashInThread
            return real(*args, **options)

        return call

    for name in ("replace", "unlink", "rmdir"):
        patch.setattr(os, name, dying(getattr(os, name)))


@pytest.mark.parametrize("format", ["aprt", "safetensors"])
def test_overwriting_may_stop_anywhere(tmp_path, monkeypatch, format):
    """What reads as whole afterwards is the old trace or the new one, complete."""
    old = {("ffn_up", 0): values(1), ("ffn_up", 2): values(2), HEAD: values(3, (9,))}
    new = {("ffn_gate", 0): values(4), ("ffn_up", 2): values(5)}
    outcomes = []
    while not outcomes or outcomes[-1] != "new":
        directory = tmp_path / str(len(outcomes))
        write(directory, old)
        with monkeypatch.context() as patch, contextlib.suppress(Crash, CrashInThread):
            crash_before(patch, len(outcomes))
            write(directory, new, overwrite=True, format=format)
        outcomes.append(outcome(directory, old, new))
        write(directory, new, overwrite=True)  # and the directory is usable again
        assert outcome(directory, old, new) == "new"
    # Until the mark is there (something in its way is removed, then it is renamed) the old trace is
    # whole, and from then on none is until the end.
    assert outcomes == ["old", "old", *["interrupted"] * (len(outcomes) - 3), "new"]
    assert len(outcomes) > 1 + len(files(tmp_path / "0"))


def outcome(directory, old, new):
    try:
        trace = open_trace(directory, Layout(config=CONFIG, dims={}, tokens=(), positions=()))
    except UserError as error:
        assert "interrupted" in str(error)
        return "interrupted"
    for name, stages in (("old", old), ("new", new)):
        if trace.entries.keys() == stages.keys():
            for key, array in stages.items():
                same_bits(trace.read(*key), array)
            return name
    raise AssertionError(f"a mixture: {list(trace.entries)}")


CHILD = """
import sys
import numpy as np
from pathlib import Path
from qwen_jax import cli
from stages.manifest import Manifest, Model
from stages.writer import TraceWriter

CONFIG = {"architecture": "qwen2", "num_hidden_layers": 3}
HEADER = Manifest(architecture="qwen2", format="aprt", dtype="float32", logits="last",
                  tokens=(7, 0), positions=(0, 1), steps=(2,),
                  model=Model(name="tiny", config=CONFIG, weights={}), producer={}, files=())
"""


def child(code, *args, prefix=(), **options):
    """Start a Python of its own on ``CHILD`` and ``code``."""
    command = [*prefix, sys.executable, "-c", CHILD + textwrap.dedent(code), *map(str, args)]
    root = Path(__file__).parent.parent
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=root, text=True, **pipes, **options)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_kill_in_the_middle(tmp_path, overwrite):
    if overwrite:
        write(tmp_path, {UP: values()})
    code = """
        import time
        planned = {("ffn_up", layer): ((2, 5), "float32") for layer in range(20)}
        with TraceWriter(Path(sys.argv[1]), HEADER, {}, planned, overwrite=True) as trace:
            for layer in range(20):
                trace.add("ffn_up", layer, np.ones((2, 5), np.float32))
            while trace.bytes < 20 * 52:
                time.sleep(0.001)
            print("ready", flush=True)
            time.sleep(60)
    """
    with child(code, tmp_path) as process:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert len(files(tmp_path)) == 21
    assert "interrupted" in refusal(open_trace, tmp_path)
    assert "--overwrite" in refusal(write, tmp_path, {UP: values()})
    write(tmp_path, {UP: values(1)}, overwrite=True)
    same_bits(open_trace(tmp_path).read(*UP), values(1))


FILLS = """
    def main(argv):
        planned = {("ffn_up", layer): ((2, int(argv[1])), "float32") for layer in range(40)}
        with TraceWriter(Path(argv[0]), HEADER, {}, planned) as trace:
            for layer in range(40):
                trace.add("ffn_up", layer, np.ones((2, int(argv[1])), np.float32))
            trace.finish()
        return 0

    if len(sys.argv) > 3:  # the largest file that this process may write
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
    cli.run(main)
"""


def test_a_file_that_cannot_be_written_to_its_end(tmp_path):
    with child(FILLS, tmp_path, 5000, 10_000) as process:
        out, err = process.communicate(timeout=1800)
    assert (process.returncode, out) == (2, "")
    assert len(err.splitlines()) == 1 and os.strerror(errno.EFBIG) in err and "incomplete" in err
    assert "interrupted" in refusal(open_trace, tmp_path)
    assert any(0 < len(data) <= 10_000 for name, data in files(tmp_path).items() if ".bin" in name)


def test_a_manifest_that_cannot_be_written_to_its_end(tmp_path):
    with child(FILLS, tmp_path, 5, 5000) as process:  # less than 40 entries take
        out, err = process.communicate(timeout=1800)
    assert (process.returncode, out) == (2, "")
    assert len(err.splitlines()) == 1 and "incomplete" in err
    assert sum(name.endswith("ffn_up.bin") for name in files(tmp_path)) == 40
    assert "interrupted" in refusal(open_trace, tmp_path)


def test_a_full_disk(tmp_path):
    """A real one, of 64 kB, in a mount namespace of its own."""
    mount = f"mount -t tmpfs -o size=64k none {tmp_path}"
    look = f"find {tmp_path} -name 'manifest*' -size +0; find {tmp_path} -name '*.bin' | wc -l"
    inside = f'"$0" "$@"; code=$?; {look}; exit $code'
    with child(FILLS, tmp_path, 1000, prefix=with_mount(mount, inside)) as process:
        out, err = process.communicate(timeout=1800)
    assert process.returncode == 2
    assert len(err.splitlines()) == 1 and os.strerror(errno.ENOSPC) in err and "incomplete" in err
    marks, count = out.split()
    assert Path(marks).name == manifest.PARTIAL and 1 < int(count) < 40


def no_space(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_failed_write_is_told_to_the_thread_that_adds(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "pwrite", no_space)
    writer = TraceWriter(tmp_path, header(), {}, ONE)
    with pytest.raises(UserError, match="incomplete"), writer as trace:
        for _ in range(10_000):
            trace.add(*UP, values())
    assert "interrupted" in refusal(open_trace, tmp_path)


def test_a_failed_last_write_is_told_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "pwrite", no_space)
    assert "incomplete" in refusal(write, tmp_path, {UP: values()})
    assert "interrupted" in refusal(open_trace, tmp_path)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_in_the_computation(tmp_path, error):
    with pytest.raises(error), TraceWriter(tmp_path, header(), {}, ONE) as trace:
        trace.add(*UP, values())
        raise error
    assert "interrupted" in refusal(open_trace, tmp_path)


@pytest.mark.parametrize(("small", "most"), [(0, writer.WAITING), (12 * 40, 12)])
def test_few_stages_are_in_memory_at_a_time(tmp_path, monkeypatch, small, most):
    """While the disk stands still the computation does too, after a fixed number of stages, or of
    bytes where they are small."""
    monkeypatch.setattr(writer, "SMALL", small)
    gate, added, stages = threading.Event(), [], [("ffn_up", layer) for layer in range(64)]
    all_ = dict.fromkeys(stages, ((2, 5), "float32"))
    real = TraceWriter._write

    def slow(self, *stage):
        assert gate.wait(30)
        real(self, *stage)

    monkeypatch.setattr(TraceWriter, "_write", slow)
    model = replace(MODEL, config=CONFIG | {"num_hidden_layers": 64})
    with TraceWriter(tmp_path, replace(header(), model=model), {}, all_) as trace:

        def compute():
            for key in stages:
                trace.add(*key, values())
                added.append(key)

        computing = threading.Thread(target=compute)
        computing.start()
        bound = most + writer.THREADS
        computing.join(0.3)
        assert computing.is_alive() and len(added) == bound < 16
        gate.set()
        computing.join(30)
        trace.finish()
    assert list(open_trace(tmp_path).entries) == stages


# --- damage afterwards


@pytest.mark.parametrize("format", ["aprt", "safetensors"])
@pytest.mark.parametrize("where", [-1, -17])
def test_a_changed_byte(tmp_path, format, where):
    entry = write(tmp_path, {UP: values()}, format=format).files[0]
    path = tmp_path / entry.path
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)
    message = refusal(open_trace(tmp_path).read, *UP)
    assert str(path) in message and "changed" in message


@pytest.mark.parametrize("format", ["aprt", "safetensors"])
def test_a_file_cut_short(tmp_path, format):
    path = tmp_path / write(tmp_path, {UP: values()}, format=format).files[0].path
    for length in (0, 4, 11, 30, path.stat().st_size - 1):
        os.truncate(path, length)
        assert str(path) in refusal(open_trace(tmp_path).read, *UP)


@pytest.mark.parametrize("format", ["aprt", "safetensors"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_a_dtype_that_the_values_do_not_have(tmp_path, format, dtype):
    """What they are said to be computed in decides how far apart two traces may be."""
    made = write(tmp_path, {UP: values(), ("ffn_gate", 1): values(1)}, format=format)
    manifest.write(tmp_path, replace(made, dtype=dtype))
    assert f"computed in {dtype}" in refusal(open_trace, tmp_path)
    entries = tuple(replace(entry, dtype=dtype) for entry in made.files)
    manifest.write(tmp_path, replace(made, dtype=dtype, files=entries))
    if format == "aprt" and dtype != "float64":
        assert f"values that {dtype}" in refusal(open_trace(tmp_path).read, *UP)
    else:
        refusal(lambda: open_trace(tmp_path).read(*UP))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_wider_copies_of_what_a_model_computes_in(tmp_path, dtype):
    """As engines show them that give float32 whatever they compute in."""
    narrow = values().astype(FLOATS[dtype]).astype(np.float32)
    made = write(tmp_path, {UP: narrow, ("attn_scores", 1): values(1, (2, 2, 2))})
    manifest.write(tmp_path, replace(made, dtype=dtype))
    assert open_trace(tmp_path).dtype == dtype


def test_a_file_of_another_trace(tmp_path):
    for name, width in (("a", 5), ("b", 6)):
        write(tmp_path / name, {UP: values(shape=(2, width))})
    shutil.copy(tmp_path / "b/layer-1/ffn_up.bin", tmp_path / "a/layer-1/ffn_up.bin")
    assert "12 values, but T x F is 2 x 5" in refusal(open_trace(tmp_path / "a").read, *UP)


@pytest.mark.parametrize(
    ("stored", "says"),
    [
        ({"ffn_up": values().reshape(5, 2)}, "[5, 2]"),
        ({"ffn_up": values().view(np.int32)}, "int32"),
        ({"ffn_gate": values()}, "ffn_up"),
    ],
)
def test_a_safetensors_file_of_other_shape_dtype_or_name(tmp_path, stored, says):
    tree_of(tmp_path, {UP: values()})
    save_file(stored, tmp_path / "layer-1/ffn_up.safetensors")
    assert says in refusal(open_trace(tmp_path).read, *UP)


def test_a_safetensors_file_of_a_dtype_that_numpy_lacks(tmp_path):
    tree_of(tmp_path, {UP: values()})
    path = tmp_path / "layer-1/ffn_up.safetensors"
    told = json.dumps({"ffn_up": {"dtype": "F8_E4M3", "shape": [40], "data_offsets": [0, 40]}})
    path.write_bytes(len(told).to_bytes(8, "little") + told.encode() + bytes(40))
    assert "safetensors" in refusal(open_trace(tmp_path).read, *UP)


@pytest.mark.parametrize("format", ["aprt", "safetensors"])
def test_a_missing_file(tmp_path, format):
    trace = write(tmp_path, {UP: values(), HEAD: values(1, (9,))}, format=format)
    (tmp_path / trace.files[0].path).unlink()
    message = refusal(open_trace, tmp_path)
    assert trace.files[0].path in message and f"1 of {2 if format == 'aprt' else 1}" in message


# --- traces without a manifest


DIMS = {"T": 2, "S": 2, "N": 4, "K": 2, "H": 8, "D": 24, "F": 5, "V": 9}
LAYOUT = Layout(config=CONFIG, dims=DIMS, tokens=(7, 0), positions=(0, 1))


def foreign(directory, stages, **kind):
    write(directory, stages, **kind)
    (directory / manifest.NAME).unlink()
    return directory


def test_a_foreign_trace_needs_the_model_and_the_tokens(tmp_path):
    foreign(tmp_path, {UP: values()})
    assert "--model" in refusal(open_trace, tmp_path)


def test_a_foreign_trace(tmp_path):
    stages = {UP: values(), HEAD: values(1, (9,))}
    trace = open_trace(foreign(tmp_path, stages), LAYOUT)
    assert (trace.manifest, trace.dtype, trace.tokens) == (None, None, (7, 0))
    assert list(trace.entries) == [UP, HEAD]
    for key, array in stages.items():
        same_bits(trace.read(*key), array)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_foreign_trace_of_last_rows(tmp_path, rows):
    """Some engines compute the end of the last layer for the last positions only."""
    stages = {
        UP: values(1, (3, 5)),
        ("attn_scores", 2): values(2, (4, rows, 3)),
        ("ffn_up", 2): values(3, (rows, 5)),
        ("final_norm", None): values(4, (rows, 24)),
        HEAD: values(5, (rows, 9) if rows > 1 else (9,)),
    }
    layout = Layout(
        config=CONFIG, dims=DIMS | {"T": 3, "S": 3}, tokens=(7, 0, 7), positions=(4, 5, 9)
    )
    trace = open_trace(foreign(tmp_path, stages, tokens=(7, 0, 7)), layout)
    assert trace.positions == (4, 5, 9)
    order = [UP, ("attn_scores", 2), ("ffn_up", 2), ("final_norm", None), HEAD]
    assert list(trace.entries) == order
    for key in order:
        assert trace.rows_of(*key) == (3 if key == UP else rows)
        same_bits(trace.read(*key), stages[key])


@pytest.mark.parametrize("shape", [(1, 5), (4, 5), (3, 6), (0, 5)])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_foreign_stage_of_other_rows(tmp_path, shape, layer):
    """In a layer before the last, fewer rows are a mistake in the tokens; more are anywhere."""
    foreign(tmp_path, {("ffn_up", layer): values(1, shape)}, tokens=tuple(range(4)))
    layout = Layout(config=CONFIG, dims=DIMS | {"T": 3}, tokens=(7, 0, 7), positions=(0, 1, 2))
    if layer == 2 and shape == (1, 5):
        assert open_trace(tmp_path, layout).entries["ffn_up", 2].rows == 1
    else:
        message = refusal(open_trace, tmp_path, layout)
        assert "T x F is 3 x 5" in message and "are its 3 --tokens right?" in message


def test_a_foreign_trace_of_qwen3(tmp_path):
    """Its stages are its architecture's; files under the other's names are passed over."""
    stages = {("q_norm", 1): values(1, (2, 4, 8)), UP: values()}
    three = replace(header(), architecture="qwen3")
    with TraceWriter(tmp_path, three, {}, planned(stages)) as trace:
        for key, array in stages.items():
            trace.add(*key, array)
        trace.finish()
    (tmp_path / manifest.NAME).unlink()
    three = open_trace(
        tmp_path, dataclasses.replace(LAYOUT, config={**CONFIG, "architecture": "qwen3"})
    )
    assert list(three.entries) == [("q_norm", 1), UP]
    same_bits(three.read("q_norm", 1), stages["q_norm", 1])
    assert list(open_trace(tmp_path, LAYOUT).entries) == [UP]
    (tmp_path / "layer-1/ffn_up.bin").unlink()
    assert "no trace" in refusal(open_trace, tmp_path, LAYOUT)
    assert "--model" in refusal(open_trace, tmp_path)


def test_a_foreign_trace_with_all_logits_and_the_alias(tmp_path):
    foreign(tmp_path, {("post_ffn_residual", 0): values(shape=(2, 24)), HEAD: values(1, (2, 9))})
    (tmp_path / "layer-0/post_ffn_residual.bin").rename(tmp_path / "layer-0/layer_output.bin")
    (tmp_path / "layer-0/notes.bin").write_bytes(b"")  # theirs, and no stage
    trace = open_trace(tmp_path, LAYOUT)
    assert trace.entries[HEAD].axes == ("T", "V") and trace.read(*HEAD).shape == (2, 9)
    assert list(trace.entries) == [("post_ffn_residual", 0), HEAD]


@pytest.mark.parametrize(
    ("move", "says"),
    [
        (("layer-1/ffn_up.bin", "ffn_up.bin"), "in a layer directory"),
        (("lm_head.bin", "layer-1/lm_head.bin"), "beside the layer directories"),
        (("layer-1/ffn_up.bin", "layer-3/ffn_up.bin"), "3 layers"),
        (("layer-1/ffn_up.bin", "layer-2/ffn_up.bin"), "says layer 1, expected 2"),
        (("layer-1/ffn_up.bin", "layer-1/ffn_norm.bin"), "10 values"),
    ],
)
def test_a_foreign_trace_with_a_file_where_it_cannot_be(tmp_path, move, says):
    foreign(tmp_path, {UP: values(), HEAD: values(1, (9,))})
    (tmp_path / move[1]).parent.mkdir(exist_ok=True)
    (tmp_path / move[0]).rename(tmp_path / move[1])

    def read_all():
        trace = open_trace(tmp_path, LAYOUT)
        for key in trace.entries:
            trace.read(*key)

    assert says in refusal(read_all)


def test_a_stage_that_is_there_under_two_names(tmp_path):
    foreign(tmp_path, {UP: values()})
    shutil.copytree(tmp_path / "layer-1", tmp_path / "layer-01")
    assert "twice" in refusal(open_trace, tmp_path, LAYOUT)


def test_directories_that_hold_no_trace(tmp_path):
    (tmp_path / "notes.txt").write_bytes(b"")
    (tmp_path / "ffn_up.bin").symlink_to("nowhere")
    assert "no trace" in refusal(open_trace, tmp_path)
    assert "no such trace directory" in refusal(open_trace, tmp_path / "absent")
    assert "no such trace directory" in refusal(open_trace, tmp_path / "notes.txt")
