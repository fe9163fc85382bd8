"""The checks of each task: small oracles in NumPy's float64, numbers that can be worked by hand.

Each check calls a student's function through `Student` (see probes.py) and compares what comes back
with an oracle below, which shares no code with drama.py. The first difference ends the task with
one line: what was called, what came, what was expected, and, where the number is that of a known
mistake, a hint. The mistakes stand beside each oracle, as `hints`: {hint: what it would give}.
"""

import numpy as np

TOLERANCE = 1e-4  # of float32 results, relative to the size of the numbers


class Failed(Exception):
    """The first check that failed, in one line."""


# ---- asking and comparing -----------------------------------------------------------------------


def pack(value):
    """Arrays as probes.py reads them: floats as float32."""
    if isinstance(value, np.ndarray):
        kind = {"f": "float32", "b": "bool"}.get(value.dtype.kind, "int64")
        return dict(dtype=kind, shape=list(value.shape), data=value.flatten().tolist())
    if isinstance(value, dict):
        return {name: pack(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [pack(part) for part in value]
    return value.item() if isinstance(value, np.generic) else value


def unpack(value):
    """Arrays out of a reply."""
    if isinstance(value, dict) and "dtype" in value:
        kind = bool if value["dtype"] == "bool" else np.float64
        return np.array(value["data"], kind).reshape(value["shape"])
    if isinstance(value, dict):
        return {name: unpack(part) for name, part in value.items()}
    return [unpack(part) for part in value] if isinstance(value, list) else value


class Student:
    """A student's functions, as they answer from their own process."""

    def __init__(self, request):
        self.request = request  # (probe, packed inputs) -> packed result; raises Failed

    def probe(self, which: str, /, **inputs):
        """The result of a probe of probes.py."""
        return unpack(self.request(which, pack(inputs)))

    def call(self, name: str, *args, **options):
        """What a function returns."""
        return self.probe("call", name=name, args=list(args), **options)["out"]

    def gradient(self, name: str, *args, weight, wrt=0, **options):
        """The gradient of sum(weight * output) by argument wrt, None where there is none."""
        return self.probe("call", name=name, args=list(args), weight=weight, wrt=wrt,
                          **options)["grad"]


def show(value) -> str:
    """A number, or an array of a few, as one would write it."""
    if isinstance(value, np.ndarray) and value.ndim:
        return "[" + ", ".join(show(v) for v in value) + "]"
    return f"{float(value):.4g}"


def typed(value) -> str:
    """What came instead of a tensor."""
    return value["type"] if isinstance(value, dict) and "type" in value else (
        "None" if value is None else f"{type(value).__name__}")


def expect(call: str, got, want, axes=(), hints=None, tolerance=TOLERANCE) -> None:
    """Failed where got is no array of want's shape and numbers; axes name its indices."""
    want = np.asarray(want, np.float64)
    if not isinstance(got, np.ndarray):
        raise Failed(f"{call} gave {typed(got)}, expected a tensor of shape {want.shape}")
    if got.shape != want.shape:
        raise Failed(f"{call} has shape {got.shape}, expected {want.shape}")

    def alike(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        if a.shape != b.shape:
            return False
        return np.isnan(a) & np.isnan(b) | (np.abs(a - b) <= tolerance * (1 + np.abs(b)))

    near = alike(got, want)
    if np.all(near):
        return
    at = np.unravel_index(np.argmin(near), want.shape)  # the first that is off
    where = ", ".join(f"{name}={i}" for name, i, size in zip(axes, at, want.shape) if size > 1)
    hint = next((f": {hint}" for hint, wrong in (hints or {}).items()
                 if np.all(alike(got, wrong)) and not np.all(alike(wrong, want))), "")
    shown, asked = show(got[at]), show(want[at])
    if shown == asked:
        shown, asked = f"{got[at]:.7g}", f"{want[at]:.7g}"
        hint = hint or ": close, but digits were lost; is a huge number added and taken off again?"
    raise Failed(f"{call} gave {shown}{' at ' + where if where else ''}, expected {asked}{hint}")


def require(fine, message: str) -> None:
    """Failed with the message unless fine."""
    if not fine:
        raise Failed(message)


def moves(gradient) -> bool:
    """Whether a gradient is there and not zero."""
    return gradient is not None and bool(np.any(np.abs(gradient) > 1e-9))


def drawn(call: str, counts, probs, hint: str) -> None:
    """Failed where counts are five standard deviations off their probabilities."""
    counts, probs = np.asarray(counts, np.float64), np.asarray(probs, np.float64)
    n = counts.sum()
    off = np.abs(counts - n * probs) / np.sqrt(n * probs * (1 - probs))
    i = int(off.argmax())
    require(off[i] < 5, f"{call} drew number {i} in {counts[i]:.0f} of {n:.0f} draws, expected "
                        f"about {n * probs[i]:.0f}: {hint}")


# ---- oracles ------------------------------------------------------------------------------------


def symlog(x):
    """sign(x) ln(1 + |x|)."""
    return np.sign(x) * np.log1p(np.abs(x))


def symexp(y):
    """The inverse of symlog."""
    return np.sign(y) * np.expm1(np.abs(y))


def log_softmax(x, axis=-1):
    """In float64."""
    x = x - x.max(axis, keepdims=True)
    return x - np.log(np.exp(x).sum(axis, keepdims=True))


def softmax(x, axis=-1):
    """In float64."""
    return np.exp(log_softmax(x, axis))


def two_hot(y, bins, limit):
    """y (...) in symlog -> (..., bins): the two nearest of bins over -limit .. limit share it."""
    out = np.zeros((*np.shape(y), bins))
    for at in np.ndindex(*np.shape(y)):
        place = (np.clip(y[at], -limit, limit) + limit) / (2 * limit) * (bins - 1)
        below = min(int(place), bins - 2)
        out[at][below], out[at][below + 1] = below + 1 - place, place - below
    return out


def two_hot_mean(logits, limit):
    """symexp of the mean bin."""
    return symexp(softmax(logits) @ np.linspace(-limit, limit, logits.shape[-1]))


def kl(p, q):
    """KL of log-probabilities p || q (..., K, C) -> (...)."""
    return (np.exp(p) * (p - q)).sum((-2, -1))


def returns(r, e, V, gamma, lam, fault=""):
    """The lambda-return (b, H) of r, e (b, H) and V (b, H+1), right or with a fault."""
    R, out = np.zeros_like(V[:, -1]) if fault == "bootstrap" else V[:, -1], np.zeros_like(r)
    if fault == "swapped":
        lam = 1 - lam
    steps = range(r.shape[1])
    for t in steps if fault == "time" else reversed(steps):
        v = V[:, t] if fault == "V_t" else V[:, t + 1]
        on = 1 if fault == "end" else 1 - e[:, t]
        tail = (1 - lam) * v + lam * R
        R = (r[:, t] + gamma * tail) * on if fault == "reward" else r[:, t] + gamma * on * tail
        out[:, t] = R
    return out


def step(x, dt, A, B, C, h, fault=""):
    """One token of the recurrence, (b,h,p), (b,h), (h,), (b,n), (b,n), (b,h,p,n) -> y, state."""
    decay = np.exp({"no dt": np.ones_like(dt), "sign": -dt}.get(fault, dt) * A)
    write = x if fault == "no input dt" else dt[..., None] * x
    new = decay[..., None, None] * h + write[..., None] * B[:, None, None]
    if fault == "no decay":
        new = new - decay[..., None, None] * h + h
    return ((h if fault == "old state" else new) * C[:, None, None]).sum(-1), new


def scan(x, dt, A, B, C, state, first, q=4, fault=""):
    """Token after token, as chunks would: what a chunk writes, and what its start still gives.

    Both decay and are cleared by `first`; a fault forgets one of these, or cuts at chunks.
    """
    (b, l, h, p), n = x.shape, B.shape[-1]
    start = np.zeros((b, h, p, n)) if state is None or fault == "no state" else state
    inside, ys = np.zeros((b, h, p, n)), []
    passed, leak = start, start  # passed on to the next chunk; read by the outputs
    for t in range(l):
        if t % q == 0 and t:
            start = inside * 0 if fault == "no carry" else inside + passed
            inside, passed, leak = inside * 0, start, start
        keep = np.ones(b) if first is None or fault == "ignored" else 1.0 - first[:, t]
        if fault == "late":
            keep = 1.0 - first[:, t - 1] if t else np.ones(b)
        keep = keep[:, None, None, None]
        decay = np.exp(dt[:, t] * A)[..., None, None]
        write = (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, None, None]
        inside = decay * keep * inside + write
        passed = decay * (1 if fault == "through" else keep) * passed
        leak = decay * (1 if fault == "leak" else keep) * leak
        ys.append(((inside + leak) * C[:, t, None, None]).sum(-1))
    return np.stack(ys, 1), inside + passed


# ---- tasks 1 to 5: formulas ---------------------------------------------------------------------


def symlog_and_two_hot(student, rng):
    """Task 1."""
    x = np.array([-1000, -1, 0.5, 30])
    want, size = symlog(x), np.abs(x)
    expect(f"symlog({show(x)})", student.call("symlog", x), want, "i", {
        "the logarithm is the natural one, not base 2": want / np.log(2),
        "the logarithm is the natural one, not base 10": want / np.log(10),
        "the sign of x comes back at the end": np.abs(want),
        "ln(1 + |x|): is the 1 there?": np.sign(x) * np.log(size)})
    expect("symlog([0])", student.call("symlog", np.array([0.0])), [0.0])
    y = np.array([-6, -0.5, 0, 1, 3])
    expect(f"symexp({show(y)})", student.call("symexp", y), symexp(y), "i", {
        "exp(|y|) - 1: is the 1 taken off?": np.sign(y) * np.exp(np.abs(y)),
        "the sign of y comes back at the end": np.abs(symexp(y))})
    bins, limit = 5, 2.0
    x = symexp(np.array([0.25, -1.5, 0.0]))
    want = two_hot(symlog(x), bins, limit)
    expect(f"TwoHot(bins=5, limit=2).encode({show(x)}), symlog(x) = [0.25, -1.5, 0],",
           student.call("TwoHot.encode", x, init=[bins, limit]), want, ("x", "bin"), {
        "the bins lie in symlog: is symlog(x) taken?": two_hot(x, bins, limit),
        "the nearer bin weighs more": two_hot(-symlog(x), bins, limit)[..., ::-1],
        "exactly on a bin floor and ceil are the same: is all weight lost there?":
            two_hot(symlog(x), bins, limit) * (two_hot(symlog(x), bins, limit) != 1),
        "two bins share the weight": np.eye(bins)[two_hot(symlog(x), bins, limit).argmax(-1)]})
    x = np.array([1e6, -1e6])
    expect("TwoHot(bins=5, limit=2).encode([1e6, -1e6])",
           student.call("TwoHot.encode", x, init=[bins, limit]),
           two_hot(symlog(x), bins, limit), ("x", "bin"), {
        "beyond the outermost bin all weight is on that bin": np.zeros((2, bins))})
    x, logits = symexp(rng.uniform(-2, 2, (2, 3))), rng.normal(size=(2, 3, bins))
    target = two_hot(symlog(x), bins, limit)
    expect("TwoHot(5, 2).encode(x (2, 3))", student.call("TwoHot.encode", x, init=[bins, limit]),
           target, ("i", "j", "bin"))
    want = -(target * log_softmax(logits)).sum(-1)
    expect("TwoHot(5, 2).loss(logits (2, 3, 5), x (2, 3))",
           student.call("TwoHot.loss", logits, x, init=[bins, limit]), want, "ij", {
        "the bins are summed, not averaged": want / bins,
        "the logarithm is the natural one, not base 2": want / np.log(2),
        "a loss is MINUS the sum": -want,
        "softmax over the last axis, the bins": -(target * log_softmax(logits, 0)).sum(-1),
        "log-softmax, not softmax": -(target * softmax(logits)).sum(-1)})
    centres, want = np.linspace(-limit, limit, bins), two_hot_mean(logits, limit)
    expect("TwoHot(5, 2).mean(logits (2, 3, 5))",
           student.call("TwoHot.mean", logits, init=[bins, limit]), want, "ij", {
        "symexp of the mean bin: the bins lie in symlog": symlog(want),
        "the mean is taken first, then symexp": softmax(logits) @ symexp(centres),
        "softmax over the last axis, the bins": symexp(softmax(logits, 0) @ centres)})
    sure, x = np.array([[200.0, 0, -200, 0, 0]]), np.array([symexp(1.0)])
    expect("TwoHot(5, 2).loss([200, 0, -200, 0, 0], x), symlog(x) = 1,",
           student.call("TwoHot.loss", sure, x, init=[bins, limit]), [200.0], "i", {
        "log_softmax, not the logarithm of a softmax: it may be 0": [np.nan]})
    expect("TwoHot(5, 2).mean([200, 0, -200, 0, 0])",
           student.call("TwoHot.mean", sure, init=[bins, limit]), [symexp(-limit)], "i", {
        "is exp(logits) infinite? softmax takes the largest off first": [np.nan]})


def straight_through_and_unimix(student, rng):
    """Task 2."""
    logits, share = 2 * rng.normal(size=(2, 3, 5)), 0.1
    p = softmax(logits)
    want = np.log((1 - share) * p + share / 5)
    expect("unimix(logits (2, K=3, C=5), 0.1)", student.call("unimix", logits, share), want,
           ("i", "k", "c"), {
        "share is divided by C, the classes of the last axis, not by K":
            np.log((1 - share) * p + share / 3),
        "softmax over the last axis, the classes":
            np.log((1 - share) * softmax(logits, -2) + share / 5),
        "the logarithm is asked for": np.exp(want),
        "the logarithm is the natural one, not base 2": want / np.log(2),
        "the softmax is weighted by 1 - share": np.log(p + share / 5),
        "nothing is mixed in": np.log(p)})
    probs, n = np.array([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6]]), 4000
    logp = np.log(np.broadcast_to(probs, (n, 2, 3)))
    got, call = student.call("straight_through", logp), "straight_through(log [0.6, 0.3, 0.1])"
    require(isinstance(got, np.ndarray), f"{call} gave {typed(got)}, expected a tensor")
    require(got.shape == logp.shape, f"{call}, {n} rows: shape {got.shape}, expected {logp.shape}")
    row = got[0, 0]
    require(np.allclose(np.sort(got, -1), [0, 0, 1], atol=1e-5),
            f"{call} gave {show(row)}, expected one 1, the others 0: the value is a draw")
    for k in range(2):
        drawn(f"straight_through(log {show(probs[k])})", got[:, k].sum(0), probs[k],
              "a draw from p, not its largest class")
    w = rng.normal(size=(1, 2, 3))
    grad = student.gradient("straight_through", logp[:1], weight=w)
    require(moves(grad), f"{call} has no gradient: the draw is a constant, the probabilities are "
                         "not; which term is detached?")
    expect("the gradient of sum(w * straight_through(log p)) by log p", grad, w * probs[None],
           ("i", "k", "c"), {
        "the wrong side is detached": -w * probs[None],
        "it is the gradient of p = exp(log p), not of log p":
            np.broadcast_to(w, grad.shape),
        "log p is normalised already: exp(log p), no softmax more":
            (w - (w * probs).sum(-1, keepdims=True)) * probs[None]})


def kl_and_its_stops(student, rng):
    """Task 3."""
    logp, logq = log_softmax(2 * rng.normal(size=(2, 4, 3, 5))), log_softmax(
        rng.normal(size=(2, 4, 3, 5)))
    want = kl(logp, logq)
    expect("kl_divergence(p, q), each (2, 4, K=3, C=5),",
           student.call("kl_divergence", logp, logq), want, ("b", "t"), {
        "KL[p || q] weighs by p, the first": -kl(logq, logp),
        "KL[p || q], not KL[q || p]": kl(logq, logp),
        "the wrong sign: log p - log q": -want,
        "the K categoricals are summed, not averaged": want / 3,
        "it is summed, not averaged": want / 15,
        "in nats, the natural logarithm": want / np.log(2)})
    x = np.array([0.2, 1.0, 3.0])
    expect("free_bits([0.2, 1, 3], 1)", student.call("free_bits", x, 1.0), [1, 1, 3], "i", {
        "below the threshold the loss is the threshold, not 0": [0, 1, 3],
        "max(threshold, KL), not min": [0.2, 1, 1], "the threshold is not taken off": [0, 0, 2]})
    grad = student.gradient("free_bits", x, 1.0, weight=np.ones(3))
    require(grad is not None and grad[0] == 0 and grad[2] == 1,
            f"free_bits([0.2, 1, 3], 1) has gradient {typed(grad) if grad is None else show(grad)}"
            ", expected 0 below the threshold and 1 above")
    n, threshold = numbers(rng), 1.5
    log_post = log_softmax(rng.normal(size=(2, 7, n["K"], n["C"])))
    n["prior"] = 0.3 * rng.normal(size=n["prior"].shape)
    first = np.zeros((2, 7), bool)
    first[0, 3] = first[1, 0] = first[1, 5] = True
    got = student.probe("model_losses", n=n, log_post=log_post, action=rng.integers(0, 4, (2, 7)),
                        first=first, free_bits=threshold)
    model_kl(got, log_post, first, threshold)


def model_kl(got, log_post, first, threshold):
    """Task 3, WorldModel.loss: the numbers, then who moves."""
    last = got["log_prior"]  # from d_t: it foretells z_{t+1}
    prior = np.concatenate([last[:, :1], last[:, :-1]], 1)

    def masked(x, mask=first):
        x = np.where(mask, 0, x)
        x[:, 0] = 0
        return x

    raw = kl(log_post, prior)
    clipped = np.maximum(raw, threshold)
    unmasked = masked(clipped, np.zeros_like(first))
    earlier, later = np.roll(first, 1, 1), np.roll(first, -1, 1)
    hints = {
        "the prior of z_t comes from d_{t-1}, not d_t": masked(np.maximum(
            kl(log_post, last), threshold)),
        "where an episode opens (first) the prior knows nothing: is the term masked?": unmasked,
        "the mask is first of t, where the prior is FOR z_t, not of t - 1":
            masked(clipped, earlier),
        "the mask is first of t, where the prior is FOR z_t": masked(clipped, later),
        "KL[posterior || prior]: the posterior comes first": masked(np.maximum(
            kl(prior, log_post), threshold)),
        "free bits clip the KL of each step": masked(raw),
        "free bits first, then the mask: a masked step counts 0": np.maximum(
            masked(raw), threshold)}
    for name in ("dynamics", "representation"):
        expect(f"WorldModel.loss, losses['{name}'],", got["losses"].get(name), masked(clipped),
               ("b", "t"), hints)
    expect("WorldModel.loss, the third value, kl,", got["kl"], masked(raw), ("b", "t"), {
        "kl is that before free bits": masked(clipped), "masked as the losses are":
            masked(raw, np.zeros_like(first))})
    for name, learns, stands in (("dynamics", "prior", "posterior"),
                                 ("representation", "posterior", "prior")):
        moved = {part: moves(got["moved"][f"{name} {part}"]) for part in (learns, stands)}
        require(not (moved[stands] and not moved[learns]),
                f"{name} moves the {stands} and not the {learns}: the wrong side is detached")
        require(not moved[stands], f"{name} moves the {stands} too: it must stand still; is it "
                                   "detached?")
        require(moved[learns], f"{name} does not move the {learns}: what is detached that should "
                               "not be?")
    require(not got["leaks"], "log_prior was given a z that has a gradient: with dice in groups, "
                              "dynamics would move the posterior through it; is it detached?")


def lambda_return(student, rng):
    """Task 4."""
    faults = {
        "is V of the next state used?": "V_t", "is time taken backwards?": "time",
        "V_{t+1} is weighted by 1 - lam, R_{t+1} by lam": "swapped",
        "R_H = V_H: is the last value the start?": "bootstrap",
        "nothing follows an end: is (1 - e) there?": "end",
        "the reward of the step that ends still counts": "reward"}

    def compare(call, r, e, V, gamma, lam):
        hints = {hint: returns(r, e, V, gamma, lam, fault) for hint, fault in faults.items()}
        hints["is the list turned round at the end?"] = returns(r, e, V, gamma, lam)[:, ::-1]
        got = student.probe("call", name="lambda_return", args=[r, e, V, gamma, lam])
        expect(call, got["out"], returns(r, e, V, gamma, lam), ("b", "t"), hints)
        for name, before, after in zip(("reward", "end", "value"), (r, e, V), got["args"]):
            untouched(call, before, after, name)

    r, V = np.array([[1.0, 1.0]]), np.array([[9.0, 2.0, 4.0]])
    compare("lambda_return([1, 1], end 0, V [9, 2, 4], gamma 0.5, lam 0.5)", r, 0 * r, V, 0.5, 0.5)
    compare("lambda_return([1, 1], end [0, 1], V [9, 2, 4], gamma 0.5, lam 0.5)", r,
            np.array([[0.0, 1.0]]), V, 0.5, 0.5)
    compare("lambda_return([1], end 0, V [9, 2], gamma 0.5, lam 0.5)", r[:, :1], 0 * r[:, :1],
            V[:, :2], 0.5, 0.5)
    r, e, V = rng.normal(size=(3, 5)), rng.uniform(size=(3, 5)) ** 2, rng.normal(size=(3, 6))
    compare("lambda_return(random r, e (3, 5), V (3, 6), 0.9, 0.8)", r, e, V, 0.9, 0.8)


def dfs(student, rng):
    """Task 5."""
    v, b, T = np.array([0.0, 1, 4, 2]), np.array([2.0, 8, 3, 40]), 2.0

    def compare(call, got, want, hints):
        expect(f"{call}, less its largest", got - got.max() if isinstance(got, np.ndarray) else
               got, want - want.max(), "i", {k: x - x.max() for k, x in hints.items()})

    compare("dfs_sequence_logits(trained [0, 1, 4, 2], 2)",
            student.call("dfs_sequence_logits", v, T),
            -v / T, {"what was trained on least comes first: the sign": v / T,
                     "divided by the temperature": -v * T, "is the temperature used?": -v})
    call = "dfs_dream_logits(trained [0, 1, 4, 2], dreamt [2, 8, 3, 40], s 4, 2)"
    compare(call, student.call("dfs_dream_logits", v, b, 4.0, T), np.minimum(0, v - b / 4) / T, {
        "where the model learnt more than was dreamt all are alike: min(0, …)": (v - b / 4) / T,
        "min(0, …), not max": np.maximum(0, v - b / 4) / T,
        "dreamt is divided by s": np.minimum(0, v - b * 4) / T,
        "is s used?": np.minimum(0, v - b) / T,
        "the sign: trained - dreamt / s": np.minimum(0, b / 4 - v) / T,
        "divided by the temperature": np.minimum(0, v - b / 4) * T})
    n, size = 60, 50
    counts = dict(trained=rng.permutation(n))
    # dreamt / s - trained: every number from 1 to n once, s = 3
    counts["dreamt"] = 3 * (counts["trained"] + rng.permutation(n) + 1)
    # at so low a temperature the draw is the top of the logits
    settings = dict(batch_size=4, batch_length=5, dreams=12, context=3, temperature=1e-3)
    for method, count, length, k, logits in (
            ("draw_sequences", "trained", 5, 4, -counts["trained"]),
            ("draw_contexts", "dreamt", 3, 12, counts["trained"] - counts["dreamt"] / 3)):
        got = student.probe("draw_rows", method=method, size=size, settings=settings, **counts)
        rows, call = got["rows"], f"Replay.{method}()"
        require(isinstance(rows, np.ndarray), f"{call} gave {typed(rows)}, expected the rows")
        require(rows.shape == (k, length), f"{call} has shape {rows.shape}, expected {(k, length)}")
        starts, top = rows[:, 0].astype(int), np.argsort(-logits[:size - length + 1])[:k]
        require({*starts} == {*top}, f"{call} drew the starts {sorted({*starts} - {*top})}, "
                f"expected {sorted({*top} - {*starts})}: the logits of which counts? Which s?")
        for name, before in counts.items():
            after = before + np.isin(np.arange(n), starts) * (name == count)
            expect(f"{call}: self.{name}", got[name], after, ["row"], {
                "only a window's START is counted": before + np.isin(np.arange(n), rows),
                "the starts are counted": before})


# ---- tasks 6 to 8: the state space model --------------------------------------------------------


def tokens(rng, b=2, l=11, h=5, p=3, n=4):
    """x, dt, A, B, C and a state, of sizes that all differ."""
    return (rng.normal(size=(b, l, h, p)), rng.uniform(0.1, 1, (b, l, h)), -rng.uniform(0.5, 2, h),
            rng.normal(size=(b, l, n)), rng.normal(size=(b, l, n)), rng.normal(size=(b, h, p, n)))


def untouched(call, before, after, name="the state"):
    """Failed where an argument was changed in place."""
    require(np.allclose(before, after, atol=1e-6),
            f"{call} changed {name}, which it was given, in place: return a new one")


def pair(call, got):
    """Failed unless (y, state)."""
    require(isinstance(got, list) and len(got) == 2, f"{call} gave {typed(got)}, expected the pair "
                                                     "(y, state)")
    return got


def recurrent_step(student, rng):
    """Task 6."""
    faults = {
        "the decay is exp(dt A): is dt there?": "no dt",
        "the decay is exp(dt A), below 1: the sign": "sign",
        "what is written is dt x B^T: is dt there?": "no input dt",
        "is the old state multiplied by exp(dt A)?": "no decay",
        "y reads the NEW state": "old state"}

    def compare(call, *args):
        got = student.probe("call", name="ssd_step", args=list(args))
        y, state = pair(call, got["out"])
        want = step(*args)
        wrong = {hint: step(*args, fault) for hint, fault in faults.items()}
        expect(f"{call}, state,", state, want[1], ("b", "h", "p", "n"),
               {hint: w[1] for hint, w in wrong.items()})
        expect(f"{call}, y,", y, want[0], ("b", "h", "p"),
               {hint: w[0] for hint, w in wrong.items()})
        untouched(call, args[-1], got["args"][-1])

    one = np.ones
    compare("ssd_step(x 3, dt 2, A -ln 2, B 1, C 1, state 16)", 3 * one((1, 1, 1)), 2 * one((1, 1)),
            np.array([-np.log(2)]), one((1, 1)), one((1, 1)), 16 * one((1, 1, 1, 1)))
    x, dt, A, B, C, state = tokens(rng)
    compare("ssd_step(b 2, h 5, p 3, n 4)", x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], state)
    grad = student.gradient("ssd_step", x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], state,
                            weight=one((2, 5, 3)), wrt=5)
    require(moves(grad), "ssd_step: no gradient comes back to the state: is it detached?")


