"""A surrogate for GRPO and PPO, and a loss of pairs for DPO."""

import torch

from rlqwen.algorithms.loss_metrics import maximum, token_mean


def soft_clip(ratio, advantage, epsilon):
    """Bend the ratio smoothly instead of clipping it."""
    bent = 1 + epsilon * torch.tanh((ratio - 1) / epsilon)
    return -bent * advantage, {"example/ratio": token_mean(ratio), "example/ratio_max": maximum(ratio)}


def nearer(chosen_score, rejected_score, beta, target=1.0):
    """Pull the margin of each pair to a target."""
    return (beta * (chosen_score - rejected_score) - target).square()
