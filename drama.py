"""Drama in one file: a Mamba-2 world model learns a game, an actor-critic learns inside its dreams.

    python drama.py --game GridWorld         a result in minutes on a laptop
    python drama.py --game Pong              train on Atari; run it again to continue
    python drama.py --game Pong --eval 20    play 20 episodes from the checkpoint
    python drama.py --help                   every setting, one line each

A discrete VAE turns frames into latents; Mamba-2, as the chunked scan of [2], predicts the next
latent, the reward and the end; actor and critic learn on predicted futures alone; dynamic
frequency-based sampling (DFS) chooses what to train on and where to dream from.

Sources: [1] Drama, arXiv 2410.08893v4. [2] Mamba-2 (SSD), arXiv 2405.21060. [3] Mamba, arXiv
2312.00752. [4] DreamerV3, arXiv 2301.04104. [5] STORM, arXiv 2310.09615. [6] SimPLe, 1903.00374.

    code          paper    shape                 meaning
    frame         o_t      (b, l, H, W, 3)       what the player sees, uint8
    z             z_t      (b, l, K, C)          latent: K categoricals of C classes, one-hot
    action        a_t      (b, l)                index into the game's minimal action set
    reward        r_t      (b, l)                follows a_t
    terminated    e_t      (b, l)                1 where a_t ended the game or cost a life
    first                  (b, l)                1 where o_t opens an episode
    d             d_t      (b, l, d_model)       the sequence model's output after (z_t, a_t)
    state         h_t      (b, h, p, n)          the state space model's memory
    v, b                   (rows,)               DFS: times trained on, times dreamt from

Left out: other world models, continuous actions, several training environments, data parallelism.
NOTE(k) marks a departure from the paper or the published code; the README lists them.
"""

import argparse
import copy
import csv
import ctypes
import dataclasses
import difflib
import io
import json
import os
import shutil
import signal
import sys
import time
import timeit
import warnings
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import ale_py
import numpy as np
import torch
import torch.nn.functional as F
from gymnasium.spaces import Discrete
from gymnasium.vector import VectorEnv
from torch import Tensor, nn
from tqdm import tqdm

# ---- 1 Config -----------------------------------------------------------------------------------


class Refusal(Exception):
    """What the user has to mend: one line on stderr, then exit code `code`."""

    def __init__(self, message: str, code: int = 2):
        super().__init__(message)
        self.code = code


def out_of_memory(error: Exception) -> bool:
    """Whether Python, CUDA or PyTorch's CPU allocator says that memory ran out."""
    return isinstance(error, MemoryError) or any(
        words in str(error) for words in ("out of memory", "allocate memory"))


def opt(default, text: str, low=None, high=None, choices=None):
    """A Config field: default of preset `paper`, the line for --help, the values allowed."""
    return field(default=default, metadata=dict(help=text, low=low, high=high, choices=choices))


@dataclass(frozen=True)
class Config:
    """Every setting. The defaults are preset `paper`, the figures of [1]; see PRESETS."""

    game: str = opt("Pong", "a game of ALE, such as Pong, or GridWorld")
    preset: str = opt("auto", "sizes and rates; auto: gridworld for it, paper on CUDA, else laptop",
                      choices=("auto", "paper", "laptop", "gridworld", "tiny"))
    steps: int = opt(100_000, "environment steps in all; an Atari step is 4 frames", 1, 100_000_000)
    seed: int = opt(0, "seed of every random generator", 0, 2**30)
    device: str = opt("auto", "cpu, cuda, cuda:1, mps; auto: the best there is")
    out: str = opt("", "run folder; empty: runs/<game>-<seed>")
    eval: int = opt(0, "play so many episodes from the checkpoint, do not train", 0, 100_000)
    eval_envs: int = opt(4, "environments that play at once in --eval", 1, 256)
    # frames and latents
    image_size: int = opt(64, "height and width of a frame", 8, 256)
    cnn_width: int = opt(16, "channels of the first convolution, times 1, 2, 3, 4, 4", 1, 512)
    cnn_kernel: int = opt(5, "taps of a convolution each way", choices=(3, 5, 7))
    first_stride: int = opt(1, "stride of the first convolution; the others have 2", 1, 4)
    categoricals: int = opt(32, "K: categoricals in a latent", 1, 256)
    classes: int = opt(32, "C: classes of a categorical", 2, 256)
    unimix: float = opt(0.01, "share of the uniform distribution in every categorical", 0.0, 0.5)
    # sequence model and heads
    d_model: int = opt(512, "width of the sequence model", 1, 8192)
    layers: int = opt(2, "Mamba-2 layers", 1, 64)
    d_state: int = opt(16, "n: state size of a channel", 1, 1024)
    d_conv: int = opt(4, "taps of the causal convolution", 1, 16)
    expand: int = opt(2, "inner width over d_model", 1, 8)
    headdim: int = opt(64, "p: channels of an SSM head", 1, 1024)
    chunk_size: int = opt(32, "tokens in a chunk of the scan", 1, 4096)
    dropout: float = opt(0.1, "dropout on each Mamba-2 layer's output", 0.0, 0.9)
    head_units: int = opt(256, "hidden units of the reward and termination heads", 1, 8192)
    bins: int = opt(255, "two-hot bins of rewards and values", 3, 4095)
    bin_limit: float = opt(20.0, "largest symlog value in the bins", 1.0, 50.0)
    # world model training
    batch_size: int = opt(16, "sequences in an update", 1, 4096)
    batch_length: int = opt(128, "frames in a sequence", 2, 65536)
    warmup: int = opt(1032, "random steps before learning starts", 1, 10_000_000)
    train_every: int = opt(1, "environment steps between updates", 1, 100_000)
    decoded: float = opt(1.0, "share of a batch's frames that are decoded and compared", 0.01, 1.0)
    free_bits: float = opt(1.0, "KL below this is not trained on, in nats", 0.0, 1000.0)
    representation_scale: float = opt(0.1, "weight of KL[post || sg(prior)]", 0.0, 100.0)
    mean_frame: bool = opt(False, "the decoder starts at the mean of the random steps' frames")
    see_first: int = opt(0, "updates on reconstruction alone; in twice as many the rest grows in; "
                         "then dreams begin", 0, 10_000_000)
    model_lr: float = opt(1e-4, "world model: learning rate", 1e-8, 1.0)
    model_clip: float = opt(1000.0, "world model: largest gradient norm", 1e-3, 1e9)
    weight_decay: float = opt(1e-4, "world model: weight decay of matrices and kernels", 0.0, 1.0)
    lr_warmup: int = opt(1000, "updates of linear learning-rate warm-up", 1, 10_000_000)
    sampler: str = opt("dfs", "what to train on and dream from", choices=("dfs", "uniform"))
    temperature: float = opt(10.0, "DFS: temperature of the softmax over counts", 1e-3, 1e9)
    # dreams, actor, critic
    dreams: int = opt(1024, "dreams in an update", 1, 65536)
    context: int = opt(8, "real frames that a dream starts from", 2, 1024)
    horizon: int = opt(16, "steps of a dream", 1, 1024)
    stored_latents: bool = opt(False, "contexts from latents kept at a frame's last encoding")
    actor_units: int = opt(256, "actor: hidden units", 1, 8192)
    critic_units: int = opt(512, "critic: hidden units", 1, 8192)
    hidden_layers: int = opt(3, "actor and critic: hidden layers", 1, 16)
    gamma: float = opt(0.985, "discount of a step", 0.0, 1.0)
    lam: float = opt(0.95, "lambda of the lambda-return", 0.0, 1.0)
    entropy: float = opt(3e-4, "weight of the policy's entropy", 0.0, 10.0)
    return_decay: float = opt(0.99, "EMA of the returns' 5-95 percentile range", 0.0, 1.0)
    slow_decay: float = opt(0.98, "EMA of the slow critic's weights", 0.0, 1.0)
    actor_lr: float = opt(3e-5, "actor and critic: learning rate", 1e-8, 1.0)
    actor_eps: float = opt(1e-5, "actor and critic: Adam's epsilon", 1e-12, 1.0)
    actor_clip: float = opt(100.0, "actor and critic: largest gradient norm", 1e-3, 1e9)
    act_context: int = opt(16, "steps that acting rebuilds its state from; 0: carry it", 0, 1024)
    # machine, keeping, showing
    precision: str = opt("auto", "auto: bfloat16 on CUDA, on a CPU only where it measures faster",
                         choices=("auto", "float32", "bfloat16"))
    compile: str = opt("auto", "torch.compile, on CUDA only; auto or off", choices=("auto", "off"))
    log_every: int = opt(100, "environment steps between rows of metrics.csv", 1, 1_000_000)
    save_every: float = opt(120.0, "seconds between checkpoints", 0.0, 1e6)
    draw_every: float = opt(400.0, "seconds between pictures", 0.0, 1e9)
    picture_steps: int = opt(40, "dreamt frames in the pictures", 1, 1000)

    @property
    def cnn(self) -> list[tuple[int, int]]:
        """(channels, stride) of each convolution, from image_size down to a 4x4 map."""
        size, stages = self.image_size // self.first_stride, [(self.cnn_width, self.first_stride)]
        for multiple in CNN_MULTIPLES[1:]:
            if size > CNN_MAP:
                stages.append((self.cnn_width * multiple, 2))
                size //= 2
        return stages

    @property
    def d_z(self) -> int:
        """K C: numbers in a flat latent."""
        return self.categoricals * self.classes

    @property
    def d_feature(self) -> int:
        """Width of [z_t, d_{t-1}], which actor and critic read."""
        return self.d_z + self.d_model


