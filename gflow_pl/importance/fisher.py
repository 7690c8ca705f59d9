"""Measures of the squared gradients of batches."""

from __future__ import annotations

from gflow_pl.importance.base import Importance, StatisticRows, TermRows, WeightRows

__all__ = ["Fisher", "NvidiaTaylor"]


class Fisher(Importance):
    """Diagonal Fisher information: ``sum theta^2 q``, with q the mean over batches of the squared gradient of a batch.

    As in the published code, the mean gradient of a batch is squared, not the gradient of each example, so scores
    depend on the batch size. With several ranks the batch is the global one.

    References: Theis et al. 2018; published code of Lubana and Dick 2021 (whose tracked variant omits the square).
    """

    name = "fisher"
    statistic = "squared_gradient"

    def summand(self, theta: WeightRows, flow: StatisticRows) -> TermRows:  # noqa: D102
        return theta.square() * flow


class NvidiaTaylor(Fisher):
    """The same on the norm that follows a filter: ``gamma^2 q_gamma + beta^2 q_beta``.

    A layer without a norm is treated as if a norm of weight 1 and bias 0 followed: the mean of ``(sum w g + b g_b)^2``.

    References: Molchanov et al. 2019, Importance estimation for neural network pruning (gates behind the norm).
    """

    name = "nvidia"
    reads = "norm"
