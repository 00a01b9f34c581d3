# SPDX-License-Identifier: Apache-2.0
"""Weights of other programs: whose they are, and where they go in ours.

A network of `resnet.resnet` names its variables by paths such as
`block_group1_block2_conv3/kernel`. Here is what the same tensors are called
elsewhere, and what an encoder must be for them to fit.
"""

import collections
import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging

import model
import resnet

Tensors = Mapping[str, np.ndarray]

_PATH = re.compile(r"(?:block_group(\d)_block(\d+)_)?(\w+)/(\w+)")
_MOST_BLOCKS = 36  # of a group
_LISTED = 20  # tensors, in an error
_NAMED = 3  # in the log
_CONVS = tuple(f"conv{i}" for i in (1, 2, 3))
_BNS = tuple(f"bn{i}" for i in (1, 2, 3))
_BN_WEIGHTS = ("gamma", "beta", "moving_mean", "moving_variance")
# Of BatchNorm: steps, and haiku's average before its correction by them.
_UNUSED = re.compile(r".*(num_batches_tracked|_ema/hidden|_ema/counter)")
_HEADS = re.compile(r"(fc|head|classifier|logits|projector|projection)[./].+")

_TORCH_LAYERS = {
    "initial_conv": "conv1",
    "initial_bn": "bn1",
    "shortcut_conv": "downsample.0",
    "shortcut_bn": "downsample.1",
} | {layer: layer for layer in (*_CONVS, *_BNS)}
_TORCH_WEIGHTS = {
    "kernel": "weight",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
# relic-pytorch's encoder is a torch.nn.Sequential of a ResNet's children.
_TORCH_CHILDREN = {"0": "conv1", "1": "bn1"} | {
    str(group + 3): f"layer{group}" for group in (1, 2, 3, 4)
}
_TORCH_TARGET = re.compile(r"target|teacher|momentum|_ema|encoder_k")

_HAIKU_LAYERS = {
    "initial_conv": "initial_conv",
    "initial_bn": "initial_batchnorm",
    "final_bn": "final_batchnorm",
    "shortcut_conv": "shortcut_conv",
    "shortcut_bn": "shortcut_batchnorm",
} | {
    f"{ours}{i}": f"{theirs}_{i - 1}"
    for ours, theirs in (("conv", "conv"), ("bn", "batchnorm"))
    for i in (1, 2, 3)
}
_HAIKU_WEIGHTS = {
    "kernel": "w",
    "gamma": "scale",
    "beta": "offset",
    "moving_mean": "~/mean_ema/average",
    "moving_variance": "~/var_ema/average",
}
_HAIKU_STEM = r"^(initial_conv|initial_batchnorm|final_batchnorm)_\d+/"
_SIMCLR_VARIABLE = re.compile(r"(.+)/(kernel|bias|gamma|beta|moving_\w+)")
_SIMCLR_TF1 = re.compile(r"(conv2d|batch_normalization)(?:_(\d+))?")
# What stands before its neighbours in a list of SimCLR's layers, against the
# alphabet.
_SIMCLR_FIRST = (
    "initial_conv_relu_max_pool",
    "projection_layers",
    "shortcut_layers",
    "conv2d_fixed_padding",
    "se_reduce",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """An encoder's weights, and what it is.

    Raises:
        ValueError: if a variable of such an encoder has another shape than its
            tensor, or either is missing.

    Attributes:
        source: the program that its names are of.
        architecture: with no heads.
        weights: by the paths of the encoder's variables, in their shapes.
        unread: names of the tensors that belong to other networks.
    """

    source: str
    architecture: model.Architecture
    weights: dict[str, np.ndarray]
    unread: tuple[str, ...]

    def __post_init__(self) -> None:
        # Before any memory is taken for a network of that size.
        self._check(_shapes(self.architecture))

    def assign_to(self, encoder: Any) -> None:
        """Gives an encoder of this architecture the weights.

        Raises:
            ValueError: if it is of another.
        """
        self._check({v.path: v.shape for v in encoder.variables})
        for variable in encoder.variables:
            variable.assign(self.weights[variable.path])
        logging.info(
            "Loaded %d tensors of %s. Not read, as of other networks: %s.",
            len(self.weights),
            self.source,
            ", ".join(
                [*self.unread[:_NAMED], f"{len(self.unread)} in all"]
                if self.unread
                else ["none"]
            ),
        )

    def _check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises ValueError unless variables and tensors are the same."""
        own = {path: array.shape for path, array in self.weights.items()}
        problems = [
            f"\n  {path}: {own.get(path, 'none')} in the file, "
            f"{shapes.get(path, 'none')} here"
            for path in sorted({*shapes, *own})
            if own.get(path) != shapes.get(path)
        ]
        if problems:
            raise ValueError(
                f"{len(problems)} tensors of {self.source} do not fit:"
                + "".join(problems[:_LISTED])
                + ("\n  ..." if len(problems) > _LISTED else "")
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Found:
    """An encoder's tensors in a file.

    Attributes:
        source: the program that its names are of.
        weights: by our paths.
        homeless: names of tensors of the encoder that have no path here.
        unread: names of tensors outside of the encoder.
        conventions: fields of `model.Architecture` that no tensor shows.
    """

    weights: dict[str, np.ndarray]
    homeless: list[str]
    unread: list[str]
    source: str = ""
    conventions: dict[str, Any] = dataclasses.field(default_factory=dict)


def identify(
    tensors: Tensors, *, target: bool = False, **architecture: Any
) -> Published:
    """Returns the encoder that is among named tensors.

    Known are DeepMind's haiku networks (BYOL, ReLICv2, SemPPL), torchvision's
    and timm's ResNets, also within other modules, relic-pytorch's, and those
    of SimCLR and RPC.

    Args:
        tensors: by their names in a file; of nested containers, joined by "/".
        target: whether the target network, a moving average, is meant.
        **architecture: fields of `model.Architecture` that replace those found.

    Raises:
        ValueError: if no encoder is among them, or it has a tensor that our
            networks lack, or lacks one that they have: all are listed.
    """
    for family in (_haiku, _torch, _simclr):
        found = family(tensors, target)
        if found:
            break
    else:
        raise ValueError(
            "These tensors are of no ResNet of DeepMind's haiku, torchvision, "
            "timm, relic-pytorch, SimCLR or RPC:" + _listing(tensors, tensors)
        )
    if found.homeless:
        raise ValueError(
            f"Tensors of {found.source} have no place in this program's "
            "networks. (SemPPL's selective kernels are not read: no published "
            "code says what their tensors do.)"
            + _listing(found.homeless, tensors)
        )
    fields = _architecture(found.weights) | found.conventions | architecture
    return Published(
        source=found.source,
        architecture=model.Architecture(**fields),
        weights=found.weights,
        unread=tuple(sorted(found.unread)),
    )


def of_export(tensors: Tensors, **architecture: Any) -> Published:
    """Returns the encoder among the tensors of an export of this program.

    Args:
        tensors: by `NETWORK/PATH`.
        **architecture: all fields of `model.Architecture`.

    Raises:
        ValueError: if the tensors are not those of that architecture.
    """
    prefix = "encoder/"
    weights = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    without_heads = {
        "proj_head_mode": "none", "ft_proj_selector": 0, "num_classes": 0
    }  # fmt: skip
    return Published(
        source="this program",
        architecture=model.Architecture(
            **architecture | without_heads
        ).without_pretraining(),
        weights=weights,
        unread=tuple(n for n in tensors if not n.startswith(prefix)),
    )


def torchvision_name(path: str) -> str:
    """Returns what a variable of an encoder is called in torchvision.

    Kernels are `[h, w, in, out]` here and `[out, in, h, w]` there, see
    `torchvision_layout`. timm's names are the same.

    Source: torchvision's models/resnet.py.

    Args:
        path: of a variable of `resnet.resnet`.

    Raises:
        ValueError: if torchvision's networks have no such layer.
    """
    group, block, layer, weight = _parts(path)
    if layer not in _TORCH_LAYERS:
        raise ValueError(f"torchvision's ResNets have no {path}.")
    name = f"{_TORCH_LAYERS[layer]}.{_TORCH_WEIGHTS[weight]}"
    return f"layer{group}.{block}.{name}" if group else name


def torchvision_layout(array: np.ndarray) -> np.ndarray:
    """Returns a variable of an encoder with its axes in torchvision's order."""
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array


def _haiku_name(path: str) -> str:
    """Returns what a variable is called in DeepMind's networks.

    Source: google-deepmind/relicv2, utils/networks.py; haiku's nets/resnet.py.
    """
    group, block, layer, weight = _parts(path)
    name = f"{_HAIKU_LAYERS[layer]}/{_HAIKU_WEIGHTS[weight]}"
    if group:
        return f"block_group_{int(group) - 1}/~/block_{block}/~/{name}"
    return name


def _parts(path: str) -> tuple[str | None, int, str, str]:
    """Returns group, block (from 0), layer and weight of a variable's path."""
    match = _PATH.fullmatch(path)
    if not match:
        raise ValueError(f"Not a variable of a ResNet: {path!r}.")
    group, block, layer, weight = match.groups()
    return group, int(block or 1) - 1, layer, weight


def _inverse(
    name: Callable[[str], str], layers: Iterable[str]
) -> dict[str, str]:
    """Returns our path for each name that a function of paths may give."""
    prefixes = [
        f"block_group{group}_block{block}_"
        for group in (1, 2, 3, 4)
        for block in range(1, _MOST_BLOCKS + 1)
    ]
    return {
        name(path): path
        for layer in layers
        for prefix in ([""] if re.match("initial|final", layer) else prefixes)
        for weight in (("kernel",) if "conv" in layer else _BN_WEIGHTS)
        for path in [f"{prefix}{layer}/{weight}"]
    }


def _haiku(tensors: Tensors, target: bool) -> _Found | None:
    """Returns the encoder of a checkpoint of BYOL, ReLICv2 or SemPPL.

    Parameters and states are trees of `module/name`; where training ran on
    several devices, each tensor may have one copy for each, in front.
    """
    stem = re.compile(
        r"((?:.*/)?(online|target)_params/(?:.+/)?)initial_conv(?:_\d+)?/w"
    )
    stems = {m[1]: m for m in map(stem.fullmatch, tensors) if m}
    if not stems:
        return None
    wanted = "target" if target else "online"
    prefix = _only(
        [p for p, match in stems.items() if match[2] == wanted], stems, wanted
    )
    has_devices = tensors[stems[prefix][0]].ndim == 5
    state = f"{wanted}_state/".join(prefix.rsplit(f"{wanted}_params/", 1))
    places = _inverse(_haiku_name, _HAIKU_LAYERS)
    found = _sort_out(
        tensors,
        (prefix, state),
        lambda name: places.get(re.sub(_HAIKU_STEM, r"\1/", name)),
    )

    def layout(path: str, tensor: np.ndarray) -> np.ndarray:
        array = (
            tensor[0] if has_devices and tensor.ndim and len(tensor) else tensor
        )
        return array if path.endswith("kernel") else array.reshape(-1)

    return dataclasses.replace(
        found,
        source="DeepMind's haiku",
        weights={path: layout(path, x) for path, x in found.weights.items()},
        conventions={
            "padding": "same",
            "image_mean": model.IMAGENET_MEAN,
            "image_std": model.IMAGENET_STD,
        },
    )


def _torch(tensors: Tensors, target: bool) -> _Found | None:
    """Returns the encoder among tensors of torch, by torchvision's names."""
    first = re.compile(r"(.*?)(layer1|4)\.0\.conv1\.weight")
    prefixes = {}
    for match in filter(None, map(first.fullmatch, tensors)):
        is_sequence = match[2] == "4"
        stem = f"{match[1]}{'0' if is_sequence else 'conv1'}.weight"
        if stem in tensors and tensors[stem].ndim == 4:
            prefixes[match[1]] = is_sequence
    if not prefixes:
        return None
    prefix = _only(
        [p for p in prefixes if bool(_TORCH_TARGET.search(p)) == target],
        prefixes,
        "target" if target else "online",
    )
    is_sequence = prefixes[prefix]
    places = _inverse(torchvision_name, _TORCH_LAYERS)

    def place(name: str) -> str | None:
        child, dot, rest = name.partition(".")
        if is_sequence:
            child = _TORCH_CHILDREN.get(child, child)
        return places.get(child + dot + rest)

    found = _sort_out(tensors, (prefix,), place)
    # relic-pytorch takes images as they are, the others ImageNet's statistics.
    normalization = {
        "image_mean": () if is_sequence else model.IMAGENET_MEAN,
        "image_std": () if is_sequence else model.IMAGENET_STD,
    }
    return dataclasses.replace(
        found,
        source="relic-pytorch" if is_sequence else "torchvision",
        weights={
            path: tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor
            for path, tensor in found.weights.items()
        },
        conventions={"padding": "torch", "shortcuts": "needed"} | normalization,
    )


def _simclr(tensors: Tensors, target: bool) -> _Found | None:
    """Returns the encoder of a checkpoint of SimCLR, or of RPC, its fork.

    TensorFlow 1's layers are numbered as they were made, TensorFlow 2's are in
    lists; either way, the order says which is which.

    Source: google-research/simclr@383d414, resnet.py and tf2/resnet.py.
    """
    scope = re.compile(r"(.*?(?:base_model|resnet_model)/).*")
    scopes = {match[1] for match in map(scope.fullmatch, tensors) if match}
    if not scopes:
        return None
    if target:
        raise ValueError("SimCLR and RPC have no target network.")
    prefix = _only(sorted(scopes), scopes, "online")
    layers: dict[str, dict[str, np.ndarray]] = collections.defaultdict(dict)
    homeless, unread = [], []
    for name, tensor in tensors.items():
        match = _SIMCLR_VARIABLE.fullmatch(name.removeprefix(prefix))
        if not name.startswith(prefix):
            unread.append(name)
        elif match:
            layers[match[1]][match[2]] = tensor
        elif not _SIMCLR_VARIABLE.fullmatch(name.rpartition("/")[0]):
            homeless.append(name)  # else an optimizer's, of a variable
    is_tf1 = prefix.endswith("base_model/")
    order = sorted(layers, key=_tf1_position if is_tf1 else _tf2_position)
    weights = _in_order([layers[name] for name in order])
    has_bottlenecks = "block_group1_block1_conv3/kernel" in weights
    if is_tf1 and "stem_conv1/kernel" in weights and not has_bottlenecks:
        raise ValueError(
            "ResNet-18 and ResNet-34 with --sk_ratio are another network in "
            "SimCLR's TensorFlow 1 code: its blocks pool their residual "
            "branch, too."
        )
    return _Found(
        source=f"SimCLR, TensorFlow {1 if is_tf1 else 2}",
        weights=weights,
        homeless=homeless,
        unread=unread,
        conventions={"padding": "fixed"},
    )


def _tf1_position(layer: str) -> tuple[str, int]:
    match = _SIMCLR_TF1.fullmatch(layer)
    if not match:
        raise ValueError(f"SimCLR's TensorFlow 1 code has no layer {layer!r}.")
    return match[1], int(match[2] or 0)


def _tf2_position(layer: str) -> list[tuple[bool, int, str]]:
    return [
        (part not in _SIMCLR_FIRST, int(part) if part.isdigit() else 0, part)
        for part in layer.split("/")
    ]


def _in_order(
    layers: list[dict[str, np.ndarray]],
) -> dict[str, np.ndarray]:
    """Returns weights by our paths, of SimCLR's layers as they were made.

    A block's projection of its shortcut comes first. The kernel sizes tell the
    kinds of blocks: 3-3, 1-3-1, and with selective kernels 1-3-(1-1)-1.

    Args:
        layers: weights by their names; the order of the convolutions matters,
            and that of the BatchNorms, but not how the two are mixed.

    Raises:
        ValueError: if the order is not that of a ResNet.
    """
    convs = [layer for layer in layers if "kernel" in layer]
    norms = [layer for layer in layers if "kernel" not in layer]
    sizes = "".join(
        "e" if "bias" in layer else f"{(*layer['kernel'].shape, 0)[0]}"
        for layer in convs
    )
    for block in ("33", "131", "13111"):
        one = f"(1?)({block})((?:ee)?)"
        # The lookahead: the first block has a projection.
        match = re.fullmatch(f"(7|3|333)(?=1{block})((?:{one})+)", sizes)
        if not match:
            continue
        names = list(_names_in_order(match[1], re.findall(one, match[2])))
        conv_names = [name for name in names if "conv" in name]
        norm_names = [name for name in names if "bn" in name]
        if len(norm_names) != len(norms):
            break
        return {
            f"{name}/{weight}": array
            for name, layer in (
                *zip(conv_names, convs, strict=True),
                *zip(norm_names, norms, strict=True),
            )
            for weight, array in layer.items()
        }
    raise ValueError(
        f"SimCLR has no network of convolutions of the sizes {sizes:.400} and "
        f"{len(norms)} BatchNorms."
    )


def _names_in_order(
    stem: str, blocks: Iterable[tuple[str, str, str]]
) -> Iterator[str]:
    """Yields our layers as SimCLR makes them.

    Args:
        stem: kernel sizes.
        blocks: kernel sizes of each one's shortcut, residual branch, and
            squeeze-and-excitation, empty where there is none.
    """
    if stem == "333":
        yield from ("stem_conv1", "stem_bn1", "stem_conv2", "stem_bn2")
    yield from ("initial_conv", "initial_bn")
    group = block = 0
    for shortcut, convs, excitation in blocks:
        group, block = (group + 1, 1) if shortcut else (group, block + 1)
        layers = ["shortcut_conv", "shortcut_bn"] if shortcut else []
        for conv in (1, 2, 3)[: 2 if convs == "33" else 3]:
            if conv == 3 and convs == "13111":
                layers += ["sk_conv1", "sk_bn1", "sk_conv2"]
            layers += [f"conv{conv}", f"bn{conv}"]
        layers += ["se_conv1", "se_conv2"] if excitation else []
        yield from (f"block_group{group}_block{block}_{x}" for x in layers)


def _sort_out(
    tensors: Tensors,
    prefixes: tuple[str, ...],
    place: Callable[[str], str | None],
) -> _Found:
    """Returns which tensors are the encoder's, and which are of others.

    Args:
        tensors: of a file.
        prefixes: what the names of an encoder's tensors start with.
        place: from the rest of such a name to our path, where there is one.
    """
    weights, homeless, unread = {}, [], []
    for name, tensor in tensors.items():
        prefix = next(filter(name.startswith, prefixes), None)
        local = name.removeprefix(prefix or "")
        path = None if prefix is None else place(local)
        if path and path not in weights:
            weights[path] = tensor
        elif prefix is None or _HEADS.fullmatch(local):
            unread.append(name)
        elif not _UNUSED.fullmatch(local):
            homeless.append(name)
    return _Found(weights=weights, homeless=homeless, unread=unread)


def _only(found: list[str], of: Iterable[str], wanted: str) -> str:
    """Returns the one encoder that is wanted, of those in a file."""
    if len(found) != 1:
        raise ValueError(
            f"The file has {len(found)} {wanted} networks that may be meant, "
            f"of the encoders {', '.join(map(repr, sorted(of)))}."
        )
    return found[0]


def _architecture(weights: Tensors) -> dict[str, Any]:
    """Returns the fields of `model.Architecture` that the weights show.

    Raises:
        ValueError: if no network here has as many blocks.
    """
    blocks: collections.Counter[str] = collections.Counter()
    for path in weights:
        group, block, _, _ = _parts(path)
        if group:
            blocks[group] = max(blocks[group], block + 1)
    counts = tuple(blocks[group] for group in "1234")
    is_bottleneck = "block_group1_block1_conv3/kernel" in weights
    depths = [
        depth
        for depth, kind in resnet.ARCHITECTURES.items()
        if kind == (counts, is_bottleneck)
    ]

    def shape(path: str) -> tuple[int, ...]:
        own = weights[path].shape if path in weights else ()
        if len(own) != 4 or not all(own):
            raise ValueError(f"There is no kernel {path}, but {own}.")
        return own

    if not depths:
        raise ValueError(
            f"Groups of {counts} {'bottleneck' if is_bottleneck else 'basic'} "
            f"blocks are no ResNet of {', '.join(map(str, resnet.DEPTHS))}."
        )
    stem = shape("initial_conv/kernel")
    filters = (
        stem[-1],
        *(shape(f"block_group{g}_block1_conv1/kernel")[-1] for g in "1234"),
    )
    width = filters[0] / resnet.BASE_FILTERS[0]
    is_scaled = filters == tuple(n * width for n in resnet.BASE_FILTERS)

    def ratio(layer: str) -> float:
        path = f"block_group4_block1_{layer}/kernel"
        return shape(path)[-1] / filters[-1] if path in weights else 0.0

    is_resnet_d = "stem_conv1/kernel" in weights
    first = "stem_conv1/kernel" if is_resnet_d else "initial_conv/kernel"
    return dataclasses.asdict(_WITHOUT_HEADS) | {
        "resnet_depth": depths[0],
        "width_multiplier": width if is_scaled else 1.0,
        "base_filters": resnet.BASE_FILTERS if is_scaled else filters,
        "stem": "imagenet" if is_resnet_d or stem[0] == 7 else "cifar",
        "preactivation": "final_bn/gamma" in weights,
        # Basic blocks have no selective kernels; any ratio means ResNet-D.
        "sk_ratio": ratio("sk_conv1") or (_SK_RATIO if is_resnet_d else 0.0),
        "se_ratio": ratio("se_conv1"),
        "channels": shape(first)[2],
    }


_SK_RATIO = 0.0625
_WITHOUT_HEADS = model.Architecture(
    resnet_depth=0,
    width_multiplier=1.0,
    stem="",
    padding="",
    sk_ratio=0.0,
    se_ratio=0.0,
    zero_init_residual=True,
    global_bn=True,
    batch_norm_decay=0.9,
    channels=0,
    image_mean=(),
    image_std=(),
    proj_head_mode="none",
    proj_out_dim=128,
    num_proj_layers=3,
    ft_proj_selector=0,
    num_classes=0,
    zero_init_logits_layer=False,
)


def _shapes(architecture: model.Architecture) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of an encoder's variables by path, without them."""
    with tf.Graph().as_default():  # where variables are only described
        encoder = model.build_encoder(architecture)
    return {variable.path: variable.shape for variable in encoder.variables}


def _listing(names: Iterable[str], tensors: Tensors) -> str:
    """Returns names and shapes of the first tensors, one a line."""
    lines = [f"\n  {name} {tensors[name].shape}" for name in sorted(names)]
    more = f"\n  and {len(lines) - _LISTED} more"
    return "".join(lines[:_LISTED]) + (more if len(lines) > _LISTED else "")
