"""The alpha-beta model: against times measured on emulated nodes, its own formulas by hand, and nonsense refused."""

import math

import pytest

from effnn.base import InvalidInput
from effnn.comm.emulation.link_model import Link, exposed_ms, link_bytes, overlapped_ms, ring_ms

GRADIENTS = 11.13e6  # bytes of a network of 2.78 million parameters in fp32
FREE = {"alpha_ms": 0.0, "efficiency": 1.0}


@pytest.mark.parametrize(
    ("rate_mbit", "world_size", "nodes", "expected_ms"),
    [(1000, 2, 2, 93), (200, 2, 2, 465), (50, 2, 2, 1858), (200, 4, 2, 698)],
)
def test_the_ring_takes_what_the_design_computed(rate_mbit, world_size, nodes, expected_ms):
    assert ring_ms(GRADIENTS, world_size, Link(rate_mbit), nodes) == pytest.approx(expected_ms, rel=0.015)


@pytest.mark.parametrize(
    ("rate_mbit", "world_size", "measured_ms"), [(1000, 2, 106), (200, 2, 517), (50, 2, 1944), (200, 4, 749)]
)
def test_the_ring_is_near_what_was_measured_on_emulated_nodes(rate_mbit, world_size, measured_ms):
    assert ring_ms(GRADIENTS, world_size, Link(rate_mbit), nodes=2) == pytest.approx(measured_ms, rel=0.15)


def test_each_node_sends_what_the_ring_sends():
    assert link_bytes(GRADIENTS, 2) == pytest.approx(GRADIENTS)
    assert link_bytes(1000, 4) == 1500
    assert link_bytes(1000, 4, nodes=2) == 1500, "the ring leaves a node once, whatever ranks it holds"
    assert link_bytes(1000, 4, nodes=1) == 0
    assert link_bytes(1000, 1) == 0


def test_alpha_counts_each_of_the_steps():
    link = Link(100, alpha_ms=0.5, efficiency=1.0)
    assert ring_ms(0, 5, link) == 2 * 4 * 0.5
    assert ring_ms(100_000, 2, link) == pytest.approx(8 + 1)
    assert ring_ms(100_000, 1, link) == 0
    assert ring_ms(100_000, 2, link, nodes=1) == 1, "on one node the link is not used"


def test_efficiency_is_the_share_that_is_payload():
    assert ring_ms(1e6, 2, Link(100, 0.0)) == pytest.approx(80 / 0.957)


def test_buckets_wait_for_the_link_and_for_their_gradients():
    link = Link(8, **FREE)  # 1 byte takes 1 microsecond
    assert overlapped_ms([(10, 5000)], 2, link) == pytest.approx(15)
    assert overlapped_ms([(10, 5000), (12, 5000)], 2, link) == pytest.approx(20), "the second waits for the link"
    assert overlapped_ms([(10, 5000), (30, 5000)], 2, link) == pytest.approx(35), "the link waits for the second"
    assert exposed_ms([(10, 5000), (12, 5000)], 2, link) == pytest.approx(8)
    assert exposed_ms([(10, 5000), (30, 5000)], 2, link) == pytest.approx(5), "the first is hidden"


def test_one_bucket_at_the_end_hides_nothing():
    link = Link(200)
    assert exposed_ms([(120, GRADIENTS)], 2, link) == pytest.approx(ring_ms(GRADIENTS, 2, link))


def test_many_buckets_hide_most_where_the_link_keeps_up():
    buckets = [(20 * i, GRADIENTS / 6) for i in range(1, 7)]
    fast, slow = Link(1000), Link(50)
    assert exposed_ms(buckets, 2, fast) == pytest.approx(ring_ms(GRADIENTS / 6, 2, fast))
    ring = ring_ms(GRADIENTS, 2, slow)
    assert exposed_ms(buckets, 2, slow) == pytest.approx(ring - 100, abs=1), "all but the time since the first bucket"


def test_the_fixed_cost_is_added_once():
    """5 and 10 percent of the gradients at 200 Mbit/s: 4 and 7 ms computed, 19 and 22 with the hook's 15 ms."""
    buckets = [(0, 1e5), (50, 1e5)]
    link = Link(200)
    assert exposed_ms(buckets, 2, link, fixed_ms=15) == pytest.approx(exposed_ms(buckets, 2, link) + 15)
    assert overlapped_ms(buckets, 2, link, fixed_ms=15) == pytest.approx(overlapped_ms(buckets, 2, link) + 15)


@pytest.mark.parametrize("call", [overlapped_ms, exposed_ms])
def test_nodes_reach_the_ring(call):
    assert call([(0, 1e6)], 4, Link(100), nodes=1) == pytest.approx(6 * 0.05)
    assert call([(0, 1e6)], 4, Link(100), nodes=2) == pytest.approx(ring_ms(1e6, 4, Link(100)))


@pytest.mark.parametrize(
    "arguments",
    [
        {"rate_mbit": 0},
        {"rate_mbit": -1},
        {"rate_mbit": math.inf},
        {"rate_mbit": math.nan},
        {"rate_mbit": 1, "alpha_ms": -0.1},
        {"rate_mbit": 1, "alpha_ms": math.nan},
        {"rate_mbit": 1, "efficiency": 0},
        {"rate_mbit": 1, "efficiency": 1.1},
    ],
)
def test_links_that_make_no_sense(arguments):
    with pytest.raises(InvalidInput):
        Link(**arguments)


@pytest.mark.parametrize(
    ("nbytes", "world_size", "nodes"),
    [(-1, 2, None), (math.nan, 2, None), (math.inf, 2, None), (1, 0, None), (1, 2, 0), (1, 2, 3)],
)
def test_rings_that_make_no_sense(nbytes, world_size, nodes):
    with pytest.raises(InvalidInput):
        ring_ms(nbytes, world_size, Link(100), nodes)


@pytest.mark.parametrize("buckets", [[], [(-1, 10)], [(math.nan, 10)], [(math.inf, 10)], [(0, -10)]])
def test_buckets_that_make_no_sense(buckets):
    with pytest.raises(InvalidInput):
        exposed_ms(buckets, 2, Link(100))


def test_a_fixed_cost_that_makes_no_sense():
    with pytest.raises(InvalidInput, match="fixed_ms"):
        overlapped_ms([(0, 1)], 2, Link(100), fixed_ms=-1)
