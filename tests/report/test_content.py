# SPDX-License-Identifier: Apache-2.0
"""The content of a report, from a probe and from the command line."""

import numpy as np
import pytest

import data
from contrastive import run_record
from contrastive.evaluation import probe
from contrastive.report import content
from tests.support import program
from tests.support.image_data import write_pictures
from tests.support.report_page import RUN, Page, make_sample


@pytest.mark.parametrize("is_own", [True, False])
def test_probe_has_a_report(tmp_path, is_own):
    sample = make_sample()
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
        record = RUN | {
            "flags": {"objective": "simclr", "dataset": "some"}
            | {"train_mode": "pretrain", "checkpoint": str(tmp_path)},
            "architecture": {"encoder": "resnet", "resnet_depth": 18}
            | {"width_multiplier": 0.5, "channels": 3},
            "sources": {},
            "train_steps": 1234,
        }
        run_record.write_run(str(tmp_path), record)
    scores = probe.Scores(
        name="pretrained encoder",
        dim=3,
        linear=0.75,
        inverse_l2=0.1,
        knn=0.5,
        few_labels={"1 a class": (0.25, 0.5)},
    )
    content.write_probe_report(
        content.Subject(
            model_dir=str(tmp_path / "probe"),
            dataset=dataset,
            dataset_name="some",
            image_size=8,
            crop_proportion=None,
            trained=str(tmp_path),
            command=["run.py", "--mode=probe"],
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
    page = Page((tmp_path / "probe" / "report.html").read_text())
    for words in ("75.0", "37.5 ± 12.5", "1 a class, 3 labels", "20-NN"):
        assert words in page.text
    title = "simclr on some" if is_own else tmp_path.name
    assert page.texts[: page.texts.index("Evaluated on")].count(title) == 2
    assert ("ResNet-18 x0.5" in page.text) == is_own
    assert ("1,234" in page.text) == is_own
    assert len(page.all("use")) == 60 + 3  # the map and its legend
    assert (tmp_path / "probe" / "projector" / "sprite.png").exists()


def test_report_of_hostile_names_shows_them(tmp_path):
    """Names of a folder, its classes, its files and a flag are HTML."""
    classes = ["<script>", "<b onclick=alert(1)>"]
    file_name = "\"'><img src=x onerror=alert(2)>"
    names = [f"{classes[i % 2]}/{file_name}{i}.png" for i in range(120)]
    folder = write_pictures(tmp_path / "<i>images", names, size=(8, 8))
    model_dir = tmp_path / "<script>alert(3)"
    code = program.main(
        "--mode=train_then_eval",
        f"--dataset={folder}",
        f"--model_dir={model_dir}",
        "--train_mode=finetune",
        "--checkpoint=none",
        "--resnet_depth=10",
        "--width_multiplier=0.125",
        "--train_batch_size=8",
        "--train_steps=2",
    )
    assert code == 0
    text = (model_dir / "report.html").read_text()
    page = Page(text)
    for name in (*classes, str(folder), str(model_dir)):
        assert name in page.text
    captions = [a.get("aria-label", "") for a in page.all("span")]
    assert any(f"{classes[0]}: " in c and file_name in c for c in captions)
    assert len(page.all("script")) == 1
    assert all(a["src"].startswith("data:image/") for a in page.all("img"))
    assert not any(k.startswith("on") for _, a in page.elements for k in a)
