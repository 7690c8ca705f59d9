"""GradientFlowMonitor: the quantities that gradient flow is told by, once an epoch, from the training's own steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from gflow_pl.callbacks.curvature import curvature_along_gradient
from gflow_pl.callbacks.lightning.precision import gradient_scale, with_true_precision
from gflow_pl.callbacks.lightning.ranks import mean_over_ranks
from gflow_pl.callbacks.lightning.training_loss import training_loss

__all__ = ["GradientFlowMonitor"]

_SQUARES, _PRODUCTS, _GRADIENTS, _DISTANCES, _STEPS = range(5)


class GradientFlowMonitor(Callback):
    """Follows parameters and gradients of every layer through training.

    Once an epoch, for every layer and for the whole network (theta: the parameters that are trained, g: their gradient,
    theta_0: their values when training began, H: the Hessian of the loss):

    - ``parameter_norm``: L2 norm of theta,
    - ``theta_g``: theta . g, half the speed at which the squared norm of theta shrinks under gradient flow,
    - ``gradient_norm``: L2 norm of g,
    - ``distance_from_init``: L2 norm of theta - theta_0,
    - ``theta_h_g``: theta . H g, if asked for.

    The first four are taken at the last optimizer step of the epoch, before it is made, with the very gradient that it
    uses: of the global batch, after unscaling and before clipping. They cost a few operations a parameter and one transfer to
    the host, once an epoch. In a network that is pruned meanwhile, theta_0 is pruned along. A parameter counts for the
    module that holds it, a tied one for the first. Every logger of the Trainer gets ``gradient_flow/<quantity>`` for the
    network and ``gradient_flow/<quantity>/<layer>``.

    Attributes:
        rows: One row an epoch and layer: ``epoch``, ``step`` (optimizer steps so far), ``layer`` (as in
            ``named_modules()``, "" for the whole network) and the quantities; None where there was no finite gradient,
            as when an epoch is broken off or no optimizer moves the layer in its last batch. The whole network's are
            of all layers that have one.

    Args:
        num_batches: Batches at the end of an epoch over whose steps is averaged (the root of the mean square, for norms), at
            least 1. Of data without a length only the last one is known.
        every_n_epochs: Epochs between two measurements, at least 1; the first is of epoch 0.
        per_layer: Whether to keep and log rows of the layers, too.
        distance: Whether to measure the distance from theta_0; keeps a copy of the parameters, also in checkpoints.
        hessian: Whether to measure theta . H g: on the epoch's last batch, after its step, in evaluation mode, g and H
            being of that batch (of all ranks); costs about five passes over it.
        loss_fn: ``loss_fn(module, batch)`` gives the scalar loss that H is of, in place of the module's
            `training_step`; manual optimization needs it, if `hessian` is asked for.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> monitor = GradientFlowMonitor(num_batches=2, per_layer=False)
        >>> trainer = pl.Trainer(callbacks=[monitor], logger=False, accelerator="cpu")
    """

    def __init__(
        self,
        num_batches: int = 1,
        every_n_epochs: int = 1,
        per_layer: bool = True,
        distance: bool = True,
        hessian: bool = False,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
    ) -> None:
        for name, value in (("num_batches", num_batches), ("every_n_epochs", every_n_epochs)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"GradientFlowMonitor: `{name}` must be a whole number >= 1, got {value!r}.")
        if loss_fn is not None and not callable(loss_fn):
            raise ValueError(f"GradientFlowMonitor: `loss_fn` must be a function (module, batch), got {loss_fn!r}.")
        self.num_batches, self.every_n_epochs = num_batches, every_n_epochs
        self.per_layer, self.distance = per_layer, distance
        self.hessian, self.loss_fn = hessian, loss_fn
        self.rows: list[dict[str, Any]] = []
        self._initial: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._curvatures: dict[str, Tensor] = {}
        self._is_on = False

    def tensors_by_name(self) -> dict[str, Tensor]:
        """The initial parameters by name: whoever rewrites the network cuts the entries of this dict alike."""
        return self._initial

    # Hooks of the Trainer

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuses what cannot be measured."""
        if stage == "fit" and self.hessian and self.loss_fn is None and not pl_module.automatic_optimization:
            raise ValueError(
                f"GradientFlowMonitor: {type(pl_module).__name__} optimizes by hand, so its `training_step` cannot be asked for "
                "a loss: give `loss_fn(module, batch)`, or leave `hessian` out."
            )

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keeps the initial parameters, unless a checkpoint brought them."""
        if not self.distance:
            self._initial.clear()
            return
        present = {name: parameter.detach() for name, parameter in pl_module.named_parameters()}
        if self._initial and any(not _same_shape(self._initial.get(name), p) for name, p in present.items()):
            rank_zero_warn(
                f"GradientFlowMonitor: the initial parameters that it holds are not of this {type(pl_module).__name__}, so "
                "distances are measured from its present ones."
            )
            self._initial.clear()
        kept = self._initial or present
        self._initial = {name: kept[name].to(tensor.device).clone() for name, tensor in present.items()}

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begins anew."""
        self._sums, self._curvatures, self._is_on = {}, {}, False

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Notes whether the epoch is about to end."""
        self._is_on = self._is_due(trainer) and (
            _is_last(trainer) or batch_idx >= trainer.num_training_batches - self.num_batches
        )

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Measures the parameters that this optimizer moves; nothing is read on the host."""
        if not self._is_on:
            return
        moved = {id(p) for group in optimizer.param_groups for p in group["params"]}
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = gradient_scale(scaler, optimizer, pl_module.device)
        with torch.no_grad():
            measured = {
                name: self._statistics(name, parameter, _gradient(parameter, scale))
                for name, parameter in pl_module.named_parameters()
                if id(parameter) in moved and parameter.requires_grad
            }
            if measured:
                # A step that an overflow makes void (and the scaler leaves out) counts for nothing.
                usable = torch.stack(list(measured.values())).isfinite().all()
                for name, values in measured.items():
                    values = values.where(usable, torch.zeros_like(values))
                    self._sums[name] = self._sums[name] + values if name in self._sums else values

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measures the curvature on the last batch."""
        if self.hessian and self._is_on and _is_last(trainer):
            loss_fn = with_true_precision(self.loss_fn or training_loss)
            self._curvatures = curvature_along_gradient(pl_module, batch, loss_fn, mean_over_ranks(trainer))

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Adds the epoch's rows and logs them."""
        self._is_on = False
        if not self._is_due(trainer):
            return
        rows = self._rows_of(trainer, pl_module)
        self.rows = [row for row in self.rows if row["epoch"] != trainer.current_epoch] + rows
        numbers = {
            f"gradient_flow/{quantity}" + (f"/{row['layer']}" if row["layer"] else ""): value
            for row in rows
            for quantity, value in row.items()
            if quantity not in ("epoch", "step", "layer") and value is not None
        }
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=trainer.global_step)
        self._sums, self._curvatures = {}, {}

    @override
    def state_dict(self) -> dict[str, Any]:
        """The rows and the initial parameters."""
        return {"version": 1, "rows": [dict(row) for row in self.rows], "initial": dict(self._initial)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the rows and the initial parameters of the run that is resumed."""
        self.rows = [dict(row) for row in state_dict["rows"]]
        self._initial = dict(state_dict["initial"])

    # Numbers

    def _is_due(self, trainer: pl.Trainer) -> bool:
        return trainer.current_epoch % self.every_n_epochs == 0

    def _statistics(self, name: str, parameter: Tensor, gradient: Tensor | None) -> Tensor:
        """(5,) theta . theta, theta . g, g . g, |theta - theta_0|^2 and 1; on the parameter's device.

        Raises:
            ValueError: The parameter has another shape than its initial value.
        """
        value = parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))
        zero = value.new_zeros(())
        gradient = None if gradient is None else gradient.to(value.dtype)
        initial = self._initial.get(name)
        if initial is not None and initial.shape != value.shape:
            raise ValueError(
                f"GradientFlowMonitor: '{name}' has shape {tuple(value.shape)} and began with {tuple(initial.shape)}: whoever "
                "rewrites a network in training must cut `tensors_by_name()` alike, or set `distance=False`."
            )
        statistics = (
            value.square().sum(),
            zero if gradient is None else (value * gradient).sum(),
            zero if gradient is None else gradient.square().sum(),
            zero if initial is None else (value - initial).square().sum(),
            zero + 1,
        )
        return torch.stack(statistics)

    def _rows_of(self, trainer: pl.Trainer, module: pl.LightningModule) -> list[dict[str, Any]]:
        names, table = self._table(module)
        owners = [name.rpartition(".")[0] or name for name in names]
        rows = []
        for layer in ("", *dict.fromkeys(owners if self.per_layer else ())):
            values = [row for row, owner in zip(table, owners, strict=True) if layer in ("", owner)]
            squares, products, gradients, distances, curvatures = (
                _known_sum(column) for column in zip(*values, strict=True)
            )
            row: dict[str, Any] = {"epoch": trainer.current_epoch, "step": trainer.global_step, "layer": layer}
            row["parameter_norm"] = _root(squares)
            row["theta_g"] = products
            row["gradient_norm"] = _root(gradients)
            if self.distance:
                row["distance_from_init"] = _root(distances)
            if self.hessian:
                row["theta_h_g"] = curvatures
            rows.append(row)
        return rows

    def _table(self, module: pl.LightningModule) -> tuple[list[str], list[list[float]]]:
        """For every parameter that is trained: mean statistics over the steps measured and theta . H g; NaN = not known."""
        names, columns = [], []
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            with torch.no_grad():
                now = self._statistics(name, parameter, None)
            sums = self._sums.get(name, torch.zeros_like(now))
            mean = sums / sums[_STEPS]
            for known_anyway in (_SQUARES, _DISTANCES):
                mean[known_anyway] = torch.where(sums[_STEPS] > 0, mean[known_anyway], now[known_anyway])
            curvature = self._curvatures.get(name, now.new_full((), math.nan))
            if name in self._curvatures:
                # NaN stands for what was not measured; what was, and is not finite, makes the sum infinite.
                curvature = curvature.where(curvature.isfinite(), math.inf)
            columns.append(torch.cat([mean[:_STEPS], curvature.to(mean)[None]]).to(module.device))
            names.append(name)
        return names, torch.stack(columns).tolist() if columns else []


def _is_last(trainer: pl.Trainer) -> bool:
    """Whether no batch will follow in this epoch, because the data or the Trainer's steps are at their end."""
    steps_left = trainer.max_steps - trainer.global_step
    return trainer.is_last_batch or (trainer.max_steps >= 0 and steps_left <= len(trainer.optimizers))


def _gradient(parameter: Tensor, scale: Tensor | None) -> Tensor | None:
    gradient = parameter.grad
    if gradient is None:
        return None
    gradient = gradient.to_dense() if gradient.is_sparse else gradient
    return gradient if scale is None else gradient / scale


def _same_shape(one: Tensor | None, other: Tensor) -> bool:
    return one is not None and one.shape == other.shape


def _known_sum(column: Iterable[float]) -> float | None:
    """The sum of what is known; None if nothing is, or if it is not finite."""
    known = [value for value in column if not math.isnan(value)]
    total = sum(known)
    return total if known and math.isfinite(total) else None


def _root(square: float | None) -> float | None:
    return None if square is None else math.sqrt(square)
