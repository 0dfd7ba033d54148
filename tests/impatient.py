"""Pipes to supervisors that wait no longer than a test likes."""

from __future__ import annotations

import sys

from zinf_cli.launch.pipes import Pipes, _PipeChannel
from zinf_cli.launch.transport import Channel, supervisor_command, supervisor_program
from zinf_cli.recipe.hosts import Host


class Impatient(Pipes):
    """Pipes with limits, as another machine has them."""

    def __init__(self, here_s: float, there_s: float) -> None:
        self.here_s, self.there_s = here_s, there_s

    def open(self, host: Host, launch_id: str) -> Channel:
        program = supervisor_program(launch_id, self.there_s)
        channel = _PipeChannel(supervisor_command(sys.executable, program, launch_id))
        channel.silence_s = self.here_s
        channel.send(program)
        return channel
