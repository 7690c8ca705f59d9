"""Imports point down, no files import each other in a circle, and no two files have one name."""

import ast
from pathlib import Path

import pytest

import gflow_pl

PACKAGE = Path(gflow_pl.__file__).parent
GROUND = {"common", "values", "files"}
BELOW = {
    "common": set(),
    "files": set(),
    "values": {"common"},
    "models": {"common", "files"},
    "data": {"common", "files"},
    "channels": GROUND,
    "importance": GROUND,
    "selection": GROUND,
    "surgery": GROUND,
    "reports": GROUND,
    "callbacks": GROUND | {"channels", "importance", "selection", "surgery"},
    "tasks": GROUND | {"models", "surgery"},
    "cli": None,
}
"""Room to the rooms that it may import; None: all."""


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Rooms that a file imports when it runs; imports for type checking only do not count."""
    tree = ast.parse(path.read_text())
    checking = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    rooms = set()
    for node in ast.walk(tree):
        if id(node) in checking:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gflow_pl."):
            rooms.add(node.module.split(".")[1])
        if isinstance(node, ast.ImportFrom) and node.module == "gflow_pl":
            rooms |= {alias.name for alias in node.names if alias.name in BELOW}
        if isinstance(node, ast.Import):
            rooms |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("gflow_pl.")}
    return rooms


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if room_of(path) in BELOW]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_what_is_below_it(path: Path) -> None:
    room = room_of(path)
    allowed = BELOW[room]
    if allowed is not None:
        assert imported_rooms(path) - {room} <= allowed


def test_every_room_is_checked() -> None:
    assert {room_of(path) for path in FILES} == set(BELOW)


def test_no_file_imports_by_star() -> None:
    for path in FILES:
        assert "import *" not in path.read_text(), path
