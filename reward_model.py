# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0", "numpy>=2.0,<3", "gymnasium[mujoco]>=1.2,<2", "mujoco>=3.3,<5",
#   "minari[hdf5,hf]>=0.5.3,<0.6", "h5py>=3.12,<4", "tyro>=0.9.2,<2", "tqdm>=4.66,<5",
#   "wandb>=0.19,<1", "matplotlib>=3.9,<4", "pytest>=8,<10"
# ]
# ///
"""Look at a dataset in which only a few transitions have a reward, and complete it.

1. Load transitions; of the known rewards, choose the labels to fit to, and those to judge on.
2. Fit reward models f(s, a) to the labels: the paper's (Eq. 4), a Gaussian process, a linear one;
   say how good they are.
3. Write the dataset with every other reward imputed (Eq. 5), for td3bc_imputed.py, iql_imputed.py
   or any other library.
4. Report, and say what to do next.

The equations are those of "Offline Reinforcement Learning with Imputed Rewards" (Romeo & Bagdanov,
2024). The method is the section Reward model; at a first reading, skip from there to main().

    python reward_model.py                                                  # bundled dataset
    python reward_model.py --env-id walker2d-medium-replay-v2 --sweep       # how many labels?
    python reward_model.py --dataset-path log.hdf5 --output-path full.hdf5  # NaN = no label
"""

import hashlib
import io
import json
import math
import os
import re
import shlex
import shutil
import socket
import sys
import textwrap
import warnings
from dataclasses import dataclass
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import h5py
import minari
import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from minari.data_collector import EpisodeBuffer
from minari.storage import get_dataset_path
from torch import nn
from torch.distributions import MultivariateNormal
from tqdm import tqdm


@dataclass(frozen=True)
class Args:
    # --- Data
    env_id: str | None = None  # D4RL or Minari dataset (none: bundled); or dataset_path's simulator
    dataset_path: Path | None = None  # your own HDF5 file: README.md has a table of its columns

    # --- Rewards
    label_fraction: float | None = None  # share of known rewards used (D4RL, bundled: 0.01; else 1)
    reward_model: Literal["mlp", "gp"] = "mlp"  # mlp: the paper's; gp: Gaussian process, few labels
    reward_hidden_dim: int = 256  # width of the reward model's two hidden layers
    reward_epochs: int = 300  # passes over the labels in the reward model's fit
    reward_learning_rate: float = 1e-4  # Adam's, for the reward model
    reward_batch_size: int = 64  # labels in a batch
    sweep: bool = False  # judge the models on 10, 30, 100, ... of the labels, too

    # --- Seeds and device
    seed: int = 0  # the first seed
    num_seeds: int = 1  # seeds fitted at once: seed, seed + 1, ...
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes the GPU if there is one

    # --- Output
    output_path: Path | None = None  # HDF5 file to write, rewards imputed by --reward-model
    output_minari_id: str | None = None  # Minari dataset to make likewise, such as my/log-v0
    run_dir: Path | None = None  # where to write the report (runs/...)


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


