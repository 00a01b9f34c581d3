# SPDX-License-Identifier: Apache-2.0
"""The networks: heads, target network and queue, joined with an encoder."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import keras
import tensorflow as tf

import resnet

ENCODERS = ("resnet", "efficientnet_v2_s")
TARGET_BNS = ("batch", "average")
SIMCLR_MODES = ("none", "linear", "nonlinear")
PROJECTION_MODES = (*SIMCLR_MODES, "mlp")
MLP_NORMS = ("none", "hidden", "all")
# What most published encoders expect images in [0, 1] to be normalised by.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Not one instance for all: an initializer draws the same numbers every time.
_normal = functools.partial(keras.initializers.RandomNormal, stddev=0.01)


def projection_head(
    mode: str = "nonlinear",
    *,
    input_dim: int,
    out_dim: int = 128,
    num_layers: int = 3,
    global_bn: bool = True,
    batch_norm_momentum: float = 0.9,
    name: str = "projection",
) -> keras.Model:
    """Returns SimCLR's projection head.

    Hidden layers are as wide as the input, without bias, followed by BatchNorm
    and ReLU. The last layer has `out_dim` units and BatchNorm without offset.

    Source: Chen et al., arXiv:2006.10029; google-research/simclr@383d414,
    tf2/model.py. Differs from it: every mode returns the list below.

    Args:
        mode: "nonlinear" (`num_layers` layers), "linear" (the last one alone)
            or "none" (the input is the projection).
        input_dim: number of features.
        out_dim: size of the projection; not used if `mode` is "none".
        num_layers: number of layers of the nonlinear head, >= 1.
        global_bn: whether BatchNorm statistics cover all replicas.
        batch_norm_momentum: of the moving statistics, in [0, 1].
        name: of the model, and the first part of its layers' names.

    Returns:
        A built model from float32 features `[N, input_dim]` to a list: the
        input, then the output of each layer (for "none", the input again).
        Element -1 is the projection, in float32 under every dtype policy;
        element k is where SimCLR's `ft_proj_selector=k` puts its classifier.

    Raises:
        ValueError: if `mode` is unknown or there is no layer.
    """
    if mode not in SIMCLR_MODES:
        raise ValueError(
            f"`mode` must be one of {SIMCLR_MODES}. Received: {mode!r}."
        )
    if num_layers < 1:
        raise ValueError(
            f"`num_layers` must be positive. Received: {num_layers}."
        )
    num_layers = {"none": 0, "linear": 1, "nonlinear": num_layers}[mode]
    hiddens = [keras.Input((input_dim,), name=f"{name}_features")]
    for layer in range(1, num_layers + 1):
        is_last = layer == num_layers
        x = keras.layers.Dense(
            out_dim if is_last else input_dim,
            use_bias=False,
            kernel_initializer=_normal(),
            name=f"{name}_dense{layer}",
        )(hiddens[-1])
        x = resnet.GlobalBatchNorm(
            momentum=batch_norm_momentum,
            center=not is_last,
            synchronized=global_bn,
            dtype="float32" if is_last else None,
            name=f"{name}_bn{layer}",
        )(x)
        if not is_last:
            x = keras.layers.ReLU(name=f"{name}_relu{layer}")(x)
        hiddens.append(x)
    if mode == "none":
        hiddens *= 2  # Keras would return a bare tensor for a list of one.
    return keras.Model(hiddens[0], hiddens, name=name)


def mlp_head(
    *,
    input_dim: int,
    hidden_dims: Sequence[int],
    out_dim: int,
    norm: str = "hidden",
    global_bn: bool = True,
    batch_norm_momentum: float = 0.9,
    name: str = "projection",
) -> keras.Model:
    """Returns a multi-layer perceptron, ReLU between its layers.

    BYOL's projection and prediction heads have one hidden layer, with bias,
    BatchNorm and ReLU, and an output without bias or BatchNorm. ReLIC without
    a target network has BatchNorm after every layer; relic-pytorch has none.

    Source: Grill et al., arXiv:2006.07733, section 3.3; deepmind-research,
    byol/utils/networks.py `MLP`; Mitrovic et al., arXiv:2010.07922, table 5;
    filipbasara0/relic, relic/relic.py `MLPHead`.

    Args:
        input_dim: number of features.
        hidden_dims: units of each hidden layer; may be empty.
        out_dim: units of the last layer.
        norm: after which layers there is BatchNorm: "none", "hidden" or "all".
        global_bn: whether BatchNorm statistics cover all replicas.
        batch_norm_momentum: of the moving statistics, in [0, 1].
        name: of the model, and the first part of its layers' names.

    Returns:
        A built model, as `projection_head`'s.

    Raises:
        ValueError: if `norm` is unknown.
    """
    if norm not in MLP_NORMS:
        raise ValueError(
            f"`norm` must be one of {MLP_NORMS}. Received: {norm!r}."
        )
    hiddens = [keras.Input((input_dim,), name=f"{name}_features")]
    for layer, units in enumerate([*hidden_dims, out_dim], start=1):
        is_last = layer == len(hidden_dims) + 1
        x = keras.layers.Dense(
            units,
            # Only BYOL's hidden layers have one, if without effect.
            use_bias=norm == "hidden" and not is_last,
            kernel_initializer="lecun_normal",
            dtype="float32" if is_last else None,
            name=f"{name}_dense{layer}",
        )(hiddens[-1])
        if norm == "all" or (norm == "hidden" and not is_last):
            x = resnet.GlobalBatchNorm(
                momentum=batch_norm_momentum,
                synchronized=global_bn,
                dtype="float32" if is_last else None,
                name=f"{name}_bn{layer}",
            )(x)
        if not is_last:
            x = keras.layers.ReLU(name=f"{name}_relu{layer}")(x)
        hiddens.append(x)
    return keras.Model(hiddens[0], hiddens, name=name)


def classifier_head(
    *,
    input_dim: int,
    num_classes: int,
    zero_init: bool = False,
) -> keras.Model:
    """Returns one linear layer with bias.

    Args:
        input_dim: number of features.
        num_classes: number of logits.
        zero_init: whether the kernel starts at zero, as in linear evaluation,
            or from a normal distribution of standard deviation 0.01.

    Returns:
        A built model from features `[N, input_dim]` to float32 logits
        `[N, num_classes]`.
    """
    features = keras.Input((input_dim,), name="classifier_features")
    logits = keras.layers.Dense(
        num_classes,
        kernel_initializer="zeros" if zero_init else _normal(),
        dtype="float32",
        name="classifier_dense",
    )(features)
    return keras.Model(features, logits, name="classifier")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """What determines the variables and the function of the networks.

    It is written to `run.json`, so that a checkpoint can be read without
    repeating the flags it was trained with. The encoder's fields are arguments
    of `resnet.resnet`, the others of the heads here, named as their flags.

    Attributes:
        encoder: "resnet", or "efficientnet_v2_s", which has no use for the
            fields from `resnet_depth` to `zero_init_residual`.
        resnet_depth: 10, 18, 34, 50, 101, 152 or 200.
        width_multiplier: of all numbers of channels, > 0.
        stem: "imagenet" or "cifar".
        padding: "fixed", "same" or "torch".
        shortcuts: projected "always" at the head of a group, or where "needed".
        preactivation: whether BatchNorm stands before convolutions.
        base_filters: of the stem and the groups, before the multiplier.
        sk_ratio: selective kernels and ResNet-D if > 0.
        se_ratio: squeeze and excitation if > 0.
        zero_init_residual: whether residual blocks start as identities.
        global_bn: whether BatchNorm statistics cover all replicas.
        batch_norm_decay: momentum of the moving statistics.
        channels: of an image.
        image_mean: subtracted from images in [0, 1], one a channel; or ().
        image_std: images are then divided by it; or ().
        proj_head_mode: "none", "linear", "nonlinear" or "mlp".
        proj_out_dim: size of the projection.
        num_proj_layers: of the nonlinear head.
        proj_hidden_dim: units of each hidden layer of the mlp, and of the
            predictor.
        proj_bn: after which layers of the mlp BatchNorm stands.
        predictor: whether there is a prediction head on the projection.
        target_network: whether there is a moving average of the encoder and
            the projection head.
        target_bn: BatchNorm of the moving average: "batch", by statistics of
            the batch, or "average", by those averaged with the weights.
        learnable_temperature: whether temperature and bias are trained.
        max_inverse_temperature: where it is trained, > 0.
        critic_bias: of the logits, where it is trained, at the start.
        queue_shape: views and entries of SemPPL's queue; or ().
        ft_proj_selector: the layer of the projection head that the classifier
            sees: 0 is the encoder's output, -1 the projection.
        num_classes: of the classifier; 0 for none.
        zero_init_logits_layer: whether the classifier starts at zero.
    """

    encoder: str = "resnet"
    resnet_depth: int
    width_multiplier: float
    stem: str
    padding: str
    shortcuts: str = "always"
    preactivation: bool = False
    base_filters: Sequence[int] = resnet.BASE_FILTERS
    sk_ratio: float
    se_ratio: float
    zero_init_residual: bool
    global_bn: bool
    batch_norm_decay: float
    channels: int
    image_mean: Sequence[float]
    image_std: Sequence[float]
    proj_head_mode: str
    proj_out_dim: int
    num_proj_layers: int
    proj_hidden_dim: Sequence[int] = ()
    proj_bn: str = "hidden"
    predictor: bool = False
    target_network: bool = False
    target_bn: str = "batch"
    learnable_temperature: bool = False
    max_inverse_temperature: float = 5.0
    critic_bias: float = 0.0
    queue_shape: Sequence[int] = ()
    ft_proj_selector: int
    num_classes: int
    zero_init_logits_layer: bool

    def without_pretraining(self) -> "Architecture":
        """Returns it without what only pretraining uses."""
        return dataclasses.replace(
            self,
            predictor=False,
            target_network=False,
            learnable_temperature=False,
            queue_shape=(),
        )


class Critic(keras.layers.Layer):
    """A trained temperature and bias of a loss's logits.

    Source: filipbasara0/relic, relic/relic.py: logits are cosines times
    `min(exp(log_scale), max_scale)` plus `bias`.

    Args:
        bias: at the start.
        max_scale: of the inverse temperature, > 0.
    """

    def __init__(self, bias: float = 0.0, max_scale: float = 5.0) -> None:
        super().__init__(name="critic", dtype="float32")
        self.max_scale = max_scale
        self.log_scale = self.add_weight(name="log_scale", initializer="ones")
        self.bias = self.add_weight(
            name="bias", initializer=keras.initializers.Constant(bias)
        )
        self.built = True


class LabelledQueue(keras.layers.Layer):
    """SemPPL's memory of labelled images' target projections: a FIFO queue.

    Every large view has its own projections, of the same images. All replicas
    hold the same: what is pushed must be of the global batch.

    Source: Bosnjak et al., arXiv:2301.05158, section 2.

    Args:
        num_views: large views.
        size: entries.
        dim: size of a projection.

    Attributes:
        embeddings: float32 `[num_views, size, dim]`.
        labels: int32 `[size]`.
        ids: int64 `[size]`, example ids; -1 where there is no entry yet.
        position: int64, where the next entry goes.
    """

    def __init__(self, num_views: int, size: int, dim: int) -> None:
        super().__init__(name="queue", dtype="float32")
        add = functools.partial(self.add_weight, trainable=False)
        shape = (num_views, size, dim)
        self.embeddings = add(name="embeddings", shape=shape, autocast=False)
        self.labels = add(name="labels", shape=(size,), dtype="int32")
        self.ids = add(
            name="ids",
            shape=(size,),
            dtype="int64",
            initializer=keras.initializers.Constant(-1),
        )
        self.position = add(
            name="position", shape=(), dtype="int64", initializer="zeros"
        )
        self.built = True

    def push(
        self, embeddings: tf.Tensor, labels: tf.Tensor, ids: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Enters the rows that have a label, in their order.

        Args:
            embeddings: float32 `[num_views, B, dim]`.
            labels: int32 `[B]`; -1: not entered.
            ids: int64 `[B]`.

        Returns:
            The new `embeddings`, `labels` and `ids` of the queue.

        Raises:
            ValueError: if a batch may be larger than the queue.
        """
        size, batch = self.labels.shape[0], labels.shape[0]
        if batch > size:
            raise ValueError(
                "The queue must hold a batch. Received: a queue of "
                f"{size} entries, a batch of {batch}."
            )
        # Shapes are static: each entry asks which row, if any, is its next.
        entered = labels >= 0
        rows = tf.argsort(tf.where(entered, 0, 1), stable=True)
        count = tf.reduce_sum(tf.cast(entered, tf.int64))
        rank = (tf.range(size, dtype=tf.int64) - self.position) % size
        row = tf.gather(rows, tf.minimum(rank, batch - 1))
        is_new = rank < count
        new = (
            tf.where(
                is_new[:, tf.newaxis],
                tf.gather(embeddings, row, axis=1),
                self.embeddings.value,
            ),
            tf.where(is_new, tf.gather(labels, row), self.labels.value),
            tf.where(is_new, tf.gather(ids, row), self.ids.value),
        )
        for variable, value in zip(
            (self.embeddings, self.labels, self.ids), new, strict=True
        ):
            variable.assign(value)
        self.position.assign((self.position + count) % size)
        return new


