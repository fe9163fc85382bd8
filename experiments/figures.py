"""Draw the README's pictures from a real run.

    python experiments/figures.py runs/GridWorld-0              all of them, into results/figures/
    python experiments/figures.py runs/Pong-0 --only memory dream

The files are named after the game: results/figures/gridworld-dice.png and so on.

    model     the whole method in one drawing; no run is needed
    dice      a frame and the next one as K dice of C faces: which dice turn over
    memory    what is left of each token, exp(S_i - S_j): the decay matrices of three heads
    guess     the prior's guess, the frame, the posterior, before and after a surprise
    dream     a dream beside the truth, and how far the truth would surprise the dreamer
    returns   rewards, values, lambda-returns and advantages along a dream of the policy
    dfs       which rows DFS draws next, by age; from experiments/dfs_counts.py; no run is needed
    reading   the run's curves, with the steps at which its phases end; and prints a table, each
              logged number at its start, at its greatest and at the end
"""

import argparse
import csv
import dataclasses
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dfs_counts  # noqa: E402
import diagnose  # noqa: E402

import drama  # noqa: E402

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

BLUE, ORANGE, GREEN, RED, GREY = "#1f5fa8", "#e07b00", "#2a8a3e", "#c22f2f", "#8a8a8a"
STYLE = {"font.size": 13, "axes.titlesize": 14, "figure.titlesize": 16, "legend.fontsize": 12,
         "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 128,
         "figure.constrained_layout.use": True}  # 10 inches wide: 1280 pixels, shown at 800
RECENT = 2000  # how many of the last steps a moment is looked for in


class Trained(NamedTuple):
    """What a run folder holds."""

    folder: Path
    cfg: drama.Config
    model: drama.WorldModel
    agent: drama.ActorCritic
    replay: drama.Replay


def load(folder: Path) -> Trained:
    """A run folder's checkpoint and frames; it may be in use."""
    cfg, model, agent, _, replay = diagnose.load(folder, True)
    return Trained(folder, cfg, model, agent, replay)


class Seen(NamedTuple):
    """Recorded windows as the world model sees them, each frame after the ones before it."""

    batch: drama.Batch  # (b, l)
    log_post: torch.Tensor  # (b, l, K, C): after the frame was seen
    z: torch.Tensor  # (b, l, K*C): drawn from it
    d: torch.Tensor  # (b, l, d_model): what foretells the frame after
    kl: torch.Tensor  # (b, l-1): the surprise at them, in nats; 0 where an episode opens


def see(run: Trained, rows: torch.Tensor) -> Seen:
    """Encode the windows at rows (b, l), read them, guess ahead."""
    batch = run.replay.batch(rows)
    log_post = run.model.encode(batch.frame)
    z = drama.draw_one_hot(log_post).flatten(-2)
    d, _ = run.model.sequence(z, batch.action, first=batch.first)
    log_prior = run.model.log_prior(d[:, :-1], z[:, 1:])
    kl = drama.kl_divergence(log_post[:, 1:], log_prior) * ~batch.first[:, 1:]
    return Seen(batch, log_post, z, d, kl)


def calm_rows(run: Trained, length: int, stride: int) -> torch.Tensor:
    """Windows (b, length) of the last steps, `stride` apart, in which no episode opens."""
    begin = max(0, run.replay.size - RECENT)
    starts = torch.arange(begin, run.replay.size - length + 1, stride)
    rows = starts[:, None] + torch.arange(length)
    calm = ~run.replay.first[rows[:, 1:]].any(1)
    if not calm.any():
        raise drama.Refusal(f"{run.folder}: no {length} steps in a row without a new episode; "
                            "train it longer")
    return rows[calm]


def picture(frame: torch.Tensor) -> np.ndarray:
    """A frame (3, H, W) in 0..1 or (H, W, 3) uint8 -> what imshow takes."""
    if frame.dtype == torch.uint8:
        return frame.numpy()
    return frame.permute(1, 2, 0).clamp(0, 1).numpy()


