"""Whole runs, as a user starts them: what they leave, what stops them, what goes on, what survives.

Most runs are made in the test's own process. Where a process is what is tested, one is started.
"""

import copy
import csv
import inspect
import io
import json
import multiprocessing
import os
import random
import re
import resource
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import BrokenExecutor, Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import h5py
import minari
import numpy as np
import own_envs
import pytest
import torch
from minari.data_collector import EpisodeBuffer

import iql_imputed
import reward_model
import td3bc_imputed

ROOT = Path(__file__).parent.parent
BOTH = pytest.mark.parametrize("script", [td3bc_imputed, iql_imputed], ids=["td3bc", "iql"])
SMALL = "--label-fraction 0.2 --reward-epochs 3 --batch-size 16 --eval-episodes 3"
SMALL += " --num-updates 2 --device cpu --compile off"
OWN = "--env-id own_envs:Wide-v0 --dataset-path own.hdf5"


# --- Environments whose evaluation is never over ---
class EndlessEnv(own_envs.WideEnv):
    """In its 50th step the user presses Ctrl-C, once."""

    def step(self, action):
        self.t += 1
        if self.t == 50 and not Path("pressed").exists():
            Path("pressed").touch()
            os.kill(os.getpid(), signal.SIGINT)
        return np.zeros(1), 0.0, False, False, {}


class HangingEnv(own_envs.WideEnv):
    """Hangs in its fifth episode: one is tried before training, three are the first evaluation."""

    num_episodes = 0

    def reset(self, seed=None, options=None):
        HangingEnv.num_episodes += 1
        if HangingEnv.num_episodes == 5:
            Path("hanging").touch()
            time.sleep(600)
        return super().reset(seed=seed, options=options)


class DeadlyEnv(own_envs.WideEnv):
    """Kills a worker process that evaluates in it."""

    def step(self, action):
        if multiprocessing.parent_process():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)


class NanEnv(own_envs.WideEnv):
    """Its rewards are no numbers."""

    def step(self, action):
        observation, _, terminated, truncated, info = super().step(action)
        return observation, float("nan"), terminated, truncated, info


class SeedEnv(own_envs.WideEnv):
    """Its return tells the seed of the episode: 2^(seed - 100); it ends as truncated."""

    def reset(self, seed=None, options=None):
        self.seed = seed
        return super().reset()

    def step(self, action):
        observation, _, terminated, _, info = super().step(action)
        return observation, 2 ** (self.seed - 100) / 3, False, terminated, info


for env_class in (EndlessEnv, HangingEnv, DeadlyEnv, NanEnv, SeedEnv):
    name = env_class.__name__.removesuffix("Env")
    gym.register(f"{name}-v0", f"{__name__}:{env_class.__name__}")


# --- Runs ---
@pytest.fixture(autouse=True)
def own_rewards():
    """own.hdf5: 300 transitions of Wide-v0; returns their rewards, each the sum of the action."""
    actions = np.random.default_rng(0).uniform(0, 10, (300, 2))
    rewards = np.float32(actions.sum(axis=1))
    write_own(actions=actions, rewards=rewards)
    return rewards


def write_own(path="own.hdf5", **columns):
    steps = np.arange(300) % 3
    with h5py.File(path, "a") as file:
        columns |= {"observations": steps[:, None], "terminals": steps == 2}
        for name, column in columns.items():
            if name in file:
                del file[name]
            file[name] = column


def train(script, options):
    script.main(script.tyro.cli(script.Args, args=shlex.split(f"{SMALL} {options}")))


def train_own(script, options):
    train(script, f"{OWN} {options}")


def run_as_main(script, options, monkeypatch, capsys):
    """Exit code and output of `python script.py options`, but for starting a process."""
    arguments = shlex.split(f"{SMALL} {options}")
    monkeypatch.setattr(sys, "argv", [script.__file__, *arguments])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        runpy.run_path(script.__file__, run_name="__main__")
    output = capsys.readouterr()
    return end.value.code, output.out, output.err


