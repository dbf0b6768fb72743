"""vLLM's quantization method "fp6": packed folders are served as they are, 16-bit ones are quantized while they load.

config        Fp6Config: the method of each layer    <- start here
linear        linear layers and the LM head: loading, packing, fp6::mm
parameters    what is loaded from a folder, checked and cut for tensor parallelism
settings      what "quantization_config" in config.json says; needs no vLLM
inductor      fp6::mm in vLLM's compilation and in its cache keys
compat        every name of vLLM that the package uses

vLLM calls `register` in each of its processes, by the entry point in pyproject.toml (group "vllm.general_plugins").
"""

from __future__ import annotations

import logging


def register() -> None:
    """Make "fp6" known to vLLM. With a vLLM that lacks what the plug-in needs, log why not: other models are served on."""
    try:
        from fp6_compile.integrations.vllm.compat import register_quantization_config
        from fp6_compile.integrations.vllm.config import Fp6Config
    except ImportError as error:
        logging.getLogger("vllm.fp6").error("fp6: the quantization method is not registered: %s", error)
        return
    register_quantization_config("fp6")(Fp6Config)
