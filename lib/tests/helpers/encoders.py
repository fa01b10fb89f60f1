"""Tiny random encoders and batches for the tests of effnn.ltp: one builder per family, deterministic, no network.

Weights are drawn wider than a fresh checkpoint's (biases and normalisations too), so that pruning anything changes the
logits visibly. Batches hold padding, an odd length and labels. Not trained: nothing here says anything of accuracy.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from effnn.ltp.pruning.masks import Masks

LAYERS, HEADS, HIDDEN, FILTERS = 3, 4, 32, 48
VOCABULARY, LABELS = 60, 3
LENGTHS = (13, 9, 5, 12, 2)
"""Live tokens of each row of a text batch; the rest is padding."""

Batch = dict[str, Tensor]
Builder = Callable[[], tuple[PreTrainedModel, Batch]]

TEXT = ("bert", "roberta", "distilbert", "electra")
SIBLINGS = ("xlm-roberta", "camembert")
"""Text families that are built like RoBERTa; not in FAMILIES, to keep tests short."""

_HEADS = {
    "classification": modeling_auto.AutoModelForSequenceClassification,
    "qa": modeling_auto.AutoModelForQuestionAnswering,
    "tokens": modeling_auto.AutoModelForTokenClassification,
    "mlm": modeling_auto.AutoModelForMaskedLM,
    "images": modeling_auto.AutoModelForImageClassification,
    "base": modeling_auto.AutoModel,
}


def build(
    model_type: str, task: str = "classification", seed: int = 0, attention: str = "sdpa", **sizes: int
) -> tuple[PreTrainedModel, Batch]:
    """A tiny model of `model_type` with a head for `task`, in eval mode, and a batch with labels for it.

    task: classification, qa, tokens, mlm, images or base. sizes: num_hidden_layers and the like, to override ours.
    """
    config = _config(model_type, **{"num_labels": 2 if task == "qa" else LABELS} | sizes)
    model = _HEADS[task].from_config(config, attn_implementation=attention)
    randomise(model, seed)
    return model.eval(), _batch(model_type, task, config, seed)


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Draw every parameter anew: matrices with a std of 0.2, biases 0.1, normalisation gains around 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            gain = parameter.ndim == 1 and name.lower().endswith("weight")
            parameter.copy_(1 + 0.1 * noise if gain else (0.2 if parameter.ndim > 1 else 0.1) * noise)


def _config(model_type: str, **sizes: int):
    config = AutoConfig.for_model(model_type)
    shared = {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "hidden_size": HIDDEN}
    if model_type == "distilbert":
        own = {
            "hidden_dim": FILTERS,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 40,
            "seq_classif_dropout": 0.0,
        }
    elif model_type == "vit":
        own = {"intermediate_size": FILTERS, "image_size": 12, "patch_size": 4}
    else:
        own = {"intermediate_size": FILTERS, "vocab_size": VOCABULARY, "max_position_embeddings": 40}
    if model_type == "electra":
        own["embedding_size"] = 16
    # set through for_model, so that aliases (DistilBERT's dim, n_heads) and derived fields are worked out once
    return type(config)(**shared | own | sizes)


def _batch(model_type: str, task: str, config, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed + 1)

    def integers(high: int, *shape: int, low: int = 0) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    rows, length = len(LENGTHS), max(LENGTHS)
    if model_type == "vit":
        batch = {"pixel_values": torch.randn(rows, 3, config.image_size, config.image_size, generator=generator)}
    else:
        live = torch.arange(length) < torch.tensor(LENGTHS).unsqueeze(1)
        ids = integers(VOCABULARY, rows, length, low=5).masked_fill(~live, config.pad_token_id)
        batch = {"input_ids": ids, "attention_mask": live.long()}
        if model_type in ("bert", "electra"):
            batch["token_type_ids"] = (torch.arange(length) > 3).long().expand(rows, -1) * live
    if task in ("classification", "images"):
        batch["labels"] = integers(LABELS, rows)
    elif task == "qa":
        batch["start_positions"] = torch.tensor([min(1, n - 1) for n in LENGTHS])
        batch["end_positions"] = torch.tensor([n - 1 for n in LENGTHS])
    elif task in ("tokens", "mlm"):
        labels = integers(LABELS if task == "tokens" else VOCABULARY, rows, length)
        batch["labels"] = labels.masked_fill(batch["attention_mask"] == 0, -100)
    return batch


def _builder(model_type: str, task: str) -> Builder:
    return lambda **options: build(model_type, task, **options)


FAMILIES: dict[str, Builder] = {name: _builder(name, "classification") for name in TEXT}
FAMILIES["vit"] = _builder("vit", "images")
"""Classification: model type -> a function that builds (model, batch)."""

QA_FAMILIES: dict[str, Builder] = {name: _builder(name, "qa") for name in TEXT}
"""Extractive question answering: model type -> a function that builds (model, batch)."""


def logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Everything that the head puts out for `batch` as one tensor: start and end logits are stacked."""
    with torch.no_grad():
        output = model(**batch)
    if "start_logits" in output:
        return torch.stack([output.start_logits, output.end_logits])
    return output.logits if "logits" in output else output.last_hidden_state


def tuned_masks(kind: str = "uneven") -> Masks:
    """Uneven structure and scales as tuning leaves them: not 0 and 1, some negative. kind: what layer 1 lacks."""
    generator = torch.Generator().manual_seed(7)
    heads = torch.tensor([[1.2, 0, 0.7, -0.4], [0, 0, 1.5, 0], [0.9, 1.1, 1.0, 1.3]])
    filters = 0.5 + torch.rand(LAYERS, FILTERS, generator=generator)
    filters[:, ::5] *= -1
    filters[torch.rand(LAYERS, FILTERS, generator=generator) > torch.tensor([[0.3], [0.9], [0.6]])] = 0
    if kind in ("no heads", "neither"):
        heads[1] = 0
    if kind in ("no filters", "neither"):
        filters[1] = 0
    return Masks(heads * 0, filters * 0) if kind == "all empty" else Masks(heads, filters)


def difference(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference."""
    return (a - b).abs().max().item()


def rows_of(batch, copies, seed=0):
    """More rows like those of the batch: tokens shuffled within the vocabulary, same padding."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(copies):
        new = dict(batch)
        if "input_ids" in batch:
            drawn = torch.randint(5, 60, batch["input_ids"].shape, generator=generator)
            new["input_ids"] = torch.where(batch["attention_mask"].bool(), drawn, batch["input_ids"])
        else:
            new["pixel_values"] = torch.randn(batch["pixel_values"].shape, generator=generator)
        made.append(new)
    return made
