"""transformers model folders: their configuration and their model without values. Nothing is asked, downloaded or run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from fp6_compile.packed.slots import init_empty_weights
from fp6_compile.storage.files import member, read_json, reason, short
from fp6_compile.storage.scaled import QUANTIZATION


def read_config(folder: Path, trust_remote_code: bool) -> Any:
    """The folder's configuration, as transformers makes it. Its own code is run only with `trust_remote_code`.

    Raises ValueError if there is no config.json, or none that transformers can read; if it needs code of the folder.
    """
    transformers = _transformers()
    try:
        read_json(member(folder, "config.json"))
    except FileNotFoundError as error:
        raise ValueError(f"{folder} has no config.json: not a transformers model folder") from error
    except ValueError as error:
        raise ValueError(f"cannot read {folder / 'config.json'}: {reason(error)}") from error
    return load(transformers.AutoConfig, folder, trust_remote_code)


def load(cls: Any, folder: Path, trust_remote_code: bool) -> Any:
    """What `cls.from_pretrained` makes of the folder, for an Auto class of transformers. ValueError as of `read_config`."""
    try:
        return cls.from_pretrained(str(folder), trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # whatever a configuration makes transformers' classes raise
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise ValueError(_needs_code(folder)) from error
        why = f"{type(error).__name__}: {short(error, 400)}"
        raise ValueError(f"{folder}: transformers' {cls.__name__} cannot read it: {why}") from error


def empty_model(folder: Path, dtype: str, trust_remote_code: bool) -> nn.Module:
    """The folder's model in `dtype` ("auto": its own), parameters on the meta device. Raises ValueError as `read_config`."""
    config = read_config(folder, trust_remote_code)
    make = _maker(config, folder, trust_remote_code)
    for key in QUANTIZATION:  # of what the folder's own weights are quantized with
        if hasattr(config, key):
            delattr(config, key)
    chosen = getattr(config, "dtype", None) if dtype == "auto" else getattr(torch, dtype)
    before = torch.get_default_dtype()
    with init_empty_weights():
        torch.set_default_dtype(chosen or before)
        try:
            model: nn.Module = make(config)
        except Exception as error:  # of sizes that do not go together, of the folder's own code, ...
            why = f"{type(error).__name__}: {short(error, 400)}"
            raise ValueError(f"{folder / 'config.json'}: no model can be made of it: {why}") from error
        finally:
            torch.set_default_dtype(before)
    return model.eval()


def _maker(config: Any, folder: Path, trust_remote_code: bool) -> Any:
    """What makes the model of a configuration."""
    transformers = _transformers()
    names = getattr(config, "architectures", None)
    name = names[0] if isinstance(names, list) and names else None
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found
    own = getattr(config, "auto_map", None) or {}
    auto = next((key for key, value in own.items() if str(value).endswith(f".{name}")), None)
    if auto is None or not hasattr(getattr(transformers, auto, None), "from_config"):
        where = f"transformers {transformers.__version__}"
        raise ValueError(f"{folder / 'config.json'}: architecture {short(name)!r} is not in {where}")
    if not trust_remote_code:
        raise ValueError(
            f"{folder} needs Python code that it brings along; --trust-remote-code runs it, if you trust it"
        )
    return lambda config: getattr(transformers, auto).from_config(config, trust_remote_code=True)


def _needs_code(folder: Path) -> str:
    return f"{folder} needs Python code that it brings along; --trust-remote-code runs it, if you trust it"


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError("transformers is needed to read a model folder: pip install transformers") from error
    return transformers
