"""Prune by two custom measures of activations, APoZ and HRank, each written in ten lines.

python examples/activation_measure.py
"""

from pathlib import Path

import pytorch_lightning as pl
import torch
from plain_module import DigitReader

import gflow_pl
from gflow_pl.importance import ActivationImportance


class APoZ(ActivationImportance):
    """Share of a filter's activations that are not zero: ``1 - APoZ``.

    References: Hu et al. 2016, Network trimming.
    """

    name = "apoz"

    def score_activations(self, activations):  # (examples, filters, ...), after the ReLU
        return (activations > 0).float().transpose(0, 1).flatten(1).mean(1)


class HRank(ActivationImportance):
    """Mean rank of a filter's feature maps.

    References: Lin et al. 2020, HRank.
    """

    name = "hrank"

    def score_activations(self, activations):
        maps = activations[(..., *[None] * (4 - activations.ndim))]  # a linear layer has maps of 1 x 1
        return torch.linalg.matrix_rank(maps).float().transpose(0, 1).flatten(1).mean(1)


MEASURES = {measure.name: measure for measure in (APoZ, HRank)}


def main(data=None, folder="checkpoints/activation_measure", max_epochs=4, measure="apoz"):
    """Remove half of the filters in two rounds, those with the fewest active or the least varied feature maps first."""
    pruning = gflow_pl.PruningCallback(MEASURES[measure](), fraction=0.5, rounds=2, num_samples=256)
    trainer = pl.Trainer(max_epochs=max_epochs, callbacks=[pruning], default_root_dir=folder)
    module = DigitReader()
    trainer.fit(module, data or gflow_pl.data.Digits())
    trainer.save_checkpoint(Path(folder) / "pruned.ckpt")
    return module


if __name__ == "__main__":
    main()
