"""What the system's `ssh` says when it does not come through, as an error with its cause and the next step."""

from __future__ import annotations

import base64
import hashlib
import re
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from zinf_cli.launch.openssh_route import Route
from zinf_cli.launch.refusal import Refusal
from zinf_cli.launch.said import Said

_PROBE_S = 30.0
_OPEN_FAILED = r"open failed: (?:connect failed: )?(.+)$"


def refusal(said: Said, way: Route) -> Refusal:
    """The error for an ssh that ended before its login was done."""
    lines = said.lines
    text = "\n".join(lines)
    for pattern, explain in _CAUSES:
        if (match := re.search(pattern, text, re.MULTILINE)) is not None:
            return explain(match, way, text)
    proxy = way.settings.get("proxycommand", "none")
    if "kex_exchange_identification" in text or "Connection closed" in text or "Connection reset" in text:
        own = [line for line in lines if not line.startswith(("kex_exchange_identification", "Connection "))]
        if proxy != "none":
            why = f": {own[0]}" if own else ""
            return Refusal(f"its ProxyCommand ({proxy}) did not come through{why}", busy=not own)
        return Refusal(
            f"{_address(way)}: {own[0] if own else 'the connection was closed before the login'}",
            "sshd has no room for another login, or does not take any from here (its log says why)",
            busy=True,
        )
    return Refusal(f"SSH: {lines[-1] if lines else 'ended without a word'}")


def _address(way: Route) -> str:
    return f"{way.settings.get('hostname', way.destination.host)} port {way.settings.get('port', 22)}"


def _revoked(match: re.Match[str], way: Route, text: str) -> Refusal:
    listed = re.search(r"^Offending .*?in (.+)$", text, re.MULTILINE)
    where = f" in {listed[1]}" if listed is not None else ""
    return Refusal(
        f"its host key is revoked{where}: it shows {match[1]}, marked @revoked or in RevokedHostKeys",
        "another machine may be listening in; nothing was sent to it",
    )


def _changed(match: re.Match[str], way: Route, text: str) -> Refusal:
    listed = re.search(r"^Offending (?:key|.* key) in (.+):(\d+)$", text, re.MULTILINE)
    known = f", known is the one in line {listed[2]} of {listed[1]}" if listed is not None else ""
    shown = _shown_key(way)
    name = shown.split()[0] if shown else _key_name(way)
    add = f", then add this line: {shown}" if shown else ""
    return Refusal(
        f"its host key has changed: it shows {_fingerprint(shown) if shown else 'another one'}{known}",
        f"another machine may be listening in; if the host was set up anew: ssh-keygen -R '{name}'{add}",
    )


def _unknown(match: re.Match[str], way: Route, text: str) -> Refusal:
    known_hosts = way.settings.get("userknownhostsfile", "~/.ssh/known_hosts").split()[0]
    shown = _shown_key(way)
    if shown is None:
        return Refusal(f"its host key is not known (no {match[1]} key in {known_hosts})")
    return Refusal(
        f"its host key {_fingerprint(shown)} is not known",
        f"if it is the right one, add this line to {known_hosts}: {shown}",
    )


def _not_accepted(match: re.Match[str], way: Route, text: str) -> Refusal:
    hint = "zinf asks for no password; add a key: ssh-copy-id, ssh-add, or IdentityFile in ~/.ssh/config"
    because = [
        line for line in text.splitlines() if re.search("no such identity|signing failed|too open|Load key", line)
    ]
    why = f" ({'; '.join(because[:3])})" if because else ""
    return Refusal(f"no key of yours is accepted for user {way.settings.get('user', '?')}{why}", hint)


def _too_many_keys(match: re.Match[str], way: Route, text: str) -> Refusal:
    return Refusal(
        f"too many keys were offered for user {way.settings.get('user', '?')}, and none of those was accepted",
        "name the right one: IdentityFile with IdentitiesOnly yes in ~/.ssh/config",
    )


def _no_address(match: re.Match[str], way: Route, text: str) -> Refusal:
    return Refusal(f"no address is known for the name {match[1]}", "see HostName in ~/.ssh/config, or /etc/hosts")


