"""What is drawn at random in a training by noisy gradients, under the site's secret.

Lives here: which records a step takes, and the noise on the sum of their gradients, from streams of the secret's full
strength. Does not live here: the training (dp_sgd), the streams (noise). opacus draws from torch's generators, which on
a CPU know 2^32 streams and no more: whoever had the weights could try them all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from consilience.client.privacy.noise import Stream

STEPS = 2.0**-22
"""What a noisy sum is rounded to, in multiples of the noise's standard deviation or a little less: the last bits of a
float would tell noise from what it was added to (Mironov, CCS 2012). Anything after it, float32 too, costs nothing."""


def poisson(records: int, rate: float, steps: int, stream: Stream) -> Iterator[Tensor]:
    """Yield, for each step, sorted (b,) int64 ids of the records that it takes: each with chance `rate`, by itself."""
    for _ in range(steps):
        # 53 bits; a chance is off by 2^-53 at most, and of chance 1 everybody is taken
        drawn = (stream.words(records) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        yield torch.from_numpy(np.flatnonzero(drawn < rate).astype(np.int64))


def normal(stream: Stream, count: int, device: torch.device) -> Tensor:
    """Return (count,) float64 standard normal numbers (Box and Muller), from 53 bits each of radius and angle."""
    half = (count + 1) // 2
    words = (stream.words(2 * half) >> np.uint64(11)).view(np.int64)
    # half a step away from 0, where the radius is infinite
    uniform = torch.from_numpy(words).to(device).double().add_(0.5).mul_(2.0**-53)
    radius, angle = uniform[:half].log_().mul_(-2).sqrt_(), uniform[half:].mul_(2 * math.pi)
    return torch.cat([radius * angle.cos(), radius * angle.sin()])[:count]


def blurred(total: Tensor, deviation: float, stream: Stream) -> Tensor:
    """Return `total` plus Gaussian noise of that standard deviation, above 0: same shape, type and device."""
    noise = normal(stream, total.numel(), total.device).reshape(total.shape)
    step = STEPS * 2.0 ** math.floor(math.log2(deviation))
    noisy = total.double().add_(noise, alpha=deviation)
    return noisy.div_(step).round_().mul_(step).to(total.dtype)


def noisy_optimizer(library: Any, optimizer: torch.optim.Optimizer, stream: Stream, **named: Any) -> Any:
    """Return opacus' optimizer, `library` being opacus, around another: it cuts and sums, and noise is of `stream`.

    `named`: `noise_multiplier`, `max_grad_norm` and `expected_batch_size`, as opacus has them.
    """

    class Keyed(library.optimizers.DPOptimizer):  # type: ignore[misc]  # opacus is imported where it is used
        def add_noise(self) -> None:
            """Put the noisy sums of gradients into the parameters, of each a piece of the stream of its own."""
            for parameter in self.params:
                noisy = blurred(parameter.summed_grad, self.noise_multiplier * self.max_grad_norm, stream)
                parameter.grad = noisy.view_as(parameter)

    return Keyed(optimizer, **named)