@dataclasses.dataclass(frozen=True, kw_only=True)
class Networks:
    """The networks of a run, joined.

    Attributes:
        architecture: what they were built from.
        encoder: images, normalised, to features.
        projection: features to the list of all layers' outputs.
        projection_to_classifier: its part from the features to the layer that
            the classifier sees; shares variables with `projection`.
        prediction: projection to the list of all layers' outputs; or None.
        target_encoder: moving average of `encoder`, with BatchNorm statistics
            of its own; or None.
        target_projection: moving average of `projection`; or None.
        critic: temperature and bias where they are trained; or None.
        queue: SemPPL's; or None.
        classifier: to logits; None where there are no classes.
        recomputing_encoder: `encoder` in less memory, see
            `resnet.recomputing`, for training; or None.
    """

    architecture: Architecture
    encoder: keras.Model
    projection: keras.Model
    projection_to_classifier: keras.Model
    prediction: keras.Model | None = None
    target_encoder: keras.Model | None = None
    target_projection: keras.Model | None = None
    critic: Critic | None = None
    queue: LabelledQueue | None = None
    classifier: keras.Model | None = None
    recomputing_encoder: Callable[[tf.Tensor, bool], tf.Tensor] | None = None

    def features(self, images: tf.Tensor, training: bool) -> tf.Tensor:
        """Returns `[n, d]` features of float32 `[n, h, w, c]` in [0, 1]."""
        images = self._normalized(images)
        if self.recomputing_encoder and training:
            return self.recomputing_encoder(images, training)
        return self.encoder(images, training=training)

    def embeddings(
        self, images: tf.Tensor
    ) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """Returns what is compared, `[n, d]`, and the projection's layers.

        In training mode; with a predictor, the first is its output.
        """
        layers = self.projection(
            self.features(images, training=True), training=True
        )
        embedding = layers[-1]
        if self.prediction:
            embedding = self.prediction(embedding, training=True)[-1]
        return embedding, layers

    def target_embeddings(self, images: tf.Tensor) -> tf.Tensor:
        """Returns the target's projections `[n, d]`, without a gradient.

        BatchNorm is in training mode, as in BYOL's code, or as `target_bn`
        says.

        Raises:
            ValueError: if there is no target network.
        """
        if self.target_encoder is None or self.target_projection is None:
            raise ValueError("There is no target network.")
        training = self.architecture.target_bn == "batch"
        features = self.target_encoder(
            self._normalized(images), training=training
        )
        projection = self.target_projection(features, training=training)[-1]
        return tf.stop_gradient(projection)

    @property
    def has_target(self) -> bool:
        """Whether there is a target network."""
        return self.target_encoder is not None

    def reset_target(self) -> None:
        """Makes the target, if there is one, a copy of the online networks."""
        for target, online in self._targets():
            target.set_weights(online.get_weights())

    def update_target(self, decay: tf.Tensor) -> None:
        """Moves the target's weights to `decay * target + (1 - decay) * w`."""
        which = (
            "trainable_variables"
            if self.architecture.target_bn == "batch"
            else "variables"
        )
        for target, online in self._targets():
            for average, variable in zip(
                getattr(target, which), getattr(online, which), strict=True
            ):
                average.assign(decay * average + (1.0 - decay) * variable)

    def _targets(self) -> list[tuple[keras.Model, keras.Model]]:
        """Returns each target network with its online one."""
        if self.target_encoder is None:
            return []
        return [
            (self.target_encoder, self.encoder),
            (self.target_projection, self.projection),
        ]

    def logits(self, images: tf.Tensor, training: bool) -> tf.Tensor:
        """Returns float32 `[n, num_classes]` of images as in `features`.

        Raises:
            ValueError: if there is no classifier.
        """
        if self.classifier is None:
            raise ValueError("There are no classes. Received: num_classes=0.")
        features = self.features(images, training)
        return self.classifier(
            self.projection_to_classifier(features, training=training)
        )

    def models(self) -> dict[str, keras.layers.Layer]:
        """Returns what has variables, by its name in a checkpoint."""
        return {
            name: getattr(self, name)
            for name in (
                "encoder",
                "projection",
                "prediction",
                "target_encoder",
                "target_projection",
                "critic",
                "queue",
                "classifier",
            )
            if getattr(self, name) is not None
        }

    def _normalized(self, images: tf.Tensor) -> tf.Tensor:
        if self.architecture.image_mean:
            images = images - tf.constant(self.architecture.image_mean)
        if self.architecture.image_std:
            images = images / tf.constant(self.architecture.image_std)
        return images


