"""The whole job on one machine, small: what a run leaves behind, resumes, repeats and refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from consilience.__main__ import app
from consilience.client.app import forget_sites
from consilience.client.ledger import Ledger
from consilience.client.site import Site
from consilience.common.errors import StorageError
from consilience.common.files import read_json
from consilience.common.progress import Reporter
from consilience.common.settings import JobSettings, SiteSettings
from consilience.common.settings_file import load_settings
from consilience.deploy import simulation
from consilience.server.answers import AnswerStore
from consilience.server.report import comparable

Command = Callable[..., Result]


def job(**changes: Any) -> dict[str, Any]:
    fit = {"epochs": 1, "precision": "f32", "augment": False}
    raw: dict[str, Any] = {
        "name": "small",
        "simulation": {
            "data": {"kind": "embedded"},
            "test": {"kind": "embedded", "split": "test"},
            "pool_share": 0.06,
            "partition": {"kind": "class-lists", "classes": [["Bag", "Coat", "Dress"], ["Dress", "Shirt"]]},
            "teachers": [{"kind": "train", "architecture": "cnn3", "fit": fit}],
        },
        "ask": {"question_size": 32},
        "student": {"architecture": "cnn3", "fit": fit},
    }
    return {**raw, **changes}


@pytest.fixture(scope="module")
def consilience() -> Command:
    runner = CliRunner()

    def call(*words: object) -> Result:
        forget_sites()
        return runner.invoke(app, [str(word) for word in words])

    return call


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("simulation")
    (path / "job.yaml").write_text(yaml.safe_dump(job()))
    return path


@pytest.fixture(scope="module")
def run(home: Path, consilience: Command) -> Path:
    result = consilience("simulate", home / "job.yaml", "--out", home / "run")
    assert result.exit_code == 0, result.output
    return home / "run"


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, at another place: paths in its job.yaml are changed to it."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    path = folder / "job.yaml"
    path.write_text(path.read_text().replace(str(run), str(folder)))
    return folder


def events(run: Path, name: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == name]


def test_a_run_leaves_what_the_design_says(run: Path) -> None:
    student = ["model.safetensors", "labels.json", "preprocessing.json"]
    files = ["job.yaml", "contract.json", "events.jsonl", "report.json", "report.html", "card.md", "labels/q.npy"]
    for name in [*files, *(f"student/{file}" for file in student)]:
        assert (run / name).stat().st_size > 0, name
    report = read_json(run / "report.json")
    contenders = [report["student"], *report["baselines"].values()]
    assert len(contenders) == 8
    assert all(0 <= entry["accuracy"] <= 1 for entry in contenders)
    labels = np.load(run / "labels" / "q.npy", mmap_mode="r")
    assert labels.shape == (300, 4)
    assert np.allclose(labels.sum(axis=1), 1, atol=1e-5)
    contract = read_json(run / "contract.json")
    assert contract["owners"]["Dress"] == ["site-1", "site-2"]
    assert report["pool"]["digest"] == contract["pools"][0]
    assert released(run) == {"site-1": 1300, "site-2": 1300}


def released(run: Path) -> dict[str, int]:
    """Return what each site's ledger says that it released to the job."""
    found = {}
    for file in sorted((run / "simulation" / "sites").glob("*/site.yaml")):
        with closing(Ledger.open(load_settings(file, SiteSettings))) as ledger:
            assert set(ledger.spent.jobs) == {"small"}
            found[file.parent.name] = ledger.spent.lifetime
    return found


