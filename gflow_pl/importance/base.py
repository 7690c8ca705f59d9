"""The base classes of importance measures: a few declared facts and one formula."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from gflow_pl.importance.layers import Reads
from gflow_pl.values.choices import Bias

__all__ = [
    "ActivationImportance",
    "Activations",
    "Bias",
    "FilterVector",
    "Importance",
    "Statistic",
    "StatisticRows",
    "TermRows",
    "WeightRows",
]

# Shapes, which the tests check whenever a measure is called.
WeightRows = Float[Tensor, "filters weights"]
StatisticRows = Float[Tensor, "filters #weights"]
TermRows = Float[Tensor, "filters _"]
FilterVector = Float[Tensor, " filters"]
Activations = Float[Tensor, "examples filters ..."]

Statistic = Literal["weights", "noise", "gradient", "squared_gradient", "hessian_product", "activation"]


class Importance(ABC):
    """Base class of all measures: gives every filter an importance score; a higher score means keep.

    The score of a filter is ``finish(sum over the filter's weights of bias * summand(theta, flow))``. `theta` holds the
    weights, `flow` the statistic that the measure declares, and the bias is 1, |theta| or |theta - theta_0|.

    To add a measure, write a subclass with a `name`, a `statistic` and a `summand`. Passes over batches, several ranks,
    sampling, tracking, and transposed and grouped layers need no further code. For a measure of activations, subclass
    `ActivationImportance`.

    Attributes:
        name: Name in settings, logs and messages.
        aliases: Other names that are accepted.
        statistic: Content of `flow`. "weights": the weights; no batch is read. "noise": one uniform number in [0, 1)
            for each filter, from a private generator. "gradient": the mean gradient g of the loss. "squared_gradient":
            the mean over batches of the squared gradient of a batch. "hessian_product": the product H g of the Hessian
            and the gradient. "activation": one number for each filter, see `ActivationImportance`.
        reads: "weight" for the weight of the layer, "norm" for weight and bias of the norm that follows it. A layer
            without a norm is treated as if a norm of weight 1 and bias 0 followed.
        is_signed: Whether scores can be negative.
        temperature: Divisor of the logits if the caller gives none. None for a formula without one: then it is 1, and
            inside a training run the temperature of the training.
        default_bias: Bias if the caller gives none.
        is_tracked: Whether the score is defined as an exponential average over batches.
        alpha: Weight of the newest batch in that average, in (0, 1].
        needs_batches: Derived from `statistic`: whether batches are read.
        needs_gradients: Derived from `statistic`: whether batches and first-order gradients are needed.
        needs_hessian: Derived from `statistic`: whether Hessian-gradient products are needed.
        needs_own_pass: Derived from `statistic`: whether every tracked step needs a separate pass, because the
            gradients of training do not contain the statistic.
        needs_labels: Derived from `statistic`: whether samples are balanced over the classes, if there are labels.
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
    needs_batches: ClassVar[bool] = False
    needs_gradients: ClassVar[bool] = False
    needs_hessian: ClassVar[bool] = False
    needs_own_pass: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        statistic = getattr(cls, "statistic", None)
        cls.needs_hessian = cls.needs_labels = statistic == "hessian_product"
        cls.needs_gradients = statistic in ("gradient", "squared_gradient", "hessian_product")
        cls.needs_own_pass = statistic in ("hessian_product", "activation")
        cls.needs_batches = cls.needs_gradients or cls.needs_own_pass

    @abstractmethod
    def summand(self, theta: WeightRows, flow: StatisticRows) -> TermRows:
        """Return the contribution of each weight to the score of its filter.

        Args:
            theta: Weights, (filters, weights of one filter), float32 or float64.
            flow: Statistic, of the same shape; (filters, 1) for "noise".

        Returns:
            The contributions, of the shape of `flow`.
        """

    def finish(self, total: FilterVector) -> FilterVector:
        """Return the scores, (filters,), from the sums of the contributions, (filters,); by default the sums."""
        return total

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class ActivationImportance(Importance):
    """Base class of measures of activations, such as APoZ and HRank.

    To add one, write a subclass with a `name` and `score_activations`. The activations of a layer are its output after
    the norm and the non-linearity that follow it; `gflow_pl.importance.activations` defines them precisely.

    The score of a filter is ``finish(mean over all examples of score_activations)``. The mean is taken over batches,
    weighted by their numbers of examples, over the calls of a layer that is called more than once, and over all ranks.
    """

    statistic = "activation"

    @abstractmethod
    def score_activations(self, activations: Activations) -> FilterVector:
        """Return one number for every filter of a layer: the mean over the examples of a batch.

        Args:
            activations: Activations of one layer for one batch, (examples, filters, ...), float32 or float64. The last
                dimensions are the positions: height and width for a 2-d convolution, none for a linear layer that is
                applied to vectors.

        Returns:
            The numbers, (filters,).
        """

    def summand(self, theta: WeightRows, flow: StatisticRows) -> TermRows:
        """Return the mean of `score_activations`, (filters, 1), unchanged."""
        return flow
