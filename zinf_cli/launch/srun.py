"""Channels to the nodes of a Slurm job by `srun`: a job step on each node carries the supervisor. No SSH is needed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property

from zinf_cli.errors import HostError, UsageError
from zinf_cli.launch.client_channel import ClientChannel, allow_files
from zinf_cli.launch.frames import language
from zinf_cli.launch.transport import (
    SILENCE_S,
    Channel,
    Greeting,
    marked_command,
    supervisor_command,
    supervisor_program,
)
from zinf_cli.recipe.hosts import Host
from zinf_cli.search_path import module_command

_START_S = 60.0
"""Seconds until the supervisor of a node runs. Where a node has no room for a step, srun itself would wait for ever."""

_STEP = (
    "--overlap", "--mem=0", "--cpu-bind=none", "--mpi=none", "--nodes=1", "--ntasks=1", "--unbuffered", "--chdir=/",
)  # fmt: skip
"""A step with one task. It shares all that the job has on the node with other steps, and binds no ranks to cores."""


class Srun:
    """Starts supervisors on the nodes of a job, with this process's own interpreter."""

    most_direct = 256
    """Each takes two programs, of 10 MiB together."""

    def __init__(self) -> None:
        srun = shutil.which("srun")
        if srun is None:
            raise UsageError("--hosts slurm: there is no srun here", hint="--ssh reaches the nodes by SSH")
        self._srun = srun
        said = subprocess.run([srun, "--version"], capture_output=True, text=True, check=False).stdout
        version = re.search(r"\d+\.\d+", said)
        self.name = f"srun {version[0]}" if version is not None else "srun"
        allow_files()

    def open(self, host: Host, launch_id: str) -> Channel:
        program = supervisor_program(launch_id, SILENCE_S, Greeting(launch_id))
        return self._start(host, supervisor_command(sys.executable, program, launch_id), program, launch_id)

    def open_relay(self, host: Host, launch_id: str) -> Channel:
        """Start a relay (relay.py) in a step, which starts the steps of its group.

        Where Slurm signals all processes of a step, it is refused: the end of the job would end each srun at once.
        """
        if self._signals_all:
            raise HostError("Slurm signals all processes of a step (ProctrackType)", where=host.name)
        command = marked_command(launch_id, module_command("zinf_cli.launch.relay", language(), "srun"))
        return self._start(host, command, b"", launch_id)

    def _start(self, host: Host, command: Sequence[str], program: bytes, launch_id: str) -> Channel:
        """Run `command` in a step on a node, send `program` to it and wait for its greeting."""
        assert host.job is not None
        where = [f"--jobid={host.job}", f"--nodelist={host.host}", "--export=ALL"]
        gpus = [f"--gpus={host.gpus}"] if host.gpus else []
        words = [self._srun, *_STEP, *where, *gpus, *command]
        try:
            return _SrunChannel(words, program, Greeting(launch_id), _environment(os.environ))
        except HostError as error:
            raise HostError(error.message, where=host.name, hint=error.hint) from error

    @cached_property
    def _signals_all(self) -> bool:
        """Whether a signal for a step comes to more than its task. With proctrack/cgroup it does not."""
        words = ["scontrol", "show", "config"]
        said = subprocess.run(words, capture_output=True, text=True, check=False, env=_environment(os.environ)).stdout
        return re.search(r"^ProctrackType\s*= proctrack/cgroup$", said, re.MULTILINE) is None

    def close(self) -> None:
        pass


def _environment(here: Mapping[str, str]) -> dict[str, str]:
    """The variables of a step, and of srun itself.

    srun takes each SLURM_* for an option, and those of a job ask for all tasks of the job. The address in
    SSH_CONNECTION is not the node's.
    """
    return {
        name: value
        for name, value in here.items()
        if name == "SLURM_CONF" or not name.startswith(("SLURM_", "SSH_CONNECTION"))
    }


class _SrunChannel(ClientChannel):
    def _check_time(self, seconds: float) -> None:
        if seconds > _START_S:
            raise HostError(f"srun started nothing there within {_START_S:.0f} s: {self._last_word()}")

    def _why_ended(self, code: int, greeting: Greeting) -> HostError:
        return HostError(self._last_word())

    def _last_word(self) -> str:
        """The last that was told: by srun, or by what it has started."""
        lines = self._said.lines
        causes = [line for line in lines if not re.search("error: .* task 0: ", line)]  # how the task ended, not why
        told = (causes or lines or ["it ended without a word"])[-1]
        return f"srun: {re.sub('^(srun|slurmstepd[^:]*): (error: )?', '', told)}"
