# SPDX-License-Identifier: Apache-2.0
"""Images a second of `data_util.augment` and of a per-image tf.data pipeline.

All make two SimCLR views of uint8 CIFAR-sized images in memory, as tensors, which is what a
training step takes. Their rounds alternate in one process; the median round of each is reported.
CPU time is that of all threads, and less disturbed by other programs than images/s.

The last line is of 224-pixel images that the host has cropped, as ImageNet's.

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
    "strength 0.5, no blur": data_util.simclr_augmentation(SIZE, strength=0.5, use_blur=False),
    "strength 1.0, blur": data_util.simclr_augmentation(SIZE),
}


def main() -> None:
    """Prints a line for each setting and program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch_size", type=int, default=512, help="images")
    parser.add_argument("--rounds", type=int, default=3, help="of each program")
    parser.add_argument("--seconds", type=float, default=1.0, help="a round")
    args = parser.parse_args()

    images = np.random.default_rng(0).integers(
        0, 256, [10 * args.batch_size, SIZE, SIZE, 3], np.uint8
    )
    print(f"{'program':30}{'start, s':>10}{'images/s':>10}{'CPU us':>10}")
    for name, augmentation in SETTINGS.items():
        print(name)
        programs = {
            "tf.data, stateful draws": per_image(images, augmentation, args, Stateful),
            "tf.data, stateless draws": per_image(images, augmentation, args, Stateless),
            "augment": batched(images, augmentation, args, jit=False),
            "augment, XLA": batched(images, augmentation, args, jit=True),
        }
        starts = {key: timed(start()) for key, start in programs.items()}
        results = measure(programs, args)
        for key, (rate, cpu) in results.items():
            print(f"  {key:28}{starts[key]:10.1f}{rate:10.0f}{cpu:10.1f}")
        # The like-for-like comparison first: `augment` is stateless, too.
        for key in reversed(list(programs)[:2]):
            ratios = np.divide(results["augment, XLA"], results[key])
            print(
                f"  augment, XLA to {key}: {ratios[0]:.1f} times the images/s, "
                f"{1 / ratios[1]:.1f} times the images per CPU second"
            )
    args.batch_size = min(args.batch_size, 32)
    large = np.random.default_rng(0).integers(0, 256, [args.batch_size, 224, 224, 3], np.uint8)
    augmentation = data_util.simclr_augmentation(224, crop=False)
    programs = {"augment, XLA": batched(large, augmentation, args, jit=True)}
    rate, cpu = measure(programs, args)["augment, XLA"]
    print("224 pixels, blur, no crop")
    print(f"  {'augment, XLA':38}{rate:10.0f}{cpu:10.1f}")


