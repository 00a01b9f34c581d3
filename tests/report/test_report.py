# SPDX-License-Identifier: Apache-2.0
"""`report.html`: complete, escaped, self-contained; what it computes."""

import html.parser
import re
import sys
import types

import numpy as np
import pytest
import tensorflow as tf

import data
from contrastive.evaluation import features, probe
from contrastive.report import report, run_report
from contrastive.weights import checkpoint

_HOSTILE = "</script><img src=x onerror=\"alert('&amp;')\">\t\n\udcff"
_VOID = {"meta", "img", "br", "link", "input"}
_RUN = {
    "command": ["/anywhere/run.py", "--dataset=a folder/", f"--x={_HOSTILE}"],
    "flags": {"dataset": "a folder/", "seed": 0, "objective": "simclr"},
    "sources": {
        "dataset": "command line",
        "seed": "default",
        "objective": "preset",
    },
    "versions": {"python": "3.11"},
    "commit": "c0ffee",
    "devices": ["CPU:0"],
}


class _Page(html.parser.HTMLParser):
    """Checks that elements nest; collects them and their text."""

    def __init__(self, text):
        super().__init__()
        self._open, self.elements, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert not self._open
        self.text = "".join(self.texts)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.elements.append((tag, attributes))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, text):
        if self._open[-1:] not in (["style"], ["script"]):
            self.texts.append(text)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def _sample(num_classes=3, count=60, labelled=True, name="class"):
    """Images whose embeddings are near the axis of their class."""
    random = np.random.default_rng(0)
    labels = np.arange(count) % num_classes
    noise = 0.1 * random.normal(size=(count, num_classes))
    return report.Sample(
        images=random.integers(0, 256, (count, 8, 8, 3), np.uint8),
        embeddings=(np.eye(num_classes)[labels] + noise).astype(np.float32),
        labels=labels if labelled else np.full(count, -1),
        names=[f"{name} {i}" for i in range(count)],
        class_names=[f"{name} {i}" for i in range(num_classes)]
        if labelled
        else (),
    )


def _page(name="class"):
    sample = _sample(name=name)
    scalars = {
        "train/loss": np.array([[0, 2.5], [10, 1.25], [20, np.nan]]),
        "train/probe_top_1_accuracy": np.array([[0, 0.25], [10, 0.625]]),
        f"train/{name}": np.array([[0, 1.0], [10, 3.0]]),
    }
    predictions = np.where(np.arange(60) < 6, 0, sample.labels)
    png = tf.io.encode_png(np.zeros((4, 8, 3), np.uint8)).numpy()
    return report.page(
        f"title {name}",
        {"Encoder": name},
        [
            report.results(
                {
                    "raw pixels": {"linear": [0.419]},
                    name: {"linear": [0.752], "few": [0.5, 0.6]},
                },
                caption=f"By {name}",
            ),
            report.curves("Pretraining", scalars),
            report.views(png, 1234),
            report.embedding_map(sample),
            report.neighbours(sample),
            report.confusion(
                sample.labels, predictions, sample.class_names, of=name
            ),
            report.reproduction(["run.py", "--mode=probe"], [_RUN]),
        ],
    )


@pytest.fixture(scope="module")
def text():
    return _page()


def test_page_shows_what_it_was_given(text):
    page = _Page(text)
    titles = [
        "Results", "Pretraining", "Augmented views", "Map of embeddings",
        "Nearest neighbours", "Confusion", "How to reproduce it",
    ]  # fmt: skip
    links = [a["href"] for a in page.all("a")]
    ids = {a.get("id") for _, a in page.elements}
    assert len(links) == len(titles)
    assert all(link.startswith("#") and link[1:] in ids for link in links)
    for words in (
        *titles, "title class", "raw pixels", "41.9", "75.2", "55.0 ± 5.0",
        "1.25", "62.5 %",
        "step 1,234", "t-SNE of 60 test images", "class 2",
        "c0ffee", "python 3.11", "--mode=probe",
    ):  # fmt: skip
        assert words in page.text, words
    # Flags that are no defaults alone, and a command that a shell reads back.
    assert "--objective" in page.text
    assert "--seed" not in page.text
    assert "python run.py \\\n  '--dataset=a folder/'" in page.text
    points = [a for a in page.all("use") if "x" in a]
    assert len(points) == 60
    assert all(0 <= float(a["x"]) <= 640 for a in points)
    assert all(0 <= float(a["y"]) <= 480 for a in points)


