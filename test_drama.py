# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "gymnasium>=1.2.0", "ale-py>=0.11.2", "numpy>=2.0", "tqdm>=4.66",
#                 "matplotlib>=3.9", "pytest>=8.0"]
# ///
"""Tests of drama.py: each an independent oracle and, where it helps, an example worked by hand.

    python -m pytest -q test_drama.py        a minute or two on one core; no GPU, no network
    uv run test_drama.py                     the same where uv is: it installs what it needs

The oracles: mamba2_ref.py for the scan, NumPy for the formulas, a counting environment for the
rows of the replay, value iteration for GridWorld, and the emulator itself. Sizes are all different,
so that no axis passes for another. Left out: whether it learns a game in hours; see results/.
"""

import csv
import dataclasses
import errno
import gc
import http.client
import importlib
import io
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gymnasium.spaces import Discrete
from PIL import Image
from tqdm import tqdm

import drama
import mamba2_ref as ref
from drama import ActorCritic, Mamba2, Player, Replay, SequenceModel, TwoHot, WorldModel
from experiments import pictures
from experiments.gridworld import GridWorld

b, l, K, C, ACTIONS = 2, 11, 3, 5, 4
RUN = "--preset tiny --device cpu --precision float32".split()
close = partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)
exact = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)  # of float64


@pytest.fixture(autouse=True)
def seeded():
    """The same draws in every run: torch starts at a random seed."""
    torch.manual_seed(0)


def small(**changes):
    """The tiny preset with sizes that all differ."""
    return dataclasses.replace(drama.parse(["--preset", "tiny"])[0], **{**dict(
        game="GridWorld", cnn_width=3, categoricals=K, classes=C, d_model=14, headdim=7, d_state=6,
        head_units=9, bins=21, batch_size=b, batch_length=l, horizon=6, actor_units=10, dropout=0.0,
        critic_units=12, lr_warmup=1, prior_groups=K), **changes})


def scrambled(module, size=0.3):
    """The module with noise on every parameter, so that no zero or one hides an error."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(size * torch.randn_like(p))
    return module.eval()


@pytest.fixture
def model():
    """A world model in eval mode: BatchNorm keeps the frames apart."""
    return scrambled(WorldModel(small(), ACTIONS))


@pytest.fixture
def agent():
    """Actor and critics."""
    return scrambled(ActorCritic(small(), ACTIONS))


def one_hot(classes):
    """Classes (..., K) -> flat latents (..., K*C)."""
    return F.one_hot(classes.long(), C).flatten(-2).float()


def make_batch(*opens):
    """A random batch (b, l) as Replay.batch gives it; opens: where episodes open, row by row."""
    torch.manual_seed(1)
    return SimpleNamespace(
        frame=torch.randint(0, 256, (b, l, 16, 16, 3), dtype=torch.uint8),
        action=torch.randint(0, ACTIONS, (b, l)), reward=torch.randint(-3, 9, (b, l)).float(),
        terminated=torch.randint(0, 2, (b, l)).float(),
        first=torch.tensor([[t in row for t in range(l)] for row in opens]))


def make_dream(n=5, h=6):
    """Random futures (n, h), two of which end for certain."""
    torch.manual_seed(2)
    end = torch.rand(n, h) ** 2
    end[0, 2] = end[1, 0] = 1
    return drama.Dream(torch.randn(n, h + 1, K * C + small().d_model),
                       torch.randint(0, ACTIONS, (n, h)), 3 * torch.randn(n, h), end)


def softmax(x):
    """Over the last axis, in float64."""
    x = np.asarray(x, np.float64)
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def chi_square(counts, probs):
    """Pearson's statistic, in standard deviations above its mean: past 4, these are not probs."""
    counts = np.asarray(counts)
    expected = np.asarray(probs) * counts.sum()
    assert (expected > 5).all(), "too few draws for the test"
    freedom = len(counts) - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


def reaches(loss, module):
    """Whether the loss has a gradient in the module."""
    found = torch.autograd.grad(loss.sum(), list(module.parameters()), retain_graph=True,
                                allow_unused=True)
    return any(g is not None and bool(g.any()) for g in found)


# ---- the scan -----------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 11, 16, 33])
@pytest.mark.parametrize("chunk", [1, 4, 16, 64])
def test_scan_is_recurrence_is_matrix_is_steps(length, chunk):
    torch.manual_seed(length)
    for resets in ("none", "random", "before edge", "on edge", "after edge"):
        for with_state in (False, True):
            weights = torch.randn(2, length, 3, 5), torch.randn(2, 3, 5, 7)
            run = partial(ref.values_and_gradients, dtype=torch.float64, weight_y=weights[0],
                          weight_state=weights[1], first=ref.make_first(resets, 2, length, chunk),
                          inputs=ref.make_inputs(2, length, 3, 5, 7, with_state))
            want = run(ref.ssd_recurrent)
            for path in (ref.ssd_matrix, partial(drama.ssd_scan, chunk_size=chunk),
                         partial(ref.repeat_step, drama.ssd_step)):
                got = run(path)
                assert max(ref.error(got[k], want[k]) for k in want) < 1e-10, (path, resets)


def test_scan_by_hand():
    # halved at each token: 1, 1 + 1/2, 1 + 3/4; a state of 4 adds 2, 1, 1/2; a reset starts anew
    x, state = torch.ones(1, 3, 1, 1), torch.full((1, 1, 1, 1), 4.0)
    scan = partial(drama.ssd_scan, x, x[..., 0], torch.tensor([0.5]).log(), x[..., 0], x[..., 0], 2)
    close(scan()[0].flatten(), [1, 1.5, 1.75])
    close(scan(state)[0].flatten(), [3, 2.5, 2.25])
    y, end = scan(state, torch.tensor([[False, False, True]]))
    close(y.flatten(), [3, 2.5, 1])
    assert end.item() == 1


def test_scan_is_causal_and_leaves_its_state_untouched():
    torch.manual_seed(0)
    v = ref.make_inputs(2, 11, 3, 5, 7, True)
    before, (y, _) = v["state"].clone(), drama.ssd_scan(**v, chunk_size=4)
    for t in (0, 5, 8, 10):
        for name in ("x", "dt", "B", "C"):
            other = v[name].clone()
            other[:, t] += 1
            other, _ = drama.ssd_scan(**{**v, name: other}, chunk_size=4)
            assert torch.equal(other[:, :t], y[:, :t]) and not torch.equal(other[:, t], y[:, t])
    _, after = drama.ssd_step(**{k: v[k] if k in ("A", "state") else v[k][:, 0] for k in v})
    assert torch.equal(v["state"], before) and not torch.equal(after, before)


@pytest.mark.parametrize("chunk", [32, 128])
def test_scan_in_float32_at_the_steepest_decays(chunk):
    torch.manual_seed(0)
    v = ref.make_inputs(1, 1664, 2, 3, 5, True)
    v["A"] = torch.tensor([-16.0, -1.0])
    v["dt"][:, ::3] = 8.0  # decays of exp(-128) a token, among tokens that hardly decay
    first = ref.make_first("random", 1, 1664, chunk)
    weights = torch.randn_like(v["x"]), torch.randn_like(v["state"])
    want = ref.values_and_gradients(ref.ssd_recurrent, v, first, *weights, torch.float64)
    scan = partial(drama.ssd_scan, chunk_size=chunk)
    got = ref.values_and_gradients(scan, v, first, *weights, torch.float32)
    assert all(g.dtype == torch.float32 for g in got.values())
    assert max(ref.error(got[k], want[k]) for k in want) < 2e-3  # infinite where one is NaN


def test_scan_and_state_stay_in_float32_under_autocast():
    torch.manual_seed(0)
    v = {k: x.bfloat16() for k, x in ref.make_inputs(2, 11, 3, 5, 7, False).items()}
    v["state"] = torch.randn(2, 3, 5, 7)
    want, layer, u = ref.ssd_recurrent(**v), Mamba2(10, 7, 4, 2, 5, 4), torch.randn(2, 11, 10)
    with torch.autocast("cpu", torch.bfloat16):
        for got in (drama.ssd_scan(**v, chunk_size=4), ref.repeat_step(drama.ssd_step, **v)):
            assert all(g.dtype == torch.float32 for g in got)
            assert all(ref.error(*pair) < 1e-5 for pair in zip(got, want, strict=True))
        _, state = layer(u)
        assert state[1].dtype == layer.step(u[:, 0], state)[1][1].dtype == torch.float32


# ---- Mamba-2 ------------------------------------------------------------------------------------


def test_mamba2_has_the_official_parameters_and_initial_values():
    torch.manual_seed(0)
    layer = Mamba2(d_model=96, d_state=7, d_conv=3, expand=2, headdim=4, chunk_size=5)
    inner, heads, channels = 192, 48, 192 + 2 * 7
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "dt_bias": (heads,), "A_log": (heads,), "D": (heads,), "norm.weight": (inner,),
        "in_proj.weight": (inner + channels + heads, 96), "out_proj.weight": (96, inner),
        "conv1d.weight": (channels, 1, 3), "conv1d.bias": (channels,)}
    A, dt = layer.A_log.exp().detach(), F.softplus(layer.dt_bias).detach()
    assert 1 - 1e-5 < A.min() < 4 and 13 < A.max() < 16 + 1e-4 and (layer.D == 1).all()
    assert 1e-3 - 1e-6 < dt.min() and dt.max() < 0.1 + 1e-6
    assert 0.25 < (dt < 0.01).float().mean() < 0.75  # log-uniform: half lie in each decade


def naive_mamba2(layer, u):
    """The layer as [2] has it, from its parameters alone: one episode u (l, d_model), float64."""
    p = {k: v.detach() for k, v in layer.named_parameters()}
    h, inner, (channels, _, taps) = *map(len, (p["D"], p["norm.weight"])), p["conv1d.weight"].shape
    n = (channels - inner) // 2
    z, xBC, dt = (u @ p["in_proj.weight"].T).split([inner, channels, h], -1)
    xBC = F.pad(xBC.T, (taps - 1, 0))  # so that the last tap weighs the present token
    xBC = F.conv1d(xBC, p["conv1d.weight"], p["conv1d.bias"], groups=channels).T
    x, B, C = (v[None] for v in F.silu(xBC).split([inner, n, n], -1))
    x, dt = x.unflatten(-1, (h, -1)), (dt + p["dt_bias"]).exp().log1p()[None]
    y, _ = ref.ssd_recurrent(x, dt, -p["A_log"].exp(), B, C)
    y = (y + p["D"][:, None] * x).flatten(-2)[0] * F.silu(z)
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p["norm.weight"]
    return y @ p["out_proj.weight"].T


def test_mamba2_is_the_published_layer_and_a_reset_makes_two_sequences():
    layer = scrambled(Mamba2(10, d_state=7, d_conv=4, expand=2, headdim=5, chunk_size=3)).double()
    u, first = torch.randn(b, l, 10).double(), torch.zeros(b, l, dtype=torch.bool)
    first[0, [2, 5, 6]] = first[1, 9] = True
    for row, cuts in enumerate(([0, 2, 5, 6, l], [0, 9, l])):
        alone = [naive_mamba2(layer, u[row, i:j]) for i, j in zip(cuts, cuts[1:], strict=False)]
        exact(layer(u)[0][row].detach(), naive_mamba2(layer, u[row]))
        exact(layer(u, first=first)[0][row].detach(), torch.cat(alone))


@torch.no_grad()
def test_mamba2_forward_is_step_by_step_with_carried_state_and_resets():
    layer = scrambled(Mamba2(10, d_state=7, d_conv=4, expand=2, headdim=5, chunk_size=3)).double()
    u, first = torch.randn(b, l, 10).double(), torch.zeros(b, l, dtype=torch.bool)
    first[0, [1, 4]] = first[1, [6, 10]] = True
    whole, end = layer(u, first=first)
    for cut in (1, 2, 5, 6, 10):
        y, state = layer(u[:, :cut], first=first[:, :cut])
        rest, last = layer(u[:, cut:], state, first[:, cut:])
        exact(torch.cat([y, rest], 1), whole)
        ys = [y]
        for t in range(cut, l):
            [state] = drama.clear([state], first[:, t])
            before = [s.clone() for s in state]
            y, new = layer.step(u[:, t], state)
            assert all(torch.equal(x, y) for x, y in zip(before, state, strict=True))
            ys, state = [*ys, y[:, None]], new
        exact(torch.cat(ys, 1), whole)
        for got in (state, last):
            assert all(torch.allclose(x, y, atol=1e-10) for x, y in zip(got, end, strict=True))


@torch.no_grad()
def test_sequence_model_is_causal_and_parts_episodes():
    sequence = scrambled(SequenceModel(small(), ACTIONS)).double()
    z, action = torch.randn(b, l, K * C).double(), torch.randint(0, ACTIONS, (b, l))
    first = (torch.arange(l) == 5).expand(b, l)
    d, _ = sequence(z, action, first=first)
    exact(torch.cat([sequence(z[:, i], action[:, i])[0] for i in (slice(5), slice(5, l))], 1), d)
    other, _ = sequence(z, (action + F.one_hot(torch.tensor(7), l)) % ACTIONS, first=first)
    assert torch.equal(other[:, :7], d[:, :7]) and not torch.equal(other[:, 7], d[:, 7])
    states = sequence.initial_states(b)
    for t in range(l):
        d_t, states = sequence(z[:, t], action[:, t], drama.clear(states, first[:, t]))
        exact(d_t, d[:, t])


# ---- small maths --------------------------------------------------------------------------------


def test_symlog_and_symexp():
    x = torch.tensor([0, math.e - 1, 1 - math.e, 1e6, -0.01, 3e-6], dtype=torch.float64)
    exact(drama.symlog(x), [0, 1, -1, math.log(1e6 + 1), -math.log(1.01), math.log1p(3e-6)])
    exact(drama.symexp(drama.symlog(x)), x)


def test_two_hot():
    coder = TwoHot(5, 2.0)  # centres -2, -1, 0, 1, 2
    x = torch.tensor([0.0, math.expm1(0.25), -math.expm1(1.5), 1e9, -1e9, math.expm1(2.0)])
    want = np.array([[0, 0, 1, 0, 0], [0, 0, 0.75, 0.25, 0], [0.5, 0.5, 0, 0, 0],
                     [0, 0, 0, 0, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 1]])
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    close(coder.encode(x), want)
    close(coder.loss(logits, x), -(want * np.log(softmax(logits))).sum(-1))
    close(coder.mean(torch.zeros(3, 5)), 0)
    coder, x = TwoHot(255, 20.0), torch.tensor([[0.0, 1, -1, 0.3], [21, -777, 1e5, 3e-3]])
    code = coder.encode(x)
    assert code.shape == (2, 4, 255) and (code >= 0).all() and ((code > 0).sum(-1) <= 2).all()
    close(code.sum(-1), 1)
    close(coder.mean(code.log()), x)


def test_unimix_divides_by_the_classes():
    logits = torch.zeros(2, K, C)
    logits[..., 1] = 200.0  # all but the floor lies on class 1
    floor = 0.01 / C
    close(drama.unimix(logits, 0.01).exp(), [[[floor, 0.99 + floor] + 3 * [floor]] * K] * 2, atol=0)
    probs = drama.unimix(torch.randn(4, K, C), 0.2).exp()
    close(probs.sum(-1), np.ones((4, K)), rtol=1e-5)
    assert probs.min() > 0.2 / C


def test_draws_and_straight_through():
    torch.manual_seed(0)
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5, -0.3], requires_grad=True)
    draws, p = drama.draw_one_hot(logits.log_softmax(-1).expand(4000, C)), softmax(logits.detach())
    assert (draws.sum(-1) == 1).all() and ((draws == 0) | (draws == 1)).all()
    assert chi_square(draws.sum(0).tolist(), p) < 4
    sample, w = drama.straight_through(logits.log_softmax(-1)), np.array([0.3, -1.0, 2.0, 0.7, 5.0])
    close(sorted(sample.tolist()), [0, 0, 0, 0, 1])
    [got] = torch.autograd.grad((sample * torch.tensor(w)).sum(), logits)
    close(got, p * (w - p @ w))  # the gradient of w . softmax(logits)


def test_kl_and_free_bits():
    # 1/2 ln(1/2 : 1/4) + 1/2 ln(1/2 : 3/4) = 1/2 ln(4/3), K times over
    p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    close(drama.kl_divergence(p.expand(4, K, 2), q.expand(4, K, 2)), [K / 2 * math.log(4 / 3)] * 4)
    kl = torch.tensor([0.2, 0.999, 1.5], requires_grad=True)
    freed = drama.free_bits(kl, 1.0)
    assert freed.tolist() == [1, 1, 1.5]
    assert torch.autograd.grad(freed.sum(), kl)[0].tolist() == [0, 0, 1]


@pytest.mark.parametrize("lam, want", [(0.5, [2.5, 2, 11]), (0.0, [3, 2, 11]), (1.0, [2, 2, 11])])
def test_lambda_return(lam, want):
    # R_2 = 3 + 16/2; R_1 = 2, the end; R_0 = 1 + 1/2 ((1 - lam) 4 + lam 2); V_0 is nowhere used
    reward, end = torch.tensor([[1.0, 2, 3]]), torch.tensor([[0.0, 1, 0]])
    value = torch.tensor([[100.0, 4, 8, 16]])
    assert drama.lambda_return(reward, end, value, 0.5, lam).tolist() == [want]
    dream, value = make_dream(), torch.randn(5, 7)
    r, e, v, h = dream.reward.numpy(), dream.end.numpy(), value.numpy(), 6
    want = np.zeros((5, h))
    for t in range(h):  # the mean of the n-step returns, weighted (1 - lam) lam^(n-1)
        summed, kept = 0.0, 1.0
        for n in range(t, h):
            summed, kept = summed + kept * r[:, n], kept * 0.9 * (1 - e[:, n])
            share = lam ** (n - t) * (1 if n == h - 1 else 1 - lam)
            want[:, t] += share * (summed + kept * v[:, n + 1])
    close(drama.lambda_return(dream.reward, dream.end, value, 0.9, lam), want)


# ---- replay and DFS -----------------------------------------------------------------------------


def make_replay(rows=60, **changes):
    """A replay of `rows` rows that count: frame, action, reward; every 7th opens an episode."""
    replay = Replay(small(steps=rows + 5, **changes), torch.device("cpu"))
    for i in range(rows):
        frame = np.full((16, 16, 3), i, np.uint8)
        replay.add(frame, i % ACTIONS, i, i % 7 == 6, i % 7 == 0, torch.tensor([i % C, 0, 1]))
    return replay


def test_windows_are_contiguous_and_hold_their_rows():
    replay = make_replay()
    for rows, shape in ((replay.draw_sequences(), (b, l)), (replay.draw_contexts(), (7, 4))):
        assert rows.shape == shape and (rows.diff(dim=1) == 1).all() and rows.max() < replay.size
        batch = replay.batch(rows)
        assert (batch.frame == rows[..., None, None, None]).all()
        assert torch.equal(batch.action, rows % ACTIONS) and torch.equal(batch.reward, rows.float())
        assert torch.equal(batch.terminated, (rows % 7 == 6).float())
        assert torch.equal(batch.first, rows % 7 == 0)


def test_dfs_formulas():
    v, dreamt = torch.tensor([0, 10, 20, 5]), torch.tensor([0, 6, 33, 12])
    close(drama.dfs_sequence_logits(v, 10.0).softmax(-1), softmax([0, -1, -2, -0.5]))
    # v - b / 1.5 = 0, 6, -2, -3: where more was learnt than dreamt, all are alike
    close(drama.dfs_dream_logits(v, dreamt, 1.5, 10.0).softmax(-1), softmax([0, 0, -0.2, -0.3]))
    v, dreamt = torch.randint(0, 50, (2, 31))
    learn = np.array([math.exp(-x / 7) for x in v])
    dream = np.array([math.exp(min(0, x - y / 2.5) / 7) for x, y in zip(v, dreamt, strict=True)])
    close(drama.dfs_sequence_logits(v, 7.0).softmax(-1), learn / learn.sum(), atol=0)
    close(drama.dfs_dream_logits(v, dreamt, 2.5, 7.0).softmax(-1), dream / dream.sum(), atol=0)


def test_draws_are_without_replacement_and_counted():
    replay = make_replay(rows=16)
    v, dreamt = torch.zeros(2, 16, dtype=torch.int32)
    for _ in range(40):
        starts, contexts = replay.draw_sequences()[:, 0], replay.draw_contexts()[:, 0]
        assert len(set(starts.tolist())) == b and len(set(contexts.tolist())) == 7
        v[starts] += 1
        dreamt[contexts] += 1
    assert torch.equal(replay.trained[:16], v) and torch.equal(replay.dreamt[:16], dreamt)
    assert (v > 0).tolist() == [True] * 6 + [False] * 10  # 16 - 11 + 1 starts; 16 - 4 + 1
    assert (dreamt > 0).tolist() == [True] * 13 + [False] * 3
    replay.cfg = small(steps=21, dreams=30)  # more than there are starts
    assert len(replay.draw_contexts()) == 13


@pytest.mark.parametrize("sampler, more", [("dfs", 0), ("dfs", 1_000_000), ("uniform", 0)])
def test_draws_follow_the_probabilities(sampler, more):
    torch.manual_seed(0)
    replay = make_replay(rows=15, sampler=sampler, dreams=3)  # 5 starts, 12; s = 3/2
    v = torch.tensor([0, 3, 8, 1, 5, 2, 2, 0, 9, 4, 0, 7, 1, 2, 3], dtype=torch.int32)
    dreamt = torch.tensor([9, 3, 0, 7, 5, 15, 30, 2, 2, 6, 24, 1, 0, 0, 0], dtype=torch.int32)
    pairs, firsts = np.zeros((5, 5)), np.zeros(12)
    for _ in range(3000):
        replay.trained[:15] = v + more
        replay.dreamt[:15] = dreamt + more * 3 // 2  # which must not matter
        firsts[replay.draw_contexts()[0, 0]] += 1
        pairs[tuple(replay.draw_sequences()[:, 0])] += 1
    learn, dream = np.ones(5) / 5, np.ones(12) / 12
    if sampler == "dfs":
        learn = softmax(-v[:5].numpy() / 10)
        dream = softmax(np.minimum(0, v[:12].numpy() - dreamt[:12].numpy() / 1.5) / 10)
    off = ~np.eye(5, dtype=bool)  # first i, then j of what is left
    assert chi_square(pairs[off], (learn[:, None] * learn / (1 - learn[:, None]))[off]) < 4
    assert chi_square(firsts, dream) < 4


def test_counts_a_million_apart_are_no_trouble():
    replay = make_replay(rows=20)
    replay.dreamt[:] = 5_000_000
    for _ in range(5):
        replay.trained[:] = 1_000_000
        replay.trained[[2, 7]] = 0  # never trained on: two of ten starts
        assert set(replay.draw_sequences()[:, 0].tolist()) == {2, 7}
        assert len(set(replay.draw_contexts()[:, 0].tolist())) == 7
    for logits in (drama.dfs_sequence_logits(replay.trained, 10.0),
                   drama.dfs_dream_logits(replay.trained, replay.dreamt, 3.5, 10.0)):
        close(logits.softmax(-1).sum(), 1)  # not NaN


# ---- the rows of a run --------------------------------------------------------------------------


class Counting:
    """Frames whose colours are frames so far, episode, step; NEXT_STEP autoreset.

    Reward 10 (episode + 1) + step. The third action of an episode costs a life. Episodes of 7, 4,
    9, 5 steps end in turn by game over and by truncation; environment i is i lengths ahead.
    """

    LENGTHS, single_action_space = (7, 4, 9, 5), Discrete(3)

    def __init__(self, game, n, size):
        self.size, self.calls, self.log = size, 0, []
        self.count, self.episode, self.time, self.over = np.zeros((4, n), int)

    def _frames(self):
        colours = np.stack([self.count, self.episode, self.time], -1).astype(np.uint8)
        return np.tile(colours[:, None, None, None], (1, 1, self.size, self.size, 1))

    def reset(self, seed=None):
        return self._frames(), {"lives": np.full(len(self.over), 3)}

    def step(self, actions):
        self.calls += 1
        before, reward, lost, out = self._frames(), *np.zeros((3, len(self.over)), int)
        for i, action in enumerate(actions):
            if self.over[i]:
                self.over[i], self.time[i], self.episode[i] = 0, 0, self.episode[i] + 1
                continue
            opens, reward[i] = self.time[i] == 0, 10 * (self.episode[i] + 1) + self.time[i]
            self.time[i] += 1
            self.over[i] = self.time[i] == self.LENGTHS[(self.episode[i] + i) % 4]
            lost[i] = self.time[i] == 3 or (self.over[i] and self.episode[i] % 2 == 0)
            out[i] = self.over[i] and self.episode[i] % 2
            self.log.append((before[i, 0], action, reward[i], lost[i], opens))
        self.count += 1
        lives = {"lives": np.where(self.over, 0, 2)}
        return self._frames(), reward, lost.astype(bool), out.astype(bool), lives


@pytest.fixture
def no_pictures(monkeypatch):
    """They take longer than a short run."""
    for name in ("draw_curves", "draw_dreams"):
        monkeypatch.setattr(pictures, name, lambda *_: None)


def read_csv(path):
    """The rows of a table."""
    with open(path) as file:
        return list(csv.DictReader(file))


def test_the_scan_goes_back_in_float32_too_under_autocast():
    torch.manual_seed(0)
    x = torch.randn(2, 8, 3, 4, requires_grad=True)
    dt, A, B, C = torch.rand(2, 8, 3), -torch.rand(3), torch.randn(2, 8, 5), torch.randn(2, 8, 5)
    loss = drama.ssd_scan(x, dt, A, B, C, 4)[0].square().sum()
    exact, = torch.autograd.grad(loss, x)
    learner = drama.Learner(torch.optim.SGD([x], 1e-3), 1e9, 1)
    with torch.autocast("cpu", torch.bfloat16):
        learner.step({"loss": drama.ssd_scan(x, dt, A, B, C, 4)[0].square().sum()}, {"loss": 1})
    close(x.grad, exact)


def test_dreams_teach_the_actor_under_autocast(no_pictures, monkeypatch, tmp_path):
    learnt, step = [], drama.Learner.step

    def recorded(self, *args):
        """Autocast keeps casts of the actor made without a gradient, while it dreams."""
        news = step(self, *args)
        learnt.append(all(p.grad is not None for group in self.optimiser.param_groups
                          for p in group["params"]))
        return news

    monkeypatch.setattr(drama.Learner, "step", recorded)
    flags = "--game GridWorld --steps 60 --precision bfloat16 --out".split()
    assert drama.main([*RUN, *flags, str(tmp_path)]) == 0
    assert len(learnt) == 6 and all(learnt)


def test_dreams_use_the_weights_just_updated(no_pictures, monkeypatch, tmp_path):
    dream, fresh = drama.update_actor_critic, []

    def checked(cfg, model, *rest):
        """Autocast keeps its casts of the weights, also of those that an update has changed."""
        d = torch.ones(1, cfg.d_model)
        cast = model.prior(d)
        torch.clear_autocast_cache()
        fresh.append(torch.equal(cast, model.prior(d)))
        return dream(cfg, model, *rest)

    monkeypatch.setattr(drama, "update_actor_critic", checked)
    flags = "--game GridWorld --steps 60 --precision bfloat16 --model_lr 0.1 --out".split()
    assert drama.main([*RUN, *flags, str(tmp_path)]) == 0
    assert len(fresh) == 3 and all(fresh)


