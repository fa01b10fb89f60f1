"""Small encoders trained from scratch: the starting checkpoints that the notebooks prune, and the retraining baseline.

`train_classifier` gives a fine-tuned model in the sense of the papers (it was trained on its task), in a minute or two
on one core. A finished model is cached; an unfinished one goes on from its last whole epoch. No pretraining is done.
"""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import joblib
import torch
import transformers
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from effnn import cache
from effnn.base import InvalidInput, NotAvailable, atomic_path, threads
from effnn.data.text import fingerprint, tokenizer_for
from effnn.data.text.encoding import EncodedTask, encode, encode_split, loader
from effnn.data.text.task import TextTask
from effnn.experiments.shared.pool import cores, run_jobs
from effnn.experiments.shared.training import EVALUATION_BATCH, Accuracy, Progress, Recipe, evaluate, fit

__all__ = [
    "Accuracy",
    "SST2",
    "ClassifierConfig",
    "FineTuned",
    "TrainedClassifier",
    "build_model",
    "evaluate",
    "fine_tune",
    "train_classifier",
    "train_classifiers",
]

log = logging.getLogger(__name__)
FAMILIES = ("bert", "roberta", "distilbert", "electra")


@dataclass(frozen=True)
class ClassifierConfig:
    """Shape and training of a small encoder; `SST2` is the recipe for that task.

    The defaults were chosen on the validation rows of the docstring task: three passes do better than two, twice the
    learning rate does not train, and dropout is neither better nor faster at 0. Attention dropout is off because it
    keeps torch from its fused attention. checkpoint: folder or hub id of a model that was fine-tuned on the task; it is
    taken as it is, and nothing is trained.
    """

    family: str = "bert"
    checkpoint: str = ""
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
        if self.hidden % self.heads:
            raise InvalidInput(f"hidden={self.hidden} cannot be divided among heads={self.heads}")
        self.recipe()

    def recipe(self) -> Recipe:
        """The part that says how to train."""
        return Recipe(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Recipe)})


# SST-2's rows are many and short: fewer passes, and the longer batches that short rows leave room for.
SST2 = ClassifierConfig(max_length=64, epochs=2, batch_size=64)


