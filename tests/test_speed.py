"""What makes a run faster changes nothing in it: compiled, recorded as a CUDA graph, or neither."""

import functools
import json
import shutil
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
import simulated_cuda
import torch

import iql_imputed
import td3bc_imputed

BOTH = pytest.mark.parametrize("script", [td3bc_imputed, iql_imputed], ids=["td3bc", "iql"])
X86 = {"cpu_name": "x86", "architecture": "x86_64", "amx_bf16": False}
X86_WITH_AMX = {"cpu_name": "amx", "architecture": "x86_64", "amx_bf16": True}
ARM = {"cpu_name": "arm", "architecture": "aarch64"}
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def log():
    """log.hdf5: 300 transitions of an episode each, and nowhere to evaluate."""
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (300, 2))
    with h5py.File("log.hdf5", "w") as file:
        file["observations"] = rng.normal(size=(300, 3))
        file["next_observations"] = rng.normal(size=(300, 3))
        file["actions"] = actions
        file["rewards"] = actions.sum(axis=1)
        file["terminals"] = np.ones(300, bool)


@pytest.fixture(autouse=True)
def speed_is_given_back():
    """A run sets it for its script and for the whole process."""
    with warnings.catch_warnings():
        yield
    for script in (td3bc_imputed, iql_imputed):
        script.set_speed("highest", compiles=False)
    torch._dynamo.reset()


OPTIONS = """
    --dataset-path log.hdf5 --label-fraction 0.2 --reward-epochs 10 --reward-batch-size 25
    --num-updates 100 --batch-size 16 --num-seeds 2
    --device cpu --matmul-precision highest --compile off
"""


def train(script, run_dir, *options):
    """A reward model fitted in 30 steps, the last of each epoch filled up; then 100 updates."""
    arguments = [*OPTIONS.split(), "--run-dir", run_dir, *options]
    script.main(script.tyro.cli(script.Args, args=arguments))


def read_json(path):
    return json.loads(Path(path).read_text())


def weights_of(run_dir):
    """Every tensor that was trained: reward model, networks, targets."""
    state = torch.load(Path(run_dir, "checkpoint.pt"), map_location="cpu", weights_only=True)
    networks = {name: part for name, part in state["agent"].items() if "optimizer" not in name}
    networks["reward_model"] = state["reward_model"]
    tensors = {}
    for name, network in networks.items():
        for key, tensor in network.items():
            tensors[f"{name}.{key}"] = tensor
    return tensors


@functools.cache
def eager_weights(script):
    """Of a run that nothing makes faster: one for all tests."""
    train(script, "eager")
    return weights_of("eager")


def difference_to_eager(script, run_dir):
    """The largest of all weights; NaN if one of them is."""
    eager, others = eager_weights(script), weights_of(run_dir)
    assert eager.keys() == others.keys()
    differences = [(eager[name] - others[name]).abs().flatten() for name in eager]
    return torch.cat(differences).max().item()


# --- Compiling ---
BOTH_COMPILE = ["gather", "reward_backward", "actor_backward", "critic_backward"]
COMPILED = {
    td3bc_imputed: BOTH_COMPILE,
    iql_imputed: [*BOTH_COMPILE, "target_q", "value_backward"],
}


def compile_with(compiler, script, monkeypatch):
    """As if nothing had been compiled yet, and torch.compile were another."""
    monkeypatch.setattr(torch, "compile", compiler)
    for name in COMPILED[script]:
        function = getattr(script, name).__wrapped__
        monkeypatch.setattr(script, name, script.compiled(function))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@BOTH
def test_a_compiled_run_equals_an_eager_one(script, monkeypatch):
    compiled, compiler = [], torch.compile

    def count(function, **settings):
        compiled.append(function.__name__)
        return compiler(function, **settings)

    compile_with(count, script, monkeypatch)
    train(script, "compiled", "--compile", "on")
    assert sorted(compiled) == sorted(COMPILED[script])
    assert read_json("compiled/result.json")["compile"] is True
    assert difference_to_eager(script, "compiled") < 1e-4


@BOTH
def test_an_eager_run_compiles_nothing(script, monkeypatch):
    def fail(function, **settings):
        raise AssertionError(f"{function.__name__} was compiled")

    compile_with(fail, script, monkeypatch)
    train(script, "run")
    assert read_json("run/result.json")["compile"] is False


@pytest.mark.parametrize(
    ("broken", "error"),
    [
        ("gather", RuntimeError),  # the first to be compiled
        ("critic_backward", OSError),  # when others are
    ],
)
@BOTH
def test_a_compilation_that_fails_is_one_line_and_an_eager_run(
    script, broken, error, monkeypatch, capsys
):
    def fail(*inputs):
        raise error("the compiler\ncrashed")

    def compile_all_but_one(function, **settings):
        return fail if function.__name__ == broken else function

    compile_with(compile_all_but_one, script, monkeypatch)
    train(script, "broken", "--compile", "on")
    warning = "warning: cannot compile, going on without: the compiler crashed"
    assert capsys.readouterr().err.splitlines().count(warning) == 1
    assert difference_to_eager(script, "broken") == 0
    assert read_json("broken/result.json")["compile"] is False


