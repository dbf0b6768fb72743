"""calibrate_: what each layer is quantized by, in what order, and what is left behind."""

import copy

import pytest
import torch
from torch import nn

import fp6_compile
from fp6_compile import PackedTensor, calibrate_, quantize_
from fp6_compile.algorithms import GPTQ, RTN, BiasCorrection, Clip, LoRC, Statistics, Weighted
from fp6_compile.formats import FORMATS, Format
from fp6_compile.lowrank import LowRankLinear
from tests.support import SwiGLU, close

DIM = 128


class Tower(nn.Module):
    """A linear before the blocks, one after them, and blocks that return a tuple and take what no block changes."""

    class Block(SwiGLU):
        def forward(self, x, scale, *, mask=None):
            return super().forward(x) * scale, mask

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.first = nn.Linear(DIM, DIM)
        self.blocks = nn.ModuleList(self.Block(DIM, 2 * DIM) for _ in range(blocks))
        self.head = nn.Linear(DIM, 160, bias=False)

    def forward(self, x, scale=1.0):
        x = self.first(x)
        for block in self.blocks:
            x = block(x, scale, mask=None)[0]
        return self.head(x)


def _tower() -> Tower:
    torch.manual_seed(0)
    return Tower().half()


INPUTS = [torch.randn(2, n, DIM, generator=torch.Generator().manual_seed(n)).half() for n in (5, 9, 40)]


def test_rtn_is_quantize_():
    model, expected = _tower(), _tower()
    report = calibrate_(model, format="e2m3", group_size=64)
    assert quantize_(expected, format="e2m3", group_size=64) == report
    for name, value in expected.named_parameters():
        assert torch.equal(model.get_parameter(name), value)


def test_each_linear_sees_what_the_quantized_blocks_before_it_give():
    """The reference: for each block, the whole model with the blocks before it quantized, and hooks."""
    model, reference = _tower(), _tower()
    calibrate_(model, INPUTS, algorithm=GPTQ(), format="e3m2")
    parts = [*([f"blocks.{i}.{n}" for n in ("gate", "up", "down")] for i in range(2)), ["first", "head"]]
    for part in parts:
        seen = {name: Statistics(reference.get_submodule(name).in_features, True) for name in part}
        hooks = [
            reference.get_submodule(name).register_forward_pre_hook(lambda m, a, stats=seen[name]: stats.add(a[0]))
            for name in part
        ]
        with torch.no_grad():
            for x in INPUTS:
                reference(x)
        for name, hook in zip(part, hooks, strict=True):
            hook.remove()
            module = reference.get_submodule(name)
            codes = GPTQ()(module.weight.detach(), FORMATS["e3m2"], None, seen[name]).codes
            assert torch.equal(model.get_submodule(name).weight.codes(), codes), name
            module.weight = model.get_submodule(name).weight
    assert not any(m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())
    assert model.training, "as it was"


def test_inputs_of_all_kinds():
    expected = _tower()
    calibrate_(expected, INPUTS, algorithm=Weighted(steps=4))
    for inputs in ([(x, 1.0) for x in INPUTS], ({"x": x, "scale": 1.0} for x in INPUTS)):
        model = _tower()
        calibrate_(model, inputs, algorithm=Weighted(steps=4))
        for name, value in expected.named_parameters():
            assert torch.equal(model.get_parameter(name), value)


def test_the_whole_model_at_once():
    model = _tower()
    report = calibrate_(model, INPUTS, algorithm=Weighted(steps=4), blocks="")
    assert len(report.taken) == 8
    assert all(line.note is None for line in report.linears)


def test_siblings_share_statistics(monkeypatch):
    made = []
    original = Statistics.__init__
    monkeypatch.setattr(Statistics, "__init__", lambda self, k, *a: (made.append(k), original(self, k, *a))[1])
    calibrate_(_tower(), INPUTS, algorithm=Weighted(steps=1))
    assert made == [DIM, 2 * DIM] * 2 + [DIM, DIM], "gate and up share"


def test_nan_and_linears_that_are_never_called():
    class Odd(Tower):
        def __init__(self):
            super().__init__()
            self.idle = nn.Linear(DIM, DIM)

    torch.manual_seed(0)
    model = Odd().half()
    idle = copy.deepcopy(model.idle.weight)
    bad = INPUTS[0].clone()
    bad[0, 2, 5] = torch.nan
    notes = {
        line.name: line.note for line in calibrate_(model, [bad, INPUTS[1]], algorithm=GPTQ(Clip(steps=2))).linears
    }
    assert notes["idle"] == "never called: quantized without data"
    assert notes["blocks.1.down"] == notes["first"] == "1 tokens with NaN or infinite values left out"
    codes = Clip(steps=2)(idle.detach(), FORMATS["e3m2"], None).codes
    assert torch.equal(model.idle.weight.codes(), codes)
    notes = {line.note for line in calibrate_(_tower(), [bad * torch.nan], algorithm=Weighted(steps=1)).linears}
    assert notes == {"all its inputs are NaN or infinite: quantized without data"}


