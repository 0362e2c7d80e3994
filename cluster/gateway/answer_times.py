"""When what happened to one request: what its client is told of it, and what is counted."""

from __future__ import annotations

from cluster.metrics import Metrics
from cluster.types import SLO


class AnswerTimes:
    """Seconds by the gateway's clock.

    Args:
        arrival_s: Of the request.
    """

    def __init__(self, arrival_s: float) -> None:
        self.arrival_s = arrival_s
        self.queued_s = 0.0  # from arrival until it was first given to a replica
        self.first_token_s = 0.0  # 0: there is none yet
        self._last_token_s = 0.0
        self._cut_cause = ""  # since the last token; empty: none

    def ttft_s(self, now_s: float) -> float:
        """Return the seconds from arrival to the first token, or to now."""
        return (self.first_token_s or now_s) - self.arrival_s

    def on_submit(self, now_s: float) -> None:
        """Note that a replica has got the request."""
        self.queued_s = self.queued_s or now_s - self.arrival_s

    def on_cut(self, cause: str, *, at_s: float = 0.0) -> None:
        """Note that the answer goes on elsewhere; the first cause since the last token counts.

        Args:
            cause: As the metrics name it.
            at_s: When the client has had the last token; 0: as noted.
        """
        self._cut_cause = self._cut_cause or cause
        self._last_token_s = at_s or self._last_token_s

    def on_tokens(self, now_s: float, metrics: Metrics) -> None:
        """Note that tokens came; the first ones behind a cut end a gap."""
        if self._cut_cause:
            metrics.resumptions.labels(self._cut_cause).inc()
            if self._last_token_s:
                metrics.gap.labels(self._cut_cause).observe(now_s - self._last_token_s)
            self._cut_cause = ""
        self.first_token_s = self.first_token_s or now_s
        self._last_token_s = now_s

    def observe(self, metrics: Metrics, slo: SLO, *, num_tokens: int, now_s: float) -> bool:
        """Count the latencies of a finished answer; return whether the objective was kept."""
        ttft_s, total_s = self.ttft_s(now_s), now_s - self.arrival_s
        metrics.ttft.observe(ttft_s)
        metrics.duration.observe(total_s)
        is_kept = True
        if slo.ttft_s is not None:
            is_kept = ttft_s <= slo.ttft_s
            metrics.slo.labels("ttft", str(is_kept).lower()).inc()
        if num_tokens > 1:
            tpot_s = (total_s - ttft_s) / (num_tokens - 1)
            metrics.tpot.observe(tpot_s)
            if slo.tpot_s is not None:
                is_met = tpot_s <= slo.tpot_s
                is_kept &= is_met
                metrics.slo.labels("tpot", str(is_met).lower()).inc()
        return is_kept
