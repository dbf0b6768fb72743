"""Files: those that others wrote, read with suspicion, and ours.

safetensors   safetensors folders, one tensor at a time    <- start here
scaled        FP8 and int8 checkpoints, with their scales
writing       files that are written whole or not at all
files         regular files inside their folder, plain JSON
"""
