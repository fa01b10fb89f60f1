"""The latency search against brute force, the table against a clock that counts, and both on every family."""

import itertools
import json
import math
import random

import pytest
import torch
from helpers.clocks import counting_clock
from helpers.encoders import FAMILIES, build
from hypothesis import given, settings
from hypothesis import strategies as st

from effnn.base import InvalidInput, NotAvailable
from effnn.ltp.pruning.adapters import adapter_for
from effnn.ltp.pruning.latency import blocks as latency_blocks
from effnn.ltp.pruning.latency import knapsack
from effnn.ltp.pruning.latency.knapsack import best_choice
from effnn.ltp.pruning.latency.measure import compare_latency, measure_latency
from effnn.ltp.pruning.latency.piecewise import Piecewise, PiecewiseSearch, fit_piecewise
from effnn.ltp.pruning.latency.search import Latency, LatencyTable, search_latency
from effnn.ltp.pruning.latency.table import _interpolated
from effnn.ltp.pruning.masks import Masks, Shape
from effnn.ltp.pruning.shrinking.shrink import shrink

RATIOS = [round(0.05 * step, 2) for step in range(1, 20)]
REL = 1 + 2e-9  # sums of floats


def kept(masks: Masks, heads: torch.Tensor, filters: torch.Tensor) -> float:
    return float((heads.double() * masks.heads).sum() + (filters.double() * masks.filters).sum())


# --- knapsack ---------------------------------------------------------------------------------------------------------

numbers = st.one_of(st.integers(0, 6).map(float), st.floats(0, 10, allow_subnormal=False))


@st.composite
def knapsacks(draw, most_options=5):
    groups = draw(
        st.lists(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=most_options), min_size=1, max_size=4)
    )
    costs = [torch.tensor([cost for cost, _ in group], dtype=torch.float64) for group in groups]
    values = [torch.tensor([value for _, value in group], dtype=torch.float64) for group in groups]
    least, most = sum(float(c.min()) for c in costs), sum(float(c.max()) for c in costs)
    return costs, values, least + draw(st.floats(0, 1)) * (most - least) + 1e-9


def brute_force(costs, values, budget: float) -> float:
    best = -math.inf
    for picks in itertools.product(*(range(len(cost)) for cost in costs)):
        if sum(float(c[p]) for c, p in zip(costs, picks, strict=True)) <= budget:
            best = max(best, sum(float(v[p]) for v, p in zip(values, picks, strict=True)))
    return best


@settings(deadline=None, max_examples=150)
@given(knapsacks())
def test_knapsack_finds_the_optimum(problem):
    costs, values, budget = problem
    choice = best_choice(costs, values, budget)
    assert choice.exact
    assert choice.value == pytest.approx(sum(float(v[p]) for v, p in zip(values, choice.picks, strict=True)))
    assert sum(float(c[p]) for c, p in zip(costs, choice.picks, strict=True)) <= budget * REL
    assert choice.value == pytest.approx(brute_force(costs, values, budget), abs=1e-9)
    assert choice.bound >= choice.value


@settings(deadline=None, max_examples=80)
@given(knapsacks(most_options=9))
def test_binned_knapsack_keeps_its_promise(problem):
    costs, values, budget = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knapsack, "MAX_STATES", 24)
        patch.setattr(knapsack, "MAX_OPTIONS", 6)
        choice = best_choice(costs, values, budget)
    assert choice.cost <= budget
    bins = len(costs) * budget / 24 + sum(float(c.max() - c.min()) / 6 for c in costs)
    optimum = brute_force(costs, values, budget)
    assert brute_force(costs, values, budget - bins) - 1e-9 <= choice.value <= optimum + 1e-9
    if choice.exact:
        assert choice.value == pytest.approx(optimum, abs=1e-9)


def test_knapsack_refuses_what_nothing_fits():
    one = torch.ones(1, dtype=torch.float64)
    with pytest.raises(InvalidInput, match="cheapest"):
        best_choice([one, one], [one, one], 1.5)


