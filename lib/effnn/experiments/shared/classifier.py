"""Encoders trained on a task, from scratch or from pretrained weights: the starting checkpoints of the notebooks.

`train_classifier` gives a fine-tuned model in the sense of the papers (it was trained on its task), in minutes on one
core. A finished model is cached; an unfinished one goes on from its last whole epoch. No pretraining is done.
"""

import dataclasses
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import joblib
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from effnn import cache
from effnn.base import InvalidInput, NotAvailable, atomic_path, first_line, threads
from effnn.data.digits import Images, ImageTask
from effnn.data.text import calibration_loader, fingerprint, tokenizer_for
from effnn.data.text.encoding import encode_split
from effnn.data.text.task import Split, TextTask
from effnn.experiments.shared.models import ClassifierConfig, build_model
from effnn.experiments.shared.pool import cores, run_jobs
from effnn.experiments.shared.pretrained import load_tokenizer, locate
from effnn.experiments.shared.training import EVALUATION_BATCH, Accuracy, Progress, Rows, evaluate, fit

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainedClassifier:
    """A trained classifier of texts or images.

    model: in eval mode, on the CPU.
    tokenizer: of the texts; None for images.
    config: what it was made from.
    accuracy_curve: accuracy on validation after each epoch.
    dev: loss and accuracy on dev, read once, after the last epoch.
    seconds: wall time of the training steps, on the machine and on the day the model was trained.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    config: ClassifierConfig
    accuracy_curve: tuple[float, ...]
    dev: Accuracy
    seconds: float

    @property
    def accuracy(self) -> float:
        """Accuracy on dev (Spearman's correlation for a regression task)."""
        return self.dev.accuracy

    def encode(self, split: Split | Images) -> Rows:
        """The rows of a split as the model takes them."""
        return _encode(split, self.tokenizer, self.config)

    def calibration(
        self, task: TextTask | ImageTask, rows: int, batch: int, seed: int
    ) -> Iterable[dict[str, torch.Tensor]]:
        """Batches of `rows` training rows drawn with replacement under `seed`, in the order of the draw."""
        if self.tokenizer is None:
            drawn = torch.randint(len(task.train), (rows,), generator=torch.Generator().manual_seed(seed))
            return task.train.take(drawn).batches(batch)
        return calibration_loader(task, self.tokenizer, rows, batch, seed, self.config.max_length)


def train_classifier(
    task: TextTask | ImageTask, config: ClassifierConfig | None = None, device: str = "cpu"
) -> TrainedClassifier:
    """Train a classifier of `task`, or take it from the cache.

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
    task: TextTask | ImageTask, configs: Sequence[ClassifierConfig], workers: int | None = None, device: str = "cpu"
) -> list[TrainedClassifier]:
    """Train several classifiers side by side in processes of `config.threads` threads each, in the given order.

    workers: processes at a time; None: as many as the cores hold, and one more where their number would leave a core
    without work at the end (three trainings on two cores share them). Those in the cache start no process. On another
    device than the CPU they are trained one after the other, here.
    """
    missing = [config for config in configs if device == "cpu" and not _is_cached(task, config)]
    if missing:
        count = max(config.threads for config in missing)
        at_once = max(1, cores() // count)
        workers = workers or at_once + (len(missing) % at_once > 0)
        run_jobs(_train_and_cache, [(task, config) for config in missing], "training", workers, count)
    return [train_classifier(task, config, device) for config in configs]


def _tokenizer(task: TextTask | ImageTask, config: ClassifierConfig) -> PreTrainedTokenizerBase | None:
    if isinstance(task, ImageTask):
        return None
    if config.start:
        return load_tokenizer(config.start)
    tokenizer = tokenizer_for(task, config.vocab)
    if config.family == "distilbert":  # it has no token types
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return tokenizer


def _encode(split: Split | Images, tokenizer: PreTrainedTokenizerBase | None, config: ClassifierConfig) -> Rows:
    return split if isinstance(split, Images) else encode_split(split, tokenizer, config.max_length)


def _key(
    task: TextTask | ImageTask, config: ClassifierConfig, tokenizer: PreTrainedTokenizerBase | None, device: str
) -> dict[str, object]:
    """What a training depends on besides its code."""
    return {
        "data": task.fingerprint,
        "tokenizer": tokenizer and fingerprint(tokenizer),
        "config": dataclasses.asdict(config),
        "device": device,
        "start": locate(config.start).digest if config.start else None,
    }


def _train(
    task: TextTask | ImageTask,
    config: ClassifierConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    device: str,
    partial: Path,
) -> dict[str, object]:
    model = build_model(task, config, tokenizer).to(device)
    rows, validation, dev = (_encode(split, tokenizer, config) for split in (task.train, task.validation, task.dev))
    progress = _read(partial)
    if progress is not None:
        log.info("going on after epoch %d of %d", progress.epoch, config.epochs)
    with threads(config.threads):
        label = f"{task.name} {config.family} seed {config.seed}"
        save = lambda state: _write(partial, state)  # noqa: E731
        end = fit(model, rows, validation, config.recipe(), progress=progress, after_epoch=save, label=label)
        found = evaluate(model, dev.batches(EVALUATION_BATCH))
    partial.unlink(missing_ok=True)
    state = {name: value.cpu() for name, value in model.state_dict().items()}
    return {"state": state, "curve": end.curve, "dev": found, "seconds": end.seconds}


def _load_checkpoint(task: TextTask | ImageTask, config: ClassifierConfig, device: str) -> TrainedClassifier:
    try:
        model = AutoModelForSequenceClassification.from_pretrained(config.checkpoint).to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(config.checkpoint)
    except (OSError, ValueError) as error:
        raise NotAvailable(
            f"the checkpoint {config.checkpoint!r} is not available ({first_line(error)}): give the folder of a saved "
            "model and its tokenizer, or leave it empty to train a small model here"
        ) from error
    if model.config.num_labels != task.num_labels:
        raise InvalidInput(
            f"{config.checkpoint} has {model.config.num_labels} outputs, {task.name} has {task.num_labels}: "
            "was it fine-tuned on this task?"
        )
    dev = evaluate(model, _encode(task.dev, tokenizer, config).batches(EVALUATION_BATCH))
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


def _is_cached(task: TextTask | ImageTask, config: ClassifierConfig) -> bool:
    key = _key(task, config, _tokenizer(task, config), "cpu")
    return bool(config.checkpoint) or cache.entry("classifier", key, _train).exists()


def _train_and_cache(task: TextTask | ImageTask, config: ClassifierConfig) -> None:
    train_classifier(task, config)
