"""Whole runs, as a user starts them: what they leave, what resumes, what is refused, what survives."""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import own_envs  # noqa: F401, registers Wide-v0
import pytest
import torch

import iql_imputed
import reward_model
import td3bc_imputed

ROOT = Path(__file__).parent.parent
AGENTS = ["td3bc_imputed.py", "iql_imputed.py"]
SMALL = [
    "--env-id",
    "own_envs:Wide-v0",
    "--dataset-path",
    "own.hdf5",
    "--label-fraction",
    "0.2",
    "--reward-epochs",
    "3",
]
SMALL += ["--batch-size", "16", "--eval-episodes", "3", "--device", "cpu"]


@pytest.fixture(autouse=True)
def own_dataset(tmp_path):
    """own.hdf5: 300 transitions of Wide-v0, whose reward is the sum of the action."""
    rng = np.random.default_rng(0)
    actions = rng.uniform(0, 10, (300, 2))
    with h5py.File(tmp_path / "own.hdf5", "w") as file:
        file["observations"] = np.arange(300)[:, None] % 3
        file["actions"], file["rewards"] = actions, actions.sum(1)
        file["terminals"], file["timeouts"] = np.arange(300) % 3 == 2, np.zeros(300, bool)


def command(script, *arguments):
    return [sys.executable, str(ROOT / script), *map(str, arguments)]


