"""What `explain` returns: a result that can be printed, and written as HTML or JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

from fp6_compile.explanation.result import Result
from fp6_compile.explanation.show.page import page
from fp6_compile.explanation.show.terminal import renderable
from fp6_compile.explanation.show.text import text


class Explanation(Result):
    """What `torch.compile(model, backend="fp6")` would do with a call. `print`, notebooks and `rich.print` show it."""

    def text(self) -> str:
        """Plain text for a terminal, the same as str()."""
        return text(self)

    def json(self) -> str:
        """All fields, as one JSON object; an infinite SQNR is null."""
        data: dict[str, Any] = {**asdict(self), "predicted_not_measured": True, "kernels": self.kinds}
        for linear in data["linears"]:
            linear["sqnr"] = linear["sqnr"] if math.isfinite(linear["sqnr"] or 0) else None
        return json.dumps(data, indent=1)

    def html(self) -> str:
        """One HTML page that needs no other file and no network."""
        return page(self)

    def __str__(self) -> str:
        return self.text()

    def _repr_html_(self) -> str:
        return page(self, whole=False)

    def __rich__(self) -> Any:
        return renderable(self)