def build_networks(
    architecture: Architecture,
    *,
    remat: bool = False,
    differentiable_twice: bool = False,
) -> Networks:
    """Returns networks with fresh weights; a target is a copy of its online.

    Args:
        architecture: what to build.
        remat: whether gradients compute the encoder's blocks again instead of
            keeping their activations.
        differentiable_twice: whether the loss has gradients in it, as WPC's.

    Raises:
        ValueError: if a field of `architecture` is out of its range, or
            `remat` is asked of an encoder that has no blocks.
    """
    encoder = build_encoder(
        architecture, differentiable_twice=differentiable_twice
    )
    projection = _build_projection(architecture, encoder.output_shape[-1])
    layers, selector = projection.outputs, architecture.ft_proj_selector
    if not -len(layers) <= selector < len(layers):
        raise ValueError(
            f"`ft_proj_selector` must be in -1..{len(layers) - 1} for this "
            f"projection head. Received: {selector}."
        )
    parts: dict[str, keras.layers.Layer] = {}
    if architecture.predictor:
        parts["prediction"] = _build_mlp(
            architecture, layers[-1].shape[-1], layers[-1].shape[-1],
            name="prediction",
        )  # fmt: skip
    if architecture.target_network:
        parts["target_encoder"] = build_encoder(architecture)
        parts["target_projection"] = _build_projection(
            architecture, encoder.output_shape[-1]
        )
    if architecture.learnable_temperature:
        parts["critic"] = Critic(
            architecture.critic_bias, architecture.max_inverse_temperature
        )
    if architecture.queue_shape:
        num_views, size = architecture.queue_shape
        parts["queue"] = LabelledQueue(num_views, size, layers[-1].shape[-1])
    if architecture.num_classes:
        parts["classifier"] = classifier_head(
            input_dim=layers[selector].shape[-1],
            num_classes=architecture.num_classes,
            zero_init=architecture.zero_init_logits_layer,
        )
    networks = Networks(
        architecture=architecture,
        encoder=encoder,
        projection=projection,
        projection_to_classifier=keras.Model(
            projection.input, layers[selector], name="projection_to_classifier"
        ),
        recomputing_encoder=resnet.recomputing(encoder) if remat else None,
        **parts,
    )
    networks.reset_target()
    return networks


