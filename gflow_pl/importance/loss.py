"""Measures of loss preservation: the first-order change of the loss when a filter is removed."""

from __future__ import annotations

from typing import ClassVar

from gflow_pl.common.errors import SettingsError
from gflow_pl.importance.base import FilterVector, Importance, StatisticRows, TermRows, WeightRows

__all__ = ["BiasedLoss", "LossPreservation", "TaylorFirstOrder", "TrackedBiasedLoss"]


class LossPreservation(Importance):
    """Loss preservation: ``sum |theta g|``, with g the mean gradient.

    References: Lubana and Dick 2021, equation 3 (a sum of absolute values; the absolute value of the sum is `tfo`).
    """

    name = "loss"
    aliases: ClassVar[tuple[str, ...]] = ("loss_based",)
    statistic = "gradient"

    def summand(self, theta: WeightRows, flow: StatisticRows) -> TermRows:  # noqa: D102
        return (theta * flow).abs()


class BiasedLoss(LossPreservation):
    """Loss preservation biased towards large weights: ``sum |theta| |theta g|``.

    With initial weights the bias is the distance from them: ``sum |theta - theta_0| |theta g|``.

    References: Lubana and Dick 2021, the proposed extension.
    """

    name = "biased_loss"
    aliases = ()
    default_bias = "magnitude"


class TrackedBiasedLoss(LossPreservation):
    """Biased loss preservation, averaged exponentially over batches: ``sum |theta| |theta g_batch|``.

    ``running = alpha * new + (1 - alpha) * running``, starting from zero. Without tracking, every batch that filters
    are scored on is one step of the average.

    Args:
        alpha: Weight of the newest batch, in (0, 1].

    Raises:
        SettingsError: `alpha` is out of range.

    References: published code of Lubana and Dick 2021 (`biased_loss_tracked`).
    """

    name = "biased_loss_tracked"
    aliases = ()
    default_bias = "magnitude"
    is_tracked = True

    def __init__(self, alpha: float = 0.8) -> None:
        if not 0 < alpha <= 1:
            raise SettingsError(f"biased_loss_tracked: `alpha` must be in (0, 1], got {alpha}.")
        self.alpha = alpha


class TaylorFirstOrder(Importance):
    """First-order Taylor term of a whole filter: ``|sum theta g|``.

    For a convolution followed by a norm in training mode the sum is close to zero, because the loss does not depend on
    the scale of its weights. Scores are taken in evaluation mode, where the sum is not zero.

    References: Molchanov et al. 2017.
    """

    name = "tfo"
    statistic = "gradient"

    def summand(self, theta: WeightRows, flow: StatisticRows) -> TermRows:  # noqa: D102
        return theta * flow

    def finish(self, total: FilterVector) -> FilterVector:  # noqa: D102
        return total.abs()
