"""Train with a GradientFlowMonitor in two gloo processes, and save the rows of each rank; run by
test_callbacks_monitor_ranks.py.

python monitor_ranks.py FOLDER
"""

import os
import sys
from pathlib import Path

import torch
from small_nets import SmallModule, images, loader, trainer

from gflow_pl import GradientFlowMonitor


def rows(folder: Path, rank: int, devices: int) -> list[dict]:
    """Return the rows of a run on global batches of 16."""
    torch.manual_seed(0)
    monitor = GradientFlowMonitor(hessian=True)
    run = trainer(
        folder,
        callbacks=[monitor],
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        precision="64-true",
        max_epochs=2,
        use_distributed_sampler=False,
        enable_checkpointing=False,
    )
    data = loader(images(32, torch.float64), 16 // devices, rank=rank, world_size=devices)
    run.fit(SmallModule(norm=False), data)
    return monitor.rows


def main() -> None:
    torch.set_num_threads(1)
    folder, rank = Path(sys.argv[1]), int(os.environ.get("LOCAL_RANK", 0))
    torch.save(rows(folder, rank, 2), folder / f"rank{rank}.pt")


if __name__ == "__main__":
    main()
