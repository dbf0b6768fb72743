"""What Inductor builds C++ with: its compiler and its cache folder. A second faster to import than the rest of Inductor.

Both are the same in torch 2.11, 2.13 and 2.15.
"""

from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.runtime.runtime_utils import cache_dir

__all__ = ["cache_dir", "get_cpp_compiler"]
