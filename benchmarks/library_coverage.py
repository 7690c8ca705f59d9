"""Measure how much of models of other libraries can be pruned, and how exactly.

Small models with random weights are traced in the default mode and in the most generous one. Half of the units of every
group are removed at random. Exact units only: the outputs are compared with those of the masked network, in float64 and
evaluation mode, with norms and biases drawn at random; once with the network that is masked as the graph says, and once
with a network that is masked where numbers of the weights are missing, for which no graph is needed. A fresh network
with the structure and the tensors of the pruned one computes the same bit for bit. All units: the pruned network runs
one forward and backward pass in training mode.

    python benchmarks/library_coverage.py [name ...] --output docs/coverage_libraries.md
"""

import argparse
import copy
import importlib
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves, tree_map

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "channels"))
from library_models import CASTS, MODELS, library_of
from masked_networks import masked_network, random_plan, randomize_parameters
from random_networks import identified_twin

from gflow_pl import apply_structure, rewrite, trace_channels

MODES = {"default": {}, "generous": {"residual": "expand", "frozen": "expand"}}
TOLERANCE, FLOAT32_TOLERANCE = 1e-9, 1e-4
COLUMNS = [
    "model",
    "mode",
    "parameters",
    "prunable",
    "inexact",
    "error",
    "without graph",
    "change",
    "trains",
    "CPU s",
    "what stays, and why",
]


def tensors(outputs):
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def largest_difference(outputs, expected):
    return max(
        float((a - b).abs().max() / b.abs().max().clamp_min(1e-12)) for a, b in zip(outputs, expected, strict=True)
    )


def make_numbers_unique(model):
    """Add small random numbers to the parameters, so that every number occurs once."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype) * 1e-5)


def rebuilt(name, small, structure):
    """Return a fresh network with the structure and the tensors of a pruned one."""
    torch.manual_seed(1)
    fresh = MODELS[name]()[0].to(next(small.parameters()).dtype).eval()
    apply_structure(fresh, structure.as_dict())
    fresh.load_state_dict(small.state_dict())
    with torch.no_grad():  # the state dict leaves some buffers out, which were drawn at random as well
        for buffer, value in zip(fresh.buffers(), small.buffers(), strict=True):
            buffer.copy_(value)
    return fresh


def measure(name, mode):
    """Return the cells of a row."""
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    dtype = torch.float32 if name in CASTS else torch.float64
    model = model.to(dtype).eval()
    inputs = tree_map(lambda x: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x, inputs)
    before = copy.deepcopy(model.state_dict())
    start = time.process_time()
    graph = trace_channels(model, inputs, **MODES[mode])
    seconds = time.process_time() - start
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items()), "the trace changed it"

    # Exact units: compare with the masked network.
    randomize_parameters(model)
    make_numbers_unique(model)
    exact = random_plan(graph, only=lambda group: group.inexact is None)
    small = copy.deepcopy(model)
    structure = rewrite(small, graph.copy(), exact)
    with torch.no_grad():
        full, masked, found = (tensors(net(*inputs)) for net in (model, masked_network(model, graph, exact), small))
        again = tensors(rebuilt(name, small, structure)(*inputs))
        twin = found if name in CASTS else tensors(identified_twin(model, small)(*inputs))
    assert all(torch.equal(a, b) for a, b in zip(again, found, strict=True)), "a rebuilt network has other outputs"
    without_graph = largest_difference(found, twin)
    error, change = largest_difference(found, masked), largest_difference(full, masked)

    # All units: train.
    small = copy.deepcopy(model).train()
    rewrite(small, graph.copy(), random_plan(graph))
    sum(output.sum() for output in tensors(small(*inputs))).backward()
    counts = [sum(p.numel() for p in net.parameters()) / 1e3 for net in (model, small)]
    filters = sum(group.size * len(group.layers) for group in graph.groups)
    inexact = sum(group.size * len(group.layers) for group in graph.groups if group.inexact) / max(filters, 1)
    why = {}
    for layer, reason in graph.frozen.items():
        if not graph.layers[layer].is_output if layer in graph.layers else True:
            why[reason] = why.get(reason, 0) + 1
    wrong = " WRONG" if max(error, without_graph) > (FLOAT32_TOLERANCE if name in CASTS else TOLERANCE) else ""
    return {
        "model": name.partition(": ")[2],
        "mode": mode,
        "parameters": f"{counts[0]:.0f} k → {counts[1]:.0f} k",
        "prunable": graph.coverage(),
        "inexact": f"{inexact:.0%}",
        "error": f"{error:.0e}" + " (float32)" * (name in CASTS) + wrong,
        "without graph": "-" if name in CASTS else f"{without_graph:.0e}",
        "change": f"{change:.1g}",
        "trains": "yes",
        "CPU s": f"{seconds:.1f}",
        "what stays, and why": "; ".join(f"{reason} ({count})" for reason, count in why.items()),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="models, as in library_models.py; all by default")
    parser.add_argument("--output", default="docs/coverage_libraries.md")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows, failed = {}, []
    for name in options.names or MODELS:
        for mode in MODES:
            try:
                row = measure(name, mode)
            except Exception as error:
                text = str(error).splitlines()[0] if str(error) else ""
                failed.append(f"- {name}, {mode}: {type(error).__name__}: {text[:200]}")
                print("FAILED", failed[-1], flush=True)
                continue
            rows.setdefault(library_of(name), []).append(row)
            print(name, *row.values(), flush=True)

    write_page(rows, failed, options.output)


def write_page(rows, failed, path):
    """Write the page from the rows of every library and a list of what failed."""
    libraries = [importlib.import_module(name) for name in ("torch", *rows)]
    versions = ", ".join(
        sorted({f"{library.__name__} {library.__version__.partition('+')[0]}" for library in libraries})
    )
    lines = ["# Coverage of other libraries", "", *__doc__.split("\n\n")[1].splitlines(), ""]
    lines += [f"Made by `benchmarks/library_coverage.py` with {versions}, on one CPU thread.", ""]
    for mode in MODES:
        shares = [row["prunable"] for part in rows.values() for row in part if row["mode"] == mode]
        if shares:
            lines.append(
                f"- {mode}: {len(shares)} models, median {statistics.median(shares):.0%}, least {min(shares):.0%}."
            )
    lines += ["", "## Failed", "", *(failed or ["None."]), "", "## The columns", ""]
    lines += [
        "*prunable*: share of the filters that can be removed or expanded, without the layers that are the model's "
        "outputs. *inexact*:",
        "share of these whose removal changes what others compute, which the graph says. *error*: largest difference "
        "of the outputs of the",
        "pruned and the masked network. *without graph*: the same with the network that is masked without the graph. ",
        "*change*: the same of the masked and the full network.",
    ]
    for library, part in rows.items():
        lines += ["", f"## {library}", "", "| " + " | ".join(COLUMNS) + " |", "| --- " * len(COLUMNS) + "|"]
        for row in part:
            cells = {**row, "prunable": f"{row['prunable']:.0%}"}
            lines.append("| " + " | ".join(str(cells[column]) for column in COLUMNS) + " |")
    Path(path).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