def _no_connection(match: re.Match[str], way: Route, text: str) -> Refusal:
    refused = match[2] == "Connection refused"
    return Refusal(f"{match[1]}: {match[2]}", "is sshd running there?" if refused else None)


def _not_from_hop(match: re.Match[str], way: Route, text: str) -> Refusal:
    why = match[1]
    if way.hop is None:
        return Refusal(f"{_address(way)}: {why}")
    if "refused by peer" in why:  # all that a shared connection tells; one of its own tells more
        to = f"[{way.settings.get('hostname', way.destination.host)}]:{way.settings.get('port', 22)}"
        with suppress(subprocess.TimeoutExpired):
            probe = subprocess.run(
                way.hop.command("-W", to), stdin=subprocess.DEVNULL, capture_output=True, timeout=_PROBE_S, check=False
            )
            told = re.search(_OPEN_FAILED, probe.stderr.decode(errors="replace"), re.MULTILINE)
            why = told[1].strip() if told is not None else why
    hint = "is sshd running there?" if why == "Connection refused" else None
    return Refusal(f"{_address(way)}, from jump host {way.hop.destination}: {why}", hint)


def _no_answer(match: re.Match[str], way: Route, text: str) -> Refusal:
    return Refusal(f"{_address(way)}: no answer in time ({match[1]})", "is the host overloaded, or a firewall between?")


def _no_common(match: re.Match[str], way: Route, text: str) -> Refusal:
    return Refusal(f"{_address(way)}: {match[1]}", "this machine's ssh and that sshd have to be allowed a common one")


_CAUSES: tuple[tuple[str, Callable[[re.Match[str], Route, str], Refusal]], ...] = (
    (r"^The (\S+ host key) for .* is marked as revoked", _revoked),
    (r"(?:Host key .*|host certificate) revoked", _revoked),
    (r"^Host key for (.+) has changed and you have requested strict checking", _changed),
    (r"^No (\S+) host key is known for (.+) and you have requested strict checking", _unknown),
    (r"Too many authentication failures", _too_many_keys),
    (r"Permission denied \((.+)\)", _not_accepted),
    (r"Could not resolve hostname ([^:]*):", _no_address),
    (r"connect to host (.+ port \d+): (.+?)$", _no_connection),
    (r"(Unable to negotiate with .*)$", _no_common),
    (r"(Connection timed out during banner exchange|Connection to .* timed out)", _no_answer),
    (_OPEN_FAILED, _not_from_hop),
    (r"(?i)stdio forwarding (?:request )?failed: (.+)$", _not_from_hop),
)
"""What ssh says, and the error for it. The first that fits counts."""


def _shown_key(way: Route) -> str | None:
    """The host's key as a line of known_hosts, from a connection that offers no key of the user's."""
    with tempfile.TemporaryDirectory(prefix="zinf-") as folder:
        file = Path(folder) / "shown"
        options = {
            "StrictHostKeyChecking": "accept-new", "UserKnownHostsFile": file, "GlobalKnownHostsFile": "/dev/null",
            "HashKnownHosts": "no", "PreferredAuthentications": "none", "ControlPath": "none",
        }  # fmt: skip
        command = way.command(*(word for name, value in options.items() for word in ("-o", f"{name}={value}")))
        try:
            subprocess.run(
                [*command, "true"], stdin=subprocess.DEVNULL, capture_output=True, timeout=_PROBE_S, check=False
            )
            return file.read_text().splitlines()[0]
        except (OSError, IndexError, subprocess.TimeoutExpired):
            return None


def _fingerprint(line: str) -> str:
    """`ssh-ed25519 SHA256:...` of a line of known_hosts."""
    _, kind, key = line.split()[:3]
    digest = base64.b64encode(hashlib.sha256(base64.b64decode(key)).digest()).decode().rstrip("=")
    return f"{kind} SHA256:{digest}"


def _key_name(way: Route) -> str:
    """Under which known_hosts has the key."""
    name, port = way.settings.get("hostname", way.destination.host), way.settings.get("port", "22")
    return name if port == "22" else f"[{name}]:{port}"
