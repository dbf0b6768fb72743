"""Pictures of a file of results: `python -m benchmarks.plots RESULT.json [--out FOLDER]`. Needs matplotlib.

RESULT_speedup.png: cuBLAS' time over ours, over the batch size, a panel per measure and dtype, a line per weight.
RESULT_roofline.png: TFLOP/s over FLOP per byte, under the ceilings that the file holds.

A picture of predictions or stand-ins says across it that nothing was measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.linear.results import Row

LIMIT = 16 / 6  # bytes of sixteen bits over bytes of six
STYLES = {"fp6": "-", "torchao-int4": ":", "gemlite-int4": "-.", "humming": "--"}


def speedup(stored: dict[str, Any], path: Path) -> None:
    """Draw the speed-up of every provider but cuBLAS into `path`."""
    rows = [row for row in stored["rows"] if row["speedup"] and row["provider"] != "linear"]
    panels = sorted({(row["measure"], row["dtype"]) for row in rows}, reverse=True)
    figure, axes = _figure(stored, max(1, len(panels)))
    for axis, panel in zip(axes, panels, strict=False):
        for label, style, colour, line in _lines(row for row in rows if (row["measure"], row["dtype"]) == panel):
            ms, ratios = [row["m"] for row in line], [row["speedup"] for row in line]
            axis.plot(ms, ratios, style, color=colour, marker="o", markersize=3, linewidth=1.3, label=label)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.axhline(LIMIT, color="grey", linewidth=0.8, linestyle=(0, (4, 4)))
        axis.annotate("16 bits / 6 bits", (1, LIMIT), (0, 3), textcoords="offset points", fontsize=8, color="grey")
        ticks = sorted({row["m"] for row in rows})
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [str(m) for m in ticks], fontsize=8)
        axis.set_ylim(0, max(2.9, 1.05 * max(row["speedup"] for row in rows)))
        axis.set(title=f"{panel[1].upper()}, {_measure(panel[0])}", xlabel="M, rows of x")
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("speed-up over cuBLAS")
    axes[-1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)
    _save(figure, stored, path, f"Six-bit matmul over F.linear, {stored['device']}")


def roofline(stored: dict[str, Any], path: Path) -> None:
    """Draw every row's TFLOP/s over its FLOP per byte into `path`."""
    rows = [row for row in stored["rows"] if row["tflop_s"]]
    panels = sorted({(row["measure"], row["dtype"]) for row in rows}, reverse=True)
    figure, axes = _figure(stored, max(1, len(panels)))
    for axis, panel in zip(axes, panels, strict=False):
        mine = [row for row in rows if (row["measure"], row["dtype"]) == panel]
        _ceiling(axis, stored["copy_gb_s"] / 1e3, stored[f"matmul_{panel[1]}_tflop_s"], mine)
        for provider in dict.fromkeys(row["provider"] for row in mine):
            points = [row for row in mine if row["provider"] == provider]
            label = "cuBLAS" if provider == "linear" else provider
            axis.scatter([_intensity(row) for row in points], [row["tflop_s"] for row in points], s=14, label=label)
        axis.set(xscale="log", yscale="log", title=f"{panel[1].upper()}, {_measure(panel[0])}", xlabel="FLOP per byte")
        axis.grid(alpha=0.25, which="both")
        axis.legend(fontsize=8, loc="lower right")
    axes[0].set_ylabel("TFLOP/s")
    _save(figure, stored, path, f"Roofline, {stored['device']}")


def _lines(rows: Iterator[Row]) -> Iterator[tuple[str, str, str, list[Row]]]:
    """Label, style, colour and rows of each line: a colour per weight, a style per provider."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["shape"], row["provider"]), []).append(row)
    shapes = list(dict.fromkeys(shape for shape, _ in groups))
    several = len({provider for _, provider in groups}) > 1
    for (shape, provider), group in groups.items():
        label = f"{shape} {group[0]['n']}x{group[0]['k']}" + (f", {provider}" if several else "")
        position = shapes.index(shape) / max(1, len(shapes) - 1)
        yield label, STYLES.get(provider, "-"), _colour(position), sorted(group, key=lambda row: row["m"])


def _colour(position: float) -> Any:
    from matplotlib import colormaps

    return colormaps["turbo"](0.05 + 0.9 * position)


def _ceiling(axis: Any, tb_s: float, tflop_s: float, rows: Sequence[Row]) -> None:
    xs = sorted({*(_intensity(row) for row in rows), tflop_s / tb_s})
    axis.plot(xs, [min(x * tb_s, tflop_s) for x in xs], color="black", linewidth=1, label="ceilings")


def _intensity(row: Row) -> float:
    intensity: float = 2 * row["m"] * row["n"] * row["k"] / row["bytes"]
    return intensity


def _measure(name: str) -> str:
    return {
        "graph": "CUDA graph, rotating weights",
        "cold": "do_bench, cold L2",
        "model": "cost model",
    }[name]


def _figure(stored: dict[str, Any], panels: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    columns, lines = min(2, panels), -(-panels // 2)
    figure = Figure(figsize=(1.5 + 5.2 * columns, 0.4 + 4.2 * lines), layout="constrained")
    return figure, figure.subplots(lines, columns, squeeze=False).flatten()


def _save(figure: Any, stored: dict[str, Any], path: Path, title: str) -> None:
    about = [stored.get(name) for name in ("torch", "triton", "commit", "date")]
    note = "torch {}, triton {}, commit {}, {}".format(*about)
    if stored["kind"] != "measured":
        title = f"{stored['kind'].upper()}, not measured: {title}"
        style = {"fontsize": 44, "color": "grey", "alpha": 0.18, "rotation": 20, "ha": "center", "va": "center"}
        figure.text(0.5, 0.5, stored["kind"].upper(), **style)
    figure.suptitle(f"{title}\n{note}", fontsize=10)
    figure.savefig(path, dpi=110)
    print(path)


def draw(source: Path, folder: Path | None = None) -> list[Path]:
    """Both pictures of `source`, a .json file of results, into `folder` (beside it by default). Returns their paths."""
    stored = json.loads(source.read_text())
    paths = [(folder or source.parent) / f"{source.stem}_{name}.png" for name in ("speedup", "roofline")]
    speedup(stored, paths[0])
    roofline(stored, paths[1])
    return paths


def main() -> int:
    """Draw; exit code 1 without matplotlib."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, help="folder for the pictures")
    arguments = parser.parse_args()
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("benchmarks.plots: matplotlib is not installed")
        return 1
    for source in arguments.results:
        draw(source, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
