"""Train networks with copies on two ranks; run by test_callbacks_copies_ranks.py.

python copied_ranks.py FOLDER
"""

import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
from small_nets import images, trainer
from test_callbacks_copies import Hidden, MeanTeacher, Target
from torch.utils.data import DataLoader

from gflow_pl import PruningCallback


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for cls in (MeanTeacher, Target, Hidden):
        pl.seed_everything(0)
        module = cls()
        callback = PruningCallback("loss", fraction=0.5, rounds=2, num_samples=32)
        strategy = pl.strategies.DDPStrategy(process_group_backend="gloo", find_unused_parameters=True)
        run = trainer(folder, callbacks=[callback], devices=2, strategy=strategy)
        run.fit(module, DataLoader(images(64), batch_size=16))
        tensors = {"net": dict(module.net.named_parameters()), "teacher": dict(module.teacher.named_parameters())}
        torch.save(tensors, folder / f"{cls.__name__}{run.global_rank}.pt")


if __name__ == "__main__":
    main()
