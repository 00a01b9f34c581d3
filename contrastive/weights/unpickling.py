# SPDX-License-Identifier: Apache-2.0
"""Reading of pickles and torch files as data; nothing in them is executed.

A pickle is a program that may call any function. It is interpreted here by a machine that knows
containers, numbers, text and a short list of names, and refuses every other name and opcode. Each
name stands for a function of this module, so jax, haiku, dill and torch are not needed. Memory
stays within a small multiple of the size of the file, whatever sizes the file declares.
"""

import contextlib
import dataclasses
import functools
import io
import itertools
import math
import mmap
import pickletools
import re
import zipfile
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np

_MAX_DEPTH = 32
_MAX_NODES = 200_000
_MAX_OPCODES = 1_000_000  # a ResNet-200 with its optimizer has 100,000
_LEGACY_TORCH = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")
_TORCH_DTYPES = {
    "torch.DoubleStorage": np.float64,
    "torch.FloatStorage": np.float32,
    "torch.HalfStorage": np.float16,
    "torch.BFloat16Storage": ml_dtypes.bfloat16,
    "torch.LongStorage": np.int64,
    "torch.IntStorage": np.int32,
    "torch.ShortStorage": np.int16,
    "torch.CharStorage": np.int8,
    "torch.ByteStorage": np.uint8,
    "torch.BoolStorage": np.bool_,
}
# The names of the same thing in the versions of a library.
_SAME_MODULES = {
    r"^__builtin__$": "builtins",
    r"^numpy\._?core\.": "numpy.",
    r"^dill\._?dill$": "dill",
    r"^haiku\._src\.data_structures$": "haiku",
    r"^jax\._src\.(array|device_array)$|^jax\.interpreters\.xla$": "jax",
}
_NOT_CALLED = {"numpy.ndarray", "ml_dtypes.bfloat16", *_TORCH_DTYPES}
_NUMBERS = re.compile(r"[<>=|]?([biufc]\d{1,2}|\?)")
_BYOL_STATE = (
    *("online_params", "target_params", "online_state", "target_state"),
    "opt_state",
)


def read_pickle(path: str) -> dict[str, np.ndarray]:
    """Returns the arrays in a local pickle, such as DeepMind's checkpoints.

    Returns:
        The arrays by their place: the keys of the dictionaries, the fields of the named tuples and
        the positions in lists around them, joined by "/". jax arrays are numpy arrays. Memory
        belongs to the pickle: copy to write.

    Raises:
        ValueError: if the pickle holds or names anything but data, or is damaged.
        OSError: if there is no such file.
    """
    with _opened(path) as stream:
        if stream[: len(_LEGACY_TORCH)] == _LEGACY_TORCH:
            raise ValueError(
                "it is a torch file of the time before version 1.6. "
                "torch.save(torch.load(old), new) with a newer torch converts "
                "it."
            )
        return _arrays(_Machine(len(stream)).run(stream))


def read_torch(path: str) -> dict[str, np.ndarray]:
    """Returns the tensors in a file of `torch.save`, of version 1.6 or later.

    The result and the errors are those of `read_pickle`. A whole module is
    refused: it names its classes, where a state dictionary does not.
    """
    with _opened(path) as stream, zipfile.ZipFile(stream) as archive:
        size, entries = len(stream), archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("it is compressed, which torch's files are not.")
        if sum(entry.file_size for entry in entries) > size:
            raise ValueError("its entries are larger than the file.")
        roots = [
            name.removesuffix("data.pkl")
            for name in archive.namelist()
            if re.fullmatch(r"[^/]+/data\.pkl", name)
        ]
        if len(roots) != 1:
            raise ValueError("it is not a file of torch.save.")
        order = "<"
        if f"{roots[0]}byteorder" in archive.namelist():
            word = archive.read(f"{roots[0]}byteorder")
            order = {b"little": "<", b"big": ">"}[word]

        @functools.cache
        def load(storage: str, key: str) -> np.ndarray:
            dtype = np.dtype(_TORCH_DTYPES[storage]).newbyteorder(order)
            return np.frombuffer(archive.read(f"{roots[0]}data/{key}"), dtype)

        program = archive.read(f"{roots[0]}data.pkl")
        return _arrays(_Machine(size, load).run(io.BytesIO(program)))


