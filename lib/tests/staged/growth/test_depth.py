"""Growth in depth: exactness, the place and content of new layers, and refusals."""

import pytest
import torch
from plain import staged as plain

from effnn import staged
from effnn.base import InvalidInput
from effnn.staged.growth.depth import Layout

EXACT = ("zero_proj", "ln_zero", "identity")


def logits(model, batch):
    with torch.no_grad():
        return model(input_ids=batch).logits


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", staged.ORDERS)
@pytest.mark.parametrize("init", EXACT)
@pytest.mark.parametrize("depth", [2, 3])
def test_exact_inits_are_exact_to_the_bit(depth, init, order, dtype):
    model, batch = plain.tiny_gpt2(dtype=dtype), plain.tokens()
    grown = staged.grow(model, depth=depth, init=init, order=order).model
    assert grown.config.n_layer == len(grown.transformer.h) == 2 * depth
    assert torch.equal(logits(grown, batch), logits(model, batch))


@pytest.mark.parametrize("order", staged.ORDERS)
def test_copy_is_not_function_preserving(order):
    model, batch = plain.tiny_gpt2(), plain.tokens()
    grown = staged.grow(model, depth=2, init="copy", order=order, batch=batch)
    assert abs(grown.record[0].loss_after - grown.record[0].loss_before) > 1e-3


@pytest.mark.parametrize(
    ("order", "sources", "new"),
    [
        ("interleave", [0, 0, 0, 1, 1, 1, 2, 2, 2], [0, 1, 1, 0, 1, 1, 0, 1, 1]),
        ("append", [0, 1, 2, 0, 1, 2, 0, 1, 2], [0, 0, 0, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_layers_stand_where_the_order_says(order, sources, new):
    model = plain.tiny_gpt2(n_layer=3)
    with torch.no_grad():
        for tag, layer in enumerate(model.transformer.h):
            layer.mlp.c_fc.bias.fill_(tag)
    grown = staged.grow(model, depth=3, init="zero_proj", order=order).model
    assert [int(layer.mlp.c_fc.bias[0]) for layer in grown.transformer.h] == sources
    assert [int(not layer.mlp.c_proj.weight.any()) for layer in grown.transformer.h] == new
    layout = Layout.of(3, 3, order)
    assert (list(layout.sources), [int(n) for n in layout.new]) == (sources, new)
    assert [layer.attn.layer_idx for layer in grown.transformer.h] == list(range(9))


def test_what_new_layers_hold():
    model = plain.tiny_gpt2(n_inner=24)
    source = dict(model.transformer.h[1].named_parameters())
    new = {
        init: dict(staged.grow(model, depth=2, init=init).model.transformer.h[3].named_parameters())
        for init in staged.INITS
    }
    for name, value in source.items():
        ends = "c_proj" in name
        assert torch.equal(new["copy"][name], value)
        assert torch.equal(new["zero_proj"][name], torch.zeros_like(value) if ends else value)
        assert torch.equal(new["ln_zero"][name], value if value.dim() == 2 else torch.zeros_like(value))
        if value.dim() == 1:
            assert not new["identity"][name].any()
    eye = {name: tensor for name, tensor in new["identity"].items() if tensor.dim() == 2}
    assert torch.equal(eye["attn.c_attn.weight"], torch.eye(16).double().repeat(1, 3))
    assert torch.equal(eye["attn.c_proj.weight"], torch.eye(16).double())
    assert torch.equal(eye["mlp.c_fc.weight"], torch.eye(16, 24).double())
    assert torch.equal(eye["mlp.c_proj.weight"], torch.eye(24, 16).double())


@pytest.mark.parametrize(("init", "share"), [("zero_proj", 0.41), ("ln_zero", 0.014), ("identity", 0.01)])
def test_which_new_parameters_get_a_gradient(init, share):
    model = plain.tiny_gpt2(n_embd=32)
    grown = staged.grow(model, depth=2, init=init).model
    plain.gradients(grown, plain.tokens(rows=32))
    new = [p for layer in (1, 3) for p in grown.transformer.h[layer].parameters()]
    with_gradient = [p for p in new if p.grad.any()]
    assert (init == "zero_proj") == any(p.dim() == 2 for p in with_gradient)
    found = sum(int((p.grad != 0).sum()) for p in new) / sum(p.numel() for p in new)
    assert abs(found - share) < 0.03


def test_four_is_twice_two():
    model = plain.tiny_gpt2()
    four = staged.grow(model, depth=4).model
    twice = staged.grow(staged.grow(model, depth=2).model, depth=2).model
    assert all(torch.equal(a, b) for a, b in zip(four.parameters(), twice.parameters(), strict=True))


@pytest.mark.parametrize("order", staged.ORDERS)
@pytest.mark.parametrize("init", EXACT)
def test_compound_growth_is_exact_in_either_order(init, order):
    model, batch = plain.tiny_gpt2(), plain.tokens()
    both = staged.grow(model, width=2, depth=2, init=init, order=order).model
    wide_first = staged.grow(staged.grow(model, width=2).model, depth=2, init=init, order=order).model
    deep_first = staged.grow(staged.grow(model, depth=2, init=init, order=order).model, width=2).model
    assert all(torch.equal(a, b) for a, b in zip(both.parameters(), wide_first.parameters(), strict=True))
    for grown in (both, deep_first):
        assert (logits(grown, batch) - logits(model, batch)).abs().max() <= 1e-10


@pytest.mark.parametrize(("init", "equal"), [("zero_proj", True), ("ln_zero", True), ("identity", False)])
def test_the_order_of_compound_growth_changes_only_rectangular_identities(init, equal):
    model = plain.tiny_gpt2()
    wide_first = dict(staged.grow(model, width=2, depth=2, init=init, noise=0.0).model.named_parameters())
    deep = staged.grow(model, depth=2, init=init).model
    deep_first = dict(staged.grow(deep, width=2, noise=0.0).model.named_parameters())
    unequal = {name for name in wide_first if not torch.equal(wide_first[name], deep_first[name])}
    assert unequal == (
        set() if equal else {f"transformer.h.{i}.mlp.{m}.weight" for i in (1, 3) for m in ("c_fc", "c_proj")}
    )


def test_refusals():
    model = plain.tiny_gpt2()
    with pytest.raises(InvalidInput, match="init='zero': expected one of zero_proj, ln_zero, identity, copy"):
        staged.grow(model, depth=2, init="zero")
    with pytest.raises(InvalidInput, match="order='top': expected one of interleave, append"):
        staged.grow(model, depth=2, order="top")
    with pytest.raises(InvalidInput, match="index of their layer"):
        staged.grow(plain.tiny_gpt2(scale_attn_by_inverse_layer_idx=True), depth=2)


def test_identity_needs_an_activation_that_keeps_zero():
    model, batch = plain.tiny_gpt2(activation_function="sigmoid"), plain.tokens()
    for init in ("identity", "ln_zero"):
        with pytest.raises(InvalidInput, match="sigmoid"):
            staged.grow(model, depth=2, init=init)
    assert torch.equal(logits(staged.grow(model, depth=2).model, batch), logits(model, batch))
