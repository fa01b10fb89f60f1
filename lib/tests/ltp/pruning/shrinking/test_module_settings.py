"""Settings on modules survive shrinking and padding: the configuration knows of none of them."""

import pytest
import torch
from helpers.encoders import FAMILIES, LAYERS, difference, logits, tuned_masks
from torch import nn

from effnn.ltp.pruning.adapters import adapter_for
from effnn.ltp.pruning.masks import masked
from effnn.ltp.pruning.shrinking.shrink import pad, shrink


def settings_of(model, kind, key):
    return {name: getattr(module, key) for name, module in model.named_modules() if isinstance(module, kind)}


@pytest.mark.parametrize("name", FAMILIES)
def test_dropout_eps_and_modes_are_carried_over(name):
    model, batch = FAMILIES[name]()
    plain = logits(shrink(model, tuned_masks()), batch)
    for index, module in enumerate(model.modules()):
        if isinstance(module, nn.Dropout):
            module.p = index / 1000
        elif isinstance(module, nn.LayerNorm):
            module.eps = 0.01
    adapter_for(model).layers(model)[1].train()  # one layer alone
    small = shrink(model, tuned_masks("neither"))
    for again in (small, pad(small)):
        for kind, key in ((nn.Dropout, "p"), (nn.LayerNorm, "eps")):
            assert settings_of(again, kind, key) == settings_of(model, kind, key)
        layers = adapter_for(model).layers(model), [m for m in again.modules() if type(m).__name__.endswith("Layer")]
        modes = [[layer.training for layer in some] for some in (layers[0], layers[1][-LAYERS:])]
        assert modes[0] == [False, True, False] and (len(layers[1]) < LAYERS or modes[1] == modes[0])
    model.eval()
    with masked(model, tuned_masks()):
        expected = logits(model, batch)
    found = logits(shrink(model, tuned_masks()), batch)
    assert difference(found, expected) <= 1e-5 and difference(found, plain) > 1e-4


def test_gradient_checkpointing_is_carried_over_and_runs():
    model, batch = FAMILIES["bert"]()
    model.activation_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    model.bert.embeddings.requires_grad_(False)
    small = shrink(model.train(), tuned_masks())
    layers = small.bert.encoder.layer
    assert small.is_activation_checkpointing and all(layer.gradient_checkpointing for layer in layers)
    assert all(layer._gradient_checkpointing_func.keywords == {"use_reentrant": True} for layer in layers)
    small(**batch).loss.backward()
    assert layers[0].output.dense.weight.grad.abs().sum() > 0
    model.activation_checkpointing_disable()
    assert not shrink(model, tuned_masks()).is_activation_checkpointing


def test_sizes_are_those_of_the_cut_maps():
    model, _ = FAMILIES["bert"]()
    small = shrink(model, tuned_masks())
    for module in small.modules():
        if isinstance(module, nn.Linear):
            assert (module.out_features, module.in_features) == tuple(module.weight.shape)
    assert all(torch.equal(one, other) for one, other in zip(pad(small).buffers(), model.buffers(), strict=True))
