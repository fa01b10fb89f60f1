"""Runs PyTorch's own distributed tests over a backend; see test_torch_suite.py.

The tests of `_DistTestBase` run one after another in the same two processes, each with a process group of its own, as
making processes anew costs more than most tests. A failure or a hang ends the processes; the tests that are left go on
in new ones, first the one that failed: only what fails in fresh processes counts as failed.

`python torch_suite.py BACKEND [TEST ...]` prints one line per test.
"""

import faulthandler
import importlib.util
import json
import os
import sys
import tempfile
import traceback
import types
import unittest
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

import effnn.comm  # noqa: F401 (registers the backends)
from effnn.comm import launch

RANKS = 2
TEST_SECONDS = 120.0  # of one test; the longest takes a few seconds on a quiet machine
FOR_BACKENDS_BY_NAME = (
    "test_accumulate_gradients_no_sync",
    "test_accumulate_gradients_no_sync_allreduce_hook",
    "test_accumulate_gradients_no_sync_allreduce_with_then_hook",
    "test_accumulate_gradients_no_sync_grad_is_view",
)
"""Their bodies have one branch for gloo and mpi, one for nccl, and none for another name: they run as gloo's."""

PASSED, SKIPPED, FAILED = "passed", "skipped", "failed"


@dataclass(frozen=True)
class Result:
    """What became of one test: the reason of a skip, the traceback of a failure."""

    state: str
    detail: str = ""


def run_suite(backend: str, names: Sequence[str] | None = None, seconds: float = TEST_SECONDS) -> dict[str, Result]:
    """Run torch's tests over a backend; returns the result of each, in order. names: some of them; default all.

    seconds: limit of one test; after it the test has failed and its processes are ended.
    """
    left = test_names() if names is None else list(names)
    results: dict[str, Result] = {}
    with tempfile.TemporaryDirectory(prefix="torch-suite-") as top:
        while left:
            found = _batch(backend, left, seconds, Path(tempfile.mkdtemp(dir=top)))
            done = [name for name in left if name in found]
            last = done[-1]
            if found[last].state == FAILED and len(done) > 1:
                done.pop()  # once more, in fresh processes
            results |= {name: found[name] for name in done}
            left = left[len(done) :]
    return results


def test_names() -> list[str]:
    """Names of all tests. Starts one process, as torch's module wants to know the backend when it is imported."""
    with tempfile.TemporaryDirectory() as folder:
        (names,) = launch.run(listed, 1, None, env=_variables("gloo", Path(folder)), timeout=120)
    return names


def listed() -> list[str]:
    """In a rank: the names."""
    _stand_in_for_expecttest()
    from torch.testing._internal.distributed.distributed_test import DistributedTest

    return unittest.TestLoader().getTestCaseNames(DistributedTest._DistTestBase)


def _variables(backend: str, folder: Path) -> dict[str, str]:
    meeting = (folder / "init_dir" / "shared_init_file").as_uri()
    return {"BACKEND": backend, "TEMP_DIR": str(folder), "INIT_METHOD": meeting, "TORCH_SHOW_CPP_STACKTRACES": "0"}


def _batch(backend: str, names: list[str], seconds: float, folder: Path) -> dict[str, Result]:
    """Run tests up to the first that fails; returns the results of at least one."""
    for name in ("barrier", "test_dir", "init_dir"):
        (folder / name).mkdir()
    results = launch.run_ranks(
        run_tests,
        RANKS,
        "mpi4py" if backend == "mpi4py" else None,  # MPI's ranks are started by mpiexec
        args=(backend, names, seconds, str(folder)),
        env=_variables(backend, folder),
        timeout=60 + seconds * len(names),
        grace=5,
    )
    logs = [_log(folder, rank) for rank in range(RANKS)]
    found: dict[str, Result] = {}
    for name in names:
        of_ranks = [log.get(name) for log in logs]
        if all(of_ranks) and len({one.state for one in of_ranks}) == 1 and of_ranks[0].state != FAILED:
            found[name] = of_ranks[0]
            continue
        failures = [f"rank {rank}: {one.detail}" for rank, one in enumerate(of_ranks) if one and one.state == FAILED]
        said = [f"rank {one.rank}: {one.error}\n{one.stderr}" for one in results if not one.ok]
        states = [one.state if one else "not ended" for one in of_ranks]
        found[name] = Result(FAILED, "\n".join(failures or said or [f"the ranks disagree: {', '.join(states)}"]))
        break
    return found


