"""The student's head of knowledge concentration: layers with a block for each vertical, and scaled scores.

Lives here: FC-FC, FC-SC, SC-SC and FC-SC with shared units (methods.md 4.3), the scaled normalisation of a vertical's
scores (4.4), their number of parameters, and putting the head in place of a network's last layer. Does not live here:
the loss (sparse_loss), which verticals there are (verticals).

No layer has a bias: the parameters are those of the paper's formulas. Both hidden layers end in ReLU. The second layer
of FC-SC is one matrix product, for all verticals are fed the same; blocks that are fed different units are one batched
product; classes are scored a vertical after another, which keeps a vertical's scores in a processor's cache and takes
verticals of any size without padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor, nn

from consilience.common.errors import SettingsError
from consilience.common.nets.seeding import seeded
from consilience.common.seeds import derive
from consilience.common.settings.concentration import Head

FLOOR = 1e-4
"""Least length that a vertical's scores are divided by."""
VARIANCE = 1e-3
"""Of what the scores are multiplied by, at the start."""


class HeadPlan(BaseModel):
    """What a head is built by: its settings, and vertical -> classes, a partition of 0, ..., L - 1."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    head: Head
    verticals: dict[str, tuple[int, ...]]

    @model_validator(mode="after")
    def _a_partition(self) -> HeadPlan:
        labels = sorted(label for classes in self.verticals.values() for label in classes)
        if not labels or labels != list(range(len(labels))) or not all(self.verticals.values()):
            raise ValueError("verticals are no partition of the classes 0, 1, 2 and so on")
        return self

    @property
    def sizes(self) -> tuple[int, ...]:
        """Classes of each vertical."""
        return tuple(map(len, self.verticals.values()))

    def parameters(self, bottleneck: int) -> int:
        """Return the weights of the head on `bottleneck` features by the paper's formulas, without scaling."""
        m, n, first, second, shared = len(self.sizes), sum(self.sizes), self.head.first, self.head.second, 0
        if self.head.kind == "fc-fc":
            return bottleneck * first + first * second + second * n
        if self.head.kind == "sc-sc":
            return m * bottleneck * first + m * first * second + second * n
        shared = self.head.shared
        return bottleneck * first + first * shared + m * first * (second - shared) + second * n


class ConcentratedHead(nn.Module):
    """(b, s_b) features -> (b, L) scores of the classes; `in_parts` -> (hidden, coarse, gammas, weights).

    hidden (b, M' s_2) float: the second layer's units, M' = M blocks of s_2, or one where all share them; coarse: a
    scalar on the CPU, 1 where products are to be made in bfloat16; gammas: () or one tensor a vertical, (1,) or
    (N_v,); weights: (N_v, s_2) a vertical.
    """

    order: Tensor

    def __init__(self, plan: HeadPlan, bottleneck: int) -> None:
        """Draws from the global generator."""
        super().__init__()
        self.plan, self.in_parts = plan, False
        head, verticals = plan.head, len(plan.sizes)
        self.first = nn.Linear(bottleneck, head.first * (verticals if head.kind == "sc-sc" else 1), bias=False)
        own = head.second - head.shared
        if head.kind == "sc-sc":
            bound = math.sqrt(6 / head.first)
            self.blocks = nn.Parameter(torch.empty(verticals, head.first, head.second).uniform_(-bound, bound))
        else:
            wide = head.second if head.kind == "fc-fc" else head.shared + verticals * own
            self.second = nn.Linear(head.first, wide, bias=False)
            nn.init.kaiming_uniform_(self.second.weight, nonlinearity="relu")
        nn.init.kaiming_uniform_(self.first.weight, nonlinearity="relu")
        bound = 1 / math.sqrt(head.second)
        self.outputs = nn.ParameterList(torch.empty(n, head.second).uniform_(-bound, bound) for n in plan.sizes)
        self.gammas = nn.ParameterList(_gamma(head, n) for n in plan.sizes if head.scaling != "none")
        classes = torch.tensor([label for held in plan.verticals.values() for label in held])
        self.register_buffer("order", torch.argsort(classes), persistent=False)

    @property
    def weights(self) -> int:
        """Weights of its layers: `HeadPlan.parameters`, and what scaling has beside them is not in it."""
        return sum(p.numel() for name, p in self.named_parameters() if not name.startswith("gammas"))

    def hidden(self, features: Tensor) -> Tensor:
        """Return the second layer's units of (b, s_b) features: (b, M, s_2), or (b, 1, s_2) where all share them."""
        head, verticals, batch = self.plan.head, len(self.plan.sizes), features.shape[0]
        units = F.relu(self.first(features))
        if head.kind == "sc-sc":
            blocks = torch.bmm(units.view(batch, verticals, head.first).transpose(0, 1), self.blocks)
            return F.relu(blocks.transpose(0, 1))
        units = F.relu(self.second(units))
        if head.kind == "fc-fc":
            return units[:, None]
        own = units[:, head.shared :].view(batch, verticals, head.second - head.shared)
        if not head.shared:
            return own
        return torch.cat([units[:, None, : head.shared].expand(-1, verticals, -1), own], dim=2)

    def forward(self, features: Tensor) -> Any:
        """Return scores, or parts of them."""
        hidden = self.hidden(features)
        if self.in_parts:
            coarse = torch.tensor(float(torch.is_autocast_enabled(features.device.type)))
            return hidden.flatten(1), coarse, tuple(self.gammas), tuple(self.outputs)
        scores = []
        for v, weight in enumerate(self.outputs):
            raw = F.linear(hidden[:, v if hidden.shape[1] > 1 else 0], weight)
            scores.append(scaled(raw, self.gammas[v]) if len(self.gammas) else raw)
        return torch.cat(scores, dim=1).index_select(1, self.order)


