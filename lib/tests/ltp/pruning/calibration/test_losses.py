"""Losses of one's own: the model's own loss in other words changes nothing, sentence pairs, encoders without a head."""

import logging
import math
import random
import re
import sys

import pytest
import torch
from helpers.encoders import FAMILIES, TEXT, build, rows_of
from torch import nn
from torch.nn import functional

from effnn import ltp
from effnn.base import InvalidInput
from effnn.ltp import Masks, Shape, masked
from effnn.ltp.pruning.calibration.batches import row_count
from effnn.ltp.pruning.tune import judged

BUILDS = {f"{name} classification": (name, "classification") for name in TEXT} | {
    "bert qa": ("bert", "qa"),
    "bert tokens": ("bert", "tokens"),
    "roberta mlm": ("roberta", "mlm"),
    "vit images": ("vit", "images"),
}
ROWS, LENGTH = 6, 12


@pytest.fixture(autouse=True)
def _quiet(caplog):
    caplog.set_level(logging.ERROR, logger="effnn.ltp")


def own_loss(model, batch):
    return model(**batch).loss


def pairs(batches=8, seed=0):
    """Sentence pairs with a similarity to come near to; of uneven lengths, so with padding."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(batches):
        batch = {}
        for side in ("first_", "second_"):
            live = torch.arange(LENGTH) < torch.randint(3, LENGTH + 1, (ROWS, 1), generator=generator)
            batch[side + "input_ids"] = torch.randint(5, 60, (ROWS, LENGTH), generator=generator) * live
            batch[side + "attention_mask"] = live.long()
        made.append(batch | {"score": torch.rand(ROWS, generator=generator)})
    return made


def pooled(model, ids, mask):
    states = model(input_ids=ids, attention_mask=mask).last_hidden_state
    return (states * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)


def pair_loss(model, batch):
    sides = [pooled(model, batch[s + "input_ids"], batch[s + "attention_mask"]) for s in ("first_", "second_")]
    return functional.mse_loss(functional.cosine_similarity(*sides), batch["score"])


def joined_loss(model, batch):
    """The same in one call of the encoder: twice as many sequences as rows."""
    ids, mask = (torch.cat([batch["first_" + n], batch["second_" + n]]) for n in ("input_ids", "attention_mask"))
    return functional.mse_loss(functional.cosine_similarity(*pooled(model, ids, mask).chunk(2)), batch["score"])


def mask_gradients(model, batch, loss):
    """dloss/dmask by autograd through masks that really multiply."""
    masks = Masks.ones(Shape.of(model))
    masks.heads.requires_grad_(), masks.filters.requires_grad_()
    with masked(model, masks):
        return torch.autograd.grad(loss(model, batch), (masks.heads, masks.filters))


@pytest.mark.parametrize("fisher", ["batch", "sample"])
@pytest.mark.parametrize("name", BUILDS)
def test_the_models_own_loss_in_other_words_changes_not_a_bit(name, fisher, monkeypatch):
    model, batch = build(*BUILDS[name])
    loader = rows_of(batch, 8)
    known = ltp.prune(model, loader, ltp.Macs(0.5), fisher=fisher, progress=False).report.calibration_loss
    # of a head that is known, what leads nowhere is left out, and the last layer's products are rounded in other places
    monkeypatch.setattr(type(ltp.adapter_for(model)), "reads_first_token_only", lambda self, model: False)
    plain = ltp.prune(model, loader, ltp.Macs(0.5), fisher=fisher, progress=False)
    other = ltp.prune(model, loader, ltp.Macs(0.5), fisher=fisher, loss=own_loss, progress=False)
    for stage, masks in plain.stages.items():
        assert torch.equal(masks.heads, other.stages[stage].heads)
        assert torch.equal(masks.filters, other.stages[stage].filters)
    assert [stage.loss for stage in plain.report.stages] == [stage.loss for stage in other.report.stages]
    assert plain.report.calibration_loss == other.report.calibration_loss == pytest.approx(known, rel=1e-6)
    assert plain.report.chance_loss is not None and other.report.chance_loss is None


@pytest.mark.parametrize("loss", [pair_loss, joined_loss])
@pytest.mark.parametrize("family", TEXT)
def test_an_encoder_without_a_head_is_pruned_saved_and_loaded(family, loss, tmp_path):
    model, _ = build(family, "base")
    loader = pairs()
    result = ltp.prune(model, loader, ltp.Macs(0.5), loss=loss, progress=False)
    report = result.report
    assert all(stage.mac_ratio <= 0.5 for stage in report.stages[1:]) and report.rows == 8 * ROWS
    live = torch.cat([batch[side + "attention_mask"] for batch in loader for side in ("first_", "second_")])
    assert report.seq_len == pytest.approx(live.sum(1).float().mean().item())
    small = result.materialize()
    small.save_pretrained(tmp_path)
    again = ltp.load_pruned(tmp_path)
    with torch.no_grad(), masked(model, result.masks):
        expected = float(loss(model, loader[0]))
    with torch.no_grad():
        assert float(loss(small, loader[0])) == pytest.approx(expected, abs=1e-5)
        assert float(loss(again, loader[0])) == float(loss(small, loader[0]))


@pytest.mark.parametrize("kind", ["batch", "sample"])
def test_gradients_of_several_calls_add_up_row_by_row(kind):
    model, _ = build("bert", "base")
    batch = pairs(1)[0]
    found = ltp.calibrate(model, [batch], fisher=kind, loss=pair_loss)
    alone = [{name: value[row : row + 1] for name, value in batch.items()} for row in range(ROWS)]
    for index, rows in enumerate(alone if kind == "sample" else [batch]):
        heads, filters = mask_gradients(model, rows, pair_loss)
        torch.testing.assert_close(found.head_gradients[index], heads, atol=1e-6, rtol=1e-3)
        torch.testing.assert_close(found.filter_gradients[index], filters, atol=1e-6, rtol=1e-3)


def test_one_call_for_both_sides_gives_the_same_fisher_information():
    model, _ = build("bert", "base")
    apart, joined = (ltp.calibrate(model, pairs(3), loss=loss) for loss in (pair_loss, joined_loss))
    torch.testing.assert_close(apart.head_gradients, joined.head_gradients, atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(apart.filter_gradients, joined.filter_gradients, atol=1e-6, rtol=1e-3)


def test_rows_are_held_out_where_they_can_be_told_apart_and_whole_batches_elsewhere():
    model, _ = build("bert", "base")
    loader = pairs(10)
    apart, joined = (ltp.calibrate(model, loader, holdout=0.2, loss=loss) for loss in (pair_loss, joined_loss))
    assert sum(item.held_out for item in apart.inputs) == 2 * 12  # both sides of 12 rows of 60
    assert sum(len(batch["score"]) for batch in apart.held_out_batches) == 12
    assert {item.held_out for item in joined.inputs} == {0, 2 * ROWS}
    assert sum(len(batch["score"]) for batch in joined.held_out_batches) == 12
    whole = [item.held_out > 0 for item in joined.inputs]
    assert torch.equal(joined.held_out_batches[0]["score"], loader[whole.index(True)]["score"])


def test_the_held_out_loss_is_the_mean_over_the_held_out_rows():
    model, _ = build("bert", "base")
    loader = pairs(10)
    report = ltp.prune(model, loader, ltp.Macs(0.5), holdout=0.25, loss=pair_loss, progress=False).report
    held = ltp.calibrate(model, loader, holdout=0.25, loss=pair_loss).held_out_batches
    rows = [{n: v[i : i + 1] for n, v in batch.items()} for batch in held for i in range(len(batch["score"]))]
    with torch.no_grad():
        expected = sum(float(pair_loss(model, row)) for row in rows) / len(rows)
    assert len(rows) == 15 and report.dense_loss == pytest.approx(expected, rel=1e-5)


def neighbours_loss(model, batch):
    """Rows 0 and 1 are a pair, and so on: of an odd number of rows it fails, of one it is not a number."""
    states = model(input_ids=batch["input_ids"]).last_hidden_state.mean(1)
    return 1 - functional.cosine_similarity(states[::2], states[1::2]).mean()


def in_batch_loss(model, batch):
    """Each row against all others of the batch: 0 for a single row."""
    sides = [pooled(model, batch[s + "input_ids"], batch[s + "attention_mask"]) for s in ("first_", "second_")]
    return functional.cross_entropy(sides[0] @ sides[1].T, torch.arange(len(sides[0])))


@pytest.mark.parametrize(("loss", "whole"), [(neighbours_loss, True), (in_batch_loss, True), (pair_loss, False)])
@pytest.mark.parametrize("batches", [2, 10])
def test_batches_are_held_out_whole_where_the_loss_is_no_mean_over_rows(loss, whole, batches):
    model, _ = build("bert", "base")
    loader = [{"input_ids": batch["first_input_ids"]} if loss is neighbours_loss else batch for batch in pairs(batches)]
    report = ltp.prune(model, loader, ltp.Macs(0.5), loss=loss, progress=False).report
    sizes = [row_count(batch) for batch in ltp.calibrate(model, loader, loss=loss).held_out_batches]
    assert sum(sizes) == (batches == 10) * ROWS if whole else set(sizes) == {1}
    for stage in report.stages:
        assert stage.loss is None if not sizes else 0 < stage.loss < float("inf")


@pytest.mark.parametrize("seen", [0, ROWS // 2, ROWS // 2 + 1])
def test_a_batch_held_out_whole_is_never_cut(seen):
    """Some of its rows are fitted elsewhere."""
    model, _ = build("bert", "base")
    loader = pairs(10)
    (place,) = [at for at, item in enumerate(ltp.calibrate(model, loader, loss=joined_loss).inputs) if item.held_out]
    for name, value in loader[place].items():
        loader[0][name] = torch.cat([value[:seen], loader[0][name][seen:]])
    held = ltp.calibrate(model, loader, loss=in_batch_loss).held_out_batches
    assert [row_count(batch) for batch in held] == [ROWS] * (2 * seen <= ROWS)


def test_a_first_batch_of_one_row_leaves_the_question_to_the_next():
    model, _ = build("bert", "base")
    loader = pairs(10)
    loader[0] = {name: value[:1] for name, value in loader[0].items()}
    for loss, size in ((in_batch_loss, ROWS), (pair_loss, 1)):
        assert {row_count(batch) for batch in ltp.calibrate(model, loader, loss=loss).held_out_batches} == {size}


def test_a_held_out_loss_that_is_not_finite_judges_nothing(monkeypatch, caplog):
    model, batch = FAMILIES["bert"]()
    loader, module = rows_of(batch, 6), sys.modules["effnn.ltp.pruning.prune"]
    for lost in (float("nan"), float("inf")):
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, logger="effnn.ltp"):
            patch.setattr(module, "held_out_loss", lambda *_, lost=lost: lost)
            found = ltp.prune(model, loader, ltp.Macs(0.5), holdout=0.1, progress=False)
        assert found.report.tuning_accepted and f"the held-out loss is {lost} without" in found.report.tuning_reason
        assert "does not judge them" in caplog.text and "dropped" not in caplog.text
        assert any(layer.accepted for layer in found.report.layers) and not torch.equal(
            found.masks.filters, found.masks.binary().filters
        )


@pytest.mark.parametrize(
    ("before", "after", "accepted", "reason"),
    [
        (None, None, True, "^$"),
        (1.0, 1.0, True, "^$"),
        (1.0, 1.5, False, "from 1 to 1.5 and are dropped"),
        (1.0, math.nan, False, "to nan and are dropped"),
        (math.nan, math.nan, True, "is nan without"),
        (math.inf, 1.0, True, "is inf without"),
    ],
)
def test_the_judgement_of_held_out_losses(before, after, accepted, reason):
    found = judged(before, after)
    assert found[0] is accepted and re.search(reason, found[1])


def test_a_pair_whose_first_sentence_is_fitted_elsewhere_is_still_unseen():
    model, _ = build("bert", "base")
    one, other = pairs(2)
    for name in ("first_input_ids", "first_attention_mask"):
        other[name] = one[name].flip(0)
    assert ltp.calibrate(model, [one, other], holdout=0.2, loss=pair_loss).held_out_batches
    other = {name: value.flip(0) for name, value in one.items()}
    assert not ltp.calibrate(model, [one, other], holdout=0.2, loss=pair_loss).held_out_batches


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_a_module_of_ones_own_is_pruned_as_the_stock_head_is(family):
    """The advice for such modules, tried: pass the encoder, with a loss that does the rest."""
    model, batch = FAMILIES[family]()
    loader = rows_of(batch, 8)
    encoder = model.base_model

    def rest(encoder, batch):
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        output = encoder(**inputs)
        states = output.pooler_output if family == "bert" else output.last_hidden_state[:, 0]
        return functional.cross_entropy(model.classifier(states), batch["labels"])

    whole = ltp.prune(model, loader, ltp.Macs(0.5), progress=False)
    parts = ltp.prune(encoder, loader, ltp.Macs(0.5), loss=rest, progress=False)
    assert torch.equal(whole.masks.heads, parts.masks.heads)
    torch.testing.assert_close(whole.masks.filters, parts.masks.filters)
    assert all(parameter.grad is None for parameter in model.parameters())
    with torch.no_grad():
        assert float(rest(parts.materialize(), batch)) == pytest.approx(
            float(whole.materialize()(**batch).loss), abs=1e-5
        )


def test_the_encoder_inside_a_model_with_a_head_has_no_pooling_layer_and_keeps_none(tmp_path):
    model, batch = build("bert", "tokens")
    loader = rows_of({name: value for name, value in batch.items() if name != "labels"}, 8)

    def loss(encoder, batch):
        return model.classifier(encoder(**batch).last_hidden_state).square().mean()

    result = ltp.prune(model.bert, loader, ltp.Macs(0.5), loss=loss, progress=False)
    small = result.materialize()
    small.save_pretrained(tmp_path / "small")
    result.export_padded(tmp_path / "padded")
    with torch.no_grad():
        expected = loss(small, loader[0])
        for again in (
            ltp.load_pruned(tmp_path / "small"),
            ltp.pad(small),
            type(model.bert).from_pretrained(tmp_path / "padded", add_pooling_layer=False),
        ):
            assert again.pooler is None
            torch.testing.assert_close(loss(again.eval(), loader[0]), expected)
    assert model.classifier.weight.grad is None


def test_what_reaches_the_loss_decides_which_positions_are_reconstructed():
    model, batch = build("bert", "classification")
    assert all(item.first_only for item in ltp.calibrate(model, [batch]).inputs)

    def mean_of_states(model, batch):
        return model(**batch, output_hidden_states=True).hidden_states[-1].square().mean()

    assert not any(item.first_only for item in ltp.calibrate(model, [batch], loss=mean_of_states).inputs)
    for layer in model.bert.encoder.layer:
        layer.chunk_size_feed_forward = 1
    assert not any(item.first_only for item in ltp.calibrate(model, [batch], loss=mean_of_states).inputs)


def test_layers_that_the_loss_does_not_reach_have_no_importance():
    model, batch = build("bert", "base")

    def early(model, batch):
        return model(**batch, output_hidden_states=True).hidden_states[1].square().mean()

    found = ltp.calibrate(model, [batch], loss=early)
    assert found.head_importance[0].all() and not found.head_importance[1:].any()
    assert ltp.prune(model, [batch], ltp.Macs(0.3), loss=early, progress=False).masks.heads[0].any()


@pytest.mark.parametrize("build_of_batch", ["tuple", "nested", "texts"])
def test_batches_of_any_build_are_taken_apart_row_by_row(build_of_batch):
    model, batch = build("bert", "classification")
    plain = rows_of(batch, 8)
    if build_of_batch == "tuple":
        made = [(b["input_ids"], b["attention_mask"], b["token_type_ids"], b["labels"]) for b in plain]
        names = ("input_ids", "attention_mask", "token_type_ids", "labels")
        loss = lambda model, b: model(**dict(zip(names, b, strict=True))).loss  # noqa: E731
    elif build_of_batch == "nested":
        made = [{"x": {n: v for n, v in b.items() if n != "labels"}, "y": [b["labels"]]} for b in plain]
        loss = lambda model, b: model(**b["x"], labels=b["y"][0]).loss  # noqa: E731
    else:
        made = [b | {"texts": [str(row) for row in range(len(b["labels"]))]} for b in plain]

        def loss(model, b):
            assert len(b["texts"]) == len(b["labels"])
            return own_loss(model, {name: value for name, value in b.items() if name != "texts"})

    masks = [
        ltp.prune(model, loader, ltp.Macs(0.5), loss=function, progress=False).masks
        for loader, function in ((plain, own_loss), (made, loss))
    ]
    assert torch.equal(masks[0].heads, masks[1].heads) and torch.equal(masks[0].filters, masks[1].filters)


class TestErrors:
    @pytest.mark.parametrize(
        ("loss", "message"),
        [
            (lambda model, batch: model(**batch), "returned a SequenceClassifierOutput.*output.loss"),
            (lambda model, batch: model(**batch).logits, "float32 tensor of shape.*mean"),
            (lambda model, batch: float(model(**batch).loss), "returned a float"),
            (lambda model, batch: torch.ones((), requires_grad=True), "did not run the model"),
            (lambda model, batch: model(**batch).loss.detach(), "no gradient leads.*detach"),
            (lambda model, batch: model(**batch).loss * torch.nan, "is nan"),
            ("mse", "function loss"),
        ],
    )
    def test_what_a_loss_must_be(self, loss, message):
        model, batch = FAMILIES["bert"]()
        with pytest.raises(InvalidInput, match=message):
            ltp.prune(model, rows_of(batch, 4), ltp.Macs(0.5), loss=loss, progress=False)

    def test_a_loss_that_holds_on_to_the_dense_model(self):
        model, batch = FAMILIES["bert"]()
        with pytest.raises(InvalidInput, match="PrunedBertForSequenceClassification: it must call its argument"):
            ltp.prune(model, rows_of(batch, 4), ltp.Macs(0.5), loss=lambda _, b: model(**b).loss, progress=False)

    def test_no_two_sources_of_labels(self):
        model, batch = FAMILIES["bert"]()
        with pytest.raises(InvalidInput, match="leave"):
            ltp.prune(model, [batch], ltp.Macs(0.5), loss=own_loss, labels="model", progress=False)

    def test_single_rows_of_a_joined_call_cannot_be_told_apart(self):
        model, _ = build("bert", "base")
        with pytest.raises(InvalidInput, match='6 rows.*on 12.*fisher="batch"'):
            ltp.prune(model, pairs(), ltp.Macs(0.5), loss=joined_loss, fisher="sample", progress=False)

    def test_errors_inside_a_loss_come_through_as_they_are(self):
        model, batch = FAMILIES["bert"]()
        with pytest.raises(KeyError, match="target"):
            ltp.prune(model, [batch], ltp.Macs(0.5), loss=lambda m, b: m(**b).loss * b["target"], progress=False)


@pytest.mark.parametrize("source", ["torch", "elsewhere"])
def test_a_loss_drawn_anew_at_each_call_is_taken(source):
    model, batch = FAMILIES["bert"]()
    noise, other = nn.Dropout(0.5), random.Random(0)  # of the caller's own, in training mode

    def loss(model, batch):
        logits = model(**batch | {"labels": None}).logits
        logits = noise(logits) if source == "torch" else logits * other.random()
        return functional.cross_entropy(logits, batch["labels"])

    assert ltp.prune(model, rows_of(batch, 4), ltp.Macs(0.5), loss=loss, progress=False).report.rows == 20
