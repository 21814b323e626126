"""A headless Chromium, driven over its DevTools protocol: enough to open a page, read it, point at it and look at it.

Sequential on purpose: the event loop runs only inside a call, and what the browser says meanwhile waits in the socket.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-extensions",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--remote-debugging-port=0",
)


def find_chromium() -> str | None:
    """``$CHROMIUM``, or the first of the usual names on the path."""
    named = os.environ.get("CHROMIUM")
    return shutil.which(named) if named else next(filter(None, map(shutil.which, NAMES)), None)


class BrowserError(RuntimeError):
    """What the browser refused, or an exception in the page."""


class Browser:
    """One browser process. ``open`` makes a tab; leaving the ``with`` ends the process."""

    def __init__(self, executable: str, profile: Path) -> None:
        self._runner = asyncio.Runner()
        self._calls = 0
        self._pages: dict[str, Page] = {}
        command = [executable, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            self._runner.run(self._connect(self._address(profile / "DevToolsActivePort")))
        except BaseException:
            self.close()
            raise

    def _address(self, file: Path, patience: float = 60.0) -> str:
        """The port is the browser's choice; it writes it and the socket's path into its profile."""
        end = time.monotonic() + patience
        while time.monotonic() < end and self._process.poll() is None:
            lines = file.read_text().splitlines() if file.exists() else []
            if len(lines) == 2:
                return f"ws://127.0.0.1:{lines[0]}{lines[1]}"
            time.sleep(0.05)
        raise BrowserError(f"{self._process.args} did not start: exit status {self._process.poll()}")

    async def _connect(self, url: str) -> None:
        self._session = aiohttp.ClientSession()
        self._socket = await self._session.ws_connect(url, max_msg_size=0)

    def call(self, method: str, page: str | None = None, **parameters: Any) -> dict[str, Any]:
        """One command and its result; events that arrive before it go to their pages."""
        return self._runner.run(asyncio.wait_for(self._exchange(method, page, parameters), timeout=120))

    async def _exchange(self, method: str, page: str | None, parameters: dict[str, Any]) -> dict[str, Any]:
        self._calls += 1
        message = {"id": self._calls, "method": method, "params": parameters}
        await self._socket.send_str(json.dumps(message | ({"sessionId": page} if page else {})))
        while True:
            reply = await self._socket.receive_json()
            if reply.get("id") == message["id"]:
                if "error" in reply:
                    raise BrowserError(f"{method}: {reply['error']}")
                return reply["result"]
            if reply.get("sessionId") in self._pages:
                self._pages[reply["sessionId"]].heard(reply["method"], reply["params"])

    def open(self, file: Path, width: int = 1280, height: int = 900, dark: bool = False) -> Page:
        """A tab of ``width`` by ``height`` CSS pixels with ``file`` in it, when its script is done."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self._pages[session] = Page(self, session, target)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        page.call("Network.setCacheDisabled", cacheDisabled=True)
        page.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.call("Emulation.setEmulatedMedia", features=[scheme])
        page.call("Page.navigate", url=file.as_uri())
        page.wait("document.readyState === 'complete' && document.body?.dataset.state !== undefined")
        return page

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if hasattr(self, "_session"):
            self._runner.run(self._session.close())
        self._runner.close()
        self._process.terminate()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()


@dataclass
class Page:
    """A tab, and what it complained about and asked for."""

    browser: Browser
    session: str
    target: str
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def heard(self, method: str, event: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(event["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and event["type"] in ("error", "warning", "assert"):
            self.errors.append(json.dumps(event["args"]))
        elif method == "Log.entryAdded" and event["entry"]["level"] in ("error", "warning"):
            self.errors.append(event["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(event["request"]["url"])

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **parameters)

    def value(self, expression: str) -> Any:
        """What ``expression`` is in the page, as JSON; a promise is awaited."""
        options = {"returnByValue": True, "awaitPromise": True}
        reply = self.call("Runtime.evaluate", expression=expression, **options)
        if "exceptionDetails" in reply:
            details = reply["exceptionDetails"]
            raise BrowserError(f"{expression}: {details.get('exception', {}).get('description', details['text'])}")
        return reply["result"].get("value")

    def text(self, selector: str) -> str:
        """The visible text of the first element that matches."""
        return self.value(f"document.querySelector({json.dumps(selector)}).innerText")

    def texts(self, selector: str) -> list[str]:
        return self.value(f"[...document.querySelectorAll({json.dumps(selector)})].map((node) => node.innerText)")

    def wait(self, expression: str, patience: float = 60.0) -> None:
        end = time.monotonic() + patience
        while not self.value(f"Boolean({expression})"):
            if time.monotonic() > end:
                raise BrowserError(f"not true after {patience:.0f} s: {expression}; {self.errors}")
            time.sleep(0.05)

    def choose(self, selector: str, value: str) -> None:
        """Picks an option as a reader would."""
        self.value(
            f"{{ const node = document.querySelector({json.dumps(selector)}); node.value = {json.dumps(value)};"
            f" if (node.value !== {json.dumps(value)}) throw new Error('no such option');"
            " node.dispatchEvent(new Event('change', { bubbles: true })); }"
        )

    def point(self, x: float, y: float) -> None:
        """Moves the mouse to a place in the window (CSS pixels)."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def screenshot(self, path: Path, whole: bool = True) -> Path:
        """A PNG of the page, all of it or the window's part."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))
        return path

    def close(self) -> None:
        self.browser.call("Target.closeTarget", targetId=self.target)
        del self.browser._pages[self.session]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