# --- Gaussian process: another reward model, for few labels (not in the paper) ---
class GaussianProcess(nn.Module):
    """Bayesian linear regression plus a smooth function, once per seed, for --reward-model gp.

    f(x) = b + sum_j w_j x_j + g(x) for x = (s, a). Before any label is seen, all are random: the
    constant b ~ N(0, 1), slopes w_j ~ N(0, linear * r_j), and g, with a variance `smooth` and a
    length l_j for each input. So f(x) and f(z) have the covariance k(x, z) =
        1 + linear * sum_j r_j x_j z_j + smooth * exp(-sum_j (x_j - z_j)^2 / (2 l_j^2)).
    Given labels y = f(X) + N(0, noise), the mean of f is
        f(x) = k(x, X) @ weights  with  weights = (k(X, X) + noise I)^-1 y.    (2.25)
    fit() finds noise, linear, r_j, smooth, l_j. Equations: Rasmussen & Williams (2006)."""

    def __init__(self, mean, std, num_seeds: int):
        super().__init__()
        in_dim = len(mean)
        self.register_buffer("mean", mean)  # (in_dim,), as in MLP
        self.register_buffer("std", std)
        # As logarithms they stay positive; a first guess, for inputs and labels of variance 1.
        one = torch.ones(num_seeds, 1, 1).to(mean).double()
        each_input = one.repeat(1, 1, in_dim)
        self.log_noise = nn.Parameter(-1 * one)
        self.log_linear = nn.Parameter(-math.log(in_dim) * one)
        self.log_smooth = nn.Parameter(-1 * one)
        self.log_relevance = nn.Parameter(0 * each_input)  # r_j
        self.log_inverse_length = nn.Parameter(-math.log(in_dim) / 2 * each_input)  # 1 / l_j

    def inputs(self, observations, actions) -> torch.Tensor:
        x = torch.cat([observations, actions], dim=-1)
        x = (x - self.mean) / self.std
        return x.double()  # float32 is too coarse to invert k(X, X)

    def kernel(self, x1, x2) -> torch.Tensor:
        """k of all pairs: (seeds, n, in_dim), (seeds, m, in_dim) -> (seeds, n, m)."""
        product = (x1 * self.log_relevance.exp()) @ x2.mT
        inverse_length = self.log_inverse_length.exp()
        distance = torch.cdist(x1 * inverse_length, x2 * inverse_length)
        rbf = torch.exp(-distance.square() / 2)
        return 1 + self.log_linear.exp() * product + self.log_smooth.exp() * rbf

    def covariance(self, x: torch.Tensor) -> torch.Tensor:
        """Of labels at these inputs: k(X, X) + noise I."""
        noise = self.log_noise.exp() + 1e-4  # 1e-4: so that the matrix stays positive definite
        identity = torch.eye(x.shape[1]).to(x)
        return self.kernel(x, x) + noise * identity

    def fit(self, observations, actions, rewards):
        """Find the most plausible parameters given the labels, then the weights."""
        x, y = self.inputs(observations, actions), rewards.double()
        # Time grows with their cube: 2,000 labels at most, and of these 500 for the parameters.
        rows = spread(2000, x.shape[1])
        x, y = x[:, rows], y[:, rows]
        rows = spread(500, x.shape[1])
        x_few, y_few = x[:, rows], y[:, rows]
        prior_means = [parameter.detach().clone() for parameter in self.parameters()]
        optimizer = torch.optim.Adam(self.parameters(), lr=0.1)
        for _ in range(100):
            prior = MultivariateNormal(torch.zeros_like(y_few), self.covariance(x_few))
            loss = -prior.log_prob(y_few).sum()  # -log p(y | parameters), summed over seeds (2.30)
            # -log p(parameters): each is normal with variance 1 around where it started.
            for parameter, prior_mean in zip(self.parameters(), prior_means):
                loss = loss + (parameter - prior_mean).square().sum() / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.register_buffer("x", x)
        weights = torch.linalg.solve(self.covariance(x), y.unsqueeze(-1))
        self.register_buffer("weights", weights.detach())

    def forward(self, observations, actions) -> torch.Tensor:
        """The mean of f: (seeds, batch, ...) -> (seeds, batch)."""
        k = self.kernel(self.inputs(observations, actions), self.x)
        return (k @ self.weights).squeeze(-1)

    def label_std(self, observations, actions) -> torch.Tensor:
        """One std of a label around the mean of f: (seeds, batch, ...) -> (seeds, batch)."""
        x = self.inputs(observations, actions)
        k = self.kernel(self.x, x)  # (seeds, labels, batch)
        solved = torch.linalg.solve(self.covariance(self.x), k)
        explained = (k * solved).sum(dim=1)
        variance = self.covariance(x).diagonal(dim1=1, dim2=2) - explained  # (2.26), plus noise
        return variance.clamp(min=1e-4).sqrt()


