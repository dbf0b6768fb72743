"""Compile caches: a second process hits them, an edited source file misses them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fp6_compile
from fp6_compile.kernels.cpu import build
from tests.support.caches import fresh_cache
from tests.support.soak import FULL

# By function, not by name: the entry point would find the installed package instead of the copy under test.
_HEAD = """
import json, sys, torch, fp6_compile
from torch import nn
from torch._dynamo.utils import counters
from fp6_compile.backend.compile import fp6

torch.manual_seed(0)
"""
_TAIL = """
found = {key: counters["aot_autograd"][f"autograd_cache_{key}"] for key in ("hit", "miss", "bypass")}
found |= {f"fx_{key}": counters["inductor"][f"fxgraph_cache_{key}"] for key in ("hit", "miss", "bypass")}
found |= {"sum": out.double().sum().item(), "file": fp6_compile.__file__, "merged": counters["fp6"]["merged"]}
print(json.dumps(found))
"""
# Projections that share an input are merged, others are not.
LAYER = """
class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.o = nn.Linear(256, 128), nn.Linear(256, 128), nn.Linear(128, 256)

    def forward(self, x):
        return self.o(self.q(x) * self.k(x))

model = Layer().half().requires_grad_(False)
out = torch.compile(model, backend=fp6)(torch.randn(3, 256).half())
"""
# As it is and packed; two batches make the second graph dynamic; a prompt and tokens from a static cache.
LLAMA = """
from transformers import LlamaConfig, LlamaForCausalLM

sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 256}
model = LlamaForCausalLM(LlamaConfig(**sizes)).half().eval()
if PACKED:
    fp6_compile.quantize_(model)
compiled = torch.compile(model, backend=fp6)
with torch.no_grad():
    for batch in (2, 3):
        out = compiled(torch.ones(batch, 7, dtype=torch.long)).logits
    model.generation_config.pad_token_id = 0
    model.forward = torch.compile(model.forward, backend=fp6)
    how = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    tokens = model.generate(torch.ones(2, 7, dtype=torch.long), **how)
    out = torch.cat([out.flatten(), tokens.flatten()])
"""


def _run(root: Path, cache: Path, script: str = LAYER) -> dict:
    environment = {**fresh_cache(cache), "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", _HEAD + script + _TAIL]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert Path(found.pop("file")).is_relative_to(root)
    return found


@pytest.fixture
def copy(tmp_path):
    """A copy of the package, whose files a test may edit."""
    shutil.copytree(
        Path(fp6_compile.__file__).parent, tmp_path / "fp6_compile", ignore=shutil.ignore_patterns("__pycache__")
    )
    return tmp_path


@pytest.mark.slow
def test_second_process_hits_and_an_edited_kernel_misses(copy):
    cache = copy / "cache"
    if build.load():  # the C++ kernel is not what is cached here, and takes half a minute
        shutil.copytree(build._build().parent, cache / "fp6_compile")
    first = _run(copy, cache)
    assert first["merged"] == 1
    assert (first["miss"], first["bypass"], first["fx_miss"], first["fx_bypass"]) == (1, 0, 1, 0)

    second = _run(copy, cache)
    assert (second["hit"], second["miss"], second["bypass"]) == (1, 0, 0)
    assert (second["fx_hit"], second["fx_miss"]) == (1, 0)
    assert second["sum"] == first["sum"]

    (copy / "fp6_compile/kernels/selection/tuned").mkdir(exist_ok=True)
    (copy / "fp6_compile/kernels/selection/tuned/a_device.json").write_text("{}")
    for file in ("kernels/triton/mm.py", "lowerings/fp6_mm.py.jinja", "kernels/selection/tuned/a_device.json"):
        with (copy / "fp6_compile" / file).open("a") as source:
            source.write("\n# an edit\n")
        edited = _run(copy, cache)
        assert (edited["hit"], edited["miss"], edited["fx_hit"]) == (0, 1, 0), file


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True] if FULL else [False])
def test_second_process_of_a_transformers_model(packed, tmp_path):
    """Prefill, a dynamic batch and generate: every graph is a full hit, and none is bypassed."""
    root = Path(fp6_compile.__file__).parent.parent
    first, second = (_run(root, tmp_path, LLAMA.replace("PACKED", str(packed))) for _ in range(2))
    assert first["merged"] > 0
    assert first["bypass"] == first["fx_bypass"] == second["bypass"] == second["fx_bypass"] == 0
    assert second["miss"] == second["fx_miss"] == 0
    assert second["hit"] == first["miss"] + first["hit"] > 2
    assert second["sum"] == first["sum"]


# `torch.compiler.save_cache_artifacts` to a file, or a file loaded into a cache that is empty.
ARTIFACTS = """
from pathlib import Path
file, inner = Path("FILE"), LAYER
if file.exists():
    assert torch.compiler.load_cache_artifacts(file.read_bytes()) is not None
exec(inner)
if not file.exists():
    file.write_bytes(torch.compiler.save_cache_artifacts()[0])
"""


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_artifacts_carry_the_graphs_to_another_machine(packed, copy):
    pack = "\nfp6_compile.quantize_(model)\nout = " if packed else "\nout = "
    script = ARTIFACTS.replace("LAYER", repr(LAYER.replace("\nout = ", pack))).replace("FILE", str(copy / "artifacts"))
    first, second = (_run(copy, copy / name, script) for name in ("here", "there"))
    assert (first["miss"], first["bypass"], first["fx_miss"]) == (1, 0, 1)
    assert (second["hit"], second["miss"], second["fx_hit"], second["fx_miss"]) == (1, 0, 1, 0)
    assert second["sum"] == first["sum"]

    with (copy / "fp6_compile/ops.py").open("a") as source:
        source.write("\n# an edit\n")
    edited = _run(copy, copy / "edited", script)
    assert (edited["hit"], edited["miss"], edited["fx_hit"]) == (0, 1, 0)
    assert edited["sum"] == first["sum"]
