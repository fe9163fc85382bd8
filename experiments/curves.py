"""Draw the episodes of several runs of one game into one picture: a line and a band for each group.

    python experiments/curves.py --game GridWorld --out results/gridworld.png \
        --group DFS results/gridworld-?.csv --group uniform results/gridworld-?-uniform.csv
    python experiments/curves.py --folder runs/atari100k --out results/atari100k.png

The second draws every game of a folder of suite.py, a panel for each. In the first each file is a
run's episodes.csv. Of each run the mean of --mean episodes is taken; a group's line is the mean
over its runs, its band reaches from the worst to the best of them. --against steps minutes adds a
panel over the runs' own clock, which backbones.py lets count core-minutes. --flags are the runs'
own, such as "--preset laptop": they say where dreams, and with them learning to act, begin.
For laptop-1 to laptop-7 they need "--see-first 500", too.
Prints for each run that mean at --minutes and at the end, and when it first passed --level.
For GridWorld the levels are the random policy, played here for 500 episodes, and the best possible
return; for Atari, the published random, human and Drama scores, and with --dreamerv3 what is known
of the curve of DreamerV3's published runs.
"""

import argparse
import csv
import glob
import sys
from itertools import cycle, product
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import drama  # noqa: E402
from experiments import pictures  # noqa: E402
from experiments.gridworld import GridWorld  # noqa: E402
from experiments.suite import PUBLISHED  # noqa: E402

COLOURS = "#1f5fa8", "#7a7a7a", "#e07b00", "#2a8a3e", "#8b3fa0", "#c0392b", "#17a2a2", "#7a4a1f"
DASHES = "-", "--", ":"  # each with all colours, as groups may be more than these
AXES = {"steps": "environment steps", "minutes": "minutes"}
# mean return by environment step over five seeds, read off the scores that come with its code
DREAMER_V3 = {
    "Boxing": {20_000: 22.7, 100_000: 79.4},
    "Pong": {10_000: -18.0, 20_000: -14.0, 30_000: -2.5, 50_000: 7.0, 100_000: 16.0}}


class Episodes(NamedTuple):
    """The running mean of a run's episodes; entry i is that of the k that ended with this one."""

    steps: np.ndarray
    minutes: np.ndarray
    mean: np.ndarray


def random_return(episodes: int = 500) -> float:
    """Mean return of uniformly random actions in GridWorld."""
    env, rng = drama.make_env("GridWorld", episodes, 8), np.random.default_rng(0)
    env.reset(seed=0)
    actions = rng.integers(len(GridWorld.MOVES), size=(GridWorld.STEPS, episodes))
    return sum(env.step(a)[1].sum() for a in actions) / episodes


def read(name: str, k: int) -> Episodes:
    """An episodes.csv, as means of k."""
    with drama.guard(f"{name}: not an episodes.csv, empty or cut short", "name another file"):
        with open(name) as file:
            rows = list(csv.DictReader(file))
        if not rows:
            raise ValueError("no rows")
        steps, seconds, returns = (np.array([float(row[column]) for row in rows])
                                   for column in ("step", "seconds", "return"))
    k = min(k, len(returns))
    mean = np.convolve(returns, np.ones(k) / k, mode="valid")
    return Episodes(steps[k - 1:], seconds[k - 1:] / 60, mean)


def tell(name: str, run: Episodes, k: int, marks, level) -> None:
    """A line for a run."""
    words, end = [], run.minutes[-1]
    for mark in (*(mark for mark in marks if mark < end), end):
        i = np.searchsorted(run.minutes, mark, side="right") - 1
        if i >= 0:
            words.append(f"{run.mean[i]:.2f} at {mark:.1f} min (step {run.steps[i]:,.0f})")
    if level is not None:
        passed = np.flatnonzero(run.mean > level)
        words.append(f"passes {level:.2f} " + (
            f"at step {run.steps[passed[0]]:,.0f}, {run.minutes[passed[0]]:.1f} min"
            if len(passed) else "never"))
    drama.say(f"{name}, mean of {k}: " + "; ".join(words))


def band(axis, along: str, name: str, runs: list[Episodes], dashes: str, colour: str) -> None:
    """A group: its mean, and from the worst to the best run, where all of them have played."""
    at = [getattr(run, along) for run in runs]
    begin, end = max(a[0] for a in at), min(a[-1] for a in at)
    if begin > end:
        drama.refuse(f"--group {name}: its runs have no {along} in common")
    x = np.linspace(begin, end, 300)
    means = np.stack([np.interp(x, a, run.mean) for a, run in zip(at, runs)])
    axis.fill_between(x, means.min(0), means.max(0), color=colour, alpha=0.2, lw=0)
    seeds = f"{len(runs)} seeds" if len(runs) > 1 else "one seed"
    axis.plot(x, means.mean(0), dashes, color=colour, lw=2.5, label=f"{name}, {seeds}")


