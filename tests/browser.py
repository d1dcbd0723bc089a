"""A real browser for tests: headless Chromium, spoken to through its DevTools pipe with the standard library alone.

`find_chromium()` gives the program or None. A `Browser` is one process with a profile of its own, ended by its own id;
a `Tab` opens an address, presses keys, drops files, and remembers what went wrong in it (exceptions, refusals).
"""

import base64
import contextlib
import json
import os
import select
import shutil
import signal
import tempfile
import time
from pathlib import Path

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
    "--remote-debugging-pipe",
]


def find_chromium():
    """The browser's program, or None; it is started in a way that Windows does not have."""
    if os.name == "nt":
        return None
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next((found for name in names if (found := shutil.which(name))), None)


class Browser:
    """One process; `with Browser() as browser: tab = browser.open(url)`."""

    def __init__(self, timeout=30):
        self.timeout, self.number, self.events, self.tabs = timeout, 0, [], {}

    def __enter__(self):
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        theirs, self.out = _pipe()
        self.inp, back = _pipe()
        spots = [(os.POSIX_SPAWN_DUP2, theirs, 3), (os.POSIX_SPAWN_DUP2, back, 4)]
        spots += [(os.POSIX_SPAWN_OPEN, k, os.devnull, os.O_RDWR, 0) for k in (0, 1, 2)]
        program = find_chromium()
        command = [program, *FLAGS, f"--user-data-dir={self.folder.name}", "about:blank"]
        home = os.environ | {"HOME": self.folder.name}  # crash reports and caches go there too
        self.pid = os.posix_spawn(program, command, home, file_actions=spots, setsid=True)
        os.close(theirs)
        os.close(back)
        self.rest = b""
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError, TimeoutError, RuntimeError):
            self.call("Browser.close", wait=5)
        os.close(self.out)
        os.close(self.inp)
        until = time.monotonic() + 5
        while os.waitpid(self.pid, os.WNOHANG)[0] == 0:
            if time.monotonic() > until:
                os.killpg(self.pid, signal.SIGKILL)  # its own session: nobody else is in this group
            time.sleep(0.02)
        self.folder.cleanup()

    def call(self, method, session=None, wait=None, **params):
        """Ask for one thing and wait for its answer; what happens meanwhile goes to the tabs."""
        self.number += 1
        mine, message = self.number, {"id": self.number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self.out, data) :]
        until = time.monotonic() + (wait or self.timeout)
        while True:
            answer = self.read(until, method)
            if answer.get("id") == mine:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def read(self, until, what):
        """The next message; an event is also given to its tab."""
        while b"\0" not in self.rest:
            if not select.select([self.inp], [], [], max(0, until - time.monotonic()))[0]:
                raise TimeoutError(f"the browser did not answer {what}")
            if not (more := os.read(self.inp, 1 << 20)):
                raise RuntimeError("the browser has ended")
            self.rest += more
        raw, _, self.rest = self.rest.partition(b"\0")
        message = json.loads(raw)
        if tab := self.tabs.get(message.get("sessionId")):
            tab.happened(message)
        return message

    def open(self, url, **look):
        """A tab that shows an address; `look`: see `Tab.look`."""
        tab = Tab(self)
        tab.look(**look)
        tab.go(url)
        return tab

    def close_tabs(self):
        """Close every tab that was opened."""
        for tab in [*self.tabs.values()]:
            tab.close()


def _pipe():
    """Both ends of a pipe, numbered so that neither is in the way of 3 and 4."""
    import fcntl

    ends = []
    for end in os.pipe():
        ends.append(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10))
        os.close(end)
    return ends


