"""The reward model: its fit, imputation, how it is judged, and the datasets that are written.

The fit and the Gaussian process are held against slow, obvious versions of themselves.
"""

import json
import re
import resource
import shlex
from copy import deepcopy
from pathlib import Path

import gymnasium as gym
import h5py
import minari
import numpy as np
import own_envs  # noqa: F401, registers Wide-v0
import pytest
import torch
from minari.data_collector import EpisodeBuffer
from numpy.testing import assert_allclose, assert_array_equal
from reference import make_mlp

import iql_imputed
import reward_model as script
import td3bc_imputed

NUM_ROWS, OBS_DIM, ACT_DIM = 400, 5, 3
SEEDS = range(2)
MODELS = pytest.mark.parametrize("model", ["mlp", "gp"])
AGENTS = pytest.mark.parametrize("agent", [td3bc_imputed, iql_imputed], ids=["td3bc", "iql"])
TRANSITION = ("observations", "actions", "terminals", "episode_ids")


# --- A small log ---
def make_rows(num_rows=NUM_ROWS):
    """A D4RL file of 21 episodes whose reward is a smooth function; its last rows are cut off."""
    rng = np.random.default_rng(0)
    observations = rng.normal(size=(num_rows, OBS_DIM))
    actions = rng.uniform(-1, 1, size=(num_rows, ACT_DIM))
    rewards = np.tanh(observations[:, 0]) + actions[:, 1] ** 2
    number = np.arange(num_rows)
    return {
        "observations": observations,
        "actions": actions,
        "rewards": np.float32(rewards[:, None]),  # as D4RL's replay files
        "terminals": number % 40 == 17,
        "timeouts": number % 40 == 31,
    }


def hide_rewards(rewards):
    """Of four rows in five."""
    rng = np.random.default_rng(0)
    rewards[rng.random(len(rewards)) < 0.8] = np.nan


def write_rows(rows, path="own.hdf5"):
    with h5py.File(path, "w") as file:
        for name, column in rows.items():
            file[name] = column


@pytest.fixture(autouse=True)
def rows():
    """Of own.hdf5."""
    rows = make_rows()
    write_rows(rows)
    return rows


@pytest.fixture
def dataset(rows):
    return script.load_dataset(None, Path("own.hdf5"))


def settings(model="mlp", **changes):
    """Of a fit that takes a moment."""
    defaults = {"reward_model": model, "reward_epochs": 5, "reward_batch_size": 8}
    defaults |= {"reward_learning_rate": 1e-3}
    return script.Args(**(defaults | changes))


def draw_labels(dataset, fraction, seeds=SEEDS):
    return script.split_labels(dataset.rewards, fraction, seeds)


def fit(dataset, labeled, args, seeds=SEEDS):
    generators = script.make_generators(seeds, stream=1)
    model = script.RewardModel(dataset, labeled, generators, args)
    script.fit_reward_model(model, dataset, labeled, generators, args)
    return model


def impute(dataset, labeled, args, seeds=SEEDS):
    return script.impute_rewards(fit(dataset, labeled, args, seeds), dataset, labeled)


def predict(model, dataset):
    """f(s, a) of every transition, (seeds, N)."""
    no_labels = np.empty((len(SEEDS), 0), int)
    return script.impute_rewards(model, dataset, no_labels)


def judge(imputed, dataset, labeled):
    return script.imputation_quality(imputed, dataset, labeled)


def hidden_rows(dataset, labeled):
    return np.setdiff1d(np.arange(len(dataset.rewards)), labeled)


@pytest.fixture
def few_steps(monkeypatch):
    """Two of the Gaussian process instead of a hundred, where its parameters do not matter."""

    def few(*bounds):
        return range(2) if bounds == (100,) else range(*bounds)

    for each in (script, td3bc_imputed, iql_imputed):
        monkeypatch.setattr(each, "range", few, raising=False)


