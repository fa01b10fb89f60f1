"""The first diagnosis on a machine, `python -m effnn.comm.check`, in every way of starting it."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import backends as comm_backends

from effnn import paths
from effnn.base import NotAvailable
from effnn.comm import backends, check, launch
from effnn.comm.groups import interfaces, mpi
from effnn.comm.probing import answers, operations
from effnn.comm.probing.answers import Answer, Status

BIN = Path(sys.executable).parent
TORCHRUN = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2"]
CHECK = ["-m", "effnn.comm.check"]
BROKEN = [str(paths.TESTS / "workers" / "broken_check.py")]
FINE = {name: "ok" for name in operations.OPERATIONS}
STARTED_BY_OTHERS = ("RANK", "WORLD_SIZE", "PMI_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_RANK", "MASTER_ADDR")

needs_torchrun = pytest.mark.skipif(not (BIN / "torchrun").exists(), reason="no torchrun beside this Python")
needs_mpi = pytest.mark.skipif(mpi.unavailable() is not None, reason=str(mpi.unavailable()))


def started(*command, **variables):
    environment = {name: value for name, value in os.environ.items() if name not in STARTED_BY_OTHERS}
    environment |= {"I_MPI_FABRICS": "shm", "I_MPI_PIN": "0", "OMP_NUM_THREADS": "1"} | variables
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    lines = [line for line in done.stdout.splitlines() if "CCL_WARN" not in line]
    return done, lines[0] if lines else "", dict(line.split(maxsplit=1) for line in lines[1:])


@pytest.mark.parametrize("backend", comm_backends.parameters(["ccl"]))
def test_plainly_for_one_backend(backend):
    done, heading, found = started(sys.executable, *CHECK, backend)
    assert (done.returncode, found, done.stderr) == (0, FINE, "")
    assert heading.startswith(f"{backend} through ") and "2 ranks on " in heading and "oneccl 2" in heading


@needs_torchrun
def test_as_ranks_of_torchrun():
    done, heading, found = started(*TORCHRUN, *CHECK)
    assert done.returncode == 0 and found == FINE and heading.startswith("gloo: 2 ranks on "), done.stderr


@needs_mpi
def test_as_ranks_of_mpiexec():
    done, heading, found = started(str(mpi.launcher()), "-n", "2", sys.executable, *CHECK)
    assert done.returncode == 0 and found == FINE and heading.startswith("mpi4py: 2 ranks on "), done.stderr


WRONG = FINE | dict.fromkeys(list(FINE)[list(FINE).index("gather") :], "not run")
WRONG |= {"gather": "rank 1: wrong result: element 0 is 1.0, expected 2.0"}


@needs_torchrun
def test_a_wrong_result_below_torchrun_is_told_and_is_exit_code_1():
    done, _, found = started(*TORCHRUN, *BROKEN, "gloo")
    assert done.returncode == 1 and found == WRONG


@needs_mpi
def test_a_wrong_result_below_mpiexec_is_told_and_is_exit_code_1():
    done, _, found = started(str(mpi.launcher()), "-n", "2", sys.executable, *BROKEN)
    assert done.returncode == 1 and found == WRONG


@needs_mpi
def test_gloo_below_mpiexec_needs_the_address_of_rank_0():
    done, _, _ = started(str(mpi.launcher()), "-n", "2", sys.executable, *CHECK, "gloo")
    assert done.returncode == 1 and "mpiexec does not say where rank 0 is: add -genv MASTER_ADDR" in done.stderr


def test_a_rank_that_finds_no_other_says_where_to_look():
    alone = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    done, _, _ = started(sys.executable, *CHECK, "gloo", "--seconds", "1", **alone)
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines() if line.startswith("rank 1: gloo: ")]
    assert len(said) == 1 and "is MASTER_ADDR, 127.0.0.1, an address of rank 0 that all machines reach" in said[0]


# In this process: what main says and returns


@pytest.fixture(autouse=True)
def not_a_rank(monkeypatch):
    for name in STARTED_BY_OTHERS:
        monkeypatch.delenv(name, raising=False)


def test_an_unknown_backend_is_exit_code_2(capsys):
    with pytest.raises(SystemExit) as caught:
        check.main(["tcp"])
    said = capsys.readouterr().err
    assert caught.value.code == 2 and all(f"'{name}'" in said for name in ("tcp", *backends.BACKENDS))


ALL_WELL = {name: Answer(Status.OK) for name in operations.OPERATIONS}


def lines_of(*answers):
    """What is said of the first operations, and of those after them."""
    names = list(operations.OPERATIONS)
    return [f"  {name:16}{words}" for name, words in zip(names, [*answers, *["not run"] * len(names)], strict=False)]


def test_backends_that_are_not_available_fail_only_where_they_were_asked_for(capsys, monkeypatch):
    def refusal(name, *_, **__):
        return None if name == "gloo" else backends.Refusal(f"no {name} today")

    monkeypatch.setattr(backends, "refusal", refusal)
    monkeypatch.setattr(answers, "in_new_processes", lambda *_, **__: ALL_WELL)
    assert check.main(["nccl"]) == 1 and check.main([]) == 0
    refused, heading, *said = capsys.readouterr().out.splitlines()
    assert refused == "nccl: no nccl today" and heading.startswith("gloo: 2 ranks on ")
    assert said == [*lines_of(*["ok"] * 11), *(f"{name}: no {name} today" for name in backends.BACKENDS[1:])]


def test_a_rank_that_dies_is_told(capsys, monkeypatch):
    died = {"send": Answer(Status.OK), "recv": Answer(Status.ERROR, "killed by SIGSEGV", 1)}
    monkeypatch.setattr(answers, "in_new_processes", lambda *_, **__: died)
    assert check.main(["gloo"]) == 1
    assert capsys.readouterr().out.splitlines()[1:] == lines_of("ok", "rank 1: killed by SIGSEGV")


def test_when_no_rank_begins_the_first_error_is_told(capsys, monkeypatch):
    failed = [launch.RankResult(rank, error=f"RuntimeError: {rank}", finished=2.0 - rank) for rank in range(2)]
    monkeypatch.setattr(launch, "run_ranks", lambda *_, **__: failed)
    assert check.main(["gloo"]) == 1
    assert capsys.readouterr().out.splitlines()[1:] == lines_of("rank 1: RuntimeError: 1")


def test_what_ranks_say_becomes_one_sentence():
    well, broken = Answer(Status.OK, rank=0, time=1.0), Answer(Status.ERROR, "broken", 1, 2.0)
    late, silent = Answer(Status.ERROR, "late", 0, 1.0), answers._answer(None, 2)
    assert answers.together([well, well]).sentence == "ok"
    assert answers.together([well, broken]).sentence == "rank 1: broken"
    assert answers.together([broken, late]).sentence == "rank 0: late (1 more of the ranks failed)"
    no_answer = "rank 2: no answer: the process has ended or is stuck (1 more of the ranks failed)"
    assert answers.together([late, well, silent]).sentence == no_answer
    assert Answer(Status.WRONG, "1.0", 3).sentence == "rank 3: wrong result: 1.0"
    error = RuntimeError("[/a/b/pair.cc:15] timed out connecting\nand more")
    assert answers.sentence(error) == "RuntimeError: timed out connecting"
    assert answers.sentence(NotAvailable("no such thing")) == "no such thing"


def test_of_a_time_out_and_the_connections_that_it_costs_the_time_out_is_the_cause():
    hang, error = Answer(Status.HANG, "timed out", 0, 30.0), Answer(Status.ERROR, "no such thing", 1, 10.0)
    lost = dataclasses.replace(error, message="connection lost", of_communication=True)
    assert answers.together([hang, lost]).status is Status.HANG  # however late it was told
    assert answers.together([hang, error]) == dataclasses.replace(error, others=1)


def test_an_interface_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth99")
    with pytest.raises(Exception, match="GLOO_SOCKET_IFNAME names eth99; the network interfaces of this host: .*lo"):
        interfaces.expect_interfaces()
