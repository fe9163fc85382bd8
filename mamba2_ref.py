"""The slow oracle for the Mamba-2 scan: two plain ways to compute what `ssd_scan` computes fast.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T        y_t = h_t C_t        [2]

`ssd_recurrent` is that line in a loop over t; `ssd_matrix` is the same map as a lower-triangular
matrix, y = M x. Both are float64 and differentiable, and share no code with drama.py.

    python mamba2_ref.py      check ssd_scan and ssd_step against both, then time them: a minute

It exits with 1 where a float64 error passes 1e-10 or a float32 number is not finite. Left out:
anything fast, and the D skip, convolution, gate and norm, which belong to the Mamba2 block.

Sizes: b batch, l length, h heads, p head width, n state width.
[2] Dao & Gu 2024, arXiv 2405.21060
"""

import itertools
import os
import sys
import time
from functools import partial

import torch

TOLERANCE = 1e-10  # of float64; float32 is only shown, but must be finite
LENGTHS = (1, 2, 11, 32, 50)
CHUNKS = (1, 4, 16, 64)
RESETS = ("none", "random", "before edge", "on edge", "after edge")
SIZES = {"b": 2, "h": 3, "p": 5, "n": 7}
COLUMNS = ("y", "state", "dx", "ddt", "dA", "dB", "dC", "dstate")

TIMED_LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)
TIMED_SIZES = {"b": 1, "h": 16, "p": 64, "n": 16}
TIMED_CHUNK, TIMED_REPEATS = 64, 3
LONGEST_LOOP = 2048  # beyond it the loop over t would take most of the program's time


def ssd_recurrent(x, dt, A, B, C, state=None, first=None):
    """One token after another: h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T, y_t = h_t C_t.

    x (b,l,h,p); dt (b,l,h) > 0; A (h,) < 0; B, C (b,l,n), shared by the heads; state (b,h,p,n),
    zeros if None; first (b,l) bool: the state is cleared BEFORE that token. Whatever comes in, it
    returns float64: y (b,l,h,p) and the state after the last token (b,h,p,n). Source: [2].

    With one head, p = n = 1, x = B = C = dt = 1 and A = log(1/2), y is 1, 1.5, 1.75, ...
    """
    x, dt, A, B, C = (v.double() for v in (x, dt, A, B, C))
    b, _, h, p = x.shape
    state = x.new_zeros(b, h, p, B.shape[-1]) if state is None else state.double()
    first = torch.zeros_like(dt[..., 0]).bool() if first is None else first
    # unbind, not x[:, t]: the gradient of each x[:, t] is as large as x; the loop would cost l^2
    ys, tokens = [], (v.unbind(1) for v in (x, dt, B, C, first))
    for x_t, dt_t, B_t, C_t, first_t in zip(*tokens, strict=True):
        state = state.masked_fill(first_t[:, None, None, None], 0)
        decay = torch.exp(dt_t * A)[..., None, None]  # (b, h, 1, 1)
        inflow = (dt_t[..., None] * x_t)[..., None] * B_t[:, None, None]
        state = decay * state + inflow  # (b, h, p, n)
        ys.append((state * C_t[:, None, None]).sum(-1))  # (b, h, p)
    return torch.stack(ys, 1), state