def chunked_scan(student, rng):
    """Task 7."""
    faults = {"is the state carried from chunk to chunk?": "no carry",
              "is the state that comes in used?": "no state"}

    def compare(call, args, q, state):
        got = student.probe("call", name="ssd_scan", args=[*args, q, state])
        y, last = pair(call, got["out"])
        want = scan(*args, state, None)
        wrong = {hint: scan(*args, state, None, q, fault) for hint, fault in faults.items()}
        expect(f"{call}, y,", y, want[0], "bthp", {hint: w[0] for hint, w in wrong.items()})
        expect(f"{call}, last state,", last, want[1], "bhpn",
               {hint: w[1] for hint, w in wrong.items()})
        if state is not None:
            untouched(call, state, got["args"][-1])

    one = np.ones
    by_hand = (one((1, 4, 1, 1)), one((1, 4, 1)), np.array([-np.log(2)]), one((1, 4, 1)),
               one((1, 4, 1)))
    for q in (4, 2):  # y = 1, 1.5, 1.75, 1.875
        compare(f"ssd_scan(x, dt, B, C 1, A -ln 2, 4 tokens, chunks of {q})", by_hand, q, None)
    *args, state = tokens(rng)
    for q in (11, 4, 1, 64):
        compare(f"ssd_scan(11 tokens, chunks of {q})", args, q, None)
        compare(f"ssd_scan(11 tokens, chunks of {q}, a state)", args, q, state)
    steep = [args[0], 60 * args[1], *args[2:]]
    got = student.call("ssd_scan", *steep, 11)
    require(np.isfinite(got[0]).all(), "ssd_scan with dt A near -100 gave a number that is not "
            "finite: mask BEFORE exp, as exp of a positive exponent overflows")
    grad = student.gradient("ssd_scan", *steep, 11, weight=one(steep[0].shape), wrt=1)
    require(grad is not None and np.isfinite(grad).all(), "ssd_scan with dt A near -100: the "
            "gradient by dt is not finite: mask BEFORE exp, as exp overflows")
    long = tokens(rng, l=512)[:5]
    got = student.probe("cost", name="ssd_scan", args=[*long, 32])
    require(got["operations"] < 512, f"ssd_scan(512 tokens, chunks of 32) took {got['operations']} "
            "operations of PyTorch, expected fewer than 512: a loop over tokens? Loop over chunks")
    full = 2 * 5 * 512 * 512
    require(got["largest"] < full / 2, f"ssd_scan(512 tokens, chunks of 32) made a tensor of "
            f"{got['largest']:,} numbers, expected fewer than {full // 2:,}: a matrix of q x q in "
            "each chunk, not of l x l")


