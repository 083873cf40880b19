"""Whole runs, as a user starts them: in this process, or in one where that is what is tested."""

import csv
import hashlib
import inspect
import json
import os
import pkgutil
import re
import resource
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

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

OWN = "--env-id own_envs:Wide-v0 --dataset-path own.hdf5"
BUNDLED = "--env-id None --dataset-path None --label-fraction 0.01"
SMALL = f"{OWN} --label-fraction 0.2 --reward-epochs 3 --batch-size 16 --eval-episodes 3"
SMALL += " --num-updates 2 --device cpu --compile off --run-dir run"  # later options win
DEFAULT = "--label-fraction None --no-scale-rewards"  # the default fraction
TWICE = "--num-updates 8 --eval-freq 4 --num-seeds 2"  # two evaluations
CHECKPOINT = Path("run/checkpoint.pt")
STEPS = np.arange(300) % 3
ACTIONS = np.random.default_rng(0).uniform(0, 10, (300, 2)).astype(np.float32)
REWARDS = ACTIONS.sum(axis=1)


# --- Runs ---
@pytest.fixture(params=[td3bc_imputed, iql_imputed], ids=["td3bc", "iql"])
def script(request):
    return request.param


@pytest.fixture(autouse=True)
def write_own():
    """own.hdf5: 300 transitions of Wide-v0, whose rewards are sums of actions."""

    def write(**columns):
        defaults = {"observations": STEPS[:, None], "terminals": STEPS == 2}
        defaults |= {"actions": ACTIONS, "rewards": REWARDS}
        with h5py.File("own.hdf5", "w") as file:
            file.update(defaults | columns)

    write()
    return write


def train(script, options=""):
    script.main(script.tyro.cli(script.Args, args=shlex.split(f"{SMALL} {options}")))


@pytest.fixture
def assert_one_line(monkeypatch, capsys):
    """That `python script.py options` ends with exit code 2 and one line, but for a process."""

    def check(script, options, message):
        monkeypatch.setattr(sys, "argv", [script.__file__, *shlex.split(f"{SMALL} {options}")])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            runpy.run_path(script.__file__, run_name="__main__")
        assert end.value.code == 2
        assert re.fullmatch(f"error: .*{message}.*\n", capsys.readouterr().err)

    return check


def start(path, options, **variables):
    """A process in a group of its own, as a terminal makes one."""
    threads = str(torch.get_num_threads())
    variables |= {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": threads}
    command = [sys.executable, path, *shlex.split(f"{SMALL} {options}")]
    settings = {"env": os.environ | variables, "start_new_session": True, "text": True}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **settings)


def once_saved(script, do, monkeypatch):
    """From its first checkpoint on, a run does this before each update."""
    update = script.update

    def changed(agent, *rest):
        if CHECKPOINT.exists():
            do(agent)
        return update(agent, *rest)

    monkeypatch.setattr(script, "update", changed)


def read_json(path):
    """Of a file that any JSON parser reads: Python writes NaN, which others refuse."""
    return json.loads(Path(path).read_text(), parse_constant=pytest.fail)


def read_scores(run_dir="run"):
    return list(csv.DictReader(Path(run_dir, "scores.csv").read_text().splitlines()))


def read_state(run_dir="run"):
    return torch.load(Path(run_dir, "checkpoint.pt"), weights_only=True)


def contents(run_dir="run"):
    return {path.name: path.read_bytes() for path in Path(run_dir).iterdir()}


def plain(state):
    """Equal where each tensor is, to the bit."""
    digest = lambda tensor: hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
    return json.loads(json.dumps(state, default=digest))


def outcome(run_dir="run"):
    """All that was computed, and told but for where, how and how long."""
    state, result = read_state(run_dir), read_json(f"{run_dir}/result.json")
    for name in ("run_dir", "resume", "eval_workers", "num_updates"):
        del state["config"][name]
    del result["updates_per_second"]
    policies = {name: data for name, data in contents(run_dir).items() if name.endswith("npz")}
    return plain(state), result, read_scores(run_dir), policies


