# SPDX-License-Identifier: Apache-2.0
"""Slices, arithmetic and words of the check; and what the compiler says."""

import dataclasses
import importlib.util
import os
import pathlib
import shlex
import types

import numpy as np
import pytest
import tensorflow as tf

import data
import data_util
from contrastive.commands import check_tpu, experiment
from contrastive.config import methods
from contrastive.devices import tpu_compiler, tpu_slices
from contrastive.sources import sources
from contrastive.training import trainer
from tests.support import processes, program

_SUPPORT = pathlib.Path(__file__).resolve().parents[1] / "support"
_SMALL_RUN = (
    "--mode=check_tpu --dataset=cifar10 --resnet_depth=10 "
    "--width_multiplier=0.125"
)
needs_compiler = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("jax", "libtpu"))),
    reason="requirements/check-tpu.txt is not installed",
)


def _run(arguments, tmp_path):
    """Returns the run of a command line, whose data is not here."""
    words = [*shlex.split(arguments), f"--data_dir={tmp_path}"]
    return experiment.Run(*program.resolve(*words))


def _check(arguments, tmp_path):
    prepared = _run(f"{_SMALL_RUN} {arguments}", tmp_path)
    where = tpu_slices.find_slice(prepared.settings.tpu_topology)
    return check_tpu.check(
        prepared, where, find_batch=prepared.settings.find_batch
    )


# Slices.


@pytest.mark.parametrize(
    ("name", "chip", "topology", "replicas"),
    [
        ("v5litepod-16", "v5e", "4x4", 16),
        ("v5e-16", "v5e", "4x4", 16),
        ("V5E:4x8", "v5e", "4x8", 32),
        ("v5litepod-1", "v5e", "1x1", 1),
        ("v4-32", "v4", "2x2x4", 16),
        ("v4-8", "v4", "2x2x1", 4),
        ("v5p-128", "v5p", "4x4x4", 64),
        ("v6e-16", "v6e", "4x4", 16),
        ("v3-8", "v3", "2x2", 8),
        ("v3-64", "v3", "4x8", 64),
        ("v2-512", "v2", "16x16", 512),
    ],
)
def test_slices_have_the_names_people_rent(name, chip, topology, replicas):
    found = tpu_slices.find_slice(name)
    assert (found.chip.name, found.topology) == (chip, topology)
    assert found.num_replicas == replicas
    assert found.request()["topology"] == f"{chip}:{topology}"


def test_every_slice_is_found_by_all_of_its_names():
    names = []
    for chip in tpu_slices.CHIPS:
        for topology in chip.topologies.split():
            known = tpu_slices.Slice(chip, topology)
            assert tpu_slices.find_slice(known.name) == known
            assert tpu_slices.find_slice(f"{chip.name}:{topology}") == known
            names.append(known.name)
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    "name", ["", "v5e", "v5litepod-12", "v5e:32x32", "v4:4x4", "v4-4", "v9-8"]
)
def test_other_slices_are_refused_with_the_list(name):
    with pytest.raises(ValueError, match="v5litepod-32 \\(4x8\\)") as error:
        tpu_slices.find_slice(name)
    assert f"Received: {name!r}" in str(error.value)
    assert "v4-32 (2x2x4)" in str(error.value)


def test_v4_is_compiled_for_chips_not_for_cores():
    assert tpu_slices.find_slice("v4-8").request() == {
        "topology": "v4:2x2x1",
        "chip_config_name": "megacore",
    }


# Arithmetic and words.

_STEP = check_tpu.Compiled(
    arguments=1 << 30,
    temporaries=7 << 30,
    peak=8 << 30,
    flops=197e12 / 100,
    written_flops=200e12 / 100,
    bytes_accessed=819e9 / 50,
    collectives={"all-reduce": {"count": 3, "bytes": 4_000_000}},
)


def _findings(compiled=_STEP, name="v5e:4x8", **more):
    return check_tpu.Findings(
        where=tpu_slices.find_slice(name), rows=128, compiled=compiled, **more
    )


def test_roofline_is_of_a_replica():
    (v3,) = (chip for chip in tpu_slices.CHIPS if chip.name == "v3")
    step = dataclasses.replace(_STEP, flops=123e12, bytes_accessed=450e9)
    # Of v3's chips, a replica has half.
    assert check_tpu.roofline(step, v3) == pytest.approx((2.0, 1.0))


