"""A site whose teacher is no torch network does without torch: a second or two and 200 MiB for each of its processes.

Not of kind sklearn: skops imports every module of scikit-learn, of which one imports torch where that is installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import yaml
from onnx import TensorProto, helper

from consilience.common.data import from_arrays
from consilience.common.pool import Pool

CHECK = """
import sys
def check(what):
    found = {"torch", "torchvision", "opacus", "safetensors.torch"} & set(sys.modules)
    assert not found, (what, found)
"""
IMPORT = f"""{CHECK}
import importlib
from typer.main import get_command
from consilience.client.cli import app
commands = [place.split(":")[0] for place, _ in get_command(app).parts.values()]
assert len(commands) > 5
for name in ("consilience.client.app", "consilience.client.agent", *commands):
    importlib.import_module(name)
    check(name)
"""
ANSWER = f"""{CHECK}
from pathlib import Path
from consilience.client.site import Site
from consilience.client.teacher import calibrate_any
from consilience.common.pool import Pool
from consilience.common.protocol import Question
from consilience.common.settings import SiteSettings
from consilience.common.settings_file import load_settings
for path in map(Path, sys.argv[1:]):
    record = calibrate_any(load_settings(path, SiteSettings))
    assert record.samples == 60, record.told
    site, pool = Site.load(path), Pool.open(path.parent / "pool")
    about = dict(job="job", pool=pool.digest, teacher=site.card.teacher, policy=site.card.policy)
    answer = site.answer(Question(**about, start=0, stop=20, encoding="u8"))
    assert len(answer.data) == 60
    site.close()
    check(path)
"""
TEACHERS: dict[str, dict[str, Any]] = {
    "callable": {"kind": "callable", "callable": "helpers.teachers:fixed"},
    "onnx": {"kind": "onnx", "path": "model.onnx"},
}


def run(code: str, *arguments: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=True, timeout=300, env=environment)


def mean_colours(path: Path) -> None:
    """Write a model whose logits are an image's mean colours: (n, 3, H, W) to (n, 3)."""
    graph = helper.make_graph(
        [helper.make_node("GlobalAveragePool", ["x"], ["means"]), helper.make_node("Flatten", ["means"], ["y"])],
        "mean colours",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path)


def test_neither_an_agent_nor_any_command_of_a_site_imports_torch_before_it_is_needed() -> None:
    run(IMPORT)


def test_a_site_with_another_teacher_calibrates_and_answers_without_torch(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "data.npz", x=pixels, y=np.arange(60) % 3, names=["red", "green", "blue"])
    Pool.build(from_arrays(pixels[:40], None, (), where="test"), tmp_path / "pool")
    mean_colours(tmp_path / "model.onnx")
    for name, teacher in TEACHERS.items():
        settings = {
            "name": name,
            "teacher": {"classes": ["red", "green", "blue"], "preprocessing": {}, **teacher},
            "data": {"kind": "npz", "path": "data.npz"},
            "pools": ["pool"],
            "state": f"state-{name}",
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    run(ANSWER, *(tmp_path / f"{name}.yaml" for name in TEACHERS))
