"""`consilience student`: what one does with a finished student."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer
from rich.table import Table

from consilience.common.cli import AsJson, Result, emit, emit_checked
from consilience.common.data import ImageData, load_image, open_data
from consilience.common.errors import ConsilienceError, DataError, StudentError
from consilience.common.identity import words
from consilience.common.label_scores import average_precision, mean_ap
from consilience.common.settings import DataSource, FolderData, NpzData

if TYPE_CHECKING:
    from consilience.server.learning import StudentModel

app = typer.Typer(help="The trained student.", no_args_is_help=True, add_completion=False)

StudentFolder = Annotated[
    Path | None, typer.Option("--student", help="A run's student folder; by default the newest below runs/.")
]


def newest_student() -> Path:
    """Return the student folder below ./runs that was written last. Raises `StudentError` when there is none."""
    found = sorted(Path("runs").glob("*/student/labels.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise StudentError("There is no student below ./runs", hint="Name its folder with --student")
    return found[-1].parent


@app.command()
def predict(
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    student: StudentFolder = None,
    top: Annotated[int, typer.Option(min=1, help="Classes shown an image.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Classify image files; each is brought to the size the student was trained on.

    A multi-label student gives each label's own probability.
    """

    def action() -> Result:
        model = _model(student)
        pixels = np.stack([load_image(path, model.shape) for path in images])
        probs = np.exp(model.log_probs(pixels))
        table = Table("image", *(f"{rank + 1}." for rank in range(min(top, len(model.labels)))))
        rows = []
        for path, row in zip(images, probs, strict=True):
            best = np.argsort(-row, kind="stable")[:top]
            table.add_row(str(path), *(f"{model.labels[i]} {row[i]:.1%}" for i in best))
            rows.append({"image": str(path), "top": [{"class": model.labels[i], "prob": float(row[i])} for i in best]})
        return {"student": str(model.folder), "predictions": rows}, table

    emit(as_json, action)


@app.command()
def evaluate(
    data: Annotated[Path, typer.Argument(help="Labelled images: an .npz file, or a folder with one folder a class.")],
    student: StudentFolder = None,
    as_json: AsJson = False,
) -> None:
    """Measure the student's accuracy on labelled images, or, of a multi-label student, its average precision."""

    def action() -> Result:
        model = _model(student)
        source: DataSource
        if data.suffix == ".npz":
            source = NpzData(kind="npz", path=data)
        else:
            source = FolderData(
                kind="folder", path=data, size=model.shape[:2], channels=3 if model.shape[2] == 3 else 1
            )
        held = open_data(source)
        if not len(held):
            raise DataError(f"{data} holds no images", hint="Name labelled images")
        if model.multi:
            return _evaluate_labels(held, model)
        truth = _truth(held, model)
        # A student of chosen classes is judged by those: by what it was not to learn it cannot be right or wrong.
        judged = np.arange(len(held)) if model.other is None else np.flatnonzero(truth >= 0)
        if not len(judged):
            raise DataError(f"{data} holds no images of the student's classes", hint="Name images of these")
        hits = np.zeros(len(held), bool)
        for start in range(0, len(judged), 512):
            ids = judged[start : start + 512]
            hits[ids] = model.log_probs(held.read(ids)).argmax(axis=1) == truth[ids]
        per_class = {name: float(hits[truth == i].mean()) for i, name in enumerate(model.labels) if np.any(truth == i)}
        accuracy = float(hits[judged].mean())
        table = Table("class", "images", "accuracy")
        for name, value in per_class.items():
            table.add_row(name, f"{int(np.sum(truth == model.labels.index(name))):,}", f"{value:.1%}")
        table.add_row("all", f"{len(judged):,}", f"{accuracy:.1%}", style="bold")
        unwanted = len(held) - len(judged)
        if unwanted:
            table.add_row("of no wanted class: left out", f"{unwanted:,}", "")
        return {"accuracy": accuracy, "images": len(judged), "unwanted": unwanted, "per_class": per_class}, table

    emit(as_json, action)


