"""Figure 3 of the paper: the grid world as one token sequence; who is fast, who remembers.

    python experiments/long_sequence.py --out results/long-sequence

A frame is 25 cell tokens, row by row, and the token of the action that follows it, 26 in all; each
token comes with its place in the frame. The world is gridworld.py's, with eyes: an action also
says whether the next frame shows the goal. The goal is shown again 1, 2, 4, … frames after it was
last shown, up to half the sequence, each gap as likely as another, and is reached only in sight;
with gaps of 1 this is GridWorld. The models are those of backbones.py, small, with equal
parameters; each is trained on the same number of tokens to predict the next cell.

Writes OUT.csv, a row for a backbone and length, and OUT.png. A row that is there is not made again,
but where it was only timed and is now to be trained.
Costs are of one sequence in core-milliseconds, the least of three, and of the bytes that PyTorch
holds at most; slopes are those of the logarithms from SLOPE_FROM tokens up. Errors are of the last
frame of unseen sequences, token by token from the model's own choices, the likeliest each time:
wrong cells of 25; shares of frames with all walls right, one agent, one goal (none where it is
hidden), the agent where the action moves it. Recall is the share of goals foretold where they come
to be shown again, given the cells before them; never having seen it, 1 in 8 by elimination.
"""

import argparse
import csv
import itertools
import os
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import backbones  # noqa: E402

import drama  # noqa: E402
from experiments.gridworld import GridWorld  # noqa: E402

WALL, FLOOR, AGENT, GOAL, FIRST_ACTION = range(5)  # cells, then actions with eyes shut, with open
MOVES, INNER = np.array(GridWorld.MOVES), GridWorld.SIDE
SIDE = INNER + 2
CELLS, ACTIONS = SIDE**2, 2 * len(MOVES)
FRAME = CELLS + 1  # tokens
NAMES = ("mamba2", *backbones.LAYERS)
LENGTHS, TRAINED = (208, 416, 832, 1664, 3328, 6656), (208, 1664)
SLOPE_FROM = 1664
BATCH_TOKENS, RATE, CLIP = 1664, 3e-3, 1.0  # tokens an update; AdamW, one cycle of the rate
UNSEEN = 256  # sequences that errors are taken over
EVALUATED = 26_624  # tokens of them at a time, for the memory's sake
ERRORS = ("cells", "walls", "agent", "goal", "move")


