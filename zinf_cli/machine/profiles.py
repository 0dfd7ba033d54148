"""Hardware profiles: what a machine holds and how fast its parts are, as the planner and the simulation use it.

Built in are machines that people name; each value says where it is from. A machine's own values are measured by
`zinf bench` and kept in a hardware.yaml (profile_file.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

GB, TB = 10**9, 10**12
GIB, TIB = 2**30, 2**40
Rate = TypeVar("Rate")
MEMORY_SHARE = 0.9
"""Of memory that is there, a plan may fill so much where nothing else is asked for: allocators fragment."""
DRIVE_SHARE = 0.99
"""Of what a file system calls free, it may take the rest for itself as files grow."""
ASSUMED_DRIVE_BANDWIDTH = 2 * GB
"""Bytes per second of one drive, read and write, where nothing was measured. So are the rates that follow."""
ASSUMED_ADAMW = 0.5e9
"""Parameters per second of a host's CPU: two cores, measured once."""
ASSUMED_MEMORY = 1000 * GB
"""Of the memory that is computed in; a CPU brings nothing to it over a link."""
ASSUMED_LINK = 12 * GB
"""To an accelerator, and between accelerators."""
ASSUMED_GATHER = 1 * GB
"""Between CPU ranks."""
ASSUMED_NETWORK = 1.1 * GB
"""Between hosts: 10 Gb/s Ethernet."""


@dataclass(frozen=True)
class Drives:
    """All NVMe drives of a host together."""

    space: int
    read: float
    """Bytes per second with nothing else going on."""
    write: float
    both: float
    """Bytes per second in sum while reads and writes are under way."""
    measured: bool = False
    reads: int = 0
    writes: int = 0
    """Transfers under way at once that were fastest, where it was measured."""
    block_bytes: int = 0
    """Of one such transfer."""
    beside_compute: float = 1.0
    """What is left of these rates while all cores compute,"""
    compute_beside: float = 1.0
    """and of the cores' compute meanwhile: a drive takes CPU time, in a virtual machine much of it."""
    usable: float = DRIVE_SHARE
    """The share of the space that a plan may fill."""
    endurance_bytes: float | None = None
    """What they may be written in their life, as their makers say."""

    @property
    def may_use(self) -> int:
        """Bytes that a plan may fill."""
        return int(self.space * self.usable)


@dataclass(frozen=True)
class Profile:
    """One host, and how it reaches the others. Rates are bytes, FLOPs or parameters per second."""

    name: str
    accelerators: int
    """0: the CPU computes."""
    device_memory: int
    """Of one accelerator."""
    device_bandwidth: float
    """Of that memory."""
    cpu_memory: int
    drives: Drives
    matmul: Mapping[str, float]
    """FLOP/s of large matrix products by precision, of one accelerator (or of the whole CPU)."""
    passes: Mapping[str, Mapping[int, float]]
    """FLOP/s that a whole forward and backward pass reaches, by precision and by rows of the activation."""
    adamw: float
    """Parameters per second of the host's CPU."""
    copy_host: float
    """CPU memory to accelerators, one direction, all of them at work: bytes per second of the host."""
    copy_alone: float
    """The same for one accelerator alone."""
    collective_inside: float
    """Bytes per second into one rank, in an all-gather or reduce-scatter within the host."""
    collective_across: float
    """The same across hosts."""
    measured: bool = False
    one_pool: bool = False
    """Whether the accelerators use the memory of the CPU, so that what lies there takes from both."""
    host_mtbf_s: float | None = None
    """Mean time between failures of one host."""

    def peak(self, precision: str) -> float:
        """The best matmul rate, FLOP/s; 16-bit formats stand in for each other."""
        return _of(self.matmul, precision)

    def flops(self, precision: str, rows: float) -> float:
        """FLOP/s a rank-sized pass reaches on activations of `rows` rows, between the measured points by logarithm."""
        points = sorted(_of(self.passes, precision).items())
        below = max((p for p in points if p[0] <= rows), default=points[0])
        above = min((p for p in points if p[0] >= rows), default=points[-1])
        if below[0] == above[0]:
            return below[1]
        share = math.log(rows / below[0]) / math.log(above[0] / below[0])
        return below[1] * (1 - share) + above[1] * share

    def copy(self, ranks: int) -> float:
        """Bytes per second between CPU memory and the accelerator of one of `ranks` ranks on this host."""
        return min(self.copy_alone, self.copy_host / ranks)

    def with_accelerators(self, count: int) -> Profile:
        return replace(self, accelerators=count)


def _of(rates: Mapping[str, Rate], precision: str) -> Rate:
    """The rate of a precision, or of the other 16-bit format, or of what there is."""
    near = {"bf16": "fp16", "fp16": "bf16"}.get(precision, precision)
    return next((rates[name] for name in (precision, near) if name in rates), next(iter(rates.values())))


def _sustained(share: float, **matmul: float) -> dict[str, Any]:
    """Matmul rates, and passes that reach a share of them."""
    return {"matmul": matmul, "passes": {precision: {1: share * rate} for precision, rate in matmul.items()}}