def test_a_grid_without_kernels_is_simulated():
    fmt = Format("e1m1", 1, 1)
    model, original = _tower(), _tower()
    report = calibrate_(model, format=fmt, group_size=32)
    assert (report.format, report.taken[0].bytes_after) == ("e1m1", DIM * DIM * 3 // 8 + 4 * 4 * DIM)
    expected = RTN()(original.first.weight.detach(), fmt, 32).dequantize(torch.float16)
    assert torch.equal(model.first.weight, expected)
    assert not isinstance(model.first.weight, PackedTensor)


class Detour(Tower):
    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x + 1, 1.0)[0]
        return self.head(x)


BAD = {
    "empty": (Tower, {"inputs": []}, "inputs: got none, needs at least one input of the model"),
    "a number": (Tower, {"inputs": [3]}, "inputs: got a int, needs tensors, tuples of arguments or mappings"),
    "format": (Tower, {"format": "e9m9"}, "format: got 'e9m9', known formats are"),
    "group_size": (Tower, {"group_size": 0}, "option 'group_size' got 0"),
    "blocks": (
        Tower,
        {"blocks": "layers"},
        "blocks: got 'layers', needs the name of a module with blocks in it, or ''",
    ),
    "detour": (Detour, {}, "blocks: block 1 is not called with what block 0 returned; name other blocks, or ''"),
}


@pytest.mark.parametrize(("make", "how", "message"), BAD.values(), ids=BAD)
def test_errors_leave_the_model_as_it_was(make, how, message):
    model = make().half()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        calibrate_(model, **{"inputs": INPUTS, "algorithm": GPTQ(), **how})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any("forward" in vars(m) for m in model.modules())


def test_a_transformers_decoder():
    transformers = pytest.importorskip("transformers", reason="transformers is an optional extra")
    sizes = {"hidden_size": DIM, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=512)
    model = transformers.LlamaForCausalLM(config).half()
    tokens = torch.arange(24).view(2, 12)
    inputs = [{"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, {"input_ids": tokens[:1, :7]}]
    report = calibrate_(model, inputs, algorithm=GPTQ(), min_features=64)
    assert len(report.taken) == 15
    assert model.config.use_cache
    with torch.no_grad():
        assert model(tokens).logits.isfinite().all()
    assert fp6_compile.PackedTensor in {type(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}


@pytest.fixture(scope="module")
def with_extras() -> Tower:
    model = _tower()
    calibrate_(model, INPUTS, algorithm=BiasCorrection(LoRC(GPTQ(), rank=4)), format="e2m3", group_size=64)
    return model


def test_extras_are_of_use_and_are_parameters(with_extras):
    names = dict(with_extras.named_parameters())
    assert names["blocks.0.up.low_rank_a"].shape == (DIM, 4)
    assert names["blocks.0.up.low_rank_b"].shape == (4, 2 * DIM)
    assert names["head.bias"].dtype == torch.float16
    original, x = _tower(), INPUTS[2]
    bare = copy.deepcopy(with_extras)
    for module in bare.modules():
        if isinstance(module, LowRankLinear):
            module.low_rank_a.zero_()
    with torch.no_grad():
        errors = [(m(x) - original(x)).float().norm() for m in (with_extras, bare)]
    assert errors[0] < errors[1]
    report = quantize_(with_extras)
    assert {line.note for line in report.linears} == {"packed already"}
    assert len(report.taken) == 8


def test_extras_are_saved_and_loaded(with_extras, tmp_path):
    pytest.importorskip("safetensors", reason="safetensors is an optional extra")
    fp6_compile.save(with_extras, tmp_path)
    with torch.device("meta"):
        model = Tower().half()
    fp6_compile.load(model, tmp_path)
    with torch.no_grad():
        assert torch.equal(model(INPUTS[0]), with_extras(INPUTS[0]))
    assert model.state_dict().keys() == with_extras.state_dict().keys()
    fp6_compile.load(model, tmp_path)
    other = nn.Sequential(nn.Linear(DIM, DIM))
    with pytest.raises(fp6_compile.CheckpointError, match="not of this model"):
        fp6_compile.load(other, tmp_path)
    assert type(other[0]) is nn.Linear


def test_extras_compile_without_graph_breaks(with_extras, captured):
    compiled = torch.compile(with_extras, backend="fp6", fullgraph=True)
    with torch.no_grad():
        close(compiled(INPUTS[0]), with_extras(INPUTS[0]), roundings=16)
    assert captured.targets().count("fp6.mm") == 8
    assert copy.deepcopy(with_extras).head.low_rank_a.shape == (DIM, 4)
