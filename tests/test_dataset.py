"""Datasets and what a policy acts in: D4RL, Minari, own files, own environments; what is refused.

The scripts share this text to the letter, so it is that of td3bc_imputed.py which is tested.
"""

import io
import shutil
import socket
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import gymnasium as gym
import h5py
import minari
import numpy as np
import own_envs
import pytest
import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces import Box
from minari.data_collector import EpisodeBuffer

import td3bc_imputed as script

BUNDLED = Path(__file__).parent / "data" / "halfcheetah-medium-replay-mini.hdf5"
NAN, INF = float("nan"), float("inf")
OBS_DIM, ACT_DIM = 11, 3  # Hopper's
pytestmark = pytest.mark.filterwarnings("ignore:env_spec is None:UserWarning")


# --- Files in D4RL's schema ---
def make_rows(num_rows=60, seed=0, **columns):
    """Columns of a Hopper-like file with ends of both kinds and an unfinished last episode."""
    rng = np.random.default_rng(seed)
    number = np.arange(num_rows)
    rows = {
        "observations": rng.normal(size=(num_rows, OBS_DIM)),
        "actions": rng.uniform(-1, 1, size=(num_rows, ACT_DIM)),
        "rewards": rng.normal(size=(num_rows, 1)),  # as D4RL's replay files: float64, (rows, 1)
        "terminals": np.isin(number, [4, 11, 30, 31]),
        "timeouts": np.isin(number, [7, 20, 21, 31, 45]),
    }
    return rows | columns


def random_ends(seed):
    rng = np.random.default_rng(seed)
    return {"terminals": rng.random(60) < 0.2, "timeouts": rng.random(60) < 0.2}


def without(rows, key):
    return {name: column for name, column in rows.items() if name != key}


def write_rows(rows, path="own.hdf5"):
    """A column may be a function that writes itself."""
    with h5py.File(path, "w") as file:
        for name, column in rows.items():
            if callable(column):
                column(file, name)
            else:
                file[name] = column
    return Path(path)


def load(rows, env_id=None):
    return script.load_dataset(env_id, write_rows(rows))


def load_as_d4rl(rows, monkeypatch):
    """By a D4RL name, from the cache."""
    Path("d4rl").mkdir(exist_ok=True)
    path = write_rows(rows, "d4rl/hopper_medium-v2.hdf5")
    digest = script.hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(script.SHA256, "hopper-medium-v2", digest)
    return script.load_dataset("hopper-medium-v2")


def assert_transitions(dataset, rows, kept, next_observations):
    """The dataset's columns are those of the kept rows, in episodes numbered without a hole."""
    ends = rows["terminals"] | rows["timeouts"]
    episodes = [int(np.count_nonzero(ends[:i])) for i in kept]
    numbers = sorted(set(episodes))
    expected = {
        "observations": np.float32(rows["observations"][kept]),
        "actions": np.float32(rows["actions"][kept]),
        "rewards": np.float32(rows["rewards"].reshape(-1)[kept]),
        "next_observations": np.float32(next_observations),
        "terminals": np.float32(rows["terminals"][kept]),
        "episode_ids": np.array([numbers.index(episode) for episode in episodes]),
    }
    for name, column in expected.items():
        found = getattr(dataset, name)
        np.testing.assert_array_equal(found, column, err_msg=name)
        assert found.dtype == column.dtype, name


def last_rows(dataset):
    """Of all episodes but the last."""
    return np.flatnonzero(np.diff(dataset.episode_ids)).tolist()


def labelled_rows(dataset):
    return np.flatnonzero(~np.isnan(dataset.rewards)).tolist()


# --- D4RL's names ---
def assert_d4rl_rule(dataset, rows):
    """As d4rl.qlearning_dataset: no timeouts, nor the last row; the next row is what follows."""
    kept = [i for i in range(59) if not rows["timeouts"][i]]
    following = [rows["observations"][i + 1] for i in kept]
    assert_transitions(dataset, rows, kept, following)


@pytest.mark.parametrize("seed", range(3))
def test_a_d4rl_name_keeps_d4rls_rule_to_the_row(seed, monkeypatch, capsys):
    rows = make_rows(seed=seed)
    if seed > 0:
        rows |= random_ends(seed)
    dataset = load_as_d4rl(rows, monkeypatch)
    assert_d4rl_rule(dataset, rows)
    assert dataset.name == "hopper-medium-v2"
    assert dataset.env == "Hopper-v4"
    assert (dataset.ref_min, dataset.ref_max) == (-20.272305, 3234.3)
    assert capsys.readouterr().out == "", "what the rule drops is no news"


@pytest.mark.parametrize("what", ["next observations", "terminals that are timeouts", "a last end"])
def test_d4rls_rule_holds_whatever_the_file_has(what, monkeypatch):
    rows = make_rows()
    if what == "next observations":
        rows["next_observations"] = rows["observations"] + 1
    elif what == "terminals that are timeouts":
        rows["timeouts"] = rows["terminals"]
    else:
        rows["terminals"][-1] = True
    assert_d4rl_rule(load_as_d4rl(rows, monkeypatch), rows)


def test_the_bundled_dataset_is_the_default():
    dataset = script.load_dataset()
    assert dataset.name == "halfcheetah-medium-replay-mini"
    assert dataset.env == "HalfCheetah-v4"
    assert (dataset.ref_min, dataset.ref_max) == (-280.178953, 12135.0)
    assert dataset.observations.shape == (99_900, 17)
    assert dataset.actions.shape == (99_900, 6)
    assert dataset.episode_ids[-1] == 99
    assert not dataset.terminals.any()
    assert not np.isnan(dataset.rewards).any()
    with h5py.File(BUNDLED) as file:
        assert np.array_equal(dataset.actions[:999], file["actions"][:999])


def test_every_d4rl_name_has_its_file_in_the_d4rl_cache(tmp_path, monkeypatch):
    asked = []

    def refuse(url, path, hash_prefix):
        asked.append((url, path))
        raise OSError("refused")

    monkeypatch.setattr(script.torch.hub, "download_url_to_file", refuse)
    names = [name for name in script.SHA256 if name != script.BUNDLED]
    assert len(names) == 9
    for env_id in names:
        with pytest.raises(script.UserError, match="by hand"):
            script.load_dataset(env_id)
    assert len(asked) == 18
    assert asked[0][0].startswith("https://rail.eecs.berkeley.edu/")
    file = "walker2d_medium_replay-v2.hdf5"
    mirror = f"https://huggingface.co/datasets/imone/D4RL/resolve/main/{file}"
    assert (mirror, str(tmp_path / "d4rl" / file)) in asked
    files = {Path(path).name for _, path in asked}
    tasks, kinds = ("halfcheetah", "hopper", "walker2d"), ("", "_replay", "_expert")
    assert files == {f"{task}_medium{kind}-v2.hdf5" for task in tasks for kind in kinds}


