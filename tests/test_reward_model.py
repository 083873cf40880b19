"""The reward model: its fit against a slow reference, imputation, the report, and the datasets it writes."""

import json
import re
from pathlib import Path

import h5py
import minari
import numpy as np
import own_envs  # noqa: F401, registers Wide-v0
import pytest
import torch
from reference import mlp
from test_dataset import NAN, OBS_DIM, make_minari, make_rows, plain_loop, write_rows

import iql_imputed
import reward_model as script
import td3bc_imputed

SEEDS, CPU = range(2), torch.device("cpu")


def own_file(path="own.hdf5", num_rows=400, **columns):
    """A Hopper-like file whose reward is a smooth function of observation and action."""
    rows = make_rows(num_rows)
    rows["rewards"] = (np.tanh(rows["observations"][:, 0]) + rows["actions"][:, 1] ** 2)[:, None]
    rows |= columns
    write_rows(path, rows)
    return rows


def fitted(dataset, labels, seeds=SEEDS, epochs=5, batch_size=8):
    model = script.RewardModel(dataset, seeds, 256)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    losses = script.train_reward_model(model, dataset, labels, epochs, 1e-3, batch_size)
    return model, before, losses


@pytest.fixture
def dataset(tmp_path):
    own_file()
    return script.load_dataset("hopper-own", Path("own.hdf5"))


def test_the_fit_equals_a_plain_loop_for_each_seed(dataset):
    labels = script.split_labels(dataset.rewards, 0.05, SEEDS)
    model, before, losses = fitted(dataset, labels)
    mean, std = dataset.observations.mean(0), dataset.observations.std(0) + 1e-3
    for k, seed in enumerate(SEEDS):
        reference, generator = mlp(OBS_DIM + 3, 1), torch.Generator().manual_seed(seed)
        for i, parameter in enumerate(reference.parameters()):
            value = before[i][k]
            parameter.data = value.T.clone() if parameter.ndim == 2 else value[0].clone()
        for shape in ((14, 256), (1, 256), (256, 256), (1, 256), (256, 1), (1, 1)):  # what initialisation drew
            torch.rand(shape, generator=generator)
        inputs = np.hstack([(dataset.observations - mean) / std, dataset.actions])[labels[k]]
        inputs, rewards = torch.tensor(inputs), torch.tensor(dataset.rewards[labels[k]])
        optimizer = torch.optim.Adam(reference.parameters(), lr=1e-3)
        for epoch in range(5):
            squares = []
            for rows in torch.randperm(len(rewards), generator=generator).split(8):
                square = (reference(inputs[rows])[:, 0] - rewards[rows]) ** 2
                optimizer.zero_grad()
                square.mean().backward()
                optimizer.step()
                squares.append(square.detach())
            assert losses[epoch, k] == pytest.approx(torch.cat(squares).mean().item(), rel=1e-3)
        for i, parameter in enumerate(reference.parameters()):
            ours = list(model.parameters())[i][k]
            torch.testing.assert_close(ours.T if parameter.ndim == 2 else ours[0], parameter, rtol=1e-3, atol=1e-5)


def test_a_seed_fits_the_same_alone_or_among_others(dataset):
    together = script.split_labels(dataset.rewards, 0.05, range(3, 6))
    alone = script.split_labels(dataset.rewards, 0.05, range(4, 5))
    a = script.impute_rewards(fitted(dataset, together, range(3, 6))[0], dataset, together)[1]
    b = script.impute_rewards(fitted(dataset, alone, range(4, 5))[0], dataset, alone)[0]
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_imputation_keeps_labels_and_sees_no_hidden_reward(dataset):
    labels = script.split_labels(dataset.rewards, 0.05, SEEDS)
    secret = dataset.rewards.copy()
    secret[np.setdiff1d(np.arange(len(secret)), labels)] = NAN
    imputed = [
        script.impute_rewards(fitted(data, labels)[0], data, labels)
        for data in (dataset, dataset._replace(rewards=secret))
    ]
    np.testing.assert_array_equal(*imputed)
    for k in range(2):
        np.testing.assert_array_equal(imputed[0][k, labels[k]], dataset.rewards[labels[k]])
        others = np.setdiff1d(np.arange(len(secret)), labels[k])
        assert not np.isclose(imputed[0][k, others], dataset.rewards[others], atol=1e-7).any()
    assert not np.array_equal(imputed[0][0], imputed[0][1])


