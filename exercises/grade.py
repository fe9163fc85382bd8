"""Grade a student's drama.py: a table of tasks, and for each that fails one line to act on.

    python exercises/grade.py hw/drama.py                      all tasks
    python exercises/grade.py hw/drama.py --tasks 3            one of them
    python exercises/grade.py hw/drama.py --json results.json  as Gradescope reads it
    python exercises/grade.py handed-in/ --csv scores.csv      every drama.py in a folder

Exit code 0 where all that was asked passes, 1 where something does not, 2 for a bad command.

Each task is graded by itself: the student's functions of that task, and what they need of what the
file adds, take the place of the original's, so a broken task costs no other. That module runs in a
process of its own (probes.py), in an empty folder, with a time limit and without a way to the
original's text; the answers are judged here (checks.py), on the other side of a pipe. This keeps
grades honest; it is no jail for hostile code: grade strangers' files in a container, as Gradescope
does.
"""

import ast
import base64
import concurrent.futures
import csv
import functools
import json
import marshal
import os
import queue
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
import checks  # noqa: E402
import make  # noqa: E402
from checks import Failed  # noqa: E402

START_LIMIT = 180  # seconds for importing torch, which may be on a slow disk
MODULES = ("torch", "numpy", "math", "functools", "itertools", "collections", "typing")
PLACES = dict(model_losses="WorldModel.loss", dream="WorldModel.imagine", act="Player.act",
              agent_losses="ActorCritic.loss")  # what a probe is about
NAMES = set("open exec eval compile __import__ globals locals vars getattr setattr delattr "
            "breakpoint exit quit __builtins__ __loader__ __spec__ os sys io ctypes subprocess "
            "shutil signal zipfile json csv argparse Path importlib inspect gc pickle".split())
ATTRIBUTES = set("from_file fromfile memmap load loadtxt genfromtxt DataSource ctypeslib jit ops "
                 "hub serialization _C library utils package f_globals f_back gi_frame "
                 "tb_frame".split())


# ---- the module to grade ------------------------------------------------------------------------


parsed = functools.cache(ast.parse)
one_at_a_time = threading.Lock()  # CPython 3.11: two threads in ast.parse may be a SystemError


def read(path: Path) -> ast.Module:
    """The student's file; Failed where it is no Python."""
    try:
        return ast.parse(path.read_bytes(), "drama.py")
    except SyntaxError as error:
        raise Failed(f"line {error.lineno}: syntax error, {error.msg}; no task can be graded "
                     "until the file is Python again") from None
    except (ValueError, RecursionError) as error:
        raise Failed(f"the file is no Python: {error}") from None


def names_of(statement: ast.stmt) -> set[str]:
    """What a statement at the top of a file defines."""
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return {statement.name}
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return {alias.asname or alias.name.split(".")[0] for alias in statement.names}
    if isinstance(statement, (ast.Assign, ast.AnnAssign)):
        return make.assigned(statement)
    return set()


def imports(module: ast.Module) -> list:
    """The imports at the top of a file."""
    return [s for s in module.body if isinstance(s, (ast.Import, ast.ImportFrom))]


def mentioned(node: ast.AST) -> set[str]:
    """Every name and attribute in the code."""
    return {n.id if isinstance(n, ast.Name) else n.attr for n in ast.walk(node)
            if isinstance(n, (ast.Name, ast.Attribute))}


def additions(student: ast.Module, original: ast.Module, bodies: list) -> tuple[list, list]:
    """What the file adds and the bodies need: statements at the top, and methods by class."""
    known = set().union(*map(names_of, original.body))
    old = {ast.dump(s) for s in imports(original)}
    top = [s for s in imports(student) if ast.dump(s) not in old]
    spare = [(None, s, names_of(s)) for s in student.body
             if s not in top and names_of(s) and not names_of(s) & known]
    there = make.functions(original)
    for c in student.body:
        if isinstance(c, ast.ClassDef) and c.name in known:
            spare += [(c.name, f, {f.name}) for f in c.body if isinstance(f, ast.FunctionDef)
                      and f"{c.name}.{f.name}" not in there]
    used, taken = set().union(*map(mentioned, bodies)), []
    while fresh := [part for part in spare if part[2] & used and part not in taken]:
        taken += fresh
        used = used.union(*(mentioned(statement) for _, statement, _ in fresh))
    taken = [part for part in spare if part in taken]  # in the file's order
    top = [s for s in top if names_of(s) & (used | {"*"})]  # editors add what nothing uses
    top += [statement for owner, statement, _ in taken if owner is None]
    return top, [(owner, method) for owner, method, _ in taken if owner]


