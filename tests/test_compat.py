"""Private names of torch and Triton: all are imported in fp6_compile/_compat, and all of them exist."""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fp6_compile"
COMPAT = sorted((PACKAGE / "_compat").glob("[a-z]*.py"))
OTHERS = sorted(path for path in PACKAGE.rglob("*.py") if path.parent.name != "_compat")

# Names that begin with an underscore, or are reached through one, and are used anywhere: fp6_compile/_compat says why.
ALLOWED = (
    "torch._check",
    "torch._check_value",
    "torch.Tensor._make_wrapper_subclass",
    "torch.autograd.forward_ad._current_level",
    "torch.utils._pytree",
)
# Modules of Triton that its documentation does not describe.
PRIVATE_TRITON = ("runtime", "backends", "compiler", "knobs")


def _imports(tree):
    """What each name that the module imports from torch or triton stands for."""
    known = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.partition(".")[0]
                known[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom) and not node.level:
            known |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return {name: dotted for name, dotted in known.items() if dotted.partition(".")[0] in ("torch", "triton")}


def _chain(node, known):
    """The dotted name that an attribute stands for; None for an attribute of anything but torch or triton."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.Attribute) and (base := _chain(node.value, known)) is not None:
        return f"{base}.{node.attr}"
    return None


def _names(source):
    """(line, dotted name) of everything of torch and triton that a module imports, names, or has as a string."""
    tree = ast.parse(source)
    known = _imports(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield node.lineno, _chain(node, known) or ""
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
            yield node.lineno, node.value


def _is_private(name):
    top, *parts = name.split(".")
    if top not in ("torch", "triton") or any(f"{name}.".startswith(f"{allowed}.") for allowed in ALLOWED):
        return False
    private = [part for part in parts if part.startswith("_") and not part.startswith("__")]
    return bool(private) or (top == "triton" and parts[:1] and parts[0] in PRIVATE_TRITON)


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_private_names_are_imported_in_compat_only(path):
    found = {f"{path}:{line}: {name}" for line, name in _names(path.read_text()) if _is_private(name)}
    assert not found, "import these in fp6_compile/_compat:\n" + "\n".join(sorted(found))


@pytest.mark.parametrize(
    ("source", "private"),
    [
        ("from torch._guards import TracingContext", "torch._guards.TracingContext"),
        ("import torch\ntorch._C._jit()", "torch._C._jit"),
        ("from torch import _C as c\nc.x", "torch._C.x"),
        ("from torch.autograd import forward_ad\nforward_ad._level", "torch.autograd.forward_ad._level"),
        ("def f():\n    import torch._inductor.config", "torch._inductor.config"),
        ("import triton\ntriton.knobs.nvidia", "triton.knobs.nvidia"),
        ("import sys\n'torch._inductor.lowering' in sys.modules", "torch._inductor.lowering"),
    ],
)
def test_the_rule_finds_private_names(source, private):
    assert private in {name for _, name in _names(source) if _is_private(name)}


def test_the_rule_allows_public_names():
    source = (
        "import torch, triton\ntorch._check(True)\ntorch.__version__\ntriton.jit\nfrom torch.utils._pytree import x"
    )
    assert not [name for _, name in _names(source) if _is_private(name)]


@pytest.mark.parametrize("path", COMPAT, ids=lambda path: path.stem)
def test_names_resolve(path):
    """Importing the module asks torch and Triton for each of its names."""
    importlib.import_module(f"fp6_compile._compat.{path.stem}")


def _other_torches():
    return [python for python in os.environ.get("FP6_OTHER_TORCHES", "").split(os.pathsep) if python]


@pytest.mark.parametrize("python", _other_torches() or [None])
def test_names_resolve_in_other_versions(python):
    if python is None:
        pytest.skip("FP6_OTHER_TORCHES names no other Python, separated by os.pathsep")
    code = "".join(f"import fp6_compile._compat.{path.stem}\n" for path in COMPAT)
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run([python, "-c", code], env=environment, cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_missing_name_is_noticed(tmp_path):
    """A name that a torch lacks fails the import that the two tests above make."""
    (tmp_path / "probe.py").write_text("from torch._C import _no_such_name\n")
    done = subprocess.run([sys.executable, "-c", "import probe"], cwd=tmp_path, capture_output=True, text=True)
    assert "_no_such_name" in done.stderr
