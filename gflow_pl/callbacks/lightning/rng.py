"""Random states as plain data, so that a resumed run draws what the uninterrupted one would have drawn."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from pytorch_lightning.utilities.seed import isolate_rng

__all__ = ["capture_rng_state", "isolated_rng", "restore_rng_state"]

_SEED = "PL_GLOBAL_SEED"
"""Where Lightning keeps the seed of `seed_everything`, which also decides how ranks share the data in each epoch."""


def capture_rng_state() -> dict[str, Any]:
    """The random states of torch, numpy, python and CUDA and Lightning's seed, as data for ``weights_only=True``."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "numpy": [
            kind,
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ],
        "python": [version, torch.tensor(internal, dtype=torch.int64), gauss],
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "seed": os.environ.get(_SEED),
    }


def restore_rng_state(state: dict[str, Any]) -> None:
    """Put the random states of `capture_rng_state` back."""
    torch.set_rng_state(state["torch"].cpu())
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), position, has_gauss, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal.tolist()), gauss))
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
    if state.get("seed") is not None:
        os.environ[_SEED] = state["seed"]


@contextmanager
def isolated_rng(*seeds: int) -> Iterator[None]:
    """Within, all random numbers follow from `seeds`; afterwards the global states are as they were."""
    with isolate_rng():
        seed = int(np.random.SeedSequence(seeds).generate_state(1, np.uint32)[0])
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        yield
