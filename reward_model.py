# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0", "numpy>=2.0,<3", "gymnasium[mujoco]>=1.2,<2", "mujoco>=3.3,<5", "minari[hdf5,hf]>=0.5.3,<0.6",
#   "h5py>=3.12,<4", "tyro>=0.9.2,<2", "tqdm>=4.66,<5", "wandb>=0.19,<1", "matplotlib>=3.9,<4", "pytest>=8,<10"]
# ///
"""Fit, judge and apply a reward model to a dataset of which only a few transitions have a reward.

Hides the rewards of all but 1% of a logged dataset, fits a small reward model to that 1% (Eq. 4), and reports how good
it is on the rest. Writes the dataset with all other rewards imputed (Eq. 5), for any offline RL library. The paper is
Romeo & Bagdanov (2024), "Offline Reinforcement Learning with Imputed Rewards".

    python reward_model.py                                                        # the bundled dataset, no network
    python reward_model.py --env-id walker2d-medium-replay-v2 --sweep             # how many labels are enough?
    python reward_model.py --env-id Hopper-v4 --dataset-path log.hdf5 --output-path imputed.hdf5   # NaN = unlabelled
"""

import difflib
import hashlib
import io
import json
import os
import socket
import sys
import time
import warnings
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
from matplotlib.figure import Figure
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_dataset import parse_dataset_id
from torch import nn
from tqdm import tqdm


@dataclass
class Args:
    env_id: str = "halfcheetah-medium-replay-mini"  # a D4RL name, a Minari id, or the bundled dataset (the default)
    dataset_path: Path | None = None  # D4RL-schema HDF5 file to read instead; env_id, or any Gymnasium id, is its task
    eval_env_id: str | None = None  # Gymnasium environment to evaluate in, if not the dataset's own
    label_fraction: float | None = None  # share of the known rewards not hidden (0.01; 1.0 if the data has NaN rewards)
    reward_hidden_dim: int = 256  # width of the reward model's two hidden layers
    reward_epochs: int = 300  # passes over the labelled transitions
    reward_learning_rate: float = 1e-4  # Adam's, for the reward model
    reward_batch_size: int = 64  # labelled transitions in a batch
    seed: int = 0  # the first seed
    num_seeds: int = 1  # seeds fitted at once, each to labels of its own: seed, seed + 1, ...
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where to train; auto takes the GPU if there is one
    sweep: bool = False  # also fit at 0.01% to 10% labels: sweep.csv and sweep.png
    output_path: Path | None = None  # write the dataset with the first seed's rewards imputed, HDF5 from HDF5
    output_minari_id: str | None = None  # the same as a Minari dataset, from either kind
    run_dir: Path | None = None  # where to write (runs/{env_id}__{script}__{seed}__{unix time})


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


# --- Report ---
def fit(dataset: Dataset, labels: np.ndarray, seeds: range, args: Args, device: torch.device) -> tuple:
    """Each seed's fitted model, its rewards (seeds, N), its MSE on the labels (seeds,), its losses (epochs, seeds)."""
    model = RewardModel(dataset, seeds, args.reward_hidden_dim).to(device)
    settings = args.reward_epochs, args.reward_learning_rate, args.reward_batch_size
    losses = train_reward_model(model, dataset, labels, *settings)
    rewards = impute_rewards(model, dataset, labels[:, :0])  # predicted for the labelled ones too, at first
    true = np.stack([dataset.rewards[rows] for rows in labels])
    train_mse = np.square(np.take_along_axis(rewards, labels, axis=1) - true).mean(axis=1)
    np.put_along_axis(rewards, labels, true, axis=1)
    return model, rewards, train_mse, losses


