"""The support matrix: what it finds here, what failing operations cost it, and probes of several machines."""

import dataclasses
import json
import subprocess

import pytest
import torch
import torch.distributed as dist
from helpers.backends import need
from workers import units as workers

from effnn.base import InvalidInput
from effnn.comm import launch
from effnn.comm.groups.oneccl.group import SUPPORT
from effnn.comm.probing import answers, matrix, operations
from effnn.comm.probing.answers import Answer, Status
from effnn.comm.probing.matrix import Cell, Probe

ELEVEN = list(operations.OPERATIONS)


# What is found here


@pytest.fixture(scope="module")
def gloo():
    return matrix.probe(["gloo"], progress=False)


def test_gloo_does_all_of_it_on_cpu(gloo):
    assert [cell.operation for cell in gloo.cells if cell.device == "cpu"] == [*ELEVEN, *operations.SPARSE]
    for name in ELEVEN:
        assert gloo.cell("gloo", "cpu", name) == Cell("gloo", "cpu", name, "ok", "native"), name
    assert gloo.world_size == 2 and gloo.versions["torch"] == torch.__version__ and gloo.machine and gloo.created


def test_gloo_sums_sparse_tensors_of_both_types(gloo):
    for name, how in zip(operations.SPARSE, ("native", "native", "composed"), strict=True):
        assert gloo.cell("gloo", "cpu", name) == Cell("gloo", "cpu", name, "ok", how)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_its_cells_have_no_device(gloo):
    assert {(cell.status, cell.message) for cell in gloo.cells if cell.device == "cuda"} == {
        ("no device", "no CUDA device on this machine")
    }
    assert gloo.cell("gloo", "cuda", "send").how == "" and gloo.cell("gloo", "tpu", "send") is None


def test_cells_of_oneccl_say_how(monkeypatch):
    need("ccl")
    probe = matrix.probe(["ccl"], ["cpu"], progress=False)
    assert {name: probe.cell("ccl", "cpu", name) for name in ELEVEN} == {
        name: Cell("ccl", "cpu", name, "ok", SUPPORT[name]) for name in ELEVEN
    }
    assert set(SUPPORT.values()) == set(matrix.How)
    assert {probe.cell("ccl", "cpu", name).how for name in operations.SPARSE} == {"composed"}
    assert "oneccl" in probe.versions


def no_launch(*_, **__):
    raise AssertionError("nothing is to be started")


def test_what_is_not_built_is_not_started(monkeypatch):
    monkeypatch.setattr(launch, "run_ranks", no_launch)
    monkeypatch.setattr(dist, "is_mpi_available", lambda: False)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    probe = matrix.probe(["mpi", "nccl"], ["cpu", "cuda"], selected=ELEVEN, progress=False)
    assert len(probe.cells) == 4 * 11
    for backend, words in (("mpi", "built without MPI"), ("nccl", "built without nccl")):
        for device in ("cpu", "cuda"):
            for name in ELEVEN:
                cell = probe.cell(backend, device, name)
                assert cell.status == "not built" and words in cell.message and not cell.how


def test_unknown_names_list_the_known_ones(monkeypatch):
    monkeypatch.setattr(launch, "run_ranks", no_launch)
    with pytest.raises(InvalidInput, match="'all_sum': expected some of send, recv, .*float32, .*of .ids, values."):
        matrix.probe(["gloo"], selected=["all_sum"])
    with pytest.raises(InvalidInput, match="'glue': expected one of gloo"):
        matrix.probe(["glue"])


# Values are checked


@pytest.fixture(scope="module")
def verdicts():
    return launch.run(workers.checks_of_idle_functions, 2, "gloo", timeout=300, group_timeout=10)


@pytest.mark.parametrize("row", list(workers.NEEDS))
def test_a_function_that_does_nothing_is_found_out(verdicts, row):
    assert set(workers.NEEDS) == {*operations.OPERATIONS, *operations.SPARSE}
    tried = [function for name, function in verdicts[0] if name == row]
    assert tried[-1] == "real" and len(tried) > 1
    for functions in tried[:-1]:
        found = [ranks[row, functions] for ranks in verdicts]
        assert any(verdict.startswith("wrong result: ") for verdict in found), (functions, found)
    assert [ranks[row, "real"] for ranks in verdicts] == ["ok", "ok"]


