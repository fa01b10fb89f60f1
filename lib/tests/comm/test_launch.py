"""Launching ranks: results, failures, time limits, and that no process is ever left behind."""

import logging
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from workers import launched

from effnn import paths
from effnn.base import InvalidInput, NotAvailable
from effnn.comm import launch
from effnn.comm.groups import mpi
from effnn.comm.groups.interfaces import loopback
from effnn.comm.launch import LaunchTimeout, WorkerFailed, run, run_ranks
from effnn.comm.launching.worker import Report, start_time

WITH_MPI = pytest.param(
    "mpi4py", marks=pytest.mark.skipif(mpi.unavailable() is not None, reason=str(mpi.unavailable()))
)
BOTH = pytest.mark.parametrize("backend", ["gloo", WITH_MPI])


@dataclass(frozen=True)
class FakeNode:
    prefix: tuple[str, ...]
    interface: str
    address: str


def pids(folder, names, within=120.0):
    """Process ids that the ranks have written, waiting for them."""
    limit = time.monotonic() + within
    while time.monotonic() < limit:
        if written(folder, names):
            return [int(Path(folder, name).read_text()) for name in names]
        time.sleep(0.02)
    raise AssertionError(f"no {names} within {within} s")


def written(folder, names):
    return all(path.exists() and path.read_text() for path in (Path(folder, name) for name in names))


@pytest.fixture
def stopped_clock(monkeypatch, tmp_path):
    """A function: the clock of the time limit stands still until the ranks have written those files, then jumps."""

    def stop(names, seconds):
        begin = time.monotonic()

        def monotonic():
            assert time.monotonic() - begin < 300, f"no {names}"
            return seconds if written(tmp_path, names) else 0.0

        monkeypatch.setattr(launch, "time", types.SimpleNamespace(monotonic=monotonic, sleep=time.sleep))

    return stop


def all_gone(processes, within=60.0):
    limit = time.monotonic() + within
    while time.monotonic() < limit:
        if all(start_time(pid) is None for pid in processes):
            return True
        time.sleep(0.02)
    return False


# What comes back


@BOTH
def test_all_reduce_gives_the_sum_on_every_rank(backend):
    assert [value.item() for value in run(launched.all_reduced, 3, backend)] == [6, 6, 6]


def test_results_come_in_rank_order_and_text_names_a_function():
    assert run("workers.launched:rank_and", 2, None, args=("a",), kwargs={"suffix": "b"}) == [(0, "ab"), (1, "ab")]


def test_a_rank_result_says_when_and_how_its_rank_ended_and_the_folder_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    begin = time.monotonic()
    (result,) = run_ranks(launched.settings, 1, None)
    folder, path, leads_its_group = result.result
    assert result.ok and result.exit_code == 0 and 0 < result.finished <= time.monotonic() - begin
    assert folder == os.getcwd() and path == sys.path and leads_its_group
    assert list(tmp_path.iterdir()) == []


def test_what_ranks_print_is_logged_line_by_line(caplog):
    with caplog.at_level(logging.INFO, logger="effnn.comm.launch"):
        run(launched.prints, 2, None)
    assert sorted(record.getMessage() for record in caplog.records) == [
        "rank 0: first of 0",
        "rank 0: no newline at the end",
        "rank 1: first of 1",
        "rank 1: no newline at the end",
    ]


def test_two_launches_at_once_do_not_clash():
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda size: run(launched.all_reduced, size), (2, 1)))
    assert [[value.item() for value in one] for one in both] == [[3, 3], [1]]


# The environment of the ranks


def test_environment_of_a_rank_and_what_it_does_not_inherit(monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "1234")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "outer")
    monkeypatch.setenv("RANK", "7")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    names = (
        "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK MASTER_ADDR MASTER_PORT TORCHELASTIC_RUN_ID"
    ).split()
    names += ["GLOO_SOCKET_IFNAME", "EFFNN_INTERFACE", "OMP_WAIT_POLICY", "MINE"]
    second = run(launched.environment, 2, None, args=names, threads=2, env={"MINE": "x", "LOCAL_WORLD_SIZE": "9"})[1]
    assert list(second.values()) == [
        *["1", "1", "2", "9", "0", "127.0.0.1", None, None, loopback(), loopback(), "PASSIVE", "x", 2]
    ]