def spread(count, num_rows):
    """At most `count` row numbers, evenly from all over the rows."""
    return torch.linspace(0, num_rows - 1, min(count, num_rows)).long()


# --- Judging ---
KINDS = ("mlp", "gp", "linear")


def hold_out(label_rows, dataset) -> list:
    """Labels to fit to, and transitions to judge on, a mask (seeds, N): each fifth in turn.

    Whole episodes are held out, since a transition is nearly a copy of its neighbors in time."""
    rows = label_rows[0]  # all that are known, the same for all seeds
    episode_ids = dataset.episode_ids[rows]
    episodes = np.random.default_rng(0).permutation(np.unique(episode_ids))
    folds = [rows[int(0.8 * len(rows)) :]]
    if len(episodes) > 1:
        parts = np.array_split(episodes, min(5, len(episodes)))
        folds = [rows[np.isin(episode_ids, part)] for part in parts]
    if len(rows) > 2000:  # one fifth is enough, and saves time
        folds = folds[:1]
    splits = []
    for fold in folds:
        others = np.setdiff1d(rows, fold)
        require(len(others) > 1, "too few labels to hold some out: label more")
        is_judged = np.isin(np.arange(len(dataset.rewards)), fold)
        all_seeds = (len(label_rows), 1)
        split = np.tile(others, all_seeds), np.tile(is_judged, all_seeds)
        splits.append(split)
    return splits


def fit_and_predict(kind, dataset, label_rows, seeds, args, device) -> tuple:
    """A fitted model (None: linear), and its prediction for every transition, (seeds, N)."""
    observations, actions = dataset.observations, dataset.actions
    labels = dataset.rewards[label_rows]
    if kind == "linear":
        inputs = np.hstack([observations, actions]).astype(np.float64)
        predicted = []
        for rows, seed_labels in zip(label_rows, labels):
            center = inputs[rows].mean(axis=0)  # then the intercept is the mean reward
            mean = seed_labels.mean()
            weights, *_ = np.linalg.lstsq(inputs[rows] - center, seed_labels - mean)
            predicted.append((inputs - center) @ weights + mean)
        return None, np.array(predicted)
    generators, dim = make_generators(seeds, stream=1), args.reward_hidden_dim
    reward_model = RewardModel(observations, actions, labels, dim, generators).to(device)
    examples = observations[label_rows], actions[label_rows], labels
    if kind == "gp":
        mlp = reward_model.model
        reward_model.model = GaussianProcess(mlp.mean, mlp.std, len(seeds))
        s, a, y = [torch.from_numpy(x).to(device) for x in examples]
        reward_model.model.fit(s, a, (y - reward_model.reward_mean) / reward_model.reward_std)
    else:
        generator = torch.Generator(device).manual_seed(args.seed)
        settings = args.reward_epochs, args.reward_learning_rate, args.reward_batch_size
        fit_reward_model(reward_model, examples, *settings, generator)
    return reward_model, predict_rewards(reward_model, observations, actions)


@torch.no_grad()
def share_inside(reward_model, predicted, dataset, is_judged):
    """The share of rewards within 2 std of the first seed's Gaussian process: 95% if it is right."""
    rows = np.flatnonzero(is_judged)
    rows = np.random.default_rng(0).permutation(rows)[:1000]
    device = reward_model.reward_mean.device
    num_seeds = len(predicted)
    s = torch.from_numpy(dataset.observations[rows]).to(device).expand(num_seeds, -1, -1)
    a = torch.from_numpy(dataset.actions[rows]).to(device).expand(num_seeds, -1, -1)
    std = reward_model.model.label_std(s, a)
    std = (reward_model.reward_std * std)[0].cpu().numpy()
    error = np.abs(dataset.rewards[rows] - predicted[0, rows])
    return np.mean(error <= 2 * std)


