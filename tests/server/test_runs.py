"""The server's list of runs: what is the same run, what goes on, what stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from consilience.common.errors import RunError
from consilience.common.settings import Ask, JobSettings
from consilience.common.settings_file import load_settings
from consilience.server.runs import Failure, find, runs, submit

JOB = JobSettings(name="leaves", pool=Path("/pool"))
FAILURE = Failure(code=9, name="asking", message="Too few", hint="Wait")


def test_the_same_job_is_the_same_run(tmp_path: Path) -> None:
    first, fresh = submit(tmp_path, JOB)
    again, fresh_again = submit(tmp_path, JOB)
    other, fresh_other = submit(tmp_path, JOB.model_copy(update={"seed": 1}))
    assert (fresh, fresh_again, fresh_other) == (True, False, True)
    assert first.folder == again.folder != other.folder
    assert first.name.startswith("leaves-")
    assert [run.name for run in runs(tmp_path)] == [first.name, other.name]


def test_a_token_makes_a_retry_the_same_run_and_no_other_job_may_use_it(tmp_path: Path) -> None:
    first, _ = submit(tmp_path, JOB, token="tuesday")
    again, fresh = submit(tmp_path, JOB, token="tuesday")
    assert (again.name, fresh) == ("leaves-tuesday", False)
    assert submit(tmp_path, JOB)[0].name != first.name
    with pytest.raises(RunError, match="tuesday belongs to a run of another job"):
        submit(tmp_path, JOB.model_copy(update={"seed": 1}), token="tuesday")


@pytest.mark.parametrize("token", [None, "tuesday"])
def test_how_long_to_wait_for_how_many_is_no_part_of_what_a_job_is(tmp_path: Path, token: str | None) -> None:
    run, _ = submit(tmp_path, JOB, token=token)
    run.set("failed", FAILURE)
    patient = {
        "wait_for": 3,
        "wait": 5.0,
        "deadline": 60.0,
        "min_sites": 2,
        "retries": 0,
        "in_flight": 1,
        "question_size": 7,
    }
    lower = JOB.model_copy(update={"ask": Ask(**patient)})
    again, fresh = submit(tmp_path, lower, token=token)
    assert (again.name, fresh, again.state.state) == (run.name, False, "queued")
    assert load_settings(run.folder / "job.yaml", JobSettings) == lower
    other = JOB.model_copy(update={"ask": Ask(encoding="f32")})
    if token is None:
        assert submit(tmp_path, other)[0].name != run.name
    else:
        with pytest.raises(RunError, match="tuesday belongs to a run of another job"):
            submit(tmp_path, other, token=token)


@pytest.mark.parametrize("token", ["", "..", "a/b", "A", "x" * 64])
def test_a_token_is_no_path(tmp_path: Path, token: str) -> None:
    with pytest.raises(RunError, match="token"):
        submit(tmp_path, JOB, token=token)
    assert not list(tmp_path.iterdir())


def test_submitting_again_goes_on_with_what_failed_or_was_stopped_and_leaves_the_rest(tmp_path: Path) -> None:
    run, _ = submit(tmp_path, JOB)
    assert run.state.state == "queued"
    run.set("running")
    submit(tmp_path, JOB)
    assert run.state.state == "running"
    run.set("failed", FAILURE)
    assert run.state.failure == FAILURE
    submit(tmp_path, JOB)
    assert run.state.state == "queued"
    assert run.state.failure is None
    run.set("stopped")
    submit(tmp_path, JOB)
    assert run.state.state == "queued"
    run.set("done")
    submit(tmp_path, JOB)
    assert run.state.state == "done"
    submit(tmp_path, JOB, fold_in=True)
    assert (run.state.state, run.submitted.fold_in) == ("queued", True)


def test_a_run_at_work_is_folded_in_after_its_end(tmp_path: Path) -> None:
    run, _ = submit(tmp_path, JOB)
    began_with = run.submitted
    run.set("running", about=began_with)
    submit(tmp_path, JOB, fold_in=True)
    assert run.state.state == "running"
    asked = run.submitted
    submit(tmp_path, JOB)
    assert run.submitted == asked, "submitting it plainly changes nothing"
    run.set("done", about=began_with)
    assert (run.state.state, run.submitted.fold_in) == ("queued", True)
    run.set("done", about=asked)
    assert run.state.state == "done"


@pytest.mark.parametrize("name", ["submitted.json", "state.json", "stop.json"])
@pytest.mark.parametrize("damage", ["{", "[]", '{"time": "soon"}'])
def test_a_damaged_run_is_left_out_with_a_warning_and_the_others_stay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: str
) -> None:
    good, _ = submit(tmp_path, JOB, token="good")
    bad, _ = submit(tmp_path, JOB, token="bad")
    (bad.folder / name).write_text(damage)
    for _ in range(2):
        assert [run.name for run in runs(tmp_path)] == [good.name]
    (warning,) = caplog.messages
    assert str(bad.folder / name) in warning
    assert find(tmp_path, None).name == good.name


def test_a_stop_counts_until_the_next_submission(tmp_path: Path) -> None:
    run, _ = submit(tmp_path, JOB)
    assert not run.stop_wanted
    run.stop()
    assert run.stop_wanted
    run.set("stopped")
    submit(tmp_path, JOB)
    assert not run.stop_wanted


def test_runs_are_found_by_the_beginning_of_their_name(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run yet"):
        find(tmp_path, None)
    one, _ = submit(tmp_path, JOB, token="one")
    two, _ = submit(tmp_path, JOB, token="two")
    assert find(tmp_path, None).name == two.name
    assert find(tmp_path, "leaves-o").name == one.name
    assert find(tmp_path, "leaves-one").name == one.name
    with pytest.raises(RunError, match="fits several runs"):
        find(tmp_path, "leaves")
    with pytest.raises(RunError, match=r"'trees' is no run .*known: leaves-one, leaves-two"):
        find(tmp_path, "trees")