def test_a_job_that_a_site_does_not_allow_says_so_and_goes_on_once_it_does(
    consilience: Command, tmp_path: Path
) -> None:
    raw = job()
    raw["simulation"]["policy"] = {"approval": True, "limits": {"per_job": 1299}}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(raw))
    command = ("simulate", tmp_path / "job.yaml", "--out", tmp_path / "run")
    result = consilience(*command)
    assert result.exit_code == 9
    assert "not-approved, nobody at the site has approved this job yet" in result.stderr.replace("\n", " ")
    sites = sorted((tmp_path / "run" / "simulation" / "sites").glob("*/site.yaml"))
    for site in sites:
        assert consilience("site", "approve", tmp_path / "job.yaml", site).exit_code == 0
    result = consilience(*command)
    assert result.exit_code == 9
    assert "budget-exhausted, the site's limits do not allow so many samples more" in result.stderr.replace("\n", " ")
    for site in sites:
        site.write_text(site.read_text().replace("per_job: 1299", "per_job: 1300"))
        assert consilience("site", "approve", tmp_path / "job.yaml", site).exit_code == 0
    result = consilience(*command)
    assert result.exit_code == 0, result.output
    assert released(tmp_path / "run") == {"site-1": 1300, "site-2": 1300}


def test_sites_hold_private_images_that_are_in_no_pool(run: Path) -> None:
    def pixels(path: Path) -> set[bytes]:
        with np.load(path) as file:
            return {image.tobytes() for image in file["x"]}

    shards = sorted((run / "simulation" / "pool").glob("shard-*.bin"))
    raw = b"".join(shard.read_bytes() for shard in shards)
    pool = {raw[i : i + 784] for i in range(0, len(raw), 784)}
    test = pixels(run / "simulation" / "test.npz")
    private = [pixels(run / "simulation" / "sites" / f"site-{i}" / "private.npz") for i in (1, 2)]
    assert len(pool) == 300
    groups = [pool, test, *private]
    assert all(not a & b for i, a in enumerate(groups) for b in groups[i + 1 :])


