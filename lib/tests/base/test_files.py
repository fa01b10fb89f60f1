"""What the disk refuses, in one sentence whoever wrote; and the lock that keeps two processes out of one folder."""

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

from effnn.base import CannotWrite, EffnnError, InvalidInput, atomic_path, folder_lock, lock, write_text, writing


@pytest.fixture
def full(monkeypatch):
    """/dev/full takes no byte, as a full disk does."""
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full on this system")
    return "/dev/full"


def write_plainly(path):
    with open(path, "w") as file:
        file.write("x" * 100_000)


def write_by_torch(path):
    with open(path, "wb") as file:
        torch.save(torch.zeros(100_000), file)


@pytest.mark.parametrize("write", [write_plainly, write_by_torch])
def test_a_full_disk_is_said_whoever_writes(full, write):
    with pytest.raises(
        CannotWrite, match="the model could not be written .No space left on device.: free 1 GB"
    ) as caught:
        with writing("the model", "free 1 GB"):
            write(full)
    assert isinstance(caught.value, EffnnError) and isinstance(caught.value, OSError)
    assert caught.value.reason == "No space left on device" and caught.value.__cause__ is not None


def test_a_limit_on_the_size_of_files_is_said_for_a_library_in_rust(tmp_path):
    """In a process of its own, since the limit cannot be taken back everywhere."""
    code = (
        "import resource, torch\n"
        "from safetensors.torch import save_file\n"
        "from effnn.base import CannotWrite, writing\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))\n"
        "try:\n"
        "    with writing('a.safetensors'): save_file({'a': torch.zeros(5000)}, 'a.safetensors')\n"
        "except CannotWrite as error: print(error)\n"
    )
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert ended.stdout.startswith("a.safetensors could not be written (File too large)"), ended.stderr
    save_file({"a": torch.zeros(5000)}, tmp_path / "a.safetensors")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO])
def test_every_refusal_of_the_disk_leaves_the_old_file_and_nothing_else(tmp_path, number):
    target = write_text(tmp_path / "a.txt", "old")
    with (
        pytest.raises(CannotWrite, match=f"a.txt could not be written .{os.strerror(number)}"),
        atomic_path(target) as path,
    ):
        path.write_text("new")
        raise OSError(number, os.strerror(number))
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_other_errors_pass(tmp_path):
    for error in (ValueError("no"), FileNotFoundError(errno.ENOENT, "no such file"), RuntimeError("os error 28?")):
        with pytest.raises(type(error)) as caught, atomic_path(tmp_path / "a"):
            raise error
        assert caught.value is error
    try:
        raise OSError(errno.ENOSPC, "earlier")
    except OSError:
        with pytest.raises(ValueError), writing("a"):
            int("has nothing to do with the error that is dealt with here")


def test_of_two_blocks_the_outer_one_speaks():
    with pytest.raises(CannotWrite, match="^the run could not be written .No space left on device.: delete old ones$"):
        with writing("the run", "delete old ones"), writing("a part of it"):
            raise OSError(errno.ENOSPC, "no space")


# the lock


def hold(folder, ready, seconds=60):
    with folder_lock(folder):
        ready.set()
        time.sleep(seconds)


@pytest.fixture
def holder(tmp_path):
    """A process that holds the folder."""
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=hold, args=(str(tmp_path), ready))
    process.start()
    assert ready.wait(60)
    yield process
    process.kill()
    process.join()


def test_a_folder_that_another_process_holds_is_refused_until_it_is_killed(tmp_path, holder):
    with pytest.raises(InvalidInput, match=f"{tmp_path} is in use by process {holder.pid} on .*: wait until"):
        with folder_lock(tmp_path):
            pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]  # nobody holds it
    with folder_lock(tmp_path):
        assert f"process {os.getpid()} on" in (tmp_path / ".lock").read_text()
    assert list(tmp_path.iterdir()) == []


def test_one_process_holds_a_folder_once_and_any_number_of_folders(tmp_path):
    (tmp_path / "b").mkdir()
    with folder_lock(tmp_path), folder_lock(tmp_path / "b"):
        with pytest.raises(InvalidInput, match=f"in use by process {os.getpid()}"), folder_lock(tmp_path):
            pass
        with pytest.raises(InvalidInput), folder_lock(tmp_path):  # the refused one has not let go of it
            pass
    with pytest.raises(ZeroDivisionError), folder_lock(tmp_path):
        raise ZeroDivisionError
    with folder_lock(tmp_path):
        pass


def test_a_lock_file_that_was_removed_meanwhile_is_no_lock(tmp_path, monkeypatch):
    """The former holder may unlink the file between opening and locking it."""
    flock, calls = lock._flock, []

    def after_removal(handle, path):
        if not calls:
            path.unlink()
        calls.append(None)
        flock(handle, path)

    monkeypatch.setattr(lock, "_flock", after_removal)
    with folder_lock(tmp_path):
        assert len(calls) == 2 and (tmp_path / ".lock").exists()


def hold_and_fork(folder, ready, child):
    with folder_lock(folder):
        if not os.fork():
            child.value = os.getpid()
            ready.set()
        time.sleep(60)


def test_a_forked_process_does_not_go_on_holding(tmp_path):
    """As the workers of a loader may outlive a run that was killed."""
    context = multiprocessing.get_context("spawn")
    ready, child = context.Event(), context.Value("i", 0)
    process = context.Process(target=hold_and_fork, args=(str(tmp_path), ready, child))
    process.start()
    try:
        assert ready.wait(60)
        process.kill()
        process.join()
        with folder_lock(tmp_path):
            pass
    finally:
        os.kill(child.value, signal.SIGKILL)


def test_where_the_file_system_has_no_locks_it_only_warns(tmp_path, monkeypatch, caplog):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    with folder_lock(tmp_path), folder_lock(tmp_path):
        pass
    assert "no file locks in" in caplog.text
    monkeypatch.setattr(lock, "fcntl", None)
    with folder_lock(tmp_path):
        pass
    assert "this system has no file locks" in caplog.text


def test_a_folder_that_takes_nothing_is_said(tmp_path, monkeypatch):
    def refused(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(lock.os, "open", refused)
    with pytest.raises(CannotWrite, match=f"{tmp_path} cannot be written to .Permission denied.: give a folder"):
        with folder_lock(tmp_path):
            pass
