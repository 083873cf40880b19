"""Datasets and what a policy acts in: D4RL, Minari, own files, own environments; what is refused.

The scripts share this text to the letter, so it is that of td3bc_imputed.py which is tested.
"""

import json
import tracemalloc
from hashlib import sha256
from pathlib import Path

import gymnasium as gym
import h5py
import minari
import numpy as np
import own_envs
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces import Box
from minari.data_collector import EpisodeBuffer

import td3bc_imputed as script

NAN, INF = float("nan"), float("inf")
pytestmark = pytest.mark.filterwarnings("ignore:env_spec is None", "ignore:overflow")


# --- Files in D4RL's schema ---
def make_rows(num_rows=60, seed=0, **columns):
    """Columns of a Hopper-like file with ends of both kinds; with seed 2, its last row is one."""
    rng = np.random.default_rng(seed)
    rows = {
        "observations": rng.normal(size=(num_rows, 11)),
        "actions": rng.uniform(-1, 1, size=(num_rows, 3)),
        "rewards": rng.normal(size=(num_rows, 1)),  # as D4RL's replay files: float64, (rows, 1)
        "terminals": np.isin(np.arange(num_rows), [4, 11, 30, 31]),
        "timeouts": np.isin(np.arange(num_rows), [7, 20, 21, 31, 45]),
    }
    if seed > 0:
        rows |= {"terminals": rng.random(num_rows) < 0.2, "timeouts": rng.random(num_rows) < 0.2}
        rows["terminals"][-1] = seed == 2
    return rows | columns


def bundled_rows(num_rows=3000, **columns):
    """The first episodes of the bundled file, of 1,000 rows each, none of which terminates."""
    with h5py.File(script.find_file(script.BUNDLED)) as file:
        return {name: column[:num_rows] for name, column in file.items()} | columns


def write_rows(rows, path="own.hdf5"):
    """A column may be a function that writes itself, or None: then it is missing."""
    with h5py.File(path, "w") as file:
        for name, column in rows.items():
            if callable(column):
                column(file, name)
            elif column is not None:
                file[name] = column
    return Path(path)


def load(rows, env_id=None):
    return script.load_dataset(env_id, write_rows(rows))


@pytest.mark.parametrize("rule", ["D4RL's", "for own files"])
@pytest.mark.parametrize("own_next", ["", "next_observations", "next_observations, autoreset"])
@pytest.mark.parametrize("seed", range(3))
def test_transitions_are_those_of_the_rule_to_the_row(rule, own_next, seed, monkeypatch):
    """D4RL's, as qlearning_dataset: no timeouts, nor the last row; the next row is what follows.

    Own: a row is dropped only if its next observation is unknown and needed."""
    rows = make_rows(seed=seed)
    observations, terminals, timeouts = rows["observations"], rows["terminals"], rows["timeouts"]
    following = np.roll(observations, -1, axis=0)  # so an environment logs that resets itself
    own = following.copy()
    cuts = timeouts | (np.arange(60) == 59)
    if own_next == "next_observations":
        own[cuts | terminals] += 1  # an episode's own last one
    columns = rows | ({"next_observations": own} if own_next else {})
    if rule == "D4RL's":
        Path("d4rl").mkdir()
        content = write_rows(columns, "d4rl/hopper_medium-v2.hdf5").read_bytes()
        monkeypatch.setitem(script.SHA256, "hopper-medium-v2", sha256(content).hexdigest())
        dataset = script.load_dataset("hopper-medium-v2")
        kept = np.flatnonzero(~cuts)
    else:
        dataset = load(columns)
        following, is_known = own, own_next == "next_observations"
        kept = np.flatnonzero(terminals | ~cuts | is_known)
    if rule == "D4RL's" or own_next != "next_observations":  # a terminal row's is another episode's
        following = np.where(terminals[:, None], observations, following)
    ends_before = [np.count_nonzero((terminals | timeouts)[:i]) for i in kept]
    expected = {
        "observations": np.float32(observations[kept]),
        "actions": np.float32(rows["actions"][kept]),
        "next_observations": np.float32(following[kept]),
        "rewards": rows["rewards"][kept, 0],
        "terminals": np.float64(terminals[kept]),
        "episode_ids": np.array([sorted(set(ends_before)).index(n) for n in ends_before]),
    }
    for name, column in expected.items():
        np.testing.assert_array_equal(getattr(dataset, name), column, err_msg=name)
        assert getattr(dataset, name).dtype == column.dtype, name