def worlds(n: int, frames: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """n random walks -> tokens (n, frames, FRAME); gap (n, frames): frames since the goal was last
    shown, 0 in a frame that hides it; placed (n, frames) bool: nothing foretells this frame, as the
    goal was reached and agent and goal placed anew.
    """
    rng = np.random.default_rng(seed)
    gaps = 2 ** np.arange(max(1, frames // 2).bit_length())
    chance = 1 / gaps / (1 / gaps).sum()
    tokens = np.full((n, frames, FRAME), WALL)
    gap, placed = np.zeros((n, frames), int), np.zeros((n, frames), bool)
    placed[:, 0] = True
    agent, goal = np.zeros((2, n, 2), int)
    since, due = np.ones((2, n), int)
    for t in range(frames):
        shown = (since == due) | (t == 0)
        if t:
            action = tokens[:, t - 1, CELLS]
            action += len(MOVES) * shown  # the look is the action's
            agent = np.clip(agent + MOVES[(action - FIRST_ACTION) % len(MOVES)], 0, INNER - 1)
            placed[:, t] = shown & (agent == goal).all(1)
        start = rng.integers(INNER**2, size=n)
        other = (start + rng.integers(1, INNER**2, size=n)) % INNER**2
        for what, cell in ((agent, start), (goal, other)):
            what[placed[:, t]] = np.stack(divmod(cell, INNER), 1)[placed[:, t]]
        grid = np.full((n, SIDE, SIDE), WALL)
        grid[:, 1:-1, 1:-1] = FLOOR
        grid[shown, goal[shown, 0] + 1, goal[shown, 1] + 1] = GOAL
        grid[np.arange(n), agent[:, 0] + 1, agent[:, 1] + 1] = AGENT
        tokens[:, t, :CELLS] = grid.reshape(n, CELLS)
        tokens[:, t, CELLS] = FIRST_ACTION + rng.integers(len(MOVES), size=n)
        gap[:, t] = since * shown
        due = np.where(shown, rng.choice(gaps, n, p=chance), due)
        since = np.where(shown, 1, since + 1)
    return tokens, gap, placed


class Predictor(nn.Module):
    """Tokens (b, l) -> logits (b, l, 4) of the next cell, by a backbone."""

    def __init__(self, name: str, length: int, width: int):
        super().__init__()
        cfg = drama.Config(categoricals=1, classes=FIRST_ACTION + ACTIONS, d_model=width,
                           headdim=width // 2, batch_length=length, dropout=0.0)
        self.sequence = backbones.make(name, cfg, FRAME)
        self.head = nn.Linear(width, FIRST_ACTION)

    def forward(self, tokens, states=None):
        """From a frame's first token on -> logits, states."""
        place = torch.arange(tokens.shape[1]) % FRAME
        d, states = self.sequence(self.one_hot(tokens), place.expand_as(tokens), states)
        return self.head(d), states

    def step(self, token, place: int, states):
        """One token (b,) at a place in its frame -> logits (b, 4), states."""
        place = torch.full_like(token, place)
        d, states = self.sequence(self.one_hot(token), place, states)
        return self.head(d), states

    @staticmethod
    def one_hot(tokens):
        """(…) -> (…, vocabulary)."""
        return F.one_hot(tokens, FIRST_ACTION + ACTIONS).float()

    def loss(self, tokens) -> torch.Tensor:
        """Mean cross-entropy of the cells after the first frame, in nats; tokens (b, l)."""
        logits, target = self(tokens)[0][:, CELLS:-1], tokens[:, FRAME:]
        cell = target < FIRST_ACTION
        return F.cross_entropy(logits[cell], target[cell])


def train(model: Predictor, length: int, budget: int) -> dict:
    """Train on `budget` tokens -> milliseconds a training step, the last tenth's mean loss."""
    batch = max(1, BATCH_TOKENS // length)
    updates = max(2, budget // (batch * length))
    adam = torch.optim.AdamW(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, RATE, updates, pct_start=0.1)
    losses, spent = [], 0.0
    for update in range(updates):
        tokens = torch.from_numpy(worlds(batch, length // FRAME, seed=update)[0]).flatten(1)
        begun = time.process_time()
        loss = model.loss(tokens)
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        adam.step()
        schedule.step()
        spent += time.process_time() - begun
        losses.append(loss.item())
    return dict(tokens=updates * batch * length, updates=updates, train_ms=1e3 * spent / updates,
                loss=float(np.mean(losses[-max(1, updates // 10):])))


@torch.no_grad()
def foretell(model: Predictor, tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (b, l) -> the likeliest cell at each index but the first, given the tokens before it,
    (b, l-1), and the last frame's cells (b, 25), each given the cells foretold before it."""
    guess = model(tokens)[0][:, :-1].argmax(-1)
    logits, states = model(tokens[:, :-FRAME])  # up to the action that leads to the last frame
    frame = [logits[:, -1].argmax(-1)]
    for place in range(CELLS - 1):
        logits, states = model.step(frame[-1], place, states)
        frame.append(logits.argmax(-1))
    return guess, torch.stack(frame, 1)


def errors(model: Predictor, length: int) -> dict:
    """What the module's docstring calls errors and recall, over UNSEEN sequences."""
    tokens, gap, placed = worlds(UNSEEN, length // FRAME, seed=2**31)
    parts = torch.from_numpy(tokens).flatten(1).split(max(1, EVALUATED // length))
    guess, hat = (torch.cat(t).numpy() for t in zip(*(foretell(model, part) for part in parts)))
    guess, recall = np.pad(guess, ((0, 0), (1, 0))).reshape(tokens.shape), {}
    old = (gap > 0) & ~placed  # the frames that show a goal where it was before
    for n in np.unique(gap[old]):
        at = (old & (gap == n))[..., None] & (tokens == GOAL)
        recall[f"recall_{n}"] = float((guess == GOAL)[at].mean())
    true, fair = tokens[:, -1, :CELLS], ~placed[:, -1]  # fair: the frame can be foretold
    one = {cell: (hat == cell).sum(1) for cell in (AGENT, GOAL)}
    found = ((true == AGENT) & (hat == AGENT)).any(1) & (one[AGENT] == 1)
    return dict(
        cells=float((hat != true)[fair].sum(1).mean()),
        walls=float(((hat == WALL) == (true == WALL)).all(1).mean()),
        agent=float((one[AGENT] == 1).mean()),
        goal=float((one[GOAL] == (gap[:, -1] > 0)).mean()),
        move=float(found[fair].mean()), **recall)


def least_ms(call, repeats: int = 3) -> float:
    """Core-milliseconds of a call, the least of some."""
    spent = []
    for _ in range(repeats):
        begun = time.process_time()
        call()
        spent.append(time.process_time() - begun)
    return 1e3 * min(spent)


def costs(model: Predictor, length: int) -> dict:
    """Forward, backward, a step after `length` tokens; peak memory of forward and backward."""
    tokens = torch.from_numpy(worlds(1, length // FRAME, seed=0)[0]).flatten(1)
    model.loss(tokens).backward()
    forward = least_ms(lambda: model.loss(tokens))
    both = least_ms(lambda: model.loss(tokens).backward())
    with torch.no_grad():
        states = model(tokens)[1]
        fifty = range(50)  # Windows counts processor time in steps of 16 ms
        step = least_ms(lambda: [model.step(tokens[:, 0], 0, states) for _ in fifty], 5) / 50
    # the profiler sees each of PyTorch's own allocations, on every system
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        model.loss(tokens).backward()
    events = (e for e in profile.kineto_results.events() if e.name() == "[memory]")
    held = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return dict(forward_ms=forward, backward_ms=both - forward, step_ms=step,
                peak_MiB=max(held) / 2**20)


def read(path: Path) -> list[dict]:
    """The rows so far; numbers as numbers, what was not measured as NaN."""
    if not path.exists():
        return []
    with drama.guard(f"{path}: not a table of this script", "name another --out"):
        with open(path, newline="") as file:
            rows = [{k: v if k == "backbone" else float(v or "nan") for k, v in row.items()}
                    for row in csv.DictReader(file)]
        # a row that was cut short is not there
        return [row for row in rows if row["backbone"] and row["step_ms"] == row["step_ms"]]


def write(path: Path, rows: list[dict]) -> None:
    """All rows, six digits, under the union of their columns."""
    columns = list(dict.fromkeys(itertools.chain(*rows)))
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for row in rows:
            cells = (row.get(c, "") for c in columns)
            writer.writerow("" if c != c else f"{c:.6g}" if isinstance(c, float) else c
                            for c in cells)


def draw(rows: list[dict], path: Path) -> None:
    """Time, memory, a step against length, with slopes, also printed; recall against the gap."""
    matplotlib.use("Agg")
    from matplotlib import pyplot
    pyplot.rcParams["font.size"] = 13
    figure, axes = pyplot.subplots(2, 2, figsize=(13, 10), layout="constrained")
    panels = {"forward and backward, milliseconds": ("forward_ms", "backward_ms"),
              "peak memory, MiB": ("peak_MiB",),
              "one step after so many tokens, milliseconds": ("step_ms",)}
    for axis, (title, columns) in zip(axes.flat, panels.items()):
        for i, name in enumerate(NAMES):
            points = sorted((r["length"], sum(r[c] for c in columns)) for r in rows
                            if r["backbone"] == name)
            label, late = name, [p for p in points if p[0] >= SLOPE_FROM]
            if len(late) > 1:
                label += f", slope {np.polyfit(*np.log(np.array(late).T), 1)[0]:.2f}"
                print(f"{title}: {label} from {SLOPE_FROM:,} tokens")
            if points:
                axis.loglog(*zip(*points), "o-", color=f"C{i}", label=label)
        lengths = sorted({row["length"] for row in rows})
        axis.set_xticks(lengths, [f"{n:,.0f}" for n in lengths], minor=False)
        axis.set_xticks([], minor=True)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set(title=title, xlabel="tokens of one sequence")
    trained = sorted({row["length"] for row in rows if row.get("loss", np.nan) > 0})
    for row in (row for row in rows if row["length"] in trained):
        recall = sorted((int(k.split("_")[1]), v) for k, v in row.items()
                        if k.startswith("recall") and v == v)
        i = NAMES.index(row["backbone"])
        if recall:  # the marks one inside the other, where lines lie upon each other
            axes[1, 1].plot(*zip(*recall), ("o:", "s-", "^--")[trained.index(row["length"]) % 3],
                            color=f"C{i}", ms=12 - 3 * i, lw=4 - i,
                            label=f"{row['backbone']}, {row['length']:,.0f} tokens")
    axes[1, 1].axhline(1 / (INNER**2 - 1), ls="--", lw=1, color="grey", label="by elimination")
    axes[1, 1].set_xscale("log", base=2)
    axes[1, 1].xaxis.set_major_formatter("{x:g}")
    axes[1, 1].set(title="share of goals foretold where they are shown again", ylim=(-0.04, 1.04),
                   xlabel="frames since the goal was last shown")
    for axis in axes.flat:
        axis.legend()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def make_rows(args, lengths: list[int]) -> None:
    """Make the rows that are not there yet, draw."""
    drama.keep_freed_pages()
    table, picture = (args.out.with_name(args.out.name + end) for end in (".csv", ".png"))
    rows = read(table)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler keeps its own messages
    for length, name in itertools.product(lengths, args.backbones):
        old = [row for row in rows if (row["backbone"], row["length"]) == (name, length)]
        if old and (length not in args.trained or old[0].get("loss", np.nan) > 0):
            continue
        torch.manual_seed(0)
        model = Predictor(name, length, args.width)
        row = dict(backbone=name, length=length, parameters=backbones.size(model),
                   **costs(model, length), **dict.fromkeys(ERRORS, float("nan")))
        if length in args.trained:
            row |= train(model, length, args.tokens) | errors(model.eval(), length)
        rows = [r for r in rows if r not in old] + [row]
        write(table, rows)
        print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                        for k, v in row.items() if v == v), flush=True)
    draw(rows, picture)
    drama.say(f"{table}, {picture}")


def main(argv: list[str] | None = None) -> int:
    """Run a command line; return the exit code."""
    parser = argparse.ArgumentParser("long_sequence.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = drama.refuse
    parser.add_argument("--out", required=True, type=Path, help="path of the CSV and the PNG, less "
                        "the ending")
    parser.add_argument("--backbones", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--lengths", nargs="*", type=int, default=LENGTHS, help="to be timed")
    parser.add_argument("--trained", nargs="*", type=int, default=TRAINED, help="trained too")
    parser.add_argument("--tokens", type=int, default=3_000_000, help="of a training")
    parser.add_argument("--width", type=int, default=64, help="d_model; even")
    try:
        args = parser.parse_args(argv)
        lengths = sorted({*args.lengths, *args.trained})
        wrong = [n for n in lengths if n < 2 * FRAME or n % FRAME]
        if wrong:
            raise drama.Refusal(f"--lengths {wrong[0]}: must be {FRAME} times 2 or more")
        if args.width < 8 or args.width % 2 or args.tokens < 1:
            raise drama.Refusal("--width must be even and 8 or more, --tokens 1 or more")
        if not lengths:
            raise drama.Refusal("--lengths and --trained are both empty")
        if not args.out.parent.is_dir():
            raise drama.Refusal(f"--out {args.out}: no such folder")
        make_rows(args, lengths)
    except drama.Refusal as error:
        drama.say(f"long_sequence.py: {error}", sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
