"""How oneCCL waits: the choice by ranks and cores, what the library then does, and that no result depends on it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.backends import need
from workers import waiting as workers

from effnn.comm import launch
from effnn.comm.groups.oneccl import waiting
from effnn.experiments.backends import bench as bench_comm

ASLEEP = {"CCL_WORKER_OFFLOAD": "1", "CCL_WORKER_WAIT": "1", "CCL_YIELD": "sleep"}
ACTIVE = {"CCL_WORKER_OFFLOAD": "0"}

LINUX = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="affinity is Linux's")


def tied(core):
    return ASLEEP | {"CCL_LOCAL_RANK": "0", "CCL_LOCAL_SIZE": "1", "CCL_WORKER_AFFINITY": str(core)}


def choice(rank=0, size=2, allowed=(0, 1), cores=2, hosts=None, world=None, **user):
    """hosts: of the ranks of the group; one by default. world: rank and size in the whole job; the group's by default.

    Launchers count the ranks that the world has, unless `user` says otherwise.
    """
    number, count = world or (rank, size)
    told = {}
    for names in waiting.LAUNCHERS:
        told |= dict(zip(names[:2], (str(count), str(number)), strict=True))
    here = waiting.place(rank, hosts or ["one"] * size, number, count, told | user)
    return waiting.variables(here, set(allowed), cores, user)


# The choice


@pytest.mark.parametrize(
    ("size", "cores", "here", "crowded"),
    [
        (1, 1, {}, False),
        (2, 2, {}, False),
        (3, 2, {}, True),
        (4, 2, {}, True),
        (2, 1, {}, True),
        (64, 64, {}, False),
        (65, 64, {}, True),
        (2, 2, {"EFFNN_LOCAL_RANKS": "4"}, True),  # emulated nodes on one machine
        (2, 2, {"LOCAL_WORLD_SIZE": "2", "EFFNN_LOCAL_RANKS": "4"}, True),
        (4, 2, {"EFFNN_LOCAL_RANKS": "2", "LOCAL_WORLD_SIZE": "4"}, False),
        (4, 2, {"EFFNN_LOCAL_RANKS": "", "LOCAL_WORLD_SIZE": "many"}, True),  # no numbers: the hosts count
        # Variables of a launcher that has started one task, in which four ranks were started by other means.
        (4, 2, {"SLURM_NTASKS_PER_NODE": "1", "SLURM_NTASKS": "1"}, True),
        (4, 2, {"LOCAL_WORLD_SIZE": "1", "WORLD_SIZE": "1"}, True),
        (4, 2, {"SLURM_NTASKS_PER_NODE": "2"}, True),  # four tasks on two machines, and all ranks on the first
    ],
)
def test_ranks_that_share_cores_sleep_and_others_wait_actively(size, cores, here, crowded):
    found = choice(0, size, range(cores), cores, **here)
    assert found == (tied(0) if crowded else ACTIVE)


@pytest.mark.parametrize("name", [names[2] for names in waiting.LAUNCHERS])
def test_on_several_machines_the_ranks_of_this_one_count_with_and_without_a_launcher(name):
    for here, crowded in ((8, False), (9, True)):
        hosts = ["one", "another"] * here
        for user in ({name: str(here)}, {}):
            assert choice(2, 2 * here, range(8), 8, hosts, **user) == (tied(1) if crowded else ACTIVE)


def test_the_whole_job_counts_where_the_first_group_is_a_part_of_it():
    assert choice(world=(0, 4)) == choice(world=(0, 4), LOCAL_WORLD_SIZE="4") == tied(0)
    assert choice(world=(0, 4), LOCAL_WORLD_SIZE="2") == ACTIVE  # the others are elsewhere
    assert choice(hosts=["one", "two"], world=(0, 2)) == choice(hosts=["one", "two"], world=(0, 3)) == ACTIVE
    assert choice(rank=1, world=(3, 4)) == tied(1)  # ranks of two groups do not all meet on the first core


@pytest.mark.parametrize(("rank", "core"), [(0, 4), (1, 6), (2, 9), (3, 4), (7, 6)])
def test_each_ranks_worker_is_tied_to_a_core_that_the_rank_may_use(rank, core):
    assert choice(rank, 8, {9, 4, 6}, 3) == tied(core)
    for _, _, ranks, index in waiting.LAUNCHERS:
        assert choice(5, 8, {9, 4, 6}, 3, **{ranks: "8", index: str(rank)}) == tied(core)
    batch = {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_NTASKS_PER_NODE": "8", "SLURM_LOCALID": "0"}
    assert choice(rank, 8, {9, 4, 6}, 3, **batch) == tied(core)  # eight ranks that Slurm has not started


def test_what_the_user_has_set_stays():
    assert choice(size=4, CCL_WORKER_OFFLOAD="0") == choice(size=4, CCL_WORKER_OFFLOAD="1") == {}
    assert choice(size=2, CCL_WORKER_OFFLOAD="1") == {}
    found = choice(size=4, CCL_YIELD="sched_yield", CCL_ALLREDUCE="ring")
    assert found == {name: value for name, value in tied(0).items() if name != "CCL_YIELD"}
    for name in ("CCL_WORKER_AFFINITY", "CCL_WORKER_COUNT", "CCL_LOCAL_RANK", "CCL_LOCAL_SIZE"):
        assert choice(size=4, **{name: "1"}) == ASLEEP  # the three belong together


@LINUX
def test_the_variables_are_there_during_the_call_alone(monkeypatch):
    for name in tied(0):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(waiting, "available_cores", lambda: 2)
    monkeypatch.setenv("CCL_YIELD", "pause")
    before = dict(os.environ)
    with pytest.raises(ZeroDivisionError), waiting.told(waiting.Place(1, 3)):
        assert os.environ["CCL_WORKER_OFFLOAD"] == "1" and os.environ["CCL_YIELD"] == "pause"
        raise ZeroDivisionError
    assert dict(os.environ) == before


# Cores


@LINUX
def test_cores_are_those_of_the_ranks_together(monkeypatch):
    masks = {0: {3}, os.getppid(): {2, 3, 5}}
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(masks[pid]))
    for quota, cores in ((None, 3), (8.0, 3), (1.5, 2), (0.2, 1)):
        monkeypatch.setattr(waiting, "_quota", lambda quota=quota: quota)
        assert waiting.available_cores() == cores

    def refuse(pid):
        if pid:
            raise ProcessLookupError
        return {3}

    monkeypatch.setattr(waiting, "_quota", lambda: None)
    monkeypatch.setattr(os, "sched_getaffinity", refuse)
    assert waiting.available_cores() == 1


def control_groups(folder, own, files):
    for name, text in files.items():
        path = folder / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "cgroup").write_text(own)
    return waiting._quota(folder / "root", folder / "cgroup")


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2.0),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/a/b\n", {"a/cpu.max": "150000 100000\n", "a/b/cpu.max": "max 100000\n"}, 1.5),
        ("0::/a/b\n", {"a/cpu.max": "400000 100000\n", "a/b/cpu.max": "50000 100000\n"}, 0.5),
        ("0::/a/b\n", {}, None),  # a container sees its own tree under a path of the host's
        ("4:cpu,cpuacct:/x\n", {"cpu/x/cpu.cfs_quota_us": "300000\n", "cpu/x/cpu.cfs_period_us": "100000\n"}, 3.0),
        ("4:cpu:/\n0::/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ("4:memory:/x\n", {"cpu/x/cpu.cfs_quota_us": "300000\n", "cpu/x/cpu.cfs_period_us": "100000\n"}, None),
        ("", {}, None),
    ],
)
def test_a_containers_quota_of_cpu_time(tmp_path, own, files, cores):
    assert control_groups(tmp_path, own, files) == cores
    assert waiting._quota(tmp_path / "root", Path(tmp_path, "no such file")) is None


# What the library does


@pytest.fixture
def two_cores():
    """Ranks that are started meanwhile share two cores, whatever the machine has."""
    need("ccl")
    with bench_comm._confined(2):
        if len(os.sched_getaffinity(0)) < 2:
            pytest.skip("this process may use one core only")
        yield


@pytest.mark.parametrize(("size", "user", "workers_of_library"), [(2, {}, 0), (3, {}, 1), (4, {}, 1)])
def test_the_library_has_a_worker_where_ranks_share_cores(two_cores, forked, size, user, workers_of_library):
    found = launch.run(workers.threads_of_the_library, size, "gloo", env=user, timeout=300)
    cores = os.sched_getaffinity(0)
    for tied_to, environment in found:
        assert len(tied_to) == workers_of_library and set(tied_to) <= cores, found
        assert not [name for name in environment if name.startswith(("CCL_WORKER", "CCL_LOCAL", "CCL_YIELD"))]
    assert len({core for tied_to, _ in found for core in tied_to}) == (2 if workers_of_library else 0)


def test_a_pair_of_four_ranks_counts_all_four_where_no_launcher_tells(two_cores, forked):
    nobody_tells = {"EFFNN_LOCAL_RANKS": "", "LOCAL_WORLD_SIZE": ""}
    found = launch.run(workers.threads_of_the_library, 4, "gloo", args=(2,), env=nobody_tells, **launch.PATIENT)
    assert [len(tied_to) for tied_to, _ in found] == [1, 1, 0, 0]


def test_a_user_who_wants_active_waiting_in_a_crowd_gets_it(two_cores, forked):
    found = launch.run(workers.threads_of_the_library, 3, "gloo", env={"CCL_WORKER_OFFLOAD": "0"}, timeout=300)
    assert [tied_to for tied_to, _ in found] == [[]] * 3


def test_a_users_choice_of_algorithms_by_size_reaches_the_library(two_cores, forked):
    """Which one was taken shows in the order of the additions."""
    found = {}
    for choice in ("recursive_doubling", "ring", "recursive_doubling:0-65536;ring:65537-max"):
        environment, arguments = {"CCL_ALLREDUCE": choice}, ([4096, 65536, 65540, 1 << 20],)
        found[choice] = launch.run(workers.checksums, 4, "ccl", args=arguments, env=environment, **launch.PATIENT)
        assert all(rank == found[choice][0] for rank in found[choice])
    doubling, ring, by_size = (ranks[0] for ranks in found.values())
    assert not set(doubling) & set(ring) and by_size == doubling[:2] + ring[2:]


def test_ranks_of_different_minds_work_together_and_no_bit_depends_on_it(two_cores, forked):
    """Each rank waits in its own way; the answers are those of ranks that all wait actively."""
    active = launch.run(workers.answers, 3, "gloo", args=((),), timeout=300)
    for sleepers in ((0,), (1, 2), (0, 1, 2)):
        assert launch.run(workers.answers, 3, "gloo", args=(sleepers,), timeout=300) == active
    assert all(answer == active[0] for answer in active)


def test_a_process_asleep_costs_little(two_cores, forked):
    """A worker without calls waits for the next one: it neither spins nor wakes up, and no other thread spins."""
    looks = 20
    for threads in launch.run(workers.threads_while_idle, 3, "ccl", args=(looks,), **launch.PATIENT):
        assert [(running, woken) for worker, running, woken in threads if worker] == [(0, 0)], threads
        assert not [thread for thread in threads if thread[1:] == (looks, 0)], threads


@pytest.mark.parametrize("numel", [100, pytest.param(1 << 20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("user", [{}, pytest.param({"CCL_WORKER_OFFLOAD": "0"}, marks=pytest.mark.slow)])
def test_a_failure_in_the_library_is_an_error_and_not_the_end_of_the_process(two_cores, user, numel):
    """Ranks that bring different sizes: against the rules, and an error inside of the library."""
    results = launch.run_ranks(
        workers.unequal_sizes, 3, "ccl", args=(numel,), env=user, timeout=300, group_timeout=6, grace=30
    )
    assert [result.exit_code for result in results] == [0] * 3, [(o.error, o.stderr) for o in results]
    found = [result.result for result in results]
    assert [kind for kind, _ in found].count("LibraryError") >= 1, found
    assert {kind for kind, _ in found} <= {"LibraryError", "CollectiveTimeout", "CollectiveFailed", "none"}


TERMINATE = """
import ctypes, os, sys, threading, time
from effnn.comm.groups.oneccl import thread_guard

