"""TD3+BC: its update against a slow reference, what an agent starts as; what both agents see."""

from dataclasses import FrozenInstanceError

import h5py
import numpy as np
import pytest
import torch
from reference import (
    TD3BC,
    assert_equal_up_to_rounding,
    copy_seed,
    equal_parts,
    layers_of,
    parameters_of,
    random_transitions,
)

import iql_imputed
import td3bc_imputed as script

NUM_SEEDS = 2
BOTH = pytest.mark.parametrize("script", [script, iql_imputed], ids=["td3bc", "iql"])


@pytest.fixture(params=[torch.float64, torch.float32], ids=str)
def dtype(request):
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def data():
    return random_transitions(script)


@pytest.fixture
def seen(data):
    """Three rows of each seed, others than the other's."""
    rows = torch.tensor([[0, 5, 9], [1, 2, 3]])
    return script.Transitions(*script.take_rows(data, rows))


def make_agent(data, script=script, first_seed=0):
    seeds = range(first_seed, first_seed + len(data.rewards))
    generators = script.make_generators(seeds, stream=2)
    return script.Agent(data, generators, script.Args())


def train(agent, data, num_calls):
    """Each call makes two updates of the critics and one of the actor and of all targets."""
    args = script.Args(batch_size=32)
    generator = torch.Generator().manual_seed(3)
    for _ in range(num_calls):
        script.update(agent, data, generator, args)


# --- The update ---
OTHER_OPTIONS = {
    "alpha": 1.0,
    "policy_noise": 0.9,
    "noise_clip": 0.3,
    "policy_freq": 3,
    "learning_rate": 1e-3,
    "gamma": 0.5,
    "tau": 0.1,
}


@pytest.mark.parametrize(
    "options", [{}, {"alpha": 0.0}, OTHER_OPTIONS], ids=["defaults", "cloning", "other-options"]
)
@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_updates_equal_the_reference(dtype, seed, options):
    data, args = random_transitions(script), script.Args(batch_size=32, **options)
    agent = script.Agent(data, script.make_generators(range(NUM_SEEDS), stream=2), args)
    observations = data.observations[seed]
    mean = observations.mean(dim=0)
    std = observations.std(dim=0, correction=0) + 1e-3
    reference = TD3BC(5, 3, mean, std, **options)
    copy_seed(agent, reference, seed)
    before = parameters_of(agent, seed)

    generator = torch.Generator().manual_seed(3)
    same_draws = torch.Generator().manual_seed(3)
    for _ in range(2):
        losses = script.update(agent, data, generator, args)
        for _ in range(args.policy_freq):
            batch = script.draw_batch(data, 32, same_draws)
            noise = torch.randn(batch[1].shape, generator=same_draws)  # one for each action
            transitions = [tensor[seed] for tensor in batch]
            reference.update(*transitions, noise[seed])

    assert_equal_up_to_rounding(agent, reference, losses, seed)
    assert not equal_parts(before, parameters_of(agent, seed)), "not trained"


@pytest.mark.parametrize("policy_freq", [1, 4])
def test_critics_are_updated_policy_freq_times_for_each_update_of_the_actor(data, policy_freq):
    agent, args = make_agent(data), script.Args(batch_size=8, policy_freq=policy_freq)
    script.update(agent, data, torch.Generator(), args)
    for optimizer, expected in ((agent.q_optimizer, policy_freq), (agent.actor_optimizer, 1)):
        assert {int(state["step"]) for state in optimizer.state.values()} == {expected}


def test_seeds_are_independent_to_the_bit(data):
    rewards = data.rewards.clone()
    rewards[0] += 5
    agent, other = make_agent(data), make_agent(data)
    train(agent, data, 5)
    train(other, data._replace(rewards=rewards), 5)

    seed_0, seed_1 = parameters_of(agent, 0), parameters_of(agent, 1)
    assert not equal_parts(seed_0, parameters_of(other, 0)), "these did not see the change"
    assert equal_parts(seed_1, parameters_of(other, 1)) == seed_1.keys()


def draw(script, data, batch_size):
    generator = torch.Generator().manual_seed(0)
    return script.Transitions(*script.draw_batch(data, batch_size, generator))