def judge(kind, dataset, splits, seeds, args, device) -> tuple:
    """Predictions of what is judged by models not fitted to it, NaN elsewhere; the last model."""
    predictions = np.nan
    inside = []
    for label_rows, is_judged in splits:
        model, predicted = fit_and_predict(kind, dataset, label_rows, seeds, args, device)
        predictions = np.where(is_judged, predicted, predictions)
        if kind == "gp":
            inside.append(share_inside(model, predicted, dataset, is_judged[0]))
    return predictions, model, inside


def measure(predictions, dataset) -> dict:
    """Each seed's R2 and mean absolute error where it is not NaN, and correlation of returns."""
    rewards, episode_ids = dataset.rewards, dataset.episode_ids
    returns = np.bincount(episode_ids, weights=rewards)  # NaN if one of the rewards is unknown
    whole = ~np.isnan(returns)
    quality = {"r2": [], "mae": [], "return_correlation": []}
    for predicted in predictions:
        is_judged = ~np.isnan(predicted)
        true = rewards[is_judged]
        error = predicted[is_judged] - true
        completed = np.where(is_judged, predicted, rewards)
        imputed_returns = np.bincount(episode_ids, weights=completed)
        with np.errstate(divide="ignore", invalid="ignore"):  # rewards or returns that are equal
            mse = np.mean(error**2)
            quality["r2"].append(1 - mse / np.var(true))
            quality["mae"].append(np.mean(np.abs(error)))
            if np.count_nonzero(whole) > 1:
                correlation = np.corrcoef(returns[whole], imputed_returns[whole])[0, 1]
                quality["return_correlation"].append(correlation)
    return {name: values for name, values in quality.items() if values}


def sweep(dataset, splits, seeds, args, device) -> list:
    """R2 of each model, of each seed, fitted to some of the labels."""
    table = []
    num_labels = min(label_rows.shape[1] for label_rows, _ in splits)
    for count in (10, 30, 100, 300, 1_000, 3_000, 10_000):
        if count >= num_labels:
            break
        fewer = [(some_of(label_rows, count, seeds), mask) for label_rows, mask in splits]
        ranges = [np.ptp(dataset.rewards[label_rows], axis=1) for label_rows, _ in fewer]
        if np.min(ranges) == 0:
            continue  # labels that are all equal teach nothing
        for kind in KINDS:
            predictions, _, _ = judge(kind, dataset, fewer, seeds, args, device)
            r2 = measure(predictions, dataset)["r2"]
            table.append({"labels": count, "model": kind, "r2": r2})
            print(f"{count:10,} labels   {kind:6s}   R2 {show(r2)}")
    return table


def some_of(label_rows, count, seeds):
    """At random `count` of each seed's labels."""
    chosen = []
    for seed, rows in zip(seeds, label_rows):
        chosen.append(np.random.default_rng(seed).permutation(rows)[:count])
    return np.sort(chosen, axis=1)


# --- Pictures: black is true, orange imputed, blue a label ---
def draw_rewards(axes, rewards, predictions, judged):
    rows = np.flatnonzero(~np.isnan(predictions))
    some = np.random.default_rng(0).permutation(rows)[:2000]
    true = rewards[some]
    axes.plot(true, predictions[some], "o", color="#E69F00", markersize=4, alpha=0.5)
    axes.axline((0, 0), slope=1, color="black", linestyle="--")  # where both are equal
    title = f"{len(some):,} of {len(rows):,} {judged} rewards"
    axes.set(xlabel=f"true reward ({judged})", ylabel="imputed reward", title=title)


