"""Threads may compile first at the same moment and read while others write: no output is torn, none is stale."""

import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import fp6_compile
from fp6_compile import PackedTensor, quantize_
from tests.support.soak import count

DIM = 128
ROOT = Path(fp6_compile.__file__).parent.parent


@pytest.fixture
def impatient():
    """Threads take turns as often as they can, and torch adds none of its own."""
    interval, threads = sys.getswitchinterval(), torch.get_num_threads()
    sys.setswitchinterval(1e-6)
    torch.set_num_threads(1)
    yield
    sys.setswitchinterval(interval)
    torch.set_num_threads(threads)


def _run(functions):
    """All at once; the first error of any."""
    errors = []

    def work(function):
        try:
            with torch.no_grad():
                function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


class Siblings(nn.Module):
    """Two projections of one input, which are merged, and one more."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.o = (nn.Linear(DIM, DIM, bias=False) for _ in range(3))

    def forward(self, x):
        return torch.cat([self.q(x), self.k(x), self.o(x.relu())], -1)


class Written:
    """A compiled model whose weights a writer sets to one of some states, and what it gives in each of them."""

    def __init__(self, packed: bool, states: int = 3) -> None:
        model = Siblings().half().requires_grad_(False)
        if packed:
            quantize_(model)
        self.weights = [model.q.weight, model.k.weight, model.o.weight]
        self.values = [[self._value(packed) for _ in self.weights] for _ in range(states)]
        self.x = torch.randn(4, DIM).half()
        self.compiled = torch.compile(model, backend="fp6")
        self.outputs = []
        for state in range(states):
            self.write(state)
            self.outputs.append(self.read())

    @staticmethod
    def _value(packed: bool) -> torch.Tensor:
        value = torch.randn(DIM, DIM).half()
        return PackedTensor.quantize(value) if packed else value

    @torch.no_grad()
    def write(self, state: int) -> None:
        for weight, value in zip(self.weights, self.values[state], strict=True):
            weight.copy_(value)

    @torch.no_grad()
    def read(self) -> torch.Tensor:
        return self.compiled(self.x)

    def torn(self, output: torch.Tensor) -> int:
        """Of how many of the three weights the output is of no state."""
        parts = zip(*(known.split(DIM, -1) for known in self.outputs), strict=True)
        return sum(
            not any(torch.equal(part, state) for state in states)
            for part, states in zip(output.split(DIM, -1), parts, strict=True)
        )


@pytest.mark.parametrize("packed", [False, True], ids=["16 bits", "packed"])
def test_readers_beside_a_writer(packed, impatient):
    written, torn, stale = Written(packed), [], []
    done = threading.Event()

    def reader():
        while not done.is_set():
            torn.append(written.torn(written.read()))

    def writer():
        for i in range(30):
            state = i % len(written.values)
            written.write(state)
            stale.append(not torch.equal(written.read(), written.outputs[state]))
        done.set()

    _run([reader] * 4 + [writer])
    assert len(torn) > 10
    assert (sum(torn), sum(stale)) == (0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True], ids=["16 bits", "packed"])
def test_soak(packed):
    """Calls of eight threads beside a writer: none torn, none stale, and no more memory at the end."""
    torch.set_num_threads(1)
    each = count(12_500, 1_250)
    written, calls, torn, stale = Written(packed), [0] * 8, [0] * 8, []
    done, memory = threading.Event(), []

    def reader(number):
        while calls[number] < each:
            torn[number] += written.torn(written.read())
            calls[number] += 1
            if number == 0 and calls[0] in (each // 5, each):
                memory.append(_memory())
        done.set()

    def writer():
        i = 0
        while not done.wait(0.002):
            state = (i := i + 1) % len(written.values)
            written.write(state)
            stale.append(not torch.equal(written.read(), written.outputs[state]))

    _run([lambda number=number: reader(number) for number in range(8)] + [writer])
    print(f"{sum(calls)} calls, {len(stale)} writes, {sum(torn)} torn, {sum(stale)} stale, {memory} bytes")
    assert sum(calls) == 8 * each
    assert len(stale) > each // 125
    assert (sum(torn), sum(stale)) == (0, 0)
    assert memory[1] - memory[0] < 32 << 20


def _memory() -> int:
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_write_that_lands_in_a_refresh(impatient):
    """The next call, at the latest, has it."""
    model, x = nn.Linear(1024, 1024, bias=False).half().requires_grad_(False), torch.randn(4, 1024).half()
    compiled, a = torch.compile(model, backend="fp6"), torch.randn(1024, 1024).half()
    with torch.no_grad():
        compiled(x)
        model.weight.copy_(-a)
        expected = compiled(x)
        for _ in range(10):
            model.weight.copy_(a)
            thread = threading.Thread(target=lambda: _run([lambda: compiled(x)]))
            thread.start()
            model.weight.copy_(-a)
            thread.join()
            torch.testing.assert_close(compiled(x), expected, rtol=0, atol=0)


def test_layers_that_share_a_graph(impatient, captured):
    """After a graph break Dynamo runs one graph for all layers that look alike: no thread gets another layer's weight."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(DIM, DIM, bias=False)

        def forward(self, x):
            torch._dynamo.graph_break()
            return self.linear(x)

    layers = nn.ModuleList(Layer() for _ in range(4)).half().requires_grad_(False)
    x, wrong = torch.randn(2, DIM).half(), []
    compiled = [torch.compile(layer, backend="fp6") for layer in layers]
    with torch.no_grad():
        expected = [layer(x) for layer in compiled]

    def reader():
        for _ in range(50):
            wrong.extend(not torch.equal(layer(x), y) for layer, y in zip(compiled, expected, strict=True))

    _run([reader] * 3)
    assert sum(wrong) == 0


FIRST = """
import sys, threading, torch
from torch import nn

torch.set_num_threads(1)
torch._dynamo.config.fail_on_recompile_limit_hit = True
models = [nn.Linear(k, 128, bias=False).bfloat16().requires_grad_(False) for k in (128, 192, 256)]

class Shared(nn.Module):  # with a forward of its own: Dynamo counts the compilations of all of nn.Linear's together
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(128, 128, bias=False), nn.Linear(128, 128, bias=False)

    def forward(self, x):
        return self.b(self.a(x))  # no C++ to generate

shared = Shared().half().requires_grad_(False)
x, outputs, errors, start = torch.randn(2, 128).half(), [], [], threading.Barrier(4)
compiled = []

def own(model):
    with torch.no_grad():
        y = torch.compile(model, backend="fp6")(torch.ones(2, model.in_features).bfloat16())
        assert (y - model(torch.ones(2, model.in_features).bfloat16())).abs().max() < 0.5

def same():
    with torch.no_grad():
        outputs.append(compiled[0](x))

def work(function, *args):
    try:
        start.wait()
        function(*args)
    except BaseException as error:
        errors.append(repr(error)[:300])

def run(*calls):
    global start
    start = threading.Barrier(len(calls))
    threads = [threading.Thread(target=work, args=call) for call in calls]
    for thread in threads: thread.start()
    for thread in threads: thread.join()

sys.setswitchinterval(1e-6)
run(*((own, model) for model in models))
compiled.append(torch.compile(shared, backend="fp6"))
run(*[(same,)] * 8)
assert not errors, errors
assert len(outputs) == 8 and all(torch.equal(outputs[0], output) for output in outputs)
"""


@pytest.mark.slow
def test_threads_that_compile_first():
    """Models of their own, which register the backend and load the CPU kernel; then one model, by eight threads."""
    done = subprocess.run([sys.executable, "-c", FIRST], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
