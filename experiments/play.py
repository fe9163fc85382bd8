"""Step into the dream: the real game, its reconstruction and the dream side by side, in a browser.

    python experiments/play.py                         Pong, from results/Pong.pt
    python experiments/play.py --game GridWorld        from results/GridWorld.pt
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
import gzip
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
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import drama  # noqa: E402

KEYS = {"arrowup": "UP", "w": "UP", "arrowdown": "DOWN", "s": "DOWN", "arrowleft": "LEFT",
        "a": "LEFT", "arrowright": "RIGHT", "d": "RIGHT", " ": "FIRE"}
SPEEDS = (1, 5, 15, 30, 60)  # steps a second; Atari at frame skip 4 has 15
REMEMBER_EVERY, MOMENTS = 75, 8  # steps between remembered moments; how many are kept
RECORDED = 900  # frames of the longest recording, a minute at the game's speed
SURPRISED, CALM = 4.0, 0.99  # surprise is high at so many times its running mean; the mean's decay
PATIENCE = 3.0  # seconds without a request after which a tab has left the pad
LOCAL = ("localhost", "127.0.0.1", "::1")
COLAB = "colab.googleusercontent.com"  # the end of the name by which Colab passes a port on


# ---- the two worlds -----------------------------------------------------------------------------


def brief(error: Exception) -> str:
    """Its words, in a part of a line."""
    return " ".join(str(error).split())[:110]


def load(path: Path, game: str = "") -> tuple:
    """A run's checkpoint or an exported one -> (cfg, world model, agent, its step); Refusal."""
    if not path.is_file():
        raise drama.Refusal(f"{path}: no such checkpoint; train first, or name one with --run or "
                            "--checkpoint")
    try:  # weights_only: a file from a stranger must not run code
        saved = torch.load(path, map_location="cpu", weights_only=True)
        cfg, step = drama.Config(**saved["config"]), int(saved["at"]["step"])
    except Exception as error:  # a broken file can raise nearly anything
        raise drama.Refusal(f"{path} is no checkpoint of this drama.py "
                            f"({brief(error)})") from None
    if game and game != cfg.game:
        raise drama.Refusal(f"--game {game}: {path} plays {cfg.game}")
    try:
        drama.validate(cfg)
    except drama.Refusal as error:
        raise drama.Refusal(f"{path}: {error}") from None
    num_actions = int(drama.make_env(cfg.game, 1, cfg.image_size).single_action_space.n)
    model, agent = drama.WorldModel(cfg, num_actions), drama.ActorCritic(cfg, num_actions)
    try:
        model.load_state_dict(saved["model"])  # half precision becomes float32 on the way
        agent.load_state_dict(saved["agent"])
    except (KeyError, RuntimeError, AttributeError) as error:
        raise drama.Refusal(f"{path}: weights and settings do not fit "
                            f"({brief(error)})") from None
    return cfg, model.eval(), agent.eval(), step


def action_names(env) -> list[str]:
    """The game's actions, in the order of their numbers."""
    if isinstance(env, drama.GridWorld):
        return ["UP", "DOWN", "LEFT", "RIGHT"]
    return [action.name for action in env.ale.get_action_set()]


def action_of(held: set[str], names: list[str]) -> int | None:
    """The action that keys ask for, held a subset of UP, DOWN, LEFT, RIGHT, FIRE.

    Opposite keys cancel. A game without UP and DOWN, such as Pong, takes RIGHT and LEFT for them.
    What the game cannot do at once it does in part. None: no key, and the game has no NOOP.
    """
    vertical = "".join({"UP", "DOWN"} & held) if not {"UP", "DOWN"} <= held else ""
    across = "".join({"LEFT", "RIGHT"} & held) if not {"LEFT", "RIGHT"} <= held else ""
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
    logp: Tensor  # (K, C): log q(z | o)
    z: Tensor  # (K*C,)
    d: Tensor  # (d_model,)
    states: list  # a layer: (conv window, SSM state)


