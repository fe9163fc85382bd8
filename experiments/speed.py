"""Time the stages of one environment step of a preset, on random frames, and the peak memory.

    python experiments/speed.py --preset paper [--rows 100000] [any flag of drama.py]

Prints the median of five of: acting, drawing a batch and the dreams' contexts from a replay of
--rows frames (3,000), a world model update (all losses on: --see_first is past), dreams with an
actor-critic update, the pictures; GFLOP of each as torch counts them, and the share of this
machine's own float32 matmul rate that the stage reaches. Run it on a quiet machine.
"""

import argparse
import copy
import dataclasses
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import drama  # noqa: E402
from experiments import pictures  # noqa: E402

ACTIONS, REPEATS = 6, 5


def median_seconds(call, device) -> float:
    """Median of REPEATS calls, after one that is not counted."""
    seconds = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def filled_replay(cfg, rows: int, device) -> drama.Replay:
    """A replay of random frames."""
    replay, rng = drama.Replay(cfg, device), np.random.default_rng(0)
    for i in range(rows):
        frame = rng.integers(0, 255, replay.frame.shape[1:], dtype=np.uint8)
        replay.add(frame, i % ACTIONS, 0, 0, i % 500 == 0, torch.zeros(cfg.categoricals))
    return replay


def make_stages(cfg, run, learning, agent, player, rows: int, device, autocast) -> dict:
    """A call for each stage, as `train` makes it."""
    learners = drama.make_learners(cfg, learning, agent)
    replay = filled_replay(cfg, rows, device)
    model, seen = player.model, replay.frame[:1]
    first = torch.zeros(1, dtype=torch.bool, device=device)
    news = {}
    with autocast:
        news |= drama.update_world_model(learning, learners[0], replay)
        news |= drama.update_actor_critic(cfg, model, agent, learners[1], replay)
    run.dir.mkdir(exist_ok=True)
    (run.dir / "episodes.csv").write_text("step,return\n0,0\n")
    rows = [[step, *news.values()] for step in range(0, 100_000, cfg.log_every)]  # Atari 100k's
    (run.dir / "metrics.csv").write_text(
        "\n".join(",".join(map(str, row)) for row in [["step", *news], *rows]))

    def act():
        """One action."""
        player.act(seen, first)

    def draw():
        """Both pictures."""
        pictures.draw(run.dir, cfg, model, replay)

    return {
        "act": act,
        "draw a batch": lambda: replay.batch(replay.draw_sequences()),
        "draw contexts": lambda: replay.batch(replay.draw_contexts()),
        "world model": lambda: (drama.update_world_model(learning, learners[0], replay),
                                drama.follow(model, learning, 1 - cfg.average)),
        "dreams, actor-critic": lambda: drama.update_actor_critic(cfg, model, agent, learners[1],
                                                                  replay),
        "pictures": draw}


def main() -> None:
    """Build the parts as `train` does and time them."""
    own = argparse.ArgumentParser(add_help=False)
    own.error = drama.refuse
    own.add_argument("--rows", type=int, default=3000)
    own, rest = own.parse_known_args()
    drama.keep_freed_pages()
    cfg, _ = drama.parse(rest)
    if own.rows < (least := max(cfg.batch_size + cfg.batch_length, cfg.context)):
        drama.refuse(f"--rows {own.rows}: must be {least} or more")
    scratch = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)  # gone when the program ends
    cfg = dataclasses.replace(cfg, steps=own.rows + 1, out=scratch.name, see_first=0)
    device, precision = drama.choose_device(cfg)
    learning = drama.WorldModel(cfg, ACTIONS).to(device, memory_format=drama.layout(device))
    model = copy.deepcopy(learning).eval()
    agent = drama.ActorCritic(cfg, ACTIONS).to(device)
    player = drama.Player(cfg, model, agent, 1, device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")
    stages = make_stages(cfg, drama.Run(cfg), learning, agent, player, own.rows, device, autocast)
    work = {}
    for name, call in stages.items():
        with FlopCounterMode(display=False) as counter, autocast:
            call()
        work[name] = counter.get_total_flops() / 1e9
    if compiled := cfg.compile == "auto" and device.type == "cuda" and drama.has_triton():
        drama.compile_parts(learning, agent, player)
    plain = "act", "pictures"  # float32 at any --precision, as in `train`
    seconds = {name: median_seconds(call if name in plain else autocast(call), device)
               for name, call in stages.items()}
    x = torch.randn(2048, 2048, device=device)
    rate = 2 * 2048**3 / 1e9 / median_seconds(lambda: x @ x, device)
    print(f"preset {cfg.preset}, {device}, {torch.get_num_threads()} threads, {precision}"
          f"{', compiled' * compiled}; float32 matmul {rate:.0f} GFLOP/s")
    print(f"{'stage':<22}{'seconds':>9}{'GFLOP':>9}{'of matmul rate':>16}")
    for name in stages:
        share = work[name] / seconds[name] / rate
        print(f"{name:<22}{seconds[name]:>9.4f}{work[name]:>9.1f}{share:>15.0%}")
    update = seconds["world model"] + seconds["dreams, actor-critic"]
    step = seconds["act"] + update / cfg.train_every
    print(f"environment step and its share of an update: {step:.3f} s, {1 / step:.1f} a second; "
          f"pictures, each {cfg.draw_every:g} s: {seconds['pictures'] / cfg.draw_every:.1%} more")
    try:
        import resource
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"peak memory {peak:.1f} GiB (as Linux counts it)")
    except ImportError:
        print("peak memory: not measured on Windows")


if __name__ == "__main__":
    try:
        main()
    except drama.Refusal as error:
        drama.say(f"speed.py: {error}", sys.stderr)
        sys.exit(2)
