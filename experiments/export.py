"""A run's weights alone, in half precision, their settings beside them: small enough for git.

    python experiments/export.py runs/GridWorld-0 results/GridWorld.pt

What comes out plays and dreams, with play.py or `drama.py --eval 20 --checkpoint FILE`; it cannot
be trained on. Left out: optimisers, replay, and the slow critic, which stands as the critic.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import drama  # noqa: E402


def halve(weights: dict) -> dict:
    """Matrices and kernels in half precision; what has one axis or none is small, and stays."""
    return {name: x.half() if x.ndim > 1 else x.clone() for name, x in weights.items()}


def export(saved: dict) -> dict:
    """A training checkpoint -> what playing needs, under the same names."""
    agent = halve(saved["agent"])  # one tensor under two names is written once
    agent |= {name: agent[name.removeprefix("slow_")] for name in agent if "slow_" in name}
    return dict(config=saved["config"],
                at=dict(step=saved["at"]["step"]), model=halve(saved["model"]), agent=agent)


def main(argv: list[str] | None = None) -> int:
    """Run a command line; return the exit code."""
    parser = argparse.ArgumentParser("export.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = drama.refuse
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("file", type=Path, help="the file to write")
    try:
        own = parser.parse_args(argv)
        source = own.run / "checkpoint.pt"
        if own.file.resolve() == source.resolve():
            drama.refuse(f"{own.file} is the run's own checkpoint; name another file")
        saved = export(drama.load_checkpoint(source, torch.device("cpu"), {}))
        with open(own.file, "wb") as file:
            torch.save(saved, file)
    except (drama.Refusal, OSError) as error:
        drama.say(f"export.py: {error}", sys.stderr)
        return 2
    drama.say(f"{own.file}: {saved['config']['game']} at step {saved['at']['step']:,}, "
              f"{own.file.stat().st_size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
