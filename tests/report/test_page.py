# SPDX-License-Identifier: Apache-2.0
"""`report.html`: complete, escaped, self-contained; what it computes."""

import re

import numpy as np
import pytest
import tensorflow as tf

from contrastive.report import page as page_lib
from tests.support.report_page import HOSTILE, RUN, Page, make_sample


def _page(name="class"):
    sample = make_sample(name=name)
    scalars = {
        "train/loss": np.array([[0, 2.5], [10, 1.25], [20, np.nan]]),
        "train/probe_top_1_accuracy": np.array([[0, 0.25], [10, 0.625]]),
        f"train/{name}": np.array([[0, 1.0], [10, 3.0]]),
    }
    predictions = np.where(np.arange(60) < 6, 0, sample.labels)
    png = tf.io.encode_png(np.zeros((4, 8, 3), np.uint8)).numpy()
    return page_lib.render(
        f"title {name}",
        {"Encoder": name},
        [
            page_lib.results(
                {
                    "raw pixels": {"linear": [0.419]},
                    name: {"linear": [0.752], "few": [0.5, 0.6]},
                },
                caption=f"By {name}",
            ),
            page_lib.curves("Pretraining", scalars),
            page_lib.views(png, 1234),
            page_lib.embedding_map(sample),
            page_lib.neighbours(sample),
            page_lib.confusion(sample.labels, predictions, sample.class_names, of=name),
            page_lib.reproduction(["run.py", "--mode=probe"], [RUN]),
        ],
    )


@pytest.fixture(scope="module")
def text():
    return _page()


def test_page_shows_what_it_was_given(text):
    page = Page(text)
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
    page = Page(text)
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
    page = Page(text)
    names = {
        name for _, attributes in page.elements for name in attributes.get("class", "").split()
    }
    with open(page_lib.__file__.replace("page.py", "report.css")) as file:
        styled = set(re.findall(r"\.([a-z]+)\b(?=[^}]*{)", file.read()))
    assert styled - {"hue"} <= names | {"dim", "wrong"}
    assert {"map", "legend", "query", "thumb", "matrix"} <= styled


def test_page_loads_nothing(text):
    page = Page(text)
    for tag, attributes in page.elements:
        for name in ("src", "href", "action", "data"):
            value = attributes.get(name, "#")
            assert value.startswith(("#", "data:image/")), (tag, value)
    assert "//" not in re.sub(r"base64,[\w+/=]+", "", text).replace("// ", "")
    assert not re.findall(r"@import|url\((?!data:)", text)
    assert len(text) < 500_000


def test_names_are_escaped():
    text = _page(HOSTILE)
    text.encode()
    page, plain = Page(text), Page(_page())
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in plain.elements]
    assert not any(name.startswith("on") for _, a in page.elements for name in a)
    # They are there, as they are, but for what is no text.
    assert HOSTILE.replace("\udcff", "?") in page.text


def test_equal_input_gives_equal_bytes(text):
    assert _page() == text


def test_page_without_optional_content_says_why():
    sample = make_sample(count=8)
    page = Page(
        page_lib.render(
            "title",
            {},
            [
                page_lib.curves("Pretraining", {}),
                page_lib.views(None, 0),
                page_lib.embedding_map(sample),
                page_lib.neighbours(sample),
                page_lib.confusion(np.full(4, -1), np.zeros(4, int), "a", of=""),
            ],
        )
    )
    assert [a["id"] for a in page.all("section")] == ["left-out"]
    assert len(page.all("li")) == 5
    assert "Pretraining: TensorBoard's events have no curve" in page.text
    assert "Confusion: the test images have no labels" in page.text


def test_collapsed_embeddings_have_no_map():
    sample = make_sample()
    sample.embeddings[:] = sample.embeddings[0]
    assert "equal" in page_lib.embedding_map(sample).missing


def test_images_without_labels_are_shown_without_judgement():
    sample = make_sample(labelled=False)
    sections = [page_lib.embedding_map(sample), page_lib.neighbours(sample)]
    page = Page(page_lib.render("title", {}, sections))
    assert len([a for a in page.all("use") if "x" in a]) == 60
    assert not page.all("button")
    assert len(page.all("ol")) == 8
    assert not re.search("[✓✗]", page.text)


def test_neighbours_are_judged_by_their_class():
    sample = make_sample()
    # Where the first class lies, every other image is now of the second.
    sample.labels[::6] = 1
    nearest, _ = page_lib.nearest_neighbours(sample.embeddings, 8)
    agree = sample.labels[nearest] == sample.labels[:, None]
    firsts = [list(sample.labels).index(label) for label in range(3)]
    page = Page(page_lib.render("", {}, [page_lib.neighbours(sample)]))
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
    section = page_lib.confusion(labels, predictions, ["a", "b", "c"], of="It")
    page = Page(page_lib.render("", {}, [section]))
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
    section = page_lib.confusion(labels, predictions, names, of="It")
    page = Page(page_lib.render("", {}, [section]))
    cells = [text for text in page.texts if re.fullmatch(r"c?\d+( %)?", text)]
    assert cells == ["c7", "c500", "3", "30 %", "c8", "c501", "1", "10 %"]
