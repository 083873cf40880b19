# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0", "numpy>=2.0,<3", "gymnasium[mujoco]>=1.2,<2", "mujoco>=3.3,<5",
#   "minari[hdf5,hf]>=0.5.3,<0.6", "h5py>=3.12,<4", "tyro>=0.9.2,<2", "tqdm>=4.66,<5",
#   "wandb>=0.19,<1", "matplotlib>=3.9,<4", "pytest>=8,<10"
# ]
# ///
"""Fit, judge and apply a reward model to a dataset in which only a few transitions have a reward.

1. Load transitions; hide the rewards of all but 1% of them.
2. Fit reward models f(s, a) to that 1%: the paper's (Eq. 4), a Gaussian process, a linear one.
3. Judge them on the hidden rewards.
4. Write the dataset with every hidden reward imputed (Eq. 5), for any offline RL library.

The equations are those of Romeo & Bagdanov (2024), "Offline Reinforcement Learning with Imputed
Rewards".

    python reward_model.py                                                  # bundled dataset
    python reward_model.py --env-id walker2d-medium-replay-v2 --sweep       # how many labels?
    python reward_model.py --dataset-path log.hdf5 --output-path full.hdf5  # NaN = unlabelled
"""

import difflib
import functools
import hashlib
import io
import json
import math
import os
import shutil
import socket
import sys
import tempfile
import time
import warnings
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from http.client import HTTPException
from importlib import import_module
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import h5py
import minari
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_dataset import parse_dataset_id
from minari.storage import get_dataset_path
from torch import nn
from tqdm import tqdm


@dataclass
class Args:
    # Data

    env_id: str | None = None  # a D4RL name or a Minari id (none: the bundled dataset)
    dataset_path: Path | None = None  # a D4RL-schema HDF5 file; env_id is its simulator, if given

    # Rewards

    label_fraction: float | None = None  # share of known rewards shown (0.01; 1 if some are NaN)
    reward_model: Literal["mlp", "gp"] = "mlp"  # mlp: the paper's; gp: Gaussian process, few labels
    reward_hidden_dim: int = 256  # width of the MLP's two hidden layers
    reward_epochs: int = 300  # the MLP's passes over the labelled transitions
    reward_learning_rate: float = 1e-4  # Adam's, for the MLP
    reward_batch_size: int = 64  # labelled transitions in a batch
    sweep: bool = False  # also judge all models at 10, 30, 100, 300, 1,000 labels and at 1%

    # Seeds and speed

    seed: int = 0  # the first seed
    num_seeds: int = 1  # seeds fitted at once, each to labels of its own: seed, seed + 1, ...
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes the GPU if there is one
    compile: Literal["auto", "on", "off"] = "auto"  # compile what takes the time; auto: if it pays
    matmul_precision: Literal["auto", "highest", "high", "medium"] = "auto"  # auto: fastest float32
    cuda_graph: bool = True  # on a GPU, record an update as a CUDA graph and replay it

    # Output

    output_path: Path | None = None  # HDF5 file to write, rewards imputed by --reward-model
    output_minari_id: str | None = None  # Minari dataset to make likewise, such as my/log-v0
    run_dir: Path | None = None  # where to write the report (runs/...)


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


# --- Judging ---
def linear_regression(dataset: Dataset, labeled: np.ndarray) -> np.ndarray:
    """Least squares on (s, a, 1): each seed's prediction of every row, labelled too; (seeds, N)."""
    rewards = np.empty((len(labeled), len(dataset.rewards)), np.float32)
    inputs = np.hstack([dataset.observations, dataset.actions]).astype(np.float64)
    for seed_rewards, rows in zip(rewards, labeled):
        center = inputs[rows].mean(axis=0)  # then the intercept is the mean reward
        true = dataset.rewards[rows].astype(np.float64)
        weights, *_ = np.linalg.lstsq(inputs[rows] - center, true - true.mean())
        seed_rewards[:] = (inputs - center) @ weights + true.mean()
    return rewards


