"""Train or rewrite a network in a process group of one rank, over NCCL (on the CPU: gloo), and write result.json.

Run by test_gpu_callback.py:

python one_rank.py FOLDER surgery
python one_rank.py FOLDER train plain|sync_batchnorm
"""

import copy
import json
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
from gpu_device import ACCELERATOR, DEVICE, ON_CUDA, distance
from masked_networks import masked_network, random_plan, randomize_parameters
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from small_nets import SmallModule, images, loader, small_net, trainer
from torch import nn

from gflow_pl import PruningCallback, load_from_checkpoint
from gflow_pl.channels import trace_channels
from gflow_pl.surgery import apply_structure, rewrite

BACKEND = "nccl" if ON_CUDA else "gloo"


def allow_sync_batch_norm_on_the_cpu():
    """Replace the forward of SyncBatchNorm, which raises on the CPU, by that of BatchNorm: over one rank they are
    equal.
    """
    nn.SyncBatchNorm.forward = nn.modules.batchnorm._BatchNorm.forward
    nn.SyncBatchNorm._check_input_dim = lambda self, x: None
    nn.parallel.DistributedDataParallel._passing_sync_batchnorm_handle = lambda *_: None


def num_sync_batch_norms(module):
    return sum(isinstance(m, nn.SyncBatchNorm) for m in module.modules())


def surgery(folder):
    torch.distributed.init_process_group(BACKEND, init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    torch.manual_seed(0)
    start = randomize_parameters(small_net())
    model = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(start)).to(DEVICE).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x, y = (tensor.to(DEVICE) for tensor in images(16).tensors)

    def step():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    step()
    graph = trace_channels(model, x)
    plan = random_plan(graph)
    with torch.no_grad():
        masked = masked_network(model.eval(), graph, plan)(x)
        structure = rewrite(model, graph, plan, optimizers=[optimizer])
        apart = distance(model(x), masked)
    before = [p.clone() for p in model.parameters()]
    model.train()
    step()
    step()
    moved = sum(float((p - q).abs().sum()) for p, q in zip(model.parameters(), before, strict=True))

    # The conversion creates new modules without the hooks and buffers of expansions; the structure restores both.
    converted_late = copy.deepcopy(start)
    apply_structure(converted_late, structure)
    converted_late = nn.SyncBatchNorm.convert_sync_batchnorm(converted_late).to(DEVICE)
    apply_structure(converted_late, structure)
    converted_late.load_state_dict(model.state_dict())
    with torch.no_grad():
        difference = distance(converted_late.eval()(x), model.eval()(x))
    result = {
        "backend": torch.distributed.get_backend(),
        "synchronised": num_sync_batch_norms(model),
        "apart": apart,
        "moved": moved,
        "finite": all(bool(p.isfinite().all()) for p in model.parameters()),
        "after conversion": difference,
    }
    torch.distributed.destroy_process_group()
    return result


class RecordsState(Callback):
    """Records the state that exists during training only."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.synchronised, self.backend = num_sync_batch_norms(module), torch.distributed.get_backend()


def train(folder, sync):
    def fit(seed, ckpt_path=None, more=()):
        pl.seed_everything(seed)
        module, recorder = SmallModule(), RecordsState()
        pruning = PruningCallback("loss", fraction=0.6, rounds=3, num_samples=32, keep_momentum=True)
        lightning = trainer(
            folder, callbacks=[pruning, recorder, *more], accelerator=ACCELERATOR, max_epochs=5, sync_batchnorm=sync,
            strategy=pl.strategies.DDPStrategy(process_group_backend=BACKEND), deterministic="warn", benchmark=False,
        )  # fmt: skip
        lightning.fit(module, loader(images(64)), ckpt_path=ckpt_path, weights_only=True)
        (optimizer,) = lightning.optimizers
        state = {name: value.cpu().clone() for name, value in module.state_dict().items()}
        for name, p in module.named_parameters():
            state[f"{name}/momentum"] = optimizer.state[p]["momentum_buffer"].cpu().clone()
        return module, state, pruning, recorder

    keep = ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1)
    module, whole, pruning, recorder = fit(0, more=[keep])
    _, resumed, _, _ = fit(99, folder / "epoch=1.ckpt")
    differing = [name for name in whole if name not in resumed or not torch.equal(whole[name], resumed[name])]
    again = load_from_checkpoint(SmallModule, folder / "epoch=4.ckpt", map_location="cpu")
    x = images(8).tensors[0]
    with torch.no_grad():
        apart = distance(module.to(DEVICE).eval()(x.to(DEVICE)), again.eval()(x))
    return {
        "backend": recorder.backend,
        "synchronised": recorder.synchronised,
        "rounds": pruning.rounds_done,
        "resumed": differing,
        "loads on the cpu": apart,
    }


if __name__ == "__main__":
    if not ON_CUDA:
        allow_sync_batch_norm_on_the_cpu()
    folder = Path(sys.argv[1])
    result = surgery(folder) if sys.argv[2] == "surgery" else train(folder, sys.argv[3] == "sync_batchnorm")
    (folder / "result.json").write_text(json.dumps(result))
