"""Start every game of Atari 100k, train 200 steps of the tiny preset, and print one row a game.

    python experiments/all_games.py [--steps 200] [--out runs/all-games]
"""

import argparse
import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import drama  # noqa: E402


def main() -> int:
    """Run them one after the other; exit code 1 if any did not end well."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", default="200")
    parser.add_argument("--out", default="runs/all-games")
    args = parser.parse_args()
    rows, failed = [], 0
    for game in drama.SCORES:
        out = Path(args.out) / game
        code = drama.main(["--game", game, "--preset", "tiny", "--steps", args.steps,
                           "--out", str(out)])
        if code:
            failed += 1
            rows.append(f"{game:<16}{'':>8}{code:>11}")
            continue
        with open(out / "metrics.csv") as file:
            last = list(csv.DictReader(file))[-1]
        actions = drama.make_env(game, 1, 64).single_action_space.n
        rows.append(f"{game:<16}{actions:>8}{code:>11}{last['step']:>7}{last['updates']:>9}"
                    f"{float(last['reconstruction']):>16.2f}")
    print("\n".join([f"{'game':<16}{'actions':>8}{'exit code':>11}{'steps':>7}{'updates':>9}"
                     f"{'reconstruction':>16}", *rows]))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
