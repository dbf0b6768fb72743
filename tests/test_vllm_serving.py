"""The plug-in inside vLLM, on a CPU: `make test-vllm`. Engines of two tensor-parallel ranks are slow.

benchmarks/serving compares whole engines, compiled ones too.
"""

import json
import os
import shutil

import pytest

if pytest.importorskip("importlib.util").find_spec("vllm") is None:
    pytest.skip("needs vLLM: make test-vllm", allow_module_level=True)

from benchmarks.serving import worker
from benchmarks.serving.models import VOCABULARY, make, pack

os.environ.update(worker.ENVIRONMENT)

from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A Llama in 16 bits, packed in several ways, and dequantized."""
    folder = tmp_path_factory.mktemp("llama")
    make("llama", folder / "plain")
    pack(folder / "plain", folder / "packed", folder / "dequantized", group_size=64, head=True)
    return folder


def tokens(folder, **settings):
    llm = worker.engine(str(folder), **{"enforce_eager": True, "dtype": "float32", **settings})
    found = worker.generate(llm, VOCABULARY)
    llm.llm_engine.engine_core.shutdown()
    return found, llm


def refused(folder, message, **settings):
    """vLLM logs what a worker raises, and raises it too, where both are one process."""
    with pytest.raises(ValueError, match=message):
        tokens(folder, **settings)


def changed(source, target, change=None, **config):
    """A copy of a folder with other tensors or another quantization_config."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    if change is not None:
        change(tensors)
        save_file(tensors, target / "model.safetensors", {"format": "pt"})
    about = json.loads((target / "config.json").read_text())
    about["quantization_config"] |= config
    (target / "config.json").write_text(json.dumps(about))
    return target


def test_a_packed_folder_gives_the_dequantized_models_tokens(folders):
    packed, _ = tokens(folders / "packed")
    expected, _ = tokens(folders / "dequantized")
    assert packed == expected
