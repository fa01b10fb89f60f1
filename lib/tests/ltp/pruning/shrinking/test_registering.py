"""Registering pruned classes and adapters: it adds and never replaces, in any order, any number of times."""

import copy
import importlib
import pickle
import subprocess
import sys

import pytest
import torch
from helpers.encoders import build, difference, logits, tuned_masks
from transformers import (
    AutoModel,
    AutoModelForMultipleChoice,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForSequenceClassification,
    BertModel,
    RobertaModel,
)

from effnn.base import InvalidInput
from effnn.ltp.pruning import adapters
from effnn.ltp.pruning.adapters import BertAdapter, adapter_for, register_adapter
from effnn.ltp.pruning.shrinking import models as pruned_models
from effnn.ltp.pruning.shrinking.models import PrunedBertForSequenceClassification, register_pruned
from effnn.ltp.pruning.shrinking.saving import load_pruned
from effnn.ltp.pruning.shrinking.shrink import pad, shrink

MODULE = """
from transformers import BertConfig as StockConfig, BertForSequenceClassification as Stock, BertModel as StockModel
from effnn.ltp.pruning.adapters import BertAdapter

class MineForSequenceClassification(Stock):
    pass

class Inheriting(StockConfig):
    extra: int = 3

class InheritingForSequenceClassification(Stock):
    config_class = Inheriting

class Typed(StockConfig):
    model_type = "bert_of_a_test"

class TypedForSequenceClassification(Stock):
    config_class = Typed

class TypedAdapter(BertAdapter):
    name = "BERT of a test"
    model_types = ("bert_of_a_test",)

class BertConfig(StockConfig):
    model_type = "bert"

class BertForSequenceClassification(Stock):
    pass
"""
"""A user's module: classes on stock configurations, on configurations of one's own, and with names of stock classes."""


@pytest.fixture(autouse=True)
def _registries(monkeypatch):
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(adapters, "_ADAPTERS", list(adapters._ADAPTERS))
    monkeypatch.setattr(pruned_models, "_PRUNED", dict(pruned_models._PRUNED))
    monkeypatch.setattr(pruned_models, "_CONFIGS", dict(pruned_models._CONFIGS))


@pytest.fixture
def user(monkeypatch, tmp_path):
    """Import MODULE under a name; twice the same name runs its class statements again."""
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)

    def load(name="module_of_a_test"):
        (folder / f"{name}.py").write_text(MODULE)
        importlib.invalidate_caches()
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    load.folder = folder
    return load


@pytest.fixture
def stock(tmp_path):
    """A check that a stock pruned model goes on to load and to pickle in every way."""
    model, batch = build("bert")
    small = shrink(model, tuned_masks("neither"))
    expected = logits(small, batch)
    small.save_pretrained(tmp_path / "stock")
    early = pickle.dumps(small)

    def check():
        for found in (
            load_pruned(tmp_path / "stock"),
            AutoModelForSequenceClassification.from_pretrained(tmp_path / "stock"),
            PrunedBertForSequenceClassification.from_pretrained(tmp_path / "stock"),
            pickle.loads(pickle.dumps(small)),
            pickle.loads(early),
            copy.deepcopy(small),
            shrink(model, tuned_masks("neither")),
        ):
            assert type(found) is PrunedBertForSequenceClassification is type(small)
            assert type(found.config) is type(small.config)
            assert difference(logits(found, batch), expected) == 0
        assert type(AutoModel.from_pretrained(tmp_path / "stock")).__name__ == "PrunedBertModel"
        assert type(pad(small)) is BertForSequenceClassification

    check()
    return check


def _round_trip(model_class, config_class, folder, auto=AutoModelForSequenceClassification):
    """Shrink a model of the class, save it, and get it back in every way; returns the small model."""
    values = build("bert")[0].config.to_dict()
    gone = ("model_type", "architectures", "transformers_version")
    model = model_class(config_class(**{key: value for key, value in values.items() if key not in gone})).eval()
    small = shrink(model, tuned_masks("neither"))
    assert type(small).dense_class is model_class and type(small.config).dense_class is config_class
    small.save_pretrained(folder)
    for found in load_pruned(folder), auto.from_pretrained(folder), pickle.loads(pickle.dumps(small)):
        assert type(found) is type(small) and type(found.config) is type(small.config)
        for key, value in small.state_dict().items():
            assert torch.equal(found.state_dict()[key], value)
    assert type(pad(small)) is model_class
    return small


