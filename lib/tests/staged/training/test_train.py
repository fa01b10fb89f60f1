"""The trainer in memory: against a plain loop, branching, the exact trajectory, rates, accounting, refusals."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from helpers.staged_runs import (
    CONTEXT,
    PLATEAU,
    TOKENS,
    VALIDATION,
    config,
    moments,
    points,
    recipe,
    run,
    same,
    weights,
)
from plain import staged as plain
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import GPT2Config, GPT2LMHeadModel

from effnn import staged
from effnn.base import InvalidInput
from effnn.staged import Diverged, Recipe, Rewarmed, Stage, WarmupStableDecay, train
from effnn.staged.training.batches import Batches, validation_windows
from effnn.staged.training.clipping import Clip


def test_against_a_loop_written_plainly():
    how = recipe(clip=0.3, weight_decay=0.1, seed=3)
    state = run(config(), [Stage(12)], how)
    small = config()
    torch.manual_seed(3)
    model = GPT2LMHeadModel(small).train()
    optimizer = AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1)
    scheduler = LambdaLR(optimizer, PLATEAU)
    batches, losses = Batches(TOKENS, 4, CONTEXT, plain.VOCABULARY, seed=3), []
    for step in range(12):
        batch = batches(step)
        logits = model(input_ids=batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    expected = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    torch.testing.assert_close(weights(state), expected, rtol=0, atol=1e-6)
    assert state.points[1].train_loss == pytest.approx(sum(losses[:5]) / 5, abs=1e-6)
    assert state.points[-1].train_loss == pytest.approx(sum(losses[10:]) / 2, abs=1e-6)
    found = (len(VALIDATION) - 1) // CONTEXT
    starts = [i * found // 8 * CONTEXT for i in range(8)]
    windows = torch.stack([VALIDATION[start : start + CONTEXT + 1] for start in starts])
    with torch.no_grad():
        logits = model.eval()(input_ids=windows[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    assert state.points[-1].validation_loss == pytest.approx(float(loss), abs=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_two_calls_are_one_and_branches_leave_the_start_alone(dropout):
    small, stages = config(resid_pdrop=dropout), [Stage(8), Stage(7, width=2, depth=2, entry=5, rewarm=4)]
    first = run(small, stages[:1])
    kept = weights(first), moments(first), points(first), first.model.config.to_dict(), first.step
    random = torch.get_rng_state()
    grown, longer = run(first, stages[1:]), run(first, [Stage(7)])
    assert torch.equal(random, torch.get_rng_state())
    assert torch.equal(kept[0], weights(first)) and torch.equal(kept[1], moments(first))
    assert kept[2:] == (points(first), first.model.config.to_dict(), first.step)
    assert same(grown, run(small, stages)) and same(longer, run(small, [Stage(8), Stage(7)]))
    assert not grown.model.training and grown.history[0].loss_before == pytest.approx(grown.history[1].loss_after)
    assert run(small, stages, recipe(seed=1)).points[0].validation_loss != grown.points[0].validation_loss


def test_a_growth_is_two_points_of_one_step_and_the_loss_stays():
    state = run(config(), [Stage(8), Stage(4, width=2), Stage(0), Stage(3)])
    assert [(p.step, p.stage) for p in state.points] == [(0, 0), (5, 0), (8, 0), (8, 1), (10, 1), (12, 1), (15, 3)]
    before, after = state.points[2:4]
    assert after.validation_loss == pytest.approx(before.validation_loss, abs=1e-5)
    assert (before.width, after.width, after.flops, after.train_loss) == (16, 32, before.flops, None)
    curve = state.curve("step")
    assert curve.x.tolist() == [5, 8, 10, 12, 15]
    assert curve.losses.tolist()[1] == before.validation_loss
    with pytest.raises(InvalidInput, match="axis='hours': expected one of step, tokens"):
        state.curve("hours")


@pytest.mark.parametrize("clip", [None, 0.2])
def test_the_small_trajectory_goes_on_exactly(clip):
    how = recipe(clip=clip, weight_decay=0.01, evaluate_every=1)
    small = run(plain.tiny_gpt2(), [Stage(10)], how)
    assert small.model.dtype == torch.float64
    longer = run(small, [Stage(40)], how)
    grown = run(small, [Stage(40, width=2, noise=0.0, adam_width_rule="1/k")], how)
    differences = [
        a.validation_loss - b.validation_loss for a, b in zip(longer.points[11:], grown.points[12:], strict=True)
    ]
    assert len(differences) == 40 and max(map(abs, differences)) <= 1e-10
    other = run(small, [Stage(40, width=2, noise=0.0)], how)
    assert abs(other.points[-1].validation_loss - longer.points[-1].validation_loss) > 1e-4


@pytest.mark.parametrize("rule", staged.WIDTH_RULES)
def test_rates_are_those_of_torch_s_scheduler_entered_at_s_target(rule):
    """A Rewarmed schedule on top of `grow`: LambdaLR's last_epoch starts at S_target, whatever the optimizer did."""
    decay = WarmupStableDecay(warmup=3, horizon=40)
    how = recipe(schedule=decay)
    small = run(config(), [Stage(6)], how)
    optimizer = staged.grow(small.model, small.optimizer, width=2, adam_width_rule=rule).optimizer
    scheduler = LambdaLR(optimizer, Rewarmed(decay, 20, 4), last_epoch=20 - 1)
    assert scheduler.last_epoch == 20
    stage = Stage(0, width=2, entry=20, rewarm=4, adam_width_rule=rule)
    for steps in range(1, 9):
        state = run(small, [dataclasses.replace(stage, steps=steps)], how)
        assert [g["lr"] for g in state.optimizer.param_groups] == [g["lr"] for g in optimizer.param_groups]
        optimizer.step()
        scheduler.step()
        assert state.points[-1].learning_rate == 1e-2 * scheduler.lr_lambdas[0](20 + steps)
        again = staged.grow(state.model, state.optimizer, LambdaLR(state.optimizer, state.schedule, state.position - 1))
        assert again.scheduler.last_epoch == state.position == 20 + steps
        assert again.scheduler.get_last_lr() == scheduler.get_last_lr()


