"""Measure the cost of a round of surgery, and the time that pruned networks save; write docs/benchmarks_surgery.md.

On a CPU, the figures are CPU times of one thread: the contenders run in turns in one process, and the shortest of
several repeats counts. Run it from the top folder: ``python benchmarks/surgery.py``. On a GPU, wall times between two
synchronizations are measured, and the median of the repeats counts. To run only some parts:

    python benchmarks/surgery.py --only gain step --device cuda [--batch 128] [--repeats 7] [--out FILE]
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from torch import nn

from gflow_pl import models
from gflow_pl.channels import trace_channels
from gflow_pl.surgery import rewrite
from gflow_pl.values import ChannelGraph, KeepPlan

CPU = torch.device("cpu")
TARGET = Path(__file__).parent.parent / "docs" / "benchmarks_surgery.md"
NETWORKS = (
    "resnet18",
    "resnet50",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "regnet_y_400mf",
    "vgg16_bn",
    "convnext_tiny",
    "googlenet",
    "resnet152",
    "densenet121",
)


def seconds_of(
    contenders: dict[str, Callable[[], Callable[[], None]]],
    repeats: int,
    device: torch.device = CPU,
    calls: int = 1,
) -> dict[str, float]:
    """Return the seconds of one call of every contender.

    On a CPU this is the shortest CPU time of the repeats, on other devices the median wall time after one turn to warm
    up.

    Args:
        contenders: Name to a function that prepares a contender and returns the function to time. It is called for
            every repeat, and is not timed.
        repeats: Number of repeats.
        device: Where the contenders run.
        calls: Number of calls per repeat.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats + (device.type != "cpu")):
        for name, prepare in contenders.items():
            work = prepare()
            start = clock(device)
            for _ in range(calls):
                work()
            times[name].append((clock(device) - start) / calls)
    if device.type == "cpu":
        return {name: min(each) for name, each in times.items()}
    return {name: statistics.median(each[1:]) for name, each in times.items()}


