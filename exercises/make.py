"""A student's copy of drama.py: the bodies that a task asks for are blank, all else is whole.

    python exercises/make.py --out hw/                   every task blank, into hw/drama.py
    python exercises/make.py --out hw/ --tasks 1,4       two of them
    python exercises/make.py --out key/ --solution       for the teacher: bodies and hints

Bodies are found in drama.py itself, by name, so the copy cannot drift from it. What is blank keeps
its docstring; below it stand a hint, the shapes asserted, and a NotImplementedError. TASKS is the
one list of tasks: grade.py and bugs.py read it too.
"""

import argparse
import ast
import contextlib
import shutil
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ORIGINAL = Path(__file__).resolve().parent.parent / "drama.py"


class Refusal(Exception):
    """What the user has to mend: one line on stderr, then exit code 2."""


class Blank(NamedTuple):
    """A body to fill in: what stands there instead; `part`: only from one name's value to
    another's."""

    text: str
    part: tuple[str, str] | None = None


@dataclass(frozen=True, eq=False)
class Task:
    """A task: what is blank, and what is taken away while it is graded, as it would be the answer
    in another guise."""

    number: int
    title: str
    points: int
    blanks: dict[str, Blank]
    withheld: tuple[str, ...] = ()


SCAN = Blank("""\
    # Task 7: cut the tokens into chunks of q, and work in float32 at least. Inside a chunk, with
    # S = cumsum(dt A): y_i = sum over j <= i of (C_i . B_j) exp(S_i - S_j) dt_j x_j, one q x q
    # matrix. Mask BEFORE exp. Then what each chunk adds to the state, the recurrence over chunks,
    # and what the state at a chunk's start gives to its outputs. Pad the last chunk with dt = 0.
    # Task 8: `first`. A reset parts the tokens into segments, cumsum(first): what lies in another
    # segment does not count, nor does the state that comes in.
    b, l, h, p = x.shape
    n = B.shape[-1]
    assert dt.shape == (b, l, h) and A.shape == (h,) and B.shape == C.shape == (b, l, n)
    assert state is None or state.shape == (b, h, p, n)
    assert first is None or first.shape == (b, l)
""")

