"""Properties that hold for all inputs, on examples that hypothesis makes: the same in every run, more with FP6_SOAK=full."""

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor

from fp6_compile import CheckpointError, PackedTensor
from fp6_compile.backend.find.linears import _einsum_orientation
from fp6_compile.checkpoint.packed_weight import PackedWeight
from fp6_compile.formats import FORMATS, Format
from fp6_compile.layouts.packing import CPU, LAYOUTS, PLANES, pack, unpack
from fp6_compile.layouts.spec import PackingSpec

formats = st.sampled_from(list(FORMATS.values()))
layouts = st.sampled_from(LAYOUTS)
seeds = st.integers(0, 2**32)
group_sizes = st.none() | st.sampled_from([1, 7, 32, 64, 1000])


@given(formats, layouts, st.integers(0, 70), st.integers(0, 600), seeds)
@example(FORMATS["e3m2"], CPU, 1, 1, 0)
def test_unpack_inverts_pack(fmt, layout, n, k, seed):
    assume(layout != CPU or fmt.bits == 6)
    codes = torch.randint(0, 2**fmt.bits, (n, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    planes = pack(codes, fmt, layout)
    assert torch.equal(unpack(planes, fmt, layout, n, k), codes)
    assert all(plane.is_contiguous() for plane in planes)


@given(formats, layouts, group_sizes, st.integers(1, 70), st.integers(1, 300), st.data())
def test_slicing_and_packing_commute(fmt, layout, group_size, n, k, data):
    """Rows have scales of their own."""
    assume(layout != CPU or fmt.bits == 6)
    start = data.draw(st.integers(0, n))
    stop = data.draw(st.integers(start, n))
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(n * k)).half()
    rows = PackedTensor.quantize(weight, fmt.name, group_size).repack(layout)[start:stop]
    expected = PackedTensor.quantize(weight[start:stop], fmt.name, group_size).repack(layout)
    assert rows.shape == (stop - start, k)
    assert torch.equal(rows.codes(), expected.codes())
    assert torch.equal(rows.dequantize(), expected.dequantize())


def _magnitudes(fmt: Format) -> Tensor:
    """The values of the codes from zero to the largest, float32 [codes]."""
    return fmt.decode(torch.arange(fmt.max_code + 1, dtype=torch.uint8))


@st.composite
def floats(draw, fmt):
    """float32 values: any, or halfway between two neighbours."""
    magnitudes = _magnitudes(fmt).tolist()
    i = draw(st.integers(0, len(magnitudes) - 2))
    middle = (magnitudes[i] + magnitudes[i + 1]) / 2
    return draw(st.floats(-2 * fmt.max, 2 * fmt.max, width=32) | st.sampled_from([middle, -middle]))


@given(formats, st.data())
def test_encode_is_monotone_and_nearest_and_ties_go_to_even(fmt, data):
    x = torch.tensor(data.draw(st.lists(floats(fmt), min_size=2, max_size=20))).sort().values
    codes = fmt.encode(x)
    values = fmt.decode(codes)
    assert (values.diff() >= 0).all()
    magnitudes = _magnitudes(fmt).double()
    distances = (x.double().abs().clamp(max=fmt.max)[:, None] - magnitudes).abs()
    nearest = distances.min(1).values
    assert torch.equal((x.double().clamp(-fmt.max, fmt.max) - values.double()).abs(), nearest)
    ties = (distances == nearest[:, None]).sum(1) > 1
    if fmt.mantissa_bits:
        assert not (codes[ties] & 1).any()


specs = st.builds(
    PackingSpec,
    st.sampled_from(list(FORMATS)),
    st.just(PLANES),
    st.none() | st.integers(1, 1 << 40),
    st.integers(1, 1 << 40),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    st.just(False),
)
weights = st.builds(PackedWeight, specs, st.integers(1, 1 << 40))
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
json_values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)


@given(weights)
def test_a_weight_comes_back_from_its_json(weight):
    assert PackedWeight.from_json("w", weight.to_json()) == weight


@given(weights, st.sampled_from(["format", "group_size", "shape", "dtype", "other"]), json_values)
def test_other_json_is_a_checkpoint_error(weight, key, value):
    """A weight with one entry changed, and any value at all: a CheckpointError, unless it is what `to_json` gives."""
    for about in ({**weight.to_json(), key: value}, value):
        found = _read(about)
        assert found is None or found.to_json() == about


def _read(about: object) -> PackedWeight | None:
    try:
        return PackedWeight.from_json("w", about)
    except CheckpointError:
        return None


@st.composite
def einsums(draw):
    """(equation, position of the weight) of products of an x and a weight of two dimensions."""
    letters = "abcd"
    x = "".join(draw(st.permutations(letters)))[: draw(st.integers(1, 4))]
    w = "".join(draw(st.permutations("abcdn")))[:2]
    summed = set(draw(st.sets(st.sampled_from("abcdn"))))
    output = "".join(draw(st.permutations(sorted(set(x + w) - summed))))
    return (f"{x},{w}->{output}", 1) if draw(st.booleans()) else (f"{w},{x}->{output}", 0)


@given(einsums())
@example(("ab,nb->an", 1))
@example(("bn,acb->acn", 0))
def test_the_roles_of_an_einsum_are_those_it_computes_with(case):
    """A weight [N, K], or [K, N] if transposed, of which K meets x and N is the output's."""
    equation, position = case
    transposed = _einsum_orientation(equation, position, 2)
    if transposed is None:
        return
    inputs, output = equation.split("->")
    terms = inputs.split(",")
    x_term, w_term = terms[1 - position], terms[position]
    n, k = w_term[::-1] if transposed else w_term
    sizes = {letter: i + 2 for i, letter in enumerate("abcdn")}
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randint(-4, 5, [sizes[i] for i in term], generator=generator).double() for term in (x_term, w_term))
    expected = torch.einsum(equation, *((x, w) if position else (w, x)))
    y = x.movedim(x_term.index(k), -1) @ (w if transposed else w.T)
    y_term = x_term.replace(k, "") + n
    for letter in set(y_term) - set(output):
        y, y_term = y.sum(y_term.index(letter)), y_term.replace(letter, "")
    assert torch.equal(y.permute([y_term.index(i) for i in output]), expected)


@pytest.mark.parametrize(
    ("equation", "position"), [("bk,nk", 1), ("bk,nkj->bnj", 1), ("bk,bk->b", 1), ("nk,nk->n", 0), ("bk,nn->bkn", 1)]
)
def test_an_einsum_that_is_no_linear_has_no_roles(equation, position):
    assert _einsum_orientation(equation, position, 2) is None
