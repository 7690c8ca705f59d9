"""Which examples are scored on: whole batches up to a number of images, or as many of every class."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from gflow_pl.common.nested import iter_tensors, map_tensors
from gflow_pl.importance.reduction import Ranks

__all__ = ["balanced_sample", "batch_size", "labels_of", "take_whole"]

log = logging.getLogger(__name__)

# On a CPU a Hessian-gradient product of 32 images stays closer to the caches than one of 128: 12 % less time an image.
_CPU_BATCH = 32


def batch_size(batch: Any) -> int:
    """Examples in a batch: the length of the first tensor in it; a batch without tensors counts as one."""
    first = next((tensor for tensor in iter_tensors(batch) if tensor.ndim > 0), None)
    return 1 if first is None else len(first)


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch on the model's device."""
    return map_tensors(batch, lambda tensor: _moved(tensor, device))


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    # The host does not wait for a copy from a device to itself either, and would read what is not there yet.
    return tensor.to(device, non_blocking=device.type != "cpu")


def labels_of(batch: Any) -> Tensor | None:
    """``batch[1]``, if it is an integer vector of the batch's length."""
    if not isinstance(batch, (tuple, list)) or len(batch) < 2 or not isinstance(batch[1], Tensor):
        return None
    labels = batch[1]
    is_integer = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    return labels if is_integer and labels.ndim == 1 and len(labels) == batch_size(batch) else None


def take_whole(batches: Iterable[Any], num_samples: int | None) -> Iterator[Any]:
    """Whole batches until `num_samples` images are reached; none is drawn beyond that."""
    taken = 0
    for batch in batches:
        yield batch
        taken += batch_size(batch)
        if num_samples is not None and taken >= num_samples:
            break
    if not taken:
        raise ValueError("score_filters: `batches` is empty; this measure needs at least one batch.")


def balanced_sample(
    batches: Iterable[Any], num_samples: int | None, num_classes: int, ranks: Ranks, device: torch.device
) -> list[Any]:
    """The first n examples of every class, merged into batches of the size of the first one (on a CPU 32 at most).

    Args:
        batches: Batches whose ``batch[1]`` are integer labels. None is drawn once every class has n examples.
        num_samples: Images of this rank; n is num_samples * ranks // num_classes. None: all batches are read, and n is
            the size of the smallest class.
        num_classes: Classes.
        ranks: With several, the k-th batches of all ranks are one batch, in the order of ranks; each rank
            holds the examples that are its own, which may be none.
        device: Where the model is. Examples stay where they come from until their turn.

    Raises:
        ValueError: A class has too few examples, `num_samples` gives none to a class, or a label is out of range.
    """
    wanted = None if num_samples is None else num_samples * ranks.size // num_classes
    if wanted == 0:
        raise ValueError(
            f"score_filters: `num_samples` of {num_samples} gives no image to each of {num_classes} classes; "
            f"it must be at least {-(-num_classes // ranks.size)}."
        )
    counts = torch.zeros(num_classes, dtype=torch.int64)
    held: list[Any] = []
    places: list[Tensor] = []
    full_size = 0
    for batch in batches:
        labels = labels_of(batch)
        if labels is None:
            raise ValueError("score_filters: the first batch has integer labels and a later one has none.")
        full_size = full_size or batch_size(batch)
        place, counts = _places_within_classes(checked_labels(labels, num_classes), counts, ranks, device)
        chosen = torch.arange(len(place)) if wanted is None else (place < wanted).nonzero().flatten()
        if len(chosen):
            held.append(_select(batch, chosen, len(labels)))
            places.append(place[chosen])
        if wanted is not None and min(counts.tolist()) >= wanted:
            break
    _check_enough(counts, wanted)
    if wanted is None:
        smallest = min(counts.tolist())
        short = [(place < smallest).nonzero().flatten() for place in places]
        pairs = zip(held, short, strict=True)
        held = [_select(batch, chosen, batch_size(batch)) for batch, chosen in pairs if len(chosen)]
    return _merged(held, min(full_size, _CPU_BATCH) if device.type == "cpu" else full_size)


