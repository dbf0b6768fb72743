"""transformers knows packed models whatever was imported first, and if nothing of this package was."""

import os
import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import torch

from fp6_compile import Fp6Config
from tests.support.hf import llama, logits, transformers

LOAD = """
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({folder!r})
kinds = {{type(parameter).__name__ for parameter in model.parameters()}}
assert kinds == {{"Parameter", "PackedTensor"}}, kinds
import torch
with torch.no_grad():
    logits = model(torch.arange(1, 17)[None]).logits
assert torch.equal(logits, torch.load({folder!r} + "/logits.pt"))
"""
# What `import torch` does where the package is installed with its entry points.
AUTOLOAD = "import torch; from fp6_compile.integrations import autoload; autoload()"
INSTALLED = any(entry.value == "fp6_compile.integrations:autoload" for entry in entry_points(group="torch.backends"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("packed")
    llama().save_pretrained(folder / "source")
    model = transformers.LlamaForCausalLM.from_pretrained(folder / "source", quantization_config=Fp6Config())
    model.save_pretrained(folder)
    torch.save(logits(model), folder / "logits.pt")
    return folder


def _run(code, **variables):
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", **variables}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "first",
    [
        pytest.param("import fp6_compile", marks=pytest.mark.slow),
        pytest.param("import transformers.modeling_utils, fp6_compile", marks=pytest.mark.slow),
        pytest.param("import transformers.quantizers.auto, fp6_compile", marks=pytest.mark.slow),
        pytest.param(AUTOLOAD, marks=pytest.mark.slow if INSTALLED else []),
    ],
)
def test_one_import_in_any_order(first, folder):
    _run(first + LOAD.format(folder=str(folder)))


@pytest.mark.skipif(not INSTALLED, reason="the package is not installed with its entry points")
def test_no_import_at_all(folder):
    _run(LOAD.format(folder=str(folder)), TORCH_DEVICE_BACKEND_AUTOLOAD="1")


def test_importing_the_package_does_not_import_transformers():
    _run("import sys, fp6_compile; assert 'transformers' not in sys.modules")


@pytest.mark.slow
def test_import_torch_and_transformers_outlive_our_errors():
    _run(
        """
import sys
sys.modules["fp6_compile.integrations.transformers.register"] = None
import torch
from fp6_compile.integrations import autoload
autoload()
import transformers.quantizers.auto
"""
    )


@pytest.mark.slow
def test_an_unknown_transformers_is_an_error_and_no_random_model(folder):
    """What the integration imports of transformers may be gone some day."""
    code = f"""
import sys
sys.modules["fp6_compile.integrations.transformers.names"] = None
import fp6_compile
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained({str(folder)!r})
except ImportError as error:
    assert "packed models cannot be loaded with this transformers" in str(error), error
else:
    raise AssertionError("loaded")
"""
    _run(code)


def test_without_transformers_the_config_says_the_way_out():
    _run(
        """
import sys
sys.modules["transformers"] = None
import fp6_compile
from fp6_compile import *
try:
    fp6_compile.Fp6Config
except ImportError as error:
    assert "pip install 'fp6_compile[transformers]'" in str(error), error
else:
    raise AssertionError("imported")
"""
    )