def scan_with_resets(student, rng):
    """Task 8."""
    faults = {
        "a reset clears the state: is `first` used?": "ignored",
        "the state is cleared BEFORE the token with first, not after it": "late",
        "is the state at a chunk's start read past a reset inside the chunk?": "leak",
        "does the state pass through a chunk that has a reset?": "through"}
    x, dt, A, B, C, state = tokens(rng)
    for q, where in ((4, (6,)), (4, (4,)), (4, (3,)), (11, (5, 8)), (3, (0, 7)), (1, (2,))):
        first = np.zeros((2, 11), bool)
        first[0, list(where)] = True
        call = f"ssd_scan(11 tokens, chunks of {q}, a state, first at t={list(where)} of b=0)"
        got = student.call("ssd_scan", x, dt, A, B, C, q, state, first)
        y, last = pair(call, got)
        want = scan(x, dt, A, B, C, state, first)
        wrong = {h: scan(x, dt, A, B, C, state, first, q, fault) for h, fault in faults.items()}
        expect(f"{call}, y,", y, want[0], "bthp", {hint: w[0] for hint, w in wrong.items()})
        expect(f"{call}, last state,", last, want[1], "bhpn",
               {hint: w[1] for hint, w in wrong.items()})


# ---- tasks 9 to 11: dreaming and acting ---------------------------------------------------------