def test_a_run_acts_in_float32_as_its_evaluation_does(no_pictures, monkeypatch, tmp_path):
    act, players = drama.Player.act, []

    def checked(self, *args, **options):
        """The memory tells in which type the model was asked."""
        players.append(self)
        return act(self, *args, **options)

    monkeypatch.setattr(drama.Player, "act", checked)
    flags = "--game GridWorld --steps 50 --precision bfloat16 --out".split()
    assert drama.main([*RUN, *flags, str(tmp_path)]) == 0
    assert drama.main([*RUN, *flags, str(tmp_path), "--eval", "1"]) == 0
    memories = [[p.memory[0], *(x for pair in p.memory[1] for x in pair)]
                for p in (players[0], players[-1])]
    assert players[0] is not players[-1] and len(memories[0]) > 2
    assert all(x.dtype is torch.float32 for memory in memories for x in memory)


def test_dreams_wait_until_all_losses_are_in(no_pictures, monkeypatch, tmp_path):
    dream, entropies = drama.update_actor_critic, []

    def recorded(*args):
        """Remember the entropies that the table should average."""
        news = dream(*args)
        entropies.append(news["policy_entropy"])
        return news

    monkeypatch.setattr(drama, "update_actor_critic", recorded)
    argv = "--game GridWorld --see_first 1 --log_every 24 --steps 72 --out".split()
    assert drama.main([*RUN, *argv, str(tmp_path)]) == 0
    early, late = read_csv(tmp_path / "metrics.csv")
    assert [*early] == ["step", "seconds", "updates", *drama.METRICS]
    # updates at steps 40 and 48, then 56, 64 and 72; weights of 0, 0, 0.5, 1 and 1
    assert early["updates"] == "2" and early["policy_entropy"] == "nan" != early["kl"]
    assert len(entropies) == 2
    assert float(late["policy_entropy"]) == pytest.approx(sum(entropies) / 2, rel=1e-5)


def test_rows_of_a_run_and_scores_of_its_evaluation(no_pictures, monkeypatch, tmp_path, capsys):
    envs, told, act = [], [], Player.act
    monkeypatch.setattr(drama, "make_env", lambda *x: envs.append(Counting(*x)) or envs[-1])
    monkeypatch.setattr(Player, "act", lambda self, frame, first, **k: told.extend(
        zip(frame[:, 0, 0, 2] == 0, first, strict=True)) or act(self, frame, first, **k))
    # with the options that the other runs leave out
    argv = [*"--game Pong --sampler uniform --stored_latents false".split(), *RUN,
            "--precision", "bfloat16", "--out", str(tmp_path)]
    assert drama.main([*argv, "--steps", "90"]) == 0
    rows = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["replay"]
    frames = np.fromfile(tmp_path / "frames.bin", np.uint8).reshape(90, 16, 16, 3)
    # by hand: frame 7 closes the first episode and 8 opens the next; then frames 12 and 13
    assert frames[:13, 5, 5, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 13, 14]
    assert rows["reward"][:13].tolist() == [10, 11, 12, 13, 14, 15, 16, 20, 21, 22, 23, 30, 31]
    assert rows["terminated"][:13].int().tolist() == [0, 0, 1, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0]
    assert rows["first"][:13].int().tolist() == [1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0]
    seen, *columns = zip(*envs[0].log, strict=True)  # and all of it, as the environment saw it
    assert np.array_equal(frames, seen) and set(columns[0]) == {0, 1, 2}
    for name, column in zip(("action", "reward", "terminated", "first"), columns, strict=True):
        assert rows[name].tolist() == list(column), name
    episodes = read_csv(tmp_path / "episodes.csv")
    assert [e["step"] for e in episodes] == "7 11 20 25 32 36 45 50 57 61 70 75 82 86".split()
    assert [e["length"] for e in episodes] == "7 4 9 5 7 4 9 5 7 4 9 5 7 4".split()
    assert [float(e["return"]) for e in episodes][:3] == [91, 86, 306]
    assert envs[0].calls == 90 + 14  # an autoreset is a step of the environment, not of the run
    assert all(opens == first for opens, first in told)  # the player knows where episodes open
    capsys.readouterr()
    assert drama.main([*argv, "--eval", "5", "--eval_envs", "3"]) == 0
    scores = [91, 46, 126, 91, 46]  # three environments, then two, an episode in each
    out = capsys.readouterr().out
    assert [float(x) for line in re.findall("scores: (.*)", out) for x in line.split()] == scores
    assert f"mean {np.mean(scores):.2f}" in out and f"{np.std(scores):.2f}" in out


def test_a_lost_life_of_breakout_is_no_end_of_the_episode():
    env, rng, seen = drama.make_env("Breakout", 1, 16), np.random.default_rng(0), []
    over, (frame, info) = drama.episode_over, env.reset(seed=3)
    assert frame.shape == (1, 1, 16, 16, 3) and frame.dtype == np.uint8 and info["lives"] == 5
    while len(seen) < 5:
        before = info["lives"]
        _, _, terminated, truncated, info = env.step(rng.integers(4, size=1))
        assert terminated == (info["lives"] < before) and not truncated
        if terminated:
            seen.append((info["lives"].item(), over(terminated, truncated, info).item()))
    assert seen == [(4, False), (3, False), (2, False), (1, False), (0, True)]
    _, reward, terminated, truncated, info = env.step(np.zeros(1, int))  # the autoreset
    assert not (reward or terminated or truncated) and info["lives"] == 5
    ends = np.array([[False, True], [True, True]])  # terminated, truncated
    assert over(*ends, {"lives": np.array([2, 1])}).all()  # out of time, with lives left
    env = drama.make_env("Breakout", 8, 64)
    env.reset(seed=3)
    frame, *_ = env.step(np.full(8, 2))
    assert (frame == frame[:1]).all()  # no action sticks: eight paddles move alike
    assert env.single_action_space.n == 4  # the minimal set


def test_updates_keep_and_use_latents(model, agent):
    replay = make_replay(batch_size=1)  # of two sequences one may overwrite the other's
    learner, acting = drama.make_learners(small(), model, agent)
    loss, imagine, draw, seen = model.loss, model.imagine, replay.draw_contexts, {}
    model.loss = lambda batch: seen.setdefault("loss", (batch.rows, *loss(batch)))[1:]
    model.imagine = lambda actor, *past: seen.update(past=past) or imagine(actor, *past)
    replay.draw_contexts = lambda: seen.setdefault("rows", draw())
    drama.update_world_model(model, learner, replay)
    rows, _, z, _ = seen["loss"]
    assert torch.equal(replay.latent[rows], z.argmax(-1).byte()) and z.shape == (1, l, K, C)
    model.eval()
    for stored in (True, False):
        slow = [p.clone() for p in agent.slow_critic.parameters()]
        drama.update_actor_critic(small(stored_latents=stored), model, agent, acting, replay)
        for after, before, p in zip(agent.slow_critic.parameters(), slow,
                                    agent.critic.parameters(), strict=True):
            close(after, 0.98 * before + 0.02 * p.detach(), atol=1e-6)
            assert not torch.equal(after, before)
        (z, action, first), rows = seen["past"], seen.pop("rows")
        assert torch.equal(z, one_hot(replay.latent[rows])) == stored
        assert torch.equal(action, rows % ACTIONS) and torch.equal(first, rows % 7 == 0)


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_the_average_of_the_weights_acts_and_dreams(average, no_pictures, monkeypatch, tmp_path):
    update, want, used, seen = drama.update_world_model, {}, [], set()

    def followed(model, learner, replay):
        """What the average must be after this update, by hand."""
        floats = {n: x for n, x in model.state_dict().items() if x.is_floating_point()}
        want.update({} if want else {n: x.clone() for n, x in floats.items()})
        news, share = update(model, learner, replay), max(1 - average, 10 / (10 + learner.updates))
        want.update({n: (1 - share) * want[n] + share * x for n, x in floats.items()})
        return news

    def check(model):
        """The model in use is the average, BatchNorm's statistics with it, and has no dropout."""
        used.append(not model.training)
        for name, x in want.items():
            close(model.state_dict()[name], x, atol=1e-5)

    dream, act = drama.update_actor_critic, Player.act
    monkeypatch.setattr(drama, "update_world_model", followed)
    monkeypatch.setattr(drama, "update_actor_critic",
                        lambda cfg, model, *x: check(model) or seen.add(1) or dream(cfg, model, *x))
    monkeypatch.setattr(Player, "act",
                        lambda self, *x, **k: check(self.model) or act(self, *x, **k))
    argv = f"--game GridWorld --average {average} --model_lr 0.01 --steps 120 --out".split()
    assert drama.main([*RUN, *argv, str(tmp_path)]) == 0
    assert len(used) > 120 and all(used) and seen
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert all(torch.equal(saved["learning"][n], saved["model"][n]) for n in want) == (not average)
    for name, x in want.items():
        close(saved["model"][name], x, atol=1e-5)


@pytest.mark.slow
def test_what_cuda_compiles_is_one_graph_each(model, agent):
    """A break in a graph is a round trip to the host in the middle of a dream; here it raises."""
    torch._dynamo.utils.counters.clear()
    player = Player(small(), model, agent, 1, torch.device("cpu"))
    for part, name in ((model, "loss"), (agent, "loss"), (model, "imagine"), (player, "act")):
        whole = torch.compile(getattr(part, name), fullgraph=True, backend="aot_eager")
        setattr(part, name, whole)
    replay, cfg = make_replay(), small()
    learner, acting = drama.make_learners(cfg, model, agent)
    for _ in range(2):  # the second time with what the first has compiled
        with torch.autocast("cpu", torch.bfloat16):
            drama.update_world_model(model, learner, replay)
            drama.update_actor_critic(cfg, model, agent, acting, replay)
        player.act(replay.frame[:1], torch.zeros(1, dtype=torch.bool))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_sees_first_then_the_other_losses_grow(compiled, model, agent):
    replay, told = make_replay(), []
    if compiled:  # on CUDA it is; this backend needs no compiler
        model.loss = torch.compile(model.loss, backend="aot_eager")
    model.cfg = small(see_first=2)
    learner, _ = drama.make_learners(model.cfg, model, agent)
    step = learner.step
    learner.step = lambda losses, weights: told.append(weights) or step(losses, weights)
    seeing = {*model.encoder.parameters(), *model.posterior.parameters(),
              *model.decoder.parameters()}
    for update in range(8):
        drama.update_world_model(model, learner, replay)
        if update == 1:  # what only the other losses train has no moments yet
            assert learner.optimiser.state.keys() == seeing
    assert learner.optimiser.state.keys() == {*model.parameters()}
    assert [w["dynamics"] for w in told] == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1]
    close([w["representation"] for w in told], [0, 0, 0, 0.025, 0.05, 0.075, 0.1, 0.1])
    assert [w["reward"] for w in told] == [w["dynamics"] for w in told]
    assert all(w["reconstruction"] == 1 for w in told)
    model.cfg = small(see_first=0)
    drama.update_world_model(model, learner, replay)
    assert told[-1] == model.weights


# ---- the world model ----------------------------------------------------------------------------


def test_parameter_counts_of_the_paper():
    cfg = drama.parse(["--preset", "paper"])[0]
    model, agent = WorldModel(cfg, 6), ActorCritic(cfg, 6)
    parts = (model.encoder, model.decoder, model.sequence, model.reward, model.termination, model,
             agent.actor, agent.critic)
    assert [sum(p.numel() for p in part.parameters()) for part in parts] == [
        232_272, 1_281_811, 3_737_504, 197_119, 131_841, 7_155_459, 527_366, 1_444_607]


@torch.no_grad()
@pytest.mark.parametrize("stride, kernel", [(1, 5), (2, 3), (2, 7), (4, 3)])
def test_decoder_starts_at_the_mean_frame(stride, kernel):
    cfg = small(first_stride=stride, cnn_kernel=kernel, cnn_width=5)
    model = scrambled(WorldModel(cfg, ACTIONS))
    assert model.encoder[-4].kernel_size == ((4, 4) if stride == 4 else (kernel, kernel))
    assert model.encode(torch.zeros(2, 16, 16, 3)).shape == (2, K, C)
    replay = make_replay()
    replay.frame[:, 3:5] = 255  # a wall
    z = drama.draw_one_hot(torch.full((6, K, C), -math.log(C))).flatten(-2)
    frame = replay.frame[:replay.size].float().mean(0) / 255
    mean = frame.permute(2, 0, 1).clamp(0.02, 0.98)
    close(mean[0, :6, 0], [29.5 / 255] * 3 + [0.98] * 2 + [29.5 / 255])
    assert abs(model.decode(z) - mean).max() > 0.1
    model.decoder.start_at(frame)
    assert abs(model.decode(z) - mean).max() < 0.04


def test_a_run_starts_at_the_mean_frame_of_its_random_steps(no_pictures, tmp_path):
    for flag, same in (("true", True), ("false", False)):
        argv = ["--game", "GridWorld", *RUN, "--mean_frame", flag, "--steps", "60"]
        assert drama.main([*argv, "--out", str(tmp_path / flag)]) == 0
        saved = torch.load(tmp_path / flag / "checkpoint.pt", weights_only=True)
        frames = np.fromfile(tmp_path / flag / "frames.bin", np.uint8).reshape(60, 16, 16, 3)
        want = torch.logit(torch.tensor(frames[:40].mean(0) / 255).clamp(0.02, 0.98))
        close(saved["model"]["decoder.mean"], want.permute(2, 0, 1) * same)


@torch.no_grad()
@pytest.mark.parametrize("groups", [1, K])
def test_world_model_losses_against_numpy(groups):
    cfg, batch = small(free_bits=5.0, prior_groups=groups), make_batch((0, 4), (7,))
    model = scrambled(WorldModel(cfg, ACTIONS))
    losses, z, kl = model.loss(batch)
    assert model.weights == dict.fromkeys(losses, 1) | {"representation": 0.1}
    assert all(x.shape == (b, l) for x in [*losses.values(), kl]) and z.shape == (b, l, K, C)
    d, _ = model.sequence(z.flatten(-2), batch.action, first=batch.first)
    frame, code = model.decode(z.flatten(-2)).numpy(), model.two_hot.encode(batch.reward).numpy()
    end = 1 / (1 + np.exp(-model.termination(d)[..., 0].numpy()))
    post, ahead = model.encode(batch.frame).numpy(), z.flatten(-2).roll(-1, 1)
    prior = model.log_prior(d, ahead).numpy()
    known = ~batch.first.numpy()
    known[:, 0] = False  # nothing before it in the window
    foretold = np.roll(prior, 1, axis=1)  # z_t is foretold by d_{t-1}
    divergence = known * (np.exp(post) * (post - foretold)).sum((-2, -1))
    assert (kl > 5).any() and ((kl < 5) & (kl > 0)).any()  # both sides of the free bits
    close(kl, divergence)
    free = known * np.maximum(5, divergence)
    real = batch.frame.numpy().transpose(0, 1, 4, 2, 3) / 255
    want = dict(reconstruction=((frame - real) ** 2).sum((2, 3, 4)),
                reward=-(code * np.log(softmax(model.reward(d)))).sum(-1),
                termination=-np.log(np.where(batch.terminated, end, 1 - end)),
                dynamics=free, representation=free)
    assert want.keys() == losses.keys()
    for name in want:
        close(losses[name], want[name], err_msg=name)


@torch.no_grad()
@pytest.mark.parametrize("share, count", [(0.3, 7), (0.001, 1), (1.0, 22)])
def test_a_part_of_the_frames_is_decoded_and_counts_for_all(model, share, count):
    batch, seen = make_batch((0,), (0,)), torch.zeros(b, l)
    model.decode = lambda z: torch.zeros(*z.shape[:-1], 3, 16, 16)
    each = (batch.frame / 255).square().sum((2, 3, 4))
    for _ in range(200):
        model.cfg = small(decoded=share)
        reconstruction = model.loss(batch)[0]["reconstruction"]
        assert (reconstruction != 0).sum() == count
        close(reconstruction, (reconstruction != 0) * each * b * l / count)
        seen += reconstruction != 0
    expected = 200 * count / (b * l)
    assert (abs(seen - expected) < 5 * (expected + 1) ** 0.5).all()  # each frame as often as others


def test_learning_rates_rise_stay_and_fall_to_nothing_by_the_end(model, agent):
    cfg = small(steps=1000, warmup=100, train_every=3, lr_warmup=10, lr_fall=0.5, see_first=40)
    model_learner, agent_learner = drama.make_learners(cfg, model, agent)
    for learner, full, end in ((model_learner, cfg.model_lr, 300),
                               (agent_learner, cfg.actor_lr, 180)):
        rates = []
        for _ in range(end + 3):
            rates.append(learner.optimiser.param_groups[0]["lr"] / full)
            learner.optimiser.step()
            learner.schedule.step()
        close(rates[:10], np.arange(1, 11) / 10)
        close(rates[10:end - 150], 1)
        close(rates[end - 150:end + 1], np.arange(150, -1, -1) / 150)
        assert rates[end - 1] > 0 and rates[end:] == [0, 0, 0]


def test_a_finished_run_with_more_steps_goes_on_at_the_rates_of_the_longer_one(model, agent):
    flags = dict(warmup=100, train_every=3, lr_warmup=10, lr_fall=0.5)
    finished, longer = (drama.make_learners(small(steps=steps, **flags), model, agent)[0]
                        for steps in (1000, 1450))  # 300 and 450 updates
    for _ in range(300):
        finished.optimiser.step()
        finished.schedule.step()
    longer.load_state_dict(finished.state_dict())
    for left in (150, 149):
        close([group["lr"] / longer.schedule.base_lrs[0] for group in
               longer.optimiser.param_groups], [left / 225] * 2)
        longer.optimiser.step()
        longer.schedule.step()


def test_the_weight_of_entropy_falls_with_the_rates(model, agent, monkeypatch):
    """At first the policy tries what it does not know; in the end it plays what it knows."""
    replay, told = make_replay(), []
    for fall, left in ((0.5, [1, 1, 1, 1, 1, 0.75, 0.5, 0.25]), (0.0, [1] * 8)):
        cfg = small(steps=100, warmup=20, train_every=10, lr_warmup=4, lr_fall=fall, entropy=0.3)
        _, learner = drama.make_learners(cfg, model, agent)
        monkeypatch.setattr(learner, "step", lambda losses, weights, step=learner.step:
                            told.append(weights) or step(losses, weights))
        for _ in left:
            drama.update_actor_critic(cfg, model, agent, learner, replay)
        close([weights.pop("entropy") for weights in told], 0.3 * np.array(left))
        assert all(weights == dict(policy=1, value=1, slow_value=1) for weights in told)
        told.clear()


@torch.no_grad()
def test_what_moved_weighs_more_at_the_cost_of_what_stands(model):
    model.cfg, model.decode = small(moving=4.0), lambda z: torch.full((len(z), 3, 16, 16), 0.25)
    frame = torch.randint(0, 256, (b, l, 16, 16, 3), dtype=torch.uint8)
    frame[:, 3:] = frame[:, 2:3]  # all stands still from here on,
    frame[0, 4, 1, 5, 2] ^= 1  # but for one colour of one pixel that comes and goes
    weight = np.ones((b, l, 16, 16))
    weight[:, 1:] += 4 * (frame[:, 1:] != frame[:, :-1]).any(-1).numpy()
    assert [(weight[0, t] == 5).sum() for t in (4, 5, 6)] == [1, 1, 0]
    error = ((frame.numpy() / 255 - 0.25) ** 2).sum(-1) * weight / weight.mean()
    close(model.reconstruction_error(torch.zeros(b, l, K * C), frame), error.sum((2, 3)))


@torch.no_grad()
def test_nothing_passes_the_line_between_two_episodes(model):
    def run(change):
        batch = make_batch((5,), (5,))
        batch.frame[:, change] = 255 - batch.frame[:, change]
        batch.action[:, change] = (batch.action[:, change] + 1) % ACTIONS
        torch.manual_seed(0)  # the same noise for the latents
        losses, _, kl = model.loss(batch)
        return {**losses, "kl": kl}

    plain, past, future = run(slice(0)), run(slice(5)), run(slice(5, l))
    for name in plain:
        close(past[name][:, 5:], plain[name][:, 5:], atol=1e-6, err_msg=name)
        close(future[name][:, :5], plain[name][:, :5], atol=1e-6, err_msg=name)
        assert not torch.allclose(past[name][:, 1:5], plain[name][:, 1:5])
        assert not torch.allclose(future[name][:, 6:], plain[name][:, 6:])
    for name in ("kl", "dynamics", "representation"):
        assert (plain[name][:, 5] == 0).all() and (future[name][:, 5] == 0).all()


def test_stop_gradients_of_the_world_model(model):
    model.cfg, encode, posts = small(free_bits=0.0), model.encode, []
    model.encode = lambda frame: posts.append(encode(frame)) or posts[-1]
    losses, z, kl = model.loss(make_batch((), ()))
    assert not z.requires_grad and not kl.requires_grad
    dynamics, representation = losses["dynamics"], losses["representation"]
    [by_dynamics] = torch.autograd.grad(dynamics.sum(), posts, retain_graph=True)
    [by_representation] = torch.autograd.grad(representation.sum(), posts, retain_graph=True)
    # the last latent is but a target of the prior; the earlier ones are its input too
    assert not by_dynamics[:, -1].any() and by_dynamics[:, :-1].any()
    for learns in (model.prior, *model.later, model.sequence):
        assert reaches(dynamics, learns)
    assert not by_representation[:, 0].any() and by_representation[:, 1:].all()
    assert reaches(representation, model.encoder) and not reaches(representation, model.prior)
    assert not reaches(representation, model.later) and not reaches(representation, model.sequence)
    for name in ("reconstruction", "reward", "termination"):  # through the straight-through sample
        assert reaches(losses[name], model.encoder), name
    model.cfg = small(free_bits=1e3)
    losses, _, _ = model.loss(make_batch((), ()))
    assert not reaches(losses["dynamics"] + losses["representation"], model)


def test_world_model_overfits_a_batch():
    torch.manual_seed(0)
    cfg, batch = small(model_lr=5e-3, cnn_width=8), make_batch((0,), (3,))
    batch.frame[:] = 25 * torch.arange(l)[:, None, None, None]  # frame t is of grey 25 t
    model = WorldModel(cfg, ACTIONS)
    learner, _ = drama.make_learners(cfg, model, ActorCritic(cfg, ACTIONS))
    start, *_, end = (learner.step(model.loss(batch)[0], model.weights) for _ in range(100))
    assert start["reconstruction"] > 5 * end["reconstruction"], end
    assert start["reward"] > 2.5 * end["reward"] and start["termination"] > 2 * end["termination"]


@torch.no_grad()
def test_imagination_step_by_step(model, agent):
    n, k, h = 7, 4, 6
    for net in (model.prior, *model.later):  # latents nearly certain: they show their prior
        net[-1].weight *= 300
    agent.actor[-1].weight *= 3
    z = F.one_hot(torch.randint(0, C, (n, k, K)), C).flatten(-2).float()
    action, first = torch.randint(0, ACTIONS, (n, k)), torch.zeros(n, k, dtype=torch.bool)
    first[0, 2] = first[1, k - 1] = first[2, 0] = True
    torch.manual_seed(7)
    dream = model.imagine(agent.actor, z, action, first)
    dreamt, d = dream.feature.split([K * C, small().d_model], -1)
    assert torch.equal(dreamt[:, 0], z[:, -1]) and dream.action.shape == (n, h)
    # the whole path in one forward pass: d_t of (z_t, a_t) foretells z_{t+1}, r_t and e_t
    actions = F.pad(torch.cat([action[:, :-1], dream.action], 1), (0, 1))
    path = torch.cat([z[:, :-1], dreamt], 1)
    want, _ = model.sequence(path, actions, first=F.pad(first, (0, h)))
    close(d, want[:, k - 2:-1] * ~F.pad(first[:, -1:], (0, h))[..., None])  # d_{-1} = 0
    want = want[:, k - 1:-1]
    close(dream.reward, model.two_hot.mean(model.reward(want)), rtol=1e-2)
    close(dream.end, model.termination(want)[..., 0].sigmoid())
    foretold = model.log_prior(want, dreamt[:, 1:]).argmax(-1)
    assert (one_hot(foretold) == dreamt[:, 1:]).float().mean() > 0.95
    assert foretold.unique().numel() > 2
    # the recorded action of the last context frame is not used
    torch.manual_seed(7)
    action[:, -1] = (action[:, -1] + 1) % ACTIONS
    again = model.imagine(agent.actor, z, action, first)
    assert all(torch.equal(x, y) for x, y in zip(dream, again, strict=True))


def test_dreams_follow_the_actor_and_leave_no_gradient_in_the_world_model(model, agent):
    chances = [0.1, 0.2, 0.3, 0.4]
    with torch.no_grad():
        agent.actor[-1].weight.zero_()
        agent.actor[-1].bias.copy_(torch.tensor(chances).log())
    z, zeros = torch.zeros(300, 4, K * C), torch.zeros(300, 4, dtype=torch.int64)
    dream = model.imagine(agent.actor, z, zeros, zeros.bool())
    assert chi_square(dream.action.flatten().bincount(), chances) < 4
    assert not any(x.requires_grad for x in dream)
    sum(loss.sum() for loss in agent.loss(dream)[0].values()).backward()
    assert all(p.grad is None for p in [*model.parameters(), *agent.slow_critic.parameters()])
    assert all(p.grad is not None for p in [*agent.actor.parameters(), *agent.critic.parameters()])


@torch.no_grad()
@pytest.mark.parametrize("groups", [1, K])
def test_the_dice_of_a_guess_fall_as_the_chain_rule_says(groups):
    model = scrambled(WorldModel(small(prior_groups=groups), ACTIONS), 0.5)
    d = torch.randn(small().d_model)
    every = torch.cartesian_prod(*[torch.arange(C)] * K)  # all throws, (C^K, K)
    z = one_hot(every)
    joint = (model.log_prior(d.expand(len(z), -1), z).flatten(-2) * z).sum(-1).exp()
    close(joint.sum(), 1)
    thrown = model.guess(d.expand(60_000, -1)).unflatten(-1, (K, C)).argmax(-1)
    counts = (thrown * torch.tensor([C * C, C, 1])).sum(-1).bincount(minlength=C**K)
    often = joint * len(thrown) > 6
    assert often.sum() > 30 and chi_square(counts[often], joint[often] / joint[often].sum()) < 4
    assert abs(counts[~often].sum() / len(thrown) - joint[~often].sum()) < 0.01
    apart = torch.stack([joint.new_zeros(C).index_add(0, die, joint) for die in every.T])
    product = apart.gather(1, every.T).prod(0)  # what dice that fall apart would have
    assert torch.allclose(product, joint, atol=1e-6) == (groups == 1)


def test_a_die_knows_the_groups_before_it_and_no_gradient_reaches_the_frame_ahead(model):
    z, d = one_hot(torch.ones(2, K)), torch.randn(2, small().d_model)
    for die in range(K):
        classes = torch.ones(2, K)
        classes[:, die] = 0
        told = (model.log_prior(d, one_hot(classes)) != model.log_prior(d, z)).any(-1).all(0)
        assert told.tolist() == [k > die for k in range(K)]
    kept, log_prior = [], model.log_prior
    model.log_prior = lambda d, z: kept.append(z) or log_prior(d, z)
    losses = model.loss(make_batch((), ()))[0]
    assert kept[0].shape == (b, l - 1, K * C) and not kept[0].requires_grad
    losses["dynamics"].sum().backward()
    learnt = [*model.prior.parameters(), *model.later.parameters()]
    assert all(p.grad.abs().sum() > 0 for p in learnt if p.ndim > 1)


