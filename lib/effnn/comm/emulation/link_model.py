"""How long a ring all-reduce takes over a link, computed: the alpha-beta model with overlap of gradient buckets.

It serves where nodes cannot be emulated (network.py), and beside them as the expectation. What it returns is computed,
and a result that uses it must say so. Held against emulated nodes (2 nodes, 50 and 200 Mbit/s) it came within 11
percent where bytes decide, as a rule below what was measured: acknowledgements and repeated packets use the link as
well. It knows nothing of the work of a comm hook, which fixed_ms adds once it was measured.

The model: Hockney, "The communication challenge for MPP" (1994): a message of n bytes takes alpha + n / rate. The ring:
Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations" (2009).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from effnn.base import InvalidInput

# Of 1514 bytes that Ethernet carries 1448 are the program's: the rest are headers of Ethernet, IP and TCP (with its
# time stamp). 1448 / 1514 = 0.956; 0.957 fits sockets measured at 50, 200 and 1000 Mbit/s.
TCP_EFFICIENCY = 0.957


@dataclass(frozen=True)
class Link:
    """What a node may send. rate_mbit: Mbit/s on the wire; efficiency: share of it that is payload.

    alpha_ms: what each step of the ring costs beside its bytes. 0.05 ms is waking a process on another core and passing
    two TCP stacks: gloo reduces 4 bytes in 0.10 ms between 2 ranks (2 steps) and in 0.30 ms among 4 (6 steps) on
    emulated nodes. A real switch and its cables add a few hundredths. It matters for messages of the size that the link
    passes in that time (about 1 kB at 200 Mbit/s).
    """

    rate_mbit: float
    alpha_ms: float = 0.05
    efficiency: float = TCP_EFFICIENCY

    def __post_init__(self) -> None:
        if not 0 < self.rate_mbit < math.inf:
            raise InvalidInput(f"rate_mbit is {self.rate_mbit}: give the link's Mbit/s, above 0")
        if not 0 <= self.alpha_ms < math.inf:
            raise InvalidInput(f"alpha_ms is {self.alpha_ms}: give the milliseconds of one message, 0 or more")
        if not 0 < self.efficiency <= 1:
            raise InvalidInput(f"efficiency is {self.efficiency}: give the share of the rate that is payload, up to 1")

    def send_ms(self, nbytes: float) -> float:
        """Return the milliseconds that the bytes of one or more messages take, without alpha."""
        return nbytes * 8e-3 / (self.rate_mbit * self.efficiency)


def link_bytes(nbytes: float, world_size: int, nodes: int | None = None) -> float:
    """Return the bytes that each node sends over its link in a ring all-reduce of nbytes: 2 (W - 1) / W of them.

    world_size: W, the ranks; nodes: how many nodes they are on, consecutive ranks together (None: each on its own).
    With several ranks in a node the ring leaves the node once, so the count is that of one rank, and W is still the
    number of ranks: 4 ranks on 2 nodes send 1.5 times nbytes. On one node the link is not used: 0.
    """
    nodes = world_size if nodes is None else nodes
    if world_size < 1 or not 1 <= nodes <= world_size:
        raise InvalidInput(f"world_size is {world_size} and nodes {nodes}: give 1 <= nodes <= world_size")
    if not 0 <= nbytes < math.inf:
        raise InvalidInput(f"nbytes is {nbytes}: give the bytes to reduce, 0 or more")
    return 2 * (world_size - 1) / world_size * nbytes if nodes > 1 else 0.0


def ring_ms(nbytes: float, world_size: int, link: Link, nodes: int | None = None) -> float:
    """Return the milliseconds of a ring all-reduce of nbytes per rank (computed).

    2 (W - 1) / W * nbytes over the link, plus 2 (W - 1) alpha: the ring takes 2 (W - 1) steps, and every step waits for
    the slowest neighbours, those joined by the link. Traffic within a node counts as free. nodes: as in link_bytes.
    """
    return link.send_ms(link_bytes(nbytes, world_size, nodes)) + 2 * (world_size - 1) * link.alpha_ms


def overlapped_ms(
    buckets: Sequence[tuple[float, float]],
    world_size: int,
    link: Link,
    fixed_ms: float = 0.0,
    nodes: int | None = None,
) -> float:
    """Return the time in ms at which the all-reduce of the last bucket ends (computed), counted like the ready times.

    buckets: (ready_ms, nbytes) in the order of their all-reduces, which share the link one after the other, as DDP
      issues them during the backward pass.
    world_size, nodes: as in link_bytes.
    link: between the nodes.
    fixed_ms: cost per step that is not the wire's (a comm hook's own work, as measured on an unshaped link), added
      once.
    """
    if not buckets or not all(0 <= ready < math.inf for ready, _ in buckets):
        raise InvalidInput("buckets: give at least one (ready_ms, nbytes), with times of 0 or more")
    if not 0 <= fixed_ms < math.inf:
        raise InvalidInput(f"fixed_ms is {fixed_ms}: give the milliseconds, 0 or more")
    end = 0.0
    for ready, nbytes in buckets:
        end = max(end, ready) + ring_ms(nbytes, world_size, link, nodes)
    return end + fixed_ms


def exposed_ms(
    buckets: Sequence[tuple[float, float]],
    world_size: int,
    link: Link,
    fixed_ms: float = 0.0,
    nodes: int | None = None,
) -> float:
    """Return the communication in ms that the computation does not hide (computed): by how much a step takes longer.

    That is overlapped_ms minus the time at which the last bucket is ready; arguments and errors as there.
    """
    return overlapped_ms(buckets, world_size, link, fixed_ms, nodes) - max(ready for ready, _ in buckets)
