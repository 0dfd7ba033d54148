"""hardware.yaml: what `zinf bench` measured on a machine, in a strict schema; a Profile out of it.

`zinf bench nvme` writes the section nvme, `zinf bench links` the section links; each leaves the other as it is. launch
and estimate read the file that --hardware names, or the first of `places`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from zinf_cli.amounts import parse_bytes
from zinf_cli.durable import write_durably
from zinf_cli.errors import UsageError
from zinf_cli.machine.drive_files import file_system_at
from zinf_cli.machine.profiles import (
    ASSUMED_ADAMW,
    ASSUMED_GATHER,
    ASSUMED_LINK,
    ASSUMED_MEMORY,
    ASSUMED_NETWORK,
    BUILT_IN,
    Drives,
    Profile,
)
from zinf_cli.model_state import PAGE
from zinf_cli.recipe.recipe_file import plain
from zinf_cli.recipe.values import Number, Paths, Section, Size
from zinf_cli.screen import printable

FILE_NAME = "hardware.yaml"
Bandwidth = Annotated[Number, Field(ge=1e6, le=1e13)]
"""Bytes per second: between a floppy disk and the memory of a whole rack."""
Flops = Annotated[Number, Field(ge=1e7, le=1e17)]
Capacity = Annotated[int, BeforeValidator(lambda value: parse_bytes(value) if isinstance(value, str) else value)]


class Best(Section):
    """The fastest point of a sweep over block sizes and threads."""

    bytes_per_s: Bandwidth
    """Median of the repeats."""
    block_size: Annotated[Size, Field(ge=PAGE)]
    """Bytes of one transfer."""
    threads: Annotated[int, Field(ge=1, le=4096)]
    """Transfers under way at once."""


class Beside(Section):
    """What drives and cores leave of each other, shares of what each does alone."""

    drives: Annotated[Number, Field(gt=0, le=1)]
    compute: Annotated[Number, Field(gt=0, le=1)]


class Nvme(Section):
    """Drives, as `zinf bench nvme` found them."""

    folders: Paths
    """Where it was measured."""
    space: Size
    """Bytes that a run could lay there (hardware.room_of)."""
    read: Best
    """Reading, cache bypassed."""
    write: Best
    """Writing, cache bypassed."""
    both: Bandwidth
    """Bytes per second in sum, reading and writing at once."""
    beside: Beside = Beside(drives=1, compute=1)
    """Reading and writing at once while all cores compute."""


class Links(Section):
    """Compute, memory and links, as `zinf bench links` found them."""

    accelerators: Annotated[int, Field(ge=0, le=1024)]
    """0: the CPU computes."""
    device_memory: Annotated[Capacity, Field(ge=0)] = 0
    """Of one accelerator."""
    device_bandwidth: Bandwidth | None = None
    """Of its memory."""
    cpu_memory: Size
    """Of the host."""
    matmul: dict[str, dict[int, Flops]]
    """FLOP/s of matrix products, by precision and by rows of the activation."""
    block: dict[str, dict[int, Flops]]
    """The same of a whole block's pass: forward, recomputed forward, backward."""
    adamw: Annotated[Number, Field(ge=1e4, le=1e13)]
    """Parameters per second of the host's CPU."""
    copy_host: Bandwidth | None = None
    """CPU memory to all accelerators at once."""
    copy_alone: Bandwidth | None = None
    """CPU memory to one accelerator."""
    collective: Bandwidth | None = None
    """All-gather between the ranks of this host, bytes per second into one of them."""
    across: Bandwidth | None = None
    """The same across hosts."""

    @property
    def best_matmul(self) -> dict[str, float]:
        """By precision, of any number of rows."""
        return {precision: max(rates.values()) for precision, rates in self.matmul.items()}

    @model_validator(mode="after")
    def _whole(self) -> Links:
        for name, rates in (("matmul", self.matmul), ("block", self.block)):
            if not rates or not all(rates.values()):
                raise ValueError(f"{name} needs a rate for at least one precision and number of rows")
        needed = (self.device_memory, self.device_bandwidth, self.copy_host, self.copy_alone)
        if self.accelerators and not all(needed):
            raise ValueError("accelerators need device_memory, device_bandwidth, copy_host and copy_alone")
        return self


class Measured(Section):
    """A hardware.yaml."""

    name: str = "this machine"
    """What the estimate calls it."""
    nvme: Nvme | None = None
    """Of zinf bench nvme."""
    links: Links | None = None
    """Of zinf bench links."""
    endurance_tbw: Annotated[Number, Field(ge=1, le=1e9)] | None = None
    """Terabytes that a host's drives together may be written in their life, as their makers rate them. The user adds
    it: no bench knows."""

    host_mtbf_hours: Annotated[Number, Field(ge=1, le=1e9)] | None = None
    """Hours from one failure of a host to the next, in the mean. The user adds it, too."""

    @property
    def host_mtbf_s(self) -> float | None:
        return None if self.host_mtbf_hours is None else self.host_mtbf_hours * 3600

    @property
    def endurance_bytes(self) -> float | None:
        return None if self.endurance_tbw is None else self.endurance_tbw * 1e12

    def drives(self) -> Drives | None:
        if self.nvme is None:
            return None
        read, write = self.nvme.read, self.nvme.write
        return Drives(
            self.nvme.space, read.bytes_per_s, write.bytes_per_s, self.nvme.both, True,
            reads=read.threads, writes=write.threads, block_bytes=max(read.block_size, write.block_size),
            beside_compute=self.nvme.beside.drives, compute_beside=self.nvme.beside.compute, usable=1,
            endurance_bytes=self.endurance_bytes,
        )  # fmt: skip

    def covers(self, folders: Sequence[Path]) -> bool:
        """Whether its drives are those of `folders`: the same file systems."""
        if self.nvme is None:
            return False
        ours, measured = ({file_system_at(folder) for folder in each} for each in (folders, self.nvme.folders))
        return ours == measured