CNN_MULTIPLES, CNN_MAP, CNN_PATCH = (1, 2, 3, 4, 4), 4, 4
ANYTIME = {"steps", "device", "out", "eval", "eval_envs", "compile", "save_every", "draw_every"}
PRESETS = {
    "paper": {},
    "laptop": dict(  # a row is drawn 1/16 as often as in paper, hence DFS's lower temperature
        cnn_kernel=3, first_stride=4, categoricals=16, classes=16, d_model=256, head_units=128,
        batch_size=8, batch_length=32, train_every=8, see_first=500, decoded=0.5, mean_frame=True,
        dreams=64, horizon=10, stored_latents=True, critic_units=256, hidden_layers=2,
        model_lr=2e-3, actor_lr=2e-4, entropy=3e-3, lr_warmup=100, temperature=0.6),
    "gridworld": dict(
        steps=10_000, first_stride=4, categoricals=16, classes=16, d_model=128, head_units=128,
        batch_size=8, batch_length=32, warmup=3000, train_every=8, free_bits=0.1, see_first=50,
        mean_frame=True, dreams=256, context=3, horizon=2, act_context=4, stored_latents=True,
        actor_units=128, critic_units=128, hidden_layers=2, model_lr=2e-3, actor_lr=5e-4,
        entropy=1e-2, lr_warmup=50),
    "tiny": dict(
        image_size=16, cnn_width=4, first_stride=2, categoricals=4, classes=6, d_model=16,
        headdim=8, d_state=4, chunk_size=4, head_units=16, bins=41, batch_size=3, batch_length=10,
        warmup=40, train_every=8, dreams=7, context=4, horizon=5, stored_latents=True,
        mean_frame=True, actor_units=16, critic_units=16, hidden_layers=1, lr_warmup=10,
        log_every=20, picture_steps=12),
}


def validate(cfg: Config) -> None:
    """Raise Refusal where a value is out of its range or two values do not fit together."""
    for f in dataclasses.fields(cfg):
        value, m = getattr(cfg, f.name), f.metadata
        if m["choices"] and value not in m["choices"]:
            raise Refusal(f"--{f.name} {value}: choose from {', '.join(map(str, m['choices']))}")
        if m["low"] is not None and not m["low"] <= value <= m["high"]:
            raise Refusal(f"--{f.name} {value}: must lie from {m['low']} to {m['high']}")
    if cfg.image_size != CNN_MAP * np.prod([stride for _, stride in cfg.cnn]):
        raise Refusal(f"--image_size {cfg.image_size} --first_stride {cfg.first_stride}: size over "
                      "stride must be 4, 8, 16, 32 or 64")
    if cfg.expand * cfg.d_model % cfg.headdim:
        raise Refusal(f"--headdim {cfg.headdim}: does not divide expand * d_model = "
                      f"{cfg.expand * cfg.d_model}")
    if cfg.game != "GridWorld":
        rom_name(cfg.game)
    shortest = max(cfg.batch_size + cfg.batch_length, cfg.context)
    if cfg.warmup < shortest:
        raise Refusal(f"--warmup {cfg.warmup}: the first update needs {shortest} steps, batch_size "
                      "+ batch_length or --context; raise --warmup or lower those")


# ---- 2 Environments -----------------------------------------------------------------------------

# Atari 100k, mean scores as published in [6], [1] (DramaXS), [4] and [5].
COLUMNS = ("random", "human", "Drama", "DreamerV3", "STORM")
SCORES = {game: dict(zip(COLUMNS, map(float, scores))) for game, *scores in map(str.split, """\
    Alien 227.8 7127.7 820 978.4 983.6            | Amidar 5.8 1719.5 131 94.3 204.8
    Assault 222.4 742 539 629.8 801               | Asterix 210 8503.3 1632 955.3 1028
    BankHeist 14.2 753.1 137 320.5 641.2          | BattleZone 2360 37187.5 10860 18335.7 13540
    Boxing 0.1 12.1 78 79.4 79.7                  | Breakout 1.7 30.5 7 9 15.9
    ChopperCommand 811 7387.8 1642 1639 1888      | CrazyClimber 10780.5 35829.4 83931 76583.3 66776
    DemonAttack 152.1 1971 201 369.2 164.6        | Freeway 0 29.6 15 0 0
    Frostbite 65.2 4334.7 785 3036.4 1316         | Gopher 257.6 2412.5 2757 2321.6 8239.6
    Hero 1027 30826.4 7946 13344.3 11044.3        | Jamesbond 29 302.8 372 524.2 509
    Kangaroo 52 3035 1384 2996.1 4208             | Krull 1598 2665.5 9693 7683.5 8412.6
    KungFuMaster 258.5 22736.3 23920 23301.7 26182| MsPacman 307.3 6951.6 2270 1525.8 2673.5
    Pong -20.7 14.6 15 -4.2 11.3                  | PrivateEye 24.9 69571.3 90 3086.7 7781
    Qbert 163.9 13455 796 2066.1 4522.5           | RoadRunner 11.5 7845 14020 18196.9 17564
    Seaquest 68.4 42054.7 497 815.5 525.2         | UpNDown 533.4 11693.2 7387 43777.6 7985
    """.strip().replace("|", "\n").splitlines())}


def rom_name(game: str) -> str:
    """ALE's name of a game, MsPacman -> ms_pacman; Refusal, with the nearest names, if none."""
    ids = ale_py.roms.get_all_rom_ids()
    roms = {"".join(map(str.capitalize, rom.split("_"))): rom for rom in ids}
    if game not in roms:
        lower = {name.lower(): name for name in [*roms, "GridWorld"]}
        near = [lower[n] for n in difflib.get_close_matches(game.lower(), lower, n=3, cutoff=0.4)]
        hint = f"; did you mean {', '.join(near)}?" if near else "; try Pong or GridWorld"
        raise Refusal(f"--game {game}: no such game" + hint)
    return roms[game]


def make_env(game: str, num_envs: int, image_size: int) -> VectorEnv:
    """A vector environment: frames (n, 1, H, W, 3) uint8, rewards, ends (n,), NEXT_STEP autoreset.

    Atari follows [6]: frame skip 4, maximum of the last two frames, no sticky actions, the minimal
    action set, raw rewards. A lost life shows as `terminated` (what is learnt), not as an end.
    """
    if game == "GridWorld":
        return GridWorld(num_envs, image_size)
    return ale_py.AtariVectorEnv(
        rom_name(game), num_envs, img_height=image_size, img_width=image_size, grayscale=False,
        stack_num=1, frameskip=4, maxpool=True, noop_max=30, repeat_action_probability=0.0,
        full_action_space=False, episodic_life=False, life_loss_info=True, reward_clipping=False,
        use_fire_reset=False)


def episode_over(terminated: np.ndarray, truncated: np.ndarray, info: dict) -> np.ndarray:
    """(n,) bool: game over or out of time, where `terminated` alone may be a lost life."""
    return truncated | (terminated & (info["lives"] == 0))


class GridWorld(VectorEnv):
    """The grid world of [1]: 5x5, the outer 16 cells black walls, a red agent, a yellow goal.

    Actions: up, down, left, right; a wall stops the agent. Reaching the goal gives reward 1 and
    places both anew, on two cells of the 3x3 middle. Episodes of 64 steps end by truncation.
    """

    SIDE, STEPS, MOVES = 3, 64, ((-1, 0), (1, 0), (0, -1), (0, 1))
    WALL, FLOOR, AGENT, GOAL = (0, 0, 0), (160, 160, 160), (255, 0, 0), (255, 255, 0)

    def __init__(self, num_envs: int, image_size: int):
        self.num_envs, self.size = num_envs, image_size
        self.single_action_space = Discrete(len(self.MOVES))

    def _place(self, i: int) -> None:
        cells = self.SIDE**2
        agent, goal = self.np_random.choice(cells, 2, replace=False)
        self.agent[i], self.goal[i] = divmod(agent, self.SIDE), divmod(goal, self.SIDE)

    def _frames(self) -> np.ndarray:
        grid = np.full((self.num_envs, self.SIDE + 2, self.SIDE + 2, 3), self.WALL, np.uint8)
        grid[:, 1:-1, 1:-1] = self.FLOOR
        for cells, colour in ((self.goal, self.GOAL), (self.agent, self.AGENT)):
            grid[np.arange(self.num_envs), cells[:, 0] + 1, cells[:, 1] + 1] = colour
        pixel = np.arange(self.size) * grid.shape[1] // self.size
        return grid[:, None, pixel][:, :, :, pixel]

    def reset(self, *, seed=None, options=None):
        """Start every episode -> (frames, info)."""
        super().reset(seed=seed)
        self.agent, self.goal = np.zeros((2, self.num_envs, 2), np.int64)
        self.time = np.zeros(self.num_envs, np.int64)
        for i in range(self.num_envs):
            self._place(i)
        return self._frames(), {"lives": np.zeros(self.num_envs, np.int64)}

    def step(self, actions):
        """One step; the step after an end ignores the action and opens the next episode."""
        reward = np.zeros(self.num_envs, np.int64)
        for i, action in enumerate(actions):
            if self.time[i] == self.STEPS:
                self.time[i] = 0
                self._place(i)
                continue
            self.time[i] += 1
            self.agent[i] = np.clip(self.agent[i] + self.MOVES[action], 0, self.SIDE - 1)
            if (self.agent[i] == self.goal[i]).all():
                reward[i] = 1
                self._place(i)
        info = {"lives": np.zeros(self.num_envs, np.int64)}
        return self._frames(), reward, np.zeros(self.num_envs, bool), self.time == self.STEPS, info

    def state_dict(self) -> dict:
        """All that the next step depends on: ALE's vector environment has no such thing."""
        return dict(agent=self.agent.tolist(), goal=self.goal.tolist(), time=self.time.tolist(),
                    rng=json.dumps(self.np_random.bit_generator.state))

    def load_state_dict(self, saved: dict) -> None:
        """Go on from `state_dict`."""
        self.agent, self.goal = np.array(saved["agent"]), np.array(saved["goal"])
        self.time = np.array(saved["time"])
        self.np_random.bit_generator.state = json.loads(saved["rng"])

    @classmethod
    def best_return(cls) -> float:
        """Expected return of a perfect player: paths of |dy| + |dx| steps, then the steps left."""
        cells = [(y, x) for y in range(cls.SIDE) for x in range(cls.SIDE)]
        paths = [abs(y - v) + abs(x - u) for y, x in cells for v, u in cells if (y, x) != (v, u)]
        best = [0.0]  # best[t]: a fresh placement with t steps left
        for t in range(1, cls.STEPS + 1):
            best.append(sum(1 + best[t - s] for s in paths if s <= t) / len(paths))
        return best[-1]


