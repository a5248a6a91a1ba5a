"""The site's private classifier: what it is, how it is loaded, how it is trained and calibrated.

Lives here: the choice of the module that knows the kind. A kind's module is imported when it is wanted, since each
brings a library of its own, as does training (trained, multi_trained), which is not exported here.
"""

from __future__ import annotations

from consilience.client.teacher.calibrated import CalibratedTeacher, CalibrationRecord, behind_map, fit
from consilience.client.teacher.kept_training import TrainedTeacher, trained_record
from consilience.client.teacher.multi import MultiTeacher, ScoringMultiTeacher
from consilience.client.teacher.multi_calibrated import (
    CalibratedMulti,
    MultiCalibrationRecord,
    behind_temperatures,
    fit_temperatures,
)
from consilience.client.teacher.protocol import (
    Outputs,
    Scores,
    Scoring,
    ScoringTeacher,
    Teacher,
    fingerprint_of,
    read_model,
)
from consilience.common.errors import TeacherError
from consilience.common.files import sha256
from consilience.common.settings import (
    CallableTeacher,
    ExportTeacher,
    OnnxTeacher,
    SiteSettings,
    SklearnTeacher,
    StateDictTeacher,
    TorchScriptTeacher,
)

__all__ = [
    "AnyTeacher",
    "CalibratedMulti",
    "CalibratedTeacher",
    "CalibrationRecord",
    "MultiTeacher",
    "Teacher",
    "TrainedTeacher",
    "calibrate_any",
    "calibrate_teacher",
    "describe_teacher",
    "holdout_ap",
    "is_multi",
    "load_any",
    "load_teacher",
]


HostedTeacher = StateDictTeacher | TorchScriptTeacher | ExportTeacher | SklearnTeacher | OnnxTeacher | CallableTeacher
AnyTeacher = CalibratedTeacher | CalibratedMulti
"""A site's teacher behind its calibration: of one label an image, or of any number."""


def load_any(settings: SiteSettings) -> AnyTeacher:
    """Load the teacher that `settings.teacher` describes, behind its calibration and the mechanism of its privacy.

    The calibration is applied if one was fitted for the teacher. Nothing that a model file brings is executed by
    loading it. Raises `TeacherError` when a file is missing, damaged, refused, or does not fit the settings, or when
    the teacher is to be trained and is not; `MissingExtraError` when the kind needs a library that is not installed;
    `SettingsError` for an unknown architecture; `IdentityError` when others on the machine may read the secret that
    noise is drawn from.
    """
    return behind_temperatures(settings, _load_multi(settings)) if is_multi(settings) else load_teacher(settings)


def is_multi(settings: SiteSettings) -> bool:
    """Whether the site's teacher says of labels, each by itself, how likely they apply."""
    return settings.teacher.labels == "multi"


def load_teacher(settings: SiteSettings) -> CalibratedTeacher:
    """Load a single-label teacher. Raises what `load_any` raises, and `TeacherError` for a multi-label one."""
    if is_multi(settings):
        raise TeacherError(
            f"{settings.name}: field 'teacher.labels' is 'multi', and what was asked for takes one label an image",
            hint="Do it at a site with a single-label teacher",
        )
    from consilience.client.privacy import behind_noise  # which imports this package

    calibrated = behind_map(settings, _load(settings))
    noisy = behind_noise(settings, calibrated)
    return calibrated if noisy is calibrated else CalibratedTeacher(noisy, None, f"{calibrated.told}, before noise")


def calibrate_any(settings: SiteSettings) -> CalibrationRecord | MultiCalibrationRecord:
    """Fit the calibration of the site's teacher on private data that it was not trained on, and keep it.

    Returns at once when that was done for this teacher, these data and this method. Raises what `load_any` raises,
    `SettingsError` when calibration is off or the settings name no data, `DataError`, `StorageError`, and `RunError`
    when another process is at it.
    """
    return fit_temperatures(settings, _load_multi(settings)) if is_multi(settings) else calibrate_teacher(settings)


def calibrate_teacher(settings: SiteSettings) -> CalibrationRecord:
    """Do as `calibrate_any` for a single-label teacher."""
    return fit(settings, _load(settings))


def _load(settings: SiteSettings) -> Teacher:
    """Load the teacher as it is, without a map."""
    if settings.teacher.kind == "train":
        from consilience.client.privacy import load_private

        return load_private(settings)
    return ScoringTeacher(**vars(_hosted(settings.teacher)))


def _load_multi(settings: SiteSettings) -> MultiTeacher:
    """Load the multi-label teacher as it is, without temperatures."""
    if settings.teacher.kind == "train":
        from consilience.client.teacher.multi_trained import load_multi

        return load_multi(settings)
    return ScoringMultiTeacher(**vars(_hosted(settings.teacher)))


def _hosted(teacher: HostedTeacher) -> Scoring:
    """Load what a hosted teacher scores with."""
    scores: Scores
    if teacher.kind == "callable":
        from consilience.client.teacher import python_callable

        scores, model = python_callable.scores_of(teacher)
        where = teacher.callable
    elif teacher.kind == "onnx":
        from consilience.client.teacher import onnx_file

        scores, model = onnx_file.scores_of(teacher)
        where = str(teacher.path)
    else:
        data = read_model(teacher.path)
        model, where = sha256(data), str(teacher.path)
        if teacher.kind == "state_dict":
            from consilience.client.teacher import state_dict
            from consilience.common.nets.own_networks import code_of

            scores = state_dict.scores_of(teacher, data)
            model = "".join([model, *code_of(teacher.architecture).values()])
        elif teacher.kind == "torchscript":
            from consilience.client.teacher import torchscript

            scores = torchscript.scores_of(teacher, data)
        elif teacher.kind == "export":
            from consilience.client.teacher import exported

            scores = exported.scores_of(teacher, data)
        else:
            from consilience.client.teacher import skops_file

            scores = skops_file.scores_of(teacher, data)
    return Scoring(
        classes=teacher.classes,
        # Without the path: a file that is moved is the same teacher.
        fingerprint=fingerprint_of(teacher.identity(), model),
        outputs=_outputs(teacher),
        where=where,
        scores=scores,
    )


def describe_teacher(settings: SiteSettings) -> tuple[str, float | None]:
    """Return what a stranger may read of the teacher: its kind, architecture and mechanism, and its accuracy if known.

    Raises `TeacherError` when it is to be trained and is not.
    """
    from consilience.client.privacy import describe_privacy

    kind, accuracy = _describe(settings)
    return "; ".join(part for part in (kind, describe_privacy(settings)) if part)[:500], accuracy


def holdout_ap(settings: SiteSettings) -> float | None:
    """Return the mean average precision on held-out images of a trained multi-label teacher; None for any other."""
    return trained_record(settings).holdout_ap if is_multi(settings) and settings.teacher.kind == "train" else None


def _describe(settings: SiteSettings) -> tuple[str, float | None]:
    teacher = settings.teacher
    if teacher.kind == "train":
        if settings.privacy.mechanism in ("pate", "dp-sgd"):
            return f"trained {teacher.architecture}", None
        record = trained_record(settings)
        return f"trained {record.architecture}", record.holdout_accuracy
    if teacher.kind == "state_dict":
        return f"state_dict of {teacher.architecture}", None
    return teacher.kind, None


def _outputs(teacher: HostedTeacher) -> Outputs:
    """What a kind of teacher gives: some say so in their settings, others always give the same."""
    if teacher.kind in ("sklearn", "callable"):
        return "probabilities"
    return getattr(teacher, "outputs", "logits")
