"""Augmentation under DDP with two processes: different on each rank, and the same in a second run."""

import json
import subprocess
import sys

import pytest
from real_images import write_image_folder

SCRIPT = """
import hashlib, json, sys
import pytorch_lightning as pl
import torch
from torch import nn
from gflow_pl.data import ImageFolder

root, out, seed = sys.argv[1:]
torch.set_num_threads(1)
pl.seed_everything(int(seed), verbose=False)

class Watcher(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.labels, self.digests = [], []

    def training_step(self, batch, batch_index):
        self.labels += batch[1].tolist()
        self.digests += [hashlib.md5(x.numpy().tobytes()).hexdigest() for x in batch[0]]
        return self.layer(batch[0].mean().view(1, 1)).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

data = ImageFolder(root, num_workers=0, batch_size=5)
model = Watcher()
trainer = pl.Trainer(max_epochs=1, accelerator="cpu", devices=2, strategy="ddp", logger=False, limit_val_batches=0,
                     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
trainer.fit(model, datamodule=data)
with open(f"{out}/{seed}-{trainer.global_rank}.json", "w") as file:
    json.dump([model.labels, model.digests], file)
"""


def run(script, root, out, seed):
    command = [sys.executable, str(script), str(root), str(out), str(seed)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return [json.loads((out / f"{seed}-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture
def twenty_equal_images(tmp_path):
    """One class with equal training images, so that ranks differ only in the augmentation."""
    root = write_image_folder(tmp_path / "images", num_classes=1, per_class=1)
    (picture,) = (root / "train").glob("*/*.png")
    for i in range(1, 20):
        (picture.parent / f"{i:02d}.png").write_bytes(picture.read_bytes())
    return root


def test_ranks_shift_their_images_differently_but_repeatably(tmp_path, twenty_equal_images):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    first = run(script, twenty_equal_images, tmp_path, 0)
    again = run(script, twenty_equal_images, tmp_path, 0)
    assert first == again
    # Each rank has half of the images. With the same augmentation the two lists would be equal.
    (_, here), (_, there) = first
    assert len(here) == len(there) == 10
    assert sum(a == b for a, b in zip(here, there, strict=True)) <= 2
