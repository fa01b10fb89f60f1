"""Notebook 03, the long part: training runs of several methods, made so that they can be compared fairly.

A method is one way to spend compute: training from scratch, staged training, the small model continued without growth,
growth with reset moments, another paper's growth operator. Each is trained at a constant rate for four fifths of a
budget, and the rate then decays to zero over the last fifth. So the end points of a method at several budgets are its
loss-compute frontier, and no method profits from a rate that happens to be lower. The rates of every method are chosen
on the validation split; results are those of the test split.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from transformers import GPT2Config

from effnn import cache, staged
from effnn.base import InvalidInput
from effnn.data import corpus
from effnn.experiments.shared import pool
from effnn.experiments.staged import evaluation, other_operators
from effnn.staged.training.batches import validation_windows

DECAY_SHARE = 0.2
"""The share of a budget that is spent while the rate falls linearly to zero."""

_FOREVER = 10**9


@dataclass(frozen=True)
class Setting:
    """What all methods of a comparison have in common.

    text, source, tokenizer: name and origin of the corpus, as in `effnn.data.corpus`.
    limit_tokens: of the train split, 0 for all.
    batch: sequences per step.
    micro_batch: sequences per forward pass, 0 for all of a batch.
    context: tokens per sequence.
    head: size of an attention head.
    warmup, rewarm: steps, at the start and after each growth.
    weight_decay: of AdamW.
    clip: largest gradient norm; 0 does not clip.
    evaluated: sequences of the validation and of the test split on which an end point is evaluated.
    evaluate_every: steps between the evaluations during training.
    evaluated_in_training: sequences of the validation split for each of these.
    zero_shot: (name, source) pairs of other texts on which end points are evaluated (evaluation.py).
    device, precision: as in `staged.train`.
    checkpoint_every: steps between checkpoints under data/cache, from which an interrupted run goes on; 0 keeps none
    (short runs are cached as a whole).
    """

    text: str = "docstrings"
    source: str = "builtin"
    tokenizer: str = "character"
    limit_tokens: int = 0
    batch: int = 16
    micro_batch: int = 0
    context: int = 64
    head: int = 16
    warmup: int = 50
    rewarm: int = 50
    weight_decay: float = 0.01
    clip: float = 1.0
    evaluated: int = 1536
    evaluate_every: int = 100
    evaluated_in_training: int = 512
    zero_shot: tuple[tuple[str, str], ...] = ()
    device: str = "cpu"
    precision: str = "float32"
    checkpoint_every: int = 0

    def load(self) -> corpus.Corpus:
        """The corpus, from its cache after the first time."""
        return corpus.load(self.text, self.source, self.tokenizer, limit_tokens=self.limit_tokens or None)


@dataclass(frozen=True)
class Method:
    """One way to spend compute. Raises InvalidInput unless there are as many rates as sizes and one step count fewer.

    name: in all tables.
    sizes: (layers, width) of each stage.
    rates: peak rate of each stage.
    steps: of each stage but the last, which takes the rest of the budget.
    growth: options of `staged.Stage` at every growth, or ("operator", name) for one of `OTHER_OPERATORS`.
    """

    name: str
    sizes: tuple[tuple[int, int], ...]
    rates: tuple[float, ...]
    steps: tuple[int, ...] = ()
    growth: tuple[tuple[str, object], ...] = ()

    def __post_init__(self) -> None:
        if not len(self.sizes) == len(self.rates) == len(self.steps) + 1:
            raise InvalidInput(
                f"method {self.name}: {len(self.sizes)} sizes need as many rates and one fewer steps, found "
                f"{len(self.rates)} and {len(self.steps)}"
            )


@dataclass(frozen=True)
class RunResults:
    """End points and curves. ends: one row per method, seed and budget; points: the evaluations at a constant rate."""

    ends: pd.DataFrame
    points: pd.DataFrame


Sizes = Sequence[tuple[int, int]]


def standard_methods(path: Sizes, steps: Sequence[int], rates: dict[str, Sequence[float]]) -> dict[str, Method]:
    """Return the methods of a comparison by name: scratch, staged, reset and small.

    small is the model of the first stage continued without growth; reset grows with reset moments. With three stages or
    more there is a fifth method, once: the staged run without its last growth.

    path: (layers, width) of every stage. steps: of every stage but the last. rates: peak rates; of "staged" and "reset"
    one per stage (without "reset", those of "staged"), of "scratch" and "small" one each.
    """
    path, steps, stages = tuple(path), tuple(steps), tuple(rates["staged"])
    methods = {
        "scratch": Method("scratch", path[-1:], tuple(rates["scratch"])),
        "staged": Method("staged", path, stages, steps),
        "reset": Method("reset", path, tuple(rates.get("reset", stages)), steps, (("moments", "reset"),)),
        "small": Method("small", path[:1], tuple(rates["small"])),
    }
    return methods | ({"once": Method("once", path[:-1], stages[:-1], steps[:-1])} if len(path) > 2 else {})


def run_methods(
    jobs: Sequence[tuple[Method, Sequence[float]]], seeds: Iterable[int], setting: Setting, label: str = "methods"
) -> RunResults:
    """Return the results of these methods for these seeds; the runs are spread over processes and cached.

    jobs: pairs of a method and its budgets in FLOPs (non-embedding). seeds: of weights and data order. label: of the
    progress bar. Raises InvalidInput for a budget that a method's first stages already exceed.
    """
    data = setting.load().fingerprint  # the corpus is made here, before all processes need it at once
    runs = [(method, tuple(sorted(budgets)), setting, seed, data) for method, budgets in jobs for seed in seeds]
    order = sorted(range(len(runs)), key=lambda index: -_cost(*runs[index][:3]))  # the costliest start first
    workers = None if setting.device == "cpu" else 1
    found = pool.run_jobs(_cached, [runs[index] for index in order], label, workers)
    results = [result for _, result in sorted(zip(order, found, strict=True), key=lambda pair: pair[0])]
    ends, points = ([getattr(result, part) for result in results] for part in ("ends", "points"))
    return RunResults(pd.concat(ends, ignore_index=True), pd.concat(points, ignore_index=True))


def _cached(method: Method, budgets: tuple[float, ...], setting: Setting, seed: int, data: str) -> RunResults:
    key = {"method": dataclasses.asdict(method), "budgets": budgets, "setting": dataclasses.asdict(setting)}
    key |= {"seed": seed, "data": data}
    return cache.remember("staged_runs", key, lambda: run_method(method, budgets, setting, seed))


def run_method(method: Method, budgets: Sequence[float], setting: Setting, seed: int) -> RunResults:
    """Train one method to all budgets, in one process: one run at a constant rate, from which the decays branch off.

    Raises InvalidInput for a corpus with fewer windows than are to be evaluated (before any training), a budget that is
    spent before the last stage, and a decay that would begin before the end of the re-warm after growth (the rate would
    never reach its peak).
    """
    text = setting.load()
    for split in ("validation", "test"):
        _windows(text, split, setting)
    recipe = recipe_of(setting, method.rates[0], seed)
    folders = _folders(method, setting, seed, text.fingerprint)

    def go_on(start: object, stage: staged.Stage, recipe: staged.Recipe = recipe) -> staged.TrainState:
        return staged.train(
            start, [stage], recipe, text.train, text.validation,
            folder=next(folders), device=setting.device, progress=bool(setting.checkpoint_every),
        )  # fmt: skip

    now = _last_stage(method, setting, recipe, text.vocab_size, go_on)
    each = staged.training_flops(staged.Shape.of(now.model.config), setting.batch * setting.context, setting.context)
    rows = []
    for budget in sorted(budgets):
        plateau = round(((1 - DECAY_SHARE) * budget - now.flops) / each)
        if plateau < 0:
            raise InvalidInput(
                f"method {method.name}: {now.flops:.3g} FLOPs are spent before the last stage, so a budget of "
                f"{budget:.3g} leaves nothing before its decay: grow earlier, or take a larger budget"
            )
        if plateau:
            now = go_on(now, staged.Stage(plateau))
        if now.rewarm and now.position < sum(now.rewarm):
            raise InvalidInput(
                f"method {method.name}: the re-warm after growth ends at step {sum(now.rewarm)}, the decay of the "
                f"budget {budget:.3g} begins at step {now.position}: take a larger budget, or grow earlier"
            )
        decay = max(round((budget - now.flops) / each), 1)
        falling = replace(recipe, schedule=staged.WarmupStableDecay(0, now.position + decay, decay))
        end = go_on(now, staged.Stage(decay), falling)
        rows.append({"method": method.name, "seed": seed, "budget": budget} | _ends(end, setting, text))
        rows[-1]["plateau_loss"] = now.points[-1].validation_loss
    points = pd.DataFrame([dataclasses.asdict(point) for point in now.points])
    points.insert(0, "method", method.name)
    points.insert(1, "seed", seed)
    sizes = [method.sizes.index(size) for size in zip(points.layers, points.width, strict=True)]
    points.insert(2, "phase", sizes)  # the number of growths before
    return RunResults(pd.DataFrame(rows), points)


def recipe_of(setting: Setting, rate: float, seed: int) -> staged.Recipe:
    """Return the recipe of all methods: a constant rate after the warm-up."""
    return staged.Recipe(
        setting.batch,
        setting.context,
        rate,
        staged.WarmupStableDecay(setting.warmup, _FOREVER, 0),
        weight_decay=setting.weight_decay,
        clip=setting.clip or None,
        seed=seed,
        evaluate_every=setting.evaluate_every,
        evaluate_sequences=setting.evaluated_in_training,
        micro_batch=setting.micro_batch or None,
        precision=setting.precision,
        checkpoint_every=setting.checkpoint_every or None,
    )


def _folders(method: Method, setting: Setting, seed: int, data: str) -> Iterator[Path | None]:
    """A folder for the checkpoints of each part of a run, in the order of training; None if none are kept."""
    key = {"method": dataclasses.asdict(method), "setting": dataclasses.asdict(setting), "seed": seed, "data": data}
    folder = cache.entry("staged_checkpoints", key, run_method).with_suffix("")
    for part in itertools.count():
        yield folder / str(part) if setting.checkpoint_every else None


def _windows(text: corpus.Corpus, split: str, setting: Setting) -> torch.Tensor:
    return validation_windows(getattr(text, split), setting.evaluated, setting.context, text.vocab_size)


def _last_stage(
    method: Method, setting: Setting, recipe: staged.Recipe, vocabulary: int, go_on: Callable
) -> staged.TrainState:
    """The state at the beginning of the last stage: just grown, or new."""
    sizes = [configuration(size, setting, vocabulary) for size in method.sizes]
    now: object = sizes[0]
    if not method.steps:
        return go_on(now, staged.Stage(0))
    options = dict(method.growth)
    operator = options.pop("operator", None)
    now = go_on(now, staged.Stage(method.steps[0]))
    for old, new, rate, steps in zip(sizes, sizes[1:], method.rates[1:], (*method.steps[1:], 0), strict=False):
        wider, deeper = staged.factors(old, new)
        stage = staged.Stage(steps, learning_rate=rate, rewarm=setting.rewarm)
        if operator:
            grown = other_operators.grow_state(operator, now, wider, deeper, recipe)
            before, grown.points = grown.points, []  # without points, training begins with an evaluation
            now = go_on(grown, stage)
            now.points = before + now.points
        else:
            now = go_on(now, replace(stage, width=wider, depth=deeper, **options))
    return now


def configuration(size: tuple[int, int], setting: Setting, vocabulary: int) -> GPT2Config:
    """Return the GPT-2 of a size (layers, width); InvalidInput for a width that is not a multiple of the head size."""
    layers, wide = size
    if wide % setting.head:
        raise InvalidInput(f"a width of {wide} does not divide into heads of {setting.head}")
    return GPT2Config(
        vocab_size=vocabulary, n_positions=setting.context, n_layer=layers, n_embd=wide, n_head=wide // setting.head,
        embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip


def _ends(end: staged.TrainState, setting: Setting, text: corpus.Corpus) -> dict[str, float]:
    row = {"steps": end.step, "tokens": end.tokens, "flops": end.flops, "flops_full": end.flops_full}
    row["clock_seconds"] = end.seconds  # while other runs were training: not comparable
    for split in ("validation", "test"):
        windows = _windows(text, split, setting)
        row[f"{split}_loss"] = evaluation.mean_loss(end.model, windows, setting.micro_batch or 64)
    return row | evaluation.zero_shot(end.model, text.tokenizer, dict(setting.zero_shot), setting.context)


def _cost(method: Method, budgets: Sequence[float], setting: Setting) -> float:
    """An estimate of the time in seconds: FLOPs, and a constant per step and layer."""
    layers, wide = method.sizes[-1]
    each = 6 * 12 * layers * wide**2 * setting.batch * setting.context
    steps = ((1 - DECAY_SHARE) * max(budgets) + DECAY_SHARE * sum(budgets)) / each + sum(method.steps)
    return steps * (each / 5e10 + 2e-3 * layers)
