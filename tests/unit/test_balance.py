"""Balancers are fair by weight, prefer the idle, and never give a host that takes no new connections."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshbpf.model import Balance
from meshbpf.policy.balance import Host, balancer

WEIGHTS = st.lists(st.integers(0, 20), min_size=1, max_size=8)
KINDS = st.sampled_from(list(Balance))


def hosts_of(weights: list[int]) -> list[Host]:
    return [Host("127.0.0.1", 1000 + index, weight) for index, weight in enumerate(weights)]


@given(kind=KINDS, weights=WEIGHTS, draining=st.sets(st.integers(0, 7)), seed=st.integers())
def test_only_ready_hosts_are_given(kind: Balance, weights: list[int], draining: set[int], seed: int) -> None:
    hosts = hosts_of(weights)
    for index in draining:
        if index < len(hosts):
            hosts[index].draining = True
    usable = [host for host in hosts if host.weight and not host.draining]
    rnd = random.Random(seed).random
    choose = balancer(kind, hosts)
    for _ in range(50):
        assert (host := choose.pick(rnd)) in usable or (host is None and not usable)


@given(kind=KINDS, weights=WEIGHTS, seed=st.integers())
def test_the_excluded_host_is_given_to_nobody(kind: Balance, weights: list[int], seed: int) -> None:
    hosts = hosts_of(weights)
    usable = [host for host in hosts if host.weight]
    rnd = random.Random(seed).random
    choose = balancer(kind, hosts)
    for _ in range(30):
        excluded = one_of(usable, rnd)
        host = choose.pick(rnd, excluded)
        assert host is None if len(usable) < 2 else host is not excluded
        assert host is None or host in usable


def one_of(hosts: list[Host], rnd: Callable[[], float]) -> Host | None:
    return hosts[int(rnd() * len(hosts))] if hosts else None


@given(weights=WEIGHTS, seed=st.integers())
def test_round_robin_keeps_the_weights_within_one_turn_each(weights: list[int], seed: int) -> None:
    hosts = hosts_of(weights)
    total = sum(weights)
    if total == 0:
        return
    choose = balancer(Balance.ROUND_ROBIN, hosts)
    rnd = random.Random(seed).random
    equal = len({weight for weight in weights if weight}) == 1
    turns = 3 * (sum(1 for weight in weights if weight) if equal else total)
    given_ = Counter(choose.pick(rnd) for _ in range(turns))
    for host in hosts:
        share = turns * (bool(host.weight) / sum(map(bool, weights)) if equal else host.weight / total)
        assert abs(given_[host] - share) <= 2


def test_round_robin_is_smooth() -> None:
    hosts = hosts_of([5, 1, 1])
    choose = balancer(Balance.ROUND_ROBIN, hosts)
    rnd = random.Random(7).random
    order = [choose.pick(rnd) for _ in range(70)]
    runs = "".join("a" if host is hosts[0] else " " for host in order).split()
    assert max(map(len, runs)) <= 6
    light = [index for index, host in enumerate(order) if host is hosts[1]]
    assert max(after - before for before, after in pairwise(light)) <= 9


def test_least_request_takes_the_less_busy_of_two_draws() -> None:
    hosts = hosts_of([100, 100])
    hosts[0].active = 3
    choose = balancer(Balance.LEAST_REQUEST, hosts)
    rnd = random.Random(1).random
    assert {choose.pick(rnd) for _ in range(20)} == {hosts[1]}


def test_least_request_spreads_evenly_when_all_are_idle() -> None:
    hosts = hosts_of([100] * 4)
    choose = balancer(Balance.LEAST_REQUEST, hosts)
    rnd = random.Random(1).random
    given_ = Counter(choose.pick(rnd) for _ in range(4000))
    assert all(850 < given_[host] < 1150 for host in hosts)


def test_least_request_with_unequal_weights_counts_weight_by_load() -> None:
    hosts = hosts_of([300, 100])
    choose = balancer(Balance.LEAST_REQUEST, hosts)
    rnd = random.Random(1).random
    assert Counter(choose.pick(rnd) for _ in range(400))[hosts[0]] == pytest.approx(300, abs=3)
    hosts[0].active = 8  # 300 / 9 is a third of 100
    assert Counter(choose.pick(rnd) for _ in range(400))[hosts[0]] == pytest.approx(100, abs=4)


def test_random_follows_the_weights() -> None:
    hosts = hosts_of([30, 10, 0])
    choose = balancer(Balance.RANDOM, hosts)
    rnd = random.Random(1).random
    given_ = Counter(choose.pick(rnd) for _ in range(4000))
    assert given_[hosts[0]] == pytest.approx(3000, abs=120)
    assert given_[hosts[2]] == 0


def test_a_draw_at_the_upper_end_stays_inside() -> None:
    hosts = hosts_of([1, 2])
    assert balancer(Balance.RANDOM, hosts).pick(lambda: 1 - 2**-53) is hosts[1]
