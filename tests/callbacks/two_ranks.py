"""Trains with one process or two and saves every rank's state; run by test_callbacks_ranks.py.

python two_ranks.py FOLDER DEVICES '{"optimizer": "SGD", "callback": {...}, "trainer": {...}}'
"""

import json
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
from small_nets import SmallModule, images, loader, trainer

from gflow_pl import PruningCallback
from gflow_pl.models import MODELS
from gflow_pl.tasks import ImageClassifier


class Data(pl.LightningDataModule):
    """Global batches of 16, whatever the number of ranks."""

    def __init__(self, devices: int, dtype: torch.dtype, differs: bool, side: int) -> None:
        super().__init__()
        self.devices, self.dtype, self.differs, self.side = devices, dtype, differs, side

    def train_dataloader(self):
        rank = self.trainer.global_rank
        data = images(64, self.dtype, seed=rank if self.differs else 0)
        if self.side != 8:
            data.tensors = (torch.nn.functional.interpolate(data.tensors[0], size=self.side), data.tensors[1])
        return loader(data, 16 // self.devices, rank=rank, world_size=self.devices)


class Recorder(PruningCallback):
    """Keeps the scores of the last round."""

    def select(self, graph, scores):
        self.scores = {name: vector.clone() for name, vector in scores.items()}
        return super().select(graph, scores)


def main() -> None:
    torch.set_num_threads(1)
    folder, devices, options = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    double = options.get("double", False)
    pl.seed_everything(0)
    network = options.get("network")
    if network in MODELS:
        module: pl.LightningModule = ImageClassifier(network, num_classes=4, lr=0.01)
    else:
        module = SmallModule(options.get("optimizer", "SGD"), norm=options.get("norm", False))
    if options.get("seed_differs"):
        import os

        pl.seed_everything(10 + int(os.environ.get("LOCAL_RANK", 0)))
    callback = Recorder(**{"min_kept": 0.1, **options["callback"]})
    strategy = (
        pl.strategies.DDPStrategy(process_group_backend="gloo", **options.get("ddp", {})) if devices > 1 else "auto"
    )
    run = trainer(
        folder,
        callbacks=[callback],
        devices=devices,
        strategy=strategy,
        precision="64-true" if double else "32-true",
        use_distributed_sampler=False,
        enable_checkpointing=False,
        **options.get("trainer", {}),
    )
    dtype = torch.float64 if double else torch.float32
    run.fit(module, Data(devices, dtype, options.get("data_differs", False), 32 if network else 8))
    optimizer = run.optimizers[0]
    momenta = {
        f"{name}/{key}": value
        for name, p in module.named_parameters()
        for key, value in optimizer.state[p].items()
        if isinstance(value, torch.Tensor)
    }
    plans = [{k: v for k, v in row.items() if k != "seconds"} for row in callback.rows]
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    torch.save(
        {"parameters": parameters, "buffers": dict(module.named_buffers()), "momenta": momenta, "plans": plans,
         "kept": {g.name: list(g.kept) for g in callback.graph.groups}, "scores": callback.scores},
        folder / f"rank{run.global_rank}_of_{devices}.pt",
    )  # fmt: skip


if __name__ == "__main__":
    main()
