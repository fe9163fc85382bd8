"""What do chance draws cost in play? Evaluate an agent that draws its faces and buttons sharper.

    python experiments/sharpen.py results/Pong.pt --games 32 --faces 1 --actions 1 2 inf

As trained, the latent's faces and the action are drawn from their distributions. Here both are
drawn from powers of them: 1 is as trained, 2 the distribution squared, inf the likeliest always.
Each pair of --faces and --actions is one evaluation from the same starts, as `drama.py --eval`
makes it. Nothing is written.
"""

import argparse
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import drama  # noqa: E402


def sharpen(model: drama.WorldModel, agent: drama.ActorCritic, faces: float, actions: float):
    """Model and agent, whose latents and actions are drawn from those powers when they play."""
    faces, actions = (min(power, 1e6) for power in (faces, actions))  # times 0, inf would be nan
    encode = model.encode
    model.encode = lambda frame: (encode(frame) * faces).log_softmax(-1)
    agent.actor.register_forward_hook(
        lambda actor, feature, logits: logits.float().log_softmax(-1) * actions)
    return model, agent


def power(text: str) -> float:
    """A positive number or inf."""
    if not float(text) > 0:
        raise ValueError
    return float(text)


def main(argv: list[str] | None = None) -> int:
    """Run a command line; return the exit code."""
    parser = argparse.ArgumentParser("sharpen.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = drama.refuse
    parser.add_argument("agent", type=Path, help="a run folder, or a file made by export.py")
    parser.add_argument("--games", type=int, default=20)
    parser.add_argument("--faces", type=power, nargs="+", default=[1.0],
                        help="powers of the latent")
    parser.add_argument("--actions", type=power, nargs="+", default=[1.0, 2.0, float("inf")],
                        help="powers of the policy")
    rebuild = drama.rebuild
    try:
        own = parser.parse_args(argv)
        if own.games < 1:
            drama.refuse("--games must be 1 or more")
        file = own.agent / "checkpoint.pt" if own.agent.is_dir() else own.agent
        for faces, actions in ((f, a) for f in own.faces for a in own.actions):
            drama.say(f"faces to the power of {faces:g}, actions of {actions:g}")
            with mock.patch.object(drama, "rebuild", lambda *saved, powers=(faces, actions):
                                   sharpen(*rebuild(*saved), *powers)):
                code = drama.main(["--eval", str(own.games), "--checkpoint", str(file),
                                   "--eval_envs", str(min(own.games, 32))])
            if code:
                return code
    except drama.Refusal as error:
        drama.say(f"sharpen.py: {error}", sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
