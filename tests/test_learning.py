"""The paper's story in a minute: imputed rewards teach what the labels alone do not."""

import json
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
import pytest

import iql_imputed
import reward_model
import td3bc_imputed

NUM_STEPS = 20
MARGIN = 5  # of returns, or scores; differences of 7 to 20 were measured


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


def run(script, options):
    script.main(script.tyro.cli(script.Args, args=options.split()))


def returns(script, rewards, path, seed, options):
    """Of a seed, which with another file than the completed one has 20 labels of its own."""
    shared = f"--env-id Point-v0 --dataset-path {path} --rewards {rewards} --seed {seed} {options}"
    shared += " --num-updates 400 --learning-rate 1e-3 --batch-size 64 --device cpu --compile off"
    run(script, f"{shared} --run-dir {rewards}{seed}")
    return json.loads(Path(f"{rewards}{seed}", "result.json").read_text())["mean"]


@pytest.mark.parametrize(
    ("script", "options"),
    [(td3bc_imputed, "--alpha 10"), (iql_imputed, "")],
    ids=["td3bc", "iql"],
)
def test_imputed_rewards_beat_labels_alone_and_their_mean(script, options, log):
    """A difference of 5 is a third of the way from random pushes, -30, to the best, -13."""
    imputed, labeled, mean = [], [], []
    for seed in range(2):
        few = "--label-fraction 0.005"
        desk = f"--dataset-path log.hdf5 --seed {seed} {few} --reward-model gp --device cpu"
        run(reward_model, f"{desk} --output-path full{seed}.hdf5")
        imputed.append(returns(script, "imputed", f"full{seed}.hdf5", seed, options))
        labeled.append(returns(script, "labeled", "log.hdf5", seed, f"{options} {few}"))
        mean.append(returns(script, "mean", "log.hdf5", seed, f"{options} {few}"))
    assert np.mean(imputed) > np.mean(labeled) + MARGIN
    assert np.mean(imputed) > np.mean(mean) + MARGIN


def bundled_score(rewards):
    """TD3+BC's on the bundled dataset, mean of six seeds with ten labels each."""
    options = f"--label-fraction 0.0001 --rewards {rewards} --run-dir {rewards} --num-seeds 6"
    options += " --num-updates 400 --batch-size 16 --learning-rate 1e-3 --tau 0.02"
    run(td3bc_imputed, f"{options} --eval-episodes 1 --device cpu --compile off")
    result = json.loads(Path(rewards, "result.json").read_text())
    assert result["metric"] == "score"
    return result["mean"]


def test_imputed_rewards_beat_labels_alone_on_the_bundled_dataset():
    """Differences of 9 to 11 were measured; a random policy has a score of 0."""
    assert bundled_score("imputed") > bundled_score("labeled") + MARGIN


@pytest.mark.parametrize(("kind", "r2"), [("mlp", 0.8), ("gp", 0.95)])
def test_a_hundred_labels_tell_most_of_the_hidden_rewards_of_the_bundled_dataset(kind, r2):
    script, seeds = reward_model, range(2)
    dataset = script.load_dataset()
    label_rows = script.choose_labels(dataset.rewards, 0.001, seeds)
    assert label_rows.shape == (2, 100)
    args = script.Args(reward_model=kind)
    _, predicted = script.fit_and_predict(kind, dataset, label_rows, seeds, args, "cpu")
    quality = script.measure(predicted, dataset)
    assert min(quality["r2"]) > r2
    assert min(quality["return_correlation"]) > 0.95
