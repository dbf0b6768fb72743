"""Every test starts from a clean Dynamo; GPU tests are skipped where there is no GPU; what hypothesis runs."""

import os
import shutil

import hypothesis
import pytest
import torch
from torch._dynamo.utils import counters

import fp6_compile
from fp6_compile.backend.compile import fp6
from tests.support.checkpoints import packed_tower
from tests.support.graphs import without_codegen
from tests.support.soak import count

# Each core has a worker of its own, and matrices are small: more threads, here or in a child, would wait for each other.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# A checkout that is not installed, as on a borrowed GPU machine, has no entry point.
if "fp6" not in torch._dynamo.list_backends(exclude_tags=None):
    torch._dynamo.register_backend(fp6, name="fp6")

# The same examples in every run: a failure is one that everybody sees.
hypothesis.settings.register_profile(
    "fp6", derandomize=True, database=None, deadline=None, max_examples=count(2000, 50)
)
hypothesis.settings.load_profile("fp6")


@pytest.fixture(autouse=True)
def _clean_dynamo():
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture
def captured():
    """Compilation up to the pass, and what went through it."""
    with without_codegen() as graphs:
        yield graphs


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A folder with a packed model in three shards, and one more file for its buffers."""
    folder = tmp_path_factory.mktemp("saved")
    fp6_compile.save(packed_tower(), folder, shard_bytes=200_000)
    assert len(list(folder.glob("model-*-of-00003-*.safetensors"))) == 3
    assert len(list(folder.glob("*.safetensors"))) == 4
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of it, to be damaged."""
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; none is available"))