def test_the_same_command_again_asks_nothing_and_changes_nothing(copy: Path, home: Path, consilience: Command) -> None:
    before = comparable(read_json(copy / "report.json"))
    asked = len(events(copy, "asked"))
    assert asked == sum(2 * -(-size // 32) for size in (300, 1000))
    result = consilience("simulate", home / "job.yaml", "--out", copy)
    assert result.exit_code == 0, result.output
    assert len(events(copy, "asked")) == asked
    assert comparable(read_json(copy / "report.json")) == before


def test_another_folder_gives_the_same_report(run: Path, home: Path, consilience: Command, tmp_path: Path) -> None:
    assert consilience("simulate", home / "job.yaml", "--out", tmp_path / "again").exit_code == 0
    assert comparable(read_json(tmp_path / "again" / "report.json")) == comparable(read_json(run / "report.json"))


@pytest.mark.parametrize("lost", ["labels", "student", "oracle", "report.json", "answers/site-2", "contract.json"])
def test_what_is_lost_is_made_again(copy: Path, home: Path, consilience: Command, lost: str) -> None:
    before = comparable(read_json(copy / "report.json"))
    path = copy / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    asked = len(events(copy, "asked"))
    result = consilience("simulate", home / "job.yaml", "--out", copy)
    assert result.exit_code == 0, result.output
    assert comparable(read_json(copy / "report.json")) == before
    again = events(copy, "asked")[asked:]
    assert {event["site"] for event in again} == ({"site-2"} if "site-2" in lost else set())
    assert released(copy) == {"site-1": 1300, "site-2": 1300}  # what was asked again was given again


def test_another_job_or_seed_is_not_done_in_the_same_folder(copy: Path, home: Path, consilience: Command) -> None:
    result = consilience("simulate", home / "job.yaml", "--out", copy, "--seed", 1)
    assert result.exit_code == 14
    assert "another job or seed" in result.stderr
    assert (copy / "report.json").exists()


def test_a_folder_that_a_crash_left_with_half_a_file_is_used(
    home: Path, consilience: Command, tmp_path: Path, run: Path
) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / ".job.yaml.123-456.part").write_text("name: sm")
    assert consilience("simulate", home / "job.yaml", "--out", tmp_path).exit_code == 0
    assert comparable(read_json(tmp_path / "report.json")) == comparable(read_json(run / "report.json"))
    assert not list(tmp_path.rglob(".*.part"))


def test_a_run_may_be_moved(run: Path, home: Path, consilience: Command, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "moved")
    before = read_json(run / "report.json")
    assert consilience("simulate", home / "job.yaml", "--out", tmp_path / "moved").exit_code == 0
    after = read_json(tmp_path / "moved" / "report.json")
    assert comparable(after) == comparable(before)
    assert after["timing"] == before["timing"]
    assert str(run) not in (tmp_path / "moved" / "job.yaml").read_text()


def test_a_strange_folder_is_left_alone(home: Path, consilience: Command, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    result = consilience("simulate", home / "job.yaml", "--out", tmp_path)
    assert result.exit_code == 14
    assert not (tmp_path / "job.yaml").exists()


def test_a_changed_pool_or_answer_is_found(copy: Path, home: Path, consilience: Command) -> None:
    shutil.rmtree(copy / "labels")
    data = next((copy / "answers" / "site-1").glob("*/answers.bin"))
    content = bytearray(data.read_bytes())
    content[3] ^= 8
    data.write_bytes(content)
    for store in (copy / "answers" / "site-1").iterdir():
        (store / "answers.bin").write_bytes(bytes(len((store / "answers.bin").read_bytes())))
    result = consilience("simulate", home / "job.yaml", "--out", copy)
    assert result.exit_code == 10
    assert "has changed" in result.stderr


def test_a_pool_that_changed_under_the_sites_is_refused(copy: Path, home: Path, consilience: Command) -> None:
    shutil.rmtree(copy / "answers")
    shard = copy / "simulation" / "pool" / "shard-00000.bin"
    content = bytearray(shard.read_bytes())
    content[3] ^= 8
    shard.write_bytes(content)
    result = consilience("simulate", home / "job.yaml", "--out", copy)
    assert result.exit_code == 5
    assert "bytes differ from the manifest" in result.stderr


def test_a_full_disk_keeps_what_arrived(
    home: Path, consilience: Command, run: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("answers", "labels", "student", "oracle"):
        shutil.rmtree(copy / name)
    real, count = AnswerStore.append, 0

    def append(self: AnswerStore, answer: Any) -> None:
        nonlocal count
        if count == 5:
            raise StorageError(f"Cannot write {self.folder}: No space left on device", hint="Make room")
        count += 1
        real(self, answer)

    monkeypatch.setattr(AnswerStore, "append", append)
    result = consilience("simulate", home / "job.yaml", "--out", copy)
    assert result.exit_code == 10
    assert "No space left" in result.stderr
    assert len(list(copy.glob("answers/*/*/index.jsonl"))) > 0
    monkeypatch.undo()
    before = len(events(copy, "answered"))
    assert consilience("simulate", home / "job.yaml", "--out", copy).exit_code == 0
    expected = sum(2 * -(-size // 32) for size in (300, 1000))
    assert len(events(copy, "answered")) - before == expected - 5
    assert comparable(read_json(copy / "report.json")) == comparable(read_json(run / "report.json"))


@pytest.mark.parametrize("learning", ["direct-ce", "direct-mf-lf"])
def test_the_student_can_learn_from_the_answers_directly(tmp_path: Path, consilience: Command, learning: str) -> None:
    fit = {"epochs": 10, "batch_size": 16, "precision": "f32", "augment": False}
    student = {"architecture": "cnn3", "fit": fit, "learning": learning}
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job(student=student)))
    result = consilience("simulate", path, "--out", tmp_path / "run", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)["data"]["report"]
    assert report["student"]["accuracy"] > 0.15  # at most 0.4: four classes of ten are known


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"surprise": 1}, 3, "'surprise' is unknown"),
        ({"pool": "somewhere"}, 3, "'pool' and 'simulation' exclude each other"),
        ({"judge": {"test": {"kind": "embedded"}}}, 3, "'judge' and 'simulation' exclude each other"),
        ({"unify": {"prior_correction": True}, "student": {"learning": "direct-ce"}}, 3, "corrects soft labels"),
        ({"student": {"preprocessing": {"mean": [0, 0, 0], "std": [1, 1, 1], "channels": None}}}, 3, "has 3 values"),
        ({"unify": {"method": "mean"}}, 3, "'unify.method' is 'mean'"),
        ({"unify": {"weights": {"site-9": 2}}}, 3, "'unify.weights.site-9' names no connected site"),
        ({"unify": {"strengths": {"site-9": 0.5}}}, 3, "'unify.strengths.site-9' names no connected site"),
        ({"labels": {"classes": ["Bag", "Boot"]}}, 6, "no site knows the class 'Boot'"),
        ({"labels": {"synonyms": {"top": ["Dress", "Shirt"]}}}, 6, "'Dress' and 'Shirt'"),
        ({"student": {"architecture": "resnet-9000"}}, 3, "resnet-9000"),
    ],
)
def test_mistakes_in_the_job_are_one_line(
    tmp_path: Path, copy: Path, consilience: Command, change: dict[str, Any], code: int, words: str
) -> None:
    """The sites of the finished run are used again, so that only the mistake costs time."""
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job(**change)))
    folder = tmp_path / "new"
    if code != 3 or "weights" in str(change) or "architecture" in str(change):
        folder.mkdir()
        shutil.copytree(copy / "simulation", folder / "simulation")
        settings = yaml.safe_load((copy / "job.yaml").read_text().replace(str(copy), str(folder)))
        settings.update({key: {**settings[key], **value} for key, value in change.items()})
        (folder / "job.yaml").write_text(yaml.safe_dump(settings))
        path.write_text((folder / "job.yaml").read_text())
    result = consilience("simulate", path, "--out", folder)
    assert result.exit_code == code, result.output
    assert words in result.stderr.replace("\n", " ")
    assert "Traceback" not in result.output
    assert len([line for line in result.stderr.splitlines() if line.startswith("Error")]) == 1


