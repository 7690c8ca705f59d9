"""What a command leaves behind: the closing lines of a training run, its figure, the report of `test`, predictions."""

from __future__ import annotations

import copy
import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from gflow_pl.callbacks.lightning.ranks import is_first_process
from gflow_pl.callbacks.lightning.training_loss import batch_inputs
from gflow_pl.channels import trace_channels
from gflow_pl.cli.evaluation import undivided_test_images
from gflow_pl.files import write_text
from gflow_pl.reports import (
    NetworkReport,
    comparison_table,
    count_network,
    read_rows,
    state_bytes,
    table_text,
    training_figure,
    write_report,
)
from gflow_pl.tasks import load_pretrained

if TYPE_CHECKING:
    from gflow_pl.cli.app import GflowCLI

__all__ = [
    "Size",
    "conclude",
    "full_size_copy",
    "num_classes_of",
    "report",
    "short_name",
    "spelled",
    "write_predictions",
]


def num_classes_of(datamodule: Any) -> int:
    """The classes of a data module; 2 for one that does not say (a module of its own then has no use for it)."""
    return getattr(datamodule, "num_classes", 2)


def short_name(network: Any) -> str:
    """A network's name for a folder: "resnet56", or the last part of a class path."""
    path = network.get("class_path", "network") if isinstance(network, dict) else str(network)
    return str(path).rpartition(".")[2]


def spelled(network: Any) -> str:
    """A network as a user would write it."""
    return json.dumps(network) if isinstance(network, dict) else str(network)


def example_input(module: pl.LightningModule, datamodule: Any) -> Any:
    """One input to count with, without reading data; None if nothing says what inputs look like."""
    if module.example_input_array is not None:
        return module.example_input_array
    side = getattr(datamodule, "image_size", None)
    return None if side is None else torch.zeros(1, 3, side, side, device=module.device)


@dataclass(frozen=True)
class Size:
    """What a network costs, and the layers that can be pruned in it."""

    macs: int | None
    parameters: int
    state_bytes: int
    prunable: tuple[str, ...]
    filters: int | None

    @classmethod
    def of(
        cls,
        module: pl.LightningModule,
        datamodule: Any,
        prunable: tuple[str, ...] | None = None,
        example: Tensor | None = None,
    ) -> Size:
        """Counts of a module as it is now, on `example` or on what the module or the data say that inputs look like.

        `prunable` names the layers whose filters are counted; None finds them.
        """
        example = example_input(module, datamodule) if example is None else example
        macs = None
        if example is not None:
            macs = count_network(module, example).macs
            if prunable is None:
                graph = trace_channels(module, example)
                prunable = tuple(dict.fromkeys(part.layer for group in graph.groups for part in group.layers))
        modules = dict(module.named_modules())
        filters = None if prunable is None else sum(_num_filters(modules[name]) for name in prunable)
        parameters = sum(p.numel() for p in module.parameters())
        return cls(macs, parameters, state_bytes(module.state_dict()), prunable or (), filters)

    def row(self, name: str, **accuracies: float | None) -> NetworkReport:
        """A column of the report."""
        return NetworkReport(name, self.macs, self.parameters, self.state_bytes, self.filters, **accuracies)


def _example_of_the_data(module: pl.LightningModule, datamodule: Any) -> Tensor | None:
    """One input from the test data, if the module's `forward` takes it."""
    inputs = batch_inputs(next(iter(datamodule.test_dataloader()), None))
    if not isinstance(inputs, Tensor):
        return None
    example = inputs[:1].to(module.device)
    try:
        count_network(module, example)
    except Exception:  # a foreign forward may raise anything on inputs that are not its own
        return None
    return example


def _num_filters(layer: nn.Module) -> int:
    return int(getattr(layer, "out_channels", 0) or getattr(layer, "out_features", 0))


def full_size_copy(module: pl.LightningModule) -> pl.LightningModule:
    """The module as it is built, before a file gives it another shape."""
    return copy.deepcopy(module)


