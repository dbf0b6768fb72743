"""Compile caches: a second process hits them, an edited source file misses them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fp6_compile
from fp6_compile.kernels.cpu import build

SCRIPT = """
import json, sys, torch, fp6_compile.backend
from torch._dynamo.utils import counters

torch.manual_seed(0)
layers = torch.nn.Linear(256, 128), torch.nn.ReLU(), torch.nn.Linear(128, 256)
model = torch.nn.Sequential(*layers).half().requires_grad_(False)
# By function, not by name: the entry point would find the installed package instead of the copy under test.
out = torch.compile(model, backend=fp6_compile.backend.fp6)(torch.randn(3, 256).half())
wanted = ("autograd_cache_hit", "autograd_cache_miss", "autograd_cache_bypass")
found = {key: counters["aot_autograd"][key] for key in wanted}
found |= {key: counters["inductor"][key] for key in ("fxgraph_cache_hit", "fxgraph_cache_miss", "fxgraph_cache_bypass")}
found["sum"] = out.double().sum().item()
found["file"] = fp6_compile.backend.__file__
print(json.dumps(found))
"""


def _run(root: Path, cache: Path) -> dict:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert Path(found.pop("file")).is_relative_to(root)
    return found


@pytest.fixture
def copy(tmp_path):
    """A copy of the package, whose files a test may edit."""
    shutil.copytree(
        Path(fp6_compile.__file__).parent, tmp_path / "fp6_compile", ignore=shutil.ignore_patterns("__pycache__")
    )
    return tmp_path


def test_second_process_hits_and_an_edited_kernel_misses(copy):
    cache = copy / "cache"
    if build.load():  # the C++ kernel is not what is cached here, and takes half a minute
        shutil.copytree(build._build().parent, cache / "fp6_compile")
    first = _run(copy, cache)
    assert (first["autograd_cache_miss"], first["autograd_cache_bypass"], first["fxgraph_cache_bypass"]) == (1, 0, 0)

    second = _run(copy, cache)
    assert (second["autograd_cache_hit"], second["autograd_cache_miss"]) == (1, 0)
    assert (second["fxgraph_cache_hit"], second["fxgraph_cache_miss"]) == (1, 0)
    assert second["sum"] == first["sum"]

    for file in ("kernels/mm.py", "lowerings/fp6_mm.py.jinja"):
        with (copy / "fp6_compile" / file).open("a") as source:
            source.write("\n# an edit\n")
        edited = _run(copy, cache)
        assert (edited["autograd_cache_hit"], edited["autograd_cache_miss"]) == (0, 1), file
        assert edited["fxgraph_cache_hit"] == 0
