"""Optimisers and learning-rate schedules by name. A schedule is a function of the step: nothing to save."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.optim import Optimizer

OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter], float, float], Optimizer]] = {
    "sgd": lambda p, lr, decay: torch.optim.SGD(p, lr, momentum=0.9, weight_decay=decay),
    "nesterov": lambda p, lr, decay: torch.optim.SGD(p, lr, momentum=0.9, weight_decay=decay, nesterov=True),
    "adam": lambda p, lr, decay: torch.optim.Adam(p, lr, weight_decay=decay),
    "adamw": lambda p, lr, decay: torch.optim.AdamW(p, lr, weight_decay=decay),
    "rmsprop": lambda p, lr, decay: torch.optim.RMSprop(p, lr, momentum=0.9, weight_decay=decay),
}

# Fraction of the work done (0..1) -> factor of the learning rate.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "poly": lambda done: (1 - done) ** 0.9,
    "step": lambda done: 0.1 ** (math.floor(3 * done) if done < 1 else 2),
}


def learning_rate(base: float, schedule: str, step: int, steps: int, warmup: int = 0) -> float:
    """The learning rate of step 0 .. steps-1: a linear rise over `warmup` steps, then the schedule."""
    if step < warmup:
        return base * (step + 1) / warmup
    return base * SCHEDULES[schedule]((step - warmup) / max(1, steps - warmup))
