"""Question: what do specialists' answers, blocks for verticals and scaled scores each add to one student of all?

The ablation of Gao et al. (2017, table 4.6 of their paper) on Caltech-101 without its background and Faces_easy: 100
classes, of which a seed makes 5 verticals of 20. Each vertical has a specialist: a linear head on frozen
EfficientNet-Lite0 features, learned from private images, as strong as does best on private images held out. The student
is a head on the same features that learns from 40 % of the training images, the pool. Rows:

* hard labels: FC-FC taught by the pool's true labels, sigmoid cross-entropy, no specialist;
* FC-FC + D: each sample taught by a specialist, its whole answer within its vertical and zeros elsewhere;
* FC-SC + D: with a block of the second layer for each vertical;
* FC-SC + D + S: and with scores scaled by vertical;
* the same with samples routed by unified labels (method ce), which is what a job does that has no labels and no
  coverage; the rows above route by the true label, as the paper does;
* specialists: each on its own vertical, so that there is nothing to tell against all classes.

Figures are mean average precision over verticals (mpvap) of test images, within a vertical and against all classes, by
log-probabilities over classes; "sigmoid" ranks images by the raw score of a class instead. The peak learning rate of
each row is the one, of seven, under which the student is most precise, against all classes, about the taught classes of
a tenth of the pool that it did not learn from, under the first seed. Test labels decide nothing. A seed decides
verticals, which images are private, held out or the pool, initial weights and order. Gains are paired by seed, with
95 % intervals by Student's t. `--grid` measures heads, shared units, scalings and their starts instead.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lite
import numpy as np
import torch
from caltech import HELD_OUT, POOL, STRENGTHS, kept, shared_out
from images import Labels, add_data, difference, spread
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from consilience.common.files import read_json, write_json
from consilience.common.nets.loop import one_cycle, sgd
from consilience.common.settings import Fit, Head
from consilience.server.judge_verticals import judge_verticals
from consilience.server.student.concentrated_head import ConcentratedHead, HeadPlan
from consilience.server.student.routing import route_by_labels, specialist_targets
from consilience.server.student.sparse_loss import SparseSigmoid, SparseTargets
from consilience.server.student.verticals import Verticals
from consilience.server.unify import unify
from harness import options, show

VERTICALS = 5
RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
BATCH = 64
FIRST, SECOND = 256, 64
CHOSEN_ON = 0.1
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Row:
    """A way of learning: the head's settings, whether specialists teach, and how samples are routed."""

    head: dict[str, Any]
    distilled: bool = True
    routing: str = "label"
    widths: dict[str, int] = field(default_factory=lambda: {"first": FIRST, "second": SECOND})

    @property
    def settings(self) -> Head:
        """The head's settings."""
        return Head.model_validate({"scaling": "none", **self.widths, **self.head})


