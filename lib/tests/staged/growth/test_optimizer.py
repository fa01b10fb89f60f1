"""Growth of the optimizer: the exact trajectory, moments by mode and name, Adam's width rule, scheduler, its file."""

import copy

import pytest
import torch
from plain import staged as plain
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR, StepLR

from effnn import staged
from effnn.base import InvalidInput
from effnn.staged.growth.roles import Kind, role_of


def furthest_logits(width, steps=40, settings=None, decay=0.0, **growth) -> float:
    """Largest difference of logits between the small model trained on and the grown one, over all steps."""
    small, optimizer = plain.trained(steps=10, **(settings or {}))
    for group in optimizer.param_groups:
        group["weight_decay"] = decay
    grown = staged.grow(small, optimizer, width=width, noise=0.0, **growth)
    batch, furthest = plain.tokens(seed=5), 0.0
    for step in range(steps):
        plain.train(small, optimizer, 1, first=10 + step)
        plain.train(grown.model, grown.optimizer, 1, first=10 + step)
        with torch.no_grad():
            difference = grown.model(input_ids=batch).logits - small(input_ids=batch).logits
        furthest = max(furthest, float(difference.abs().max()))
    return furthest


@pytest.mark.parametrize(
    ("width", "settings", "decay"),
    [(2, {}, 0.0), (3, {}, 0.0), (2, {"tie_word_embeddings": False}, 0.0), (2, {"n_inner": 24}, 0.1)],
)
def test_the_small_trajectory_goes_on_exactly(width, settings, decay):
    growth = {"moments": "consistent", "adam_width_rule": "1/k"}
    assert furthest_logits(width, settings=settings, decay=decay, **growth) <= 1e-9


@pytest.mark.parametrize(
    ("moments", "rule"), [("consistent", "none"), ("authors", "none"), ("authors", "1/k"), ("reset", "1/k")]
)
def test_nothing_less_is_exact(moments, rule):
    assert furthest_logits(2, steps=10, moments=moments, adam_width_rule=rule) > 1e-3


@pytest.mark.parametrize("tied", [True, False])
def test_moments_are_those_of_the_authors_arithmetic(tied):
    model, optimizer = plain.trained(tie_word_embeddings=tied)
    grown = staged.grow(model, optimizer, width=2, noise=0.0, moments="authors")
    for key, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
        expected = plain.doubled_moments(plain.moments_by_name(model, optimizer, key), power)
        found = plain.moments_by_name(grown.model, grown.optimizer, key)
        assert len(found) == (28 if tied else 29)
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    steps = plain.moments_by_name(grown.model, grown.optimizer, "step")
    assert {float(step) for step in steps.values()} == {5.0}


@pytest.mark.parametrize("width", [2, 3])
def test_consistent_moments_are_those_of_the_grown_gradients(width):
    model, optimizer = plain.trained()
    grown = staged.grow(model, optimizer, width=width, noise=0.0, moments="consistent")
    m = plain.moments_by_name(model, optimizer, "exp_avg")
    v = plain.moments_by_name(model, optimizer, "exp_avg_sq")
    for name, found in plain.moments_by_name(grown.model, grown.optimizer, "exp_avg").items():
        torch.testing.assert_close(found, plain.true_gradient(name, m[name], width), rtol=1e-14, atol=0)
    for name, found in plain.moments_by_name(grown.model, grown.optimizer, "exp_avg_sq").items():
        expected = plain.true_gradient(name, v[name].sqrt(), width).square()
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("mode", ["authors", "consistent"])
def test_four_is_twice_two(mode):
    model, optimizer = plain.trained()
    how = {"noise": 0.0, "moments": mode, "adam_width_rule": "1/k"}
    four = staged.grow(model, optimizer, width=4, **how)
    two = staged.grow(model, optimizer, width=2, **how)
    twice = staged.grow(two.model, two.optimizer, width=2, **how)
    for key in ("exp_avg", "exp_avg_sq", "step"):
        once = plain.moments_by_name(four.model, four.optimizer, key)
        again = plain.moments_by_name(twice.model, twice.optimizer, key)
        assert all(torch.equal(once[name], again[name]) for name in once)
    settings = [
        [{k: v for k, v in g.items() if k != "params"} for g in o.optimizer.param_groups] for o in (four, twice)
    ]
    assert settings[0] == settings[1]