def environment(**variables):
    """Of a process that finds the environments above, and has as many threads as this one."""
    variables["PYTHONPATH"] = str(ROOT / "tests")
    variables["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    return os.environ | variables


def start(script, options, **settings):
    command = [sys.executable, script.__file__, *shlex.split(f"{SMALL} {options}")]
    defaults = {"env": environment(), "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **(defaults | settings))


def wait_for(path, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not Path(path).exists():
        assert process.poll() is None, f"ended without {path}"
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)


def read_json(path):
    """Of a file that any JSON parser reads: Python writes NaN, which others refuse."""

    def refuse(name):
        raise AssertionError(f"{path} holds {name}, which is no JSON")

    return json.loads(Path(path).read_text(), parse_constant=refuse)


def read_scores(run_dir):
    with open(Path(run_dir, "scores.csv")) as file:
        return list(csv.DictReader(file))


def read_state(run_dir):
    return torch.load(Path(run_dir, "checkpoint.pt"), weights_only=True)


def outcome(run_dir):
    """Everything a run computed, and what it was told but for names of files."""
    state = read_state(run_dir)
    for name in ("run_dir", "resume", "eval_workers"):
        del state["config"][name]
    result = read_json(f"{run_dir}/result.json")
    del result["timing"]
    policies = {path.name: path.read_bytes() for path in Path(run_dir).glob("*.npz")}
    return {"state": state, "result": result, "scores": read_scores(run_dir)} | policies


def assert_identical(a, b, name=""):
    assert type(a) is type(b), name
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), name
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), name
        for key in a:
            assert_identical(a[key], b[key], f"{name}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), name
        for i, pair in enumerate(zip(a, b)):
            assert_identical(*pair, f"{name}[{i}]")
    else:  # NaN: a score without reference returns
        assert a == b or np.isnan([a, b]).all(), name


def forget_result(run_dir):
    """As if the run had been killed before it wrote its result."""
    Path(run_dir, "result.json").unlink()


# --- What a run leaves ---
@BOTH
def test_a_run_leaves_scores_configuration_result_and_policies(script, tmp_path, capsys):
    train_own(script, "--num-updates 10 --eval-freq 4 --num-seeds 2 --seed 3")
    (run_dir,) = Path("runs").iterdir()
    assert re.fullmatch(rf"own_envs-Wide-v0__{script.__name__}__imputed__3__\d+", run_dir.name)
    files = {"checkpoint.pt", "config.json", "result.json", "scores.csv"}
    files |= {"policy_seed3.npz", "policy_seed4.npz"}
    assert {path.name for path in run_dir.iterdir()} == files

    scores = read_scores(run_dir)
    assert list(scores[0]) == ["update", "seed", "return", "score"]
    evaluated = [(row["update"], row["seed"]) for row in scores]
    assert evaluated == [(update, seed) for update in ("4", "8", "10") for seed in ("3", "4")]
    returns = np.array([float(row["return"]) for row in scores]).reshape(3, 2)
    result = read_json(run_dir / "result.json")
    assert result["metric"] == "return"
    assert result["per_seed"] == returns[-1].tolist()
    assert result["mean"] == pytest.approx(returns[-1].mean())
    assert result["std"] == pytest.approx(returns[-1].std())
    assert result["last_10_mean"] == pytest.approx(returns.mean())
    assert result["num_updates"] == 10
    assert set(result["reward_model"]) == {"r2", "mse", "mae", "return_correlation"}
    assert read_json(run_dir / "config.json")["dataset_path"] == "own.hdf5"

    output = capsys.readouterr().out
    last = f"result        return {returns[-1].mean():.1f} ± {returns[-1].std():.1f}"
    assert output.splitlines()[-1] == f"{last} over 2 seed(s), in {run_dir}"
    assert "warning" not in output.lower()


def test_the_result_is_the_last_evaluation_and_the_mean_of_the_last_ten(tmp_path):
    """Of twelve evaluations of two seeds; never the best."""
    table = np.random.default_rng(0).normal(size=(12, 2))
    scores = [{"update": i, "seed": k, "score": table[i, k]} for i in range(12) for k in range(2)]
    task = td3bc_imputed.Task(None, None, None, ref_min=0.0, ref_max=1.0)
    config = vars(td3bc_imputed.Args(num_seeds=2))
    td3bc_imputed.write_result(tmp_path, scores, task, config, None, {})
    result = read_json("result.json")
    assert result["metric"] == "score"
    assert result["per_seed"] == table[-1].tolist()
    assert result["last_10_mean"] == pytest.approx(table[2:].mean())
    assert result["last_10_std"] == pytest.approx(table[2:].mean(axis=0).std())


@BOTH
def test_a_policy_is_the_actor_and_needs_numpy_alone(script):
    train_own(script, "--num-updates 4 --num-seeds 2 --run-dir run")
    actor = read_state("run")["agent"]["actor"]
    Path("copied.py").write_text(f"import numpy as np\n\n{inspect.getsource(script.Policy)}")
    copied = runpy.run_path("copied.py")["Policy"]
    observations = np.random.default_rng(0).normal(size=(5, 1))
    for seed in range(2):
        policy = copied(np.load(f"run/policy_seed{seed}.npz", allow_pickle=False))
        x = torch.tensor(observations).float()
        x = (x - actor["mean"][seed]) / actor["std"][seed]
        for layer in ("layer1", "layer2", "layer3"):
            x = x @ actor[f"{layer}.weight"][seed] + actor[f"{layer}.bias"][seed]
            x = x.tanh() if layer == "layer3" else x.relu()
        expected = 5 * (x.numpy() + 1)  # from [-1, 1] to the bounds, 0 and 10
        np.testing.assert_allclose(policy(observations), expected, rtol=1e-4)
        for observation, action in zip(observations, expected):
            np.testing.assert_allclose(policy(observation), action, rtol=1e-4)


@BOTH
def test_the_last_scores_are_those_of_the_policies(script):
    train_own(script, "--num-updates 4 --eval-freq 2 --num-seeds 2 --run-dir run")
    for row in read_scores("run")[-2:]:
        policy = script.Policy(np.load(f"run/policy_seed{row['seed']}.npz"))
        actions = policy(np.array([[0.0], [1.0], [2.0]]))  # an episode of Wide-v0
        assert float(row["return"]) == pytest.approx(actions.sum(), rel=1e-5)
        assert row["score"] == "nan", "there are no references"


@BOTH
def test_the_default_protocol_is_that_of_the_published_scores(script):
    args = script.Args()
    assert (args.num_updates, args.batch_size) == (1_000_000, 256)
    assert (args.eval_freq, args.eval_episodes) == (5_000, 10)
    assert args.rewards == "imputed" and args.scale_rewards == (script is iql_imputed)


@BOTH
def test_how_often_an_agent_is_evaluated_changes_nothing_of_its_training(script):
    for eval_freq in (2, 8):
        train_own(script, f"--num-updates 8 --eval-freq {eval_freq} --run-dir {eval_freq}")
    often, once = read_state("2"), read_state("8")
    assert_identical(often["agent"], once["agent"])
    assert_identical(often["generator"], once["generator"])


@BOTH
def test_every_seed_is_evaluated_from_the_same_start_states_each_time(script, capsys):
    options = "--env-id Seed-v0 --num-updates 4 --eval-freq 2 --num-seeds 2 --seed 7 --run-dir run"
    train(script, f"{OWN} {options}")
    returns = [float(row["return"]) for row in read_scores("run")]
    assert returns == pytest.approx([(1 + 2 + 4) / 3] * 4)  # seeds 100, 101 and 102
    assert "Seed-v0: 300 transitions, 100 episodes" in capsys.readouterr().out


@BOTH
def test_what_is_printed_are_mean_and_std_of_the_seeds(script, tmp_path, capsys):
    pending = []
    for seed, value in ((0, 1.0), (1, 5.0)):
        future = Future()
        future.set_result(value)
        pending.append((8, seed, [future]))
    task = script.Task(None, None, None, np.nan, np.nan)
    script.finish_evaluation(pending, [], task, tmp_path, None)
    assert "update         8   return 3.0 ± 2.0" in capsys.readouterr().out
    assert script.describe_quality({"r2": [0.2, 0.4]}) == "r2 0.3 on the hidden rewards"


@pytest.mark.parametrize("rewards", ["oracle", "labeled", "zero", "mean"])
@BOTH
def test_other_rewards_need_no_reward_model(script, rewards):
    train_own(script, f"--num-updates 2 --rewards {rewards} --run-dir run")
    assert read_json("run/result.json")["reward_model"] is None
    assert read_state("run")["reward_model"] is None
    assert len(read_scores("run")) == 1


@pytest.mark.parametrize("problem", ["no variance of hidden rewards", "rewards of NaN"])
@BOTH
def test_what_a_run_leaves_is_json_whatever_the_numbers_are(script, problem, own_rewards):
    if problem == "rewards of NaN":
        env_id = "Nan-v0"
    else:
        env_id = "own_envs:Wide-v0"
        labeled = script.split_labels(own_rewards, 0.2, range(1))
        rewards = np.zeros(300)
        rewards[labeled[0]] = own_rewards[labeled[0]]
        write_own(rewards=rewards)
    train(script, f"{OWN} --env-id {env_id} --num-updates 2 --run-dir run")
    result = read_json("run/result.json")
    read_json("run/config.json")
    if problem == "rewards of NaN":
        assert result["mean"] is None
    else:
        assert result["reward_model"]["r2"] == [None]


# --- Run directories ---
def test_two_runs_of_the_same_second_get_two_folders(monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1_700_000_000.5)
    for _ in range(3):
        train_own(td3bc_imputed, "--num-updates 2")
    assert len(list(Path("runs").glob("*/result.json"))) == 3

    def make(_):
        return td3bc_imputed.make_run_dir(None, "my/log__0")

    with ThreadPoolExecutor(8) as threads:  # at once
        made = list(threads.map(make, range(8)))
    assert len(set(made)) == 8
    assert {path.parent for path in made} == {Path("runs")}
    assert all(path.name.startswith("my-log__0__") for path in made)


def test_of_two_runs_with_the_same_run_dir_one_is_refused(monkeypatch):
    """Also if both have looked whether the other is there."""
    make_run_dir = td3bc_imputed.make_run_dir

    def make_too_late(run_dir, name):
        run_dir = make_run_dir(run_dir, name)
        (run_dir / "config.json").write_text("of the other run")
        return run_dir

    monkeypatch.setattr(td3bc_imputed, "make_run_dir", make_too_late)
    with pytest.raises(FileExistsError, match="run/config.json"):
        train_own(td3bc_imputed, "--num-updates 2 --run-dir run")
    assert [path.name for path in Path("run").iterdir()] == ["config.json"]
    assert Path("run/config.json").read_text() == "of the other run"


@BOTH
def test_a_run_directory_is_never_overwritten(script, capsys):
    options = "--num-updates 2 --run-dir run --device auto"
    train_own(script, options)
    before = {path: path.read_bytes() for path in Path("run").iterdir()}
    assert read_json("run/config.json")["device"] in ("cpu", "cuda"), "it cannot go on elsewhere"
    with pytest.raises(script.UserError, match="already holds a run: use --resume or another"):
        train_own(script, options)
    capsys.readouterr()
    train_own(script, f"{options} --resume")
    assert "run holds a finished run" in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in Path("run").iterdir()}


