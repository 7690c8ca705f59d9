"""Lightning is published as two packages, `pytorch_lightning` and `lightning`, which define every class twice.

The rest of gflow_pl imports Lightning from here, and so works with either package alone. With both, `pl` is
`pytorch_lightning`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import TYPE_CHECKING

__all__ = ["fabric", "installed_packages", "pl"]

_PACKAGES = {"pytorch_lightning": "lightning_fabric", "lightning.pytorch": "lightning.fabric"}


def installed_packages() -> list[ModuleType]:
    """Return the packages of Lightning that are installed, imported; at least one of them."""
    return [importlib.import_module(name) for name in _installed_names()]


def _installed_names() -> list[str]:
    names = [name for name in _PACKAGES if _is_installed(name)]
    if not names:
        raise ModuleNotFoundError(
            "gflow_pl needs PyTorch Lightning: install the package 'pytorch-lightning' or the package 'lightning'."
        )
    return names


def _is_installed(name: str) -> bool:
    """Return whether a package can be imported; None in `sys.modules` blocks a package, as in `import`."""
    top = name.partition(".")[0]
    return sys.modules.get(top, ...) is not None and importlib.util.find_spec(top) is not None


if TYPE_CHECKING:  # type checkers read one package; the other one has the same classes
    import lightning_fabric as fabric
    import pytorch_lightning as pl
else:
    pl = importlib.import_module(_installed_names()[0])
    fabric = importlib.import_module(_PACKAGES[pl.__name__])
