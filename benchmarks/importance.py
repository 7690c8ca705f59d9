"""Time and memory of `score_filters`, compared with hand-written passes that compute the same formula.

    python benchmarks/importance.py [--repeats 3] [--batches 10] [--device cpu] [--out docs/benchmarks_importance.md]
    python benchmarks/importance.py --only first_order hessian --device cuda [--out FILE]
    python benchmarks/importance.py --only published --device cuda [--out FILE]

Both sides run on the same network, batches and device, in alternation. The figure is the ratio of their fastest runs,
in CPU time of the process on a CPU and in wall time elsewhere. Peak memory is the allocator's peak beyond the memory in
use before on CUDA, and the largest sum of live bytes in the profile on a CPU.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
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
    """Return the mean gradient."""
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


def bare_reverse_over_forward(net: nn.Module, batches: Batches, direction: list[Tensor]) -> list[Tensor]:
    names = [name for name, _ in net.named_parameters()]
    leaves = [p.detach().requires_grad_(True) for p in net.parameters()]
    places = [i for i, name in enumerate(names) if name.removesuffix(".weight") in layer_names(net)]
    sums = [torch.zeros_like(leaves[i]) for i in places]
    for images, labels in batches:

        def loss(*weights: Tensor, images: Tensor = images, labels: Tensor = labels) -> Tensor:
            logits = torch.func.functional_call(net, dict(zip(names, weights, strict=True)), (images,))
            return F.cross_entropy(logits, labels)

        _, rate = torch.func.jvp(loss, tuple(leaves), tuple(direction))
        for total, part in zip(sums, torch.autograd.grad(rate, [leaves[i] for i in places]), strict=True):
            total.add_(part, alpha=len(labels))
    return sums


def layer_names(net: nn.Module) -> set[str]:
    return {name for name, m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}


BARE_STRATEGIES: dict[str, Callable[..., list[Tensor]]] = {
    "reverse_over_forward": bare_reverse_over_forward,
    "double_backward": bare_double_backward,
}


def bare_product(net: nn.Module, batches: Batches, strategy: str) -> list[Tensor]:
    return BARE_STRATEGIES[strategy](net, batches, bare_gradients(net, batches, list(net.parameters())))


def published_grasp(net: nn.Module, loader: Iterable[Any], per_class: int, num_classes: int) -> list[Tensor]:
    """The published code: samples collected one by one, one batch for each class, double backward class by class.

    As in the published code, a class counts as full only when one more of its samples is met. Every pass is in
    evaluation mode.
    """
    net.eval()
    criterion = nn.CrossEntropyLoss()
    device = next(net.parameters()).device
    images: list[list[Tensor]] = [[] for _ in range(num_classes)]
    labels: list[list[Tensor]] = [[] for _ in range(num_classes)]
    full: set[int] = set()
    for inputs, targets in loader:
        for i in range(len(inputs)):
            one, target = inputs[i : i + 1], targets[i : i + 1]
            category = int(target.item())
            if len(images[category]) == per_class:
                full.add(category)
                continue
            images[category].append(one)
            labels[category].append(target)
        if len(full) == num_classes:
            break
    every_image = torch.cat([torch.cat(part) for part in images])
    every_label = torch.cat([torch.cat(part) for part in labels])
    parameters = list(net.parameters())

    def loss_of(number: int) -> Tensor:
        part = slice(per_class * number, per_class * (number + 1))
        return criterion(net(every_image[part].to(device)), every_label[part].to(device))

    gradient = [torch.zeros_like(p) for p in parameters]
    for number in range(num_classes):
        net.zero_grad()
        found = torch.autograd.grad(loss_of(number), parameters)
        gradient = [total + part.detach().clone() for total, part in zip(gradient, found, strict=True)]
    gradient = [total / num_classes for total in gradient]

    product = [torch.zeros_like(p) for p in parameters]
    for number in range(num_classes):
        net.zero_grad()
        found = torch.autograd.grad(loss_of(number), parameters, create_graph=True)
        inner = sum((along * part).sum() for along, part in zip(gradient, found, strict=True))
        inner.backward()
        parts = [0.0 if p.grad is None else p.grad + 0.0 for p in parameters]
        product = [total + part for total, part in zip(product, parts, strict=True)]
    net.zero_grad()
    return [total.reshape(len(total), -1) / num_classes for total in product]


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
    """Return the fastest time of both; they run in alternation, so that other load on the machine affects both."""
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


def wall_ratio(ours: Callable[[], Any], theirs: Callable[[], Any], repeats: int, threads: int) -> tuple[float, float]:
    """Return the median wall times of both, run in alternation with this number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    times: list[list[float]] = [[], []]
    for _ in range(repeats):
        for run, taken in zip((ours, theirs), times, strict=True):
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
    torch.set_num_threads(before)
    return statistics.median(times[0]), statistics.median(times[1])


