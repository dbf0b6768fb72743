"""Other libraries that load, run and save packed models.

transformers   from_pretrained quantizes and loads, save_pretrained saves
vllm           a plug-in: vLLM serves packed models, and quantizes 16-bit ones while it loads them

vLLM calls its plug-in by an entry point. For transformers, `install` asks to be called back when it is imported:
`import fp6_compile` calls it, and so does `import torch` (entry point `fp6` in the group `torch.backends`), unless
TORCH_DEVICE_BACKEND_AUTOLOAD=0.
"""

from __future__ import annotations

import logging
import sys
from functools import partial
from importlib import import_module
from types import ModuleType

log = logging.getLogger("fp6_compile")

# What is called with a module once it is imported.
_HOOKS = {
    "transformers.quantizers.auto": "fp6_compile.integrations.transformers.register:add_quantizer",
    "transformers.modeling_utils": "fp6_compile.integrations.transformers.register:wrap_methods",
}
_waiting: set[str] = set()


def install() -> None:
    """Connect with the libraries of `_HOOKS`: with those that are imported now, with others when they are."""
    for name, hook in _HOOKS.items():
        if name in sys.modules:
            _call(hook, sys.modules[name])
        elif name not in _waiting:
            from wrapt import register_post_import_hook

            _waiting.add(name)
            register_post_import_hook(partial(_call, hook), name)


def _call(hook: str, module: ModuleType) -> None:
    """Errors are warnings: the import of the other library goes on without us."""
    where, _, function = hook.partition(":")
    try:
        getattr(import_module(where), function)(module)
    except Exception as error:
        log.warning("fp6: %s will not load or save packed models: %r", module.__name__.partition(".")[0], error)


def autoload() -> None:
    """`install`, at the end of `import torch`: whatever goes wrong, torch is imported."""
    try:
        install()
    except Exception as error:
        log.debug("fp6: no integrations: %r", error)
