"""The scan against the SSD paper's listing [arXiv 2405.21060, listing 1] and torch.compile.

    python experiments/scan_speed.py [--compile]

Forward and backward in float32, 16 heads of 64, state 16, chunks of 32 unless said: medians, the
sides taking turns. Then time and peak memory a token of the scan up to 65,536 tokens. --compile
adds torch.compile's code, but for the longest sequence, whose 512 chunks take it many minutes; on
CPUs it was seen to crash, so drama.py does not use it there.
"""

import argparse
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import drama  # noqa: E402
import mamba2_ref  # noqa: E402

HEADS, P, N, CHUNK = 16, 64, 16, 32


def segment_sums(a):
    """(..., q) -> (..., q, q): the sum of a over (j, i] at [i, j], -inf above the diagonal."""
    total = a.cumsum(-1)
    q = a.shape[-1]
    below = torch.ones(q, q, dtype=torch.bool, device=a.device).tril()
    return (total[..., :, None] - total[..., None, :]).masked_fill(~below, -torch.inf)


def listing(x, dt, A, B, C, chunk_size):
    """The paper's four einsums, B and C a copy a head, all pairs of chunks in one matrix."""
    b, l, h, p = x.shape
    c = l // chunk_size
    x = (x * dt[..., None]).view(b, c, chunk_size, h, p)
    B, C = (t[:, :, None].expand(b, l, h, N).reshape(b, c, chunk_size, h, N) for t in (B, C))
    a = (dt * A).view(b, c, chunk_size, h).permute(0, 3, 1, 2)  # (b,h,c,q)
    total = a.cumsum(-1)
    inside = torch.einsum("bcihn,bcjhn,bhcij,bcjhp->bcihp", C, B, segment_sums(a).exp(), x)
    to_end = (total[..., -1:] - total).exp()
    ends = torch.einsum("bcjhn,bhcj,bcjhp->bchpn", B, to_end, x)
    ends = torch.cat([torch.zeros_like(ends[:, :1]), ends], 1)
    between = segment_sums(F.pad(total[..., -1], (1, 0))).exp()
    starts = torch.einsum("bhzc,bchpn->bzhpn", between, ends)[:, :-1]
    across = torch.einsum("bcihn,bchpn,bhci->bcihp", C, starts, total.exp())
    return (inside + across).reshape(b, l, h, p)


def inputs(b, l):
    """Random inputs of the scan, with decays as a fresh layer has them."""
    torch.manual_seed(0)
    x, B, C = torch.randn(b, l, HEADS, P), torch.randn(b, l, N), torch.randn(b, l, N)
    dt, A = F.softplus(torch.randn(b, l, HEADS) - 4), -torch.empty(HEADS).uniform_(1, 16)
    return [t.requires_grad_() for t in (x, dt, A, B, C)]


def seconds(scan, tensors) -> float:
    """One forward and backward, from a gradient that is given: no loss is timed with it."""
    gradient = torch.ones_like(tensors[0])
    start = time.perf_counter()
    torch.autograd.grad(scan(*tensors), tensors, gradient)
    return time.perf_counter() - start


def ours(*tensors):
    """The scan of drama.py without its last state."""
    return drama.ssd_scan(*tensors, CHUNK)[0]


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    drama.keep_freed_pages()
    sides = {"drama.py": ours}
    for q in (CHUNK, 64):
        sides[f"listing, chunks of {q}"] = lambda *t, q=q: listing(*t, q)
    if args.compile:
        sides["drama.py, compiled"] = torch.compile(ours, dynamic=False)
    print(f"{torch.get_num_threads()} threads; microseconds a token, forward and backward")
    print(f"{'sequences x tokens':<20}" + "".join(f"{name:>24}" for name in sides))
    for b, l in ((16, 128), (1, 1024), (1, 16384)):
        if l > 10_000:
            sides.pop("drama.py, compiled", None)
        tensors, spent = inputs(b, l), {name: [] for name in sides}
        for scan in sides.values():
            torch.testing.assert_close(scan(*tensors), ours(*tensors), rtol=1e-3, atol=1e-3)
            seconds(scan, tensors)
        for _ in range(7 if l < 10_000 else 3):
            for name, scan in sides.items():
                spent[name].append(seconds(scan, tensors))
        print(f"{f'{b} x {l:,}':<20}" + "".join(
            f"{1e6 * statistics.median(s) / b / l:>24.1f}" for s in spent.values()), flush=True)
    print("\none sequence of      us a token    KiB a token (peak, inputs not counted)")
    for l in (1024, 4096, 16384, 65536):
        spent, peak = mamba2_ref.cost(partial(drama.ssd_scan, chunk_size=CHUNK), l)
        print(f"{l:>8,} tokens{1e6 * spent / l:>17.1f}{peak / 1024 / l:>15.1f}", flush=True)


if __name__ == "__main__":
    main()
