"""What failures of hosts cost a run, and how often a checkpoint loses least.

M is the mean time between failures of any host: one host's by the number of hosts. Of the time between two checkpoints,
T, a failure loses half on average, and each checkpoint takes C longer than other steps. So the share that is lost is
C / T + T / 2M, which is least at T = sqrt(2 C M) (Young, CACM 17, 1974; Daly, FGCS 22, 2006, equation 9).

The time until a run has started again comes on top. It does not depend on T.
"""

from __future__ import annotations

import math

from zinf_cli.amounts import format_seconds
from zinf_cli.plan.estimate import Estimate
from zinf_cli.plan.plan import Plan

_STORED_BYTES = 12
"""Of a parameter in a checkpoint: its fp32 master and two moments."""


def best_interval(cost_s: float, between_failures_s: float, step_s: float) -> int:
    """The steps from one checkpoint to the next that lose least, one at least."""
    return max(1, round(math.sqrt(2 * cost_s * between_failures_s) / step_s))


def lost_share(steps: int, cost_s: float, between_failures_s: float, step_s: float) -> float:
    """The share of time that is lost with a checkpoint every `steps` steps."""
    seconds = steps * step_s
    return cost_s / seconds + seconds / (2 * between_failures_s)


def failures_line(plan: Plan) -> str | None:
    """What the plan says of it. None where the mean time between failures of a host is not known."""
    if plan.host_mtbf_s is None:
        return None
    if plan.checkpoint is None:
        return f"{_how_often(len(plan.hosts), plan.host_mtbf_s)}, and there are no checkpoints to go on from"
    cost_s = max(0.0, plan.checkpoint.step_s - plan.step_s)
    chosen = plan.checkpoint.interval
    return _line(len(plan.hosts), plan.host_mtbf_s, cost_s, plan.calm_step_s, chosen)


def expected_failures(answer: Estimate) -> str | None:
    """The same of an estimate. A checkpoint takes what the step's own traffic to the drives leaves it no time for.

    Updates of states that lie on the drives write into it, which takes no time.
    """
    scenario, played = answer.scenario, answer.simulation
    profile = scenario.profile
    if profile.host_mtbf_s is None:
        return None
    written = scenario.model.params * _STORED_BYTES / scenario.hosts
    idle_s = played.step_s * max(0.0, 1 - played.busy.get("nvme read", 0.0) - played.busy.get("nvme write", 0.0))
    in_passing = answer.placement["optimizer"] == "nvme"
    cost_s = 0.0 if in_passing else max(0.0, written / profile.drives.both - idle_s)
    return _line(scenario.hosts, profile.host_mtbf_s, cost_s, played.step_s)


def _how_often(hosts: int, host_mtbf_s: float) -> str:
    return f"one host in {hosts} is expected to fail every {format_seconds(host_mtbf_s / hosts)}"


def _line(hosts: int, host_mtbf_s: float, cost_s: float, step_s: float, chosen: int | None = None) -> str:
    between = host_mtbf_s / hosts

    def lost(steps: int) -> str:
        return f"{100 * lost_share(steps, cost_s, between, step_s):.2g} % of the time"

    best = best_interval(cost_s, between, step_s)
    text = _how_often(hosts, host_mtbf_s)
    if chosen is not None:
        text += f"; with a checkpoint every {_steps(chosen)} that loses {lost(chosen)}"
    if chosen == best:
        return text
    what = "every" if chosen is not None else "a checkpoint every"
    return f"{text}; {what} {_steps(best)} loses least, {lost(best)}"


def _steps(count: int) -> str:
    return "step" if count == 1 else f"{count} steps"
