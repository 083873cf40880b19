"""Seed-updates a second of both agents, as ratios to the plain per-network version in the same run.

    python tests/benchmark_speed.py

The plain version is tests/reference.py: one seed, an nn.Sequential a network, a loop over parameters, eager. A bare time
says nothing about another machine, so the table gives ratios; versions take turns, so that noise meets them all.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import reference

import iql_imputed
import td3bc_imputed

OBS_DIM, ACT_DIM, ROWS, BATCH = 17, 6, 100_000, 256  # HalfCheetah's


@dataclass
class Args:
    num_updates: int = 200  # updates a measurement
    rounds: int = 5  # measurements of each version; the median counts
    num_seeds: tuple[int, ...] = (1, 5)  # seeds trained at once


def make_data(script, num_seeds: int):
    generator = torch.Generator().manual_seed(0)
    observations = torch.randn(ROWS, OBS_DIM, generator=generator)
    actions = torch.rand(ROWS, ACT_DIM, generator=generator) * 1.9 - 0.95
    rewards = torch.randn(num_seeds, ROWS, generator=generator)
    columns = (observations, actions, observations.roll(-1, 0), torch.zeros(ROWS))
    observations, actions, following, terminals = (c.expand(num_seeds, *c.shape) for c in columns)
    return script.Batch(observations, actions, rewards, following, terminals)


def plain_td3bc():
    data = make_data(td3bc_imputed, 1)
    agent = reference.TD3BC(OBS_DIM, ACT_DIM, data.observations[0].mean(0), data.observations[0].std(0))
    agent.start()

    def update():
        batch = td3bc_imputed.sample(data, (1, BATCH), torch.default_generator)
        agent.update(*(tensor[0] for tensor in batch), torch.randn(BATCH, ACT_DIM))

    return update, 1


def plain_iql():
    data = make_data(iql_imputed, 1)
    agent = reference.IQL(OBS_DIM, ACT_DIM, 10**6)
    agent.start()

    def update():
        batch = iql_imputed.sample(data, (1, BATCH), torch.default_generator)
        agent.update(*(tensor[0] for tensor in batch))

    return update, 1


def our_td3bc(num_seeds: int):
    data, args = make_data(td3bc_imputed, num_seeds), td3bc_imputed.Args()
    agent = td3bc_imputed.make_agent(data, range(num_seeds), 3e-4)

    def update():
        batches = td3bc_imputed.sample(data, (2, num_seeds, BATCH), torch.default_generator)
        td3bc_imputed.update(agent, batches, torch.randn(batches.actions.shape), args)

    return update, 2


def our_iql(num_seeds: int):
    data, args = make_data(iql_imputed, num_seeds), iql_imputed.Args()
    agent = iql_imputed.make_agent(data, range(num_seeds), 3e-4)

    def update():
        iql_imputed.update(agent, iql_imputed.sample(data, (num_seeds, BATCH), torch.default_generator), args)

    return update, 1


def measure(update, updates_per_call: int, num_updates: int) -> float:
    """Updates a second."""
    start = time.perf_counter()
    for _ in range(num_updates // updates_per_call):
        update()
    return num_updates / (time.perf_counter() - start)


def main(args: Args) -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, median of {args.rounds}\n")
    print("| agent | version | updates/s | seed-updates/s | ratio to plain |\n|---|---|---|---|---|")
    for name, plain, ours in (("TD3+BC", plain_td3bc, our_td3bc), ("IQL", plain_iql, our_iql)):
        versions = {"plain, 1 seed": (1, *plain())}
        versions |= {f"batched, {n} seed{'s' if n > 1 else ''}": (n, *ours(n)) for n in args.num_seeds}
        speeds = {version: [] for version in versions}
        for turn in range(args.rounds + 1):  # the first warms up
            for version, (_, update, per_call) in versions.items():
                speed = measure(update, per_call, args.num_updates if turn else 20)
                speeds[version] += [speed] if turn else []
        medians = {version: sorted(values)[len(values) // 2] for version, values in speeds.items()}
        for version, (num_seeds, _, _) in versions.items():
            rate, base = medians[version], medians["plain, 1 seed"]
            print(f"| {name} | {version} | {rate:.0f} | {rate * num_seeds:.0f} | {rate * num_seeds / base:.2f} |")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
