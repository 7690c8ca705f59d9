"""What `score_filters` costs over the bare passes that its formula needs, written by hand.

    python benchmarks/importance.py [--repeats 3] [--batches 10] [--device cpu] [--out docs/benchmarks_importance.md]

Both sides see the same network, batches and device and take turns; the figure is the ratio of the two fastest
runs. The process's own CPU time is taken on a CPU, wall time elsewhere. Peak memory is what the allocator hands
out beyond what is held before, on CUDA; on a CPU it is the largest sum of live bytes that the profiler sees.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from gflow_pl import models
from gflow_pl.importance import score, score_filters
from gflow_pl.importance.hessian import HessianProducts

Batches = list[tuple[Tensor, Tensor]]


def conv_weights(net: nn.Module) -> list[Tensor]:
    return [m.weight for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]


def norm_tensors(net: nn.Module) -> list[Tensor]:
    pairs = [(m.weight, m.bias) for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    return [tensor for pair in pairs for tensor in pair] + list(net.linear.parameters())


def bare_gradients(net: nn.Module, batches: Batches, tensors: list[Tensor]) -> list[Tensor]:
    """The mean gradient, and nothing else."""
    sums = [torch.zeros_like(t) for t in tensors]
    for images, labels in batches:
        grads = torch.autograd.grad(F.cross_entropy(net(images), labels), tensors)
        for total, grad in zip(sums, grads, strict=True):
            total.add_(grad, alpha=len(labels))
    return sums


def bare_double_backward(net: nn.Module, batches: Batches, direction: list[Tensor]) -> list[Tensor]:
    weights, everything = conv_weights(net), list(net.parameters())
    sums = [torch.zeros_like(w) for w in weights]
    for images, labels in batches:
        grads = torch.autograd.grad(F.cross_entropy(net(images), labels), everything, create_graph=True)
        for total, part in zip(sums, torch.autograd.grad(grads, weights, grad_outputs=direction), strict=True):
            total.add_(part, alpha=len(labels))
    return sums


def bare_forward_over_reverse(net: nn.Module, batches: Batches, direction: list[Tensor]) -> list[Tensor]:
    names = [name for name, _ in net.named_parameters()]
    leaves = [p.detach().requires_grad_(True) for p in net.parameters()]
    places = [i for i, name in enumerate(names) if name.removesuffix(".weight") in layer_names(net)]
    sums = [torch.zeros_like(leaves[i]) for i in places]
    for images, labels in batches:
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(leaf, d) for leaf, d in zip(leaves, direction, strict=True)]
            loss = F.cross_entropy(
                torch.func.functional_call(net, dict(zip(names, duals, strict=True)), (images,)), labels
            )
            grads = torch.autograd.grad(loss, [duals[i] for i in places])
            for total, grad in zip(sums, grads, strict=True):
                total.add_(forward_ad.unpack_dual(grad).tangent, alpha=len(labels))
    return sums


def layer_names(net: nn.Module) -> set[str]:
    return {name for name, m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}


BARE_WAYS: dict[str, Callable[..., list[Tensor]]] = {
    "double_backward": bare_double_backward,
    "forward_over_reverse": bare_forward_over_reverse,
}


def bare_product(net: nn.Module, batches: Batches, way: str) -> list[Tensor]:
    return BARE_WAYS[way](net, batches, bare_gradients(net, batches, list(net.parameters())))


def published_grasp(net: nn.Module, batches: Batches, per_class: int, num_classes: int) -> list[Tensor]:
    """The published way: samples collected one by one, a batch a class, double backward class by class."""
    images: list[list[Tensor]] = [[] for _ in range(num_classes)]
    for inputs, labels in batches:
        for image, label in zip(inputs, labels, strict=True):
            if len(images[label]) < per_class:
                images[label].append(image[None])
    by_class = [(torch.cat(one), torch.full((per_class,), c, device=one[0].device)) for c, one in enumerate(images)]
    everything = list(net.parameters())
    total = [torch.zeros_like(p) for p in everything]
    for inputs, labels in by_class:
        for sum_, g in zip(total, torch.autograd.grad(F.cross_entropy(net(inputs), labels), everything), strict=True):
            sum_ += g / num_classes
    product = [torch.zeros_like(p) for p in everything]
    for inputs, labels in by_class:
        grads = torch.autograd.grad(F.cross_entropy(net(inputs), labels), everything, create_graph=True)
        inner = sum((g * t).sum() for g, t in zip(grads, total, strict=True))
        for sum_, h in zip(product, torch.autograd.grad(inner, everything, allow_unused=True), strict=True):
            sum_ += 0 if h is None else h / num_classes
    return product


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


def fastest(
    first: Callable[[], Any], second: Callable[[], Any], repeats: int, device: torch.device
) -> tuple[float, float]:
    """Both in turns, so that whatever else the machine does meets both."""
    times = [(seconds(first, device), seconds(second, device)) for _ in range(repeats)]
    return min(t for t, _ in times), min(t for _, t in times)


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - held
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    live = peak = 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batches", type=int, default=10)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks_importance.md"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device(args.device)

    net = models.resnet56(num_classes=10).to(device).eval()
    labels = torch.arange(args.size) % 10
    batches = [
        (torch.randn(args.size, 3, 32, 32, device=device), labels[torch.randperm(args.size)].to(device))
        for _ in range(args.batches)
    ]
    layout = net.conv1.weight.is_contiguous()
    assert layout

    rows = []

    def compare(label: str, ours: Callable[[], Any], bare: Callable[[], Any], limit: str) -> None:
        ours(), bare()
        a, b = fastest(ours, bare, args.repeats, device)
        memory = peak_bytes(ours, device) / peak_bytes(bare, device)
        rows.append(f"| {label} | {a:.2f} | {b:.2f} | {a / b:.3f} | {memory:.3f} | {limit} |")
        print(rows[-1], flush=True)

    compare(
        "loss",
        lambda: score_filters(net, "loss", batches),
        lambda: bare_gradients(net, batches, conv_weights(net)),
        "1.05 / 1.1",
    )
    compare(
        "fisher",
        lambda: score_filters(net, "fisher", batches),
        lambda: bare_gradients(net, batches, conv_weights(net)),
        "1.05 / 1.1",
    )
    compare(
        "nvidia",
        lambda: score_filters(net, "nvidia", batches),
        lambda: bare_gradients(net, batches, norm_tensors(net)),
        "1.05 / 1.1",
    )

    def with_way(way: str, measure: str, data: Batches, **options: Any) -> Callable[[], Any]:
        def run() -> Any:
            score.HessianProducts = lambda *a: HessianProducts(*a, prefer=way)
            try:
                return score_filters(net, measure, data, **options)
            finally:
                score.HessianProducts = HessianProducts

        return run

    few = batches[: max(2, args.batches // 3)]
    for way in ("double_backward", "forward_over_reverse"):
        run = with_way(way, "grad_preserve", few, balanced=False)
        compare(
            f"grad_preserve, {way.replace('_', ' ')}", run, lambda way=way: bare_product(net, few, way), "1.05 / 1.1"
        )

    hundred = models.resnet56(num_classes=100).to(device).eval()
    order = torch.randperm(500)
    images, classes = torch.randn(500, 3, 32, 32, device=device), (torch.arange(500) % 100)[order].to(device)
    data = list(zip(images.split(args.size), classes.split(args.size), strict=True))

    def ours() -> Any:
        return score_filters(hundred, "grad_preserve", data, num_samples=500)

    def naive() -> Any:
        return published_grasp(hundred, data, 5, 100)

    a, b = fastest(ours, naive, max(1, args.repeats // 2), device)
    print(f"100 classes x 5 images: {a:.2f} s, the published way {b:.2f} s: {b / a:.2f} times faster (asked: 1.6)")
    where = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.machine()} CPU, {args.threads} thread"
    )
    text = f"""# What importance costs

`python benchmarks/importance.py`: resnet56, batches of {args.size} images of 3x32x32, float32, evaluation mode, default memory
format; {args.batches} batches for first-order measures, {len(few)} for the others; {where}; torch {torch.__version__}. Seconds are
CPU time on a CPU and wall time elsewhere, the fastest of {args.repeats} alternating runs. "Bare" are the passes that the
formula needs, written by hand; the limits are for time / peak memory.

| measure | score_filters, s | bare passes, s | time | peak memory | asked, at most |
| --- | --- | --- | --- | --- | --- |
{chr(10).join(rows)}

100 classes, 5 images each, `grad_preserve`: {a:.2f} s; the published way (samples collected one by one, a batch a class) {b:.2f} s:
{b / a:.2f} times faster (asked on a CPU: 1.6).

The way of the Hessian-gradient product follows from facts, never from a clock: forward over reverse, but double backward
where a parametrization computes a weight, and the other one where an operator lacks the first.
"""
    args.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
