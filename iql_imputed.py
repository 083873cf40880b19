# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0", "numpy>=2.0,<3", "gymnasium[mujoco]>=1.2,<2", "mujoco>=3.3,<5", "minari[hdf5,hf]>=0.5.3,<0.6",
#   "h5py>=3.12,<4", "tyro>=0.9.2,<2", "tqdm>=4.66,<5", "wandb>=0.19,<1", "matplotlib>=3.9,<4", "pytest>=8,<10"]
# ///
"""IQL on a dataset of which only a few transitions have a reward.

Hides all but 1% of a dataset's rewards, fits a reward model to them (Eq. 4), imputes the others (Eq. 5), trains IQL.
All seeds at once. After Romeo & Bagdanov (2024), "Offline Reinforcement Learning with Imputed Rewards".

    python iql_imputed.py --num-updates 20_000                                 # the bundled dataset, no network
    python iql_imputed.py --env-id walker2d-medium-replay-v2 --num-seeds 5     # D4RL
    python iql_imputed.py --env-id hopper-medium-v2 --dataset-path log.hdf5    # your own; NaN reward = unlabelled
"""

import difflib
import hashlib
import io
import json
import multiprocessing
import os
import shlex
import signal
import socket
import sys
import threading
import time
from collections import namedtuple
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import nullcontext, suppress
from copy import deepcopy
from dataclasses import dataclass
from http.client import HTTPException
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


@dataclass
class Args:
    env_id: str = "halfcheetah-medium-replay-mini"  # a D4RL name, a Minari id, or the bundled dataset (the default)
    dataset_path: Path | None = None  # D4RL-schema HDF5 file to read instead; env_id, or any Gymnasium id, is its task
    eval_env_id: str | None = None  # Gymnasium environment to evaluate in, if not the dataset's own
    rewards: Literal["imputed", "labeled", "oracle", "zero"] = "imputed"  # hidden ones: predicted; left out; kept; 0
    label_fraction: float | None = None  # share of the known rewards not hidden (0.01; 1.0 if the data has NaN rewards)
    reward_hidden_dim: int = 256  # width of the reward model's two hidden layers
    reward_epochs: int = 300  # passes over the labelled transitions
    reward_learning_rate: float = 1e-4  # Adam's, for the reward model
    reward_batch_size: int = 64  # labelled transitions in a batch
    expectile: float = 0.7  # of the value function's regression; 0.5 is the mean
    temperature: float = 3.0  # inverse temperature: how sharply the actor prefers actions of high advantage
    learning_rate: float = 3e-4  # Adam's, for all networks of the agent
    batch_size: int = 256  # transitions in a batch, for each seed
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # step of the targets towards the trained networks
    num_updates: int = 1_000_000  # updates of V, actor, Q and target
    seed: int = 0  # the first seed
    num_seeds: int = 1  # seeds trained at once: seed, seed + 1, ...
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where to train; auto takes the GPU if there is one
    eval_freq: int = 5_000  # updates between two evaluations
    eval_episodes: int = 10  # deterministic episodes for each seed in an evaluation
    eval_seed: int = 100  # episode i is reset with eval_seed + i
    eval_workers: int = 0  # processes that evaluate while training goes on; 0 evaluates in this one
    compile: bool = False  # compile losses and gradients: takes half a minute, then an update takes less
    cuda_graph: bool = True  # on a GPU, record an update as a CUDA graph and replay it
    matmul_precision: Literal["highest", "high", "medium"] = "highest"  # medium: faster; on x86 without AMX as exact
    log_freq: int = 1_000  # updates between two readings of the losses
    run_dir: Path | None = None  # where to write (runs/{env_id}__{script}__{rewards}__{seed}__{unix time})
    resume: bool = False  # go on from the checkpoint in run_dir, or start if there is none
    save_policy: bool = False  # write the trained policies as policy_seed{k}.npz, which numpy alone can read
    track: bool = False  # log to Weights & Biases (WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE=offline)


class UserError(Exception):
    """What the user can put right: shown as one line, exit code 2."""


def require(condition, message: str) -> None:
    if not condition:
        raise UserError(message)


# --- Dataset ---
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
D4RL_TASKS = {  # evaluation environment, returns of a random and of an expert policy (scores 0 and 100)
    "halfcheetah": ("HalfCheetah-v4", -280.178953, 12135.0),
    "hopper": ("Hopper-v4", -20.272305, 3234.3),
    "walker2d": ("Walker2d-v4", 1.629008, 4592.3),
}
D4RL_URLS = ["https://rail.eecs.berkeley.edu/datasets/offline_rl/gym_mujoco_v2/"]  # has been down for days at a time
D4RL_URLS += ["https://huggingface.co/datasets/imone/D4RL/resolve/main/"]


