"""One line of JSON per request of a run, for whoever wants to look further than its figures."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.bench.statistics import NO_OBJECTIVE, RequestRecord
from cluster.errors import ConfigError


def record_figures(record: RequestRecord) -> dict[str, Any]:
    """Return a record as plain data; times are seconds since the start of the run."""
    objective = record.objective or NO_OBJECTIVE
    return {
        "request_id": record.request_id,
        "service_class": record.service_class,
        "arrived_s": record.scheduled_s,
        "ended_s": record.end_s,
        "end": record.status,
        "ttft_s": record.ttft_s,
        "tpot_s": record.tpot_s,
        "num_output_tokens": record.num_tokens,
        "num_prompt_tokens": record.num_prompt_tokens,
        "num_cached_tokens": record.num_cached_tokens,
        "ttft_slo_s": _finite(objective.ttft_s),
        "tpot_slo_s": _finite(objective.tpot_s),
        "meets_slo": objective.is_met(record),
        "reason": record.reason,
        "retry_after_s": record.retry_after_s,
    }


def write_records(records: Sequence[RequestRecord], path: Path) -> None:
    """Write the records in the order in which their requests were due.

    Raises:
        ConfigError: The file cannot be written.
    """
    ordered = sorted(records, key=lambda record: record.scheduled_s)
    lines = [json.dumps(record_figures(record), allow_nan=False) + "\n" for record in ordered]
    try:
        path.write_text("".join(lines))
    except OSError as error:
        raise ConfigError(
            f"--records {path}: {error.strerror}: give another file", field="records"
        ) from error


def _finite(bound_s: float) -> float | None:
    return None if bound_s == math.inf else bound_s
