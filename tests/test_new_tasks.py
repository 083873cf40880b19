"""new_tasks.py: an old log scored for a new task, as its simulator would have scored it."""

import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import h5py
import new_tasks
import numpy as np
import pytest

SCRIPT = Path(new_tasks.__file__)


def run(folder, *options):
    subprocess.run([sys.executable, SCRIPT, *options], cwd=folder, check=True, timeout=60)


def read(path):
    with h5py.File(path) as file:
        return {key: column[:] for key, column in file.items()}


@pytest.mark.parametrize("robot", ["HalfCheetah", "Walker2d", "Hopper"])
@pytest.mark.parametrize("speed", [-1, 0, 3])
def test_a_log_is_scored_as_the_simulator_scores_its_steps(robot, speed):
    old, new = gym.make(f"{robot}-v4"), gym.make(f"new_tasks:{robot}Speed{speed}-v0")
    old.reset(seed=0)
    new.reset(seed=0)
    actions = np.random.default_rng(0).uniform(-1, 1, (200, *old.action_space.shape))
    actions = actions.astype(np.float32)
    rewards, expected = [], []
    for action in actions:
        _, reward, terminated, _, _ = old.step(action)
        rewards.append(reward)
        reward = new.step(action)[1]
        expected.append(reward)
        if terminated:  # the last step of a fall is scored, too
            break
    rewards = np.float32(rewards)  # what a log holds
    scored = new_tasks.score(robot, speed, rewards, actions[: len(rewards)])
    np.testing.assert_allclose(scored, expected, atol=1e-5)


def test_at_its_speed_a_robot_earns_one_and_standing_still_costs_the_speed():
    actions = np.zeros((2, 6))
    earned = new_tasks.score("HalfCheetah", 3, rewards=[3.0, 0.0], actions=actions)
    np.testing.assert_allclose(earned, [1, -2])
    healthy = new_tasks.score("Walker2d", 3, rewards=[4.0, 1.0], actions=actions)
    np.testing.assert_allclose(healthy, [2, -1])


def test_as_many_rewards_stay_as_were_asked_for_and_the_rest_are_nan(tmp_path):
    run(tmp_path, "HalfCheetahSpeed2", "--path", "all.hdf5")
    run(tmp_path, "HalfCheetahSpeed2", "--num-labels", "100", "--path", "some.hdf5")
    run(tmp_path, "HalfCheetahSpeed2", "--num-labels", "100", "--seed", "1", "--path", "1.hdf5")
    everything, some, others = [read(tmp_path / f"{x}.hdf5") for x in ("all", "some", "1")]
    assert not np.isnan(everything["rewards"]).any()
    is_known = ~np.isnan(some["rewards"])
    assert is_known.sum() == 100
    np.testing.assert_array_equal(some["rewards"][is_known], everything["rewards"][is_known])
    assert (is_known != ~np.isnan(others["rewards"])).any()
    with h5py.File(new_tasks.BUNDLED) as file:
        np.testing.assert_array_equal(some["observations"], file["observations"][:])


def test_pendulums_log_is_of_whole_episodes_and_the_same_each_time(tmp_path):
    log = new_tasks.record_pendulum(num_episodes=4)
    assert log["observations"].shape == (800, 3)
    assert np.flatnonzero(log["timeouts"]).tolist() == [199, 399, 599, 799]
    again = new_tasks.record_pendulum(num_episodes=4)
    np.testing.assert_array_equal(log["rewards"], again["rewards"])
    returns = log["rewards"].reshape(4, 200).sum(axis=1)
    assert returns[1::2].mean() > returns[::2].mean() + 200  # the controller knows something
