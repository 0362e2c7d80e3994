"""The scaling policy against a virtual time line."""

from hypothesis import given
from hypothesis import strategies as st

from cluster.autoscaler.actuator import ServePolicy, scaling_options
from cluster.autoscaler.policy import ScalingPolicy
from cluster.config import AutoscalingConfig, ClusterConfig, ReplicaConfig

CONFIG = AutoscalingConfig(
    min_replicas=1, max_replicas=3, target_load=4, upscale_delay_s=2, downscale_delay_s=6
)


def run(config: AutoscalingConfig, loads: list[float]) -> list[int]:
    """One decision a second; the groups follow at once."""
    policy, groups, history = ScalingPolicy(config), config.min_replicas, []
    for second, load in enumerate(loads):
        groups = policy.decide(float(second), groups, load)
        history.append(groups)
    return history


def test_policy_wants_enough_groups_for_the_load_within_the_bounds() -> None:
    policy = ScalingPolicy(CONFIG)
    assert [policy.wanted(load) for load in (0, 1, 4, 4.1, 8, 9, 100)] == [1, 1, 1, 2, 2, 3, 3]


def test_policy_grows_only_after_the_load_has_lasted() -> None:
    assert run(CONFIG, [0, 0, 0, 12, 12, 12, 12]) == [1, 1, 1, 1, 1, 3, 3]


def test_policy_ignores_a_spike() -> None:
    assert run(CONFIG, [0, 0, 0, 12, 0, 0, 12, 0]) == [1] * 8


def test_policy_shrinks_only_after_the_lull_has_lasted() -> None:
    history = run(CONFIG, [12] * 5 + [0] * 8)
    assert history[4] == 3
    assert history[5:10] == [3] * 5
    assert history[-1] == 1


def test_policy_does_not_shrink_when_the_load_comes_back() -> None:
    assert set(run(CONFIG, [12] * 5 + [0, 0, 0, 12, 0, 0, 0, 12])[4:]) == {3}


@given(st.lists(st.floats(0, 1000), max_size=60))
def test_policy_stays_within_its_bounds_and_never_grows_while_idle(loads: list[float]) -> None:
    history = run(CONFIG, loads)
    assert all(1 <= groups <= 3 for groups in history)
    for before, groups, load in zip(history, history[1:], loads[1:], strict=False):
        assert groups <= before or load > CONFIG.target_load


class FakeContext:
    """What Serve's controller passes."""

    def __init__(self, now_s: float, target: int, loads: dict[str, float]) -> None:
        point = type("Point", (), {})
        self.raw_metrics = {"load": {}}
        for replica, load in loads.items():
            sample = point()
            sample.value = load
            self.raw_metrics["load"][replica] = [sample]
        self.running_replicas = [replica for replica in loads if replica != "gone"]
        self.target_num_replicas = target
        self.current_time = now_s


def test_serve_policy_adds_the_newest_load_of_running_replicas() -> None:
    policy = ServePolicy(**CONFIG.model_dump())
    policy(FakeContext(0.0, 1, {"a": 8.0, "gone": 100.0}))
    target, _ = policy(FakeContext(2.0, 1, {"a": 8.0, "gone": 100.0}))
    assert target == 2


def test_scaling_options_are_fixed_or_autoscaled() -> None:
    fixed = ClusterConfig(replica=ReplicaConfig(num_replicas=2))
    assert scaling_options(fixed) == {"num_replicas": 2}
    scaled = ClusterConfig(replica=ReplicaConfig(autoscaling=CONFIG))
    assert scaling_options(scaled)["autoscaling_config"]["max_replicas"] == 3
