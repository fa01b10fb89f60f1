"""The parts of `effnn.reproduce`: checked parameters, the inputs of a notebook, and a kernel that cannot leak."""

from effnn.runner.kernel import Guard, NotebookFailed, execute
from effnn.runner.parameters import Parameter, declared, from_text, resolve
from effnn.runner.profiles import Profile, load_profile
from effnn.runner.staleness import inputs_of, read_mark, stale_because, write_mark

__all__ = [
    "Guard",
    "NotebookFailed",
    "Parameter",
    "Profile",
    "declared",
    "execute",
    "from_text",
    "inputs_of",
    "load_profile",
    "read_mark",
    "resolve",
    "stale_because",
    "write_mark",
]
