"""Settings on the modules that the configuration does not know: after growth, after a resume, and refusals."""

import functools

import pytest
import torch
from helpers.staged_runs import Interrupted, assert_same, interrupt_at
from plain import staged as plain
from torch import nn
from transformers import GPT2LMHeadModel
from transformers.activations import ACT2FN
from workers import staged_train as worker

from effnn import staged
from effnn.base import InvalidInput
from effnn.staged import Stage

STAGES = [Stage(4), Stage(3, width=2, depth=2), Stage(2, depth=2, order="append")]


def model(seed: int = 0, **settings) -> GPT2LMHeadModel:
    """A model with dropout in its configuration."""
    torch.manual_seed(seed)
    return GPT2LMHeadModel(worker.config(**settings))


def no_dropout(given: GPT2LMHeadModel) -> None:
    for module in given.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def dropout_of_one_layer(given: GPT2LMHeadModel) -> None:
    given.transformer.h[1].mlp.dropout.p = 0.5


def another_eps(given: GPT2LMHeadModel) -> None:
    given.transformer.h[0].ln_2.eps = 1e-2


def unscaled_scores(given: GPT2LMHeadModel) -> None:
    given.transformer.h[1].attn.scaling = 1.0


def a_configuration_changed_afterwards(given: GPT2LMHeadModel) -> None:
    given.config.resid_pdrop = given.config.layer_norm_epsilon = 0.3  # the modules keep what they were built with


def recomputed(given: GPT2LMHeadModel) -> None:
    given.activation_checkpointing_enable({"use_reentrant": True})


def recomputed_every_second(given: GPT2LMHeadModel) -> None:
    no_dropout(given)
    given.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False}, every_n_layers=2)


def frozen_below_recomputed(given: GPT2LMHeadModel) -> None:
    """The hook that keeps gradients flowing over frozen embeddings must stay as well."""
    given.transformer.wte.weight.requires_grad_(False)
    given.transformer.wpe.weight.requires_grad_(False)
    recomputed(given)


CHANGES = [
    *(no_dropout, dropout_of_one_layer, another_eps, unscaled_scores, a_configuration_changed_afterwards),
    *(recomputed, recomputed_every_second, frozen_below_recomputed),
]


