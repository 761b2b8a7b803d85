"""The arguments of every command, in one place, so that the same thing has the same name, form and default everywhere.

Imports no torch: `iared2 COMMAND --help` answers at once. The conventions, which tests/test_cli.py checks:

- The model is ``-c``/``--checkpoint``, by default the one in the box.
- A list is given with spaces, ``--keep 0.6 0.4 0.2``; commas are read as well.
- Results are a table on stdout. ``--json FILE`` writes them to a file as well; ``--json`` alone prints JSON to stdout,
  and the table to stderr.
- The help states every default.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from .explain.names import COMPARED, EVERY, PAPER

CHECKPOINT = "file of model.save(), folder of a run, or user/model of the Hugging Face Hub"
CUDA = "cuda if there is one, else cpu"


class _List(argparse.Action):
    """Values with spaces or commas between them, as a list of ``kind``."""

    def __init__(self, option_strings: Any, dest: str, kind: Callable[[str], Any] = float, **kwargs: Any) -> None:
        super().__init__(option_strings, dest, nargs="+", **kwargs)
        self.kind = kind

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        words = [word for value in values for word in value.replace(",", " ").split()]
        try:
            found = [self.kind(word) for word in words]
        except ValueError:
            found = []
        if not found:
            what = "whole numbers" if self.kind is int else "numbers"
            raise argparse.ArgumentError(self, f"{' '.join(values)!r}: give {what}, and words before the option")
        setattr(namespace, self.dest, found)


class _OldName(argparse.Action):
    """An option that has another name now, ``dest``: it still works, and says so."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        note(f"{option_string} is now --{self.dest.replace('_', '-')}")
        setattr(namespace, self.dest, values)


def note(text: str) -> None:
    """A line on stderr."""
    print(f"note: {text}", file=sys.stderr)


def old_form(command: str, arguments: argparse.Namespace, rest: Sequence[str]) -> bool:
    """Read ``evaluate CHECKPOINT DATA``, the form without ``-c``; ``rest`` is DATA. False if it is something else."""
    name = {"evaluate": "data", "explain-bench": "data", "export": "output"}.get(command, "")
    if not name or len(rest) != 1 or rest[0].startswith("-") or arguments.checkpoint is not None:
        return False
    arguments.checkpoint = getattr(arguments, name)
    setattr(arguments, name, rest[0])
    note(f"iared2 {command} CHECKPOINT {name.upper()} is now iared2 {command} -c CHECKPOINT {name.upper()}")
    return True


def _checkpoint(command: argparse.ArgumentParser, text: str = f"{CHECKPOINT} (default: the model in the box)") -> None:
    command.add_argument("-c", "--checkpoint", help=text)


def _device(command: argparse.ArgumentParser, default: str | None = "cpu") -> None:
    command.add_argument("--device", default=default, help=f"cpu, cuda, cuda:1, … (default: {default or CUDA})")


def _threshold(command: argparse.ArgumentParser) -> None:
    text = "keep patches that score above T: one number, or one per group (default: the model's own)"
    command.add_argument("-t", "--threshold", action=_List, metavar="T", help=text)


def _spread(command: argparse.ArgumentParser) -> None:
    text = "spread the kept patches: 0 as published, 1 as if sampled (default: the model's own)"
    command.add_argument("--spread", type=float, metavar="S", help=text)


def _json(command: argparse.ArgumentParser) -> None:
    text = "write the results to FILE as JSON; without FILE, to stdout, and all else to stderr (default: no JSON)"
    command.add_argument("--json", nargs="?", const="-", metavar="FILE", help=text)


def _colormap(command: argparse.ArgumentParser) -> None:
    command.add_argument("--colormap", default="jet", help="a colormap of matplotlib (default: %(default)s)")


def _batches(command: argparse.ArgumentParser, workers: bool = True) -> None:
    command.add_argument("--batch-size", type=int, default=64, metavar="B", help="per forward pass (default: 64)")
    if workers:
        command.add_argument("--workers", type=int, default=2, metavar="N", help="reading processes (default: 2)")


def interpret(command: argparse.ArgumentParser) -> None:
    """Of ``iared2 interpret``."""
    add = command.add_argument
    add(
        "-p",
        "--photo",
        nargs="+",
        action="extend",
        required=True,
        help="images, or videos for a video model; folders or quoted globs of them",
    )
    add("-r", "--recursive", action="store_true", help="also the subfolders of folders")
    add(
        "-o",
        "--output",
        help="folder for the results, with a subfolder for each of several files (default: none, with --json)",
    )
    _checkpoint(command, f"{CHECKPOINT}, or the authors' ckpt.pth (default: the model in the box, for photos)")
    _threshold(command)
    add(
        "--budget",
        type=float,
        metavar="SHARE",
        help="share of the dense MACs, met on average over the photos by other thresholds (default: the model's own)",
    )
    _spread(command)
    add("-m", "--method", default="interpreter", choices=EVERY, help="of the heat map (default: %(default)s)")
    add(
        "-g",
        "--group",
        type=int,
        help="group whose scores make the heat map, from 1 (default: the last; of 3, the second)",
    )
    _colormap(command)
    _json(command)
    _device(command, None)


