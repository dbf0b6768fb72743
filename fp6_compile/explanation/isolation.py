"""Using Dynamo without leaving a trace in it: no compiled code, no counts, no sizes remembered for other compilations.

`torch._dynamo.explain` resets Dynamo before and after. That would throw away everything the user has compiled, and with it
the packed weights of this backend.
"""

from __future__ import annotations

import contextlib
import copy
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch._dynamo import config, convert_frame, eval_frame, guards, output_graph, pgo
from torch._dynamo.utils import counters

_DYNAMO_CONFIG = {
    "automatic_dynamic_local_pgo": False,
    "automatic_dynamic_remote_pgo": False,
    "error_on_recompile": False,
    "suppress_errors": False,
    # The user's compiled code for the same functions counts, too.
    "recompile_limit": 1 << 16,
    "accumulated_recompile_limit": 1 << 16,
}


@contextlib.contextmanager
def isolated(backend: Callable[..., Any]) -> Iterator[list[Any]]:
    """Inside, compile with `backend`; on exit all that this left in Dynamo is gone.

    Yields a list that has, at the end, Dynamo's reasons for its graph breaks.
    """
    saved = copy.deepcopy(dict(counters))
    before, breaks = len(output_graph.graph_break_reasons), list[Any]()
    with (
        config.patch(_DYNAMO_CONFIG),
        torch._functorch.config.patch(enable_autograd_cache=False),
        mock.patch.object(pgo, "_CODE_STATE", defaultdict(pgo.CodeState)),
        mock.patch.object(pgo, "_INIT_CODE_STATE", None),
    ):
        try:
            yield breaks
        finally:
            breaks += output_graph.graph_break_reasons[before:]
            del output_graph.graph_break_reasons[before:]
            _forget_code(backend)
            counters.clear()
            counters.update(saved)


def _forget_code(backend: Callable[..., Any]) -> None:
    """Take what `backend` compiled out of Dynamo's caches, which hang on the code objects of Python functions."""
    for reference in list(convert_frame.input_codes.seen):
        code = reference()
        if code is None:
            continue
        entries = eval_frame._debug_get_cache_entry_list(code)
        ours = [entry for entry in entries if getattr(entry.backend, "compiler_fn", None) is backend]
        if ours and len(ours) == len(entries):
            torch._C._dynamo.eval_frame.reset_code(code)
            continue
        for entry in ours:  # beside the user's own: as Dynamo does when an object that a guard asks for is gone
            if (state := entry.guard_manager.extra_state) is not None:
                state.invalidate(entry, guards.DeletedGuardManagerWrapper("explain is over"))
