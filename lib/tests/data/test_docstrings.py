"""The docstrings of installed packages: read from files, never imported."""

import os
import subprocess
import sys

import pytest

from effnn import paths
from effnn.base import NotAvailable
from effnn.data import docstrings
from effnn.data.corpus import builtin


def test_the_installed_packages_are_found_without_importing_them():
    program = (
        "import sys; from effnn.data import docstrings; names = ('stdlib', 'scipy', 'pandas', 'matplotlib'); "
        "print(len(docstrings.locate(names)), [m for m in names if m in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": str(paths.LIB)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout.split() == ["4", "[]"], done.stderr


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    assert set(docstrings.locate(builtin.PACKAGES)) == {"stdlib", "numpy", "scipy", "pandas", "matplotlib", "sklearn"}
    monkeypatch.setitem(docstrings.DISTRIBUTIONS, "not_here_at_all", "not-here")
    with pytest.raises(NotAvailable, match=r"not_here_at_all, which is not installed: .*\(pip install not-here\)"):
        docstrings.locate(["not_here_at_all"])