def inspect(nodes: list, modules: set[str]) -> None:
    """Failed where the code names what no task needs, and a cheat does."""
    for node in (inner for outer in nodes for inner in ast.walk(outer)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            there = ([node.module or "."] if isinstance(node, ast.ImportFrom) else
                     [alias.name for alias in node.names])
            strange = [m for m in there if m.split(".")[0] not in MODULES]
            strange += [a.name for a in node.names
                        if a.name in NAMES | ATTRIBUTES or a.name.startswith("_")]
            if strange:
                raise Failed(f"line {node.lineno} imports {strange[0]}: a task needs none but "
                             f"{', '.join(MODULES)}, and the original is not there while it is "
                             "graded")
        name = (node.id if isinstance(node, ast.Name) and node.id in NAMES else
                node.attr if isinstance(node, ast.Attribute) and
                (node.attr in ATTRIBUTES or node.attr.startswith("__") and node.attr != "__init__"
                 or node.attr.startswith("_") and modules & {n.id for n in ast.walk(node.value)
                                                             if isinstance(n, ast.Name)})
                else None)
        if name:
            raise Failed(f"line {node.lineno} names `{name}`: no task needs it, and it may be a "
                         "way to the original; if it is your own, rename it")


@functools.cache
def remainder(source: str, task: make.Task) -> bytes:
    """The original without a task's functions and what is withheld, as marshalled code."""
    tree = ast.parse(source)
    for owner in [tree, *(c for c in tree.body if isinstance(c, ast.ClassDef))]:
        prefix = f"{owner.name}." if isinstance(owner, ast.ClassDef) else ""
        owner.body = [s for s in owner.body if not (
            isinstance(s, ast.FunctionDef) and prefix + s.name in task.blanks)]
    for name in task.withheld:
        make.functions(tree)[name].body = ast.parse(
            f"raise RuntimeError('{name} is not there while task {task.number} is graded: write "
            "the body without it')").body
    return marshal.dumps(compile(ast.fix_missing_locations(tree), "<original>", "exec"))


def own(original: ast.Module, student: ast.Module, task: make.Task) -> bytes:
    """The student's functions of a task, and what they need, as marshalled code."""
    mine = make.functions(student)
    missing = [name for name in task.blanks if name not in mine]
    if missing:
        raise Failed(f"the file has no function {missing[0]}")
    bodies = [mine[name] for name in task.blanks]
    body, methods = additions(student, original, bodies)
    modules = {a.asname or a.name.split(".")[0] for s in imports(original) + imports(student)
               if isinstance(s, ast.Import) for a in s.names} | {"nn", "vector"}
    inspect([*bodies, *body, *(method for _, method in methods)], modules)
    for name, node in zip(task.blanks, bodies):
        owner = name.rpartition(".")[0]
        methods += [(owner, node)] if owner else []
        body += [] if owner else [node]
    for owner, node in methods:  # defined beside its class, then put into it
        place, node.name = f"{owner}.{node.name}", f"{owner}_{node.name}"
        body += [node, *ast.parse(f"{place} = {node.name}").body]
    module = ast.fix_missing_locations(ast.Module(body, []))
    return marshal.dumps(compile(module, "drama.py", "exec"))


def parts(student: ast.Module, task: make.Task) -> list[bytes]:
    """The module to grade: first the original without the task's functions, then the student's."""
    source = make.ORIGINAL.read_text(encoding="utf-8")
    return [remainder(source, task), own(parsed(source), student, task)]


# ---- a process for each task --------------------------------------------------------------------


class Process:
    """A student's module in a process of its own; `request` asks it."""

    def __init__(self, code: list[bytes], seed: int, limit: float, lines: list, printed: deque):
        self.code, self.seed, self.lines, self.limit = code, seed, lines, limit
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        here, ours = Path(__file__).resolve().parent, make.ORIGINAL.parent
        path = [str(Path(p).resolve()) for p in sys.path if p and Path(p).resolve() not in
                (here, ours, Path.cwd())]
        kept = "PATH SYSTEMROOT TEMP TMP LD_LIBRARY_PATH DYLD_LIBRARY_PATH".split()
        env = {name: os.environ[name] for name in kept if name in os.environ}
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-B", "-X", "utf8", str(here / "probes.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            cwd=self.folder.name, env={**env, "OMP_NUM_THREADS": "1"}, encoding="utf-8",
            errors="replace")
        self.replies = queue.Queue()
        self.threads = [threading.Thread(target=self._follow, args=args, daemon=True) for args in (
            (self.process.stdout, 100_000_000, self.replies.put),
            (self.process.stderr, 1000, lambda line: line.strip() and printed.append(line)))]
        for thread in self.threads:
            thread.start()
        self._send(dict(path=path))

    def __enter__(self):
        try:
            self.until = time.monotonic() + START_LIMIT
            code = [base64.b64encode(part).decode() for part in self.code]
            self._ask(dict(code=code), "while the file was loaded")
            self.until = time.monotonic() + self.limit
            return self
        except BaseException:
            self.close()
            raise

    def __exit__(self, *_):
        self.close()

    @staticmethod
    def _follow(stream, longest, take):
        while line := stream.readline(longest):
            take(line)
        take("")

    def _send(self, message):
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        except OSError:
            pass  # it is gone; the missing reply will say so

    def _ask(self, message, when):
        nonce = secrets.token_hex(16)
        self._send({**message, "nonce": nonce})
        try:
            line = self.replies.get(timeout=max(0, self.until - time.monotonic()))
        except queue.Empty:
            raise Failed(f"no answer within {self.limit:g} seconds {when}: an endless loop?"
                         ) from None
        if not line:
            self.process.wait(10)
            raise Failed(f"the process ended {when}, exit code {self.process.returncode}: a crash, "
                         "or a way out such as os._exit; nothing was judged after it")
        try:
            reply = json.loads(line)
        except json.JSONDecodeError:
            reply = {}
        if not isinstance(reply, dict) or reply.get("nonce") != nonce:
            raise Failed(f"something else than an answer came {when}: does the code write to the "
                         "grader's pipe?")
        if "forbidden" in reply:
            raise Failed(f"the code {reply['forbidden']} {when}: no task needs files or other "
                         "processes, so this one gets no points")
        return explain(reply, when, self.lines)

    def request(self, probe: str, inputs: dict):
        """The result of a probe."""
        return self._ask(dict(probe=probe, inputs=inputs, seed=self.seed),
                         f"in {place(probe, inputs)}")

    def close(self) -> None:
        """End the process and remove its folder."""
        self.process.kill()
        self.process.wait()
        for thread in self.threads:
            thread.join(5)
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            try:
                stream.close()
            except OSError:
                pass
        self.folder.cleanup()


