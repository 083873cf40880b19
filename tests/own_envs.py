"""Environments of a user's own, small enough to know every return by heart."""

import gymnasium as gym
import numpy as np


class WideEnv(gym.Env):
    """One observation, the step's number; actions between 0 and 10; three steps."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float64)
    action_space = gym.spaces.Box(0, 10, (2,), np.float32)

    def reset(self, seed=None, options=None):
        self.t = 0
        return np.zeros(1), {}

    def step(self, action):
        self.t += 1
        return np.full(1, self.t, float), float(np.sum(action)), self.t == 3, False, {}


class DiscreteEnv(WideEnv):
    """Two actions."""

    action_space = gym.spaces.Discrete(2)


gym.register("Wide-v0", "own_envs:WideEnv")
gym.register("Discrete-v0", "own_envs:DiscreteEnv")
