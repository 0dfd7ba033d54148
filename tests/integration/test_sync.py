"""`--sync`: what is brought to hosts, what is left alone, what is said when it can't be."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import Lab, namespace_lab, wait_until
from programs import command

pytestmark = pytest.mark.xdist_group("sync")  # one lab for each way


MISSING = {"rsync": (), "SFTP": ("rsync",), "SFTP by fabric": ("rsync", "ssh")}
"""Way to what the launcher has not."""


@pytest.fixture(scope="module", params=MISSING)
def way(request: pytest.FixtureRequest) -> str:
    if request.param == "rsync" and shutil.which("rsync") is None:
        pytest.skip("no rsync here")
    return str(request.param)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, way: str) -> Iterator[Lab]:
    with namespace_lab(tmp_path_factory.mktemp("lab"), 2) as lab:
        lab.without(*MISSING[way])
        yield lab


def sync(lab: Lab, path: Path) -> subprocess.CompletedProcess[str]:
    """As the launcher does it."""
    words = [*lab.launcher, *command("sync_to_hosts", lab.hostfile(), path)]
    return subprocess.run(words, env=lab.environment, capture_output=True, text=True, check=False)


def test_a_folder_is_brought_once_and_only_what_changed_after_that(lab: Lab) -> None:
    data = lab.folder / "local" / "a model" / "deep"
    data.mkdir(parents=True)
    (data / "weights").write_bytes(os.urandom(100_000))
    (data.parent / "run me").write_text("#!/bin/sh\n")
    (data.parent / "run me").chmod(0o755)
    (lab.hosts[1].local / "a model").mkdir()
    (lab.hosts[1].local / "a model" / "its own").write_text("stays")

    assert sync(lab, data.parent).stdout == f"{2 * 100_010}\n"
    for host in lab.hosts:
        there = host.local / "a model"
        assert (there / "deep" / "weights").read_bytes() == (data / "weights").read_bytes()
        assert (there / "run me").stat().st_mode & 0o777 == 0o755
        assert not list(there.rglob("*.partial"))
    assert (lab.hosts[1].local / "a model" / "its own").read_text() == "stays"

    assert sync(lab, data.parent).stdout == "0\n"
    (data / "weights").write_bytes(b"new")
    assert sync(lab, data.parent).stdout == "6\n"
    assert (lab.hosts[0].local / "a model" / "deep" / "weights").read_bytes() == b"new"


def test_what_can_not_be_brought_is_named_with_its_host(lab: Lab) -> None:
    data = lab.folder / "local" / "data"
    data.write_text("text")
    (lab.hosts[1].local / "data" / "a folder where a file should be").mkdir(parents=True)
    said = sync(lab, data).stderr
    assert "PreflightError: --sync: node2: " in said
    assert str(data).removeprefix("/") in said  # rsync names it from the root
    assert "no such file or folder" in sync(lab, lab.folder / "nothing").stderr


def test_sftp_leaves_a_file_where_a_folder_should_be(lab: Lab, way: str) -> None:
    if way == "rsync":
        pytest.skip("rsync replaces it")
    data = lab.folder / "local" / "more data"
    data.mkdir(parents=True)
    (data / "text").write_text("text")
    (lab.hosts[1].local / "more data").write_text("a file where a folder should be")
    said = sync(lab, data).stderr
    assert "PreflightError: --sync: node2: " in said
    assert str(data) in said
    assert (lab.hosts[1].local / "more data").read_text() == "a file where a folder should be"


def test_a_login_shell_may_print_what_it_likes(lab: Lab, way: str) -> None:
    if way != "rsync":
        pytest.skip("sshd answers SFTP itself here, without a shell")
    host = lab.hosts[1]
    config = host.folder / "sshd_config"
    config.write_text('ForceCommand printf "half a line"; exec sh -c "$SSH_ORIGINAL_COMMAND"\n' + config.read_text())
    assert host.process is not None
    (sshd,) = Path(f"/proc/{host.process.pid}/task/{host.process.pid}/children").read_text().split()
    os.kill(int(sshd), signal.SIGHUP)
    wait_until(lambda: (lab.folder / "node2.log").read_text().count("listening on") == 2, 10)
    data = lab.folder / "local" / "told"
    data.write_text("text")
    assert sync(lab, data).stdout == f"{2 * 4}\n"
    assert (host.local / "told").read_text() == "text"


def test_the_way_may_lead_through_another_host(lab: Lab, way: str) -> None:
    config = lab.home / ".ssh" / "config"
    plain = config.read_text()
    config.write_text(f"Host node2\n  ProxyJump node1\n{plain}")
    data = lab.folder / "local" / "passed on"
    data.write_text("text")
    try:
        assert sync(lab, data).stdout == f"{2 * 4}\n"
    finally:
        config.write_text(plain)
    assert (lab.hosts[1].local / "passed on").read_text() == "text"
