"""Seed-updates a second of both agents, as ratios to a plain version timed in the same run.

    python tests/benchmark_speed.py                  # eager and compiled; on a GPU also CUDA graphs
    python tests/benchmark_speed.py --scaling        # 1 to 50 seeds at once
    python tests/benchmark_speed.py --peers ../CORL  # CORL's agents beside ours

The plain version is tests/reference.py: one seed, an nn.Sequential for a network, eager. A bare
time says nothing about another machine, so the table gives ratios; versions take turns, so that
noise meets them all, and the median of the turns counts.
"""

import importlib.util
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple
from unittest.mock import MagicMock

import torch
import tyro
from matplotlib.figure import Figure
from tqdm import tqdm

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import reference

SCRIPTS = {"TD3+BC": "td3bc_imputed.py", "IQL": "iql_imputed.py"}
OBS_DIM, ACT_DIM = 17, 6  # HalfCheetah's
NUM_ROWS = 100_000
BATCH_SIZE = 256


@dataclass
class Args:
    num_updates: int = 200  # updates in a measurement
    rounds: int = 5  # measurements of each version; the median counts
    num_seeds: tuple[int, ...] = (1, 5)  # seeds trained at once
    agents: tuple[str, ...] = ("TD3+BC", "IQL")  # which to measure
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # where to train
    scaling: bool = False  # instead: eager (on a GPU: recorded) with 1 to 50 seeds
    peers: Path | None = None  # a checkout of github.com/tinkoff-ai/CORL, timed as well
    json_path: Path | None = None  # write the measurements there too
    figure_path: Path | None = None  # with --scaling: draw seed-updates/s against seeds there


class Version(NamedTuple):
    """One way to train, ready to go on."""

    name: str
    num_seeds: int
    step: Callable
    updates_per_step: int
    precision: str = "highest"


