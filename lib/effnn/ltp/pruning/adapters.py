"""Adapters: what post-training pruning has to know about a family of encoders, and nothing more.

An adapter finds the layers of a model and takes one layer apart into its six linear maps, its activation and its
normalisations (`LayerParts`). Everything else in this room is written against those parts. Post-norm encoders (BERT,
RoBERTa, DistilBERT, ELECTRA) and pre-norm ones (ViT) differ only in where the normalisations stand. A new family is
one small class and a call of `register_adapter`. Decoders and encoder-decoders are not covered.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from effnn.base import InvalidInput
from effnn.ltp.pruning.wrappers import inner_encoder, refusal

PRUNED_PREFIX = "effnn_pruned_"
"""Model types of pruned models begin with it."""


@dataclass(frozen=True)
class LayerParts:
    """The parts of one encoder layer, which computes (d: hidden size, H: heads, d_h: head size, F: FFN width):

        a    = x + out(attention(norm_before_attention(x)))       the attention block's residual sum
        mid  = norm_after_attention(a)
        f    = mid + fc2(activation(fc1(norm_before_ffn(mid))))   the FFN block's residual sum
        next = norm_after_ffn(f)

    query: Linear(d, H * d_h).
    key: likewise.
    value: likewise.
    out: Linear(H * d_h, d).
    fc1: Linear(d, F).
    fc2: Linear(F, d).
    activation: of the FFN.
    head_size: d_h.
    norm_before_attention: None, here and below, where the family has none; it means the identity.
    norm_after_attention: likewise.
    norm_before_ffn: likewise.
    norm_after_ffn: likewise.
    """

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    out: nn.Linear
    fc1: nn.Linear
    fc2: nn.Linear
    activation: Callable[[Tensor], Tensor]
    head_size: int
    norm_before_attention: nn.Module | None = None
    norm_after_attention: nn.Module | None = None
    norm_before_ffn: nn.Module | None = None
    norm_after_ffn: nn.Module | None = None


class Adapter(Protocol):
    """What pruning has to know about a family."""

    name: str
    model_types: tuple[str, ...]
    """`config.model_type` of the models it covers."""

    linear_names: dict[str, str]
    """Path of each of query, key, value, out, fc1, fc2 inside a layer, e.g. {"query": "attention.self.query"}."""

    attention: str
    """Path, inside a layer, of the module that holds query, key and value and returns (context, attention maps)."""

    def layers(self, model: PreTrainedModel) -> Sequence[nn.Module]:
        """The encoder layers in the order of the forward pass."""

    def parts(self, layer: nn.Module) -> LayerParts:
        """The parts of one layer."""

    def reads_first_token_only(self, model: PreTrainedModel) -> bool:
        """Whether the task head reads only position 0 of the last layer; False is always safe."""


class BertAdapter:
    """BERT and the encoders whose layers are built like BERT's. Post-norm."""

    name = "BERT"
    model_types = ("bert", "roberta", "xlm-roberta", "camembert", "electra")
    linear_names = {
        "query": "attention.self.query",
        "key": "attention.self.key",
        "value": "attention.self.value",
        "out": "attention.output.dense",
        "fc1": "intermediate.dense",
        "fc2": "output.dense",
    }
    attention = "attention.self"

    def layers(self, model: PreTrainedModel) -> Sequence[nn.Module]:
        return model.base_model.encoder.layer

    def parts(self, layer: nn.Module) -> LayerParts:
        return LayerParts(
            **_linears(layer, self.linear_names),
            activation=layer.intermediate.intermediate_act_fn,
            head_size=layer.attention.self.attention_head_size,
            norm_after_attention=layer.attention.output.LayerNorm,
            norm_after_ffn=layer.output.LayerNorm,
        )

    def reads_first_token_only(self, model: PreTrainedModel) -> bool:
        return type(model).__name__.endswith("ForSequenceClassification")


class DistilBertAdapter:
    """DistilBERT: post-norm, residual sums and normalisations stand in the block."""

    name = "DistilBERT"
    model_types = ("distilbert",)
    linear_names = {
        "query": "attention.q_lin",
        "key": "attention.k_lin",
        "value": "attention.v_lin",
        "out": "attention.out_lin",
        "fc1": "ffn.lin1",
        "fc2": "ffn.lin2",
    }
    attention = "attention"

    def layers(self, model: PreTrainedModel) -> Sequence[nn.Module]:
        return model.base_model.transformer.layer

    def parts(self, layer: nn.Module) -> LayerParts:
        return LayerParts(
            **_linears(layer, self.linear_names),
            activation=layer.ffn.activation,
            head_size=layer.attention.attention_head_size,
            norm_after_attention=layer.sa_layer_norm,
            norm_after_ffn=layer.output_layer_norm,
        )

    def reads_first_token_only(self, model: PreTrainedModel) -> bool:
        return type(model).__name__.endswith("ForSequenceClassification")


