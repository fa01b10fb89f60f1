"""What a worker says of its clock."""


def clock_of(_: int) -> str:
    import time

    return type(time.perf_counter).__name__