# --- The versions ---
def plain_version(agent_name: str, device: str) -> Version:
    script = import_script(agent_name)
    data = random_transitions(script, 1, device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.device(device):
        if agent_name == "IQL":
            agent = reference.IQL(OBS_DIM, ACT_DIM, total_updates=1_000_000)
        else:
            std, mean = torch.std_mean(data.observations[0], dim=0)
            agent = reference.TD3BC(OBS_DIM, ACT_DIM, mean, std)
        agent.start()

    def step():
        batch = script.draw_batch(data, BATCH_SIZE, generator)
        inputs = [tensor[0] for tensor in batch]
        if agent_name == "TD3+BC":
            inputs.append(torch.randn(inputs[1].shape, generator=generator, device=device))
        agent.update(*inputs)

    return Version("plain", 1, step, 1)


def our_version(agent_name, num_seeds, device, precision="highest", compiled=False, recorded=False):
    """Updates as the script's main makes them."""
    torch.set_float32_matmul_precision(precision)
    script = import_script(agent_name)
    args = script.Args(batch_size=BATCH_SIZE, compile="on" if compiled else "off")
    data = random_transitions(script, num_seeds, device)
    agent = script.Agent(data, script.make_generators(range(num_seeds), stream=2), args)
    generator = torch.Generator(device).manual_seed(0)
    if script.compile_losses(agent, data, args) != compiled:
        sys.exit(f"{agent_name}: compiling failed")

    def eager_update():
        return script.update(agent, data, generator, args)

    for _ in range(10):
        eager_update()
    update = script.record(eager_update, generator) if recorded else eager_update
    if recorded and update is eager_update:
        sys.exit(f"{agent_name}: recording failed")

    def step():
        if agent_name == "IQL":
            script.set_actor_rate(agent, 0, args)
        update()

    words = ["compiled" if compiled else "eager"]
    if recorded:
        words.append("CUDA graph")
    if precision != "highest":
        words.append(f"{precision} precision")
    updates_per_step = args.policy_freq if agent_name == "TD3+BC" else 1
    return Version(", ".join(words), num_seeds, step, updates_per_step, precision)


def import_script(agent_name: str):
    """A new copy for each version, since compiling changes a script's functions."""
    path = Path(__file__).parent.parent / SCRIPTS[agent_name]
    return import_file(path, f"{path.stem}_{len(sys.modules)}")


def import_file(path: Path, name: str):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def corl_version(agent_name: str, folder: Path, device: str) -> Version:
    """CORL's agent as its train() sets it up, without its logging."""
    file_name = "iql.py" if agent_name == "IQL" else "td3_bc.py"
    corl = import_corl(folder / "algorithms" / "offline" / file_name)
    data = random_transitions(import_script(agent_name), 1, device)
    dataset = {name: tensor[0].cpu().numpy() for name, tensor in data._asdict().items()}
    mean, std = corl.compute_mean_std(dataset["observations"], eps=1e-3)
    for name in ("observations", "next_observations"):
        dataset[name] = corl.normalize_states(dataset[name], mean, std)
    buffer = corl.ReplayBuffer(OBS_DIM, ACT_DIM, NUM_ROWS, device)
    buffer.load_d4rl_dataset(dataset)
    trainer = corl_iql(corl, device) if agent_name == "IQL" else corl_td3bc(corl, device)

    def step():
        batch = buffer.sample(BATCH_SIZE)
        trainer.train([tensor.to(device) for tensor in batch])

    return Version("CORL", 1, step, 1)


def corl_td3bc(corl, device: str):
    networks = {
        "actor": corl.Actor(OBS_DIM, ACT_DIM, max_action=1.0).to(device),
        "critic_1": corl.Critic(OBS_DIM, ACT_DIM).to(device),
        "critic_2": corl.Critic(OBS_DIM, ACT_DIM).to(device),
    }
    return corl.TD3_BC(1.0, **networks, **make_optimizers(networks), device=device)


def corl_iql(corl, device: str):
    actor = corl.GaussianPolicy(OBS_DIM, ACT_DIM, max_action=1.0).to(device)
    q = corl.TwinQ(OBS_DIM, ACT_DIM).to(device)
    v = corl.ValueFunction(OBS_DIM).to(device)
    networks = {"actor": actor, "q_network": q, "v_network": v}
    optimizers = make_optimizers({"actor": actor, "q": q, "v": v})
    return corl.ImplicitQLearning(1.0, **networks, **optimizers, device=device)


def make_optimizers(networks: dict) -> dict:
    optimizers = {}
    for name, network in networks.items():
        optimizers[f"{name}_optimizer"] = torch.optim.Adam(network.parameters(), lr=3e-4)
    return optimizers


def import_corl(path: Path):
    """A file of CORL as a module; simulators and loggers that are not installed are stubs."""
    for name in ("d4rl", "gym", "pyrallis", "wandb"):
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            sys.modules[name] = MagicMock()
    return import_file(path, f"corl_{path.stem}")


def random_transitions(script, num_seeds: int, device: str):
    return reference.random_transitions(script, num_seeds, NUM_ROWS, OBS_DIM, ACT_DIM, device)


def make_versions(agent_name: str, args: Args, precisions: list[str]) -> list[Version]:
    """The plain one first, then CORL's, then ours."""
    versions = [plain_version(agent_name, args.device)]
    if args.peers:
        versions.append(corl_version(agent_name, args.peers, args.device))
    has_gpu = args.device == "cuda"
    if args.scaling:
        for num_seeds in (1, 2, 5, 10, 20, 50):
            versions.append(our_version(agent_name, num_seeds, args.device, recorded=has_gpu))
        return versions
    for num_seeds in args.num_seeds:
        for recorded in [False, True] if has_gpu else [False]:
            for precision in precisions:
                for compiled in (False, True):
                    settings = precision, compiled, recorded
                    versions.append(our_version(agent_name, num_seeds, args.device, *settings))
    return versions


# --- The measurements ---
def measure(version: Version, num_updates: int, device: str) -> float:
    """Updates a second."""
    start = time.perf_counter()
    for _ in range(num_updates // version.updates_per_step):
        version.step()
    if device == "cuda":
        torch.cuda.synchronize()
    return num_updates / (time.perf_counter() - start)


def measure_agent(agent_name: str, args: Args, precisions: list[str]) -> list[dict]:
    """A row of the table for each version of one agent."""
    versions = make_versions(agent_name, args, precisions)
    speeds = [[] for _ in versions]
    for turn in tqdm(range(args.rounds + 1), agent_name, leave=False, disable=None):
        for version, measured in zip(versions, speeds):
            torch.set_float32_matmul_precision(version.precision)
            if turn == 0:  # warms up
                measure(version, 40, args.device)
            else:
                measured.append(measure(version, args.num_updates, args.device))
    rows = []
    for version, measured in zip(versions, speeds):
        speed = median(measured)
        row = {"agent": agent_name, "version": version.name, "num_seeds": version.num_seeds}
        row["updates_per_second"] = speed
        row["seed_updates_per_second"] = speed * version.num_seeds
        row["ratio"] = version.num_seeds * median_ratio(measured, speeds[0])
        if versions[1].name == "CORL":
            row["ratio_to_corl"] = version.num_seeds * median_ratio(measured, speeds[1])
        rows.append(row)
    return rows


def median_ratio(speeds: list[float], others: list[float]) -> float:
    """Of each turn a ratio, so that noise longer than a turn meets both."""
    return median(speed / other for speed, other in zip(speeds, others))


# --- The table and the figure ---
def print_table(rows: list[dict]) -> None:
    titles = ["agent", "version", "seeds", "updates/s", "seed-updates/s", "plain = 1"]
    with_corl = any("ratio_to_corl" in row for row in rows)
    if with_corl:
        titles.append("CORL = 1")
    print("|", " | ".join(titles), "|")
    print("|" + "---|" * len(titles))
    for row in rows:
        cells = [row["agent"], row["version"], str(row["num_seeds"])]
        cells.append(f"{row['updates_per_second']:.0f}")
        cells.append(f"{row['seed_updates_per_second']:.0f}")
        cells.append(f"{row['ratio']:.2f}")
        if with_corl:
            cells.append(f"{row['ratio_to_corl']:.2f}" if "ratio_to_corl" in row else "")
        print("|", " | ".join(cells), "|")


def draw(rows: list[dict], path: Path) -> None:
    """Seed-updates a second against the number of seeds, the plain version being 1."""
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    styles = {"TD3+BC": ("o-", "tab:blue"), "IQL": ("s--", "tab:orange")}
    for agent_name, (style, color) in styles.items():
        points = {}
        for row in rows:
            if row["agent"] == agent_name and row["version"] not in ("plain", "CORL"):
                points[row["num_seeds"]] = row["ratio"]
        axes.plot(points.keys(), points.values(), style, color=color, label=agent_name)
    numbers = sorted({row["num_seeds"] for row in rows})
    axes.set_xscale("log")
    axes.set_xticks(numbers, numbers)
    axes.axhline(1, color="lightgray", linewidth=1)
    axes.set(xlabel="seeds trained at once", ylabel="seed-updates/s, plain version = 1")
    axes.set_ylim(bottom=0)
    axes.minorticks_off()
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main(args: Args) -> None:
    device_name = f"cpu, {torch.get_num_threads()} threads"
    if args.device == "cuda":
        device_name = torch.cuda.get_device_name()
    script = import_script("TD3+BC")
    script.choose_device(script.Args(device=args.device))  # sets the stream and the precision
    precisions = sorted({"highest", torch.get_float32_matmul_precision()})
    rows = []
    for agent_name in args.agents:
        rows += measure_agent(agent_name, args, precisions)
    print(f"torch {torch.__version__}, {device_name}, median of {args.rounds}\n")
    print_table(rows)
    if args.json_path:
        machine = {"torch": torch.__version__, "device": device_name, "rounds": args.rounds}
        args.json_path.write_text(json.dumps(machine | {"rows": rows}, indent=2))
    if args.figure_path:
        draw(rows, args.figure_path)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
