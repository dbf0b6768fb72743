"""What `explain` says, and that it says the same as a compilation. test_explain_process.py has how it gets to know it."""

import json
import re
import threading
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

import fp6_compile
from fp6_compile.fake_gpu import devices
from fp6_compile.fake_gpu.devices import DEVICES, device_named
from tests.support.graphs import explaining_here
from tests.support.models import SwiGLU

DIM = 128


def _block():
    torch.manual_seed(0)
    return SwiGLU(DIM, 256).bfloat16().requires_grad_(False).eval()


def _x():
    return torch.randn(1, DIM).bfloat16()


@pytest.fixture(autouse=True, scope="module")
def _here():
    """Starting a process takes seconds, and what it finds out does not depend on the process."""
    with explaining_here():
        yield


@pytest.fixture(scope="module")
def block():
    return fp6_compile.explain(_block(), _x(), device="H200", mode="reduce-overhead")


def test_text(block):
    """gate and up are one launch, SiLU and the product one, down with the residual one."""
    assert_expected_inline(
        re.sub(r"\d\d\.\d dB", "?? dB", str(block)),
        """\
SwiGLU, backend fp6 (e2m3, mode='reduce-overhead'), on H200: nothing was run

linears       3 of 3 quantized, 197 KB -> 125 KB
graphs        1, no graph breaks
CUDA graphs   hold: all of the call
kernels       3 a call: 1 generated, 2 template matmul
reads         126 KB a call: 125 KB packed weights, 512 B other weights, 256 B inputs and KV cache
time          6.03 us a call; with 16-bit weights 6.05 us, 1.00x (predicted, not measured)
              = bytes read / (0.9 of 4800 GB/s) + 3 launches of 2 us in a CUDA graph
              assumed: share, launch, and that arithmetic is free; bandwidth: https://www.nvidia.com/en-us/data-center/h200/

     linear    shape  format               bytes     SQNR
fp6  gate    256x128  e2m3    65.5 KB -> 50.2 KB  ?? dB  merged with up
fp6  up      256x128  e2m3    65.5 KB -> 50.2 KB  ?? dB  merged with gate
fp6  down    128x256  e2m3    65.5 KB -> 25.1 KB  ?? dB""",
    )


