"""The paper's story in a minute: imputed rewards teach what the labels alone do not."""

import json
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
import pytest

import iql_imputed
import td3bc_imputed

NUM_STEPS = 20
MARGIN = 5  # of returns; differences of 7 to 20 were measured


class PointEnv(gym.Env):
    """A point in the plane, pushed by the action; the reward is larger the nearer it is to 0."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.position = self.np_random.uniform(-2, 2, 2)
        return self.position.astype(np.float32), {}

    def step(self, action):
        self.position += 0.2 * action
        reward = -np.linalg.norm(self.position)
        return self.position.astype(np.float32), reward, False, False, {}


gym.register("Point-v0", PointEnv, max_episode_steps=NUM_STEPS)


@pytest.fixture
def log():
    """log.hdf5: 200 episodes of random pushes."""
    env, rng = PointEnv(), np.random.default_rng(0)
    rows = {"observations": [], "actions": [], "rewards": [], "next_observations": []}
    for episode in range(200):
        observation, _ = env.reset(seed=episode)
        for _ in range(NUM_STEPS):
            action = rng.uniform(-1, 1, 2)
            rows["observations"].append(observation)
            rows["actions"].append(action)
            observation, reward, _, _, _ = env.step(action)
            rows["rewards"].append(reward)
            rows["next_observations"].append(observation)
    with h5py.File("log.hdf5", "w") as file:
        for name, column in rows.items():
            file[name] = np.array(column)
        file["terminals"] = np.zeros(len(rows["rewards"]))


def mean_return(script, rewards, *options):
    """Of three seeds, each with 20 labels of its own."""
    shared = "--env-id Point-v0 --dataset-path log.hdf5 --label-fraction 0.005 --num-seeds 3"
    shared += " --num-updates 400 --learning-rate 1e-3 --batch-size 64 --device cpu --compile off"
    arguments = [*shared.split(), "--rewards", rewards, "--run-dir", rewards, *options]
    script.main(script.tyro.cli(script.Args, args=arguments))
    return json.loads(Path(rewards, "result.json").read_text())["mean"]


@pytest.mark.parametrize(
    ("script", "options"),
    [(td3bc_imputed, ["--alpha", "10"]), (iql_imputed, [])],
    ids=["td3bc", "iql"],
)
def test_imputed_rewards_beat_labelled_transitions_alone_and_their_mean(script, options, log):
    """A difference of 5 is a third of the way from random pushes, -30, to the best, -13."""
    imputed = mean_return(script, "imputed", "--reward-model", "gp", *options)
    assert imputed > mean_return(script, "labeled", *options) + MARGIN
    assert imputed > mean_return(script, "mean", *options) + MARGIN


@pytest.mark.parametrize(("reward_model", "r2"), [("mlp", 0.8), ("gp", 0.95)])
def test_a_hundred_labels_tell_most_of_the_hidden_rewards_of_the_bundled_dataset(reward_model, r2):
    script, seeds = td3bc_imputed, range(2)
    dataset, args = script.load_dataset(), script.Args(reward_model=reward_model)
    labeled = script.split_labels(dataset.rewards, 0.001, seeds)
    assert labeled.shape == (2, 100)
    generators = script.make_generators(seeds, stream=1)
    model = script.RewardModel(dataset, labeled, generators, args)
    script.fit_reward_model(model, dataset, labeled, generators, args)
    imputed = script.impute_rewards(model, dataset, labeled)
    quality = script.imputation_quality(imputed, dataset, labeled)
    assert min(quality["r2"]) > r2
    assert min(quality["return_correlation"]) > 0.95
