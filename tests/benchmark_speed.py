"""Seed-updates a second of both agents, as ratios to the plain per-network version in the same run.

    python tests/benchmark_speed.py                # eager, compiled, medium precision; on a GPU also CUDA graphs
    python tests/benchmark_speed.py --scaling      # 1 to 50 seeds at once

The plain version is tests/reference.py: one seed, an nn.Sequential a network, a loop over parameters, eager. A bare time
says nothing about another machine, so the table gives ratios; versions take turns, so that noise meets them all.
"""

import json
import sys
import time
from collections import namedtuple
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import reference

import iql_imputed
import td3bc_imputed

OBS_DIM, ACT_DIM, ROWS, BATCH = 17, 6, 100_000, 256  # HalfCheetah's
SCRIPTS = {"TD3+BC": td3bc_imputed, "IQL": iql_imputed}
FUNCTIONS = {"TD3+BC": ("gather", "td_target", "loss_and_grad"), "IQL": ("gather", "loss_and_grad")}  # by --compile
Version = namedtuple("Version", "agent num_seeds precision compile graph")


@dataclass
class Args:
    num_updates: int = 200  # updates a measurement
    rounds: int = 5  # measurements of each version; the median counts
    num_seeds: tuple[int, ...] = (1, 5)  # seeds trained at once
    agents: tuple[str, ...] = ("TD3+BC", "IQL")  # which to measure
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # where to train
    scaling: bool = False  # eager float32 (on a GPU: with CUDA graphs) with 1, 2, 5, 10, 20 and 50 seeds instead
    json_path: Path | None = None  # write the measurements there too
    figure_path: Path | None = None  # with --scaling: draw seed-updates/s against the number of seeds there


def make_data(script, num_seeds: int, device: str):
    generator = torch.Generator().manual_seed(0)
    observations = torch.randn(ROWS, OBS_DIM, generator=generator)
    actions = torch.rand(ROWS, ACT_DIM, generator=generator) * 1.9 - 0.95
    rewards = torch.randn(num_seeds, ROWS, generator=generator).to(device)
    columns = (observations, actions, observations.roll(-1, 0), torch.zeros(ROWS))
    observations, actions, following, terminals = (c.to(device).expand(num_seeds, *c.shape) for c in columns)
    return script.Batch(observations, actions, rewards, following, terminals)


def plain_step(name: str, device: str):
    """A call of the plain version, and the number of updates in it."""
    script, generator = SCRIPTS[name], torch.Generator(device).manual_seed(0)
    data = make_data(script, 1, device)
    with torch.device(device):
        if name == "IQL":
            agent = reference.IQL(OBS_DIM, ACT_DIM, 10**6)
        else:
            agent = reference.TD3BC(OBS_DIM, ACT_DIM, data.observations[0].mean(0), data.observations[0].std(0))
        agent.start()

    def step():
        batch = [tensor[0] for tensor in script.sample(data, (1, BATCH), generator)]
        noise = [torch.randn(BATCH, ACT_DIM, generator=generator, device=device)] if name == "TD3+BC" else []
        agent.update(*batch, *noise)

    return step, 1


def our_step(version: Version, device: str):
    """A call of `sample` and `update` as the scripts' main makes it, and the number of updates in it."""
    name, num_seeds, script = version.agent, version.num_seeds, SCRIPTS[version.agent]
    data, args, generator = make_data(script, num_seeds, device), script.Args(), torch.Generator(device).manual_seed(0)
    agent = script.make_agent(data, range(num_seeds), 3e-4)

    def td3bc_step():
        batches = script.sample(data, (2, num_seeds, BATCH), generator)
        noise = torch.randn(batches.actions.shape, generator=generator, device=device)
        script.update(agent, batches, noise, args)

    def iql_step():
        script.update(agent, script.sample(data, (num_seeds, BATCH), generator), args)

    step, updates = (td3bc_step, 2) if name == "TD3+BC" else (iql_step, 1)
    if version.graph:
        configure(version)
        for _ in range(10):
            step()
        (graph := torch.cuda.CUDAGraph()).register_generator_state(generator)
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            step()
        step = graph.replay
    return step, updates


torch._dynamo.config.trace_autograd_ops = True
torch._dynamo.config.recompile_limit = 100  # a script compiles for one number of seeds, this for several
EAGER = {(name, function): getattr(SCRIPTS[name], function) for name in SCRIPTS for function in FUNCTIONS[name]}
COMPILED = {key: torch.compile(function, fullgraph=True, dynamic=False) for key, function in EAGER.items()}


