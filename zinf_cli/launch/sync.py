"""`--sync`: brings local files and folders, and zinf itself, to the same paths on every host.

It uses rsync if both ends have it, else SFTP. A file that the host has with the same size and time is not sent; on a
shared file system that is every file. A file appears whole or not at all. Files that only the host has stay. If a file
stands where a folder should be, rsync replaces it, and SFTP refuses.
"""

from __future__ import annotations

import re
import shlex
import shutil
import stat
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from paramiko import SFTPError
from paramiko.ssh_exception import SSHException

import zinf_cli
from zinf_cli.errors import HostError, PreflightError, inside
from zinf_cli.launch import clean_shell
from zinf_cli.launch.connection import at_all, find_ssh
from zinf_cli.launch.refusal import Refusal, patiently
from zinf_cli.launch.ssh import Files, Ssh
from zinf_cli.recipe.hosts import Host

OWN = Path(zinf_cli.__file__).parent
"""zinf itself. A host has to have the same."""
_RSYNC = (
    "rsync", "--recursive", "--copy-links", "--perms", "--times", "--relative", "--no-implied-dirs", "--exclude=*.pyc",
    "--exclude=__pycache__", "--stats", "--no-human-readable",
)  # fmt: skip


def sync(paths: Sequence[Path], hosts: Sequence[Host]) -> int:
    """Bring `paths` (absolute) to all hosts at once. Returns the bytes sent. PreflightError names what failed.

    Hosts that can't be reached are left out here: preflight says why.
    """
    for path in paths:
        if not path.exists():
            raise PreflightError(f"--sync: no such file or folder: {path}")
    ssh = find_ssh()
    try:
        results = at_all(lambda host: _bring([OWN, *paths], host, ssh), hosts)
    finally:
        ssh.close()
    problems = [result.line() for result in results if isinstance(result, HostError)]
    if problems:
        raise PreflightError("--sync: " + "; ".join(problems))
    return sum(results)


def _bring(paths: Sequence[Path], host: Host, ssh: Ssh) -> int:
    """Sync one host. Returns the bytes of the files that were sent."""
    try:
        files = ssh.files(host)
        has_rsync = files.succeeds("rsync --version")
    except HostError:
        return 0
    try:
        if has_rsync and files.shell is not None and shutil.which("rsync"):
            shell = files.shell
            return patiently(lambda: _by_rsync(paths, host, shell))
        return _by_sftp(paths, host, files)
    finally:
        files.close()


def _by_rsync(paths: Sequence[Path], host: Host, shell: Sequence[str]) -> int:
    name = f"[{host.host}]" if ":" in host.host else host.host
    clean = [sys.executable, "-I", str(clean_shell.__file__), f"zinf-{uuid.uuid4().hex}", str(len(shell))]
    command = [*_RSYNC, "--rsh", shlex.join([*clean, *shell]), *map(str, paths), f"{name}:/"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if "kex_exchange_identification" in done.stderr:
        raise Refusal(f"{host.name}: sshd has no room for another login", busy=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise HostError(said[0], where=host.name)
    sent = re.search(r"^Total transferred file size: (\d+)", done.stdout, re.MULTILINE)
    return int(sent[1]) if sent else 0


def _by_sftp(paths: Sequence[Path], host: Host, files: Files) -> int:
    sent = 0
    file = Path()
    try:
        sftp = files.sftp()
        made: set[Path] = set()
        for file in (file for path in paths for file in _local_files(path)):
            if not _is_there(sftp, file):
                _make_folder(sftp, file.parent, made)
                sent += _send(sftp, file)
    except OSError as error:
        raise HostError(error.strerror or str(error), where=inside(host.name, str(file))) from error
    except (SSHException, EOFError) as error:
        raise HostError(f"SFTP: {error or 'the host does not offer it'}", where=host.name) from error
    except SFTPError as error:
        raise HostError(f"SFTP: {error}", where=host.name, hint="does a login shell print text there?") from error
    return sent


def _local_files(path: Path) -> Iterator[Path]:
    found = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    yield from (file for file in found if file.suffix != ".pyc")


def _is_there(sftp: Any, file: Path) -> bool:
    here = file.stat()
    try:
        there = sftp.stat(str(file))
    except FileNotFoundError:
        return False
    return bool(there.st_size == here.st_size and there.st_mtime == int(here.st_mtime))


def _make_folder(sftp: Any, folder: Path, made: set[Path]) -> None:
    """Make a folder with its parents, as `mkdir -p`."""
    for part in reversed([folder, *folder.parents]):
        if part not in made:
            made.add(part)
            try:
                sftp.stat(str(part))
            except FileNotFoundError:
                sftp.mkdir(str(part))


def _send(sftp: Any, file: Path) -> int:
    """Send a file under another name, then rename it."""
    here, partial = file.stat(), f"{file}.partial"
    sftp.put(str(file), partial)
    sftp.chmod(partial, stat.S_IMODE(here.st_mode))
    sftp.utime(partial, (here.st_atime, int(here.st_mtime)))
    sftp.posix_rename(partial, str(file))
    return here.st_size
