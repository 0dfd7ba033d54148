"""The process of a rank: its log, its end with the launcher, and the record of how it failed.

run_rank() splits the process that torchrun's agent has forked. The child is the rank, which runs `main`. The parent is
its guard, which only waits: a rank that a signal kills can't say so itself. If the kernel kills a rank because memory
ran out, the user has to know that. The rank dies with its guard, and the guard with the agent (PR_SET_PDEATHSIG);
launch/supervisor.py has the rest of the chain.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from zinf_cli.durable import reserve_behind
from zinf_cli.errors import RankError, ReportedError, ZinfError
from zinf_cli.machine.control_groups import oom_kills
from zinf_cli.run_folder.error_records import ErrorPlace, ErrorRecord
from zinf_cli.run_folder.names import rank_log
from zinf_cli.unfailing_stream import make_unfailing

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15

_GUARDED = {signal.SIGTERM, signal.SIGCHLD}
"""The signals that a guard waits for: torchrun's teardown, for which it kills its rank, and the end of its rank."""

_LOG_BYTES = 2**16
"""Bytes that a log takes at the start, so that a run on a full drive can still say something."""

_PATIENCE_S = 2.0
"""How long a rank with a secondary error waits before it exits. Its exit makes torchrun end the others, and the rank
that failed first may not have recorded its error yet."""

_PEER_MESSAGE = re.compile(
    r"closed by peer|reset by peer|broken pipe|socket closed|gloo/transport|ncclRemoteError|got 0 bytes"
    r"|timeout waiting for key",
    re.IGNORECASE,
)
"""Texts of gloo's errors about a lost peer: they are RuntimeErrors, and only the text tells them apart."""


def run_rank(main: Callable[[], int], run_dir: Path) -> None:
    """Run `main` as the rank that the environment's RANK names. Return if it returns 0, else exit with its code.

    Both output streams are appended to run_dir/logs/rank-00003.log. Ctrl-C is left to the launcher and ignored here:
    `main` asks stop_requested(), and then returns 0. An exception, a code other than 0 and a deadly signal are recorded
    in run_dir/logs/error-00003.json. The rank ends with os._exit, since a process group or a thread that waits for lost
    peers would hold up an ordinary exit. So `main` has to close what it opens, and atexit handlers don't run.
    """
    _die_with(int(os.environ.get("ZINF_AGENT_PID", os.getppid())))
    rank = int(os.environ["RANK"])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _redirect_output(run_dir / rank_log(rank), rank)
    place = ErrorPlace(run_dir, rank)
    kills_before = oom_kills()
    signal.pthread_sigmask(signal.SIG_BLOCK, _GUARDED)
    guard = os.getpid()
    child = os.fork()
    _name_process(f"zinf {'guard' if child else 'rank'} {rank}")
    if child == 0:
        _die_with(guard)
        _leave_sigterm_to_launcher()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _GUARDED)
        code = 1
        try:
            code = _run_main(main, rank, place)
        finally:
            os._exit(code)
    code = _guard(child, kills_before, rank, place)
    if code != 0:
        os._exit(code)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _GUARDED)


def stop_requested() -> bool:
    """Whether the user has asked the run to stop at the end of the step. One rank calls this and tells the others.

    It reads a descriptor of the supervisor (launch/process_tree.py), so that a request needs no file on a drive.
    """
    descriptor = os.environ.get("ZINF_STOP")
    return descriptor is not None and os.fstat(int(descriptor)).st_size > 0


def _run_main(main: Callable[[], int], rank: int, place: ErrorPlace) -> int:
    """Run the rank to its end. Returns its exit code."""
    record = None
    code = 1
    try:
        code = main()
        if code != 0:
            ended = ReportedError(f"ended with exit code {code}", exit_code=code)
            record = ErrorRecord(rank, os.getpid(), ended.to_json())
    except BaseException as raised:
        known = raised if isinstance(raised, ZinfError) else ReportedError(f"{type(raised).__name__}: {raised}")
        text = "".join(traceback.format_exception(raised))
        record = ErrorRecord(rank, os.getpid(), known.to_json(), text, _is_secondary(raised))
        code = known.exit_code
    with suppress(OSError):  # a full disk must not hide the exit code
        if record is not None:
            place.write(record)
            print(record.traceback, end="", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
    if record is not None and record.secondary:
        time.sleep(_PATIENCE_S)
    return code


def _guard(child: int, kills_before: int | None, rank: int, place: ErrorPlace) -> int:
    """Wait for the rank, and record the signal that killed it, if any. Returns its exit code, as in a shell."""
    torn_down = False
    ended = 0
    while not ended:
        told = signal.sigwaitinfo(_GUARDED)  # if both are pending, SIGTERM comes first
        if told.si_signo == signal.SIGTERM and told.si_pid == os.getppid():  # from the agent
            torn_down = True
            os.kill(child, signal.SIGKILL)
        ended, status = os.waitpid(child, os.WNOHANG)
    if os.WIFEXITED(status):
        return os.WEXITSTATUS(status)
    number = signal.Signals(os.WTERMSIG(status))
    if number != signal.SIGKILL or not torn_down:
        error = RankError(_signal_line(number, kills_before))
        with suppress(OSError):
            place.write(ErrorRecord(rank, child, error.to_json()))
            print(error, file=sys.stderr)
    return 128 + number


def _signal_line(number: signal.Signals, oom_kills_before: int | None) -> str:
    killed = f"killed by {number.name}"
    if number != signal.SIGKILL:
        return f"{killed} ({signal.strsignal(number)})"
    kills = oom_kills()
    if kills is not None and oom_kills_before is not None and kills > oom_kills_before:
        return f"{killed}: the kernel's out-of-memory killer struck in this control group"
    return f"{killed}, as the kernel does when memory runs out; dmesg says whether it did"


def _is_secondary(error: BaseException) -> bool:
    """Whether a peer has caused `error`: by its loss, which torch.distributed, gloo and NCCL tell the other ranks, or
    by an error of its own that it has told (RankError)."""
    kinds: tuple[type[BaseException], ...] = (ConnectionError, RankError)
    if (dist := sys.modules.get("torch.distributed")) is not None:  # else the rank had no peers yet
        kinds += (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)
    return any(
        isinstance(link, kinds) or (isinstance(link, RuntimeError) and _PEER_MESSAGE.search(str(link)) is not None)
        for link in _causes(error)
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _redirect_output(log: Path, rank: int) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    reserve_behind(descriptor, _LOG_BYTES)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(descriptor, stream.fileno())
    os.close(descriptor)
    sys.stdout, sys.stderr = make_unfailing(sys.stdout), make_unfailing(sys.stderr)
    faulthandler.enable()
    print(f"--- rank {rank} on {socket.gethostname()}, {time.strftime('%Y-%m-%d %H:%M:%S')}")


def _leave_sigterm_to_launcher() -> None:
    """Do nothing at SIGTERM (launch/supervisor.py). Programs and forks of the rank obey it, so that it can end them."""
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    signal.siginterrupt(signal.SIGTERM, False)
    os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def _name_process(name: str) -> None:
    """Set the name that ps and top show. The kernel keeps 15 bytes of it."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when `parent` dies. If it has died already, end at once."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