def build_encoder(
    architecture: Architecture, *, differentiable_twice: bool = False
) -> keras.Model:
    """Returns the encoder alone, with fresh weights.

    Args:
        architecture: whose encoder.
        differentiable_twice: see `resnet.resnet`.

    Raises:
        ValueError: if a field of `architecture` is out of its range.
    """
    if architecture.encoder == "efficientnet_v2_s":
        return _efficientnet_v2_s(architecture)
    if architecture.encoder != "resnet":
        raise ValueError(
            f"`encoder` must be one of {ENCODERS}. "
            f"Received: {architecture.encoder!r}."
        )
    return resnet.resnet(
        architecture.resnet_depth,
        width_multiplier=architecture.width_multiplier,
        stem=architecture.stem,
        padding=architecture.padding,
        shortcuts=architecture.shortcuts,
        preactivation=architecture.preactivation,
        base_filters=architecture.base_filters,
        sk_ratio=architecture.sk_ratio,
        se_ratio=architecture.se_ratio,
        zero_init_residual=architecture.zero_init_residual,
        global_bn=architecture.global_bn,
        batch_norm_momentum=architecture.batch_norm_decay,
        channels=architecture.channels,
        differentiable_twice=differentiable_twice,
    )


def _efficientnet_v2_s(architecture: Architecture) -> keras.Model:
    """Returns Keras's EfficientNetV2-S with this program's BatchNorm.

    Without its stochastic depth, whose draws would not be those of the example
    but of the replica and the moment.
    """
    network = keras.applications.EfficientNetV2S(
        include_top=False,
        weights=None,
        input_shape=(None, None, architecture.channels),
        pooling="avg",
        include_preprocessing=False,
    )

    def replace(layer: keras.layers.Layer) -> keras.layers.Layer:
        if isinstance(layer, keras.layers.BatchNormalization):
            return resnet.GlobalBatchNorm(
                momentum=architecture.batch_norm_decay,
                epsilon=layer.epsilon,
                synchronized=architecture.global_bn,
                name=layer.name,
            )
        if isinstance(layer, keras.layers.Dropout):
            return keras.layers.Identity(name=layer.name)
        if layer.name == "avg_pool":  # the last; blocks have theirs, too
            return keras.layers.GlobalAveragePooling2D(
                name="final_avg_pool", dtype="float32"
            )
        return layer.__class__.from_config(layer.get_config())

    return keras.models.clone_model(
        network,
        clone_function=replace,
        # Without the arguments of Keras's BatchNormalization.
        call_function=lambda layer, *inputs, **_: layer(*inputs),
    )


