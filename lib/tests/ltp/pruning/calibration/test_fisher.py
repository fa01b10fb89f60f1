"""The calibration pass: gradients against autograd through explicit masks, per sample and per batch, and its errors."""

import logging

import pytest
import torch
from helpers.encoders import FAMILIES, QA_FAMILIES, rows_of

from effnn.base import InvalidInput
from effnn.ltp import Masks, Shape, adapter_for, calibrate, masked


def mask_gradients(model, batch):
    """dloss/dmask by autograd through masks that really multiply."""
    shape = Shape.of(model)
    masks = Masks.ones(shape)
    masks.heads.requires_grad_(), masks.filters.requires_grad_()
    with masked(model, masks):
        model(**batch).loss.backward()
    model.zero_grad()
    return masks.heads.grad, masks.filters.grad


@pytest.mark.parametrize("family", [*FAMILIES, *(f"qa:{name}" for name in QA_FAMILIES)])
def test_batch_gradients_equal_autograd_through_masks(family):
    model, batch = QA_FAMILIES[family[3:]]() if family.startswith("qa:") else FAMILIES[family]()
    found = calibrate(model, [batch, batch], fisher="batch")
    heads, filters = mask_gradients(model, batch)
    assert heads.abs().max() > 1e-4
    for index in range(2):
        torch.testing.assert_close(found.head_gradients[index], heads, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(found.filter_gradients[index], filters, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found.head_importance, 2 * heads.double().square(), atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_sample_gradients_equal_one_backward_a_row_and_average_to_the_batch(family):
    model, batch = FAMILIES[family]()
    rows = len(batch["labels"])
    found = calibrate(model, [batch], fisher="sample")
    assert found.head_gradients.shape[0] == found.filter_gradients.shape[0] == rows
    for row in range(rows):
        heads, filters = mask_gradients(model, {name: value[row : row + 1] for name, value in batch.items()})
        torch.testing.assert_close(found.head_gradients[row], heads, atol=2e-6, rtol=1e-3)
        torch.testing.assert_close(found.filter_gradients[row], filters, atol=2e-6, rtol=1e-3)
    whole = calibrate(model, [batch], fisher="batch")
    torch.testing.assert_close(found.head_gradients.mean(0), whole.head_gradients[0], atol=1e-6, rtol=1e-3)


def test_nothing_is_left_on_the_model():
    model, batch = FAMILIES["bert"]()
    next(model.parameters()).requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calibrate(model, [batch])
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(not module._forward_pre_hooks for module in model.modules())
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


def test_a_generator_of_batches_is_read_once_and_held_out_rows_add_up():
    model, batch = FAMILIES["distilbert"]()
    found = calibrate(model, (rows for rows in rows_of(batch, 7)), holdout=0.25)
    assert found.rows == 35
    assert sum(item.held_out for item in found.inputs) == sum(len(b["labels"]) for b in found.held_out_batches) == 8
    assert found.mean_length == pytest.approx(batch["attention_mask"].sum(1).float().mean().item())
    assert not calibrate(model, [batch], holdout=0.0).held_out_batches


def test_a_row_of_padding_only_changes_nothing_but_the_mean():
    model, batch = FAMILIES["bert"]()
    longer = {
        name: torch.nn.functional.pad(value, (0, 6)) if value.dim() == 2 else value for name, value in batch.items()
    }
    plain, padded = calibrate(model, [batch]), calibrate(model, [longer])
    torch.testing.assert_close(plain.head_gradients, padded.head_gradients, atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(plain.filter_gradients, padded.filter_gradients, atol=1e-6, rtol=1e-3)
    assert plain.mean_length == padded.mean_length


def test_labels_from_the_model_need_no_labels_and_follow_the_seed():
    model, batch = FAMILIES["electra"]()
    unlabelled = {name: value for name, value in batch.items() if name != "labels"}
    draws = [
        calibrate(model, [unlabelled], labels="model", generator=torch.Generator().manual_seed(seed)).head_gradients
        for seed in (0, 0, 1, 2, 3)
    ]
    assert torch.equal(draws[0], draws[1])
    assert any(not torch.equal(draws[0], other) for other in draws[2:])


def test_labels_drawn_from_the_model_are_those_that_the_held_out_loss_is_taken_on():
    model, batch = FAMILIES["electra"]()
    batches = [{k: v for k, v in one.items() if k != "labels"} for one in rows_of(batch, 8)]
    found = calibrate(model, batches, labels="model", holdout=0.3)
    assert found.held_out_batches and all("labels" in one for one in found.held_out_batches)
    assert found.chance_loss is not None
    with torch.no_grad():
        model.classifier.out_proj.weight.mul_(100)  # a model that is sure of itself draws what it predicts
    for one in calibrate(model, batches, labels="model", holdout=0.3).held_out_batches:
        logits = model(**{k: v for k, v in one.items() if k != "labels"}).logits
        sure = logits.softmax(-1).max(-1).values > 0.999
        assert torch.equal(logits.argmax(-1)[sure], one["labels"][sure])


@pytest.mark.parametrize("problem", ["multi_label_classification", None])
def test_labels_cannot_be_drawn_from_every_head(problem):
    model, batch = FAMILIES["bert"]() if problem else QA_FAMILIES["bert"]()
    model.config.problem_type = problem
    with pytest.raises(InvalidInput, match="chooses one of"):
        calibrate(model, [batch], labels="model")


def test_bf16_autocast_stays_close():
    model, batch = FAMILIES["bert"]()
    exact, half = calibrate(model, [batch]), calibrate(model, [batch], autocast=torch.bfloat16)
    assert half.filter_gradients.dtype == torch.float32
    error = (half.filter_gradients - exact.filter_gradients).norm() / exact.filter_gradients.norm()
    assert 0 < error < 0.1


def test_an_ffn_run_in_chunks_gives_the_same_gradients():
    model, batch = FAMILIES["bert"]()
    whole = calibrate(model, [batch])
    for layer in model.bert.encoder.layer:
        layer.chunk_size_feed_forward = 1
    chunked = calibrate(model, [batch])
    torch.testing.assert_close(chunked.filter_gradients, whole.filter_gradients, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fisher", ["batch", "sample"])
def test_leaving_out_what_leads_nowhere_changes_no_gradient(family, fisher, monkeypatch):
    model, batch = FAMILIES[family]()
    batches, ran = rows_of(batch, 3), []
    fc2 = adapter_for(model).parts(adapter_for(model).layers(model)[-1]).fc2
    handle = fc2.register_forward_hook(lambda module, inputs, output: ran.append(inputs[0].shape[1]))
    short = calibrate(model, batches, fisher=fisher)
    handle.remove()
    assert ran[0] > 1 and ran[1:] == [1, 1]  # the first mini-batch shows whether it is so
    hooks = (module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(hooks)
    monkeypatch.setattr(type(adapter_for(model)), "reads_first_token_only", lambda self, model: False)
    whole = calibrate(model, batches, fisher=fisher)
    torch.testing.assert_close(short.filter_gradients, whole.filter_gradients, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(short.head_gradients, whole.head_gradients, atol=1e-6, rtol=1e-4)
    assert short.loss == pytest.approx(whole.loss, rel=1e-6)


def test_a_head_that_reads_other_positions_is_seen_not_believed():
    model, batch = FAMILIES["roberta"]()

    class Mean(torch.nn.Module):
        """A user's own head in the place of the one that takes position 0."""

        def __init__(self, head):
            super().__init__()
            self.head = head

        def forward(self, features, **kwargs):
            return self.head(features.mean(1, keepdim=True), **kwargs)

    model.classifier = Mean(model.classifier).eval()
    batches = rows_of(batch, 3)
    found = calibrate(model, batches)
    for index in (0, 2):
        expected = mask_gradients(model, batches[index])[1]
        torch.testing.assert_close(found.filter_gradients[index], expected, atol=2e-6, rtol=1e-3)


def test_an_ffn_in_chunks_of_several_positions_runs_whole():
    model, batch = FAMILIES["bert"]()
    batches = [{name: value[:, :12] if value.dim() == 2 else value for name, value in batch.items()}] * 2
    whole = calibrate(model, batches)
    for layer in model.bert.encoder.layer:
        layer.chunk_size_feed_forward = 4
    torch.testing.assert_close(calibrate(model, batches).filter_gradients, whole.filter_gradients, atol=1e-6, rtol=1e-3)


def test_rows_whose_label_is_to_be_ignored_do_not_count():
    model, batch = QA_FAMILIES["bert"]()
    length = batch["input_ids"].shape[1]
    outside = {name: value.clone() for name, value in batch.items()}
    outside["start_positions"][1] = outside["end_positions"][1] = length
    found = calibrate(model, [outside], fisher="sample")
    alone = {name: value[:1] for name, value in batch.items()}
    torch.testing.assert_close(found.head_gradients[0], mask_gradients(model, alone)[0], atol=2e-6, rtol=1e-3)
    assert not found.head_gradients[1].any()
    outside["start_positions"][:] = outside["end_positions"][:] = length
    assert calibrate(model, [batch, outside]).rows == len(batch["input_ids"])

    classifier, batch = FAMILIES["bert"]()
    batch["labels"][0] = -100
    assert calibrate(classifier, [batch]).chance_loss > 0


def test_batches_of_one_row_are_held_out_whole():
    model, batch = FAMILIES["bert"]()
    singles = [{name: value[i : i + 1] for name, value in batch.items()} for i in range(5)]
    found = calibrate(model, singles, holdout=0.4)
    assert [item.held_out for item in found.inputs] == [0, 0, 1, 0, 1]
    assert [torch.equal(found.held_out_batches[k]["labels"], batch["labels"][i : i + 1]) for k, i in enumerate((2, 4))]


def test_a_held_out_row_that_is_fitted_elsewhere_is_dropped_from_the_judgement():
    model, batch = FAMILIES["bert"]()
    other = {name: value.flip(0) for name, value in batch.items()}
    found = calibrate(model, [batch, other], holdout=0.2)
    assert not found.held_out_batches and not found.inputs[0].live[-1].any() and found.inputs[0].live[0].any()


def test_chance_is_variance_for_regression_and_length_for_spans():
    from helpers.encoders import build

    model, batch = build("bert", num_labels=1)
    batch["labels"] = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0])
    assert calibrate(model, [batch]).chance_loss == pytest.approx(2.0)
    model, batch = QA_FAMILIES["roberta"]()
    found = calibrate(model, [batch])
    assert found.chance_loss == pytest.approx(torch.tensor(found.mean_length).log().item())


class TestErrors:
    def test_training_mode(self):
        model, batch = FAMILIES["bert"]()
        with pytest.raises(InvalidInput, match="model.eval"):
            calibrate(model.train(), [batch])
        model.eval().bert.train()
        with pytest.raises(InvalidInput, match="model.eval"):
            calibrate(model, [batch])

    def test_no_labels(self):
        model, batch = FAMILIES["bert"]()
        with pytest.raises(InvalidInput, match='"labels".*labels="model"'):
            calibrate(model, [{"input_ids": batch["input_ids"]}])

    def test_empty_loader(self):
        with pytest.raises(InvalidInput, match="empty"):
            calibrate(FAMILIES["bert"]()[0], [])

    def test_nan_loss(self):
        model, batch = FAMILIES["vit"]()
        with pytest.raises(InvalidInput, match="batch 1 is nan"):
            calibrate(model, [batch, batch | {"pixel_values": batch["pixel_values"] * float("nan")}])

    @pytest.mark.parametrize("bad", [{"fisher": "row"}, {"labels": "none"}, {"holdout": 1.0}])
    def test_options(self, bad):
        model, batch = FAMILIES["bert"]()
        with pytest.raises(InvalidInput, match="expected"):
            calibrate(model, [batch], **bad)

    def test_an_untrained_model_is_warned_of_and_a_fitting_one_is_not(self, caplog):
        model, batch = FAMILIES["bert"]()
        with caplog.at_level(logging.WARNING):
            calibrate(model, [batch])
        assert "near the" in caplog.text and "fine-tuned" in caplog.text
        caplog.clear()
        batch["labels"] = model(**batch).logits.argmax(-1)
        with torch.no_grad():  # certain of its own answers
            for parameter in model.classifier.parameters():
                parameter.mul_(30)
        with caplog.at_level(logging.WARNING):
            calibrate(model, [batch], holdout=0.0)
        assert not caplog.text
