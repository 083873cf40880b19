# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0", "numpy>=2.0,<3", "gymnasium[mujoco]>=1.2,<2", "mujoco>=3.3,<5",
#   "minari[hdf5,hf]>=0.5.3,<0.6", "h5py>=3.12,<4", "tyro>=0.9.2,<2", "tqdm>=4.66,<5",
#   "wandb>=0.19,<1", "matplotlib>=3.9,<4", "pytest>=8,<10"
# ]
# ///
"""TD3+BC on a dataset in which only a few transitions have a reward.

1. Load transitions, and choose the labels: 1% of a D4RL dataset, else all that is known.
2. Fit a reward model f to these labels, minimizing the mean of (f(s, a) - r)^2 (Eq. 4). Every
   other reward becomes f(s, a), every label stays as it is (Eq. 5).
3. Make a TD3+BC agent for every seed, and hand it the completed dataset.
4. Train all seeds at once, evaluating them in the simulator now and then.
5. Report the last evaluation.

The equations are those of "Offline Reinforcement Learning with Imputed Rewards" (Romeo & Bagdanov,
2024). At a first reading take the sections Networks, Reward model, TD3+BC and The experiment.

    python td3bc_imputed.py --num-updates 20_000                               # bundled dataset
    python td3bc_imputed.py --env-id walker2d-medium-replay-v2 --num-seeds 5   # D4RL
    python td3bc_imputed.py --dataset-path log.hdf5                            # NaN = no label
"""

import hashlib
import io
import json
import math
import os
import signal
import socket
import sys
import textwrap
import threading
import time
import warnings
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from datetime import datetime, timedelta
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import h5py
import minari
import mujoco
import numpy as np
import torch
import tyro
from torch import nn
from tqdm import tqdm


@dataclass(frozen=True)
class Args:
    # --- Data
    env_id: str | None = None  # D4RL or Minari dataset (none: bundled); or dataset_path's simulator
    dataset_path: Path | None = None  # your own HDF5 file: README.md has a table of its columns
    # --- Rewards
    label_fraction: float | None = None  # share of known rewards used (D4RL, bundled: 0.01; else 1)
    # imputed: rewards without a label are predicted; labeled: the agent sees only what has a label;
    # oracle: it sees every reward; zero, mean (controls): the others are 0, or the labels' mean.
    rewards: Literal["imputed", "labeled", "oracle", "zero", "mean"] = "imputed"
    scale_rewards: bool = False  # multiply by 1000 / (range of episode returns), as IQL does
    reward_hidden_dim: int = 256  # width of the reward model's two hidden layers
    reward_epochs: int = 300  # passes over the labels in the reward model's fit
    reward_learning_rate: float = 1e-4  # Adam's, for the reward model
    reward_batch_size: int = 64  # labels in a batch
    # --- TD3+BC
    alpha: float = 2.5  # weight of Q against behavior cloning; 0 is cloning alone
    policy_noise: float = 0.2  # std of the noise on the target policy's actions
    noise_clip: float = 0.5  # bound of that noise
    policy_freq: int = 2  # critic updates for each update of the actor and the targets
    learning_rate: float = 3e-4  # Adam's, for actor and critics
    batch_size: int = 256  # transitions in a batch, for each seed
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # step of the targets towards the trained networks
    num_updates: int = 1_000_000  # critic updates
    # --- Seeds and speed
    seed: int = 0  # the first seed
    num_seeds: int = 1  # seeds trained at once: seed, seed + 1, ...; batches depend on how many
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes the GPU if there is one
    compile: Literal["auto", "on", "off"] = "auto"  # compile what takes the time; auto: if it pays
    cuda_graph: bool = True  # on a GPU, record an update as a CUDA graph and replay it
    # --- Evaluation and output
    eval_freq: int = 5_000  # updates between two evaluations, each followed by a checkpoint
    eval_episodes: int = 10  # deterministic episodes for each seed
    eval_workers: int = 0  # processes that play the episodes (0: this one)
    run_dir: Path | None = None  # where to write (runs/...)
    resume: bool = False  # continue from the checkpoint in run_dir, or start if there is none
    track: bool = False  # log to Weights & Biases


class UserError(Exception):
    """What the user can put right: shown as one line, exit code 2."""


def require(condition: bool, message: str):
    if not condition:
        raise UserError(message)


def warn(message):
    tqdm.write(f"warning       {textwrap.shorten(message, 500)}")


# --- Networks, and the data they learn from ---
class Dataset(NamedTuple):
    """N transitions in the log's order, and where a policy trained on them can be evaluated."""

    observations: np.ndarray  # (N, obs_dim), float32
    actions: np.ndarray  # (N, act_dim), float32, in the log's own units
    rewards: np.ndarray  # (N,), float64, NaN where nobody knows it
    next_observations: np.ndarray  # (N, obs_dim), float32
    terminals: np.ndarray  # (N,), float64, 1 = the task ended: no bootstrap
    episode_ids: np.ndarray  # (N,), int64, consecutive from 0
    name: str
    simulator: object  # a Gymnasium id, a MinariDataset, which can make its own, or None
    ref_min: float  # return of score 0; if unknown, 0: then a score is a return
    ref_max: float  # return of score 100; if unknown, 100


class BatchedLinear(nn.Module):
    """nn.Linear once per seed, all in one product: (seeds, batch, in_dim) -> (..., out_dim)."""

    def __init__(self, in_dim, out_dim, generators):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(len(generators), in_dim, out_dim))
        self.bias = nn.Parameter(torch.empty(len(generators), 1, out_dim))
        # As in nn.Linear; each seed by its own generator, so that it starts the same alone.
        bound = in_dim**-0.5
        for k, generator in enumerate(generators):
            nn.init.uniform_(self.weight.data[k], -bound, bound, generator=generator)
            nn.init.uniform_(self.bias.data[k], -bound, bound, generator=generator)

    def forward(self, x) -> torch.Tensor:
        return torch.bmm(x, self.weight) + self.bias