# --- search against brute force ---------------------------------------------------------------------------------------

L, H, F = 2, 3, 4


@st.composite
def tiny_problems(draw):
    def row(size):
        return draw(st.lists(numbers, min_size=size, max_size=size))

    heads = torch.tensor([row(H) for _ in range(L)], dtype=torch.float64)
    filters = torch.tensor([row(F) for _ in range(L)], dtype=torch.float64)
    head_ms, filter_ms, rest = row(H + 1), row(F + 1), draw(st.floats(0, 3))
    table = LatencyTable.from_values(head_ms, [*filter_ms[:-1], filter_ms[-1] + 1.0], rest)
    return heads, filters, table, draw(st.sampled_from(RATIOS))


def best_counts(heads, filters, table, budget, head_options, filter_options) -> float:
    """The greatest importance of any numbers of heads and filters within the budget; -inf if none fits."""
    top = [torch.cat([row.new_zeros(1), row.sort(descending=True).values.cumsum(0)]) for row in (*heads, *filters)]
    best = -math.inf
    for counts in itertools.product(*[head_options] * L, *[filter_options] * L):
        if table.predict_counts(counts[:L], counts[L:]) <= budget:
            best = max(best, sum(float(t[c]) for t, c in zip(top, counts, strict=True)))
    return best


@settings(deadline=None, max_examples=120)
@given(tiny_problems(), st.sampled_from([(0, 0, 1), (1, 0, 1), (0, 2, 1), (0, 0, 2), (0, 0, 3), (2, 1, 2)]))
def test_table_search_is_exact(problem, options):
    heads, filters, table, ratio = problem
    min_heads, min_filters, round_to = options
    budget = ratio * table.dense_prediction(L)
    head_options = range(min_heads, H + 1)
    filter_options = [n for n in {*range(0, F, round_to), F} if n >= min_filters]
    best = best_counts(heads, filters, table, budget * REL, head_options, filter_options)
    for latency_model in ("table", "piecewise"):
        target = Latency(ratio, latency_model=latency_model, min_heads=min_heads, min_filters=min_filters)
        if best == -math.inf:
            with pytest.raises(InvalidInput, match="smallest feasible ratio"):
                search_latency(heads, filters, table, target, round_to)
            continue
        masks = search_latency(heads, filters, table, target, round_to)
        assert table.predict(masks) <= budget * REL
        assert all(n in head_options for n in masks.heads_per_layer)
        assert all(n in filter_options for n in masks.filters_per_layer)
        if latency_model == "table":
            assert kept(masks, heads, filters) == pytest.approx(best, abs=1e-8)
        else:
            assert kept(masks, heads, filters) <= best + 1e-8


def test_the_most_important_units_are_kept_and_ties_go_to_the_lower_index():
    heads = torch.tensor([[1.0, 5.0, 3.0], [2.0, 2.0, 2.0]])
    filters = torch.zeros(2, 4)
    table = LatencyTable.from_values([0, 1, 2, 3], [0, 0, 0, 0, 0])
    masks = search_latency(heads, filters, table, Latency(0.5))
    assert masks.kept_heads == [[1, 2], [0]]
    assert masks.heads.dtype == torch.float32


def test_blocks_that_cost_the_same_whatever_they_keep_go_whole():
    # zero slope, and a budget that three of four blocks meet to the last bit
    table = LatencyTable.from_values([0, 1, 1, 1], [0, 1, 1, 1, 1])
    heads, filters = torch.tensor([[3.0, 3, 3], [1, 1, 1]]), torch.tensor([[2.0, 2, 2, 2], [2, 2, 2, 1]])
    for latency_model in ("table", "piecewise"):
        masks = search_latency(heads, filters, table, Latency(0.75, latency_model=latency_model))
        assert (masks.heads_per_layer, masks.filters_per_layer) == ([3, 0], [4, 4])


