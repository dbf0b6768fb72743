"""The benchmarks' own logic, on stand-ins: timing, rings, rows and files."""

import ast
import json
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.linear import __main__ as linear
from benchmarks.linear import bench, providers, timing
from benchmarks.linear.results import COLUMNS, FOLDER, Results
from benchmarks.linear.shapes import QUICK, SHAPES, get_shape
from benchmarks.system import environment

ROOT = Path(__file__).parent.parent
ABOUT = {"kind": "measured", "device": "a device", "torch": "1", "triton": "2", "commit": "3", "copy_gb_s": 100.0}


def test_benchmarks_do_not_import_tests():
    for path in (ROOT / "benchmarks").rglob("*.py"):
        names = {node.module for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)}
        assert not any((name or "").startswith("tests") for name in names), path


class Clock:
    """A device whose time is counted: 10 us for each run, and what its calls cost."""

    kind, device, l2_bytes, host_calls = "measured", torch.device("cpu"), 100, 2

    def __init__(self) -> None:
        self.now, self.log, self.longest = 0.0, [], 0

    def call(self, name, cost=3e-6):
        def run():
            self.now += cost
            self.log.append(name)

        return run

    def cold(self, call):
        return [self.seconds(call) for _ in range(5)]

    def record(self, calls):
        self.longest = max(self.longest, len(calls))
        return lambda: [call() for call in calls]

    def seconds(self, run):
        before = self.now
        self.now += 10e-6
        run()
        return self.now - before

    def synchronize(self):
        pass


# timing


def test_a_graph_is_long_enough_that_its_launch_is_nothing():
    clock = Clock()
    times = timing.graph(clock, [clock.call(name) for name in "abcde"], [100] * 5)
    assert len(times) >= 5
    assert times == pytest.approx([3e-6] * len(times), rel=0.01)
    assert "".join(clock.log[:10]) == "abcdeabcde", "weights are read in turn"
    assert len(set(map(clock.log.count, "abcde"))) == 1


def test_a_graph_does_not_grow_without_bound_and_slow_calls_are_not_repeated():
    clock = Clock()
    timing.graph(clock, [clock.call(name, 1e-9) for name in "abcde"], [100] * 5)
    assert clock.longest <= timing.GRAPH_CALLS
    slow = Clock()
    assert len(timing.graph(slow, [slow.call("a", 0.1), slow.call("b", 0.1)], [300, 300])) == 5
    assert slow.longest == 2


@pytest.mark.parametrize(("nbytes", "l2"), [(1, 60), (12 << 20, 50 << 20), (470 << 20, 50 << 20), (7, 7), (240, 60)])
def test_a_ring_is_more_than_four_caches_and_at_least_two_weights(nbytes, l2):
    copies = timing.ring_copies(nbytes, l2)
    assert copies >= 2
    assert copies * nbytes > 4 * l2
    assert copies == 2 or (copies - 1) * nbytes <= 4 * l2, "no more than needed"
    timing.check_ring([nbytes] * copies, l2)


def test_weights_that_could_stay_in_the_cache_are_not_timed():
    clock = Clock()
    with pytest.raises(ValueError, match="ring: 4 weights of 400 bytes in all could stay in an L2 cache of 100 bytes"):
        timing.graph(clock, [clock.call("a")] * 4, [100] * 4)
    assert clock.log == []
    with pytest.raises(ValueError, match="a weight of 0 bytes"):
        timing.ring_copies(0, 100)


def test_quantiles():
    assert timing.quantiles([4.0]) == (4.0, 4.0, 4.0)
    assert timing.quantiles([float(i) for i in range(11)]) == (2.0, 5.0, 8.0)


def test_host_time_leaves_out_the_first_calls():
    calls = []
    times = timing.host(Clock(), lambda: calls.append(0) or time.sleep(1e-4), repeats=3)
    assert len(times) == 3
    assert len(calls) == 8
    assert min(times) >= 1e-4


# providers and rows


