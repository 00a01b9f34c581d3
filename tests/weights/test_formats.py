# SPDX-License-Identifier: Apache-2.0
"""The table of names and the table of writers list the same formats."""

import pytest

from contrastive.weights import export, formats, verify


def test_formats_equal_those_of_writers_and_verify():
    assert formats.FORMATS == tuple(export.WRITERS)
    assert {*verify.PACKAGES, "safetensors"} == set(formats.FORMATS)


@pytest.mark.parametrize(("names", "received"), [(["tflite", "onnx"], "tflite"), ([], "none")])
def test_check_formats_unknown_or_none_raises(names, received):
    with pytest.raises(ValueError, match=f"Received: {received}"):
        formats.check_formats(names)