class _Map(mmap.mmap):
    """A file that takes no memory for more than it holds, unlike Python's."""

    def seekable(self) -> bool:
        return True


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Any]:
    """Opens a file; all errors of its content become ValueError."""
    try:
        with open(path, "rb") as file:
            stream = _Map(file.fileno(), 0, access=mmap.ACCESS_READ)
        with stream:
            yield stream
    except OSError:
        raise
    except ValueError as error:
        raise ValueError(f"Cannot read {path}: {error}") from error
    except Exception as error:
        raise ValueError(f"Cannot read {path}: it is damaged ({error!r:.200}).") from error


def _arrays(tree: Any) -> dict[str, np.ndarray]:
    """Returns the arrays in nested containers, by their joined keys."""
    found: dict[str, np.ndarray] = {}
    waiting: list[tuple[tuple[Any, ...], Any]] = [((), tree)]
    # What is shared counts as often as it is met: 2**n times in a pickle of n.
    for _ in range(_MAX_NODES):
        if not waiting:
            return found
        keys, node = waiting.pop()
        items: Collection[tuple[Any, Any]] = ()
        if isinstance(node, _Array) and node.value is not None:
            found["/".join(map(str, keys))] = node.value
        elif isinstance(node, dict):
            items = node.items()
        elif isinstance(node, list | tuple):
            items = list(enumerate(node))
        if items and len(keys) == _MAX_DEPTH:
            raise ValueError(f"it nests more than {_MAX_DEPTH} containers.")
        waiting += [((*keys, key), item) for key, item in items]
    raise ValueError(f"its containers hold more than {_MAX_NODES} things.")


@dataclasses.dataclass(frozen=True, slots=True)
class _Name:
    """A name in a pickle, and the function of ours that is called for it."""

    name: str
    function: Callable[..., Any] | None = None


@dataclasses.dataclass(slots=True, eq=False)
class _Array:
    """An array whose content a later opcode may bring."""

    value: np.ndarray | None = None

    def fill(self, state: Sequence[Any]) -> "_Array":
        """Sets the content, which must be as long as its shape says."""
        _, shape, dtype, is_fortran, content = state
        self.value = np.frombuffer(content, dtype.value).reshape(
            shape, order="F" if is_fortran else "C"
        )
        return self


@dataclasses.dataclass(slots=True, eq=False)
class _DType:
    """A type of numbers whose byte order a later opcode may bring."""

    value: np.dtype


def _apply(target: Any, arguments: Sequence[Any]) -> Any:
    if not isinstance(target, _Name) or not target.function:
        raise ValueError("it calls what is no function.")
    return target.function(*arguments)


def _update(items: list[Any], target: Any) -> Any:
    keys = items[::2]
    if type(target) is not dict:
        raise ValueError("it sets items of what is no dictionary.")
    # The hash of nested tuples is a recursion without a limit.
    if not all(isinstance(key, str | bytes | int | float) for key in keys):
        raise ValueError("a key is neither text nor a number.")
    target.update(zip(keys, items[1::2], strict=True))
    return target


def _dtype(code: Any, *_: Any) -> _DType:
    """Returns a type of numbers; never of Python objects."""
    if isinstance(code, _Name) and code.name == "ml_dtypes.bfloat16":
        return _DType(np.dtype(ml_dtypes.bfloat16))
    if not isinstance(code, str) or not _NUMBERS.fullmatch(code):
        raise ValueError(f"an array is of {code!r:.40}, not of numbers.")
    return _DType(np.dtype(code))


def _rebuilt(function: Any, arguments: Any, state: Any, *_: Any) -> _Array:
    """Returns an array from the parts of its pickle that its library took."""
    array = _apply(function, arguments)
    if not isinstance(array, _Array):
        raise ValueError("it fills what is no array.")
    return array.fill(state)