def test_page_can_be_heard_and_reached(text):
    page = _Page(text)
    assert page.all("html") == [{"lang": "en"}]
    assert all(a["alt"] for a in page.all("img"))
    assert all(a["aria-label"] for a in page.all("svg") if "role" in a)
    assert len(page.all("table")) == len(page.all("caption"))
    assert [a["aria-pressed"] for a in page.all("button")] == ["false"] * 3
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    # A query and its neighbours can be told apart without colours or eyes.
    labels = [a.get("aria-label", "") for a in page.all("span")]
    assert sum(label.endswith(", query") for label in labels) == 3
    marks = [label for label in labels if label.endswith((" right", " wrong"))]
    assert len(marks) == 3 * 8
    assert page.text.count("✓") + page.text.count("✗") == 3 * 8 + 2


def test_style_is_of_what_is_there(text):
    page = _Page(text)
    names = {
        name
        for _, attributes in page.elements
        for name in attributes.get("class", "").split()
    }
    with open(report.__file__.replace(".py", ".css")) as file:
        styled = set(re.findall(r"\.([a-z]+)\b(?=[^}]*{)", file.read()))
    assert styled - {"hue"} <= names | {"dim", "wrong"}
    assert {"map", "legend", "query", "thumb", "matrix"} <= styled


def test_page_loads_nothing(text):
    page = _Page(text)
    for tag, attributes in page.elements:
        for name in ("src", "href", "action", "data"):
            value = attributes.get(name, "#")
            assert value.startswith(("#", "data:image/")), (tag, value)
    assert "//" not in re.sub(r"base64,[\w+/=]+", "", text).replace("// ", "")
    assert not re.findall(r"@import|url\((?!data:)", text)
    assert len(text) < 500_000


def test_names_are_escaped():
    text = _page(_HOSTILE)
    text.encode()
    page, plain = _Page(text), _Page(_page())
    assert [tag for tag, _ in page.elements] == [
        tag for tag, _ in plain.elements
    ]
    assert not any(
        name.startswith("on") for _, a in page.elements for name in a
    )
    # They are there, as they are, but for what is no text.
    assert _HOSTILE.replace("\udcff", "?") in page.text


def test_equal_input_gives_equal_bytes(text):
    assert _page() == text


def test_what_is_missing_is_left_out_and_said_why():
    sample = _sample(count=8)
    page = _Page(
        report.page(
            "title",
            {},
            [
                report.curves("Pretraining", {}),
                report.views(None, 0),
                report.embedding_map(sample),
                report.neighbours(sample),
                report.confusion(np.full(4, -1), np.zeros(4, int), "a", of=""),
            ],
        )
    )
    assert [a["id"] for a in page.all("section")] == ["left-out"]
    assert len(page.all("li")) == 5
    assert "Pretraining: TensorBoard's events have no curve" in page.text
    assert "Confusion: the test images have no labels" in page.text


def test_collapsed_embeddings_have_no_map():
    sample = _sample()
    sample.embeddings[:] = sample.embeddings[0]
    assert "equal" in report.embedding_map(sample).missing


def test_images_without_labels_are_shown_without_judgement():
    sample = _sample(labelled=False)
    sections = [report.embedding_map(sample), report.neighbours(sample)]
    page = _Page(report.page("title", {}, sections))
    assert len([a for a in page.all("use") if "x" in a]) == 60
    assert not page.all("button")
    assert len(page.all("ol")) == 8
    assert not re.search("[✓✗]", page.text)