def test_a_new_peak_keeps_the_shares_of_the_groups_and_a_rewarm_runs_on():
    stages = [Stage(2), Stage(2, width=2, rewarm=10, adam_width_rule="1/k"), Stage(2, learning_rate=4e-3)]
    state = run(config(), stages)
    assert sorted(group["initial_lr"] for group in state.optimizer.param_groups) == [2e-3, 2e-3, 4e-3]
    assert state.learning_rate == 4e-3 and state.schedule == Rewarmed(PLATEAU, 2, 10) and state.position == 6
    assert max(group["lr"] for group in state.optimizer.param_groups) == pytest.approx(4e-3 * 3 / 10)
    away = run(state, [Stage(1, entry=50)])
    assert away.schedule == PLATEAU and away.position == 51 and away.step == 7


def test_flops_in_both_conventions():
    state = run(config(), [Stage(3), Stage(2, width=2), Stage(4, depth=2)])
    shapes = [staged.Shape(2, 16, plain.VOCABULARY), staged.Shape(2, 32, plain.VOCABULARY)]
    shapes.append(staged.Shape(4, 32, plain.VOCABULARY))
    used = [(shape, steps * 4 * CONTEXT) for shape, steps in zip(shapes, (3, 2, 4), strict=True)]
    assert state.tokens == 9 * 4 * CONTEXT == state.points[-1].tokens
    assert state.flops == staged.staged_flops(used, CONTEXT) == state.points[-1].flops
    assert state.flops_full == staged.staged_flops(used, CONTEXT, "full") > state.flops
    seconds = [point.seconds for point in state.points]
    assert seconds == sorted(seconds) and state.seconds == seconds[-1]  # the last step is followed by an evaluation


def test_micro_batches_add_up_to_the_batch():
    whole, parts = (run(plain.tiny_gpt2(), [Stage(6)], recipe(micro_batch=size, clip=0.3)) for size in (None, 1))
    torch.testing.assert_close(weights(whole), weights(parts), rtol=0, atol=1e-12)
    for a, b in zip(whole.points, parts.points, strict=True):
        assert a.validation_loss == pytest.approx(b.validation_loss, abs=1e-12)
    assert whole.points[1].train_loss == pytest.approx(parts.points[1].train_loss, abs=1e-12)


def test_bfloat16_computes_coarser_and_keeps_float32_weights():
    full, half = (run(config(), [Stage(8)], recipe(precision=name)) for name in staged.PRECISIONS)
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.float32}
    assert moments(half).dtype == torch.float32 and not torch.equal(weights(full), weights(half))
    assert half.points[-1].validation_loss == pytest.approx(full.points[-1].validation_loss, abs=1e-2)


@pytest.mark.parametrize("grown", [False, True])
def test_clipping_is_that_of_clip_grad_norm(grown):
    model = staged.grow(plain.tiny_gpt2(), width=3).model if grown else plain.tiny_gpt2()
    for limit in (1e-2, 1e3):
        expected = plain.gradients(model, plain.tokens())
        staged.clip_grad_norm_(model, limit)
        expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        plain.gradients(model, plain.tokens())
        Clip(model, limit, set(model.parameters()))()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-12, atol=0)