# ---- 3 Replay and DFS ---------------------------------------------------------------------------


class Batch(NamedTuple):
    """Windows of the replay."""

    rows: Tensor  # (b, l) int64
    frame: Tensor  # (b, l, H, W, 3) uint8
    action: Tensor  # (b, l) int64
    reward: Tensor  # (b, l) float32
    terminated: Tensor  # (b, l) float32
    first: Tensor  # (b, l) bool


def gumbel(like: Tensor) -> Tensor:
    """Gumbel noise: argmax(logits + noise) draws from softmax(logits), top k draws k distinct."""
    tiny = torch.finfo(torch.float32).tiny
    return -torch.empty_like(like, dtype=torch.float32).exponential_().clamp_min(tiny).log()


def dfs_sequence_logits(v: Tensor, temperature: float) -> Tensor:
    """P(i) = softmax(-v_i / temperature): train on what was trained on least [1]."""
    return -v / temperature


def dfs_dream_logits(v: Tensor, b: Tensor, s: float, temperature: float) -> Tensor:
    """P(i) = softmax(min(0, v_i - b_i / s) / temperature): hold back what was dreamt from more
    often than it was trained on [1]."""
    return (v - b / s).clamp(max=0) / temperature


class Replay:
    """All that was seen, a row an environment step, in the order of time, on the training device;
    the frames lie in a file too.

        row        t             t+1           t+2
        frame      o_t           o_t+1         o_t+2    the frame that a_t answers
        action     a_t           a_t+1         a_t+2
        reward     r_t           r_t+1         r_t+2    FOLLOWS a_t, as does terminated e_t
        first      1             0             0        o_t opens an episode
        predicted  z_t+1,r_t,e_t    z_t+2, …            from d_t = f(z_0,a_0 … z_t,a_t)

    An episode's closing frame has no action and gets no row; the next row opens the next episode.
    Windows may cross that line: `first` clears the model's state there. The buffer holds the whole
    run, so it has no seam.
    """

    COLUMNS = ("action", "reward", "terminated", "first", "latent", "v", "b")

    def __init__(self, path: Path, cfg: Config, device: torch.device):
        self.cfg, self.device, self.size = cfg, device, 0
        rows, side = cfg.steps, cfg.image_size
        self.frame = np.memmap(path, np.uint8, "r+", shape=(rows, side, side, 3))
        self.on_device = torch.from_numpy(self.frame).to(device)  # a copy; on the CPU, the file
        with device:
            self.action = torch.zeros(rows, dtype=torch.int64)
            self.reward = torch.zeros(rows)
            self.terminated = torch.zeros(rows, dtype=torch.bool)
            self.first = torch.zeros(rows, dtype=torch.bool)
            self.latent = torch.zeros(rows, cfg.categoricals, dtype=torch.uint8)  # classes
            self.v = torch.zeros(rows, dtype=torch.int32)
            self.b = torch.zeros(rows, dtype=torch.int32)

    def add(self, frame, action, reward, terminated, first, latent) -> None:
        """Append one row: frame (H, W, 3) uint8, four numbers, latent (K,) classes."""
        i = self.size
        self.frame[i], self.on_device[i] = frame, torch.from_numpy(frame)
        self.action[i], self.reward[i], self.latent[i] = int(action), float(reward), latent
        self.terminated[i], self.first[i] = bool(terminated), bool(first)
        self.size += 1

    def _draw(self, k: int, length: int, logits: Tensor) -> Tensor:
        n = self.size - length + 1
        noisy = gumbel(self.v[:n]) + (logits[:n] if self.cfg.sampler == "dfs" else 0)
        starts = noisy.topk(min(k, n)).indices
        return starts[:, None] + torch.arange(length, device=self.device)  # (k, length)

    def draw_sequences(self) -> Tensor:
        """Rows (b, l) for a world model update; no start twice; their starts' v grows by 1."""
        rows = self._draw(self.cfg.batch_size, self.cfg.batch_length,
                          dfs_sequence_logits(self.v, self.cfg.temperature))
        self.v[rows[:, 0]] += 1
        return rows

    def draw_contexts(self) -> Tensor:
        """Rows (dreams, context) to dream from; no start twice; their starts' b grows by 1."""
        s = self.cfg.dreams / self.cfg.batch_size
        rows = self._draw(self.cfg.dreams, self.cfg.context,
                          dfs_dream_logits(self.v, self.b, s, self.cfg.temperature))
        self.b[rows[:, 0]] += 1
        return rows

    def batch(self, rows: Tensor) -> Batch:
        """The windows at rows (b, l)."""
        frame = self.on_device.index_select(0, rows.flatten())  # [rows] is slower on a CPU
        return Batch(rows, frame.unflatten(0, rows.shape), self.action[rows],
                     self.reward[rows], self.terminated[rows].float(), self.first[rows])

    def mean_frame(self) -> Tensor:
        """The mean of all frames, (H, W, 3) in 0..1."""
        return torch.from_numpy(self.frame[:self.size].mean(0) / 255).float().to(self.device)

    def state_dict(self) -> dict:
        """The rows so far less the frames, which are flushed to their file."""
        self.frame.flush()
        return {name: getattr(self, name)[:self.size].clone() for name in self.COLUMNS}

    def load_state_dict(self, saved: dict) -> None:
        """Go on from `state_dict`; rows of the frame file past its count are not believed."""
        self.size = len(saved["action"])
        for name in self.COLUMNS:
            getattr(self, name)[:self.size] = saved[name]


# ---- 4 Small maths ------------------------------------------------------------------------------


def symlog(x: Tensor) -> Tensor:
    """sign(x) ln(1 + |x|) [4]: squashes rewards and values of any scale."""
    return x.sign() * x.abs().log1p()


def symexp(x: Tensor) -> Tensor:
    """The inverse of symlog."""
    return x.sign() * x.abs().expm1()


class TwoHot(nn.Module):
    """Numbers as distributions over evenly spaced symlog bins [4]: x (...), logits (..., bins)."""

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
        """logits (..., bins) -> (...): symexp of the mean bin."""
        return symexp((logits.float().softmax(-1) * self.centres).sum(-1))


def unimix(logits: Tensor, share: float) -> Tensor:
    """log((1 - share) softmax(logits) + share / C) over the last axis, the CLASSES."""
    probs = logits.float().softmax(-1)
    mixed = (1 - share) * probs + share / logits.shape[-1]
    return mixed.clamp(min=torch.finfo(mixed.dtype).tiny).log()


def draw_one_hot(logp: Tensor) -> Tensor:
    """A one-hot sample of each categorical in logp (..., C): one random number each, where Gumbel
    noise takes C."""
    below = logp.exp().cumsum(-1) < torch.rand_like(logp[..., :1])
    return F.one_hot(below[..., :-1].sum(-1), logp.shape[-1]).to(logp.dtype)


def straight_through(logp: Tensor) -> Tensor:
    """A one-hot sample whose gradient is that of the probabilities [4]."""
    probs = logp.exp()
    return draw_one_hot(logp) + probs - probs.detach()


def kl_divergence(logp: Tensor, logq: Tensor) -> Tensor:
    """KL[p || q] of K independent categoricals, (..., K, C) -> (...), in nats."""
    return (logp.exp() * (logp - logq)).sum((-2, -1))


def free_bits(kl: Tensor, threshold: float) -> Tensor:
    """max(threshold, KL): no gradient where the KL is below it [4]."""
    return kl.clamp(min=threshold)


def lambda_return(reward: Tensor, end: Tensor, value: Tensor, gamma: float, lam: float) -> Tensor:
    """R_t = r_t + gamma (1 - e_t) ((1 - lam) V_{t+1} + lam R_{t+1}), R_H = V_H [4].

    reward, end (b, H); value (b, H+1) -> (b, H). NOTE(1): the published code has V_t for V_{t+1}.
    Example: r = (1, 1), e = 0, V = (9, 2, 4), gamma = lam = 0.5: R_1 = 3, R_0 = 1 + 0.5 (1 + 1.5).
    """
    R, out = value[:, -1], []
    for r, e, v in zip(*(x.unbind(1)[::-1] for x in (reward, end, value[:, 1:]))):
        R = r + gamma * (1 - e) * ((1 - lam) * v + lam * R)
        out.append(R)
    return torch.stack(out[::-1], 1)


# ---- 5 VAE --------------------------------------------------------------------------------------


