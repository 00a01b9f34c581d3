# SPDX-License-Identifier: Apache-2.0
"""--mode=probe: measures the features of an encoder beside simple baselines."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable

from etils import epy

from contrastive import run_record, storage
from contrastive.commands import inherit
from contrastive.commands.base import Command
from contrastive.config import schema
from contrastive.config.completion import complete
from contrastive.config.resolve import FROM_SCRATCH, Resolved

with epy.lazy_imports():
    import keras

    import model
    from contrastive.commands import datasets, session as session_lib
    from contrastive.evaluation import probe
    from contrastive.report import content
    from contrastive.weights import loading

_NOWHERE = "none"  # as --feature_cache


def check_checkpoint(resolved: Resolved) -> None:
    """Raises ValueError unless --checkpoint names what a mode reads."""
    if resolved["checkpoint"] in (None, "", FROM_SCRATCH):
        raise ValueError(f"--mode={resolved['mode']} needs --checkpoint, the run to look at.")
    inherit.check_checkpoint(resolved["checkpoint"])


def prepare(resolved: Resolved) -> Callable[[], None]:
    """Prepares the comparison of features; returns the work."""
    check_checkpoint(resolved)
    path = resolved["checkpoint"]
    resolved = resolved.derived(model_dir=run_record.run_directory(path))
    session = session_lib.open_session(resolved)
    train_data = datasets.open_training_data(session.resolved)
    session = session.with_resolved(complete(session.resolved, train_data))
    resolved = session.resolved
    session_lib.log_flags(resolved)
    eval_data = datasets.open_eval_data(resolved)
    with session.strategy.scope():
        encoders = _encoders(resolved)
    probe.check_classes(train_data, eval_data)
    measure = functools.partial(
        probe.measure,
        encoders,
        train_data,
        eval_data,
        resolved["image_size"],
        _options(resolved),
        cache=_cache(resolved),
        **session.forward_options(),
    )

    def work() -> None:
        results = measure()
        sys.stdout.write(probe.table(results) + "\n")
        written = results.record() | {
            "checkpoint": path,
            "flags": resolved.flags(),
        }
        storage.write_whole(
            os.path.join(resolved["model_dir"], "probe.json"),
            json.dumps(written, indent=2),
        )
        content.write_probe_report(session.subject(eval_data, path), results)

    return work


def _options(resolved: Resolved) -> probe.Options:
    options = dataclasses.asdict(resolved.group(schema.Probe))
    del options["feature_cache"]
    return probe.Options(
        seeds=options.pop("probe_seeds"),
        max_train=options.pop("probe_max_train"),
        **options,
    )


def _cache(resolved: Resolved) -> str | None:
    """Returns the directory where features are kept, or None."""
    folder = resolved["feature_cache"]
    if folder == _NOWHERE:
        return None
    return folder or os.path.join(resolved["model_dir"], "features")


def _encoders(resolved: Resolved) -> dict[str, keras.Model | None]:
    """Returns the encoder and its baselines; None stands for raw pixels."""
    path = resolved["checkpoint"]
    architecture = loading.read_architecture(path)
    keras.utils.set_random_seed(resolved["seed"])
    untrained = model.build_networks(architecture.without_pretraining())
    return {
        "raw pixels": None,
        "random encoder": model.encoder_of_images(untrained),
        "pretrained encoder": loading.load_encoder(path, target=resolved["evaluate_target"]),
    }


PROBE = Command(
    help="Compare the features of --checkpoint with raw pixels and a random "
    "encoder, by linear, nearest-neighbour and few-label classifiers.",
    groups=(
        *schema.FORWARD_GROUPS,
        schema.Seed,
        schema.Start,
        schema.RunDirectory,
        schema.TrainingData,
        schema.EvaluationData,
        schema.Probe,
    ),
    prepare=prepare,
    inherits=functools.partial(inherit.from_checkpoint, which="data"),
)
