"""Ordinary ssh configurations, tried with real servers: what works for `ssh HOST` works for zinf.

The configurations stand in one file, each under an alias of its own, so that one launcher tries all of them at once.
fabric, which is for machines without OpenSSH, reads some of them as OpenSSH does, and refuses the others by their line.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest

from lab import Lab, LabHost, loopback_lab, wait_until
from programs import command

pytestmark = pytest.mark.xdist_group("ssh")  # one lab
THOROUGH = int(os.environ.get("ZINF_FAULT_MOMENTS", "1")) > 1
NOWHERE = "nowhere" + 60 * "e"
"""A name that no server of names is asked for: its label is too long."""
TCSH, FISH = shutil.which("tcsh"), shutil.which("fish")


@dataclass(frozen=True)
class Case:
    """Lines of a configuration that lead to a host of the lab, and whether fabric reads them as OpenSSH does."""

    lines: str
    leads_to: str = "plain"
    fabric: bool = False


CASES = {
    "include": Case("Include {folder}/included"),  # the first: in a block, it would count for that alone
    "plain": Case("Host {name}\n HostName {plain}", fabric=True),
    "user-port": Case("Host {name}\n HostName {plain}\n User root\n Port {port}", fabric=True),
    "key-alias": Case("Host {name}\n HostName {plain}\n HostKeyAlias the-key\n UserKnownHostsFile {folder}/alias"),
    "wildcard": Case("Host {name}\n HostName {plain}\n UserKnownHostsFile {folder}/wildcard"),
    "hashed": Case("Host {name}\n HostName {plain}\n UserKnownHostsFile {folder}/hashed", fabric=True),
    "authority": Case("Host {name}\n HostName {certified}\n UserKnownHostsFile {folder}/authority", "certified"),
    "others-revoked": Case("Host {name}\n HostName {plain}\n UserKnownHostsFile {folder}/others", fabric=True),
    "certificate": Case(
        "Host {name}\n HostName {certified}\n IdentitiesOnly yes\n IdentityFile {folder}/certified\n"
        " CertificateFile {folder}/certified-cert.pub",
        "certified",
    ),
    "jump": Case("Host {name}\n HostName {plain}\n ProxyJump {jump}:{port}", fabric=True),
    "two-jumps": Case("Host {name}\n HostName {plain}\n ProxyJump {jump}:{port},{second}:{port}"),
    "jump-of-a-jump": Case(
        "Host {name}\n HostName {plain}\n ProxyJump {name}-b\n"
        "Host {name}-b\n HostName {second}\n ProxyJump {jump}:{port}",
        fabric=True,
    ),
    "jump-none": Case(
        "Host {name}-j\n ProxyJump none\n HostName {jump}\nHost {name}*\n HostName {plain}\n ProxyJump {name}-j"
    ),
    "proxy-command": Case("Host {name}\n HostName {plain}\n ProxyCommand {python} {passes} %h %p", fabric=True),
    "pipe": Case("Host {name}\n HostName {plain}\n ProxyCommand cat | {python} {passes} %h %p | cat"),
    "original-name": Case(
        "Host {name}\n HostName {plain}\n ProxyCommand sh -c 'test %n = {name} && exec {python} {passes} %h %p'"
    ),
    "variable": Case("Host {name}\n HostName {plain}\n IdentityFile ${{HOME}}/.ssh/id_ed25519"),
    "quotes": Case('Host "{name}"\n HostName "{plain}"\n IdentityFile "{folder}/a key"'),
    "comment": Case("Host {name} # as I call it\n HostName {plain} # where it is"),
    "absent-key": Case("Host {name}\n HostName {plain}\n IdentityFile {folder}/absent", fabric=True),
    "canonical": Case("Host {name}\n HostName {plain}\n CanonicalizeHostname yes\n CanonicalDomains invalid"),
    "match": Case(
        "Match canonical host {name}\n HostName 127.0.0.1\nMatch host {name} exec false\n HostName 127.0.0.1\n"
        "Match originalhost {name}\n HostName {plain}"
    ),
    "LETTER-case": Case("Host {name}\n HostName {plain}", fabric=True),
    "sntrup": Case("Host {name}\n HostName {sntrup}", "sntrup"),
    "chacha": Case("Host {name}\n HostName {chacha}", "chacha"),
    "remote-command": Case("Host {name}\n HostName {plain}\n RemoteCommand tmux\n RequestTTY yes", fabric=True),
    "forward": Case(
        "Host {name}\n HostName {plain}\n LocalForward {jump}:{port} localhost:1\n ExitOnForwardFailure yes",
        fabric=True,
    ),
    "master": Case(
        "Host {name}\n HostName {plain}\n ControlMaster auto\n ControlPersist yes\n ControlPath {folder}/%C",
        fabric=True,
    ),
    "bash": Case("Host {name}\n HostName {bash}", "bash", fabric=True),
    "tcsh": Case("Host {name}\n HostName {tcsh}", "tcsh", fabric=True),
    "fish": Case("Host {name}\n HostName {fish}", "fish", fabric=True),
}
SHELLS = {
    "bash": "HOME={folder} SHLVL=0 exec bash -c",
    "tcsh": f"HOME={{folder}} exec {TCSH} -c",
    "fish": f"HOME={{folder}} exec {FISH} -c",
}
SERVERS = ("plain", "jump", "second", "certified", "sntrup", "chacha", "bash", "tcsh", "fish")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with loopback_lab(tmp_path_factory.mktemp("lab"), len(SERVERS)) as lab:
        _make_keys(lab)
        _change_servers(lab)
        (lab.folder / "included").write_text(f"Host include\n HostName {server(lab, 'plain').name}\n")
        (lab.folder / "sockets").mkdir()
        lab.environment["XDG_RUNTIME_DIR"] = str(lab.folder / "sockets")
        yield lab


@pytest.fixture
def fabric(lab: Lab) -> dict[str, str]:
    """Variables of a launcher that finds no `ssh`."""
    nothing = lab.folder / "nothing"
    nothing.mkdir(exist_ok=True)
    return {"PATH": str(nothing)}


@pytest.fixture(params=["OpenSSH", "fabric"])
def by(request: pytest.FixtureRequest, fabric: dict[str, str]) -> dict[str, str]:
    """Variables of a launcher that uses one or the other."""
    return fabric if request.param == "fabric" else {}


def here() -> dict[str, Case]:
    """The cases for which this machine has the shell."""
    shells = {"tcsh": TCSH, "fish": FISH}
    return {name: case for name, case in CASES.items() if shells.get(name, "here") is not None}


def server(lab: Lab, name: str) -> LabHost:
    return lab.hosts[SERVERS.index(name)]


def _make_keys(lab: Lab) -> None:
    """A certificate authority, what it has signed, a key under a name with a space, known_hosts files of all kinds."""
    folder, plain = lab.folder, server(lab, "plain")
    for name in ("authority-key", "certified"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    sign = ["ssh-keygen", "-q", "-s", str(folder / "authority-key"), "-I", "x"]
    subprocess.run([*sign, "-n", "root", str(folder / "certified.pub")], check=True)
    subprocess.run([*sign, "-h", str(server(lab, "certified").folder / "host_key.pub")], check=True)
    shutil.copy(lab.home / ".ssh" / "id_ed25519", folder / "a key")
    key = (plain.folder / "host_key.pub").read_text().strip()
    other = (server(lab, "jump").folder / "host_key.pub").read_text().strip()
    authority = (folder / "authority-key.pub").read_text().strip()
    (folder / "alias").write_text(f"the-key {key}\n")
    (folder / "wildcard").write_text(f"[127.*]:* {key}\n")
    (folder / "authority").write_text(f"@cert-authority *,[127.*]:* {authority}\n")
    (folder / "others").write_text(
        f"@revoked * {other}\n@cert-authority * {authority}\n[{plain.name}]:{plain.port} {key}\n"
    )
    (folder / "revoked").write_text(f"@revoked * {key}\n[{plain.name}]:{plain.port} {key}\n")
    (folder / "hashed").write_text(f"[{plain.name}]:{plain.port} {key}\n")
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", str(folder / "hashed")], capture_output=True, check=True)
    (folder / ".bashrc").write_text('echo \'{"event": "hello", "python": "3"}\'; echo \'{"answer": 1}\'; printf half\n')
    (folder / ".tcshrc").write_text("echo hello; echo -n half\n")
    (folder / ".config" / "fish").mkdir(parents=True)
    (folder / ".config" / "fish" / "config.fish").write_text("echo -n half a line\n")


def _change_servers(lab: Lab) -> None:
    certified = server(lab, "certified")
    lab.restart(
        certified,
        f"HostCertificate {certified.folder}/host_key-cert.pub",
        f"TrustedUserCAKeys {lab.folder}/authority-key.pub",
    )
    lab.restart(server(lab, "sntrup"), "KexAlgorithms sntrup761x25519-sha512@openssh.com")
    lab.restart(server(lab, "chacha"), "Ciphers chacha20-poly1305@openssh.com")
    for name, shell in SHELLS.items():
        lab.restart(server(lab, name), f'ForceCommand {shell.format(folder=lab.folder)} "$SSH_ORIGINAL_COMMAND"')
    lab.restart(server(lab, "jump"), "MaxStartups 10:30:100")


def configure(lab: Lab, *texts: str) -> None:
    """Write the configuration, each text for an alias; {plain} and so on stand for addresses of the lab's hosts."""
    ssh = lab.home / ".ssh"
    addresses = {name: server(lab, name).name for name in SERVERS}
    common = {
        "folder": lab.folder, "port": lab.hosts[0].port, "python": sys.executable,
        "passes": command("passes_on")[1],
    }  # fmt: skip
    shared = (
        f"Host *\n Port {lab.hosts[0].port}\n IdentityFile {ssh}/id_ed25519\n UserKnownHostsFile {ssh}/known_hosts\n"
    )
    (ssh / "config").write_text("\n".join([text.format(**addresses, **common) for text in texts] + [shared]))


