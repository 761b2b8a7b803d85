"""The arguments of each command: one function per command."""

from __future__ import annotations

import argparse

from ..explain.names import COMPARED, EVERY, PAPER
from .shared import (
    CHECKPOINT,
    List,
    OldName,
    batches,
    checkpoint,
    colormap,
    device,
    engine,
    image_size,
    json,
    passes,
    spread,
    threshold,
)


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
    checkpoint(command, f"{CHECKPOINT}, or the authors' ckpt.pth (default: the model in the box, for photos)")
    image_size(command)
    threshold(command)
    add(
        "--budget",
        type=float,
        metavar="SHARE",
        help="share of the dense MACs, met on average over the photos by other thresholds, without second passes"
        " (default: the model's own)",
    )
    spread(command)
    passes(command)
    add("-m", "--method", default="interpreter", choices=EVERY, help="of the heat map (default: %(default)s)")
    add(
        "-g",
        "--group",
        type=int,
        help="group whose scores make the heat map, from 1 (default: the last; of 3, the second)",
    )
    colormap(command)
    json(command)
    device(command)


def predict(command: argparse.ArgumentParser) -> None:
    """Of ``iared2 predict``."""
    add = command.add_argument
    add("photos", nargs="+", help="photos, folders of them at any depth, tar shards, parquet files, hf:NAME")
    add("-o", "--output", required=True, help="folder for the Parquet files")
    checkpoint(command)
    image_size(command)
    threshold(command)
    add("--embedding", action="store_true", help="add the pooled features before the classifier")
    add("--scores", action="store_true", help="add the scores of all patches, as float16")
    add("--image-column", default="image", help="of parquet files and hf:NAME (default: %(default)s)")
    add("--split", help="of hf:NAME (default: all)")
    batches(command)
    add("--shard-size", type=int, default=4096, help="photos per Parquet file (default: %(default)s)")
    engine(command, "what runs the model; the others are for CPUs, and also take a FILE.zip of iared2 export as -c")
    device(command)


def figure(command: argparse.ArgumentParser) -> None:
    """Of ``iared2 figure``."""
    add = command.add_argument
    add("figure", choices=["maps", "hierarchy"], help="heat maps side by side, or what each group keeps")
    add("photo", nargs="+", help="images, folders of images, or quoted globs; one row each")
    add("-o", "--output", required=True, help="file to write: .pdf (pages) or .png (one picture)")
    checkpoint(command)
    threshold(command)
    add(
        "-m",
        "--methods",
        action=List,
        kind=str,
        metavar="METHOD",
        help=f"columns of `maps`, of {', '.join(EVERY)} (default: {' '.join(PAPER)})",
    )
    colormap(command)
    device(command)


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
    json(command)
    device(command)


def evaluate(command: argparse.ArgumentParser) -> None:
    """Of ``iared2 evaluate``."""
    add = command.add_argument
    add(
        "data",
        help="folder of class folders, of parquet files, hf:NAME; also a CSV of videos; any photos for embeddings",
    )
    checkpoint(command)
    image_size(command)
    add("--split", default="validation", help="split to evaluate on (default: %(default)s, or test)")
    add("--image-column", default="image", help="of parquet files and hf:NAME (default: %(default)s)")
    add("--label-column", default="label", help="of these, or the field in KEY.json of shards (default: %(default)s)")
    add("--classes", nargs="+", default=[], help="use only these, in the model's order (default: the model's own)")
    threshold(command)
    spread(command)
    passes(command)
    add(
        "--budget",
        action=List,
        metavar="SHARE",
        help="also evaluate at these shares of the dense MACs, e.g. 0.4 0.5 0.6 (without second passes),"
        " calibrated on training images (default: none)",
    )
    add("--clips", type=int, default=1, help="videos: clips per video, spread over it (default: 1)")
    add("--span", type=float, default=0.0, help="videos: seconds per clip (default: 0, all)")
    add("--crops", type=int, default=1, help="videos: crops per clip, from end to end (default: 1)")
    add("--all", action="store_true", help="for a folder without splits: include the images used for training")
    add("--plot", metavar="FILE", help="plot accuracy against MACs: .png, .pdf, .svg (default: none)")
    batches(command)
    add("--limit", type=int, metavar="N", help="photos, or videos, drawn at random (default: all)")
    json(command)
    device(command)


