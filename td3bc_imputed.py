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

1. Load transitions; hide the rewards of all but 1% of them.
2. Fit a reward model f to that 1%, minimising the mean of (f(s, a) - r)^2 (Eq. 4). Every
   hidden reward becomes f(s, a), every other one stays as it is (Eq. 5).
3. Make a TD3+BC agent for every seed, and hand it the completed dataset.
4. Train all seeds at once, evaluating them in the simulator now and then.
5. Report the last evaluation.

The equations are those of Romeo & Bagdanov (2024), "Offline Reinforcement Learning with Imputed
Rewards". main(), at the end, takes these steps. iql_imputed.py is the twin of this file,
reward_model.py has the reward models alone.

    python td3bc_imputed.py --num-updates 20_000                               # bundled dataset
    python td3bc_imputed.py --env-id walker2d-medium-replay-v2 --num-seeds 5   # D4RL
    python td3bc_imputed.py --dataset-path log.hdf5                            # NaN = unlabelled
"""

import difflib
import functools
import hashlib
import io
import json
import math
import os
import shlex
import shutil
import signal
import socket
import sys
import threading
import time
import warnings
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from http.client import HTTPException
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import h5py
import minari
import mujoco
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import nn
from tqdm import tqdm


@dataclass
class Args:
    # Data

    env_id: str | None = None  # a D4RL name or a Minari id (none: the bundled dataset)
    dataset_path: Path | None = None  # a D4RL-schema HDF5 file; env_id is its simulator, if given
    eval_env_id: str | None = None  # another environment to evaluate in; its bounds scale actions

    # Rewards

    # imputed: hidden rewards are predicted; labeled: the agent sees only labelled transitions;
    # oracle: it sees the true rewards; zero, mean (controls): hidden rewards are 0, or the mean of
    # the labels.
    rewards: Literal["imputed", "labeled", "oracle", "zero", "mean"] = "imputed"
    label_fraction: float | None = None  # share of known rewards shown (0.01; 1 if some are NaN)
    scale_rewards: bool = False  # multiply by 1000 / (range of episode returns), as IQL does
    reward_model: Literal["mlp", "gp"] = "mlp"  # mlp: the paper's; gp: Gaussian process, few labels
    reward_hidden_dim: int = 256  # width of the MLP's two hidden layers
    reward_epochs: int = 300  # the MLP's passes over the labelled transitions
    reward_learning_rate: float = 1e-4  # Adam's, for the MLP
    reward_batch_size: int = 64  # labelled transitions in a batch

    # TD3+BC

    alpha: float = 2.5  # weight of Q against behaviour cloning; 0 is cloning alone
    policy_noise: float = 0.2  # std of the noise on the target policy's actions
    noise_clip: float = 0.5  # bound of that noise
    policy_freq: int = 2  # critic updates for each update of the actor and the targets
    learning_rate: float = 3e-4  # Adam's, for actor and critics
    batch_size: int = 256  # transitions in a batch, for each seed
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # step of the targets towards the trained networks
    num_updates: int = 1_000_000  # critic updates

    # Seeds and speed

    seed: int = 0  # the first seed
    num_seeds: int = 1  # seeds trained at once: seed, seed + 1, ...; batches depend on how many
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes the GPU if there is one
    compile: Literal["auto", "on", "off"] = "auto"  # compile what takes the time; auto: if it pays
    matmul_precision: Literal["auto", "highest", "high", "medium"] = "auto"  # auto: fastest float32
    cuda_graph: bool = True  # on a GPU, record an update as a CUDA graph and replay it

    # Evaluation and output

    eval_freq: int = 5_000  # updates between two evaluations
    eval_episodes: int = 10  # deterministic episodes for each seed
    eval_workers: int = 0  # processes that evaluate while training goes on (0: training waits)
    run_dir: Path | None = None  # where to write (runs/...)
    resume: bool = False  # continue from the checkpoint in run_dir, or start if there is none
    track: bool = False  # log to Weights & Biases
    log_freq: int = 1_000  # with --track, updates between two logs of the losses


class UserError(Exception):
    """What the user can put right: shown as one line, exit code 2."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


# --- Networks, and the data they learn from ---
class Dataset(NamedTuple):
    """N transitions in the log's order, and where a policy trained on them can be evaluated."""

    observations: np.ndarray  # (N, obs_dim), float32
    actions: np.ndarray  # (N, act_dim), float32, in the log's own units
    rewards: np.ndarray  # (N,), float32, NaN where nobody knows it
    next_observations: np.ndarray  # (N, obs_dim), float32
    terminals: np.ndarray  # (N,), float32, 1 = the task ended: no bootstrap
    episode_ids: np.ndarray  # (N,), int64, consecutive from 0
    # Where to evaluate; a simulator also gives the bounds from which actions are scaled.
    env: object  # a Gymnasium id, a MinariDataset, which can make its simulator, or None
    ref_min: float  # return of score 0; NaN: raw returns are reported
    ref_max: float  # return of score 100
    name: str


