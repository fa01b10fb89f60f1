"""The ranks that tests of effnn.comm share end with the last of them."""

import pytest
from helpers import crew


@pytest.fixture(scope="session", autouse=True)
def _ranks_are_let_go():
    yield
    crew.let_go()
