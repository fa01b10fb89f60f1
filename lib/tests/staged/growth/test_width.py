"""Growth in width: exactness, gradients, the authors' arithmetic, symmetry and the noise that breaks it."""

import pytest
import torch
from plain import staged as plain

from effnn import staged
from effnn.base import InvalidInput
from effnn.staged.growth.roles import Kind, Role, role_of
from effnn.staged.growth.width import add_noise_, widen


def logits(model, batch):
    with torch.no_grad():
        return model(input_ids=batch).logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("noise", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("width", [2, 3, 4])
def test_logits_are_equal_in_float64(width, noise, tied):
    model, batch = plain.tiny_gpt2(tie_word_embeddings=tied), plain.tokens()
    grown = staged.grow(model, width=width, noise=noise).model
    assert (grown.config.n_embd, grown.config.n_head) == (16 * width, 2 * width)
    assert (logits(grown, batch) - logits(model, batch)).abs().max() <= 1e-10


@pytest.mark.parametrize(("inner", "wide"), [(None, None), (24, 48)])
def test_n_inner_follows_the_width(inner, wide):
    model, batch = plain.tiny_gpt2(n_inner=inner), plain.tokens()
    grown = staged.grow(model, width=2).model
    assert grown.config.n_inner == wide
    assert (logits(grown, batch) - logits(model, batch)).abs().max() <= 1e-10


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_float32_keeps_logits_and_loss(noise):
    model, batch = plain.tiny_gpt2(dtype=torch.float32), plain.tokens()
    grown = staged.grow(model, width=2, noise=noise, batch=batch)
    small = logits(model, batch)
    assert ((logits(grown.model, batch) - small).abs() <= 1e-4 * (1 + small.abs())).all()
    assert abs(grown.record[0].loss_after - grown.record[0].loss_before) <= 1e-5


@pytest.mark.parametrize(("noise", "bound"), [(0.0, 1e-3), (0.3, 5e-3)])
@pytest.mark.parametrize("width", [2, 3])
def test_bfloat16_keeps_the_loss(width, noise, bound):
    model, batch = plain.tiny_gpt2(dtype=torch.bfloat16), plain.tokens(rows=16)
    grown = staged.grow(model, width=width, noise=noise, batch=batch)
    assert {p.dtype for p in grown.model.parameters()} == {torch.bfloat16}
    assert abs(grown.record[0].loss_after - grown.record[0].loss_before) <= bound


def test_scores_scaled_by_layer_do_not_hinder_width():
    model, batch = plain.tiny_gpt2(scale_attn_by_inverse_layer_idx=True), plain.tokens()
    assert (logits(staged.grow(model, width=2).model, batch) - logits(model, batch)).abs().max() <= 1e-10


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("width", [2, 3])
def test_true_gradients_of_every_tensor(width, tied):
    model, batch = plain.tiny_gpt2(tie_word_embeddings=tied), plain.tokens()
    grown = staged.grow(model, width=width, noise=0.0).model
    small, large = plain.gradients(model, batch), plain.gradients(grown, batch)
    assert set(small) == set(large) and len(small) == (28 if tied else 29)
    for name, gradient in small.items():
        assert gradient.abs().max() > 1e-6, name
        torch.testing.assert_close(large[name], plain.true_gradient(name, gradient, width), rtol=0, atol=1e-13)


@pytest.mark.parametrize("tied", [True, False])
def test_values_are_those_of_the_authors_arithmetic(tied):
    model = plain.tiny_gpt2(tie_word_embeddings=tied, n_inner=24)
    grown = staged.grow(model, width=2, noise=0.0).model
    expected = plain.doubled_values(dict(model.named_parameters()))
    found = dict(grown.named_parameters())
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_four_is_twice_two():
    model = plain.tiny_gpt2()
    four = staged.grow(model, width=4, noise=0.0).model
    twice = staged.grow(staged.grow(model, width=2, noise=0.0).model, width=2, noise=0.0).model
    assert all(torch.equal(a, b) for a, b in zip(four.parameters(), twice.parameters(), strict=True))


def test_gradients_keep_the_norm_that_clipping_weighs():
    model, batch = plain.tiny_gpt2(), plain.tokens()
    grown = staged.grow(staged.grow(model, width=2, noise=0.0).model, width=3, noise=0.0).model
    plain.gradients(model, batch), plain.gradients(grown, batch)
    small = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert torch.isclose(staged.gradient_norm(model), small, rtol=1e-12)
    assert torch.isclose(staged.gradient_norm(grown), small, rtol=1e-12)
    assert not torch.isclose(staged.gradient_norm(grown, width=1), small, rtol=1e-2)
    norm = staged.clip_grad_norm_(grown, float(small) / 2)
    assert torch.isclose(norm, small) and torch.isclose(staged.gradient_norm(grown), small / 2, rtol=1e-5)


def halves_differ(model) -> float:
    first, second = model.transformer.wte.weight.detach().chunk(2, dim=1)
    return float((first - second).abs().max())


@pytest.mark.parametrize(("noise", "apart"), [(0.0, False), (0.3, True)])
def test_only_noise_breaks_the_symmetry(noise, apart):
    model, optimizer = plain.trained()
    grown = staged.grow(model, optimizer, width=2, noise=noise)
    assert halves_differ(grown.model) == 0
    plain.train(grown.model, grown.optimizer, 40)
    assert halves_differ(grown.model) > 1e-3 if apart else halves_differ(grown.model) < 1e-12


def test_noise_touches_matrices_only_and_has_the_size_asked_for():
    model = plain.tiny_gpt2(n_embd=64)
    plain_grown = dict(staged.grow(model, width=2, noise=0.0).model.named_parameters())
    for name, noisy in staged.grow(model, width=2, noise=0.5).model.named_parameters():
        noise = (noisy - plain_grown[name]).detach()
        if role_of(name).kind is Kind.MATRIX:
            assert 0.45 < float(noise.std() / plain_grown[name].detach().std()) < 0.55, name
            assert (noise[: len(noise) // 2] + noise[len(noise) // 2 :]).abs().max() < 1e-15
        else:
            assert not noise.any(), name


@pytest.mark.parametrize("factor", [2, 3, 5])
def test_draws_cancel_over_the_input_copies(factor):
    role = Role(Kind.MATRIX)
    wide = widen(torch.randn(40, 60, dtype=torch.float64), role, factor)
    noisy = wide.clone()
    add_noise_(noisy, role, factor, 0.3, torch.Generator().manual_seed(0))
    draws = (noisy - wide).view(factor, 40, -1)
    assert draws.sum(0).abs().max() < 1e-14
    assert ((draws.std(dim=(1, 2)) / wide.std() - 0.3).abs() < 0.02).all()  # alike in all copies, the last one too


def test_noise_is_on_by_default_only_without_dropout():
    assert staged.grow(plain.tiny_gpt2(), width=2).record[0].noise == 0.3
    assert staged.grow(plain.tiny_gpt2(resid_pdrop=0.1), width=2).record[0].noise == 0
    assert staged.grow(plain.tiny_gpt2(resid_pdrop=0.1), width=2, noise=0.1).record[0].noise == 0.1


def test_noise_follows_its_seed_and_no_global_state():
    model, before = plain.tiny_gpt2(), torch.get_rng_state()
    one, same, other = (staged.grow(model, width=2, seed=seed).model for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    weights = [m.transformer.h[0].mlp.c_fc.weight for m in (one, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_dropout_and_train_mode_stay():
    model, batch = plain.tiny_gpt2(embd_pdrop=0.1, attn_pdrop=0.1, resid_pdrop=0.1).train(), plain.tokens()
    model.transformer.h[1].attn.resid_dropout.p = 0.25
    model.transformer.h[0].eval()
    grown = staged.grow(model, width=2, batch=batch)
    assert [m.training for m in grown.model.modules()] == [m.training for m in model.modules()]
    assert grown.model.training and not grown.model.transformer.h[0].training
    assert grown.model.transformer.h[1].attn.resid_dropout.p == 0.25
    assert abs(grown.record[0].loss_after - grown.record[0].loss_before) < 1e-12  # measured in eval mode
    with torch.no_grad():
        draws = [[float(plain.loss_of(m.train(), batch)) for _ in range(20)] for m in (model, grown.model)]
    small, large = torch.tensor(draws).mean(1)
    assert abs(small - large) < 0.1


@pytest.mark.parametrize("factor", [0, -1, 1.5, 2.0, True, "2", None])
def test_a_factor_is_a_whole_number_of_at_least_one(factor):
    model = plain.tiny_gpt2()
    for name in ("width", "depth"):
        with pytest.raises(InvalidInput, match=f"{name}=.*whole number"):
            staged.grow(model, **{name: factor})


@pytest.mark.parametrize("noise", [-0.1, 1.5, True, "0.3"])
def test_noise_out_of_range(noise):
    with pytest.raises(InvalidInput, match="from 0 to 1"):
        staged.grow(plain.tiny_gpt2(), width=2, noise=noise)


def test_the_plain_gradient_table_is_no_tautology():
    """The authors' block-diagonal moments miss what autograd finds outside the diagonal."""
    model, batch = plain.tiny_gpt2(), plain.tokens()
    grown = staged.grow(model, width=2, noise=0.0).model
    large = plain.gradients(grown, batch)
    diagonal = plain.doubled_moments(plain.gradients(model, batch), power=1)
    agree = [name for name in large if torch.allclose(large[name], diagonal[name], rtol=0, atol=1e-12)]
    assert len(large) == 28 and len(agree) == 20
