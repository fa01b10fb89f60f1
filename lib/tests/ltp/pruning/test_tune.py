"""Mask tuning: the Gram identities against the design matrix, the solvers, the layer pieces, acceptance, its errors."""

import pytest
import torch
from helpers.encoders import FAMILIES, QA_FAMILIES, rows_of
from plain import ltp as plain_ltp

from effnn.base import InvalidInput
from effnn.ltp import MacCost, Macs, Masks, Shape, adapter_for, calibrate, masked, search_macs, tune_masks
from effnn.ltp.pruning.least_squares import RELATIVE_RIDGE, NormalEquations, Sums
from effnn.ltp.pruning.sliced_layer import SlicedLayer, run_encoder


def random_problem(block, units=6, tokens=40, hidden=10, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, units * block, generator=generator, dtype=dtype)
    weight = torch.randn(hidden, units * block, generator=generator, dtype=dtype)
    target = torch.randn(tokens, hidden, generator=generator, dtype=dtype)
    return inputs, weight, target


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("intercept", [False, True])
def test_the_normal_equations_equal_those_of_the_design_matrix(block, intercept):
    inputs, weight, target = random_problem(block)
    sums = Sums(weight.T, block)
    for rows in (slice(0, 15), slice(15, 15), slice(15, 40)):  # in pieces, one of them empty
        sums.add(inputs[rows], target[rows])
    found = NormalEquations.of(sums, weight.T @ weight, intercept)
    design = plain_ltp.design_matrix(inputs, weight, block)
    if intercept:
        design = torch.cat([design, torch.ones(len(design), 1, dtype=design.dtype)], 1)
    torch.testing.assert_close(found.matrix, design.T @ design, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(found.rhs, design.T @ target.flatten(), rtol=1e-5, atol=1e-3)
    scale = torch.linspace(0.5, 1.5, 6, dtype=torch.float64)
    error = ((design[:, :6] @ scale - target.flatten()) ** 2).sum() / len(inputs)
    assert found.error(scale) == pytest.approx(float(error), rel=1e-5)


def test_wide_products_by_blocks_equal_the_whole_product():
    inputs, weight, target = random_problem(1, units=301, tokens=50)
    sums = Sums(weight.T, 1)
    sums.add(inputs, target)
    torch.testing.assert_close(sums.products, (inputs.float().T @ inputs.float()).double(), rtol=1e-5, atol=1e-4)


def test_solvers_recover_planted_scales_and_match_their_definitions():
    inputs, weight, _ = random_problem(4, tokens=400)
    planted = torch.tensor([0.3, 1.7, -0.5, 1.0, 2.0, 0.9], dtype=torch.float64)
    target = (inputs * planted.repeat_interleave(4)) @ weight.T
    sums = Sums(weight.T, 4)
    sums.add(inputs, target)
    equations = NormalEquations.of(sums, weight.T @ weight, intercept=True)
    residual = equations.rhs - equations.matrix[:, :6].sum(1)
    damped = equations.matrix + RELATIVE_RIDGE * equations.matrix.diagonal().mean() * torch.eye(7, dtype=torch.float64)
    torch.testing.assert_close(equations.solve("ridge"), 1 + torch.linalg.solve(damped, residual)[:6])
    # LSMR with damping 1 on M delta = r minimises |M delta - r|^2 + |delta|^2
    stacked = torch.cat([equations.matrix, torch.eye(7, dtype=torch.float64)])
    least = torch.linalg.lstsq(stacked, torch.cat([residual, torch.zeros(7, dtype=torch.float64)])).solution
    torch.testing.assert_close(equations.solve("lsmr"), 1 + least[:6])
    for solver in ("ridge", "lsmr"):
        torch.testing.assert_close(equations.solve(solver), planted, atol=5e-3, rtol=0)


def test_a_single_unknown_is_solved_undamped():
    inputs, weight, _ = random_problem(4, units=1)
    sums = Sums(weight.T, 4)
    sums.add(inputs, 2.5 * inputs @ weight.T)
    assert NormalEquations.of(sums, weight.T @ weight).solve().item() == pytest.approx(2.5, rel=1e-5)


def uneven_masks(shape, seed=0, scaled=False):
    generator = torch.Generator().manual_seed(seed)
    heads = (torch.rand(shape.layers, shape.heads, generator=generator) < 0.6).float()
    filters = (torch.rand(shape.layers, shape.filters, generator=generator) < 0.6).float()
    heads[:, 0], filters[:, 0] = 1, 1
    if scaled:
        heads *= 0.5 + torch.rand(heads.shape, generator=generator)
        filters *= 0.5 + torch.rand(filters.shape, generator=generator)
    return Masks(heads, filters)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_sliced_layers_compute_what_the_masked_model_computes(family, attention):
    model, batch = FAMILIES[family]()
    model.set_attn_implementation(attention)
    adapter, shape = adapter_for(model), Shape.of(model)
    masks = uneven_masks(shape, scaled=True)
    masks.heads[1] = 0  # a layer without heads
    given = calibrate(model, [batch]).inputs[0]
    slices = [
        SlicedLayer.cut(adapter.parts(layer), masks.heads[i], masks.filters[i])
        for i, layer in enumerate(adapter.layers(model))
    ]
    found = run_encoder(slices, given.states, given.attention_mask)
    with torch.no_grad(), masked(model, masks):
        expected = model(**batch, output_hidden_states=True).hidden_states[-1]
        assert (expected - run_encoder(slices[:1], given.states, given.attention_mask))[given.live].abs().max() > 1e-2
    assert (found - expected)[given.live].abs().max() < 2e-5


@pytest.mark.parametrize("family", [*FAMILIES, *(f"qa:{name}" for name in QA_FAMILIES)])
@pytest.mark.parametrize("solver", ["ridge", "lsmr"])
def test_accepted_scales_lower_the_error_and_others_stay_one(family, solver):
    model, batch = QA_FAMILIES[family[3:]]() if family.startswith("qa:") else FAMILIES[family]()
    shape = Shape.of(model)
    masks = uneven_masks(shape)
    batches = rows_of(batch, 12)
    tuned, layers = tune_masks(model, calibrate(model, batches).inputs, masks, Masks.ones(shape), solver=solver)
    assert torch.equal(tuned.heads != 0, masks.heads != 0) and torch.equal(tuned.filters != 0, masks.filters != 0)
    assert [(item.layer, item.kind) for item in layers] == [
        (layer, kind) for layer in range(shape.layers) for kind in ("heads", "filters") if (layer, kind) != (0, "heads")
    ]
    assert any(item.accepted for item in layers)
    for item in layers:
        changed = (getattr(tuned, item.kind)[item.layer] != getattr(masks, item.kind)[item.layer]).any()
        assert bool(changed) == item.accepted
        if item.accepted:
            assert item.error_after < item.error_before and 0 < item.gain <= 1


def test_an_unpruned_student_of_an_unpruned_teacher_keeps_its_scales():
    model, batch = FAMILIES["bert"]()
    ones = Masks.ones(Shape.of(model))
    tuned, layers = tune_masks(model, calibrate(model, rows_of(batch, 4)).inputs, ones, ones)
    torch.testing.assert_close(tuned.heads, ones.heads, atol=1e-4, rtol=0)
    torch.testing.assert_close(tuned.filters, ones.filters, atol=1e-4, rtol=0)


def test_a_layer_that_fails_is_skipped_and_later_ones_are_still_tuned(monkeypatch):
    model, batch = FAMILIES["bert"]()
    shape = Shape.of(model)
    masks = uneven_masks(shape)
    solve, calls = NormalEquations.solve, []

    def spoil_second(self, solver):
        calls.append(1)
        result = solve(self, solver)
        return result * 1000 if len(calls) == 2 else result * torch.nan if len(calls) == 3 else result

    monkeypatch.setattr(NormalEquations, "solve", spoil_second)
    tuned, layers = tune_masks(model, calibrate(model, rows_of(batch, 12)).inputs, masks, Masks.ones(shape))
    assert not layers[1].accepted and "beyond" in layers[1].reason
    assert not layers[2].accepted and "positive definite" in layers[2].reason
    assert torch.equal(tuned.heads[1], masks.heads[1]) and torch.equal(tuned.filters[1], masks.filters[1])
    assert any(item.accepted for item in layers[3:])


def test_only_position_zero_counts_in_the_last_layer_of_a_classifier():
    model, batch = FAMILIES["bert"]()
    shape = Shape.of(model)
    inputs = calibrate(model, rows_of(batch, 6), holdout=0).inputs
    rows = sum(len(item.states) for item in inputs)
    tokens = []
    add = Sums.add

    def count(self, inputs, target):
        tokens.append(len(inputs))
        add(self, inputs, target)

    Sums.add = count
    try:
        tune_masks(model, inputs, uneven_masks(shape), Masks.ones(shape))
    finally:
        Sums.add = add
    assert sum(tokens[-2 * 6 * 2 :]) == 2 * rows  # heads and filters of the last layer: one token a row
    assert sum(tokens[: 2 * 6]) == sum(int(b["attention_mask"].sum()) for b in [batch]) * 6


def test_what_is_kept_between_steps_is_computed_once_and_changes_nothing(monkeypatch):
    model, batch = FAMILIES["distilbert"]()
    shape, batches = Shape.of(model), 4
    masks = uneven_masks(shape)
    computed = {"context": 0, "activation": 0}

    def counting(name):
        run = getattr(SlicedLayer, name)

        def method(*args):
            computed[name] += 1
            return run(*args)

        return method

    for name in computed:
        monkeypatch.setattr(SlicedLayer, name, counting(name))
    results, counts = [], []
    for limit in (0, 3000, 20000, 1 << 20):
        inputs = calibrate(model, rows_of(batch, batches)).inputs
        computed.update(context=0, activation=0)
        results.append(tune_masks(model, inputs, masks, Masks.ones(shape), max_cached_bytes=limit)[0])
        counts.append((computed["context"], computed["activation"]))
    for other in results[1:]:
        torch.testing.assert_close(results[0].heads, other.heads)
        torch.testing.assert_close(results[0].filters, other.filters)
    # once a layer and batch of teacher and student; without room, the student's again wherever a step needs it again:
    # contexts of all layers whose heads are solved for (not of layer 0), activations of all layers but the last
    once, again = 2 * shape.layers * batches, (shape.layers - 1) * batches
    assert counts[0] == (once + again, once + again) and counts[-1] == (once, once)
    assert counts[0] > counts[1] > counts[2] > counts[-1]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 0.0), (torch.bfloat16, 0.05)])
