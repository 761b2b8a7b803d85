"""Exported models, files of them that are damaged, and what has to be the same in torch and in a runtime."""

from __future__ import annotations

import json
import zipfile

import numpy as np

from iared2.runtime.layout import MAX_PADDING

SIZE = {"img_size": (48, 32), "patch_size": 8, "embed_dim": 48, "num_heads": 3, "num_classes": 7, "depth": 3}


def check(found, output, logits=1e-4):
    assert np.array_equal(found.kept, output.kept.numpy())
    np.testing.assert_allclose(found.scores, output.scores.numpy(), atol=1e-5)
    np.testing.assert_allclose(found.logits, output.logits.numpy(), atol=logits, rtol=0)
    assert 0 <= found.padding <= MAX_PADDING


def changed(path, target, manifest=None, graphs=None, **options):
    """A copy of the file with other entries; None leaves one out."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w", **options) as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "manifest.json":
                content = json.dumps({**json.loads(content), **(manifest or {})}).encode()
            content = {name: content, **(graphs or {})}[name]
            if content is not None:
                new.writestr(name, content)
    return target
