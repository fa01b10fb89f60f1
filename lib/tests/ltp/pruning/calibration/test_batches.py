"""What batches may hold: entries that are not per row, labels token by token, choices of sequences."""

import logging

import pytest
import torch
from helpers.encoders import FAMILIES, TEXT, build, randomise, rows_of
from transformers import AutoModelForMultipleChoice, BatchEncoding
from transformers.models.auto import modeling_auto

from effnn import ltp
from effnn.base import InvalidInput
from effnn.ltp import Masks, Shape, calibrate, masked
from effnn.ltp.pruning.calibration import batches
from effnn.ltp.pruning.latency.measure import random_inputs

CHOICES, LENGTH = 3, 10


@pytest.fixture(autouse=True)
def _quiet(caplog):
    caplog.set_level(logging.ERROR, logger="effnn.ltp")


def mask_gradients(model, batch):
    masks = Masks.ones(Shape.of(model))
    masks.heads.requires_grad_(), masks.filters.requires_grad_()
    with masked(model, masks):
        return torch.autograd.grad(model(**batch).loss, (masks.heads, masks.filters))


def same(one, other):
    return torch.equal(one.masks.heads, other.masks.heads) and torch.equal(one.masks.filters, other.masks.filters)


def prune(model, loader, **options):
    return ltp.prune(model, loader, ltp.Macs(0.5), progress=False, **options)


class TestNotPerRow:
    def test_a_table_for_all_rows_is_passed_on_whole(self):
        model, batch = FAMILIES["bert"]()
        positions = torch.arange(batch["input_ids"].shape[1])
        plain = rows_of(batch, 6)
        shared = prune(model, [b | {"position_ids": positions[None] + 2} for b in plain])
        repeated = prune(model, [b | {"position_ids": (positions + 2).expand(len(b["labels"]), -1)} for b in plain])
        assert same(shared, repeated) and shared.report.stages[-1].loss == repeated.report.stages[-1].loss
        assert shared.report.dense_loss != prune(model, plain).report.dense_loss

    @pytest.mark.parametrize("place", ["first", "last"])
    def test_the_order_of_the_entries_says_nothing_of_the_rows(self, place):
        model, batch = FAMILIES["bert"]()
        plain = rows_of(batch, 6)
        extra = {"position_ids": torch.arange(batch["input_ids"].shape[1])[None], "token_type_ids": None}
        extra |= {"scale": torch.tensor(2.0), "note": "a text", "flag": True, "ids": [7] * 3}
        made = [extra | b | {"token_type_ids": None} if place == "first" else b | extra for b in plain]
        expected = prune(model, [b | {"token_type_ids": None} for b in plain])
        found = prune(model, made)
        assert found.report.rows == 30 and same(found, expected)

    def test_flags_reach_the_model_on_fitted_and_on_held_out_rows(self):
        model, batch = FAMILIES["vit"]()
        generator = torch.Generator().manual_seed(0)
        larger = [
            {
                "interpolate_pos_encoding": True,  # without it the model refuses images of this size
                "pixel_values": torch.randn(5, 3, 16, 16, generator=generator),
                "labels": batch["labels"],
            }
            for _ in range(4)
        ]
        report = prune(model, larger).report
        assert report.seq_len == 17 and report.stages[-1].loss is not None

    def test_a_mask_of_every_query_counts_the_tokens_that_are_attended_to(self):
        model, batch = FAMILIES["bert"]()
        live = batch["attention_mask"].bool()
        whole = live[:, None, None, :].expand(-1, 1, live.shape[1], -1)
        added = torch.zeros(whole.shape).masked_fill(~whole, torch.finfo(torch.float32).min)
        lengths = [calibrate(model, [batch | {"attention_mask": mask}]).mean_length for mask in (live, whole, added)]
        assert lengths == [int(live.sum()) / len(live)] * 3

    def test_a_tokenizers_own_mapping_and_tuples_asked_for_by_the_configuration(self):
        model, batch = FAMILIES["roberta"]()
        plain = rows_of(batch, 4)
        expected = prune(model, plain)
        assert same(prune(model, [BatchEncoding(b) for b in plain]), expected)
        model.config.return_dict = False
        found = prune(model, plain)
        assert same(found, expected) and found.report.dense_loss == expected.report.dense_loss
        assert isinstance(found.materialize()(**plain[0]), tuple)
        for of_configuration in (False, True):
            model.config.return_dict = of_configuration
            assert same(prune(model, [b | {"return_dict": False} for b in plain]), expected)

    def test_one_row_a_batch(self):
        model, batch = FAMILIES["bert"]()
        positions = {"position_ids": torch.arange(batch["input_ids"].shape[1])[None]}
        singles = [{name: value[i : i + 1] for name, value in batch.items()} | positions for i in range(5)]
        assert prune(model, singles).report.rows == 5

    def test_a_batch_without_rows_is_left_out(self):
        model, batch = FAMILIES["bert"]()
        plain = rows_of(batch, 4)
        empty = {name: value[:0] for name, value in batch.items()}
        assert same(prune(model, [plain[0], empty, *plain[1:]]), prune(model, plain))

    def test_a_model_compiled_in_place_is_run_as_it_is_written(self):
        model, batch = FAMILIES["bert"]()
        expected = calibrate(model, [batch])
        compiled = []
        model.compile(backend=lambda graph, inputs: compiled.append(graph) or graph.forward)
        found = calibrate(model, [batch])
        assert torch.equal(found.head_gradients, expected.head_gradients) and not compiled