def draw_episode(axes, dataset, imputed, label_rows):
    """A part of the episode with the most labels."""
    episode = np.bincount(dataset.episode_ids[label_rows]).argmax()
    rows = np.flatnonzero(dataset.episode_ids == episode)
    is_label = np.isin(rows, label_rows)
    start = max(0, np.argmax(is_label) - 20)  # a little before the first label
    steps = np.arange(len(rows))[start : start + 150]
    rows, is_label = rows[steps], is_label[steps]
    true = np.where(is_label, np.nan, dataset.rewards[rows])
    if not np.isnan(true).all():
        axes.plot(steps, true, ".-", color="black", label="true (hidden)")
    axes.plot(steps, imputed[rows], color="#E69F00", linewidth=1, label="imputed")
    given = steps[is_label], imputed[rows[is_label]]
    axes.plot(*given, "o", color="#56B4E9", label="label")
    axes.set(xlabel="step", ylabel="reward", title=f"a part of episode {episode}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(y=0.2)
    axes.legend(loc="lower center", ncols=3)


def draw_returns(axes, dataset, imputed):
    """How many episodes have which return."""
    returns = np.bincount(dataset.episode_ids, imputed)
    true_returns = np.bincount(dataset.episode_ids, dataset.rewards)  # NaN: not known as a whole
    known = true_returns[~np.isnan(true_returns)]
    bins = np.histogram_bin_edges(np.append(returns, known), 30)
    axes.hist(returns, bins, color="#E69F00", label="imputed")
    if len(known):
        axes.hist(known, bins, histtype="step", color="black", label="true")
    axes.set(xlabel="return", ylabel="episodes", title="returns")
    axes.locator_params(axis="x", nbins=6)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="best")


def draw_models(axes, table, judged):
    """R2 of each model; after a sweep, by the number of labels."""
    styles = {"mlp": ("#E69F00", "o-"), "gp": ("#009E73", "s-"), "linear": ("gray", "^--")}
    for kind, (color, style) in styles.items():
        rows = [row for row in table if row["model"] == kind]
        counts = [f"{row['labels']:,}" for row in rows]
        means = [np.mean(row["r2"]) for row in rows]
        axes.plot(counts, means, style, color=color, label=f"{kind}: {means[-1]:.3f}")
        if len(rows[0]["r2"]) > 1:  # several seeds
            stds = [np.std(row["r2"]) for row in rows]
            axes.errorbar(counts, means, stds, color=color, fmt="none", capsize=3)
    lowest = np.nan_to_num([row["r2"] for row in table]).min()
    axes.set_ylim(max(lowest, -1) - 0.05, 1.05)  # result.json has what is below -1
    axes.set(xlabel="labels fitted to", ylabel=f"$R^2$ on {judged} rewards", title="models")
    axes.legend(loc="best")


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


# --- Writing the completed dataset ---
def is_minari(args):
    return args.dataset_path is None and args.env_id not in (None, *SHA256)


def write_hdf5(args: Args, reward_model, label_rows, text: str):
    """A copy of the source with all rewards of the first seed, and the boolean column `labeled`."""
    source = args.dataset_path or find_file(args.env_id or BUNDLED)
    arrays = read_columns(source)
    is_kept, _, _ = find_transitions(arrays, follow_d4rl=args.dataset_path is None)
    is_known = ~np.isnan(arrays["rewards"])
    is_label = is_known.copy()  # also of rows that are no transition
    if label_rows.shape[1] < np.count_nonzero(is_known & is_kept):  # some were hidden
        is_label[:] = False
        is_label[np.flatnonzero(is_kept)[label_rows[0]]] = True
    # A row that is no transition may be without an observation or an action: it gets no reward.
    inputs = np.hstack([arrays["observations"], arrays["actions"]])
    rows = np.flatnonzero(np.isfinite(inputs).all(axis=1) & ~is_label)
    observations, actions = arrays["observations"][rows], arrays["actions"][rows]
    predicted = predict_rewards(reward_model, observations, actions)

    content = io.BytesIO(Path(source).read_bytes())  # HDF5 itself cannot recover from a full disk
    with h5py.File(content, "r+") as file:
        given = file["rewards"][()]
        rewards = given.astype(np.result_type(given, np.float32)).reshape(-1)
        rewards[rows] = predicted[0]
        for name in {"rewards", "labeled"} & file.keys():
            del file[name]
        file.create_dataset("rewards", data=rewards.reshape(given.shape), compression="gzip")
        file.create_dataset("labeled", data=is_label, compression="gzip")
        file.attrs["imputation"] = text
    temporary = args.output_path.with_name(f"{args.output_path.name}.tmp")
    try:
        temporary.write_bytes(content.getbuffer())
        os.replace(temporary, args.output_path)  # never half a file
    finally:
        temporary.unlink(missing_ok=True)
    print(f"written       {args.output_path}: {len(rows):,} of {len(given):,} rewards imputed")
    replaced = np.count_nonzero(is_known[rows])
    if replaced:
        print(f"              {replaced:,} of them were known, but not among the labels")


