from __future__ import annotations

import numpy as np
import pytest
from scipy.special import log_softmax, logsumexp

from consilience.client.teacher.protocol import SMALLEST_LOG_PROB, ScoringTeacher, checked
from consilience.common.errors import TeacherError

IMAGES = np.zeros((4, 2, 2, 1), np.uint8)


def check(scores: object, outputs: str = "logits", rows: int = 2) -> np.ndarray:
    return checked(scores, rows=rows, classes=("a", "b"), outputs=outputs, where="model.x")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_logits_become_log_probabilities(dtype: type) -> None:
    logits: np.ndarray = np.array([[3.0, -1.0], [700.0, 710.0]], dtype)
    out = check(logits)
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, log_softmax(logits.astype(np.float64), axis=1), rtol=1e-6)
    np.testing.assert_allclose(logsumexp(out.astype(np.float64), axis=1), 0, atol=1e-6)


def test_logits_further_apart_than_float32_reaches_stay_finite() -> None:
    assert np.isfinite(check(np.array([[1e300, -1e300], [0.0, 0.0]]))).all()


def test_a_probability_of_zero_becomes_the_smallest_normal() -> None:
    out = check(np.array([[1.0, 0.0], [0.25, 0.75]]), "probabilities")
    assert out[0, 1] == np.float32(SMALLEST_LOG_PROB) == np.log(np.finfo(np.float32).tiny)
    assert out[0, 0] == 0
    np.testing.assert_allclose(np.exp(out[1]), [0.25, 0.75], rtol=1e-6)


def test_probabilities_within_the_tolerance_are_normalised() -> None:
    out = check(np.array([[0.5, 0.5005], [0.5, 0.5]]), "probabilities")
    np.testing.assert_allclose(logsumexp(out.astype(np.float64), axis=1), 0, atol=1e-6)
    with pytest.raises(TeacherError, match=r"model\.x: probabilities in row 0 of the batch sum to 1\.002"):
        check(np.array([[0.5, 0.502], [0.5, 0.5]]), "probabilities")


@pytest.mark.parametrize(
    ("scores", "outputs", "message"),
    [
        (np.zeros((2, 3)), "logits", r"shape \(2, 3\) for 2 images; expected \(2, 2\).*: a, b"),
        (np.zeros((1, 2)), "logits", r"shape \(1, 2\) for 2 images"),
        (np.zeros(2), "logits", r"shape \(2,\)"),
        (np.zeros((2, 2), np.int64), "logits", "type int64; expected floating"),
        (np.zeros((2, 2), complex), "logits", "type complex128"),
        ([["a", "b"], ["c", "d"]], "logits", "type <U1"),
        (None, "logits", r"shape \(\)"),
        (np.array([[0, 0], [0, np.nan]]), "logits", "score nan in row 1 of the batch, column 1; expected finite"),
        (np.array([[0, -np.inf], [0, 0]]), "logits", "score -inf in row 0"),
        (np.array([[0.5, 0.5], [np.inf, 0]]), "probabilities", "score inf in row 1"),
        (np.array([[1.5, -0.5], [1, 0]]), "probabilities", r"score -0\.5 in row 0 of the batch, column 1; .* least 0"),
        (np.array([[1.0, 0], [2, 1]]), "probabilities", "in row 1 of the batch sum to 3; expected 1 within 0.001"),
    ],
)
def test_other_scores_are_refused(scores: object, outputs: str, message: str) -> None:
    with pytest.raises(TeacherError, match=message) as caught:
        check(scores, outputs)
    assert caught.value.message.startswith("model.x: ")
    assert not caught.value.message.endswith(".")
    assert "\n" not in str(caught.value)


def teacher(scores: object) -> ScoringTeacher:
    return ScoringTeacher(("a", "b"), "f" * 64, "logits", "model.x", scores)  # type: ignore[arg-type]


def test_no_images_give_no_rows_and_do_not_reach_the_model() -> None:
    def fail(images: object) -> None:
        raise AssertionError

    out = teacher(fail).log_probs(IMAGES[:0])
    assert out.shape == (0, 2)
    assert out.dtype == np.float32


def test_images_of_another_kind_are_refused() -> None:
    silent = teacher(lambda images: np.zeros((len(images), 2)))
    assert silent.log_probs(IMAGES).shape == (4, 2)
    for images in (IMAGES[0], IMAGES.astype(np.float32)):
        with pytest.raises(TeacherError, match=r"expected \(n, H, W, C\) uint8"):
            silent.log_probs(images)  # type: ignore[arg-type]


def test_what_a_model_raises_becomes_one_line() -> None:
    def fail(images: object) -> None:
        raise ZeroDivisionError("first line.\nsecond line")

    with pytest.raises(TeacherError) as caught:
        teacher(fail).log_probs(IMAGES)
    assert caught.value.message == ("model.x: failed on 4 images of shape (2, 2, 1): ZeroDivisionError: first line")
    assert "preprocessing.size" in caught.value.hint
