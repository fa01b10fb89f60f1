"""A GPT-2 small enough to be trained in a second, for what notebook 03 shows at the moment of growth.

The training loop is a plain one, since the experiments look at single steps. Runs of stages use `effnn.staged`.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.optim import AdamW
from transformers import GPT2Config, GPT2LMHeadModel

from effnn.base import InvalidInput

HELD_OUT = 32
"""Sequences of the evaluation batch: the last tokens, which are never trained on."""
_READ = 1_000_000  # tokens taken of a larger corpus, more than such a model trains on


@dataclass(frozen=True)
class ToyModel:
    """The model and how it is trained: AdamW, betas (0.9, 0.98), eps 1e-6, constant rate, no decay, no dropout.

    layers, width, heads, context, n_inner, tied: of the GPT-2.
    batch: sequences per step.
    steps, learning_rate: of training.
    """

    layers: int = 2
    width: int = 24
    heads: int = 3
    context: int = 32
    n_inner: int | None = None
    tied: bool = True
    batch: int = 8
    steps: int = 150
    learning_rate: float = 3e-3


def synthetic_tokens(length: int = 20_000, vocabulary: int = 64, seed: int = 0) -> Tensor:
    """Return token ids (length,) of a random Markov chain in which each token has four likely successors."""
    generator = torch.Generator().manual_seed(seed)
    successors = torch.randint(0, vocabulary, (vocabulary, 4), generator=generator).tolist()
    choices = torch.multinomial(torch.tensor([0.6, 0.25, 0.1, 0.05]), length, True, generator=generator).tolist()
    ids = [0]
    for choice in choices[1:]:
        ids.append(successors[ids[-1]][choice])
    return torch.tensor(ids)


def train_toy_model(
    toy: ToyModel, tokens: Sequence[int] | Tensor, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[GPT2LMHeadModel, AdamW]:
    """Return a GPT-2 after `toy.steps` steps on `tokens`, and its AdamW.

    tokens: 1-D ids, of which the last are held out; the vocabulary is the largest of them plus 1. Raises InvalidInput
    where they are too few for a batch and the held-out sequences.
    """
    tokens = checked_tokens(tokens, toy)
    config = GPT2Config(
        vocab_size=int(tokens.max()) + 1, n_positions=toy.context, n_layer=toy.layers, n_embd=toy.width,
        n_head=toy.heads, n_inner=toy.n_inner, tie_word_embeddings=toy.tied, embd_pdrop=0.0, attn_pdrop=0.0,
        resid_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config).to(dtype)
    optimizer = AdamW(model.parameters(), toy.learning_rate, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0)
    train(model, optimizer, batches(tokens, toy, seed, toy.steps))
    return model, optimizer


def checked_tokens(tokens: Sequence[int] | Tensor, toy: ToyModel) -> Tensor:
    """The first million of 1-D token ids as int64. InvalidInput where they are not ids, or too few for `held_out`."""
    found = np.asarray(tokens[:_READ])
    least = (HELD_OUT + toy.batch) * toy.context
    if found.ndim != 1 or found.dtype.kind not in "iu" or len(found) < least or int(found.min()) < 0:
        raise InvalidInput(
            f"expected at least {least} token ids of 0 or more in one dimension ({HELD_OUT} + {toy.batch} sequences "
            f"of {toy.context}); got {found.dtype} of shape {found.shape}: give a longer text, or a shorter context"
        )
    return torch.from_numpy(found.astype(np.int64))


def held_out(tokens: Sequence[int] | Tensor, toy: ToyModel) -> Tensor:
    """The evaluation batch (HELD_OUT, context)."""
    return checked_tokens(tokens, toy)[-HELD_OUT * toy.context :].view(HELD_OUT, toy.context)


def batches(tokens: Tensor, toy: ToyModel, seed: int, steps: int, first: int = 0) -> Iterator[Tensor]:
    """`steps` batches (batch, context) at random places, each drawn from the seed and its own step's number."""
    windows = tokens[: -HELD_OUT * toy.context].unfold(0, toy.context, 1)
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        yield windows[torch.randint(len(windows), (toy.batch,), generator=generator)]


def loss(model: GPT2LMHeadModel, batch: Tensor) -> Tensor:
    """Mean cross-entropy in the model's own precision (transformers casts logits to float32 in its loss)."""
    logits = model(input_ids=batch).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def train(model: GPT2LMHeadModel, optimizer: AdamW, source: Iterable[Tensor], steps: int | None = None) -> None:
    """One step for each of the next `steps` batches; None for all that are left."""
    for batch in islice(source, steps):
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
