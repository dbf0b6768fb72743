"""Files that others wrote, read with suspicion.

safetensors   safetensors folders, one tensor at a time    <- start here
scaled        FP8 and int8 checkpoints, with their scales
files         regular files inside their folder, plain JSON
"""