def find_env_spec(simulator):
    """What Minari stores of a simulator, so that it can be made again."""
    if simulator is None:
        return {}
    if isinstance(simulator, minari.MinariDataset):
        known = simulator.storage.metadata
        return {key: known[key] for key in ("env_spec", "eval_env_spec") if known.get(key)}
    module, _, name = simulator.rpartition(":")
    if module:  # my_package:MyEnv-v0
        import_module(module)
    return {"env_spec": gym.spec(name).to_json()}


def write_minari(name, dataset, label_rows, rewards, metadata):
    """A Minari dataset of the same transitions, with these rewards (N,); infos tell the labels."""
    is_label = np.isin(np.arange(len(rewards)), label_rows)
    # Minari holds T + 1 observations of an episode, so a new one also begins where a row does not
    # start from the observation with which the row before it ended.
    follows = (dataset.next_observations[:-1] == dataset.observations[1:]).all(axis=1)
    follows &= np.diff(dataset.episode_ids) == 0
    follows &= dataset.terminals[:-1] == 0
    starts = np.flatnonzero(~follows) + 1
    episodes = []
    for rows in np.split(np.arange(len(rewards)), starts):
        terminations = dataset.terminals[rows] == 1
        last_observation = dataset.next_observations[rows[-1]]
        episode = EpisodeBuffer(
            observations=np.vstack([dataset.observations[rows], last_observation]),
            actions=dataset.actions[rows],
            rewards=rewards[rows],
            terminations=terminations,
            truncations=(rows == rows[-1]) & ~terminations,
            infos={"labeled": is_label[rows]},
        )
        episodes.append(episode)
    low = dataset.actions.min(axis=0)
    high = dataset.actions.max(axis=0)
    spaces = {
        "observation_space": gym.spaces.Box(-np.inf, np.inf, dataset.observations.shape[1:]),
        "action_space": gym.spaces.Box(low, high, dtype=np.float32),
    }
    text = f"{dataset.name} with imputed rewards; infos/labeled marks the given ones"
    require(not get_dataset_path(name).exists(), f"--output-minari-id {name} exists already")
    try:
        with warnings.catch_warnings(action="ignore"):  # that author, email and link are missing
            made = minari.create_dataset_from_buffers(name, episodes, description=text, **spaces)
        made.storage.update_metadata(metadata)
    except BaseException:
        shutil.rmtree(get_dataset_path(name), ignore_errors=True)  # leave no part of it
        raise
    print(f"written       {name}: {np.count_nonzero(~is_label):,} rewards imputed")


# --- Report ---
def show(values) -> str:
    return f"{np.mean(values):.4g}" + (f" ± {np.std(values):.2g}" if len(values) > 1 else "")


def print_quality(quality: dict):
    """A line for each model: each number's mean and, of several seeds, std."""
    for kind, numbers in quality.items():
        cells = [f"{name} {show(values)}" for name, values in numbers.items()]
        print(f"{kind:14s}{', '.join(cells)}".replace("_", " "))


