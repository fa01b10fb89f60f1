"""Search under a MAC budget, and rearrangement: parity with the paper's own masks, budgets, optimality, errors."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from plain import ltp as plain_ltp

from effnn import paths
from effnn.base import InvalidInput
from effnn.ltp import MacCost, Macs, Masks, Shape, quadratic_loss, rearrange, search_macs

PARITY = paths.TESTS / "reference" / "ltp_mac05.npz"
SHAPE = Shape(layers=4, heads=4, filters=512, hidden=128, head_size=32)
COST = MacCost(SHAPE, 20.4326171875)


@pytest.fixture(scope="module")
def parity():
    with np.load(PARITY) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def importances(parity):
    return parity["head_grads"].square().sum(0), parity["neuron_grads"].square().sum(0)


@pytest.mark.parametrize(("ratio", "stage"), [(0.5, "searched"), (0.5**0.5, "teacher")])
def test_search_gives_the_reference_masks(parity, ratio, stage):
    masks = search_macs(*importances(parity), COST, Macs(ratio))
    assert torch.equal(masks.heads, parity[f"head_{stage}"])
    assert torch.equal(masks.filters, parity[f"neuron_{stage}"])


def test_rearrangement_gives_the_reference_masks(parity):
    changed = 0
    for kind in ("head", "neuron"):
        searched, expected = parity[f"{kind}_searched"], parity[f"{kind}_rearranged"]
        assert torch.equal(rearrange(parity[f"{kind}_grads"], searched), expected)
        changed += int((searched != expected).sum())
    assert changed > 100  # the reference did move something, so equality says something


@pytest.mark.parametrize("ratio", [round(0.05 * i, 2) for i in range(1, 20)] + [0.001, 1.0])
@pytest.mark.parametrize("options", [{}, {"allocation": "uniform"}])
@pytest.mark.parametrize("round_to", [1, 16])
def test_budget_is_never_exceeded(parity, ratio, options, round_to):
    masks = search_macs(*importances(parity), COST, Macs(ratio, **options), round_to)
    assert COST.ratio(masks) <= ratio
    step = COST.filter * round_to * (SHAPE.layers if options else 1)
    if ratio < 1 and sum(masks.filters_per_layer) < SHAPE.layers * SHAPE.filters:
        # nothing affordable was left out: another filter, or another chunk, would not fit
        assert COST.ratio(masks) * COST.total + step > ratio * COST.total


def test_the_whole_budget_keeps_everything_and_a_tiny_one_nothing(parity):
    everything = search_macs(*importances(parity), COST, Macs(1.0))
    assert everything.heads.all() and everything.filters.all()
    nothing = search_macs(*importances(parity), COST, Macs(1e-9))
    assert not nothing.heads.any() and not nothing.filters.any()


@settings(max_examples=60, deadline=None)
@example(seed=0, ratio=0.5, seq_len=2.8)  # a budget that is met exactly, where a quotient rounds down
@given(seed=st.integers(0, 10_000), ratio=st.floats(0.05, 0.95), seq_len=st.floats(1, 64))
def test_search_is_exact_for_a_diagonal_fisher(seed, ratio, seq_len):
    generator = torch.Generator().manual_seed(seed)
    shape = Shape(layers=2, heads=3, filters=7, hidden=12, head_size=4)
    cost = MacCost(shape, seq_len)
    heads, filters = torch.rand(2, 3, generator=generator) * 5, torch.rand(2, 7, generator=generator)
    masks = search_macs(heads, filters, cost, Macs(ratio))
    value = float((heads * masks.heads).sum() + (filters * masks.filters).sum())
    best = plain_ltp.best_prefixes(heads, filters, cost.head, cost.filter, ratio * cost.total)
    assert value == pytest.approx(best, rel=1e-5)


def test_ties_go_to_the_lower_layer_and_index():
    shape = Shape(layers=2, heads=2, filters=4, hidden=4, head_size=2)
    cost = MacCost(shape, 1.0)
    masks = search_macs(torch.zeros(2, 2), torch.ones(2, 4), cost, Macs(5 * cost.filter / cost.total))
    assert masks.filters.tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]


def test_rounding_and_minimum_per_layer():
    importance = torch.arange(4 * 512.0).view(4, 512)  # the last layers take everything if left alone
    heads = torch.arange(16.0).view(4, 4) * 1e6
    free = search_macs(heads, importance, COST, Macs(0.4))
    assert min(free.filters_per_layer) == 0
    held = search_macs(heads, importance, COST, Macs(0.4, min_heads=1, min_filters=64), round_to=64)
    assert min(held.heads_per_layer) >= 1 and min(held.filters_per_layer) >= 64
    assert all(count % 64 == 0 for count in held.filters_per_layer)
    assert COST.ratio(held) <= 0.4
    uniform = search_macs(heads, importance, COST, Macs(0.4, allocation="uniform"))
    assert len(set(uniform.heads_per_layer)) == len(set(uniform.filters_per_layer)) == 1


@pytest.mark.parametrize("minimum", [(1, 1), (1, 7), (2, 256), (3, 100), (4, 511)])
@pytest.mark.parametrize("seq_len", [1.0, 13.7, 128.0])
def test_an_infeasible_minimum_names_the_smallest_feasible_ratio(minimum, seq_len):
    cost, least = MacCost(SHAPE, seq_len), {"min_heads": minimum[0], "min_filters": minimum[1]}
    units = torch.ones(SHAPE.layers, SHAPE.heads), torch.ones(SHAPE.layers, SHAPE.filters)
    with pytest.raises(InvalidInput, match="smallest feasible ratio is") as caught:
        search_macs(*units, cost, Macs(1e-3, **least))
    smallest = float(str(caught.value).rsplit(" ", 1)[1])
    assert cost.ratio(search_macs(*units, cost, Macs(smallest, **least))) <= smallest
    with pytest.raises(InvalidInput):
        search_macs(*units, cost, Macs(smallest - 1.1e-4, **least))


@pytest.mark.parametrize(
    "bad",
    [
        {"ratio": 0.0},
        {"ratio": 1.5},
        {"ratio": 0.5, "seq_len": "long"},
        {"ratio": 0.5, "allocation": "x"},
        {"ratio": 0.5, "min_heads": -1},
    ],
)
def test_a_bad_target_is_refused(bad):
    with pytest.raises(InvalidInput, match="expected"):
        Macs(**bad)


def test_macs_count_what_the_formula_says():
    whole = Masks.ones(SHAPE)
    s, d = 20.4326171875, 128
    by_hand = 4 * (4 * s * d * d + 2 * s * s * d + 2 * s * d * 512)
    assert COST.total == pytest.approx(by_hand)
    assert COST.ratio(whole) == 1


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), units=st.integers(2, 40), batches=st.integers(1, 12))
def test_rearrangement_equals_the_plain_greedy_and_never_raises_the_loss(seed, units, batches):
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(batches, 3, units, generator=generator) * torch.rand(3, units, generator=generator)
    mask = (torch.rand(3, units, generator=generator) < torch.tensor([[0.5], [0.2], [1.0]])).float()
    result = rearrange(gradients, mask)
    assert torch.equal(result, plain_ltp.rearrange(gradients, mask))
    assert torch.equal(result.sum(1), mask.sum(1))
    cheapest = torch.ones_like(mask)
    for layer, row in enumerate(gradients.square().sum(0)):
        cheapest[layer, row.argsort()[: int((mask[layer] == 0).sum())]] = 0
    warm, once, often = (
        quadratic_loss(gradients, m) for m in (cheapest, result, rearrange(gradients, mask, passes=20))
    )
    assert (once <= warm * (1 + 1e-9) + 1e-12).all()
    assert (often <= once * (1 + 1e-9) + 1e-12).all()


def test_rearrangement_at_full_width_equals_the_plain_greedy():
    generator = torch.Generator().manual_seed(3)
    gradients = torch.randn(64, 1, 1024, generator=generator) * torch.rand(1, 1024, generator=generator)
    mask = (torch.rand(1, 1024, generator=generator) < 0.5).float()
    assert torch.equal(rearrange(gradients, mask), plain_ltp.rearrange(gradients, mask))


def test_rearrangement_refuses_gradients_of_another_shape():
    with pytest.raises(InvalidInput, match=r"expected \(N, L, U\)"):
        rearrange(torch.zeros(5, 2, 8), torch.ones(2, 9))
