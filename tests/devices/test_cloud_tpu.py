# SPDX-License-Identifier: Apache-2.0
"""What the Cloud TPU API says becomes a wait or one line.

A local server speaks the API's JSON; the client is the real one, with a user's credentials and
Google's discovery document in small.
"""

import http.server
import json
import threading

import oauth2client
import pytest

from contrastive.devices import cloud_tpu, strategies
from tests.support import program

_PROJECT, _ZONE, _NAME = "my-project", "us-central2-b", "my-tpu"
_PATH = f"/v1/projects/{_PROJECT}/locations/{_ZONE}/nodes/{_NAME}"


def _error(code, status, message):
    return {"error": {"code": code, "status": status, "message": message}}


def _node(state="READY", health="HEALTHY", version="2.20.0", **more):
    """A node as `projects.locations.nodes.get` returns it."""
    return {
        "name": _PATH.removeprefix("/v1/"),
        "acceleratorType": "v4-32",
        "state": state,
        "health": health,
        "tensorflowVersion": version,
        "network": "global/networks/default",
        "networkEndpoints": [{"ipAddress": "10.0.0.2", "port": 8470}],
        "createTime": "2026-01-01T00:00:00.0Z",
        **more,
    }


def _discovery(url):
    """As https://tpu.googleapis.com/$discovery/rest?version=v1, in small."""
    scope = "https://www.googleapis.com/auth/cloud-platform"
    get = {
        "id": "tpu.projects.locations.nodes.get",
        "httpMethod": "GET",
        "path": "v1/{+name}",
        "parameterOrder": ["name"],
        "parameters": {
            "name": {
                "location": "path",
                "required": True,
                "type": "string",
                "pattern": "^projects/[^/]+/locations/[^/]+/nodes/[^/]+$",
            }
        },
        "response": {"$ref": "Node"},
        "scopes": [scope],
    }
    resources = {"nodes": {"methods": {"get": get}}}
    for name in ("locations", "projects"):
        resources = {name: {"resources": resources}}
    return {
        "kind": "discovery#restDescription",
        "name": "tpu",
        "version": "v1",
        "protocol": "rest",
        "rootUrl": f"{url}/",
        "servicePath": "",
        "baseUrl": f"{url}/",
        "batchPath": "batch",
        "auth": {"oauth2": {"scopes": {scope: {"description": ""}}}},
        "schemas": {"Node": {"id": "Node", "type": "object"}},
        "resources": resources,
    }


class _Api:
    """A server whose answers are a list; the last one is given for ever."""

    def __init__(self):
        self.answers = []
        api = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                if self.path.startswith("/discovery"):
                    self._answer(_discovery(api.url))
                elif self.path.split("?")[0] != _PATH:
                    self._answer(_error(404, "NOT_FOUND", "Not found."))
                elif self.headers["Authorization"] != "Bearer a-token":
                    self._answer(_error(401, "UNAUTHENTICATED", "Who?"))
                else:
                    self._answer(api.answers[0])
                    if len(api.answers) > 1:
                        api.answers.pop(0)

            def do_POST(self):
                self._answer({"access_token": "a-token", "expires_in": 3600})

            def _answer(self, content):
                code = content.get("error", {}).get("code", 200)
                body = json.dumps(content).encode()
                self.send_response(code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever).start()


@pytest.fixture
def api(tmp_path, monkeypatch):
    api = _Api()
    key = tmp_path / "key.json"
    who = {"client_id": "me", "client_secret": "s", "refresh_token": "r"}
    key.write_text(json.dumps({"type": "authorized_user", **who}))
    monkeypatch.setattr(oauth2client, "GOOGLE_TOKEN_URI", f"{api.url}/token")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(key))
    monkeypatch.setenv("TPU_API_DISCOVERY_URL", f"{api.url}/discovery")
    yield api
    api.server.shutdown()
    api.server.server_close()