def test_ratio_one_keeps_everything():
    table = LatencyTable.from_values([0.1, 0.3, 0.7, 0.7], [0.2, 0.2, 0.4, 0.9, 1.1], 0.3)
    generator = torch.Generator().manual_seed(0)
    heads, filters = torch.rand(3, 3, generator=generator), torch.rand(3, 4, generator=generator)
    masks = search_latency(heads, filters, table, Latency(1.0))
    assert masks.heads.all() and masks.filters.all()


def test_an_infeasible_budget_names_a_ratio_that_works():
    table = LatencyTable.from_values([0.5, 1, 1, 2], [0.25, 1, 1, 1, 2.5], 1.0)
    heads, filters = torch.rand(2, 3), torch.rand(2, 4)
    with pytest.raises(InvalidInput, match="smallest feasible ratio is") as error:
        search_latency(heads, filters, table, Latency(0.2))
    smallest = float(str(error.value).rsplit(" ", 1)[1])
    assert 2.5 / 10 <= smallest < 2.5 / 10 + 2e-4
    search_latency(heads, filters, table, Latency(smallest))
    with pytest.raises(InvalidInput, match="smallest feasible ratio is"):
        search_latency(heads, filters, table, Latency(smallest - 2e-4))


@pytest.mark.parametrize(
    "heads, filters, options",
    [
        (torch.rand(2, 4), torch.rand(2, 4), {}),
        (torch.rand(2, 3), torch.rand(3, 4), {}),
        (torch.rand(2, 3), -torch.rand(2, 4), {}),
        (torch.full((2, 3), torch.nan), torch.rand(2, 4), {}),
        (torch.rand(2, 3), torch.rand(2, 4), {"round_to": 5}),
        (torch.rand(2, 3), torch.rand(2, 4), {"round_to": 0}),
    ],
)
def test_wrong_importances_are_refused(heads, filters, options):
    with pytest.raises(InvalidInput):
        search_latency(heads, filters, LatencyTable.from_values([0, 1, 2, 3], [0, 1, 2, 3, 4]), Latency(0.5), **options)


# --- BERT-base size ---------------------------------------------------------------------------------------------------


def staircase(units: int, tile: int, base: float, slope: float, step: float, empty: float) -> list[float]:
    return [empty] + [base + slope * n + step * math.ceil(n / tile) for n in range(1, units + 1)]


TABLES = {
    "tiles": LatencyTable.from_values(
        staircase(12, 2, 0.3, 0, 0.4, 0.05), staircase(3072, 128, 0.3, 0, 0.17, 0.05), 1.0
    ),
    "tilted": LatencyTable.from_values(staircase(12, 1, 0.1, 0.2, 0, 0), staircase(3072, 256, 0.2, 1e-4, 0.3, 0), 0.5),
    "flat": LatencyTable.from_values([0.0] + [2.0] * 12, [0.0] + [4.0] * 3072),
}


@pytest.mark.parametrize("name", TABLES)
def test_budget_is_kept_at_every_ratio(name):
    table = TABLES[name]
    generator = torch.Generator().manual_seed(1)
    heads = torch.rand(12, 12, generator=generator) * torch.rand(12, 1, generator=generator)
    filters = torch.rand(12, 3072, generator=generator).pow(3) / 100
    dense, before = table.dense_prediction(12), 0.0
    for ratio in RATIOS:
        masks = search_latency(heads, filters, table, Latency(ratio))
        assert table.predict(masks) <= ratio * dense * REL
        value = kept(masks, heads, filters)
        assert value >= before  # a larger budget never keeps less
        before = value
        if ratio in (0.05, 0.3, 0.5, 0.95):
            paper = search_latency(heads, filters, table, Latency(ratio, latency_model="piecewise"))
            assert table.predict(paper) <= ratio * dense * REL
            assert kept(paper, heads, filters) <= value * REL
            rounded = search_latency(heads, filters, table, Latency(ratio), round_to=100)
            assert table.predict(rounded) <= ratio * dense * REL
            assert all(n % 100 == 0 or n == 3072 for n in rounded.filters_per_layer)


