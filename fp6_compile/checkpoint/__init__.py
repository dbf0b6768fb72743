"""Packed models as files.

save_model      save                                                     <- start here
load_model      load
manifest        what is in a checkpoint's folder, and everything that can be wrong with it
metadata        what a packed model says of itself, in its shards and in config.json
packed_weight   which tensors a packed weight is stored as
distributed     models whose weights are spread over processes, for torch.distributed.checkpoint
version1        folders that fp6_compile 0.1 wrote
mx              OCP MXFP6 checkpoints, as AMD Quark writes them
"""

from fp6_compile.checkpoint.load_model import load
from fp6_compile.checkpoint.packed_weight import CheckpointError
from fp6_compile.checkpoint.save_model import save

__all__ = ["CheckpointError", "load", "save"]
