"""calibrate_: what each layer is quantized by, in what order, and what is left behind."""

import copy
import dataclasses
import os
import shutil

import pytest
import torch
from torch import nn

import fp6_compile
from benchmarks.accuracy.grids import Integer
from fp6_compile import PackedTensor, calibrate_, quantize_
from fp6_compile.calibration.algorithms import (
    GPTQ,
    RTN,
    BiasCorrection,
    Clip,
    LoRC,
    Needs,
    Statistics,
    Weighted,
)
from fp6_compile.formats import DEFAULT, FORMATS
from fp6_compile.packed.low_rank import LowRankLinear
from tests.support.models import SwiGLU
from tests.support.references import close

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
    assert len(report.quantized) == 8
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
    assert notes["blocks.1.down"] == notes["first"] == "tokens with NaN or infinite values, left out: 1"
    codes = Clip(steps=2)(idle.detach(), FORMATS[DEFAULT], None).codes
    assert torch.equal(model.idle.weight.codes(), codes)
    notes = {line.note for line in calibrate_(_tower(), [bad * torch.nan], algorithm=Weighted(steps=1)).linears}
    assert notes == {"all its inputs are NaN or infinite: quantized without data"}


def test_a_grid_without_kernels_is_simulated():
    fmt = Integer(3)
    model, original = _tower(), _tower()
    report = calibrate_(model, format=fmt, group_size=32)
    assert (report.format, report.quantized[0].bytes_after) == ("int3", DIM * DIM * 3 // 8 + 4 * 4 * DIM)
    expected = RTN()(original.first.weight.detach(), fmt, 32).dequantize(torch.float16)
    assert torch.equal(model.first.weight, expected)
    assert not isinstance(model.first.weight, PackedTensor)


def test_a_format_for_each_layer():
    model = _tower()
    model.head.weight.data = torch.distributions.StudentT(1.5).sample((160, DIM)).half()
    report = calibrate_(model, format="auto")
    assert report.format == "auto"
    assert {line.name: line.format for line in report.linears}["head"] == "e3m2"
    assert (model.head.weight.spec.format, model.first.weight.spec.format) == ("e3m2", "e2m3")


class Detour(Tower):
    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x + 1, 1.0)[0]
        return self.head(x)