class MLP(nn.Module):
    """Two hidden layers on normalized inputs, once per seed; `widths` are those of its inputs."""

    def __init__(self, widths, mean, std, hidden_dim, out_dim, generators):
        super().__init__()
        self.widths = widths  # [obs_dim], or [obs_dim, act_dim]
        # The normalizer is part of the network, so that a saved network is complete.
        self.register_buffer("mean", mean)  # (seeds, 1, in_dim), or what broadcasts to it
        self.register_buffer("std", std)
        self.layer1 = BatchedLinear(sum(widths), hidden_dim, generators)
        self.layer2 = BatchedLinear(hidden_dim, hidden_dim, generators)
        self.layer3 = BatchedLinear(hidden_dim, out_dim, generators)

    def forward(self, *inputs) -> torch.Tensor:
        """Observations, or observations and actions, (seeds, batch, ...) -> (seeds, batch, out)."""
        assert [x.shape[-1] for x in inputs] == self.widths, f"inputs must have {self.widths}"
        x = (torch.cat(inputs, dim=-1) - self.mean) / self.std
        x = torch.relu(self.layer1(x))
        x = torch.relu(self.layer2(x))
        return self.layer3(x)


class StateActionMLP(MLP):
    """One number for each state and action, Q(s, a) or the reward f(s, a): (seeds, batch)."""

    def forward(self, observations, actions) -> torch.Tensor:
        return super().forward(observations, actions).squeeze(-1)


def make_generators(seeds, stream) -> list:
    """One for each seed's initial weights; reward model (stream 1) and agent (2) start apart."""
    return [torch.Generator().manual_seed(1_000_003 * stream + seed) for seed in seeds]


def take_rows(tensors, rows: torch.Tensor) -> list:
    """Each seed's rows: (seeds, N, ...) and row numbers (seeds, n) -> (seeds, n, ...)."""
    seed_index = torch.arange(len(rows), device=rows.device).unsqueeze(1)  # beside rows: (seeds, 1)
    return [tensor[seed_index, rows] for tensor in tensors]


def draw_batch(tensors, batch_size: int, generator) -> list:
    """Rows drawn for each seed, with replacement: (seeds, N, ...) -> (seeds, batch_size, ...)."""
    num_seeds, num_rows = tensors[0].shape[:2]
    size, device = (num_seeds, batch_size), generator.device
    return take_rows(tensors, torch.randint(num_rows, size, generator=generator, device=device))


# --- Reward model (Romeo & Bagdanov 2024) ---
def choose_labels(rewards, fraction, seeds) -> np.ndarray:
    """Draw the transitions whose reward each seed may see: their row numbers, (seeds, labels)."""
    known = np.flatnonzero(~np.isnan(rewards))
    require(len(known) > 0, "no transition has a label: every reward is NaN")
    num_labels = max(1, round(fraction * len(known)))
    if num_labels < 10:
        warn(f"{num_labels} labels are too few to learn from")
    draws = [np.random.default_rng(seed).choice(known, num_labels, replace=False) for seed in seeds]
    return np.sort(draws, axis=1)


class RewardModel(nn.Module):
    """f(s, a) of each seed in the rewards' own unit; self.model predicts standardized rewards."""

    def __init__(self, observations, actions, labels, hidden_dim, generators):
        """All of the log's observations and actions, (N, ...); each seed's labels, (seeds, n)."""
        super().__init__()
        differ = (np.ptp(labels, axis=1) > 0).all()
        require(differ, f"a seed's {labels.shape[1]} labels are all equal: more are needed")
        labels = torch.from_numpy(labels)  # float64, since float32 loses digits far from 0
        self.register_buffer("reward_mean", labels.mean(dim=1, keepdim=True))  # (seeds, 1)
        self.register_buffer("reward_std", labels.std(dim=1, keepdim=True, correction=0))
        mean, std = input_statistics(observations, actions)
        widths = [observations.shape[1], actions.shape[1]]
        self.model = StateActionMLP(widths, mean, std, hidden_dim, 1, generators)

    def forward(self, observations, actions) -> torch.Tensor:
        """(seeds, batch, ...) -> (seeds, batch), float64."""
        return self.reward_mean + self.reward_std * self.model(observations, actions)


def input_statistics(observations, actions) -> list:
    """Mean and std with which to normalize the reward model's inputs, each (in_dim,)."""
    obs_std = observations.std(axis=0, dtype=np.float64)
    # The std of a feature that is nearly constant is tiny: take at least 1/1000 of its range.
    obs_std = np.maximum(obs_std, np.ptp(observations, axis=0) / 1000)
    # Actions by their range in the log: there may be no simulator that knows their bounds.
    low, high = actions.min(axis=0), actions.max(axis=0)
    mean = np.concatenate([observations.mean(axis=0, dtype=np.float64), (low + high) / 2])
    std = np.concatenate([obs_std, (high - low) / 2])
    std[std == 0] = 1  # an input that never changes
    return [torch.from_numpy(x).float() for x in (mean, std)]


def fit_reward_model(reward_model, examples, epochs, learning_rate, batch_size, generator):
    """Minimize Eq. 4 on each seed's observations, actions and labels, (seeds, labels, ...)."""
    model, device = reward_model.model, reward_model.reward_mean.device
    observations, actions, labels = [torch.from_numpy(x).to(device) for x in examples]
    labels = ((labels - reward_model.reward_mean) / reward_model.reward_std).float()  # any unit
    optimizer = torch.optim.Adam(model.parameters(), learning_rate, fused=True)
    batch_size = min(batch_size, labels.shape[1])
    num_batches = epochs * math.ceil(labels.shape[1] / batch_size)
    for _ in tqdm(range(num_batches), "reward model", leave=False, disable=None):
        s, a, r = draw_batch([observations, actions, labels], batch_size, generator)
        loss = (model(s, a) - r).square().mean(dim=1)  # Eq. 4, (seeds,)
        optimizer.zero_grad()
        loss.sum().backward()  # a sum over seeds: each gets the gradient it would have alone
        optimizer.step()
    error = (model(s, a) - r).abs()
    require((error < 1e3).all(), "the reward model diverged: lower --reward-learning-rate")


@torch.no_grad()
def predict_rewards(reward_model, observations, actions) -> np.ndarray:
    """f(s, a) of every transition, (seeds, N)."""
    device, num_seeds = reward_model.reward_mean.device, len(reward_model.reward_mean)
    s = torch.from_numpy(observations).to(device).expand(num_seeds, -1, -1)
    a = torch.from_numpy(actions).to(device).expand(num_seeds, -1, -1)
    chunks = zip(s.split(1000, dim=1), a.split(1000, dim=1))
    predictions = [reward_model(*chunk) for chunk in chunks]
    return torch.cat(predictions, dim=1).cpu().numpy()


