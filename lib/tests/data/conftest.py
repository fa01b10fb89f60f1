"""Every test of the data has a cache of its own."""

import pytest

from effnn import paths


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")
