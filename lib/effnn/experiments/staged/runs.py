"""Notebook 03, the long part: training runs that can be compared fairly, each a line in the loss-compute plane.

A line is a way to spend compute: scratch, staged, the small model simply continued, growth with the moments reset, a
competitor's growth. Each is trained at a constant rate up to four fifths of a budget and then decayed to zero over the
last fifth; so a line's end points at several budgets are its loss-compute frontier, and no line profits from a rate
that happens to be lower (warm-up, stable, decay). Every line has its rates chosen on the validation split; what is
reported is the test split's.
"""

import dataclasses
import itertools
import math
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
from effnn.experiments.staged import peers as staged_peers
from effnn.experiments.staged import zero_shot as staged_zero_shot
from effnn.staged.training import batches, step

DECAY_SHARE = 0.2
"""Of a budget, spent while the rate falls linearly to zero."""

_FOREVER = 10**9


@dataclass(frozen=True)
class Setting:
    """What all lines of a comparison share.

    text, source, tokenizer: name and origin of the corpus, as in `effnn.data.corpus`; limit_tokens: of its train
    split, 0 for all. batch: sequences of `context` tokens a step, micro_batch of them at once (0: all). head: size of
    an attention head. warmup, rewarm: steps, at the start and after each growth. clip: 0 does not clip. evaluated:
    sequences of the validation and of the test split on which an end point is measured, spread over the whole split.
    evaluate_every: steps between the points on the way, which are evaluated on `on_the_way` sequences. zero_shot: other
    texts that end points are measured on, (name, source) pairs (staged_zero_shot.py). device, precision: as in
    `staged.train`. checkpoint_every: steps between checkpoints under data/cache, from which an interrupted run goes on;
    0 keeps none (short runs are cached as wholes).
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
    on_the_way: int = 512
    zero_shot: tuple[tuple[str, str], ...] = ()
    device: str = "cpu"
    precision: str = "float32"
    checkpoint_every: int = 0

    def load(self) -> corpus.Corpus:
        """The corpus, from its cache after the first time."""
        return corpus.load(self.text, self.source, self.tokenizer, limit_tokens=self.limit_tokens or None)


@dataclass(frozen=True)
class Line:
    """One way to spend compute. sizes: (layers, width) of each stage; steps: of each stage but the last, which takes
    what is left of the budget; rates: peak rate of each stage; growth: options of `staged.Stage` at every growth, or
    {"peer": name} for a competitor's operator (`staged_peers.PEERS`)."""

    name: str
    sizes: tuple[tuple[int, int], ...]
    rates: tuple[float, ...]
    steps: tuple[int, ...] = ()
    growth: tuple[tuple[str, object], ...] = ()

    def __post_init__(self) -> None:
        if not len(self.sizes) == len(self.rates) == len(self.steps) + 1:
            raise InvalidInput(
                f"line {self.name}: {len(self.sizes)} sizes need as many rates and one fewer steps, found "
                f"{len(self.rates)} and {len(self.steps)}"
            )


TUNED = ("scratch", "staged", "reset", "small")
"""The lines whose rates are tuned."""


@dataclass(frozen=True)
class Outcome:
    """What one line gave under one seed. ends: one row a budget; points: the losses on the way, at a constant rate."""

    ends: pd.DataFrame
    points: pd.DataFrame


Sizes = Sequence[tuple[int, int]]


def standard_lines(path: Sizes, steps: Sequence[int], rates: dict[str, Sequence[float]]) -> dict[str, Line]:
    """Return the four lines of a comparison by name: scratch, staged, reset (moments anew) and small (continued).

    path: (layers, width) of every stage. steps: of every stage but the last. rates: peak rates; "staged" and "reset"
    one a stage ("reset" may be left out, it is then staged's), "scratch" and "small" one each. small: the first stage's
    model simply continued. With three stages and more there is a fifth line, "once": the staged run without its last
    growth, a second model that one could simply have continued.
    """
    path, steps, stages = tuple(path), tuple(steps), tuple(rates["staged"])
    lines = {
        "scratch": Line("scratch", path[-1:], tuple(rates["scratch"])),
        "staged": Line("staged", path, stages, steps),
        "reset": Line("reset", path, tuple(rates.get("reset", stages)), steps, (("moments", "reset"),)),
        "small": Line("small", path[:1], tuple(rates["small"])),
    }
    return lines | ({"once": Line("once", path[:-1], stages[:-1], steps[:-1])} if len(path) > 2 else {})


def candidate_lines(
    path: Sizes, steps: Sequence[int], rates: dict[str, Sequence[float]], candidates: Sequence[float]
) -> list[Line]:
    """Return lines "name@rate" for scratch, staged, reset and small: each tries the same rates in its last stage."""
    tried = []
    for rate in candidates:
        last = [*rates["staged"][:-1], rate]
        lines = standard_lines(path, steps, {"scratch": [rate], "small": [rate], "staged": last, "reset": last})
        tried += [replace(lines[name], name=f"{name}@{rate:g}") for name in TUNED]
    return tried