TASKS = (
    Task(1, "symlog and two-hot", 8, {
        "symlog": Blank("""\
    # torch.log1p(x) is ln(1 + x), exact for small x; the sign comes back at the end.
"""),
        "symexp": Blank("""\
    # Solve y = sign(x) ln(1 + |x|) for x. torch.expm1(y) is exp(y) - 1.
"""),
        "TwoHot.encode": Blank("""\
    # Where does symlog(x) lie on the line of bins 0, 1, …, n - 1? A bin at a distance of less
    # than one bin weighs 1 - distance, every other bin 0. What lies outside the line counts as
    # the outermost bin.
    n, limit = len(self.centres), self.centres[-1]
"""),
        "TwoHot.loss": Blank("""\
    # Cross-entropy: minus the sum over the bins of target times log-softmax.
    assert logits.shape == (*x.shape, len(self.centres))
"""),
        "TwoHot.mean": Blank("""\
    # The mean of the centres under the softmax, and then back from symlog.
    assert logits.shape[-1] == len(self.centres)
""")}),
    Task(2, "straight-through categoricals with unimix", 8, {
        "unimix": Blank("""\
    # Mix probabilities, not logits; then take the logarithm. What is `share` divided by?
"""),
        "straight_through": Blank("""\
    # Add something that is zero in value and has the gradient of the probabilities: which of two
    # equal terms is detached? draw_one_hot draws.
""")}),
    Task(3, "KL with free bits, its split and its stops", 12, {
        "kl_divergence": Blank("""\
    # The mean under p of log p - log q, over the C classes, summed over the K categoricals.
    assert logp.shape == logq.shape and logp.ndim >= 2
"""),
        "free_bits": Blank("""\
    # Below the threshold the loss is the threshold, and has no gradient.
"""),
        "WorldModel.loss": Blank("""\
    # To be made: `dynamics` and `representation`, each (b, l-1), and the function `known`. The
    # prior of z_t is self.log_prior(d_{t-1}, z_t), with z_t flat, (b, l-1, K*C), and without a
    # gradient. Both are KL[posterior || prior], for t from 1 on: in `dynamics` the posterior
    # stands still (.detach()), in `representation` the prior. known(kl), (b, l-1) -> (b, l): kl
    # with a 0 in front, for the window's first frame, and 0 where batch.first.
    assert log_post.shape[:2] == d.shape[:2] == batch.first.shape
""", ("log_prior", "known"))}),
    Task(4, "the lambda-return", 8, {
        "lambda_return": Blank("""\
    # Go backwards in time: R_H = V_H is known, and each R_t needs R_{t+1}.
    b, H = reward.shape
    assert end.shape == (b, H) and value.shape == (b, H + 1)
""")}),
    Task(5, "DFS's two distributions", 8, {
        "dfs_sequence_logits": Blank("""\
    # Logits: softmax is taken later. Rows that were trained on less shall be drawn more often.
"""),
        "dfs_dream_logits": Blank("""\
    # dreamt / s is on the scale of trained. Where the model was trained more than was dreamt, all
    # rows are alike.
    assert trained.shape == dreamt.shape
"""),
        "Replay.draw_sequences": Blank("""\
    # self._draw(k, length, logits) gives the rows of k windows (k, length), no start twice.
    # Count each window's START in self.trained.
"""),
        "Replay.draw_contexts": Blank("""\
    # As above, with the dreams' number, length and counts. s: dreams for each training window.
""")}),
    Task(6, "the recurrent step", 8, {
        "ssd_step": Blank("""\
    # The state is a matrix p x n for each head; B and C are shared by the heads. The state that
    # came in stays as it was.
    b, h, p = x.shape
    n = B.shape[-1]
    assert dt.shape == (b, h) and A.shape == (h,) and B.shape == C.shape == (b, n)
    assert state.shape == (b, h, p, n)
""")}, withheld=("ssd_scan",)),
    Task(7, "the chunked scan", 12, {"ssd_scan": SCAN}, withheld=("ssd_step",)),
    Task(8, "the scan with resets", 8, {"ssd_scan": SCAN}, withheld=("ssd_step",)),
    Task(9, "imagination", 10, {
        "WorldModel.imagine": Blank("""\
    # Read the context but its last frame: that gives d and the states. Where the last frame
    # opens an episode (first) both are cleared. Then `horizon` times: the actor reads [z, d]
    # and an action is drawn; self.sequence gives the next d; z is drawn from the prior.
    # Reward and end are read off the d that follows the action. Return a Dream.
    b, k = action.shape
    assert z.shape == (b, k, self.cfg.d_z) and first.shape == (b, k)
""")}),
    Task(10, "the actor-critic's losses", 12, {
        "ActorCritic.loss": Blank("""\
    # Losses, each (b, H) and times `alive`, the chance of no end BEFORE the step:
    #   policy      -log pi(a) times the advantage (R - V) / max(return_floor, scale)
    #   entropy     minus the policy's entropy (the weight stands in self.weights)
    #   value       two-hot loss of the critic to R;  slow_value: to the slow critic's mean
    # V is detached: the actor must not move the critic. self.scale moves by 1 - return_decay
    # to the 5-95 percentile range of R. Metrics: imagined_return, imagined_reward,
    # imagined_value, imagined_end, return_scale, policy_entropy, each a mean.
    b, h = dream.action.shape
    assert dream.feature.shape == (b, h + 1, self.cfg.d_z + self.cfg.d_model)
    assert dream.reward.shape == dream.end.shape == (b, h)
""")}),
    Task(11, "acting", 6, {
        "Player.act": Blank("""\
    # Encode the frame and draw z. The actor reads [z_t, d_{t-1}]; d_{t-1} is zero where an
    # episode opens. Draw the action, or any action where at_random. Then carry on: the states,
    # cleared where an episode opens, take one step with z and the action.
    n = len(frame)
    assert first.shape == (n,)
""")}),
)


def functions(tree: ast.Module) -> dict[str, ast.FunctionDef]:
    """Every function by name, `f` or `Class.f`; of two with one name the last, as in Python."""
    found = {}
    for node in tree.body:
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        found |= {prefix + f.name: f for f in inner if isinstance(f, ast.FunctionDef)}
    return found


