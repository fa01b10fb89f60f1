"""Masks, shapes and adapters: what is covered, what is refused, and that a masked block leaves no trace."""

import copy

import pytest
import torch
from helpers.encoders import FAMILIES, FILTERS, HEADS, HIDDEN, LAYERS, SIBLINGS, build, logits, randomise
from torch import nn
from transformers import BertConfig, BertLMHeadModel, GPT2Config, GPT2LMHeadModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from effnn import ltp
from effnn.base import InvalidInput
from effnn.ltp.pruning import adapters
from effnn.ltp.pruning.adapters import LayerParts, adapter_for, register_adapter
from effnn.ltp.pruning.masks import Masks, Shape, masked
from effnn.ltp.pruning.shrinking import models as pruned_models
from effnn.ltp.pruning.shrinking.models import register_pruned
from effnn.ltp.pruning.shrinking.saving import load_pruned
from effnn.ltp.pruning.shrinking.shrink import shrink

SHAPE = Shape(layers=LAYERS, heads=HEADS, filters=FILTERS, hidden=HIDDEN, head_size=HIDDEN // HEADS)


@pytest.mark.parametrize("name", [*FAMILIES, *SIBLINGS])
def test_shape_and_parts_of_every_family(name):
    model, _ = FAMILIES[name]() if name in FAMILIES else build(name)
    assert Shape.of(model) == SHAPE
    for layer in adapter_for(model).layers(model):
        parts = adapter_for(model).parts(layer)
        assert parts.query.weight.shape == (HIDDEN, HIDDEN) and parts.fc2.weight.shape == (HIDDEN, FILTERS)
        assert layer.get_submodule(adapter_for(model).attention).training is False


@pytest.mark.parametrize("name", FAMILIES)
def test_layer_parts_describe_the_layer(name):
    """One layer computed from its parts, as LayerParts writes it down, gives what the layer itself gives."""
    model, _ = FAMILIES[name]()
    layer = adapter_for(model).layers(model)[0]
    parts = adapter_for(model).parts(layer)
    x = torch.randn(2, 7, HIDDEN, generator=torch.Generator().manual_seed(0))

    def norm(module: nn.Module | None, value: torch.Tensor) -> torch.Tensor:
        return value if module is None else module(value)

    def heads(value: torch.Tensor) -> torch.Tensor:
        return value.view(2, 7, HEADS, parts.head_size).transpose(1, 2)

    with torch.no_grad():
        inner = norm(parts.norm_before_attention, x)
        query, key, value = (heads(linear(inner)) for linear in (parts.query, parts.key, parts.value))
        weights = (query @ key.transpose(2, 3) * parts.head_size**-0.5).softmax(-1)
        context = (weights @ value).transpose(1, 2).reshape(2, 7, HIDDEN)
        mid = norm(parts.norm_after_attention, x + parts.out(context))
        ffn = parts.fc2(parts.activation(parts.fc1(norm(parts.norm_before_ffn, mid))))
        expected = norm(parts.norm_after_ffn, mid + ffn)
        assert torch.allclose(layer(x), expected, atol=1e-5)


def test_head_mask_zeroes_one_head_and_filter_mask_one_filter():
    """Against the plain way: zero the columns by hand."""
    model, batch = FAMILIES["bert"]()
    masks = Masks.ones(SHAPE)
    masks.heads[1, 2], masks.filters[2, 5] = 0, -0.5
    with masked(model, masks):
        found = logits(model, batch)
    size = HIDDEN // HEADS
    with torch.no_grad():
        model.bert.encoder.layer[1].attention.output.dense.weight[:, 2 * size : 3 * size] = 0
        model.bert.encoder.layer[2].output.dense.weight[:, 5] *= -0.5
    assert torch.allclose(found, logits(model, batch), atol=1e-6)


def test_ones_change_nothing_and_the_block_leaves_no_hooks():
    model, batch = FAMILIES["distilbert"]()
    expected = logits(model, batch)
    with masked(model, Masks.ones(SHAPE)) as inside:
        assert inside is model
        assert torch.equal(logits(model, batch), expected)
    zeros = Masks(torch.zeros(LAYERS, HEADS), torch.zeros(LAYERS, FILTERS))
    with pytest.raises(RuntimeError, match="stop"), masked(model, zeros):
        assert not torch.allclose(logits(model, batch), expected)
        raise RuntimeError("stop")
    assert torch.equal(logits(model, batch), expected)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_counts_and_binary():
    masks = Masks(torch.tensor([[0, 2.0, -1], [0, 0, 0]]), torch.tensor([[0.0, 0.5], [1, 1]]))
    assert masks.kept_heads == [[1, 2], []] and masks.kept_filters == [[1], [0, 1]]
    assert masks.heads_per_layer == [2, 0] and masks.filters_per_layer == [1, 2]
    assert masks.binary().heads.tolist() == [[0, 1, 1], [0, 0, 0]] and masks.binary().filters.tolist() == [
        [0, 1],
        [1, 1],
    ]


@pytest.mark.parametrize(
    "heads, filters, message",
    [
        (torch.ones(LAYERS, HEADS + 1), torch.ones(LAYERS, FILTERS), "do not fit the model"),
        (torch.ones(LAYERS, HEADS), torch.ones(LAYERS - 1, FILTERS), "do not fit the model"),
        (torch.ones(LAYERS * HEADS), torch.ones(LAYERS, FILTERS), "do not fit the model"),
        (torch.full((LAYERS, HEADS), torch.nan), torch.ones(LAYERS, FILTERS), "finite"),
        (torch.ones(LAYERS, HEADS), torch.full((LAYERS, FILTERS), torch.inf), "finite"),
    ],
)
def test_masks_that_do_not_fit(heads, filters, message):
    model, _ = FAMILIES["vit"]()
    for use in (lambda masks: masks.check(SHAPE), lambda masks: masked(model, masks).__enter__()):
        with pytest.raises(InvalidInput, match=message):
            use(Masks(heads, filters))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_unequal_layers_are_refused():
    model, _ = FAMILIES["bert"]()
    model.bert.encoder.layer[1].intermediate.dense = nn.Linear(HIDDEN, FILTERS - 1)
    with pytest.raises(InvalidInput, match="layers differ"):
        Shape.of(model)


@pytest.mark.parametrize("path", ["", "attention", "output.dense", "output.LayerNorm"])
def test_layers_that_share_a_module_are_refused_until_each_has_its_own(path):
    model, batch = FAMILIES["bert"]()
    layers = model.bert.encoder.layer
    if path:
        layers[1].set_submodule(path, layers[0].get_submodule(path))
    else:
        layers[1] = layers[0]
    for use in (Shape.of, lambda model: ltp.prune(model, [batch], ltp.Macs(0.5))):
        with pytest.raises(InvalidInput, match="of layer 0 and .* of layer 1 are one module.*deepcopy"):
            use(model)
    if path:
        layers[1].set_submodule(path, copy.deepcopy(layers[0].get_submodule(path)))
    else:
        layers[1] = copy.deepcopy(layers[0])
    assert Shape.of(model) == SHAPE


def test_models_without_an_adapter():
    sizes = {"vocab_size": 9, "n_embd": 8, "n_layer": 1, "n_head": 2}
    with pytest.raises(
        InvalidInput, match=r"GPT2LMHeadModel.*'gpt2'.*BERT \(bert, .*DistilBERT.*ViT.*register_adapter"
    ):
        adapter_for(GPT2LMHeadModel(GPT2Config(**sizes)))
    with pytest.raises(InvalidInput, match="no adapter covers Linear"):
        adapter_for(nn.Linear(2, 2))
    sizes = {
        "vocab_size": 9,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 4,
    }
    with pytest.raises(InvalidInput, match="BertLMHeadModel is set up as a decoder"):
        adapter_for(BertLMHeadModel(BertConfig(**sizes, is_decoder=True)))


def _first(model):
    return adapter_for(model).reads_first_token_only(model)


def test_heads_that_read_the_first_token():
    assert _first(FAMILIES["bert"]()[0]) and _first(FAMILIES["vit"]()[0])
    assert not _first(build("bert", "qa")[0]) and not _first(build("bert", "base")[0])


class TinyConfig(PreTrainedConfig):
    model_type = "tiny_test_encoder"
    hidden_size: int = HIDDEN
    num_hidden_layers: int = LAYERS
    vocab_size: int = 60


class TinyAttention(nn.Module):
    def __init__(self, hidden: int):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(hidden, hidden) for _ in range(3))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        query, key, value = (
            f(x).unflatten(-1, (-1, HIDDEN // HEADS)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        maps = (query @ key.transpose(2, 3)).softmax(-1)
        return (maps @ value).transpose(1, 2).flatten(2), maps


class TinyLayer(nn.Module):
    def __init__(self, hidden: int):
        super().__init__()
        self.core, self.mix = TinyAttention(hidden), nn.Linear(hidden, hidden)
        self.up, self.down, self.norm = nn.Linear(hidden, FILTERS), nn.Linear(FILTERS, hidden), nn.LayerNorm(hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.mix(self.core(x)[0])
        return self.norm(x + self.down(self.up(x).tanh()))


class TinyForSequenceClassification(PreTrainedModel):
    config_class = TinyConfig

    def __init__(self, config: TinyConfig):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(TinyLayer(config.hidden_size) for _ in range(config.num_hidden_layers))
        self.head = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, **ignored: torch.Tensor) -> SequenceClassifierOutput:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return SequenceClassifierOutput(logits=self.head(x[:, 0]))


class TinyAdapter:
    name = "Tiny"
    model_types = ("tiny_test_encoder",)
    linear_names = {"query": "core.q", "key": "core.k", "value": "core.v", "out": "mix", "fc1": "up", "fc2": "down"}
    attention = "core"

    def layers(self, model: PreTrainedModel) -> nn.ModuleList:
        return model.blocks

    def reads_first_token_only(self, model: PreTrainedModel) -> bool:
        return False

    def parts(self, layer: nn.Module) -> LayerParts:
        linears = {part: layer.get_submodule(path) for part, path in self.linear_names.items()}
        return LayerParts(**linears, activation=torch.tanh, head_size=HIDDEN // HEADS, norm_after_ffn=layer.norm)


def test_a_family_of_ones_own(monkeypatch, tmp_path):
    monkeypatch.setattr(adapters, "_ADAPTERS", list(adapters._ADAPTERS))
    monkeypatch.setattr(pruned_models, "_PRUNED", dict(pruned_models._PRUNED))
    model = TinyForSequenceClassification(TinyConfig(num_labels=3)).eval()
    randomise(model)
    batch = {"input_ids": torch.arange(21).view(3, 7)}
    with pytest.raises(InvalidInput, match="no adapter covers TinyForSequenceClassification"):
        Shape.of(model)
    register_adapter(TinyAdapter())
    assert Shape.of(model) == SHAPE
    masks = Masks.ones(SHAPE)
    masks.heads[0, 1:], masks.heads[1], masks.filters[0, ::2], masks.filters[2] = 0.7, 0, 0, 0
    with masked(model, masks):
        expected = logits(model, batch)
    assert not torch.allclose(expected, logits(model, batch), atol=1e-2)
    with pytest.raises(InvalidInput, match="no pruned class for TinyForSequenceClassification.*register_pruned"):
        shrink(model, masks)
    (pruned,) = register_pruned(TinyConfig, [TinyForSequenceClassification])
    small = shrink(model, masks)
    assert type(small) is pruned and pruned.__name__ == "PrunedTinyForSequenceClassification"
    assert torch.allclose(logits(small, batch), expected, atol=1e-5)
    small.save_pretrained(tmp_path)
    assert torch.equal(logits(load_pruned(tmp_path), batch), logits(small, batch))
