"""What modules hold beside their parameters and buffers: tensors, containers, objects and hidden modules."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

__all__ = ["HeldObjects", "held_objects"]

_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))
_MAX_ITEMS = 4096
"""Longer containers (a replay memory, an index of a data set) are not visited."""
_MAX_DEPTH = 4
_FOREIGN = frozenset(
    ["torch", "torchmetrics", "pytorch_lightning", "lightning", "lightning_fabric", "numpy", "builtins"]
)
"""Packages whose objects are not visited: they hold no copies of a network of the user's."""


@dataclass(eq=False)
class HeldObjects:
    """What was found in the attributes of a module and its submodules.

    Attributes:
        tensors: Tensors that are neither parameters nor buffers of the module, each once.
        containers: Dicts, lists and deques; a path of attribute names to each.
        objects: Plain objects (an averager of the user's own); a path to each.
        modules: Modules that are not registered as submodules, because a list or a plain object holds them; a path to
            each.
    """

    tensors: list[Tensor]
    containers: dict[str, Any]
    objects: dict[str, object]
    modules: dict[str, nn.Module]


def held_objects(model: nn.Module, exclude: Collection[str] = ()) -> HeldObjects:
    """Find what a module and its submodules hold in plain attributes, in containers and in objects among them.

    Data sets, loaders, objects of libraries and long containers are not visited.

    Args:
        model: The module.
        exclude: Names of attributes of all modules that are not visited.
    """
    return _Visit(model, frozenset(exclude) | _MODULE_ATTRIBUTES).found


class _Visit:
    def __init__(self, model: nn.Module, exclude: frozenset[str]) -> None:
        self.found = HeldObjects([], {}, {}, {})
        registered = dict(model.named_modules())
        tensors = [*model.parameters(), *model.buffers()]
        self._seen = {id(value) for value in (*registered.values(), *tensors)}
        for name, module in registered.items():
            for attribute, value in vars(module).items():
                if attribute not in exclude:
                    self._visit(f"{name}.{attribute}" if name else attribute, value, 0)

    def _visit(self, path: str, value: object, depth: int) -> None:
        if value is None or isinstance(value, (bool, int, float, str)) or id(value) in self._seen:
            return
        if isinstance(value, Tensor):
            self._seen.add(id(value))
            self.found.tensors.append(value)
        elif isinstance(value, nn.Module):
            self._seen |= {id(part) for part in (*value.modules(), *value.parameters(), *value.buffers())}
            self.found.modules[path] = value
        elif depth < _MAX_DEPTH:
            self._visit_parts(path, value, depth)

    def _visit_parts(self, path: str, value: object, depth: int) -> None:
        if isinstance(value, (dict, list, tuple, deque)):
            if len(value) > _MAX_ITEMS:
                return
            self._seen.add(id(value))
            if not isinstance(value, tuple):
                self.found.containers[path] = value
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, item in list(items):
                self._visit(f"{path}.{key}", item, depth + 1)
        elif _is_plain_object(value):
            self._seen.add(id(value))
            self.found.objects[path] = value
            for name, item in list(vars(value).items()):
                self._visit(f"{path}.{name}", item, depth + 1)


def _is_plain_object(value: object) -> bool:
    """Return whether a value is an instance of a class outside of the libraries that hold no networks."""
    if isinstance(value, (type, ModuleType, Dataset, DataLoader)) or callable(value) or not hasattr(value, "__dict__"):
        return False
    return type(value).__module__.partition(".")[0] not in _FOREIGN