def numbers(rng, sharp=1e5):
    """A small world: K x C latents, 4 actions; with sharp logits every draw is its argmax."""
    K, C, actions, d, bins = 3, 5, 4, 6, 7
    return dict(K=K, C=C, keep=0.7, limit=2.0, W=rng.normal(size=(K * C, d)),
                V=rng.normal(size=(actions, d)), prior=sharp * rng.normal(size=(d, K * C)),
                reward=rng.normal(size=(d, bins)), end=rng.normal(size=(d, 1)),
                actor=sharp * rng.normal(size=(K * C + d, actions)))


def one_hot(classes, C):
    """(..., K) -> flat (..., K*C)."""
    return np.eye(C)[classes].reshape(*classes.shape[:-1], -1)


def choose(logits):
    """The likeliest, and by how much: the draw is sure where that is large."""
    top = np.sort(logits, -1)
    return logits.argmax(-1), (top[..., -1] - top[..., -2]).min()


def dreams(n, z, action, first, horizon, fault=""):
    """A dream of the small world, step by step -> its parts, and how sure its draws are."""
    state, b = np.zeros((len(z), n["W"].shape[1])), len(z)
    for t in range(z.shape[1] - (fault != "last action")):
        state = n["keep"] * state * ~first[:, t, None] + z[:, t] @ n["W"] + n["V"][action[:, t]]
    opens = first[:, -1:]
    d = state if fault == "d" else state * ~opens
    state = state if fault == "state" else state * ~opens
    z, features, actions, ds, gaps = z[:, -1], [], [], [], []
    for _ in range(horizon):
        features.append(np.concatenate([z, d], -1))
        a, gap = choose(features[-1] @ n["actor"])
        actions.append(a)
        state = d = n["keep"] * state + z @ n["W"] + n["V"][a]
        ds.append(d)
        classes, gap_z = choose((d @ n["prior"]).reshape(b, n["K"], n["C"]))
        z = one_hot(classes, n["C"])
        gaps += [gap, gap_z]
    features.append(np.concatenate([z, d], -1))
    d = np.stack(ds, 1)
    reward, end = two_hot_mean(d @ n["reward"], n["limit"]), (d @ n["end"])[..., 0]
    parts = dict(feature=np.stack(features, 1), action=np.stack(actions, 1),
                 reward=two_hot_mean(features_d(features, n) @ n["reward"], n["limit"])
                 if fault == "shift" else reward, end=end if fault == "logit" else
                 1 / (1 + np.exp(-end)))
    return parts, min(gaps)


