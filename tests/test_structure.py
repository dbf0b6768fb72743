"""The package's rules: imports go down, private names stay in _compat, files and folders stay small."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fp6_compile

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fp6_compile"
FILES = sorted(PACKAGE.rglob("*.py"))
SOURCES = sorted(path for path in PACKAGE.rglob("*") if path.suffix in (".cpp", ".h"))
FOLDERS = sorted({path.parent for path in [*FILES, *SOURCES]})


def _name(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def test_imports_go_down_and_in_no_circle():
    """The layers are declared in pyproject.toml."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-logo", "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# Its docstring or first comment says why.
LONG = {"kernels/triton/mm.py": 260}


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_a_module_is_small_and_says_what_it_is(path):
    text = path.read_text()
    assert len(text.splitlines()) <= LONG.get(_name(path), 250)
    assert ast.get_docstring(ast.parse(text))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_a_cpp_file_is_small_and_says_what_it_is(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 250
    assert text.startswith("// ")
    assert all(len(line) <= 125 for line in text.splitlines())


@pytest.mark.parametrize("folder", FOLDERS, ids=_name)
def test_a_folder_has_at_most_eight_files(folder):
    assert len([path for path in folder.iterdir() if path.is_file()]) <= 8


@pytest.mark.parametrize("folder", [folder for folder in FOLDERS if (folder / "__init__.py").exists()], ids=_name)
def test_a_package_has_a_map_of_its_modules(folder):
    """A newcomer reads one page to know where to go on."""
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
    modules = {path.stem for path in folder.glob("*.py") if not path.stem.startswith("__")}
    packages = {path.parent.name for path in folder.glob("*/__init__.py")}
    lines = [line.split() for line in text.splitlines() if line.strip()]
    missing = [name for name in modules | packages if not any(name in words[:1] for words in lines)]
    assert not missing, f"the docstring of {folder.name} does not say what {missing} are"


def test_public_names_are_there_and_typed_as_they_are_imported():
    assert all(getattr(fp6_compile, name) is not None for name in fp6_compile.__all__)
    assert set(fp6_compile.__all__) <= set(dir(fp6_compile))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        fp6_compile.nonsense  # noqa: B018


def test_importing_the_package_imports_neither_triton_nor_inductor():
    code = """
import sys, torch
before = set(sys.modules)
import fp6_compile, fp6_compile.ops, fp6_compile.config, fp6_compile.cli, fp6_compile.checkpoint.mx
[getattr(fp6_compile, name) for name in fp6_compile.__all__]
new = set(sys.modules) - before
heavy = ("triton", "safetensors", "transformers", "tqdm")
assert not [name for name in new if name.split(".")[0] in heavy or name.startswith("torch._inductor")], new
"""
    subprocess.run([sys.executable, "-c", code], check=True)
