"""One trained tiny classifier for each test that needs one."""

import pytest
from helpers.planted import TINY, planted_task

from effnn import paths
from effnn.experiments.shared.classifier import train_classifier
from effnn.experiments.shared.models import ClassifierConfig


@pytest.fixture
def start(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")
    task = planted_task(400)
    config = ClassifierConfig(**TINY | {"layers": 2})
    return task, config, train_classifier(task, config)
