"""FLOPs in both conventions, and the learning rates of staged training."""

import math
import pickle

import pytest
import torch
from transformers import GPT2Config

from effnn.base import InvalidInput
from effnn.report import published
from effnn.staged.planning.curves import Curve
from effnn.staged.planning.flops import CONVENTIONS, Shape, compute_saving, staged_flops, training_flops
from effnn.staged.planning.learning_rate import Rewarmed, WarmupStableDecay, peak_learning_rate

BASE = Shape(12, 768, 50257)
SHAPES = {
    "GPT2_base": (12, 768),
    "GPT2_base_div2_depth": (6, 768),
    "GPT2_base_div2_width": (12, 384),
    "GPT2_large": (24, 1536),
    "GPT2_large_div2_width": (24, 768),
    "GPT2_large_div2_depth": (12, 1536),
    "GPT2_large_div4_depth": (6, 1536),
    "GPT2_large_div4_width": (24, 384),
}


def test_both_conventions_to_the_last_flop():
    n, head, attention = 12 * 12 * 768**2, 50257 * 768, 12 * 12 * 1024 * 768
    assert BASE.non_embedding == n
    assert training_flops(BASE, 1000, 1024) == 6 * n * 1000
    assert training_flops(BASE, 1000, 1024, "full") == 6 * (n + head) * 1000 + attention * 1000


def test_the_shape_of_a_configuration():
    config = GPT2Config(n_layer=4, n_embd=64, vocab_size=96, n_head=4)
    assert Shape.of(config) == Shape(4, 64, 96)
    config.n_inner = 100
    assert Shape.of(config).non_embedding == 4 * (4 * 64**2 + 2 * 64 * 100)


def test_the_authors_count_of_their_own_runs():
    rows = published.points("staged", method="from scratch", metric="val_loss")
    for model, (layers, width) in SHAPES.items():
        for _, row in rows[rows["model"] == model].iterrows():
            stated = float(row["note"].split("compute_flops=")[1].split()[0])
            tokens = (row["x"] - 1) * 524288  # their logs count the first step as 0
            assert training_flops(Shape(layers, width, 50257), tokens, 1024) == pytest.approx(stated, rel=5e-5)


def test_a_staged_run_is_the_sum_of_its_stages():
    small = Shape(6, 768, 50257)
    for convention in CONVENTIONS:
        parts = [training_flops(small, 3e6, 1024, convention), training_flops(BASE, 5e6, 1024, convention)]
        assert staged_flops([(small, 3e6), (BASE, 5e6)], 1024, convention) == sum(parts)


def test_saving_at_equal_loss():
    scratch = Curve([10, 20, 40], [4.0, 3.0, 2.0])
    staged = Curve([5, 10, 20], [4.0, 3.0, 2.5])
    assert compute_saving(scratch, staged, loss=3.0) == pytest.approx(0.5)
    # the lowest that both have: 2.5
    assert compute_saving(scratch, staged) == pytest.approx(1 - 20 / scratch.x_at(2.5))
    with pytest.raises(InvalidInput, match="a loss that both runs have"):
        compute_saving(scratch, staged, loss=2.2)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: training_flops(BASE, 1, 1024, "all"), "unknown convention 'all'; choices: non-embedding, full"),
        (lambda: training_flops(BASE, -1, 1024), "0 or more"),
        (lambda: Shape(0, 768, 10), "1 or more"),
        (lambda: peak_learning_rate(0), "N of 1 or more"),
        (lambda: peak_learning_rate(1e11, base=math.e), "does not hold for that size"),
        (lambda: WarmupStableDecay(10, 5), "fit into the horizon"),
        (lambda: WarmupStableDecay(10, 100, decay=91), "fit into the horizon"),
        (lambda: Rewarmed(WarmupStableDecay(10, 100), -1, 5), "0 or more"),
    ],
)
def test_bad_input(call, sentence):
    with pytest.raises(InvalidInput, match=sentence):
        call()


def test_peak_learning_rates_are_the_authors_to_all_digits():
    rows = published.points("staged", method="peak learning rate").set_index("model")["y"]
    assert set(rows.index) == set(SHAPES)
    for model, (layers, width) in SHAPES.items():
        assert peak_learning_rate(12 * layers * width**2) == pytest.approx(rows[model], rel=1e-14)
    assert peak_learning_rate(12 * 24 * 1536**2) == pytest.approx(2.007e-3, abs=1e-6)
    assert peak_learning_rate(12 * 24 * 1536**2, base=math.e) == pytest.approx(4.0e-4, abs=1e-5)


def test_the_authors_schedule_and_the_plateau():
    linear = WarmupStableDecay(3000, 250_000)
    assert [linear(0), linear(1500), linear(3000), linear(250_000), linear(300_000)] == [0, 0.5, 1, 0, 0]
    assert linear(126_500) == pytest.approx(0.5)
    stage, last = WarmupStableDecay(10, 100, decay=0), WarmupStableDecay(10, 100, decay=20, final=0.1)
    assert [stage(step) for step in (5, 10, 99, 500)] == [0.5, 1, 1, 1]
    assert [last(step) for step in (10, 80, 90, 100)] == pytest.approx([1, 1, 0.55, 0.1])


def test_rewarming_joins_the_schedule_without_a_jump():
    schedule = WarmupStableDecay(3000, 250_000)
    grown = Rewarmed(schedule, entry=3549, steps=200)
    assert grown(3549) == 0 and grown(3400) == 0
    assert grown(3649) == pytest.approx(schedule(3749) / 2)
    assert [grown(step) for step in (3749, 5000)] == [schedule(3749), schedule(5000)]
    assert Rewarmed(schedule, 3549, 0)(3549) == schedule(3549)
    assert pickle.loads(pickle.dumps(grown)) == grown


def test_a_resumed_scheduler_goes_on_as_before():
    def made():
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=2e-3)
        grown = Rewarmed(WarmupStableDecay(5, 100, decay=0), entry=20, steps=10)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: grown(step + 20))

    def rates(optimizer, scheduler, count):
        found = []
        for _ in range(count):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return found

    whole = rates(*made(), 15)
    assert whole == pytest.approx([2e-4 * step for step in range(10)] + [2e-3] * 5)
    optimizer, scheduler = made()
    first = rates(optimizer, scheduler, 7)
    again, resumed = made()
    again.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    assert first + rates(again, resumed, 8) == whole
