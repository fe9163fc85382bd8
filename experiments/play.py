"""Step into the dream: the real game, its reconstruction and the dream side by side, in a browser.

    python experiments/play.py                         Pong, from results/Pong.pt
    python experiments/play.py --game GridWorld        the other one that comes along
    python experiments/play.py --run runs/Pong-0       your own training, also while it runs
    python experiments/play.py --gif dream.gif         no page: the agent plays in its dream

You or the agent choose an action; the game and the dream both take it, so that one sees where
they part. The dream has seen nothing since it began: its Mamba-2 state, whose size is constant, is
all that it knows, and so it may go on for minutes. The page is play.html, beside this file.

One thread steps game and dream at a fixed rate and publishes the newest state; each tab asks for
what is newer than what it has. So a slow tab, or a slow line, drops states and queues none.
Left out: sound, two players, moments of earlier sessions.
"""

import argparse
import base64
import io
import ipaddress
import json
import os
import socket
import socketserver
import sys
import threading
import time
import webbrowser
from collections import deque
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, urlsplit

import numpy as np
import torch
from PIL import Image
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import drama  # noqa: E402
from experiments import pictures  # noqa: E402

KEYS = {"arrowup": "UP", "w": "UP", "arrowdown": "DOWN", "s": "DOWN", "arrowleft": "LEFT",
        "a": "LEFT", "arrowright": "RIGHT", "d": "RIGHT", " ": "FIRE"}
SPEEDS = (1, 5, 15, 30, 60)  # steps a second; Atari at frame skip 4 has 15
BUTTONS = dict(player=("you", "agent"), eyes=("game", "dream"), paused=(False, True), speed=SPEEDS,
               recording=(False, True), step=(None,), restart=(None,))  # or a moment's step
REMEMBER_EVERY, MOMENTS = 75, 8  # steps between remembered moments; how many are kept
RECORDED = 900  # the last frames of a recording: a minute at the game's speed
SURPRISED, CALM = 4.0, 0.99  # surprise is high at so many times its running mean; the mean's decay
PATIENCE = 3.0  # seconds without a request after which a tab has left the pad
LOCAL = ("localhost", "127.0.0.1")
COLAB = "colab.googleusercontent.com"  # the end of the name by which Colab passes a port on


# ---- the two worlds -----------------------------------------------------------------------------


def action_names(env) -> list[str]:
    """The game's actions, in the order of their numbers."""
    if not hasattr(env, "ale"):  # GridWorld
        return ["UP", "DOWN", "LEFT", "RIGHT"]
    return [action.name for action in env.ale.get_action_set()]


def action_of(held: set[str], names: list[str]) -> int | None:
    """The action that keys ask for, held a subset of UP, DOWN, LEFT, RIGHT, FIRE.

    Opposite keys cancel. A game without UP and DOWN, such as Pong, takes RIGHT and LEFT for them.
    What the game cannot do at once it does in part. None: no key, and the game has no NOOP.
    """
    vertical, across = ("".join(pair & held) if not pair <= held else ""
                        for pair in ({"UP", "DOWN"}, {"LEFT", "RIGHT"}))
    if vertical and not across and vertical not in names:
        across = {"UP": "RIGHT", "DOWN": "LEFT"}[vertical]
    fire = "FIRE" if "FIRE" in held else ""
    for name in (vertical + across + fire, vertical + across, vertical + fire, across + fire,
                 vertical, across, fire, "NOOP"):
        if name in names:
            return names.index(name)
    return None


class Moment(NamedTuple):
    """A moment of the real game, and all that a dream from it needs."""

    step: int
    frame: np.ndarray  # (H, W, 3) uint8
    mind: list[Tensor]  # row 0 of Stage.mind


