# SPDX-License-Identifier: Apache-2.0
"""Compilation for a TPU, and the arithmetic of its figures."""

import dataclasses
import importlib.util

import pytest

from contrastive.devices import tpu_compilation, tpu_compiler
from tests.support import processes, tpu_steps


def test_roofline_of_a_chip_of_two_cores_is_of_one_replica():
    (v3,) = (chip for chip in tpu_compilation.CHIPS if chip.name == "v3")
    step = dataclasses.replace(tpu_steps.COMPILED, flops=123e12, bytes_accessed=450e9)
    # A replica is one of the two cores of a v3 chip.
    assert tpu_compilation.roofline(step, v3) == pytest.approx((2.0, 1.0))


def test_recomputation_of_a_larger_batch_ignores_the_loss_growth():
    small = dataclasses.replace(tpu_steps.COMPILED, flops=95.0, written_flops=100.0)
    large = dataclasses.replace(tpu_steps.COMPILED, flops=1140.0, written_flops=1000.0)
    assert tpu_compilation.recomputation(large, small) == pytest.approx(0.2)


def test_compile_for_aborting_compiler_returns_a_crash(tmp_path, monkeypatch):
    script = tmp_path / "aborts.py"
    script.write_text("import os, sys\nsys.stderr.write('F0000 check\\n')\n"
                      "sys.stderr.flush()\nos.abort()\n")  # fmt: skip
    monkeypatch.setattr(tpu_compiler, "__file__", str(script))
    compiled = tpu_compilation.compile_for(tpu_compilation.find_slice("v5e:2x2"), b"")
    assert not compiled.fits
    assert compiled.crashed
    assert "SIGABRT" in compiled.error
    assert "F0000 check" in compiled.error


def test_require_compiler_missing_packages_raises(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match="pip install -r requirements/check"):
        tpu_compilation.require_compiler()


@tpu_steps.needs_compiler
def test_require_compiler_another_jax_raises(monkeypatch):
    pinned = (processes.ROOT / "requirements/check-tpu.txt").read_text()
    assert f"jax=={tpu_compiler.JAX_VERSION}\n" in pinned
    tpu_compilation.require_compiler()
    monkeypatch.setattr(tpu_compiler, "JAX_VERSION", "0.9.0")
    with pytest.raises(ValueError, match="needs jax 0.9.0, not"):
        tpu_compilation.require_compiler()
