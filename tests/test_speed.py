"""What makes a run faster changes nothing in it: compiled, recorded as a CUDA graph, or neither."""

import shutil
from pathlib import Path

import pytest
import simulated_cuda
import torch
from test_run import SMALL, own_dataset, run_here  # noqa: F401, own_dataset is a fixture

import iql_imputed
import td3bc_imputed

AGENTS = [td3bc_imputed, iql_imputed]
COMPILED = ("gather", "loss_and_grad", "td_target")
CPU_FLAGS = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""


@pytest.fixture(autouse=True)
def functions_are_given_back(monkeypatch):
    """`--compile` replaces them in the script; `--matmul-precision` is for the whole process."""
    for script in AGENTS:
        for name in COMPILED:
            if hasattr(script, name):
                monkeypatch.setattr(script, name, getattr(script, name))
    yield
    torch.set_float32_matmul_precision("highest")


def weights(script, run_dir, *options):
    """All parameters and targets after 100 updates of two seeds."""
    run_here(script, *SMALL, "--num-updates", 100, "--eval-freq", 100, "--num-seeds", 2, "--run-dir", run_dir, *options)
    agent = torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True)["agent"]
    networks = {name: state for name, state in agent.items() if "optimizer" not in name}
    return {f"{name}.{key}": tensor for name, state in networks.items() for key, tensor in state.items()}


def largest_difference(first, second):
    assert first.keys() == second.keys()
    return torch.cat([(first[name] - second[name]).abs().flatten() for name in first]).max().item()  # NaN if one is


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize(("script", "rewards"), list(zip(AGENTS, ("imputed", "oracle"))))  # the fit is compiled as well
def test_a_compiled_run_equals_an_eager_one(script, rewards, tmp_path):
    eager, plain = weights(script, tmp_path / "eager", "--rewards", rewards), dict(vars(script))
    compiled = weights(script, tmp_path / "compiled", "--rewards", rewards, "--compile")
    assert all(vars(script)[name] is not plain[name] for name in COMPILED if name in plain), "not all was compiled"
    assert largest_difference(eager, compiled) < 1e-4


@pytest.mark.skipif("amx" in CPU_FLAGS, reason="there, medium multiplies in bfloat16")
@pytest.mark.skipif("avx512bw" not in CPU_FLAGS, reason="without AVX-512, medium changes nothing")
@pytest.mark.parametrize("script", AGENTS)
def test_medium_precision_is_float32_by_another_library_on_a_cpu_without_amx(script, tmp_path):
    highest = weights(script, tmp_path / "highest")
    medium = weights(script, tmp_path / "medium", "--matmul-precision", "medium")
    assert 0 < largest_difference(highest, medium) < 1e-4, "another library, no other precision"


@pytest.mark.parametrize("script", AGENTS)
def test_a_recorded_run_equals_an_eager_one_where_cuda_graphs_are_simulated(script, tmp_path, monkeypatch):
    eager = weights(script, tmp_path / "eager")
    monkeypatch.setattr(script, "torch", simulated_cuda.Torch())
    monkeypatch.setattr(simulated_cuda.Graph, "replays", 0)
    recorded = weights(script, tmp_path / "recorded", "--device", "cuda")
    assert simulated_cuda.Graph.replays == (100 - 20) / getattr(script.Args(), "policy_freq", 1), "20 updates warm up"
    assert largest_difference(eager, recorded) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", [["--cuda-graph"], ["--cuda-graph", "--compile"]], ids=" ".join)
@pytest.mark.parametrize("script", AGENTS)
def test_a_recorded_run_equals_an_eager_one_on_a_gpu(script, options, tmp_path):
    eager = weights(script, tmp_path / "eager", "--device", "cuda", "--no-cuda-graph")
    recorded = weights(script, tmp_path / "recorded", "--device", "cuda", *options)
    assert largest_difference(eager, recorded) < 1e-4