def bench(command: argparse.ArgumentParser) -> None:
    """Of ``iared2 bench``."""
    add = command.add_argument
    add("model", nargs="?", help="a timm name, with drawn weights and decisions (default: deit_small_patch16_224)")
    checkpoint(command, f"{CHECKPOINT}, or box, in place of a timm name (default: none)")
    add("--data", help="real images, on which the checkpoint's own decision is used (default: drawn images)")
    add(
        "--keep",
        action=List,
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
        action=OldName,
        type=float,
        default=argparse.SUPPRESS,
        metavar="STD",
        help="the old name of --keep-std (default: 0.12)",
    )
    add("--merge", action="store_true", help="merge dropped patches into kept ones")
    add("--img-size", type=int, nargs=2, metavar=("H", "W"), help="pixels, for a timm name (default: the model's own)")
    add("--frames", type=int, help="for a name such as timesformer_joint_base_patch16_224 (default: the model's own)")
    add("--batch-size", action=List, kind=int, default=[1, 8, 32], metavar="B", help="one or more (default: 1 8 32)")
    add("--precision", choices=["fp32", "bf16", "fp16"], default="fp32", help="(default: fp32)")
    add("--threads", type=int, help="CPU threads (default: torch's own choice)")
    add("--seconds", type=float, default=60, help="measuring time per batch size (default: 60)")
    add("--no-compile", action="store_true", help="do not measure torch.compile")
    add(
        "--rivals",
        action=List,
        kind=str,
        default=[],
        metavar="RUNTIME",
        help="also timm's model and ours in openvino, onnxruntime, on a CPU (default: none)",
    )
    add("--int8", action="store_true", help="of --rivals, onnxruntime in 8 bits as well, dense and ours")
    add("--train", action="store_true", help="measure a step of each training stage, at --keep of group 1")
    json(command)
    device(command)


def export(command: argparse.ArgumentParser) -> None:
    """Of ``iared2 export``."""
    add = command.add_argument
    add("output", help="FILE.onnx or FILE.pt2; with --adaptive-batch FILE.zip")
    checkpoint(command)
    kind = command.add_mutually_exclusive_group(required=True)
    kind.add_argument(
        "--num-keep",
        action=List,
        kind=int,
        metavar="K",
        help="patches kept in each group (default: none, with --adaptive)",
    )
    kind.add_argument("--adaptive", action="store_true", help="what the thresholds keep; one image at a time")
    kind.add_argument(
        "--adaptive-batch", action="store_true", help="the same for batches of any size, for iared2.runtime.Engine"
    )
    add("--batch-size", type=int, metavar="B", help="of the exported model (default: any; 1 with --adaptive)")
    add("--int8", action="store_true", help="linear layers in 8 bits, for ONNX Runtime; not of .pt2")


def explain_bench(command: argparse.ArgumentParser) -> None:
    """Of ``iared2 explain-bench``."""
    add = command.add_argument
    add("data", help="parquet with bbox or mask, a folder of it, a folder with images/ and masks/, or gtsegs_ijcv.mat")
    checkpoint(command)
    add(
        "-m",
        "--methods",
        action=List,
        kind=str,
        default=list(COMPARED),
        metavar="METHOD",
        help=f"of {', '.join(EVERY)}; interpreter:G for group G or `all`, attention:B for block B, counted from 1"
        f" (default: {' '.join(COMPARED)})",
    )
    add("--limit", type=int, default=1000, metavar="N", help="photos, drawn at random (default: 1000)")
    batches(command, workers=False)
    add(
        "--steps",
        type=int,
        default=16,
        help="steps of insertion and deletion; 0: no faithfulness (default: %(default)s)",
    )
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
    json(command)
    device(command)


def demo(command: argparse.ArgumentParser) -> None:
    """Of ``iared2 demo``."""
    add = command.add_argument
    checkpoint(command)
    add("--host", default="127.0.0.1", help="0.0.0.0 allows other machines (default: %(default)s)")
    add("--port", type=int, default=7860, help="of the page (default: %(default)s)")
    add("--root-path", help="path of the page behind a reverse proxy, e.g. /iared2 (default: none, no proxy)")
    add("--max-file-size", type=int, default=20, metavar="MB", help="maximum size of an upload (default: %(default)s)")
    engine(command, "what runs the model; the others are for CPUs, and take half a minute more to start")
    device(command, "cpu")  # on which every engine runs