def clock(device: torch.device) -> float:
    """Return the CPU time, or on a GPU the wall time when all its work is done, in seconds."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def device_name(device: torch.device) -> str:
    """Return the name of the processor."""
    return f"{platform.machine()} CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)


def random_plan(graph: ChannelGraph, share: float = 0.5) -> KeepPlan:
    generator = torch.Generator().manual_seed(0)
    keep = {}
    for group in graph.groups:
        order = torch.randperm(group.size, generator=generator)
        keep[group.name] = torch.ones(group.size, dtype=torch.bool).scatter(
            0, order[: round(group.size * share)], False
        )
    return KeepPlan(keep)


def against_torch_pruning(name: str) -> dict[str, float]:
    import torch_pruning

    kwargs = {"init_weights": False} if name == "googlenet" else {}
    model = getattr(torchvision.models, name)(weights=None, **kwargs).eval()
    example = torch.randn(1, 3, 224, 224)
    final = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    place = [module for module in model.modules()].index(final)

    def gflow_round() -> Callable[[], None]:
        network = copy.deepcopy(model)

        def work() -> None:
            graph = trace_channels(network, example, residual="remove")
            rewrite(network, graph, random_plan(graph))

        return work

    def rewrite_alone() -> Callable[[], None]:
        network = copy.deepcopy(model)
        graph = trace_channels(network, example, residual="remove")
        plan = random_plan(graph)
        return lambda: rewrite(network, graph, plan) and None

    def torch_pruning_round() -> Callable[[], None]:
        network = copy.deepcopy(model)
        ignored = [list(network.modules())[place]]

        def work() -> None:
            importance = torch_pruning.importance.RandomImportance()
            pruner = torch_pruning.pruner.MagnitudePruner(
                network, example, importance=importance, pruning_ratio=0.5, ignored_layers=ignored
            )
            pruner.step()

        return work

    return seconds_of({"torch_pruning": torch_pruning_round, "ours": gflow_round, "rewrite": rewrite_alone}, repeats=5)


def training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, batch: int = 128
) -> Callable[[], None]:
    generator, device = torch.Generator().manual_seed(0), next(model.parameters()).device
    x = torch.randn(batch, 3, 32, 32, generator=generator).to(device)
    y = torch.randint(10, (batch,), generator=generator).to(device)
    model.train()

    def work() -> None:
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        if optimizer is not None:
            optimizer.step()

    return work


def rewrite_against_a_step(device: torch.device, batch: int, repeats: int = 5) -> dict[str, float]:
    def prepare_step() -> Callable[[], None]:
        model = models.resnet56(10).to(device)
        work = training_step(model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), batch)
        if device.type != "cpu":
            work()
        return work

    def prepare_rewrite() -> Callable[[], None]:
        model = models.resnet56(10).to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        graph = trace_channels(model, torch.randn(1, 3, 32, 32, device=device))
        model(torch.randn(2, 3, 32, 32, device=device)).sum().backward()
        optimizer.step()
        plan = random_plan(graph)
        return lambda: rewrite(model, graph, plan, optimizers=[optimizer]) and None

    return seconds_of({"step": prepare_step, "rewrite": prepare_rewrite}, repeats, device)


def densenet201_trace() -> float:
    model, example = torchvision.models.densenet201(weights=None).eval(), torch.randn(1, 3, 224, 224)
    return seconds_of({"trace": lambda: lambda: trace_channels(model, example) and None}, repeats=2)["trace"]


class Masked(nn.Module):
    """A layer whose output is multiplied by a 0/1 mask, as in the published code."""

    def __init__(self, inner: nn.Module, mask: torch.Tensor) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("mask", mask.float().view(1, -1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * self.mask


def masked_against_expanded(device: torch.device, batch: int, repeats: int = 7) -> dict[str, float]:
    """Time forward and backward of ResNet-56: dense, with 60 % of each block's filters masked, and with them expanded.

    Returns:
        Seconds of a step of every network, and "removed", the share of the filters that is removed. On a CPU also the
        shares of a profiled step that "convolutions" and "scatter" take. On a GPU also the seconds that the device is
        busy in a step ("dense busy" and so on): the rest of the time it waits for the host.
    """
    torch.manual_seed(0)
    expanded, dense = models.resnet56(10).to(device), models.resnet56(10).to(device)
    masked = copy.deepcopy(expanded)
    graph = trace_channels(expanded, torch.randn(1, 3, 32, 32, device=device))
    plan = random_plan(graph, share=0.6)
    in_blocks = {
        name: keep for name, keep in plan.items() if name.rpartition(".")[2] in ("conv1", "conv2") and "." in name
    }
    for name, keep in in_blocks.items():
        norm = name.replace("conv", "bn")
        masked.set_submodule(norm, Masked(masked.get_submodule(norm), keep.to(device)))
    rewrite(expanded, graph, in_blocks)
    x = torch.randn(4, 3, 32, 32, device=device)
    difference = float((masked.eval()(x) - expanded.eval()(x)).abs().max())
    assert difference < (1e-5 if device.type == "cpu" else 1e-2), difference
    networks = {"dense": dense, "masked": masked, "expanded": expanded}
    work = {name: training_step(network, batch=batch) for name, network in networks.items()}
    if device.type != "cpu":
        for _ in range(5):
            for step in work.values():
                step()
    calls = 1 if device.type == "cpu" else 10
    best = seconds_of({name: lambda name=name: work[name] for name in networks}, repeats, device, calls)
    removed = [int((~keep).sum()) for keep in in_blocks.values()]
    best["removed"] = sum(removed) / sum(len(keep) for keep in in_blocks.values())
    return {**best, **(shares_of(work["expanded"]) if device.type == "cpu" else busy_time(work, device))}


def shares_of(step: Callable[[], None]) -> dict[str, float]:
    """Return the shares of a step's CPU time by kind of operator."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    times = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    parts = {
        "convolutions": ("aten::convolution_backward", "aten::mkldnn_convolution"),
        "scatter": ("aten::index_copy_", "aten::index_select", "aten::fill_"),
    }
    return {part: sum(times.get(name, 0) for name in names) / sum(times.values()) for part, names in parts.items()}