def test_weight_decay_reaches_matrices_and_kernels_alone(model, agent):
    learner, acting = drama.make_learners(small(weight_decay=0.5, model_lr=0.01), model, agent)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    learner.optimiser.step()
    types = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.ConvTranspose2d)
    want = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, types)}
    for name, p in model.named_parameters():
        rate = 1 - 0.01 * 0.5 if name in want else 1
        close(p.detach(), before[name] * rate, rtol=1e-5, atol=0, err_msg=name)
    trained = [id(p) for group in acting.optimiser.param_groups for p in group["params"]]
    both = [*agent.actor.parameters(), *agent.critic.parameters()]
    assert sorted(trained) == sorted(map(id, both)) and len(want) > 10


def test_learner_warms_up_clips_and_refuses_what_is_not_finite():
    p, moved = torch.nn.Parameter(torch.zeros(2)), []
    learner = drama.Learner(torch.optim.SGD([p], 0.8), clip=5.0, warmup=4)
    for _ in range(6):
        before = p.tolist()
        means = learner.step(dict(a=p[:1] * 30, b=p[1:] * 80), dict(a=1.0, b=0.5))
        moved.append(np.subtract(before, p.tolist()))
    assert means["gradient_norm"] == pytest.approx(50)  # (30, 40), clipped to (3, 4)
    close(moved, np.outer([0.2, 0.4, 0.6, 0.8, 0.8, 0.8], [3, 4]))
    with pytest.raises(FloatingPointError, match="b"):
        learner.step(dict(a=p[:1], b=p[1:] * math.nan), dict(a=1.0, b=1.0))
    with pytest.raises(AssertionError):
        learner.step(dict(a=p[:1]), dict(a=1.0, b=1.0))
    assert p.isfinite().all()


# ---- actor and critic ---------------------------------------------------------------------------


@torch.no_grad()
def test_actor_critic_losses_against_numpy(agent):
    dream, cfg = make_dream(), small(return_floor=0.5)
    agent.cfg = cfg
    value = agent.two_hot.mean(agent.critic(dream.feature))
    R = drama.lambda_return(dream.reward, dream.end, value, cfg.gamma, cfg.lam)
    log_pi = np.log(softmax(agent.actor(dream.feature)))[:, :-1]
    log_bins = np.log(softmax(agent.critic(dream.feature)))[:, :-1]
    slow = agent.two_hot.mean(agent.slow_critic(dream.feature))[:, :-1]
    alive = np.ones((5, 6))
    for t in range(5):
        alive[:, t + 1] = alive[:, t] * (1 - dream.end[:, t].numpy())
    width = np.subtract(*np.percentile(R, [95, 5]))
    for old in (0.0, 300.0):  # below the floor the scale does not divide
        agent.scale.fill_(old)
        losses, _ = agent.loss(dream)
        scale = 0.99 * old + 0.01 * width
        assert agent.scale.item() == pytest.approx(scale, rel=1e-4)
        advantage = (R - value[:, :-1]).numpy() / max(0.5, scale)
        chosen = np.take_along_axis(log_pi, dream.action.numpy()[..., None], -1)[..., 0]
        want = dict(policy=-chosen * advantage, entropy=(np.exp(log_pi) * log_pi).sum(-1),
                    value=-(agent.two_hot.encode(R).numpy() * log_bins).sum(-1),
                    slow_value=-(agent.two_hot.encode(slow).numpy() * log_bins).sum(-1))
        assert agent.weights == dict(policy=1, entropy=cfg.entropy, value=1, slow_value=1)
        assert want.keys() == losses.keys()
        for name in want:
            assert losses[name].shape == (5, 6)
            close(losses[name], alive * want[name], err_msg=name)
    assert not (alive[0, 3:].any() or alive[1, 1:].any())  # after an end nothing is learnt


def test_stop_gradients_of_actor_and_critic(agent):
    dream, cfg, critic = make_dream(), small(), list(agent.critic.parameters())
    losses, _ = agent.loss(dream)
    for names, own, other in ((("policy", "entropy"), agent.actor, agent.critic),
                              (("value", "slow_value"), agent.critic, agent.actor)):
        for name in names:
            assert reaches(losses[name], own) and not reaches(losses[name], other), name
    assert not any(p.requires_grad for p in agent.slow_critic.parameters())
    # the target stands still: the gradient is that of the cross-entropy to a constant
    logits = agent.critic(dream.feature)
    value = agent.two_hot.mean(logits).detach()
    R = drama.lambda_return(dream.reward, dream.end, value, cfg.gamma, cfg.lam)
    alive = F.pad((1 - dream.end).cumprod(1), (1, 0), value=1.0)[:, :-1]
    cross = -(agent.two_hot.encode(R) * logits[:, :-1].log_softmax(-1)).sum(-1) * alive
    for got, want in zip(torch.autograd.grad(losses["value"].sum(), critic),
                         torch.autograd.grad(cross.sum(), critic), strict=True):
        close(got, want)


# ---- the player ---------------------------------------------------------------------------------


@torch.no_grad()
def test_player_carries_its_state_on_within_an_episode(model, agent):
    opens, n, steps = ((0, 9), (0, 5, 6), (0,)), 3, 18
    first = torch.tensor([[t in row for row in opens] for t in range(steps)])
    seen, player = [], Player(small(), model, agent, n, torch.device("cpu"))
    agent.actor.register_forward_pre_hook(lambda _, x: seen.append(x[0].clone()))
    frames = torch.randint(0, 256, (steps, n, 16, 16, 3), dtype=torch.uint8)
    acted = [player.act(frame, start) for frame, start in zip(frames, first, strict=True)]
    action, latent = (torch.stack(x) for x in zip(*acted, strict=True))
    z, d = torch.stack(seen).split([K * C, small().d_model], -1)
    assert torch.equal(z, F.one_hot(latent, C).flatten(-2).float())  # of the frame just seen
    assert not d[first].any() and d[~first].any(-1).all()
    want, _ = model.sequence(z.transpose(0, 1), action.T, first=first.T)  # all of it at once
    for t in range(1, steps):
        close(d[t], want[:, t - 1] * ~first[t, :, None])


@torch.no_grad()
def test_random_actions_are_uniform(model, agent):
    agent.actor[-1].bias.copy_(torch.tensor([9.0, 0, 0, 0]))
    frame, first = torch.zeros(800, 16, 16, 3, dtype=torch.uint8), torch.ones(800).bool()
    act = Player(small(), model, agent, 800, torch.device("cpu")).act
    assert chi_square(act(frame, first, at_random=True)[0].bincount(), [0.25] * 4) < 4
    assert (act(frame, first)[0] == 0).float().mean() > 0.75


# ---- GridWorld ----------------------------------------------------------------------------------


def test_best_return_of_gridworld_by_value_iteration():
    pairs, value = [(a, g) for a in range(9) for g in range(9) if a != g], np.zeros((9, 9))
    for _ in range(64):
        fresh, new = np.mean([value[pair] for pair in pairs]), np.zeros((9, 9))
        for a, g in pairs:
            near = [min(max(a // 3 + dy, 0), 2) * 3 + min(max(a % 3 + dx, 0), 2)
                    for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0))]
            new[a, g] = max(1 + fresh if cell == g else value[cell, g] for cell in near)
        value = new
    close(GridWorld.BEST, np.mean([value[pair] for pair in pairs]), atol=0.005)


def test_gridworld_plays_by_its_rules():
    n, returns = 60, 0
    env = drama.make_env("GridWorld", n, 10)  # two pixels a cell
    frame, _ = env.reset(seed=5)
    for t in range(64):
        assert frame.shape == (n, 1, 10, 10, 3) and frame.dtype == np.uint8
        assert not frame[:, 0, :2].any() and not frame[:, 0, :, -2:].any()  # walls
        cells = frame[:, 0, ::2, ::2]
        agent, goal = (np.argwhere((cells == x).all(-1)) for x in ((255, 0, 0), (255, 255, 0)))
        assert (agent[:, 0] == range(n)).all() and (goal[:, 0] == range(n)).all()
        dy, dx = (goal - agent)[:, 1:].T  # read off the picture, as a perfect player would
        action = np.where(dy, np.where(dy < 0, 0, 1), np.where(dx < 0, 2, 3))
        frame, reward, terminated, truncated, _ = env.step(action)
        assert (reward == (abs(dy) + abs(dx) == 1)).all() and not terminated.any()
        assert (truncated == (t == 63)).all()
        returns = returns + reward
    assert abs(returns.mean() - GridWorld.BEST) < 4 * returns.std() / math.sqrt(n)
    corner, other = np.array([0, 0]), np.array([2, 2])
    env.set_attr("agent", corner), env.set_attr("goal", other)
    _, reward, _, truncated, _ = env.step(action)  # the autoreset, which places both anew
    assert not reward.any() and not truncated.any()
    assert len({tuple(agent) for agent in env.get_attr("agent")}) == 9
    env.set_attr("agent", corner), env.set_attr("goal", other)
    frame, *_ = env.step(np.arange(n) % 2 * 2)  # up or left: a wall stops the agent
    assert (frame[:, 0, 2:4, 2:4] == (255, 0, 0)).all()


# ---- end to end ---------------------------------------------------------------------------------


def test_two_runs_with_one_seed_are_alike(no_pictures, tmp_path):
    tables = []
    for name in ("one", "two"):
        argv = ["--game", "GridWorld", *RUN, "--steps", "140", "--out", str(tmp_path / name)]
        assert drama.main(argv) == 0
        tables.append([[{**row, "seconds": ""} for row in read_csv(tmp_path / name / table)]
                       for table in ("metrics.csv", "episodes.csv")])
    assert tables[0] == tables[1]
    metrics, episodes = tables[0]
    assert [int(row["step"]) for row in metrics] == [40, 60, 80, 100, 120, 140]
    assert [int(row["updates"]) for row in metrics] == [1, 3, 6, 8, 11, 13]  # at 40, 48, 56, …
    assert [(row["step"], row["length"]) for row in episodes] == [("64", "64"), ("128", "64")]
    assert all(math.isfinite(float(x or 0)) for row in metrics for x in row.values())


def test_a_run_of_pong_writes_its_files_and_is_evaluated(tmp_path, capsys):
    argv = ["--game", "Pong", *RUN, "--out", str(tmp_path)]
    assert drama.main([*argv, "--steps", "300"]) == 0
    for name, frames in (("curves.png", 1), ("dream.png", 1), ("dream.gif", 4 + 12)):
        with Image.open(tmp_path / name) as image:
            image.load()
            assert f".{image.format.lower()}" == Path(name).suffix and min(image.size) > 100
            assert getattr(image, "n_frames", 1) == frames  # of context and dreamt
            assert len(image.convert("RGB").getcolors(1 << 24)) > 3
    settings = json.loads((tmp_path / "config.json").read_text())
    assert (settings["game"], settings["steps"], settings["batch_size"]) == ("Pong", 300, 3)
    assert read_csv(tmp_path / "metrics.csv")[-1]["step"] == "300"
    assert (tmp_path / "episodes.csv").exists()
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved["at"]["step"] == 300 and len(saved["replay"]["action"]) == 300
    capsys.readouterr()
    assert drama.main([*argv, "--eval", "1"]) == 0
    told = capsys.readouterr().out
    score = float(re.search(r"mean (-?\d+\.\d\d)\b", told)[1])
    assert -21 <= score <= 21 and float(re.search(r"scores: (\S+)", told)[1]) == score
    published = dict(random="-20.7", human="14.6", Drama="15")
    assert all(re.search(rf"\b{name} {x}(?![\d.])", told) for name, x in published.items())


def test_commands_of_the_readme_are_understood():
    text = (Path(drama.__file__).parent / "README.md").read_text()
    lines = re.findall(r"^ *(python drama\.py.*)", text.replace("\\\n", " "), re.M)
    argvs = [shlex.split(line, comments=True)[2:] for line in lines]
    assert argvs, "no command in README.md"
    helped = [f.metadata["help"] % () for f in dataclasses.fields(drama.Config)]  # no stray %
    assert all(1 < len(text) < 80 for text in helped)
    for argv in argvs:
        if argv == ["--help"]:
            with pytest.raises(SystemExit, match="0"):
                drama.parse(argv)
        else:
            drama.parse(argv)


def test_the_layout_of_frames_and_the_device_that_is_chosen():
    assert drama.layout(torch.device("mps")) == torch.contiguous_format
    x = drama.pixels(torch.zeros(2, 3, 8, 8, 3, dtype=torch.uint8))
    assert x.shape == (6, 3, 8, 8) and x.is_contiguous(memory_format=torch.channels_last)
    device, _ = drama.choose_device(drama.Config())
    assert device.type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("line, words", [
    ("--game Pnog", "Pnog.*try Pong"), ("--game mspacman", "try MsPacman"),
    ("--game gridworld", "GridWorld"), ("Pong", "Pong"),
    ("--device quantum", "quantum"), ("--preset huge", "huge.*paper.*laptop"),
    ("--gmae Pong", "--gmae"), ("--steps many", "--steps.*many"), ("--steps 0", "--steps 0"),
    ("--gamma nan", "--gamma nan"), ("--stored_latents maybe", "--stored-latents.*maybe"),
    ("--sampler best", "dfs.*uniform"), ("--image_size 60", "--image-size 60"),
    ("--image_size 48", "--image-size 48"), ("--headdim 7", "--headdim 7"),
    ("--prior_groups 3", "--prior-groups 3: must divide --categoricals"),
    ("--warmup 5", "--warmup 5"), ("--out file", "file"),
    ("--out file --eval 2", "file"), ("--out nothing --eval 2", "nothing"),
    ("--out empty --eval 2", "empty.*no whole checkpoint.*No such file")])
