# SPDX-License-Identifier: MIT
"""Record a `medium-replay` dataset in the D4RL HDF5 schema: every transition SAC takes, from the first, in order.

pip install stable-baselines3        # the only requirement beyond the project's own
python tests/data/collect.py --env-id HalfCheetah-v4 --num-steps 100_000 --path my-medium-replay.hdf5
"""

from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import h5py
import mujoco
import numpy as np
import tyro
from stable_baselines3 import SAC


@dataclass
class Args:
    env_id: str = "HalfCheetah-v4"  # any Gymnasium environment with continuous vectors
    num_steps: int = 100_000  # environment steps, and gradient steps
    random_steps: int = 5_000  # steps of uniform actions before SAC learns
    seed: int = 1
    path: Path = Path("medium-replay.hdf5")


class Recorder(gym.Wrapper):
    """Keeps what each step was made of."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.rows = []

    def reset(self, **kwargs):
        self.observation, info = self.env.reset(**kwargs)
        return self.observation, info

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        self.rows.append(
            (self.observation, action, reward, terminated, truncated and not terminated)
        )
        self.observation = observation
        return observation, reward, terminated, truncated, info


def main(args: Args) -> None:
    env = Recorder(gym.make(args.env_id))
    model = SAC("MlpPolicy", env, learning_starts=args.random_steps, seed=args.seed, verbose=1)
    model.learn(args.num_steps)
    columns = zip(("observations", "actions", "rewards", "terminals", "timeouts"), zip(*env.rows))
    with h5py.File(args.path, "w") as file:
        for name, column in columns:
            dtype = bool if name in ("terminals", "timeouts") else np.float32
            file.create_dataset(name, data=np.array(column, dtype), compression="gzip")
        # The recording ends here, whatever the episode does.
        file["timeouts"][-1] = not file["terminals"][-1]
        file.attrs["env_id"] = args.env_id
        file.attrs["collector"] = (
            f"SAC (Stable-Baselines3 defaults), {args.random_steps} random steps, seed {args.seed}"
        )
        file.attrs["simulator"] = f"gymnasium {gym.__version__}, mujoco {mujoco.__version__}"


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
