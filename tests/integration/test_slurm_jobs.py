"""Jobs of a real Slurm, whose srun carries the launch to its nodes."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from host_faults import FAULTS, MOMENTS, Fault, check_fault, of_module
from lab import Lab, wait_until
from programs import command
from slurm_lab import Node, SlurmLab, slurm_lab
from workshop import ApartWorkshop, FarWorkshop, wait_for_steps
from zinf_cli.checkpoint.manifest import Manifest

pytestmark = pytest.mark.xdist_group("slurm")  # a lab of one at a time: five daemons want a core to start

LONG = pytest.mark.skipif(MOMENTS == 1, reason="takes minutes: make test-faults")


class Cluster(FarWorkshop):
    """Nodes that share the run's folder."""

    lab: SlurmLab

    def submit(self, *words: str) -> str:
        """Submit a job that trains until it is stopped."""
        self.content["checkpoint"] = {"interval": 1000}
        self.write()
        changes = (f"output_dir={self.run_dir}", "train.max_steps=100000")
        return self.lab.submit(*words, str(self.recipe), *changes)

    def last_step(self) -> int:
        *_, last = (self.run_dir / "metrics.jsonl").read_text().splitlines()
        return int(json.loads(last)["step"])

    def stopped(self, job: str) -> int:
        """The step of the checkpoint of a run that was stopped. Nothing else may be left of it."""
        wait_until(lambda: self.lab.state(job) not in ("RUNNING", "COMPLETING"), 60)
        output = (self.folder / f"job-{job}").read_text()
        assert "interrupted after" in output
        assert "Traceback" not in output
        assert json.loads((self.run_dir / "summary.json").read_text())["status"] == "interrupted"
        assert self.left_behind() == []
        return Manifest.load(self.run_dir / "checkpoints" / "latest").step


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """Nodes that are not alike."""
    with slurm_lab(tmp_path, [Node(cpus=2, gpus=2), Node(cpus=3, gpus=1)]) as lab:
        yield Cluster(tmp_path, lab)


