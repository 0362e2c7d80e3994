"""Who is convicted of killing replicas, and who is not."""

from __future__ import annotations

import pytest

from cluster.errors import PoisonError
from cluster.gateway.suspicion import Suspicion


def test_first_loss_convicts_nobody() -> None:
    suspicion = Suspicion()
    suspicion.on_lost(num_suspects=1)
    assert suspicion.is_suspect and not suspicion.needs_trial


def test_second_loss_without_a_token_convicts_who_was_alone() -> None:
    suspicion = Suspicion()
    suspicion.on_lost(num_suspects=7)
    with pytest.raises(PoisonError, match="2 replicas died") as caught:
        suspicion.on_lost(num_suspects=1)
    assert caught.value.reason == "POISONOUS_REQUEST"


def test_token_acquits() -> None:
    suspicion = Suspicion()
    for _ in range(10):
        suspicion.on_lost(num_suspects=1)
        suspicion.on_token()
    assert not suspicion.is_suspect


def test_second_loss_with_others_leads_to_a_trial() -> None:
    suspicion = Suspicion()
    suspicion.on_lost(num_suspects=2)
    suspicion.on_lost(num_suspects=2)
    assert suspicion.needs_trial
    with pytest.raises(PoisonError):
        suspicion.on_lost(num_suspects=3)


def test_bystander_is_acquitted_by_its_trial() -> None:
    suspicion = Suspicion()
    suspicion.on_lost(num_suspects=2)
    suspicion.on_lost(num_suspects=2)
    suspicion.on_token()
    assert not suspicion.needs_trial
    suspicion.on_lost(num_suspects=1)  # of another cause, much later
    assert not suspicion.needs_trial
