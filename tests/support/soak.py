"""How long soak tests are: short in CI, as long as docs/internals/soundness.md says with FP6_SOAK=full."""

import os

FULL = os.environ.get("FP6_SOAK") == "full"


def count(full: int, short: int) -> int:
    """`full` with FP6_SOAK=full, else `short`."""
    return full if FULL else short
