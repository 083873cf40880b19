"""Datasets: the D4RL rule against the plain loop, Minari, own files, labels, and every way a file can be wrong."""

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import gymnasium as gym
import h5py
import minari
import numpy as np
import own_envs  # noqa: F401, registers Wide-v0 and Discrete-v0
import pytest
from minari.data_collector import EpisodeBuffer

import td3bc_imputed as script

BUNDLED = Path(__file__).parent / "data" / "halfcheetah-medium-replay-mini.hdf5"
OBS_DIM, ACT_DIM = 11, 3  # Hopper's


def make_rows(num_rows=60, seed=0, **columns):
    """Columns of a Hopper-like file with terminals, timeouts and an unfinished last episode."""
    rng = np.random.default_rng(seed)
    rows = {
        "observations": rng.normal(size=(num_rows, OBS_DIM)),
        "actions": rng.uniform(-1, 1, size=(num_rows, ACT_DIM)),
        "rewards": rng.normal(size=(num_rows, 1)),  # as D4RL's replay files: float64, (rows, 1)
        "terminals": np.isin(np.arange(num_rows), [4, 11, 30, 31]),
        "timeouts": np.isin(np.arange(num_rows), [7, 20, 21, 31, 45]),
    }
    return rows | columns


def write_rows(path, rows):
    with h5py.File(path, "w") as file:
        for name, column in rows.items():
            file[name] = column
    return path


def plain_loop(rows):
    """d4rl.qlearning_dataset, row by row; an episode is what lies between terminals and timeouts."""
    transitions, episode = [], 0
    for i in range(len(rows["rewards"]) - 1):
        if not rows["timeouts"][i]:
            keep = [rows["observations"][i], rows["actions"][i], rows["rewards"].reshape(-1)[i]]
            transitions.append([*keep, rows["observations"][i + 1], bool(rows["terminals"][i]), episode])
        if rows["terminals"][i] or rows["timeouts"][i]:
            episode += 1
    numbers = {old: new for new, old in enumerate(sorted({row[-1] for row in transitions}))}
    for row in transitions:
        row[-1] = numbers[row[-1]]
    return [np.array(column) for column in zip(*transitions)]


def load(path, env_id="hopper-own"):
    return script.load_dataset(env_id, path)


@pytest.mark.parametrize("seed", range(3))
def test_rows_follow_the_d4rl_rule(tmp_path, seed):
    rng = np.random.default_rng(seed)
    rows = make_rows(seed=seed)
    if seed:
        rows |= {"terminals": rng.random(60) < 0.2, "timeouts": rng.random(60) < 0.2}
    dataset = load(write_rows(tmp_path / "rows.hdf5", rows))
    for column, expected in zip(dataset[:6], plain_loop(rows), strict=True):
        np.testing.assert_array_equal(column, expected.astype(column.dtype))
        assert column.dtype == (np.int64 if column is dataset.episode_ids else np.float32)
    assert set(np.diff(dataset.episode_ids)) <= {0, 1}, "episode_ids have a hole"
    assert dataset.env_spec.id == "Hopper-v4"
    assert (dataset.ref_min, dataset.ref_max) == (-20.272305, 3234.3)


def test_the_bundled_dataset_loads_anywhere(tmp_path):
    dataset = script.load_dataset(script.BUNDLED)
    assert dataset.observations.shape == (99_900, 17) and dataset.actions.shape == (99_900, 6)
    assert dataset.episode_ids[-1] == 99 and not dataset.terminals.any() and not np.isnan(dataset.rewards).any()
    with h5py.File(BUNDLED) as file:
        assert np.array_equal(dataset.actions[:999], file["actions"][:999]), "scaling is not the identity"
    assert not (tmp_path / "MUJOCO_LOG.TXT").exists()


def test_every_d4rl_name_has_its_file_in_the_d4rl_cache(tmp_path, monkeypatch):
    asked = []

    def refuse(url, path, hash_prefix):
        asked.append((url, path))
        raise OSError("refused")

    monkeypatch.setattr(script.torch.hub, "download_url_to_file", refuse)
    for env_id in script.SHA256:
        if env_id != script.BUNDLED:
            with pytest.raises(script.UserError, match="by hand"):
                script.find_file(env_id)
    assert len(asked) == 18 and asked[0][0].startswith("https://rail.eecs.berkeley.edu/")
    assert ("https://huggingface.co/datasets/imone/D4RL/resolve/main/walker2d_medium_replay-v2.hdf5",
            str(tmp_path / "d4rl" / "walker2d_medium_replay-v2.hdf5")) in asked  # fmt: skip


