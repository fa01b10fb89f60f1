"""Run checks on all ranks and find out what became of each: the protocol of the support matrix and of `check`.

What a rank has to say travels through the store in which the group met, so that no collective has to work for it. The
checks stop at the first failure, since ranks may be out of step after it.
"""

import dataclasses
import importlib
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import torch
import torch.distributed as dist

from effnn.base import EffnnError, NotAvailable, first_line, temporary_folder
from effnn.comm import launch
from effnn.comm.groups.lane.call import CollectiveTimeout, is_of_communication
from effnn.comm.probing import operations

Checks = Mapping[str, Callable[[torch.device], None]]

NO_ANSWER = "no answer: the process has ended or is stuck"

_MOMENT = 1.0  # seconds that one event may take to be noticed by all ranks
_LAST_WAIT = 2.0  # seconds, at the end of a check, for ranks that have answered until then


class Status(StrEnum):
    """What became of an operation; the last three are of one that was not run to its end."""

    OK = "ok"
    WRONG = "wrong result"
    ERROR = "error"
    HANG = "hang"
    SILENT = "no answer"
    NOT_BUILT = "not built"
    NO_DEVICE = "no device"

    @property
    def answered(self) -> bool:
        """Whether this machine could run the operation."""
        return self not in (Status.NOT_BUILT, Status.NO_DEVICE)


@dataclass(frozen=True)
class Answer:
    """What one rank, or all of them together, say of one operation.

    status: ok, wrong result, error, hang or no answer.
    message: what went wrong, in one line.
    rank: whose answer it is; of several failures, the one that came first.
    time: time.time() of that rank at the end of the operation.
    others: how many other ranks failed as well.
    of_communication: whether the message is of a lost connection or a time-out, which a peer may have caused.
    """

    status: Status
    message: str = ""
    rank: int = 0
    time: float = 0.0
    others: int = 0
    of_communication: bool = False

    @property
    def ok(self) -> bool:
        return self.status is Status.OK

    @property
    def may_be_slowness(self) -> bool:
        """Whether a busy machine may be all that is behind a failure."""
        return self.status is Status.HANG or self.of_communication

    @property
    def sentence(self) -> str:
        """Who says what, for a reader; "ok" where all is well."""
        if self.ok:
            return str(self.status)
        wrong = f"{self.status}: " if self.status is Status.WRONG else ""
        others = f" ({self.others} more of the ranks failed)" if self.others else ""
        return f"rank {self.rank}: {wrong}{self.message}{others}"


def in_new_processes(
    backend: str,
    device: str,
    names: Sequence[str],
    world_size: int,
    checks: str,
    timeout: float,
    group_timeout: float,
) -> dict[str, Answer]:
    """Run the checks in processes of their own; return the answers up to the first failure, at least one.

    backend, device: what runs them, and where their tensors are.
    names: of the checks. Where no rank even begins, all of them get the reason as their answer.
    world_size: number of ranks.
    checks: "module:attribute" of a mapping from a name to its check; the ranks import it.
    timeout: seconds for everything; a rank that still runs then hangs.
    group_timeout: seconds after which a call that cannot complete is an error.
    """
    with temporary_folder(Path(tempfile.gettempdir()), "effnn-answers-") as folder:
        path = folder / "answers"
        results = launch.run_ranks(
            _in_rank,
            world_size,
            backend,
            args=(list(names), device, str(path), group_timeout, checks),
            timeout=timeout,
            group_timeout=group_timeout,
            grace=2 * _MOMENT,
        )
        began = path.exists()
        lines = path.read_text(encoding="utf-8").splitlines() if began else []
    answers = {name: _answer(fields) for name, fields in map(json.loads, lines)}
    failed = [one for one in results if not one.ok]
    stopped = next((answer for answer in answers.values() if not answer.ok), None)
    if stopped is None and len(answers) == len(names):
        return answers
    if failed:  # the end of a process explains the errors of its peers
        first = min(failed, key=lambda one: one.finished or float("inf"))
        hang = first.still_running or _tells_of_a_timeout(first.error)
        status = Status.HANG if hang else Status.ERROR
        stopped = Answer(status, first.error, first.rank, of_communication=first.of_communication)
    elif stopped is None:
        stopped = Answer(Status.ERROR, "a rank ended without an answer")
    elif stopped.status is Status.SILENT:
        stopped = dataclasses.replace(stopped, status=Status.HANG)
    well = {name: answer for name, answer in answers.items() if answer.ok}
    return well | dict.fromkeys(names[len(well) :][: 1 if began else None], stopped)


def in_group(
    names: Sequence[str],
    device: torch.device,
    checks: Checks,
    board: "Board",
    tell: Callable[[str, Answer], None],
    waits: bool = True,
) -> bool:
    """In every rank of the default group: run the checks. Returns whether all went well.

    names, checks: the checks, by name.
    device: where this rank's tensors are.
    board: where the ranks post their answers.
    tell: called on rank 0 for each check that was run, with what all ranks together say of it.
    waits: whether rank 0 also waits for the answers of the others when its own is a failure.

    Raises NotAvailable where a rank no longer answers: leave the process at once then, as leaving the group could wait
    for that rank.
    """
    for name in names:
        joint = mine = _attempt(checks[name], device)
        board.post(name, dataclasses.astuple(mine))
        if board.rank == 0:
            given = board.collect(name, board.seconds if mine.ok or waits else _MOMENT)
            late = mine.ok or waits  # whether those that have not answered had the time to
            joint = together([_answer(one, rank) for rank, one in enumerate(given) if late or one is not None])
            board.post(f"{name}/all", dataclasses.astuple(joint))
            tell(name, joint)
        elif mine.ok:
            joint = _answer(board.read(f"{name}/all", 0, 2 * board.seconds))  # rank 0 may wait for others first
        if joint.status is Status.SILENT:
            raise NotAvailable(f"{name}: {joint.sentence}")
        if not joint.ok:
            return False
    return True


