"""`consilience site audit`: what it prints, what it writes, and how the page reads."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from consilience.__main__ import app
from consilience.client.audit import canaries, cli, shadows
from consilience.client.audit.canaries import CanaryAudit
from consilience.client.audit.membership import Found, membership
from consilience.client.audit.page import render_page
from consilience.client.audit.pooled import Pooled
from consilience.client.audit.record import NO_PROOF, Audit
from consilience.client.audit.shares import guess_shares
from consilience.client.privacy import train_private
from consilience.client.site import Site
from consilience.common.errors import StorageError
from consilience.common.files import lock, read_json
from consilience.common.settings import SiteSettings
from consilience.common.settings_file import dump_settings, load_settings


def run(*words: object) -> Result:
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, ["site", "audit", *map(str, words)])


@pytest.fixture
def file(make_site: Any, tmp_path: Path) -> Path:
    site: Site = make_site(fit={"epochs": 3, "batch_size": 32})
    dump_settings(site.settings, tmp_path / "site.yaml")
    return tmp_path / "site.yaml"


def test_the_command_prints_the_verdict_and_writes_record_and_page(file: Path, tmp_path: Path) -> None:
    result = run(file, "--out", tmp_path / "out", "--shadows", 4)
    assert result.exit_code == 0, result.output
    said = " ".join(result.stdout.split())
    found = Audit.model_validate(read_json(tmp_path / "out" / "audit.json"))
    assert found.shadow_count == 4
    assert f"site-1: {found.verdict}." in said
    for words in ("No formal guarantee", "An attack that fails is no guarantee", "Loss threshold", "Likelihood ratio"):
        assert words in said
    assert str(tmp_path / "out" / "audit.html") in result.stdout.replace("\n", "")
    assert (tmp_path / "out" / "audit.html").read_text() == render_page(found)


def test_by_default_the_files_are_in_the_state_and_json_is_one_envelope(file: Path) -> None:
    result = run(file, "--json", "--shadows", 4)
    told = json.loads(result.stdout)
    assert (told["ok"], told["error"]) == (True, None)
    page = Path(told["data"]["page"])
    assert page.parts[-3:] == ("state", "audit", "audit.html")
    assert told["data"]["audit"] == read_json(page.with_name("audit.json"))


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [(("--shadows", 2), 3, "--shadows is 2; allowed: 4 or more"), ((), 7, "holds no trained teacher")],
)
def test_what_cannot_be_done_is_one_line_and_a_code(
    file: Path, tmp_path: Path, words: tuple[Any, ...], code: int, message: str
) -> None:
    if code == 7:
        file.write_text(re.sub(r"^state: .*$", "state: nowhere", file.read_text(), flags=re.MULTILINE))
    result = run(file, *words)
    assert result.exit_code == code
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "nowhere" / "audit").exists()


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The states of all that is trained from now on, in turn."""
    states = list[Path]()

    def spy(settings: SiteSettings, *rest: Any) -> None:
        states.append(settings.state)
        train_private(settings, *rest)

    monkeypatch.setattr(canaries, "train_private", spy)
    monkeypatch.setattr(shadows, "train_private", spy)
    return states


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--shadows", 2), "--shadows is 2; allowed: 4 or more"),
        (("--out", "a_file"), "a_file is a file; audit.html and audit.json need a folder"),
        (("--out", "a_file/below"), "a_file is a file; audit.html and audit.json need a folder"),
        (("--canaries", 9000), "canaries is 9000; allowed"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_trained(
    file: Path, tmp_path: Path, trained: list[Path], words: tuple[Any, ...], message: str
) -> None:
    (tmp_path / "a_file").write_text("kept")
    given = [tmp_path / word if str(word).startswith("a_file") else word for word in words]
    result = run(file, "--canaries", 10, *given)
    assert result.exit_code == 3
    assert message in result.stderr
    assert not trained
    assert (tmp_path / "a_file").read_text() == "kept"


def test_an_interrupted_audit_does_nothing_twice(
    file: Path, tmp_path: Path, trained: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (file, "--canaries", 20, "--shadows", 4, "--out", tmp_path / "out")
    home = load_settings(file, SiteSettings).state / "audit"
    with monkeypatch.context() as patch:
        patch.setattr(cli, "render_page", lambda _: 1 / 0)  # the last moment there is
        assert run(*words).exit_code == 1
    assert [state.parent.name for state in trained] == ["canaries", *["shadows"] * 4]
    told = read_json(tmp_path / "out" / "audit.json")
    trained.clear()
    assert run(*words, "--json").exit_code == 0
    assert not [state for state in trained if state.parent.name == "canaries"]
    assert read_json(tmp_path / "out" / "audit.json")["canaries"] == told["canaries"]
    assert sorted(path.name for path in home.iterdir() if path.name not in ("audit.html", "audit.json")) == [
        ".lock",
        "canaries",
    ]
    # told once, it is forgotten: another audit plants others
    trained.clear()
    assert run(*words).exit_code == 0
    assert trained[0].parent.name == "canaries"


def test_shadows_are_there_until_the_record_is_written(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, epochs = load_settings(file, SiteSettings).state / "audit", list[int]()

    def full(path: Path, value: Any, mode: int = 0) -> None:
        raise StorageError(f"Cannot write {path}: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(cli, "write_json", full)
        assert run(file, "--shadows", 4, "--out", tmp_path / "out").exit_code == 10
    assert len(list((home / "shadows").glob("*/teacher/teacher.json"))) == 4
    monkeypatch.setattr(cli, "epoch_task", lambda *_: lambda record: epochs.append(record.epoch))
    assert run(file, "--shadows", 4, "--out", tmp_path / "out").exit_code == 0
    assert not epochs
    assert not (home / "shadows").exists()


def test_canaries_of_other_settings_are_planted_again(
    file: Path, tmp_path: Path, trained: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "render_page", lambda _: 1 / 0)
    for count, many in ((20, 1), (20, 0), (21, 1)):
        trained.clear()
        run(file, "--canaries", count, "--shadows", 4, "--out", tmp_path / "out")
        assert len([state for state in trained if state.parent.name == "canaries"]) == many


def test_two_audits_of_a_site_at_once_are_told_to_wait(file: Path, tmp_path: Path) -> None:
    with lock(load_settings(file, SiteSettings).state / "audit"):
        result = run(file, "--out", tmp_path / "out")
    assert result.exit_code == 14
    assert "Wait for the other audit of this site to end" in result.stderr
    assert "simulate" not in result.stderr


def test_its_files_are_for_the_owner_alone_wherever_they_are(file: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert run(file, "--shadows", 4, "--out", tmp_path / "out").exit_code == 0
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes == {"audit.json": 0o600, "audit.html": 0o600}


class Page(HTMLParser):
    """Text and attributes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words, self.tags, self.attributes = list[str](), set[str](), list[tuple[str, str | None]]()
        self.feed(text)
        self.text = " ".join(" ".join(self.words).replace("\u00a0", " ").split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def record(**changes: Any) -> Audit:
    """Return an audit of 2,000 others, whose attack finds some members for sure."""
    random = np.random.default_rng(0)
    others = random.normal(0, 1, 2000)
    strong = membership(np.concatenate([random.normal(0.2, 1, 2800), random.normal(6, 1, 200)]), others)
    fields: dict[str, Any] = {
        "site": "site-1",
        "made": "2024-05-01",
        "version": "0.1.0",
        "seed": 0,
        "teacher": "trained cnn3",
        "fingerprint": "a" * 64,
        "policy": "b" * 16,
        "mechanism": "",
        "encoding": "f32",
        "shadow_count": 8,
        "loss": membership(random.normal(0, 1, 3000), others),
        "shadows": strong,
        "shares": guess_shares(np.log(np.full((9, 2), 0.5)), ("<b>cat</b>", "dog"), np.array([0.9, 0.1])),
        "averaging": None,
        "left_out": {"averaging": "no <i>pool</i>"},
        "notes": ("a note",),
    }
    return Audit(**{**fields, **changes})


def test_the_page_stands_alone_and_escapes_what_it_is_given() -> None:
    page = Page(render_page(record()))
    assert not page.tags & {"script", "link", "img", "iframe", "b>", "i"}
    assert not any(name in ("src", "href", "srcset") for name, _ in page.attributes)
    assert "<b>cat</b>" in page.text
    assert "Not audited: Asking again. no <i>pool</i>" in page.text


def test_the_page_says_first_what_came_of_it_and_what_that_does_not_prove() -> None:
    found = record()
    page = Page(render_page(found))
    order = [found.verdict, "No formal guarantee", "What this does not prove", NO_PROOF, "Was this image learned from?"]
    places = [page.text.index(words) for words in order]
    assert places == sorted(places)
    share = found.shadows and found.shadows.found[0.001]
    assert share is not None
    assert 0.04 < share.share < 0.09
    assert f"{share.share * 100:.1f} %" in page.text
    assert "far surer than the average says" in page.text


def test_the_better_of_two_attacks_is_not_called_sure_where_one_would_be() -> None:
    random = np.random.default_rng(0)
    noise = random.normal(0, 1, 400)
    shifts = np.linspace(0, 0.5, 200)
    shifted = (membership(noise[:200] + x, noise[200:]) for x in shifts)
    near = next(found for found in shifted if found.low > 0.5 >= found.low_of_two)
    alone, both = record(loss=near, shadows=None, shadow_count=0), record(loss=near, shadows=near)
    assert alone.worst == near
    assert both.worst is None
    assert "did not tell" in both.verdict
    assert "better than chance<" not in render_page(both)
    assert "<small>better than chance</small>" in render_page(alone)


def test_the_figure_has_logarithmic_scales_with_a_decade_a_tick() -> None:
    page = render_page(record())
    labels = re.findall(r"<text[^>]*>([\d.]+)</text>", page)
    assert labels == ["0.01", "0.1", "1", "10", "100"] * 2
    places = [float(x) for x in re.findall(r'<text[^>]*x="([\d.]+)"[^>]*>[\d.]+</text>', page)[:5]]
    np.testing.assert_allclose(np.diff(places), np.diff(places)[0], rtol=0.01)


def test_a_false_rate_that_cannot_be_told_is_said_to_be_so() -> None:
    random = np.random.default_rng(0)
    few = membership(random.normal(1, 1, 400), random.normal(0, 1, 150))
    page = Page(render_page(record(loss=few, shadows=None, shadow_count=0)))
    assert "What is found at 0.1 % false alarms is not told: that takes 1,000 other images, and 150 were held out" in (
        page.text
    )
    assert "shadow teachers" not in page.text


def sung(**changes: Any) -> CanaryAudit:
    """Return what canaries may have shown."""
    fields: dict[str, Any] = {
        "mechanism": "pate",
        "canaries": 1200,
        "planted": 593,
        "encoding": "votes",
        "auc": 0.614,
        "low": 0.583,
        "high": 0.644,
        "guesses": 300,
        "correct": 187,
        "lower": 0.31,
        "confidence": 0.95,
        "delta": 1e-5,
        "upper": 2.987,
        "unit": "record",
        "why": "",
    }
    return CanaryAudit(**fields | changes)


def test_the_page_puts_what_canaries_show_beside_what_the_accountant_says() -> None:
    page = Page(render_page(record(canaries=sung())))
    assert (
        "Epsilon at least (canaries) Epsilon at most (accountant) Pairs told apart Right guesses "
        "0.31 95.0 % confidence 2.99 for a record 61.4 % 58.3 % to 64.4 % 187 of 300" in page.text
    )
    assert "61.4 % of pairs (95 % interval 58.3 % to 64.4 %)" in page.text
    assert "Both at delta 1e-05." in page.text
    assert "Report it" not in page.text
    assert "Report it" in Page(render_page(record(canaries=sung(lower=3.2)))).text
    bare = Page(render_page(record(canaries=sung(upper=None, unit=None, why="there is <no> mechanism")))).text
    assert "0.31 95.0 % confidence – 61.4 %" in bare
    assert "No upper bound: there is <no> mechanism." in bare
    assert "Epsilon at least" not in Page(render_page(record())).text


def test_canaries_that_were_not_planted_are_told_as_left_out(file: Path, tmp_path: Path) -> None:
    result = run(file, "--shadows", 4, "--out", tmp_path / "bare")
    assert "Not audited: Canaries." in " ".join(result.stdout.split())
    assert "--canaries N" in read_json(tmp_path / "bare" / "audit.json")["left_out"]["canaries"]
    assert "Not audited: Canaries." in Page((tmp_path / "bare" / "audit.html").read_text()).text
    assert run(file, "--shadows", 4, "--canaries", 10, "--out", tmp_path / "asked").exit_code == 0
    assert "canaries" not in read_json(tmp_path / "asked" / "audit.json")["left_out"]


def test_the_page_tells_what_is_pooled_over_shadows_beside_the_teacher_s_own() -> None:
    found = {0.001: Found(share=0.051, low=0.02, high=0.093), 0.01: None}
    pooled = Pooled(targets=8, images=1050, auc=0.562, found=found)
    page = Page(render_page(record(pooled=pooled)))
    assert "Found, pooled over shadows 0.1 % 5.1 % 2.0 % to 9.3 % 1.0 % –" in page.text
    assert "Pooled over 8 shadows, which are attacked in turn, the likelihood ratio finds 5.1 %" in page.text
    assert "ooled" not in Page(render_page(record())).text


def test_a_page_without_any_attack_says_why() -> None:
    why = {"loss": "not known", "shadows": "not known", "shares": "no data", "averaging": "no pool"}
    page = Page(render_page(record(loss=None, shadows=None, shares=None, left_out=why)))
    assert "was not audited" in page.text
    assert page.text.count("Not audited:") == 4
    assert "svg" not in page.tags
