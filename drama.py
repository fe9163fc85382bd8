# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "gymnasium>=1.2.0", "ale-py>=0.11.2", "numpy>=2.0", "tqdm>=4.66",
#                 "matplotlib>=3.9"]
# ///
"""Drama in one file: a Mamba-2 world model learns a game, an actor-critic learns inside its dreams.

    python drama.py --game GridWorld         a result in minutes on a laptop
    python drama.py --game Pong              train on Atari; run it again to continue
    python drama.py --game Pong --eval 20    play 20 episodes from the checkpoint
    python drama.py --help                   every setting, one line each

A world model is a simulator that is learnt from play. A frame becomes a latent: K dice of C faces.
They are thrown, so this is a variational autoencoder (VAE). Mamba-2, a recurrent net whose state
changes linearly, reads latents and actions and foretells the next latent, the reward and the end.
So it can dream: its guess takes the next frame's place. Actor and critic learn in dreams alone.

    o_t --encoder--> z_t --+                         +--> prior: a guess of z_{t+1}
                           |                         |
                           +--> Mamba-2 --> d_t -----+--> r_t, the reward that follows a_t
                           |                         |
    z_t, d_{t-1} --actor--> a_t                      +--> e_t, the end that follows a_t

The loop is `train`, section 9: act, store, train the world model, dream, train actor and critic.

    code          paper    shape                 meaning
    frame         o_t      (b, l, H, W, 3)       what the player sees, uint8
    z             z_t      (b, l, K, C)          latent, one-hot; flat, (b, l, K*C), as an input
    action        a_t      (b, l)                index into the game's minimal action set
    reward        r_t      (b, l)                follows a_t
    terminated    e_t      (b, l)                1 where a_t ended the game or cost a life
    first                  (b, l)                1 where o_t opens an episode
    d             d_t      (b, l, d_model)       all that the past up to a_t says of what comes
    state         h_t      (b, h, p, n)          the memory of a Mamba-2 layer (section 6)
    trained, dreamt  v, b  (rows,)               counters: windows, or dreams' contexts, that began

Sizes: b batch, l length, H W a frame (H also a dream's length), K dice, C faces, h heads of p x n.
Sources: [1] Drama, arXiv 2410.08893v4. [2] Mamba-2 (SSD), arXiv 2405.21060. [3] Mamba, arXiv
2312.00752. [4] DreamerV3, arXiv 2301.04104. [5] STORM, arXiv 2310.09615. [6] SimPLe, 1903.00374.
NOTE(k) marks a departure from the paper or the published code; the README lists them.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import io
import json
import math
import os
import re
import signal
import sqlite3
import sys
import time
import warnings
import zipfile
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import ale_py
import numpy as np
import torch
import torch.nn.functional as F
from gymnasium import vector
from torch import Tensor, nn
from torch.utils._triton import has_triton
from tqdm import tqdm

# ---- 1 Settings ---------------------------------------------------------------------------------

def opt(default, text: str, low=None, high=None, choices=None):
    """A setting: its value in preset `paper`, its line for --help, the values allowed."""
    return field(default=default, metadata=dict(help=text, low=low, high=high, choices=choices))


@dataclass(frozen=True)
class Config:
    """Every setting. The defaults are preset `paper`, the figures of [1]; PRESETS change some."""

    # what to run
    game: str = opt("Pong", "a game of ALE, such as Pong, or GridWorld")
    preset: str = opt("auto", "sizes and rates; auto: gridworld for that game, else laptop",
                      choices=("auto", *"paper laptop gridworld tiny".split()))
    steps: int = opt(100_000, "environment steps in all; an Atari step is 4 frames", 1, 100_000_000)
    seed: int = opt(0, "seed of every random generator; with --eval, of the episodes", 0, 2**30)
    device: str = opt("auto", "cpu, cuda, cuda:1, mps; auto: cuda if there, else cpu")
    out: str = opt("", "run folder; empty: runs/<game>-<seed>")
    eval: int = opt(0, "play so many episodes from the checkpoint, do not train", 0, 100_000)
    checkpoint: str = opt("", "with --eval: a file of weights to play from, no run folder needed")
    # the dozen that matter
    categoricals: int = opt(32, "K: categoricals (dice) in a latent", 1, 256)
    classes: int = opt(32, "C: classes (faces) of a categorical", 2, 256)
    batch_size: int = opt(16, "windows in an update of the world model", 1, 4096)
    batch_length: int = opt(128, "frames in a window", 2, 65536)
    train_every: int = opt(1, "environment steps between updates", 1, 100_000)
    sampler: str = opt("dfs", "what to train on and dream from", choices=("dfs", "uniform"))
    temperature: float = opt(10.0, "DFS: temperature of the softmax over counts", 1e-3, 1e9)
    dreams: int = opt(1024, "dreams in an update of actor and critic", 1, 65536)
    horizon: int = opt(16, "steps of a dream", 1, 1024)
    model_lr: float = opt(1e-4, "world model: learning rate", 1e-8, 1.0)
    actor_lr: float = opt(3e-5, "actor and critic: learning rate", 1e-8, 1.0)
    entropy: float = opt(3e-4, "weight of the policy's entropy", 0.0, 10.0)
    # frames and latents
    image_size: int = opt(64, "height and width of a frame", 8, 256)
    cnn_width: int = opt(16, "channels of the first convolution, times 1, 2, 3, 4, 4", 1, 512)
    cnn_kernel: int = opt(5, "height and width of a convolution's kernel", choices=(3, 5, 7))
    first_stride: int = opt(1, "stride of the first convolution; the others have 2", 1, 4)
    prior_groups: int = opt(1, "groups of dice, thrown in turn by the prior; must divide K", 1, 256)
    unimix: float = opt(0.01, "share of the uniform distribution in every categorical", 0.0, 0.5)
    # sequence model and heads
    d_model: int = opt(512, "width of the sequence model", 1, 8192)
    layers: int = opt(2, "Mamba-2 layers", 1, 64)
    d_state: int = opt(16, "n: state size of a channel", 1, 1024)
    d_conv: int = opt(4, "taps of the causal convolution", 1, 16)
    expand: int = opt(2, "inner width over d_model", 1, 8)
    headdim: int = opt(64, "p: channels of an SSM head", 1, 1024)
    chunk_size: int = opt(32, "tokens that the scan computes in parallel", 1, 4096)
    dropout: float = opt(0.1, "dropout on each Mamba-2 layer's output", 0.0, 0.9)
    head_units: int = opt(256, "hidden units of the heads, and of a prior in groups", 1, 8192)
    bins: int = opt(255, "two-hot bins of rewards and values", 3, 4095)
    bin_limit: float = opt(20.0, "largest symlog value in the bins", 1.0, 50.0)
    # training the world model
    warmup: int = opt(1032, "random steps at first (in paper: dreams + context)", 1, 10_000_000)
    decoded: float = opt(1.0, "share of a batch's frames that are decoded and compared", 0.01, 1.0)
    moving: float = opt(0.0, "extra weight of pixels that changed since the last frame", 0.0, 1e6)
    free_bits: float = opt(1.0, "KL below this is not trained on, in nats", 0.0, 1000.0)
    representation_scale: float = opt(0.1, "weight of the posterior's way to the prior", 0.0, 100.0)
    mean_frame: bool = opt(False, "the decoder starts at the mean frame of random play")
    see_first: int = opt(0, "updates on reconstruction alone; the rest grows in later", 0, 10**7)
    model_clip: float = opt(1000.0, "world model: largest gradient norm", 1e-3, 1e9)
    weight_decay: float = opt(1e-4, "world model: weight decay of matrices and kernels", 0.0, 1.0)
    lr_warmup: int = opt(1000, "updates of linear learning-rate warm-up", 1, 10_000_000)
    lr_fall: float = opt(0.0, "last share of a run: rates and entropy's weight fall to 0", 0.0, 1.0)
    average: float = opt(0.0, "moving average of the model's weights: acts and dreams", 0.0, 0.9999)
    # dreams, actor, critic
    context: int = opt(8, "real frames that a dream starts from", 2, 1024)
    stored_latents: bool = opt(False, "contexts from latents kept at a frame's last encoding")
    actor_units: int = opt(256, "actor: hidden units", 1, 8192)
    critic_units: int = opt(512, "critic: hidden units", 1, 8192)
    hidden_layers: int = opt(3, "actor and critic: hidden layers", 1, 16)
    gamma: float = opt(0.985, "discount of a step", 0.0, 1.0)
    lam: float = opt(0.95, "lambda of the lambda-return", 0.0, 1.0)
    return_decay: float = opt(0.99, "moving average of returns' 5-95 percentile range", 0.0, 1.0)
    return_floor: float = opt(1.0, "advantages are divided by no less than this", 1e-3, 1e6)
    slow_decay: float = opt(0.98, "moving average of the critic's weights: slow critic", 0.0, 1.0)
    actor_eps: float = opt(1e-5, "actor and critic: Adam's epsilon", 1e-12, 1.0)
    actor_clip: float = opt(100.0, "actor and critic: largest gradient norm", 1e-3, 1e9)
    # machine, keeping, showing
    eval_envs: int = opt(4, "environments that play at once in --eval", 1, 256)
    precision: str = opt("auto", "auto: by hardware", choices=("auto", "float32", "bfloat16"))
    compile: str = opt("auto", "torch.compile, on CUDA with Triton", choices=("auto", "off"))
    log_every: int = opt(100, "environment steps between rows of metrics.csv", 1, 1_000_000)
    save_every: float = opt(120.0, "seconds between checkpoints", 0.0, 1e6)
    draw_every: float = opt(400.0, "seconds between pictures", 0.0, 1e9)
    picture_steps: int = opt(40, "dreamt frames in the pictures", 1, 1000)

    @property
    def cnn(self) -> list[tuple[int, int]]:
        """(channels, stride) of each convolution, from image_size down to a 4x4 map."""
        halvings = int(math.log2(max(1, self.image_size // self.first_stride // CNN_MAP)))
        strides = [self.first_stride] + [2] * min(halvings, len(CNN_MULTIPLES) - 1)
        return [(self.cnn_width * multiple, s) for multiple, s in zip(CNN_MULTIPLES, strides)]

    @property
    def d_z(self) -> int:
        """K C: numbers in a flat latent."""
        return self.categoricals * self.classes


CNN_MULTIPLES, CNN_MAP, CNN_PATCH = (1, 2, 3, 4, 4), 4, 4
PRESETS = {
    "paper": {},
    "laptop": dict(  # windows start at a row 1/8 as often as in paper, hence DFS's temperature
        cnn_width=32, cnn_kernel=3, first_stride=4, classes=8, d_model=256, chunk_size=16,
        head_units=128, batch_size=8, batch_length=32, train_every=4, see_first=100, decoded=0.5,
        moving=10.0, mean_frame=True, dreams=100, stored_latents=True, critic_units=256,
        hidden_layers=2, model_lr=2e-3, actor_lr=6e-4, entropy=3e-3, lr_warmup=100, horizon=10,
        return_floor=0.1, lr_fall=0.5, average=0.98, temperature=1.25, prior_groups=4),
    "gridworld": dict(
        steps=10_000, image_size=32, first_stride=4, cnn_kernel=3, categoricals=16, classes=16,
        d_model=128, chunk_size=16, head_units=128, batch_size=8, batch_length=32, decoded=0.5,
        warmup=3000, train_every=8, free_bits=0.1, see_first=50, mean_frame=True, dreams=256,
        context=3, horizon=2, stored_latents=True, actor_units=128, critic_units=128,
        hidden_layers=2, model_lr=2e-3, actor_lr=5e-4, entropy=1e-2, lr_warmup=50, average=0.99),
    "tiny": dict(  # for tests
        image_size=16, cnn_width=4, first_stride=2, categoricals=4, classes=6, d_model=16,
        headdim=8, d_state=4, chunk_size=4, head_units=16, bins=41, batch_size=3, batch_length=10,
        warmup=40, train_every=8, dreams=7, context=4, horizon=5, stored_latents=True,
        mean_frame=True, actor_units=16, critic_units=16, hidden_layers=1, lr_warmup=10,
        log_every=20, picture_steps=12, prior_groups=2),
}

# ---- 2 Environments -----------------------------------------------------------------------------
def make_env(game: str, num_envs: int, image_size: int) -> vector.VectorEnv:
    """A vector environment: frames (n, 1, H, W, 3) uint8, 1 of a stack; rewards (n,), ends (n,).
    Atari follows [6]: frame skip 4, maximum of the last two frames, no sticky actions, the minimal
    action set, raw rewards. A lost life is `terminated`, but only the last ends the episode; that
    before the last BankHeist hides. After an end the next `step` ignores its action and resets."""
    if game == "GridWorld":
        from experiments.gridworld import GridWorld
        return vector.SyncVectorEnv([lambda: GridWorld(image_size)] * num_envs)
    return ale_py.AtariVectorEnv(
        rom_name(game), num_envs, img_height=image_size, img_width=image_size, grayscale=False,
        stack_num=1, frameskip=4, maxpool=True, noop_max=30, repeat_action_probability=0.0,
        full_action_space=False, episodic_life=False, life_loss_info=True, reward_clipping=False,
        use_fire_reset=False)


def episode_over(terminated: np.ndarray, truncated: np.ndarray, info: dict) -> np.ndarray:
    """(n,) bool: game over or out of time, where `terminated` alone may be a lost life."""
    return truncated | (terminated & (info["lives"] == 0))


# ---- 3 Replay and DFS ---------------------------------------------------------------------------
# DFS is dynamic frequency-based sampling, no graph search. Uniform draws from a growing buffer
# train on old rows far more often than on new ones. So each row counts the windows (`trained`, v in
# [1]) and the contexts of dreams (`dreamt`, b) that STARTED there. Train on what was trained on
# least. Dream anywhere, but the further a row's dreams run ahead of its training, the rarer it
# gets. Late in a run those are the oldest rows, dreamt from since the beginning.

def dfs_sequence_logits(trained: Tensor, temperature: float) -> Tensor:
    """Logits of P(i) = softmax(-v_i / temperature) [1]."""
    return -trained / temperature


def dfs_dream_logits(trained: Tensor, dreamt: Tensor, s: float, temperature: float) -> Tensor:
    """Logits of P(i) = softmax(min(0, v_i - b_i / s) / temperature) [1], s = dreams per window."""
    return (trained - dreamt / s).clamp(max=0) / temperature


class Batch(NamedTuple):
    """Windows of the replay."""
    rows: Tensor  # (b, l) int64
    frame: Tensor  # (b, l, H, W, 3) uint8
    action: Tensor  # (b, l) int64
    reward: Tensor  # (b, l) float32
    terminated: Tensor  # (b, l) float32
    first: Tensor  # (b, l) bool


class Replay:
    """All that was seen, a row for each environment step in the order of time, on the device.

        row           t            t+1          t+2
        frame         o_t          o_{t+1}      o_{t+2}      the frame that the action answers
        action        a_t          a_{t+1}      a_{t+2}
        reward        r_t          r_{t+1}      r_{t+2}      FOLLOWS the action,
        terminated    e_t          e_{t+1}      e_{t+2}      and so does the end
        first         1            0            0            o_t opens an episode

        d_t = f(z_0,a_0, .., z_t,a_t)  foretells  z_{t+1} of the next row, and r_t, e_t of its own

    An episode's last frame has no action and gets no row. A lost life is an end to learn, so that
    lives are dear (terminated = 1), but the episode goes on: the next row has first = 0. A row cut
    by the time limit has terminated = 0, as the game did not end, and the next row has first = 1.
    A window may hold an episode's end and the next one's start: `first` clears the state there."""

    COLUMNS = ("action", "reward", "terminated", "first", "latent", "trained", "dreamt")

    def __init__(self, cfg: Config, device: torch.device):
        self.cfg, self.device, self.size = cfg, device, 0
        rows, side = cfg.steps, cfg.image_size
        with device:
            self.frame = torch.empty(rows, side, side, 3, dtype=torch.uint8)
            self.action = torch.zeros(rows, dtype=torch.int64)
            self.reward = torch.zeros(rows)
            self.terminated = torch.zeros(rows, dtype=torch.bool)
            self.first = torch.zeros(rows, dtype=torch.bool)
            self.latent = torch.zeros(rows, cfg.categoricals, dtype=torch.uint8)  # faces
            self.trained = torch.zeros(rows, dtype=torch.int32)
            self.dreamt = torch.zeros(rows, dtype=torch.int32)

    def add(self, frame, action, reward, terminated, first, latent) -> None:
        """Append one row: frame (H, W, 3) uint8, four numbers, latent (K,) classes."""
        i = self.size
        self.frame[i], self.action[i], self.reward[i] = torch.from_numpy(frame), int(action), reward
        self.terminated[i], self.first[i], self.latent[i] = bool(terminated), bool(first), latent
        self.size += 1

    def _draw(self, k: int, length: int, logits: Tensor) -> Tensor:
        """Rows (k, length) of k windows with different starts, drawn from softmax(logits).
        Gumbel noise is -log of an exponential variable. Add it to the logits: the largest sum is
        a draw from their softmax. The k largest are k draws without replacement."""
        n = self.size - length + 1  # starts there are; fewer than k while the run is short
        noise = -torch.empty(n, device=self.device).exponential_().log()
        noisy = noise + (logits[:n] if self.cfg.sampler == "dfs" else 0)
        starts = noisy.topk(min(k, n)).indices
        return starts[:, None] + torch.arange(length, device=self.device)

    def draw_sequences(self) -> Tensor:
        """Rows (b, l) for a world model update; no start twice; each start is counted."""
        rows = self._draw(self.cfg.batch_size, self.cfg.batch_length,
                          dfs_sequence_logits(self.trained, self.cfg.temperature))
        self.trained[rows[:, 0]] += 1
        return rows

    def draw_contexts(self) -> Tensor:
        """Rows (dreams, context) to dream from; no start twice; each start is counted."""
        rows = self._draw(self.cfg.dreams, self.cfg.context, dfs_dream_logits(
            self.trained, self.dreamt, self.cfg.dreams / self.cfg.batch_size, self.cfg.temperature))
        self.dreamt[rows[:, 0]] += 1
        return rows

    def batch(self, rows: Tensor) -> Batch:
        """The windows at rows (b, l)."""
        frame = self.frame.index_select(0, rows.flatten())  # [rows] is slower on a CPU
        return Batch(rows, frame.unflatten(0, rows.shape), self.action[rows],
                     self.reward[rows], self.terminated[rows].float(), self.first[rows])

    def state_dict(self) -> dict:
        """The rows so far less their frames, which have a file of their own."""
        return {name: getattr(self, name)[:self.size].clone() for name in self.COLUMNS}

    def load_state_dict(self, saved: dict) -> None:
        """Go on from `state_dict`."""
        self.size = len(saved["action"])
        for name in self.COLUMNS:
            getattr(self, name)[:self.size] = saved[name]


# ---- 4 Small maths ------------------------------------------------------------------------------
def symlog(x: Tensor) -> Tensor:
    """sign(x) ln(1 + |x|) [4]: one scale for rewards of 1 and of 10,000."""
    return x.sign() * x.abs().log1p()


def symexp(x: Tensor) -> Tensor:
    """The inverse of symlog."""
    return x.sign() * x.abs().expm1()


class TwoHot(nn.Module):
    """Numbers as distributions over evenly spaced symlog bins [4]: x (...), logits (..., bins).
    Why a distribution for a number? Cross-entropy's gradient does not grow with the size of the
    number, as a squared error's does, and "1 or nothing" can be said, not only "about a half".
    Example: with bins at .., 0, 1, .. the number 1, symlog(1) = 0.69, has weights 0.31 and 0.69."""

    def __init__(self, bins: int, limit: float):
        super().__init__()
        self.register_buffer("centres", torch.linspace(-limit, limit, bins), persistent=False)

    def encode(self, x: Tensor) -> Tensor:
        """x (...) -> (..., bins): weight on the two nearest bins so that the mean is symlog(x)."""
        n, limit = len(self.centres), self.centres[-1]
        position = (symlog(x).clamp(-limit, limit) + limit) / (2 * limit) * (n - 1)
        away = (position[..., None] - torch.arange(n, device=x.device)).abs()
        return (1 - away).clamp(min=0)

    def loss(self, logits: Tensor, x: Tensor) -> Tensor:
        """Cross-entropy between two-hot x (...) and logits (..., bins) -> (...)."""
        return -(self.encode(x) * logits.float().log_softmax(-1)).sum(-1)

    def mean(self, logits: Tensor) -> Tensor:
        """logits (..., bins) -> (...): symexp of the mean bin. So "0 or 99, alike" is 9."""
        return symexp((logits.float().softmax(-1) * self.centres).sum(-1))


def unimix(logits: Tensor, share: float) -> Tensor:
    """log((1 - share) softmax(logits) + share / C) over the last axis, the C classes.
    No class falls below share / C: no logarithm meets a zero. The clamp is for a share of 0."""
    logits = logits.float()
    logp = logits - logits.logsumexp(-1, True)  # as log_softmax, which is slower for few classes
    mixed = (1 - share) * logp.exp() + share / logits.shape[-1]
    return mixed.clamp(min=torch.finfo(mixed.dtype).tiny).log()


def draw_one_hot(logp: Tensor) -> Tensor:
    """A one-hot sample of each categorical in logp (..., C): the first class at which the summed
    probability passes a uniform random number; the last, where none of the others does."""
    below = logp.exp().cumsum(-1) < torch.rand_like(logp[..., :1])
    return F.one_hot(below[..., :-1].sum(-1), logp.shape[-1]).to(logp.dtype)


def straight_through(logp: Tensor) -> Tensor:
    """A one-hot sample with the gradient of the probabilities [4].
    Forward it is the sample: probs - probs adds 0. A sample has no gradient, so going backward it
    passes for the probabilities themselves. That is biased, and works."""
    probs = logp.exp()
    return draw_one_hot(logp) + probs - probs.detach()


def kl_divergence(logp: Tensor, logq: Tensor) -> Tensor:
    """KL[p || q] of K independent categoricals, (..., K, C) -> (...), in nats: how many nats more
    it takes to write down draws of p by a code made for q. Here p: posterior, q: prior."""
    return (logp.exp() * (logp - logq)).sum((-2, -1))


def free_bits(kl: Tensor, threshold: float) -> Tensor:
    """max(threshold, KL) [4]: squeezed any further, a latent would forget the picture."""
    return kl.clamp(min=threshold)


def lambda_return(reward: Tensor, end: Tensor, value: Tensor, gamma: float, lam: float) -> Tensor:
    """R_t = r_t + gamma (1 - e_t) ((1 - lam) V_{t+1} + lam R_{t+1}), R_H = V_H [4].
    reward, end (b, H); value (b, H+1) -> (b, H), for dreams of H steps. lam = 0 is the one-step
    target r + gamma V; lam = 1 sums the whole dream and trusts the critic at its end alone.
    Example: r = (1, 1), e = 0, V = (9, 2, 4), gamma = lam = 0.5: R_1 = 3, R_0 = 1 + 0.5 (1 + 1.5).
    NOTE(1): the published code has V_t for V_{t+1}: at lam = 0 no credit for what follows r_t."""
    R, returns = value[:, -1], []
    for t in reversed(range(reward.shape[1])):
        R = reward[:, t] + gamma * (1 - end[:, t]) * ((1 - lam) * value[:, t + 1] + lam * R)
        returns.append(R)
    return torch.stack(returns[::-1], 1)


# ---- 5 Encoder and decoder ----------------------------------------------------------------------
def layout(device: torch.device) -> torch.memory_format:
    """channels_last, the faster one; not on MPS, where torch 2.13 cannot train BatchNorm in it."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def pixels(frame: Tensor) -> Tensor:
    """(..., H, W, 3) uint8 -> (n, 3, H, W) float in 0..1."""
    x = frame.flatten(0, -4).permute(0, 3, 1, 2).float() / 255
    return x.contiguous(memory_format=layout(x.device))