def compare_with_published_code(
    num_classes: int, per_class: int, size: int, repeats: int, device: torch.device, threads: int
) -> tuple[float, float, float, str]:
    """Return the seconds of `score_filters` and of the published code, the largest difference of their scores, and wall
    times.
    """
    net = models.resnet56(num_classes=num_classes).to(device).eval()
    # One more image of every class than needed: the published code collects until it has seen it.
    classes = [torch.arange(num_classes).repeat(count) for count in (per_class, 1)]
    labels = torch.cat([part[torch.randperm(len(part))] for part in classes]).to(device)
    images = torch.randn(len(labels), 3, 32, 32).to(device)
    data = list(zip(images.split(size), labels.split(size), strict=True))
    found: dict[str, Any] = {}

    def ours() -> None:
        found["ours"] = score_filters(net, "grad_preserve", data, num_samples=num_classes * per_class)

    def published() -> None:
        found["published"] = published_grasp(net, data, per_class, num_classes)

    score_filters(net, "loss", data[:1]), bare_double_backward(net, data[:1], list(net.parameters()))
    a, b = fastest(ours, published, repeats, device)
    print(
        f"{num_classes} classes x {per_class} images: {a:.2f} s, the published code {b:.2f} s: {b / a:.2f} times as "
        "long"
    )
    wall = ""
    if device.type == "cpu":
        c, d = wall_ratio(ours, published, repeats, threads)
        wall = (
            f"In wall time with {threads} threads, torch's default here, medians of {repeats} alternating runs: "
            f"{c:.2f} against {d:.2f} s, {d / c:.2f} times\nas long."
        )
        print(wall)
    theirs = dict(zip([name for name, _ in net.named_parameters()], found["published"], strict=True))
    worst = 0.0
    for layer, scores in found["ours"].items():
        weight = net.get_parameter(f"{layer}.weight").detach().flatten(1)
        expected = (weight * theirs[f"{layer}.weight"]).sum(1).abs()
        worst = max(worst, float((scores - expected).abs().max() / expected.abs().max()))
    return a, b, worst, wall


PARTS = ["first_order", "hessian", "published"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batches", type=int, default=10)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run; default: all")
    parser.add_argument("--out", type=Path, help="file to write; default: the page in docs if all parts run")
    parser.add_argument("--classes", type=int, default=100, help="classes of the comparison with the published code")
    args = parser.parse_args()
    usual_threads = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device(args.device)

    net = models.resnet56(num_classes=10).to(device).eval()
    labels = torch.arange(args.size) % 10
    batches = [
        (torch.randn(args.size, 3, 32, 32, device=device), labels[torch.randperm(args.size)].to(device))
        for _ in range(args.batches)
    ]

    rows: list[str] = []
    first = batches[:1]
    digits = 2 if device.type == "cpu" else 4

    def compare(
        label: str, ours: Callable[[Batches], Any], bare: Callable[[Batches], Any], data: Batches = batches
    ) -> float:
        """Add a row to the table. The first batch warms both up.

        Peak memory is that of the first batch on a CPU, and of all batches on a GPU, where reading it costs nothing.
        """
        ours(first), bare(first)
        a, b = fastest(lambda: ours(data), lambda: bare(data), args.repeats, device)
        held = data if device.type == "cuda" else first
        memory = peak_bytes(lambda: ours(held), device) / peak_bytes(lambda: bare(held), device)
        rows.append(
            f"| {label} | {len(data)} | {a:.{digits}f} | {b:.{digits}f} | {a / b:.3f} | {memory:.3f} | 1.05 / 1.1 |"
        )
        print(rows[-1], flush=True)
        return a / len(data)

    for measure, tensors in (
        ("loss", conv_weights(net)),
        ("fisher", conv_weights(net)),
        ("nvidia", norm_tensors(net)),
    ):
        if "first_order" not in args.only:
            break
        compare(
            measure,
            lambda data, measure=measure: score_filters(net, measure, data),
            lambda data, tensors=tensors: bare_gradients(net, data, tensors),
        )

    def by_strategy(strategy: str, data: Batches) -> Any:
        score.HessianProducts = lambda *a: HessianProducts(*a, strategy=strategy)
        try:
            return score_filters(net, "grad_preserve", data, balanced=False)
        finally:
            score.HessianProducts = HessianProducts

    spent: dict[str, float] = {}
    for strategy in BARE_STRATEGIES if "hessian" in args.only else ():
        in_use = strategy == "reverse_over_forward"
        spent[strategy] = compare(
            f"grad_preserve, {strategy.replace('_', ' ')}{' (in use)' if in_use else ''}",
            lambda data, strategy=strategy: by_strategy(strategy, data),
            lambda data, strategy=strategy: bare_product(net, data, strategy),
            batches if in_use or device.type == "cuda" else batches[: max(1, args.batches // 5)],
        )

    where = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.machine()} CPU, {args.threads} thread"
    )
    text = f"""# What importance costs

`python benchmarks/importance.py`: resnet56, batches of {args.size} images of 3x32x32, float32, evaluation mode, \
default memory
format; {where}; torch {torch.__version__}. Seconds are CPU time on a CPU and wall time elsewhere, the fastest of \
{args.repeats}
alternating runs. "Bare passes" are the passes that the formula needs, written by hand; the limits are those of \
time / peak memory.
"""
    if "published" in args.only:
        a, b, worst, wall = compare_with_published_code(args.classes, 5, args.size, args.repeats, device, usual_threads)
    if rows:
        text += f"""
| measure | batches | score_filters, s | bare passes, s | time | peak memory | limits |
| --- | --- | --- | --- | --- | --- | --- |
{chr(10).join(rows)}
"""
    if spent:
        text += f"""
Double backward costs {spent["double_backward"] / spent["reverse_over_forward"]:.2f} times as much as \
reverse over forward. The
strategy follows from the model, never from a clock: reverse over forward if a test verifies every \
operator in the graph for it,
else double backward.
"""
    if "published" in args.only:
        text += f"""
{args.classes} classes, 5 images each, `grad_preserve`: {a:.2f} s. The published code (samples collected one by one, \
one batch for
each class, double backward) takes {b:.2f} s: {b / a:.2f} times as long (goal on a CPU: at least 1.6). \
Largest difference of the
scores, in units of a layer's largest: {worst:.1e}. {wall}
"""
    out = args.out or (Path("docs/benchmarks_importance.md") if list(args.only) == PARTS else None)
    if out is not None:
        out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
