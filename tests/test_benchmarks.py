"""The benchmarks run at their quick size and write their figures. Their claims are judged at full size, by hand.

Those that kill processes or train many teachers take minutes even so, and are left to hand too; so is what needs
packages or images of its own.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import runpy
import sys
from collections.abc import Iterator
from functools import partial
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext
from pathlib import Path

import numpy as np
import pytest

from consilience.common.errors import StudentError

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def warm() -> Iterator[ForkServerContext]:
    """Whence processes start that have imported already what nearly every benchmark imports."""
    with pytest.MonkeyPatch.context() as patch:
        # With the policy set a benchmark does not start itself over, which would import everything twice.
        for name, value in (("OMP_NUM_THREADS", "1"), ("OMP_WAIT_POLICY", "passive")):
            patch.setenv(name, value)
        context = get_context("forkserver")
        context.set_forkserver_preload(["consilience.deploy.simulation", "consilience.deploy.local_grid"])
        context.Process(target=int).start()  # it keeps the environment of the first
        yield context


def type_in(name: str, file: Path, said: Path) -> None:
    """Do what `python benchmarks/NAME.py --quick --json FILE` does, in a process of its own."""
    with said.open("w") as to:
        os.dup2(to.fileno(), 1)
        os.dup2(to.fileno(), 2)
    os.chdir(file.parent)
    sys.argv = [str(FOLDER / f"{name}.py"), "--quick", "--json", str(file)]
    sys.path.insert(0, str(FOLDER))
    runpy.run_path(sys.argv[0], run_name="__main__")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "accounting",
        "amalgamation",
        "answer_bytes",
        "answer_encodings",
        "answering",
        "audit",
        "canaries",
        "choosing",
        "common_feature",
        "coverage",
        "customised",
        "feature_memory",
        "fuzz_decoders",
        "groups",
        "hundred_thousand",
        "ledger",
        "privacy",
        "quality",
        "robust",
        "scale",
        "secure_sums",
        "student",
        "transport",
        "unify",
        "unify_solvers",
    ],
)
def test_a_benchmark_runs(warm: ForkServerContext, name: str, tmp_path: Path) -> None:
    file, said = tmp_path / "figures.json", tmp_path / "said.txt"
    process = warm.Process(target=type_in, args=(name, file, said))
    process.start()
    process.join(300)
    process.kill()
    assert process.exitcode == 0, said.read_text()
    figures = json.loads(file.read_text())
    assert len(figures) >= 2
    assert "machine" in figures


def test_secure_sums_that_miss_a_bar_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    missed = importlib.import_module("secure_sums").missed
    good = {"median_seconds": 4.0, "bytes": 3.0, "largest_difference": 1e-4, "same_arg_max": 0.9999}
    paths = {"open": {"median_seconds": 1.0, "bytes": 1.0}, "secure": good, "secure, 3 lost": good}
    assert missed(paths) == []
    for worse in ({"median_seconds": 4.1}, {"bytes": 3.1}, {"largest_difference": float("nan")}, {"same_arg_max": 0.9}):
        (told,) = missed({**paths, "secure, 3 lost": {**good, **worse}})
        assert told.startswith("secure, 3 lost: ")


def test_robust_students_that_miss_the_bar_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    made = importlib.import_module("robust")
    rights = {f"{attack}, {kind}": 0.8 for attack in made.ATTACKS for kind in ("plain", "robust")}

    def missed(*changes: dict[str, float]) -> list[str]:
        return list(made.missed([{k: {"student": v} for k, v in {**rights, **change}.items()} for change in changes]))

    assert missed({}, {}) == []
    assert (
        missed({"half, robust": 0.785}, {"half, robust": 0.797, "random, plain": 0.1, "colluding, robust": 0.1}) == []
    )
    assert missed({"half, robust": 0.785}, {"half, robust": 0.794}) == ["half: 1.05 points lost, 1.00 allowed"]
    assert missed({"none, robust": 0.79}, {"none, robust": 0.8}, {"none, robust": 0.805}) == []
    assert len(missed({"none, robust": 0.795}, {"none, robust": 0.796}, {"none, robust": 0.795})) == 1


def test_lies_of_the_robust_benchmark_are_what_they_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    lie, random = importlib.import_module("robust").lie, np.random.default_rng(0)
    rows = np.log(random.dirichlet(np.ones(6), 2000)).astype(np.float32)
    targeted = np.exp(lie(rows, "targeted", random))
    assert targeted[:, 0].max() < 0.01
    assert np.allclose(targeted[:, 1], np.exp(rows[:, 0]) + np.exp(rows[:, 1]), atol=1e-5)
    assert np.array_equal(targeted[:, 2:], np.exp(rows[:, 2:]))
    half = (lie(rows, "half", random) == rows).all(axis=1).mean()
    assert 0.45 < half < 0.55
    own = lie(rows, "own", random)
    assert own.shape == (2000, 7)
    assert (own.argmax(axis=1) == 6).all()
    assert lie(rows, "random", random).dtype == np.float32


def test_the_rate_of_a_method_is_one_that_its_student_learns_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what a method does not use nothing changes with the rate, nor does anything but rates."""
    monkeypatch.syspath_prepend(FOLDER)
    made = importlib.import_module("amalgamation")
    for scenario in made.SCENARIOS.values():
        told = {}
        for method in scenario.methods:
            slow, fast = (made.student(scenario, method, rate) for rate in made.RATES)
            settings, layers = slow.model_dump(mode="json"), slow.learning == "layer-wise" and slow.layer_wise.layers
            if slow.learning != "layer-wise" or slow.layer_wise.joint:
                assert (slow.fit.learning_rate, fast.fit.learning_rate) == made.RATES
            if layers:
                assert slow.layer_wise.learning_rate / fast.layer_wise.learning_rate == pytest.approx(
                    made.RATES[0] / made.RATES[1]
                )
            assert fast.model_copy(update={"fit": slow.fit, "layer_wise": slow.layer_wise}) == slow
            epochs = slow.fit.epochs if slow.learning != "layer-wise" or slow.layer_wise.joint else 0
            assert epochs + (slow.layer_wise.epochs if layers else 0) == scenario.epochs
            told[method] = settings
        assert len({json.dumps(each, sort_keys=True) for each in told.values()}) == len(scenario.methods)