def test_ranks_are_spread_over_nodes_in_blocks_and_started_through_their_prefix():
    nodes = [FakeNode(("env", f"HERE={i}"), f"veth{i}", f"10.0.0.{i + 1}") for i in range(2)]
    names = "HERE GROUP_RANK LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR GLOO_SOCKET_IFNAME EFFNN_INTERFACE".split()
    ranks = run(launched.environment, 4, None, args=names, nodes=nodes)
    assert [tuple(rank[name] for name in names) for rank in ranks] == [
        ("0", "0", "0", "2", "10.0.0.1", "veth0", "veth0"),
        ("0", "0", "1", "2", "10.0.0.1", "veth0", "veth0"),
        ("1", "1", "0", "2", "10.0.0.1", "veth1", "veth1"),
        ("1", "1", "1", "2", "10.0.0.1", "veth1", "veth1"),
    ]


@pytest.mark.skipif(mpi.unavailable() is not None, reason=str(mpi.unavailable()))
def test_ranks_below_mpiexec_have_the_same_variables():
    names = "RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR".split()
    ranks = run(launched.environment, 2, "mpi4py", args=names)
    assert [[rank[name] for name in names] for rank in ranks] == [[str(i), str(i), "2", "127.0.0.1"] for i in (0, 1)]


# A rank that fails


def test_the_first_failing_ranks_traceback_is_forwarded_and_the_others_are_ended():
    with pytest.raises(WorkerFailed) as caught:
        run(launched.raises_on, 2, None, args=(1, 3600.0))
    assert caught.value.rank == 1
    message = str(caught.value)
    assert "rank 1 of 2 failed" in message and "rank 0: ended by the launcher after rank 1 failed" in message
    assert 'raise ValueError(f"boom on {rank}' in message and "and a second line" in message
    ended, failed = caught.value.results
    assert failed.error == "ValueError: boom on 1" and failed.exit_code == 1 and ended.exit_code == -signal.SIGTERM


def test_within_the_grace_others_may_still_return():
    kept, failed = run_ranks(launched.raises_on, 2, None, args=(1, 1.0), grace=120)
    assert kept.ok and kept.exit_code == 0 and not failed.ok and kept.finished > failed.finished


@BOTH
def test_after_a_rank_was_killed_the_others_raise_by_the_groups_time_out(backend):
    one, two, dead = run_ranks(
        launched.one_dies_in_all_reduce, 3, backend, args=(launched.killed,), group_timeout=3, grace=120
    )
    assert WorkerFailed([one, two, dead]).rank == 2  # the cause is told from what followed from it
    assert dead.error == "killed by SIGKILL" and dead.exit_code == -signal.SIGKILL
    for survivor in (one, two):
        assert "all_reduce" in survivor.traceback and dead.finished < survivor.finished


class Seen:
    """In place of ranks and output: reports at the first look, and the exit of a rank at a later one."""

    def __init__(self, reports, dying, looks):
        self.size, self._reports, self._dying, self._looks = 3, reports, dying, looks

    def report(self, rank):
        return self._reports.get(rank)

    def exit_code(self, rank):
        if rank == self._dying:
            self._looks -= 1
        return -signal.SIGKILL if rank == self._dying and self._looks < 0 else None

    def running(self):
        return []

    def pass_on(self):
        pass


@pytest.mark.parametrize("grace", [0.0, 60.0])
def test_a_rank_that_died_comes_before_those_that_lost_it_though_its_end_is_seen_later(grace):
    lost = Report(time.monotonic(), error="connection closed", of_communication=True)
    seen = Seen({0: lost, 1: lost}, dying=2, looks=8)
    reports = launch._wait(seen, seen, lost.time - 1, 60.0, grace)
    assert reports[2].error == "killed by SIGKILL" and reports[2].time < lost.time == reports[0].time


def test_a_rank_that_failed_by_itself_comes_before_one_that_died_later():
    raised = Report(time.monotonic(), error="ValueError: boom")
    lost = Report(time.monotonic() + 1e-3, error="connection closed", of_communication=True)
    seen = Seen({0: lost, 1: raised}, dying=2, looks=3)
    reports = launch._wait(seen, seen, raised.time - 1, 60.0, 60.0)
    assert raised.time < reports[2].time < lost.time


def test_errors_of_communication_are_known_also_below_others():
    found = run(launched.errors_of_communication, 2, "gloo", group_timeout=2)
    assert found == [{"ValueError": False, "a time-out of gloo": True, "raised from it": True}] * 2


