"""The C++ files as a library: compiled at first use, by the compiler that Inductor uses, into Inductor's cache directory.

Each vector path is an object of its own, in flags of its own, so that one library serves every machine that shares the
cache. Objects are made in a temporary folder and the finished library is moved to its place: a process that looks there
finds all of it or nothing. Processes that need it at the same time wait for the first one. It is opened once a process, and
is complete when it registers its operators: the formats are constants in it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from filelock import FileLock, Timeout

_SOURCES = Path(__file__).parent / "csrc"
_AVX512 = ["-mavx512f", "-mavx512bw", "-mfma"]
_BF16 = [*_AVX512, "-mavx512vbmi", "-mavx512bf16"]
_X86 = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": _AVX512,
    "avx512_bf16": _BF16,
    "amx": [*_BF16, "-mamx-tile", "-mamx-bf16"],
}
# -ffp-contract: one rounding per multiply-add on every path that has the instruction. No -ffast-math: NaN means NaN.
_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-w"]

# Seconds that a process waits for another one that builds: some times what it takes on two cores.
_PATIENCE = 180

_log = logging.getLogger("fp6_compile")


# One thread builds and loads, the others wait.
_lock = threading.Lock()


def _renew_lock() -> None:
    """A forked process inherits the lock, perhaps held, but not the thread that would release it."""
    global _lock
    _lock = threading.Lock()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_renew_lock)


def load() -> bool:
    """Load the library, built if need be: it registers `fp6::mm` for CPUs. False, and one warning, where that fails.

    Any number of threads may call this first. Raises ValueError for an FP6_MAX_CPU_PATH that names no path.
    """
    return library() is not None


def library() -> ctypes.CDLL | None:
    """What `load` loads, for functions that are no operators; None where that failed."""
    with _lock:
        return _load()


def operator_library() -> str:
    """Path of the C++ library that defines `fp6::mm` for CPUs, built if need be, and loaded here.

    A process without this package, in Python or C++, runs AOTInductor packages of packed models once it has loaded this file
    or a copy of it: `torch.ops.load_library(path)`, `dlopen(path, RTLD_NOW)`. It needs torch of the version it was built
    with, on the same operating system and architecture. Which vector instructions the CPU has does not matter.

    Raises RuntimeError where there is no library: no C++20 compiler, no folder to build in.
    """
    if not load():
        raise RuntimeError(
            "fp6: the C++ library could not be built, as the warning says. Install a C++20 compiler (Debian: "
            "apt install g++; conda: conda install gxx) or point CXX at one"
        )
    return str(_build())


@functools.cache
def _load() -> ctypes.CDLL | None:
    most, known = os.environ.get("FP6_MAX_CPU_PATH"), ("portable", *_X86)
    if most is not None and most not in known:
        raise ValueError(f"FP6_MAX_CPU_PATH: got {most!r}, known paths are {', '.join(known)}")
    try:
        path = _build()
        try:
            return ctypes.CDLL(str(path))
        except OSError:  # of another machine, of another torch that calls itself the same, or damaged
            path.unlink()
            return ctypes.CDLL(str(_build()))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        _log.warning(
            "fp6: no C++ kernel, so six-bit matmuls run in plain torch, slower than 16-bit ones. Install a C++20 compiler "
            "(Debian: apt install g++; conda: conda install gxx) or point CXX at one, and let TORCHINDUCTOR_CACHE_DIR be a "
            "folder that can be written to. What failed: %s",
            str(detail).strip(),
        )
        return None


def _build() -> Path:
    # Here, because importing Inductor takes a second that a model without packed weights on a CPU need not wait.
    from fp6_compile._compat.inductor_build import cache_dir, get_cpp_compiler

    if sys.platform == "win32":
        raise RuntimeError("building on Windows is not supported")
    compiler = get_cpp_compiler()
    objects, link = commands(compiler)
    target = Path(cache_dir()) / "fp6_compile" / f"{_key([*objects.values(), link])}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(target.parent / "lock")
        # Not forever: a fork of a process that was killed while it built holds the lock until it ends. And not everywhere:
        # some network file systems have no locks.
        with contextlib.suppress(Timeout, OSError, NotImplementedError):
            lock.acquire(timeout=_PATIENCE)
        try:
            if not target.exists():  # by another process, meanwhile
                _make(target, objects, link)
        finally:
            lock.release()
    return target


def _make(target: Path, objects: dict[str, list[str]], link: list[str]) -> None:
    folder = tempfile.mkdtemp(dir=target.parent)
    try:
        _run_all(objects, link, folder)
        os.replace(Path(folder) / "fp6.so", target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def commands(compiler: str) -> tuple[dict[str, list[str]], list[str]]:
    """(command that compiles each source, by its name; command that links the objects), run in an empty folder."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    root = Path(torch.__file__).parent
    openmp = ["-fopenmp"] if sys.platform == "linux" else []  # without it at::parallel_for runs on one thread
    without_torch = {"formats": [], "portable": [], **(_X86 if x86 else {})}
    torch_flags = [*openmp, "-isystem", str(root / "include")]
    with_torch = dict.fromkeys(("op", "fp6", "quantize"), torch_flags)
    with_torch["planes"] = [*torch_flags, *(["-mprefer-vector-width=512"] if x86 else [])]
    common = [*_FLAGS, f"-I{_SOURCES}", *(["-DFP6_X86"] if x86 else [])]
    sources = {path.stem: path for path in _SOURCES.rglob("*.cpp")}
    objects = {
        name: [compiler, *common, *flags, "-c", str(sources[name])]
        for name, flags in {**with_torch, **without_torch}.items()
    }
    # libtorch_cpu brings OpenMP's runtime: the one that torch has loaded already, by its name.
    libraries = [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]
    link = [compiler, "-shared", *openmp, *(f"{name}.o" for name in objects), *libraries, "-o", "fp6.so"]
    return objects, link


def _run_all(objects: dict[str, list[str]], link: list[str], folder: str) -> None:
    run = functools.partial(subprocess.run, cwd=folder, check=True, capture_output=True, text=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run, objects.values()))
    run(link)


def _key(command_lines: list[list[str]]) -> str:
    digest = hashlib.sha256(repr((torch.__version__, command_lines)).replace(str(_SOURCES), "").encode())
    for source in sorted(path for path in _SOURCES.rglob("*") if path.is_file()):
        digest.update(str(source.relative_to(_SOURCES)).encode() + source.read_bytes())
    return digest.hexdigest()[:32]
