"""Measure how much of every torchvision model and of many timm families can be pruned, and how exactly.

Every model is traced in every mode. Half of the units of every group are removed at random, and the pruned network runs
one forward and backward pass in training mode. Models with at most 60 M parameters are also compared, in float64 and
evaluation mode, with norms, layer scales, biases and heads drawn at random: the pruned network with the masked network
(exact units only); the same with `exact_only` if there are inexact units; a fresh network with `apply_structure` and
the state dict from a file (`weights_only=True`), bit for bit; and five rounds in a row with one round by the product of
their plans, bit for bit.

The results are written to a file, one line of JSON for every model and mode, small models first. A run that was stopped
continues where it ended. The table is made from this file.

    python benchmarks/coverage.py run --results coverage.jsonl [--modes expand remove frozen] [--shapes_only] [model
    ...] python benchmarks/coverage.py table --results coverage.jsonl --output docs/coverage.md
"""

import argparse
import gc
import json
import statistics
import sys
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path

import torch
import torchvision

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from zoo import MODES, TIMM, TORCHVISION, faults, measure

PACKAGES = ("torch", "torchvision", "timm")
HEADINGS = {
    "expand": '`residual="expand"` (the default)',
    "remove": '`residual="remove"`',
    "frozen": '`residual="expand", frozen="expand"`',
}


def all_models():
    """Return all models, small ones first and the libraries in turn, so that a partial run covers both libraries."""
    sizes = {name: torchvision.models.get_model_weights(name[3:]).DEFAULT.meta["num_params"] for name in TORCHVISION}
    small = sorted((name for name in TORCHVISION if sizes[name] < 60e6), key=sizes.get)
    large = sorted((name for name in TORCHVISION if sizes[name] >= 60e6), key=sizes.get)
    turns = [name for pair in zip_longest(small, TIMM) for name in pair if name is not None]
    return [*turns, *large]


def read(path):
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


def versions():
    return ", ".join(f"{name} {version(name)}" for name in PACKAGES)


def run(options):
    path = Path(options.results)
    done = {(row["model"], row["mode"]) for row in read(path)}
    for mode in options.modes:
        for name in options.models or all_models():
            if (name, mode) in done:
                continue
            try:
                row = measure(name, mode, compare=not options.shapes_only)
            except Exception as error:
                row = {"model": name, "mode": mode, "error": f"{type(error).__name__}: {error}"[:300]}
            with path.open("a") as file:
                file.write(json.dumps({**row, "versions": versions()}) + "\n")
            wrong = faults(row)
            print(name, mode, f"{row.get('coverage', 0):.3f}", *wrong, flush=True)
            gc.collect()


def share(value):
    return f"{value:.1%}" if value < 0.9995 else "100%"


def line(row):
    after = f"{row['params'] / 1e6:.1f} → {row['params_after'] / 1e6:.1f}"
    why = "; ".join(f"{reason} ({num:.1%})" for reason, num in row["why"].items())
    off = f"{row['off']:.0e}" + " (float32)" * row["float32"] if "off" in row else "-"
    strict = f"{row['exact_only_off']:.0e} ({row['exact_only']:.0%})" if "exact_only_off" in row else ""
    trains = "" if "trains" not in row else "meta" if row["on_meta"] else "yes"
    cells = [
        row["model"].removeprefix("tv:"), after, share(row["coverage"]), share(row["coverage_all"]),
        share(row["inexact"]), off, f"{row['change']:.2g}" if "change" in row else "-", strict, trains, row["rounds"],
        row["seconds"], why,
    ]  # fmt: skip
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


COLUMNS = [
    "model", "M parameters", "prunable", "with outputs", "inexact", "error", "change", "exact_only", "trains",
    "verifications", "CPU s", "why the rest is frozen",
]  # fmt: skip


