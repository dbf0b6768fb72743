"""One provider: its model, its compiled prefill and step, and their figures."""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.decode import breakdown
from benchmarks.decode.loop import Forward, Sampling, State, make_prefill, make_step, run
from benchmarks.decode.model import local, lora
from benchmarks.decode.model.llama import SIZES, Llama, parameter_count
from benchmarks.decode.model.weights import KINDS, build, weight_bytes
from benchmarks.system import memory
from examples.code_lm.model import KVCache
from fp6_compile.backend.compile import fp6

# The kind of weights and the backend of each provider.
PROVIDERS: dict[str, tuple[str, str | Callable[..., Any] | None]] = {
    "eager": ("float", None),
    "inductor": ("float", "inductor"),
    "fp6": ("fp6", fp6),  # the function, and not its name: a checkout that is not installed has no entry point
    "int8": ("int8", "inductor"),
    "int4": ("int4", "inductor"),
}
WARM_UP = 2  # calls: a CUDA graph is recorded in the second


@dataclass(frozen=True)
class Settings:
    """What is decoded, and how. `model` is a size of SIZES or a folder; `cache` a folder for compiled code."""

    provider: str
    model: str
    device: str
    dtype: str
    prompt: int
    tokens: int
    steps: int = 1
    threads: int | None = None
    head: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    lora: int | None = None
    packing: dict[str, Any] = field(default_factory=dict)
    cache: str | None = None
    trust_remote_code: bool = False


