"""Fixtures: every test starts from a clean Dynamo, and GPU tests are skipped where there is no GPU."""

import pytest
import torch
from torch._dynamo.utils import counters

from tests.support import without_codegen


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


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; none is available"))
