"""Pretrained encoders as a start: their weights enter the training, their head does not, and nothing else is read."""

import pytest
import torch
from helpers.planted import TINY, planted_task
from transformers import BertForMaskedLM, GPT2Config, GPT2Model

from effnn import paths
from effnn.base import InvalidInput, NotAvailable
from effnn.data import packages, text
from effnn.experiments.shared import classifier, pretrained
from effnn.experiments.shared.classifier import ClassifierConfig, train_classifier
from effnn.experiments.shared.models import MINILM, build_model

CACHE = paths.CACHE
RECIPE = {"epochs": 1, "batch_size": 16, "learning_rate": 3e-3, "max_length": 16}


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")


@pytest.fixture
def start(tmp_path):
    """A tiny BERT, saved as encoders come: another head, and its tokenizer beside it."""
    task = planted_task(60)
    tokenizer = text.tokenizer_for(task, TINY["vocab"])
    made = build_model(task, ClassifierConfig(**TINY, seed=5), tokenizer)
    folder = tmp_path / "encoder"
    BertForMaskedLM(made.config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_encoder_is_the_given_one_and_the_head_is_new(start):
    task, config = planted_task(60), ClassifierConfig(start=str(start), **RECIPE)
    model, again = (build_model(task, config, None) for _ in range(2))
    given = BertForMaskedLM.from_pretrained(start).bert.state_dict()
    assert all(torch.equal(value, given[name]) for name, value in model.bert.state_dict().items() if name in given)
    assert torch.equal(model.classifier.weight, again.classifier.weight)
    other = build_model(task, ClassifierConfig(start=str(start), **RECIPE, seed=1), None)
    assert not torch.equal(model.classifier.weight, other.classifier.weight)
    assert model.config.id2label == {0: "no", 1: "yes"} and model.config.attention_probs_dropout_prob == 0


def test_it_is_fine_tuned_with_its_own_tokenizer_and_cached(start, monkeypatch):
    task, config = planted_task(200), ClassifierConfig(start=str(start), **RECIPE | {"epochs": 3})
    trained = train_classifier(task, config)
    assert trained.accuracy > 0.9 and trained.model.config.hidden_size == TINY["hidden"]
    assert len(trained.tokenizer) == len(pretrained.load_tokenizer(str(start)))
    monkeypatch.setattr(classifier, "fit", None)
    again = train_classifier(task, config)
    assert again.dev == trained.dev
    assert all(torch.equal(a, b) for a, b in zip(trained.model.parameters(), again.model.parameters(), strict=True))


def test_other_weights_in_the_same_folder_are_trained_anew(start):
    task, config = planted_task(60), ClassifierConfig(start=str(start), **RECIPE)
    first = train_classifier(task, config)
    model = BertForMaskedLM.from_pretrained(start)
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight.mul_(1.5)
    model.save_pretrained(start)
    assert train_classifier(task, config).dev.loss != first.dev.loss


CASES = {
    "no folder": ("/nowhere/encoder", NotAvailable, "'/nowhere/encoder' was not found: give start=minilm"),
    "a hub id": ("someone/encoder", InvalidInput, "needs a revision, someone/encoder@<commit>"),
    "out of reach": ("someone/encoder@1110a243", NotAvailable, "gives no tokenizer"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_missing_is_named_with_the_ways_out(case):
    given, kind, message = CASES[case]
    with pytest.raises(kind, match=message):
        train_classifier(planted_task(60), ClassifierConfig(start=given, **RECIPE))


def test_pickled_weights_are_not_read(start):
    (start / "model.safetensors").unlink()
    torch.save({}, start / "pytorch_model.bin")
    with pytest.raises(NotAvailable, match="holds no model.safetensors, the only file that weights are read from"):
        train_classifier(planted_task(60), ClassifierConfig(start=str(start), **RECIPE))


def test_half_a_file_of_weights_is_said(start):
    content = (start / "model.safetensors").read_bytes()
    (start / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(NotAvailable, match="the weights of .* cannot be read"):
        build_model(planted_task(60), ClassifierConfig(start=str(start), **RECIPE), None)


def test_options_that_contradict_a_start_are_refused():
    with pytest.raises(InvalidInput, match="brings its own architecture"):
        ClassifierConfig(start="minilm", family="electra")
    with pytest.raises(InvalidInput, match="brings its own architecture"):
        ClassifierConfig(start="minilm", checkpoint="/mine")


def test_without_the_package_the_ways_out_are_named():
    with pytest.raises(NotAvailable, match="python -m effnn.data packages minilm"):
        train_classifier(planted_task(60), MINILM)


def test_the_real_encoder(monkeypatch):
    monkeypatch.setattr(paths, "CACHE", CACHE)
    try:
        packages.folder("minilm")
    except NotAvailable as error:
        pytest.skip(str(error))
    model = build_model(planted_task(60), MINILM, None)
    assert model.config.num_hidden_layers == 6 and model.config.num_attention_heads == 12
    assert model.config.intermediate_size == 1536
    assert sum(p.numel() for p in model.bert.parameters()) == 22_713_216


def test_a_decoder_is_refused(tmp_path):
    GPT2Model(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=20)).save_pretrained(tmp_path)
    with pytest.raises(InvalidInput, match="of type 'gpt2'; expected an encoder"):
        build_model(planted_task(60), ClassifierConfig(start=str(tmp_path), **RECIPE), None)
