"""APRT files: the bytes, exact round trips, and files that are not what they should be."""

import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from stages import aprt
from stages.errors import UserError

FLOATS = (np.float32, np.float16, ml_dtypes.bfloat16)
BITS = {4: np.uint32, 2: np.uint16}

# The words of a file that the foreign engine writes, byte by byte.
GOLDEN_LAYER = bytes.fromhex("41505254 03000000 04000000 0000803f 000000c0 000080ff 0100c07f")
GOLDEN_WHOLE = bytes.fromhex("41505254 ffffffff 01000000 00000080")
VALUES = np.frombuffer(bytes.fromhex("0000803f 000000c0 000080ff 0100c07f"), "<f4")


def to_bytes(array, layer):
    payload = aprt.payload(array)
    assert payload.flags.c_contiguous and payload.shape == array.shape
    return aprt.header(layer, array.size) + payload.tobytes()


def written(directory, content):
    path = directory / "ffn_up.bin"
    path.write_bytes(content)
    return path


def refusal(path, layer):
    with pytest.raises(UserError) as error:
        aprt.read(path, layer)
    message = str(error.value)
    assert len(message.splitlines()) == 1 and str(path) in message
    return message


def same_bits(a, b):
    assert a.dtype == b.dtype == np.float32
    np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32))


def test_golden_bytes():
    assert to_bytes(VALUES, 3) == GOLDEN_LAYER
    assert to_bytes(np.array([-0.0], np.float32), None) == GOLDEN_WHOLE


def test_golden_bytes_are_read(tmp_path):
    same_bits(aprt.read(written(tmp_path, GOLDEN_LAYER), 3), VALUES)
    whole = aprt.read(written(tmp_path, GOLDEN_WHOLE), None)
    same_bits(whole, np.array([-0.0], np.float32))


def test_nan_payloads_and_infinities_survive(tmp_path):
    quiet, signalling, negative = 0x7FC12345, 0x7F812345, 0xFFC00001
    words = np.array([quiet, signalling, negative, 0x7F800000, 0xFF800000, 1], "<u4")
    path = written(tmp_path, to_bytes(words.view("<f4"), 0))
    assert path.read_bytes()[12:] == words.tobytes()
    same_bits(aprt.read(path, 0), words.view(np.float32))


@pytest.mark.parametrize("view", ["transposed", "strided", "reversed", "broadcast", "big-endian"])
def test_values_go_in_c_order_whatever_lies_in_memory(tmp_path, view):
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    array = {
        "transposed": base.T,
        "strided": base[::2, 1::3],
        "reversed": base[::-1],
        "broadcast": np.broadcast_to(base[0], (3, 6)),
        "big-endian": base.astype(">f4"),
    }[view]
    found = aprt.read(written(tmp_path, to_bytes(array, 0)), 0)
    same_bits(found, np.array(array.tolist(), np.float32).reshape(-1))


def test_every_bfloat16_widens_exactly(tmp_path):
    halves = np.arange(2**16, dtype=np.uint16)
    found = aprt.read(written(tmp_path, to_bytes(halves.view(ml_dtypes.bfloat16), 0)), 0)
    same_bits(found, (halves.astype(np.uint32) << 16).view(np.float32))


def test_every_float16_widens_exactly(tmp_path):
    halves = np.arange(2**16, dtype=np.uint16)
    found = aprt.read(written(tmp_path, to_bytes(halves.view(np.float16), 0)), 0)
    expected = np.array(struct.unpack(f"<{halves.size}e", halves.tobytes()), np.float32)
    nan = (halves & 0x7FFF) > 0x7C00
    same_bits(found[~nan], expected[~nan])
    words, sources = found[nan].view(np.uint32), halves[nan].astype(np.uint32)
    quiet = 0x400000  # some processors set it while widening
    payload = (sources & 0x8000) << 16 | 0x7F800000 | (sources & 0x3FF) << 13
    np.testing.assert_array_equal(words | quiet, payload | quiet)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4), ()])
def test_empty_and_scalar_arrays(tmp_path, shape):
    array = np.zeros(shape, np.float32)
    path = written(tmp_path, to_bytes(array, None))
    assert path.stat().st_size == 12 + 4 * array.size
    assert aprt.read(path, None).shape == (array.size,)


@settings(deadline=None)
@given(
    data=st.data(),
    dtype=st.sampled_from(FLOATS),
    shape=array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=5),
    layer=st.none() | st.integers(0, 2**32 - 2),
)
def test_round_trip(tmp_path_factory, data, dtype, shape, layer):
    words = BITS[np.dtype(dtype).itemsize]
    array = data.draw(arrays(words, shape)).view(dtype)
    found = aprt.read(written(tmp_path_factory.getbasetemp(), to_bytes(array, layer)), layer)
    same_bits(found, np.array(array, np.float32).reshape(-1))


@pytest.mark.parametrize("dtype", ["float64", "int32", "complex64", "bool"])
def test_only_what_float32_holds_is_written(dtype):
    with pytest.raises(UserError, match=dtype):
        aprt.check(dtype, 2)


def test_more_values_than_the_header_counts():
    aprt.check("float32", 2**32 - 1)
    with pytest.raises(UserError, match="not 4294967296; use --format safetensors"):
        aprt.check("float32", 2**32)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not an APRT file"),
        (b"APR", "not an APRT file"),
        (b"TRPA" + GOLDEN_LAYER[4:], "b'TRPA'"),
        (b"version https://git-lfs.github.com", "b'vers'"),
        (GOLDEN_LAYER[:4], "4 bytes"),
        (GOLDEN_LAYER[:11], "11 bytes"),
        (GOLDEN_LAYER[:-4], "promises 4 values, 28 bytes"),
        (GOLDEN_LAYER[:-1], "27 bytes"),
        (GOLDEN_LAYER + b"\0", "29 bytes"),
        (GOLDEN_LAYER + b"\0\0\0\0", "32 bytes"),
        (struct.pack("<4sII", b"APRT", 3, 0xFFFFFFFF), "promises 4294967295 values"),
    ],
)
def test_files_that_are_not_whole(tmp_path, content, says):
    assert says in refusal(written(tmp_path, content), 3)


def test_a_file_of_another_layer(tmp_path):
    layer, whole = written(tmp_path, GOLDEN_LAYER), tmp_path / "whole.bin"
    whole.write_bytes(GOLDEN_WHOLE)
    assert "says layer 3, expected 2" in refusal(layer, 2)
    assert "says layer 3, expected 'whole model'" in refusal(layer, None)
    assert "says layer 'whole model', expected 3" in refusal(whole, 3)


def test_what_is_no_file(tmp_path):
    assert "No such file" in refusal(tmp_path / "absent.bin", 0)
    assert "no regular file" in refusal(tmp_path, 0)
