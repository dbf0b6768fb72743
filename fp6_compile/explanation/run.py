"""`explain`: describes the call to another process, answers its questions about weights, and returns what it found."""

from __future__ import annotations

import linecache
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fp6_compile.config import Options
from fp6_compile.explanation import process
from fp6_compile.explanation.explanation import Explanation
from fp6_compile.explanation.request import Request, Writer
from fp6_compile.explanation.result import Break
from fp6_compile.explanation.settings import Settings
from fp6_compile.explanation.values import Values
from fp6_compile.fake_gpu.devices import Device, device_named, this_device


def explain(
    model: nn.Module,
    *inputs: Any,
    device: str | torch.device | None = None,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Explanation:
    """What `torch.compile(model, backend="fp6", mode=mode, options=options)(*inputs, **kwargs)` would do.

    Nothing runs: the call is traced with tensors that have no values, on a GPU that need not be there. This happens in
    another process, to which the model's structure is sent and its weights are not. Nothing changes in this one: neither
    the model, nor what is compiled already, nor what other threads compile meanwhile. Weights on the meta device will do;
    their errors are then unknown. As in torch.compile, weights that require grad are skipped while grad mode is on: use
    torch.no_grad().

    Args:
        model: a module, or what torch.compile returned for one.
        inputs, kwargs: of the call to explain, for decoding one token with its static KV cache.
        device: where it would run: "H200", "RTX 4090", ... (fake_gpu.devices.DEVICES), "cpu", "cuda", or None: where the
            model is.
        mode, options: as for the backend, see config.Options.

    Raises:
        ValueError: an unknown device or option; a call that cannot be sent to another process; with `strict`, a linear that
            cannot be quantized.
        RuntimeError: the other process died.
    """
    parsed = Options.parse(mode, options)
    model = getattr(model, "_orig_mod", model)
    home = _home(model)
    about, target = _target(device, home)
    written = Writer((model, inputs, kwargs, parsed, Settings.of_this_thread()))
    request = Request(about, target, home.type, written.data)
    found = process.explained(request, Values(written.tensors))
    return Explanation(**{**vars(found), "breaks": tuple(map(_with_source, found.breaks))})


def _home(model: nn.Module) -> torch.device:
    """Where a model is: on the device of its first tensor that is on one."""
    devices = [tensor.device for tensor in (*model.parameters(), *model.buffers())]
    return next((device for device in devices if device.type != "meta"), torch.device("cpu"))


def _target(device: str | torch.device | None, home: torch.device) -> tuple[Device, str]:
    """What is known of the device, and the type of device of its tensors."""
    if device is None or str(device).split(":")[0] in ("cpu", "cuda"):
        where = home if device is None else torch.device(device)
        return this_device(where), where.type
    return device_named(str(device)), "cuda"


def _with_source(stop: Break) -> Break:
    """With the text of its line where only this process knows it: the cell of a notebook."""
    return stop if stop.source else replace(stop, source=linecache.getline(stop.file, stop.line).strip())
