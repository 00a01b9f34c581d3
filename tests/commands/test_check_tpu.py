# SPDX-License-Identifier: Apache-2.0
"""--mode=check_tpu: words and search of the check, and what it finds."""

import dataclasses
import types

import numpy as np
import pytest

import objective as objective_lib
from contrastive.commands import check_tpu, networks
from contrastive.config.completion import complete
from contrastive.devices import lowering, tpu_compilation
from contrastive.devices.tpu_compilation import Compiled
from tests.support import program, tpu_steps
from tests.support.tpu_steps import COMPILED, check, needs_compiler


def _findings(compiled=COMPILED, name="v5e:4x8", **more):
    return check_tpu.Findings(
        where=tpu_compilation.find_slice(name),
        rows=128,
        compiled=compiled,
        **more,
    )


@pytest.mark.parametrize("most", [0, 7, 8, 100, 447, 448, 4096, 65535, 1 << 20])
@pytest.mark.parametrize("start", [1, 8, 128, 2048])
@pytest.mark.parametrize("unit", [1, 8, 24])
def test_largest_of_any_limit_is_found_to_a_sixteenth(most, start, unit):
    tried = []

    def fits(rows):
        tried.append(rows)
        return rows <= most

    found = check_tpu.largest(fits, start, unit)
    assert found <= most
    assert found % unit == 0
    exact = min(most, 1 << 16) // unit * unit
    assert exact - found <= max(unit, found / 16)
    assert len(set(tried)) == len(tried) <= 24


def test_report_of_a_fitting_step_has_its_figures():
    text = check_tpu.report(_findings(largest=448))
    for part in (
        "v5litepod-32 (v5e:4x8): 32 replicas, one a chip, of 128 images; 4,096",
        "compiles       yes",
        "8.00 of 15.75 GiB a replica; arguments 1.00, temporaries 7.00",
        "2.0 TFLOP a replica: 10.0 ms at 197 TFLOP/s",
        "16.4 GB moved: 20.0 ms at 819 GB/s",
        "204,800 images/s",
        "3 all-reduce, 4.0 MB",
        "448 images a replica, 14,336 a step",
        "Not covered:",
    ):
        assert part in text
    assert "headroom" not in text


def test_report_of_a_crashed_compiler_says_that_nothing_is_known():
    crashed = Compiled(error="SIGABRT", crashed=True)
    text = check_tpu.report(_findings(crashed))
    assert "compiles       not known" in text


def test_report_of_recomputation_says_that_headroom_is_gone():
    small = dataclasses.replace(COMPILED, written_flops=COMPILED.flops * 1.2)
    compiled = dataclasses.replace(COMPILED, written_flops=COMPILED.flops)
    text = check_tpu.report(_findings(compiled, small=small))
    assert "+20.0% of operations" in text
    assert "no headroom" in text
    assert "computed again" in check_tpu.report(_findings(small=COMPILED))


def test_report_of_a_step_that_does_not_fit_has_advice():
    error = "RESOURCE_EXHAUSTED: 16.07G exceeds 15.75G.\n\nA page of traces."
    text = check_tpu.report(_findings(Compiled(error=error), advice=("--remat: less",)))
    assert "compiles       no\n" in text
    assert "16.07G exceeds 15.75G." in text
    assert "traces" not in text
    assert "what helps     --remat: less" in text
    other = Compiled(error="UNIMPLEMENTED: eig")
    text = check_tpu.report(_findings(other, advice=("--remat: less",)))
    assert "UNIMPLEMENTED: eig" in text
    assert "--remat" not in text


class _Memory:
    """A compiler whose programs need 0.1 GiB an image, up to a limit."""

    def __init__(self, monkeypatch, most, error="RESOURCE_EXHAUSTED"):
        self.tried, self._most, self._error = [], most, error
        monkeypatch.setattr(check_tpu, "compile_step", self)

    def __call__(self, _, rows):
        self.tried.append(rows)
        if rows > self._most:
            return Compiled(error=self._error)
        peak = int(rows * 0.1 * (1 << 30))
        return dataclasses.replace(COMPILED, peak=peak)


def _step(batch_size, accumulate_steps=1):
    resolved = program.resolve(
        "--mode=check_tpu",
        "--tpu_topology=v5e:2x2",  # of 15.75 GiB
        "--objective=simclr",
        "--mixed_precision",
        "--remat",
        f"--train_batch_size={batch_size}",
        f"--accumulate_steps={accumulate_steps}",
    )
    return check_tpu.StepToCheck(
        session=types.SimpleNamespace(resolved=resolved),
        dataset=None,
        where=tpu_compilation.find_slice("v5e:2x2"),
    )


def test_check_of_scarce_memory_compiles_a_small_batch_too(monkeypatch):
    compiler = _Memory(monkeypatch, most=150)
    assert check_tpu.check(_step(4 * 100)).small is None
    assert check_tpu.check(_step(4 * 144)).small
    assert check_tpu.check(_step(4 * 144, 12)).small
    assert compiler.tried == [100, 144, 18, 144, 12]


