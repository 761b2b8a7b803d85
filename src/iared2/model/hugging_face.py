"""A model as a folder of the Hugging Face Hub: ``config.json``, ``model.safetensors``, a card.

One ``config.json`` serves iared2, timm and Transformers. Only its entry ``iared2`` describes the model: it is what the
header of a single file contains, and is checked in the same way (file.py). The other entries repeat it in the words of
timm (``architecture``, ``pretrained_cfg``) and Transformers (``auto_map``, ``id2label``).

Nothing here uses the network unless a name is neither a file nor a folder, or `push_to_hub` is called.
"""

from __future__ import annotations

import json
import os
import re
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from huggingface_hub import ModelCard, PyTorchModelHubMixin, snapshot_download
from safetensors import SafetensorError

from ..atomic import whole
from ..errors import InputError
from . import card, file
from .names import timm_config, timm_name
from .restore import restored

if TYPE_CHECKING:
    from .reduced import ReducedVisionTransformer

MODEL_TYPE = "iared2"
"""Transformers' name of our models."""
CODE = "modeling_iared2"
"""The module that Transformers reads from the folder, with ``trust_remote_code=True``."""
WEIGHTS = "model.safetensors"
HUB_NAME = re.compile(r"(hf-hub:|https://huggingface\.co/)?(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\w[\w./-]*))?")
FILE_SUFFIXES = {".safetensors", ".pth", ".pt", ".ckpt", ".bin", ".tar"}

Model = TypeVar("Model", bound="HubModel")


