"""Does a run's world model tell the truth? Rewards and values, predicted against what came.

    python experiments/diagnose.py runs/Boxing-0 [--recent 4000]
    python experiments/diagnose.py runs/Boxing-0 --fresh 4000 [--random]

Reads a run folder's checkpoint and frames (it may be in use) and looks at the last steps, which
were trained on, or at fresh play of the policy or of random actions, which was not:
- the reward head on real frames: mean prediction where the reward was negative, zero, positive,
  and the AUC: how often it gives such a step a higher chance of such a reward than another step;
  0.5 is blind;
- dreams along the real actions: correlation of predicted and real sums of reward, mean of each;
  the AUC so many steps into the dream, each dream drawn once;
- dreams of the policy: mean reward a step, chance of a gain and of a loss, beside the real ones;
  by quarters too: where dreams begin as play goes and then promise more, the policy has found
  what the model does not punish;
- the critic: its value on real frames against the discounted returns that followed;
- gains and losses: which follows which and after how many steps (the median), and how many steps
  before them dreams foresee them;
- of a run: the same for all its gains and losses, by how often they were trained on.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from world_model import (  # noqa: E402
    auc,
    chances,
    dream_along,
    play,
    rewards_dreamt,
    rewards_seen,
    windows,
)

import drama  # noqa: E402


def load(path: Path, with_replay: bool):
    """A run folder -> cfg, model, agent, step and, if asked for, replay."""
    device = torch.device("cpu")
    saved = drama.load_checkpoint(path / "checkpoint.pt", device, {})
    cfg, step, replay = drama.Config(**saved["config"]), saved["at"]["step"], None
    if with_replay:
        with drama.guard(f"{path}: no replay that fits its checkpoint", "name a run that trained"):
            replay = drama.Replay(dataclasses.replace(cfg, steps=step), device)
            replay.load_state_dict(saved["replay"])
            replay.frame = torch.from_numpy(np.memmap(path / "frames.bin", np.uint8, "c",
                                                      shape=tuple(replay.frame.shape)))
    return cfg, *drama.rebuild(saved, cfg, device), step, replay


def look_at_dreams(cfg, model, agent, batch, z) -> None:
    """Rewards of dreams along the real actions, then of dreams of the policy."""
    d, real = dream_along(cfg, model, batch, z)
    along = model.two_hot.mean(model.reward(d))
    total, came = along.sum(1), real.sum(1)
    both = np.corrcoef(total.numpy(), came.numpy())[0, 1]
    print(f"dreams of {cfg.horizon} steps along the real actions: sum of reward "
          f"{total.mean():+.3f}, real {came.mean():+.3f}, correlation {both:.2f}")
    context = (x[:, :cfg.context] for x in (z, batch.action, batch.first))
    dream = model.imagine(agent.actor, *context)
    loss, gain = chances(model, dream.feature[:, 1:, cfg.d_z:]).mean((0, 1))  # [z, d]: of d
    print(f"dreams of the policy: reward a step {dream.reward.mean():+.4f}, chance of a gain "
          f"{gain:.2%}, of a loss {loss:.2%}; real {batch.reward.mean():+.4f}, "
          f"{(batch.reward > 0).float().mean():.2%}, {(batch.reward < 0).float().mean():.2%}")
    for name, reward in (("real", real), ("dreamt along the real actions", along),
                         ("dreamt by the policy", dream.reward)):
        quarters = reward.tensor_split(min(4, cfg.horizon), 1)
        print(f"reward a step from quarter to quarter of a dream, {name}: "
              + ", ".join(f"{part.mean():+.4f}" for part in quarters))


def look_ahead(cfg, model, replay, begin: int) -> None:
    """How well are gains and losses told from other steps, so many steps into a dream?"""
    starts = torch.arange(begin, replay.size - cfg.context - cfg.horizon + 1, 2)
    found = []
    every = starts[:, None] + torch.arange(cfg.context + cfg.horizon)
    for rows in every.to(replay.device).split(128):
        batch = replay.batch(rows)
        z = drama.draw_one_hot(model.encode(batch.frame[:, :cfg.context])).flatten(-2)
        d, real = dream_along(cfg, model, batch, z)
        found.append(torch.cat([chances(model, d), real[..., None]], -1))
    loss, gain, real = torch.cat(found).cpu().unbind(-1)
    for name, chance, event in (("gain", gain, real > 0), ("loss", loss, real < 0)):
        words = [f"{t + 1}: {auc(chance[:, t].numpy(), event[:, t].numpy()):.2f}"
                 for t in (0, 1, 3, 7, 15) if t < cfg.horizon]
        print(f"dreams along the real actions, AUC of a {name} so many steps on: "
              + ", ".join(words))


def look_at_values(cfg, agent, replay, batch, z, d) -> None:
    """The critic on real frames beside what followed."""
    returns, R = torch.zeros(replay.size), 0.0
    for t in range(replay.size - 1, -1, -1):  # cut at lost lives, at openings, at the run's end
        R = replay.reward[t] + cfg.gamma * R * (not replay.terminated[t])
        if t + 1 < replay.size and replay.first[t + 1]:
            R = replay.reward[t]
        returns[t] = R
    feature = torch.cat([z[:, 1:], d[:, :-1] * ~batch.first[:, 1:, None]], -1)
    value = agent.two_hot.mean(agent.critic(feature))[:, cfg.context:]
    then = returns[batch.rows[:, 1:]][:, cfg.context:]
    both = np.corrcoef(value.flatten().numpy(), then.flatten().numpy())[0, 1]
    print(f"critic on real frames: mean value {value.mean():+.3f}, discounted return that followed "
          f"{then.mean():+.3f}, correlation {both:.2f}")


def foresee(cfg, model, replay, events, ahead: int):
    """Dreams along the real actions from `ahead` steps before each row of events (n,) -> those rows
    that have such a past, their rewards, and whether the dream had more than half of each."""
    rows = events[:, None] + torch.arange(1 - cfg.context - ahead, 1)
    rows = rows[rows[:, 0] >= 0]
    rows = rows[~replay.first[rows[:, cfg.context:]].any(1)]  # no game opens within the dream
    sums = [(np.zeros(0), np.zeros(0))]
    for some in rows.split(256) if len(rows) else ():  # a game may have 30,000 rewards
        batch = replay.batch(some)
        z = torch.cat([drama.draw_one_hot(model.encode(f)) for f in batch.frame.split(16)])
        sums.append(rewards_dreamt(cfg, model, batch, z.flatten(-2)))
    total, real = np.concatenate(sums, 1)
    return rows[:, -1], real, total * np.sign(real) > abs(real) / 2


def in_words(real, told) -> str:
    """Shares of gains and losses that were foreseen."""
    return ", ".join(f"{told[kind].mean():.0%} of {kind.sum()} {name}" for name, kind in
                     (("gains", real > 0), ("losses", real < 0)) if kind.any())


def look_at_events(cfg, model, replay, begin: int) -> None:
    """What follows a gain or a loss, and how early each is dreamt along the real actions."""
    events = begin + replay.reward[begin:replay.size].nonzero().flatten()
    signs, apart = replay.reward[events].sign(), events.diff().float()
    kinds = (1, "gain"), (-1, "loss")
    for sign, name in kinds:
        words = []
        for then, following in kinds:
            steps = apart[(signs[:-1] == sign) & (signs[1:] == then)]
            later = f", {steps.quantile(0.5):g} steps later" if len(steps) else ""
            words.append(f"a {following} {len(steps)} times{later}")
        print(f"after a {name}: {'; '.join(words)}")
    for ahead in (2, 4, 8, 16):
        _, real, told = foresee(cfg, model, replay, events, ahead)
        print(f"{ahead} steps before, a dream along the real actions foresees "
              f"{in_words(real, told)}")


def look_at_training(cfg, model, replay) -> None:
    """How often must the world model train on a reward before dreams foresee it 4 steps before?"""
    begun = np.pad(replay.trained[:replay.size].cumsum(0).numpy(), (cfg.batch_length, 0))
    trained = begun[cfg.batch_length:] - begun[:-cfg.batch_length]  # windows that hold a row
    rows, real, told = foresee(cfg, model, replay, replay.reward.nonzero().flatten(), 4)
    bounds = 0, 4, 8, 16, 32, 64, 128, int(trained.max(initial=0)) + 1
    for low, high in zip(bounds, bounds[1:]):
        those = (trained[rows] >= low) & (trained[rows] < high)
        if those.any():
            print(f"trained on {low} to {high - 1} times: 4 steps before, a dream foresees "
                  f"{in_words(real[those], told[those])}")


@torch.no_grad()
def main() -> None:
    """Load, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.error = drama.refuse
    parser.add_argument("run")
    parser.add_argument("--recent", type=int, default=4000, help="how many of the last steps")
    parser.add_argument("--fresh", type=int, default=0, help="play so many steps, look at those")
    parser.add_argument("--random", action="store_true", help="in --fresh act at random")
    args = parser.parse_args()
    cfg, model, agent, step, replay = load(Path(args.run), not args.fresh)
    torch.manual_seed(0)
    needed, asked = cfg.context + 2 * cfg.horizon, args.fresh or min(args.recent, step)
    if asked < needed:
        drama.refuse(f"{needed} steps are needed, in the run, in --recent and in --fresh")
    played = "played in training"
    if args.fresh:
        player = None if args.random else drama.Player(cfg, model, agent, 1, torch.device("cpu"))
        replay = play(cfg, torch.device("cpu"), args.fresh, cfg.seed + 1, player)
        args.recent, played = args.fresh, "of fresh random play" if args.random else "of fresh play"
    recent = min(args.recent, replay.size)
    rows = windows(cfg, replay.size - recent, replay.size)
    batch = replay.batch(rows)
    print(f"{cfg.game}, step {step:,}, {recent:,} steps {played}: {len(rows)} windows of "
          f"{rows.shape[1]}")
    z = torch.cat([drama.draw_one_hot(model.encode(f)) for f in batch.frame.split(16)]).flatten(-2)
    d, _ = model.sequence(z, batch.action, first=batch.first)
    predicted, real = model.two_hot.mean(model.reward(d)), batch.reward
    for words in rewards_seen(predicted[:, cfg.context:], chances(model, d)[:, cfg.context:],
                              real[:, cfg.context:]):
        print(f"reward head on real frames, {words}")
    look_at_dreams(cfg, model, agent, batch, z)
    look_ahead(cfg, model, replay, replay.size - recent)
    look_at_values(cfg, agent, replay, batch, z, d)
    if replay.reward[replay.size - recent:replay.size].any():
        look_at_events(cfg, model, replay, replay.size - recent)
    if not args.fresh:
        look_at_training(cfg, model, replay)


if __name__ == "__main__":
    try:
        main()
    except drama.Refusal as error:
        drama.say(f"diagnose.py: {error}", sys.stderr)
        sys.exit(2)
