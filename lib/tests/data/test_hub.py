"""Sets of the hub that are fetched whole: pinned, checked, and never fetched by loading."""

import re

import pytest

from effnn import paths
from effnn.base import InvalidInput, NotAvailable
from effnn.data import hub, text


def test_pinned_revisions_are_commits():
    assert all(re.fullmatch("[0-9a-f]{40}", entry.revision) for entry in hub.TABLE.values())


def test_loading_downloads_nothing_and_names_the_set_the_place_and_the_ways_out(monkeypatch):
    monkeypatch.setattr(hub, "fetch", lambda *_: pytest.fail("downloaded"))
    with pytest.raises(NotAvailable) as caught:
        text.load("sst2", source="hub")
    message = str(caught.value)
    for part in ("nyu-mll/glue", "sst2", str(paths.CACHE), "make data", "local path", "laptop profile"):
        assert part in message
    assert "\n" not in message


def test_a_download_out_of_reach_names_the_set_the_place_and_the_ways_out():
    with pytest.raises(NotAvailable) as caught:
        hub.fetch("glue", "sst2")
    message = str(caught.value)
    for part in ("nyu-mll/glue", "sst2", str(paths.CACHE), "local path", "laptop profile"):
        assert part in message
    assert "\n" not in message


def _fake_hub(monkeypatch, rows: dict[str, int]) -> list[tuple]:
    datasets = pytest.importorskip("datasets")
    calls = []

    def load_dataset(name, config, revision):
        calls.append((name, config, revision))
        return datasets.DatasetDict(
            {
                split: datasets.Dataset.from_dict(
                    {
                        "sentence": [f"s {i}" for i in range(n)],
                        "label": [i % 2 for i in range(n)],
                        "idx": list(range(n)),
                    }
                )
                for split, n in rows.items()
            }
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_hub_is_downloaded_once_and_read_from_parquet(monkeypatch):
    monkeypatch.setitem(hub.GLUE["glue"].rows, "sst2", {"train": 50, "validation": 4})
    calls = _fake_hub(monkeypatch, {"train": 50, "validation": 4, "test": 3})
    assert hub.fetch("glue", "sst2") == hub.fetch("glue", "sst2")
    task = text.load("sst2", source="hub")
    assert task.dev.texts == ["s 0", "s 1", "s 2", "s 3"] and len(task.train) + len(task.validation) == 50
    assert text.load("sst2", source="hub").fingerprint == task.fingerprint
    assert calls == [("nyu-mll/glue", "sst2", hub.GLUE["glue"].revision)]
    assert len(calls[0][2]) == 40


def test_hub_with_wrong_sizes_is_refused_and_leaves_nothing(monkeypatch):
    _fake_hub(monkeypatch, {"train": 50, "validation": 4})
    with pytest.raises(InvalidInput, match="train holds 50 rows, 67349 were expected"):
        hub.fetch("glue", "sst2")
    assert not list((paths.CACHE / "hub").glob("*")) if (paths.CACHE / "hub").exists() else True
