"""Which worker does what, and what it reserves.

Workers are numbered stage by stage, so that the ranks of one tensor-parallel group are neighbours:

    index      0        1        2        3          of a 2x2 group (tp=2, pp=2)
    pp_rank    0        0        1        1
    tp_rank    0        1        0        1
    bundle     1        2        3        4          bundle 0 is the leader's
"""

from __future__ import annotations

from cluster.config import ClusterConfig, ParallelConfig
from cluster.errors import ConfigError

LEADER_NUM_CPUS = 0.1  # it schedules and moves tokens; the workers compute


def ranks_of(index: int, tp: int) -> tuple[int, int]:
    """Return (pp_rank, tp_rank) of a worker."""
    return divmod(index, tp)


def leader_num_cpus(parallel: ParallelConfig) -> float:
    """Return the logical CPUs of a leader; a group of one computes in its leader."""
    return parallel.num_cpus_per_worker if parallel.world_size == 1 else LEADER_NUM_CPUS


def group_num_cpus(parallel: ParallelConfig) -> float:
    """Return the logical CPUs of a whole group."""
    workers = 0 if parallel.world_size == 1 else parallel.world_size
    return leader_num_cpus(parallel) + workers * parallel.num_cpus_per_worker


def bundles(parallel: ParallelConfig) -> list[dict[str, float]] | None:
    """Return the placement group's bundles, the leader's first; None for a group of one."""
    if parallel.world_size == 1:
        return None
    worker = {"CPU": max(parallel.num_cpus_per_worker, 0.001)}  # Ray refuses an empty bundle
    if parallel.num_gpus_per_worker:
        worker["GPU"] = parallel.num_gpus_per_worker
    return [{"CPU": LEADER_NUM_CPUS}, *(dict(worker) for _ in range(parallel.world_size))]


def threads_per_worker(parallel: ParallelConfig, num_cores: int, num_groups: int) -> int:
    """Return how many threads a worker computes with, at least one.

    Args:
        parallel: The layout; `threads_per_worker` set there wins.
        num_cores: Of the machine.
        num_groups: Replica groups that share the machine.
    """
    if parallel.threads_per_worker:
        return parallel.threads_per_worker
    return max(1, num_cores // (num_groups * parallel.world_size))


def check_devices(config: ClusterConfig) -> None:
    """Return if what is reserved with Ray is what the workers compute on.

    Raises:
        ConfigError: `field` is ``parallel.num_gpus_per_worker``.
    """
    parallel, device = config.parallel, config.model.device
    num_gpus = parallel.num_gpus_per_worker
    if device == "cpu" and num_gpus > 0:
        problem = "reserves GPUs on which nothing is computed: use 0, or model.device=cuda"
    elif device == "cuda" and num_gpus == 0:
        problem = "hides every GPU from the workers: reserve 1, or use model.device=cpu"
    elif device == "cuda" and num_gpus > 1:
        problem = "limit=1: a worker computes on one GPU; raise parallel.tp for more"
    elif device == "cuda" and parallel.world_size > 1 and num_gpus < 1:
        problem = "NCCL wants a GPU for each rank of a group: use 1"
    else:
        return
    raise ConfigError(
        f"parallel.num_gpus_per_worker={num_gpus:g} with model.device={device}, "
        f"parallel.tp={parallel.tp}, parallel.pp={parallel.pp}: {problem}",
        field="parallel.num_gpus_per_worker",
    )