def test_a_rate_by_which_a_training_fails_agrees_with_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would else end a measurement of hours."""
    monkeypatch.syspath_prepend(FOLDER)
    made = importlib.import_module("amalgamation")

    def failing(*_: object) -> None:
        raise StudentError("the loss is nan", hint="Lower it")

    monkeypatch.setattr(made, "do_job", failing)
    scenario = made.SCENARIOS["same"]
    assert made.agreement(scenario, "layer-wise", 0.1, 0, tmp_path, [], np.zeros(3, np.intp)) == 0.0
    assert "layer-wise at 0.1: the loss is nan" in capsys.readouterr().err


def test_what_features_came_to_is_kept_with_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where features do not help, the figures are to say why."""
    monkeypatch.syspath_prepend(FOLDER)
    of_features = importlib.import_module("amalgamation").of_features
    layer = {"tap": "layer1", "explained": 0.9, "losses": [3.0, 2.0, 1.0]}
    kept = {"width": 4, "size": [2, 2], "missed": {"site-1": 0.5}, "still": ["site-2"]}
    assert of_features(None) == {"layers": [], "spaces": []}
    assert of_features({"layers": [layer]})["layers"] == [{"tap": "layer1", "explained": 0.9, "losses": [3.0, 1.0]}]
    assert of_features({"spaces": [{"student": "layer2", **kept, "picture": {"points": {}}}]})["spaces"] == [kept]


def test_students_made_to_order_see_the_pool_as_often_and_have_heads_of_what_each_site_knows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    made = importlib.import_module("customised")
    scenario = made.SCENARIO
    slow, fast = min(scenario.rates), max(scenario.rates)
    told = {}
    for method in (*made.CUSTOMISED, *made.FULL):
        first, other = (made.student(scenario, method, ("a", "b"), rate) for rate in (slow, fast))
        filtered = first.learning == "filtered"
        blocks = 3 * first.filtered.epochs * filtered  # cnn3 has three
        assert first.fit.epochs + blocks == 24 + 12 * (method == made.LONGER)
        assert (first.fit.learning_rate, other.fit.learning_rate) == (slow, fast)
        assert other.filtered.learning_rate / fast == pytest.approx(first.filtered.learning_rate / slow)
        assert other.model_copy(update={"fit": first.fit, "filtered": first.filtered}) == first
        told[method] = first
    assert {method for method, each in told.items() if each.learning == "filtered"} == {
        made.FILTERED,
        made.RANDOM,
        made.LONGER,
        made.ALL_FILTERED,
    }
    assert [each.filtered.branches for method, each in told.items() if method in made.CUSTOMISED] == [
        "teacher",
        "random",
        "teacher",
        "teacher",
        "teacher",
    ]
    about = made.separate_heads(scenario, (2, 0, 8))
    assert [(each.task, each.classes, each.block, each.filters) for each in about.branches] == [
        ("site-1", (0, 1), 2, 0),
        ("site-3", (1, 2), 2, 0),
    ]


