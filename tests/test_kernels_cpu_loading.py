"""Building and loading the C++ kernel: whichever thread or process is first, forks, dead compilers, unusable folders."""

import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch

from fp6_compile import ops
from fp6_compile._compat.inductor_build import get_cpp_compiler
from fp6_compile.formats import FORMATS
from fp6_compile.kernels.cpu import build
from fp6_compile.layouts.packing import CPU, pack
from fp6_compile.quantize import quantize
from tests.support.soak import count

ROOT = Path(__file__).parent.parent
PATHS = torch.ops.fp6.cpu_paths() if ops.load() else []

pytestmark = pytest.mark.skipif(not PATHS, reason="no C++ compiler")

_PREAMBLE = """
import ctypes, logging, os, shutil, sys, threading, time, torch
from pathlib import Path
from fp6_compile import ops
from fp6_compile.formats import FORMATS
from fp6_compile.kernels.cpu import build
from fp6_compile.layouts.packing import CPU, PLANES, pack
from fp6_compile.quantize import dequantize, quantize

fmt = FORMATS["e2m3"]
codes, scale = quantize(torch.randn(512, 640), fmt, 64)
x = torch.randn(3, 640)
expected = x @ dequantize(codes, scale, fmt, 64, torch.float32).T

def call(layout=CPU):
    out = torch.ops.fp6.mm(x, pack(codes, fmt, layout), scale, "e2m3", layout, 64)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    return out

def registered():
    return torch._C._dispatch_has_kernel_for_dispatch_key("fp6::mm", "CPU")

def by_threads(work, count=8):
    results, barrier = [], threading.Barrier(count)
    def run():
        barrier.wait()
        results.append(work())
    threads = [threading.Thread(target=run) for _ in range(count)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    return results
"""


def _python(code: str, **environment: str) -> str:
    """stderr of a process of its own that runs `code` after the preamble, and succeeds within two minutes."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-c", _PREAMBLE + textwrap.dedent(code)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stderr


_BUILD = "import torch; from fp6_compile import ops; ops.load(); print(*torch.ops.fp6.cpu_paths())"


@pytest.mark.slow
def test_several_processes_build_at_once(tmp_path):
    quick, cache = tmp_path / "c++", tmp_path / "cache"
    count_links = f'case "$*" in *-shared*) printf 1 >> {tmp_path / "links"};; esac'
    quick.write_text(f'#!/bin/sh\n{count_links}\nexec {get_cpp_compiler()} "$@" -O0\n')
    quick.chmod(0o755)
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT), "CXX": str(quick)}
    processes = [
        subprocess.Popen([sys.executable, "-c", _BUILD], env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    outputs = {process.communicate()[0].strip() for process in processes}
    assert outputs == {" ".join(PATHS)}
    assert [path.suffix for path in (cache / "fp6_compile").iterdir() if path.name != "lock"] == [".so"]
    assert (tmp_path / "links").read_text() == "1", "one process builds, the other waits for it"


def test_the_library_is_built_once(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(build, "_run_all", lambda objects, link, folder: (Path(folder) / "fp6.so").touch())
    library = build._build()
    monkeypatch.setattr(build, "_run_all", None)
    assert build._build() == library
    monkeypatch.setattr(build, "_FLAGS", [*build._FLAGS, "-DOTHER"])
    with pytest.raises(TypeError):
        build._build()


_FALLBACK = """
import torch
from fp6_compile.formats import FORMATS
from fp6_compile import ops
from fp6_compile._compat.inductor_build import get_cpp_compiler
from fp6_compile.layouts.packing import CPU, PLANES, pack
from fp6_compile.quantize import dequantize, quantize

codes, scale = quantize(torch.randn(40, 300), FORMATS["e3m2"], None)
x = torch.randn(2, 300)
for _ in range(2):
    out = torch.ops.fp6.mm(x, pack(codes, FORMATS["e3m2"], CPU), scale, "e3m2", CPU, None)
    torch.testing.assert_close(out, x @ dequantize(codes, scale, FORMATS["e3m2"], None, torch.float32).T)