def test_bad_input_is_answered_with_one_line(line, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    Path("empty").mkdir()
    assert drama.main([*RUN, *shlex.split(line)]) == 2
    told = capsys.readouterr().err
    assert re.search(words, told) and re.fullmatch(r"drama\.py: [^\n]+\n", told), told
    assert Path("file").read_text() == "mine"


# ---- keeping a run: stop, go on, kill, break, refuse ---------------------------------------------
# The oracle: the same run, never disturbed.

os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
tqdm.monitor_interval = 0  # no thread of its own, so that the tests may fork
tqdm.set_lock(threading.RLock())  # a child killed while it holds the shared one stops the next
TINY = "--game GridWorld --preset tiny --device cpu --precision float32 --compile off".split()
STEPS, STOPS, SIZE = 88, (61, 77), 16 * 16 * 3  # STOPS fit neither log_every nor train_every
OUT, WHOLE = Path("run"), Path("whole")
NEWEST, CONFIG, FRAMES = (OUT / name for name in ("checkpoint.pt", "config.json", "frames.bin"))
needs_fork = pytest.mark.skipif(not hasattr(os, "fork") or sys.platform == "darwin",
                                reason="no fork here, or none that PyTorch survives")


def interrupt():
    signal.raise_signal(signal.SIGINT)


def go(flags="", out=OUT, steps=STEPS, at=None, act=interrupt, stub="draw_curves draw_dreams"):
    """main() on a tiny GridWorld, a checkpoint at its end; act() is called once row `at` is in."""
    def add(self, *row):
        original(self, *row)
        if self.size == at:
            act()

    flags = f"--out {out} --steps {steps} --save_every 1e6 {flags}"
    with pytest.MonkeyPatch.context() as patch:
        original = drama.Replay.add
        patch.setattr(drama.Replay, "add", add)
        for name in stub.split():
            patch.setattr(pictures, name, lambda *_: None)
        return drama.main([*TINY, *flags.split()])


def fork(*args, **options) -> int:
    """`go` in a child that need not import torch again -> its pid; what it says goes to ./log."""
    pid = os.fork()
    if not pid:
        code = 99
        try:
            sys.stdout = sys.stderr = open("log", "a", buffering=1)
            code = go(*args, **options)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@contextmanager
def disk(act):
    """act() is called before whatever is made durable or renamed."""
    def call(original, *args):
        act()
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        for original in (os.fsync, os.replace):
            patch.setattr(os, original.__name__, partial(call, original))
        yield


def snapshot() -> dict:
    return {p.name: p.read_bytes() for p in OUT.iterdir() if p.name != "lock"}


def load(path=NEWEST) -> dict:
    return torch.load(path, weights_only=True)


def finite() -> bool:
    return all(x.isfinite().all() for part in ("model", "agent") for x in load()[part].values())


def rows(name, out=OUT) -> list[dict]:
    """A table, which must be whole, less its seconds, which must not fall."""
    text = (out / f"{name}.csv").read_bytes().decode()
    table = list(csv.DictReader(text.splitlines()))
    assert text.endswith("\n") and not any(None in (*row, *row.values()) for row in table)
    seconds = [float(row.pop("seconds")) for row in table]
    assert seconds == sorted(seconds)
    return table


def assert_same(a, b, where="checkpoint"):
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a.keys() - {"seconds", "tables", "out", "steps", "save_every", "draw_every"}:
            assert_same(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{where}[{i}]")
    else:
        tensors = isinstance(a, torch.Tensor)
        assert torch.equal(a, b) and a.dtype == b.dtype if tensors else a == b, where


def assert_same_as_whole():
    """Weights, moments, generators, replay, frames and tables, bit for bit."""
    assert_same(load(), load(WHOLE / "checkpoint.pt"))
    assert all(rows(name) == rows(name, WHOLE) for name in ("metrics", "episodes"))
    assert FRAMES.read_bytes() == (WHOLE / "frames.bin").read_bytes()


def assert_grid_world():
    """Every stored row obeys the rules of the grid world, played here anew from the pixels."""
    saved, n = load(), load()["at"]["step"]
    frames, replay = np.fromfile(FRAMES, np.uint8).reshape(n, 16, 16, 3), saved["replay"]
    centres, index = ((np.arange(5) + 0.5) * 16 / 5).astype(int), np.arange(n)
    cells = frames[:, centres][:, :, centres]  # (n, 5, 5, 3)
    agent, goal = (np.argwhere((cells == rgb).all(-1)) for rgb in ((255, 0, 0), (255, 255, 0)))
    assert (agent[:, 0] == index).all() and (goal[:, 0] == index).all()  # one of each in each frame
    agent, goal, move = agent[:, 1:], goal[:, 1:], np.array([(-1, 0), (1, 0), (0, -1), (0, 1)])
    after = (agent + move[replay["action"]]).clip(1, 3)
    reached = (after == goal).all(-1)
    first = replay["first"].numpy()
    assert (replay["reward"].numpy() == reached).all() and not replay["terminated"].any()
    assert (first == (index % 64 == 0)).all() and saved["at"]["first"] == (n % 64 == 0)
    stays = ~reached[:-1] & ~first[1:]
    assert (agent[1:] == after[:-1])[stays].all() and (goal[1:] == goal[:-1])[stays].all()


def refused(capsys, *words, code=2, changed=(), **options):
    """The run ends in one line that has these words, and no file but `changed` is touched."""
    before = snapshot()
    capsys.readouterr()
    assert go(**options) == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("drama.py: ") and "drama.py:" not in str(lines[:-1]), lines
    assert all(word in lines[-1] for word in words), (words, lines)
    now = snapshot()
    assert {k for k in {*before, *now} if before.get(k) != now.get(k)} <= {*changed}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """Two runs: WHOLE in one go; OUT stopped at both STOPS."""
    path = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        assert go(out=WHOLE) == 0
        assert [go(at=step) for step in STOPS] == [130, 130]
    return path


@pytest.fixture
def run(base, here):
    shutil.copytree(base, ".", dirs_exist_ok=True)


# ---- go on, extend, refuse other settings -------------------------------------------------------


@pytest.mark.parametrize("flags", ["", pytest.param(
    "--stored_latents false --sampler uniform", marks=pytest.mark.slow)])
def test_three_pieces_equal_one(flags, capsys):
    flags += " --picture_steps 1"
    assert go(flags, out=WHOLE) == 0
    assert go(flags, at=45) == 130
    assert go(flags, steps=77) == 0
    stored = {**snapshot(), "config.json": b""}
    for steps in (77, 50):
        capsys.readouterr()
        assert go(flags, steps=steps) == 0
        said = capsys.readouterr().out
        assert "finished at step 77" in said and "larger --steps" in said
        assert {**snapshot(), "config.json": b""} == stored
    assert go(flags + " --draw_every 0", stub="draw_curves") == 0  # pictures must not disturb it
    assert_same_as_whole()
    assert_grid_world()
    assert [row["step"] for row in rows("metrics")] == ["40", "60", "80"]
    assert [row["step"] for row in rows("episodes")] == ["64"]


def test_the_slow_critic_follows_the_critic(run):
    agent = load()["agent"]
    fast, slow = (agent[f"{k}.3.weight"].abs().max() for k in ("critic", "slow_critic"))
    assert fast > slow > 0  # both started at zero


def test_other_settings_are_refused(run, capsys):
    for flags, *words in (("--gamma 0.5 --seed 3", "gamma (was 0.985, now 0.5)", "seed (was 0"),
                          ("--context 5", "context (was 4"), ("--game Pong", "game")):
        refused(capsys, *words, flags=flags)
    CONFIG.write_text("for a reader only")
    assert go("--draw_every 7 --eval_envs 2") == 0  # these may change
    assert json.loads(CONFIG.read_text())["draw_every"] == 7
    refused(capsys, "gamma (was 0.985, now 0.5)", flags="--eval 1 --gamma 0.5")


def test_atari_goes_on_with_a_new_episode():
    assert go("--game Pong", steps=60, at=47) == 130
    before, frames = load(), FRAMES.read_bytes()[:47 * SIZE]
    assert go("--game Pong", steps=60) == 0
    after = load()
    assert after["replay"]["first"].nonzero().flatten().tolist() == [0, 47]
    assert FRAMES.read_bytes()[:47 * SIZE] == frames
    for name in ("action", "reward", "terminated", "first"):
        assert torch.equal(after["replay"][name][:47], before["replay"][name])
    assert (before["at"]["length"], after["at"]["length"]) == (47, 13)


# ---- signals, kills, locks ----------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 33, 85])
def test_sigterm(at, run, capsys):
    if at < STOPS[1]:
        shutil.rmtree(OUT)
    assert go(at=at, act=lambda: signal.raise_signal(signal.SIGTERM)) == 143
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"stopped at step {at}; the same command goes on")
    assert load()["at"]["step"] == at
    assert go() == 0
    assert_same_as_whole()


@needs_fork
def test_second_signal_leaves_at_once(run):
    before, sent = snapshot(), []
    with disk(lambda: sent and (interrupt(), os._exit(98))):
        assert exit_code(fork(at=85, act=lambda: (sent.append(1), interrupt()))) == 130
    assert snapshot()[NEWEST.name] == before[NEWEST.name]
    assert go() == 0
    assert_same_as_whole()


@needs_fork
def test_a_killed_run_lets_go_of_its_lock(run):
    pid = fork(at=85, act=lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert exit_code(pid) == -signal.SIGKILL and rows("metrics")[-1]["step"] == "80"
    assert go() == 0
    assert_same_as_whole()


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGINT to another process")
def test_second_process_and_ctrl_c(capsys):
    flags = "--out run --steps 9999 --save_every 0.1 --picture_steps 2".split()
    table = OUT / "metrics.csv"
    with subprocess.Popen([sys.executable, drama.__file__, *TINY, *flags], text=True,
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while process.poll() is None and not (table.exists() and len(rows("metrics"))):
            time.sleep(0.1)
        assert go() == 2 and "run is in use by another process" in capsys.readouterr().err
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=100)[1]
    assert process.returncode == 130 and "Traceback" not in said
    assert said.splitlines()[-1].startswith(f"stopped at step {load()['at']['step']}; the same")
    for name in ("curves.png", "dream.png", "dream.gif"):
        assert (OUT / name).stat().st_size > 1000


class Killed(BaseException):
    """Ends main as a kill would: nothing handles it."""


@pytest.mark.parametrize("error", [Killed(), pytest.param(
    OSError(errno.ENOSPC, "No space left"), marks=pytest.mark.slow)])
def test_every_point_of_a_save(error, base, capsys):
    """Killed or out of disk at the k-th fsync or rename: the checkpoint is the old or the new."""
    def fail(calls):
        if next(calls, None) is None:
            raise error

    for k in range(99):
        shutil.rmtree(OUT, ignore_errors=True)
        shutil.copytree(base, ".", dirs_exist_ok=True)
        capsys.readouterr()
        try:
            with disk(partial(fail, iter(range(k)))):
                code = go("--save_every 0", steps=STOPS[1] + 2)
        except Killed:
            code = 2
        said = capsys.readouterr().err
        if code and not isinstance(error, Killed):
            assert "No space left; what was saved is as before" in said.splitlines()[-1]
        assert go() == 0, (k, said)
        assert "from step 7" in capsys.readouterr().out, k
        assert_same_as_whole()
        if not code:
            break
    assert code == 0 and k > 7


@pytest.mark.slow
@needs_fork
def test_torture(base, capsys):
    """SIGKILL at random moments, a slow disk, checkpoints all the time: no trace in the end."""
    rng, kills, steps, left, torn, seen = random.Random(1), 0, 400, {}, 0, [0]
    with disk(lambda: time.sleep(0.01)):
        while kills < 50:
            pid = fork(f"--save_every {rng.choice((0, 0.05))}", steps=steps)
            time.sleep(rng.uniform(*rng.choice(((0.05, 0.5), (0.5, 2)))))
            os.kill(pid, signal.SIGKILL)
            code = exit_code(pid)
            assert code in (0, -signal.SIGKILL), Path("log").read_text()[-3000:]
            kills, steps = kills + (code != 0), steps + 200 * (code == 0)
            before, left = left, {p: p.stat().st_mtime_ns for p in OUT.glob("checkpoint.new")}
            torn += bool(left.items() - before.items())
            seen += [load()["at"]["step"]] if NEWEST.exists() else []
    assert exit_code(fork(steps=steps)) == 0, Path("log").read_text()[-3000:]
    assert go(out=WHOLE, steps=steps) == 0
    assert_same_as_whole()
    assert_grid_world()
    assert [int(row["step"]) for row in rows("metrics")] == [*range(40, steps + 1, 20)]
    assert [int(row["step"]) for row in rows("episodes")] == [*range(64, steps + 1, 64)]
    with capsys.disabled():
        print(f" {kills} kills, {torn} in a write, at {len({*seen})} of {steps} steps", end=" ")
    assert seen == sorted(seen) and torn > 2 and len({*seen}) > 10


# ---- broken files, numbers that are not ---------------------------------------


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("boom",)


def put(content):
    NEWEST.write_bytes(content) if isinstance(content, bytes) else torch.save(content, NEWEST)


def flip(path):
    """One bit of a weight."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 64
    path.write_bytes(content)


def put_foreign(flags):
    assert go(flags, out=Path("other"), steps=9) == 0
    shutil.copy("other/checkpoint.pt", NEWEST)


@pytest.mark.parametrize("damage, words", [
    (lambda: put(b""), "checkpoint.pt: no whole checkpoint"),
    (lambda: put(b"PK" + bytes(99)), "checkpoint.pt: no whole checkpoint"),
    (lambda: os.truncate(NEWEST, 1000), "checkpoint.pt: no whole checkpoint"),
    (lambda: flip(NEWEST), "checksum"),
    (lambda: put(dict(config=Bomb())), "checkpoint.pt: no whole checkpoint"),
    (lambda: put(pickle.dumps(Bomb())), "checkpoint.pt: no whole checkpoint"),
    (lambda: put([1]), "checkpoint.pt: no whole checkpoint"),
    (lambda: put_foreign("--game Pong"), "checkpoint.pt has other settings: game"),
    (lambda: put_foreign("--d_model 24"), "checkpoint.pt has other settings: d_model"),
    (lambda: os.truncate(FRAMES, STOPS[1] * SIZE - 1), "frames.bin does not fit (RuntimeError"),
    (FRAMES.unlink, "frames.bin does not fit (FileNotFound")], ids=range(11))
def test_damage_is_refused(damage, words, run, capsys):
    damage()
    refused(capsys, *words.split())
    assert not Path("boom").exists()


@pytest.mark.parametrize("error, words", [
    (MemoryError(), "out of memory"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"), "out of memory. Tried"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "allocate memory"),
    (OSError("encoder error"), "encoder error; what was saved is as before")])
def test_what_goes_wrong_is_a_line(error, words, run, capsys, monkeypatch):
    def fail(*args, **options):
        raise error

    for owner, name in ((torch, "load"), (drama.Replay, "load_state_dict")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            refused(capsys, str(error)[:40] or "MemoryError")  # the true reason is in the line
    monkeypatch.setattr(drama.Replay, "add", fail)
    assert go() == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert words in said and "None" not in said


@pytest.mark.parametrize("owner, name", [("WorldModel", "dynamics"), ("ActorCritic", "value")])
def test_not_a_number_stops_the_run(owner, name, run, capsys, monkeypatch):
    def loss(self, *args):
        losses, *rest = original(self, *args)
        return {**losses, name: losses[name] * (torch.nan if before else 1)}, *rest

    before, original = {}, getattr(drama, owner).loss
    monkeypatch.setattr(getattr(drama, owner), "loss", loss)
    refused(capsys, f": {name} is not finite", code=1, changed=snapshot(),
            flags="--save_every 0", at=80, act=lambda: before.update(snapshot()))
    assert snapshot() == before and load()["at"]["step"] == 79 and finite()
    assert go(out=Path("new")) == 1  # at its first update, when there is no checkpoint to name
    assert "is not finite" in capsys.readouterr().err.splitlines()[-1]
    before.clear()
    assert go() == 0
    assert_same_as_whole()


# ---- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("f", dataclasses.fields(drama.Config), ids=lambda f: f.name)
def test_every_flag_works_or_is_refused(f, capsys):
    wrong, accepted = {"word", "", "-1", "1e400", "nan", "9" * 30}, 0
    kind = type(f.default)
    wrong = {str: set(), bool: wrong | {"0"}, float: wrong, int: wrong | {"1.5"}}[kind]
    allowed = *f.metadata.values(), *(f.metadata["choices"] or ())
    for value in {*wrong, "0", "-0.5", "1", "2", "true", *map(str, allowed)}:
        try:
            cfg, _ = drama.parse([*TINY, f"--{f.name}={value}"])
        except drama.Refusal as refusal:
            assert f"--{f.name.replace('_', '-')}" in str(refusal) and "\n" not in str(refusal)
            continue
        assert value not in wrong
        accepted += 1
        if kind is not int or int(value) <= 64:
            model, agent = drama.WorldModel(cfg, 4), drama.ActorCritic(cfg, 4)
            drama.make_learners(cfg, model, agent)
            z = model.encode(torch.zeros(2, 3, *(cfg.image_size,) * 2, 3, dtype=torch.uint8))
            assert z.shape == (2, 3, cfg.categoricals, cfg.classes)
    assert accepted or kind is str
    assert drama.main([*TINY, f"--{f.name}"]) == 2  # no value
    assert f"--{f.name.replace('_', '-')}: expected one argument" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [
    "--log_every 1 --layers 1 --d_conv 1 --context 2 --horizon 1 --save_every 0",
    "--unimix 0 --gamma 0 --lam 0 --batch_size 1 --dreams 1 --free_bits 0 --temperature 0.001",
    "--gamma 1 --lam 1 --sampler uniform --stored_latents false --precision bfloat16 --dropout 0",
    "--chunk_size 1 --bins 3 --slow_decay 0 --return_decay 1 --return_floor 0.001 --batch_length 2",
    "--image_size 12 --first_stride 3 --categoricals 1 --classes 2 --prior_groups 1 --d_state 1",
    "--dreams 500 --batch_size 30 --horizon 17 --chunk_size 99 --expand 1 --headdim 1 "
    "--temperature 1e9"])
def test_edge_values_run(flags):
    assert go(flags, steps=56) == 0
    assert load()["model_learner"]["schedule"]["last_epoch"] == 3 and finite()


def test_impossible_places(capsys):
    Path("file").write_text("")
    for flags in ("--out file", "--out file/run", f"--out {'x' * 3000}", "--device word",
                  "--device cuda:99", "--device meta", "--game Pnog", "--nonsense 3",
                  "--out nowhere --eval 1"):
        assert go(flags) == 2, flags
        assert len(capsys.readouterr().err.splitlines()) == 1, flags
    assert not Path("nowhere").exists() and Path("file").read_text() == ""


def test_preset_fits_the_game():
    for flags, preset in (("", "laptop"), ("--device cuda:0", "laptop"), ("--preset tiny", "tiny"),
                          ("--game GridWorld", "gridworld")):
        assert drama.parse(flags.split())[0].preset == preset


@pytest.mark.parametrize("game, levels", [("GridWorld", ["best possible"]), ("Tennis", []),
                                          ("Pong", ["random", "human", "Drama"])])
def test_curves_show_the_levels_of_their_game(game, levels, tmp_path):
    for name, text in (("episodes", "step,return\n9,1.5\n"), ("metrics", "step,kl\n")):
        (tmp_path / f"{name}.csv").write_text(text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as of a legend with nothing in it
        figure = pictures.draw_curves(tmp_path, game)
    labels = [line.get_label() for line in figure.axes[0].lines]
    assert labels == ["return", *levels] and (tmp_path / "curves.png").exists()


@pytest.mark.slow
def test_gridworld_is_learnt(tmp_path):
    """Three quarters of the README's run: its last ten episodes beat every random one."""
    flags = f"--game GridWorld --device cpu --compile off --steps 6000 --out {tmp_path}"
    assert drama.main(flags.split()) == 0
    with open(tmp_path / "episodes.csv") as file:
        episodes = [(int(row["step"]), float(row["return"])) for row in csv.DictReader(file)]
    at_random = [score for step, score in episodes if step < 3000]
    learnt = [score for _, score in episodes[-10:]]
    assert len(at_random) > 40
    assert np.mean(learnt) > max(15, max(at_random)) > np.mean(at_random) + 3


# ---- the page on which one plays in the dream, and the weights that come with the code -----------
# The oracles: the scan over the whole history for the state carried on; a real browser.

sys.path.insert(0, str(Path(drama.__file__).parent / "experiments"))
import export  # noqa: E402
import film  # noqa: E402
import play as page  # noqa: E402


def write_checkpoint(path, game="GridWorld", **changes):
    """A checkpoint of training with random weights, on disk -> cfg, model, agent."""
    cfg = small(game=game, **changes)
    num_actions = drama.make_env(game, 1, cfg.image_size).single_action_space.n
    model, agent = scrambled(WorldModel(cfg, num_actions)), scrambled(ActorCritic(cfg, num_actions))
    with torch.no_grad():  # a dream that never ends
        model.termination[-1].weight.zero_()
        model.termination[-1].bias.fill_(-50)
    torch.save(dict(config=dataclasses.asdict(cfg), at=dict(step=1234),
                    replay=torch.zeros(999), model=model.state_dict(), agent=agent.state_dict()),
               path)
    return cfg, model, agent


@pytest.fixture
def stage():
    """The game and the dream on a GridWorld, by a model that knows nothing."""
    cfg, model, agent = write_checkpoint(Path("checkpoint.pt"))
    return page.Stage(cfg, model, agent, seed=3)


def test_what_is_exported_is_the_same_agent_in_half_the_bytes(capsys):
    Path("run").mkdir()
    cfg, model, agent = write_checkpoint(NEWEST)
    assert export.main(["run", "Grid.pt"]) == 0
    assert "GridWorld at step 1,234" in capsys.readouterr().out
    saved = torch.load("Grid.pt", weights_only=True)
    assert saved["config"] == dataclasses.asdict(cfg) and saved["at"] == {"step": 1234}
    assert saved.keys() == {"config", "at", "model", "agent"}
    for name, weight in model.state_dict().items():
        kept = saved["model"][name]
        assert kept.dtype == (torch.float16 if weight.ndim > 1 else weight.dtype)
        close(kept.float(), weight.float(), err_msg=name)
    cpu = torch.device("cpu")
    its_model, its_agent = drama.rebuild(drama.load_checkpoint(Path("Grid.pt"), cpu, {}), cfg,
                                            cpu)
    assert its_model.posterior.weight.dtype == torch.float32 and not its_model.training
    feature = torch.randn(6, cfg.d_z + cfg.d_model)
    close(its_agent.actor(feature).detach(), agent.actor(feature).detach(), atol=0.02)
    close(its_agent.slow_critic(feature).detach(), its_agent.critic(feature).detach(), atol=0)
    # one critic in the file, not two
    torch.save(saved | {"agent": {k: v.clone() for k, v in saved["agent"].items()}}, "twice.pt")
    critic = sum(x.numel() for x in agent.critic.state_dict().values())
    assert Path("twice.pt").stat().st_size - Path("Grid.pt").stat().st_size > 2 * critic


def test_exported_weights_are_scored_without_a_run_folder(capsys):
    """The oracle: the run's own checkpoint, all of whose weights are exact in half precision."""
    Path("run").mkdir()
    write_checkpoint(NEWEST)
    saved = torch.load(NEWEST, weights_only=True)
    for part in ("model", "agent"):
        saved[part] = {name: x.half().to(x.dtype) for name, x in saved[part].items()}
    torch.save(saved, NEWEST)
    assert export.main(["run", "Grid.pt"]) == 0
    capsys.readouterr()

    def told(line):
        assert drama.main(["--device", "cpu", "--eval", "5", *line.split()]) == 0
        return capsys.readouterr().out

    run, seed = told("--out run"), told("--checkpoint Grid.pt --seed 1")
    assert "GridWorld at step 1,234, 5 episodes" in run and not Path("runs").exists()
    assert told("--checkpoint Grid.pt") == run != seed
    evaluation = json.loads((OUT / "evaluation.json").read_text())
    assert evaluation["seed"] == 0 and f"mean {evaluation['mean']:.2f}" in run
    for flags, words in (("--game Pong", "game (was GridWorld, now Pong)"),
                         ("--d-model 128", "d_model (was 14, now 128)")):
        assert drama.main(["--eval", "5", "--checkpoint", "Grid.pt", *flags.split()]) == 2
        refusal = capsys.readouterr().err
        assert words in refusal and "Grid.pt" in refusal and refusal.count("\n") == 1
    # and the page plays from the same file
    assert page.main("--checkpoint Grid.pt --gif it.gif --steps 2".split()) == 0


@pytest.mark.parametrize("held, pong, full, grid", [
    ("", "NOOP", "NOOP", None), ("FIRE", "FIRE", "FIRE", None), ("UP", "RIGHT", "UP", "UP"),
    ("DOWN", "LEFT", "DOWN", "DOWN"), ("DOWN FIRE", "LEFTFIRE", "DOWNFIRE", "DOWN"),
    ("UP LEFT", "LEFT", "UPLEFT", "UP"), ("UP LEFT FIRE", "LEFTFIRE", "UPLEFTFIRE", "UP"),
    ("LEFT RIGHT", "NOOP", "NOOP", None), ("UP DOWN LEFT", "LEFT", "LEFT", "LEFT")])
def test_keys_ask_for_an_action_of_the_game(held, pong, full, grid):
    for game, want in (("Pong", pong), ("Boxing", full), ("GridWorld", grid)):
        names = page.action_names(drama.make_env(game, 1, 16))
        got = page.action_of(set(held.split()), names)
        assert (got if got is None else names[got]) == want, game


def test_game_and_dream_take_one_action_and_their_states_are_the_scans(stage):
    model, seen = stage.model, []
    frames, opens = [stage.frame], [True]
    for t in range(75):  # an episode has 64 steps
        before = stage.z.clone()
        if t == 20:
            stage.restart()
            before[1] = before[0]
            assert stage.dreamt == 0 and stage.sums == [0, 0]
        stage.step(t % 3)
        assert stage.action == t % 3
        seen.append(before)
        frames.append(stage.frame)
        opens.append(stage.surprise is None)
    assert [t for t, new in enumerate(opens) if new] == [0, 64] and stage.steps == 75
    z, action = torch.stack(seen, 1), torch.arange(75) % 3  # (2, 75, K*C)
    with torch.no_grad():
        d, _ = model.sequence(z[:1], action[None], first=torch.tensor([opens[:-1]]))
        close(stage.d[0], d[0, -1])
        posterior, prior = model.encode(torch.from_numpy(np.array(frames[-1])[None])), \
            model.log_prior(d[:, -1], stage.z[:1])
        kl = (posterior.exp() * (posterior - prior)).sum()
        close(stage.surprise, kl)
        # the dream: what the game had seen by step 20, then its own draws, and no reset at 64
        past = torch.cat([z[:1, :20], z[1:, 20:]], 1)
        d, _ = model.sequence(past, action[None], first=torch.tensor([opens[:1] + [False] * 74]))
        close(stage.d[1], d[0, -1])
        close(stage.logp[1], model.log_prior(d[0, -1], stage.z[1]))
        close(stage.reward[1], model.two_hot.mean(model.reward(d[0, -1])))
    assert stage.dreamt == 55 and stage.ended is None and abs(stage.end[1]) < 1e-6


def test_a_dream_starts_again_from_a_moment_of_the_game(stage, monkeypatch):
    monkeypatch.setattr(page, "REMEMBER_EVERY", 7)
    for _ in range(page.REMEMBER_EVERY * 10):
        stage.step(0)
        if stage.steps == page.REMEMBER_EVERY * 4:
            z, d, frame = stage.z[0], stage.d[0], stage.frame
    every = page.REMEMBER_EVERY
    assert list(stage.moments) == [every * i for i in range(3, 11)]  # the last eight
    game = stage.z[0], stage.d[0]
    stage.restart(stage.moments[every * 4])
    assert (stage.z[1] == z).all() and (stage.d[1] == d).all()
    assert (stage.moments[every * 4].frame == frame).all() and stage.began == every * 4
    assert (stage.z[0] == game[0]).all() and (stage.d[0] == game[1]).all()  # the game goes on


def test_the_end_of_a_dream_is_said_once(stage):
    with torch.no_grad():
        stage.step(0)
        stage.model.termination[-1].bias.fill_(50)
        for _ in range(5):
            stage.step(1)
    stage.high = False
    edges = page.shoot(stage)[0][:, [0, -1]]  # (3, 2, W, 3): top and bottom of each picture
    assert stage.ended == 2 and (edges[2] == (255, 0, 0)).all()
    assert (edges[:2] == stage.pictures[:2, [0, -1]] & 0xf8).all()
    stage.restart()
    assert stage.ended is None
    assert (page.shoot(stage)[0] == stage.pictures & 0xf8).all()


class Seat:
    """A tab at a server in this process: `ask` sends a request, `state` is what it is shown."""

    def __init__(self, stage, name="one", **settings):
        self.name, self.stage = name, stage
        self.desk = page.Desk(dict(game="GridWorld", trained=1, actions=stage.names,
                                   speeds=page.SPEEDS, surprised=page.SURPRISED, checkpoint="x.pt"))
        self.desk.settings |= settings
        self.server = page.Server("127.0.0.1", 0, self.desk)
        self.port = self.server.server_address[1]

    def __enter__(self):
        self.threads = [threading.Thread(target=page.perform, args=(self.stage, self.desk)),
                        threading.Thread(target=self.server.serve_forever, args=(0.01,))]
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.desk.closed = True
        self.server.shutdown()
        self.server.server_close()
        for thread in self.threads:
            thread.join()

    def ask(self, method, path, body=None, **headers):
        """One request -> status, headers, body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        reply = connection.getresponse()
        answer = reply.status, reply.headers, reply.read()
        connection.close()
        return answer

    def state(self, tab="one"):
        """What the page would show now."""
        status, headers, body = self.ask("GET", f"/frame?tab={tab}&after=0")
        assert status == 200
        return json.loads(body) | {"pad": headers["Pad"]}

    def until(self, true):
        """Wait for a state of which `true` holds -> that state."""
        end = time.monotonic() + 20
        while not true(state := self.state()):
            assert time.monotonic() < end, state
        return state

    def control(self, name, value=None, tab="one"):
        """Press a button -> status."""
        return self.ask("POST", "/control", dict(tab=tab, name=name, value=value))[0]


def test_keys_and_buttons_do_what_they_say(stage):
    with Seat(stage, speed=60) as seat:
        assert seat.until(lambda s: s["step"] > 3)["player"] == "agent"
        assert seat.control("player", "you") == 200
        still = seat.until(lambda s: s["player"] == "you")["step"]
        time.sleep(0.2)  # GridWorld has no NOOP: without a key it waits
        assert seat.state()["step"] == still
        assert seat.ask("POST", "/key", dict(tab="one", held=["d"]))[0] == 200
        held = seat.until(lambda s: s["step"] > still + 2)
        assert stage.names[held["action"]] == "RIGHT" and seat.control("paused", True) == 200
        seat.ask("POST", "/key", dict(tab="one", held=["arrowup"]))
        seat.ask("POST", "/key", dict(tab="one", held=[]))
        still = seat.until(lambda s: s["paused"])["step"]
        assert seat.control("step") == 200  # a key let go before the step counts for it
        stepped = seat.until(lambda s: s["step"] > still)
        assert stepped["step"] == still + 1 and stage.names[stepped["action"]] == "UP"
        assert stepped["dreamt"] == still + 1 and seat.control("restart") == 200
        assert seat.until(lambda s: s["dreamt"] == 0)["step"] == still + 1
        for name, value in (("player", "agent"), ("eyes", "dream"), ("paused", False)):
            assert seat.control(name, value) == 200
        moment = seat.until(lambda s: s["moments"])["moments"][0]
        with Image.open(io.BytesIO(seat.ask("GET", f"/moment?step={moment}")[2])) as picture:
            assert (np.array(picture) == seat.desk.moments[moment].frame).all()
        assert seat.control("restart", moment) == 200
        assert seat.until(lambda s: s["began"] == moment)["eyes"] == "dream"
        assert seat.ask("GET", "/recording.gif")[0] == 404
        seat.control("recording", True)
        seat.until(lambda s: s["shots"] >= 5)
        seat.control("recording", False)
        shots = seat.until(lambda s: not s["recording"])["shots"]
        with Image.open(io.BytesIO(seat.ask("GET", "/recording.gif")[2])) as image:
            assert image.format == "GIF" and 2 <= image.n_frames <= shots
        seat.control("paused", True)
        seat.control("recording", True)
        assert seat.until(lambda s: s["paused"] and s["recording"])["shots"] == 0  # a new reel


def test_one_tab_plays_and_the_others_watch(stage, monkeypatch):
    monkeypatch.setattr(page, "PATIENCE", 0.5)
    with Seat(stage, speed=60) as seat:
        assert seat.state()["pad"] == "yours"
        assert seat.state(tab="two")["pad"] == "taken"
        assert seat.control("paused", True, tab="two") == 409
        assert seat.ask("POST", "/key", dict(tab="two", held=["w"]))[0] == 409
        assert not seat.desk.settings["paused"] and not seat.desk.held
        seat.ask("POST", "/key", dict(tab="one", held=["w"]))
        time.sleep(0.6)  # the first has left
        assert seat.state(tab="two")["pad"] == "yours" and not seat.desk.held
        assert seat.control("paused", True, tab="two") == 200
        assert seat.state()["pad"] == "taken"


def test_many_tabs_at_once(stage):
    with Seat(stage, speed=60) as seat:
        tabs = [http.client.HTTPConnection("127.0.0.1", seat.port, timeout=20) for _ in range(50)]
        for _ in range(2):
            for i, tab in enumerate(tabs):
                tab.request("GET", f"/frame?tab={i}&after=0")
            replies = [tab.getresponse() for tab in tabs]
            assert all(reply.status == 200 and json.loads(reply.read()) for reply in replies)
            assert [reply.headers["Pad"] for reply in replies].count("yours") == 1
        for tab in tabs:
            tab.close()
        step = seat.state()["step"]
        seat.until(lambda s: s["step"] > step + 5)


def test_a_late_step_is_dropped_not_made_up_for(monkeypatch):
    now = [10.0]
    monkeypatch.setattr(page, "time", SimpleNamespace(monotonic=lambda: now[0]))
    pace = page.Pace()
    for begun, end, due, late in ((10, 10.2, 11, 0), (11, 11.2, 12, 0), (12, 15.5, 15.5, 2),
                                  (15.5, 15.7, 16.5, 2), (16.5, 17.9, 17.5, 2)):
        now[0] = end
        pace.took(begun, period=1)
        assert (pace.due, pace.late) == (due, late)
    assert pace.report()["rate"] == round(4 / (17.9 - 10.2), 1)
    pace.rest(1)
    assert (pace.due, pace.late, pace.report()["rate"]) == (18.9, 2, None)


def test_late_steps_are_counted_and_nobody_waits_for_the_model(stage, monkeypatch):
    slow, step = threading.Event(), stage.step

    def dawdle(action):
        if slow.is_set():
            time.sleep(0.15)
        step(action)

    monkeypatch.setattr(stage, "step", dawdle)
    with Seat(stage, speed=30) as seat:
        seat.until(lambda s: s["step"] > 5)
        slow.set()
        seat.until(lambda s: s["late"] > 8)
        asked = time.monotonic()
        assert seat.ask("GET", "/")[0] == 200 and time.monotonic() - asked < 0.15
        slow.clear()
        # a slow tab gets the newest state, not those in between
        first = int(seat.ask("GET", "/frame?tab=slow&after=0")[1]["Number"])
        time.sleep(0.3)
        assert int(seat.ask("GET", f"/frame?tab=slow&after={first}")[1]["Number"]) > first + 3


@pytest.mark.parametrize("request_line, status", [
    ("GET / HTTP/1.1", 200), ("GET /nowhere HTTP/1.1", 404), ("GET /../play.py HTTP/1.1", 404),
    ("GET /frame?after=0 HTTP/1.1", 400), ("GET /frame?tab=x&after=-1 HTTP/1.1", 400),
    ("GET /frame?tab=x HTTP/1.1", 400), ("GET /moment?step=7 HTTP/1.1", 404),
    ("GET /moment?step=%00 HTTP/1.1", 400), ("BREW /pot HTTP/1.1", 400), ("rubbish", 400),
    ("GET / HTTP/9.9", 400), ("GET / HTTP/x", 400), (f"GET /{'x' * 70000} HTTP/1.1", 414),
    ("GET /key HTTP/1.1", 404), ("POST / HTTP/1.1", 404), ("POST /key HTTP/1.1", 400)])
def test_malformed_requests_are_refused(request_line, status, stage, capfd):
    with Seat(stage) as seat:
        with socket.create_connection(("127.0.0.1", seat.port), timeout=20) as line:
            line.sendall(f"{request_line}\r\nHost: localhost\r\n\r\n".encode())
            assert line.recv(100).startswith(f"HTTP/1.1 {status}".encode())
        assert seat.state()["pad"] == "yours"  # it goes on
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("path, body, length", [
    ("/key", b"{", None), ("/key", b"[]", None), ("/key", b"\xff\xfe", None), ("/key", b"", None),
    ("/key", b'{"tab": "one"}', None), ("/key", b'{"tab": "one", "held": "w"}', None),
    ("/key", b'{"tab": "one", "held": ["q"]}', None), ("/key", b'{"tab": 7, "held": []}', None),
    ("/key", b'{"tab": "one", "held": [["w"]]}', None), ("/key", b"[" * 9999, None),
    ("/key", b"{}", "-3"), ("/key", b"{}", "two"), ("/key", b"{}", "99999999999"),
    ("/control", b'{"tab": "one", "name": "speed", "value": 16}', None),
    ("/control", b'{"tab": "one", "name": "speed", "value": true}', None),
    ("/control", b'{"tab": "one", "name": "paused", "value": 1}', None),
    ("/control", b'{"tab": "one", "name": "restart", "value": 7}', None),
    ("/control", b'{"tab": "one", "name": ["step"]}', None),
    ("/control", b'{"tab": "one", "name": "closed", "value": true}', None)])
def test_malformed_orders_are_refused(path, body, length, stage, capfd):
    with Seat(stage) as seat:
        before = dict(seat.desk.settings)
        with socket.create_connection(("127.0.0.1", seat.port), timeout=20) as line:
            line.sendall(f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: "
                         f"{length or len(body)}\r\n\r\n".encode() + body)
            assert re.match(rb"HTTP/1.1 4\d\d ", line.recv(100))
        assert seat.desk.settings == before and not seat.desk.held and not seat.desk.wishes
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("bound, host, origin, status", [
    ("127.0.0.1", "127.0.0.1:{}", None, 200), ("127.0.0.1", "localhost:9999", None, 200),
    ("127.0.0.1", "localhost:9999", "http://localhost:9999", 200),  # a port that ssh passes on
    ("127.0.0.1", "localhost:{}", "http://localhost:9999", 403),  # another server's page
    ("127.0.0.1", "evil.example:{}", None, 403), ("127.0.0.1", "192.168.0.7:{}", None, 403),
    ("127.0.0.1", "127.0.0.1:{}", "http://evil.example", 403), ("127.0.0.1", "[::1", None, 403),
    ("127.0.0.1", "127.0.0.1:{}", "null", 403), ("127.0.0.1", "localhost.evil.example", None, 403),
    ("127.0.0.1", "x-colab.googleusercontent.com", None, 403),
    ("0.0.0.0", "192.168.0.7:{}", "http://192.168.0.7:{}", 200),
    ("0.0.0.0", "evil.example:{}", "http://evil.example:{}", 403),
    ("colab", "localhost:{}", "https://x-colab.googleusercontent.com", 200),
    ("colab", "x-colab.googleusercontent.com", "https://x-colab.googleusercontent.com", 200),
    ("colab", "localhost:{}", "https://evil.example", 403),
    ("colab", "evil.example", None, 403)])
def test_other_sites_do_not_reach_the_server(bound, host, origin, status, stage, monkeypatch):
    if bound == "colab":
        bound, _ = "127.0.0.1", monkeypatch.setenv("COLAB_RELEASE_TAG", "1")
    with Seat(stage) as seat:
        seat.server.host = bound
        headers = {"Host": host.format(seat.port)}
        if origin:
            headers["Origin"] = origin.format(seat.port)
        assert seat.ask("GET", "/", **headers)[0] == status
        order = dict(tab="one", name="paused", value=True)
        assert seat.ask("POST", "/control", order, **headers)[0] == status
        assert seat.desk.settings["paused"] == (status == 200)


@pytest.mark.parametrize("line, words", [
    ("", r"GridWorld after 1,234 steps of training: (http://127.0.0.1:\d+/)"),
    ("--no-browser", r"ssh -L (\d+):localhost:\1 "),
    ("--no-browser --host 0.0.0.0", r"http://127.0.0.1:(\d+)/[^$]*whoever reaches.* port \1 can"),
    ("--no-browser", r"127.0.0.1:(\d+)/[^$]*kernel.proxyPort\(\1\)")])
def test_play_says_where_the_page_is_and_who_can_reach_it(line, words, monkeypatch, capsys):
    write_checkpoint("it.pt")
    opened = []
    monkeypatch.setattr(page, "perform", lambda stage, desk: None)
    monkeypatch.setattr(page.Server, "serve_forever", lambda server: None)
    monkeypatch.setattr(page.webbrowser, "open", opened.append)
    monkeypatch.setenv("DISPLAY", ":0")
    if "proxyPort" in words:
        monkeypatch.setenv("COLAB_RELEASE_TAG", "1")
    assert page.main(f"--checkpoint it.pt --port 0 {line}".split()) == 0
    told = capsys.readouterr().out
    found = re.search(words, told)
    assert found and ("whoever" in told) == ("--host" in line), told
    assert opened == ([] if line else [found[1]])


@pytest.mark.parametrize("line, words", [
    ("--checkpoint none.pt", "none.pt: no whole"), ("--run nowhere", "nowhere"),
    ("--checkpoint torn.pt", "torn.pt: no whole"), ("--game Tennis", "Tennis.pt"),
    ("--checkpoint it.pt --game Pong", r"game \(was GridWorld, now Pong\)"),
    ("--checkpoint sizes.pt", "weights do not fit"), ("--checkpoint new.pt", "unexpected.*hands"),
    ("--checkpoint other.pt", "Pnog: ALE"), ("--checkpoint it.pt", "no display.*--no-browser"),
    ("--checkpoint it.pt --no-browser --port {}", "--port.*try another"),
    ("--checkpoint it.pt --run .", "not allowed with"), ("--port 70000", "--port 70000"),
    ("--steps 0 --gif x.gif", "--steps 0"), ("--speed 16", "--speed.*16"),
    ("--checkpoint it.pt --no-browser --host 203.0.113.1", "--host 203.0.113.1"),
    ("--checkpoint it.pt --gif no/x.gif", "no/x.gif: No such file"), ("--seed -1", "--seed -1")])
def test_what_play_cannot_do_it_says_in_a_line(line, words, monkeypatch, capsys):
    write_checkpoint("it.pt")
    saved = torch.load("it.pt", weights_only=True)
    for name, changes in (("sizes", dict(d_state=9)), ("other", dict(game="Pnog")),
                          ("new", dict(hands=2))):
        torch.save(saved | {"config": saved["config"] | changes}, f"{name}.pt")
    Path("torn.pt").write_bytes(Path("it.pt").read_bytes()[:5000])
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert page.main(line.format(taken.getsockname()[1]).split()) == 2
    told = capsys.readouterr().err
    assert re.search(words, told) and re.fullmatch(r"play\.py: [^\n]+\n", told), told


@pytest.mark.parametrize("line, words", [
    ("nowhere x.pt", "nowhere"), ("torn x.pt", "no whole checkpoint"), ("run", "file"),
    ("run no/x.pt", "no/x.pt|No such file"),
    ("whole whole/checkpoint.pt", "the run's own checkpoint")])
def test_what_cannot_be_exported_is_said_in_a_line(line, words, capsys):
    for name in ("run", "torn", "whole"):
        Path(name).mkdir()
    write_checkpoint(NEWEST)
    write_checkpoint("whole/checkpoint.pt")
    Path("torn/checkpoint.pt").write_bytes(b"PK")
    assert export.main(line.split()) == 2
    told = capsys.readouterr().err
    assert re.search(words, told) and re.fullmatch(r"export\.py: [^\n]+\n", told), told


def test_a_gif_without_a_page(capsys):
    write_checkpoint("it.pt")
    assert page.main("--checkpoint it.pt --gif it.gif --steps 12 --seed 2".split()) == 0
    assert "it.gif: 12 steps, reward" in capsys.readouterr().out
    with Image.open("it.gif") as image:
        assert image.n_frames == 13 and image.width == 3 * 128
        colours = [colour for _, colour in image.convert("RGB").getcolors(1 << 24)]
        assert any(r > 200 and g < 60 for r, g, _ in colours)  # GridWorld's red agent


@pytest.mark.slow
def test_the_page_in_a_real_browser(stage):
    if film.programs() is None and not os.environ.get("CI"):
        pytest.skip("no Chromium with chromedriver on this machine")
    red = "document.querySelectorAll('figure')[2].classList.contains('red')"
    dreamt = "document.getElementById('picture2').src"
    word = "document.getElementById('word').textContent"
    with Seat(stage, speed=60) as seat, film.Browser() as browser:
        browser.open(f"http://127.0.0.1:{seat.port}/")
        browser.until("page.drawn > 3 && page.mine")
        before = browser.script(dreamt)
        browser.until(f"{dreamt} !== {json.dumps(before)}")
        for key, name in (("d", "RIGHT"), ("\ue013", "UP")):  # \ue013: arrow up
            browser.keys(key, True)
            browser.until(f"page.state.player === 'you' && page.state.action === "
                          f"{stage.names.index(name)}")
            assert seat.desk.held == {name}
            browser.keys(key, False)
            seat.until(lambda _: not seat.desk.held)
        browser.tap("m")
        browser.until("page.state.player === 'agent'")
        browser.until("page.state.dreamt >= 200")  # and the dream goes on
        assert not browser.script(red) and browser.script("page.state.ended") is None
        for key, speed in (("-", 30), ("-", 15), ("+", 30), ("+", 60), ("+", 60)):
            browser.tap(key)
            browser.until(f"page.state.speed === {speed}")
        browser.click("#paused")  # or a newer moment may move the list between look and tap
        browser.until("page.state.paused")
        moment = browser.until("page.state.moments[1]")
        browser.tap("2")
        browser.until(f"page.state.began === {moment} && document.querySelector('#moments img')"
                      ".naturalWidth === 16")
        step = browser.script("page.state.step")
        browser.click("#step")
        assert browser.until(f"page.state.step > {step} && page.state.step") == step + 1
        assert browser.script("document.getElementById('pace').innerText").endswith(f" {step + 1}")
        browser.click("#restart")
        browser.until("page.state.dreamt === 0")
        with torch.no_grad():
            stage.model.termination[-1].bias.fill_(50)
        browser.click("#step")
        browser.until(red)
        assert browser.script(word).startswith("The dream ended at its step 1.")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(page, "PATIENCE", 1e9)
            seat.desk.pad = "another"
            browser.until("document.body.classList.contains('watching')")
            assert browser.script(word).startswith("Another tab is playing")
        assert browser.script("document.documentElement.scrollWidth <= innerWidth")
        # a slow machine may ask for a small picture after its moment has left the list
        assert [error for error in browser.errors() if "/moment?" not in error] == []


# ---- the README and its pictures ----------------------------------------------------------------

ROOT = Path(drama.__file__).parent
PAGE_NAMES = "README.md", *(f"results/{name}.md" for name in "README pong boxing models".split())
PAGES = [ROOT / name for name in PAGE_NAMES]


def anchors(text: str) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=PAGE_NAMES)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    assert targets
    for target in targets:
        if "://" not in target:
            path, _, anchor = target.partition("#")
            file = page.parent / path if path else page
            assert file.exists(), target
            assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("page", PAGES, ids=PAGE_NAMES)
def test_scripts_that_a_page_names_exist(page):
    scripts = set(re.findall(r"\b(?:experiments/|exercises/)?\w+\.py\b", page.read_text("utf-8")))
    folders = [ROOT, ROOT / "experiments", ROOT / "exercises"]
    assert len(scripts) > 3
    assert not [name for name in scripts if not any((at / name).exists() for at in folders)]


@pytest.mark.parametrize("page", PAGES, ids=PAGE_NAMES)
def test_no_paragraph_is_a_wall(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    long = [line for line in lines if len(line) > 400 and not line.startswith("|")]
    assert len(lines) > 50 and not long


def test_functions_that_the_readme_names_exist():
    words = set(re.findall(r"`([A-Za-z_]\w*(?:\.\w+)?)`", PAGES[0].read_text(encoding="utf-8")))
    named = {word for line in PAGES[0].read_text(encoding="utf-8").splitlines()
             if line.startswith("Read: ") for word in re.findall(r"`(\w+(?:\.\w+)?)`", line)}
    assert len(named) > 10 and named <= words
    for name in named:
        part = drama
        for piece in name.split("."):
            part = getattr(part, piece)


def test_every_note_is_in_the_readmes_table():
    table = re.findall(r"^\| NOTE\((\d+)\)", PAGES[0].read_text(encoding="utf-8"), re.M)
    noted = re.findall(r"NOTE\((\d+)\)", Path(drama.__file__).read_text(encoding="utf-8"))
    assert len(table) == len(set(table)) and set(table) == set(noted)


def test_presets_of_the_readme_are_those_of_the_program():
    text = PAGES[0].read_text(encoding="utf-8")
    table = text[text.index("## Presets"):text.index("`--preset auto`")]
    rows = {cells[1].strip(): [cell.strip() for cell in cells[2:5]]
            for cells in (line.split("|") for line in table.splitlines()) if len(cells) > 4}
    shown = {"latent": "{0.categoricals} of {0.classes}", "dreams x steps": "{0.dreams:,} x "
             "{0.horizon}", "frames in an update": "{0.batch_size} x {0.batch_length}",
             "width of the sequence model": "{0.d_model}",
             "temperature of DFS": "{0.temperature:g}"}
    for i, name in enumerate(("paper", "laptop", "gridworld")):
        cfg = drama.Config(**drama.PRESETS[name])
        for row, words in shown.items():
            told = rows[row][i].replace(" dice", "").replace(" faces", "")
            assert told == words.format(cfg), (name, row)
        assert re.sub(r"\D", "", rows["an update every"][i]) in ("", str(cfg.train_every))


def test_logged_numbers_are_explained():
    text = PAGES[0].read_text(encoding="utf-8")
    table = text[text.index("| logged |"):]
    names = set(next(csv.reader(open(ROOT / "results" / "gridworld-0-metrics.csv"))))
    assert len(names) > 20
    assert all(f"`{name}`" in table for name in names - {"step", "seconds", "updates"})


def experiment(name: str):
    """A script of experiments/ as a module."""
    sys.path.insert(0, str(ROOT / "experiments"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / "experiments"))


@pytest.fixture(scope="module")
def grid_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "grid"
    flags = "--game GridWorld --preset tiny --steps 330 --device cpu --precision float32 --out"
    assert drama.main([*flags.split(), str(folder)]) == 0
    return folder


@pytest.mark.slow
def test_figures_are_drawn_from_a_run(grid_run, tmp_path, monkeypatch, capsys):
    figures = experiment("figures")
    names = ["model", "dice", "memory", "guess", "dream", "returns", "reading"]
    monkeypatch.setattr(sys, "argv", ["figures.py", str(grid_run), "--out", str(tmp_path),
                                      "--only", *names])
    figures.main()
    assert {file.stem.split("-")[-1] for file in tmp_path.iterdir()} == set(names)
    assert "| reconstruction | " in capsys.readouterr().out


def test_figures_of_nothing_are_refused_in_a_line(tmp_path, monkeypatch, capsys):
    figures = experiment("figures")
    monkeypatch.setattr(sys, "argv", ["figures.py", str(tmp_path / "no"), "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        figures.main()
    said = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(said) == 1 and "no whole checkpoint" in said[0]


def test_memory_is_cleared_at_an_opening(grid_run):
    figures = experiment("figures")
    run = figures.load(grid_run)
    with torch.no_grad():
        figure = figures.draw_memory(run)
    length, opening = 2 * run.cfg.batch_length, run.cfg.batch_length
    pictures = [image.get_array() for part in figure.subfigs for axis in part.axes
                for image in axis.images if image.get_array().shape == (length, length)]
    assert len(pictures) == 3
    for decay in pictures:
        assert not np.triu(decay, 1).any() and np.allclose(np.diag(decay), 1)
        assert not decay[opening:, :opening].any() and decay[opening - 1, 0] > 0


def test_curves_bands_lie_between_the_seeds(tmp_path):
    curves = experiment("curves")
    for name, returns in dict(low=(1, 3, 5), high=(3, 5, 7)).items():
        rows = "".join(f"{10 * i + 10},{i},{r}\n" for i, r in enumerate(returns))
        (tmp_path / f"{name}.csv").write_text("step,seconds,return\n" + rows)
    runs = [curves.read(str(tmp_path / f"{name}.csv"), 2) for name in ("low", "high")]
    assert runs[0].steps.tolist() == [20, 30] and runs[0].mean.tolist() == [2, 4]
    figure = curves.draw("GridWorld", {"both": runs}, {"best": 9.0}, "", 2)
    line = figure.axes[0].lines[0].get_ydata()
    assert np.allclose([line[0], line[-1]], [3, 5])
    band = figure.axes[0].collections[0].get_paths()[0].vertices[:, 1]
    assert np.allclose([band.min(), band.max()], [2, 6])
    many = {str(k): runs for k in range(2 * len(curves.COLOURS))}  # none is left out
    assert len(curves.draw("GridWorld", many, {}, "", 2).axes[0].lines) == len(many)


@pytest.mark.parametrize("name, line, words", [
    ("curves", "--game GridWorld --group A a.csv --group A b.csv --out x.png", "A is given twice"),
    ("curves", "--game GridWorld --group A a.csv b.csv --out x.png", "no steps in common"),
    ("curves", "--game GridWorld --group A a.csv --out x.xyz", "ends in .png"),
    ("curves", "--game GridWorld --group A a.csv --out no/x.png", "no/x.png"),
    ("curves", "--game GridWorld --group A cut.csv --out x.png", "cut.csv: not an episodes.csv"),
    ("curves", "--game GridWorld --group A young.csv --out x.png", "young.csv: not an episodes"),
    ("curves", "--game GridWorld --group A a.csv --out x.png --mean 0", "--mean 0"),
    ("by_steps", "cut.csv", "cut.csv: not a table of numbers"),
    ("by_steps", "young.csv", "no rows with a step"),
    ("by_steps", "metrics.csv", "no column `return`"),
    ("long_sequence", "--out a --lengths 52 --trained", "not a table of this script"),
    ("long_sequence", "--out new --lengths --trained", "both empty"),
])
def test_bad_tables_and_names_are_said_in_a_line(name, line, words, capsys):
    head = "step,seconds,episode,return,length\n"
    for file, text in (("a", f"{head}10,1,1,2,10\n20,2,2,3,10\n"), ("young", head),
                       ("b", f"{head}30,1,1,2,10\n40,2,2,3,10\n"), ("cut", f"{head}10,1,1,2,1\n1"),
                       ("metrics", "step,kl\n10,1\n")):
        Path(f"{file}.csv").write_text(text)
    assert experiment(name).main(line.split()) == 2
    told = capsys.readouterr().err
    assert words in told and re.fullmatch(rf"{name}\.py: [^\n]+\n", told), told


def test_weights_by_age_begin_with_the_newest():
    counts = experiment("dfs_counts")
    arms = {"DFS": dict(train=torch.arange(100.0), dream=torch.ones(100))}
    figure = counts.draw(arms)
    x, y = figure.axes[0].lines[0].get_data()
    assert (np.diff(x) > 0).all() and (np.diff(y) < 0).all()


# ---- the suite of all games ---------------------------------------------------------------------
# The oracles: a child that writes down how it was called, and numbers that rliable gave.

CHILD = """
import json, os, pathlib, signal, sys, time
flag = dict(zip(sys.argv[1::2], sys.argv[2::2]))
game, seed, out = flag["--game"], int(flag["--seed"]), pathlib.Path(flag["--out"])
begun, got, episodes = time.time(), [], int(flag.get("--eval", 0))
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: got.append(number))
out.joinpath("config.json").write_text(json.dumps(dict(
    game=game, seed=seed, gamma=float(flag.get("--gamma", 0.985)))))
out.joinpath("metrics.csv").write_text("step,seconds\\n40,60\\n")
while game == "Qbert" and not got:
    time.sleep(0.02)
time.sleep(0.2)
cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
with open("calls", "a") as file:
    file.write(json.dumps(dict(game=game, seed=seed, episodes=episodes, begun=begun, got=got,
                               ended=time.time(), cores=cores, flags=sys.argv[7:],
                               threads=os.environ["OMP_NUM_THREADS"])) + "\\n")
if got:
    sys.exit(128 + got[0])
if game == "Boxing":
    sys.exit("drama.py: the disk is full")
if game == "Breakout":
    print("\\r 1%|  | 8/9 kl=0.6]drama.py: run is in use by another process; use another --out"
          "\\n\\r 2%|  | 9/9")
    sys.exit(2)
if episodes:
    out.joinpath("evaluation.json").write_text(json.dumps(dict(
        game=game, step=1200, episodes=episodes, scores=[seed, 2.0], mean=14.6)))
"""


@pytest.fixture
def suite(monkeypatch):
    """experiments/suite.py with CHILD in drama.py's place."""
    monkeypatch.syspath_prepend(Path(drama.__file__).parent / "experiments")
    for name in ("RANK", "WORLD_SIZE", "SLURM_ARRAY_TASK_ID", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    module = importlib.import_module("suite")
    Path("child.py").write_text(CHILD)
    monkeypatch.setattr(module, "DRAMA", Path("child.py").resolve())
    monkeypatch.setattr(module, "POLL", 0.02)
    return module


def calls() -> list[dict]:
    return [json.loads(line) for line in Path("calls").read_text().splitlines()]


def words_of(text, *more) -> str:
    """The line of `text` that has all these words, of which there must be one."""
    [line] = [line for line in text.splitlines() if all(word in line for word in more)]
    return line


def test_suite_runs_what_is_unfinished_and_goes_on_after_a_failure(suite, capsys, monkeypatch):
    line = ("--jobs 2 --eval 2 --folder all --steps 1200 --gamma 0.5 "
            "--games Boxing Pong Breakout Alien").split()
    assert suite.main(line) == 1
    said, done = capsys.readouterr().out, calls()
    assert "exit code 1" in words_of(said, "Boxing seed 0", "FAILED", "the disk is full")
    assert "skipped" in words_of(said, "Breakout seed 0", "another process")
    assert ("score 14.60, human-normalised 1.000, 2 episodes after 1,200 steps, 1 minutes"
            in words_of(said, "Pong seed 0: finished"))
    again = re.search(r"python drama.py (.*), then", words_of(said, "Alien", "score 14.60"))[1]
    assert drama.parse(shlex.split(again))[0].gamma == 0.5
    assert "2 finished, 1 failed, 1 skipped" in said
    assert [(c["game"], c["episodes"]) for c in done if c["game"] in ("Pong", "Alien")] == [
        ("Pong", 0), ("Pong", 2), ("Alien", 0), ("Alien", 2)]  # Alien waits for a free core
    for call in done:
        beside = [c for c in done if c["begun"] <= call["begun"] < c["ended"]]
        assert len(beside) <= 2 and call["threads"] == "1"
        assert call["flags"][:4] == ["--steps", "1200", "--gamma", "0.5"]
        if call["cores"] + done[0]["cores"] and len(os.sched_getaffinity(0)) > 1:
            assert all(c is call or c["cores"] != call["cores"] for c in beside)
            assert len(call["cores"]) == 1
    Path("calls").unlink()
    assert suite.main(line) == 1
    assert {call["game"] for call in calls()} == {"Boxing", "Breakout"}
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")  # which would stop the other processes
    assert suite.main(line) == 0


@pytest.mark.skipif(os.name == "nt", reason="on Windows the console signals the children")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
                         if os.name != "nt" else [])
def test_suite_stops_its_children_and_waits_for_them(number, suite, capsys, request):
    before = signal.signal(number, signal.SIG_DFL)  # under nohup the third is ignored
    request.addfinalizer(lambda: signal.signal(number, before))

    def send():
        while len(list(Path("all").glob("*/metrics.csv"))) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    assert suite.main("--games Qbert --seeds 3 --jobs 2 --folder all".split()) == 128 + number
    thread.join()
    passed_on = signal.SIGTERM if number == signal.SIGHUP else number  # which drama.py knows
    assert [call["got"] for call in calls()] == [[passed_on]] * 2  # once each, the third not begun
    said = capsys.readouterr().out
    assert "at step 40 of 100,000" in words_of(said, "Qbert seed 1: stopped")
    assert "FAILED" not in said and said.endswith("stopped; the same command goes on\n")


def test_suite_leaves_no_child_behind_when_it_cannot_go_on(suite, capsys, monkeypatch):
    start, begun = suite.Run.start, []
    monkeypatch.setattr(suite.Run, "start", lambda *a: (begun.append(a[0]), start(*a)))
    Path("all").mkdir()
    Path("all/Pong-0").write_text("no folder")
    assert suite.main("--games Qbert Pong --jobs 2 --folder all".split()) == 2
    assert "all/Pong-0" in capsys.readouterr().err
    assert [run.game for run in begun] == ["Qbert", "Pong"]
    assert begun[0].child.wait(20)  # it plays on until it is told


def test_suite_reads_files_that_are_none_of_its_own(suite, capsys):
    line = "--games Pong Alien Pong --folder all --report --steps 1200 --eval 2".split()
    for name, text in (("evaluation.json", "[1, 2]"), ("evaluation.json", '{"step": 1200}'),
                       ("config.json", "3"), ("metrics.csv", "a,b\n1,2\n"),
                       ("evaluation.json", json.dumps(dict(game="Boxing", step=1200, episodes=2,
                                                           mean=3.0)))):
        Path("all/Pong-0").mkdir(parents=True, exist_ok=True)
        Path("all/Pong-0", name).write_text(text)
        assert suite.main(line) == 0
        assert "0 of 2 runs finished, 0 of 2 games" in capsys.readouterr().out
    assert suite.main([*line, "--table", "v1.2"]) == 0 and Path("v1.2.csv").exists()


@pytest.mark.slow
@pytest.mark.parametrize("variables, shares", [
    ([{}], [(0, 1)]),
    ([dict(RANK="0", WORLD_SIZE="2"), dict(RANK="1", WORLD_SIZE="2")], [(0, 2), (1, 2)]),
    ([dict(SLURM_ARRAY_TASK_ID=f"{i}", SLURM_ARRAY_TASK_MIN="4", SLURM_ARRAY_TASK_COUNT="3")
      for i in (4, 5, 6)], [(0, 3), (1, 3), (2, 3)]),
    ([dict(RANK=f"{r}", WORLD_SIZE="2", SLURM_ARRAY_TASK_ID=f"{i}", SLURM_ARRAY_TASK_COUNT="2")
      for i in (0, 1) for r in (0, 1)], [(0, 4), (1, 4), (2, 4), (3, 4)])])
def test_processes_share_the_runs(variables, shares, suite, monkeypatch):
    assert [suite.share(env) for env in variables] == shares
    for i, env in enumerate(variables):
        with monkeypatch.context() as patch:
            for name, value in env.items():
                patch.setenv(name, value)
            line = f"--games Pong Hero Alien --folder {i} --eval 2 --steps 1200"
            assert suite.main(line.split()) == 0
    trained = [call["game"] for call in calls() if not call["episodes"]]
    assert sorted(trained) == ["Alien", "Hero", "Pong"]  # though none saw another's folder


def test_suite_refuses_in_one_line(suite, capsys, monkeypatch):
    for line, words in (("--games Pnog", "Pnog"), ("--seeds 0", "--seeds 0"),
                        ("--jobs x", "--jobs"), ("--game Pong", "--games"),
                        ("--seed 4", "--first-seed"),
                        ("--out x", "--folder"), ("--gamma 7", "--gamma 7"), ("Pong", "Pong"),
                        ("--folder child.py", "child.py")):
        assert suite.main(line.split()) == 2
        told = capsys.readouterr().err
        assert words in told and re.fullmatch(r"suite\.py: [^\n]+\n", told), told
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "3")
    assert suite.main([]) == 2 and "process 7 of 3" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "x")
    assert suite.main([]) == 2 and "unset them, or mend them" in capsys.readouterr().err
    assert not Path("calls").exists()