# --- the paper's model ------------------------------------------------------------------------------------------------


def slow_fit(ms: list[float]) -> tuple[float, float, float, int]:
    best = (math.inf, 0.0, 0.0, 0)
    for base in range(1, len(ms) + 1):
        constant = sum(ms[:base]) / base
        steps = range(1, len(ms) - base + 1)
        slope = sum(m * (ms[base + m - 1] - constant) for m in steps) / max(sum(m * m for m in steps), 1)
        slope = max(slope, 0.0)
        error = sum((y - constant) ** 2 for y in ms[:base])
        error += sum((ms[base + m - 1] - constant - slope * m) ** 2 for m in steps)
        if error < best[0] - 1e-12:
            best = error, constant, slope, base
    return best


@settings(deadline=None, max_examples=60)
@given(st.lists(numbers, min_size=1, max_size=12))
def test_fit_is_the_least_squares_one(ms):
    found = fit_piecewise(ms)
    error, *_ = slow_fit(ms)
    squares = sum((found.ms(n) - y) ** 2 for n, y in enumerate(ms, start=1))
    assert squares == pytest.approx(error, abs=1e-8)
    assert found.slope_ms >= 0 and found.base_ms >= 0


def test_fit_finds_its_own_curve():
    found = fit_piecewise([Piecewise(300, 0.7, 2e-3).ms(n) for n in range(1, 1025)])
    assert (found.base, found.base_ms, found.slope_ms) == (300, pytest.approx(0.7), pytest.approx(2e-3))
    assert (found.ms(0), found.ms(1), found.ms(301)) == (0.0, found.base_ms, pytest.approx(0.702))


def slow_piecewise(heads, filters, head_fit, filter_fit, budget) -> float:
    """Every (i, j, extra heads, extra filters) of the paper's search in plain loops; the greatest importance."""
    best = -math.inf

    def split(ranked, fit):
        base = [float(row[: fit.base].sum()) for row in ranked]
        order = sorted(range(len(base)), key=lambda layer: base[layer])
        return base, order

    head_base, head_order = split(heads, head_fit)
    filter_base, filter_order = split(filters, filter_fit)
    for i, j in itertools.product(range(len(heads) + 1), range(len(filters) + 1)):
        kept_heads, kept_filters = head_order[i:], filter_order[j:]
        rest = budget - len(kept_heads) * head_fit.base_ms - len(kept_filters) * filter_fit.base_ms
        if rest < 0:
            continue
        extra_heads = sorted((float(x) for k in kept_heads for x in heads[k][head_fit.base :]), reverse=True)
        extra_filters = sorted((float(x) for k in kept_filters for x in filters[k][filter_fit.base :]), reverse=True)
        score = sum(head_base[k] for k in kept_heads) + sum(filter_base[k] for k in kept_filters)
        for n, m in itertools.product(range(len(extra_heads) + 1), range(len(extra_filters) + 1)):
            if n * head_fit.slope_ms + m * filter_fit.slope_ms <= rest:
                best = max(best, score + sum(extra_heads[:n]) + sum(extra_filters[:m]))
    return best


fits = st.builds(Piecewise, st.integers(1, 3), st.sampled_from([0.0, 1.0, 2.5]), st.sampled_from([0.0, 0.5, 1.0]))


