"""Does what an agent does up to the fork of its ranks, where a question to a device is an error."""

from __future__ import annotations

from typing import Any

import torch


def asked(*_: Any) -> None:
    raise AssertionError("a device was asked for something")


for name in ("is_available", "device_count", "init"):
    setattr(torch.cuda, name, asked)

import torch.distributed.run  # noqa: E402

import zinf_cli.bench.links  # noqa: E402
import zinf_cli.train.figures  # noqa: E402
import zinf_cli.train.loop  # noqa: E402, F401
from zinf_cli.train.elastic import launch_ranks  # noqa: E402

launch_ranks({"ranks": 1, "number": 0, "hosts": 1, "meeting": None}, print, "forked")
