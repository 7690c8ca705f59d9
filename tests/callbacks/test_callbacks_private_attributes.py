"""Private attributes of Lightning are used in callbacks/lightning/ and cli/ only, and each of them in one function."""

import ast
from collections import defaultdict
from pathlib import Path

import pytest
import pytorch_lightning as pl
from pytorch_lightning.utilities import CombinedLoader
from torch import nn

import gflow_pl

PACKAGE = Path(gflow_pl.__file__).parent


def private_names() -> set[str]:
    """Return the private names of Lightning's classes and instances, without those that they have from PyTorch."""
    run = pl.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)
    instances = [
        run,
        run.strategy,
        run.fit_loop,
        run.fit_loop.epoch_loop,
        run.strategy.checkpoint_io,
        run.precision_plugin,
        pl.LightningModule(),
        pl.LightningDataModule(),
        pl.strategies.DDPStrategy(),
        pl.callbacks.ModelCheckpoint(),
        pl.callbacks.EarlyStopping("loss"),
        pl.callbacks.WeightAveraging(),
        CombinedLoader([]),
    ]
    names = {name for instance in instances for name in (*dir(type(instance)), *vars(instance))}
    return {name for name in names if name.startswith("_") and not name.endswith("__")} - set(dir(nn.Module()))


def uses(tree: ast.Module, names: set[str]) -> dict[str, set[str]]:
    """Return the private names used in a file, as attributes or as strings, each with the functions that use it.

    Names that the file itself defines, as a function, a class or an attribute of `self`, are its own.
    """
    own = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            own.add(node.attr)
    found = defaultdict(set)

    def visit(node: ast.AST, function: str) -> None:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            function = f"{function}.{node.name}"
        if isinstance(node, ast.Attribute) and node.attr in names - own:
            found[node.attr].add(function)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in names - own:
            found[node.value].add(function)
        for child in ast.iter_child_nodes(node):
            visit(child, function)

    visit(tree, "")
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


def test_private_attributes_of_lightning_are_used_in_one_place() -> None:
    names = private_names()
    places = defaultdict(set)
    for path in FILES:
        file = str(path.relative_to(PACKAGE))
        for name, functions in uses(ast.parse(path.read_text()), names).items():
            places[name] |= {file + function for function in functions}
    outside = {
        name: where
        for name, where in places.items()
        if not all(p.startswith(("callbacks/lightning/", "cli/")) for p in where)
    }
    assert not outside
    assert not {name: where for name, where in places.items() if len(where) > 1}
    assert {"_layer_sync", "_mode", "_start_method", "_average_model", "_setup_model"} <= set(places)


@pytest.mark.parametrize(
    "code",
    [
        "trainer.strategy._layer_sync",
        "getattr(x, '_layer_sync')",
        "class M:\n    def f(self):\n        self._trainer.fit()",
    ],
)
def test_a_use_is_found(code) -> None:
    assert uses(ast.parse(code), {"_layer_sync", "_trainer"})


def test_a_file_may_have_attributes_of_the_same_name() -> None:
    assert not uses(
        ast.parse("class A:\n    def f(self):\n        self._mode = 1\n        print(self._mode)"), {"_mode"}
    )
