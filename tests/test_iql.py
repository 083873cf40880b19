"""IQL: its update against a slow reference, initial weights, learning rate, reward scale."""

import math
import re

import numpy as np
import pytest
import torch
from reference import (
    IQL,
    assert_equal_up_to_rounding,
    copy_seed,
    equal_parts,
    layers_of,
    networks_of,
    parameters_of,
    random_transitions,
)

import iql_imputed as script

NUM_SEEDS = 2


@pytest.fixture(params=[torch.float64, torch.float32], ids=str)
def dtype(request):
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def data():
    return random_transitions(script)


@pytest.fixture
def agent():
    return make_agent()


def make_agent(seeds=range(NUM_SEEDS)):
    data = random_transitions(script, num_seeds=len(seeds))
    generators = script.make_generators(seeds, stream=2)
    return script.Agent(data, generators, script.Args())


def train(agent, data, num_updates):
    args = script.Args(batch_size=32)
    generator = torch.Generator().manual_seed(3)
    for k in range(num_updates):
        script.set_actor_rate(agent, k, args)
        script.update(agent, data, generator, args)


# --- The update ---
OTHER_OPTIONS = {
    "expectile": 0.9,
    "temperature": 0.5,
    "learning_rate": 1e-3,
    "gamma": 0.5,
    "tau": 0.1,
}


@pytest.mark.parametrize("value_shift", [0.0, -1.5])  # a low V: weights at their cap of 100
@pytest.mark.parametrize("options", [{}, OTHER_OPTIONS], ids=["defaults", "other-options"])
@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_four_updates_equal_the_reference(dtype, seed, options, value_shift):
    data, args = random_transitions(script), script.Args(num_updates=10, batch_size=32, **options)
    agent = script.Agent(data, script.make_generators(range(NUM_SEEDS), stream=2), args)
    agent.actor.log_std.data += 0.1
    agent.value.layer3.bias.data += value_shift
    reference = IQL(obs_dim=5, act_dim=3, total_updates=10, **options)
    copy_seed(agent, reference, seed)
    before = parameters_of(agent, seed)

    generator = torch.Generator().manual_seed(3)
    same_draws = torch.Generator().manual_seed(3)
    for k in range(4):
        script.set_actor_rate(agent, k, args)
        losses = script.update(agent, data, generator, args)
        batch = script.draw_batch(data, 32, same_draws)
        reference.update(*[tensor[seed] for tensor in batch])

    assert_equal_up_to_rounding(agent, reference, losses, seed)
    assert not equal_parts(before, parameters_of(agent, seed)), "not trained"


def test_seeds_are_independent_to_the_bit(data):
    rewards = data.rewards.clone()
    rewards[0] += 5
    agent, other = make_agent(), make_agent()
    train(agent, data, 10)
    train(other, data._replace(rewards=rewards), 10)

    seed_0, seed_1 = parameters_of(agent, 0), parameters_of(agent, 1)
    assert not equal_parts(seed_0, parameters_of(other, 0)), "these did not see the change"
    assert equal_parts(seed_1, parameters_of(other, 1)) == seed_1.keys()


@pytest.mark.parametrize(("log_std", "clipped"), [(-50, -5), (50, 2)])
def test_log_std_is_clipped(log_std, clipped, data, agent):
    agent.actor.log_std.data.fill_(log_std)
    q = agent.value(data.observations).detach()  # an advantage of 0, a weight of 1
    loss = script.actor_backward(agent, data, q, script.Args())

    policy = torch.distributions.Normal(agent.actor(data.observations), math.exp(clipped))
    log_prob = policy.log_prob(data.actions).sum(dim=-1)
    torch.testing.assert_close(loss, -log_prob.mean(dim=1), rtol=1e-4, atol=1e-3)


def test_actions_at_the_bounds_and_a_narrow_policy_give_finite_weights(data, agent):
    agent.actor.log_std.data.fill_(-50)
    at_the_bounds = torch.ones_like(data.actions)
    train(agent, data._replace(actions=at_the_bounds), 20)
    for name, parameter in parameters_of(agent, 0).items():
        assert parameter.isfinite().all(), name


# --- What an agent starts as ---
def test_initialisation_is_orthogonal_for_each_seed(agent):
    for network in networks_of(agent).values():
        for layer in layers_of(network):
            assert not layer.bias.any()
            for weight in layer.weight:
                assert_orthogonal(weight, squared_gain=2)
    assert not agent.actor.log_std.any()


def assert_orthogonal(weight, squared_gain):
    """Its rows, or its columns if those are fewer."""
    rows, columns = weight.shape
    product = weight @ weight.T if rows <= columns else weight.T @ weight
    expected = squared_gain * torch.eye(len(product))
    torch.testing.assert_close(product, expected, atol=1e-4, rtol=0)


