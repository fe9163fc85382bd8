"""The bug hunt: drama.py with a few silent faults. It runs, it learns something; what is wrong?

    python exercises/bugs.py --out hunt/ --seed 7              five faults, into hunt/drama.py
    python exercises/bugs.py --seed 7 --answer                 which they are, for the teacher
    python exercises/grade.py hunt/drama.py                    passes when all are mended

Each fault is a named edit of one function, CATALOGUE, of the kind that real code had: most of them
stood in published world models or in earlier versions of this one. No function gets two. A test
proves that each edit still applies, and that grade.py catches it, with these words in its message.
"""

import ast
import random
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))
import make  # noqa: E402


class Bug(NamedTuple):
    """In `function`, `old` becomes `new`; task `task` catches it and says `says`."""

    function: str
    old: str
    new: str
    task: int
    says: str
    about: str


CATALOGUE = (
    Bug("symlog", "x.abs().log1p()", "(1 + x.abs()).log2()", 1,
        "natural one, not base 2", "logarithm to base 2"),
    Bug("TwoHot.encode", "symlog(x).clamp", "x.clamp", 1,
        "is symlog(x) taken?", "bins of x, where they lie in symlog"),
    Bug("TwoHot.loss", ".sum(-1)", ".mean(-1)", 1,
        "summed, not averaged", "mean over the bins"),
    Bug("TwoHot.mean", "softmax(-1)", "softmax(0)", 1,
        "softmax over the last axis", "softmax over the batch"),
    Bug("unimix", "share / logits.shape[-1]", "share / logits.shape[-2]", 2,
        "divided by C", "uniform share over the categoricals, not the classes"),
    Bug("straight_through", "+ probs - probs.detach()", "", 2,
        "has no gradient", "no gradient through the draw"),
    Bug("straight_through", "+ probs - probs.detach()", "- probs + probs.detach()", 2,
        "the wrong side is detached", "the gradient's sign"),
    Bug("kl_divergence", ".sum((-2, -1))", ".sum(-1).mean(-1)", 3,
        "categoricals are summed", "mean over the categoricals"),
    Bug("kl_divergence", "logp.exp() *", "logq.exp() *", 3,
        "weighs by p", "weighed by the wrong distribution"),
    Bug("free_bits", "kl.clamp(min=threshold)", "(kl - threshold).clamp(min=0)", 3,
        "not taken off", "the threshold is taken off"),
    Bug("WorldModel.loss", "self.log_prior(d[:, :-1],", "self.log_prior(d[:, 1:],", 3,
        "comes from d_{t-1}", "the prior sees the frame that it foretells"),
    Bug("WorldModel.loss", "F.pad(kl * ~batch.first[:, 1:], (1, 0))",
        "F.pad(kl, (1, 0))", 3,
        "is the term masked?", "the KL across two episodes counts"),
    Bug("WorldModel.loss", "kl_divergence(log_next.detach(), log_prior)",
        "kl_divergence(log_next, log_prior)", 3,
        "dynamics moves the posterior too", "a stop-gradient gone"),
    Bug("WorldModel.loss", "kl_divergence(log_next, log_prior.detach())",
        "kl_divergence(log_next.detach(), log_prior)", 3,
        "representation moves the prior and not the posterior", "the wrong side is detached"),
    Bug("WorldModel.loss", "z[:, 1:].detach().flatten(-2)", "z[:, 1:].flatten(-2)", 3,
        "through it; is it detached?", "the prior's dice pass a gradient to the posterior"),
    Bug("lambda_return", "value[:, t + 1]", "value[:, t]", 4,
        "is V of the next state used?", "V_t for V_{t+1}, as in the published code"),
    Bug("lambda_return", "gamma * (1 - end[:, t]) *", "gamma *", 4,
        "nothing follows an end", "the return goes on after an end"),
    Bug("lambda_return", "(1 - lam) * value[:, t + 1] + lam * R",
        "lam * value[:, t + 1] + (1 - lam) * R", 4,
        "by 1 - lam", "lambda and 1 - lambda swapped"),
    Bug("dfs_sequence_logits", "-trained / temperature", "trained / temperature", 5,
        "trained on least comes first", "trains on what it knows best"),
    Bug("dfs_dream_logits", ".clamp(max=0)", "", 5,
        "all are alike", "no upper bound: dreams chase what was trained on most"),
    Bug("Replay.draw_sequences", "self.trained[rows[:, 0]] += 1",
        "self.trained[rows] += 1", 5,
        "only a window's START", "counts every row of a window"),
    Bug("Replay.draw_contexts", "self.cfg.dreams / self.cfg.batch_size",
        "self.cfg.batch_size / self.cfg.dreams", 5,
        "Which s?", "s upside down"),
    Bug("ssd_step", "(dt * A).exp()", "A.exp()", 6,
        "exp(dt A): is dt there?", "the decay forgets dt"),
    Bug("ssd_step", "(dt * A).exp()", "(-dt * A).exp()", 6,
        "below 1: the sign", "the state grows"),
    Bug("ssd_scan", "kept_c * state + added_c", "added_c", 7,
        "is the state carried", "a chunk forgets all but the chunk before"),
    Bug("ssd_scan", ".masked_fill(~same, -torch.inf).exp()", ".exp().masked_fill(~same, 0)", 7,
        "mask BEFORE exp", "overflows at steep decays"),
    Bug("ssd_scan", "survives[..., -1, None, None]", "S[..., -1, None, None].exp()", 8,
        "through a chunk that has a reset", "the state passes a reset"),
    Bug("ssd_scan", "C * survives[..., None]", "C * S.exp()[..., None]", 8,
        "read past a reset", "outputs read a state that was reset"),
    Bug("WorldModel.imagine", "d[:, -1].masked_fill(first[:, -1:], 0)",
        "d[:, -1]", 9,
        "d is zero where the last frame opens", "a dream starts with the last episode's d"),
    Bug("WorldModel.imagine", "clear(states, first[:, -1])", "states", 9,
        "states are cleared where", "a dream starts with the last episode's state"),
    Bug("WorldModel.imagine", ".squeeze(-1).float().sigmoid()", ".squeeze(-1).float()", 9,
        "is the sigmoid there?", "ends as logits"),
    Bug("WorldModel.imagine", "draw_one_hot(log_pi).argmax(-1)", "log_pi.argmax(-1)", 9,
        "an action is drawn", "dreams never explore"),
    Bug("ActorCritic.loss", "self.two_hot.mean(value_logits).detach()",
        "self.two_hot.mean(value_logits)", 10,
        "policy moves the critic", "the actor's loss moves the critic"),
    Bug("ActorCritic.loss", "entropy=-entropy * alive", "entropy=entropy * alive", 10,
        "MINUS what shall grow", "entropy's sign: the policy is made sure"),
    Bug("ActorCritic.loss", "(1 - dream.end).cumprod(1)[:, :-1], (1, 0), value=1.0",
        "(1 - dream.end).cumprod(1), (0, 0)", 10,
        "BEFORE the step", "the step that ends a dream does not count"),
    Bug("ActorCritic.loss", "(R - value[:, :-1])", "(R - value[:, 1:])", 10,
        "the baseline is V_t", "the baseline of the next state"),
    Bug("ActorCritic.loss", "1 - self.cfg.return_decay", "1.0", 10,
        "not at once", "the scale jumps"),
    Bug("ActorCritic.loss", "self.scale.clamp(min=self.cfg.return_floor)", "self.scale", 10,
        "return_floor at least", "small returns are blown up"),
    Bug("Player.act", "d.masked_fill(first[:, None], 0)", "d", 11,
        "d_{t-1} is zero where an episode opens", "acts on the last episode's d"),
    Bug("Player.act", "clear(states, first)", "states", 11,
        "states are cleared where", "carries the last episode's state on"),
)


