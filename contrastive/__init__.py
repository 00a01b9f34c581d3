# SPDX-License-Identifier: Apache-2.0
"""A program that pretrains image encoders, and its library face.

    from contrastive import load_classifier, load_encoder

`contrastive.weights.loading` documents both functions. TensorFlow is imported when one of them is
used for the first time.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from contrastive.weights.loading import load_classifier, load_encoder

__all__ = ["load_classifier", "load_encoder"]


def __getattr__(name: str) -> Any:
    """Imports a function of the library face (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("contrastive.weights.loading"), name)