# --- D4RL's names ---
def test_the_bundled_dataset_is_the_default(capsys):
    dataset = script.load_dataset()
    assert (dataset.name, dataset.simulator) == ("halfcheetah-medium-replay-mini", "HalfCheetah-v4")
    assert (dataset.ref_min, dataset.ref_max) == (-280.178953, 12135.0)
    assert (dataset.observations.shape, dataset.actions.shape) == ((99_900, 17), (99_900, 6))
    assert dataset.episode_ids[-1] == 99
    assert not np.isnan(dataset.rewards).any()
    assert capsys.readouterr().out.startswith("dataset"), "no warning, and no row is news"


def test_every_d4rl_name_has_its_file_where_the_d4rl_package_keeps_it(tmp_path, monkeypatch):
    asked = []
    monkeypatch.delenv("D4RL_DATASET_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    download = lambda url, path, hash_prefix: asked.append((url, Path(path)))
    monkeypatch.setattr(script.torch.hub, "download_url_to_file", download)
    for env_id in script.SHA256.keys() - {script.BUNDLED}:
        with pytest.raises(script.UserError, match="by hand"):
            script.load_dataset(env_id)
    tasks = "halfcheetah", "hopper", "walker2d"
    host = "https://rail.eecs.berkeley.edu/datasets/offline_rl/gym_mujoco_v2/"
    mirror = "https://huggingface.co/datasets/imone/D4RL/resolve/main/"
    kinds = [(task, kind) for task in tasks for kind in ("", "_replay", "_expert")]
    names = [f"{task}_medium{kind}-v2.hdf5" for task, kind in kinds]
    folder = tmp_path / ".d4rl" / "datasets"
    assert set(asked) == {(url + name, folder / name) for name in names for url in (host, mirror)}


@pytest.mark.parametrize("bad", [0, 9000, None], ids=["empty", "half", "missing"])
def test_a_download_is_used_only_if_every_bit_is_right(bad, tmp_path, monkeypatch):
    Path("good").mkdir()
    Path("bad").mkdir()
    content = write_rows(make_rows(), "good/hopper_medium-v2.hdf5").read_bytes()
    monkeypatch.setitem(script.SHA256, "hopper-medium-v2", sha256(content).hexdigest())
    if bad is not None:
        Path("bad/hopper_medium-v2.hdf5").write_bytes(content[:bad])
    urls = [f"file://{tmp_path}/bad/", f"file://{tmp_path}/good/"]
    monkeypatch.setattr(script, "D4RL_URLS", urls[:1] * 2)
    with pytest.raises(script.UserError, match="hopper_medium-v2.hdf5: put it there by hand"):
        script.load_dataset("hopper-medium-v2")
    assert list(Path("d4rl").iterdir()) == [], "nothing is left behind"
    monkeypatch.setattr(script, "D4RL_URLS", urls)
    assert len(script.load_dataset("hopper-medium-v2").rewards) == 54, "the mirror's"
    Path("d4rl/hopper_medium-v2.hdf5").write_bytes(content[:-1] + b"?")
    with pytest.raises(script.UserError, match="hopper_medium-v2.hdf5 has SHA-256 .* delete it"):
        script.load_dataset("hopper-medium-v2")


# --- Own files, and other people's logs: no wrong number in silence ---
def test_without_timeouts_terminals_or_own_next_observations_tell_where_episodes_end():
    rows = make_rows(timeouts=None)
    following = np.roll(rows["observations"], -1, axis=0)
    zeros = {"timeouts": np.zeros(60)}  # its last row was cut off, too
    for columns in ({}, {"next_observations": following}, zeros):
        with pytest.raises(script.UserError, match="has no .*timeouts"):
            load(rows | columns)
    following[[7, 20, 45, 59], 5] = 0  # a single feature tells
    for columns in ({}, zeros):
        dataset = load(rows | columns | {"next_observations": following})
        assert np.bincount(dataset.episode_ids).tolist() == [5, 3, 4, 9, 10, 1, 14, 14]
    rows["terminals"][59] = True
    assert np.bincount(load(rows).episode_ids).tolist() == [5, 7, 19, 1, 28]


def test_columns_of_any_type_of_number_are_read_and_what_else_there_is_left_alone():
    columns = {
        "observations": np.ones((60, 11), np.uint8),
        "actions": np.zeros((60, 3), ">f8"),
        "rewards": np.arange(60),
        "terminals": np.arange(60)[:, None] == 59,
        "timeouts": np.zeros(60, np.float16),
    }
    others = {"name": "a log", "ref_min": 1.5, "infos": lambda file, name: file.create_group(name)}
    dataset = load(columns | others)
    assert dataset.rewards.tolist() == list(range(60))
    assert np.flatnonzero(dataset.terminals).tolist() == [59]
    assert not dataset.episode_ids.any()


def test_observations_after_a_reset_are_no_next_observations(capsys):
    observations = bundled_rows()["observations"]
    following = np.append(observations[1:], observations[:1], axis=0)
    rewards = np.where(np.isin(np.arange(3000), [5, 6, 999, 2999]), 1.0, NAN)
    dataset = load(bundled_rows(next_observations=following, rewards=rewards))
    said = "dropped       3 rows without a next observation, 2 rewards\n"
    assert said in capsys.readouterr().out
    assert np.bincount(dataset.episode_ids).tolist() == [999, 999, 999]
    inside = np.delete(np.arange(3000), [999, 1999, 2999])
    np.testing.assert_array_equal(dataset.next_observations, observations[inside + 1])


IN_NO_ORDER = {
    "shuffled": np.random.default_rng(0).permutation(3000),
    "three environments in turn": np.arange(3000).reshape(3, 1000).T.ravel(),
}


@pytest.mark.parametrize("has_timeouts", [True, False], ids=["timeouts", "no timeouts"])
@pytest.mark.parametrize("order", IN_NO_ORDER.values(), ids=IN_NO_ORDER)
def test_rows_in_no_order_are_transitions_without_episodes(order, has_timeouts, capsys):
    rows = bundled_rows(terminals=np.arange(3000) % 500 == 250)
    rows["next_observations"] = np.append(rows["observations"][1:], np.zeros((1, 17)), axis=0)
    rows = {name: column[order] for name, column in rows.items()}
    dataset = load(rows if has_timeouts else rows | {"timeouts": None})
    expected = np.float32(rows["next_observations"])
    np.testing.assert_array_equal(dataset.next_observations, expected)
    assert not dataset.episode_ids.any()
    assert "rows are in no order" in capsys.readouterr().out
    rewards, labels = dataset.rewards[None], np.arange(0, 3000, 10)[None]
    for labeled_only in (False, True):
        with pytest.raises(script.UserError, match="--scale-rewards needs episodes of different"):
            script.reward_scale(rewards, labels, dataset.episode_ids, labeled_only)


LAYOUTS = {
    "one block": {},
    "chunks": {"chunks": True},
    "a short file": {"external": [("raw", 0, h5py.h5f.UNLIMITED)]},
    "a missing file": None,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_that_were_never_written_are_refused_in_every_column_unread(layout):
    """HDF5 would read them as zeros, gigabytes of them."""
    Path("raw").write_bytes(bytes(2400))
    rows = bundled_rows(1000, next_observations=np.zeros((1000, 17)))

    def write_few(file, name):
        shape = (10**9, *rows[name].shape[1:])
        if layout == "a missing file":
            virtual = h5py.VirtualLayout(shape, "f4")
            virtual[:] = h5py.VirtualSource("gone.hdf5", name, shape)
            return file.create_virtual_dataset(name, virtual)
        column = file.create_dataset(name, shape, "f4", **LAYOUTS[layout])
        if layout == "chunks":
            column[:1000] = rows[name]

    tracemalloc.start()
    for key in rows:
        with pytest.raises(script.UserError, match=f"unwritten rows in {key} .*NaN"):
            load(rows | {key: write_few})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10_000_000


def test_zeros_that_may_mean_unlabeled_are_said_and_so_is_a_model_worse_than_a_constant(capsys):
    rows = bundled_rows(20_000)
    few = np.where(np.arange(20_000) % 100 == 50, rows["rewards"], 0)
    dataset = load(rows | {"rewards": few})
    said = "99.0% of the known rewards are exactly 0: if 0 is no label, write NaN"
    assert capsys.readouterr().out.count(said) == 1
    script.imputation_r2(-dataset.rewards[None], dataset.rewards, np.arange(1000)[None])
    assert "worse than a constant" in capsys.readouterr().out

    def write_most(file, name):  # made in one block: HDF5 does not tell what was never written
        file.create_dataset(name, (20_000,), "f4")[:15_000] = rows[name][:15_000]

    load(rows | {"rewards": write_most})
    assert "25.0% of the known rewards are exactly 0" in capsys.readouterr().out
    script.imputation_r2(0.9 * dataset.rewards[None], dataset.rewards, np.arange(1000)[None])
    load(bundled_rows(rewards=np.where(np.arange(3000) < 900, 0.0, NAN)))  # all alike: no filler
    assert "warning" not in capsys.readouterr().out


def test_the_number_of_terminals_is_said_since_a_time_limit_is_none(capsys):
    load(bundled_rows(terminals=np.arange(3000) % 500 == 499, timeouts=None))
    assert "3,000 transitions, 6 episodes\nterminals     6;" in capsys.readouterr().out
    load(bundled_rows())
    assert "2,997 transitions, 3 episodes\nterminals     0;" in capsys.readouterr().out


def test_ends_of_another_name_are_named_if_timeouts_are_missing():
    for name in ("truncations", "truncated", "dones", "done", "episode_terminals"):
        rows = bundled_rows()
        rows[name] = rows["timeouts"]
        assert len(load(rows).rewards) == 2997
        with pytest.raises(script.UserError, match=f"has no timeouts, but .*{name}.*: rename"):
            load(rows | {"timeouts": None})


def run(**settings):
    defaults = {"num_updates": 2, "eval_freq": 2, "policy_freq": 2, "compile": "off"}
    defaults |= {"device": "cpu", "run_dir": Path("run"), "dataset_path": Path("own.hdf5")}
    args = script.Args(**defaults | settings)
    script.main(args)
    return json.loads((args.run_dir / "result.json").read_text())


@pytest.mark.parametrize("dropped", [0.0, NAN, INF])
def test_a_completed_file_is_trained_on_as_it_is(dropped, monkeypatch, capsys):
    """Nothing is hidden, fitted or judged; rewards of rows that are no transitions do not count."""
    rows = bundled_rows()
    rows["rewards"][rows["timeouts"] == 1] = dropped
    write_rows(rows)
    monkeypatch.setattr(script, "fit_reward_model", None)
    assert run()["reward_model"]["r2"] == []
    assert "the log has every reward" in capsys.readouterr().out


def test_folders_and_seeds_that_cannot_be_are_refused_before_the_fit(monkeypatch):
    monkeypatch.setattr(script, "fit_reward_model", None)
    write_rows(bundled_rows())
    folders = [{"run_dir": Path(name)} for name in ("", "x" * 300, "own.hdf5/run")]
    for settings in [*folders, {"seed": 2**64}, {"seed": -1}]:
        with pytest.raises((script.UserError, OSError)):
            run(label_fraction=0.5, **settings)
    assert [path.name for path in Path().iterdir()] == ["own.hdf5"], "nothing was written"


def test_imputation_is_as_good_on_rewards_around_1e8():
    settings = {"label_fraction": 0.1, "reward_epochs": 60, "reward_learning_rate": 1e-3}
    r2 = []
    for offset in (0.0, 1e8, -1e8):
        write_rows(bundled_rows(rewards=bundled_rows()["rewards"] + np.float64(offset)))
        r2 += run(run_dir=Path(f"run {offset}"), **settings)["reward_model"]["r2"]
    assert r2[0] > 0.5
    assert r2 == pytest.approx([r2[0]] * 3, abs=0.01)


def test_few_labels_are_said_and_none_is_refused(capsys):
    rewards = np.where(np.arange(3000) < 200, 1.0, NAN)
    script.choose_labels(rewards, 0.01, range(2))
    assert "2 labels are too few to learn from" in capsys.readouterr().out
    rows = bundled_rows()
    only_on_dropped_rows = load(rows | {"rewards": np.where(rows["timeouts"] == 1, 1.0, NAN)})
    assert "3 rows without a next observation, 3 rewards" in capsys.readouterr().out
    with pytest.raises(script.UserError, match="every reward is NaN"):
        script.choose_labels(only_on_dropped_rows.rewards, 1.0, range(2))


SPOILED = {
    "a glitch": (np.where(np.arange(3000) == 1234, 1e4, 0), "a glitch? Row 1,234 has 1"),
    "1e8": (1e8, "subtract 1e+08, too large for float32"),
    "-1e8": (-1e8, "subtract -1e+08, too large for float32"),
    "a timestamp": (1.7e9, "subtract 1.7e+09, too large for float32"),
}


@pytest.mark.parametrize(("added", "said"), SPOILED.values(), ids=SPOILED)
@pytest.mark.parametrize("name", ["observations", "actions", "next_observations"])
def test_columns_that_a_glitch_or_float32_spoils_are_named(name, added, said, capsys):
    rows = bundled_rows(next_observations=bundled_rows()["observations"] * 1.01)
    rows[name] = np.float64(rows[name])
    rows[name][:, 4] += added
    load(rows)
    warnings = [line for line in capsys.readouterr().out.splitlines() if "column" in line]
    assert len(warnings) == 1
    assert f"{name}, column 4: {said}" in warnings[0]


def test_columns_that_are_only_odd_raise_no_alarm(capsys):
    observations = np.float64(bundled_rows()["observations"])
    observations[:, 0] = np.arange(3000) + 1e5  # a counter
    observations[:, 1] = 1e9  # never changes
    observations[:, 2] = np.arange(3000) == 77  # rarely 1
    load(bundled_rows(observations=observations))
    assert "warning" not in capsys.readouterr().out


# --- What a file can be wrong in ---
def with_value(name, value):
    column = np.array(make_rows()[name], float)
    column.reshape(-1)[5] = value
    return {name: column}


NEITHER = np.zeros(60, bool)
BAD_COLUMNS = {
    "NaN observation": (with_value("observations", NAN), "NaN or inf in observations"),
    "overflowing action": (with_value("actions", 1e300), "NaN or inf in actions"),
    "NaN next": ({"next_observations": np.full((60, 11), NAN)}, "NaN or inf in next_observations"),
    "inf reward": (with_value("rewards", INF), "inf in rewards"),
    "NaN terminal": (with_value("terminals", NAN), "other numbers than 0 and 1 in terminals"),
    "terminals of -1": ({"terminals": NEITHER - 1.0}, "other numbers than 0 and 1 in terminals"),
    "no observations": ({"observations": None}, "own.hdf5: has no observations"),
    "others": ({"rewards": None} | {f"episode_{i}": 1 for i in range(3000)}, "has no rewards$"),
    "other length": ({"rewards": np.zeros(59)}, "different lengths.*'rewards': 59"),
    "two rewards": ({"rewards": np.zeros((60, 2))}, "different lengths"),
    "wide next": ({"next_observations": np.zeros((60, 12))}, "next_observations"),
    "flat observations": ({"observations": np.zeros(60)}, "observations .*not .rows, dim."),
    "flat actions": ({"actions": np.zeros(60)}, "actions .*not .rows, dim."),
    "a group": ({"actions": lambda file, name: file.create_group(name)}, "own.hdf5: "),
    "an empty column": ({"rewards": h5py.Empty("f4")}, "own.hdf5: "),
    "a dead link": ({"rewards": h5py.SoftLink("/nowhere")}, "own.hdf5: "),
    "no rows": (make_rows(0), "no transitions"),
    "only timeouts": ({"timeouts": ~NEITHER, "terminals": NEITHER}, "no transitions"),
}


@pytest.mark.parametrize(("columns", "message"), BAD_COLUMNS.values(), ids=BAD_COLUMNS)
def test_bad_columns_are_refused(columns, message):
    with pytest.raises(script.UserError, match=message):
        load(make_rows(**columns))


def test_damaged_files_are_refused_or_read_but_never_crash():
    """Bytes that are changed or cut leave what passes every check, or end in one line."""
    content = bytearray(write_rows(make_rows()).read_bytes())
    rng, refused = np.random.default_rng(0), 0
    for i in range(200):
        damaged = content[: len(content) if i % 10 else 50 * i]
        for position in rng.integers(len(damaged) or 1, size=rng.integers(1, 20)):
            damaged[position : position + 1] = rng.bytes(1)
        Path("own.hdf5").write_bytes(damaged)
        try:
            dataset = script.load_dataset(None, Path("own.hdf5"))
        except script.UserError:
            refused += 1
            continue
        assert np.isfinite(dataset.observations).all()
        assert len({len(column) for column in dataset[:6]}) == 1
    assert 20 < refused < 180


# --- Simulators ---
def wide_rows(**columns):
    """Of Wide-v0: actions between 0 and 10."""
    actions = np.random.default_rng(0).uniform(0, 10, size=(60, 2))
    return make_rows(**{"observations": np.zeros((60, 1)), "actions": actions} | columns)


def check(dataset):
    """The simulator's id and the bounds."""
    spec, low, high = script.check_simulator(dataset.simulator, *dataset[:2])
    return spec and spec.id, low.tolist(), high.tolist()


def register(name, **attributes):
    """Wide-v0 but for what is given."""
    gym.registry[name] = EnvSpec(name, type("OwnEnv", (own_envs.WideEnv,), attributes))


def test_an_own_file_takes_any_gymnasium_id_or_the_name_of_a_d4rl_task(tmp_path, monkeypatch):
    monkeypatch.setattr(minari, "load_dataset", None)
    for env_id in ("hopper-medium-v2", "hopper-own"):
        dataset = load(make_rows(), env_id)
        assert (dataset.ref_min, dataset.ref_max) == (-20.272305, 3234.3)
        assert check(dataset) == ("Hopper-v4", [-1] * 3, [1] * 3)
    register("hopper-mine-v0")  # only called like that task
    (tmp_path / "own_package.py").write_text("import own_envs")
    monkeypatch.syspath_prepend(tmp_path)
    for env_id in ("hopper-mine-v0", "own_package:Wide-v0"):
        dataset = load(wide_rows(), env_id)
        assert dataset.name == "own"
        assert check(dataset) == (env_id.split(":")[-1], [0, 0], [10, 10])
        assert (dataset.ref_min, dataset.ref_max) == (0, 100), "a score is a return"
    for env_id in ("NoSuch-v0", "no_such_package:Env-v0", "a:b:c", "x/"):
        with pytest.raises(script.UserError, match="simulator.* fails"):
            check(load(wide_rows(), env_id))


def returning(observation, reward=1.0, terminated=True):
    """The methods of an environment that returns these, from reset and from step."""
    return {
        "reset": lambda env, seed=None, options=None: (observation, {}),
        "step": lambda env, action: (observation, reward, terminated, False, {}),
    }


BROKEN = {
    "integer actions": ({"action_space": Box(-5, 9, (2,), int)}, "needs float actions"),
    "no upper bound": ({"action_space": Box(0, INF, (2,))}, "with bounds"),
    "other actions": ({"action_space": Box(0, 10, (3,))}, "have another shape"),
    "smaller bounds": ({"action_space": Box(0, 9, (2,))}, "actions beyond the bounds"),
    "other observations": (returning(np.zeros(2)), "have another shape"),
    "observations in a dict": (returning({"x": np.zeros(1)}), "have another shape"),
    "no constructor": ({"__init__": lambda env: 1 / 0}, "fails: ZeroDivisionError"),
    "a failing step": ({"step": lambda env, action: 1 / 0}, "fails: ZeroDivisionError"),
    "an old step": ({"step": lambda env, action: (np.zeros(1), 0.0, True, {})}, "fails: "),
    "no reward": (returning(np.zeros(1), None), "fails: "),
    "two rewards": (returning(np.zeros(1), np.ones(2)), "fails: "),
}


@pytest.mark.parametrize(("attributes", "message"), BROKEN.values(), ids=BROKEN)
def test_a_simulator_is_tried_and_what_is_wrong_is_said(attributes, message):
    register("Own-v0", **attributes)
    with pytest.raises(script.UserError, match=message):
        check(load(wide_rows(), "Own-v0"))


def make_policy(low, high, output):
    """One whose last layer gives `output`, whatever it sees."""
    names = ["mean", "layer1.weight", "layer1.bias", "layer2.weight", "layer2.bias"]
    weights = dict.fromkeys(names, np.zeros((1, 1))) | {"std": np.ones((1, 1))}
    weights["layer3.weight"] = np.zeros((1, len(low)))
    weights["layer3.bias"] = np.full((1, len(low)), output)
    return script.Policy(weights, low=low, high=high)


def test_an_episode_without_end_is_cut():
    register("Own-v0", **returning(np.zeros(1), terminated=False))
    np.savez("policy.npz", **make_policy(np.zeros(2), np.ones(2), 0.0))
    assert script.run_episode((Path("policy.npz"), gym.spec("Own-v0"), 100)) == 10_000


BOXES = {
    "float32": Box(0, 10, (2,)),
    "float32, far from zero": Box(np.float32([1000.13, 500.0]), np.float32([1000.31, 500.2])),
    "float64": Box(np.array([-0.7, 0.1]), np.array([0.92, 1.3]), dtype=np.float64),
    "a dimension without range": Box(np.float32([0.3, 0]), np.float32([0.3, 1])),
    "float16": Box(np.float16([0.1, -60000]), np.float16([7, 60000]), dtype=np.float16),
    "all of float32": Box(-3e38, 3e38, (2,)),
}


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("space", BOXES.values(), ids=BOXES)
def test_any_bounds_are_scaled_to_1_and_a_policy_reaches_but_never_leaves_them(space):
    register("Own-v0", action_space=space, **returning(np.zeros(1)))
    low, high, middle = space.low, space.high, np.float64(space.low) / 2 + space.high / 2
    actions = np.tile(np.float64([low, high, middle]), (20, 1))
    dataset = load(wide_rows(terminals=~NEITHER, actions=actions), "Own-v0")
    assert check(dataset)[1:] == (low.tolist(), high.tolist())
    scaled = script.scale_actions(dataset.actions, low, high)
    expected = np.where(high > low, [[-1, -1], [1, 1], [0, 0]], 0)
    np.testing.assert_allclose(scaled[:3], expected, atol=1e-3)
    for output in (-100, -1.5, 0, 0.3, 100):
        action = make_policy(low, high, output)(np.zeros(1))
        assert space.contains(action), action
        expected = np.float64(low) + (np.tanh(output) + 1) / 2 * (np.float64(high) - low)
        tolerance = 1e-3 if space.dtype == np.float16 else 1e-6
        np.testing.assert_allclose(action, expected, rtol=tolerance)
    np.testing.assert_array_equal(make_policy(low, high, -100)(np.zeros(1)), low)
    np.testing.assert_array_equal(action, high)


# --- Minari ---
def make_minari(dataset_id, **columns):
    """Three episodes of 3, 2 and 4 steps, the first of which terminates.

    `columns` are functions of an episode's length, or settings of Minari's."""
    rng = np.random.default_rng(0)
    make = {
        "observations": lambda length: rng.normal(size=(length + 1, 1)),
        "actions": lambda length: rng.uniform(0, 10, (length, 2)).astype(np.float32),
        "rewards": lambda length: rng.normal(size=length),
        "terminations": lambda length: (np.arange(length) == length - 1) & (length == 3),
        "truncations": lambda length: (np.arange(length) == length - 1) & (length != 3),
    }
    settings = {"env": "Wide-v0"}
    for name, column in columns.items():
        (make if name in make else settings)[name] = column
    columns = [{name: column(n) for name, column in make.items()} for n in (3, 2, 4)]
    episodes = [EpisodeBuffer(**episode) for episode in columns]
    minari.create_dataset_from_buffers(dataset_id, episodes, **settings)
    return episodes


@pytest.mark.parametrize("shape", [(-1,), (-1, 1)], ids=["rewards", "rewards in a column"])
def test_minari_episodes_lose_no_step_and_actions_stay_as_they_are(shape):
    rewards = lambda length: np.float32([1.5] + [NAN] * (length - 1)).reshape(shape)
    episodes = make_minari("tests/wide-v0", rewards=rewards, ref_min_score=-3.0, ref_max_score=7.0)
    dataset = script.load_dataset("tests/wide-v0")
    expected = {
        "observations": np.float32(np.concatenate([x.observations[:-1] for x in episodes])),
        "next_observations": np.float32(np.concatenate([x.observations[1:] for x in episodes])),
        "actions": np.concatenate([x.actions for x in episodes]),
        "rewards": np.array([1.5, NAN, NAN, 1.5, NAN, 1.5, NAN, NAN, NAN]),
        "terminals": np.array([0.0, 0, 1, 0, 0, 0, 0, 0, 0]),
        "episode_ids": np.array([0, 0, 0, 1, 1, 2, 2, 2, 2]),
    }
    for name, column in expected.items():
        np.testing.assert_array_equal(getattr(dataset, name), column, strict=True, err_msg=name)
    assert (dataset.name, dataset.ref_min, dataset.ref_max) == ("tests/wide-v0", -3.0, 7.0)
    assert check(dataset) == ("Wide-v0", [0, 0], [10, 10])


def test_a_minari_dataset_evaluates_in_its_evaluation_environment_or_in_none():
    register("Judge-v0")
    make_minari("tests/judged-v0", eval_env=EnvSpec("Judge-v0", "own_envs:WideEnv"))
    dataset = script.load_dataset("tests/judged-v0")
    assert check(dataset)[0] == "Judge-v0"
    assert (dataset.ref_min, dataset.ref_max) == (0, 100), "a score is a return"
    spaces = {"observation_space": Box(-9, 9, (1,)), "action_space": Box(0, 10, (2,))}
    make_minari("tests/nowhere-v0", env=None, **spaces)
    dataset = script.load_dataset("tests/nowhere-v0")
    bounds = [bound(dataset.actions, axis=0).tolist() for bound in (np.min, np.max)]
    assert check(dataset) == (None, *bounds)


DISCRETE = {"actions": lambda length: np.zeros(length, int), "env": "Discrete-v0"}
BAD_MINARI = {
    "discrete actions": (DISCRETE, "need continuous vectors"),
    "few rewards": ({"rewards": lambda length: np.zeros(length - 1)}, "lengths"),
    "two rewards": ({"rewards": lambda length: np.zeros((length, 2))}, ""),
    "NaN": ({"observations": lambda length: np.full((length + 1, 1), NAN)}, "NaN or inf"),
}


@pytest.mark.parametrize(("columns", "message"), BAD_MINARI.values(), ids=BAD_MINARI)
def test_minari_columns_that_are_wrong_are_refused(columns, message):
    make_minari("tests/wrong-v0", **columns)
    with pytest.raises(script.UserError, match=f"tests/wrong-v0.*{message}"):
        script.load_dataset("tests/wrong-v0")


@pytest.mark.parametrize("env_id", ["hoper-medium-v2", "Hopper-v4", "", "tests/unknown-v0", "/"])
def test_an_unknown_dataset_is_refused_with_the_names_that_are_known(env_id):
    with pytest.raises(script.UserError, match=f"{env_id}.* hopper-medium-v2"):
        script.load_dataset(env_id)
