"""Is the world model right? Train it alone on random play: reconstruction, next frame, dream.

    python experiments/world_model.py --game Pong --minutes 10 --picture pong.png [drama.py's flags]
    python experiments/world_model.py --game Pong --updates 3000 [drama.py's flags]
    python experiments/world_model.py --game Pong --updates 3000 --run runs/Pong-0 [its flags]
    python experiments/world_model.py --game Pong --updates 2200 --run runs/Pong-0 --rows 30000

Random play fills the replay with --warmup steps (default 5,000), or the run's frames do, with
--rows its first ones; nobody acts after that. The moving average of the weights is judged. Each
minute, or each tenth of the updates, two lines on play that was not trained on: fresh, random too
or by the run's policy, or with --rows the run's next 12,000 steps:
- squared error a frame of the reconstruction, of the next frame (decoded from the prior, all frames
  up to now seen) and of a dream 8 steps on, beside that of the last real frame held still;
- on Pong the ball: the share of its brightness over the background that is drawn where the real
  ball is; 1 is a perfect ball, 0 none;
- the reward head where the reward was negative, zero, positive: how many such steps, the mean
  prediction there, and the AUC: how often it gives such a step a higher chance of such a reward
  than another step; 0.5 is blind;
- dreams along the real actions: the correlation of dreamt with real sums of reward; of a run, at
  the end, the AUC of a gain and of a loss so many steps into the dream.
The picture shows the frames as rows.
"""

import argparse
import copy
import dataclasses
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import drama  # noqa: E402
from experiments import pictures  # noqa: E402

FRESH = 6000  # steps of play not trained on; a random player of Pong wins few points in them
HELD_OUT, LENGTH, AHEAD = 16, 48, 8  # windows drawn, frames in each, steps of the drawn dream


def play(cfg, device, steps: int, seed: int, player=None) -> drama.Replay:
    """A replay of random play, or of a drama.Player's."""
    env = drama.make_env(cfg.game, 1, cfg.image_size)
    rng = np.random.default_rng(seed)
    replay = drama.Replay(dataclasses.replace(cfg, steps=steps), device)
    frame, first = env.reset(seed=seed)[0], True
    while replay.size < steps:
        if player:
            action = player.act(torch.from_numpy(frame[:, 0]).to(device),
                                torch.tensor([first], device=device))[0].cpu().numpy()
        else:
            action = rng.integers(env.single_action_space.n, size=1)
        following, reward, terminated, truncated, info = env.step(action)
        replay.add(frame[0, 0], action[0], reward[0], terminated[0], first, torch.tensor(0))
        first = bool(drama.episode_over(terminated, truncated, info)[0])
        frame = env.step(action)[0] if first else following
    return replay


