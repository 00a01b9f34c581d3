# SPDX-License-Identifier: Apache-2.0
"""The data set, its labels, the views of an image and their augmentation."""

from __future__ import annotations

from contrastive.config import choices, conditions as when
from contrastive.config.fields import derived, field, group


@group("Data")
class TrainingData:
    """The data set and its training split.

    Attributes:
        dataset: Data set: photo_patches (built in), a TFDS name, a folder of images or an .npz
            archive; folders and archives may be in a bucket (gs://...).
        train_split: Training split, such as train[:90%].
    """

    dataset: str = field("imagenet2012", inherit="data")
    train_split: str = field("train", inherit="data")


@group("Data")
class EvaluationData:
    """Evaluation split.

    Unset: the first of test and validation that exists and has labels.
    """

    eval_split: str | None = field(
        None,
        # A run hands it on to its evaluation and to probes.
        applies=when.modes(*when.TRAINING_MODES, "eval", "probe"),
        inherit="data",
    )


@group("Data")
class DataDirectory:
    """Where TFDS keeps data sets.

    Attributes:
        data_dir: Directory where TFDS keeps its data sets; a missing data set is downloaded and
            prepared. Unset: the directory of TFDS.
    """

    data_dir: str | None = field(None, inherit="data")


@group("Data")
class ImageSize:
    """Height and width of the encoder's input, in pixels."""

    image_size: int = field(
        derived("the size of the data set's images, or 224 if they vary"),
        minimum=1,
        inherit="networks",
    )


@group("Data")
class Channels:
    """Number of channels of an image."""

    channels: int = field(derived("those of the data set, or 3"), minimum=1, inherit="networks")


@group("Data")
class Normalization:
    """The normalization in front of the encoder.

    Attributes:
        normalize: Normalize images with ImageNet's mean and standard deviation, or not at all.
    """

    normalize: str = field("none", choices=("none", "imagenet"), inherit="networks")


@group("Labels in pretraining", applies=(when.PRETRAINING,))
class Labels:
    """The labels that pretraining may use; by default all.

    Attributes:
        labelled_fraction: Share of the training images whose labels are used, balanced over
            classes.
        labels_per_class: Number of images of each class whose labels are used.
        labelled_file: Text file of the example ids or file names whose labels are used, one per
            line.
        labelled_batch_share: Share of each batch that is drawn from the labelled images; 0 draws
            all images alike.
    """

    labelled_fraction: float | None = field(None, positive=True, maximum=1, applies=when.LABELS)
    labels_per_class: int | None = field(None, minimum=1, applies=when.LABELS)
    labelled_file: str | None = field(None, applies=when.LABELS)
    labelled_batch_share: float = field(
        0.0,
        minimum=0,
        maximum=1,
        applies=when.modes(*when.TRAINING_MODES, "check_tpu"),
    )


@group("Views", applies=(when.PRETRAINING,))
class Views:
    """Numbers and sizes of the views, and the preset of their augmentation.

    Attributes:
        augmentation: Augmentation preset: SimCLR's, BYOL's two views in turn, or that of
            relic-pytorch.
        num_large_views: Number of large views of an image.
        num_small_views: Number of small views of an image; they have no target.
        small_image_size: Height and width of a small view, in pixels.
        small_crop_area: Smallest and largest crop of a small view, as a share of the image.
        sym_aug: Use blur probability 0.5 and solarization probability 0.2 for all views.
        color_jitter_strength: Strength of all color jitter, as in SimCLR.
        use_blur: Use SimCLR's blur.
    """

    augmentation: str = field("simclr", choices=("simclr", "byol", "relic_pytorch"))
    num_large_views: int = field(2, minimum=1, applies=when.MULTI_VIEW)
    num_small_views: int = field(0, minimum=0, applies=when.MULTI_VIEW)
    small_image_size: int = field(
        derived("96/224 of --image_size, or half of it up to 32 pixels"),
        minimum=1,
        applies=(when.MULTI_VIEW, when.given("num_small_views")),
    )
    small_crop_area: tuple[float, ...] = field(
        (0.05, 0.14),
        positive=True,
        maximum=1,
        length=2,
        ascending=True,
        applies=(when.MULTI_VIEW, when.given("num_small_views")),
    )
    sym_aug: bool = field(False, applies=when.SOME_SYMMETRY)
    color_jitter_strength: float = field(
        1.0,
        minimum=0,
        applies=(
            when.flag("augmentation", "simclr"),
            when.JITTER,
            when.SOME_JITTER,
        ),
        maximum=1.25,
    )
    use_blur: bool = field(
        True,
        applies=(
            when.flag("augmentation", "simclr"),
            when.unset("blur_probability"),
            when.flag("sym_aug", False),
        ),
    )