class Stage:
    """The game and the dream, which take the same actions. Row 0 is the game, row 1 the dream.

    The game's row is told each frame: z ~ q(z | o). The dream's row draws its own: z ~ p(z | d).
    """

    @torch.inference_mode()
    def __init__(self, cfg, model, agent, seed: int = 0):
        torch.manual_seed(seed)
        self.model, self.agent = model, agent
        self.env = drama.make_env(cfg.game, 1, cfg.image_size)
        self.names = action_names(self.env)
        self.frame = self.env.reset(seed=seed)[0][0, 0]
        self.steps, self.action, self.score, self.usual = 0, None, 0.0, None
        self.surprise, self.high = None, False
        self.reward, self.end, self.chosen_from = [0.0, 0.0], [0.0, 0.0], None
        self.logp = model.encode(torch.from_numpy(self.frame)[None]).expand(2, -1, -1)  # (2, K, C)
        self.z = drama.draw_one_hot(self.logp).flatten(-2)  # (2, K*C)
        self.d = torch.zeros(2, cfg.d_model)
        self.states = model.sequence.initial_states(2)
        self.moments: dict[int, Moment] = {}
        self.restart()

    def now(self) -> Moment:
        """The real present."""
        return Moment(self.steps, self.frame, self.logp[0], self.z[0], self.d[0],
                      [tuple(s[0] for s in state) for state in self.states])

    @torch.inference_mode()
    def restart(self, moment: Moment | None = None) -> None:
        """Begin the dream at a moment of the real game, by default at the present."""
        moment = moment or self.now()
        self.logp = torch.stack([self.logp[0], moment.logp])
        self.z = torch.stack([self.z[0], moment.z])
        self.d = torch.stack([self.d[0], moment.d])
        self.states = [tuple(torch.stack([s[0], kept]) for s, kept in zip(state, then))
                       for state, then in zip(self.states, moment.states)]
        self.sums, self.dreamt, self.ended = [0.0, 0.0], 0, None
        self.from_step = moment.step
        self._look()

    @torch.inference_mode()
    def step(self, action: int) -> None:
        """The same action in the game and in the dream."""
        self.chosen_from, both = self.policy, torch.tensor([action, action])
        d, states = self.model.sequence.step(self.z, both, self.states)
        frame, reward, *over = self.env.step(np.array([action]))
        opens = bool(drama.episode_over(*over)[0])
        if opens:
            frame = self.env.step(np.array([action]))[0]  # the autoreset step
        prior = self.model.log_prior(d)  # (2, K, C), of the frame to come
        self.end = self.model.termination(d).squeeze(-1).sigmoid().tolist()
        dreamt_reward = self.model.two_hot.mean(self.model.reward(d[1])).item()
        self.frame = frame[0, 0]
        posterior = self.model.encode(torch.from_numpy(self.frame)[None])  # (1, K, C)
        self._wonder(None if opens else drama.kl_divergence(posterior, prior[:1]).item())
        cleared = torch.tensor([opens, False])  # of a new episode the prior knows nothing
        self.d, self.states = d * ~cleared[:, None], drama.clear(states, cleared)
        self.logp = torch.cat([posterior, prior[1:]])
        self.z = drama.draw_one_hot(self.logp).flatten(-2)
        self.steps, self.dreamt, self.action = self.steps + 1, self.dreamt + 1, action
        self.reward = [float(reward[0]), dreamt_reward]
        self.sums = [total + r for total, r in zip(self.sums, self.reward)]
        self.score = 0.0 if opens else self.score + self.reward[0]
        if self.ended is None and self.end[1] > 1 / 2:
            self.ended = self.dreamt
        if self.steps % REMEMBER_EVERY == 0:
            self.moments[self.steps] = self.now()
            for old in list(self.moments)[:-MOMENTS]:
                del self.moments[old]
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
        self.drawn = (255 * drawn).round().byte().numpy()  # (2, H, W, 3)
        feature = torch.cat([self.z, self.d], -1)
        self.value = self.agent.two_hot.mean(self.agent.critic(feature)).tolist()
        self.policy = self.agent.actor(feature).softmax(-1)  # (2, actions)

    def agents_choice(self, row: int) -> int:
        """The agent's action for what it sees in the game (0) or in the dream (1)."""
        logits = self.policy[row].log()
        return int((logits + drama.gumbel(logits)).argmax())

    def pictures(self) -> list[np.ndarray]:
        """The real frame, its reconstruction, the dream: (H, W, 3) uint8."""
        return [self.frame, *self.drawn]

    def report(self) -> dict:
        """All that the page shows of this step."""
        digits = 4
        sure = self.logp.exp()
        dice = self.z.view_as(sure).argmax(-1)  # (2, K)
        policy = self.policy if self.chosen_from is None else self.chosen_from  # of this action
        return dict(
            step=self.steps, action=self.action, score=self.score,
            size=len(self.frame), pictures=[pixels(picture) for picture in self.pictures()],
            reward=np.round(self.reward, digits).tolist(), end=np.round(self.end, digits).tolist(),
            sums=np.round(self.sums, digits).tolist(), value=np.round(self.value, digits).tolist(),
            policy=np.round(policy.tolist(), digits).tolist(),
            surprise=self.surprise, usual=self.usual, high=self.high,
            apart=drama.kl_divergence(*self.logp).item(),
            dice=dice.tolist(), classes=sure.shape[-1],
            sure=np.round(sure.gather(-1, dice[..., None]).squeeze(-1).tolist(), 2).tolist(),
            dreamt=self.dreamt, ended=self.ended, began=self.from_step, moments=list(self.moments))


