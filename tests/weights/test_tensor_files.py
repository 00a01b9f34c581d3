# SPDX-License-Identifier: Apache-2.0
"""Files are recognised by their content, and read once."""

import shutil

import pytest

from contrastive.weights import loading, tensor_files
from tests.support import program
from tests.support.foreign import GOLDEN


def test_read_other_files_raises(tmp_path):
    path = tmp_path / "file"
    for content in (b"", b"text", b"\x08" + b"\0" * 7 + b"{"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="neither a pickle|Cannot read"):
            loading.load_encoder(str(path))


def test_main_published_file_is_parsed_once_until_it_changes(tmp_path, monkeypatch):
    """First for its architecture, then for its weights."""
    path = tmp_path / "encoder.pkl"
    shutil.copy(GOLDEN / "tiny_pretrain.pkl", path)
    parsed, read_pickle = [], tensor_files.unpickling.read_pickle

    def count(path):
        parsed.append(path)
        return read_pickle(path)

    monkeypatch.setattr(tensor_files.unpickling, "read_pickle", count)
    words = [
        "--train_mode=finetune",
        "--dataset=photo_patches",
        f"--checkpoint={path}",
        "--train_batch_size=8",
        "--train_steps=1",
    ]
    assert program.main(*words, f"--model_dir={tmp_path / 'run'}") == 0
    assert len(parsed) == 1
    loading.read_published(str(path))
    loading.read_published(str(path))
    assert len(parsed) == 2
    path.write_bytes((GOLDEN / "tiny_pretrain.pkl").read_bytes() + b"\0")
    loading.read_published(str(path))
    assert len(parsed) == 3