def ssd_matrix(x, dt, A, B, C, state=None, first=None):
    """The same map as one l x l lower triangle a head, y = M x, plus what is left of `state`.

    M[t,s] = C_t^T B_s L[t,s] dt_s   L[t,s] = a_{s+1} ... a_t for s <= t, else 0   a_r = exp(dt_r A)

    A reset at r is a_r = 0: each product that crosses r is then exactly 0. Column s = -1 of L is
    what multiplies `state`. Arguments and return values are those of ssd_recurrent. Source: [2].
    """
    x, dt, A, B, C = (v.double() for v in (x, dt, A, B, C))
    b, l, h, p = x.shape
    state = x.new_zeros(b, h, p, B.shape[-1]) if state is None else state.double()
    a = torch.exp(dt * A)  # (b, l, h)
    if first is not None:
        a = a.masked_fill(first[..., None], 0)
    t = torch.arange(l, device=x.device)[:, None, None]  # (l, 1, 1)
    s = torch.arange(-1, l, device=x.device)  # (l+1,)
    # the product down column s starts below row s: what lies at or above it counts as 1
    L = torch.where(t > s, a[..., None], 1).cumprod(1) * (t >= s)  # (b, t, h, s)
    L_state, L = L[..., 0], L[..., 1:]  # (b, t, h), (b, t, h, s)
    M = torch.einsum("btn,bsn,bths,bsh->bths", C, B, L, dt)
    y = torch.einsum("bths,bshp->bthp", M, x)
    y = y + torch.einsum("btn,bhpn,bth->bthp", C, state, L_state)
    inflow = torch.einsum("bhs,bsh,bshp,bsn->bhpn", L[:, -1], dt, x, B)
    return y, L_state[:, -1, :, None, None] * state + inflow


def repeat_step(step, x, dt, A, B, C, state=None, first=None):
    """Run `step` (ssd_step) along a sequence: ssd_recurrent's shapes, the inputs' own type."""
    b, _, h, p = x.shape
    state = x.new_zeros(b, h, p, B.shape[-1]) if state is None else state
    first = torch.zeros_like(dt[..., 0]).bool() if first is None else first
    ys, tokens = [], (v.unbind(1) for v in (x, dt, B, C, first))
    for x_t, dt_t, B_t, C_t, first_t in zip(*tokens, strict=True):
        state = state.masked_fill(first_t[:, None, None, None], 0)
        y_t, state = step(x_t, dt_t, A, B_t, C_t, state)
        ys.append(y_t)
    return torch.stack(ys, 1), state


def make_inputs(b, l, h, p, n, with_state):
    """Random inputs by ssd_recurrent's names; float32, so that float64 sees the very same numbers.

    dt is log-uniform in [0.001, 4] and -A in [1/16, 16]: decays from nearly 1 to exp(-64) a token.
    """
    low, high = torch.tensor([0.001, 4.0]).log()
    inputs = {
        "x": torch.randn(b, l, h, p),
        "dt": (low + (high - low) * torch.rand(b, l, h)).exp(),
        "A": -(16 ** (2 * torch.rand(h) - 1)),
        "B": torch.randn(b, l, n),
        "C": torch.randn(b, l, n),
    }
    return inputs | {"state": torch.randn(b, h, p, n)} if with_state else inputs


def make_first(kind, b, l, chunk):
    """Resets (b,l): a fifth of the tokens, or half of those before, on or after a chunk's edge."""
    if kind == "none":
        return None
    if kind == "random":
        return torch.rand(b, l) < 0.2
    offset = {"before edge": -1, "on edge": 0, "after edge": 1}[kind]
    return ((torch.arange(l) - offset) % chunk == 0) & (torch.rand(b, l) < 0.5)


def values_and_gradients(function, inputs, first, weight_y, weight_state, dtype):
    """Outputs of `function` and gradients of their weighted sum, as a dict by column name."""
    leaves = {name: v.to(dtype, copy=True).requires_grad_() for name, v in inputs.items()}
    y, state = function(**leaves, first=first)
    loss = (y * weight_y.to(dtype)).sum() + (state * weight_state.to(dtype)).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {"y": y, "state": state} | dict(zip((f"d{k}" for k in leaves), gradients, strict=True))


def error(got, want):
    """Largest error, relative to the largest entry of `want` if that passes 1; NaN is infinite."""
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, not {tuple(want.shape)}"
    relative = (got.double() - want).abs().amax() / want.abs().amax().clamp(min=1)
    return relative.nan_to_num(nan=torch.inf).item()


