"""Tests of torch.distributed: two processes over gloo, or one that is alone."""

import contextlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import torch


def in_two_processes(case: Callable[[int], None], folder: Path) -> None:
    """Call `case(rank)`, a function of a module, in two new processes that are one process group."""
    torch.multiprocessing.spawn(_enter, (case, folder), nprocs=2)


def _enter(rank: int, case: Callable[[int], None], folder: Path) -> None:
    torch.set_num_threads(1)
    with group(folder, rank, 2):
        case(rank)


@contextlib.contextmanager
def group(folder: Path, rank: int = 0, size: int = 1) -> Iterator[None]:
    """A process group of `size` processes, of which this is one."""
    store = f"file://{folder / 'store'}"
    torch.distributed.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=120)
    )
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
