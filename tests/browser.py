"""A headless Chromium, driven over its DevTools protocol."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

from tests import programs

START_S = 40.0
WAIT_S = 30.0
_UNTIL = """
new Promise((resolve, reject) => {
  const end = performance.now() + %d;
  const look = () => {
    let found;
    try { found = (%s); } catch (error) { found = null; }
    if (found) resolve(found);
    else if (performance.now() > end) reject(new Error("waited in vain"));
    else setTimeout(look, 20);
  };
  look();
})
"""


class Page:
    """One tab, in a context of its own: no storage or cookies of others."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._last_id = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session, self._context = attached["sessionId"], context
        for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol; what the page tells meanwhile goes to `events`."""
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._socket.send(json.dumps(message))
        while True:
            got: dict[str, Any] = json.loads(self._socket.recv(timeout=WAIT_S + 15))
            if got.get("id") == self._last_id:
                assert "error" not in got, f"{method}: {got['error']}"
                result: dict[str, Any] = got["result"]
                return result
            self.events.append(got)

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression, awaited if it is a promise."""
        got = self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in got, (expression, got["exceptionDetails"])
        return got["result"].get("value")

    def until(self, expression: str, wait_s: float = WAIT_S) -> Any:
        """Wait until an expression is true in the page; return its value."""
        return self.evaluate(_UNTIL % (1000 * wait_s, expression))

    def show(self, url: str, width: int, height: int, *, is_dark: bool = False) -> None:
        """Open an address in a window of this size."""
        is_phone = width < 600
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=2 if is_phone else 1, mobile=is_phone,
        )  # fmt: skip
        self.call("Emulation.setTouchEmulationEnabled", enabled=is_phone)
        self.scheme("dark" if is_dark else "light")
        self.call("Page.navigate", url=url)

    def scheme(self, name: str) -> None:
        """Prefer a colour scheme."""
        feature = {"name": "prefers-color-scheme", "value": name}
        self.call("Emulation.setEmulatedMedia", features=[feature])

    def centre(self, selector: str) -> tuple[float, float, float, float]:
        """Scroll an element into view; return its centre and size."""
        x, y, width, height = self.evaluate(
            f"""(() => {{ const element = document.querySelector({json.dumps(selector)});
            element.scrollIntoView({{block: "center", behavior: "instant"}});
            const box = element.getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2, box.width, box.height]; }})()"""
        )
        return x, y, width, height

    def click(self, selector: str) -> None:
        """Click an element with the mouse."""
        x, y, *_ = self.centre(selector)
        self._mouse("mousePressed", x, y)
        self._mouse("mouseReleased", x, y)

    def drag(self, points: list[tuple[float, float]], *, is_touch: bool = False) -> None:
        """Draw a stroke with the mouse or a finger."""
        for index, (x, y) in enumerate(points):
            if is_touch:
                kind = "touchMove" if index else "touchStart"
                self.call("Input.dispatchTouchEvent", type=kind, touchPoints=[{"x": x, "y": y}])
            else:
                self._mouse("mouseMoved" if index else "mousePressed", x, y)
        if is_touch:
            self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        else:
            self._mouse("mouseReleased", *points[-1])

    def _mouse(self, kind: str, x: float, y: float) -> None:
        self.call(
            "Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1
        )

    def key(self, name: str, code: int, text: str = "") -> None:
        """Press a key."""
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=name, code=name,
                windowsVirtualKeyCode=code, text=text if kind == "keyDown" else "",
            )  # fmt: skip

    def upload(self, selector: str, path: Path) -> None:
        """Choose a file in a file input."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def screenshot(self, path: Path) -> None:
        """Write a PNG of the whole page."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        got = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(got["data"]))

    def complaints(self) -> list[str]:
        """Return the errors and warnings that the page and the browser logged."""
        self.evaluate("0")
        found = []
        for event in self.events:
            params = event.get("params", {})
            kind = params.get("type") or params.get("entry", {}).get("level")
            is_said = event.get("method") in ("Runtime.consoleAPICalled", "Log.entryAdded")
            is_bad = is_said and kind in ("error", "warning", "assert")
            if is_bad or event.get("method") == "Runtime.exceptionThrown":
                found.append(json.dumps(params)[:600])
        return found

    def requested(self) -> set[str]:
        """Return the addresses that the page asked for over a network."""
        urls = {
            event["params"]["request"]["url"]
            for event in self.events
            if event.get("method") == "Network.requestWillBeSent"
        }
        return {url for url in urls if not url.startswith(("data:", "blob:", "about:"))}

    def close(self) -> None:
        """Close the tab and forget its storage."""
        self._session = None
        self.call("Target.disposeBrowserContext", browserContextId=self._context)


class Browser:
    """A browser that runs."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket

    @contextmanager
    def page(self) -> Iterator[Page]:
        """Open a tab and close it at the end."""
        made = Page(self._socket)
        try:
            yield made
        finally:
            made.close()


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """Start Chromium with a profile in a folder, and end it."""
    program = programs.require("chromium")
    command = [program, "--headless=new", "--remote-debugging-port=0", f"--user-data-dir={folder}"]
    command += [
        "--no-first-run",
        "--disable-gpu",
        "--disable-background-networking",
        "--mute-audio",
    ]
    command += ["--disable-component-update", "--disable-sync", "--hide-scrollbars"]
    command += ["--disable-dev-shm-usage"]
    if os.geteuid() == 0:
        # Chromium's sandbox does not work for root.
        command.append("--no-sandbox")
    log = (folder.parent / "chromium.log").open("wb")
    process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        port, path = _address(folder, process, Path(log.name))
        url = f"ws://127.0.0.1:{port}{path}"
        with connect(url, max_size=None, proxy=None, open_timeout=START_S) as socket:
            yield Browser(socket)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        log.close()


def _address(folder: Path, process: subprocess.Popen[bytes], log: Path) -> tuple[str, str]:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            port, path = (folder / "DevToolsActivePort").read_text().split("\n")[:2]
            return port, path
        except (FileNotFoundError, ValueError):
            time.sleep(0.05)
    raise AssertionError(f"Chromium did not start: {log.read_text(errors='replace')[-2000:]}")