def segment(source: str, name: str) -> tuple[int, int]:
    """Where a function stands in the source, in characters."""
    node = make.functions(ast.parse(source))[name]
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    return starts[node.lineno - 1], starts[node.end_lineno]


def plant(source: str, bug: Bug) -> str:
    """The source with one fault; ValueError where its text does not stand there exactly once."""
    start, end = segment(source, bug.function)
    body = source[start:end]
    if body.count(bug.old) != 1:
        raise ValueError(f"{bug.function} has `{bug.old}` {body.count(bug.old)} times")
    return source[:start] + body.replace(bug.old, bug.new) + source[end:]


def pick(seed: int, number: int) -> list[Bug]:
    """So many faults, in the catalogue's order, no function twice."""
    names = sorted({bug.function for bug in CATALOGUE})
    if not 1 <= number <= len(names):
        raise make.Refusal(f"--number {number}: must lie from 1 to {len(names)}")
    draw = random.Random(seed)
    chosen = draw.sample(names, number)
    picked = [draw.choice([bug for bug in CATALOGUE if bug.function == name]) for name in chosen]
    return sorted(picked, key=CATALOGUE.index)


def main(argv: list[str] | None = None) -> int:
    """Run a command line; return the exit code."""
    parser = make.Parser("bugs.py", description=__doc__, allow_abbrev=False,
                         formatter_class=make.argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="folder that drama.py is written to")
    parser.add_argument("--seed", type=int, required=True, help="which faults")
    parser.add_argument("--number", type=int, default=5, help="how many (5)")
    parser.add_argument("--answer", action="store_true", help="list them, and write nothing")
    parser.add_argument("--force", action="store_true", help="write over a copy that is there")
    args = parser.parse_args(argv)
    bugs = pick(args.seed, args.number)
    if args.answer:
        for bug in bugs:
            print(f"{bug.function} (task {bug.task}): {bug.about}\n    is   {bug.new or 'nothing'}"
                  f"\n    was  {bug.old}")
        return 0
    if not args.out:
        raise make.Refusal("--out or --answer is needed; see --help")
    source = make.ORIGINAL.read_text(encoding="utf-8")
    for bug in bugs:
        source = plant(source, bug)
    path = make.write(args.out, source, args.force)
    print(f"{path}: {len(bugs)} silent faults, no two in one function\n"
          f"when you think that you have them all: python exercises/grade.py {path}")
    return 0


if __name__ == "__main__":
    sys.exit(make.run("bugs.py", main, None))