# Operations that fail


@pytest.fixture(scope="module")
def stand_ins(_fork_server):
    with pytest.MonkeyPatch.context() as patch:
        if _fork_server is not None:
            patch.setattr(subprocess, "Popen", _fork_server)
        patch.setattr(matrix, "_AT_FIRST", {"timeout": 6.0, "group_timeout": 2.0})
        patch.setattr(launch, "PATIENT", {"timeout": 14.0, "group_timeout": 5.0})
        probe = matrix.probe(["gloo"], ["cpu"], progress=False, checks="workers.units:STAND_INS")
    return {cell.operation: cell for cell in probe.cells}


def test_an_operation_that_fails_costs_only_its_own_cell(stand_ins):
    assert list(stand_ins) == list(workers.STAND_INS)
    assert {name for name, cell in stand_ins.items() if cell.status == "ok"} == {"first", "second", "third"}


@pytest.mark.parametrize(
    ("name", "status", "message"),
    [
        ("wrong", "wrong result", "element 0 is 1.0, expected 2.0"),
        ("raises", "error", "ValueError: in rank 1"),
        ("kills", "error", "killed by SIGKILL"),
        ("hangs", "hang", launch.STILL_RUNNING),
        ("waits", "hang", "imed out"),
    ],
)
def test_a_failing_operation_says_what_became_of_it(stand_ins, name, status, message):
    cell = stand_ins[name]
    assert cell.status == status and message in cell.message and cell.how == "" and "\n" not in cell.message


def test_processes_that_do_not_even_begin_are_started_once(monkeypatch):
    starts = []

    def run_ranks(*_, **__):
        starts.append(1)
        return [
            launch.RankResult(rank, error=f"RuntimeError: no way in for {rank}", finished=2.0 - rank) for rank in (0, 1)
        ]

    monkeypatch.setattr(launch, "run_ranks", run_ranks)
    probe = matrix.probe(["gloo"], ["cpu"], progress=False)
    assert len(starts) == 1 and len(probe.cells) == 14
    assert {(cell.status, cell.message) for cell in probe.cells} == {("error", "RuntimeError: no way in for 1")}


def probe_of(monkeypatch, *runs):
    """Probe operations a, b and c with those answers; returns what is found, and names and limits of each run."""
    given, asked = list(runs), []

    def in_new_processes(backend, device, names, world_size, checks, **limits):
        asked.append(("".join(names), limits))
        return given.pop(0)

    monkeypatch.setattr(answers, "imported", lambda checks: dict.fromkeys("abc"))
    monkeypatch.setattr(answers, "in_new_processes", in_new_processes)
    probe = matrix.probe(["gloo"], ["cpu"], progress=False)
    assert not given
    return {cell.operation: (cell.status, cell.message) for cell in probe.cells}, asked


WELL, HANG = Answer(Status.OK), Answer(Status.HANG, "slow")
LOST = Answer(Status.ERROR, "connection closed", of_communication=True)


@pytest.mark.parametrize("slow", [HANG, LOST])
def test_what_may_be_slowness_counts_only_once_it_has_failed_again_alone_and_with_patience(monkeypatch, slow):
    quick, patient = matrix._AT_FIRST, launch.PATIENT
    found, asked = probe_of(monkeypatch, {"a": WELL, "b": slow}, {"b": WELL}, {"c": WELL})
    assert found == dict.fromkeys("abc", ("ok", ""))
    assert asked == [("abc", quick), ("b", patient), ("c", quick)]
    found, asked = probe_of(monkeypatch, {"a": WELL, "b": slow}, {"b": slow}, {"c": WELL})
    assert found["b"] == (slow.status, slow.message) and [names for names, _ in asked] == ["abc", "b", "c"]