def test_reset_starts_anew_with_the_same_settings():
    model, optimizer = plain.trained()
    grown = staged.grow(model, optimizer, width=2, moments="reset")
    assert not grown.optimizer.state and len(optimizer.state) == 28
    assert grown.optimizer.param_groups[0]["lr"] == 1e-2


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("order", staged.ORDERS)
def test_new_layers_start_with_step_zero_and_old_ones_go_on(order, width):
    model, optimizer = plain.trained()
    grown = staged.grow(model, optimizer, width=width, depth=2, order=order, noise=0.0)
    alone = staged.grow(model, optimizer, width=width, noise=0.0)
    old = {0: 0, 1: 2} if order == "interleave" else {0: 0, 1: 1}
    states = {name: grown.optimizer.state[p] for name, p in grown.model.named_parameters()}
    expected = {name: alone.optimizer.state[p] for name, p in alone.model.named_parameters()}
    kept = set()
    for name, state in expected.items():
        place = name
        for layer, now in old.items():
            place = name.replace(f".h.{layer}.", f".h.{now}.") if f".h.{layer}." in name else place
        assert all(torch.equal(states[place][key], value) for key, value in state.items())
        kept.add(place)
    assert len(states) - len(kept) == 24
    for name in set(states) - kept:
        assert all(not value.any() for value in states[name].values()), name
    plain.train(grown.model, grown.optimizer, 1)
    assert {float(s["step"]) for n, s in states.items() if n in kept} == {6.0}
    assert {float(s["step"]) for n, s in states.items() if n not in kept} == {1.0}


def test_copied_layers_may_bring_their_moments():
    model, optimizer = plain.trained()
    grown = staged.grow(model, optimizer, depth=2, init="copy", new_moments="copy")
    for old, new in zip(
        grown.model.transformer.h[2].parameters(), grown.model.transformer.h[3].parameters(), strict=True
    ):
        states = grown.optimizer.state[old], grown.optimizer.state[new]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
        assert states[0]["exp_avg"].data_ptr() != states[1]["exp_avg"].data_ptr()
    with pytest.raises(InvalidInput, match="goes with init='copy'"):
        staged.grow(model, optimizer, depth=2, new_moments="copy")


def test_state_goes_by_name_whatever_the_order():
    model = plain.tiny_gpt2()
    named = list(model.named_parameters())
    mixed = [named[i] for i in torch.randperm(len(named), generator=torch.Generator().manual_seed(0)).tolist()]
    vectors = {"params": [p for _, p in mixed if p.dim() == 1], "weight_decay": 0.0, "lr": 1e-3}
    matrices = {"params": [p for _, p in mixed if p.dim() == 2], "weight_decay": 0.1}
    optimizer = AdamW([vectors, matrices], lr=1e-2)
    plain.train(model, optimizer, 3)
    grown = staged.grow(model, optimizer, width=2, depth=2, noise=0.0, moments="authors")
    m = plain.moments_by_name(model, optimizer, "exp_avg")
    found = plain.moments_by_name(grown.model, grown.optimizer, "exp_avg")
    for name, value in plain.doubled_moments(m, 1).items():
        assert torch.equal(found[name.replace(".h.1.", ".h.2.")], value), name
    one, two = grown.optimizer.param_groups
    assert (one["weight_decay"], one["lr"], two["weight_decay"], two["lr"]) == (0.0, 1e-3, 0.1, 1e-2)
    assert all(p.dim() == 1 for p in one["params"]) and all(p.dim() == 2 for p in two["params"])
    assert len(one["params"]) + len(two["params"]) == len(list(grown.model.parameters()))
    order = {p: index for index, p in enumerate(grown.model.parameters())}
    assert all(sorted(g["params"], key=order.get) == g["params"] for g in (one, two))


