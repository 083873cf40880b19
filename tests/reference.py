"""TD3+BC and IQL the slow, obvious way: one seed, an nn.Sequential for a network, nothing clever.

The tests hold the scripts' `update` against these, and speed is measured against them.
"""

import math
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import nn


def make_mlp(in_dim, out_dim):
    return nn.Sequential(
        nn.Linear(in_dim, 256),
        nn.ReLU(),
        nn.Linear(256, 256),
        nn.ReLU(),
        nn.Linear(256, out_dim),
    )


def make_optimizer(learning_rate, *networks):
    parameters = []
    for network in networks:
        parameters += network.parameters()
    return torch.optim.Adam(parameters, lr=learning_rate)


def descend(loss, optimizer):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def move_target(target, network, tau):
    for target_parameter, parameter in zip(target.parameters(), network.parameters()):
        target_parameter.data = tau * parameter.data + (1 - tau) * target_parameter.data


class TD3BC:
    """Fujimoto & Gu (2021); the defaults are their parameters."""

    def __init__(
        self,
        obs_dim,
        act_dim,
        mean,  # of the observations that the agent may see
        std,
        alpha=2.5,
        policy_noise=0.2,
        noise_clip=0.5,
        policy_freq=2,
        learning_rate=3e-4,
        gamma=0.99,
        tau=0.005,
    ):
        self.mean = mean
        self.std = std
        self.alpha = alpha
        self.policy_noise = policy_noise
        self.noise_clip = noise_clip
        self.policy_freq = policy_freq
        self.learning_rate = learning_rate
        self.gamma = gamma
        self.tau = tau
        self.actor = make_mlp(obs_dim, act_dim)
        self.q1 = make_mlp(obs_dim + act_dim, 1)
        self.q2 = make_mlp(obs_dim + act_dim, 1)
        self.num_updates = 0
        self.losses = {}  # of the last update of each network

    def start(self):
        """Targets and optimizers for the networks as they are now."""
        self.actor_target = deepcopy(self.actor)
        self.q1_target = deepcopy(self.q1)
        self.q2_target = deepcopy(self.q2)
        self.actor_optimizer = make_optimizer(self.learning_rate, self.actor)
        self.q_optimizer = make_optimizer(self.learning_rate, self.q1, self.q2)

    def update(self, observations, actions, rewards, next_observations, terminals, noise):
        """One of the critics; every policy_freq-th one also of the actor and of all targets."""
        self.num_updates += 1
        observations = (observations - self.mean) / self.std
        next_observations = (next_observations - self.mean) / self.std
        noise = torch.clamp(self.policy_noise * noise, -self.noise_clip, self.noise_clip)
        self.update_critics(observations, actions, rewards, next_observations, terminals, noise)
        if self.num_updates % self.policy_freq == 0:
            self.update_actor(observations, actions)
            move_target(self.actor_target, self.actor, self.tau)
            move_target(self.q1_target, self.q1, self.tau)
            move_target(self.q2_target, self.q2, self.tau)

    def update_critics(self, observations, actions, rewards, next_observations, terminals, noise):
        with torch.no_grad():
            next_actions = torch.tanh(self.actor_target(next_observations)) + noise
            next_actions = torch.clamp(next_actions, -1, 1)
            next_inputs = torch.cat([next_observations, next_actions], dim=1)
            next_q1 = self.q1_target(next_inputs)[:, 0]
            next_q2 = self.q2_target(next_inputs)[:, 0]
            target = rewards + self.gamma * (1 - terminals) * torch.min(next_q1, next_q2)
        inputs = torch.cat([observations, actions], dim=1)
        q1_loss = F.mse_loss(self.q1(inputs)[:, 0], target)
        q2_loss = F.mse_loss(self.q2(inputs)[:, 0], target)
        self.losses["losses/critic_loss"] = q1_loss + q2_loss
        descend(q1_loss + q2_loss, self.q_optimizer)

    def update_actor(self, observations, actions):
        policy = torch.tanh(self.actor(observations))
        q = self.q1(torch.cat([observations, policy], dim=1))
        lambda_ = self.alpha / q.abs().mean().detach()
        loss = -lambda_ * q.mean() + F.mse_loss(policy, actions)
        self.losses["losses/actor_loss"] = loss
        descend(loss, self.actor_optimizer)


