"""The slow, obvious versions of both algorithms: one seed, one nn.Sequential a network, a loop over parameters.

The tests compare the scripts' `update` with these, and the speed is measured against them.
"""

import copy
import math

import torch
from torch import nn


def mlp(in_dim, out_dim):
    return nn.Sequential(nn.Linear(in_dim, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, out_dim))


def copy_model(batched, sequential, model):
    """Model number `model` of a Network's stack of layers into an nn.Sequential of nn.Linear."""
    for source, target in zip(batched[::2], sequential[::2]):
        target.weight.data = source.weight.data[model].T.clone()
        target.bias.data = source.bias.data[model, 0].clone()


def largest_difference(batched, sequential, model):
    """Largest absolute, and largest relative (in the norm of a tensor) difference of two networks' parameters."""
    absolute = relative = 0.0
    for ours, theirs in zip(batched[::2], sequential[::2]):
        for a, b in ((ours.weight[model].T, theirs.weight), (ours.bias[model, 0], theirs.bias)):
            absolute = max(absolute, (a - b).abs().max().item())
            relative = max(relative, ((a - b).norm() / b.norm()).item())
    return absolute, relative


class TD3BC:
    """Fujimoto & Gu (2021), one seed."""

    def __init__(self, obs_dim, act_dim, mean, std, alpha=2.5, learning_rate=3e-4):
        self.actor, self.q1, self.q2 = mlp(obs_dim, act_dim), mlp(obs_dim + act_dim, 1), mlp(obs_dim + act_dim, 1)
        self.mean, self.std, self.alpha, self.learning_rate, self.num_updates = mean, std, alpha, learning_rate, 0

    def start(self):
        """Targets and optimizers for the networks as they are now."""
        self.networks = (self.actor, self.q1, self.q2)
        self.actor_target, self.q1_target, self.q2_target = (copy.deepcopy(network) for network in self.networks)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=self.learning_rate)
        critics = [*self.q1.parameters(), *self.q2.parameters()]
        self.critic_optimizer = torch.optim.Adam(critics, lr=self.learning_rate)

    def update(self, s, a, r, s2, done, noise):
        self.num_updates += 1
        s, s2 = (s - self.mean) / self.std, (s2 - self.mean) / self.std
        with torch.no_grad():
            a2 = torch.tanh(self.actor_target(s2)) + torch.clamp(0.2 * noise, -0.5, 0.5)
            sa2 = torch.cat([s2, torch.clamp(a2, -1, 1)], 1)
            q_next = torch.min(self.q1_target(sa2), self.q2_target(sa2))[:, 0]
            y = r + 0.99 * (1 - done) * q_next
        sa = torch.cat([s, a], 1)
        loss = nn.functional.mse_loss(self.q1(sa)[:, 0], y) + nn.functional.mse_loss(self.q2(sa)[:, 0], y)
        self.critic_optimizer.zero_grad()
        loss.backward()
        self.critic_optimizer.step()
        if self.num_updates % 2:
            return
        pi = torch.tanh(self.actor(s))
        q = self.q1(torch.cat([s, pi], 1))
        loss = -self.alpha / q.abs().mean().detach() * q.mean() + nn.functional.mse_loss(pi, a)
        self.actor_optimizer.zero_grad()
        loss.backward()
        self.actor_optimizer.step()
        targets = (self.actor_target, self.q1_target, self.q2_target)
        for network, target in zip(self.networks, targets):
            for p, p_target in zip(network.parameters(), target.parameters()):
                p_target.data = 0.005 * p.data + 0.995 * p_target.data


class IQL:
    """Kostrikov et al. (2022), one seed, its locomotion parameters."""

    def __init__(self, obs_dim, act_dim, num_updates, learning_rate=3e-4):
        self.actor, self.value = mlp(obs_dim, act_dim), mlp(obs_dim, 1)
        self.q1, self.q2 = mlp(obs_dim + act_dim, 1), mlp(obs_dim + act_dim, 1)
        self.log_std = nn.Parameter(torch.zeros(act_dim))
        self.total, self.learning_rate, self.num_updates = num_updates, learning_rate, 0

    def start(self):
        self.q1_target, self.q2_target = copy.deepcopy(self.q1), copy.deepcopy(self.q2)
        self.actor_optimizer = torch.optim.Adam([*self.actor.parameters(), self.log_std], lr=self.learning_rate)
        self.value_optimizer = torch.optim.Adam(self.value.parameters(), lr=self.learning_rate)
        critics = [*self.q1.parameters(), *self.q2.parameters()]
        self.critic_optimizer = torch.optim.Adam(critics, lr=self.learning_rate)

    def update(self, s, a, r, s2, done):
        sa = torch.cat([s, a], 1)
        with torch.no_grad():
            q = torch.min(self.q1_target(sa), self.q2_target(sa))[:, 0]

        difference = q - self.value(s)[:, 0]  # V first
        loss = (torch.where(difference > 0, 0.7, 0.3) * difference**2).mean()
        self.value_optimizer.zero_grad()
        loss.backward()
        self.value_optimizer.step()

        with torch.no_grad():  # then the actor, with the advantage of the updated V
            weight = torch.clamp(torch.exp(3.0 * (q - self.value(s)[:, 0])), max=100.0)
        std = torch.exp(torch.clamp(self.log_std, -5, 2))
        distribution = torch.distributions.Normal(torch.tanh(self.actor(s)), std)
        loss = -(weight * distribution.log_prob(a).sum(1)).mean()
        for group in self.actor_optimizer.param_groups:
            group["lr"] = self.learning_rate * 0.5 * (1 + math.cos(math.pi * self.num_updates / self.total))
        self.actor_optimizer.zero_grad()
        loss.backward()
        self.actor_optimizer.step()

        with torch.no_grad():  # then Q, towards the updated V
            y = r + 0.99 * (1 - done) * self.value(s2)[:, 0]
        loss = ((self.q1(sa)[:, 0] - y) ** 2).mean() + ((self.q2(sa)[:, 0] - y) ** 2).mean()
        self.critic_optimizer.zero_grad()
        loss.backward()
        self.critic_optimizer.step()

        for network, target in ((self.q1, self.q1_target), (self.q2, self.q2_target)):  # then the targets
            for p, p_target in zip(network.parameters(), target.parameters()):
                p_target.data = 0.005 * p.data + 0.995 * p_target.data
        self.num_updates += 1