def test_check_with_find_batch_finds_the_largest(monkeypatch):
    compiler = _Memory(monkeypatch, most=150)
    assert check_tpu.check(_step(4 * 100)).largest is None
    findings = check_tpu.check(_step(4 * 200), find_batch=True)
    assert findings.compiled.out_of_memory
    assert 136 <= findings.largest <= 150
    assert findings.largest % 8 == 0
    assert findings.advice == (
        "--accumulate_steps=2: the same batch, in smaller parts",
        "a smaller --train_batch_size, or a slice of more chips",
    )
    # Any other refusal would be the same at every size.
    compiler = _Memory(monkeypatch, most=0, error="UNIMPLEMENTED")
    findings = check_tpu.check(_step(4 * 200), find_batch=True)
    assert findings.largest is None
    assert compiler.tried == [200]
    _Memory(monkeypatch, most=250, error="The compiler ended with SIGKILL.")
    findings = check_tpu.check(_step(4 * 200), find_batch=True)
    assert findings.compiled.fits
    assert findings.largest is None


def test_check_of_a_step_that_is_not_lowered_reports_the_error(tmp_path, monkeypatch):
    def fail(*_):
        raise ValueError("No registered 'Eig' OpKernel\n\nA graph.")

    monkeypatch.setattr(lowering, "lower", fail)
    findings = check("--train_batch_size=8 --tpu_topology=v5e:2x2", tmp_path)
    assert not findings.compiled.fits
    text = check_tpu.report(findings)
    assert "TensorFlow does not lower it: No registered 'Eig'" in text
    assert "A graph" not in text


def _num_gradients(step):
    """Returns how many numbers all replicas have to sum up."""
    resolved = complete(step.session.resolved, step.dataset)
    built = networks.build_networks(
        resolved,
        networks.make_architecture(resolved, step.dataset.num_classes),
        step.session.strategy,
    )
    return sum(
        int(np.prod(variable.shape))
        for model in (built.encoder, built.projection)
        for variable in model.trainable_variables
    )


@needs_compiler
def test_check_of_a_small_step_for_four_chips_compiles(tmp_path):
    step = tpu_steps.open_step(
        "--objective=simclr --train_batch_size=32 --tpu_topology=v5e:2x2",
        tmp_path,
    )
    findings = check_tpu.check(step)
    compiled = findings.compiled
    assert compiled.fits, compiled.error
    assert findings.rows == 8
    assert 0 < compiled.arguments < compiled.peak < 1 << 28
    assert 0.9 < compiled.flops / compiled.written_flops < 1.1
    # Gradients are summed, and BatchNorm's statistics.
    summed = compiled.collectives["all-reduce"]
    assert summed["bytes"] > 4 * _num_gradients(step)
    assert summed["count"] > 20
    assert "compiles       yes" in check_tpu.report(findings)


@needs_compiler
def test_check_of_a_step_beyond_the_memory_gives_advice(tmp_path):
    findings = check(
        "--objective=simclr --train_batch_size=4194304 --tpu_topology=v5e:2x2",
        tmp_path,
    )
    assert findings.compiled.out_of_memory
    text = check_tpu.report(findings)
    assert "exceeds available HBM (15.75G)" in text.replace("\n" + " " * 15, " ")
    for advice in ("--mixed_precision", "--remat", "--accumulate_steps=2"):
        assert advice in text


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("objective", objective_lib.OBJECTIVES)
def test_check_of_every_objective_compiles(objective, tmp_path):
    # The default head of some has more weights than this encoder.
    findings = check(
        f"--objective={objective} --train_batch_size=32 --proj_hidden_dim=32 --tpu_topology=v4-8",
        tmp_path,
    )
    assert findings.compiled.fits, findings.compiled.error
    assert findings.compiled.collectives["all-reduce"]["count"] > 20


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        "--mixed_precision --tpu_topology=v3-8 --train_batch_size=64",
        "--dataset=imagenet2012 --tpu_topology=v6e-1 --train_batch_size=8",
        "--accumulate_steps=2 --tpu_topology=v5p-8 --train_batch_size=64",
        "--train_mode=finetune --checkpoint=none --optimizer=momentum "
        "--fine_tune_after_block=4 --tpu_topology=v2-8 --train_batch_size=64",
        "--objective=semppl --labelled_fraction=0.1 --mask_probability=0.5 "
        "--saliency=spectral --proj_hidden_dim=32 --tpu_topology=v5e:2x2 "
        "--train_batch_size=32",
    ],
)
def test_check_of_other_runs_compiles(arguments, tmp_path):
    findings = check(arguments, tmp_path)
    assert findings.compiled.fits, findings.compiled.error


@needs_compiler
@pytest.mark.slow
def test_check_of_remat_needs_less_memory_and_a_forward_pass_more(tmp_path):
    arguments = "--tpu_topology=v5e-1 --train_batch_size=256 --resnet_depth=18"
    kept, again = (
        check(f"--objective=simclr {arguments} {flag}", tmp_path).compiled
        for flag in ("--noremat", "--remat")
    )
    assert again.peak < 0.6 * kept.peak
    # Forward and backward are three passes; the loss is a part of them.
    assert 1.25 < again.flops / kept.flops < 1.34