class Encoder(nn.Sequential):
    """Frames (n, 3, H, W) in 0..1 -> (n, 4*4*channels): strided convolutions down to a 4x4 map.
    Sizes in `paper`: 64, 64, 32, 16, 8, 4. A first stride of 4 cuts the frame into 4x4 patches."""

    def __init__(self, cfg: Config):
        layers, channels = [], 3
        for width, stride in cfg.cnn:
            k, pad = (stride, 0) if stride == CNN_PATCH else (cfg.cnn_kernel, cfg.cnn_kernel // 2)
            layers += [nn.Conv2d(channels, width, k, stride, pad), nn.BatchNorm2d(width), nn.SiLU()]
            channels = width
        super().__init__(*layers, nn.Flatten())


class Decoder(nn.Sequential):
    """Latents (n, K*C) -> frames (n, 3, H, W) in 0..1: the encoder's mirror."""

    def __init__(self, cfg: Config):
        widths, strides = zip(*cfg.cnn)
        channels, layers = widths[-1], [nn.Linear(cfg.d_z, widths[-1] * CNN_MAP**2),
                                        nn.Unflatten(1, (widths[-1], CNN_MAP, CNN_MAP))]
        for width, stride in zip((*reversed(widths[:-1]), 3), reversed(strides)):
            layers += [nn.BatchNorm2d(channels), nn.SiLU()]
            if stride == CNN_PATCH:  # a 1x1 convolution writes the 16 pixels of each patch
                layers += [nn.Conv2d(channels, width * stride**2, 1), nn.PixelShuffle(stride)]
            else:
                layers += [nn.ConvTranspose2d(channels, width, cfg.cnn_kernel, stride,
                                              cfg.cnn_kernel // 2, output_padding=stride - 1)]
            channels = width
        super().__init__(*layers)
        self.register_buffer("mean", torch.zeros(3, cfg.image_size, cfg.image_size))

    def forward(self, z: Tensor) -> Tensor:
        """z (n, K*C) -> (n, 3, H, W)."""
        return (super().forward(z) + self.mean).sigmoid()

    @torch.no_grad()
    def start_at(self, frame: Tensor) -> None:
        """Begin where any latent decodes to about this frame (H, W, 3) in 0..1, random play's mean.
        NOTE(2): while a decoder has yet to find the background, a latent only adds noise, and the
        encoder gives every frame the same one for long: posterior collapse."""
        self.mean.copy_(frame.clamp(0.02, 0.98).logit().permute(2, 0, 1))
        last = [layer for layer in self if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))][-1]
        last.weight.mul_(0.01)
        last.bias.zero_()


def mlp(d_in: int, units: int, hidden: int, d_out: int, zero: bool = False) -> nn.Sequential:
    """Hidden layers of Linear, RMSNorm, SiLU, then a Linear, which starts at zero if asked."""
    layers = []
    for i in range(hidden):
        layers += [nn.Linear(units if i else d_in, units), nn.RMSNorm(units), nn.SiLU()]
    layers.append(nn.Linear(units, d_out))
    for p in layers[-1].parameters() if zero else ():
        nn.init.zeros_(p)
    return nn.Sequential(*layers)


# ---- 6 Mamba-2 ----------------------------------------------------------------------------------
# A state space model (SSM) is a recurrent net whose state changes linearly, so that a sequence can
# be trained on in parallel. A token is a pair (z_t, a_t). A layer has h memories side by side, its
# heads: each is a p x n matrix, that forgets a little at each token and is written to a little.
# (In this section B and C are the papers' names of tensors, and no sizes.)
#
#     state_t = exp(dt_t A) state_{t-1} + dt_t x_t B_t^T      (h_t in the papers)
#     y_t     = state_t C_t
#
# x_t is what to write, B_t where to write it, C_t where to read, dt_t how much to write and,
# through exp(dt_t A) in (0, 1), how much to forget. All are computed from the newest tokens; only A
# is a weight. Each head has its own x, dt and A; all share B and C. Unrolled, y_i is a weighted sum
# of all x_j up to its own, from a state of zeros:
#
#     y_i = sum_{j<=i} (C_i . B_j) exp(S_i - S_j) dt_j x_j,   S_i = dt_1 A + .. + dt_i A
#
# This is attention with a decay for a softmax. With g_t = exp(dt_t A), the share of the state that
# survives token t, four tokens have the decays
#
#     1                            row i: the token that reads
#     g_2          1               column j: the token that wrote
#     g_3 g_2      g_3      1
#     g_4 g_3 g_2  g_4 g_3  g_4  1

def ssd_step(x, dt, A, B, C, state) -> tuple[Tensor, Tensor]:
    """One token: state = exp(dt A) state + dt x B^T, y = state C [2].
    x (b,h,p), dt (b,h) > 0, A (h,) < 0, B and C (b,n), state (b,h,p,n) -> y (b,h,p), a NEW state.
    float32 at least, even under autocast. In memory the state is (b,h,n,p), which is faster."""
    with torch.autocast(x.device.type, enabled=False):
        x, dt, A, B, C, state = at_least_float32(x, dt, A, B, C, state)
        written = B[:, None, :, None] * (dt[..., None] * x)[:, :, None]  # (b,h,n,p)
        state = written.addcmul_((dt * A).exp()[..., None, None], state.mT)
        return (C[:, None, None] @ state).squeeze(-2), state.mT


def ssd_scan(x, dt, A, B, C, chunk_size: int, state=None, first=None) -> tuple[Tensor, Tensor]:
    """`ssd_step` for all tokens of a sequence, in chunks, as in section 6 of the paper [2].
    Inside a chunk of q tokens the unrolled sum is one q x q matrix, so all of its tokens are
    computed at once. All that a chunk must know of its past is the state at its start.
    x (b,l,h,p), dt (b,l,h) > 0, A (h,) < 0, B and C (b,l,n), state (b,h,p,n) or None for zeros,
    first (b,l) bool or None: the state is cleared BEFORE that token. Returns y (b,l,h,p), without
    the D skip, and the last state. Cost linear in l; float32 at least, even under autocast."""
    (b, l, h, p), n = x.shape, B.shape[-1]
    q = min(chunk_size, max(l, 1))
    pad, c = -l % q, -(-l // q)  # c chunks of q; the last is padded with dt = 0: no decay, no input
    with torch.autocast(x.device.type, enabled=False):
        state = x.new_zeros(b, h, n, p).mT if state is None else state
        x, dt, A, B, C, state = at_least_float32(x, dt, A, B, C, state)
        first = x.new_zeros(b, l, dtype=torch.bool) if first is None else first
        X = F.pad(x * dt[..., None], (0, 0, 0, 0, 0, pad)).view(b, c, q, h, p)
        X = X.transpose(2, 3).contiguous()  # once, or every product below copies it
        B, C = (F.pad(t, (0, 0, 0, pad)).view(b, c, 1, q, n) for t in (B, C))
        # S: the log of the decay since the chunk's start, so exp(S_i - S_j) is that from j to i
        S = F.pad(dt * A, (0, 0, 0, pad)).view(b, c, q, h).transpose(2, 3).cumsum(-1)  # (b,c,h,q)
        # tokens of different episodes have different numbers: they must not see each other. On a
        # first reading take `first` as all false: `same` is a plain triangle, nothing is cleared
        segment = F.pad(first, (0, pad)).view(b, c, 1, q).cumsum(-1)

        # 1 inside a chunk: y_i = sum_{j<=i, same segment} (C_i . B_j) exp(S_i - S_j) dt_j x_j
        same = (segment[..., :, None] == segment[..., None, :]).tril()  # (b,c,1,q,q)
        decay = (S[..., :, None] - S[..., None, :]).masked_fill(~same, -torch.inf).exp()
        y = (C @ B.mT * decay) @ X  # (b,c,h,q,q) @ (b,c,h,q,p)
        # 2 added to the state by the end of each chunk: sum_j exp(S_q - S_j) dt_j x_j B_j^T
        to_end = (S[..., -1:] - S).exp() * (segment == segment[..., -1:])  # (b,c,h,q)
        added = ((B * to_end[..., None]).mT @ X).mT  # (b,c,h,p,n)
        # 3 from chunk to chunk: state = exp(S_q) state + added (unbind: t[:, i] is slow backward)
        survives = S.exp() * (segment == 0)  # (b,c,h,q): what is left at i of the state before
        kept, before = survives[..., -1, None, None], []  # (b,c,h,1,1): by a whole chunk
        for kept_c, added_c in zip(kept.unbind(1), added.unbind(1)):
            before.append(state.mT)  # (b,h,n,p), as it lies in memory: no copy
            state = kept_c * state + added_c
        # 4 what y_i reads of the state before its chunk: exp(S_i) state C_i
        if before:
            y = y + (C * survives[..., None]) @ torch.stack(before, 1)
        return y.transpose(2, 3).reshape(b, c * q, h, p)[:, :l], state


def at_least_float32(*tensors):
    """The tensors in the type that holds them all: float32, or float64 if one has that."""
    dtype = torch.float64 if torch.float64 in [t.dtype for t in tensors] else torch.float32
    return (t.to(dtype) for t in tensors)


class Mamba2(nn.Module):
    """The Mamba-2 layer [2]; parameter names and layouts are those of the official layer.

        u --in_proj--+--> gate -------------------------> silu --+
                     +--> x, B, C --conv--> silu --> scan + D x --*--> norm --out_proj--> y
                     +--> dt --softplus-----------------^

    conv mixes the last d_conv tokens, D x (the D skip) bypasses the scan, a gate shuts channels."""

    def __init__(self, d_model, d_state, d_conv, expand, headdim, chunk_size):
        super().__init__()
        self.d_inner, self.headdim, self.chunk_size = expand * d_model, headdim, chunk_size
        self.d_state, self.d_conv, self.heads = d_state, d_conv, expand * d_model // headdim
        channels = self.d_inner + 2 * d_state
        self.parts = self.d_inner, channels, self.heads  # of in_proj: gate; x, B, C; dt
        self.in_proj = nn.Linear(d_model, self.d_inner + channels + self.heads, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, d_conv, groups=channels)  # see `forward`
        # dt = softplus(dt_bias) starts log-uniform in [0.001, 0.1], and A uniform in [-16, -1]:
        # at first heads forget within 1 to 1,000 tokens [3]
        dt = torch.empty(self.heads).uniform_(np.log(1e-3), np.log(1e-1)).exp()
        self.dt_bias = nn.Parameter(dt + (-(-dt).expm1()).log())  # the inverse of softplus
        self.A_log = nn.Parameter(torch.empty(self.heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = nn.RMSNorm(self.d_inner, eps=1e-5)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)

    def initial_state(self, batch: int) -> tuple[Tensor, Tensor]:
        """(conv window (b, d_conv-1, channels), SSM state (b, h, p, n)), both zero."""
        new = self.D.new_zeros
        return (new(batch, self.d_conv, self.parts[1])[:, 1:],  # strides of `step`, for CUDA graphs
                new(batch, self.heads, self.d_state, self.headdim).mT)

    def _inputs(self, xBC, dt):
        x, B, C = F.silu(xBC).split((self.d_inner, self.d_state, self.d_state), -1)
        dt = F.softplus(dt + self.dt_bias)
        return x.unflatten(-1, (self.heads, -1)), dt, -self.A_log.exp(), B, C

    def _output(self, y, x, gate):
        y = (y + self.D[:, None] * x).flatten(-2)
        return self.out_proj(self.norm((y * F.silu(gate)).to(self.norm.weight.dtype)))

    def forward(self, u: Tensor, state=None, first=None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """u (b, l, d_model) -> the same shape, and a new state: a pair, as in `initial_state`."""
        b, l, _ = u.shape
        window, memory = state or self.initial_state(b)
        gate, xBC, dt = self.in_proj(u).split(self.parts, -1)
        taps = torch.cat([window.to(xBC.dtype), xBC], 1)  # (b, d_conv-1+l, channels)
        first = u.new_zeros(b, l, dtype=torch.bool) if first is None else first
        # NOTE(3): a reset clears the convolution's window too: a tap counts in its own segment
        # only. nn.Conv1d cannot stop at an episode's edge, so only its weights are used
        segment = F.pad(first.cumsum(1), (self.d_conv - 1, 0))  # (b, d_conv-1+l)
        conv = self.conv1d.bias
        for k, weight in enumerate(self.conv1d.weight[:, 0].T.contiguous()):  # a row a tap
            own = (segment[:, k:k + l] == segment[:, self.d_conv - 1:])[..., None]
            conv = torch.addcmul(conv, taps[:, k:k + l] * own, weight)
        x, dt, A, B, C = self._inputs(conv, dt)
        y, memory = ssd_scan(x, dt, A, B, C, self.chunk_size, memory, first)
        window = taps[:, l:].masked_fill((segment[:, l:] != segment[:, -1:])[..., None], 0)
        return self._output(y, x, gate), (window, memory)

    def step(self, u: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """One token: u (b, d_model) -> the same shape, and a new pair."""
        window, memory = state
        gate, xBC, dt = self.in_proj(u).split(self.parts, -1)
        taps = torch.cat([window.to(xBC.dtype), xBC[:, None]], 1)  # (b, d_conv, channels)
        conv = self.conv1d.bias + (taps * self.conv1d.weight[:, 0].T.contiguous()).sum(1)
        x, dt, A, B, C = self._inputs(conv, dt)
        y, memory = ssd_step(x, dt, A, B, C, memory)
        return self._output(y, x, gate), (taps[:, 1:], memory)


class SequenceModel(nn.Module):
    """(z_t, a_t) .. -> d_t: a stem, then Mamba-2 layers with pre-norm residuals."""

    def __init__(self, cfg: Config, num_actions: int):
        super().__init__()
        d, self.num_actions = cfg.d_model, num_actions
        self.stem = nn.Sequential(nn.Linear(cfg.d_z + num_actions, d), nn.RMSNorm(d), nn.SiLU())
        self.norms = nn.ModuleList(nn.RMSNorm(d) for _ in range(cfg.layers))
        self.layers = nn.ModuleList(
            Mamba2(d, cfg.d_state, cfg.d_conv, cfg.expand, cfg.headdim, cfg.chunk_size)
            for _ in range(cfg.layers))
        self.dropout, self.norm = nn.Dropout(cfg.dropout), nn.RMSNorm(d)

    def forward(self, z: Tensor, action: Tensor, states=None, first=None) -> tuple[Tensor, list]:
        """z (b, l, K*C), action (b, l), first (b, l) bool -> d (b, l, d_model), a state a layer.
        One token: z (b, K*C), action (b,), states -> d (b, d_model), a new state a layer."""
        u, after = self.stem(torch.cat([z, F.one_hot(action, self.num_actions)], -1)), []
        for norm, layer, state in zip(self.norms, self.layers, states or [None] * len(self.layers)):
            y, state = layer.step(norm(u), state) if u.ndim == 2 else layer(norm(u), state, first)
            u = u + self.dropout(y)
            after.append(state)
        return self.norm(u), after

    def initial_states(self, batch: int) -> list:
        """A zero state for each layer."""
        return [layer.initial_state(batch) for layer in self.layers]


def clear(states: list, where: Tensor) -> list:
    """The states with rows `where` (b,) set to zero, whatever they held: an episode opens there."""
    return [tuple(s.masked_fill(where.view(-1, *[1] * (s.ndim - 1)), 0) for s in state)
            for state in states]


# ---- 7 World model ------------------------------------------------------------------------------
# PRIOR: what d_{t-1}, the past, guesses of z_t. POSTERIOR: what the encoder says of z_t, having
# seen o_t. In training z_t is drawn from the posterior, in a dream from the prior. So the two must
# agree, and KL[posterior || prior] measures by how much they do not. Who moves?
#
#     dynamics, weight 1           the prior moves to the posterior: learn to foretell
#     representation, weight 0.1   the posterior moves to the prior: encode what can be foretold,
#                                  but not at all costs, or every frame would be encoded alike
#
# Where gradients stop, and why:
#
#     the sample in z              has none; `straight_through` passes on that of the probabilities
#     posterior in `dynamics`      it must not come down to a guess that is still poor
#     prior in `representation`    it learns by `dynamics` alone
#     all of `imagine`             the policy learns by REINFORCE; dreams must not learn to please
#     the critic's value           a target and a baseline stand still while actor and critic move
#     dice given to later dice     or `dynamics` would move the posterior that it holds still
#
# All five of `loss` train the encoder; `dynamics` only at frames before the one foretold.

class WorldModel(nn.Module):
    """Encoder, sequence model, decoder, and the heads for the next latent, reward and end."""

    def __init__(self, cfg: Config, num_actions: int):
        super().__init__()
        self.cfg, self.encoder, self.decoder = cfg, Encoder(cfg), Decoder(cfg)
        self.posterior = nn.Linear(cfg.cnn[-1][0] * CNN_MAP**2, cfg.d_z)
        self.sequence = SequenceModel(cfg, num_actions)
        d, units, part = cfg.d_model, cfg.head_units, cfg.d_z // cfg.prior_groups
        self.prior = mlp(d, units, 1, part) if cfg.prior_groups > 1 else nn.Linear(d, part)
        self.later = nn.ModuleList(mlp(d + i * part, units, 1, part)  # the groups after it
                                   for i in range(1, cfg.prior_groups))
        # NOTE(4): reward head and critic start at zero, as in [4]: no reward is dreamt up
        self.reward, self.termination = mlp(d, units, 1, cfg.bins, zero=True), mlp(d, units, 1, 1)
        self.two_hot = TwoHot(cfg.bins, cfg.bin_limit)
        self.weights = dict(reconstruction=1.0, reward=1.0, termination=1.0, dynamics=1.0,
                            representation=cfg.representation_scale)

    def _categoricals(self, flat: Tensor) -> Tensor:
        """(..., K*C) -> log-probabilities (..., K, C)."""
        return unimix(flat.unflatten(-1, (-1, self.cfg.classes)), self.cfg.unimix)

    def encode(self, frame: Tensor) -> Tensor:
        """frame (..., H, W, 3) uint8 -> log P(z_t | o_t), the posterior, (..., K, C)."""
        flat = self.posterior(self.encoder(pixels(frame)))
        return self._categoricals(flat).unflatten(0, frame.shape[:-3])

    def decode(self, z: Tensor) -> Tensor:
        """z (..., K*C) -> frames (..., 3, H, W) in 0..1."""
        return self.decoder(z.flatten(0, -2)).unflatten(0, z.shape[:-1])

    def log_prior(self, d: Tensor, z: Tensor) -> Tensor:
        """d_t (..., d_model), z_{t+1} (..., K*C) -> log P(z_{t+1} | d_t), the prior, (..., K, C).
        NOTE(13): with groups, a die sees the groups before its own. Thrown apart, some dice may
        tell of a hit, some of a miss: no ball is drawn. The KL then is a sample: it hangs on z."""
        part, nets = self.cfg.d_z // self.cfg.prior_groups, (self.prior, *self.later)
        flat = [net(torch.cat([d, z[..., :i * part]], -1)) for i, net in enumerate(nets)]
        return self._categoricals(torch.cat(flat, -1))

    def guess(self, d: Tensor) -> Tensor:
        """d_t (..., d_model) -> z_{t+1} (..., K*C), thrown by the prior, group after group."""
        z = d[..., :0]  # no dice yet
        for net in (self.prior, *self.later):
            thrown = draw_one_hot(self._categoricals(net(torch.cat([d, z], -1))))
            z = torch.cat([z, thrown.flatten(-2)], -1)
        return z

    def reconstruction_error(self, z: Tensor, frame: Tensor) -> Tensor:
        """z (b, l, K*C), frame (b, l, H, W, 3) -> squared error summed over a frame, (b, l).
        NOTE(5): decoding is most of the cost, so a random part of the frames is decoded, and scaled
        up; the others' error is 0. Changed pixels weigh more: Pong's ball has two of 4,096."""
        n = z.shape[0] * z.shape[1]
        count = max(1, round(n * self.cfg.decoded))
        drawn = torch.rand(n, device=z.device).topk(count).indices  # `count` frames, none twice
        before = torch.cat([frame[:, :1], frame[:, :-1]], 1).flatten(0, 1)[drawn]
        frame = frame.flatten(0, 1)[drawn]  # (count, H, W, 3)
        weight = 1 + self.cfg.moving * (frame != before).any(-1).float()  # changed pixels
        frame_hat = self.decode(z.flatten(0, 1)[drawn])
        error = (frame_hat - pixels(frame)).square().sum(1)
        error = (error * weight / weight.mean()).sum((1, 2))
        return (error.new_zeros(n).index_copy(0, drawn, error) * (n / count)).view(z.shape[:2])

    def loss(self, batch: Batch) -> tuple[dict, Tensor, Tensor]:
        """Losses by name, each (b, l); latents (b, l, K, C); KL[posterior || prior] (b, l)."""
        log_post = self.encode(batch.frame)
        z = straight_through(log_post)  # (b, l, K, C)
        d, _ = self.sequence(z.flatten(-2), batch.action, first=batch.first)
        reconstruction = self.reconstruction_error(z.flatten(-2), batch.frame)
        log_prior = self.log_prior(d[:, :-1], z[:, 1:].detach().flatten(-2))  # of z_t by d_{t-1}
        log_next = log_post[:, 1:]
        dynamics = kl_divergence(log_next.detach(), log_prior)  # the prior moves
        representation = kl_divergence(log_next, log_prior.detach())  # the posterior moves

        def known(kl: Tensor) -> Tensor:  # 0 where a window or an episode begins
            return F.pad(kl * ~batch.first[:, 1:], (1, 0))  # (b, l-1) -> (b, l)

        end = self.termination(d).squeeze(-1).float()
        losses = dict(
            reconstruction=reconstruction, reward=self.two_hot.loss(self.reward(d), batch.reward),
            termination=F.binary_cross_entropy_with_logits(end, batch.terminated, reduction="none"),
            dynamics=known(free_bits(dynamics, self.cfg.free_bits)),
            representation=known(free_bits(representation, self.cfg.free_bits)))
        return losses, z.detach(), known(dynamics).detach()

    @torch.no_grad()
    def imagine(self, actor: nn.Module, z: Tensor, action: Tensor, first: Tensor) -> Dream:
        """Dream `horizon` steps on from context latents z (b, k, K*C), action and first (b, k).
        The last of the k frames is where the dream starts: there the ACTOR chooses, so the recorded
        action is not used. If that frame opens an episode, it has no past."""
        d, states = self.sequence(z[:, :-1], action[:, :-1], first=first[:, :-1])
        z, d, states = z[:, -1], d[:, -1].masked_fill(first[:, -1:], 0), clear(states, first[:, -1])
        features, actions, ds = [torch.cat([z, d], -1)], [], []
        for _ in range(self.cfg.horizon):
            log_pi = actor(features[-1]).float().log_softmax(-1)
            actions.append(draw_one_hot(log_pi).argmax(-1))
            d, states = self.sequence(z, actions[-1], states)
            z = self.guess(d)  # no frame: the guess takes the encoder's place. This is the dream
            ds.append(d)
            features.append(torch.cat([z, d], -1))
        d = torch.stack(ds, 1)  # (b, H, d_model)
        end = self.termination(d).squeeze(-1).float().sigmoid()
        return Dream(torch.stack(features, 1), torch.stack(actions, 1),
                     self.two_hot.mean(self.reward(d)), end)


class Dream(NamedTuple):
    """Dreams of H steps. A feature is [z_t, d_{t-1}]: d_t needs a_t, which is yet to be chosen."""
    feature: Tensor  # (b, H+1, K*C + d_model)
    action: Tensor  # (b, H)
    reward: Tensor  # (b, H): follows the action, as in the replay
    end: Tensor  # (b, H): probability that the action ended the game or cost a life


def growth(cfg: Config, updates: int) -> float:
    """Weight of all losses but reconstruction: 0 for see_first updates, 1 after 3 see_first.
    NOTE(6): in full at once, they can turn a fresh posterior constant before it learns to see."""
    grown = (updates - cfg.see_first) / (2 * cfg.see_first) if cfg.see_first else 1
    return min(1.0, max(0.0, grown))


def update_world_model(model: WorldModel, learner: Learner, replay: Replay) -> dict:
    """One update on windows drawn by DFS -> metrics; the replay keeps their fresh latents."""
    cfg = model.cfg
    if cfg.mean_frame and not learner.updates:
        model.decoder.start_at(replay.frame[:replay.size].sum(0) / (255 * replay.size))
    batch = replay.batch(replay.draw_sequences())
    model.train()
    losses, z, kl = model.loss(batch)
    grown = growth(cfg, learner.updates)
    weights = {name: grown * w for name, w in model.weights.items()} | {"reconstruction": 1.0}
    metrics = learner.step(losses, weights)
    replay.latent[batch.rows] = z.argmax(-1).byte()
    return {**metrics, "kl": kl.mean().item(), "batch_reward": batch.reward.mean().item()}


def follow(slow: nn.Module, fast: nn.Module, share: float) -> None:
    """Move slow's weights, and BatchNorm's statistics, a share of the way to fast's."""
    for old, new in zip(slow.state_dict().values(), fast.state_dict().values()):
        if new.is_floating_point():
            old.lerp_(new, share)


# ---- 8 Actor-critic -----------------------------------------------------------------------------
# The critic foretells the return of a moment: by cross-entropy it learns the lambda-returns R_t of
# dreams. The actor learns by REINFORCE: what was followed by a better return than the critic
# expected becomes likelier, a worse one less likely. A drawn action has no gradient, but
# grad sum_a pi(a) R(a) = sum_a pi(a) R(a) grad log pi(a), the mean of R grad log pi over draws:
#
#     loss = -log pi(a_t) * (R_t - V_t) / scale - entropy weight * entropy
#
# V_t, the critic's expectation, is the baseline: it takes away luck that all actions share. The
# rest is the advantage. Entropy is high while all actions are likely: it is rewarded, so that
# the actor keeps trying. With --lr-fall its weight falls to 0: the actor plays what it knows.

class ActorCritic(nn.Module):
    """Actor and two-hot critic on [z_t, d_{t-1}], a slow critic, a scale for the returns [4].
    NOTE(7): z_t encodes the frame just seen; the published code acts on a sample of the prior."""

    def __init__(self, cfg: Config, num_actions: int):
        super().__init__()
        self.cfg, d_in, hidden = cfg, cfg.d_z + cfg.d_model, cfg.hidden_layers
        self.actor = mlp(d_in, cfg.actor_units, hidden, num_actions)
        self.critic = mlp(d_in, cfg.critic_units, hidden, cfg.bins, zero=True)
        # unlike DQN's target it has no part in R: a second loss holds the critic close to it
        self.slow_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.two_hot = TwoHot(cfg.bins, cfg.bin_limit)
        self.register_buffer("scale", torch.zeros(()))  # average of R's 5-95 percentile range
        self.weights = dict(policy=1.0, entropy=cfg.entropy, value=1.0, slow_value=1.0)

    def loss(self, dream: Dream) -> tuple[dict, dict]:
        """Losses by name, each (b, H), weighted by the chance of being alive; metrics."""
        value_logits = self.critic(dream.feature)  # (b, H+1, bins)
        value = self.two_hot.mean(value_logits).detach()
        slow_value = self.two_hot.mean(self.slow_critic(dream.feature[:, :-1]))
        R = lambda_return(dream.reward, dream.end, value, self.cfg.gamma, self.cfg.lam)
        # NOTE(12): advantages are divided by the returns' range; below the floor it may be noise
        low, high = torch.quantile(R, R.new_tensor([0.05, 0.95]))
        self.scale.lerp_(high - low, 1 - self.cfg.return_decay)
        advantage = (R - value[:, :-1]) / self.scale.clamp(min=self.cfg.return_floor)
        # NOTE(8): a step counts by the product of (1 - e) before it: none is learnt after a death
        alive = F.pad((1 - dream.end).cumprod(1)[:, :-1], (1, 0), value=1.0)
        log_pi = self.actor(dream.feature[:, :-1]).float().log_softmax(-1)  # (b, H, actions)
        entropy = -(log_pi.exp() * log_pi).sum(-1)
        losses = dict(
            policy=-log_pi.gather(-1, dream.action[..., None]).squeeze(-1) * advantage * alive,
            entropy=-entropy * alive, value=self.two_hot.loss(value_logits[:, :-1], R) * alive,
            slow_value=self.two_hot.loss(value_logits[:, :-1], slow_value) * alive)
        return losses, dict(imagined_return=R.mean(), imagined_reward=dream.reward.mean(),
                            imagined_value=value.mean(), imagined_end=dream.end.mean(),
                            return_scale=self.scale, policy_entropy=entropy.mean())


def update_actor_critic(cfg, model, agent, learner, replay) -> dict:
    """Dream on from contexts drawn by DFS, then one update on the dreams -> metrics."""
    rows = replay.draw_contexts()
    if cfg.stored_latents:  # NOTE(10): as last encoded, not the context's frames encoded anew
        z = F.one_hot(replay.latent[rows].long(), cfg.classes).flatten(-2).float()
    else:
        with torch.no_grad():
            z = draw_one_hot(model.encode(replay.batch(rows).frame)).flatten(-2)
    dream = model.imagine(agent.actor, z, replay.action[rows], replay.first[rows])
    losses, metrics = agent.loss(dream)
    entropy = cfg.entropy * learner.remaining(learner.updates)  # it falls with the rate
    means = learner.step(losses, agent.weights | {"entropy": entropy})
    follow(agent.slow_critic, agent.critic, 1 - cfg.slow_decay)
    means["actor_gradient_norm"] = means.pop("gradient_norm")
    return {**means, **{name: x.item() for name, x in metrics.items()}}


class Player:
    """Acts on the frame just seen, a_t ~ actor([z_t, d_{t-1}]), and remembers the whole episode."""

    def __init__(self, cfg: Config, model: WorldModel, agent: ActorCritic, num_envs: int, device):
        self.model, self.agent = model, agent
        self.memory = (torch.zeros(num_envs, cfg.d_model, device=device),
                       model.sequence.initial_states(num_envs))  # d_{t-1}, h_{t-1}

    @torch.no_grad()
    def act(self, frame: Tensor, first: Tensor, at_random: bool = False) -> tuple[Tensor, Tensor]:
        """frame (n, H, W, 3) uint8, first (n,) bool -> action (n,), latent classes (n, K)."""
        z = draw_one_hot(self.model.encode(frame))
        d, states = self.memory
        d, states = d.masked_fill(first[:, None], 0), clear(states, first)
        logits = self.agent.actor(torch.cat([z.flatten(-2), d], -1)).float() * (not at_random)
        action = draw_one_hot(logits.log_softmax(-1)).argmax(-1)
        self.memory = self.model.sequence(z.flatten(-2), action, states)
        return action, z.argmax(-1)


# ---- 9 train ------------------------------------------------------------------------------------
def train(cfg: Config, run: Run) -> int:
    """Train up to cfg.steps, on from the run's checkpoint if it has one -> exit code."""
    device, at = run.device, Progress()
    torch.manual_seed(cfg.seed)
    env = make_env(cfg.game, 1, cfg.image_size)
    num_actions = int(env.single_action_space.n)
    learning = WorldModel(cfg, num_actions).to(device, memory_format=layout(device))
    model = copy.deepcopy(learning).eval()  # NOTE(11): its moving average, which acts and dreams
    agent = ActorCritic(cfg, num_actions).to(device)
    model_learner, agent_learner = make_learners(cfg, learning, agent)
    replay, player = Replay(cfg, device), Player(cfg, model, agent, 1, device)
    frame = run.start(at, env, player, model=model, learning=learning, agent=agent, replay=replay,
                      model_learner=model_learner, agent_learner=agent_learner)
    while at.step < cfg.steps and not run.interrupted:
        # ACT
        action, latent = player.act(torch.from_numpy(frame[:, 0]).to(device),
                                    torch.tensor([at.first], device=device),
                                    at_random=at.step < cfg.warmup)
        action = action.cpu().numpy()
        following, reward, terminated, truncated, info = env.step(action)

        # STORE; after this `at.first` speaks of the next frame
        replay.add(frame[0, 0], action[0], reward[0], terminated[0], at.first, latent[0])
        at.add(float(reward[0]), over=bool(episode_over(terminated, truncated, info)[0]))
        frame = env.step(action)[0] if at.first else following  # after an end: `step` only resets

        news = {}
        if at.step >= cfg.warmup and at.step % cfg.train_every == 0:
            dreams_begin = growth(cfg, model_learner.updates) == 1
            with run.autocast:
                # TRAIN WORLD MODEL; its average follows, at first over the newest tenth of updates
                news |= update_world_model(learning, model_learner, replay)
                follow(model, learning, max(1 - cfg.average, 10 / (10 + model_learner.updates)))
                # IMAGINE, TRAIN ACTOR-CRITIC
                if dreams_begin:
                    news |= update_actor_critic(cfg, model, agent, agent_learner, replay)
        # LOG, SAVE
        run.log(at, news)
    return run.end(at)


# ==== The program: runs that resume, pictures, refusals. Skip on first reading ===================
# ---- 10 Optimisers ------------------------------------------------------------------------------
class Learner:
    """An optimiser with clipping and a schedule; it refuses numbers that are not finite."""

    def __init__(self, optimiser, clip: float, warmup: int, fall: int = 0, end: int = 0):
        """The rate rises over `warmup` updates, and falls to 0 over the `fall` before `end`."""
        self.optimiser, self.clip, self.updates = optimiser, clip, 0
        self.remaining = lambda k: min(1.0, max(0, end - k) / fall) if fall else 1.0  # at update k
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda k: min((k + 1) / warmup, self.remaining(k)))

    def step(self, losses: dict, weights: dict) -> dict:
        """One step down the weighted sum of the losses' means -> the means, the gradient's norm."""
        assert losses.keys() == weights.keys(), (losses.keys(), weights.keys())
        means = {name: loss.mean() for name, loss in losses.items()}
        parameters = [p for group in self.optimiser.param_groups for p in group["params"]]
        self.optimiser.zero_grad()
        with torch.autocast(parameters[0].device.type, enabled=False):  # backward needs none
            sum(weights[name] * mean for name, mean in means.items() if weights[name]).backward()
        if not all(weights.values()):
            for p in parameters:  # zeros, as compiled code gives, would enter Adam's averages
                p.grad = p.grad if p.grad is not None and p.grad.any() else None
        means["gradient_norm"] = nn.utils.clip_grad_norm_(parameters, self.clip)
        means = dict(zip(means, torch.stack([m.detach().float() for m in means.values()]).tolist()))
        if broken := [name for name, mean in means.items() if not math.isfinite(mean)]:
            raise FloatingPointError(broken[0])
        self.optimiser.step()
        self.schedule.step()
        self.updates += 1
        return means

    def state_dict(self) -> dict:
        """All that the next step depends on."""
        return dict(optimiser=self.optimiser.state_dict(), schedule=self.schedule.state_dict())

    def load_state_dict(self, saved: dict) -> None:
        """Go on from `state_dict`."""
        self.optimiser.load_state_dict(saved["optimiser"])
        self.schedule.load_state_dict(saved["schedule"])
        self.updates = self.schedule.last_epoch
        for group, rate in zip(self.optimiser.param_groups, self.schedule.base_lrs):
            group["lr"] = rate * self.schedule.lr_lambdas[0](self.updates)  # by today's `steps`


def make_learners(cfg: Config, model: WorldModel, agent: ActorCritic) -> tuple[Learner, Learner]:
    """AdamW for the world model, Adam for the rest. NOTE(9): the published default is LaProp."""
    # matrices and kernels decay; biases, norms, dt_bias, A_log and D do not
    groups = [dict(params=[p for p in model.parameters() if (p.ndim > 1) == matrix],
                   weight_decay=cfg.weight_decay * matrix) for matrix in (True, False)]
    acting = [*agent.actor.parameters(), *agent.critic.parameters()]
    model_adam = torch.optim.AdamW(groups, cfg.model_lr, fused=True)
    agent_adam = torch.optim.Adam(acting, cfg.actor_lr, eps=cfg.actor_eps, fused=True)
    end = (cfg.steps - cfg.warmup) // cfg.train_every
    fall, late = round(cfg.lr_fall * end), 3 * cfg.see_first  # updates before dreams begin
    return (Learner(model_adam, cfg.model_clip, cfg.lr_warmup, fall, end),
            Learner(agent_adam, cfg.actor_clip, cfg.lr_warmup, fall, end - late))


# ---- 11 The run folder --------------------------------------------------------------------------
# settings that may change when a run goes on. One added later must default to what was done before
ANYTIME = set("steps device out eval eval_envs checkpoint compile save_every draw_every".split())
METRICS = ("reconstruction reward termination dynamics representation gradient_norm kl "
           "batch_reward policy entropy value slow_value actor_gradient_norm imagined_return "
           "imagined_reward imagined_value imagined_end return_scale policy_entropy").split()


class Refusal(Exception):
    """What the user has to mend: one line on stderr, then exit code 2."""


def refuse(message: str) -> None:
    """Raise Refusal; for argparse."""
    raise Refusal(f"{message}; see --help")


@contextlib.contextmanager
def guard(what: str, way_out: str = ""):
    """Refusal for any error inside; without a way out, as of what is to look at, a warning."""
    try:
        yield
    except Exception as error:
        if way_out:
            raise Refusal(f"{what} ({error!r:.90}); {way_out}") from None
        say(f"{what} failed ({error!r:.90}); the run goes on", sys.stderr)


def say(text: str, stream=None) -> None:
    """Print a line; a terminal that was closed, or lacks a letter, does not end the run."""
    letters = getattr(stream or sys.stdout, "encoding", None) or "utf-8"
    with contextlib.suppress(OSError, ValueError):
        print(text.encode(letters, "backslashreplace").decode(letters), file=stream, flush=True)


def load_checkpoint(path: Path, device: torch.device, settings: dict) -> dict:
    """A run's checkpoint, or a file of weights alone; Refusal where it has other settings."""
    with guard(f"{path}: no whole checkpoint", "train first, or use another --out"):
        if zipfile.ZipFile(path).testzip():
            raise ValueError("a checksum is wrong")
        saved = torch.load(path, map_location=device, weights_only=True)  # runs no code in it
        made, _ = vars(validate(Config(**saved["config"]))), int(saved["at"]["step"])
    differ = [f"{name} (was {made[name]}, now {value})" for name, value in settings.items()
              if name not in ANYTIME and made[name] != value]
    if differ:
        raise Refusal(f"{path} has other settings: {', '.join(differ[:4])}; use another --out")
    return saved


@dataclass
class Progress:
    """Where a run stands; a checkpoint keeps it."""
    step: int = 0  # environment steps
    seconds: float = 0.0  # spent on them, over all sittings
    episode: int = 0  # episodes finished
    first: bool = True  # the frame in hand opens an episode
    total: float = 0.0  # reward of the episode in hand
    length: int = 0  # its steps

    def add(self, reward: float, over: bool) -> None:
        """Count a step."""
        if self.first:
            self.total, self.length = 0.0, 0
        self.step, self.length, self.total = self.step + 1, self.length + 1, self.total + reward
        self.first, self.episode = over, self.episode + over


class Run(contextlib.ExitStack):
    """The run folder; when its `with` ends, its lock, the signals and the bar are given back."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg, self.dir = cfg, Path(cfg.out or f"runs/{cfg.game}-{cfg.seed}")
        self.frames, self.checkpoint = self.dir / "frames.bin", self.dir / "checkpoint.pt"
        self.saved, self.interrupted = None, 0

    def open(self) -> bool:
        """Lock the folder and read the checkpoint, if any -> whether there are steps to do."""
        cfg, step = self.cfg, 0
        self.dir.mkdir(parents=True, exist_ok=True)
        lock = self.enter_context(contextlib.closing(sqlite3.connect(self.dir / "lock", 0)))
        try:  # SQLite knows each system's locks; they are gone when the process is
            lock.executescript("PRAGMA journal_mode = OFF; BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise Refusal(f"{self.dir} is in use by another process; use a new --out") from None
            say(f"{self.dir} has no locks ({error}); start no second run in it", sys.stderr)
        self.device, self.precision = choose_device(cfg)
        if self.checkpoint.exists():
            self.saved = load_checkpoint(self.checkpoint, self.device, vars(cfg))
            step = self.saved["at"]["step"]
        if step >= cfg.steps:
            say(f"{self.dir} is finished at step {step:,}; to go on, give a larger --steps")
        return step < cfg.steps

    def start(self, at: Progress, env, player: Player, **parts) -> np.ndarray:
        """Go on from the checkpoint, if any -> the first frame.
        parts: what a checkpoint keeps besides, by name, with state_dict and load_state_dict."""
        cfg, self.parts, self.player = self.cfg, parts, player
        self.kept, self.pending, self.shown = 0, {}, {}
        self.tables = {"metrics.csv": [",".join(["step", "seconds", "updates", *METRICS])],
                       "episodes.csv": ["step,seconds,episode,return,length"]}
        with contextlib.suppress(ValueError):  # none but the main thread may set signals
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.signal(number, self.interrupt)
                self.callback(signal.signal, number, before or signal.SIG_DFL)
        # the modules that keep a random generator; the environment has its own
        self.random = [torch] + [getattr(torch, self.device.type)] * (self.device.type != "cpu")
        frame = env.reset(seed=cfg.seed + (self.saved["at"]["step"] if self.saved else 0))[0]
        if cfg.game == "GridWorld":  # Atari has no state_dict: a resume opens a new episode
            parts["env"] = env.envs[0].unwrapped
        frame = self.restore(at, frame) if self.saved else frame
        open(self.frames, "ab").close()  # there, and to be written to
        with guard("config.json"):
            (self.dir / "config.json").write_text(json.dumps(vars(cfg), indent=1))
        if compiled := cfg.compile == "auto" and self.device.type == "cuda" and has_triton():
            compile_parts(parts["learning"], parts["agent"], player)
        say(f"{cfg.game}: preset {cfg.preset} (others: --preset paper, laptop), {self.device}, "
            f"{self.precision}{', compiled' * compiled}, {torch.get_num_threads()} threads\n"
            f"run folder {self.dir}: from step {at.step:,} to {cfg.steps:,}; learning starts at "
            f"step {cfg.warmup:,}, from then on the bar knows the time to go"
            + "\nnothing will be learnt: raise --steps" * (cfg.warmup > cfg.steps))
        self.autocast = torch.autocast(self.device.type, torch.bfloat16,
                                       self.precision == "bfloat16")
        self.stored = self.drawn = time.perf_counter()
        self.begun = self.stored - at.seconds
        with guard("the bar"):
            self.bar = tqdm(total=cfg.steps, initial=at.step, unit="step", dynamic_ncols=True,
                            mininterval=2, smoothing=0.05)
            self.callback(guard("the bar")(self.bar.close))
        return frame

    def interrupt(self, number, _) -> None:
        """Ctrl-C and its like: the first lets the step in hand end, the second leaves at once."""
        self.interrupted = os._exit(128 + number) if self.interrupted else number

    def restore(self, at: Progress, frame: np.ndarray) -> np.ndarray:
        """Put everything back as it was at the checkpoint -> the frame to go on from."""
        saved, self.saved, frames = self.saved, None, self.parts["replay"].frame
        with guard(f"{self.checkpoint} or frames.bin does not fit", "use another --out"):
            for name, part in self.parts.items():
                part.load_state_dict(saved[name])
            vars(at).update(saved["at"])
            self.player.memory = saved["memory"]
            self.pending = {name: [*map(float, found)] for name, found in saved["pending"].items()}
            self.tables = {name: [*map(str, saved["tables"][name])] for name in self.tables}
            if saved["device"] == self.device.type:  # a resume elsewhere chooses anew
                self.precision = saved["precision"]
                for module, state in zip(self.random, saved["generators"], strict=True):
                    module.set_rng_state(state.cpu())
            data = np.fromfile(self.frames, np.uint8, frames[:at.step].numel())
            frames[:at.step] = torch.from_numpy(data).view(-1, *frames.shape[1:])
            self.kept, at.first = at.step, at.first or "env" not in self.parts
            return self.parts["env"].frame()[None].copy() if "env" in self.parts else frame

    def save(self, at: Progress) -> None:
        """Append the frames, then write the checkpoint aside, flush and rename it: never torn."""
        frame, buffer, aside = self.parts["replay"].frame, io.BytesIO(), self.dir / "checkpoint.new"
        self.stored = time.perf_counter()
        at.seconds = self.stored - self.begun
        torch.save({"config": dict(vars(self.cfg)), "at": vars(at), "pending": self.pending,
                    "tables": self.tables, "memory": self.player.memory,
                    "device": self.device.type, "precision": self.precision,
                    "generators": [m.get_rng_state() for m in self.random],
                    **{name: part.state_dict() for name, part in self.parts.items()}}, buffer)
        os.truncate(self.frames, self.kept * frame[0].numel())  # what came after the last one
        for path, mode, data in ((self.frames, "ab", frame[self.kept:at.step].cpu().numpy()),
                                 (aside, "wb", buffer.getbuffer())):
            with open(path, mode) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        self.kept = at.step
        with contextlib.suppress(PermissionError):
            return os.replace(aside, self.checkpoint)
        time.sleep(2)  # on Windows a virus scanner may hold the old file for a moment
        os.replace(aside, self.checkpoint)

    def log(self, at: Progress, news: dict) -> None:
        """Rows for the tables, a step for the bar; checkpoint and pictures when it is time."""
        cfg, now, learner = self.cfg, time.perf_counter(), self.parts["model_learner"]
        when = f"{at.step},{now - self.begun:.6g},"
        for name, value in news.items():
            self.pending.setdefault(name, []).append(value)
        if at.first:
            self.shown["return"] = at.total
            self.tables["episodes.csv"].append(when + f"{at.episode},{at.total:.6g},{at.length}")
        if at.step % cfg.log_every == 0 and self.pending:
            means = {name: float(np.mean(self.pending.get(name, math.nan))) for name in METRICS}
            self.tables["metrics.csv"].append(f"{when}{learner.updates}," + ",".join(
                f"{mean:.6g}" for mean in means.values()))
            self.shown.update(reconstruction=means["reconstruction"], kl=means["kl"])
            self.pending = {}
        if at.first or at.step % cfg.log_every == 0 or at.step == cfg.steps:
            for name, rows in self.tables.items():
                with guard(name):
                    (self.dir / name).write_text("\n".join(rows) + "\n")
        with guard("the bar"):
            self.bar.set_postfix(self.shown, refresh=False)
            self.bar.update()
        if now - self.stored > cfg.save_every:
            self.save(at)
        if now - self.drawn > cfg.draw_every:
            self.draw()

    def draw(self) -> None:
        """curves.png, dream.gif and dream.png."""
        with guard("drawing"):
            from experiments import pictures
            pictures.draw(self.dir, self.cfg, self.parts["model"], self.parts["replay"])
        self.drawn = time.perf_counter()

    def end(self, at: Progress) -> int:
        """The last checkpoint, pictures and word -> exit code."""
        self.save(at)
        self.draw()
        self.close()
        if at.step < self.cfg.steps:
            say(f"stopped at step {at.step:,}; the same command goes on", sys.stderr)
            return 128 + self.interrupted
        say(f"finished {at.step:,} steps in {at.seconds / 60:.1f} minutes: {self.dir}")
        return 0


# ---- 12 Command line ----------------------------------------------------------------------------
def rom_name(game: str) -> str:
    """ALE's name of a game, MsPacman -> ms_pacman; Refusal if it has none."""
    roms = {rom.title().replace("_", ""): rom for rom in ale_py.roms.get_all_rom_ids()}
    if game not in roms or not ale_py.ALEInterface.isSupportedROM(
            ale_py.roms.get_rom_path(roms[game])):
        near = [x for x in {*roms, "GridWorld"} - {game} if x.lower() == game.lower()] + ["Pong"]
        raise Refusal(f"--game {game}: ALE plays no such game; try {near[0]}")
    return roms[game]


def validate(cfg: Config) -> Config:
    """The same settings; Refusal where one is out of its range or two do not fit together."""
    for f in fields(cfg):
        value, low, high = getattr(cfg, f.name), f.metadata["low"], f.metadata["high"]
        if low is not None and not low <= value <= high:
            raise Refusal(f"--{f.name.replace('_', '-')} {value}: must lie from {low} to {high}")
    if cfg.image_size != CNN_MAP * math.prod(stride for _, stride in cfg.cnn):
        raise Refusal(f"--image-size {cfg.image_size}: over --first-stride must be 4, 8, .. or 64")
    if cfg.expand * cfg.d_model % cfg.headdim:
        raise Refusal(f"--headdim {cfg.headdim}: does not divide --expand times --d-model")
    if cfg.categoricals % cfg.prior_groups:
        raise Refusal(f"--prior-groups {cfg.prior_groups}: must divide --categoricals")
    if cfg.warmup < max(cfg.batch_size + cfg.batch_length, cfg.context):
        raise Refusal(f"--warmup {cfg.warmup}: under --context or --batch-size + --batch-length")
    if cfg.game != "GridWorld":
        rom_name(cfg.game)
    return cfg


def choose_device(cfg: Config) -> tuple[torch.device, str]:
    """The device asked for, or cuda, or cpu; and the precision: bfloat16 where the chip has it."""
    best = "cuda" if torch.cuda.is_available() else "cpu"  # on mps nobody has run it yet
    with guard(f"--device {cfg.device}: not on this machine", "try cpu, cuda, cuda:1 or mps"):
        x = torch.ones(512, 512, device=best if cfg.device == "auto" else cfg.device)
        x.sum().item()
    if x.is_cuda:
        torch.cuda.set_device(x.device)  # the one whose random generator is saved
    fast = (torch.cuda.is_bf16_supported(including_emulation=False) if x.is_cuda
            else x.is_cpu and torch.cpu._is_avx512_bf16_supported())
    return x.device, ("float32", "bfloat16")[fast] if cfg.precision == "auto" else cfg.precision


def compile_parts(learning: WorldModel, agent: ActorCritic, player: Player) -> None:
    """For CUDA alone, as torch 2.13's CPU code was seen to crash. reduce-overhead: CUDA graphs."""
    torch._dynamo.config.suppress_errors = True  # what cannot be compiled runs eager
    agent.loss = torch.compile(agent.loss)
    for part, name in ((learning, "loss"), (player.model, "imagine"), (player, "act")):
        setattr(part, name, torch.compile(getattr(part, name), mode="reduce-overhead"))

    def act(*args, graph=player.act, **kwargs):  # a copy, as the graph writes to the same place
        answer, player.memory = graph(*args, **kwargs), copy.deepcopy(player.memory)
        return answer
    player.act = act


def keep_freed_pages() -> None:
    """Ask glibc to keep freed memory: clearing fresh pages for big tensors took half the time."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # not glibc
        for option, value in ((-4, 0), (-1, 2**31 - 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(option, value)


def rebuild(saved: dict, cfg: Config, device: torch.device) -> tuple[WorldModel, ActorCritic]:
    """World model and actor-critic with a checkpoint's weights, ready to play."""
    num_actions = int(make_env(cfg.game, 1, cfg.image_size).single_action_space.n)
    model, agent = WorldModel(cfg, num_actions), ActorCritic(cfg, num_actions)
    with guard("the checkpoint's weights do not fit its settings", "use another"):
        model.load_state_dict(saved["model"])
        agent.load_state_dict(saved["agent"])
    return model.to(device).eval(), agent.to(device)


def evaluate(cfg: Config, given: set[str], run: Run) -> int:
    """Play cfg.eval full episodes from the checkpoint, print and keep the scores -> exit code."""
    asked, (device, _) = {name: getattr(cfg, name) for name in given}, choose_device(cfg)
    saved = load_checkpoint(Path(cfg.checkpoint or run.checkpoint), device,
                            {name: asked[name] for name in given - {"seed"}})
    cfg, step, scores = Config(**saved["config"] | asked), saved["at"]["step"], []
    torch.manual_seed(cfg.seed)
    model, agent = rebuild(saved, cfg, device)
    while len(scores) < cfg.eval:  # an episode in each environment: none counts for being short
        n = min(cfg.eval_envs, cfg.eval - len(scores))
        env, player = make_env(cfg.game, n, cfg.image_size), Player(cfg, model, agent, n, device)
        frame, score = env.reset(seed=cfg.seed + len(scores))[0], np.zeros(n)
        first, plays = torch.zeros(n, dtype=torch.bool, device=device), np.ones(n, bool)
        while plays.any():
            action, _ = player.act(torch.from_numpy(frame[:, 0]).to(device), first)
            frame, reward, terminated, truncated, info = env.step(action.cpu().numpy())
            score += reward * plays
            plays &= ~episode_over(terminated, truncated, info)
        scores += score.tolist()
        say(f"scores: {' '.join(f'{s:g}' for s in score)}")
    mean = float(np.mean(scores))
    say(f"{cfg.game} at step {step:,}, {cfg.eval} episodes: mean {mean:.2f}, standard deviation "
        f"{np.std(scores):.2f}")
    with guard("comparing"):
        from experiments.pictures import levels
        say("; ".join(f"{who} {score:g}" for who, score in levels(cfg.game).items())
            or "nothing published to compare with")
    if not cfg.checkpoint:
        with guard("evaluation.json"):
            (run.dir / "evaluation.json").write_text(json.dumps(dict(game=cfg.game, seed=cfg.seed,
                step=step, episodes=cfg.eval, mean=mean, scores=scores), indent=1))
    return 0


def parse(argv: list[str] | None) -> tuple[Config, set[str]]:
    """Command line -> Config (defaults, preset, flags, each over the last), the flags given."""
    parser = argparse.ArgumentParser(
        "drama.py", usage="%(prog)s --game NAME [--flag VALUE]", description=__doc__,
        allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse
    groups = {"game": "what to run", "categoricals": "the dozen that matter (default; laptop's)",
              "image_size": "the rest (default; laptop's)"}
    for f in fields(Config):
        if f.name in groups:
            group = parser.add_argument_group(groups[f.name])
        kind, laptop = type(f.default), PRESETS["laptop"].get(f.name)
        choices = ("true", "false") if kind is bool else f.metadata["choices"]
        group.add_argument(
            f"--{f.name.replace('_', '-')}", default=argparse.SUPPRESS, choices=choices,
            type=str.lower if kind is bool else kind,
            metavar=None if choices else {int: "N", float: "X"}.get(kind),
            help=f"{f.metadata['help']} ({f.default}{'' if laptop is None else f'; {laptop}'})")
    argv = [re.sub("^--[^=]*", lambda flag: flag[0].replace("_", "-"), word)
            for word in (sys.argv[1:] if argv is None else argv)]
    given = {name: value == "true" if type(getattr(Config, name)) is bool else value
             for name, value in vars(parser.parse_args(argv)).items()}
    auto = "gridworld" if given.get("game") == "GridWorld" else "laptop"
    preset = auto if given.get("preset", "auto") == "auto" else given["preset"]
    return validate(Config(**{**PRESETS[preset], **given, "preset": preset})), set(given)


def main(argv: list[str] | None = None) -> int:
    """Run a command line -> exit code: 1 not finite, 2 refused, 128 + n stopped by signal n."""
    keep_freed_pages()
    warnings.filterwarnings("ignore", message="Mismatch dtype")  # RMSNorm: bfloat16 in, as meant
    try:
        cfg, given = parse(argv)
        with Run(cfg) as run:
            if cfg.eval:
                return evaluate(cfg, given, run)
            return train(cfg, run) if run.open() else 0
    except KeyboardInterrupt:
        return 130
    except Refusal as error:
        code, words = 2, str(error)
    except FloatingPointError as error:
        code, words = 1, f"{error} is not finite; use lower learning rates and another --out"
    except (ImportError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):  # memory ran out
            raise
        code, words = 2, f"{str(error) or 'out of memory'}; what was saved is as before"
    say("drama.py: " + " ".join(words.split()), sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