def test_a_d4rl_name_reads_the_cached_file_and_checks_every_byte(tmp_path, monkeypatch):
    path = tmp_path / "d4rl" / "hopper_medium-v2.hdf5"
    path.parent.mkdir()
    write_rows(path, make_rows())
    with pytest.raises(script.UserError, match="SHA-256"):
        script.load_dataset("hopper-medium-v2")
    digest = script.hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(script.SHA256, "hopper-medium-v2", digest)
    assert len(script.load_dataset("hopper-medium-v2").rewards) == len(plain_loop(make_rows())[0])


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


@pytest.fixture
def host(tmp_path, monkeypatch):
    """Serves /good, /html, /cut, /wrong, /403 and /404, and takes over the two download places and a file's hash."""
    content = write_rows(tmp_path / "served.hdf5", make_rows()).read_bytes()
    Host.answers = {
        "good": (200, {"Content-Length": len(content)}, content),
        "html": (200, {}, b"<html>please log in</html>"),
        "cut": (200, {"Content-Length": len(content)}, content[: len(content) // 2]),
        "wrong": (200, {}, content[:-1] + b"?"),
        "403": (403, {}, b""),
        "404": (404, {}, b""),
    }
    server = ThreadingHTTPServer(("127.0.0.1", 0), Host)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setitem(script.SHA256, "hopper-medium-v2", script.hashlib.sha256(content).hexdigest())

    def serve(*answers):
        urls = tuple(f"http://127.0.0.1:{server.server_port}/{answer}/" for answer in answers)
        monkeypatch.setattr(script, "D4RL_URLS", urls)

    yield serve
    server.shutdown()


@pytest.mark.parametrize("bad", ["html", "cut", "wrong", "403", "404"])
def test_a_failing_host_hands_over_to_the_mirror(host, bad, tmp_path):
    host(bad, "good")
    assert len(script.load_dataset("hopper-medium-v2").rewards)
    assert [path.name for path in (tmp_path / "d4rl").iterdir()] == ["hopper_medium-v2.hdf5"]


@pytest.mark.parametrize("bad", ["html", "cut", "wrong", "403", "404"])
def test_no_good_host_leaves_nothing_behind_and_says_what_to_do(host, bad, tmp_path):
    host(bad, bad)
    with pytest.raises(script.UserError, match=r"hopper_medium-v2.hdf5 by hand.*halfcheetah-medium-replay-mini"):
        script.load_dataset("hopper-medium-v2")
    assert list((tmp_path / "d4rl").iterdir()) == []


def test_downloads_of_the_same_file_at_once_do_not_disturb_each_other(host, tmp_path):
    host("good", "good")
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(script.find_file, ["hopper-medium-v2"] * 4))
    assert [path.name for path in (tmp_path / "d4rl").iterdir()] == ["hopper_medium-v2.hdf5"]
    assert len(script.load_dataset("hopper-medium-v2").rewards) and len(set(paths)) == 1


def test_no_network_says_what_to_do(monkeypatch):
    monkeypatch.setattr(script, "D4RL_URLS", ("http://127.0.0.1:9/",))
    with pytest.raises(script.UserError, match="Connection refused.*by hand"):
        script.load_dataset("hopper-medium-v2")


# --- Minari and own environments ---


def make_minari(env_id="Wide-v0", dataset_id="tests/wide-v0", reward=None, **kwargs):
    rng = np.random.default_rng(0)
    episodes = []
    for length, terminated in ((3, True), (2, False), (4, False)):
        discrete = env_id == "Discrete-v0"
        episodes.append(
            EpisodeBuffer(
                observations=rng.normal(size=(length + 1, 1)),
                actions=rng.integers(0, 2, length) if discrete else rng.uniform(0, 10, (length, 2)).astype(np.float32),
                rewards=rng.normal(size=length) if reward is None else np.full(length, reward),
                terminations=np.arange(length) == (length - 1 if terminated else -1),
                truncations=np.arange(length) == (-1 if terminated else length - 1),
            )
        )
    minari.create_dataset_from_buffers(dataset_id, episodes, env=env_id, **kwargs)
    return episodes


def test_a_minari_dataset_without_an_environment_is_refused():
    spaces = {"observation_space": gym.spaces.Box(-9, 9, (1,)), "action_space": gym.spaces.Box(0, 10, (2,))}
    make_minari(None, "tests/nowhere-v0", **spaces)
    with pytest.raises(script.UserError, match="cannot load the Minari dataset tests/nowhere-v0: .*env_spec"):
        script.load_dataset("tests/nowhere-v0")
    assert script.load_dataset("tests/nowhere-v0", None, "Wide-v0").env_spec.id == "Wide-v0"


def test_minari_episodes_lose_no_step_and_actions_are_scaled(tmp_path):
    episodes = make_minari(ref_min_score=-3.0, ref_max_score=7.0)
    dataset = script.load_dataset("tests/wide-v0")
    assert dataset.episode_ids.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]
    assert dataset.terminals.tolist() == [0, 0, 1, 0, 0, 0, 0, 0, 0]
    observations = np.concatenate([episode.observations[:-1] for episode in episodes])
    next_observations = np.concatenate([episode.observations[1:] for episode in episodes])
    np.testing.assert_array_equal(dataset.observations, observations.astype(np.float32))
    np.testing.assert_array_equal(dataset.next_observations, next_observations.astype(np.float32))
    actions = np.concatenate([episode.actions for episode in episodes])
    np.testing.assert_allclose(dataset.actions, actions / 5 - 1, atol=1e-6)
    assert (dataset.ref_min, dataset.ref_max) == (-3.0, 7.0) and dataset.env_spec.id == "Wide-v0"