class Stage:
    """The game and the dream, which take the same actions. Row 0 is the game, row 1 the dream.

    The game's row is told each frame: z ~ q(z | o). The dream's row draws its own: z ~ p(z | d).
    """

    @torch.inference_mode()
    def __init__(self, cfg, model, agent, seed: int = 0):
        torch.manual_seed(seed)
        self.cfg, self.model, self.agent = cfg, model, agent
        self.env = drama.make_env(cfg.game, 1, cfg.image_size)
        self.names = action_names(self.env)
        self.frame = self.env.reset(seed=seed)[0][0, 0]
        self.steps, self.action, self.score, self.moments = 0, None, 0.0, {}
        self.surprise, self.usual, self.high = None, None, False
        self.reward, self.end = [0.0, 0.0], [0.0, 0.0]
        self.logp = model.encode(torch.from_numpy(self.frame)[None]).repeat(2, 1, 1)  # (2, K, C)
        self.z = drama.draw_one_hot(self.logp).flatten(-2)  # (2, K*C)
        self.d = torch.zeros(2, cfg.d_model)
        self.states = model.sequence.initial_states(2)
        self.restart()
        self.chosen_from = self.log_pi  # the policy that chose the action shown

    def mind(self) -> list[Tensor]:
        """What the model knows of both worlds: (2, …) each."""
        return [self.logp, self.z, self.d, *(s for state in self.states for s in state)]

    def now(self) -> Moment:
        """The real present."""
        return Moment(self.steps, self.frame, [both[0] for both in self.mind()])

    @torch.inference_mode()
    def restart(self, moment: Moment | None = None) -> None:
        """Begin the dream at a moment of the real game, by default at the present."""
        moment = moment or self.now()
        for both, then in zip(self.mind(), moment.mind):
            both[1] = then
        self.sums, self.dreamt, self.ended, self.began = [0.0, 0.0], 0, None, moment.step
        self._look()

    @torch.inference_mode()
    def step(self, action: int) -> None:
        """The same action in the game and in the dream."""
        self.chosen_from, both = self.log_pi, np.array([action])
        d, states = self.model.sequence(self.z, torch.tensor([action, action]), self.states)
        self.end = self.model.termination(d).squeeze(-1).sigmoid().tolist()
        frame, reward, *over = self.env.step(both)
        opens = bool(drama.episode_over(*over)[0])
        if opens:
            frame = self.env.step(both)[0]  # the step that opens the next episode
        self.frame = frame[0, 0]
        posterior = self.model.encode(torch.from_numpy(self.frame)[None])  # (1, K, C)
        self.z = torch.cat([drama.draw_one_hot(posterior).flatten(-2), self.model.guess(d[1:])])
        prior = self.model.log_prior(d, self.z)  # (2, K, C)
        self._wonder(None if opens else drama.kl_divergence(posterior, prior[:1]).item())
        cleared = torch.tensor([opens, False])  # of a new episode the prior knows nothing
        self.d, self.states = d.masked_fill(cleared[:, None], 0), drama.clear(states, cleared)
        self.logp = torch.cat([posterior, prior[1:]])
        self.steps, self.dreamt, self.action = self.steps + 1, self.dreamt + 1, action
        self.reward = [float(reward[0]), self.model.two_hot.mean(self.model.reward(d[1])).item()]
        self.sums = [total + r for total, r in zip(self.sums, self.reward)]
        self.score = 0.0 if opens else self.score + self.reward[0]
        if self.ended is None and self.end[1] > 1 / 2:
            self.ended = self.dreamt
        if self.steps % REMEMBER_EVERY == 0:  # a new dict, as other threads read the old one
            kept = list(self.moments.items())[1 - MOMENTS:]
            self.moments = dict([*kept, (self.steps, self.now())])
        self._look()

    def _wonder(self, surprise: float | None) -> None:
        """Is the KL between guess and frame high beside what is usual?"""
        self.surprise = surprise
        self.high = None not in (surprise, self.usual) and surprise > SURPRISED * self.usual
        if surprise is not None:
            usual = surprise if self.usual is None else self.usual
            self.usual = CALM * usual + (1 - CALM) * surprise

    def _look(self) -> None:
        """What the model draws, thinks and would do in both worlds."""
        drawn = self.model.decode(self.z).permute(0, 2, 3, 1)
        self.pictures = np.stack([self.frame, *(255 * drawn).round().byte().numpy()])  # (3,H,W,3)
        feature = torch.cat([self.z, self.d], -1)
        self.value = self.agent.two_hot.mean(self.agent.critic(feature)).tolist()
        self.log_pi = self.agent.actor(feature).log_softmax(-1)  # (2, actions)

    def agents_choice(self, eyes: str) -> int:
        """The agent's action for what it sees in the game or in the dream."""
        return drama.draw_one_hot(self.log_pi[BUTTONS["eyes"].index(eyes)]).argmax().item()

    def report(self) -> dict:
        """All that the page shows of this step."""
        sides = self.z.view_as(self.logp).argmax(-1)  # (2, K)
        sure = self.logp.gather(-1, sides[..., None]).squeeze(-1).exp()
        return dict(
            step=self.steps, action=self.action, score=self.score, reward=self.reward,
            sums=self.sums, end=self.end, value=self.value, policy=self.chosen_from.exp().tolist(),
            surprise=self.surprise, usual=self.usual, high=self.high,
            apart=drama.kl_divergence(*self.logp).item(), classes=self.cfg.classes,
            dice=sides.tolist(), sure=sure.tolist(),
            dreamt=self.dreamt, ended=self.ended, began=self.began, moments=list(self.moments),
            pictures=[base64.b64encode(png(picture)).decode() for picture in self.pictures])


