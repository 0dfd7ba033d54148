"""`python -m benchmarks.played_hosts SOCKET HOPS`: one process that plays many hosts, for benchmarks.scale.

To the launcher each of them is a supervisor (zinf_cli/launch/supervisor.py) behind a link with latency: it logs in,
greets, answers, beats every second, tells what its processes take, and mirrors the logs of its ranks. What a host does
not do is compute. The first one asks the real zinf for the figures of the recipe, as an agent does.

A launch goes like this: ranks start and write; after STEADY_S every rank writes a burst; BURST_S later one rank fails,
and then, by its loss, all others.
"""

from __future__ import annotations

import base64
import heapq
import json
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

from zinf_cli.errors import RankError
from zinf_cli.launch.patience import Patience
from zinf_cli.launch.transport import SILENCE_S
from zinf_cli.run_folder.names import error_file, rank_log
from zinf_cli.search_path import module_command
from zinf_cli.version import code_digest

LATENCY_S = 0.05
"""One way."""
LOGIN_S = 17 * LATENCY_S
"""Nine round trips of a login by OpenSSH, without the last way back: TCP, versions, two of key exchange, service, two
of a key, session, command."""
FACTS_S = 0.5
"""What `python -m zinf_cli.launch.facts` takes on a host."""
RANKS = 8
STEADY_S, BURST_S = 8.0, 12.0
LINE_EVERY_S = 5.0
"""Each rank writes a line of its log so often."""
LINE = base64.b64encode(b"a line of a rank, as long as such lines are, with a number: 0.1234".ljust(80) + b"\n")
"""In base 64, which for 81 bytes has no padding, so that copies can stand behind each other."""
BURST_LINES = 400
"""Each rank writes so many at once: 32 KiB."""
FAILING = 4001
"""The rank that fails first, modulo their number."""
_FACTS = {
    "code": code_digest(), "torch": "2.13.0", "accelerators": 0, "memory": 2**40, "paths": {}, "memlock": -1,
    "huge_pages": "madvise", "cores": 64, "drives": {},
}  # fmt: skip


@dataclass
class Played:
    """A host."""

    link: socket.socket
    number: int
    outgoing: bytearray = field(default_factory=bytearray)
    incoming: bytes = b""
    patience: Patience = field(default_factory=lambda: Patience(SILENCE_S))
    written: list[int] = field(default_factory=lambda: [0] * RANKS)
    """Bytes of each rank's log."""
    trains: bool = False


