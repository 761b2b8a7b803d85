"""Many photos -> a table: the class that `iared2 predict`, Ray Data and `datasets.map` call, batch by batch.

Owns the columns. Does not find photos and writes no files.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..atomic import to_json
from ..data.batches import model_transform
from ..data.photo_batches import read_images
from ..device import usable_device
from ..errors import InputError, missing
from ..export import served
from ..model import backbone as vit
from ..model import onednn, second_pass
from ..model.decide import first_grid
from ..model.reduced import ReducedVisionTransformer
from ..model.restore import described
from ..pretrained.checkpoint import BOX
from ..runtime import BACKENDS, Engine
from ..runtime.archive import is_exported
from .photo import class_name
from .result import check_takes, decision_for, opened

IMAGE_COLUMNS = ("image", "bytes", "img")
"""Where a batch has its photos, if it is not said: `ray.data.read_images`, `read_binary_files`, and many data sets."""


class BatchPredictor:
    """Columns of a batch of photos -> a `pyarrow.Table` with one row per photo.

    ``ray.data.read_images(…).map_batches(iared2.BatchPredictor, batch_size=64, concurrency=2)`` and
    ``dataset.map(iared2.BatchPredictor(), batched=True, batch_size=64)`` both take it.

    The columns: ``top5``, a list of ``{class: string, index: int32, probability: float32}``, the best first; ``kept``,
    a list of D int32, the patches alive after each group; ``macs``, int64, including the interpreters; ``second_pass``,
    bool, whether the classes are from a second pass with every patch (`Decision.confidence`); ``embedding``, C float32,
    the pooled features before the classifier, on request; ``scores``, D × N float16 in (0, 1), 0 where a patch was
    already dropped, on request; and ``error``, why a photo could not be read, in which case the others are null. The
    rest of the batch has no influence on a row, except for rounding, and in a file of ``--int8``.

    Args:
        model: a model, or a checkpoint for `iared2.load`; None: the model in the box. Or, for an engine other than
            torch, a file of ``iared2 export --adaptive-batch``.
        device: anything that `torch.device` takes; None: cuda if available, else cpu.
        embedding: add this column.
        scores: add this column.
        threshold: one number or one per group; the model's own decision if None.
        image_size: of `ReducedVisionTransformer.set_input_size`, which changes a model that is given; None: its own.
        image_column: the column of photos in a batch; None: the first of ``IMAGE_COLUMNS`` that there is.
        engine: "torch", or "openvino" or "onnxruntime": `runtime.Engine` in float32 on the CPU, with the threads of
            torch. A model that is not exported yet is exported first, in about half a minute for a ViT-S. An instance
            then cannot be pickled; give Ray the class.

    Raises:
        InputError: the checkpoint is not a model of RGB photos, the device is missing, the thresholds are invalid, a
            package is missing, or the engine has no such device, no embedding, or not these layers. Or an exported
            model is to run in torch, or at another size.
    """

    def __init__(
        self,
        model: ReducedVisionTransformer | str | Path | None = None,
        device: str | torch.device | None = None,
        *,
        embedding: bool = False,
        scores: bool = False,
        threshold: float | Sequence[float] | None = None,
        image_size: int | Sequence[int] | None = None,
        image_column: str | None = None,
        engine: str = "torch",
    ) -> None:
        _arrow()
        if engine in BACKENDS and (embedding or not str(device or "cpu").startswith("cpu")):
            raise InputError(f"the engine {engine} has no embeddings and runs on the CPU: leave these options out")
        self.device = usable_device(device if engine == "torch" else device or "cpu")
        served.check_engine(engine, self.device)
        onednn.forget_shapes()
        self._served: Engine | None = None
        is_file = isinstance(model, Path) or (isinstance(model, str) and model != BOX)
        self._file = Path(model) if is_file and is_exported(model) else None  # type: ignore[arg-type]
        if self._file:
            if engine == "torch" or image_size is not None:
                raise InputError(f"{model} is exported: it runs in openvino or onnxruntime (engine), at its own size")
            self._served = Engine(self._file, engine, torch.get_num_threads())
            loaded, self._content = _described(self._served), self._file.read_bytes()
        else:
            loaded = opened(model)
            if image_size is not None:
                loaded.set_input_size(image_size)
            loaded.eval().to(self.device)
        check_takes(loaded, "photos")
        self.model = loaded
        self.decision = decision_for(loaded, threshold)
        if self._served and (drops := self.decision.first_drop(math.prod(self.grid_size))) < self._served.stem:
            raise InputError(
                f"group {drops + 1} drops patches by this decision, and {model} has groups 1 to {self._served.stem} as"
                f" one graph: export a model that drops patches in group {drops + 1}"
            )
        self.embedding, self.scores, self.image_column = embedding, scores, image_column
        self.transform = model_transform(loaded.pretrained_cfg)
        self.engine = engine
        if engine != "torch" and not self._file:
            stem = self.decision.first_drop(math.prod(self.grid_size))
            self._served = served.exported(loaded, engine, torch.get_num_threads(), stem=stem)
        elif loaded is not model and not self._file:
            loaded.pack_weights()

    @property
    def grid_size(self) -> tuple[int, ...]:
        """Rows and columns of patches of the first pass."""
        return first_grid(self.decision, self.model.grid_size)

    def digest(self) -> str:
        """Of the model: its weights, or the exported file, and what else determines the result."""
        total = hashlib.blake2b(repr(self.model).encode(), digest_size=16)
        cfg = self.model.pretrained_cfg
        total.update(to_json([str(cfg.get(name)) for name in ("mean", "std", "interpolation")]).encode())
        if self._file:
            total.update(self._content)
            return total.hexdigest()
        for name, tensor in sorted(self.model.state_dict().items()):
            total.update(name.encode())
            total.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return total.hexdigest()

    @property
    def schema(self) -> Any:
        """The `pyarrow.Schema` of the columns, ``error`` last."""
        pa = _arrow()
        best = pa.struct([("class", pa.string()), ("index", pa.int32()), ("probability", pa.float32())])
        fields = {"top5": pa.list_(best), "kept": pa.list_(pa.int32()), "macs": pa.int64(), "second_pass": pa.bool_()}
        if self.embedding:
            fields["embedding"] = pa.list_(pa.float32(), self.model.num_features)
        if self.scores:
            fields["scores"] = pa.list_(pa.list_(pa.float16(), math.prod(self.grid_size)), self.model.num_groups)
        return pa.schema([*fields.items(), ("error", pa.string())])

    def __call__(self, batch: Mapping[str, Any]) -> Any:
        """A `pyarrow.Table` of the other columns of the batch and ours.

        Args:
            batch: columns of equal length. Photos are Pillow images, uint8 arrays ``(H, W, 3)`` or ``(H, W)``, encoded
                photos as bytes, or ``{"bytes": …}``.

        Raises:
            InputError: there is no such column, or another column cannot be kept in Arrow.
        """
        pa = _arrow()
        wanted = IMAGE_COLUMNS if self.image_column is None else (self.image_column,)
        if (column := next((name for name in wanted if name in batch), None)) is None:
            raise InputError(f"no column {' or '.join(wanted)}, there is {', '.join(batch)}; set image_column")
        images, errors = read_images(batch[column], self.transform)
        found, others = self.predict(images, errors), {}
        for name in set(batch) - {column} - set(found.schema.names):
            try:
                others[name] = pa.array(list(batch[name]) if getattr(batch[name], "ndim", 1) > 1 else batch[name])
            except (pa.ArrowException, TypeError, ValueError) as error:
                raise InputError(f"the column {name} cannot be kept ({error}); drop it first") from None
        columns = {name: others[name] for name in batch if name in others}
        return pa.table({**columns, **dict(zip(found.schema.names, found.columns, strict=True))})

    @torch.inference_mode()
    def predict(self, images: Tensor, errors: Sequence[str | None]) -> Any:
        """The columns as a `pyarrow.RecordBatch`, from the output of ``data.photo_batches.read_images``.

        Args:
            images: ``(G, 3, H, W)``, transformed.
            errors: B entries, None for the G rows that have an image.
        """
        pa = _arrow()
        schema = self.schema
        if not len(images):
            columns = [pa.nulls(len(errors), field.type) for field in schema][:-1]
            return pa.record_batch([*columns, pa.array(errors, pa.string())], schema)
        model = self.model
        if self._served is None:
            weight = next(model.parameters())
            images = images.to(weight.device, weight.dtype, non_blocking=True)
            passes = second_pass.run(model, images, self.decision)
            output = passes.output(model)
        else:
            output = served.trace(self._served, model, images, self.decision)
        rows = {
            "top5": self._top5(output.logits),
            "kept": _lists(output.kept.sum(-1).T.cpu().numpy().astype(np.int32), pa.list_(pa.int32())),
            "second_pass": pa.array(output.unsure.cpu().numpy()),
            "macs": pa.array(output.macs.cpu().numpy()),
        }
        if self.embedding:
            features = passes.last(lambda packed: vit.head(model.backbone, packed, pre_logits=True))
            rows["embedding"] = _lists(features.float().cpu().numpy(), schema.field("embedding").type)
        if self.scores:
            halves = output.scores.transpose(0, 1).half().contiguous().cpu().numpy()
            rows["scores"] = _lists(halves, schema.field("scores").type)
        numbers = iter(range(len(images)))
        places = pa.array([next(numbers) if error is None else None for error in errors], pa.int64())
        columns = [rows[name].take(places).cast(schema.field(name).type) for name in schema.names[:-1]]
        return pa.record_batch([*columns, pa.array(errors, pa.string())], schema)

    def _top5(self, logits: Tensor) -> Any:
        """``(G, K)`` -> the best classes; none for a model whose output is features."""
        pa = _arrow()
        best = logits.float().softmax(-1).topk(min(5, self.model.num_classes))
        indices, probabilities = best.indices.cpu().numpy().astype(np.int32), best.values.cpu().numpy()
        names = pa.array([class_name(self.model, index) for index in indices.ravel().tolist()], pa.string())
        flat = [names, pa.array(indices.ravel()), pa.array(probabilities.ravel())]
        offsets = np.arange(len(indices) + 1, dtype=np.int32) * indices.shape[1]
        return pa.ListArray.from_arrays(offsets, pa.StructArray.from_arrays(flat, ["class", "index", "probability"]))


def _described(engine: Engine) -> ReducedVisionTransformer:
    """The model of an exported file, without its weights.

    Raises:
        InputError: the file does not say which model it is, or contradicts itself.
    """
    model = described(ReducedVisionTransformer, engine.path, engine.description)
    cfg, backbone, decision = model.pretrained_cfg, model.backbone, model.decision
    said = {
        **{name: tuple(cfg.get(name) or ()) for name in ("input_size", "mean", "std")},
        **{name: getattr(model, name) for name in ("num_groups", "class_names")},
        **{name: getattr(backbone, name) for name in ("num_prefix_tokens", "embed_dim")},
        **{
            name: getattr(decision, name)
            for name in ("thresholds", "num_keep", "max_tokens", "spread", "confidence", "scale")
        },
        "num_patches": math.prod(first_grid(decision, model.grid_size)),
        "whole_patches": model.num_patches,
        "merges": model.dropped == "merged",
    }
    for name, value in said.items():
        if getattr(engine, name) != value:
            raise InputError(f"{engine.path} describes another model than its graphs are ({name}); export it again")
    return model.eval()


def _lists(values: np.ndarray, kind: Any) -> Any:
    """``(G, …)`` as an array of G lists, of this type, without a copy of each number to Python."""
    pa = _arrow()
    flat = pa.array(values.ravel())
    for size in reversed(values.shape[1:]):
        flat = pa.FixedSizeListArray.from_arrays(flat, size)
    return flat.cast(kind)


def _arrow() -> Any:
    try:
        import pyarrow
    except ImportError:
        raise missing("the table", "pyarrow", "predict") from None
    return pyarrow
