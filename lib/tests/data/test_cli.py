"""`make data`: what it calls, and one sentence instead of a traceback where the hub cannot be reached."""

import pytest

from effnn.base import NotAvailable
from effnn.data import __main__ as cli


def test_it_downloads_the_text_data(monkeypatch, capsys):
    called = []
    monkeypatch.setattr(cli.text, "download", lambda: called.append("text"))
    assert cli.main(["download"]) == 0
    assert called == ["text"] and "cache" in capsys.readouterr().out


def test_without_the_hub_it_says_so_and_fails(monkeypatch, capsys):
    def unreachable():
        raise NotAvailable("nyu-mll/glue (sst2) could not be downloaded: give a local path")

    monkeypatch.setattr(cli.text, "download", unreachable)
    assert cli.main(["download"]) == 1
    assert capsys.readouterr().err == "no data: nyu-mll/glue (sst2) could not be downloaded: give a local path\n"


def test_another_word_is_refused():
    with pytest.raises(SystemExit):
        cli.main(["upload"])