@app.command()
def export(
    file: Annotated[Path, typer.Argument(help="The .pt2 file to write.")],
    student: StudentFolder = None,
    as_json: AsJson = False,
) -> None:
    """Write the student as a torch.export program: uint8 images (n, H, W, C) in, log-probabilities (n, classes) out.

    Those of a multi-label student are of each label by itself.
    """

    def action() -> Result:
        from consilience.server.export import export_student  # late, as in _model

        model = _model(student)
        export_student(model, file)
        return {"file": str(file), "labels": list(model.labels)}, f"Wrote {file}"

    emit(as_json, action)


@app.command()
def verify(student: StudentFolder = None, as_json: AsJson = False) -> None:
    """Check which site vouched for what: every signature over the answers that the student learnt from.

    Where the run's answers lie beside the student, also that they are those that were signed, and no others.
    """

    def check() -> tuple[Result, ConsilienceError | None]:
        from consilience.server.signatures import Signatures, check_signatures, complaint

        folder = student or newest_student()
        answers = folder.parent / "answers"
        verdicts = check_signatures(Signatures.read(folder), answers if answers.exists() else None)
        table = Table("site", "words of its key", "vouched for", "compared", "unsigned", "wrong")
        for found in verdicts:
            who = "-" if found.key is None else words(found.key)
            numbers = (found.vouched, found.compared, found.unsigned, len(found.problems))
            table.add_row(found.site, who, *(f"{number:,}" for number in numbers))
        sites = [{**vars(found), "damage": found.damage and found.damage.message} for found in verdicts]
        data = {"student": str(folder), "sites": sites}
        return (data, table), complaint(verdicts)

    emit_checked(as_json, check)


def _model(student: Path | None) -> StudentModel:
    """Return the student of a folder, by default the newest. Raises `StudentError`."""
    from consilience.server.learning import StudentModel  # torch, which commands that do not predict do without

    return StudentModel(student or newest_student())


def _evaluate_labels(data: ImageData, model: StudentModel) -> Result:
    """Return the average precision of a multi-label student, label by label and on average. Raises `DataError`."""
    many = data.need_many("The data")
    columns = [k for k, name in enumerate(data.class_names) if name in model.labels]
    if not columns:
        raise _no_common_name(data, model)
    ids = np.arange(len(data))
    scores = np.concatenate([model.log_probs(data.read(ids[at : at + 512])) for at in range(0, len(data), 512)])
    found = {
        name: average_precision(many[:, k], scores[:, model.labels.index(name)])
        for k, name in ((k, data.class_names[k]) for k in columns)
    }
    table = Table("label", "images", "average precision")
    for name, value in found.items():
        images = int(np.sum(many[:, data.class_names.index(name)] > 0))
        table.add_row(name, f"{images:,}", "-" if value is None else f"{value:.3f}")
    mean = mean_ap(list(found.values()))
    table.add_row("mean", f"{len(data):,}", "-" if mean is None else f"{mean:.3f}", style="bold")
    return {"mean_ap": mean, "images": len(data), "per_label": found}, table


def _no_common_name(data: ImageData, model: StudentModel) -> DataError:
    return DataError(
        f"None of the data's classes ({', '.join(data.class_names[:5])}) is one of the student's "
        f"({', '.join(model.labels[:5])})",
        hint="Name the classes alike",
    )


def _truth(data: ImageData, model: StudentModel) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Return labels numbered by the student's classes. Raises `DataError`.

    A class that it does not know is its `other`, where it has such an output, else -1.
    """
    labels = data.need_labels("The data")
    index = [model.labels.index(name) if name in model.labels else -1 for name in data.class_names]
    if max(index, default=-1) < 0:
        raise _no_common_name(data, model)
    place = np.asarray(index, np.int64)
    if model.other:
        place[place < 0] = len(model.labels) - 1
    return place[labels]
