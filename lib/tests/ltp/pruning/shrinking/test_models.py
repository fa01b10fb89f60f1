"""Saving and loading pruned encoders: every way to load, half-written folders, other processes, the padded export."""

import json
import logging
import pickle
import subprocess
import sys

import pytest
import torch
from helpers.encoders import FAMILIES, QA_FAMILIES, difference, logits, tuned_masks
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
)

from effnn.base import InvalidInput
from effnn.ltp.pruning.masks import Masks, Shape, masked
from effnn.ltp.pruning.shrinking import models as pruned_models
from effnn.ltp.pruning.shrinking.saving import export_padded, load_pruned
from effnn.ltp.pruning.shrinking.shrink import shrink

EVERY = {f"{name}-classification": builder for name, builder in FAMILIES.items()} | {
    f"{name}-qa": builder for name, builder in QA_FAMILIES.items()
}
AUTO = {
    "SequenceClassification": AutoModelForSequenceClassification,
    "ImageClassification": AutoModelForImageClassification,
    "QuestionAnswering": AutoModelForQuestionAnswering,
}


def auto_class(model):
    return next(auto for ending, auto in AUTO.items() if type(model).__name__.endswith(ending))


@pytest.mark.parametrize("name", EVERY)
def test_every_way_to_load(name, tmp_path, caplog, monkeypatch):
    model, batch = EVERY[name]()
    model.config.id2label = {0: "no", 1: "yes", 2: "maybe"} if model.config.num_labels == 3 else {0: "a", 1: "b"}
    small = shrink(model, tuned_masks("neither"))
    expected = logits(small, batch)
    small.save_pretrained(tmp_path)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # so that caplog sees it
    for load in (type(small).from_pretrained, auto_class(small).from_pretrained, load_pruned):
        loaded = load(tmp_path)
        assert type(loaded) is type(small) and not loaded.training
        assert difference(logits(loaded, batch), expected) == 0
        assert loaded.config.id2label == model.config.id2label
    _, info = auto_class(small).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert not caplog.records
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config).__name__ == "Pruned" + type(model.config).__name__
    assert (
        config.kept_heads == [[0, 2, 3], [], [0, 1, 2, 3]]
        and config.kept_filters == tuned_masks("neither").kept_filters
    )


def test_saving_again_after_loading_changes_nothing(tmp_path):
    model, batch = FAMILIES["vit"]()
    small = shrink(model, tuned_masks("no heads"))
    small.save_pretrained(tmp_path / "a")
    load_pruned(tmp_path / "a").save_pretrained(tmp_path / "b")
    first, second = ((tmp_path / part / "model.safetensors").read_bytes() for part in "ab")
    assert first == second
    assert (tmp_path / "a/config.json").read_text() == (tmp_path / "b/config.json").read_text()


@pytest.mark.parametrize("name", FAMILIES)
def test_an_encoder_without_its_head_loads_from_the_same_folder(name, tmp_path):
    model, batch = FAMILIES[name]()
    batch.pop("labels")
    small = shrink(model, tuned_masks("neither"))
    small.save_pretrained(tmp_path / "whole")
    small.base_model.save_pretrained(tmp_path / "encoder")
    expected = logits(small.base_model, batch)
    for folder in ("whole", "encoder"):
        assert difference(logits(AutoModel.from_pretrained(tmp_path / folder), batch), expected) == 0


def test_in_another_process(tmp_path):
    """Padded folders load with transformers alone; pruned ones, and pickles, once effnn.ltp is imported."""
    expected = {}
    for name in ("bert", "distilbert", "vit"):
        model, batch = FAMILIES[name]()
        small = shrink(model, tuned_masks("neither"))
        with masked(model, tuned_masks("neither")):
            expected[name] = logits(model, batch)
        if name == "bert":
            export_padded(model, tuned_masks("neither"), tmp_path / name)
        else:
            export_padded(small, None, tmp_path / name)
        torch.save(batch, tmp_path / name / "batch.pt")
        small.save_pretrained(tmp_path / name / "small")
        (tmp_path / name / "small" / "small.pickle").write_bytes(pickle.dumps(small))
        torch.save(logits(small, batch), tmp_path / name / "small" / "logits.pt")
    program = """
import sys, pickle, pathlib, torch
from transformers import AutoModelForSequenceClassification, AutoModelForImageClassification
folders = list(pathlib.Path(sys.argv[1]).iterdir())
images, text = AutoModelForImageClassification, AutoModelForSequenceClassification
auto = {folder: images if folder.name == "vit" else text for folder in folders}
torch.set_grad_enabled(False)
torch.set_num_threads(1)  # as here: sums in another order would not be equal bit by bit
for folder in folders:
    model, info = auto[folder].from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    torch.save(model(**torch.load(folder / "batch.pt")).logits, folder / "logits.pt")
assert not any(name.startswith("effnn") for name in sys.modules)
import effnn.ltp
for folder in folders:
    small = folder / "small"
    for model in auto[folder].from_pretrained(small), pickle.loads((small / "small.pickle").read_bytes()):
        assert torch.equal(model(**torch.load(folder / "batch.pt")).logits, torch.load(small / "logits.pt"))
"""
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for name, value in expected.items():
        assert difference(torch.load(tmp_path / name / "logits.pt"), value) <= 1e-5
        assert "kept_heads" not in json.loads((tmp_path / name / "config.json").read_text())