class Encoder(nn.Sequential):
    """Frames (n, 3, H, W) in 0..1 -> (n, 4*4*channels): strided convolutions down to a 4x4 map."""

    def __init__(self, cfg: Config):
        layers, channels = [], 3
        for width, stride in cfg.cnn:
            kernel, padding = ((stride, 0) if stride == CNN_PATCH else
                               (cfg.cnn_kernel, cfg.cnn_kernel // 2))
            layers += [nn.Conv2d(channels, width, kernel, stride, padding), nn.BatchNorm2d(width),
                       nn.SiLU()]
            channels = width
        super().__init__(*layers, nn.Flatten())


class Decoder(nn.Sequential):
    """Latents (n, K*C) -> frames (n, 3, H, W) in 0..1: the encoder's mirror."""

    def __init__(self, cfg: Config):
        widths, strides = zip(*cfg.cnn)
        channels, layers = widths[-1], [nn.Linear(cfg.d_z, widths[-1] * CNN_MAP**2),
                                        nn.Unflatten(1, (widths[-1], CNN_MAP, CNN_MAP))]
        for width, stride in zip((*widths[-2::-1], 3), reversed(strides)):
            layers += [nn.BatchNorm2d(channels), nn.SiLU()]
            if stride == CNN_PATCH:
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

        NOTE(8): while a decoder has yet to find the background, a noisy latent costs more than it
        tells: the posterior turns constant, and stays so for long. On Pong's frames, after 60 s on
        one core, squared errors of 7.7 without this and 1.3 with it.
        """
        self.mean.copy_(frame.clamp(0.02, 0.98).logit().permute(2, 0, 1))
        last = [layer for layer in self if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))][-1]
        last.weight.mul_(0.01)
        last.bias.zero_()


# ---- 6 Mamba-2 ----------------------------------------------------------------------------------


def ssd_scan(x, dt, A, B, C, chunk_size: int, state=None, first=None) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t^T, y_t = C_t^T h_t, in the chunks of [2], section 6.

    x (b,l,h,p), dt (b,l,h) > 0, A (h,) < 0, B and C (b,l,n), state (b,h,p,n) or None for zeros,
    first (b,l) bool or None: the state is cleared BEFORE that token. Returns y (b,l,h,p), without
    the D skip, and the last state. float32 at least, even under autocast; cost linear in l.
    """
    b, l, h, p = x.shape
    n, q = B.shape[-1], min(chunk_size, l)
    pad, c = -l % q, -(-l // q)  # padded tokens have dt = 0: decay 1, no input
    with torch.autocast(x.device.type, enabled=False):
        x, dt, A, B, C = (t.float() if t.itemsize < 4 else t for t in (x, dt, A, B, C))
        if state is None:
            state = x.new_zeros(b, h, n, p).mT
        if first is None:
            first = torch.zeros(b, l, dtype=torch.bool, device=x.device)
        X = F.pad(x * dt[..., None], (0, 0, 0, 0, 0, pad)).view(b, c, q, h, p)
        X = X.transpose(2, 3).contiguous()  # once, or every product below copies it
        B, C = (F.pad(t, (0, 0, 0, pad)).view(b, c, 1, q, n) for t in (B, C))
        S = F.pad(dt * A, (0, 0, 0, pad)).view(b, c, q, h).transpose(2, 3).cumsum(-1)  # (b,c,h,q)
        segment = F.pad(first, (0, pad)).view(b, c, 1, q).cumsum(-1)  # resets since chunk's start

        # 1 inside a chunk: y_i = sum_{j<=i, same segment} (C_i . B_j) exp(S_i - S_j) dt_j x_j
        same = (segment[..., :, None] == segment[..., None, :]).tril()  # (b,c,1,q,q)
        decay = (S[..., :, None] - S[..., None, :]).masked_fill(~same, -torch.inf).exp()
        y = (C @ B.mT * decay) @ X  # (b,c,h,q,q) @ (b,c,h,q,p)
        # 2 what each chunk adds to the state by its end
        to_end = (S[..., -1:] - S).exp() * (segment == segment[..., -1:])  # (b,c,h,q)
        ends = ((B * to_end[..., None]).mT @ X).mT  # (b,c,h,p,n)
        # 3 the recurrence over chunks; unbind, as indexing costs a full-size zero gradient each
        through = S[..., -1].exp() * (segment[..., -1] == 0)  # (b,c,h)
        starts = []
        for keep, end in zip(through.unbind(1), ends.unbind(1)):
            starts.append(state)
            state = keep[..., None, None] * state + end
        # 4 from the state at each chunk's start to its outputs
        from_start = S.exp() * (segment == 0)
        y = y + (C * from_start[..., None]) @ torch.stack(starts, 1).mT
        return y.transpose(2, 3).reshape(b, c * q, h, p)[:, :l], state


def ssd_step(x, dt, A, B, C, state) -> tuple[Tensor, Tensor]:
    """One token of `ssd_scan`: x (b,h,p), dt (b,h), B and C (b,n) -> y (b,h,p) and a NEW state."""
    with torch.autocast(x.device.type, enabled=False):
        x, dt, A, B, C = (t.float() if t.itemsize < 4 else t for t in (x, dt, A, B, C))
        new = B[:, None, :, None] * (dt[..., None] * x)[:, :, None]  # (b,h,n,p): faster, p last
        kept = new.addcmul_((dt * A).exp()[..., None, None], state.mT)
        return (C[:, None, None] @ kept).squeeze(-2), kept.mT


class Mamba2(nn.Module):
    """The Mamba-2 layer [2]; parameter names and layouts are those of the official layer.

    in_proj's rows are z, x, B, C, dt; z gates before the norm: RMSNorm(y * silu(z)).
    """

    def __init__(self, d_model, d_state, d_conv, expand, headdim, chunk_size):
        super().__init__()
        self.d_inner, self.headdim, self.chunk_size = expand * d_model, headdim, chunk_size
        self.d_state, self.d_conv, self.heads = d_state, d_conv, expand * d_model // headdim
        channels = self.d_inner + 2 * d_state
        self.in_proj = nn.Linear(d_model, self.d_inner + channels + self.heads, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, d_conv, groups=channels)
        # dt = softplus(dt_bias) starts log-uniform in [0.001, 0.1], floor 1e-4 [3]
        dt = torch.empty(self.heads).uniform_(np.log(1e-3), np.log(1e-1)).exp().clamp(min=1e-4)
        self.dt_bias = nn.Parameter(dt + (-(-dt).expm1()).log())  # the inverse of softplus
        self.A_log = nn.Parameter(torch.empty(self.heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = nn.RMSNorm(self.d_inner, eps=1e-5)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)

    def initial_state(self, batch: int) -> tuple[Tensor, Tensor]:
        """(conv window (b, d_conv-1, channels), SSM state (b, h, p, n)), both zero."""
        new = self.D.new_zeros
        return (new(batch, self.d_conv - 1, self.d_inner + 2 * self.d_state),
                new(batch, self.heads, self.d_state, self.headdim).mT)

    def _split(self, u):
        return self.in_proj(u).split(
            (self.d_inner, self.d_inner + 2 * self.d_state, self.heads), -1)

    def _inputs(self, xBC, dt):
        x, B, C = F.silu(xBC).split((self.d_inner, self.d_state, self.d_state), -1)
        dt = F.softplus(dt + self.dt_bias)
        return x.unflatten(-1, (self.heads, -1)), dt, -self.A_log.exp(), B, C

    def _output(self, y, x, z):
        y = (y + self.D[:, None] * x).flatten(-2)
        return self.out_proj(self.norm(y * F.silu(z)))

    def forward(self, u: Tensor, state=None, first=None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """u (b, l, d_model) -> the same shape, and the state after the last token."""
        b, l, _ = u.shape
        window, memory = state or self.initial_state(b)
        z, xBC, dt = self._split(u)
        taps = torch.cat([window.to(xBC.dtype), xBC], 1)  # (b, d_conv-1+l, channels)
        if first is None:
            first = torch.zeros(b, l, dtype=torch.bool, device=u.device)
        # NOTE(2): a reset clears the convolution's window too: a tap counts in its own segment only
        segment = F.pad(first.cumsum(1), (self.d_conv - 1, 0))  # (b, d_conv-1+l)
        conv = self.conv1d.bias
        for k in range(self.d_conv):
            own = (segment[:, k:k + l] == segment[:, self.d_conv - 1:])[..., None]
            conv = torch.addcmul(conv, taps[:, k:k + l], own * self.conv1d.weight[:, 0, k])
        x, dt, A, B, C = self._inputs(conv, dt)
        y, memory = ssd_scan(x, dt, A, B, C, self.chunk_size, memory, first)
        window = taps[:, l:] * (segment[:, l:] == segment[:, -1:])[..., None]
        return self._output(y, x, z), (window, memory)

    def step(self, u: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """One token: u (b, d_model) -> the same shape, and a new state."""
        window, memory = state
        z, xBC, dt = self._split(u)
        taps = torch.cat([window.to(xBC.dtype), xBC[:, None]], 1)  # (b, d_conv, channels)
        conv = self.conv1d.bias + (taps * self.conv1d.weight[:, 0].T).sum(1)
        x, dt, A, B, C = self._inputs(conv, dt)
        y, memory = ssd_step(x, dt, A, B, C, memory)
        return self._output(y, x, z), (taps[:, 1:], memory)


class SequenceModel(nn.Module):
    """(z_t, a_t) … -> d_t: a linear stem, then Mamba-2 layers with pre-norm residuals."""

    def __init__(self, cfg: Config, num_actions: int):
        super().__init__()
        d, self.num_actions = cfg.d_model, num_actions
        self.stem = nn.Sequential(nn.Linear(cfg.d_z + num_actions, d), nn.RMSNorm(d), nn.SiLU())
        self.norms = nn.ModuleList(nn.RMSNorm(d) for _ in range(cfg.layers))
        self.layers = nn.ModuleList(
            Mamba2(d, cfg.d_state, cfg.d_conv, cfg.expand, cfg.headdim, cfg.chunk_size)
            for _ in range(cfg.layers))
        self.dropout, self.norm = nn.Dropout(cfg.dropout), nn.RMSNorm(d)

    def _stack(self, z, action, states, call):
        u, after = self.stem(torch.cat([z, F.one_hot(action, self.num_actions)], -1)), []
        for norm, layer, state in zip(self.norms, self.layers, states):
            y, state = call(layer, norm(u), state)
            u = u + self.dropout(y)
            after.append(state)
        return self.norm(u), after

    def forward(self, z: Tensor, action: Tensor, states=None, first=None) -> tuple[Tensor, list]:
        """z (b, l, K*C), action (b, l), first (b, l) bool -> d (b, l, d_model), a state a layer."""
        return self._stack(z, action, states or [None] * len(self.layers),
                           lambda layer, u, state: layer(u, state, first))

    def step(self, z: Tensor, action: Tensor, states: list) -> tuple[Tensor, list]:
        """One token: z (b, K*C), action (b,) -> d (b, d_model), new states."""
        return self._stack(z, action, states, Mamba2.step)

    def initial_states(self, batch: int) -> list:
        """Zero states, a layer each."""
        return [layer.initial_state(batch) for layer in self.layers]


def clear(states: list, where: Tensor) -> list:
    """The states with rows `where` (b,) set to zero: an episode opens there."""
    return [tuple(s * ~where.view(-1, *[1] * (s.ndim - 1)) for s in state) for state in states]


# ---- 7 World model ------------------------------------------------------------------------------


def mlp(d_in: int, units: int, hidden: int, d_out: int, zero: bool = False) -> nn.Sequential:
    """Hidden layers of Linear, RMSNorm, SiLU, then a Linear, which starts at zero if asked."""
    layers = []
    for i in range(hidden):
        layers += [nn.Linear(units if i else d_in, units), nn.RMSNorm(units), nn.SiLU()]
    layers.append(nn.Linear(units, d_out))
    if zero:
        nn.init.zeros_(layers[-1].weight)
        nn.init.zeros_(layers[-1].bias)
    return nn.Sequential(*layers)


class Dream(NamedTuple):
    """Imagined futures of H steps."""

    feature: Tensor  # (b, H+1, d_feature): [z_t, d_{t-1}]
    action: Tensor  # (b, H)
    reward: Tensor  # (b, H): follows the action, as in the replay
    end: Tensor  # (b, H): probability that the action ended the game or cost a life


class WorldModel(nn.Module):
    """VAE, sequence model and the heads for the next latent, the reward and the end."""

    def __init__(self, cfg: Config, num_actions: int):
        super().__init__()
        self.cfg = cfg
        self.encoder, self.decoder = Encoder(cfg), Decoder(cfg)
        self.posterior = nn.Linear(cfg.cnn[-1][0] * CNN_MAP**2, cfg.d_z)
        self.sequence = SequenceModel(cfg, num_actions)
        self.prior = nn.Linear(cfg.d_model, cfg.d_z)
        # NOTE(3): reward head and critic start at zero, as in [4]: no reward is dreamt up
        self.reward = mlp(cfg.d_model, cfg.head_units, 1, cfg.bins, zero=True)
        self.termination = mlp(cfg.d_model, cfg.head_units, 1, 1)
        self.two_hot = TwoHot(cfg.bins, cfg.bin_limit)
        self.weights = dict(reconstruction=1.0, reward=1.0, termination=1.0, dynamics=1.0,
                            representation=cfg.representation_scale)

    def _categoricals(self, flat: Tensor) -> Tensor:
        """(..., K*C) -> log-probabilities (..., K, C)."""
        shape = self.cfg.categoricals, self.cfg.classes
        return unimix(flat.unflatten(-1, shape), self.cfg.unimix)

    def encode(self, frame: Tensor) -> Tensor:
        """frame (..., H, W, 3) uint8 -> log q(z | o), (..., K, C)."""
        flat = self.posterior(self.encoder(pixels(frame)))
        return self._categoricals(flat).unflatten(0, frame.shape[:-3])

    def decode(self, z: Tensor) -> Tensor:
        """z (..., K*C) -> frames (..., 3, H, W) in 0..1."""
        return self.decoder(z.flatten(0, -2)).unflatten(0, z.shape[:-1])

    def log_prior(self, d: Tensor) -> Tensor:
        """d_t (..., d_model) -> log p(z_{t+1} | d_t), (..., K, C)."""
        return self._categoricals(self.prior(d))

    def one_hot(self, classes: Tensor) -> Tensor:
        """Latent classes (..., K) -> flat latents (..., K*C)."""
        return F.one_hot(classes.long(), self.cfg.classes).flatten(-2).float()

    def loss(self, batch: Batch) -> tuple[dict, Tensor, Tensor]:
        """Losses by name, each (b, l); latents (b, l, K, C); KL[posterior || prior] (b, l), 0 where
        no prior is had: at a window's and an episode's first frame."""
        b, l = batch.action.shape
        log_post = self.encode(batch.frame)
        z = straight_through(log_post)  # (b, l, K, C)
        d, _ = self.sequence(z.flatten(-2), batch.action, first=batch.first)
        # NOTE(10): a random part of the frames is decoded, and scaled up; the others' error is 0
        count = max(1, round(b * l * self.cfg.decoded))
        drawn = torch.rand(b * l, device=z.device).topk(count).indices
        frame_hat = self.decode(z.flatten(-2).flatten(0, 1)[drawn])
        error = (frame_hat - pixels(batch.frame.flatten(0, 1)[drawn])).square().sum((1, 2, 3))
        error = error.new_zeros(b * l).index_copy(0, drawn, error) * (b * l / count)
        # the prior of z_t comes from d_{t-1}; where o_t opens an episode it knows nothing of it
        log_prior, log_later = self.log_prior(d[:, :-1]), log_post[:, 1:]
        # the detached side stands still: first the prior learns, then, less, the posterior
        kl = kl_divergence(log_later.detach(), log_prior)
        dynamics, representation, kl = (F.pad(x * ~batch.first[:, 1:], (1, 0)) for x in (
            free_bits(kl, self.cfg.free_bits),
            free_bits(kl_divergence(log_later, log_prior.detach()), self.cfg.free_bits), kl))
        losses = dict(
            reconstruction=error.view(b, l),
            reward=self.two_hot.loss(self.reward(d), batch.reward),
            termination=F.binary_cross_entropy_with_logits(
                self.termination(d).squeeze(-1).float(), batch.terminated, reduction="none"),
            dynamics=dynamics, representation=representation)
        assert all(loss.shape == (b, l) for loss in losses.values())
        return losses, z.detach(), kl.detach()

    @torch.no_grad()
    def imagine(self, actor: nn.Module, z: Tensor, action: Tensor, first: Tensor) -> Dream:
        """Dream `horizon` steps on from context latents z (b, k, K*C), action and first (b, k).

        The last context frame is where the dream starts: its recorded action is not used.
        """
        d, states = self.sequence(z[:, :-1], action[:, :-1], first=first[:, :-1])
        z, d, states = z[:, -1], d[:, -1] * ~first[:, -1:], clear(states, first[:, -1])
        features, actions, ds = [torch.cat([z, d], -1)], [], []
        for _ in range(self.cfg.horizon):
            log_pi = actor(features[-1]).float().log_softmax(-1)
            actions.append((log_pi + gumbel(log_pi)).argmax(-1))
            d, states = self.sequence.step(z, actions[-1], states)
            z = draw_one_hot(self.log_prior(d)).flatten(-2)
            ds.append(d)
            features.append(torch.cat([z, d], -1))
        d = torch.stack(ds, 1)  # (b, H, d_model)
        end = self.termination(d).squeeze(-1).float().sigmoid()
        assert end.shape == (len(z), self.cfg.horizon)
        return Dream(torch.stack(features, 1), torch.stack(actions, 1),
                     self.two_hot.mean(self.reward(d)), end)

    @torch.no_grad()
    def dream_along(self, batch: Batch, context: int) -> tuple[Tensor, Tensor]:
        """Reconstruction and open-loop dream (b, l, 3, H, W) of records, for the same actions.

        The dream sees `context` frames; its later latents are drawn from the prior alone.
        """
        z = draw_one_hot(self.encode(batch.frame)).flatten(-2)
        d, states = self.sequence(z[:, :context], batch.action[:, :context], None,
                                  batch.first[:, :context])
        dreamt, d = [z[:, i] for i in range(context)], d[:, -1]
        for action in batch.action[:, context:].unbind(1):
            dreamt.append(draw_one_hot(self.log_prior(d)).flatten(-2))
            d, states = self.sequence.step(dreamt[-1], action, states)
        return self.decode(z), self.decode(torch.stack(dreamt, 1))


def pixels(frame: Tensor) -> Tensor:
    """(..., H, W, 3) uint8 -> (n, 3, H, W) float in 0..1, in the channels_last memory format."""
    return frame.flatten(0, -4).permute(0, 3, 1, 2).float() / 255


# ---- 8 Actor-critic -----------------------------------------------------------------------------


class ActorCritic(nn.Module):
    """Actor and two-hot critic on [z_t, d_{t-1}], a slow critic, a scale for the returns [4].

    NOTE(4): z_t encodes the frame just seen; the published code acts on a sample of the prior.
    """

    def __init__(self, cfg: Config, num_actions: int):
        super().__init__()
        self.cfg = cfg
        self.actor = mlp(cfg.d_feature, cfg.actor_units, cfg.hidden_layers, num_actions)
        self.critic = mlp(cfg.d_feature, cfg.critic_units, cfg.hidden_layers, cfg.bins, zero=True)
        self.slow_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.two_hot = TwoHot(cfg.bins, cfg.bin_limit)
        self.register_buffer("scale", torch.zeros(()))  # EMA of the returns' 5-95 percentile range
        self.weights = dict(policy=1.0, entropy=cfg.entropy, value=1.0, slow_value=1.0)

    def loss(self, dream: Dream) -> tuple[dict, dict]:
        """Losses by name, each (b, H), weighted by the chance of being alive; metrics."""
        b, h = dream.action.shape
        value_logits = self.critic(dream.feature)  # (b, H+1, bins)
        value = self.two_hot.mean(value_logits).detach()  # the actor must not move the critic
        slow_value = self.two_hot.mean(self.slow_critic(dream.feature[:, :-1]))
        R = lambda_return(dream.reward, dream.end, value, self.cfg.gamma, self.cfg.lam)
        low, high = torch.quantile(R, R.new_tensor([0.05, 0.95]))
        self.scale.lerp_(high - low, 1 - self.cfg.return_decay)
        advantage = (R - value[:, :-1]) / self.scale.clamp(min=1)
        # NOTE(5): a step counts by the product of (1 - e) before it: none is learnt after a death
        alive = F.pad((1 - dream.end).cumprod(1)[:, :-1], (1, 0), value=1.0)
        log_pi = self.actor(dream.feature[:, :-1]).float().log_softmax(-1)  # (b, H, actions)
        entropy = -(log_pi.exp() * log_pi).sum(-1)
        losses = dict(
            policy=-log_pi.gather(-1, dream.action[..., None]).squeeze(-1) * advantage * alive,
            entropy=-entropy * alive,
            value=self.two_hot.loss(value_logits[:, :-1], R) * alive,
            slow_value=self.two_hot.loss(value_logits[:, :-1], slow_value) * alive)
        assert all(loss.shape == (b, h) for loss in losses.values())
        return losses, dict(imagined_return=R.mean(), imagined_reward=dream.reward.mean(),
                            imagined_value=value.mean(), imagined_end=dream.end.mean(),
                            return_scale=self.scale, policy_entropy=entropy.mean())

    @torch.no_grad()
    def update_slow_critic(self) -> None:
        """slow = decay slow + (1 - decay) critic."""
        for slow, fast in zip(self.slow_critic.parameters(), self.critic.parameters()):
            slow.lerp_(fast, 1 - self.cfg.slow_decay)


class Learner:
    """An optimiser with linear warm-up and clipping; it refuses numbers that are not finite."""

    def __init__(self, optimiser, clip: float, warmup: int):
        self.optimiser, self.clip = optimiser, clip
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda k: min(1.0, (k + 1) / warmup))

    def step(self, losses: dict, weights: dict) -> dict:
        """One step down the weighted sum of the losses' means -> the means, the gradient's norm."""
        assert losses.keys() == weights.keys(), (losses.keys(), weights.keys())
        means = {name: loss.mean() for name, loss in losses.items()}
        parameters = [p for group in self.optimiser.param_groups for p in group["params"]]
        self.optimiser.zero_grad()
        with torch.autocast(parameters[0].device.type, enabled=False):  # each op as it went forward
            sum(weights[name] * mean for name, mean in means.items() if weights[name]).backward()
        if not all(weights.values()):
            # what only a loss left out would train must not move: Adam skips a gradient of None,
            # but compiled code gives zeros
            for p in parameters:
                p.grad = p.grad if p.grad is not None and p.grad.any() else None
        means["gradient_norm"] = nn.utils.clip_grad_norm_(parameters, self.clip)
        means = dict(zip(means, torch.stack([m.detach().float() for m in means.values()]).tolist()))
        broken = [name for name, mean in means.items() if not np.isfinite(mean)]
        if broken:
            raise FloatingPointError(broken[0])
        self.optimiser.step()
        self.schedule.step()
        return means


def make_learners(cfg: Config, model: WorldModel, agent: ActorCritic) -> tuple[Learner, Learner]:
    """AdamW for the world model, Adam for the rest. NOTE(6): the published default is LaProp."""
    # matrices and kernels decay; biases, norms, dt_bias, A_log and D do not
    groups = [dict(params=[p for p in model.parameters() if (p.ndim > 1) == matrix],
                   weight_decay=cfg.weight_decay * matrix) for matrix in (True, False)]
    acting = [*agent.actor.parameters(), *agent.critic.parameters()]
    model_adam = torch.optim.AdamW(groups, cfg.model_lr, fused=True)
    agent_adam = torch.optim.Adam(acting, cfg.actor_lr, eps=cfg.actor_eps, fused=True)
    return (Learner(model_adam, cfg.model_clip, cfg.lr_warmup),
            Learner(agent_adam, cfg.actor_clip, cfg.lr_warmup))


class Player:
    """Acts on the frame just seen: a_t ~ actor([z_t, d_{t-1}]).

    d_{t-1} is rebuilt from the last `act_context` latents and actions, about as long a past as the
    dreams know, or, where that is 0, carried on from step to step.
    """

    def __init__(self, cfg: Config, model: WorldModel, agent: ActorCritic, num_envs: int, device):
        self.cfg, self.model, self.agent = cfg, model, agent
        n, m = num_envs, cfg.act_context
        self.memory = dict(z=torch.zeros(n, m, cfg.categoricals, dtype=torch.uint8, device=device),
                           action=torch.zeros(n, m, dtype=torch.int64, device=device),
                           first=torch.zeros(n, m, dtype=torch.bool, device=device),
                           d=torch.zeros(n, cfg.d_model, device=device),
                           states=model.sequence.initial_states(n))

    @torch.inference_mode()
    def act(self, frame: Tensor, first: Tensor, at_random: bool = False) -> tuple[Tensor, Tensor]:
        """frame (n, H, W, 3) uint8, first (n,) bool -> action (n,), latent classes (n, K)."""
        m, num_actions = self.memory, self.model.sequence.num_actions
        z = draw_one_hot(self.model.encode(frame))
        if self.cfg.act_context:
            past = self.model.one_hot(m["z"])
            m["d"] = self.model.sequence(past, m["action"], first=m["first"])[0][:, -1].float()
        d = m["d"] * ~first[:, None]
        logits = self.agent.actor(torch.cat([z.flatten(-2), d], -1)).float()
        action = (logits * (not at_random) + gumbel(logits)).argmax(-1)
        assert logits.shape == (len(frame), num_actions)
        if self.cfg.act_context:
            for name, new in dict(z=z.argmax(-1).byte(), action=action, first=first).items():
                m[name] = torch.cat([m[name][:, 1:], new[:, None]], 1)
        else:
            states = clear(m["states"], first)
            m["d"], m["states"] = self.model.sequence.step(z.flatten(-2), action, states)
        return action, z.argmax(-1)


# ---- 9 Keeping and showing ----------------------------------------------------------------------


class Table:
    """A CSV file that a resume cuts back to the checkpoint's length: no torn line, no row twice."""

    def __init__(self, path: Path, length: int):
        self.file = open(path, "r+" if length else "w", newline="")
        if self.file.seek(0, os.SEEK_END) < length:
            raise Refusal(f"{path} is shorter than at the checkpoint; use another --out")
        self.file.truncate(length)
        self.file.seek(length)

    def row(self, values: dict) -> None:
        """Append a row, floats to six digits; the first row brings the header."""
        writer = csv.writer(self.file)
        if not self.file.tell():
            writer.writerow(values)
        writer.writerow(f"{v:.6g}" if isinstance(v, float) else v for v in values.values())
        self.file.flush()

    def length(self) -> int:
        """Bytes so far, all of them on the disk."""
        os.fsync(self.file.fileno())
        return self.file.tell()


class Run:
    """The run folder: lock, frames, two checkpoints, tables, pictures, and config.json to read."""

    def __init__(self, cfg: Config):
        self.dir = Path(cfg.out or f"runs/{cfg.game}-{cfg.seed}")
        self.frames = self.dir / "frames.bin"
        self.newest, self.older = self.dir / "checkpoint.pt", self.dir / "checkpoint.prev.pt"
        self.whole = self.newest  # a newest checkpoint that is broken must not replace the older

    def lock(self):
        """Make the folder and take its lock, which the system frees when the process dies."""
        self.dir.mkdir(parents=True, exist_ok=True)
        handle = open(self.dir / "lock", "a+")
        try:
            if os.name == "nt":
                import msvcrt
                msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.close()
            raise Refusal(f"{self.dir} is in use by another process; use another --out") from None
        return handle

    def allocate(self, cfg: Config, rows: int) -> None:
        """Make room for the frames of all steps; the checkpoint counts on `rows` of them."""
        frame, free = cfg.image_size**2 * 3, shutil.disk_usage(self.dir).free
        have = self.frames.stat().st_size if self.frames.exists() else 0
        if have < rows * frame:
            raise Refusal(f"{self.frames} is too short for the checkpoint's {rows:,} steps; use "
                          "another --out")
        all_frames = max(have, cfg.steps * frame)
        need = all_frames - have
        if need > free:
            raise Refusal(f"{self.dir}: {cfg.steps:,} steps need {need / 1e9:.2f} GB of disk and "
                          f"{free / 1e9:.2f} GB are free; make room, or lower --steps")
        with open(self.frames, "ab") as file:
            file.truncate(all_frames)
            if hasattr(os, "posix_fallocate"):  # a disk that fills up later would kill the process
                os.posix_fallocate(file.fileno(), 0, all_frames)

    def save(self, checkpoint: dict) -> None:
        """Write, flush to the disk, rename: at any moment one of the two checkpoints is whole."""
        buffer, fresh = io.BytesIO(), self.dir / "checkpoint.new"
        torch.save(checkpoint, buffer)
        with open(fresh, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        if self.newest.exists() and self.whole == self.newest:
            os.replace(self.newest, self.older)
        os.replace(fresh, self.newest)
        self.whole = self.newest

    def load(self, cfg: Config, names, device: torch.device) -> dict | None:
        """The newest checkpoint that can be read, None where there is none; Refusal where its
        settings `names` are not those of cfg."""
        found = [path for path in (self.newest, self.older) if path.exists()]
        for path in found:
            try:  # weights_only: a file from a stranger must not run code
                if zipfile.ZipFile(path).testzip():
                    raise ValueError("a checksum is wrong")
                saved = torch.load(path, map_location=device, weights_only=True)
                theirs, _ = dict(saved["config"]), saved["at"]["step"]
            except Exception as error:  # a broken file can raise nearly anything
                if out_of_memory(error):
                    raise  # the file may well be whole
                print(f"{path} is broken ({type(error).__name__})", file=sys.stderr)
                continue
            ours = dataclasses.asdict(cfg)
            names = {*names, *(theirs.keys() ^ ours.keys())} - ANYTIME
            differ = [f"{k} (was {theirs.get(k)}, now {ours.get(k)})" for k in {**ours, **theirs}
                      if k in names and theirs.get(k) != ours.get(k)]
            if differ:
                more = f" and {len(differ) - 4} more" if len(differ) > 4 else ""
                raise Refusal(f"{path} has other settings: {', '.join(differ[:4])}{more}; use "
                              "another --out or --seed, or the old values")
            self.whole = path
            return saved
        if found:
            raise Refusal(f"no checkpoint in {self.dir} can be read; use another --out")
        return None


def generators(device: torch.device) -> list:
    """The modules that keep a random generator; the environment has its own, nothing uses more."""
    return [torch] if device.type == "cpu" else [torch, getattr(torch, device.type)]


def human_normalised(game: str, score: float) -> float:
    """(score - random) / (human - random) [6]; NaN for a game without published scores."""
    s = SCORES.get(game)
    return (score - s["random"]) / (s["human"] - s["random"]) if s else float("nan")


def draw_curves(run: Run, game: str) -> None:
    """curves.png, from the two tables."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    tables = []
    for name in ("episodes.csv", "metrics.csv"):
        with open(run.dir / name) as file:
            rows = list(csv.DictReader(file))
        tables.append({k: [float(row[k]) for row in rows] for k in rows[0]} if rows else None)
    panels = ("return", "reconstruction", "kl dynamics", "reward termination", "policy_entropy",
              "imagined_return imagined_value", "imagined_reward batch_reward", "value slow_value")
    figure, axes = pyplot.subplots(2, 4, figsize=(16, 7), layout="tight")
    for axis, names in zip(axes.flat, panels):
        table = tables[names != "return"]
        for name in names.split() if table else ():
            axis.plot(table["step"], table[name], ".-" if name == "return" else "-", label=name)
        if names == "return":
            best = {"best possible": GridWorld.best_return()} if game == "GridWorld" else {}
            levels = SCORES.get(game, best)
            for i, (name, level) in enumerate(levels.items()):
                axis.axhline(level, ls="--", lw=1, color=f"C{i + 1}", label=name)
        axis.set(title=f"{game}: {names.replace(' ', ', ')}", xlabel="environment steps")
        if axis.lines:
            axis.legend(fontsize="small")
    figure.savefig(run.dir / "curves.tmp.png", dpi=80)
    pyplot.close(figure)
    os.replace(run.dir / "curves.tmp.png", run.dir / "curves.png")


def draw_dreams(run: Run, cfg: Config, model: WorldModel, replay: Replay) -> None:
    """dream.gif and dream.png: real frames, reconstruction, open-loop dream, the same actions."""
    from PIL import Image, ImageDraw, ImageOps
    length, windows, shown, margin = cfg.context + cfg.picture_steps, 2, 12, 14
    if replay.size < length:
        return
    # where it can be had, a window in which no episode opens
    opened = F.pad(replay.first[:replay.size].cumsum(0), (1, 0))
    inside = opened[length:] - opened[1:replay.size - length + 2]
    calm = (inside == inside.min()).nonzero()  # (n, 1)
    with torch.random.fork_rng([] if replay.device.type == "cpu" else [replay.device],
                               device_type=replay.device.type):
        rows = calm[torch.randint(len(calm), (windows,))]
        rows = rows + torch.arange(length, device=replay.device)
        batch = replay.batch(rows)
        model.eval()
        pictures = [batch.frame, *((255 * x.permute(0, 1, 3, 4, 2)).byte()
                                   for x in model.dream_along(batch, cfg.context))]
    film = torch.stack(pictures).cpu().numpy()  # (3, windows, l, H, W, 3)

    def sheet(grid, title):
        """A picture of frames (rows, columns, H, W, 3) under a title."""
        r, c, h, w, _ = grid.shape
        image = Image.fromarray(grid.swapaxes(1, 2).reshape(r * h, c * w, 3))
        image = image.resize((c * 128, r * 128), Image.Resampling.NEAREST)
        image = ImageOps.expand(image, (0, margin, 0, 0))
        ImageDraw.Draw(image).text((2, 1), f"{cfg.game}, step {replay.size}: {title}", fill="white")
        return image

    gif = [sheet(film[:, :, t].swapaxes(0, 1), "real | reconstruction | dream"
                 + (f", +{t - cfg.context + 1}" if t >= cfg.context else ", context"))
           for t in range(length)]
    gif[0].save(run.dir / "dream.gif", save_all=True, append_images=gif[1:], duration=120, loop=0)
    times = np.linspace(0, length - 1, shown).astype(int)
    sheet(film[:, 0, times], "rows real, reconstruction, dream; frames " + " ".join(map(str, times))
          + f"; the first {cfg.context} are context").save(run.dir / "dream.png")


# ---- 10 train, evaluate, main -------------------------------------------------------------------


def choose_device(cfg: Config) -> torch.device:
    """The device asked for, or the best there is; Refusal where it is not to be had."""
    if cfg.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else
                            "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        probe = torch.zeros(1, device=cfg.device)
        probe.item()
        if probe.device.type == "cuda":
            torch.cuda.set_device(probe.device)  # the one whose random generator is saved
        return probe.device
    except Exception as error:  # each kind of device that is not there raises something else
        why = str(error).splitlines()[0][:80]
        raise Refusal(f"--device {cfg.device}: not on this machine ({why}); try cpu, cuda, cuda:1 "
                      "or mps") from None


def choose_precision(cfg: Config, device: torch.device) -> str:
    """bfloat16 where the device has it: on CUDA by its word, on a CPU by a race of two matmuls."""
    if cfg.precision != "auto":
        return cfg.precision
    if device.type != "cpu":
        has = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if has else "float32"
    x = torch.ones(512, 512)
    full, half = (min(timeit.repeat("x @ x", repeat=9, number=1, globals=dict(x=t)))
                  for t in (x, x.bfloat16()))
    return "bfloat16" if 1.5 * half < full else "float32"


def compile_parts(cfg: Config, model: WorldModel, agent: ActorCritic, device: torch.device) -> str:
    """On CUDA compile the losses, and dreams into one CUDA graph; say which path the scan takes."""
    if cfg.compile == "off" or device.type != "cuda":  # on CPUs torch 2.13's code was seen to crash
        return "eager"
    try:  # one kernel forward and backward tells whether there is a compiler that works
        x = torch.ones(8, device=device, requires_grad=True)
        torch.compile(lambda x: x.exp().sum())(x).backward()
    except Exception as error:  # no compiler, no Triton, no Python headers: eager is the same code
        return f"eager (compiling failed: {type(error).__name__})"
    torch._dynamo.config.suppress_errors = True  # what cannot be compiled later runs eager
    model.loss, agent.loss = torch.compile(model.loss), torch.compile(agent.loss)
    model.imagine = torch.compile(model.imagine, mode="reduce-overhead")
    return "compiled"


def keep_freed_pages() -> None:
    """Ask glibc to keep freed memory: clearing fresh pages for big tensors took half the time."""
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
    except (AttributeError, OSError, TypeError):
        pass  # not glibc


class Interrupt:
    """Ctrl-C and SIGTERM: the first lets the step in hand end, the second leaves at once."""

    def __init__(self):
        self.number = 0
        self.old = {n: signal.signal(n, self._receive) for n in (signal.SIGINT, signal.SIGTERM)}

    def _receive(self, number, _):
        if self.number:
            os._exit(128 + number)
        self.number = number

    def restore(self) -> None:
        """Give the signals back."""
        for number, handler in self.old.items():
            signal.signal(number, handler)


METRICS = (
    "reconstruction reward termination dynamics representation gradient_norm kl batch_reward "
    "policy entropy value slow_value actor_gradient_norm imagined_return imagined_reward "
    "imagined_value imagined_end return_scale policy_entropy").split()


def growth(cfg: Config, updates: int) -> float:
    """Weight, 0..1, of every loss but reconstruction, after so many updates.

    NOTE(9): in full at once, they can turn a fresh posterior constant before it has learnt to see.
    """
    grown = (updates - cfg.see_first) / (2 * cfg.see_first) if cfg.see_first else 1
    return min(1.0, max(0.0, grown))


def update_world_model(model, learner, replay) -> dict:
    """One update on sequences drawn by DFS -> metrics; the replay keeps their fresh latents."""
    batch = replay.batch(replay.draw_sequences())
    model.train()
    losses, z, kl = model.loss(batch)
    grown = growth(model.cfg, learner.schedule.last_epoch)
    weights = {name: weight if name == "reconstruction" else grown * weight
               for name, weight in model.weights.items()}
    metrics = learner.step(losses, weights)
    replay.latent[batch.rows] = z.argmax(-1).byte()
    return {**metrics, "kl": kl.mean().item(), "batch_reward": batch.reward.mean().item()}


def update_actor_critic(cfg, model, agent, learner, replay) -> dict:
    """Dream on from contexts drawn by DFS, then one update on the dreams -> metrics."""
    rows = replay.draw_contexts()
    model.eval()
    if cfg.stored_latents:  # NOTE(7): as last encoded, not the context's frames encoded anew
        z = model.one_hot(replay.latent[rows])
    else:
        # all of them at once, 8,192 in `paper`, leave a CPU's cache, and are slower
        size = 32 if rows.device.type == "cpu" else len(rows)
        with torch.no_grad():
            z = torch.cat([draw_one_hot(model.encode(replay.batch(part).frame)).flatten(-2)
                           for part in rows.split(size)])
    dream = model.imagine(agent.actor, z, replay.action[rows], replay.first[rows])
    losses, metrics = agent.loss(dream)
    means = learner.step(losses, agent.weights)
    agent.update_slow_critic()
    means["actor_gradient_norm"] = means.pop("gradient_norm")
    return {**means, **{name: x.item() for name, x in metrics.items()}}


def train(cfg: Config, run: Run) -> int:
    """Train up to cfg.steps, on from the checkpoint if there is one -> exit code."""
    device = choose_device(cfg)
    saved = run.load(cfg, dataclasses.asdict(cfg), device)
    at = saved["at"] if saved else dict(
        step=0, updates=0, seconds=0.0, episode=0, first=True, total=0.0, length=0, last=0.0,
        machine=None, tables=(0, 0), news={})
    if at["step"] >= cfg.steps:
        print(f"{run.dir} is finished at step {at['step']:,}; to go on, give a larger --steps")
        return 0
    (run.dir / "config.json").write_text(json.dumps(dataclasses.asdict(cfg), indent=1))
    torch.manual_seed(cfg.seed)
    env = make_env(cfg.game, 1, cfg.image_size)
    frame = env.reset(seed=cfg.seed + at["step"])[0]
    num_actions = int(env.single_action_space.n)
    model = WorldModel(cfg, num_actions).to(device, memory_format=torch.channels_last)
    agent = ActorCritic(cfg, num_actions).to(device)
    model_learner, agent_learner = make_learners(cfg, model, agent)
    run.allocate(cfg, at["step"])
    replay = Replay(run.frames, cfg, device)
    player = Player(cfg, model, agent, 1, device)
    parts = dict(model=model, agent=agent, replay=replay,
                 model_optimiser=model_learner.optimiser, model_schedule=model_learner.schedule,
                 agent_optimiser=agent_learner.optimiser, agent_schedule=agent_learner.schedule)
    if hasattr(env, "state_dict"):
        parts["env"] = env
    if saved:
        try:
            for name, part in parts.items():
                part.load_state_dict(saved[name])
            player.memory = saved["player"]
            for generator, state in zip(generators(device), saved["generators"]):
                generator.set_rng_state(state.cpu())
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            if out_of_memory(error):
                raise
            raise Refusal(f"{run.whole} does not fit ({str(error).splitlines()[0][:80]}); put the "
                          "right one back or use another --out") from None
        if "env" in parts:
            frame = saved["frame"].cpu().numpy()
        else:  # Atari cannot be put back into the middle of an episode: a new one opens
            at.update(first=True, total=0.0, length=0)
    if at["machine"] != device.type:  # a resume elsewhere chooses anew
        at.update(machine=device.type, precision=choose_precision(cfg, device))
    scan = compile_parts(cfg, model, agent, device)
    metrics = Table(run.dir / "metrics.csv", at["tables"][0])
    episodes = Table(run.dir / "episodes.csv", at["tables"][1])
    introduce(cfg, run, model, agent, f"{device}, {at['precision']}, scan {scan}", at["step"])
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=at["precision"] == "bfloat16")
    begun = time.perf_counter() - at["seconds"]
    stored = drawn = time.perf_counter()
    interrupt = Interrupt()

    def save():
        """Write the checkpoint: all that the next step depends on, but for Atari's emulator."""
        at.update(seconds=time.perf_counter() - begun, tables=(metrics.length(), episodes.length()))
        run.save({"config": dataclasses.asdict(cfg), "at": at, "frame": torch.from_numpy(frame),
                  "generators": [generator.get_rng_state() for generator in generators(device)],
                  "player": player.memory,
                  **{name: part.state_dict() for name, part in parts.items()}})

    bar = tqdm(total=cfg.steps, initial=at["step"], unit="step", smoothing=0.05, dynamic_ncols=True,
               mininterval=0.5 if sys.stderr.isatty() else 30)
    try:
        while at["step"] < cfg.steps and not interrupt.number:
            # ACT
            model.eval()
            with autocast:
                action, latent = player.act(torch.from_numpy(frame[:, 0]).to(device),
                                            torch.tensor([at["first"]], device=device),
                                            at_random=at["step"] < cfg.warmup)
            action = action.cpu().numpy()
            following, reward, terminated, truncated, info = env.step(action)

            # STORE
            replay.add(frame[0, 0], action[0], reward[0], terminated[0], at["first"], latent[0])
            at["step"] += 1
            at["length"] += 1
            at["total"] += float(reward[0])
            at["first"] = bool(episode_over(terminated, truncated, info)[0])
            seconds = time.perf_counter() - begun
            if at["first"]:
                following = env.step(action)[0]  # the autoreset step: not a transition
                at["episode"] += 1
                episodes.row({"step": at["step"], "seconds": seconds, "episode": at["episode"],
                              "return": at["total"], "length": at["length"],
                              "human_normalised": human_normalised(cfg.game, at["total"])})
                at.update(last=at["total"], total=0.0, length=0)
            frame = following

            if at["step"] >= cfg.warmup and at["step"] % cfg.train_every == 0:
                if cfg.mean_frame and not at["updates"]:
                    model.decoder.start_at(replay.mean_frame())
                # TRAIN WORLD MODEL
                with autocast:  # leaving it drops the weights' casts, which the update outdates
                    news = update_world_model(model, model_learner, replay)
                # IMAGINE, TRAIN ACTOR-CRITIC
                if growth(cfg, at["updates"]) == 1:
                    with autocast:
                        news |= update_actor_critic(cfg, model, agent, agent_learner, replay)
                at["updates"] += 1
                for name, value in news.items():
                    at["news"].setdefault(name, []).append(value)

            # LOG
            if at["step"] % cfg.log_every == 0 and at["news"]:
                means = {name: float(np.mean(at["news"].get(name, np.nan))) for name in METRICS}
                metrics.row(dict(step=at["step"], seconds=seconds, updates=at["updates"], **means))
                at["news"] = {}
                bar.set_postfix_str(
                    f"return {at['last']:g}, reconstruction {means['reconstruction']:.1f}, "
                    f"kl {means['kl']:.2f}, dreamt {means['imagined_return']:.2f}", refresh=False)
            bar.update()
            # SAVE
            if time.perf_counter() - stored > cfg.save_every:
                save()
                stored = time.perf_counter()
            if time.perf_counter() - drawn > cfg.draw_every:
                draw_curves(run, cfg.game)
                draw_dreams(run, cfg, model, replay)
                drawn = time.perf_counter()
        save()
        draw_curves(run, cfg.game)
        draw_dreams(run, cfg, model, replay)
    except FloatingPointError as error:
        back = f"go back to {run.newest}" if run.newest.exists() else "start again"
        raise Refusal(f"{error} is not finite at step {at['step']:,}; that update was not applied; "
                      f"{back}, or use another --out and lower learning rates", code=1) from None
    finally:
        bar.close()
        interrupt.restore()
    if interrupt.number and at["step"] < cfg.steps:
        print(f"stopped at step {at['step']:,}; the same command goes on", file=sys.stderr)
        return 128 + interrupt.number
    print(f"finished {cfg.steps:,} steps in {at['seconds'] / 60:.1f} minutes: {run.dir}")
    return 0


def introduce(cfg, run, model, agent, machine, step) -> None:
    """Say what is about to happen."""
    parts = {"world model": model, **dict(model.named_children()), **dict(agent.named_children())}
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    parameters = ", ".join(f"{name} {size:,}" for name, size in sizes.items() if size)
    print(f"Drama on {cfg.game}: preset {cfg.preset}, seed {cfg.seed}, {machine}, "
          f"{torch.get_num_threads()} threads\nparameters: {parameters}\n"
          f"run folder {run.dir}: " + (f"going on from step {step:,}" if step else "new")
          + f" to {cfg.steps:,}; learning starts at step {cfg.warmup:,}", flush=True)
    if cfg.game == "GridWorld":
        print(f"best possible return: {GridWorld.best_return():.2f}")


@torch.no_grad()
def evaluate(cfg: Config, given: set[str], run: Run) -> int:
    """Play cfg.eval full episodes from the checkpoint and print the scores -> exit code."""
    device = choose_device(cfg)
    anytime = given & (ANYTIME | {"act_context"})
    saved = run.load(cfg, given - anytime, device)
    if saved is None:
        raise Refusal(f"no checkpoint in {run.dir}; train first, without --eval")
    cfg = Config(**saved["config"] | {name: getattr(cfg, name) for name in anytime})
    torch.manual_seed(cfg.seed)
    n = min(cfg.eval, cfg.eval_envs)
    env = make_env(cfg.game, n, cfg.image_size)
    num_actions = int(env.single_action_space.n)
    model, agent = WorldModel(cfg, num_actions).to(device), ActorCritic(cfg, num_actions).to(device)
    model.load_state_dict(saved["model"])
    agent.load_state_dict(saved["agent"])
    player = Player(cfg, model.eval(), agent, n, device)
    # every environment plays its share: the first N to end would favour short episodes
    share = [len(range(i, cfg.eval, n)) for i in range(n)]
    scores, totals = [[] for _ in range(n)], np.zeros(n)
    frame, first, over = env.reset(seed=cfg.seed)[0], np.ones(n, bool), np.zeros(n, bool)
    with tqdm(total=cfg.eval, unit="episode") as bar:
        while any(len(s) < k for s, k in zip(scores, share)):
            action, _ = player.act(torch.from_numpy(frame[:, 0]).to(device),
                                   torch.from_numpy(first).to(device))
            frame, reward, terminated, truncated, info = env.step(action.cpu().numpy())
            first, over = over, episode_over(terminated, truncated, info)
            totals += reward
            for i in np.flatnonzero(over):
                if len(scores[i]) < share[i]:
                    scores[i].append(totals[i])
                    bar.update()
                totals[i] = 0
    scores = np.concatenate(scores)
    mean = scores.mean()
    print(f"{cfg.game} at step {saved['at']['step']:,}, {cfg.eval} episodes: mean {mean:.2f}, "
          f"standard deviation {scores.std():.2f}\nscores: {' '.join(f'{s:g}' for s in scores)}")
    if cfg.game in SCORES:
        published = (f"{name} {score:g} ({human_normalised(cfg.game, score):.3f})"
                     for name, score in SCORES[cfg.game].items())
        print(f"human-normalised {human_normalised(cfg.game, mean):.3f}; published (the same): "
              + ", ".join(published))
    if cfg.game == "GridWorld":
        print(f"{mean / GridWorld.best_return():.1%} of the best, {GridWorld.best_return():.2f}")
    return 0


class Parser(argparse.ArgumentParser):
    """argparse, with one line for an error."""

    def error(self, message):
        """Refuse a command line."""
        raise Refusal(f"{message}; see --help")


def boolean(text: str) -> bool:
    """true or false."""
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


def parse(argv: list[str] | None) -> tuple[Config, set[str]]:
    """Command line -> Config (defaults, preset, flags, each over the last), the flags given."""
    parser = Parser("drama.py", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in dataclasses.fields(Config):
        laptop = f"; laptop {PRESETS['laptop'][f.name]}" if f.name in PRESETS["laptop"] else ""
        parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, metavar=f.type.__name__,
                            type=boolean if f.type is bool else f.type,
                            help=f"{f.metadata['help']} ({f.default}{laptop})")
    given = vars(parser.parse_args(argv))
    preset = given.get("preset", "auto")
    if preset == "auto":
        preset = ("gridworld" if given.get("game") == "GridWorld" else
                  "paper" if torch.cuda.is_available() and given.get("device") != "cpu" else
                  "laptop")
    return Config(**{**PRESETS.get(preset, {}), **given, "preset": preset}), set(given)


def main(argv: list[str] | None = None) -> int:
    """Run a command line; return the exit code."""
    keep_freed_pages()
    # RMSNorm under autocast: bfloat16 in, float32 weights, as meant
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
    code = 2
    try:
        cfg, given = parse(argv)
        validate(cfg)
        run = Run(cfg)
        if cfg.eval:
            return evaluate(cfg, given, run)
        with run.lock():
            return train(cfg, run)
    except Refusal as error:
        message, code = str(error), error.code
    except KeyboardInterrupt:
        message, code = "stopped", 130
    except OSError as error:
        where, why = error.filename or run.dir, error.strerror or error
        message = f"{where}: {why}; the checkpoints are as before"
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        message = f"out of memory ({str(error)[:80]}); lower the sizes, see --help"
    print(f"drama.py: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
