# SPDX-License-Identifier: Apache-2.0
"""Runs that several tests of training start from."""

import pytest

from tests.support import program, runs


@pytest.fixture(scope="package")
def pretrained(tmp_path_factory):
    """The directory of a SimCLR run of three steps."""
    directory = tmp_path_factory.mktemp("pretrained") / "run"
    words = [f"--model_dir={directory}", *runs.SMALL, "--train_steps=3"]
    assert program.main(*words) == 0
    return directory


@pytest.fixture(scope="package")
def semppl(tmp_path_factory):
    """Two SemPPL runs with all draws and states: one resumed, one whole."""
    folder = tmp_path_factory.mktemp("semppl")
    words = [
        *runs.SMALL,
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
    return runs.stopped_and_whole(folder, words)