def scaled(scores: Tensor, gamma: Tensor) -> Tensor:
    """Return (b, N_v) scores brought to length 1, or less where they are shorter than `FLOOR`, times gamma."""
    long: Tensor = scores / scores.norm(dim=1, keepdim=True).clamp_min(FLOOR)
    return gamma * long


def _gamma(head: Head, classes: int) -> nn.Parameter:
    start = math.sqrt(classes) if head.start is None else head.start
    gamma = torch.full((classes if head.scaling == "class" else 1,), start)
    if head.learned:
        gamma += math.sqrt(VARIANCE) * torch.randn(len(gamma))
    return nn.Parameter(gamma, requires_grad=head.learned)


def place(network: nn.Module, plan: HeadPlan, shape: tuple[int, int, int], seed: int, name: str) -> ConcentratedHead:
    """Put a head in the place of the last layer of `network`, for images of `shape` (C, H, W), and return it.

    That layer must be linear and its output the network's scores. `name` is the architecture's, for the message.
    Raises `SettingsError`. The network is left in training mode.
    """
    gave: list[tuple[nn.Linear, Any]] = []
    linears: dict[str, nn.Linear] = {n: m for n, m in network.named_modules() if n and isinstance(m, nn.Linear)}
    hooks = [linear.register_forward_hook(_noting(gave)) for linear in linears.values()]
    try:
        with torch.no_grad():
            scores = network.eval()(torch.zeros(2, *shape))
    finally:
        for hook in hooks:
            hook.remove()
        network.train()
    found = [linear for linear, output in gave if output is scores]
    if len(found) != 1 or sum(linear is found[0] for linear, _ in gave) != 1:
        raise SettingsError(
            f"job.yaml: field 'student.architecture' is {name!r}, whose scores are not what a linear layer gives, so "
            "that there is no place for a head of verticals",
            hint="Choose an architecture that ends in a linear layer, such as resnet8",
        )
    with seeded(derive(seed, "head of verticals")):
        head = ConcentratedHead(plan, found[0].in_features)
    for path in [path for path, linear in linears.items() if linear is found[0]]:
        parent, _, last = path.rpartition(".")
        setattr(network.get_submodule(parent), last, head)
    return head


def head_of(network: nn.Module) -> ConcentratedHead | None:
    """Return the head of verticals in a network; None in one without."""
    return next((module for module in network.modules() if isinstance(module, ConcentratedHead)), None)


def _noting(into: list[tuple[nn.Linear, Any]]) -> Callable[[nn.Module, Any, Any], None]:
    def hook(layer: nn.Module, _: Any, output: Any) -> None:
        assert isinstance(layer, nn.Linear)
        into.append((layer, output))

    return hook


def verticals_in(sizes: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Return verticals of these sizes with the classes in turn, named by number: for heads without a label space."""
    found, start = {}, 0
    for v, size in enumerate(sizes):
        found[f"vertical-{v + 1}"] = tuple(range(start, start + size))
        start += size
    return found
