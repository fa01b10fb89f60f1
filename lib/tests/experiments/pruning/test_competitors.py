"""Magnitude and random pruning keep the budget, and prune what they say."""

import pytest
import torch
from helpers.encoders import build

from effnn import ltp
from effnn.experiments.pruning import competitors


@pytest.mark.parametrize("budget", [0.2, 0.5, 0.9])
def test_the_competitors_keep_the_budget_and_the_same_share_of_every_layer(budget):
    model, _ = build("bert")
    cost = ltp.MacCost(ltp.Shape.of(model), 13.0)
    found = competitors.baselines(model, cost, budget, seed=0)
    assert set(found) == {"magnitude", "random"}
    for masks in found.values():
        assert budget - 0.15 < cost.ratio(masks) <= budget
        assert len(set(masks.heads_per_layer)) == len(set(masks.filters_per_layer)) == 1
    assert not torch.equal(found["magnitude"].filters, found["random"].filters)
    again, other = (competitors.baselines(model, cost, budget, seed) for seed in (0, 1))
    assert torch.equal(again["random"].filters, found["random"].filters)
    assert torch.equal(again["magnitude"].filters, other["magnitude"].filters)


def test_magnitude_prunes_the_smallest_weights():
    model, _ = build("bert")
    parts = [ltp.adapter_for(model).parts(layer) for layer in ltp.adapter_for(model).layers(model)]
    with torch.no_grad():
        for part in parts:
            part.fc1.weight[5] = 0
            part.value.weight[: part.head_size] *= 1e-3
            part.out.weight[:, : part.head_size] *= 1e-3
    masks = competitors.baselines(model, ltp.MacCost(ltp.Shape.of(model), 13.0), 0.8, seed=0)["magnitude"]
    assert not masks.filters[:, 5].any() and not masks.heads[:, 0].any()