def fit_and_predict(kind: str, dataset: Dataset, labeled: np.ndarray, seeds: range, args, device):
    """A fitted model (None: linear), and its f(s, a) of every row, labelled or not; (seeds, N)."""
    if kind == "linear":
        return None, linear_regression(dataset, labeled)
    args = replace(args, reward_model=kind)
    generators = make_generators(seeds, stream=1)
    reward_model = RewardModel(dataset, labeled, generators, args).to(device)
    fit_reward_model(reward_model, dataset, labeled, generators, args)
    no_labels = labeled[:, :0]  # a label would be kept as it is
    return reward_model, impute_rewards(reward_model, dataset, no_labels)


def judge(predicted: np.ndarray, dataset: Dataset, labeled: np.ndarray) -> dict[str, list]:
    """Each seed's mean squared error on its labels, and its quality on the hidden rewards."""
    imputed = predicted.copy()
    np.put_along_axis(imputed, labeled, dataset.rewards[labeled], axis=1)
    error = np.take_along_axis(predicted, labeled, axis=1) - dataset.rewards[labeled]
    train_mse = np.mean(np.square(error, dtype=np.float64), axis=1).tolist()
    quality = imputation_quality(imputed, dataset, labeled)  # not None: callers hide some rewards
    return {"train_mse": train_mse} | quality


@torch.no_grad()
def posterior_std(reward_model: RewardModel, observations, actions) -> torch.Tensor:
    """One standard deviation of a reward around its expectation f(s, a), (seeds, batch).

    The variance of f, equation 2.26 of Rasmussen & Williams (2006), plus the labels' noise."""
    gp = reward_model.model
    x = gp.inputs(observations, actions)
    L = gp.cholesky(gp.x)
    solved = torch.linalg.solve_triangular(L, gp.kernel(gp.x, x), upper=False)
    prior = gp.kernel(x, x).diagonal(dim1=1, dim2=2)
    variance = prior - solved.square().sum(dim=1)
    noise = gp.log_noise.exp().squeeze(-1) + 1e-4
    return reward_model.reward_std * (variance.clamp(min=0) + noise).sqrt()


def calibrate(reward_model: RewardModel, predicted, dataset: Dataset, labeled) -> dict:
    """Of the first seed, up to 1,000 hidden rewards with their predictions and 2 std of those."""
    hidden = hidden_rows(dataset, labeled[0])
    rows = np.random.default_rng(0).permutation(hidden)[:1000]
    device, num_seeds = reward_model.reward_mean.device, len(labeled)
    observations = torch.from_numpy(dataset.observations[rows]).to(device)
    actions = torch.from_numpy(dataset.actions[rows]).to(device)
    each_seed = observations.expand(num_seeds, -1, -1), actions.expand(num_seeds, -1, -1)
    margin = 2 * posterior_std(reward_model, *each_seed)[0].cpu().numpy()
    true, expected = dataset.rewards[rows], predicted[0, rows]
    inside = float(np.mean(np.abs(true - expected) <= margin))
    return {"true": true, "expected": expected, "margin": margin, "inside": inside}


def hidden_rows(dataset: Dataset, labeled: np.ndarray) -> np.ndarray:
    """Transitions with a known reward that one seed's model has not seen."""
    return np.setdiff1d(np.flatnonzero(~np.isnan(dataset.rewards)), labeled)


def mean_std(values: list) -> str:
    if not np.isfinite(values).all():
        return "unknown"
    return f"{np.mean(values):.4g} ± {np.std(values):.2g}"


def print_quality(quality: dict[str, dict]) -> None:
    """A row for each model, a column for each number."""
    titles = ["train MSE", "R2", "MSE", "MAE", "return correlation"]
    print("\n" + " " * 8 + "".join(title.rjust(22) for title in titles))
    for name, numbers in quality.items():
        cells = [mean_std(values).rjust(22) for values in numbers.values()]
        print(name.ljust(8) + "".join(cells))
    print()


# --- Pictures ---
def save_picture(path: Path, figure: Figure) -> None:
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=150)


