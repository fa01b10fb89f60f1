"""Notebook 03: what the lines cost in seconds. A step of every model size is timed, all sizes in turn, in one place.

Runs are long, cached, and trained side by side while a machine's load changes, so the seconds that they took cannot be
compared. Steps are counted, and a step's time depends on the size alone: a run's seconds are the steps at each size,
times what a step of that size took when all of them were timed in turn.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import pandas as pd

from effnn import staged
from effnn.base import interleave, threads
from effnn.experiments.staged.lines import Line, Setting, configuration, recipe_of
from effnn.staged.training.batches import Batches
from effnn.staged.training.ranks import Ranks
from effnn.staged.training.step import Stepper

Size = tuple[int, int]


def step_seconds(
    sizes: Iterable[Size], setting: Setting, rounds: int = 9, steps: int = 20, count: int = 1
) -> pd.DataFrame:
    """Time a training step (forward, backward, clipping, AdamW) of every size, the sizes in turn.

    sizes: (layers, width). rounds: of the turns; steps: taken by each size in a round; count: torch threads. Columns:
    layers, width, seconds (a step's, median over rounds), low, high (extremes), load (highest load average).
    """
    text, ranks = setting.load(), Ranks.current(setting.device)
    recipe = replace(recipe_of(setting, rate=1e-3, seed=0), evaluate_sequences=1, checkpoint_every=None)
    batches = Batches(text.train, recipe.batch_size, recipe.context, text.vocab_size, recipe.seed)

    def trainer(size: Size):
        start = [configuration(size, setting, text.vocab_size), [staged.Stage(0)], recipe, text.train, text.validation]
        stepper = Stepper(staged.train(*start, device=setting.device, progress=False), recipe, ranks)

        def run() -> None:
            for number in range(steps):
                loss = stepper(batches(number))
            float(loss)  # waits for the device

        return run

    with threads(count):
        times = interleave({size: trainer(size) for size in dict.fromkeys(sizes)}, rounds=rounds, device=ranks.device)
    return pd.DataFrame(
        {
            "layers": layers,
            "width": width,
            "seconds": timing.median / steps,
            "low": timing.spread[0] / steps,
            "high": timing.spread[1] / steps,
            "load": max(timing.load),
        }
        for (layers, width), timing in times.items()
    )


def with_seconds(ends: pd.DataFrame, lines: Mapping[str, Line], times: pd.DataFrame) -> pd.DataFrame:
    """Return the end points with a column `seconds`: steps at each size times what a step takes (`step_seconds`).

    lines: by the names in `ends`; every one of their sizes must be in `times`.
    """
    each = {(row.layers, row.width): row.seconds for row in times.itertuples()}

    def spent(row) -> float:
        line = lines[row.line]
        steps = (*line.steps, row.steps - sum(line.steps))
        return sum(count * each[size] for count, size in zip(steps, line.sizes, strict=True))

    return ends.assign(seconds=[spent(row) for row in ends.itertuples()])