def timed(step) -> float:
    """Returns the seconds of one call."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def measure(programs, args) -> dict[str, tuple[float, float]]:
    """Returns images/s and CPU microseconds an image, medians of rounds."""
    results = {name: [] for name in programs}
    for _ in range(args.rounds):
        for name, start in programs.items():
            # A pipeline lives for one round only: it would go on working in the background of the
            # next program, and have batches in stock.
            step = start()
            step()
            count, spent, cpu = 0, 0.0, time.process_time()
            while spent < args.seconds:
                spent += timed(step)
                count += args.batch_size
            cpu = time.process_time() - cpu
            results[name].append((count / spent, 1e6 * cpu / count))
            del step
    return {name: np.median(rows, axis=0) for name, rows in results.items()}


def batched(images, augmentation, args, *, jit):
    """Returns what starts a program: a function, one batch of both views."""
    augment = functools.partial(data_util.augment, augmentation=augmentation)
    if jit:
        augment = tf.function(augment, jit_compile=True)

    # As in training: one compiled call per view in a step that is not compiled.
    @tf.function
    def views(batch, step):
        ids = tf.range(len(batch))
        return [augment(batch, data_util.example_keys(0, step, ids, view)) for view in (0, 1)]

    batch = tf.constant(images[: args.batch_size])
    steps = iter(range(10**9))

    def step():
        return views(batch, tf.constant(next(steps)))

    return lambda: step


def per_image(images, augmentation, args, source):
    """Returns what starts a program: a function, one batch of both views."""

    def views(index, image):
        return [one_view(image, source(2 * index + view), augmentation) for view in (0, 1)]

    dataset = (
        tf.data.Dataset.from_tensor_slices(images)
        .repeat()
        .enumerate()
        .map(lambda *element: tuple(views(*element)), tf.data.AUTOTUNE)
        .batch(args.batch_size, drop_remainder=True)
        .prefetch(tf.data.AUTOTUNE)
    )

    def start():
        iterator = iter(dataset)
        return lambda: next(iterator)

    return start


class Stateful:
    """Random numbers that differ from run to run, as in most pipelines."""

    def __init__(self, index):
        del index
        self.box = tf.image.sample_distorted_bounding_box

    def uniform(self, shape, low=0.0, high=1.0):
        """Returns float32 numbers."""
        return tf.random.uniform(shape, low, high)


class Stateless:
    """Random numbers that are a function of the view, as in `data_util`."""

    def __init__(self, index):
        self._index = index
        self._draw = 0
        self.box = functools.partial(
            tf.image.stateless_sample_distorted_bounding_box,
            seed=self._seed(),
        )

    def _seed(self):
        self._draw += 1
        return tf.stack([self._index, self._draw])

    def uniform(self, shape, low=0.0, high=1.0):
        """Returns float32 numbers."""
        return tf.random.stateless_uniform(shape, self._seed(), low, high)


def one_view(image, source, augmentation):
    """Returns a view of one image, written with `tf.image` and `tf.cond`."""
    image = tf.image.convert_image_dtype(image, tf.float32)
    image = crop(image, source, augmentation)
    changes = [
        (augmentation.flip_probability, tf.image.flip_left_right),
        (
            augmentation.jitter_probability,
            lambda x: jitter(x, source, augmentation),
        ),
        (
            augmentation.grayscale_probability,
            lambda x: tf.repeat(tf.image.rgb_to_grayscale(x), 3, axis=-1),
        ),
        (augmentation.blur_probability, lambda x: blur(x, source)),
    ]
    for probability, change in changes:
        if probability > 0:
            happens = source.uniform([]) < probability
            image = tf.cond(
                happens,
                functools.partial(change, image),
                functools.partial(tf.identity, image),
            )
    image = tf.clip_by_value(image, 0.0, 1.0)
    return tf.ensure_shape(image, [SIZE, SIZE, 3])


def crop(image, source, augmentation):
    """Returns a random crop of the image, resized."""
    begin, size, _ = source.box(
        tf.shape(image),
        tf.zeros([1, 0, 4]),
        aspect_ratio_range=augmentation.crop_aspect,
        area_range=augmentation.crop_area,
        min_object_covered=augmentation.crop_min_covered,
        use_image_if_no_bounding_boxes=True,
    )
    image = tf.slice(image, begin, size)
    return tf.image.resize(image, [SIZE, SIZE], "bicubic")


def jitter(image, source, augmentation):
    """Returns the image after four colour operations in random order."""
    strengths = {
        tf.multiply: augmentation.brightness,
        tf.image.adjust_contrast: augmentation.contrast,
        tf.image.adjust_saturation: augmentation.saturation,
    }

    def scale(function, strength, x):
        return function(x, source.uniform([], 1 - strength, 1 + strength))

    def turn(x):
        hue = augmentation.hue
        return tf.image.adjust_hue(x, source.uniform([], -hue, hue))

    operations = [
        functools.partial(scale, function, strength) for function, strength in strengths.items()
    ] + [turn]
    for chosen in tf.unstack(tf.argsort(source.uniform([4]))):
        branches = [functools.partial(op, image) for op in operations]
        image = tf.clip_by_value(tf.switch_case(chosen, branches), 0.0, 1.0)
    return image


def blur(image, source):
    """Returns the image, blurred with 3 x 3 taps of a random Gaussian."""
    taps = tf.range(-1.0, 2.0) / source.uniform([], 0.1, 2.0)
    taps = tf.nn.softmax(-0.5 * tf.square(taps))
    for shape in ([3, 1, 1, 1], [1, 3, 1, 1]):
        kernel = tf.tile(tf.reshape(taps, shape), [1, 1, 3, 1])
        image = tf.nn.depthwise_conv2d(image[tf.newaxis], kernel, [1, 1, 1, 1], "SAME")[0]
    return image


if __name__ == "__main__":
    main()