def test_d4rl_files_are_looked_for_where_the_d4rl_package_keeps_them(tmp_path, monkeypatch):
    monkeypatch.delenv("D4RL_DATASET_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / ".d4rl" / "datasets"
    folder.mkdir(parents=True)
    path = write_rows(make_rows(), folder / "hopper_medium-v2.hdf5")
    digest = script.hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(script.SHA256, "hopper-medium-v2", digest)
    assert script.find_file("hopper-medium-v2") == path


def test_a_cached_file_is_used_only_if_every_byte_is_right():
    Path("d4rl").mkdir()
    write_rows(make_rows(), "d4rl/hopper_medium-v2.hdf5")
    with pytest.raises(script.UserError, match="hopper_medium-v2.hdf5 has SHA-256 .* delete it"):
        script.load_dataset("hopper-medium-v2")


def test_a_flipped_bit_in_a_pinned_file_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "__file__", str(tmp_path / "script.py"))
    path = tmp_path / "tests" / "data" / BUNDLED.name
    path.parent.mkdir(parents=True)
    shutil.copy(BUNDLED, path)
    assert script.find_file(script.BUNDLED) == path
    content = bytearray(BUNDLED.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(script.UserError, match="SHA-256"):
        script.load_dataset()


# --- Downloads ---
class Host(BaseHTTPRequestHandler):
    """A download host on loopback; the fixture says what it answers to each path."""

    def do_GET(self):
        status, headers, body = self.answers[self.path.split("/")[1]]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


BAD_ANSWERS = pytest.mark.parametrize("bad", ["html", "cut", "wrong", "403", "404"])


@pytest.fixture
def host(monkeypatch):
    """Serves a file and five kinds of something else; stands for both hosts, and pins the file."""
    content = write_rows(make_rows(), "served.hdf5").read_bytes()
    length = {"Content-Length": len(content)}
    Host.answers = {
        "good": (200, length, content),
        "html": (200, {}, b"<html>please log in</html>"),
        "cut": (200, length, content[: len(content) // 2]),
        "wrong": (200, {}, content[:-1] + b"?"),
        "403": (403, {}, b""),
        "404": (404, {}, b""),
    }
    server = ThreadingHTTPServer(("127.0.0.1", 0), Host)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    digest = script.hashlib.sha256(content).hexdigest()
    monkeypatch.setitem(script.SHA256, "hopper-medium-v2", digest)

    def serve(*answers):
        urls = [f"http://127.0.0.1:{server.server_port}/{answer}/" for answer in answers]
        monkeypatch.setattr(script, "D4RL_URLS", urls)

    yield serve
    server.shutdown()
    thread.join()
    server.server_close()
    socket.setdefaulttimeout(None)


@BAD_ANSWERS
def test_a_failing_host_hands_over_to_the_mirror(host, bad):
    host(bad, "good")
    assert len(script.load_dataset("hopper-medium-v2").rewards) == 54
    assert [path.name for path in Path("d4rl").iterdir()] == ["hopper_medium-v2.hdf5"]


@BAD_ANSWERS
def test_no_good_host_leaves_nothing_behind_and_says_what_to_do(host, bad):
    host(bad, bad)
    advice = r"hopper_medium-v2.hdf5 by hand.*halfcheetah-medium-replay-mini"
    with pytest.raises(script.UserError, match=advice):
        script.load_dataset("hopper-medium-v2")
    assert list(Path("d4rl").iterdir()) == []


def test_downloads_of_the_same_file_at_once_do_not_disturb_each_other(host):
    host("good", "good")
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(script.find_file, ["hopper-medium-v2"] * 4))
    assert len(set(paths)) == 1
    assert [path.name for path in Path("d4rl").iterdir()] == ["hopper_medium-v2.hdf5"]
    assert len(script.load_dataset("hopper-medium-v2").rewards) == 54


@BAD_ANSWERS
def test_a_download_leaves_the_timeout_of_other_sockets_as_it_was(host, bad):
    host(bad, "good")
    socket.setdefaulttimeout(77)
    script.find_file("hopper-medium-v2")
    assert socket.getdefaulttimeout() == 77


def test_no_network_says_what_to_do(monkeypatch):
    monkeypatch.setattr(script, "D4RL_URLS", ["http://127.0.0.1:9/"])
    with pytest.raises(script.UserError, match="Connection refused.*by hand"):
        script.load_dataset("hopper-medium-v2")


# --- Own files: which rows are transitions ---
@pytest.mark.parametrize("has_next", [False, True], ids=["", "next_observations"])
@pytest.mark.parametrize("seed", range(3))
def test_a_row_is_dropped_only_if_its_next_observation_is_unknown_and_needed(seed, has_next):
    rows = make_rows(seed=seed)
    if seed > 0:
        rows |= random_ends(seed)
    following = np.vstack([rows["observations"][1:], rows["observations"][-1:]])
    kept = []
    for i in range(60):
        is_cut = rows["timeouts"][i] or i == 59
        if has_next or rows["terminals"][i] or not is_cut:
            kept.append(i)
    if has_next:
        following = np.random.default_rng(9).normal(size=(60, OBS_DIM))
        rows["next_observations"] = following
    assert_transitions(load(rows), rows, kept, following[kept])


def test_a_terminal_row_is_kept_whatever_timeouts_says_and_wherever_it_stands():
    done = np.arange(60) % 6 == 5  # written to both columns; the last row is one
    dataset = load(make_rows(terminals=done, timeouts=done))
    assert len(dataset.rewards) == 60
    assert np.array_equal(dataset.terminals == 1, done)
    assert dataset.episode_ids[-1] == 9


def test_of_a_thinned_out_log_every_row_is_kept_with_its_own_next_observation():
    log = make_rows(600)
    rows = {name: column[::10] for name, column in log.items()}
    rows["next_observations"] = log["observations"][1::10]
    dataset = load(rows)
    assert len(dataset.rewards) == 60
    expected = np.float32(log["observations"][1::10])
    np.testing.assert_array_equal(dataset.next_observations, expected)


def test_episodes_of_a_single_row_are_episodes():
    ends = np.ones(60, bool)
    dataset = load(make_rows(terminals=ends, timeouts=~ends))
    assert dataset.episode_ids.tolist() == list(range(60))
    assert dataset.terminals.all()


def test_rows_that_are_dropped_are_counted_with_the_labels_on_them(capsys):
    rewards = np.full(60, NAN)
    rewards[[0, 1, 2, 7, 20, 31]] = 1  # 7 and 20 are dropped; 31 is terminal as well
    load(make_rows(rewards=rewards))
    said = "dropped       5 rows without a next observation, 2 of them labelled\n"
    assert capsys.readouterr().out == said


def test_where_nothing_is_dropped_nothing_is_said(capsys):
    load(make_rows(next_observations=np.zeros((60, OBS_DIM))))
    assert capsys.readouterr().out == ""


def test_a_log_scored_in_the_last_row_of_each_episode_keeps_its_labels_if_these_are_terminal():
    last = np.arange(60) % 6 == 5
    rewards = np.where(last, 1.0, NAN)
    neither = np.zeros(60, bool)
    dataset = load(make_rows(rewards=rewards, terminals=last, timeouts=neither))
    assert labelled_rows(dataset) == np.flatnonzero(last).tolist()
    message = "all 10 labels are on rows whose next observation is unknown"
    with pytest.raises(script.UserError, match=f"{message}.*add the column next_observations"):
        load(make_rows(rewards=rewards, terminals=neither, timeouts=last))


def test_rewards_of_dropped_rows_may_be_anything():
    """Nobody reads them."""
    rewards = make_rows()["rewards"]
    rewards[7], rewards[20], rewards[59] = NAN, INF, 1e300
    assert np.isfinite(load(make_rows(rewards=rewards)).rewards).all()


def test_without_timeouts_terminals_must_tell_where_the_last_episode_ends():
    rows = without(make_rows(), "timeouts")
    message = "no timeouts, and terminals do not say .* add the column timeouts, 1 in the last row"
    with pytest.raises(script.UserError, match=message):
        load(rows)
    rows["terminals"][59] = True
    dataset = load(rows)
    assert len(dataset.rewards) == 60
    assert last_rows(dataset) == [4, 11, 30, 31]


def test_without_timeouts_an_own_next_observation_tells_where_an_episode_was_cut():
    rows = make_rows()
    following = np.roll(rows["observations"], -1, axis=0)
    following[rows["timeouts"], 5] = 0  # a single feature tells
    dataset = load(without(rows, "timeouts") | {"next_observations": following})
    ends = np.flatnonzero(rows["terminals"] | rows["timeouts"])
    assert last_rows(dataset) == ends.tolist()


def test_a_thinned_out_log_without_timeouts_is_no_heap_of_episodes_of_one_row():
    """Scaled by their returns, as IQL does, rewards would grow a hundredfold."""
    rows = without(make_rows(), "timeouts")
    dataset = load(rows | {"next_observations": rows["observations"] + 1})
    assert last_rows(dataset) == [4, 11, 30, 31]


def test_columns_of_any_type_of_number_are_read():
    whole = np.arange(60)
    kinds = {
        "observations": np.ones((60, OBS_DIM), np.uint8),
        "actions": np.zeros((60, ACT_DIM), ">f8"),
        "rewards": whole,
        "terminals": np.where(whole == 59, 255, 0)[:, None],
        "timeouts": np.zeros(60, np.float16),
    }
    dataset = load(kinds)
    assert dataset.rewards.tolist() == whole.tolist()
    assert np.flatnonzero(dataset.terminals).tolist() == [59]


def test_what_else_a_file_holds_is_left_alone():
    def write_group(file, name):
        file.create_group(name)["observations"] = "a word"

    assert len(load(make_rows(metadata=write_group, infos=write_group)).rewards) == 55


MANY = 2_000_000  # rows


def many_rows(**columns):
    rows = {
        "observations": np.zeros((MANY, 1), np.float32),
        "actions": np.zeros((MANY, 1), np.float32),
        "rewards": np.zeros(MANY, np.float32),
        "terminals": np.zeros(MANY, bool),
        "timeouts": np.zeros(MANY, bool),
    }
    return rows | columns


@pytest.mark.parametrize("chunks", [True, None], ids=["chunks", "one block"])
def test_ends_that_are_left_unwritten_are_zeros(chunks):
    """As files of a recorder are in which no episode ever ended."""

    def declare(file, name):
        file.create_dataset(name, (MANY,), bool, chunks=chunks)

    dataset = load(many_rows(terminals=declare, timeouts=declare))
    assert len(dataset.rewards) == MANY - 1
    assert not dataset.terminals.any()


def test_of_rewards_nan_may_be_left_unwritten():
    def write_few(file, name):
        settings = {"chunks": (1000,), "fillvalue": NAN}
        file.create_dataset(name, (MANY,), "f4", **settings)[:10] = range(10)

    dataset = load(many_rows(rewards=write_few))
    assert labelled_rows(dataset) == list(range(10))


def test_an_own_file_is_named_by_its_environment_or_by_itself():
    assert load(make_rows(), "Wide-v0").name == "Wide-v0"
    assert load(make_rows()).name == "own"
    assert script.load_dataset(None, "own.hdf5").name == "own", "a path may be text"


# --- Own files: their environments ---
def test_an_own_file_may_name_a_d4rl_task_for_environment_and_references():
    for env_id in ("hopper-medium-v2", "hopper-own"):
        dataset = load(make_rows(), env_id)
        assert dataset.env == "Hopper-v4"
        assert (dataset.ref_min, dataset.ref_max) == (-20.272305, 3234.3)
        assert script.make_task(dataset, None).env_spec.id == "Hopper-v4"


def test_references_are_those_of_d4rl():
    assert script.D4RL_TASKS == {
        "halfcheetah": ("HalfCheetah-v4", -280.178953, 12135.0),
        "hopper": ("Hopper-v4", -20.272305, 3234.3),
        "walker2d": ("Walker2d-v4", 1.629008, 4592.3),
    }


def test_an_environment_that_is_only_called_like_a_d4rl_task_is_itself(monkeypatch):
    env_id = "hopper-own-v0"
    monkeypatch.setitem(gym.registry, env_id, EnvSpec(env_id, own_envs.WideEnv))
    dataset = load(make_rows(), env_id)
    assert dataset.env == env_id
    assert np.isnan([dataset.ref_min, dataset.ref_max]).all()


def wide_rows(**columns):
    """Of Wide-v0: actions between 0 and 10."""
    rng = np.random.default_rng(0)
    actions = rng.uniform(0, 10, size=(60, 2))
    return make_rows(observations=np.zeros((60, 1)), actions=actions, **columns)


OWN_PACKAGE = """
import gymnasium as gym
import own_envs

gym.register("odd/Base-v0", own_envs.WideEnv)
"""


@pytest.mark.parametrize("env_id", ["odd/Base-v0", "own_package:odd/Base-v0"])
def test_an_own_file_takes_any_gymnasium_id_and_never_asks_minari(env_id, tmp_path, monkeypatch):
    (tmp_path / "own_package.py").write_text(OWN_PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(minari, "load_dataset", None)
    monkeypatch.setattr(minari, "list_local_datasets", None)
    monkeypatch.delitem(gym.registry, "odd/Base-v0", raising=False)
    if env_id == "odd/Base-v0":
        monkeypatch.setitem(gym.registry, env_id, EnvSpec(env_id, own_envs.WideEnv))
    dataset = load(wide_rows(), env_id)
    assert dataset.env == env_id
    assert np.isnan([dataset.ref_min, dataset.ref_max]).all()
    task = script.make_task(dataset, None)
    assert task.env_spec.id == "odd/Base-v0"
    assert task.low.tolist() == [0, 0]
    assert task.high.tolist() == [10, 10]


def test_without_an_environment_the_bounds_are_those_of_the_log():
    actions = np.random.default_rng(0).normal(size=(60, 3))
    actions[:, 1] = 0.1
    task = script.make_task(load(make_rows(actions=actions)), None)
    assert task.env_spec is None
    kept = np.float32(np.delete(actions, [7, 20, 21, 45, 59], axis=0))
    np.testing.assert_array_equal(task.low, kept.min(axis=0))
    np.testing.assert_array_equal(task.high, kept.max(axis=0))
    assert script.scale_actions(kept, task)[:, 1].tolist() == [0] * 55, "a dimension without range"
    for output in (-100, 0, 100):
        action = act(task, output)
        assert (task.low <= action).all()
        assert (action <= task.high).all()


def test_another_environment_to_evaluate_in_has_no_references():
    dataset = load(make_rows(), "hopper-own")
    task = script.make_task(dataset, "Hopper-v5")
    assert task.env_spec.id == "Hopper-v5"
    assert script.metric_of(task) == "return"
    own = script.make_task(dataset, None)
    assert (own.ref_min, own.ref_max) == (dataset.ref_min, dataset.ref_max)


def test_loading_makes_no_environment(monkeypatch):
    make_minari("tests/wide-v0")
    monkeypatch.setattr(gym, "make", None)
    script.load_dataset()
    script.load_dataset("tests/wide-v0")
    load(make_rows(), "hopper-own")
    load(make_rows(), "no_such_package:Env-v0")


# --- Bounds of actions ---
def make_policy(task, output):
    """A policy whose actor gives tanh(output), whatever it sees."""
    generators = script.make_generators(range(1), stream=2)
    mean, std = torch.zeros(1, 1, 1), torch.ones(1, 1, 1)
    actor = script.MLP([1], mean, std, 8, len(task.low), generators)
    torch.nn.init.zeros_(actor.layer3.weight)
    torch.nn.init.constant_(actor.layer3.bias, output)
    (policy,) = script.make_policies(actor, task)
    return policy


def act(task, output):
    return make_policy(task, output)(np.zeros(1))


@pytest.fixture
def register(monkeypatch):
    """Own-v0, for the test's duration: Wide-v0 but for what is given."""

    def register(**attributes):
        env_class = type("OwnEnv", (own_envs.WideEnv,), attributes)
        monkeypatch.setitem(gym.registry, "Own-v0", EnvSpec("Own-v0", env_class))

    return register


def make_own_task(actions):
    """Of a log of these actions in Own-v0."""
    num_rows = len(actions)
    rows = {
        "observations": np.zeros((num_rows, 1)),
        "actions": actions,
        "rewards": np.zeros(num_rows),
        "terminals": np.ones(num_rows),
    }
    return script.make_task(load(rows, "Own-v0"), None)


def make_box(low, high, dtype):
    return Box(np.array(low, dtype), np.array(high, dtype), dtype=dtype)


FAR = [1000.13, 500.0], [1000.31, 500.2]
BOXES = {
    "float32": Box(0, 10, (2,), np.float32),
    "float64, far from zero": make_box(*FAR, np.float64),
    "float32, far from zero": make_box(*FAR, np.float32),
    "asymmetric": make_box([-0.3, 0.1], [0.92, 0.7], np.float32),
    "asymmetric, float64": make_box([-0.7, -1.1], [0.92, 1.3], np.float64),
    "one dimension": Box(-1, 2, (1,), np.float32),
    "a dimension without range": make_box([0.3, 0], [0.3, 1], np.float32),
    "float16": make_box([0.1, -60000], [7, 60000], np.float16),
    "all of float32": Box(-3e38, 3e38, (2,), np.float32),
    "int64": Box(-5, 9, (2,), np.int64),
    "int8": Box(-128, 127, (2,), np.int8),
    "uint8": Box(0, 255, (2,), np.uint8),
    "int32": Box(-(2**31), 2**31 - 1, (2,), np.int32),
}
EVERY_BOX = pytest.mark.parametrize("space", BOXES.values(), ids=BOXES)


def take_any_action(env, action):
    return np.zeros(1), 0.0, True, False, {}


@EVERY_BOX
def test_the_bounds_of_a_box_of_any_kind_are_scaled_to_1(space, register):
    register(action_space=space, step=take_any_action)
    space.seed(0)
    log = np.float64([space.low, space.high, space.sample()])
    scaled = script.scale_actions(log, make_own_task(log))
    assert np.abs(scaled).max() <= 1
    has_range = space.high > space.low
    assert (scaled[0, has_range] == -1).all()
    assert (scaled[1, has_range] == 1).all()
    assert (scaled[:, ~has_range] == 0).all()


@pytest.mark.filterwarnings("error::RuntimeWarning")
@EVERY_BOX
def test_a_policy_reaches_the_bounds_of_a_box_of_any_kind_and_never_leaves_them(space, register):
    register(action_space=space, step=take_any_action)
    task = make_own_task([space.low, space.high])
    low, high = np.float64(space.low), np.float64(space.high)
    coarseness = 0.5 if space.dtype.kind in "iu" else 0
    tolerance = 1e-3 if space.dtype == np.float16 else 1e-6
    for output in (-100, -1.5, -0.2, 0, 0.3, 1, 100):
        action = act(task, output)
        assert space.contains(action), action
        assert action.dtype == space.dtype
        expected = low + (np.tanh(output) + 1) / 2 * (high - low)
        np.testing.assert_allclose(action, expected, atol=coarseness, rtol=tolerance)
    np.testing.assert_array_equal(act(task, -100), space.low)
    np.testing.assert_array_equal(act(task, 100), space.high)


def test_actions_within_rounding_of_the_bounds_pass(register):
    register(action_space=make_box([-0.7, 0.1], [0.7, 0.1], np.float64))
    make_own_task(np.float32([[-0.7, 0.1], [0.7, 0.1]]))
    make_own_task([[-0.7 - 5e-6, 0.1], [0.7, 0.1 + 5e-8]])


@pytest.mark.parametrize("dimension", [0, 1], ids=["a range", "no range"])
def test_actions_beyond_the_bounds_are_refused(register, dimension):
    register(action_space=make_box([-0.7, 0.1], [0.7, 0.1], np.float32))
    actions = np.tile([0.0, 0.1], (5, 1))
    make_own_task(actions)
    actions[3, dimension] = 0.8
    with pytest.raises(script.UserError, match="actions, .* to .*, beyond the bounds of Own-v0"):
        make_own_task(actions)


# --- Own environments that are no match, or behave oddly ---
def returning(observation, reward=1.0):
    """The methods of an environment that returns these, from reset and from step."""
    return {
        "reset": lambda env, seed=None, options=None: (observation, {}),
        "step": lambda env, action: (observation, reward, True, False, {}),
    }


def fail(env, *args, **kwargs):
    raise ZeroDivisionError("the robot\nis off")


def reset_of_old(env, seed=None, options=None):
    return np.zeros(1)


def step_of_old(env, action):
    return np.zeros(1), 0.0, True, {}


NAMED_SPACE = gym.spaces.Dict(x=Box(-9, 9, (1,), np.float64))
BROKEN = {
    "discrete actions": ({"action_space": gym.spaces.Discrete(2)}, "1-D Box"),
    "binary actions": ({"action_space": gym.spaces.MultiBinary(2)}, "1-D Box"),
    "a table of actions": ({"action_space": Box(0, 1, (2, 1))}, "1-D Box"),
    "a single number": ({"action_space": Box(0, 1, ())}, "1-D Box"),
    "dict observations": ({"observation_space": NAMED_SPACE}, "1-D Box"),
    "no bounds": ({"action_space": Box(-INF, INF, (2,))}, "have no bounds"),
    "no upper bound": ({"action_space": Box(0, INF, (2,))}, "have no bounds"),
    "other actions": ({"action_space": Box(0, 10, (3,))}, "the dataset has shapes"),
    "other observations": ({"observation_space": Box(0, 1, (4,))}, "the dataset has shapes"),
    "no space": ({"action_space": None}, "cannot make the environment"),
    "no constructor": ({"__init__": fail}, "cannot make the environment.*the robot"),
    "old reset": ({"reset": reset_of_old}, "fails in reset or step"),
    "reset without a seed": ({"reset": lambda env: (np.zeros(1), {})}, "fails in reset or step"),
    "old step": ({"step": step_of_old}, "fails in reset or step"),
    "a failing reset": ({"reset": fail}, "fails in reset or step: ZeroDivisionError"),
    "a failing step": ({"step": fail}, "fails in reset or step: ZeroDivisionError"),
    "other observations than said": (returning(np.zeros(2)), "returns shapes"),
    "observations in a row": (returning(np.zeros((1, 1))), "returns shapes"),
    "observations in a dict": (returning({"x": np.zeros(1)}), "returns shapes"),
    "no observation": (returning(None), "returns shapes"),
    "observations of no shape": (returning([np.zeros(2), 0.5]), "fails in reset or step"),
    "two rewards": (returning(np.zeros(1), np.ones(2)), "fails in reset or step"),
    "no reward": (returning(np.zeros(1), None), "fails in reset or step"),
}


@pytest.mark.parametrize(("attributes", "message"), BROKEN.values(), ids=BROKEN)
def test_an_environment_is_tried_and_what_is_wrong_is_said(register, attributes, message):
    register(**attributes)
    dataset = load(wide_rows(), "Own-v0")
    with pytest.raises(script.UserError, match=f"(?s){message}") as refused:
        script.make_task(dataset, None)
    assert "Own-v0" in str(refused.value)


VECTORS = [0.5], np.ones(1, np.uint8), np.zeros(1, np.float32)
NUMBERS = 1, True, np.float32(1), np.array(1.0), torch.tensor(1.0)


@pytest.mark.parametrize("observation", VECTORS)
@pytest.mark.parametrize("reward", NUMBERS)
def test_what_numpy_takes_for_vectors_and_numbers_will_do(register, observation, reward):
    register(**returning(observation, reward))
    task = script.make_task(load(wide_rows(), "Own-v0"), None)
    np.savez("policy.npz", **make_policy(task, 0))
    assert script.run_episode(Path("policy.npz"), task.env_spec, 100, []) == 1


@pytest.mark.parametrize("env_id", ["NoSuch-v0", "no_such_package:Env-v0", "a:b:c", "x/", ""])
def test_an_environment_that_cannot_be_made_is_named(env_id):
    dataset = load(wide_rows())
    with pytest.raises(script.UserError, match="cannot make the environment"):
        script.make_task(dataset._replace(env=env_id), None)
    if env_id:
        with pytest.raises(script.UserError, match=f"cannot make the environment.*{env_id}"):
            script.make_task(dataset, env_id)


def go_on(env, action):
    return np.zeros(1), 1.0, False, False, {}


@pytest.mark.parametrize("limit", [None, 7])
def test_an_episode_without_a_time_limit_is_cut_and_the_header_says_so(
    limit, register, monkeypatch, capsys
):
    register(step=go_on)
    gym.registry["Own-v0"].max_episode_steps = limit
    monkeypatch.setattr(script, "MAX_STEPS", 5)
    write_rows(wide_rows())
    options = "--dataset-path own.hdf5 --env-id Own-v0 --num-updates 2 --reward-epochs 1"
    options += " --eval-episodes 1 --label-fraction 0.5 --compile off --device cpu --run-dir run"
    script.main(script.tyro.cli(script.Args, args=options.split()))
    output = capsys.readouterr().out
    assert f"return {limit or 5}.0" in output.splitlines()[-1]
    said = "evaluation    Own-v0, cut after 5 steps: it has no time limit" in output
    assert said == (limit is None)


# --- Minari ---
WIDE_SPACES = {
    "observation_space": Box(-9, 9, (1,)),
    "action_space": Box(0, 10, (2,)),
}


def make_minari(dataset_id, env="Wide-v0", discrete=False, **columns):
    """Three episodes of 3, 2 and 4 steps, the first of which terminates.

    `columns` are functions of an episode's length, or settings of Minari's."""
    rng = np.random.default_rng(0)

    def draw_actions(length):
        if discrete:
            return rng.integers(0, 2, length)
        return rng.uniform(0, 10, (length, 2)).astype(np.float32)

    own = {name: column for name, column in columns.items() if callable(column)}
    settings = {name: column for name, column in columns.items() if not callable(column)}
    make = {
        "observations": lambda length: rng.normal(size=(length + 1, 1)),
        "actions": draw_actions,
        "rewards": lambda length: rng.normal(size=length),
        "terminations": lambda length: (np.arange(length) == length - 1) & (length == 3),
        "truncations": lambda length: (np.arange(length) == length - 1) & (length != 3),
    }
    episodes = []
    for length in (3, 2, 4):
        columns = {name: column(length) for name, column in (make | own).items()}
        episodes.append(EpisodeBuffer(**columns))
    if env is None:
        settings = WIDE_SPACES | settings
    minari.create_dataset_from_buffers(dataset_id, episodes, env=env, **settings)
    return episodes


def join(episodes, name, part=slice(None)):
    return np.float32(np.concatenate([getattr(episode, name)[part] for episode in episodes]))


def test_minari_episodes_lose_no_step_and_actions_stay_as_they_are():
    episodes = make_minari("tests/wide-v0", ref_min_score=-3.0, ref_max_score=7.0)
    dataset = script.load_dataset("tests/wide-v0")
    assert dataset.episode_ids.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]
    assert dataset.terminals.tolist() == [0, 0, 1, 0, 0, 0, 0, 0, 0]
    now, later = slice(None, -1), slice(1, None)
    np.testing.assert_array_equal(dataset.observations, join(episodes, "observations", now))
    np.testing.assert_array_equal(dataset.next_observations, join(episodes, "observations", later))
    np.testing.assert_array_equal(dataset.actions, join(episodes, "actions"))
    np.testing.assert_array_equal(dataset.rewards, join(episodes, "rewards"))
    assert {column.dtype for column in dataset[:5]} == {np.dtype(np.float32)}
    assert dataset.name == "tests/wide-v0"

    task = script.make_task(dataset, None)
    assert task.env_spec.id == "Wide-v0"
    assert (task.ref_min, task.ref_max) == (-3.0, 7.0)
    expected = join(episodes, "actions") / 5 - 1
    np.testing.assert_allclose(script.scale_actions(dataset.actions, task), expected, atol=1e-6)


@pytest.mark.parametrize("references", [{}, {"ref_min_score": 1.0, "ref_max_score": 1.0}])
def test_without_references_or_with_equal_ones_minari_reports_raw_returns(references):
    make_minari("tests/wide-v0", **references)
    task = script.make_task(script.load_dataset("tests/wide-v0"), None)
    assert script.metric_of(task) == "return"


def test_a_minari_dataset_evaluates_in_its_evaluation_environment(monkeypatch):
    spec = EnvSpec("Judge-v0", "own_envs:WideEnv")
    monkeypatch.setitem(gym.registry, "Judge-v0", spec)
    make_minari("tests/wide-v0", eval_env="Judge-v0")
    task = script.make_task(script.load_dataset("tests/wide-v0"), None)
    assert task.env_spec.id == "Judge-v0"


def test_a_minari_dataset_without_an_environment_needs_none():
    episodes = make_minari("tests/nowhere-v0", env=None)
    dataset = script.load_dataset("tests/nowhere-v0")
    task = script.make_task(dataset, None)
    assert task.env_spec is None
    np.testing.assert_array_equal(task.low, join(episodes, "actions").min(axis=0))
    np.testing.assert_array_equal(task.high, join(episodes, "actions").max(axis=0))
    assert script.make_task(dataset, "Wide-v0").env_spec.id == "Wide-v0"
    with pytest.raises(script.UserError, match="Pendulum-v1"):
        script.make_task(dataset, "Pendulum-v1")


def test_a_minari_environment_of_a_missing_package_is_named_and_another_will_do():
    make_minari("tests/wide-v0")
    metadata = Path("minari/tests/wide-v0/data/metadata.json")
    metadata.write_text(metadata.read_text().replace("own_envs", "no_such_package"))
    dataset = script.load_dataset("tests/wide-v0")
    with pytest.raises(script.UserError, match="environment.*tests/wide-v0.*no_such_package"):
        script.make_task(dataset, None)
    assert script.make_task(dataset, "Wide-v0").env_spec.id == "Wide-v0"


def test_minari_spaces_that_are_no_vectors_are_refused_beside_any_environment():
    """As --eval-env-id stands for itself, it mends nothing in the dataset."""
    make_minari("tests/discrete-v0", env="Discrete-v0", discrete=True)
    make_minari(
        "tests/dict-v0",
        env=None,
        observations=lambda length: {"x": np.zeros((length + 1, 1))},
        observation_space=NAMED_SPACE,
    )
    for name in ("tests/discrete-v0", "tests/dict-v0"):
        options = ["--env-id", name, "--eval-env-id", "Wide-v0"]
        with pytest.raises(script.UserError, match=f"{name}: need continuous vectors"):
            script.main(script.tyro.cli(script.Args, args=options))


def test_minari_rewards_may_be_unlabelled_or_stand_in_a_column():
    def some(length):
        return np.where(np.arange(length) == 0, 1.0, NAN)[:, None]

    make_minari("tests/wide-v0", rewards=some)
    dataset = script.load_dataset("tests/wide-v0")
    assert dataset.rewards.shape == (9,)
    assert labelled_rows(dataset) == [0, 3, 5]


BAD_MINARI = {
    "too few rewards": ("different lengths", {"rewards": lambda length: np.zeros(length - 1)}),
    "too few ends": (
        "different lengths",
        {"terminations": lambda length: np.zeros(length - 1, bool)},
    ),
    "too few observations": (
        "different lengths",
        {"observations": lambda length: np.zeros((length, 1))},
    ),
    "observations of two widths": (
        "dimensions",
        {"observations": lambda length: np.zeros((length + 1, length))},
    ),
    "NaN observations": (
        "NaN or inf in observations",
        {"observations": lambda length: np.full((length + 1, 1), NAN)},
    ),
    "infinite rewards": ("inf in rewards", {"rewards": lambda length: np.full(length, INF)}),
}


@pytest.mark.parametrize(("message", "columns"), BAD_MINARI.values(), ids=BAD_MINARI)
def test_minari_columns_that_are_wrong_are_refused(message, columns):
    make_minari("tests/wide-v0", **columns)
    with pytest.raises(script.UserError, match=message):
        script.load_dataset("tests/wide-v0")


@pytest.mark.parametrize("file", ["main_data.hdf5", "metadata.json"])
def test_a_damaged_minari_dataset_is_refused_or_read_but_never_crashes(file):
    make_minari("tests/wide-v0")
    path = Path("minari/tests/wide-v0/data") / file
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for i in range(40):
        damaged = bytearray(content)
        start = rng.integers(min(len(damaged), 3000))  # the head is metadata
        damaged[start : start + 20] = rng.bytes(20)
        path.write_bytes(damaged)
        try:
            script.load_dataset("tests/wide-v0")
        except (script.UserError, OSError):
            refused += 1
    assert refused > 10


def test_a_folder_that_is_no_minari_dataset_hinders_none_that_is():
    make_minari("tests/wide-v0")
    shutil.copytree("minari/tests/wide-v0", "minari/tests/a copy")
    assert len(script.load_dataset("tests/wide-v0").rewards) == 9
    with pytest.raises(script.UserError, match="hoper-medium-v2: .*a copy"):
        script.load_dataset("hoper-medium-v2")


@pytest.mark.parametrize(
    ("env_id", "message"),
    [
        ("halfcheetah-medium-replay", "nearest: .*halfcheetah-medium-replay-v2"),
        ("hoper-medium-v2", "nearest: hopper-medium-v2"),
        ("mujoco/hopper/medium", "mujoco/hopper/medium has no version"),
        ("hopper-own", "unknown --env-id hopper-own"),
        ("Wide-v0", "unknown --env-id Wide-v0"),
        ("", "unknown --env-id"),
        ("tests/unknown-v0", "cannot load the Minari dataset tests/unknown-v0"),
        ("tests/..", "tests/.. has no version"),
        ("/", "/ has no version"),
    ],
)
def test_an_unknown_dataset_is_named_with_the_nearest_ones(env_id, message):
    with pytest.raises(script.UserError, match=message):
        script.load_dataset(env_id)


# --- Labels ---
def test_labels_are_one_percent_of_a_full_dataset_and_all_of_a_partly_labelled_one():
    rewards = np.arange(1000, dtype=np.float32)
    assert script.split_labels(rewards, None, range(2)).shape == (2, 10)
    assert script.split_labels(rewards, 0.0017, range(2)).shape == (2, 2), "rounded"
    rewards[200:] = NAN
    labeled = script.split_labels(rewards, None, range(2))
    assert np.array_equal(labeled, [np.arange(200)] * 2)


def test_labels_are_drawn_from_what_is_known_without_replacement_for_each_seed():
    rewards = np.arange(1000, dtype=np.float32)
    rewards[200:] = NAN
    labeled = script.split_labels(rewards, 0.25, range(3))
    assert labeled.shape == (3, 50)
    assert labeled.max() < 200
    for rows in labeled:
        assert len(set(rows)) == 50
    assert not np.array_equal(labeled[0], labeled[1])


def test_labels_do_not_depend_on_how_many_seeds_run():
    rewards = np.arange(1000, dtype=np.float32)
    together = script.split_labels(rewards, 0.1, range(3, 6))
    alone = script.split_labels(rewards, 0.1, range(4, 5))
    np.testing.assert_array_equal(together[1:2], alone)


def test_a_log_that_nobody_labelled_is_refused():
    with pytest.raises(script.UserError, match="every reward is NaN"):
        script.split_labels(np.full(9, np.float32(NAN)), None, range(2))


@pytest.mark.parametrize("fraction", [0.5, 1e-9], ids=["equal labels", "one label"])
def test_labels_that_teach_nothing_are_refused(fraction):
    rewards = np.arange(60.0) if fraction == 1e-9 else np.ones(60)
    dataset = load(make_rows(rewards=rewards))
    labeled = script.split_labels(dataset.rewards, fraction, range(2))
    with pytest.raises(script.UserError, match="labelled rewards are all equal: label more"):
        script.check_labels(dataset, labeled)


# --- Features in any unit ---
def standard_inputs(observations):
    """What the reward model sees of these, (rows, obs_dim)."""
    num_rows = len(observations)
    dataset = script.Dataset(
        observations=np.float32(observations),
        actions=np.zeros((num_rows, 1), np.float32),
        rewards=np.arange(num_rows, dtype=np.float32),
        **dict.fromkeys(["next_observations", "terminals", "episode_ids", "env"]),
        **dict.fromkeys(["ref_min", "ref_max", "name"]),
    )
    labeled = np.arange(2)[None]
    model = script.RewardModel(dataset, labeled, None, script.Args(reward_model="gp")).model
    inputs = model.inputs(torch.tensor(dataset.observations), torch.zeros(num_rows, 1))
    return inputs[:, :-1].numpy()


@pytest.mark.parametrize("value", [0, 0.1, -7, 1e-30, 1e8])
def test_a_constant_feature_is_nought_to_the_reward_model(value):
    assert not standard_inputs(np.full((1000, 1), value)).any()


@pytest.mark.parametrize("unit", [1e-6, 1, 1e9])
@pytest.mark.parametrize("offset", [0, -100])
def test_features_of_any_unit_and_offset_are_alike_to_the_reward_model(unit, offset):
    """Offsets are in units."""
    features = np.random.default_rng(0).normal(size=(1000, 2))
    expected = (features - features.mean(axis=0)) / features.std(axis=0)
    found = standard_inputs(unit * (features + offset))
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_statistics_of_many_rows_are_exact():
    """In float32, the mean of these is off in the fourth digit."""
    rng = np.random.default_rng(0)
    rows = np.float32(1000 + rng.normal(size=(1_000_000, 1)))
    mean, std = script.mean_and_std(torch.tensor(rows))
    assert mean.item() == pytest.approx(rows.mean(dtype=np.float64), rel=1e-12)
    assert std.item() == pytest.approx(rows.std(dtype=np.float64), rel=1e-9)


# --- What a file can be wrong in ---
def with_value(name, value):
    column = np.array(make_rows()[name], float)
    column.reshape(-1)[5] = value
    return {name: column}


def first_rows(count):
    return {name: column[:count] for name, column in make_rows().items()}


def write_group(file, name):
    file.create_group(name)


def write_empty(file, name):
    file[name] = h5py.Empty("f4")


def write_type(file, name):
    file[name] = np.dtype("f4")


def link_nowhere(file, name):
    file[name] = h5py.SoftLink("/nowhere")


NEITHER = np.zeros(60, bool)
BAD_COLUMNS = {
    "NaN observation": (with_value("observations", NAN), "NaN or inf in observations"),
    "inf observation": (with_value("observations", INF), "NaN or inf in observations"),
    "overflowing observation": (with_value("observations", 1e300), "NaN or inf in observations"),
    "NaN action": (with_value("actions", NAN), "NaN or inf in actions"),
    "inf reward": (with_value("rewards", INF), "inf in rewards"),
    "overflowing reward": (with_value("rewards", -1e300), "inf in rewards"),
    "NaN terminal": (with_value("terminals", NAN), "negative numbers in terminals"),
    "terminals of -1 and 1": (
        {"terminals": np.where(make_rows()["terminals"], 1, -1)},
        "negative numbers in terminals",
    ),
    "inf timeout": (with_value("timeouts", INF), "negative numbers in timeouts"),
    "NaN next observation": (
        {"next_observations": np.full((60, OBS_DIM), NAN)},
        "NaN or inf in next_observations",
    ),
    "other length": ({"rewards": np.zeros(59)}, "different lengths"),
    "next observations too few": ({"next_observations": np.zeros((59, 11))}, "different lengths"),
    "next observations too wide": ({"next_observations": np.zeros((60, 12))}, "next_observations"),
    "flat next observations": ({"next_observations": np.zeros(60)}, "shapes: next_observations"),
    "flat observations": ({"observations": np.zeros(60)}, "shapes: observations"),
    "no observation": ({"observations": np.zeros((60, 0))}, "shapes: observations"),
    "pictures": ({"observations": np.zeros((60, 8, 8))}, "shapes: observations"),
    "flat actions": ({"actions": np.zeros(60)}, "shapes: actions"),
    "rewards in columns": ({"rewards": np.zeros((60, 2))}, "shapes: rewards"),
    "rewards in a row": ({"rewards": np.zeros((1, 60))}, "shapes: rewards"),
    "scalar rewards": ({"rewards": 1.0}, "shapes: rewards"),
    "strings": ({"actions": np.array([[b"left"] * 3] * 60)}, "actions is not a numeric array"),
    "complex rewards": ({"rewards": np.zeros(60, complex)}, "rewards is not a numeric array"),
    "a group": ({"actions": write_group}, "actions is not a numeric array"),
    "a group of timeouts": ({"timeouts": write_group}, "timeouts is not a numeric array"),
    "an empty column": ({"rewards": write_empty}, "rewards is not a numeric array"),
    "a type": ({"rewards": write_type}, "rewards is not a numeric array"),
    "a dead link": ({"rewards": link_nowhere}, "not a readable HDF5 file with .*rewards"),
    "no rows": (first_rows(0), "no transitions"),
    "one row": (first_rows(1), "label.* on rows whose next observation is unknown"),
    "only timeouts": (
        {"timeouts": ~NEITHER, "terminals": NEITHER},
        "label.* on rows whose next observation is unknown",
    ),
    "no labels, only timeouts": (
        {"timeouts": ~NEITHER, "terminals": NEITHER, "rewards": np.full(60, NAN)},
        "no transitions",
    ),
}


@pytest.mark.parametrize(("columns", "message"), BAD_COLUMNS.values(), ids=BAD_COLUMNS)
def test_bad_columns_are_refused(columns, message):
    with pytest.raises(script.UserError, match=message):
        load(make_rows(**columns))


@pytest.mark.parametrize("key", ["observations", "actions", "rewards", "terminals"])
def test_a_missing_column_is_named(key):
    with pytest.raises(script.UserError, match=f"has no {key}, but "):
        load(without(make_rows(), key))


@pytest.mark.parametrize("tenth", range(10))
def test_a_truncated_file_is_refused(tenth):
    content = BUNDLED.read_bytes()
    Path("cut.hdf5").write_bytes(content[: len(content) * tenth // 10])
    with pytest.raises(script.UserError, match="not a readable HDF5"):
        script.load_dataset("halfcheetah-own", Path("cut.hdf5"))


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(script.UserError, match="nothing.hdf5: there is no such file"):
        script.load_dataset(None, Path("nothing.hdf5"))


@pytest.mark.parametrize("kind", ["text", "npz", "folder"])
def test_what_is_no_hdf5_file_is_refused(kind):
    path = Path("other.hdf5")
    if kind == "text":
        path.write_text("observations,actions\n1,2\n")
    elif kind == "npz":
        buffer = io.BytesIO()
        np.savez(buffer, **make_rows())
        path.write_bytes(buffer.getvalue())
    elif kind == "folder":
        path.mkdir()
    with pytest.raises(script.UserError, match="other.hdf5 is not a readable HDF5 file"):
        script.load_dataset(None, path)


def test_a_file_of_few_bytes_beside_it_that_promises_rows_is_refused():
    """HDF5 would read what lies beyond the end of the other file as zeros."""
    Path("raw").write_bytes(bytes(2400))

    def promise_rows(file, name):
        shape = (10**7, 3) if name in ("observations", "actions") else (10**7,)
        external = [("raw", 0, h5py.h5f.UNLIMITED)]
        file.create_dataset(name, shape, "f4", external=external)

    path = write_rows(dict.fromkeys(make_rows(), promise_rows))
    with pytest.raises(script.UserError, match="more than the file itself holds"):
        script.load_dataset(None, path)


def test_a_virtual_column_whose_file_is_gone_is_refused():
    """HDF5 would read its rows as zeros."""
    rows = make_rows()
    path = write_rows(rows)
    layout = h5py.VirtualLayout(rows["observations"].shape, "f4")
    layout[:] = h5py.VirtualSource("gone.hdf5", "observations", rows["observations"].shape)
    with h5py.File(path, "a") as file:
        del file["observations"]
        file.create_virtual_dataset("observations", layout)
    with pytest.raises(script.UserError, match="observations declares 60 rows, more than the file"):
        script.load_dataset(None, path)


def promise(path, num_rows, chunks):
    """A file that holds a thousand rows and says it has `num_rows`."""
    with h5py.File(path, "w") as file:
        for name, column in make_rows(1000).items():
            shape = (num_rows, *column.shape[1:])
            chunk = (100, *column.shape[1:]) if chunks else None
            promised = file.create_dataset(name, shape, "f4", chunks=chunk)
            if chunks:
                promised[:1000] = column
        file["something else"] = np.random.default_rng(0).normal(size=100_000)


@pytest.mark.parametrize("chunks", [True, False], ids=["chunks", "one block"])
@pytest.mark.parametrize("num_rows", [10**6, 10**9])
def test_a_file_that_promises_more_rows_than_it_holds_is_refused_unread(num_rows, chunks):
    """HDF5 would read what was never written as zeros, gigabytes of them."""
    promise("promise.hdf5", num_rows, chunks)
    tracemalloc.start()
    with pytest.raises(script.UserError, match="more than the file itself holds"):
        script.load_dataset(None, Path("promise.hdf5"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10_000_000


def test_wrong_layouts_are_refused_before_anything_is_read(monkeypatch):
    """All columns but the last are right."""
    path = write_rows(make_rows(timeouts=np.zeros((60, 2))))
    monkeypatch.setattr(h5py.Dataset, "__getitem__", None)
    monkeypatch.setattr(h5py.Dataset, "astype", None)
    with pytest.raises(script.UserError, match="timeouts is"):
        script.load_dataset(None, path)


def test_fuzzed_files_are_refused_or_read_but_never_crash():
    """Flipped bytes leave a dataset that passes every check, or end in one UserError."""
    path = write_rows(make_rows())
    content = bytearray(path.read_bytes())
    rng, outcomes = np.random.default_rng(0), {"read": 0, "refused": 0}
    for _ in range(300):
        damaged = content.copy()
        for position in rng.integers(len(content), size=rng.integers(1, 20)):
            damaged[position] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            dataset = script.load_dataset(None, path)
        except script.UserError:
            outcomes["refused"] += 1
            continue
        outcomes["read"] += 1
        assert np.isfinite(dataset.observations).all()
        assert np.isfinite(dataset.next_observations).all()
        assert len({len(column) for column in dataset[:6]}) == 1
    assert min(outcomes.values()) > 10, outcomes