class Bench:
    """One provider: its model, and for the present batch size its compiled prefill and step."""

    state: State
    cache: list[Tensor]
    rewind: Callable[[], Any]  # to an empty cache
    prefill: Callable[[], None]
    step: Callable[[], None]

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        if settings.threads:
            torch.set_num_threads(settings.threads)
        if settings.cache:
            use_cache(Path(settings.cache))
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[settings.dtype]
        start = time.perf_counter()
        self.model = self._build()
        self.adapters = lora.attach(self.model, settings.lora) if settings.lora else []
        lora.swap(self.model, lora.random_adapter(self.adapters, self.model, 0))
        total, read = weight_bytes(self.model)
        self.known = {
            "weight_bytes": total,
            "read_bytes": read,
            "build_s": round(time.perf_counter() - start, 1),
            "threads": torch.get_num_threads(),
        }

    def _build(self) -> nn.Module:
        settings, (kind, _) = self.settings, PROVIDERS[self.settings.provider]
        how: dict[str, Any] = {"dtype": self.dtype, "device": settings.device, **settings.packing}
        if settings.model not in SIZES:
            how["trust_remote_code"] = settings.trust_remote_code
            return local.load(settings.model, kind, head=settings.head, **how)
        config = SIZES[settings.model]
        memory.check(parameter_count(config) * KINDS[kind] / 8, settings.device)
        return build(config, kind, head=settings.head, **how)

    def prepare(self, batch: int) -> dict[str, Any]:
        """Compile for `batch` sequences and warm up. Returns the figures of that."""
        settings = self.settings
        for of_last_batch in ("step", "prefill", "rewind", "cache", "state"):
            vars(self).pop(of_last_batch, None)
        torch._dynamo.reset()
        memory.trim(settings.device)
        # Rounded up, because attention kernels of GPUs want aligned masks. The last token chosen is in no cache.
        length = -(-(settings.prompt + settings.tokens) // 16) * 16
        forward, self.rewind, self.cache = self._cache(batch, length)
        self.state = State(batch, length + 1, settings.sampling, settings.device)
        prompt = torch.arange(batch * settings.prompt, device=settings.device).view(batch, -1) % 251
        step, prefill = make_step(forward, self.state, settings.steps), make_prefill(forward, self.state)
        start = time.perf_counter()
        self.step, self.prefill = (
            self._compiled(step, cuda_graph=True),
            functools.partial(self._compiled(prefill), prompt),
        )
        self._run(WARM_UP)
        taken = time.perf_counter() - start
        memory.trim(settings.device)
        cache_bytes = sum(tensor.nbytes for tensor in self.cache)
        counters = torch._dynamo.utils.counters["aot_autograd"]
        return {
            "compile_s": round(taken, 1),
            "cache_hits": counters["autograd_cache_hit"],
            "cache_misses": counters["autograd_cache_miss"],
            "kv_cache_bytes": cache_bytes,
            "resident_bytes": memory.resident(settings.device),
        }

    def round(self) -> tuple[float, list[float], list[int]]:
        """Seconds of a prefill, seconds a token of every step, and the tokens of the first sequence."""
        settings = self.settings
        prefill, seconds = self._run(settings.tokens // settings.steps)
        chosen = self.state.chosen[0, settings.prompt : settings.prompt + settings.tokens].tolist()
        return prefill, [taken / settings.steps for taken in seconds], chosen

    def peak(self) -> int | None:
        """The most bytes in memory so far, building included: of the process on a CPU, allocated on a GPU."""
        return memory.peak(self.settings.device)

    def kernels(self) -> float | None:
        """How many kernels a GPU runs for a token; None on a CPU."""
        if self.settings.device != "cuda":
            return None
        self._run(1)
        with torch.inference_mode():
            return breakdown.kernels(self.step, self.settings.steps)

    def breakdown(self, token_ms: float) -> dict[str, float]:
        """Milliseconds of a token by role. On a GPU without CUDA graphs, because the profiler records no shapes in those.

        There the rest of `token_ms`, the time of a token with CUDA graphs, is the time between kernels.
        """
        settings, roles = self.settings, breakdown.roles(self.model, self.cache)
        step = self.step
        if settings.device == "cuda":
            forward, self.rewind, _ = self._cache(self.state.token.shape[0], self.state.chosen.shape[1] - 1)
            step = self._compiled(make_step(forward, self.state, settings.steps))
        self._run(1)
        with torch.inference_mode():
            step()
            parts = breakdown.measure(
                step, roles, settings.device, settings.steps, calls=min(8, settings.tokens // settings.steps - 2)
            )
        if settings.device == "cuda":
            parts[breakdown.GAPS] = round(max(0.0, token_ms - sum(parts.values())), 4)
        return parts

    def adapter(self) -> dict[str, float]:
        """Milliseconds to swap all adapters, and to fuse them: until the next step is over, less those of a usual step."""
        fresh = [lora.random_adapter(self.adapters, self.model, seed) for seed in range(1, 6)]
        usual = statistics.median(self._next_step(lambda: None) for _ in fresh)
        swapped, fused = [], []
        for values in fresh:
            swapped.append(self._next_step(lambda values=values: lora.swap(self.model, values)))  # type: ignore[misc]
            fused.append(self._next_step(lambda: [lora.fuse(layer) for layer in self.adapters]))
        return {
            "swap_ms": round(statistics.median(swapped) - usual, 2),
            "fuse_ms": round(statistics.median(fused) - usual, 2),
        }

    def _next_step(self, change: Callable[[], Any]) -> float:
        self._run(1)
        memory.synchronize(self.settings.device)
        start = time.perf_counter()
        change()
        with torch.inference_mode():
            self.step()
        memory.synchronize(self.settings.device)
        return (time.perf_counter() - start) * 1e3

    def _run(self, calls: int) -> tuple[float, list[float]]:
        self.rewind()
        return run(self.prefill, self.step, calls, self.settings.device)

    def _compiled(self, function: Callable[..., Any], cuda_graph: bool = False) -> Callable[..., Any]:
        _, backend = PROVIDERS[self.settings.provider]
        if backend is None:
            return function
        mode = "reduce-overhead" if cuda_graph and self.settings.device == "cuda" else None
        return torch.compile(function, backend=backend, mode=mode, fullgraph=True, dynamic=False)

    def _cache(self, batch: int, length: int) -> tuple[Forward, Callable[[], Any], list[Tensor]]:
        """(forward, a function that empties the cache, its tensors)."""
        model, device = self.model, self.settings.device
        if not isinstance(model, Llama):
            return local.static_cache(model, batch, length, self.dtype, device)
        cache = KVCache.allocate(model.config, batch, length, dtype=self.dtype, device=device)
        return lambda tokens, positions: model(tokens, positions, cache), lambda: None, [*cache.keys, *cache.values]


def use_cache(folder: Path) -> None:
    """Keep compiled code in `folder` from now on, but for the C++ kernel, which is built once for a machine."""
    from torch._inductor.runtime.runtime_utils import cache_dir

    kernels = Path(cache_dir()) / "fp6_compile"
    kernels.mkdir(parents=True, exist_ok=True)
    if not (folder / kernels.name).exists():
        (folder / kernels.name).symlink_to(kernels)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
