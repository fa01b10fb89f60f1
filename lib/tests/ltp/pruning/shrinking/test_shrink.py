"""Physical shrinking of encoders: masked == shrunk for every family, counts, copies, compilers, and refusals."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from helpers.encoders import (
    FAMILIES,
    FILTERS,
    HEADS,
    HIDDEN,
    LAYERS,
    QA_FAMILIES,
    SIBLINGS,
    TEXT,
    build,
    difference,
    logits,
    tuned_masks,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForNextSentencePrediction,
)

from effnn.base import InvalidInput
from effnn.ltp.pruning.masks import Masks, masked
from effnn.ltp.pruning.shrinking.saving import export_padded, load_pruned
from effnn.ltp.pruning.shrinking.shrink import pad, shrink

EVERY = {f"{name}-classification": builder for name, builder in FAMILIES.items()} | {
    f"{name}-qa": builder for name, builder in QA_FAMILIES.items()
}
KINDS = ("uneven", "no heads", "no filters", "neither", "all empty")


@pytest.fixture(autouse=True)
def _no_warnings():
    """Zero-sized layers and foreign keys announce themselves by warnings: none is acceptable here."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        yield


CASES = [(name, kind) for name in EVERY for kind in (KINDS if name.endswith("classification") else KINDS[::3])]


@pytest.mark.parametrize("name, kind", CASES)
def test_masked_equals_shrunk_equals_reloaded_equals_padded(name, kind, tmp_path):
    model, batch = EVERY[name]()
    dense, masks = logits(model, batch), tuned_masks(kind)
    with masked(model, masks):
        expected = logits(model, batch)
    assert difference(dense, expected) > 1e-2, "pruning changes nothing here: the comparison would be empty"
    small = shrink(model, masks)
    found = logits(small, batch)
    assert difference(found, expected) <= 1e-5
    small.save_pretrained(tmp_path)
    assert difference(logits(load_pruned(tmp_path), batch), found) == 0
    assert difference(logits(pad(small), batch), found) <= 1e-5
    assert type(pad(small)) is type(model)
    assert difference(logits(model, batch), dense) == 0


@pytest.mark.parametrize(
    "name", [f"{name}-{task}" for name in TEXT for task in ("tokens", "mlm", "base")] + ["vit-base"]
)
def test_other_heads_of_every_family(name, tmp_path):
    model, batch = build(*name.split("-"))
    with masked(model, tuned_masks("neither")):
        expected = logits(model, batch)
    small = shrink(model, tuned_masks("neither"))
    assert difference(logits(small, batch), expected) <= 1e-5
    small.save_pretrained(tmp_path)
    loaded = load_pruned(tmp_path)
    assert type(loaded) is type(small)
    assert difference(logits(loaded, batch), logits(small, batch)) == 0
    if name.endswith("mlm"):
        tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
        assert tied and small.get_output_embeddings().weight is small.get_input_embeddings().weight


