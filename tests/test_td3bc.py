"""TD3+BC's update against a slow single-seed reference, and the independence of seeds."""

import pytest
import torch
from reference import TD3BC, copy_model, largest_difference

import td3bc_imputed as script

OBS_DIM, ACT_DIM, NUM_SEEDS, ROWS = 5, 3, 2, 64


def make_data(dtype=torch.float32):
    generator = torch.Generator().manual_seed(7)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    terminals = (torch.rand(ROWS, generator=generator) < 0.2).to(dtype)
    observations = 3 * normal(ROWS, OBS_DIM) + 1
    actions, rewards = normal(ROWS, ACT_DIM).clamp(-1, 1), normal(NUM_SEEDS, ROWS)
    data = script.Batch(observations, actions, observations, normal(ROWS, OBS_DIM), terminals)
    return expanded(data, NUM_SEEDS)._replace(rewards=rewards)


def expanded(data, num_seeds):
    """Every tensor with a leading dimension of seeds."""
    return script.Batch(*(tensor.expand(num_seeds, *tensor.shape) for tensor in data))


def train(data, num_calls, alpha=2.5, agent=None):
    """`num_calls` calls of update, of two updates each; returns the agent and everything that went into them."""
    args = script.Args(alpha=alpha)
    agent = agent or script.make_agent(data, range(NUM_SEEDS), args.learning_rate)
    generator = torch.Generator().manual_seed(3)
    inputs = []
    for _ in range(num_calls):
        batches = script.sample(data, (2, NUM_SEEDS, 32), generator)
        noise = torch.randn(batches.actions.shape, generator=generator, dtype=data.rewards.dtype)
        inputs.append((batches, noise))
        script.update(agent, batches, noise, args)
    return agent, inputs


@pytest.mark.parametrize("alpha", [2.5, 0.0])
@pytest.mark.parametrize("seed", range(NUM_SEEDS))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_four_updates_equal_the_reference(dtype, seed, alpha):
    torch.set_default_dtype(dtype)
    try:
        data = make_data(dtype)
        agent = script.make_agent(data, range(NUM_SEEDS), 3e-4)
        reference = TD3BC(
            OBS_DIM, ACT_DIM, data.observations[0].mean(0), data.observations[0].std(0, correction=0) + 1e-3, alpha
        )
        copy_model(agent.actor.mlp, reference.actor, seed)
        copy_model(agent.critic.mlp, reference.q1, seed)
        copy_model(agent.critic.mlp, reference.q2, NUM_SEEDS + seed)
        reference.start()
        before = copy_of(agent.critic.mlp)
        agent, inputs = train(data, 2, alpha, agent)
    finally:
        torch.set_default_dtype(torch.float32)
    for batches, noise in inputs:
        for k in range(2):
            batch = script.Batch(*(tensor[k, seed] for tensor in batches))
            reference.update(*batch, noise[k, seed])
    pairs = [(agent.actor, reference.actor, seed), (agent.actor_target, reference.actor_target, seed)]
    for ours, q1, q2 in ((agent.critic, "q1", "q2"), (agent.critic_target, "q1_target", "q2_target")):
        pairs += [(ours, getattr(reference, q1), seed), (ours, getattr(reference, q2), NUM_SEEDS + seed)]
    for ours, theirs, model in pairs:
        absolute, relative = largest_difference(ours.mlp, theirs, model)
        assert absolute < 1e-10 if dtype == torch.float64 else relative < 1e-5
    assert not torch.equal(before, copy_of(agent.critic.mlp)), "nothing was trained"


def copy_of(mlp):
    return torch.cat([parameter.detach().flatten().clone() for parameter in mlp.parameters()])


def test_seeds_are_independent_to_the_bit():
    data = make_data()
    other = data._replace(rewards=torch.stack([data.rewards[0] + 5, data.rewards[1]]))
    agents = [train(rewards, 5)[0] for rewards in (data, other)]  # 10 updates each
    for name in ("actor", "actor_target", "critic", "critic_target"):
        networks = [getattr(agent, name) for agent in agents]
        for a, b in zip(networks[0].parameters(), networks[1].parameters()):
            assert torch.equal(a[1::NUM_SEEDS], b[1::NUM_SEEDS]), f"{name} of seed 1 saw the rewards of seed 0"
    a, b = (copy_of(agent.actor.mlp) for agent in agents)
    assert not torch.equal(a, b), "seed 0 did not see its own rewards"


def test_initial_weights_do_not_depend_on_how_many_seeds_run():
    data = make_data()
    together = script.make_agent(data, range(4, 6), 3e-4)
    alone = script.make_agent(script.Batch(*(tensor[1:] for tensor in data)), range(5, 6), 3e-4)
    for name in ("actor", "critic"):
        for a, b in zip(getattr(together, name).parameters(), getattr(alone, name).parameters()):
            assert torch.equal(a[1::2], b)


def test_initialisation_is_that_of_nn_linear():
    data = expanded(script.Batch(*(tensor[0] for tensor in make_data())), 200)
    network = script.make_agent(data, range(200), 3e-4).critic
    for layer in network.mlp[::2]:
        bound = layer.weight.shape[1] ** -0.5
        for parameter in (layer.weight, layer.bias):
            assert parameter.abs().max() <= bound
            assert parameter.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_observations_are_normalised_with_what_the_agent_may_see():
    data = make_data()
    seen = torch.stack([data.observations[0, [0, 5, 9]], data.observations[1, [1, 2, 3]]])
    agent = script.make_agent(data._replace(observations=seen), range(NUM_SEEDS), 3e-4)
    for seed in range(NUM_SEEDS):
        torch.testing.assert_close(agent.actor.mean[seed, 0], seen[seed].mean(0))
        torch.testing.assert_close(agent.critic.std[seed, 0], seen[seed].std(0, correction=0) + 1e-3)


def test_a_seed_draws_whole_transitions_of_its_own_rows():
    data = make_data()
    visible = torch.tensor([[0, 5, 9], [1, 2, 3]])
    seen = script.Batch(*(tensor[torch.arange(NUM_SEEDS)[:, None], visible] for tensor in data))
    batch = script.sample(seen, (2, NUM_SEEDS, 100), torch.Generator().manual_seed(0))
    for seed in range(NUM_SEEDS):
        rows = [torch.where((data.observations[seed] == o).all(1))[0].item() for o in batch.observations[0, seed]]
        assert set(rows) == set(visible[seed].tolist())
        for drawn, tensor in zip(batch, data):
            assert torch.equal(drawn[0, seed], tensor[seed, rows])
