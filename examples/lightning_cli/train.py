"""A plain LightningCLI script of another author. The settings in `pruning.yaml` add pruning.

python train.py fit --config pruning.yaml
"""

from pytorch_lightning.cli import LightningCLI
from their_pkg import Data, Module

if __name__ == "__main__":
    LightningCLI(Module, Data)