class TestTokenLabels:
    """Masked language models and token classification: labels of -100 do not count."""

    def sparse(self, model, batch, seed=0, share=0.3):
        """Fewer labels, and none in the row before the last."""
        generator = torch.Generator().manual_seed(seed)
        keep = torch.rand(batch["labels"].shape, generator=generator) < share
        keep[:, 0], keep[-2] = True, False
        return batch | {"labels": batch["labels"].masked_fill(~keep, -100)}

    @pytest.mark.parametrize("task", ["tokens", "mlm"])
    @pytest.mark.parametrize("family", ["bert", "distilbert", "electra"])
    def test_the_pipeline_runs_with_rows_and_batches_without_labels(self, family, task):
        model, batch = build(family, task)
        loader = [self.sparse(model, b, seed) for seed, b in enumerate(rows_of(batch, 10))]
        none = batch | {"labels": torch.full_like(batch["labels"], -100)}
        for options in ({}, {"fisher": "sample"}, {"holdout": 0.6}):
            expected = prune(model, loader, **options)
            found = prune(model, [*loader[:4], none, *loader[4:]], **options)
            assert same(expected, found) and found.report.rows == 50
            losses = [stage.loss for stage in found.report.stages]
            assert all(loss == loss and 0 < loss < 50 for loss in losses)
        with torch.no_grad():
            assert found.materialize()(**batch).logits.isfinite().all()

    def test_only_rows_without_a_label_held_out_means_no_loss_rather_than_nan(self):
        model, batch = build("bert", "mlm")
        batch["labels"][-1] = -100
        report = prune(model, rows_of(batch, 4), holdout=0.2).report
        assert [stage.loss for stage in report.stages] == [None] * 4 and report.tuning_accepted

    def test_gradients_of_single_rows_are_those_of_their_own_mean(self):
        model, batch = build("bert", "mlm")
        batch = self.sparse(model, batch)
        found = calibrate(model, [batch], fisher="sample")
        for row in range(5):
            alone = {name: value[row : row + 1] for name, value in batch.items()}
            if row == 3:
                assert not found.head_gradients[row].any() and not found.filter_gradients[row].any()
                continue
            heads, filters = mask_gradients(model, alone)
            torch.testing.assert_close(found.head_gradients[row], heads, atol=2e-6, rtol=1e-3)
            torch.testing.assert_close(found.filter_gradients[row], filters, atol=2e-6, rtol=1e-3)
        # weighed by their labels they are the batch's
        count = (batch["labels"] != -100).sum(1)
        share = (count / count.sum())[:, None, None]
        whole = calibrate(model, [batch]).head_gradients[0]
        torch.testing.assert_close((found.head_gradients * share).sum(0), whole, atol=2e-6, rtol=1e-3)

    def test_the_held_out_loss_is_the_mean_over_label_tokens(self):
        model, batch = build("bert", "tokens")
        loader = [self.sparse(model, b, seed, 0.1 + 0.08 * seed) for seed, b in enumerate(rows_of(batch, 10))]
        report = prune(model, loader, holdout=0.4).report
        total = labels = 0
        for held in calibrate(model, loader, holdout=0.4).held_out_batches:
            with torch.no_grad():
                logits = model(**held).logits
            total += float(torch.nn.functional.cross_entropy(logits.mT, held["labels"], reduction="sum"))
            labels += int((held["labels"] != -100).sum())
        assert report.dense_loss == pytest.approx(total / labels, rel=1e-5)

    def test_chance_is_the_entropy_of_the_label_tokens(self, caplog):
        model, batch = build("bert", "tokens")
        batch["labels"][batch["labels"] >= 0] = 0
        batch["labels"][0, :13] = torch.arange(13) % 3
        shares = torch.bincount(batch["labels"][batch["labels"] >= 0]).double()
        shares /= shares.sum()
        assert calibrate(model, [batch]).chance_loss == pytest.approx(-(shares * shares.log()).sum().item())
        with caplog.at_level(logging.WARNING, logger="effnn.ltp"):
            calibrate(model, [batch])
            assert "fine-tuned" in caplog.text
            caplog.clear()
            model, batch = build("bert", "mlm")
            calibrate(model, [batch])
            assert "fine-tuned" not in caplog.text  # 41 labels of 60 words: their entropy says little

    def test_all_labels_ignored(self):
        model, batch = build("bert", "mlm")
        with pytest.raises(InvalidInput, match="no calibration batch has a label"):
            calibrate(model, [batch | {"labels": torch.full_like(batch["labels"], -100)}])
        model, batch = build("bert", "qa")
        outside = {"start_positions": torch.full((5,), 13), "end_positions": torch.full((5,), 14)}
        with pytest.raises(InvalidInput, match="all answers start or end outside the window of 13 tokens"):
            calibrate(model, [batch | outside] * 2)


