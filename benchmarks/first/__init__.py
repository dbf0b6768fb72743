"""The first quarter of an hour on a GPU.

__main__  the two commands and their stages      <- start here
warm      compile the kernels, in many processes, into Triton's cache
exact     all codes and integer products by every kind of tile
one       some launches of one kernel, for a profiler or a checker
"""