SCORES = np.array([[-0.1, 0.2, 0.9, 2.5, 1.1], [0.1, 0.4, 1.3, 6.0, 0.7],
                   [0.0, 0.3, 0.2, 4.0, 1.6]])  # (runs, games), human-normalised


def test_aggregates_and_intervals_are_those_of_rliable(suite, monkeypatch):
    """rliable 1.2.0 on SCORES: metrics.aggregate_*, library.get_interval_estimates, 50,000 reps."""
    point = {"mean": 1.28, "median": 0.8, "interquartile mean": 0.744444}
    interval = {"mean": (0.94, 1.6333), "median": (0.3333, 1.1667),
                "interquartile mean": (0.5222, 0.9667)}
    monkeypatch.setitem(sys.modules, "rliable", None)  # by NumPy, whatever is installed
    ends, by = suite.intervals(list(SCORES.T))
    assert by == "NumPy"
    for name, value in point.items():
        assert suite.aggregate(list(SCORES.T))[name] == pytest.approx(value, abs=1e-6)
        assert ends[name] == pytest.approx(interval[name], abs=0.03)
    assert suite.aggregate(list(SCORES.T))["games above human"] == 2
    ragged = suite.aggregate([np.array([1.0, 3.0]), np.array([8.0])])  # a game has one run less
    assert [float(x) for x in ragged.values()] == [5, 5, 4, 2]


def test_report_of_a_folder_that_is_half_done(suite, capsys):
    line = "--games Pong Hero Alien Qbert --seeds 2 --folder all --eval 2 --steps 1200 --report"
    for game, seed, mean, step in (("Pong", 0, 14.6, 1200), ("Pong", 1, -20.7, 1200),
                                   ("Hero", 0, 1027, 1200), ("Hero", 1, 5.0, 600),
                                   ("Alien", 0, 227.8, 1200)):
        out = Path(f"all/{game}-{seed}")
        out.mkdir(parents=True)
        (out / "evaluation.json").write_text(json.dumps(dict(
            game=game, seed=seed, step=step, episodes=2, scores=[mean] * 2, mean=mean)))
        (out / "metrics.csv").write_text(f"step,seconds\n{step},60\n")
        (out / "config.json").write_text(json.dumps(dict(gamma=0.9 if game == "Alien" else 0.8)))
    assert suite.main(line.split()) == 0
    said = capsys.readouterr().out
    assert "4 of 8 runs finished, 3 of 4 games" in said
    assert words_of(said, "Pong  ").split() == (
        "Pong 2 -3.0 0.500 -20.7 14.6 15.0 -4.2 11.3".split())
    assert words_of(said, "Qbert  ").split()[1:3] == ["0", "missing"]
    assert words_of(said, "interquartile mean").split()[2] == "0.000"  # of 0, 0, 0, 1: the middle
    assert words_of(said, "mean   ", " 0.167 ").startswith("mean")
    assert "Hero seed 1" in words_of(said, "at step 600 of 1,200, evaluated at step 600")
    assert "Qbert seed 0, Alien seed 1, Qbert seed 1" in words_of(said, "missing, at its beginning")
    assert "gamma 0.8, 0.9" in words_of(said, "differ in their settings")
    table = read_csv("all/atari100k.csv")
    assert [(row["game"], row["runs"], row["score"]) for row in table][2:] == [
        ("Alien", "1", "227.8"), ("Qbert", "0", "")]
    assert len(json.loads(Path("all/atari100k.json").read_text())["missing"]) == 4
    assert suite.main([*line.split(), "--gamma", "0.9"]) == 0  # of these settings alone
    assert "Pong seed 0" in words_of(capsys.readouterr().out, "gamma was 0.8, now 0.9")