def test_a_seed_draws_whole_transitions_of_its_own_rows(seen):
    batch = draw(script, seen, 100)
    for seed in range(NUM_SEEDS):
        own = seen.observations[seed]
        same = batch.observations[seed].unsqueeze(1) == own  # (100, 3, obs_dim)
        draws, rows = same.all(dim=-1).nonzero(as_tuple=True)
        assert len(draws) == 100, "a row that is not the seed's"
        assert len(rows.unique()) == 3, "not every row is drawn"
        for drawn, tensor in zip(batch, seen):
            assert torch.equal(drawn[seed], tensor[seed, rows])


@BOTH
def test_seeds_draw_different_rows(script):
    batch = draw(script, random_transitions(script), 32)
    assert not torch.equal(batch.observations[0], batch.observations[1])


# --- What an agent starts as ---
def test_initial_weights_do_not_depend_on_how_many_seeds_run():
    two_seeds = random_transitions(script, num_seeds=2)
    one_seed = random_transitions(script, num_seeds=1)
    together = make_agent(two_seeds, first_seed=4)
    alone = make_agent(one_seed, first_seed=5)
    seed_5 = parameters_of(alone, 0)
    assert equal_parts(seed_5, parameters_of(together, 1)) == seed_5.keys()


def test_initialisation_is_that_of_nn_linear():
    agent = make_agent(random_transitions(script, num_seeds=200))
    for network in (agent.actor, agent.q1, agent.q2):
        for layer in layers_of(network):
            bound = layer.weight.shape[1] ** -0.5
            uniform_std = bound / 3**0.5
            for parameter in (layer.weight, layer.bias):
                assert parameter.abs().max() <= bound
                assert parameter.std().item() == pytest.approx(uniform_std, rel=0.05)


def test_no_two_networks_start_alike_but_targets_start_as_their_networks(data):
    agent = make_agent(data)
    networks = [agent.actor, agent.q1, agent.q2]
    targets = [agent.actor_target, agent.q1_target, agent.q2_target]
    weights = [network.layer2.weight for network in networks]
    for k, weight in enumerate(weights):
        assert not any(torch.equal(weight, other) for other in weights[:k])
    for network, target in zip(networks, targets):
        start = network.state_dict()
        assert equal_parts(start, target.state_dict()) == start.keys()


def test_observations_are_normalised_with_what_the_agent_may_see(seen):
    agent = make_agent(seen)
    zeros, ones = torch.zeros(3), torch.ones(3)  # actions go in as they are
    for seed in range(NUM_SEEDS):
        observations = seen.observations[seed]
        mean = observations.mean(dim=0)
        std = observations.std(dim=0, correction=0) + 1e-3
        torch.testing.assert_close(agent.actor.mean[seed, 0], mean)
        torch.testing.assert_close(agent.actor.std[seed, 0], std)
        for critic in (agent.q1, agent.q2):
            expected = torch.cat([mean, zeros]), torch.cat([std, ones])
            found = critic.mean[seed, 0], critic.std[seed, 0]
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("obs_dim", [1, 5])
@BOTH
def test_a_network_refuses_inputs_of_other_widths(script, obs_dim):
    data = random_transitions(script, obs_dim=obs_dim)
    agent = make_agent(data, script)
    observations, actions = data.observations, data.actions
    assert agent.actor(observations).shape == (2, 64, 3)
    assert agent.q1(observations, actions).shape == (2, 64)
    wrong_calls = [
        (agent.actor, [actions]),
        (agent.actor, [observations, actions]),
        (agent.q1, [observations]),
        (agent.q1, [actions, observations]),
        (agent.q1, [observations, observations]),
    ]
    for network, inputs in wrong_calls:
        with pytest.raises((AssertionError, TypeError)):
            network(*inputs)


@BOTH
def test_arguments_cannot_be_changed_later(script):
    """A recorded or compiled update would not notice."""
    args = script.Args()
    with pytest.raises(FrozenInstanceError):
        args.gamma = 0.5


