# SPDX-License-Identifier: Apache-2.0
"""Every script of `benchmarks/` runs and prints the numbers that it promises.

The sizes are the smallest that work. The numbers themselves are not checked, because they depend on
the machine.
"""

import argparse
import importlib.util
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

import objective
from tests.support import processes

_FOLDER = pathlib.Path(__file__).resolve().parent.parent / "benchmarks"
_NUMBER = r"\d[\d,]*(\.\d+)?"  # neither nan nor inf

# The arguments of each script and its output, where # stands for a number.
_CASES = {
    "augmentation.py": (
        "--batch_size=4 --rounds=1 --seconds=0.01",
        """
        program start, s images/s CPU us
        strength 0.5, no blur
        tf.data, stateful draws # # #
        tf.data, stateless draws # # #
        augment # # #
        augment, XLA # # #
        augment, XLA to tf.data, stateless draws: # times the images/s, # times the images per CPU second
        augment, XLA to tf.data, stateful draws: # times the images/s, # times the images per CPU second
        strength 1.0, blur
        tf.data, stateful draws # # #
        tf.data, stateless draws # # #
        augment # # #
        augment, XLA # # #
        augment, XLA to tf.data, stateless draws: # times the images/s, # times the images per CPU second
        augment, XLA to tf.data, stateful draws: # times the images/s, # times the images per CPU second
        224 pixels, blur, no crop
        augment, XLA # #
        """,  # noqa: E501
    ),
    "methods.py": (
        "--methods simclr --rounds=1 --steps=1 --resnet_depth=10 "
        "--width_multiplier=0.1 --train_batch_size=8",
        """
        method start, s passes, s step, s beyond
        simclr # # # #
        """,
    ),
    "objectives.py": (
        "--rows simclr vicreg --steps=2 --dataset=images.npz "
        "--train_split=train[:50%] --test_split=train[50%:] --out=runs "
        "--image_size=8 --width_multiplier=0.1 --train_batch_size=8",
        """
        | simclr | # | # | # | # | # |
        | vicreg | # | # | # | # | # |
        | images.npz | linear | kNN | 1 a class | 5 a class | minutes |
        |---|---|---|---|---|---|
        | raw pixels | # | # | # | # | # |
        | random encoder, SimCLR's | # | # | # | # | # |
        | simclr | # | # | # | # | # |
        | vicreg | # | # | # | # | # |
        """,
    ),
    "pretraining.py": (
        "--resnet_depth=10 --width_multiplier=0.1 --batch_size=8 --rounds=1 --steps=1",
        """
        input first call, compilation included: # s
        both first call, compilation included: # s
        start to first step: # s
        step first call, compilation included: # s
        bare first call, compilation included: # s
        input # images/s # bare
        both # images/s # bare
        step # images/s # bare
        bare # images/s # bare
        peak memory of the process: # GiB
        """,
    ),
}


def test_every_benchmark_script_has_a_case():
    assert {path.name for path in _FOLDER.glob("*.py")} == set(_CASES)


@pytest.mark.parametrize("script", _CASES)
def test_benchmark_script_at_smallest_size_prints_numbers(tmp_path, script):
    # The evaluation of `photo_patches` alone would take minutes.
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "images.npz",
        images=rng.integers(0, 256, [80, 8, 8, 3], np.uint8),
        labels=np.arange(80) % 4,
    )
    arguments, expected = _CASES[script]
    result = processes.run(_FOLDER / script, *arguments.split(), folder=tmp_path)
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    patterns = [
        re.escape(line.strip()).replace(r"\#", _NUMBER) for line in expected.strip().splitlines()
    ]
    assert len(lines) == len(patterns), result.stdout
    for line, pattern in zip(lines, patterns, strict=True):
        assert re.fullmatch(pattern, line), result.stdout


@pytest.fixture
def objectives():
    """The module `benchmarks/objectives.py`."""
    spec = importlib.util.spec_from_file_location("objectives", _FOLDER / "objectives.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_objectives_rows_are_of_objectives_and_of_all_but_siglip(objectives):
    found = {row.split(",")[0] for row in objectives._ROWS}
    assert found == set(objective.OBJECTIVES) - {"siglip"}


def test_objectives_failing_training_shows_whole_log(objectives, monkeypatch, tmp_path):
    log = "first line\n" + 10_000 * "between\n" + "last line\n"
    script = f"import sys; print({log!r}, file=sys.stderr); sys.exit(3)"
    run = subprocess.run
    monkeypatch.setattr(
        subprocess,
        "run",
        lambda _, **kwargs: run([sys.executable, "-c", script], **kwargs),
    )
    arguments = argparse.Namespace(
        dataset="photo_patches", train_split="train", epochs=1, steps=0, seed=0
    )
    with pytest.raises(SystemExit) as error:
        objectives.pretrain("simclr", tmp_path, arguments, [])
    assert log in error.value.code
