"""Packed models as files.

save_load   save and load                                          <- start here
manifest    what a checkpoint's folder says, and everything that can be wrong with it
mx          OCP MXFP6 checkpoints, as AMD Quark writes them
"""

from fp6_compile.checkpoint.manifest import CheckpointError
from fp6_compile.checkpoint.save_load import load, save

__all__ = ["CheckpointError", "load", "save"]