@pytest.fixture
def no_environment(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("an environment was made")

    monkeypatch.setattr(gym, "make", refuse)
    monkeypatch.setattr(minari.MinariDataset, "recover_environment", refuse)


# --- The paper's reward model ---
def standard_inputs(dataset):
    """Observations by mean and std, actions by their range to [-1, 1]."""
    actions = np.float64(dataset.actions)
    low = actions.min(axis=0)
    high = actions.max(axis=0)
    actions = 2 * (actions - low) / (high - low) - 1
    return np.float32(np.hstack([standardise(dataset.observations), actions]))


def standardise(column):
    column = np.float64(column)
    return (column - column.mean(axis=0)) / column.std(axis=0)


def draw_parameters(layer, generator):
    """As nn.Linear is initialised, where weights lie the other way round."""
    bound = layer.in_features**-0.5
    weight = torch.empty(layer.in_features, layer.out_features)
    weight.uniform_(-bound, bound, generator=generator)
    layer.weight.data = weight.T.contiguous()
    layer.bias.data.uniform_(-bound, bound, generator=generator)


def fit_plainly(inputs, rewards, seed):
    """Eq. 4 for one seed: 5 epochs of batches of 8, the last one filled up."""
    generator = torch.Generator().manual_seed(1_000_003 + seed)
    network = make_mlp(inputs.shape[1], 1)
    for layer in (network[0], network[2], network[4]):
        draw_parameters(layer, generator)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    targets = torch.tensor(standardise(rewards)).float()
    for _ in range(5):
        order = torch.randperm(len(targets), generator=generator).tolist()
        while len(order) % 8 != 0:
            order.append(order[len(order) - len(targets)])  # from the epoch's beginning
        for start in range(0, len(order), 8):
            batch = order[start : start + 8]
            error = network(inputs[batch]).squeeze(1) - targets[batch]
            optimizer.zero_grad()
            (error**2).mean().backward()
            optimizer.step()
    predicted = network(inputs).squeeze(1).detach().numpy()
    return predicted * rewards.std() + rewards.mean()


def test_the_fit_equals_a_plain_loop_for_each_seed(dataset):
    labeled = draw_labels(dataset, 0.05)
    assert labeled.shape[1] % 8 == 3, "the last batch has to be filled up"
    predicted = predict(fit(dataset, labeled, settings()), dataset)
    inputs = torch.tensor(standard_inputs(dataset))
    for k, rows in enumerate(labeled):
        expected = fit_plainly(inputs[rows], dataset.rewards[rows], seed=k)
        assert_allclose(predicted[k, rows], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("each", [script, td3bc_imputed, iql_imputed])
def test_the_mlps_defaults_are_the_same_everywhere_and_its_width_is_an_option(each, dataset):
    args = each.Args()
    assert (args.reward_hidden_dim, args.reward_epochs) == (256, 300)
    assert (args.reward_learning_rate, args.reward_batch_size) == (1e-4, 64)
    args = each.Args(reward_hidden_dim=7)
    generators = each.make_generators(SEEDS, stream=1)
    model = each.RewardModel(dataset, draw_labels(dataset, 0.1), generators, args).model
    assert model.layer2.weight.shape == (2, 7, 7)


def test_a_feature_that_is_nearly_always_the_same_is_not_blown_up(dataset):
    """Its std is tiny: at least 1/1000 of its range divides it; one without a range stays."""
    many = np.tile(np.arange(len(dataset.rewards)), 5000)
    observations = dataset.observations[many]
    observations[:, 0] = 7
    observations[0, 0] = 8
    observations[:, 1] = 5
    dataset = dataset._replace(observations=observations, actions=dataset.actions[many])
    labeled = draw_labels(dataset, 0.05)
    std = script.RewardModel(dataset, labeled, None, settings("gp")).model.std
    others = dataset.observations[:, 2:].std(axis=0, dtype=np.float64)
    assert_allclose(std[:OBS_DIM], [1e-3, 1, *others], rtol=1e-4)


@MODELS
def test_a_seed_fits_the_same_alone_or_among_others(model, dataset):
    together = draw_labels(dataset, 0.05, range(3, 6))
    alone = draw_labels(dataset, 0.05, range(4, 5))
    among_others = impute(dataset, together, settings(model), range(3, 6))
    by_itself = impute(dataset, alone, settings(model), range(4, 5))
    assert_allclose(among_others[1], by_itself[0], rtol=1e-4, atol=1e-5)
    assert not np.allclose(among_others[0], among_others[1], atol=1e-3)


@MODELS
def test_imputation_keeps_labels_and_sees_no_hidden_reward(model, dataset):
    labeled = draw_labels(dataset, 0.05)
    secret = np.full_like(dataset.rewards, np.nan)
    secret[labeled] = dataset.rewards[labeled]
    imputed = impute(dataset, labeled, settings(model))
    without = impute(dataset._replace(rewards=secret), labeled, settings(model))
    assert_array_equal(imputed, without)
    for k in range(2):
        assert_array_equal(imputed[k, labeled[k]], dataset.rewards[labeled[k]])
        hidden = hidden_rows(dataset, labeled[k])
        error = imputed[k, hidden] - dataset.rewards[hidden]
        assert np.abs(error).min() > 1e-7


@MODELS
def test_imputation_in_chunks_is_imputation_at_once(model, dataset, few_steps):
    labeled = draw_labels(dataset, 0.05)
    fitted = fit(dataset, labeled, settings(model))
    assert len(dataset.rewards) > 2 * 128
    inputs = torch.from_numpy(dataset.observations), torch.from_numpy(dataset.actions)
    with torch.no_grad():
        at_once = fitted(*[x.expand(len(SEEDS), -1, -1) for x in inputs])
    assert_allclose(predict(fitted, dataset), at_once, rtol=1e-4, atol=1e-5)


UNITS = [  # scale, offset in standard deviations
    (1e-4, 0),
    (1e6, 0),
    (1, 100),
    (1, -1e4),
    (1e-4, 1e4),
    (1e6, -1e4),
    (1e3, 1e3),
]


@MODELS
def test_r2_does_not_depend_on_the_unit_of_the_rewards(model, dataset):
    labeled = draw_labels(dataset, 0.3)
    args = settings(model, reward_epochs=40, reward_batch_size=32)

    def r2(rewards):
        changed = dataset._replace(rewards=np.float32(rewards))
        return judge(impute(changed, labeled, args), changed, labeled)["r2"]

    expected = r2(dataset.rewards)
    assert min(expected) > 0.8, "a model that learned nothing would pass"
    rewards = np.float64(dataset.rewards)
    std = rewards.std()
    for scale, offset in UNITS:
        found = r2(scale * (rewards + offset * std))
        assert_allclose(found, expected, atol=0.002, err_msg=f"{scale} {offset}")


@MODELS
def test_r2_does_not_depend_on_the_unit_of_a_feature(model, dataset):
    labeled = draw_labels(dataset, 0.3)
    args = settings(model, reward_epochs=40, reward_batch_size=32)
    units = np.float32([1e-6, 1e6, 1, 1e3, 1e-3])
    changed = dataset._replace(
        observations=dataset.observations * units + 100 * units,
        actions=50 * dataset.actions + 1000,
    )
    quality = judge(impute(dataset, labeled, args), dataset, labeled)
    found = judge(impute(changed, labeled, args), changed, labeled)
    assert_allclose(found["r2"], quality["r2"], atol=0.005)


# --- The Gaussian process, in numpy ---
def kernel(parameters, x1, x2):
    """k of all pairs, as its formula stands in the docstring."""
    (linear,) = np.exp(parameters["log_linear"])
    (smooth,) = np.exp(parameters["log_smooth"])
    relevance = np.exp(parameters["log_relevance"])
    length = 1 / np.exp(parameters["log_inverse_length"])
    matrix = np.empty((len(x1), len(x2)))
    for i, a in enumerate(x1):
        for j, b in enumerate(x2):
            square = np.sum((a - b) ** 2 / (2 * length**2))
            product = np.sum(relevance * a * b)
            matrix[i, j] = 1 + linear * product + smooth * np.exp(-square)
    return matrix


def covariance(parameters, x):
    noise = np.exp(parameters["log_noise"]) + 1e-4
    return kernel(parameters, x, x) + noise * np.eye(len(x))


def negative_log_posterior(parameters, starts, x, y):
    """Of the parameters, but for a constant: each is normal around its start a priori."""
    matrix = covariance(parameters, x)
    _, log_determinant = np.linalg.slogdet(matrix)
    loss = y @ np.linalg.inv(matrix) @ y / 2 + log_determinant / 2
    for name, parameter in parameters.items():
        loss += np.sum((parameter - starts[name]) ** 2) / 2
    return loss


def seed_parameters(model, k):
    state = model.model.state_dict()
    return {name: state[name][k, 0].numpy().copy() for name in state if "log_" in name}


@pytest.fixture
def process(dataset, monkeypatch):
    """A fitted process of 20 labels, its parameters before, and those and their gradients by step."""
    steps, Adam = [], torch.optim.Adam

    class Watched(Adam):
        def step(self):
            parameters = self.param_groups[0]["params"]
            steps.append([(each.detach().clone(), each.grad.clone()) for each in parameters])
            super().step()

    labeled = draw_labels(dataset, 0.05)
    model = script.RewardModel(dataset, labeled, None, settings("gp"))
    starts = [seed_parameters(model, k) for k in SEEDS]
    monkeypatch.setattr(torch.optim, "Adam", Watched)
    script.fit_reward_model(model, dataset, labeled, None, settings("gp"))
    return model, labeled, starts, [dict(zip(starts[0], step)) for step in steps]


def test_the_process_is_the_posterior_of_its_kernel(dataset, process):
    model, labeled, _, _ = process
    predicted = predict(model, dataset)
    inputs = np.float64(standard_inputs(dataset))
    observations = torch.from_numpy(dataset.observations).expand(2, -1, -1)
    actions = torch.from_numpy(dataset.actions).expand(2, -1, -1)
    std = script.posterior_std(model, observations, actions).numpy()
    for k, rows in enumerate(labeled):
        parameters = seed_parameters(model, k)
        x = inputs[rows]
        rewards = np.float64(dataset.rewards[rows])
        y = standardise(rewards)
        inverse = np.linalg.inv(covariance(parameters, x))
        for row in range(0, NUM_ROWS - 20, 40):
            new = inputs[[row]]
            similar = kernel(parameters, new, x)[0]
            mean = similar @ inverse @ y
            expected = rewards.mean() + rewards.std() * mean
            assert predicted[k, row] == pytest.approx(expected, abs=1e-4)
            variance = kernel(parameters, new, new).item() - similar @ inverse @ similar
            (noise,) = np.exp(parameters["log_noise"])
            found = std[k, row] / rewards.std()
            assert found**2 == pytest.approx(variance + noise, abs=2e-4)


def test_the_process_descends_the_negative_log_posterior_of_its_parameters(dataset, process):
    model, labeled, starts, steps = process
    inputs = np.float64(standard_inputs(dataset))
    for k, rows in enumerate(labeled):
        y = standardise(dataset.rewards[rows])

        def loss(parameters, k=k, rows=rows, y=y):
            return negative_log_posterior(parameters, starts[k], inputs[rows], y)

        assert loss(seed_parameters(model, k)) < loss(starts[k]) - 1
        assert len(steps) == 100
        for name, (value, _) in steps[0].items():  # Adam's first step is the learning rate
            moved = (steps[1][name][0] - value).abs()
            assert_allclose(moved, 0.1, rtol=1e-3)
        for step in steps[:2]:  # at the first, the prior of the parameters has no slope
            parameters = {name: values[k, 0].numpy() for name, (values, _) in step.items()}
            before = loss(parameters)
            for name, (_, gradient) in step.items():
                for j, found in enumerate(gradient[k, 0].tolist()):
                    moved = deepcopy(parameters)
                    moved[name][j] += 1e-5
                    slope = (loss(moved) - before) / 1e-5
                    assert found == pytest.approx(slope, rel=1e-2, abs=1e-3), name


def test_the_process_always_finds_its_cholesky_factor(dataset):
    """600 draws of labels: constant and doubled features, every row twice, binary labels."""
    observations = dataset.observations.copy()
    observations[:, 0] = 3
    observations[:, 1] = observations[:, 2]
    twice = np.arange(300) // 2
    dataset = dataset._replace(
        observations=observations[twice],
        actions=dataset.actions[twice],
        rewards=dataset.rewards[:300],  # differing
    )
    binary = np.float32(dataset.rewards > np.median(dataset.rewards))
    rng = np.random.default_rng(0)
    smallest, largest = dataset.rewards.argmin(), dataset.rewards.argmax()
    for num_labels in (5, 10, 50):
        for rewards in (dataset.rewards, binary):
            drawn = dataset._replace(rewards=rewards)
            labeled = [rng.choice(300, num_labels, replace=False) for _ in range(100)]
            labeled = np.array(labeled)
            labeled[:, 0], labeled[:, 1] = smallest, largest  # all equal, they would be refused
            predicted = fit(drawn, labeled, settings("gp"), range(100))
            imputed = script.impute_rewards(predicted, drawn, labeled)
            assert np.isfinite(imputed).all()


def test_of_more_than_2000_labels_the_process_uses_2000_from_all_over_the_log(few_steps):
    write_rows(make_rows(3000))
    dataset = script.load_dataset(None, Path("own.hdf5"))
    labeled = draw_labels(dataset, 0.9, range(1))
    assert labeled.shape[1] > 2500
    model = fit(dataset, labeled, settings("gp"), range(1)).model
    assert model.x.shape == (1, 2000, OBS_DIM + ACT_DIM)
    assert model.weights.shape == (1, 2000, 1)
    inputs = torch.tensor(standard_inputs(dataset)[labeled])
    distance = torch.cdist(model.x, inputs.double())
    used = distance.argmin(dim=2).squeeze(0)
    assert distance.amin(dim=2).max() < 1e-4
    assert used[0] == 0
    assert used[-1] == labeled.shape[1] - 1
    assert set(used.diff().tolist()) == {1, 2}


def test_the_parameters_are_found_on_500_labels_from_all_over_the_log(few_steps, monkeypatch):
    write_rows(make_rows(1200))
    dataset = script.load_dataset(None, Path("own.hdf5"))
    labeled = draw_labels(dataset, 1.0, range(1))
    seen, cholesky = [], script.GaussianProcess.cholesky

    def watch(process, x):
        seen.append(x)
        return cholesky(process, x)

    monkeypatch.setattr(script.GaussianProcess, "cholesky", watch)
    fit(dataset, labeled, settings("gp"), range(1))
    few, _, every = seen  # two steps, then the weights
    assert few.shape[1] == 500
    assert torch.equal(few[:, [0, -1]], every[:, [0, -1]])


def test_two_thousand_labels_or_fewer_are_all_used(dataset, process):
    model, labeled, _, _ = process
    inputs = standard_inputs(dataset)
    for k, rows in enumerate(labeled):
        assert_allclose(model.model.x[k].numpy(), inputs[rows], atol=1e-5)


def test_few_labels_are_where_the_process_is_better(dataset):
    labeled = draw_labels(dataset, 0.1)
    r2 = {}
    for model in ("mlp", "gp"):
        args = script.Args(reward_model=model)
        quality = judge(impute(dataset, labeled, args), dataset, labeled)
        r2[model] = np.mean(quality["r2"])
    assert r2["gp"] > 0.9 > r2["mlp"]


# --- Quality ---
def make_dataset(rewards, episode_ids):
    """A Dataset of which only rewards and episodes matter."""
    fields = dict.fromkeys(script.Dataset._fields)
    fields["rewards"] = np.float32(rewards)
    fields["episode_ids"] = np.array(episode_ids)
    return script.Dataset(**fields)


def test_quality_is_measured_on_hidden_rewards_alone(dataset):
    labeled = draw_labels(dataset, 0.3)
    rng = np.random.default_rng(0)
    imputed = np.float32(rng.normal(size=(2, len(dataset.rewards))))
    quality = judge(imputed, dataset, labeled)
    for k in range(2):
        hidden = hidden_rows(dataset, labeled[k])
        true = dataset.rewards[hidden]
        error = np.abs(imputed[k, hidden] - true)
        square = np.mean(error**2)
        assert quality["mse"][k] == pytest.approx(square, rel=1e-5)
        assert quality["mae"][k] == pytest.approx(error.mean(), rel=1e-5)
        assert quality["r2"][k] == pytest.approx(1 - square / true.var(), rel=1e-4)
        returns = []
        for rewards in (dataset.rewards, imputed[k]):
            episodes = range(dataset.episode_ids[-1] + 1)
            returns.append([rewards[dataset.episode_ids == i].sum() for i in episodes])
        correlation = np.corrcoef(returns)[0, 1]
        assert quality["return_correlation"][k] == pytest.approx(correlation, rel=1e-4)


def test_there_is_no_quality_where_nothing_is_hidden():
    dataset = make_dataset([1, 2, np.nan], [0, 0, 1])
    labeled = np.array([[0, 1]])
    assert judge(np.zeros((1, 3)), dataset, labeled) is None


def test_quality_of_a_partly_labelled_log_is_that_of_the_known_rewards():
    """The second episode has no return; those of the others are 3 and 7, imputed 3 and 5."""
    dataset = make_dataset([1, 2, 3, np.nan, 4, 3], [0, 0, 1, 1, 2, 2])
    imputed = np.float32([[1, 2, 4, 9, 2, 3]])
    quality = judge(imputed, dataset, np.array([[0, 1, 5]]))
    assert quality["mse"] == [(1 + 4) / 2]
    assert quality["mae"] == [(1 + 2) / 2]
    assert quality["r2"] == [1 - 2.5 / 0.25]
    assert quality["return_correlation"] == [pytest.approx(1)]


@pytest.mark.parametrize(
    ("rewards", "episode_ids", "unknown"),
    [
        ([1, 2, 3, 4], [0, 0, 0, 0], "return_correlation"),  # a single episode
        ([1, np.nan, 3, 4], [0, 0, 1, 1], "return_correlation"),  # a single known return
        ([1, 2, 2, 1], [0, 0, 1, 1], "return_correlation"),  # equal returns
        ([1, 2, 5, 5], [0, 0, 1, 1], "r2"),  # equal hidden rewards
    ],
)
def test_what_cannot_be_measured_is_not_a_number(rewards, episode_ids, unknown):
    dataset = make_dataset(rewards, episode_ids)
    labeled = np.array([[0, 1]])
    imputed = np.float32([[1, 2, 3, 4]])
    quality = judge(imputed, dataset, labeled)
    for name, values in quality.items():
        assert np.isfinite(values).all() == (name != unknown), name


# --- The report ---
SMALL = "--device cpu --compile off --reward-epochs 3 --reward-batch-size 8"
OWN = "--dataset-path own.hdf5"
SOME = f"{OWN} --label-fraction 0.1"


def run(options):
    script.main(script.tyro.cli(script.Args, args=shlex.split(f"{SMALL} {options}")))


def read_json(path):
    """Of a file that any JSON parser reads: Python writes NaN, which others refuse."""

    def refuse(name):
        raise AssertionError(f"{path} holds {name}, which is no JSON")

    return json.loads(Path(path).read_text(), parse_constant=refuse)


def printed_numbers(model, output):
    """The means in a model's row of the table."""
    (row,) = re.findall(rf"^{model} .*", output, re.MULTILINE)
    return [float(number) for number in re.findall(r"(\S+) ±", row)]


def test_the_report_compares_the_models_on_the_same_labels(
    dataset, few_steps, no_environment, capsys
):
    run(f"{SOME} --num-seeds 2 --run-dir run")
    result = read_json("run/result.json")
    labeled = draw_labels(dataset, 0.1)
    assert result["num_labels"] == labeled.shape[1]
    assert result["judged_on"] == "the hidden rewards"
    assert result["reward_model"] == "mlp"
    assert list(result["quality"]) == ["mlp", "gp", "linear"]
    numbers = {"train_mse", "r2", "mse", "mae", "return_correlation"}
    for quality in result["quality"].values():
        assert set(quality) == numbers
        assert all(len(values) == 2 for values in quality.values())

    args = script.Args(reward_epochs=3, reward_batch_size=8, reward_model="gp")
    model = fit(dataset, labeled, args)
    expected = judge(script.impute_rewards(model, dataset, labeled), dataset, labeled)
    found = result["quality"]["gp"]
    assert found["r2"] == pytest.approx(expected["r2"], abs=1e-4)
    fitted = np.take_along_axis(predict(model, dataset), labeled, axis=1)
    square = (fitted - dataset.rewards[labeled]) ** 2
    assert found["train_mse"] == pytest.approx(square.mean(axis=1), rel=1e-3)

    output = capsys.readouterr().out
    assert re.search("train MSE +R2 +MSE +MAE +return correlation", output)
    for model, quality in result["quality"].items():
        means = [np.mean(values) for values in quality.values()]
        assert printed_numbers(model, output) == pytest.approx(means, rel=1e-3, abs=1e-4)
    assert Path("run/report.png").read_bytes().startswith(b"\x89PNG")
    assert read_json("run/config.json")["label_fraction"] == 0.1
    assert not list(Path("run").glob("*.tmp"))


def test_linear_regression_is_least_squares_on_the_labels(dataset):
    labeled = draw_labels(dataset, 0.1)
    predicted = script.linear_regression(dataset, labeled)
    ones = np.ones((len(dataset.rewards), 1))
    inputs = np.hstack([dataset.observations, dataset.actions, ones]).astype(np.float64)
    for k, rows in enumerate(labeled):
        x, y = inputs[rows], dataset.rewards[rows]
        weights = np.linalg.solve(x.T @ x, x.T @ y)
        assert_allclose(predicted[k], inputs @ weights, atol=1e-4)


def test_with_the_process_calibration_is_printed(dataset, capsys):
    run(f"{SOME} --reward-model gp --run-dir run")
    labeled = draw_labels(dataset, 0.1, range(1))
    model = fit(dataset, labeled, settings("gp"), range(1))
    observations = torch.from_numpy(dataset.observations)
    actions = torch.from_numpy(dataset.actions)
    std = script.posterior_std(model, observations[None], actions[None])
    std = std.squeeze(0).numpy()
    predicted = script.impute_rewards(model, dataset, labeled[:, :0])[0]
    hidden = hidden_rows(dataset, labeled)
    assert len(hidden) < 1000, "all of them are counted"
    error = np.abs(dataset.rewards - predicted)[hidden]
    inside = np.mean(error <= 2 * std[hidden])
    assert 0.5 < inside < 1
    assert read_json("run/result.json")["inside_2_std"] == pytest.approx(inside)
    text = f"calibration   {inside:.1%} of those rewards are within ± 2 std"
    assert text in capsys.readouterr().out


def test_calibration_draws_from_the_whole_log(few_steps):
    write_rows(make_rows(3000) | {"rewards": np.arange(3000.0)})
    dataset = script.load_dataset(None, Path("own.hdf5"))
    labeled = draw_labels(dataset, 0.01, range(1))
    model = fit(dataset, labeled, settings("gp"), range(1))
    found = script.calibrate(model, dataset.rewards[None], dataset, labeled)
    assert len(found["true"]) == 1000
    assert found["true"].mean() == pytest.approx(1500, rel=0.1)


def test_returns_are_judged_with_their_labels(dataset):
    labeled = draw_labels(dataset, 0.5, range(1))
    predicted = np.random.default_rng(0).normal(size=(1, len(dataset.rewards))).astype(np.float32)
    imputed = predicted.copy()
    imputed[0, labeled[0]] = dataset.rewards[labeled[0]]
    found = script.judge(predicted, dataset, labeled)
    assert found["return_correlation"] == judge(imputed, dataset, labeled)["return_correlation"]


def test_what_is_printed_are_mean_and_std_of_the_seeds():
    assert script.mean_std([1, 3]) == "2 ± 1"


def test_a_sweep_tells_r2_by_the_number_of_labels(dataset, few_steps, capsys):
    run(f"{OWN} --label-fraction 0.5 --num-seeds 2 --run-dir run --sweep")
    lines = Path("run/sweep.csv").read_text().splitlines()
    assert lines[0] == "labels,model,r2_mean,r2_std,r2_worst"
    table = read_json("run/result.json")["sweep"]
    assert lines[1:] == [",".join(map(str, row.values())) for row in table]
    found = [(row["labels"], row["model"]) for row in table]
    counts = (4, 10, 30, 100, 300)  # 4 are 1%
    assert found == [(count, model) for count in counts for model in ("mlp", "gp", "linear")]
    labeled = script.split_labels(dataset.rewards, 100 / len(dataset.rewards), SEEDS)
    assert labeled.shape[1] == 100
    expected = script.linear_regression(dataset, labeled)
    np.put_along_axis(expected, labeled, dataset.rewards[labeled], axis=1)
    r2 = judge(expected, dataset, labeled)["r2"]
    for row in table:  # of two seeds
        assert row["r2_std"] == pytest.approx(row["r2_mean"] - row["r2_worst"])
    row = table[found.index((100, "linear"))]
    assert row["r2_mean"] == pytest.approx(np.mean(r2), abs=1e-5)
    assert row["r2_worst"] == pytest.approx(np.min(r2), abs=1e-5)
    assert Path("run/sweep.png").read_bytes().startswith(b"\x89PNG")
    assert re.search(r"100 labels +gp +R2 0\.\d+", capsys.readouterr().out)


def test_where_everything_is_labelled_a_fifth_of_the_labels_judges(rows, few_steps, capsys):
    hide_rewards(rows["rewards"])
    write_rows(rows)
    run(f"{OWN} --run-dir run --num-seeds 2 --output-path full.hdf5")
    output = capsys.readouterr().out
    assert re.search(r"judged on     \d+ labels, held out; .* fitted to all", output)
    dataset = script.load_dataset(None, Path("own.hdf5"))
    labeled = draw_labels(dataset, None)
    fitted_to = script.four_fifths(labeled, SEEDS)
    assert fitted_to.shape == (2, int(0.8 * labeled.shape[1]))
    assert set(fitted_to[0]) != set(fitted_to[1])
    for some, all_labels in zip(fitted_to, labeled):
        assert set(some) < set(all_labels)
    later = script.four_fifths(labeled, range(1, 3))
    assert_array_equal(later[0], fitted_to[1], "seed 1's, whichever is the first")
    saved = np.load("run/reward_model.npz")
    assert saved["reward_mean"][0] == pytest.approx(np.nanmean(dataset.rewards), rel=1e-6)
    judged = judge(impute(dataset, fitted_to, settings("gp")), dataset, fitted_to)
    quality = read_json("run/result.json")["quality"]["gp"]
    assert quality["r2"] == pytest.approx(judged["r2"], abs=1e-4)
    assert quality["return_correlation"] == [None, None], "no episode is known as a whole"


def apply_mlp(saved, x):
    """The first seed's network, (rows, in_dim) -> (rows, 1)."""
    x = np.maximum(x @ saved["layer1.weight"][0] + saved["layer1.bias"][0], 0)
    x = np.maximum(x @ saved["layer2.weight"][0] + saved["layer2.bias"][0], 0)
    return x @ saved["layer3.weight"][0] + saved["layer3.bias"][0]


@MODELS
def test_the_saved_model_needs_numpy_alone(model, dataset, few_steps):
    run(f"{SOME} --reward-model {model} --num-seeds 2 --run-dir run --output-path full.hdf5")
    saved = dict(np.load("run/reward_model.npz", allow_pickle=False))
    x = np.hstack([dataset.observations, dataset.actions])
    x = (x - saved["mean"]) / saved["std"]
    if model == "mlp":
        output = apply_mlp(saved, x)
    else:
        parameters = {name: saved[name][0, 0] for name in saved if "log_" in name}
        output = kernel(parameters, x, saved["x"][0]) @ saved["weights"][0]
    predicted = saved["reward_mean"][0] + saved["reward_std"][0] * output[:, 0]
    full = script.load_dataset(None, Path("full.hdf5")).rewards
    hidden = hidden_rows(dataset, draw_labels(dataset, 0.1)[0])
    assert_allclose(predicted[hidden], full[hidden], rtol=1e-4, atol=1e-5)


def test_the_seed_and_the_precision_are_those_asked_for(few_steps, monkeypatch):
    asked = []
    split_labels, make_generators = script.split_labels, script.make_generators

    def watch_labels(rewards, fraction, seeds):
        asked.append(seeds)
        return split_labels(rewards, fraction, seeds)

    def watch_generators(seeds, stream):
        asked.append(seeds)
        return make_generators(seeds, stream)

    monkeypatch.setattr(script, "split_labels", watch_labels)
    monkeypatch.setattr(script, "make_generators", watch_generators)
    run(f"{SOME} --seed 3 --matmul-precision high")
    found = torch.get_float32_matmul_precision()
    assert len(asked) >= 2
    assert set(asked) == {range(3, 4)}
    assert found == "high"


# --- The datasets it writes ---
def agent_sees(agent, dataset, model, num_seeds):
    """The rewards that the first seed's agent would impute, with the settings of `run`."""
    args = agent.Args(reward_model=model, reward_epochs=3, reward_batch_size=8)
    seeds = range(num_seeds)
    labeled = agent.split_labels(dataset.rewards, 0.1, seeds)
    generators = agent.make_generators(seeds, stream=1)
    reward_model = agent.RewardModel(dataset, labeled, generators, args)
    agent.fit_reward_model(reward_model, dataset, labeled, generators, args)
    return agent.impute_rewards(reward_model, dataset, labeled)[0], labeled[0]


@MODELS
@AGENTS
def test_a_round_trip_is_what_the_agents_impute_bit_for_bit(
    agent, model, rows, few_steps, no_environment
):
    rows["infos"] = np.arange(NUM_ROWS)
    rows["rewards"] = rows["rewards"] / np.float64(3)  # float64, which float32 cannot hold
    write_rows(rows)
    outputs = "--output-path full.hdf5 --output-minari-id my/full-v0"
    run(f"{SOME} --reward-model {model} --num-seeds 2 {outputs}")
    source = agent.load_dataset(None, Path("own.hdf5"))
    expected, labeled = agent_sees(agent, source, model, 2)
    from_hdf5 = agent.load_dataset(None, Path("full.hdf5"))
    from_minari = agent.load_dataset("my/full-v0")
    for dataset in (from_hdf5, from_minari):
        assert_array_equal(dataset.rewards, expected)
        for name in TRANSITION:
            assert_array_equal(getattr(dataset, name), getattr(source, name), name)
        alive = source.terminals == 0
        found = dataset.next_observations[alive]
        assert_array_equal(found, source.next_observations[alive])

    with h5py.File("full.hdf5") as file:
        assert file["rewards"].shape == (NUM_ROWS, 1), "as in the source"
        assert np.array_equal(file["infos"], np.arange(NUM_ROWS)), "a column of another program"
        assert file["labeled"].dtype == bool
        labelled = file["labeled"][()]
        assert labelled.sum() == len(labeled)
        assert_array_equal(file["rewards"][labelled], rows["rewards"][labelled])
        assert json.loads(file.attrs["imputation_settings"])["reward_model"] == model
        assert model in json.loads(file.attrs["imputation_quality"])
    episodes = list(minari.load_dataset("my/full-v0").iterate_episodes())
    marks = np.concatenate([episode.infos["labeled"] for episode in episodes])
    assert_array_equal(np.flatnonzero(marks), labeled)


def test_rows_that_are_no_transition_are_completed_too(rows, few_steps):
    """Those that were cut off: a label on one is kept, any other reward is predicted."""
    rewards = rows["rewards"]
    hide_rewards(rewards)
    rewards[31] = 0.25
    rewards[71] = np.nan
    rewards[-1] = np.nan
    write_rows(rows)
    run(f"{OWN} --output-path full.hdf5 --run-dir run")
    known = np.isfinite(rewards)
    with h5py.File("full.hdf5") as file:
        full = file["rewards"][()]
        assert_array_equal(full[known], rewards[known])
        assert_array_equal(file["labeled"], known[:, 0])
    known_and_whole = known[:-1].copy()
    known_and_whole[31::40] = False
    assert read_json("run/result.json")["num_labels"] == known_and_whole.sum()

    saved = dict(np.load("run/reward_model.npz"))
    x = np.float32(np.hstack([rows["observations"], rows["actions"]]))
    x = (x - saved["mean"]) / saved["std"]
    predicted = saved["reward_mean"] + saved["reward_std"] * apply_mlp(saved, x)
    assert_allclose(full[~known], predicted[~known], rtol=1e-4, atol=1e-5)


def test_rows_without_an_action_stay_unknown_and_are_counted(rows, few_steps, capsys):
    """As a log may have them where an episode was cut off: an observation, and nothing else."""
    cut_off = rows["timeouts"] == 1
    rows["actions"][cut_off] = np.nan
    rows["rewards"][cut_off] = np.nan
    write_rows(rows)
    run(f"{SOME} --output-path full.hdf5")
    with h5py.File("full.hdf5") as file:
        assert_array_equal(np.isnan(file["rewards"][()])[:, 0], cut_off)
    assert f"unknown       {cut_off.sum()} rewards" in capsys.readouterr().out


def test_a_d4rl_file_keeps_its_rows_and_its_rule(rows, few_steps, monkeypatch):
    path = Path("d4rl/hopper_medium-v2.hdf5")
    path.parent.mkdir()
    wide = {"observations": np.hstack([rows["observations"]] * 3)[:, :11]}
    write_rows(rows | wide, path)
    digest = script.hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(script.SHA256, "hopper-medium-v2", digest)
    run("--env-id hopper-medium-v2 --label-fraction 0.1 --output-path full.hdf5")
    source = script.load_dataset("hopper-medium-v2")
    with h5py.File("full.hdf5") as file:
        assert len(file["rewards"]) == NUM_ROWS
        assert np.isfinite(file["rewards"]).all()
        found = file["rewards"][file["labeled"][()]][:, 0]
    labeled = draw_labels(source, 0.1, range(1))
    assert_array_equal(found, source.rewards[labeled[0]])


def test_a_file_of_a_d4rl_task_becomes_a_minari_dataset_with_simulator_and_references(
    rows, few_steps
):
    write_rows(rows | {"observations": np.hstack([rows["observations"]] * 3)[:, :11]})
    run(f"{SOME} --env-id hopper-own --output-minari-id my/full-v0 --output-path full.hdf5")
    made = script.load_dataset("my/full-v0")
    assert made.env.env_spec.id == "Hopper-v4"
    assert (made.ref_min, made.ref_max) == (-20.272305, 3234.3)
    # What was observed last is unknown: what was observed before stands in.
    ends = made.terminals == 1
    assert ends.any()
    assert_array_equal(made.next_observations[ends], made.observations[ends])


@pytest.mark.parametrize("env_id", ["Wide-v0", "own_envs:Wide-v0"])
def test_a_minari_dataset_names_the_simulator_it_can_be_evaluated_in(env_id, few_steps):
    run(f"{SOME} --env-id {env_id} --output-minari-id my/full-v0")
    assert script.load_dataset("my/full-v0").env.env_spec.entry_point == "own_envs:WideEnv"


def test_a_simulator_that_minari_cannot_store_is_refused_before_the_fit(monkeypatch):
    """One registered by its class, not by the name of it."""
    monkeypatch.setitem(gym.registry, "Own-v0", gym.envs.registration.EnvSpec("Own-v0", gym.Env))
    monkeypatch.setattr(script, "fit_reward_model", None)
    with pytest.raises(script.UserError, match="cannot find or store the environment of Own-v0"):
        run(f"{SOME} --env-id Own-v0 --output-minari-id my/full-v0")
    assert not Path("minari/my").exists()


def test_a_failed_write_leaves_no_part_of_a_minari_dataset(few_steps, monkeypatch):
    to_json = gym.envs.registration.EnvSpec.to_json

    def fail(env_spec):
        if Path("minari/my/full-v0/data/main_data.hdf5").exists():  # after the transitions
            raise OSError("disk full")
        return to_json(env_spec)

    monkeypatch.setattr(gym.envs.registration.EnvSpec, "to_json", fail)
    with pytest.raises(OSError, match="disk full"):
        run(f"{SOME} --env-id own_envs:Wide-v0 --output-minari-id my/full-v0")
    assert not Path("minari/my/full-v0").exists()


@pytest.mark.parametrize("timeouts", ["missing", "without the gaps"])
def test_a_thinned_log_becomes_episodes_that_end_where_it_has_a_gap(
    timeouts, rows, few_steps, no_environment
):
    """Its own next_observations go on with the next row, but for every tenth row."""
    rows["observations"][:, 0] = 5  # a feature that does not tell
    following = np.roll(rows["observations"], -1, axis=0)
    gaps = np.arange(NUM_ROWS) % 10 == 9
    following[gaps, 1] += 1
    rows["timeouts"][:] = False
    if timeouts == "missing":
        del rows["timeouts"]
    write_rows(rows | {"next_observations": following})
    run(f"{SOME} --output-minari-id my/thin-v0")
    made = script.load_dataset("my/thin-v0")
    for name in ("observations", "actions", "next_observations"):
        expected = following if name == "next_observations" else rows[name]
        assert_array_equal(getattr(made, name), np.float32(expected), name)
    assert_array_equal(made.terminals, rows["terminals"])
    ends = gaps | rows["terminals"]
    assert_array_equal(np.diff(made.episode_ids), ends[:-1])
    for episode in minari.load_dataset("my/thin-v0").iterate_episodes():
        assert episode.terminations[-1] != episode.truncations[-1]
        assert not episode.terminations[:-1].any()
        assert not episode.truncations[:-1].any()


def make_minari(**settings):
    """tests/wide-v0: twenty episodes of Wide-v0; returns their observations."""
    rng, episodes = np.random.default_rng(0), []
    for length in [3, 2, 4, 1] * 5:
        is_last = np.arange(length) == length - 1
        episodes.append(
            EpisodeBuffer(
                observations=rng.normal(size=(length + 1, 1)),
                actions=rng.uniform(0, 10, (length, 2)).astype(np.float32),
                rewards=rng.normal(size=length),
                terminations=is_last & (length == 3),
                truncations=is_last & (length != 3),
            )
        )
    minari.create_dataset_from_buffers("tests/wide-v0", episodes, env="Wide-v0", **settings)
    return [np.float32(episode.observations) for episode in episodes]


def test_a_minari_source_becomes_a_minari_dataset_of_the_same_environment(request):
    observations = make_minari(ref_min_score=0.0, ref_max_score=60.0)
    request.getfixturevalue("no_environment")  # from here on
    run("--env-id tests/wide-v0 --label-fraction 0.5 --output-minari-id my/full-v0")
    source, made = (script.load_dataset(name) for name in ("tests/wide-v0", "my/full-v0"))
    assert (made.ref_min, made.ref_max) == (0.0, 60.0)
    assert made.env.env_spec == source.env.env_spec
    assert made.env.action_space == source.env.action_space, "not what the log has of it"
    for name in (*TRANSITION, "next_observations"):
        assert_array_equal(getattr(made, name), getattr(source, name), name)
    labeled = draw_labels(source, 0.5, range(1))[0]
    assert_array_equal(made.rewards[labeled], source.rewards[labeled])
    episodes = minari.load_dataset("my/full-v0").iterate_episodes()
    for episode, expected in zip(episodes, observations, strict=True):
        assert_array_equal(episode.observations, expected)


def test_a_partly_labelled_log_goes_through_the_whole_chain(rows):
    hide_rewards(rows["rewards"])
    write_rows(rows)
    run(f"{OWN} --reward-model gp --output-path full.hdf5")
    options = "--dataset-path full.hdf5 --rewards oracle --num-updates 4 --batch-size 8"
    options += " --device cpu --compile off --run-dir agent"
    iql_imputed.main(script.tyro.cli(iql_imputed.Args, args=options.split()))
    policy = iql_imputed.Policy(np.load("agent/policy_seed0.npz"))
    assert policy(rows["observations"]).shape == (NUM_ROWS, ACT_DIM)


# --- Few labels, and other units ---
@pytest.mark.parametrize("num_known", [3, 11])
def test_few_labels_are_enough_for_a_report(num_known, rows, few_steps, capsys, recwarn):
    """Three, of which a single one judges: its R2 is unknown."""
    rows["rewards"][num_known:] = np.nan
    write_rows(rows)
    run(f"{OWN} --run-dir run --output-path full.hdf5 --reward-model gp")
    quality = read_json("run/result.json")["quality"]
    assert (quality["gp"]["r2"] == [None]) == (num_known == 3)
    with h5py.File("full.hdf5") as file:
        json.loads(file.attrs["imputation_quality"], parse_constant=pytest.fail)
    assert RuntimeWarning not in {warning.category for warning in recwarn}


def test_a_sweep_leaves_out_numbers_of_labels_that_are_all_equal(rows, few_steps):
    """Rewards of 1 in a row of twenty: among ten labels there may be none."""
    rows["rewards"] = np.float32(np.arange(NUM_ROWS) % 20 == 0)
    write_rows(rows)
    run(f"{OWN} --label-fraction 0.5 --num-seeds 2 --run-dir run --sweep --output-path full.hdf5")
    swept = {row["labels"] for row in read_json("run/result.json")["sweep"]}
    assert 300 in swept
    assert 4 not in swept
    assert Path("full.hdf5").exists()


def test_a_sweep_may_hide_a_single_reward_of_which_no_r2_is_known(rows, few_steps, recwarn):
    rows["rewards"][11:] = np.nan
    write_rows(rows)
    run(f"{OWN} --run-dir run --sweep")
    assert [row["r2_mean"] for row in read_json("run/result.json")["sweep"]] == 3 * [None]
    assert Path("run/sweep.png").exists()
    assert RuntimeWarning not in {warning.category for warning in recwarn}


@pytest.mark.parametrize("unit", [1e-6, 1e9])
def test_errors_are_printed_in_any_unit(unit, rows, few_steps, capsys):
    write_rows(rows | {"rewards": np.float32(unit * rows["rewards"])})
    run(f"{SOME} --run-dir run")
    _, _, mse, mae, _ = printed_numbers("mlp", capsys.readouterr().out)
    quality = read_json("run/result.json")["quality"]["mlp"]
    assert [mse] == pytest.approx(quality["mse"], rel=1e-3)
    assert [mae] == pytest.approx(quality["mae"], rel=1e-3)


# --- Mistakes ---
MISTAKES = {
    "existing output": (f"{SOME} --output-path own.hdf5", "exists already"),
    "no such folder": (f"{SOME} --output-path none/full.hdf5", "no folder"),
    "no place to write": (f"{SOME} --output-path /proc/full.hdf5", "proc"),
    "a sweep of few": (f"{OWN} --sweep", "--sweep"),
    "unknown simulator": (
        f"{SOME} --env-id own_envs:Wider-v0 --output-minari-id my/name-v0",
        "own_envs:Wider-v0",
    ),
    "missing package": (f"{SOME} --env-id nowhere:A-v0 --output-minari-id my/name-v0", "nowhere"),
    "malformed Minari id": (f"{SOME} --output-minari-id 'no version'", "my/name-v0"),
    "no version": (f"{SOME} --output-minari-id imputed", "my/name-v0"),
    "existing Minari id": (f"{SOME} --output-minari-id tests/wide-v0", "exists already"),
    "Minari to HDF5": ("--env-id tests/wide-v0 --output-path full.hdf5", "--output-minari-id"),
    "no epochs": (f"{SOME} --reward-epochs 0", "--reward-epochs"),
    "no seeds": (f"{SOME} --num-seeds 0", "--num-seeds"),
    "negative seed": (f"{SOME} --seed -1", "--seed"),
    "label fraction 2": (f"{OWN} --label-fraction 2", "--label-fraction"),
    "one label": (f"{OWN} --label-fraction 1e-9", "label more"),
    "unknown dataset": ("--env-id hoper-medium-v2", "hopper-medium-v2"),
    "run dir in a file": (f"{SOME} --run-dir own.hdf5/run", "own.hdf5"),
}


@pytest.mark.parametrize(("options", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named_before_anything_is_fitted_or_written(
    options, message, rows, monkeypatch
):
    if "--sweep" in options:
        rows["rewards"][10:] = np.nan
        write_rows(rows)
    make_minari()
    monkeypatch.setattr(script, "fit_reward_model", None)
    with pytest.raises((script.UserError, OSError), match=message):
        run(options)
    assert {path.name for path in Path().iterdir()} <= {"own.hdf5", "minari"}


def test_a_dataset_that_another_run_made_meanwhile_is_left_alone(few_steps, monkeypatch):
    fit_reward_model = script.fit_reward_model

    def make_other_meanwhile(*arguments):
        if "tests/wide-v0" not in minari.list_local_datasets():
            make_minari()
        fit_reward_model(*arguments)

    monkeypatch.setattr(script, "fit_reward_model", make_other_meanwhile)
    with pytest.raises(script.UserError, match="tests/wide-v0 exists already"):
        run(f"{SOME} --output-minari-id tests/wide-v0")
    assert "tests/wide-v0" in minari.list_local_datasets()


def test_a_folder_that_is_no_minari_dataset_hinders_no_output(few_steps):
    Path("minari/tests/a copy/data").mkdir(parents=True)
    run(f"{SOME} --output-minari-id my/full-v0")
    assert len(minari.load_dataset("my/full-v0")) > 0


def test_a_refused_run_leaves_a_file_beside_the_output_alone(few_steps):
    Path("full.hdf5.tmp").write_text("mine")
    with pytest.raises(script.UserError, match="my/name-v0"):
        run(f"{SOME} --output-path full.hdf5 --output-minari-id imputed")
    assert Path("full.hdf5.tmp").read_text() == "mine"


def test_a_run_directory_is_never_overwritten(few_steps):
    run(f"{SOME} --run-dir run")
    before = {path: path.read_bytes() for path in Path("run").iterdir()}
    with pytest.raises(script.UserError, match="run already holds a run"):
        run(f"{SOME} --run-dir run")
    assert before == {path: path.read_bytes() for path in Path("run").iterdir()}


def test_labels_of_which_the_held_out_ones_alone_differ_are_refused_before_the_fit(
    rows, monkeypatch
):
    rewards = rows["rewards"]
    rewards[:] = np.nan
    rewards[:2] = [[0], [1]]  # one to fit to, one to judge on
    write_rows(rows)
    monkeypatch.setattr(script, "fit_reward_model", None)
    with pytest.raises(script.UserError, match="label more"):
        run(f"{OWN} --run-dir run")
    assert not Path("run").exists()


def test_a_folder_of_the_users_may_become_a_run_directory_and_keeps_its_files(few_steps):
    Path("mine").mkdir()
    Path("mine/thesis.tmp").write_text("not a run's")
    run(f"{SOME} --run-dir mine")
    assert Path("mine/thesis.tmp").read_text() == "not a run's"


def test_a_full_disk_leaves_no_part_of_the_dataset(rows, few_steps):
    write_rows(rows | {"images": np.random.default_rng(0).normal(size=400_000)})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            run(f"{SOME} --output-path full.hdf5 --run-dir run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(Path().glob("full.hdf5*"))
    assert Path("run/reward_model.npz").exists()