def test_recomputation_is_what_the_loss_s_growth_does_not_explain():
    small = dataclasses.replace(_STEP, flops=95.0, written_flops=100.0)
    large = dataclasses.replace(_STEP, flops=1140.0, written_flops=1000.0)
    assert check_tpu.recomputation(large, small) == pytest.approx(0.2)


@pytest.mark.parametrize("most", [0, 7, 8, 100, 447, 448, 4096, 65535, 1 << 20])
@pytest.mark.parametrize("start", [1, 8, 128, 2048])
@pytest.mark.parametrize("unit", [1, 8, 24])
def test_largest_batch_is_found_to_a_sixteenth(most, start, unit):
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


def test_report_of_a_step_that_fits():
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


def test_report_of_recomputation():
    small = dataclasses.replace(_STEP, written_flops=_STEP.flops * 1.2)
    compiled = dataclasses.replace(_STEP, written_flops=_STEP.flops)
    text = check_tpu.report(_findings(compiled, small=small))
    assert "+20.0% of operations" in text
    assert "no headroom" in text
    assert "computed again" in check_tpu.report(_findings(small=_STEP))


def test_report_of_a_step_that_does_not_fit():
    error = "RESOURCE_EXHAUSTED: 16.07G exceeds 15.75G.\n\nA page of traces."
    text = check_tpu.report(
        _findings(check_tpu.Compiled(error=error), advice=("--remat: less",))
    )
    assert "compiles       no\n" in text
    assert "16.07G exceeds 15.75G." in text
    assert "traces" not in text
    assert "what helps     --remat: less" in text
    other = check_tpu.Compiled(error="UNIMPLEMENTED: eig")
    text = check_tpu.report(_findings(other, advice=("--remat: less",)))
    assert "UNIMPLEMENTED: eig" in text
    assert "--remat" not in text


class _Memory:
    """A compiler whose programs need 0.1 GiB an image, up to a limit."""

    def __init__(self, monkeypatch, most, error="RESOURCE_EXHAUSTED"):
        self.tried, self._most, self._error = [], most, error
        monkeypatch.setattr(check_tpu, "compile_step", self)

    def __call__(self, _, __, rows):
        self.tried.append(rows)
        if rows > self._most:
            return check_tpu.Compiled(error=self._error)
        peak = int(rows * 0.1 * (1 << 30))
        return dataclasses.replace(_STEP, peak=peak)


def _settings(batch_size, accumulate_steps=1):
    return types.SimpleNamespace(
        settings=types.SimpleNamespace(
            train_batch_size=batch_size,
            accumulate_steps=accumulate_steps,
            train_mode="pretrain",
            encoder="resnet",
            objective="simclr",
            mixed_precision=True,
            remat=True,
        )
    )


def test_scarce_memory_is_compared_with_a_small_batch(monkeypatch):
    where = tpu_slices.find_slice("v5e:2x2")  # of 15.75 GiB
    compiler = _Memory(monkeypatch, most=150)
    assert check_tpu.check(_settings(4 * 100), where).small is None
    assert check_tpu.check(_settings(4 * 144), where).small
    assert check_tpu.check(_settings(4 * 144, 12), where).small
    assert compiler.tried == [100, 144, 18, 144, 12]


def test_the_largest_batch_is_looked_for_if_asked(monkeypatch):
    where = tpu_slices.find_slice("v5e:2x2")
    compiler = _Memory(monkeypatch, most=150)
    assert check_tpu.check(_settings(4 * 100), where).largest is None
    findings = check_tpu.check(_settings(4 * 200), where, find_batch=True)
    assert findings.compiled.out_of_memory
    assert 136 <= findings.largest <= 150
    assert findings.largest % 8 == 0
    assert findings.advice == (
        "--accumulate_steps=2: the same batch, in smaller parts",
        "a smaller --train_batch_size, or a slice of more chips",
    )
    # Any other refusal would be the same at every size.
    compiler = _Memory(monkeypatch, most=0, error="UNIMPLEMENTED")
    findings = check_tpu.check(_settings(4 * 200), where, find_batch=True)
    assert findings.largest is None
    assert compiler.tried == [200]
    _Memory(monkeypatch, most=250, error="The compiler ended with SIGKILL.")
    findings = check_tpu.check(_settings(4 * 200), where, find_batch=True)
    assert findings.compiled.fits
    assert findings.largest is None