def test_a_job_without_simulation_cannot_be_simulated(tmp_path: Path, consilience: Command) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("name: real\n")
    result = consilience("simulate", path, "--out", tmp_path / "run", "--json")
    assert result.exit_code == 3
    error = json.loads(result.stdout)["error"]
    assert error["code"] == 3
    assert "no field 'simulation'" in error["message"]
    assert error["hint"]


def test_a_site_that_lost_its_teacher_stops_the_job_by_name(
    copy: Path, home: Path, consilience: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(copy / "answers")
    monkeypatch.setattr(simulation, "train_site", lambda path, reporter: None)
    shutil.rmtree(copy / "simulation" / "sites" / "site-2" / "state")
    result = consilience("simulate", home / "job.yaml", "--out", copy)
    assert result.exit_code == 9
    assert "cannot answer now" in result.stderr


def test_a_class_that_the_data_lacks_is_refused_before_teachers_are_trained(
    tmp_path: Path, consilience: Command
) -> None:
    raw = job()
    raw["student"]["classes"] = ["Bag", "Hat"]
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(raw))
    result = consilience("simulate", tmp_path / "job.yaml", "--out", tmp_path / "run")
    assert result.exit_code == 3
    assert "'Hat', which no site knows; known:" in result.output.replace("\n", " ")
    assert not list((tmp_path / "run").rglob("site.yaml"))


def image_of(run: Path, path: Path) -> int:
    with np.load(run / "simulation" / "test.npz") as file:
        Image.fromarray(file["x"][0].reshape(28, 28)).resize((56, 56)).save(path)
        return int(file["y"][0])