@settings(deadline=None, max_examples=80)
@given(tiny_problems(), fits, fits, st.floats(0, 15))
def test_piecewise_search_is_the_papers_without_its_defects(problem, head_fit, filter_fit, budget):
    heads, filters = (x.sort(dim=1, descending=True).values for x in problem[:2])
    search = PiecewiseSearch(heads, filters, head_fit, filter_fit)
    counts = search.within(budget)
    ms = sum(head_fit.ms(n) for n in counts[0]) + sum(filter_fit.ms(n) for n in counts[1])
    assert ms <= budget + 1e-9
    value = sum(float(row[:n].sum()) for row, n in zip((*heads, *filters), counts[0] + counts[1], strict=True))
    assert value == pytest.approx(slow_piecewise(heads, filters, head_fit, filter_fit, budget), abs=1e-9)
    # nothing is lost by solving the same table as a knapsack
    costs = [torch.tensor([head_fit.ms(n) for n in range(H + 1)], dtype=torch.float64)] * L
    costs += [torch.tensor([filter_fit.ms(n) for n in range(F + 1)], dtype=torch.float64)] * L
    values = [torch.cat([row.new_zeros(1), row.cumsum(0)]) for row in (*heads, *filters)]
    assert best_choice(costs, values, budget + 1e-12).value >= value - 1e-9
    assert search.within(-1.0) is None


@pytest.mark.parametrize("ratio", [0.5, 0.7, 0.9])
def test_the_published_cases_are_solved(ratio):
    # all bases together take 8 of 14 ms: at 0.5 some block has to go, which the published search could not do
    table = LatencyTable.from_values([0, 1, 1, 1.25, 1.5], [0] + [1.0] * 64 + [1 + n / 64 for n in range(1, 65)])
    generator = torch.Generator().manual_seed(2)
    heads, filters = torch.rand(4, 4, generator=generator), torch.rand(4, 128, generator=generator) / 30
    paper = search_latency(heads, filters, table, Latency(ratio, latency_model="piecewise"))
    exact = search_latency(heads, filters, table, Latency(ratio))
    assert ratio - 0.1 < table.predict(paper) / 14 <= ratio * REL
    assert kept(exact, heads, filters) >= kept(paper, heads, filters) / REL
    if ratio == 0.5:
        assert paper.heads_per_layer.count(0) + paper.filters_per_layer.count(0) >= 1


# --- target and table -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"ratio": 0.0},
        {"ratio": 1.1},
        {"ratio": 0.5, "batch": 0},
        {"ratio": 0.5, "seq_len": 2.5},
        {"ratio": 0.5, "grid": 0},
        {"ratio": 0.5, "repeats": 0},
        {"ratio": 0.5, "min_heads": -1},
        {"ratio": 0.5, "dtype": "int64"},
        {"ratio": 0.5, "latency_model": "linear"},
    ],
)
def test_target_is_validated(wrong):
    with pytest.raises(InvalidInput):
        Latency(**wrong)


def test_relaxed_target_is_the_square_root():
    target = Latency(0.25, batch=3, latency_model="piecewise", min_heads=1)
    assert target.relaxed() == Latency(0.5, batch=3, latency_model="piecewise", min_heads=1)
    assert Latency(0.5, dtype="bfloat16").torch_dtype() is Latency(0.5, dtype=torch.bfloat16).torch_dtype()


@settings(deadline=None, max_examples=60)
@given(st.lists(numbers, min_size=1, max_size=10))
def test_isotonic_is_the_nearest_rising_sequence(values):
    fitted = _interpolated(dict(enumerate(values)))
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(fitted))
    # conditions of the projection onto the cone: sums over each tail of the residual are <= 0, and 0 over all
    residual = [value - fit for value, fit in zip(values, fitted, strict=True)]
    assert sum(residual) == pytest.approx(0, abs=1e-9)
    assert all(sum(residual[start:]) <= 1e-9 for start in range(len(values)))
    assert sum(r * f for r, f in zip(residual, fitted, strict=True)) == pytest.approx(0, abs=1e-8)


def test_table_saves_and_loads(tmp_path):
    table = LatencyTable.from_values(
        [0, 1, 2], [0, 1, 1.5], 0.5, head_points=((0, 0.1), (2, 2.0)), batch=4, device="cpu", provenance={"threads": 1}
    )
    assert LatencyTable.load(table.save(tmp_path / "deep" / "table.json")) == table
    assert table.predict(Masks(torch.tensor([[0.0, -2.0]]), torch.ones(1, 2))) == pytest.approx(0.5 + 1 + 1.5)


