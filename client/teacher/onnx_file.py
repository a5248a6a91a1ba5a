"""A teacher from an ONNX file, run by onnxruntime.

Lives here: loading and running. Does not live here: finding the files an ONNX file refers to (onnx_format). No library
of custom operators is ever registered, so a file that needs one does not load.
"""

from __future__ import annotations

from typing import Any

from consilience.client.teacher.onnx_format import external_files
from consilience.client.teacher.protocol import Scores, brief, read_model, refuse
from consilience.common.errors import MissingExtraError, TeacherError
from consilience.common.files import sha256, sha256_file
from consilience.common.preprocessing import Images, preprocess
from consilience.common.settings import OnnxTeacher


def scores_of(settings: OnnxTeacher) -> tuple[Scores, str]:
    """Return the scoring function and the digest of the file and of the weight files it refers to.

    Raises `MissingExtraError` without onnxruntime, `TeacherError` for anything that is not one model with one float32
    input and one output, or that refers to files outside its own folder.
    """
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"{settings.path} is an ONNX file, which needs onnxruntime", hint="pip install 'consilience[onnx]'"
        ) from error
    digest = _digest(settings)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what fails is raised as well; stderr belongs to our own progress
    known = onnxruntime.get_available_providers()
    providers = [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in known]
    try:
        session = onnxruntime.InferenceSession(str(settings.path), options, providers=providers)
    except Exception as error:  # onnxruntime has its own kinds of exception, without a common one
        raise TeacherError(
            f"{settings.path}: onnxruntime cannot load it: {brief(error)}",
            hint="Export the model again, with standard operators only",
        ) from error
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1 or len(outputs) != 1 or inputs[0].type != "tensor(float)":
        raise TeacherError(
            f"{settings.path}: has inputs {[(i.name, i.type) for i in inputs]} and outputs "
            f"{[o.name for o in outputs]}; expected one input of tensor(float) and one output",
            hint="Export the model with one float32 input and its scores as the only output",
        )
    name = inputs[0].name

    def scores(images: Images) -> Any:
        return session.run(None, {name: preprocess(images, settings.preprocessing)})[0]

    return scores, digest


def _digest(settings: OnnxTeacher) -> str:
    """Return one digest over the file and all it refers to; refuse what lies outside the file's folder."""
    data = read_model(settings.path)
    try:
        names = external_files(data)
    except ValueError as error:
        raise TeacherError(
            f"{settings.path}: not an ONNX file: {error}", hint="Save it with onnx.save or torch.onnx.export"
        ) from error
    digests = [sha256(data)]
    folder = settings.path.parent.resolve()
    for name in names:
        # resolve() follows links: what counts is where the bytes lie.
        file = (folder / name).resolve()
        if not file.is_relative_to(folder):
            refuse(
                settings.path,
                f"a reference to {name!r}, outside its folder",
                "Put weight files beside the model, or save the model as one file",
            )
        if not file.is_file():
            raise TeacherError(
                f"{settings.path}: refers to weight file {name!r}, which is not there",
                hint="Copy the model's weight files to the same folder",
            )
        digests.append(sha256_file(file))
    return " ".join(digests)
