"""The closing lines of a training run, and its figure."""

from __future__ import annotations

from pathlib import Path

from gflow_pl.reports import read_rows, training_figure

__all__ = ["summarize_training"]


def summarize_training(folder: Path) -> None:
    """Print the best test accuracy and the files of a training run, and draw the accuracies to training.png.

    Args:
        folder: Folder of the run.
    """
    # Report the best epoch among those with the final shape of the network.
    metrics = folder / "metrics.csv"
    rows = read_rows(metrics) if metrics.is_file() else []
    final = [row for row in rows if row.get("phase") == "final" and row.get("test_accuracy") is not None]
    if final:
        best = max(final, key=lambda row: row["test_accuracy"])
        when = " after the last round" if len(final) < len(rows) else ""
        print(f"Best test accuracy{when}: {best['test_accuracy']:.2%} in epoch {best['epoch']}.")
        training_figure(rows, folder / "training.png", title=folder.name)

    # List the files that the run has written.
    for label, name in (
        ("best checkpoint", "best.ckpt"),
        ("last checkpoint", "last.ckpt"),
        ("unpruned network", "unpruned.ckpt"),
        ("metrics", "metrics.csv"),
        ("rounds", "pruning.csv"),
        ("figure", "training.png"),
        ("settings", "config.yaml"),
    ):
        if (folder / name).is_file():
            print(f"  {label:<17}{folder / name}")
