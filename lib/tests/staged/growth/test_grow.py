"""The one call: originals untouched, modes kept, save and load in stock transformers, records, refusals."""

import copy
import json

import pytest
import torch
from plain import staged as plain
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model, LlamaConfig, LlamaForCausalLM

from effnn import staged
from effnn.base import InvalidInput
from effnn.staged.growth.roles import role_of


def logits(model, batch):
    with torch.no_grad():
        return model(input_ids=batch).logits


def tensors(model, optimizer) -> dict[str, torch.Tensor]:
    """Every tensor of a training state, by name."""
    found = dict(model.named_parameters())
    for name, parameter in model.named_parameters():
        found |= {f"{name} {key}": value for key, value in optimizer.state[parameter].items()}
    return found


@pytest.mark.parametrize("factors", [{}, {"width": 2}, {"depth": 2}, {"width": 2, "depth": 2, "init": "copy"}])
def test_originals_stay_bit_for_bit_and_share_no_storage(factors):
    model, optimizer = plain.trained()
    scheduler = LambdaLR(optimizer, lambda step: 1.0)
    config, before = model.config.to_dict(), copy.deepcopy(tensors(model, optimizer))
    settings = copy.deepcopy(optimizer.state_dict()["param_groups"])
    grown = staged.grow(model, optimizer, scheduler, batch=plain.tokens(), **factors)
    new = {value.untyped_storage().data_ptr() for value in tensors(grown.model, grown.optimizer).values()}
    assert not new & {value.untyped_storage().data_ptr() for value in tensors(model, optimizer).values()}
    plain.train(grown.model, grown.optimizer, 2, scheduler=grown.scheduler)
    after = tensors(model, optimizer)
    assert set(after) == set(before) and all(torch.equal(after[name], value) for name, value in before.items())
    assert model.config.to_dict() == config and optimizer.state_dict()["param_groups"] == settings
    assert not model.training


def test_factors_of_one_give_equal_copies():
    model, optimizer = plain.trained()
    scheduler = LambdaLR(optimizer, lambda step: 0.9**step)
    grown = staged.grow(model, optimizer, scheduler)
    copies, originals = tensors(grown.model, grown.optimizer), tensors(model, optimizer)
    assert set(copies) == set(originals) and all(torch.equal(copies[name], originals[name]) for name in originals)
    assert grown.optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert grown.record == () and staged.history(grown.model.config) == ()
    assert grown.model is not model and grown.optimizer is not optimizer and grown.scheduler is not scheduler


def test_alone_the_model_grows_alone():
    grown = staged.grow(plain.tiny_gpt2(), width=2)
    assert grown.optimizer is None and grown.scheduler is None
    with pytest.raises(InvalidInput, match="another optimizer"):
        model, optimizer = plain.trained()
        staged.grow(model, scheduler=LambdaLR(optimizer, lambda step: 1.0), width=2)


@pytest.mark.parametrize("tied", [True, False])
def test_head_stays_tied_or_untied_through_growth_training_and_disk(tied, tmp_path):
    model, optimizer = plain.trained(tie_word_embeddings=tied, dtype=torch.float32)
    grown = staged.grow(model, optimizer, width=2, depth=2)
    plain.train(grown.model, grown.optimizer, 2)
    grown.model.save_pretrained(tmp_path)
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path)
    for each in (grown.model, loaded):
        assert (each.lm_head.weight is each.transformer.wte.weight) == tied
        assert (each.lm_head.weight.data_ptr() == each.transformer.wte.weight.data_ptr()) == tied
    batch = plain.tokens()
    assert type(grown.model) is GPT2LMHeadModel
    assert torch.equal(logits(loaded, batch), logits(grown.model, batch))
    assert loaded.config.n_layer == 4 and loaded.config.n_embd == 32


