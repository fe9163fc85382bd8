"""The pictures of a run folder. drama.py draws them while a run trains; they never end it."""

import csv
from pathlib import Path

import matplotlib.style
import numpy as np
import torch
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure  # no pyplot: it would ask for a screen
from PIL import Image, ImageDraw, ImageFont
from torch.distributions import OneHotCategorical

from experiments.gridworld import GridWorld


def levels(game: str) -> dict[str, float]:
    """Mean scores to compare with, as published: {who: score}, none for a game without any."""
    if game == "GridWorld":
        return {"best possible": GridWorld.BEST}
    with open(Path(__file__).parent.parent / "results" / "atari100k.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["game"] == game]
    return {who: float(row[who]) for row in rows for who in ("random", "human", "Drama")}


def writable(path) -> None:
    """OSError where no picture can be written to the path: ask before the work, not after it."""
    if Path(path).suffix[1:].lower() not in FigureCanvasBase.filetypes:
        raise OSError(f"{path}: name a file that ends in .png, .pdf or .svg")
    there = Path(path).exists()
    open(path, "ab").close()
    if not there:
        Path(path).unlink()


def draw(folder: Path, cfg, model, replay) -> None:
    """Both pictures of a run, each whether or not the other can be drawn."""
    try:
        draw_curves(folder, cfg.game)
    finally:
        draw_dreams(folder, cfg, model, replay)


def draw_curves(folder: Path, game: str):
    """curves.png, from the two tables, with a line at each of the game's levels -> the figure."""
    episodes, metrics = (list(csv.DictReader((folder / name).read_text().splitlines()))
                         for name in ("episodes.csv", "metrics.csv"))
    panels = ("return", "reconstruction", "kl dynamics", "reward termination", "policy_entropy",
              "imagined_return imagined_value", "imagined_reward batch_reward", "value slow_value")
    with matplotlib.style.context("default"):  # the same picture whatever the user's settings
        figure = Figure(figsize=(16, 7), layout="tight")
        for axis, names in zip(figure.subplots(2, 4).flat, panels):
            rows = episodes if names == "return" else metrics
            for name in names.split():
                values = [float(row[name]) for row in rows]
                axis.plot([float(row["step"]) for row in rows], values, ".-", ms=2, label=name)
            for i, (name, level) in enumerate(levels(game).items()):
                if names == "return":
                    axis.axhline(level, ls="--", lw=1, color=f"C{i + 1}", label=name)
            axis.set(title=f"{game}: {names.replace(' ', ', ')}", xlabel="environment steps")
            axis.legend(fontsize="small")
        figure.savefig(folder / "curves.png", dpi=80)
    return figure


def sampled(logp: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (..., K, C) -> one-hot draws."""
    return OneHotCategorical(logits=logp).sample()


@torch.no_grad()
def draw_dreams(folder: Path, cfg, model, replay) -> None:
    """dream.gif and 12 of its frames, dream.png: real frames, reconstruction, open-loop dream.

    Open-loop: after the context its latents are drawn from the prior alone, for the same actions.
    """
    context, length, device = cfg.context, cfg.context + cfg.picture_steps, replay.device
    if replay.size < length:
        return
    model.eval()
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        starts = torch.randint(replay.size - length + 1, (100, 1), device=device)
        rows = starts + torch.arange(length, device=device)
        calm = replay.first[rows[:, 1:]].sum(1).argmin()  # if possible, where no episode opens
        batch = replay.batch(rows[calm, None])
        z = sampled(model.encode(batch.frame)).flatten(-2)
        d, states = model.sequence(z[:, :context], batch.action[:, :context], None,
                                   batch.first[:, :context])
        dreamt, d = [*z[:, :context].unbind(1)], d[:, -1]
        for action in batch.action[:, context:].unbind(1):
            dreamt.append(model.guess(d))
            d, states = model.sequence(dreamt[-1], action, states)
    drawn = [model.decode(latents)[0].movedim(1, -1) for latents in (z, torch.stack(dreamt, 1))]
    film = torch.stack([batch.frame[0], *((255 * x).byte() for x in drawn)], 1)  # (l, 3, H, W, 3)
    when = ["seen"] * context + [f"dreamt +{k + 1}" for k in range(cfg.picture_steps)]
    shots = [sheet(pictures, ("real", "reconstruction", "dream"),
                   f"{cfg.game}, step {replay.size:,}: {t}")
             for pictures, t in zip(film.cpu().numpy(), when)]
    shots[0].save(folder / "dream.gif", save_all=True, append_images=shots[1:], duration=120,
                  loop=0)
    few = [np.asarray(shots[t]) for t in np.linspace(0, length - 1, 12).astype(int)]
    rows = [np.hstack(few[i:i + 4]) for i in (0, 4, 8)]
    Image.fromarray(np.vstack(rows)).save(folder / "dream.png")


def sheet(pictures: np.ndarray, names, title: str):
    """Pictures (n, H, W, 3) side by side, each under its name, and a title -> a PIL image."""
    (n, h, w, _), side, top, font = pictures.shape, 128, 44, ImageFont.load_default(16)
    row = Image.fromarray(pictures.swapaxes(0, 1).reshape(h, n * w, 3))
    image = Image.new("RGB", (n * side, top + side))
    image.paste(row.resize((n * side, side), Image.Resampling.NEAREST), (0, top))
    draw = ImageDraw.Draw(image)
    draw.text((4, 2), title, "white", font)
    for i, name in enumerate(names):
        draw.text((i * side + 4, 22), name, "white", font)
    return image