def test_collectives_are_counted_with_their_bytes():
    program = """
  %all-reduce.1 = f32[2,8]{1,0:T(2,128)} all-reduce(%a), to_apply=%add
  %s = (f32[4]{0}, f32[8]{0:T(8)S(1)}) all-gather-start(%b), dimensions={0}
  %d = f32[8]{0} all-gather-done(%s)
  ROOT %t = (bf16[10]{0}, pred[3]{0}) all-reduce(%c, %d), to_apply=%add
  %fusion = f32[2,8]{1,0} fusion(%all-reduce.1), calls=%all-reduce.like
"""
    assert tpu_compiler.collectives(program) == {
        "all-gather": {"count": 1, "bytes": 32},
        "all-reduce": {"count": 2, "bytes": 64 + 23},
    }


def test_a_compiler_that_aborts_is_reported(tmp_path, monkeypatch):
    script = tmp_path / "aborts.py"
    script.write_text("import os, sys\nsys.stderr.write('F0000 check\\n')\n"
                      "sys.stderr.flush()\nos.abort()\n")  # fmt: skip
    monkeypatch.setattr(tpu_compiler, "__file__", str(script))
    compiled = check_tpu.compile_for(tpu_slices.find_slice("v5e:2x2"), b"")
    assert not compiled.fits
    assert compiled.crashed
    assert "compiles       not known" in check_tpu.report(_findings(compiled))
    assert "SIGABRT" in compiled.error
    assert "F0000 check" in compiled.error


def test_what_tensorflow_does_not_lower_is_reported(tmp_path, monkeypatch):
    def fail(*_):
        raise ValueError("No registered 'Eig' OpKernel\n\nA graph.")

    monkeypatch.setattr(check_tpu, "lower", fail)
    findings = _check("--train_batch_size=8 --tpu_topology=v5e:2x2", tmp_path)
    assert not findings.compiled.fits
    text = check_tpu.report(findings)
    assert "TensorFlow does not lower it: No registered 'Eig'" in text
    assert "A graph" not in text


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match="pip install -r requirements/check"):
        check_tpu.require_compiler()


@needs_compiler
def test_another_jax_is_refused(monkeypatch):
    pinned = (_SUPPORT.parents[1] / "requirements/check-tpu.txt").read_text()
    assert f"jax=={tpu_compiler.JAX_VERSION}\n" in pinned
    check_tpu.require_compiler()
    monkeypatch.setattr(tpu_compiler, "JAX_VERSION", "0.9.0")
    with pytest.raises(ValueError, match="needs jax 0.9.0, not"):
        check_tpu.require_compiler()


# Data that is not here.


def _encoded(folder):
    folder.mkdir()
    for index, size in enumerate([(40, 30), (30, 50), (64, 64), (20, 90)]):
        image = tf.zeros([*size, 3], tf.uint8)
        path = os.path.join(folder, f"{index}.png")
        tf.io.write_file(path, tf.io.encode_png(image))
    return data.load(str(folder), sources.ALL)


def test_batches_are_those_of_the_stream(tmp_path):
    view = data_util.simclr_augmentation(16)
    small = data_util.simclr_augmentation(8)
    masked = dataclasses.replace(view, mask_probability=0.5)
    in_memory = data.load("photo_patches", "test")
    masks = np.ones(in_memory.source.images.shape[:3], np.uint8)
    encoded = _encoded(tmp_path / "images")
    for dataset, views in [
        (in_memory, (view, small)),
        (dataclasses.replace(in_memory, masks=masks), (masked, view)),
        (encoded, (view, view)),
        (encoded, (view, view, small)),
    ]:
        stream = data.train_stream(
            dataset, batch_size=4, num_replicas=2, seed=0, views=views
        )
        assert check_tpu.batch_spec(dataset, 2, views) == stream.element_spec