def place(probe: str, inputs: dict) -> str:
    """The function that a request is about."""
    method = inputs.get("method")
    return PLACES.get(probe) or inputs.get("name") or f"Replay.{method}"


def explain(reply: dict, when: str, lines: list[str]):
    """A reply's result; Failed with what went wrong, and in which line of the student's file."""
    error = reply.get("error")
    if error is None:
        return reply.get("result")
    if error["type"] == "NotImplementedError" and error["message"].startswith("task "):
        raise Failed(error["message"])
    line, where = error["line"], when
    if line:
        text = lines[line - 1].strip() if line <= len(lines) else ""
        where = f"in line {line}, `{text}`, {when}"
    said = " ".join(error["message"].split())[:300]
    raise Failed(f"{error['type']} {where}" + (f": {said}" if said else ""))


def judge(task: make.Task, path: Path, seed: int = 0, limit: float = 30) -> tuple[str, list]:
    """Why a task fails, in one line, or "", and the last that a failing student's code printed."""
    printed = deque(maxlen=20)
    try:
        with one_at_a_time:
            code = parts(read(path), task)
        lines = path.read_bytes().decode(errors="replace").splitlines()
        with Process(code, seed, limit, lines, printed) as process:
            student = checks.Student(process.request)
            checks.CHECKS[task.number](student, np.random.default_rng(seed))
        return "", []
    except Failed as failed:
        return " ".join(str(failed).split()), [line.rstrip() for line in printed]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        return (f"what came back has a form that cannot be judged ({type(error).__name__}: {error})"
                ": does each function return what its docstring says?", [])


