"""The grid world of Drama, arXiv 2410.08893: `python drama.py --game GridWorld` plays it."""

import json

import numpy as np
from gymnasium import Env, spaces


class GridWorld(Env):
    """5x5 cells: the outer 16 are black walls, a red agent, a yellow goal.
    Actions: up, down, left, right; a wall stops the agent. Reaching the goal gives reward 1 and
    places both anew, on two cells of the 3x3 middle. Episodes of 64 steps end by truncation."""

    SIDE, STEPS, MOVES = 3, 64, ((-1, 0), (1, 0), (0, -1), (0, 1))
    WALL, FLOOR, AGENT, GOAL = (0, 0, 0), (160, 160, 160), (255, 0, 0), (255, 255, 0)
    BEST = 31.85  # expected return of a perfect player (value iteration, in test_drama.py)

    def __init__(self, image_size: int):
        self.observation_space = spaces.Box(0, 255, (1, image_size, image_size, 3), np.uint8)
        self.action_space = spaces.Discrete(len(self.MOVES))

    def _place(self) -> None:
        cells = self.np_random.choice(self.SIDE**2, 2, replace=False)
        self.agent, self.goal = np.stack(np.divmod(cells, self.SIDE), 1)  # (row, column) each

    def frame(self) -> np.ndarray:
        """What is to be seen now: (1, H, W, 3) uint8."""
        grid = np.full((self.SIDE + 2, self.SIDE + 2, 3), self.WALL, np.uint8)
        grid[1:-1, 1:-1] = self.FLOOR
        grid[tuple(self.goal + 1)], grid[tuple(self.agent + 1)] = self.GOAL, self.AGENT
        size = self.observation_space.shape[1]
        cell = np.arange(size) * len(grid) // size  # row or column that a pixel shows
        return grid[None, cell][:, :, cell]

    def reset(self, *, seed=None, options=None):
        """Start an episode -> (frame, info)."""
        super().reset(seed=seed)
        self.time = 0
        self._place()
        return self.frame(), {"lives": 0}

    def step(self, action):
        """One step -> frame, reward, terminated, truncated, info."""
        self.time += 1
        self.agent = np.clip(self.agent + self.MOVES[action], 0, self.SIDE - 1)
        reached = bool((self.agent == self.goal).all())
        if reached:
            self._place()
        return self.frame(), float(reached), False, self.time == self.STEPS, {"lives": 0}

    def state_dict(self) -> dict:
        """All that the next step depends on: ALE's vector environment has no such thing."""
        return dict(agent=self.agent.tolist(), goal=self.goal.tolist(), time=self.time,
                    rng=json.dumps(self.np_random.bit_generator.state))

    def load_state_dict(self, saved: dict) -> None:
        """Go on from `state_dict`."""
        self.agent, self.goal = np.array(saved["agent"]), np.array(saved["goal"])
        self.time = saved["time"]
        self.np_random.bit_generator.state = json.loads(saved["rng"])
