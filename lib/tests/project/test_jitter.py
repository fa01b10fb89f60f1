"""The clock that jitters: within its bounds, never backwards, and in every process that a notebook starts.

`make test` runs the notebooks on it (Makefile), so what they compute, check and compare rests on no measured time.
"""

import os
import re
import subprocess
import sys

from effnn import paths

JITTER = paths.TESTS / "jitter"


def under_jitter(code: str) -> list[str]:
    """What this code prints, line by line, in a Python with the jittering clock."""
    path = os.pathsep.join([str(JITTER), str(paths.TESTS), str(paths.LIB)])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_reading_is_off_by_a_factor_of_one_to_three_and_never_goes_back():
    lines = under_jitter(
        "import time\n"
        "for _ in range(200):\n"
        "    a, b = time.monotonic(), time.perf_counter()\n"
        "    time.sleep(0.005)\n"
        "    c, d = time.perf_counter(), time.monotonic()\n"
        "    print((c - b) / (d - a), (c - b) / 0.005)\n"
    )
    ratios = [tuple(map(float, line.split())) for line in lines]
    # the real interval lies between the sleep and the two readings around it
    assert all(least <= 3.01 and most >= 0.99 for least, most in ratios)
    seen = [least for least, _ in ratios]
    assert max(seen) > 1.5 * min(seen)


def test_equal_work_is_not_told_apart_by_it():
    (line,) = under_jitter(
        "import time\n"
        "from effnn.base import interleave\n"
        "work = {name: lambda: time.sleep(0.002) for name in 'ab'}\n"
        "print(*(ratio > 1 for ratio in (lambda t: t['a'].over(t['b']))(interleave(work, rounds=40))))\n"
    )
    assert {"True", "False"} == set(line.split())  # a longer run may take less time by the clock


def test_workers_have_it_too():
    lines = under_jitter(
        "from effnn.comm import launch\n"
        "from effnn.experiments.shared import pool\n"
        "from workers import clocks\n"
        "if __name__ == '__main__':\n"
        "    print(*pool.run_jobs(clocks.clock_of, [(1,), (2,)], 'jobs', workers=2))\n"
        "    print(*launch.run('workers.clocks:clock_of', 2, 'gloo', args=(1,), timeout=100))\n"
    )
    assert [line.split() for line in lines] == [["_Clock"] * 2] * 2


def test_make_test_runs_the_notebooks_on_it():
    recipe = (paths.HOME / "Makefile").read_text()
    command = re.search(r"OMP_NUM_THREADS=1[^\n]*\\\n[^\n]*--nbval-lax[^\n]*", recipe).group()
    assert 'PYTHONPATH="$(CURDIR)/lib/tests/jitter"' in command
