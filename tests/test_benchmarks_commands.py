"""The commands for a GPU machine, on stand-ins: benchmarks.all and the search of benchmarks.tune."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import all as everything
from benchmarks import tune
from benchmarks.decode.arguments import parse
from benchmarks.linear import __main__ as linear
from benchmarks.system import environment
from fp6_compile.kernels.selection import choices as device
from fp6_compile.kernels.selection import launch
from fp6_compile.kernels.triton.config import Config, config_for

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
    tiles = tune.candidates(m, 4096, 4096, None, torch.float16, torch.device("cpu"))
    assert tiles[0] == config_for(m, 4096, 4096)
    assert 2 <= len(set(tiles)) == len(tiles) <= 20


def test_the_launcher_takes_the_tile_it_is_given():
    with tune.with_tile(Config(32, 8, 2, 4)):
        assert launch.choices(1, 2, 3) == (Config(32, 8, 2, 4),)
    assert launch.choices is device.choices


# the one command


def stage(name, code, seconds=60.0, must_pass=False):
    return everything.Stage(name, (sys.executable, "-u", "-c", code), seconds, must_pass)


def test_benchmarks_run_after_failed_tests_and_the_exit_code_tells(tmp_path, capsys):
    todo = [stage("tests", "print('3 failed'); exit(1)", must_pass=True), stage("linear", "print('9 rows')")]
    assert everything.run_all(todo, tmp_path, {"kind": "stand-in"}) == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [(row["stage"], row["exit"], row["last_line"]) for row in summary["stages"]] == [
        ("tests", 1, "3 failed"),
        ("linear", 0, "9 rows"),
    ]
    assert "9 rows" in capsys.readouterr().out
    assert everything.run_all(todo[1:], tmp_path, {"kind": "stand-in"}) == 0


def test_a_stage_that_overruns_is_stopped_with_its_children_and_keeps_its_output(tmp_path):
    code = "import subprocess, sys; p = subprocess.Popen(['sleep', '600']); print(p.pid); p.wait()"
    todo = [stage("decode", code, seconds=3.0), stage("after", "print('still here')")]
    assert everything.run_all(todo, tmp_path, {}) == 0
    stopped, after = json.loads((tmp_path / "summary.json").read_text())["stages"]
    assert (stopped["exit"], after["exit"]) == ("out of time", 0)
    child = int((tmp_path / "decode.txt").read_text())
    status = Path(f"/proc/{child}/status")
    assert not status.exists() or "zombie" in status.read_text()


def test_what_is_run_fits_into_eight_minutes(tmp_path):
    todo = everything.stages(tmp_path, dry_run=False)
    assert [each.name for each in todo][:3] == ["tests", "quick", "linear"]
    assert sum(each.seconds for each in todo[:3]) + 70 <= everything.SECONDS
    assert everything.SECONDS + everything.KILL_AFTER <= 480 - 10
    assert {"tests/test_kernels_gpu.py", "tests/test_backend_gpu.py"} <= set(everything.gpu_tests())
    assert all((environment.ROOT / path).exists() for path in everything.gpu_tests())


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
