"""Film the page of play.py in use, in a browser without a screen: how results/play.gif was made.

    python experiments/film.py results/play.gif [--steps 200] [play.py's flags]
    python experiments/film.py page.png                the last picture alone

Needs Chromium (or Chrome) and its chromedriver; `Browser` speaks WebDriver to it, plain JSON over
HTTP, and the tests drive the page with it too.
"""

import argparse
import base64
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

PLAY = Path(__file__).resolve().parent / "play.py"
WIDTH, HEIGHT, SCALED = 1280, 1130, 720  # the page; the GIF's width
GAME_SPEED, FILM_SPEED = 15, 5  # steps a second: in the GIF; while it is filmed
QUIET = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--disable-dev-shm-usage", "--hide-scrollbars")


def programs() -> tuple[str, str] | None:
    """Where the browser and its driver are, if they are."""
    browser = next(filter(None, map(shutil.which, (
        "chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None)
    driver = shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


class Browser:
    """A Chromium without a screen; use it in a `with`."""

    def __init__(self, width: int = WIDTH, height: int = HEIGHT):
        binary, driver = programs()
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.driver = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, text=True)
        said = iter(self.driver.stdout.readline, "")
        port = re.compile(r"successfully on port (\d+)")
        port = next(found[1] for found in map(port.search, said) if found)
        self.root = f"http://127.0.0.1:{port}/session"
        options = dict(binary=binary, args=[*QUIET, f"--user-data-dir={self.profile.name}",
                                            f"--window-size={width},{height}"])
        self.root += "/" + self.call("", capabilities=dict(alwaysMatch={
            "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}))["sessionId"]
        # the window's own frame takes room too
        room = self.script("[outerWidth - innerWidth, outerHeight - innerHeight]")
        self.call("/window/rect", width=width + room[0], height=height + room[1])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            self.call("", "DELETE")
        finally:
            self.driver.terminate()
            self.driver.wait()
            self.driver.stdout.close()
            self.profile.cleanup()

    def call(self, path: str, method: str = "POST", **fields):
        """One WebDriver command -> its value."""
        body = json.dumps(fields).encode() if method == "POST" else None
        request = urllib.request.Request(self.root + path, body, method=method,
                                         headers={"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)["value"]

    def open(self, url: str) -> None:
        """Go to a page."""
        self.call("/url", url=url)

    def script(self, text: str):
        """Run `return TEXT` in the page."""
        return self.call("/execute/sync", script=f"return {text}", args=[])

    def until(self, text: str, seconds: float = 30.0):
        """Wait for TEXT to be true in the page -> its value."""
        end = time.monotonic() + seconds
        while not (value := self.script(text)):
            assert time.monotonic() < end, f"{text} was never true"
            time.sleep(0.02)
        return value

    def keys(self, key: str, down: bool) -> None:
        """Press a key, or let it go, as a hand would."""
        self.call("/actions", actions=[dict(type="key", id="keyboard", actions=[
            dict(type="keyDown" if down else "keyUp", value=key)])])

    def tap(self, key: str) -> None:
        """Press a key and let it go."""
        self.keys(key, True)
        self.keys(key, False)

    def click(self, selector: str) -> None:
        """Click on what the selector finds."""
        found = self.call("/element", using="css selector", value=selector)
        self.call(f"/element/{next(iter(found.values()))}/click")

    def screenshot(self) -> bytes:
        """The page as a PNG."""
        return base64.b64decode(self.call("/screenshot", "GET"))

    def errors(self) -> list[str]:
        """What the console said since it was asked last, warnings and errors."""
        return [entry["message"] for entry in self.call("/se/log", type="browser")
                if entry["level"] in ("SEVERE", "WARNING")]


UP, DOWN = "\ue013", "\ue015"  # WebDriver's names of the arrow keys
STORY = {  # step of the film: what happens then
    0: lambda browser: browser.tap("r"),  # the agent plays, and a dream begins
    80: lambda browser: browser.keys(UP, True),  # a hand takes over
    96: lambda browser: (browser.keys(UP, False), browser.keys(DOWN, True)),
    112: lambda browser: browser.keys(DOWN, False),
    130: lambda browser: list(map(browser.tap, "mvr")),  # the agent, in a new dream
}


def film(browser: Browser, steps: int) -> list[tuple[int, bytes]]:
    """The story -> (step, PNG) about every third step."""
    browser.until("page.drawn > 3 && page.mine")
    begun, story, shots = browser.script("page.state.step"), dict(STORY), []
    while not shots or shots[-1][0] < steps:
        step = browser.until(f"page.state.step >= {begun + 3 * len(shots)} && page.state.step")
        step -= begun
        for when in [when for when in story if when <= step]:
            story.pop(when)(browser)
        shots.append((step, browser.screenshot()))
    return shots


def write(shots: list[tuple[int, bytes]], path: Path) -> None:
    """The GIF at the game's own speed, however slow the filming was."""
    from PIL import Image
    images = []
    for _, png in shots:
        image = Image.open(io.BytesIO(png)).convert("RGB")
        image = image.resize((SCALED, SCALED * image.height // image.width), Image.Resampling.BOX)
        image = image.point(lambda x: x & 0xf8)  # less noise, fewer bytes
        images.append(image.quantize(64, Image.Quantize.FASTOCTREE))
    steps = [step for step, _ in shots]
    lengths = [round(1000 * (b - a) / GAME_SPEED) for a, b in zip(steps, steps[1:])] + [1000]
    images[0].save(path, save_all=True, append_images=images[1:], duration=lengths, loop=0,
                   optimize=True)


def main() -> int:
    """Start play.py, play the story, write what was seen."""
    own = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    own.add_argument("file", type=Path)
    own.add_argument("--steps", type=int, default=200)
    own, rest = own.parse_known_args()
    if programs() is None:
        print("film.py: no Chromium with chromedriver here", file=sys.stderr)
        return 2
    try:
        open(own.file, "ab").close()
    except OSError as error:
        print(f"film.py: {error}", file=sys.stderr)
        return 2
    play = subprocess.Popen([sys.executable, PLAY, "--no-browser", "--port", "0",
                             "--speed", str(FILM_SPEED), *rest],
                            stdout=subprocess.PIPE, text=True)
    try:
        found = re.search(r"http://\S+", play.stdout.readline())
        if not found:
            return play.wait()  # it has said why
        with Browser() as browser:
            browser.open(found[0])
            shots = film(browser, own.steps)
    finally:
        play.terminate()
        play.wait()
    if own.file.suffix == ".png":
        own.file.write_bytes(shots[-1][1])
    else:
        write(shots, own.file)
    print(f"{own.file}: {len(shots)} frames, {own.file.stat().st_size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
