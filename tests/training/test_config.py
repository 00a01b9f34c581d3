# SPDX-License-Identifier: Apache-2.0
"""The configuration of a training run in steps."""

import types

import pytest

from contrastive.config.completion import complete
from contrastive.training import config as config_lib
from tests.support import program

_DATA = types.SimpleNamespace(num_examples=50_000, num_classes=10, channels=3, image_size=(32, 32))


def _make(*words, num_replicas=1):
    resolved = complete(program.resolve("--dataset=cifar10", *words), _DATA)
    return config_lib.make_config(resolved, _DATA, num_replicas)


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [("linear", 0.3 * 4096 / 256), ("sqrt", 0.3 * 64), ("none", 0.3)],
)
def test_scaled_learning_rate_of_each_scaling_equals_its_formula(scaling, expected):
    rate = config_lib.scaled_learning_rate(0.3, 4096, scaling)
    assert rate == pytest.approx(expected, rel=1e-12)


def test_scaled_learning_rate_unknown_scaling_raises():
    with pytest.raises(ValueError, match="Received: 'log'"):
        config_lib.scaled_learning_rate(0.3, 256, "log")


@pytest.mark.parametrize(
    ("num_examples", "epochs", "batch_size", "expected"),
    [
        (50_000, 1000, 512, 97_657),  # CIFAR-10
        (1_281_167, 100, 4096, 31_279),  # ImageNet
        (100, 1, 10, 11),  # one more than fit in, as SimCLR has it
    ],
)
def test_num_train_steps_is_simclrs(num_examples, epochs, batch_size, expected):
    steps = config_lib.num_train_steps(num_examples, epochs, batch_size)
    assert steps == expected


@pytest.mark.parametrize(
    ("num_examples", "warmup_epochs", "batch_size", "expected"),
    [(50_000, 10, 512, 976), (50_000, 0, 512, 0), (100, 0.5, 10, 5)],
)
def test_num_warmup_steps_is_an_integer_of_whole_batches(
    num_examples, warmup_epochs, batch_size, expected
):
    steps = config_lib.num_warmup_steps(num_examples, warmup_epochs, batch_size)
    assert steps == expected
    assert isinstance(steps, int)


def test_make_config_counts_in_steps():
    made = _make(
        "--objective=simclr",
        "--train_batch_size=512",
        "--train_epochs=100",
        "--warmup_epochs=10",
        "--learning_rate=0.3",
        "--checkpoint_epochs=2",
    )
    assert made.train_steps == 50_000 * 100 // 512 + 1
    assert made.warmup_steps == 976
    assert made.peak_learning_rate == pytest.approx(0.6)
    assert made.checkpoint_steps == 2 * 98
    assert made.pretrains
    assert made.objective.temperature == 0.1


def test_make_config_train_steps_replaces_epochs():
    made = _make("--train_steps=7", "--checkpoint_steps=3")
    assert (made.train_steps, made.checkpoint_steps) == (7, 3)


def test_make_config_of_finetuning_has_one_view_and_no_objective():
    made = _make("--train_mode=finetune", "--checkpoint=none")
    assert not made.pretrains
    assert made.objective is None
    (view,) = made.views
    assert made.num_large_views == 1
    assert view.jitter_probability == view.blur_probability == 0.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--train_batch_size=512", "among 3 replicas."),
        (
            "--train_batch_size=510 --accumulate_steps=4",
            "among 3 replicas and --accumulate_steps=4.",
        ),
    ],
)
def test_make_config_batch_that_does_not_divide_raises(words, message):
    with pytest.raises(ValueError, match="--train_batch_size=.*divide") as info:
        _make(*words.split(), num_replicas=3)
    assert str(info.value).endswith(message)


def test_make_views_of_many_views_lists_the_large_ones_first():
    views = _make("--objective=relicv2").views
    assert [view.size for view in views] == [32] * 4 + [16] * 2
    assert [bool(view.mask_probability) for view in views][4:] == [False] * 2