def test_ranks_that_were_too_slow_to_begin_are_started_again_with_patience(monkeypatch):
    found, asked = probe_of(monkeypatch, dict.fromkeys("abc", HANG), {"a": WELL, "b": HANG}, {"c": WELL})
    assert found == {"a": ("ok", ""), "b": ("hang", "slow"), "c": ("ok", "")}
    assert asked == [("abc", matrix._AT_FIRST), ("abc", launch.PATIENT), ("c", matrix._AT_FIRST)]


def test_an_error_of_its_own_counts_at_once(monkeypatch):
    wrong, error = Answer(Status.WRONG, "1.0"), Answer(Status.ERROR, "killed by SIGSEGV")
    found, asked = probe_of(monkeypatch, {"a": wrong}, {"b": error}, {"c": WELL})
    assert found == {"a": ("wrong result", "1.0"), "b": ("error", "killed by SIGSEGV"), "c": ("ok", "")}
    assert [names for names, _ in asked] == ["abc", "bc", "c"]


# Probes of several machines


def made(machine, **statuses):
    cells = [
        Cell("gloo", "cuda", name, status, "native" if status == "ok" else "") for name, status in statuses.items()
    ]
    return Probe(machine, "2026-01-01T00:00:00+00:00", 2, {"torch": "2.13.0"}, tuple(cells))


def test_a_saved_probe_is_the_same_when_loaded(tmp_path, gloo):
    path = gloo.save(tmp_path / "probe.json")
    assert matrix.load(path) == gloo and matrix.load(str(path)).save(path) == path
    assert json.loads(path.read_text()) == gloo.as_dict() | {"cells": list(map(dataclasses.asdict, gloo.cells))}


def content(**changes):
    return {**made("here", send="ok").as_dict(), **changes}


@pytest.mark.parametrize(
    "nonsense",
    [
        "",
        "not JSON",
        "[1, 2]",
        '"text"',
        "{}",
        json.dumps(content(format=99)),
        json.dumps(content(cells=5)),
        json.dumps(content(cells=[{"backend": "gloo"}])),
        json.dumps(content(cells=[["gloo", "cpu", "send", "ok"]])),
        json.dumps(content(cells=[dataclasses.asdict(Cell("gloo", "cpu", "send", "ok")) | {"status": "perhaps"}])),
        json.dumps(content(more=1)),
        b"\xff\xfe\x00",
    ],
)
def test_a_file_that_is_no_probe_is_refused(tmp_path, nonsense):
    path = tmp_path / "probe.json"
    path.write_bytes(nonsense if isinstance(nonsense, bytes) else nonsense.encode())
    with pytest.raises(InvalidInput, match="probe.json is not a saved probe of effnn.comm.probing.matrix"):
        matrix.load(path)
    with pytest.raises(InvalidInput, match="missing.json is not a saved probe"):
        matrix.load(tmp_path / "missing.json")


def test_merge_fills_what_this_machine_cannot_answer():
    here = made("laptop", send="no device", recv="not built", reduce="ok", gather="error", scatter="no device")
    idle = made("idle", send="no device", recv="not built", reduce="ok", gather="ok", scatter="no device")
    other = made("cluster", send="ok", recv="wrong result", reduce="hang", gather="ok")
    third = made("third", send="hang", recv="ok")
    merged = matrix.merge(here, idle, other, third)
    assert {cell.operation: (cell.status, cell.machine) for cell in merged.cells} == {
        "send": ("ok", "cluster"),
        "recv": ("wrong result", "cluster"),
        "reduce": ("ok", ""),
        "gather": ("error", ""),
        "scatter": ("no device", ""),
    }
    assert merged.cell("gloo", "cuda", "send").how == "native"
    assert merged.machine == "laptop" and matrix.merge(here) == here
    said = dataclasses.replace(other, cells=(Cell("gloo", "cuda", "send", "error", message="no route"),))
    cell = matrix.merge(here, said).cell("gloo", "cuda", "send")
    assert (cell.message, cell.machine, cell.note) == ("no route", "cluster", "no route; probed on cluster")