def checked_labels(labels: Tensor, num_classes: int) -> Tensor:
    """Labels on the host, where Python can read them.

    Raises:
        ValueError: One is no class.
    """
    labels = _on_host(labels)
    # `tolist` reads memory of the host; `.item()` would be one read of the device a batch.
    low, high = (min(labels.tolist()), max(labels.tolist())) if len(labels) else (0, 0)
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"score_filters: labels must lie in 0..{num_classes - 1} (the logits have {num_classes} classes), "
            f"got {low}..{high}; `balanced=False` scores on whole batches."
        )
    return labels


def _on_host(labels: Tensor) -> Tensor:
    """Labels off the device. On CUDA the host waits for the labels alone, not for the queued passes."""
    if labels.device.type == "cuda":
        pinned = torch.empty(labels.shape, dtype=labels.dtype, pin_memory=True)
        pinned.copy_(labels, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        event.synchronize()
        labels = pinned
    return labels.cpu().long()


def _places_within_classes(labels: Tensor, counts: Tensor, ranks: Ranks, device: torch.device) -> tuple[Tensor, Tensor]:
    """The number of each example within its class, over all batches and ranks, and the new sizes of the classes."""
    num_classes = len(counts)
    one_hot = torch.zeros(len(labels), num_classes, dtype=torch.int64)
    one_hot[torch.arange(len(labels)), labels] = 1
    before, total = ranks.counts_before(one_hot.sum(0), device)
    within = one_hot.cumsum(0) - 1 + before + counts
    return within.gather(1, labels[:, None]).flatten(), counts + total


def _check_enough(counts: Tensor, wanted: int | None) -> None:
    least = 1 if wanted is None else wanted
    short = [(i, n) for i, n in enumerate(counts.tolist()) if n < least]
    if short:
        listed = ", ".join(f"class {i} has {n}" for i, n in short[:5]) + (", ..." if len(short) > 5 else "")
        raise ValueError(
            f"score_filters: each of {len(counts)} classes needs {least} images, but the batches are used up and "
            f"{listed}; give more batches, ask for fewer samples, or score on whole batches with `balanced=False`."
        )


def _select(batch: Any, chosen: Tensor, size: int) -> Any:
    if len(chosen) == size:
        return batch

    def pick(tensor: Tensor) -> Tensor:
        if tensor.ndim == 0 or len(tensor) != size:
            return tensor
        index = chosen
        if tensor.device.type == "cuda":
            index = chosen.pin_memory().to(tensor.device, non_blocking=True)
        return tensor.index_select(0, index.to(tensor.device))

    return map_tensors(batch, pick)


def _merged(parts: list[Any], full_size: int) -> list[Any]:
    """Parts of batches joined and cut anew into full batches; a Hessian product is linear, so nothing changes."""
    if not parts:
        return []
    whole = _concatenated(parts)
    total = sum(batch_size(part) for part in parts)

    def piece(start: int) -> Any:
        return map_tensors(whole, lambda t: t[start : start + full_size] if t.ndim and len(t) == total else t)

    return [piece(start) for start in range(0, total, full_size)]


def _concatenated(parts: list[Any]) -> Any:
    first = parts[0]
    if isinstance(first, Tensor):
        return first if first.ndim == 0 else torch.cat(parts)
    if isinstance(first, tuple) and hasattr(first, "_fields"):
        return type(first)(*(_concatenated(list(column)) for column in zip(*parts, strict=True)))
    if isinstance(first, (list, tuple)):
        return type(first)(_concatenated(list(column)) for column in zip(*parts, strict=True))
    if isinstance(first, Mapping):
        return {key: _concatenated([part[key] for part in parts]) for key in first}
    return first


def peek(batches: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    """The first batch, and all batches again.

    Raises:
        ValueError: There is none.
    """
    rest = iter(batches)
    for first in rest:
        return first, chain([first], rest)
    raise ValueError("score_filters: `batches` is empty; this measure needs at least one batch.")