def places(recipe: Path | None) -> list[Path]:
    """Where a machine's profile is looked for: beside the recipe, then in the user's configuration."""
    beside = [recipe.parent / FILE_NAME] if recipe is not None else []
    return [*beside, user_file()]


def user_file() -> Path:
    """~/.config/zinf/hardware.yaml, or where XDG_CONFIG_HOME says."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "zinf" / FILE_NAME


def _say(line: str) -> None:
    print(printable(f"note: {line}"), file=sys.stderr)


def find_measured(recipe: Path | None, notice: Callable[[str], None] = _say) -> Measured | None:
    """The first profile file of `places` that can be used; None without one.

    One that can't be used, as a power cut leaves it, is as good as none: `notice` is told.
    """
    for path in filter(Path.is_file, places(recipe)):
        try:
            return load_measured(path)
        except UsageError as error:
            notice(f"left out {error.line()}")
    return None


def load_measured(path: Path) -> Measured:
    """Read and check a hardware.yaml; UsageError with every problem in one line."""
    try:
        tree = yaml.safe_load(path.expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        hint = f"built-in profiles: {', '.join(BUILT_IN)}; zinf bench measures this machine"
        raise UsageError(f"no such profile: {error.strerror}", where=str(path), hint=hint) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that is none, bad UTF-8
        raise UsageError("not valid YAML", where=str(path), hint="zinf bench writes it anew") from error
    if not isinstance(tree, dict):
        raise UsageError("a profile is a mapping with nvme: and links:", where=str(path))
    try:
        return Measured.model_validate(tree)
    except ValidationError as error:
        problems = "; ".join(_line_of(entry) for entry in error.errors())
        raise UsageError(problems, where=str(path), hint="zinf bench measures it anew") from error


def load_profile(name: str) -> Profile:
    """A measured profile by its file; UsageError for what is none or not whole."""
    measured = load_measured(Path(name))
    for section, command in (("nvme", "zinf bench nvme"), ("links", "zinf bench links")):
        if getattr(measured, section) is None:
            raise UsageError(f"{section} is missing", where=name, hint=f"{command} --out {name} adds it")
    return to_profile(measured)


def to_profile(measured: Measured) -> Profile:
    """The planner's view of a file that has both sections."""
    links, drives = measured.links, measured.drives()
    assert links is not None
    assert drives is not None
    return Profile(
        name=measured.name, accelerators=links.accelerators, device_memory=links.device_memory,
        cpu_memory=links.cpu_memory, drives=drives, matmul=links.best_matmul, passes=links.block, measured=True,
        host_mtbf_s=measured.host_mtbf_s, **rates_between(links, links.accelerators),
    )  # fmt: skip


def rates_between(links: Links | None, accelerators: int) -> dict[str, Any]:
    """The rates of a Profile for memory, links and AdamW: as they were measured, assumed where nothing was."""

    def measured(field: str, assumed: float) -> float:
        rate: float | None = getattr(links, field, None)
        return rate or assumed

    alone = measured("copy_alone", ASSUMED_LINK if accelerators else ASSUMED_MEMORY)
    return {
        "device_bandwidth": measured("device_bandwidth", ASSUMED_MEMORY),
        "copy_alone": alone,
        "copy_host": measured("copy_host", alone * max(1, accelerators)),
        "collective_inside": measured("collective", alone if accelerators else ASSUMED_GATHER),
        "collective_across": measured("across", ASSUMED_NETWORK),
        "adamw": measured("adamw", ASSUMED_ADAMW),
    }


def save_measured(path: Path, section: str, values: Nvme | Links, name: str) -> None:
    """Put one section into the file, in place of what it had there; the other one stays. UsageError if it can't."""
    try:
        there = load_measured(path) if path.is_file() else Measured()
    except UsageError as error:
        _say(f"written anew: {error.line()}")
        there = Measured()
    measured = there.model_copy(update={"name": name, section: values})
    tree = {key: _given(plain(value)) for key, value in measured if value is not None}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, yaml.safe_dump(tree, sort_keys=False))
    except OSError as error:
        hint = "give --out another file"
        raise UsageError(f"can't be written: {error.strerror or error}", where=str(path), hint=hint) from error


def _given(value: Any) -> Any:
    return {key: item for key, item in value.items() if item is not None} if isinstance(value, dict) else value


def _line_of(entry: Any) -> str:
    key = ".".join(str(part) for part in entry["loc"])
    if entry["type"] == "missing":
        return f"{key} is missing"
    if entry["type"] == "extra_forbidden":
        return f"{key}: unknown key"
    message = str(entry["ctx"]["error"]) if entry["type"] == "value_error" else str(entry["msg"])
    if entry["type"] in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        message = f"{entry['input']} is absurd: {message[0].lower()}{message[1:]}"
    return f"{key}: {message}" if key else message
