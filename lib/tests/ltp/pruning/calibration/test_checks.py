"""What is refused before any pass, by which name, and that the way out that is told works."""

import logging
import os
import random
import re

import pytest
import torch
from helpers.encoders import FAMILIES, HIDDEN, VOCABULARY, build, rows_of
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize, prune
from torch.utils.data import DataLoader, TensorDataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertLMHeadModel,
    BertModel,
    BertPreTrainedModel,
    EncoderDecoderModel,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from effnn import ltp
from effnn.base import InvalidInput
from effnn.ltp.pruning.shrinking import models as pruned_models

SIZES = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8, "intermediate_size": 8, "vocab_size": 9}


@pytest.fixture(autouse=True)
def _quiet(caplog):
    caplog.set_level(logging.ERROR, logger="effnn.ltp")


@pytest.fixture
def bert():
    model, batch = FAMILIES["bert"]()
    return model, rows_of(batch, 4)


def pruned(model, loader, **options):
    return ltp.prune(model, loader, ltp.Macs(0.5), progress=False, **options)


def refused(model, loader=(), **options):
    """The message; no batch of the loader is read."""
    read = []
    with pytest.raises(InvalidInput) as caught:
        pruned(model, (read.append(1) or batch for batch in loader), **options)
    assert not read
    return str(caught.value)


def advised(message):
    """The attribute path that a message tells to pass."""
    return re.search(r"pass model\.([\w.]+)", message)[1]


def test_wrappers_are_named_and_what_they_hold_is_pruned(bert):
    model, loader = bert
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = [
            nn.parallel.DistributedDataParallel(model),
            nn.DataParallel(model),
            torch.compile(model, backend="eager"),
            torch.optim.swa_utils.AveragedModel(model).eval(),
        ]
        expected = pruned(model, loader).masks
        for wrapper in wrapped:
            message = refused(wrapper, loader)
            assert message.startswith(type(wrapper).__name__) and "BertForSequenceClassification" in message
            inner = wrapper.get_submodule(advised(message))
            assert torch.equal(pruned(inner, loader).masks.filters, expected.filters)
            with pytest.raises(InvalidInput, match="wrapper around the model"):
                ltp.Shape.of(wrapper)
    finally:
        torch.distributed.destroy_process_group()


def test_a_module_around_an_encoder_names_it(bert):
    _, loader = bert
    encoder, _ = build("bert", "base")

    class Own(nn.Module):
        def __init__(self, part):
            super().__init__()
            self.part, self.head = part, nn.Linear(HIDDEN, 3)
            self.config = getattr(part, "config", None)

    own = Own(encoder).eval()
    message = refused(own, loader)
    assert message.startswith("Own") and advised(message) == "part" and "loss=" in message

    def loss(part, batch):
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return functional.cross_entropy(own.head(part(**inputs).pooler_output), batch["labels"])

    result = pruned(own.part, loader, loss=loss)
    own.part = result.materialize()
    assert loss(own.part, loader[0]).isfinite() and own.head.weight.grad is None

    with_head = Own(FAMILIES["bert"]()[0]).eval()
    assert "with a loss of its own" in refused(with_head) and pruned(with_head.part, loader)
    several = nn.ModuleDict({"query": encoder, "passage": build("bert", "base")[0]})
    assert "holds 2: query, passage" in refused(several)
    numbered = nn.Sequential(encoder)
    assert "model.get_submodule('0')" in refused(numbered) and numbered.get_submodule("0") is encoder
    assert "holds none" in refused(nn.Linear(2, 2))


def test_objects_that_are_no_modules(bert, tmp_path):
    model, loader = bert

    class Pipeline:
        def __init__(self):
            self.model = model

    assert "pass its .model" in refused(Pipeline())
    assert "is a class" in refused(BertForSequenceClassification)
    assert "load the model first" in refused("some-name") and "load the model first" in refused(tmp_path)
    assert "found NoneType" in refused(None)


def test_an_encoder_without_a_head_needs_a_loss():
    model, batch = build("roberta", "base")
    message = refused(model, [batch])
    assert message.startswith("RobertaModel") and "loss=" in message and "AutoModelFor" in message
    assert pruned(model, rows_of(batch, 4), loss=lambda m, b: m(**b).last_hidden_state.square().mean())


class TestDecoders:
    def test_they_are_called_so(self):
        gpt = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9)).eval()
        t5 = T5ForConditionalGeneration(
            T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=9)
        ).eval()
        assert "it is a decoder" in refused(gpt) and "it is an encoder-decoder" in refused(t5)
        assert "set up as a decoder" in refused(BertLMHeadModel(BertConfig(**SIZES, is_decoder=True)).eval())

    def test_the_encoder_inside_is_named(self):
        decoder = BertLMHeadModel(BertConfig(**SIZES, is_decoder=True, add_cross_attention=True))
        model = EncoderDecoderModel(encoder=BertModel(BertConfig(**SIZES)), decoder=decoder).eval()
        assert advised(refused(model).replace("covers", "pass")) == "encoder"
        assert pruned(
            model.encoder,
            [{"input_ids": torch.randint(0, 9, (4, 5))}] * 3,
            loss=lambda m, b: m(**b).last_hidden_state.square().mean(),
        )