def test_neighbours_are_judged_by_their_class():
    sample = _sample()
    # Where the first class lies, every other image is now of the second.
    sample.labels[::6] = 1
    nearest, _ = report.nearest_neighbours(sample.embeddings, 8)
    agree = sample.labels[nearest] == sample.labels[:, None]
    firsts = [list(sample.labels).index(label) for label in range(3)]
    page = _Page(report.page("", {}, [report.neighbours(sample)]))
    assert f"Of all neighbours, {100 * agree.mean():.1f} %" in page.text
    marks = [text == "✓" for text in page.texts if text in ("✓", "✗")]
    np.testing.assert_array_equal(marks, agree[firsts].ravel())
    assert 0 < sum(marks) < len(marks)
    kinds = [a.get("class") for a in page.all("li")]
    assert kinds.count("right") == sum(marks)
    labels = [a.get("aria-label", "") for a in page.all("span")]
    assert sum(text.endswith(", right") for text in labels) == sum(marks)


def test_confusion_of_few_classes_is_a_matrix():
    labels = np.array([0, 0, 0, 0, 1, -1])
    predictions = np.array([0, 0, 0, 1, 1, 0])
    section = report.confusion(labels, predictions, ["a", "b", "c"], of="It")
    page = _Page(report.page("", {}, [section]))
    titles = [a["title"] for a in page.all("td") if "title" in a]
    assert titles[:2] == [
        "a taken for a: 75.0 % of 4",
        "a taken for b: 25.0 % of 4",
    ]
    assert titles[4] == "b taken for b: 100.0 % of 1"
    assert len(titles) == 9
    assert "It, 5 test images." in page.text


def test_confusion_of_many_classes_is_a_list_of_the_most_frequent():
    labels = np.repeat(np.arange(1000), 10)
    predictions = labels.copy()
    predictions[70:73] = 500
    predictions[80] = 501
    names = [f"c{i}" for i in range(1000)]
    section = report.confusion(labels, predictions, names, of="It")
    page = _Page(report.page("", {}, [section]))
    cells = [text for text in page.texts if re.fullmatch(r"c?\d+( %)?", text)]
    assert cells == ["c7", "c500", "3", "30 %", "c8", "c501", "1", "10 %"]


def test_choice_is_of_few_classes_and_always_the_same():
    labels = np.repeat(np.arange(-1, 100), 50)
    chosen = report.choose(labels, limit=200)
    np.testing.assert_array_equal(chosen, np.unique(chosen))
    assert len(chosen) == 200
    classes = np.unique(labels[chosen])
    assert len(classes) == 20
    assert (classes.min(), classes.max()) == (0, 99)
    np.testing.assert_array_equal(chosen, report.choose(labels, limit=200))
    assert len(report.choose(np.full(7, -1))) == 7


def test_neighbours_are_those_of_the_greatest_cosine():
    random = np.random.default_rng(0)
    x = random.normal(size=(20, 4)) * random.uniform(1, 9, (20, 1))
    nearest, cosines = report.nearest_neighbours(x, 3)
    for i in range(20):
        of_i = [
            -np.inf
            if i == j
            else x[i] @ x[j] / np.linalg.norm(x[i]) / np.linalg.norm(x[j])
            for j in range(20)
        ]
        np.testing.assert_array_equal(nearest[i], np.argsort(of_i)[:-4:-1])
        np.testing.assert_allclose(cosines[i], np.sort(of_i)[:-4:-1])


def test_map_keeps_classes_together():
    sample = _sample(count=90)
    points = report.project(sample.embeddings)
    distances = np.linalg.norm(points[:, None] - points, axis=-1)
    np.fill_diagonal(distances, np.inf)
    nearest = distances.argmin(1)
    assert (sample.labels[nearest] == sample.labels).mean() > 0.95


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_sample_is_of_the_chosen_images(tmp_path, channels):
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (9, 6, 6, channels), np.uint8)
    path = str(tmp_path / "some.npz")
    np.savez(path, images=images, labels=np.arange(9) % 2)
    dataset = data.load(path, "all", channels=channels)
    outputs = features.compute_outputs(None, data.subset(dataset, [2, 3, 7]), 6)
    sample = run_report.take_sample(dataset, outputs, 6)
    np.testing.assert_array_equal(sample.embeddings, outputs.values)
    np.testing.assert_allclose(
        sample.images.mean((1, 2, 3)) / 255,
        outputs.values.mean(1),
        atol=3e-3,
    )
    np.testing.assert_array_equal(sample.labels, [0, 1, 1])
    assert sample.names == ["example 2", "example 3", "example 7"]
    assert sample.class_of(1) == "1"
    if channels == 3:
        np.testing.assert_array_equal(sample.images, images[[2, 3, 7]])
    assert sample.images.shape == (3, 6, 6, 3)


