# SPDX-License-Identifier: Apache-2.0
"""Files as other programs write them, made without those programs."""

import contextlib
import json
import pathlib
import pickle
import sys
import types
import zipfile
import zlib

import numpy as np

GOLDEN = pathlib.Path(__file__).resolve().parents[1] / "golden"


# --- DeepMind's checkpoints


def haiku_trees(network):
    """Returns parameters and state of a golden network, by module and name.

    A number is determined by the names of its network, module and tensor.
    """
    manifest = json.loads((GOLDEN / "relicv2_shapes.json").read_text())[network]

    def random(module, name):
        key = f"{network}|{module}|{name}".encode()
        return np.random.RandomState(zlib.crc32(key) & 0x7FFFFFFF)

    def parameter(module, name, shape):
        rng = random(module, name)
        if name == "w":
            spread = np.sqrt(2.0 / np.prod(shape[:-1]))
            return rng.standard_normal(shape) * spread
        if name == "offset":
            return rng.standard_normal(shape) * 0.2
        if module.endswith("batchnorm_2" if bottleneck else "batchnorm_1"):
            return rng.uniform(0.2, 0.5, shape)
        if module.endswith("shortcut_batchnorm"):
            return rng.uniform(0.6, 1.0, shape)
        return rng.uniform(0.5, 1.5, shape)

    def moving_average(module, shape):
        rng = random(module, "average")
        if module.endswith("mean_ema"):
            average = rng.standard_normal(shape) * 0.3
        else:
            average = rng.uniform(0.5, 2.0, shape)
        average = average.astype(np.float32)
        hidden = average * np.float32(1 - 0.9**5)
        return {"counter": np.int32(5), "hidden": hidden, "average": average}

    bottleneck = manifest["bottleneck"]
    parameters = {
        module: {
            name: parameter(module, name, shape).astype(np.float32)
            for name, shape in shapes.items()
        }
        for module, shapes in manifest["params"].items()
    }
    state = {module: moving_average(module, shape) for module, shape in manifest["state"].items()}
    return parameters, state


def map_tree(function, tree):
    if isinstance(tree, dict):
        return {key: map_tree(function, item) for key, item in tree.items()}
    return function(tree)


def pretrain(network, devices=0):
    """Returns the content of a checkpoint of DeepMind's programs."""
    parameters, state = haiku_trees(network)
    if devices:
        trees = [
            map_tree(lambda x: np.repeat(x[np.newaxis], devices, 0), tree)
            for tree in (parameters, state)
        ]
        parameters, state = trees
    return {
        "experiment_state": {
            "online_params": parameters,
            "online_state": state,
        },
        "step": 300_000,
        "rng": np.zeros(2, np.uint32),
    }


@contextlib.contextmanager
def modules(**functions):
    """Lets `pickle` name functions of modules that are not installed.

    Args:
        **functions: by `package__module__name`.
    """
    made = {}
    for path, function in functions.items():
        module, name = path.replace("__", ".").rsplit(".", 1)
        made.setdefault(module, types.ModuleType(module))
        setattr(made[module], name, function)
        function.__module__, function.__qualname__ = module, name
        function.__name__ = name
        # `pickle` imports parents, too.
        for end in range(module.count(".")):
            parent = ".".join(module.split(".")[: end + 1])
            made.setdefault(parent, types.ModuleType(parent))
    before = {name: sys.modules.get(name) for name in made}
    sys.modules.update(made)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


class Reduced:
    """What `pickle` writes as the call of a function."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


# --- torch's files


def write_torch(path, state_dict, dtypes=None):
    """Writes a state dictionary as torch.save does since version 1.6.

    Args:
        path: of the file.
        state_dict: numpy arrays, in dictionaries.
        dtypes: names of torch's storages by array's type.
    """
    dtypes = {"float32": "FloatStorage", "int64": "LongStorage"} | (dtypes or {})
    storages = []

    class Storage:
        def __init__(self, array):
            self.array = array

    class Pickler(pickle.Pickler):
        def persistent_id(self, item):
            if not isinstance(item, Storage):
                return None
            kind = kinds[dtypes[item.array.dtype.name]]
            storages.append(item.array)
            return (
                "storage", kind, str(len(storages) - 1), "cpu",
                item.array.size,
            )  # fmt: skip

    def rebuild(*_):
        raise AssertionError("called")

    kinds = {name: type(name, (), {}) for name in dtypes.values()}

    def tensor(array):
        array = np.ascontiguousarray(array)
        strides = tuple(n // array.itemsize for n in array.strides)
        return Reduced(rebuild, Storage(array), 0, array.shape, strides, False, {})

    named = {f"torch__{name}": kind for name, kind in kinds.items()}
    with (
        modules(torch___utils___rebuild_tensor_v2=rebuild, **named),
        zipfile.ZipFile(path, "w") as archive,
        archive.open("archive/data.pkl", "w") as file,
    ):
        Pickler(file, 2).dump(map_tree(tensor, state_dict))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/byteorder", "little")
        for key, array in enumerate(storages):
            archive.writestr(f"archive/data/{key}", array.tobytes())
        archive.writestr("archive/version", "3\n")