def test_no_two_networks_start_alike_but_targets_start_as_their_networks(agent):
    networks = [agent.actor, agent.value, agent.q1, agent.q2]
    weights = [network.layer2.weight for network in networks]
    for k, weight in enumerate(weights):
        assert not any(torch.equal(weight, other) for other in weights[:k])
    for network, target in ((agent.q1, agent.q1_target), (agent.q2, agent.q2_target)):
        start = network.state_dict()
        assert equal_parts(start, target.state_dict()) == start.keys()


def test_initial_weights_do_not_depend_on_how_many_seeds_run():
    together, alone = make_agent(range(4, 6)), make_agent(range(5, 6))
    seed_5 = parameters_of(alone, 0)
    assert equal_parts(seed_5, parameters_of(together, 1)) == seed_5.keys()


def test_observations_and_actions_go_in_as_they_are(agent):
    for network in networks_of(agent).values():
        assert (network.mean == 0).all()
        assert (network.std == 1).all()


@pytest.mark.parametrize(("offset", "warnings"), [(0, []), (1000, ["[1, 4]"])])
def test_large_observations_are_pointed_out(offset, warnings, data, capsys):
    observations = data.observations.clone()
    observations[:, :, [1, 4]] += offset
    data = data._replace(observations=observations)
    script.Agent(data, script.make_generators(range(NUM_SEEDS), stream=2), script.Args())
    assert re.findall(r"^warning .*(\[.*\])", capsys.readouterr().out, re.MULTILINE) == warnings


# --- The actor's learning rate ---
@pytest.mark.parametrize(
    ("num_updates", "factor"),
    [
        (0, 1),
        (250, 0.5 + 0.5**1.5),
        (500, 0.5),
        (1000, 0),
    ],
)
def test_the_rate_of_the_actor_falls_to_zero_as_a_cosine(num_updates, factor, agent):
    args = script.Args(num_updates=1000, learning_rate=0.004)
    script.set_actor_rate(agent, num_updates, args)
    (actor,) = agent.actor_optimizer.param_groups
    assert float(actor["lr"]) == pytest.approx(0.004 * factor, abs=1e-9)
    for optimizer in (agent.value_optimizer, agent.q_optimizer):
        (others,) = optimizer.param_groups
        assert others["lr"] == 3e-4


def test_a_rate_of_zero_moves_the_actor_no_more_also_after_a_checkpoint(data, agent):
    train(agent, data, 2)
    checkpoint = agent.actor_optimizer.state_dict()
    agent.actor_optimizer.load_state_dict(checkpoint)
    before = parameters_of(agent, 0)
    args = script.Args(num_updates=1000)
    script.set_actor_rate(agent, 1000, args)
    script.update(agent, data, torch.Generator(), args)

    kept = equal_parts(before, parameters_of(agent, 0))
    assert kept == {name for name in before if name.startswith("actor.")}


# --- The reward scale ---
def test_rewards_are_scaled_by_1000_over_the_range_of_the_returns_that_the_agent_sees():
    episode_ids = np.array([0, 0, 1, 1, 1])
    label_rows = np.array([[0, 1], [2, 3]])
    all_rewards = [1.0, 2.0, 3.0, 4.0, 5.0]  # returns 3 and 12
    labels_and_zeros = [0.0, 0.0, 3.0, 4.0, 0.0]  # returns 0 and 7
    rewards = np.array([all_rewards, labels_and_zeros])
    scale = script.reward_scale(rewards, label_rows, episode_ids, labeled_only=False)
    np.testing.assert_allclose(scale, [[1000 / (12 - 3)], [1000 / (7 - 0)]])


def test_of_labels_alone_a_return_is_the_mean_of_an_episodes_labels_times_its_length():
    episode_ids = np.array([0, 0, 1, 1, 1, 2])
    label_rows = np.array([[1, 2, 4]])
    rewards = np.array([[0.0, 2.0, 3.0, 0.0, 5.0, 0.0]])
    scale = script.reward_scale(rewards, label_rows, episode_ids, labeled_only=True)
    first = 2 * 2  # its only label is 2
    second = 3 * 4  # its labels are 3 and 5; the third episode has none
    np.testing.assert_allclose(scale, [[1000 / (second - first)]])


@pytest.mark.parametrize(
    ("rewards", "episode_ids", "labeled_only"),
    [
        ([1.0, 2.0, 2.0, 1.0], [0, 0, 1, 1], False),  # equal returns
        ([0.1, 0.2, 0.3, 0.3, 0.2, 0.1], [0, 0, 0, 1, 1, 1], False),  # equal but for rounding
        ([1.0, 2.0, 3.0, 4.0], [0, 0, 0, 0], False),  # one episode
        ([1.0, 2.0, 0.0, 0.0], [0, 0, 1, 1], True),  # one that has labels
    ],
)
def test_without_different_returns_there_is_no_scale(rewards, episode_ids, labeled_only):
    inputs = np.array([rewards]), np.array([[0, 1]]), np.array(episode_ids)
    with pytest.raises(script.UserError, match="--no-scale-rewards"):
        script.reward_scale(*inputs, labeled_only)
