"""Start from a file: load its weights and take over its pruned shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gflow_pl.common.checkpoint_file import read_checkpoint
from gflow_pl.common.errors import SettingsError
from gflow_pl.models import is_published, strip_prefix
from gflow_pl.surgery import apply_structure, structure_in_file, structure_of
from gflow_pl.values import Structure

__all__ = ["load_pretrained", "read_file"]


def read_file(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint or a file of weights, without executing code.

    Raises:
        SettingsError: The file does not exist, is damaged, or contains more than data.
    """
    contents = read_checkpoint(path)
    if not isinstance(contents, dict):
        raise SettingsError(
            f"'{path}' contains a {type(contents).__name__}, expected a checkpoint or a file of weights."
        )
    return contents


def load_pretrained(module: nn.Module, path: str | Path) -> None:
    """Load the weights of a file into a module, in place, and give the module the pruned shape of the file.

    The file may be a Lightning checkpoint with or without a structure, a file of `save_pruned`, or a file of the
    published code, which is loaded into the ``network`` of the module if it has one.

    Args:
        module: A LightningModule or any other module, full-size or already pruned.
        path: The file.

    Raises:
        SettingsError: The file cannot be read, or its weights belong to another network.
    """
    # Find the weights and the structure in the file.
    contents = read_file(path)
    target, state, structure = module, contents, None
    if is_published(contents):
        target = getattr(module, "network", module)
        state = strip_prefix(contents)
    elif isinstance(contents.get("state_dict"), dict):
        state = contents["state_dict"]
        if "gflow_pl" in contents:
            structure = structure_in_file(contents)
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise SettingsError(
            f"'{path}' contains no weights: expected a checkpoint with a 'state_dict', or a dict of tensors."
        )

    # Load them.
    _check_names(target, state, path)
    try:
        apply_structure(target, structure if structure is not None else _structure_from(target, state))
        target.load_state_dict(state)
    except (ValueError, RuntimeError) as error:
        # load_state_dict lists all mismatches below a headline; report the first one.
        first = next((line.strip() for line in str(error).splitlines()[1:] if line.strip()), str(error))
        raise SettingsError(f"'{path}' holds another network than this {_network_class(target)}: {first}") from None


def _structure_from(module: nn.Module, state: dict[str, Tensor]) -> Structure:
    """Return the structure that follows from the shapes in a state dict, for files that contain no structure."""
    present = structure_of(module)
    shapes = {name: tuple(state[name].shape) if name in state else shape for name, shape in present.shapes.items()}
    return Structure(shapes=shapes)


def _check_names(module: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """Raise a SettingsError if the names of the tensors in a file are not those of a module."""
    expected = module.state_dict().keys()
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    if missing or unexpected:
        examples = [f"'{missing[0]}' is missing"] * bool(missing) + [f"'{unexpected[0]}' is unexpected"] * bool(
            unexpected
        )
        raise SettingsError(
            f"'{path}' holds another network than this {_network_class(module)}: {' and '.join(examples)} "
            f"({len(missing)} tensors missing, {len(unexpected)} unexpected)."
        )


def _network_class(module: nn.Module) -> str:
    return type(getattr(module, "network", module)).__name__