def test_a_job_on_all_nodes_is_cancelled_and_leaves_a_checkpoint(cluster: Cluster) -> None:
    ready = subprocess.run(
        cluster.lab.zinf("doctor", "--hosts", "slurm", "--json"),
        env=cluster.lab.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert [report["checks"]["by"][:5] for report in json.loads(ready.stdout)] == ["srun "] * 2
    job = cluster.submit("--nodes=2", "--ntasks-per-node=1")
    wait_for_steps(cluster.run_dir, 2)
    assert cluster.lab.processes(cluster.lab.hosts[1])
    cluster.lab.slurm("scancel", job)
    assert cluster.stopped(job) >= 2


@LONG
@pytest.mark.parametrize("order", [("scancel", "--batch", "--signal=USR1"), ("scancel",)])
def test_a_job_on_one_node_needs_no_srun(cluster: Cluster, order: tuple[str, ...]) -> None:
    job = cluster.submit("--nodes=1", "--ntasks=2", "--nodelist=node2")
    wait_for_steps(cluster.run_dir, 1)
    assert not cluster.lab.connections()
    cluster.lab.slurm(*order, job)
    assert cluster.stopped(job) >= 1


@LONG
def test_a_job_that_is_requeued_goes_on(cluster: Cluster) -> None:
    job = cluster.submit("--nodes=2", "--ntasks=3")
    wait_for_steps(cluster.run_dir, 3)
    assert len(cluster.lab.named("zinf rank 0") + cluster.lab.named("zinf rank 2")) == 2
    cluster.lab.slurm("scontrol", "requeue", job)
    wait_until(lambda: cluster.lab.state(job) == "PENDING", 30)
    first = Manifest.load(cluster.run_dir / "checkpoints" / "latest").step
    wait_until(lambda: cluster.last_step() >= first + 2, 60)
    cluster.lab.slurm("scancel", job)
    assert cluster.stopped(job) >= first + 2
    assert json.loads((cluster.run_dir / "summary.json").read_text())["resumed_from_step"] == first


@LONG
@pytest.mark.parametrize(
    ("words", "state"),
    [
        (("--time=1", "--signal=B:CONT@1"), "TIMEOUT"),
        (("--time=3",), "FAILED"),  # warned by USR1, two minutes before the limit; exit code 130 is none of success
    ],
)
def test_a_time_limit_leaves_a_checkpoint(cluster: Cluster, words: tuple[str, ...], state: str) -> None:
    job = cluster.submit("--nodes=2", "--ntasks=2", *words)
    wait_for_steps(cluster.run_dir, 1)
    wait_until(lambda: cluster.lab.state(job) != "RUNNING", 150)
    assert cluster.stopped(job) >= 1
    assert cluster.lab.state(job) == state


@LONG
def test_the_gpus_of_a_job_are_those_of_its_ranks(cluster: Cluster) -> None:
    """The GPUs are none, but Slurm does not know that."""
    other = cluster.lab.slurm(
        "sbatch", "--parsable", "--nodelist=node1", "--gres=gpu:1", "-o", "/dev/null", "--wrap=sleep 600"
    ).strip()
    job = cluster.submit("--nodes=2", "--ntasks=2", "--gres=gpu:1")
    wait_for_steps(cluster.run_dir, 1)
    (first,) = cluster.lab.named("zinf rank 0")
    (second,) = cluster.lab.named("zinf rank 1")
    assert psutil.Process(first).environ()["CUDA_VISIBLE_DEVICES"] == "1"
    assert psutil.Process(second).environ()["CUDA_VISIBLE_DEVICES"] == "0"
    cluster.lab.slurm("scancel", job, other)
    cluster.stopped(job)


def found(lab: SlurmLab, *arguments: str, allocation: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    """By what each node of a job is reached, and its slots."""
    lab.allocation = allocation
    words = lab.zinf("doctor", "--hosts", "slurm", "--json", *arguments)
    done = subprocess.run(words, env=lab.environment, capture_output=True, text=True, check=True)
    checks = [report["checks"] for report in json.loads(done.stdout)]
    return [(check["by"].split()[0], check["slots"].split(",")[0]) for check in checks]


@LONG
def test_ways_to_ask_for_nodes(cluster: Cluster) -> None:
    lab = cluster.lab
    assert found(lab, allocation=("--gpus=3",)) == [("srun", "2 CPU"), ("srun", "1 CPU")]
    assert found(lab, allocation=("--gres=gpu:1",)) == [("srun", "1 CPU")] * 2
    assert found(lab, allocation=("--ntasks=5",)) == [("srun", "2 CPU"), ("srun", "3 CPU")]
    assert found(lab, "--ssh") == [("OpenSSH", "1 CPU")] * 2
    words = [*lab.launcher, "salloc", "-Q", "-N2", *command("zinf_by_relays"), "doctor", "--hosts", "slurm", "--json"]
    done = subprocess.run(words, env=lab.environment, capture_output=True, text=True, check=True)
    assert [report["checks"]["by"].split()[2:] for report in json.loads(done.stdout)] == [
        [],
        [],
    ]  # no relay (linuxproc)
    words = [*lab.launcher, "salloc", "-Q", "-N1", ":", "-N1", *lab.zinf("doctor", "--hosts", "slurm")[-6:]]
    refused = subprocess.run(words, env=lab.environment, capture_output=True, text=True, check=False)
    assert refused.returncode == 2, refused.stderr
    assert "a heterogeneous job" in refused.stderr


@LONG
def test_a_warning_that_comes_to_steps_alone_leaves_a_checkpoint(cluster: Cluster) -> None:
    """As by --signal=USR1@120, which has no B:."""
    job = cluster.submit("--nodes=2", "--ntasks-per-node=1")
    wait_for_steps(cluster.run_dir, 1)
    cluster.lab.slurm("scancel", "--signal=USR1", job)
    assert cluster.stopped(job) >= 1


@LONG
def test_a_job_whose_nodes_are_behind_relays_is_stopped_goes_on_is_cancelled_and_leaves_a_checkpoint(
    tmp_path: Path,
) -> None:
    """The step of a relay has the sruns of its group, which the end of the job must not end; nor must Ctrl-Z."""
    with slurm_lab(tmp_path, [Node()] * 4, proctrack="cgroup") as lab:
        lab.program = command("zinf_by_relays")
        cluster = Cluster(tmp_path, lab)
        cluster.content["train"]["global_batch_size"] = 8
        job = cluster.submit("--nodes=4", "--ntasks-per-node=1")
        wait_for_steps(cluster.run_dir, 2)
        found = [of_module(lab, host, "zinf_cli.launch.relay") for host in range(4)]
        assert [sum(psutil.Process(pid).name() != "srun" for pid in pids) for pids in found] == [1, 0, 1, 0]
        launcher = psutil.Process(of_module(lab, 0, "zinf_by_relays")[-1])
        launcher.send_signal(signal.SIGTSTP)
        wait_until(lambda: launcher.status() == psutil.STATUS_STOPPED, 10)
        time.sleep(13)  # the silence that would end a host is shorter
        launcher.send_signal(signal.SIGCONT)
        stopped_at = cluster.last_step()
        wait_until(lambda: cluster.last_step() >= stopped_at + 2, 60)
        lab.slurm("scancel", job)
        assert cluster.stopped(job) >= 2


@pytest.fixture
def apart(tmp_path: Path) -> Iterator[ApartWorkshop]:
    """Nodes that share nothing."""
    with slurm_lab(tmp_path, [Node(), Node()]) as lab:
        yield ApartWorkshop(tmp_path, lab)


def kill_srun(lab: Lab, launcher: subprocess.Popen[str]) -> None:
    """Both processes of the srun that goes to node2."""
    for process in psutil.Process(launcher.pid).children(recursive=True):
        if "--nodelist=node2" in process.cmdline():
            process.kill()


def cancel(lab: Lab, launcher: subprocess.Popen[str]) -> None:
    assert isinstance(lab, SlurmLab)
    lab.slurm("scancel", lab.slurm("squeue", "-h", "-o", "%i").strip())


SRUN_FAULTS = {
    **{name: fault for name, fault in FAULTS.items() if name != "sshd killed"},
    "launcher killed": Fault(FAULTS["launcher killed"].strike, 0, "", loses_files=True),  # salloc's own code
    "srun killed": Fault(kill_srun, 1, "node2: the connection was lost"),
    "scancel": Fault(cancel, 130, "interrupted after"),
}


@LONG
@pytest.mark.parametrize("moment", range(MOMENTS))
@pytest.mark.parametrize("name", SRUN_FAULTS)
def test_a_fault_is_named_and_nothing_is_left(
    apart: ApartWorkshop, name: str, moment: int, record_property: Callable[[str, object], None]
) -> None:
    record_property("fault", ["srun", name, *check_fault(apart, name, SRUN_FAULTS[name], moment)])
