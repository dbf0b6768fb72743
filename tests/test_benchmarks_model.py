"""The benchmarks' cost model: known points, monotony, its label on everything; and the pictures."""

import json
import sys

import pytest
import torch

from benchmarks import plots
from benchmarks.linear import __main__ as linear
from benchmarks.linear import bench, simulate
from benchmarks.linear.shapes import get_shape
from fp6_compile.formats import FORMATS
from fp6_compile.layouts.gpu_tiles import GPU_LAYOUTS
from fp6_compile.layouts.packing import pack


def predicted(m, shape="28672x8192", assumed=simulate.ASSUMED, dtype="fp16", group=None):
    problem = bench.Problem(get_shape(shape), dtype, "e3m2", group)
    return list(simulate.predict(problem, m, "sm_90", assumed))


def test_one_row_of_a_large_weight_is_bound_by_bytes():
    base, ours = predicted(1, assumed=simulate.Assumed(launch_us=0))
    assert ours["note"] == "predicted, limited by dram"
    assert ours["speedup"] == pytest.approx(16 / 6, rel=2e-3)
    assert base["us_p50"] == pytest.approx(28672 * 8192 * 2 / (4.8e6 * 0.9), rel=1e-3)


def test_a_launch_costs_the_same_for_all():
    (base, ours), (free, ours_free) = predicted(1), predicted(1, assumed=simulate.Assumed(launch_us=0))
    assert base["us_p50"] - free["us_p50"] == pytest.approx(simulate.ASSUMED.launch_us)
    assert ours["us_p50"] - ours_free["us_p50"] == pytest.approx(simulate.ASSUMED.launch_us)


@pytest.mark.slow
def test_more_work_never_takes_less_time():
    """Within a tile's range of M; and with more rows, inputs or scales of the weight."""
    times = [[row["us_p50"] for row in predicted(m)] for m in (1, 2, 4, 8)]
    assert times == sorted(times)
    by_size = [predicted(1, shape)[1]["us_p50"] for shape in ("16384x4096", "28672x4096", "28672x8192", "57344x8192")]
    assert by_size == sorted(by_size)
    assert predicted(1, group=64)[1]["us_p50"] > predicted(1)[1]["us_p50"]


def test_few_programs_cannot_keep_enough_loads_in_flight():
    free = simulate.Assumed(launch_us=0)
    _, small = predicted(1, "128x1024", free)
    assert small["note"] == "predicted, limited by dram"
    assert small["gb_s"] < 0.3 * predicted(1, assumed=free)[1]["gb_s"]


def test_many_rows_are_not_predicted_to_be_bound_by_bytes():
    assert predicted(1024)[1]["note"] != "predicted, limited by dram"
    assert predicted(4096)[0]["note"] == "predicted, limited by tensor"


def test_the_size_of_a_weight_is_what_pack_makes():
    w4, w2 = pack(torch.zeros(40, 300, dtype=torch.uint8), FORMATS["e3m2"], GPU_LAYOUTS[torch.float16])
    assert simulate.weight_bytes(40, 300, 2) == w4.nbytes + w2.nbytes + 40 * 2 * 4


@pytest.fixture
def prediction(tmp_path, monkeypatch, capsys):
    """A file of predictions, and what was printed."""
    path = tmp_path / "predicted_sm_90.json"
    command = "linear --simulate sm_90 --shapes 28672x4096 llama3-8b.o --m 1 8 --dtype fp16 --out"
    monkeypatch.setattr(sys, "argv", [*command.split(), str(path)])
    assert linear.main() == 0
    return path, capsys.readouterr().out


def test_a_prediction_says_so_everywhere(prediction):
    path, printed = prediction
    stored = json.loads(path.read_text())
    assert stored["kind"] == "predicted"
    assert stored["device"] == "H200 SXM (sm_90), predicted"
    assert stored["assumed"]["launch_us"] == simulate.ASSUMED.launch_us
    assert len(stored["rows"]) == 8
    assert all(row["kind"] == "predicted" and row["note"].startswith("predicted") for row in stored["rows"])
    assert all(line.startswith("predicted,") for line in path.with_suffix(".csv").read_text().splitlines()[1:])
    figures = [line for line in printed.splitlines() if "llama3" in line or "28672" in line]
    assert len(figures) == 8
    assert all(line.startswith("predicted") for line in figures)
    assert printed.splitlines()[-1] == "All of these are predictions of a model; none was measured."


def test_pictures(prediction, tmp_path):
    pytest.importorskip("matplotlib")
    paths = plots.draw(prediction[0], tmp_path)
    assert [path.name for path in paths] == ["predicted_sm_90_speedup.png", "predicted_sm_90_roofline.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000 for path in paths)


@pytest.mark.parametrize(("kind", "marked"), [("predicted", True), ("stand-in", True), ("measured", False)])
def test_a_picture_of_what_is_not_measured_says_so(kind, marked, tmp_path):
    matplotlib_figure = pytest.importorskip("matplotlib.figure")
    figure = matplotlib_figure.Figure()
    plots._save(figure, {"kind": kind}, tmp_path / "a.png", "title")
    across = [text.get_text() for text in figure.texts if text.get_fontsize() == 44]
    assert across == ([kind.upper()] if marked else [])
    assert figure.get_suptitle().startswith(f"{kind.upper()}, not measured" if marked else "title")
