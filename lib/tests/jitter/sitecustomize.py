"""A clock that jitters by up to a factor of three, in every Python that starts with this folder on PYTHONPATH.

`time.perf_counter`, which all our measurements read, runs at a rate between 1 and 3 that changes from reading to
reading and, beside that, every second or so, as on a machine whose other work comes and goes. It never runs backwards,
which the real one does not either. The smoke runs of the notebooks in `make test` use it: nothing that they compute,
check or compare may rest on a measured time.
"""

import random
import time

_SPREAD = 3.0
_SLOW_S = 1.0  # seconds between two changes of the slow part of the rate

_real = time.perf_counter
_draw = random.Random(0)


class _Clock:
    def __init__(self) -> None:
        self.shown = self.last = self.changed = _real()
        self.slow = _draw.random()

    def __call__(self) -> float:
        now = _real()
        if now - self.changed > _SLOW_S:
            self.slow, self.changed = _draw.random(), now
        self.shown += (now - self.last) * _SPREAD ** ((self.slow + _draw.random()) / 2)
        self.last = now
        return self.shown


time.perf_counter = _Clock()
