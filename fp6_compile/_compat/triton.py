"""Private names of Triton: those of modules that its documentation does not describe.

All of them are the same in Triton 3.6, 3.7 and 3.9.
"""

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver
from triton.runtime.cache import get_cache_manager

__all__ = ["GPUTarget", "JITFunction", "driver", "get_cache_manager", "knobs"]