@group("Views", applies=(when.PRETRAINING,))
class Backgrounds:
    """The removal of backgrounds.

    Attributes:
        mask_dir: Directory of foreground masks: ID.png, or the image's path with .png.
        saliency: Estimator of the foreground if there is no --mask_dir.
        mask_probability: Probability of removing the background of a large view.
        mask_fill: Content of a removed background.
    """

    mask_dir: str | None = field(None, applies=when.given("mask_probability"))
    saliency: str | None = field(
        None,
        choices=choices.SALIENCY_ESTIMATORS,
        applies=when.given("mask_probability"),
    )
    mask_probability: float = field(0.0, minimum=0, maximum=1, applies=when.MASKS)
    mask_fill: str = field(
        "zero",
        choices=choices.MASK_FILLS,
        applies=(when.MASKS, when.given("mask_probability")),
    )


@group("Views", applies=(when.PRETRAINING,))
class AugmentationOverrides:
    """Values that replace those of the augmentation preset; None keeps it.

    Attributes:
        crop_area: Smallest and largest crop, as a share of the image.
        crop_aspect: Smallest and largest aspect ratio of a crop (width / height).
        flip_probability: Horizontal flip probability.
        jitter_probability: Color jitter probability.
        brightness: Largest change of brightness.
        brightness_mode: Brightness jitter multiplies or adds.
        contrast: Largest relative change of contrast.
        saturation: Largest relative change of saturation.
        hue: Largest shift of the hue, as a share of the color circle.
        grayscale_probability: Grayscale probability.
        blur_probability: Gaussian blur probability.
        blur_sigma: Smallest and largest standard deviation of the blur, in pixels.
        solarize_probability: Solarization probability.
    """

    crop_area: tuple[float, ...] | None = field(
        None, positive=True, maximum=1, length=2, ascending=True
    )
    crop_aspect: tuple[float, ...] | None = field(None, positive=True, length=2, ascending=True)
    flip_probability: float | None = field(None, minimum=0, maximum=1)
    jitter_probability: float | None = field(None, minimum=0, maximum=1)
    brightness: float | None = field(None, minimum=0, applies=when.JITTER)
    brightness_mode: str | None = field(
        None,
        choices=choices.BRIGHTNESS_MODES,
        applies=(when.JITTER, when.BRIGHTNESS),
    )
    contrast: float | None = field(None, minimum=0, maximum=1, applies=when.JITTER)
    saturation: float | None = field(None, minimum=0, maximum=1, applies=(when.JITTER, when.COLOR))
    hue: float | None = field(None, minimum=0, maximum=0.5, applies=(when.JITTER, when.COLOR))
    grayscale_probability: float | None = field(None, minimum=0, maximum=1, applies=when.COLOR)
    blur_probability: float | None = field(None, minimum=0, maximum=1)
    blur_sigma: tuple[float, ...] | None = field(
        None, positive=True, length=2, ascending=True, applies=when.BLUR
    )
    solarize_probability: float | None = field(None, minimum=0, maximum=1)
