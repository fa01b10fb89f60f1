"""The report page: everything is inside, every claim and figure appears, and text cannot become markup."""

import base64
import json
import re
from html.parser import HTMLParser

import pytest
from helpers.home import NOTEBOOK, make_home

from effnn import paths
from effnn.report import ResultWriter, build_report, claims, new_figure, rules
from effnn.report.__main__ import main

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Collects addresses and ids, and holds that every element is closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.addresses, self.ids, self.images = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        assert tag not in ("script", "link", "iframe", "object")
        self.addresses += [attrs[name] for name in ("src", "href", "srcset", "action", "poster") if name in attrs]
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.images += [attrs] if tag == "img" else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def home(tmp_path, monkeypatch):
    return make_home(tmp_path / "home", monkeypatch)


def page():
    text = build_report().read_text(encoding="utf-8")
    return text, Page(text)


def write_results():
    figure, ax = new_figure()
    ax.plot([0, 1], [0, 1])
    for profile in ("laptop", "study"):
        with ResultWriter(NOTEBOOK, profile, seeds=[0, 1, 2]) as writer:
            writer.value("demo.loss", samples=[0.4, 0.5, 0.6], note="on <real> text")
            writer.value("demo.study", samples=[3.0, 4.0, 5.0])
            writer.figure("curve", figure, caption='Loss & "gain"', claims=["demo.loss", "demo.study"])
            writer.figure("other", figure)


def test_nothing_outside_is_loaded(home):
    write_results()
    text, parsed = page()
    for address in parsed.addresses:
        assert address.startswith(("data:image/", "#")), address
        if address.startswith("#"):
            assert address[1:] in parsed.ids
    assert not re.search(r"@import|url\(", text)
    assert len(set(parsed.ids)) == len(parsed.ids)


def test_every_claim_appears_with_verdict_published_and_measured(home):
    write_results()
    text, parsed = page()
    for entry in claims.ledger():
        article = text.split(f'id="{entry.claim.id}"')[1].split("</article>")[0]
        assert f" {entry.verdict.word}</span>" in article
        if entry.claim.published is not None:
            assert f"<dd>{rules.number(entry.claim.published)}</dd>" in article
        if entry.result is not None:
            assert rules.span_text(entry.result.interval) in article
    assert "01 A demonstration" in text and "not built yet" in text


def test_each_figure_is_once_in_the_page_with_its_caption(home):
    write_results()
    text, parsed = page()
    assert len(parsed.images) == 4  # two figures, two profiles
    assert {image["alt"] for image in parsed.images} == {
        'Loss & "gain"',
        'Loss & "gain" (study)',
        "other",
        "other (study)",
    }
    svg = base64.b64decode(parsed.images[0]["src"].split(",")[1])
    assert svg == (paths.RESULTS / "laptop" / NOTEBOOK / "curve.svg").read_bytes()
    assert "See also the figure" in text.split('id="demo.study"')[1].split("</article>")[0]


def test_text_stays_text(home):
    write_results()
    text, _ = page()
    assert "Another &lt;day&gt; &amp; more" in text and "on &lt;real&gt; text" in text
    assert "<day>" not in text and "<real>" not in text


def test_benchmarks_and_provenance_are_there(home):
    write_results()
    measured = {"median": 1.25, "min": 1.2, "max": 1.4, "runs": [1.2, 1.25, 1.4]}
    (paths.RESULTS / "bench.json").write_text(json.dumps({"demo.speed": measured}))
    text, _ = page()
    assert "1.25 [1.2, 1.4]" in text and "meets the bar" in text
    assert text.count("thread(s) a process") == 2 and "seeds 0, 1, 2" in text


def test_equal_results_give_equal_pages_and_looks_for_dark_and_paper(home):
    write_results()
    assert main(["html"]) == 0
    first = (paths.RESULTS / "report.html").read_bytes()
    build_report()
    assert (paths.RESULTS / "report.html").read_bytes() == first
    for needed in (b"prefers-color-scheme: dark", b"@media print", b"width=device-width"):
        assert needed in first


def test_the_projects_own_page_can_be_built(tmp_path, monkeypatch):
    ids = [claim.id for claim in claims.rows()]
    wanted = paths.RESULTS
    monkeypatch.setattr(paths, "RESULTS", tmp_path)
    for profile in claims.PROFILES:
        if (wanted / profile).is_dir():
            (tmp_path / profile).symlink_to(wanted / profile)
    _, parsed = page()
    assert set(ids) <= set(parsed.ids)