def test_the_ring_of_every_provider_here_multiplies_the_same_random_weight():
    spec, weight = providers.Spec(torch.bfloat16), torch.randn(600, 256).bfloat16()
    rings = {name: bench.Ring.of(name, weight, spec, l2_bytes=100_000) for name in ("linear", "fp6")}
    assert rings["linear"].nbytes == 600 * 256 * 2
    assert rings["fp6"].nbytes == 600 * 256 * 6 // 8 + 600 * 4
    assert [len(ring.modules) for ring in rings.values()] == [2, 4]
    addresses = {module.w4.data_ptr() for module in rings["fp6"].modules}
    assert len(addresses) == 4, "copies, not views"
    x = torch.randn(3, 256).bfloat16()
    y, ours = rings["linear"].modules[0](x), rings["fp6"].modules[-1](x)
    assert 0 < (ours.float() - y.float()).norm() / y.float().norm() < 0.1
    assert rings["fp6"].modules[0].error(x, ours) < 4e-3
    assert not rings["fp6"].modules[0].error(x, ours * 1.02) < bench.TOLERANCE
    ours[0, 0] = torch.nan
    assert not rings["fp6"].modules[0].error(x, ours) <= bench.TOLERANCE, "NaN in a row that is not compared"


@pytest.mark.parametrize("name", [name for name in providers.PROVIDERS if providers.missing(name)])
def test_a_peer_that_is_missing_is_named_and_not_tried(name, capsys, tmp_path, monkeypatch):
    arguments = ["--dry-run", "--providers", "linear", name, "--m", "1", "--dtype", "fp16", "--out"]
    monkeypatch.setattr(sys, "argv", ["linear", *arguments, str(tmp_path / "stand-in.json")])
    assert linear.main() == 0
    assert f"{name}: not installed" in capsys.readouterr().out
    stored = json.loads((tmp_path / "stand-in.json").read_text())
    assert stored[name] == "not installed"
    assert {row["provider"] for row in stored["rows"]} == {"linear", "fp6"}, "fp6: the host's time"


def sweep(results, device=None, until=float("inf"), names=("linear", "fp6")):
    run = bench.Bench(device or timing.Cpu(), results, names, until)
    run.sweep([bench.Problem(get_shape("64x256"), "fp16", "e3m2", 64)], [1, 2])
    return run


STAND_IN = {**ABOUT, "kind": "stand-in"}


def test_rows_have_the_columns_and_their_figures_agree(tmp_path, capsys):
    results = Results(tmp_path / "stand-in.json", STAND_IN)
    run = sweep(results)
    assert run.failed == run.left_out == []
    stored = json.loads((tmp_path / "stand-in.json").read_text())
    assert len(stored["rows"]) == 2 * 2 * 2
    for row in stored["rows"]:
        assert list(row) == list(COLUMNS)
        assert row["kind"] == "stand-in"
        assert (row["format"], row["group_size"]) == (("e3m2", 64) if row["provider"] == "fp6" else (None, None))
        assert row["us_p20"] <= row["us_p50"] <= row["us_p80"]
        assert row["bytes"] == row["weight_bytes"] + (row["m"] * 256 + row["m"] * 64) * 2
        assert row["gb_s"] == pytest.approx(row["bytes"] / row["us_p50"] / 1e3, abs=0.01)
        assert row["share_of_copy"] == pytest.approx(row["gb_s"] / 100, abs=1e-3)
        assert (row["copies"] is not None) == (row["measure"] == "graph")
        if row["measure"] == "graph":
            assert row["copies"] * row["weight_bytes"] > 4 * timing.Cpu.l2_bytes
        (base,) = [
            each
            for each in stored["rows"]
            if each["provider"] == "linear" and (each["m"], each["measure"]) == (row["m"], row["measure"])
        ]
        assert row["speedup"] == pytest.approx(base["us_p50"] / row["us_p50"], abs=1e-3)
    lines = (tmp_path / "stand-in.csv").read_text().splitlines()
    assert len(lines) == 1 + 8
    assert lines[0].split(",")[: len(COLUMNS)] == list(COLUMNS)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 8
    assert all(line.startswith("stand-in") for line in printed)


def test_a_wrong_result_is_not_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(providers.SixBit, "forward", lambda self, x: x.new_zeros(x.shape[0], 64))
    results = Results(tmp_path / "stand-in.json", STAND_IN)
    run = sweep(results)
    assert len(run.failed) == 4
    assert all("fp6" in failure and "wrong: relative error 1.0" in failure for failure in run.failed)
    assert [row["us_p50"] for row in results.rows if row["provider"] == "fp6"] == [None] * 4
    assert all(row["us_p50"] for row in results.rows if row["provider"] == "linear")


def test_a_provider_that_cannot_be_built_is_tried_once(tmp_path, monkeypatch):
    def broken(weight, spec):
        raise RuntimeError("no kernel for this device\nand a long story")

    monkeypatch.setitem(providers.PROVIDERS, "fp6", broken)
    results = Results(tmp_path / "stand-in.json", STAND_IN)
    (failure,) = sweep(results).failed
    assert failure.endswith("failed: RuntimeError: no kernel for this device")
    assert len(results.rows) == 4 + 1


