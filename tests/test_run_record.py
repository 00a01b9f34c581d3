# SPDX-License-Identifier: Apache-2.0
"""The record of a run is read without TensorFlow."""

from contrastive import run_record


def test_read_run_returns_what_write_run_wrote_or_none(tmp_path):
    assert run_record.read_run(str(tmp_path)) is None
    run_record.write_run(str(tmp_path / "a"), {"x": [1, 2]})
    assert run_record.read_run(str(tmp_path / "a")) == {"x": [1, 2]}
    assert run_record.read_run(str(tmp_path / "a" / "ckpt-1")) == {"x": [1, 2]}
    # A run may start from a file in its own directory.
    (tmp_path / "a" / "pretrain.pkl").write_bytes(b"")
    assert run_record.read_run(str(tmp_path / "a" / "pretrain.pkl")) is None


def test_read_run_remote_returns_what_write_run_wrote():
    run_record.write_run("ram://run_record/a", {"x": 1})
    assert run_record.read_run("ram://run_record/a") == {"x": 1}
    assert run_record.read_run("ram://run_record/a/ckpt-1") == {"x": 1}
    assert run_record.read_run("ram://run_record/b") is None