def show(axis, frame: torch.Tensor, title: str = "", colour: str = "none") -> None:
    """A frame, framed in a colour."""
    axis.imshow(picture(frame))
    axis.set(xticks=[], yticks=[])
    axis.set_title(title)
    for spine in axis.spines.values():
        spine.set(visible=colour != "none", color=colour, linewidth=4)


def beside(axis, words: str) -> None:
    """A label to the left of a row of frames."""
    axis.text(-0.12, 0.5, words, transform=axis.transAxes, ha="right", va="center")


def node(axis, x: float, y: float, words: str, colour: str) -> None:
    """A word in a round box."""
    axis.text(x, y, words, ha="center", va="center", fontsize=14 if len(words) < 20 else 12,
              bbox=dict(boxstyle="round,pad=0.35", fc=colour, ec="0.3"), zorder=3)


def arrow(axis, start: tuple, end: tuple, words: str = "", colour: str = "0.25", style: str = "->",
          path: str = "arc3", at: tuple = (0.0, 0.0)) -> None:
    """An arrow, and words beside its middle, moved by `at`."""
    axis.annotate("", end, start, arrowprops=dict(
        arrowstyle=style, color=colour, lw=2, shrinkA=15, shrinkB=15, mutation_scale=18,
        connectionstyle=path), zorder=1)
    axis.text((start[0] + end[0]) / 2 + at[0], (start[1] + end[1]) / 2 + at[1], words,
              color=colour, ha="center", va="center", fontsize=12)


def draw_model():
    """Two steps of learning the world, two steps of a dream."""
    env = drama.make_env("GridWorld", 1, 64)
    frames = [env.reset(seed=3)[0][0, 0], env.step(np.array([1]))[0][0, 0]]
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 5.6))
    for axis, awake in zip(axes, (True, False)):
        axis.set(xlim=(0, 5.5), ylim=(-0.3, 6.6))
        axis.axis("off")
        axis.set_title("AWAKE: learn the world" if awake else "DREAM: learn to act", weight="bold")
        for x, t, frame in zip((1, 3.7), ("t", "t+1"), frames):
            if awake or t == "t":
                axis.imshow(frame, extent=(x - 0.45, x + 0.45, 5.35, 6.5), aspect="auto")
                axis.add_patch(pyplot.Rectangle((x - 0.45, 5.35), 0.9, 1.15, fill=False, ec="0.3"))
                arrow(axis, (x, 5.55), (x, 4.1), "encoder", at=(0.55, 0))
            node(axis, x, 4.1, f"$z_{{{t}}}$", "#cfe3f7")
            node(axis, x + 1.05, 3.2, f"$a_{{{t}}}$", "#fbe3c0")
            if not awake:
                arrow(axis, (x, 4.1), (x + 1.05, 3.2), "actor", GREEN, at=(0.42, 0.2))
            node(axis, x + 0.3, 2.1, "Mamba-2", "#e4e4e4")
            arrow(axis, (x, 4.1), (x + 0.2, 2.1))
            arrow(axis, (x + 1.05, 3.2), (x + 0.45, 2.1))
            node(axis, x + 0.3, 1, f"$d_{{{t}}}$", "#d8ecd8")
            arrow(axis, (x + 0.3, 2.2), (x + 0.3, 0.9))
            node(axis, x + 0.3, 0, f"reward $r_{{{t}}}$, end $e_{{{t}}}$", "white")
            arrow(axis, (x + 0.3, 1.1), (x + 0.3, -0.1))
        arrow(axis, (1.7, 2.1), (3.55, 2.1), "memory $h_t$", at=(0.22, -0.25))
        arrow(axis, (1.3, 1), (3.7, 4.1), "", ORANGE, "<->" if awake else "->",
              "arc3,rad=0.12")
        axis.text(2.8, 3.7 if awake else 5, "guess:\nhow far\noff?" if awake else
                  "no frame:\nthe guess takes\nits place", color=ORANGE, ha="center", va="center")
        if not awake:
            arrow(axis, (1.3, 1), (4.85, 3.2), "", GREEN, path="angle3,angleA=0,angleB=90")
    return figure


