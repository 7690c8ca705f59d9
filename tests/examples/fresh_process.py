"""Load checkpoints in a process that trained nothing. test_examples_zoo.py sends it lines of JSON."""

import importlib
import json
import sys

import pytorch_lightning as pl
import torch

import gflow_pl


def load(job: dict) -> pl.LightningModule:
    cls = getattr(importlib.import_module(job["module"]), job["cls"])
    if job["uses_mixin"]:
        return cls.load_from_checkpoint(job["path"], weights_only=True)
    return gflow_pl.load_from_checkpoint(cls, job["path"])


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        job = json.loads(line)
        module = load(job).eval()
        with torch.no_grad():
            torch.save(module(torch.load(job["inputs"], weights_only=True)), job["outputs"])
        print(json.dumps({"parameters": sum(p.numel() for p in module.parameters())}), flush=True)


if __name__ == "__main__":
    main()
