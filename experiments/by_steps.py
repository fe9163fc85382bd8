"""Print what runs had in each so many steps: the tables of results/ that go by steps.

    python experiments/by_steps.py results/boxing-0-183d38d.csv [more] [--every 10000]

Each file is a run's episodes.csv; beside NAME.csv its metrics may lie as NAME-metrics.csv, in a run
folder as metrics.csv. A line for each stretch: the mean return of the episodes that ended in it
and how many they were; the reward a step in play and in dreams; the policy's entropy; the range
of the dreamt returns; the KL and the reconstruction. The last step counts to the last stretch.
"""

import argparse
import csv
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import drama  # noqa: E402

SHOWN = {"dream": "imagined_reward", "entropy": "policy_entropy", "range": "return_scale",
         "KL": "kl", "reconstruction": "reconstruction"}


def columns(path: Path, every: int) -> dict:
    """A CSV with a column `step`: its columns as arrays, `step` as the number of its stretch."""
    with drama.guard(f"{path}: not a table of numbers, or cut short", "name another file"):
        with open(path) as file:
            rows = list(csv.DictReader(file))
        names = [name for name in (rows or [{}])[0] if name]  # None: cells that an old header lacks
        table = {name: np.array([float(row[name]) for row in rows]) for name in names}
    if "step" not in table:
        drama.refuse(f"{path}: no rows with a step")
    last = (table["step"].max() - 1) // every
    return table | {"step": np.minimum(table["step"] // every, last)}


def tell(path: Path, every: int) -> None:
    """The lines of a run."""
    played = columns(path, every)
    if "return" not in played:
        drama.refuse(f"{path}: no column `return`; name an episodes.csv")
    of_a_folder = path.name == "episodes.csv"
    beside = path.with_name("metrics.csv" if of_a_folder else f"{path.stem}-metrics.csv")
    logged = columns(beside, every) if beside.is_file() else {}
    print(path)
    for k in np.unique(played["step"]):
        now = played["step"] == k
        total, length = played["return"][now].sum(), played["length"][now].sum()
        words = [f"{k * every:,.0f} to {(k + 1) * every:,.0f}: return {total / now.sum():.1f} of "
                 f"{now.sum()}", f"play {total / length:.4f} a step"]
        for word, name in SHOWN.items() if logged else ():
            values = logged[name][logged["step"] == k]
            if not np.isnan(values).all():
                words.append(f"{word} {np.nanmean(values):.3g}")
        print("  " + ", ".join(words))


def main(argv: list[str] | None = None) -> int:
    """Run a command line; return the exit code."""
    parser = argparse.ArgumentParser("by_steps.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = drama.refuse
    parser.add_argument("files", nargs="+", type=Path, help="episodes.csv of each run")
    parser.add_argument("--every", type=int, default=10_000, help="steps in a stretch")
    try:
        args = parser.parse_args(argv)
        if args.every < 1:
            drama.refuse(f"--every {args.every}: must be 1 or more")
        for path in args.files:
            tell(path, args.every)
    except (drama.Refusal, OSError, KeyError) as error:  # metrics of other columns, too
        drama.say(f"by_steps.py: {error}", sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
