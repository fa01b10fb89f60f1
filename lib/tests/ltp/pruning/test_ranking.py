"""The ranking of heads and filters: ties, chunks, minima and errors."""

import pytest
import torch

from effnn.base import InvalidInput
from effnn.ltp.pruning.ranking import RankedUnits, rank_across_layers


def test_ties_go_to_the_lower_layer_and_index():
    units = RankedUnits("heads", torch.tensor([[1.0, 2.0, 2.0], [2.0, 1.0, 2.0]]))
    assert units.order.tolist() == [[1, 2, 0], [0, 2, 1]]
    ranked, layer = rank_across_layers(units.chunk_importance)
    assert ranked.tolist() == [2, 2, 2, 2, 1, 1]
    assert layer.tolist() == [0, 0, 1, 1, 0, 1]


@pytest.mark.parametrize(("minimum", "lowest"), [(0, 0), (1, 1), (2, 1), (3, 2), (5, 3)])
def test_chunks_hold_a_layers_best_units_and_the_last_one_what_is_left(minimum, lowest):
    units = RankedUnits("filters", torch.tensor([[1.0, 5.0, 3.0, 4.0, 2.0]]), chunk=2, minimum=minimum)
    assert units.counts.tolist() == [0, 2, 4, 5]
    assert units.chunk_importance.tolist() == [[9, 5, 1]]
    assert units.kept_importance.tolist() == [[0, 9, 14, 15]]
    assert units.lowest == lowest
    assert units.mask(torch.tensor([1])).tolist() == [[0, 1, 0, 1, 0]]
    assert units.mask(torch.tensor([3])).tolist() == [[1, 1, 1, 1, 1]]


@pytest.mark.parametrize(
    ("importance", "options", "message"),
    [
        ([[1.0, -1.0]], {}, "importance of heads: expected finite numbers"),
        ([[1.0, float("nan")]], {}, "importance of heads: expected finite numbers"),
        ([[1.0, 2.0]], {"minimum": 3}, "min_heads=3: expected a whole number from 0 to 2, the heads of a layer"),
        ([[1.0, 2.0]], {"chunk": 3}, "round_to=3: expected a whole number from 1 to 2, the heads of a layer"),
        ([[1.0, 2.0]], {"chunk": 0}, "round_to=0: expected"),
        ([[1.0, 2.0]], {"chunk": 1.5}, "round_to=1.5: expected a whole number"),
    ],
)
def test_what_cannot_be_ranked_is_refused(importance, options, message):
    with pytest.raises(InvalidInput, match=message):
        RankedUnits("heads", torch.tensor(importance), **options)
