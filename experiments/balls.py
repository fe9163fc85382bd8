"""Pong: what becomes of a ball that flies at the agent, in play and in dreams from that moment?

    python experiments/balls.py runs/Pong-0 [--recent 6000] [--dreams 4]
    python experiments/balls.py runs/Pong-0 --fresh 8000

Reads a run folder's checkpoint and frames (it may be in use) and looks at the last steps, which
were trained on, or at fresh play of the policy, which was not. From each moment at which a ball
flies to the right, where the agent is, and has come a quarter to a half of the way, it dreams 20
steps on: along the real actions, along those of another such moment, and by the policy. A ball is
- lost: the agent loses a point before it wins one;
- returned: the ball comes near the agent, and then flies to the left;
- gone: from the ninth step on most frames have no ball. In play it is always somewhere, but for
  the moments between a point and the next serve;
- or none of these: in play, still near the agent at the last step.
A line tells the shares in play, then those in dreams, by what became of the ball in play.
"""

import argparse
import dataclasses
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from diagnose import load  # noqa: E402
from world_model import field, play  # noqa: E402

import drama  # noqa: E402

STEPS, APART = 20, 6  # of a dream; between two moments
FATES = "lost", "returned", "gone", "none"
BRIGHT = 0.4  # a ball at least; a real one has 1.4
AIMED, NEAR = (0.25, 0.55), 0.78  # how far it has come where dreams begin, and at the agent


def find(frames: torch.Tensor) -> np.ndarray:
    """Frames (n, 3, H, W) in 0..1 -> how far from the left paddle, 0, to the right one, 1, the ball
    has come, (n,); nan where none is."""
    blue = field(frames)
    light = (blue - blue.flatten(1).median(1).values[:, None, None]).clamp(min=0)
    light = light * (light > 0.06)
    near = torch.nn.functional.avg_pool2d(light[:, None], 3, 1, 1)[:, 0] * 9  # sums of 3 x 3
    most, where = near.flatten(1).max(1)
    x = (where % near.shape[2]).double() / near.shape[2]
    return torch.where(most > BRIGHT, x, torch.nan).numpy()


def fate(x: np.ndarray, reward: np.ndarray) -> str:
    """What becomes of a ball: its way x (l,), as from `find`, and the rewards meanwhile (l,)."""
    points = np.flatnonzero(abs(reward.cumsum()) > 0.5)
    if len(points) and reward.cumsum()[points[0]] < 0:
        return "lost"
    close = np.flatnonzero(x > NEAR)
    if len(close) and (np.diff(x[close[0]:]) < -0.01).sum() > 1:
        return "returned"
    return "gone" if np.isnan(x[8:]).mean() > 0.5 else "none"


def moments(x: np.ndarray, first: np.ndarray, context: int) -> np.ndarray:
    """Steps at which a ball flies at the agent; no game opens from the context to the end."""
    found = [-APART]
    for t in range(context, len(x) - STEPS - 1):
        aimed = AIMED[0] < x[t] < AIMED[1] and x[t] - x[t - 1] > 0.01  # nan is neither
        if aimed and t - found[-1] >= APART and not first[t - context + 1:t + STEPS + 1].any():
            found.append(t)
    return np.array(found[1:], int)


class Script:
    """An actor that takes the actions (b, l), one after another."""

    def __init__(self, actions: torch.Tensor, num_actions: int):
        self.left = iter(torch.nn.functional.one_hot(actions, num_actions).unbind(1))

    def __call__(self, feature: torch.Tensor) -> torch.Tensor:
        return next(self.left) * 1e4


def dream(model, actor, batch) -> list[str]:
    """Dream on from a batch of contexts -> the fate of each ball."""
    z = torch.cat([drama.draw_one_hot(model.encode(f)) for f in batch.frame.split(16)]).flatten(-2)
    dreamt = model.imagine(actor, z, batch.action, batch.first)
    latents = dreamt.feature[:, 1:, :model.cfg.d_z].flatten(0, 1)
    x = np.concatenate([find(model.decode(some)) for some in latents.split(256)])
    return [*map(fate, x.reshape(len(z), -1), dreamt.reward.numpy())]


def shares(fates) -> str:
    """How often each fate, in words."""
    count = Counter(fates)
    return ", ".join(f"{name} {count[name] / max(1, len(fates)):.1%}" for name in FATES)


@torch.no_grad()
def look(cfg, model, agent, replay, begin: int, dreams: int) -> None:
    """Find the balls from row `begin` on, dream, print."""
    model.cfg = cfg = dataclasses.replace(cfg, horizon=STEPS)  # it dreams by its own settings
    frames = replay.frame[begin:replay.size].split(512)
    x = np.concatenate([find(some.permute(0, 3, 1, 2).float() / 255) for some in frames])
    reward, first = replay.reward[begin:].numpy(), replay.first[begin:].numpy()
    starts = moments(x, first, cfg.context)
    if len(starts) < 2:
        drama.refuse("fewer than two balls fly at the agent in these steps")
    came = np.array([fate(x[t + 1:t + STEPS + 1], reward[t:t + STEPS]) for t in starts])
    print(f"{len(came)} balls fly at the agent; in play {shares(came)}", flush=True)
    ends = torch.from_numpy(begin + starts)
    others = ends.roll(len(ends) // 2)  # never its own
    kinds = ("along the real actions", ends), ("along another moment's actions", others), (
        "of the policy", None)
    for kind, acted in kinds:
        dreamt = [[] for _ in ends]
        for chosen in torch.arange(len(ends)).repeat(dreams).split(64):
            batch = replay.batch(ends[chosen, None] + torch.arange(1 - cfg.context, 1))
            actor = agent.actor if acted is None else Script(
                replay.action[acted[chosen, None] + torch.arange(STEPS)],
                model.sequence.num_actions)
            for i, what in zip(chosen.tolist(), dream(model, actor, batch)):
                dreamt[i].append(what)
        print(f"dreams {kind}: {shares(sum(dreamt, []))}")
        for name in FATES[:2]:
            those = [what for i in np.flatnonzero(came == name) for what in dreamt[i]]
            print(f"  {(came == name).sum()} {name} in play: {shares(those)}", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run a command line; return the exit code."""
    parser = argparse.ArgumentParser("balls.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = drama.refuse
    parser.add_argument("run", type=Path, help="a run folder of Pong")
    parser.add_argument("--recent", type=int, default=6000, help="how many of the last steps")
    parser.add_argument("--fresh", type=int, default=0, help="play so many steps, look at those")
    parser.add_argument("--dreams", type=int, default=4, help="dreams from each moment")
    try:
        args = parser.parse_args(argv)
        if min(args.recent, args.dreams) < 1 or args.fresh < 0:
            drama.refuse("--recent and --dreams must be 1 or more, --fresh not below 0")
        cfg, model, agent, step, replay = load(args.run, not args.fresh)
        if cfg.game != "Pong" or cfg.image_size < 32:
            drama.refuse(f"{args.run} holds {cfg.game} at {cfg.image_size} pixels, not Pong at 32 "
                         "or more")
        torch.manual_seed(0)
        played = "played in training"
        if args.fresh:
            device, played = torch.device("cpu"), "of fresh play"
            replay = play(cfg, device, args.fresh, cfg.seed + 1,
                          drama.Player(cfg, model, agent, 1, device))
        begin = max(0, replay.size - (args.fresh or args.recent))
        print(f"step {step:,}, {replay.size - begin:,} steps {played}, dreams of {STEPS} steps")
        look(cfg, model, agent, replay, begin, args.dreams)
    except drama.Refusal as error:
        drama.say(f"balls.py: {error}", sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
