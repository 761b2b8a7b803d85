"""Transformers' classes for models of iared2, which a folder of ``model.save_pretrained`` contains a copy of.

``AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)`` runs the copy. It needs the package
``iared2``, and only builds what that offers. Weights and configuration are read and checked as by ``iared2.load``.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature, PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_transforms import to_pil_image
from transformers.image_utils import make_flat_list_of_images
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils import cached_file, can_return_tuple

from iared2.data.batches import model_transform
from iared2.data.photo import to_rgb
from iared2.errors import InputError
from iared2.model import file, restore
from iared2.model.hugging_face import folder_config
from iared2.model.reduced import ReducedVisionTransformer

HUB_KWARGS = "cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder"


class IARED2Config(PreTrainedConfig):
    """The ``config.json`` of a folder; ``iared2`` is the part that describes the model."""

    model_type = "iared2"
    iared2: dict[str, Any] | None = None


class IARED2ForImageClassification(PreTrainedModel):
    """A `ReducedVisionTransformer`, the attribute ``iared2``, as Transformers' pipelines and Trainer expect it.

    Raises:
        InputError: the configuration does not describe a model.
    """

    config_class = IARED2Config
    base_model_prefix = "iared2"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: IARED2Config) -> None:
        super().__init__(config)
        if not isinstance(config.iared2, dict):
            raise InputError("config.json has no entry `iared2`: it was not written by model.save_pretrained")
        own = dict(config.iared2)
        model = restore.build(ReducedVisionTransformer, **file.check(own))
        self.iared2 = restore.configure(model, own)
        if config.num_labels != self.iared2.num_classes:
            self.iared2.reset_classifier(config.num_labels)
        names = tuple(str(config.id2label[label]) for label in range(config.num_labels))
        self.iared2.class_names = None if names[0] in ("0", "LABEL_0") else names
        self.post_init()

    @can_return_tuple
    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> ImageClassifierOutput:
        """``(B, 3, height, width)`` from `IARED2ImageProcessor` -> logits ``(B, K)``, with labels also their loss."""
        logits = self.iared2(pixel_values.to(self.dtype))
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutput(loss=loss, logits=logits)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """See ``PreTrainedModel.from_pretrained``. The weights are read and checked by iared2.

        Raises:
            InputError: the weights or the configuration do not describe a model.
        """
        hub = {key: kwargs.pop(key) for key in HUB_KWARGS if kwargs.get(key) is not None}
        if config is None:
            config, kwargs = IARED2Config.from_pretrained(
                pretrained_model_name_or_path, return_unused_kwargs=True, **hub, **kwargs
            )
        path = Path(cached_file(pretrained_model_name_or_path, "model.safetensors", **hub))
        tensors, _ = restore.checked(path, *file.read(path))
        arguments = file.check(dict(config.iared2 or {}))
        restore.check_fit(restore.on_meta(ReducedVisionTransformer, arguments), tensors, path)
        # copies: products with weights that lie in a file, at any address, are rounded in another way
        state = {f"iared2.{name}": tensor.clone() for name, tensor in tensors.items()}
        found = super().from_pretrained(None, *args, config=config, state_dict=state, **kwargs)
        loaded = found[0] if isinstance(found, tuple) else found  # with output_loading_info
        buffers = dict(loaded.iared2.named_buffers())
        # rotary tables are in no file: Transformers left them empty
        if computed := buffers.keys() - loaded.iared2.state_dict().keys():
            fresh = restore.build(ReducedVisionTransformer, **arguments)
            for name in computed:
                buffers[name].copy_(fresh.get_buffer(name))
        return found

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """See ``PreTrainedModel.save_pretrained``; the decision is saved as it is now."""
        self.config.update(folder_config(self.iared2))
        super().save_pretrained(save_directory, **kwargs)

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        self.iared2.set_grad_checkpointing(enable)


class IARED2ImageProcessor(BaseImageProcessor):
    """Photos to the input of the model, by the transform of `iared2.Predictor`: the whole image, squashed.

    Args:
        pretrained_cfg: ``input_size``, ``mean``, ``std`` and ``interpolation``.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012

    def __init__(self, pretrained_cfg: dict[str, Any], **kwargs: Any) -> None:  # kwargs: the rest of config.json
        super().__init__()
        self.pretrained_cfg = pretrained_cfg

    @classmethod
    def get_image_processor_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reads ``config.json``, since it has all that is needed."""
        return super().get_image_processor_dict(*args, **{"image_processor_filename": "config.json", **kwargs})

    def preprocess(self, images: Any, return_tensors: str | None = "pt", **kwargs: Any) -> BatchFeature:
        """Images in any of Transformers' forms -> ``pixel_values (B, 3, height, width)``."""
        transform = model_transform(self.pretrained_cfg)
        rgb = [to_rgb(to_pil_image(image)) for image in make_flat_list_of_images(images)]
        return BatchFeature({"pixel_values": torch.stack([transform(one) for one in rgb])}, tensor_type=return_tensors)
