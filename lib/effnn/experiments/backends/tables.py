"""Notebook 06: the talk's support matrix beside one that was run here, and the time of all_reduce on every backend.

Slide 24 lists which of eleven operations each backend of torch.distributed supports; the DQRM slides add that sparse
tensors are summed by gloo alone and that oneCCL is the choice on a CPU.
"""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pandas as pd

from effnn.base import NotAvailable
from effnn.comm import BACKENDS, available, launch, unavailable
from effnn.comm.emulation import network
from effnn.comm.emulation.link_model import Link, ring_ms
from effnn.comm.probing import matrix, timing
from effnn.comm.probing.answers import Status
from effnn.comm.probing.matrix import How
from effnn.comm.probing.operations import OPERATIONS, SPARSE, SPARSE_SUMS
from effnn.report import published

COLUMNS = tuple((backend, device) for backend in ("gloo", "mpi", "nccl") for device in ("cpu", "cuda"))
"""The talk's columns, in its order."""

OURS = (("mpi4py", "cpu"), ("ccl", "cpu"))
"""Columns that the talk does not have."""

TIMED = ("gloo", "ccl", "mpi4py")

_YES, _NO = "yes", "no"

_REASONS = {
    ("gloo", "cpu"): "torch has added it to gloo since the talk",
    ("gloo", "cuda"): "torch has added it to gloo since the talk",
    ("mpi", "cpu"): "torch's MPI backend has it now",
    ("nccl", "cuda"): "torch has added it to nccl since the talk",
}


def talk_table() -> pd.DataFrame:
    """Return the talk's table, one row per cell: backend, device, operation, supported (yes, no or ?), source."""
    return published.load("talk_backends")


def probe_matrix(operations: Iterable[str] = (), world_size: int = 2, other: str = "") -> matrix.Probe:
    """Run the matrix here, on every backend and device.

    operations: names of some of the operations, empty for all. other: path of a probe saved on another machine, whose
    answers fill the cells that this one cannot give; its cells name that machine.
    """
    here = matrix.probe(selected=tuple(operations) or None, world_size=world_size)
    return matrix.merge(here, matrix.load(Path(other).expanduser())) if other else here


def compare(probe: matrix.Probe) -> pd.DataFrame:
    """Return one row per cell of the talk's table and of our own columns: what the talk says, what ran, and the story.

    differs: True or False where both give an answer, empty where this machine has none or the talk has a question mark.
    """
    talk = talk_table().set_index(["backend", "device", "operation"]).supported.to_dict()
    rows = []
    for backend, device in (*COLUMNS, *OURS):
        for operation in OPERATIONS:
            cell = probe.cell(backend, device, operation)
            said = talk.get((backend, device, operation), "")
            if cell is None:
                continue
            place = {"backend": backend, "device": device, "operation": operation}
            row = place | {"talk": said, "status": str(cell.status)}
            answer = _answer(cell)
            differs = (answer != said) if said in (_YES, _NO) and answer else None
            story = _story(backend, device, said, answer, differs, cell)
            rows.append(row | {"how": str(cell.how), "differs": differs, "story": story})
    return pd.DataFrame(rows)


def _answer(cell: matrix.Cell) -> str:
    """yes, no, or empty where this machine cannot say."""
    if not cell.status.answered:
        return ""
    return _YES if cell.status is Status.OK else _NO


def _story(backend: str, device: str, said: str, answer: str, differs: bool | None, cell: matrix.Cell) -> str:
    if differs:
        return _REASONS.get((backend, device), "") if answer == _YES else cell.note
    if not answer or answer == _NO:
        return "not run: nccl moves GPU memory only" if (backend, device) == ("nccl", "cpu") else cell.note
    return f"probed elsewhere: {cell.note}" if cell.machine else ""


def sparse_table(probe: matrix.Probe) -> pd.DataFrame:
    """Return the sparse rows on the backends that take CPU tensors: backend, operation, status, how, message."""
    rows = [
        {"backend": cell.backend, "operation": cell.operation, "status": str(cell.status), "how": str(cell.how)}
        | {"message": cell.note}
        for cell in probe.cells
        if cell.operation in SPARSE and cell.status.answered
    ]
    return pd.DataFrame(rows, columns=["backend", "operation", "status", "how", "message"])


def sparse_backends(table: pd.DataFrame) -> list[str]:
    """Backends whose own (native) all_reduce of sparse tensors gives the right sum, in float32 and in int8."""
    native = table[table.operation.isin(SPARSE_SUMS) & (table.status == Status.OK) & (table.how == How.NATIVE)]
    counts = native.groupby("backend").size()
    return sorted(counts[counts == 2].index)


