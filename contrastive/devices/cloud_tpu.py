# SPDX-License-Identifier: Apache-2.0
"""Asks the Cloud TPU API whether a TPU can be used, before connecting to it.

A program that connects to a TPU that is still being made, is gone, or runs
another TensorFlow hangs, or fails with a page about something else.
"""

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
_READY = "READY"
# Neither becomes READY by waiting.
_GONE = {
    "PREEMPTED": "Google has taken it back; delete it and create it again",
    "TERMINATED": "it has been taken back; delete it and create it again",
    "STOPPED": "start it, or create another",
    "STOPPING": "start it, or create another",
    "SUSPENDED": "start it, or create another",
    "DELETING": "create it again",
}
_TAKEN_BACK = ("PREEMPTED", "TERMINATED", "DELETING")
# What the API says where nothing is the matter: old and new runtimes differ.
_HEALTHY = (None, "", "HEALTHY", "HEALTH_UNSPECIFIED")
_OVERLOADED = 429  # HTTP status; from 500 on, the server is at fault


def find(
    name: str, zone: str | None = None, project: str | None = None
) -> cloud_tpu_client.Client:
    """Returns a client of the API for one TPU.

    Args:
        name: of the TPU.
        zone: where it is; None: that of this machine.
        project: whose it is; None: that of this machine.

    Raises:
        ValueError: if zone or project are unknown.
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
    """Returns once the TPU is there, healthy, and of our TensorFlow version.

    Args:
        client: of `find`.
        tensorflow_version: ours, e.g. "2.20.0".
        minutes: to wait for what may still become ready; 0: one look.
        sleep: takes seconds.

    Raises:
        AwayError: if it has been taken back.
        ValueError: for any other reason; in one sentence, why not.
    """
    name, waited = client.name(), 0.0
    problem, runtime = _look(client)
    while problem and waited < 60 * minutes:
        logging.info("Waiting for the TPU %s: %s.", name, problem)
        sleep(_SECONDS_BETWEEN_POLLS)
        waited += _SECONDS_BETWEEN_POLLS
        problem, runtime = _look(client)
    if problem:
        raise ValueError(
            f"The TPU {name!r} is not ready after {waited / 60:.3g} minutes "
            f"(--tpu_wait_minutes): {problem}."
        )
    found = re.search(r"\d+\.\d+(\.\d+)?", runtime or "")
    if not found:
        logging.warning(
            "The TPU %s runs %s: it cannot be told whether that fits "
            "TensorFlow %s.",
            name,
            runtime,
            tensorflow_version,
        )
    elif not f"{tensorflow_version}.".startswith(f"{found[0]}."):
        raise ValueError(
            f"The TPU {name!r} runs TensorFlow {runtime}, this program "
            f"{tensorflow_version}, and both must be the same: create the TPU "
            f"with a runtime of {tensorflow_version}."
        )


def _look(
    client: cloud_tpu_client.Client,
) -> tuple[str | None, str | None]:
    """Returns what time may mend, None if all is well; and the runtime.

    Raises:
        ValueError: for what time does not mend.
    """
    try:
        state, health, runtime = (
            _ask(client, question)
            for question in (
                client.state,
                client.health,
                client.runtime_version,
            )
        )
    except _NoAnswerError as error:
        return str(error), None
    if state in _GONE:
        kind = AwayError if state in _TAKEN_BACK else ValueError
        raise kind(f"The TPU {client.name()!r} is {state}: {_GONE[state]}.")
    if state != _READY:
        return f"it is {state}", runtime
    if health not in _HEALTHY:
        return f"its health is {health}", runtime
    return None, runtime


class AwayError(ValueError):
    """The TPU was there, or should be, and may be again."""


class _NoAnswerError(ValueError):
    """The API does not answer for now."""


def _ask(
    client: cloud_tpu_client.Client, question: Callable[[], str | None]
) -> str | None:
    """Returns an answer of the API.

    Raises:
        ValueError: if there is no such TPU, or we may not know.
    """
    name = client.name()
    try:
        return question()
    except oauth2client.client.ApplicationDefaultCredentialsError as error:
        raise ValueError(
            f"No permission to look at the TPU {name!r}: there are no "
            "credentials. Run: gcloud auth application-default login"
        ) from error
    except (
        ValueError,  # the client's own, for whatever else there was
        OSError,
        httplib2.HttpLib2Error,
        googleapiclient.errors.Error,
    ) as error:
        raise _refusal(name, error) from error


def _refusal(name: str, error: Exception) -> ValueError:
    """Returns the error to raise for the client's error."""
    cause = error.__context__ or error
    if isinstance(cause, (OSError, httplib2.HttpLib2Error)):
        return _NoAnswerError(f"the API does not answer ({cause})")
    if not isinstance(cause, googleapiclient.errors.HttpError):
        return ValueError(f"Cannot look up the TPU {name!r}: {cause}")
    status, reason = int(cause.resp.status), _reason(cause)
    if status >= 500 or status == _OVERLOADED:
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


def _reason(error: googleapiclient.errors.HttpError) -> str:
    """Returns the API's own words."""
    try:
        return json.loads(error.content)["error"]["message"]
    except (ValueError, KeyError, TypeError):  # a proxy's page
        return f"{error.resp.reason}."
