"""Batches: padding, order, and the calibration draw."""

import pytest
import torch
from helpers.texts import toy_task

from effnn.base import InvalidInput
from effnn.data import text


@pytest.fixture(scope="module")
def tokenizer():
    return text.train_wordpiece(toy_task(pairs=True).train.joined(), 200)


def test_batches_are_padded_to_their_longest_row(tokenizer):
    rows = text.encode_split(toy_task().train, tokenizer, max_length=9)
    for batch in text.loader(rows, batch_size=8, shuffle=True):
        assert set(batch) == {"input_ids", "attention_mask", "labels"}
        assert batch["attention_mask"].sum(1).max() == batch["input_ids"].shape[1] <= 9
        assert torch.equal(batch["input_ids"] != tokenizer.pad_token_id, batch["attention_mask"].bool())
        assert batch["labels"].dtype == torch.long


def test_pairs_carry_token_types_and_scores_are_floats(tokenizer):
    batch = next(iter(text.loader(text.encode_split(toy_task(pairs=True, labels=()).dev, tokenizer, 16), 4)))
    assert set(batch["token_type_ids"].unique().tolist()) == {0, 1}
    assert batch["token_type_ids"].shape == batch["input_ids"].shape and batch["labels"].dtype == torch.float32


def _seen(batches) -> list[tuple]:
    return [tuple(map(tuple, batch["input_ids"].tolist())) for batch in batches]


def test_every_row_comes_once_in_an_order_of_seed_and_epoch(tokenizer):
    rows = text.encode_split(toy_task().train, tokenizer, 32)
    orders = [_seen(text.loader(rows, 8, shuffle=True, seed=s, epoch=e)) for s, e in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert orders[0] == orders[1] and len({str(order) for order in orders}) == 3
    for order in orders:
        assert sorted(tuple(t for t in row if t) for batch in order for row in batch) == sorted(
            tuple(row["input_ids"].tolist()) for row in rows
        )
    assert _seen(text.loader(rows, 8, shuffle=True)) == _seen(text.loader(rows, 8, shuffle=True))


def test_batches_leave_the_callers_generator_alone(tokenizer):
    before = torch.get_rng_state()
    list(text.loader(text.encode_split(toy_task().train, tokenizer, 8), 8, shuffle=True))
    list(text.calibration_loader(toy_task(), tokenizer, rows=8))
    assert torch.equal(torch.get_rng_state(), before)


def test_bucketing_saves_padding_and_can_be_switched_off(tokenizer):
    rows = text.encode_split(toy_task().train, tokenizer, 32)
    sizes = {on: sum(batch["input_ids"].numel() for batch in text.loader(rows, 8, bucket=on)) for on in (True, False)}
    assert sizes[True] < sizes[False]
    plain = torch.cat([batch["labels"] for batch in text.loader(rows, 8, bucket=False)])
    assert plain.tolist() == toy_task().train.label


def test_calibration_draws_with_replacement_in_a_fixed_order(tokenizer):
    task = toy_task()
    batches = list(text.calibration_loader(task, tokenizer, rows=100, batch_size=32, seed=5, max_length=16))
    assert [len(batch["labels"]) for batch in batches] == [32, 32, 32, 4]
    again = text.calibration_loader(task, tokenizer, rows=100, batch_size=32, seed=5, max_length=16)
    assert _seen(again) == _seen(again) == _seen(batches)
    other = text.calibration_loader(task, tokenizer, rows=100, batch_size=32, seed=6, max_length=16)
    assert _seen(other) != _seen(batches)
    drawn = torch.randint(40, (100,), generator=torch.Generator().manual_seed(5))
    assert torch.cat([batch["labels"] for batch in batches]).tolist() == [task.train.label[i] for i in drawn]
    with pytest.raises(InvalidInput, match="rows=0"):
        text.calibration_loader(task, tokenizer, rows=0)


def test_encoding_refuses_what_cannot_work(tokenizer):
    with pytest.raises(InvalidInput, match="no room for text"):
        text.encode_split(toy_task(pairs=True).train, tokenizer, max_length=3)
    with pytest.raises(InvalidInput, match="batch size"):
        text.loader(text.encode_split(toy_task().dev, tokenizer, 8), batch_size=0)
