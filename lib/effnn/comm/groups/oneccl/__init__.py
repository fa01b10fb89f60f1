"""oneCCL: the process group over it, its C API, and how it waits and fails."""