@pytest.mark.parametrize("text", [None, "", "{", "[]", "{}", '{"format": 9}', '{"format": 1, "head_ms": [0, 1]}'])
def test_a_file_that_is_no_table_is_refused(tmp_path, text):
    path = tmp_path / "table.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InvalidInput, match="table"):
        LatencyTable.load(path)


def test_a_damaged_table_is_refused(tmp_path):
    path = LatencyTable.from_values([0, 1], [0, 1]).save(tmp_path / "table.json")
    values = json.loads(path.read_text())
    for name, wrong in (("head_ms", [0, -1]), ("filter_ms", [1]), ("rest_ms", -1.0)):
        path.write_text(json.dumps(values | {name: wrong}))
        with pytest.raises(InvalidInput, match=name):
            LatencyTable.load(path)
    with pytest.raises(InvalidInput, match="no time"):
        LatencyTable.from_values([0, 0], [0, 0])


def test_a_table_of_other_inputs_is_refused():
    table = LatencyTable.from_values([0, 1], [0, 1], batch=4, seq_len=16, device="cpu", dtype="float32")
    one = torch.ones(1, 1)
    search_latency(one, one, table, Latency(0.5, batch=4, seq_len=16, device="cpu", dtype=torch.float32))
    for wrong in ({"batch": 5}, {"seq_len": 8}, {"device": "cuda"}, {"dtype": "bfloat16"}):
        with pytest.raises(InvalidInput, match=next(iter(wrong))):
            search_latency(one, one, table, Latency(0.5, **{"batch": 4, "seq_len": 16} | wrong))


def test_a_table_of_another_model_is_refused(monkeypatch):
    target = Latency(0.5, batch=2, seq_len=6, repeats=1, grid=24)
    model, _ = FAMILIES["bert"]()
    table = LatencyTable.measure(model, target, progress=False)
    table.check(target, model)
    sizes = {"layers": "num_hidden_layers", "heads": "num_attention_heads", "filters": "intermediate_size"}
    for name, size in (sizes | {"hidden": "hidden_size"}).items():
        other, _ = build("bert", **{size: 2 * getattr(model.config, size)})
        with pytest.raises(InvalidInput, match=f"is of a model with {name}=.*LatencyTable.measure"):
            table.check(target, other)
    other, _ = build("bert", num_hidden_layers=1)
    LatencyTable.from_values(table.head_ms, table.filter_ms).check(target, other)  # values are of any number of layers
    with pytest.raises(InvalidInput, match=r"\(8, 48\) per layer; the latency table is of \(4, 48\)"):
        table.predict(Masks(torch.ones(3, 8), torch.ones(3, 48)))