@dataclass(frozen=True)
class TrainedClassifier:
    """A trained model (eval mode, CPU) with its tokenizer.

    accuracy_curve: accuracy on validation after each epoch. dev: loss and accuracy on dev, read once, after the last
    epoch. seconds: wall time of the training steps, on the machine and on the day the model was trained.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    config: ClassifierConfig
    accuracy_curve: tuple[float, ...]
    dev: Accuracy
    seconds: float

    @property
    def accuracy(self) -> float:
        """Accuracy on dev (Spearman's correlation for a regression task)."""
        return self.dev.accuracy


@dataclass(frozen=True)
class FineTuned:
    """The model that was given, now trained; accuracy on validation after each epoch; wall seconds of the steps."""

    model: nn.Module
    accuracy_curve: tuple[float, ...]
    seconds: float


def train_classifier(task: TextTask, config: ClassifierConfig | None = None, device: str = "cpu") -> TrainedClassifier:
    """Train a classifier of `task` from scratch, or take it from the cache.

    Equal task, configuration and versions give equal weights (on a CPU with one thread). Killed and started again, the
    training goes on from the last epoch that was finished.
    """
    config = config or ClassifierConfig()
    if config.checkpoint:
        return _load_checkpoint(task, config, device)
    tokenizer = _tokenizer(task, config)
    key = _key(task, config, tokenizer, device)
    partial = cache.entry("classifier", key, _train).with_suffix(".partial.pt")
    value = cache.remember("classifier", key, lambda: _train(task, config, tokenizer, device, partial))
    model = build_model(task, config, tokenizer)
    model.load_state_dict(value["state"])
    curve = tuple(accuracy.accuracy for accuracy in value["curve"])
    return TrainedClassifier(model.eval(), tokenizer, config, curve, value["dev"], value["seconds"])


def train_classifiers(
    task: TextTask, configs: Sequence[ClassifierConfig], workers: int | None = None, device: str = "cpu"
) -> list[TrainedClassifier]:
    """Train several classifiers side by side in processes of `config.threads` threads each, in the given order.

    workers: processes at a time; None: as many as the cores hold, and one more where their number would leave a core
    without work at the end (three trainings on two cores share them). Those in the cache start no process. On another
    device than the CPU they are trained one after the other, here.
    """
    missing = [config for config in configs if device == "cpu" and not _is_cached(task, config)]
    if missing:
        count = max(config.threads for config in missing)
        fit = max(1, cores() // count)
        run_jobs(
            _train_and_cache, [(task, c) for c in missing], "training", workers or fit + (len(missing) % fit > 0), count
        )
    return [train_classifier(task, config, device) for config in configs]


def fine_tune(
    model: nn.Module,
    rows: EncodedTask,
    *,
    epochs: int = 1,
    learning_rate: float = 3e-4,
    batch_size: int = 32,
    warmup: float = 0.1,
    weight_decay: float = 0.01,
    seed: int = 0,
    between_epochs: Callable[[], object] | None = None,
) -> FineTuned:
    """Train a given model, for example a pruned one, for some more epochs: all its weights, in place.

    between_epochs: called after every epoch but the last; its time does not count, and what it draws from torch's
    generator does not change the training.

    This is the retraining that post-training pruning is compared with. Hooks on the model (masks) stay in force, and
    torch's own number of threads holds (see `effnn.base.threads`).
    """
    recipe = Recipe(epochs, batch_size, learning_rate, warmup, weight_decay, seed)

    def pause(_: Progress) -> None:
        with torch.random.fork_rng():
            between_epochs()

    after = pause if between_epochs else None
    end = fit(model, rows.train, rows.validation, recipe, after_epoch=after, label="fine-tuning")
    return FineTuned(model, tuple(accuracy.accuracy for accuracy in end.curve), end.seconds)


def build_model(task: TextTask, config: ClassifierConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """An untrained sequence classifier of `config.family`, its weights drawn under `config.seed`."""
    common = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "max_position_embeddings": config.max_length + 2,  # RoBERTa counts positions from its padding id + 1
        "num_labels": task.num_labels,
    }
    if task.labels:
        common["id2label"] = dict(enumerate(task.labels))
        common["label2id"] = {name: i for i, name in enumerate(task.labels)}
    if config.family == "distilbert":
        shape = {
            "dim": config.hidden,
            "n_layers": config.layers,
            "n_heads": config.heads,
            "hidden_dim": config.ffn,
            "dropout": config.dropout,
            "attention_dropout": 0.0,
            "seq_classif_dropout": config.dropout,
        }
    else:
        shape = {
            "hidden_size": config.hidden,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            "intermediate_size": config.ffn,
            "hidden_dropout_prob": config.dropout,
            "attention_probs_dropout_prob": 0.0,
            "type_vocab_size": 2,
        }
    if config.family == "electra":
        shape["embedding_size"] = config.hidden
    prefix = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert", "electra": "Electra"}[config.family]
    model_config = getattr(transformers, f"{prefix}Config")(**common, **shape)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        return getattr(transformers, f"{prefix}ForSequenceClassification")(model_config)


def _tokenizer(task: TextTask, config: ClassifierConfig) -> PreTrainedTokenizerBase:
    tokenizer = tokenizer_for(task, config.vocab)
    if config.family == "distilbert":  # it has no token types
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return tokenizer


def _key(
    task: TextTask, config: ClassifierConfig, tokenizer: PreTrainedTokenizerBase, device: str
) -> dict[str, object]:
    """What a training depends on besides its code."""
    return {
        "data": task.fingerprint,
        "tokenizer": fingerprint(tokenizer),
        "config": dataclasses.asdict(config),
        "device": device,
    }


def _train(task: TextTask, config: ClassifierConfig, tokenizer: PreTrainedTokenizerBase, device: str, partial: Path):
    rows = encode(task, tokenizer, config.max_length)
    model = build_model(task, config, tokenizer).to(device)
    progress = _read(partial)
    if progress is not None:
        log.info("going on after epoch %d of %d", progress.epoch, config.epochs)
    with threads(config.threads):
        label = f"{task.name} {config.family} seed {config.seed}"
        save = lambda state: _write(partial, state)  # noqa: E731
        end = fit(model, rows.train, rows.validation, config.recipe(), progress=progress, after_epoch=save, label=label)
        dev = evaluate(model, loader(rows.dev, EVALUATION_BATCH))
    partial.unlink(missing_ok=True)
    state = {name: value.cpu() for name, value in model.state_dict().items()}
    return {"state": state, "curve": end.curve, "dev": dev, "seconds": end.seconds}


def _load_checkpoint(task: TextTask, config: ClassifierConfig, device: str) -> TrainedClassifier:
    try:
        model = AutoModelForSequenceClassification.from_pretrained(config.checkpoint).to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(config.checkpoint)
    except (OSError, ValueError) as error:
        raise NotAvailable(
            f"the checkpoint {config.checkpoint!r} cannot be had ({error}): give the folder of a saved model and its "
            "tokenizer, or leave it empty to train a small model here"
        ) from error
    if model.config.num_labels != task.num_labels:
        raise InvalidInput(
            f"{config.checkpoint} has {model.config.num_labels} outputs, {task.name} has {task.num_labels}: "
            "was it fine-tuned on this task?"
        )
    dev = evaluate(model, loader(encode_split(task.dev, tokenizer, config.max_length), EVALUATION_BATCH))
    return TrainedClassifier(model, tokenizer, config, (), dev, 0.0)


def _write(path: Path, progress: Progress) -> None:
    with atomic_path(path) as temporary:
        joblib.dump(progress, temporary, compress=("zlib", 1))


def _read(path: Path) -> Progress | None:
    if not path.exists():
        return None
    try:
        return joblib.load(path)
    except Exception as error:
        log.warning("%s is damaged (%s); training starts again", path, type(error).__name__)
        return None


def _is_cached(task: TextTask, config: ClassifierConfig) -> bool:
    key = _key(task, config, _tokenizer(task, config), "cpu")
    return bool(config.checkpoint) or cache.entry("classifier", key, _train).exists()


def _train_and_cache(task: TextTask, config: ClassifierConfig) -> None:
    train_classifier(task, config)
