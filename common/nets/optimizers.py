"""Optimisers that do not bring torch's compiler along.

Lives here: taking away what torch wraps around an optimiser for programs that compile its step, which none of ours
does. That imports the compiler when the first one is made: 1.3 s and 70 MB of every process that learns. Does not
live here: which optimiser learns what.
"""

from __future__ import annotations

import inspect
from typing import TypeVar, cast

import torch
from torch.optim import Optimizer

Kind = TypeVar("Kind", bound=Optimizer)
_WRAPPED = ("add_param_group", "load_state_dict", "state_dict", "zero_grad")


def plain(kind: type[Kind]) -> type[Kind]:
    """Return an optimiser that does as `kind` of torch does, bit for bit, and cannot be compiled or differentiated."""
    bare = {name: inspect.unwrap(getattr(kind, name)) for name in _WRAPPED}
    bare["step"] = torch.no_grad()(inspect.unwrap(kind.step))
    return cast(type[Kind], type(kind.__name__, (kind,), bare))