def complete_rewards(kind: str, rewards, label_rows, predicted) -> np.ndarray:
    """Eq. 5, (seeds, N): a label stays as it is, other rewards are what --rewards says."""
    labels = rewards[label_rows]
    mean = labels.mean(axis=1, keepdims=True)
    # Of labeled, main() drops the other transitions.
    others = {"imputed": predicted, "labeled": 0.0, "oracle": rewards, "zero": 0.0, "mean": mean}
    completed = np.broadcast_to(others[kind], (len(labels), len(rewards))).copy()
    np.put_along_axis(completed, label_rows, labels, axis=1)
    require(not np.isnan(completed).any(), f"--rewards {kind} needs every reward: some are NaN")
    return completed


def imputation_r2(predicted, rewards, label_rows) -> list:
    """R2 of each seed on the rewards, if any, that are known and no label; no agent sees these."""
    true = np.tile(rewards, (len(predicted), 1))
    np.put_along_axis(true, label_rows, np.nan, axis=1)
    if np.isnan(true).all():
        return []
    mse = np.nanmean((predicted - true) ** 2, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):  # of rewards that are all equal
        r2 = 1 - mse / np.nanvar(true, axis=1)
    print(f"reward model  R2 {r2.mean():.4f} on the known rewards without a label")
    if r2.mean() < 0:
        warn("the reward model is worse than a constant, whose R2 is 0")
    return r2.tolist()


def reward_scale(rewards, label_rows, episode_ids, labeled_only) -> np.ndarray:
    """1000 / (largest - smallest episode return) for each seed, (seeds, 1), as IQL's original."""
    lengths = np.bincount(episode_ids)
    scales = []
    for seed_rewards, rows in zip(rewards, label_rows):
        if labeled_only:  # estimated: the mean of an episode's labels times its length
            label_ids = episode_ids[rows]
            episodes, ids, counts = np.unique(label_ids, return_inverse=True, return_counts=True)
            returns = np.bincount(ids, seed_rewards[rows]) / counts * lengths[episodes]
        else:
            returns = np.bincount(episode_ids, weights=seed_rewards)
        differ = np.ptp(returns) > 1e-6 * np.abs(returns).max()
        require(differ, "--scale-rewards needs episodes of different returns: --no-scale-rewards")
        scales.append([1000 / np.ptp(returns)])
    return np.array(scales)


# --- TD3+BC (Fujimoto & Gu 2021) ---
class Transitions(NamedTuple):
    """Each seed's rows of the dataset: all it may draw from, or one batch."""

    observations: torch.Tensor  # (seeds, rows, obs_dim)
    actions: torch.Tensor  # (seeds, rows, act_dim), scaled to [-1, 1]
    rewards: torch.Tensor  # (seeds, rows)
    next_observations: torch.Tensor
    terminals: torch.Tensor  # (seeds, rows), 1 = no bootstrap


def make_transitions(dataset: Dataset, scaled_actions, rewards, device) -> Transitions:
    """All of them, for each seed, with actions scaled to [-1, 1] and rewards (seeds, N)."""
    share = lambda x: torch.from_numpy(x).to(device).expand(len(rewards), *x.shape)  # no copies
    return Transitions(
        observations=share(dataset.observations),
        actions=share(scaled_actions.clip(-1, 1)),
        rewards=torch.from_numpy(rewards).float().to(device),
        next_observations=share(dataset.next_observations),
        terminals=share(dataset.terminals.astype(np.float32)),
    )


def scale_actions(actions, low, high) -> np.ndarray:
    """From these bounds to [-1, 1]; the identity for D4RL."""
    low, high = low.astype(np.float64), high.astype(np.float64)
    half_width = np.where(high > low, (high - low) / 2, 1.0)
    return ((actions - (high + low) / 2) / half_width).astype(np.float32)


class Actor(MLP):
    """pi(s) in [-1, 1], (seeds, batch, act_dim). Policy, under Evaluation, is the same in numpy."""

    def forward(self, observations) -> torch.Tensor:
        return super().forward(observations).tanh()


class Agent:
    """All seeds' networks and optimizers; a checkpoint holds the state_dict() of each attribute."""

    def __init__(self, data: Transitions, generators: list, args: Args):
        device = data.observations.device
        obs_dim, act_dim = data.observations.shape[-1], data.actions.shape[-1]
        # The normalizer is of what the agent may see: with --rewards labeled, each seed's.
        observations = data.observations.double()
        mean = observations.mean(dim=1, keepdim=True).to(data.rewards)
        std = observations.std(dim=1, keepdim=True, correction=0).to(mean) + 1e-3  # as the original
        self.actor = Actor([obs_dim], mean, std, 256, act_dim, generators)
        # Critics also see actions, as they are: mean 0, std 1.
        q_mean = nn.functional.pad(mean, (0, act_dim), value=0.0)
        q_std = nn.functional.pad(std, (0, act_dim), value=1.0)
        self.q1 = StateActionMLP([obs_dim, act_dim], q_mean, q_std, 256, 1, generators)
        self.q2 = StateActionMLP([obs_dim, act_dim], q_mean, q_std, 256, 1, generators)
        for network in (self.actor, self.q1, self.q2):
            network.to(device)
        self.actor_target = deepcopy(self.actor)
        self.q1_target = deepcopy(self.q1)
        self.q2_target = deepcopy(self.q2)
        # Fused: one kernel for all parameters. Capturable: a CUDA graph may hold it.
        settings = {"fused": True, "capturable": device.type == "cuda"}
        rate = args.learning_rate
        q_parameters = [*self.q1.parameters(), *self.q2.parameters()]
        self.q_optimizer = torch.optim.Adam(q_parameters, rate, **settings)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), rate, **settings)


# A loss and its backward() are one function, so that compile_losses() can compile both together.
def critic_backward(agent: Agent, batch: Transitions, noise, args: Args):
    """Each seed's loss, (seeds,), and its gradients; `noise` is normal, of the actions' shape."""
    with torch.no_grad():
        clipped_noise = (noise * args.policy_noise).clamp(-args.noise_clip, args.noise_clip)
        next_actions = agent.actor_target(batch.next_observations) + clipped_noise
        next_actions = next_actions.clamp(-1, 1)
        next_q1 = agent.q1_target(batch.next_observations, next_actions)
        next_q2 = agent.q2_target(batch.next_observations, next_actions)
        next_q = torch.min(next_q1, next_q2)
        target = batch.rewards + args.gamma * (1 - batch.terminals) * next_q
    q1 = agent.q1(batch.observations, batch.actions)
    q2 = agent.q2(batch.observations, batch.actions)
    loss = (q1 - target).square().mean(dim=1) + (q2 - target).square().mean(dim=1)
    loss.sum().backward()  # a sum over seeds: each gets the gradient it would have alone
    return loss.detach()