def field(frames: torch.Tensor) -> torch.Tensor:
    """Pong frames (n, 3, H, W) in 0..1 -> what lies between walls and paddles, (n, h, w).
    It is the blue of it: the background has 17 of 255, the ball 236."""
    h, w = frames.shape[-2:]
    return frames[:, 2, h * 36 // 210 + 1:h * 192 // 210, w * 24 // 160:w * 136 // 160]


def ball(real: torch.Tensor, drawn: torch.Tensor) -> float:
    """Share of the Pong ball's brightness that is drawn; frames (n, 3, H, W) in 0..1."""
    real, drawn = field(real), field(drawn)
    background = real.median()
    where = real - background > 0.2
    return ((drawn - background)[where].sum() / (real - background)[where].sum()).item()


def of_run(cfg, device, folder: Path, rows: int) -> tuple[drama.Replay, drama.Replay]:
    """A run's frames for a new world model, and fresh play of the run's policy. Or else the run's
    first so many rows, and the rows that follow."""
    from diagnose import load  # it imports this module
    theirs, model, agent, steps, saved = load(folder, True)
    if (theirs.game, theirs.image_size) != (cfg.game, cfg.image_size):
        raise drama.Refusal(f"{folder} holds {theirs.game} at {theirs.image_size} pixels, not "
                            f"{cfg.game} at {cfg.image_size}")
    if rows and steps <= FRESH:
        raise drama.Refusal(f"--rows: {folder} has {steps} steps, and needs more than {FRESH}")
    if rows and not 0 < rows <= steps - FRESH:
        raise drama.Refusal(f"--rows {rows}: must lie from 1 to {steps - FRESH}: {folder} has "
                            f"{steps} steps, and the last {FRESH} or more are to judge by")

    def part(begin: int, end: int) -> drama.Replay:
        """Those rows as a replay of their own, of which nothing was trained on yet."""
        replay = drama.Replay(dataclasses.replace(cfg, steps=end - begin), device)
        for name in ("frame", "action", "reward", "terminated", "first"):
            getattr(replay, name).copy_(getattr(saved, name)[begin:end])
        replay.size = end - begin
        return replay

    if rows:
        return part(0, rows), part(rows, min(steps, rows + 2 * FRESH))
    player = drama.Player(theirs, model.to(device), agent.to(device), 1, device)
    return part(0, steps), play(cfg, device, FRESH, cfg.seed + 1, player)


def auc(score: np.ndarray, event: np.ndarray) -> float:
    """Chance that the score of an event is above that of another step, a tie counting half."""
    rest = np.sort(score[~event])
    below = sum(np.searchsorted(rest, score[event], side) for side in ("left", "right")) / 2
    return float(below.mean() / len(rest)) if event.any() and len(rest) else float("nan")


def chances(model, d: torch.Tensor) -> torch.Tensor:
    """d_t (..., d_model) -> the reward head's chance that r_t is below 0, and above it, (..., 2).
    The mean will not do: where boxers exchange blows it is 0, though both chances are high.
    A reward within the first bin from 0 counts in part."""
    p, bins = model.reward(d).float().softmax(-1), model.two_hot.centres
    edge = (bins[1] - bins[0]) / 2
    return torch.stack([p[..., bins < -edge].sum(-1), p[..., bins > edge].sum(-1)], -1)


def rewards_seen(predicted, chance, real) -> list[str]:
    """The reward head on real frames, in words: where the reward was negative, zero, positive.
    predicted and real (n, l), chance (n, l, 2) as from `chances`."""
    predicted, real = predicted.float().flatten().cpu().numpy(), real.flatten().cpu()
    loss, gain = chance.flatten(0, 1).T.cpu().numpy()
    words = []
    for name, sign, score in (("negative", -1, loss), ("zero", 0, None), ("positive", 1, gain)):
        event = (real.sign() == sign).numpy()
        if not event.any():
            words.append(f"{name} never")
            continue
        told = f", AUC {auc(score, event):.3f}" if sign else ""
        words.append(f"{name} {event.sum()} times: mean {predicted[event].mean():+.3f}{told}")
    return words


def windows(cfg, begin: int, end: int) -> torch.Tensor:
    """Rows (n, context + horizon) whose last `horizon` columns hold each step once."""
    starts = torch.arange(begin, end - cfg.context - cfg.horizon + 1, cfg.horizon)
    return starts[:, None] + torch.arange(cfg.context + cfg.horizon)


@torch.no_grad()
def dream_along(cfg, model, batch, z) -> tuple[torch.Tensor, torch.Tensor]:
    """Dreams along the real actions, from the context z (b, context, K*C) on: d (n, l - context,
    d_model) and the real rewards there, of the `windows` in which no episode opens after it."""
    d, states = model.sequence(z[:, :cfg.context], batch.action[:, :cfg.context], None,
                               batch.first[:, :cfg.context])
    d, ds = d[:, -1], []
    for action in batch.action[:, cfg.context:].unbind(1):
        now = model.guess(d)
        d, states = model.sequence(now, action, states)
        ds.append(d)
    whole = ~batch.first[:, cfg.context:].any(1)
    return torch.stack(ds, 1)[whole], batch.reward[whole, cfg.context:]


@torch.no_grad()
def rewards_dreamt(cfg, model, batch, z) -> tuple[np.ndarray, np.ndarray]:
    """Sums of reward after the context, dreamt along the real actions and real, (n,) each."""
    d, real = dream_along(cfg, model, batch, z)
    dreamt = model.two_hot.mean(model.reward(d)).sum(1)
    return dreamt.cpu().numpy(), real.sum(1).cpu().numpy()


@torch.no_grad()
def foretell(cfg, model, replay) -> str:
    """All rewards of a replay, as the head sees them and as they are dreamt, in words."""
    model.eval()
    predicted, chance, real, sums = [], [], [], []
    for rows in windows(cfg, 0, replay.size).to(replay.device).split(64):
        batch = replay.batch(rows)
        z = drama.draw_one_hot(model.encode(batch.frame)).flatten(-2)
        d, _ = model.sequence(z, batch.action, first=batch.first)
        predicted.append(model.two_hot.mean(model.reward(d))[:, cfg.context:])
        chance.append(chances(model, d)[:, cfg.context:])
        real.append(batch.reward[:, cfg.context:])
        sums.append(np.stack(rewards_dreamt(cfg, model, batch, z)))
    seen = rewards_seen(*map(torch.cat, (predicted, chance, real)))
    dreamt, came = np.concatenate(sums, 1)
    both = np.corrcoef(dreamt, came)[0, 1] if dreamt.std() and came.std() else float("nan")
    return (f"reward head, {'; '.join(seen)}; {len(came)} dreams of {cfg.horizon} steps: "
            f"correlation {both:.2f}")


@torch.no_grad()
def look(cfg, model, batch) -> dict[str, torch.Tensor]:
    """Real frames, three ways to draw them: (b, l - AHEAD, 3, H, W), the same moments in each."""
    model.eval()
    z = drama.draw_one_hot(model.encode(batch.frame)).flatten(-2)
    d, _ = model.sequence(z, batch.action, first=batch.first)
    following = model.guess(d)  # z^_{t+1} from d_t
    start = AHEAD - 1  # frame t of the dream is seen AHEAD steps before it
    dreamt = []
    for t in range(AHEAD, z.shape[1]):
        lead = slice(max(0, t - AHEAD - cfg.context + 1), t - AHEAD + 1)
        out, states = model.sequence(z[:, lead], batch.action[:, lead], None, batch.first[:, lead])
        out = out[:, -1]
        for k in range(t - AHEAD + 1, t + 1):
            drawn = model.guess(out)
            out, states = model.sequence(drawn, batch.action[:, k], states)
        dreamt.append(drawn)
    real = batch.frame.permute(0, 1, 4, 2, 3).float() / 255
    return {"real": real[:, AHEAD:], "reconstruction": model.decode(z[:, AHEAD:]),
            "next frame": model.decode(following[:, start:-1]),
            f"dream, {AHEAD} steps on": model.decode(torch.stack(dreamt, 1)),
            "held still": real[:, :-AHEAD]}


def flags() -> tuple[argparse.Namespace, list[str]]:
    """This script's own flags, looked at, and the rest, which are drama.py's."""
    own = argparse.ArgumentParser(add_help=False)
    own.error = drama.refuse
    own.add_argument("--minutes", type=float, default=10)
    own.add_argument("--updates", type=int, default=0)
    own.add_argument("--run", type=Path)
    own.add_argument("--rows", type=int, default=0)
    own.add_argument("--picture", default="")
    own, rest = own.parse_known_args()
    if own.minutes <= 0 or own.updates < 0 or (own.rows and not own.run):
        drama.refuse("--minutes must be above 0, --updates 0 or more, and --rows needs --run")
    if own.picture:
        pictures.writable(own.picture)
    return own, rest


def main() -> None:
    """Train, measure, draw."""
    own, rest = flags()
    drama.keep_freed_pages()
    cfg, _ = drama.parse(["--warmup", "5000", *rest])
    torch.manual_seed(cfg.seed)
    device, precision = drama.choose_device(cfg)
    if own.run:
        replay, fresh = of_run(cfg, device, own.run, own.rows)
    else:
        replay, fresh = play(cfg, device, cfg.warmup, cfg.seed), play(cfg, device, FRESH,
                                                                      cfg.seed + 1)
    starts = torch.linspace(0, fresh.size - LENGTH, HELD_OUT).long()
    batch = fresh.batch((starts[:, None] + torch.arange(LENGTH)).to(device))
    num_actions = int(max(replay.action.max(), fresh.action.max())) + 1
    model = drama.WorldModel(cfg, num_actions).to(device, memory_format=drama.layout(device))
    average = copy.deepcopy(model).eval()
    learner, _ = drama.make_learners(cfg, model, drama.ActorCritic(cfg, num_actions).to(device))
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")
    print(f"{cfg.game}, preset {cfg.preset}, {' '.join(rest)}, {precision}, "
          f"{torch.get_num_threads()} threads", flush=True)
    spent, updates, mark, done = 0.0, 0, 0, False
    while not done:
        begun = time.perf_counter()
        with autocast:
            news = drama.update_world_model(model, learner, replay)
        drama.follow(average, model, max(1 - cfg.average, 10 / (10 + learner.updates)))
        spent, updates = spent + time.perf_counter() - begun, updates + 1
        done = updates >= own.updates if own.updates else spent >= 60 * own.minutes
        now = 10 * updates // own.updates if own.updates else spent // 60
        if now == mark and not done:
            continue
        mark = now
        with autocast:
            rewards = foretell(cfg, average, fresh)
            films = {name: film.float() for name, film in look(cfg, average, batch).items()}
        flat = {name: film.flatten(0, 1).cpu() for name, film in films.items()}
        real = flat.pop("real")
        line = f"{spent / 60:4.1f} min, {updates:5} updates, kl {news['kl']:.2f}; error "
        line += ", ".join(f"{name} {(x - real).square().sum((1, 2, 3)).mean():.2f}"
                          for name, x in flat.items())
        if cfg.game == "Pong":
            line += "; ball " + ", ".join(f"{name} {ball(real, x):.2f}"
                                          for name, x in flat.items())
        print(f"{line}\n          {rewards}", flush=True)
    if own.run:
        from diagnose import look_ahead  # it imports this module
        with torch.no_grad():
            look_ahead(cfg, average, fresh, 0)
    if own.picture:
        draw(films, cfg, f"{updates} updates, {spent / 60:.1f} minutes", own.picture)


def draw(films: dict, cfg, title: str, path: str) -> None:
    """Rows: the films; columns: moments of the first windows."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    names = [name for name in films if name != "held still"]
    moments = [(i, t) for i in (1, 5, 9, 13) for t in (4, 12, 20)]
    figure, axes = pyplot.subplots(len(names), len(moments), figsize=(18, 6.2),
                                   layout="constrained")
    for row, name in zip(axes, names):
        row[0].set_ylabel(name, fontsize=16)
        for axis, (i, t) in zip(row, moments):
            axis.imshow(films[name][i, t].permute(1, 2, 0).cpu().clamp(0, 1))
            axis.set(xticks=[], yticks=[])
    figure.suptitle(f"{cfg.game}, preset {cfg.preset}, world model alone: {title}; "
                    "play not trained on", fontsize=18)
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    try:
        main()
    except (drama.Refusal, OSError) as error:
        drama.say(f"world_model.py: {error}", sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