def print_verdict(quality, args, num_episodes):
    """Which model did best, what the numbers cannot tell, and what to run next."""
    r2 = {kind: np.mean(numbers["r2"]) for kind, numbers in quality.items()}
    best = "gp" if r2["gp"] > r2["mlp"] else "mlp"
    numbers = ", ".join(f"{kind} {value:.3f}" for kind, value in r2.items())
    if r2[args.reward_model] < 0:
        warn(f"{args.reward_model} is worse than a constant, whose R2 is 0")
    if num_episodes == 1:
        print(f"verdict       R2 {numbers} in this episode: nothing can tell how good elsewhere")
        print("next          label transitions of other episodes")
    elif not r2[best] > 0.5:
        print(f"verdict       R2 {numbers}: not good, a constant has 0")
        print("next          label more transitions, in more episodes, and repeat the command")
    else:
        print(f"verdict       R2 {numbers}: {best}")
        print(f"next          {next_command(args, best)}")


def next_command(args, best):
    """To copy: train on what was written, or write it by the better model."""
    if args.output_minari_id:
        return f"python td3bc_imputed.py --env-id {args.output_minari_id} --num-updates 20_000"
    if args.output_path:
        env_id = args.env_id or (None if args.dataset_path else BUNDLED)
        simulator = ["--env-id", env_id] if env_id else []
        words = ["python", "td3bc_imputed.py", "--dataset-path", args.output_path, *simulator]
        return shlex.join(map(str, words)) + " --num-updates 20_000"
    changed = {"reward_model": best, "sweep": False, "run_dir": None}
    if is_minari(args):
        changed["output_minari_id"] = "my/full-v0"
    else:
        changed["output_path"] = "full.hdf5"
    words = ["python", "reward_model.py"]
    for name, value in (vars(args) | changed).items():
        if value != getattr(Args, name):  # its default
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)


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


# --- The experiment ---
def check_arguments(args: Args):
    """What would otherwise fail late, or not at all."""
    for name in ("num_seeds", "reward_hidden_dim", "reward_epochs", "reward_batch_size"):
        require(getattr(args, name) > 0, f"--{name.replace('_', '-')} must be at least 1")
    require(0 < args.reward_learning_rate < math.inf, "--reward-learning-rate must be above 0")
    require(0 <= args.seed < 2**31, "--seed must be at least 0 and below 2**31")
    fraction = args.label_fraction
    require(fraction is None or 0 < fraction <= 1, "--label-fraction must be in (0, 1]")
    require(args.run_dir != Path(), "--run-dir is empty")
    taken = args.run_dir and (args.run_dir / "config.json").exists()
    require(not taken, f"{args.run_dir} already holds a run: choose another --run-dir")
    if args.output_path:
        require(not args.output_path.exists(), f"--output-path {args.output_path} exists already")
        folder = args.output_path.absolute().parent
        require(os.access(folder, os.W_OK), f"--output-path: cannot write to a folder {folder}")
        require(not is_minari(args), "--output-path is for HDF5: here, use --output-minari-id")
    if args.output_minari_id:
        name = args.output_minari_id
        is_valid = re.fullmatch(r"([\w-]+/)*[\w-]+-v\d+", name)
        require(is_valid, f"--output-minari-id {name} is not of the form my/name-v0")
        require(not get_dataset_path(name).exists(), f"--output-minari-id {name} exists already")


