"""What the code of a module does with an attribute: it only calls it, or it hands its weights on."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator

from gflow_pl.callbacks.lightning.packages import both_packages
from gflow_pl.common.lightning_package import pl

__all__ = ["hands_weights_on"]

_MAKES = frozenset(["__init__", "configure_model", "setup", "prepare_data", "configure_optimizers"])
"""Methods that make a network or its optimizers, and update no copy."""
_STEPS = frozenset(["forward", "training_step", "validation_step", "test_step", "predict_step"])
"""Methods in which a network may be an argument of a loss."""
_HARMLESS = frozenset(["eval", "train", "requires_grad_", "to", "cuda", "cpu", "half", "float", "double", "freeze"])
"""Methods of a network that do not hand its weights on."""

_UPDATE_WORDS = ("update", "step", "sync", "copy", "load", "average", "momentum")
"""Words in the names of methods that change weights."""


def hands_weights_on(module: pl.LightningModule, attribute: str) -> bool:
    """Return whether a method of a module's class does more with an attribute than to call it or to set its mode.

    ``self.teacher(x)``, ``self.teacher.features(x)`` and ``self.teacher.eval()`` call it;
    ``self.teacher.load_state_dict(...)``, ``zip(self.teacher.parameters(), ...)`` and, outside of the steps,
    ``update(self.teacher, self.net)`` hand its weights on. Nothing is run.

    Args:
        module: The module. Code that has no source text counts as code that only calls.
        attribute: Name of the attribute.
    """
    for method in _methods(type(module)):
        if method.name in _MAKES:
            continue
        calls = {id(node.func) for node in ast.walk(method) if isinstance(node, ast.Call)}
        parents = {id(child): node for node in ast.walk(method) for child in ast.iter_child_nodes(node)}
        for node in ast.walk(method):
            is_mention = isinstance(node, ast.Attribute) and node.attr == attribute and _is_self(node.value)
            if is_mention and _hands_on(node, parents, calls, in_step=method.name in _STEPS):
                return True
    return False


def _methods(cls: type) -> Iterator[ast.FunctionDef]:
    """Yield the methods of a class and of its bases, up to Lightning's own, without those that are overridden."""
    seen: set[str] = set()
    for base in cls.__mro__:
        if base in both_packages(pl.LightningModule) or base.__module__.partition(".")[0] in ("torch", "builtins"):
            continue
        if base.__module__.partition(".")[0] in ("pytorch_lightning", "lightning", "lightning_fabric"):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):  # made in an interactive session
            continue
        methods = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        yield from (method for method in methods if method.name not in seen)
        seen |= {method.name for method in methods}


def _is_self(node: ast.AST) -> bool:
    """Return whether an expression is the first argument of a method, or the module that a callback gets."""
    return isinstance(node, ast.Name) and node.id in ("self", "s", "this", "pl_module", "module", "model")


def _hands_on(node: ast.AST, parents: dict[int, ast.AST], calls: set[int], *, in_step: bool) -> bool:
    """Return whether the use of an attribute at one place hands its weights on.

    Args:
        node: The expression ``self.attribute``.
        parents: id of every node to the node around it.
        calls: ids of the expressions that are called.
        in_step: Whether the place is in one of the steps.
    """
    last = ""
    while isinstance(parent := parents.get(id(node)), ast.Attribute) and id(node) not in calls:
        node, last = parent, parent.attr
    if id(node) in calls:  # self.teacher(x), self.teacher.features(x), self.teacher.parameters()
        return bool(last) and last not in _HARMLESS and not _is_forward(last)
    if isinstance(parent, ast.Subscript):  # self.heads[0](x)
        return _hands_on(parent, parents, calls, in_step=in_step)
    return not in_step


def _is_forward(method: str) -> bool:
    """Return whether a method with this name computes outputs; most of those of `nn.Module` give access to weights."""
    if method == "forward":
        return True
    return not hasattr(pl.LightningModule, method) and not any(word in method for word in _UPDATE_WORDS)
