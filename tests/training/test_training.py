# SPDX-License-Identifier: Apache-2.0
"""Whole runs: through the command line, killed, resumed, followed."""

import dataclasses
import json
import os
import re
import signal

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing import (
    plugin_event_accumulator as event_accumulator,
)

import data
import model
import resnet
import run
from contrastive.config import methods
from contrastive.sources import labelled
from contrastive.training import trainer
from tests.support import processes, program, replica_run

_SMALL = [
    "--dataset=photo_patches",
    "--resnet_depth=10",
    "--width_multiplier=0.125",
    "--image_size=16",
    "--train_batch_size=32",
    "--proj_out_dim=16",
    "--objective=simclr",
    "--warmup_epochs=0",
    "--learning_rate=0.5",
]
_STEPS = 80
_TRAIN = [
    *_SMALL,
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


def _tensors(directory, step=_STEPS):
    reader = tf.train.load_checkpoint(f"{directory}/ckpt-{step}")
    return {
        name: reader.get_tensor(name)
        for name in reader.get_variable_to_shape_map()
        # Of the file, not of the run.
        if name != "_CHECKPOINTABLE_OBJECT_GRAPH" and "save_counter" not in name
    }


def _scalars(directory, run_name=""):
    events = event_accumulator.EventAccumulator(
        os.path.join(directory, run_name), {"tensors": 0}
    )
    events.Reload()
    return {
        tag: [
            (event.step, float(tf.make_ndarray(event.tensor_proto)))
            for event in events.Tensors(tag)
        ]
        for tag in events.Tags()["tensors"]
        if tag != "augmented_views"
    }, [event.step for event in events.Tensors("augmented_views")]


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


def test_sigterm_saves_first(killed):
    _, log = killed
    assert "Interrupted. Saved at step" in log


def test_a_killed_run_ends_with_the_same_bits(killed, whole):
    got, expected = _tensors(killed[0]), _tensors(whole)
    assert set(got) == set(expected)
    assert len(got) > 100
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value, name)


def test_curves_are_unbroken_and_the_same(killed, whole):
    got, _ = _scalars(killed[0])
    expected, views = _scalars(whole)
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


def test_a_second_process_evaluates_until_training_is_done(killed, whole):
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
    events = event_accumulator.EventAccumulator(
        str(killed[0] / "eval"), {"tensors": 0}
    )
    events.Reload()
    points = events.Tensors("eval/top_1_accuracy")
    assert points[-1].step == _STEPS


def test_log_of_a_run_has_no_lines_of_libraries(whole):
    lines = (whole.parent / "log").read_text().splitlines()
    assert len(lines) > 5
    own = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} |  ")
    assert [line for line in lines if not own.match(line)] == []


def test_a_run_explains_itself(whole):
    record = json.loads((whole / "run.json").read_text())
    assert record["flags"]["temperature"] == 0.1
    assert record["sources"]["temperature"] == "simclr"
    assert record["sources"]["learning_rate"] == "command line"
    assert record["train_steps"] == _STEPS
    assert record["versions"]["tensorflow"] == tf.__version__
    assert record["architecture"]["resnet_depth"] == 10


# In this process, through `run.main`.


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pretrained") / "run"
    code = program.main(f"--model_dir={directory}", *_SMALL, "--train_steps=3")
    assert code == 0
    return directory


@pytest.mark.parametrize("after_block", [-1, 0, 2, 4])
def test_fine_tuning_moves_nothing_that_is_frozen(
    pretrained, tmp_path, after_block
):
    code = program.main(
        f"--model_dir={tmp_path}",
        f"--checkpoint={pretrained}",
        "--train_mode=finetune",
        "--mode=train_then_eval",
        f"--fine_tune_after_block={after_block}",
        "--dataset=photo_patches",
        "--eval_split=test[:200]",
        "--train_batch_size=32",
        "--train_steps=2",
    )
    assert code == 0
    before, after = _tensors(pretrained, 3), _tensors(tmp_path, 2)
    frozen = ["initial"]
    frozen += [f"block_group{i}_" for i in range(1, after_block + 1)]
    if after_block == -1:
        frozen = []
    keys = [key for key in before if key.startswith("encoder/")]
    assert len(keys) == 65
    for key in keys:
        same = np.array_equal(before[key], after[key])
        assert same == any(f"/{name}" in key for name in frozen), key
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["train_mode"] == "finetune"


def test_the_head_can_sit_on_any_layer_of_the_projection(pretrained, tmp_path):
    code = program.main(
        f"--model_dir={tmp_path}",
        f"--checkpoint={pretrained}",
        "--train_mode=finetune",
        "--ft_proj_selector=1",
        "--dataset=photo_patches",
        "--train_batch_size=32",
        "--train_steps=2",
    )
    assert code == 0
    before, after = _tensors(pretrained, 3), _tensors(tmp_path, 2)
    moved = {
        key
        for key in before
        if key.startswith("projection/")
        and not np.array_equal(before[key], after[key])
    }
    # The first layer of three, with its BatchNorm: kernel, gamma, beta and
    # two statistics.
    assert len(moved) == 5


