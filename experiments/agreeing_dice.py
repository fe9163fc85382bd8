"""Drama with dice that agree: the prior throws them in groups, each knowing what fell before.

    python experiments/agreeing_dice.py --game Pong --seed 12 [--groups 4] [drama.py's flags]
    python experiments/agreeing_dice.py --game Pong --seed 12 --eval 20

In drama.py the dice of a guess fall apart from one another. Where the model does not know whether
the paddle will meet the ball, some of them tell of a hit and some of a miss. Then the decoder draws
no ball at all, and a ball that is gone is never lost. Here P(z | d) is a product over groups of
dice, P(group 1 | d) P(group 2 | d, group 1) and so on, each by a small network. Within a group
the dice fall apart as before. KL[posterior || prior] is a sum over the groups too (the chain rule);
the groups before are those drawn from the posterior, so what is trained on is a draw of that sum.

The flags, tables and checkpoints are drama.py's, in runs/<game>-<seed>-agreeing.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import drama  # noqa: E402

GROUPS = 4


class Agreeing(drama.WorldModel):
    """A world model whose prior throws its dice in so many groups."""

    def __init__(self, groups: int, cfg, num_actions: int):
        super().__init__(cfg, num_actions)
        self.width = cfg.d_z // groups
        self.prior = nn.ModuleList(drama.mlp(cfg.d_model + i * self.width, cfg.head_units, 1,
                                             self.width) for i in range(groups))

    def log_prior(self, d: Tensor, z: Tensor | None = None) -> Tensor:
        """d_t (..., d_model), z_{t+1} (..., K, C) one-hot -> log P of each die, given d and the
        groups before its own, (..., K, C). Without z the dice are thrown here, and what fell is
        certain: the logarithm of one-hot dice, so that a draw from it is that throw."""
        known, logs = d, []
        for i, network in enumerate(self.prior):
            logp = self._categoricals(network(known))  # (..., K / groups, C)
            if z is None:
                fell = drama.draw_one_hot(logp)
                logp = fell.clamp(min=torch.finfo(fell.dtype).tiny).log()
            else:
                fell = z.flatten(-2)[..., i * self.width:(i + 1) * self.width].unflatten(
                    -1, logp.shape[-2:])
            logs.append(logp)
            known = torch.cat([known, fell.flatten(-2)], -1)
        return torch.cat(logs, -2)


def main(argv: list[str] | None = None) -> int:
    """Run drama.py with such a prior; return its exit code."""
    own = argparse.ArgumentParser("agreeing_dice.py", add_help=False, allow_abbrev=False)
    own.error = drama.refuse
    own.add_argument("--groups", type=int, default=GROUPS)
    try:
        args, rest = own.parse_known_args(argv)
        if {"-h", "--help"} & set(rest):
            print(__doc__, "\nThe flags of drama.py:\n", sep="")
            return drama.main(["--help"])
        cfg, given = drama.parse(rest)
        if args.groups < 1 or cfg.categoricals % args.groups:
            drama.refuse(f"--groups {args.groups}: must divide --categoricals, {cfg.categoricals}")
    except drama.Refusal as error:
        drama.say(f"agreeing_dice.py: {error}", sys.stderr)
        return 2
    if "out" not in given:
        rest += ["--out", f"runs/{cfg.game}-{cfg.seed}-agreeing"]
    with mock.patch.object(drama, "WorldModel", partial(Agreeing, args.groups)):
        return drama.main(rest)


if __name__ == "__main__":
    sys.exit(main())