@pytest.mark.parametrize("name", SIBLINGS)
def test_families_built_like_roberta(name, tmp_path):
    model, batch = build(name)
    small = shrink(model, tuned_masks())
    small.save_pretrained(tmp_path)
    assert (
        difference(logits(AutoModelForSequenceClassification.from_pretrained(tmp_path), batch), logits(small, batch))
        == 0
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_copies(name):
    model, batch = FAMILIES[name]()
    small = shrink(model, tuned_masks("neither"))
    expected = logits(small, batch)
    fresh = type(small)(copy.deepcopy(small.config)).eval()
    fresh.load_state_dict(small.state_dict())
    buffer = io.BytesIO()
    torch.save(small, buffer)
    buffer.seek(0)
    for twin in (
        copy.deepcopy(small),
        pickle.loads(pickle.dumps(small)),
        fresh,
        torch.load(buffer, weights_only=False),
        shrink(copy.deepcopy(model), tuned_masks("neither")),
    ):
        assert difference(logits(twin, batch), expected) == 0
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    assert logits(model, batch).std() > 0.1, "the small model shares memory with the dense one"


@pytest.mark.parametrize("name", FAMILIES)
def test_the_input_is_left_as_it_was(name):
    model, batch = FAMILIES[name]()
    logits(model, batch)  # the first loss settles config.problem_type
    before = {key: value.clone() for key, value in model.state_dict().items()}
    config = model.config.to_dict()
    with masked(model, tuned_masks()):
        logits(model, batch)
    shrink(model, tuned_masks("neither"))
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert model.config.to_dict() == config
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_parameter_count_falls_as_counted(name, kind):
    model, _ = FAMILIES[name]()
    masks = tuned_masks(kind)
    heads, filters = LAYERS * HEADS - sum(masks.heads_per_layer), LAYERS * FILTERS - sum(masks.filters_per_layer)
    head_size = HIDDEN // HEADS
    # a head: rows of three maps with their biases and columns of one; a filter: a row with its bias and a column
    expected = heads * head_size * (4 * HIDDEN + 3) + filters * (2 * HIDDEN + 1)
    assert model.num_parameters() - shrink(model, masks).num_parameters() == expected


def test_shrunk_model_trains_and_gives_the_same_loss():
    for name in ("bert", "vit"):
        model, batch = FAMILIES[name]()
        with masked(model, tuned_masks("neither")):
            expected = model(**batch).loss
        small = shrink(model, tuned_masks("neither"))
        loss = small(**batch).loss
        assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
        loss.backward()
        assert all(parameter.grad is not None for parameter in small.parameters()), "would stop distributed training"


def test_mode_dtype_and_frozen_parameters_are_kept():
    model, batch = FAMILIES["bert"]()
    model.bert.embeddings.requires_grad_(False)
    small = shrink(model.train().double(), tuned_masks())
    assert small.training and small.dtype == torch.float64
    assert not any(parameter.requires_grad for parameter in small.bert.embeddings.parameters())
    assert small.classifier.weight.requires_grad
    model.eval()
    with masked(model, tuned_masks()):
        expected = logits(model, batch)
    assert difference(logits(small.eval(), batch), expected) < 1e-12


def test_bfloat16(tmp_path):
    model, batch = FAMILIES["distilbert"]()
    model.bfloat16()
    with masked(model, tuned_masks("no heads")):
        expected = logits(model, batch)
    small = shrink(model, tuned_masks("no heads"))
    assert {parameter.dtype for parameter in small.parameters()} == {torch.bfloat16}
    assert difference(logits(small, batch), expected) < 0.05
    small.save_pretrained(tmp_path)
    loaded = load_pruned(tmp_path)
    assert loaded.dtype == torch.bfloat16 and difference(logits(loaded, batch), logits(small, batch)) == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_eager_attention_and_one_attention_map_a_layer(name):
    model, batch = FAMILIES[name](attention="eager")
    with masked(model, tuned_masks("no heads")):
        expected = logits(model, batch)
    small = shrink(model, tuned_masks("no heads"))
    assert small.config._attn_implementation == "eager"
    assert difference(logits(small, batch), expected) <= 1e-5
    output = small(**batch, output_attentions=True, output_hidden_states=True)
    assert [maps.shape[1] for maps in output.attentions] == [3, 0, 4]
    assert len(output.hidden_states) == LAYERS + 1


@pytest.mark.parametrize("name", FAMILIES)
def test_no_attention_is_computed_where_no_head_is_left(name, monkeypatch):
    model, batch = FAMILIES[name]()
    small = shrink(model, tuned_masks("no heads"))
    calls, plain = [], nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        nn.functional, "scaled_dot_product_attention", lambda *args, **kwargs: calls.append(1) or plain(*args, **kwargs)
    )
    logits(small, batch)
    assert len(calls) == LAYERS - 1
    assert sum("query" in key or "q_" in key for key in small.state_dict()) == 2 * (LAYERS - 1)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_any_masks_of_an_odd_model(data):
    layers, heads = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 3, 5]))
    hidden, filters = heads * data.draw(st.sampled_from([2, 3])), data.draw(st.integers(1, 7))
    model, batch = build(
        "bert", num_hidden_layers=layers, num_attention_heads=heads, hidden_size=hidden, intermediate_size=filters
    )
    values = st.sampled_from([0.0, 0.0, 1.0, -0.5, 2.0])

    def draw(width):
        return torch.tensor(data.draw(st.lists(values, min_size=layers * width, max_size=layers * width))).view(
            layers, width
        )

    masks = Masks(draw(heads), draw(filters))
    with masked(model, masks):
        expected = logits(model, batch)
    small = shrink(model, masks)
    assert difference(logits(small, batch), expected) <= 2e-5
    assert difference(logits(pad(small), batch), expected) <= 2e-5


