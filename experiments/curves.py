"""Draw the episodes of several runs of one game into one picture, with reference returns.

    python experiments/curves.py --game GridWorld --out results/gridworld.png results/gridworld*.csv
    python experiments/curves.py --folder runs/atari100k --out results/atari100k.png

The second draws every game of a folder of suite.py, a panel each. In the first each file is an
episodes.csv; it prints for each the mean return of the last --mean episodes that ended by the
--minutes, and when that running mean first passed --level. For GridWorld the lines are the random
policy, played here for 500 episodes, and the best possible return; for Atari, the published random,
human and Drama scores.
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


def read(path: str | Path, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """An episodes.csv -> steps, minutes and returns, and the running mean of (up to) k returns."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    steps, seconds, returns = (np.array([float(row[name]) for row in rows])
                               for name in ("step", "seconds", "return"))
    k = min(k, len(returns))
    return steps, seconds / 60, returns, np.convolve(returns, np.ones(k) / k, mode="valid")


def draw_folder(folder: Path, k: int):
    """A picture with a panel for each game of Atari 100k that has begun, a curve for each seed."""
    from matplotlib import pyplot
    files = {game: [path for path in sorted(folder.glob(f"{game}-*/episodes.csv"))
                    if path.stat().st_size] for game in SCORES}
    files = {game: paths for game, paths in files.items() if paths}
    if not files:
        sys.exit(f"no episode of any game has ended in {folder}")
    columns = min(6, len(files))
    height = -(-len(files) // columns)
    figure, axes = pyplot.subplots(height, columns, figsize=(3 * columns, 2.3 * height),
                                   layout="constrained", squeeze=False, sharex=True)
    for axis in axes.flat[len(files):]:
        axis.set_visible(False)
    lines = {}  # by label, for the legend
    for axis, (game, paths) in zip(axes.flat, files.items()):
        for path in paths:
            steps, _, _, mean = read(path, k)
            label = f"seed {path.parent.name.rpartition('-')[2]}"
            lines[label], = axis.plot(steps[-len(mean):] / 1000, mean, lw=1, label=label)
        for name, style in (("random", ":"), ("human", "--"), ("Drama", "-")):
            lines[name] = axis.axhline(SCORES[game][name], ls=style, lw=0.8, color="grey")
        axis.set_title(game, fontsize="small")
        axis.tick_params(labelsize="x-small")
    figure.legend(lines.values(), lines.keys(), fontsize="small", ncols=len(lines),
                  loc="outside lower center", title=f"mean return of {k} episodes against "
                  "thousands of environment steps")
    return figure


def main() -> None:
    """Read the files, draw, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--game", help="the game of the files")
    parser.add_argument("--folder", type=Path, help="run folders of many games, instead of files")
    parser.add_argument("--out", required=True)
    parser.add_argument("--mean", type=int, default=10, help="episodes in the running mean")
    parser.add_argument("--minutes", type=float, nargs="*", default=[], help="marks to report")
    parser.add_argument("--level", type=float, help="report when the running mean passes it")
    parser.add_argument("files", nargs="*", help="episodes.csv of each run")
    args = parser.parse_args()
    if bool(args.folder) == bool(args.game and args.files):
        parser.error("give --game and files, or --folder")
    matplotlib.use("Agg")
    if args.folder:
        draw_folder(args.folder, args.mean).savefig(args.out, dpi=90)
        print(args.out)
        return
    if args.game == "GridWorld":
        levels = {"random": random_return(), "best possible": GridWorld.best_return(),
                  "90% of the best": 0.9 * GridWorld.best_return()}
    else:
        levels = {k: SCORES[args.game][k] for k in ("random", "human", "Drama")}
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained", sharey=True)
    for i, name in enumerate(args.files):
        *times, returns, mean = read(name, args.mean)
        k = len(returns) - len(mean) + 1
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
