"""Starting from a file: its weights and its shape, nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gflow_pl.models import is_published, read_checkpoint, strip_prefix
from gflow_pl.surgery import apply_structure, structure_of
from gflow_pl.values import Structure

__all__ = ["load_pretrained", "read_file"]


def read_file(path: str | Path) -> dict[str, Any]:
    """The contents of a checkpoint or weights file, read without executing code.

    Raises:
        ValueError: There is no such file, it is damaged, or it holds more than data.
    """
    contents = read_checkpoint(path)
    if not isinstance(contents, dict):
        raise ValueError(f"'{path}' holds a {type(contents).__name__}, expected a checkpoint or a file of weights.")
    return contents


def load_pretrained(module: nn.Module, path: str | Path) -> None:
    """Give `module` the weights and the shape of a file, in place.

    Read are: checkpoints of Lightning, with our structure in them or without; files of `save_pruned`; files of the
    published code (into the module's `network`, if it has one).

    Args:
        module: A LightningModule or any other module, full-size or already pruned.
        path: The file.

    Raises:
        ValueError: The file cannot be read, or holds another network.
    """
    contents = read_file(path)
    target, state, structure = module, contents, None
    if is_published(contents):
        target = getattr(module, "network", module)
        state = strip_prefix(contents)
    elif isinstance(contents.get("state_dict"), dict):
        state = contents["state_dict"]
        structure = contents.get("gflow_pl", {}).get("structure")
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"'{path}' holds no weights: expected a checkpoint with a 'state_dict', or a dict of tensors.")
    _check_names(target, state, path)
    try:
        apply_structure(target, structure if structure is not None else _structure_from(target, state))
        target.load_state_dict(state)
    except (ValueError, RuntimeError) as error:
        first = next((line.strip() for line in str(error).splitlines()[1:] if line.strip()), str(error))
        raise ValueError(f"'{path}' holds another network than this {_name(target)}: {first}") from None


def _structure_from(module: nn.Module, state: dict[str, Tensor]) -> Structure:
    """The shape that a bare state dict implies, where it carries no structure of its own."""
    present = structure_of(module)
    shapes = {name: tuple(state[name].shape) if name in state else shape for name, shape in present.shapes.items()}
    return Structure(shapes=shapes)


def _check_names(module: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    wanted = module.state_dict().keys()
    missing = [name for name in wanted if name not in state]
    surplus = [name for name in state if name not in wanted]
    if missing or surplus:
        what = [f"it lacks '{missing[0]}'"] * bool(missing) + [f"its '{surplus[0]}' has no place here"] * bool(surplus)
        raise ValueError(
            f"'{path}' holds another network than this {_name(module)}: {' and '.join(what)} "
            f"({len(missing)} tensors missing, {len(surplus)} too many)."
        )


def _name(module: nn.Module) -> str:
    return type(getattr(module, "network", module)).__name__
