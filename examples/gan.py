"""Prune a GAN with two optimizers and manual optimization. `loss_fn` is the loss on which the generator is scored.

`example_input_array` is an input of `forward`. Only layers that `forward` calls, here the generator, are pruned.

python examples/gan.py
"""

from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn

import gflow_pl


class GAN(pl.LightningModule):
    """A generator of 32x32 images and a critic."""

    def __init__(self, code: int = 16, width: int = 8):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.example_input_array = torch.zeros(2, code)
        self.generator = nn.Sequential(
            nn.Linear(code, 4 * width * 16),
            nn.Unflatten(1, (4 * width, 4, 4)),
            nn.ConvTranspose2d(4 * width, 2 * width, 4, stride=2, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.ConvTranspose2d(width, 3, 4, stride=2, padding=1),
            nn.Tanh(),
        )
        self.critic = nn.Sequential(
            nn.Conv2d(3, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(2 * width * 64, 1),
        )

    def forward(self, codes):
        return self.generator(codes)

    def codes_like(self, images):
        return torch.randn(len(images), self.hparams.code, device=images.device, dtype=images.dtype)

    def generator_loss(self, images):
        """Return the loss of the generator: small if the critic takes generated images for real ones."""
        return F.softplus(-self.critic(self(self.codes_like(images)))).mean()

    def training_step(self, batch, batch_idx):
        images = batch[0]
        generator_optimizer, critic_optimizer = self.optimizers()

        self.toggle_optimizer(critic_optimizer)
        generated = self(self.codes_like(images)).detach()
        loss = F.softplus(-self.critic(images)).mean() + F.softplus(self.critic(generated)).mean()
        critic_optimizer.zero_grad()
        self.manual_backward(loss)
        critic_optimizer.step()
        self.untoggle_optimizer(critic_optimizer)

        self.toggle_optimizer(generator_optimizer)
        generator_optimizer.zero_grad()
        self.manual_backward(self.generator_loss(images))
        generator_optimizer.step()
        self.untoggle_optimizer(generator_optimizer)

    def configure_optimizers(self):
        generator_optimizer = torch.optim.Adam(self.generator.parameters(), lr=2e-4, betas=(0.5, 0.999))
        critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=2e-4, betas=(0.5, 0.999))
        return generator_optimizer, critic_optimizer


def generator_loss(module, batch):
    """Return the scalar loss of a batch, on which filters are scored."""
    return module.generator_loss(batch[0])


def main(data=None, folder="checkpoints/gan", max_epochs=4):
    """Remove half of the generator's filters in two rounds. Both optimizers keep their state."""
    pruning = gflow_pl.PruningCallback(
        "loss", fraction=0.5, rounds=2, num_samples=256, keep_momentum=True, loss_fn=generator_loss
    )
    trainer = pl.Trainer(max_epochs=max_epochs, callbacks=[pruning], default_root_dir=folder)
    module = GAN()
    trainer.fit(module, data or gflow_pl.data.Digits())
    trainer.save_checkpoint(Path(folder) / "pruned.ckpt")
    return module


if __name__ == "__main__":
    main()
