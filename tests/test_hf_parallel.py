"""from_pretrained of packed folders under a tensor-parallel plan of transformers, in two processes."""

import functools
import os

import pytest
import torch

import fp6_compile
from tests.support.graphs import without_codegen
from tests.support.hf import TOKENS, llama, logits, transformers
from tests.support.processes import in_two_processes

if not torch.distributed.is_available():
    pytest.skip("torch was built without distributed", allow_module_level=True)
pytest.importorskip("transformers.distributed", reason="this transformers has no DistributedConfig")

# group_size
GROUPS = {"rows": None, "groups": 32}
# float32: sums in another order differ by little.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def _load(folder):
    config = transformers.distributed.DistributedConfig(tp_plan="auto", tp_size=2)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, distributed_config=config).eval()


def _compare(rank, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    for name in GROUPS:
        expected = torch.load(folder / f"{name}.pt")
        model = _load(folder / name)
        for layer in (model.model.layers[0].self_attn.q_proj, model.model.layers[0].mlp.down_proj):
            assert type(layer.weight.to_local()) is fp6_compile.PackedTensor
            assert layer.weight.to_local().numel() == layer.weight.numel() // 2
        compiled = torch.compile(model, backend="fp6")
        with torch.no_grad(), without_codegen():
            for run in (model, compiled):
                torch.testing.assert_close(run(TOKENS).logits, expected, **CLOSE)
    with pytest.raises(Exception, match="cut into|CONVERSION"):
        _load(folder / "uncut")


@pytest.mark.slow
def test_two_processes(tmp_path):
    for name, group_size in {**GROUPS, "uncut": 128}.items():
        model = llama(torch.float32)
        fp6_compile.quantize_(model, group_size=group_size, include_float32=True, skip=["lm_head"])
        model.save_pretrained(tmp_path / name)
        torch.save(logits(model), tmp_path / f"{name}.pt")
    in_two_processes(functools.partial(_compare, folder=tmp_path), tmp_path)