def settings(given: GPT2LMHeadModel) -> dict[str, list]:
    """What the tests here change, by name of the module."""
    names = ("p", "eps", "scaling", "gradient_checkpointing")
    return {
        name: [getattr(module, key, None) for key in names]
        + [getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", None)]
        for name, module in given.named_modules()
    }


@pytest.fixture(scope="module")
def plainly():
    """The run of a model on which nothing was set."""
    torch.set_num_threads(1)
    return worker.run(None, model(), STAGES, worker.recipe(checkpoint_every=3))


@pytest.mark.parametrize("change", CHANGES)
def test_a_resume_gives_the_same_bits_whatever_was_set_on_the_modules(tmp_path, monkeypatch, change, plainly):
    start, how = model(), worker.recipe(checkpoint_every=3)
    change(start)
    before = settings(start)
    whole = worker.run(None, start, STAGES, how)
    curves = [[point.validation_loss for point in state.points] for state in (whole, plainly)]
    assert (curves[0] == curves[1]) == (change in (recomputed, a_configuration_changed_afterwards))
    for steps in (5, 2, 2):  # in each stage once
        with pytest.raises(Interrupted), monkeypatch.context() as patch:
            interrupt_at(patch, steps)
            worker.run(tmp_path, start, STAGES, how)
    resumed = worker.run(tmp_path, start, STAGES, how)
    assert_same(resumed, whole)
    assert settings(resumed.model) == settings(whole.model) and settings(start) == before
    assert settings(worker.run(tmp_path, start, STAGES, how).model) == settings(whole.model)  # only loaded


@pytest.mark.parametrize(
    "growth", [{"width": 2}, {"depth": 2}, {"depth": 3, "order": "append"}, {"width": 2, "depth": 2}]
)
def test_growth_carries_settings_from_layer_to_layer(growth):
    small = model(n_layer=3)
    small.activation_checkpointing_enable({"use_reentrant": True, "determinism_check": "none"}, every_n_layers=2)
    small.transformer.h[2].ln_1.eps = 1e-3
    small.transformer.drop.p = 0.25
    small.transformer.h[1].eval()
    grown = staged.grow(small, **growth).model
    layers, depth = len(grown.transformer.h), growth.get("depth", 1)
    for i, layer in enumerate(grown.transformer.h):
        source = small.transformer.h[i % 3 if growth.get("order") == "append" else i // depth]
        assert layer.gradient_checkpointing == source.gradient_checkpointing
        assert layer._gradient_checkpointing_func.keywords == {"use_reentrant": True, "determinism_check": "none"}
        assert (layer.ln_1.eps, layer.attn.training) == (source.ln_1.eps, source.attn.training)
        assert layer.attn.layer_idx == i  # what belongs to the place is the grown model's own
    assert layers == 3 * depth and grown.transformer.drop.p == 0.25
    assert grown.transformer.h[0].attn.num_heads == 2 * growth.get("width", 1)


def test_a_checkpointing_function_of_ones_own_is_kept():
    small = model()
    small.activation_checkpointing_enable(offload=True)
    function = small.transformer.h[0]._gradient_checkpointing_func
    grown = staged.grow(small, depth=2).model
    assert isinstance(function, functools.partial) and grown.transformer.h[3]._gradient_checkpointing_func is function
    small.activation_checkpointing_disable()
    assert not staged.grow(small, depth=2).model.is_activation_checkpointing


class Named(GPT2LMHeadModel):
    """A model of one's own, with the stock tensors."""


def test_a_class_of_ones_own_is_loaded_as_such(tmp_path, monkeypatch):
    start = Named(worker.config())
    with pytest.raises(Interrupted), monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        worker.run(tmp_path, start, STAGES, worker.recipe(checkpoint_every=3))
    assert type(worker.run(tmp_path, start, STAGES, worker.recipe(checkpoint_every=3)).model) is Named


def quantized(given: GPT2LMHeadModel) -> GPT2LMHeadModel:
    given.lm_head = torch.ao.nn.quantized.dynamic.Linear(16, 40, bias_=False)
    return given


def replaced(path: str, module: nn.Module) -> GPT2LMHeadModel:
    given = model()
    given.set_submodule(path, module)
    return given


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: replaced("transformer.drop", nn.Identity()),
            "transformer.drop is of type Identity .* Dropout, .* set p=0",
        ),
        (lambda: replaced("transformer.h.0.mlp.act", nn.ReLU()), "mlp.act is of type ReLU .* change the configuration"),
        (lambda: replaced("transformer.h.1.extra", nn.Tanh()), "h.1.extra is of type Tanh where .* makes no module"),
        (
            lambda: quantized(model()),
            r"lm_head is of type torch.ao.* makes torch.nn.modules.linear.Linear.* before it was quantized",
        ),
    ],
)
def test_modules_that_the_configuration_does_not_make_are_refused(make, sentence):
    for call in (lambda: staged.grow(make(), width=2), lambda: worker.run(None, make(), [Stage(1)])):
        with pytest.raises(InvalidInput, match=sentence):
            call()


def test_the_way_out_of_the_refusal_works():
    given = model(activation_function="relu")
    given.transformer.drop.p = 0.0
    grown = staged.grow(given, width=2, noise=0.0).model
    assert isinstance(grown.transformer.h[0].mlp.act, type(ACT2FN["relu"])) and grown.transformer.drop.p == 0.0
    batch = plain.tokens()
    assert staged.evaluate_loss(grown, batch) == pytest.approx(staged.evaluate_loss(given, batch), abs=1e-5)