class TestAdded:
    """Models that could not be made smaller in the end; every way out is tried."""

    def test_another_module(self, bert):
        model, loader = bert
        model.adapter = nn.Linear(HIDDEN, HIDDEN).eval()
        assert "adapter.bias" in refused(model, loader)
        del model.adapter
        model.extra = nn.Parameter(torch.zeros(2))
        assert "extra" in refused(model, loader)
        del model.extra
        assert pruned(model, loader)

    def test_a_head_that_the_configuration_does_not_know(self, bert):
        model, loader = bert
        model.classifier = nn.Linear(HIDDEN, 5).eval()
        assert "classifier" in refused(model, loader)
        model.classifier = nn.Sequential(nn.Linear(HIDDEN, 3)).eval()
        assert "classifier.0" in refused(model, loader)

    def test_adapters_of_peft(self, bert):
        model, loader = bert

        class LoraLinear(nn.Module):
            def __init__(self, base):
                super().__init__()
                self.base_layer, self.lora_A = base, nn.Linear(HIDDEN, 2, bias=False)
                self.lora_B = nn.Linear(2, HIDDEN, bias=False)

            def forward(self, x):
                return self.base_layer(x) + self.lora_B(self.lora_A(x))

        class PeftModelForSequenceClassification(nn.Module):  # stands in for peft's: it answers like what it holds
            def __init__(self, inner):
                super().__init__()
                self.base_model, self.config = inner, inner.config

            def merge_and_unload(self):
                attention = self.base_model.bert.encoder.layer[0].attention.self
                lora, attention.query = attention.query, attention.query.base_layer
                with torch.no_grad():
                    attention.query.weight += lora.lora_B.weight @ lora.lora_A.weight
                return self.base_model

        attention = model.bert.encoder.layer[0].attention.self
        attention.query = LoraLinear(attention.query)
        wrapped = PeftModelForSequenceClassification(model).eval()
        assert "merge_and_unload()" in refused(wrapped, loader)
        message = refused(model, loader)
        assert "LoRA" in message and "query is a LoraLinear" in message and "merge_and_unload()" in message
        with torch.no_grad():
            expected = model(**loader[0]).logits
            merged = wrapped.merge_and_unload()
            torch.testing.assert_close(merged(**loader[0]).logits, expected, atol=1e-5, rtol=1e-4)
        assert pruned(merged, loader)

    @pytest.mark.filterwarnings("ignore")
    def test_a_quantized_model(self, bert):
        model, loader = bert
        small = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
        message = refused(small, loader)
        assert "is quantized" in message and "result.materialize()" in message
        torch.ao.quantization.quantize_dynamic(pruned(model, loader).materialize(), {nn.Linear})
        model.bert.encoder.layer[0].output.dense.weight = nn.Parameter(
            torch.zeros(HIDDEN, 48, dtype=torch.int8), requires_grad=False
        )
        assert "is quantized (fc2" in refused(model, loader)

    def test_weights_behind_a_parametrization_or_a_mask(self, bert):
        model, loader = bert
        dense = model.bert.encoder.layer[0].output.dense
        prune.l1_unstructured(dense, "weight", 0.5)
        message = refused(model, loader)
        assert "prune.remove(module, 'weight')" in message
        prune.remove(dense, "weight")
        assert pruned(model, loader)
        nn.utils.parametrizations.weight_norm(dense)
        assert "remove_parametrizations(module, 'weight')" in refused(model, loader)
        parametrize.remove_parametrizations(dense, "weight")
        assert pruned(model, loader)

    def test_a_part_compiled_by_itself(self, bert):
        model, loader = bert
        model.bert = torch.compile(model.bert, backend="eager")
        assert "_orig_mod" in refused(model, loader)
        model.bert = model.bert._orig_mod
        assert pruned(model, loader)

    def test_a_class_of_ones_own_for_a_known_family(self, bert, monkeypatch):
        _, loader = bert
        monkeypatch.setattr(pruned_models, "_PRUNED", dict(pruned_models._PRUNED))

        class OwnHead(BertPreTrainedModel):
            def __init__(self, config):
                super().__init__(config)
                self.bert, self.head = BertModel(config), nn.Linear(config.hidden_size, 3)

            def forward(self, input_ids, attention_mask=None, token_type_ids=None, labels=None):
                logits = self.head(self.bert(input_ids, attention_mask, token_type_ids).pooler_output)
                return SequenceClassifierOutput(loss=functional.cross_entropy(logits, labels), logits=logits)

        model = OwnHead(FAMILIES["bert"]()[0].config).eval()
        message = refused(model, loader)
        assert "register_pruned" in message and "model.bert (BertModel)" in message

        def loss(encoder, batch):
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            return functional.cross_entropy(model.head(encoder(**inputs).pooler_output), batch["labels"])

        assert pruned(model.bert, loader, loss=loss)

    def test_what_the_configuration_does_not_tell_is_found_on_the_first_batch(self, bert):
        model, loader = bert
        model.bert.encoder.layer[1].intermediate.intermediate_act_fn = nn.ReLU().eval()
        read = []
        with pytest.raises(InvalidInput, match="other outputs.*configuration does not tell"):
            pruned(model, (read.append(1) or batch for batch in loader))
        assert len(read) == 1
        model.bert.encoder.layer[0].intermediate.intermediate_act_fn = nn.ReLU().eval()
        model.bert.encoder.layer[2].intermediate.intermediate_act_fn = nn.ReLU().eval()
        model.config.hidden_act = "relu"  # so that the configuration tells it
        assert pruned(model, loader)

    def test_what_a_loss_hides_is_found_in_the_outputs(self, bert):
        model, loader = bert
        model.bert.pooler.activation = nn.Hardtanh().eval()
        unlabelled = [{name: value for name, value in batch.items() if name != "labels"} for batch in loader]
        for batches, options in (
            (loader, {"loss": lambda m, b: m(**b).loss * 0 + m.bert.encoder.layer[0].output.dense.weight.sum()}),
            (unlabelled, {"labels": "model"}),
            (loader, {"loss": lambda m, b: m(**b).loss * random.random()}),
        ):
            with pytest.raises(InvalidInput, match="other outputs.*configuration does not tell"):
                pruned(model, batches, **options)

    def test_no_weights_and_no_evaluation_mode(self, bert):
        model, loader = bert
        with torch.device("meta"):
            empty = type(model)(model.config).eval()
        assert "meta device" in refused(empty, loader)
        model.bert.train()
        assert "model.eval()" in refused(model, loader)


