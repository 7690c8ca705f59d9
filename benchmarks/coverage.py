"""How much of every model of torchvision, and of many timm families, can be pruned, and how exactly.

For every model and mode: trace, remove half of the units of every group at random, rewrite, one forward and backward pass in
training mode. For models of at most 60 M parameters, in float64 and evaluation mode, with all norms, layer scales, biases and
heads drawn at random: the rewritten network against its masked twin (exact units), the same with `exact_only` where there are
inexact units, a fresh network with `apply_structure` and the state dict (from a file, `weights_only=True`) to the bit, and five
rounds in a row against one by the product of their plans, to the bit.

One line of JSON per model and mode goes to a file, small models first, so that a run that was stopped goes on; the table is
made of it.

    python benchmarks/coverage.py run --results coverage.jsonl [--modes expand remove frozen] [--shapes_only] [model ...]
    python benchmarks/coverage.py table --results coverage.jsonl --output docs/coverage.md
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


def in_order():
    """Small models first, the two libraries in turn, so that a run that is stopped says something about both."""
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
        for name in options.models or in_order():
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
    off = f"{row['off']:.0e}" + " (float32 inside)" * row["float32"] if "off" in row else "-"
    strict = f"{row['exact_only_off']:.0e} ({row['exact_only']:.0%})" if "exact_only_off" in row else ""
    trains = "" if "trains" not in row else "meta" if row["on_meta"] else "yes"
    cells = [
        row["model"].removeprefix("tv:"), after, share(row["coverage"]), share(row["coverage_all"]), share(row["inexact"]),
        off, f"{row['change']:.2g}" if "change" in row else "-", strict, trains, row["rounds"], row["seconds"], why,
    ]  # fmt: skip
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


COLUMNS = [
    "model", "M parameters", "can go", "outputs counted", "inexact", "off twin", "change", "exact_only", "trains", "rounds",
    "CPU s", "why the rest stays",
]  # fmt: skip


def summary(rows):
    lines = [
        "| mode | library | models | median that can go | outputs counted | worst | compared | off twin, at most |"
    ]
    lines.append("| --- " * 8 + "|")
    for mode in MODES:
        for library, own in (("torchvision", True), ("timm", False)):
            part = [row for row in rows if row["mode"] == mode and row["model"].startswith("tv:") == own]
            if not part:
                continue
            compared = [row["off"] for row in part if "off" in row and not row["float32"]]
            worst = min(part, key=lambda row: row["coverage"])
            lines.append(
                f"| {HEADINGS[mode]} | {library} | {len(part)} | {share(statistics.median(r['coverage'] for r in part))} "
                f"| {share(statistics.median(r['coverage_all'] for r in part))} "
                f"| {share(worst['coverage'])} ({worst['model'].removeprefix('tv:')}) | {len(compared)} "
                f"| {f'{max(compared):.1e}' if compared else '-'} |"
            )
    return lines


def table(options):
    found = [row for path in (*options.shapes, options.results) for row in read(Path(path))]
    rows = list({(row["model"], row["mode"]): row for row in found}.values())  # what was compared, where it was
    good = [row for row in rows if "error" not in row]
    wrong = [(row, fault) for row in rows for fault in faults(row)]
    ran_on = " and ".join(sorted({row["versions"] for row in rows}))
    lines = ["# Coverage and exactness", "", *__doc__.split("\n\n")[1].split("\n"), ""]
    lines += [
        f"Made by `benchmarks/coverage.py` with {ran_on}, on one CPU thread; `make zoo` runs the same checks.",
        "",
    ]
    lines += [*summary(good), ""]
    inside = sorted({row["model"].removeprefix("tv:") for row in good if row.get("float32")})
    lines += [f"Cast to float32 inside: {', '.join(inside)}." if inside else "No model casts to float32 inside.", ""]
    lines += ["## What a row falls short of", ""]
    lines += [f"- {row['model'].removeprefix('tv:')}, {row['mode']}: {fault}" for row, fault in wrong] or ["Nothing."]
    notes = Path(options.output).with_suffix(".notes.md")
    lines += ["", *notes.read_text().splitlines()] if notes.exists() else []
    lines += [
        "", "## The columns", "",
        "*can go*: share of the filters of conv and linear layers that can be removed or expanded, the model's outputs left out;",
        "*outputs counted*: the same with them. *inexact*: share of these whose removal changes what the rest computes (flagged,",
        "with the reason). *off twin*: largest difference from the masked twin, relative to its largest output. *change*: what",
        "masking changes at all. *exact_only*: off twin, and the share of filters that are left to go, where only exact units may.",
        "*trains*: \"meta\" where shapes alone were run. *rounds*: times that the probe tried. *CPU s*: trace and probe.",
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
    parser.add_argument("models", nargs="*", help="tv:NAME or a timm name; all where none is named")
    parser.add_argument("--results", default="coverage.jsonl")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument(
        "--shapes_only", action="store_true", help="trace, and run the pruned network on meta tensors only"
    )
    parser.add_argument(
        "--shapes", nargs="*", default=[], help="table: results of such runs, for what was not compared"
    )
    parser.add_argument("--output", default="docs/coverage.md")
    options = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    (run if options.what == "run" else table)(options)


if __name__ == "__main__":
    main()