def tuned_rates(rates: dict[str, Sequence[float]], tuned: pd.DataFrame) -> dict[str, list[float]]:
    """Return rates as for `standard_lines` with the best ones of `best_rates` in the last stages."""
    best, before = tuned[tuned.best].set_index("what").rate, rates["staged"][:-1]
    return {name: [best[name]] for name in ("scratch", "small")} | {
        name: [*before, best[name]] for name in ("staged", "reset")
    }


def run_lines(
    jobs: Sequence[tuple[Line, Sequence[float]]], seeds: Iterable[int], setting: Setting, label: str = "lines"
) -> Outcome:
    """Return all ends and points of these lines under these seeds, side by side in processes of their own.

    jobs: pairs of a line and its budgets in FLOPs (non-embedding). Each run is cached under data/cache. The costliest
    start first. Raises InvalidInput for a budget that a line's first stages already exceed.
    """
    corpus_fingerprint = setting.load().fingerprint  # made once, before the processes want it all together
    work = [
        (line, tuple(sorted(budgets)), setting, seed, corpus_fingerprint) for line, budgets in jobs for seed in seeds
    ]
    order = sorted(range(len(work)), key=lambda index: -_cost(*work[index][:3]))
    workers = None if setting.device == "cpu" else 1
    found = pool.run_jobs(_remembered, [work[index] for index in order], label, workers)
    outcomes = [outcome for _, outcome in sorted(zip(order, found, strict=True), key=lambda pair: pair[0])]
    return Outcome(*(pd.concat([getattr(o, part) for o in outcomes], ignore_index=True) for part in ("ends", "points")))


def _remembered(line: Line, budgets: tuple[float, ...], setting: Setting, seed: int, data: str) -> Outcome:
    key = {"line": dataclasses.asdict(line), "budgets": budgets, "setting": dataclasses.asdict(setting)}
    key |= {"seed": seed, "data": data}
    return cache.remember("staged_lines", key, lambda: run_line(line, budgets, setting, seed))


def run_line(line: Line, budgets: Sequence[float], setting: Setting, seed: int) -> Outcome:
    """Train one line to all budgets, in one process: one run at a constant rate, from which the decays branch off.

    Raises InvalidInput, before any training where that can be known, for a corpus with fewer windows than are to be
    evaluated, a budget that is spent before the last stage, and a decay that would begin before the re-warm after
    growth is over (its rate would never have been the peak).
    """
    text = setting.load()
    for split in ("validation", "test"):
        _windows(text, split, setting)
    recipe = recipe_of(setting, line.rates[0], seed)
    folders = _folders(line, setting, seed, text.fingerprint)

    def go_on(start: object, stage: staged.Stage, recipe: staged.Recipe = recipe) -> staged.TrainState:
        return staged.train(
            start, [stage], recipe, text.train, text.validation,
            folder=next(folders), device=setting.device, progress=bool(setting.checkpoint_every),
        )  # fmt: skip

    now = _follow(line, setting, recipe, text.vocab_size, go_on)
    each = staged.training_flops(staged.Shape.of(now.model.config), setting.batch * setting.context, setting.context)
    rows = []
    for budget in sorted(budgets):
        plateau = round(((1 - DECAY_SHARE) * budget - now.flops) / each)
        if plateau < 0:
            raise InvalidInput(
                f"line {line.name}: {now.flops:.3g} FLOPs are spent where the last stage begins, a budget of "
                f"{budget:.3g} leaves nothing before its decay: grow earlier, or take a larger budget"
            )
        if plateau:
            now = go_on(now, staged.Stage(plateau))
        if now.rewarm and now.position < sum(now.rewarm):
            raise InvalidInput(
                f"line {line.name}: the re-warm after growth ends at step {sum(now.rewarm)}, the decay of the budget "
                f"{budget:.3g} begins at step {now.position}: take a larger budget, or grow earlier"
            )
        decay = max(round((budget - now.flops) / each), 1)
        falling = replace(recipe, schedule=staged.WarmupStableDecay(0, now.position + decay, decay))
        end = go_on(now, staged.Stage(decay), falling)
        rows.append({"line": line.name, "seed": seed, "budget": budget} | _ends(end, setting, text))
        rows[-1]["plateau_loss"] = now.points[-1].validation_loss
    points = pd.DataFrame([dataclasses.asdict(point) for point in now.points])
    points.insert(0, "line", line.name)
    points.insert(1, "seed", seed)
    sizes = [line.sizes.index(size) for size in zip(points.layers, points.width, strict=True)]
    points.insert(2, "phase", sizes)  # how often it has grown by then
    return Outcome(pd.DataFrame(rows), points)


