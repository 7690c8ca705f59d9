"""States of the global random generators as plain data, and a block with random numbers of its own."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from gflow_pl.common.lightning_package import pl

__all__ = ["capture_rng_state", "isolated_rng", "restore_rng_state"]

_SEED_VARIABLE = "PL_GLOBAL_SEED"
"""The environment variable of `seed_everything`.

Its value also decides how the data is shared among ranks in each epoch.
"""


def capture_rng_state() -> dict[str, Any]:
    """Return the states of the generators of torch, NumPy, Python and CUDA, and Lightning's seed.

    Returns:
        Plain data for a checkpoint; `torch.load` reads it with ``weights_only=True``.
    """
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
        "seed": os.environ.get(_SEED_VARIABLE),
    }


def restore_rng_state(state: dict[str, Any]) -> None:
    """Restore the states that `capture_rng_state` returned.

    The states of CUDA generators are restored only if the number of CUDA devices is the same as then.
    """
    torch.set_rng_state(state["torch"].cpu())
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), position, has_gauss, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal.tolist()), gauss))
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
    if state.get("seed") is not None:
        os.environ[_SEED_VARIABLE] = state["seed"]


@contextmanager
def isolated_rng(*seeds: int) -> Iterator[None]:
    """Seed the global generators for the time of the block, and restore their states at its end.

    Args:
        *seeds: Non-negative integers. The same integers give the same random numbers inside the block.
    """
    with pl.utilities.seed.isolate_rng():
        seed = int(np.random.SeedSequence(seeds).generate_state(1, np.uint32)[0])
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        yield
