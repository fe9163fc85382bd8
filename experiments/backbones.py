"""Drama with another layer in Mamba-2's place: the same agent, the same loop, the same flags.

    python experiments/backbones.py --backbone mamba --game GridWorld --seed 0
    python experiments/backbones.py --backbone gru --game Boxing --eval 20

mamba2 is drama.py itself; mamba is the selective scan of [3]; gru is a GRU with a linear output;
transformer is causal attention with rotary positions [7] and a key-value cache, then an MLP. Its
window is batch_length tokens, the longest past that training shows it. A layer gets the width at
which its parameters come nearest to Mamba-2's; all four counts are printed. Checkpoints and tables
are drama.py's, in runs/<game>-<seed>-<backbone>; their seconds are core-seconds, of this process
alone, so that runs beside other jobs can be compared.

A layer has the three calls of drama.Mamba2: forward(u, state, first) -> (y, state) for u
(b, l, d_model), step(u, state) for u (b, d_model), initial_state(batch). A state is a tuple of
tensors with the batch first, and zeros are its beginning, which is all that drama.clear asks.

[3] Mamba, arXiv 2312.00752. [7] RoFormer, arXiv 2104.09864.
"""

import argparse
import sys
import time
from bisect import bisect_right
from functools import partial
from math import ceil
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import drama  # noqa: E402
from drama import SequenceModel  # noqa: E402 (main puts another in drama)

# ---- the selective scan -------------------------------------------------------------------------


def pair_scan(a: Tensor, u: Tensor) -> Tensor:
    """h_t = a_t h_{t-1} + u_t from h_{-1} = 0, for a and u (b, l, …), in 2 log2(l) parallel passes.

    Two steps are one: h_{t+1} = (a_{t+1} a_t) h_{t-1} + (a_{t+1} u_t + u_{t+1}). So the odd h are a
    scan half as long, and an even h is one step from the odd one before it. Work: 2 l in all.
    """
    if u.shape[1] == 1:
        return u
    a_odd = a[:, 1::2]
    odd = pair_scan(a_odd * a[:, :-1:2], torch.addcmul(u[:, 1::2], a_odd, u[:, :-1:2]))
    h = torch.empty_like(u)
    h[:, 0], h[:, 1::2] = u[:, 0], odd
    a_even = a[:, 2::2]
    torch.addcmul(u[:, 2::2], a_even, odd[:, :a_even.shape[1]], out=h[:, 2::2])
    return h


class LinearScan(torch.autograd.Function):
    """h_t = a_t h_{t-1} + u_t from h_{-1} = start: a, u (b, l, …), start (b, …) -> h (b, l, …).

    The gradient is the same scan from the end: g_t = dL/dh_t + a_{t+1} g_{t+1}. Then dL/du_t = g_t
    and dL/da_t = g_t h_{t-1}, so a and h are all that is kept: memory is linear in l.
    """

    @staticmethod
    def forward(ctx, a, u, start):
        """The scan of a start other than zero: what it brings to h_0 joins u_0."""
        h = pair_scan(a, torch.cat([u[:, :1] + a[:, :1] * start[:, None], u[:, 1:]], 1))
        ctx.save_for_backward(a, h, start)
        return h

    @staticmethod
    def backward(ctx, grad):
        """dL/da, dL/du, dL/dstart from dL/dh."""
        a, h, start = ctx.saved_tensors
        later = torch.cat([a[:, 1:], torch.zeros_like(a[:, :1])], 1)
        g = pair_scan(later.flip(1), grad.flip(1)).flip(1)
        return g * torch.cat([start[:, None], h[:, :-1]], 1), g, a[:, 0] * g[:, 0]


