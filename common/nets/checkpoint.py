"""What an interrupted training continues from.

Lives here: one safetensors file with what training changes of the network, the optimizer's momentum and, in its
metadata, the records of the epochs done, so that they cannot be torn apart. A frozen parameter is not in it: the
training begins with that. Does not live here: random state; there is none to keep (seeding).
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from consilience.common.epochs import EpochRecord
from consilience.common.files import write_bytes

_MODEL, _MOMENTUM = "model.", "momentum."


def save(path: Path, key: str, model: nn.Module, optimizer: torch.optim.Optimizer, records: list[EpochRecord]) -> None:
    """Write the state after `records`; `key` says which training it belongs to. Atomic. Raises `StorageError`."""
    frozen = _frozen(model)
    tensors = {_MODEL + name: _plain(held) for name, held in model.state_dict().items() if name not in frozen}
    for name, parameter in model.named_parameters():
        momentum = optimizer.state[parameter].get("momentum_buffer") if parameter in optimizer.state else None
        if momentum is not None:
            tensors[_MOMENTUM + name] = _plain(momentum)
    metadata = {"key": key, "records": json.dumps([asdict(record) for record in records])}
    write_bytes(path, safetensors.torch.save(tensors, metadata))


def records(path: Path, key: str) -> list[EpochRecord]:
    """Return the epochs that the checkpoint of training `key` has done; none if it is another's, damaged or absent."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError):
        return []
    if metadata.get("key") != key:
        return []
    return [EpochRecord(**record) for record in json.loads(metadata["records"])]


def restore(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Bring network and optimizer to the state at `path`, which `records` has found to belong to this training."""
    tensors = safetensors.torch.load_file(path)
    learned = {name[len(_MODEL) :]: held for name, held in tensors.items() if name.startswith(_MODEL)}
    frozen = _frozen(model)
    model.load_state_dict({name: held for name, held in model.state_dict().items() if name in frozen} | learned)
    for name, parameter in model.named_parameters():
        if _MOMENTUM + name in tensors:
            buffer = torch.empty_like(parameter.detach()).copy_(tensors[_MOMENTUM + name])
            optimizer.state[parameter]["momentum_buffer"] = buffer


def _frozen(model: nn.Module) -> set[str]:
    """Return the names of the parameters that nothing changes, whatever else they are called."""
    return {name for name, held in model.named_parameters(remove_duplicate=False) if not held.requires_grad}


def _plain(tensor: Tensor) -> Tensor:
    """safetensors wants contiguous tensors, and the network's are channels_last."""
    return tensor.detach().cpu().contiguous()
