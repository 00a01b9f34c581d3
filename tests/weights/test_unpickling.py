# SPDX-License-Identifier: Apache-2.0
"""Pickles and torch files are read as data, in limited memory."""

import copyreg
import os
import pickle
import struct
import tracemalloc
import warnings
import zipfile

import numpy as np
import pytest

from contrastive.weights import published, unpickling
from tests.support import foreign
from tests.support.foreign import Reduced

_MIB = 2**20


def _write(tmp_path, content):
    path = tmp_path / "file.pkl"
    path.write_bytes(content)
    return str(path)


def _read(tmp_path, content):
    return unpickling.read_pickle(_write(tmp_path, content))


# --- what is data


def test_read_pickle_returns_arrays_by_place(tmp_path):
    arrays = {
        "a": [np.arange(6.0).reshape(2, 3), (np.float32(7), "text", None)],
        "b": {1: np.asfortranarray(np.ones((2, 3), np.int16)), "c": b"x"},
        "big endian": np.arange(3, dtype=">i4"),
        "none": np.ones((0, 3), bool),
    }
    arrays["again"] = arrays["b"][1]
    for protocol in (2, 3, 4, 5):
        found = _read(tmp_path, pickle.dumps(arrays, protocol))
        assert set(found) == {
            "a/0", "a/1/0", "b/1", "big endian", "none", "again",
        }  # fmt: skip
        np.testing.assert_array_equal(found["a/0"], arrays["a"][0])
        np.testing.assert_array_equal(found["b/1"], arrays["b"][1])
        np.testing.assert_array_equal(found["big endian"], [0, 1, 2])
        assert found["none"].shape == (0, 3)
        assert found["a/1/0"] == 7


def _torch_state():
    rng = np.random.default_rng(0)
    return {
        "a.weight": rng.normal(size=(3, 4, 2)).astype(np.float32),
        "a.bias": rng.normal(size=4).astype(np.float32),
        "steps": np.array(5),
    }


def test_read_torch_returns_arrays_by_name(tmp_path):
    path = str(tmp_path / "file.pth")
    state = _torch_state()
    foreign.write_torch(path, {"model": state})
    found = unpickling.read_torch(path)
    assert set(found) == {f"model/{name}" for name in state}
    for name, array in state.items():
        np.testing.assert_array_equal(found[f"model/{name}"], array)
        assert found[f"model/{name}"].dtype == array.dtype


def test_read_pickle_torch_before_1_6_is_named(tmp_path):
    legacy = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
    with pytest.raises(ValueError, match=r"before version 1\.6"):
        _read(tmp_path, legacy)


def test_read_missing_file_raises_os_error(tmp_path):
    for read in (unpickling.read_pickle, unpickling.read_torch):
        with pytest.raises(FileNotFoundError):
            read(str(tmp_path / "nowhere"))


# --- what would run


_COMMAND = "touch executed"
_TEXT = pickle.dumps(_COMMAND, 2)[2:-1]  # its opcodes alone
_SYSTEM = b"cposix\nsystem\n"
_EXTENSION = 0xF0  # what copyreg makes of it, while the test runs
# By the way they run a command.
_HOSTILE = {
    "REDUCE": pickle.dumps(Reduced(os.system, _COMMAND), 2),
    "REDUCE 4": pickle.dumps(Reduced(os.system, _COMMAND), 4),
    "REDUCE 0": pickle.dumps(Reduced(os.system, _COMMAND), 0),
    "nested": pickle.dumps({"a": [np.ones(3), {"b": (Reduced(os.system, _COMMAND),)}]}, 2),
    "eval": pickle.dumps(Reduced(eval, f"__import__('os').system({_COMMAND!r})"), 2),
    "INST": b"(S'touch executed'\nios\nsystem\n.",
    "OBJ": b"\x80\x02(" + _SYSTEM + _TEXT + b"o.",
    "NEWOBJ": b"\x80\x02" + _SYSTEM + _TEXT + b"\x85\x81.",
    "NEWOBJ_EX": b"\x80\x04" + _SYSTEM + _TEXT + b"\x85}\x92.",
    "EXT1": b"\x80\x02\x82" + bytes([_EXTENSION]) + _TEXT + b"\x85R.",
    # A class that was let in gets a __setstate__ that runs.
    "BUILD of a name": b"\x80\x02ccollections\nOrderedDict\nN}"
    + pickle.dumps("__setstate__", 2)[2:-1]
    + _SYSTEM
    + b"s\x86b0ccollections\nOrderedDict\n)R"
    + _TEXT
    + b"b.",
    "BUILD of an array": b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n)R"
    + _SYSTEM
    + _TEXT
    + b"\x85Rb.",
    "import": b"\x80\x02cdill._dill\n_import_module\n"
    + pickle.dumps("os.system", 2)[2:-1]
    + b"\x85R"
    + _TEXT
    + b"\x85R.",
    "array of calls": b"\x80\x02cdill._dill\n_create_array\n(" + _SYSTEM + _TEXT + b"\x85)NtR.",
    "dotted name": b"\x80\x04"
    + pickle.dumps("numpy", 4)[11:-2]
    + pickle.dumps("ndarray.__class__", 4)[11:-2]
    + b"\x93.",
    "another codec": b"\x80\x02c_codecs\nencode\n"
    + _TEXT
    + pickle.dumps("hex", 2)[2:-1]
    + b"\x86R.",
    "load": b"\x80\x02cnumpy\nload\n" + _TEXT + b"\x85R.",
    "persistent": b"\x80\x02" + _TEXT + b"Q.",
    "object array": pickle.dumps(np.array([Reduced(os.system, _COMMAND)], object), 2),
}