class Dataset(NamedTuple):
    observations: np.ndarray  # (N, obs_dim), float32, transitions in episode order
    actions: np.ndarray  # (N, act_dim), scaled to [-1, 1]
    rewards: np.ndarray  # (N,), NaN where nobody labelled
    next_observations: np.ndarray  # (N, obs_dim)
    terminals: np.ndarray  # (N,), 1 = the task ended: no bootstrap
    episode_ids: np.ndarray  # (N,), int64, consecutive from 0
    env_spec: gym.envs.registration.EnvSpec  # the environment to evaluate in
    action_low: np.ndarray  # (act_dim,), its bounds
    action_high: np.ndarray  # (act_dim,)
    ref_min: float  # return of score 0; NaN: no such references, raw returns are reported
    ref_max: float  # return of score 100
    sha256: str  # of the transitions


def load_dataset(env_id: str, dataset_path: Path | None = None, eval_env_id: str | None = None) -> Dataset:
    """A D4RL, Minari, bundled or local HDF5 dataset; raises UserError if it cannot be trained on."""
    task, source, ref_min, ref_max = env_id.split("-")[0], env_id, np.nan, np.nan
    if env_id in SHA256 or (dataset_path and task in D4RL_TASKS):
        source, ref_min, ref_max = D4RL_TASKS[task]
    elif "/" in env_id or env_id in minari.list_local_datasets():
        try:
            source = minari.load_dataset(env_id, download=True)
            make_env(eval_env_id or source)  # a dataset may have none
        except Exception as error:  # unknown id, no network, damaged files: Minari has no common error for them
            raise UserError(f"cannot load the Minari dataset {env_id}: {error}") from error
        ref_min, ref_max = (source.storage.metadata.get(f"ref_{end}_score", np.nan) for end in ("min", "max"))
    elif not dataset_path:
        near = difflib.get_close_matches(env_id, [*SHA256, *minari.list_local_datasets()], cutoff=0)
        raise UserError(f"unknown --env-id {env_id}; nearest: {', '.join(near)}; remote Minari ids have a slash")
    env = make_env(eval_env_id or source)
    spaces = (env.observation_space, env.action_space)
    vectors = all(isinstance(space, gym.spaces.Box) and len(space.shape) == 1 for space in spaces)
    require(vectors, f"{env.spec.id}: observations and actions must be continuous vectors (1-D Box), not {spaces}")
    path = dataset_path or (find_file(env_id) if env_id in SHA256 else None)
    columns = read_hdf5(path, None if dataset_path else SHA256[env_id]) if path else read_minari(source)
    observations, actions, rewards, next_observations, terminals, episode_ids = columns
    require(len(rewards), "the dataset has no transitions")
    shapes = (observations.shape[1:], actions.shape[1:])
    require(shapes == (spaces[0].shape, spaces[1].shape), f"the dataset has shapes {shapes}; {env.spec.id}: {spaces}")
    finite = all(np.isfinite(array).all() for array in (observations, actions, next_observations))
    require(finite, "the dataset has NaN or inf in observations or actions")
    require(not np.isinf(rewards).any(), "the dataset has inf in rewards; only NaN is understood there: unlabelled")
    low, high = env.action_space.low, env.action_space.high
    require(np.isfinite([low, high]).all(), f"the actions of {env.spec.id} have no bounds: {env.action_space}")
    actions = (actions - (high + low) / 2) / ((high - low) / 2)  # exactly the identity for bounds of -1 and 1
    require(np.abs(actions).max() <= 1 + 1e-5, f"actions beyond the bounds of {env.spec.id}: {env.action_space}")
    arrays = (observations, actions, rewards, next_observations, np.float32(terminals), episode_ids)
    digest = hashlib.sha256(b"".join(hashlib.sha256(array).digest() for array in arrays))
    return Dataset(*arrays, env.spec, low, high, ref_min, ref_max, digest.hexdigest())


def make_env(env: str | gym.envs.registration.EnvSpec | minari.MinariDataset) -> gym.Env:
    """An evaluation environment, without the simulator's warnings about the old but comparable -v4 tasks."""
    mujoco.set_mju_user_warning(lambda message: None)  # else MUJOCO_LOG.TXT appears in the user's folder
    gym.logger.min_level = gym.logger.ERROR
    return env.recover_environment(eval_env=True) if isinstance(env, minari.MinariDataset) else gym.make(env)


def find_file(env_id: str) -> Path:
    """The bundled file, or a D4RL file in the d4rl package's own cache, downloaded into it if missing."""
    if env_id == BUNDLED:
        return Path(__file__).parent / "tests" / "data" / f"{BUNDLED}.hdf5"
    folder = Path(os.environ.get("D4RL_DATASET_DIR", "~/.d4rl/datasets")).expanduser()
    path, failures = folder / (env_id.removesuffix("-v2").replace("-", "_") + "-v2.hdf5"), []
    folder.mkdir(parents=True, exist_ok=True)
    socket.setdefaulttimeout(30)  # seconds without a byte, from here on; download_url_to_file sets none
    for url in () if path.exists() else D4RL_URLS:
        print(f"downloading {url}{path.name}")
        try:
            torch.hub.download_url_to_file(url + path.name, str(path), hash_prefix=SHA256[env_id])
            break
        except (OSError, HTTPException, RuntimeError) as error:  # RuntimeError: the wrong bytes
            failures.append(f"{url}: {error}")
    hint = f"put it at {path} by hand, or use the bundled --env-id {BUNDLED}, which needs no network"
    require(path.exists(), f"cannot download {path.name} ({'; '.join(failures)}); {hint}")
    return path