def actor_backward(agent: Agent, batch: Transitions, args: Args):
    """-lambda Q1(s, pi(s)) + (pi(s) - a)^2 with lambda = alpha / mean |Q1|, and its gradients."""
    actions = agent.actor(batch.observations)
    q = agent.q1(batch.observations, actions)
    # |Q1| of these actions, as in the original's code; its paper writes Q(s, a).
    lambda_ = args.alpha / q.abs().mean(dim=1).detach()
    cloning = (actions - batch.actions).square().mean(dim=(1, 2))
    loss = -lambda_ * q.mean(dim=1) + cloning  # (seeds,)
    loss.sum().backward(inputs=list(agent.actor.parameters()))  # none for Q1's own parameters
    return loss.detach()


def update(agent: Agent, data: Transitions, generator, args: Args) -> dict:
    """`policy_freq` critic updates, then one of the actor and of all targets.

    On a GPU this Python runs only while it is recorded, and a number in it stays what it was then:
    what is to change is a tensor (or the run has --no-cuda-graph)."""
    for _ in range(args.policy_freq):
        batch = Transitions(*draw_batch(data, args.batch_size, generator))
        # Drawn here, since a compiled function takes no generator.
        noise = torch.randn(batch.actions.shape, generator=generator, device=generator.device)
        agent.q_optimizer.zero_grad()
        q_loss = critic_backward(agent, batch, noise, args)
        agent.q_optimizer.step()
    # On the last of these batches, as the original does.
    agent.actor_optimizer.zero_grad()
    pi_loss = actor_backward(agent, batch, args)
    agent.actor_optimizer.step()
    update_target(agent.actor_target, agent.actor, args.tau)
    update_target(agent.q1_target, agent.q1, args.tau)
    update_target(agent.q2_target, agent.q2, args.tau)
    return {"losses/critic_loss": q_loss, "losses/actor_loss": pi_loss}


@torch.no_grad()
def update_target(target: nn.Module, network: nn.Module, tau: float):
    for target_parameter, parameter in zip(target.parameters(), network.parameters()):
        target_parameter.lerp_(parameter, tau)  # target + tau * (network - target)


# --- Loading a dataset ---
BUNDLED = "halfcheetah-medium-replay-mini"  # self-collected, not D4RL: tests/data/README.md
SHA256 = {
    BUNDLED: "5ebac26957e14a6220d6f69990b73c41f2cc995b577b2d0bf49723c2c85d688b",
    "halfcheetah-medium-v2": "41324e8487a9556d8cfa4538827f8937f4d63dae3030825ebc9f3a726ed08ca0",
    "hopper-medium-v2": "5bdf1bc4a713c82941de44633df669b36c89850b652a25985166796d25cf71a0",
    "walker2d-medium-v2": "cf00f43add04c17fdfc2958dd581dea0851b2e5bedbe6fda073758a8f841aeda",
    "halfcheetah-medium-replay-v2": "48d494a4770c11f48260736dec090b78bdca8375647ed4d24bfa5b6610c7f683",
    "hopper-medium-replay-v2": "e121c5f7c9857a307baa9edc6a2c3b48e85fedb9ac316ecddd0f48ca7ef4e39b",
    "walker2d-medium-replay-v2": "e75de96a4f77acf7d4e0d6fdf0d7ccb177c26c44bb4388e4fd99f543ccfa18db",
    "halfcheetah-medium-expert-v2": "015db75dae5bbe8e94029b71fa0bafc2073365df0c94744e71031189f3f79c06",
    "hopper-medium-expert-v2": "9d51ad87f8c905be3880d84c6140bcdb7fbf39a19e046a237f238ba34fec9e26",
    "walker2d-medium-expert-v2": "6b8d7f868c45bbaedf460be797fb7271b46dee6ebe45fe7a64319f2005b59a04",
}
D4RL_TASKS = {  # with the returns of a random and of an expert policy
    "halfcheetah": {"simulator": "HalfCheetah-v4", "ref_min": -280.178953, "ref_max": 12135.0},
    "hopper": {"simulator": "Hopper-v4", "ref_min": -20.272305, "ref_max": 3234.3},
    "walker2d": {"simulator": "Walker2d-v4", "ref_min": 1.629008, "ref_max": 4592.3},
}
D4RL_URLS = [
    "https://rail.eecs.berkeley.edu/datasets/offline_rl/gym_mujoco_v2/",
    "https://huggingface.co/datasets/imone/D4RL/resolve/main/",  # when the first is down
]


def load_dataset(env_id=None, dataset_path=None) -> Dataset:
    """A D4RL, Minari, bundled or local HDF5 dataset; UserError if it cannot be trained on."""
    name = BUNDLED if env_id is None else env_id
    if dataset_path:
        name = Path(dataset_path).stem
        columns = read_hdf5(Path(dataset_path), follow_d4rl=False)
        task = {"simulator": env_id, "ref_min": 0.0, "ref_max": 100.0}
        prefix = str(env_id).split("-")[0]
        if prefix in D4RL_TASKS and env_id not in gym.registry:
            task = D4RL_TASKS[prefix]
    elif name in SHA256:
        columns = read_hdf5(find_file(name), follow_d4rl=True)
        task = D4RL_TASKS[name.split("-")[0]]
    else:
        columns, task = load_minari(name)
    rewards = columns["rewards"]
    require(len(rewards) > 0, f"{name} has no transitions")
    require(len(set(map(len, columns.values()))) == 1, f"{name} has columns of different lengths")
    for key in ("observations", "actions", "next_observations"):
        require(np.isfinite(columns[key]).all(), f"{name} has NaN or inf in {key}")
    require(not np.isinf(rewards).any(), f"{name} has inf in rewards (NaN means no label)")
    zeros = np.count_nonzero(rewards == 0)
    known = np.count_nonzero(~np.isnan(rewards))
    if known / 10 < zeros < known:
        warn(f"{zeros / known:.1%} of the known rewards are exactly 0: if 0 is no label, write NaN")
    returns = np.bincount(columns["episode_ids"], rewards)
    print(f"dataset       {name}: {len(rewards):,} transitions, {len(returns):,} episodes")
    print(f"terminals     {columns['terminals'].sum():,.0f}; at other ends, episodes were cut off")
    if known == len(rewards):  # something to hold an agent against
        print(f"log           return {returns.mean():.1f}, of its best episode {returns.max():.1f}")
    return Dataset(**columns, name=name, **task)