def test_states_that_wait_elsewhere_change_nothing_but_their_precision(dtype, tolerance):
    model, batch = FAMILIES["bert"]()
    batches, shape = rows_of(batch, 12), Shape.of(model)
    masks, teacher = uneven_masks(shape), Masks.ones(shape)
    plain, layers = tune_masks(model, calibrate(model, batches).inputs, masks, teacher)
    waiting = calibrate(model, batches, offload=dtype).inputs
    assert {batch.states.dtype for batch in waiting} == {dtype}
    other, others = tune_masks(model, waiting, masks, teacher, offload=dtype)
    assert any(layer.accepted for layer in layers)
    for a, b in ((plain.heads, other.heads), (plain.filters, other.filters)):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)
    if tolerance == 0:
        assert layers == others


def test_tuning_brings_the_pruned_model_nearer_to_its_teacher():
    """Not only layer by layer: the encoder's output on rows that tuning never saw."""
    model, batch = FAMILIES["roberta"]()
    shape = Shape.of(model)
    found = calibrate(model, rows_of(batch, 30, seed=1))
    target = Macs(0.6)
    cost = MacCost(shape, found.mean_length)
    masks = search_macs(found.head_importance, found.filter_importance, cost, target)
    teacher = search_macs(found.head_importance, found.filter_importance, cost, target.relaxed())
    tuned, _ = tune_masks(model, found.inputs, masks, teacher)
    unseen = rows_of(batch, 5, seed=2)

    def logits(with_masks):
        with torch.no_grad(), masked(model, with_masks):
            return torch.cat([model(**rows).logits for rows in unseen])

    goal = logits(teacher)
    assert (logits(tuned) - goal).square().mean() < (logits(masks) - goal).square().mean()