def _log(folder: Path, rank: int) -> dict[str, Result]:
    path = folder / f"results-{rank}"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {name: Result(state, detail) for name, state, detail in map(json.loads, lines)}


def run_tests(backend: str, names: list[str], seconds: float, folder: str) -> None:
    """In a rank: run tests and log each result, up to the first failure, which is raised."""
    if dist.is_initialized():  # by the launch; every test makes its own
        dist.destroy_process_group()
    case = _cases(backend)
    with open(Path(folder) / f"results-{os.environ['RANK']}", "w", encoding="utf-8") as log:
        for name in names:
            faulthandler.dump_traceback_later(seconds, exit=True)
            state, detail = _run(case, name, backend, Path(folder) / f"rendezvous-{name}")
            faulthandler.cancel_dump_traceback_later()
            print(json.dumps([name, state, detail]), file=log, flush=True)
            if state == FAILED:
                raise AssertionError(f"{name}: {detail}")


def _stand_in_for_expecttest() -> None:
    """torch's test classes derive from that package's; the distributed tests use nothing of it."""
    if importlib.util.find_spec("expecttest") is None:
        module = types.ModuleType("expecttest")
        module.TestCase = unittest.TestCase
        sys.modules["expecttest"] = module


def _cases(backend: str) -> type:
    _stand_in_for_expecttest()
    from torch.testing._internal.common_distributed import DistTestCases
    from torch.testing._internal.distributed.distributed_test import DistributedTest, TestDistBackend

    for feature in ("ddp", "subgroup"):  # what torch's tests ask of a backend by its name
        DistTestCases.backend_feature[feature].add(backend)
    return type("TorchSuite", (TestDistBackend, DistributedTest._DistTestBase), {})


def _run(case: type, name: str, backend: str, rendezvous: Path) -> tuple[str, str]:
    from torch.testing._internal import common_utils
    from torch.testing._internal.common_distributed import TEST_SKIPS
    from torch.testing._internal.distributed import distributed_test

    skips = {skip.exit_code: skip.message for skip in TEST_SKIPS.values()}
    test = case(name)
    test.rank, test.file_name = int(os.environ["RANK"]), str(rendezvous)
    environment = dict(os.environ)
    distributed_test.BACKEND = "gloo" if name in FOR_BACKENDS_BY_NAME else backend
    limit = distributed_test.CUSTOM_PG_TIMEOUT.get(name, distributed_test.default_pg_timeout)
    try:
        dist.init_process_group(
            backend,
            init_method=test.init_method,
            world_size=RANKS,
            rank=test.rank,
            timeout=timedelta(seconds=limit),
        )
        test._barrier()
        common_utils.set_rng_seed()
        getattr(test, name)()
        test._barrier()
        if dist.is_initialized():
            dist.destroy_process_group()
    except unittest.SkipTest as skip:
        dist.destroy_process_group()
        return SKIPPED, str(skip)
    except SystemExit as end:
        if end.code not in skips:
            return FAILED, f"exit code {end.code}"
        dist.destroy_process_group()
        return SKIPPED, skips[end.code]
    except Exception:
        return FAILED, traceback.format_exc()
    finally:
        os.environ.clear()
        os.environ.update(environment)
    return PASSED, ""


if __name__ == "__main__":
    chosen, *some = sys.argv[1:]
    for test, result in run_suite(chosen, some or None).items():
        print(f"{result.state:8}{test}  {result.detail.strip().splitlines()[-1] if result.detail else ''}")