def changed(batch, **entries):
    return batch | {name: change(batch) for name, change in entries.items()}


BAD_BATCHES = {
    "numpy": ({"input_ids": lambda b: b["input_ids"].numpy()}, "input_ids .* is a ndarray.*torch.as_tensor"),
    "list": ({"labels": lambda b: b["labels"].tolist()}, "labels .* is a list.*torch.as_tensor"),
    "one row": ({"input_ids": lambda b: b["input_ids"][0]}, r"input_ids of shape \(13,\).*batch_size"),
    "no input": ({"input_ids": lambda b: None}, "expected input_ids"),
    "no labels": ({"labels": lambda b: None}, 'no labels that BertForSequenceClassification.*labels="model".*loss='),
    "float labels": ({"labels": lambda b: b["labels"].float()}, r"float32: expected classes.*\.long\(\)"),
    "int32 labels": ({"labels": lambda b: b["labels"].int()}, r"int32: expected classes.*\.long\(\)"),
    "label too large": ({"labels": lambda b: b["labels"] + 3}, "labels .* run from 3 to .*expected 0 to 2"),
    "label below": ({"labels": lambda b: b["labels"] - 5}, "labels .* run from -5 to .*expected 0 to 2"),
    "fewer labels": ({"labels": lambda b: b["labels"][:3]}, r"shape \(3,\), and its inputs have 5 rows"),
    "one-hot": ({"labels": lambda b: functional.one_hot(b["labels"], 3)}, r"expected floats of shape \(5, 3\)"),
    "vocabulary": ({"input_ids": lambda b: b["input_ids"] + 40}, "vocabulary of the model has 60 tokens"),
    "float ids": ({"input_ids": lambda b: b["input_ids"].float()}, r"float32: expected token ids.*\.long\(\)"),
    "types": ({"token_type_ids": lambda b: b["input_ids"]}, "token_type_ids .*knows 2 token type"),
    "too long": (
        {name: (lambda b, n=name: b[n].repeat(1, 4)) for name in ("input_ids", "attention_mask", "token_type_ids")},
        "52 tokens.*positions for 40.*max_length=40",
    ),
    "choices": ({"input_ids": lambda b: b["input_ids"][:, None]}, r"\(5, 1, 13\): .*expects \(rows, tokens\)"),
    "other shapes": ({"token_type_ids": lambda b: b["token_type_ids"][:, :5]}, r"does not run on.*\(2, 5\)"),
}


