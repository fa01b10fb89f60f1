"""A small home of its own for tests of the report room: data, notebooks, results and cache in a temporary folder."""

import json
from pathlib import Path

import pytest

from effnn import paths

HEADER = "id,slide,claim,kind,published,unit,held,direction,notebook,profile\n"
CLAIMS = HEADER + (
    "demo.loss,Slide A,Little is lost,value,1,points lost,<=1,<=3,01,laptop\n"
    'demo.exact,Slide A,"Never, ever above",exact,,share kept,==1,,01,laptop\n'
    "demo.study,Slide B,It pays,direction,20,percent,>=20,>0,01,study\n"
    "demo.strict,Slide B,It is positive,direction,,difference,>0,,01,laptop\n"
    "demo.picture,Slide C,It grows,figure,,parameters,,,01,laptop\n"
    "later.thing,Slide D,Another <day> & more,direction,,ratio,<=1,<=2,02,laptop\n"
)
BENCH = "key,bar,unit,meaning\ndemo.speed,<=1.5,ratio,ours over theirs\nlater.speed,>=2,ratio,x over y\n"
NOTEBOOK = "01_demo"


def make_home(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Point `effnn.paths` at a fresh home under `root` with one notebook, claims, bars and a README; returns it."""
    for name in ("HOME", "DATA", "NOTEBOOKS", "RESULTS", "CACHE", "PUBLISHED"):
        folder = root / ("" if name == "HOME" else name.lower())
        folder.mkdir(parents=True, exist_ok=True)
        monkeypatch.setattr(paths, name, folder)
    for name, text in (("CLAIMS", CLAIMS), ("BENCH_BARS", BENCH)):
        path = root / "data" / f"{name.lower()}.csv"
        path.write_text(text)
        monkeypatch.setattr(paths, name, path)
    cells = [{"cell_type": "markdown", "source": ["# 01. A demonstration\n", "text"]}]
    (root / "notebooks" / f"{NOTEBOOK}.ipynb").write_text(json.dumps({"cells": cells}))
    (root / "README.md").write_text("# Demo\n\n<!-- claims:begin -->\nold\n<!-- claims:end -->\n\nlast line\n")
    return root
