"""Notebook 03, the long part: what staged training saves against fair baselines, to equal loss.

A line is a way to spend compute: scratch, staged, the small model simply continued, growth with the moments reset, a
competitor's growth. Each is trained at a constant rate up to four fifths of a budget and then decayed to zero over the
last fifth; so a line's end points at several budgets are its loss-compute frontier, and no line profits from a rate
that happens to be lower (warm-up, stable, decay). Every line has its rates chosen on the validation split; what is
reported is the test split's.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from transformers import GPT2Config

from effnn import cache, staged
from effnn.base import InvalidInput
from effnn.data import corpus
from effnn.experiments import pool, staged_peers, staged_zero_shot
from effnn.staged import batches, begin, clipping, depth, optimizer, state, step, train, width

DECAY_SHARE = 0.2
"""Of a budget, spent while the rate falls linearly to zero."""

_FOREVER = 10**9
_CODE = [batches, begin, clipping, depth, optimizer, state, step, train, width, staged_peers, staged_zero_shot]
AXES = {"flops": "FLOPs without embeddings", "flops_full": "FLOPs in full", "seconds": "seconds"}
"""What can be spent: both conventions of FLOPs are counted, the seconds are of this machine."""


@dataclass(frozen=True)
class Setting:
    """What all lines of a comparison share.

    text, source, tokenizer: name and origin of the corpus, as in `effnn.data.corpus`; limit_tokens: of its train
    split, 0 for all. batch: sequences of `context` tokens a step, micro_batch of them at once (0: all). head: size of
    an attention head. warmup: steps, also of the re-warm after growth. evaluated: sequences of the validation and of
    the test split on which an end point is measured. evaluate_every: steps between the points on the way, which are
    evaluated on `on_the_way` sequences. zero_shot: other texts that end points are measured on, (name, source) pairs
    (staged_zero_shot.py). device, precision: as in `staged.train`.
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
    weight_decay: float = 0.01
    clip: float = 1.0
    evaluated: int = 1536
    evaluate_every: int = 100
    on_the_way: int = 512
    zero_shot: tuple[tuple[str, str], ...] = ()
    device: str = "cpu"
    precision: str = "float32"

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


@dataclass(frozen=True)
class Outcome:
    """What one line gave under one seed. ends: one row a budget; points: the losses on the way, at a constant rate."""

    ends: pd.DataFrame
    points: pd.DataFrame


Path = Sequence[tuple[int, int]]


def standard_lines(path: Path, steps: Sequence[int], rates: dict[str, Sequence[float]]) -> dict[str, Line]:
    """Return the four lines of a comparison by name: scratch, staged, reset (moments anew) and small (continued).

    path: (layers, width) of every stage. steps: of every stage but the last. rates: peak rates; "staged" one a stage,
    "scratch" and "small" one each. The small line is the staged run without its last growth: with two stages the small
    model simply continued, with three what the first growth gave.
    """
    path, steps, stages = tuple(path), tuple(steps), tuple(rates["staged"])
    return {
        "scratch": Line("scratch", path[-1:], tuple(rates["scratch"])),
        "staged": Line("staged", path, stages, steps),
        "reset": Line("reset", path, stages, steps, (("moments", "reset"),)),
        "small": Line("small", path[:-1], (*stages[:-2], *rates["small"]), steps[:-1]),
    }


def candidate_lines(
    path: Path, steps: Sequence[int], rates: dict[str, Sequence[float]], candidates: Sequence[float]
) -> list[Line]:
    """Return the lines "small@rate", "staged@rate" and "scratch@rate": each tries the same rates in its last stage."""
    tried = []
    for rate in candidates:
        own = {"scratch": [rate], "small": [rate], "staged": [*rates["staged"][:-1], rate]}
        lines = standard_lines(path, steps, own)
        tried += [replace(lines[name], name=f"{name}@{rate:g}") for name in own]
    return tried


def tuned_rates(rates: dict[str, Sequence[float]], tuned: pd.DataFrame) -> dict[str, list[float]]:
    """Return rates as for `standard_lines` with the best ones of `best_rates` in the last stages."""
    best = tuned[tuned.best].set_index("what").rate
    return {"scratch": [best["scratch"]], "small": [best["small"]], "staged": [*rates["staged"][:-1], best["staged"]]}


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
    key |= {"seed": seed, "data": data, "torch": torch.__version__}
    return cache.remember(
        "staged_lines", key, lambda: run_line(line, budgets, setting, seed), code=[*_CODE, run_line, _follow, _ends]
    )


