"""Independent jobs in processes of their own."""

import os

import pytest
from workers import jobs

from effnn.base import InvalidInput
from effnn.experiments.shared import pool


def test_jobs_run_in_processes_and_keep_their_order():
    assert pool.run_jobs(jobs.square, [(3,), (1,), (2,)], "squares", workers=2) == [(9, 1), (1, 1), (4, 1)]
    assert pool.run_jobs(jobs.square, [], "none") == []
    with pytest.raises(InvalidInput, match="negative"):
        pool.run_jobs(jobs.square, [(1,), (-1,)], "squares", workers=2)


def test_only_the_parent_shows_a_bar():
    before = os.environ.get("TQDM_DISABLE")
    assert pool.run_jobs(jobs.bar_is_silent, [(1,), (2,)], "jobs", workers=2) == [True, True]
    assert os.environ.get("TQDM_DISABLE") == before