def recipe_of(setting: Setting, rate: float, seed: int) -> staged.Recipe:
    """Return how all lines are trained: at a constant rate after the warm-up."""
    return staged.Recipe(
        setting.batch,
        setting.context,
        rate,
        staged.WarmupStableDecay(setting.warmup, _FOREVER, 0),
        weight_decay=setting.weight_decay,
        clip=setting.clip or None,
        seed=seed,
        evaluate_every=setting.evaluate_every,
        evaluate_sequences=setting.on_the_way,
        micro_batch=setting.micro_batch or None,
        precision=setting.precision,
        checkpoint_every=setting.checkpoint_every or None,
    )


def _folders(line: Line, setting: Setting, seed: int, data: str) -> Iterator[Path | None]:
    """A folder for the checkpoints of each part of a run, in the order of training; None where none are kept."""
    key = {"line": dataclasses.asdict(line), "setting": dataclasses.asdict(setting), "seed": seed, "data": data}
    folder = cache.entry("staged_runs", key, run_line).with_suffix("")
    for part in itertools.count():
        yield folder / str(part) if setting.checkpoint_every else None


def _windows(text: corpus.Corpus, split: str, setting: Setting) -> torch.Tensor:
    return batches.validation_windows(getattr(text, split), setting.evaluated, setting.context, text.vocab_size)


def _follow(line: Line, setting: Setting, recipe: staged.Recipe, vocabulary: int, go_on: Callable) -> staged.TrainState:
    """The state at the beginning of the last stage: just grown, or new."""
    sizes = [configuration(size, setting, vocabulary) for size in line.sizes]
    now: object = sizes[0]
    if not line.steps:
        return go_on(now, staged.Stage(0))
    options = dict(line.growth)
    peer = options.pop("peer", None)
    now = go_on(now, staged.Stage(line.steps[0]))
    for old, new, rate, steps in zip(sizes, sizes[1:], line.rates[1:], (*line.steps[1:], 0), strict=False):
        wider, deeper = staged.factors(old, new)
        stage = staged.Stage(steps, learning_rate=rate, rewarm=setting.rewarm)
        if peer:
            grown = staged_peers.grow_state(peer, now, wider, deeper, recipe)
            before, grown.points = grown.points, []  # without points the loss right after growth is measured
            now = go_on(grown, stage)
            now.points = before + now.points
        else:
            now = go_on(now, replace(stage, width=wider, depth=deeper, **options))
    return now


def configuration(size: tuple[int, int], setting: Setting, vocabulary: int) -> GPT2Config:
    """Return the GPT-2 of this size, (layers, width); InvalidInput for a width that heads do not divide."""
    layers, wide = size
    if wide % setting.head:
        raise InvalidInput(f"a width of {wide} does not divide into heads of {setting.head}")
    return GPT2Config(
        vocab_size=vocabulary, n_positions=setting.context, n_layer=layers, n_embd=wide, n_head=wide // setting.head,
        embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip


@torch.no_grad()
def _ends(end: staged.TrainState, setting: Setting, text: corpus.Corpus) -> dict[str, float]:
    row = {"steps": end.step, "tokens": end.tokens, "flops": end.flops, "flops_full": end.flops_full}
    row["clock_seconds"] = end.seconds  # of this run on that day; not to be compared
    for split in ("validation", "test"):
        windows = _windows(text, split, setting)
        parts = windows.split(setting.micro_batch or 64)
        losses = [float(step.token_loss(end.model, part.to(end.model.device), "sum")) for part in parts]
        row[f"{split}_loss"] = math.fsum(losses) / windows[:, 1:].numel()
    return row | staged_zero_shot.evaluate(end.model, text.tokenizer, dict(setting.zero_shot), setting.context)


def _cost(line: Line, budgets: Sequence[float], setting: Setting) -> float:
    """A guess of the time: FLOPs, with what every step costs beside them."""
    layers, wide = line.sizes[-1]
    each = 6 * 12 * layers * wide**2 * setting.batch * setting.context
    steps = ((1 - DECAY_SHARE) * max(budgets) + DECAY_SHARE * sum(budgets)) / each + sum(line.steps)
    return steps * (each / 5e10 + 2e-3 * layers)


def best_rates(ends: pd.DataFrame) -> pd.DataFrame:
    """Return, by line, what the candidates `line@rate` ended with on the validation split, best first.

    ends: of lines named "what@rate", all with the same budget. Columns: what, rate, validation_loss, best, edge:
    whether the best is the smallest or largest rate tried, so that a better one may lie outside.
    """
    means = ends.groupby("line").validation_loss.mean()
    table = pd.DataFrame(
        [(name.split("@")[0], float(name.split("@")[1]), loss) for name, loss in means.items()],
        columns=["what", "rate", "validation_loss"],
    )
    table["best"] = table.validation_loss == table.groupby("what").validation_loss.transform("min")
    rates = table.groupby("what").rate
    table["edge"] = table.best & ((table.rate == rates.transform("min")) | (table.rate == rates.transform("max")))
    return table.sort_values(["what", "validation_loss"], ignore_index=True)
