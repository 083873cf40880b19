"""Environments of a user's own, small enough to know every return by heart."""

import multiprocessing
import os
import signal
from pathlib import Path

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


class NanEnv(WideEnv):
    """Its rewards are no numbers."""

    def step(self, action):
        observation, _, terminated, truncated, info = super().step(action)
        return observation, float("nan"), terminated, truncated, info


class SeedEnv(WideEnv):
    """Its return tells the seed of the episode: 2^(seed - 100); it ends as truncated."""

    def reset(self, seed=None, options=None):
        self.seed = seed
        return super().reset()

    def step(self, action):
        observation, _, terminated, _, info = super().step(action)
        return observation, 2 ** (self.seed - 100) / 3, False, terminated, info


class DeadlyEnv(WideEnv):
    """Kills a worker process that evaluates in it."""

    def step(self, action):
        if multiprocessing.parent_process():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)


class SignalEnv(WideEnv):
    """Once the run has a checkpoint, sends it the signal in the file `signal`, in mid-episode."""

    def step(self, action):
        if Path("run/checkpoint.pt").exists() and Path("signal").exists():
            try:
                os.replace("signal", "sent")
            except FileNotFoundError:  # another worker was faster
                return super().step(action)
            number, trainer = int(Path("sent").read_text()), multiprocessing.parent_process()
            if trainer and number == signal.SIGINT:
                os.killpg(os.getpgrp(), number)  # as a terminal does
            else:
                os.kill(trainer.pid if trainer else os.getpid(), number)
        return super().step(action)


for env_class in (WideEnv, DiscreteEnv, NanEnv, SeedEnv, DeadlyEnv, SignalEnv):
    name = env_class.__name__
    gym.register(f"{name.removesuffix('Env')}-v0", f"own_envs:{name}")
