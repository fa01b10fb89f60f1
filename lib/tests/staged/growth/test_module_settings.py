"""Settings on the modules that the configuration does not know: after growth, after a resume, and refusals."""

import copy
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


class Scaled(GPT2LMHeadModel):
    """A model with stock tensors, whose own settings change what it computes."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.scale, self.shifts, self._power, self.then = 1.0, {"logits": [0.0]}, 1, torch.tanh

    def forward(self, *arguments, **named):
        output = super().forward(*arguments, **named)
        output.logits = self.scale * output.logits**self._power + self.shifts["logits"][-1]
        return output


SETTINGS = {"scale": 0.1, "shifts": {"logits": [0.0, 0.5]}, "_power": 3}


def scaled(names=tuple(SETTINGS), **changes) -> Scaled:
    torch.manual_seed(0)
    given = Scaled(worker.plain_config())
    for name in names:
        setattr(given, name, copy.deepcopy(SETTINGS[name]))
    for name, value in changes.items():
        setattr(given, name, value)
    return given


def held(given: Scaled) -> dict:
    return {name: getattr(given, name) for name in SETTINGS}


def test_growth_carries_the_settings_of_a_subclass():
    small, batch = scaled(), plain.tokens()
    grown = staged.grow(small, width=2, depth=2, noise=0.0).model
    assert type(grown) is Scaled and held(grown) == SETTINGS
    assert staged.evaluate_loss(grown, batch) == pytest.approx(staged.evaluate_loss(small, batch), abs=1e-5)
    assert staged.evaluate_loss(scaled(()), batch) != pytest.approx(staged.evaluate_loss(small, batch), abs=1e-3)
    grown.shifts["logits"].append(7.0)
    assert held(small) == SETTINGS  # nothing is shared


def test_a_subclass_is_loaded_as_such_with_its_settings(tmp_path, monkeypatch):
    start, how = scaled(), worker.recipe(checkpoint_every=3)
    with pytest.raises(Interrupted), monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        worker.run(tmp_path, start, STAGES, how)
    resumed = worker.run(tmp_path, start, STAGES, how)
    assert type(resumed.model) is Scaled and held(resumed.model) == SETTINGS
    assert_same(resumed, worker.run(None, start, STAGES, how))
    for name in SETTINGS:
        with pytest.raises(InvalidInput, match=f"holds another run: setting {name} was .*, is absent. Give"):
            worker.run(tmp_path, scaled([other for other in SETTINGS if other != name]), STAGES, how)


class PerLayer(GPT2LMHeadModel):
    def __init__(self, config) -> None:
        super().__init__(config)
        self.scales = [1.0] * config.n_layer


def test_a_changed_setting_that_depends_on_the_size_is_refused_in_growth_alone():
    small = PerLayer(worker.config())
    assert staged.grow(small, depth=2).model.scales == [1.0] * 4  # unchanged, it follows from the configuration
    small.scales = [1.0, 0.5]
    assert staged.grow(small, width=2).model.scales == [1.0, 0.5]
    sentence = r"scales was set to \[1.0, 0.5\] where .* \[1.0, 1.0\], and after growth it gives \[1.0, 1.0, 1.0, 1.0\]"
    with pytest.raises(InvalidInput, match=sentence):
        staged.grow(small, depth=2)


class Needy(GPT2LMHeadModel):
    def __init__(self, config, scale) -> None:
        super().__init__(config)


class Failing(GPT2LMHeadModel):
    def __init__(self, config) -> None:
        super().__init__(config)
        self.scale = self.lm_head.weight.sum().item()  # there are no values yet


def failing() -> Failing:
    given = model()
    given.__class__ = Failing
    return given


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Needy(worker.config(), 1.0), "Needy cannot be built .* alone .*'scale'.: let its __init__ take"),
        (failing, "Failing cannot be built from its configuration alone .* let its __init__ take"),
        (lambda: scaled(table=torch.ones(1)), r"table holds a Tensor: carried over are .* where Scaled.config. makes"),
        (lambda: scaled(then=torch.relu), "then holds a builtin_function_or_method: .* or delete it before"),
        (lambda: scaled(scale=[torch.ones(1)]), "scale holds a list: "),
    ],
)
def test_subclasses_that_cannot_be_rebuilt_are_refused(make, sentence):
    for call in (lambda: staged.grow(make(), width=2), lambda: worker.run(None, make(), [Stage(1)])):
        with pytest.raises(InvalidInput, match=sentence):
            call()


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