def report_figure(dataset, kind: str, predicted, labeled, quality: dict, calibration) -> Figure:
    """Predicted against true rewards, an episode, the returns, the models compared."""
    figure = Figure(figsize=(10, 8), layout="constrained")
    panels = figure.subplots(2, 2)
    imputed = predicted[0].copy()
    imputed[labeled[0]] = dataset.rewards[labeled[0]]
    draw_rewards(panels[0, 0], figure, dataset, predicted[0], labeled[0], calibration)
    panels[0, 0].set_title(f"{kind}: $R^2$ = {quality[kind]['r2'][0]:.3f}")
    draw_episode(panels[0, 1], dataset, imputed, labeled[0])
    draw_returns(panels[1, 0], dataset, imputed)
    r2 = [numbers["r2"] for numbers in quality.values()]
    r2 = np.where(np.isfinite(r2), r2, 0)  # that of a single hidden reward is not defined
    means, stds = r2.mean(axis=1), r2.std(axis=1)
    bars = panels[1, 1].bar(list(quality), means, yerr=stds, capsize=4, color="tab:blue")
    panels[1, 1].bar_label(bars, fmt="%.3f", label_type="center", color="white")
    panels[1, 1].set(ylabel="$R^2$ on hidden or held-out rewards")
    panels[1, 1].set_ylim(min(0, *means), 1.02)
    panels[1, 1].set_title(f"the same {labeled.shape[1]:,} labels, {len(labeled)} seed(s)")
    return figure


def draw_rewards(axes, figure: Figure, dataset, predicted, labeled, calibration) -> None:
    hidden = hidden_rows(dataset, labeled)
    true = dataset.rewards[hidden]
    if len(hidden) > 100:
        settings = {"gridsize": 60, "bins": "log", "cmap": "cividis", "mincnt": 1}
        image = axes.hexbin(true, predicted[hidden], linewidths=0.1, **settings)
        figure.colorbar(image, ax=axes, label=f"transitions, of {len(hidden):,} hidden")
    else:
        axes.plot(true, predicted[hidden], "o", color="tab:blue", markersize=4)
    axes.axline((true.mean(), true.mean()), slope=1, color="black", linewidth=0.8, linestyle="--")
    axes.set(xlabel="true reward", ylabel="predicted reward")
    if calibration:  # the first hundred of the sample
        points = {name: calibration[name][:100] for name in ("true", "expected", "margin")}
        style = {"fmt": "o", "color": "tab:red", "markersize": 2, "elinewidth": 0.8}
        axes.errorbar(
            points["true"], points["expected"], points["margin"], label="± 2 std", **style
        )
        axes.legend(loc="upper left")


