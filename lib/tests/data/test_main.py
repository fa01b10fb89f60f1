"""`python -m effnn.data`: what it fetches, and one sentence instead of a traceback where the hub is out of reach."""

import pytest
from helpers.hub import wikitext

from effnn import paths
from effnn.base import EffnnError, NotAvailable
from effnn.data import __main__ as cli
from effnn.data import hub
from effnn.data.corpus import download as corpus_download


def _commands(monkeypatch) -> list:
    called = []
    monkeypatch.setattr(cli.hub, "download", lambda names: called.append([*names]))
    monkeypatch.setattr(cli.corpus_download, "download", lambda names, limit: called.append((names, limit)))
    return called


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], [["glue"]]),
        (["text"], [["glue"]]),
        (["squad"], [["squad", "squad_v2"]]),
        (["c4", "gpt2"], [(["c4", "gpt2"], corpus_download.LIMIT_TOKENS)]),
        (["gpt2", "c4", "gpt2"], [(["c4", "gpt2"], corpus_download.LIMIT_TOKENS)]),
        (["corpus", "--limit-tokens", "7"], [([*hub.CORPORA, "gpt2"], 7)]),
        (["text", "lambada"], [["glue"], (["lambada"], corpus_download.LIMIT_TOKENS)]),
    ],
)
def test_the_command_line_fetches_what_it_is_told(monkeypatch, capsys, words, expected):
    called = _commands(monkeypatch)
    assert cli.main(["download", *words]) == 0
    assert called == expected and str(paths.CACHE) in capsys.readouterr().out


def test_the_command_line_refuses_what_it_does_not_know(monkeypatch, capsys):
    called = _commands(monkeypatch)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["download", "c4", "pile"])
    assert stopped.value.code == 2 and called == []
    assert "unknown: pile; choose from text, squad, corpus, wikitext-103" in capsys.readouterr().err


def test_the_command_line_says_why_there_are_no_data(monkeypatch, capsys):
    mocked = wikitext(monkeypatch)
    mocked.breaks = 0
    assert cli.main(["download", "wikitext-103"]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("no data: Salesforce/wikitext (wikitext-103-raw-v1) could not be downloaded")
    assert cli.main(["download", "c4", "--limit-tokens", "0"]) == 1
    assert "limit_tokens=0: expected at least 1" in capsys.readouterr().err
    assert issubclass(NotAvailable, EffnnError)


def test_without_the_hub_it_says_so_and_fails(monkeypatch, capsys):
    def unreachable(_):
        raise NotAvailable("nyu-mll/glue (sst2) could not be downloaded: give a local path")

    monkeypatch.setattr(cli.hub, "download", unreachable)
    assert cli.main(["download"]) == 1
    assert capsys.readouterr().err == "no data: nyu-mll/glue (sst2) could not be downloaded: give a local path\n"


def test_another_word_is_refused():
    with pytest.raises(SystemExit):
        cli.main(["upload"])