def test_predict_evaluate_and_export(run: Path, tmp_path: Path, consilience: Command) -> None:
    import torch

    student = run / "student"
    image_of(run, tmp_path / "a.png")
    result = consilience("student", "predict", tmp_path / "a.png", "--student", student, "--json", "--top", 2)
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)["data"]["predictions"]
    assert len(row["top"]) == 2
    assert row["top"][0]["prob"] >= row["top"][1]["prob"]
    result = consilience("student", "evaluate", run / "simulation" / "test.npz", "--student", student, "--json")
    assert result.exit_code == 0, result.output
    accuracy = json.loads(result.stdout)["data"]["accuracy"]
    assert accuracy == pytest.approx(read_json(run / "report.json")["student"]["accuracy"])
    result = consilience("student", "export", tmp_path / "s.pt2", "--student", student)
    assert result.exit_code == 0, result.output
    program = torch.export.load(tmp_path / "s.pt2").module()
    with np.load(run / "simulation" / "test.npz") as file:
        images = torch.from_numpy(file["x"][:5].reshape(5, 28, 28, 1))
    from consilience.server.learning import StudentModel

    expected = StudentModel(student).log_probs(images.numpy())
    assert np.allclose(program(images).detach().numpy(), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["student", "predict", "missing.png", "--student", "{student}"], 4, "no such file"),
        (["student", "predict", "x.png", "--student", "nowhere"], 12, "holds no student"),
        (["student", "evaluate", "missing.npz", "--student", "{student}"], 4, "no such file"),
        (["pool", "show", "nowhere"], 5, "holds no pool"),
        (["pool", "verify", "{pool}", "--digest", "abc"], 5, "not abc"),
        (["pool", "build", "nowhere", "pool", "--size", "big"], 3, "HEIGHTxWIDTH"),
        (["pool", "build", "nowhere", "pool", "--channels", "2"], 3, "allowed: 1, 3"),
        (["site", "show", "nowhere.yaml"], 3, "No such file"),
        (["explain", "99"], 3, "no exit code"),
    ],
)
def test_mistakes_at_the_command_line_are_one_line(
    run: Path, consilience: Command, words: list[str], code: int, text: str
) -> None:
    filled = [w.format(student=run / "student", pool=run / "simulation" / "pool") for w in words]
    result = consilience(*filled)
    assert result.exit_code == code, result.output
    assert text in result.stderr
    assert "Traceback" not in result.output


def test_pool_and_site_commands(run: Path, tmp_path: Path, consilience: Command) -> None:
    built = consilience("pool", "build", run / "simulation" / "test.npz", tmp_path / "pool", "--json")
    assert built.exit_code == 0, built.output
    digest = json.loads(built.stdout)["data"]["digest"]
    assert digest == read_json(run / "contract.json")["pools"][1]
    assert consilience("pool", "verify", tmp_path / "pool", "--digest", digest).exit_code == 0
    assert digest in consilience("pool", "show", tmp_path / "pool").stdout.replace("\n", "")
    site = run / "simulation" / "sites" / "site-1" / "site.yaml"
    shown = json.loads(consilience("site", "show", site, "--json").stdout)["data"]
    assert shown["name"] == "site-1"
    assert shown == next(c for c in read_json(run / "contract.json")["sites"] if c["name"] == "site-1")
    trained = consilience("site", "train", site, "--json")
    assert json.loads(trained.stdout)["data"]["teacher"] == shown["teacher"]


def test_explain_and_version(consilience: Command) -> None:
    assert "pool" in consilience("explain", 5).stdout
    assert "Ctrl-C" in consilience("explain", 130).stdout
    assert consilience("--version").stdout.startswith("consilience ")


