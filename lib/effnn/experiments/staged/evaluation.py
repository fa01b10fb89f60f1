"""The end point of a run: its loss on the validation and test split, and on texts that it was not trained on.

The zero-shot evaluations follow Radford et al. 2019 and Shen et al. 2022: WikiText-103 by perplexity per token of our
own tokenizer, LAMBADA by the share of passages whose last word is the model's first choice, token by token. There is no
detokenizing and no stop-word filter, so numbers are comparable within one run, not with published ones.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GPT2LMHeadModel

from effnn.data import corpus
from effnn.data.corpus.coders import Coder
from effnn.staged.training.batches import validation_windows
from effnn.staged.training.step import token_loss


@torch.no_grad()
def mean_loss(model: GPT2LMHeadModel, windows: Tensor, rows: int) -> float:
    """Return the mean loss (nats per token) over windows (sequences, context + 1), `rows` at a time."""
    parts = windows.split(rows)
    total = math.fsum(float(token_loss(model, part.to(model.device), "sum")) for part in parts)
    return total / windows[:, 1:].numel()


def perplexity(model: GPT2LMHeadModel, ids: object, context: int, rows: int = 8) -> float:
    """Return exp of the mean loss over consecutive windows of `context` tokens, without tokens before the window."""
    count = (len(ids) - 1) // context
    return math.exp(mean_loss(model, validation_windows(ids, count, context, model.config.vocab_size), rows))


@torch.no_grad()
def last_words(model: GPT2LMHeadModel, examples: Sequence[corpus.LambadaExample], coder: Coder) -> dict[str, float]:
    """Return accuracy (share of last words guessed whole) and perplexity per word; long contexts lose their start."""
    longest, right, total = model.config.n_positions, 0, 0.0
    for example in examples:
        word = coder.encode(f" {example.word}")
        ids = torch.tensor((coder.encode(example.context) + word)[-longest - 1 :], device=model.device)
        logits = model(input_ids=ids[None, :-1]).logits[0, -len(word) :].float()
        right += bool((logits.argmax(-1) == ids[-len(word) :]).all())
        total += float(functional.cross_entropy(logits, ids[-len(word) :], reduction="sum"))
    return {"lambada_accuracy": right / len(examples), "lambada_perplexity": math.exp(total / len(examples))}


def zero_shot(model: GPT2LMHeadModel, coder: Coder, sources: dict[str, str], context: int) -> dict[str, float]:
    """Return the measures of the texts in `sources`: "wikitext-103" and "lambada", each "hub" or a path."""
    found = {}
    if "wikitext-103" in sources:
        text = corpus.load("wikitext-103", sources["wikitext-103"], coder)
        found["wikitext_perplexity"] = perplexity(model, text.test, context)
    if "lambada" in sources:
        found |= last_words(model, corpus.lambada_examples(sources["lambada"]), coder)
    return found