@pytest.mark.parametrize(
    ("name", "is_encoded", "size", "classes"),
    [
        ("cifar10", False, (32, 32), 10),
        ("stl10", False, (96, 96), 10),
        ("imagenet2012", True, None, 1000),
        ("imagenet2012_subset/1pct", True, None, 1000),
        ("gs://bucket/photos", True, None, 1000),
        ("/not/here", True, None, 1000),
        ("/not/here.npz", True, None, 1000),
    ],
)
def test_data_that_is_not_here_is_outlined(
    name, is_encoded, size, classes, tmp_path
):
    dataset = data.outline(name, data_dir=str(tmp_path))
    assert (dataset.is_encoded, dataset.image_size) == (is_encoded, size)
    assert (dataset.num_classes, dataset.channels) == (classes, 3)
    assert dataset.num_examples > 1e6
    assert "not here" in dataset.notes[0]
    remote = data.outline(name, data_dir="gs://bucket/data", channels=1)
    assert remote.channels == 1
    assert not list(tmp_path.iterdir())


def test_data_that_is_here_is_opened(tmp_path):
    assert data.outline("photo_patches", "test").num_examples == 2000
    _encoded(tmp_path / "images")
    folder = data.outline(str(tmp_path / "images"), sources.ALL)
    assert (folder.num_examples, folder.is_encoded) == (4, True)


def test_a_misspelt_dataset_is_refused():
    with pytest.raises(ValueError, match="cifar10"):
        data.outline("cifar01")


# The program of a replica, executed by jax on four devices of the CPU.


