from __future__ import annotations

import pytest
from exported import SIZE
from tiny import sharp_images, sharp_model

from iared2.export.stages import export_stages


@pytest.fixture(params=["openvino", "onnxruntime"])
def backend(request):
    pytest.importorskip(request.param, reason=f"{request.param} is missing: pip install 'iared2[test]'")
    return request.param


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model of a class token, and its file."""
    model = sharp_model(("deit_tiny_patch16_224", SIZE))
    model.class_names = tuple("abcdefg")
    model.calibrate(sharp_images(9), keep=(0.8, 0.5, 0.2))
    path = tmp_path_factory.mktemp("engine") / "m.zip"
    export_stages(model, path)
    return model, path
