# SPDX-License-Identifier: Apache-2.0
"""Encoders of runs, exports and other programs are loaded, or refused."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import safetensors.numpy

import model
from contrastive import run_record
from contrastive.training import checkpoints
from contrastive.weights import loading
from tests.support import foreign, program
from tests.support.encoders import (
    SIZES,
    TINY_TORCH,
    check_embeddings,
    check_features,
    new_step,
    objective_networks,
    random_networks,
    save_run,
    state_dict_of,
)
from tests.support.foreign import GOLDEN

_IMAGES = np.random.default_rng(0).random((2, 16, 16, 3), np.float32)


def test_load_encoder_run_gives_its_features(tmp_path):
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    networks = objective_networks(image_mean=mean, image_std=std)
    save_run(networks, tmp_path)
    expected = networks.encoder((_IMAGES - mean) / std, training=False)
    encoder = loading.load_encoder(str(tmp_path))
    np.testing.assert_allclose(encoder(_IMAGES), expected, rtol=1e-5, atol=1e-6)


def test_load_encoder_run_of_older_version_gives_its_features(tmp_path):
    networks = objective_networks()
    save_run(networks, tmp_path)
    run = run_record.read_run(str(tmp_path))
    run["architecture"]["of_another_version"] = 1
    del run["architecture"]["shortcuts"]
    run_record.write_run(str(tmp_path), run)
    np.testing.assert_array_equal(
        loading.load_encoder(str(tmp_path))(_IMAGES),
        networks.encoder(_IMAGES, training=False),
    )


def test_load_encoder_unknown_field_raises(tmp_path):
    save_run(objective_networks(), tmp_path)
    with pytest.raises(ValueError, match="no resnet_dept"):
        loading.load_encoder(str(tmp_path), resnet_dept=18)


def test_load_classifier_gives_probabilities_and_class_names(tmp_path):
    networks = objective_networks(num_classes=2)
    save_run(networks, tmp_path)
    classifier, names = loading.load_classifier(str(tmp_path))
    probabilities = np.exp(networks.logits(_IMAGES, training=False))
    probabilities /= probabilities.sum(1, keepdims=True)
    np.testing.assert_allclose(classifier(_IMAGES), probabilities, rtol=1e-5)
    assert names == ("0", "1")
    run = run_record.read_run(str(tmp_path)) | {"class_names": ["cat", "dog"]}
    run_record.write_run(str(tmp_path), run)
    assert loading.load_classifier(str(tmp_path))[1] == ("cat", "dog")


def test_load_classifier_without_classes_raises(tmp_path):
    save_run(objective_networks(num_classes=0), tmp_path)
    with pytest.raises(ValueError, match="no classifier"):
        loading.load_classifier(str(tmp_path))


def test_load_encoder_other_architecture_raises(tmp_path):
    save_run(objective_networks(), tmp_path)
    with pytest.raises(ValueError, match="does not fit"):
        loading.load_encoder(str(tmp_path), resnet_depth=18)


def test_load_encoder_nothing_there_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="No checkpoint at"):
        loading.load_encoder(str(tmp_path / "typo"))
    checkpoints.TrainingCheckpoints(str(tmp_path), step=new_step(), max_to_keep=1).save(1)
    with pytest.raises(ValueError, match="no run.json beside"):
        loading.load_encoder(str(tmp_path))


def test_load_encoder_beside_card_has_its_normalisation(tmp_path):
    networks = random_networks(**TINY_TORCH, image_mean=(0.5,) * 3)
    path = str(tmp_path / "torchvision.pth")
    foreign.write_torch(path, state_dict_of(networks.encoder))
    card = dataclasses.asdict(networks.architecture)
    run_record.write_run(str(tmp_path), {"architecture": card})
    shutil.move(tmp_path / "run.json", tmp_path / "export.json")
    check_features(loading.load_encoder(path), networks)


def test_load_encoder_export_of_this_program_gives_the_features(tmp_path):
    networks = random_networks(
        resnet_depth=10, width_multiplier=0.125, padding="same", channels=2,
        stem="cifar", image_std=(0.5, 0.25), num_classes=3,
    )  # fmt: skip
    path = str(tmp_path / "networks.safetensors")
    safetensors.numpy.save_file(
        {
            f"{name}/{v.path}": v.numpy()
            for name, network in networks.models().items()
            for v in network.variables
        },
        path,
        {"architecture": _json(networks.architecture)},
    )
    check_features(loading.load_encoder(path), networks)


def _json(architecture):
    return json.dumps(dataclasses.asdict(architecture))


def test_flags_published_checkpoint_sets_them():
    path = str(GOLDEN / "tiny_pretrain.pkl")
    resolved = program.resolve(
        "--train_mode=finetune",
        f"--checkpoint={path}",
        "--width_multiplier=1.5",
    )
    assert resolved["resnet_depth"] == 10
    assert resolved["padding"] == "same"
    assert resolved["normalize"] == "imagenet"
    assert resolved["base_filters"] == (64, 8, 8, 8, 8)
    assert resolved.origins["padding"] == "its run"
    assert resolved["width_multiplier"] == 1.5


def test_restore_pretrained_published_restores_encoder_alone():
    path = str(GOLDEN / "tiny_pretrain.pkl")
    found = loading.read_published(path)
    networks = model.build_networks(dataclasses.replace(found.architecture, num_classes=4))
    loading.restore_pretrained(path, networks)
    for variable in networks.encoder.variables:
        np.testing.assert_array_equal(variable, found.weights[variable.path])
    networks = model.build_networks(
        dataclasses.replace(found.architecture, proj_head_mode="linear", ft_proj_selector=1)
    )
    with pytest.raises(ValueError, match="no projection head"):
        loading.restore_pretrained(path, networks)
    other = model.build_networks(dataclasses.replace(found.architecture, stem="cifar"))
    with pytest.raises(ValueError, match="initial_conv/kernel"):
        loading.restore_pretrained(path, other)


def test_read_published_beside_a_run_reads_the_file(tmp_path, golden):
    """As when a model is fine-tuned in the directory of its checkpoint."""
    shutil.copy(GOLDEN / "tiny_pretrain.pkl", tmp_path)
    run_record.write_run(str(tmp_path), {"architecture": {}, "flags": {}})
    check_embeddings(tmp_path / "tiny_pretrain.pkl", "tiny", golden, SIZES[2:])
    assert loading.read_published(str(tmp_path)) is None


def test_load_networks_target_has_its_own_weights(tmp_path):
    networks = objective_networks("byol", num_classes=7)
    save_run(networks, tmp_path)
    target = loading.load_networks(str(tmp_path), target=True)
    for name in ("encoder", "projection"):
        for variable, copy in zip(
            getattr(networks, f"target_{name}").variables,
            getattr(target, name).variables,
            strict=True,
        ):
            np.testing.assert_array_equal(variable, copy)
    assert target.classifier is None
    path = str(tmp_path / "networks.safetensors")
    loading.save_tensors(target, path)
    read = loading.load_networks(path)
    np.testing.assert_array_equal(
        target.features(_IMAGES, training=False),
        read.features(_IMAGES, training=False),
    )


def test_load_networks_run_without_target_raises(tmp_path):
    save_run(objective_networks(), tmp_path)
    with pytest.raises(ValueError, match="no target network"):
        loading.load_networks(str(tmp_path), target=True)


def test_load_networks_export_without_a_tensor_raises(tmp_path):
    networks = objective_networks()
    path = str(tmp_path / "networks.safetensors")
    loading.save_tensors(networks, path)
    tensors = safetensors.numpy.load_file(path)
    del tensors["projection/projection_dense1/kernel"]
    fields = json.dumps(dataclasses.asdict(networks.architecture))
    metadata = {"architecture": fields}
    safetensors.numpy.save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=r"dense1/kernel is .*, none in the"):
        loading.load_networks(path)
    assert loading.load_encoder(path).count_params()
    with pytest.raises(ValueError, match="no target network"):
        loading.load_encoder(path, target=True)
