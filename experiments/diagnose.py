"""Does a run's world model tell the truth? Rewards and values, predicted against what came.

    python experiments/diagnose.py runs/Boxing-0 [--recent 4000]

Reads a run folder's checkpoint and frames (it may be in use) and looks at the last steps:
- the reward head on real frames: mean prediction where the reward was negative, zero, positive;
- dreams along the real actions: correlation of predicted and real sums of reward, mean of each;
- dreams of the policy: mean reward a step and its frequency, beside the real ones;
- the critic: its value on real frames against the discounted returns that followed.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import drama  # noqa: E402


def load(path: str):
    """A run folder -> cfg, model, agent, replay."""
    device = torch.device("cpu")
    run = drama.Run(drama.Config(out=path))
    saved = run.load(drama.Config(), (), device)
    if saved is None:
        sys.exit(f"no checkpoint in {path}")
    cfg = drama.Config(**saved["config"])
    actions = int(drama.make_env(cfg.game, 1, cfg.image_size).single_action_space.n)
    model, agent = drama.WorldModel(cfg, actions).eval(), drama.ActorCritic(cfg, actions)
    replay = drama.Replay(run.frames, cfg, device)
    for name, part in (("model", model), ("agent", agent), ("replay", replay)):
        part.load_state_dict(saved[name])
    return cfg, model, agent, replay


def look_at_rewards(model, batch, d) -> None:
    """The reward head on real frames."""
    predicted = model.two_hot.mean(model.reward(d))
    for name, where in (("negative", batch.reward < 0), ("zero", batch.reward == 0),
                        ("positive", batch.reward > 0)):
        if where.any():
            print(f"reward head on real frames, {name:>8} ({where.float().mean():6.2%} of steps): "
                  f"mean prediction {predicted[where].mean():+.3f}, real "
                  f"{batch.reward[where].mean():+.3f}")


def look_at_dreams(cfg, model, agent, batch, z) -> None:
    """Rewards of dreams along the real actions, then of dreams of the policy."""
    context = z[:, :cfg.context], batch.action[:, :cfg.context]
    out, states = model.sequence(*context, first=batch.first[:, :cfg.context])
    out, total = out[:, -1], 0
    for action in batch.action[:, cfg.context:].unbind(1):
        now = drama.draw_one_hot(model.log_prior(out)).flatten(-2)
        out, states = model.sequence.step(now, action, states)
        total = total + model.two_hot.mean(model.reward(out))
    real = batch.reward[:, cfg.context:].sum(1)
    both = np.corrcoef(total.numpy(), real.numpy())[0, 1]
    print(f"dreams of {cfg.horizon} steps along the real actions: sum of reward "
          f"{total.mean():+.3f}, real {real.mean():+.3f}, correlation {both:.2f}")
    reward = model.imagine(agent.actor, *context, batch.first[:, :cfg.context]).reward
    print(f"dreams of the policy: reward a step {reward.mean():+.4f}, above 0.5 in "
          f"{(reward > 0.5).float().mean():.2%}, below -0.5 in "
          f"{(reward < -0.5).float().mean():.2%}; real {batch.reward.mean():+.4f}, "
          f"{(batch.reward > 0).float().mean():.2%}, {(batch.reward < 0).float().mean():.2%}")


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


@torch.no_grad()
def main() -> None:
    """Load, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--recent", type=int, default=4000, help="how many of the last steps")
    args = parser.parse_args()
    cfg, model, agent, replay = load(args.run)
    torch.manual_seed(0)
    length, count = cfg.context + cfg.horizon, min(args.recent, replay.size) // 8
    if replay.size <= length or args.recent <= length:
        parser.error(f"needs more than {length} steps, in the run and in --recent")
    starts = torch.randint(max(0, replay.size - args.recent), replay.size - length, (count,))
    batch = replay.batch(starts[:, None] + torch.arange(length))
    print(f"{cfg.game}, step {replay.size:,}, last {args.recent:,}: {count} windows of {length}")
    z = torch.cat([drama.draw_one_hot(model.encode(f)) for f in batch.frame.split(16)]).flatten(-2)
    d, _ = model.sequence(z, batch.action, first=batch.first)
    look_at_rewards(model, batch, d)
    look_at_dreams(cfg, model, agent, batch, z)
    look_at_values(cfg, agent, replay, batch, z, d)


if __name__ == "__main__":
    main()
