"""Draw the episodes of several runs of one game into one picture, with reference returns.

    python experiments/curves.py --game GridWorld --out results/gridworld.png results/gridworld*.csv

Each file is an episodes.csv. For GridWorld the lines are the random policy, played here for 500
episodes, and the best possible return; for Atari, the published random, human and Drama scores.
"""

import argparse
import csv
import sys
from pathlib import Path

import matplotlib
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from drama import SCORES, GridWorld  # noqa: E402


def random_return(episodes: int = 500) -> float:
    """Mean return of uniformly random actions in GridWorld."""
    env, rng = GridWorld(episodes, image_size=8), np.random.default_rng(0)
    env.reset(seed=0)
    actions = rng.integers(len(GridWorld.MOVES), size=(GridWorld.STEPS, episodes))
    return sum(env.step(a)[1].sum() for a in actions) / episodes


def main() -> None:
    """Read the files, draw, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--game", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--mean", type=int, default=10, help="episodes in the running mean")
    parser.add_argument("files", nargs="+", help="episodes.csv of each run")
    args = parser.parse_args()
    if args.game == "GridWorld":
        levels = {"random": random_return(), "best possible": GridWorld.best_return(),
                  "90% of the best": 0.9 * GridWorld.best_return()}
    else:
        levels = {k: SCORES[args.game][k] for k in ("random", "human", "Drama")}
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained", sharey=True)
    for i, name in enumerate(args.files):
        with open(name) as file:
            rows = list(csv.DictReader(file))
        returns = np.array([float(row["return"]) for row in rows])
        k = min(args.mean, len(returns))
        mean = np.convolve(returns, np.ones(k) / k, mode="valid")
        for axis, column, scale in zip(axes, ("step", "seconds"), (1, 60)):
            x = np.array([float(row[column]) for row in rows]) / scale
            axis.plot(x, returns, ".", ms=2, alpha=0.4, color=f"C{i}")
            axis.plot(x[k - 1:], mean, color=f"C{i}", label=Path(name).stem)
    for axis, label in zip(axes, ("environment steps", "minutes")):
        for name, level in levels.items():
            axis.axhline(level, ls="--", lw=1, color="grey")
            axis.annotate(f"{name} {level:.1f}", (0.99, level), xycoords=("axes fraction", "data"),
                          ha="right", va="bottom", fontsize="small")
        axis.set(xlabel=label, title=f"{args.game}: return of an episode, mean of {args.mean}")
    axes[0].legend(fontsize="small", loc="center right")
    figure.savefig(args.out, dpi=90)
    print(args.out)


if __name__ == "__main__":
    main()
