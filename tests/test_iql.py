"""IQL's update against a slow single-seed reference, its schedule, and its reward scale."""

import numpy as np
import pytest
import torch
from reference import IQL, copy_model, largest_difference

import iql_imputed as script

OBS_DIM, ACT_DIM, NUM_SEEDS, ROWS = 5, 3, 2, 64


def make_data(dtype=torch.float32):
    generator = torch.Generator().manual_seed(7)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    terminals = (torch.rand(ROWS, generator=generator) < 0.2).to(dtype)
    actions = normal(ROWS, ACT_DIM).clamp(-1 + 1e-5, 1 - 1e-5)
    observations, rewards = normal(ROWS, OBS_DIM), normal(NUM_SEEDS, ROWS)
    shared = (observations, actions, observations, normal(ROWS, OBS_DIM), terminals)
    return script.Batch(*(tensor.expand(NUM_SEEDS, *tensor.shape) for tensor in shared))._replace(rewards=rewards)


def make_agent(seeds=range(NUM_SEEDS)):
    return script.make_agent(make_data(), seeds, 3e-4)


def set_learning_rate(agent, num_updates, args):
    """As main does before each update; test_run.py holds main to it."""
    rate = args.learning_rate * 0.5 * (1 + np.cos(np.pi * num_updates / args.num_updates))
    agent.actor_optimizer.param_groups[0]["lr"] = rate


def train(data, num_updates, agent=None, total=1000):
    args = script.Args(num_updates=total)
    agent = agent or make_agent()
    generator = torch.Generator().manual_seed(3)
    batches = []
    for k in range(num_updates):
        batches.append(script.sample(data, (NUM_SEEDS, 32), generator))
        set_learning_rate(agent, k, args)
        script.update(agent, batches[-1], args)
    return agent, batches


@pytest.mark.parametrize("seed", range(NUM_SEEDS))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("value_shift", [0.0, -1.5])  # a low V makes advantages so large that some weights are capped
def test_four_updates_equal_the_reference(dtype, seed, value_shift):
    torch.set_default_dtype(dtype)
    try:
        data, agent, reference = make_data(dtype), make_agent(), IQL(OBS_DIM, ACT_DIM, 10)
        agent.actor.log_std.data += 0.1
        agent.value.mlp[4].bias.data += value_shift
        reference.log_std.data = agent.actor.log_std.data[seed, 0].clone()
        copy_model(agent.actor.mlp, reference.actor, seed)
        copy_model(agent.value.mlp, reference.value, seed)
        copy_model(agent.critic.mlp, reference.q1, seed)
        copy_model(agent.critic.mlp, reference.q2, NUM_SEEDS + seed)
        reference.start()
        agent, batches = train(data, 4, agent, total=10)
        for batch in batches:
            reference.update(*(tensor[seed] for tensor in batch))
    finally:
        torch.set_default_dtype(torch.float32)
    pairs = [(agent.actor, reference.actor, seed), (agent.value, reference.value, seed)]
    for ours, q1, q2 in ((agent.critic, "q1", "q2"), (agent.critic_target, "q1_target", "q2_target")):
        pairs += [(ours, getattr(reference, q1), seed), (ours, getattr(reference, q2), NUM_SEEDS + seed)]
    for ours, theirs, model in pairs:
        absolute, relative = largest_difference(ours.mlp, theirs, model)
        assert absolute < 1e-10 if dtype == torch.float64 else relative < 1e-5
    log_std = agent.actor.log_std[seed, 0]
    torch.testing.assert_close(log_std, reference.log_std, atol=1e-10 if dtype == torch.float64 else 1e-6, rtol=0)
    assert not torch.equal(log_std, torch.full_like(log_std, 0.1)), "log-std was not trained"


def test_seeds_are_independent_to_the_bit():
    data = make_data()
    other = data._replace(rewards=torch.stack([data.rewards[0] + 5, data.rewards[1]]))
    agents = [train(rewards, 10)[0] for rewards in (data, other)]
    for name in ("actor", "value", "critic", "critic_target"):
        pairs = list(zip(*(getattr(agent, name).parameters() for agent in agents)))
        assert all(torch.equal(a[1::NUM_SEEDS], b[1::NUM_SEEDS]) for a, b in pairs), f"{name} of seed 1 changed"
        assert not all(torch.equal(a[0::NUM_SEEDS], b[0::NUM_SEEDS]) for a, b in pairs), f"{name} of seed 0 did not"