def assert_stopped(code, output, error):
    """By a signal in the second of two evaluations."""
    assert code == 130
    assert "\nstopped; to go on, repeat the command with --resume" in output
    assert error == ""


# --- What a run leaves ---
def test_a_run_leaves_scores_configuration_result_and_policies(script, capsys):
    fit = "--reward-epochs 300 --reward-learning-rate 1e-3"
    train(script, f"{fit} --num-updates 10 --eval-freq 4 --num-seeds 2 --seed 3 --run-dir None")
    (run_dir,) = Path("runs").iterdir()
    assert re.fullmatch(rf"own__{script.__name__}__imputed__3__\d{{8}}-\d{{6}}-\d+", run_dir.name)
    files = {"checkpoint.pt", "config.json", "result.json", "scores.csv"}
    assert contents(run_dir).keys() == files | {"policy_seed3.npz", "policy_seed4.npz"}

    scores = read_scores(run_dir)
    assert list(scores[0]) == ["update", "seed", "return", "score"]
    evaluated = [(float(row["update"]), float(row["seed"])) for row in scores]
    assert evaluated == [(update, seed) for update in (4, 8, 10) for seed in (3, 4)]
    last = [float(row["return"]) for row in scores[-2:]]
    result = read_json(run_dir / "result.json")
    assert (result["metric"], result["per_seed"]) == ("return", last)
    assert read_json(run_dir / "config.json")["dataset_path"] == "own.hdf5"
    output = capsys.readouterr().out
    text = f"result        return {np.mean(last):.1f} ± {np.std(last):.1f} over 2 seed(s), in "
    assert output.splitlines()[-1] == f"{text}{run_dir}/policy_seed*.npz"
    assert "warning" not in output.lower()


def test_the_result_is_the_last_evaluation_and_the_mean_of_the_last_ten(script, monkeypatch):
    """Of twelve evaluations of two seeds; never the best."""
    table = np.random.default_rng(0).normal(size=(12, 2))
    rows = iter(table.tolist())
    monkeypatch.setattr(script, "evaluate", lambda *_: 2 * [next(rows)])
    train(script, "--num-updates 24 --eval-freq 2 --num-seeds 2")
    expected = {"per_seed": table[-1], "mean": table[-1].mean(), "std": table[-1].std()}
    expected |= {"last_10_mean": table[2:].mean(), "last_10_std": table[2:].mean(axis=0).std()}
    result = read_json("run/result.json")
    for name, value in expected.items():
        assert result[name] == pytest.approx(value)


def test_a_policy_is_the_actor_needs_numpy_alone_and_has_the_last_scores(script):
    train(script, TWICE)
    actor = read_state()["agent"]["actor"]
    Path("copied.py").write_text(f"import numpy as np\n\n{inspect.getsource(script.Policy)}")
    copied = runpy.run_path("copied.py")["Policy"]
    observations = np.array([[0.0], [1.0], [2.0]])  # of an episode
    for seed, row in enumerate(read_scores()[-2:]):
        policy = copied(np.load(f"run/policy_seed{seed}.npz", allow_pickle=False))
        x = (torch.tensor(observations).float() - actor["mean"][seed]) / actor["std"][seed]
        for layer in ("layer1", "layer2", "layer3"):
            x = x @ actor[f"{layer}.weight"][seed] + actor[f"{layer}.bias"][seed]
            x = x.tanh() if layer == "layer3" else x.relu()
        expected = 5 * (x.numpy() + 1)  # from [-1, 1] to the bounds, 0 and 10
        np.testing.assert_allclose(policy(observations), expected, rtol=1e-4)
        np.testing.assert_allclose(policy(observations[1]), expected[1], rtol=1e-4)
        assert float(row["return"]) == pytest.approx(expected.sum(), rel=1e-4)
        assert row["score"] == row["return"], "there are no references"


@pytest.mark.parametrize("activation", ["gelu", "silu", "elu", "tanh"])
def test_a_policy_other_than_the_actor_is_an_error_at_each_writing(script, activation, monkeypatch):
    """For somebody who changes ReLU in MLP and not in Policy; here after one evaluation."""
    found = {}

    def change(agent):
        found.update(contents())
        monkeypatch.setattr(torch, "relu", getattr(torch.nn.functional, activation))

    once_saved(script, change, monkeypatch)
    with pytest.raises(AssertionError, match="Policy.*Actor"):
        train(script, TWICE)
    assert found == contents()