def predict(command: argparse.ArgumentParser) -> None:
    """Of ``iared2 predict``."""
    add = command.add_argument
    add("photos", nargs="+", help="photos, folders of them at any depth, tar shards, parquet files, hf:NAME")
    add("-o", "--output", required=True, help="folder for the Parquet files")
    _checkpoint(command)
    _threshold(command)
    add("--embedding", action="store_true", help="add the pooled features before the classifier")
    add("--scores", action="store_true", help="add the scores of all patches, as float16")
    add("--image-column", default="image", help="of parquet files and hf:NAME (default: %(default)s)")
    add("--split", help="of hf:NAME (default: all)")
    _batches(command)
    add("--shard-size", type=int, default=4096, help="photos per Parquet file (default: %(default)s)")
    _device(command, None)


def figure(command: argparse.ArgumentParser) -> None:
    """Of ``iared2 figure``."""
    add = command.add_argument
    add("figure", choices=["maps", "hierarchy"], help="heat maps side by side, or what each group keeps")
    add("photo", nargs="+", help="images, folders of images, or quoted globs; one row each")
    add("-o", "--output", required=True, help="file to write: .pdf (pages) or .png (one picture)")
    _checkpoint(command)
    _threshold(command)
    add(
        "-m",
        "--methods",
        action=_List,
        kind=str,
        metavar="METHOD",
        help=f"columns of `maps`, of {', '.join(EVERY)} (default: {' '.join(PAPER)})",
    )
    _colormap(command)
    _device(command)


def train(command: argparse.ArgumentParser) -> None:
    """Of ``iared2 train``."""
    add = command.add_argument
    add("recipe", help="TOML file, see recipes/")
    add("--data", help="folder of class folders, folder of parquet files, or hf:NAME (default: the recipe's data.path)")
    add("-o", "--output", required=True, help="folder of the run: checkpoints, logs, result")
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a setting, e.g. finetune.epochs=2 (default: the recipe as it is)",
    )


def accelerate(command: argparse.ArgumentParser) -> None:
    """Of ``iared2 accelerate``."""
    add = command.add_argument
    add("photos", nargs="+", help="photos like those that the model will see: folders, tar, parquet files, hf:NAME")
    add("-m", "--model", required=True, help="timm's name of a model, or a file for iared2.load")
    add("-o", "--output", required=True, help="file for the faster model")
    add(
        "--max-drop",
        type=float,
        metavar="SHARE",
        help="share of the photos whose answer, or nearest neighbour, may change (default: 0.01)",
    )
    add("--macs", type=float, metavar="SHARE", help="in place of it: share of the dense MACs (default: none)")
    add("--minutes", type=float, default=0, help="also train the policy so long (default: 0)")
    add("--embedding", action="store_true", help="leave the classifier out: return embeddings")
    add("--limit", type=int, default=2000, metavar="N", help="maximum number of photos (default: %(default)s)")
    add("--workers", type=int, default=2, metavar="N", help="reading processes (default: 2)")
    _json(command)
    _device(command, None)


def evaluate(command: argparse.ArgumentParser) -> None:
    """Of ``iared2 evaluate``."""
    add = command.add_argument
    add(
        "data",
        help="folder of class folders, of parquet files, hf:NAME; also a CSV of videos; any photos for embeddings",
    )
    _checkpoint(command)
    add("--split", default="validation", help="split to evaluate on (default: %(default)s, or test)")
    add("--classes", nargs="+", default=[], help="use only these, in the model's order (default: the model's own)")
    _threshold(command)
    _spread(command)
    add(
        "--budget",
        action=_List,
        metavar="SHARE",
        help="also evaluate at these shares of the dense MACs, e.g. 0.4 0.5 0.6, calibrated on training images"
        " (default: none)",
    )
    add("--clips", type=int, default=1, help="videos: clips per video, spread over it (default: 1)")
    add("--span", type=float, default=0.0, help="videos: seconds per clip (default: 0, all)")
    add("--crops", type=int, default=1, help="videos: crops per clip, from end to end (default: 1)")
    add("--all", action="store_true", help="for a folder without splits: include the images used for training")
    add("--plot", metavar="FILE", help="plot accuracy against MACs: .png, .pdf, .svg (default: none)")
    _batches(command)
    add("--limit", type=int, metavar="N", help="maximum number of images (default: all)")
    _json(command)
    _device(command)