def find_file(name) -> Path:
    """The bundled file, or a D4RL file in the d4rl package's cache, downloaded if missing."""
    if name == BUNDLED:
        path, urls = Path(__file__).resolve().parent / "tests" / "data" / f"{name}.hdf5", []
    else:
        folder = Path(os.environ.get("D4RL_DATASET_DIR", "~/.d4rl/datasets")).expanduser()
        path, urls = folder / (name.removesuffix("-v2").replace("-", "_") + "-v2.hdf5"), D4RL_URLS
    for url in urls:
        if not path.exists():
            print(f"downloading   {url}{path.name}")
            path.parent.mkdir(parents=True, exist_ok=True)
            socket.setdefaulttimeout(30)  # seconds without a byte
            try:
                torch.hub.download_url_to_file(url + path.name, str(path), SHA256[name])
            except Exception as error:  # noqa: BLE001 (no network, wrong bytes)
                print(f"failed        {error}")
    require(path.exists(), f"there is no {path}: put it there by hand, or use {BUNDLED}")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    require(found == SHA256[name], f"{path} has SHA-256 {found}, not {SHA256[name]}: delete it")
    return path


def read_hdf5(path, follow_d4rl) -> dict:
    """The columns of Dataset from a D4RL-schema file, by D4RL's rule or the one for users' logs."""
    try:
        arrays = read_columns(path)
        is_kept, arrays["next_observations"], ends = find_transitions(arrays, follow_d4rl)
    except Exception as error:  # h5py has no common error for damaged files
        raise UserError(f"{path}: {error}") from error
    dropped = arrays["rewards"][~is_kept]
    if len(dropped) > 0 and not follow_d4rl:
        lost = np.count_nonzero(~np.isnan(dropped))
        print(f"dropped       {len(dropped):,} rows without a next observation, {lost:,} rewards")
    columns = {name: arrays[name][is_kept] for name in Dataset._fields[:5]}
    episode_ids = np.cumsum(ends) - ends  # the number of ends before each row
    _, columns["episode_ids"] = np.unique(episode_ids[is_kept], return_inverse=True)  # from 0 on
    return columns


def read_columns(path) -> dict:
    """All rows of the columns that are known: vectors float32, all others float64."""
    arrays = {}
    with h5py.File(path) as file:
        missing = {"observations", "actions", "rewards", "terminals"} - file.keys()
        require(not missing, f"has no {', '.join(sorted(missing))}")
        others = {"truncations", "truncated", "dones", "done", "episode_terminals"} & file.keys()
        is_clear = "timeouts" in file or not others
        require(is_clear, f"has no timeouts, but {others}: rename what marks cut-off episodes")
        for name in file.keys() & {*Dataset._fields[:5], "timeouts"}:
            column = file[name]
            # HDF5 reads as zeros what was never written, or lies in a file that is missing.
            is_whole = column.id.get_space_status() == h5py.h5d.SPACE_STATUS_ALLOCATED
            is_written = is_whole and not column.is_virtual and not column.external
            require(is_written or len(column) == 0, f"has unwritten rows in {name} (no label: NaN)")
            arrays[name] = column.astype(np.float64)[()]
    for name in arrays.keys() & {"rewards", "terminals", "timeouts"}:
        arrays[name] = arrays[name].reshape(-1)  # D4RL's replay files have rewards of (rows, 1)
    for name in arrays.keys() & {"terminals", "timeouts"}:
        require(np.isin(arrays[name], [0, 1]).all(), f"has other numbers than 0 and 1 in {name}")
    for name in arrays.keys() & {"observations", "actions", "next_observations"}:
        arrays[name] = to_float32(name, arrays[name])
    lengths = {name: len(array) for name, array in arrays.items()}
    require(len(set(lengths.values())) == 1, f"has columns of different lengths: {lengths}")
    return arrays


def to_float32(name, array) -> np.ndarray:
    """For the networks. Says where that loses information, or a sensor's glitch will."""
    require(array.ndim == 2, f"has {name} of shape {array.shape}, not (rows, dim)")
    for j, column in enumerate(array.T if len(array) > 0 else []):
        low, middle, high = np.percentile(column, [1, 50, 99])
        width = high - low  # of the middle 98%; 0 says nothing
        if width > 0 and np.ptp(column) > 100 * width:
            row = np.abs(column - middle).argmax()
            warn(f"{name}, column {j}: a glitch? Row {row:,} has {column[row]:g}")
        if width > 0 and np.spacing(np.float32(abs(middle))) > width / 100:
            warn(f"{name}, column {j}: subtract {middle:g}, too large for float32")
    return array.astype(np.float32)


def find_transitions(arrays, follow_d4rl) -> tuple:
    """Of each row: is its next observation known, what is it, does an episode end there."""
    observations, terminals = arrays["observations"], arrays["terminals"] == 1
    following = np.roll(observations, -1, axis=0)  # the next row's; after the last row, the first
    is_given = "next_observations" in arrays and not follow_d4rl
    next_observations = arrays["next_observations"] if is_given else following
    require(next_observations.shape == observations.shape, "has misshapen next_observations")
    has_own_next = (next_observations != following).any(axis=1) & is_given
    # A terminal row's next observation counts for nothing; do not take another episode's.
    is_foreign = (terminals & ~has_own_next)[:, None]
    next_observations = np.where(is_foreign, observations, next_observations)
    timeouts = arrays.get("timeouts", has_own_next) == 1
    ends = terminals | timeouts | has_own_next
    has_ends = timeouts.any() or ends[-1:].all()
    require(has_ends, "has no timeouts, not even its last row: 1 where an episode was cut off")
    # After a cut comes another episode, whatever an environment that resets itself logged as next.
    is_last = np.arange(len(timeouts)) == len(timeouts) - 1
    is_kept = has_own_next | ~(timeouts | is_last)
    if not follow_d4rl:  # published scores go without these rows
        is_kept |= terminals
    if np.count_nonzero(has_own_next & ~terminals) > len(has_own_next) / 2:
        warn("rows are in no order: all count as one episode")
        ends[:] = False
    return is_kept, next_observations, ends