def read_hdf5(path: Path, expected_sha256: str | None = None) -> tuple[np.ndarray, ...]:
    """The first six fields of Dataset from a D4RL-schema HDF5 file, by the rule of d4rl.qlearning_dataset."""
    keys = ("observations", "actions", "rewards", "terminals", "timeouts")
    with open(path, "rb") as file:  # hashed and read through one handle, so that no other bytes slip in between
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        require(expected_sha256 in (None, sha256), f"{path} has SHA-256 {sha256}, not {expected_sha256}: delete it")
        try:
            with h5py.File(file, "r") as h5:
                observations, actions, *flat = (h5[key].astype(np.float32)[()] for key in keys)
        except Exception as error:  # whatever h5py raises on a damaged or foreign file, the file is at fault
            raise UserError(f"{path} is no readable HDF5 file with {', '.join(keys)}: {error}") from error
    rewards, terminals, timeouts = (column.reshape(-1) for column in flat)  # replay files have rewards (rows, 1)
    shapes = [column.shape for column in (observations, actions, rewards, terminals, timeouts)]
    require(len({shape[:1] for shape in shapes}) == 1, f"{path} has different lengths or wrong shapes: {shapes}")
    require(np.isfinite([terminals, timeouts]).all(), f"{path} has NaN or inf in terminals or timeouts")
    # Timeouts and the last row have no next observation: dropped. A terminal row's is another episode's: mask it.
    rows, ends = np.flatnonzero(timeouts[:-1] == 0), (terminals != 0) | (timeouts != 0)
    _, episode_ids = np.unique((np.cumsum(ends) - ends)[rows], return_inverse=True)  # no hole where all rows dropped
    return observations[rows], actions[rows], rewards[rows], observations[rows + 1], terminals[rows] != 0, episode_ids


def read_minari(dataset: minari.MinariDataset) -> tuple[np.ndarray, ...]:
    """The first six fields of Dataset; an episode has T + 1 observations, so no step is dropped."""
    steps = [(e.observations[:-1], e.actions, e.rewards, e.observations[1:], e.terminations) for e in dataset if len(e)]
    require(steps, f"{dataset.id} has no transitions")
    columns = (np.concatenate(column).astype(np.float32) for column in zip(*steps))
    return *columns, np.repeat(np.arange(len(steps)), [len(actions) for _, actions, *_ in steps])