@pytest.mark.slow
def test_sites_without_a_common_class_are_joined_by_the_coverage_that_they_learn(
    tmp_path: Path, consilience: Command
) -> None:
    """Policy, learning, asking, unification, report; the labels are better than those of the same answers alone."""
    raw = job()
    simulated = {
        **raw["simulation"],
        "pool_share": 0.2,
        "partition": {"kind": "class-lists", "classes": [["Bag", "Ankle boot"], ["Dress", "Sandal"]]},
        "coverage": {
            "architecture": "cnn3",
            "fit": {
                "epochs": 2,
                "pretrain": 2,
                "batch_size": 64,
                "learning_rate": 0.05,
                "precision": "f32",
                "augment": False,
            },
        },
    }
    raw = job(simulation={**simulated, "policy": {"coverage": "u8"}})
    labels, reports = {}, {}
    for name, asks in (("with", True), ("without", False)):
        run, path = tmp_path / name, tmp_path / f"{name}.yaml"
        if not asks:  # the same sites again, which need not be trained
            shutil.copytree(tmp_path / "with" / "simulation", run / "simulation")
            raw = yaml.safe_load((tmp_path / "with" / "job.yaml").read_text().replace(str(tmp_path / "with"), str(run)))
            raw["ask"]["coverage"] = False
            (run / "job.yaml").write_text(yaml.safe_dump(raw))
        path.write_text(yaml.safe_dump(raw))
        result = consilience("simulate", path, "--out", run)
        assert result.exit_code == 0, result.output
        labels[name] = np.load(run / "labels" / "q.npy")
        reports[name] = read_json(run / "report.json")
    with_it, without = reports["with"], reports["without"]
    assert (with_it["unify"]["joined"], without["unify"]["joined"]) == (True, False)
    for site in with_it["sites"]:
        assert site["coverage"]["encoding"] == "u8"
        assert site["coverage_auroc"] > 0.5
    assert [site["coverage_auroc"] for site in without["sites"]] == [None, None]
    assert labels["with"].shape == labels["without"].shape
    assert np.abs(labels["with"] - labels["without"]).max() > 0.1
    truth = np.load(tmp_path / "with" / "simulation" / "pool-labels.npy")
    names = read_json(tmp_path / "with" / "contract.json")["labels"]
    with np.load(tmp_path / "with" / "simulation" / "test.npz") as file:
        number = {str(name): k for k, name in enumerate(file["names"])}
    known = np.array([number[name] for name in names])
    inside = np.isin(truth, known)
    right = {key: float((known[q.argmax(axis=1)] == truth)[inside].mean()) for key, q in labels.items()}
    assert right["with"] > right["without"]


def test_simulated_sites_tell_features_by_the_simulation_s_policy(tmp_path: Path) -> None:
    raw = job()
    raw["simulation"]["policy"] = {"features": {"taps": {"*": {"channels": 4}, "penultimate": {}}}}
    settings = JobSettings.model_validate(raw)
    with Reporter() as reporter:
        _, paths = simulation.prepare_run(settings, tmp_path, reporter)
    for path in paths:
        with closing(Site.load(path)) as site:
            assert site.card.features is not None
            shapes = [(tap.name, tap.shape[0], tap.components is None) for tap in site.card.features.taps]
            assert shapes == [
                ("layer1", 4, False),
                ("layer2", 4, False),
                ("layer3", 4, False),
                ("penultimate", 128, True),
            ]


@pytest.mark.parametrize(
    ("architectures", "taps", "words"),
    [
        (
            ["cnn3"],
            {"*": {}, "nosuch": {}},
            "site-1: field policy.features.taps.nosuch is no tap of the teacher; it has:",
        ),
        (["cnn3", "resnet8"], {"layer3": {}, "layer4": {}}, "site-1: field policy.features.taps.layer4 is no tap"),
        (["resnet8", "cnn3"], {"layer3": {}, "layer4": {}}, "site-2: field policy.features.taps.layer4 is no tap"),
    ],
)
def test_a_tap_that_a_teacher_will_not_have_is_refused_before_any_is_trained(
    tmp_path: Path, consilience: Command, architectures: list[str], taps: dict[str, Any], words: str
) -> None:
    raw = job()
    (teacher,) = raw["simulation"]["teachers"]
    raw["simulation"]["teachers"] = [{**teacher, "architecture": name} for name in architectures]
    raw["simulation"]["policy"] = {"features": {"taps": taps}}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(raw))
    result = consilience("simulate", tmp_path / "job.yaml", "--out", tmp_path / "run")
    assert result.exit_code == 3
    assert words in " ".join(result.output.split())
    assert not list((tmp_path / "run").rglob("teacher.json"))
    assert not list((tmp_path / "run").rglob("training"))
