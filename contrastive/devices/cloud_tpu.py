# SPDX-License-Identifier: Apache-2.0
"""Checks by the Cloud TPU API that a TPU can be used, before connecting.

Connecting to a TPU that is still being created, has been deleted or runs another version of
TensorFlow hangs, or fails with an unrelated message.
"""

import contextlib
import json
import re
import time
from collections.abc import Callable
from urllib.error import URLError

import cloud_tpu_client
import googleapiclient.errors
import httplib2
import oauth2client.client
from absl import logging

_SECONDS_BETWEEN_POLLS = 10.0
# States that do not become READY, and what to do.
_GONE = {
    "PREEMPTED": "Google has taken it back; delete it and create it again",
    "TERMINATED": "it has been taken back; delete it and create it again",
    "DELETING": "create it again",
} | dict.fromkeys(("STOPPED", "STOPPING", "SUSPENDED"), "start it, or create another")
_TAKEN_BACK = ("PREEMPTED", "TERMINATED", "DELETING")
_ERRORS = (
    ValueError,  # which the client raises for many other errors
    OSError, httplib2.HttpLib2Error, googleapiclient.errors.Error,
)  # fmt: skip
# Health of a usable TPU; runtimes of different versions report it differently.
_HEALTHY = (None, "", "HEALTHY", "HEALTH_UNSPECIFIED")


def find(name: str, zone: str | None = None, project: str | None = None) -> cloud_tpu_client.Client:
    """Creates a client of a TPU, by default in this machine's zone and project.

    Raises `ValueError` if this machine, which is asked, is not in Google Cloud.
    """
    try:
        return cloud_tpu_client.Client(name, zone=zone, project=project)
    except URLError as error:
        raise ValueError(
            f"Where is the TPU {name!r}? This machine is none of Google "
            "Cloud's, which know: give --tpu_zone and --gcp_project."
        ) from error


def wait_until_ready(
    client: cloud_tpu_client.Client,
    *,
    tensorflow_version: str,
    minutes: float,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Waits until the TPU exists, is healthy and has our TensorFlow version.

    With 0 `minutes`, it checks once. `sleep` waits for a number of seconds.

    Raises:
        AwayError: if Google has taken the TPU back.
        ValueError: if the TPU cannot be used for another reason.
    """
    name, waited = client.name(), 0.0
    problem, runtime = _look(client)
    while problem:
        if waited >= 60 * minutes:
            raise ValueError(
                f"The TPU {name!r} is not ready after {waited / 60:.3g} minutes"
                f" (--tpu_wait_minutes): {problem}."
            )
        logging.info("Waiting for the TPU %s: %s.", name, problem)
        sleep(_SECONDS_BETWEEN_POLLS)
        waited += _SECONDS_BETWEEN_POLLS
        problem, runtime = _look(client)
    found = re.search(r"\d+\.\d+(\.\d+)?", runtime or "")
    if not found:
        logging.warning(
            f"The TPU {name} runs {runtime}: it cannot be told whether that "
            f"fits TensorFlow {tensorflow_version}."
        )
    elif not f"{tensorflow_version}.".startswith(f"{found[0]}."):
        raise ValueError(
            f"The TPU {name!r} runs TensorFlow {runtime}, this program "
            f"{tensorflow_version}, and both must be the same: create the TPU "
            f"with a runtime of {tensorflow_version}."
        )


class AwayError(ValueError):
    """The TPU has been taken back, or does not answer, and may return."""


class _NoAnswerError(ValueError):
    """The API does not answer at the moment."""


def _look(client: cloud_tpu_client.Client) -> tuple[str | None, str | None]:
    """Returns a problem that may be transient, or None, and the version."""
    try:
        questions = client.state, client.health, client.runtime_version
        state, health, runtime = (_ask(client, q) for q in questions)
    except _NoAnswerError as error:
        return str(error), None
    if state in _GONE:
        kind = AwayError if state in _TAKEN_BACK else ValueError
        raise kind(f"The TPU {client.name()!r} is {state}: {_GONE[state]}.")
    if state != "READY":
        return f"it is {state}", runtime
    if health not in _HEALTHY:
        return f"its health is {health}", runtime
    return None, runtime


def _ask(client: cloud_tpu_client.Client, question: Callable[[], str | None]) -> str | None:
    try:
        return question()
    except oauth2client.client.ApplicationDefaultCredentialsError as error:
        raise ValueError(
            f"No permission to look at the TPU {client.name()!r}: there are no "
            "credentials. Run: gcloud auth application-default login"
        ) from error
    except _ERRORS as error:
        raise _refusal(client.name(), error) from error


def _refusal(name: str, error: Exception) -> ValueError:
    cause = error.__context__ or error
    if isinstance(cause, (OSError, httplib2.HttpLib2Error)):
        return _NoAnswerError(f"the API does not answer ({cause})")
    if not isinstance(cause, googleapiclient.errors.HttpError):
        return ValueError(f"Cannot look up the TPU {name!r}: {cause}")
    status, reason = int(cause.resp.status), f"{cause.resp.reason}."
    with contextlib.suppress(ValueError, KeyError, TypeError):  # not the API's
        reason = json.loads(cause.content)["error"]["message"]
    if status >= 500 or status == 429:  # too many requests
        return _NoAnswerError(f"the API answers {status}, {reason}")
    if status in (401, 403):
        return ValueError(
            f"No permission to look at the TPU {name!r}: {reason} The account "
            "needs the role TPU Viewer, the machine the scope cloud-platform."
        )
    if status == 404:
        return ValueError(
            f"There is no TPU {name!r}: {reason} For those that there are: "
            "gcloud compute tpus tpu-vm list --zone=..."
        )
    return ValueError(f"Cannot look up the TPU {name!r}: {reason}")