def test_more_classes_of_a_known_family(stock, tmp_path):
    (first,) = register_pruned(BertConfig, [BertForMultipleChoice])
    stock()
    again = register_pruned(BertConfig, [BertForNextSentencePrediction, BertForMultipleChoice])
    assert again[1] is first and first.__name__ == "PrunedBertForMultipleChoice"
    assert register_pruned(BertConfig, [BertForSequenceClassification]) == [PrunedBertForSequenceClassification]
    assert {each.config_class for each in again} == {PrunedBertForSequenceClassification.config_class}
    stock()
    _round_trip(BertForMultipleChoice, BertConfig, tmp_path / "choice", AutoModelForMultipleChoice)
    stock()


def test_a_class_of_ones_own_with_a_stock_configuration(stock, user, tmp_path):
    """Two classes share an ending and a configuration: Auto takes the one that the folder names."""
    mine = user().MineForSequenceClassification
    with pytest.raises(InvalidInput, match=r"register_pruned\(BertConfig, \[MineForSequenceClassification\]\)"):
        _round_trip(mine, BertConfig, tmp_path / "mine")
    for _ in range(2):
        register_pruned(BertConfig, [mine])
        small = _round_trip(mine, BertConfig, tmp_path / "mine")
        assert type(small).__name__ == "PrunedMineForSequenceClassification"
        stock()


@pytest.mark.parametrize("order", [1, -1])
def test_configurations_of_ones_own(stock, user, order, tmp_path):
    """One that inherits its model type, one with its own, and a stock class with one's own: in any order."""
    module = user()
    register_adapter(module.TypedAdapter())
    pairs = [
        (module.Inheriting, module.InheritingForSequenceClassification),
        (module.Typed, module.TypedForSequenceClassification),
        (module.Inheriting, BertForSequenceClassification),
        (module.BertConfig, module.BertForSequenceClassification),
    ][::order]
    for config_class, model_class in pairs:
        register_pruned(config_class, [model_class])
        stock()
    types = [
        _round_trip(model_class, config_class, tmp_path / str(index)).config.model_type
        for index, (config_class, model_class) in enumerate(pairs)
    ]
    prefix = "effnn_pruned_bert"
    assert types[::order] == [
        f"{prefix}_Inheriting",
        f"{prefix}_of_a_test",
        f"{prefix}_Inheriting",
        f"{prefix}_BertConfig",
    ]
    stock()