def test_evaluations_start_in_the_same_states_and_change_nothing_of_the_training(script):
    for freq in (2, 8):
        options = f"{TWICE} --seed 7 --eval-freq {freq} --run-dir {freq}"
        train(script, f"--env-id own_envs:Seed-v0 {options}")
    often, once = read_state("2"), read_state("8")
    for name in ("agent", "generator"):
        assert plain(often[name]) == plain(once[name])
    returns = [float(row["return"]) for row in read_scores("2")]
    assert returns == pytest.approx([(1 + 2 + 4) / 3] * 8)  # seeds 100, 101 and 102


def test_what_a_run_leaves_is_json_whatever_the_numbers_are(script, write_own):
    (rows,) = script.choose_labels(REWARDS, 0.2, range(1))
    rewards = np.zeros(300)  # those hidden have no variance
    rewards[rows] = REWARDS[rows]
    write_own(rewards=rewards)
    train(script, "--env-id own_envs:Nan-v0")
    result, _ = read_json("run/result.json"), read_json("run/config.json")
    assert (result["mean"], result["reward_model"]["r2"]) == (None, [None])


def test_a_run_directory_is_never_overwritten(script, capsys):
    train(script, "--resume")  # of nothing: it starts
    before = contents()
    Path("run/result.json").unlink()  # as if it had been killed before
    for _ in ("a run that goes on", "a finished one"):
        with pytest.raises(script.UserError, match="already holds a run: use --resume or another"):
            train(script)
        Path("run/result.json").write_bytes(before["result.json"])
    train(script, "--resume")
    assert "run holds a finished run" in capsys.readouterr().out
    assert contents() == before


# --- Killed and stopped runs ---
WRITERS = {"imputed": "torch.save", "labeled": "numpy.savetxt", "zero": "numpy.savez"}
WRITERS |= {"oracle": "os.replace", "mean": "numpy.savez"}


@pytest.mark.parametrize("rewards", WRITERS)
def test_a_run_killed_while_it_writes_goes_on_to_the_bit(script, rewards, monkeypatch):
    """Whatever the agent sees; but for imputed rewards, there is no reward model."""
    writer, options = WRITERS[rewards], f"{TWICE} --rewards {rewards}"
    write = pkgutil.resolve_name(writer)

    def killed(*arguments, **settings):
        if not CHECKPOINT.exists():
            return write(*arguments, **settings)
        if writer != "os.replace":  # half is written
            write(*arguments, **settings)
            newest = max(Path("run").iterdir(), key=lambda path: path.stat().st_mtime_ns)
            os.truncate(newest, newest.stat().st_size // 2)
        raise KeyboardInterrupt

    if rewards != "imputed":
        monkeypatch.setattr(script, "fit_reward_model", None)
    train(script, f"{options} --run-dir undisturbed")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(writer, killed)
        train(script, options)
    train(script, f"{options} --resume")
    assert outcome() == outcome("undisturbed")
    assert len(read_json("run/result.json")["reward_model"]["r2"]) == 2 * (rewards == "imputed")


PROCESSES = [
    (td3bc_imputed, 2, signal.SIGKILL),
    (iql_imputed, 0, signal.SIGKILL),
    (iql_imputed, 2, signal.SIGINT),
    (td3bc_imputed, 0, signal.SIGTERM),
]


@pytest.mark.parametrize(("script", "workers", "number"), PROCESSES)
def test_a_process_that_ends_leaves_no_worker_and_goes_on_to_the_bit(script, workers, number):
    """Workers' scores are those of none, without which it goes on; in the C locale, by a link."""
    options = f"{TWICE} --env-id own_envs:Signal-v0"
    Path("signal").write_text(str(int(number)))
    Path("a link.py").symlink_to(script.__file__)
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    process = start("a link.py", f"{options} --eval-workers {workers}", **locale)
    train(script, f"{options} --run-dir undisturbed")
    output, error = process.communicate(timeout=120)  # no process is left that could write there
    if number == signal.SIGKILL:
        assert process.returncode == -number
        assert "Traceback" not in error
        heads = ["dataset", "terminals", "log", "rewards", "simulator", "run", "log, imputed"]
        heads += ["reward model", "speed", "update"]
        assert [line[:13].strip() for line in output.splitlines()] == heads, "line by line"
    else:
        assert_stopped(process.returncode, output, error)
    assert len(read_scores()) == 2, "of the first evaluation"
    train(script, f"{options} --resume")
    assert outcome() == outcome("undisturbed")


def test_ctrl_c_while_workers_start_is_one_line():
    process = start(td3bc_imputed.__file__, "--eval-workers 2")
    while not Path("run/policy_seed0.npz").exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.5)  # they import torch for longer
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    output, error = process.communicate(timeout=120)
    assert_stopped(process.returncode, output, error)


