"""Draw the episodes of several runs of one game into one picture, with reference returns.

    python experiments/curves.py --game GridWorld --out results/gridworld.png results/gridworld*.csv

Each file is an episodes.csv. Prints for each the mean return of the last --mean episodes that ended
by the --minutes, and when that running mean first passed --level. For GridWorld the lines are the
random policy, played here for 500 episodes, and the best possible return; for Atari, the published
random, human and Drama scores.
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


def tell(name: str, steps, minutes, mean, k: int, marks, level) -> None:
    """A line for a run: mean[i] is that of the episodes i to i + k - 1, which ended at minutes."""
    ended, words = minutes[k - 1:], []
    for mark in (*(mark for mark in marks if mark < ended[-1]), ended[-1]):
        i = np.searchsorted(ended, mark, side="right") - 1
        if i >= 0:
            words.append(f"{mean[i]:.2f} at {mark:.1f} min (step {steps[k - 1:][i]:,.0f})")
    if level is not None:
        passed = np.flatnonzero(mean > level)
        words.append(f"passes {level:.2f} " + (f"at step {steps[k - 1:][passed[0]]:,.0f}, "
                                               f"{ended[passed[0]]:.1f} min" if len(passed)
                                               else "never"))
    print(f"{name}, mean of {k}: " + "; ".join(words))


def main() -> None:
    """Read the files, draw, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--game", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--mean", type=int, default=10, help="episodes in the running mean")
    parser.add_argument("--minutes", type=float, nargs="*", default=[], help="marks to report")
    parser.add_argument("--level", type=float, help="report when the running mean passes it")
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
        times = [np.array([float(row[column]) for row in rows]) / scale
                 for column, scale in (("step", 1), ("seconds", 60))]
        tell(name, *times, mean, k, args.minutes, args.level)
        for axis, x in zip(axes, times):
            axis.plot(x, returns, ".", ms=2, alpha=0.4, color=f"C{i}")
            axis.plot(x[k - 1:], mean, color=f"C{i}", label=Path(name).stem)
    for axis, label in zip(axes, ("environment steps", "minutes")):
        for name, level in levels.items():
            axis.axhline(level, ls="--", lw=1, color="grey")
            axis.annotate(f"{name} {level:.1f}", (0.99, level), xycoords=("axes fraction", "data"),
                          ha="right", va="bottom", fontsize="small")
        axis.set(xlabel=label, title=f"{args.game}: return of an episode, mean of {args.mean}")
    axes[0].legend(fontsize="small", loc="best")
    figure.savefig(args.out, dpi=90)
    print(args.out)


if __name__ == "__main__":
    main()
