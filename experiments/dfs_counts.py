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

ARMS = {"paper, uniform": "--preset paper --sampler uniform", "paper, DFS": "--preset paper",
        "laptop, uniform": "--preset laptop --sampler uniform",
        "laptop, DFS at the paper's temperature": "--preset laptop --temperature 10",
        "laptop, DFS": "--preset laptop"}


def play(flags: str, rows: int) -> dict[str, torch.Tensor]:
    """v, b and the next draws' weights of a run's replay, its frames left black."""
    cfg, _ = drama.parse(f"{flags} --device cpu --steps {rows} --image_size 8".split())
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


def main() -> None:
    """Print the tables; draw the weights."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--picture", default="")
    args = parser.parse_args()
    torch.manual_seed(0)
    arms = {name: play(flags, args.rows) for name, flags in ARMS.items()}
    for name, columns in arms.items():
        never = (columns["v"] == 0).float().mean()
        print(f"\n{name}: no update began at {never:.0%} of rows; means of tenths, oldest first")
        for key, column in columns.items():
            tenths = " ".join(f"{part.mean():7.2f}" for part in column.chunk(10))
            print(f"{key:>6} {tenths}")
    if args.picture:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot
        titles = dict(train="chance to be trained on next", dream="chance to be dreamt from next")
        figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
        for axis, (key, title) in zip(axes, titles.items()):
            for name, columns in arms.items():
                means = [part.mean() for part in columns[key].chunk(50)]
                axis.plot(np.linspace(1, 99, 50), means, label=name)
            axis.set(title=f"{title} (1: uniform)", xlabel="age: % of the run when it was seen")
        axes[0].legend(fontsize="small")
        figure.savefig(args.picture, dpi=80)


if __name__ == "__main__":
    main()
