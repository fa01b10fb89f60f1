"""Hooks and replaced methods: refused before anything is done, but for those that change nothing."""

import functools

import pytest
import torch
from helpers.staged_runs import PLATEAU, recipe, run
from plain import staged as plain
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import GPT2LMHeadModel

from effnn import staged
from effnn.base import InvalidInput
from effnn.staged import Stage, TrainState


def nothing(*arguments, **named) -> None:
    """A hook that leaves everything as it is."""


def mlp(model: GPT2LMHeadModel) -> torch.nn.Module:
    return model.transformer.h[0].mlp


CHANGES = [
    (lambda model: mlp(model).register_forward_hook(nothing), "the module transformer.h.0.mlp has a hook .nothing.,"),
    (lambda model: mlp(model).register_forward_pre_hook(functools.partial(nothing, 1)), "h.0.mlp has a hook .nothing."),
    (lambda model: model.register_full_backward_hook(nothing), "the module GPT2LMHeadModel has a hook"),
    (lambda model: mlp(model).register_full_backward_pre_hook(nothing), "h.0.mlp has a hook"),
    (lambda model: mlp(model).c_fc.weight.register_hook(nothing), "parameter transformer.h.0.mlp.c_fc.weight has a"),
    (lambda model: mlp(model).c_fc.weight.register_post_accumulate_grad_hook(nothing), "h.0.mlp.c_fc.weight has a"),
    (
        lambda model: setattr(mlp(model), "forward", lambda x: 0 * x),
        r"mlp.forward was replaced on this .* `del model.get_submodule\('transformer.h.0.mlp'\).forward`, or",
    ),
    (lambda model: setattr(model, "forward", nothing), "forward was replaced on this module alone"),
    (lambda model: setattr(mlp(model).act, "forward", mlp(model).forward), "mlp.act.forward was replaced"),
]


@pytest.mark.parametrize(("change", "sentence"), CHANGES)
def test_what_growth_would_drop_is_refused(change, sentence, tmp_path):
    model, optimizer = plain.trained()
    change(model)
    state = TrainState(model, optimizer, PLATEAU, 1e-2)
    for call in (
        lambda: staged.grow(model, width=2),
        lambda: run(model, [Stage(1)], folder=tmp_path / "run"),
        lambda: run(state, [Stage(1)], folder=tmp_path / "run"),
    ):
        with pytest.raises(InvalidInput, match=sentence) as caught:
            call()
        assert "which neither growth nor a checkpoint carries over: " in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["register_step_pre_hook", "register_step_post_hook"])
def test_hooks_around_the_steps_of_the_optimizer_are_refused(kind):
    model, optimizer = plain.trained()
    handle = getattr(optimizer, kind)(nothing)
    state = TrainState(model, optimizer, PLATEAU, 1e-2)
    for call in (lambda: staged.grow(model, optimizer), lambda: run(state, [Stage(1)])):
        with pytest.raises(InvalidInput, match=r"the optimizer has a hook .nothing., .* call remove\(\) on its handle"):
            call()
    handle.remove()
    assert run(state, [Stage(1)]).step == 1


def test_hooks_of_the_libraries_that_change_nothing_are_let_through():
    model = plain.tiny_gpt2()
    model(input_ids=plain.tokens(), output_hidden_states=True)  # from now on each layer has a hook
    model.activation_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    assert len([module for module in model.modules() if module._forward_hooks]) > 1
    optimizer = AdamW(model.parameters())
    scheduler = LambdaLR(optimizer, PLATEAU)  # replaces optimizer.step
    assert staged.grow(model, optimizer, scheduler, width=2).scheduler is not None
    assert run(model, [Stage(1, width=2)], recipe()).step == 1
