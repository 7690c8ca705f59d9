"""Classes of expanded layers, which tools that fold or quantize layers of exactly torch's classes leave alone.

Such a tool builds a new layer and loses the hooks of the old one. It finds layers by their exact class, so an expanded
layer gets a subclass that differs in nothing but its identity. `torch.fx` still takes it for one operation.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from gflow_pl.values.expansion_names import EXPANSION, GATHER, PLAIN_CLASS

__all__ = ["update_class"]


def update_class(module: nn.Module) -> None:
    """Give a layer of torch that has an expansion or a gather the class of expanded layers, others their own class."""
    kind = type(module)
    is_placed = EXPANSION.positions in module._buffers or GATHER.positions in module._buffers
    if not is_placed and PLAIN_CLASS in vars(kind):
        module.__class__ = vars(kind)[PLAIN_CLASS]
    elif is_placed and kind.__module__.startswith("torch.nn.modules") and PLAIN_CLASS not in vars(kind):
        module.__class__ = _expanded_class(kind)


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _expanded_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class of expanded layers of a class."""
    if kind in _CLASSES:
        return _CLASSES[kind]

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        """Describe the module for copies and pickles: its class is made anew from the class of torch."""
        return (_new_expanded, (kind,), *object.__reduce_ex__(self, protocol)[2:])

    # `torch.fx` treats modules as single operations by the name of the file of their class.
    content = {"__module__": kind.__module__, "__doc__": kind.__doc__, "__reduce_ex__": reduce, PLAIN_CLASS: kind}
    _CLASSES[kind] = type(f"Expanded{kind.__name__}", (kind,), content)
    return _CLASSES[kind]


def _new_expanded(kind: type[nn.Module]) -> nn.Module:
    """Return an expanded layer without contents; called by pickles by this name."""
    made = _expanded_class(kind)
    return made.__new__(made)