def configure(version: Version) -> None:
    torch.set_float32_matmul_precision(version.precision)
    for name, function in EAGER:
        setattr(SCRIPTS[name], function, (COMPILED if version.compile else EAGER)[name, function])


def measure(step, updates: int, num_updates: int, device: str) -> float:
    """Updates a second."""
    start = time.perf_counter()
    for _ in range(num_updates // updates):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
    return num_updates / (time.perf_counter() - start)


class OperatorCounter(TorchDispatchMode):
    """Counts what is called below autograd and does work: no views, no allocations."""

    count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += not operator.is_view and "empty" not in operator.name()
        return operator(*args, **(kwargs or {}))


def floor(version: Version, device: str) -> dict[str, float]:
    """What one update of one seed cannot do without: floating-point operations, and operators (kernels on a GPU)."""
    configure(version)
    step, updates = our_step(version._replace(graph=False), device)
    step()
    with FlopCounterMode(display=False) as flop, OperatorCounter() as operators:
        step()
    flop_per_update = flop.get_total_flops() / updates / version.num_seeds
    return {"MFLOP_per_seed_update": flop_per_update / 1e6, "operators_per_update": operators.count / updates}


def draw(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
    for style, name in zip(("o-", "s--"), sorted({row["agent"] for row in rows}, reverse=True)):
        points = [
            (row["num_seeds"], row["ratio"]) for row in rows if row["agent"] == name and row["version"] != "plain"
        ]
        axes.plot(*zip(*points), style, color="black" if name == "TD3+BC" else "gray", label=name)
    axes.axhline(1, color="lightgray", linewidth=1)
    axes.set(xscale="log", xlabel="seeds trained at once", ylabel="seed-updates/s, plain version = 1", ylim=(0, None))
    axes.set_xticks([row["num_seeds"] for row in rows], [row["num_seeds"] for row in rows])
    axes.minorticks_off()
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main(args: Args) -> None:
    cuda = args.device == "cuda"
    if cuda:
        torch.cuda.set_stream(torch.cuda.Stream())
    device_name = torch.cuda.get_device_name() if cuda else f"cpu, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {device_name}, median of {args.rounds}\n")
    print("| agent | version | seeds | updates/s | seed-updates/s | ratio to plain |\n|---|---|---|---|---|---|")
    rows = []
    for name in args.agents:
        eager = Version(name, 1, "highest", False, False)
        if args.scaling:
            versions = [eager._replace(num_seeds=n, graph=cuda) for n in (1, 2, 5, 10, 20, 50)]
        else:
            kinds = [eager, eager._replace(compile=True), eager._replace(precision="medium")]
            kinds += [eager._replace(compile=True, precision="medium")]
            kinds += [kind._replace(graph=True) for kind in kinds if cuda]
            versions = [kind._replace(num_seeds=n) for kind in kinds for n in args.num_seeds]
        steps = {"plain": partial(measure, *plain_step(name, args.device))}
        steps |= {version: partial(measure, *our_step(version, args.device)) for version in versions}
        speeds = {version: [] for version in steps}
        for turn in range(args.rounds + 1):  # the first warms up
            for version, step in steps.items():
                configure(eager if version == "plain" else version)
                speed = step(num_updates=args.num_updates if turn else 20, device=args.device)
                speeds[version] += [speed] if turn else []
        medians = {version: sorted(values)[len(values) // 2] for version, values in speeds.items()}
        for version, rate in medians.items():
            num_seeds = 1 if version == "plain" else version.num_seeds
            words = ["eager", "compiled"][version != "plain" and version.compile], version != "plain" and version.graph
            text = "plain" if version == "plain" else ", ".join(
                [words[0]] + ["CUDA graph"] * version.graph + ["medium precision"] * (version.precision == "medium")
            )  # fmt: skip
            row = {"agent": name, "version": text, "num_seeds": num_seeds, "updates_per_second": rate}
            row |= {"seed_updates_per_second": rate * num_seeds, "ratio": rate * num_seeds / medians["plain"]}
            rows.append(row)
            numbers = f"{num_seeds} | {rate:.0f} | {rate * num_seeds:.0f} | {row['ratio']:.2f}"
            print(f"| {name} | {text} | {numbers} |")
    floors = {name: floor(Version(name, 1, "highest", False, False), args.device) for name in args.agents}
    print("\n" + "\n".join(f"{name}: {floor}" for name, floor in floors.items()))
    if args.json_path:
        machine = {"torch": torch.__version__, "device": device_name, "rounds": args.rounds}
        args.json_path.write_text(json.dumps(machine | {"rows": rows, "floors": floors}, indent=2))
    if args.scaling and args.figure_path:
        draw(rows, args.figure_path)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
