"""A headless Chromium, spoken to over pipes in the DevTools protocol, where one is installed."""

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

# Chromium reads commands from descriptor 3 and answers on 4; both are first moved out of the way.
_START = (
    "import fcntl, os, sys; "
    "ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]; "
    "os.dup2(ends[0], 3); os.dup2(ends[1], 4); os.execv(sys.argv[3], sys.argv[3:])"
)
_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe")


class Browser:
    """One page of a browser; `complaints` are exceptions and what the page's policy refused."""

    def __init__(self, commands: BinaryIO, answers: BinaryIO) -> None:
        self._commands, self._answers = commands, answers
        self._number = 0
        self._page: str | None = None
        self.complaints: list[str] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._page = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._call(f"{domain}.enable")
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=1300,
            height=1000,
            deviceScaleFactor=1,
            mobile=False,
        )

    def open(self, file: Path, fragment: str = "") -> None:
        """Go to a file, and wait until its script has run."""
        self._call("Page.navigate", url="about:blank")
        self._call("Page.navigate", url=f"{file.as_uri()}{fragment}")
        while self.value("document.readyState + location.protocol") != "completefile:":
            pass

    def visit(self, address: str) -> None:
        """Go to a page of a server, and wait until its script has run."""
        self._call("Page.navigate", url=address)
        while self.value("document.readyState + location.protocol") != "completehttp:":
            pass

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives, as JSON values."""
        found = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, key: str, code: int) -> None:
        """Press and let go of a key, of this Windows key code."""
        for kind in ("keyDown", "keyUp"):
            self._call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code
            )

    def prefer(self, scheme: str) -> None:
        """Ask pages for a `light` or `dark` look."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self._call("Emulation.setEmulatedMedia", features=[feature])

    def screenshot(self, file: Path) -> None:
        """Write what is seen as PNG."""
        file.write_bytes(base64.b64decode(self._call("Page.captureScreenshot")["data"]))

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._page is not None:
            message["sessionId"] = self._page
        self._commands.write(json.dumps(message).encode() + b"\0")
        self._commands.flush()
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            if answer.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.complaints.append(json.dumps(answer["params"]))

    def _read(self) -> dict[str, Any]:
        found = bytearray()
        while (byte := self._answers.read(1)) != b"\0":
            assert byte, "the browser ended"
            found += byte
        return json.loads(found)


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A browser with its profile in a folder, which ends with the block."""
    assert CHROMIUM is not None
    (their_read, our_write), (our_read, their_write) = os.pipe(), os.pipe()
    start = [sys.executable, "-c", _START, str(their_read), str(their_write), CHROMIUM, *_FLAGS]
    with (
        open(our_write, "wb") as commands,
        open(our_read, "rb") as answers,
        subprocess.Popen(
            [*start, f"--user-data-dir={profile}"],
            pass_fds=(their_read, their_write),
            stderr=subprocess.DEVNULL,
        ) as process,
    ):
        os.close(their_read)
        os.close(their_write)
        try:
            yield Browser(commands, answers)
        finally:
            process.terminate()
