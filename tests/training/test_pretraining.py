# SPDX-License-Identifier: Apache-2.0
"""The pretraining step of every kind, through the command line."""

import numpy as np
import pytest

from tests.support import program, runs


def test_pretraining_in_bfloat16_trains_and_evaluates(tmp_path):
    code = program.main(
        f"--model_dir={tmp_path}",
        *runs.SMALL,
        "--mixed_precision",
        "--train_steps=2",
        "--mode=train_then_eval",
        "--eval_split=test[:200]",
    )
    assert code == 0


@pytest.mark.parametrize(
    "words",
    [
        "--objective=rpc",
        "--objective=wpc",
        "--objective=barlow_twins --proj_hidden_dim=16",
        "--objective=vicreg --proj_hidden_dim=16 --accumulate_steps=2",
        "--objective=relic --use_siglip --num_small_views=1",
        "--objective=relic --target_network=false --proj_hidden_dim=16,16",
    ],
)
def test_pretraining_of_each_kind_of_step_trains(words, tmp_path):
    words = [*runs.SMALL, *words.split(), "--train_steps=2"]
    words.append("--train_summary_steps=1")
    assert program.main(f"--model_dir={tmp_path}", *words) == 0
    scalars, _ = runs.scalars(tmp_path)
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


def test_pretraining_from_a_checkpoint_starts_its_target_there(pretrained, tmp_path):
    words = [*runs.SMALL, "--objective=byol", "--padding=fixed"]
    words += ["--proj_head_mode=nonlinear", "--proj_hidden_dim=16"]
    code = program.main(
        f"--model_dir={tmp_path}",
        f"--checkpoint={pretrained}",
        *words,
        "--learning_rate=0",
        "--train_steps=1",
    )
    assert code == 0
    before, after = runs.tensors(pretrained, 3), runs.tensors(tmp_path, 1)
    compared = 0
    for key, value in before.items():
        part, _, name = key.partition("/")
        if part in ("encoder", "projection") and "moving" not in name:
            # To the rounding of a step's moving average.
            np.testing.assert_allclose(after[f"target_{key}"], value, rtol=1e-6, err_msg=key)
            compared += 1
    assert compared > 40