def test_another_architecture_is_refused_with_the_differing_flag(
    pretrained, capsys
):
    words = [f"--model_dir={pretrained}", *_SMALL, "--train_steps=6"]
    assert program.main(*words, "--resnet_depth=18") == 2
    error = capsys.readouterr().err
    assert "resnet_depth: 10 there, 18 here" in error


def test_a_finished_run_says_so(pretrained, caplog):
    words = [f"--model_dir={pretrained}", *_SMALL, "--train_steps=3"]
    assert program.main(*words) == 0
    assert "Already trained: step 3 of 3" in caplog.text


def test_bfloat16_trains(tmp_path):
    code = program.main(
        f"--model_dir={tmp_path}",
        *_SMALL,
        "--mixed_precision",
        "--train_steps=2",
        "--mode=train_then_eval",
        "--eval_split=test[:200]",
    )
    assert code == 0


@pytest.mark.parametrize(
    "objective", ["simclr", pytest.param("semppl", marks=pytest.mark.slow)]
)
def test_the_step_compiles_under_xla_and_computes_the_same(objective, tmp_path):
    metrics = []
    for jit in ("true", "false"):
        directory = tmp_path / jit
        words = [*_SMALL, f"--jit_compile={jit}", "--train_steps=2"]
        words += [f"--objective={objective}", "--train_summary_steps=1"]
        assert program.main(f"--model_dir={directory}", *words) == 0
        metrics.append(_scalars(directory)[0])
    for tag in ("train/loss", "train/probe_loss", "train/effective_rank"):
        np.testing.assert_allclose(
            metrics[0][tag], metrics[1][tag], rtol=2e-2, err_msg=tag
        )


@pytest.mark.parametrize(
    "words",
    [
        "--objective=rpc",
        "--objective=wpc",
        "--objective=relic --use_siglip --num_small_views=1",
        "--objective=relic --target_network=false --proj_hidden_dim=16,16",
    ],
)
def test_the_other_kinds_of_step_train(words, tmp_path):
    words = [*_SMALL, *words.split(), "--train_steps=2"]
    words.append("--train_summary_steps=1")
    assert program.main(f"--model_dir={tmp_path}", *words) == 0
    scalars, _ = _scalars(tmp_path)
    if "--use_siglip" in words:
        # Both are trained, from relic-pytorch's and SigLIP's start.
        first, second = scalars["train/bias"]
        assert first == (1, -10)
        assert 0 < abs(second[1] + 10) < 0.1
        np.testing.assert_allclose(
            [value for _, value in scalars["train/temperature"]],
            np.exp(-1),
            atol=0.01,
        )


def test_pretraining_from_a_checkpoint_starts_its_target_there(
    pretrained, tmp_path
):
    words = [*_SMALL, "--objective=byol", "--padding=fixed"]
    words += ["--proj_head_mode=nonlinear", "--proj_hidden_dim=16"]
    code = program.main(
        f"--model_dir={tmp_path}",
        f"--checkpoint={pretrained}",
        *words,
        "--learning_rate=0",
        "--train_steps=1",
    )
    assert code == 0
    before, after = _tensors(pretrained, 3), _tensors(tmp_path, 1)
    compared = 0
    for key, value in before.items():
        part, _, name = key.partition("/")
        if part in ("encoder", "projection") and "moving" not in name:
            # To the rounding of a step's moving average.
            np.testing.assert_allclose(
                after[f"target_{key}"], value, rtol=1e-6, err_msg=key
            )
            compared += 1
    assert compared > 40


