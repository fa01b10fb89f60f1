"""Downloads of corpora: once, in part, cut off, and refused."""

import pytest
from helpers.corpora import fast_tokenizer, texts, written
from helpers.hub import c4, wikitext

from effnn.base import InvalidInput, NotAvailable
from effnn.data import corpus, hub
from effnn.data.corpus import coders
from effnn.data.corpus import download as corpus_download
from effnn.data.corpus import hub as corpus_hub
from effnn.data.corpus.documents import SPLITS
from effnn.data.files import reading


def test_wikitext_is_downloaded_once_and_is_the_published_file(tmp_path, monkeypatch):
    mocked = wikitext(monkeypatch)
    (folder,) = corpus_download.download(["wikitext-103"])
    assert corpus_download.fetch("wikitext-103") == folder == hub.folder_of("wikitext-103")
    revision = hub.CORPORA["wikitext-103"].revision
    assert mocked.asked == [("Salesforce/wikitext", "wikitext-103-raw-v1", split, revision) for split in SPLITS]
    found = corpus.load("wikitext-103", "hub", "character")
    assert found.source == f"hub: Salesforce/wikitext/wikitext-103-raw-v1 at {revision[:12]}"
    for split in SPLITS:
        text = "".join(row or " \n" for row in mocked.texts[split])
        assert texts(found)[split] == text
        written(tmp_path / "local" / f"wiki.{split}.raw", text)
    assert corpus.load("wikitext-103", tmp_path / "local", "character").fingerprint == found.fingerprint


def test_what_was_not_downloaded_is_not_available(monkeypatch):
    wikitext(monkeypatch)
    with pytest.raises(NotAvailable, match=r"Salesforce/wikitext .* run `python -m effnn.data download wikitext-103`"):
        corpus.load("wikitext-103", "hub", "character")
    with pytest.raises(InvalidInput, match="unknown data set of the hub 'pile'"):
        corpus_download.download(["pile"])
    with pytest.raises(InvalidInput, match="limit_tokens=0"):
        corpus_download.download(["c4"], 0)


def test_a_download_that_was_cut_off_goes_on_after_the_last_whole_shard(monkeypatch):
    mocked = wikitext(monkeypatch)
    monkeypatch.setattr(corpus_download, "SHARD_CHARACTERS", 150)
    mocked.breaks = 17
    with pytest.raises(NotAvailable, match="ConnectionError: no route to the hub") as raised:
        corpus_download.download(["wikitext-103"])
    folder = hub.folder_of("wikitext-103")
    kept = sum(len(list(reading.read_rows(path))) for path in corpus_hub.shards(folder, "train"))
    assert 0 < kept < 17 and f"{kept} rows of train are in {folder}" in str(raised.value)
    assert "more words" not in str(raised.value)
    with pytest.raises(NotAvailable, match="not whole"):
        corpus.load("wikitext-103", "hub", "character")
    mocked.breaks = None
    corpus_download.download(["wikitext-103"])
    assert mocked.begun == [("train", 0), ("train", kept), ("validation", 0), ("test", 0)]
    found = corpus.load("wikitext-103", "hub", "character")
    assert texts(found) == {s: "".join(row or " \n" for row in mocked.texts[s]) for s in SPLITS}
    assert len(corpus_hub.shards(folder, "train")) > 3


def test_a_split_of_another_size_is_refused_and_leaves_nothing(monkeypatch):
    mocked = wikitext(monkeypatch)
    mocked.texts["validation"].append("one more")
    with pytest.raises(InvalidInput, match="split validation holds 31 rows, 30 were expected"):
        corpus_download.download(["wikitext-103"])
    folder = hub.folder_of("wikitext-103")
    assert not list(folder.glob("validation*")) and corpus_hub.shards(folder, "train")
    mocked.texts["validation"].pop()
    corpus_download.download(["wikitext-103"])
    assert [split for split, _ in mocked.begun] == ["train", "validation", "validation", "test"]


def test_part_of_c4_and_then_more(monkeypatch):
    mocked = c4(monkeypatch)
    corpus_download.download(["c4"], 400)
    found = corpus.load("c4", "hub", "character")
    have = texts(found)["train"].split("\n\n")
    assert have == mocked.texts["train"][: len(have)] and 2000 <= sum(map(len, have)) < 2100
    assert f"the first {len(have)} rows of train" in found.source
    held_out = texts(found)["validation"].split("\n\n"), texts(found)["test"].split("\n\n")
    assert all(held_out) and not set(held_out[0]) & set(held_out[1])
    assert {*held_out[0], *held_out[1]} == set(mocked.texts["validation"][: len(held_out[0]) + len(held_out[1])])

    assert len(corpus.load("c4", "hub", "character", limit_tokens=900).train) == 900
    with pytest.raises(InvalidInput, match=r"tokens of train were downloaded, limit_tokens=5,000 asks for more"):
        corpus.load("c4", "hub", "character", limit_tokens=5000)
    mocked.begun.clear()
    corpus_download.download(["c4"], 300)  # less than is there
    assert mocked.begun == []
    corpus_download.download(["c4"], 1100)
    assert mocked.begun == [("train", len(have))]
    assert len(corpus.load("c4", "hub", "character", limit_tokens=5000).train) == 5000

    corpus_download.download(["c4"], 10**6)  # all there is
    everything = corpus.load("c4", "hub", "character", limit_tokens=10**6)
    assert (
        texts(everything)["train"].split("\n\n") == mocked.texts["train"] and "rows of train" not in everything.source
    )
    asked = len(mocked.asked)
    corpus_download.download(["c4"], 10**7)
    assert not [split for _, _, split, _ in mocked.asked[asked:] if split == "train"]


def test_gpt2s_tokenizer_is_fetched_once(monkeypatch):
    from transformers import AutoTokenizer

    asked = []

    def from_pretrained(name, revision):
        asked.append((name, revision))
        if len(asked) == 1:
            raise OSError("offline")
        return fast_tokenizer()

    with monkeypatch.context() as patched:
        patched.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
        with pytest.raises(NotAvailable, match=r"openai-community/gpt2.*OSError: offline"):
            corpus_download.download(["gpt2"])
        assert not hub.folder_of("gpt2").exists()
        assert corpus_download.download(["gpt2"]) == corpus_download.download(["gpt2"]) == [hub.folder_of("gpt2")]
    assert asked == [(hub.TOKENIZERS["gpt2"].id, hub.TOKENIZERS["gpt2"].revision)] * 2
    assert corpus_hub.gpt2().fingerprint == coders.Pretrained(fast_tokenizer()).fingerprint
