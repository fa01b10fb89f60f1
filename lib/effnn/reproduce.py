"""Run the notebooks: `python -m effnn.reproduce [--notebook 01] [--profile laptop] [--set name=value]`.

Every parameter is checked before anything runs. A notebook is skipped where nothing changed that its results depend on,
one that fails does not stop the others, and an executed notebook appears under its name only when it is complete. Slow
steps inside a notebook resume from `effnn.cache`. At the end the claims table and report.html are rebuilt. Exit status:
0, or 1 when something failed, 2 when the request could not be understood, 130 after Ctrl-C.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from effnn import paths
from effnn.base import EffnnError, InvalidInput
from effnn.runner import (
    Guard,
    NotebookFailed,
    declared,
    dependencies_of,
    execute,
    from_text,
    load_profile,
    read_mark,
    resolve,
    stale_because,
    write_mark,
)
from effnn.runner.staleness import mark_path

QUIET_CELL = 20.0
"""Seconds; where no progress bar can be drawn, cells that take longer get a line."""

COMMITTED = ("laptop", "study")
"""Profiles whose results are committed and answer claims; with --set they become `<profile>-set`."""


@dataclass(frozen=True)
class Job:
    """One notebook with its checked parameters.

    notebook: its file.
    profile: name of the folder of its results.
    parameters: name -> value, for those that differ from the parameters cell.
    threads: of OpenMP in its kernel; None leaves the environment as it is.
    time_limit: seconds, None for none.
    dependencies: name -> hash of all that its results depend on.
    why: the reason that it must run, empty when it need not.
    """

    notebook: Path
    profile: str
    parameters: dict[str, object]
    threads: int | None
    time_limit: float | None
    dependencies: dict[str, str]
    why: str

    @property
    def folder(self) -> Path:
        """The folder of its results."""
        return paths.results_of(self.profile, self.notebook.stem)

    @property
    def results(self) -> Path:
        """The results file, which the notebook writes last."""
        return self.folder / "results.json"

    @property
    def executed(self) -> Path:
        """The executed copy of the notebook."""
        return self.folder / self.notebook.name


@dataclass(frozen=True)
class NotebookRun:
    """How one notebook ended: `state` is done, unchanged, failed, interrupted or not reached."""

    notebook: str
    state: str
    seconds: float = 0.0
    note: str = ""


def plan(
    profile: str = "laptop",
    notebook: str = "",
    settings: dict[str, str] | None = None,
    force: bool = False,
    time_limit: float | None = None,
) -> list[Job]:
    """Return the notebooks to run, in the order of their names, all parameters checked.

    profile: smoke, or the name of a file in notebooks/profiles.
    notebook: beginning of a notebook's name, empty for all.
    settings: parameter -> text, for every notebook chosen.
    force: run unchanged notebooks too.
    time_limit: seconds for one notebook, instead of the profile's.
    Raises InvalidInput before anything has run.
    """
    files = sorted(path for path in paths.NOTEBOOKS.glob("*.ipynb") if not path.name.startswith("."))
    names = [path.stem for path in files]
    chosen = [path for path in files if path.stem.startswith(notebook)]
    if not chosen:
        raise InvalidInput(f"no notebook begins with '{notebook}'; the notebooks are {', '.join(names) or 'none'}")
    sizes = load_profile(profile, names)
    part = [path for path in chosen if sizes.values(path.stem) is not None]
    if not part:
        raise InvalidInput(f"{sizes.source} has no entry for {', '.join(path.stem for path in chosen)}")
    limit = time_limit or sizes.time_limit
    return [_job(path, profile, sizes.values(path.stem), sizes.source, settings or {}, force, limit) for path in part]


def run(jobs: list[Job], say: Callable[[str], None]) -> list[NotebookRun]:
    """Run the jobs one after the other and return how each ended; Ctrl-C ends the current one and skips the rest."""
    runs: list[NotebookRun] = []
    with Guard() as guard:
        for number, job in enumerate(jobs, start=1):
            name, place = job.notebook.stem, f"[{number}/{len(jobs)}] {job.notebook.stem}"
            if not job.why:
                say(f"{place}: unchanged, skipped")
                runs.append(NotebookRun(name, "unchanged"))
                continue
            say(f"{place}: running with {job.profile} ({job.why})")
            start = time.monotonic()
            try:
                state, note = "done", _run_one(job, guard, say) or f"results in {_place(job.folder)}"
            except (NotebookFailed, OSError) as error:  # a full disk must not stop the others either
                state, note = "failed", str(error)
            except KeyboardInterrupt:
                state, note = "interrupted", "start it again to continue from the caches"
            runs.append(NotebookRun(name, state, time.monotonic() - start, note))
            say(f"{place}: {state} after {_duration(runs[-1].seconds)}{'; ' + note if note else ''}")
            if state == "interrupted":
                return runs + [NotebookRun(later.notebook.stem, "not reached") for later in jobs[number:]]
    return runs


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = _options(arguments)
    try:
        settings = dict(_setting(text) for text in options.set)
        jobs = plan(options.profile, options.notebook, settings, options.force, options.time_limit)
    except EffnnError as error:
        print(f"nothing was run: {error}", file=sys.stderr)
        return 2
    try:
        runs = run(jobs, _say)
        _say(_summary(runs))
        if any(one.state == "interrupted" for one in runs):
            return 130
        reported = options.no_report or _rebuild_reports()
    except KeyboardInterrupt:  # between two notebooks, or while the reports are made
        print("interrupted; start it again to continue", file=sys.stderr)
        return 130
    return 0 if reported and all(one.state in ("done", "unchanged") for one in runs) else 1


def _job(
    notebook: Path,
    profile: str,
    values: dict[str, object],
    source: str,
    settings: dict[str, str],
    force: bool,
    time_limit: float | None,
) -> Job:
    known = declared(notebook)
    parameters = resolve(notebook.stem, known, values, source) | from_text(notebook.stem, known, settings)
    if parameters.get("profile", profile) != profile:
        raise InvalidInput(f"--set profile={parameters['profile']}: the profile is chosen with --profile")
    if settings and profile in COMMITTED and "profile" in known:
        # results of other parameters than the profile's must not stand in for them, nor enter the ledger
        profile = parameters["profile"] = f"{profile}-set"
    if "interactive" in known and "interactive" not in settings:
        parameters["interactive"] = False  # nobody moves a slider here
    threads = parameters.get("threads", known["threads"].default if "threads" in known else None)
    dependencies = dependencies_of(notebook, parameters, profile)
    job = Job(notebook, profile, parameters, threads, time_limit, dependencies, "forced")
    if force:
        return job
    why = stale_because(read_mark(profile, notebook.stem), dependencies, job.results, job.executed)
    return Job(notebook, profile, parameters, threads, time_limit, dependencies, why)


def _run_one(job: Job, guard: Guard, say: Callable[[str], None]) -> str:
    """Run one notebook and return a note, which may be empty. Raises NotebookFailed."""
    mark_path(job.profile, job.notebook.stem).unlink(missing_ok=True)
    job.folder.mkdir(parents=True, exist_ok=True)
    before = _written_at(job.results)
    temporary = job.folder / f".tmp-{job.notebook.name}"
    bar = sys.stderr.isatty()
    try:
        execute(
            job.notebook,
            temporary,
            job.parameters,
            guard=guard,
            time_limit=job.time_limit,
            threads=job.threads,
            progress_bar=bar,
            on_cell=None if bar else _cell_reporter(job.notebook.stem, say),
        )
        os.replace(temporary, job.executed)
    except NotebookFailed as error:
        failed = paths.CACHE / "failed" / job.profile / job.notebook.name
        if temporary.exists():
            failed.parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary, failed)
        raise NotebookFailed(f"{error}; what it wrote until then: {failed}") from None
    finally:
        temporary.unlink(missing_ok=True)
    if _written_at(job.results) == before:
        return "it wrote no results.json, so it will run again next time"
    write_mark(job.profile, job.notebook.stem, job.dependencies, job.results)
    return ""


def _place(folder: Path) -> str:
    """A folder by its path in the repository."""
    return folder.relative_to(paths.HOME).as_posix() if folder.is_relative_to(paths.HOME) else str(folder)


def _cell_reporter(notebook: str, say: Callable[[str], None]) -> Callable[..., None]:
    last = time.monotonic()

    def report(cell: object, cell_index: int, **_: object) -> None:
        nonlocal last
        now, seconds = time.monotonic(), time.monotonic() - last
        if seconds > QUIET_CELL:
            say(f"  {notebook}: cell {cell_index} took {_duration(seconds)}")
        last = now

    return report


def _rebuild_reports() -> bool:
    from effnn.report.__main__ import main as report

    return all([report([word]) == 0 for word in ("claims", "html")])  # both, even when the first fails


def _written_at(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


def _summary(runs: list[NotebookRun]) -> str:
    width = max(len(one.notebook) for one in runs)
    rows = [
        f"  {one.notebook:<{width}}  {one.state:<11}  {_duration(one.seconds):>12}  {one.note}".rstrip() for one in runs
    ]
    return "\n".join(["summary", *rows])


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


def _say(text: str) -> None:
    print(text, flush=True)


def _setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip().isidentifier():
        raise InvalidInput(f"--set {text}: expected name=value, for example --set seed=1")
    return name.strip(), value


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError("expected a positive number of seconds")
    return seconds


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m effnn.reproduce", description=__doc__.split("\n\n")[0])
    parser.add_argument("--notebook", default="", metavar="01", help="beginning of a notebook's name; default: all")
    parser.add_argument("--profile", default="laptop", help="smoke, or a file of notebooks/profiles; default: laptop")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="one parameter; repeatable")
    parser.add_argument("--force", action="store_true", help="run unchanged notebooks too")
    parser.add_argument("--time-limit", type=_seconds, metavar="S", help="seconds that one notebook may take")
    parser.add_argument("--no-report", action="store_true", help="leave the claims table and report.html as they are")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