def test_curves_of_a_folder(monkeypatch):
    monkeypatch.syspath_prepend(Path(drama.__file__).parent / "experiments")
    curves = importlib.import_module("curves")
    runs = {"Pong-0": (3, 5, 7), "Pong-1": (1,), "Hero-0": (), "Krull-2": (9,)}
    for name, returns in runs.items():
        Path(f"all/{name}").mkdir(parents=True)
        lines = ["step,seconds,return"] * bool(returns)
        lines += [f"{1000 * (i + 1)},60,{x}" for i, x in enumerate(returns)]
        Path(f"all/{name}/episodes.csv").write_text("\n".join(lines))
    axes = {axis.get_title(): axis for axis in curves.draw_folder(Path("all"), 2).axes}
    assert list(axes) == ["Krull", "Pong"]  # those with an episode
    first, second, *levels = axes["Pong"].lines
    assert (first.get_xdata() == [2, 3]).all() and (first.get_ydata() == [4, 6]).all()
    assert second.get_ydata() == [1] and [x.get_ydata()[0] for x in levels] == [-20.7, 14.6, 15]


@pytest.mark.slow
def test_suite_with_a_real_run(suite, capsys, monkeypatch):
    monkeypatch.setattr(suite, "DRAMA", Path(drama.__file__))
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)  # as on macOS and Windows
    line = "--games Breakout --folder all --eval 1 --preset tiny --device cpu --steps 60".split()
    assert suite.main(line) == 0
    found = json.loads(Path("all/Breakout-0/evaluation.json").read_text())
    assert (found["step"], found["episodes"], len(found["scores"])) == (60, 1, 1)
    capsys.readouterr()
    with drama.Run(drama.Config(game="Breakout", out="all/Breakout-0", steps=9)) as run:
        with pytest.raises(drama.Refusal, match="other settings"):
            run.open()
        assert drama.main(["--out", "all/Breakout-0"]) == 2  # the suite knows its words
    assert suite.BUSY in capsys.readouterr().err


# ---- what looks at a world model ----------------------------------------------------------------


@pytest.fixture
def world_model(monkeypatch):
    """experiments/world_model.py."""
    monkeypatch.syspath_prepend(Path(drama.__file__).parent / "experiments")
    return importlib.import_module("world_model")


def test_auc_counts_pairs_and_words_say_where(world_model):
    rng = np.random.default_rng(0)
    score, event = rng.integers(0, 6, 40) / 5, rng.random(40) < 0.3  # with ties
    pairs = [(a > c) + (a == c) / 2 for a in score[event] for c in score[~event]]
    assert world_model.auc(score, event) == pytest.approx(np.mean(pairs))
    assert math.isnan(world_model.auc(score, event & False))
    real, predicted = torch.tensor([[-2.0, 0], [1, 0]]), torch.tensor([[-0.5, -0.75], [0.25, 0]])
    loss, gain = torch.tensor([[0.6, 0.75], [0.5, 0]]), torch.tensor([[0.1, 0], [0.75, 0.3]])
    chance = torch.stack([loss, gain], -1)
    assert world_model.rewards_seen(predicted, chance, real) == [
        "negative 1 times: mean -0.500, AUC 0.667", "zero 2 times: mean -0.375",
        "positive 1 times: mean +0.250, AUC 1.000"]
    assert world_model.rewards_seen(predicted, chance, real * 0)[2] == "positive never"


def test_chances_are_the_mass_on_each_side_of_zero(world_model):
    two_hot = TwoHot(255, 20.0)
    sure = two_hot.encode(torch.tensor([-3.0, 0, 1]))  # of each, and then a mixture
    p = torch.cat([sure, torch.tensor([[0.3, 0.1, 0.6]]) @ sure])
    model = SimpleNamespace(reward=torch.log, two_hot=two_hot)
    torch.testing.assert_close(world_model.chances(model, p), torch.tensor(
        [[1, 0], [0, 0], [0, 1], [0.3, 0.6]]))


def test_how_far_a_dream_sees(world_model, model, monkeypatch, capsys):
    diagnose, replay, cfg = importlib.import_module("diagnose"), make_replay(80), small(horizon=4)
    seen = []

    def knowing(cfg, model, batch, z):  # knows all for two steps, then nothing
        assert z.shape == (*batch.rows[:, :cfg.context].shape, K * C)
        seen.extend(batch.rows[:, 0].tolist())
        real = batch.reward[:, cfg.context:]
        return real * torch.tensor([1.0, 1, 0, 0]), real

    monkeypatch.setattr(diagnose, "dream_along", knowing)
    monkeypatch.setattr(diagnose, "chances", lambda model, d: torch.stack([-d, d], -1))
    replay.reward[:80] = torch.tensor([1.0, -1, 0, 0, 0, 0, 0]).repeat(12)[:80]
    diagnose.look_ahead(cfg, model, replay, 10)
    assert seen == [*range(10, 80 - cfg.context - 3, 2)]
    assert capsys.readouterr().out.splitlines() == [
        f"dreams along the real actions, AUC of a {name} so many steps on: 1: 1.00, 2: 1.00, "
        "4: 0.50" for name in ("gain", "loss")]


def test_dreams_are_told_by_quarters(world_model, model, agent, monkeypatch, capsys):
    diagnose, replay, cfg = importlib.import_module("diagnose"), make_replay(80), small(horizon=6)
    told = torch.zeros(2, 6, cfg.d_model), torch.arange(12.0).view(2, 6)  # d, real rewards
    monkeypatch.setattr(diagnose, "dream_along", lambda *_: told)
    batch = replay.batch(torch.arange(20).view(2, 10))
    z = torch.zeros(2, 10, cfg.d_z)
    with torch.no_grad(), np.errstate(invalid="ignore"):  # a new head's dreams do not vary
        diagnose.look_at_dreams(cfg, model, agent, batch, z)
    assert "dream, real: +3.5000, +5.5000, +7.0000, +8.0000\n" in capsys.readouterr().out


def test_windows_score_each_step_once_and_dreams_stop_at_an_opening(world_model, model):
    cfg = dataclasses.replace(small(), context=4, horizon=3)
    rows = world_model.windows(cfg, 5, 30)
    assert rows.shape == (7, 7) and rows[:, 4:].flatten().tolist() == list(range(9, 30))
    batch = make_batch([0, 2], [5])  # b windows of l steps: context 4, then 7
    z = drama.draw_one_hot(model.encode(batch.frame)).flatten(-2)
    dreamt, real = world_model.rewards_dreamt(cfg, model, batch, z)  # the second opens in its dream
    assert real.tolist() == [batch.reward[0, 4:].sum()] and np.isfinite(dreamt).all()


@pytest.mark.slow
def test_world_models_are_looked_at(world_model, run, monkeypatch, capsys):
    number = r"[+-]?\d+\.\d+"
    monkeypatch.setattr(world_model, "FRESH", 400)
    monkeypatch.setattr(sys, "argv", ["world_model.py", *TINY, "--warmup", "60", "--updates", "3"])
    world_model.main()
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [int(re.search(r"(\d+) updates", line)[1]) for line in lines[::2]] == [1, 2, 3]
    for line in lines[1::2]:
        assert re.search(rf"positive \d+ times: mean {number}, AUC 0\.\d+; 7\d dreams of 5", line)
    theirs = ["world_model.py", *TINY, "--categoricals", "6", "--updates", "1", "--run", str(OUT)]
    monkeypatch.setattr(sys, "argv", theirs)
    world_model.main()
    assert re.search(r"reward head, .*; \d\d dreams of 5 steps", capsys.readouterr().out)
    monkeypatch.setattr(world_model, "FRESH", 25)
    replay, rest = world_model.of_run(drama.parse(TINY)[0], torch.device("cpu"), OUT, 20)
    theirs_too = importlib.import_module("diagnose").load(OUT, True)[-1]
    assert (replay.size, rest.size) == (20, 50)
    assert (torch.cat([replay.frame, rest.frame]) == theirs_too.frame[:70]).all()
    monkeypatch.setattr(sys, "argv", [*theirs, "--rows", "20"])
    world_model.main()
    assert "AUC of a loss so many steps on: 1: " in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*theirs, "--rows", "60"])
    with pytest.raises(drama.Refusal, match="--rows 60: must lie from 1 to 52"):
        world_model.main()
    monkeypatch.setattr(sys, "argv", [*theirs, "--image-size", "32"])
    with pytest.raises(drama.Refusal, match="at 16 pixels, not GridWorld at 32"):
        world_model.main()
    diagnose = importlib.import_module("diagnose")
    for flags, played in (("", f"{STOPS[1]} steps played in training"),
                          ("--fresh 150", "of fresh play"),
                          ("--fresh 150 --random", "of fresh random play")):
        monkeypatch.setattr(sys, "argv", ["diagnose.py", str(OUT), *flags.split()])
        diagnose.main()
        said = capsys.readouterr().out
        assert played in said and re.search(rf"positive \d+ times: mean {number}, AUC", said)
        assert re.search(rf"sum of reward {number}, real {number}, correlation", said)
        assert re.search(rf"dreamt by the policy: {number}, {number}, {number}, {number}\n", said)
        assert re.search(r"AUC of a loss so many steps on: 1: (0\.\d\d|nan), 2: ", said)
        assert re.search(r"8 steps before, .* foresees \d+% of \d+ gains", said)
        assert ("trained on 0 to 3 times: 4 steps before, " in said) == (not flags)


def test_a_new_agent_learns_in_a_finished_world_model(world_model, run, monkeypatch, capsys):
    from experiments import new_agent
    update, old, left, horizons = drama.update_actor_critic, NEWEST.read_bytes(), [], []

    def followed(cfg, model, agent, learner, replay):
        left.append(learner.remaining(learner.updates))
        horizons.append((cfg.horizon, model.cfg.horizon, replay.cfg.dreams))
        return update(cfg, model, agent, learner, replay)

    monkeypatch.setattr(drama, "update_actor_critic", followed)
    flags = "run new --updates 12 --horizon 3 --dreams 4 --lr_fall 0.25".split()
    assert new_agent.main(flags) == 0
    assert horizons == [(3, 3, 4)] * 12 and left[0] == 1 and 0 < left[-1] < left[-2] < 1
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 11 and told[-1].startswith(str(Path("new/checkpoint.pt: GridWorld")))
    assert re.search(r"   12 updates, .* min: imagined_reward -?\d+\.\d+, ", told[9])
    theirs, ours = (torch.load(path) for path in (NEWEST, "new/checkpoint.pt"))
    assert NEWEST.read_bytes() == old and ours["config"]["horizon"] == 3
    assert all((x == ours["model"][name]).all() for name, x in theirs["model"].items())
    assert any((x != ours["agent"][name]).any() for name, x in theirs["agent"].items())
    assert drama.main("--game GridWorld --eval 2 --checkpoint new/checkpoint.pt".split()) == 0
    capsys.readouterr()
    for wrong in ("run new", "run other --updates 0", "run other --d_model 32", "none other",
                  "run other --horizon 0"):
        assert new_agent.main(wrong.split()) == 2
        assert capsys.readouterr().err.count("\n") == 1 and not Path("other").exists()


def test_an_agent_that_draws_more_sharply_is_evaluated(capsys):
    from experiments import sharpen
    cfg, model, agent = write_checkpoint(Path("agent.pt"))
    assert drama.main("--eval 2 --eval_envs 2 --checkpoint agent.pt".split()) == 0
    plain = capsys.readouterr().out
    assert sharpen.main("agent.pt --games 2 --faces 1 inf --actions 1 inf".split()) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"faces to the power of 1, actions of 1\n{plain}")
    assert told.count("mean") == 4 and "faces to the power of inf, actions of 1" in told
    frame = torch.randint(256, (64, cfg.image_size, cfg.image_size, 3), dtype=torch.uint8)
    likeliest = model.eval().encode(frame).argmax(-1)
    sharpen.sharpen(model, agent, float("inf"), float("inf"))
    player = Player(cfg, model, agent, 64, "cpu")
    action, latent = player.act(frame, torch.ones(64, dtype=torch.bool))
    z = F.one_hot(likeliest, cfg.classes).flatten(-2).float()
    assert (latent == likeliest).all()
    feature = torch.cat([z, z.new_zeros(64, cfg.d_model)], -1)
    assert (action == agent.actor(feature).argmax(-1)).all()
    for flags in ("agent.pt --games 0", "agent.pt --actions 0", "missing.pt", "agent.pt --faces x"):
        assert sharpen.main(flags.split()) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_what_a_run_had_in_each_so_many_steps(tmp_path, capsys):
    from experiments import by_steps
    (tmp_path / "a.csv").write_text("step,seconds,episode,return,length\n"
                                    "5,1,1,2,5,0.5\n9,2,2,4,4\n20,3,3,-11,11\n")  # an old one
    (tmp_path / "a-metrics.csv").write_text(
        "step,imagined_reward,policy_entropy,return_scale,kl,reconstruction\n"
        "4,nan,nan,nan,2,7\n8,nan,nan,nan,4,9\n12,0.5,1,0.6,6,1\n20,0.25,2,0.2,8,3\n")
    assert by_steps.main([str(tmp_path / "a.csv"), "--every", "10"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "  0 to 10: return 3.0 of 2, play 0.6667 a step, KL 3, reconstruction 8",
        "  10 to 20: return -11.0 of 1, play -1.0000 a step, dream 0.375, entropy 1.5, range 0.4, "
        "KL 7, reconstruction 2"]
    (tmp_path / "a.csv").rename(tmp_path / "episodes.csv")  # without metrics
    assert by_steps.main([str(tmp_path / "episodes.csv")]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "  0 to 10,000: return -1.7 of 3, play -0.2500 a step"]
    for file in ("missing.csv", "a-metrics.csv", "empty.csv"):
        (tmp_path / "empty.csv").write_text("")
        assert by_steps.main([str(tmp_path / file)]) == 2
        assert capsys.readouterr().err.startswith("by_steps.py: ")


def test_gains_and_losses_are_counted_and_looked_for(model, monkeypatch, capsys):
    diagnose, replay = importlib.import_module("diagnose"), make_replay(80)
    replay.reward[:], replay.first[:] = 0, False
    for row, reward in ((2, -9.0), (40, 1.0), (45, 2.0), (60, -1.0), (75, 3.0)):
        replay.reward[row] = reward
    seen = {}

    def dreamt(cfg, model, batch, z):
        assert z.shape == (*batch.rows.shape, K * C)
        ahead = z.shape[1] - cfg.context
        seen[ahead] = batch.rows[:, -1].tolist()
        real = replay.reward[batch.rows[:, -1]].numpy()
        return real * (0.6 if ahead < 8 else np.where(real > 0, 0.6, 0.4)), real

    monkeypatch.setattr(diagnose, "rewards_dreamt", dreamt)
    diagnose.look_at_events(small(), model, replay, 30)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        "after a gain: a gain 1 times, 5 steps later; a loss 1 times, 15 steps later",
        "after a loss: a gain 1 times, 15 steps later; a loss 0 times"]
    for line, ahead, losses in zip(lines[2:], (2, 4, 8, 16), (100, 100, 0, 0), strict=True):
        assert line == (f"{ahead} steps before, a dream along the real actions foresees "
                        f"100% of 3 gains, {losses}% of 1 losses")
        assert seen[ahead] == [40, 45, 60, 75]
    rewards, replay.reward[:] = replay.reward.clone(), 0
    replay.reward[[40, 41, 43, 79]] = 1.0  # 1, 2 and 36 steps apart
    diagnose.look_at_events(small(), model, replay, 30)
    first = capsys.readouterr().out.splitlines()[0]
    assert first == "after a gain: a gain 3 times, 2 steps later; a loss 0 times"
    replay.reward[:] = rewards
    replay.trained[:] = 0
    starts = 31, 45, 45, 45, 52, 66, 66, 66, 66, 66, 66, 66, 75
    for row in starts:
        replay.trained[row] += 1
    cfg = small(batch_length=10)
    diagnose.look_at_training(cfg, model, replay)
    held = {row: sum(start <= row < start + 10 for start in starts) for row in (40, 45, 60, 75)}
    assert held == {40: 1, 45: 3, 60: 1, 75: 8}
    assert capsys.readouterr().out.splitlines() == [
        "trained on 0 to 3 times: 4 steps before, a dream foresees 100% of 2 gains, "
        "100% of 1 losses",
        "trained on 8 to 15 times: 4 steps before, a dream foresees 100% of 1 gains"]
    replay.first[73] = True  # within the dream that would end at 75
    diagnose.look_at_training(cfg, model, replay)
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_balls_are_found_followed_and_counted(capsys, tmp_path):
    balls = experiment("balls")
    frames = torch.full((4, 3, 64, 64), 17 / 255)
    frames[:, :, 11:13, 5] = 1  # a paddle is no ball
    frames[0, 2, 30:32, 9], frames[1, 2, 30:32, 31] = 236 / 255, 236 / 255
    frames[2, 2, 30:32, 31] += 0.1  # a shadow of one
    x = balls.find(frames)
    assert np.isfinite(x).tolist() == [True, True, False, False]
    assert 0 <= x[0] < 0.05 and 0.45 < x[1] < 0.55
    nowhere, no, there = np.full(12, np.nan), np.zeros(20), np.linspace(0.4, 0.9, 8)
    back, on = (np.concatenate([there, there[:-1][k], nowhere])[:20]
                for k in (slice(None, None, -1), slice(0)))
    lost = np.eye(20)[9] * -1.0
    assert [balls.fate(back, no), balls.fate(on, lost), balls.fate(on, no)] == [
        "returned", "lost", "gone"]
    assert balls.fate(back, lost) == "lost" and balls.fate(back, lost / 3) == "returned"
    assert balls.fate(on, np.eye(20)[5] + lost * 2) == "gone"  # first it wins one
    assert balls.fate(np.linspace(0.4, 0.7, 20), no) == "none"
    assert balls.shares(["lost", "gone", "gone", "none"]) == (
        "lost 25.0%, returned 0.0%, gone 50.0%, none 25.0%")
    flight = np.concatenate([np.linspace(0, 1, 40), np.linspace(1, 0, 40)] * 2)
    first = np.zeros(160, bool)
    starts = balls.moments(flight, first, 8)
    assert starts.tolist() == [10, 16, 90, 96]  # a quarter to a half of the way, six steps apart
    first[30] = True
    assert balls.moments(flight, first, 8).tolist() == [90, 96]
    (tmp_path / "none").mkdir()
    assert balls.main([str(tmp_path / "none")]) == 2 == balls.main(["x", "--dreams", "0"])
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all(line.startswith("balls.py: ") for line in said)


def test_balls_are_dreamt_of_along_a_script(model, agent, monkeypatch, capsys):
    balls, replay, cfg = experiment("balls"), make_replay(80), small()
    monkeypatch.setattr(balls, "moments", lambda x, first, context: np.array([20, 30, 40]))
    monkeypatch.setattr(balls, "find", lambda frames: np.full(len(frames), np.nan))
    replay.reward[:] = 0
    replay.reward[33] = -1.0
    dreamt = []

    def imagine(actor, z, action, first):
        drawn = [actor(z[:, -1]).argmax(-1) for _ in range(balls.STEPS)]
        dreamt.append(torch.stack(drawn, 1))
        feature = torch.zeros(len(z), balls.STEPS + 1, cfg.d_z + cfg.d_model)
        return drama.Dream(feature, dreamt[-1], -torch.ones(len(z), balls.STEPS), None)

    monkeypatch.setattr(model, "imagine", imagine)
    kept = model.cfg
    try:
        balls.look(cfg, model, SimpleNamespace(actor=lambda z: z[:, :2]), replay, 4, dreams=2)
    finally:
        model.cfg = kept
    rows = 4 + torch.tensor([20, 30, 40]).repeat(2)
    real = replay.action[rows[:, None] + torch.arange(balls.STEPS)]
    assert torch.equal(dreamt[0], real) and len(dreamt) == 3
    assert not torch.equal(dreamt[1], real)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == ("3 balls fly at the agent; in play lost 33.3%, returned 0.0%, gone 66.7%, "
                       "none 0.0%")
    assert said[1:4] == ["dreams along the real actions: lost 100.0%, returned 0.0%, gone 0.0%, "
                         "none 0.0%", "  1 lost in play: lost 100.0%, returned 0.0%, gone 0.0%, "
                         "none 0.0%", "  0 returned in play: lost 0.0%, returned 0.0%, gone 0.0%, "
                         "none 0.0%"]


# ---- the exercises ------------------------------------------------------------------------------

HERE = Path(__file__).resolve().parent / "exercises"
sys.path.insert(0, str(HERE))
import bugs  # noqa: E402
import checks  # noqa: E402
import grade  # noqa: E402
import make  # noqa: E402
import probes  # noqa: E402

ORIGINAL = make.ORIGINAL.read_text(encoding="utf-8")
TASKS = {task.number: task for task in make.TASKS}
RETURN = "def lambda_return(reward, end, value, gamma, lam):\n    "


def verdict(number, source):
    """What grade.py says of a task, judged in this process."""
    def request(probe, inputs):
        asked = json.loads(json.dumps(dict(probe=probe, inputs=inputs, seed=0, nonce="")))
        reply = json.loads(json.dumps(probes.answer(module, asked)))
        return grade.explain(reply, f"in {grade.place(probe, inputs)}", source.splitlines())

    try:
        student = make.ast.parse(source, "drama.py")
        module = probes.load(grade.parts(student, TASKS[number]), "graded")
        checks.CHECKS[number](checks.Student(request), np.random.default_rng(0))
        return "passed"
    except checks.Failed as failed:
        return str(failed)


@pytest.mark.parametrize("number", TASKS)
def test_a_task_fails_when_blank_and_passes_when_its_bodies_are_back(number):
    blank = make.rewrite(ORIGINAL, make.TASKS)
    title = make.tasks_of([*TASKS[number].blanks][0])
    assert verdict(number, blank) == f"{title}, still blank"
    # the hints' assertions stand above the bodies that are put back: they hold
    same = [t for t in make.TASKS if t.blanks.keys() == TASKS[number].blanks.keys()]
    others = [t for t in make.TASKS if t not in same]
    back = make.rewrite(make.rewrite(ORIGINAL, same, solution=True), others)
    assert verdict(number, back) == "passed"
    for other in others[:1]:
        assert verdict(other.number, back).startswith(f"task {other.number}: ")


def test_a_copy_keeps_all_but_the_bodies_asked_for():
    lines, copy = ORIGINAL.splitlines(), make.rewrite(ORIGINAL, [TASKS[4]]).splitlines()
    start, end = make.lines_of(make.functions(make.ast.parse(ORIGINAL))["lambda_return"], None)
    assert copy[:start] == lines[:start] and copy[-len(lines) + end:] == lines[end:]
    whole = make.rewrite(ORIGINAL, make.TASKS, solution=True).splitlines()
    rest = iter(whole)
    assert all(line in rest for line in lines)  # in their order: nothing but hints is added
    bodies = {node.name: node for node in make.ast.walk(make.ast.parse("\n".join(copy)))
              if isinstance(node, make.ast.FunctionDef)}
    assert make.ast.get_docstring(bodies["lambda_return"])
    for source in (whole, make.rewrite(ORIGINAL, make.TASKS).splitlines()):
        assert max(map(len, source)) <= max(map(len, lines))
    assert sum(task.points for task in make.TASKS) == 100


@pytest.mark.parametrize("bug", bugs.CATALOGUE, ids=lambda bug: f"{bug.function}: {bug.about}")
def test_a_bug_is_caught_by_its_task(bug):
    assert bug.says in verdict(bug.task, bugs.plant(ORIGINAL, bug))


def test_the_hunt_is_drawn_by_its_seed(tmp_path, capsys):
    assert bugs.main(["--out", str(tmp_path), "--seed", "7"]) == 0
    copy = (tmp_path / "drama.py").read_text(encoding="utf-8")
    picked = bugs.pick(7, 5)
    assert len({bug.function for bug in picked}) == 5 and bugs.pick(8, 5) != picked
    for number, task in TASKS.items():
        hit = any(bug.function in task.blanks for bug in picked)
        assert (verdict(number, copy) == "passed") is not hit
    assert all(bug.new in copy for bug in picked)
    capsys.readouterr()
    assert bugs.main(["--seed", "7", "--answer"]) == 0
    answer = capsys.readouterr().out
    assert all(bug.old in answer and bug.about in answer for bug in picked)


