"""safetensors files: written and read as the library does, and everything malformed refused with its name."""

import json
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from conftest import SAME_PACKAGE
from hypothesis import given, settings
from hypothesis import strategies as st

from entrenar.formats import FormatError
from entrenar.formats.safetensors import DTYPES, SafeTensors, numpy_dtype, read_header, save

RNG = np.random.default_rng(0)
KINDS = {
    "float32": RNG.standard_normal((3, 5), dtype=np.float32),
    "float64": RNG.standard_normal((2, 1, 4)),
    "float16": RNG.standard_normal(7).astype(np.float16),
    "bfloat16": RNG.standard_normal((5, 3)).astype(ml_dtypes.bfloat16),
    "int64": np.array([-(2**63), 2**63 - 1]),
    "uint8": np.arange(5, dtype=np.uint8),
    "bool": np.array([[True, False, True]]),
    "scalar": np.array(3.5, np.float32),
    "empty": np.zeros((0, 4), np.float32),
    "transposed": RNG.standard_normal((700, 600)).astype(np.float32).T,
    "every other, backwards": RNG.standard_normal((6, 8))[::2, ::-1],
    "big-endian": np.arange(6, dtype=">i4").reshape(2, 3),
    "no name's space é": np.ones((1, 1), np.uint16),
}


def bits(array):
    return np.ascontiguousarray(array).tobytes()


def lie(path, header, data=b"", *, length=None, pad=b""):
    """A file with any header: an object, or raw bytes."""
    raw = (header if isinstance(header, bytes) else json.dumps(header).encode()) + pad
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def tensor(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)} | more


# What is written and read


def test_the_library_reads_what_is_written_here(tmp_path):
    save(tmp_path / "a.safetensors", KINDS, {"format": "pt", "é": "ü"})
    theirs = safetensors.numpy.load_file(tmp_path / "a.safetensors")
    assert theirs.keys() == KINDS.keys()
    for name, array in KINDS.items():
        assert theirs[name].dtype == array.dtype.newbyteorder("=") and theirs[name].shape == array.shape, name
        assert bits(theirs[name]) == bits(array.astype(array.dtype.newbyteorder("<"))), name


def test_what_the_library_writes_is_read_here(tmp_path):
    whole = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in KINDS.items()}
    safetensors.numpy.save_file(whole, tmp_path / "a.safetensors", metadata={"format": "pt"})
    with SafeTensors(tmp_path / "a.safetensors") as file:
        assert file.keys() == KINDS.keys() and file.metadata == {"format": "pt"} and len(file) == len(KINDS)
        for name, array in KINDS.items():
            np.testing.assert_array_equal(file[name], array, err_msg=name)
            assert file[name].shape == array.shape and not file[name].flags.writeable


def test_the_bytes_are_the_library_s_own(tmp_path):
    arrays = {f"layer.{i}": RNG.standard_normal((i, 3)).astype(np.float32) for i in (3, 1, 2, 10)}
    save(tmp_path / "ours", arrays, {"format": "pt"})
    safetensors.numpy.save_file(arrays, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@given(st.dictionaries(st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), max_size=8),
                       st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=4)),
                       max_size=6))  # fmt: skip
def test_any_arrays_survive(tmp_path_factory, described):
    path = tmp_path_factory.mktemp("any") / "a.safetensors"
    arrays = {name: RNG.integers(0, 2, shape).astype(numpy_dtype(word)) for name, (word, shape) in described.items()}
    save(path, arrays)
    with SafeTensors(path) as file:
        assert {n: (e.dtype, list(e.shape)) for n, e in file.entries.items()} == described
        for name, array in arrays.items():
            np.testing.assert_array_equal(file[name], array)


def test_floats_are_converted_on_the_way_and_nothing_else(tmp_path):
    arrays = {"w": RNG.standard_normal((1000, 600)), "i": np.arange(3), "b": np.ones(2, ml_dtypes.bfloat16)}
    save(tmp_path / "a", arrays, dtype="BF16")
    with SafeTensors(tmp_path / "a") as file:
        assert {name: entry.dtype for name, entry in file.entries.items()} == {"w": "BF16", "i": "I64", "b": "BF16"}
        np.testing.assert_array_equal(file["w"], arrays["w"].astype(ml_dtypes.bfloat16))
        np.testing.assert_array_equal(file["i"], arrays["i"])


def test_a_number_too_big_for_its_new_type_is_refused_and_nothing_is_left(tmp_path):
    with pytest.raises(ValueError, match="safetensors: big has 70000, too big for float16"):
        save(tmp_path / "a", {"fine": np.ones(3), "big": np.array([1, 7e4, np.inf])}, dtype="F16")
    assert list(tmp_path.iterdir()) == []
    save(tmp_path / "a", {"inf": np.array([np.inf, np.nan], np.float32)}, dtype="F16")  # they were so before
    np.testing.assert_array_equal(SafeTensors(tmp_path / "a")["inf"], [np.inf, np.nan])