def selective_scan(x, dt, A, B, C, state=None, first=None) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t, y_t = C_t . h_t, a decay a channel and state [3].

    x and dt (b,l,d), dt > 0, A (d,n) < 0, B and C (b,l,n), state (b,d,n) or None for zeros, first
    (b,l) bool or None: the state is cleared BEFORE that token. Returns y (b,l,d), without the D
    skip, and the last state. float32 at least, even under autocast.
    """
    with torch.autocast(x.device.type, enabled=False):
        x, dt, A, B, C = drama.at_least_float32(x, dt, A, B, C)
        decay = (dt[..., None] * A).exp()  # (b,l,d,n)
        if first is not None:
            decay = decay * ~first[..., None, None]
        if state is None:
            state = torch.zeros_like(decay[:, 0])
        h = LinearScan.apply(decay, (dt * x)[..., None] * B[:, :, None], state)  # (b,l,d,n)
        return (h @ C[..., None]).squeeze(-1), h[:, -1]


# ---- the layers ---------------------------------------------------------------------------------


class Layer(nn.Module):
    """What the three have in common: a step is a sequence of one token."""

    def step(self, u: Tensor, state: tuple) -> tuple[Tensor, tuple]:
        """One token: u (b, d_model) -> the same shape, and a new state."""
        y, state = self(u[:, None], state)
        return y[:, 0], state


class Mamba(Layer):
    """The Mamba layer [3], with the official names; width: d_inner."""

    def __init__(self, cfg: drama.Config, width: int):
        super().__init__()
        self.width, self.rank = width, ceil(cfg.d_model / 16)
        self.d_state, self.d_conv = cfg.d_state, cfg.d_conv
        self.in_proj = nn.Linear(cfg.d_model, 2 * width, bias=False)
        self.conv1d = nn.Conv1d(width, width, cfg.d_conv, groups=width)
        self.x_proj = nn.Linear(width, self.rank + 2 * cfg.d_state, bias=False)
        self.dt_proj = nn.Linear(self.rank, width)
        nn.init.uniform_(self.dt_proj.weight, -self.rank**-0.5, self.rank**-0.5)
        # dt = softplus(bias) starts log-uniform in [0.001, 0.1], floor 1e-4
        dt = torch.empty(width).uniform_(np.log(1e-3), np.log(1e-1)).exp().clamp(min=1e-4)
        with torch.no_grad():
            self.dt_proj.bias.copy_(dt + (-(-dt).expm1()).log())  # the inverse of softplus
        # A = -1 … -n in each channel; flat, as drama.py's weight decay reaches what has two axes
        self.A_log = nn.Parameter(torch.arange(1.0, cfg.d_state + 1).log().repeat(width))
        self.D = nn.Parameter(torch.ones(width))
        self.out_proj = nn.Linear(width, cfg.d_model, bias=False)

    def initial_state(self, batch: int) -> tuple[Tensor, Tensor]:
        """(conv window (b, d_conv-1, d_inner), memory (b, d_inner, n)), both zero."""
        new = self.D.new_zeros
        return new(batch, self.d_conv - 1, self.width), new(batch, self.width, self.d_state)

    def forward(self, u: Tensor, state=None, first=None) -> tuple[Tensor, tuple]:
        """u (b, l, d_model) -> the same shape, and the state after the last token."""
        b, l, _ = u.shape
        window, memory = state or self.initial_state(b)
        x, z = self.in_proj(u).chunk(2, -1)
        taps = torch.cat([window.to(x.dtype), x], 1)  # (b, d_conv-1+l, d_inner)
        if first is None:
            first = torch.zeros(b, l, dtype=torch.bool, device=u.device)
        segment = F.pad(first.cumsum(1), (self.d_conv - 1, 0))  # a tap counts in its own alone
        conv = self.conv1d.bias
        for k in range(self.d_conv):
            own = (segment[:, k:k + l] == segment[:, self.d_conv - 1:])[..., None]
            conv = torch.addcmul(conv, taps[:, k:k + l], own * self.conv1d.weight[:, 0, k])
        x = F.silu(conv)
        dt, B, C = self.x_proj(x).split((self.rank, self.d_state, self.d_state), -1)
        A = -self.A_log.exp().view(self.width, self.d_state)
        y, memory = selective_scan(x, F.softplus(self.dt_proj(dt)), A, B, C, memory, first)
        window = taps[:, l:] * (segment[:, l:] == segment[:, -1:])[..., None]
        return self.out_proj((y + self.D * x) * F.silu(z)), (window, memory)


class GRU(Layer):
    """PyTorch's GRU and a linear output; width: units. It goes through time token by token."""

    def __init__(self, cfg: drama.Config, width: int):
        super().__init__()
        self.gru = nn.GRU(cfg.d_model, width, batch_first=True)
        self.out_proj = nn.Linear(width, cfg.d_model, bias=False)

    def initial_state(self, batch: int) -> tuple[Tensor]:
        """(h (b, units),), zero."""
        return (self.out_proj.weight.new_zeros(batch, self.gru.hidden_size),)

    def forward(self, u: Tensor, state=None, first=None) -> tuple[Tensor, tuple]:
        """u (b, l, d_model) -> the same shape, and the state after the last token."""
        (h,), ys = state or self.initial_state(len(u)), []
        cuts = [] if first is None else first.any(0).nonzero().flatten().tolist()
        with torch.autocast(u.device.type, enabled=False):  # float32, as the others' memory
            u, h = drama.at_least_float32(u, h)
            for begin, end in zip([0, *cuts], [*cuts, u.shape[1]]):
                if begin in cuts:
                    h = h * ~first[:, begin, None]
                if begin < end:
                    y, h = self.gru(u[:, begin:end], h[None].contiguous())
                    ys.append(y)
                    h = h[0]
        return self.out_proj(torch.cat(ys, 1)), (h,)


