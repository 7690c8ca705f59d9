"""Measures of gradient flow: the change of the squared gradient norm when a filter is removed."""

from __future__ import annotations

from gflow_pl.importance.base import FilterVector, Importance, StatisticRows, TermRows, WeightRows

__all__ = ["GradientPreservation", "Grasp"]


class Grasp(Importance):
    """Increase of the gradient norm: ``sum theta (H g)``. Scores are signed; the lowest are pruned first.

    The logits are divided by 200 unless another temperature is given.

    References: Wang et al. 2020, GraSP; per filter in Lubana and Dick 2021.
    """

    name = "grasp"
    statistic = "hessian_product"
    is_signed = True
    temperature = 200.0

    def summand(self, theta: WeightRows, flow: StatisticRows) -> TermRows:  # noqa: D102
        return theta * flow


class GradientPreservation(Grasp):
    """Preservation of the gradient norm: ``|sum theta (H g)|``. The temperature is 1 unless another is given.

    References: Lubana and Dick 2021, the proposed second-order measure.
    """

    name = "grad_preserve"
    is_signed = False
    temperature = 1.0

    def finish(self, total: FilterVector) -> FilterVector:  # noqa: D102
        return total.abs()
