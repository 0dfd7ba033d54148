"""Every error a user can meet, each with its exit code.

    ZinfError                 1   base: a message, where it happened, what to do next
    ├── UsageError            2   a flag or argument that makes no sense
    ├── FileError             2   all problems of one file at once
    │   ├── RecipeError       2   a recipe that does not parse or validate
    │   └── HostfileError     2   a hostfile that does not parse
    ├── DatasetError          2   text that is missing, unreadable or too short
    ├── CheckpointError       2   missing, extra or misshaped tensors; a checkpoint that does not go with the recipe
    │   └── DamagedError      2   a checkpoint of a run that is not as it was written
    ├── ModelError            2   a model the engine can't run, named with the reason
    │   └── UncuttableError   2   a weight that is used as only a whole one can be
    ├── PreflightError        3   a machine that lacks something the run needs
    ├── HostError             3   a host that can't be reached, or does not do what it is asked to
    ├── CapacityError         4   bytes that do not fit, with the numbers
    ├── TierError             1   an I/O error or short transfer, with rank, path and offset
    │   └── UnreadableError   1   a file of a checkpoint that its drive does not give, whole as it may be
    ├── NonFiniteError        1   a loss or gradient that is NaN or infinite
    ├── RankError             1   a rank that raised or died
    ├── ReportedError         *   an error of another process, which has told its exit code
    └── Interrupted         130   Ctrl-C

`line()` is what the user sees after "error: "; it is one line for one problem. `to_json()` is what a process tells
another one of its error, and ReportedError(**told) is that error there.
"""

from __future__ import annotations

from typing import Any


class ZinfError(Exception):
    """An error for the user: what went wrong, `where` (file:line, key, host:rank), and the next step."""

    exit_code: int = 1
    may_restart: bool = False
    """Whether the same run, started again from its last checkpoint, may get past it."""

    def __init__(self, message: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint

    def line(self) -> str:
        """`where: message (hint)`, on one line."""
        place = f"{self.where}: " if self.where else ""
        step = f" ({self.hint})" if self.hint else ""
        return f"{place}{self.message}{step}"

    def to_json(self) -> dict[str, Any]:
        """All that another process needs to know of it."""
        fields = ("message", "where", "hint", "exit_code", "may_restart")
        return {field: getattr(self, field) for field in fields}

    def __str__(self) -> str:
        return self.line()


class UsageError(ZinfError):
    exit_code = 2


class FileError(ZinfError):
    """All problems of one file; each is a complete line of its own."""

    exit_code = 2

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class RecipeError(FileError):
    pass


class HostfileError(FileError):
    pass


class DatasetError(ZinfError):
    exit_code = 2


class CheckpointError(ZinfError):
    exit_code = 2


class DamagedError(CheckpointError):
    pass


class ModelError(ZinfError):
    exit_code = 2


class UncuttableError(ModelError):
    """`weight` is its name, `why` what the model does with it."""

    def __init__(self, weight: str, why: str) -> None:
        super().__init__(
            f"{weight} is larger than the memory for it, and can't be cut: {why}",
            hint="what is looked up or multiplied as by torch.nn.Embedding or torch.nn.Linear can be cut",
        )
        self.weight, self.why = weight, why


class PreflightError(ZinfError):
    exit_code = 3


class HostError(ZinfError):
    exit_code = 3
    may_restart = True


class CapacityError(ZinfError):
    exit_code = 4


class TierError(ZinfError):
    exit_code = 1
    may_restart = True


class UnreadableError(TierError):
    pass


class NonFiniteError(ZinfError):
    exit_code = 1


class RankError(ZinfError):
    exit_code = 1
    may_restart = True


class ReportedError(ZinfError):
    """The arguments are what `to_json` gave; with them alone, an error that zinf does not know by name."""

    def __init__(
        self,
        message: str,
        *,
        where: str | None = None,
        hint: str | None = None,
        exit_code: int = RankError.exit_code,
        may_restart: bool = RankError.may_restart,
    ) -> None:
        super().__init__(message, where=where, hint=hint)
        self.exit_code = exit_code
        self.may_restart = may_restart


class Interrupted(ZinfError):  # noqa: N818 (named as users of Ctrl-C think of it)
    exit_code = 130


def inside(outer: str, where: str | None) -> str:
    """A place within another one, as an error names it: `node2:rank 1: /data/texts/a.jsonl:7`."""
    return f"{outer}: {where}" if where else outer
