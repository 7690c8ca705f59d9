"""Measures of the weights alone, and random scores as the baseline of every comparison."""

from __future__ import annotations

from gflow_pl.importance.base import FilterVector, Importance, StatisticRows, TermRows, WeightRows

__all__ = ["BatchNormScale", "L1Norm", "Magnitude", "Random"]


class Magnitude(Importance):
    """L2 norm of a filter: ``sqrt(sum theta^2)``.

    References: Li et al. 2017 (norms of filters); Lubana and Dick 2021, where it is the "zeroth order" measure.
    """

    name = "magnitude"
    aliases = ("mag_based",)
    statistic = "weights"

    def summand(self, theta: WeightRows, flow: StatisticRows) -> TermRows:  # noqa: D102
        return theta.square()

    def finish(self, total: FilterVector) -> FilterVector:  # noqa: D102
        return total.sqrt()


class L1Norm(Importance):
    """L1 norm of a filter: ``sum |theta|``.

    References: Li et al. 2017, Pruning filters for efficient ConvNets.
    """

    name = "l1"
    statistic = "weights"

    def summand(self, theta: WeightRows, flow: StatisticRows) -> TermRows:  # noqa: D102
        return theta.abs()


class BatchNormScale(Importance):
    """Absolute scale of the norm that follows a filter: ``|gamma|``; 1 for a layer without a norm.

    References: Liu et al. 2017, Network slimming. The penalty on gamma that the paper trains with is not part of the
        measure.
    """

    name = "bn"
    statistic = "weights"
    reads = "norm"

    def summand(self, theta: WeightRows, flow: StatisticRows) -> TermRows:  # noqa: D102
        return theta[:, :1].abs()


class Random(Importance):
    """Uniform random numbers in [0, 1) from a private generator.

    They are the same on every rank, and the global generators are not used.
    """

    name = "random"
    statistic = "noise"

    def summand(self, theta: WeightRows, flow: StatisticRows) -> TermRows:  # noqa: D102
        return flow