def test_it_says_what_it_needs():
    model, _ = FAMILIES["bert"]()
    ones = Masks.ones(Shape.of(model))
    with pytest.raises(InvalidInput, match="keep_inputs"):
        tune_masks(model, [], ones, ones)
    with pytest.raises(InvalidInput, match='"ridge" or "lsmr"'):
        tune_masks(model, [object()], ones, ones, solver="svd")


def plain_residual_sums(model, batch, masks):
    """For every layer under `masks`: input of out, of fc2, both residual sums, and what entered the two blocks."""
    adapter = adapter_for(model)
    found = [{} for _ in adapter.layers(model)]

    def keep(place, name):
        def hook(module, args, output=None):
            found[place][name] = args[0]

        return hook

    handles = []
    for place, layer in enumerate(adapter.layers(model)):
        parts = adapter.parts(layer)
        handles.append(layer.register_forward_pre_hook(keep(place, "states")))
        handles.append(parts.fc1.register_forward_pre_hook(keep(place, "middle")))
        handles.append(parts.norm_after_attention.register_forward_pre_hook(keep(place, "attention_sum")))
        handles.append(parts.norm_after_ffn.register_forward_pre_hook(keep(place, "ffn_sum")))
    with torch.no_grad(), masked(model, masks):
        for place, layer in enumerate(
            adapter.layers(model)
        ):  # after the masks' own hooks, so that these see their work
            parts = adapter.parts(layer)
            handles.append(parts.out.register_forward_hook(keep(place, "context")))
            handles.append(parts.fc2.register_forward_hook(keep(place, "activation")))
        model(**batch)
    for handle in handles:
        handle.remove()
    return found