class World:
    """All hosts, at the end of `hops` links. `say` is called with what has happened, for whoever measures."""

    def __init__(self, say: Callable[[str], None], hops: int) -> None:
        self._say = say
        self._latency_s = hops * LATENCY_S
        self._ready = selectors.DefaultSelector()
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()
        self._hosts: dict[int, Played] = {}
        self._training = 0
        self._over = False

    def at(self, seconds: float, action: Callable[[], None]) -> None:
        """Do something in so many seconds."""
        heapq.heappush(self._due, (time.monotonic() + seconds, next(self._numbers), action))

    def serve(self, path: str) -> None:
        """Play until the launcher has closed all links that it has opened."""
        with socket.socket(socket.AF_UNIX) as door:
            door.bind(path)
            door.listen(4096)
            self._ready.register(door, selectors.EVENT_READ)
            self._say("open")
            while not self._over:
                wait = self._due[0][0] - time.monotonic() if self._due else 1.0
                for key, events in self._ready.select(max(0.0, wait)):
                    if key.fileobj is door:
                        self._welcome(door.accept()[0])
                        continue
                    host: Played = key.data
                    if events & selectors.EVENT_WRITE:
                        self._flush(host)
                    if events & selectors.EVENT_READ:
                        self._receive(host)
                now = time.monotonic()
                while self._due and self._due[0][0] <= now:
                    heapq.heappop(self._due)[2]()

    def _welcome(self, link: socket.socket) -> None:
        number = int.from_bytes(link.recv(4), "big")
        link.setblocking(False)
        host = Played(link, number)
        self._hosts[number] = host
        self._ready.register(link, selectors.EVENT_READ, host)
        self.at(LOGIN_S, lambda: self._send(host, {"event": "hello", "python": "3.11.2", "visible": ""}))
        self.at(LOGIN_S, lambda: self._beat(host))

    def _receive(self, host: Played) -> None:
        try:
            data = host.link.recv(1 << 16)
        except ConnectionResetError:
            data = b""
        if not data:
            self._leave(host)
            return
        host.patience.renew()
        *lines, host.incoming = (host.incoming + data).split(b"\n")
        for line in filter(None, lines):
            self._answer(host, json.loads(line))

    def _leave(self, host: Played) -> None:
        self._ready.unregister(host.link)
        host.link.close()
        del self._hosts[host.number]
        self._over = not self._hosts

    def _answer(self, host: Played, request: Mapping[str, Any]) -> None:
        do: str | None = request.get("do")
        answer: Any = None
        if do == "run" and request["command"] == module_command("zinf_cli.launch.facts"):
            paths = json.loads(request["text"])["paths"]
            output = json.dumps({**_FACTS, "paths": dict.fromkeys(paths, "the same"), "time": time.time()})
            self._later(host, {"event": "ended", "code": 0, "output": output, "errors": ""}, FACTS_S)
        elif do == "run":
            self._start(host)
        elif do == "stand_by" and json.loads(request["opening"]):
            threading.Thread(target=self._find_figures, args=(host, request["opening"])).start()
        elif do == "listen":
            answer = {"address": "10.0.0.1", "port": 4000}
        elif do == "reach":
            answer = "eth0"
        elif do == "open_folder":
            answer = False
        elif do == "kill" and host.trains:
            self._end(host)
        if do is not None:
            self._later(host, {"answer": answer})

    def _later(self, host: Played, message: Mapping[str, Any], seconds: float = 0.0) -> None:
        """Send an answer to what will only arrive in a while."""
        self.at(self._latency_s + seconds, lambda: self._send(host, message))

    def _find_figures(self, host: Played, question: str) -> None:
        done = subprocess.run(module_command("zinf_cli.train.question"), input=question, capture_output=True, text=True)
        for line in done.stdout.splitlines():  # how far it is, and then the answer
            self.at(0.0, partial(self._send, host, {"event": "said", "line": line}))

    def _start(self, host: Played) -> None:
        host.trains = True
        self._training += 1
        self.at(self._latency_s, lambda: self._write(host))
        self.at(self._latency_s, lambda: self._measure(host))
        if self._training == len(self._hosts):
            self._say("started")
            self.at(STEADY_S, self._burst)
            self.at(STEADY_S + BURST_S, self._fail)

    def _beat(self, host: Played) -> None:
        if self._hosts.get(host.number) is host:
            self._put(host, b"\n")  # how late it is makes no difference
            if host.patience.is_over:
                self._say(f"silent {host.number}")
            self.at(1.0, lambda: self._beat(host))

    def _measure(self, host: Played) -> None:
        if host.trains:
            self._send(host, {"event": "vitals", "memory": 2**36, "read": 2**36, "written": 2**36})
            self.at(1.0, lambda: self._measure(host))

    def _write(self, host: Played) -> None:
        for local in range(RANKS) if host.trains else ():
            self._append(host, local, LINE)
        if host.trains:
            self.at(LINE_EVERY_S, lambda: self._write(host))

    def _burst(self) -> None:
        """Within a second: this process must not be silent meanwhile, as many hosts would not be."""
        self._say("burst")
        data = LINE * BURST_LINES
        for number, host in enumerate(self._hosts.values()):
            for local in range(RANKS):
                self.at(number / len(self._hosts), partial(self._append, host, local, data))

    def _append(self, host: Played, local: int, lines: bytes) -> None:
        """Mirror what a rank has added to its log: `lines` in base 64."""
        self._file(host, rank_log(host.number * RANKS + local), host.written[local], lines)
        host.written[local] += len(lines) * 3 // 4

    def _file(self, host: Played, path: str, offset: int, data: bytes) -> None:
        text = b'{"event": "file", "path": "%s", "offset": %d, "data": "%s"}\n' % (path.encode(), offset, data)
        self.at(self._latency_s, partial(self._put, host, text))

    def _fail(self) -> None:
        """One rank fails. A second later all others do, because of it, and every agent ends."""
        self._say("failed")
        first = FAILING % (len(self._hosts) * RANKS)
        self._record(self._hosts[first // RANKS], first % RANKS, "out of memory", secondary=False)
        self._end(self._hosts[first // RANKS])
        self.at(1.0, lambda: self._fail_by(first))

    def _fail_by(self, first: int) -> None:
        for number, host in enumerate(self._hosts.values()):
            self.at(number / len(self._hosts), partial(self._fail_on, host, first))

    def _fail_on(self, host: Played, first: int) -> None:
        for local in range(RANKS) if host.trains else ():
            if host.number * RANKS + local != first:
                self._record(host, local, "a peer was lost", secondary=True)
        self._end(host)

    def _record(self, host: Played, local: int, message: str, *, secondary: bool) -> None:
        rank = host.number * RANKS + local
        error = RankError(message).to_json()
        record = {
            "rank": rank, "pid": rank, "error": error, "traceback": 'File "a.py", line 1, in a\n' * 40,
            "secondary": secondary, "host": f"node{host.number}", "time": time.time(),
        }  # fmt: skip
        self._file(host, error_file(rank), 0, base64.b64encode(json.dumps(record).encode()))

    def _end(self, host: Played) -> None:
        if host.trains:
            host.trains = False
            self._send(host, {"event": "ended", "code": 1, "output": "", "errors": ""})

    def _send(self, host: Played, message: Mapping[str, Any]) -> None:
        data = json.dumps(message).encode() + b"\n"
        self.at(self._latency_s, lambda: self._put(host, data))

    def _put(self, host: Played, data: bytes) -> None:
        if self._hosts.get(host.number) is host:
            host.outgoing += data
            self._flush(host)

    def _flush(self, host: Played) -> None:
        try:
            del host.outgoing[: host.link.send(host.outgoing)]
        except BlockingIOError:
            pass
        except OSError:
            host.outgoing.clear()
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if host.outgoing else 0)
        self._ready.modify(host.link, wanted, host)


def main() -> None:
    World(lambda word: print(f"{time.time()} {word}", flush=True), int(sys.argv[2])).serve(sys.argv[1])


if __name__ == "__main__":
    main()