called = threading.Event()
terminate = ctypes.CDLL("libstdc++.so.6")._ZSt9terminatev

def run():
    if sys.argv[1] == "guarded":
        thread_guard.guard(threading.get_native_id(), called.set)
    else:
        thread_guard.guard(1, called.set)
    terminate()

threading.Thread(target=run, daemon=True).start()
print(called.wait(10), flush=True)
os._exit(0)
"""


@LINUX
@pytest.mark.parametrize(("thread", "code", "out"), [("guarded", 0, "True"), ("other", -signal.SIGABRT, "")])
def test_a_guarded_thread_alone_survives_terminate(thread, code, out):
    ran = subprocess.run([sys.executable, "-c", TERMINATE, thread], capture_output=True, text=True, timeout=300)
    assert (ran.returncode, ran.stdout.strip()) == (code, out), ran.stderr


# The benchmark


def test_the_crowded_key_is_measured_on_its_cores(two_cores, monkeypatch):
    seen = []

    for name in [name for name in os.environ if name.startswith("CCL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("CCL_ALLREDUCE", "ring:0-max")

    def run(fn, ranks, backend, args, **limits):
        assert limits == launch.PATIENT
        seen.append((ranks, len(os.sched_getaffinity(0)), args[1]))
        times = {"gloo": (2.0, 2.0, 5.0), "ccl": (2.0, 9.0, 4.0)}
        return [[{"backend": b, "bytes": 1 << 20, "load": 1.0, "ms": ms} for b in args[0] for ms in times[b]]]

    monkeypatch.setattr(launch, "run", run)
    bench_comm._runs.cache_clear()
    try:
        measured = bench_comm.BENCHMARKS["comm.ccl_over_gloo_crowded_1mb"]()
    finally:
        bench_comm._runs.cache_clear()
    assert seen == [(4, 2, [1 << 20])] * bench_comm.RUNS
    assert measured.runs == (2.0,) * bench_comm.RUNS and measured.seconds["ccl"][0] == 0.004
    assert measured.note.endswith("1048576 bytes per rank; CCL_ALLREDUCE=ring:0-max")