def test_every_layers_equations_are_those_of_plain_runs_of_teacher_and_student(monkeypatch):
    """Targets, inputs, padding, the split into fitted and held-out rows: all against runs of the masked models."""
    model, batch = QA_FAMILIES["bert"]()
    adapter, shape = adapter_for(model), Shape.of(model)
    student = uneven_masks(shape)
    teacher = Masks(torch.maximum(student.heads, uneven_masks(shape, 1).heads), torch.ones_like(student.filters))
    monkeypatch.setattr(
        "effnn.ltp.pruning.tune.MAX_SCALE", 0.0
    )  # nothing is accepted: the student stays the masked model
    built = []
    build = NormalEquations.of.__func__

    def remember(cls, sums, weight_products, intercept=False):
        equations = build(cls, sums, weight_products, intercept)
        built.append((equations, intercept))
        return equations

    monkeypatch.setattr(NormalEquations, "of", classmethod(remember))
    calibration = calibrate(model, [batch], holdout=0.4)
    held = len(calibration.held_out_batches[0]["input_ids"])
    assert held == 2
    assert torch.equal(calibration.held_out_batches[0]["input_ids"], batch["input_ids"][-held:])
    tune_masks(model, calibration.inputs, student, teacher)
    runs = {name: plain_residual_sums(model, batch, masks) for name, masks in (("t", teacher), ("s", student))}
    live = batch["attention_mask"].bool()
    steps = [
        (layer, kind) for layer in range(shape.layers) for kind in ("heads", "filters") if (layer, kind) != (0, "heads")
    ]
    assert len(built) == 2 * len(steps)
    for place, (layer, kind) in enumerate(steps):
        parts = adapter.parts(adapter.layers(model)[layer])
        s, t = runs["s"][layer], runs["t"][layer]
        if kind == "heads":
            linear, block, inputs = parts.out, parts.head_size, s["context"]
            target = t["attention_sum"] - s["states"] - linear.bias
            columns = student.heads[layer].repeat_interleave(block).bool()
        else:
            linear, block, inputs = parts.fc2, 1, s["activation"]
            target = t["ffn_sum"] - s["middle"] - linear.bias
            columns = student.filters[layer].bool()
        for (equations, intercept), rows in zip(
            built[2 * place : 2 * place + 2], (slice(0, -2), slice(-2, None)), strict=True
        ):
            chosen = live[rows]
            a = plain_ltp.design_matrix(inputs[rows][chosen][:, columns], linear.weight[:, columns], block).double()
            b = target[rows][chosen].flatten().double()
            assert intercept == (kind == "heads" and rows.stop == -2)
            if intercept:
                a = torch.cat([a, torch.ones(len(a), 1, dtype=a.dtype)], 1)
            torch.testing.assert_close(equations.matrix, a.T @ a, rtol=1e-4, atol=1e-2)
            torch.testing.assert_close(equations.rhs, a.T @ b, rtol=1e-4, atol=2e-2)
            assert equations.target_square == pytest.approx(float(b @ b), rel=1e-4)


def test_scales_that_help_the_fitted_rows_only_are_not_taken():
    from effnn.ltp.pruning.tune import _Equations

    inputs, weight, _ = random_problem(1, units=5, tokens=60)
    goal = inputs @ weight.T
    equations = _Equations(weight, 1, intercept=False)
    equations.fit.add(inputs[:40], 3 * goal[:40])
    equations.held.add(inputs[40:], goal[40:])
    scale, outcome = equations.solve(0, "filters", "ridge")
    assert not outcome.accepted and torch.equal(scale, torch.ones(5)) and "held-out" in outcome.reason
    equations.held.add(inputs[40:], 60 * goal[40:])
    assert equations.solve(0, "filters", "ridge")[1].accepted


def test_sums_stay_float32_and_float64_under_autocast():
    inputs, weight, target = random_problem(1, units=300, tokens=64)
    exact, autocast = Sums(weight.T, 1), Sums(weight.T, 1)
    exact.add(inputs, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast.add(inputs, target)
    torch.testing.assert_close(autocast.products, exact.products)
    torch.testing.assert_close(autocast.rhs, exact.rhs)


def test_tuning_under_autocast_is_near_that_in_full_precision():
    model, batch = FAMILIES["bert"]()
    shape = Shape.of(model)
    masks, rows = uneven_masks(shape), rows_of(batch, 12)
    full, half = (
        tune_masks(model, calibrate(model, rows).inputs, masks, Masks.ones(shape), autocast=dtype)[1]
        for dtype in (None, torch.bfloat16)
    )
    assert half[0].error_before == pytest.approx(full[0].error_before, rel=0.05)
    assert half[0].accepted