def _tensor(
    storage: np.ndarray,
    offset: int,
    sizes: Sequence[int],
    strides: Sequence[int],
    *_: Any,
) -> _Array:
    """Returns a view of a storage; strides of 0 could declare any size."""
    if not all(isinstance(n, int) and n >= 0 for n in (offset, *sizes)):
        raise ValueError(f"a tensor has the sizes {sizes!r:.80}.")
    last = sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
    inside = offset + last < len(storage) and min(strides, default=0) >= 0
    if math.prod(sizes) and (not inside or math.prod(sizes) > len(storage)):
        raise ValueError(f"a tensor of {sizes!r:.80} exceeds its storage.")
    steps = [step * storage.itemsize for step in strides]
    view = np.lib.stride_tricks.as_strided
    return _Array(view(storage[offset:], sizes, steps, writeable=False))


# `collections.OrderedDict` and records must be empty or not copied: a copy of an object in the memo
# could be asked for again and again.
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "builtins.bytes": lambda: b"",
    "numpy.dtype": _dtype,
    "numpy.multiarray._reconstruct": lambda *_: _Array(),
    "numpy.multiarray.scalar": lambda dtype, content: _Array(
        np.frombuffer(content, dtype.value, 1).reshape(())
    ),
    "numpy.numeric._frombuffer": lambda content, dtype, shape, order: _Array().fill(
        (1, shape, dtype, order == "F", content)
    ),
    "dill._create_array": _rebuilt,
    "jax._reconstruct_array": _rebuilt,
    "jax.reconstruct_device_array": _rebuilt,
    "haiku.FlatMapping": lambda mapping: mapping,
    "haiku.FlatMap": lambda mapping: mapping,
    "haiku.frozendict": lambda mapping: mapping,
    "byol.byol_experiment._ByolExperimentState": lambda *values: dict(
        zip(_BYOL_STATE, values, strict=True)
    ),
    "collections.OrderedDict": lambda: {},
    "argparse.Namespace": lambda: {},
    "torch.Size": lambda sizes: sizes,
    "torch.device": lambda *_: None,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
}