assert not torch._C._dispatch_has_kernel_for_dispatch_key("fp6::mm", "CPU")
"""


@pytest.mark.parametrize("compiler", ["false", pytest.param("/nonexistent/c++", marks=pytest.mark.slow)])
def test_without_a_compiler_plain_torch_and_one_warning(compiler, tmp_path):
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT), "CXX": compiler}
    result = subprocess.run([sys.executable, "-c", _FALLBACK], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("Install a C++20 compiler (Debian: apt install g++; conda: conda install gxx)") == 1


@pytest.mark.slow
def test_the_library_knows_the_formats_when_it_registers_the_kernel():
    """No thread can call between the two."""
    _python("""
        ctypes.CDLL(str(build._build()))
        assert registered()
        call(CPU), call(PLANES)
    """)


_FIRST_CALL = """
sys.setswitchinterval(1e-6)
assert not registered()
results = by_threads(lambda: (call(CPU), call(PLANES)))
assert registered() and len(results) == 8
assert all(torch.equal(a, results[0][0]) and torch.equal(b, results[0][1]) for a, b in results)
"""


def test_eight_threads_make_the_first_call():
    assert _python(_FIRST_CALL) == ""


@pytest.mark.slow
def test_eight_threads_make_the_first_call_of_many_processes():
    for _ in range(count(20, 3)):
        assert _python(_FIRST_CALL) == ""


def test_one_thread_builds_and_there_is_one_warning(monkeypatch, caplog):
    built = []

    def fail():
        built.append(threading.get_ident())
        time.sleep(0.1)
        raise RuntimeError("no compiler today")

    monkeypatch.setattr(build, "_build", fail)
    build._load.cache_clear()
    try:
        found = []
        threads = [threading.Thread(target=lambda: found.append(build.load())) for _ in range(8)]
        [thread.start() for thread in threads], [thread.join() for thread in threads]
    finally:
        build._load.cache_clear()
    assert found == [False] * 8
    assert len(built) == 1
    assert [record.message.count("no compiler today") for record in caplog.records] == [1]


@pytest.mark.slow
def test_a_fork_while_another_thread_builds():
    """The child has no such thread: it loads by itself."""
    _python("""
        def build_for_long():
            with build._lock:
                entered.set()
                time.sleep(60)
        entered = threading.Event()
        threading.Thread(target=build_for_long, daemon=True).start()
        entered.wait()
        if (child := os.fork()) == 0:
            torch.set_num_threads(1)  # as every torch operator needs after a fork, if torch has run on several threads
            call()
            os._exit(registered() is not True)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        os._exit(0)
    """)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_a_fork_after_the_kernel_ran(threads):
    """In one thread, as in torch's data loaders: after two in the parent, no operator of torch survives two in the child."""
    _python(f"""
        torch.set_num_threads({threads})
        codes, scale = quantize(torch.randn(2048, 640), fmt, 64)
        expected = x @ dequantize(codes, scale, fmt, 64, torch.float32).T
        call(), call(PLANES)
        if (child := os.fork()) == 0:
            torch.set_num_threads(1)
            call(), call(PLANES)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    """)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_other_ways_to_start_a_process(method):
    """A child imports for itself, and finds the library built."""
    context = torch.multiprocessing.get_context(method)
    with context.Pool(1) as pool:
        assert pool.apply(_paths_of_a_child) == PATHS


def _paths_of_a_child() -> list[str]:
    assert ops.load()
    return torch.ops.fp6.cpu_paths()


def test_calls_at_once_from_eight_threads():
    """Each of them split over torch's threads."""
    codes, scale = quantize(torch.randn(1024, 1024), FORMATS["e3m2"], None)
    planes, x = pack(codes, FORMATS["e3m2"], CPU), torch.randn(5, 1024)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = torch.ops.fp6.mm(x, planes, scale, "e3m2", CPU, None)
        wrong = []

        def work():
            for _ in range(50):
                if not torch.equal(torch.ops.fp6.mm(x, planes, scale, "e3m2", CPU, None), expected):
                    wrong.append(1)

        threads = [threading.Thread(target=work) for _ in range(8)]
        [thread.start() for thread in threads], [thread.join() for thread in threads]
    finally:
        torch.set_num_threads(before)
    assert not wrong