def test_load_pruned_refuses_other_folders(tmp_path):
    model, _ = FAMILIES["bert"]()
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(InvalidInput, match="'bert', not a pruned one"):
        load_pruned(tmp_path / "dense")
    with pytest.raises(InvalidInput, match="holds no config.json"):
        load_pruned(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{ half")
    with pytest.raises(InvalidInput, match="is not a model configuration"):
        load_pruned(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "effnn_pruned_other", "architectures": ["PrunedOther"]}')
    with pytest.raises(InvalidInput, match="not registered"):
        load_pruned(tmp_path)


@pytest.fixture
def saved(tmp_path):
    model, _ = FAMILIES["bert"]()
    small = shrink(model, tuned_masks())
    small.save_pretrained(tmp_path)
    return tmp_path, model, small


def test_half_written_folders_are_refused(saved):
    folder, model, small = saved
    weights, config = folder / "model.safetensors", folder / "config.json"
    whole, settled = weights.read_bytes(), config.read_text()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InvalidInput, match="missing, damaged or do not fit"):
        load_pruned(folder)
    weights.unlink()
    with pytest.raises(InvalidInput, match="missing, damaged or do not fit"):
        load_pruned(folder)
    weights.write_bytes(whole)
    load_pruned(folder)
    for key, value in (("kept_heads", [[0]]), ("kept_heads", [[9], [0], [0]]), ("kept_filters", [[3, 1], [0], [0]])):
        config.write_text(json.dumps(json.loads(settled) | {key: value}))
        with pytest.raises(InvalidInput, match=key):
            load_pruned(folder)
    config.write_text(json.dumps(json.loads(settled) | {"kept_heads": [[0], [], [1]]}))
    with pytest.raises(InvalidInput, match="do not fit"):
        load_pruned(folder)
    config.write_text(settled)
    tensors = load_file(weights)
    save_file({key: value for key, value in tensors.items() if key != "classifier.bias"}, weights, {"format": "pt"})
    with pytest.raises(InvalidInput, match="classifier.bias"):
        load_pruned(folder)


def test_an_interrupted_save_leaves_no_folder_that_loads_wrongly(saved, monkeypatch):
    folder, model, small = saved
    before = sorted(path.name for path in folder.iterdir())
    broken = shrink(model, Masks.ones(Shape.of(model)))
    monkeypatch.setattr(type(model), "state_dict", lambda self, *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        broken.save_pretrained(folder)
    monkeypatch.undo()
    assert sorted(path.name for path in folder.iterdir()) == before
    assert load_pruned(folder).config.kept_heads == small.config.kept_heads
    moved = []

    def stop_after_one(source, target):
        if moved:
            raise KeyboardInterrupt
        moved.append(target)
        source.rename(target)

    monkeypatch.setattr("effnn.ltp.pruning.shrinking.models.os.replace", stop_after_one)
    with pytest.raises(KeyboardInterrupt):
        broken.save_pretrained(folder)
    with pytest.raises(InvalidInput, match="half written"):
        load_pruned(folder)


def test_saving_over_a_sharded_folder_leaves_no_old_weights(saved):
    folder, model, small = saved
    shrink(model, tuned_masks("no heads")).save_pretrained(folder, max_shard_size="20KB")
    assert not (folder / "model.safetensors").exists() and load_pruned(folder).config.kept_heads[1] == []
    (folder / "notes.txt").write_text("stays")
    small.save_pretrained(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "notes.txt"]


def test_files_of_others_stay(saved):
    folder, _, small = saved
    others = ["model_backup.safetensors", "model-best.safetensors", "notes.txt"]
    for name in others:
        (folder / name).write_text("mine")
    small.save_pretrained(folder)
    assert [(folder / name).read_text() for name in others] == ["mine"] * 3


def test_class_names_are_importable():
    for name in (
        "PrunedBertForSequenceClassification",
        "PrunedRobertaForQuestionAnswering",
        "PrunedViTForImageClassification",
    ):
        found = getattr(pruned_models, name)
        assert found.__module__ == "effnn.ltp.pruning.shrinking.models" and found.__doc__