class BatchedLinear(nn.Module):
    """nn.Linear once per seed, all in one product: (seeds, batch, in_dim) -> (..., out_dim)."""

    def __init__(self, in_dim: int, out_dim: int, generators: list[torch.Generator]):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(len(generators), in_dim, out_dim))
        self.bias = nn.Parameter(torch.empty(len(generators), 1, out_dim))
        # nn.Linear's initialisation, each seed from its own generator: it starts from the same
        # weights whether it runs alone or among others.
        bound = in_dim**-0.5
        for k, generator in enumerate(generators):
            nn.init.uniform_(self.weight.data[k], -bound, bound, generator=generator)
            nn.init.uniform_(self.bias.data[k], -bound, bound, generator=generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(x, self.weight) + self.bias


def join(widths: list[int], *inputs: torch.Tensor) -> torch.Tensor:
    """Inputs side by side, (seeds, batch, sum of widths); an error if the widths are wrong."""
    found = [x.shape[-1] for x in inputs]
    assert found == widths, f"inputs have widths {found}, not {widths}"
    return torch.cat(inputs, dim=-1)


class MLP(nn.Module):
    """Two hidden layers on normalised inputs, once per seed; `widths` are those of its inputs."""

    def __init__(self, widths: list[int], mean, std, hidden_dim: int, out_dim: int, generators):
        super().__init__()
        self.widths = widths  # [obs_dim], or [obs_dim, act_dim]
        # The normaliser is part of the network, so that a saved network is complete.
        self.register_buffer("mean", mean)  # (seeds, 1, in_dim); of a reward model (in_dim,)
        self.register_buffer("std", std)
        self.layer1 = BatchedLinear(sum(widths), hidden_dim, generators)
        self.layer2 = BatchedLinear(hidden_dim, hidden_dim, generators)
        self.layer3 = BatchedLinear(hidden_dim, out_dim, generators)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Takes observations (seeds, batch, obs_dim), or observations and actions."""
        x = (join(self.widths, *inputs) - self.mean) / self.std
        x = F.relu(self.layer1(x))
        x = F.relu(self.layer2(x))
        return self.layer3(x)


def make_generators(seeds: range, stream: int) -> list[torch.Generator]:
    """One for each seed; the reward model (stream 1) and the agent (2) draw different numbers."""
    return [torch.Generator().manual_seed(1_000_003 * stream + seed) for seed in seeds]


def mean_and_std(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each column's mean and std, in float64: float32 loses digits if the mean is far from 0."""
    std, mean = torch.std_mean(rows.double(), dim=0, correction=0)
    return mean, std


def gather(tensors: list | tuple, rows: torch.Tensor) -> list[torch.Tensor]:
    """Each seed's rows: tensors (seeds, N, ...), rows (seeds, batch) -> (seeds, batch, ...)."""
    seed_index = torch.arange(len(rows), device=rows.device).unsqueeze(1)  # beside rows: (seeds, 1)
    return [tensor[seed_index, rows] for tensor in tensors]


def make_adam(parameters, learning_rate: float | torch.Tensor) -> torch.optim.Adam:
    """Fused: one kernel for all parameters. Capturable: a CUDA graph, if any, may hold it."""
    return torch.optim.Adam(parameters, lr=learning_rate, fused=True, capturable=True)


# --- Reward model (Romeo & Bagdanov 2024) ---
def split_labels(rewards: np.ndarray, fraction: float | None, seeds: range) -> np.ndarray:
    """Draw the transitions whose reward each seed may see: their row numbers, (seeds, labels)."""
    known = np.flatnonzero(~np.isnan(rewards))
    require(len(known) > 0, "no transition is labelled: every reward is NaN")
    if fraction is None:  # the paper's 1%; of a log that people labelled, every label
        fraction = 0.01 if len(known) == len(rewards) else 1.0
    num_labels = max(1, round(fraction * len(known)))
    draws = [np.random.default_rng(seed).choice(known, num_labels, replace=False) for seed in seeds]
    return np.sort(draws, axis=1)


class RewardModel(nn.Module):
    """f(s, a) of each seed in the rewards' own unit; self.model predicts standardised rewards.

    `labeled` are the row numbers of each seed's labels, (seeds, labels), from split_labels()."""

    def __init__(self, dataset: Dataset, labeled: np.ndarray, generators, args):
        super().__init__()
        check_labels(dataset, labeled)
        labels = torch.from_numpy(dataset.rewards[labeled])  # (seeds, labels)
        reward_mean, reward_std = mean_and_std(labels.T)  # (seeds,)
        # Float64, so that standardising labels that lie far from 0 loses no digits.
        self.register_buffer("reward_mean", reward_mean.unsqueeze(1))
        self.register_buffer("reward_std", reward_std.unsqueeze(1))
        # Observations and actions are known without labels, so the normaliser uses all of them. The
        # std of a feature that is nearly constant is tiny: take at least 1/1000 of its range.
        observations, actions = map(torch.from_numpy, (dataset.observations, dataset.actions))
        widths = [observations.shape[1], actions.shape[1]]
        mean, std = mean_and_std(observations)
        std = torch.maximum(std, (observations.amax(dim=0) - observations.amin(dim=0)) / 1000)
        # Actions by their range in the log: there may be no simulator that knows their bounds.
        low, high = actions.amin(dim=0), actions.amax(dim=0)
        mean = torch.cat([mean, (low + high) / 2])
        std = torch.cat([std, (high - low) / 2])
        std[std == 0] = 1  # an input that never changes
        mean, std = mean.float(), std.float()
        if args.reward_model == "gp":
            self.model = GaussianProcess(widths, mean, std, *labeled.shape)
        else:
            self.model = MLP(widths, mean, std, args.reward_hidden_dim, 1, generators)

    def forward(self, observations: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """(seeds, batch, ...) -> (seeds, batch)."""
        return self.reward_mean + self.reward_std * self.model(observations, actions).squeeze(-1)


def check_labels(dataset: Dataset, labeled: np.ndarray) -> None:
    differ = (np.ptp(dataset.rewards[labeled], axis=1) > 0).all()
    require(differ, f"a seed's {labeled.shape[1]} labelled rewards are all equal: label more")


# A loss and its backward() are one function, so that both are compiled together: under Speed, a
# wrapper that may compile it takes over its name (reward_backward = compiled(reward_backward)).
def reward_backward(model: MLP, observations, actions, rewards) -> None:
    """Eq. 4 of each seed, and its gradients."""
    loss = (model(observations, actions).squeeze(-1) - rewards).square().mean(dim=1)  # (seeds,)
    loss.sum().backward()  # a sum over seeds: each gets the gradient it would have alone


def fit_reward_model(reward_model, dataset: Dataset, labeled, generators, args) -> None:
    """Minimise Eq. 4 on each seed's standardised labels, or condition the Gaussian process."""
    model, device = reward_model.model, reward_model.reward_mean.device
    # Each seed's labelled transitions: (seeds, labels, ...)
    observations = torch.from_numpy(dataset.observations[labeled]).to(device)
    actions = torch.from_numpy(dataset.actions[labeled]).to(device)
    rewards = torch.from_numpy(dataset.rewards[labeled]).to(device)
    rewards = ((rewards - reward_model.reward_mean) / reward_model.reward_std).float()
    if isinstance(model, GaussianProcess):
        return model.fit(observations, actions, rewards)

    optimizer = make_adam(model.parameters(), args.reward_learning_rate)
    num_seeds, num_labels = labeled.shape
    batch_size = min(args.reward_batch_size, num_labels)
    padded_length = math.ceil(num_labels / batch_size) * batch_size
    # `steps`, made by repeat() (under Speed), takes one step() at each next(steps): on a GPU by a
    # replay, which always reads the same memory. So the rows of a batch are written into `rows`.
    rows = torch.zeros(num_seeds, batch_size, dtype=torch.long, device=device)

    def step() -> None:
        batch = gather([observations, actions, rewards], rows)
        optimizer.zero_grad()
        reward_backward(model, *batch)
        optimizer.step()

    is_recorded = args.cuda_graph and device.type == "cuda"
    steps = repeat(step, [], is_recorded)  # []: step() draws no random numbers
    for _ in tqdm(range(args.reward_epochs), "reward model", leave=False, disable=None):
        order = torch.stack([torch.randperm(num_labels, generator=g) for g in generators])
        # All batches are of one size: the last one is filled up with labels of the first.
        order = torch.cat([order, order], dim=1)[:, :padded_length].to(device)
        for batch_rows in order.split(batch_size, dim=1):
            rows.copy_(batch_rows)
            next(steps)


@torch.no_grad()
def impute_rewards(reward_model: RewardModel, dataset: Dataset, labeled: np.ndarray) -> np.ndarray:
    """Eq. 5: a labelled transition keeps its reward, any other gets f(s, a); (seeds, N)."""
    device = reward_model.reward_mean.device
    rewards = np.empty((len(labeled), len(dataset.rewards)), np.float32)
    for start in range(0, len(dataset.rewards), 128):  # in chunks that a cache can hold
        chunk = slice(start, start + 128)
        observations = torch.from_numpy(dataset.observations[chunk]).to(device)
        actions = torch.from_numpy(dataset.actions[chunk]).to(device)
        each_seed = observations.expand(len(labeled), -1, -1), actions.expand(len(labeled), -1, -1)
        rewards[:, chunk] = reward_model(*each_seed).cpu()
    np.put_along_axis(rewards, labeled, dataset.rewards[labeled], axis=1)
    return rewards


def imputation_quality(imputed: np.ndarray, dataset: Dataset, labeled: np.ndarray) -> dict | None:
    """How well each seed's imputed rewards match the hidden ones, which no agent sees.

    None if no known reward is hidden; a measure is NaN or infinite where the values it compares
    are all equal. Returns are compared on episodes whose rewards are all known; an imputed return
    includes the labelled rewards."""
    known = ~np.isnan(dataset.rewards)
    if np.count_nonzero(known) == labeled.shape[1]:  # all that is known is labelled
        return None
    true_returns = np.bincount(dataset.episode_ids, dataset.rewards)
    whole = ~np.isnan(true_returns)  # NaN: an episode with unknown rewards
    quality = {"r2": [], "mse": [], "mae": [], "return_correlation": []}
    for rewards, rows in zip(imputed, labeled):
        hidden = known.copy()
        hidden[rows] = False
        true = dataset.rewards[hidden].astype(np.float64)
        error = rewards[hidden] - true
        returns = np.bincount(dataset.episode_ids, rewards)
        with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
            quality["r2"].append(float(1 - np.mean(error**2) / np.var(true)))
            correlation = np.corrcoef(true_returns[whole], returns[whole])[0, 1]
            quality["return_correlation"].append(float(correlation))
        quality["mse"].append(float(np.mean(error**2)))
        quality["mae"].append(float(np.mean(np.abs(error))))
    return quality


# --- Gaussian process: another reward model, for few labels (not in the paper) ---
class GaussianProcess(nn.Module):
    """Bayesian linear regression plus a smooth function, once per seed, for --reward-model gp.

    Equations are numbered as in Rasmussen & Williams (2006), Gaussian Processes for Machine
    Learning.

    f(x) = b + sum_j w_j x_j + g(x) for x = (s, a). Before any label is seen, all three terms are
    random: a constant b ~ N(0, 1); slopes w_j ~ N(0, linear * r_j), where `linear` is common to all
    inputs and r_j is the relevance of input j; and a smooth g (an RBF kernel with variance `smooth`
    and a length l_j for each input). Then f(x) and f(z) have the covariance k(x, z) =
        1 + linear * sum_j r_j x_j z_j + smooth * exp(-sum_j (x_j - z_j)^2 / (2 l_j^2)).
    Given labels y = f(X) + N(0, noise), the mean of f is
        f(x) = k(x, X) @ weights  with  weights = (k(X, X) + noise I)^-1 y.    (2.25)
    The numbers noise, linear, r_j, smooth and l_j are found by fit()."""

    def __init__(self, widths: list[int], mean, std, num_seeds: int, num_labels: int):
        super().__init__()
        self.widths = widths
        in_dim = len(mean)
        num_labels = min(num_labels, 2000)  # time grows with the cube
        self.register_buffer("mean", mean)  # (in_dim,), as in MLP
        self.register_buffer("std", std)
        # Filled by fit(); made here so that load_state_dict() finds them.
        self.register_buffer("x", torch.zeros(num_seeds, num_labels, in_dim).double())
        self.register_buffer("weights", torch.zeros(num_seeds, num_labels, 1).double())

        # Stored as logarithms, these numbers stay positive. They start at a guess for inputs and
        # labels of variance 1, with which the sums over the inputs are of order 1.
        one = torch.ones(num_seeds, 1, 1).double()
        each_input = torch.ones(num_seeds, 1, in_dim).double()
        self.log_noise = nn.Parameter(-1 * one)
        self.log_linear = nn.Parameter(-math.log(in_dim) * one)
        self.log_smooth = nn.Parameter(-1 * one)
        self.log_relevance = nn.Parameter(0 * each_input)  # r_j
        self.log_inverse_length = nn.Parameter(-math.log(in_dim) / 2 * each_input)  # 1 / l_j

    def inputs(self, observations: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        x = (join(self.widths, observations, actions) - self.mean) / self.std
        return x.double()  # float32 is too coarse to invert k(X, X)

    def kernel(self, x1: torch.Tensor, x2: torch.Tensor) -> torch.Tensor:
        """k of all pairs: (seeds, n, in_dim), (seeds, m, in_dim) -> (seeds, n, m)."""
        product = (x1 * self.log_relevance.exp()) @ x2.mT
        inverse_length = self.log_inverse_length.exp()
        distance = torch.cdist(x1 * inverse_length, x2 * inverse_length)
        rbf = torch.exp(-distance.square() / 2)
        return 1 + self.log_linear.exp() * product + self.log_smooth.exp() * rbf

    def cholesky(self, x: torch.Tensor) -> torch.Tensor:
        """The lower triangular L with L @ L.mT = k(X, X) + noise I."""
        noise = self.log_noise.exp() + 1e-4  # 1e-4: so that the matrix stays positive definite
        return torch.linalg.cholesky(self.kernel(x, x) + noise * torch.eye(x.shape[1]).to(x))

    def fit(self, observations, actions, rewards) -> None:
        """Find the most plausible parameters given the labels, then the weights."""
        x, y = self.inputs(observations, actions), rewards.double().unsqueeze(-1)
        # If there are more labels than self.x holds, take some from all over the log: they are
        # sorted by row.
        taken = torch.linspace(0, x.shape[1] - 1, self.x.shape[1]).long()
        x, y = x[:, taken], y[:, taken]
        # Of these, 500 are enough to find the parameters.
        few = torch.linspace(0, x.shape[1] - 1, min(x.shape[1], 500)).long()
        prior_means = [parameter.detach().clone() for parameter in self.parameters()]
        optimizer = torch.optim.Adam(self.parameters(), lr=0.1)
        for _ in range(100):
            # Equation 2.30, -log p(y | parameters) without its constant, for y ~ N(0, L L^T):
            # |L^-1 y|^2 / 2, plus log det(L L^T) / 2, which is the sum of log L_ii. Summed over
            # seeds, as every loss here.
            L = self.cholesky(x[:, few])
            white = torch.linalg.solve_triangular(L, y[:, few], upper=False)
            loss = white.square().sum() / 2 + L.diagonal(dim1=1, dim2=2).log().sum()
            # -log p(parameters): each is normal with variance 1 around where it started. (k has
            # linear and r_j only as products; but to scale all slopes alike, the prior charges for
            # one change of linear, not for a change of every r_j.)
            for parameter, prior_mean in zip(self.parameters(), prior_means):
                loss = loss + (parameter - prior_mean).square().sum() / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.x = x
        self.weights = torch.cholesky_solve(y, self.cholesky(x)).detach()

    def forward(self, observations: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """The mean of f: (seeds, batch, ...) -> (seeds, batch, 1)."""
        return self.kernel(self.inputs(observations, actions), self.x) @ self.weights


# --- TD3+BC (Fujimoto & Gu 2021) ---
class Transitions(NamedTuple):
    """Each seed's rows of the dataset: all it may draw from, or one batch."""

    observations: torch.Tensor  # (seeds, rows, obs_dim)
    actions: torch.Tensor  # (seeds, rows, act_dim), scaled to [-1, 1]
    rewards: torch.Tensor  # (seeds, rows)
    next_observations: torch.Tensor
    terminals: torch.Tensor  # (seeds, rows), 1 = no bootstrap


class Agent:
    """Networks of all seeds; a seed's normaliser comes from the observations its agent may see.

    A checkpoint holds the state_dict() of every attribute."""

    def __init__(self, data: Transitions, generators: list[torch.Generator], args: Args):
        device = data.observations.device
        obs_dim, act_dim = data.observations.shape[-1], data.actions.shape[-1]
        # Seeds see different observations with --rewards labeled.
        means, stds = zip(*[mean_and_std(rows) for rows in data.observations])
        mean = torch.stack(means).unsqueeze(1).to(data.observations)
        std = torch.stack(stds).unsqueeze(1).to(data.observations) + 1e-3  # as in the original
        # The actor's callers apply tanh, since an MLP serves critics and reward models, too.
        self.actor = MLP([obs_dim], mean, std, 256, act_dim, generators).to(device)
        # Critics also see actions, as they are: mean 0, std 1.
        mean, std = F.pad(mean, (0, act_dim), value=0.0), F.pad(std, (0, act_dim), value=1.0)
        self.q1 = MLP([obs_dim, act_dim], mean, std, 256, 1, generators).to(device)
        self.q2 = MLP([obs_dim, act_dim], mean, std, 256, 1, generators).to(device)
        self.actor_target = deepcopy(self.actor)
        self.q1_target = deepcopy(self.q1)
        self.q2_target = deepcopy(self.q2)
        q_parameters = [*self.q1.parameters(), *self.q2.parameters()]
        self.q_optimizer = make_adam(q_parameters, args.learning_rate)
        self.actor_optimizer = make_adam(self.actor.parameters(), args.learning_rate)


def sample(data: Transitions, batch_size: int, generator: torch.Generator) -> Transitions:
    """Draw a batch for each seed, uniformly with replacement; one generator serves all seeds."""
    num_seeds, num_rows = data.rewards.shape
    size, device = (num_seeds, batch_size), generator.device
    rows = torch.randint(num_rows, size, generator=generator, device=device)
    return Transitions(*gather(data, rows))


def critic_loss(agent: Agent, batch: Transitions, noise: torch.Tensor, args: Args) -> torch.Tensor:
    """Each seed's loss, (seeds,); `noise` is standard normal, (seeds, batch, act_dim)."""
    with torch.no_grad():
        noise = (noise * args.policy_noise).clamp(-args.noise_clip, args.noise_clip)
        next_actions = agent.actor_target(batch.next_observations).tanh()
        next_actions = (next_actions + noise).clamp(-1, 1)
        next_q1 = agent.q1_target(batch.next_observations, next_actions)
        next_q2 = agent.q2_target(batch.next_observations, next_actions)
        next_q = torch.min(next_q1, next_q2).squeeze(-1)
        target = batch.rewards + args.gamma * (1 - batch.terminals) * next_q
    q1 = agent.q1(batch.observations, batch.actions).squeeze(-1)
    q2 = agent.q2(batch.observations, batch.actions).squeeze(-1)
    return (q1 - target).square().mean(dim=1) + (q2 - target).square().mean(dim=1)


def actor_loss(agent: Agent, batch: Transitions, args: Args) -> torch.Tensor:
    """-lambda Q1(s, pi(s)) + (pi(s) - a)^2 with lambda = alpha / mean |Q1|; (seeds,)."""
    actions = agent.actor(batch.observations).tanh()
    q = agent.q1(batch.observations, actions).squeeze(-1)
    # |Q1| of these actions, as in the original's code; its paper writes Q(s, a).
    lambda_ = args.alpha / q.abs().mean(dim=1).detach()
    cloning = (actions - batch.actions).square().mean(dim=(1, 2))
    return -lambda_ * q.mean(dim=1) + cloning


# A loss and its backward() together, as in reward_backward.
def critic_backward(agent: Agent, batch: Transitions, noise: torch.Tensor, args: Args):
    loss = critic_loss(agent, batch, noise, args)
    loss.sum().backward()  # a sum over seeds: each gets the gradient it would have alone
    return loss.detach()


def actor_backward(agent: Agent, batch: Transitions, args: Args):
    loss = actor_loss(agent, batch, args)
    loss.sum().backward(inputs=list(agent.actor.parameters()))  # none for Q1's own parameters
    return loss.detach()


def update(agent: Agent, data: Transitions, generator: torch.Generator, args: Args) -> dict:
    """`policy_freq` critic updates, then one of the actor and of all targets."""
    for _ in range(args.policy_freq):
        batch = sample(data, args.batch_size, generator)
        # Drawn here, since a compiled function takes no generator.
        noise = torch.randn(batch.actions.shape, generator=generator, device=batch.actions.device)
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
def update_target(target: nn.Module, network: nn.Module, tau: float) -> None:
    for target_parameter, parameter in zip(target.parameters(), network.parameters()):
        target_parameter.lerp_(parameter, tau)  # target + tau * (network - target)


# --- What the agent sees ---
def agent_rewards(kind: str, dataset: Dataset, labeled: np.ndarray, imputed) -> np.ndarray:
    """Each seed's rewards by the choice of --rewards, (seeds, N)."""
    labels = dataset.rewards[labeled]
    rewards = np.zeros((len(labeled), len(dataset.rewards)), np.float32)
    if kind == "imputed":
        rewards[:] = imputed
    if kind == "oracle":
        all_known = not np.isnan(dataset.rewards).any()
        require(all_known, "--rewards oracle needs every reward, and some are NaN")
        rewards[:] = dataset.rewards
    if kind == "mean":
        rewards[:] = labels.mean(axis=1, dtype=np.float64, keepdims=True)
    np.put_along_axis(rewards, labeled, labels, axis=1)  # whatever the kind, a label stays as it is
    return rewards  # with "labeled", main() then keeps only the labelled rows


def reward_scale(rewards: np.ndarray, labeled: np.ndarray, dataset: Dataset, labeled_only: bool):
    """1000 / (largest - smallest episode return) for each seed, (seeds, 1); as IQL's original.

    With `labeled_only` no return is known: each is estimated as the mean of the episode's own
    labels times its length."""
    scales = []
    lengths = np.bincount(dataset.episode_ids)
    for k, seed_rewards in enumerate(rewards):
        rows = labeled[k] if labeled_only else np.arange(len(seed_rewards))
        episodes, ids, counts = np.unique(
            dataset.episode_ids[rows], return_inverse=True, return_counts=True
        )
        # The mean of the episode's rows here times its length: the sum, if all its rows are here.
        returns = np.bincount(ids, seed_rewards[rows]) / counts * lengths[episodes]
        differ = np.ptp(returns) > 1e-6 * np.abs(returns).max()
        hint = "--scale-rewards needs two episodes whose returns differ; or use --no-scale-rewards"
        require(differ, hint)
        scales.append([1000 / np.ptp(returns)])
    return np.float32(scales)


ACTION_BOUND = 1.0  # of a scaled action; the twin, iql_imputed.py, has a little less


def make_transitions(dataset: Dataset, rewards: np.ndarray, task, device) -> Transitions:
    """All transitions as tensors (seeds, N, ...); seeds share everything but the rewards.

    Actions are scaled to [-1, 1] from the bounds in `task`, a Task (under Evaluation)."""
    actions = scale_actions(dataset.actions, task).clip(-ACTION_BOUND, ACTION_BOUND)

    def share(array: np.ndarray) -> torch.Tensor:  # a view for each seed, not a copy
        return torch.from_numpy(array).to(device).expand(len(rewards), *array.shape)

    return Transitions(
        observations=share(dataset.observations),
        actions=share(actions),
        rewards=torch.from_numpy(rewards).to(device),
        next_observations=share(dataset.next_observations),
        terminals=share(dataset.terminals),
    )


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
D4RL_TASKS = {  # simulator, returns of a random and of an expert policy
    "halfcheetah": ("HalfCheetah-v4", -280.178953, 12135.0),
    "hopper": ("Hopper-v4", -20.272305, 3234.3),
    "walker2d": ("Walker2d-v4", 1.629008, 4592.3),
}
D4RL_URLS = [
    "https://rail.eecs.berkeley.edu/datasets/offline_rl/gym_mujoco_v2/",
    "https://huggingface.co/datasets/imone/D4RL/resolve/main/",  # when the first is down
]


def load_dataset(env_id: str | None = None, dataset_path: Path | None = None) -> Dataset:
    """A D4RL, Minari, bundled or local HDF5 dataset; UserError if it cannot be trained on."""
    if dataset_path:
        dataset_path = Path(dataset_path)
        name = env_id or dataset_path.stem
        env, ref_min, ref_max = find_simulator(env_id)
        columns = read_hdf5(dataset_path, follow_d4rl=False)
    elif env_id is None or env_id in SHA256:
        name = env_id or BUNDLED
        env, ref_min, ref_max = D4RL_TASKS[name.split("-")[0]]
        columns = read_hdf5(find_file(name), follow_d4rl=True)
    else:
        name = env_id
        minari_dataset, columns = load_minari(name)
        env = minari_dataset if minari_dataset.env_spec else None
        ref_min = float(minari_dataset.storage.metadata.get("ref_min_score", np.nan))
        ref_max = float(minari_dataset.storage.metadata.get("ref_max_score", np.nan))

    require(len(columns["rewards"]) > 0, "the dataset has no transitions")
    for key in ("observations", "actions", "next_observations"):
        require(np.isfinite(columns[key]).all(), f"the dataset has NaN or inf in {key}")
    infinite = np.isinf(columns["rewards"]).any()
    require(not infinite, "the dataset has inf in rewards (NaN means unlabelled)")
    return Dataset(**columns, env=env, ref_min=ref_min, ref_max=ref_max, name=name)


def find_simulator(env_id: str | None) -> tuple[str | None, float, float]:
    """Simulator and reference returns for a user's own file, by a D4RL name or a Gymnasium id."""
    without_references = (env_id, np.nan, np.nan)
    if env_id is None or env_id in gym.registry:  # a user's own may be called hopper-..., too
        return without_references
    return D4RL_TASKS.get(env_id.split("-")[0], without_references)


def find_file(env_id: str) -> Path:
    """The bundled file, or a D4RL file in the d4rl package's cache, downloaded if missing."""
    if env_id == BUNDLED:
        path = Path(__file__).resolve().parent / "tests" / "data" / f"{BUNDLED}.hdf5"
    else:
        folder = Path(os.environ.get("D4RL_DATASET_DIR", "~/.d4rl/datasets")).expanduser()
        path = folder / (env_id.removesuffix("-v2").replace("-", "_") + "-v2.hdf5")
        download(path, SHA256[env_id])
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    require(found == SHA256[env_id], f"{path} has SHA-256 {found}, not {SHA256[env_id]}: delete it")
    return path


def download(path: Path, sha256: str) -> None:
    """Fetch a D4RL file from the first host that has it, unless it is there."""
    failures = []
    for url in D4RL_URLS:
        if path.exists():
            return
        print(f"downloading {url}{path.name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(30)  # seconds without a byte
        try:
            torch.hub.download_url_to_file(url + path.name, str(path), sha256)
        except (OSError, HTTPException, RuntimeError) as error:  # RuntimeError: wrong bytes
            failures.append(f"{url}: {error}")
        finally:
            socket.setdefaulttimeout(before)
    require(
        path.exists(),
        f"cannot download {path.name} ({'; '.join(failures)}); put it at {path} by hand, "
        f"or use the bundled --env-id {BUNDLED}, which needs no network",
    )


def read_hdf5(path: Path, follow_d4rl: bool) -> dict[str, np.ndarray]:
    """The columns of Dataset from a D4RL-schema file, by D4RL's rule or the one for users' logs."""
    arrays = read_columns(path)
    terminals, timeouts = find_ends(path, arrays)
    is_kept = find_transitions(arrays, terminals, timeouts, follow_d4rl)
    # The next row's observations. At an episode's end they are wrong, but such a row is either
    # dropped or terminal, and then its next observation does not count.
    next_observations = np.append(arrays["observations"][1:], arrays["observations"][-1:], axis=0)
    if not follow_d4rl:
        next_observations = arrays.get("next_observations", next_observations)
        if "timeouts" not in arrays:
            print("timeouts      none: episodes end where terminals or next_observations say so")
        report_dropped(path, arrays["rewards"], is_kept)

    ends = terminals | timeouts
    episode_ids = np.cumsum(ends) - ends  # the number of ends before each row
    # Numbered anew, since all rows of an episode may be gone.
    _, episode_ids = np.unique(episode_ids[is_kept], return_inverse=True)
    return {
        "observations": arrays["observations"][is_kept],
        "actions": arrays["actions"][is_kept],
        "rewards": arrays["rewards"][is_kept],
        "next_observations": next_observations[is_kept],
        "terminals": terminals[is_kept].astype(np.float32),
        "episode_ids": episode_ids,
    }


def read_columns(path: Path) -> dict[str, np.ndarray]:
    """Every known column of the file, float32, all of the same length."""
    require(path.exists(), f"{path}: there is no such file")
    keys = ["observations", "actions", "rewards", "terminals"]
    try:
        with h5py.File(path, "r") as file:
            missing = [key for key in keys if key not in file]
            require(not missing, f"{path} has no {', '.join(missing)}, but only {', '.join(file)}")
            keys += [key for key in ("timeouts", "next_observations") if key in file]
            columns = {key: file[key] for key in keys}
            check_layout(path, columns)
            arrays = {key: column.astype(np.float32)[()] for key, column in columns.items()}
    except UserError:
        raise
    except Exception as error:  # whatever h5py raises, the file is at fault
        message = f"{path} is not a readable HDF5 file with {', '.join(keys)}: {error}"
        raise UserError(message) from error
    for key in ("rewards", "terminals", "timeouts"):
        if key in arrays:
            arrays[key] = arrays[key].reshape(-1)  # D4RL's replay files have rewards of (rows, 1)
    return arrays


def check_layout(path: Path, columns: dict[str, h5py.Dataset]) -> None:
    """Refuse what is no table of numbers, before anything is read into memory."""
    for key, column in columns.items():
        is_array = isinstance(column, h5py.Dataset) and column.shape is not None
        require(is_array and column.dtype.kind in "fiub", f"{path}: {key} is not a numeric array")
        wrong_shape = f"{path} has wrong shapes: {key} is {column.shape}"
        if key not in ("observations", "actions", "next_observations"):
            require(column.ndim > 0 and column.shape[1:] in ((), (1,)), wrong_shape)
            continue
        require(column.ndim == 2 and column.shape[1] > 0, wrong_shape)
        # A row that was never written, or that lies in a missing file (external, virtual), HDF5
        # reads as zeros: in a damaged file, terabytes of them.
        is_written = column.id.get_space_status() == h5py.h5d.SPACE_STATUS_ALLOCATED
        is_elsewhere = column.external or column.is_virtual
        require(
            (is_written and not is_elsewhere) or len(column) == 0,
            f"{path}: {key} declares {len(column):,} rows, more than the file itself holds",
        )
    lengths = {key: len(column) for key, column in columns.items()}
    require(len(set(lengths.values())) == 1, f"{path} has columns of different lengths: {lengths}")
    if "next_observations" in columns:
        same = columns["next_observations"].shape == columns["observations"].shape
        require(same, f"{path} has wrong shapes: next_observations differ from observations")


def find_ends(path: Path, arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Rows where the task ended, and rows where the recording was cut off; (rows,), bool."""
    for key in ("terminals", "timeouts"):
        values = arrays.get(key, np.zeros(1))
        is_flag = np.isfinite(values) & (values >= 0)
        require(is_flag.all(), f"{path} has NaN, inf or negative numbers in {key}")
    terminals = arrays["terminals"] != 0
    if "timeouts" in arrays:
        return terminals, arrays["timeouts"] != 0
    if "next_observations" in arrays:  # a cut is where the next row starts from another observation
        following = np.roll(arrays["observations"], -1, axis=0)  # after the last row, the first
        is_cut = (arrays["next_observations"] != following).any(axis=1)
        if is_cut.mean() > 0.5:  # rows shuffled or left out: most would be episodes of their own
            is_cut[:] = False
        return terminals, is_cut
    require(
        terminals[-1:].all(),
        f"{path} has no timeouts, and terminals do not say where its last episode ends: add the "
        "column timeouts, 1 in the last row of each episode that was cut off, 0 elsewhere",
    )
    return terminals, np.zeros_like(terminals)


def find_transitions(arrays: dict, terminals, timeouts, follow_d4rl: bool) -> np.ndarray:
    """The rows that are whole transitions, (rows,), bool."""
    has_next = ~timeouts  # after a timeout, the next row belongs to another episode
    has_next[-1:] = False
    if follow_d4rl:  # drops the last row and all timeouts, as for every published score
        return has_next
    if "next_observations" in arrays:
        return np.ones_like(has_next)
    return has_next | terminals  # a terminal row's next observation is multiplied by 0


def report_dropped(path: Path, rewards: np.ndarray, is_kept: np.ndarray) -> None:
    """Say how many rows of one's own log cannot be used, and how many labels lie on them."""
    dropped = np.count_nonzero(~is_kept)
    lost = np.count_nonzero(~np.isnan(rewards[~is_kept]))
    left = np.count_nonzero(~np.isnan(rewards[is_kept]))
    if dropped > 0:
        print(
            f"dropped       {dropped:,} rows without a next observation, {lost:,} of them labelled"
        )
    require(
        left > 0 or lost == 0,
        f"{path}: all {lost:,} labels are on rows whose next observation is unknown (timeouts, "
        "last row): add the column next_observations, or terminals where the task ended",
    )


def load_minari(env_id: str) -> tuple[minari.MinariDataset, dict[str, np.ndarray]]:
    """A Minari dataset, downloaded if it is not there, and the columns of Dataset."""
    try:
        if "/" not in env_id:  # not a remote one
            names = [*SHA256, *minari.list_local_datasets()]
            nearest = ", ".join(difflib.get_close_matches(env_id, names, cutoff=0))
            hint = f"nearest: {nearest}; remote Minari ids have a slash, Gymnasium's need --dataset-path"
            require(env_id in names, f"unknown --env-id {env_id}; {hint}")
        _, _, version = env_id.rpartition("-v")
        require(version.isdigit(), f"--env-id {env_id} has no version: Minari ids end in -v0 or so")
        dataset = minari.load_dataset(env_id, download=True)
        return dataset, read_minari(dataset)
    except UserError:
        raise
    except Exception as error:  # no network, damaged files: Minari has no common error for them
        raise UserError(f"cannot load the Minari dataset {env_id}: {error}") from error


def read_minari(dataset: minari.MinariDataset) -> dict[str, np.ndarray]:
    """Transitions of a Minari dataset: T + 1 observations an episode, so no step is dropped."""
    for space in (dataset.observation_space, dataset.action_space):
        vector = isinstance(space, gym.spaces.Box) and len(space.shape) == 1
        require(vector, f"{dataset.id}: need continuous vectors (1-D Box), not {space}")
    episodes = [episode for episode in dataset.iterate_episodes() if len(episode) > 0]
    require(len(episodes) > 0, f"{dataset.id} has no transitions")

    for episode in episodes:
        columns = (episode.actions, episode.rewards, episode.terminations)
        sizes = [len(episode.observations) - 1, *map(len, columns)]
        require(len(set(sizes)) == 1, f"{dataset.id} has an episode of different lengths: {sizes}")

    def stack(arrays) -> np.ndarray:
        return np.concatenate(list(arrays)).astype(np.float32)

    lengths = [len(episode) for episode in episodes]
    return {
        "observations": stack(episode.observations[:-1] for episode in episodes),
        "actions": stack(episode.actions for episode in episodes),
        "rewards": stack(np.reshape(episode.rewards, -1) for episode in episodes),
        "next_observations": stack(episode.observations[1:] for episode in episodes),
        "terminals": stack(episode.terminations for episode in episodes),
        "episode_ids": np.repeat(np.arange(len(episodes)), lengths),
    }


# --- Evaluation ---
MAX_STEPS = 10_000  # of an episode in an environment without a time limit of its own


class Task(NamedTuple):
    """What a policy acts in: a simulator, if there is one, and the bounds of the actions."""

    env_spec: gym.envs.registration.EnvSpec | None
    low: np.ndarray  # (act_dim,): the simulator's bounds, else the log's smallest actions
    high: np.ndarray
    ref_min: float  # the dataset's; NaN in another simulator: raw returns are reported
    ref_max: float


def make_task(dataset: Dataset, eval_env_id: str | None) -> Task:
    """Check that the simulator works for a step and fits the dataset; UserError if it does not."""
    source = eval_env_id or dataset.env
    ref_min, ref_max = dataset.ref_min, dataset.ref_max
    if eval_env_id:  # the dataset's references are not those of another simulator
        ref_min = ref_max = math.nan
    if source is None:
        low, high = dataset.actions.min(axis=0), dataset.actions.max(axis=0)
        return Task(None, low, high, ref_min, ref_max)
    env = make_env(source)
    for space in (env.observation_space, env.action_space):
        vector = isinstance(space, gym.spaces.Box) and len(space.shape) == 1
        require(vector, f"{env.spec.id}: need continuous vectors (1-D Box), not {space}")
    require(env.action_space.is_bounded(), f"the actions of {env.spec.id} have no bounds")
    shapes = (dataset.observations.shape[1:], dataset.actions.shape[1:])
    expected = (env.observation_space.shape, env.action_space.shape)
    require(shapes == expected, f"the dataset has shapes {shapes}, {env.spec.id} {expected}")

    task = Task(env.spec, env.action_space.low, env.action_space.high, ref_min, ref_max)
    low, high = task.low.astype(np.float64), task.high.astype(np.float64)
    # Float32 may round actions out of bounds: allow a little of the range, and of large bounds.
    rounding = 1e-5 * (high - low) + 1e-6 * np.maximum(np.abs(low), np.abs(high))
    in_bounds = (dataset.actions >= low - rounding) & (dataset.actions <= high + rounding)
    found = f"{dataset.actions.min():.4g} to {dataset.actions.max():.4g}"
    message = f"actions, {found}, beyond the bounds of {env.spec.id}: {env.action_space}"
    require(in_bounds.all(), message)
    middle, _ = middle_and_half(task)
    try:
        observation, _ = env.reset(seed=100)
        next_observation, reward, _, _, _ = env.step(middle.astype(task.low.dtype))
        float(reward)  # raises if it is not numeric
        returned = [np.shape(observation), np.shape(next_observation)]
    except Exception as error:  # a user's environment may raise anything
        raise UserError(f"{env.spec.id} fails in reset or step: {error!r}") from error
    expected = [env.observation_space.shape] * 2
    require(returned == expected, f"{env.spec.id} returns shapes {returned}, not {expected}")
    env.close()
    return task


def make_env(source: str | gym.envs.registration.EnvSpec | minari.MinariDataset) -> gym.Env:
    """A simulator to evaluate in, without the warnings of MuJoCo and Gymnasium."""
    mujoco.set_mju_user_warning(lambda message: None)
    gym.logger.min_level = gym.logger.ERROR  # -v4 is outdated, but its scores compare with D4RL's
    try:
        if isinstance(source, minari.MinariDataset):
            return source.recover_environment(eval_env=True)
        return gym.make(source)
    except Exception as error:  # unknown id, missing package, or the environment's own
        name = getattr(source, "id", source)
        raise UserError(f"cannot make the environment of {name}: {error}") from error


def middle_and_half(task: Task) -> tuple[np.ndarray, np.ndarray]:
    """Middle and half-width of each action's range; half-width 1 where there is no range."""
    low, high = task.low.astype(np.float64), task.high.astype(np.float64)
    half = (high - low) / 2
    return (high + low) / 2, np.where(half > 0, half, 1.0)


def scale_actions(actions: np.ndarray, task: Task) -> np.ndarray:
    """From the task's bounds to [-1, 1]; the identity for D4RL."""
    middle, half = middle_and_half(task)
    return ((actions - middle) / half).astype(np.float32)


class Policy(dict):
    """One seed's actor in numpy, a dict of its arrays, to save and to use anywhere.

    Call it with observations, (obs_dim,) or (n, obs_dim); it returns actions."""

    def __call__(self, observations: np.ndarray) -> np.ndarray:
        x = (np.float32(observations) - self["mean"]) / self["std"]
        x = np.maximum(x @ self["layer1.weight"] + self["layer1.bias"], 0)
        x = np.maximum(x @ self["layer2.weight"] + self["layer2.bias"], 0)
        x = np.tanh(x @ self["layer3.weight"] + self["layer3.bias"])
        low, high = np.float64(self["low"]), np.float64(self["high"])
        actions = np.clip(low + (np.float64(x) + 1) / 2 * (high - low), low, high)
        if self["low"].dtype.kind in "iu":  # a Box of integers
            actions = np.rint(actions)
        return actions.astype(self["low"].dtype)


def make_policies(actor: MLP, task: Task) -> list[Policy]:
    """A copy of each seed's actor as it is now."""
    state = deepcopy(actor).cpu().state_dict()
    policies = []
    for k in range(len(actor.mean)):  # each tensor's first dimension is the seeds
        weights = {name: tensor[k].numpy() for name, tensor in state.items()}
        for name in weights:
            if not name.endswith("weight"):
                weights[name] = weights[name][0]  # its batch dimension of 1
        policies.append(Policy(weights, low=task.low, high=task.high))
    return policies


def write_policies(actor: MLP, task: Task, seeds: range, run_dir: Path) -> list[Path]:
    """Write each seed's actor as it is now to a file of its own; returns their paths."""
    paths = []
    for seed, policy in zip(seeds, make_policies(actor, task)):
        path = run_dir / f"policy_seed{seed}.npz"
        with replacing(path) as file:
            np.savez(file, **policy)
        paths.append(path)
    return paths


def run_episode(path: Path, env_spec, seed: int, stopped: list) -> float | None:
    """Return of one deterministic episode of a policy's file; None if a signal stops it.

    `stopped` gets an entry when a signal comes (signals_caught()); in a worker it stays empty."""
    with np.load(path) as arrays:
        policy = Policy(arrays)
    env = make_env(env_spec)
    observation, _ = env.reset(seed=seed)
    episode_return = 0.0
    for _ in range(env.spec.max_episode_steps or MAX_STEPS):
        observation, reward, terminated, truncated, _ = env.step(policy(observation))
        episode_return += float(reward)
        if stopped:
            return None
        if terminated or truncated:
            break
    env.close()
    return episode_return


def make_workers(num_workers: int) -> Executor:
    if num_workers == 0:
        return ThreadPoolExecutor(1)  # so that there are futures to wait for in either case
    os.environ["OMP_NUM_THREADS"] = "1"  # for workers, which read it when they start
    workers = ProcessPoolExecutor(num_workers, get_context("spawn"), init_worker)
    # A terminal sends Ctrl-C to all processes, also to a worker that is not in init_worker() yet.
    # It inherits that signals wait; here they arrive a moment later.
    if hasattr(signal, "pthread_sigmask"):  # not on Windows
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        for _ in range(num_workers):
            workers.submit(os.getpid)  # any job: it starts a worker
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
    return workers


def init_worker() -> None:
    """Leave signals to the training process, and end when it ends, even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def follow_parent():
        parent_process().join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


def start_evaluation(workers: Executor, paths, task: Task, updates_done, args, stopped) -> list:
    """Begin to evaluate each seed's policy: (update, seed, the futures of its episodes) of each.

    The policy's path is sent, not its arrays: Python 3.11.2 hangs if a worker dies during a long
    message."""
    if task.env_spec is None:
        return []
    if args.eval_workers > 0:
        stopped = []  # a worker gets a copy and no signals: it finishes, and is waited for
    pending = []
    for k, path in enumerate(paths):
        # The same start states for every seed, and at every evaluation.
        jobs = [(path, task.env_spec, 100 + i, stopped) for i in range(args.eval_episodes)]
        futures = [workers.submit(run_episode, *job) for job in jobs]
        pending.append((updates_done, args.seed + k, futures))
    return pending


def finish_evaluation(pending: list, scores: list, task: Task, run_dir, tracker) -> None:
    """Wait for the evaluation under way, if there is one; write, show and track its scores.

    Empties `pending` and extends `scores`, unless a signal stopped the evaluation."""
    if not pending:
        return
    metric = metric_of(task)
    rows = []
    for updates_done, seed, futures in pending:
        returns = [future.result() for future in futures]
        if None in returns:  # a signal stopped it: it stays pending, a resumed run makes it anew
            return
        mean_return = float(np.mean(returns))
        score = math.nan
        if metric == "score":
            score = 100 * (mean_return - task.ref_min) / (task.ref_max - task.ref_min)
        rows.append({"update": updates_done, "seed": seed, "return": mean_return, "score": score})
    pending.clear()
    scores.extend(rows)
    write_csv(run_dir / "scores.csv", scores)
    values = [row[metric] for row in rows]
    mean, std = np.mean(values), np.std(values)
    tqdm.write(f"update {rows[0]['update']:>9,}   {metric} {mean:.1f} ± {std:.1f}")
    if tracker:
        each_seed = {f"charts/{metric}_seed{row['seed']}": row[metric] for row in rows}
        tracker.log({"update": rows[0]["update"], f"charts/{metric}": mean, **each_seed})


def metric_of(task: Task) -> str:
    return "score" if task.ref_max > task.ref_min else "return"  # no references (NaN): return


def evaluations_left(args, task: Task, updates_done: int, scores: list) -> list[int]:
    """The updates at which the agent is still to be evaluated: every eval_freq, and at the end."""
    # From the last score on, not from `updates_done`: a checkpoint is written before its own
    # evaluation, so a resumed run may have that one still to make.
    done = scores[-1]["update"] if scores else 0
    if task.env_spec is None:  # nothing to evaluate: these are the times of checkpoints
        done = updates_done
    points = [*range(args.eval_freq, args.num_updates, args.eval_freq), args.num_updates]
    return [point for point in points if point > done]


# --- Run directory ---
@contextmanager
def replacing(path: Path):
    """A file to write beside `path`, which it then replaces: no reader ever finds half a file."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_csv(path: Path, rows: list[dict]) -> None:
    lines = [",".join(rows[0])]
    for row in rows:
        lines.append(",".join(map(str, row.values())))
    with replacing(path) as file:
        file.write("\n".join([*lines, ""]).encode())


def to_json(content: dict) -> str:
    text = json.dumps(content, default=str)  # a Path becomes its text
    content = json.loads(text, parse_constant=lambda name: None)  # JSON knows no NaN: null
    return json.dumps(content, indent=2)


def write_json(path: Path, content: dict) -> None:
    with replacing(path) as file:
        file.write(to_json(content).encode())


def make_run_dir(run_dir: Path | None, name: str) -> Path:
    """`run_dir`, or a new folder in runs/ that no other run has."""
    if run_dir:
        run_dir.mkdir(parents=True, exist_ok=True)
        return run_dir
    name = name.replace("/", "-").replace(":", "-")
    run_dir = Path("runs") / f"{name}__{int(time.time())}"
    run_dir.parent.mkdir(exist_ok=True)
    while True:
        try:
            run_dir.mkdir()
            return run_dir
        except FileExistsError:  # another run of the same second
            run_dir = run_dir.with_name(f"{run_dir.name}_")


def write_config(run_dir: Path, config: dict, resume: bool) -> None:
    """config.json marks the directory as that of a run; two new runs cannot both make it."""
    if not resume:
        open(run_dir / "config.json", "x").close()  # FileExistsError: another began meanwhile
    write_json(run_dir / "config.json", config)


# Arguments a resumed run may change: they leave results alone (compile: up to rounding). The
# dataset may move, since its content is compared.
FREE_TO_CHANGE = ("resume", "run_dir", "dataset_path", "eval_workers", "track", "log_freq")
FREE_TO_CHANGE += ("compile", "cuda_graph")


def write_checkpoint(path: Path, checkpoint: dict) -> None:
    content = io.BytesIO()  # on a full disk, torch.save to a file raises no OSError
    torch.save(checkpoint, content)
    with replacing(path) as file:
        file.write(content.getbuffer())


def read_checkpoint(run_dir: Path, device: torch.device) -> dict | None:
    """The state to go on from, None for a new run."""
    path = run_dir / "checkpoint.pt"
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        state["config"], state["agent"], state["num_updates"]  # KeyError: another program's
    except Exception as error:  # of whatever kind: the file is at fault
        message = f"{path} is not a readable checkpoint ({error}); delete it to start anew"
        raise UserError(message) from error
    return state


def restore(resumed: dict, agent, generator: torch.Generator) -> tuple[int, list]:
    """Put agent and generator back to where they were; number of updates, scores so far."""
    generator.set_state(resumed["generator"].cpu())
    for name, part in vars(agent).items():
        part.load_state_dict(resumed["agent"][name])
    return resumed["num_updates"], resumed["scores"]


def check_same_run(path: Path, before: dict, config: dict) -> None:
    """A run goes on with the arguments it was started with."""
    changes = []
    for name, value in config.items():
        if name not in FREE_TO_CHANGE and before.get(name) != value:
            changes.append(f"{name} was {before.get(name)}, now {value}")
    require(not changes, f"{path} was made with other arguments: {', '.join(changes)}")


def start_tracking(run_dir: Path, config: dict, resumed: dict | None):
    """A Weights & Biases run, the same one after a resume."""
    import wandb

    run_id = resumed["track_id"] if resumed else None
    try:
        run = wandb.init(id=run_id, resume="allow", name=run_dir.name, config=config, dir=run_dir)
    except wandb.Error as error:  # no key, no network
        raise UserError(f"Weights & Biases: {error} (or set WANDB_MODE=offline)") from error
    run.define_metric("*", step_metric="update")
    return run


def log_losses(tracker, updates_done: int, losses: dict, speed: float) -> None:
    means = {name: loss.mean().item() for name, loss in losses.items()}  # over the seeds
    tracker.log({"update": updates_done, "charts/updates_per_second": speed, **means})


def leave(number: int, updates_done: int, run_dir: Path, args) -> None:
    """End a run that a signal stopped; say how it goes on."""
    more = [] if args.run_dir else ["--run-dir", run_dir.as_posix()]
    more += [] if args.resume else ["--resume"]
    more = f" with {shlex.join(more)}" if more else ""
    tqdm.write(f"stopped after {updates_done:,} updates; to go on, repeat the command{more}")
    sys.exit(128 + number)


def write_result(run_dir: Path, scores: list, task: Task, config, quality, timing) -> None:
    """result.json: the last evaluation and the mean of the last ten, never the best."""
    result, text = {"metric": None}, "trained, not evaluated"
    if scores:
        metric, num_seeds = metric_of(task), config["num_seeds"]
        table = np.array([row[metric] for row in scores]).reshape(-1, num_seeds)
        last, last_10 = table[-1], table[-10:].mean(axis=0)
        text = f"{metric} {last.mean():.1f} ± {last.std():.1f} over {num_seeds} seed(s)"
        result = {
            "metric": metric,
            "mean": last.mean(),
            "std": last.std(),
            "per_seed": last.tolist(),
            "last_10_mean": last_10.mean(),
            "last_10_std": last_10.std(),
        }
    result["reward_model"] = quality
    for name in ("num_updates", "eval_episodes", "device", "matmul_precision"):
        result[name] = config[name]
    result["compile"] = compiled.on  # false, too, if compiling was tried and failed
    result["timing"] = timing
    result["versions"] = {m.__name__: m.__version__ for m in (torch, np, gym, mujoco, minari)}
    result["script_sha256"] = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    write_json(run_dir / "result.json", result)
    print(f"result        {text}, in {run_dir}")


# --- Speed ---
def choose_device(name: str) -> torch.device:
    """The device to train on; a GPU is made ready for recording."""
    warnings.filterwarnings("ignore", ".*capturable=True.*")  # Adam's, of updates not recorded
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    # repeat() records on the current stream, which must not be the default one.
    torch.cuda.set_stream(torch.cuda.Stream())
    return torch.device("cuda")


def choose_precision(name: str, device: torch.device, resumed: dict | None) -> str:
    """`name`; if it is auto, the fastest that is float32, or that of the (agent's) run resumed."""
    if name != "auto":
        return name
    # On x86, medium hands products to oneDNN, often the faster library, which rounds them to
    # bfloat16 only where the processor has AMX.
    cpu = torch.cpu.get_capabilities()  # if it does not say, assume AMX
    may_round = cpu.get("amx_bf16", True) or cpu.get("architecture") != "x86_64"
    fastest = "medium" if device.type == "cpu" and not may_round else "highest"
    if resumed is None:
        return fastest
    before = resumed["config"]["matmul_precision"]
    require(
        before in ("highest", fastest),  # both are float32 on this machine
        f"the run began with --matmul-precision {before}, which may be less than float32 on this "
        "machine: give that option again to resume anyway",
    )
    return before


def choose_compile(choice: str, num_updates: int) -> bool:
    """Whether to compile: it takes 22 s on two cores, won back in 10,000 to 20,000 updates."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    pays = num_updates >= 25_000 and compiler is not None
    return choice == "on" or (choice == "auto" and pays)


def compiled(function):
    """A version of the function that runs compiled while `compiled.on`: equal up to rounding.

    If the compiler fails, which it can in many ways, all functions go on as they are written."""
    fast = None

    @functools.wraps(function)
    def run(*inputs):
        nonlocal fast
        if not compiled.on:
            return function(*inputs)
        try:
            fast = fast or torch.compile(function, fullgraph=True, dynamic=False)
            return fast(*inputs)
        except (RuntimeError, OSError) as error:
            compiled.on = False
            reason = " ".join(str(error).split())[:200]
            tqdm.write(f"warning: cannot compile, going on without: {reason}", file=sys.stderr)
            return function(*inputs)

    return run


compiled.on = False  # one switch for all wrapped functions; set_speed() decides

# The functions that take the time. Every call, including those above, finds the wrapped version.
gather = compiled(gather)
reward_backward = compiled(reward_backward)
critic_backward = compiled(critic_backward)
actor_backward = compiled(actor_backward)


def set_speed(precision: str, compiles: bool) -> None:
    torch.set_float32_matmul_precision(precision)
    compiled.on = compiles
    if compiles:
        torch._dynamo.config.trace_autograd_ops = True  # private: lets backward() be compiled
        torch._dynamo.config.recompile_limit = 100  # private: a sweep of labels has many shapes


def repeat(step, generators: list[torch.Generator], recorded: bool):
    """Each next() calls step() and yields what it returns; if `recorded`, it replays a CUDA graph.

    A replay runs the hundred kernels of a step on the same memory in one launch. The random
    generators that a step draws from are registered with the graph, which moves them on at each
    replay."""
    if not recorded:
        while True:
            yield step()

    for _ in range(10):  # real steps: Adam makes its state, the compiler its kernels
        yield step()
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        result = step()  # is recorded, computes nothing
    while True:
        graph.replay()  # overwrites the tensors of `result`
        yield result


# --- The experiment ---
def check_arguments(args: Args) -> None:
    require(0 < args.num_updates, "--num-updates must be at least 1")
    require(0 < args.eval_freq, "--eval-freq must be at least 1")
    require(0 < args.log_freq, "--log-freq must be at least 1")
    require(0 < args.policy_freq, "--policy-freq must be at least 1")
    counts = (args.num_updates, args.eval_freq, args.log_freq)
    require(
        not any(count % args.policy_freq for count in counts),
        "--num-updates, --eval-freq and --log-freq must be multiples of "
        f"--policy-freq {args.policy_freq}",
    )
    require(0 <= args.alpha < math.inf, "--alpha must be 0 or more")
    require(0 <= args.policy_noise < math.inf, "--policy-noise must be 0 or more")
    require(0 <= args.noise_clip < math.inf, "--noise-clip must be 0 or more")
    require(0 <= args.gamma <= 1, "--gamma must be in [0, 1]")
    require(0 <= args.tau <= 1, "--tau must be in [0, 1]")
    require(0 < args.learning_rate < math.inf, "--learning-rate must be above 0")
    require(0 < args.batch_size, "--batch-size must be at least 1")
    require(0 <= args.seed, "--seed must be 0 or more")
    require(0 < args.num_seeds, "--num-seeds must be at least 1")
    require(0 < args.eval_episodes, "--eval-episodes must be at least 1")
    require(0 <= args.eval_workers, "--eval-workers must be 0 or more")
    require(args.run_dir or not args.resume, "--resume needs the --run-dir of the run to resume")
    held = args.run_dir and (args.run_dir / "config.json").exists()  # before anything is loaded
    require(
        args.resume or not held,
        f"{args.run_dir} already holds a run: use --resume or another --run-dir",
    )
    check_common_arguments(args)


def check_common_arguments(args) -> None:
    """Checks of the device and the reward model, the same in all three scripts."""
    fraction = args.label_fraction
    require(fraction is None or 0 < fraction <= 1, "--label-fraction must be in (0, 1]")
    require(0 < args.reward_hidden_dim, "--reward-hidden-dim must be at least 1")
    require(0 < args.reward_epochs, "--reward-epochs must be at least 1")
    require(0 < args.reward_learning_rate < math.inf, "--reward-learning-rate must be above 0")
    require(0 < args.reward_batch_size, "--reward-batch-size must be at least 1")
    no_gpu = args.device == "cuda" and not torch.cuda.is_available()
    require(not no_gpu, "--device cuda: there is no usable GPU here")


def fingerprint(dataset: Dataset) -> str:
    """A hash of what a run is trained on: a resumed run must find the same."""
    digest = hashlib.sha256()
    for name in (*Transitions._fields, "episode_ids"):  # Dataset has the same names
        digest.update(np.ascontiguousarray(getattr(dataset, name)))
    return digest.hexdigest()


def make_config(args: Args, dataset: Dataset, device: torch.device, resumed: dict | None) -> dict:
    """What config.json records; UserError if a run is resumed with other arguments."""
    config = asdict(args)
    config["device"] = device.type
    config["matmul_precision"] = choose_precision(args.matmul_precision, device, resumed)
    config["compile"] = choose_compile(args.compile, args.num_updates)
    config["dataset"] = fingerprint(dataset)
    # Paths become text: the checkpoint, which this is compared with, can hold no Path.
    config = json.loads(json.dumps(config, default=str))
    if resumed:
        check_same_run(args.run_dir, resumed["config"], config)
    return config


def describe_quality(quality: dict | None) -> str:
    if quality is None:
        return "not judged, since no hidden reward is known"
    means = [f"{name} {np.mean(values):.4g}" for name, values in quality.items()]
    return ", ".join(means) + " on the hidden rewards"


def print_header(dataset: Dataset, labeled: np.ndarray, task: Task, config: dict) -> None:
    num_rows, num_episodes = len(dataset.rewards), dataset.episode_ids[-1] + 1
    print(f"dataset       {dataset.name}: {num_rows:,} transitions, {num_episodes:,} episodes")
    seen = "all" if config["rewards"] == "oracle" else f"{labeled.shape[1]:,} labelled"
    print(f"rewards       {config['rewards']}, {seen}, {len(labeled)} seed(s)")
    if task.env_spec is None:
        low = task.low.astype(float).round(4).tolist()
        high = task.high.astype(float).round(4).tolist()
        print(
            f"evaluation    none (no environment); the log's actions lie between {low} and {high}"
        )
    elif task.env_spec.max_episode_steps is None:
        print(
            f"evaluation    {task.env_spec.id}, cut after {MAX_STEPS:,} steps: it has no time limit"
        )
    else:
        print(f"evaluation    {task.env_spec.id}")
    device = f"cpu, {torch.get_num_threads()} threads"
    if config["device"] == "cuda":
        device = torch.cuda.get_device_name()
    how = "compiled" if config["compile"] else "not compiled"
    print(f"speed         {device}, matmul precision {config['matmul_precision']}, {how}")


@contextmanager
def signals_caught():
    """A list to which the first Ctrl-C or SIGTERM is appended; a second one ends the process."""
    stopped = []
    numbers = (signal.SIGINT, signal.SIGTERM)

    def receive(number, frame):
        stopped.append(number)
        for each in numbers:
            signal.signal(each, signal.SIG_DFL)

    if threading.current_thread() is not threading.main_thread():
        yield stopped  # only a main thread receives signals
        return
    before = [signal.signal(number, receive) for number in numbers]
    try:
        yield stopped
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)


def main(args: Args) -> None:
    check_arguments(args)
    seeds = range(args.seed, args.seed + args.num_seeds)
    device = choose_device(args.device)
    started = time.perf_counter()

    # 1. The transitions, and the few of each seed whose reward may be seen.
    dataset = load_dataset(args.env_id, args.dataset_path)
    task = make_task(dataset, args.eval_env_id)
    labeled = split_labels(dataset.rewards, args.label_fraction, seeds)
    resumed = read_checkpoint(args.run_dir, device) if args.resume else None
    config = make_config(args, dataset, device, resumed)
    if args.resume and (args.run_dir / "result.json").exists():
        return print(f"{args.run_dir} holds a finished run: see its result.json and scores.csv")
    print_header(dataset, labeled, task, config)
    set_speed(config["matmul_precision"], config["compile"])

    # 2. What stands for the hidden rewards: the reward model's predictions (Eq. 4, Eq. 5).
    reward_model = imputed = quality = None
    if args.rewards == "imputed":
        generators = make_generators(seeds, stream=1)
        reward_model = RewardModel(dataset, labeled, generators, args).to(device)
        if resumed:
            reward_model.load_state_dict(resumed["reward_model"])
        else:
            fit_reward_model(reward_model, dataset, labeled, generators, args)
        imputed = impute_rewards(reward_model, dataset, labeled)
        quality = imputation_quality(imputed, dataset, labeled)
        print(f"reward model  {args.reward_model}: {describe_quality(quality)}")
    rewards = agent_rewards(args.rewards, dataset, labeled, imputed)
    if args.scale_rewards:
        rewards *= reward_scale(rewards, labeled, dataset, args.rewards == "labeled")

    # 3. The agent, and the transitions it draws from.
    data = make_transitions(dataset, rewards, task, device)
    if args.rewards == "labeled":
        data = Transitions(*gather(data, torch.from_numpy(labeled).to(device)))
    agent = Agent(data, make_generators(seeds, stream=2), args)
    # Draws for all seeds together, so a seed's batches depend on --num-seeds.
    generator = torch.Generator(device).manual_seed(args.seed)
    updates_done, scores = 0, []
    if resumed:
        updates_done, scores = restore(resumed, agent, generator)

    # 4. Training. A checkpoint is written before every evaluation; a signal stops training between
    # two updates. With workers, an evaluation runs during the next updates, collected after them.
    name = f"{dataset.name}__td3bc_imputed__{args.rewards}__{args.seed}"
    run_dir = make_run_dir(args.run_dir, name)
    tracker = start_tracking(run_dir, config, resumed) if args.track else None
    write_config(run_dir, config, args.resume)
    is_recorded = args.cuda_graph and device.type == "cuda"
    steps = repeat(lambda: update(agent, data, generator, args), [generator], is_recorded)
    progress = tqdm(total=args.num_updates, initial=updates_done, unit="update", disable=None)
    pending, first_update, ready = [], updates_done, time.perf_counter()

    def updates_per_second() -> float:  # in this process, evaluations included
        return (updates_done - first_update) / (time.perf_counter() - ready)

    with make_workers(args.eval_workers) as workers, signals_caught() as stopped:
        for next_evaluation in evaluations_left(args, task, updates_done, scores):
            while updates_done < next_evaluation and not stopped:
                losses = next(steps)
                updates_done += args.policy_freq
                progress.update(args.policy_freq)
                if tracker and updates_done % args.log_freq == 0:
                    log_losses(tracker, updates_done, losses, updates_per_second())
            # With workers, the evaluation before this one: its scores belong in the checkpoint, and
            # its policies are about to be overwritten. Without, one that a signal stopped, if any.
            finish_evaluation(pending, scores, task, run_dir, tracker)
            paths = write_policies(agent.actor, task, seeds, run_dir)
            checkpoint = {
                "config": config,
                "num_updates": updates_done,
                "scores": scores,
                "reward_model": reward_model.state_dict() if reward_model else None,
                "agent": {name: part.state_dict() for name, part in vars(agent).items()},
                "generator": generator.get_state(),
                "track_id": tracker.id if tracker else None,
            }
            write_checkpoint(run_dir / "checkpoint.pt", checkpoint)
            if stopped:  # also if it came in the last round, during an evaluation without workers
                break
            pending = start_evaluation(workers, paths, task, updates_done, args, stopped)
            # Without workers, or after the last update, wait for it now.
            if args.eval_workers == 0 or updates_done == args.num_updates:
                finish_evaluation(pending, scores, task, run_dir, tracker)
    progress.close()
    if stopped and evaluations_left(args, task, updates_done, scores):
        leave(stopped[0], updates_done, run_dir, args)

    # 5. The result: the last evaluation, never the best.
    timing = {"preparation_seconds": ready - started, "updates_per_second": updates_per_second()}
    write_result(run_dir, scores, task, config, quality, timing)
    if tracker:
        tracker.finish()


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # each line at once; ± is no error in any locale
            stream.reconfigure(line_buffering=True, errors="replace")
    try:
        main(tyro.cli(Args, description=__doc__))
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, OSError, ImportError, BrokenExecutor, gym.error.Error) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