@pytest.mark.parametrize("grid", [False, True])
def test_concentration_is_measured_on_any_features(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, grid: bool) -> None:
    """Its images and its backbone come in packages: here, points around ten places."""
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # else it starts itself over
    made = importlib.import_module("concentration")
    images = {split: np.full((count, 1, 1, 3), count, np.uint8) for split, count in (("train", 250), ("test", 60))}

    def kept(split: str, arguments: argparse.Namespace) -> tuple[tuple[np.ndarray, np.ndarray], list[str]]:
        return (images[split], np.arange(len(images[split])) % 10), [f"class {at}" for at in range(10)]

    def features(backbone: str, held: np.ndarray, folder: Path) -> np.ndarray:
        places = np.random.default_rng(0).normal(size=(10, 12))
        around = np.random.default_rng(len(held)).normal(size=(len(held), 12))
        return (places[np.arange(len(held)) % 10] + 0.3 * around).astype(np.float32)

    monkeypatch.setattr(made, "kept", kept)
    monkeypatch.setattr(made.lite, "remember", features)
    file = tmp_path / "figures.json"
    monkeypatch.setattr(sys, "argv", ["concentration.py", "--quick", "--json", str(file), *["--grid"] * grid])
    made.main()
    (told,) = json.loads(file.read_text())["seeds"]
    assert set(told["students"]) == set(made.GRID if grid else made.ROWS)
    assert told["specialists"] > 0.9
    assert all(0 < held["within"] <= 1 for held in told["students"].values())


def test_students_made_to_order_are_told_less_their_teachers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    made = importlib.import_module("customised")
    figures = {
        "teachers": {"site-1": {"a": 0.5, "b": 0.9, "c": 0.1}, "site-2": {"b": 0.7}},
        "customised": {"some": {"filtered": {"ap": {"a": 0.6, "b": 0.9}}}},
        "full": {"all": {"ap": {"a": 0.4, "b": 0.8, "c": 0.2}}},
    }
    assert made.less_teachers([figures], "some", ["a", "b"], "filtered") == "+10.0"
    assert made.less_teachers([figures], "some", ["a", "b"], "all") == "-5.0"


def test_a_rate_that_is_too_high_to_learn_by_is_not_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    made = importlib.import_module("customised")
    told, scores = {"a": np.arange(5.0)}, {0.1: np.arange(5.0), 0.3: np.zeros(5)}

    def student(scenario: object, method: str, wanted: object, rate: float, home: object) -> argparse.Namespace:
        if rate not in scores:
            raise StudentError("the loss is not finite")
        return argparse.Namespace(labels=("a",), log_probs=lambda images: scores[rate][:, None])

    class Home:
        """Files, of which there are none."""

        path = tmp_path

        def on(self, part: str) -> Home:
            return self

        def __len__(self) -> int:
            return 0

        def read(self, start: int, stop: int) -> None:
            """Images, at which nothing looks."""

    monkeypatch.setattr(made, "made", student)
    monkeypatch.setattr(made, "Pool", argparse.Namespace(open=lambda path: Home()))
    found = [made.alike(None, "KD", (0,), rate, Home(), told) for rate in (0.1, 0.3, 3.0)]
    assert found == [pytest.approx(1.0), -1.0, -1.0]


def squared(power: int, seed: int, home: Path) -> dict[str, int]:
    """A measurement, for processes to hand each other."""
    with (home.parent / "measured.txt").open("a") as log:
        log.write(f"{home.name}\n")
    return {"value": seed**power, "process": os.getpid()}


@pytest.mark.slow
def test_what_is_measured_is_kept_by_name_and_seed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In processes of their own, in the order of seeds, and a second call measures what is missing alone."""
    monkeypatch.syspath_prepend(str(FOLDER))
    by_seed = importlib.import_module("jobs").by_seed
    arguments = argparse.Namespace(work=tmp_path, quick=False, seeds=2)
    measures = {"to the 2": partial(squared, 2), "cubed": partial(squared, 3)}
    found = by_seed(arguments, measures, lambda figures: figures["value"])
    assert {name: [f["value"] for f in held] for name, held in found.items()} == {"to the 2": [0, 1], "cubed": [0, 1]}
    assert os.getpid() not in {f["process"] for held in found.values() for f in held}
    said = ["to the 2, seed 0: 0", "cubed, seed 0: 0", "to the 2, seed 1: 1", "cubed, seed 1: 1"]
    assert capsys.readouterr().err.splitlines() == said
    (tmp_path / "cubed-1.json").unlink()
    (tmp_path / "measured.txt").unlink()
    assert by_seed(arguments, measures, str)["to the 2"] == found["to the 2"]
    assert (tmp_path / "measured.txt").read_text() == "cubed-1\n"
    quick = by_seed(argparse.Namespace(work=None, quick=True, seeds=2), {"cubed": partial(squared, 3)}, str)
    assert quick == {"cubed": [{"value": 0, "process": os.getpid()}]}
