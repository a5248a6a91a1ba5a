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
from consilience.client.audit.membership import membership
from consilience.client.audit.page import render_page
from consilience.client.audit.record import NO_PROOF, Audit
from consilience.client.audit.shares import guess_shares
from consilience.client.site import Site
from consilience.common.files import read_json
from consilience.common.settings_file import dump_settings


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


def test_a_page_without_any_attack_says_why() -> None:
    why = {"loss": "not known", "shadows": "not known", "shares": "no data", "averaging": "no pool"}
    page = Page(render_page(record(loss=None, shadows=None, shares=None, left_out=why)))
    assert "was not audited" in page.text
    assert page.text.count("Not audited:") == 4
    assert "svg" not in page.tags