@pytest.mark.parametrize(
    ("function", "args", "error", "code"),
    [
        ("exits_with", (3,), "exit code 3 without a result", 3),
        ("exits_at_once", (0,), "exit code 0 without a result", 0),
        ("segmentation_fault", (), "killed by SIGSEGV", -signal.SIGSEGV),
        ("no_such_function", (), "AttributeError: module 'workers.launched' has no attribute 'no_such_function'", 1),
    ],
)
def test_ways_to_end_without_a_result(function, args, error, code):
    (result,) = run_ranks(f"workers.launched:{function}", 1, None, args=args)
    assert (result.error, result.exit_code) == (error, code)
    assert function != "exits_with" or result.stderr == "last words\n"


def test_a_result_that_cannot_be_pickled_is_that_ranks_error():
    with pytest.raises(WorkerFailed, match="the result, a function, cannot be pickled, so it cannot be returned"):
        run(launched.returns_something_that_cannot_be_pickled, 1, None)


def test_when_mpiexec_fails_its_words_are_in_the_error(tmp_path, monkeypatch):
    broken = tmp_path / "mpiexec"
    broken.write_text("#!/bin/sh\necho no such fabric >&2\nexit 5\n")
    broken.chmod(0o755)
    monkeypatch.setattr(mpi, "launcher", lambda: broken)
    monkeypatch.setattr(mpi, "unavailable", lambda: None)
    with pytest.raises(WorkerFailed, match="exit code 5 without a result\nno such fabric"):
        run(launched.all_reduced, 2, "mpi4py")


# No process is left


@BOTH
def test_at_the_time_limit_all_are_ended_and_the_message_says_where_they_were(
    backend, tmp_path, stopped_clock, monkeypatch
):
    monkeypatch.setattr(launch, "TERMINATE", 60.0)  # a busy rank needs its time to say where it was
    stopped_clock(["rank-0", "rank-1", "child-0", "child-1"], 12.5)
    with pytest.raises(LaunchTimeout) as caught:
        run(launched.leaves_a_pid_and_sleeps, 2, backend, args=(str(tmp_path), True), timeout=12.0)
    assert "rank 0, 1 of 2 still running after 12.5 s" in str(caught.value)
    assert "launched.py" in str(caught.value) and "in leaves_a_pid_and_sleeps" in str(caught.value)
    assert all(result.error == launch.STILL_RUNNING for result in caught.value.results)
    assert all_gone(pids(tmp_path, ["rank-0", "rank-1", "child-0", "child-1"]))


def test_a_rank_that_ignores_sigterm_is_killed(tmp_path, monkeypatch, stopped_clock):
    monkeypatch.setattr(launch, "TERMINATE", 0.5)
    stopped_clock(["rank-0"], 3.0)
    (result,) = run_ranks(launched.ignores_sigterm_and_sleeps, 1, None, args=(str(tmp_path),), timeout=3)
    assert result.error == launch.STILL_RUNNING and result.exit_code == -signal.SIGKILL
    assert all_gone(pids(tmp_path, ["rank-0"]))


def test_a_result_counts_though_its_rank_does_not_end_and_children_left_behind_are_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "LINGER", 0.5)
    (result,) = run_ranks(launched.leaves_a_child_and_a_thread, 1, None, args=(str(tmp_path),))
    assert result.ok and result.result == "done" and result.exit_code == -signal.SIGTERM
    assert all_gone(pids(tmp_path, ["child-0"]))


@BOTH
@pytest.mark.parametrize(
    ("how", "function"),
    [(signal.SIGKILL, "leaves_a_pid_and_sleeps"), (signal.SIGTERM, "holds_the_global_lock")],
)
def test_workers_end_with_the_launcher_and_the_next_start_removes_its_folder(
    backend, how, function, tmp_path, monkeypatch
):
    call = f"run('workers.launched:{function}', 2, {backend!r}, args=({str(tmp_path)!r},))"
    script = f"import sys; sys.path.append({str(paths.TESTS)!r})\nfrom effnn.comm.launch import run\n{call}"
    launcher = subprocess.Popen([sys.executable, "-c", script], env=os.environ | {"TMPDIR": str(tmp_path)})
    try:
        ranks = pids(tmp_path, ["rank-0", "rank-1"])
        started = {child.pid for child in psutil.Process(launcher.pid).children(recursive=True)}  # mpiexec's as well
        assert set(ranks) <= started
    finally:
        launcher.send_signal(how)
        launcher.wait()
    assert all_gone(started)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    launch._private_folder().cleanup()
    assert not list(tmp_path.glob("effnn-launch-*"))


