"""The report: what it says, where it is logged, what it counts."""

import logging

import torch
from torch import nn
from torch._dynamo.utils import counters

import fp6_compile


class Model(nn.Module):
    """One linear that is taken, one that is skipped, one that is too small."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleList([nn.Linear(256, 512, bias=False)])
        self.head = nn.Linear(512, 1024)
        self.gate = nn.Linear(512, 4)

    def forward(self, x):
        x = self.body[0](x)
        return self.head(x), self.gate(x)


def _compile(**options):
    model = Model().half().requires_grad_(False)
    torch.compile(model, backend="fp6", options=options or None)(torch.randn(2, 256).half())
    return fp6_compile.last_report()


def test_report(captured):
    assert fp6_compile.last_report() is None
    report = _compile(skip=["head"])
    assert [(linear.name, linear.quantized, linear.shape) for linear in report.linears] == [
        ("body.0", True, (512, 256)),
        ("head", False, (1024, 512)),
        ("gate", False, (4, 512)),
    ]
    body, head, gate = report.linears
    assert (body.bytes_before, body.bytes_after) == (512 * 256 * 2, 512 * 256 * 3 // 4 + 512 * 4)
    assert (head.reason, gate.reason) == ("skipped by 'head'", "fewer than 128 inputs or outputs (min_features)")
    assert report.bytes_before == sum(2 * n * k for n, k in ((512, 256), (1024, 512), (4, 512)))
    assert report.bytes_after == report.bytes_before - body.bytes_before + body.bytes_after
    assert counters["fp6"]["linears_quantized"] == 1
    assert counters["fp6"]["linears_skipped"] == 2
    assert fp6_compile.reports() == [report]


def test_text(captured):
    text = str(_compile(skip=["head"]))
    assert text == (
        "fp6: 1 of 3 linears in e2m3, 2 skipped (1: skipped by 'head'), weights 1.31 MB -> 1.15 MB\n"
        "  fp6   body.0        512x256  262 KB -> 100 KB\n"
        "  skip  head         1024x512  skipped by 'head'\n"
        "  skip  gate            4x512  fewer than 128 inputs or outputs (min_features)"
    )


def test_one_report_per_graph_until_reset(captured):
    model = nn.Linear(256, 128).half().requires_grad_(False)
    compiled = torch.compile(model, backend="fp6", dynamic=False)
    compiled(torch.randn(2, 256).half())
    compiled(torch.randn(3, 256).half())
    assert len(fp6_compile.reports()) == 2
    torch._dynamo.reset()
    assert fp6_compile.reports() == []


def test_summary_is_logged_at_info(captured, caplog):
    with caplog.at_level(logging.INFO, logger="fp6_compile"):
        _compile()
    records = [record for record in caplog.records if record.name == "fp6_compile"]
    assert [record.levelname for record in records] == ["INFO"]
    assert records[0].message.startswith("fp6: 2 of 3 linears in e2m3, 1 skipped")


def test_nothing_quantized_is_a_warning(captured, caplog):
    _compile(min_features=4096)
    (record,) = [record for record in caplog.records if record.name == "fp6_compile"]
    assert record.levelname == "WARNING"
    assert "0 of 3 linears" in record.message