def draw_dice(run: Trained):
    """Two frames, one step apart, as dice."""
    seen = see(run, calm_rows(run, 2, 7))
    faces = seen.z.unflatten(-1, (run.cfg.categoricals, -1)).argmax(-1)  # (b, 2, K)
    turned = (faces[:, 0] != faces[:, 1]).sum(1)
    moved = (seen.batch.frame[:, 0] != seen.batch.frame[:, 1]).flatten(1).any(1)
    likely = (faces == seen.log_post.argmax(-1)).sum((1, 2))  # throws that fell on the likeliest
    some = (moved & (turned > 0) & (likely == likely[moved].max())).nonzero()[:, 0]
    i = some[turned[some].argsort()[len(some) // 4]]
    decoded = run.model.decode(seen.z[i])
    K, C = seen.log_post.shape[-2:]
    figure = pyplot.figure(figsize=(10, 6))
    grid = figure.add_gridspec(2, 3, width_ratios=(1, 2.6, 1))
    for row, when in enumerate(("a frame", "one step later")):
        left, middle, right = (figure.add_subplot(grid[row, column]) for column in range(3))
        show(left, seen.batch.frame[i, row], when)
        show(right, decoded[row], "drawn from the dice")
        probability = seen.log_post[i, row].exp().T.numpy()
        middle.imshow(probability, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for k, face in enumerate(faces[i, row].tolist()):
            colour = RED if row and face != faces[i, 0, k] else "black"
            middle.add_patch(pyplot.Rectangle((k - 0.5, face - 0.5), 1, 1, fill=False, lw=2,
                                              ec=colour))
            middle.text(k, C + 0.02 * C, face + 1, ha="center", va="center", color=colour,
                        fontsize=14 if K <= 16 else 8, weight="bold")
        middle.set(ylim=(C * 1.06, -0.6), xlim=(-0.6, K - 0.4), xticks=[], yticks=[0, C - 1],
                   yticklabels=[1, C], ylabel="face")
        middle.set_title(f"{K} dice of {C} faces: darker is likelier" if not row else
                         f"{turned[i]} of the {K} dice have turned over")
    return figure


def scan_arguments(run: Trained, rows: torch.Tensor):
    """x, dt, A, B, C of the first layer's ssd_scan along the recorded rows (l,); their batch."""
    caught, scan = [], drama.ssd_scan

    def catch(*arguments, **more):
        caught.append(arguments)
        return scan(*arguments, **more)

    drama.ssd_scan = catch
    try:
        batch = see(run, rows[None]).batch
    finally:
        drama.ssd_scan = scan
    return caught[0][:5], batch


def draw_memory(run: Trained):
    """Decay matrices of the heads that forget fastest, middling and slowest."""
    length = 2 * run.cfg.batch_length
    windows = calm_rows(run, length, 16)
    rewards = run.replay.reward[windows].abs().sum(1)
    rows = windows[rewards.argsort()[len(rewards) // 2]]
    if run.cfg.game == "GridWorld":  # an opening lies in the middle
        opened = run.replay.first[length:run.replay.size - length].nonzero()[-1, 0] + length
        rows = opened - length // 2 + torch.arange(length)
    (_, dt, A, _, _), batch = scan_arguments(run, rows)
    S = (dt * A)[0].cumsum(0)  # (l, h)
    segment = batch.first[0].cumsum(0)
    same = (segment[:, None] == segment).tril()
    decay = (S[:, None] - S).masked_fill(~same[..., None], -torch.inf).exp()  # (l, l, h)
    half = np.log(0.5) / (dt * A)[0].mean(0)  # steps until half is forgotten
    order = half.argsort()
    heads = order[[0, len(order) // 2, -1]]
    figure = pyplot.figure(figsize=(10, 5.4))
    strip, below = figure.subfigures(2, 1, height_ratios=(1, 2.7))
    for axis, t in zip(strip.subplots(1, 8), np.linspace(0, length - 1, 8).astype(int)):
        show(axis, batch.frame[0, t], f"frame {t}")
    for axis, head in zip(below.subplots(1, 3, sharey=True), heads):
        axis.imshow(decay[..., head].numpy(), cmap="Blues", vmin=0, vmax=1,
                    extent=(0, length, length, 0))
        for opening in batch.first[0, 1:].nonzero()[:, 0] + 1:
            axis.axhline(opening, color=RED, ls="--")
            axis.text(length, opening - 1, "new episode", color=RED, ha="right")
        axis.set_title(f"head {head + 1}: half is forgotten\nafter {half[head]:.1f} frames")
        axis.set(xlabel="written at frame", xticks=range(0, length + 1, 16),
                 yticks=range(0, length + 1, 16))
    below.axes[0].set_ylabel("read at frame")
    return figure


def draw_guess(run: Trained):
    """Prior, frame and posterior around a surprise."""
    before, after = 2, 3
    seen = see(run, calm_rows(run, run.cfg.context + 16, 5))
    begin = run.cfg.context + before
    inside, calm = seen.kl[:, begin:-after], sum(
        seen.kl[:, begin + k:seen.kl.shape[1] - after + k] for k in (-2, -1, 1, 2))
    alone = (inside - calm).flatten()  # surprises with quiet steps around them, one in a hundred
    i, t = divmod(int(alone.argsort()[-1 - len(alone) // 100]), inside.shape[1])
    t += begin + 1  # the surprising frame's place in its window
    places = range(t - before, t + after)
    figure, axes = pyplot.subplots(4, len(places), figsize=(10, 7.4), sharex="row",
                                   height_ratios=(1, 1, 1, 0.8))
    guesses = torch.stack([run.model.decode(run.model.guess(
        seen.d[i].expand(64, -1, -1)))[:, k - 1].mean(0) for k in places])
    corrected = run.model.decode(seen.z[i])
    for column, k in zip(axes.T, places):
        colour = RED if k == t else "none"
        when = "the surprise" if k == t else f"{abs(k - t)} step{'s' * (abs(k - t) > 1)} " + (
            "before" if k < t else "after")
        show(column[0], guesses[k - places[0]], when, colour)
        show(column[1], seen.batch.frame[i, k], "", colour)
        show(column[2], corrected[k], "", colour)
        kl = seen.kl[i, k - 1].item()
        column[3].bar([0], [kl], width=0.5, color=RED if k == t else BLUE)
        column[3].set(xlim=(-1, 1), ylim=(0, 1.25 * seen.kl[i, t - 1].item()), xticks=[], yticks=[])
        column[3].text(0, kl, f"{kl:.1f}", ha="center", va="bottom")
        column[3].spines["left"].set_visible(False)
    beside(axes[0, 0], "GUESS\nprior, before\nseeing the frame\n(mean of 64)")
    beside(axes[1, 0], "the frame")
    beside(axes[2, 0], "CORRECTION\nposterior, having\nseen the frame")
    beside(axes[3, 0], "surprise:\nKL in nats")
    return figure


def draw_dream(run: Trained):
    """A dream along recorded actions beside the record, and the truth's surprise to the dreamer."""
    context, steps = run.cfg.context, run.cfg.picture_steps
    windows = calm_rows(run, context + steps, 3)
    seen = see(run, windows[torch.randint(len(windows), (1,))])
    action, first = seen.batch.action, seen.batch.first
    d, states = run.model.sequence(seen.z[:, :context], action[:, :context],
                                   first=first[:, :context])
    d, dreamt, surprise = d[:, -1], [], []
    for t in range(context, context + steps):
        log_prior = run.model.log_prior(d, seen.z[:, t])
        surprise.append(drama.kl_divergence(seen.log_post[:, t], log_prior).item())
        dreamt.append(run.model.guess(d))  # no frame: the guess takes its place
        d, states = run.model.sequence(dreamt[-1], action[:, t], states)
    dreamt = run.model.decode(torch.stack(dreamt, 1))[0]
    shown = [k for k in (1, 2, 4, 6, 8, 12, 16, 24, 32) if k <= steps]
    figure = pyplot.figure(figsize=(10, 5.4))
    grid = figure.add_gridspec(3, len(shown) + 1, height_ratios=(1, 1, 2.4))
    for row, name in enumerate(("real", "dream")):
        for column, k in enumerate((0, *shown)):
            axis = figure.add_subplot(grid[row, column])
            when = "last seen" if not k else f"+{k}"
            if k and row:
                show(axis, dreamt[k - 1])
            else:
                show(axis, seen.batch.frame[0, context + k - 1], "" if row else when)
            if not column:
                beside(axis, name)
    axis = figure.add_subplot(grid[2, :])
    x = np.arange(1, steps + 1)
    axis.plot(x, surprise, ".-", color=RED, label="of the dream, which sees no frame")
    axis.plot(x, seen.kl[0, context - 1:].numpy(), ".-", color=BLUE,
              label="of one that sees each frame")
    axis.set(xlabel="steps since the last frame that the dream saw", ylim=(0, None),
             ylabel="surprise at the\nreal frame: KL, nats")
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    return figure


def draw_returns(run: Trained):
    """What the actor and the critic learn from one dream of the policy, of 12 steps at least."""
    model, agent, cfg = run.model, run.agent, run.cfg
    horizon = max(12, cfg.horizon)
    model.cfg = dataclasses.replace(cfg, horizon=horizon)
    rows = calm_rows(run, cfg.context, 8)
    seen = see(run, rows)
    dream = model.imagine(agent.actor, seen.z, seen.batch.action, seen.batch.first)
    model.cfg = cfg
    value = agent.two_hot.mean(agent.critic(dream.feature))
    R = drama.lambda_return(dream.reward, dream.end, value, cfg.gamma, cfg.lam)
    advantage = (R - value[:, :-1]) / agent.scale.clamp(min=1)
    both = torch.minimum(advantage.clamp(min=0).sum(1), (-advantage).clamp(min=0).sum(1))
    event = dream.reward[:, horizon // 3:-3].abs().amax(1)
    i = int((both + event).argmax())  # a dream with ups and downs, and a reward late in it
    frames = model.decode(dream.feature[i, :, :cfg.d_z])
    every = -(-(horizon + 1) // 9)
    figure = pyplot.figure(figsize=(10, 6.8))
    grid = figure.add_gridspec(4, horizon + 1, height_ratios=(1.2, 1, 2, 1.4))
    for t in range(0, horizon + 2 - every, every):
        axis = figure.add_subplot(grid[0, t:t + every])
        show(axis, frames[t], f"step {t}")
    x, plots = np.arange(horizon), [figure.add_subplot(grid[k, :]) for k in (1, 2, 3)]
    plots[0].bar(x, dream.reward[i].numpy(), color=ORANGE)
    plots[0].set(ylabel="reward")
    plots[1].plot(range(horizon + 1), value[i].numpy(), "o--", color=GREY,
                  label="V: the critic expects")
    plots[1].plot(x, R[i].numpy(), "o-", color=BLUE, label="R: the dream brings (lambda-return)")
    plots[1].set(ylabel="R and V")
    plots[1].legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    colours = [GREEN if a > 0 else RED for a in advantage[i]]
    plots[2].bar(x, advantage[i].numpy(), color=colours)
    plots[2].axhline(0, color="black", lw=1)
    plots[2].set(ylabel="advantage", xlabel="step of the dream "
                 "(green: the action becomes likelier, red: less likely)")
    names = [f"\n{'↑↓←→'[a]}" if cfg.game == "GridWorld" else "" for a in dream.action[i]]
    for axis in plots:
        axis.set(xlim=(-0.5, horizon + 0.5), xticks=x, xticklabels=[])
    plots[2].set(xticklabels=[f"{t}{name}" for t, name in zip(x, names)])
    return figure


def draw_reading(run: Trained):
    """The curves of metrics.csv and episodes.csv with the phases of the run."""
    tables = {}
    for name in ("metrics", "episodes"):
        with open(run.folder / f"{name}.csv") as file:
            rows = list(csv.DictReader(file))
        if not rows:
            drama.refuse(f"{run.folder}/{name}.csv has no row yet; train it longer")
        tables[name] = {key: np.array([float(row[key]) for row in rows]) for key in rows[0]}
    metrics, episodes, cfg = tables["metrics"], tables["episodes"], run.cfg
    see_first = cfg.see_first * cfg.train_every
    ends = (0, cfg.warmup, cfg.warmup + see_first, cfg.warmup + 3 * see_first, cfg.steps)
    phases = dict(zip(("random play, no training", "pictures only", "the other losses grow in",
                       "dreams: the policy learns"), zip(ends, ends[1:], ("0.92", "#cfe3f7",
                                                                         "#fbe3c0", "white"))))
    figure, axes = pyplot.subplots(3, 2, figsize=(10, 8.6), sharex=True)
    panels = (("return of an episode", episodes, ("return",)),
              ("reconstruction: squared error a frame", metrics, ("reconstruction",)),
              ("KL: surprise at the next frame, nats", metrics, ("kl",)),
              ("reward's cross-entropy, nats", metrics, ("reward",)),
              ("dreams: return and the critic's value", metrics,
               ("imagined_return", "imagined_value")),
              ("entropy of the policy, nats", metrics, ("policy_entropy",)))
    for axis, (title, table, names) in zip(axes.flat, panels):
        for name, colour in zip(names, (BLUE, ORANGE)):
            axis.plot(table["step"], table[name], "." if name == "return" else "-", ms=4,
                      color=colour, label=name)
        if len(names) > 1:
            axis.legend(loc="upper left")
        axis.set_title(title)
        for words, (begin, end, colour) in phases.items():
            axis.axvspan(begin, end, fc=colour, ec="0.7", zorder=0,
                         label=words if axis is axes[0, 0] else None)
        axis.set(xlim=(0, max(metrics["step"])))
    handles, names = axes[0, 0].get_legend_handles_labels()
    keep = [k for k, name in enumerate(names) if name in phases]
    figure.legend([handles[k] for k in keep], [names[k] for k in keep], ncols=2,
                  loc="outside upper center", frameon=False)
    for axis in axes[-1]:
        axis.set_xlabel("environment steps")
    drama.say("| logged | first row | greatest | last five rows |\n| --- | --- | --- | --- |")
    for name, column in metrics.items():
        column = column[~np.isnan(column)]
        if len(column):
            told = column[0], column.max(), column[-5:].mean()
            drama.say(f"| {name} | " + " | ".join(f"{x:.3g}" for x in told) + " |")
    return figure


FIGURES = dict(dice=draw_dice, memory=draw_memory, guess=draw_guess, dream=draw_dream,
               returns=draw_returns, reading=draw_reading)


@torch.no_grad()
def draw(run: Trained, name: str, out: Path) -> Path:
    """Draw and save one figure -> its path."""
    torch.manual_seed(run.cfg.seed)
    with pyplot.rc_context(STYLE):
        if name == "model":
            figure, path = draw_model(), out / "model.png"
        elif name == "dfs":
            figure, path = dfs_counts.draw(dfs_counts.arms()), out / "dfs.png"
        else:
            figure, path = FIGURES[name](run), out / f"{run.cfg.game.lower()}-{name}.png"
        figure.savefig(path)
        pyplot.close(figure)
    return path


def main() -> None:
    """Load a run, draw, save."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder with a checkpoint")
    parser.add_argument("--out", type=Path, default=Path("results/figures"))
    parser.add_argument("--only", nargs="*", choices=("model", *FIGURES, "dfs"),
                        help="some of them")
    parser.error = drama.refuse
    try:
        args = parser.parse_args()
        args.out.mkdir(parents=True, exist_ok=True)
        run = load(args.run)
        drama.say(f"{run.cfg.game}, step {run.replay.size:,}")
        for name in args.only or ("model", *FIGURES, "dfs"):
            drama.say(str(draw(run, name, args.out)))
    except (drama.Refusal, OSError) as error:
        drama.say(f"figures.py: {error}", sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
