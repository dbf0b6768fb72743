"""SIGKILL at random moments of a save, of a calibration with resume= and of the command line; and Ctrl-C.

One process per test imports everything, and forks a child for every kill. Delays are drawn from the time that the child's
work takes, so that most kills are in the midst of it; how many were is printed.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.soak import count

pytest.importorskip("safetensors.torch", reason="safetensors is an optional extra")

ROOT = Path(__file__).parent.parent
SETUP = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from torch import nn
import fp6_compile
from fp6_compile import cli

rng, kills, base = random.Random(0), int(sys.argv[1]), Path(sys.argv[2])


def in_a_child(work, delay=None, sign=signal.SIGKILL, err=os.devnull):
    '''Run it in a child, with a signal after `delay` seconds; its exit code, minus the signal if that was its end.'''
    child = os.fork()
    if not child:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for stream, path in ((1, os.devnull), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        code = 99
        try:
            code = work()
        finally:
            os._exit(code or 0)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, sign)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def seconds(work):
    start = time.monotonic()
    assert in_a_child(work) == 0
    return time.monotonic() - start


def bits(model):
    return [t.dequantize().numpy().tobytes() if isinstance(t, fp6_compile.PackedTensor) else t.numpy().tobytes()
            for t in model.state_dict().values()]
"""

SAVE = """
def model(seed):
    torch.manual_seed(seed)
    made = nn.Sequential(*(nn.Linear(128, 128) for _ in range(12))).half()
    fp6_compile.quantize_(made)
    return made


def content():
    with fp6_compile.init_empty_weights():
        other = nn.Sequential(*(nn.Linear(128, 128) for _ in range(12))).half()
    fp6_compile.load(other, base / "folder")
    return bits(other)


def save(which):
    fp6_compile.save(models[which], base / "folder", shard_bytes=20_000)


models = [model(0), model(1)]
known = [bits(m) for m in models]
save(0)
taken, now, killed, new = seconds(lambda: save(0)), 0, 0, 0
while killed < kills:
    killed += in_a_child(lambda: save(1 - now), rng.random() * taken) == -signal.SIGKILL
    found = known.index(content())
    new, now = new + (found != now), found
save(1)
assert content() == known[1]
INDEX = "model.safetensors.index.json"
shards = json.loads((base / "folder" / INDEX).read_bytes())["weight_map"].values()
assert {path.name for path in (base / "folder").iterdir()} == {INDEX, *shards}, "leftovers"
print(f"save: {killed} kills, {new} times the new model was there")
"""

RESUME = """
from fp6_compile.calibration.algorithms import GPTQ


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(128, 128)

    def forward(self, x):
        return x + self.linear(x)


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Block() for _ in range(6)), nn.Linear(128, 128)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def calibrated(folder=None):
    torch.manual_seed(0)
    model = Tower().half()
    fp6_compile.calibrate_(model, [torch.randn(32, 128).half()], algorithm=GPTQ(), resume=folder)
    return model


def work():
    calibrated(base / "state")


fresh = bits(calibrated())
taken, killed, midway = seconds(work), 0, 0
while killed < kills:
    shutil.rmtree(base / "state")
    for _ in range(2):  # a resumed one is killed, too
        killed += in_a_child(work, rng.random() * taken) == -signal.SIGKILL
    (base / "state").mkdir(exist_ok=True)
    midway += 0 < len(list((base / "state").glob("block-*.pt"))) < 6
    assert bits(calibrated(base / "state")) == fresh
print(f"resume: {killed} kills, {midway} times some of the blocks were there")
"""

COMMAND = """
import transformers

config = transformers.LlamaConfig(hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
                                  vocab_size=300, bos_token_id=0, eos_token_id=1)
transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(base / "source")
target = base / "target"


def parser():
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])  # from here on main is to answer for it
    return original()


def quantize():
    try:
        return cli.main(["quantize", str(base / "source"), str(target)])
    except KeyboardInterrupt:  # when main had returned
        assert sorted(target.glob("model*")) and not (target / ".fp6-compile-unfinished").exists()
        return 0


original, cli._parser = cli._parser, parser
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])


def content():
    return {path.name: path.read_bytes() for path in target.iterdir()}


taken = seconds(quantize)
whole = content()
INDEX = "model.safetensors.index.json"
assert INDEX in whole
counts = {}
for sign, wanted in (("SIGKILL", kills), ("SIGINT", kills // 3)):
    interrupted, midway = 0, 0
    while interrupted < wanted:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        shutil.rmtree(target)
        code = in_a_child(quantize, rng.random() * taken, getattr(signal, sign), base / "stderr")
        stopped = code == (-9 if sign == "SIGKILL" else 130)
        interrupted += stopped
        assert stopped or code == 0, (sign, code)
        if stopped and sign == "SIGINT":
            assert (base / "stderr").read_text() == "fp6: interrupted\\n", (base / "stderr").read_text()
            assert not target.exists()
        if target.exists() and (target / INDEX).exists():
            assert whole.items() <= content().items()
            shutil.rmtree(target)
        midway += target.exists()
        assert quantize() == 0
        assert content() == whole
    counts[sign] = f"{interrupted} {sign}, {midway} times a part of the folder was there"
print(f"command: {'; '.join(counts.values())}")
"""


def _run(code: str, kills: int, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SETUP + code, str(kills), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr
    print(done.stdout.splitlines()[-1])


CASES = {"save": SAVE, "resume": RESUME, "command": COMMAND}


@pytest.mark.slow
@pytest.mark.parametrize("what", CASES)
def test_killed_many_times(what, tmp_path):
    _run(CASES[what], count(64, 6), tmp_path)
