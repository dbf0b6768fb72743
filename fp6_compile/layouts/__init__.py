"""How the codes of a weight lie in memory.

packing     codes <-> bit planes, in each layout    <- start here
spec        how a packed weight is read: format, layout, group_size
gpu_tiles   the layouts that the GPU kernels read
"""

from fp6_compile.layouts.packing import CPU, LAYOUTS, PLANES

__all__ = ["CPU", "LAYOUTS", "PLANES"]
