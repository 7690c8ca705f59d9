"""Rewriting networks to their pruned shape, exactly, and storing that shape in files.

Surgery does not choose the units.
"""

from gflow_pl.surgery.checkpoint import (
    StructureMixin,
    add_structure,
    apply_from_checkpoint,
    load_from_checkpoint,
    load_pruned,
    save_pruned,
    structure_in_file,
)
from gflow_pl.surgery.expansion import scatter_output
from gflow_pl.surgery.finalize import finalize
from gflow_pl.surgery.module_structure import apply_structure, structure_of
from gflow_pl.surgery.optimizer_state import check_optimizers, drop_empty_parameters, drop_state, register_state_rule
from gflow_pl.surgery.rewrite import rewrite
from gflow_pl.surgery.tensor_table import cut_tensor

__all__ = [
    "StructureMixin",
    "add_structure",
    "apply_from_checkpoint",
    "apply_structure",
    "check_optimizers",
    "cut_tensor",
    "drop_empty_parameters",
    "drop_state",
    "finalize",
    "load_from_checkpoint",
    "load_pruned",
    "register_state_rule",
    "rewrite",
    "save_pruned",
    "scatter_output",
    "structure_in_file",
    "structure_of",
]