class _Machine:
    """Interprets the opcodes of one pickle in memory limited by its `size`."""

    def __init__(
        self,
        size: int,
        load_storage: Callable[[str, str], np.ndarray] | None = None,
    ) -> None:
        self._left = size + _MAX_OPCODES  # bytes that calls may still take
        # Gives the numbers of a torch storage by the name of its type and key.
        self._load_storage = load_storage
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # stacks below the marks
        self._memo: dict[int, Any] = {}
        self._functions = _FUNCTIONS | {
            "_codecs.encode": self._encode,
            "dill._create_namedtuple": self._named_tuple,
        }
        push, pop, since_mark = self._push, self._pop, self._since_mark
        # By opcodes, separated by spaces; the argument of NONE is None.
        actions: dict[str, Callable[[Any], Any]] = {
            "BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT NONE": push,
            "BINUNICODE SHORT_BINUNICODE BINUNICODE8 BYTEARRAY8": push,
            "BINBYTES SHORT_BINBYTES BINBYTES8": push,
            "NEWTRUE": lambda _: push(True),
            "NEWFALSE": lambda _: push(False),
            "PROTO FRAME": lambda _: None,
            "MARK": self._mark,
            "POP": lambda _: self._stack.pop(),
            "POP_MARK": lambda _: since_mark(),
            "EMPTY_DICT": lambda _: push({}),
            "EMPTY_LIST EMPTY_SET": lambda _: push([]),
            "EMPTY_TUPLE": lambda _: push(()),
            "TUPLE1": lambda _: push(tuple(pop(1))),
            "TUPLE2": lambda _: push(tuple(pop(2))),
            "TUPLE3": lambda _: push(tuple(pop(3))),
            "TUPLE": lambda _: push(tuple(since_mark())),
            "LIST FROZENSET": lambda _: push(since_mark()),
            "DICT": lambda _: push(_update(since_mark(), {})),
            "APPEND": lambda _: self._extend([self._stack.pop()]),
            "APPENDS ADDITEMS": lambda _: self._extend(since_mark()),
            "SETITEM": lambda _: _update(pop(2), self._stack[-1]),
            "SETITEMS": lambda _: _update(since_mark(), self._stack[-1]),
            "BINPUT LONG_BINPUT": self._put,
            "MEMOIZE": lambda _: self._put(len(self._memo)),
            "BINGET LONG_BINGET": lambda key: push(self._memo[key]),
            "GLOBAL": lambda name: push(self._find(*name.split(" ", 1))),
            "STACK_GLOBAL": lambda _: push(self._find(*pop(2))),
            "REDUCE NEWOBJ": lambda _: push(_apply(*pop(2))),
            "BUILD": self._build,
            "BINPERSID": self._storage,
        }
        self._actions = {
            opcode: action for opcodes, action in actions.items() for opcode in opcodes.split()
        }

    def run(self, stream: Any) -> Any:
        """Returns the object that the pickle describes."""
        opcodes = pickletools.genops(stream)
        for opcode, argument, _ in itertools.islice(opcodes, _MAX_OPCODES):
            if opcode.name == "STOP":
                return self._stack.pop()
            if opcode.name not in self._actions:
                raise ValueError(
                    f"its opcode {opcode.name} is not one of those that data "
                    "needs (protocol 2 or later). Nothing was executed."
                )
            self._actions[opcode.name](argument)
        raise ValueError(f"it has more than {_MAX_OPCODES} opcodes.")

    def _push(self, item: Any) -> None:
        self._stack.append(item)

    def _pop(self, count: int) -> list[Any]:
        if count > len(self._stack):
            raise ValueError("it takes more from its stack than is there.")
        items = self._stack[-count:]
        del self._stack[-count:]
        return items

    def _mark(self, _: None) -> None:
        self._below.append(self._stack)
        self._stack = []

    def _since_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._below.pop()
        return items

    def _put(self, key: int) -> None:
        self._memo[key] = self._stack[-1]

    def _extend(self, items: list[Any]) -> None:
        if type(self._stack[-1]) is not list:
            raise ValueError("it appends to what is no list.")
        self._stack[-1].extend(items)

    def _find(self, module: str, name: str) -> _Name:
        for pattern, short in _SAME_MODULES.items():
            module = re.sub(pattern, short, module)
        full = f"{module}.{name}"
        if full in self._functions or full in _NOT_CALLED:
            return _Name(full, self._functions.get(full))
        raise ValueError(
            f"it names {full!r:.200}, which is not one of the few names that "
            "stand for data. Nothing was executed. Of a torch module, save the "
            "state_dict()."
        )

    def _build(self, _: None) -> None:
        state = self._stack.pop()
        target = self._stack[-1]
        if isinstance(target, _Array):
            target.fill(state)
        elif isinstance(target, _DType):
            target.value = target.value.newbyteorder(state[1])
        # The state of dictionaries and records is not an array.
        elif not isinstance(target, dict):
            raise ValueError("it changes what is neither array nor record.")

    def _storage(self, _: None) -> None:
        kind, dtype, key, _device, count = self._stack.pop()
        if kind != "storage" or self._load_storage is None:
            raise ValueError("it refers to what is outside of it.")
        numbers = self._load_storage(dtype.name, key)
        if count != len(numbers):
            raise ValueError(f"storage {key!r:.20} has {len(numbers)} numbers, not {count}.")
        self._push(numbers)

    def _spend(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            raise ValueError("it makes more than the file holds.")

    def _encode(self, text: str, encoding: str) -> bytes:
        """Returns the bytes that protocol 2 writes as text."""
        if encoding != "latin1":
            raise ValueError(f"it encodes as {encoding!r:.20}.")
        self._spend(len(text))
        return text.encode("latin1")

    def _named_tuple(self, name: str, fields: Sequence[str], *_: Any) -> _Name:
        def record(*values: Any) -> dict[str, Any]:
            self._spend(len(values))
            return dict(zip(fields, values, strict=True))

        return _Name(name, record)
