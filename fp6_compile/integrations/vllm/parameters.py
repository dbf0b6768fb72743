"""Bit planes and scales as vLLM loads them: [N, columns], cut along N as 16-bit weights are, and along K in whole groups.

vLLM cuts what it is given without asking how large it is, and casts it. So sizes and dtype are checked before.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from fp6_compile.integrations.vllm.compat import ChannelQuantScaleParameter, ModelWeightParameter


class _WithCheckedRows:
    """Its rows are a part of the loaded tensor's, or all."""

    def _check(self: Any, loaded: Tensor, rows: int) -> None:
        if loaded.shape[0] != rows:
            raise ValueError(f"fp6: {self.title} is {list(loaded.shape)} in the folder, needs {rows} rows")

    def load_column_parallel_weight(self: Any, loaded_weight: Tensor) -> None:
        self._check(loaded_weight, self.tp_size * self.shape[0])
        super().load_column_parallel_weight(loaded_weight)  # type: ignore[misc]

    def load_row_parallel_weight(self: Any, loaded_weight: Tensor) -> None:
        self._check(loaded_weight, self.shape[0])
        super().load_row_parallel_weight(loaded_weight)  # type: ignore[misc]

    def load_merged_column_weight(self: Any, loaded_weight: Tensor, **where: Any) -> None:
        self._check(loaded_weight, self.tp_size * where["shard_size"])
        super().load_merged_column_weight(loaded_weight, **where)  # type: ignore[misc]

    def load_qkv_weight(self: Any, loaded_weight: Tensor, **where: Any) -> None:
        # `num_heads` ranks have the same heads of k and v.
        ranks = self.tp_size if where["shard_id"] == "q" else self.tp_size // where["num_heads"]
        self._check(loaded_weight, ranks * where["shard_size"])
        super().load_qkv_weight(loaded_weight, **where)  # type: ignore[misc]


class _Grouped(_WithCheckedRows, ModelWeightParameter):
    """A bit plane, or the scales of groups."""


class _PerRow(_WithCheckedRows, ChannelQuantScaleParameter):
    """One scale a row: where the inputs are cut, all parts have it."""


def make_parameter(
    title: str, shape: tuple[int, int], dtype: torch.dtype, columns: int, loader: Callable[..., Any]
) -> Any:
    """A parameter [rows, columns of this rank] for what is called `title` in messages and has `columns` in the folder.

    Loading raises ValueError for another dtype, for other columns, and for rows that are not those of all ranks together.
    """

    @wraps(loader)
    def checked(param: Any, loaded_weight: Tensor, *shard: Any, **named: Any) -> Any:
        if loaded_weight.dtype != dtype:
            raise ValueError(f"fp6: {title} is {loaded_weight.dtype} in the folder, needs {dtype}")
        if loaded_weight.dim() != 2 or loaded_weight.shape[1] != columns:
            raise ValueError(f"fp6: {title} is {list(loaded_weight.shape)} in the folder, needs {columns} columns")
        return loader(param, loaded_weight, *shard, **named)

    data = torch.empty(shape, dtype=dtype)
    if columns == 1:
        parameter = _PerRow(data=data, output_dim=0, weight_loader=checked)
    else:
        parameter = _Grouped(data=data, output_dim=0, input_dim=1, weight_loader=checked)
    parameter.title = title
    return parameter