def choices(family, count=6, seed=0):
    """A tiny model that chooses one of three sequences, and batches for it; sequences differ in length."""
    config = build(family, "base")[0].config
    model = modeling_auto.AutoModelForMultipleChoice.from_config(config)
    randomise(model)
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        live = torch.arange(LENGTH) < torch.randint(3, LENGTH + 1, (4, CHOICES, 1), generator=generator)
        ids = torch.randint(5, 60, live.shape, generator=generator).masked_fill(~live, config.pad_token_id)
        labels = torch.randint(0, CHOICES, (4,), generator=generator)
        made.append({"input_ids": ids, "attention_mask": live.long(), "labels": labels})
    return model.eval(), made


class TestMultipleChoice:
    @pytest.mark.parametrize("family", [*TEXT, "camembert"])
    def test_it_is_pruned_saved_and_loaded(self, family, tmp_path):
        model, loader = choices(family)
        result = prune(model, loader)
        live = torch.cat([b["attention_mask"].flatten(0, 1) for b in loader])
        assert result.report.rows == 24
        assert result.report.seq_len == pytest.approx(live.sum(1).float().mean().item())
        small = result.materialize()
        small.save_pretrained(tmp_path)
        with torch.no_grad(), masked(model, result.masks):
            expected = model(**loader[0]).logits
        for again in (small, ltp.load_pruned(tmp_path), AutoModelForMultipleChoice.from_pretrained(tmp_path).eval()):
            torch.testing.assert_close(again(**loader[0]).logits, expected, atol=1e-5, rtol=1e-4)

    def test_a_row_is_all_of_its_choices(self):
        model, loader = choices("bert", 1)
        found = calibrate(model, loader, fisher="sample")
        assert len(found.head_gradients) == 4
        for row in range(4):
            heads, filters = mask_gradients(model, {n: v[row : row + 1] for n, v in loader[0].items()})
            torch.testing.assert_close(found.head_gradients[row], heads, atol=2e-6, rtol=1e-3)
            torch.testing.assert_close(found.filter_gradients[row], filters, atol=2e-6, rtol=1e-3)

    def test_rows_are_held_out_with_all_of_their_choices(self):
        model, loader = choices("bert")
        again = {name: value.flip(0) for name, value in loader[0].items()}  # its last row is fitted in the first batch
        found = calibrate(model, [*loader, again], holdout=0.25)
        assert [item.held_out for item in found.inputs] == [CHOICES] * 7
        assert [len(b["labels"]) for b in found.held_out_batches] == [1] * 5
        assert torch.equal(found.held_out_batches[0]["input_ids"], loader[1]["input_ids"][-1:])
        for item in (found.inputs[0], found.inputs[-1]):  # what is held out here is fitted there
            assert not item.live[-CHOICES:].any() and item.live[:-CHOICES].any(1).all()
        assert all(item.live.any(1).all() for item in found.inputs[1:-1])

    def test_labels_of_the_models_own(self):
        model, loader = choices("electra")
        assert prune(model, [{n: v for n, v in b.items() if n != "labels"} for b in loader], labels="model")

    def test_inputs_to_time_it_with(self):
        model, _ = choices("bert")
        inputs = random_inputs(model, 2, 7)[0]
        assert inputs["input_ids"].shape == (2, 1, 7) and model(**inputs).logits.shape == (2, 1)