def test_initialisation_is_orthogonal_for_each_model():
    agent = make_agent()
    for network in (agent.actor, agent.value, agent.critic):
        for layer in network.mlp[::2]:
            assert not layer.bias.any()
            for weight in layer.weight:
                product = weight @ weight.T if len(weight) <= weight.shape[1] else weight.T @ weight
                torch.testing.assert_close(product, 2 * torch.eye(len(product)), atol=1e-4, rtol=0)
    first, second = agent.critic.mlp[0].weight[::NUM_SEEDS]
    assert not torch.equal(first, second), "Q1 and Q2 of a seed start alike"
    alone = make_agent(range(1, 2))
    for name in ("actor", "value", "critic"):
        for a, b in zip(getattr(agent, name).parameters(), getattr(alone, name).parameters()):
            assert torch.equal(a[1::2], b), "the initial weights depend on how many seeds run"


def test_a_learning_rate_of_zero_moves_the_actor_no_more_also_after_a_checkpoint():
    args, agent = script.Args(num_updates=1000), make_agent()
    train(make_data(), 2, agent)
    agent.actor_optimizer.load_state_dict(agent.actor_optimizer.state_dict())  # makes the rate a new tensor
    before = [parameter.clone() for parameter in agent.actor.parameters()]
    set_learning_rate(agent, 1000, args)
    script.update(agent, script.sample(make_data(), (NUM_SEEDS, 32), torch.Generator().manual_seed(0)), args)
    assert all(torch.equal(a, b) for a, b in zip(before, agent.actor.parameters())), "rate 0 moved the actor"


@pytest.mark.parametrize("log_std", [-50.0, 50.0])
def test_log_std_is_clipped_and_actions_at_the_bounds_give_finite_losses(log_std):
    data, agent = make_data(), make_agent()
    agent.actor.log_std.data.fill_(log_std)
    actions = torch.full((NUM_SEEDS, 8, ACT_DIM), 1 - 1e-5)
    observations = 100 * torch.ones(NUM_SEEDS, 8, OBS_DIM)
    clipped = min(max(log_std, -5.0), 2.0)
    mean = agent.actor.mlp(observations).tanh()
    expected = -torch.distributions.Normal(mean, np.exp(clipped)).log_prob(actions).sum(-1).mean(-1)
    batch = script.Batch(observations, actions, None, None, None)
    loss = script.actor_loss(agent, batch, agent.value(observations).detach(), script.Args())  # weights exp(0)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-3)
    agent, _ = train(data._replace(actions=torch.ones_like(data.actions)), 20, agent)
    assert all(parameter.isfinite().all() for network in agent[:4] for parameter in network.parameters())


def dataset_of(rewards, episode_ids):
    """A Dataset of which only rewards and episodes matter."""
    rewards, episode_ids = np.float32(rewards), np.array(episode_ids)
    return script.Dataset(*[None] * 12)._replace(rewards=rewards, episode_ids=episode_ids)


def test_reward_scale_is_1000_over_the_range_of_the_returns_that_the_agent_sees():
    dataset = dataset_of([1, 2, 3, 4, 5], [0, 0, 1, 1, 1])
    labels = np.array([[0, 1], [2, 3]])
    rewards = np.float32([[1, 2, 3, 4, 5], [0, 0, 3, 4, 0]])  # all rewards; seed 1's labels and zeros
    scale = script.reward_scale(rewards, labels, dataset, labeled_only=False)
    np.testing.assert_allclose(scale, [[1000 / (12 - 3)], [1000 / (7 - 0)]], rtol=1e-6)


def test_reward_scale_of_labelled_rewards_uses_each_episodes_own_mean_and_length():
    dataset = dataset_of([1, 2, 3, 4, 5, 9], [0, 0, 1, 1, 1, 2])
    labels = np.array([[1, 2, 4]])  # episode 0: mean 2, length 2; episode 1: mean 4, length 3; episode 2: no label
    rewards = np.float32([[0, 2, 3, 0, 5, 0]])
    scale = script.reward_scale(rewards, labels, dataset, labeled_only=True)
    np.testing.assert_allclose(scale, [[1000 / (12 - 4)]], rtol=1e-6)


def test_equal_returns_are_a_clear_error():
    dataset = dataset_of([1, 2, 2, 1], [0, 0, 1, 1])
    with pytest.raises(script.UserError, match="returns are equal"):
        script.reward_scale(np.float32([[1, 2, 2, 1]]), np.array([[0]]), dataset, labeled_only=False)
