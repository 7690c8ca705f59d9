"""The record of a model: everything that the recorded forward passes showed, as names and integers."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch

from gflow_pl.channels.constraints import Constraints, Labels
from gflow_pl.channels.data_flow import Sources
from gflow_pl.channels.operator_record import OperatorRecord
from gflow_pl.values import SizeAttribute

__all__ = ["LayerFacts", "Record"]


@dataclass(eq=False)
class LayerFacts:
    """What the calls of one convolution, transposed convolution or linear layer showed.

    Attributes:
        name: Name of the layer, as in ``named_modules()``, or the name of its weight.
        weight: Name of its weight tensor.
        num_filters: Number of output channels.
        votes: Whether its scores count for its group; a depthwise convolution only follows.
        is_grouped: Whether it is a convolution with several groups (no transposed one), whose input can be gathered.
        outputs: (num_filters,) labels of its output channels; None if no dimension of its output holds them.
        positions: For every mode (True = training), multiply-accumulates of one example per element of the weight.
        counted_call: For every mode, the number of the call of the model whose multiply-accumulates count.
        reads_input: Whether it reads the input of the network.
        norm: Name of the first norm that reads its channels.
        dim: Dimension of the weight that counts filters.
        bias: Name of its bias, if it is no `nn.Linear` and no convolution of torch and has one.
        module: Name of the module whose output holds its filters, and can be scattered; None if there is none.
        output_dim: Dimension of that output, counted from the end.
        is_functional: Whether a module uses the weight itself, without a call of `nn.Linear` or a convolution.
    """

    name: str
    weight: str
    num_filters: int
    votes: bool
    is_grouped: bool = False
    outputs: Labels | None = None
    positions: dict[bool, int] = field(default_factory=dict)
    counted_call: dict[bool, int] = field(default_factory=dict)
    reads_input: bool = False
    norm: str | None = None
    dim: int = 0
    bias: str | None = None
    module: str | None = None
    output_dim: int | None = None
    is_functional: bool = False


@dataclass(eq=False)
class Record:
    """What one forward pass in training mode and one in evaluation mode showed.

    Attributes:
        constraints: All labels, and the constraints on them.
        operators: For every mode (True = training), the records of all operators in order.
        layers: Facts about the layers, in the order of their first calls.
        outputs: Label vectors of the model's outputs.
        output_sources: For every mode, where the model's outputs come from.
        module_outputs: Shape and labels of the outputs of all modules, if a layer may read them that nothing runs.
        expanded: Module that carries an expansion already, to the expansion's dimension and width.
        gathering: Layers that gather their input channels already.
        expands_at_norm: Layer to the channel-wise norm that is the only reader of its output: an expansion of the layer
            scatters the norm's output. None if there is no such norm.
        errors: For every mode in which the forward failed, the error.
        has_guesses: Whether a rule had to guess what the size of a dimension follows.
        unneeded: Numbers of modules that count labels, but keep their values.
    """

    constraints: Constraints
    operators: dict[bool, list[OperatorRecord]] = field(default_factory=dict)
    layers: dict[str, LayerFacts] = field(default_factory=dict)
    outputs: list[Labels] = field(default_factory=list)
    output_sources: dict[bool, Sources] = field(default_factory=dict)
    module_outputs: list[tuple[torch.Size, list[Labels | None]]] = field(default_factory=list)
    expanded: dict[str, tuple[int, int]] = field(default_factory=dict)
    gathering: set[str] = field(default_factory=set)
    expands_at_norm: dict[str, str | None] = field(default_factory=dict)
    errors: dict[bool, Exception] = field(default_factory=dict)
    has_guesses: bool = False
    unneeded: Collection[SizeAttribute] = ()