def bench(command: argparse.ArgumentParser) -> None:
    """Of ``iared2 bench``."""
    add = command.add_argument
    add("model", nargs="?", help="a timm name, with drawn weights and decisions (default: deit_small_patch16_224)")
    _checkpoint(command, f"{CHECKPOINT}, or box, in place of a timm name (default: none)")
    add("--data", help="real images, on which the checkpoint's own decision is used (default: drawn images)")
    add(
        "--keep",
        action=_List,
        default=[0.85, 0.6, 0.35],
        metavar="SHARE",
        help="without --data: mean share of patches kept after each group (default: 0.85 0.6 0.35)",
    )
    add(
        "--keep-std",
        type=float,
        default=0.12,
        metavar="STD",
        help="standard deviation of --keep between images (default: %(default)s)",
    )
    add(
        "--spread",
        dest="keep_std",
        action=_OldName,
        type=float,
        default=argparse.SUPPRESS,
        metavar="STD",
        help="the old name of --keep-std (default: 0.12)",
    )
    add("--merge", action="store_true", help="merge dropped patches into kept ones")
    add("--img-size", type=int, nargs=2, metavar=("H", "W"), help="pixels, for a timm name (default: the model's own)")
    add("--frames", type=int, help="for a name such as timesformer_joint_base_patch16_224 (default: the model's own)")
    add("--batch-size", action=_List, kind=int, default=[1, 8, 32], metavar="B", help="one or more (default: 1 8 32)")
    add("--precision", choices=["fp32", "bf16", "fp16"], default="fp32", help="(default: fp32)")
    add("--threads", type=int, help="CPU threads (default: torch's own choice)")
    add("--seconds", type=float, default=60, help="measuring time per batch size (default: 60)")
    add("--no-compile", action="store_true", help="do not measure torch.compile")
    add("--train", action="store_true", help="measure a step of each training stage, at --keep of group 1")
    _json(command)
    _device(command)


def export(command: argparse.ArgumentParser) -> None:
    """Of ``iared2 export``."""
    add = command.add_argument
    add("output", help="FILE.onnx or FILE.pt2")
    _checkpoint(command)
    kind = command.add_mutually_exclusive_group(required=True)
    kind.add_argument(
        "--num-keep",
        action=_List,
        kind=int,
        metavar="K",
        help="patches kept in each group (default: none, with --adaptive)",
    )
    kind.add_argument("--adaptive", action="store_true", help="what the thresholds keep; one image at a time")
    add("--batch-size", type=int, metavar="B", help="of the exported model (default: any; 1 with --adaptive)")


def explain_bench(command: argparse.ArgumentParser) -> None:
    """Of ``iared2 explain-bench``."""
    add = command.add_argument
    add("data", help="parquet with bbox or mask, a folder of it, a folder with images/ and masks/, or gtsegs_ijcv.mat")
    _checkpoint(command)
    add(
        "-m",
        "--methods",
        action=_List,
        kind=str,
        default=list(COMPARED),
        metavar="METHOD",
        help=f"of {', '.join(EVERY)}; interpreter:G for group G or `all`, attention:B for block B, counted from 1"
        f" (default: {' '.join(COMPARED)})",
    )
    add("--limit", type=int, default=1000, metavar="N", help="photos, drawn at random (default: 1000)")
    _batches(command, workers=False)
    add("--steps", type=int, default=16, help="steps of insertion and deletion (default: %(default)s)")
    add(
        "--fill",
        default="blur",
        choices=["blur", "zero", "mean"],
        help="fill of the blanked patches (default: %(default)s)",
    )
    add("--split", default="validation", help="split of parquet files (default: %(default)s)")
    add("--region", help="column of the regions (default: mask, else bbox)")
    add("--label", help="column of the labels (default: label, else class_id)")
    add("--only", default="", metavar="COLUMN", help="use only the rows where this column is true (default: all rows)")
    add("--seed", type=int, default=0, help="of the draws (default: %(default)s)")
    add("--plot", metavar="FILE", help="plot the results to this file: .png, .pdf or .svg (default: none)")
    _json(command)
    _device(command)


def demo(command: argparse.ArgumentParser) -> None:
    """Of ``iared2 demo``."""
    add = command.add_argument
    _checkpoint(command)
    add("--host", default="127.0.0.1", help="0.0.0.0 allows other machines (default: %(default)s)")
    add("--port", type=int, default=7860, help="of the page (default: %(default)s)")
    add("--root-path", help="path of the page behind a reverse proxy, e.g. /iared2 (default: none, no proxy)")
    add("--max-file-size", type=int, default=20, metavar="MB", help="maximum size of an upload (default: %(default)s)")
    _device(command)
