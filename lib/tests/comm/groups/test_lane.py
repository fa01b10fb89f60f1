"""The lane: order, errors, time-outs and the end of the process, with Python callables in place of a library."""

import atexit
import gc
import json
import os
import subprocess
import sys
import threading
import time
import weakref
from datetime import timedelta

import pytest
import torch

from effnn.comm import CollectiveFailed, CollectiveTimeout
from effnn.comm.groups.lane import lane as lane_module
from effnn.comm.groups.lane.call import Call, LibraryError
from effnn.comm.groups.lane.lane import Lane

SOON = timedelta(seconds=60)  # for what ends at once; a busy machine may be slow


class Later:
    """A request that is finished once it has been let go and asked a few times."""

    def __init__(self, polls=3, error=None):
        self.polls, self.error, self.go = polls, error, threading.Event()

    def test(self):
        if not self.go.is_set():
            return False
        self.polls -= 1
        if self.polls <= 0 and self.error is not None:
            raise self.error
        return self.polls <= 0


@pytest.fixture
def lanes(monkeypatch):
    """Makes lanes, and forgets them at the end; what would change the end of this process is only counted."""
    made, skips = [], []
    monkeypatch.setattr(lane_module, "skip_destructors", lambda: skips.append(1))

    def make():
        made.append(Lane("the library"))
        return made[-1]

    make.skips = skips
    yield make
    for lane in made:
        lane.stop()
        atexit.unregister(lane.stop)


@pytest.fixture
def lane(lanes):
    return lanes()


@pytest.fixture
def blocker():
    """An Event that a call blocks on; set at the end, so that no thread is left in it."""
    event = threading.Event()
    yield event
    event.set()


def noting(notes, name, request=None):
    """A call that notes its start and its end."""

    def start():
        notes.append(f"{name} starts")
        return request

    return Call(name, start, finish=lambda: notes.append(f"{name} ends"), timeout=30)


def failing(where, error):
    def fail():
        raise error

    if where == "test":
        request = Later(polls=2, error=error)
        request.go.set()
        return Call("the call", lambda: request, timeout=30)
    starts, finish = (fail, None) if where == "start" else (lambda: None, fail)
    return Call("the call", starts, finish=finish, timeout=30)


# Order


def test_calls_start_and_end_in_the_order_of_issue(lane):
    notes = []
    works = [lane.submit(noting(notes, name)) for name in "abc"]
    assert all(handle.wait(SOON) for handle in works)
    assert notes == ["a starts", "a ends", "b starts", "b ends", "c starts", "c ends"]
    assert all(handle.is_completed() and handle.is_success() and handle.exception() is None for handle in works)


def test_a_request_that_goes_on_does_not_stop_the_calls_after_it(lane):
    notes, request = [], Later()
    slow = lane.submit(noting(notes, "slow", request))
    lane.submit(noting(notes, "quick")).wait(SOON)
    assert notes == ["slow starts", "quick starts", "quick ends"] and not slow.is_completed()
    request.go.set()
    assert slow.wait(SOON) and request.polls == 0
    assert notes[-1] == "slow ends"


def test_requests_end_in_their_own_order(lane):
    notes, requests = [], [Later() for _ in range(3)]
    works = [lane.submit(noting(notes, str(n), request)) for n, request in enumerate(requests)]
    for n in (2, 0, 1):
        requests[n].go.set()
        works[n].wait(SOON)
    assert [note for note in notes if note.endswith("ends")] == ["2 ends", "0 ends", "1 ends"]