def main(args: Args):
    check_arguments(args)
    seeds = range(args.seed, args.seed + args.num_seeds)
    device = choose_device(args)

    # 1. The transitions, the labels to fit to, and the known rewards to judge on.
    dataset = load_dataset(args.env_id, args.dataset_path)
    metadata = find_env_spec(dataset.simulator) if args.output_minari_id else {}
    metadata |= {"ref_min_score": dataset.ref_min, "ref_max_score": dataset.ref_max}
    fraction = args.label_fraction
    if fraction is None:  # the paper's 1% of its datasets, all that is known of your own
        fraction = 0.01 if args.dataset_path is None and dataset.name in SHA256 else 1.0
    label_rows = choose_labels(dataset.rewards, fraction, seeds)
    is_known = ~np.isnan(dataset.rewards)
    num_known = is_known.sum()
    num_labels = label_rows.shape[1]
    num_episodes = len(np.unique(dataset.episode_ids[label_rows]))
    print(f"labels        {num_labels:,} of {num_known:,} known, in {num_episodes:,} episode(s)")
    require(num_labels < len(is_known), "nothing to impute: no NaN, nor a small --label-fraction")
    judged = "hidden"
    is_hidden = np.tile(is_known, (len(seeds), 1))
    np.put_along_axis(is_hidden, label_rows, False, axis=1)
    splits = [(label_rows, is_hidden)]
    if num_labels == num_known:
        judged = "held-out"
        splits = hold_out(label_rows, dataset)
        if num_episodes < 5:
            warn("labels in fewer than five episodes tell little about all others")
    name = f"{dataset.name}__reward_model__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
    name = name.replace("/", "-").replace(":", "-")
    run_dir = args.run_dir or Path("runs") / name
    run_dir.mkdir(parents=True, exist_ok=args.run_dir is not None)

    # 2. The models, fitted to the same labels, and how good they are.
    table = sweep(dataset, splits, seeds, args, device) if args.sweep else []
    num_fitted = splits[0][0].shape[1]
    quality = {}
    for kind in KINDS:
        predictions, model, inside = judge(kind, dataset, splits, seeds, args, device)
        quality[kind] = measure(predictions, dataset)
        table.append({"labels": num_fitted, "model": kind, "r2": quality[kind]["r2"]})
        if kind == args.reward_model:
            reward_model, judged_rewards = model, predictions
        if kind == "gp":
            calibration = np.mean(inside)
    print_quality(quality)
    print(f"calibration   gp: {calibration:.1%} of them within ± 2 std (should be 95%)")

    # 3. The model fitted to all labels, and the dataset with the rewards of its first seed.
    kind = args.reward_model
    if judged == "held-out":
        reward_model, _ = fit_and_predict(kind, dataset, label_rows, seeds, args, device)
    rewards = predict_rewards(reward_model, dataset.observations, dataset.actions)[0]
    rewards[label_rows[0]] = dataset.rewards[label_rows[0]]
    returns = np.bincount(dataset.episode_ids, rewards)
    print(f"log, imputed  return {returns.mean():.1f}, of its best episode {returns.max():.1f}")
    state = reward_model.state_dict()
    arrays = {name: tensor.cpu().numpy() for name, tensor in state.items()}
    np.savez(run_dir / "reward_model.npz", **arrays)
    if args.output_path:
        write_hdf5(args, reward_model, label_rows, f"{kind}: {json.dumps(quality[kind])}")
    if args.output_minari_id:
        write_minari(args.output_minari_id, dataset, label_rows[0], rewards, metadata)

    # 4. The report.
    figure = Figure(figsize=(10, 8), layout="constrained")
    figure.suptitle(f"{dataset.name}, rewards imputed by {kind}")
    panels = figure.subplots(2, 2)
    draw_rewards(panels[0, 0], dataset.rewards, judged_rewards[0], judged)
    draw_episode(panels[0, 1], dataset, rewards, label_rows[0])
    draw_returns(panels[1, 0], dataset, rewards)
    draw_models(panels[1, 1], table, judged)
    figure.savefig(run_dir / "report.png", dpi=150)
    (run_dir / "config.json").write_text(json.dumps(vars(args), default=str, indent=2))
    result = {"num_labels": num_labels, "judged_on": judged, "quality": quality}
    result |= {"inside_2_std": calibration, "table": table}
    result["versions"] = {m.__name__: m.__version__ for m in (torch, np, gym, minari)}
    result = json.loads(json.dumps(result), parse_constant=lambda name: None)  # NaN: null
    (run_dir / "result.json").write_text(json.dumps(result, indent=2))
    print(f"report        {run_dir}/report.png")
    print_verdict(quality, args, num_episodes)


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True, errors="replace")  # ± is no error in any locale
    try:
        main(tyro.cli(Args, description=__doc__))
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, OSError, ImportError, gym.error.Error) as error:
        print("error:", textwrap.shorten(str(error), 1000), file=sys.stderr)
        sys.exit(2)