def png(picture: np.ndarray) -> bytes:
    """(H, W, 3) uint8 -> a file."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG", compress_level=1)
    return file.getvalue()


def shoot(stage: Stage) -> tuple:
    """The present, for a recording: what `pictures.sheet` makes a picture of."""
    pictures = stage.pictures & 0xf8  # less noise: half the bytes
    for picture, red in zip(pictures, (stage.high, False, stage.ended)):
        if red:
            picture[[0, -1]] = picture[:, [0, -1]] = (255, 0, 0)
    game, dream = (round(total, 1) + 0.0 for total in stage.sums)  # + 0.0: no -0
    ended = f", ended at {stage.ended}" if stage.ended else ""
    return (pictures, [f"real {game:+g}", "reconstruction", f"dream {dream:+.1f}"],
            f"{stage.cfg.game}, dream step {stage.dreamt}{ended}")


def write_gif(shots, file, speed: int) -> None:
    """An endless GIF of what `shoot` took."""
    images = [pictures.sheet(*shot).quantize(64, Image.Quantize.FASTOCTREE) for shot in shots]
    images[0].save(file, "GIF", save_all=True, append_images=images[1:], loop=0,
                   duration=max(20, round(1000 / speed)))


# ---- the desk between the tabs and the stage ----------------------------------------------------


class Desk:
    """What the tabs and the stage's thread share; every access holds `bell`."""

    def __init__(self, title: dict, speed: int = 15):
        self.bell = threading.Condition()
        self.title = title  # what never changes: game, step, actions, …
        self.settings = dict(player="agent", eyes="game", paused=False, speed=speed,
                             recording=False)
        self.wishes: list[tuple[str, Moment | None]] = []  # step or restart, from which moment
        self.held, self.tapped = set(), set()  # UP, DOWN, LEFT, RIGHT, FIRE; since the last step
        self.pad, self.seen = None, 0.0  # the tab that may play; when it last asked
        self.number, self.body, self.changed = 0, b"", True  # the newest state
        self.moments: dict[int, Moment] = {}
        self.shots = deque(maxlen=RECORDED)
        self.closed = False

    def visit(self, tab: str) -> bool:
        """A tab asks; does it hold the pad? One that is free, or left, goes to who asks first."""
        now = time.monotonic()
        if self.pad != tab and now - self.seen > PATIENCE:
            self.pad, self.held, self.changed = tab, set(), True
        if self.pad == tab:
            self.seen = now
        return self.pad == tab

    def press(self, name, value) -> bool:
        """A button: change a setting or leave a wish -> whether there is one, with that value."""
        values = BUTTONS.get(name, ()) if isinstance(name, str) else ()
        values += tuple(self.moments) if name == "restart" else ()
        if (type(value), value) not in [(type(each), each) for each in values]:  # 1 is not True
            return False
        if name in self.settings:
            self.settings[name] = value
        else:
            self.wishes.append((name, self.moments.get(value)))
        if (name, value) == ("recording", True):
            self.shots.clear()
        self.changed = True
        self.bell.notify_all()
        return True

    def publish(self, state: dict) -> None:
        """The newest state, for every tab that waits."""
        with self.bell:
            state |= self.settings | dict(title=self.title, shots=len(self.shots))
            self.number, self.body = self.number + 1, json.dumps(state).encode()
            self.bell.notify_all()


class Pace:
    """When the next step is due, how many came late, what the machine could do."""

    def __init__(self):
        self.due, self.late, self.busy = time.monotonic(), 0, None
        self.ends = deque(maxlen=60)

    def took(self, begun: float, period: float) -> None:
        """A step that began at `begun` is done; a step missed is dropped, not made up for."""
        now = time.monotonic()
        self.busy = now - begun if self.busy is None else 0.95 * self.busy + 0.05 * (now - begun)
        self.ends.append(now)
        self.due += period
        if self.due < now - period:
            self.late += int((now - self.due) / period)
            self.due = now

    def rest(self, period: float) -> None:
        """Nothing to do, which is neither late nor slow."""
        self.due = time.monotonic() + period
        self.ends.clear()

    def report(self) -> dict:
        """Steps a second: reached, possible; steps dropped."""
        span = self.ends[-1] - self.ends[0] if len(self.ends) > 1 else 0
        return dict(rate=round((len(self.ends) - 1) / span, 1) if span else None, late=self.late,
                    possible=round(1 / self.busy) if self.busy else None)