# --- The rewards that an agent sees, in both scripts ---
NAN = np.nan
REWARDS = np.array([1.0, 2.0, 3.0, 4.0, NAN])  # the last one is unknown
LABEL_ROWS = np.array([[0, 2], [1, 3]])
PREDICTED = np.array([[9.0, 8.0, 7.0, 6.0, 5.0], [0.5, 1.5, 2.5, 3.5, 4.5]])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("imputed", [[1, 8, 3, 6, 5], [0.5, 2, 2.5, 4, 4.5]]),
        ("zero", [[1, 0, 3, 0, 0], [0, 2, 0, 4, 0]]),
        ("mean", [[1, 2, 3, 2, 2], [3, 2, 3, 4, 3]]),
    ],
)
@BOTH
def test_labels_stay_and_other_rewards_are_of_the_chosen_kind(script, kind, expected):
    completed = script.complete_rewards(kind, REWARDS, LABEL_ROWS, PREDICTED)
    np.testing.assert_array_equal(completed, expected)


@BOTH
def test_with_labeled_every_label_stays(script):
    completed = script.complete_rewards("labeled", REWARDS, LABEL_ROWS, NAN)
    np.testing.assert_array_equal(np.take_along_axis(completed, LABEL_ROWS, 1), [[1, 3], [2, 4]])


@BOTH
def test_oracle_is_every_reward_and_an_error_if_one_is_unknown(script):
    completed = script.complete_rewards("oracle", REWARDS[:4], LABEL_ROWS, NAN)
    np.testing.assert_array_equal(completed, [REWARDS[:4], REWARDS[:4]])
    with pytest.raises(script.UserError, match="oracle"):
        script.complete_rewards("oracle", REWARDS, LABEL_ROWS, NAN)


@BOTH
def test_rewards_of_an_unknown_kind_are_an_error(script):
    with pytest.raises(KeyError):
        script.complete_rewards("imputted", REWARDS, LABEL_ROWS, PREDICTED)


@BOTH
def test_large_rewards_are_completed_without_rounding(script):
    rewards = 1e8 + np.arange(5)  # float32 merges them
    completed = script.complete_rewards("oracle", rewards, LABEL_ROWS, NAN)
    np.testing.assert_array_equal(completed - 1e8, [np.arange(5)] * 2)


# --- What main() hands to an agent, in both scripts ---
STARTS_AND_ENDS = [(0, 5), (5, 15), (15, 30)]  # of the episodes


@pytest.fixture
def log():
    """log.hdf5: 30 transitions of 3 episodes, and nowhere to evaluate; returns the rewards."""
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (30, 2))
    terminals = np.zeros(30)
    for _, end in STARTS_AND_ENDS:
        terminals[end - 1] = 1
    with h5py.File("log.hdf5", "w") as file:
        file["observations"] = rng.normal(size=(30, 4))
        file["actions"] = actions
        file["rewards"] = 10 + actions.sum(axis=1)
        file["terminals"] = terminals
    return 10 + actions.sum(axis=1)


@pytest.fixture
def label_rows(log):
    """Six rows of each of two seeds."""
    return script.choose_labels(log, 0.2, range(2))


class FirstUpdate(Exception):
    """Ends a run where its first update would be made."""


def before_first_update(script, monkeypatch, *options):
    """Agent, transitions and generator of a run with these options."""

    def stop(agent, data, generator, args):
        raise FirstUpdate(agent, data, generator)

    monkeypatch.setattr(script, "update", stop)
    shared = "--dataset-path log.hdf5 --num-seeds 2 --label-fraction 0.2"
    shared += " --reward-epochs 2 --compile off --device cpu"
    args = script.tyro.cli(script.Args, args=[*shared.split(), *options])
    with pytest.raises(FirstUpdate) as seen:
        script.main(args)
    return seen.value.args


def see(script, monkeypatch, *options):
    """The transitions from which a run with these options would draw batches."""
    return before_first_update(script, monkeypatch, *options)[1]