_DGX2 = Profile(
    name="dgx2",
    accelerators=16,  # V100, ZeRO-Infinity figure 2b
    device_memory=32 * GIB,  # figure 2b
    device_bandwidth=600 * GB,  # figure 2b: 600 to 900
    cpu_memory=3 * TIB // 2,  # figure 2b
    drives=Drives(
        space=28 * TIB,  # figure 2b
        # figure 2b: 1.6 GB/s to each of 16 GPUs. It gives one figure; the sum of both directions is taken to be no more
        read=16 * 1.6 * GB,
        write=16 * 1.6 * GB,
        both=16 * 1.6 * GB,
        usable=0.7,  # figures 1 and 6a: the largest models leave so much free (docs/paper.md)
    ),
    # Section 4: 70 TFLOP/s reached by large matrices; fp32: 15.7 (datasheet), 90 % reached. Sustained: figure 5a, the
    # run of 1T parameters on 512 GPUs, which keeps everything in GPU memory: 48.9 of 70. One figure for the machine,
    # from the one run that waits for no slower tier; all other runs are predicted with it.
    **_sustained(0.70, fp16=70e12, fp32=14e12),
    adamw=4.3e9,  # 30 bytes a parameter at half of 256 GB/s: two sockets of six DDR4-2666 channels
    copy_host=16 * 3.0 * GB,  # figure 2b: 3.0 GB/s each with all 16 at work
    copy_alone=12 * GB,  # figure 2b
    collective_inside=150 * GB,  # figure 2b: 150 to 300
    collective_across=60 * GB,  # figure 2b: 60 to 100
)
_DGX_H100 = Profile(
    name="dgx-h100",
    accelerators=8,  # DGX H100 datasheet
    device_memory=80 * GB,  # datasheet: 640 GB in all
    device_bandwidth=3350 * GB,  # H100 SXM datasheet
    cpu_memory=2 * TB,  # datasheet
    drives=Drives(
        space=8 * 3840 * GB,  # datasheet: 8 U.2 drives of 3.84 TB
        read=8 * 6.8 * GB,  # a PCIe 4 drive of this size and class (Samsung PM9A3 datasheet): 6.8 read, 4.0 write
        write=8 * 4.0 * GB,
        both=8 * 6.8 * GB,  # assumed: no more than reading alone
    ),
    # H100 SXM datasheet, dense. Sustained: Llama 3 (arXiv 2407.21783), table 4, 38 to 43 % of it
    **_sustained(0.41, bf16=989e12, fp32=67e12),
    adamw=10e9,  # 30 bytes a parameter at half of 614 GB/s: two sockets of eight DDR5-4800 channels
    copy_host=8 * 50 * GB,  # PCIe 5 x16: 63 GB/s a direction, about 80 % of it reached
    copy_alone=50 * GB,
    collective_inside=360 * GB,  # NVLink 4: 450 GB/s a direction (datasheet), 80 % reached
    collective_across=40 * GB,  # one ConnectX-7 of 400 Gb/s for each GPU (datasheet), 80 % reached
)
_H200 = replace(
    _DGX_H100,
    name="h200",
    device_memory=141 * GB,  # H200 datasheet; compute and links are those of the H100, eight to a host
    device_bandwidth=4800 * GB,  # H200 datasheet
)
_RTX4090 = Profile(
    name="rtx4090-workstation",
    accelerators=1,
    device_memory=24 * GIB,  # GeForce RTX 4090 specifications
    device_bandwidth=1008 * GB,  # the same
    cpu_memory=128 * GIB,  # four DIMMs of 32 GiB, the most of a common desktop board
    drives=Drives(
        space=4 * TB,  # one drive such as the Samsung 990 Pro 4TB
        read=7.4 * GB,  # its datasheet
        write=6.9 * GB,  # its datasheet, into its cache
        both=7.4 * GB,  # assumed: no more than reading alone
    ),
    # Ada whitepaper, dense, fp32 accumulation. Sustained: assumed; `zinf bench links` measures it
    **_sustained(0.5, bf16=165.2e12, fp32=82.6e12),
    adamw=1.5e9,  # 30 bytes a parameter at half of 90 GB/s: two DDR5-5600 channels
    copy_host=25 * GB,  # PCIe 4 x16: 32 GB/s a direction, 80 % reached
    copy_alone=25 * GB,
    collective_inside=20 * GB,  # more than one: over PCIe
    collective_across=ASSUMED_NETWORK,
)
_GH200 = replace(
    _DGX_H100,
    name="gh200",
    accelerators=1,  # GH200 datasheet. Its two memories are apart, each with its own size and speed: two tiers
    device_memory=96 * GB,  # datasheet, with HBM3
    device_bandwidth=4000 * GB,  # datasheet
    cpu_memory=480 * GB,  # datasheet
    drives=replace(_DGX_H100.drives, space=4 * TB, read=6.8 * GB, write=4.0 * GB, both=6.8 * GB),  # assumed: one drive
    adamw=8.5e9,  # 30 bytes a parameter at half of 512 GB/s (datasheet: LPDDR5X)
    copy_host=360 * GB,  # NVLink-C2C: 450 GB/s a direction (datasheet), 80 % reached
    copy_alone=360 * GB,
)
_SPARK = Profile(
    name="dgx-spark",
    accelerators=1,
    device_memory=128 * GB,  # DGX Spark datasheet: 128 GB, which CPU and GPU share
    device_bandwidth=273 * GB,  # datasheet
    cpu_memory=128 * GB,
    one_pool=True,
    drives=Drives(
        space=4 * TB,  # datasheet
        read=6.8 * GB,  # assumed: a PCIe 4 drive
        write=4.0 * GB,
        both=6.8 * GB,
    ),
    # Datasheet: 1 PFLOP/s of sparse FP4, of which dense bf16 is an eighth. Sustained: assumed
    **_sustained(0.4, bf16=125e12, fp32=31e12),
    adamw=4.5e9,  # 30 bytes a parameter at half of 273 GB/s
    copy_host=100 * GB,  # inside the one memory, read and written: assumed
    copy_alone=100 * GB,
    collective_inside=100 * GB,
    collective_across=20 * GB,  # ConnectX-7 of 200 Gb/s (datasheet), 80 % reached
)
BUILT_IN: Mapping[str, Profile] = {
    profile.name: profile for profile in (_DGX2, _DGX_H100, _H200, _GH200, _RTX4090, _SPARK)
}
