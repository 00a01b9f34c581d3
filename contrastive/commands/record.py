# SPDX-License-Identifier: Apache-2.0
"""The record of a training run: `run.json`, and what may not change later."""

import dataclasses
import json
import os
import pathlib
import platform
import subprocess
import sys
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import logging

import data
import model
from contrastive import run_record, storage
from contrastive.commands.session import Session
from contrastive.sources import labels
from contrastive.training.config import TrainConfig

_ROOT = pathlib.Path(__file__).resolve().parents[2]


def make_record(
    session: Session,
    architecture: model.Architecture,
    train_data: data.Dataset,
    config: TrainConfig,
    *,
    reports_flags: bool = True,
) -> dict[str, Any]:
    """Returns the content of `run.json`.

    `reports_flags` says whether flags that differ from those of the run in the directory are
    logged.

    Raises:
        ValueError: if the directory holds a run of other networks.
    """
    resolved = session.resolved
    now = {
        "flags": resolved.flags(),
        "sources": dict(resolved.origins),
        "architecture": dataclasses.asdict(architecture),
        "train_steps": config.train_steps,
        "class_names": train_data.class_names,
        "command": sys.argv,
        "commit": _commit(),
        "devices": list(session.strategy.extended.worker_devices),
        "versions": {
            "python": platform.python_version(),
            "tensorflow": tf.__version__,
            "keras": keras.__version__,
        },
    }
    now = json.loads(json.dumps(now))  # tuples become lists, as when read
    directory = resolved["model_dir"]
    before = run_record.read_run(directory)
    if before and storage.latest_checkpoint(directory):
        _compare(directory, before, now, reports_flags)
    return now


def write_record(session: Session, record: dict[str, Any], labelled_ids: np.ndarray | None) -> None:
    """Writes `run.json` and the ids of the labelled images."""
    if not session.is_chief:
        return
    directory = session.resolved["model_dir"]
    # The ids come first: if there is a `run.json`, they are there.
    if labelled_ids is not None:
        labels.write(directory, labelled_ids)
    run_record.write_run(directory, record)


def _compare(
    directory: str,
    before: dict[str, Any],
    now: dict[str, Any],
    reports_flags: bool,
) -> None:
    """Refuses to resume with other networks; reports other flags, if asked."""

    def differing(part: str) -> list[str]:
        return [
            f"{name}: {before[part][name]} there, {value} here"
            for name, value in now[part].items()
            # A run of an earlier version has fewer flags and fields.
            if name in before[part] and before[part][name] != value
        ]

    # Fields that runs of older versions do not name have their defaults.
    old = model.Architecture.from_record(before["architecture"])
    old_fields = json.loads(json.dumps(dataclasses.asdict(old)))
    before = before | {"architecture": old_fields}
    networks = differing("architecture")
    # The origin of the weights must stay the same, too.
    for name in ("train_mode", "checkpoint"):
        there, here = (part["flags"].get(name) for part in (before, now))
        if os.path.normpath(there or "") != os.path.normpath(here or ""):
            networks.append(f"{name}: {there} there, {here} here")
    if networks:
        raise ValueError(
            f"{directory} holds a run of other networks ({'; '.join(networks)})"
            ". Choose another --model_dir, or the same flags."
        )
    for line in differing("flags") if reports_flags else ():
        logging.warning("Resuming with another flag than before: %s", line)


def _commit() -> str | None:
    """Returns the commit of this program's own repository, if it has one."""
    try:
        return subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=_ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