class TestBatches:
    def test_rows_are_counted_from_a_fixed_entry(self):
        ids, labels, table = torch.zeros(4, 7), torch.zeros(4), torch.zeros(1, 7)
        assert batches.row_count({"position_ids": table, "x": table, "labels": labels, "input_ids": ids}) == 4
        assert batches.row_count({"x": table, "y": table, "labels": labels}) == 4
        assert batches.row_count((table, ids, labels)) == 4
        assert batches.row_count({"anchors": ids, "others": torch.zeros(12, 7)}) == 4
        with pytest.raises(ValueError, match="no tensor"):
            batches.row_count({"text": ["a", "b"]})

    def test_rows_are_taken_from_what_is_per_row(self):
        batch = {
            "input_ids": torch.arange(12).view(4, 3),
            "array": torch.arange(4).numpy(),
            "texts": ["a", "b", "c", "d"],
            "table": torch.zeros(1, 3),
            "number": torch.tensor(4),
            "nested": {"x": (torch.arange(4), None)},
            "flag": True,
        }
        found = batches.take(batch, [2, 0])
        assert found["input_ids"].tolist() == [[6, 7, 8], [0, 1, 2]] and found["array"].tolist() == [2, 0]
        assert found["texts"] == ["c", "a"] and found["nested"]["x"][0].tolist() == [2, 0]
        assert found["table"] is batch["table"] and found["number"] is batch["number"] and found["flag"] is True
        assert isinstance(found["nested"]["x"], tuple) and found["nested"]["x"][1] is None

    def test_rows_of_equal_content_have_equal_keys_whatever_their_padding(self):
        short = {"input_ids": torch.tensor([[5, 6, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
        longer = {"input_ids": torch.tensor([[5, 6, 0, 0]]), "attention_mask": torch.tensor([[1, 1, 0, 0]])}
        other = {"input_ids": torch.tensor([[5, 7, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
        assert batches.row_keys(short) == batches.row_keys(longer) != batches.row_keys(other)
        reverse = dict(reversed(short.items()))
        assert batches.row_keys(reverse) == batches.row_keys(short)
        assert len(set(batches.row_keys({"labels": torch.zeros(3)}))) == 3