def features_d(features, n):
    """d_{t-1} of the features before the last."""
    return np.stack(features[:-1], 1)[..., n["K"] * n["C"]:]


def imagination(student, rng):
    """Task 9."""
    sure, horizon, b, k = 0, 4, 3, 5
    while sure < 50:  # nats: else a draw might take the second best
        n = numbers(rng)
        z = one_hot(rng.integers(0, n["C"], (b, k, n["K"])), n["C"])
        action = rng.integers(0, 4, (b, k))
        first = np.zeros((b, k), bool)
        first[0, -1] = first[1, 2] = True
        want, sure = dreams(n, z, action, first, horizon)
    call = f"imagine(3 contexts of 5 frames, horizon {horizon})"
    got = student.probe("dream", n=n, z=z, action=action, first=first, horizon=horizon)
    require("reward" in got["dream"], f"{call} gave {typed(got['dream'])}, expected a Dream")
    faults = {
        "the last frame's recorded action is not used": "last action",
        "d is zero where the last frame opens an episode (b=0 here)": "d",
        "the states are cleared where the last frame opens an episode (b=0 here)": "state",
        "reward and end are read off the d that FOLLOWS the action": "shift",
        "end is a probability: is the sigmoid there?": "logit"}
    wrong = {hint: dreams(n, z, action, first, horizon, f)[0] for hint, f in faults.items()}
    for name, axes in (("feature", ("b", "t", "i")), ("action", "bt"), ("reward", "bt"),
                       ("end", "bt")):
        about = " ([z, d], d from i=15 on)" if name == "feature" else ""
        expect(f"{call}: {name}{about}", got["dream"][name], want[name], axes,
               {hint: w[name] for hint, w in wrong.items()}, tolerance=1e-3)
    require(not got["grads"], f"{call}: {' and '.join(got['grads'])} carry a gradient: dreams are "
                              "made under torch.no_grad()")
    n["actor"], n["prior"], b = 0 * n["actor"], 0 * n["prior"], 800
    got = student.probe("dream", n=n, z=np.repeat(z[:1], b, 0), action=np.repeat(action[:1], b, 0),
                        first=np.zeros((b, k), bool), horizon=1)["dream"]
    drawn("imagine with a policy that does not care", np.bincount(got["action"][:, 0].astype(int),
          minlength=4), np.full(4, 0.25), "an action is drawn, it is not the likeliest")
    latent = got["feature"][:, 1, :n["C"]].sum(0)
    drawn("imagine with a prior that knows nothing, first categorical,", latent,
          np.full(n["C"], 1 / n["C"]), "z is drawn, it is not the likeliest")


