"""Our file format: one safetensors file, its configuration as JSON in the header. Knows nothing of models.

One file, so weights and configuration cannot part; written atomically, so a reader or a crash sees the old file or the
new one, never half of one.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import InputError


def write(path: Path | str, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Write tensors and configuration to ``path``, atomically.

    Raises:
        InputError: the folder does not exist or cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(
            {name: t.detach().cpu().contiguous() for name, t in tensors.items()},
            temporary,
            {"iared2": json.dumps(config)},
        )
        os.umask(mask := os.umask(0))
        os.chmod(temporary, 0o666 & ~mask)  # safetensors makes files that nobody else can read
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"cannot write {path}: {error}; give a path in a folder that exists and can be written"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what ``write`` wrote.

    Raises:
        InputError: no such file, or not a file of this format.
    """
    if not Path(path).is_file():
        raise InputError(f"there is no file {path}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            config = json.loads(metadata["iared2"])
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} is not a readable safetensors file ({error})") from None
    except KeyError:
        raise InputError(
            f"{path} is a safetensors file, but not one that iared2 saved: it has no configuration"
        ) from None
    return tensors, config