def load_minari(env_id) -> tuple:
    """The columns of Dataset, downloaded if missing; its simulator, returns of scores 0 and 100."""
    try:
        dataset = minari.load_dataset(env_id, download=True)
        for space in (dataset.observation_space, dataset.action_space):
            require(isinstance(space, gym.spaces.Box), f"need continuous vectors, not {space}")
        episodes = list(dataset.iterate_episodes())
        columns = {
            "observations": [episode.observations[:-1] for episode in episodes],
            "actions": [episode.actions for episode in episodes],
            "next_observations": [episode.observations[1:] for episode in episodes],
        }
        columns = {name: to_float32(name, np.concatenate(x)) for name, x in columns.items()}
        columns["rewards"] = np.concatenate([np.ravel(e.rewards) for e in episodes], dtype=float)
        columns["terminals"] = np.concatenate([e.terminations for e in episodes], dtype=float)
    except Exception as error:  # no network, damaged files: Minari has no common error for them
        others = f"{', '.join(SHA256)}; a Gymnasium id needs --dataset-path"
        raise UserError(f"no dataset {env_id}: {error} (beside Minari's: {others})") from error
    columns["episode_ids"] = np.repeat(np.arange(len(episodes)), [len(e.actions) for e in episodes])
    task = {"simulator": dataset if dataset.env_spec else None}
    for name, unknown in (("ref_min", 0.0), ("ref_max", 100.0)):
        task[name] = dataset.storage.metadata.get(f"{name}_score", unknown)
    return columns, task


# --- Evaluation ---
mujoco.set_mju_user_warning(lambda message: None)
gym.logger.min_level = gym.logger.ERROR  # -v4 is outdated, but its scores compare with D4RL's


def check_simulator(simulator, observations, actions) -> tuple:
    """Its spec and the bounds of its actions; without a simulator, None and those of the log."""
    if simulator is None:
        return None, actions.min(axis=0), actions.max(axis=0)
    try:
        is_minari = isinstance(simulator, minari.MinariDataset)
        env = simulator.recover_environment(eval_env=True) if is_minari else gym.make(simulator)
        env.reset(seed=100)
        observation, reward, _, _, _ = env.step(env.action_space.sample())
        float(reward)
    except Exception as error:  # a user's environment may raise anything
        raise UserError(f"the simulator fails: {error!r}") from error
    name, space = env.spec.id, env.action_space
    fits = np.shape(observation) == observations.shape[1:] and space.shape == actions.shape[1:]
    require(fits, f"the observations or actions of {name} have another shape than the dataset's")
    is_bounded = space.dtype.kind == "f" and space.is_bounded()
    require(is_bounded, f"{name} needs float actions with bounds, not {space}")
    largest = np.abs(scale_actions(actions, space.low, space.high)).max()
    require(largest < 1 + 1e-4, f"the dataset has actions beyond the bounds of {name}: {space}")
    return env.spec, space.low, space.high


class Policy(dict):
    """One seed's actor in numpy, a dict of its arrays: (obs_dim,) or (n, obs_dim) -> actions."""

    def __call__(self, observations: np.ndarray) -> np.ndarray:
        low, high = np.float64(self["low"]), np.float64(self["high"])
        actions = low + (np.float64(self.network(observations)) + 1) / 2 * (high - low)
        return actions.clip(low, high).astype(self["low"].dtype)

    def network(self, observations: np.ndarray) -> np.ndarray:
        x = (np.float32(observations) - self["mean"][0]) / self["std"][0]
        x = np.maximum(x @ self["layer1.weight"] + self["layer1.bias"][0], 0)
        x = np.maximum(x @ self["layer2.weight"] + self["layer2.bias"][0], 0)
        return np.tanh(x @ self["layer3.weight"] + self["layer3.bias"][0])


@torch.no_grad()
def write_policies(actor: Actor, observations, low, high, paths: list, update: int):
    """A file for each seed's actor as it is now, which it is compared with on some observations."""
    each_seed = torch.from_numpy(observations).to(actor.mean).expand(len(paths), -1, -1)
    expected = actor(each_seed).cpu().numpy()
    require(np.isfinite(expected).all(), f"diverged by update {update:,}: lower --learning-rate")
    for k, path in enumerate(paths):
        weights = {name: tensor[k].cpu().numpy() for name, tensor in actor.state_dict().items()}
        policy = Policy(weights, low=low, high=high)
        same = np.allclose(policy.network(observations), expected[k], atol=1e-3)
        assert same, "Policy.network() is not what Actor computes: change both"
        np.savez(path, **policy)


def run_episode(job: tuple) -> float:
    """Return of one deterministic episode, for a policy's file, a simulator and a seed."""
    path, env_spec, seed = job
    policy, env = Policy(np.load(path)), gym.make(env_spec)
    observation, _ = env.reset(seed=seed)
    episode_return = 0.0
    for _ in range(env_spec.max_episode_steps or 10_000):
        observation, reward, terminated, truncated, _ = env.step(policy(observation))
        episode_return += float(reward)
        if terminated or truncated:
            break
    return episode_return


def evaluate(play, paths: list, env_spec, dataset: Dataset, num_episodes: int) -> tuple:
    """Mean return and score of each policy, (seeds,); `play` is map, or that of the workers."""
    starts = range(100, 100 + num_episodes)  # the same for every seed, at every evaluation
    jobs = [(path, env_spec, start) for path in paths for start in starts]
    returns = list(play(run_episode, jobs))
    returns = np.reshape(returns, (len(paths), num_episodes)).mean(axis=1)
    scores = 100 * (returns - dataset.ref_min) / (dataset.ref_max - dataset.ref_min)
    return returns.tolist(), scores.tolist()


def start_workers(num_workers):
    os.environ["OMP_NUM_THREADS"] = "1"  # for workers, which read it when they start
    workers = ProcessPoolExecutor(num_workers, get_context("spawn"), end_with_parent)
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # workers leave Ctrl-C to this process
    workers.map(abs, range(num_workers))  # starts them
    signal.signal(signal.SIGINT, handler)
    return workers


def end_with_parent():
    """In a worker: end when the training process ends, even if it is killed."""

    def wait():
        parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


# --- Run directory ---
# Arguments a resumed run may change: they leave results alone. The dataset's content is compared.
MAY_CHANGE = {"resume", "run_dir", "dataset_path", "eval_workers", "track", "compile"}
MAY_CHANGE |= {"cuda_graph", "num_updates", "script_sha256"}


def make_config(args: Args, dataset: Dataset, label_rows, device) -> dict:
    """What config.json records, and what a resumed run must find unchanged."""
    config = json.loads(json.dumps(vars(args), default=str))  # paths become text
    config["device"] = device.type
    content = b"".join(array.tobytes() for array in (*dataset[:6], label_rows))
    config["dataset"] = hashlib.sha256(content).hexdigest()
    config["script_sha256"] = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    return config