def agent_numbers(n, feature, action, reward, end, scale, cfg, fault=""):
    """The actor-critic's losses and metrics in NumPy, right or with a fault."""
    logits = feature @ n["critic"]
    V, slow = (two_hot_mean(feature @ n[net], n["limit"]) for net in ("critic", "slow_critic"))
    R = returns(reward, end, V, cfg["gamma"], cfg["lam"])
    low, high = np.quantile(R, [0.05, 0.95])
    new = scale + (1 - cfg["return_decay"]) * (high - low - scale)
    new = high - low if fault == "no ema" else new
    base = {"no baseline": 0, "next": V[:, 1:]}.get(fault, V[:, :-1])
    advantage = (R - base) / (new if fault == "no floor" else max(cfg["return_floor"], new))
    advantage = R - base if fault == "no scale" else advantage
    alive = np.ones_like(end)
    alive[:, 1:] = np.cumprod(1 - end, 1)[:, :-1]
    alive = {"alive": np.ones_like(end), "late": np.cumprod(1 - end, 1),
             "one end": np.concatenate([alive[:, :1], 1 - end[:, :-1]], 1)}.get(fault, alive)
    log_pi = log_softmax(feature[:, :-1] @ n["actor"])
    taken = np.take_along_axis(log_pi, action[..., None], -1)[..., 0]
    entropy = -(np.exp(log_pi) * log_pi).sum(-1)
    entropy = {"base 2": entropy / np.log(2), "mean": entropy / log_pi.shape[-1]}.get(
        fault, entropy)

    def two_hot_loss(y):
        return -(two_hot(y, logits.shape[-1], n["limit"]) * log_softmax(logits[:, :-1])).sum(-1)

    losses = dict(policy=-taken * advantage * alive, entropy=-entropy * alive,
                  value=two_hot_loss(symlog(R)) * alive,
                  slow_value=two_hot_loss(symlog(R if fault == "slow" else slow[:, :-1])) * alive)
    if fault == "sign":
        losses = {name: -x if name in ("policy", "entropy") else x for name, x in losses.items()}
    return losses, dict(imagined_return=R.mean(), imagined_reward=reward.mean(),
                        imagined_value=V.mean(), imagined_end=end.mean(), return_scale=new,
                        policy_entropy=entropy.mean())