@pytest.mark.parametrize("way", _HOSTILE)
def test_read_hostile_pickle_executes_nothing(tmp_path, monkeypatch, way):
    monkeypatch.chdir(tmp_path)
    copyreg.add_extension("posix", "system", _EXTENSION)
    try:
        with pytest.raises(ValueError, match="Cannot read"):
            _read(tmp_path, _HOSTILE[way])
        path = str(tmp_path / "file.pth")
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", _HOSTILE[way])
        with pytest.raises(ValueError, match="Cannot read"):
            unpickling.read_torch(path)
    finally:
        copyreg.remove_extension("posix", "system", _EXTENSION)
    assert not (tmp_path / "executed").exists()


def test_read_pickle_refused_name_is_in_error(tmp_path):
    with pytest.raises(ValueError, match=r"'posix\.system'.*not one of"):
        _read(tmp_path, _HOSTILE["REDUCE"])


# --- damage


def _damaged(content, cases=300):
    """Yields truncated files, and files with some bytes changed."""
    rng = np.random.default_rng(0)
    for case in range(cases):
        damaged = bytearray(content)
        if case % 3 == 0:
            yield bytes(damaged[: rng.integers(len(content))])
            continue
        for _ in range(rng.integers(1, 4)):
            damaged[rng.integers(len(content))] = rng.integers(256)
        yield bytes(damaged)


def _small(array):
    """A pickle of little data and many opcodes: damage hits opcodes."""
    arrays = [array[:k] for k in range(4)]
    return {f"online_params/{i}/{k}": arrays for i in range(3) for k in "ab"}


@pytest.mark.parametrize("kind", ["protocol 2", "protocol 5", "torch"])
def test_read_damaged_file_raises_value_error(tmp_path, kind):
    path = str(tmp_path / "file")
    if kind == "torch":
        foreign.write_torch(path, _torch_state())
        with open(path, "rb") as file:
            content = file.read()
    else:
        content = pickle.dumps(_small(np.arange(4.0)), int(kind[-1]))
    read = unpickling.read_torch if kind == "torch" else unpickling.read_pickle
    outcomes = set()
    tracemalloc.start()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile's, of names met twice
        for damaged in _damaged(content):
            with open(path, "wb") as file:
                file.write(damaged)
            try:
                read(path)  # where only numbers or keys were hit
                outcomes.add("read")
            except ValueError:
                outcomes.add("refused")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert outcomes == {"refused", "read"}
    assert peak < 32 * _MIB


def test_identify_damaged_checkpoint_raises_value_error(tmp_path):
    content = (foreign.GOLDEN / "tiny_pretrain.pkl").read_bytes()
    for damaged in _damaged(content, 30):
        path = _write(tmp_path, damaged)
        try:
            published.identify(unpickling.read_pickle(path))
        except ValueError:
            continue


# --- memory


def _text(size):
    return b"X" + struct.pack("<I", size) + b"a" * size


_LATIN1 = b"X\x06\x00\x00\x00latin1"
_RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n)R"
_F4 = b"cnumpy\ndtype\nX\x02\x00\x00\x00f4\x85R"


def _long(number):
    return pickle.dumps(number, 2)[2:-1]