class IQL:
    """Kostrikov et al. (2022); the defaults are their parameters for locomotion."""

    def __init__(
        self,
        obs_dim,
        act_dim,
        total_updates,
        expectile=0.7,
        temperature=3.0,
        learning_rate=3e-4,
        gamma=0.99,
        tau=0.005,
    ):
        self.expectile = expectile
        self.temperature = temperature
        self.learning_rate = learning_rate
        self.gamma = gamma
        self.tau = tau
        self.actor = make_mlp(obs_dim, act_dim)
        self.actor.log_std = nn.Parameter(torch.zeros(act_dim))
        self.value = make_mlp(obs_dim, 1)
        self.q1 = make_mlp(obs_dim + act_dim, 1)
        self.q2 = make_mlp(obs_dim + act_dim, 1)
        self.total_updates = total_updates
        self.num_updates = 0
        self.losses = {}  # of the last update of each network

    def start(self):
        """Targets and optimizers for the networks as they are now."""
        self.q1_target = deepcopy(self.q1)
        self.q2_target = deepcopy(self.q2)
        self.actor_optimizer = make_optimizer(self.learning_rate, self.actor)
        self.value_optimizer = make_optimizer(self.learning_rate, self.value)
        self.q_optimizer = make_optimizer(self.learning_rate, self.q1, self.q2)

    def update(self, observations, actions, rewards, next_observations, terminals):
        """V, then the actor and the critics, which both use the updated V; then the targets."""
        inputs = torch.cat([observations, actions], dim=1)
        with torch.no_grad():
            q1 = self.q1_target(inputs)[:, 0]
            q2 = self.q2_target(inputs)[:, 0]
            q = torch.min(q1, q2)
        self.update_value(observations, q)
        self.update_actor(observations, actions, q)
        self.update_critics(inputs, rewards, next_observations, terminals)
        move_target(self.q1_target, self.q1, self.tau)
        move_target(self.q2_target, self.q2, self.tau)
        self.num_updates += 1

    def update_value(self, observations, q):
        advantage = q - self.value(observations)[:, 0]
        weight = torch.where(advantage > 0, self.expectile, 1 - self.expectile)
        loss = (weight * advantage**2).mean()
        self.losses["losses/value_loss"] = loss
        descend(loss, self.value_optimizer)

    def update_actor(self, observations, actions, q):
        with torch.no_grad():
            advantage = q - self.value(observations)[:, 0]
            weight = torch.clamp(torch.exp(self.temperature * advantage), max=100)
        std = torch.exp(torch.clamp(self.actor.log_std, -5, 2))
        policy = torch.distributions.Normal(torch.tanh(self.actor(observations)), std)
        log_prob = policy.log_prob(actions).sum(dim=1)
        cosine = math.cos(math.pi * self.num_updates / self.total_updates)
        self.actor_optimizer.param_groups[0]["lr"] = self.learning_rate * (1 + cosine) / 2
        loss = -(weight * log_prob).mean()
        self.losses["losses/actor_loss"] = loss
        descend(loss, self.actor_optimizer)

    def update_critics(self, inputs, rewards, next_observations, terminals):
        with torch.no_grad():
            next_value = self.value(next_observations)[:, 0]
            target = rewards + self.gamma * (1 - terminals) * next_value
        q1_loss = F.mse_loss(self.q1(inputs)[:, 0], target)
        q2_loss = F.mse_loss(self.q2(inputs)[:, 0], target)
        self.losses["losses/critic_loss"] = q1_loss + q2_loss
        descend(q1_loss + q2_loss, self.q_optimizer)


def random_transitions(script, num_seeds=2, num_rows=64, obs_dim=5, act_dim=3, device="cpu"):
    """What an agent of the script may draw from; its seeds share everything but the rewards."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    def share(tensor):
        return tensor.expand(num_seeds, *tensor.shape)

    return script.Transitions(
        observations=share(3 * normal(num_rows, obs_dim) + 1),
        actions=share(normal(num_rows, act_dim).clamp(-1, 1)),
        rewards=normal(num_seeds, num_rows),
        next_observations=share(3 * normal(num_rows, obs_dim) + 1),
        terminals=share((normal(num_rows) > 1).to(torch.get_default_dtype())),
    )


def networks_of(agent):
    """The networks of an agent, targets included, by name."""
    return {name: part for name, part in vars(agent).items() if isinstance(part, nn.Module)}


def layers_of(network):
    return [network.layer1, network.layer2, network.layer3]


def parameters_of(agent, seed):
    """A copy of every weight and bias of one seed of an agent, by name."""
    parameters = {}
    for name, network in networks_of(agent).items():
        for key, parameter in network.named_parameters():
            parameters[f"{name}.{key}"] = parameter.detach()[seed].clone()
    return parameters


def equal_parts(first, second):
    """The names of those parameters that are the same to the bit."""
    return {name for name in first if torch.equal(first[name], second[name])}


def paired_parameters(agent, reference, seed):
    """Each weight and bias of one seed of the agent beside the reference's."""
    for name, batched in networks_of(agent).items():
        sequential = getattr(reference, name)
        linears = sequential[::2]  # a ReLU stands between two
        for layer, linear in zip(layers_of(batched), linears):
            yield layer.weight.data[seed].T, linear.weight.data
            yield layer.bias.data[seed, 0], linear.bias.data
        if hasattr(batched, "log_std"):
            yield batched.log_std.data[seed, 0], sequential.log_std.data


def copy_seed(agent, reference, seed):
    """Let the reference start from the weights of one seed of a new agent."""
    reference.start()
    for ours, theirs in paired_parameters(agent, reference, seed):
        theirs.copy_(ours)


def assert_close(ours, theirs):
    """In float64 to 1e-10, in float32 to 1e-5 of the tensor's norm (or to 1e-9: one may be near 0)."""
    difference = ours - theirs
    if ours.dtype == torch.float64:
        assert difference.abs().max() < 1e-10
    else:
        assert difference.norm() < 1e-5 * theirs.norm() + 1e-9


def assert_equal_up_to_rounding(agent, reference, losses, seed):
    """Every weight and every loss of the last update."""
    for ours, theirs in paired_parameters(agent, reference, seed):
        assert_close(ours, theirs)
    assert losses.keys() == reference.losses.keys()
    for name, loss in losses.items():
        assert_close(loss[seed], reference.losses[name].detach())