@BOTH
def test_a_hidden_reward_reaches_no_agent(script, log, label_rows, monkeypatch):
    data = see(script, monkeypatch, "--rewards", "imputed", "--no-scale-rewards")
    for rewards, rows in zip(data.rewards.numpy(), label_rows):
        np.testing.assert_array_equal(rewards[rows], np.float32(log[rows]))
        imputed = np.delete(rewards, rows)
        assert len(np.unique(imputed)) == 24
        assert not np.isin(imputed, np.float32(log)).any()


@BOTH
def test_with_labeled_only_labelled_transitions_are_seen(script, label_rows, monkeypatch):
    every = see(script, monkeypatch, "--rewards", "oracle", "--no-scale-rewards")
    seen = see(script, monkeypatch, "--rewards", "labeled", "--no-scale-rewards")
    for few, all_rows in zip(seen, every):
        for seed in range(2):
            rows = torch.from_numpy(label_rows[seed])
            assert torch.equal(few[seed], all_rows[seed, rows])


def test_a_seed_that_sees_labelled_transitions_alone_normalises_with_these(log, monkeypatch):
    agent, data, _ = before_first_update(script, monkeypatch, "--rewards", "labeled")
    means = data.observations.mean(dim=1, keepdim=True)
    assert not torch.allclose(means[0], means[1])
    torch.testing.assert_close(agent.actor.mean, means, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("script", "bound"), [(script, 1), (iql_imputed, 1 - 1e-5)])
def test_actions_are_scaled_to_the_bound_of_the_original(script, bound, log, monkeypatch):
    data = see(script, monkeypatch, "--rewards", "oracle")
    for actions in data.actions.reshape(-1, 2).T:
        assert actions.max().item() == pytest.approx(bound, abs=1e-7)
        assert actions.min().item() == pytest.approx(-bound, abs=1e-7)


@pytest.mark.parametrize("kind", ["imputed", "zero"])
@BOTH
def test_rewards_are_scaled_by_the_returns_that_the_agent_sees(script, kind, log, monkeypatch):
    plain = see(script, monkeypatch, "--rewards", kind, "--no-scale-rewards")
    scaled = see(script, monkeypatch, "--rewards", kind, "--scale-rewards")
    for before, after in zip(plain.rewards, scaled.rewards):
        returns = [before[start:end].sum().item() for start, end in STARTS_AND_ENDS]
        torch.testing.assert_close(after, before * 1000 / np.ptp(returns), rtol=1e-4, atol=0)


@BOTH
def test_rewards_of_labels_alone_are_scaled_by_estimated_returns(
    script, log, label_rows, monkeypatch
):
    plain = see(script, monkeypatch, "--rewards", "labeled", "--no-scale-rewards")
    scaled = see(script, monkeypatch, "--rewards", "labeled", "--scale-rewards")
    for seed, rows in enumerate(label_rows):
        returns = []
        for start, end in STARTS_AND_ENDS:
            own = log[rows[(start <= rows) & (rows < end)]]
            if len(own) > 0:
                returns.append(own.mean() * (end - start))
        expected = plain.rewards[seed] * 1000 / np.ptp(returns)
        torch.testing.assert_close(scaled.rewards[seed], expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("script", "scales"), [(script, False), (iql_imputed, True)])
def test_iql_scales_rewards_and_td3bc_does_not_unless_told(script, scales, log, monkeypatch):
    default = see(script, monkeypatch, "--rewards", "oracle")
    plain = see(script, monkeypatch, "--rewards", "oracle", "--no-scale-rewards")
    assert torch.equal(default.rewards, plain.rewards) != scales


@BOTH
def test_reward_model_agent_and_batches_draw_from_streams_of_their_own(script, log, monkeypatch):
    made = []
    make_generators = script.make_generators

    def spy(seeds, stream):
        generators = make_generators(seeds, stream)
        made.extend(generators)
        return generators

    monkeypatch.setattr(script, "make_generators", spy)
    options = "--rewards", "imputed", "--seed", "3"
    _, _, batches = before_first_update(script, monkeypatch, *options)
    first_seeds = [generator.initial_seed() for generator in made]
    # Of the reward models of seeds 3 and 4, and of their agents.
    assert first_seeds == [1_000_003 + 3, 1_000_003 + 4, 2_000_006 + 3, 2_000_006 + 4]
    assert batches.initial_seed() == 3
