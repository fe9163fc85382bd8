"""Is a run's world model right for any policy? Teach a new actor and critic in it, then play.

    python experiments/new_agent.py runs/Boxing-0 runs/Boxing-0-new --updates 2500 --horizon 10
    python drama.py --game Boxing --eval 20 --checkpoint runs/Boxing-0-new/checkpoint.pt
    python experiments/diagnose.py runs/Boxing-0-new --fresh 5000

The world model stays as it is, and dreams begin in all of the run's play. Rates and the weight on
entropy fall as in a run that ends with the last update. Ten times a line tells the means since the
last: reward a dreamt step, value, the policy's entropy in nats. drama.py's flags for dreams and for
the agent change the run's. Writes the folder's checkpoint.pt, to play and to look at, not to train.
"""

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from statistics import fmean

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import drama  # noqa: E402

FLAGS = set("seed dreams horizon context temperature actor_lr entropy lr_warmup lr_fall gamma lam "
            "actor_units critic_units hidden_layers return_decay return_floor slow_decay".split())
TOLD = "imagined_reward", "imagined_value", "policy_entropy"


def learn(cfg, model, replay, updates: int) -> drama.ActorCritic:
    """A new actor-critic after so many updates on dreams of the model."""
    agent = drama.ActorCritic(cfg, model.sequence.num_actions)
    steps = cfg.warmup + (updates + 3 * cfg.see_first) * cfg.train_every  # dreams begin late
    _, learner = drama.make_learners(dataclasses.replace(cfg, steps=steps), model, agent)
    begun, news = time.perf_counter(), []
    for k in range(1, updates + 1):
        news.append(drama.update_actor_critic(cfg, model, agent, learner, replay))
        if 10 * k // updates > 10 * (k - 1) // updates:
            means = ", ".join(f"{name} {fmean(new[name] for new in news):.4f}" for name in TOLD)
            drama.say(f"{k:5} updates, {(time.perf_counter() - begun) / 60:.1f} min: {means}")
            news = []
    return agent


def main(argv: list[str] | None = None) -> int:
    """Run a command line; return the exit code."""
    parser = argparse.ArgumentParser("new_agent.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = drama.refuse
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("out", type=Path, help="a new folder, to write the checkpoint into")
    parser.add_argument("--updates", type=int, default=2500)
    try:
        own, rest = parser.parse_known_args(argv)
        asked, given = drama.parse(rest)
        if wrong := sorted(given - FLAGS):
            drama.refuse(f"--{wrong[0].replace('_', '-')} is the run's; only flags for dreams and "
                         "the agent may change")
        if own.updates < 1:
            drama.refuse("--updates must be 1 or more")
        if own.out.exists():
            drama.refuse(f"{own.out} is there already; name a new folder")
        drama.keep_freed_pages()
        from diagnose import load
        cfg, model, _, step, replay = load(own.run, True)
        cfg = dataclasses.replace(cfg, **{name: getattr(asked, name) for name in given})
        replay.cfg = model.cfg = drama.validate(cfg)
        torch.manual_seed(cfg.seed)
        own.out.mkdir(parents=True)  # now: it would be a pity to find out afterwards
        agent = learn(cfg, model, replay, own.updates)
        torch.save(dict(config=vars(cfg), at=dict(step=step), model=model.state_dict(),
                        agent=agent.state_dict()), own.out / "checkpoint.pt")
    except (drama.Refusal, OSError) as error:
        drama.say(f"new_agent.py: {error}", sys.stderr)
        return 2
    except KeyboardInterrupt:
        own.out.rmdir()
        return 130
    drama.say(f"{own.out / 'checkpoint.pt'}: {cfg.game}, the world model of step {step:,}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