def test_types_and_names_that_the_format_does_not_have_are_refused(tmp_path):
    with pytest.raises(ValueError, match="has no type for complex64"):
        save(tmp_path / "a", {"w": np.zeros(2, np.complex64)})
    with pytest.raises(ValueError, match="cannot be called '__metadata__'"):
        save(tmp_path / "a", {"__metadata__": np.zeros(2)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_an_oserror(tmp_path):
    (tmp_path / "a").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        save(tmp_path / "a", {"w": np.zeros(10**6, np.float32)})


def test_views_are_of_the_mapped_file_and_outlive_it(tmp_path):
    save(tmp_path / "a", {"w": np.arange(10, dtype=np.float32)})
    with SafeTensors(tmp_path / "a") as file:
        view = file["w"]
        file.release("w")
        with pytest.raises(KeyError):
            file["v"]
    np.testing.assert_array_equal(view, np.arange(10))
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1


def test_misaligned_arrays_are_handed_out_aligned(tmp_path):
    data = b"\1" + np.array([1.5, -2], "<f4").tobytes()
    path = lie(tmp_path / "a", {"b": tensor("U8", (1,), (0, 1)), "w": tensor("F32", (2,), (1, 9))}, data, pad=b" ")
    array = SafeTensors(path)["w"]
    assert array.flags.aligned and array.tolist() == [1.5, -2]


@pytest.mark.parametrize("dtype", [None, "BF16"])
def test_saving_makes_no_copy_of_an_array(tmp_path, dtype):
    code = f"""
import numpy as np
from entrenar.formats.safetensors import save
from entrenar.training.machine import memory_peak
arrays = {{"a": np.ones(20_000_000, np.float32), "b": np.ones((5000, 2000), np.float32).T}}
save({str(tmp_path / "a")!r}, {{"warm": arrays["a"][:10]}}, dtype={dtype!r})
before = memory_peak()
save({str(tmp_path / "a")!r}, arrays, dtype={dtype!r})
after = memory_peak()
copy = arrays["b"].copy()
print(after - before, memory_peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=SAME_PACKAGE)
    saving, copying = map(int, done.stdout.split())
    assert saving < 8 * 2**20 < 32 * 2**20 < copying  # the arrays have 80 and 40 MB; the control sees a copy of one


# What is refused

DATA = bytes(8)
META = "__metadata__"
REFUSED = {
    "dtype unknown": ({"w": tensor("F4")}, DATA, "tensor 'w': dtype = 'F4': not read here; wanted one of F64,"),
    "dtype no text": ({"w": tensor(dtype=["F32"])}, DATA, "dtype = ['F32']: not read here"),
    "shape negative": ({"w": tensor(shape=(-2,))}, DATA, "shape = [-2]: wanted a list of whole numbers"),
    "shape of floats": ({"w": tensor(shape=(2.0,))}, DATA, "shape = [2.0]: wanted"),
    "shape of truth values": ({"w": tensor(shape=(True, 2))}, DATA, "shape = [True, 2]: wanted"),
    "shape overflows": ({"w": tensor(shape=(2**62, 2**62, 2))}, DATA, "multiplies to more than any file can hold"),
    "shape wraps round to fit": ({"w": tensor(shape=(2**62 + 2,))}, DATA, "multiplies to more than any file can hold"),
    "empty, and overflows": ({"w": tensor(), "v": tensor(shape=(0, 2**62, 2**62), offsets=(8, 8))}, DATA,
                             "multiplies to more than any file can hold"),
    "dimensions": ({"w": tensor(shape=(2,) + (1,) * 64)}, DATA, "has 65 dimensions; at most 64 are read"),
    "shape too big": ({"w": tensor(shape=(3,))}, DATA, "has 8 bytes; F32 of shape [3] has 12"),
    "shape too small": ({"w": tensor(shape=(1,))}, DATA, "has 8 bytes; F32 of shape [1] has 4"),
    "shape no list": ({"w": tensor() | {"shape": 2}}, DATA, "shape = 2: wanted a list"),
    "offsets backwards": ({"w": tensor(offsets=(8, 0))}, DATA, "data_offsets = [8, 0]: wanted begin <= end <= 8"),
    "offsets negative": ({"w": tensor(offsets=(-8, 0))}, DATA, "data_offsets = [-8, 0]: wanted [begin, end]"),
    "offsets behind the end": ({"w": tensor(offsets=(0, 2**63 - 1))}, DATA, "wanted begin <= end <= 8, where the file"),
    "offsets of 2^64": ({"w": tensor(offsets=(0, 2**64))}, DATA, "wanted [begin, end], whole numbers"),
    "three offsets": ({"w": tensor(offsets=(0, 8, 8))}, DATA, "wanted [begin, end]"),
    "overlap": ({"v": tensor(), "w": tensor(offsets=(4, 12))}, bytes(12), "'w' overlaps tensor 'v'"),
    "the same bytes twice": ({"v": tensor(), "w": tensor()}, DATA, "overlaps tensor"),
    "a hole": ({"w": tensor(offsets=(4, 12))}, bytes(12), "'w' begins 4 bytes after the end of the header"),
    "bytes left over": ({"w": tensor()}, bytes(9), "1 bytes follow the last tensor"),
    "bytes and no tensor": ({}, DATA, "8 bytes follow the last tensor"),
    "cut short": ({"w": tensor()}, bytes(7), "wanted begin <= end <= 7"),
    "a field too few": ({"w": {"dtype": "F32", "shape": [2]}}, DATA, "wanted dtype, shape and data_offsets"),
    "a field too many": ({"w": tensor(stride=1)}, DATA, "wanted dtype, shape and data_offsets"),
    "a tensor that is a number": ({"w": 3}, DATA, "tensor 'w': is described by 3"),
    "a name of control characters": ({"w\0\x1b[2J": tensor()}, DATA, r"'w\x00\x1b[2J': its name cannot be printed"),
    "metadata of numbers": ({META: {"a": 1}, "w": tensor()}, DATA, "__metadata__ = {'a': 1}: wanted texts by name"),
    "metadata a list": ({META: [], "w": tensor()}, DATA, "__metadata__ = []: wanted"),
    "a list": ([tensor()], DATA, "the header begins with b'[', wanted '{'"),
    "a space first": (b' {"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', DATA, "begins with b' ', wanted '{'"),
    "a name twice": (b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"w":{"dtype":"F32","shape":[2],'
                     b'"data_offsets":[0,8]}}', DATA, "header line 1 column 55: the key 'w' is there twice"),
    "deep": (b'{"w":' + b"[" * 10**5, DATA, "nested more than 100 deep"),
    "no UTF-8": (b'{"\xff":0}', DATA, "byte 2 (0xff) is not UTF-8"),
    "no JSON": (b"{" * 9, DATA, "is not JSON"),
    "an endless number": (b'{"w":{"dtype":"F32","shape":[' + b"9" * 10**6 + b'],"data_offsets":[0,8]}}', DATA,
                          "an integer of 1000000 digits"),
}  # fmt: skip


@pytest.mark.parametrize("header, data, message", REFUSED.values(), ids=REFUSED.keys())
def test_a_malformed_header_is_refused_by_name(tmp_path, header, data, message):
    path = lie(tmp_path / "bad.safetensors", header, data)
    for read in (read_header, SafeTensors):
        with pytest.raises(FormatError) as error:
            read(path)
        assert "bad.safetensors" in str(error.value) and message in str(error.value)


def test_the_control_of_these_cases_is_read(tmp_path):
    path = lie(tmp_path / "a", {"v": tensor(shape=(0, 5), offsets=(8, 8)), "w": tensor()}, DATA)
    assert read_header(path).entries.keys() == {"v", "w"}
    assert read_header(lie(tmp_path / "b", {})).entries == {}


def test_a_header_s_length_is_checked_before_it_is_believed(tmp_path):
    cases = {10**8 + 1: "claims a header of 100,000,001 bytes", 2**64 - 1: "is it a safetensors file?",
             1000: "claims a header of 1,000 bytes but has", 0: "the header begins with b''"}  # fmt: skip
    for length, message in cases.items():
        with pytest.raises(FormatError) as error:
            read_header(lie(tmp_path / "a", {"w": tensor()}, DATA, length=length))
        assert message in str(error.value)


def test_a_file_cut_off_anywhere_is_refused(tmp_path):
    save(tmp_path / "whole", {"v": np.arange(3.0), "w": np.ones((2, 2), np.float32)}, {"format": "pt"})
    whole = (tmp_path / "whole").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(FormatError):
            SafeTensors(tmp_path / "cut")
    with pytest.raises(FormatError):
        SafeTensors(tmp_path)
    with pytest.raises(FileNotFoundError):
        SafeTensors(tmp_path / "none")


@settings(max_examples=100)
@given(st.data())
def test_what_is_accepted_of_a_scrambled_file_the_library_accepts_too(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "scrambled.safetensors"
    save(path, {"v": np.arange(3.0), "w": np.ones((2, 2), np.float32)}, {"format": "pt"})
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        byte = data.draw(st.sampled_from(b'{}[]",:0129 -FBI') | st.integers(0, 255))
        raw[data.draw(st.integers(0, len(raw) - 1))] = byte
    path.write_bytes(raw)
    try:
        with SafeTensors(path) as file:
            read = {name: file[name].tobytes() for name in file}
    except FormatError:
        return
    theirs = safetensors.numpy.load(bytes(raw))
    assert {name: array.tobytes() for name, array in theirs.items()} == read
