from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from scipy.special import log_softmax, softmax

from consilience.client.teacher import load_teacher
from consilience.client.teacher.onnx_format import external_files
from consilience.common.errors import MissingExtraError, TeacherError
from consilience.common.preprocessing import preprocess
from consilience.common.settings import Preprocessing, SiteSettings

Site = Callable[..., SiteSettings]
Blobs = tuple[np.ndarray, np.ndarray]
WEIGHT = np.random.default_rng(3).normal(0, 0.1, (3, 256)).astype(np.float32)
BIAS = np.array([0.5, -1, 0], np.float32)
PREPROCESSING = {"channels": 1, "mean": (0.2,), "std": (0.4,)}


def external(tensor: TensorProto, location: str) -> TensorProto:
    """Let a tensor's bytes lie in another file."""
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(WEIGHT.nbytes))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    return tensor


def linear(path: Path, *, location: str = "", outputs: tuple[str, ...] = ("y",), softmaxed: bool = False) -> None:
    """Flatten, Gemm and perhaps Softmax: (n, 1, 16, 16) to (n, 3)."""
    weight = numpy_helper.from_array(WEIGHT, "w")
    nodes = [
        helper.make_node("Flatten", ["x"], ["rows"]),
        helper.make_node("Gemm", ["rows", "w", "b"], ["z"], transB=1),
        helper.make_node("Softmax" if softmaxed else "Identity", ["z"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1, 16, 16])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3]) for name in outputs],
        [external(weight, location) if location else weight, numpy_helper.from_array(BIAS, "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    path.write_bytes(model.SerializeToString())


def logits(images: np.ndarray, **preprocessing: Any) -> np.ndarray:
    rows = preprocess(images, Preprocessing.model_validate(preprocessing)).reshape(len(images), -1)
    return np.asarray(rows @ WEIGHT.T + BIAS)


def load(site: Site, name: str = "m.onnx", **teacher: Any) -> Any:
    return load_teacher(site(kind="onnx", path=name, **({"preprocessing": PREPROCESSING} | teacher)))


def test_a_linear_model_answers_like_its_formula(site: Site, blobs: Blobs, tmp_path: Path) -> None:
    linear(tmp_path / "m.onnx")
    expected = log_softmax(logits(blobs[0], **PREPROCESSING), axis=1)
    np.testing.assert_allclose(load(site).log_probs(blobs[0]), expected, atol=1e-4)
    np.testing.assert_allclose(load(site).log_probs(blobs[0][3:4]), expected[3:4], atol=1e-4)


def test_outputs_may_be_probabilities(site: Site, blobs: Blobs, tmp_path: Path) -> None:
    linear(tmp_path / "m.onnx", softmaxed=True)
    expected = log_softmax(logits(blobs[0], **PREPROCESSING), axis=1)
    np.testing.assert_allclose(load(site, outputs="probabilities").log_probs(blobs[0]), expected, atol=1e-4)
    # Read as logits, probabilities would be softened: the setting matters.
    soft = log_softmax(softmax(logits(blobs[0], **PREPROCESSING), axis=1), axis=1)
    np.testing.assert_allclose(load(site).log_probs(blobs[0]), soft, atol=1e-4)


def test_weights_may_lie_beside_the_model_and_count_in_the_fingerprint(
    site: Site, blobs: Blobs, tmp_path: Path
) -> None:
    linear(tmp_path / "m.onnx", location="w.bin")
    (tmp_path / "w.bin").write_bytes(WEIGHT.tobytes())
    teacher = load(site)
    expected = log_softmax(logits(blobs[0], **PREPROCESSING), axis=1)
    np.testing.assert_allclose(teacher.log_probs(blobs[0]), expected, atol=1e-4)
    assert load(site).fingerprint == teacher.fingerprint
    (tmp_path / "w.bin").write_bytes((WEIGHT + 1).tobytes())
    assert load(site).fingerprint != teacher.fingerprint
    (tmp_path / "w.bin").unlink()
    with pytest.raises(TeacherError, match=r"m\.onnx: refers to weight file 'w\.bin', which is not there"):
        load(site)


@pytest.mark.parametrize("location", ["../outside.bin", "{absolute}", "link.bin", "sub/../../outside.bin"])
def test_weights_outside_the_models_folder_are_refused(location: str, site: Site, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "outside.bin").write_bytes(WEIGHT.tobytes())
    (folder / "link.bin").symlink_to(tmp_path / "outside.bin")
    linear(folder / "m.onnx", location=location.format(absolute=tmp_path / "outside.bin"))
    with pytest.raises(TeacherError, match=r"m\.onnx: refused, because it holds a reference to .*, outside its folder"):
        load(site, "model/m.onnx")


def nested() -> onnx.ModelProto:
    """A model with an external tensor in every place the format has for one."""

    def tensor(name: str) -> TensorProto:
        return external(numpy_helper.from_array(WEIGHT, name), name)

    def graph(name: str, *nodes: onnx.NodeProto) -> onnx.GraphProto:
        made = helper.make_graph(list(nodes), "g", [], [], [tensor(f"{name}-initializer")])
        sparse = made.sparse_initializer.add()
        sparse.values.CopyFrom(tensor(f"{name}-values"))
        sparse.indices.CopyFrom(tensor(f"{name}-indices"))
        return made

    inner = graph("branch", helper.make_node("Constant", [], ["k"], value=tensor("constant")))
    listed = helper.make_node("Many", [], [])
    listed.attribute.add(name="t", type=onnx.AttributeProto.TENSORS).tensors.append(tensor("listed"))
    listed.attribute.add(name="g", type=onnx.AttributeProto.GRAPHS).graphs.append(graph("list"))
    function = helper.make_function(
        "d", "f", [], [], [helper.make_node("Constant", [], ["v"], value=tensor("body"))], []
    )
    model = helper.make_model(graph("main", helper.make_node("If", ["c"], ["o"], then_branch=inner), listed))
    model.functions.append(function)
    model.training_info.add().algorithm.CopyFrom(graph("training"))
    return model


def test_external_tensors_are_found_wherever_they_stand() -> None:
    places = {f"{g}-{t}" for g in ("main", "branch", "list", "training") for t in ("initializer", "values", "indices")}
    assert set(external_files(nested().SerializeToString())) == places | {"constant", "listed", "body"}


def test_damaged_bytes_never_crash_the_reader() -> None:
    data = nested().SerializeToString()
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        bad = bytearray(data[: random.integers(1, len(data))])
        bad[random.integers(len(bad))] ^= int(random.integers(1, 256))
        try:
            external_files(bytes(bad))
        except ValueError:
            refused += 1
    assert refused > 100


def field(tag: int, content: bytes) -> bytes:
    """A length-delimited field in protocol buffers' own form."""
    length, coded = len(content), bytes([tag << 3 | 2])
    while length > 0x7F:
        coded += bytes([length & 0x7F | 0x80])
        length >>= 7
    return coded + bytes([length]) + content


def test_deep_nesting_is_refused() -> None:
    def graphs(depth: int) -> bytes:
        data = b""
        for _ in range(depth):  # a graph in an attribute of a node of a graph
            data = field(1, field(5, field(6, data)))
        return field(7, data)

    assert external_files(graphs(20)) == []
    with pytest.raises(ValueError, match="too deep"):
        external_files(graphs(200))


@pytest.mark.parametrize("content", [b"no model at all", b"\x00" * 50, b"\x08\x09", b""])
def test_other_files_are_refused(content: bytes, site: Site, tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"m\.onnx: no such file"):
        load(site)
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(TeacherError, match=r"m\.onnx: (not an ONNX file|onnxruntime cannot load it)"):
        load(site)


def test_two_outputs_are_refused(site: Site, tmp_path: Path) -> None:
    linear(tmp_path / "m.onnx", outputs=("y", "z"))
    with pytest.raises(TeacherError, match=r"and outputs \['y', 'z'\]; expected one input of tensor\(float\) and one"):
        load(site)


def test_another_width_is_refused(site: Site, blobs: Blobs, tmp_path: Path) -> None:
    linear(tmp_path / "m.onnx")
    with pytest.raises(TeacherError, match=r"shape \(60, 3\) for 60 images; expected \(60, 2\)"):
        load(site, classes=("a", "b")).log_probs(blobs[0])
    with pytest.raises(TeacherError, match="failed on 2 images"):
        load(site).log_probs(np.zeros((2, 8, 8, 1), np.uint8))


def test_an_operator_of_a_foreign_library_does_not_load(site: Site, tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Mine", ["x"], ["y"], domain="some.where")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("some.where", 1)]
    model = helper.make_model(graph, opset_imports=imports)
    model.ir_version = 9
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(TeacherError, match=r"m\.onnx: onnxruntime cannot load it: .*some\.where"):
        load(site)


def test_a_missing_library_names_its_extra(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    linear(tmp_path / "m.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"m\.onnx is an ONNX file.*pip install 'consilience\[onnx\]'"):
        load(site)