def run_line(line: Line, budgets: Sequence[float], setting: Setting, seed: int) -> Outcome:
    """Train one line to all budgets, in one process: one run at a constant rate, from which the decays branch off."""
    text = setting.load()
    recipe = staged.Recipe(
        setting.batch,
        setting.context,
        line.rates[0],
        staged.WarmupStableDecay(setting.warmup, _FOREVER, 0),
        weight_decay=setting.weight_decay,
        clip=setting.clip,
        seed=seed,
        evaluate_every=setting.evaluate_every,
        evaluate_sequences=setting.on_the_way,
        micro_batch=setting.micro_batch or None,
        precision=setting.precision,
    )

    def go_on(start: object, stage: staged.Stage, recipe: staged.Recipe = recipe) -> staged.TrainState:
        return staged.train(start, [stage], recipe, text.train, text.validation, device=setting.device, progress=False)

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


def _follow(line: Line, setting: Setting, recipe: staged.Recipe, vocabulary: int, go_on: Callable) -> staged.TrainState:
    """The state at the beginning of the last stage: just grown, or new."""
    sizes = [_config(size, setting, vocabulary) for size in line.sizes]
    now: object = sizes[0]
    if not line.steps:
        return go_on(now, staged.Stage(0))
    options = dict(line.growth)
    peer = options.pop("peer", None)
    now = go_on(now, staged.Stage(line.steps[0]))
    for old, new, rate, steps in zip(sizes, sizes[1:], line.rates[1:], (*line.steps[1:], 0), strict=False):
        wider, deeper = staged.factors(old, new)
        stage = staged.Stage(steps, learning_rate=rate, rewarm=setting.warmup)
        if peer:
            grown = staged_peers.grow_state(peer, now, wider, deeper, recipe)
            before, grown.points = grown.points, []  # without points the loss right after growth is measured
            now = go_on(grown, stage)
            now.points = before + now.points
        else:
            now = go_on(now, replace(stage, width=wider, depth=deeper, **options))
    return now


