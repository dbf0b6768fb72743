"""Datasheet figures of devices, by name: for predicting times, and for generating code without the device.

Bandwidths are peaks in GB/s (10^9 bytes); each has its source. The choice of tiles depends on multiprocessors, shared memory
and caches. A device of this machine is described by what torch says of it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Device:
    """One device.

    reported: what torch.cuda.get_device_name returns on it. arch: compute capability as a number (90 is sm_90), a gfx name,
    or None for a CPU. gb_per_s: peak bandwidth of the memory; None where it is not known. shared: bytes of shared memory
    that a block may use. l2_mb: the second-level cache, in MiB. source: where gb_per_s is from. multiprocessors, shared and
    l2_mb are 0 where no code can be generated.
    """

    name: str
    reported: str
    arch: int | str | None
    gb_per_s: float | None
    multiprocessors: int = 0
    shared: int = 0
    l2_mb: int = 0
    source: str = ""

    @property
    def is_cuda(self) -> bool:
        """Whether code can be generated for it as CUDA."""
        return isinstance(self.arch, int)


_HOPPER, _ADA = 232_448, 101_376  # bytes of shared memory
_CENTER, _CARDS = "https://www.nvidia.com/en-us/data-center/", "https://www.nvidia.com/en-us/geforce/graphics-cards/"
_MI300 = "https://www.amd.com/en/products/accelerators/instinct/mi300.html"
DEVICES = {
    device.name: device
    for device in (
        Device("B200", "NVIDIA B200", 100, 8000, 148, _HOPPER, 126, f"{_CENTER}hgx/, an eighth of it"),
        Device("H200", "NVIDIA H200", 90, 4800, 132, _HOPPER, 60, f"{_CENTER}h200/"),
        Device("H100", "NVIDIA H100 80GB HBM3", 90, 3350, 132, _HOPPER, 50, f"{_CENTER}h100/"),
        Device("H100 PCIe", "NVIDIA H100 PCIe", 90, 2000, 114, _HOPPER, 50, f"{_CENTER}h100/"),
        Device("H100 NVL", "NVIDIA H100 NVL", 90, 3900, 132, _HOPPER, 50, f"{_CENTER}h100/"),
        Device("A100", "NVIDIA A100-SXM4-80GB", 80, 2039, 108, 166_912, 40, f"{_CENTER}a100/"),
        Device("A100 PCIe", "NVIDIA A100 80GB PCIe", 80, 1935, 108, 166_912, 40, f"{_CENTER}a100/"),
        Device("A100 40GB", "NVIDIA A100-SXM4-40GB", 80, 1555, 108, 166_912, 40, f"{_CENTER}a100/"),
        Device("L40S", "NVIDIA L40S", 89, 864, 142, _ADA, 96, f"{_CENTER}l40s/"),
        Device("L4", "NVIDIA L4", 89, 300, 58, _ADA, 48, f"{_CENTER}l4/"),
        Device("A10", "NVIDIA A10", 86, 600, 72, _ADA, 6, f"{_CENTER}products/a10-gpu/"),
        Device("RTX 5090", "NVIDIA GeForce RTX 5090", 120, 1792, 170, _ADA, 96, f"{_CARDS}50-series/rtx-5090/"),
        Device("RTX 4090", "NVIDIA GeForce RTX 4090", 89, 1008, 128, _ADA, 72, f"{_CARDS}40-series/rtx-4090/"),
        Device("RTX 3090", "NVIDIA GeForce RTX 3090", 86, 936, 82, _ADA, 6, f"{_CARDS}30-series/rtx-3090-3090ti/"),
        Device("MI300X", "AMD Instinct MI300X", "gfx942", 5300, 304, 0, 0, _MI300),
    )
}


def device_named(name: str) -> Device:
    """The device called `name`, which may have more words than the known name, or fewer ("NVIDIA H200", "4090").

    Raises ValueError, listing the known names, for one that is not known.
    """
    asked = set(name.upper().replace("-", " ").split())
    words = {device.name: set(device.name.upper().split()) for device in DEVICES.values()}
    inside = [known for known in words if words[known] <= asked and "LAPTOP" not in asked]
    around = [known for known in words if asked <= words[known]]
    if not inside and len(around) != 1:
        raise ValueError(f"fp6: device {name!r}: known names are {', '.join(DEVICES)}; or 'cpu', 'cuda', or None")
    return DEVICES[max(inside, key=len) if inside else around[0]]


def this_device(device: torch.device) -> Device:
    """The device of a torch.device: a GPU as torch describes it, its bandwidth by its name; a CPU, measured."""
    if device.type != "cuda":
        return Device(f"this {device.type.upper()}", "", None, _measured(), source="measured now: the sum of 128 MB")
    about = torch.cuda.get_device_properties(device)
    try:
        known = device_named(about.name)
    except ValueError:
        known = Device(
            about.name, about.name, None, None, source="not in fp6_compile.devices, so its bandwidth is not known"
        )
    arch = about.major * 10 + about.minor if torch.version.hip is None else about.gcnArchName.split(":")[0]
    shared = getattr(about, "shared_memory_per_block_optin", _ADA)
    count, l2 = about.multi_processor_count, about.L2_cache_size >> 20
    return replace(known, reported=about.name, arch=arch, multiprocessors=count, shared=shared, l2_mb=l2)


def _measured() -> float:
    """GB/s at which the CPU reads memory, on torch's threads: the best of three sums."""
    data, best = torch.ones(1 << 25), 0.0
    for _ in range(3):
        start = time.perf_counter()
        data.sum()
        best = max(best, data.nbytes / 1e9 / (time.perf_counter() - start))
    return best
