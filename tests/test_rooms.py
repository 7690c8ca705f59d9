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
    "types": {"values"},
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


def imported_files(path: Path) -> set[Path]:
    """Files of the package that a file imports at its top level, names of rooms resolved to
    `__init__.py`.
    """
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "gflow_pl":
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "gflow_pl"]
        else:
            continue
        for name in names:
            place = PACKAGE.joinpath(*name.split(".")[1:])
            found |= {file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()}
    return found - {path, PACKAGE / "__init__.py"}


def test_no_files_import_each_other_in_a_circle() -> None:
    arrows = {path: imported_files(path) for path in PACKAGE.rglob("*.py")}
    assert sum(map(len, arrows.values())) > 100
    while True:
        bottom = {path for path, below in arrows.items() if not below & arrows.keys()}
        if not bottom:
            break
        arrows = {path: below for path, below in arrows.items() if path not in bottom}
    assert not arrows, f"a circle among {sorted(str(path.relative_to(PACKAGE)) for path in arrows)}"


def test_no_two_files_have_one_name() -> None:
    names = [path.name for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    assert sorted(names) == sorted(set(names))


def test_no_file_is_longer_than_350_lines() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {name: length for name, length in lengths.items() if length > 350} == {}


def test_no_file_imports_our_own_modules_for_type_checking_only() -> None:
    """Such an import hides an arrow between rooms."""
    checks = [
        (path.name, node)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    ]
    assert [name for name, node in checks if "gflow_pl" in ast.unparse(ast.Module(node.body, []))] == []


def test_few_annotated_parameters_are_any() -> None:
    annotations = [
        ast.unparse(argument.annotation)
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for argument in (
            *node.args.posonlyargs,
            *node.args.args,
            *node.args.kwonlyargs,
            node.args.vararg,
            node.args.kwarg,
        )
        if argument is not None and argument.annotation is not None
    ]
    assert len(annotations) > 1000
    assert annotations.count("Any") / len(annotations) <= 0.05
