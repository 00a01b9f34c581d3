# SPDX-License-Identifier: Apache-2.0
"""Several machines, here processes that use gRPC, train one network."""

import json
import signal

import numpy as np
import pytest
import tensorflow as tf

from contrastive.training import checkpoints
from tests.support import cluster, processes

_FLAGS = [
    "--objective=simclr",
    "--dataset=photo_patches",
    "--resnet_depth=10",
    "--width_multiplier=0.125",
    "--train_batch_size=16",
    "--learning_rate=0.1",
    "--steps_per_loop=1",
]
_LOST = 75


def _start(config, model_dir, *more, pause_at=None):
    return processes.Process(
        *(("tests/support/pausing_run.py", pause_at) if pause_at else ("run.py",)),
        *_FLAGS,
        f"--model_dir={model_dir}",
        *more,
        environment={"TF_CONFIG": config},
    )


def _finish(started, code=0):
    """Returns logs."""
    return [process.finish(code).stderr for process in started]


def _train(count, model_dir, *more):
    configs = cluster.tf_configs(count) if count > 1 else [None]
    return _finish([_start(c, model_dir, *more) for c in configs])


def _tensors(model_dir):
    prefix = checkpoints.latest_checkpoint(str(model_dir))
    reader = tf.train.load_checkpoint(prefix)
    return {
        name: reader.get_tensor(name)
        for name, dtype in reader.get_variable_to_dtype_map().items()
        if dtype != tf.string
    }


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_train_on_workers_ends_as_on_one_machine(count, tmp_path):
    flags = ["--train_steps=4", "--mode=train_then_eval"]
    _train(1, tmp_path / "one", *flags)
    _train(count, tmp_path / "several", *flags)
    one, several = (_tensors(tmp_path / n) for n in ("one", "several"))
    assert one.keys() == several.keys()
    for name, value in one.items():
        size = np.linalg.norm(value)
        error = np.linalg.norm(several[name] - value)
        assert error <= 2e-3 * size + 1e-4, name
    files = [
        {path.name for path in (tmp_path / n).iterdir() if "." in path.name}
        for n in ("one", "several")
    ]
    events, report = ({f.split(".")[0] for f in names} for names in files)
    assert events == report
    results = [json.loads((tmp_path / n / "result.json").read_text()) for n in ("one", "several")]
    assert results[0]["num_examples"] == results[1]["num_examples"] == 2000
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], rel=1e-2)


@pytest.mark.slow
def test_train_on_workers_only_the_chief_writes(tmp_path):
    """Each has its own directory here, from which they cannot resume."""
    folders = [tmp_path / str(i) for i in range(2)]

    def train(steps, code):
        started = [
            _start(config, folder, f"--train_steps={steps}")
            for config, folder in zip(cluster.tf_configs(2), folders, strict=True)
        ]
        return _finish(started, code)

    train(2, code=0)
    assert (folders[0] / "run.json").exists()
    assert not folders[1].exists() or not list(folders[1].iterdir())
    # The second starts from nothing, the first resumes from step 2.
    for log in train(4, code=2):
        assert "different steps, [0, 2]: --model_dir must be" in log


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_train_after_a_killed_worker_resumes_the_same_bits(victim, tmp_path):
    flags = ["--train_steps=100", "--checkpoint_steps=10"]
    _train(2, tmp_path / "whole", *flags)
    killed = tmp_path / "killed"
    started = [
        _start(config, killed, *flags, pause_at=20 if index == victim else None)
        for index, config in enumerate(cluster.tf_configs(2))
    ]
    started[victim].wait_for_log("Paused.")
    started[victim].send(signal.SIGKILL)
    started[victim].finish(-signal.SIGKILL)
    log = started[1 - victim].finish(_LOST).stderr
    assert "resumes from the last checkpoint" in log
    _train(2, killed, *flags)
    whole, resumed = _tensors(tmp_path / "whole"), _tensors(killed)
    for name, value in whole.items():
        np.testing.assert_array_equal(resumed[name], value, name)


@pytest.mark.slow
def test_train_after_a_signal_to_one_worker_stops_all(tmp_path):
    flags = ["--train_steps=100000", "--checkpoint_steps=20"]
    started = [_start(c, tmp_path, *flags) for c in cluster.tf_configs(2)]
    started[1].wait_until((tmp_path / "ckpt-20.index").exists)
    started[1].send(signal.SIGTERM)
    for log in _finish(started, 128 + signal.SIGTERM):
        assert "Interrupted. Saved at step" in log


def test_train_on_replicas_resumed_ends_with_the_same_bits(tmp_path):
    flags = [
        "--cpu_replicas=2",
        "--learning_rate_schedule=constant",
        "--warmup_epochs=0",
        "--mode=train_then_eval",
        "--eval_split=test[:300]",
        "--eval_batch_size=255",  # does not divide, and need not
    ]
    half, whole = (["--train_steps=2", *flags], ["--train_steps=4", *flags])
    _finish(
        [
            _start(None, tmp_path / "whole", *whole),
            _start(None, tmp_path / "parts", *half),
        ]
    )
    _train(1, tmp_path / "parts", *whole)
    whole, parts = (_tensors(tmp_path / name) for name in ("whole", "parts"))
    del whole["save_counter/.ATTRIBUTES/VARIABLE_VALUE"]
    for name, value in whole.items():
        np.testing.assert_array_equal(parts[name], value, name)


def test_probe_on_workers_is_refused(tmp_path):
    process = _start(
        cluster.tf_configs(2)[0],
        tmp_path,
        "--mode=probe",
        f"--checkpoint={tmp_path}",
    )
    assert "--mode=probe runs on one" in process.finish(2).stderr