def test_a_model_from_disk_grows_and_comes_back(tmp_path):
    plain.tiny_gpt2(dtype=torch.float32, n_inner=24).save_pretrained(tmp_path / "small")
    model, batch = GPT2LMHeadModel.from_pretrained(tmp_path / "small"), plain.tokens()
    grown = staged.grow(model, width=3, depth=2).model
    assert (logits(grown, batch) - logits(model, batch)).abs().max() < 1e-4
    grown.save_pretrained(tmp_path / "grown")
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "grown")
    assert torch.equal(logits(loaded, batch), logits(grown, batch))
    again = staged.grow(loaded, width=2, noise=0.0).model
    assert [(r.op, r.factor) for r in staged.history(again.config)] == [("width", 3), ("depth", 2), ("width", 2)]
    assert staged.total_width(again.config) == 6
    ids = batch[:1, :4]
    settings = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(loaded.generate(ids, **settings), model.generate(ids, **settings))  # the cache works too


def test_records_say_what_happened():
    model, optimizer = plain.trained()
    batch = plain.tokens()
    grown = staged.grow(model, optimizer, width=2, depth=3, order="append", init="identity", seed=7, batch=batch)
    wide, deep = grown.record
    assert (wide.op, wide.factor, wide.order, wide.init, wide.noise, wide.seed, wide.step) == (
        *("width", 2, None, None, 0.3, 7, 5),
    )
    assert (deep.op, deep.factor, deep.order, deep.init, deep.noise) == ("depth", 3, "append", "identity", 0.0)
    assert wide.n_params_before == model.num_parameters()
    assert wide.n_params_after == staged.grow(model, width=2).model.num_parameters() == deep.n_params_before
    assert deep.n_params_after == grown.model.num_parameters()
    assert wide.loss_before == pytest.approx(plain.loss_of(model, batch).item(), rel=1e-12)
    assert deep.loss_after == pytest.approx(wide.loss_before, abs=1e-12)
    assert (wide.loss_after, deep.loss_before) == (None, None)
    assert staged.history(grown.model.config) == grown.record and staged.history(model.config) == ()
    assert json.loads(json.dumps(grown.model.config.to_dict()))["effnn_growth"][0]["factor"] == 2
    model.config.effnn_growth = [{"op": "width"}]
    with pytest.raises(InvalidInput, match="not a list of growth records"):
        staged.history(model.config)


def test_flags_and_generation_settings_are_kept():
    model = plain.tiny_gpt2().train()
    model.transformer.h[1].mlp.c_fc.weight.requires_grad_(False)
    model.generation_config.max_new_tokens = 7
    model.activation_checkpointing_enable()
    grown = staged.grow(model, width=2, depth=2).model
    frozen = [name for name, p in grown.named_parameters() if not p.requires_grad]
    assert frozen == ["transformer.h.2.mlp.c_fc.weight", "transformer.h.3.mlp.c_fc.weight"]
    assert grown.generation_config.max_new_tokens == 7
    assert grown.generation_config is not model.generation_config
    assert grown.config._attn_implementation == model.config._attn_implementation
    assert all(layer.gradient_checkpointing for layer in grown.transformer.h)
    plain.loss_of(grown, plain.tokens()).backward()


def test_eager_attention_stays():
    model, batch = plain.tiny_gpt2(attn_implementation="eager"), plain.tokens()
    grown = staged.grow(model, width=2).model
    assert grown.config._attn_implementation == "eager"
    assert (logits(grown, batch) - logits(model, batch)).abs().max() <= 1e-10


def test_mixed_precisions_are_kept_tensor_by_tensor():
    model = plain.tiny_gpt2(dtype=torch.bfloat16)
    model.transformer.ln_f.float()
    grown = staged.grow(model, width=2, depth=2).model
    assert grown.transformer.ln_f.weight.dtype == torch.float32
    assert grown.transformer.h[3].ln_1.weight.dtype == torch.bfloat16


def test_other_models_are_refused():
    config = GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=40, bos_token_id=0, eos_token_id=0)
    llama = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=40)
    for model in (GPT2Model(config), LlamaForCausalLM(llama), torch.nn.Linear(2, 2)):
        with pytest.raises(InvalidInput, match=f"takes a GPT2LMHeadModel, found a {type(model).__name__}"):
            staged.grow(model, width=2)