class Tab:
    """One page. `troubles` collects uncaught exceptions, console errors and refusals by the content policy."""

    def __init__(self, browser):
        self.browser, self.troubles, self.requests = browser, [], []
        self.target = browser.call("Target.createTarget", url="about:blank", newWindow=True)["targetId"]
        self.session = browser.call("Target.attachToTarget", targetId=self.target, flatten=True)["sessionId"]
        browser.tabs[self.session] = self
        for domain in ("Page", "Runtime", "Log", "Network", "DOM", "Accessibility"):
            self.call(f"{domain}.enable")

    def close(self):
        """Close it."""
        self.browser.tabs.pop(self.session, None)
        self.browser.call("Target.closeTarget", targetId=self.target)

    def call(self, method, **params):
        return self.browser.call(method, self.session, **params)

    def happened(self, message):
        method, params = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.troubles.append(params["exceptionDetails"].get("exception", {}).get("description", "an exception"))
        if method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.troubles.append(params["entry"]["text"])
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])

    def look(self, width=1280, height=900, dark=False, phone=False):
        """The size of the window, light or dark, a finger or a mouse."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)
        features = [
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
            {"name": "prefers-reduced-motion", "value": "reduce"},
        ]
        self.call("Emulation.setEmulatedMedia", features=features)

    def go(self, url):
        """Open an address and wait until it is there."""
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, script):
        """The value of a JavaScript expression; a promise is awaited."""
        how = {"awaitPromise": True, "returnByValue": True, "userGesture": True, "allowUnsafeEvalBlockedByCSP": False}
        found = self.call("Runtime.evaluate", expression=script, **how)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"]["exception"].get("description", script))
        return found["result"].get("value")

    def until(self, script, seconds=20):
        """Wait until an expression is true."""
        stop = time.monotonic() + seconds
        while True:
            with contextlib.suppress(RuntimeError):  # the page may just be changing
                if self.run(f"!!({script})"):
                    return
            if time.monotonic() > stop:
                raise TimeoutError(f"still not true after {seconds} s: {script}\n{self.text('body')}\n{self.troubles}")
            time.sleep(0.03)

    def text(self, selector):
        """What a person reads in an element; '' where there is none."""
        return self.run(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''")

    def press(self, *keys):
        """Press keys on whatever has the focus: 'Tab', 'Enter', ' ', 'ArrowRight', or text to type."""
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32, "ArrowRight": 39, "ArrowLeft": 37, "ArrowDown": 40}
        for key in keys:
            if key not in codes:
                self.call("Input.insertText", text=key)
                continue
            about = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": codes[key]}
            text = {"Enter": "\r", " ": " "}.get(key)
            self.call("Input.dispatchKeyEvent", type="keyDown", **about, **({"text": text} if text else {}))
            self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def tab_to(self, script, most=40):
        """Press Tab until an expression about `document.activeElement` (as `it`) is true; how often it took."""
        for n in range(1, most + 1):
            self.press("Tab")
            if self.run(f"((it) => {script})(document.activeElement)"):
                return n
        raise AssertionError(f"{most} presses of Tab do not reach: {script}")

    def middle(self, selector):
        """Where an element is, scrolled into view."""
        return self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center'});"
            "const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )

    def click(self, selector):
        """A real press of the mouse in the middle of an element."""
        x, y = self.middle(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def choose_file(self, selector, path):
        """What a file chooser does."""
        node = self.call("DOM.getDocument")["root"]["nodeId"]
        found = self.call("DOM.querySelector", nodeId=node, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=found, files=[str(Path(path))])

    def drop(self, selector, path):
        """Drag a file from elsewhere over an element and let go."""
        x, y = self.middle(selector)
        data = {"items": [], "files": [str(Path(path))], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    def paste(self, content, kind="image/png"):
        """Paste an image, as Ctrl+V does."""
        data = base64.b64encode(content).decode()
        self.run(
            f"(async () => {{ const bytes = Uint8Array.from(atob('{data}'), (c) => c.charCodeAt(0));"
            "const it = new DataTransfer();"
            f"it.items.add(new File([bytes], 'image.png', {{type: '{kind}'}}));"
            "const about = {clipboardData: it, bubbles: true, cancelable: true};"
            "document.body.dispatchEvent(new ClipboardEvent('paste', about)); })()"
        )

    def screenshot(self, path, whole=True):
        """A PNG of the page."""
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        Path(path).write_bytes(base64.b64decode(found))

    def names(self):
        """What a screen reader finds: (role, name) of everything that is not ignored."""
        nodes = self.call("Accessibility.getFullAXTree")["nodes"]
        return [
            (n["role"]["value"], n.get("name", {}).get("value", ""))
            for n in nodes
            if not n.get("ignored") and "role" in n
        ]
