"""A headless Chromium over its DevTools pipe: open a page, see its console, its requests, its DOM.

The protocol is JSON messages ended by a zero byte, on file descriptors 3 (to the browser) and 4
(from it), so nothing but the standard library is needed.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

FLAGS = [
    "--headless=new",
    "--no-sandbox",  # containers of CI run as root
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--remote-debugging-pipe",
    "about:blank",
]
# Puts our pipes on descriptors 3 and 4, by way of numbers that cannot clash with them.
LAUNCH = """
import fcntl, os, sys
ours = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3]]
os.dup2(ours[0], 3), os.dup2(ours[1], 4)
os.execvp(sys.argv[3], sys.argv[3:])
"""


def find_chromium() -> str | None:
    """Return the path of a Chromium or Chrome, None where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next((path for name in names if (path := shutil.which(name))), None)


@dataclass
class Page:
    """What a page did while it loaded, and a way to ask it more."""

    browser: "Browser"
    session: str
    target: str
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    loaded: bool = False

    def command(self, method: str, **params) -> dict:
        """Send one DevTools command to this page and return its result."""
        return self.browser.command(method, session=self.session, **params)

    def evaluate(self, expression: str):
        """Return the value of a JavaScript expression; a promise is awaited."""
        reply = self.command(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in reply:
            raise RuntimeError(f"JavaScript failed: {reply['exceptionDetails']}")
        return reply["result"].get("value")

    def wait_for(self, expression: str, seconds: float = 20) -> bool:
        """Poll an expression until it is true; False when the time is over."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.evaluate(expression):
                return True
            self.browser.listen(0.1)
        return False

    def screenshot(self, path: Path) -> None:
        """Write a PNG of the visible part of the page."""
        data = self.command("Page.captureScreenshot", format="png")["data"]
        Path(path).write_bytes(base64.b64decode(data))

    def close(self) -> None:
        """Close the page; the browser goes on."""
        self.browser.command("Target.closeTarget", targetId=self.target)
        del self.browser.pages[self.session]

    def note(self, method: str, params: dict) -> None:
        """Keep what an event says: errors of the console, addresses asked for, the load event."""
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Network.webSocketCreated":
            self.requests.append(params["url"])
        elif method == "Page.loadEventFired":
            self.loaded = True
        elif method == "Runtime.exceptionThrown":
            detail = params["exceptionDetails"]
            self.errors.append(detail.get("exception", {}).get("description", detail["text"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
            self.errors.append(" ".join(str(a.get("value", a)) for a in params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            entry = params["entry"]
            self.errors.append(f"{entry['text']} {entry.get('url', '')}".strip())


class Browser:
    """One headless Chromium; use it as a context manager."""

    def __init__(self, program: str, profile: Path):
        out_read, self._write = os.pipe()
        self._read, in_write = os.pipe()
        command = [sys.executable, "-c", LAUNCH, str(out_read), str(in_write), program, *FLAGS]
        self._process = subprocess.Popen(
            [*command, f"--user-data-dir={profile}"],
            pass_fds=(out_read, in_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(out_read)
        os.close(in_write)
        self._buffer = b""
        self._number = 0
        self._replies: dict[int, dict] = {}
        self.pages: dict[str, Page] = {}

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_) -> None:
        try:
            self.command("Browser.close", seconds=5)
            self._process.wait(10)
        except (OSError, RuntimeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        os.close(self._write)
        os.close(self._read)

    def command(self, method: str, session: str | None = None, seconds: float = 60, **params):
        """Send one command and return its result; events go to the pages they are about."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + seconds
        while message["id"] not in self._replies:
            if time.monotonic() > end:
                raise RuntimeError(f"Chromium did not answer {method} within {seconds} s")
            self.listen(0.2)
        reply = self._replies.pop(message["id"])
        if "error" in reply:
            raise RuntimeError(f"{method}: {reply['error']}")
        return reply["result"]

    def listen(self, seconds: float) -> None:
        """Read what the browser sends within so many seconds."""
        if not select.select([self._read], [], [], seconds)[0]:
            return
        data = os.read(self._read, 1 << 20)
        if not data:
            raise RuntimeError("Chromium ended by itself")
        *messages, self._buffer = (self._buffer + data).split(b"\0")
        for message in map(json.loads, messages):
            if "id" in message:
                self._replies[message["id"]] = message
            elif message.get("sessionId") in self.pages:
                self.pages[message["sessionId"]].note(message["method"], message["params"])

    def open(self, url: str, *, width: int = 1280, height: int = 900, dark: bool = False) -> Page:
        """Open a page, wait for its load event and a little longer for what its scripts start."""
        target = self.command("Target.createTarget", url="about:blank")["targetId"]
        attached = self.command("Target.attachToTarget", targetId=target, flatten=True)
        page = self.pages[attached["sessionId"]] = Page(self, attached["sessionId"], target)
        for domain in ("Network", "Page", "Runtime", "Log"):
            page.command(f"{domain}.enable")
        page.command(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.command("Emulation.setEmulatedMedia", features=[scheme])
        page.command("Page.navigate", url=url)
        end = time.monotonic() + 120  # for a busy machine: a page that hangs never loads
        while not page.loaded:
            if time.monotonic() > end:
                raise RuntimeError(f"{url} did not load within 120 s")
            self.listen(0.2)
        page.evaluate("new Promise(done => setTimeout(done, 300))")
        return page
