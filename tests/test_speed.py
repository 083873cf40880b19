"""What makes a run faster changes nothing in it, and what fails at it costs one line, not the run."""

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
from reference import equal_parts, parameters_of, random_transitions

import iql_imputed
import td3bc_imputed

BOTH = pytest.mark.parametrize("script", [td3bc_imputed, iql_imputed], ids=["td3bc", "iql"])
ON_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
COMPILED = {
    td3bc_imputed: ["critic_backward", "actor_backward"],
    iql_imputed: ["target_q", "value_backward", "actor_backward", "critic_backward"],
}
CAPABILITIES = torch.cpu.get_capabilities
AS_WRITTEN = {script: [vars(script)[name] for name in names] for script, names in COMPILED.items()}


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
def unknown_processor(monkeypatch):
    """So that runs with and without a GPU multiply alike, to the bit."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)


@pytest.fixture(autouse=True)
def speed_is_given_back():
    """Compiling rebinds functions of a script and changes settings of the whole process."""
    traces_backward = torch._dynamo.config.trace_autograd_ops
    with warnings.catch_warnings():
        yield
    torch._dynamo.reset()
    torch._dynamo.config.trace_autograd_ops = traces_backward
    for script, functions in AS_WRITTEN.items():
        vars(script).update(zip(COMPILED[script], functions))


OPTIONS = """
    --dataset-path log.hdf5 --label-fraction 0.2 --reward-epochs 10 --reward-batch-size 25
    --num-updates 60 --batch-size 16 --num-seeds 2 --compile off
