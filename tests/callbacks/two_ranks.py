"""Train with one process or two, and save the state of every rank; run by test_callbacks_ranks.py.

python two_ranks.py FOLDER DEVICES '{"optimizer": "SGD", "callback": {...}, "trainer": {...}}'
"""

import json
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from small_nets import SmallModule, images, loader, trainer
from torch.distributed.nn.functional import all_reduce

from gflow_pl import PruningCallback
from gflow_pl.models import MODELS
from gflow_pl.tasks import ImageClassifier


class Data(pl.LightningDataModule):
    """Global batches of 16, for any number of ranks."""

    def __init__(self, devices: int, dtype: torch.dtype, differs: bool, side: int) -> None:
        super().__init__()
        self.devices, self.dtype, self.differs, self.side = devices, dtype, differs, side

    def train_dataloader(self):
        rank = self.trainer.global_rank
        data = images(64, self.dtype, seed=rank if self.differs else 0)
        if self.side != 8:
            data.tensors = (torch.nn.functional.interpolate(data.tensors[0], size=self.side), data.tensors[1])
        return loader(data, 16 // self.devices, rank=rank, world_size=self.devices)


class WithValidation(Data):
    """Validation data with fewer images than ranks."""

    def val_dataloader(self):
        return torch.utils.data.DataLoader(images(1, self.dtype), batch_size=4)


class Recorder(PruningCallback):
    """A callback that stores the scores of the last round and the buffers at that time."""

    def setup(self, trainer, pl_module, stage):
        super().setup(trainer, pl_module, stage)
        self.module = pl_module

    def select(self, graph, scores):
        self.scores = {name: vector.clone() for name, vector in scores.items()}
        self.sync_batch_norms = sum(isinstance(m, torch.nn.SyncBatchNorm) for m in self.module.modules())
        self.scored_with = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
        return super().select(graph, scores)


def sync_batch_norm_on_the_cpu(self, x):
    """Normalize by the statistics of the global batch, like SyncBatchNorm, which torch refuses to do on the CPU."""
    if not self.training:
        return torch.nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )
    number = x.numel() // x.shape[1] * dist.get_world_size()
    sums = all_reduce(torch.stack([x.sum((0, 2, 3)), x.square().sum((0, 2, 3))]))
    mean, variance = sums[0] / number, sums[1] / number - (sums[0] / number).square()
    with torch.no_grad():
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * number / (number - 1), self.momentum)
    scaled = (x - mean[:, None, None]) * (self.weight / (variance + self.eps).sqrt())[:, None, None]
    return scaled + self.bias[:, None, None]


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
    if double:
        module = module.double()  # Lightning would load a checkpoint into float32 first
    if options.get("seed_differs"):
        import os

        pl.seed_everything(10 + int(os.environ.get("LOCAL_RANK", 0)))
    torch.nn.SyncBatchNorm.forward = sync_batch_norm_on_the_cpu
    torch.nn.parallel.DistributedDataParallel._passing_sync_batchnorm_handle = lambda *_: None  # which asks for a GPU
    callback = Recorder(**{"min_kept": 0.1, **options["callback"]})
    strategy = (
        pl.strategies.DDPStrategy(process_group_backend="gloo", **options.get("ddp", {})) if devices > 1 else "auto"
    )
    run = trainer(
        folder,
        callbacks=[callback, pl.callbacks.ModelCheckpoint(folder, "{epoch}", save_top_k=-1)],
        devices=devices,
        strategy=strategy,
        precision="64-true" if double else "32-true",
        use_distributed_sampler=False,
        **options.get("trainer", {}),
    )
    dtype = torch.float64 if double else torch.float32
    data = (WithValidation if options.get("validates") else Data)(
        devices, dtype, options.get("data_differs", False), 32 if network else 8
    )
    run.fit(module, data, ckpt_path=options.get("ckpt_path"), weights_only=True)
    norms = callback.sync_batch_norms
    side = 32 if network else 8
    module.eval()(torch.zeros(2, 3, side, side, dtype=dtype))  # it can still run after the strategy has ended
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
         "kept": {g.name: list(g.kept) for g in callback.graph.groups}, "scores": callback.scores,
         "scored_with": callback.scored_with, "norms": norms},
        folder / f"rank{run.global_rank}_of_{devices}.pt",
    )  # fmt: skip


if __name__ == "__main__":
    main()
