# SPDX-License-Identifier: Apache-2.0
"""The choice of hyperparameters on held-out images, before a training."""

import dataclasses
import itertools
import json
import os
from collections.abc import Callable

from absl import logging

from contrastive import storage
from contrastive.commands import datasets, record, session as session_lib, train
from contrastive.commands.train import TrainingRun
from contrastive.training import checkpoints, loop


def prepare(run: TrainingRun) -> Callable[[], None]:
    """Prepares the trials, then the training with the best values on all."""
    resolved = run.resolved
    rates = resolved["sweep_learning_rate"] or (resolved["learning_rate"],)
    epochs = resolved["sweep_train_epochs"] or (resolved["train_epochs"],)
    trials = {
        f"rate_{rate:g}-epochs_{count}": {
            "learning_rate": rate,
            "train_epochs": count,
        }
        for rate, count in itertools.product(rates, epochs)
    }

    def work() -> None:
        accuracies = {name: _accuracy(_trial(run, name, values)) for name, values in trials.items()}
        best = max(accuracies, key=lambda name: accuracies[name])
        logging.info("Sweep: held-out top-1 %s; %s.", accuracies, best)
        storage.write_whole(
            os.path.join(resolved["model_dir"], "sweep.json"),
            json.dumps(
                {"held_out_top_1_accuracy": accuracies, "chosen": trials[best]},
                indent=2,
            ),
        )
        chosen = resolved.replace("sweep", **trials[best])
        train_best, _ = train.prepare_training(
            dataclasses.replace(run, session=run.session.with_resolved(chosen))
        )
        train_best()

    # Before any compute: this checks everything.
    if resolved["mode"] == "train_then_eval":
        session_lib.check_classes(run.architecture, run.train_data.split, run.opened_eval_data())
    for values in trials.values():
        config = run.config(**values)
    record.make_record(
        run.session,
        run.architecture,
        run.train_data,
        config,
        reports_flags=False,
    )
    first = next(iter(trials))
    train.prepare_training(_trial(run, first, trials[first]), is_trial=True)
    return work


def _trial(run: TrainingRun, name: str, values: dict[str, float]) -> TrainingRun:
    """Returns a run that is evaluated on images held out of training."""
    resolved = run.resolved
    directory = os.path.join(resolved["model_dir"], "sweep", name)
    train_data, held_out = datasets.held_out(
        run.train_data, resolved["held_out_examples"], resolved["seed"]
    )
    trial = resolved.replace("sweep", model_dir=directory, mode="train", **values)
    return dataclasses.replace(
        run,
        session=run.session.with_resolved(trial),
        train_data=train_data,
        eval_data=held_out,
    )


def _accuracy(trial: TrainingRun) -> float:
    """Trains a trial and returns its accuracy on the held-out images."""
    resolved = trial.resolved
    logging.info("Sweep: %s", os.path.basename(resolved["model_dir"]))
    work, state = train.prepare_training(trial, is_trial=True)
    try:
        work()
    except loop.TrainingDiverged as error:
        logging.warning("%s", error)
        return 0.0
    newest = checkpoints.latest_checkpoint(resolved["model_dir"])
    measured, _ = session_lib.evaluate(
        trial.session,
        state.networks,
        trial.opened_eval_data(),
        checkpoints.checkpoint_step(newest),
        resolved["train_mode"],
    )
    return measured["top_1_accuracy"]