def test_unknown_tensors_are_refused():
    with pytest.raises(InvalidInput, match="no growth rule for the parameter transformer.h.0.crossattention"):
        staged.grow(plain.tiny_gpt2(add_cross_attention=True), width=2)
    model = plain.tiny_gpt2()
    model.transformer.h[0].attn.c_attn.lora_A = torch.nn.Parameter(torch.zeros(16, 2))
    with pytest.raises(InvalidInput, match="h.0.attn.c_attn.lora_A"):
        staged.grow(model, width=2)
    model = plain.tiny_gpt2()
    model.transformer.register_buffer("scale", torch.ones(1))
    with pytest.raises(InvalidInput, match="buffers.*transformer.scale"):
        staged.grow(model, depth=2)
    for name in ("transformer.h.x.ln_1.weight", "transformer.h.0.ln_3.weight", "lm_head.bias", "transformer.h.0", ""):
        with pytest.raises(InvalidInput, match="no growth rule"):
            role_of(name)


def test_a_head_that_is_not_what_the_configuration_says():
    model = plain.tiny_gpt2()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with pytest.raises(InvalidInput, match="tie_word_embeddings is True.*two tensors"):
        staged.grow(model, width=2)
    model = plain.tiny_gpt2(tie_word_embeddings=False)
    model.lm_head.weight = model.transformer.wte.weight
    with pytest.raises(InvalidInput, match="tie_word_embeddings is False.*one tensor"):
        staged.grow(model, width=2)


def test_sizes_that_do_not_fit_the_configuration():
    model = plain.tiny_gpt2()
    model.config.n_inner = 24
    with pytest.raises(InvalidInput, match="does not fit the model's configuration"):
        staged.grow(model, width=2)


def test_factors_towards_a_given_size():
    small = GPT2Config(n_embd=768, n_head=8, n_layer=12)
    assert staged.factors(small, GPT2Config(n_embd=1536, n_head=16, n_layer=24)) == (2, 2)
    assert staged.factors(small, small) == (1, 1)
    explicit = GPT2Config(n_embd=2304, n_head=24, n_layer=12, n_inner=9216)
    assert staged.factors(small, explicit) == (3, 1)
    for changes, message in [
        ({"n_embd": 1536, "n_head": 8}, "head size would change: 768 / 8 against 1536 / 8"),
        ({"n_embd": 1000, "n_head": 8}, "n_embd is 768 and would become 1000: not a whole multiple"),
        ({"n_embd": 384, "n_head": 4}, "not a whole multiple"),
        ({"n_embd": 768, "n_head": 8, "n_layer": 18}, "n_layer is 12"),
        (
            {"n_embd": 1536, "n_head": 16, "n_inner": 3072},
            "n_inner is 3072 and would become 3072: width 2 makes it 6144",
        ),
        ({"n_embd": 1536, "n_head": 16, "vocab_size": 50000}, "vocab_size"),
        ({"n_embd": 1536, "n_head": 16, "tie_word_embeddings": False}, "tie_word_embeddings"),
    ]:
        with pytest.raises(InvalidInput, match=message):
            staged.factors(small, GPT2Config(**{"n_layer": 12, **changes}))


def test_growth_of_a_growing_optimizer_over_several_stages():
    model, optimizer = plain.trained()
    state = staged.Grown(model, optimizer, None, ())
    for factors in ({"width": 2}, {"depth": 2}, {"width": 2, "depth": 2}):
        batch = plain.tokens()
        state = staged.grow(state.model, state.optimizer, batch=batch, adam_width_rule="1/k", **factors)
        assert state.record[-1].loss_after == pytest.approx(state.record[0].loss_before, abs=1e-10)
        plain.train(state.model, state.optimizer, 2)
    assert isinstance(state.optimizer, AdamW) and state.model.config.n_embd == 64 and state.model.config.n_layer == 8


@pytest.mark.parametrize(
    "batch", [torch.zeros(2, 1).long(), torch.zeros(2, 1000).long(), torch.zeros(9).long(), [[1, 2]]]
)
def test_a_batch_without_a_loss_is_refused(batch):
    with pytest.raises(InvalidInput, match="batch: expected token ids .rows, length. with a length from 2 to n_pos"):
        staged.grow(plain.tiny_gpt2(), width=2, batch=batch)