def test_a_dead_worker_is_one_line_and_the_run_goes_on_without(assert_one_line):
    options = "--env-id own_envs:Deadly-v0"
    assert_one_line(td3bc_imputed, f"{options} --eval-workers 1", "terminated")
    train(td3bc_imputed, f"{options} --resume")


# --- Resuming ---
def test_a_resumed_run_changes_only_where_and_how_it_runs(script, write_own, monkeypatch):
    train(script, "--num-updates 4 --eval-freq 4")
    expected = contents()
    Path("run/result.json").unlink()  # as if it had been killed before
    monkeypatch.setattr(script, "fit_reward_model", None)  # nor does it fit again
    free = {"resume", "run_dir", "dataset_path", "eval_workers", "track", "compile", "cuda_graph"}
    free |= {"device"} | ({"num_updates"} if script is td3bc_imputed else set())
    others = {"scale_rewards": "", "rewards": "zero", "env_id": "Wide-v0", "policy_freq": 1}
    for name, value in vars(script.Args()).items():
        option = "--no-" if value is True else "--"
        other = others.get(name, 0.6 if isinstance(value, float | None) else 8)
        change = f"{option}{name.replace('_', '-')} {other}"
        if name not in free:
            with pytest.raises(script.UserError, match=f"another {name}: .*, now "):
                train(script, f"--num-updates 4 --eval-freq 4 --resume {change}")
    write_own(rewards=REWARDS + 1)
    with pytest.raises(script.UserError, match="another dataset: .*, now "):
        train(script, "--num-updates 4 --eval-freq 4 --resume")

    write_own()
    shutil.move("own.hdf5", "log.hdf5")
    shutil.move("run", "moved")
    moved = "--dataset-path log.hdf5 --run-dir moved --no-cuda-graph"
    train(script, f"--num-updates 4 --eval-freq 4 --resume {moved}")
    assert contents("moved")["scores.csv"] == expected["scores.csv"]
    quality = read_json("moved/result.json")["reward_model"]
    assert quality == json.loads(expected["result.json"])["reward_model"]


def test_td3bc_may_be_given_more_updates_and_fewer_leave_its_result_alone():
    train(td3bc_imputed, TWICE)
    train(td3bc_imputed, f"{TWICE} --num-updates 16 --resume")
    train(td3bc_imputed, f"{TWICE} --num-updates 16 --run-dir undisturbed")
    assert outcome() == outcome("undisturbed")
    before = contents()
    train(td3bc_imputed, f"{TWICE} --num-updates 4 --resume")
    assert contents() == before


def test_a_changed_script_is_one_warning_and_a_new_option_is_named(script, monkeypatch, capsys):
    train(script)
    Path("run/result.json").unlink()  # as if it had been killed before
    Path("edited.py").write_text(f"{Path(script.__file__).read_text()}\n# edited\n")
    monkeypatch.setattr(script, "__file__", "edited.py")
    train(script, "--resume")
    assert capsys.readouterr().out.count("the script has changed") == 1
    state = read_state()
    del state["config"]["gamma"]  # as of a script that had no such option
    torch.save(state, CHECKPOINT)
    with pytest.raises(script.UserError, match="another gamma: None, now 0.99"):
        train(script, "--resume")