# --- Seeds as a batch dimension ---
class BatchedLinear(nn.Module):
    """A linear layer a generator, (models, batch, in_dim) -> (models, batch, out_dim); fewer inputs meet the first ones."""

    def __init__(self, generators: list, in_dim: int, out_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(len(generators), in_dim, out_dim))
        self.bias = nn.Parameter(torch.empty(len(generators), 1, out_dim))
        for weight, bias, generator in zip(self.weight.data, self.bias.data, generators):  # as nn.Linear does it
            nn.init.uniform_(weight, -(in_dim**-0.5), in_dim**-0.5, generator=generator)
            nn.init.uniform_(bias, -(in_dim**-0.5), in_dim**-0.5, generator=generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w, b = (self.weight, self.bias) if len(x) == len(self.weight) else (self.weight[: len(x)], self.bias[: len(x)])
        return torch.bmm(x, w) + b if torch.compiler.is_compiling() else torch.baddbmm(b, x, w)  # compiled, + is fused


class Network(nn.Module):
    """Perceptrons with two hidden layers, `twins` for each seed: first every seed's first, then every seed's second."""

    def __init__(self, generators: list, in_dim: int, hidden_dim: int, out_dim: int, twins=1, mean=0.0, std=1.0):
        super().__init__()
        self.register_buffer("mean", torch.zeros(len(generators), 1, 1) + mean)  # (seeds, 1, obs_dim)
        self.register_buffer("std", torch.zeros(len(generators), 1, 1) + std)
        shapes = (in_dim, hidden_dim), (hidden_dim, hidden_dim), (hidden_dim, out_dim)
        first, second, third = (BatchedLinear(generators * twins, *shape) for shape in shapes)
        self.mlp = nn.Sequential(first, nn.ReLU(inplace=True), second, nn.ReLU(inplace=True), third)

    def forward(self, observations: torch.Tensor, *actions: torch.Tensor, twins: int = 1) -> torch.Tensor:
        """(seeds, batch, out_dim) from observations, and actions, (seeds, batch, ...); for 2 twins (2, seeds, ...)."""
        x = torch.cat([(observations - self.mean) / self.std, *actions], dim=-1)
        return self.mlp(x) if twins == 1 else self.mlp(x.repeat(twins, 1, 1)).view(twins, *x.shape[:2], -1)


def gather(tensors: list | tuple, rows: torch.Tensor) -> list[torch.Tensor]:
    """Rows of each tensor, (seeds, N, ...) -> (*rows.shape, ...): `rows`, (..., seeds, batch), are each seed's own."""
    each_seed = torch.arange(rows.shape[-2], device=rows.device)[:, None]
    return [tensor[each_seed, rows] for tensor in tensors]


def loss_and_grad(loss_function, parameters: list, *inputs) -> tuple:
    """Each seed's loss, (seeds,), and the gradients of their sum; both directions in one, for --compile."""
    loss = loss_function(*inputs)
    return loss.detach(), torch.autograd.grad(loss.sum(), parameters)


def gradient_step(optimizer: torch.optim.Adam, loss_function, *inputs) -> torch.Tensor:
    """Step on the gradients of the optimizer's own parameters, and of no others; returns the loss, (seeds,)."""
    loss, gradients = loss_and_grad(loss_function, parameters := optimizer.param_groups[0]["params"], *inputs)
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient
    optimizer.step()
    return loss


# --- Reward model ---
def split_labels(rewards: np.ndarray, label_fraction: float | None, seeds: range) -> np.ndarray:
    """Indices of each seed's labelled transitions, (seeds, labels), drawn uniformly from the known rewards."""
    require(len(known := np.flatnonzero(~np.isnan(rewards))), "no transition is labelled: every reward is NaN")
    fraction = label_fraction if label_fraction is not None else 0.01 if len(known) == len(rewards) else 1.0
    num_labels = max(1, round(fraction * len(known)))
    labels = np.sort([np.random.default_rng(seed).choice(known, num_labels, replace=False) for seed in seeds], axis=1)
    require(np.ptp(rewards[labels], axis=1).all(), f"a seed's {num_labels} labelled rewards are all equal: label more")
    return labels


class RewardModel(Network):
    """f(s, a) of each seed, its input normalised with all observations: they are known, labelled or not."""

    def __init__(self, dataset: Dataset, seeds: range, hidden_dim: int):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        std, mean = torch.std_mean(torch.from_numpy(dataset.observations), dim=0, correction=0)  # (obs_dim,)
        super().__init__(generators, len(mean) + dataset.actions.shape[1], hidden_dim, 1, mean=mean, std=std + 1e-3)
        self.generators = generators  # for the order of the labelled transitions in each epoch

    def squared_error(self, observations: torch.Tensor, actions: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
        return (self(observations, actions).squeeze(-1) - rewards).square().mean(dim=1)  # Eq. 4, (seeds,)


def train_reward_model(model: RewardModel, dataset: Dataset, labels: np.ndarray, epochs: int, lr: float, batch: int):
    """Fit each seed's model to its labelled transitions (Eq. 4); returns the losses (epochs, seeds)."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    labelled = [torch.from_numpy(array[labels]).to(model.mean.device) for array in dataset[:3]]  # (seeds, labels, ...)
    losses = torch.zeros(epochs, len(labels), device=model.mean.device)
    for epoch in tqdm(range(epochs), "reward model", unit="epoch", leave=False, disable=None):
        order = torch.stack([torch.randperm(labels.shape[1], generator=generator) for generator in model.generators])
        for rows in order.to(model.mean.device).split(batch, dim=1):  # (seeds, batch)
            losses[epoch] += gradient_step(optimizer, model.squared_error, *gather(labelled, rows)) * len(rows[0])
    return (losses / labels.shape[1]).cpu().numpy()


@torch.no_grad()
def impute_rewards(model: RewardModel, dataset: Dataset, labels: np.ndarray) -> np.ndarray:
    """Each seed's rewards, (seeds, N): those labelled for it as they are, f(s, a) for all others (Eq. 5)."""
    chunks = zip(*(torch.from_numpy(column).to(model.mean.device).split(16384) for column in dataset[:2]))
    rewards = [model(*(column.expand(len(labels), -1, -1) for column in chunk)).squeeze(-1) for chunk in chunks]
    rewards = torch.cat(rewards, dim=1).cpu().numpy()  # in chunks: the hidden layers of all rows would be large
    np.put_along_axis(rewards, labels, dataset.rewards[labels], axis=1)
    return rewards


def imputation_quality(imputed: np.ndarray, dataset: Dataset, labels: np.ndarray) -> dict[str, list] | None:
    """How well each seed's imputed rewards (seeds, N) match the hidden ones, which no agent sees; None if unknown."""
    hidden = np.stack([np.setdiff1d(np.flatnonzero(~np.isnan(dataset.rewards)), rows) for rows in labels])
    if not hidden.size:
        return None
    true = dataset.rewards[hidden]  # (seeds, hidden)
    error = np.take_along_axis(imputed, hidden, axis=1) - true
    mse, mae = np.mean(error**2, axis=1), np.mean(np.abs(error), axis=1)
    with np.errstate(all="ignore"):  # no R2 of equal rewards, no correlation of partly unknown or equal returns
        correlation = np.corrcoef([np.bincount(dataset.episode_ids, r) for r in (dataset.rewards, *imputed)])[0, 1:]
        quality = {"r2": 1 - mse / np.var(true, axis=1), "mse": mse, "mae": mae, "return_correlation": correlation}
    return {name: [float(x) if np.isfinite(x) else None for x in values] for name, values in quality.items()}


# --- IQL (Kostrikov et al. 2022) ---
Batch = namedtuple("Batch", "observations actions rewards next_observations terminals")  # tensors
Agent = namedtuple("Agent", "actor value critic critic_target actor_optimizer value_optimizer critic_optimizer")


def sample(data: Batch, size: tuple, generator: torch.Generator) -> Batch:
    """Transitions drawn uniformly with replacement, `size` = (..., seeds, batch), from `data`, (seeds, rows, ...)."""
    rows = torch.randint(data.rewards.shape[1], size, generator=generator, device=data.rewards.device)
    return Batch(*gather(data, rows))


def make_agent(data: Batch, seeds: range, lr: float) -> Agent:
    """Networks of all seeds; orthogonal weights of gain sqrt(2) and zero biases, model by model, as the original's."""
    obs_dim, act_dim, device = data.observations.shape[-1], data.actions.shape[-1], data.rewards.device
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    actor, value = Network(generators, obs_dim, 256, act_dim), Network(generators, obs_dim, 256, 1)
    actor.log_std = nn.Parameter(torch.zeros(len(seeds), 1, act_dim))  # does not depend on the observation
    critic = Network(generators, obs_dim + act_dim, 256, 1, twins=2)
    for layer in (*actor.mlp[::2], *value.mlp[::2], *critic.mlp[::2]):
        nn.init.zeros_(layer.bias)
        for model in range(len(layer.weight)):
            nn.init.orthogonal_(layer.weight.data[model], 2**0.5, generator=generators[model % len(seeds)])
    networks = [network.to(device) for network in (actor, value, critic)]
    optimizers = [torch.optim.Adam(net.parameters(), lr=lr, fused=True, capturable=True) for net in networks]
    return Agent(*networks, deepcopy(critic).requires_grad_(False), *optimizers)


def reward_scale(rewards: np.ndarray, labels: np.ndarray, dataset: Dataset, labeled_only: bool) -> np.ndarray:
    """1000 / (max - min episode return), (seeds, 1); `labeled_only`: a return is its mean labelled reward x length."""
    scales, lengths = [], np.bincount(dataset.episode_ids)
    for seed_rewards, rows in zip(rewards, labels if labeled_only else [slice(None)] * len(rewards)):
        episodes, ids, counts = np.unique(dataset.episode_ids[rows], return_inverse=True, return_counts=True)
        returns = np.bincount(ids, weights=seed_rewards[rows]) / counts * lengths[episodes]
        require(np.ptp(returns) > 1e-6 * np.abs(returns).max(), "all episode returns are equal: IQL has no scale")
        scales.append(1000 / np.ptp(returns))
    return np.float32(scales)[:, None]


def value_loss(agent: Agent, batch: Batch, q: torch.Tensor, args: Args) -> torch.Tensor:
    advantage = q - agent.value(batch.observations)  # (seeds, batch, 1)
    return (torch.where(advantage > 0, args.expectile, 1 - args.expectile) * advantage.square()).mean(dim=(1, 2))


def actor_loss(agent: Agent, batch: Batch, q: torch.Tensor, args: Args) -> torch.Tensor:
    weight = (args.temperature * (q - agent.value(batch.observations)).squeeze(-1)).exp().clamp(max=100).detach()
    mean, log_std = agent.actor(batch.observations).tanh(), agent.actor.log_std.clamp(-5, 2)  # of a Gaussian policy
    log_prob = -0.5 * ((batch.actions - mean) / log_std.exp()).square() - log_std - 0.5 * np.log(2 * np.pi)
    return -(weight * log_prob.sum(dim=-1)).mean(dim=-1)  # (seeds,)


def critic_loss(agent: Agent, batch: Batch, args: Args) -> torch.Tensor:
    with torch.no_grad():
        target_q = batch.rewards + args.gamma * (1 - batch.terminals) * agent.value(batch.next_observations).squeeze(-1)
    q = agent.critic(batch.observations, batch.actions, twins=2).squeeze(-1)  # (2, seeds, batch)
    return (q - target_q).square().mean(dim=-1).sum(dim=0)  # mean over the batch, sum over the twins


def update(agent: Agent, batch: Batch, args: Args) -> dict[str, torch.Tensor]:
    """V, actor, Q, target, in this order: the advantage and Q's target use the updated V; returns the losses."""
    q = agent.critic_target(batch.observations, batch.actions, twins=2).amin(dim=0)  # (seeds, batch, 1), no gradient
    v_loss = gradient_step(agent.value_optimizer, value_loss, agent, batch, q, args)
    pi_loss = gradient_step(agent.actor_optimizer, actor_loss, agent, batch, q, args)
    q_loss = gradient_step(agent.critic_optimizer, critic_loss, agent, batch, args)
    with torch.no_grad():
        torch._foreach_lerp_(list(agent.critic_target.parameters()), list(agent.critic.parameters()), args.tau)
    return {"losses/value_loss": v_loss, "losses/actor_loss": pi_loss, "losses/critic_loss": q_loss}


# --- Evaluation and run directory ---
class Policy(dict):
    """One seed's actor in numpy: an observation (obs_dim,) -> an action (act_dim,) within the environment's bounds."""

    def __call__(self, observation: np.ndarray) -> np.ndarray:
        x = (np.float32(observation) - self["mean"]) / self["std"]
        x = np.maximum(np.maximum(x @ self["w0"] + self["b0"], 0) @ self["w1"] + self["b1"], 0)
        return self["low"] + (np.tanh(x @ self["w2"] + self["b2"]) + 1) / 2 * (self["high"] - self["low"])


@torch.no_grad()
def make_policies(actor: nn.Module, dataset: Dataset) -> list[Policy]:
    """A copy of each seed's actor as it is now."""
    arrays = {"mean": actor.mean[:, 0], "std": actor.std[:, 0]}
    for i, layer in enumerate(actor.mlp[::2]):
        arrays |= {f"w{i}": layer.weight, f"b{i}": layer.bias[:, 0]}
    arrays = {name: tensor.to("cpu", copy=True).numpy() for name, tensor in arrays.items()}
    return [Policy(zip(arrays, row), low=dataset.action_low, high=dataset.action_high) for row in zip(*arrays.values())]


def run_episode(policy: Policy, env_spec: gym.envs.registration.EnvSpec, seed: int) -> float:
    """Return of one deterministic episode, in a fresh environment: the same in whatever process."""
    env, episode_return, done = make_env(env_spec), 0.0, False
    observation, _ = env.reset(seed=seed)
    while not done:
        observation, reward, terminated, truncated, _ = env.step(policy(observation))
        episode_return, done = episode_return + float(reward), terminated or truncated
    env.close()
    return episode_return


def init_worker() -> None:
    """Leave signals to the parent process and end with it, however it ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=lambda: os._exit(multiprocessing.parent_process().join() or 1), daemon=True).start()


class Evaluator:
    """Runs evaluation episodes, in worker processes while training goes on or (0 workers) in this one; keeps scores."""

    def __init__(self, dataset: Dataset, seeds: range, episode_seeds: range, workers: int, scores: list):
        self.dataset, self.seeds, self.episode_seeds, self.scores, self.jobs = dataset, seeds, episode_seeds, scores, []
        self.pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), init_worker) if workers else None

    def start(self, num_updates: int, policies: list[Policy]) -> None:
        self.num_updates, self.futures = num_updates, []
        self.jobs = [(policy, self.dataset.env_spec, seed) for policy in policies for seed in self.episode_seeds]
        with suppress(BrokenExecutor):
            self.futures = [self.pool.submit(run_episode, *job) for job in self.jobs] if self.pool else []

    def finish(self, run_dir: Path, log) -> None:
        """Wait for the evaluation under way, if there is one; write, log and show its scores."""
        if not self.jobs:
            return
        jobs, self.jobs, returns = self.jobs, [], []
        with suppress(BrokenExecutor):
            returns = [future.result() for future in self.futures]
        if self.pool and not returns:
            tqdm.write("warning: an evaluation worker died; evaluation goes on in this process", file=sys.stderr)
            self.pool = None
        returns = np.reshape(returns or [run_episode(*job) for job in jobs], (len(self.seeds), -1)).mean(axis=1)
        scores = 100 * (returns - self.dataset.ref_min) / (self.dataset.ref_max - self.dataset.ref_min)
        self.scores += [[self.num_updates, *row] for row in zip(self.seeds, returns.tolist(), scores.tolist())]
        lines = ["update,seed,return,score", *(",".join(map(str, row)) for row in self.scores)]
        write_file(run_dir / "scores.csv", ("\n".join(lines) + "\n").encode())
        metric, values = ("return", returns) if np.isnan(scores).any() else ("score", scores)  # NaN: no references
        tqdm.write(f"update {self.num_updates:>9,}   {metric} {values.mean():.1f} ± {values.std():.1f}")
        means = {"update": self.num_updates, "charts/return": returns.mean(), f"charts/{metric}": values.mean()}
        log(means | {f"charts/{metric}_seed{seed}": value for seed, value in zip(self.seeds, values.tolist())})


def write_file(path: Path, content: bytes) -> None:
    """Write beside, flush to disk, rename: whoever reads `path` finds the old content or the new, never a part."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(run_dir: Path, resume: bool, config: dict) -> dict | None:
    """The state to go on from, None for a run that starts; raises UserError if `run_dir` holds another run."""
    free = {"resume", "run_dir", "eval_workers", "track", "log_freq", "save_policy", "compile", "cuda_graph"}
    require(resume or not (run_dir / "config.json").exists(), f"{run_dir} already holds a run: use --resume or another")
    if not (path := run_dir / "checkpoint.pt").exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        before = {name: state["config"][name] for name in config if name not in free}
    except Exception as error:  # cut short, or another program's
        raise UserError(f"{path} is not a readable checkpoint ({error}); delete it to start anew") from error
    changes = [f"{name} was {value}, now {config[name]}" for name, value in before.items() if value != config[name]]
    require(not changes, f"{path} was made with other arguments: {', '.join(changes)}")
    return state


def main(args: Args) -> None:
    for name, value in ((name.replace("_", "-"), value) for name, value in vars(args).items()):
        least = 1 if type(value) is int and name not in ("seed", "eval-seed", "eval-workers") else 0
        most = 1 if name in ("gamma", "tau", "label-fraction") else sys.float_info.max
        require(type(value) not in (int, float) or least <= value <= most, f"--{name} cannot be {value}")
    require(args.run_dir or not args.resume, "--resume needs the --run-dir to go on from")
    require(args.device != "cuda" or torch.cuda.is_available(), "--device cuda: there is no usable GPU here")
    device = torch.device(args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    config = json.loads(json.dumps(vars(args) | {"device": device.type}, default=str))
    name = f"{args.env_id.replace('/', '-')}__{Path(__file__).stem}__{args.rewards}__{args.seed}__{int(time.time())}"
    run_dir = args.run_dir or Path("runs") / name
    state = load_checkpoint(run_dir, args.resume, config)
    if (run_dir / "result.json").exists():
        return print(f"{run_dir} holds a finished run: see its result.json and scores.csv")
    device_name = torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    torch.set_float32_matmul_precision(args.matmul_precision)
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream())  # nothing can be recorded on the default stream
    if args.compile:
        torch._dynamo.config.trace_autograd_ops = True  # else the gradients break the graph
        globals().update({f.__name__: torch.compile(f, fullgraph=True) for f in (gather, loss_and_grad)})
    seeds, start = range(args.seed, args.seed + args.num_seeds), time.perf_counter()

    # The dataset, and the few transitions of each seed whose rewards may be seen.
    dataset = load_dataset(args.env_id, args.dataset_path, args.eval_env_id)
    require(state is None or state["dataset"] == dataset.sha256, f"{run_dir} was started on another dataset")
    oracle = args.rewards == "oracle"
    require(not oracle or not np.isnan(dataset.rewards).any(), "--rewards oracle needs every reward, but some are NaN")
    labels = np.empty((len(seeds), 0), int) if oracle else split_labels(dataset.rewards, args.label_fraction, seeds)
    run_dir.mkdir(parents=True, exist_ok=True)
    track_id, log = state and state["track_id"], lambda metrics: None
    if args.track:
        import wandb

        try:
            run = wandb.init(id=track_id, resume="allow", name=run_dir.name, config=config, dir=run_dir)
        except wandb.Error as error:  # no key, no network
            raise UserError(f"Weights & Biases: {error} (or set WANDB_MODE=offline)") from error
        run.define_metric("*", step_metric="update")
        track_id, log = run.id, run.log
    write_file(run_dir / "config.json", json.dumps(config, indent=2).encode())
    print(f"dataset       {args.env_id}: {len(dataset.rewards):,} transitions, {dataset.episode_ids[-1] + 1} episodes")
    print(f"rewards       {args.rewards}, {labels.shape[1] or 'all'} labelled, {len(seeds)} seed(s); {device_name}")

    # The reward model is fitted to those (Eq. 4) and imputes all other rewards (Eq. 5).
    model = quality = None
    rewards = np.tile(dataset.rewards if oracle else np.zeros_like(dataset.rewards), (len(seeds), 1))  # (seeds, N)
    np.put_along_axis(rewards, labels, dataset.rewards[labels], axis=1)
    if args.rewards == "imputed":
        model = RewardModel(dataset, seeds, args.reward_hidden_dim).to(device)
        if state is None:
            settings = args.reward_epochs, args.reward_learning_rate, args.reward_batch_size
            train_reward_model(model, dataset, labels, *settings)
        else:
            model.load_state_dict(state["reward_model"])
        rewards = impute_rewards(model, dataset, labels)
        quality = imputation_quality(rewards, dataset, labels)
        means = [f"{name} {np.mean(np.array(values, float)):.4f}" for name, values in (quality or {}).items()]
        print(f"reward model  {', '.join(means) or 'unknown quality'} on the hidden rewards")

    # The agent, and the transitions it draws from, (seeds, rows, ...): all of them, or its labelled ones alone.
    columns = dataset._replace(actions=dataset.actions.clip(-1 + 1e-5, 1 - 1e-5))[:5]
    data = Batch(*(torch.from_numpy(column).to(device).expand(len(seeds), *column.shape) for column in columns))
    rewards *= reward_scale(rewards, labels, dataset, args.rewards == "labeled")
    data = data._replace(rewards=torch.from_numpy(rewards).to(device))
    if args.rewards == "labeled":
        data = Batch(*gather(data, torch.from_numpy(labels).to(device)))
    agent, fitted = make_agent(data, seeds, args.learning_rate), time.perf_counter()
    generator = torch.Generator(device).manual_seed(args.seed)
    first_update, scores = (state["num_updates"], state["scores"]) if state else (0, [])
    if state:
        generator.set_state(state["generator"])
        for name, part in agent._asdict().items():
            part.load_state_dict(state["agent"][name])
    agent.actor_optimizer.param_groups[0]["lr"] = actor_rate = torch.zeros((), device=device)  # a graph reads it anew

    # Training, with a checkpoint before every evaluation; a signal stops it after the update under way.
    progress = tqdm(total=args.num_updates, initial=first_update, unit="update", disable=None)
    num_updates, signals, graph, recorded = first_update, [], None, False
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: signals.append(number))
    episode_seeds = range(args.eval_seed, args.eval_seed + args.eval_episodes)
    evaluator = Evaluator(dataset, seeds, episode_seeds, args.eval_workers, scores)
    if args.cuda_graph and device.type == "cuda":
        (graph := torch.cuda.CUDAGraph()).register_generator_state(generator)
        torch.optim.Optimizer._warned_capturable_if_run_uncaptured = True  # the first updates are, on purpose
    while True:
        actor_rate.fill_(args.learning_rate / 2 * (1 + np.cos(np.pi * num_updates / args.num_updates)))  # falls to 0
        due = num_updates > 0 and (num_updates % args.eval_freq == 0 or num_updates == args.num_updates)
        if signals or (due and (not scores or scores[-1][0] < num_updates)):
            evaluator.finish(run_dir, log)
            state = {"config": config, "dataset": dataset.sha256, "num_updates": num_updates, "scores": scores}
            state |= {"labels": torch.from_numpy(labels), "reward_model": model and model.state_dict()}
            state |= {"agent": {name: part.state_dict() for name, part in agent._asdict().items()}}
            torch.save(state | {"generator": generator.get_state(), "track_id": track_id}, file := io.BytesIO())
            write_file(run_dir / "checkpoint.pt", file.getvalue())
            if signals:
                more = [] if args.resume else ["--run-dir", str(run_dir), "--resume"]
                tqdm.write(f"stopped at {num_updates:,}; go on with: {shlex.join([sys.executable, *sys.argv, *more])}")
                sys.exit(128 + signals[0])
            evaluator.start(num_updates, make_policies(agent.actor, dataset))
        if args.eval_workers == 0 or num_updates == args.num_updates:
            evaluator.finish(run_dir, log)
        if num_updates == args.num_updates:
            break
        if not recorded:  # without a graph, at its first 20 updates, and once to record it, which computes nothing
            recorded = graph is not None and num_updates >= first_update + 20
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()) if recorded else nullcontext():
                losses = update(agent, sample(data, (len(seeds), args.batch_size), generator), args)
        if recorded:
            graph.replay()
        num_updates += 1
        progress.update(1)
        if args.track and num_updates % args.log_freq == 0:
            means = {name: loss.mean().item() for name, loss in losses.items()}
            log({"update": num_updates, "charts/updates_per_second": progress.format_dict["rate"]} | means)
    progress.close()
    for seed, policy in zip(seeds, make_policies(agent.actor, dataset)) if args.save_policy else ():
        np.savez(file := io.BytesIO(), **policy)
        write_file(run_dir / f"policy_seed{seed}.npz", file.getvalue())
    commit = os.popen(f"git -C {shlex.quote(str(Path(__file__).parent))} rev-parse HEAD 2>{os.devnull}").read().strip()
    metric, column = ("return", 2) if np.isnan(scores[-1][3]) else ("score", 3)
    table = np.array(scores)[:, column].reshape(-1, len(seeds))  # (evaluations, seeds)
    last, last_10 = table[-1], table[-10:].mean(axis=0)  # never the best
    result = {"metric": metric, "mean": last.mean(), "std": last.std(), "per_seed": last.tolist()}
    result |= {"last_10_mean": last_10.mean(), "last_10_std": last_10.std(), "eval_episodes": args.eval_episodes}
    result |= {"num_updates": num_updates, "reward_model": quality, "device": device_name, "commit": commit or None}
    result |= {"versions": {module.__name__: module.__version__ for module in (torch, np, gym, mujoco, minari)}}
    rate = (num_updates - first_update) / (time.perf_counter() - fitted)  # of this process, evaluations included
    result |= {"timing": {"loading_and_reward_model_seconds": fitted - start, "updates_per_second": rate}}
    write_file(run_dir / "result.json", json.dumps(result, indent=2).encode())
    print(f"result        {metric} {last.mean():.1f} ± {last.std():.1f} over {len(seeds)} seed(s), in {run_dir}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except KeyboardInterrupt:  # before training; from then on a signal writes a checkpoint
        sys.exit(130)
    except (UserError, OSError, ImportError, gym.error.Error) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