def _wait(minutes=1.0, version="2.20.0"):
    """Returns the pauses, in seconds, until the TPU was ready."""
    pauses = []
    cloud_tpu.wait_until_ready(
        cloud_tpu.find(_NAME, _ZONE, _PROJECT),
        tensorflow_version=version,
        minutes=minutes,
        sleep=pauses.append,
    )
    return pauses


def test_wait_until_ready_of_a_ready_tpu_does_not_wait(api):
    api.answers = [_node()]
    assert _wait() == []


def test_wait_until_ready_of_a_new_tpu_waits(api):
    # State, health and version are asked one after the other.
    making = _node("CREATING", None, networkEndpoints=[])
    api.answers = [making] * 6 + [_node()]
    assert len(_wait()) == 2


def test_wait_until_ready_of_a_maintained_tpu_waits(api):
    api.answers = [_node(health="UNHEALTHY_MAINTENANCE")] * 3 + [_node()]
    assert len(_wait()) == 1


def test_wait_until_ready_busy_api_tries_again(api):
    busy = _error(503, "UNAVAILABLE", "Try again.")
    api.answers = [busy, _error(429, "EXHAUSTED", "Slowly."), _node()]
    assert len(_wait()) == 2


@pytest.mark.parametrize(
    ("runtime", "fits"),
    [
        ("2.20.0", True),
        ("2.20", True),
        ("tpu-vm-tf-2.20.0-pod-pjrt", True),
        ("v2-alpha", True),  # says nothing
        (None, True),
        ("2.2", False),
        ("2.20.1", False),
        ("tpu-vm-tf-2.19.0", False),
    ],
)
def test_wait_until_ready_other_tensorflow_raises(api, runtime, fits):
    api.answers = [_node(version=runtime)]
    if fits:
        assert _wait() == []
    else:
        with pytest.raises(ValueError, match="both must be the same"):
            _wait()


def test_find_outside_google_cloud_without_a_zone_raises(monkeypatch):
    # Its metadata server is asked, which only exists there.
    def nowhere(*_, **__):
        raise cloud_tpu.URLError("Name or service not known")

    monkeypatch.setattr(cloud_tpu.cloud_tpu_client, "Client", nowhere)
    with pytest.raises(ValueError, match="--tpu_zone and --gcp_project"):
        cloud_tpu.find(_NAME)


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        (
            _error(404, "NOT_FOUND", f"Resource '{_NAME}' was not found."),
            f"There is no TPU '{_NAME}': Resource '{_NAME}' was not found.",
        ),
        (
            _error(403, "PERMISSION_DENIED", "The caller does not have it."),
            f"No permission to look at the TPU '{_NAME}': The caller",
        ),
        (
            _error(400, "INVALID_ARGUMENT", "Malformed."),
            f"Cannot look up the TPU '{_NAME}': Malformed.",
        ),
        (_node("PREEMPTED"), "is PREEMPTED: Google has taken it back"),
        (_node("TERMINATED"), "is TERMINATED"),
        (_node("STOPPED"), "is STOPPED: start it"),
        (_node("CREATING"), "not ready after 0 minutes"),
        (_node(health="UNHEALTHY_TENSORFLOW"), "health is UNHEALTHY_TENSOR"),
        (_node(version="2.12.0"), "runs TensorFlow 2.12.0, this program 2."),
        (_error(500, "INTERNAL", "Oh."), "the API answers 500, Oh."),
    ],
)
def test_main_tpu_that_is_not_ready_prints_one_line(
    api, answer, line, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(strategies, "_tpu_strategy", lambda *_: pytest.fail("it connected"))
    api.answers = [answer]
    code = program.main(
        "--dataset=photo_patches",
        f"--tpu_name={_NAME}",
        f"--tpu_zone={_ZONE}",
        f"--gcp_project={_PROJECT}",
        "--tpu_wait_minutes=0",
        f"--model_dir={tmp_path}",
    )
    error = capsys.readouterr().err.strip()
    assert line in error
    if answer.get("state") in ("PREEMPTED", "TERMINATED"):
        # A loop may make it again, and start this again.
        assert code == 75
        return
    assert code == 2
    assert error.startswith("Error: ")
    assert "\n" not in error