# --- measuring --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_table_counts_what_each_block_runs(family, monkeypatch):
    model, _ = FAMILIES[family]()
    shape = Shape.of(model)
    batch, seq_len = 2, 6
    with counting_clock(monkeypatch) as now:
        target = Latency(0.5, batch=batch, seq_len=seq_len, grid=20, repeats=2)
        table = LatencyTable.measure(model, target, progress=False)
        tokens = batch * (10 if family == "vit" else seq_len)
        head, filter_ = 4 * shape.hidden * shape.head_size * tokens, 2 * shape.hidden * tokens
        assert table.head_ms == pytest.approx([1000 * head * n for n in range(shape.heads + 1)])
        assert [count for count, _ in table.filter_points] == [0, 1, 11, 20, 31, 40, 47, shape.filters]
        assert table.filter_ms == pytest.approx([1000 * filter_ * n for n in range(shape.filters + 1)])
        assert table.rest_ms > 0
        assert table.dense_ms == pytest.approx(table.dense_prediction(shape.layers))
        # what is predicted for a shrunk model is what it runs
        generator = torch.Generator().manual_seed(3)
        heads, filters = (
            torch.rand(shape.layers, shape.heads, generator=generator),
            torch.rand(shape.layers, shape.filters),
        )
        masks = search_latency(heads, filters, table, target)
        assert 0.4 < table.predict(masks) / table.dense_ms <= 0.5 * REL
        small, inputs = shrink(model, masks), latency_blocks.random_inputs(model, batch, seq_len)[0]
        before = now()
        with torch.no_grad():
            small(**inputs)
        assert 1000 * (now() - before) == pytest.approx(table.predict(masks))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_timed_layers_are_those_of_the_shrunk_model(family, attention):
    model, _ = FAMILIES[family](attention=attention)
    adapter, shape = adapter_for(model), Shape.of(model)
    heads, filters = [0, 2, 4], [shape.filters, 0, 7]
    masks = Masks(
        (torch.arange(shape.heads) < torch.tensor(heads).unsqueeze(1)).float(),
        (torch.arange(shape.filters) < torch.tensor(filters).unsqueeze(1)).float(),
    )
    inputs = latency_blocks.random_inputs(model, 2, 6)[0]
    timed = latency_blocks._MarkedModel(model, adapter, heads, filters, latency_blocks._Clock(model.device))
    times = timed.run(inputs)
    assert len(times.blocks) == shape.layers and all(a >= 0 and f >= 0 for a, f in times.blocks)
    assert times.total == pytest.approx(times.rest + sum(a + f for a, f in times.blocks)) and times.rest > 0
    with torch.inference_mode():
        torch.testing.assert_close(timed.model(**inputs).logits, shrink(model, masks)(**inputs).logits)


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_measuring_leaves_the_model_as_it_was(family):
    model, batch = FAMILIES[family]()
    model.train()
    next(iter(model.children())).eval()
    modes = [module.training for module in model.modules()]
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    table = LatencyTable.measure(model, Latency(0.5, batch=2, seq_len=5, repeats=1, dtype="bfloat16"), progress=False)
    assert (table.dtype, table.device, table.batch, table.seq_len) == ("bfloat16", "cpu", 2, 5)
    assert table.provenance["threads"] == 1
    table = LatencyTable.measure(model, Latency(0.5, batch=2, seq_len=5, repeats=1), progress=False)
    between = [ms for count, ms in enumerate(table.filter_ms) if count % 32 and count < 48]
    for ms in (table.head_ms, [*table.filter_ms[::32], table.filter_ms[48]], between):
        assert all(a <= b for a, b in itertools.pairwise(ms))
    assert table.head_ms[0] > 0 and table.filter_ms[0] > 0 and table.rest_ms > 0
    assert [module.training for module in model.modules()] == modes
    marked = latency_blocks._MarkedModel(
        model, adapter_for(model), [1, 0, 4], [3, 0, 48], latency_blocks._Clock(model.device)
    )
    outside = dict(marked.model.named_parameters())
    for name, parameter in model.named_parameters():  # nothing but what is cut from is copied
        assert not any(part in name for part in ("embedding", "classifier")) or outside[name] is parameter
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert values.keys() == model.state_dict().keys()
    assert all(torch.equal(values[name], tensor) for name, tensor in model.state_dict().items())
    model(**batch).loss.backward()  # the weights still take gradients