def test_minari_without_references_reports_raw_returns():
    make_minari()
    dataset = script.load_dataset("tests/wide-v0")
    assert np.isnan(dataset.ref_min) and np.isnan(dataset.ref_max)


def test_a_gymnasium_id_is_enough_for_an_own_file(tmp_path):
    rows = make_rows(observations=np.zeros((60, 1)), actions=np.full((60, 2), 5.0))
    dataset = script.load_dataset("Wide-v0", write_rows(tmp_path / "own.hdf5", rows))
    assert dataset.env_spec.id == "Wide-v0" and np.isnan(dataset.ref_min) and not dataset.actions.any()


def test_eval_env_id_replaces_the_environment():
    assert script.load_dataset(script.BUNDLED, eval_env_id="HalfCheetah-v5").env_spec.id == "HalfCheetah-v5"


# --- Labels ---


def test_labels_are_one_percent_of_a_full_dataset_and_all_of_a_partly_labelled_one():
    rewards = np.arange(1000, dtype=np.float32)
    assert script.split_labels(rewards, None, range(2)).shape == (2, 10)
    rewards[200:] = np.nan
    labels = script.split_labels(rewards, None, range(2))
    assert np.array_equal(labels, [np.arange(200)] * 2)
    labels = script.split_labels(rewards, 0.25, range(3))
    assert labels.shape == (3, 50) and labels.max() < 200
    assert all(len(set(rows)) == 50 for rows in labels.tolist()), "drawn with replacement"
    assert not np.array_equal(labels[0], labels[1])


def test_labels_do_not_depend_on_how_many_seeds_run():
    rewards = np.arange(1000, dtype=np.float32)
    np.testing.assert_array_equal(
        script.split_labels(rewards, 0.1, range(3, 6))[1:2], script.split_labels(rewards, 0.1, range(4, 5))
    )


@pytest.mark.parametrize(
    ("rewards", "fraction"), [([np.nan] * 9, None), ([1.0] * 1000, 0.5), (np.arange(1000.0), 0.0001)]
)
def test_labels_that_teach_nothing_are_refused(rewards, fraction):
    with pytest.raises(script.UserError, match="label"):
        script.split_labels(np.float32(rewards), fraction, range(2))


# --- What a file can be wrong in ---

NAN, INF = float("nan"), float("inf")


def with_value(name, value):
    column = np.array(make_rows()[name], float)
    column.reshape(-1)[5] = value
    return {name: column}


BAD_COLUMNS = {
    "NaN observation": (with_value("observations", NAN), "NaN or inf in observations"),
    "inf observation": (with_value("observations", INF), "NaN or inf in observations"),
    "overflowing observation": (with_value("observations", 1e300), "NaN or inf in observations"),
    "NaN action": (with_value("actions", NAN), "NaN or inf in observations or actions"),
    "inf reward": (with_value("rewards", INF), "inf in rewards"),
    "NaN terminal": (with_value("terminals", NAN), "NaN or inf in terminals"),
    "action beyond the bounds": (with_value("actions", 1.001), "beyond the bounds"),
    "other length": ({"rewards": np.zeros(59)}, "different lengths"),
    "other observations": ({"observations": np.zeros((60, 12))}, "Hopper-v4"),
    "other actions": ({"actions": np.zeros((60, 2))}, "Hopper-v4"),
    "flat observations": ({"observations": np.zeros(60)}, "shapes"),
    "rewards in columns": ({"rewards": np.zeros((60, 2))}, "shapes"),
    "scalar rewards": ({"rewards": 1.0}, "shapes"),
    "strings": ({"actions": np.array([b"left"] * 60)}, "no readable"),
    "empty": ({key: column[:0] for key, column in make_rows().items()}, "no transitions"),
    "one row": ({key: column[:1] for key, column in make_rows().items()}, "no transitions"),
    "only timeouts": ({"timeouts": np.ones(60, bool)}, "no transitions"),
}