def test_arithmetic(block):
    """The bytes are those of planes, scales, bias and x; the time is what its sentence says."""
    packed = (2 * 256 + DIM) * (256 * 6 // 8 + 4)  # K is padded to 256
    assert block.traffic.packed == packed
    assert (block.traffic.others, block.traffic.inputs) == (256 * 2, DIM * 2)
    assert block.saved == 3 * DIM * 256 * 2 - packed
    expected = block.traffic.total / (0.9 * 4800e6) + 3 * 2e-3
    assert block.prediction.ms == pytest.approx(expected)
    assert block.prediction.ms_16bit == pytest.approx(expected + block.saved / (0.9 * 4800e6))


def test_it_says_what_a_compilation_does(block):
    """The same linears, bytes and notes as the report of a real compilation on this machine's CPU."""
    found = fp6_compile.explain(_block(), _x(), device="cpu")
    torch.compile(_block(), backend="fp6")(_x())
    real = fp6_compile.last_report()
    assert [(x.name, x.shape, x.bytes_before, x.bytes_after, x.note) for x in found.linears] == [
        (x.name, x.shape, x.bytes_before, x.bytes_after, x.note) for x in real.linears
    ]
    assert found.cuda_graphs.reasons == ("a CPU has none",)
    assert found.launches.count("torch.ops.fp6.mm.default") == 2
    assert found.prediction.gb_per_s > 0
    assert found.prediction.launch_us == 0


def test_sqnr_is_that_of_the_weight(block):
    model = _block()
    w = model.up.weight.float()
    noise = fp6_compile.PackedTensor.quantize(model.up.weight, "e2m3").dequantize().float() - w
    (up,) = (linear for linear in block.linears if linear.name == "up")
    # The tensor is rounded to bfloat16 besides.
    assert up.sqnr == pytest.approx(float(10 * torch.log10(w.square().sum() / noise.square().sum())), abs=0.05)


def _line_of(source):
    lines = Path(__file__).read_text().splitlines()
    return next(i for i, line in enumerate(lines, 1) if line.strip() == source)


class Parser(HTMLParser):
    """Tags and text of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)


def test_html_is_one_file(block):
    parser = Parser(block.html())
    names = {tag for tag, _ in parser.tags}
    assert not names & {"script", "link", "img", "iframe"}
    assert not any(attribute in attrs for _, attrs in parser.tags for attribute in ("src", "href"))
    assert "url(" not in block.html()
    assert "@import" not in block.html()
    text = " ".join(parser.words)
    assert all(word in text for word in ("SwiGLU", "down", "3 of 3", "predicted, not measured", "hold"))
    assert sum(attrs.get("class") == "bar" for _, attrs in parser.tags) == 2 * 3
    assert block._repr_html_() in block.html()


def test_json(block):
    data = json.loads(block.json())
    assert data["predicted_not_measured"] is True
    assert [linear["name"] for linear in data["linears"]] == ["gate", "up", "down"]
    assert data["kernels"] == {"template matmul": 2, "generated": 1}
    assert data["prediction"]["ms"] == block.prediction.ms


def test_rich(block):
    rich = pytest.importorskip("rich.console", reason="rich is an optional extra")
    console = rich.Console(width=160)
    with console.capture() as captured:
        console.print(block)
    plain = " ".join(captured.get().split())
    assert all(" ".join(line.split()) in plain for line in str(block).splitlines()[2:5])


class Broken(nn.Module):
    """Two layers that look alike, so that Dynamo compiles one graph for both, with a break in each."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(DIM, DIM)

    def forward(self, x):
        x = self.fc(x)
        torch._dynamo.graph_break()
        return x + 1


def test_graph_breaks():
    """Their lines, and a graph that runs twice counts twice, with the weights of both layers."""
    found = fp6_compile.explain(Broken().half().requires_grad_(False), torch.randn(1, DIM).half(), device="RTX 4090")
    source = "torch._dynamo.graph_break()"
    assert {(stop.file, stop.source) for stop in found.breaks} == {(__file__, source)}
    line = _line_of(source)
    assert f"{__file__}:{line}: {source}" in str(found)
    assert [linear.name for linear in found.linears] == ["layers.0.fc", "layers.1.fc"]
    assert found.graphs == 4
    assert len(found.launches) == 4
    assert found.cuda_graphs.hold is False
    assert found.cuda_graphs.reasons[-1] == "graph breaks: 4 graphs, and Python between them"
    assert f"{__file__}:{line}" in Parser(found.html()).words


class Skipped(nn.Module):
    """One linear of every kind that is skipped, and one that is quantized."""

    def __init__(self):
        super().__init__()
        self.quantized, self.skipped, self.nan = (nn.Linear(DIM, DIM, bias=False) for _ in range(3))
        self.small = nn.Linear(DIM, 16, bias=False)
        self.experts = nn.Parameter(torch.randn(2, DIM, DIM))
        with torch.no_grad():
            self.nan.weight[0, 0] = torch.nan

    def forward(self, x):
        y = self.quantized(x) + self.skipped(x) + self.nan(x)
        return self.small(y), torch.bmm(x.expand(2, *x.shape), self.experts)


def test_skipped_linears():
    model = Skipped().half()
    with torch.no_grad():
        found = fp6_compile.explain(model, torch.randn(1, DIM).half(), device="H200", options={"skip": ["skipped"]})
    assert {linear.name: linear.reason for linear in found.linears} == {
        "quantized": None,
        "skipped": "skipped by 'skipped'",
        "nan": "fp6: cannot quantize nan: weight: 1 of 16384 values are NaN or infinite",
        "small": "fewer than 128 inputs or outputs (min_features)",
        "experts": "a 3-D weight",
    }
    assert "skip  experts" in str(found)
    with_grad = fp6_compile.explain(model, torch.randn(1, DIM).half(), device="H200")
    assert not with_grad.quantized
    assert "requires grad" in str(with_grad)


def test_packed_and_empty_models():
    """What quantize_ packed is said to be so; without values, all but the error is known."""
    packed = _block()
    fp6_compile.quantize_(packed, format="e2m3")
    found = fp6_compile.explain(packed, _x(), device="H200")
    assert [(x.format, x.sqnr_text) for x in found.linears] == [("e2m3", "unknown")] * 3
    assert [x.note for x in found.linears] == [
        *("packed already; merged with up", "packed already; merged with gate", "packed already")
    ]
    assert len(found.launches) == 3
    assert type(packed.up.weight) is fp6_compile.PackedTensor
    with fp6_compile.init_empty_weights():
        empty = SwiGLU(DIM, 256).bfloat16().requires_grad_(False)
    unknown = fp6_compile.explain(empty, _x(), device="H200")
    assert [x.sqnr_text for x in unknown.linears] == ["unknown"] * 3
    assert len(unknown.quantized) == len(unknown.launches) == 3
    assert empty.up.weight.is_meta


class Writes(nn.Module):
    """Of what CUDA graphs cannot record: a tensor on the CPU, and a write into what the caller passes."""

    def __init__(self, kind):
        super().__init__()
        self.fc, self.kind = nn.Linear(DIM, DIM), kind

    def forward(self, x, y):
        if self.kind == "cpu":
            return self.fc(x) + torch.rand(DIM, device="cpu").to(x.device)
        y.copy_(self.fc(x))
        return y


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("mutation", r"^mutated inputs \(1 instances\) \(.*test_explain.py:\d+\)$"),
        ("cpu", r"^outside the recording: .*cpu"),
    ],
)
def test_why_cuda_graphs_do_not_hold(kind, why):
    model, x = Writes(kind).half().requires_grad_(False), torch.randn(1, DIM).half()
    found = fp6_compile.explain(model, x, torch.randn(1, DIM).half(), device="H200")
    assert found.cuda_graphs.hold is False
    reason, *_ = found.cuda_graphs.reasons
    assert re.search(why, reason)
    assert f"do not hold: {found.cuda_graphs.reasons[0]}" in str(found)