def test_imputation_in_chunks_is_imputation_at_once(dataset):
    many = dataset._replace(
        **{name: np.tile(getattr(dataset, name), (60, 1)) for name in ("observations", "actions")},
        rewards=np.tile(dataset.rewards, 60),
    )
    labels = script.split_labels(dataset.rewards, 0.05, SEEDS)
    model, _, _ = fitted(dataset, labels)
    assert len(many.rewards) > 16384
    once = script.impute_rewards(model, dataset, labels[:, :0])
    np.testing.assert_allclose(
        script.impute_rewards(model, many, labels[:, :0]), np.tile(once, 60), rtol=1e-4, atol=1e-5
    )


def test_quality_is_measured_on_hidden_rewards_alone(dataset):
    labels = script.split_labels(dataset.rewards, 0.3, SEEDS)
    imputed = np.random.default_rng(0).normal(size=(2, len(dataset.rewards))).astype(np.float32)
    quality = script.imputation_quality(imputed, dataset, labels)
    for k in range(2):
        hidden = [i for i in range(len(dataset.rewards)) if i not in set(labels[k])]
        true, predicted = dataset.rewards[hidden], imputed[k, hidden]
        assert quality["mse"][k] == pytest.approx(np.mean((true - predicted) ** 2), rel=1e-5)
        assert quality["mae"][k] == pytest.approx(np.mean(abs(true - predicted)), rel=1e-5)
        r2 = 1 - np.sum((true - predicted) ** 2) / np.sum((true - true.mean()) ** 2)
        assert quality["r2"][k] == pytest.approx(r2, rel=1e-4)
        returns = [[x[dataset.episode_ids == i].sum() for i in range(dataset.episode_ids[-1] + 1)]
                   for x in (dataset.rewards, imputed[k])]  # fmt: skip
        assert quality["return_correlation"][k] == pytest.approx(np.corrcoef(returns)[0, 1], rel=1e-4)
    assert script.imputation_quality(imputed, dataset, np.tile(np.arange(len(dataset.rewards)), (2, 1))) is None


def run(*arguments):
    arguments = ["--reward-epochs", "5", "--device", "cpu", *map(str, arguments)]
    script.main(script.tyro.cli(script.Args, args=arguments))


OWN = ("--env-id", "hopper-own", "--dataset-path", "own.hdf5", "--label-fraction", 0.1)


def test_the_report_says_what_it_should(dataset, capsys):
    run(*OWN, "--num-seeds", 2, "--run-dir", "run", "--sweep")
    result = json.loads(Path("run/result.json").read_text())
    assert result["judged_on"] == "the hidden rewards" and np.shape(result["losses"]) == (5, 2)
    for name in ("reward_model", "linear_regression"):
        assert set(result[name]) == {"train_mse", "r2", "mse", "mae", "return_correlation"}
        assert all(len(values) == 2 for values in result[name].values())
    labels = script.split_labels(dataset.rewards, 0.1, SEEDS)
    inputs = np.hstack([dataset.observations, dataset.actions, np.ones((len(dataset.rewards), 1))]).astype(np.float64)
    weights = np.linalg.solve(inputs[labels[1]].T @ inputs[labels[1]], inputs[labels[1]].T @ dataset.rewards[labels[1]])
    hidden = np.setdiff1d(np.arange(len(dataset.rewards)), labels[1])
    mse = np.mean((inputs[hidden] @ weights - dataset.rewards[hidden]) ** 2)
    assert result["linear_regression"]["mse"][1] == pytest.approx(mse, rel=1e-3)
    output = capsys.readouterr().out
    assert "train MSE" in output and "linear regression" in output and "skipped" in output
    for name in ("report.png", "sweep.png"):
        assert Path("run", name).read_bytes().startswith(b"\x89PNG")
    sweep = Path("run/sweep.csv").read_text().splitlines()
    assert sweep[0].startswith("fraction,labels,r2_mean") and len(sweep) == 1 + len(result["sweep"]["labels"]) > 2