def test_only_folders_of_launchers_that_are_gone_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with launch._private_folder() as running:
        *_, place, pid, started, _ = Path(running).name.split("-")
        gone = [f"effnn-launch-{place}-{pid}-1-ab", f"effnn-launch-{place}-{2**22 + 1}-{started}-cd"]
        kept = [Path(running).name, f"effnn-launch-00000000-{pid}-1-ab", f"effnn-launch-{place}-notes", "effnn-launch"]
        for name in [*gone, *kept[1:]]:
            (tmp_path / name / "stdout-0").mkdir(parents=True)
        launch._private_folder().cleanup()
        assert {path.name for path in tmp_path.iterdir()} == set(kept)


def test_ctrl_c_ends_the_workers_before_it_goes_on(tmp_path):
    def interrupt():
        pids(tmp_path, ["rank-0", "rank-1"])
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run(launched.leaves_a_pid_and_sleeps, 2, None, args=(str(tmp_path),))
    thread.join()
    assert all_gone(pids(tmp_path, ["rank-0", "rank-1"]), within=0.1)


# Arguments that do not fit, and functions of a script


def at_home(value):
    return value


@pytest.mark.parametrize("function", [lambda: 1, threading.Lock().acquire, "workers.launched.prints", ":f"])
def test_what_cannot_be_called_elsewhere_is_refused(function):
    with pytest.raises(InvalidInput, match="top-level function|package.module:function"):
        run(function, 2, None)


def test_arguments_that_cannot_be_sent_are_refused():
    with pytest.raises(InvalidInput, match="picklable"):
        run(at_home, 1, None, args=(lambda: 1,))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"world_size": 0}, "must be positive"),
        ({"timeout": 0}, "must be positive"),
        ({"threads": 0}, "must be positive"),
        ({"nodes": []}, "do not spread evenly over 0 nodes"),
        ({"nodes": [FakeNode((), "lo", "127.0.0.1")] * 3}, "2 ranks do not spread evenly over 3 nodes"),
        ({"nodes": [FakeNode((), "lo", "127.0.0.1")], "backend": "mpi4py"}, "not supported with mpi4py"),
    ],
)
def test_wrong_arguments_are_refused(wrong, message):
    with pytest.raises(InvalidInput, match=message):
        run(**{"fn": at_home, "world_size": 2, "backend": None} | wrong)


def test_without_mpiexec_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(mpi, "launcher", lambda: None)
    with pytest.raises(NotAvailable, match=r"effnn\[ccl\]"):
        run(at_home, 2, "mpi4py")


def script(folder, text, *command):
    path = folder / "talk_script.py"
    path.write_text(textwrap.dedent(text))
    environment = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.run(
        [sys.executable, *(command or (str(path),))], env=environment, capture_output=True, text=True, timeout=300
    )


GUARDED = """
    from dataclasses import dataclass
    from effnn.comm.launch import run

    @dataclass
    class Pair:
        one: int

    def double(pair):
        return Pair(2 * pair.one)

    if __name__ == "__main__":
        assert run(double, 1, None, args=(Pair(4),)) == [Pair(8)]
        print("fine")
"""


@pytest.mark.parametrize("command", [(), ("-m", "talk_script")])
def test_functions_and_classes_of_a_script_work(tmp_path, command):
    assert script(tmp_path, GUARDED, *command).stdout == "fine\n"


def test_a_script_without_a_guard_does_not_start_workers_without_end(tmp_path):
    text = "from effnn.comm.launch import run\ndef one():\n    return 1\nrun(one, 1, None)\n"
    done = script(tmp_path, text)
    assert done.returncode == 1 and "put the call under a main guard" in done.stderr


def test_a_function_of_a_notebook_is_refused(monkeypatch):
    notebook = types.ModuleType("__main__")
    exec("def cell(): pass", notebook.__dict__)
    monkeypatch.setitem(sys.modules, "__main__", notebook)
    with pytest.raises(InvalidInput, match="put it into a module"):
        run(notebook.cell, 1, None)
