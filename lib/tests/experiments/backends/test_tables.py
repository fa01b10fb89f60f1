"""Notebook 06's tables and figures: the talk's table is read right, and the comparison marks what differs."""

import dataclasses

import pandas as pd
import pytest

from effnn.base import NotAvailable
from effnn.comm.emulation import network
from effnn.comm.probing import matrix
from effnn.comm.probing.operations import OPERATIONS, SPARSE
from effnn.experiments.backends import figures as backends_figures
from effnn.experiments.backends import tables as backends
from effnn.report import claims as report_claims

# The slide: CPU and GPU of each backend; y yes, x no, ? depends.
SLIDE = """
               gloo   mpi    nccl
send           y x    y ?    x y
recv           y x    y ?    x y
broadcast      y y    y ?    x y
all_reduce     y y    y ?    x y
reduce         y x    y ?    x y
all_gather     y x    y ?    x y
gather         y x    y ?    x y
scatter        y x    y ?    x x
reduce_scatter x x    x x    x y
all_to_all     x x    y ?    x y
barrier        y y    y ?    x y
"""


def slide():
    lines = [line.split() for line in SLIDE.strip().splitlines()[1:]]
    columns = [(backend, device) for backend in ("gloo", "mpi", "nccl") for device in ("cpu", "cuda")]
    words = {"y": "yes", "x": "no", "?": "?"}
    return {(*column, line[0]): words[mark] for line in lines for column, mark in zip(columns, line[1:], strict=True)}


def probe(**changes):
    """gloo and ccl answer on the CPU, everything else is missing; `changes`: operation of gloo -> status."""
    cells = []
    for backend, device in (*backends.COLUMNS, *backends.OURS):
        for operation in [*OPERATIONS, *SPARSE]:
            status, how, message = "not built", "", f"{backend} is missing"
            if device == "cpu" and backend in ("gloo", "ccl"):
                status, how, message = changes.get(operation, "ok") if backend == "gloo" else "ok", "native", ""
            cells.append(matrix.Cell(backend, device, operation, status, how if status == "ok" else "", message))
    return matrix.Probe("here", "now", 2, {}, tuple(cells))


def test_the_talks_table_is_the_slides():
    table = backends.talk_table()
    read = {(row.backend, row.device, row.operation): row.supported for row in table.itertuples()}
    assert read == slide()


def test_cells_that_differ_are_marked_and_the_others_are_not():
    table = backends.compare(probe(broadcast="wrong result")).set_index(["backend", "device", "operation"]).sort_index()
    assert len(table) == 8 * 11
    gloo = table.loc[("gloo", "cpu")]
    assert set(gloo.index[gloo.differs.eq(True)]) == {"broadcast", "reduce_scatter", "all_to_all"}
    assert "torch has added" in gloo.story["all_to_all"]
    assert table.loc[("gloo", "cuda")].differs.isna().all()  # no device here: no verdict
    assert table.loc[("mpi", "cpu")].differs.isna().all()
    assert table.loc[("nccl", "cpu")].differs.isna().all()  # never run: no verdict
    assert table.loc[("ccl", "cpu")].differs.isna().all()  # not in the talk


def test_only_native_sums_count_for_sparse_tensors():
    assert backends.sparse_backends(backends.sparse_table(probe())) == ["ccl", "gloo"]
    broken = backends.sparse_table(probe(**{"sparse all_reduce, int8": "error"}))
    assert backends.sparse_backends(broken) == ["ccl"]
    assert len(broken) == 6


def test_the_claims_count_what_the_tables_show():
    table = backends.compare(probe(broadcast="wrong result", gather="hang"))
    sparse = backends.sparse_table(probe(**{"sparse all_reduce, int8": "error"}))
    found = backends.claims(table, sparse)
    assert set(found) | {"comm.oneccl"} == {claim.id for claim in report_claims.rows() if claim.id.startswith("comm.")}
    assert found["comm.matrix"] == (2, "of 9 that could be probed: broadcast on gloo (cpu), gather on gloo (cpu)")
    since = "of 2 that could be probed: reduce_scatter on gloo (cpu), all_to_all on gloo (cpu)"
    assert found["comm.matrix_since"] == (2, since)
    assert found["comm.sparse"] == (1, "natively: ccl")
    assert found["comm.sparse_nccl"][0] is None and found["comm.sparse_nccl"][1].startswith("needs a GPU")
    assert found["comm.oneccl_support"][0] == 11