def actor_critic_losses(student, rng):
    """Task 10."""
    n, b, h = numbers(rng, sharp=1.0), 3, 6
    width = len(n["actor"])
    n["critic"], n["slow_critic"] = 0.5 * rng.normal(size=(2, width, 7))
    feature, action = rng.normal(size=(b, h + 1, width)), rng.integers(0, 4, (b, h))
    reward, end = 3 * rng.normal(size=(b, h)), rng.uniform(0.1, 0.6, (b, h))
    cfg = dict(gamma=0.9, lam=0.8, return_decay=0.75, return_floor=0.5)
    faults = {
        "the advantage is R - V: is the baseline taken off?": "no baseline",
        "the baseline is V_t, of the state that was acted in": "next",
        "the advantage is divided by max(return_floor, scale)": "no scale",
        "the scale counts as return_floor at least": "no floor",
        "the scale moves by 1 - return_decay to the range, not at once": "no ema",
        "each step counts by the chance to be alive: is `alive` there?": "alive",
        "alive is the product of (1 - e) BEFORE the step, the first is 1": "late",
        "alive is a product over all ends before": "one end",
        "the logarithm is the natural one, not base 2": "base 2",
        "the entropy is summed over the actions, not averaged": "mean",
        "the slow critic's own mean is the target": "slow",
        "a loss is MINUS what shall grow": "sign"}
    for scale in (4.0, 0.1):
        args = feature, action, reward * (1 if scale > 1 else 0.01), end, scale
        got = student.probe("agent_losses", n=n, feature=args[0], action=action, reward=args[2],
                            end=end, scale=scale, settings=cfg)
        require(isinstance(got["losses"], dict) and isinstance(got["metrics"], dict),
                f"ActorCritic.loss gave {typed(got['losses'])} and {typed(got['metrics'])}, "
                "expected two dicts: losses, metrics")
        losses, metrics = agent_numbers(n, *args, cfg)
        wrong = {hint: agent_numbers(n, *args, cfg, fault) for hint, fault in faults.items()}
        require(set(got["losses"]) == set(losses), f"ActorCritic.loss has losses "
                f"{', '.join(got['losses'])}, expected {', '.join(losses)}")
        for name in losses:
            expect(f"ActorCritic.loss, losses['{name}'] (scale was {scale:g}),",
                   got["losses"][name], losses[name], ("b", "t"),
                   {hint: w[0][name] for hint, w in wrong.items()}, tolerance=1e-3)
        for name, want in metrics.items():
            expect(f"ActorCritic.loss, metrics['{name}'],", got["metrics"].get(name), want, (),
                   {hint: w[1][name] for hint, w in wrong.items()}, tolerance=1e-3)
        expect("ActorCritic.loss: self.scale after it", got["scale"], metrics["return_scale"],
               tolerance=1e-3)
    who = dict(policy="actor", entropy="actor", value="critic", slow_value="critic")
    for name, learns in who.items():
        for net in ("actor", "critic", "slow_critic"):
            moved = moves(got["moved"][f"{name} {net}"])
            require(moved or net != learns, f"{name} does not move the {net}: what is detached "
                                            "that should not be?")
            require(net == learns or not moved, f"{name} moves the {net}, which must stand still: "
                                                "what is to be detached?")


