"""The kernel as machine code, without a GPU: within the bars and the budget of benchmarks/sass, case by case."""

import pytest

from benchmarks.sass import budget as sass
from benchmarks.sass.cases import CASES, WIDE, Case, compile_case


@pytest.mark.slow
def test_all_cases_are_within_bars_and_budget():
    """Compiled by two processes: half a minute with nothing cached."""
    assert sass.violations(sass.measure_all(CASES), sass.read_budget(), CASES) == []


def test_the_budget_has_these_cases_and_no_others():
    assert list(sass.read_budget()) == [case.name for case in CASES]


@pytest.mark.parametrize("m", [8, *(pytest.param(m, marks=pytest.mark.slow) for m in (16, 32, 64))])
def test_weights_stay_in_registers(m):
    """They are loaded by asynchronous copies, and nothing in the loop writes shared memory or permutes bytes."""
    loop = compile_case(Case("sm_90", m, WIDE, "e3m2", "fp16")).code.hot_loop
    assert loop.count("PRMT") == 0
    assert loop.count("STS") == loop.count("STSM") == loop.count("SHFL") == 0
    assert loop.count("LDGSTS") > 0


def test_odd_k_masks_x_only():
    """A K tail costs comparisons, for x; the weights of the padded block are loaded as ever."""
    row = sass.measure(Case("sm_90", 8, WIDE, "e3m2", "fp16", k=400))
    assert row["mma_kind"] == "HMMA"
    assert row["per_weight"] <= 2.7


def test_float32_uses_no_tensor_core():
    """TF32 would round x and the products' sum to 10 bits."""
    row = sass.measure(Case("sm_90", 16, WIDE, "e3m2", "fp32"))
    assert row["mma_kind"] is None
    assert (row["stack"], row["spill_bytes"]) == (0, 0)


@pytest.mark.parametrize("dtype", ["fp16", pytest.param("bf16", marks=pytest.mark.slow)])
def test_amd(dtype):
    """The twin, on the matrix cores, within the 64 KB of shared memory."""
    row = sass.measure(Case("gfx942", 32, WIDE, "e3m2", dtype))
    assert "v_mfma" in row["mma_kind"]
    assert row["spill_bytes"] == 0
    assert row["shared"] <= 64 << 10


CASE = Case("sm_90", 8, WIDE, "e3m2", "fp16")


@pytest.fixture(scope="module")
def measured():
    return sass.measure(CASE)


@pytest.fixture
def row(measured):
    return dict(measured)


@pytest.mark.parametrize("figure", sass.BUDGETED)
def test_a_figure_pushed_over_its_budget_is_found(row, figure):
    budget = sass.read_budget()[CASE.name]
    row[figure] = budget[figure] * 1.03 + (0 if budget[figure] else 1)
    found = sass.violations([row], {CASE.name: budget}, [CASE])
    assert any(f"{CASE.name}: {figure} " in line and "the budget is" in line for line in found)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"per_weight": 2.21}, "2.21 instructions a weight, the bar is 2.2"),
        ({"alu": 1.46}, "1.46 on the integer pipe a weight, the bar is 1.45"),
        ({"mma_kind": "HGMMA"}, "HGMMA at M = 8, where only mma.sync"),
        ({"stack": 32}, "32 bytes of stack, the bar is 24"),
        ({"spill_bytes": 8}, "8 bytes spilled"),
        ({"loop_spills": 0.03}, "3% of the hot loop are local loads and stores"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_bar_holds_whatever_the_budget(row, change, complaint):
    row |= change
    generous = {CASE.name: {**sass.read_budget()[CASE.name], **row, "mma_kind": ["HGMMA", "HMMA"]}}
    generous[CASE.name] = {name: generous[CASE.name][name] for name in (*sass.BUDGETED, "mma_kind")}
    (found,) = sass.violations([row], generous, [CASE])
    assert complaint in found


def test_accept_raises_and_never_lowers(row, tmp_path):
    path = tmp_path / "budget.json"
    sass.accept([row], path)
    higher, lower = {**row, "registers": row["registers"] + 8}, {**row, "registers": row["registers"] - 8}
    sass.accept([higher], path)
    sass.accept([lower], path)
    assert sass.read_budget(path)[CASE.name]["registers"] == row["registers"] + 8
    assert sass.violations([row], sass.read_budget(path), [CASE]) == []


def test_a_case_without_a_budget_and_a_budget_without_a_case(row):
    assert "no budget" in sass.violations([row], {}, [CASE])[0]
    assert "no longer a case" in sass.violations([], {"sm_70": {}}, [CASE])[0]
