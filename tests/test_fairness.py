"""Fair shares: the bound on what two may differ by, and that idleness and tricks gain nothing."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.fairness import FairShare
from cluster.types import ServiceClass

weights = st.sampled_from([0.25, 1.0, 3.0, 7.5, 1e6])


@given(
    st.integers(0, 500),
    weights,
    weights,
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 300), st.integers(0, 5)), max_size=120),
)
def test_fair_share_of_two_who_always_wait_differs_by_burst_and_one_charge(
    burst, weight_a, weight_b, history
) -> None:
    share: FairShare[str] = FairShare(burst)
    weight_of = {"a": weight_a, "b": weight_b, "x": 1.0, "y": 2.0}
    served = dict.fromkeys(weight_of, 0)
    share.arrive("a")
    share.arrive("b")
    for pick, num_tokens, move in history:
        # Others come, go and are served meanwhile, entitled or not: it is no affair of these two.
        [share.arrive, share.leave, lambda key: share.charge(key, 50, 1.0)][move % 3](
            "xy"[move % 2]
        )
        entitled = share.entitled()
        key = entitled[pick % len(entitled)]
        share.charge(key, num_tokens, weight_of[key])
        served[key] += num_tokens
        difference = served["a"] / weight_a - served["b"] / weight_b
        largest = 300 / min(weight_a, weight_b)
        assert abs(difference) <= burst + largest + 1e-6
        share.check_invariants()


@given(st.lists(weights, min_size=2, max_size=8), st.integers(0, 1000), st.randoms())
def test_fair_share_lets_nobody_wait_for_ever(weight_of, burst, chance) -> None:
    """Whoever chooses among the entitled, out of spite the one who is furthest ahead."""
    share: FairShare[int] = FairShare(burst)
    for key in range(len(weight_of)):
        share.arrive(key)
    waited = dict.fromkeys(range(len(weight_of)), 0)
    for _ in range(400):
        entitled = share.entitled()
        key = entitled[-1] if chance.random() < 0.8 else chance.choice(entitled)
        share.charge(key, 100 * weight_of[key], weight_of[key])
        waited = {other: 0 if other == key else rounds + 1 for other, rounds in waited.items()}
        # Each other may go ahead by the burst, twice: from behind to before this one.
        bound = (len(weight_of) - 1) * 2 * (burst // 100 + 2)
        assert max(waited.values()) <= bound


moves = st.lists(
    st.tuples(
        st.sampled_from(["charge", "arrive", "leave"]),
        st.sampled_from("abcde"),
        st.integers(0, 1000),
        st.sampled_from([0.5, 1.0, 4.0]),
    ),
    max_size=60,
)


@given(moves, st.integers(0, 1000))
def test_fair_share_follows_the_published_counters(history, burst) -> None:
    """Algorithm 2 of the paper, word for word and without forgetting."""
    share: FairShare[str] = FairShare(burst)
    counters = {key: Fraction(0) for key in "abcde"}
    active: list[str] = []
    level = Fraction(0)
    for move, key, num_tokens, weight in history:
        floor = min((counters[other] for other in active), default=level)
        if move == "charge":
            share.charge(key, num_tokens, weight)
            if key not in active:
                counters[key] = max(counters[key], floor)
            counters[key] += Fraction(num_tokens) / Fraction(weight)
        elif move == "arrive":
            share.arrive(key)
            if key not in active:
                counters[key] = max(counters[key], floor)
                active.append(key)
        else:
            share.leave(key)
            if key in active:
                active.remove(key)
                level = level if active else counters[key]
        floor = min((counters[other] for other in active), default=level)
        order = sorted((counters[other], other) for other in active)
        assert share.entitled() == tuple(other for c, other in order if c <= floor + burst)
        for other, counter in counters.items():
            assert share.lead(other) == max(0, counter - floor)
        assert share.leads() == {other: counters[other] - floor for other in active}
        share.check_invariants()


def test_fair_share_idle_key_saves_up_nothing() -> None:
    share: FairShare[str] = FairShare(10)
    share.arrive("busy")
    share.arrive("idle")
    share.leave("idle")
    share.charge("busy", 10_000, 1)
    share.arrive("idle")
    assert share.lead("idle") == share.lead("busy") == 0


def test_fair_share_leaving_and_coming_back_wipes_nothing_out() -> None:
    share: FairShare[str] = FairShare(10)
    share.arrive("modest")
    share.arrive("greedy")
    share.charge("greedy", 500, 1)
    share.leave("greedy")
    assert share.lead("greedy") == 500
    share.arrive("greedy")
    assert share.entitled() == ("modest",)


def test_fair_share_starts_newcomers_at_the_last_level_when_nobody_waits() -> None:
    share: FairShare[str] = FairShare(10)
    share.arrive("first")
    share.charge("first", 800, 1)
    share.leave("first")
    share.charge("first", 5, 1)  # of what was taken out of the queue before
    share.arrive("second")
    share.arrive("first")
    assert (share.lead("second"), share.lead("first")) == (0, 5)


def test_fair_share_remembers_of_many_idle_keys_those_that_are_most_ahead() -> None:
    share: FairShare[int] = FairShare(0, max_idle_keys=8)
    share.arrive(-1)
    for key in range(1000):
        share.charge(key, 1 + (key * 37) % 1000, 1)
        share.check_invariants()
    leads = {key: share.lead(key) for key in range(1000)}
    known = [key for key, lead in leads.items() if lead > 0]
    assert 0 < len(known) <= 8
    assert max(leads.values()) == 1000
    assert share.entitled() == (-1,)


def test_fair_share_counts_a_token_exactly_after_years_of_them() -> None:
    share: FairShare[str] = FairShare(0)
    share.arrive("heavy")
    share.arrive("light")
    share.charge("light", 1e15, 1)
    share.charge("heavy", 1e15, 1)
    for _ in range(1000):
        share.charge("heavy", 1, 1e6)
    assert share.lead("heavy") == pytest.approx(1e-3, rel=1e-3)


def test_fair_share_breaks_ties_by_the_key() -> None:
    share: FairShare[ServiceClass] = FairShare(0)
    for key in (ServiceClass.STANDARD, ServiceClass.BATCH, ServiceClass.INTERACTIVE):
        share.arrive(key)
    order = (ServiceClass.BATCH, ServiceClass.INTERACTIVE, ServiceClass.STANDARD)
    assert share.entitled() == order


def test_fair_share_gives_weights_their_part_in_two_levels() -> None:
    """As queues use it: a class first, then a tenant in it; batch keeps its weight throughout."""
    chance = random.Random(3)
    weight_of = {ServiceClass.INTERACTIVE: 8.0, ServiceClass.BATCH: 1.0}
    tenants = {"small": 1.0, "large": 3.0}
    classes: FairShare[ServiceClass] = FairShare(1000)
    inside = {name: FairShare[str](1000) for name in weight_of}
    served = {(name, tenant): 0 for name in weight_of for tenant in tenants}
    for name in weight_of:
        classes.arrive(name)
        for tenant in tenants:
            inside[name].arrive(tenant)
    for _ in range(5000):
        name = chance.choice(classes.entitled())
        tenant = chance.choice(inside[name].entitled())
        num_tokens = chance.randint(1, 400)
        classes.charge(name, num_tokens, weight_of[name])
        inside[name].charge(tenant, num_tokens, tenants[tenant])
        served[name, tenant] += num_tokens
    total = sum(served.values())
    for name, weight in weight_of.items():
        for tenant, share in tenants.items():
            expected = weight / 9 * share / 4
            assert served[name, tenant] / total == pytest.approx(expected, rel=0.05)