def test_the_saved_model_needs_numpy_alone(dataset):
    run(*OWN, "--num-seeds", 2, "--run-dir", "run", "--output-path", "imputed.hdf5")
    model, k = np.load("run/reward_model.npz", allow_pickle=False), 0
    x = np.hstack([(dataset.observations - model["mean"][k]) / model["std"][k], dataset.actions])
    for i in range(3):
        x = x @ model[f"w{i}"][k] + model[f"b{i}"][k]
        x = np.maximum(x, 0) if i < 2 else x[:, 0]
    imputed = script.load_dataset("hopper-own", Path("imputed.hdf5")).rewards
    hidden = np.setdiff1d(np.arange(len(x)), script.split_labels(dataset.rewards, 0.1, SEEDS)[0])
    np.testing.assert_allclose(x[hidden], imputed[hidden], rtol=1e-4, atol=1e-5)


def agent_sees(agent, dataset, num_seeds):
    """The rewards that the first seed's agent would impute, with the settings of `run`."""
    seeds = range(num_seeds)
    labels = agent.split_labels(dataset.rewards, 0.1, seeds)
    model = agent.RewardModel(dataset, seeds, 256)
    agent.train_reward_model(model, dataset, labels, 5, 1e-4, 64)
    return agent.impute_rewards(model, dataset, labels)[0], labels[0]


@pytest.mark.parametrize("agent", [td3bc_imputed, iql_imputed])
@pytest.mark.parametrize("next_observations", [False, True])
def test_round_trip_is_what_the_agents_impute_bit_for_bit(agent, next_observations, tmp_path):
    columns = {"next_observations": np.random.default_rng(1).normal(size=(400, OBS_DIM))} if next_observations else {}
    rows = own_file(infos=np.arange(400), **columns)
    run(*OWN, "--num-seeds", 2, "--output-path", "imputed.hdf5", "--output-minari-id", "tests/imputed-v0")
    source = agent.load_dataset("hopper-own", Path("own.hdf5"))
    expected, labels = agent_sees(agent, source, 2)
    for dataset in (agent.load_dataset("hopper-own", Path("imputed.hdf5")), agent.load_dataset("tests/imputed-v0")):
        np.testing.assert_array_equal(dataset.rewards, expected)
        for name in ("observations", "actions", "terminals", "episode_ids"):
            np.testing.assert_array_equal(getattr(dataset, name), getattr(source, name), err_msg=name)
        alive = dataset.terminals == 0
        if not next_observations:
            np.testing.assert_array_equal(dataset.next_observations[alive], source.next_observations[alive])
        assert (dataset.ref_min, dataset.ref_max) == (source.ref_min, source.ref_max)
    with h5py.File("imputed.hdf5") as file:
        assert file["rewards"].shape == (400, 1) and np.isfinite(file["rewards"][()]).all()
        assert np.array_equal(file["infos"], np.arange(400)) and file["labeled"].dtype == bool
        assert file["labeled"][()].sum() == len(labels)
        np.testing.assert_array_equal(
            file["rewards"][()][file["labeled"]], np.float32(rows["rewards"])[file["labeled"]]
        )
        assert json.loads(file.attrs["imputation_settings"])["label_fraction"] == 0.1
    episodes = list(minari.load_dataset("tests/imputed-v0").iterate_episodes())
    assert sum(episode.infos["labeled"].sum() for episode in episodes) == len(labels)
    ends = np.flatnonzero(np.append(np.diff(source.episode_ids), 1))
    kept = np.flatnonzero(~np.array(rows["timeouts"])[:-1])
    for episode, last in zip(episodes, ends, strict=True):
        if next_observations:
            final = np.float32(rows["next_observations"])[kept[last]]
        else:
            final = source.observations[last] if source.terminals[last] else source.next_observations[last]
        np.testing.assert_array_equal(episode.observations[-1], final)
        assert episode.terminations[-1] != episode.truncations[-1]
        assert not (episode.terminations[:-1] | episode.truncations[:-1]).any()


