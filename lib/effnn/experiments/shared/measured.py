"""What one benchmark gives back."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Measured:
    """The runs of one key.

    runs: the ratio of every round.
    load: load average at the start of each.
    seconds: name -> seconds of every round.
    threads: torch's threads in this process.
    note: what a reader should know, in words.
    details: other figures worth keeping, such as peak memory in bytes. A detail whose name ends in `_over_bound` is
        held to at most 1: the key meets its bar only if this one does too.
    """

    runs: tuple[float, ...]
    load: tuple[float, ...]
    seconds: dict[str, tuple[float, ...]]
    threads: int
    note: str = ""
    details: dict[str, float] = field(default_factory=dict)

    def within_bounds(self) -> bool:
        """Whether every detail that has a bound keeps it."""
        return all(value <= 1 for name, value in self.details.items() if name.endswith("_over_bound"))
