"""Writes into packed weights: they reach the weight as a whole, for every reader, or are refused; none is lost."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fp6_compile import PackedTensor
from fp6_compile.layouts.packing import PLANES

N, K = 128, 128


def _packed(value=None, n=N, k=K):
    return PackedTensor.quantize(torch.randn(n, k).half() if value is None else torch.full((n, k), value).half())


ALIASES = {
    "itself": lambda w: w,
    "detach": lambda w: w.detach(),
    ".data": lambda w: w.data,
    "transposed": lambda w: w.t(),
    "view": lambda w: w.view(N, K),
    "all rows": lambda w: w[:],
    "narrow to all": lambda w: w.narrow(1, 0, K),
    "contiguous": lambda w: w.contiguous(),
    "to": lambda w: w.to(torch.float16),
    "Parameter": lambda w: nn.Parameter(w, requires_grad=False),
}


@pytest.mark.parametrize("alias", ALIASES)
def test_a_write_through_an_alias_reaches_the_weight(alias):
    w, new = _packed(), _packed(1.0)
    ALIASES[alias](w).copy_(new.t() if alias == "transposed" else new)
    assert torch.equal(w, new)


def test_copies_are_not_aliases():
    w = _packed()
    for other in (w.clone(), copy.deepcopy(w), w.bfloat16().half(), w.repack(PLANES), w[:64].clone(), copy.copy(w)):
        before = w.clone()
        other.copy_(_packed(1.0, n=len(other)))
        assert torch.equal(w, before)


def test_a_write_raises_the_version():
    w = nn.Parameter(_packed(), requires_grad=False)
    version = w._version
    with torch.no_grad():
        w.copy_(_packed())
        assert w._version == version + 1
        w.t().copy_(_packed().t())
        assert w._version == version + 2


PARTS = {
    "slice": lambda w: w[:64],
    "inputs": lambda w: w[:, 64:],
    "narrow": lambda w: w.narrow(0, 0, 100),
    "chunk": lambda w: w.chunk(2)[1],
    "split": lambda w: w.split([100, 28])[0],
    "tensor_split": lambda w: w.tensor_split(2, 1)[0],
    "of all": lambda w: w[:][:64],
    "of a part": lambda w: w[:64][:32],
    "all of a part": lambda w: w[:64][:],
    "transposed": lambda w: w[:64].t(),
    "of the transposed": lambda w: w.t()[:64],
    "detached": lambda w: w[:64].detach(),
    ".data": lambda w: w[:64].data,
    "a parameter": lambda w: nn.Parameter(w[:64], requires_grad=False),
}


@pytest.mark.parametrize("part", PARTS)
def test_a_write_into_a_part_is_refused(part):
    w = _packed()
    before, target = w.clone(), PARTS[part](w)
    with pytest.raises(ValueError, match=r"cut out of another packed weight, .* or a \.clone\(\) of the part"):
        target.copy_(PARTS[part](_packed(1.0)))
    assert torch.equal(w, before)


def test_a_write_into_a_part_is_refused_when_compiled():
    def write(w, new):
        w[:64].copy_(new)

    w, new = _packed(), _packed(1.0, n=64)
    before = w.clone()
    with pytest.raises(Exception, match="cut out of another packed weight"):
        torch.compile(write, backend="aot_eager")(w, new)
    assert torch.equal(w, before)


def _set(index, value):
    return lambda w: w.__setitem__(index, value)


def _step(optimizer, **how):
    def step(w):
        w.grad = torch.ones(N, K).half()
        optimizer([w], lr=0.1, **how).step()

    return step


IN_PLACE = {
    "add_": lambda w: w.add_(1),
    "mul_": lambda w: w.mul_(2),
    "zero_": lambda w: w.zero_(),
    "fill_": lambda w: w.data.fill_(1),
    "masked_fill_": lambda w: w.masked_fill_(torch.ones(N, K, dtype=torch.bool), 0),
    "index_copy_": lambda w: w.index_copy_(0, torch.tensor([0]), _packed(n=1)),
    "lerp_": lambda w: w.lerp_(_packed(), 1.0),
    "set_": lambda w: w.set_(_packed()),
    "resize_": lambda w: w.resize_(1, 1),
    "t_": lambda w: w.t_(),
    "out=": lambda w: torch.mm(torch.ones(N, 1).half(), torch.ones(1, K).half(), out=w),
    "w[:] = 0": _set(slice(None), 0),
    "w[:64] = 0": _set(slice(64), 0),
    "w[0] = 0": _set(0, 0),
    "w[mask] = 0": _set(torch.ones(N, K, dtype=torch.bool), 0),
    "nn.init": nn.init.normal_,
    "kaiming": nn.init.kaiming_uniform_,
    "_foreach_add_": lambda w: torch._foreach_add_([w], 1),
    "_foreach_copy_": lambda w: torch._foreach_copy_([w], [_packed()]),
    "dropout": lambda w: F.dropout(w, inplace=True),
    "SGD": _step(torch.optim.SGD, foreach=False),
    "SGD, foreach": _step(torch.optim.SGD, foreach=True),
    "SGD, fused": _step(torch.optim.SGD, fused=True),
    "AdamW": _step(torch.optim.AdamW),
}


@pytest.mark.parametrize("what", IN_PLACE)
def test_other_writes_are_refused(what):
    w = nn.Parameter(_packed(), requires_grad=False)
    before = w.clone()
    with torch.no_grad(), pytest.raises(NotImplementedError, match=r"is not defined for PackedTensor"):
        IN_PLACE[what](w)
    assert torch.equal(w, before)


def test_data_takes_packed_weights_only():
    w, new = nn.Parameter(_packed(), requires_grad=False), PackedTensor.quantize(torch.ones(64, K), "e3m2", 64)
    for value in (torch.ones(N, K).half(), torch.ones(64)):
        with pytest.raises(TypeError, match=rf"\.data of PackedTensor.* cannot be a {value.dtype} tensor; .*quantize"):
            w.data = value
    with pytest.raises(TypeError, match="cannot be a torch.float16 tensor"):
        nn.utils.vector_to_parameters(torch.ones(N * K).half(), [w])
    w.data = new
    assert (w.shape, w.dtype, w.spec) == (new.shape, new.dtype, new.spec)
    assert torch.equal(w, new)
    x = torch.randn(2, K)
    assert torch.equal(F.linear(x, w), F.linear(x, new))


READS = {
    "mm": lambda w, x: F.linear(x, w),
    "x @ W.T": lambda w, x: x @ w.T,
    "dequantize": lambda w, x: w.dequantize(),
    "clone": lambda w, x: w.clone().dequantize(),
    "to": lambda w, x: w.float().dequantize(torch.float16),
    "deepcopy": lambda w, x: copy.deepcopy(w).dequantize(),
    "slice": lambda w, x: w[4:8].dequantize(),
    "repack": lambda w, x: w.repack(PLANES).dequantize(),
}


@pytest.mark.parametrize("read", READS)
def test_readers_see_the_old_or_the_new_weight(read):
    """Weights of equal codes and other scales, and the other way round: what is torn is neither."""
    states = [_packed(1.0), _packed(-4.0)]
    w, x = states[0].clone(), torch.ones(2, K).half()
    allowed = [READS[read](state, x) for state in states]
    stop, torn = threading.Event(), []

    def loop():
        while not stop.is_set():
            seen = READS[read](w, x)
            if not any(torch.equal(seen, one) for one in allowed):
                torn.append(seen)

    readers = [threading.Thread(target=loop) for _ in range(2)]
    for reader in readers:
        reader.start()
    for i in range(300):
        w.copy_(states[i % 2])
    stop.set()
    for reader in readers:
        reader.join()
    assert not torn


def test_a_reader_keeps_the_state_that_it_has():
    w, new = _packed(1.0), _packed(2.0)
    *planes, scale = w.tensors
    before = [t.clone() for t in (*planes, scale)]
    w.copy_(new)
    assert all(torch.equal(t, b) for t, b in zip((*planes, scale), before, strict=True))
    assert all(torch.equal(t, n) for t, n in zip(w.tensors, new.tensors, strict=True))


def test_a_move_does_not_undo_a_write():
    """Merging copies planes, and a write may come in between."""
    w, new = _packed(1.0), _packed(2.0)
    source = w.tensors
    w.copy_(new)
    w.move_to(source[:-1], source[-1], source)
    assert torch.equal(w, new)


def test_a_write_that_fails_changes_nothing():
    w = _packed(1.0)
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        w.copy_(w.to("meta"))
    assert torch.equal(w, _packed(1.0))
