"""The figures of notebook 06, from the DataFrames of `backends`. Drawing only."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from effnn.comm.probing.answers import Status
from effnn.comm.probing.matrix import How
from effnn.comm.probing.operations import OPERATIONS, SPARSE
from effnn.experiments.backends.tables import COLUMNS, OURS, medians
from effnn.report import PALETTE, band, legend_outside, new_figure
from effnn.report.values import interval

_GOOD, _BAD, _UNKNOWN = "#CFE8DD", "#F6CFC0", "#E9E9E9"
_DEVICE = {"cpu": "CPU", "cuda": "GPU"}
_NAMES = {"gloo": "gloo", "mpi": "MPI", "nccl": "NCCL", "mpi4py": "mpi4py", "ccl": "oneCCL"}
_HOW = {How.NATIVE: "yes", How.COMPOSED: "yes, c", How.DELEGATED: "yes, d", "": "yes"}
COLORS = {"gloo": PALETTE[0], "ccl": PALETTE[1], "mpi4py": PALETTE[2]}


def draw_matrix(table: pd.DataFrame) -> Figure:
    """The talk's table on the left, ours on the right, in the same cells; a frame marks a cell that differs."""
    columns = [pair for pair in (*COLUMNS, *OURS) if ((table.backend == pair[0]) & (table.device == pair[1])).any()]
    talks = [pair for pair in columns if pair in COLUMNS]
    fig, axes = new_figure(2, 1, height=5.6, gridspec_kw={"width_ratios": [len(talks), len(columns)]})
    fig.set_size_inches(13.2, 6.2)
    _draw_grid(axes[0], table, talks, lambda row: _talks_cell(row))
    _draw_grid(axes[1], table, columns, lambda row: _our_cell(row))
    axes[0].set_title("The talk's table (slide 24)")
    axes[1].set_title("Run here, with value checks")
    axes[1].set_yticklabels([])
    note = "c: composed of other calls; d: delegated to gloo; n/a: not on this machine; *: by its nature, not run; "
    note += "frame: differs from the talk"
    fig.supxlabel(note, fontsize=11)
    return fig


def draw_sparse(table: pd.DataFrame) -> Figure:
    """What each backend makes of sparse gradients."""
    names = list(dict.fromkeys(table.backend))
    fig, ax = new_figure(width=7.6, height=3.0)
    cells = table.set_index(["backend", "operation"])
    for x, backend in enumerate(names):
        for y, operation in enumerate(SPARSE):
            if (backend, operation) in cells.index:
                row = cells.loc[(backend, operation)]
                good = row.status == Status.OK
                _cell(ax, x, y, _HOW[row.how] if good else "no", _GOOD if good else _BAD)
    _frame(ax, [_NAMES[name] for name in names], list(SPARSE))
    ax.set_title("Sparse gradients, CPU tensors (c: composed of all_gathers)")
    return fig


def draw_times(times: pd.DataFrame, limits: dict[str, float]) -> Figure:
    """Time and bandwidth of all_reduce against the message size; bands are 95 % intervals over launches."""
    found = medians(times)
    fig, (left, right) = new_figure(2, 1)
    for backend in [name for name in COLORS if name in set(found.backend)]:
        rows = found[found.backend == backend]
        for ax, column in ((left, "ms"), (right, "gb_s")):
            sizes, mean, low, high = _curve(rows, column)
            band(ax, sizes, mean, low, high, _NAMES[backend], COLORS[backend])
    for name, style in (("loopback exchange", ":"), ("memory copy", "-.")):
        right.axhline(limits[name], color="black", linestyle=style, linewidth=1.3, label=name)
    sizes = sorted(found.bytes.unique())
    for ax in (left, right):
        ax.set_xscale("log", base=4)
        ax.set_yscale("log")
        ax.set_xticks(sizes, [_size_text(size) for size in sizes], rotation=30)
        ax.minorticks_off()
        ax.set_xlabel("message, bytes per rank")
    left.set_ylabel("all_reduce, ms")
    right.set_ylabel("message / time, GB/s")
    left.set_title("Time, two ranks on one machine")
    right.set_title("Bandwidth and its limits")
    legend_outside(fig, "below")
    return fig


def _curve(rows: pd.DataFrame, column: str) -> tuple[list[int], list[float], list[float], list[float]]:
    sizes, mean, low, high = [], [], [], []
    for size, group in rows.groupby("bytes"):
        values = group[column].tolist()
        # On a logarithmic axis the interval is one of the logarithms, so it never reaches zero.
        logs = np.log(values)
        ends = interval(tuple(logs)) or (logs.mean(), logs.mean())
        sizes.append(int(size))
        mean.append(float(np.exp(logs.mean())))
        low.append(float(np.exp(ends[0])))
        high.append(float(np.exp(ends[1])))
    return sizes, mean, low, high


def _draw_grid(ax: Axes, table: pd.DataFrame, columns: list[tuple[str, str]], look) -> None:
    cells = table.set_index(["backend", "device", "operation"], drop=False)
    names = [name for name in OPERATIONS if name in set(table.operation)]
    for x, (backend, device) in enumerate(columns):
        for y, operation in enumerate(names):
            text, color, framed = look(cells.loc[(backend, device, operation)])
            _cell(ax, x, y, text, color, framed)
    _frame(ax, [f"{_NAMES[backend]}\n{_DEVICE[device]}" for backend, device in columns], names)


def _talks_cell(row: pd.Series) -> tuple[str, str, bool]:
    return row.talk, {"yes": _GOOD, "no": _BAD}.get(row.talk, _UNKNOWN), False


def _our_cell(row: pd.Series) -> tuple[str, str, bool]:
    if row.status == Status.OK:
        return _HOW[row.how], _GOOD, row.differs is True
    if (row.backend, row.device) == ("nccl", "cpu"):
        return "no*", _UNKNOWN, False
    if not Status(row.status).answered:
        return "n/a", _UNKNOWN, False
    return {Status.WRONG: "wrong", Status.HANG: "hangs"}.get(row.status, "error"), _BAD, row.differs is True


def _cell(ax: Axes, x: int, y: int, text: str, color: str, framed: bool = False) -> None:
    ax.add_patch(Rectangle((x - 0.47, y - 0.46), 0.94, 0.92, facecolor=color, edgecolor="none"))
    if framed:
        ax.add_patch(Rectangle((x - 0.45, y - 0.44), 0.9, 0.88, facecolor="none", edgecolor=PALETTE[1], linewidth=2.4))
    ax.text(x, y, text, ha="center", va="center", fontsize=11, fontweight="bold" if framed else "normal")


def _frame(ax: Axes, columns: list[str], rows: list[str]) -> None:
    ax.set_xlim(-0.5, len(columns) - 0.5)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xticks(range(len(columns)), columns)
    ax.set_yticks(range(len(rows)), rows)
    ax.tick_params(length=0, labeltop=True, labelbottom=False)
    ax.grid(False)
    ax.spines[:].set_visible(False)


def _size_text(size: int) -> str:
    return f"{size // 2**20} MB" if size >= 2**20 else f"{size // 2**10} kB"