def _build_projection(
    architecture: Architecture, input_dim: int
) -> keras.Model:
    if architecture.proj_head_mode == "mlp":
        return _build_mlp(
            architecture, input_dim, architecture.proj_out_dim,
            name="projection",
        )  # fmt: skip
    return projection_head(
        architecture.proj_head_mode,
        input_dim=input_dim,
        out_dim=architecture.proj_out_dim,
        num_layers=architecture.num_proj_layers,
        global_bn=architecture.global_bn,
        batch_norm_momentum=architecture.batch_norm_decay,
    )


def _build_mlp(
    architecture: Architecture, input_dim: int, out_dim: int, *, name: str
) -> keras.Model:
    return mlp_head(
        input_dim=input_dim,
        hidden_dims=architecture.proj_hidden_dim,
        out_dim=out_dim,
        norm=architecture.proj_bn,
        global_bn=architecture.global_bn,
        batch_norm_momentum=architecture.batch_norm_decay,
        name=name,
    )


def encoder_of_images(networks: Networks) -> keras.Model:
    """Returns the encoder with the run's normalisation inside.

    Returns:
        keras.Model from float32 images `[n, h, w, c]` in [0, 1] to float32
        features `[n, d]`, in inference mode.
    """
    images = keras.Input((None, None, networks.architecture.channels))
    return keras.Model(images, networks.features(images, training=False))