def _config(size: tuple[int, int], setting: Setting, vocabulary: int) -> GPT2Config:
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
    row["seconds"] = end.seconds
    for split in ("validation", "test"):
        windows = batches.validation_windows(getattr(text, split), setting.evaluated, setting.context, text.vocab_size)
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

    ends: of lines named "what@rate", all with the same budget. Columns: what, rate, validation_loss, best.
    """
    means = ends.groupby("line").validation_loss.mean()
    table = pd.DataFrame(
        [(name.split("@")[0], float(name.split("@")[1]), loss) for name, loss in means.items()],
        columns=["what", "rate", "validation_loss"],
    )
    table["best"] = table.validation_loss == table.groupby("what").validation_loss.transform("min")
    return table.sort_values(["what", "validation_loss"], ignore_index=True)


def compute_to_loss(ends: pd.DataFrame, loss: float, axis: str = "flops") -> float:
    """Return what a line spends until its end point has `loss` on the test split: interpolated between budgets.

    ends: of one line and seed. A line that is already better at its smallest budget is charged that budget, which can
    only be too much; one that never gets there gives infinity.
    """
    ends = ends.sort_values("budget")
    if ends.test_loss.min() > loss:
        return math.inf
    if ends.test_loss.iloc[0] <= loss or len(ends) == 1:
        return float(ends[axis].iloc[0])
    return staged.Curve(ends[axis].tolist(), ends.test_loss.tolist()).x_at(loss)


def savings(ends: pd.DataFrame, reference: str = "scratch") -> pd.DataFrame:
    """Return what every other line saves against `reference`, to the loss that it has at its largest budget.

    One row a line, seed and axis (`AXES`): line, seed, axis, loss (nats a token, of the test split), spent, reference
    (what the reference spent), saving (percent; minus infinity where the loss is never reached).
    """
    rows = []
    for seed, of_seed in ends.groupby("seed"):
        scratch = of_seed[of_seed.line == reference].sort_values("budget").iloc[-1]
        for name, line in of_seed[of_seed.line != reference].groupby("line", sort=False):
            for axis in AXES:
                spent = compute_to_loss(line, scratch.test_loss, axis)
                row = {"line": name, "seed": seed, "axis": axis, "loss": scratch.test_loss, "spent": spent}
                rows.append(row | {"reference": scratch[axis], "saving": 100 * (1 - spent / scratch[axis])})
    return pd.DataFrame(rows)


def claimed_savings(ends: pd.DataFrame, line: str = "staged") -> tuple[list[float], str]:
    """Return what the claim asks for, and a note: FLOPs saved in percent, one number a seed.

    No numbers where, under any seed, the line never reaches the loss or the small model simply continued gets there
    with less: such a setting does not show what the claim says.
    """
    table = savings(ends)
    found = table[(table.line == line) & (table.axis == "flops")].sort_values("seed")
    against = pays(ends, line)
    against = against[against.axis == "flops"].sort_values("seed")
    if not np.isfinite(found.saving).all() or not against.pays.all():
        won, all_of_them = int(against.pays.sum()), len(against)
        return (
            [],
            f"needs a setting where growing pays: it beat the small model continued in {won} of {all_of_them} seeds",
        )
    others = table[(table.line == line) & (table.axis != "flops")].groupby("axis").saving.mean()
    never = int(np.isinf(against.small_spent).sum())
    return found.saving.tolist(), (
        f"in full FLOPs {others['flops_full']:.1f}, in wall time {others['seconds']:.1f}; the small model simply "
        f"continued spends more in every seed, and within its budgets never gets there in {never} of {len(against)}"
    )


def jumps(points: pd.DataFrame) -> pd.DataFrame:
    """Return, by line and seed, the validation loss just before and just after the last growth, and the difference."""
    rows = []
    for (name, seed), own in points.groupby(["line", "seed"], sort=False):
        if last := own.phase.max():
            before = own[own.phase == last - 1].validation_loss.iloc[-1]
            after = own[own.phase == last].validation_loss.iloc[0]
            rows.append((name, seed, before, after, after - before))
    return pd.DataFrame(rows, columns=["line", "seed", "before", "after", "jump"])


def pays(ends: pd.DataFrame, line: str = "staged", small: str = "small") -> pd.DataFrame:
    """Return whether growing beats continuing the small model, by seed and axis: spent, small_spent, pays."""
    table = savings(ends)
    both = table[table.line.isin([line, small])].pivot(index=["seed", "axis"], columns="line", values="spent")
    found = both.rename(columns={line: "spent", small: "small_spent"}).reset_index()
    found["pays"] = found.spent < found.small_spent
    return found


def slope_ratios(points: pd.DataFrame, steps: int, line: str = "staged", scratch: str = "scratch") -> pd.DataFrame:
    """Return, by seed, the grown model's fall of the loss over that of the same size from scratch, at equal loss.

    points: at a constant rate. Looks at the grown model from where it is back at the small model's last loss (re-warm
    and bump are over) for `steps` steps, or as far as both reach, and at the model from scratch between the same two
    losses. Each slope is that of a line through all evaluations in its window, since single ones are noisy. Columns:
    seed, upper and lower (those losses), recovery (steps until it was back), grown_slope, scratch_slope (nats a token
    and step) and ratio, grown over scratch: 1 is the same dynamics, more is faster. Raises InvalidInput where a window
    holds fewer than two evaluations.
    """
    rows = []
    for seed, of_seed in points.groupby("seed"):
        own, other = (of_seed[of_seed.line == name].sort_values("step", kind="stable") for name in (line, scratch))
        last = own.phase.max()
        born = own.step[own.phase == last].min()
        upper = own[own.phase < last].validation_loss.iloc[-1]
        grown = own[(own.phase == last) & (own.step > born)]
        curve = staged.Curve((grown.step - born).tolist(), grown.validation_loss.tolist())
        target = other[other.step > 0]
        reference = staged.Curve(target.step.tolist(), target.validation_loss.tolist())
        back = min(upper, float(curve.losses[0]))
        recovery = max(curve.x_at(back), float(curve.x[0]))
        lower = max(curve.loss_at(min(recovery + steps, float(curve.x[-1]))), math.exp(float(reference.log_loss[-1])))
        own_slope = _slope(curve, recovery, curve.x_at(lower))
        its_slope = _slope(reference, reference.x_at(back), reference.x_at(lower))
        row = {"seed": seed, "upper": back, "lower": lower, "recovery": recovery}
        rows.append(row | {"grown_slope": own_slope, "scratch_slope": its_slope, "ratio": own_slope / its_slope})
    return pd.DataFrame(rows)


def _slope(curve: staged.Curve, first: float, last: float) -> float:
    inside = (curve.x >= first - 1e-6) & (curve.x <= last + 1e-6)
    if int(inside.sum()) < 2:
        raise InvalidInput(
            f"between step {first:.0f} and {last:.0f} there are {int(inside.sum())} evaluations, a slope needs two: "
            "evaluate more often, or compare over more steps"
        )
    return float(np.polyfit(curve.x[inside].numpy(), curve.losses[inside].numpy(), 1)[0])


def run_map(
    points: Sequence[Sequence[object]],
    runs: Outcome,
    rate: float,
    budgets: Sequence[float],
    seeds: Sequence[int],
    setting: Setting,
) -> pd.DataFrame:
    """Return what other growth paths save, one row a path and seed.

    points: [kind, sizes of the stages, steps of all stages but the last]; the last size is that of `runs`, whose
    reference from scratch they are compared with; all stages train at `rate`. Columns: kind, steps,
    seed, share (of the reference's FLOPs that is spent when the last growth comes), saving (percent; minus infinity
    where the loss is never reached), small_saving (of the first stage's model continued, within the same budgets).
    """
    lines, small = {}, {}
    for kind, sizes, steps in points:
        name = f"{kind}@{'+'.join(map(str, steps))}"
        stages = tuple(tuple(size) for size in sizes)
        lines[name] = (kind, Line(name, stages, (rate,) * len(stages), tuple(steps)))
        small[stages[0]] = Line(f"small {stages[0]}", stages[:1], (rate,))
    reference = runs.ends[(runs.ends.line == "scratch") & runs.ends.seed.isin(seeds)]
    first = [(line, [max(budgets)]) for line in small.values()]
    found = run_lines([(line, budgets) for _, line in lines.values()] + first, seeds, setting, "map")
    table = savings(pd.concat([reference, found.ends]))
    table = table[table.axis == "flops"].set_index(["line", "seed"])
    rows = []
    for name, (kind, line) in lines.items():
        for seed in seeds:
            own = found.points[(found.points.line == name) & (found.points.seed == seed)]
            grown = own[own.phase == own.phase.max()]
            entry = table.loc[(name, seed)]
            row = {"kind": kind, "steps": name.split("@")[1], "seed": seed, "saving": entry.saving}
            row["share"] = grown.flops.min() / entry.reference
            row["small_saving"] = table.loc[(f"small {line.sizes[0]}", seed)].saving
            rows.append(row)
    return pd.DataFrame(rows)


def run_peers(
    ours: Line, budgets: Sequence[float], runs: Outcome, seeds: Sequence[int], setting: Setting
) -> pd.DataFrame:
    """Return competitors' ways to grow beside ours, from the same small model at the same point and the same rates.

    ours: a line of two stages that grows in width. Stacking doubles the depth of a model as wide as the target and half
    as deep instead, and has ours in depth beside it. Columns: line, jump (of the validation loss at growth), test_loss
    (at the largest budget), saving (percent of FLOPs against scratch), each the mean over seeds.
    """
    layers, wide = ours.sizes[-1]
    compared = {"ours (width)": replace(ours, name="ours (width)")}
    compared |= {
        peer: replace(ours, name=peer, growth=(("peer", peer),)) for peer in staged_peers.PEERS if peer != "stack"
    }
    if layers % 2 == 0:
        deep = replace(ours, sizes=((layers // 2, wide), (layers, wide)))
        compared["stack"] = replace(deep, name="stack", growth=(("peer", "stack"),))
        compared["ours (depth)"] = replace(deep, name="ours (depth)")
    found = run_lines([(line, budgets) for line in compared.values()], seeds, setting, "competitors")
    reference = runs.ends[(runs.ends.line == "scratch") & runs.ends.seed.isin(seeds)]
    saved = savings(pd.concat([reference, found.ends]))
    saved = saved[saved.axis == "flops"].groupby("line").saving.mean()
    moved = jumps(found.points).groupby("line").jump.mean()
    ends = found.ends[found.ends.budget == max(budgets)].groupby("line").test_loss.mean()
    rows = [(name, moved[name], ends[name], saved[name]) for name in compared]
    return pd.DataFrame(rows, columns=["line", "jump", "test_loss", "saving"])
