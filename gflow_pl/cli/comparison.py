"""Compare a network with its unpruned self: the table, report.json and layers.png of ``gflow test``."""

from __future__ import annotations

import copy
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import Tensor

from gflow_pl.callbacks.lightning.ranks import is_first_process
from gflow_pl.callbacks.lightning.training_loss import batch_inputs
from gflow_pl.channels import trace_channels
from gflow_pl.cli.accuracy import measure_accuracies
from gflow_pl.reports import (
    Size,
    comparison_table,
    count_network,
    layers_figure,
    table_text,
    write_report,
)
from gflow_pl.tasks import load_pretrained

__all__ = ["UnprunedNetwork", "report"]


class UnprunedNetwork:
    """A copy of a module as it was built, before a file gives the module another shape.

    Args:
        module: The module, at full size.
        datamodule: Its data; no images are read.

    Attributes:
        module: The copy.
        size: Its size. Without a known example input, multiply-accumulates and filters are None.
    """

    def __init__(self, module: pl.LightningModule, datamodule: pl.LightningDataModule) -> None:
        self.size = _full_size(module, _known_example(module, datamodule))
        self.module = copy.deepcopy(module)

    def measure(self, example: Tensor | None) -> None:
        """Measure the size again, with an example input from the data."""
        self.size = _full_size(self.module, example)


def report(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    datamodule: pl.LightningDataModule,
    unpruned: UnprunedNetwork,
    folder: Path,
    *,
    source: str | None = None,
    ckpt_path: str | None = None,
    base: str | None = None,
    counts_only: bool = False,
) -> None:
    """Compare the size and accuracy of a module with its unpruned self.

    Print a table, and write report.json and layers.png.

    Args:
        trainer: Runs the tests.
        module: The module to report on.
        datamodule: The data.
        unpruned: The module as it was built.
        folder: Folder of the run.
        source: File that the weights of the module come from; title of the report.
        ckpt_path: Checkpoint to load into the module first.
        base: File with weights of the unpruned network, whose accuracy is then measured as well.
        counts_only: Whether to omit the accuracies, so that no data is read.
    """
    if ckpt_path is not None:
        load_pretrained(module, ckpt_path)

    # Measure the accuracies, and take an example input from the data if none is known.
    accuracies: dict[str, dict[str, float | None]] = {"unpruned": {}, "pruned": {}}
    example: object | None = None
    if not counts_only:
        accuracies["pruned"] = measure_accuracies(trainer, module, datamodule)
        if unpruned.size.macs is None:
            example = _example_from_data(unpruned.module, datamodule)
            unpruned.measure(example)
        if base is not None:
            load_pretrained(unpruned.module, base)
            accuracies["unpruned"] = measure_accuracies(trainer, unpruned.module, datamodule)

    # Compare the sizes.
    if example is None:
        example = _known_example(module, datamodule)
    pruned = Size.of(module, example, unpruned.size.filters_by_layer)
    if not is_first_process():
        return
    columns = [
        unpruned.size.report("unpruned", **accuracies["unpruned"]),
        pruned.report("pruned", **accuracies["pruned"]),
    ]
    title = source or "the network as it is built"
    print(table_text(comparison_table(columns, title=title)), end="")
    write_report(folder / "report.json", columns, {"checkpoint": source, "base": base})
    print(f"  report           {folder / 'report.json'}")
    if unpruned.size.filters_by_layer and pruned.filters_by_layer:
        layers_figure(unpruned.size.filters_by_layer, pruned.filters_by_layer, folder / "layers.png", title=folder.name)
        print(f"  figure           {folder / 'layers.png'}")


def _full_size(module: pl.LightningModule, example: object | None) -> Size:
    """Measure the size of an unpruned module.

    Args:
        module: The module, before any pruning.
        example: Example input, traced to find the layers that can be pruned. With None, multiply-accumulates and
            filters are not measured.
    """
    if example is None:
        return Size.of(module, None, None)
    graph = trace_channels(module, example)
    return Size.of(module, example, dict.fromkeys(part.layer for group in graph.groups for part in group.layers))


def _known_example(module: pl.LightningModule, datamodule: pl.LightningDataModule) -> object | None:
    """Return an example input without reading data; None if neither the module nor the data describe their inputs."""
    if module.example_input_array is not None:
        return module.example_input_array
    side = getattr(datamodule, "image_size", None)
    return None if side is None else torch.zeros(1, 3, side, side, device=module.device)


def _example_from_data(module: pl.LightningModule, datamodule: pl.LightningDataModule) -> Tensor | None:
    """Return the first input of the test data, or None if the module does not accept it."""
    inputs = batch_inputs(next(iter(datamodule.test_dataloader()), None))
    if not isinstance(inputs, Tensor):
        return None
    example = inputs[:1].to(module.device)
    try:
        count_network(module, example)
    except Exception:  # the forward pass of a module may raise anything for inputs that are not its own
        return None
    return example
