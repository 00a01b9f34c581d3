# SPDX-License-Identifier: Apache-2.0
"""The state of training: all of it is restored, and its size is known."""

import dataclasses
import json
import math

import numpy as np
import pytest
import tensorflow as tf

import objective as objective_lib
from contrastive.training.state import TrainState
from tests.support import program, replica_run, runs

_WITH_STATE = ("semppl", "siglip")


def _bytes(variables):
    return sum(math.prod(v.shape) * tf.as_dtype(v.dtype).size for v in variables)


def _create(objective, **hyperparameters):
    config = dataclasses.replace(
        replica_run.config(objective, "momentum"),
        objective=replica_run.make_objective(objective, **hyperparameters),
    )
    return config, TrainState.create(config, replica_run.build_networks(objective))


@pytest.mark.parametrize(
    ("objective", "hyperparameters", "has_state"),
    [
        *((name, {}, name in _WITH_STATE) for name in objective_lib.OBJECTIVES),
        ("relic", {"learnable_temperature": True}, True),
        ("relicv2", {"learnable_temperature": True}, True),
        ("semppl", {"learnable_temperature": True, "queue_size": 21}, True),
        ("siglip", {"learnable_temperature": False}, False),
    ],
)
def test_state_bytes_equal_the_built_state_and_optimizer(objective, hyperparameters, has_state):
    config, state = _create(objective, **hyperparameters)
    built = 0
    if state.objective_state is not None:
        built += _bytes(state.objective_state.variables)
    if state.optimizers.objective is not None:
        built += _bytes(state.optimizers.objective.variables)
    assert bool(built) == has_state
    assert config.objective.state_bytes(state.training) == built


def test_create_without_trained_variables_has_no_objective_optimizer():
    _, state = _create("semppl")
    assert state.optimizers.objective is None
    assert "objective_optimizer" in state.saved_objects()
    assert state.saved_objects()["objective_optimizer"] is None


def test_restore_after_a_stop_restores_queue_target_and_draws(semppl):
    states = [runs.tensors(directory, 8) for directory in semppl]
    assert set(states[0]) == set(states[1])
    queue = [x for x in states[0] if x.startswith("objective_state/queue")]
    assert len(queue) == 4
    groups = {name.split("/")[0] for name in states[0]}
    assert {"target_encoder", "target_projection"} <= groups
    for name, value in states[1].items():
        np.testing.assert_array_equal(states[0][name], value, name)
    scalars, expected = (runs.scalars(directory)[0] for directory in semppl)
    for name in (
        "pseudo_label_accuracy",
        "vote_share",
        "vote_agreement",
        "queue_fill",
        "semantic_positive_share",
        "target_decay",
    ):
        points = expected[f"train/{name}"]
        assert [step for step, _ in points] == list(range(1, 9))
        assert scalars[f"train/{name}"] == points
    # 8 of each batch of 32 are labelled, and the queue holds 40.
    filled = [share for _, share in expected["train/queue_fill"]]
    np.testing.assert_allclose(filled, [0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1])
    # Until pseudo-labels count, only labelled rows have positives.
    shares = [share for _, share in expected["train/semantic_positive_share"]]
    assert max(shares[:4]) <= 0.25 < min(shares[4:])
    # From the first batch on there is something to vote by.
    assert [share for _, share in expected["train/vote_share"]] == [1] * 8


@pytest.mark.slow
def test_restore_after_a_stop_restores_a_trained_temperature(tmp_path):
    words = [*runs.SMALL, "--objective=relic", "--use_siglip"]
    stopped, whole = (
        runs.tensors(directory, 8) for directory in runs.stopped_and_whole(tmp_path, words)
    )
    groups = {name.split("/")[0] for name in whole}
    assert {"objective_state", "objective_optimizer"} <= groups
    assert stopped.keys() == whole.keys()
    for name, value in whole.items():
        np.testing.assert_array_equal(stopped[name], value, name)


def test_restore_by_another_architecture_is_refused_with_its_flag(pretrained, capsys):
    words = [f"--model_dir={pretrained}", *runs.SMALL, "--train_steps=6"]
    assert program.main(*words, "--resnet_depth=18") == 2
    error = capsys.readouterr().err
    assert "resnet_depth: 10 there, 18 here" in error


def test_eval_of_a_pretraining_run_needs_no_objective_state(semppl):
    assert program.main(f"--model_dir={semppl[1]}", "--mode=eval") == 0
    result = json.loads((semppl[1] / "result.json").read_text())
    assert result["global_step"] == 8
    assert result["num_examples"] == 2000
