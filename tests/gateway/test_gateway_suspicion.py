"""Who is convicted of killing replicas, and who is not."""

from __future__ import annotations

import pytest

from cluster.errors import PoisonError
from cluster.gateway.suspicion import Suspicion


def test_first_loss_convicts_nobody() -> None:
    suspicion = Suspicion()
    suspicion.on_lost(gave_token=False, is_alone=True)
    assert suspicion.num_blank == 1 and not suspicion.needs_trial


def test_second_loss_without_a_token_convicts_who_was_alone() -> None:
    suspicion = Suspicion()
    suspicion.on_lost(gave_token=True, is_alone=False)
    with pytest.raises(PoisonError, match="2 replicas died") as caught:
        suspicion.on_lost(gave_token=False, is_alone=True)
    assert caught.value.reason == "POISONOUS_REQUEST"


def test_token_acquits() -> None:
    suspicion = Suspicion()
    for _ in range(10):
        suspicion.on_lost(gave_token=False, is_alone=True)
        suspicion.on_token()
    assert suspicion.num_blank == 0 and not suspicion.needs_trial


def test_second_loss_with_others_leads_to_a_trial() -> None:
    suspicion = Suspicion()
    suspicion.on_lost(gave_token=False, is_alone=False)
    suspicion.on_lost(gave_token=False, is_alone=False)
    assert suspicion.needs_trial
    with pytest.raises(PoisonError):
        suspicion.on_lost(gave_token=False, is_alone=False)


def test_bystander_is_acquitted_by_its_trial() -> None:
    suspicion = Suspicion()
    suspicion.on_lost(gave_token=False, is_alone=False)
    suspicion.on_lost(gave_token=False, is_alone=False)
    suspicion.on_token()
    assert not suspicion.needs_trial
    suspicion.on_lost(gave_token=False, is_alone=True)  # of another cause, much later
    assert not suspicion.needs_trial


def test_replicas_in_a_row_without_a_token_are_counted() -> None:
    suspicion = Suspicion()
    suspicion.on_lost(gave_token=True, is_alone=False)
    assert suspicion.num_blank == 0
    suspicion.on_lost(gave_token=False, is_alone=False)
    assert suspicion.num_blank == 1
    suspicion.on_token()
    assert suspicion.num_blank == 0