def connect(lab: Lab, names: Sequence[str], **variables: str) -> list[str]:
    """By one launcher: for each host its name in the lab, or the error."""
    (lab.folder / "hosts").write_text("".join(f"{name} slots=1\n" for name in names))
    done = subprocess.run(
        command("connects", lab.folder / "hosts"),
        env={**lab.environment, **variables}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads(done.stdout)
    return found


def nothing_is_left(lab: Lab) -> bool:
    return not lab.connections() and not lab.processes() and not list((lab.folder / "sockets").iterdir())


def test_what_works_for_ssh_works_here(lab: Lab) -> None:
    cases = here()
    configure(lab, *(case.lines.replace("{name}", name) for name, case in cases.items()))
    found = dict(zip(cases, connect(lab, list(cases)), strict=True))
    assert found == {name: server(lab, case.leads_to).name for name, case in cases.items()}
    assert nothing_is_left(lab)


def test_what_fabric_reads_as_openssh_does_works_without_openssh(lab: Lab, fabric: dict[str, str]) -> None:
    cases = {name: case for name, case in here().items() if case.fabric}
    configure(lab, *(case.lines.replace("{name}", name) for name, case in cases.items()))
    found = dict(zip(cases, connect(lab, list(cases), **fabric), strict=True))
    assert found == {name: server(lab, case.leads_to).name for name, case in cases.items()}
    assert nothing_is_left(lab)


def test_what_fabric_would_misread_is_refused_without_openssh(lab: Lab, fabric: dict[str, str]) -> None:
    cases = {name: case for name, case in here().items() if not case.fabric}
    for_all = ("include", "match")  # these lines are not for one host alone
    for group in ([name for name in cases if name not in for_all], *([name] for name in for_all)):
        configure(lab, *(cases[name].lines.replace("{name}", name) for name in group))
        for name, said in zip(group, connect(lab, group, **fabric), strict=True):
            assert said.startswith(f"{name}: "), said
            assert "install OpenSSH's client" in said


def test_what_does_not_come_through_is_named_with_its_hop_and_cause(lab: Lab, by: dict[str, str]) -> None:
    folder = lab.folder
    plain, jump, second = (server(lab, name).name for name in ("plain", "jump", "second"))
    cases = {
        "revoked": (f"HostName {{plain}}\n UserKnownHostsFile {folder}/revoked", ["its host key is revoked"]),
        "refused": (
            f"HostName {{plain}}\n IdentityFile {folder}/absent\n IdentitiesOnly yes\n User nobody-here",
            ["no key of yours is accepted for user nobody-here", f"no such identity: {folder}/absent"],
        ),
        "lost-name": (f"HostName {NOWHERE}", [f"no address is known for the name {NOWHERE}"]),
        "dead-hop": (
            "HostName {plain}\n ProxyJump {jump}:1",
            [f": its jump host {jump}", f"{jump} port 1: Connection refused (is sshd running there?)"],
        ),
        "lost-hop": (f"HostName {{plain}}\n ProxyJump {NOWHERE}", [f"its jump host {NOWHERE}: no address is known"]),
        "unknown-hop": (
            "HostName {plain}\n ProxyJump unknown-hop-j\nHost unknown-hop-j\n HostName {jump}\n"
            f" UserKnownHostsFile {folder}/alias",
            ["its jump host unknown-hop-j: its host key ssh-ed25519 SHA256:", f"add this line to {folder}/alias: "],
        ),
        "behind-hop": (
            "HostName {plain}\n Port 1\n ProxyJump {jump}:{port}",
            [f"{plain} port 1, from jump host {jump}", ": Connect"],
        ),
        "circle": ("ProxyJump circle-b", ["its jump hosts lead in a circle"]),
        "circle-b": ("ProxyJump circle", ["its jump hosts lead in a circle"]),
    }
    if not by:
        cases["second-hop"] = (
            "HostName {plain}\n ProxyJump {jump}:{port},{second}:1",
            [f"its jump host {second}:1: {second} port 1, from jump host {jump}:", "Connection refused"],
        )
        cases["proxy"] = ("HostName {plain}\n ProxyCommand echo no way >&2; exit 1", ["its ProxyCommand (", "no way"])
    configure(lab, *(f"Host {name}\n {text}" for name, (text, _) in cases.items()))
    known_hosts = lab.known_hosts.read_text()
    for name, said in zip(cases, connect(lab, list(cases), **by), strict=True):
        assert said.startswith(f"{name}: "), said
        for words in cases[name][1]:
            assert words in said, said
    assert lab.known_hosts.read_text() == known_hosts
    assert nothing_is_left(lab)


def test_many_hosts_behind_one_come_up_however_few_logins_it_takes_at_a_time(lab: Lab, by: dict[str, str]) -> None:
    configure(lab, "Host many-*\n HostName {plain}\n ProxyJump {jump}:{port}")
    assert connect(lab, [f"many-{number}" for number in range(24)], **by) == [server(lab, "plain").name] * 24
    assert nothing_is_left(lab)


@pytest.mark.skipif(not THOROUGH, reason="takes ten seconds: make test-faults")
def test_logins_that_a_server_has_no_room_for_are_tried_again(lab: Lab, by: dict[str, str]) -> None:
    """As each host is reached by a command of the user's own, none shares a connection with another."""
    configure(lab, "Host many-*\n HostName {jump}\n ProxyCommand {python} {passes} %h %p")
    assert connect(lab, [f"many-{number}" for number in range(24)], **by) == [server(lab, "jump").name] * 24
    assert nothing_is_left(lab)


def test_the_right_key_among_many_of_an_agent(lab: Lab, by: dict[str, str]) -> None:
    other = "Host other\n HostName {plain}\n UserKnownHostsFile {folder}/others\n IdentityFile {folder}/absent"
    configure(lab, "Host only\n HostName {plain}\n IdentitiesOnly yes")
    agent = lab.folder / "agent"
    process = subprocess.Popen(["ssh-agent", "-D", "-a", str(agent)], stdout=subprocess.DEVNULL)
    try:
        wait_until(agent.exists, 10)
        for number in range(8):
            key = lab.folder / f"wrong-{number}"
            if not key.exists():
                subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
            adding = {**os.environ, "SSH_AUTH_SOCK": str(agent)}
            subprocess.run(["ssh-add", "-q", str(key)], env=adding, capture_output=True, check=True)
        (only,) = connect(lab, ["only"], SSH_AUTH_SOCK=str(agent), **by)
        (lab.home / ".ssh" / "config").write_text(other.format(folder=lab.folder, plain=server(lab, "plain").name))
        with (lab.home / ".ssh" / "config").open("a") as config:
            config.write(f"\n Port {lab.hosts[0].port}\n")
        (any_key,) = connect(lab, ["other"], SSH_AUTH_SOCK=str(agent), **by)
    finally:
        process.terminate()
        process.wait()
        agent.unlink(missing_ok=True)
    assert only == server(lab, "plain").name
    assert "too many keys were offered" in any_key


def test_a_killed_launcher_leaves_no_connection(lab: Lab, by: dict[str, str]) -> None:
    jumps = "{jump}:{port}" if by else "{jump}:{port},{second}:{port}"
    configure(lab, f"Host behind\n HostName {{plain}}\n ProxyJump {jumps}")
    (lab.folder / "hosts").write_text("behind slots=1\n")
    launcher = subprocess.Popen(
        command("connects", lab.folder / "hosts", "wait"),
        env={**lab.environment, **by}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert launcher.stdout is not None
    assert json.loads(launcher.stdout.readline()) == [server(lab, "plain").name]
    sockets = list((lab.folder / "sockets").rglob("s"))
    assert len(sockets) == (0 if by else 2)
    assert all(path.parent.stat().st_mode & 0o777 == 0o700 for path in sockets)
    launcher.send_signal(signal.SIGKILL)
    launcher.communicate()
    wait_until(lambda: nothing_is_left(lab), 10)


def test_a_login_of_the_users_own_leads_on(lab: Lab) -> None:
    """Where there is no other way in, as with a second factor: a master that the user has opened before."""
    host = "Host own\n HostName {jump}\n ControlPath {folder}/own\n"
    behind = "Host behind\n HostName {plain}\n ProxyJump own"
    configure(lab, host)
    master = subprocess.Popen(["ssh", "-MN", "own"], env=lab.environment)
    try:
        wait_until((lab.folder / "own").exists, 10)
        configure(lab, f"{host} IdentityAgent none\n User nobody-here", behind)
        assert connect(lab, ["own", "behind"]) == [server(lab, name).name for name in ("jump", "plain")]
        assert master.poll() is None
    finally:
        master.terminate()
        master.wait()
    assert "its jump host own: no key of yours" in connect(lab, ["behind"])[0]


def test_a_server_that_gives_no_answer_is_waited_for_as_long_as_configured(lab: Lab, by: dict[str, str]) -> None:
    configure(lab, "Host stuck\n HostName {second}\n ConnectTimeout 1")
    process = server(lab, "second").process
    assert process is not None
    process.send_signal(signal.SIGSTOP)  # the kernel still takes connections
    try:
        (said,) = connect(lab, ["stuck"], **by)
    finally:
        process.send_signal(signal.SIGCONT)
    assert f"stuck: {server(lab, 'second').name} port {lab.hosts[0].port}: no answer" in said
