"""Atari 100k: train and evaluate every game, a core a run; at any time, the table.

    python experiments/suite.py --games all --seeds 1 --jobs 2 [drama.py's flags]
    python experiments/suite.py --games all --seeds 1 --report [drama.py's flags]

Runs what is unfinished. A run is finished when it was trained to --steps and --eval episodes were
played from its checkpoint: evaluation.json says so. Ctrl-C or SIGTERM stops it; the same command
goes on. The runs lie in --folder, each with its log, suite.log; each of 100,000 steps keeps 1.3 GB.
--report writes the table beside them as CSV and JSON.

Several processes, on one machine or many, share the work when they share the folder: each takes
its part by RANK and WORLD_SIZE, or by its place in a SLURM array.

    torchrun --nproc-per-node 2 experiments/suite.py --games all --jobs 1
    sbatch --array=0-25 --wrap "python experiments/suite.py --games all"

Exit code: 0 all is well, 1 a run failed, 2 a mistake in the command, 128 + n stopped by signal n.
torchrun stops all processes when one fails; under it a failed run is told in words alone.
"""

import argparse
import contextlib
import csv
import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

DRAMA = Path(__file__).resolve().parent.parent / "drama.py"
sys.path.insert(0, str(DRAMA.parent))
import drama  # noqa: E402
from drama import say  # noqa: E402

PUBLISHED = {row["game"]: row for row in csv.DictReader(  # mean scores
    (DRAMA.parent / "results" / "atari100k.csv").read_text().splitlines())}
OTHERS = ("random", "human", "Drama", "DreamerV3", "STORM")
POLL = 0.2  # seconds between two looks at the children
RESAMPLES, INTERVAL = 50_000, (2.5, 97.5)  # rliable's number; percentiles of a 95% interval
BUSY = "in use by another process"  # drama.py's words where it cannot have the run folder's lock
AGGREGATES = {"mean": ".3f", "median": ".3f", "interquartile mean": ".3f", "games above human": "g"}


def human_normalised(game: str, score: float) -> float:
    """(score - random) / (human - random)."""
    random, human = (float(PUBLISHED[game][who]) for who in ("random", "human"))
    return (score - random) / (human - random)


def read_json(path: Path) -> dict:
    """What the file holds; nothing where it is not there, was cut short or is something else."""
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