_BOMBS = {
    "LONG4": b"\x80\x02\x8b\xff\xff\xff\x7f1.",
    "BINBYTES": b"\x80\x03B\xff\xff\xff\xff1.",
    "BINBYTES8": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x0f1.",
    "BINUNICODE8": b"\x80\x04\x8d" + b"\xff" * 7 + b"\x0f1.",
    "BYTEARRAY8": b"\x80\x05\x96" + b"\xff" * 7 + b"\x0f1.",
    "LONG_BINPUT": b"\x80\x02Nr\xff\xff\xff\xffj\xff\xff\xff\xfe.",
    "shape": b"\x80\x02" + _RECONSTRUCT + b"(K\x01"
    + _long(10**9) + _long(10**9) + b"\x86" + _F4
    + b"\x89" + b"C\x041234" + b"tb.",
    "length of text": b"\x80\x02" + _RECONSTRUCT + b"(K\x01"
    + _long(2) + b"\x85" + _F4 + b"\x89" + b"C\x041234" + b"tb.",
    "type": b"\x80\x02cnumpy\ndtype\n" + _text(3) + b"\x85R.",
    "wide type": b"\x80\x02cnumpy\ndtype\nX\x0c\x00\x00\x00V99999999999\x85R.",
    "encoding again and again": b"\x80\x02" + _text(100_000) + _LATIN1
    + b"\x86q\x000c_codecs\nencode\nq\x010(" + b"h\x01h\x00R" * 5000 + b"l.",
    "doubling": b"\x80\x02](K\x01e" + b"2\x86" * 100 + b".",
    "shared dictionaries": b"\x80\x02}q\x00"
    + b"".join(
        b"}(K\x01h%cK\x02h%cuq%c" % (i, i, i + 1) for i in range(30)
    ) + b".",
    "within itself": b"\x80\x02]q\x00h\x00ah\x00a.",
    "deep lists": b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
    "deep tuples as a key": b"\x80\x02})" + b"\x85" * 200_000 + b"Ns.",
    "marks": b"\x80\x02" + b"(" * 300_000 + b".",
    "opcodes": b"\x80\x02" + b"N0" * 600_000 + b"N.",
    "named tuples": b"\x80\x02cdill._dill\n_create_namedtuple\n("
    + _text(3) + b"(" + b"K\x01" * 30_000 + b"tq\x00NtRq\x01h\x00Rq\x020("
    + b"h\x01h\x00R" * 30_000 + b"l.",
}  # fmt: skip


@pytest.mark.parametrize("bomb", _BOMBS)
def test_read_pickle_declared_sizes_take_no_memory(tmp_path, bomb):
    path = _write(tmp_path, _BOMBS[bomb])
    tracemalloc.start()
    with pytest.raises(ValueError, match="Cannot read"):
        unpickling.read_pickle(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Small things, such as containers, are some 100 bytes where an opcode is 1.
    assert peak < 8 * _MIB + 256 * os.path.getsize(path)


# --- zip files


def _rewrite(path, change):
    """Writes the entries of a zip file again, changed."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    change(entries)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def _move(entries, root):
    for name in list(entries):
        entries[name.replace("archive/", root)] = entries.pop(name)


@pytest.mark.parametrize(
    "change",
    [
        lambda entries: entries.pop("archive/data/0"),
        lambda entries: entries.pop("archive/data.pkl"),
        lambda entries: entries.update({"archive/data/0": b"1234"}),
        lambda entries: entries.update({"archive/byteorder": b"middle"}),
        lambda entries: entries.update({"other/data.pkl": b""}),
        lambda entries: entries.update(
            {
                "archive/data.pkl": entries["archive/data.pkl"].replace(
                    b"FloatStorage", b"QuantStorage"
                )
            }
        ),
        lambda entries: entries.update(
            {
                "archive/data.pkl": entries["archive/data.pkl"].replace(
                    b"X\x01\x00\x00\x000", b"X\x08\x00\x00\x00../../..", 1
                )
            }
        ),
        lambda entries: _move(entries, "../../"),
        lambda entries: _move(entries, "/etc/"),
    ],
)
def test_read_torch_other_zip_file_raises(tmp_path, change):
    path = str(tmp_path / "file.pth")
    foreign.write_torch(path, _torch_state())
    unpickling.read_torch(path)
    _rewrite(path, change)
    with pytest.raises(ValueError, match="Cannot read"):
        unpickling.read_torch(path)
    assert {p.name for p in tmp_path.iterdir()} == {"file.pth"}


def test_read_torch_compressed_file_is_not_read(tmp_path):
    path = str(tmp_path / "file.pth")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 64 * _MIB)
    tracemalloc.start()
    with pytest.raises(ValueError, match="compressed"):
        unpickling.read_torch(path)
    assert tracemalloc.get_traced_memory()[1] < 4 * _MIB
    tracemalloc.stop()


def test_read_torch_overlapping_entries_raises(tmp_path):
    path = tmp_path / "file.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\0" * _MIB)
        entry = archive.infolist()[0]
        for copy in range(9):
            another = zipfile.ZipInfo(f"archive/data/{copy}")
            for name in ("header_offset", "CRC", "compress_size", "file_size"):
                setattr(another, name, getattr(entry, name))
            archive.filelist.append(another)
    with pytest.raises(ValueError, match="larger than the file"):
        unpickling.read_torch(str(path))


@pytest.mark.parametrize(
    ("sizes", "strides", "offset"),
    [
        ((10**6, 10**6), (0, 0), 0),
        ((4,), (1,), 21),
        ((2, 3), (30, 1), 0),
        ((4,), (-1,), 3),
        ((-4,), (1,), 0),
        ((4,), (1,), -1),
        ((4, 4), (1,), 0),
    ],
)
def test_tensor_outside_its_storage_raises(sizes, strides, offset):
    storage = np.arange(24.0)
    with pytest.raises(ValueError, match="tensor|argument"):
        unpickling._tensor(storage, offset, sizes, strides)


def test_tensor_is_a_view_by_its_strides():
    storage = np.arange(24.0)
    tensor = unpickling._tensor(storage, 2, (3, 4), (1, 3), False, {})
    np.testing.assert_array_equal(tensor.value, storage[2:14].reshape(4, 3).T)
