# SPDX-License-Identifier: Apache-2.0
"""Reads batches on the hosts of other processes, as those of a TPU pod do.

python remote_hosts.py FOLDER OUT.npz

FOLDER has images, of which one, `cut.png`, is broken after it was found, and one has no foreground.
Every kind of stream is read here and on two other hosts, each its part: OUT has, as `STREAM/here`
and `STREAM/there`, what is in all batches, and as `reports/here` and `reports/there` how many
images this process was told of.
"""

import dataclasses
import functools
import itertools
import os
import subprocess
import sys

import numpy as np
import tensorflow as tf

import data
import data_util
from tests.support import cluster

_HOSTS, _BATCH_SIZE, _STEPS = 2, 8, 3
_SERVER = """
import sys, tensorflow as tf
spec = tf.train.ClusterSpec({"worker": sys.argv[2:]})
tf.distribute.Server(spec, "worker", int(sys.argv[1])).join()
"""


def load(folder):
    """Returns what is read, by name: images at hand, files, masked files."""
    return {
        "memory": data.load("photo_patches"),
        "files": data.load(folder, "all"),
        "masked": data.load(folder, "all", saliency="spectral"),
    }


def read(datasets, devices):
    """Returns what all batches hold, by stream, and the number of reports."""
    view = data_util.simclr_augmentation(16)
    masked = dataclasses.replace(view, mask_probability=1.0)
    found = {}
    for name, dataset in datasets.items():
        views = (masked if name == "masked" else view,) * 2
        found[name] = _rows(
            functools.partial(data.train_stream, dataset, seed=0, views=views),
            devices,
        )
    found["evaluation"] = _rows(
        functools.partial(data.eval_stream, datasets["files"], image_size=16),
        devices,
    )
    undecodable, masks = datasets["files"].undecodable, datasets["masked"].masks
    found["reports"] = np.array([len(undecodable), len(masks.ids)])
    return found


def _rows(make_stream, devices):
    found = []
    for index, device in enumerate(devices):
        with tf.device(device):
            stream = make_stream(
                batch_size=_BATCH_SIZE,
                num_replicas=_HOSTS,
                pipeline_index=index,
                num_pipelines=_HOSTS,
            )
            for batch in itertools.islice(stream, _STEPS):
                assert batch["id"].device.endswith(device), batch["id"].device
                found += tf.nest.flatten(batch)
    return np.concatenate([np.ravel(x).astype(np.float64) for x in found])


def main(folder, out):
    datasets = {where: load(folder) for where in ("here", "there")}
    os.truncate(os.path.join(folder, "cut.png"), 60)
    addresses = cluster.addresses(_HOSTS)
    servers = [
        subprocess.Popen([sys.executable, "-c", _SERVER, str(i), *addresses]) for i in range(_HOSTS)
    ]
    try:
        tf.config.experimental_connect_to_cluster(
            tf.train.ClusterSpec({"worker": addresses}), job_name="client"
        )
        host = "/job:{}/replica:0/task:{}/device:CPU:0"
        devices = {
            "here": [host.format("client", 0)] * _HOSTS,
            "there": [host.format("worker", i) for i in range(_HOSTS)],
        }
        found = {
            f"{name}/{where}": value
            for where in devices
            for name, value in read(datasets[where], devices[where]).items()
        }
    finally:
        for server in servers:
            server.kill()
    np.savez(out, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