def check(scan, step):
    """Compare every path with ssd_recurrent over the grid, print the table; True if all is well."""
    runs = {(path, torch.float64): {} for path in ("matrix", "scan", "steps")}
    runs |= {(path, torch.float32): {} for path in ("scan", "steps")}
    grid = list(itertools.product(LENGTHS, CHUNKS, RESETS, (False, True)))
    for l, chunk, resets, with_state in grid:
        inputs = make_inputs(l=l, with_state=with_state, **SIZES)
        first = make_first(resets, SIZES["b"], l, chunk)
        weights = torch.randn_like(inputs["x"]), torch.randn([SIZES[k] for k in "bhpn"])
        case = f"l {l}, chunk {chunk}, state {'given' if with_state else 'none'}, resets {resets}"
        functions = {"matrix": ssd_matrix, "steps": partial(repeat_step, step)}
        functions["scan"] = partial(scan, chunk_size=chunk)
        want = values_and_gradients(ssd_recurrent, inputs, first, *weights, torch.float64)
        for (path, dtype), worst in runs.items():
            got = values_and_gradients(functions[path], inputs, first, *weights, dtype)
            for k in want:
                worst[k] = max(worst.get(k, (0, "")), (error(got[k], want[k]), case))

    print(f"Largest error against the recurrence in float64, over {len(grid)} cases")
    print("(relative to a tensor's largest entry where that passes 1; dx: gradient by x)\n")
    print("path    type    " + "".join(f"{k:>9}" for k in COLUMNS) + "  worst case")
    for (path, dtype), worst in runs.items():
        cells = "".join(f"{worst[k][0]:9.1e}" for k in COLUMNS)
        print(f"{path:8}{str(dtype).split('.')[1]:8}{cells}  {max(worst.values())[1]}")
    limits = {torch.float64: TOLERANCE, torch.float32: sys.float_info.max}
    ok = all(e <= limits[dtype] for (_, dtype), w in runs.items() for e, _ in w.values())
    print(f"\nfloat64 within {TOLERANCE:.0e} and float32 finite: {'yes' if ok else 'NO'}")
    return ok


def cost(function, l):
    """Seconds and peak bytes, inputs not counted, of one float32 forward and backward."""
    inputs = make_inputs(l=l, with_state=True, **TIMED_SIZES)
    leaves = [v.requires_grad_() for v in inputs.values()]

    def forward_backward():
        """What is timed."""
        y, state = function(**inputs)
        torch.autograd.grad(y.sum() + state.sum(), leaves)

    seconds = []
    for _ in range(TIMED_REPEATS):
        start = time.perf_counter()
        forward_backward()
        seconds.append(time.perf_counter() - start)
    # the profiler sees each of PyTorch's own allocations, on every system; not the BLAS's scratch
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        forward_backward()
    events = (e for e in profile.kineto_results.events() if e.name() == "[memory]")
    held = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return min(seconds), max(held)


def measure(scan, step):
    """Time the scan and the loop at growing lengths and print cost a token: level means linear."""
    sizes = ", ".join(f"{k} {v}" for k, v in TIMED_SIZES.items())
    print(f"\nForward and backward in float32 on the CPU, {torch.get_num_threads()} thread(s)")
    print(f"({sizes}, chunk {TIMED_CHUNK}; memory is the peak, inputs not counted)\n")
    print("tokens  scan: us/token  KiB/token  loop: us/token  KiB/token")
    for l in TIMED_LENGTHS:
        functions = [partial(scan, chunk_size=TIMED_CHUNK)]
        if l <= LONGEST_LOOP:
            functions.append(partial(repeat_step, step))
        costs = [cost(function, l) for function in functions]
        cells = [f"{seconds * 1e6 / l:16.1f}{held / 1024 / l:11.1f}" for seconds, held in costs]
        print(f"{l:6}" + "".join(cells) + (f"{'-':>16}{'-':>11}" if l > LONGEST_LOOP else ""))
    print(f"\nloop: ssd_step, token by token; too slow to run past {LONGEST_LOOP} tokens")


def main():
    """Check, then measure; exit code 1 where the scan is wrong."""
    # here, not at the top: whoever imports the oracle must not depend on what it judges
    from drama import ssd_scan, ssd_step

    # without it the profiler writes its own messages between the lines of the table
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    torch.manual_seed(0)
    ok = check(ssd_scan, ssd_step)
    measure(ssd_scan, ssd_step)
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
