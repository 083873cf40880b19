"""What makes a run faster changes nothing in it: compiled, recorded as a CUDA graph, or neither."""

import shutil

import pytest
import torch
from test_run import AGENTS, SMALL, own_dataset, run  # noqa: F401, own_dataset is a fixture

GPU = torch.cuda.is_available()


def weights(script, run_dir, *options):
    """All parameters and targets after 100 updates of two seeds."""
    arguments = ["--num-updates", 100, "--eval-freq", 100, "--num-seeds", 2, "--run-dir", run_dir, *options]
    run(script, *SMALL, *arguments)
    agent = torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True)["agent"]
    networks = {name: state for name, state in agent.items() if "optimizer" not in name}
    return {f"{name}.{key}": tensor for name, state in networks.items() for key, tensor in state.items()}


def largest_difference(first, second):
    return max((first[name] - second[name]).abs().max().item() for name in first)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("script", AGENTS)
def test_a_compiled_run_equals_an_eager_one(script, tmp_path):
    eager, compiled = (weights(script, tmp_path / name, f"--{name}") for name in ("no-compile", "compile"))
    assert largest_difference(eager, compiled) < 1e-4


@pytest.mark.parametrize("script", AGENTS)
def test_reduced_precision_is_another_run_and_cannot_resume_this_one(script, tmp_path):
    weights(script, tmp_path / "run")
    again = [*SMALL, "--num-updates", 100, "--eval-freq", 100, "--num-seeds", 2, "--run-dir", tmp_path / "run"]
    (tmp_path / "run" / "result.json").unlink()
    error = run(script, *again, "--resume", "--matmul-precision", "medium", code=2)
    assert "matmul_precision was highest, now medium" in error
    assert "100" in run(script, *again, "--resume", "--compile", "--no-cuda-graph")


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("options", [["--cuda-graph"], ["--cuda-graph", "--compile"]], ids=" ".join)
@pytest.mark.parametrize("script", AGENTS)
def test_a_recorded_run_equals_an_eager_one_on_a_gpu(script, options, tmp_path):
    eager = weights(script, tmp_path / "eager", "--device", "cuda", "--no-cuda-graph")
    recorded = weights(script, tmp_path / "recorded", "--device", "cuda", *options)
    assert largest_difference(eager, recorded) < 1e-4
