"""QuantConfig: checked when it is made, the same by whichever way it is given; filter_fn; names of version 0.1."""

import dataclasses
import re
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

import fp6_compile
from fp6_compile import QuantConfig, calibrate_, quantize_, sensitivities
from fp6_compile.config import Options
from tests.support.graphs import explaining_here, without_codegen
from tests.support.references import close, dequantized_

K, N = 256, 128


@pytest.fixture(autouse=True)
def _reset():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(K, N), nn.Linear(N, K)).half().requires_grad_(False)


class Tied(nn.Module):
    """An embedding that shares its weight with the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(N, K)
        self.body = nn.Linear(K, K)
        self.head = nn.Linear(K, N, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embed(tokens)))


# field: (a value that it does not accept, what it does)
BAD = {
    "format": ("e9m9", "'auto' or one of ['e1m1', "),
    "group_size": (0, "a positive integer or None"),
    "scale_method": ("max", "one of ['absmax', 'mse']"),
    "skip": ("lm_head", "a list of module-name globs"),
    "filter_fn": ("lm_head", "a function of (module, name) or None"),
    "min_features": (True, "a positive integer"),
    "include_float32": (1, "True or False"),
}


def test_every_field_has_a_check():
    assert list(BAD) == [field.name for field in dataclasses.fields(QuantConfig)]


@pytest.mark.parametrize("field", BAD)
@pytest.mark.parametrize(
    "make",
    [
        lambda given: QuantConfig(**given),
        lambda given: Options.parse(None, given),
        lambda given: quantize_(_model(), **given),
        lambda given: calibrate_(_model(), **given),
        lambda given: sensitivities(_model(), lambda: 0.0, **given),
    ],
    ids=["QuantConfig", "options", "quantize_", "calibrate_", "sensitivities"],
)
def test_a_bad_field_names_itself_what_was_given_and_what_is_allowed(make, field):
    value, allowed = BAD[field]
    with pytest.raises(ValueError, match=re.escape(f"option {field!r} got {value!r}, needs {allowed}")):
        make({field: value})


def test_a_config_does_not_change():
    globs = ["*.down_proj"]
    config = QuantConfig(skip=globs)
    globs.append("*")
    assert config.skip == ("*.down_proj",)
    assert hash(config) == hash(QuantConfig(skip=("*.down_proj",)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.format = "e3m2"


# call: what it makes of a model, as something to compare
CALLS = {
    "quantize_": lambda model, *config, **fields: str(quantize_(model, *config, **fields)),
    "calibrate_": lambda model, *config, **fields: str(calibrate_(model, (), *config, **fields)),
    "sensitivities": lambda model, *config, **fields: sensitivities(
        model, lambda: float(model[0].weight.float().sum()), *config, **fields
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_config_and_its_fields_give_the_same(call):
    fields = {"format": "e3m2", "group_size": 64, "skip": ["1"], "min_features": 64}
    a, b, c = _model(), _model(), _model()
    results = [
        CALLS[call](a, QuantConfig(**fields)),
        CALLS[call](b, config=QuantConfig(**fields)),
        CALLS[call](c, **fields),
    ]
    assert results[0] == results[1] == results[2]
    assert results[0] != CALLS[call](_model())
    assert torch.equal(_dense(a[0].weight), _dense(c[0].weight))


def _dense(weight: torch.Tensor) -> torch.Tensor:
    return weight.dequantize() if isinstance(weight, fp6_compile.PackedTensor) else weight


@pytest.mark.parametrize("call", CALLS)
def test_a_config_and_a_field_beside_it_are_too_much(call):
    with pytest.raises(ValueError, match="config: got a QuantConfig and format= beside it, needs one or the other"):
        CALLS[call](_model(), QuantConfig(), format="e3m2")
    with pytest.raises(ValueError, match="config: got 'e3m2', needs a QuantConfig or None"):
        CALLS[call](_model(), "e3m2")
    with pytest.raises(TypeError, match="unexpected keyword argument 'fromat'"):
        CALLS[call](_model(), fromat="e3m2")


def test_calibration_chooses_its_own_scales():
    with pytest.raises(ValueError, match="scale_method: got 'mse', needs 'absmax': the algorithm chooses the scales"):
        calibrate_(_model(), (), QuantConfig(scale_method="mse"))


def test_old_field_names_warn_and_work():
    model = _model().float()
    with pytest.warns(
        DeprecationWarning, match="'(scale|float32)' is called '(scale_method|include_float32)' now"
    ) as caught:
        report = quantize_(model, scale="mse", float32=True)
    assert len(report.quantized) == len(caught) == 2
    assert {warning.filename for warning in caught} == {__file__}, "the line of the caller"
    expected = _model().float()
    quantize_(expected, QuantConfig(scale_method="mse", include_float32=True))
    assert torch.equal(model[0].weight.dequantize(), expected[0].weight.dequantize())
    with pytest.warns(DeprecationWarning, match="'float32' is called 'include_float32' now"):
        assert Options.parse(None, {"float32": True}) == Options(include_float32=True)
    with pytest.raises(ValueError, match="'scale' is the old name of 'scale_method': got both"):
        quantize_(_model(), scale="mse", scale_method="mse")


def test_filter_fn_of_quantize():
    asked = []

    def only_the_first(module: nn.Module, name: str) -> bool:
        asked.append((type(module), name))
        return name == "0"

    model = _model()
    report = quantize_(model, QuantConfig(filter_fn=only_the_first), strict=True)
    assert asked == [(nn.Linear, "0"), (nn.Linear, "1")]
    assert [(line.name, line.reason) for line in report.linears] == [("0", None), ("1", "skipped by filter_fn")]
    assert type(model[1].weight) is nn.Parameter
    assert "filter_fn=test_filter_fn_of_quantize" in QuantConfig(filter_fn=only_the_first).describe()


def test_filter_fn_of_a_model_that_is_a_linear_gets_no_name():
    asked = []
    quantize_(nn.Linear(K, N).half(), filter_fn=lambda module, name: asked.append(name) or True)
    assert asked == [""]


def test_filter_fn_of_a_weight_that_several_modules_have():
    """All of them must be content; embeddings, which multiply nothing, are not asked."""
    model = _model()
    model[1] = nn.Linear(K, N).half()
    model[1].weight = model[0].weight
    report = quantize_(model, filter_fn=lambda module, name: name != "1")
    assert [line.reason for line in report.linears] == ["skipped by filter_fn"]
    report = quantize_(Tied().half(), filter_fn=lambda module, name: isinstance(module, nn.Linear))
    assert [line.reason for line in report.linears] == ["shared with embed (Embedding)", None]


def test_filter_fn_of_calibration_and_sensitivities():
    def only_the_first(module: nn.Module, name: str) -> bool:
        return name == "0"

    report = calibrate_(_model(), filter_fn=only_the_first)
    assert [line.reason for line in report.linears] == [None, "skipped by filter_fn"]
    assert list(sensitivities(_model(), lambda: 0.0, filter_fn=only_the_first)) == ["0"]


def test_a_calibration_of_other_linears_does_not_go_on(tmp_path):
    x = torch.randn(4, K).half()
    calibrate_(_model(), [x], equalize=0.5, resume=tmp_path, filter_fn=lambda module, name: name == "0")
    with pytest.raises(ValueError, match="is of a calibration with other options"):
        calibrate_(_model(), [x], equalize=0.5, resume=tmp_path, filter_fn=lambda module, name: name == "1")


@pytest.mark.parametrize("strict", [False, True])
def test_filter_fn_of_the_backend(strict):
    model, asked, x = _model(), [], torch.randn(3, K).half()

    def only_the_second(module: nn.Module, name: str) -> bool:
        asked.append((module, name))
        return name == "1"

    with without_codegen() as captured, torch.no_grad():
        torch.compile(model, backend="fp6", options={"filter_fn": only_the_second, "strict": strict})(x)
    assert asked == [(model[0], "0"), (model[1], "1")]
    assert captured.targets().count("fp6.mm") == 1
    lines = fp6_compile.last_report().linears
    assert [(line.name, line.reason) for line in lines] == [("0", "skipped by filter_fn"), ("1", None)]


def test_filter_fn_of_a_head_that_shares_its_weight_with_an_embedding():
    model = Tied().half().requires_grad_(False)
    with without_codegen(), torch.no_grad():
        options = {"filter_fn": lambda module, name: isinstance(module, nn.Linear)}
        torch.compile(model, backend="fp6", options=options)(torch.arange(4))
    assert len(fp6_compile.last_report().quantized) == 2
    torch._dynamo.reset()
    with without_codegen(), torch.no_grad():
        options = {"filter_fn": lambda module, name: name != "head"}
        torch.compile(model, backend="fp6", options=options)(torch.arange(4))
    assert [line.name for line in fp6_compile.last_report().skipped] == ["head"]


def test_filter_fn_skips_a_weight_that_no_module_has():
    weight, x = nn.Parameter(torch.randn(N, K).half(), requires_grad=False), torch.randn(3, K).half()
    with without_codegen() as captured:
        options = {"filter_fn": lambda module, name: True, "strict": True}
        torch.compile(lambda x: x @ weight.T, backend="fp6", options=options)(x)
    assert "fp6.mm" not in captured.targets()
    assert [line.reason for line in fp6_compile.last_report().linears] == ["skipped by filter_fn"]


def test_filter_fn_and_compile_caches():
    """It is in no cache key: what it decides is in the graph, so another function with the same decisions is a hit."""
    x, results = torch.randn(3, K).half(), []
    with fresh_cache(), torch.no_grad():
        for wanted in ("0", "0", "1"):
            torch._dynamo.reset()
            counters.clear()
            model = _model()
            options = {"filter_fn": lambda module, name, wanted=wanted: name == wanted}
            out = torch.compile(model, backend="fp6", options=options)(x)
            found = counters["aot_autograd"]
            results.append((found["autograd_cache_hit"], found["autograd_cache_miss"], found["autograd_cache_bypass"]))
            close(out, dequantized_(_model(), [f"{wanted}.weight"])(x))
    assert results == [(0, 1, 0), (1, 0, 0), (0, 1, 0)]


def test_filter_fn_is_asked_in_explain():
    with torch.no_grad(), explaining_here():
        found = fp6_compile.explain(
            _model(), torch.randn(3, K).half(), options={"filter_fn": lambda module, name: name == "1"}
        )
    assert [(linear.name, linear.reason) for linear in found.linears] == [("0", "skipped by filter_fn"), ("1", None)]


OLD_NAMES = {
    "empty_parameters": "init_empty_weights",
    "load_mx": "load_quark_mxfp6",
    "refresh": "mark_weights_changed",
}


@pytest.mark.parametrize("old", OLD_NAMES)
def test_old_names_warn_and_work(old):
    with pytest.warns(DeprecationWarning, match=f"fp6_compile.{old} is called {OLD_NAMES[old]} now") as caught:
        exec(f"from fp6_compile import {old}", found := {"__name__": __name__})
    assert found[old] is getattr(fp6_compile, OLD_NAMES[old])
    assert all(warning.filename == "<string>" for warning in caught)
    assert old not in fp6_compile.__all__


def test_the_old_name_of_the_algorithms_warns_and_works():
    with pytest.warns(DeprecationWarning, match="called fp6_compile.calibration.algorithms now"):
        from fp6_compile.algorithms import GPTQ
    assert GPTQ is fp6_compile.calibration.algorithms.GPTQ


def test_the_names_of_today_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(hasattr(fp6_compile, name) for name in fp6_compile.__all__)


def test_old_names_in_reports_warn_and_work():
    report = quantize_(_model(), skip=["1"])
    for old, new in (("taken", "quantized"), ("refused", "skipped")):
        with pytest.warns(DeprecationWarning, match=f"Report.{old} is called {new} now"):
            assert getattr(report, old) == getattr(report, new)
    with pytest.warns(DeprecationWarning, match=r"LinearReport.taken is called quantized now"):
        assert [line.taken for line in report.linears] == [True, False]
