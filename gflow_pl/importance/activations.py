"""Statistics of activations, and the definition of the activations of a layer.

The activations of a layer are found during the forward pass, from the tensors themselves:

1. They start as the output of the layer.
2. If the first operator that reads this tensor is a norm, they become the output of the norm.
3. If the first operator that reads the resulting tensor is a non-linearity, they become the output of the
  non-linearity.

Norms and non-linearities are recognized as modules (`nn.BatchNorm2d`, `nn.ReLU`, and modules of other packages without
parameters that keep the shape of their input) and as functions (`F.relu`, `torch.relu_`, `Tensor.clamp`,
`F.batch_norm`, ...), in place or not. Dropout and `nn.Identity`, which return their input in evaluation mode, are
skipped.

If another operator reads the tensor first, the activations are those found so far. In a residual block, for instance,
the norm behind the last convolution is read by an addition, so the activations of that convolution are the output of
the norm, before any non-linearity. A custom `torch.autograd.Function` cannot be observed and is treated like that, too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import activation as torch_activations
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from gflow_pl.common.attention import attention_fast_path_disabled
from gflow_pl.common.errors import SettingsError
from gflow_pl.common.nested import on_copies
from gflow_pl.importance.base import ActivationImportance
from gflow_pl.importance.batches import Batch, batch_size, to_device
from gflow_pl.importance.gradients import LogitsFn, LossFn, accumulator_dtype
from gflow_pl.importance.layers import ScoredLayer, is_norm
from gflow_pl.importance.reduction import Ranks
from gflow_pl.importance.scoring_mode import cached_weights

__all__ = ["ActivationObserver", "forward_function", "mean_activation_scores"]

log = logging.getLogger(__name__)

_NORMS = frozenset({"batch_norm", "group_norm", "instance_norm", "layer_norm", "local_response_norm", "rms_norm"})
_NON_LINEARITIES = frozenset({
    "celu", "clamp", "clamp_min", "elu", "gelu", "hardshrink", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu",
    "logsigmoid", "mish", "prelu", "relu", "relu6", "rrelu", "selu", "sigmoid", "silu", "softplus", "softshrink",
    "softsign", "tanh", "tanhshrink", "threshold",
})  # fmt: skip

_NOT_ELEMENTWISE = (nn.GLU, nn.LogSoftmax, nn.MultiheadAttention, nn.Softmax, nn.Softmax2d, nn.Softmin)


def forward_function(loss_fn: LossFn | None, logits_fn: LogitsFn | None) -> Callable[[nn.Module, Batch], object]:
    """Return the function that runs a forward pass: `loss_fn`, `logits_fn`, or ``model(batch[0])``.

    It gets copies of batches. A batch that is not a tuple or list is passed to the model as it is.
    """
    if loss_fn is not None or logits_fn is not None:
        return on_copies(loss_fn or logits_fn)  # type: ignore[arg-type]
    return on_copies(lambda model, batch: model(batch[0] if isinstance(batch, (tuple, list)) else batch))


@torch.no_grad()
def mean_activation_scores(
    model: nn.Module,
    layers: list[ScoredLayer],
    measure: ActivationImportance,
    batches: Iterable[Batch],
    forward: Callable[[nn.Module, Batch], object],
    ranks: Ranks,
) -> dict[str, Tensor]:
    """Return the mean of ``measure.score_activations`` over all examples, by layer name as (filters, 1).

    Args:
        model: The model, in `scoring_mode`.
        layers: Its layers. Those that no forward pass calls are missing from the result, with a warning, and also those
            whose weight is used inside a module that returns something else.
        measure: The measure.
        batches: Batches, moved to the device of the model one at a time.
        forward: ``forward(model, batch)`` runs a forward pass.
        ranks: The ranks that score together.

    Raises:
        SettingsError: `score_activations` returns a tensor of a wrong shape, or no layer is called.
    """
    unseen = [layer.name for layer in layers if layer.use is not None and layer.use.output is None]
    if unseen:
        log.warning("Layers whose output no module returns have no activations; not scored: %s.", ", ".join(unseen))
        layers = [layer for layer in layers if layer.name not in unseen]
    if not layers:
        raise SettingsError(f"Measure '{measure.name}' needs activations, but no module returns the output of a layer.")
    weights = {layer.name: layer.tensors("weight")[0].value for layer in layers}
    sums = {
        layer.name: torch.zeros(layer.num_filters, dtype=accumulator_dtype(weight), device=weight.device)
        for layer, weight in zip(layers, weights.values(), strict=True)
    }
    counts = dict.fromkeys(sums, 0)
    device, dtype = next((total.device, total.dtype) for total in sums.values())
    num_examples = 0

    # Sum over the examples of this rank.
    for batch in batches:
        size = batch_size(batch)

        def add(layer: ScoredLayer, activations: Tensor, size: int = size) -> None:
            numbers = _checked_numbers(measure, layer, activations)
            sums[layer.name].add_(numbers.to(sums[layer.name]), alpha=size)
            counts[layer.name] += size

        with cached_weights(model), ActivationObserver(model, layers, add) as observer:
            forward(model, to_device(batch, device))
            observer.finish()
        num_examples += size

    # Divide by the examples that a layer was called for, on all ranks; a layer may be called never, or more than once.
    per_example = torch.tensor([float(count) for count in counts.values()], dtype=dtype, device=device)
    *means, calls = ranks.weighted_mean([*sums.values(), per_example], num_examples)
    is_called = [count > 0 for count in (counts.values() if ranks.reduce is None else calls.tolist())]
    if not any(is_called):
        raise SettingsError("score_filters: the forward pass calls none of the model's conv and linear layers.")
    uncalled = [name for name, called in zip(sums, is_called, strict=True) if not called]
    if uncalled:
        log.warning("Layers that the forward pass does not call are not scored: %s.", ", ".join(uncalled))
    return {
        name: (mean / calls[i].to(mean))[:, None]
        for i, (name, mean) in enumerate(zip(sums, means, strict=True))
        if is_called[i]
    }


def _checked_numbers(measure: ActivationImportance, layer: ScoredLayer, activations: Tensor) -> Tensor:
    """Return one number for every filter of a layer, (filters,).

    Raises:
        SettingsError: `score_activations` of the measure returns anything else.
    """
    found = measure.score_activations(_examples_and_filters_first(layer, activations))
    if not isinstance(found, Tensor) or found.shape != (layer.num_filters,):
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise SettingsError(
            f"Measure '{measure.name}': `score_activations` must return one number for each filter, here "
            f"({layer.num_filters},), got {got}."
        )
    return found


def _examples_and_filters_first(layer: ScoredLayer, activations: Tensor) -> Tensor:
    """Return activations as (examples, filters, ...), in float32 or float64."""
    activations = activations.to(accumulator_dtype(activations))
    if layer.use is not None:
        assert layer.use.output is not None
        dim = layer.use.output[1]
        return (activations if activations.ndim > -dim else activations.unsqueeze(0)).movedim(dim, 1)
    if isinstance(layer.module, _ConvNd):
        is_batched = activations.ndim == layer.module.weight.ndim
        return activations if is_batched else activations.unsqueeze(0)
    return activations.movedim(-1, 1) if activations.ndim > 1 else activations.unsqueeze(0)


@dataclass(frozen=True, eq=False)
class _Candidate:
    """A tensor that holds the activations of some layers, unless a norm or a non-linearity reads it first."""

    tensor: Tensor
    version: int
    layers: tuple[ScoredLayer, ...]
    is_normed: bool


class ActivationObserver(TorchFunctionMode):
    """Observes a forward pass and calls a function with the activations of every layer, as soon as they are known.

    Functions are observed as a `TorchFunctionMode`, modules by hooks. At any time only the tensors that no operator has
    read yet are kept.

    Args:
        model: The model.
        layers: Layers to observe.
        receive: ``receive(layer, activations)``, called once for every call of a layer.
    """

    def __init__(
        self, model: nn.Module, layers: list[ScoredLayer], receive: Callable[[ScoredLayer, Tensor], None]
    ) -> None:
        super().__init__()
        self._model, self._layers, self._receive = model, layers, receive
        self._candidates: dict[int, _Candidate] = {}
        self._inside: list[_Candidate | None] = []
        self._stack = ExitStack()

    def __enter__(self) -> ActivationObserver:
        # A fused or compiled forward would not call the layers.
        self._stack.enter_context(attention_fast_path_disabled())
        self._stack.enter_context(torch.compiler.set_stance("force_eager"))
        for handle in self._register_hooks():
            self._stack.callback(handle.remove)
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._stack.close()

    def finish(self) -> None:
        """Report the tensors that no operator has read, at the end of the forward pass."""
        for candidate in list(self._candidates.values()):
            self._report(candidate, candidate.tensor)

    def _register_hooks(self) -> Iterator[RemovableHandle]:
        outputs = [self._module_of(layer) for layer in self._layers]
        modules = set(outputs)
        for layer, module in zip(self._layers, outputs, strict=True):
            yield module.register_forward_hook(self._layer_hook(layer))
        for module in self._model.modules():
            if module not in modules and (is_norm(module) or _is_non_linearity(module)):
                yield module.register_forward_pre_hook(self._before_module, with_kwargs=True)
                yield module.register_forward_hook(self._after_module)

    def _module_of(self, layer: ScoredLayer) -> nn.Module:
        """Return the module whose output are the first activations of a layer."""
        if layer.use is None:
            return layer.module
        assert layer.use.output is not None
        return self._model.get_submodule(layer.use.output[0])

    def _layer_hook(self, layer: ScoredLayer) -> Callable[..., None]:
        def after_layer(_module: nn.Module, _inputs: object, output: object) -> None:
            if isinstance(output, Tensor):
                known = self._candidate(output)
                layers = (*known.layers, layer) if known else (layer,)
                self._candidates[id(output)] = _Candidate(output, output._version, layers, is_normed=False)

        return after_layer

    def _before_module(self, _module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        """Take the candidate that a norm or a non-linearity is called with; do not observe its inner operators."""
        candidate = self._candidate(_first_argument(args, kwargs))
        self._inside.append(candidate)
        if candidate is not None:
            del self._candidates[id(candidate.tensor)]

    def _after_module(self, module: nn.Module, _inputs: object, output: object) -> None:
        candidate = self._inside.pop()
        if candidate is not None:
            self._follow(candidate, output, by_norm=is_norm(module))

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        kwargs = dict(kwargs or {})
        read = self._candidates_in(args, kwargs)
        name = getattr(func, "__name__", "")
        if not read or name == "__get__":  # attributes such as `shape`
            return func(*args, **kwargs)

        # A norm or a non-linearity: its output becomes the candidate.
        operator = name.rstrip("_")
        first = self._candidate(_first_argument(args, kwargs))
        if first is not None and (operator in _NORMS or operator in _NON_LINEARITIES):
            del self._candidates[id(first.tensor)]
            result = func(*args, **kwargs)
            self._follow(first, result, by_norm=operator in _NORMS)
            return result

        # Any other operator: the activations are known, and must be reported before they are overwritten.
        if _writes_in_place(name, kwargs):
            self._report_all(read)
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        if _contains_tensor(result):
            self._report_all(candidate for candidate in read if candidate.tensor is not result)
        return result

    def _follow(self, candidate: _Candidate, output: object, *, by_norm: bool) -> None:
        """Continue with the output of a norm or a non-linearity."""
        tensor, version = candidate.tensor, candidate.version
        if not isinstance(output, Tensor) or output.shape != tensor.shape:
            self._report(candidate, tensor)
        elif output is tensor and output._version == version:  # dropout or identity
            self._candidates[id(tensor)] = candidate
        elif not by_norm:
            self._report(candidate, output)
        elif candidate.is_normed:  # a second norm: the activations are the output of the first
            self._report(candidate, tensor)
        else:
            self._candidates[id(output)] = _Candidate(output, output._version, candidate.layers, is_normed=True)

    def _report_all(self, candidates: Iterable[_Candidate]) -> None:
        for candidate in candidates:
            self._report(candidate, candidate.tensor)

    def _report(self, candidate: _Candidate, activations: Tensor) -> None:
        self._candidates.pop(id(candidate.tensor), None)
        for layer in candidate.layers:
            self._receive(layer, activations)

    def _candidate(self, value: object) -> _Candidate | None:
        return self._candidates.get(id(value)) if isinstance(value, Tensor) else None

    def _candidates_in(self, args: Iterable[object], kwargs: Mapping[str, object]) -> list[_Candidate]:
        """Return the candidates among the arguments of a function, and in the lists and tuples among them."""
        if not self._candidates:
            return []
        values: list[object] = []
        for value in (*args, *kwargs.values()):
            values.extend(value if isinstance(value, (list, tuple)) else (value,))
        found = {id(value): candidate for value in values if (candidate := self._candidate(value)) is not None}
        return list(found.values())


def _is_non_linearity(module: nn.Module) -> bool:
    """Return whether a module may be a non-linearity.

    Modules of PyTorch are recognized by the file that defines them, others by having no parameters and no submodules.
    """
    origin = type(module).__module__
    if origin.startswith("torch."):
        return isinstance(module, nn.Identity) or (
            origin == torch_activations.__name__ and not isinstance(module, _NOT_ELEMENTWISE)
        )
    return next(module.children(), None) is None and next(module.parameters(), None) is None


def _first_argument(args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
    return args[0] if args else next(iter(kwargs.values()), None)


def _writes_in_place(name: str, kwargs: Mapping[str, object]) -> bool:
    """Return whether a function may overwrite its arguments, by its name and keyword arguments."""
    is_operator = name in ("__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__", "__setitem__")
    by_name = name.endswith("_") and not name.endswith("__")
    return is_operator or by_name or kwargs.get("inplace") is True or kwargs.get("out") is not None


def _contains_tensor(result: object) -> bool:
    return isinstance(result, Tensor) or (
        isinstance(result, (list, tuple)) and any(isinstance(part, Tensor) for part in result)
    )
