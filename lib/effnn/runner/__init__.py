"""The parts of `effnn.reproduce`: checked parameters, what makes a notebook stale, and a kernel that
ends with the runner."""

from effnn.runner.kernel import Guard, NotebookFailed, execute
from effnn.runner.parameters import Parameter, declared, from_text, resolve
from effnn.runner.profiles import Profile, load_profile
from effnn.runner.staleness import dependencies_of, read_mark, stale_because, write_mark

__all__ = [
    "Guard",
    "NotebookFailed",
    "Parameter",
    "Profile",
    "declared",
    "execute",
    "from_text",
    "dependencies_of",
    "load_profile",
    "read_mark",
    "resolve",
    "stale_because",
    "write_mark",
]