def linear_regression(dataset: Dataset, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rewards (seeds, N) by least squares on (s, a, 1), what any reward model has to beat, and MSE on the labels."""
    rewards, train_mse = np.empty((len(labels), len(dataset.rewards)), np.float32), []
    for predicted, rows in zip(rewards, labels):
        columns = (dataset.observations[rows], dataset.actions[rows], np.ones((len(rows), 1), np.float32))
        weights = np.linalg.lstsq(np.hstack(columns), dataset.rewards[rows], rcond=None)[0]
        obs_dim = dataset.observations.shape[1]
        predicted[:] = dataset.observations @ weights[:obs_dim] + dataset.actions @ weights[obs_dim:-1] + weights[-1]
        train_mse.append(np.square(predicted[rows] - dataset.rewards[rows]).mean())
        predicted[rows] = dataset.rewards[rows]
    return rewards, np.array(train_mse)


def table(rows: dict[str, list[str]], columns: list[str]) -> str:
    """Right-aligned text columns under their names."""
    width = max(map(len, rows))
    lines = [[" " * width, *columns]] + [[name.ljust(width), *cells] for name, cells in rows.items()]
    return "\n".join("  ".join([line[0], *(cell.rjust(20) for cell in line[1:])]) for line in lines)


def mean_std(values: list) -> str:
    values = np.array(values, float)  # None, what cannot be known, becomes NaN
    return f"{values.mean():.4f} ± {values.std():.4f}" if np.isfinite(values).all() else "unknown"


def picture(path: Path, figure: Figure) -> None:
    figure.savefig(file := io.BytesIO(), format="png", dpi=150)
    write_file(path, file.getvalue())


def report_figure(dataset: Dataset, rewards: np.ndarray, labels: np.ndarray, r2: float | None, losses) -> Figure:
    """Predicted against true rewards, one episode, the episodes' returns, the loss; all of the first seed but the loss."""
    figure = Figure(figsize=(10, 8), layout="constrained")
    (density, episode, scatter), loss = figure.subplots(2, 2).flat[:3], figure.axes[3]
    imputed, hidden = rewards[0], np.setdiff1d(np.flatnonzero(~np.isnan(dataset.rewards)), labels[0])

    true = dataset.rewards[hidden]
    image = density.hexbin(true, imputed[hidden], gridsize=60, bins="log", cmap="cividis", mincnt=1, linewidths=0.1)
    figure.colorbar(image, ax=density, label="transitions")
    density.axline((true.mean(), true.mean()), slope=1, color="black", linewidth=0.8, linestyle="--")
    density.set(xlabel="true reward", ylabel="predicted reward", title=f"{len(hidden):,} rewards not fitted to")
    density.text(
        0.03, 0.95, f"$R^2$ = {'unknown' if r2 is None else f'{r2:.3f}'}", transform=density.transAxes, va="top"
    )

    returns = np.bincount(dataset.episode_ids, weights=imputed)
    middle = np.argsort(returns)[len(returns) // 2]  # the episode of median return
    rows = np.flatnonzero(dataset.episode_ids == middle)[:150]
    episode.plot(dataset.rewards[rows], color="black", linewidth=1.5, label="true")
    episode.plot(imputed[rows], color="tab:orange", linewidth=1, label="imputed")
    known = np.flatnonzero(np.isin(rows, labels[0]))
    episode.plot(known, imputed[rows[known]], "o", color="tab:blue", markersize=5, label="labelled")
    episode.set(xlabel="step", ylabel="reward", title=f"episode {middle}, its first {len(rows)} steps")
    episode.margins(y=0.2)
    episode.legend(loc="lower center", ncols=3)

    true_returns = np.bincount(dataset.episode_ids, weights=dataset.rewards)  # NaN where a reward is unknown
    if np.isfinite(true_returns).any():
        scatter.plot(true_returns, returns, "o", color="tab:blue", markersize=3, alpha=0.6)
        scatter.axline((np.nanmean(true_returns),) * 2, slope=1, color="black", linewidth=0.8, linestyle="--")
        scatter.set(xlabel="true return", ylabel="imputed return", title=f"{len(returns):,} episodes")
    else:
        scatter.hist(returns, bins=50, color="tab:blue")
        scatter.set(xlabel="imputed return", ylabel="episodes", title="returns (no true one is known)")

    loss.semilogy(np.arange(1, len(losses) + 1), losses)
    loss.set(xlabel="epoch", ylabel="MSE on the labels", title=f"loss of {losses.shape[1]} seeds")
    return figure


def sweep(dataset: Dataset, seeds: range, args: Args, device: torch.device, run_dir: Path) -> dict[str, list]:
    """R2 against the number of labels, from 0.01% to 10% of the known rewards, as a table, sweep.csv and sweep.png."""
    columns = ["fraction", "labels", "r2_mean", "r2_std", "mse_mean", "linear_r2_mean"]
    found = []
    for fraction in (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1):
        try:
            labels = split_labels(dataset.rewards, fraction, seeds)
        except UserError as error:  # too few labels to fit anything
            print(f"{fraction:.2%} skipped: {error}")
            continue
        quality = imputation_quality(fit(dataset, labels, seeds, args, device)[1], dataset, labels)
        linear = imputation_quality(linear_regression(dataset, labels)[0], dataset, labels)
        r2 = np.array(quality["r2"], float)
        numbers = r2.mean(), r2.std(), np.mean(quality["mse"]), np.mean(np.array(linear["r2"], float))
        found.append([fraction, labels.shape[1], *(float(number) for number in numbers)])
        print(
            f"{fraction:8.2%} {labels.shape[1]:10,} labels   R2 {r2.mean():7.4f} ± {r2.std():.4f}   MSE {numbers[2]:.4f}"
        )
        lines = [columns, *found]
        write_file(run_dir / "sweep.csv", "".join(",".join(map(str, line)) + "\n" for line in lines).encode())
    require(found, "no fraction of the sweep leaves enough labels")
    figure = Figure(figsize=(5.5, 4), layout="constrained")
    axes = figure.subplots()
    _, counts, mean, std, _, linear = np.array(found).T
    axes.errorbar(counts, mean, std, color="tab:blue", marker="o", capsize=3, label="reward model")
    axes.plot(counts, linear, color="gray", marker="s", linestyle="--", label="linear regression")
    axes.axhline(0.99, color="black", linewidth=0.8, linestyle=":", label="$R^2$ = 0.99")
    axes.set(xscale="log", xlabel="labels", ylabel="$R^2$ on the hidden rewards", ylim=(min(-0.05, mean.min()), 1.02))
    axes.legend(loc="lower right")
    picture(run_dir / "sweep.png", figure)
    return {column: list(values) for column, values in zip(columns, zip(*found))}


# --- Imputed dataset ---
def write_hdf5(
    source: Path, target: Path, model, dataset: Dataset, labels: np.ndarray, rewards: np.ndarray, notes: dict
):
    """A copy of the D4RL-schema file `source` with all rewards of the first seed, and the boolean column `labeled`.

    Rows that the D4RL rule drops (timeouts and the last row) are predicted too; if every known reward serves as a label,
    so does theirs.
    """
    content = io.BytesIO(source.read_bytes())  # in memory: HDF5 cannot recover from a disk that fills up under it
    with h5py.File(content, "r+") as file:
        old = file["rewards"].astype(np.float32)[()]
        is_kept = np.append(file["timeouts"][:-1].reshape(-1) == 0, False)
        kept, dropped = np.flatnonzero(is_kept), np.flatnonzero(~is_kept)
        middle, half = (
            (dataset.action_high + dataset.action_low) / 2,
            (dataset.action_high - dataset.action_low) / 2,
        )
        rest = dataset._replace(
            observations=file["observations"].astype(np.float32)[dropped],
            actions=(file["actions"].astype(np.float32)[dropped] - middle) / half,
            rewards=old.reshape(-1)[dropped],
        )
        all_known = labels.shape[1] == np.count_nonzero(~np.isnan(dataset.rewards))
        known = np.flatnonzero(~np.isnan(rest.rewards) & all_known)
        completed, labeled = np.empty(len(is_kept), np.float32), np.zeros(len(is_kept), bool)
        completed[kept] = rewards[0]
        completed[dropped] = impute_rewards(model, rest, np.tile(known, (len(labels), 1)))[0]
        labeled[kept[labels[0]]] = labeled[dropped[known]] = True
        for name, column in (("rewards", completed.reshape(old.shape)), ("labeled", labeled)):
            file.pop(name, None)
            file.create_dataset(name, data=column, compression="gzip")
        file.attrs.update({f"imputation_{name}": json.dumps(value) for name, value in notes.items()})
    write_file(target, content.getbuffer())


def read_episodes(args: Args, dataset: Dataset) -> list[tuple]:
    """Observations (T + 1, obs_dim), unscaled actions, terminations and truncations of each episode."""
    if args.dataset_path is None and args.env_id not in SHA256:
        episodes = minari.load_dataset(args.env_id).iterate_episodes()
        return [(e.observations, e.actions, e.terminations, e.truncations) for e in episodes if len(e.actions)]
    with h5py.File(args.dataset_path or find_file(args.env_id), "r") as file:
        kept = np.flatnonzero(file["timeouts"][:-1].reshape(-1) == 0)
        actions = file["actions"].astype(np.float32)[()][kept]
        has_next = "next_observations" in file
        finals = file["next_observations"].astype(np.float32)[()][kept] if has_next else dataset.next_observations
    episodes = []
    for rows in np.split(np.arange(len(kept)), np.flatnonzero(np.diff(dataset.episode_ids)) + 1):
        last, terminations = rows[-1], dataset.terminals[rows] == 1
        # After a termination the next row belongs to another episode: the last observation stands in for the final one.
        final = dataset.observations[last] if terminations[-1] and not has_next else finals[last]
        truncations = (rows == last) & ~terminations
        episodes.append((np.vstack([dataset.observations[rows], final]), actions[rows], terminations, truncations))
    return episodes


def write_minari(args: Args, dataset: Dataset, labels: np.ndarray, rewards: np.ndarray) -> None:
    """A Minari dataset of the same episodes with all rewards of the first seed, and `labeled` in the infos."""
    labeled, buffers, start = np.isin(np.arange(len(dataset.rewards)), labels[0]), [], 0
    for observations, actions, terminations, truncations in read_episodes(args, dataset):
        rows = slice(start, start := start + len(actions))
        columns = {"terminations": terminations, "truncations": truncations, "infos": {"labeled": labeled[rows]}}
        buffers.append(EpisodeBuffer(observations=observations, actions=actions, rewards=rewards[0, rows], **columns))
    references = (
        {} if np.isnan(dataset.ref_min) else {"ref_min_score": dataset.ref_min, "ref_max_score": dataset.ref_max}
    )
    description = f"{args.env_id} with imputed rewards; infos/labeled marks the {labels.shape[1]} rewards that are not"
    try:
        with warnings.catch_warnings(action="ignore"):  # of the author and other fields that nobody here knows
            minari.create_dataset_from_buffers(
                args.output_minari_id, buffers, env=dataset.env_spec, description=description, **references
            )
    except BaseException:
        if args.output_minari_id in minari.list_local_datasets():  # a part of it
            minari.delete_dataset(args.output_minari_id)
        raise


# --- The report, the model and the dataset ---
def check_settings(args: Args) -> None:
    """Raise UserError for values that no run can have, before anything is fitted."""
    for name, value in vars(args).items():
        least = 1 if type(value) is int and name != "seed" else 0
        fine = type(value) not in (int, float) or least <= value < np.inf
        require(fine, f"--{name.replace('_', '-')} cannot be {value}")
    fraction = 1 if args.label_fraction is None else args.label_fraction
    require(0 < fraction <= 1, "--label-fraction must be above 0 and at most 1")
    require(args.device != "cuda" or torch.cuda.is_available(), "--device cuda: there is no usable GPU here")
    held = args.run_dir and (args.run_dir / "config.json").exists()
    require(not held, f"{args.run_dir} already holds a run: choose another --run-dir")
    if args.output_path:
        require(not args.output_path.exists(), f"--output-path {args.output_path} exists already")
        hdf5 = args.dataset_path or args.env_id in SHA256
        require(hdf5, "--output-path needs an HDF5 source; for a Minari dataset there is --output-minari-id")
    if args.output_minari_id:
        try:
            parse_dataset_id(args.output_minari_id)
        except (ValueError, TypeError) as error:  # TypeError: no version
            raise UserError(f"--output-minari-id {args.output_minari_id} is not of the form my/name-v0") from error
        exists = args.output_minari_id in minari.list_local_datasets()
        require(not exists, f"--output-minari-id {args.output_minari_id} exists already")


def main(args: Args) -> None:
    check_settings(args)
    config = json.loads(json.dumps(vars(args), default=str))
    name = f"{args.env_id.replace('/', '-')}__{Path(__file__).stem}__{args.seed}__{int(time.time())}"
    run_dir = args.run_dir or Path("runs") / name
    device = torch.device(args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    seeds = range(args.seed, args.seed + args.num_seeds)
    dataset = load_dataset(args.env_id, args.dataset_path, args.eval_env_id)
    labels = split_labels(dataset.rewards, args.label_fraction, seeds)  # (seeds, labels)
    run_dir.mkdir(parents=True, exist_ok=True)
    write_file(run_dir / "config.json", json.dumps(config, indent=2).encode())
    num_episodes, num_known = dataset.episode_ids[-1] + 1, np.count_nonzero(~np.isnan(dataset.rewards))
    print(f"dataset       {args.env_id}: {len(dataset.rewards):,} transitions, {num_episodes:,} episodes")
    print(f"labels        {labels.shape[1]:,} of {num_known:,} known rewards for each of {len(seeds)} seeds")

    # The report, on the hidden rewards; where there are none, on a fifth of the labels that is not fitted to.
    fitted_to, judged_on = labels, "the hidden rewards"
    if labels.shape[1] == num_known:
        generators = [np.random.default_rng(seed) for seed in seeds]
        count = int(0.8 * labels.shape[1])
        fitted_to = np.sort([rng.permutation(rows)[:count] for rng, rows in zip(generators, labels)])
        judged_on = "20% of the labels, held out; the model written is then fitted to all labels"
    model, rewards, train_mse, losses = fit(dataset, fitted_to, seeds, args, device)
    quality = {"train_mse": train_mse.tolist()} | imputation_quality(rewards, dataset, fitted_to)
    linear_rewards, linear_mse = linear_regression(dataset, fitted_to)
    linear = {"train_mse": linear_mse.tolist()} | imputation_quality(linear_rewards, dataset, fitted_to)
    rows = {name: [mean_std(values) for values in by.values()] for name, by in
            (("reward model", quality), ("linear regression", linear))}  # fmt: skip
    print(f"judged on     {judged_on}\n\n{table(rows, ['train MSE', 'R2', 'MSE', 'MAE', 'return correlation'])}\n")
    figure = report_figure(dataset, rewards, fitted_to, quality["r2"][0], losses)
    picture(run_dir / "report.png", figure)
    result = {
        "num_labels": labels.shape[1],
        "judged_on": judged_on,
        "reward_model": quality,
        "linear_regression": linear,
    }
    result |= {"losses": losses.tolist(), "versions": {m.__name__: m.__version__ for m in (torch, np, gym, minari)}}
    if args.sweep:
        result |= {"sweep": sweep(dataset, seeds, args, device, run_dir)}
    write_file(run_dir / "result.json", json.dumps(result, indent=2).encode())

    # The model, fitted to all labels, and the dataset with the rewards of its first seed.
    if fitted_to is not labels:
        model, rewards, _, _ = fit(dataset, labels, seeds, args, device)
    arrays = {"mean": model.mean[:, 0], "std": model.std[:, 0]}
    for i, layer in enumerate(model.mlp[::2]):
        arrays |= {f"w{i}": layer.weight, f"b{i}": layer.bias[:, 0]}
    np.savez(file := io.BytesIO(), **{name: tensor.detach().cpu().numpy() for name, tensor in arrays.items()})
    write_file(run_dir / "reward_model.npz", file.getvalue())
    if args.output_path:
        source = args.dataset_path or find_file(args.env_id)
        notes = {"quality": quality, "judged_on": judged_on, "settings": config}
        write_hdf5(source, args.output_path, model, dataset, labels, rewards, notes)
        print(f"dataset       {args.output_path}, {labels.shape[1]:,} rewards labelled, all others imputed")
    if args.output_minari_id:
        write_minari(args, dataset, labels, rewards)
        print(f"dataset       {args.output_minari_id}, {labels.shape[1]:,} rewards labelled, all others imputed")
    print(f"result        R2 {mean_std(quality['r2'])} over {len(seeds)} seeds, in {run_dir}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, OSError, ImportError, gym.error.Error) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