def draw(game: str, groups: dict, levels: dict, flags: str, k: int, against=("steps",),
         dreamerv3: bool = False):
    """The figure: return against environment steps, minutes or both."""
    from matplotlib import pyplot
    width = 10 if len(against) == 1 else 6.5 * len(against)
    figure, axes = pyplot.subplots(1, len(against), figsize=(width, 5), sharey=True,
                                   layout="constrained", squeeze=False)
    for axis, along in zip(axes[0], against):
        for (name, runs), style in zip(groups.items(), cycle(product(DASHES, COLOURS))):
            band(axis, along, name, runs, *style)
        axis.margins(y=0.05)
        for level in levels.values():
            axis.axhline(level, ls="--", lw=1, color="black")
        if along == "steps" and dreamerv3:
            axis.plot(*zip(*DREAMER_V3[game].items()), "o", color="black",
                      label="DreamerV3, 5 seeds, published")
        if along == "steps" and flags:
            cfg, _ = drama.parse(flags.split())
            dreams = cfg.warmup + 3 * cfg.see_first * cfg.train_every
            axis.axvline(dreams, ls=":", color="black")
            axis.annotate(" dreams begin", (dreams, 0.02), xycoords=("data", "axes fraction"))
        axis.set(xlabel=AXES[along], title=game)
        axis.spines[["top", "right"]].set_visible(False)
        axis.locator_params("x", nbins=5)
        axis.xaxis.set_major_formatter("{x:,.0f}")
    low, high = axes[0, -1].get_ylim()
    y = low
    for name, level in sorted(levels.items(), key=lambda item: item[1]):
        y = max(level, y + 0.06 * (high - low))  # no two words in one place
        axes[0, -1].annotate(f" {name} {round(level, 2):g}", (1, y), va="center",
                             xycoords=("axes fraction", "data"))
    axes[0, 0].set_ylabel(f"return of an episode, mean of {k}")
    axes[0, 0].legend(loc="best")
    return figure


def draw_folder(folder: Path, k: int):
    """A panel for each game of Atari 100k that has begun, a curve for each seed."""
    from matplotlib import pyplot
    files = {game: [path for path in sorted(folder.glob(f"{game}-*/episodes.csv"))
                    if len(path.read_text().splitlines()) > 1] for game in PUBLISHED}
    files = {game: paths for game, paths in files.items() if paths}
    if not files:
        drama.refuse(f"--folder {folder}: no episode of any game has ended")
    columns = min(5, len(files))
    height = -(-len(files) // columns)
    figure, axes = pyplot.subplots(height, columns, figsize=(10, 2.2 * height + 0.8), sharex=True,
                                   layout="constrained", squeeze=False)
    for axis in axes.flat[len(files):]:
        axis.set_visible(False)
    lines = {}  # by label, for the legend
    for axis, (game, paths) in zip(axes.flat, files.items()):
        for path, colour in zip(paths, cycle(COLOURS)):
            run, seed = read(path, k), f"seed {path.parent.name.rpartition('-')[2]}"
            lines[seed], = axis.plot(run.steps / 1000, run.mean, color=colour, label=seed)
        for name, style in (("random", ":"), ("human", "--"), ("Drama", "-")):
            lines[name] = axis.axhline(float(PUBLISHED[game][name]), ls=style, lw=1, color="black")
        axis.set_title(game, fontsize="medium")
        axis.tick_params(labelsize="small")
    figure.legend(lines.values(), lines.keys(), ncols=len(lines), loc="outside lower center",
                  title=f"mean return of {k} episodes against thousands of environment steps")
    return figure


def compare(args):
    """Read the files, tell of each, draw."""
    if args.game not in ("GridWorld", *PUBLISHED):
        drama.refuse(f"--game {args.game}: neither GridWorld nor of Atari 100k")
    if args.dreamerv3 and args.game not in DREAMER_V3:
        drama.refuse(f"--dreamerv3: no curve of {args.game}, only of {', '.join(DREAMER_V3)}")
    if args.game == "GridWorld":
        levels = {"random": random_return(), "best possible": GridWorld.BEST}
    else:
        levels = pictures.levels(args.game)
    groups = {}
    for name, *patterns in args.group:
        if name in groups:
            drama.refuse(f"--group {name} is given twice; name all its files at once")
        files = sorted(file for pattern in patterns for file in glob.glob(pattern) or [pattern])
        missing = [file for file in files if not Path(file).is_file()]
        if missing or not files:
            drama.refuse(f"--group {name}: no file {missing[0] if missing else 'is given'}")
        groups[name] = [read(file, args.mean) for file in files]
        for file, run in zip(files, groups[name]):
            tell(file, run, args.mean, args.minutes, args.level)
    return draw(args.game, groups, levels, args.flags, args.mean, args.against, args.dreamerv3)


def main(argv: list[str] | None = None) -> int:
    """Run a command line; return the exit code."""
    parser = argparse.ArgumentParser("curves.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = drama.refuse
    parser.add_argument("--game", help="the game of the files")
    parser.add_argument("--folder", type=Path, help="run folders of many games, instead of files")
    parser.add_argument("--out", required=True)
    parser.add_argument("--group", nargs="+", action="append", default=[],
                        metavar=("NAME", "FILE"), help="a name, then an episodes.csv of each run")
    parser.add_argument("--flags", default="", help="the runs' flags: mark where dreams begin")
    parser.add_argument("--against", nargs="+", default=["steps"], choices=AXES, help="the panels")
    parser.add_argument("--dreamerv3", action="store_true", help="add its published curve")
    parser.add_argument("--mean", type=int, default=10, help="episodes in the running mean")
    parser.add_argument("--minutes", type=float, nargs="*", default=[], help="marks to report")
    parser.add_argument("--level", type=float, help="report when the running mean passes it")
    matplotlib.use("Agg")
    matplotlib.rcParams["font.size"] = 13
    try:
        args = parser.parse_args(argv)
        if bool(args.folder) == bool(args.game and args.group):
            drama.refuse("give --game and --group, or --folder")
        if args.mean < 1:
            drama.refuse(f"--mean {args.mean}: must be 1 or more")
        pictures.writable(args.out)
        figure = draw_folder(args.folder, args.mean) if args.folder else compare(args)
        figure.savefig(args.out, dpi=128)
    except (drama.Refusal, OSError) as error:
        drama.say(f"curves.py: {error}", sys.stderr)
        return 2
    drama.say(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
