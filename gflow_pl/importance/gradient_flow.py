"""Measures of gradient flow: how the squared norm of the gradient would change without a filter."""

from __future__ import annotations

from torch import Tensor

from gflow_pl.importance.base import Importance

__all__ = ["GradientPreservation", "Grasp"]


class Grasp(Importance):
    """Increase of the gradient norm: ``sum theta (H g)``, signed; the lowest go first.

    The logits are divided by 200 unless a temperature is named.

    References: Wang et al. 2020, GraSP; per filter in Lubana and Dick 2021.
    """

    name = "grasp"
    statistic = "hessian_product"
    is_signed = True
    temperature = 200.0

    def summand(self, theta: Tensor, flow: Tensor) -> Tensor:  # noqa: D102
        return theta * flow


class GradientPreservation(Grasp):
    """Preservation of the gradient norm: ``|sum theta (H g)|``; the temperature is 1 unless named.

    References: Lubana and Dick 2021, the proposed second-order measure.
    """

    name = "grad_preserve"
    is_signed = False
    temperature = 1.0

    def finish(self, total: Tensor) -> Tensor:  # noqa: D102
        return total.abs()