@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("name", BAD_BATCHES)
def test_batches_are_refused_by_what_is_wrong_with_them(bert, name, place):
    model, loader = bert
    entries, message = BAD_BATCHES[name]
    loader[place] = changed(loader[place], **entries)
    if name == "other shapes" and place:
        message = r"does not run on calibration batch 2 .*\(5, 5\)"
    with pytest.raises(InvalidInput, match=message):
        pruned(model, loader)


@pytest.mark.parametrize("family", ["roberta", "xlm-roberta"])
def test_positions_after_the_padding_index_and_a_single_token_type(family):
    model, batch = build(family)
    padding = model.config.pad_token_id
    generator = torch.Generator().manual_seed(0)
    longest = 40 - padding - 1
    ids = torch.randint(5, VOCABULARY, (4, longest + 1), generator=generator)
    labels = torch.zeros(4, dtype=torch.long)
    with pytest.raises(InvalidInput, match=f"positions for {longest}"):
        pruned(model, [{"input_ids": ids, "labels": labels}])
    assert pruned(model, [{"input_ids": ids[:, :-1], "labels": labels}])
    model, _ = build(family, type_vocab_size=1)
    with pytest.raises(InvalidInput, match="leave them out"):
        pruned(model, [{"input_ids": ids[:, :-1], "labels": labels, "token_type_ids": torch.ones_like(ids[:, :-1])}])


def test_labels_and_inputs_of_other_heads():
    model, batch = build("bert", "tokens")
    with pytest.raises(InvalidInput, match=r"one per token, \(5, 13\)"):
        pruned(model, [batch | {"labels": batch["labels"][:, 0]}])
    model, batch = build("bert", "mlm")
    with pytest.raises(InvalidInput, match=f"expected 0 to {VOCABULARY - 1}"):
        pruned(model, [batch | {"labels": batch["labels"] + 50}])
    model, batch = build("bert", "qa")
    with pytest.raises(InvalidInput, match="start_positions"):
        pruned(model, [{name: value for name, value in batch.items() if name != "end_positions"}])
    with pytest.raises(InvalidInput, match=r"end_positions .*int32.*\.long\(\)"):
        pruned(model, [batch | {"end_positions": batch["end_positions"].int()}])
    model, batch = FAMILIES["vit"]()
    with pytest.raises(InvalidInput, match="does not run on calibration batch 0.*doesn't match model"):
        pruned(model, [batch | {"pixel_values": torch.zeros(5, 3, 16, 16)}])


def test_labels_that_are_numbers_or_several_at_once_are_taken():
    model, batch = build("bert", num_labels=1)
    for labels in (torch.rand(5), torch.rand(5).double(), torch.arange(5), torch.rand(5, 1)):
        assert pruned(model, [b | {"labels": labels} for b in rows_of(batch, 3)]).report.dense_loss >= 0
    model, batch = build("bert")
    several = torch.randint(0, 2, (5, 3)).float()
    assert pruned(model, [b | {"labels": several} for b in rows_of(batch, 3)]).report.dense_loss > 0


class TestLoaders:
    def test_what_is_no_loader_of_batches(self, bert):
        model, loader = bert
        with pytest.raises(InvalidInput, match=r"is one batch .*\[batch\]"):
            pruned(model, loader[0])
        assert pruned(model, [loader[0]])
        for nothing in (None, 5, "text", loader[0]["input_ids"]):
            with pytest.raises(InvalidInput, match="expected an iterable of batches"):
                pruned(model, nothing)
        used = iter(loader)
        list(used)
        with pytest.raises(InvalidInput, match="empty.*read before"):
            pruned(model, used)

    def test_tuples_become_dicts_as_the_message_says(self, bert):
        model, loader = bert
        columns = [torch.cat([batch[name] for batch in loader]) for name in ("input_ids", "labels")]
        tuples = DataLoader(TensorDataset(*columns), batch_size=5)
        with pytest.raises(InvalidInput, match="batch 0 is a list.*for ids, labels in loader"):
            pruned(model, tuples)
        dicts = pruned(model, ({"input_ids": ids, "labels": labels} for ids, labels in tuples)).masks
        plain = pruned(model, tuples, loss=lambda m, b: m(input_ids=b[0], labels=b[1]).loss).masks
        assert torch.equal(dicts.heads, plain.heads) and torch.equal(dicts.filters, plain.filters)

    def test_the_first_batch_is_checked_before_a_table_is_measured(self, bert, monkeypatch):
        model, loader = bert
        monkeypatch.setattr(ltp.LatencyTable, "measure", lambda *_, **__: pytest.fail("measured"))
        with pytest.raises(InvalidInput, match="no labels"):
            ltp.prune(model, [{"input_ids": loader[0]["input_ids"]}], ltp.Latency(0.5), progress=False)


def test_nothing_is_left_of_the_checks(bert):
    model, loader = bert
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    pruned(model, loader)
    assert torch.equal(torch.get_rng_state(), state) and os.environ.get("RANK") is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