@pytest.mark.parametrize("number, mistake, code, words", [
    (1, "base 10", """
def symlog(x):
    return x.sign() * (1 + x.abs()).log10()""", "symlog([-1000, -1, 0.5, 30]) gave -3 at i=0, "
     "expected -6.909: the logarithm is the natural one, not base 10"),
    (1, "no sign", """
def symexp(y):
    return y.abs().expm1()""", "gave 402.4 at i=0, expected -402.4: the sign of y"),
    (1, "one hot", """
class TwoHot:
    def encode(self, x):
        near = (symlog(x)[..., None] - self.centres).abs().argmin(-1)
        return F.one_hot(near, len(self.centres)).float()""", "two bins share the weight"),
    (1, "exactly on a bin", """
class TwoHot:
    def encode(self, x):
        n, limit = len(self.centres), self.centres[-1]
        place = (symlog(x).clamp(-limit, limit) + limit) / (2 * limit) * (n - 1)
        low, high = place.floor(), place.ceil()
        return (F.one_hot(low.long(), n) * (high - place)[..., None]
                + F.one_hot(high.long(), n) * (place - low)[..., None])""",
     "exactly on a bin floor and ceil are the same"),
    (1, "overflow", """
class TwoHot:
    def mean(self, logits):
        weight = logits.exp() / logits.exp().sum(-1, keepdim=True)
        return symexp((weight * self.centres).sum(-1))""", "is exp(logits) infinite?"),
    (1, "log of softmax", """
class TwoHot:
    def loss(self, logits, x):
        return -(self.encode(x) * logits.softmax(-1).log()).sum(-1)""", "log_softmax, not"),
    (1, "outside", """
class TwoHot:
    def encode(self, x):
        n, limit = len(self.centres), self.centres[-1]
        place = (symlog(x) + limit) / (2 * limit) * (n - 1)
        return (1 - (place[..., None] - torch.arange(n)).abs()).clamp(min=0)""",
     "encode([1e6, -1e6]) gave 0 at x=0, bin=4, expected 1: beyond the outermost bin"),
    (2, "wrong axis", """
def unimix(logits, share):
    return ((1 - share) * logits.softmax(-2) + share / logits.shape[-1]).log()""",
     "unimix(logits (2, K=3, C=5), 0.1) gave -1.083 at i=0, k=0, c=0, expected -1.714: softmax"),
    (2, "argmax", """
def straight_through(logp):
    p = logp.exp()
    return F.one_hot(p.argmax(-1), p.shape[-1]) + p - p.detach()""",
     "drew number 0 in 4000 of 4000 draws, expected about 2400: a draw from p"),
    (2, "soft", """
def straight_through(logp):
    return logp.exp()""", "expected one 1, the others 0: the value is a draw"),
    (2, "normalised twice", """
def straight_through(logp):
    return torch.distributions.OneHotCategoricalStraightThrough(logits=logp).rsample()""",
     "exp(log p), no softmax more"),
    (3, "bits", """
def kl_divergence(logp, logq):
    return (logp.exp() * (logp - logq)).sum((-2, -1)) / 0.6931472""", "in nats"),
    (3, "hard zero", """
def free_bits(kl, threshold):
    return torch.where(kl < threshold, 0, kl)""", "below the threshold the loss is the threshold"),
    (3, "gradient", """
def free_bits(kl, threshold):
    return kl + (threshold - kl).clamp(min=0).detach()""", "has gradient [1, 1, 1], expected 0"),
    (4, "reversed", """
def lambda_return(reward, end, value, gamma, lam):
    R, out = value[:, -1], []
    for t in reversed(range(reward.shape[1])):
        R = reward[:, t] + gamma * (1 - end[:, t]) * ((1 - lam) * value[:, t + 1] + lam * R)
        out.append(R)
    return torch.stack(out, 1)""", "is the list turned round"),
    (4, "forwards", """
def lambda_return(reward, end, value, gamma, lam):
    R, out = value[:, -1], []
    for t in range(reward.shape[1]):
        R = reward[:, t] + gamma * (1 - end[:, t]) * ((1 - lam) * value[:, t + 1] + lam * R)
        out.append(R)
    return torch.stack(out, 1)""", "is time taken backwards?"),
    (4, "in place", """
def lambda_return(reward, end, value, gamma, lam):
    for t in reversed(range(reward.shape[1])):
        next_V = value[:, t + 1] if t + 1 < reward.shape[1] else value[:, -1]
        V = kept if t + 1 < reward.shape[1] else next_V
        kept = value[:, t].clone()
        value[:, t] = reward[:, t] + gamma * (1 - end[:, t]) * ((1 - lam) * V + lam * next_V)
    return value[:, :-1]""", "changed value, which it was given, in place"),
    (4, "shape", """
def lambda_return(reward, end, value, gamma, lam):
    return value""", "has shape (1, 3), expected (1, 2)"),
    (5, "bounded above", """
def dfs_dream_logits(v, b, s, temperature):
    return (v - b / s).clamp(min=0) / temperature""", "min(0, …), not max"),
    (6, "in place", """
def ssd_step(x, dt, A, B, C, state):
    state.mul_((dt * A).exp()[..., None, None])
    state.add_((dt[..., None] * x)[..., None] * B[:, None, None])
    return (state * C[:, None, None]).sum(-1), state""", "changed the state, which it was given"),
    (6, "y first", """
def ssd_step(x, dt, A, B, C, state):
    new = (dt * A).exp()[..., None, None] * state + (
        dt[..., None] * x)[..., None] * B[:, None, None]
    return (state * C[:, None, None]).sum(-1), new""", "y reads the NEW state"),
    (6, "n x p", """
def ssd_step(x, dt, A, B, C, state):
    new = (dt * A).exp()[..., None, None] * state + (
        dt[..., None] * x)[..., None] * B[:, None, None]
    return (new * C[:, None, None]).sum(-1), new.mT""",
     "state, has shape (2, 5, 4, 3), expected (2, 5, 3, 4)"),
    (6, "wrong axis of B", """
def ssd_step(x, dt, A, B, C, state):
    new = (dt * A).exp()[..., None, None] * state + (dt[..., None] * x)[..., None] * B[:, None]
    return (new * C[:, None, None]).sum(-1), new""", "RuntimeError in line"),
    (6, "detached", """
def ssd_step(x, dt, A, B, C, state):
    new = (dt * A).exp()[..., None, None] * state.detach() + (
        dt[..., None] * x)[..., None] * B[:, None, None]
    return (new * C[:, None, None]).sum(-1), new""", "no gradient comes back to the state"),
    (6, "the other function", """
def ssd_step(x, dt, A, B, C, state):
    y, state = ssd_scan(*(t[:, None] for t in (x, dt)), A, B[:, None], C[:, None], 1, state)
    return y[:, 0], state""", "ssd_scan is not there while task 6 is graded"),
    (7, "a loop over tokens", """
def ssd_scan(x, dt, A, B, C, chunk_size, state=None, first=None):
    state = x.new_zeros(*x.shape[:1], *x.shape[2:], B.shape[-1]) if state is None else state
    ys = []
    for t in range(x.shape[1]):
        state = (dt[:, t] * A).exp()[..., None, None] * state + (
            dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, None, None]
        ys.append((state * C[:, t, None, None]).sum(-1))
    return torch.stack(ys, 1), state""", "a loop over tokens? Loop over chunks"),
    (7, "one big matrix", """
def ssd_scan(x, dt, A, B, C, chunk_size, state=None, first=None):
    b, l, h, p = x.shape
    S = (dt * A).cumsum(1).transpose(1, 2)
    mask = torch.ones(l, l, dtype=torch.bool).tril()
    decay = (S[..., None] - S[..., None, :]).masked_fill(~mask, -torch.inf).exp()
    X = (dt[..., None] * x).transpose(1, 2)
    y = ((C @ B.mT)[:, None] * decay) @ X
    last = X.mT @ (B[:, None] * (S[..., -1:] - S).exp()[..., None])
    if state is not None:
        y = y + S.exp()[..., None] * (C[:, None] @ state.mT)
        last = last + S[..., -1].exp()[..., None, None] * state
    return y.transpose(1, 2), last""", "a matrix of q x q in each chunk, not of l x l"),
    (7, "state dropped", """
def ssd_scan(x, dt, A, B, C, chunk_size, state=None, first=None):
    parts = [helper(*(t[:, i:i + chunk_size] for t in (x, dt)), A,
                    *(t[:, i:i + chunk_size] for t in (B, C)))
             for i in range(0, x.shape[1], chunk_size)]
    return torch.cat([y for y, _ in parts], 1), parts[-1][1]

def helper(x, dt, A, B, C):
    S = (dt * A).cumsum(1).transpose(1, 2)
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    decay = (S[..., None] - S[..., None, :]).masked_fill(~mask, -torch.inf).exp()
    X = (dt[..., None] * x).transpose(1, 2)
    last = X.mT @ (B[:, None] * (S[..., -1:] - S).exp()[..., None])
    return (((C @ B.mT)[:, None] * decay) @ X).transpose(1, 2), last""",
     "chunks of 2), y, gave 1 at t=2, expected 1.75: is the state carried from chunk to chunk?"),
], ids=lambda x: x if isinstance(x, str) and len(x) < 20 else "")
def test_a_wrong_answer_gets_a_line_that_names_the_place(number, mistake, code, words):
    source = ORIGINAL
    if code.startswith("\nclass TwoHot"):  # a method stands in its class
        code = code.split("\n", 2)[2]
        name = "TwoHot." + code.split("(")[0].split()[-1]
        start, end = bugs.segment(source, name)
        source, code = source[:start] + code + "\n" + source[end:], ""
    assert words in verdict(number, source + "\n" + code + "\n")


def test_a_student_may_add_helpers_methods_constants_and_imports():
    source = ORIGINAL.replace("class WorldModel(", "BROKEN = 1 / 0\n\n\nclass WorldModel(") + f"""
import math
from functools import reduce
TINY = 1e-30

def back(pairs, last, gamma):
    return reduce(lambda R, pair: [pair[0] + gamma * pair[1] * R[0]] + R, pairs, [last])

{RETURN}pairs = [(r + gamma * (1 - e) * (1 - lam) * v, (1 - e) * lam) for r, e, v in zip(
        reward.unbind(1), end.unbind(1), value.unbind(1)[1:])]
    assert math.isfinite(TINY)
    return torch.stack(back(pairs[::-1], value[:, -1], gamma)[:-1], 1)
"""
    source += "import random\nimport os.path as where\n"  # an editor adds such lines by itself
    assert verdict(4, source) == "passed"  # the broken constant is used by nobody
    start, end = bugs.segment(ORIGINAL, "lambda_return")
    assert verdict(4, ORIGINAL[:start] + ORIGINAL[start:end].replace("R,", "input,").replace(
        "R =", "input =").replace("(R)", "(input)").replace("* R)", "* input)") + ORIGINAL[end:]
                   ) == "passed"
    method = ("    def spread(self, place):\n        away = place[..., None] - torch.arange(len("
              "self.centres))\n        return (1 - away.abs()).clamp(min=0)\n\n"
              "    def encode(self, x):\n        limit = self.centres[-1]\n        return self."
              "spread((symlog(x).clamp(-limit, limit) + limit) / (2 * limit) * (len(self.centres)"
              " - 1))\n")
    start, end = bugs.segment(ORIGINAL, "TwoHot.encode")
    assert verdict(1, ORIGINAL[:start] + method + ORIGINAL[end:]) == "passed"


@pytest.mark.parametrize("code, words", [
    ("import sys\n    sys.path.insert(0, '..')\n    import drama\n    return drama", "imports sys"),
    ("import drama\n    return drama.lambda_return(reward, end, value, gamma, lam)",
     "imports drama: a task needs none but torch"),
    ("return open('drama.py').read()", "names `open`"),
    ("exec('1', space := {})\n    return space", "names `exec`"),
    ("return getattr(torch, 'from_' + 'file')('drama.py')", "names `getattr`"),
    ("return torch.from_file('drama.py', size=9)", "names `from_file`"),
    ("return lambda_return.__globals__", "names `__globals__`"),
    ("return drama_solved.all()\nimport drama_solved", "imports drama_solved"),
    ("return spoil(1)\nfrom torch import from_file as spoil", "imports from_file"),
    ("return spoil(1)\nfrom collections import _sys as spoil", "imports _sys"),
    ("return collections._sys.modules\nimport collections", "names `_sys`"),
    ("return 1\nfrom solved import *", "imports solved"),
    ("return value[:, 99]", "`return value[:, 99]`, in lambda_return: index 99 is out of bounds"),
    ("return lambda_return(reward, end, value, gamma, lam)", "RecursionError in line"),
    ("raise SystemExit(0)", "SystemExit in line"),
    ("class All:\n        def __eq__(self, other):\n            return True\n    return All()",
     "gave All, expected a tensor of shape (1, 2)"),
    ("return [2.25, 3.0]", "gave list, expected a tensor"),
    ("print('passed, 8 of 8')\n    return value[:, 1:]", "gave 2 at t=0, expected 2.25"),
], ids=lambda x: x[:12].strip())
def test_cheats_and_crashes_are_named(code, words):
    assert words in verdict(4, f"{ORIGINAL}\n\n{RETURN}{code}\n")


def processes(cases, tmp_path, limit):
    """Each case's verdict by grade.judge, in processes as grade.py starts them, two at a time."""
    files = []
    for i, code in enumerate(cases):
        files.append(tmp_path / f"{i}.py")
        files[-1].write_text(f"{ORIGINAL}\n\n{RETURN}{code}\n", encoding="utf-8")
    with grade.concurrent.futures.ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda file: grade.judge(TASKS[4], file, limit=limit)[0], files))


@pytest.mark.slow
def test_the_original_passes_every_task_in_its_own_process(capsys):
    assert grade.main([str(make.ORIGINAL), "--jobs", "2"]) == 0
    assert "100 of 100 points" in capsys.readouterr().out


@pytest.mark.slow
def test_cheats_in_their_own_process_get_nothing(tmp_path):
    there = str(make.ORIGINAL)
    cases = {
        # names that the grader knows are easily gone round; what they do is seen all the same
        f"return torch.os.fdopen(torch.os.open({there!r}, 0)).read()": f"open on {there}",
        f"try:\n        torch.os.open({there!r}, 0)\n    except BaseException:\n        return 1":
            f"open on {there}",
        "return torch.os.popen('cat drama.py').read()": "calls subprocess.Popen",
        "torch.os.kill(torch.os.getppid(), 9)": "calls os.kill",
        "(lambda way: way._exit(0))(torch.os)": "the process ended in lambda_return, exit code 0",
        "torch.sys.modules['__main__'].pack = lambda x: dict(out=dict(passed=True))\n    return 1":
            "expected a tensor of shape",
        "print('{\"result\": {\"passed\": true}}')\n    for pipe in range(3, 12):\n        try:\n"
        "            torch.os.write(pipe, b'{\"result\": {}}\\n')\n        except OSError:\n"
        "            pass\n    return value[:, 1:]": "does the code write to the grader's pipe?",
        "while True:\n        print('x')": "no answer within 4 seconds in lambda_return",
    }
    for said, words in zip(processes(cases, tmp_path, 4), cases.values()):
        assert words in said, (words, said)


def test_tasks_are_parsed_one_at_a_time(monkeypatch):
    """In CPython 3.11 a thread that comes in while another parses, as a garbage collection may let
    it, makes both a SystemError. Here each collection lets it."""
    monkeypatch.setattr(grade, "Process", lambda *_: nullcontext(SimpleNamespace(request=None)))
    monkeypatch.setattr(grade.checks, "CHECKS", dict.fromkeys(range(100), lambda *_: None))
    grade.parsed.cache_clear()
    grade.remainder.cache_clear()
    let_others_in, threshold = lambda *_: time.sleep(1e-4), gc.get_threshold()
    gc.callbacks.append(let_others_in)
    gc.set_threshold(200)
    try:
        with ThreadPoolExecutor(4) as pool:
            verdicts = list(pool.map(lambda task: grade.judge(task, make.ORIGINAL), make.TASKS[:4]))
    finally:
        gc.callbacks.remove(let_others_in)
        gc.set_threshold(*threshold)
    assert verdicts == [("", [])] * 4


@pytest.mark.slow
def test_grade_by_its_command(tmp_path, capsys):
    file, results = tmp_path / "hw" / "drama.py", tmp_path / "results.json"
    assert make.main(["--out", str(file.parent), "--tasks", "1,4"]) == 0
    start, end = bugs.segment(ORIGINAL, "lambda_return")
    text = file.read_text(encoding="utf-8") + "\n\n" + ORIGINAL[start:end]
    file.write_text(text, encoding="utf-8")  # the last of two definitions counts
    assert grade.main([str(file), "--tasks", "1,4", "--json", str(results), "--jobs", "2"]) == 1
    table = capsys.readouterr().out
    assert "0/8   task 1: symlog and two-hot, still blank" in table and "8/8   passed" in table
    said = json.loads(results.read_text())
    assert said["score"] == 8 and said["max_score"] == 16 and said["execution_time"] > 0
    assert [(t["score"], t["max_score"], t["status"], t["output"]) for t in said["tests"]] == [
        (0, 8, "failed", "task 1: symlog and two-hot, still blank"), (8, 8, "passed", "passed")]
    assert grade.main([str(file), "--tasks", "4"]) == 0
    other, scores = tmp_path / "other" / "drama.py", tmp_path / "scores.csv"
    other.parent.mkdir()
    other.write_text(text.replace("return torch.stack(returns[::-1], 1)", "return {}"))
    asked = [str(tmp_path), "--tasks", "4", "--csv", str(scores)]
    assert grade.main(asked) == 1
    assert scores.read_text().split() == ["file,task", "4,points", f"{file},8,8", f"{other},0,0"]
    file.write_text("def lambda_return(:", encoding="utf-8")
    assert grade.main([str(file), "--tasks", "4"]) == 1
    assert "line 1: syntax error" in capsys.readouterr().out
    file.write_text("x = 1", encoding="utf-8")
    assert grade.main([str(file), "--tasks", "4"]) == 1
    assert "the file has no function lambda_return" in capsys.readouterr().out


def test_the_readme_of_the_exercises_names_the_tasks():
    text = (HERE / "README.md").read_text(encoding="utf-8")
    for task in make.TASKS:
        assert f"### {task.number} · " in text and f"({task.points} points, " in text
        section = text.split(f"### {task.number} · ")[1].split("\n### ")[0]
        assert section.split(" (")[0].lower() == task.title.lower()
        assert f"({task.points} points, " in section.splitlines()[0]
        assert all(f"`{name}`" in section for name in task.blanks) or task.number == 8


