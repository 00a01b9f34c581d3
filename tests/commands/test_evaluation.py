# SPDX-License-Identifier: Apache-2.0
"""Evaluation of a pretrained run, through the command line."""

import csv
import json
import shutil

import numpy as np
import pytest
import tensorflow as tf

from contrastive.commands import session, train
from contrastive.evaluation import probe
from contrastive.training import loop
from tests.support import program

_SMALL = [
    "--dataset=photo_patches",
    "--train_batch_size=32",
    "--train_summary_steps=0",
]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pretrained") / "run"
    code = program.main(
        f"--model_dir={directory}",
        *_SMALL,
        "--resnet_depth=10",
        "--width_multiplier=0.125",
        "--image_size=16",
        "--objective=simclr",
        "--proj_out_dim=16",
        "--train_steps=2",
    )
    assert code == 0
    return directory


@pytest.fixture(scope="module")
def linear(pretrained, tmp_path_factory):
    """The seed programs' way: the train worker on a root of its own."""
    directory = tmp_path_factory.mktemp("linear") / "root"
    code = program.main(
        "--mode=train",
        "--preset=linear_eval_deepmind",
        f"--checkpoint={pretrained}",
        f"--model_dir={directory}",
        *_SMALL,
        "--train_steps=3",
    )
    assert code == 0
    return directory


def _tensors(directory, step):
    reader = tf.train.load_checkpoint(f"{directory}/ckpt-{step}")
    return {
        name: reader.get_tensor(name)
        for name in reader.get_variable_to_shape_map()
        if name.startswith(("encoder/", "classifier/"))
    }


def test_linear_evaluation_moves_nothing_of_the_encoder(pretrained, linear):
    before, after = _tensors(pretrained, 2), _tensors(linear, 3)
    keys = [key for key in before if key.startswith("encoder/")]
    assert len(keys) == 65
    for key in keys:
        assert before[key].tobytes() == after[key].tobytes(), key
    assert any(key.startswith("classifier/") for key in after)
    record = json.loads((linear / "run.json").read_text())
    assert record["flags"]["train_mode"] == "finetune"
    assert record["flags"]["learning_rate"] == 0.3
    assert record["flags"]["checkpoint_minutes"] == 5
    assert "chelsea" in record["class_names"]


def test_a_second_worker_evaluates_on_the_same_root(linear, monkeypatch):
    # The first that it sees is removed before it can be read.
    seen = iter([str(linear / "ckpt-1"), str(linear / "ckpt-3")])
    monkeypatch.setattr(tf.train, "checkpoints_iterator", lambda *_, **__: seen)
    assert program.main("--mode=eval", f"--model_dir={linear}") == 0
    result = json.loads((linear / "result_3.json").read_text())
    assert result["train_mode"] == "finetune"
    assert result["num_examples"] == 2000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--checkpoint=none"], "checkpoint: "),
        (["--optimizer=adam"], "is of another run"),
    ],
)
def test_a_run_goes_on_as_it_began(linear, pretrained, words, message, capsys):
    before = (linear / "run.json").read_bytes()
    code = program.main(
        "--mode=train",
        "--preset=linear_eval_deepmind",
        f"--checkpoint={pretrained}",
        f"--model_dir={linear}",
        *_SMALL,
        "--train_steps=6",
        *words,
    )
    assert code == 2
    assert message in capsys.readouterr().err
    assert (linear / "run.json").read_bytes() == before


def test_checkpoints_are_saved_on_a_time_interval(pretrained, tmp_path, monkeypatch):
    now = [0.0]

    def monotonic():
        now[0] += 20.0
        return now[0]

    monkeypatch.setattr(loop.time, "monotonic", monotonic)
    code = program.main(
        "--preset=linear_eval_deepmind",
        f"--checkpoint={pretrained}",
        f"--model_dir={tmp_path}",
        *_SMALL,
        "--train_steps=7",
        "--steps_per_loop=1",
        "--checkpoint_minutes=2",
        "--checkpoint_steps=1",
        "--keep_checkpoint_max=9",
    )
    assert code == 0
    steps = {int(p.stem.split("-")[1]) for p in tmp_path.glob("ckpt-*.index")}
    # A step takes 3 looks at the clock, of 20 s each.
    assert steps == {2, 4, 6, 7}


