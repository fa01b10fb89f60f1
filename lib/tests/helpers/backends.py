"""The backends that the tests of effnn.comm run over: all that this machine can have, with why it lacks the others."""

import pytest

from effnn.comm import backends

CPU_BACKENDS = [name for name in backends.BACKENDS if "cpu" in backends.DEVICES[name]]


def parameters(names=CPU_BACKENDS):
    """One pytest parameter per backend; those that are not available here are skipped with the reason."""
    found = []
    for name in names:
        reason = backends.unavailable(name, "cpu")
        found.append(pytest.param(name, marks=pytest.mark.skip(reason=f"{name}: {reason}") if reason else ()))
    return found


def need(name):
    """Skip a test where a backend is not available."""
    reason = backends.unavailable(name, "cpu")
    if reason:
        pytest.skip(f"{name}: {reason}")