def busy_time(steps: dict[str, Callable[[], None]], device: torch.device) -> dict[str, float]:
    """Return the seconds that the device is busy in a step of every network."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    found = {}
    for name, step in steps.items():
        with torch.profiler.profile(activities=activities) as profile:
            step()
            torch.cuda.synchronize(device)
        kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        found[f"{name} busy"] = sum(kernel.self_device_time_total for kernel in kernels) / 1e6
    return found


# The parts of the report. Each function returns the lines of its section.


def torch_pruning_part(device: torch.device, batch: int, repeats: int | None) -> list[str]:
    import torch_pruning

    rows, totals, alone = [], [], []
    for name in NETWORKS:
        try:
            best = against_torch_pruning(name)
        except Exception as error:
            rows.append(f"| {name} | failed: {type(error).__name__} {str(error)[:80]} | | | | |")
            continue
        total, rewriting = best["ours"] / best["torch_pruning"], best["rewrite"] / best["torch_pruning"]
        totals.append(total)
        alone.append(rewriting)
        seconds = " | ".join(f"{best[key]:.3f}" for key in ("torch_pruning", "ours", "rewrite"))
        rows.append(f"| {name} | {seconds} | {total:.2f} | {rewriting:.2f} |")
        print(rows[-1], flush=True)
    return [
        "## Trace and rewrite, compared with Torch-Pruning",
        "",
        f"224x224, half of every group at random, residual streams shrink too. The trace includes its verification. "
        f"Torch-Pruning {torch_pruning.__version__}.",
        "",
        "| model | Torch-Pruning | trace + rewrite | rewrite alone | ratio | rewrite ratio |",
        "| --- | --- | --- | --- | --- | --- |",
        *rows,
        "",
        f"Median ratio {statistics.median(totals):.2f} (goal: at most 0.8), largest {max(totals):.2f} (goal: at most "
        f"1.5); largest of rewrite alone {max(alone):.2f} (goal: at most 0.2).",
        "",
        f"DenseNet-201 is traced in {densenet201_trace():.2f} s (goal: under 3 s).",
        "",
        "mobilenet_v3_small is closest to the limits: in four runs, the ratio was 1.31 to 1.42 for trace and "
        "rewrite, and 0.17 to 0.18 for the rewrite alone. Its 209 tensors are small, and the time is spread over "
        "some thousand small operations.",
        "",
    ]


def step_part(device: torch.device, batch: int, repeats: int | None) -> list[str]:
    step = rewrite_against_a_step(device, batch, repeats or 5)
    return [
        "## A rewrite, compared with a training step",
        "",
        f"ResNet-56, batch {batch}, SGD with momentum: one step {step['step']:.4f} s, one rewrite (including the "
        f"optimizer state) {step['rewrite']:.4f} s, {100 * step['rewrite'] / step['step']:.1f} % of a step (goal on a "
        "CPU: under 5 %).",
        "",
    ]


def gain_part(device: torch.device, batch: int, repeats: int | None) -> list[str]:
    gain = masked_against_expanded(device, batch, repeats or 7)
    lines = [
        "## Training an expanded instead of a masked network",
        "",
        f"ResNet-56, {100 * gain['removed']:.1f} % of the filters of both convolutions of each block removed, forward "
        f"and backward of a batch of {batch}: dense {gain['dense']:.4f} s, masked {gain['masked']:.4f} s, expanded "
        f"{gain['expanded']:.4f} s: {gain['masked'] / gain['expanded']:.2f} times as fast as masked (goal on a CPU: "
        "at least 1.8).",
        "",
    ]
    if device.type == "cpu":
        return [
            *lines,
            f"One profiled step of the expanded network spends {100 * gain['convolutions']:.0f} % of its time in "
            f"convolutions and their gradients, and {100 * gain['scatter']:.0f} % in the scatter into zeros and its "
            "gradient.",
            "",
        ]
    rows = [
        f"| {name} | {1e3 * gain[name]:.2f} | {1e3 * gain[name + ' busy']:.2f} |"
        for name in ("dense", "masked", "expanded")
    ]
    ratios = [gain["masked" + end] / gain["expanded" + end] for end in ("", " busy")]
    return [
        *lines,
        "| network | time per step, ms | busy device time, ms |",
        "| --- | --- | --- |",
        *rows,
        f"| masked / expanded | {ratios[0]:.2f} | {ratios[1]:.2f} |",
        "",
    ]


PARTS = {"torch_pruning": torch_pruning_part, "step": step_part, "gain": gain_part}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, help="parts to run (default: all)")
    parser.add_argument(
        "--device", type=torch.device, default=CPU, help="device of step and gain; torch_pruning always runs on the CPU"
    )
    parser.add_argument("--batch", type=int, default=128, help="batch size of a training step")
    parser.add_argument("--repeats", type=int, help="repeats of step and gain (default: 5 and 7)")
    parser.add_argument("--out", type=Path, help="file to write (default: the page in docs, if all parts ran on a CPU)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    on_cpu = args.device.type == "cpu"
    how = (
        "CPU seconds of one thread; contenders run in turns in one process, and the shortest of several repeats counts."
        if on_cpu
        else "Wall time; contenders run in turns in one process, and the median of several repeats counts."
    )
    text = [
        "# Cost and gain of a round of surgery",
        "",
        f"Written by `benchmarks/surgery.py`. {how} torch {torch.__version__}, {device_name(args.device)}.",
        "",
    ]
    for name in args.only or PARTS:
        text += PARTS[name](args.device, args.batch, args.repeats)
    out = args.out or (TARGET if on_cpu and not args.only else None)
    if out is not None:
        out.write_text("\n".join(text))
    print("\n".join(text))


if __name__ == "__main__":
    main()