def test_large_images_are_shown_small():
    images = np.full((1, 200, 200, 3), 200, np.uint8)
    dataset = data.Dataset(
        name="large",
        split="test",
        source=data.Arrays(images, np.array([-1])),
        num_examples=1,
        class_names=(),
        channels=3,
        image_size=(200, 200),
        file_names=("a/b.png",),
    )
    outputs = features.Outputs(
        values=np.ones((1, 4)), labels=np.array([-1]), ids=np.array([0])
    )
    sample = run_report.take_sample(dataset, outputs, 200)
    np.testing.assert_array_equal(
        sample.images, np.full((1, 96, 96, 3), 200, np.uint8)
    )
    assert sample.names == ["a/b.png"]
    assert sample.class_of(0) == ""


def test_page_is_written(tmp_path):
    path = report.write(str(tmp_path / "new"), "<p>ü</p>")
    assert path == str(tmp_path / "new" / "report.html")
    with open(path, encoding="utf-8") as file:
        assert file.read() == "<p>ü</p>"


@pytest.mark.parametrize("is_own", [True, False])
def test_probe_has_a_report(tmp_path, monkeypatch, is_own):
    monkeypatch.setattr(sys, "argv", ["run.py", "--mode=probe"])
    sample = _sample()
    dataset = data.Dataset(
        name="some",
        split="test",
        source=data.Arrays(sample.images, sample.labels),
        num_examples=60,
        class_names=tuple(sample.class_names),
        channels=3,
        image_size=(8, 8),
    )
    if is_own:
        record = _RUN | {
            "flags": {"objective": "simclr", "dataset": "some"}
            | {"train_mode": "pretrain", "checkpoint": str(tmp_path)},
            "architecture": {"encoder": "resnet", "resnet_depth": 18}
            | {"width_multiplier": 0.5, "channels": 3},
            "sources": {},
            "train_steps": 1234,
        }
        checkpoint.write_run(str(tmp_path), record)
    scores = probe.Scores(
        name="pretrained encoder",
        dim=3,
        linear=0.75,
        inverse_l2=0.1,
        knn=0.5,
        few_labels={"1 a class": (0.25, 0.5)},
    )
    run_report.of_probe(
        types.SimpleNamespace(
            settings=types.SimpleNamespace(
                model_dir=str(tmp_path / "probe"),
                checkpoint=str(tmp_path),
                dataset="some",
                image_size=8,
            ),
            eval_data=dataset,
            eval_crop=None,
        ),
        probe.Results(
            scores=(scores,),
            dataset="some",
            train_split="train",
            test_split="test",
            class_names=dataset.class_names,
            num_train=100,
            num_labels={"1 a class": 3},
            knn_k=20,
            knn_temperature=0.07,
            test_ids=np.arange(60),
            test_features=sample.embeddings,
            test_labels=sample.labels,
            test_predictions=sample.labels,
        ),
    )
    page = _Page((tmp_path / "probe" / "report.html").read_text())
    for words in ("75.0", "37.5 ± 12.5", "1 a class, 3 labels", "20-NN"):
        assert words in page.text
    title = "simclr on some" if is_own else tmp_path.name
    assert page.texts[: page.texts.index("Evaluated on")].count(title) == 2
    assert ("ResNet-18 x0.5" in page.text) == is_own
    assert ("1,234" in page.text) == is_own
    assert len(page.all("use")) == 60 + 3  # the map and its legend
    assert (tmp_path / "probe" / "projector" / "sprite.png").exists()