class Run:
    """A game and a seed: its folder, its settings, its command, and what its files say."""

    def __init__(self, game: str, seed: int, args, flags: list[str]):
        self.game, self.seed, self.episodes, self.child = game, seed, args.eval, None
        self.dir = Path(args.folder) / f"{game}-{seed}"
        self.log, self.name = self.dir / "suite.log", f"{game} seed {seed}"
        self.flags = ["--game", game, "--seed", str(seed), "--out", str(self.dir), *flags]
        self.cfg, self.given = drama.parse(self.flags)
        if self.given & {"checkpoint"} or (
                self.cfg.game, self.cfg.seed, self.cfg.out) != (game, seed, str(self.dir)):
            raise drama.Refusal("the suite sets --game, --seed, --out and --checkpoint; give it "
                                "--games, --first-seed and --folder")

    def settings(self) -> dict:
        """config.json."""
        return read_json(self.dir / "config.json")

    def evaluation(self) -> dict:
        """evaluation.json, if it is one of this game."""
        found = read_json(self.dir / "evaluation.json")
        numbers = all(isinstance(found.get(name), (int, float))
                      for name in ("step", "episodes", "mean"))
        return found if numbers and found.get("game") == self.game else {}

    def differences(self, names) -> list[str]:
        """Which of the settings `names` are not those that the run was begun with."""
        theirs, ours = self.settings(), dataclasses.asdict(self.cfg)
        return [f"{name} was {theirs[name]}, now {ours[name]}" for name in ours.keys() & names
                if name not in drama.ANYTIME and theirs.get(name, ours[name]) != ours[name]]

    def result(self, names) -> dict | None:
        """evaluation.json of a finished run with these settings; None for any other run."""
        found = self.evaluation()
        whole = found and found["step"] == self.cfg.steps and found["episodes"] >= self.episodes
        return found if whole and self.settings() and not self.differences(names) else None

    def table(self, name: str) -> list[dict]:
        """The rows of a CSV file of the run, none where it is not there."""
        try:
            with open(self.dir / name, newline="") as file:
                return list(csv.DictReader(file))
        except (FileNotFoundError, NotADirectoryError, ValueError, csv.Error):
            return []

    def last(self, column: str) -> float:
        """A column's last number in metrics.csv; 0 where there is none."""
        with contextlib.suppress(IndexError, KeyError, TypeError, ValueError):
            return float(self.table("metrics.csv")[-1][column])
        return 0.0

    def state(self) -> str:
        """How far a run has come that is not finished."""
        if differ := self.differences(self.given):
            return f"with other settings: {', '.join(differ)}"
        if not (self.dir / "config.json").exists():
            return "at its beginning"
        step, found = int(self.last("step")), self.evaluation()
        played = (f"evaluated at step {found['step']:,} over {found['episodes']} episodes" if found
                  else "not evaluated")
        return f"at step {step:,} of {self.cfg.steps:,}, {played}"

    def start(self, core: int | None, evaluate: bool = False) -> None:
        """Start drama.py as a child, on one core where the system can hold it there."""
        self.dir.mkdir(parents=True, exist_ok=True)
        self.evaluating = evaluate
        more = ["--eval", str(self.episodes)] if evaluate else []
        with open(self.log, "ab") as log:
            self.begin = log.tell()
            # a session of its own: the terminal's Ctrl-C must not reach it a second time
            self.child = subprocess.Popen(
                [sys.executable, str(DRAMA), *self.flags, *more], stdin=subprocess.DEVNULL,
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"})
        if core is not None:
            os.sched_setaffinity(self.child.pid, {core})

    def said(self) -> str:
        """What the child has written so far."""
        with open(self.log, "rb") as log:
            log.seek(self.begin)
            return log.read().decode(errors="replace")


# ---- running ------------------------------------------------------------------------------------


def share(env) -> tuple[int, int]:
    """(rank, world) of this process, from the variables of torchrun and of a SLURM array."""
    with drama.guard("RANK, WORLD_SIZE or SLURM_ARRAY_TASK_*", "unset them, or mend them"):
        rank, world = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
        if "SLURM_ARRAY_TASK_ID" in env:
            task = int(env["SLURM_ARRAY_TASK_ID"]) - int(env.get("SLURM_ARRAY_TASK_MIN", 0))
            tasks = int(env["SLURM_ARRAY_TASK_COUNT"])
            rank, world = task * world + rank, tasks * world
    if not 0 <= rank < world:
        raise drama.Refusal(f"process {rank} of {world} (RANK, WORLD_SIZE, SLURM_ARRAY_TASK_*): "
                            "number an array without gaps, --array=0-9")
    return rank, world


def tell_end(run: Run, stopped: bool) -> str:
    """One line on a child that has ended -> finished, stopped, busy, failed or, without a line,
    trained."""
    code, wanted = run.child.returncode, dataclasses.asdict(run.cfg)
    if code == 0 and not run.evaluating and not stopped:
        return "trained"
    lines = re.split(r"[\r\n]+", run.said().strip())
    # it may stand behind the bar of the process that has the folder and writes to the same log
    last = (re.findall("drama.py: .*", "\n".join(lines)) or lines)[-1]
    if code == 0 and (result := run.result(wanted)):
        minutes = run.last("seconds") / 60
        score, again = result["mean"], shlex.join(["python", "drama.py", *run.flags])
        end, words = "finished", (
            f"finished, score {score:.2f}, human-normalised "
            f"{human_normalised(run.game, score):.3f}, {result['episodes']} episodes after "
            f"{result['step']:,} steps, {minutes:.0f} minutes; to repeat: {again}, then the same "
            f"with --eval {run.episodes}")
    elif stopped:
        end, words = "stopped", f"stopped {run.state()}"
    elif BUSY in last:
        end, words = "busy", "skipped, another process is at it"
    else:
        why = last if code else run.state()
        end, words = "failed", f"FAILED, exit code {code}: {why} ({run.log})"
    say(f"{run.name}: {words}")
    return end


def work(waiting: list[Run], jobs: int, cores: list, received: list[int]) -> list[str]:
    """Train and evaluate, `jobs` runs at once -> how each ended. `received`: signals so far."""
    waiting, running, ends, passed_on = list(waiting), {}, [], 0
    while running or (waiting and not received):
        while waiting and not received and len(running) < jobs:
            slot, run = min(set(range(jobs)) - running.keys()), waiting.pop(0)
            say(f"{run.name}: begins {run.state()}")
            run.start(cores[slot])
            running[slot] = run
        for number in received[passed_on:]:
            passed_on += 1
            for run in running.values():
                if os.name != "nt":  # on Windows the console's Ctrl-C reaches the children itself
                    run.child.send_signal(signal.SIGINT if number == signal.SIGINT
                                          else signal.SIGTERM)
        for slot, run in list(running.items()):
            if run.child.poll() is None:
                continue
            end = tell_end(run, bool(received))
            if end == "trained":
                run.start(cores[slot], evaluate=True)
            else:
                ends.append(end)
                del running[slot]
        time.sleep(POLL)
    return ends


def run_all(runs: list[Run], jobs: int) -> int:
    """Run this process's share of what is unfinished -> exit code."""
    rank, world = share(os.environ)
    runs[0].dir.parent.mkdir(parents=True, exist_ok=True)
    mine = runs[rank::world]
    unfinished = [run for run in mine if run.result(dataclasses.asdict(run.cfg)) is None]
    say(f"process {rank} of {world}: {len(mine)} of {len(runs)} runs, {len(unfinished)} of them "
        f"unfinished, {jobs} at once")
    held = hasattr(os, "sched_setaffinity")
    have = sorted(os.sched_getaffinity(0)) if held else [None]
    cores = [have[(rank * jobs + slot) % len(have)] for slot in range(jobs)]
    received, numbers = [], [signal.SIGINT, signal.SIGTERM]
    if os.name != "nt" and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # nohup ignores it
        numbers.append(signal.SIGHUP)  # the terminal was closed
    old = {number: signal.signal(number, lambda number, _: received.append(number))
           for number in numbers}
    try:
        ends = work(unfinished, jobs, cores, received)
    except BaseException:
        for run in unfinished:  # they must not go on without their keeper
            if run.child and run.child.poll() is None:
                run.child.terminate()
        raise
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
    count = {end: ends.count(end) for end in ("finished", "failed", "busy")}
    say(f"process {rank} of {world}: {count['finished']} finished, {count['failed']} failed, "
        f"{count['busy']} skipped")
    if received:
        say("stopped; the same command goes on")
        return 128 + received[0]
    return int(count["failed"] > 0 and "TORCHELASTIC_RUN_ID" not in os.environ)


# ---- the table ----------------------------------------------------------------------------------


def aggregate(games: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Human-normalised scores (..., runs) of each game -> the four aggregates (...), as rliable:
    the interquartile mean is over all runs of all games, the others over the games' means."""
    means = np.stack([scores.mean(-1) for scores in games], -1)  # (..., games)
    every = np.sort(np.concatenate(games, -1), -1)  # (..., runs of all games)
    cut = every.shape[-1] // 4
    return dict(zip(AGGREGATES, (means.mean(-1), np.median(means, -1),
                                 every[..., cut:every.shape[-1] - cut].mean(-1),
                                 (means > 1).sum(-1))))


def intervals(games: list[np.ndarray]) -> tuple[dict[str, np.ndarray], str]:
    """95% intervals of the aggregates by stratified bootstrap: each game's runs drawn anew from
    themselves; and by which code. Human-normalised scores (runs,) of each game."""
    rng, by = np.random.default_rng(0), "NumPy"
    if len({len(scores) for scores in games}) == 1:
        try:
            from rliable import library
            _, ends = library.get_interval_estimates(
                {"here": np.stack(games, -1)}, reps=RESAMPLES,  # (runs, games)
                func=lambda x: np.array([*aggregate(list(x.T)).values()]))
            return dict(zip(AGGREGATES, ends["here"].T)), "rliable"
        except ModuleNotFoundError:
            pass
        except Exception as error:  # it is there, but what it needs does not fit together
            by += f" (rliable does not work: {error})"
    drawn = [scores[rng.integers(len(scores), size=(RESAMPLES, len(scores)))] for scores in games]
    return {name: np.percentile(values, INTERVAL)
            for name, values in aggregate(drawn).items()}, by


def tabulate(runs: list[Run]) -> dict:
    """All that the report says, as JSON holds it."""
    done, missing = [], []
    for run in runs:
        result = run.result(run.given)
        if result is None:
            missing.append(dict(game=run.game, seed=run.seed, state=run.state()))
            continue
        normalised = human_normalised(run.game, result["mean"])
        done.append({**result, "human_normalised": normalised, "flags": run.flags[6:]})
    rows, here = [], []
    for game in dict.fromkeys(run.game for run in runs):
        its = [run for run in done if run["game"] == game]
        score, normalised = (float(np.mean([run[k] for run in its])) if its else None
                             for k in ("mean", "human_normalised"))
        rows.append(dict(game=game, runs=len(its), score=score, human_normalised=normalised,
                         **{who: float(PUBLISHED[game][who]) for who in OTHERS}))
        if its:
            here.append(np.array([run["human_normalised"] for run in its]))
    table = dict(steps=runs[0].cfg.steps, episodes=runs[0].episodes, games=rows, runs=done,
                 missing=missing, aggregates={}, intervals={}, bootstrap="")
    if here:
        table["aggregates"]["here"] = {k: float(v) for k, v in aggregate(here).items()}
        for who in ("Drama", "DreamerV3", "STORM"):  # one mean a game is what is published
            published = [np.array([human_normalised(row["game"], row[who])])
                         for row in rows if row["runs"]]
            table["aggregates"][who] = {k: float(v) for k, v in aggregate(published).items()}
        if min(map(len, here)) > 1:
            ends, table["bootstrap"] = intervals(here)
            table["intervals"] = {k: v.tolist() for k, v in ends.items()}
    return table


def settings_that_differ(runs: list[Run]) -> list[str]:
    """Settings that are not the same in all finished runs, with their values."""
    found = [run.settings() for run in runs if run.result(run.given)]
    names = {name for config in found for name in config} - drama.ANYTIME - {"game", "seed"}
    values = {name: {str(config.get(name)) for config in found} for name in sorted(names)}
    return [f"{name} {', '.join(sorted(v))}" for name, v in values.items() if len(v) > 1]


def report(runs: list[Run], stem: Path) -> None:
    """Print the table; write it as CSV and JSON."""
    table = tabulate(runs)
    rows, done = table["games"], [row for row in table["games"] if row["runs"]]
    say(f"Atari 100k: {table['steps']:,} steps, {table['episodes']} episodes a run; "
        f"{len(table['runs'])} of {len(runs)} runs finished, {len(done)} of {len(rows)} games\n")
    say(f"{'game':<15}{'runs':>5}{'score':>10}{'normalised':>11}"
        + "".join(f"{name:>10}" for name in OTHERS))
    for row in rows:
        own = (f"{row['score']:10.1f}{row['human_normalised']:11.3f}" if row["runs"]
               else f"{'missing':>10}{'':>11}")
        say(f"{row['game']:<15}{row['runs']:>5}{own}"
            + "".join(f"{row[name]:10.1f}" for name in OTHERS))
    if done:
        say(f"\nhuman-normalised, {len(done)} games" + f"{'here':>13}{'':>17}"
            + "".join(f"{who:>10}" for who in list(table["aggregates"])[1:]))
    for name, form in AGGREGATES.items() if done else ():
        here, *others = (values[name] for values in table["aggregates"].values())
        low_high = table["intervals"].get(name)
        between = "[{:{}}, {:{}}]".format(low_high[0], form, low_high[1], form) if low_high else ""
        say(f"{name:<26}{here:>11{form}} {between:<16}"
            + "".join(f"{value:>10{form}}" for value in others))
    if table["bootstrap"]:
        say(f"in brackets: 95% by stratified bootstrap over {len(table['runs'])} runs, "
            f"{table['bootstrap']}")
    elif done:
        say("no intervals: they need two finished seeds of each game")
    for state in dict.fromkeys(run["state"] for run in table["missing"]):
        names = [f"{run['game']} seed {run['seed']}" for run in table["missing"]
                 if run["state"] == state]
        say(f"missing, {state}: {', '.join(names)}")
    if differ := settings_that_differ(runs):
        say(f"the finished runs differ in their settings: {'; '.join(differ)}")
    with drama.guard(f"--table {stem}", "give it the name of a file"):
        stem.parent.mkdir(parents=True, exist_ok=True)
        names = [stem.with_name(stem.name + end) for end in (".csv", ".json")]
        names[1].write_text(json.dumps(table, indent=1))
        with open(names[0], "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    say(f"written: {names[0]}, {names[1]}")


def main(argv: list[str] | None = None) -> int:
    """Run a command line; return the exit code."""
    parser = argparse.ArgumentParser("suite.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = drama.refuse
    parser.add_argument("--games", nargs="+", default=["all"], help="all, or names")
    parser.add_argument("--seeds", type=int, default=1, help="runs of a game")
    parser.add_argument("--first-seed", type=int, default=0, help="seed of the first of them")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, a core each")
    parser.add_argument("--eval", type=int, default=20, help="episodes of a run's evaluation")
    parser.add_argument("--folder", default="runs/atari100k", help="where the run folders lie")
    parser.add_argument("--report", action="store_true", help="print the table, run nothing")
    parser.add_argument("--table", default="", help="the table's files, without .csv; empty: "
                        "atari100k in --folder")
    try:
        args, flags = parser.parse_known_args(argv)
        games = list(PUBLISHED) if args.games == ["all"] else [*dict.fromkeys(args.games)]
        for game in games:
            if game not in PUBLISHED:
                raise drama.Refusal(f"--games {game}: not a game of Atari 100k")
        for name in ("seeds", "jobs", "eval"):
            if getattr(args, name) < 1:
                raise drama.Refusal(f"--{name} {getattr(args, name)}: must be 1 or more")
        # every game once, then every game with the next seed: a whole table as early as may be
        runs = [Run(game, seed, args, flags)
                for seed in range(args.first_seed, args.first_seed + args.seeds) for game in games]
        if args.report:
            report(runs, Path(args.table or Path(args.folder) / "atari100k"))
            return 0
        return run_all(runs, args.jobs)
    except drama.Refusal as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename}: {error.strerror}"
    say(f"suite.py: {message}", sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
