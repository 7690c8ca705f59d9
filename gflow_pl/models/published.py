"""Weight files of the published code: ``{"net": state_dict with "module." prefix, "cfg": ...}``, pruned or not.

The shapes of a pruned network follow from its tensors, so the contents of ``cfg`` are not used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

from torch import Tensor

from gflow_pl.common.errors import SettingsError

__all__ = ["is_published", "strip_prefix"]

_PREFIX = "module."


def is_published(checkpoint: object) -> TypeGuard[Mapping[str, Any]]:
    """Return whether the contents of a file are those of a weight file of the published code.

    Args:
        checkpoint: Result of `read_checkpoint`.
    """
    if not isinstance(checkpoint, Mapping) or not isinstance(checkpoint.get("net"), Mapping):
        return False
    net = checkpoint["net"]
    return bool(net) and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in net.items())


def strip_prefix(checkpoint: object) -> dict[str, Tensor]:
    """Return the state dict in a weight file of the published code, without the prefix of its DataParallel wrapper.

    Args:
        checkpoint: Result of `read_checkpoint`.

    Raises:
        SettingsError: The contents are not those of a published weight file.
    """
    if not is_published(checkpoint):
        keys = isinstance(checkpoint, Mapping) and f"the keys {sorted(map(str, checkpoint))[:8]}"
        raise SettingsError(
            f"The checkpoint is no weight file of the published code: expected a state dict under 'net', found "
            f"{keys or type(checkpoint).__name__}."
        )
    net = checkpoint["net"]
    wrapped = all(name.startswith(_PREFIX) for name in net)
    return {name.removeprefix(_PREFIX) if wrapped else name: value for name, value in net.items()}
