# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning trains the classifier and what is not frozen, and no more."""

import json

import numpy as np
import pytest

from tests.support import program, runs


@pytest.mark.parametrize("after_block", [-1, 0, 2, 4])
def test_finetuning_moves_no_frozen_variable(pretrained, tmp_path, after_block):
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
    before, after = runs.tensors(pretrained, 3), runs.tensors(tmp_path, 2)
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


def test_finetuning_on_a_layer_of_the_projection_trains_up_to_it(pretrained, tmp_path):
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
    before, after = runs.tensors(pretrained, 3), runs.tensors(tmp_path, 2)
    moved = {
        key
        for key in before
        if key.startswith("projection/") and not np.array_equal(before[key], after[key])
    }
    # The first layer of three, with its BatchNorm: kernel, gamma, beta and two statistics.
    assert len(moved) == 5


def test_finetuning_of_the_target_on_labelled_images_starts_from_it(semppl, tmp_path, caplog):
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
    before, after = runs.tensors(semppl[1], 8), runs.tensors(tmp_path, 1)
    keys = [key for key in after if key.startswith("encoder/")]
    assert len(keys) == 65
    for key in keys:
        np.testing.assert_array_equal(after[key], before[f"target_{key}"])
    online = [not np.array_equal(after[key], before[key]) for key in keys]
    assert sum(online) > 40


def test_finetuning_on_labelled_images_of_another_split_is_refused(semppl, tmp_path, capsys):
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
