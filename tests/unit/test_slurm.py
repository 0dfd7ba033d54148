"""Slurm's allocations: which nodes, and which slots of each. Those marked so are what Slurm 22.05 printed for a job."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zinf_cli.errors import UsageError
from zinf_cli.recipe.slurm import Node, nodes_of_job, slurm_nodes


def variables(nodes: str, tasks: str, **more: str) -> dict[str, str]:
    return {"SLURM_JOB_NODELIST": nodes, "SLURM_TASKS_PER_NODE": tasks, **more}


def told(*nodes: tuple[str, str]) -> str:
    """The lines of `scontrol show job -d` that matter, for (Nodes, GRES)."""
    lines = [f"     Nodes={names} CPU_IDs=0-3 Mem=0 GRES={gres}" for names, gres in nodes]
    return "JobId=9 JobName=interactive\n   JOB_GRES=gpu:5\n" + "\n".join(lines) + "\n   TresPerJob=gres:gpu:5\n"


@pytest.mark.parametrize(
    ("environment", "job", "nodes"),
    [
        # printed by Slurm 22.05 for: salloc -N3
        (variables("a[1-3]", "1(x3)"), told(("a[1-3]", "")), dict.fromkeys(("a1", "a2", "a3"), Node(1, ()))),
        # -n7, on nodes of 4 cores
        (
            variables("a[1-2]", "4,3", SLURM_NTASKS="7"),
            told(("a1", ""), ("a2", "")),
            {"a1": Node(4, ()), "a2": Node(3, ())},
        ),
        # -N2 --ntasks-per-node=2
        (
            variables("a[1-2]", "2(x2)", SLURM_NTASKS="4", SLURM_NTASKS_PER_NODE="2"),
            told(("a[1-2]", "")),
            {"a1": Node(2, ()), "a2": Node(2, ())},
        ),
        # -N3 --gpus-per-node=1
        (
            variables("a[1-3]", "1(x3)", SLURM_GPUS_PER_NODE="1"),
            told(("a[1-3]", "gpu:1(IDX:0)")),
            dict.fromkeys(("a1", "a2", "a3"), Node(1, (0,))),
        ),
        # -n3 --gpus=5
        (
            variables("a[1-2]", "1,2", SLURM_NTASKS="3", SLURM_GPUS="5"),
            told(("a1", "gpu:2(IDX:0-1)"), ("a2", "gpu:3(IDX:0-2)")),
            {"a1": Node(1, (0, 1)), "a2": Node(2, (0, 1, 2))},
        ),
        # sbatch -N2 --gpus=5: SLURM_GPUS_ON_NODE is the first node's
        (
            variables("a[1-2]", "1(x2)", SLURM_GPUS="5", SLURM_GPUS_ON_NODE="2"),
            told(("a1", "gpu:2(IDX:0-1)"), ("a2", "gpu:3(IDX:0-2)")),
            {"a1": Node(2, (0, 1)), "a2": Node(3, (0, 1, 2))},
        ),
        # -w a1 -n1 --gres=gpu:1, while another job has GPU 0; no variable tells of it
        (variables("a1", "1", SLURM_NTASKS="1"), told(("a1", "gpu:1(IDX:1)")), {"a1": Node(1, (1,))}),
        # as the manual has it: SLURM_NTASKS_PER_NODE is a maximum
        (
            variables("n[08-10]", "4(x2),3", SLURM_NTASKS="11", SLURM_NTASKS_PER_NODE="4"),
            told(("n[08-10]", "")),
            {"n08": Node(4, ()), "n09": Node(4, ()), "n10": Node(3, ())},
        ),
        (
            variables("r[1-2]n[3,4]x,b", "1(x5)"),
            told(("r[1-2]n[3,4]x,b", "gpu:a100:2(IDX:0,3),nic:1(IDX:7)")),
            dict.fromkeys(("r1n3x", "r1n4x", "r2n3x", "r2n4x", "b"), Node(2, (0, 3))),
        ),
        (
            variables("b", "1"),
            told(("b", "gpu:a100:1(IDX:2),gpu:h100:2(IDX:0-1),shard:4(IDX:0-3)")),
            {"b": Node(3, (0, 1, 2))},
        ),
        (variables("b", "1"), told(("b", "gpu:2(IDX:N/A)")), {"b": Node(2, (0, 1))}),
    ],
)
def test_nodes_of_an_allocation(environment: dict[str, str], job: str, nodes: dict[str, Node]) -> None:
    assert nodes_of_job(environment, job) == nodes


@pytest.mark.parametrize(
    ("environment", "job", "said"),
    [
        # printed by Slurm 22.05 for: salloc -n1 -w a1 : -n2 -w a2
        ({"SLURM_HET_SIZE": "2", "SLURM_NTASKS": "3"}, told(("a1", ""), ("a2", "")), "heterogeneous"),
        (variables("a[1-2]", "3,1", SLURM_NTASKS="4"), told(("a[1-2]", "gpu:2(IDX:0-1)")), "a1 has 2 GPUs .* 3 ranks"),
        (variables("a[1-2]", "1(x2)"), told(("a1", "gpu:2(IDX:0-1)"), ("a2", "")), "a2 has 0 GPUs"),
        (variables("a[1-2]", "1"), told(("a[1-2]", "")), "about 1 nodes, not 2"),
        (variables("a1", "0"), told(("a1", "")), "a1 has 0 tasks"),
        (variables("a1", "1(x2"), told(("a1", "")), "no list of tasks"),
        ({"SLURM_JOB_NODELIST": "a1"}, told(("a1", "")), r"not set\) is no list of tasks"),
        (variables("a1", "1"), told(("a1", "gpu:two")), "no list of GPUs"),
        *(
            (variables(nodes, "1"), "", "SLURM_JOB_NODELIST")
            for nodes in ("", "node[1-", "node[a-b]", "node;reboot", "n[0-99999999]", "n[3-1]")
        ),
    ],
)
def test_an_allocation_that_makes_no_sense(environment: dict[str, str], job: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        nodes_of_job(environment, job)


def test_no_allocation() -> None:
    with pytest.raises(UsageError, match="no allocation here"):
        slurm_nodes({})


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4)), min_size=1, max_size=6))
def test_what_slurm_folds_is_spelled_out(folded: list[tuple[int, int]]) -> None:
    tasks = [number for number, times in folded for _ in range(times)]
    written = ",".join(f"{number}(x{times})" if times > 1 else str(number) for number, times in folded)
    environment = variables(f"n[001-{len(tasks):03d}]", written, SLURM_NTASKS=str(sum(tasks)))
    nodes = nodes_of_job(environment, "")
    assert list(nodes) == [f"n{number:03d}" for number in range(1, len(tasks) + 1)]
    assert [node.ranks for node in nodes.values()] == tasks


@given(st.text() | st.text(alphabet="a12[]-,()x ", max_size=20), st.text(alphabet="0123(x),", max_size=12))
def test_any_variables_are_understood_or_refused(nodes: str, tasks: str) -> None:
    try:
        found = nodes_of_job(variables(nodes, tasks), "")
    except UsageError:
        return
    assert all(node.ranks for node in found.values())
    assert not set("".join(found)) & set(" ;&|$`'\"\\<>(){}*?!~\n")