@pytest.mark.parametrize(
    "objective",
    [
        # A penalty, a trained critic, a queue and small views; the others.
        name
        if name in ("wpc", "siglip", "semppl")
        else pytest.param(name, marks=pytest.mark.slow)
        for name in methods.METHODS
    ],
)
def test_accumulated_gradients_are_those_of_the_whole_batch(
    objective, monkeypatch
):
    """Exactly, where BatchNorm is frozen: then rows do not know each other."""
    monkeypatch.setattr(model, "build_encoder", replica_run.small_encoder)
    dataset = replica_run.few_photo_patches()
    moved, metrics = [], []
    for parts in (1, 2):
        keras.utils.set_random_seed(0)
        networks = model.build_networks(replica_run.architecture(objective))
        for part in networks.models().values():
            for layer in getattr(part, "layers", ()):
                if isinstance(layer, resnet.GlobalBatchNorm):
                    layer.trainable = False
        config = dataclasses.replace(
            replica_run.config(objective, "momentum"),
            peak_learning_rate=1e-2,
            accumulate_steps=parts,
        )
        optimizers = trainer.build_optimizers(config, networks)
        strategy = tf.distribute.get_strategy()
        loop = trainer.CompiledLoop(
            strategy, trainer.build_step(config, networks, optimizers), False
        )
        before = {
            f"{name}/{v.path}": v.numpy()
            for name, part in networks.models().items()
            for v in part.variables
        }
        stream = data.train_stream(
            dataset,
            batch_size=config.batch_size,
            seed=config.seed,
            views=config.views,
        )
        metrics.append(loop(iter(stream), 2))
        moved.append(
            {
                f"{name}/{v.path}": v.numpy() - before[f"{name}/{v.path}"]
                for name, part in networks.models().items()
                for v in part.variables
            }
        )
    np.testing.assert_allclose(*metrics, rtol=1e-3, atol=1e-4)
    assert sum(np.any(change) for change in moved[0].values()) > 5
    for path, change in moved[0].items():
        error = np.linalg.norm(moved[1][path] - change)
        assert error <= 1e-2 * np.linalg.norm(change) + 5e-9, path


def test_images_without_a_label_are_not_counted(monkeypatch):
    monkeypatch.setattr(model, "build_encoder", replica_run.small_encoder)
    networks = model.build_networks(replica_run.architecture("simclr"))
    dataset = replica_run.few_photo_patches()
    source = dataset.source

    def measure(labels):
        changed = dataclasses.replace(
            dataset, source=data.Arrays(source.images, labels)
        )
        stream = data.eval_stream(changed, batch_size=16)
        strategy = tf.distribute.get_strategy()
        return trainer.evaluate(networks, stream, 32, strategy, None)

    _, all_rows = measure(source.labels)
    is_odd = np.arange(40) % 2 == 1
    measured, rows = measure(np.where(is_odd, source.labels, -1))
    assert measured["num_examples"] == 20
    np.testing.assert_array_equal(rows, all_rows[is_odd])
    accuracy = np.mean(rows[:, 1] == rows[:, 2])
    assert measured["top_1_accuracy"] == pytest.approx(accuracy)
    with pytest.raises(ValueError, match="no labelled image"):
        measure(np.full(40, -1))


def test_every_objective_has_a_row_and_an_alias_points_to_one():
    assert set(methods.ALIASES.values()) <= set(methods.METHODS)


@pytest.fixture(scope="module")
def semppl(tmp_path_factory):
    """SemPPL with all draws and memories: stopped and resumed, and whole."""
    folder = tmp_path_factory.mktemp("semppl")
    words = [
        *_SMALL,
        "--objective=semppl",
        "--labels_per_class=100",
        "--labelled_batch_share=0.25",
        "--saliency=spectral",
        "--mask_probability=0.5",
        "--num_large_views=2",
        "--num_small_views=1",
        "--proj_hidden_dim=16",
        "--queue_size=40",
        "--sempos_negatives=sempos",
        "--drop_same_label_negatives",
        "--train_split=train[:40%]",
        "--pseudo_label_start_epoch=0.032",  # 4 steps
        "--train_summary_steps=1",
    ]
    return _stopped_and_whole(folder, words)


def _stopped_and_whole(folder, words):
    """Returns two runs of 8 steps: one was stopped on the way and resumed."""
    words = [*words, "--steps_per_loop=1", "--train_steps=8"]
    train = trainer.train

    def stopping(*arguments):
        calls = iter(range(1, 100))
        train(
            *arguments[:-1],
            lambda: signal.SIGTERM if next(calls) == 5 else 0,
        )

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(trainer, "train", stopping)
        code = program.main(f"--model_dir={folder / 'stopped'}", *words)
        assert code == 128 + signal.SIGTERM
        patched.undo()
        # The choice is read back, not made again from all labels.
        patched.setattr(labelled, "choose", None)
        assert program.main(f"--model_dir={folder / 'stopped'}", *words) == 0
    assert program.main(f"--model_dir={folder / 'whole'}", *words) == 0
    return folder / "stopped", folder / "whole"


def test_a_bucket_is_a_directory():
    """TensorFlow's file system in memory stands for one of a cloud."""
    directory = "ram://bucket/run"
    words = [*_SMALL, "--mode=train_then_eval", f"--model_dir={directory}"]
    for steps in (2, 4):
        assert program.main(*words, f"--train_steps={steps}") == 0
    names = tf.io.gfile.listdir(directory)
    assert {"run.json", "report.html", "ckpt-2.index", "ckpt-4.index"} <= {
        *names
    }
    with tf.io.gfile.GFile(f"{directory}/result.json") as file:
        assert json.load(file)["global_step"] == 4


