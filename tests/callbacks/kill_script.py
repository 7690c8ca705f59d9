"""Trains and prunes on real images, to be killed; run by test_callbacks_kill.py.

A server, so that many runs need one import: every line on its input is a run (see `Run`), for which it forks a process
a rank. It answers with lines of JSON: {"pids": [...]}, {"ready": true} when training begins, {"ended": [statuses]}.
When one rank was killed it kills the others, as a cluster's scheduler would.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parent.parent))
from real_images import real_images
from small_nets import SmallModule, trainer

from gflow_pl.callbacks import BestCheckpoint, LastCheckpoint, PruningCallback, RunRecorder
from gflow_pl.callbacks.lightning.carries_structure import AtomicCheckpointIO

STAGES = ("tracing", "training", "round", "saving", "validation", "rows")


class Where:
    """Write the current stage of the process to a file, and kill the process at a given Python call of a stage.

    Counted calls are the same moments on a busy machine and on an idle one.
    """

    def __init__(self, file: Path, kill_at: list[Any] | None, count: bool) -> None:
        self.stage, self.calls, self.kill_at = "training", dict.fromkeys(STAGES, 0), kill_at
        self._file = os.open(file, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        self.enter("training")
        if count or kill_at:
            sys.setprofile(self._on_call)

    def enter(self, stage: str) -> str:
        before, self.stage = self.stage, stage
        os.pwrite(self._file, f"{stage:<12}".encode(), 0)
        return before

    def _on_call(self, frame: Any, event: str, argument: Any) -> None:
        if event in ("call", "c_call"):
            self.calls[self.stage] += 1
            if self.kill_at is not None and [self.stage, self.calls[self.stage]] == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)


class Pruning(PruningCallback):
    where: Where

    def on_train_epoch_start(self, trainer, pl_module):
        cuts = "round" if self.should_prune(trainer.current_epoch) else "training"
        before = self.where.enter("tracing" if self.graph is None else cuts)
        super().on_train_epoch_start(trainer, pl_module)
        self.where.enter(before)


class Recorder(RunRecorder):
    where: Where

    def on_train_epoch_end(self, trainer, pl_module):
        before = self.where.enter("rows")
        super().on_train_epoch_end(trainer, pl_module)
        self.where.enter(before)


class Saving(AtomicCheckpointIO):
    def __init__(self, where: Where) -> None:
        self.where = where

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        before = self.where.enter("saving")
        super().save_checkpoint(checkpoint, path, storage_options)
        self.where.enter(before)


class Stages(pl.Callback):
    def __init__(self, where: Where) -> None:
        self.where = where

    def on_validation_start(self, trainer, pl_module):
        self.where.enter("validation")

    def on_validation_end(self, trainer, pl_module):
        self.where.enter("training")


class Module(SmallModule):
    """Ten classes, dropout, and an augmentation that draws from all three random number generators."""

    def __init__(self) -> None:
        super().__init__(dropout=0.3, lr=0.02)
        self.net[9] = nn.Linear(12, 10)

    def training_step(self, batch, batch_idx):
        images = batch[0].roll(random.randrange(-2, 3), dims=-1) + 0.02 * np.random.standard_normal()
        loss = F.cross_entropy(self((images + 0.02 * torch.randn_like(images)).float()), batch[1])
        self.log("train_loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch, batch_idx):
        logits = self(batch[0])
        self.log("val_loss", F.cross_entropy(logits, batch[1]), sync_dist=True)
        self.log("val_accuracy", (logits.argmax(dim=1) == batch[1]).float().mean(), sync_dist=True)


def loader(split: str, **options: Any) -> DataLoader:
    images, labels = real_images(split)
    scaled = torch.from_numpy(images).permute(0, 3, 1, 2)[..., ::2, ::2].float() / 127.5 - 1
    return DataLoader(TensorDataset(scaled, torch.from_numpy(labels)), batch_size=5, **options)


def train(folder: str, seed: int, ckpt: str | None, ranks: int, count: bool, kill_at: list[Any] | None, answer) -> None:
    """Train for seven epochs with five rounds, and save the state at the end.

    Args:
        folder: Of the run; a resumed run writes into that of its parent.
        seed: Of everything drawn before the checkpoint's random states are in place.
        ckpt: Checkpoint to resume from.
        ranks: Processes of the run.
        count: Whether to count the calls in each stage.
        kill_at: A stage and the number of the call in it at which the process ends by SIGKILL.
        answer: Sends a value to the test.
    """
    pl.seed_everything(seed)
    rank = int(os.environ.get("LOCAL_RANK", 0))
    module = Module()
    options: dict[str, Any] = {"fraction": 0.6, "rounds": 5, "num_samples": 20, "keep_momentum": True, "prune_lr": 0.01}
    pruning = Pruning("loss", bias="distance_from_init", unpruned_path=f"{folder}/unpruned.ckpt", **options)
    recorder = Recorder(folder)
    strategy = pl.strategies.DDPStrategy(process_group_backend="gloo") if ranks > 1 else "auto"
    where = Where(Path(folder) / f"stage{rank}", kill_at if rank == ranks - 1 else None, count)
    pruning.where = recorder.where = where
    run = trainer(
        folder,
        max_epochs=7,
        callbacks=[pruning, recorder, Stages(where), BestCheckpoint(folder), LastCheckpoint(folder)],
        plugins=[Saving(where)],
        devices=ranks,
        strategy=strategy,
    )
    if rank == 0:
        answer({"ready": True})
    run.fit(module, loader("train", shuffle=True), loader("test"), ckpt_path=ckpt, weights_only=True)
    sys.setprofile(None)
    momenta = {name: run.optimizers[0].state[p]["momentum_buffer"] for name, p in module.named_parameters()}
    result = {
        "weights": module.state_dict(),
        "momenta": momenta,
        "pruning": [{name: value for name, value in row.items() if name != "seconds"} for row in pruning.rows],
        "metrics": recorder.rows,
        "learning_rates": [group["lr"] for group in run.optimizers[0].param_groups],
        "calls": where.calls,
        "global_step": run.global_step,
    }
    torch.save(result, Path(folder) / f"result{rank}.pt")


def _child(job: dict[str, Any], rank: int, answer) -> None:
    ranks = job["ranks"]
    if ranks > 1:
        # With LOCAL_RANK set, Lightning takes it that the other processes are started by somebody else.
        os.environ.update(
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(job["port"]), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank)
        )
    log = os.open(Path(job["folder"]) / f"log{rank}.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    status = 1
    try:
        names = ("folder", "seed", "ckpt", "ranks", "count", "kill_at")
        train(*(job[name] for name in names), answer)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    output = os.dup(1)

    def answer(value: Any) -> None:
        os.write(output, (json.dumps(value) + "\n").encode())

    for line in sys.stdin:
        job = json.loads(line)
        pids = []
        for rank in range(job["ranks"]):
            pid = os.fork()
            if pid == 0:
                _child(job, rank, answer)
            pids.append(pid)
        answer({"pids": pids})
        statuses: dict[int, int] = {}
        while len(statuses) < len(pids):
            pid, status = os.wait()
            statuses[pid] = os.waitstatus_to_exitcode(status)
            if status and len(pids) > 1:
                time.sleep(0.05)
                for other in set(pids) - set(statuses):
                    os.kill(other, signal.SIGKILL)
        answer({"ended": [statuses[pid] for pid in pids]})


if __name__ == "__main__":
    main()
