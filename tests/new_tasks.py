# SPDX-License-Identifier: MIT
"""An old log, a new task: the log of a robot that learned to run as fast as it can, scored anew.

    python tests/new_tasks.py HalfCheetahSpeed2 --num-labels 100 --path my_log.hdf5
    python tests/new_tasks.py Pendulum --num-labels 100 --path my_log.hdf5

writes a log in which 100 transitions, drawn at random, have the new task's reward, and all others
NaN. A policy is evaluated in the simulator of the same name: --env-id new_tasks:HalfCheetahSpeed2-v0
with this folder on PYTHONPATH, or --env-id Pendulum-v1.
"""

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
import tyro

BUNDLED = Path(__file__).parent / "data/halfcheetah-medium-replay-mini.hdf5"
# What a step's reward is in Gymnasium's -v4 environments: velocity - cost * |action|^2 + healthy.
COST = {"HalfCheetah": 0.1, "Walker2d": 0.001, "Hopper": 0.001}
HEALTHY = {"HalfCheetah": 0, "Walker2d": 1, "Hopper": 1}


@dataclass
class Args:
    task: tyro.conf.Positional[str]  # HalfCheetahSpeed2, Walker2dSpeed1 (m/s), ...; or Pendulum
    log: Path = BUNDLED  # a D4RL-schema file of that robot; Pendulum's is made here
    num_labels: int | None = None  # transitions that keep their reward (all)
    seed: int = 0  # of which these are
    path: Path = Path("my_log.hdf5")  # where to write


class AtSpeed(gym.Wrapper):
    """A robot at a given speed: 1 - |velocity - speed| takes the place of the velocity."""

    def __init__(self, robot, speed, **kwargs):
        super().__init__(gym.make(f"{robot}-v4", **kwargs))
        self.speed = speed

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        velocity = info["x_velocity"]
        reward += 1 - abs(velocity - self.speed) - velocity
        return observation, reward, terminated, truncated, info


for robot in COST:
    for speed in range(-1, 7):
        entry = {"entry_point": "new_tasks:AtSpeed", "kwargs": {"robot": robot, "speed": speed}}
        gym.register(f"{robot}Speed{speed}-v0", **entry)


def score(robot: str, speed: float, rewards, actions) -> np.ndarray:
    """The new task's rewards, (N,), from a log's rewards (N,) and actions (N, act_dim)."""
    rewards, actions = np.asarray(rewards, np.float64), np.asarray(actions, np.float64)
    velocity = rewards + COST[robot] * np.square(actions).sum(axis=1) - HEALTHY[robot]
    return rewards + 1 - abs(velocity - speed) - velocity


def read_log(path: Path, task: str) -> dict:
    robot, _, speed = task.partition("Speed")
    if robot not in COST or not re.fullmatch(r"-?\d+", speed):
        raise ValueError(f"no task {task}: HalfCheetahSpeed2 is one, Pendulum another")
    with h5py.File(path) as file:
        log = {key: column[:] for key, column in file.items() if isinstance(column, h5py.Dataset)}
    log["rewards"] = score(robot, int(speed), log["rewards"], log["actions"])
    return log


def record_pendulum(num_episodes: int = 100) -> dict:
    """Pendulum-v1 by random torques, and in every other episode by a noisy controller."""
    env, rng = gym.make("Pendulum-v1"), np.random.default_rng(0)
    rows = []
    for episode in range(num_episodes):
        observation, _ = env.reset(seed=episode)
        truncated = False
        while not truncated:
            action = rng.uniform(-2, 2, 1)
            if episode % 2 == 1 and rng.random() < 0.5:
                action = swing_up(*observation)
            row = observation, action
            observation, reward, terminated, truncated, _ = env.step(action.astype(np.float32))
            rows.append((*row, reward, terminated, truncated))
    keys = ("observations", "actions", "rewards", "terminals", "timeouts")
    return {key: np.array(column) for key, column in zip(keys, zip(*rows))}


def swing_up(cos, sin, velocity) -> np.ndarray:
    """Pump energy into the pendulum until it is nearly upright, then hold it there."""
    if cos > 0.9:
        return np.clip([-10 * sin - 2 * velocity], -2, 2)
    missing = 10 * (1 - cos) - velocity**2 / 3  # what it lacks to reach the top, in its own unit
    return np.array([2 * np.sign(velocity * missing)])


def main(args: Args):
    log = record_pendulum() if args.task == "Pendulum" else read_log(args.log, args.task)
    number = len(log["rewards"])
    if args.num_labels:
        hidden = np.random.default_rng(args.seed).permutation(number)[args.num_labels :]
        log["rewards"][hidden] = np.nan
    unfinished = args.path.with_name(f"{args.path.name}.{os.getpid()}")
    with h5py.File(unfinished, "w") as file:
        for key, column in log.items():
            file.create_dataset(key, data=column, compression="gzip")
    os.replace(unfinished, args.path)
    print(f"{args.path}: {number:,} transitions, {args.num_labels or number:,} rewards")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except (OSError, KeyError, ValueError) as error:
        print("error:", error, file=sys.stderr)
        sys.exit(2)
