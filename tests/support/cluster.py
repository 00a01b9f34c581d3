# SPDX-License-Identifier: Apache-2.0
"""Several workers on this machine."""

import fcntl
import itertools
import json
import os
import pathlib
import socket
import tempfile

# Below the ports that systems give to outgoing connections.
_PORTS = range(10_000, 30_000)
# Locked files, one a port, which no other process of tests can lock meanwhile.
_reserved = []


def addresses(count):
    """Returns addresses for so many workers, which nobody else uses now."""
    first = os.getpid() * 64 % len(_PORTS)
    ports = (*_PORTS[first:], *_PORTS[:first])
    free = (f"localhost:{port}" for port in ports if _reserve(port))
    return list(itertools.islice(free, count))


def _reserve(port):
    folder = pathlib.Path(tempfile.gettempdir()) / "test-ports"
    folder.mkdir(exist_ok=True)
    file = (folder / str(port)).open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with socket.socket() as probe:
            is_used = probe.connect_ex(("localhost", port)) == 0
    except BlockingIOError:
        is_used = True
    if is_used:
        file.close()
        return False
    _reserved.append(file)
    return True


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
