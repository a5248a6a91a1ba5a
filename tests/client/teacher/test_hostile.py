"""Files that would execute when loaded: refused, or made harmless, and the canary stays away.

Where the plain loader of the library falls for the file, a control shows that it does: otherwise the test
could not fail.
"""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import subprocess
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib  # type: ignore[import-untyped]
import numpy as np
import pytest
import skops.io
import torch
from sklearn.naive_bayes import GaussianNB
from torch import nn

from consilience.client.teacher import load_teacher
from consilience.common.errors import TeacherError
from consilience.common.settings import SiteSettings

Site = Callable[..., SiteSettings]
Edit = Callable[[dict[str, bytes], str], None]
IMAGES = np.zeros((2, 16, 16, 1), np.uint8)


class Malice:
    """Unpickled, it runs a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return subprocess.getoutput, (self.command,)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


@pytest.fixture
def touch(canary: Path) -> str:
    """The command that every file here wants to run."""
    return f"touch {canary}"


def test_the_canary_sings_when_a_pickle_is_loaded(canary: Path, touch: str) -> None:
    pickle.loads(pickle.dumps(Malice(touch)))
    assert canary.exists()


# Pickles in the clothes of other files


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("state_dict", "m.pt"),
        ("state_dict", "m.pth"),
        ("state_dict", "m.safetensors"),
        ("torchscript", "m.pt"),
        ("export", "m.pt2"),
        ("sklearn", "m.skops"),
        ("sklearn", "m.pkl"),
        ("sklearn", "m.joblib"),
        ("onnx", "m.onnx"),
    ],
)
@pytest.mark.parametrize("how", ["pickle", "torch", "joblib"])
def test_pickles_are_refused_for_every_kind(
    how: str, kind: str, name: str, site: Site, canary: Path, touch: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if how == "pickle":
        path.write_bytes(pickle.dumps(Malice(touch)))
    elif how == "torch":
        torch.save({"0.weight": torch.ones(2), "1.weight": Malice(touch)}, path)
    else:
        joblib.dump(Malice(touch), path)
    extra = {"architecture": "cnn3"} if kind == "state_dict" else {}
    with pytest.raises(TeacherError, match=name):
        load_teacher(site(kind=kind, path=name, **extra))
    assert not canary.exists()


def test_a_state_dicts_foreign_object_is_named(site: Site, canary: Path, touch: str, tmp_path: Path) -> None:
    torch.save({"0.weight": Malice(touch)}, tmp_path / "m.pt")
    with pytest.raises(TeacherError, match=r"refused, because it holds a pickled (subprocess|commands)\.getoutput"):
        load_teacher(site(kind="state_dict", architecture="cnn3", path="m.pt"))
    assert not canary.exists()
    torch.load(tmp_path / "m.pt", weights_only=False)
    assert canary.exists()


# skops


def test_a_skops_file_with_a_function_is_refused_by_name(site: Site, canary: Path, touch: str, tmp_path: Path) -> None:
    path = tmp_path / "m.skops"
    skops.io.dump(GaussianNB().fit([[0], [1], [2]], [0, 1, 2]), path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    schema = json.loads(records["schema.json"])
    schema["content"]["content"]["priors"] = {
        "__class__": "partial",
        "__module__": "functools",
        "__loader__": "PartialNode",
        "content": {
            "func": {
                "__class__": "function",
                "__module__": "builtins",
                "__loader__": "FunctionNode",
                "__id__": 2**40,
                "content": {"module_path": "subprocess", "function": "getoutput"},
            },
            "args": _json_node([touch]),
            "kwds": _json_node({}),
            "namespace": _json_node(None),
        },
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (records | {"schema.json": json.dumps(schema).encode()}).items():
            archive.writestr(name, content)
    with pytest.raises(TeacherError, match=r"m\.skops: refused, .*builtins\.function, functools\.partial"):
        load_teacher(site(kind="sklearn", path="m.skops"))
    assert not canary.exists()


def _json_node(value: Any) -> dict[str, Any]:
    return {"__class__": "str", "__module__": "builtins", "__loader__": "JsonNode", "content": json.dumps(value)}


# TorchScript


class WritesFile(nn.Module):
    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.sum((2, 3)).expand(-1, 3) + torch.from_file(self.path, shared=True, size=4).sum()


class Saves(WritesFile):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        torch.save(images, self.path)
        return images.sum((2, 3)).expand(-1, 3)


def script(module: nn.Module, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(module), path)


@pytest.mark.parametrize(("module", "name"), [(WritesFile, "from_file"), (Saves, "save")])
def test_torchscript_that_writes_files_is_refused(
    module: type[WritesFile], name: str, site: Site, canary: Path, tmp_path: Path
) -> None:
    script(module(str(canary)), tmp_path / "m.pt")
    with pytest.raises(TeacherError, match=rf"m\.pt: refused, .* the file operator {name} in code/") as caught:
        load_teacher(site(kind="torchscript", path="m.pt"))
    assert "state_dict" in caught.value.hint
    assert not canary.exists()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.load(tmp_path / "m.pt")(torch.zeros(1, 1, 2, 2))  # type: ignore[no-untyped-call]
    assert canary.exists()


class Plain(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.sum((2, 3)).expand(-1, 3)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("ops.c10d.barrier(images, [])", "beyond torch's own: ops"),
        ("ops . c10d.barrier(images, [])", "beyond torch's own: ops"),
        ("o = ops", "beyond torch's own: ops"),
        ("y = __torch__.torch.classes.c10d.Work", r"a bound C\+\+ class"),
        ('images.save("a")', "the file operator save"),
        ("y = ops.aten.relu(images)", ""),
    ],
)
def test_torchscript_beyond_torch_is_refused(line: str, message: str, site: Site, tmp_path: Path) -> None:
    script(Plain(), tmp_path / "m.pt")

    def edit(records: dict[str, bytes], command: str) -> None:
        record = next(name for name in records if name.endswith(".py"))
        code = records[record].decode()
        anchor = "    return "
        assert anchor in code
        records[record] = code.replace(anchor, f"    {line}\n{anchor}", 1).encode()

    rewrite(tmp_path / "m.pt", edit, "")
    if not message:
        load_teacher(site(kind="torchscript", path="m.pt")).log_probs(IMAGES)
        return
    with pytest.raises(TeacherError, match=message):
        load_teacher(site(kind="torchscript", path="m.pt"))


@pytest.mark.parametrize("record", ["data.pkl", "constants.pkl"])
def test_a_pickle_inside_torchscript_does_not_run(
    record: str, site: Site, canary: Path, touch: str, tmp_path: Path
) -> None:
    script(Plain(), tmp_path / "m.pt")
    rewrite(tmp_path / "m.pt", lambda held, command: held.update({record: pickle.dumps(Malice(command), 2)}), touch)
    with pytest.raises(TeacherError, match=r"m\.pt: not a TorchScript file"):
        load_teacher(site(kind="torchscript", path="m.pt"))
    assert not canary.exists()


# torch.export


def rewrite(path: Path, edit: Edit, command: str) -> None:
    """Change the records of one of torch's archives."""
    reader = torch._C.PyTorchFileReader(io.BytesIO(path.read_bytes()))
    own = {"version", ".data/version", ".data/serialization_id", "byteorder"}
    records = {name: reader.get_record(name) for name in reader.get_all_records() if name not in own}
    edit(records, command)
    out = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(out)
    writer.set_min_version(6)
    for name, content in records.items():
        writer.write_record(name, content, len(content))
    writer.write_end_of_file()
    path.write_bytes(out.getvalue())


