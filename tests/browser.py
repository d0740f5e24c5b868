"""A headless Chromium for tests of pages, spoken to over its pipe of the DevTools protocol.

A plugin: a test module that wants its fixture says `pytest_plugins = "browser"`. PYTEST_DONT_REWRITE: the
modules import its class before pytest could rewrite it.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from select import select
from typing import Any

import pytest

TIMEOUT_S = 30
FLAGS = (
    "--no-first-run",
    "--mute-audio",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--autoplay-policy=no-user-gesture-required",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
)
PROGRAMS = ("chromium", "chromium-browser", "google-chrome")


class Browser:
    """One page. `errors`: what its console complained of since `open`; `requests`: the addresses that it asked for."""

    def __init__(self, program: str, profile: Path) -> None:
        commands, self._commands = _high_pipe()
        self._answers, answers = _high_pipe()
        flags = ["--headless", "--remote-debugging-pipe", f"--user-data-dir={profile}", *FLAGS]
        flags += ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's sandbox refuses root
        # The browser reads from 3 and writes to 4, which may be something else here.
        start = f"import os, sys; os.dup2({commands}, 3); os.dup2({answers}, 4); os.execvp(sys.argv[1], sys.argv[1:])"
        self._process = subprocess.Popen(
            [sys.executable, "-c", start, program, *flags, "about:blank"],
            pass_fds=(commands, answers),
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self._buffer, self._last, self._session = b"", 0, None
        self.events: list[dict[str, Any]] = []
        pages = self.call("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in pages if target["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(TIMEOUT_S)
        os.close(self._commands)
        os.close(self._answers)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._last += 1
        message = {"id": self._last, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._last:
                assert "error" not in answer, f"{method}: {answer['error']['message']}"
                return answer["result"]

    def wait_for(self, method: str, **params: Any) -> dict[str, Any]:
        """The first event of that name, of those since `open` and those to come, with these parameters."""
        seen = iter(list(self.events))
        while True:
            event = next(seen, None) or self._next()
            if event.get("method") == method and params.items() <= event["params"].items():
                return event["params"]

    def open(self, page: Path | str) -> None:
        """page: a file, or an address."""
        self.events.clear()
        self.call("Page.navigate", url=page if isinstance(page, str) else page.resolve().as_uri())
        self.wait_for("Page.loadEventFired")

    def run(self, script: str) -> Any:
        """What a JavaScript expression gives, or the promise that it gives; as if the user had clicked."""
        options = {"awaitPromise": True, "returnByValue": True, "userGesture": True}
        answer = self.call("Runtime.evaluate", expression=script, **options)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def upload(self, selector: str, path: Path) -> None:
        """Choose a file in the page's input for files."""
        found = self.call("Runtime.evaluate", expression=f"document.querySelector({selector!r})")["result"]
        self.call("DOM.setFileInputFiles", objectId=found["objectId"], files=[str(path.resolve())])

    def screen(self, width: int, *, dark: bool = False) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path) -> None:
        picture = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(picture))

    @property
    def errors(self) -> list[str]:
        kinds = ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled")
        return [json.dumps(event["params"]) for event in self.events if event["method"] in kinds]

    @property
    def requests(self) -> list[str]:
        sent = [event for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]

    def _next(self) -> dict[str, Any]:
        """The next message; events are kept."""
        end = time.monotonic() + TIMEOUT_S
        while b"\0" not in self._buffer:
            ready, _, _ = select([self._answers], [], [], max(0.0, end - time.monotonic()))
            assert ready, "the browser does not answer"
            part = os.read(self._answers, 1 << 20)
            assert part, "the browser has ended"
            self._buffer += part
        message, self._buffer = self._buffer.split(b"\0", 1)
        content = json.loads(message)
        if "method" in content:
            self.events.append(content)
        return content


def _high_pipe() -> tuple[int, int]:
    """A pipe whose ends are not 3 and 4, which the browser's own shall be."""
    ends = os.pipe()
    high = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
    for end in ends:
        os.close(end)
    return high


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip("no Chromium to look at the page with")
    opened = Browser(program, tmp_path_factory.mktemp("browser"))
    yield opened
    opened.close()