# files


def test_every_row_is_on_the_disk_at_once_and_a_killed_run_can_go_on(tmp_path):
    path = tmp_path / "stand-in.json"
    first = Results(path, STAND_IN)
    sweep(first, names=("linear",))
    kept = json.loads(path.read_text())["rows"]
    assert len(kept) == 4
    second = Results(path, {**STAND_IN, "date": "later"}, resume=True)
    sweep(second)
    stored = json.loads(path.read_text())
    assert stored["rows"][:4] == kept, "what was measured is not measured again"
    assert [row["provider"] for row in stored["rows"][4:]] == ["fp6"] * 4
    assert all(row["speedup"] for row in stored["rows"][4:]), "set against the rows of the first run"
    assert len(path.with_suffix(".csv").read_text().splitlines()) == 1 + 8
    assert not list(tmp_path.glob("*.part"))


def test_out_of_time_says_what_is_left(tmp_path):
    run = sweep(Results(tmp_path / "stand-in.json", STAND_IN), until=time.monotonic() - 1)
    assert len(run.left_out) == 8
    assert run.left_out[0] == "64x256 fp16 M = 1 graph linear"
    assert run.results.rows == []


@pytest.mark.parametrize("name", ["kind", "device", "torch", "triton", "commit"])
def test_another_run_is_not_resumed(tmp_path, name):
    Results(tmp_path / "predicted.json", {**ABOUT, "kind": "predicted"})
    with pytest.raises(ValueError, match=f"{name} was"):
        Results(tmp_path / "predicted.json", {**ABOUT, "kind": "predicted", name: "measured"}, resume=True)


def test_files_are_not_overwritten(tmp_path):
    Results(tmp_path / "a.json", ABOUT)
    with pytest.raises(ValueError, match="a.json: there already; resume it, or give another name"):
        Results(tmp_path / "a.json", ABOUT)


@pytest.mark.parametrize("kind", ["predicted", "stand-in"])
def test_what_is_not_measured_cannot_be_taken_for_it(tmp_path, kind):
    with pytest.raises(ValueError, match=f"{kind} figures are not stored in results, where measurements are"):
        Results(FOLDER / f"{kind}.json", {**ABOUT, "kind": kind})
    with pytest.raises(ValueError, match=f"a file of {kind} figures is called {kind}..."):
        Results(tmp_path / "linear.json", {**ABOUT, "kind": kind})
    with pytest.raises(ValueError, match=f"got a {kind} one, this file holds measured ones"):
        Results(tmp_path / "linear.json", ABOUT).add({"kind": kind})
    assert not list(FOLDER.glob(f"{kind}*"))


def test_unknown_columns_and_kinds_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"row: got \['ms'\], known columns are \['kind', "):
        Results(tmp_path / "a.json", ABOUT).add({"kind": "measured", "ms": 1})
    with pytest.raises(ValueError, match="kind: got 'guessed', known kinds are"):
        Results(tmp_path / "b.json", {**ABOUT, "kind": "guessed"})


def test_shapes():
    assert len({shape.name for shape in SHAPES}) == len({shape[1:3] for shape in SHAPES}) == len(SHAPES)
    assert {(8192, 8192), (4096, 4096), (1024, 4096)} < {shape[1:3] for shape in QUICK}
    assert all(shape.source for shape in SHAPES)
    assert get_shape("16x300")[1:3] == (16, 300)
    for name in ("16", "0x3", "ax3"):
        with pytest.raises(
            ValueError, match=f"shape: got '{name}', needs NxK, such as 4096x14336, or one of square-8192"
        ):
            get_shape(name)


# on a device


@pytest.mark.gpu
def test_both_measures_on_the_device(tmp_path):
    """What only a device can show: graphs are captured, and neither measure reads weights from the cache."""
    device = timing.Gpu()
    rates = timing.ceilings(device)
    results = Results(tmp_path / "linear.json", {**ABOUT, **environment.gpu(), **rates})
    run = bench.Bench(device, results, ["linear", "fp6"], float("inf"))
    run.sweep([bench.Problem(get_shape("8192x8192"), "fp16", "e3m2", None)], [1])
    assert run.failed == []
    assert len(results.rows) == 4
    for row in results.rows:
        assert 0 < row["share_of_copy"] < 1.15, "faster than memory: the weights were in the cache"