def test_a_model_to_start_from_keeps_its_type_and_its_frozen_weights():
    model = plain.tiny_gpt2().train()
    model.transformer.wpe.weight.requires_grad_(False)
    before = model.transformer.wpe.weight.clone()
    state = run(model, [Stage(3, width=2), Stage(3)], recipe(clip=1.0))
    assert torch.equal(state.model.transformer.wpe.weight, before.repeat(1, 2)) and model.training
    assert torch.equal(model.transformer.wpe.weight, before) and all(p.grad is None for p in state.model.parameters())


def test_the_stop_rule_ends_the_run_after_an_evaluation():
    seen = []
    state = run(config(), [Stage(20), Stage(20)], stop=lambda point: seen.append(point) or point.step >= 10)
    assert seen == state.points and (state.step, state.stage) == (10, 0)
    state = run(state, [Stage(5, width=2)], stop=lambda point: True)
    assert (state.step, len(state.points), state.model.config.n_embd) == (10, 4, 32)


def test_an_epoch_reads_every_window_once_in_an_order_of_its_own():
    tokens = torch.arange(107)
    batches = Batches(tokens, batch_size=9, context=10, vocabulary=107, seed=0)
    assert batches.windows == 9
    epochs = [batches(step) for step in range(3)]
    offsets = set()
    for epoch in epochs:
        starts = epoch[:, 0].sort().values
        assert (starts.diff() == 10).all() and torch.equal(epoch, epoch[:, :1] + torch.arange(11))
        offsets.add(int(starts[0]))
    assert len(offsets) > 1 and max(offsets) < 10
    assert not torch.equal(epochs[0][:, 0].argsort(), epochs[1][:, 0].argsort())
    again = Batches(tokens, 9, 10, 107, seed=0)
    assert torch.equal(again(2), epochs[2]) and torch.equal(again(0), epochs[0])
    assert not torch.equal(Batches(tokens, 9, 10, 107, seed=1)(0), epochs[0])
    across = Batches(tokens, 6, 10, 107, seed=0)
    assert torch.equal(torch.cat([across(0), across(1), across(2)]), torch.cat(epochs[:2]))
    least = Batches(torch.arange(11), 2, 10, 11)
    assert torch.equal(least(5), torch.arange(11).repeat(2, 1))


def test_every_kind_of_integer_array_gives_the_same_batches(tmp_path):
    path = tmp_path / "tokens.bin"
    TOKENS.numpy().astype(np.uint16).tofile(path)
    expected = Batches(TOKENS, 4, CONTEXT, plain.VOCABULARY)(7)
    arrays = [np.memmap(path, np.uint16, "r"), TOKENS.numpy().astype(np.int32), TOKENS.to(torch.uint8)]
    for array in arrays:
        assert torch.equal(Batches(array, 4, CONTEXT, plain.VOCABULARY)(7), expected)
    count = (len(TOKENS) - 1) // CONTEXT
    whole = validation_windows(arrays[0], count, CONTEXT, plain.VOCABULARY)
    assert torch.equal(whole[1], TOKENS[CONTEXT : 2 * CONTEXT + 1])


def test_validation_windows_are_spread_over_the_whole_array():
    tokens = torch.arange(101)
    whole, some = (validation_windows(tokens, count, 10, 101) for count in (10, 4))
    assert torch.equal(whole[:, 0], torch.arange(10) * 10)
    assert some[:, 0].tolist() == [0, 20, 50, 70] and torch.equal(some[0], torch.arange(11))


@pytest.mark.parametrize("every", [1, 4, 1000])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(every):
    explode = recipe(learning_rate=1e25, evaluate_every=every, schedule=lambda position: float(position == 4))
    with pytest.raises(Diverged, match="loss is (nan|inf) (at step 5|after step 5).*no folder"):
        run(config(), [Stage(70)], explode)


