"""State machines in tests that say themselves how many examples they take."""

import os

from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

TEST_ALL = os.environ.get("VATTENTION_TEST_ALL") == "1"


def run(kind: type[RuleBasedStateMachine], *, examples: int, steps: int) -> None:
    """`examples` times `steps` steps: the same ones every time, or fresh ones under VATTENTION_TEST_ALL=1."""
    chosen = settings(
        max_examples=examples,
        stateful_step_count=steps,
        derandomize=not TEST_ALL,
        phases=(Phase.generate,),
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(kind, settings=chosen)
