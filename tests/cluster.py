# SPDX-License-Identifier: Apache-2.0
"""Several workers on this machine."""

import itertools
import json
import os
import socket

# Below those that systems give to outgoing connections. Each process starts
# elsewhere, so that tests that run side by side do not take the same ports.
_FIRST_PORT, _NUM_PORTS, _STRIDE = 10_000, 20_000, 32
_offsets = itertools.count(os.getpid() * _STRIDE)


def addresses(count):
    """Returns addresses for so many workers, which nobody else uses now."""
    ports = (_FIRST_PORT + offset % _NUM_PORTS for offset in _offsets)
    free = (f"localhost:{port}" for port in ports if _is_free(port))
    return list(itertools.islice(free, count))


def _is_free(port):
    with socket.socket() as probe:
        return probe.connect_ex(("localhost", port)) != 0


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
