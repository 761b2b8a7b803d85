"""Write the measured figures into the pages that show them: `python docs/figures.py`.

Each block lies between `<!-- figures NAME -->` and `<!-- /figures -->`. NAME is a file in docs/figures/, written by the
command in the page.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from iared2.evaluate.explanations.command import ARROWS, headline
from iared2.evaluate.explanations.results import Benchmark, Estimate, MethodResult

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ROOT / "docs" / "figures"
PAGES = (
    ROOT / "README.md",
    ROOT / "src" / "iared2" / "box" / "README.md",
    ROOT / "docs" / "results.md",
    ROOT / "docs" / "small.md",
    ROOT / "docs" / "speed.md",
)
BASELINES = "masked", "padded to the longest", "merging"
BLOCK = re.compile(r"(<!-- figures ([\w-]+) -->\n).*?(?=<!-- /figures -->)", re.DOTALL)


def table(name: str) -> str:
    """The Markdown of a file of figures: of `explain-bench`, `bench`, `evaluate` without classes, or an experiment."""
    result = json.loads((FIGURES / f"{name}.json").read_text(encoding="utf-8"))
    if "experiment" in result:
        return experiment(result)
    kinds = {
        "methods": explanations,
        "speed": speed,
        "training": training,
        "runtimes": runtimes,
        "variants": embeddings,
    }
    return next(write for key, write in kinds.items() if key in result)(result)


def experiment(result: dict[str, Any]) -> str:
    """A table of experiments/tables.py, unchanged."""
    lines = [f"{result['title']} `{result['command']}`", "", f"| {' | '.join(result['columns'])} |"]
    lines += ["|---" * len(result["columns"]) + "|", *(f"| {' | '.join(row)} |" for row in result["rows"]), ""]
    return "\n".join([*lines, *(f"- {note}" for note in result["notes"]), ""])


def explanations(result: dict[str, Any]) -> str:
    """One table per kind of measure; the best method and those within its interval in bold."""
    rows = [
        MethodResult(row["method"], row["milliseconds"], {n: Estimate(**e) for n, e in row["measures"].items()})
        for row in result["methods"]
    ]
    bench = Benchmark(**{**result, "methods": rows})
    lines = [f"{headline(bench)}. Bold: the best method, and those within its interval.", ""]
    for kind in dict.fromkeys(measure.kind for measure in bench.columns):
        columns = [measure for measure in bench.columns if measure.kind == kind]
        with_time = kind == "localisation"
        head = ["method", *(m.name + ARROWS[m.sign] for m in columns), *["ms per image"] * with_time]
        lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for row in bench.methods:
            cells = [f"`{row.method}`"]
            for measure in columns:
                figure = row.measures[measure.name]
                bold = "**" if row.method in bench.leaders(measure) else ""
                spread = f"{100 * figure.low:.1f}–{100 * figure.high:.1f}"
                cells.append(f"{bold}{100 * figure.value:.1f}{bold} ({spread})")
            cells += [f"{row.milliseconds:.2f}"] * with_time
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    lines.append(f"One reduced forward pass takes {bench.forward_milliseconds:.2f} ms per image.")
    if bench.steps:
        left = f"{100 * bench.keep_ratio:.0f} % of the patches are blanked ({bench.fill})."
        lines.append(f"Probability lost, agreement: the dense prediction after all but {left}")
    return "\n".join([*lines, ""])


def speed(result: dict[str, Any]) -> str:
    """Ours and each baseline, one row per batch size."""
    lines = [
        f"{result['title']}. `{bench_command(result)}`",
        "",
        "| batch | dense, eager | dense, compiled | ours | ours, compiled | masked | padded | merging | MACs ÷ dense "
        "| speed-up | efficiency | within | compiled | interpreters |",
        "|" + "---|" * 14,
    ]
    for one in result["speed"]:
        rows = {row["name"].split(", r =")[0]: row for row in one["rows"]}
        names = "dense, timm", "dense, timm, compiled", "ours", "ours, compiled", *BASELINES
        ours, dense, compiled = rows["ours"], rows["dense, timm"], rows.get("ours, compiled")
        against = f"{compiled['efficiency'] * compiled_dense(rows):.2f}" if compiled else "–"
        cells = [f"{rows[name]['images_per_second']:.1f}" if name in rows else "–" for name in names]
        cells += [f"{ours['gmacs'] / dense['gmacs']:.2f}", f"{ours['speed_up']:.2f}×", f"**{ours['efficiency']:.2f}**"]
        cells += [f"{one['efficiency_within']:.2f}", against, f"{100 * one['interpreters']:.1f} %"]
        lines.append(f"| {ours['batch_size']} | {' | '.join(cells)} |")
    what = "Images/s at the median; *compiled*: efficiency of ours compiled against dense compiled."
    return "\n".join([*lines, "", what, ""])


def runtimes(result: dict[str, Any]) -> str:
    """Dense and ours in each runtime, one row per model, precision and batch size; and how close ours is."""
    given = result["arguments"]
    command = f"taskset -c 0 python benchmarks/runtime.py --seconds {given['seconds']:g}"
    for name, default in (("backends", ["openvino"]), ("precisions", ["fp32", "bf16"])):
        if given[name] != default:
            command += f" --{name} {' '.join(given[name])}"
    lines = [
        f"Images/s, {given['threads']} thread. `{command}`",
        "",
        "| model | precision | batch | runtime | dense | ours | MACs ÷ dense | speed-up | efficiency | new counts "
        "| efficiency | padding | calls |",
        "|" + "---|" * 13,
    ]
    rows = {(r["model"], r["precision"], r["batch_size"], r["name"]): r for r in result["runtimes"] if "rounds" in r}
    for (model, precision, batch, name), dense in rows.items():
        if name.startswith("dense"):
            runtime = name.removeprefix("dense, ")
            ours, new = (rows[model, precision, batch, f"ours, {runtime}{more}"] for more in ("", ", new counts"))
            cells = [model, precision, str(batch), runtime]
            cells += [f"{row['images_per_second']:.1f}" for row in (dense, ours)]
            cells += [f"{ours['macs_ratio']:.2f}", f"{ours['speed_up']:.2f}×", f"**{ours['efficiency']:.2f}**"]
            cells += [f"{new['images_per_second']:.1f}", f"{new['efficiency']:.2f}"]
            lines.append(f"| {' | '.join(cells)} | {100 * ours['padding']:.1f} % | {ours['calls']} |")
    lines.append("")
    for row in (row for row in result["runtimes"] if "photos" in row):
        near, same = (f"{100 * row[name]:.1f} %" for name in ("near_share", "same_patches"))
        gap, worst = (f"{row[name]:.0e}" for name in ("worst_logit_gap", "worst_logit_gap_of_all"))
        lines += [
            f"{row['model']}, {row['name']}, {row['photos']} photos in fp32:",
            f"{near} have a score within 1e-4 of a threshold. The logits of the others are those of torch to {gap},",
            f"of all to {worst}. {same} keep the same patches.",
            "",
        ]
    return "\n".join(lines)


def compiled_dense(rows: dict[str, Any]) -> float:
    """Efficiency is against the faster dense model; this factor converts it to the compiled model."""
    return 1 / rows["dense, timm, compiled"]["speed_up"]


def bench_command(result: dict[str, Any]) -> str:
    """The command that measured it, without the arguments that are defaults."""
    given = result["arguments"]
    merging = any(row["name"].startswith("merging") for one in result.get("speed", ()) for row in one["rows"])
    words = ["python benchmarks/speed.py" if merging else "iared2 bench"]
    words += [given["model"]] * (given["model"] not in (None, "deit_small_patch16_224"))
    words += [f"-c {given.get('checkpoint')}"] * bool(given.get("checkpoint"))
    words += [f"--frames {given.get('frames')}"] * bool(given.get("frames"))
    words += ["--train"] * given["train"] + [f"--precision {given['precision']}"] * (given["precision"] != "fp32")
    words += [f"--keep {' '.join(map(str, given['keep']))}"] * (given["keep"] != [0.85, 0.6, 0.35])
    words += [f"--img-size {' '.join(map(str, given['img_size'] or ()))}"] * bool(given.get("img_size"))
    words += [f"--batch-size {' '.join(map(str, given['batch_size']))}", f"--seconds {given['seconds']:g}"]
    words += [f"--device {given['device']}"] * (given["device"] is not None)
    return " ".join(words + ["--no-compile"] * given["no_compile"])


def training(result: dict[str, Any]) -> str:
    """One row per step of each stage."""
    lines = [
        f"{result['title'].split(';')[0]}, group 1. `{bench_command(result)}`",
        "",
        "| batch | kept | dense forward | policy step | ÷ forward | ÷ forward of our engine | dense step "
        "| fine-tuning step | MACs ÷ dense (r) | ÷ dense step | ÷ r |",
        "|" + "---|" * 11,
    ]
    for row in result["training"]:
        ratio = row["finetune_step_ms"] / row["dense_step_ms"]
        cells = [f"{row['keep_ratio']:.2f}", f"{row['dense_forward_ms']:.0f} ms", f"{row['policy_step_ms']:.0f} ms"]
        cells += [f"**{row['policy_over_forward']:.2f}**", f"{row['policy_over_own_forward']:.2f}"]
        cells.append(f"{row['dense_step_ms']:.0f} ms")
        cells += [f"{row['finetune_step_ms']:.0f} ms", f"{row['macs_ratio']:.2f}", f"{ratio:.2f}"]
        lines.append(f"| {row['batch_size']} | {' | '.join(cells)} | **{row['finetune_over_dense']:.2f}** |")
    return "\n".join([*lines, ""])


def embeddings(result: dict[str, Any]) -> str:
    """One row per way to run the model; no speeds, which `bench` measures."""
    lines = [
        f"{result['images']:,} photos.",
        "",
        "| model | cosine: mean | 1st percentile | 10 nearest neighbours kept | k-NN top-1 "
        "| patches alive after each group | GMACs |",
        "|" + "---|" * 7,
    ]
    for one in result["variants"]:
        close = one["agreement"]
        kept = " · ".join(f"{100 * ratio:.0f} %" for ratio in one["keep_ratio"])
        cells = [f"{close['cosine']:.4f}", f"{close['cosine_p1']:.4f}", f"{100 * close['neighbours']:.1f} %"]
        cells += ["–" if one["knn_top1"] is None else f"{one['knn_top1']:.2f} %", kept, f"{one['gmacs']:.3f}"]
        lines.append(f"| {one['name']} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def filled(page: Path) -> str:
    """The text of a page with the figures in their place."""
    return BLOCK.sub(lambda match: match[1] + table(match[2]), page.read_text(encoding="utf-8"))


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(filled(path), encoding="utf-8")