def in_json(record: str, change: Callable[[Any, str], None]) -> Edit:
    def edit(records: dict[str, bytes], command: str) -> None:
        value = json.loads(records[record])
        change(value, command)
        records[record] = json.dumps(value).encode()

    return edit


def node(program: Any) -> Any:
    """The first operation of a program."""
    return program["graph_module"]["graph"]["nodes"][0]


def pickled_weight(records: dict[str, bytes], command: str) -> None:
    record = "data/weights/model_weights_config.json"
    config = json.loads(records[record])
    next(iter(config["config"].values()))["use_pickle"] = True
    records[record] = json.dumps(config).encode()
    records["data/weights/weight_0"] = pickle.dumps(Malice(command))


def opaque_constant(records: dict[str, bytes], command: str) -> None:
    meta = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
    record = "data/constants/model_constants_config.json"
    records[record] = json.dumps({"config": {"c": meta}}).encode()
    records["data/constants/opaque_obj_0"] = pickle.dumps(Malice(command))


def call_python(program: Any, command: str) -> None:
    made = node(program)
    made["target"] = "torch.os.system"
    made["inputs"] = [{"name": "command", "arg": {"as_string": command}, "kind": 1}]


def evaluate(program: Any, command: str) -> None:
    values = program["graph_module"]["graph"]["tensor_values"]
    values["x"]["sizes"][0]["as_expr"]["expr_str"] = f"__import__('os').system({command!r})"


def name_is_code(program: Any, command: str) -> None:
    """An input's name becomes an argument of a function that torch compiles."""
    evil = f"x=__import__('os').system({command!r})"
    changed = json.loads(json.dumps(program).replace('"x"', json.dumps(evil)))
    program.clear()
    program.update(changed)