def test_a_minari_source_becomes_a_minari_dataset():
    episodes = make_minari("Wide-v0", ref_min_score=0.0, ref_max_score=60.0)
    run("--env-id", "tests/wide-v0", "--label-fraction", 0.5, "--output-minari-id", "tests/imputed-v0")
    source, dataset = (script.load_dataset(name) for name in ("tests/wide-v0", "tests/imputed-v0"))
    labels = script.split_labels(source.rewards, 0.5, range(1))[0]
    assert (dataset.ref_min, dataset.ref_max) == (0.0, 60.0)
    for name in ("observations", "actions", "next_observations", "terminals", "episode_ids"):
        np.testing.assert_array_equal(getattr(dataset, name), getattr(source, name), err_msg=name)
    np.testing.assert_array_equal(dataset.rewards[labels], source.rewards[labels])
    for ours, theirs in zip(minari.load_dataset("tests/imputed-v0").iterate_episodes(), episodes, strict=True):
        np.testing.assert_array_equal(ours.observations, theirs.observations)


def test_a_partly_labelled_log_goes_through_the_whole_chain(tmp_path, capsys):
    rows = own_file()
    rng = np.random.default_rng(0)
    rewards = np.where(rng.random((400, 1)) < 0.7, NAN, rows["rewards"])
    rewards[7], rewards[20] = 0.25, NAN  # dropped rows, one with a label
    own_file(rewards=rewards)
    run("--env-id", "hopper-own", "--dataset-path", "own.hdf5", "--output-path", "imputed.hdf5", "--run-dir", "run")
    assert "20% of the labels, held out" in capsys.readouterr().out
    result = json.loads(Path("run/result.json").read_text())
    assert result["num_labels"] == np.isfinite(plain_loop(rows | {"rewards": rewards})[2]).sum()
    with h5py.File("imputed.hdf5") as file:
        known = np.isfinite(rewards)
        np.testing.assert_array_equal(file["rewards"][()][known], np.float32(rewards[known]))
        np.testing.assert_array_equal(file["labeled"][()], known[:, 0])
        assert np.isfinite(file["rewards"][()]).all()
    arguments = [
        "--env-id",
        "hopper-own",
        "--dataset-path",
        "imputed.hdf5",
        "--rewards",
        "oracle",
        "--num-updates",
        "10",
    ]
    arguments += ["--eval-episodes", "1", "--device", "cpu", "--run-dir", "agent"]
    iql_imputed.main(script.tyro.cli(iql_imputed.Args, args=arguments))
    assert re.search(r"result +score", capsys.readouterr().out)


BAD_ARGUMENTS = {
    "existing output": (["--output-path", "own.hdf5"], "exists already"),
    "malformed Minari id": (["--output-minari-id", "no version"], "my/name-v0"),
    "Minari id without a version": (["--output-minari-id", "imputed"], "my/name-v0"),
    "existing Minari id": (["--output-minari-id", "tests/wide-v0"], "exists already"),
    "HDF5 from Minari": (["--env-id", "tests/wide-v0", "--output-path", "out.hdf5"], "--output-minari-id"),
    "no epochs": (["--reward-epochs", "0"], "--reward-epochs"),
    "no such folder": ([*OWN, "--output-path", "none/out.hdf5"], "none/out.hdf5"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_mistakes_are_named(arguments, message, dataset, tmp_path):
    make_minari()
    with pytest.raises((script.UserError, OSError), match=message):
        script.main(script.tyro.cli(script.Args, args=list(map(str, ["--reward-epochs", 2, *arguments]))))
    assert not list(tmp_path.glob("**/*.tmp")) and not Path("out.hdf5").exists()


def test_a_run_directory_is_never_overwritten(dataset):
    run(*OWN, "--run-dir", "run")
    with pytest.raises(script.UserError, match="already holds a run"):
        run(*OWN, "--run-dir", "run")
