"""A headless Chromium over its DevTools protocol: enough of a WebSocket client to open a page, type and look."""

import base64
import itertools
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import tempfile
import threading
import time
import urllib.request

PATH = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))),
    None,
)
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--remote-debugging-port=0",
)


class Browser:
    """One page of one browser with a profile of its own. Use as a context manager."""

    def __init__(self, width: int, height: int = 900):
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.process = subprocess.Popen(
            [PATH, *FLAGS, f"--user-data-dir={self.folder.name}", "about:blank"],
            stderr=subprocess.PIPE,
            text=True,
        )
        port = next(
            int(found[1])
            for line in self.process.stderr
            if (found := re.search(r"ws://127\.0\.0\.1:(\d+)/", line))
        )
        self.drain = threading.Thread(target=self.process.stderr.read)
        self.drain.start()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as answer:
            page = next(target for target in json.load(answer) if target["type"] == "page")
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=30)
        self.file = self.socket.makefile("rb")
        path = page["webSocketDebuggerUrl"].split(str(port), 1)[1]
        lines = [
            f"GET {path} HTTP/1.1",
            f"Host: 127.0.0.1:{port}",
            "Upgrade: websocket",
            "Connection: Upgrade",
            "Sec-WebSocket-Version: 13",
        ]
        lines += [f"Sec-WebSocket-Key: {base64.b64encode(os.urandom(16)).decode()}", "", ""]
        self.socket.sendall("\r\n".join(lines).encode())
        while self.file.readline() != b"\r\n":
            pass
        self.numbers, self.events = itertools.count(1), []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 500,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()
        self.socket.close()
        self.process.terminate()
        self.process.wait(20)
        self.drain.join(20)
        self.process.stderr.close()
        self.folder.cleanup()

    def call(self, method: str, **params):
        """Send a command, note the events that come before its answer."""
        number = next(self.numbers)
        data, mask = json.dumps({"id": number, "method": method, "params": params}).encode(), os.urandom(4)
        size = bytes([0x80 | len(data)]) if len(data) < 126 else b"\xfe" + struct.pack(">H", len(data))
        self.socket.sendall(b"\x81" + size + mask + bytes(b ^ mask[i % 4] for i, b in enumerate(data)))
        while True:
            message = self._read()
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    def _read(self):
        content = b""
        while True:
            first, size = self.file.read(2)
            if size > 125:
                size = struct.unpack(
                    *((">H", self.file.read(2)) if size == 126 else (">Q", self.file.read(8)))
                )[0]
            content += self.file.read(size)
            if first & 0x80:
                return json.loads(content)

    def js(self, code: str):
        """The value of an expression in the page."""
        found = self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, code: str, seconds: float = 20):
        """Wait until an expression is true."""
        until = time.monotonic() + seconds
        while not self.js(code):
            assert time.monotonic() < until, code
            time.sleep(0.03)

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def type(self, field: str, text: str) -> None:
        self.js(f"document.getElementById('{field}').focus()")
        self.call("Input.insertText", text=text)

    def press(self, key: str, code: int) -> None:
        for kind in ("rawKeyDown", "char", "keyUp"):
            text = {"text": " "} if key == " " and kind == "char" else {}
            if kind != "char" or text:
                self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **text)

    def problems(self) -> list:
        """What the page complained about: script errors, the content policy, requests that failed."""
        kinds = ("Runtime.exceptionThrown", "Log.entryAdded", "Network.loadingFailed")
        return [event for event in self.events if event["method"] in kinds]

    def hosts(self) -> set[str]:
        """Schemes and hosts that were asked."""
        urls = [
            event["params"]["request"]["url"]
            for event in self.events
            if event["method"] == "Network.requestWillBeSent"
        ]
        return {re.match(r"[a-z]+:(//[^/]+)?", url)[0] for url in urls}