def test_width_rule_by_kind_of_tensor():
    model, optimizer = plain.trained()
    optimizer.param_groups[0]["weight_decay"] = 0.1
    grown = staged.grow(model, optimizer, width=4, adam_width_rule="1/k")
    expected = {
        Kind.MATRIX: (1e-2 / 4, 1e-6 / 4, 0.1 * 4),
        Kind.FINAL_NORM: (1e-2 / 4, 1e-6, 0.1 * 4),
        Kind.VECTOR: (1e-2, 1e-6 / 4, 0.1),
        Kind.EMBEDDING: (1e-2, 1e-6 / 4, 0.1),
    }
    names, seen = {p: name for name, p in grown.model.named_parameters()}, 0
    for group in grown.optimizer.param_groups:
        for parameter in group["params"]:
            kind = role_of(names[parameter]).kind
            assert (group["lr"], group["eps"], group["weight_decay"]) == expected[kind]
            seen += 1
    assert seen == 28
    assert len(staged.grow(model, optimizer, depth=2, adam_width_rule="1/k").optimizer.param_groups) == 1


def test_flags_and_further_state_are_kept():
    model = plain.tiny_gpt2()
    named = list(model.named_parameters())
    optimizer = AdamW(named, lr=torch.tensor(1e-2), amsgrad=True, foreach=False, maximize=False, betas=(0.8, 0.9))
    plain.train(model, optimizer, 2)
    grown = staged.grow(model, optimizer, width=2, adam_width_rule="1/k")
    group = grown.optimizer.param_groups[0]
    assert group["amsgrad"] and group["foreach"] is False and group["betas"] == (0.8, 0.9)
    assert group["lr"] is not optimizer.param_groups[0]["lr"]
    by_name = dict(grown.model.named_parameters())
    for group in grown.optimizer.param_groups:
        assert [by_name[name] for name in group["param_names"]] == group["params"]
    state = grown.optimizer.state[grown.model.transformer.wte.weight]
    small = optimizer.state[model.transformer.wte.weight]
    assert torch.equal(state["max_exp_avg_sq"], small["max_exp_avg_sq"].repeat(1, 2) / 4)
    plain.train(grown.model, grown.optimizer, 1)
    fused = plain.tiny_gpt2()
    optimizer = AdamW(fused.parameters(), lr=1e-2, fused=True)
    plain.train(fused, optimizer, 2)
    grown = staged.grow(fused, optimizer, width=2, depth=2)
    assert grown.optimizer.param_groups[0]["fused"]
    plain.train(grown.model, grown.optimizer, 2)


def test_an_optimizer_that_never_stepped_or_holds_a_part():
    model = plain.tiny_gpt2()
    model.transformer.wpe.weight.requires_grad_(False)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    grown = staged.grow(model, optimizer, width=2, depth=2)
    assert not grown.optimizer.state and grown.record[0].step is None
    held = {p for group in grown.optimizer.param_groups for p in group["params"]}
    frozen = [name for name, p in grown.model.named_parameters() if p not in held]
    assert frozen == ["transformer.wpe.weight"] and not grown.model.transformer.wpe.weight.requires_grad


@pytest.mark.parametrize("rule", staged.WIDTH_RULES)
def test_the_scheduler_goes_on_at_its_position(rule):
    model = plain.tiny_gpt2()
    groups = [{"params": [p for p in model.parameters() if p.dim() == d], "lr": d * 1e-2} for d in (1, 2)]
    optimizer = AdamW(groups)
    scheduler = LambdaLR(optimizer, [lambda step: 1 / (1 + step), lambda step: 0.5**step])
    plain.train(model, optimizer, 3, scheduler=scheduler)
    before = copy.deepcopy(scheduler.state_dict())
    grown = staged.grow(model, optimizer, scheduler, width=2, adam_width_rule=rule)
    assert before == scheduler.state_dict() and scheduler.optimizer is optimizer
    assert grown.scheduler.optimizer is grown.optimizer and grown.scheduler.last_epoch == 3
    assert grown.scheduler._step_count == scheduler._step_count
    for _ in range(3):
        for group in grown.optimizer.param_groups:
            vectors = group["params"][0].dim() == 1
            rate = optimizer.param_groups[0 if vectors else 1]["lr"]
            slow = rule == "1/k" and group["weight_decay"] != 1e-2
            assert group["lr"] == pytest.approx(rate / 2 if slow else rate, rel=1e-12)
        plain.train(grown.model, grown.optimizer, 1, scheduler=grown.scheduler)
        plain.train(model, optimizer, 1, scheduler=scheduler)