def play(n, z, first, fault=""):
    """Acting in the small world: z (t, b, K*C), first (t, b) -> features, actions, sureness."""
    state = d = np.zeros((z.shape[1], n["W"].shape[1]))
    features, actions, gaps = [], [], []
    for t in range(len(z)):
        keep = ~first[t][:, None]
        seen = {"d": d, "blind": d * 0}.get(fault, d * keep)
        features.append(np.concatenate([z[t], seen], -1))
        a, gap = choose(features[-1] @ n["actor"])
        state = state if fault == "state" else state * keep
        state = d = n["keep"] * state + z[t] @ n["W"] + n["V"][a]
        actions.append(a)
        gaps.append(gap)
    return np.stack(features), np.stack(actions), min(gaps)


def acting(student, rng):
    """Task 11."""
    sure, t, b = 0, 5, 2
    while sure < 50:
        n = numbers(rng)
        classes = rng.integers(0, n["C"], (t, b, n["K"]))
        first = np.zeros((t, b), bool)
        first[0] = first[3, 1] = True
        features, actions, sure = play(n, one_hot(classes, n["C"]), first)
    log_post = np.where(np.eye(n["C"], dtype=bool)[classes], 0.0, -100.0)
    got = student.probe("act", n=n, log_post=log_post, first=first, at_random=False)
    faults = {"d_{t-1} is zero where an episode opens (t=3, b=1 here)": "d",
              "the states are cleared where an episode opens (t=3, b=1 here)": "state",
              "d_{t-1} is carried on from step to step": "blind"}
    wrong = {hint: play(n, one_hot(classes, n["C"]), first, f) for hint, f in faults.items()}
    for i, pair_ in enumerate(got["out"]):
        require(len(pair_) == 2 and all(isinstance(x, np.ndarray) for x in pair_),
                f"Player.act, call {i}, gave {[typed(x) for x in pair_]}, expected the pair "
                "(action, latent classes)")
    require(len(got["seen"]) == t, f"Player.act asked the actor {len(got['seen'])} times in {t} "
                                   "frames, expected once a frame")
    expect("Player.act: what the actor read, [z, d], d from i=15 on,", np.stack(got["seen"]),
           features, ("t", "b", "i"), {h: w[0] for h, w in wrong.items()}, tolerance=1e-3)
    expect("Player.act: action", np.stack([out[0] for out in got["out"]]), actions, ("t", "b"))
    expect("Player.act: latent classes", np.stack([out[1] for out in got["out"]]), classes,
           ("t", "b", "k"))
    b = 800
    for at_random, about in ((True, "at_random: every action is as likely as any other"),
                             (False, "an action is drawn, it is not the likeliest")):
        n["actor"] = n["actor"] if at_random else 0 * n["actor"]
        got = student.probe("act", n=n, log_post=np.repeat(log_post[:1, :1], b, 1),
                            first=np.ones((1, b), bool), at_random=at_random)
        drawn(f"Player.act(at_random={at_random})", np.bincount(
            got["out"][0][0].astype(int), minlength=4), np.full(4, 0.25), about)
    got = student.probe("act", n=n, log_post=np.full((1, b, n["K"], n["C"]), -np.log(n["C"])),
                        first=np.ones((1, b), bool), at_random=False)
    drawn("Player.act, frames that tell nothing, first categorical,", np.bincount(
        got["out"][0][1][:, 0].astype(int), minlength=n["C"]), np.full(n["C"], 1 / n["C"]),
        "z is drawn, it is not the likeliest")


CHECKS = {1: symlog_and_two_hot, 2: straight_through_and_unimix, 3: kl_and_its_stops,
          4: lambda_return, 5: dfs, 6: recurrent_step, 7: chunked_scan, 8: scan_with_resets,
          9: imagination, 10: actor_critic_losses, 11: acting}