@pytest.mark.parametrize(("columns", "message"), BAD_COLUMNS.values(), ids=BAD_COLUMNS)
def test_bad_columns_are_refused(tmp_path, columns, message):
    with pytest.raises(script.UserError, match=message):
        load(write_rows(tmp_path / "bad.hdf5", make_rows() | columns))


@pytest.mark.parametrize("key", list(make_rows()))
def test_a_missing_column_is_named(tmp_path, key):
    rows = make_rows()
    del rows[key]
    with pytest.raises(script.UserError, match=f"(?s){key}.*object '{key}' doesn't exist"):
        load(write_rows(tmp_path / "bad.hdf5", rows))


def test_actions_within_rounding_of_the_bounds_pass(tmp_path):
    dataset = load(write_rows(tmp_path / "rows.hdf5", make_rows(**with_value("actions", 1 + 5e-6))))
    assert dataset.actions.max() > 1


@pytest.mark.parametrize("tenth", range(10))
def test_a_truncated_file_is_refused(tmp_path, tenth):
    path = shutil.copy(BUNDLED, tmp_path / "cut.hdf5")
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[: len(content) * tenth // 10])
    with pytest.raises(script.UserError, match="no readable HDF5"):
        load(path, "halfcheetah-own")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("halfcheetah-medium-replay",), "halfcheetah-medium-replay-v2"),
        (("hoper-medium-v2",), "hopper-medium-v2"),
        (("tests/unknown-v0",), "cannot load the Minari dataset"),
        (("NoSuchEnv-v0", BUNDLED), "NoSuchEnv"),
        (("Discrete-v0", BUNDLED), "1-D Box"),
        ((script.BUNDLED, None, "NoSuchEnv-v0"), "NoSuchEnv"),
        ((script.BUNDLED, None, "Hopper-v4"), "Hopper-v4"),
        ((script.BUNDLED, None, "no_such_module:Env-v0"), "no_such_module"),
    ],
)
def test_wrong_ids_are_refused(arguments, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shown_as_one_line = (script.UserError, ImportError, script.gym.error.Error)
    with pytest.raises(shown_as_one_line, match=message):
        script.load_dataset(*arguments)


def test_discrete_minari_datasets_are_refused():
    make_minari("Discrete-v0", "tests/discrete-v0")
    with pytest.raises(script.UserError, match="1-D Box"):
        script.load_dataset("tests/discrete-v0")


def test_fuzzed_files_are_refused_or_read_but_never_crash(tmp_path):
    """Flipped bytes either leave a dataset that passes every check or end in one UserError."""
    content = bytearray(write_rows(tmp_path / "rows.hdf5", make_rows()).read_bytes())
    rng, outcomes = np.random.default_rng(0), {"read": 0, "refused": 0}
    for _ in range(300):
        damaged = content.copy()
        for position in rng.integers(len(content), size=rng.integers(1, 20)):
            damaged[position] = rng.integers(256)
        (tmp_path / "fuzzed.hdf5").write_bytes(damaged)
        try:
            dataset = load(tmp_path / "fuzzed.hdf5")
            assert np.isfinite(dataset.observations).all() and np.abs(dataset.actions).max() <= 1 + 1e-5
            outcomes["read"] += 1
        except script.UserError:
            outcomes["refused"] += 1
    print(outcomes)
    assert min(outcomes.values()) > 10, outcomes


def test_a_flipped_byte_in_a_pinned_file_is_always_noticed(tmp_path, monkeypatch):
    content = bytearray(BUNDLED.read_bytes())
    monkeypatch.setattr(script, "find_file", lambda env_id: tmp_path / "bundled.hdf5")
    for position in np.random.default_rng(0).integers(len(content), size=20):
        damaged = content.copy()
        damaged[position] ^= 1
        (tmp_path / "bundled.hdf5").write_bytes(damaged)
        with pytest.raises(script.UserError, match="SHA-256"):
            script.load_dataset(script.BUNDLED)