FC_FC, FC_SC, SC_SC = {"kind": "fc-fc"}, {"kind": "fc-sc"}, {"kind": "sc-sc"}
S = {"scaling": "vertical"}
ROWS = {
    "FC-FC, hard labels": Row(FC_FC, distilled=False),
    "FC-FC + D": Row(FC_FC),
    "FC-SC + D": Row(FC_SC),
    "FC-SC + D + S": Row(FC_SC | S),
    "FC-SC + D, routed by unified labels": Row(FC_SC, routing="unified"),
    "FC-SC + D + S, routed by unified labels": Row(FC_SC | S, routing="unified"),
}
GAINS = (
    ("D", "FC-FC + D", "FC-FC, hard labels"),
    ("SC", "FC-SC + D", "FC-FC + D"),
    ("S", "FC-SC + D + S", "FC-SC + D"),
    ("labelled routing", "FC-SC + D", "FC-SC + D, routed by unified labels"),
)
GRID = {
    "FC-FC": Row(FC_FC, distilled=False),
    "SC-SC": Row(SC_SC, distilled=False, widths={"first": SECOND, "second": SECOND}),
    "FC-FC + D": Row(FC_FC),
    "FC-SC + D": Row(FC_SC),
    "SC-SC + D": Row(SC_SC, widths={"first": SECOND, "second": SECOND}),
    **{
        f"FC-SC + D, {x} shared": Row(FC_SC | {"shared": x})
        for x in (SECOND // 4, SECOND // 2, 3 * SECOND // 4, SECOND)
    },
    "FC-SC + D + S, class": Row(FC_SC | {"scaling": "class"}),
    "FC-SC + D + S, vertical": Row(FC_SC | S),
    "FC-SC + D + S, vertical, fixed": Row(FC_SC | S | {"learned": False}),
    "FC-SC + D + S, class, from 10": Row(FC_SC | {"scaling": "class", "start": 10}),
    "FC-SC + D + S, vertical, from 10": Row(FC_SC | S | {"start": 10}),
}


@dataclass(frozen=True)
class Case:
    """A seed's data: features of the pool and the test images, labels, verticals, and specialists' answers."""

    pool: Floats
    truth: Labels
    test: Floats
    test_truth: Labels
    verticals: Verticals
    answers: list[Floats]
    unified: Floats
    specialists: list[float | None]

    def targets(self, row: Row) -> SparseTargets:
        """Return what a row learns."""
        if not row.distilled:
            return SparseTargets(self.truth[:, None].astype(np.int32), np.ones((len(self.truth), 1), np.float32))
        of = self.verticals.of_class[self.truth]
        if row.routing == "unified":
            of = route_by_labels(self.unified, self.verticals)
        keep = max(self.verticals.sizes)
        return SparseTargets(*specialist_targets(self.answers, self.verticals.classes, self.verticals, of, of, keep))


def case(seed: int, cache: Path, arguments: argparse.Namespace) -> Case:
    """Make verticals, their specialists and what they answer."""
    random = np.random.default_rng(seed)
    (images, labels), names = kept("train", arguments)
    test_images, test_truth = kept("test", arguments)[0]
    features, test = (lite.remember("lite0", held, cache / "features") for held in (images, test_images))
    parts = np.array_split(random.permutation(len(names)), 2 if arguments.quick else VERTICALS)
    classes = tuple(tuple(sorted(map(int, part))) for part in parts)
    called = tuple(f"vertical-{v + 1}" for v in range(len(classes)))
    verticals = Verticals(called, classes, tuple((v,) for v in range(len(classes))))
    pool, private = shared_out(labels, random, POOL / 100)
    mean, deviation = features[pool].mean(axis=0), features[pool].std(axis=0) + 1e-3
    features, test = (features - mean) / deviation, (test - mean) / deviation
    answers, specialists = [], []
    for held in classes:
        own = private[np.isin(labels[private], held)]
        held_out, learned = (own[ids] for ids in shared_out(labels[own], random, HELD_OUT))
        fitted = [LogisticRegression(C=c / 10, max_iter=200).fit(features[learned], labels[learned]) for c in STRENGTHS]
        best = max(fitted, key=lambda model: model.score(features[held_out], labels[held_out]))
        answers.append(best.predict_log_proba(features[pool]).astype(np.float32))
        here = np.isin(test_truth, held)
        place = np.searchsorted(held, test_truth[here])
        told = judge_verticals(place, best.predict_log_proba(test[here]), [tuple(range(len(held)))])
        specialists.append(told.mean_within)
    unified = unify(answers, classes, len(names)).probs
    return Case(features[pool], labels[pool], test, test_truth, verticals, answers, unified, specialists)


def taught(
    row: Row, rate: float, seed: int, data: Case, ids: NDArray[np.int64], arguments: argparse.Namespace
) -> ConcentratedHead:
    """Return a head that has learnt the pool's samples `ids`."""
    torch.manual_seed(seed)
    table = dict(zip(data.verticals.names, data.verticals.classes, strict=True))
    head = ConcentratedHead(HeadPlan(head=row.settings, verticals=table), data.pool.shape[1])
    loss = SparseSigmoid(data.targets(row), data.verticals.classes, torch.device("cpu"), samples=ids)
    fit = Fit(learning_rate=rate, epochs=2 if arguments.quick else 40)
    optimizer, features = sgd(head, fit), torch.from_numpy(data.pool[ids])
    steps = fit.epochs * (len(ids) // BATCH)
    head.in_parts = True
    for epoch in range(fit.epochs):
        order = torch.randperm(len(ids))
        for at in range(len(ids) // BATCH):
            batch = order[at * BATCH : (at + 1) * BATCH]
            value = loss(head(features[batch]), batch)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(value)
            for group in optimizer.param_groups:
                group["lr"] = one_cycle(epoch * (len(ids) // BATCH) + at, steps, rate)
            optimizer.step()
    head.in_parts = False
    return head


def scores(head: ConcentratedHead, features: Floats) -> tuple[Floats, Floats]:
    """Return log-probabilities over classes and raw scores."""
    with torch.no_grad():
        raw = head(torch.from_numpy(features))
    return torch.log_softmax(raw, dim=1).numpy(), raw.numpy()


def chosen_rate(name: str, row: Row, data: Case, arguments: argparse.Namespace) -> dict[str, float]:
    """Return rate -> the precision about samples that were not learnt from; 0 for one that does not learn."""
    count = round(len(data.pool) * (1 - CHOSEN_ON))
    targets, told = data.targets(row), {}
    others = np.arange(count, len(data.pool))
    classes = targets.labels[others, 0]
    for rate in RATES[1:2] if arguments.quick else RATES:
        log_probs = scores(taught(row, rate, 0, data, np.arange(count), arguments), data.pool[others])[0]
        found = None if np.isnan(log_probs).any() else judge_verticals(classes, log_probs, data.verticals.classes)
        told[str(rate)] = (found.mean_against_all if found else None) or 0.0
    print(f"{name}: {told}", file=sys.stderr)
    return told


def measured(row: Row, rate: float, seed: int, data: Case, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of a row."""
    head = taught(row, rate, seed, data, np.arange(len(data.pool)), arguments)
    log_probs, raw = scores(head, data.test)
    told = judge_verticals(data.test_truth, log_probs, data.verticals.classes)
    return {
        "within": told.mean_within,
        "against_all": told.mean_against_all,
        "sigmoid": judge_verticals(data.test_truth, raw, data.verticals.classes).mean_against_all,
        "accuracy": float((log_probs.argmax(axis=1) == data.test_truth).mean()),
        "weights": head.weights,
        "rate": rate,
    }


def table(rows: dict[str, Row], figures: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Return the rows to show."""
    kinds = ("within", "against_all", "sigmoid", "accuracy")
    found = []
    for name in rows:
        held = [f["students"][name] for f in figures]
        found.append((name, *(spread([h[kind] for h in held]) for kind in kinds), f"{held[0]['weights']:,}"))
    found.append(("specialists", spread([f["specialists"] for f in figures]), "", "", "", ""))
    return found


def gains(figures: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Return the paired gains."""
    return [
        (
            f"{name}: {better} over {other}",
            *(
                difference([f["students"][better][kind] - f["students"][other][kind] for f in figures])
                for kind in ("within", "against_all", "accuracy")
            ),
        )
        for name, better, other in GAINS
    ]


def arguments_too(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's own options."""
    add_data(parser)
    parser.add_argument("--grid", action="store_true", help="heads, shared units, scalings and starts")


def main() -> None:
    """Measure what is not measured yet, and show everything."""
    arguments = options(__doc__, arguments_too)
    rows, prefix = (GRID, "grid") if arguments.grid else (ROWS, "rows")
    figures: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        work = (arguments.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        chosen = work / f"{prefix}-rates.json"
        for seed in range(1 if arguments.quick else arguments.seeds):
            done = work / f"{prefix}-{seed}.json"
            if not done.exists():
                data = case(seed, work, arguments)
                if not chosen.exists():
                    write_json(chosen, {name: chosen_rate(name, row, data, arguments) for name, row in rows.items()})
                held = read_json(chosen)
                rates = {name: float(max(held[name], key=lambda rate, name=name: held[name][rate])) for name in rows}  # type: ignore[misc]
                of = data.verticals.of_class[data.truth]
                told = {
                    "students": {n: measured(row, rates[n], seed, data, arguments) for n, row in rows.items()},
                    "specialists": float(np.mean([held or 0.0 for held in data.specialists])),
                    "routed": float((route_by_labels(data.unified, data.verticals) == of).mean()),
                }
                write_json(done, told)
            figures.append(read_json(done))
            print(f"seed {seed}: routed rightly by unified labels: {figures[-1]['routed']:.3f}", file=sys.stderr)
    columns = ("%", "mpvap within", "against all", "by sigmoid", "accuracy", "weights")
    told = {"rows": prefix, "seeds": figures}
    title = f"{len(figures)} seeds, mean ± standard deviation"
    show(title, columns, table(rows, figures), told, arguments.json)
    if not arguments.grid:
        places = ("points (95 %)", "mpvap within", "against all", "accuracy")
        show("gains, paired by seed", places, gains(figures), told, arguments.json)


if __name__ == "__main__":
    main()