# ---- the table ----------------------------------------------------------------------------------


def gradescope(tasks, verdicts, seconds: float) -> dict:
    """results.json: https://gradescope-autograders.readthedocs.io/en/latest/specs/."""
    tests = [dict(name=f"Task {task.number}: {task.title}", number=str(task.number),
                  score=0 if failed else task.points, max_score=task.points,
                  status="failed" if failed else "passed",
                  output="\n".join([failed or "passed", *printed]))
             for task, (failed, printed) in zip(tasks, verdicts)]
    score, most = sum(t["score"] for t in tests), sum(t["max_score"] for t in tests)
    return dict(score=score, max_score=most, execution_time=round(seconds, 1),
                output=f"{score} of {most} points", tests=tests)


def grade(file: Path, tasks, args) -> dict:
    """Print a file's table -> its results."""
    begun, verdicts = time.monotonic(), []
    print(f"{'task':<46} points")
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        for task, (failed, printed) in zip(tasks, pool.map(
                lambda task: judge(task, file, args.seed, args.limit), tasks)):
            verdicts.append((failed, printed))
            print(f"{task.number:>2} {task.title:<43} {0 if failed else task.points:>2}/"
                  f"{task.points:<2}  {failed or 'passed'}", flush=True)
            for line in printed:
                print(f"{'':>10}printed: {line[:120]}", flush=True)
    results = gradescope(tasks, verdicts, time.monotonic() - begun)
    print(f"{results['output']}, in {results['execution_time']} seconds")
    return results


def main(argv: list[str] | None = None) -> int:
    """Run a command line; return the exit code."""
    parser = make.Parser("grade.py", description=__doc__, allow_abbrev=False,
                         formatter_class=make.argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the student's drama.py; or a folder: all in it")
    parser.add_argument("--tasks", help="such as 1,4; all if left out")
    parser.add_argument("--json", type=Path, help="write Gradescope's results.json there")
    parser.add_argument("--csv", type=Path, help="write a row of points for each file there")
    parser.add_argument("--seed", type=int, default=0, help="seed of the numbers asked with (0)")
    parser.add_argument("--limit", type=float, default=30, help="seconds for each task (30)")
    parser.add_argument("--jobs", type=int, default=1, help="tasks graded at once (1)")
    args = parser.parse_args(argv)
    tasks = make.choose(args.tasks)
    files = sorted(args.file.rglob("drama.py")) if args.file.is_dir() else [args.file]
    if not files or not files[0].is_file():
        raise make.Refusal(f"{args.file}: no such file; make one with exercises/make.py")
    if args.json and args.file.is_dir():
        raise make.Refusal("--json is for one file; for a folder use --csv")
    if args.jobs < 1 or args.limit <= 0 or args.seed < 0:
        raise make.Refusal("--jobs and --limit must be above 0, --seed 0 or above; see --help")
    results, rows = {}, [["file", *(f"task {task.number}" for task in tasks), "points"]]
    for file in files:
        if len(files) > 1:
            print(f"\n{file}")
        results = grade(file, tasks, args)
        rows.append([file, *(test["score"] for test in results["tests"]), results["score"]])
        if args.csv:  # after each file: a class takes a while
            with args.csv.open("w", newline="", encoding="utf-8") as table:
                csv.writer(table).writerows(rows)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return int(any(row[-1] < sum(task.points for task in tasks) for row in rows[1:]))


if __name__ == "__main__":
    sys.exit(make.run("grade.py", main, None))