def test_one_process_compiles_for_data_of_many_shapes(monkeypatch):
    traced = functools.partial(torch.compile, backend="eager")
    compile_with(traced, td3bc_imputed, monkeypatch)
    td3bc_imputed.set_speed("highest", compiles=True)
    rows = torch.tensor([[0, 1]])
    for width in range(1, 20):
        columns = torch.ones(1, 5, width)
        (drawn,) = td3bc_imputed.gather([columns], rows)
        assert drawn.shape == (1, 2, width)
    assert td3bc_imputed.compiled.on, "it went on without compiling"


def test_auto_compiles_long_runs_where_there_is_a_compiler(monkeypatch):
    choose = td3bc_imputed.choose_compile
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/g++")
    assert choose("auto", 1_000_000)
    assert not choose("auto", 1_000)
    assert choose("on", 1_000)
    assert not choose("off", 1_000_000)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert not choose("auto", 1_000_000)
    assert choose("on", 1_000_000)


# --- Precision ---
@pytest.mark.parametrize(
    ("capabilities", "device", "precision"),
    [
        (X86, CPU, "medium"),
        (X86_WITH_AMX, CPU, "highest"),
        (ARM, CPU, "highest"),
        (X86, GPU, "highest"),
    ],
)
def test_auto_takes_the_fastest_float32(capabilities, device, precision, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert td3bc_imputed.choose_precision("auto", device, None) == precision
    assert td3bc_imputed.choose_precision("high", device, None) == "high"


@BOTH
def test_what_auto_takes_on_this_machine_is_float32(script):
    train(script, "auto", "--matmul-precision", "auto")
    assert difference_to_eager(script, "auto") < 1e-4


def train_on(capabilities, run_dir, monkeypatch, *options):
    """A run on such a processor; returns the precision it was trained with."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    small = ("--rewards", "oracle", "--num-updates", "2", "--matmul-precision", "auto")
    train(td3bc_imputed, run_dir, *small, *options)
    return torch.get_float32_matmul_precision()


def test_a_resumed_run_keeps_its_precision(monkeypatch):
    for before, after in ((X86, X86), (X86_WITH_AMX, X86)):
        precision = train_on(before, before["cpu_name"], monkeypatch)
        Path(before["cpu_name"], "result.json").unlink()  # it did not finish
        assert train_on(after, before["cpu_name"], monkeypatch, "--resume") == precision


def test_a_run_that_cannot_keep_its_precision_says_so(monkeypatch):
    assert train_on(X86, "run", monkeypatch) == "medium"
    with pytest.raises(td3bc_imputed.UserError, match="began with --matmul-precision medium"):
        train_on(X86_WITH_AMX, "run", monkeypatch, "--resume")
    with pytest.raises(td3bc_imputed.UserError, match="began with --matmul-precision medium"):
        train_on(ARM, "run", monkeypatch, "--resume")


@BOTH
def test_a_run_says_and_records_what_was_chosen(script, monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: X86)
    train(script, "run", "--matmul-precision", "auto", "--compile", "auto")
    for name in ("config.json", "result.json"):
        record = read_json(f"run/{name}")
        assert record["device"] == "cpu", name
        assert record["matmul_precision"] == "medium", name
        assert record["compile"] is False, name
    assert "matmul precision medium, not compiled" in capsys.readouterr().out


# --- CUDA graphs ---
@BOTH
def test_a_recorded_run_equals_an_eager_one_where_cuda_graphs_are_simulated(script, monkeypatch):
    graphs, asked = [], []
    repeat = script.repeat

    def record_all(step, generators, recorded):  # also the fit, whose tensors are on the CPU
        asked.append(recorded)
        return repeat(step, generators, recorded=True)

    def count(graph):
        graphs.append(graph)
        return simulated_cuda.record(graph)

    eager_weights(script)
    simulated = simulated_cuda.Torch()
    monkeypatch.setattr(simulated.cuda, "graph", lambda graph, stream: count(graph))
    monkeypatch.setattr(script, "torch", simulated)
    monkeypatch.setattr(script, "repeat", record_all)
    train(script, "recorded", "--device", "cuda")
    assert asked == [False, True], "an update is to be recorded on a GPU, a fit on the CPU is not"
    fit, update = graphs
    calls = 100 // script.Args().policy_freq if script is td3bc_imputed else 100
    assert (fit.replays, update.replays) == (30 - 10, calls - 10), "the first ten warm up"
    assert difference_to_eager(script, "recorded") == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", ["off", "on"])
@BOTH
def test_a_recorded_run_equals_an_eager_one_on_a_gpu(script, compiled):
    train(script, "eager", "--device", "cuda", "--no-cuda-graph")
    train(script, "recorded", "--device", "cuda", "--compile", compiled)
    eager, recorded = weights_of("eager"), weights_of("recorded")
    for name, tensor in eager.items():
        torch.testing.assert_close(recorded[name], tensor, rtol=0, atol=1e-4)
