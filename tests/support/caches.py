"""Compile caches of their own for processes that tests start."""

import os
import shutil
from pathlib import Path

from fp6_compile import ops
from fp6_compile.kernels.cpu import build


def fresh_cache(folder: Path) -> dict[str, str]:
    """The environment of a process whose Inductor caches in `folder`, where at first there is only our C++ library.

    Building it takes longer than what such a test is about.
    """
    target = folder / "fp6_compile"
    if ops.load() and not target.exists():
        target.mkdir(parents=True)
        shutil.copy(build._build(), target)
    return {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder)}
