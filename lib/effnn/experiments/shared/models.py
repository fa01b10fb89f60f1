"""The encoders that the notebooks train, from scratch or from pretrained weights: configuration and untrained model."""

import dataclasses
from dataclasses import dataclass

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from effnn.base import InvalidInput
from effnn.data.digits import ImageTask
from effnn.data.text.task import TextTask
from effnn.experiments.shared.pretrained import load_encoder
from effnn.experiments.shared.training import Recipe

_CLASSES = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert", "electra": "Electra", "vit": "ViT"}
FAMILIES = tuple(_CLASSES)
TEXT_FAMILIES = FAMILIES[:-1]


@dataclass(frozen=True)
class ClassifierConfig:
    """Shape and training of an encoder; `SST2`, `VIT` and `MINILM` are recipes for that task, images, that encoder.

    The defaults were chosen on the validation rows of the docstring task: three passes do better than two, twice the
    learning rate does not train, and dropout is neither better nor faster at 0. Attention dropout is off because it
    keeps torch from its fused attention.

    family: one of `FAMILIES`; "vit" takes images, the others take texts.
    checkpoint: folder or hub id of a model that was fine-tuned on the task; it is taken as it is, nothing is trained.
    start: a pretrained encoder to start from, see pretrained.py; its shape and tokenizer are used, the four sizes and
        `vocab` below are not. Empty: from scratch.
    layers, hidden, heads, ffn: encoder layers, hidden size, attention heads and filters per layer.
    vocab, max_length: entries of the tokenizer, and tokens per row, at most (texts only).
    dropout: of the hidden states.
    epochs, batch_size, learning_rate, warmup, weight_decay, seed: as in `Recipe`; the seed is of the weights, too.
    threads: torch threads of the training.
    """

    family: str = "bert"
    checkpoint: str = ""
    start: str = ""
    layers: int = 4
    hidden: int = 128
    heads: int = 4
    ffn: int = 512
    vocab: int = 4096
    max_length: int = 48
    dropout: float = 0.1
    epochs: int = 3
    batch_size: int = 32
    learning_rate: float = 1e-3
    warmup: float = 0.1
    weight_decay: float = 0.01
    seed: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise InvalidInput(f"unknown family {self.family!r}: choose one of {', '.join(FAMILIES)}")
        if self.start and (self.checkpoint or self.family != "bert"):
            raise InvalidInput(
                f"start={self.start!r} brings its own architecture: leave checkpoint empty and family as it is (bert)"
            )
        if self.hidden % self.heads:
            raise InvalidInput(f"hidden={self.hidden} cannot be divided among heads={self.heads}")
        self.recipe()

    def recipe(self) -> Recipe:
        """The part that says how to train."""
        return Recipe(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Recipe)})


# SST-2's rows are many and short: fewer passes, and the longer batches that short rows leave room for.
SST2 = ClassifierConfig(max_length=64, epochs=2, batch_size=64)
# Chosen on the validation rows of the movie sentences (seed 0).
MINILM = ClassifierConfig(start="minilm", max_length=64, epochs=1, learning_rate=2e-4)
VIT = ClassifierConfig(family="vit", hidden=64, ffn=256, epochs=30, weight_decay=0.05)


def build_model(
    task: TextTask | ImageTask, config: ClassifierConfig, tokenizer: PreTrainedTokenizerBase | None = None
) -> PreTrainedModel:
    """A classifier before its training: of `config.family` with weights drawn under `config.seed`, or `config.start`.

    tokenizer: of the texts; none for images. Raises InvalidInput for a family that does not take the task's rows.
    """
    if (config.family == "vit") != isinstance(task, ImageTask):
        raise InvalidInput(f"{config.family} does not take the rows of {task.name}: vit takes images, the others texts")
    if config.start:
        return load_encoder(task, config.start, config.seed, config.dropout)
    shape = _image_shape(task, config) if config.family == "vit" else _text_shape(task, config, tokenizer)
    names = {
        "hidden_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.ffn,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": 0.0,
    }
    if config.family == "distilbert":  # it has names of its own
        own = ("dim", "n_layers", "n_heads", "hidden_dim", "dropout", "attention_dropout")
        names = dict(zip(own, names.values(), strict=True)) | {"seq_classif_dropout": config.dropout}
    prefix = _CLASSES[config.family]
    kind = "ImageClassification" if config.family == "vit" else "SequenceClassification"
    model_config = getattr(transformers, f"{prefix}Config")(num_labels=task.num_labels, **shape, **names)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        return getattr(transformers, f"{prefix}For{kind}")(model_config)


def _text_shape(task: TextTask, config: ClassifierConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    shape = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "max_position_embeddings": config.max_length + 2,  # RoBERTa counts positions from its padding id + 1
    }
    if task.labels:
        shape["id2label"] = dict(enumerate(task.labels))
        shape["label2id"] = {name: i for i, name in enumerate(task.labels)}
    if config.family != "distilbert":  # it has no token types
        shape["type_vocab_size"] = 2
    if config.family == "electra":
        shape["embedding_size"] = config.hidden
    return shape


def _image_shape(task: ImageTask, config: ClassifierConfig) -> dict[str, object]:
    _, channels, side, _ = task.train.pixels.shape
    return {"image_size": side, "patch_size": 2, "num_channels": channels}