def conclude(trainer: pl.Trainer, folder: Path) -> None:
    """Print the best accuracy, its epoch and the files of a training run; draw its figure."""
    metrics = folder / "metrics.csv"
    rows = read_rows(metrics) if metrics.is_file() else []
    best = folder / "best.ckpt"
    scored = [row for row in rows if row.get("phase") == "final" and row.get("test_accuracy") is not None]
    if scored:
        top = max(scored, key=lambda row: row["test_accuracy"])
        when = " after the last round" if len(scored) < len(rows) else ""
        print(f"Best test accuracy{when}: {top['test_accuracy']:.2%} in epoch {top['epoch']}.")
        training_figure(rows, folder / "training.png", title=folder.name)
    for label, path in (
        ("best checkpoint", best),
        ("last checkpoint", folder / "last.ckpt"),
        ("unpruned network", folder / "unpruned.ckpt"),
        ("metrics", metrics),
        ("rounds", folder / "pruning.csv"),
        ("figure", folder / "training.png"),
        ("settings", folder / "config.yaml"),
    ):
        if path.is_file():
            print(f"  {label:<17}{path}")


def report(cli: GflowCLI, source: str | None, ckpt_path: str | None, base: str | None, counts_only: bool) -> None:
    """Measure and count a checkpoint beside its unpruned self; print a table, write report.json."""
    module, data, trainer = cli.model, cli.datamodule, cli.trainer
    if ckpt_path is not None:
        load_pretrained(module, ckpt_path)
    measured: dict[str, dict[str, float | None]] = {"unpruned": {}, "pruned": {}}
    full, example = cli.full_size, None
    if not counts_only:
        measured["pruned"] = _accuracies(trainer, module, data)
        if full.macs is None:
            example = _example_of_the_data(cli.base_model, data)
            full = Size.of(cli.base_model, data, example=example)
        if base is not None:
            load_pretrained(cli.base_model, base)
            measured["unpruned"] = _accuracies(trainer, cli.base_model, data)
    now = Size.of(module, data, full.prunable or None, example)
    if not is_first_process():
        return
    columns = [full.row("unpruned", **measured["unpruned"]), now.row("pruned", **measured["pruned"])]
    print(table_text(comparison_table(columns, title=str(source or "the network as it is built"))), end="")
    path = cli.folder / "report.json"  # type: ignore[operator]
    write_report(path, columns, {"checkpoint": source, "base": base})
    print(f"  report           {path}")


def _accuracies(trainer: pl.Trainer, module: pl.LightningModule, data: Any) -> dict[str, float | None]:
    """Accuracy on the test data and, where the data module gives them, on the plain training data."""
    with undivided_test_images(data, trainer):
        test = trainer.test(module, datamodule=data)
    results = {"test_accuracy": _accuracy_in(test)}
    if hasattr(data, "plain_train_dataloader"):
        train = trainer.test(module, dataloaders=data.plain_train_dataloader())
        results["train_accuracy"] = _accuracy_in(train)
    return results


def _accuracy_in(results: Any) -> float | None:
    """What a module logged as its test accuracy, by the usual names."""
    logged = results[0] if results else {}
    return next(
        (float(logged[name]) for name in ("test_accuracy", "test_acc", "accuracy", "acc") if name in logged), None
    )


def write_predictions(path: Path, predictions: Any, datamodule: Any) -> None:
    """Write file or index, class and probability of every image."""
    batches = [batch_inputs(batch) for batch in predictions or [] if batch is not None]
    if not all(isinstance(batch, Tensor) and batch.ndim == 2 for batch in batches):
        raise ValueError("predict: the module's `predict_step` must return class probabilities (examples, classes).")
    probabilities = torch.cat(batches).float()
    top = probabilities.max(dim=1)
    names = datamodule.predict_names() if hasattr(datamodule, "predict_names") else range(len(probabilities))
    classes = getattr(datamodule, "class_names", None) or range(probabilities.shape[1])
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "class", "probability"])
    for name, index, value in zip(names, top.indices.tolist(), top.values.tolist(), strict=False):
        writer.writerow([name, classes[index], f"{value:.6f}"])
    write_text(path, text.getvalue())
    print(f"  predictions      {path}")
