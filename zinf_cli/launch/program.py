"""What a launch runs: the agent on each host, and the function that every rank runs."""

from __future__ import annotations

import zlib
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from zinf_cli.search_path import module_command


@dataclass(frozen=True)
class Agent:
    """The agent that runs on each host (train/agent.py). It imports `module`, which has the function that ranks run.

    An agent may stand by before it gets its order (supervisor.py). This is all that has to be known by then.
    """

    module: str
    environment: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, str] = field(default_factory=dict)
    """Variables that count only where the host's own environment does not set them."""

    def start(self, question: str = "null\n") -> dict[str, Any]:
        """The arguments of a supervisor's request to start the agent, which answers `question` first (question.py)."""
        return {
            "command": module_command("zinf_cli.train.agent", self.module),
            "environment": dict(self.environment),
            "defaults": dict(self.defaults),
            "opening": question,
        }


@dataclass(frozen=True)
class Program:
    """What every rank runs: `function(run_dir, *arguments)` of the agent's module, which returns an exit code."""

    agent: Agent
    function: str
    arguments: Sequence[str]
    run_dir: Path
    """The run's folder, which has the same path on every host."""
    files: Mapping[str, str]
    """The files that ranks need in it: text by name."""
    nvme_folders: Sequence[str]
    writes_checkpoints: bool
    """Whether it writes or reads a checkpoint. Then every host has to see the launcher's own run_dir."""
    environment: Mapping[str, str]
    """Variables beside those of the agent."""

    @cached_property
    def packed_files(self) -> Mapping[str, str]:
        """`files` as they are sent: a plan that names thousands of hosts goes to each of them."""
        return {name: b64encode(zlib.compress(text.encode())).decode() for name, text in self.files.items()}
