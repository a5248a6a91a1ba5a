"""Question: what does a step of training cost with 100,000 classes, sparse targets and a head of verticals?

One head, FC1024-SC128 in 20 verticals of 5,000 classes on a bottleneck of 512, batches of 128, targets of which 100
classes a sample are not zero, SGD with Nesterov momentum. Rows:

* dense: as one writes it in plain torch: the same head and start, one linear layer a vertical, a target of
  (128, 100,000), `binary_cross_entropy_with_logits`, `torch.optim.SGD`;
* ours: `ConcentratedHead`, `SparseSigmoid` and the training loop's optimizer, products in float32: the same gradients;
* ours, bf16: the same with products in bfloat16, which the training loop takes where its measurement says that it pays;
* ours, drawn: a tenth of the classes of the verticals that do not teach a sample, drawn for each batch, stands for all;
  gradients are right on average, in float32 and with products in bfloat16;
* dense, bf16: the dense one under autocast, to tell apart what bfloat16 and what the rest gains.

Each is its own process, which tells its peak of memory beyond what it had with torch loaded. The rows take turns,
`--rounds` times, so that whatever else the machine does meets all of them; a round tells the median of its steps, and
the table the median of the rounds. Processor seconds, of all threads, change less with what else the machine does, and
do not count waiting. Gradients: the largest difference of a small head's from dense ones in float64, beside
the largest gradient.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from consilience.common.nets.loop import sgd
from consilience.common.settings import Fit, Head
from consilience.server.student.concentrated_head import ConcentratedHead, HeadPlan, scaled, verticals_in
from consilience.server.student.sparse_loss import SparseSigmoid, SparseTargets
from harness import options, show

DRAWN = 0.1
ROWS = ("dense", "dense, bf16", "ours", "ours, bf16", "ours, drawn", "ours, drawn, bf16")
FIT = Fit(learning_rate=0.001, weight_decay=1e-5)
SAMPLES = 1024


class DenseHead(nn.Module):
    """The head as one writes it in plain torch, with the parameters of `head`."""

    def __init__(self, head: ConcentratedHead) -> None:
        super().__init__()
        self.first, self.second, self.gammas = head.first, head.second, head.gammas
        self.outputs = nn.ModuleList(nn.Linear(w.shape[1], w.shape[0], bias=False) for w in head.outputs)
        for layer, weight in zip(self.outputs, head.outputs, strict=True):
            layer.weight = weight

    def forward(self, features: Tensor) -> Tensor:
        """Return (b, L) scores."""
        units = F.relu(self.second(F.relu(self.first(features)))).chunk(len(self.outputs), dim=1)
        scores = [layer(fed) for layer, fed in zip(self.outputs, units, strict=True)]
        if len(self.gammas):
            scores = [scaled(x, gamma) for x, gamma in zip(scores, self.gammas, strict=True)]
        return torch.cat(scores, dim=1)


def sizes(arguments: argparse.Namespace) -> tuple[int, int, int, int, int, int]:
    """Return verticals, classes of each, bottleneck, first, second, and classes of a target."""
    return (4, 50, 16, 32, 8, 5) if arguments.quick else (20, 5000, 512, 1024, 128, 100)


def made(arguments: argparse.Namespace) -> tuple[ConcentratedHead, Tensor, SparseTargets, HeadPlan]:
    """Return a head, features and targets of samples, each of a vertical drawn at random."""
    verticals, classes, bottleneck, first, second, keep = sizes(arguments)
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    kind = Head(kind="fc-sc", first=first, second=second, scaling=arguments.scaling)
    plan = HeadPlan(head=kind, verticals=verticals_in([classes] * verticals))
    head = ConcentratedHead(plan, bottleneck)
    features = torch.relu(torch.randn(SAMPLES, bottleneck))
    start = random.integers(verticals, size=SAMPLES) * classes
    labels = np.stack([at + random.permutation(classes)[:keep] for at in start]).astype(np.int32)
    values = -np.sort(-random.dirichlet(np.full(keep, 0.05), SAMPLES)).astype(np.float32)
    return head, features, SparseTargets(labels, values), plan


def stepper(row: str, arguments: argparse.Namespace) -> Callable[[int], float]:
    """Return a function that does one step on the batch that begins at a sample, and returns the loss."""
    head, features, targets, plan = made(arguments)
    batch, coarse = 32 if arguments.quick else 128, row.endswith("bf16")
    verticals, classes = sizes(arguments)[:2]
    if row.startswith("ours"):
        head.in_parts = True
        loss = SparseSigmoid(
            targets, list(plan.verticals.values()), torch.device("cpu"), drawn=DRAWN if "drawn" in row else 1.0
        )
        optimizer = sgd(head, FIT)

        def ours(start: int) -> float:
            ids = torch.arange(start, start + batch) % SAMPLES
            with torch.autocast("cpu", torch.bfloat16, enabled=coarse):
                hidden, *rest = head(features[ids])
            value = loss((hidden.float(), *rest), ids)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(value)
            optimizer.step()
            return float(value.detach())

        return ours
    plain = DenseHead(head)
    optimizer = torch.optim.SGD(
        plain.parameters(), lr=FIT.learning_rate, momentum=0.9, nesterov=True, weight_decay=FIT.weight_decay
    )

    def dense(start: int) -> float:
        ids = torch.arange(start, start + batch) % SAMPLES
        rows = ids.numpy()
        target = torch.zeros(batch, verticals * classes)
        target.scatter_(
            1, torch.from_numpy(targets.labels[rows].astype(np.int64)), torch.from_numpy(targets.values[rows])
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=coarse):
            scores = plain(features[ids])
        value = F.binary_cross_entropy_with_logits(scores.float(), target, reduction="sum") / batch
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(value)
        optimizer.step()
        return float(value.detach())

    return dense


def peak() -> float:
    """Return the process's peak of memory, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def serve(row: str, arguments: argparse.Namespace) -> None:
    """Do a round of steps for each line of the input; answer each with its figures as a line of JSON."""
    torch.set_num_threads(arguments.threads)
    base = peak()
    step, at = stepper(row, arguments), 0
    batch = 32 if arguments.quick else 128
    for _ in range(2):
        step(0)
    for _ in sys.stdin:
        seconds, processor, losses = [], [], []
        for _ in range(2 if arguments.quick else arguments.steps):
            began, worked = time.perf_counter(), time.process_time()
            losses.append(step(at))
            seconds.append(time.perf_counter() - began)
            processor.append(time.process_time() - worked)
            at += batch
        told = {"seconds": median(seconds), "processor": median(processor), "loss": losses[-1]}
        print(json.dumps({**told, "memory": peak() - base, "whole": peak()}), flush=True)


