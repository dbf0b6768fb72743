"""The C++ kernel under sanitizers, without torch (sanitize.cpp): every path of this machine, every format, the quantizer."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fp6_compile.kernels.cpu import build

pytestmark = pytest.mark.slow

HARNESS = Path(__file__).parent / "sanitize.cpp"


def _run(folder: Path, sanitizers: str, threads: int) -> str:
    """What the harness prints, built with `sanitizers` in `folder`."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no g++ or clang++")
    sanitize = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-g", "-O1"]
    probe = subprocess.run(
        [compiler, *sanitize, "-x", "c++", "-", "-o", "probe"], input="int main(){}", cwd=folder, text=True
    )
    if probe.returncode:
        pytest.skip("the compiler lacks the sanitizers")
    objects, _ = build.commands(compiler)
    del objects["op"]  # torch's side
    x86 = ["-DFP6_X86"] if "amx" in objects else []
    objects["harness"] = [compiler, "-std=c++20", *x86, f"-I{Path(build.__file__).parent / 'csrc'}", "-c", str(HARNESS)]
    objects["harness"] += ["-o", "harness.o"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compile_ = [[*command, *sanitize, "-DFP6_WITHOUT_TORCH"] for command in objects.values()]
        list(pool.map(lambda command: subprocess.run(command, cwd=folder, check=True), compile_))
    subprocess.run(
        [compiler, *sanitize, *(f"{name}.o" for name in objects), "-o", "main", "-pthread"], cwd=folder, check=True
    )
    result = subprocess.run(["./main", str(threads)], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_addresses_and_undefined_behaviour(tmp_path):
    assert _run(tmp_path, "address,undefined", 1).startswith("clean: 1 threads")


def test_threads(tmp_path):
    """Eight threads call all of it at once, for the first time, and each call has a second thread of its own."""
    assert _run(tmp_path, "thread", 8).startswith("clean: 8 threads")
