"""Saves that are killed: the folder holds the old model or the new one."""

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fp6_compile
from tests.support.checkpoints import content, packed_tower
from tests.support.soak import count

pytest.importorskip("safetensors.torch", reason="safetensors is an optional extra")


class Killed(BaseException):
    """Not an Exception: nothing may catch it and tidy up."""


@contextlib.contextmanager
def _killed_at(point: int, monkeypatch):
    """The `point`-th call that changes the disk does not happen, and neither does anything after it."""
    calls = iter(range(point, -1, -1))

    def guarded(function):
        def call(*args, **kwargs):
            if next(calls, 0) <= 0:
                raise Killed
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for owner, name in ((os, "replace"), (os, "fsync"), (Path, "unlink"), (Path, "open"), (Path, "mkdir")):
            patch.setattr(owner, name, guarded(getattr(owner, name)))
        yield


def test_killed_at_every_step(saved, folder, monkeypatch):
    """Each step of a save in turn is its last: the folder is the old model or the new one, and can be saved to again."""
    new = packed_tower(seed=1)
    before = content(folder)
    fp6_compile.save(new, folder.with_name("new"), shard_bytes=200_000)
    after, outcomes = content(folder.with_name("new")), []
    for point in range(1, 100):
        shutil.rmtree(folder)
        shutil.copytree(saved, folder)
        try:
            with _killed_at(point, monkeypatch):
                fp6_compile.save(new, folder, shard_bytes=200_000)
        except Killed:
            found = content(folder)
            assert found in (before, after)
            outcomes.append(found == after)
        else:
            break
    assert len(outcomes) > 10
    assert outcomes == sorted(outcomes), "old up to one step, new from then on"
    assert True in outcomes
    assert False in outcomes


@pytest.mark.slow
def test_killed_at_random_times(tmp_path):
    """SIGKILL, 10 or 50 times, at random moments of a save: always the old model or the new one."""
    code = f"""
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)
import fp6_compile
from pathlib import Path
from tests.support.checkpoints import content, packed_tower

models = [packed_tower(0), packed_tower(1)]
folder = Path({str(tmp_path)!r}) / "model"
contents = []
for model in models:
    start = time.monotonic()
    fp6_compile.save(model, folder, shard_bytes=50_000)
    seconds = time.monotonic() - start
    contents.append(content(folder))
rng, now, outcomes = random.Random(0), 1, []
for _ in range({count(50, 10)}):
    child = os.fork()
    if not child:
        fp6_compile.save(models[1 - now], folder, shard_bytes=50_000)
        os._exit(0)
    time.sleep(rng.random() * seconds * 1.2)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found = contents.index(content(folder))
    outcomes.append(found != now)
    now = found
print(sum(outcomes), "new,", len(outcomes) - sum(outcomes), "old")
"""
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