class ViTAdapter:
    """Vision Transformer: pre-norm, the residual stream itself is never normalised inside a layer."""

    name = "ViT"
    model_types = ("vit",)
    linear_names = {
        "query": "attention.q_proj",
        "key": "attention.k_proj",
        "value": "attention.v_proj",
        "out": "attention.o_proj",
        "fc1": "mlp.fc1",
        "fc2": "mlp.fc2",
    }
    attention = "attention"

    def layers(self, model: PreTrainedModel) -> Sequence[nn.Module]:
        return model.base_model.layers

    def parts(self, layer: nn.Module) -> LayerParts:
        return LayerParts(
            **_linears(layer, self.linear_names),
            activation=layer.mlp.activation_fn,
            head_size=layer.attention.head_dim,
            norm_before_attention=layer.layernorm_before,
            norm_before_ffn=layer.layernorm_after,
        )

    def reads_first_token_only(self, model: PreTrainedModel) -> bool:
        return type(model).__name__.endswith("ForImageClassification")


_ADAPTERS: list[Adapter] = [BertAdapter(), DistilBertAdapter(), ViTAdapter()]


def register_adapter(adapter: Adapter) -> None:
    """Make a new family known; later registrations are asked first.

    An adapter of a type that is covered already adds a layout: models that it cannot take apart stay with the others.
    Registering an adapter again, or its class defined anew, takes the place of the first time.
    """

    def mark(known: Adapter) -> tuple[str, str, str, tuple[str, ...]]:
        return type(known).__module__, type(known).__qualname__, known.name, tuple(known.model_types)

    _ADAPTERS[:] = [adapter, *(known for known in _ADAPTERS if mark(known) != mark(adapter))]


def adapter_for_type(model_type: str | None, model: PreTrainedModel | None = None) -> Adapter | None:
    """The adapter that covers `model_type`, or None; of several, the first that can take `model` apart."""
    covering = [adapter for adapter in _ADAPTERS if model_type in adapter.model_types]
    if model is not None and len(covering) > 1:
        covering.sort(key=lambda adapter: not _takes_apart(adapter, model))
    return covering[0] if covering else None


def _takes_apart(adapter: Adapter, model: PreTrainedModel) -> bool:
    try:
        parts = adapter.parts(adapter.layers(model)[0])
        return all(isinstance(getattr(parts, part), nn.Module) for part in adapter.linear_names)
    except (AttributeError, LookupError, TypeError):  # what the paths of another layout raise
        return False


def adapter_for(model: PreTrainedModel) -> Adapter:
    """The adapter that covers `model`; InvalidInput says what else was found, and the way from it to such a model."""
    if reason := refusal(model, _covers):
        raise InvalidInput(reason)
    config, name = model.config, type(model).__name__
    if getattr(config, "is_decoder", False):
        raise InvalidInput(f"{name} is set up as a decoder; pruning takes encoders only")
    if adapter := adapter_for_type(config.model_type, model):
        return adapter
    if str(config.model_type).startswith(PRUNED_PREFIX):
        raise InvalidInput(
            f"{name} is pruned already, its layers differ in size: start from the dense model instead "
            "(effnn.ltp.pad gives a zero-filled dense model back)"
        )
    if inside := inner_encoder(model, _covers):
        raise InvalidInput(
            f"no adapter covers {name} as a whole (model type {config.model_type!r}), but one covers {inside} inside: "
            "pass that, with a loss=... of your own that does what the model does around it"
        )
    known = "; ".join(f"{adapter.name} ({', '.join(adapter.model_types)})" for adapter in _ADAPTERS)
    kind = ""
    if getattr(config, "is_encoder_decoder", False):
        kind = "it is an encoder-decoder, and pruning takes encoders only. "
    elif config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        kind = "it is a decoder, and pruning takes encoders only. "
    raise InvalidInput(
        f"no adapter covers {name} (model type {config.model_type!r}): {kind}The adapters are: {known}. "
        "For another encoder write an adapter (effnn.ltp.Adapter) and pass it to effnn.ltp.register_adapter."
    )


def _covers(model: PreTrainedModel) -> bool:
    decoder = getattr(model.config, "is_decoder", False)
    return not decoder and adapter_for_type(model.config.model_type, model) is not None


def _linears(layer: nn.Module, names: dict[str, str]) -> dict[str, nn.Linear]:
    return {part: layer.get_submodule(path) for part, path in names.items()}