def claims(table: pd.DataFrame, sparse: pd.DataFrame) -> dict[str, tuple[float | None, str]]:
    """Return what the claims ask of the tables of `compare` and `sparse_table`: id -> (count, note).

    A count is None where this machine cannot give it; the note then says what it needs.
    """
    answered = table[table.differs.notna()]
    fails = answered[answered.talk.eq(_YES) & answered.differs.eq(True)]
    since = answered[answered.talk.eq(_NO) & answered.differs.eq(True)]
    ours = table[table.backend.eq("ccl")]
    done = ours[ours.status.eq(Status.OK)].groupby("how").operation.agg(list)
    own = {how: done.get(how, []) for how in map(str, How)}
    summing = sparse_backends(sparse)
    on_nccl = sparse[sparse.backend.eq("nccl") & sparse.operation.isin(SPARSE_SUMS)]
    found = {
        "comm.matrix": (len(fails), f"of {int(answered.talk.eq(_YES).sum())} that could be probed{_listed(fails)}"),
        "comm.matrix_since": (
            len(since),
            f"of {int(answered.talk.eq(_NO).sum())} that could be probed{_listed(since)}",
        ),
        "comm.sparse": (len([name for name in summing if name != "gloo"]), f"natively: {', '.join(summing) or 'none'}"),
        "comm.sparse_nccl": (int(on_nccl.status.eq(Status.OK).sum()), f"{len(on_nccl)} rows"),
        "comm.oneccl_support": (
            len(own["native"]) + len(own["composed"]),
            "; ".join(f"{len(names)} {how} ({', '.join(names) or 'none'})" for how, names in own.items()),
        ),
    }
    if on_nccl.empty:
        needs = "needs a GPU: save a probe on a machine with one (effnn.comm.probing.matrix) and name it as other_probe"
        found["comm.sparse_nccl"] = (None, needs)
    if not ours.status.isin([str(status) for status in Status if status.answered]).any():
        found["comm.oneccl_support"] = (None, "needs oneCCL (Linux on x86-64: make env)")
    return found


def _listed(cells: pd.DataFrame) -> str:
    names = ", ".join(f"{row.operation} on {row.backend} ({row.device})" for row in cells.itertuples())
    return f": {names}" if names else ""


def time_all_reduce(
    sizes: Sequence[int] = timing.SIZES, launches: int = 5, rounds: int = 3, threads: int = 1
) -> tuple[pd.DataFrame, dict[str, float]]:
    """Time all_reduce with two ranks over every backend that is available here.

    gloo and oneCCL take turns within the same processes. MPI's ranks must be started by its own launcher, under which
    the others are slower than by themselves, so it runs in processes of its own, in turn with those of the two.

    sizes: bytes per rank. launches: how often new processes are started; each is one sample. Returns one row per
    launch, backend, size and round (as `timing.all_reduce_rounds`, with the column launch), and the limits in GB/s: the
    best that any launch saw.
    """
    here = [name for name in TIMED if unavailable(name, "cpu") is None]
    together, alone = [name for name in here if name != "mpi4py"], [name for name in here if name == "mpi4py"]
    options = {"threads": threads, **launch.PATIENT}
    rows, limits = [], []
    for number in range(launches):
        for names in (together, alone):
            if names:
                arguments = (names, list(sizes), rounds)
                found = launch.run(timing.all_reduce_rounds, 2, names[0], args=arguments, **options)
                rows += [{"launch": number, **row} for row in found[0]]
        limits.append(launch.run(timing.limits, 2, "gloo", **options)[0])
    return pd.DataFrame(rows), {name: max(found[name] for found in limits) for name in limits[0]}


def time_crowded(ranks: int, sizes: Sequence[int], launches: int = 3, rounds: int = 3) -> pd.DataFrame:
    """Time all_reduce of more ranks than the machine has cores, gloo and oneCCL in turn; rows as `time_all_reduce`."""
    names = [name for name in TIMED if name != "mpi4py" and unavailable(name, "cpu") is None]
    rows = []
    for number in range(launches):
        arguments = (names, list(sizes), rounds)
        found = launch.run(timing.all_reduce_rounds, ranks, "gloo", args=arguments, **launch.PATIENT)
        rows += [{"launch": number, "ranks": ranks, **row} for row in found[0]]
    return pd.DataFrame(rows)


def medians(times: pd.DataFrame) -> pd.DataFrame:
    """Return one row per launch, backend and size: ms (median over rounds) and gb_s, the message over its time."""
    found = times.groupby(["launch", "backend", "bytes"], as_index=False).ms.median()
    return found.assign(gb_s=found.bytes / found.ms / 1e6)


def ratios(times: pd.DataFrame, nbytes: int, above: str = "ccl", below: str = "gloo") -> list[float]:
    """Time of one backend over another's at one size, one ratio per launch; empty where one of them was not timed."""
    table = medians(times[times.bytes == nbytes]).pivot(index="launch", columns="backend", values="ms")
    return [] if {above, below} - set(table.columns) else (table[above] / table[below]).tolist()


def emulated_all_reduce(rate_mbit: float, nbytes: int, calls: int = 3) -> dict[str, object]:
    """Time a gloo all_reduce of nbytes between two emulated nodes, beside the alpha-beta model's figure.

    Returns rate (asked), measured_rate (Mbit/s, by a plain socket), ms (measured here; None with the reason in `why`
    where emulated nodes are not permitted) and model_ms (computed, not measured).
    """
    row = {"rate_mbit": rate_mbit, "bytes": nbytes, "model_ms": ring_ms(nbytes, 2, Link(rate_mbit))}
    why = network.unavailable()
    if why is not None:
        return row | {"measured_mbit": None, "ms": None, "why": why}
    with ExitStack() as stack:
        try:
            net = stack.enter_context(network.EmulatedNetwork(nodes=2, rate_mbit=rate_mbit))
        except NotAvailable as error:  # its own look at the link may run out of time
            return row | {"measured_mbit": None, "ms": None, "why": str(error)}
        found = launch.run(timing.all_reduce_ms, 2, "gloo", args=(nbytes, calls), nodes=net.nodes, **launch.PATIENT)
        return row | {"measured_mbit": net.measured_mbit, "ms": float(np.mean(found)), "why": ""}


def missing() -> pd.DataFrame:
    """Return the backends that are not available here, each with the reason in one sentence."""
    here = set(available())
    names = [backend for backend in BACKENDS if backend not in here]
    return pd.DataFrame({"backend": names, "not available here": [unavailable(name) for name in names]})
