"""Somebody else's script: a plain LightningCLI. `pruning.yaml` makes it prune.

python train.py fit --config pruning.yaml
"""

from pytorch_lightning.cli import LightningCLI
from their_pkg import Data, Module

if __name__ == "__main__":
    LightningCLI(Module, Data)