def _compiler(folder: Path, last: str) -> str:
    """A compiler that answers, makes empty objects, and links by the shell command `last`."""
    path = folder / "c++"
    path.write_text(f'#!/bin/sh\ncase "$*" in *--version*) echo c++ 13;; *fp6.so*) {last};; esac\n')
    path.chmod(0o755)
    return str(path)


@pytest.mark.slow
def test_a_compiler_that_is_killed_leaves_nothing(tmp_path):
    compiler = _compiler(tmp_path, "printf half > fp6.so; kill -9 $$")
    code = "by_threads(call), by_threads(call)\nassert not registered()"
    errors = _python(code, TORCHINDUCTOR_CACHE_DIR=str(tmp_path), CXX=compiler)
    assert errors.count("no C++ kernel") == 1
    assert "SIGKILL" in errors
    assert [path.name for path in (tmp_path / "fp6_compile").iterdir()] == ["lock"]


@pytest.mark.slow
def test_a_process_that_is_killed_leaves_no_half_library(tmp_path):
    compiler = _compiler(tmp_path, "printf half > fp6.so; touch ../linking; sleep 60")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "CXX": compiler}
    process = subprocess.Popen([sys.executable, "-c", "from fp6_compile import ops; ops.load()"], env=env)
    deadline = time.monotonic() + 100
    while not (tmp_path / "fp6_compile" / "linking").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert list((tmp_path / "fp6_compile").glob("*.so")) == []


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").touch()
    folder = str(tmp_path / "file" / "cache")
    errors = _python("call(), call()\nassert not registered()", TORCHINDUCTOR_CACHE_DIR=folder)
    assert errors.count("let TORCHINDUCTOR_CACHE_DIR be a folder that can be written to") == 1
    assert f"Not a directory: '{folder}'" in errors


@pytest.mark.slow
def test_a_library_that_cannot_be_opened_is_built_again(tmp_path):
    """Of another machine, or damaged; the compiler here copies the library that is known to be good."""
    compiler = _compiler(tmp_path, f"cp {build._build()} fp6.so")
    _python(
        """
        path = build._build()
        path.write_bytes(b"no library")
        call()
        assert registered() and path.stat().st_size > 1000
        """,
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path),
        CXX=compiler,
    )


@pytest.mark.slow
def test_a_library_that_is_replaced_after_it_was_opened(tmp_path):
    """Functions that are no operators come from the library that is open."""
    (tmp_path / "fp6_compile").mkdir()
    compiler = _compiler(tmp_path, f"cp {build._build()} fp6.so")
    _python(
        """
        from fp6_compile.kernels.cpu.quantize import quantize as by_library
        call()
        path = build._build()
        shutil.copy(path, path.with_suffix(".new")), os.replace(path.with_suffix(".new"), path)
        assert by_library(torch.randn(8, 64), fmt, None) is not None
        path.unlink()
        assert build.library() is not None and not path.exists()
        """,
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path),
        CXX=compiler,
    )


@pytest.mark.slow
@pytest.mark.parametrize("most", PATHS)
def test_the_best_path_can_be_limited(most):
    _python(f"""
        assert ops.load()
        assert torch.ops.fp6.cpu_paths() == {PATHS[: PATHS.index(most) + 1]}
        out = call()
        assert torch.equal(out, torch.ops.fp6.cpu_mm(x, pack(codes, fmt, CPU), scale, "e2m3", 64, {most!r}, False))
    """, FP6_MAX_CPU_PATH=most)  # fmt: skip


def test_a_limit_must_be_a_path():
    _python("""
        try:
            call()
        except ValueError as error:
            assert "FP6_MAX_CPU_PATH: got 'sse', known paths are portable, avx2" in str(error), error
        else:
            raise AssertionError
    """, FP6_MAX_CPU_PATH="sse")  # fmt: skip


def test_an_unknown_path_is_named():
    codes, scale = quantize(torch.randn(4, 64), FORMATS["e3m2"], None)
    with pytest.raises(ValueError, match="fp6: path: got 'sse', this machine has"):
        torch.ops.fp6.cpu_mm(torch.randn(1, 64), pack(codes, FORMATS["e3m2"], CPU), scale, "e3m2", None, "sse", False)