def rounds(arguments: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Return row -> the figures of its rounds; the rows take turns."""
    own = [sys.executable, __file__, "--threads", str(arguments.threads), "--steps", str(arguments.steps)]
    own += ["--scaling", arguments.scaling, *(["--quick"] if arguments.quick else [])]
    workers = {
        row: subprocess.Popen([*own, "--serve", row], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for row in ROWS
    }
    found: dict[str, list[dict[str, float]]] = {row: [] for row in ROWS}
    for _ in range(2 if arguments.quick else arguments.rounds):
        for row, worker in workers.items():
            assert worker.stdin is not None
            assert worker.stdout is not None
            worker.stdin.write("\n")
            worker.stdin.flush()
            found[row].append(json.loads(worker.stdout.readline()))
    for worker in workers.values():
        assert worker.stdin is not None
        worker.stdin.close()
        worker.wait()
    return found


def gradients() -> dict[str, float]:
    """Return the largest difference of gradients from dense ones, and the largest gradient, of a small head."""
    small = argparse.Namespace(quick=True, scaling="vertical")
    head, features, targets, plan = made(small)
    head, features, ids = head.double(), features.double()[:32], torch.arange(32)
    target = torch.zeros(32, sum(plan.sizes), dtype=torch.float64)
    target.scatter_(
        1, torch.from_numpy(targets.labels[:32].astype(np.int64)), torch.from_numpy(targets.values[:32]).double()
    )
    value = F.binary_cross_entropy_with_logits(DenseHead(head)(features), target, reduction="sum") / 32
    expected = torch.autograd.grad(value, list(head.parameters()))
    head.in_parts = True
    loss = SparseSigmoid(targets, list(plan.verticals.values()), torch.device("cpu"))
    found = torch.autograd.grad(loss(head(features), ids), list(head.parameters()))
    differences = [float((a - b).abs().max()) for a, b in zip(expected, found, strict=True)]
    return {"difference": max(differences), "largest": max(float(g.abs().max()) for g in expected)}


def arguments_too(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's own options."""
    parser.add_argument("--threads", type=int, default=2, help="of each row")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each row")
    parser.add_argument("--steps", type=int, default=8, help="steps of a round")
    parser.add_argument("--scaling", choices=("none", "vertical"), default="none")
    parser.add_argument("--serve", choices=ROWS, help=argparse.SUPPRESS)


def main() -> None:
    """Measure every row, and show them."""
    arguments = options(__doc__, arguments_too)
    if arguments.serve:
        serve(arguments.serve, arguments)
        return
    found, batch = rounds(arguments), 32 if arguments.quick else 128
    slow = [held["seconds"] for held in found["dense"]]
    rows: list[tuple[Any, ...]] = []
    for row, held in found.items():
        seconds = median(each["seconds"] for each in held)
        times = [one / each["seconds"] for one, each in zip(slow, held, strict=True)]
        gain = f"{median(times):.1f} ({min(times):.1f} to {max(times):.1f})"
        worked = median(each["processor"] for each in held)
        less = median(each["processor"] for each in found["dense"]) / worked
        memory = max(each["memory"] for each in held)
        rows.append((row, batch / seconds, 1000 * seconds, gain, 1000 * worked, less, memory, held[-1]["loss"]))
    told = {"rounds": found, "gradients": gradients(), "scaling": arguments.scaling, "threads": arguments.threads}
    columns = ("", "samples/s", "ms a step", "times dense", "processor, ms", "times", "peak memory, GB", "last loss")
    verticals, classes = sizes(arguments)[:2]
    show(f"{verticals * classes:,} classes, batches of {batch}", columns, rows, told, arguments.json)
    print(f"gradients of a small head: {told['gradients']}", file=sys.stderr)


if __name__ == "__main__":
    main()
