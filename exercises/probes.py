"""What runs beside a student's code, in a process of its own: it calls, and knows no answer.

grade.py starts it, sends the module to grade, then one request a line as JSON, and gets one reply a
line. A request names a probe, one of a function of the table PROBES: it calls the student's
function and returns plain numbers, which grade.py compares with oracles that this process never
sees. So no answer can be read or forged here: a right number is a right number.
Each reply repeats the request's nonce. Prints go elsewhere, and the process is left at the first
attempt to open a file, start a process, use the network or call C (`guard`).

Stand-ins (`Memory`, `Linear`) take the place of the big networks, so that grade.py can foretell a
whole dream in a few lines of NumPy.
"""

import base64
import json
import marshal
import os
import sys
import types

if __name__ == "__main__":  # isolated: sys.path has no folder but those of installed packages
    sys.path[:] = json.loads(sys.stdin.readline())["path"]

import tempfile  # noqa: E402
import warnings  # noqa: E402

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

PATHS = ("open", "os.listdir", "os.scandir", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")
FORBIDDEN = ("subprocess", "socket", "ctypes", "shutil", "winreg", "pty", "os.system", "os.exec",
             "os.fork", "os.posix_spawn", "os.spawn", "os.startfile", "os.kill", "os.killpg",
             "os.rename", "os.link", "os.symlink", "os.chmod", "os.truncate", "glob",
             "signal.pthread_kill")
CONFIG = dict(game="GridWorld", image_size=16, cnn_width=3, first_stride=2, layers=1, d_state=6,
              expand=2, chunk_size=4, dropout=0.0, head_units=9, actor_units=10, critic_units=12,
              hidden_layers=1, unimix=0.0)


# ---- numbers on their way -----------------------------------------------------------------------


def pack(value):
    """Tensors as {dtype, shape, data}, in lists and dicts; of anything else the type alone."""
    if isinstance(value, Tensor):
        flat = value.detach().flatten().tolist()
        return dict(dtype=str(value.dtype)[6:], shape=list(value.shape), data=flat)
    if isinstance(value, dict):
        return {str(name): pack(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [pack(part) for part in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return dict(type=type(value).__name__)


def unpack(value):
    """The inverse of `pack`."""
    if isinstance(value, dict) and "dtype" in value:
        return torch.tensor(value["data"], dtype=getattr(torch, value["dtype"])).view(
            value["shape"])
    if isinstance(value, dict):
        return {name: unpack(part) for name, part in value.items()}
    return [unpack(part) for part in value] if isinstance(value, list) else value


# ---- stand-ins ----------------------------------------------------------------------------------


class Linear(nn.Module):
    """x W, which keeps the inputs that it was given."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight, self.seen = nn.Parameter(weight), []

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d_in) -> (..., d_out)."""
        self.seen.append(x)
        return x @ self.weight


class Memory(nn.Module):
    """In the place of SequenceModel: d_t = keep d_{t-1} + z_t W + V[a_t], d = 0 before an opening.

    Its state is d itself, one tensor (b, d_model) of one layer. No gradient goes through z: what
    is left is what the losses themselves let through.
    """

    def __init__(self, keep: float, W: Tensor, V: Tensor):
        super().__init__()
        self.keep, self.W, self.V, self.num_actions = keep, W, V, len(V)

    def initial_states(self, batch: int) -> list:
        """Zero."""
        return [(self.W.new_zeros(batch, self.W.shape[1]),)]

    def forward(self, z: Tensor, action: Tensor, states=None, first=None) -> tuple[Tensor, list]:
        """z (b, l, K*C), action (b, l), first (b, l) -> d (b, l, d_model), states; or one token."""
        if action.ndim == 1:
            d = self.keep * states[0][0] + z.detach().float() @ self.W + self.V[action]
            return d, [(d,)]
        b, l = action.shape
        states, ds = states or self.initial_states(b), []
        for t in range(l):
            if first is not None:
                states = [(states[0][0] * ~first[:, t, None],)]
            d, states = self(z[:, t], action[:, t], states)
            ds.append(d)
        return torch.stack(ds, 1), states


def config(drama, **changes):
    """A Config of small sizes that all differ."""
    return drama.Config(**{**CONFIG, **changes})


def world(drama, n: dict, **changes):
    """A WorldModel of stand-ins; n: K, C, keep, W, V and the weights of prior, reward, end."""
    d_model, actions = n["W"].shape[1], len(n["V"])
    cfg = config(drama, categoricals=n["K"], classes=n["C"], d_model=d_model, headdim=d_model,
                 bins=n["reward"].shape[1], bin_limit=n["limit"], **changes)
    model = drama.WorldModel(cfg, actions)
    model.sequence = Memory(n["keep"], n["W"], n["V"])
    model.prior, model.reward = Linear(n["prior"]), Linear(n["reward"])
    model.termination = Linear(n["end"])
    return model.eval()


# ---- probes -------------------------------------------------------------------------------------


def find(drama, name: str, init=()):
    """The function `name`, or, for `Class.method`, the method of a Class(*init)."""
    owner, _, method = name.rpartition(".")
    return getattr(getattr(drama, owner)(*init) if owner else drama, method)


def call(drama, name, args, init=(), keywords=None, weight=None, wrt=None):
    """Call a function -> what came out, what became of its arguments, and, where asked for, the
    gradient of sum(weight * first output) by argument `wrt`."""
    if wrt is not None:
        args[wrt].requires_grad_()
    out = find(drama, name, init)(*args, **keywords or {})
    answer = dict(out=out, args=args)
    if wrt is not None:
        head = out[0] if isinstance(out, (tuple, list)) else out
        answer["grad"] = None
        if isinstance(head, Tensor) and head.requires_grad:
            (answer["grad"],) = torch.autograd.grad((weight * head).sum(), args[wrt],
                                                    allow_unused=True)
    return answer


class Counting(TorchDispatchMode):
    """Counts PyTorch's operations and keeps the size of the largest tensor that one made."""

    def __init__(self):
        super().__init__()
        self.operations, self.largest = 0, 0

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        """One operation."""
        out = function(*args, **kwargs or {})
        self.operations += 1
        made = out if isinstance(out, (tuple, list)) else [out]
        self.largest = max([self.largest, *(t.numel() for t in made if isinstance(t, Tensor))])
        return out


def cost(drama, name, args):
    """Operations and the largest tensor of one call."""
    with Counting() as counting:
        find(drama, name)(*args)
    return dict(operations=counting.operations, largest=counting.largest)


def draw_rows(drama, method, trained, dreamt, size, settings):
    """Replay.draw_… -> rows, and what became of the counts."""
    cfg = config(drama, steps=len(trained), **settings)
    replay = drama.Replay(cfg, torch.device("cpu"))
    replay.size, replay.trained, replay.dreamt = size, trained, dreamt
    rows = getattr(replay, method)()
    return dict(rows=rows, trained=replay.trained, dreamt=replay.dreamt)


def model_losses(drama, n, log_post, action, first, free_bits):
    """WorldModel.loss where the encoder says `log_post` -> losses, kl, log priors, gradients."""
    b, l = action.shape
    model = world(drama, n, free_bits=free_bits, batch_size=b, batch_length=l)
    log_post.requires_grad_()
    model.encode = lambda frame: log_post
    frame = torch.zeros(b, l, 16, 16, 3, dtype=torch.uint8)
    batch = drama.Batch(rows=torch.zeros(b, l, dtype=torch.int64), frame=frame, action=action,
                        reward=torch.zeros(b, l), terminated=torch.zeros(b, l), first=first)
    given, log_prior = [], model.log_prior

    def listen(d, z):
        given.append(z)
        return log_prior(d, z)

    model.log_prior = listen
    losses, z, kl = model.loss(batch)
    leaks = any(x.requires_grad for x in given)
    d, _ = model.sequence(z.flatten(-2), action, first=first)
    moved = {}
    for name in ("dynamics", "representation"):
        for part, leaf in (("prior", model.prior.weight), ("posterior", log_post)):
            (grad,) = torch.autograd.grad(losses[name].sum(), leaf, retain_graph=True,
                                          allow_unused=True)
            moved[f"{name} {part}"] = None if grad is None else grad
    return dict(losses=losses, kl=kl, log_prior=log_prior(d, z.flatten(-2)), moved=moved, d=d,
                leaks=leaks)


def dream(drama, n, z, action, first, horizon):
    """WorldModel.imagine with an actor of stand-ins -> the Dream, and what the actor saw."""
    model, actor = world(drama, n, horizon=horizon), Linear(n["actor"])
    for p in model.parameters():
        p.requires_grad_()
    dreamt = model.imagine(actor, z, action, first)
    if not hasattr(dreamt, "_asdict"):
        return dict(dream=dict(type=type(dreamt).__name__))
    parts = dreamt._asdict()
    return dict(dream=parts, grads=[name for name, x in parts.items()
                                    if isinstance(x, Tensor) and x.requires_grad])


def agent_losses(drama, n, feature, action, reward, end, scale, settings):
    """ActorCritic.loss with linear nets -> losses, metrics, scale, who moves whom."""
    d_z = n["K"] * n["C"]
    cfg = config(drama, categoricals=n["K"], classes=n["C"], d_model=feature.shape[-1] - d_z,
                 headdim=feature.shape[-1] - d_z, bins=n["critic"].shape[1], bin_limit=n["limit"],
                 **settings)
    agent = drama.ActorCritic(cfg, n["actor"].shape[1])
    nets = dict(actor=Linear(n["actor"]), critic=Linear(n["critic"]),
                slow_critic=Linear(n["slow_critic"]))
    for name, net in nets.items():
        setattr(agent, name, net)
    agent.slow_critic.requires_grad_(False)
    agent.scale.fill_(scale)
    losses, metrics = agent.loss(drama.Dream(feature=feature, action=action, reward=reward,
                                             end=end))
    moved = {}
    for name, loss in losses.items():
        for part, net in nets.items():
            grad = None
            if loss.requires_grad and net.weight.requires_grad:
                (grad,) = torch.autograd.grad(loss.sum(), net.weight, retain_graph=True,
                                              allow_unused=True)
            moved[f"{name} {part}"] = grad
    return dict(losses=losses, metrics=metrics, scale=agent.scale, moved=moved)


def act(drama, n, log_post, first, at_random):
    """Player.act along frames (t, b), whose encodings are log_post (t, b, K, C)."""
    model = world(drama, n)
    t, b = first.shape
    model.encode = lambda frame: log_post[int(frame[0, 0, 0, 0])]
    agent = drama.ActorCritic(model.cfg, len(n["V"]))
    agent.actor = Linear(n["actor"])
    player = drama.Player(model.cfg, model, agent, b, torch.device("cpu"))
    out = []
    for i in range(t):
        frame = torch.full((b, 16, 16, 3), i, dtype=torch.uint8)
        out.append(list(player.act(frame, first[i], at_random=at_random)))
    return dict(out=out, seen=agent.actor.seen)


PROBES = dict(call=call, cost=cost, draw_rows=draw_rows, model_losses=model_losses, dream=dream,
              agent_losses=agent_losses, act=act)


# ---- the process --------------------------------------------------------------------------------


def load(parts: list[bytes], name: str = "drama") -> types.ModuleType:
    """The module of marshalled code; it has no file and no source that could be read."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    for part in parts:
        exec(marshal.loads(part), module.__dict__)
    return module


def what_went_wrong(error: BaseException) -> dict:
    """The error, and the last line of the student's file on its way."""
    line, step = None, error.__traceback__
    while step:
        if step.tb_frame.f_code.co_filename == "drama.py":
            line = step.tb_lineno
        step = step.tb_next
    return dict(type=type(error).__name__, message=str(error)[:500], line=line)


def answer(drama, request: dict) -> dict:
    """The reply to one request."""
    torch.default_generator.manual_seed(request["seed"])  # torch.manual_seed reads source files
    try:
        result = pack(PROBES[request["probe"]](drama, **unpack(request["inputs"])))
        return dict(nonce=request["nonce"], result=result)
    except BaseException as error:  # SystemExit too is the student's answer
        return dict(nonce=request["nonce"], error=what_went_wrong(error))


def guard(roots: list[str], report) -> None:
    """Leave the process where code opens a file outside `roots`, or does what no task needs."""
    roots = [os.path.join(os.path.realpath(root), "") for root in roots]

    def inside(path):
        if isinstance(path, int):  # a handle, which came from a path that was looked at
            return True
        real = os.path.join(os.path.realpath(os.fsdecode(path or ".")), "")
        return any(real.startswith(root) for root in roots)

    def hook(event, args):
        if event in PATHS and not inside(args[0]):
            report(dict(forbidden=f"calls {event} on {args[0]}"))
        elif event not in PATHS and event.startswith(FORBIDDEN):
            report(dict(forbidden=f"calls {event}"))
        else:
            return
        os._exit(3)

    sys.addaudithook(hook)


def main() -> None:
    """Answer requests until there are no more."""
    warnings.simplefilter("ignore")  # showing a warning would read the file that it names
    torch.set_num_threads(1)
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # prints are no replies
    sys.stdout = sys.stderr
    first = json.loads(sys.stdin.readline())
    nonce = [first["nonce"]]

    def reply(message: dict) -> None:
        replies.write(json.dumps({"nonce": nonce[0], **message}) + "\n")
        replies.flush()

    requests, sys.stdin = sys.stdin, open(os.devnull, encoding="utf-8")
    tempfile.tempdir = os.getcwd()  # empty, and removed by grade.py
    with Counting():  # what PyTorch imports at its first use it shall import before the guard is up
        torch.zeros(2, requires_grad=True).sum().backward()
    guard([*sys.path, os.getcwd()], reply)
    try:
        drama = load([base64.b64decode(part) for part in first["code"]])
        reply(dict(result="ready"))
    except BaseException as error:
        reply(dict(error=what_went_wrong(error)))
        return
    for line in requests:
        request = json.loads(line)
        nonce[0] = request["nonce"]
        reply(answer(drama, request))


if __name__ == "__main__":
    main()