def perform(stage: Stage, desk: Desk) -> None:
    """Step game and dream at the desk's speed until it closes: the only thread that computes."""
    pace = Pace()
    while not desk.closed:
        with desk.bell:
            desk.bell.wait_for(lambda: desk.changed, pace.due - time.monotonic())
            begun, changed, desk.changed = time.monotonic(), desk.changed, False
            settings, wishes, desk.wishes = dict(desk.settings), desk.wishes, []
            asked = ("step", None) in wishes
            stepping = asked or begun >= pace.due and not settings["paused"]
            if stepping:  # a key pressed from here on counts for the next step
                keys, desk.tapped = desk.held | desk.tapped, set()
        for name, moment in wishes:
            if name == "restart":
                stage.restart(moment)
        if stepping:
            action = (action_of(keys, stage.names) if settings["player"] == "you" else
                      stage.agents_choice(settings["eyes"]))
            stepping = action is not None
        if stepping:
            stage.step(action)
            with desk.bell:
                desk.moments = stage.moments
                if settings["recording"]:
                    desk.shots.append(shoot(stage))
        if stepping or changed:
            desk.publish(stage.report() | pace.report())
        if stepping and not asked:
            pace.took(begun, 1 / settings["speed"])
        elif begun >= pace.due:
            pace.rest(1 / settings["speed"])


# ---- the server ---------------------------------------------------------------------------------


class Refused(Exception):
    """A request that gets a 4xx: status, words."""


def need(true, status: int, words: str) -> None:
    """Refuse a request of which something is not true."""
    if not true:
        raise Refused(status, words)


def number(text: str | None) -> int:
    """A decimal number of a request."""
    need(text and text.isascii() and text.isdigit() and len(text) < 16, 400, "a number is missing")
    return int(text)


def tab_of(fields: dict) -> str:
    """The name that a tab gave itself."""
    tab = fields.get("tab")
    need(isinstance(tab, str) and 0 < len(tab) <= 40, 400, "tab: a short name is missing")
    return tab