def summary(rows):
    lines = ["| mode | library | models | median prunable | median with outputs | worst | compared | largest error |"]
    lines.append("| --- " * 8 + "|")
    for mode in MODES:
        for library, own in (("torchvision", True), ("timm", False)):
            part = [row for row in rows if row["mode"] == mode and row["model"].startswith("tv:") == own]
            if not part:
                continue
            compared = [row["off"] for row in part if "off" in row and not row["float32"]]
            worst = min(part, key=lambda row: row["coverage"])
            lines.append(
                f"| {HEADINGS[mode]} | {library} | {len(part)} | "
                f"{share(statistics.median(r['coverage'] for r in part))} "
                f"| {share(statistics.median(r['coverage_all'] for r in part))} "
                f"| {share(worst['coverage'])} ({worst['model'].removeprefix('tv:')}) | {len(compared)} "
                f"| {f'{max(compared):.1e}' if compared else '-'} |"
            )
    return lines


def table(options):
    found = [row for path in (*options.shapes, options.results) for row in read(Path(path))]
    # A row with comparisons replaces the row of the same model with shapes only.
    rows = list({(row["model"], row["mode"]): row for row in found}.values())
    good = [row for row in rows if "error" not in row]
    wrong = [(row, fault) for row in rows for fault in faults(row)]
    ran_on = " and ".join(sorted({row["versions"] for row in rows}))
    lines = ["# Coverage and exactness", "", *__doc__.split("\n\n")[1].split("\n"), ""]
    lines += [
        f"Made by `benchmarks/coverage.py` with {ran_on}, on one CPU thread; `make zoo` runs the same checks.",
        "",
    ]
    lines += [*summary(good), ""]
    casting = ", ".join(sorted({row["model"].removeprefix("tv:") for row in good if row.get("float32")}))
    lines += [
        f"Models that cast to float32 in their forward: {casting}." if casting else "No model casts to float32.",
        "",
    ]
    lines += ["## Failed checks", ""]
    lines += [f"- {row['model'].removeprefix('tv:')}, {row['mode']}: {fault}" for row, fault in wrong] or ["None."]
    notes = Path(options.output).with_suffix(".notes.md")
    lines += ["", *notes.read_text().splitlines()] if notes.exists() else []
    lines += [
        "", "## The columns", "",
        "*prunable*: share of the filters of convolutions and linear layers that can be removed or expanded, without "
        "the layers",
        "that are the model's outputs; *with outputs*: the same with these. *inexact*: share of the prunable filters "
        "whose removal",
        "changes what the others compute (the graph gives the reason). *error*: largest difference between the "
        "outputs of the",
        "pruned and the masked network, relative to the largest output. *change*: the same between the masked and "
        "the full",
        "network. *exact_only*: the error, and the share of filters that are still prunable, if only exact units are "
        "removed.",
        "*trains*: \"meta\" if only shapes were run. *verifications*: verifications of the trace. *CPU s*: CPU time "
        "of the trace.",
    ]  # fmt: skip
    for mode in MODES:
        for library, own in (("torchvision", True), ("timm", False)):
            part = [row for row in good if row["mode"] == mode and row["model"].startswith("tv:") == own]
            if not part:
                continue
            lines += ["", f"## {HEADINGS[mode]}, {library}", "", "| " + " | ".join(COLUMNS) + " |", "| --- " * 12 + "|"]
            lines += [line(row) for row in sorted(part, key=lambda row: row["params"])]
    Path(options.output).write_text("\n".join(lines) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("models", nargs="*", help="tv:NAME or a timm name; all models by default")
    parser.add_argument("--results", default="coverage.jsonl")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument(
        "--shapes_only", action="store_true", help="run the pruned network on meta tensors only, and compare nothing"
    )
    parser.add_argument(
        "--shapes",
        nargs="*",
        default=[],
        help="table: results of runs with --shapes_only, for models that were not compared",
    )
    parser.add_argument("--output", default="docs/coverage.md")
    options = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    (run if options.what == "run" else table)(options)


if __name__ == "__main__":
    main()
