"""How a run and each of its stages begin: a new training state, growth, the peak rate, the position in the schedule.

A run starts from a configuration, a model, or a state that another run returned. It is copied, never changed.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import GPT2Config, GPT2LMHeadModel

from effnn.base import InvalidInput
from effnn.staged.growth.depth import Layout, check_depth
from effnn.staged.growth.grow import grow
from effnn.staged.growth.hooks import check_optimizer_hooks
from effnn.staged.growth.module_settings import skeleton
from effnn.staged.growth.optimizer import names_by_group
from effnn.staged.growth.unwrap import check_model, plain_model, plain_optimizer, way_out
from effnn.staged.planning.learning_rate import Rewarmed
from effnn.staged.training.state import Recipe, Stage, TrainState


def plain_start(start: object) -> object:
    """The start of a run without wrappers (unwrap.py): a configuration, a model, or a new TrainState around them."""
    if isinstance(start, TrainState):
        return replace(start, model=plain_model(start.model), optimizer=plain_optimizer(start.optimizer))
    return plain_model(start)


def config_of(start: GPT2Config | GPT2LMHeadModel | TrainState) -> GPT2Config:
    """The configuration of what a run starts from."""
    return start if isinstance(start, GPT2Config) else getattr(start, "model", start).config


def checked_stages(
    start: GPT2Config | GPT2LMHeadModel | TrainState, stages: Sequence[Stage], recipe: Recipe
) -> tuple[Stage, ...]:
    """The stages, checked before any work is done.

    InvalidInput for no stages, a start of another kind, a model whose weights are of several types or all frozen, a
    first stage that grows a new model, growth that the architecture does not allow, and a state whose AdamW has other
    settings than the recipe.
    """
    stages = tuple(stages)
    if not stages or not all(isinstance(stage, Stage) for stage in stages):
        raise InvalidInput(f"expected a list of one or more Stage, found {stages!r}")
    if isinstance(start, GPT2Config):
        if stages[0].grows:
            raise InvalidInput("the first stage of a new model cannot grow: give the configuration of the grown size")
        if start.n_embd % start.n_head:
            raise InvalidInput(f"a width of n_embd={start.n_embd} does not divide into n_head={start.n_head} heads")
        model = skeleton(start)
    elif isinstance(start, (nn.Module, TrainState)):
        model = start.model if isinstance(start, TrainState) else start
        check_model(model)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise InvalidInput("requires_grad is False for all weights: nothing is left to train")
        if len(types := {str(parameter.dtype) for parameter in model.parameters()}) > 1:
            raise InvalidInput(f"the weights are of several types ({', '.join(sorted(types))}): convert them to one")
    else:
        found = f"{type(start).__name__}{way_out(start)}"
        raise InvalidInput(f"expected a GPT2Config, GPT2LMHeadModel or TrainState, found {found}")
    for stage in stages:
        check_depth(model, stage.depth, stage.init)
    if isinstance(start, TrainState):
        names_by_group(model, start.optimizer)
        check_optimizer_hooks(start.optimizer)
        for name in ("betas", "eps", "weight_decay"):
            # the settings of its groups, or the defaults that some groups replaced
            found = [_comparable(held[name]) for held in (*start.optimizer.param_groups, start.optimizer.defaults)]
            if (wanted := getattr(recipe, name)) not in found:
                kept = " and ".join(str(value) for value in dict.fromkeys(found[:-1]))
                raise InvalidInput(f"the recipe's {name} is {wanted}, the state's AdamW keeps its {kept}")
    return stages


def _comparable(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def begin(start: GPT2Config | GPT2LMHeadModel | TrainState, recipe: Recipe, device: torch.device) -> TrainState:
    """A state to train: a copy of the one given, or a new one, whose weights come from torch's global generator."""
    if isinstance(start, TrainState):
        copied = grow(start.model, start.optimizer)  # by factors of 1
        state = copy.copy(start)
        state.model, state.optimizer, state.points = copied.model.to(device), copied.optimizer, list(start.points)
        _move_moments(state.optimizer)
        for group in state.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])  # an AdamW that no scheduler has driven
        return state
    if isinstance(start, GPT2Config):
        torch.default_generator.manual_seed(recipe.seed)
        model = GPT2LMHeadModel(copy.deepcopy(start))
    else:
        model = grow(start).model
    model = model.to(device)
    optimizer = AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=recipe.learning_rate,
        betas=recipe.betas,
        eps=recipe.eps,
        weight_decay=recipe.weight_decay,
        fused=True if device.type == "cuda" else None,
    )
    for group in optimizer.param_groups:
        group["initial_lr"] = recipe.learning_rate
    return TrainState(model, optimizer, recipe.schedule, recipe.learning_rate)


def origin_of(layers: int, stages: Sequence[Stage]) -> Callable[[str], str]:
    """Name of a module after these stages -> name of its origin in the model of `layers` layers before them."""
    layouts = []
    for stage in stages:
        layouts.append(Layout.of(layers, stage.depth, stage.order))
        layers *= stage.depth

    def origin(name: str) -> str:
        for layout in reversed(layouts):
            name = layout.source(name)
        return name

    return origin


def enter(state: TrainState, stage: Stage, recipe: Recipe, batch: Tensor) -> None:
    """Begin a stage, in place. batch: token ids (rows, context), on which growth measures the loss for its record."""
    state.stage, state.stage_step = state.stage + 1, 0
    if stage.grows:
        grown = grow(state.model, state.optimizer, seed=recipe.seed + state.stage, batch=batch, **stage.growth)
        state.model, state.optimizer = grown.model, grown.optimizer
    if stage.learning_rate is not None:
        for group in state.optimizer.param_groups:
            group["initial_lr"] = stage.learning_rate * (group["initial_lr"] / state.learning_rate)
        state.learning_rate = stage.learning_rate
    if stage.entry is not None:
        state.position, state.rewarm = stage.entry, None
    if stage.rewarm:
        state.rewarm = (state.position, stage.rewarm)
    state.schedule = schedule_in_force(recipe.schedule, state.rewarm)


def schedule_in_force(schedule: Callable[[int], float], rewarm: tuple[int, int] | None) -> Callable[[int], float]:
    """The schedule, with its re-warm (entry, steps) where there is one."""
    return schedule if rewarm is None else Rewarmed(schedule, *rewarm)


def _move_moments(optimizer: AdamW) -> None:
    """Moments to the devices of their parameters; step counts stay on the CPU unless AdamW is fused."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for key, value in optimizer.state.get(parameter, {}).items():
                if key != "step" or group["fused"] or group["capturable"]:
                    optimizer.state[parameter][key] = value.to(parameter.device)
