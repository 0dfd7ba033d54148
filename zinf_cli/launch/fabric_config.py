"""What fabric reads of an ssh configuration as OpenSSH does. The rest is refused by its line, never guessed.

fabric, and paramiko below it, take an unknown criterion of Match as met, leave Include out, read chains of jump hosts
backwards, and know no quotes, no comments behind a value and few keywords. So a host could be looked for in the wrong
place.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Set
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from paramiko.hostkeys import HostKeyEntry, InvalidHostKey
from paramiko.ssh_exception import SSHException

from zinf_cli.errors import HostError

INSTALL = "install OpenSSH's client, which zinf then uses (package openssh-client or openssh-clients)"
FILES = ("~/.ssh/config", "/etc/ssh/ssh_config")
_KNOWN_HOSTS = ("~/.ssh/known_hosts", "~/.ssh/known_hosts2")
_SYSTEM_KNOWN_HOSTS = ("/etc/ssh/ssh_known_hosts", "/etc/ssh/ssh_known_hosts2")

_READ = {
    "connecttimeout", "globalknownhostsfile", "hostname", "identitiesonly", "identityfile", "port", "user",
    "userknownhostsfile",
}  # fmt: skip
_WITHOUT_EFFECT = {
    "addkeystoagent", "batchmode", "canonicaldomains", "checkhostip", "clearallforwardings", "compression",
    "connectionattempts", "controlmaster", "controlpath", "controlpersist", "dynamicforward", "enableescapecommandline",
    "escapechar", "exitonforwardfailure", "fingerprinthash", "forwardagent", "forwardx11", "forwardx11timeout",
    "forwardx11trusted", "gssapiauthentication", "gssapidelegatecredentials", "hashknownhosts",
    "hostbasedauthentication", "ipqos", "kbdinteractiveauthentication", "localcommand", "localforward", "loglevel",
    "logverbose", "nohostauthenticationforlocalhost", "numberofpasswordprompts", "passwordauthentication",
    "permitlocalcommand", "permitremoteopen", "preferredauthentications", "pubkeyauthentication", "rekeylimit",
    "remotecommand", "remoteforward", "requesttty", "securitykeyprovider", "sendenv", "serveralivecountmax",
    "serveraliveinterval", "setenv", "streamlocalbindmask", "streamlocalbindunlink", "stricthostkeychecking",
    "syslogfacility", "tcpkeepalive", "tunnel", "tunneldevice", "updatehostkeys", "verifyhostkeydns", "visualhostkey",
    "xauthlocation",
}  # fmt: skip
"""Keywords that lead to no other host and to no weaker check, whether they are read or not."""
_PLAIN_COMMAND = re.compile(r"(?:[^|&;<>()$`\"'\\*?#%]|%[hpr])+")
"""A ProxyCommand that needs no shell: fabric starts it without one."""


def refuse_misread(name: str) -> None:
    """HostError if a line of the configuration, in a block that may be for host `name`, is not read as OpenSSH does."""
    for file in map(Path, FILES):
        for number, keyword, value in _lines_for(name, file.expanduser()):
            if (why := _misread(keyword, value)) is not None:
                raise HostError(f"{file}:{number}: {why} is not read without OpenSSH", hint=INSTALL)


def _lines_for(name: str, file: Path) -> Iterator[tuple[int, str, str]]:
    """Number, keyword in lower case and value of each line that may be for host `name`."""
    try:
        lines = file.read_text(errors="replace").splitlines()
    except OSError:
        return
    applies = True
    for number, line in enumerate(lines, 1):
        match = re.match(r"\s*(\w+)(?:\s*=\s*|\s+)(.*?)\s*$", line)
        if match is None:
            continue
        keyword, value = match[1].lower(), match[2]
        if keyword == "host":
            patterns = value.replace('"', " ").replace("[", "[[]").lower().split()
            applies = any(fnmatchcase(name.lower(), pattern) for pattern in patterns)
        elif keyword == "match":
            applies = True  # whatever its criteria are: the line itself is refused
        if applies:
            yield number, keyword, value


def _misread(keyword: str, value: str) -> str | None:
    """What of a line fabric does not read as OpenSSH does."""
    if keyword in _WITHOUT_EFFECT:
        return None
    if '"' in value or "'" in value:
        return "a quote"
    if re.search(r"(?:^|\s)#", value):
        return "a comment behind a value"
    if "${" in value:
        return "${...}"
    if keyword == "host" or keyword in _READ:
        return None
    if keyword == "canonicalizehostname" and value.lower() in ("no", "false"):
        return None
    if keyword == "proxycommand" and _PLAIN_COMMAND.fullmatch(value) and value.lower() != "none":
        return None
    if keyword == "proxyjump" and re.fullmatch(r"[\w.@:\[\]-]+", value) and value.lower() != "none":
        return None
    if keyword == "include" and all(name[0] == "/" and not any(Path("/").glob(name[1:])) for name in value.split()):
        return None  # as on a system without OpenSSH: there is nothing to include
    names = {"proxyjump": "this ProxyJump", "proxycommand": "this ProxyCommand"}
    return names.get(keyword, keyword)


class KnownHosts:
    """The known_hosts files that the configuration of a connection of fabric names."""

    def __init__(self, connection: Any) -> None:
        user = connection.ssh_config.get("userknownhostsfile", " ".join(_KNOWN_HOSTS)).split()
        system = connection.ssh_config.get("globalknownhostsfile", " ".join(_SYSTEM_KNOWN_HOSTS)).split()
        self.files = [Path(name).expanduser() for name in (*user, *system)]
        texts = [file.read_text(errors="replace") for file in self.files if file.is_file()]
        self._lines = [line.split() for text in texts for line in text.splitlines()]
        self.revoked: Set[str] = {line[3] for line in self._lines if line[:1] == ["@revoked"] and len(line) > 3}
        """Keys that a @revoked line names, for whatever host."""

    @property
    def has_more_than_is_read(self) -> bool:
        """Whether there are patterns or authorities: paramiko reads no patterns, and checks no host certificates."""
        return any(line[0] == "@cert-authority" or set(line[0]) & set("*?!") for line in self._lines if line)

    def entries(self) -> Iterator[HostKeyEntry]:
        """The entries that paramiko reads, without revoked keys."""
        for line in self._lines:
            if len(line) >= 3 and not line[0].startswith(("@", "#")) and line[2] not in self.revoked:
                with suppress(InvalidHostKey, SSHException, ValueError):
                    entry = HostKeyEntry.from_line(" ".join(line))
                    if entry is not None and entry.key is not None:
                        yield entry
