"""What does DFS choose? The counters v and b of a whole run, without the learning.

    python experiments/dfs_counts.py [--rows 10000] [--picture dfs.png]

Draws with drama.py's own replay as a run of so many steps would, its warm-up 1% of them, and prints
for each tenth of the replay, oldest first: how often a row's sequence trained the world model (v)
and started a dream (b), and how likely each is to be drawn next, 1 being uniform. The counts a
row, not the rows, are what matters, so 10,000 rows tell of 100,000.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import drama  # noqa: E402
from experiments import pictures  # noqa: E402

ARMS = ("--preset paper", "--preset laptop",
        f"--preset laptop --temperature {drama.Config.temperature:g}",  # the paper's
        "--preset laptop --sampler uniform")


def play(flags: str, rows: int) -> dict[str, torch.Tensor]:
    """v, b and the next draws' weights of a run's replay, its frames left black."""
    cfg, _ = drama.parse(f"{flags} --device cpu --steps {rows} --image_size 16".split())
    replay = drama.Replay(cfg, torch.device("cpu"))
    wait = 3 * cfg.see_first * cfg.train_every * rows // 100_000  # NOTE(6), in a run so short
    for replay.size in range(rows // 100, rows + 1, cfg.train_every):
        if replay.size >= cfg.batch_size + cfg.batch_length:
            replay.draw_sequences()
            if replay.size >= rows // 100 + wait:
                replay.draw_contexts()
    v, b, s, T = replay.trained, replay.dreamt, cfg.dreams / cfg.batch_size, cfg.temperature
    dfs = cfg.sampler == "dfs"
    return dict(v=v.float(), b=b.float(),
                train=rows * (dfs * drama.dfs_sequence_logits(v, T)).softmax(0),
                dream=rows * (dfs * drama.dfs_dream_logits(v, b, s, T)).softmax(0))


def arms(rows: int = 10_000) -> dict[str, dict[str, torch.Tensor]]:
    """The counts and weights of every arm, by a name that says its preset and temperature."""
    torch.manual_seed(0)
    named = {}
    for flags in ARMS:
        cfg, _ = drama.parse(flags.split())
        name = (f"{cfg.preset}, DFS at {cfg.temperature:g}" if cfg.sampler == "dfs" else
                "uniform sampling")
        named[name] = play(flags, rows)
    return named


def draw(arms: dict):
    """A figure of the weights, by age."""
    from matplotlib import pyplot
    titles = dict(train="chance to be TRAINED on next", dream="chance to be DREAMT from next")
    colours = "#1f5fa8", "#e07b00", "#c22f2f", "#8a8a8a"
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    for axis, (key, title) in zip(axes, titles.items()):
        for (name, columns), colour in zip(arms.items(), colours):
            newest_first = columns[key].flip(0)
            means = [part.mean().item() for part in newest_first.chunk(50)]
            axis.plot(np.linspace(1, 99, 50), means, "--" if "uniform" in name else "-", lw=2.5,
                      color=colour, label=name)
        axis.set(xlabel="age of a frame, % of the run (0: the newest)", ylim=(0, None), title=title)
    axes[0].set_ylabel("1 = as likely as any other")
    axes[0].legend(title="preset, sampler at temperature")
    return figure


def main() -> None:
    """Print the tables; draw the weights."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.error = drama.refuse
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--picture", default="")
    args = parser.parse_args()
    if not 1000 <= args.rows <= 1_000_000:
        drama.refuse(f"--rows {args.rows}: must lie from 1000 to 1000000")
    if args.picture:
        pictures.writable(args.picture)
    drawn = arms(args.rows)
    for name, columns in drawn.items():
        never = (columns["v"] == 0).float().mean()
        print(f"\n{name}: no update began at {never:.0%} of rows; means of tenths, oldest first")
        for key, column in columns.items():
            tenths = " ".join(f"{part.mean():7.2f}" for part in column.chunk(10))
            print(f"{key:>6} {tenths}")
    if args.picture:
        import matplotlib
        matplotlib.use("Agg")
        matplotlib.rcParams["font.size"] = 13
        draw(drawn).savefig(args.picture, dpi=128)


if __name__ == "__main__":
    try:
        main()
    except (drama.Refusal, OSError) as error:
        drama.say(f"dfs_counts.py: {error}", sys.stderr)
        sys.exit(2)
