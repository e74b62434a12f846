"""A real headless Chromium, driven through ChromeDriver by the W3C WebDriver protocol, which is JSON over HTTP.

Of a client library these tests would need one in a hundred lines, and it would look for browsers in the network.
"""

import base64
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAMS = {name: shutil.which(name) for name in ("chromium", "chromedriver")}

QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip

KEYS = {"Tab": "\ue004", "ArrowLeft": "\ue012", "ArrowRight": "\ue014", "Home": "\ue011", "Escape": "\ue00c"}
"""Key codes of the protocol: https://www.w3.org/TR/webdriver2/#keyboard-actions"""

STARTS_WITHIN = 30.0
SHOWS_WITHIN = 10.0


class Browser:
    """One session."""

    def __init__(self, url: str) -> None:
        """Take the address of a running session."""
        self._url, self._scripts = url, True

    def open(self, page: Path) -> None:
        """Show a file, read anew; on return it is whole."""
        # Between two readings of one address ChromeDriver may take the first for the second.
        self._post("/url", url="about:blank")
        self._post("/url", url=page.as_uri())
        give_up = time.monotonic() + SHOWS_WITHIN
        # ChromeDriver takes the end of the empty page for the end of this one when the machine is busy.
        while self._scripts and self.run("return document.readyState") != "complete":
            if time.monotonic() > give_up:
                raise TimeoutError(f"{page} was not read within {SHOWS_WITHIN:.0f} s")
            time.sleep(0.01)

    def run(self, script: str, *arguments: Any) -> Any:
        """The value that a script's body returns."""
        return self._post("/execute/sync", script=script, args=list(arguments))

    def press(self, key: str) -> None:
        """One key, down and up."""
        taps = [{"type": kind, "value": KEYS.get(key, key)} for kind in ("keyDown", "keyUp")]
        self._post("/actions", actions=[{"type": "key", "id": "keyboard", "actions": taps}])

    def resize(self, width: int, height: int, *, scheme: str = "light") -> None:
        """What a page sees: the width of its window in CSS pixels, and the system's colours."""
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._chrome("Emulation.setDeviceMetricsOverride", **screen)
        self._chrome("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def without_scripts(self, off: bool = True) -> None:
        """As a reader who forbids scripts; from the next page on."""
        self._scripts = not off
        self._chrome("Emulation.setScriptExecutionDisabled", value=off)

    def media(self, kind: str) -> None:
        """``print`` as on paper, nothing for the screen."""
        self._chrome("Emulation.setEmulatedMedia", media=kind)

    def snapshot(self) -> list[str]:
        """Texts of the accessibility tree: what is shown, also where no script may run."""
        nodes = self._chrome("Accessibility.getFullAXTree")["nodes"]
        return [str(node.get("name", {}).get("value", "")) for node in nodes if not node["ignored"]]

    def shows(self, text: str) -> bool:
        """Whether a text is shown; the tree follows a page that was just read with a delay."""
        give_up = time.monotonic() + SHOWS_WITHIN
        while not (found := text in "\n".join(self.snapshot())) and time.monotonic() < give_up:
            time.sleep(0.05)
        return found

    def screenshot(self, file: Path, *, whole: bool = True) -> None:
        """The page, or what is in the window, as PNG."""
        shot = self._chrome("Page.captureScreenshot", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(shot["data"]))

    def log(self, kind: str) -> list[dict[str, Any]]:
        """New entries of ``browser`` (the console) or ``performance`` (among others, the network)."""
        found: list[dict[str, Any]] = self._post("/se/log", type=kind)
        return found

    def requests(self) -> list[str]:
        """Addresses that the page asked for since the last call."""
        messages = [json.loads(entry["message"])["message"] for entry in self.log("performance")]
        sent = [message for message in messages if message["method"] == "Network.requestWillBeSent"]
        return [message["params"]["request"]["url"] for message in sent]

    def _chrome(self, command: str, **parameters: Any) -> Any:
        return self._post("/goog/cdp/execute", cmd=command, params=parameters)

    def _post(self, path: str, **body: Any) -> Any:
        return _send("POST", self._url + path, body)


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """A browser with an empty profile of its own, gone at the end."""
    driver = subprocess.Popen(
        [str(PROGRAMS["chromedriver"]), "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        root = f"http://127.0.0.1:{_port(driver)}/session"
        # An empty first page: the usual one of a new browser asks the network for a search box.
        blank = {"session.restore_on_startup": 4, "session.startup_urls": ["about:blank"]}
        arguments = [*QUIET, f"--user-data-dir={profile}"]
        options = {"binary": PROGRAMS["chromium"], "args": arguments, "prefs": blank}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
        session = _send("POST", root, {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
        try:
            yield Browser(f"{root}/{session}")
        finally:
            _send("DELETE", f"{root}/{session}", None)
    finally:
        driver.terminate()
        driver.wait()
        assert driver.stdout is not None
        driver.stdout.close()


def _port(driver: "subprocess.Popen[str]") -> int:
    """The port that ChromeDriver chose, which it prints."""
    assert driver.stdout is not None
    give_up = time.monotonic() + STARTS_WITHIN
    while time.monotonic() < give_up:
        line = driver.stdout.readline()
        if "successfully on port" in line:
            return int(line.rstrip().rstrip(".").rsplit(" ", 1)[1])
    raise TimeoutError(f"ChromeDriver did not start within {STARTS_WITHIN:.0f} s")


def _send(method: str, url: str, body: Mapping[str, Any] | None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())["value"]
    except urllib.error.HTTPError as error:
        with error:
            raise RuntimeError(f"{method} {url}: {error.read().decode()[:2000]}") from error
