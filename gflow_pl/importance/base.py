"""What a measure is: a few declared facts and one formula."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from torch import Tensor

from gflow_pl.importance.layers import Reads
from gflow_pl.values.choices import Bias

__all__ = ["Bias", "Importance", "Statistic"]

Statistic = Literal["weights", "noise", "gradient", "squared_gradient", "hessian_product"]


class Importance(ABC):
    """The importance of filters; higher = keep.

    A filter's score is ``finish(sum over the filter's weights of bias * summand(theta, flow))``: `theta` are the
    weights, `flow` is the statistic that the measure declares, and the bias is 1, |theta| or |theta - theta_0|.
    A new measure is a subclass with a name, a statistic and a `summand`; all else (passes, ranks, sampling,
    tracking, transposed and grouped layers) is done for it.

    Attributes:
        name: What the measure is called in settings, logs and errors.
        aliases: Other names that are accepted.
        statistic: What `flow` holds. "weights": nothing is needed, `flow` is `theta`; "noise": one uniform number in
            [0, 1) a filter, from a private generator; "gradient": the mean gradient g of the loss;
            "squared_gradient": the mean over batches of the squared gradient of a batch; "hessian_product": H g.
        reads: "weight" for the layer's own weight, "norm" for weight and bias of the norm behind it; a layer
            without norm is seen as if a norm of weight 1 and bias 0 followed.
        is_signed: Whether scores can be negative.
        temperature: Divides the logits where the caller names no temperature; None where the formula asks for none (then 1,
            and inside a training run the training's own).
        default_bias: The bias where the caller names none.
        is_tracked: Whether the score is by definition an exponential average over batches.
        alpha: Share of the newest batch in that average, in (0, 1].
        needs_gradients: Follows from `statistic`: batches and first-order gradients are needed.
        needs_hessian: Follows from `statistic`: Hessian-gradient products are needed.
        needs_labels: Follows from `statistic`: samples are balanced over the classes, if there are labels.
    """

    name: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    statistic: ClassVar[Statistic]
    reads: ClassVar[Reads] = "weight"
    is_signed: ClassVar[bool] = False
    temperature: ClassVar[float | None] = None
    default_bias: ClassVar[Bias] = "none"
    is_tracked: ClassVar[bool] = False
    alpha: float = 0.8
    needs_gradients: ClassVar[bool] = False
    needs_hessian: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        statistic = getattr(cls, "statistic", None)
        cls.needs_hessian = cls.needs_labels = statistic == "hessian_product"
        cls.needs_gradients = statistic in ("gradient", "squared_gradient", "hessian_product")

    @abstractmethod
    def summand(self, theta: Tensor, flow: Tensor) -> Tensor:
        """What each weight adds to its filter.

        Args:
            theta: Weights, (filters, weights of one filter), float32 or float64.
            flow: The statistic, of the same shape; (filters, 1) for "noise".

        Returns:
            The terms, of the shape of `flow`.
        """

    def finish(self, total: Tensor) -> Tensor:
        """The scores, (filters,), from the sums over each filter's terms, (filters,); here the sums themselves."""
        return total

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"