def test_a_damaged_checkpoint_is_one_line(assert_one_line):
    train(td3bc_imputed)
    Path("run/result.json").unlink()  # as if it had been killed before
    damaged = [b"", CHECKPOINT.read_bytes()[:100_000], CHECKPOINT.read_bytes()[:-1]]
    for foreign in ({"config": Path()}, {"weights": 0}, [1, 2]):  # no class is unpickled
        torch.save(foreign, "foreign")
        damaged.append(Path("foreign").read_bytes())
    for content in damaged:
        CHECKPOINT.write_bytes(content)
        assert_one_line(td3bc_imputed, "--resume", "checkpoint.pt.*delete it")


def test_the_rate_of_iqls_actor_falls_to_zero_as_a_cosine():
    train(iql_imputed, "--num-updates 8")
    rate = read_state()["agent"]["actor_optimizer"]["param_groups"][0]["lr"]  # of the last update
    assert float(rate) == pytest.approx(1.5e-4 * (1 + np.cos(np.pi * 7 / 8)))


# --- A full disk, a rate too high ---
def test_a_full_disk_is_one_line_and_keeps_the_last_checkpoint(monkeypatch, assert_one_line):
    """RLIMIT_FSIZE lets no file grow beyond a number of bytes, with the same kind of error."""
    before, save = resource.getrlimit(resource.RLIMIT_FSIZE), torch.save

    def save_on_a_full_disk(*arguments):
        if CHECKPOINT.exists():
            resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, before[1]))  # one is larger
        save(*arguments)

    monkeypatch.setattr(torch, "save", save_on_a_full_disk)
    try:
        assert_one_line(td3bc_imputed, TWICE, "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert read_state()["updates_done"] == 4


def test_a_learning_rate_of_a_million_is_named_with_the_update(script, assert_one_line):
    options = "--learning-rate 1e6 --num-updates 1000 --eval-freq 20"
    for data in ("", f"{BUNDLED} --resume"):
        assert_one_line(script, f"{data} {options}", r"\b20\b.* --learning-rate")
        assert contents().keys() == {"config.json"}


def test_a_seed_that_diverges_ends_the_run_and_what_was_good_stays(script, monkeypatch):
    good = {}

    def diverge(agent):
        good.update(contents())
        agent.actor.layer3.bias.data[1] = torch.nan

    once_saved(script, diverge, monkeypatch)
    with pytest.raises(script.UserError, match=r"\b8\b.* --learning-rate"):
        train(script, TWICE)
    assert good == contents()


@pytest.mark.parametrize("rate", ["1e6", "1e4"])
@pytest.mark.parametrize("data", ["--reward-epochs 1", "--reward-epochs 300", BUNDLED])
def test_a_reward_learning_rate_that_diverges_is_named(data, rate, assert_one_line):
    options = f"{data} --reward-learning-rate {rate}"
    assert_one_line(td3bc_imputed, options, "--reward-learning-rate")
    assert contents() == {}


# --- Mistakes ---
MISTAKES = [  # options, what the error says, columns of own.hdf5
    ("--env-id hoper-medium-v2 --dataset-path None", "hopper-medium-v2", {}),
    ("--env-id no_such:Env-v0", "no_such", {}),
    ("--env-id own_envs:Discrete-v0", "Discrete-v0", {}),
    ("--env-id Pendulum-v1", "Pendulum-v1", {}),
    ("--resume --run-dir None", "--run-dir", {}),
    ("--run-dir ''", "--run-dir is empty", {}),
    (f"--run-dir {'x' * 300}", "too long", {}),
    ("--run-dir own.hdf5/run", "own.hdf5", {}),
    ("--run-dir /proc/run", "/proc", {}),
    ("", "every reward is NaN", {"rewards": np.full(300, np.nan)}),
    ("", "labels are all equal", {"rewards": np.ones(300)}),
    ("", "beyond the bounds", {"actions": np.full((300, 2), 10.5)}),
    ("--rewards oracle", "NaN", {"rewards": np.where(STEPS == 1, np.nan, STEPS)}),
    ("--rewards oracle --scale-rewards", "different returns", {"rewards": STEPS}),
    ("--rewards zero --scale-rewards", "different returns", {"terminals": np.arange(300) == 299}),
    ("--rewards labeled --label-fraction 1", "no reward is hidden", {}),
    ("--rewards zero --label-fraction 1", "no reward is hidden", {}),
    ("--rewards mean --label-fraction 1", "no reward is hidden", {}),
]
if not torch.cuda.is_available():
    MISTAKES.append(("--device cuda", "--device cuda does not work", {}))
NUMBERS = "label-fraction 0, label-fraction nan, num-seeds 0, seed -1, "
NUMBERS += "eval-workers -1, eval-episodes 0, num-updates 0, eval-freq 0, batch-size 0, gamma 1.5, "
NUMBERS += "reward-epochs 0, reward-hidden-dim 0, reward-batch-size 0, learning-rate -1, tau nan, "
NUMBERS += f"learning-rate nan, reward-learning-rate inf, seed {2**64}, "
TD3BC = "alpha -1, policy-noise -1, noise-clip nan, policy-freq 0, policy-freq 3"
IQL = "expectile 2, expectile nan, temperature -1"


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named_before_anything_is_written(script, mistake, write_own, monkeypatch):
    """In an error that __main__ shows as one line; nor is anything fitted."""
    options, message, columns = mistake
    write_own(**columns)
    monkeypatch.setattr(script, "fit_reward_model", None)
    with pytest.raises((script.UserError, OSError), match=message):
        train(script, options)
    assert {path.name for path in Path().rglob("*") if path.is_file()} == {"own.hdf5"}


def test_numbers_that_make_no_sense_are_named(script):
    for option in (NUMBERS + (TD3BC if script is td3bc_imputed else IQL)).split(", "):
        with pytest.raises(script.UserError, match=f"--{option.split()[0]}"):
            train(script, f"--{option}")
        assert not Path("run").exists()


# --- What can be trained on ---
def test_a_log_without_a_simulator_becomes_a_policy(script, monkeypatch, capsys):
    monkeypatch.setattr(script.gym, "make", None)  # no environment is made
    train(script, f"--env-id None {TWICE}")
    assert capsys.readouterr().out.endswith(
        "result        trained, not evaluated, in run/policy_seed*.npz\n"
    )
    assert not Path("run/scores.csv").exists()
    assert not read_json("run/result.json").keys() & {"metric", "mean", "per_seed"}
    policy = script.Policy(np.load("run/policy_seed1.npz"))
    found = policy(np.random.default_rng(0).normal(size=(100, 1), scale=1e3))
    assert (ACTIONS.min(axis=0) <= found).all()
    assert (found <= ACTIONS.max(axis=0)).all()


def assert_complete(script, options, monkeypatch):
    """Without a fit, the agent gets every reward as it is."""
    agents, options = [], f"{options} {DEFAULT}"
    monkeypatch.setattr(script, "fit_reward_model", None)
    for rewards in ("imputed", "oracle"):
        train(script, f"{options} --rewards {rewards} --run-dir {script.__name__}-{rewards}")
        agents.append(plain(read_state(f"{script.__name__}-{rewards}")["agent"]))
    assert agents[0] == agents[1]


def test_of_own_data_every_label_is_used(script, write_own, monkeypatch, capsys):
    write_own(rewards=np.where(STEPS == 0, REWARDS, np.nan))
    train(script, DEFAULT)
    printed = capsys.readouterr().out
    assert "100 labels" in printed
    assert "log, imputed  return " in printed
    write_own()
    assert_complete(script, "", monkeypatch)
    assert "the log has every reward" in capsys.readouterr().out


def test_a_file_of_the_reward_model_trains_with_no_further_option(write_own, monkeypatch, capsys):
    write_own(rewards=np.where(STEPS == 0, REWARDS, np.nan))
    options = f"{OWN} --reward-epochs 3 --device cpu --output-path full.hdf5"
    reward_model.main(reward_model.tyro.cli(reward_model.Args, args=shlex.split(options)))
    with h5py.File("full.hdf5") as file:
        assert (file["rewards"][STEPS == 0] == REWARDS[STEPS == 0]).all()
    for script in (td3bc_imputed, iql_imputed):
        assert_complete(script, "--env-id None --dataset-path full.hdf5", monkeypatch)
    # Of the log, whose rewards were NaN, and of the file: the same imputed rewards.
    line = r"log(?:, imputed)? +return (\S+), of its best episode (\S+)"
    found = np.float64(re.findall(line, capsys.readouterr().out))
    assert len(found) == 5
    np.testing.assert_allclose(found, found[[0] * 5], atol=0.11)


@pytest.mark.filterwarnings("ignore:env_spec is None")
@pytest.mark.parametrize("has_environment", [True, False])
def test_a_minari_dataset_trains_and_scores_are_normalised(script, has_environment, capsys):
    episode = EpisodeBuffer(
        observations=np.zeros((4, 1)),
        actions=np.ones((3, 2), np.float32),
        rewards=[0.5, 1.5, 2.5],
        terminations=[False, False, True],
        truncations=[False, False, False],
    )
    env = own_envs.WideEnv
    settings = {"observation_space": env.observation_space, "action_space": env.action_space}
    if has_environment:
        settings = {"env": "Wide-v0", "ref_min_score": 10.0, "ref_max_score": 60.0}
    minari.create_dataset_from_buffers("tests/wide-v0", [episode, episode], **settings)
    train(script, "--env-id tests/wide-v0 --dataset-path None --rewards oracle --no-scale-rewards")
    policy = script.Policy(np.load("run/policy_seed0.npz"))
    episode_return = policy(np.array([[0.0], [1.0], [2.0]])).sum()
    text = "trained, not evaluated"
    if has_environment:
        score = 100 * (episode_return - 10) / 50
        assert read_json("run/result.json")["mean"] == pytest.approx(score, rel=1e-4)
        text = f"score {score:.1f} over 1 seed(s)"
    assert capsys.readouterr().out.endswith(f"result        {text}, in run/policy_seed*.npz\n")


# --- Weights & Biases ---
def test_weights_and_biases_offline():
    train(td3bc_imputed, f"{TWICE} --track --run-dir {Path('run').absolute()}")
    assert list(Path("run/wandb").glob("offline-run-*/*.wandb"))
    assert read_state()["track_id"]


@pytest.fixture
def wandb(monkeypatch):
    """Stands for wandb and for its run; holds what was logged."""
    run = SimpleNamespace(id="the first", Error=OSError, rows={})
    run.log = lambda row, step: run.rows.update({step: row})
    run.init = lambda **settings: vars(run).update(settings=settings) or run
    monkeypatch.setitem(sys.modules, "wandb", run)
    return run


def test_what_is_tracked_are_means_over_the_seeds(script, wandb, monkeypatch):
    update, losses = script.update, {"losses/critic_loss": torch.tensor([1.0, 3.0])}
    monkeypatch.setattr(script, "update", lambda *arguments: update(*arguments) | losses)
    train(script, f"{TWICE} --track")
    assert wandb.settings["config"]["batch_size"] == 16
    returns = np.reshape([float(row["return"]) for row in read_scores()], (2, 2))
    assert list(wandb.rows) == [4, 8]
    for row, pair in zip(wandb.rows.values(), returns):
        assert row["losses/critic_loss"] == 2.0
        assert "losses/actor_loss" in row
        assert row["charts/return"] == pytest.approx(pair.mean())

    Path("run/result.json").unlink()  # as if it had been killed before
    train(script, f"{TWICE} --track --resume")
    assert (wandb.settings["id"], wandb.settings["resume"]) == ("the first", "allow")


def test_tracking_without_an_account_is_one_line_and_the_run_dir_stays_free(wandb, assert_one_line):
    def refuse(**settings):
        raise wandb.Error("no API key configured")

    wandb.init = refuse
    assert_one_line(td3bc_imputed, "--track", "no API key.*WANDB_MODE=offline")
    train(td3bc_imputed)