def scheduled(schedule) -> Recipe:
    return recipe(schedule=schedule)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: Stage(-1), "steps=-1: expected a whole number of 0"),
        (lambda: Stage(1.5), "steps=1.5"),
        (lambda: Stage(1, width=0), "width=0"),
        (lambda: Stage(1, init="zeros"), "init='zeros': expected one of zero_proj"),
        (lambda: Stage(1, new_moments="copy"), "goes with init='copy'"),
        (lambda: Stage(1, learning_rate=0.0), "learning_rate=0.0"),
        (lambda: Stage(1, entry=-1), "entry=-1"),
        (lambda: Stage(1, noise=2.0), "noise=2.0"),
        (lambda: Stage(1, noise="0.3"), "noise='0.3': expected a number"),
        (lambda: recipe(batch_size=0), "batch_size=0"),
        (lambda: recipe(micro_batch=3), "batch_size=4 cannot be divided into micro_batch=3"),
        (lambda: recipe(precision="half"), "precision='half': expected one of float32, bfloat16"),
        (lambda: recipe(clip=0.0), "clip=0.0"),
        (lambda: recipe(learning_rate=math.nan), "learning_rate=nan"),
        (lambda: recipe(weight_decay=-1.0), "weight_decay=-1.0"),
        (lambda: recipe(betas=(0.9, 1.0)), "betas"),
        (lambda: recipe(schedule=1.0), "schedule=1.0"),
        (lambda: run(config(), []), "one or more Stage"),
        (lambda: run(config(), [Stage(1, width=2)]), "first stage of a new model cannot grow"),
        (lambda: run("gpt2", [Stage(1)]), "found str: load it first by GPT2LMHeadModel.from_pretrained"),
        (lambda: run(GPT2Config(n_embd=18, n_head=4), [Stage(1)]), "n_embd=18 does not divide into n_head=4"),
        (lambda: run(config(n_positions=8), [Stage(1)]), "context of 12 tokens is more than the model's n_positions=8"),
        (lambda: run(config(scale_attn_by_inverse_layer_idx=True), [Stage(1), Stage(1, depth=2)]), "in width only"),
        (lambda: run(config(), [Stage(1)], recipe(evaluate_sequences=50)), "33 windows of 12 .* asks for 50"),
        (lambda: run(config(vocab_size=30), [Stage(1)]), "the id 39, .* from 0 to 29"),
        (lambda: train(config(), [Stage(1)], recipe(), TOKENS[:12], VALIDATION), "12 training tokens; .* needs 13"),
        (lambda: train(config(), [Stage(1)], recipe(), TOKENS, VALIDATION[:5]), "5 validation tokens"),
        (lambda: train(config(), [Stage(1)], recipe(), TOKENS.float(), VALIDATION), "found torch.float32"),
        (
            lambda: train(config(), [Stage(1)], recipe(), TOKENS, VALIDATION.tolist() + [0.5]),
            "a list with fractions",
        ),
        (lambda: run(config(), [Stage(1)], scheduled(lambda position: -1.0)), "schedule gives -1.0 at position 0"),
        (lambda: run(run(config(), [Stage(1)]), [Stage(1)], recipe(eps=1e-8)), "eps is 1e-08, .* keeps its 1e-06"),
    ],
)
def test_bad_input(call, sentence):
    with pytest.raises(InvalidInput, match=sentence):
        call()


def test_several_types_of_weights():
    model = plain.tiny_gpt2()
    model.transformer.ln_f.float()
    with pytest.raises(InvalidInput, match="several types .torch.float32, torch.float64"):
        run(model, [Stage(1)])


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InvalidInput, match="sees no GPU"):
        run(config(), [Stage(1)], device="cuda")


def test_an_optimizer_of_ones_own_goes_on_from_its_rates():
    model = plain.tiny_gpt2()
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": decayed, "lr": 3e-3}, {"params": others, "lr": 1e-3}]
    optimizer = AdamW(groups, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0)
    state = staged.TrainState(model, optimizer, PLATEAU, 3e-3, position=10)
    after = run(state, [Stage(3)])
    assert [group["lr"] for group in after.optimizer.param_groups] == [3e-3, 1e-3]
    assert "initial_lr" not in optimizer.param_groups[0]  # the original is untouched
    grown = run(state, [Stage(2, width=2, learning_rate=6e-3)])
    assert [group["lr"] for group in grown.optimizer.param_groups] == [6e-3, 2e-3]


def test_what_the_optimizer_does_not_hold_neither_adds_up_nor_counts_in_the_norm():
    held_back = "transformer.wpe.weight"

    def trained(freeze: bool) -> staged.TrainState:
        model = plain.tiny_gpt2()
        model.get_parameter(held_back).requires_grad_(not freeze)
        mine = [parameter for name, parameter in model.named_parameters() if name != held_back]
        optimizer = AdamW(mine, lr=1e-2, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0)
        return run(staged.TrainState(model, optimizer, PLATEAU, 1e-2), [Stage(8)], recipe(clip=0.05))

    assert torch.equal(weights(trained(freeze=False)), weights(trained(freeze=True)))