def rotate(x: Tensor) -> Tensor:
    """x (b, l, h, p), token t turned by t: products of two then depend on their distance [7]."""
    [x], half = drama.at_least_float32(x), x.shape[-1] // 2
    speed = 1e4 ** (-torch.arange(half, device=x.device).to(x) / half)
    angle = (torch.arange(x.shape[1], device=x.device).to(x)[:, None] * speed)[:, None]  # (l,1,p/2)
    first, second = x.chunk(2, -1)
    return torch.cat([first * angle.cos() - second * angle.sin(),
                      first * angle.sin() + second * angle.cos()], -1)


class Transformer(Layer):
    """Attention, as many heads as Mamba-2 has, then an MLP; width: the units of the MLP."""

    def __init__(self, cfg: drama.Config, width: int):
        super().__init__()
        d, self.window = cfg.d_model, cfg.batch_length
        self.heads = cfg.expand * d // cfg.headdim
        self.p = 2 * max(1, cfg.headdim // 4)  # half of Mamba-2's, and even, for `rotate`
        self.qkv = nn.Linear(d, 3 * self.heads * self.p, bias=False)
        self.out_proj = nn.Linear(self.heads * self.p, d, bias=False)
        self.norm = nn.RMSNorm(d)
        self.mlp = nn.Sequential(nn.Linear(d, width), nn.SiLU(), nn.Linear(width, d))

    def initial_state(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """(keys (b, m, heads, p), values like them, seen (b, m) bool), of m = 0 tokens as yet."""
        cache = self.norm.weight.new_zeros(batch, 0, self.heads, self.p)
        return cache, cache, cache[..., 0, 0].bool()

    def forward(self, u: Tensor, state=None, first=None) -> tuple[Tensor, tuple]:
        """u (b, l, d_model) -> the same shape, and the last window - 1 tokens, to attend to."""
        b, l, _ = u.shape
        keys, values, seen = state or self.initial_state(b)
        m, n = keys.shape[1], keys.shape[1] + l
        query, key, value = self.qkv(u).unflatten(-1, (3, self.heads, self.p)).unbind(2)
        keys = torch.cat([keys.to(key.dtype), key], 1)  # (b, n, heads, p), not rotated
        values = torch.cat([values.to(value.dtype), value], 1)
        if first is None:
            first = torch.zeros(b, l, dtype=torch.bool, device=u.device)
        # the episode of each token: 0 was open before, -1 is over
        episode = F.pad(first.cumsum(1), (m, 0)).masked_fill(F.pad(~seen, (0, l)), -1)  # (b, n)
        place = torch.arange(n, device=u.device)
        age = place[m:, None] - place  # (l, n)
        open_to = (episode[:, None] == episode[:, m:, None]) & (age >= 0) & (age < self.window)
        query = rotate(torch.cat([keys[:, :m], query], 1))[:, m:]
        y = F.scaled_dot_product_attention(
            *(t.to(value.dtype).transpose(1, 2) for t in (query, rotate(keys), values)),
            open_to[:, None])
        y = self.out_proj(y.transpose(1, 2).flatten(2))  # (b, l, d_model)
        drop = max(0, n - self.window + 1)
        same = episode == episode[:, -1:]
        return (y + self.mlp(self.norm(u + y)),
                (keys[:, drop:], values[:, drop:], same[:, drop:]))


LAYERS = {"mamba": Mamba, "gru": GRU, "transformer": Transformer}

# ---- the model and the program ------------------------------------------------------------------


def size(module: nn.Module) -> int:
    """Its number of parameters."""
    return sum(p.numel() for p in module.parameters())


def fitted(layer, cfg: drama.Config) -> Layer:
    """The layer at the largest width at which it has no more parameters than Mamba-2's.

    Raises Refusal where that is not within 5%.
    """
    def count(width):
        with torch.device("meta"):  # counts, and draws no random number
            return size(layer(cfg, width))

    with torch.device("meta"):
        target = size(SequenceModel(cfg, 1).layers[0])
    width = bisect_right(range(1, 16 * cfg.d_model), target, key=count)
    if not width or count(width) < 0.95 * target:
        raise drama.Refusal(f"--d_model {cfg.d_model}: no {layer.__name__} layer has Mamba-2's "
                            f"{target:,} parameters; take a larger one, or another --expand")
    return layer(cfg, width)


class Backbone(SequenceModel):
    """drama.py's sequence model, stem and residuals and all, with layers of another kind."""

    def __init__(self, layer, cfg: drama.Config, num_actions: int):
        super().__init__(cfg, num_actions)
        self.layers = nn.ModuleList(fitted(layer, cfg) for _ in range(cfg.layers))


def make(backbone: str, cfg: drama.Config, num_actions: int) -> SequenceModel:
    """The sequence model of that name."""
    if backbone == "mamba2":
        return SequenceModel(cfg, num_actions)
    return Backbone(LAYERS[backbone], cfg, num_actions)


def main(argv: list[str] | None = None) -> int:
    """Run drama.py with the chosen backbone; return its exit code."""
    own = argparse.ArgumentParser("backbones.py", add_help=False, allow_abbrev=False)
    own.error = drama.refuse
    own.add_argument("--backbone", default="mamba2", choices=("mamba2", *LAYERS))
    try:
        args, rest = own.parse_known_args(argv)
        if {"-h", "--help"} & set(rest):
            print(__doc__, "\nThe flags of drama.py:\n", sep="")
            return drama.main(["--help"])
        cfg, given = drama.parse(rest)
        counts = {name: size(make(name, cfg, 1).layers[0]) for name in ("mamba2", *LAYERS)}
    except drama.Refusal as error:
        print(f"backbones.py: {error}", file=sys.stderr)
        return 2
    print(f"backbone {args.backbone}; parameters of a layer: " + ", ".join(
        f"{name} {count:,} ({count / counts['mamba2'] - 1:+.1%})"
        for name, count in counts.items()))
    if "out" not in given:
        rest += ["--out", f"runs/{cfg.game}-{cfg.seed}-{args.backbone}"]
    changed = {"time": SimpleNamespace(perf_counter=time.process_time, sleep=time.sleep)}
    if args.backbone != "mamba2":
        changed["SequenceModel"] = partial(Backbone, LAYERS[args.backbone])
    with mock.patch.multiple(drama, **changed):
        return drama.main(rest)


if __name__ == "__main__":
    sys.exit(main())
