"""The folder of a run when the disk is full, and when two processes want it."""

import errno
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading

import pytest
from helpers.staged_runs import Interrupted, assert_same, interrupt_at, names
from workers import staged_train as worker

from effnn import paths
from effnn.base import CannotWrite, InvalidInput, folder_lock
from effnn.staged import Stage
from effnn.staged.training.checkpoints import checkpoint

HOW = worker.recipe(checkpoint_every=3)
STAGES = [Stage(5), Stage(3, width=2)]


@pytest.fixture(scope="module")
def whole():
    return worker.run(None, stages=STAGES, how=HOW)


def run(folder, **options):
    return worker.run(folder, stages=STAGES, how=HOW, **options)


LIMITED = """
import resource, sys
sys.path.insert(0, {tests!r})
from workers import staged_train as worker
from effnn.staged import Stage
from effnn.base import CannotWrite
for limit in {limits}:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        worker.run({folder!r} + str(limit), stages=[Stage(5), Stage(3, width=2)], how=worker.recipe(checkpoint_every=3))
    except CannotWrite as error:
        print(error)
"""


def test_a_full_disk_is_said_and_the_run_goes_on_once_there_is_space(tmp_path, whole):
    """A limit on the size of a file stands for the full disk: in the model's file and in the optimizer's."""
    run(tmp_path / "sizes")
    sizes = {
        name: [(tmp_path / "sizes" / step / name).stat().st_size for step in names(tmp_path / "sizes")]
        for name in ("model/model.safetensors", "optimizer.pt")
    }
    assert names(tmp_path / "sizes")[0] == "step-00000006-stage-01"
    grown, moments = sizes["model/model.safetensors"][0], sizes["optimizer.pt"][0]
    limits = [1000, grown // 3, grown - 100, moments - 100]
    code = LIMITED.format(tests=str(paths.TESTS), limits=limits, folder=str(tmp_path / "run"))
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    said = ended.stdout.splitlines()
    assert len(said) == 4, ended.stderr
    for limit, text in zip(limits, said, strict=True):
        folder = tmp_path / f"run{limit}"
        kept = names(folder)
        step, remains = 3, f"{folder} holds no checkpoint yet; free some space there, and the same call begins anew"
        if kept:
            remains = (
                f"the last checkpoint is {folder / kept[-1]}; free some space there, and the same call goes on from it"
            )
            step = 6
        assert text == f"the checkpoint of step {step} in {folder} could not be written (File too large): {remains}"
        # no half checkpoint, no leftovers, no lock
        assert kept in ([], ["step-00000003-stage-00", "step-00000005-stage-00"])
    assert names(tmp_path / f"run{limits[0]}") == [] and names(tmp_path / f"run{limits[3]}") != []
    for limit in (limits[0], limits[3]):
        assert_same(run(tmp_path / f"run{limit}"), whole)


def writers(monkeypatch, broken: str) -> None:
    """One of the writes of a checkpoint finds the disk full."""

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    owner = {"mkdtemp": tempfile, "save_pretrained": checkpoint.GPT2LMHeadModel}.get(broken, checkpoint)
    monkeypatch.setattr(owner, broken, full)


@pytest.mark.parametrize("broken", ["mkdtemp", "save_pretrained", "save_optimizer", "write_json", "_flush"])
def test_whichever_write_fails_nothing_is_left_and_the_same_call_goes_on(tmp_path, monkeypatch, whole, broken):
    with monkeypatch.context() as patch:
        writers(patch, broken)
        with pytest.raises(CannotWrite, match="checkpoint of step 3 .* .No space left.*: .* no checkpoint yet"):
            run(tmp_path)
    assert names(tmp_path) == []
    with monkeypatch.context() as patch:
        interrupt_at(patch, 6)
        with pytest.raises(Interrupted):
            run(tmp_path)
    with monkeypatch.context() as patch:
        writers(patch, broken)
        with pytest.raises(CannotWrite, match="step-00000006-stage-01; free some space there, .* goes on from it"):
            run(tmp_path)
    assert names(tmp_path) == ["step-00000005-stage-00", "step-00000006-stage-01"]
    assert_same(run(tmp_path), whole)


def test_a_folder_that_cannot_be_made_is_said(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(checkpoint.Path, "mkdir", full)
    with pytest.raises(CannotWrite, match="run could not be written .Disk quota exceeded.: .*give another folder"):
        run(tmp_path / "run")


# two processes


def test_a_second_run_is_refused_while_the_first_goes_on_and_only_reads_afterwards(tmp_path, whole, monkeypatch):
    said = []

    def meanwhile(point):
        try:
            run(tmp_path)
        except InvalidInput as error:
            said.append(str(error))
        return False

    state = run(tmp_path, stop=meanwhile)
    assert len(said) == len(state.points)
    assert all(f"{tmp_path} is in use by process {os.getpid()} on" in text and "torchrun" not in text for text in said)
    assert_same(state, whole)
    with folder_lock(tmp_path):  # a finished run is read by any number
        assert_same(run(tmp_path), whole)
    with folder_lock(tmp_path), pytest.raises(InvalidInput, match="holds another run"):
        worker.run(tmp_path, stages=[Stage(1)])


def test_under_torchrun_without_a_process_group_the_way_out_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        folder_lock(tmp_path),
        pytest.raises(InvalidInput, match="Under torchrun, call torch.distributed.init"),
    ):
        run(tmp_path)


def compete(number: int, folder: str, together, answers) -> None:
    together.wait(60)
    try:
        state = run(folder, stop=lambda point: number < 0)
        answers.put(("done", state.step))
    except InvalidInput as error:
        answers.put(("refused", str(error)))


def test_of_two_processes_that_start_together_one_runs(tmp_path, whole):
    context = multiprocessing.get_context("spawn")
    together, answers = context.Barrier(2), context.Queue()
    jobs = [context.Process(target=compete, args=(number, str(tmp_path), together, answers)) for number in range(2)]
    for job in jobs:
        job.start()
    found = sorted(answers.get(timeout=100) for _ in jobs)
    for job in jobs:
        job.join()
    assert found[0] == ("done", 8)
    # the second was refused, or came so late that it could read the end
    assert found[1] == ("done", 8) or "is in use by process" in found[1][1]
    assert_same(run(tmp_path), whole)


def test_threads_of_one_process_are_kept_apart_too(tmp_path):
    inside, go_on, answers = threading.Event(), threading.Event(), []

    def wait(point):
        inside.set()
        return not go_on.wait(60)

    thread = threading.Thread(target=lambda: answers.append(run(tmp_path, stop=wait).step))
    thread.start()
    assert inside.wait(60)
    with pytest.raises(InvalidInput, match="is in use by"):
        run(tmp_path)
    go_on.set()
    thread.join()
    assert answers == [8]
