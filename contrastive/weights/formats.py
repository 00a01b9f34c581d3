# SPDX-License-Identifier: Apache-2.0
"""Names of the export formats; this module imports no library."""

from collections.abc import Sequence

from contrastive.config.choices import FORMATS

# Each format, and a Python expression that reads it.
LOADED_BY = {
    "saved_model": "tf.saved_model.load('saved_model')",
    "keras": "keras.saving.load_model('encoder.keras')",
    "torchvision": "model.load_state_dict(safetensors.torch.load_file('torchvision.safetensors'))",
    "onnx": "onnxruntime.InferenceSession('model.onnx')",
    "safetensors": "contrastive.load_encoder('networks.safetensors')",
}


class CannotExport(ValueError):  # noqa: N818
    """A format cannot express the networks, or could not be written."""


def check_formats(formats: Sequence[str]) -> None:
    """Raises ValueError if a format is unknown, or there is none."""
    unknown = sorted(set(formats) - set(FORMATS))
    if unknown or not formats:
        raise ValueError(
            f"Formats are {', '.join(FORMATS)}. Received: {', '.join(unknown) or 'none'}."
        )
