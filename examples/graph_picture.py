"""Draw the graph before and after the pass: docs/graph.png, the picture in the README.

    python -m examples.graph_picture [--output docs/graph.png]

The two graphs are real: Inductor runs custom passes before and after the backend's, and here they record the graph.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, Node

COLORS = {
    "fp6.mm": "#7fd1c4",
    "fp6.dequantize": "#e9c46a",
    "x": "#e8e8e8",
    "bias": "#e8e8e8",
    "w4, w2, scale": "#f4b183",
}
Edges = dict[str, list[str]]


class Gate(nn.Module):
    """relu(gate(x)) * up(x): two linears of one input, which become one matmul, and what follows them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(256, 512)
        self.up = nn.Linear(256, 512, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.gate(x)) * self.up(x)


class Recorder(CustomGraphPass):
    """A pass that records the edges of the graph."""

    def __call__(self, graph: Graph) -> None:
        self.edges = edges(graph)

    def uuid(self) -> None:
        """None: no caching, because the pass does not run for a cached graph."""


def edges(graph: Graph) -> Edges:
    """Node label -> labels of its inputs. The three inputs of a packed weight are one node."""
    names: dict[Node, str] = {}
    found: Edges = {}
    for node in graph.nodes:
        if node.op != "output":
            names[node] = _label(node, found)
            inputs = [names[i] for i in node.all_input_nodes if names[i] != names[node]]
            found[names[node]] = list(dict.fromkeys(found.get(names[node], []) + inputs))
    return found


def _label(node: Node, known: Edges) -> str:
    """ "kind#number", or "kind#" for the only one."""
    if node.op == "placeholder":
        if node.meta["val"].dtype == torch.float16:
            return "bias#" if node.meta["val"].dim() == 1 else "x#"
        # w4, w2 and scale follow one another, and belong to the one that reads them.
        return f"w4, w2, scale#{next(iter(node.users)).name}"
    name = ".".join(str(node.target).split(".")[:2]).removeprefix("aten.")
    return f"{name}#{sum(label.startswith(name + '#') for label in known)}"


def capture() -> tuple[Edges, Edges]:
    """The joint graph of `Gate` before and after the pass."""
    before, after = Recorder(), Recorder()
    model = Gate().half().requires_grad_(False)
    settings: Any = {"joint_custom_pre_pass": before, "joint_custom_post_pass": after}
    torch.compile(model, backend="fp6", options={"inductor": settings})(torch.randn(4, 256).half())
    return before.edges, after.edges


def draw(axes: Axes, graph: Edges, title: str) -> None:
    """Draw each node above those that read it, with arrows down."""
    output = next(reversed(graph))
    across: dict[str, float] = {}
    _spread(output, graph, across)
    down: dict[str, int] = {}
    for label in reversed(graph):
        down[label] = max((down[reader] + 1 for reader in down if label in graph[reader]), default=0)
    for label, x in across.items():
        kind = label.split("#")[0]
        box = {"boxstyle": "round,pad=0.45", "facecolor": COLORS.get(kind, "white"), "edgecolor": "#555555"}
        axes.text(x, down[label], kind, ha="center", va="center", fontsize=10, bbox=box, zorder=2)
        for source in graph[label]:
            arrow = {"arrowstyle": "-|>", "color": "#888888", "shrinkA": 14, "shrinkB": 14}
            axes.annotate("", (x, down[label]), (across[source], down[source]), arrowprops=arrow, zorder=1)
    axes.set(xlim=(-0.7, max(across.values()) + 0.7), ylim=(-0.5, max(down.values()) + 0.5), title=title)
    axes.axis("off")


def _spread(label: str, graph: Edges, across: dict[str, float]) -> None:
    """Place a node below the inputs that are placed with it; a node without such inputs gets a column of its own."""
    fresh = [source for source in graph[label] if source not in across]
    for source in fresh:
        if source not in across:
            _spread(source, graph, across)
    column = max(across.values(), default=-1.0) + 1
    across[label] = sum(across[source] for source in fresh) / len(fresh) if fresh else column


def main() -> None:
    """Capture, draw, save."""
    parser = argparse.ArgumentParser(description="Draw the graph before and after the pass.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent.parent / "docs" / "graph.png")
    output = parser.parse_args().output
    before, after = capture()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5.5))
    draw(left, before, "before the pass")
    draw(right, after, "after the pass")
    figure.tight_layout()
    output.parent.mkdir(exist_ok=True)
    figure.savefig(output, dpi=110)
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
