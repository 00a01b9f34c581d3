# SPDX-License-Identifier: Apache-2.0
"""Whole training runs: killed, resumed, followed by another process."""

import json
import re
import signal

import numpy as np
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing import (
    plugin_event_accumulator as event_accumulator,
)

from contrastive.commands import train
from contrastive.training import loop
from contrastive.training.state import TrainState
from tests.support import processes, program, replica_run, runs

_STEPS = 80
_TRAIN = [
    *runs.SMALL,
    f"--train_steps={_STEPS}",
    "--checkpoint_steps=10",
    "--train_summary_steps=1",
    "--steps_per_loop=1",
]


def _start(directory, *words):
    return processes.Process("run.py", f"--model_dir={directory}", *words)


def _start_pausing(step, directory):
    """Returns a training run that waits, after a step, for a signal."""
    process = processes.Process(
        "tests/support/pausing_run.py",
        step,
        f"--model_dir={directory}",
        *_TRAIN,
    )
    process.wait_for_log("Paused.")
    return process


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run that is killed, then terminated, then finished, and followed."""
    directory = tmp_path_factory.mktemp("killed") / "run"
    follower = _start(directory, "--mode=eval")
    process = _start_pausing(10, directory)
    process.send(signal.SIGKILL)
    process.finish(-signal.SIGKILL)
    process = _start_pausing(30, directory)
    process.send(signal.SIGTERM)
    terminated = process.finish(128 + signal.SIGTERM).stderr
    _start(directory, *_TRAIN).finish()
    follower.finish()
    return directory, terminated


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The same run, never interrupted."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    process = processes.Process(
        "run.py",
        f"--model_dir={directory}",
        *_TRAIN,
        "--mode=train_then_eval",
        # What users see who have not set it.
        environment={"TF_CPP_MIN_LOG_LEVEL": None},
    )
    (directory.parent / "log").write_text(process.finish().stderr)
    return directory


def test_train_after_sigterm_saves_before_it_ends(killed):
    _, log = killed
    assert "Interrupted. Saved at step" in log


def test_train_killed_and_resumed_ends_with_the_same_bits(killed, whole):
    got, expected = runs.tensors(killed[0], _STEPS), runs.tensors(whole, _STEPS)
    assert set(got) == set(expected)
    assert len(got) > 100
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value, name)


def test_train_killed_and_resumed_records_the_same_curves(killed, whole):
    got, _ = runs.scalars(killed[0])
    expected, views = runs.scalars(whole)
    assert views == [0]
    expected_tags = {
        f"train/{name}"
        for name in (
            "contrastive_loss",
            "contrast_accuracy",
            "contrast_entropy",
            "probe_top_1_accuracy",
            "mean_similarity",
            "effective_rank",
            "feature_std",
            "learning_rate",
            "images_per_second",
        )
    }
    assert expected_tags <= set(expected)
    for tag, points in expected.items():
        if tag == "train/images_per_second":
            continue
        assert [step for step, _ in points] == list(range(1, _STEPS + 1))
        assert got[tag] == points, tag


def test_eval_beside_a_training_evaluates_until_its_end(killed, whole):
    got = json.loads((killed[0] / f"result_{_STEPS}.json").read_text())
    expected = json.loads((whole / "result.json").read_text())
    assert got == expected
    assert got["num_examples"] == 2000
    assert got["global_step"] == _STEPS
    assert 0 < got["top_1_accuracy"] < got["top_5_accuracy"] <= 1
    # It is in the report, too, which training ended with.
    page = (whole / "report.html").read_text()
    assert f"<b>{100 * got['top_1_accuracy']:.1f}</b>" in page
    for title in ("Pretraining", "Map of embeddings", "Confusion"):
        assert f"<h2>{title}</h2>" in page
    assert "Left out" not in page
    events = event_accumulator.EventAccumulator(str(killed[0] / "eval"), {"tensors": 0})
    events.Reload()
    points = events.Tensors("eval/top_1_accuracy")
    assert points[-1].step == _STEPS


def test_train_log_has_no_lines_of_libraries(whole):
    lines = (whole.parent / "log").read_text().splitlines()
    assert len(lines) > 5
    own = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} |  ")
    assert [line for line in lines if not own.match(line)] == []


def test_train_record_explains_the_run(whole):
    record = json.loads((whole / "run.json").read_text())
    assert record["flags"]["temperature"] == 0.1
    assert record["sources"]["temperature"] == "simclr"
    assert record["sources"]["learning_rate"] == "command line"
    assert record["train_steps"] == _STEPS
    assert record["versions"]["tensorflow"] == tf.__version__
    assert record["architecture"]["resnet_depth"] == 10


# In this process, through `run.main`.


def test_signals_outside_of_their_block_have_the_handlers_of_before():
    before = signal.getsignal(signal.SIGTERM)
    with train.Signals() as signals:
        assert signal.getsignal(signal.SIGTERM) == signals._receive
    assert signal.getsignal(signal.SIGTERM) == before


def test_train_finished_run_is_logged_as_trained(pretrained, caplog):
    words = [f"--model_dir={pretrained}", *runs.SMALL, "--train_steps=3"]
    assert program.main(*words) == 0
    assert "Already trained: step 3 of 3" in caplog.text


def test_train_in_a_bucket_saves_resumes_and_reports():
    """TensorFlow's file system in memory stands for a cloud's."""
    directory = "ram://bucket/run"
    words = [*runs.SMALL, "--mode=train_then_eval", f"--model_dir={directory}"]
    for steps in (2, 4):
        assert program.main(*words, f"--train_steps={steps}") == 0
    names = tf.io.gfile.listdir(directory)
    assert {"run.json", "report.html", "ckpt-2.index", "ckpt-4.index"} <= {*names}
    with tf.io.gfile.GFile(f"{directory}/result.json") as file:
        assert json.load(file)["global_step"] == 4


@pytest.mark.parametrize("objective", ["simclr", pytest.param("semppl", marks=pytest.mark.slow)])
def test_compiled_loop_under_xla_computes_the_same(objective, tmp_path):
    metrics = []
    for jit in ("true", "false"):
        directory = tmp_path / jit
        words = [*runs.SMALL, f"--jit_compile={jit}", "--train_steps=2"]
        words += [f"--objective={objective}", "--train_summary_steps=1"]
        assert program.main(f"--model_dir={directory}", *words) == 0
        metrics.append(runs.scalars(directory)[0])
    for tag in ("train/loss", "train/probe_loss", "train/effective_rank"):
        np.testing.assert_allclose(metrics[0][tag], metrics[1][tag], rtol=2e-2, err_msg=tag)


@pytest.mark.parametrize(
    ("layer", "index"),
    [("encoder", 0), ("classifier", 0), ("objective_state", 0)],
)
def test_check_finite_weights_any_variable_of_the_state_raises(layer, index):
    networks = replica_run.build_networks("siglip")
    state = TrainState.create(replica_run.config("siglip", "momentum"), networks)
    loop._check_finite_weights(state, 7)
    variable = state.layers()[layer].variables[index]
    variable.assign(np.full(variable.shape, np.nan))
    with pytest.raises(loop.TrainingDiverged, match="finite after step 7"):
        loop._check_finite_weights(state, 7)