class Needy(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(DIM, DIM)

    def forward(self, x):
        x = self.fc(x)
        return self.fc(x) if x.sum().item() > 0 else x


def test_a_value_is_needed():
    """What follows is missing, and it says so, with the line."""
    found = fp6_compile.explain(Needy().half().requires_grad_(False), torch.randn(1, DIM).half(), device="H200")
    line = _line_of("return self.fc(x) if x.sum().item() > 0 else x")
    assert f"{__file__}:{line}" in found.stopped
    assert "stopped" in str(found)
    assert len(found.linears) == 1


def test_bad_arguments():
    model, x = _block(), _x()
    with pytest.raises(ValueError, match="fp6: device 'H300': known names are B200, H200"):
        fp6_compile.explain(model, x, device="H300")
    with pytest.raises(ValueError, match="unknown option 'fromat'"):
        fp6_compile.explain(model, x, options={"fromat": "e2m3"})
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        fp6_compile.explain(model)
    model.lock = threading.Lock()
    with pytest.raises(ValueError, match="explain looks at a copy without values, and copying failed: cannot pickle"):
        fp6_compile.explain(model, x)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("4090", "RTX 4090"),
        ("AMD Instinct MI300X", "MI300X"),
        ("l4", "L4"),
    ],
)
def test_device_names(name, known):
    assert device_named(name) is DEVICES[known]


def test_devices_have_sources():
    assert all(device.gb_per_s and device.source.startswith("https://") for device in DEVICES.values())
    with pytest.raises(ValueError, match="Laptop"):
        device_named("NVIDIA GeForce RTX 4090 Laptop GPU")
    assert not devices.this_device(torch.device("cpu")).is_cuda


def test_a_device_that_is_not_nvidias():
    """Bytes and time are its own; kernels are counted on code for an H200, and that is said."""
    found = fp6_compile.explain(_block(), _x(), device="MI300X")
    assert found.prediction.gb_per_s == 5300
    assert "counted in code for an H200" in str(found)