def read_checkpoint(path: Path, config: dict, device) -> dict:
    """The state to go on from; UserError if it is of other arguments."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        before = state["config"]
    except Exception as error:  # of whatever kind: the file is at fault
        raise UserError(f"cannot read {path}, delete it to start anew: {error}") from error
    for name, new in config.items():
        old = before.get(name)
        require(name in MAY_CHANGE or old == new, f"{path} has another {name}: {old}, now {new}")
    if before["script_sha256"] != config["script_sha256"]:
        warn("the script has changed since this run began")
    return state


def start_tracking(run_dir: Path, config: dict, run_id: str | None):
    """A Weights & Biases run, the same one after a resume."""
    import wandb

    try:
        return wandb.init(id=run_id, resume="allow", name=run_dir.name, config=config, dir=run_dir)
    except wandb.Error as error:  # no key, no network
        raise UserError(f"Weights & Biases: {error} (or set WANDB_MODE=offline)") from error


def mean_and_std(values):
    return f"{np.mean(values):.1f}" + (f" ± {np.std(values):.1f}" if len(values) > 1 else "")


def write_result(run_dir: Path, metric: str, scores: list, num_seeds: int, result: dict):
    """The last evaluation and the mean of the last ten, never the best."""
    text = "trained, not evaluated"
    if scores:
        values = np.reshape(scores, (-1, num_seeds))  # (evaluations, seeds)
        last, last_10 = values[-1], values[-10:].mean(axis=0)
        text = f"{metric} {mean_and_std(last)} over {len(last)} seed(s)"
        result |= {"metric": metric, "per_seed": last.tolist(), "mean": last.mean()}
        result |= {"last_10_mean": last_10.mean(), "last_10_std": last_10.std(), "std": last.std()}
    result["versions"] = {m.__name__: m.__version__ for m in (torch, np, gym, mujoco, minari)}
    result = json.loads(json.dumps(result), parse_constant=lambda name: None)  # NaN: null
    (run_dir / "result.json").write_text(json.dumps(result, indent=2))
    print(f"result        {text}, in {run_dir}/policy_seed*.npz")


# --- Speed ---
def choose_device(args: Args) -> torch.device:
    """A GPU only if it works: it may be too old for this PyTorch, busy, or full."""
    device = torch.device("cpu")
    if args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available()):
        try:
            torch.ones(1, device="cuda").add(1).item()
            torch.cuda.set_stream(torch.cuda.Stream())  # record() needs one that is not the default
            device = torch.device("cuda")
        except (RuntimeError, AssertionError) as error:
            require(args.device == "auto", f"--device cuda does not work: {error}")
            warn(f"the GPU does not work, going on without: {error}")
    # On x86, medium takes oneDNN, often the faster library, and is float32 unless there is AMX.
    if device.type == "cpu" and torch.cpu.get_capabilities().get("amx_bf16") is False:
        torch.set_float32_matmul_precision("medium")
    return device


def compile_losses(agent: Agent, data: Transitions, args: Args) -> bool:
    """Compile the functions that take the time, if that is wanted, pays (22 s), and works."""
    global critic_backward, actor_backward
    if args.compile == "off" or (args.compile == "auto" and args.num_updates < 25_000):
        return False
    as_written = critic_backward, actor_backward
    torch._dynamo.config.trace_autograd_ops = True  # private: lets backward() be compiled
    warnings.filterwarnings("ignore", "TensorFloat32")  # not wanted
    compiled = [torch.compile(f, fullgraph=True, dynamic=False) for f in as_written]
    critic_backward, actor_backward = compiled
    try:  # now, on a copy of the agent
        update(deepcopy(agent), data, torch.Generator(data.rewards.device), args)
    except Exception as error:  # noqa: BLE001 (compilers fail in many ways)
        critic_backward, actor_backward = as_written
        warn(f"cannot compile, going on without: {error}")
        return False
    return True


def record(step, generator):
    """A function that does what step() does: its hundred kernels, on the same memory, in one go."""
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)  # each replay moves it on
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            result = step()  # is recorded, computes nothing
    except Exception as error:  # noqa: BLE001
        warn(f"cannot record, going on without: {error}")
        step.failed_graph = graph  # kept, since the generator still knows it
        return step

    def replay():
        graph.replay()  # overwrites the tensors of `result`
        return result

    return replay


# --- The experiment ---
def check_arguments(args: Args):
    """What would otherwise fail late, or not at all."""
    names = ["num_updates", "eval_freq", "policy_freq", "batch_size", "num_seeds", "eval_episodes"]
    for name in [*names, "reward_hidden_dim", "reward_epochs", "reward_batch_size"]:
        require(getattr(args, name) > 0, f"--{name.replace('_', '-')} must be at least 1")
    for name in ("alpha", "policy_noise", "noise_clip", "eval_workers"):
        require(0 <= vars(args)[name] < math.inf, f"--{name.replace('_', '-')} must be 0 or more")
    for name in ("learning_rate", "reward_learning_rate"):
        require(0 < getattr(args, name) < math.inf, f"--{name.replace('_', '-')} must be above 0")
    for count in (args.num_updates, args.eval_freq):
        require(count % args.policy_freq == 0, f"{count} updates are no multiple of --policy-freq")
    require(0 <= args.gamma <= 1 and 0 <= args.tau <= 1, "--gamma and --tau must be in [0, 1]")
    require(0 <= args.seed < 2**31, "--seed must be at least 0 and below 2**31")
    fraction = args.label_fraction
    require(fraction is None or 0 < fraction <= 1, "--label-fraction must be in (0, 1]")
    require(args.run_dir != Path(), "--run-dir is empty, or the current folder")
    require(args.run_dir or not args.resume, "--resume needs the --run-dir of the run to resume")
    taken = args.run_dir and not args.resume and (args.run_dir / "config.json").exists()
    require(not taken, f"{args.run_dir} already holds a run: use --resume or another --run-dir")


def main(args: Args):
    check_arguments(args)
    seeds = range(args.seed, args.seed + args.num_seeds)
    device = choose_device(args)

    # 1. The transitions, and the few whose reward each seed may see.
    dataset = load_dataset(args.env_id, args.dataset_path)
    observations, actions = dataset.observations, dataset.actions
    env_spec, low, high = check_simulator(dataset.simulator, observations, actions)
    fraction = args.label_fraction
    if fraction is None:  # the paper's 1% of its datasets, all that is known of your own
        fraction = 0.01 if args.dataset_path is None and dataset.name in SHA256 else 1.0
    label_rows = choose_labels(dataset.rewards, fraction, seeds)
    labels = dataset.rewards[label_rows]  # (seeds, labels)
    print(f"rewards       {args.rewards}, {labels.shape[1]:,} labels, {len(seeds)} seed(s)")
    print(f"simulator     {env_spec.id + ', its own rewards' if env_spec else 'none: no scores'}")
    name = f"{dataset.name}__td3bc_imputed__{args.rewards}__{args.seed}"
    name = f"{name}__{datetime.now():%Y%m%d-%H%M%S-%f}".replace("/", "-").replace(":", "-")
    run_dir = args.run_dir or Path("runs") / name
    run_dir.mkdir(parents=True, exist_ok=args.run_dir is not None)
    print(f"run           {run_dir}")
    config = make_config(args, dataset, label_rows, device)
    resumed = None
    if args.resume and (run_dir / "checkpoint.pt").exists():
        resumed = read_checkpoint(run_dir / "checkpoint.pt", config, device)
        if resumed["updates_done"] >= args.num_updates and (run_dir / "result.json").exists():
            return print(f"{run_dir} holds a finished run: see its result.json and scores.csv")

    # 2. What stands for the other rewards: the reward model's predictions (Eq. 4, Eq. 5).
    generator = torch.Generator(device).manual_seed(args.seed)  # of all that training draws
    reward_model, predicted, r2 = None, dataset.rewards, []
    if labels.shape[1] == len(dataset.rewards):
        require(args.rewards in ("imputed", "oracle"), "no reward is hidden: see --label-fraction")
        print("reward model  none: the log has every reward (to hide some: --label-fraction 0.01)")
    elif args.rewards == "imputed":
        dim, generators = args.reward_hidden_dim, make_generators(seeds, stream=1)
        reward_model = RewardModel(observations, actions, labels, dim, generators).to(device)
        if resumed:
            reward_model.load_state_dict(resumed["reward_model"])
        else:
            examples = observations[label_rows], actions[label_rows], labels
            settings = args.reward_epochs, args.reward_learning_rate, args.reward_batch_size
            fit_reward_model(reward_model, examples, *settings, generator)
        predicted = predict_rewards(reward_model, observations, actions)
        returns = np.bincount(dataset.episode_ids, predicted.mean(axis=0))
        print(f"log, imputed  return {returns.mean():.1f}, of its best episode {returns.max():.1f}")
        r2 = imputation_r2(predicted, dataset.rewards, label_rows)
    rewards = complete_rewards(args.rewards, dataset.rewards, label_rows, predicted)
    if args.scale_rewards:
        rewards *= reward_scale(rewards, label_rows, dataset.episode_ids, args.rewards == "labeled")

    # 3. The agent, and the transitions it draws from.
    data = make_transitions(dataset, scale_actions(actions, low, high), rewards, device)
    if args.rewards == "labeled":
        data = Transitions(*take_rows(data, torch.from_numpy(label_rows).to(device)))
    agent = Agent(data, make_generators(seeds, stream=2), args)
    state = resumed or {"updates_done": 0, "scores": [], "track_id": None}
    first_update, scores = state["updates_done"], state["scores"]
    if resumed:
        generator.set_state(resumed["generator"].cpu())
        for name, part in vars(agent).items():
            part.load_state_dict(resumed["agent"][name])
    is_compiled = compile_losses(agent, data, args)
    print(f"speed         {device.type}, {'compiled' if is_compiled else 'not compiled'}")

    # 4. Training, and every eval_freq updates an evaluation and a checkpoint.
    tracker = start_tracking(run_dir, config, state["track_id"]) if args.track else None
    (run_dir / "config.json").write_text(json.dumps(config, indent=2))
    play = start_workers(args.eval_workers).map if args.eval_workers else map
    header = "update,seed,return,score"
    metric = "return" if (dataset.ref_min, dataset.ref_max) == (0, 100) else "score"
    paths = [run_dir / f"policy_seed{seed}.npz" for seed in seeds]
    step = lambda: update(agent, data, generator, args)
    started, speed = time.monotonic(), 0.0
    counts = range(first_update + args.policy_freq, args.num_updates + 1, args.policy_freq)
    for updates_done in tqdm(counts, unit="update", unit_scale=args.policy_freq, disable=None):
        losses = step()
        # After ten real updates, Adam has made its state and the compiler its kernels.
        is_warm = updates_done == first_update + 10 * args.policy_freq
        if is_warm and device.type == "cuda" and args.cuda_graph:
            step = record(step, generator)
        if updates_done % args.eval_freq != 0 and updates_done != args.num_updates:
            continue
        write_policies(agent.actor, observations[:100], low, high, paths, updates_done)
        metrics = {name: loss.mean().item() for name, loss in losses.items()}
        text = ""
        if env_spec:
            returns, values = evaluate(play, paths, env_spec, dataset, args.eval_episodes)
            scores += [[updates_done, *row] for row in zip(seeds, returns, values)]
            np.savetxt(run_dir / "scores.csv", scores, "%.17g", ",", header=header, comments="")
            metrics[f"charts/{metric}"] = np.mean(values)
            text = f"   {metric} {mean_and_std(values)}"
        if tracker:
            tracker.log(metrics, step=updates_done)
        speed = (updates_done - first_update) / (time.monotonic() - started)
        left = timedelta(seconds=round((args.num_updates - updates_done) / speed))
        tqdm.write(f"update {updates_done:>9,}{text}   {speed:,.0f} updates/s, {left} left")
        checkpoint = {
            "config": config,
            "updates_done": updates_done,
            "scores": scores,
            "reward_model": reward_model.state_dict() if reward_model else None,
            "agent": {name: part.state_dict() for name, part in vars(agent).items()},
            "generator": generator.get_state(),
            "track_id": tracker.id if tracker else None,
        }
        buffer = io.BytesIO()  # of a full disk, torch.save() itself says nothing clear
        torch.save(checkpoint, buffer)
        (run_dir / "checkpoint.tmp").write_bytes(buffer.getbuffer())
        os.replace(run_dir / "checkpoint.tmp", run_dir / "checkpoint.pt")  # never half of one

    # 5. The result: the last evaluation, never the best.
    result = {"reward_model": {"r2": r2}, "compiled": is_compiled, "updates_per_second": speed}
    write_result(run_dir, metric, [row[3] for row in scores], len(seeds), result)


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True, errors="replace")  # ± is no error in any locale
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C
    try:
        main(tyro.cli(Args, description=__doc__))
    except KeyboardInterrupt:
        print("stopped; to go on, repeat the command with --resume and the --run-dir named above")
        sys.exit(130)
    except (UserError, OSError, ImportError, BrokenExecutor, gym.error.Error) as error:
        print("error:", textwrap.shorten(str(error), 1000), file=sys.stderr)
        sys.exit(2)