def test_the_tour_runs_with_this_drama(tmp_path, monkeypatch):
    book = json.loads((HERE / "tour.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert max(len(cell["source"]) for cell in cells) <= 20
    outputs = [out for cell in cells for out in cell["outputs"]]
    assert sum("image/png" in out.get("data", ()) for out in outputs) >= 8
    assert not any(out["output_type"] == "error" for out in outputs)
    assert (HERE / "tour.ipynb").stat().st_size < 300_000
    code = "\n".join(line for cell in cells for line in "".join(cell["source"]).splitlines()
                     if not line.startswith("%"))
    assert "def " not in code and "class " not in code  # nothing of drama.py is written twice
    cfg, _ = drama.parse(["--game", "GridWorld", "--device", "cpu"])
    (tmp_path / "results").mkdir()
    shutil.copy(make.ORIGINAL, tmp_path)
    torch.save(dict(config=dataclasses.asdict(cfg), at=dict(step=0), agent=ActorCritic(
        cfg, 4).state_dict(), model=WorldModel(cfg, 4).state_dict()),
        tmp_path / "results" / "GridWorld.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    import matplotlib
    matplotlib.use("Agg")
    with matplotlib.rc_context():
        exec(compile(code, "tour.ipynb", "exec"), space := {})
        space["plt"].close("all")
    assert space["surprise"].shape == (63,) and space["dreams"].reward.shape[1] == cfg.horizon


@pytest.mark.parametrize("program, line, words", [
    (make, "--out {here} --tasks 1,99", "no task 99; choose from 1, 2"),
    (grade, "{there} --tasks 4 --json x.json", "--json is for one file"),
    (make, "--out {there}", "use another folder"), (make, "", "--out; see --help"),
    (make, "--out {here}/drama.py", "drama.py"), (make, "--out {here}", "is there already"),
    (grade, "{here}/none.py", "no such file; make one with"), (grade, "{here}/drama.py --limit 0",
                                                               "must be above 0"),
    (bugs, "--seed 7", "--out or --answer"), (bugs, "--seed 7 --number 99 --answer", "from 1 to"),
    (bugs, "--out {here} --seed x", "invalid int value"),
])
def test_bad_commands_of_the_exercises_get_one_line(program, line, words, tmp_path, capsys):
    (tmp_path / "drama.py").write_text("my work", encoding="utf-8")
    line = line.format(here=tmp_path, there=make.ORIGINAL.parent)
    assert make.run("x.py", program.main, shlex.split(line)) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and error.startswith("x.py: ")
    assert (tmp_path / "drama.py").read_text(encoding="utf-8") == "my work"


# ---- the paper's other experiments: backbones.py, long_sequence.py -------------------------------

import backbones  # noqa: E402
import curves  # noqa: E402
import long_sequence  # noqa: E402


def naive_selective_scan(x, dt, A, B, C, state, first):
    """The recurrence of [3], a token after the other."""
    ys = []
    for t in range(x.shape[1]):
        state = state * ~first[:, t, None, None]
        inflow = dt[:, t, :, None] * B[:, t, None] * x[:, t, :, None]  # (b, d, n)
        state = (dt[:, t, :, None] * A).exp() * state + inflow
        ys.append((state * C[:, t, None]).sum(-1))
    return torch.stack(ys, 1), state


def scan_inputs(length, d=3, n=5):
    """Double inputs of the selective scan, as leaves."""
    double = partial(torch.randn, dtype=torch.float64)
    x, B, C = double(b, length, d), double(b, length, n), double(b, length, n)
    dt, A, state = double(b, length, d).exp(), -double(d, n).exp(), double(b, d, n)
    return [v.requires_grad_() for v in (x, dt, A, B, C, state)]


@pytest.mark.parametrize("length", [1, 2, 3, 11, 16, 33])
@pytest.mark.parametrize("resets", [0, 0.3])
def test_selective_scan_is_the_recurrence(length, resets):
    leaves, first = scan_inputs(length), torch.rand(b, length) < resets
    results = []
    for scan in (backbones.selective_scan, naive_selective_scan):
        torch.manual_seed(1)
        values = scan(*leaves, first)
        loss = sum((torch.randn_like(v) * v).sum() for v in values)
        results.append([*values, *torch.autograd.grad(loss, leaves)])
    errors = [(v - want).abs().max().item() for v, want in zip(*results, strict=True)]
    assert max(errors) < 1e-10, errors


def test_selective_scan_by_hand():
    # halved at each token: 1, 1 + 1/2, 1 + 3/4; a state of 4 adds 2, 1, 1/2; a reset starts anew
    one, state = torch.ones(1, 3, 1), torch.full((1, 1, 1), 4.0)
    scan = partial(backbones.selective_scan, one, one, torch.tensor([[0.5]]).log(), one, one)
    close(scan()[0].flatten(), [1, 1.5, 1.75])
    close(scan(state)[0].flatten(), [3, 2.5, 2.25])
    y, end = scan(state, torch.tensor([[False, False, True]]))
    close(y.flatten(), [3, 2.5, 1])
    assert end.item() == 1


def test_selective_scan_keeps_memory_linear_in_the_length():
    def kept(length):
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
                lambda t: sizes.update({t.untyped_storage().data_ptr(): t.nbytes}) or t,
                lambda t: t):
            held = backbones.selective_scan(*scan_inputs(length))  # alive: no address comes twice
        return sum(sizes.values()), held
    short, long = (kept(length)[0] for length in (256, 1024))
    assert 3.5 * short < long < 4.1 * short


def test_mamba_has_the_official_parameters_and_initial_values():
    cfg = small(d_model=96, d_state=7, d_conv=3)
    layer = backbones.Mamba(cfg, 190)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "in_proj.weight": (380, 96), "conv1d.weight": (190, 1, 3), "conv1d.bias": (190,),
        "x_proj.weight": (6 + 2 * 7, 190), "dt_proj.weight": (190, 6), "dt_proj.bias": (190,),
        "A_log": (190 * 7,), "D": (190,), "out_proj.weight": (96, 190)}
    close(layer.A_log.exp().view(190, 7).detach(), np.tile(np.arange(1, 8), (190, 1)))
    dt, limit = F.softplus(layer.dt_proj.bias).detach(), 6**-0.5
    assert 1e-3 - 1e-6 < dt.min() and dt.max() < 0.1 + 1e-6 and (layer.D == 1).all()
    assert 0.25 < (dt < 0.01).float().mean() < 0.75  # log-uniform: half lie in each decade
    assert 0.95 * limit < layer.dt_proj.weight.abs().max() <= limit


def naive_mamba(layer, u):
    """The layer as [3] has it, from its parameters alone: one episode u (l, d_model), float64."""
    p = {k: v.detach() for k, v in layer.named_parameters()}
    inner, taps, n = len(p["D"]), p["conv1d.weight"].shape[-1], len(p["A_log"]) // len(p["D"])
    x, z = (u @ p["in_proj.weight"].T).split(inner, -1)
    x = F.conv1d(F.pad(x.T, (taps - 1, 0)), p["conv1d.weight"], p["conv1d.bias"], groups=inner).T
    x = F.silu(x)
    dt, B, C = (x @ p["x_proj.weight"].T).tensor_split([-2 * n, -n], -1)
    dt = (dt @ p["dt_proj.weight"].T + p["dt_proj.bias"]).exp().log1p()
    A, zero = -p["A_log"].exp().view(inner, n), torch.zeros(1, inner, n)
    y, _ = naive_selective_scan(*(v[None] for v in (x, dt)), A, *(v[None] for v in (B, C)), zero,
                                torch.zeros(1, len(u), dtype=torch.bool))
    return ((y[0] + p["D"] * x) * F.silu(z)) @ p["out_proj.weight"].T


def naive_transformer(layer, u):
    """Attention as a loop over tokens and heads, rotary positions as complex numbers [7]."""
    p = {k: v.detach() for k, v in layer.named_parameters()}
    h, half = layer.heads, layer.p // 2
    q, k, v = (u @ p["qkv.weight"].T).view(len(u), 3, h, layer.p).unbind(1)
    q, k = (torch.complex(w[..., :half], w[..., half:]) for w in (q, k))  # (l, h, p/2)
    turn = torch.polar(torch.ones(half).double(), 1e4 ** -(torch.arange(half) / half).double())
    y = torch.zeros(len(u), h, layer.p).double()
    for t in range(len(u)):
        seen = range(max(0, t - layer.window + 1), t + 1)
        for head in range(h):
            score = torch.stack([(q[t, head] * k[s, head].conj() * turn ** (t - s)).real.sum()
                                 for s in seen]) / layer.p**0.5
            y[t, head] = sum(w * v[s, head] for w, s in zip(score.softmax(0), seen, strict=True))
    y = y.flatten(1) @ p["out_proj.weight"].T
    x = u + y
    x = x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()
    x = F.silu(x * p["norm.weight"] @ p["mlp.0.weight"].T + p["mlp.0.bias"])
    return y + x @ p["mlp.2.weight"].T + p["mlp.2.bias"]


def naive_gru(layer, u):
    """The gates one by one, r, z, n as PyTorch orders them."""
    p = {k: v.detach() for k, v in layer.named_parameters()}
    h, ys = torch.zeros(p["gru.weight_hh_l0"].shape[1]).double(), []
    for u_t in u:
        old = h
        given = (p["gru.weight_ih_l0"] @ u_t + p["gru.bias_ih_l0"]).chunk(3)
        kept = (p["gru.weight_hh_l0"] @ h + p["gru.bias_hh_l0"]).chunk(3)
        r, z = ((i + j).sigmoid() for i, j in zip(given[:2], kept[:2], strict=True))
        h = (1 - z) * (given[2] + r * kept[2]).tanh() + z * old
        ys.append(h)
    return torch.stack(ys) @ p["out_proj.weight"].T


@pytest.mark.parametrize("name, naive", [("mamba", naive_mamba), ("gru", naive_gru),
                                         ("transformer", naive_transformer)])
def test_layers_are_their_formulas_and_a_reset_makes_two_sequences(name, naive):
    cfg = small(batch_length=5)  # the transformer's window: shorter than an episode
    layer = scrambled(backbones.LAYERS[name](cfg, 9)).double()
    u, first = torch.randn(b, l, cfg.d_model).double(), torch.zeros(b, l, dtype=torch.bool)
    first[0, [2, 5, 6]] = first[1, 9] = True
    for row, cuts in enumerate(([0, 2, 5, 6, l], [0, 9, l])):
        alone = [naive(layer, u[row, i:j]) for i, j in zip(cuts, cuts[1:], strict=False)]
        exact(layer(u)[0][row].detach(), naive(layer, u[row]))
        exact(layer(u, first=first)[0][row].detach(), torch.cat(alone))


@pytest.mark.parametrize("name", ["mamba2", *backbones.LAYERS])
def test_backbones_forward_is_step_by_step_values_and_gradients(name):
    cfg = small(batch_length=5)
    sequence = scrambled(backbones.make(name, cfg, ACTIONS)).double()
    z, action = torch.randn(b, l, K * C).double().requires_grad_(), torch.randint(0, 4, (b, l))
    first, weight = torch.rand(b, l) < 0.2, torch.randn(b, l, cfg.d_model).double()
    first[0, 3] = True

    def gradients(d):
        return torch.autograd.grad((d * weight).sum(), [z, *sequence.parameters()])

    whole, end = sequence(z, action, None, first)
    whole_gradients = gradients(whole)
    for cut in (0, 1, 6, l - 1, l):  # so many tokens at once, the rest at once and by steps
        d, states = sequence(z[:, :cut], action[:, :cut], None, first[:, :cut]) if cut else (
            z.new_zeros(b, 0, cfg.d_model), sequence.initial_states(b))
        ds, before = [d], states
        for t in range(cut, l):
            states = drama.clear(states, first[:, t])
            old = [[s.clone() for s in state] for state in states]
            d, new = sequence(z[:, t], action[:, t], states)
            assert all(map(torch.equal, sum(old, []), sum(map(list, states), [])))
            ds, states = [*ds, d[:, None]], new
        steps = torch.cat(ds, 1)
        exact(steps.detach(), whole.detach())
        for got, want in zip(gradients(steps), whole_gradients, strict=True):
            exact(got, want)
        if cut < l:
            d, last = sequence(z[:, cut:], action[:, cut:], before, first[:, cut:])
            exact(d.detach(), whole[:, cut:].detach())
            after, want = (sequence(z[:, 0], action[:, 0], s)[0] for s in (last, end))
            exact(after.detach(), want.detach())


@torch.no_grad()
@pytest.mark.parametrize("name", backbones.LAYERS)
def test_backbones_are_causal_and_the_attention_forgets_what_its_window_left(name):
    cfg = small(batch_length=4, layers=1)
    sequence = scrambled(backbones.make(name, cfg, ACTIONS)).double()
    z, action = torch.randn(b, l, K * C).double(), torch.randint(0, ACTIONS, (b, l))
    d, states = sequence(z, action)
    other = sequence(z, (action + F.one_hot(torch.tensor(3), l)) % ACTIONS)[0]
    changed = (other != d).any(2).any(0)
    last = 3 + cfg.batch_length if name == "transformer" else l
    assert changed.tolist() == [3 <= t < last for t in range(l)]
    if name == "transformer":
        assert all(s.shape[1] == cfg.batch_length - 1 for s in states[0])


@pytest.mark.parametrize("preset", ["paper", "laptop", "gridworld", "tiny"])
def test_backbones_have_equal_parameters(preset, capsys):
    cfg = drama.parse(["--preset", preset])[0]
    counts = {name: backbones.size(backbones.make(name, cfg, ACTIONS))
              for name in ("mamba2", *backbones.LAYERS)}
    assert all(abs(n / counts["mamba2"] - 1) < 0.05 for n in counts.values()), counts
    model = WorldModel(cfg, ACTIONS)
    model.sequence = backbones.make("mamba", cfg, ACTIONS)
    decayed = drama.make_learners(cfg, model, ActorCritic(cfg, ACTIONS))[0].optimiser.param_groups
    free = [p for group in decayed if not group["weight_decay"] for p in group["params"]]
    for layer in model.sequence.layers:
        assert all(any(p is q for q in free) for p in (layer.A_log, layer.D, layer.dt_proj.bias))


@pytest.mark.slow
@pytest.mark.parametrize("name", backbones.LAYERS)
def test_backbones_train_go_on_and_are_evaluated(name, no_pictures, capsys):
    line = f"--backbone {name} --game GridWorld --preset tiny --device cpu --precision bfloat16"
    line += " --compile off --steps "
    assert backbones.main(f"{line} 80".split()) == 0
    assert re.search(rf"backbone {name}; parameters of a layer: mamba2 1,972 .*{name} [12],\d+ \(",
                     capsys.readouterr().out)
    assert drama.SequenceModel is SequenceModel and drama.time is time  # as it was
    assert backbones.main(f"{line} 130".split()) == 0
    assert "from step 80 to 130" in capsys.readouterr().out
    out, other = Path(f"runs/GridWorld-0-{name}"), {"gru": "mamba"}.get(name, "gru")
    assert len(read_csv(out / "episodes.csv")) == 130 // GridWorld.STEPS
    assert np.isfinite([float(row["kl"]) for row in read_csv(out / "metrics.csv")]).all()
    assert backbones.main(f"--backbone {name} --game GridWorld --eval 1 --device cpu".split()) == 0
    assert "1 episodes: mean" in capsys.readouterr().out
    wrong = f"{line} 130".replace(name, other, 1) + f"0 --out {out}"
    assert backbones.main(wrong.split()) == 2
    assert "does not fit" in capsys.readouterr().err


@pytest.mark.parametrize("script, line, words", [
    (backbones, "--backbone lstm", "invalid choice: 'lstm'"),
    (backbones, "--game pong", "try Pong"),
    (backbones, "--backbone gru --batch-size x", "--batch-size"),
    (backbones, "--d_model 1 --headdim 1 --expand 1 --game GridWorld", "parameters"),
    (long_sequence, "--out here --lengths 27", "--lengths 27: must be 26 times 2 or more"),
    (long_sequence, "--out here --width 7", "--width must be even"),
    (long_sequence, "--out nowhere/here", "nowhere"),
    (long_sequence, "", "--out"),
    (curves, "--game Pong --group a none.csv --out a.png", "no file none.csv"),
    (curves, "--game Pong --group a --out a.png", "no file is given"),
    (curves, "--game Qbert --dreamerv3 --group a none.csv --out a.png", "only of Boxing, Pong"),
    (curves, "--game Tetris --group a none.csv --out a.png", "Tetris"),
    (curves, "--folder none --out a.png", "no episode"),
    (curves, "--out a.png", "--folder")])
def test_experiments_answer_bad_input_with_one_line(script, line, words, capsys):
    try:
        code = script.main(line.split())
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and words in error and error.count("\n") == 1 and not any(Path().iterdir())


def test_worlds_of_tokens_play_by_gridworlds_rules():
    tokens, gap, placed = long_sequence.worlds(40, 32, seed=3)
    assert tokens.shape == (40, 32, 26) and set(np.unique(gap)) <= {0, 1, 2, 4, 8, 16}
    cells, actions = tokens[..., :25].reshape(40, 32, 5, 5), tokens[..., 25] - 4
    assert set(np.unique(actions)) == set(range(8)) and set(np.unique(cells)) == {0, 1, 2, 3}
    edge = np.ones((5, 5), bool)
    edge[1:-1, 1:-1] = False
    assert ((cells == 0) == edge).all() and ((cells == 2).sum((2, 3)) == 1).all()
    shown = (cells == 3).sum((2, 3))
    assert (shown == (gap > 0)).all() and (shown[:, 1:] == actions[:, :-1] // 4).all()
    moves = ((-1, 0), (1, 0), (0, -1), (0, 1))  # up, down, left, right
    for i in range(40):
        [goal], [agent], since = np.argwhere(cells[i, 0] == 3), np.argwhere(cells[i, 0] == 2), 0
        for t in range(1, 32):
            moved, since = np.clip(agent + moves[actions[i, t - 1] % 4], 1, 3), since + 1
            [agent] = np.argwhere(cells[i, t] == 2)
            assert placed[i, t] == (shown[i, t] and (moved == goal).all())
            assert placed[i, t] or (agent == moved).all()
            if shown[i, t]:
                [here] = np.argwhere(cells[i, t] == 3)
                assert gap[i, t] == since and (placed[i, t] or (here == goal).all())
                goal, since = here, 0
    assert placed[:, 1:].any() and (gap[:, 1:] == 1).any()


def test_errors_of_a_frame_are_counted(monkeypatch):
    """Of a model that foretells every cell but the goal, and of one that is always right."""
    monkeypatch.setattr(long_sequence, "EVALUATED", 10**6)  # the oracles answer for all at once
    tokens, gap, placed = long_sequence.worlds(long_sequence.UNSEEN, 8, seed=2**31)
    flat = torch.from_numpy(tokens).flatten(1)

    class Oracle:
        def __init__(self, blind):
            cells = flat.clamp(max=3)
            self.true = torch.where(cells == 3, 1, cells) if blind else cells

        def __call__(self, given):
            ahead = F.pad(self.true, (0, 1))[:, 1:given.shape[1] + 1]
            return F.one_hot(ahead, 4).float(), None

        def step(self, token, place, states):
            return F.one_hot(self.true[:, 7 * 26 + min(place + 1, 25)], 4).float(), None

    right, blind = (long_sequence.errors(Oracle(b), 208) for b in (False, True))
    assert right["cells"] == 0 and {v for k, v in right.items() if k != "cells"} == {1.0}
    assert {"recall_1", "recall_2", "recall_4"} <= right.keys()
    hidden = (gap[:, -1] == 0).mean()
    fair = ~placed[:, -1]
    exact([blind[k] for k in ("cells", "walls", "agent", "goal", "move", "recall_2")],
          [(gap[fair, -1] > 0).mean(), 1, 1, hidden, 1, 0])


@pytest.mark.slow
def test_long_sequences_are_made_once_and_drawn(monkeypatch, capsys):
    monkeypatch.setattr(long_sequence, "UNSEEN", 16)
    line = "--out small --width 16 --lengths 52 208 --trained 52 --tokens 4000".split()
    assert long_sequence.main(line) == 0
    rows, out = read_csv("small.csv"), capsys.readouterr().out
    assert [(r["backbone"], r["length"]) for r in rows] == [
        (name, length) for length in ("52", "208") for name in ("mamba2", *backbones.LAYERS)]
    for row in rows:
        assert all(float(row[k]) > 0 for k in ("forward_ms", "step_ms", "peak_MiB", "parameters"))
        assert bool(row["recall_1"]) == bool(row["loss"]) == (row["length"] == "52")
    held = {(r["backbone"], r["length"]): float(r["peak_MiB"]) for r in rows}
    for name in ("mamba2", "mamba"):  # 4 times the tokens, at most 4.5 times the memory
        assert held[name, "208"] < 4.5 * held[name, "52"]
    assert Image.open("small.png").size[0] > 900 and "updates 2" in out
    assert long_sequence.main(line) == 0
    assert read_csv("small.csv") == rows and "updates" not in capsys.readouterr().out


# ---- the world around: pictures, disks, consoles, old files, other systems -----------------------
# The oracle: the same run where nothing is wrong.


def raises(error):
    """A call that fails so."""
    def fail(*args, **options):
        raise error
    return fail


CURVES, BOTH = "draw_dreams", "draw_curves draw_dreams"  # what is left out: pictures take time
LOOKED_AT = {
    "backend": (lambda m: m.setenv("MPLBACKEND", "module://nowhere"), "", CURVES),
    "matplotlib": (lambda m: m.setattr(pictures, "Figure", raises(ImportError())), "drawing",
                   CURVES),
    "font": (lambda m: m.setattr("PIL.ImageFont.load_default", raises(OSError("no\nfont"))),
             "drawing", "draw_curves"),
    "deleted table": (lambda m: (OUT / "metrics.csv").unlink(), "", BOTH),
    "no table": (lambda m: ((OUT / "metrics.csv").unlink(), (OUT / "metrics.csv").mkdir()),
                 "metrics.csv", CURVES),
    "foreign table": (lambda m: (OUT / "metrics.csv").write_text("a,b\nc,d\n"), "",
                      CURVES),
    "torn table": (lambda m: os.truncate(OUT / "metrics.csv", 500), "", BOTH),
    "settings": (lambda m: (CONFIG.unlink(), CONFIG.mkdir()), "config.json", BOTH),
    "bar": (lambda m: m.setattr(tqdm, "update", raises(BrokenPipeError())), "the bar", BOTH)}


@pytest.mark.parametrize("broken, named, stub", LOOKED_AT.values(), ids=LOOKED_AT)
def test_what_is_for_looking_at_never_ends_a_run(broken, named, stub, run, monkeypatch, capsys):
    broken(monkeypatch)
    assert go(stub=stub) == 0
    assert_same(load(), load(WHOLE / "checkpoint.pt"))
    said = re.findall(r"(\S.*) failed \(\w+\(.*\); the run goes on", capsys.readouterr().err)
    assert bool(said) == bool(named)
    assert any(named in what for what in said) or not named
    if not named:
        assert rows("metrics")[-1]["step"] == "80" and (OUT / "curves.png").exists() == (
            stub == CURVES)


@pytest.mark.parametrize("words", ["disk I/O error", "locking protocol"])
def test_a_file_system_without_locks(words, run, monkeypatch, capsys):
    error = sqlite3.OperationalError(words)
    lock = SimpleNamespace(executescript=raises(error), close=lambda: None)
    monkeypatch.setattr(sqlite3, "connect", lambda *_: lock)
    assert go() == 0 and "has no locks" in capsys.readouterr().err
    assert_same_as_whole()


def test_a_file_that_is_held_for_a_moment_is_replaced_later(run, monkeypatch, capsys):
    held, replace = iter([PermissionError(errno.EACCES, "held")]), os.replace
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setattr(os, "replace", lambda *names: next(
        (raises(error)() for error in held), None) or replace(*names))
    assert go() == 0
    assert_same_as_whole()
    monkeypatch.setattr(os, "replace", raises(PermissionError(errno.EACCES, "held", str(NEWEST))))
    refused(capsys, "held", "checkpoint.pt", out=Path("new"))


CONSOLES = {"none": None, "closed": io.StringIO(), "dead": io.StringIO(),
            "cp1252": io.TextIOWrapper(io.BytesIO(), encoding="cp1252"),
            "ascii": io.TextIOWrapper(io.BytesIO(), encoding="ascii")}
CONSOLES["closed"].close()
CONSOLES["dead"].write = raises(BrokenPipeError())


@pytest.mark.parametrize("console", CONSOLES.values(), ids=CONSOLES)
@pytest.mark.parametrize("in_thread", [False, True])
def test_a_run_needs_no_console(console, in_thread, run, monkeypatch):
    tqdm.set_lock(threading.RLock())  # the last console may have broken while the bar held it
    OUT.rename("Ωμέγα")
    done = []
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", console)
        patch.setattr(sys, "stderr", console)
        work = lambda: done.extend([go(out="Ωμέγα"), go("--eval 1", out="Ωμέγα")])  # noqa: E731
        if in_thread:
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        else:
            work()
    Path("Ωμέγα").rename(OUT)
    assert done == [0, 0] and (OUT / "evaluation.json").exists()
    assert_same_as_whole()
    if hasattr(console, "encoding") and console.encoding:
        console.flush()
        said = console.buffer.getvalue().decode("ascii")
        assert r"\u03a9\u03bc\u03ad\u03b3\u03b1" in said and "best possible 31.85" in said


def test_flags_as_people_type_them(run, capsys):
    assert drama.parse(["--steps", "100_000"])[0].steps == 100_000
    assert drama.parse(["--mean-frame=True"])[0].mean_frame is True
    assert go(steps="20", out=Path("short")) == 0
    assert "nothing will be learnt" in capsys.readouterr().out.split("finished")[0]
    assert go("--eval 1 --seed 7") == 0
    assert json.loads((OUT / "evaluation.json").read_text())["seed"] == 7


def test_every_game_of_ale_starts_or_is_refused():
    """As found by starting each for 600 steps; those for two end the process."""
    names = [rom.title().replace("_", "") for rom in drama.ale_py.roms.get_all_rom_ids()]
    refusals = {}
    for name in names:
        try:
            drama.validate(small(game=name))
        except drama.Refusal as refusal:
            refusals[name] = str(refusal)
    assert sorted(refusals) == ["Combat", "Joust", "MazeCraze", "Warlords"] and len(names) > 100
    assert all("ALE plays no such game; try Pong" in words for words in refusals.values())


def test_a_checkpoint_from_before_a_setting_goes_on(run, capsys):
    saved = load()
    assert saved["config"].pop("mean_frame") and saved["config"].pop("decoded") == 1
    saved["config"]["mean_frame"] = True
    put(saved)
    assert go() == 0 and go("--eval 1") == 0
    assert_same_as_whole()
    put({**saved, "config": {**saved["config"], "wings": 2}})
    for flags in ("", "--eval 1"):
        refused(capsys, "checkpoint.pt", "wings", flags=flags, steps=STEPS + 1)


PARTS = ("at step", "config", "config game", "config gamma", "generators", "generators 0",
         "pending", "pending kl", "tables", "model posterior.weight", "agent scale",
         "agent_learner", "replay action", "replay latent", "env agent", "env rng")


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_a_checkpoint_that_is_missing_or_another_is_a_line(part, run, capsys):
    *path, key = (int(name) if name.isdigit() else name for name in part.split())
    for damage in ("missing", None, "text", torch.zeros(2, 3, 5)):
        saved = load()
        inside = saved
        for name in path:
            inside = inside[name]
        if not isinstance(damage, str) or damage != "missing":
            inside[key] = damage
        elif part in ("config gamma", "pending kl"):
            continue  # without these it goes on
        else:
            del inside[key]
        before = NEWEST.read_bytes()
        put(saved)
        refused(capsys, "checkpoint.pt")
        if part in ("config gamma", "model posterior.weight", "at step"):
            refused(capsys, "checkpoint", flags="--eval 1")
        NEWEST.write_bytes(before)


def test_rewards_that_are_not_numbers_are_refused_by_name(run, capsys, monkeypatch):
    step = GridWorld.step
    monkeypatch.setattr(GridWorld, "step", lambda self, action: (
        (result := step(self, action))[0], math.nan, *result[2:]))
    refused(capsys, "reward is not finite", code=1, steps=200, changed={
        "config.json", "metrics.csv", "episodes.csv"})


# -- the scan and the layer as a library


@pytest.mark.parametrize("chunk, opens", [(2, 5), (4, 5), (99, 0)])
def test_a_reset_clears_what_was_held(chunk, opens):
    """However large; what is no number is cleared by `clear`, as in play, and not by the scan."""
    layer, first = scrambled(Mamba2(12, 4, 3, 2, 6, chunk)), torch.zeros(b, l, dtype=torch.bool)
    first[:, opens] = True
    u, clean = torch.randn(b, l, 12), layer.initial_state(b)
    held = tuple(torch.full_like(s, 1e18) for s in clean)
    (y, after), (want, want_after) = layer(u, held, first), layer(u, clean, first)
    assert (y != want)[:, :opens].any(-1).all() and torch.equal(y[:, opens:], want[:, opens:])
    assert all(map(torch.equal, after, want_after))
    rows = torch.tensor([True, False])
    (window, memory), = drama.clear([tuple(s * torch.nan for s in held)], rows)
    assert not window[0].any() and not memory[0].any() and memory[1].isnan().all()


@pytest.mark.parametrize("length", [0, 1, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.half, torch.float64])
def test_a_layer_in_another_type(dtype, length):
    layer = scrambled(Mamba2(12, 4, 3, 2, 6, 4))
    u = torch.randn(b, length + 1, 12)
    state = layer.initial_state(b)
    want = layer(u, state)[0]
    cast = layer.to(dtype)
    state = tuple(s.to(dtype) for s in state)
    y, state = cast(u[:, :-1].to(dtype), state)
    last, state = cast.step(u[:, -1].to(dtype), state)
    assert y.dtype == last.dtype == dtype and y.shape == (b, length, 12)
    assert state[1].dtype == (dtype if dtype == torch.float64 else torch.float32)
    got = torch.cat([y, last[:, None]], 1).to(want.dtype)
    np.testing.assert_allclose(got.detach(), want.detach(), atol=0.1 * want.abs().max().item())


def test_a_scan_of_mixed_types_and_of_nothing():
    def inputs(length, *dtypes):
        torch.manual_seed(4)
        x, dt, A, B, C, state = (torch.rand(*shape) for shape in (
            (b, length, 3, 4), (b, length, 3), (3,), (b, length, 5), (b, length, 5), (b, 3, 4, 5)))
        return [t.to(d) for t, d in zip((x, dt, -A, B, C), dtypes, strict=True)], state.half()

    single = torch.float32
    for other in (torch.bfloat16, torch.half, single, torch.float64):
        args, state = inputs(l, other, single, single, other, single)
        y, last = drama.ssd_scan(*args, 4, state)
        assert y.dtype == last.dtype == torch.promote_types(other, single)
        x, dt, A, B, C = args
        h = state
        for t in range(l):
            y_t, h = drama.ssd_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], h)
            close(y[:, t], y_t)
    args, state = inputs(0, *[single] * 5)
    y, last = drama.ssd_scan(*args, 4, state)
    assert y.shape == (b, 0, 3, 4) and torch.equal(last, state.float())
    for chunk in (0, -3):  # main refuses such a --chunk-size; in a script it is an error, no result
        with pytest.raises((ZeroDivisionError, RuntimeError)):
            drama.ssd_scan(*args, chunk)


@pytest.mark.parametrize("total, error", [(1e2, 5e-6), (1e5, 5e-3)])
def test_the_scan_is_as_exact_as_its_docstring_says(total, error):
    x, B, C = torch.randn(4, 32, 8, 16), torch.randn(4, 32, 16), torch.randn(4, 32, 16)
    dt, A = 0.001 + 0.05 * torch.rand(4, 32, 8), torch.full((8,), -4.0)
    dt[:, 7] = total / 4  # one very steep token; what comes after it is compared
    args = x, dt, A, B, C
    y, want = (drama.ssd_scan(*a, 32)[0][:, 8:] for a in (args, [t.double() for t in args]))
    assert error / 10 < (y - want).abs().max() / want.abs().max() < 2 * error


# -- other systems


def test_the_files_install_themselves():
    folder = Path(drama.__file__).parent
    wanted = (folder / "requirements.txt").read_text(encoding="utf-8").split()
    for name, packages in (("drama.py", [p for p in wanted if not p.startswith("pytest")]),
                           ("test_drama.py", wanted)):
        text = (folder / name).read_text(encoding="utf-8")
        header = re.search(r"(?m)^# /// script\n((?:#.*\n)+?)# ///$", text)[1]
        python, found = re.fullmatch(r'requires-python = "(.+)"\ndependencies = (\[[^]]+\])\n',
                                     re.sub(r"(?m)^# ?", "", header)).groups()
        assert python == ">=3.10" and json.loads(found) == packages


def test_a_run_folder_on_windows(monkeypatch):
    monkeypatch.setattr(drama, "Path", PureWindowsPath)
    for out, want in ((r"D:\runs\one", r"D:\runs\one"), ("D:/runs/one", r"D:\runs\one"),
                      (r"\\server\share", "\\\\server\\share\\"), ("", r"runs\GridWorld-0")):
        run = drama.Run(drama.Config(game="GridWorld", out=out))
        assert str(run.dir) == want and str(run.checkpoint) == str(run.dir / "checkpoint.pt")


@pytest.mark.slow
def test_lines_end_as_they_may(tmp_path):
    """A checkout with CRLF runs, and so does a file system that does not tell capitals apart."""
    folder = Path(drama.__file__).parent
    (tmp_path / "experiments").mkdir()
    for name in ("drama.py", "experiments/gridworld.py"):
        source = (folder / name).read_text(encoding="utf-8").replace("\n", "\r\n").encode()
        (tmp_path / name).write_bytes(source)
    names = [p.name.lower() for p in folder.iterdir()]
    assert len(names) == len({*names})
    code = ("import drama, json; print(json.dumps(vars(drama.Config()))); "
            f"raise SystemExit(drama.main({[*TINY, '--steps', '42', '--out', 'crlf']}))")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                          env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0",
                               "PYTHONCOERCECLOCALE": "0", "PYTHONWARNINGS": "error"}, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[0]) == vars(drama.Config())


def test_a_page_that_lacks_experiments_says_so_in_a_line(tmp_path):
    shutil.copy(drama.__file__, tmp_path)
    done = subprocess.run([sys.executable, "drama.py", *TINY], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "No module named 'experiments'" in done.stderr


@pytest.mark.slow
def test_a_run_in_a_process_that_was_spawned(run):
    process = multiprocessing.get_context("spawn").Process(
        target=drama.main, args=([*TINY, "--out", "run", "--steps", str(STEPS), "--save_every",
                                  "1e6"],))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert_same_as_whole()


# ---- on a GPU: last, as a process that has used CUDA can no longer fork --------------------------


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")


@needs_cuda
def test_cuda_scans_as_the_recurrence_does():
    weights = torch.randn(2, 40, 3, 5), torch.randn(2, 3, 5, 7)
    run = partial(ref.values_and_gradients, weight_y=weights[0], weight_state=weights[1],
                  first=ref.make_first("random", 2, 40, 16), dtype=torch.float64,
                  inputs=ref.make_inputs(2, 40, 3, 5, 7, True))
    want = run(ref.ssd_recurrent)

    def on_cuda(**inputs):
        """The scan there, its results here."""
        inputs = {name: x.cuda() for name, x in inputs.items()}
        return tuple(x.cpu() for x in drama.ssd_scan(**inputs, chunk_size=16))

    got = run(on_cuda)
    assert max(ref.error(got[k], want[k]) for k in want) < 1e-10


@needs_cuda
@torch.no_grad()
def test_cuda_sees_and_foretells_as_the_cpu_does(model, agent):
    batch, told = make_batch((0,), (4,)), []
    z = one_hot(torch.randint(0, C, (b, l, K)))
    for device in ("cpu", "cuda"):
        there, actor = model.to(device), agent.to(device).actor
        d, _ = there.sequence(z.to(device), batch.action.to(device), first=batch.first.to(device))
        feature = torch.cat([z.to(device), d], -1)
        told.append([x.cpu() for x in (
            there.encode(batch.frame.to(device)), there.decode(z.to(device)),
            there.log_prior(d, z.to(device)), there.two_hot.mean(there.reward(d)),
            there.termination(d), actor(feature))])
    for here, there in zip(*told, strict=True):
        close(here, there, rtol=1e-2, atol=2e-3)  # TF32


def test_a_compiled_player_keeps_its_memory_elsewhere(model, agent, monkeypatch):
    """A CUDA graph writes what it returns to the same place each time."""
    player, plain = (Player(small(), model, agent, 2, torch.device("cpu")) for _ in range(2))

    def graph(part, mode=None):
        """Stands for torch.compile: what an acting wrote is spoilt as the next begins."""
        written = []

        def run(*args):
            for x in written:
                x.fill_(torch.nan)
            answer, (d, states) = part(*args), player.memory
            written[:] = d, *[s for state in states for s in state]
            return answer
        return run if part.__name__ == "act" else part

    monkeypatch.setattr(torch, "compile", graph)
    drama.compile_parts(model, agent, player)
    batch = make_batch((0,), (4,))
    for each in (player, plain):
        torch.manual_seed(0)
        for t in range(l):
            each.act(batch.frame[:2, t], batch.first[:2, t])
    d, states = player.memory
    close(d, plain.memory[0], rtol=0, atol=0)
    assert all(s.isfinite().all() for state in states for s in state)


@needs_cuda
@pytest.mark.parametrize("compiling", ["auto", "off"])
def test_cuda_trains_saves_and_goes_on(compiling, no_pictures, tmp_path, capsys):
    argv = f"--game GridWorld --preset tiny --device cuda --compile {compiling} --out {tmp_path}"
    assert drama.main([*argv.split(), "--steps", "80"]) == 0
    assert drama.main([*argv.split(), "--steps", "160"]) == 0
    told = capsys.readouterr().out
    assert "from step 80 to 160" in told and "cuda:0, bfloat16" in told
    assert (", compiled" in told) == (compiling == "auto")
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True, map_location="cpu")
    assert all(x.isfinite().all() for x in [*saved["model"].values(), *saved["agent"].values()])
    assert len(read_csv(tmp_path / "metrics.csv")) == 7
    assert drama.main([*argv.split(), "--eval", "2"]) == 0


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, *sys.argv[1:]]))
