"""Channel filters of filtered amalgamation (Ye et al., IJCAI 2019; methods.md 3.2).

A filter makes of the student's shared features those that one teacher, or one task, can use: global average pooling,
two small fully connected layers, a sigmoid, multiplied onto the channels (squeeze-excitation). Features here lie before
an activation (common/nets/blocks); what is pooled is what the activation gives, so that the filter is the paper's: its
factors are positive, and ReLU(s F) = s ReLU(F).

The paper's older code reads the filter as attention on the shortcut of every residual block, a stream of features for
each teacher through shared convolutions. It is not built: the trunk would be run once for every teacher and task, in
training as in the finished student, which is no small student any more.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

REDUCTION, LEAST = 4, 4
"""The layer in between has a quarter of the channels, but not fewer than this."""
_OPEN = 2.0
"""Bias of the last layer to begin with: sigmoid(2) = 0.88, near to letting everything through."""


class Filter(nn.Module):
    """f(F) = sigmoid(W2 ReLU(W1 mean(ReLU(A F)))) * A F, channel by channel.

    A is a 1x1 convolution to `outputs` channels where these are not as many as `inputs`, else it is left out.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.fit: nn.Module = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)
        hidden = max(LEAST, outputs // REDUCTION)
        self.squeeze, self.excite = nn.Linear(outputs, hidden), nn.Linear(hidden, outputs)
        nn.init.constant_(self.excite.bias, _OPEN)

    def forward(self, features: Tensor) -> Tensor:
        """Map (n, inputs, H, W) to (n, outputs, H, W)."""
        fitted: Tensor = self.fit(features)
        return fitted * self.factors(fitted)[:, :, None, None]

    def factors(self, fitted: Tensor) -> Tensor:
        """Return (n, outputs) in (0, 1): what each channel of A F is multiplied by."""
        pooled = torch.relu(fitted).mean(dim=(2, 3))
        return torch.sigmoid(self.excite(torch.relu(self.squeeze(pooled))))