class Handler(BaseHTTPRequestHandler):
    """Answers requests. A route takes a request's fields and returns body, type, headers."""

    protocol_version = "HTTP/1.1"  # keeps connections open
    server_version, sys_version = "drama", ""
    timeout = 30  # seconds for a request to arrive

    def send_error(self, code, message=None, explain=None):
        """http.server's own refusals; the sender's faults are 4xx."""
        self.close_connection = True
        self.request_version = self.protocol_version  # or it would answer without a status
        self.reply(code if code < 500 else 400, (message or "refused").encode(), "text/plain")

    def reply(self, status: int, body: bytes, kind: str, **headers) -> None:
        """Send an answer."""
        self.send_response(status)
        if self.close_connection:
            headers["Connection"] = "close"
        for name, value in dict(headers, Content_Type=kind, Content_Length=len(body),
                                Cache_Control="no-store", X_Content_Type_Options="nosniff").items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Say nothing: a line a frame helps nobody."""

    def answer(self) -> None:
        """Check where the request comes from, then hand its fields to its route."""
        path, _, query = self.path.partition("?")
        try:
            self.check_origin()
            route = self.ROUTES.get(f"{self.command} {path}")
            need(route, 404, "no such page")
            fields = (self.order() if self.command == "POST" else
                      {name: values[-1] for name, values in parse_qs(query).items()})
            body, kind, headers = route(self, fields)
            self.reply(200, body, kind, **headers)
        except Refused as refused:
            self.close_connection = True  # what is left of its body must not pass for a request
            status, words = refused.args
            self.reply(status, words.encode(), "text/plain; charset=utf-8")

    do_GET = do_POST = answer

    def check_origin(self) -> None:
        """Refuse a request that a page of another site sent, by its own name or by a name that it
        made point here (DNS rebinding)."""
        hosts, origins = (self.headers.get_all(name) or [] for name in ("Host", "Origin"))
        need(len(hosts) == 1 and self.server.is_ours(hosts[0]), 403,
             "this name is not the server's; use the address that it printed")
        for scheme, _, name in (origin.partition("://") for origin in origins):
            theirs = name == hosts[0] or name.endswith(COLAB) and self.server.is_ours(name)
            need(scheme in ("http", "https") and theirs, 403, "this page is another server's")

    def order(self) -> dict:
        """The JSON of a POST from the tab that holds the pad."""
        length = number(self.headers.get("Content-Length"))
        need(length <= 10_000, 413, "too long")
        try:
            order = json.loads(self.rfile.read(length))
        except (ValueError, RecursionError):
            raise Refused(400, "not JSON") from None
        need(isinstance(order, dict), 400, "not a JSON object")
        with self.server.desk.bell:
            need(self.server.desk.visit(tab_of(order)), 409, "another tab plays; this one watches")
        return order

    def page(self, _) -> tuple:
        """The page; it may load nothing from elsewhere."""
        return (HERE / "play.html").read_bytes(), "text/html; charset=utf-8", dict(
            Content_Security_Policy="default-src 'none'; script-src 'unsafe-inline'; style-src "
            "'unsafe-inline'; connect-src 'self'; img-src 'self' data:; frame-ancestors 'self'")

    def frame(self, fields: dict) -> tuple:
        """The newest state once it is newer than number `after`, or after a second."""
        after, tab, desk = number(fields.get("after")), tab_of(fields), self.server.desk
        with desk.bell:
            mine = desk.visit(tab)
            desk.bell.wait_for(lambda: desk.body and desk.number != after, 1.0)
            return desk.body, "application/json", dict(Number=desk.number,
                                                       Pad="yours" if mine else "taken")

    def moment(self, fields: dict) -> tuple:
        """The frame of a remembered moment."""
        with self.server.desk.bell:
            moment = self.server.desk.moments.get(number(fields.get("step")))
        need(moment, 404, "no such moment")
        return png(moment.frame), "image/png", {}

    def recording(self, _) -> tuple:
        """What was recorded, as a GIF."""
        with self.server.desk.bell:
            shots, speed = list(self.server.desk.shots), self.server.desk.settings["speed"]
        need(shots, 404, "nothing was recorded")
        file = io.BytesIO()
        write_gif(shots, file, speed)
        return file.getvalue(), "image/gif", dict(
            Content_Disposition='attachment; filename="dream.gif"')

    def key(self, order: dict) -> tuple:
        """{"tab": …, "held": ["arrowup", " "]}: all keys held now; one pressed and let go between
        two steps still counts for one."""
        held, desk = order.get("held"), self.server.desk
        need(isinstance(held, list) and all(isinstance(key, str) and key in KEYS for key in held),
             400, f"held: a list of {', '.join(map(repr, KEYS))}")
        with desk.bell:
            desk.held = {KEYS[key] for key in held}
            desk.tapped |= desk.held
        return b"{}", "application/json", {}

    def control(self, order: dict) -> tuple:
        """{"tab": …, "name": "paused", "value": true}: a button."""
        with self.server.desk.bell:
            need(self.server.desk.press(order.get("name"), order.get("value")), 400,
                 "no such button, or not a value of it")
        return b"{}", "application/json", {}

    ROUTES = {"GET /": page, "GET /frame": frame, "GET /moment": moment,
              "GET /recording.gif": recording, "POST /key": key, "POST /control": control}


class Server(socketserver.ThreadingTCPServer):
    """A thread a connection; none of them touches the model."""

    daemon_threads, request_queue_size = True, 64
    allow_reuse_address = os.name != "nt"  # on Windows it would let two servers share a port

    def __init__(self, host: str, port: int, desk: Desk):
        self.host, self.desk = host, desk
        super().__init__((host, port), Handler)

    def is_ours(self, name: str) -> bool:
        """Is `name:port` what this server may be called? Any port: ssh may forward another."""
        try:
            name = urlsplit(f"//{name}").hostname or ""
        except ValueError:
            return False
        colab = "COLAB_RELEASE_TAG" in os.environ and name.endswith(COLAB)
        if colab or name in LOCAL or self.host in LOCAL:
            return colab or name in LOCAL
        try:  # served to others: a bare address is never another site's name
            return bool(ipaddress.ip_address(name))
        except ValueError:
            return name in map(str.lower, (self.host, socket.gethostname(), socket.getfqdn()))

    def handle_error(self, request, client_address):
        """A tab that closes in mid-answer is no error."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


