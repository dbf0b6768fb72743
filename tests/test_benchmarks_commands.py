"""The commands for a GPU machine, on stand-ins: benchmarks.all and the search of benchmarks.tune."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import all as everything
from benchmarks import tune
from benchmarks.decode.arguments import parse
from benchmarks.first import __main__ as first
from benchmarks.first import exact, warm
from benchmarks.linear import __main__ as linear
from benchmarks.linear.shapes import FIRST_BATCHES, QUICK
from benchmarks.system import environment, stages
from fp6_compile.formats import FORMATS
from fp6_compile.kernels.selection import choices as device
from fp6_compile.kernels.selection import launch
from fp6_compile.kernels.triton.config import Config, Device, config_for
from fp6_compile.layouts.packing import gpu_layout, unpack

# tiles


def test_the_fastest_tile_is_found_and_set_against_the_heuristic():
    slow, fast, broken = Config(64, 8, 2, 3), Config(32, 8, 2, 4), Config(64, 64, 2, 3)

    def seconds(tile):
        if tile == broken:
            raise RuntimeError("out of shared memory")
        return {slow: 4e-6, fast: 3e-6}[tile]

    row = tune.fastest([slow, broken, fast], seconds)
    assert row == {
        **{
            "tile": {"BLOCK_N": 32, "BLOCK_M": 8, "num_warps": 2, "num_stages": 4, "SPLIT_K": 1, "JOIN": 1},
            "us": 3.0,
            "heuristic_us": 4.0,
        },
        **{"tried": 3, "failed": 1},
    }
    with pytest.raises(RuntimeError, match="none of 1 tiles ran"):
        tune.fastest([broken], seconds)


@pytest.mark.parametrize("m", [1, 16, 64, 256])
def test_candidates_start_with_the_heuristic_and_are_few(m):
    tiles = tune.candidates(m, 4096, 4096, None, torch.float16, torch.device("cpu"), FORMATS["e2m3"])
    assert tiles[0] == config_for(m, 4096, 4096)
    assert 2 <= len(set(tiles)) == len(tiles) <= 20


def test_the_launcher_takes_the_tile_it_is_given():
    with tune.with_tile(Config(32, 8, 2, 4)):
        assert launch.choices(1, 2, 3) == (Config(32, 8, 2, 4),)
    assert launch.choices is device.choices


# the one command


def stage(name, code, seconds=60.0, must_pass=False):
    return stages.Stage(name, (sys.executable, "-u", "-c", code), seconds, must_pass)


def test_benchmarks_run_after_failed_tests_and_the_exit_code_tells(tmp_path, capsys):
    todo = [stage("tests", "print('3 failed'); exit(1)", must_pass=True), stage("linear", "print('9 rows')")]
    assert stages.run_all(todo, tmp_path, {"kind": "stand-in"}, 60) == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [(row["stage"], row["exit"], row["last_line"]) for row in summary["stages"]] == [
        ("tests", 1, "3 failed"),
        ("linear", 0, "9 rows"),
    ]
    assert "9 rows" in capsys.readouterr().out
    assert stages.run_all(todo[1:], tmp_path, {"kind": "stand-in"}, 60) == 0


def test_a_stage_that_overruns_is_stopped_with_its_children_and_keeps_its_output(tmp_path):
    code = "import subprocess, sys; p = subprocess.Popen(['sleep', '600']); print(p.pid); p.wait()"
    todo = [stage("decode", code, seconds=3.0), stage("after", "print('still here')")]
    assert stages.run_all(todo, tmp_path, {}, 60) == 0
    stopped, after = json.loads((tmp_path / "summary.json").read_text())["stages"]
    assert (stopped["exit"], after["exit"]) == ("out of time", 0)
    child = int((tmp_path / "log.txt").read_text().splitlines()[1])
    status = Path(f"/proc/{child}/status")
    assert not status.exists() or "zombie" in status.read_text()


def test_a_stage_that_is_out_of_time_prints_its_summary(tmp_path):
    """pytest, interrupted as by Ctrl-C, says what has failed so far."""
    (tmp_path / "test_it.py").write_text("import time\ndef test_a(): assert 1 == 2\ndef test_b(): time.sleep(60)\n")
    command = (
        *stages.PYTHON,
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:hypothesispytest",
        "--rootdir",
        str(tmp_path),
    )
    todo = [stages.Stage("tests", (*command, str(tmp_path)), 5), stages.Stage("none", ("no-such-command",), 5)]
    assert stages.run_all(todo, tmp_path, {}, 30) == 0
    tests, none = json.loads((tmp_path / "summary.json").read_text())["stages"]
    assert (tests["exit"], none["exit"]) == ("out of time", "not found")
    assert "1 failed" in tests["last_line"]


def test_kernels_are_tested_first():
    names = stages.gpu_tests()
    assert "kernels" in names[0]
    assert names.index("tests/test_kernels_gpu.py") < names.index("tests/test_backend_gpu.py")


def test_the_commit_of_a_checkout_without_history(monkeypatch):
    monkeypatch.setattr(environment, "output", lambda *_: "")
    monkeypatch.setenv("FP6_COMMIT", "1234567")
    assert environment.versions()["commit"] == "1234567"


def test_what_is_run_fits_into_eight_minutes(tmp_path):
    todo = everything.stages(tmp_path, dry_run=False)
    assert [each.name for each in todo][:3] == ["tests", "quick", "linear"]
    assert sum(each.seconds for each in todo[:3]) + 70 <= everything.SECONDS
    assert everything.SECONDS + stages.PATIENCE <= 480 - 10
    assert {"tests/test_kernels_gpu.py", "tests/test_backend_gpu.py"} <= set(stages.gpu_tests())
    assert all((environment.ROOT / path).exists() for path in stages.gpu_tests())


@pytest.mark.parametrize(("gigabytes", "sizes"), [(141, ["8b", "70b", "1b"]), (24, ["8b", "1b"])])
def test_decode_fits_into_eight_minutes_and_70b_where_it_fits(gigabytes, sizes, tmp_path, monkeypatch):
    properties = SimpleNamespace(total_memory=gigabytes * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    todo = everything.decode_stages(tmp_path, dry_run=False)
    assert [each.name for each in todo] == [f"decode_{size}" for size in sizes]
    assert sum(each.seconds for each in todo) <= everything.SECONDS
    for each in todo:
        given, settings = parse(list(each.command[4:]))
        assert given.alone
        assert str(given.out) == str(tmp_path / f"{each.name}.json")
        assert {each.device for each in settings} == {"cuda"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU is told")
@pytest.mark.parametrize(("main", "command"), [(everything.main, ["all"]), (linear.main, ["linear"])])
def test_without_a_gpu_nothing_is_run(main, command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", command)
    assert main() == 2
    assert "no CUDA device" in capsys.readouterr().out


# the first quarter of an hour


@pytest.mark.parametrize(("what", "minutes"), [("kernels", 9), ("rest", 4)])
def test_the_first_commands_fit_and_write_few_files(what, minutes, tmp_path):
    todo = getattr(first, what)(tmp_path, False)
    assert first.SECONDS[what] + stages.PATIENCE <= 60 * minutes
    assert sum(each.seconds for each in todo) <= first.SECONDS[what] + 60, "few run as long as they may"
    assert todo[0].name in ("warm", "backend")
    assert next(each.name for each in todo if each.must_pass) in ("exact", "backend")
    files = [word for each in todo for word in each.command if word.startswith(str(tmp_path))]
    with_csv = len(files) + sum("linear" in file for file in files)
    assert with_csv + len(["log.txt", "summary.json"]) <= 7


def test_kernels_to_warm_are_those_that_the_launcher_takes():
    device = Device("sm_90", 132, wgmma=True)
    found = warm.kernels(device)
    tiles = {(kernel.tile, kernel.format) for kernel in found}
    for m in FIRST_BATCHES:
        for shape in QUICK:
            tile = config_for(m, shape.n, shape.k, None, torch.float16, device)
            assert tile is None or {(tile, "e2m3"), (tile, "e3m2")} <= tiles
    assert len(found) < 200


def test_what_is_not_exact_is_found():
    """One wrong bit, now and then."""
    fmt, calls = FORMATS["e3m2"], []

    def mm(x, planes, scale, fmt, group_size):
        calls.append(x)
        codes = unpack(planes, fmt, gpu_layout(x.dtype), scale.shape[1], x.shape[1])
        out = (x.double() @ fmt.decode(codes).double().T).to(x.dtype)
        out[0, 0] += len(calls) == spoiled
        return out

    for spoiled in (None, 1, 3):
        calls.clear()
        how = mm, fmt, torch.float16, "cpu"
        assert exact.codes_are_exact(*how, 64) == (spoiled is None)
        calls.clear()
        assert exact.integers_are_exact(*how, (3, 32, 512, 3)) == (spoiled is None)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["kernels", "rest"])
def test_a_dry_run_of_the_first_quarter_of_an_hour(what, tmp_path):
    """Every stage, as it is run on a GPU, in a process without the package's entry point and without git's history."""
    command = [sys.executable, "-m", "benchmarks.first", what, "--dry-run", "--out", str(tmp_path)]
    environ = {**os.environ, "FP6_COMMIT": "1234567", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=environment.ROOT, env=environ, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {row["exit"] for row in summary["stages"]} == {0}, summary
    assert len(list(tmp_path.iterdir())) <= 7
    if what == "kernels":
        exact = json.loads((tmp_path / "stand-in_exact.json").read_text())
        assert {row["outcome"] for row in exact} == {"exact"}
        assert len(exact) > 10


@pytest.mark.slow
def test_a_dry_run_goes_through_every_stage(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["all", "--dry-run", "--out", str(tmp_path / "dry")])
    monkeypatch.setattr(everything, "stages", lambda *_: everything_but_the_tests(tmp_path / "dry"))
    assert everything.main() == 0
    stored = json.loads((tmp_path / "dry" / "stand-in_linear.json").read_text())
    assert stored["kind"] == "stand-in"
    assert {(row["dtype"], row["measure"]) for row in stored["rows"]} == {
        (dtype, measure) for dtype in ("fp16", "bf16") for measure in ("host", "graph", "cold")
    }
    assert "exit 0" in capsys.readouterr().out


ALL_STAGES = everything.stages


def everything_but_the_tests(folder):
    return [each for each in ALL_STAGES(folder, dry_run=True) if each.name in ("quick", "linear")]
