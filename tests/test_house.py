"""The house's rules: imports go down, heavy imports stay in their rooms, files stay small."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fp6_compile"
FILES = sorted(PACKAGE.rglob("*.py"))
# From the ground up; a room imports its own floor and those below.
FLOORS = [
    {"formats", "launches", "devices", "files", "held"},
    {"slabs"},
    {"packing", "quantize"},
    {"algorithms", "config", "kernels"},
    {"ops", "linears", "names", "fused", "planes", "weights", "report", "storage", "scaled"},
    {"merging", "hidden"},
    {"views", "graph", "passes", "lowerings", "tensor", "dispatch", "lowrank", "places"},
    {"backend", "model", "manifest"},
    {"calibration", "checkpoint", "mx", "sensitivity", "explanation"},
    {"cli"},
]
FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}


def _imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path):
    room = _room(path)
    if room == "__init__":
        return
    for name in _imports(path):
        parts = name.split(".")
        if parts[0] == "fp6_compile" and len(parts) > 1:
            assert FLOOR[parts[1]] <= FLOOR[room], f"{room} imports {name}, which is above it"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_heavy_imports_stay_in_their_rooms(path):
    imports = _imports(path)
    if _room(path) != "kernels":
        assert not any(name.split(".")[0] == "triton" for name in imports)
    # build.py asks Inductor, when it builds, which compiler it uses and where it caches.
    if _room(path) not in ("lowerings", "passes", "backend") and path != PACKAGE / "kernels" / "cpu" / "build.py":
        assert not any(name.startswith("torch._inductor") for name in imports)
    if _room(path) == "lowerings" and path.name != "_inductor.py":
        assert not any(name.startswith("torch._inductor") for name in imports), (
            "private names are gathered in _inductor.py"
        )


def test_every_room_is_on_a_floor_and_on_the_map():
    rooms = {_room(path) for path in FILES} - {"__init__"}
    assert rooms == set(FLOOR)
    import fp6_compile

    assert all(f"    {room} " in fp6_compile.__doc__ for room in rooms)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_are_small_and_documented(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 260
    assert ast.get_docstring(ast.parse(text)), "a module opens with what it is"


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.[ch]*pp")) + sorted(PACKAGE.rglob("*.h")), ids=lambda path: path.name
)
def test_cpp_files_are_small_and_documented(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 260
    assert text.startswith("// "), "a file opens with what it is"
    assert all(len(line) <= 125 for line in text.splitlines())


def test_importing_the_package_imports_neither_triton_nor_inductor():
    code = """
import sys, torch
before = set(sys.modules)
import fp6_compile, fp6_compile.ops, fp6_compile.config, fp6_compile.cli, fp6_compile.mx
new = set(sys.modules) - before
heavy = ("triton", "safetensors", "transformers", "tqdm")
assert not [name for name in new if name.split(".")[0] in heavy or name.startswith("torch._inductor")], new
"""
    subprocess.run([sys.executable, "-c", code], check=True)