# ---- the command line ---------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("play.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = drama.refuse
    add = parser.add_argument
    add("--game", default="", help="which checkpoint of the repository (Pong)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--run", type=Path, metavar="FOLDER", help="play from a run's checkpoint")
    source.add_argument("--checkpoint", type=Path, metavar="FILE", help="play from an exported one")
    add("--host", default="127.0.0.1", help="whom to serve; 0.0.0.0: the network (127.0.0.1)")
    add("--port", type=int, default=8000, help="0: any that is free (8000)")
    add("--no-browser", action="store_true", help="serve the page, open nothing")
    add("--speed", type=int, default=15, choices=SPEEDS, help="steps a second (15)")
    add("--seed", type=int, default=0, help="of the game and of every draw (0)")
    add("--gif", type=Path, metavar="FILE", help="no page: the agent plays in its dream")
    add("--steps", type=int, default=200, help="steps in the GIF (200)")
    own = parser.parse_args(argv)
    for name, low, high in (("port", 0, 65535), ("steps", 1, 10_000), ("seed", 0, 2**30)):
        if not low <= getattr(own, name) <= high:
            raise drama.Refusal(f"--{name} {getattr(own, name)}: must lie from {low} to {high}")
    return own


def make_gif(stage: Stage, path: Path, steps: int, speed: int) -> None:
    """The agent plays in its dream, and the game gets the same actions."""
    open(path, "ab").close()  # can it be written to? What is there stays until the end
    shots, film = [shoot(stage)], io.BytesIO()
    for _ in range(steps):
        stage.step(stage.agents_choice("dream"))
        shots.append(shoot(stage))
    write_gif(shots, film, speed)
    path.write_bytes(film.getvalue())
    drama.say(f"{path}: {steps} steps, reward {stage.sums[0]:g} in the game, "
              f"{stage.sums[1]:.1f} in the dream")


def serve(stage: Stage, title: dict, own: argparse.Namespace) -> None:
    """Open the page and play until Ctrl-C."""
    screen = (os.name == "nt" or sys.platform == "darwin"
              or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    if not own.no_browser and not screen:
        raise drama.Refusal("no display to open a browser on; with --no-browser the page is served "
                            "all the same, with --gif FILE none is needed")
    desk = Desk(title, own.speed)
    try:
        server = Server(own.host, own.port, desk)
    except OSError as error:
        raise drama.Refusal(f"--host {own.host} --port {own.port}: {error.strerror or error}; "
                            "try another --port") from None
    port = server.server_address[1]
    url = f"http://{own.host.replace('0.0.0.0', '127.0.0.1')}:{port}/"
    drama.say(f"{title['game']} after {title['trained']:,} steps of training: {url} (Ctrl-C stops "
              f"it)\nfrom another machine: ssh -L {port}:localhost:{port} THIS-MACHINE, then that "
              "address")
    if own.host not in LOCAL:
        drama.say(f"--host {own.host}: whoever reaches this machine's port {port} can watch and "
                  "play; nothing is encrypted and nobody is asked for a password")
    if "COLAB_RELEASE_TAG" in os.environ:
        drama.say("in Colab start this in the background (%%bash --bg); the address, in a cell: "
                  "from google.colab.output import eval_js; "
                  f"print(eval_js('google.colab.kernel.proxyPort({port})'))")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    if not own.no_browser:
        webbrowser.open(url)
    with server:
        perform(stage, desk)


def main(argv: list[str] | None = None) -> int:
    """Run a command line; return the exit code."""
    torch.set_num_threads(1)  # one frame at a time: more threads only get in each other's way
    try:
        own, cpu = parse(argv), torch.device("cpu")
        path = (own.run / "checkpoint.pt" if own.run else own.checkpoint or
                HERE.parent / "results" / f"{own.game or 'Pong'}.pt")
        saved = drama.load_checkpoint(path, cpu, dict(game=own.game) if own.game else {})
        cfg = drama.Config(**saved["config"])
        stage = Stage(cfg, *drama.rebuild(saved, cfg, cpu), own.seed)
        if own.gif:
            make_gif(stage, own.gif, own.steps, own.speed)
        else:
            serve(stage, dict(game=cfg.game, trained=saved["at"]["step"], actions=stage.names,
                              speeds=SPEEDS, surprised=SURPRISED, checkpoint=path.name), own)
    except KeyboardInterrupt:
        return 130
    except (drama.Refusal, OSError) as error:
        file = getattr(error, "filename", None)
        drama.say(f"play.py: {f'{file}: {error.strerror}' if file else error}", sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