def test_a_fresh_scheduler_in_its_warm_up():
    model = plain.tiny_gpt2()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    scheduler = LambdaLR(optimizer, lambda step: min(1, step / 10))
    grown = staged.grow(model, optimizer, scheduler, width=2)
    assert grown.optimizer.param_groups[0]["lr"] == 0 and grown.scheduler.base_lrs == [1e-2]


class Counting:
    """A schedule with a memory: how often it was asked."""

    def __init__(self):
        self.calls = 0

    def __call__(self, step: int) -> float:
        self.calls += 1
        return 1.0


def test_schedules_with_a_memory_are_not_shared():
    model, optimizer = plain.trained()
    schedule = Counting()
    grown = staged.grow(model, optimizer, LambdaLR(optimizer, schedule), width=2)
    before = schedule.calls
    plain.train(grown.model, grown.optimizer, 1, scheduler=grown.scheduler)
    assert schedule.calls == before and grown.scheduler.lr_lambdas[0] is not schedule


def test_saved_by_name_and_loaded(tmp_path):
    model, optimizer = plain.trained()
    grown = staged.grow(model, optimizer, width=2, depth=2, adam_width_rule="1/k")
    path = staged.save_optimizer(tmp_path / "optimizer.pt", grown.model, grown.optimizer)
    other = copy.deepcopy(grown.model)
    loaded = staged.load_optimizer(path, other)
    for step in range(3):
        plain.train(grown.model, grown.optimizer, 1, first=step)
        plain.train(other, loaded, 1, first=step)
    assert all(torch.equal(a, b) for a, b in zip(grown.model.parameters(), other.parameters(), strict=True))
    with pytest.raises(InvalidInput, match="of another model"):
        staged.load_optimizer(path, model)
    wider = staged.grow(grown.model, width=2).model
    with pytest.raises(InvalidInput, match="of shape"):
        staged.load_optimizer(path, wider)
    for size in (0, 1000, path.stat().st_size - 1000):
        cut = tmp_path / "cut.pt"
        cut.write_bytes(path.read_bytes()[:size])
        with pytest.raises(InvalidInput, match="not a readable checkpoint"):
            staged.load_optimizer(cut, other)
    torch.save({"model": 1}, tmp_path / "foreign.pt")
    with pytest.raises(InvalidInput, match="was not written by"):
        staged.load_optimizer(tmp_path / "foreign.pt", other)


def test_refusals():
    model, optimizer = plain.trained()
    twin = plain.tiny_gpt2()
    with pytest.raises(InvalidInput, match="belongs to another model"):
        staged.grow(twin, optimizer, width=2)
    with pytest.raises(InvalidInput, match="AdamW, found SGD"):
        staged.grow(model, torch.optim.SGD(model.parameters(), lr=0.1), width=2)
    with pytest.raises(InvalidInput, match="AdamW, found Adam"):
        staged.grow(model, torch.optim.Adam(model.parameters()), width=2)
    with pytest.raises(InvalidInput, match="moments='keep': expected one of consistent, authors, reset"):
        staged.grow(model, optimizer, width=2, moments="keep")
    with pytest.raises(InvalidInput, match="adam_width_rule='k'"):
        staged.grow(model, optimizer, width=2, adam_width_rule="k")
    with pytest.raises(InvalidInput, match="LambdaLR, found StepLR"):
        staged.grow(model, optimizer, StepLR(optimizer, 10), width=2)
    foreign = AdamW(twin.parameters())
    with pytest.raises(InvalidInput, match="drives another optimizer"):
        staged.grow(model, optimizer, LambdaLR(foreign, lambda step: 1.0), width=2)
    loaded = AdamW(twin.parameters())
    wide = plain.trained(n_embd=32)[1]
    loaded.load_state_dict(wide.state_dict())  # torch takes it: it goes by position and looks at no shape
    with pytest.raises(InvalidInput, match="was it loaded from another model"):
        staged.grow(twin, loaded, width=2)