@pytest.mark.parametrize("options", ["", "--resume"])
def test_a_folder_of_the_users_may_become_a_run_directory_and_keeps_its_files(options):
    Path("mine/folder.tmp").mkdir(parents=True)
    Path("mine/thesis.tmp").write_text("not a run's")
    train_own(td3bc_imputed, f"--num-updates 2 --run-dir mine {options}")
    assert Path("mine/thesis.tmp").read_text() == "not a run's"
    assert Path("mine/folder.tmp").is_dir()
    assert Path("mine/result.json").exists()


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
@pytest.mark.parametrize("script", [td3bc_imputed, iql_imputed, reward_model])
def test_a_failed_write_leaves_the_old_file_and_no_part(script, step, tmp_path, monkeypatch):
    with script.replacing(tmp_path / "file") as file:
        file.write(b"old")

    def fail(*arguments):
        raise OSError("disk full")

    if step != "write":
        monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="disk full"), script.replacing(tmp_path / "file") as file:
        file.write(b"new")
        file.flush()
        assert (tmp_path / "file").read_bytes() == b"old", "a reader finds the old or the new"
        if step == "write":
            fail()
    assert (tmp_path / "file").read_bytes() == b"old"
    assert not list(tmp_path.glob("file?*"))


# --- Killed runs ---
@pytest.fixture
def moments(tmp_path, monkeypatch):
    """Copies of the directory `run`, as a kill would leave it just before each file is replaced."""
    copies, replace = [], os.replace

    def copy_and_replace(source, target):
        copies.append(tmp_path / f"moment{len(copies)}")
        shutil.copytree("run", copies[-1])
        replace(source, target)

    monkeypatch.setattr(os, "replace", copy_and_replace)
    return copies


@pytest.mark.parametrize(("script", "workers"), [(td3bc_imputed, 0), (iql_imputed, 1)])
def test_a_run_killed_at_any_moment_is_resumed_to_the_bit(script, workers, moments, monkeypatch):
    """A thread stands for the worker, whose results come at the same points of the run."""
    monkeypatch.setattr(script, "make_workers", lambda number: ThreadPoolExecutor(1))
    options = f"--num-updates 8 --eval-freq 4 --num-seeds 2 --eval-workers {workers}"
    train_own(script, f"{options} --run-dir run")
    expected = outcome("run")
    written = [next(run_dir.glob("*.tmp")).stem for run_dir in moments]
    evaluation = ["policy_seed0.npz", "policy_seed1.npz", "checkpoint.pt", "scores.csv"]
    assert written == ["config.json", *evaluation, *evaluation, "result.json"]
    for run_dir in list(moments):
        train_own(script, f"{options} --run-dir {run_dir} --resume")
        assert_identical(expected, outcome(run_dir))
        assert not list(run_dir.glob("*.tmp")), "left by the killed process"


def test_kill_9_leaves_no_worker_and_a_run_that_goes_on_to_the_bit():
    options = f"{OWN} --num-updates 120 --eval-freq 20 --num-seeds 2"
    train(td3bc_imputed, f"{options} --run-dir undisturbed")
    process = start(td3bc_imputed, f"{options} --run-dir killed --eval-workers 1")
    wait_for("killed/scores.csv", process)
    process.kill()
    process.communicate(timeout=60)  # returns when no process is left that could write there
    assert not Path("killed/result.json").exists(), "it was over before it was killed"
    train(td3bc_imputed, f"{options} --run-dir killed --resume")
    assert_identical(outcome("undisturbed"), outcome("killed"))