def pixels(picture: np.ndarray) -> str:
    """(H, W, 3) uint8 -> base64, row by row."""
    return base64.b64encode(np.ascontiguousarray(picture)).decode()


# ---- the GIF ------------------------------------------------------------------------------------


class Shot(NamedTuple):
    """A frame of a recording."""

    pictures: list[np.ndarray]  # (H, W, 3) uint8: real, reconstruction, dream
    captions: list[str]
    red: list[bool]  # which picture has a red border


def shoot(stage: Stage) -> Shot:
    """The present, for a recording."""
    game, dream = (round(total, 1) + 0.0 for total in stage.sums)  # and no -0.0
    state = f", ended at {stage.ended}" if stage.ended else ""
    return Shot(stage.pictures(), [f"real game, reward {game:+g}", "reconstruction",
                                   f"dream, step {stage.dreamt}, reward {dream:+.1f}{state}"],
                [stage.high, False, bool(stage.ended)])


def write_gif(shots: list[Shot], file, speed: int) -> None:
    """An endless GIF: three pictures, each 192 points wide, their captions above them."""
    from PIL import Image, ImageDraw, ImageFont
    side, gap, head = 192, 8, 20
    font = ImageFont.load_default(12)
    images = []
    for shot in shots:
        image = Image.new("RGB", (3 * (side + gap) + gap, side + head + gap), (17, 20, 28))
        draw = ImageDraw.Draw(image)
        for i, (picture, caption, red) in enumerate(zip(*shot)):
            x = gap + i * (side + gap)
            draw.text((x, gap // 2), caption, (205, 211, 224), font)
            if red:
                draw.rectangle((x - 3, head - 3, x + side + 2, head + side + 2), (232, 70, 70))
            calm = Image.fromarray(picture & 0xf8)  # less noise: half the bytes
            image.paste(calm.resize((side, side), Image.Resampling.NEAREST), (x, head))
        images.append(image.quantize(64, Image.Quantize.FASTOCTREE))  # keeps small things' colours
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
        self.wishes: list[tuple[str, int | None]] = []  # (step or restart, which moment)
        self.held, self.tapped = set(), set()  # UP, DOWN, LEFT, RIGHT, FIRE; since the last step
        self.pad, self.seen = None, 0.0  # the tab that may play; when it last asked
        self.number, self.body, self.changed = 0, b"", True  # the newest state
        self.moments: dict[int, Moment] = {}
        self.shots: list[Shot] = []
        self.closed = False

    def visit(self, tab: str) -> bool:
        """A tab asks; does it hold the pad? One that is free, or left, goes to who asks first."""
        now = time.monotonic()
        if self.pad != tab and now - self.seen > PATIENCE:
            self.pad, self.held, self.changed = tab, set(), True
        if self.pad == tab:
            self.seen = now
        return self.pad == tab

    def set_held(self, keys: list[str]) -> None:
        """The keys held now; one pressed and let go between two steps still counts for one."""
        self.held = {KEYS[key] for key in keys}
        self.tapped |= self.held
        self.bell.notify_all()

    def control(self, name: str, value) -> None:
        """A button: change a setting, or leave a wish for the stage."""
        if name in self.settings:
            if name == "recording" and value:
                self.shots = []
            self.settings[name] = value
        else:
            self.wishes.append((name, value))
        self.changed = True
        self.bell.notify_all()

    def valid(self, name, value) -> bool:
        """Is that a button, and a value of it?"""
        if name in ("paused", "recording"):
            return isinstance(value, bool)
        if name == "restart":
            return value is None or type(value) is int and value in self.moments
        choices = dict(player=("you", "agent"), eyes=("game", "dream"), speed=SPEEDS, step=(None,))
        return (isinstance(name, str) and name in choices and not isinstance(value, (bool, float))
                and value in list(choices[name]))

    def publish(self, state: dict) -> None:
        """The newest state, for every tab that waits."""
        with self.bell:
            state |= self.settings | dict(title=self.title, shots=len(self.shots))
        body = gzip.compress(json.dumps(state).encode(), 1)
        with self.bell:
            self.number, self.body = self.number + 1, body
            self.bell.notify_all()

    def newer(self, number: int, timeout: float) -> tuple[int, bytes]:
        """The newest state once it is newer than `number`, or what there is when time is up."""
        self.bell.wait_for(lambda: self.number != number and self.body or self.closed, timeout)
        return self.number, self.body


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

    def report(self) -> dict:
        """Steps a second: reached, possible; steps dropped."""
        span = self.ends[-1] - self.ends[0] if len(self.ends) > 1 else 0
        return dict(rate=round((len(self.ends) - 1) / span, 1) if span else None, late=self.late,
                    possible=round(1 / self.busy) if self.busy else None)

    def rest(self, period: float) -> None:
        """Nothing to do, which is neither late nor slow."""
        self.due = time.monotonic() + period
        self.ends.clear()


def perform(stage: Stage, desk: Desk) -> None:
    """Step game and dream at the desk's speed until it closes: the only thread that computes."""
    pace = Pace()
    while not desk.closed:
        with desk.bell:
            desk.bell.wait_for(lambda: desk.changed or desk.closed, pace.due - time.monotonic())
            begun, changed, desk.changed = time.monotonic(), desk.changed, False
            settings, wishes, desk.wishes = dict(desk.settings), desk.wishes, []
            moments = [desk.moments.get(value) for name, value in wishes if name == "restart"]
            asked = any(name == "step" for name, _ in wishes)
            stepping = asked or begun >= pace.due and not settings["paused"]
            if stepping:  # a key pressed from here on counts for the next step
                keys, desk.tapped = desk.held | desk.tapped, set()
        for moment in moments:
            stage.restart(moment)
        if stepping:
            action = (action_of(keys, stage.names) if settings["player"] == "you" else
                      stage.agents_choice(("game", "dream").index(settings["eyes"])))
            stepping = action is not None
        if stepping:
            stage.step(action)
            keep(stage, desk)
        if stepping or changed:
            desk.publish(stage.report() | pace.report())
        if stepping and not asked:
            pace.took(begun, 1 / settings["speed"])
        elif begun >= pace.due:
            pace.rest(1 / settings["speed"])


def keep(stage: Stage, desk: Desk) -> None:
    """Hand the desk the moments, and a shot while it records; a full reel ends the recording."""
    with desk.bell:
        desk.moments = dict(stage.moments)
        if desk.settings["recording"]:
            desk.shots.append(shoot(stage))
            desk.settings["recording"] = len(desk.shots) < RECORDED


# ---- the server ---------------------------------------------------------------------------------


class Refused(Exception):
    """A request that gets a 4xx: status, words."""


class Handler(BaseHTTPRequestHandler):
    """GET / the page, /frame the newest state, /moment a remembered frame, /recording.gif the
    recording; POST /key the keys held, /control a button."""

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
        for name, value in {"Content-Type": kind, "Content-Length": len(body),
                            "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff",
                            **{k.replace("_", "-"): v for k, v in headers.items()}}.items():
            self.send_header(name, str(value))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Say nothing: a line a frame helps nobody."""

    def do_GET(self):
        """Answer, or refuse."""
        self.answer({"/": self.page, "/frame": self.frame, "/moment": self.moment,
                     "/recording.gif": self.recording})

    def do_POST(self):
        """Answer, or refuse."""
        self.answer({"/key": self.key, "/control": self.control})

    def answer(self, routes: dict) -> None:
        """Check where the request comes from, then hand it to its route."""
        try:
            self.check_origin()
            path, _, query = self.path.partition("?")
            if path not in routes:
                raise Refused(404, "no such page")
            routes[path]({name: values[-1] for name, values in parse_qs(query).items()})
        except Refused as refused:
            self.close_connection = True  # what is left of its body must not pass for a request
            status, words = refused.args
            self.reply(status, words.encode(), "text/plain; charset=utf-8")

    def check_origin(self) -> None:
        """Refuse a request that a page of another site sent, by its own name or by a name that it
        made point here (DNS rebinding)."""
        hosts, origins = (self.headers.get_all(name) or [] for name in ("Host", "Origin"))
        if len(hosts) != 1 or not self.server.is_ours(hosts[0]):
            raise Refused(403, "this name is not the server's; use the address that it printed")
        for origin in origins:
            scheme, _, name = origin.partition("://")
            theirs = name == hosts[0] or name.endswith(COLAB) and self.server.is_ours(name)
            if scheme not in ("http", "https") or not theirs:
                raise Refused(403, "this page belongs to another server")

    def page(self, _) -> None:
        """The page; it may load nothing from elsewhere."""
        self.reply(200, (HERE / "play.html").read_bytes(), "text/html; charset=utf-8",
                   Content_Security_Policy="default-src 'none'; script-src 'unsafe-inline'; "
                   "style-src 'unsafe-inline'; connect-src 'self'; img-src 'self' data:; "
                   "frame-ancestors 'self'")

    def frame(self, query: dict) -> None:
        """The newest state after number `after`, for `tab`; waits a second at most."""
        after, desk = number(query.get("after")), self.server.desk
        with desk.bell:
            mine = desk.visit(tab_of(query))
            newest, body = desk.newer(after, timeout=1.0)
        self.reply(200, body, "application/json", Content_Encoding="gzip", Number=newest,
                   Pad="yours" if mine else "taken")

    def moment(self, query: dict) -> None:
        """The frame of a remembered moment."""
        with self.server.desk.bell:
            moment = self.server.desk.moments.get(number(query.get("step")))
        if moment is None:
            raise Refused(404, "no such moment")
        self.reply(200, json.dumps(pixels(moment.frame)).encode(), "application/json")

    def recording(self, _) -> None:
        """What was recorded, as a GIF."""
        with self.server.desk.bell:
            shots, speed = list(self.server.desk.shots), self.server.desk.settings["speed"]
        if not shots:
            raise Refused(404, "nothing was recorded")
        file = io.BytesIO()
        write_gif(shots, file, speed)
        self.reply(200, file.getvalue(), "image/gif",
                   Content_Disposition='attachment; filename="dream.gif"')

    def key(self, _) -> None:
        """{"tab": …, "held": ["arrowup", " "]}: all keys held now."""
        order = self.order()
        held = order.get("held")
        if not isinstance(held, list) or not all(
                isinstance(key, str) and key in KEYS for key in held):
            raise Refused(400, f"held: a list of {', '.join(map(repr, KEYS))}")
        with self.server.desk.bell:
            self.server.desk.set_held(held)
        self.done()

    def control(self, _) -> None:
        """{"tab": …, "name": "paused", "value": true}: a button."""
        order, desk = self.order(), self.server.desk
        name, value = order.get("name"), order.get("value")
        with desk.bell:
            if not desk.valid(name, value):
                raise Refused(400, "no such control, or not a value of it")
            desk.control(name, value)
        self.done()

    def order(self) -> dict:
        """The JSON of a POST from the tab that holds the pad."""
        length = number(self.headers.get("Content-Length"))
        if length > 10_000:
            raise Refused(413, "too long")
        try:
            order = json.loads(self.rfile.read(length))
        except (ValueError, RecursionError):
            raise Refused(400, "not JSON") from None
        if not isinstance(order, dict):
            raise Refused(400, "not a JSON object")
        with self.server.desk.bell:
            if not self.server.desk.visit(tab_of(order)):
                raise Refused(409, "another tab plays; this one watches")
        return order

    def done(self) -> None:
        """It is done, and there is nothing to say."""
        self.reply(200, b"{}", "application/json")


def number(text: str | None) -> int:
    """A decimal number of a request."""
    if text is None or not (text.isascii() and text.isdigit()) or len(text) > 15:
        raise Refused(400, "a number is missing")
    return int(text)


def tab_of(fields: dict) -> str:
    """The name that a tab gave itself."""
    tab = fields.get("tab")
    if not isinstance(tab, str) or not 0 < len(tab) <= 40:
        raise Refused(400, "tab: a short name is missing")
    return tab


class Server(socketserver.ThreadingTCPServer):
    """A thread a connection; none of them touches the model."""

    daemon_threads, request_queue_size = True, 64
    allow_reuse_address = os.name != "nt"  # on Windows it would let two servers share a port

    def __init__(self, host: str, port: int, desk: Desk):
        self.host, self.desk = host, desk
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), Handler)

    @property
    def url(self) -> str:
        """Where the page is."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_address[1]}/"

    def is_ours(self, name: str) -> bool:
        """Is `name:port` what this server may be called? Any port: ssh may forward another."""
        try:
            name = urlsplit(f"//{name}").hostname or ""
        except ValueError:
            return False
        if name in (*LOCAL, self.host.lower()):
            return True
        if "COLAB_RELEASE_TAG" in os.environ and name.endswith(COLAB):
            return True
        if self.host in LOCAL:
            return False
        try:  # served to others: a bare address is never another site's name
            return bool(ipaddress.ip_address(name))
        except ValueError:
            return name in (socket.gethostname().lower(), socket.getfqdn().lower())

    def handle_error(self, request, client_address):
        """A tab that closes in mid-answer is no error."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


# ---- the command line ---------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = drama.Parser("play.py", description=__doc__, allow_abbrev=False,
                          formatter_class=argparse.RawDescriptionHelpFormatter)
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
    if not 0 <= own.port < 2**16:
        raise drama.Refusal(f"--port {own.port}: must lie from 0 to {2**16 - 1}")
    if not 1 <= own.steps <= 10_000:
        raise drama.Refusal(f"--steps {own.steps}: must lie from 1 to 10000")
    if own.seed < 0:
        raise drama.Refusal(f"--seed {own.seed}: must not be negative")
    return own


def checkpoint_of(own: argparse.Namespace) -> Path:
    """The file to play from."""
    if own.run:  # at the instant of a save only the older one may be there
        newest, older = own.run / "checkpoint.pt", own.run / "checkpoint.prev.pt"
        return older if older.exists() and not newest.exists() else newest
    return own.checkpoint or HERE.parent / "results" / f"{own.game or 'Pong'}.pt"


def make_gif(stage: Stage, path: Path, steps: int, speed: int) -> None:
    """The agent plays in its dream, and the game gets the same actions."""
    shots = [shoot(stage)]
    with open(path, "wb") as file:
        for _ in range(steps):
            stage.step(stage.agents_choice(1))
            shots.append(shoot(stage))
        write_gif(shots, file, speed)
    print(f"{path}: {steps} steps, reward {stage.sums[0]:g} in the game, "
          f"{stage.sums[1]:.1f} in the dream")


def serve(stage: Stage, title: dict, own: argparse.Namespace) -> None:
    """Open the page and play until Ctrl-C."""
    desk = Desk(title, own.speed)
    screen = (os.name == "nt" or sys.platform == "darwin"
              or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    if not own.no_browser and not screen:
        raise drama.Refusal("no display to open a browser on; with --no-browser the page is served "
                            "all the same, with --gif FILE none is needed")
    try:
        server = Server(own.host, own.port, desk)
    except OSError as error:
        raise drama.Refusal(f"--host {own.host} --port {own.port}: {error.strerror or error}; "
                            "try another --port") from None
    port = server.server_address[1]
    print(f"{title['game']} after {title['trained']:,} steps of training: {server.url} "
          "(Ctrl-C stops it)")
    print(f"from another machine: ssh -L {port}:localhost:{port} THIS-MACHINE, then that address")
    if own.host not in LOCAL:
        print(f"--host {own.host}: whoever reaches this machine's port {port} can watch and play; "
              "nothing is encrypted and nobody is asked for a password")
    if "COLAB_RELEASE_TAG" in os.environ:
        print("in Colab start this in the background (%%bash --bg); the address, in a cell: from "
              "google.colab.output import eval_js; "
              f"print(eval_js('google.colab.kernel.proxyPort({port})'))")
    sys.stdout.flush()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    if not own.no_browser:
        webbrowser.open(server.url)
    with server:
        perform(stage, desk)


def main(argv: list[str] | None = None) -> int:
    """Run a command line; return the exit code."""
    try:
        own = parse(argv)
        torch.set_num_threads(1)  # one frame at a time: more threads only get in each other's way
        path = checkpoint_of(own)
        cfg, model, agent, step = load(path, own.game)
        stage = Stage(cfg, model, agent, own.seed)
        if own.gif:
            make_gif(stage, own.gif, own.steps, own.speed)
        else:
            serve(stage, dict(game=cfg.game, trained=step, actions=stage.names, speeds=SPEEDS,
                              surprised=SURPRISED, checkpoint=path.name), own)
    except drama.Refusal as error:
        print(f"play.py: {error}", file=sys.stderr)
        return error.code
    except OSError as error:
        print(f"play.py: {error.filename}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