@pytest.mark.parametrize(
    "most, grid", [(1, 32), (2, 32), (48, 1), (48, 2), (48, 16), (48, 64), (3072, 32), (3072, 128)]
)
def test_the_ends_the_multiples_and_some_numbers_between_are_measured(most, grid):
    counts = latency_blocks.measured_filters(most, grid)
    assert counts == sorted(set(counts)) and {0, 1, most - 1, most, *range(0, most, grid)} <= set(counts)
    between = [count for count in counts if count % grid and count not in (1, most - 1, most)]
    assert len(between) <= 2 * latency_blocks.BETWEEN and (between or grid <= 2 or most < grid // 2 + 2)
    assert all(count % 2 for count in between)


def test_widths_off_the_tiles_are_dearer_and_the_search_avoids_them(monkeypatch):
    """A machine that pays for whole tiles of 16 filters, and a third more for a tile that is not full."""

    def run(self, inputs):
        widths = [layer.intermediate.dense.out_features for layer in self.model.bert.encoder.layer]
        blocks = [(1.0, math.ceil(w / 16) * (1.0 if w % 16 == 0 else 1.33)) for w in widths]
        return latency_blocks.PassTimes(0.5 + sum(a + f for a, f in blocks), blocks)

    monkeypatch.setattr(latency_blocks._MarkedModel, "run", run)
    model, _ = build("bert", intermediate_size=256)
    target = Latency(0.6, batch=2, seq_len=6, grid=16, repeats=3)
    table = LatencyTable.measure(model, target, progress=False)
    assert table.filter_ms[64] == pytest.approx(4.0) and table.filter_ms[65] > 5 and table.filter_ms[71] > 5
    generator = torch.Generator().manual_seed(0)
    masks = search_latency(
        torch.rand(3, 4, generator=generator), torch.rand(3, 256, generator=generator), table, target
    )
    assert all(count % 16 == 0 for count in masks.filters_per_layer)
    assert sum(1.0 + count / 16 for count in masks.filters_per_layer) + 0.5 <= 0.6 * table.dense_ms + 1e-9


def test_a_round_takes_every_width():
    counts = latency_blocks._spread([0, 1, 5], 8, random.Random(0))
    assert len(counts) == 8 and {counts.count(n) for n in (0, 1, 5)} == {2, 3}


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_models_are_timed_interleaved(family):
    model, _ = FAMILIES[family]()
    shape = Shape.of(model)
    masks = Masks.ones(shape)
    masks.heads[0], masks.filters[1] = 0, 0
    ran = []
    models = {"dense": model.train(), "shrunk": shrink(model, masks)}
    handles = [
        model.register_forward_pre_hook(lambda *_, name=name: ran.append((name, models[name].training)))
        for name, model in models.items()
    ]
    timings = compare_latency(models, batch=2, seq_len=5, repeats=3, warmup=1)
    assert ran == [("dense", False), ("shrunk", False)] * 4
    assert [len(timings[name].seconds) for name in models] == [3, 3]
    assert all(ratio > 0 for ratio in timings["shrunk"].over(timings["dense"]))
    assert model.training
    for handle in handles:
        handle.remove()
    assert measure_latency(models["shrunk"], 1, 4, repeats=2).name == "model"


def test_inputs_are_real_tokens_in_turn():
    model, _ = build("roberta")
    inputs = latency_blocks.random_inputs(model, 3, 30)
    assert len(inputs) == 4 and not torch.equal(inputs[0]["input_ids"], inputs[1]["input_ids"])
    for one in inputs:
        assert one["input_ids"].shape == (3, 30) and one["attention_mask"].all()
        assert not (one["input_ids"] == model.config.pad_token_id).any()
        assert int(one["input_ids"].max()) < model.config.vocab_size
    with pytest.raises(InvalidInput, match="38 tokens at most"):
        measure_latency(model, 1, 39)
    measure_latency(model, 1, 38, repeats=1)


def test_devices_and_models_that_cannot_be_measured():
    model, _ = build("bert")
    with pytest.raises(InvalidInput, match="device"):
        measure_latency(model, 1, 4, device="nowhere")
    with pytest.raises(InvalidInput, match="'cpu' and 'cuda'"):
        LatencyTable.measure(model, Latency(0.5, device="meta"))
    if not torch.cuda.is_available():
        with pytest.raises(NotAvailable, match="CUDA"):
            LatencyTable.measure(model, Latency(0.5, device="cuda"))
    with pytest.raises(InvalidInput, match="at least one model"):
        compare_latency({})
    with pytest.raises(InvalidInput):  # pruned already
        LatencyTable.measure(shrink(model, Masks(torch.eye(4)[:3], torch.ones(3, 48))), Latency(0.5), progress=False)