def test_signals_are_caught_while_training_alone():
    before = signal.getsignal(signal.SIGTERM)
    with run._Signals() as signals:
        assert signal.getsignal(signal.SIGTERM) == signals._receive
    assert signal.getsignal(signal.SIGTERM) == before


def test_resuming_restores_queue_target_and_draws(semppl):
    states = [_tensors(directory, 8) for directory in semppl]
    assert set(states[0]) == set(states[1])
    groups = {name.split("/")[0] for name in states[0]}
    assert {"queue", "target_encoder", "target_projection"} <= groups
    for name, value in states[1].items():
        np.testing.assert_array_equal(states[0][name], value, name)
    scalars, expected = (_scalars(directory)[0] for directory in semppl)
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
def test_resuming_restores_a_trained_temperature(tmp_path):
    words = [*_SMALL, "--objective=relic", "--use_siglip"]
    stopped, whole = (
        _tensors(directory, 8)
        for directory in _stopped_and_whole(tmp_path, words)
    )
    groups = {name.split("/")[0] for name in whole}
    assert {"critic", "critic_optimizer"} <= groups
    assert stopped.keys() == whole.keys()
    for name, value in whole.items():
        np.testing.assert_array_equal(stopped[name], value, name)


def test_the_target_can_be_fine_tuned_on_the_labelled_images(
    semppl, tmp_path, caplog
):
    code = program.main(
        f"--model_dir={tmp_path}",
        f"--checkpoint={semppl[1]}",
        "--train_mode=finetune",
        "--fine_tune_after_block=4",
        "--evaluate_target",
        "--train_on_labelled",
        "--dataset=photo_patches",
        "--train_split=train[:40%]",
        "--train_batch_size=32",
        "--train_steps=1",
    )
    assert code == 0
    ids = (semppl[1] / "labelled_ids.txt").read_text().split()
    assert len(ids) == 100 * 16
    assert "1,600 examples" in caplog.text
    before, after = _tensors(semppl[1], 8), _tensors(tmp_path, 1)
    keys = [key for key in after if key.startswith("encoder/")]
    assert len(keys) == 65
    for key in keys:
        np.testing.assert_array_equal(after[key], before[f"target_{key}"])
    online = [not np.array_equal(after[key], before[key]) for key in keys]
    assert sum(online) > 40


def test_evaluation_needs_nothing_that_only_pretraining_uses(semppl):
    assert program.main(f"--model_dir={semppl[1]}", "--mode=eval") == 0
    result = json.loads((semppl[1] / "result.json").read_text())
    assert result["global_step"] == 8
    assert result["num_examples"] == 2000


def test_ids_are_of_one_split(semppl, tmp_path, capsys):
    code = program.main(
        f"--model_dir={tmp_path}",
        f"--checkpoint={semppl[1]}",
        "--train_mode=finetune",
        "--train_on_labelled",
        "--dataset=photo_patches",
        "--train_split=train[50%:]",
    )
    assert code == 2
    assert "needs --train_split=train[:40%]" in capsys.readouterr().err


def _loss(objective, *, has_positive=False, **hyperparameters):
    """The loss of a row, of two large views' embeddings."""
    config = replica_run.config(objective, "momentum")
    views = config.views[:2]
    arguments = config.hyperparameters | hyperparameters
    config = dataclasses.replace(config, views=views, hyperparameters=arguments)
    rng = np.random.default_rng(0)
    online, target = (
        [tf.constant(rng.normal(size=(16, 8)), tf.float32) for _ in range(2)]
        for _ in range(2)
    )
    batch = {
        "id": tf.range(16, dtype=tf.int64),
        "epoch": tf.zeros([16], tf.int32),
    }
    more = {}
    if objective == "semppl":  # nothing in the queue
        more["semantic_positives"] = tf.zeros([2, 16, 3, 8])
        more["has_positive"] = tf.fill([16], has_positive)
    return float(trainer._loss(config, online, target, batch=batch, **more))


def test_methods_meet_at_their_limits():
    relic = _loss("relic", alpha=0.0, temperature=0.2)
    same = {
        "contrastive_weight": 1.0,
        "num_negatives": 0,
        "include_same_view": False,
        "average_pairs": False,
    }
    relicv2 = _loss("relicv2", alpha=0.0, **same)
    np.testing.assert_allclose(relicv2, relic, rtol=1e-6)
    # With an empty queue, and with its own terms off.
    relicv2 = _loss("relicv2")
    np.testing.assert_allclose(_loss("semppl"), relicv2, rtol=1e-6)
    off = {"semantic_weight": 0.0, "semantic_invariance": False}
    np.testing.assert_allclose(
        _loss("semppl", has_positive=True, **off), relicv2, rtol=1e-6
    )
    assert _loss("semppl", has_positive=True) != _loss("semppl")
