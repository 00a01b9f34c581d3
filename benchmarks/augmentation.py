# SPDX-License-Identifier: Apache-2.0
"""Images a second of `data_util.augment` and of a per-image tf.data pipeline.

Both make two SimCLR views of uint8 CIFAR-sized batches in memory. Rounds of
all programs alternate in one process; the median round of each is reported.

    python benchmarks/augmentation.py
"""

import argparse
import functools
import os
import pathlib
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import numpy as np
import tensorflow as tf

import data_util

SIZE = 32
SETTINGS = {
    "strength 0.5, no blur": data_util.simclr_augmentation(
        SIZE, strength=0.5, use_blur=False
    ),
    "strength 1.0, blur": data_util.simclr_augmentation(SIZE),
}


def main() -> None:
    """Prints a line for each setting and program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch_size", type=int, default=512, help="images")
    parser.add_argument("--rounds", type=int, default=5, help="of each program")
    parser.add_argument("--seconds", type=float, default=1.0, help="a round")
    args = parser.parse_args()

    images = np.random.default_rng(0).integers(
        0, 256, [10 * args.batch_size, SIZE, SIZE, 3], np.uint8
    )
    print(
        f"{'setting':24}{'program':24}{'start, s':>10}{'images/s':>10}  ratio"
    )
    for name, augmentation in SETTINGS.items():
        programs = {
            "per-image tf.data": per_image(images, augmentation, args),
            "batched": batched(images, augmentation, args, jit=False),
            "batched, XLA": batched(images, augmentation, args, jit=True),
        }
        starts = {key: timed(start()) for key, start in programs.items()}
        rates = measure(programs, args)
        for key, rate in rates.items():
            ratio = rate / rates["per-image tf.data"]
            print(
                f"{name:24}{key:24}{starts[key]:10.1f}{rate:10.0f}{ratio:7.1f}"
            )


def timed(step) -> float:
    """Returns the seconds of one call."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def measure(programs, args) -> dict[str, float]:
    """Returns the images a second of each program, median of the rounds."""
    rates = {name: [] for name in programs}
    for _ in range(args.rounds):
        for name, start in programs.items():
            # A pipeline lives for one round only: it would go on working in
            # the background of the next program, and have batches in stock.
            step = start()
            step()
            steps, spent = 0, 0.0
            while spent < args.seconds:
                spent += timed(step)
                steps += 1
            rates[name].append(steps * args.batch_size / spent)
            del step
    return {name: float(np.median(rate)) for name, rate in rates.items()}


def batched(images, augmentation, args, *, jit):
    """Returns what starts a program: a function, one batch of both views."""

    @functools.partial(tf.function, jit_compile=jit)
    def views(batch, step):
        ids = tf.range(args.batch_size)
        return [
            data_util.augment(
                batch,
                data_util.example_keys(0, step, ids, view),
                augmentation,
            )
            for view in (0, 1)
        ]

    batch = tf.constant(images[: args.batch_size])
    steps = iter(range(10**9))

    def step():
        return [v.numpy() for v in views(batch, tf.constant(next(steps)))]

    return lambda: step


def per_image(images, augmentation, args):
    """Returns what starts a program: a function, one batch of both views."""
    view = functools.partial(one_view, augmentation=augmentation)
    dataset = (
        tf.data.Dataset.from_tensor_slices(images)
        .repeat()
        .map(lambda x: (view(x), view(x)), tf.data.AUTOTUNE)
        .batch(args.batch_size, drop_remainder=True)
        .prefetch(tf.data.AUTOTUNE)
    )

    def start():
        iterator = iter(dataset)
        return lambda: [v.numpy() for v in next(iterator)]

    return start


def one_view(image, augmentation):
    """Returns a view of one image, written with `tf.image` and `tf.cond`."""
    image = tf.image.convert_image_dtype(image, tf.float32)
    begin, size, _ = tf.image.sample_distorted_bounding_box(
        tf.shape(image),
        tf.zeros([1, 0, 4]),
        aspect_ratio_range=augmentation.crop_aspect,
        area_range=augmentation.crop_area,
        min_object_covered=augmentation.crop_min_covered,
        use_image_if_no_bounding_boxes=True,
    )
    image = tf.slice(image, begin, size)
    image = tf.image.resize(image, [SIZE, SIZE], "bicubic")
    image = tf.image.random_flip_left_right(image)
    image = sometimes(
        augmentation.jitter_probability,
        lambda x: jitter(x, augmentation),
        image,
    )
    image = sometimes(
        augmentation.grayscale_probability,
        lambda x: tf.repeat(tf.image.rgb_to_grayscale(x), 3, axis=-1),
        image,
    )
    image = tf.clip_by_value(image, 0.0, 1.0)
    if augmentation.blur_probability > 0:
        image = sometimes(augmentation.blur_probability, blur, image)
    return tf.ensure_shape(image, [SIZE, SIZE, 3])


def sometimes(probability, function, image):
    """Returns `function(image)` with a probability, else the image."""
    happens = tf.random.uniform([]) < probability
    return tf.cond(happens, lambda: function(image), lambda: image)


def jitter(image, augmentation):
    """Returns the image after four colour operations in random order."""
    b, c = augmentation.brightness, augmentation.contrast
    s, h = augmentation.saturation, augmentation.hue
    operations = [
        lambda x: x * tf.random.uniform([], 1 - b, 1 + b),
        lambda x: tf.image.random_contrast(x, 1 - c, 1 + c),
        lambda x: tf.image.random_saturation(x, 1 - s, 1 + s),
        lambda x: tf.image.random_hue(x, h),
    ]
    for chosen in tf.unstack(tf.random.shuffle(tf.range(4))):
        branches = [functools.partial(op, image) for op in operations]
        image = tf.clip_by_value(tf.switch_case(chosen, branches), 0.0, 1.0)
    return image


def blur(image):
    """Returns the image, blurred with 3 x 3 taps of a random Gaussian."""
    taps = tf.range(-1.0, 2.0) / tf.random.uniform([], 0.1, 2.0)
    taps = tf.nn.softmax(-0.5 * tf.square(taps))
    for shape in ([3, 1, 1, 1], [1, 3, 1, 1]):
        kernel = tf.tile(tf.reshape(taps, shape), [1, 1, 3, 1])
        image = tf.nn.depthwise_conv2d(
            image[tf.newaxis], kernel, [1, 1, 1, 1], "SAME"
        )[0]
    return image


if __name__ == "__main__":
    main()