def test_a_stopped_run_goes_on_as_it_printed_and_again_if_that_is_killed():
    options = f"{OWN} --num-updates 140 --eval-freq 20 --num-seeds 2"
    train(iql_imputed, f"{options} --run-dir undisturbed")
    process = start(iql_imputed, f"{options} --run-dir=run")
    wait_for("run/scores.csv", process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert output.splitlines()[-1].endswith("; to go on, repeat the command with --resume")

    num_scores = len(read_scores("run"))
    process = start(iql_imputed, f"{options} --run-dir=run --resume")
    while len(read_scores("run")) == num_scores:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not Path("run/result.json").exists(), "it was over before it was killed"
    train(iql_imputed, f"{options} --run-dir run --resume")
    assert_identical(outcome("undisturbed"), outcome("run"))


# --- Signals ---
class LikeProcesses(ThreadPoolExecutor):
    """Busy ones: they get a copy of a job's arguments late, when its result is waited for.

    So the list that a signal fills in the meantime must not be among those arguments."""

    def submit(self, function, *arguments):
        return SimpleNamespace(result=lambda: function(*copy.deepcopy(arguments)))


def signal_at_update(script, monkeypatch, number, at):
    """Send this process a signal in the middle of an update."""
    update, calls = script.update, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == at:
            os.kill(os.getpid(), number)
        return update(*arguments)

    monkeypatch.setattr(script, "update", interrupted)


def stop(script, options, capsys):
    """Exit code of a run that a signal ends, and the options of the command that goes on."""
    with pytest.raises(SystemExit) as end:
        train(script, options)
    last = capsys.readouterr().out.splitlines()[-1]
    how = r"stopped after [\d,]+ updates; to go on, repeat the command with (.*)"
    return end.value.code, f"{options} {re.fullmatch(how, last)[1]}"


@pytest.mark.parametrize(
    ("script", "workers", "number", "code"),
    [
        (td3bc_imputed, 0, signal.SIGINT, 130),
        (td3bc_imputed, 1, signal.SIGTERM, 143),
        (iql_imputed, 0, signal.SIGTERM, 143),
        (iql_imputed, 1, signal.SIGINT, 130),
    ],
)
def test_a_signal_writes_a_checkpoint_and_says_how_to_go_on(
    script, workers, number, code, monkeypatch, capsys
):
    if workers > 0:
        monkeypatch.setattr(script, "make_workers", LikeProcesses)
    options = f"{OWN} --num-updates 20 --eval-freq 10 --num-seeds 2 --eval-workers {workers}"
    train(script, f"{options} --run-dir undisturbed")
    calls_per_evaluation = 10 if script is iql_imputed else 5
    with monkeypatch.context() as patch:
        signal_at_update(script, patch, number, at=calls_per_evaluation + 2)
        found, resume = stop(script, f"{options} --run-dir 'my run'", capsys)
    assert found == code
    assert read_state("my run")["num_updates"] == (12 if script is iql_imputed else 14)
    assert len(read_scores("my run")) == 2, "the evaluation before it"
    train(script, resume)
    assert_identical(outcome("undisturbed"), outcome("my run"))


@pytest.mark.parametrize("choice", ["--rewards labeled", "--rewards mean", "--reward-model gp"])
@BOTH
def test_a_stopped_run_resumes_to_the_bit_whatever_its_agent_sees(
    script, choice, monkeypatch, capsys
):
    options = f"{OWN} --num-updates 8 --eval-freq 4 --num-seeds 2 {choice}"
    train(script, f"{options} --run-dir undisturbed")
    with monkeypatch.context() as patch:
        signal_at_update(script, patch, signal.SIGTERM, at=3)
        _, resume = stop(script, f"{options} --run-dir run", capsys)
    train(script, resume)
    assert_identical(outcome("undisturbed"), outcome("run"))


def test_a_run_without_a_run_dir_says_which_one_to_go_on_from(monkeypatch, capsys):
    with monkeypatch.context() as patch:
        signal_at_update(iql_imputed, patch, signal.SIGTERM, at=3)
        _, resume = stop(iql_imputed, f"{OWN} --num-updates 6", capsys)
    train(iql_imputed, resume)
    assert len(list(Path("runs").glob("*/result.json"))) == 1


@BOTH
def test_a_signal_is_obeyed_between_the_steps_of_an_evaluation(script, capsys):
    options = f"{OWN} --env-id Endless-v0 --num-updates 4 --eval-freq 2 --run-dir run"
    code, _ = stop(script, options, capsys)
    assert code == 130
    assert read_state("run")["num_updates"] == 2
    assert not Path("run/scores.csv").exists(), "half an evaluation is none"


@pytest.fixture(scope="module")
def hanging(tmp_path_factory):
    """A process that hangs in its second evaluation, started through a link in the C locale.

    Its standard output is the file `output` of its folder."""
    folder = tmp_path_factory.mktemp("hanging")
    (folder / "a link.py").symlink_to(td3bc_imputed.__file__)
    write_own(folder / "own.hdf5", actions=np.ones((300, 2)), rewards=np.arange(300))
    c_locale = environment(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PATH="/nowhere")
    c_locale.pop("PYTHONUNBUFFERED", None)
    script = SimpleNamespace(__file__="a link.py")
    options = f"{OWN} --env-id test_run:Hanging-v0 --num-updates 4 --eval-freq 2"
    with open(folder / "output", "w") as output:
        process = start(script, options, cwd=folder, env=c_locale, stdout=output)
    try:
        wait_for(folder / "hanging", process)
        yield process, folder
    finally:
        process.kill()
        process.wait()


def test_output_arrives_line_by_line_in_the_c_locale_through_a_link(hanging):
    _, folder = hanging
    lines = (folder / "output").read_text("ascii").splitlines()
    expected = ["timeouts", "dataset", "rewards", "evaluation", "speed", "reward model", "update"]
    assert [line[:13].strip() for line in lines] == expected


def test_a_second_signal_ends_the_process_at_once(hanging):
    process, _ = hanging
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == -signal.SIGTERM


@pytest.mark.parametrize("script", [td3bc_imputed, iql_imputed, reward_model])
def test_ctrl_c_before_training_is_exit_code_130(script, monkeypatch):
    def press(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(h5py, "File", press)
    monkeypatch.setattr(sys, "argv", [script.__file__, "--dataset-path", "own.hdf5"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(script.__file__, run_name="__main__")
    assert end.value.code == 130


@BOTH
def test_main_gives_the_signal_handlers_back(script, monkeypatch, capsys):
    handlers = {signal.SIGINT: lambda *_: None, signal.SIGTERM: lambda *_: None}
    for number, handler in handlers.items():
        signal.signal(number, handler)
    train_own(script, "--num-updates 2")
    for number, handler in handlers.items():
        assert signal.getsignal(number) is handler, "after a run"
    signal_at_update(script, monkeypatch, signal.SIGINT, at=1)
    stop(script, f"{OWN} --num-updates 4", capsys)
    for number, handler in handlers.items():
        assert signal.getsignal(number) is handler, "after a run that was stopped"


@BOTH
def test_main_works_in_a_thread(script):
    options = "--num-updates 2 --run-dir run"
    thread = threading.Thread(target=train_own, args=[script, options])
    thread.start()
    thread.join()
    assert Path("run/result.json").exists()


# --- Resuming ---
def test_other_arguments_are_named_and_free_ones_are_free():
    options = f"{OWN} --num-updates 4 --run-dir run --matmul-precision highest"
    train(td3bc_imputed, options)
    expected = outcome("run")
    forget_result("run")
    changed = "--alpha 1 --num-updates 8 --matmul-precision high"
    with pytest.raises(td3bc_imputed.UserError) as refused:
        train(td3bc_imputed, f"{options} --resume {changed}")
    differences = str(refused.value).split("other arguments: ")[1].split(", now")
    assert len(differences) == 4, "three arguments"
    for difference in (
        "alpha was 2.5, now 1.0",
        "num_updates was 4, now 8",
        "matmul_precision was highest, now high",
    ):
        assert difference in str(refused.value)

    Path("elsewhere").mkdir()
    shutil.move("own.hdf5", "elsewhere/log.hdf5")
    shutil.move("run", "moved")
    free = "--dataset-path elsewhere/log.hdf5 --run-dir moved --log-freq 2 --no-cuda-graph"
    train(td3bc_imputed, f"{options} --resume {free}")
    found = outcome("moved")
    for name in ("dataset_path", "log_freq", "cuda_graph"):
        found["state"]["config"][name] = expected["state"]["config"][name]
    assert_identical(expected, found)


@BOTH
def test_a_resumed_run_may_change_nothing_but_where_files_lie_and_how_it_runs(script):
    free = {"resume", "run_dir", "dataset_path", "eval_workers", "track", "log_freq"}
    free |= {"compile", "cuda_graph"}
    for name in free:
        script.check_same_run(Path("run"), {name: "one"}, {name: "other"})
    for name in {*vars(script.Args()), "dataset"} - free:
        with pytest.raises(script.UserError, match=f"{name} was one, now other"):
            script.check_same_run(Path("run"), {name: "one"}, {name: "other"})


@BOTH
def test_another_dataset_is_refused_on_resume(script, own_rewards):
    options = "--num-updates 2 --run-dir run"
    train_own(script, options)
    forget_result("run")
    own_rewards[7] += 1
    write_own(rewards=own_rewards)
    with pytest.raises(script.UserError, match="dataset was .*, now "):
        train_own(script, f"{options} --resume")


@BOTH
def test_another_dataset_is_one_that_differs_in_any_column(script):
    dataset = script.load_dataset(None, Path("own.hdf5"))
    columns = (*script.Transitions._fields, "episode_ids")
    fingerprints = {script.fingerprint(dataset)}
    for name in columns:
        column = getattr(dataset, name).copy()
        column[-1] += 1
        fingerprints.add(script.fingerprint(dataset._replace(**{name: column})))
    assert len(fingerprints) == 1 + len(columns) == 7


@pytest.mark.parametrize("model", ["mlp", "gp"])
@BOTH
def test_a_resumed_run_does_not_fit_the_reward_model_again(script, model, monkeypatch):
    options = f"--num-updates 2 --run-dir run --reward-model {model}"
    train_own(script, options)
    monkeypatch.setattr(script, "fit_reward_model", None)
    quality = read_json("run/result.json")["reward_model"]
    forget_result("run")
    train_own(script, f"{options} --resume")
    assert read_json("run/result.json")["reward_model"] == quality


def test_a_damaged_checkpoint_is_refused():
    options = "--num-updates 2 --run-dir run"
    train_own(td3bc_imputed, options)
    forget_result("run")
    path = Path("run/checkpoint.pt")
    content = path.read_bytes()
    for tenth in range(10):
        path.write_bytes(content[: len(content) * tenth // 10])
        with pytest.raises(td3bc_imputed.UserError, match="not a readable checkpoint.*delete it"):
            td3bc_imputed.read_checkpoint(Path("run"), torch.device("cpu"))
    for foreign in ({"config": MakesFolder()}, {"weights": torch.zeros(3)}, [1, 2]):
        torch.save(foreign, path)
        with pytest.raises(td3bc_imputed.UserError, match="not a readable checkpoint"):
            train_own(td3bc_imputed, f"{options} --resume")
    assert not Path("made by a checkpoint").exists()


class MakesFolder:
    """Whoever unpickles it runs code."""

    def __reduce__(self):
        return os.mkdir, ("made by a checkpoint",)


@pytest.mark.parametrize("total", [1, 2, 40])
def test_each_update_of_iql_has_the_actors_rate_of_a_cosine_to_zero(total, monkeypatch):
    rates, update = [], iql_imputed.update

    def watched(agent, *rest):
        optimizers = agent.actor_optimizer, agent.value_optimizer, agent.q_optimizer
        rates.append([float(optimizer.param_groups[0]["lr"]) for optimizer in optimizers])
        return update(agent, *rest)

    monkeypatch.setattr(iql_imputed, "update", watched)
    train_own(iql_imputed, f"--num-updates {total} --rewards oracle")
    cosine = 3e-4 * (1 + np.cos(np.pi * np.arange(total) / total)) / 2
    others = np.full(total, 3e-4)
    np.testing.assert_allclose(rates, np.stack([cosine, others, others], axis=1), rtol=1e-5)


# --- A full disk ---
@pytest.fixture
def limit_files():
    """Let no file grow beyond a number of bytes, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(num_bytes):
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@BOTH
def test_a_full_disk_keeps_the_last_checkpoint(script, limit_files, monkeypatch):
    options = "--num-updates 8 --eval-freq 4 --run-dir run"
    save, saved = torch.save, []

    def save_on_a_full_disk(state, file):
        saved.append(state["num_updates"])
        if len(saved) == 2:
            limit_files(200_000)  # a checkpoint is larger
        save(state, file)

    monkeypatch.setattr(torch, "save", save_on_a_full_disk)
    with pytest.raises((OSError, RuntimeError)) as failed:
        train_own(script, options)
    assert isinstance(failed.value, OSError), "what __main__ shows as one line"
    assert "File too large" in str(failed.value)
    assert saved == [4, 8]
    limit_files(-1)
    assert not list(Path("run").glob("*.tmp"))
    assert read_state("run")["num_updates"] == 4
    train_own(script, f"{options} --resume")
    train_own(script, "--num-updates 8 --eval-freq 4 --run-dir undisturbed")
    assert_identical(outcome("undisturbed"), outcome("run"))


# --- Mistakes ---
MISTAKES = {
    "unknown env": ("--env-id hoper-medium-v2", "hopper-medium-v2"),
    "no such file": ("--dataset-path none.hdf5", "none.hdf5"),
    "a folder": ("--dataset-path .", "directory"),
    "no such simulator": (f"{OWN} --env-id NoSuch-v0", "NoSuch"),
    "no such module": (f"{OWN} --env-id no_such:Env-v0", "no_such"),
    "a discrete simulator": (f"{OWN} --env-id own_envs:Discrete-v0", "1-D Box"),
    "another simulator": (f"{OWN} --eval-env-id Pendulum-v1", "Pendulum-v1"),
    "label fraction 0": (f"{OWN} --label-fraction 0", "--label-fraction"),
    "label fraction 2": (f"{OWN} --label-fraction 2", "--label-fraction"),
    "label fraction NaN": (f"{OWN} --label-fraction nan", "--label-fraction"),
    "one label": (f"{OWN} --label-fraction 1e-9", "label more"),
    "no seeds": (f"{OWN} --num-seeds 0", "--num-seeds"),
    "negative seed": (f"{OWN} --seed -1", "--seed"),
    "no episodes": (f"{OWN} --eval-episodes 0", "--eval-episodes"),
    "negative workers": (f"{OWN} --eval-workers -1", "--eval-workers"),
    "no updates": (f"{OWN} --num-updates 0", "--num-updates"),
    "no evaluations": (f"{OWN} --eval-freq 0", "--eval-freq"),
    "no log": (f"{OWN} --log-freq 0", "--log-freq"),
    "no batch": (f"{OWN} --batch-size 0", "--batch-size"),
    "no epochs": (f"{OWN} --reward-epochs 0", "--reward-epochs"),
    "no width": (f"{OWN} --reward-hidden-dim 0", "--reward-hidden-dim"),
    "no reward batch": (f"{OWN} --reward-batch-size 0", "--reward-batch-size"),
    "negative rate": (f"{OWN} --learning-rate -1", "--learning-rate"),
    "rate NaN": (f"{OWN} --learning-rate nan", "--learning-rate"),
    "infinite rate": (f"{OWN} --reward-learning-rate inf", "--reward-learning-rate"),
    "gamma": (f"{OWN} --gamma 1.5", "--gamma"),
    "tau": (f"{OWN} --tau nan", "--tau"),
    "resume nothing": (f"{OWN} --resume", "--run-dir"),
}


@pytest.mark.parametrize(("options", "message"), MISTAKES.values(), ids=MISTAKES)
@BOTH
def test_mistakes_are_named_before_anything_is_written(script, options, message, monkeypatch):
    monkeypatch.setattr(script, "fit_reward_model", None)  # nor is anything fitted
    with pytest.raises((script.UserError, OSError), match=message):
        train(script, options)
    written = {path.name for path in Path().iterdir()}
    assert written <= {"own.hdf5", "minari"}


@pytest.mark.parametrize("run_dir", ["own.hdf5/run", "own.hdf5", "/proc/run"])
@BOTH
def test_a_run_dir_that_cannot_be_written_is_named(script, run_dir):
    with pytest.raises(OSError, match=run_dir.split("/run")[0]):
        train_own(script, f"--run-dir {run_dir}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, --device cuda is no mistake")
@BOTH
def test_a_gpu_that_is_not_there_is_named(script):
    with pytest.raises(script.UserError, match="no usable GPU"):
        train_own(script, "--device cuda --run-dir run")
    assert not Path("run").exists()


@pytest.mark.parametrize("options", ["--num-updates 101", "--eval-freq 101", "--log-freq 101"])
def test_td3bc_counts_are_multiples_of_policy_freq(options):
    with pytest.raises(td3bc_imputed.UserError, match="multiples of --policy-freq 2"):
        train_own(td3bc_imputed, options)


@pytest.mark.parametrize("option", ["--alpha -1", "--policy-noise -1", "--noise-clip nan"])
def test_mistakes_of_td3bc(option):
    with pytest.raises(td3bc_imputed.UserError, match=option.split()[0]):
        train_own(td3bc_imputed, option)


@pytest.mark.parametrize("option", ["--expectile 2", "--expectile nan", "--temperature -1"])
def test_mistakes_of_iql(option):
    with pytest.raises(iql_imputed.UserError, match=option.split()[0]):
        train_own(iql_imputed, option)


@pytest.mark.parametrize("problem", ["single episode", "equal returns", "oracle with NaN"])
@BOTH
def test_rewards_that_cannot_be_used_are_named_before_anything_is_written(script, problem):
    rewards, options = np.arange(300.0), "--scale-rewards"
    if problem == "single episode":
        write_own(rewards=rewards)
        with h5py.File("own.hdf5", "a") as file:
            file["terminals"][:-1] = False
        message = "two episodes whose returns differ"
    elif problem == "equal returns":
        write_own(rewards=rewards % 3)
        options += " --rewards oracle"
        message = "two episodes whose returns differ"
    else:
        rewards[5] = np.nan
        write_own(rewards=rewards)
        options = "--rewards oracle"
        message = "some are NaN"
    with pytest.raises(script.UserError, match=message):
        train_own(script, f"{options} --run-dir run")
    assert not Path("run").exists()


@pytest.mark.parametrize("script", [td3bc_imputed, iql_imputed, reward_model])
def test_a_mistake_is_one_line_and_exit_code_2(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script.__file__, "--env-id", "hoper-medium-v2"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(script.__file__, run_name="__main__")
    assert end.value.code == 2
    assert re.fullmatch(r"error: .*hopper-medium-v2.*\n", capsys.readouterr().err)


@pytest.mark.parametrize("script", [td3bc_imputed, iql_imputed, reward_model])
def test_a_fuzzed_command_line_ends_in_one_error(script, capsys):
    """Whatever it holds, it ends in one line or in tyro's exit code 2; a missing file does that."""
    rng = random.Random(0)
    flags = [f"--{name.replace('_', '-')}" for name in vars(script.Args())]
    values = ["-1", "0", "1e400", "nan", "inf", "1_000", "None", "", "--", "\0", "é"]
    values += ["own.hdf5", "x/y", "/", "imputed", "cpu"]
    ends = {"one line": 0, "tyro": 0}
    for _ in range(40):
        arguments = []
        for _ in range(rng.randrange(4)):
            arguments += [rng.choice(flags), rng.choice(values)]
        try:
            args = script.tyro.cli(script.Args, args=[*arguments, "--dataset-path", "none.hdf5"])
            script.main(args)
        except (script.UserError, OSError, ImportError, gym.error.Error):
            ends["one line"] += 1
        except SystemExit as end:
            assert end.code == 2, arguments
            ends["tyro"] += 1
        else:
            raise AssertionError(f"{arguments} ran")
    assert min(ends.values()) > 5, ends
    assert {path.name for path in Path().iterdir()} <= {"own.hdf5", "minari"}


def test_a_missing_bundled_dataset_is_one_line(tmp_path, monkeypatch, capsys):
    copy = SimpleNamespace(__file__=shutil.copy(ROOT / "td3bc_imputed.py", tmp_path))
    code, _, error = run_as_main(copy, "", monkeypatch, capsys)
    assert code == 2
    assert re.fullmatch(r"error: .*halfcheetah-medium-replay-mini.hdf5.*\n", error)


# --- Workers ---
def test_workers_evaluate_to_the_same_numbers():
    options = f"{OWN} --num-updates 12 --eval-freq 4 --num-seeds 2"
    train(td3bc_imputed, f"{options} --run-dir here")
    train(td3bc_imputed, f"{options} --run-dir workers --eval-workers 2")
    assert_identical(outcome("here"), outcome("workers"))


@BOTH
def test_workers_outlive_a_ctrl_c_that_comes_while_they_start(script):
    """A terminal sends it to all processes of the group."""
    options = f"{OWN} --num-updates 8 --eval-freq 4 --eval-workers 2 --run-dir run"
    process = start(script, options, start_new_session=True)
    wait_for("run/checkpoint.pt", process)  # the workers import torch
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert output.splitlines()[-1].endswith("; to go on, repeat the command with --resume")
    assert len(read_scores("run")) == 1, "the evaluation under way"


def test_a_dead_worker_ends_the_run_which_resumes_without_workers():
    options = f"{OWN} --env-id Deadly-v0 --num-updates 8 --eval-freq 4"
    with pytest.raises(BrokenExecutor):  # which __main__ shows as one line
        train(td3bc_imputed, f"{options} --run-dir run --eval-workers 1")
    train(td3bc_imputed, f"{options} --run-dir run --resume")
    train(td3bc_imputed, f"{options} --run-dir undisturbed")
    assert_identical(outcome("undisturbed"), outcome("run"))


# --- Beside other things ---
@BOTH
def test_output_may_go_nowhere_or_into_a_notebook(script, monkeypatch):
    """Neither can be set to write line by line."""
    for stream in (None, io.StringIO()):
        arguments = shlex.split(f"{SMALL} {OWN} --num-updates 2 --rewards oracle")
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [script.__file__, *arguments])
            patch.setattr(sys, "stdout", stream)
            runpy.run_path(script.__file__, run_name="__main__")
    assert "result  " in stream.getvalue()
    assert len(list(Path("runs").glob("*/result.json"))) == 2


def test_the_bundled_dataset_is_found_through_a_link(tmp_path):
    link = tmp_path / "linked.py"
    link.symlink_to(reward_model.__file__)
    namespace = runpy.run_path(str(link))
    assert len(namespace["load_dataset"]().rewards) == 99_900


# --- What can be trained on ---
@BOTH
def test_a_log_without_a_simulator_becomes_a_policy_and_is_not_evaluated(
    script, own_rewards, monkeypatch, capsys
):
    monkeypatch.setattr(gym, "make", None)  # no environment is made
    options = "--dataset-path own.hdf5 --num-updates 8 --eval-freq 4 --num-seeds 2"
    train(script, f"{options} --run-dir undisturbed")
    output = capsys.readouterr().out
    with h5py.File("own.hdf5") as file:
        actions = np.float32(file["actions"])
    low, high = actions.min(axis=0), actions.max(axis=0)
    bounds = " and ".join(str(np.float64(bound).round(4).tolist()) for bound in (low, high))
    assert "evaluation    none (no environment); " in output
    assert f"actions lie between {bounds}" in output
    assert output.splitlines()[-1] == "result        trained, not evaluated, in undisturbed"
    assert not Path("undisturbed/scores.csv").exists()
    result = read_json("undisturbed/result.json")
    assert result["metric"] is None
    assert "mean" not in result

    with monkeypatch.context() as patch:
        at = 6 if script is iql_imputed else 3  # after the first checkpoint
        signal_at_update(script, patch, signal.SIGINT, at)
        _, resume = stop(script, f"{options} --run-dir run", capsys)
    assert read_state("run")["num_updates"] == 6
    train(script, resume)
    for run_dir in ("run", "undisturbed"):
        policy = script.Policy(np.load(f"{run_dir}/policy_seed1.npz"))
        actions = policy(np.random.default_rng(0).normal(size=(100, 1), scale=1e3))
        assert (low <= actions).all()
        assert (actions <= high).all()
    assert_identical(read_state("undisturbed")["agent"], read_state("run")["agent"])


@BOTH
def test_with_scaled_rewards_an_agent_does_not_depend_on_their_unit(script, own_rewards):
    returns = []
    for unit in (1, 1e-4, 1e6):
        write_own(rewards=unit * own_rewards)
        train_own(script, f"--num-updates 20 --scale-rewards --run-dir {unit}")
        returns.append(read_json(f"{unit}/result.json")["mean"])
    assert returns == pytest.approx([returns[0]] * 3, rel=1e-5)


@BOTH
def test_a_partly_labelled_log_trains(script, own_rewards, capsys):
    hidden = np.random.default_rng(0).random(300) < 0.7
    write_own(rewards=np.where(hidden, np.nan, own_rewards))
    train_own(script, "--label-fraction None")  # the default
    output = capsys.readouterr().out
    assert f"{300 - hidden.sum()} labelled" in output
    assert "no hidden reward is known" in output


def make_minari(**settings):
    """tests/wide-v0: three episodes of Wide-v0."""
    rng, episodes = np.random.default_rng(0), []
    for length in (3, 2, 4):
        is_last = np.arange(length) == length - 1
        episodes.append(
            EpisodeBuffer(
                observations=rng.normal(size=(length + 1, 1)),
                actions=rng.uniform(0, 10, (length, 2)).astype(np.float32),
                rewards=rng.normal(size=length),
                terminations=is_last,
                truncations=np.zeros(length, bool),
            )
        )
    minari.create_dataset_from_buffers("tests/wide-v0", episodes, **settings)


@BOTH
def test_a_minari_dataset_trains_and_scores_are_normalised(script, capsys):
    make_minari(env="Wide-v0", ref_min_score=10.0, ref_max_score=60.0)
    options = "--env-id tests/wide-v0 --label-fraction 0.7 --num-updates 2"
    train(script, f"{options} --run-dir run")
    (row,) = read_scores("run")
    assert float(row["score"]) == pytest.approx(100 * (float(row["return"]) - 10) / 50)
    result = read_json("run/result.json")
    assert result["metric"] == "score"
    assert result["mean"] == pytest.approx(float(row["score"]))
    assert f"result        score {result['mean']:.1f} ± 0.0" in capsys.readouterr().out
    elsewhere = "--eval-env-id Wide-v0 --run-dir elsewhere"  # these references are not its own
    train(script, f"{options} {elsewhere}")
    assert read_json("elsewhere/result.json")["metric"] == "return"


@pytest.mark.filterwarnings("ignore:env_spec is None")
@BOTH
def test_a_minari_dataset_without_an_environment_trains_and_is_not_evaluated(script, capsys):
    space = own_envs.WideEnv.observation_space
    make_minari(observation_space=space, action_space=own_envs.WideEnv.action_space)
    train(script, "--env-id tests/wide-v0 --label-fraction 0.7 --num-updates 2 --run-dir run")
    assert "evaluation    none (no environment)" in capsys.readouterr().out
    policy = script.Policy(np.load("run/policy_seed0.npz"))
    assert policy(np.zeros(1)).shape == (2,)
    assert not Path("run/scores.csv").exists()


# --- Weights & Biases ---
@BOTH
def test_weights_and_biases_offline(script, tmp_path):
    options = "--num-updates 8 --log-freq 4 --eval-freq 4 --track"
    train_own(script, f"{options} --run-dir {tmp_path / 'run'}")
    assert list(Path("run/wandb").glob("offline-run-*/*.wandb"))
    assert read_state("run")["track_id"]


class FakeRun:
    """Stands for wandb and for its run; holds what was logged."""

    id = "the first"
    Error = OSError

    def __init__(self):
        self.rows = []
        self.metrics = []

    def init(self, **settings):
        self.settings = settings
        return self

    def define_metric(self, *names, **settings):
        self.metrics.append((names, settings))

    def log(self, row):
        self.rows.append(row)

    def finish(self):
        self.finished = True


@BOTH
def test_what_is_tracked_are_means_over_the_seeds_and_each_seed(script, monkeypatch):
    run, update = FakeRun(), script.update
    monkeypatch.setitem(sys.modules, "wandb", run)
    losses = {"losses/critic_loss": torch.tensor([1.0, 3.0])}
    monkeypatch.setattr(script, "update", lambda *arguments: update(*arguments) | losses)
    options = "--num-updates 8 --log-freq 4 --eval-freq 4 --num-seeds 2 --run-dir run --track"
    train_own(script, options)
    assert run.finished
    assert run.metrics == [(("*",), {"step_metric": "update"})]
    assert run.settings["config"]["batch_size"] == 16
    logged = [row for row in run.rows if "losses/critic_loss" in row]
    assert [row["update"] for row in logged] == [4, 8]
    for row in logged:
        assert row["losses/critic_loss"] == 2.0
        assert {"losses/actor_loss", "charts/updates_per_second"} <= row.keys()
    evaluations = [row for row in run.rows if "charts/return" in row]
    assert [row["update"] for row in evaluations] == [4, 8]
    returns = [float(row["return"]) for row in read_scores("run")[-2:]]
    assert [evaluations[-1][f"charts/return_seed{k}"] for k in range(2)] == returns
    assert evaluations[-1]["charts/return"] == pytest.approx(np.mean(returns))


def test_a_resumed_run_is_tracked_as_the_same_one(monkeypatch):
    options = "--num-updates 2 --run-dir run --track"
    monkeypatch.setitem(sys.modules, "wandb", FakeRun())
    train_own(td3bc_imputed, options)
    forget_result("run")
    resumed = FakeRun()
    monkeypatch.setitem(sys.modules, "wandb", resumed)
    train_own(td3bc_imputed, f"{options} --resume")
    assert resumed.settings["id"] == "the first"
    assert resumed.settings["resume"] == "allow"


def test_tracking_without_an_account_is_one_line_and_the_run_dir_stays_free(monkeypatch):
    run = FakeRun()

    def refuse(**settings):
        raise run.Error("no API key configured")

    monkeypatch.setattr(run, "init", refuse)
    monkeypatch.setitem(sys.modules, "wandb", run)
    options = "--num-updates 2 --run-dir run"
    with pytest.raises(td3bc_imputed.UserError, match="no API key.*WANDB_MODE=offline"):
        train_own(td3bc_imputed, f"{options} --track")
    train_own(td3bc_imputed, options)
