"""Short runs of the staged trainer in memory, how two states are compared, and a run that is interrupted."""

import copy
import dataclasses
from pathlib import Path

import torch
from plain import staged as plain
from transformers import GPT2Config

from effnn import staged
from effnn.staged import Recipe, WarmupStableDecay, train
from effnn.staged.training.step import Stepper

CONTEXT = plain.LENGTH
TOKENS = torch.randint(0, plain.VOCABULARY, (2000,), generator=torch.Generator().manual_seed(1))
VALIDATION = TOKENS[:400]
PLATEAU = WarmupStableDecay(warmup=3, horizon=1000, decay=0)


def config(**settings) -> GPT2Config:
    return copy.deepcopy(plain.tiny_gpt2(**settings).config)


def recipe(**changes) -> Recipe:
    given = {"batch_size": 4, "context": CONTEXT, "learning_rate": 1e-2, "schedule": PLATEAU}
    return Recipe(**{**given, "evaluate_every": 5, "evaluate_sequences": 8, **changes})


def run(start, stages, how=None, **options) -> staged.TrainState:
    return train(start, stages, how or recipe(), TOKENS, VALIDATION, progress=False, **options)


def weights(state: staged.TrainState) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in state.model.parameters()])


def moments(state: staged.TrainState) -> torch.Tensor:
    return torch.cat([value.flatten() for entry in state.optimizer.state.values() for value in entry.values()])


def points(state: staged.TrainState) -> list[staged.Point]:
    """The curve without the seconds, which no two runs share."""
    return [dataclasses.replace(point, seconds=0.0) for point in state.points]


def same(a: staged.TrainState, b: staged.TrainState) -> bool:
    numbers = ("step", "position", "stage", "tokens", "flops", "flops_full", "learning_rate", "rewarm", "schedule")
    return (
        torch.equal(weights(a), weights(b))
        and torch.equal(moments(a), moments(b))
        and points(a) == points(b)
        and all(getattr(a, name) == getattr(b, name) for name in numbers)
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_same(a, b) -> None:
    """Two states are equal to the last bit, but for the seconds."""
    curves = [[dataclasses.replace(point, seconds=0.0) for point in state.points] for state in (a, b)]
    assert curves[0] == curves[1]
    for name in ("step", "position", "stage", "stage_step", "tokens", "flops", "flops_full", "rewarm", "schedule"):
        assert getattr(a, name) == getattr(b, name), name
    assert a.history == b.history and a.learning_rate == b.learning_rate
    for (name, one), (_, two) in zip(a.model.named_parameters(), b.model.named_parameters(), strict=True):
        assert torch.equal(one, two), name
        states = a.optimizer.state[one], b.optimizer.state[two]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0]), name
    groups = [
        [{key: value for key, value in group.items() if key != "params"} for group in state.optimizer.param_groups]
        for state in (a, b)
    ]
    assert groups[0] == groups[1]


class Interrupted(Exception):
    """Ends a run from inside, as Ctrl-C does."""


def interrupt_at(monkeypatch, step: int) -> None:
    """Let the next run end in the middle of its step number `step`, counted from its own start."""
    before, calls = Stepper.__call__, []

    def counting(self, batch):
        calls.append(None)
        if len(calls) > step:
            raise Interrupted
        return before(self, batch)

    monkeypatch.setattr(Stepper, "__call__", counting)
