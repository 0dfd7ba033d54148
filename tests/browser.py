"""A headless Chromium opens pages for tests and tells what it sees. It is asked by a pipe (--remote-debugging-pipe)."""

from __future__ import annotations

import base64
import fcntl
import io
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_QUIET = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-sync")


class Browser:
    """One tab. `complaints` are errors and warnings of its console, and what it failed to load."""

    def __init__(self, to: int, back: io.FileIO) -> None:
        self._to, self._back = to, back
        self._count, self._rest, self._session = 0, b"", ""
        self.complaints: list[str] = []
        self._loaded = False
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for part in ("Page", "Runtime", "Log"):
            self.ask(f"{part}.enable")

    def open(self, page: Path, width: int, scheme: str) -> None:
        """Show a page in a window `width` pixels wide; `scheme` is light or dark."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self._loaded = False
        self.ask("Page.navigate", url=page.absolute().as_uri())
        while not self._loaded:
            self._take(self._next())

    def value(self, expression: str) -> Any:
        """What an expression of JavaScript is in the page."""
        found = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def picture(self, path: Path, height: int) -> None:
        """Write what the window shows, down to `height`, as PNG."""
        width = self.value("innerWidth")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        taken = self.ask("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(taken["data"]))

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the DevTools protocol, and its result."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._count:
            self._take(answer)
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            data = self._back.read(1 << 16)
            assert data, "the browser has gone"
            self._rest += data
        message, _, self._rest = self._rest.partition(b"\0")
        document: dict[str, Any] = json.loads(message)
        return document

    def _take(self, event: dict[str, Any]) -> None:
        """Note an event."""
        name, told = event.get("method"), event.get("params", {})
        self._loaded = self._loaded or name == "Page.loadEventFired"
        if name == "Log.entryAdded" and told["entry"]["level"] in ("warning", "error"):
            self.complaints.append(told["entry"]["text"])
        if name == "Runtime.exceptionThrown" or (name == "Runtime.consoleAPICalled" and told["type"] != "log"):
            self.complaints.append(json.dumps(told))


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A browser with a new profile in the folder `profile`. CHROMIUM has to be there."""
    assert CHROMIUM is not None
    (their_in, to), (back, their_out) = os.pipe(), os.pipe()
    high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 10) for descriptor in (their_in, their_out)]

    def descriptors_3_and_4() -> None:
        os.dup2(high[0], 3)
        os.dup2(high[1], 4)

    process = subprocess.Popen(
        [CHROMIUM, *_QUIET, f"--user-data-dir={profile}", "--remote-debugging-pipe"],
        stderr=subprocess.DEVNULL,
        preexec_fn=descriptors_3_and_4,
        pass_fds=(3, 4),
    )
    for descriptor in (their_in, their_out, *high):
        os.close(descriptor)
    with open(back, "rb", buffering=0) as answers:  # noqa: PTH123
        try:
            yield Browser(to, answers)
        finally:
            process.kill()  # its children go when they notice; asked to close, it takes 20 s
            process.wait()
            os.close(to)