class HubModel(PyTorchModelHubMixin):
    """The part of a `ReducedVisionTransformer` that reads and writes folders of the Hugging Face Hub."""

    @classmethod
    def from_pretrained(  # the mixin's would pass entries of config.json to __init__
        cls: type[Model], pretrained_model_name_or_path: str | Path, *, revision: str | None = None, **hub_kwargs: Any
    ) -> Model:
        """Load a model, in evaluation mode, on the CPU.

        Args:
            pretrained_model_name_or_path: a folder of `save_pretrained`, a file of `save`, or the name of a model on
                the Hub, ``user/model`` or ``user/model@revision``.
            revision: a branch, tag or commit on the Hub.
            hub_kwargs: of ``huggingface_hub.snapshot_download``: ``token``, ``cache_dir``, ``force_download``,
                ``local_files_only``.

        Raises:
            InputError: there is no such model, or it does not describe a model.
        """
        path = Path(pretrained_model_name_or_path)
        if isinstance(pretrained_model_name_or_path, str) and not path.exists():
            path = fetch(pretrained_model_name_or_path, revision, **hub_kwargs)
        path = path / WEIGHTS if path.is_dir() else path
        file.is_safetensors(path)  # or it says what is missing
        return restored(cls, path, *file.read(path)).eval()  # type: ignore[attr-defined,type-var]

    def save_pretrained(  # type: ignore[override]  # the mixin would remove config.json before it writes the new one
        self: Any,
        save_directory: str | Path,
        *,
        config: None = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Write ``config.json``, ``model.safetensors`` and a card into a folder; for images also Transformers' code.

        The folder is created. An existing card is kept, all other files are replaced together.

        Args:
            save_directory: the folder.
            config: must be None: the model knows its configuration.
            repo_id: for `push_to_hub`; by default the name of the folder.
            push_to_hub: also call ``push_to_hub``, which uses the network.
            model_card_kwargs: for `generate_model_card`; its ``picture`` is written as ``picture.png``.
            push_to_hub_kwargs: for ``push_to_hub``.

        Returns:
            The address of the commit, if it was pushed.

        Raises:
            InputError: the folder cannot be written, or the backbone cannot be rebuilt from its timm name.
        """
        if config is not None:
            raise InputError("save_pretrained: leave config out, the model knows its own")
        folder, known = Path(save_directory), dict(model_card_kwargs or {})
        text = str(self.generate_model_card(**known))
        settings = folder_config(self)
        tensors = self.state_dict()
        file.check_values(tensors, folder)
        with whole(folder / "config.json", parents=True, errors=SafetensorError) as path:
            file.write_tensors(path.with_name(WEIGHTS), tensors, {"format": "pt"})
            if "auto_map" in settings:
                code = (files("iared2") / "pretrained" / f"{CODE}.py").read_bytes()
                path.with_name(f"{CODE}.py").write_bytes(code)
            if (picture := known.get("picture")) is not None:
                picture.save(path.with_name(card.PICTURE))
            if not (folder / "README.md").exists():
                path.with_name("README.md").write_text(text, encoding="utf-8")
            _write_json(path, settings)
        if not push_to_hub:
            return None
        name = repo_id or folder.resolve().name
        return self.push_to_hub(name, model_card_kwargs=model_card_kwargs, **push_to_hub_kwargs)

    def push_to_hub(self: Any, repo_id: str, **kwargs: Any) -> str:
        """Upload what `save_pretrained` writes, in one commit. Arguments: see ``ModelHubMixin.push_to_hub``."""
        known = {"repo_id": repo_id, **(kwargs.pop("model_card_kwargs", None) or {})}
        return super().push_to_hub(repo_id, model_card_kwargs=known, **kwargs)

    def generate_model_card(self: Any, **known: Any) -> ModelCard:
        """The card of this model, from what the model knows and what is given: see `card.model_card`."""
        return card.model_card(self, **known)


def is_hub_name(name: str) -> bool:
    """Whether ``name`` means a model on the Hub, ``user/model[@revision]``, and not a path with a typing error.

    A path exists, or its first part does, or it ends as files of weights do.
    """
    if os.path.exists(name) or not HUB_NAME.fullmatch(name):
        return False
    return not os.path.lexists(name.split("/")[0]) and Path(name).suffix.lower() not in FILE_SUFFIXES


def fetch(name: str, revision: str | None = None, **hub_kwargs: Any) -> Path:
    """The folder of a model of the Hub, from the cache or the network; with ``HF_HUB_OFFLINE=1`` from the cache alone.

    Only ``config.json`` and ``model.safetensors`` are downloaded, both of the same commit.

    Args:
        name: ``user/model`` or ``user/model@revision``.
        revision: a branch, tag or commit.
        hub_kwargs: of ``huggingface_hub.snapshot_download``.

    Raises:
        InputError: not a name of this form, no such model, it cannot be reached, or its weights are not safetensors.
    """
    match = HUB_NAME.fullmatch(name)
    if not match:
        raise InputError(f"there is no file or folder {name}, and a model on the Hugging Face Hub is called user/model")
    hub_kwargs = {"revision": revision or match["revision"], **hub_kwargs}
    try:
        folder = Path(snapshot_download(match["repo"], allow_patterns=["config.json", WEIGHTS], **hub_kwargs))
    except Exception as error:  # the client has its own, and those of its HTTP library
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(
            f"there is no file or folder {name}, and the Hugging Face Hub gives no such model: {reason}"
        ) from error
    if not file.is_safetensors(folder / WEIGHTS):
        raise InputError(f"{name} of the Hugging Face Hub: its {WEIGHTS} is not in that format, and no other is read")
    return folder


def folder_config(model: ReducedVisionTransformer) -> dict[str, Any]:
    """The contents of ``config.json``.

    Raises:
        InputError: the backbone cannot be rebuilt from its timm name.
    """
    own = file.config_of(model)
    config: dict[str, Any] = {
        "architecture": timm_name(own),
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "pretrained_cfg": timm_config(own),
        "iared2": own,
    }
    if model.is_video or not model.num_classes:
        return config
    names = model.class_names or [str(label) for label in range(model.num_classes)]
    return config | {
        "model_type": MODEL_TYPE,
        "architectures": ["IARED2ForImageClassification"],
        "auto_map": {
            "AutoConfig": f"{CODE}.IARED2Config",
            "AutoImageProcessor": f"{CODE}.IARED2ImageProcessor",
            "AutoModelForImageClassification": f"{CODE}.IARED2ForImageClassification",
        },
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "id2label": dict(enumerate(names)),
        "label2id": {name: label for label, name in enumerate(names)},
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