def _execute(step, batch, folder):
    """Runs a step, lowered for 4 replicas, on all of them.

    Args:
        step: of a batch of one replica.
        batch: arrays of all rows, by name.
        folder: to work in.

    Returns:
        Array `[4, m]`, each replica's metrics; the variables; and, as arrays
        `[4, ...]`, what the step makes of them.
    """
    strategy = tf.distribute.OneDeviceStrategy("/cpu:0")
    spec = {
        name: tf.TensorSpec([len(rows) // 4, *rows.shape[1:]], rows.dtype)
        for name, rows in batch.items()
    }
    program = check_tpu.replica_program(step, spec, strategy, 4)
    module = check_tpu.lower(program, spec, strategy)
    concrete = program.get_concrete_function(*tf.nest.flatten(spec))
    captured = concrete.captured_inputs
    variables = {id(v.handle): v for v in concrete.variables}
    held = [variables[id(x)] for x in captured if id(x) in variables]
    assert len(held) == len(captured)
    (folder / "program").write_bytes(module)
    np.savez(folder / "split.npz", *tf.nest.flatten(batch))
    np.savez(folder / "same.npz", *[v.numpy() for v in held])
    processes.run(_SUPPORT / "execute_replicas.py", folder)
    with np.load(folder / "results.npz") as file:
        metrics, *changed = file.values()
    return metrics, held, changed


@needs_compiler
def test_collectives_compute_what_they_say(tmp_path):
    def step(batch):
        replica = tf.distribute.get_replica_context()
        index = tf.cast(replica.replica_id_in_sync_group, tf.float32)
        x = batch["x"]
        with tf.GradientTape() as tape:
            tape.watch(x)
            rows = replica.all_gather(x, axis=0)
            # Of each replica another function of all rows.
            loss = (1.0 + index) * tf.reduce_sum(rows**2)
        ids = replica.all_gather(batch["id"] + 2**40, axis=0)
        return {
            "mean": replica.all_reduce("MEAN", tf.reduce_sum(x)),
            "rows": tf.reduce_sum(rows[:, 0] * tf.range(8.0)),
            "gradient": tf.reduce_sum(tape.gradient(loss, x)),
            "ids": tf.reduce_sum(ids - 2**40),
            "replica": index,
        }

    x = np.arange(8, dtype=np.float32)[:, np.newaxis] ** 2
    ids = np.arange(8) * 3
    metrics, _, _ = _execute(step, {"x": x, "id": ids}, tmp_path)
    expected = np.stack(
        [
            np.full(4, x.sum() / 4),
            np.full(4, x[:, 0] @ np.arange(8)),
            # Every replica's loss sees the rows of all.
            (1 + 2 + 3 + 4) * 2 * x.reshape(4, 2).sum(1),
            np.full(4, ids.sum()),
            np.arange(4),
        ],
        axis=1,
    )
    np.testing.assert_allclose(metrics, expected, rtol=1e-6)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("objective", ["simclr", "semppl"])
def test_the_program_computes_what_one_device_does(objective, tmp_path):
    """Metrics, and every variable after a step."""
    prepared = _run(
        f"{_SMALL_RUN} --objective={objective} --train_batch_size=16 "
        "--tpu_topology=v5e:2x2 --proj_hidden_dim=32 --optimizer=momentum "
        "--train_steps=10 --warmup_epochs=0 --learning_rate=0.1",
        tmp_path,
    )
    config = experiment.make_train_config(
        prepared.settings, prepared.train_data, 1
    )
    with prepared.strategy.scope():
        optimizers = trainer.build_optimizers(config, prepared.networks)
    step = trainer.build_step(config, prepared.networks, optimizers)
    patches = data.load("photo_patches", "test").source
    batch = {
        "id": np.arange(16),
        "epoch": np.zeros(16, np.int32),
        "image": patches.images[::100][:16],
        "label": patches.labels[::100][:16] % 10,
        "weight": np.ones(16, np.float32),
    }
    metrics, held, after = _execute(step, batch, tmp_path)
    one = prepared.strategy.run(
        tf.function(step, autograph=False),
        [tf.nest.map_structure(tf.constant, batch)],
    )
    np.testing.assert_allclose(
        metrics.mean(0), [float(v) for v in one.values()], rtol=1e-3, atol=1e-4
    )
    for variable, copies in zip(held, after, strict=True):
        for copy in copies:
            np.testing.assert_allclose(
                copy, variable.numpy(), rtol=1e-3, atol=1e-4,
                err_msg=variable.name,
            )  # fmt: skip


# What the compiler says.


def _num_gradients(settings):
    """Returns how many numbers all replicas have to sum up."""
    networks = settings.networks
    return sum(
        int(np.prod(variable.shape))
        for model in (networks.encoder, networks.projection)
        for variable in model.trainable_variables
    )


@needs_compiler
def test_a_small_step_compiles_for_four_chips(tmp_path):
    arguments = "--objective=simclr --train_batch_size=32"
    prepared = _run(
        f"{_SMALL_RUN} {arguments} --tpu_topology=v5e:2x2", tmp_path
    )
    findings = check_tpu.check(prepared, tpu_slices.find_slice("v5e:2x2"))
    compiled = findings.compiled
    assert compiled.fits, compiled.error
    assert findings.rows == 8
    assert 0 < compiled.arguments < compiled.peak < 1 << 28
    assert 0.9 < compiled.flops / compiled.written_flops < 1.1
    # Gradients are summed, and BatchNorm's statistics.
    summed = compiled.collectives["all-reduce"]
    assert summed["bytes"] > 4 * _num_gradients(prepared)
    assert summed["count"] > 20
    assert "compiles       yes" in check_tpu.report(findings)


@needs_compiler
def test_a_step_that_exceeds_the_memory_is_refused(tmp_path):
    findings = _check(
        "--objective=simclr --train_batch_size=4194304 --tpu_topology=v5e:2x2",
        tmp_path,
    )
    assert findings.compiled.out_of_memory
    text = check_tpu.report(findings)
    assert "exceeds available HBM (15.75G)" in text.replace(
        "\n" + " " * 15, " "
    )
    for advice in ("--mixed_precision", "--remat", "--accumulate_steps=2"):
        assert advice in text


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("objective", methods.METHODS)
def test_every_objective_compiles(objective, tmp_path):
    name = "relic --use_siglip" if objective == "siglip" else objective
    # The default head of some has more weights than this encoder.
    findings = _check(
        f"--objective={name} --train_batch_size=32 --proj_hidden_dim=32 "
        "--tpu_topology=v4-8",
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
def test_other_runs_compile(arguments, tmp_path):
    findings = _check(arguments, tmp_path)
    assert findings.compiled.fits, findings.compiled.error


@needs_compiler
@pytest.mark.slow
def test_remat_needs_less_memory_and_a_forward_pass_more(tmp_path):
    arguments = "--tpu_topology=v5e-1 --train_batch_size=256 --resnet_depth=18"
    kept, again = (
        _check(f"--objective=simclr {arguments} {flag}", tmp_path).compiled
        for flag in ("--noremat", "--remat")
    )
    assert again.peak < 0.6 * kept.peak
    # Forward and backward are three passes; the loss is a part of them.
    assert 1.25 < again.flops / kept.flops < 1.34
