"""GradientFlowMonitor: statistics of gradient flow of every layer, once per epoch, from the training's own steps."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from gflow_pl.callbacks.curvature import curvature_along_gradient
from gflow_pl.callbacks.lightning.packages import Callback
from gflow_pl.callbacks.lightning.precision import gradient_scale, with_true_precision
from gflow_pl.callbacks.lightning.ranks import mean_over_ranks
from gflow_pl.callbacks.lightning.training_loss import training_loss
from gflow_pl.common.checks import check_function, check_whole_number
from gflow_pl.common.errors import SettingsError
from gflow_pl.common.lightning_package import pl
from gflow_pl.importance.gradients import LossFn

__all__ = ["GradientFlowMonitor"]

_SQUARES, _PRODUCTS, _GRADIENTS, _DISTANCES, _STEPS = range(5)
"""Positions in the statistics of a parameter (see `GradientFlowMonitor._statistics`)."""


class GradientFlowMonitor(Callback):
    """Log gradient-flow statistics of every layer once per epoch.

    The statistics, for every layer and for the whole network (theta: the trained parameters, g: their gradient,
    theta_0: their values when training began, H: the Hessian of the loss):

    - ``parameter_norm``: L2 norm of theta,
    - ``theta_g``: theta . g, half the rate at which the squared norm of theta shrinks under gradient flow,
    - ``gradient_norm``: L2 norm of g,
    - ``distance_from_init``: L2 norm of theta - theta_0,
    - ``theta_h_g``: theta . H g, if `hessian` is set.

    The first four are measured at the last optimizer step of the epoch, before the step, with the gradient that the
    step uses: of the global batch, after unscaling and before clipping. They cost a few operations for each parameter,
    and one transfer to the host for each epoch. If the network is pruned during training, theta_0 is pruned as well. A
    parameter counts for the module that holds it; a tied parameter counts for the first one. Every logger of the
    Trainer receives ``gradient_flow/<quantity>`` for the network and ``gradient_flow/<quantity>/<layer>`` for the
    layers.

    Attributes:
        rows: One row for each epoch and layer: ``epoch``, ``step`` (optimizer steps so far), ``layer`` (as in
            ``named_modules()``, "" for the whole network) and the statistics. A statistic is None if there was no
            finite gradient: if the epoch was interrupted, or if no optimizer moved the layer in the last batch.
            Statistics of the whole network are over all layers that have one.

    Args:
        num_batches: Number of batches at the end of an epoch whose steps are averaged (root mean square for norms), at
            least 1. Of data without a length, only the last batch is known.
        every_n_epochs: Epochs between two measurements, at least 1. The first measurement is in epoch 0.
        per_layer: Whether to measure and log layers as well as the whole network.
        distance: Whether to measure the distance from theta_0. It needs a copy of the parameters, also in checkpoints.
        hessian: Whether to measure theta . H g: on the last batch of the epoch, after its step, in evaluation mode,
            with g and H of that batch (of all ranks). It costs about five passes over the batch.
        loss_fn: ``loss_fn(module, batch)`` returns the scalar loss that H is of, in place of the module's
            `training_step`. Required for manual optimization if `hessian` is set.

    Raises:
        SettingsError: An argument is out of range.

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
        loss_fn: LossFn | None = None,
    ) -> None:
        check_whole_number("num_batches", num_batches, 1, caller="GradientFlowMonitor")
        check_whole_number("every_n_epochs", every_n_epochs, 1, caller="GradientFlowMonitor")
        if loss_fn is not None:
            check_function("loss_fn", loss_fn, caller="GradientFlowMonitor")
        self.num_batches, self.every_n_epochs = num_batches, every_n_epochs
        self.per_layer, self.distance = per_layer, distance
        self.hessian, self.loss_fn = hessian, loss_fn
        self.rows: list[dict[str, Any]] = []
        self._initial_state: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._curvatures: dict[str, Tensor] = {}
        self._is_measuring = False

    def tensors_by_name(self) -> dict[str, Tensor]:
        """Return the initial parameters by name.

        `PruningCallback` prunes the tensors in this dict like the parameters.
        """
        return self._initial_state

    # Hooks of the Trainer

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Raise if the module has no loss that the Hessian could be taken of."""
        if stage == "fit" and self.hessian and self.loss_fn is None and not pl_module.automatic_optimization:
            raise SettingsError(
                f"GradientFlowMonitor: {type(pl_module).__name__} uses manual optimization, so its `training_step` "
                "does not return the loss of a batch: give `loss_fn(module, batch)`, or leave `hessian` out."
            )

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Copy the initial parameters, unless they come from a checkpoint."""
        if not self.distance:
            self._initial_state.clear()
            return
        present = {name: parameter.detach() for name, parameter in pl_module.named_parameters()}
        if self._initial_state and any(self._shape_of_initial(name) != p.shape for name, p in present.items()):
            pl.utilities.rank_zero_warn(
                f"GradientFlowMonitor: the saved initial parameters are not of this {type(pl_module).__name__}, so "
                "distances are measured from its present parameters."
            )
            self._initial_state.clear()
        initial = self._initial_state or present
        self._initial_state = {name: initial[name].to(tensor.device).clone() for name, tensor in present.items()}

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Discard the measurements of the last epoch."""
        self._sums, self._curvatures, self._is_measuring = {}, {}, False

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Start to measure at the last batches of the epoch."""
        self._is_measuring = self._is_due(trainer) and (
            _is_last_batch(trainer) or batch_idx >= trainer.num_training_batches - self.num_batches
        )

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Measure the parameters that this optimizer updates, without a transfer to the host."""
        if not self._is_measuring:
            return

        # Measure every trained parameter of this optimizer.
        parameter_ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = gradient_scale(scaler, optimizer, pl_module.device)
        with torch.no_grad():
            measured = {
                name: self._statistics(name, parameter, _unscaled_gradient(parameter, scale))
                for name, parameter in pl_module.named_parameters()
                if id(parameter) in parameter_ids and parameter.requires_grad
            }
            if not measured:
                return
            # Leave out a step whose gradients overflow: the gradient scaler skips it, too.
            is_finite = torch.stack(list(measured.values())).isfinite().all()
            for name, values in measured.items():
                values = values.where(is_finite, torch.zeros_like(values))
                self._sums[name] = self._sums[name] + values if name in self._sums else values

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Measure the curvature on the last batch."""
        if self.hessian and self._is_measuring and _is_last_batch(trainer):
            loss_fn = with_true_precision(self.loss_fn or training_loss)
            self._curvatures = curvature_along_gradient(pl_module, batch, loss_fn, mean_over_ranks(trainer))

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the rows of the epoch, and log them."""
        self._is_measuring = False
        if not self._is_due(trainer):
            return
        rows = self._rows_of_epoch(trainer, pl_module)
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
        """Return the rows and the initial parameters."""
        return {"version": 1, "rows": [dict(row) for row in self.rows], "initial": dict(self._initial_state)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the rows and the initial parameters of the run that is resumed."""
        self.rows = [dict(row) for row in state_dict["rows"]]
        self._initial_state = dict(state_dict["initial"])

    # Statistics

    def _is_due(self, trainer: pl.Trainer) -> bool:
        return trainer.current_epoch % self.every_n_epochs == 0

    def _shape_of_initial(self, name: str) -> torch.Size | None:
        return self._initial_state[name].shape if name in self._initial_state else None

    def _statistics(self, name: str, parameter: Tensor, gradient: Tensor | None) -> Tensor:
        """Return the statistics (5,) of a parameter in one step, on the parameter's device.

        They are theta . theta, theta . g, g . g, |theta - theta_0|^2 and 1 (a count of steps).

        Args:
            name: Name of the parameter.
            parameter: The parameter.
            gradient: Its gradient; None counts as zero.

        Raises:
            SettingsError: The parameter has another shape than its initial value.
        """
        value = parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))
        zero = value.new_zeros(())
        gradient = None if gradient is None else gradient.to(value.dtype)
        initial = self._initial_state.get(name)
        if initial is not None and initial.shape != value.shape:
            raise SettingsError(
                f"GradientFlowMonitor: '{name}' has shape {tuple(value.shape)}, but had {tuple(initial.shape)} "
                "initially: code that rewrites the network during training must rewrite the tensors of "
                "`tensors_by_name()` alike; otherwise set `distance=False`."
            )
        statistics = (
            value.square().sum(),
            zero if gradient is None else (value * gradient).sum(),
            zero if gradient is None else gradient.square().sum(),
            zero if initial is None else (value - initial).square().sum(),
            zero + 1,
        )
        return torch.stack(statistics)

    def _rows_of_epoch(self, trainer: pl.Trainer, module: pl.LightningModule) -> list[dict[str, Any]]:
        """Return the row of the whole network, then the rows of the layers, in the order of the module."""
        names, table = self._means_by_parameter(module)
        owners = [name.rpartition(".")[0] or name for name in names]
        rows = []
        for layer in ("", *dict.fromkeys(owners if self.per_layer else ())):
            # Sum over the layer's parameters.
            values = [row for row, owner in zip(table, owners, strict=True) if layer in ("", owner)]
            squares, products, gradients, distances, curvatures = (
                _sum_of_known(column) for column in zip(*values, strict=True)
            )
            # Norms are the roots of these sums.
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

    def _means_by_parameter(self, module: pl.LightningModule) -> tuple[list[str], list[list[float]]]:
        """Return the names of the trained parameters and, for each, five numbers; NaN where nothing was measured.

        The numbers are the means over steps of theta . theta, theta . g, g . g and |theta - theta_0|^2, and theta . H
        g. They are read from the device in one transfer.
        """
        names, columns = [], []
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            # Means over steps; what needs no gradient is measured now if there was no step.
            with torch.no_grad():
                now = self._statistics(name, parameter, None)
            sums = self._sums.get(name, torch.zeros_like(now))
            mean = sums / sums[_STEPS]
            for position in (_SQUARES, _DISTANCES):
                mean[position] = torch.where(sums[_STEPS] > 0, mean[position], now[position])
            # A curvature that was measured and is not finite becomes infinite, so that it is not taken for unknown.
            curvature = self._curvatures.get(name, now.new_full((), math.nan))
            if name in self._curvatures:
                curvature = curvature.where(curvature.isfinite(), math.inf)
            columns.append(torch.cat([mean[:_STEPS], curvature.to(mean)[None]]).to(module.device))
            names.append(name)
        return names, torch.stack(columns).tolist() if columns else []


def _is_last_batch(trainer: pl.Trainer) -> bool:
    """Return whether no batch follows in this epoch, because the data or the Trainer's steps end."""
    steps_left = trainer.max_steps - trainer.global_step
    return trainer.is_last_batch or (trainer.max_steps >= 0 and steps_left <= len(trainer.optimizers))


def _unscaled_gradient(parameter: Tensor, scale: Tensor | None) -> Tensor | None:
    """Return a parameter's gradient as a dense tensor, divided by the scale it still carries; None if it has none."""
    gradient = parameter.grad
    if gradient is None:
        return None
    gradient = gradient.to_dense() if gradient.is_sparse else gradient
    return gradient if scale is None else gradient / scale


def _sum_of_known(column: Iterable[float]) -> float | None:
    """Return the sum of the values that are not NaN; None if there is no such value, or if the sum is not finite."""
    known = [value for value in column if not math.isnan(value)]
    total = sum(known)
    return total if known and math.isfinite(total) else None


def _root(square: float | None) -> float | None:
    return None if square is None else math.sqrt(square)
