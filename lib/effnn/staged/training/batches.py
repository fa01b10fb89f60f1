"""Batches of a staged run: windows of a token array, chosen by the seed and the step alone.

So a checkpoint needs nothing about the data, and two runs that branch off from one state read the same batches. The
array may be memory-mapped; only the windows of a batch are read. A window may cross the border of two documents, and
nothing is padded.
"""

import hashlib

import torch
from torch import Tensor

from effnn.base import InvalidInput
from effnn.staged.training.token_arrays import Tokens, checked_tokens


class Batches:
    """The training batches: `batches(step)` gives token ids (batch_size, context + 1), int64, on the CPU.

    Every epoch has its own offset and order; its windows do not overlap in the `context` tokens that are predicted.
    Position i of a window predicts position i + 1, so a window has one token more than the context.

    tokens: 1-D, integers of any kind (token_arrays.py).
    batch_size: windows per batch.
    context: tokens predicted per window.
    vocabulary: number of token ids.
    seed: of offsets and order.

    Raises InvalidInput for an array of another kind or shorter than a window and, when a batch is read, for a token
    outside the vocabulary.
    """

    def __init__(self, tokens: object, batch_size: int, context: int, vocabulary: int, seed: int = 0) -> None:
        self.tokens = checked_tokens(tokens, context, "training")
        self.batch_size, self.context, self.vocabulary, self.seed = batch_size, context, vocabulary, seed
        # as many windows as fit behind the largest offset, so that all epochs are equally long
        self.offsets = min(context, len(self.tokens) - context)
        self.windows = (len(self.tokens) - self.offsets) // context
        self._epoch = (-1, torch.empty(0))

    def __call__(self, step: int) -> Tensor:
        first, parts, missing = step * self.batch_size, [], self.batch_size
        while missing:
            epoch, at = divmod(first, self.windows)
            parts.append(self._starts(epoch)[at : at + missing])
            missing -= len(parts[-1])
            first += len(parts[-1])
        return read_windows(self.tokens, torch.cat(parts), self.context, self.vocabulary)

    def _starts(self, epoch: int) -> Tensor:
        if self._epoch[0] != epoch:
            generator = torch.Generator().manual_seed(mixed_seed(self.seed, epoch))
            offset = torch.randint(self.offsets, (), generator=generator)
            order = torch.randperm(self.windows, generator=generator)
            self._epoch = (epoch, order * self.context + offset)
        return self._epoch[1]


def validation_windows(tokens: object, sequences: int, context: int, vocabulary: int) -> Tensor:
    """`sequences` windows spread evenly over the array, token ids (sequences, context + 1), int64.

    Always the same windows. A corpus is often in the order of its sources, so its first windows would stand for one
    source alone. Raises InvalidInput for fewer windows than asked for, and as `Batches` does.
    """
    tokens = checked_tokens(tokens, context, "validation")
    if (found := (len(tokens) - 1) // context) < sequences:
        raise InvalidInput(
            f"the validation tokens hold {found} windows of {context} tokens, evaluate_sequences asks for {sequences}: "
            "ask for fewer, or give more tokens"
        )
    return read_windows(tokens, torch.arange(sequences) * found // sequences * context, context, vocabulary)


def read_windows(tokens: Tokens, starts: Tensor, context: int, vocabulary: int) -> Tensor:
    """Windows of context + 1 tokens at `starts`, int64; InvalidInput for a token outside 0 .. vocabulary - 1."""
    windows = tokens[starts[:, None] + torch.arange(context + 1)].long()
    lowest, highest = windows.aminmax()
    if lowest < 0 or highest >= vocabulary:
        wrong = int(highest) if highest >= vocabulary else int(lowest)
        raise InvalidInput(
            f"the tokens hold the id {wrong}, the model's vocabulary goes from 0 to {vocabulary - 1}: they were made "
            "by another tokenizer, or the configuration's vocab_size is too small"
        )
    return windows


def mixed_seed(*numbers: int) -> int:
    """One seed from several numbers, such that (seed, epoch) and (seed, step, rank) give different ones."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:4], "big")
