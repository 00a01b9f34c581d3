# SPDX-License-Identifier: Apache-2.0
"""Pretrains with every objective under one budget and measures the features.

The same encoder, images, augmentation strength, optimizer and steps for all; each method's own
heads, views and weights. Prints a Markdown table.

    python benchmarks/objectives.py --dataset=photo_patches --epochs=5
"""

import argparse
import os
import pathlib
import re
import shlex
import subprocess
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
_ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(_ROOT))

import keras
import numpy as np

import data
import model
from contrastive import run_record
from contrastive.evaluation import features, probe
from contrastive.sources import labels
from contrastive.weights import loading

_COMMON = [
    "--resnet_depth=10",
    "--width_multiplier=0.25",
    "--train_batch_size=128",
    "--warmup_epochs=0.5",
    "--optimizer=adam",
    "--learning_rate=0.002",
    "--learning_rate_scaling=none",
    "--lineareval_while_pretraining=false",
    "--train_summary_steps=0",
]
# Jitter as strong for BYOL's family as SimCLR's strength says.
_COLOURS = {
    # Colour tells many of its pictures apart.
    "photo_patches": (0.2, ["--grayscale_probability=0"]),
    "cifar10": (0.5, []),
}
# With SimCLR's encoder and augmentation.
_OF_SIMCLR_FAMILY = {
    "simclr": ["--temperature=0.5"],
    "rpc": [],
    "dv": [],
    "nwj": [],
    "js": [],
    "wpc": [],
}
_LABELS_PER_CLASS = 5
_MAX_TRAIN_EXAMPLES = 5_000
_DRAWS = 5  # of one label a class
# With SimCLR's encoder and BYOL's augmentation.
_OF_STATISTICS = {"barlow_twins": [], "vicreg": []}
# With BYOL's encoder and augmentation.
_OF_MULTI_VIEW = {
    "byol": [],
    "relic": [],
    "relic, no target": ["--target_network=false"],
    "relicv2": [],
    "semppl, 5 labels a class": [
        f"--labels_per_class={_LABELS_PER_CLASS}",
        "--labelled_batch_share=0.125",
    ],
    "semppl, 50 labels a class": [
        "--labels_per_class=50",
        "--labelled_batch_share=0.125",
        "--queue_size=800",
    ],
    # The same batches, without what the labels are for.
    "semppl, none of its 50 labels": [
        "--labels_per_class=50",
        "--labelled_batch_share=0.125",
        "--semantic_weight=0",
        "--nosemantic_invariance",
    ],
    "semppl, all labels": [],
}
_ROWS = {**_OF_SIMCLR_FAMILY, **_OF_STATISTICS, **_OF_MULTI_VIEW}
_COLUMNS = ("linear", "kNN", "1 a class", "5 a class")


def main() -> None:
    """Prints a line for each row as it is done, then the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="photo_patches")
    parser.add_argument("--train_split", default="train")
    parser.add_argument("--test_split", default="test")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=0, help="not epochs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", nargs="+", default=list(_ROWS))
    parser.add_argument("--out", default="runs/objectives", help="a folder")
    args, more = parser.parse_known_args()

    splits = [data.load(args.dataset, split) for split in (args.train_split, args.test_split)]
    lines = [
        f"| {args.dataset} | {' | '.join(_COLUMNS)} | minutes |",
        "|---" * (len(_COLUMNS) + 2) + "|",
        line("raw pixels", measure(None, splits, args.seed), 0.0),
    ]
    families = set()
    length = f"{args.steps} steps" if args.steps else f"{args.epochs} epochs"
    budget = f"{args.dataset} {args.train_split} {length} seed {args.seed}"
    for row in args.rows:
        name = re.sub(r"\W+", "-", f"{row} {budget}")
        folder = pathlib.Path(args.out) / name
        start = time.monotonic()
        pretrain(row, folder, args, more)
        minutes = (time.monotonic() - start) / 60
        family = "BYOL" if row in _OF_MULTI_VIEW else "SimCLR"
        if family not in families:
            # Their encoders start differently.
            families.add(family)
            random = measure(untrained(folder, args.seed), splits, args.seed)
            lines.append(line(f"random encoder, {family}'s", random, 0.0))
        trained = loading.load_encoder(str(folder))
        lines.append(line(row, measure(trained, splits, args.seed), minutes))
        print(lines[-1], flush=True)
    print("\n".join(lines))


def pretrain(row: str, folder: pathlib.Path, args, more: list[str]) -> None:
    """Runs the program; resumes a run that is there already."""
    strength, colour = _COLOURS.get(args.dataset, (0.5, []))
    if row in _OF_SIMCLR_FAMILY:
        views = [f"--color_jitter_strength={strength}", "--use_blur=false"]
    else:
        # What SimCLR's strength means, in flags that replace BYOL's.
        views = [
            f"--brightness={0.8 * strength}",
            f"--contrast={0.8 * strength}",
            f"--saturation={0.8 * strength}",
            f"--hue={0.2 * strength}",
            "--blur_probability=0",
            "--solarize_probability=0",
        ]
    command = [
        sys.executable,
        str(_ROOT / "run.py"),
        f"--objective={row.split(',')[0]}",
        f"--dataset={args.dataset}",
        f"--train_split={args.train_split}",
        f"--train_epochs={args.epochs}",
        f"--train_steps={args.steps}",
        f"--seed={args.seed}",
        f"--model_dir={folder}",
        *_COMMON,
        *colour,
        *views,
        *_ROWS[row],
        *more,
    ]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        sys.exit(f"{shlex.join(command)} failed:\n{result.stdout}")


def untrained(folder: pathlib.Path, seed: int):
    """Returns an encoder of the run's architecture with fresh weights."""
    keras.utils.set_random_seed(seed)
    fields = run_record.read_run(str(folder))["architecture"]
    architecture = model.Architecture.from_record(fields).without_pretraining()
    return model.encoder_of_images(model.build_networks(architecture))


def measure(encoder, splits, seed: int) -> list[float]:
    """Returns accuracies, in the order of the columns.

    The 5 labels a class are those that SemPPL's row sees.
    """
    labelled_ids = labels.choose(splits[0], per_class=_LABELS_PER_CLASS, seed=seed)
    train, test = (
        features.compute_outputs(encoder, split, split.image_size[0]) for split in splits
    )
    values, test_values = probe.standardize(train.values, test.values)

    def linear(rows) -> float:
        few = values[rows], train.labels[rows]
        predictions, _ = probe.linear_predictions(few, test_values)
        return np.mean(predictions == test.labels)

    order = np.random.default_rng(0).permutation(len(values))
    return [
        linear(order[:_MAX_TRAIN_EXAMPLES]),
        probe.knn_accuracy((train.values, train.labels), (test.values, test.labels)),
        np.mean([linear(probe.choose_labels(train.labels, "1", draw)) for draw in range(_DRAWS)]),
        linear(labelled_ids),
    ]


def line(name: str, accuracies: list[float], minutes: float) -> str:
    """Returns a row of the table."""
    cells = [f"{100 * value:.1f}" for value in accuracies]
    return f"| {name} | {' | '.join(cells)} | {minutes:.1f} |"


if __name__ == "__main__":
    main()
