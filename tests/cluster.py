# SPDX-License-Identifier: Apache-2.0
"""Several workers on this machine."""

import json
import socket


def addresses(count):
    """Returns addresses for so many workers, which nobody else has now."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("localhost", 0))
    found = [f"localhost:{each.getsockname()[1]}" for each in sockets]
    for each in sockets:
        each.close()
    return found


def tf_configs(count):
    """Returns the TF_CONFIG of each of several workers."""
    workers = addresses(count)
    return [
        json.dumps(
            {
                "cluster": {"worker": workers},
                "task": {"type": "worker", "index": index},
            }
        )
        for index in range(count)
    ]
