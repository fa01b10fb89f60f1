"""What one benchmark gives back."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Measured:
    """runs: the ratio of every round. load: load average at the start of each. seconds: name -> seconds of every round.

    threads: torch's threads in this process. details: other figures worth keeping, such as peak memory in bytes.
    """

    runs: tuple[float, ...]
    load: tuple[float, ...]
    seconds: dict[str, tuple[float, ...]]
    threads: int
    note: str = ""
    details: dict[str, float] = field(default_factory=dict)