def test_many_threads_submit_at_once_and_calls_never_overlap(lane):
    running, overlaps, ran = [], [], []

    def call(thread, number):
        def start():
            overlaps.extend(running)
            running.append(thread)
            ran.append((thread, number))
            time.sleep(0)
            running.pop()

        return Call("a call", start, timeout=60)

    def submit(thread):
        works = [lane.submit(call(thread, number)) for number in range(50)]
        errors.extend(handle.exception() for handle in works if not handle.wait(SOON))

    errors = []
    threads = [threading.Thread(target=submit, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not overlaps and not errors and len(ran) == 400
    for thread in range(8):
        assert [number for name, number in ran if name == thread] == list(range(50))


# Results and futures


@pytest.mark.parametrize("asked", ["before the end", "after the end"])
def test_a_future_holds_the_tensors_whenever_it_is_asked_for(lane, asked):
    request, tensor = Later(), torch.zeros(3)
    handle = lane.submit(Call("a call", lambda: request, [tensor], lambda: tensor.fill_(5), timeout=30))
    if asked == "before the end":
        future = handle.get_future()
        assert not future.done()
    request.go.set()
    handle.wait(SOON)
    if asked == "after the end":
        future = handle.get_future()
    assert handle.get_future() is future
    assert future.then(lambda done: done.value()[0].sum().item()).wait() == 15
    assert handle.result()[0] is tensor


def test_a_callback_may_wait_for_another_call_of_the_same_lane(lane):
    first, seen = Later(), []
    handle = lane.submit(Call("first", lambda: first, timeout=30))

    def callback(_):
        lane.submit(Call("second", lambda: seen.append("second"), timeout=30)).wait(SOON)
        return "both"

    future = handle.get_future().then(callback)
    first.go.set()
    assert future.wait() == "both" and seen == ["second"]


def test_the_source_of_a_receive(lane):
    request = Later()
    handle = lane.submit(Call("recv", lambda: request, timeout=30, source=lambda: 3))
    request.go.set()
    assert handle.source_rank() == handle._source_rank() == 3
    with pytest.raises(CollectiveFailed, match="all_reduce has no source rank"):
        lane.submit(Call("all_reduce", lambda: None)).source_rank()


def test_an_ended_call_keeps_no_memory(lane):
    tensor = torch.zeros(1000)
    gone = weakref.ref(tensor)
    lane.submit(Call("a call", lambda: None, [tensor], timeout=30)).wait(SOON)
    del tensor
    limit = time.monotonic() + 20
    while gone() is not None and time.monotonic() < limit:
        gc.collect()
        time.sleep(0.01)
    assert gone() is None


# Errors


@pytest.mark.parametrize("where", ["start", "test", "finish"])
def test_an_error_reaches_every_way_of_waiting_and_the_next_call_works(lane, where):
    handle = lane.submit(failing(where, ValueError("no such thing")))
    future = handle.get_future()
    with pytest.raises(ValueError, match="no such thing"):
        handle.wait(SOON)
    with pytest.raises(ValueError, match="no such thing"):
        handle.synchronize()
    assert isinstance(handle.exception(), ValueError)
    assert handle.is_completed() and not handle.is_success()
    with pytest.raises(Exception, match="no such thing"):
        future.wait()
    with pytest.raises(Exception, match="no such thing"):
        future.then(lambda done: done.value()).wait()
    with pytest.raises(Exception, match="no such thing"):
        torch.futures.wait_all([future])
    assert lane.failure is None
    assert lane.submit(Call("the next", lambda: None, timeout=30)).wait(SOON)


@pytest.mark.parametrize("where", ["start", "test", "finish"])
def test_after_an_error_of_the_library_its_lane_is_not_used_again(lanes, lane, where):
    before = Later()
    pending = lane.submit(Call("pending", lambda: before, timeout=30))
    with pytest.raises(LibraryError, match="connection reset"):
        lane.run(failing(where, LibraryError("connection reset")))
    with pytest.raises(CollectiveFailed, match="connection reset"):
        pending.wait(SOON)
    ran = []
    with pytest.raises(CollectiveFailed, match="all_gather: the library is not used any more .* connection reset"):
        lane.submit(Call("all_gather", lambda: ran.append(1)))
    assert not ran
    assert lanes().submit(Call("of another lane", lambda: None)).wait(SOON)


def test_a_call_that_never_returns_is_an_error_of_all_within_the_limit(lanes, lane, blocker):
    ran = []
    started = time.monotonic()
    stuck = lane.submit(Call("all_reduce of 2 ranks", lambda: blocker.wait() and None, timeout=0.4))
    queued = [lane.submit(Call(f"call {n}", lambda: ran.append(1), timeout=0.4)) for n in range(3)]
    future = queued[0].get_future()
    with pytest.raises(CollectiveTimeout, match=r"all_reduce of 2 ranks .* timeout of 0\.4 s"):
        stuck.wait(SOON)
    for n, handle in enumerate(queued):
        with pytest.raises(CollectiveFailed, match=f"call {n}: .* earlier call failed: all_reduce of 2 ranks"):
            handle.wait(SOON)
    with pytest.raises(Exception, match="earlier call failed"):
        future.wait()
    assert time.monotonic() - started >= 0.4  # not before its time
    with pytest.raises(CollectiveFailed, match="Start the processes again"):
        lane.submit(Call("later", lambda: ran.append(1)))
    assert lanes.skips  # this process will end without the destructors of a library in use
    blocker.set()
    time.sleep(0.1)
    assert not ran and isinstance(stuck.exception(), CollectiveTimeout)  # also after it has returned after all


def test_a_request_that_never_ends_is_a_time_out(lane):
    with pytest.raises(CollectiveTimeout, match=r"recv over the library did not end"):
        lane.submit(Call("recv", Later, timeout=0.3)).wait(SOON)


def test_waiting_for_too_short_a_time_leaves_the_call_running(lane):
    request = Later()
    handle = lane.submit(Call("a call", lambda: request, timeout=30))
    with pytest.raises(CollectiveTimeout, match=r"a call did not end within the 0\.05 s that wait\(\) was given"):
        handle.wait(timedelta(seconds=0.05))
    assert not handle.is_completed() and handle.exception() is None and lane.failure is None
    request.go.set()
    assert (
        handle.wait(timedelta(0)) and handle.wait(timedelta(milliseconds=-1)) and handle.wait()
    )  # no limit of its own
    assert handle.is_success()


# The end


def test_stop_may_come_twice_and_leaves_nobody_waiting(lane):
    pending = lane.submit(Call("pending", Later, timeout=30))
    lane.submit(Call("a call", lambda: None)).wait(SOON)
    lane.stop()
    lane.stop()
    with pytest.raises(CollectiveFailed, match="pending: the library is not used any more, since this process is"):
        pending.wait(SOON)
    with pytest.raises(CollectiveFailed, match="process is ending"):
        lane.submit(Call("later", lambda: None))


def test_stop_does_not_wait_for_a_call_that_never_returns(lanes, lane, blocker):
    stuck = lane.submit(Call("stuck", lambda: blocker.wait() and None))
    queued = lane.submit(Call("queued", lambda: None))
    time.sleep(0.1)
    stopping = threading.Thread(target=lane.stop)
    stopping.start()
    stopping.join(SOON.total_seconds())
    assert not stopping.is_alive() and not blocker.is_set() and lanes.skips
    for handle in (stuck, queued):
        with pytest.raises(CollectiveFailed, match="process is ending"):
            handle.wait(SOON)


SCENARIOS = """
import atexit, ctypes, json, os, sys, time
from effnn.comm import CollectiveFailed, CollectiveTimeout
from effnn.comm.groups.lane.call import Call
from effnn.comm.groups.lane.lane import Lane

def stuck(lane, limit=None):
    return lane.submit(Call("stuck", lambda: ctypes.CDLL(None).pause(), timeout=limit))

def nothing_is_stuck():
    assert Lane("the library").submit(Call("a call", lambda: None)).wait()

def a_call_is_stuck():
    stuck(Lane("the library"))
    time.sleep(0.1)

def a_stuck_call_has_timed_out():
    try:
        stuck(Lane("the library"), 0.3).wait()
    except CollectiveTimeout:
        return
    sys.exit(100)

def a_time_out_ends_the_process():
    stuck(Lane("the library"), 0.3).wait()

def a_call_is_made_at_exit():
    lanes = []
    def late():
        try:
            lanes[0].submit(Call("late", lambda: None)).wait()
        except CollectiveFailed:
            return
        os._exit(100)
    atexit.register(late)  # before the lane: it runs after the lane's own
    lanes.append(Lane("the library"))
    future = lanes[0].submit(Call("a call", lambda: None)).get_future()

def a_child_is_forked():
    lane = Lane("the library")
    lane.run(Call("a call", lambda: None))
    child = os.fork()
    if child == 0:
        try:
            lane.submit(Call("all_reduce", lambda: None))
        except CollectiveFailed as error:
            os._exit(3 if "all_reduce: this process was forked" in str(error) and "'spawn'" in str(error) else 4)
        os._exit(5)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 3:
        sys.exit(100)

found = {}
for scenario in (nothing_is_stuck, a_call_is_stuck, a_stuck_call_has_timed_out, a_time_out_ends_the_process,
                 a_call_is_made_at_exit, a_child_is_forked):
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        sys.stdout = sys.stderr
        scenario()
        print("buffered output of", scenario.__name__, end="")
        sys.exit(7)
    status = 0
    while time.monotonic() < started + 120:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        time.sleep(0.02)
    else:
        os.kill(child, 9)
    found[scenario.__name__] = os.waitstatus_to_exitcode(status) if pid else "does not end"
print(json.dumps(found))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_the_process_ends_with_its_own_status_whatever_its_lane_does():
    ran = subprocess.run([sys.executable, "-c", SCENARIOS], capture_output=True, text=True, timeout=500)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == {
        "nothing_is_stuck": 7,
        "a_call_is_stuck": 7,
        "a_stuck_call_has_timed_out": 7,
        "a_time_out_ends_the_process": 1,
        "a_call_is_made_at_exit": 7,
        "a_child_is_forked": 7,
    }, ran.stderr
    for scenario in ("nothing_is_stuck", "a_call_is_stuck", "a_stuck_call_has_timed_out"):
        assert f"buffered output of {scenario}" in ran.stderr  # Python's own streams are flushed