BAD = {
    "empty": (Tower, {"inputs": []}, "inputs: got none, needs at least one input of the model"),
    "a number": (Tower, {"inputs": [3]}, "inputs: got a int, needs tensors, tuples of arguments or mappings"),
    "format": (Tower, {"format": "e9m9"}, "option 'format' got 'e9m9', needs 'auto' or one of"),
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
    assert len(report.quantized) == 15
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
    assert len(report.quantized) == 8


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
    assert captured.targets().count("fp6.mm") == 6, "gates and ups are packed side by side"
    assert copy.deepcopy(with_extras).head.low_rank_a.shape == (DIM, 4)


class Kill(BaseException):
    pass


class Doomed(GPTQ):
    """GPTQ that dies at the n-th weight."""

    left = 0

    def __call__(self, *args):
        Doomed.left -= 1
        if Doomed.left == 0:
            raise Kill
        return super().__call__(*args)

    def __repr__(self):
        return "Doomed"


@pytest.mark.slow
@pytest.mark.parametrize("weights", [1, 4, 6, 9])
def test_a_killed_calibration_goes_on_to_the_same_bits(weights, tmp_path):
    """Blocks of three weights, so that it dies in the first, second and third, and at the end."""
    how = {"format": "e2m3", "group_size": 32, "equalize": 0.5}
    extras = {"algorithm": BiasCorrection(LoRC(Doomed(), rank=2))}
    torch.manual_seed(0)
    expected, model, again = (Normed(3).half() for _ in range(3))
    again.load_state_dict(expected.state_dict())
    model.load_state_dict(expected.state_dict())
    Doomed.left = 0
    report = calibrate_(expected, INPUTS, **how, **extras)
    Doomed.left = weights
    with pytest.raises(Kill):
        calibrate_(model, INPUTS, **how, **extras, resume=tmp_path)
    blocks = sorted(path.name for path in tmp_path.glob("block-*.pt"))
    assert blocks == [f"block-{i:05}.pt" for i in range((weights - 1) // 3)]
    (tmp_path / "block-00002.partial").write_bytes(b"cut off")
    Doomed.left = 0
    assert calibrate_(again, INPUTS, **how, **extras, resume=tmp_path) == report
    assert again.state_dict().keys() == expected.state_dict().keys()
    for name, value in expected.named_parameters():
        assert torch.equal(again.get_parameter(name), value), name
    with pytest.raises(ValueError, match="resume: .* is of a calibration with other algorithm and inputs; empty it"):
        calibrate_(Normed(3).half(), INPUTS[:1], **how, algorithm=GPTQ(), resume=tmp_path)


def _calibrated(folder, change=lambda model: None, **how):
    """Three blocks, after a change of the weights."""
    torch.manual_seed(0)
    model = Tower(3).half()
    with torch.no_grad():
        change(model)
    calibrate_(model, INPUTS, **{"algorithm": Weighted(steps=2), **how}, resume=folder)
    return [t.dequantize() if isinstance(t, PackedTensor) else t.detach() for t in model.parameters()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a calibration that ended, and what it gave."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, _calibrated(folder)


@pytest.fixture
def resumed(finished, tmp_path):
    """A copy of that folder, and what it gave."""
    shutil.copytree(finished[0], tmp_path / "state")
    return tmp_path / "state", finished[1]


CHANGES = {
    "the first block": (lambda m: m.blocks[0].up.weight.mul_(-1), 3),
    "the last block": (lambda m: m.blocks[2].up.weight.mul_(-1), 1),
    "a bias": (lambda m: m.blocks[1].gate.bias.add_(1), 2),
    "what follows the blocks": (lambda m: m.head.weight.mul_(-1), 3),
}


@pytest.mark.parametrize("what", CHANGES)
def test_blocks_of_other_weights_are_computed_anew(what, resumed, caplog):
    """Those that were made from weights that have changed, and no others."""
    change, anew = CHANGES[what]
    folder, _ = resumed
    found = _calibrated(folder, change)
    warned = [r.message.removeprefix(f"resume: {folder}: ") for r in caplog.records if r.levelname == "WARNING"]
    why = "it is damaged, or of other weights; it is computed anew"
    assert warned == [f"block-{i:05}.pt: {why}" for i in range(3 - anew, 3)]
    assert all(torch.equal(a, b) for a, b in zip(found, _calibrated(None, change), strict=True))


def test_packed_weights_are_part_of_what_a_block_is_made_from(tmp_path, caplog):
    def pack(scale):
        def change(model):
            linear = model.blocks[1].up
            linear.weight.mul_(scale)
            linear.weight = nn.Parameter(PackedTensor.quantize(linear.weight.detach()), requires_grad=False)

        return change

    _calibrated(tmp_path, pack(1))
    _calibrated(tmp_path, pack(1))
    assert not [r for r in caplog.records if "computed anew" in r.message]
    found = _calibrated(tmp_path, pack(2))
    assert sum("computed anew" in r.message for r in caplog.records) == 2
    assert all(torch.equal(a, b) for a, b in zip(found, _calibrated(None, pack(2)), strict=True))


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x55
    path.write_bytes(data)


DAMAGES = {
    "bits": _flip,
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "empty": lambda path: path.write_bytes(b""),
    "another block": lambda path: path.write_bytes((path.parent / "block-00000.pt").read_bytes()),
    "pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a link that leads out": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_damaged_blocks_are_computed_anew(what, resumed, caplog):
    folder, expected = resumed
    DAMAGES[what](folder / "block-00001.pt")
    found = _calibrated(folder)
    assert sum("block-00001.pt: it is" in r.message for r in caplog.records) == 1
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    caplog.clear()
    _calibrated(folder)
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"algorithm": NaN}', "[" * 9999])
def test_a_state_that_cannot_be_read(text, tmp_path):
    (tmp_path / "calibration.json").write_text(text)
    with pytest.raises(
        ValueError, match="resume: .*: cannot read calibration.json: calibration.json is no.*; empty it"
    ):
        _calibrated(tmp_path)


class Normed(Tower):
    """With norms before gate and up, some inputs much larger than others, and another reader of some norms' outputs."""

    class Block(Tower.Block):
        reads = 0.0

        def __init__(self, dim: int, hidden: int) -> None:
            super().__init__(dim, hidden)
            self.norm = nn.LayerNorm(dim)
            nn.init.uniform_(self.norm.weight, 0.01, 3)
            nn.init.uniform_(self.norm.bias)

        def forward(self, x, scale, *, mask=None):
            y = self.norm(x)
            out = self.down(torch.relu(self.gate(y)) * self.up(y))
            return x + (out + self.reads * y) * scale, mask


class Read(Normed):
    class Block(Normed.Block):
        reads = 0.5


class PlusOne(Normed):
    """Gemma's norm: x (1 + weight)."""

    class Block(Normed.Block):
        class Norm(nn.LayerNorm):
            def forward(self, x):
                return nn.functional.layer_norm(x, (DIM,)) * (1 + self.weight)

        def __init__(self, dim: int, hidden: int) -> None:
            super().__init__(dim, hidden)
            self.norm = self.Norm(dim)


@dataclasses.dataclass(frozen=True)
class Unchanged:
    """Leaves weights as they are, to see what else changes; keeps the statistics it is given."""

    seen: list = dataclasses.field(default_factory=list)
    needs = Needs.HESSIAN

    def __call__(self, weight, grid, group_size, stats):
        self.seen.append((weight, stats))
        raise ValueError("unchanged")


@pytest.mark.parametrize(("make", "moves"), [(Normed, True), (Read, False), (PlusOne, False)])
def test_equalization_leaves_the_models_output_unchanged(make, moves):
    torch.manual_seed(0)
    model = make().float()
    inputs = [x.float() for x in INPUTS]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = [model(x).detach() for x in inputs]
    calibrate_(model, inputs, algorithm=Unchanged(seen := []), include_float32=True, equalize=0.5)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    names = [f"blocks.{i}.{n}" for i in range(2) for n in ("gate.weight", "up.weight", "norm.weight", "norm.bias")]
    assert changed == (set(names) if moves else set())
    for x, y in zip(inputs, expected, strict=True):
        close(model(x).detach(), y, roundings=16)
    _, stats = seen[1]
    weights = torch.cat([seen[0][0], seen[1][0]])
    if moves:  # equation 4 with a = 1/2: inputs and weights end with the same range
        ratio = stats.absmax / weights.abs().amax(0)
        torch.testing.assert_close(ratio, ratio.mean().expand(DIM), rtol=1e-3, atol=0)
    found = Statistics(DIM, True)
    model.blocks[1].up.register_forward_pre_hook(lambda module, args: found.add(args[0]))
    for x in inputs:
        model(x)
    stats = seen[4][1]
    torch.testing.assert_close(stats.hessian(), found.hessian(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(stats.mean, found.mean, rtol=1e-3, atol=1e-5)


def test_from_a_folder_block_by_block(tmp_path):
    """The model is never in memory whole: when a block is calibrated, later ones are on the meta device."""
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is an optional extra")
    expected, original = _tower(), _tower()
    safetensors.save_file(original.state_dict(), tmp_path / "model.safetensors")
    calibrate_(expected, INPUTS, algorithm=GPTQ())
    with fp6_compile.init_empty_weights():
        model = Tower().half()
    present = []

    class Watch(GPTQ):
        def __call__(self, *args):
            present.append([not block.gate.weight.is_meta for block in model.blocks])
            return super().__call__(*args)

    calibrate_(model, INPUTS, algorithm=Watch(), source=tmp_path)
    assert present == [[True, False]] * 3 + [[True, True]] * 5
    for name, value in expected.named_parameters():
        assert torch.equal(model.get_parameter(name), value)
