"""From a text task to batches of token ids: tokenized splits, padded batches, and the calibration draw of the pruner.

Batches are padded to their own longest row, and rows of similar length share a batch, since a padding token costs as
much as a real one. Order depends on the seed and the epoch alone. No model is known here.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from effnn.base import InvalidInput
from effnn.data.text.task import Split, TextTask

BUCKET = 50  # batches that are sorted by length together: long enough to be even, short enough to stay shuffled


class EncodedSplit(Dataset):
    """Tokenized rows: item i is a dict of tensors `input_ids` (S,), for pairs `token_type_ids` (S,), and `labels` ().

    Nothing is padded; S is each row's own length in tokens, special tokens included.
    """

    def __init__(self, rows: list[dict[str, torch.Tensor]], pad_token_id: int):
        self.rows, self.pad_token_id = rows, pad_token_id
        self.lengths = [len(row["input_ids"]) for row in rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.rows[index]

    def batches(self, size: int, *, shuffle: bool = False, seed: int = 0, epoch: int = 0) -> DataLoader:
        """The batches of `loader`, rows of similar length together."""
        return loader(self, size, shuffle=shuffle, seed=seed, epoch=epoch)


def encode_split(split: Split, tokenizer: PreTrainedTokenizerBase, max_length: int = 128) -> EncodedSplit:
    """Tokenize one split, cut to `max_length` tokens per row (of a pair, the longer text is cut first).

    Raises InvalidInput for a tokenizer without padding or a length without room for text."""
    if tokenizer.pad_token_id is None:
        raise InvalidInput("the tokenizer has no padding token: set tokenizer.pad_token, e.g. to its eos_token")
    pairs = split.texts_b is not None
    room = tokenizer.num_special_tokens_to_add(pair=pairs)
    if max_length <= room:
        raise InvalidInput(f"max_length={max_length} leaves no room for text: special tokens alone need {room}")
    columns = tokenizer(split.texts, split.texts_b, truncation=True, max_length=max_length, return_attention_mask=False)
    dtype = torch.float32 if any(isinstance(label, float) for label in split.label) else torch.long
    names = ["input_ids", "token_type_ids"] if pairs and "token_type_ids" in columns else ["input_ids"]
    rows = [
        {name: torch.tensor(columns[name][i]) for name in names} | {"labels": torch.tensor(label, dtype=dtype)}
        for i, label in enumerate(split.label)
    ]
    return EncodedSplit(rows, tokenizer.pad_token_id)


def loader(
    rows: EncodedSplit,
    batch_size: int = 32,
    *,
    shuffle: bool = False,
    bucket: bool = True,
    seed: int = 0,
    epoch: int = 0,
) -> DataLoader:
    """Batches `dict(input_ids (B, S), attention_mask (B, S), labels (B,))`, S the longest row of the batch.

    rows: tokenized rows; for pairs a batch holds `token_type_ids` (B, S) too.
    batch_size: rows per batch; the last one may hold fewer.
    shuffle: a new order for every (seed, epoch), the same on every run; make a new loader for each epoch.
    bucket: rows of similar length share a batch. Without `shuffle` this sorts all rows by length; switch it off to keep
        the order of the split.
    seed, epoch: of the order.
    """
    if batch_size < 1 or not len(rows):
        raise InvalidInput(f"a loader needs rows and a batch size of at least 1, got {len(rows)} rows, {batch_size}")
    batches = _Batches(rows.lengths, batch_size, shuffle, bucket, seed, epoch)
    pad = partial(pad_batch, pad_token_id=rows.pad_token_id)
    # A generator of its own: by default each pass over a DataLoader draws a number from the caller's.
    return DataLoader(rows, batch_sampler=batches, collate_fn=pad, generator=torch.Generator())


def calibration_loader(
    task: TextTask,
    tokenizer: PreTrainedTokenizerBase,
    rows: int = 2048,
    batch_size: int = 32,
    seed: int = 0,
    max_length: int = 128,
) -> DataLoader:
    """Batches of `rows` training rows drawn with replacement, in the order of the draw, the same on every pass.

    task, tokenizer: whose training rows are taken, and what encodes them.
    rows, batch_size: rows in all, and per batch.
    seed: of the draw.
    max_length: tokens per row at most.

    Source: post-training pruning draws its calibration rows this way (Kwon et al. 2022; 2048 rows, batches of 32).
    """
    if rows < 1:
        raise InvalidInput(f"rows={rows}: calibration needs at least one row")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(task.train), (rows,), generator=generator).tolist()
    return loader(encode_split(task.train.take(drawn), tokenizer, max_length), batch_size, bucket=False)


def pad_batch(rows: list[dict[str, torch.Tensor]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """One batch from rows of unequal length: padding at the end, `attention_mask` 1 on real tokens.

    Columns of single numbers (labels, places of an answer) are stacked.
    """
    batch = {
        name: torch.stack([row[name] for row in rows])
        if rows[0][name].dim() == 0
        else pad_sequence([row[name] for row in rows], True, pad_token_id if name == "input_ids" else 0)
        for name in rows[0]
    }
    batch["attention_mask"] = pad_sequence([torch.ones_like(row["input_ids"]) for row in rows], True)
    return batch


class _Batches(Sampler[list[int]]):
    """Row numbers of each batch; see `loader` for what the arguments mean."""

    def __init__(self, lengths: list[int], batch_size: int, shuffle: bool, bucket: bool, seed: int, epoch: int):
        self.lengths, self.batch_size = lengths, batch_size
        self.shuffle, self.bucket, self.seed, self.epoch = shuffle, bucket, seed, epoch

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        # A plain sum of seed and epoch would give seed 0 epoch 1 the order of seed 1 epoch 0.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        count = len(self.lengths)
        order = torch.randperm(count, generator=generator).tolist() if self.shuffle else list(range(count))
        if self.bucket:
            window = self.batch_size * BUCKET if self.shuffle else count
            order = [
                row
                for i in range(0, count, window)
                for row in sorted(order[i : i + window], key=self.lengths.__getitem__)
            ]
        batches = [order[i : i + self.batch_size] for i in range(0, count, self.batch_size)]
        if self.shuffle and self.bucket:
            batches = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        yield from batches