@pytest.mark.parametrize("name", ["bert", *(pytest.param(name, marks=pytest.mark.slow) for name in (*TEXT[1:], "vit"))])
def test_compiles_without_a_graph_break(name):
    torch.compiler.reset()
    model, batch = FAMILIES[name]()
    small = shrink(model, tuned_masks("neither"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = logits(torch.compile(small, fullgraph=True, backend="aot_eager"), batch)
    assert difference(compiled, logits(small, batch)) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_onnx_export(name, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, batch = FAMILIES[name]()
    batch.pop("labels")
    small = shrink(model, tuned_masks("neither"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(small, kwargs=batch, f=tmp_path / "small.onnx", dynamo=True, verbose=False)
    session = runtime.InferenceSession(tmp_path / "small.onnx")
    found = session.run(None, {entry.name: batch[entry.name].numpy() for entry in session.get_inputs()})[0]
    assert difference(torch.from_numpy(found), logits(small, batch)) <= 1e-4


@pytest.mark.parametrize("path", ["intermediate.dense", "attention.self.query", "output.dense"])
def test_weights_that_layers_share_are_cut_in_each_place(path):
    model, batch = FAMILIES["bert"]()
    layers, heads, filters = model.bert.encoder.layer, torch.ones(LAYERS, HEADS), torch.ones(LAYERS, FILTERS)
    layers[1].get_submodule(path).weight = layers[0].get_submodule(path).weight
    layers[2].output.dense.bias = layers[0].output.dense.bias
    heads[0, :2], heads[1, 2:], filters[0, :20], filters[1, 28:] = 0, 0, 0, 0  # as many, but others
    for masks in (Masks(heads, filters), tuned_masks()):
        with masked(model, masks):
            expected = logits(model, batch)
        small = shrink(model, masks)
        assert difference(logits(small, batch), expected) <= 1e-5
        assert difference(logits(pad(small), batch), expected) <= 1e-5
        cut = small.bert.encoder.layer
        assert cut[2].output.dense.bias is cut[0].output.dense.bias  # nothing is cut from it: still one parameter


def test_pruning_a_pruned_model_is_refused():
    model, _ = FAMILIES["bert"]()
    small = shrink(model, tuned_masks())
    with pytest.raises(InvalidInput, match="pruned already.*dense"):
        shrink(small, tuned_masks())
    with pytest.raises(InvalidInput, match="pruned already"), masked(small, tuned_masks()):
        pass
    with pytest.raises(InvalidInput, match="takes a pruned model.*BertForSequenceClassification"):
        pad(model)
    with pytest.raises(InvalidInput, match="pass its masks"):
        export_padded(model, None, "unused")


def test_shrink_refuses_what_it_cannot_do():
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=4, vocab_size=9)
    masks = Masks(torch.ones(1, 2), torch.ones(1, 4))
    with pytest.raises(
        InvalidInput, match="BertForNextSentencePrediction.*PrunedBert|BertForNextSentencePrediction.*Expected"
    ):
        shrink(BertForNextSentencePrediction(config), masks)
    model, _ = FAMILIES["bert"]()
    with pytest.raises(InvalidInput, match="do not fit the model"):
        shrink(model, masks)
    model.extra = nn.Linear(2, 2)
    with pytest.raises(InvalidInput, match="extra.bias"):
        shrink(model, tuned_masks())
    model, _ = FAMILIES["bert"]()
    model.classifier = nn.Linear(HIDDEN, 7)
    with pytest.raises(InvalidInput, match="classifier.weight is of shape"):
        shrink(model, tuned_masks())