def test_a_sweep_is_decided_on_held_out_training_images(pretrained, tmp_path, monkeypatch):
    trained, seen = [], []
    create_state, evaluate = train.create_state, session.evaluate

    def recorded_state(run, config):
        trained.append(run.train_data)
        return create_state(run, config)

    def recorded(of, networks, dataset, *more):
        seen.append((trained[-1], dataset))
        return evaluate(of, networks, dataset, *more)

    monkeypatch.setattr(train, "create_state", recorded_state)
    monkeypatch.setattr(session, "evaluate", recorded)
    words = [
        "--mode=train_then_eval",
        "--preset=linear_eval_byol",
        "--sweep_learning_rate=0.00001,2",
        f"--checkpoint={pretrained}",
        f"--model_dir={tmp_path}",
        *_SMALL,
        "--train_steps=12",
    ]
    assert program.main(*words) == 0
    *trials, final = seen
    for train_data, held_out in trials:
        assert (train_data.num_examples, held_out.num_examples) == (9000, 1000)
        assert not np.intersect1d(train_data.ids, held_out.ids).size
        assert (train_data.split, held_out.split) == ("train", "train")
    assert final[0].num_examples == 10_000
    assert final[1].split == "test"
    found = json.loads((tmp_path / "sweep.json").read_text())
    low, high = found["held_out_top_1_accuracy"].values()
    assert high > low
    assert found["chosen"]["learning_rate"] == 2
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["flags"]["learning_rate"] == 2
    assert record["sources"]["learning_rate"] == "sweep"
    # The same again takes up what is there.
    result = (tmp_path / "result.json").read_text()
    monkeypatch.setattr(loop.CompiledLoop, "__call__", lambda *_: pytest.fail("trained"))
    assert program.main(*words) == 0
    assert (tmp_path / "result.json").read_text() == result


def test_a_rate_that_diverges_is_not_chosen(pretrained, tmp_path, monkeypatch):
    def diverging(config, state, make_stream, strategy, checkpoints, *_):
        if config.peak_learning_rate > 100:
            raise loop.TrainingDiverged("as said")
        checkpoints.save(config.train_steps)

    monkeypatch.setattr(loop, "train", diverging)
    code = program.main(
        "--preset=linear_eval_byol",
        "--sweep_learning_rate=1e6,0.1",
        f"--checkpoint={pretrained}",
        f"--model_dir={tmp_path}",
        *_SMALL,
        "--train_steps=3",
    )
    assert code == 0
    found = json.loads((tmp_path / "sweep.json").read_text())
    assert found["held_out_top_1_accuracy"]["rate_1e+06-epochs_80"] == 0
    assert found["chosen"]["learning_rate"] == 0.1


def test_probe_prints_a_table_and_writes_all_numbers(pretrained, tmp_path, capsys):
    words = [
        "--mode=probe",
        f"--checkpoint={pretrained}",
        f"--model_dir={tmp_path}",
        "--probe_max_train=200",
        "--label_budgets=1",
        "--probe_seeds=2",
        "--eval_split=test[:100]",
    ]
    assert program.main(*words) == 0
    table = capsys.readouterr().out
    record = json.loads((tmp_path / "probe.json").read_text())
    names = [scores["name"] for scores in record["scores"]]
    assert names == ["raw pixels", "random encoder", "pretrained encoder"]
    for name in names:
        assert name in table
    assert len(record["scores"][0]["few_labels"]["1 a class"]) == 2
    assert record["num_train"] == 200
    assert record["num_test"] == 100
    assert record["flags"]["knn_k"] == 20
    assert list((tmp_path / "features").iterdir())
    assert not (pretrained / "probe.json").exists()