def draw_episode(axes, dataset: Dataset, imputed: np.ndarray, labeled: np.ndarray) -> None:
    """The beginning of the episode of median return."""
    returns = np.bincount(dataset.episode_ids, imputed)
    episode = np.argsort(returns)[len(returns) // 2]
    rows = np.flatnonzero(dataset.episode_ids == episode)[:150]
    given = np.flatnonzero(np.isin(rows, labeled))
    if np.count_nonzero(~np.isnan(dataset.rewards[rows])) > len(given):  # a true one is hidden
        # With dots, since one that stands alone among NaN has no line.
        style = {"color": "black", "marker": ".", "markersize": 4, "linewidth": 1.5}
        axes.plot(dataset.rewards[rows], label="true", **style)
    axes.plot(imputed[rows], color="tab:orange", linewidth=1, label="imputed")
    axes.plot(given, imputed[rows[given]], "o", color="tab:blue", markersize=5, label="labelled")
    axes.set(
        xlabel="step", ylabel="reward", title=f"episode {episode}, its first {len(rows)} steps"
    )
    axes.margins(y=0.2)
    axes.legend(loc="lower center", ncols=3)


def draw_returns(axes, dataset: Dataset, imputed: np.ndarray) -> None:
    returns = np.bincount(dataset.episode_ids, imputed)
    true_returns = np.bincount(dataset.episode_ids, dataset.rewards)  # NaN: not known as a whole
    known = np.isfinite(true_returns)
    if not known.any():
        axes.hist(returns, bins=50, color="tab:blue")
        axes.set(xlabel="imputed return", ylabel="episodes", title="returns (no true one is known)")
        return
    axes.plot(true_returns[known], returns[known], "o", color="tab:blue", markersize=3, alpha=0.6)
    middle = true_returns[known].mean()
    axes.axline((middle, middle), slope=1, color="black", linewidth=0.8, linestyle="--")
    axes.set(xlabel="true return", ylabel="imputed return", title=f"{known.sum():,} episodes")


def sweep_counts(dataset: Dataset) -> list[int]:
    """Numbers of labels of a sweep; some known rewards must stay hidden."""
    num_known = np.count_nonzero(~np.isnan(dataset.rewards))
    counts = {10, 30, 100, 300, 1000, round(0.01 * num_known)}
    return sorted(count for count in counts if 2 <= count < num_known)


def sweep(dataset: Dataset, seeds: range, args: Args, device, run_dir: Path) -> list[dict]:
    """R2 of each model against the number of labels: printed, in sweep.csv and in sweep.png."""
    num_known = np.count_nonzero(~np.isnan(dataset.rewards))
    table = []
    for count in sweep_counts(dataset):
        labeled = split_labels(dataset.rewards, count / num_known, seeds)
        if (np.ptp(dataset.rewards[labeled], axis=1) == 0).any():
            print(f"{count:10,} labels   skipped: those of a seed are all equal")
            continue
        for kind in ("mlp", "gp", "linear"):
            _, predicted = fit_and_predict(kind, dataset, labeled, seeds, args, device)
            r2 = judge(predicted, dataset, labeled)["r2"]
            row = {"labels": count, "model": kind}
            with np.errstate(invalid="ignore"):  # of hidden rewards that are all equal, R2 is -inf
                row |= {"r2_mean": np.mean(r2), "r2_std": np.std(r2), "r2_worst": np.min(r2)}
            table.append(row)
            print(f"{count:10,} labels   {kind:6s}   R2 {mean_std(r2)}")
    if not table:
        return table
    write_csv(run_dir / "sweep.csv", table)
    save_picture(run_dir / "sweep.png", sweep_figure(table))
    return table


def sweep_figure(table: list[dict]) -> Figure:
    figure = Figure(figsize=(5.5, 4), layout="constrained")
    axes = figure.subplots()
    styles = {"mlp": ("MLP", "tab:blue", "o-"), "gp": ("Gaussian process", "tab:orange", "s-")}
    styles["linear"] = ("linear regression", "gray", "^--")
    for kind, (title, color, style) in styles.items():
        rows = [row for row in table if row["model"] == kind]
        x, mean = [row["labels"] for row in rows], [row["r2_mean"] for row in rows]
        std = [row["r2_std"] for row in rows]
        axes.errorbar(x, mean, std, color=color, fmt=style, capsize=3, label=title)
    axes.set(xscale="log", xlabel="labels", ylabel="$R^2$ on the hidden rewards")
    lowest = min(np.nan_to_num(row["r2_worst"], posinf=0, neginf=0) for row in table)
    axes.set_ylim(np.clip(lowest, -1, -0.05), 1.02)  # the table has what is below -1
    axes.legend(loc="lower right")
    return figure


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


# --- Writing the imputed dataset ---
def write_hdf5(source: Path, target: Path, columns: dict, notes: dict) -> None:
    """A copy of `source` with all rewards of the first seed, and the boolean column `labeled`."""
    content = io.BytesIO(source.read_bytes())  # in memory: HDF5 cannot recover from a full disk
    with h5py.File(content, "r+") as file:
        shape = file["rewards"].shape
        columns = columns | {"rewards": columns["rewards"].reshape(shape)}
        for name, column in columns.items():
            if name in file:
                del file[name]
            file.create_dataset(name, data=column, compression="gzip")
        for name, value in notes.items():
            file.attrs[f"imputation_{name}"] = to_json(value)
    with replacing(target) as file:
        file.write(content.getbuffer())


def complete_rows(source: Path, follow_d4rl: bool, reward_model, dataset, labeled) -> dict:
    """`rewards` and `labeled` of every row of the file, also those that are no transition."""
    arrays = read_columns(source)
    terminals, timeouts = find_ends(source, arrays)
    is_kept = find_transitions(arrays, terminals, timeouts, follow_d4rl)
    is_known = ~np.isnan(arrays["rewards"])
    is_label = np.zeros(len(is_known), bool)
    is_label[np.flatnonzero(is_kept)[labeled[0]]] = True
    # If no reward is hidden, those of dropped rows are labels, too.
    if labeled.shape[1] == np.count_nonzero(is_known[is_kept]):
        is_label |= is_known

    names = ("observations", "actions", "rewards")
    every_row = dataset._replace(**{name: arrays[name] for name in names})
    completed = impute_rewards(reward_model, every_row, labeled[:, :0])[0]
    with h5py.File(source) as file:
        exact = file["rewards"][()].reshape(-1)  # labels stay as they are, also in float64
    completed = completed.astype(np.result_type(exact, np.float32))
    completed[is_label] = exact[is_label]
    return {"rewards": completed, "labeled": is_label}


def is_minari(args: Args) -> bool:
    """Whether the source is a Minari dataset, not an HDF5 file."""
    return not args.dataset_path and args.env_id is not None and args.env_id not in SHA256


def read_episodes(args: Args, dataset: Dataset) -> list[dict[str, np.ndarray]]:
    """What Minari holds of each episode: T + 1 observations, T actions, T ends of either kind."""
    # Whether the source tells what was observed after an episode's last step.
    knows_final = is_minari(args)
    if args.dataset_path:
        knows_final = "next_observations" in read_columns(args.dataset_path)
    # A new episode also begins where a row does not start from the observation with which the
    # row before it ended.
    follows = (dataset.next_observations[:-1] == dataset.observations[1:]).all(axis=1)
    follows &= np.diff(dataset.episode_ids) == 0
    episodes = []
    starts = np.flatnonzero(~follows) + 1
    for rows in np.split(np.arange(len(dataset.rewards)), starts):
        last, terminations = rows[-1], dataset.terminals[rows] == 1
        final = dataset.next_observations[last]
        if terminations[-1] and not knows_final:  # the last observation stands in
            final = dataset.observations[last]
        episodes.append(
            {
                "rows": rows,
                "observations": np.vstack([dataset.observations[rows], final]),
                "actions": dataset.actions[rows],
                "terminations": terminations,
                "truncations": (rows == last) & ~terminations,
            }
        )
    return episodes


def write_minari(args: Args, dataset: Dataset, labeled, rewards: np.ndarray, env_spec) -> None:
    """A Minari dataset of the same transitions with all rewards of the first seed."""
    is_label = np.isin(np.arange(len(dataset.rewards)), labeled[0])
    buffers = []
    for episode in read_episodes(args, dataset):
        rows = episode.pop("rows")
        infos = {"labeled": is_label[rows]}
        buffers.append(EpisodeBuffer(**episode, rewards=rewards[0, rows], infos=infos))
    low, high = dataset.actions.min(axis=0), dataset.actions.max(axis=0)
    if is_minari(args):
        space = minari.load_dataset(args.env_id).action_space
        low, high = space.low.astype(np.float32), space.high.astype(np.float32)
    obs_dim = dataset.observations.shape[1]
    spaces = {
        "observation_space": gym.spaces.Box(-np.inf, np.inf, (obs_dim,), np.float32),
        "action_space": gym.spaces.Box(low, high, dtype=np.float32),
    }
    text = f"{dataset.name} with imputed rewards; infos/labeled marks the {labeled.shape[1]} given"
    references = {"ref_min_score": dataset.ref_min, "ref_max_score": dataset.ref_max}
    exists = get_dataset_path(args.output_minari_id).exists()  # made during the fit
    require(not exists, f"--output-minari-id {args.output_minari_id} exists already")
    try:
        with warnings.catch_warnings(action="ignore"):  # that author, email and link are missing
            made = minari.create_dataset_from_buffers(
                args.output_minari_id, buffers, description=text, **spaces
            )
        if not np.isnan(dataset.ref_min):
            made.storage.update_metadata(references)
        if env_spec:
            made.storage.update_metadata({"env_spec": env_spec.to_json()})
    except BaseException:
        if get_dataset_path(args.output_minari_id).exists():  # a part of it
            minari.delete_dataset(args.output_minari_id)
        raise


def find_env_spec(env: str | minari.MinariDataset | None) -> gym.envs.registration.EnvSpec | None:
    """The spec of a simulator, without making it; UserError if there is none to store."""
    if env is None:
        return None
    if isinstance(env, minari.MinariDataset):
        return env.env_spec
    module, _, name = env.rpartition(":")
    try:
        if module:  # my_package:MyEnv-v0
            import_module(module)
        spec = gym.spec(name)
        spec.to_json()  # fails for one registered by its class or a function, not by their name
        return spec
    except Exception as error:  # unknown id, missing package, or the package's own
        raise UserError(f"cannot find or store the environment of {env}: {error}") from error


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
    """Everything that can be wrong with a command, before anything is fitted."""
    require(0 <= args.seed, "--seed must be 0 or more")
    require(0 < args.num_seeds, "--num-seeds must be at least 1")
    check_common_arguments(args)
    held = args.run_dir and (args.run_dir / "config.json").exists()  # before anything is loaded
    require(not held, f"{args.run_dir} already holds a run: choose another --run-dir")
    if args.output_path:
        exists = args.output_path.exists()
        require(not exists, f"--output-path {args.output_path} exists already")
        folder = args.output_path.absolute().parent
        require(folder.is_dir(), f"--output-path {args.output_path}: there is no folder {folder}")
        tempfile.TemporaryFile(dir=folder).close()  # an OSError where nothing can be written
        hint = "--output-path needs an HDF5 source: for Minari there is --output-minari-id"
        require(not is_minari(args), hint)
    if args.output_minari_id:
        try:
            parse_dataset_id(args.output_minari_id)
        except (ValueError, TypeError) as error:  # TypeError: no version
            message = f"--output-minari-id {args.output_minari_id} is not of the form my/name-v0"
            raise UserError(message) from error
        exists = get_dataset_path(args.output_minari_id).exists()
        require(not exists, f"--output-minari-id {args.output_minari_id} exists already")


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


def four_fifths(labeled: np.ndarray, seeds: range) -> np.ndarray:
    """Four fifths of each seed's labels, to fit to: the others are all there is to judge on."""
    count = max(1, int(0.8 * labeled.shape[1]))
    draws = []
    for seed, rows in zip(seeds, labeled):
        draws.append(np.random.default_rng(seed).permutation(rows)[:count])
    return np.sort(draws, axis=1)


def main(args: Args) -> None:
    check_arguments(args)
    seeds = range(args.seed, args.seed + args.num_seeds)
    device = choose_device(args.device)

    # 1. The transitions, and the few of each seed whose reward may be seen.
    dataset = load_dataset(args.env_id, args.dataset_path)
    env_spec = find_env_spec(dataset.env) if args.output_minari_id else None
    labeled = split_labels(dataset.rewards, args.label_fraction, seeds)
    num_known = np.count_nonzero(~np.isnan(dataset.rewards))
    num_episodes = dataset.episode_ids[-1] + 1
    fitted_to, judged_on = labeled, "the hidden rewards"
    if labeled.shape[1] == num_known:  # nothing is hidden
        fitted_to = four_fifths(labeled, seeds)
        num_held_out = labeled.shape[1] - fitted_to.shape[1]
        judged_on = f"{num_held_out:,} labels, held out; the model written is then fitted to all"
    num_rows = len(dataset.rewards)
    print(f"dataset       {dataset.name}: {num_rows:,} transitions, {num_episodes:,} episodes")
    print(
        f"labels        {labeled.shape[1]:,} of {num_known:,} known rewards, {len(seeds)} seed(s)"
    )
    check_labels(dataset, fitted_to)
    enough = len(sweep_counts(dataset)) > 0
    require(enough or not args.sweep, "--sweep: there are not enough labels to hide some of them")
    num_steps = args.reward_epochs * math.ceil(labeled.shape[1] / args.reward_batch_size)
    precision = choose_precision(args.matmul_precision, device, None)
    set_speed(precision, choose_compile(args.compile, num_steps))
    run_dir = make_run_dir(args.run_dir, f"{dataset.name}__reward_model__{args.seed}")
    write_config(run_dir, asdict(args), resume=False)

    # 2. The models, fitted to the same labels, and 3. how good they are.
    quality, calibration = {}, None
    for kind in ("mlp", "gp", "linear"):
        model, predicted = fit_and_predict(kind, dataset, fitted_to, seeds, args, device)
        quality[kind] = judge(predicted, dataset, fitted_to)
        if kind == args.reward_model:
            reward_model, chosen = model, predicted
    print(f"judged on     {judged_on}")
    print_quality(quality)
    if args.reward_model == "gp":
        calibration = calibrate(reward_model, chosen, dataset, fitted_to)
        inside = f"{calibration['inside']:.1%}"
        print(f"calibration   {inside} of those rewards are within ± 2 std (should be 95%)")
    figure = report_figure(dataset, args.reward_model, chosen, fitted_to, quality, calibration)
    save_picture(run_dir / "report.png", figure)
    result = {"num_labels": labeled.shape[1], "judged_on": judged_on, "quality": quality}
    result["reward_model"] = args.reward_model
    result["inside_2_std"] = calibration["inside"] if calibration else None
    if args.sweep:
        result["sweep"] = sweep(dataset, seeds, args, device, run_dir)
    result["versions"] = {m.__name__: m.__version__ for m in (torch, np, gym, minari)}
    write_json(run_dir / "result.json", result)

    # 4. The model, fitted to all labels, and the dataset with the rewards of its first seed.
    if fitted_to is not labeled:
        reward_model, _ = fit_and_predict(args.reward_model, dataset, labeled, seeds, args, device)
    state = {
        name.removeprefix("model."): x.cpu().numpy()
        for name, x in reward_model.state_dict().items()
    }
    with replacing(run_dir / "reward_model.npz") as file:
        np.savez(file, **state)
    if args.output_path:
        source = args.dataset_path or find_file(dataset.name)
        follow_d4rl = args.dataset_path is None
        columns = complete_rows(source, follow_d4rl, reward_model, dataset, labeled)
        notes = {"quality": quality, "judged_on": judged_on, "settings": asdict(args)}
        write_hdf5(source, args.output_path, columns, notes)
        num_labels = np.count_nonzero(columns["labeled"])
        print(
            f"written       {args.output_path}: {num_labels:,} labels, all else imputed; train on it "
            "with --rewards oracle"
        )
        num_unknown = np.count_nonzero(~np.isfinite(columns["rewards"]))
        if num_unknown > 0:
            print(f"unknown       {num_unknown:,} rewards: observation or action is NaN or inf")
    if args.output_minari_id:
        rewards = impute_rewards(reward_model, dataset, labeled)
        write_minari(args, dataset, labeled, rewards, env_spec)
        print(
            f"written       {args.output_minari_id}: {labeled.shape[1]:,} labels, all else imputed; "
            "train on it with --rewards oracle"
        )
    print(f"result        R2 {mean_std(quality[args.reward_model]['r2'])}, in {run_dir}")


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # each line at once; ± is no error in any locale
            stream.reconfigure(line_buffering=True, errors="replace")
    try:
        main(tyro.cli(Args, description=__doc__))
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, OSError, ImportError, gym.error.Error) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