def assigned(statement: ast.stmt) -> set[str]:
    """The names that a statement gives a value."""
    if isinstance(statement, ast.FunctionDef):
        return {statement.name}
    return {node.id for node in ast.walk(statement)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def lines_of(function: ast.FunctionDef, part: tuple[str, str] | None) -> tuple[int, int]:
    """The lines, counted from 0, end excluded, of a body below its docstring, or of its part."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    if part:
        first, last = part
        start = next(i for i, s in enumerate(body) if first in assigned(s))
        end = max(i for i, s in enumerate(body) if last in assigned(s))
        return body[start - 1].end_lineno, body[end].end_lineno
    above = function.body[0].end_lineno if ast.get_docstring(function) else body[0].lineno - 1
    return above, body[-1].end_lineno


def tasks_of(name: str, tasks=TASKS) -> str:
    """`task 4: the lambda-return`, with every task that shares the body."""
    return "; ".join(f"task {t.number}: {t.title}" for t in tasks if name in t.blanks)


def rewrite(source: str, tasks, solution: bool = False) -> str:
    """The source with the tasks' bodies blank, or, for the teacher, with the hints above them."""
    lines, found = source.splitlines(keepends=True), functions(ast.parse(source))
    blanks = {name: blank for task in tasks for name, blank in task.blanks.items()}
    places = {name: lines_of(found[name], blank.part) for name, blank in blanks.items()}
    for name in sorted(blanks, key=places.get, reverse=True):
        start, end = places[name]
        indent = " " * (found[name].col_offset + 4)
        below = (lines[start:end] if solution else
                 [f'{indent}raise NotImplementedError("{tasks_of(name)}, still blank")\n'])
        head = f"{indent}# {tasks_of(name)}\n" if solution else ""
        text = textwrap.indent(textwrap.dedent(blanks[name].text), indent)
        lines[start:end] = [head, text, *below]
    return "".join(lines)


def choose(text: str | None, tasks=TASKS) -> list[Task]:
    """`1,4` -> those tasks, all if None; Refusal where there is no such task."""
    if text is None:
        return list(tasks)
    wanted = text.split(",")
    numbers = {str(task.number): task for task in tasks}
    strange = [w for w in wanted if w.strip() not in numbers]
    if strange:
        raise Refusal(f"--tasks {text}: no task {strange[0]}; choose from {', '.join(numbers)}")
    return [numbers[n] for n in numbers if n in {w.strip() for w in wanted}]


def write(folder: str, text: str, force: bool) -> Path:
    """Write folder/drama.py, and beside it what it imports.

    Refusal rather than over a file that may be somebody's work.
    """
    path = Path(folder) / "drama.py"
    if path.resolve() == ORIGINAL:
        raise Refusal(f"--out {folder}: that is the original; use another folder")
    if path.exists() and not force:
        raise Refusal(f"{path} is there already; use another --out, or --force to write over it")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    (path.parent / "experiments").mkdir(exist_ok=True)
    for name in ("experiments/gridworld.py", "experiments/pictures.py",  # what drama.py finds
                 "mamba2_ref.py", "requirements.txt"):  # what tasks 7 and 8 say to read, and pip
        if force or not (path.parent / name).exists():
            shutil.copy(ORIGINAL.parent / name, path.parent / name)
    return path


def run(program: str, body, argv: list[str] | None) -> int:
    """Call body(argv) -> exit code; what the user has to mend becomes one line."""
    with contextlib.suppress(AttributeError):  # a redirected table on Windows has few letters
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return body(argv)
    except Refusal as error:
        print(f"{program}: {error}", file=sys.stderr)
    except OSError as error:
        print(f"{program}: {error.filename}: {error.strerror}", file=sys.stderr)
    return 2


class Parser(argparse.ArgumentParser):
    """argparse, with one line for an error."""

    def error(self, message):
        """Refuse a command line."""
        raise Refusal(f"{message}; see --help")


def main(argv: list[str] | None = None) -> int:
    """Run a command line; return the exit code."""
    parser = Parser("make.py", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder that drama.py is written to")
    parser.add_argument("--tasks", help="such as 1,4; all if left out")
    parser.add_argument("--solution", action="store_true", help="keep the bodies below the hints")
    parser.add_argument("--force", action="store_true", help="write over a copy that is there")
    args = parser.parse_args(argv)
    tasks = choose(args.tasks)
    text = rewrite(ORIGINAL.read_text(encoding="utf-8"), tasks, args.solution)
    path = write(args.out, text, args.force)
    numbers = ", ".join(str(task.number) for task in tasks)
    print(f"{path}: {'solutions' if args.solution else 'blanks'} of tasks {numbers}\n"
          f"grade it: python exercises/grade.py {path}")
    return 0


if __name__ == "__main__":
    sys.exit(run("make.py", main, None))