def together(answers: Sequence[Answer]) -> Answer:
    """What several ranks' answers say: a rank that does not answer counts first, then the first failure in time.

    Later failures may come of the first. A rank whose time-out has passed closes its connections, and may say so later
    than those who lose them, so a time-out comes before a lost connection.
    """
    failures = [answer for answer in answers if not answer.ok]
    if not failures:
        return answers[0]
    silent = [answer for answer in failures if answer.status is Status.SILENT]
    first = min(silent or failures, key=lambda one: one.time)
    if first.status is Status.ERROR and first.of_communication:
        first = min((one for one in failures if one.status is Status.HANG), key=lambda one: one.time, default=first)
    return dataclasses.replace(first, others=len(failures) - 1)


class Board:
    """What each rank posts, through the store that the group met in. seconds: that rank 0 waits for the others."""

    def __init__(self, seconds: float):
        self._store = dist.PrefixStore("effnn-check", dist.distributed_c10d._get_default_store())
        self.rank, self.seconds = dist.get_rank(), seconds
        self._silent: set[int] = set()

    def post(self, step: str, value: object) -> None:
        """Leave a value (of JSON) for the others."""
        self._store.set(f"{step}/{self.rank}", json.dumps(value))

    def collect(self, step: str, seconds: float) -> list:
        """What every rank has posted, in rank order; None for those that have not within `seconds`."""
        limit = time.monotonic() + seconds
        found = [self.read(step, rank, limit - time.monotonic()) for rank in range(dist.get_world_size())]
        self._silent = {rank for rank, value in enumerate(found) if value is None}
        return found

    def read(self, step: str, rank: int, seconds: float) -> object:
        """What a rank has posted; None if it has not within `seconds`, or the process that serves the store is gone."""
        limit, pause = time.monotonic() + seconds, 1e-3  # the store's own wait would report a time-out on stderr
        try:
            while not self._store.check([f"{step}/{rank}"]):
                if time.monotonic() > limit:
                    return None
                time.sleep(pause)
                pause = min(2 * pause, 0.1)
            return json.loads(self._store.get(f"{step}/{rank}"))
        except RuntimeError:
            return None

    def close(self) -> None:
        """Wait until rank 0 has said everything, and rank 0, which may serve the store, until the others have heard.

        torchrun ends all ranks as soon as one has ended with an error.
        """
        if self.rank == 0:
            self.post("said", True)
            for rank in range(1, dist.get_world_size()):
                self.read("heard", rank, 0 if rank in self._silent else _LAST_WAIT)
        else:
            self.read("said", 0, 3 * self.seconds)
            self.post("heard", True)


def rank_device(device: str) -> torch.device:
    """Where this rank's tensors are: on a GPU of its own where there are enough."""
    if device != "cuda":
        return torch.device(device)
    place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    torch.cuda.set_device(place)
    return place


def sentence(error: BaseException) -> str:
    """The first line of an error, with its type where it is not ours, without the C++ lines that it came from."""
    text = first_line(re.sub(r"\[[^][\n]*\.(cc|cpp|h|hpp):\d+\]\s*", "", str(error)), 300)
    return text if isinstance(error, EffnnError) else f"{type(error).__name__}: {text}"


def imported(checks: str) -> Checks:
    """The mapping of that name, "module:attribute"."""
    module, _, name = checks.partition(":")
    return getattr(importlib.import_module(module), name)


def _in_rank(names: list[str], device: str, path: str, seconds: float, checks: str) -> None:
    """Run the checks in one rank of a launch; rank 0 notes each answer in a file, which outlives the process."""
    board = Board(2 * seconds + 5)
    with open(path if board.rank == 0 else os.devnull, "w", encoding="utf-8") as file:

        def note(name: str, answer: Answer) -> None:
            file.write(json.dumps([name, dataclasses.astuple(answer)]) + "\n")
            file.flush()
            os.fsync(file.fileno())

        try:
            in_group(names, rank_device(device), imported(checks), board, note, waits=False)
        except NotAvailable:
            pass  # the launcher knows what became of that rank


def _attempt(check: Callable[[torch.device], None], device: torch.device) -> Answer:
    status, message, of_communication = Status.OK, "", False
    try:
        check(device)
    except operations.WrongResult as error:
        status, message = Status.WRONG, str(error)
    except Exception as error:
        message = sentence(error)
        late = isinstance(error, CollectiveTimeout) or _tells_of_a_timeout(message)
        status = Status.HANG if late else Status.ERROR
        of_communication = is_of_communication(error)
    return Answer(status, message, dist.get_rank(), time.time(), of_communication=of_communication)


def _tells_of_a_timeout(message: str) -> bool:
    """torch's own backends have no type of error for a time-out: their text alone tells it."""
    return "imed out" in message


def _answer(fields: list | None, rank: int = 0) -> Answer:
    """An answer as it was posted; None: nothing was, by that rank."""
    if fields is None:
        return Answer(Status.SILENT, NO_ANSWER, rank)
    status, *rest = fields
    return Answer(Status(status), *rest)