# Name of the record or field -> (change, whether torch.export.load or the program falls for it, what we say; "": loads)
EXPORTS: dict[str, tuple[Edit, bool, str]] = {
    "pickled weight": (pickled_weight, True, r"data/weights/weight_0, a pickle"),
    "opaque constant": (opaque_constant, True, r"data/constants/opaque_obj_0, a pickle"),
    "sample inputs": (
        lambda held, command: held.update({"data/sample_inputs/model.pt": pickle.dumps(Malice(command))}),
        True,
        "",
    ),
    "old weights": (
        lambda held, command: held.update({"data/weights/model.pt": pickle.dumps(Malice(command))}),
        True,
        r"data/weights/model\.pt, a pickle",
    ),
    "old constants": (
        lambda held, command: held.update({"data/constants/model.pt": pickle.dumps(Malice(command))}),
        True,
        r"data/constants/model\.pt, a pickle",
    ),
    "second model": (
        lambda held, command: held.update({"models/other.json": held["models/model.json"]}),
        False,
        r"models/other\.json",
    ),
    "compiled library": (
        lambda held, command: held.update({"data/aotinductor/model/m.wrapper.so": b"\x7fELF"}),
        False,
        r"data/aotinductor/model/m\.wrapper\.so",
    ),
    "python function": (in_json("models/model.json", call_python), False, "the operator 'torch.os.system'"),
    "shape expression": (in_json("models/model.json", evaluate), True, "the shape expression .__import__"),
    "name": (in_json("models/model.json", name_is_code), True, "the name .x=__import__"),
    "guard": (
        in_json(
            "models/model.json",
            lambda program, command: program["guards_code"].append(f"__import__('os').system({command!r}) == 0"),
        ),
        True,
        "",
    ),
    "file operator": (
        in_json(
            "models/model.json", lambda program, _: node(program).update(target="torch.ops.aten.from_file.default")
        ),
        False,
        "the operator 'torch.ops.aten.from_file.default'",
    ),
    "foreign operator": (
        in_json("models/model.json", lambda program, _: node(program).update(target="torch.ops.c10d.barrier.default")),
        False,
        "the operator",
    ),
    "no operator": (
        in_json("models/model.json", lambda program, _: node(program).update(target="torch.ops.aten.__class__.mro")),
        False,
        "the operator",
    ),
    "custom object": (
        in_json(
            "models/model.json",
            lambda program, _: node(program)["inputs"][0].update(
                arg={"as_custom_obj": {"name": "a", "class_fqn": "b"}}
            ),
        ),
        False,
        "a value of kind as_custom_obj",
    ),
    "structure": (
        in_json(
            "models/model.json",
            lambda program, _: program["graph_module"]["module_call_graph"][0]["signature"].update(
                out_spec='[1, {"type": "collections.namedtuple", "context": "x", "children_spec": []}]'
            ),
        ),
        False,
        "the structure",
    ),
    "python attribute": (
        in_json(
            "models/model.json",
            lambda program, _: program["graph_module"]["signature"]["input_specs"][0]["parameter"].update(
                parameter_name="head.__class__.forward"
            ),
        ),
        False,
        "the name 'head.__class__.forward'",
    ),
}


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(256, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(x.flatten(1))
        return y


@pytest.fixture(scope="module")
def exported() -> bytes:
    out = io.BytesIO()
    program = torch.export.export(
        Head(), (torch.zeros(4, 1, 16, 16),), dynamic_shapes=({0: torch.export.Dim("n", min=1, max=99)},)
    )
    torch.export.save(program, out)
    return out.getvalue()


@pytest.mark.parametrize("attack", EXPORTS)
def test_an_export_that_would_execute_is_refused_or_cleaned(
    attack: str, exported: bytes, site: Site, canary: Path, touch: str, tmp_path: Path
) -> None:
    edit, works, message = EXPORTS[attack]
    path = tmp_path / "m.pt2"
    path.write_bytes(exported)
    rewrite(path, edit, touch)
    if message:
        with pytest.raises(TeacherError, match=rf"m\.pt2: refused, because it holds .*{message}"):
            load_teacher(site(kind="export", path="m.pt2"))
    else:
        load_teacher(site(kind="export", path="m.pt2")).log_probs(IMAGES)
    assert not canary.exists()
    if works:
        with contextlib.suppress(Exception):  # the canary sings before the program fails
            torch.export.load(path).module()(torch.zeros(4, 1, 16, 16))
        assert canary.exists(), "torch does not fall for this: the control is out of date"


def test_the_old_form_of_an_export_is_refused(site: Site, canary: Path, touch: str, tmp_path: Path) -> None:
    """torch.export.load turns to it when a file is no archive of today's form; it unpickles four of its members."""
    with zipfile.ZipFile(tmp_path / "m.pt2", "w") as archive:
        archive.writestr("version", "8.1")
        archive.writestr("serialized_exported_program.json", "{}")
        for name in ("state_dict", "constants", "example_inputs"):
            archive.writestr(f"serialized_{name}.pt", pickle.dumps(Malice(touch)))
    with pytest.raises(TeacherError, match=r"m\.pt2: not a torch\.export archive"):
        load_teacher(site(kind="export", path="m.pt2"))
    assert not canary.exists()


def test_damaged_exports_fail_in_one_line(exported: bytes, site: Site, tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    for record, content in (
        ("models/model.json", b"{"),
        ("models/model.json", b"[]"),
        ("models/model.json", b'{"graph_module": 1}'),
        ("data/weights/model_weights_config.json", b'{"config": {"head.weight": {}}}'),
        ("data/weights/model_weights_config.json", b"[" * 100_000),
        ("data/weights/weight_0", b"odd"),
    ):
        path.write_bytes(exported)
        rewrite(path, lambda held, _, r=record, c=content: held.update({r: c}), "")  # type: ignore[misc]
        with pytest.raises(
            TeacherError, match=r"m\.pt2: (a damaged torch\.export archive|torch\.export cannot load it)"
        ):
            load_teacher(site(kind="export", path="m.pt2"))
