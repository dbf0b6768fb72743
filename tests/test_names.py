"""Names: those of the model that was compiled, whatever Dynamo calls it; and globs of `skip` that match none."""

import functools
import logging

import pytest
import torch
from torch import nn

import fp6_compile
from fp6_compile.backend.compile import fp6
from fp6_compile.report import forget_reports

N = 128


def _wrapped(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.lm_head = nn.Linear(N, N), nn.Linear(N, N)

    def forward(self, x):
        return self.lm_head(self.body(x).relu())


class Wrapped(Plain):
    forward = _wrapped(Plain.forward)


class Broken(nn.Module):
    """With a graph break between its linears."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.fd = nn.Linear(N, N), nn.Linear(N, N)

    def forward(self, x):
        x = self.fc(x)
        torch._dynamo.graph_break()
        return self.fd(x)


class Layers(nn.Module):
    def __init__(self, layer=Broken) -> None:
        super().__init__()
        self.layers = nn.ModuleList([layer(), layer()])
        self.head = nn.Linear(N, N)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)

    def generate(self, x):
        return self(x)


class Unregistered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.hidden = nn.Linear(N, N), [Plain().half()]

    def forward(self, x):
        return self.hidden[0](self.a(x))


class Holder:
    def __init__(self, model) -> None:
        self.model = model

    def step(self, x):
        return self.model(x)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(N, N), nn.Linear(N, N, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.embed(tokens))


def _names(function, *args, options=None):
    if isinstance(function, nn.Module):
        function = function.half()
    args = args or (torch.randn(2, N).half(),)
    with torch.no_grad():
        torch.compile(function, backend="fp6", options=options)(*args)
    return _reported()


def _reported():
    return sorted({linear.name for report in fp6_compile.reports() for linear in report.linears})


# Dynamo runs one graph for both layers, and leaves what is behind them in a loop to eager code.
BROKEN = ["layers.0.fc", "layers.0.fd"]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (Plain, ["body", "lm_head"]),
        (Wrapped, ["body", "lm_head"]),
        (Layers, BROKEN),
        (lambda: Layers(Wrapped), ["head", *(f"layers.{i}.{name}" for i in (0, 1) for name in ("body", "lm_head"))]),
        (lambda: Layers().half().generate, BROKEN),
        (lambda: Holder(Wrapped().half()).step, ["body", "lm_head"]),
        (Unregistered, ["a", "hidden.0.body", "hidden.0.lm_head"]),
    ],
    ids=["plain", "wrapped", "graph breaks", "wrapped layers", "bound method", "object", "unregistered"],
)
def test_names_are_the_models_own(make, expected, captured):
    assert _names(make()) == expected


def test_a_model_that_compiles_itself(captured):
    model = Layers(Wrapped).half()
    model.compile(backend="fp6")
    with torch.no_grad():
        model(torch.randn(2, N).half())
    assert _reported() == ["head", "layers.0.body", "layers.0.lm_head", "layers.1.body", "layers.1.lm_head"]


def test_layers_that_are_compiled_alone_have_names_of_their_own(captured):
    model = Layers(Wrapped).half()
    for layer in model.layers:
        layer.compile(backend="fp6")
    with torch.no_grad():
        model(torch.randn(2, N).half())
    assert _reported() == ["body", "lm_head"]


def test_the_models_of_one_function_are_told_apart_by_their_variables(captured):
    draft, models = Wrapped().half(), [Plain().half(), {"a": Plain().half()}]

    def both(x, target):
        return draft(x) + target(x) + models[0](x) + models[1]["a"](x)

    names = _names(both, torch.randn(2, N).half(), Wrapped().half())
    variables = ("draft", "models.0", "models.1.a", "target")
    assert names == [f"{variable}.{name}" for variable in variables for name in ("body", "lm_head")]


def test_a_glob_matches_names_with_and_without_their_models(captured):
    draft, target = Plain().half(), Plain().half()

    def both(x):
        return draft(x) + target(x)

    _names(both, options={"skip": ["draft.body", "lm_head"]})
    reasons = {linear.name: linear.reason for linear in fp6_compile.last_report().linears}
    assert reasons == {
        "draft.body": "skipped by 'draft.body'",
        "draft.lm_head": "skipped by 'lm_head'",
        "target.body": None,
        "target.lm_head": "skipped by 'lm_head'",
    }


def test_a_parameter_without_a_module(captured):
    weight = nn.Parameter(torch.randn(N, N).half())
    assert _names(lambda x: x @ weight) == ["l_weight_"]


def test_a_tied_weight_is_called_as_the_module_that_multiplies(captured):
    assert _names(Tied(), torch.arange(3)) == ["head"]


@pytest.mark.parametrize("make", [Wrapped, Layers])
def test_packed_models_have_the_same_names(make, captured):
    model = make().half()
    before = _names(model)
    torch._dynamo.reset()
    fp6_compile.quantize_(model)
    # A packed linear in eager code is a Python function, which Dynamo compiles.
    assert _names(model) == (before if make is Wrapped else ["head", *before])
    assert all(linear.note and "packed already" in linear.note for r in fp6_compile.reports() for linear in r.linears)


def test_skip_works_behind_a_wrapper(captured):
    _names(Wrapped(), options={"skip": ["lm_head"]})
    reasons = {linear.name: linear.reason for linear in fp6_compile.last_report().linears}
    assert reasons == {"body": None, "lm_head": "skipped by 'lm_head'"}


def test_skip_works_behind_a_graph_break(captured):
    _names(Layers(), options={"skip": ["layers.*.fc"]})
    reasons = {linear.name: linear.reason for report in fp6_compile.reports() for linear in report.linears}
    assert reasons["layers.0.fc"] == "skipped by 'layers.*.fc'"
    assert reasons["layers.0.fd"] is None


def _warnings(caplog):
    return [record.message for record in caplog.records if record.message.startswith("fp6: skip")]


def test_a_glob_that_matches_nothing_is_said_once(captured, caplog):
    """Not in every graph of the model, and not of a glob that matches in another graph."""
    model = Layers()
    with caplog.at_level(logging.WARNING, logger="fp6_compile"):
        _names(model, options={"skip": ["haed", "layers.*.fd", "layers.0"]})
    assert _warnings(caplog) == ["fp6: skip: 'haed' matches no module of Layers; did you mean 'head'?"]


def test_a_glob_that_matches_nothing_packed_in_place(caplog):
    quantize = functools.partial(fp6_compile.quantize_, Plain().half())
    calibrate = functools.partial(fp6_compile.calibrate_, Plain().half(), inputs=[])
    with caplog.at_level(logging.WARNING, logger="fp6_compile"):
        quantize(skip=["lmhead", "body"])
    assert _warnings(caplog) == ["fp6: skip: 'lmhead' matches no module of Plain; did you mean 'lm_head'?"]
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="fp6_compile"):
        calibrate(skip=["model.lm_haed", "body"])
    assert _warnings(caplog) == ["fp6: skip: 'model.lm_haed' matches no module of Plain; did you mean 'lm_head'?"]


def test_without_torch_compile_the_input_is_the_name(captured):
    """A graph that the backend is given directly: there is no call to look into."""
    graphs = []
    torch.compile(Plain().half(), backend=lambda gm, inputs: graphs.append((gm, inputs)) or gm)(
        torch.randn(2, N).half()
    )
    with torch.no_grad():
        fp6(*graphs[0])
    assert _reported() == [f"l_self_modules_{name}_parameters_weight_" for name in ("body", "lm_head")]
    forget_reports()  # torch._dynamo.reset() does, for backends that it has called