def test_probe_keeps_no_features_if_told_so(pretrained, monkeypatch):
    given = {}

    def measure(*_, **kwargs):
        given.update(kwargs)
        raise loop.Interrupted("Measured.", 0)

    monkeypatch.setattr(probe, "measure", measure)
    words = ["--mode=probe", f"--checkpoint={pretrained}"]
    for flag, expected in {
        "--feature_cache=none": None,
        f"--checkpoint={pretrained}": f"{pretrained}/features",
    }.items():
        program.main(*words, flag)
        assert given["cache"] == expected


@pytest.fixture
def folder(tmp_path):
    """Larger and smaller images than the network sees, and a broken one."""
    rng = np.random.default_rng(0)
    for name, side in {"b/x.png": 40, "a/y.png": 12, "a/z.png": 20}.items():
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image = rng.integers(0, 256, (side, side, 3)).astype(np.uint8)
        path.write_bytes(tf.io.encode_png(image).numpy())
    (tmp_path / "images" / "b" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    return tmp_path / "images"


def test_embed_writes_the_features_of_a_folder(pretrained, folder, tmp_path):
    code = program.main(
        "--mode=embed",
        f"--checkpoint={pretrained}",
        f"--input={folder}",
        f"--output={tmp_path}/e.npz",
    )
    assert code == 0
    with np.load(tmp_path / "e.npz") as found:
        assert found["name"].tolist() == ["a/y.png", "a/z.png", "b/x.png"]
        assert found["unreadable"].tolist() == ["b/broken.jpg"]
        assert found["embedding"].shape == (3, 64)
        assert np.std(found["embedding"], axis=0).max() > 0


def test_predict_names_the_classes_of_the_head(pretrained, linear, folder, tmp_path, capsys):
    code = program.main(
        "--mode=predict",
        f"--checkpoint={linear}",
        f"--input={folder}",
        "--top_k=2",
    )
    assert code == 0
    header, *rows = csv.reader(capsys.readouterr().out.splitlines())
    assert header[2:] == [
        "class_1", "probability_1", "class_2", "probability_2",
    ]  # fmt: skip
    assert [row[0] for row in rows] == ["a/y.png", "a/z.png", "b/x.png"]
    classes = json.loads((linear / "run.json").read_text())["class_names"]
    for row in rows:
        assert {row[2], row[4]} <= set(classes)
        assert 1 >= float(row[3]) >= float(row[5]) > 0
    # The same as the classifier's accuracy says.
    code = program.main(
        "--mode=predict",
        f"--checkpoint={linear}",
        "--input=photo_patches",
        "--input_split=test",
        f"--output={tmp_path}/p.npz",
    )
    assert code == 0
    program.main("--mode=eval", f"--model_dir={linear}")
    result = json.loads((linear / "result.json").read_text())
    with np.load(tmp_path / "p.npz") as found:
        top_1 = np.mean(found["class"][:, 0] == found["label"])
    assert top_1 == pytest.approx(result["top_1_accuracy"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--mode=embed --input=x", "--output"),
        ("--mode=embed --output=x.npz", "--input"),
        ("--mode=embed --input=photo_patches --output=x.txt", "x.txt"),
        ("--mode=predict --input=/nowhere", "/nowhere"),
        ("--mode=probe --label_budgets=1,many", "many"),
        ("--mode=probe --eval_split=nothing", "nothing"),
        (
            "--mode=train_then_eval --preset=linear_eval_byol "
            "--dataset=photo_patches --eval_split=nothing",
            "nothing",
        ),
    ],
)
def test_bad_input_is_one_line(pretrained, words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, "train", lambda *_: pytest.fail("training started"))
    assert program.main(f"--checkpoint={pretrained}", *words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("Error: ")
    assert message in error


def test_without_a_classifier_there_is_no_prediction(pretrained, tmp_path, capsys):
    shutil.copytree(pretrained, tmp_path / "run")
    record = json.loads((pretrained / "run.json").read_text())
    record["architecture"]["num_classes"] = 0
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    code = program.main(
        "--mode=predict",
        f"--checkpoint={tmp_path}/run",
        "--input=photo_patches",
    )
    assert code == 2
    assert "fine-tune an encoder first" in capsys.readouterr().err
