"""theta . H g on one batch: how gradient flow changes the gradient along the parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from gflow_pl.callbacks.lightning.silence import without_side_effects
from gflow_pl.common.lightning_package import pl
from gflow_pl.importance.batches import batch_size
from gflow_pl.importance.gradients import LossFn
from gflow_pl.importance.hessian import second_order_kernels
from gflow_pl.importance.hessian_strategies import hessian_vector_product
from gflow_pl.importance.reduction import Ranks, Reduce
from gflow_pl.importance.scoring_mode import cached_weights, scoring_mode

__all__ = ["curvature_along_gradient"]


def curvature_along_gradient(
    module: pl.LightningModule, batch: object, loss_fn: LossFn, reduce: Reduce | None = None
) -> dict[str, Tensor]:
    """Return the dot product theta . H g for every trained parameter theta.

    g is the gradient and H the Hessian of the mean loss with respect to the trained parameters, in evaluation mode.
    Frozen parameters are constants, since gradient flow does not move them. Side effects on the module are undone.

    Args:
        module: The module.
        batch: A batch on the module's device.
        loss_fn: ``loss_fn(module, batch)`` returns the scalar mean loss.
        reduce: Averages a tensor over the ranks, so that g and H are those of the loss over the batches of all ranks.

    Returns:
        A scalar on the module's device for each parameter name.
    """
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad and p.is_floating_point()}
    names, parameters = list(trained), list(trained.values())
    ranks, count = Ranks(reduce), batch_size(batch)
    with without_side_effects(module), scoring_mode(module), second_order_kernels(), cached_weights():
        loss = loss_fn(module, batch)
        gradients = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
        direction = ranks.weighted_mean([g.detach() * count for g in gradients], count)
        products = hessian_vector_product(gradients, direction, parameters)
    sums = [(p.detach() * product).sum() * count for p, product in zip(parameters, products, strict=True)]
    return dict(zip(names, ranks.weighted_mean(sums, count), strict=True))