def test_what_oneccl_delegates_is_not_its_own():
    kinds = {"send": "delegated", "recv": "delegated", "barrier": "composed"}
    given = probe()
    cells = [
        dataclasses.replace(cell, how=kinds.get(cell.operation, "native")) if cell.backend == "ccl" else cell
        for cell in given.cells
        if (cell.backend, cell.device) != ("ccl", "cuda")
    ]
    table = backends.compare(dataclasses.replace(given, cells=tuple(cells)))
    count, note = backends.claims(table, backends.sparse_table(given))["comm.oneccl_support"]
    assert count == 9 and "1 composed (barrier)" in note and "2 delegated (send, recv)" in note
    missing = table[table.backend != "ccl"]
    assert backends.claims(missing, backends.sparse_table(given))["comm.oneccl_support"][0] is None


def test_sparse_sums_on_nccl_count_where_a_probe_has_them():
    given = probe()
    cells = [matrix.Cell("nccl", "cuda", name, "error" if "int8" in name else "ok", "native") for name in SPARSE]
    merged = dataclasses.replace(given, cells=(*given.cells, *cells))
    assert backends.claims(backends.compare(given), backends.sparse_table(merged))["comm.sparse_nccl"][0] == 1


def times():
    rows = [
        {"launch": launch, "backend": name, "bytes": size, "round": number, "ms": ms * (1 + number), "calls": 2}
        for launch in range(3)
        for name, ms in (("gloo", 4.0), ("ccl", 2.0 + launch))
        for size in (4096, 1 << 20)
        for number in range(3)
    ]
    return pd.DataFrame(rows)


def test_ratios_are_of_medians_launch_by_launch():
    assert backends.ratios(times(), 4096) == [0.5, 0.75, 1.0]
    assert backends.ratios(times(), 4096, above="mpi4py") == []
    row = backends.medians(times()).query("backend == 'gloo' and bytes == 1048576").iloc[0]
    assert row.ms == 8.0 and row.gb_s == pytest.approx(1048576 / 8.0e-3 / 1e9)


def test_the_matrix_figure_shows_both_tables_and_frames_what_differs():
    figure = backends_figures.draw_matrix(backends.compare(probe()))
    left, right = figure.axes
    assert [text.get_text() for text in left.texts].count("?") == 10
    shown = [text.get_text() for text in right.texts]
    assert shown.count("yes") == 22 and shown.count("n/a") == 55 and shown.count("no*") == 11
    framed = [patch for patch in right.patches if patch.get_linewidth() > 2]
    assert len(framed) == 2


def test_the_times_figure_draws_every_backend_and_both_limits():
    figure = backends_figures.draw_times(times(), {"loopback exchange": 3.0, "memory copy": 20.0})
    left, right = figure.axes
    assert [line.get_label() for line in left.lines] == ["gloo", "oneCCL"]
    assert list(left.lines[0].get_ydata()) == pytest.approx([8.0, 8.0])
    assert {"loopback exchange", "memory copy"} <= {line.get_label() for line in right.lines}


def test_without_emulated_nodes_the_computed_figure_says_so(monkeypatch):
    monkeypatch.setattr(network, "unavailable", lambda: "user namespaces are not permitted")
    row = backends.emulated_all_reduce(200, 10_000_000)
    assert row["ms"] is None and row["why"].startswith("user namespaces")

    def too_slow(self):
        raise NotAvailable("the nodes did not exchange 1 bytes within 120 s")

    monkeypatch.setattr(network, "unavailable", lambda: None)
    monkeypatch.setattr(network.EmulatedNetwork, "__enter__", too_slow)
    assert backends.emulated_all_reduce(200, 10_000_000)["why"].startswith("the nodes did not exchange")
    assert row["model_ms"] == pytest.approx(1e3 * 8e7 / (0.957 * 200e6), rel=0.01)


def test_the_backends_are_timed_for_real():
    found, limits = backends.time_all_reduce([4096], launches=1, rounds=1)
    assert {"gloo"} <= set(found.backend) <= set(backends.TIMED)
    assert (found.ms > 0).all() and (found.bytes == 4096).all()
    assert all(value > 0 for value in limits.values())
    crowded = backends.time_crowded(3, [4096], launches=1, rounds=1)
    assert set(crowded.ranks) == {3} and "gloo" in set(crowded.backend)