"""


def train(script, run_dir, *options, device="cpu"):
    """A reward model fitted in 30 steps, then 60 updates."""
    arguments = [*OPTIONS.split(), "--device", device, "--run-dir", run_dir, *options]
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


def assert_equal_to_the_bit(weights, others):
    assert equal_parts(weights, others) == weights.keys() == others.keys()


def mean_difference(weights, others):
    """Of all weights; NaN if one of them is."""
    differences = [(weights[name] - others[name]).abs().flatten() for name in weights]
    return torch.cat(differences).mean().item()


def warnings_in(capsys):
    """The lines of warnings, but for those on the labels."""
    lines = capsys.readouterr().out.splitlines()
    return [line for line in lines if line.startswith("warning") and "label" not in line]


# --- Device and precision ---
def choose(device):
    return td3bc_imputed.choose_device(td3bc_imputed.Args(device=device))


class BrokenGPU(simulated_cuda.Torch):
    def __init__(self, broken):
        super().__init__()
        if broken == "set_stream":
            self.cuda.set_stream = self.ones

    def ones(self, *args, **kwargs):
        raise torch.AcceleratorError("CUDA error:\nno kernel image is available")


@pytest.mark.parametrize("broken", ["ones", "set_stream"])
def test_a_gpu_that_does_not_work_is_one_line_and_a_run_on_the_cpu(broken, monkeypatch, capsys):
    monkeypatch.setattr(td3bc_imputed, "torch", BrokenGPU(broken))
    assert choose("auto").type == "cpu"
    (warning,) = warnings_in(capsys)
    assert "CUDA error: no kernel image is available" in warning
    assert choose("cpu").type == "cpu"
    assert warnings_in(capsys) == []


def test_a_gpu_that_was_asked_for_and_does_not_work_is_an_error(monkeypatch):
    monkeypatch.setattr(td3bc_imputed, "torch", BrokenGPU("ones"))
    with pytest.raises(td3bc_imputed.UserError, match="no kernel image is available"):
        choose("cuda")


@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a torch without CUDA")
def test_a_gpu_is_an_error_where_torch_has_none():
    with pytest.raises(td3bc_imputed.UserError, match="CUDA"):
        choose("cuda")


def test_auto_takes_a_gpu_that_works(monkeypatch, capsys):
    monkeypatch.setattr(td3bc_imputed, "torch", simulated_cuda.Torch())
    assert choose("auto").type == "cuda"
    assert choose("cpu").type == "cpu"
    assert warnings_in(capsys) == []


@pytest.mark.parametrize(
    ("capabilities", "device", "precision"),
    [
        ({"architecture": "x86_64", "amx_bf16": False}, "cpu", "medium"),
        ({"architecture": "x86_64", "amx_bf16": True}, "cpu", "highest"),
        ({"architecture": "x86_64", "amx_bf16": False}, "cuda", "highest"),
        ({"architecture": "x86_64"}, "cpu", "highest"),  # not known: it may have AMX
        ({"architecture": "aarch64"}, "cpu", "highest"),
        ({}, "cpu", "highest"),
    ],
)
def test_products_are_the_fastest_float32(capabilities, device, precision, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(td3bc_imputed, "torch", simulated_cuda.Torch())
    choose(device)
    assert torch.get_float32_matmul_precision() == precision


@BOTH
def test_what_this_machine_takes_is_float32(script, monkeypatch):
    highest = eager_weights(script)
    monkeypatch.setattr(torch.cpu, "get_capabilities", CAPABILITIES)
    train(script, "run")
    assert mean_difference(weights_of("run"), highest) < 1e-5


# --- Compiling ---
def new_agent(script, **options):
    """Agent, transitions and arguments."""
    data = random_transitions(script)
    args = script.Args(batch_size=16, **options)
    return script.Agent(data, script.make_generators(range(2), stream=2), args), data, args


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_run_equals_an_eager_one(monkeypatch):
    compiled, compiler = [], torch.compile

    def count(function, **settings):
        compiled.append(function.__name__)
        return compiler(function, **settings)

    monkeypatch.setattr(torch, "compile", count)
    train(td3bc_imputed, "compiled", "--compile", "on")
    assert sorted(compiled) == sorted(COMPILED[td3bc_imputed])
    assert read_json("compiled/result.json")["compiled"] is True
    difference = mean_difference(weights_of("compiled"), eager_weights(td3bc_imputed))
    assert difference < 1e-6, "a mean, since Adam makes much of a rounding error near 0"


def test_every_loss_of_iql_is_one_graph_that_computes_what_an_eager_run_does(monkeypatch):
    """Traced as for compiling, then run by the operators of an eager run."""
    script, graphs = iql_imputed, []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    train(script, "traced", "--compile", "on")
    assert len(graphs) == len(COMPILED[script]), "another trace than that of the trial"
    assert_equal_to_the_bit(weights_of("traced"), eager_weights(script))


@BOTH
def test_a_trial_of_the_compiled_losses_changes_nothing(script, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **settings: function)
    agent, data, args = new_agent(script, compile="on")
    generator = torch.Generator().manual_seed(3)
    script.update(agent, data, generator, args)
    before = [script.deepcopy(part.state_dict()) for part in vars(agent).values()]
    weights, global_state = parameters_of(agent, 0), torch.get_rng_state()
    assert script.compile_losses(agent, data, args) is True
    after = [part.state_dict() for part in vars(agent).values()]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert_equal_to_the_bit(parameters_of(agent, 0), weights)
    assert torch.equal(torch.get_rng_state(), global_state)


class CompilerError(Exception):
    """Of a kind that nobody knows."""


@pytest.mark.parametrize("error", [RuntimeError, OSError, AssertionError, CompilerError])
@BOTH
def test_a_compiler_that_fails_is_one_line_and_the_losses_as_written(
    script, error, monkeypatch, capsys
):
    def fail(*inputs):
        raise error("the compiler\ncrashed")

    def compile_all_but_one(function, **settings):
        return fail if function.__name__ == "actor_backward" else function

    monkeypatch.setattr(torch, "compile", compile_all_but_one)
    assert script.compile_losses(*new_agent(script, compile="on")) is False
    (warning,) = warnings_in(capsys)
    assert warning.endswith("the compiler crashed")
    assert [vars(script)[name] for name in COMPILED[script]] == AS_WRITTEN[script]


@BOTH
def test_a_run_whose_compiler_fails_equals_an_eager_one(script, monkeypatch, capsys):
    def compile_to_a_failure(function, **settings):
        def fail(*inputs):
            raise CompilerError("no compiler")

        return fail

    monkeypatch.setattr(torch, "compile", compile_to_a_failure)
    train(script, "broken", "--compile", "on")
    assert len(warnings_in(capsys)) == 1
    assert read_json("broken/result.json")["compiled"] is False
    assert_equal_to_the_bit(weights_of("broken"), eager_weights(script))


@pytest.mark.parametrize(
    ("choice", "num_updates", "expected"),
    [
        ("auto", 1_000_000, True),
        ("auto", 1_000, False),
        ("on", 1_000, True),
        ("off", 1_000_000, False),
    ],
)
@BOTH
def test_auto_compiles_long_runs(script, choice, num_updates, expected, monkeypatch):
    compiled = []

    def note(function, **settings):
        compiled.append(function.__name__)
        return function

    monkeypatch.setattr(torch, "compile", note)
    agent = new_agent(script, compile=choice, num_updates=num_updates)
    assert script.compile_losses(*agent) is expected
    assert sorted(compiled) == (sorted(COMPILED[script]) if expected else [])


# --- CUDA graphs ---
def steps_of(script):
    return 60 // script.Args().policy_freq if script is td3bc_imputed else 60


@BOTH
def test_a_recorded_run_equals_an_eager_one_where_cuda_graphs_are_simulated(script, monkeypatch):
    eager = eager_weights(script)
    simulated = simulated_cuda.Torch()
    monkeypatch.setattr(script, "torch", simulated)
    train(script, "recorded", device="cuda")
    (graph,) = simulated.graphs
    assert graph.replays == steps_of(script) - 10, "the first ten warm up"
    assert_equal_to_the_bit(weights_of("recorded"), eager)


@BOTH
def test_a_recording_that_fails_is_one_line_and_an_eager_run(script, monkeypatch, capsys):
    eager, update = eager_weights(script), script.update

    def update_that_waits_for_the_gpu(agent, data, generator, args):
        losses = update(agent, data, generator, args)
        losses["losses/actor_loss"].sum().item()
        return losses

    simulated = simulated_cuda.Torch()
    monkeypatch.setattr(script, "torch", simulated)
    monkeypatch.setattr(script, "update", update_that_waits_for_the_gpu)
    capsys.readouterr()
    train(script, "failed", device="cuda")
    assert len(warnings_in(capsys)) == 1
    assert [graph.replays for graph in simulated.graphs] == [0], "it was tried once"
    assert_equal_to_the_bit(weights_of("failed"), eager)


@BOTH
def test_without_cuda_graph_nothing_is_recorded(script, monkeypatch):
    eager = eager_weights(script)
    simulated = simulated_cuda.Torch()
    monkeypatch.setattr(script, "torch", simulated)
    train(script, "unrecorded", "--no-cuda-graph", device="cuda")
    assert simulated.graphs == []
    assert_equal_to_the_bit(weights_of("unrecorded"), eager)


def test_a_recording_that_fails_leaves_the_step_and_keeps_its_graph(monkeypatch, capsys):
    simulated = simulated_cuda.Torch()
    monkeypatch.setattr(td3bc_imputed, "torch", simulated)

    def step():
        raise CompilerError("capture failed")

    generator = torch.Generator()
    assert td3bc_imputed.record(step, generator) is step
    assert len(warnings_in(capsys)) == 1
    assert step.failed_graph is simulated.graphs[0]


# --- On a GPU ---
@pytest.fixture
def counts(monkeypatch):
    """How many graphs were recorded, and how often they were replayed."""
    counts = {"capture_end": 0, "replay": 0}

    def count(name):
        call = getattr(torch.cuda.CUDAGraph, name)

        def counted(graph):
            counts[name] += 1
            return call(graph)

        monkeypatch.setattr(torch.cuda.CUDAGraph, name, counted)

    for name in counts:
        count(name)
    return counts


@ON_A_GPU
@pytest.mark.parametrize("compiled", ["off", "on"])
@BOTH
def test_a_recorded_run_on_a_gpu_equals_an_eager_one(script, compiled, counts, capsys):
    train(script, "eager", "--no-cuda-graph", device="cuda")
    assert counts == {"capture_end": 0, "replay": 0}
    train(script, "recorded", "--compile", compiled, device="cuda")
    assert counts == {"capture_end": 1, "replay": steps_of(script) - 10}
    assert read_json("recorded/result.json")["compiled"] is (compiled == "on")
    assert warnings_in(capsys) == []
    assert mean_difference(weights_of("recorded"), weights_of("eager")) < 1e-4


@ON_A_GPU
@BOTH
def test_a_recorded_run_on_a_gpu_goes_on_after_it_was_stopped(script, counts, monkeypatch):
    train(script, "whole", "--eval-freq", "30", device="cuda")
    write_policies = script.write_policies

    def stop_at_the_end(*inputs):
        if inputs[-1] == 60:  # updates
            raise KeyboardInterrupt
        write_policies(*inputs)

    monkeypatch.setattr(script, "write_policies", stop_at_the_end)
    with pytest.raises(KeyboardInterrupt):
        train(script, "stopped", "--eval-freq", "30", device="cuda")
    monkeypatch.setattr(script, "write_policies", write_policies)
    train(script, "stopped", "--eval-freq", "30", "--resume", device="cuda")
    assert counts["capture_end"] == 3
    assert mean_difference(weights_of("stopped"), weights_of("whole")) < 1e-4


@ON_A_GPU
def test_a_replay_draws_what_an_eager_step_draws():
    device = choose("cuda")
    replayed, eager = [torch.Generator(device).manual_seed(1) for _ in range(2)]

    def draw(generator):
        rows = torch.randint(9, (99,), generator=generator, device=device)
        return rows, torch.randn(99, generator=generator, device=device)

    assert_draws_equal(draw(replayed), draw(eager))
    step = td3bc_imputed.record(lambda: draw(replayed), replayed)
    for turn in range(30):
        assert_draws_equal(step(), draw(eager))
        assert torch.equal(replayed.get_state(), eager.get_state())
        if turn == 20:  # as when a run is resumed
            replayed.set_state(eager.manual_seed(7).get_state())


def assert_draws_equal(draws, others):
    assert all(torch.equal(draw, other) for draw, other in zip(draws, others))


@ON_A_GPU
def test_steps_on_a_gpu_go_on_after_a_recording_that_failed(capsys):
    device = choose("cuda")
    generator = torch.Generator(device).manual_seed(1)
    weight = torch.nn.Parameter(torch.ones(9, device=device))
    optimizer = torch.optim.Adam([weight], lr=1e-3, fused=True, capturable=True)

    def step():
        optimizer.zero_grad()
        loss = (weight * torch.randn(9, generator=generator, device=device)).sum()
        loss.backward()
        optimizer.step()
        loss.item()  # waits for the GPU, which a recording cannot

    step()
    assert td3bc_imputed.record(step, generator) is step
    assert len(warnings_in(capsys)) == 1
    before = weight.detach().clone()
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    assert weight.isfinite().all()
    assert not torch.equal(weight, before)