def test_a_pickle_registers_its_class_by_itself(user, tmp_path):
    module = user()
    register_pruned(module.Inheriting, [module.InheritingForSequenceClassification])
    small = _round_trip(module.InheritingForSequenceClassification, module.Inheriting, tmp_path / "small")
    path = tmp_path / "small.pickle"
    path.write_bytes(pickle.dumps(small))
    program = """
import pickle, sys
sys.path.insert(0, sys.argv[1])
small = pickle.load(open(sys.argv[2], "rb"))
print(type(small).__name__, type(small.config).__name__, small.config.extra)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, user.folder, path], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == ["PrunedInheritingForSequenceClassification", "PrunedInheriting", "3"], done.stderr


def test_names_that_a_folder_could_not_tell_apart_are_refused(stock, user):
    one, other = user("module_of_a_test"), user("another_module_of_a_test")
    with pytest.raises(
        InvalidInput, match="module_of_a_test.BertForSequenceClassification has the name of .*holds names only: rename"
    ):
        register_pruned(BertConfig, [BertForNextSentencePrediction, one.BertForSequenceClassification])
    assert (BertForNextSentencePrediction, BertConfig) not in pruned_models._PRUNED, "half of the list was registered"
    register_pruned(BertConfig, [one.MineForSequenceClassification])
    with pytest.raises(InvalidInput, match="another_module_of_a_test.Mine.* has the name of module_of_a_test.Mine"):
        register_pruned(BertConfig, [other.MineForSequenceClassification])
    register_pruned(one.Typed, [one.TypedForSequenceClassification])
    with pytest.raises(
        InvalidInput,
        match="another_module_of_a_test.Typed has the name of module_of_a_test.Typed.*model_type of its own",
    ):
        register_pruned(other.Typed, [other.TypedForSequenceClassification])
    other.Typed.model_type = "other_bert_of_a_test"
    register_pruned(other.Typed, [other.TypedForSequenceClassification])
    other.MineForSequenceClassification.__name__ = "OthersForSequenceClassification"
    register_pruned(BertConfig, [other.MineForSequenceClassification])
    stock()


def test_a_cell_run_twice_takes_its_own_place(stock, user, tmp_path):
    first_typed = None  # the cell of the configuration was run again, that of the model was not
    for _ in range(3):
        module = user()
        register_adapter(module.TypedAdapter())
        first_typed = first_typed or module.Typed
        module.TypedForSequenceClassification.config_class = first_typed
        register_pruned(module.Typed, [module.TypedForSequenceClassification])
        register_pruned(BertConfig, [module.MineForSequenceClassification])
        _round_trip(module.TypedForSequenceClassification, module.Typed, tmp_path / "typed")
        _round_trip(module.MineForSequenceClassification, BertConfig, tmp_path / "mine")
        stock()
    assert [adapter.name for adapter in adapters._ADAPTERS].count("BERT of a test") == 1


def test_a_subclass_of_a_pruned_class_pickles_as_itself():
    small = shrink(build("bert")[0], tuned_masks("neither"))
    small.__class__ = _Sub
    assert type(pickle.loads(pickle.dumps(small))) is _Sub and type(copy.deepcopy(small)) is _Sub


class _Sub(PrunedBertForSequenceClassification):
    pass


class _OtherLayout(BertAdapter):
    """Of a fork that keeps the model type but wraps its layers."""

    name = "other layout"
    linear_names = {part: f"body.{path}" for part, path in BertAdapter.linear_names.items()}


def test_an_adapter_for_a_covered_type_adds_a_layout(stock):
    model, _ = build("bert")
    register_adapter(_OtherLayout())
    assert type(adapter_for(model)) is BertAdapter
    stock()

    class Preferred(BertAdapter):
        name = "preferred"

    register_adapter(Preferred())
    assert adapter_for(model).name == "preferred", "of those that fit, the latest is asked first"
    stock()


def test_a_pruned_model_without_its_adapter_says_so(user, tmp_path, monkeypatch):
    module = user()
    plain = list(adapters._ADAPTERS)
    register_adapter(module.TypedAdapter())
    register_pruned(module.Typed, [module.TypedForSequenceClassification])
    _round_trip(module.TypedForSequenceClassification, module.Typed, tmp_path / "typed")
    monkeypatch.setattr(adapters, "_ADAPTERS", plain)
    with pytest.raises(InvalidInput, match="no adapter covers PrunedTyped.*'bert_of_a_test'.*register_adapter"):
        load_pruned(tmp_path / "typed")
    register_adapter(module.TypedAdapter())
    load_pruned(tmp_path / "typed")


@pytest.mark.parametrize(
    "config_class, model_classes, message",
    [
        (BertConfig, BertForMultipleChoice, "expected a list of transformers model classes"),
        (BertConfig, ["BertModel"], "expected a list of transformers model classes"),
        (BertConfig(), [BertModel], "expected a configuration class, such as BertConfig; found an object"),
        (BertModel, [BertModel], "expected a configuration class.*BertModel"),
        (BertConfig, [RobertaModel], "RobertaModel takes a RobertaConfig, not a BertConfig"),
        (BertConfig, [PrunedBertForSequenceClassification], "pruned already"),
        (PrunedBertForSequenceClassification.config_class, [BertModel], "pruned already"),
    ],
)
def test_what_is_no_pair_of_classes_is_refused(config_class, model_classes, message):
    with pytest.raises(InvalidInput, match=message):
        register_pruned(config_class, model_classes)