def environment():
    return os.environ | {"PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}


def run(script, *arguments, code=0, **kwargs):
    """Standard output of a run that must end with `code`; an error must be one line and no traceback."""
    done = subprocess.run(
        command(script, *arguments), env=environment(), capture_output=True, text=True, check=False, **kwargs
    )
    assert done.returncode == code, done.stdout + done.stderr
    if code == 2:
        assert re.fullmatch(r"error: .+\n", done.stderr), done.stderr
    return done.stdout + done.stderr


def run_here(script, *arguments):
    """A run in this process, seconds quicker, where it is not the process that is tested."""
    script.main(script.tyro.cli(script.Args, args=[str(argument) for argument in arguments]))


def outcome(run_dir):
    """Everything a run computed: the last checkpoint's tensors, the scores, the result without its timing."""
    state = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    state["config"] = {
        name: value for name, value in state["config"].items() if name not in ("run_dir", "resume", "eval_workers")
    }
    result = json.loads((run_dir / "result.json").read_text())
    del result["timing"]
    return state, (run_dir / "scores.csv").read_text(), result


def assert_identical(a, b, name=""):
    assert type(a) is type(b), name
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), name
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), name
        for key in a:
            assert_identical(a[key], b[key], f"{name}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), name
        for i, pair in enumerate(zip(a, b)):
            assert_identical(*pair, f"{name}[{i}]")
    else:
        assert a == b or np.isnan([a, b]).all(), name  # NaN: a score without reference returns


@pytest.mark.parametrize("script", AGENTS)
def test_a_run_leaves_scores_configuration_result_and_policies(script, tmp_path):
    output = run(script, *SMALL, "--num-updates", 40, "--eval-freq", 20, "--num-seeds", 2, "--save-policy", "--seed", 3)
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(rf"own_envs:Wide-v0__{script[:-3]}__imputed__3__\d+", run_dir.name)
    lines = (run_dir / "scores.csv").read_text().splitlines()
    assert lines[0] == "update,seed,return,score"
    assert [line.split(",")[:2] for line in lines[1:]] == [["20", "3"], ["20", "4"], ["40", "3"], ["40", "4"]]
    result = json.loads((run_dir / "result.json").read_text())
    returns = [float(line.split(",")[2]) for line in lines[1:]]
    assert result["metric"] == "return" and result["per_seed"] == returns[2:]
    assert result["mean"] == pytest.approx(np.mean(returns[2:])) and result["std"] == pytest.approx(np.std(returns[2:]))
    assert result["last_10_mean"] == pytest.approx(np.mean(returns)) and result["num_updates"] == 40
    assert set(result["reward_model"]) == {"r2", "mse", "mae", "return_correlation"}
    assert json.loads((run_dir / "config.json").read_text())["dataset_path"] == "own.hdf5"
    assert "return" in output.splitlines()[-1] and str(run_dir.name) in output.splitlines()[-1]
    assert sorted(path.name for path in run_dir.glob("*.npz")) == ["policy_seed3.npz", "policy_seed4.npz"]
    assert not list(run_dir.glob("*.tmp")) and "Warning" not in output


@pytest.mark.parametrize("script", [td3bc_imputed, iql_imputed])
def test_a_saved_policy_is_the_actor_and_needs_numpy_alone(script, tmp_path):
    run_here(script, *SMALL, "--num-updates", 20, "--save-policy", "--run-dir", "run")
    state = torch.load("run/checkpoint.pt", weights_only=True)["agent"]["actor"]
    policy = script.Policy(np.load("run/policy_seed0.npz", allow_pickle=False))
    for observation in np.random.default_rng(0).normal(size=(5, 1)):
        x = (torch.tensor(observation, dtype=torch.float32) - state["mean"][0, 0]) / state["std"][0, 0]
        for layer in (0, 2, 4):
            x = x @ state[f"mlp.{layer}.weight"][0] + state[f"mlp.{layer}.bias"][0, 0]
            x = x.relu() if layer < 4 else x.tanh()
        np.testing.assert_allclose(policy(observation), 5 * (x.numpy() + 1), rtol=1e-4)


@pytest.mark.parametrize("script", AGENTS)
def test_workers_evaluate_to_the_same_numbers(script, tmp_path):
    arguments = [*SMALL, "--num-updates", 60, "--eval-freq", 20, "--num-seeds", 2]
    run(script, *arguments, "--run-dir", "here")
    run(script, *arguments, "--run-dir", "workers", "--eval-workers", 2)
    assert Path("here/scores.csv").read_text() == Path("workers/scores.csv").read_text()


def test_a_killed_worker_costs_one_warning(tmp_path):
    arguments = [*SMALL, "--num-updates", 1400, "--eval-freq", 200, "--run-dir", "run"]
    process = subprocess.Popen(
        command("td3bc_imputed.py", *arguments, "--eval-workers", 1),
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(Path("run/scores.csv"), process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [pid for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(int(workers[0]), signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and errors.count("warning: an evaluation worker died") == 1
    run("td3bc_imputed.py", *arguments[:-1], "undisturbed")
    assert Path("run/scores.csv").read_text() == Path("undisturbed/scores.csv").read_text()


def wait_for(path, process, seconds=60):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)


@pytest.mark.parametrize(("script", "workers"), [("td3bc_imputed.py", 0), ("iql_imputed.py", 1)])
def test_resume_after_kill_is_bit_identical(script, workers, tmp_path):
    """SIGKILL at random moments of training, checkpoint writing and evaluation, until the run gets through."""
    arguments = [*SMALL, "--num-updates", 400, "--eval-freq", 50, "--num-seeds", 2]
    run(script, *arguments, "--run-dir", "undisturbed")
    rng, kills = random.Random(workers), 0
    resume = [*arguments, "--run-dir", "killed", "--resume", "--eval-workers", workers]
    while kills < 3:
        process = subprocess.Popen(command(script, *resume), env=environment(), stdout=subprocess.DEVNULL)
        before = progress_of("killed")
        while process.poll() is None and progress_of("killed") == before:  # at least one checkpoint further
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.15))
        process.kill()
        process.wait()
        kills += not Path("killed/result.json").exists()
        if Path("killed/result.json").exists():
            break
    assert kills >= 2, "the run was over before it could be killed"
    run(script, *resume)
    assert_identical(outcome(tmp_path / "undisturbed"), outcome(tmp_path / "killed"))


@pytest.mark.parametrize("total", [1, 2, 40])
def test_iql_actor_learning_rate_follows_a_cosine_to_zero(total, monkeypatch):
    """Seen by each update; the other networks' stays."""
    rates, update = [], iql_imputed.update

    def watched(agent, *rest):
        optimizers = (agent.actor_optimizer, agent.value_optimizer, agent.critic_optimizer)
        rates.append([float(optimizer.param_groups[0]["lr"]) for optimizer in optimizers])
        return update(agent, *rest)

    monkeypatch.setattr(iql_imputed, "update", watched)
    run_here(iql_imputed, *SMALL, "--num-updates", total, "--run-dir", "run", "--rewards", "oracle")
    cosine = 0.5 * (1 + np.cos(np.pi * np.arange(total) / total))
    np.testing.assert_allclose(rates, np.stack([3e-4 * cosine, *np.full((2, total), 3e-4)], axis=1), rtol=1e-5)


def test_iql_resumes_from_its_last_checkpoint_without_changing_it(tmp_path):
    """A run killed in its last evaluation, after the checkpoint before it."""
    arguments = [*SMALL, "--num-updates", 20, "--eval-freq", 10, "--run-dir", "run", "--resume"]
    run_here(iql_imputed, *arguments)
    before = outcome(tmp_path / "run")
    state = torch.load("run/checkpoint.pt", weights_only=True)
    assert len(state["scores"]) == 1, "those of the last evaluation come after it"
    Path("run/result.json").unlink()
    run_here(iql_imputed, *arguments)
    assert_identical(before, outcome(tmp_path / "run"))


@pytest.mark.parametrize("script", [td3bc_imputed, iql_imputed])
def test_a_labeled_agent_sees_each_seeds_labelled_transitions_alone(script, monkeypatch):
    seen, make_agent = [], script.make_agent
    monkeypatch.setattr(script, "make_agent", lambda data, *rest: seen.append(data) or make_agent(data, *rest))
    run_here(script, *SMALL, "--num-updates", 2, "--num-seeds", 2, "--rewards", "labeled", "--run-dir", "run")
    dataset = script.load_dataset("own_envs:Wide-v0", Path("own.hdf5"))
    labels = script.split_labels(dataset.rewards, 0.2, range(2))
    for name in ("observations", "actions", "next_observations", "terminals"):
        np.testing.assert_allclose(getattr(seen[0], name), getattr(dataset, name)[labels], atol=2e-5)  # IQL clips
    scale = seen[0].rewards.numpy() / dataset.rewards[labels]
    np.testing.assert_allclose(scale, scale[:, :1].repeat(scale.shape[1], axis=1), rtol=1e-5)


def progress_of(run_dir):
    path = Path(run_dir, "checkpoint.pt")
    return path.stat().st_mtime_ns if path.exists() else 0


@pytest.mark.parametrize(
    ("script", "number", "code"), [("td3bc_imputed.py", signal.SIGINT, 130), ("iql_imputed.py", signal.SIGTERM, 143)]
)
def test_a_signal_writes_a_checkpoint_and_says_how_to_go_on(script, number, code, tmp_path):
    arguments = [*SMALL, "--num-updates", 900, "--eval-freq", 300]
    run(script, *arguments, "--run-dir", "undisturbed")
    process = subprocess.Popen(
        command(script, *arguments, "--run-dir", "stopped"), env=environment(), stdout=subprocess.PIPE, text=True
    )
    wait_for(Path("stopped/scores.csv"), process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code
    last = output.splitlines()[-1]
    assert re.match(r"stopped at [\d,]+; go on with: ", last)
    subprocess.run(last.split("go on with: ")[1], shell=True, env=environment(), check=True)
    assert_identical(outcome(tmp_path / "undisturbed"), outcome(tmp_path / "stopped"))


def test_a_run_directory_is_never_overwritten(tmp_path):
    arguments = [*SMALL, "--num-updates", 20, "--run-dir", "run", "--device", "auto"]
    run("td3bc_imputed.py", *arguments)
    assert json.loads(Path("run/config.json").read_text())["device"] in ("cpu", "cuda"), "it cannot go on elsewhere"
    before = {path: path.read_bytes() for path in Path("run").iterdir()}
    assert "already holds a run" in run("td3bc_imputed.py", *arguments, code=2)
    assert "finished" in run("td3bc_imputed.py", *arguments, "--resume")
    assert before == {path: path.read_bytes() for path in Path("run").iterdir()}


def test_other_arguments_are_named_and_free_ones_are_free(tmp_path):
    arguments = [*SMALL, "--num-updates", 20, "--run-dir", "run"]
    run_here(td3bc_imputed, *arguments)
    Path("run/result.json").unlink()
    changes = ["--alpha", 1, "--num-updates", 40, "--matmul-precision", "medium"]
    output = run("td3bc_imputed.py", *arguments, "--resume", *changes, code=2)
    for change in ("alpha was 2.5, now 1.0", "num_updates was 20, now 40", "matmul_precision was highest, now medium"):
        assert change in output
    assert "resume" not in output
    free = ["--save-policy", "--log-freq", 2, "--compile", "--no-cuda-graph"]
    assert "result" in run("td3bc_imputed.py", *arguments, "--resume", *free)
    assert Path("run/policy_seed0.npz").exists()


def test_another_dataset_is_refused_on_resume(tmp_path):
    arguments = [*SMALL, "--num-updates", 20, "--run-dir", "run"]
    run_here(td3bc_imputed, *arguments)
    Path("run/result.json").unlink()
    with h5py.File("own.hdf5", "r+") as file:
        file["rewards"][7] += 1
    assert "another dataset" in run("td3bc_imputed.py", *arguments, "--resume", code=2)


def test_a_damaged_checkpoint_is_refused(tmp_path):
    arguments = [*SMALL, "--num-updates", 20]
    run_here(td3bc_imputed, *arguments, "--run-dir", "run")
    content = Path("run/checkpoint.pt").read_bytes()
    config = json.loads(Path("run/config.json").read_text())
    for tenth in range(10):
        Path("run/checkpoint.pt").write_bytes(content[: len(content) * tenth // 10])
        with pytest.raises(td3bc_imputed.UserError, match="not a readable checkpoint"):
            td3bc_imputed.load_checkpoint(Path("run"), True, config)
    torch.save({"config": os.system}, "run/checkpoint.pt")  # a pickle that names code
    Path("run/result.json").unlink()
    assert "not a readable checkpoint" in run("td3bc_imputed.py", *arguments, "--run-dir", "run", "--resume", code=2)


def test_disk_full_keeps_the_last_checkpoint(tmp_path):
    arguments = [*SMALL, "--num-updates", 60, "--eval-freq", 20, "--run-dir", "run", "--resume"]
    limit = 200_000  # bytes a file; a checkpoint is larger

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    assert "File too large" in run("td3bc_imputed.py", *arguments, code=2, preexec_fn=full)
    assert not list(Path("run").glob("*.tmp")) and not Path("run/checkpoint.pt").exists()
    assert "result" in run("td3bc_imputed.py", *arguments)


def test_disk_full_leaves_no_part_of_an_imputed_dataset(tmp_path):
    limit = 8_000_000  # bytes a file; the bundled dataset is larger, the report is not

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    arguments = ["--reward-epochs", 1, "--run-dir", "run", "--output-path", "imputed.hdf5"]
    done = subprocess.run(
        command("reward_model.py", *arguments),
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=full,
    )
    assert done.returncode == 2 and "File too large" in done.stderr.splitlines()[-1]
    assert not list(tmp_path.glob("imputed.hdf5*")) and Path("run/reward_model.npz").exists()


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(step, tmp_path, monkeypatch):
    td3bc_imputed.write_file(tmp_path / "file", b"old")

    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(td3bc_imputed.os, step, fail)
    with pytest.raises(OSError, match="disk full"):
        td3bc_imputed.write_file(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old" and not list(tmp_path.glob("file.*"))


BAD_ARGUMENTS = {
    "unknown env": (["--env-id", "hoper-medium-v2"], "hopper-medium-v2"),
    "no such file": (["--env-id", "hopper-own", "--dataset-path", "none.hdf5"], "none.hdf5"),
    "a folder": (["--env-id", "hopper-own", "--dataset-path", "."], "directory"),
    "label fraction 0": (["--label-fraction", "0"], "label more"),
    "label fraction 2": (["--label-fraction", "2"], "--label-fraction"),
    "label fraction NaN": (["--label-fraction", "nan"], "--label-fraction"),
    "one label": (["--label-fraction", "1e-9"], "all equal"),
    "no seeds": (["--num-seeds", "0"], "--num-seeds"),
    "negative rate": (["--learning-rate", "-1"], "--learning-rate"),
    "infinite rate": (["--reward-learning-rate", "inf"], "--reward-learning-rate"),
    "gamma": (["--gamma", "1.5"], "--gamma"),
    "resume nothing": (["--resume"], "--run-dir"),
    "no GPU": (["--device", "cuda"], "GPU"),
    "run dir in a file": (["--run-dir", "own.hdf5/run"], "own.hdf5"),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, --device cuda is no mistake")
@pytest.mark.parametrize("script", [td3bc_imputed, iql_imputed])
@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_mistakes_are_named_before_anything_is_written(script, arguments, message, tmp_path):
    with pytest.raises((script.UserError, OSError), match=message):
        script.main(td3bc_imputed.tyro.cli(script.Args, args=arguments))
    assert sorted(path.name for path in tmp_path.iterdir()) in (["own.hdf5"], ["minari", "own.hdf5"])


@pytest.mark.parametrize("script", [td3bc_imputed, iql_imputed, reward_model])
def test_fuzzed_command_lines_end_in_one_error(script, tmp_path, capsys):
    """Whatever stands on the command line, it ends in one line or tyro's exit code 2; the missing file sees to that."""
    rng, flags = random.Random(0), [f"--{name.replace('_', '-')}" for name in vars(script.Args())]
    values = [
        "-1",
        "0",
        "1e400",
        "nan",
        "",
        "--",
        "own.hdf5",
        "x/y",
        "/",
        "\0",
        "é",
        "None",
        "1_000",
        "inf",
        "imputed",
        "cpu",
    ]
    ends = {"user": 0, "tyro": 0}
    for _ in range(75):
        arguments = [word for _ in range(rng.randrange(4)) for word in (rng.choice(flags), rng.choice(values))]
        try:
            script.main(td3bc_imputed.tyro.cli(script.Args, args=[*arguments, "--dataset-path", "none.hdf5"]))
            raise AssertionError(arguments)
        except (script.UserError, OSError, ImportError, script.gym.error.Error):
            ends["user"] += 1
        except SystemExit as end:
            assert end.code == 2, arguments
            ends["tyro"] += 1
    capsys.readouterr()
    print(ends)
    assert min(ends.values()) > 15 and sorted(path.name for path in tmp_path.iterdir()) in (
        ["own.hdf5"],
        ["minari", "own.hdf5"],
    )


@pytest.mark.parametrize("script", AGENTS)
def test_a_mistake_is_one_line_and_exit_code_2(script, tmp_path):
    assert "hopper-medium-v2" in run(script, "--env-id", "hoper-medium-v2", code=2)


def test_td3bc_counts_are_multiples_of_policy_freq():
    for argument in ("num_updates", "eval_freq", "log_freq"):
        with pytest.raises(td3bc_imputed.UserError, match="multiples of --policy-freq 2"):
            td3bc_imputed.main(td3bc_imputed.Args(**{argument: 101}))


@pytest.mark.parametrize("script", [td3bc_imputed, iql_imputed])
def test_partly_labelled_data_train_and_oracle_is_refused(script, tmp_path, capsys):
    with h5py.File("own.hdf5", "r+") as file:
        hidden = np.random.default_rng(0).random(300) < 0.7
        file["rewards"][...] = np.where(hidden, np.nan, file["rewards"])
    arguments = [argument for argument in SMALL if argument not in ("--label-fraction", "0.2")]
    run_here(script, *arguments, "--num-updates", 20)
    output = capsys.readouterr().out
    assert f"{299 - hidden[:299].sum()} labelled" in output and "unknown" in output
    run_here(script, *arguments, "--num-updates", 20, "--rewards", "labeled")
    assert "are NaN" in run(f"{script.__name__}.py", *arguments, "--rewards", "oracle", code=2)


@pytest.mark.parametrize("script", AGENTS)
def test_a_minari_dataset_trains_and_evaluates(script, tmp_path):
    from test_dataset import make_minari

    make_minari("Wide-v0", ref_min_score=0.0, ref_max_score=60.0)
    output = run(script, "--env-id", "tests/wide-v0", "--label-fraction", 0.5, "--num-updates", 20, "--batch-size", 8)
    assert re.search(r"result +score", output)


@pytest.mark.parametrize("script", AGENTS)
def test_weights_and_biases_offline(script, tmp_path):
    run(script, *SMALL, "--num-updates", 40, "--log-freq", 20, "--eval-freq", 20, "--track", "--run-dir", "run")
    assert list(Path("run/wandb").glob("offline-run-*/*.wandb"))
    assert torch.load("run/checkpoint.pt", weights_only=True)["track_id"]


@pytest.mark.parametrize("script", [td3bc_imputed, iql_imputed])
def test_tracked_losses_are_means_over_the_seeds(script, monkeypatch):
    logged, update = [], script.update
    wandb_run = SimpleNamespace(id="1", log=logged.append, define_metric=lambda *args, **kwargs: None)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **kwargs: wandb_run, Error=Exception))
    losses = {"losses/critic_loss": torch.tensor([1.0, 3.0])}
    monkeypatch.setattr(script, "update", lambda *args: update(*args) | losses)
    arguments = [*SMALL, "--num-updates", "20", "--log-freq", "10", "--num-seeds", "2", "--track"]
    script.main(script.tyro.cli(script.Args, args=arguments))
    assert [row["losses/critic_loss"] for row in logged if "losses/critic_loss" in row] == [2.0, 2.0]


def test_tracking_without_an_account_is_one_error(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    arguments = [*SMALL, "--num-updates", 20, "--run-dir", "run", "--track"]
    done = subprocess.run(
        command("td3bc_imputed.py", *arguments), env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.fullmatch(r"error: Weights & Biases: .*WANDB_MODE=offline.*", done.stderr.splitlines()[-1])
    run("td3bc_imputed.py", *arguments[:-1])  # the same directory is still free


def test_nothing_is_lost_when_the_bundled_dataset_is_missing(tmp_path):
    copy = shutil.copy(ROOT / "td3bc_imputed.py", tmp_path)
    assert "halfcheetah-medium-replay-mini.hdf5" in run(copy, code=2)
