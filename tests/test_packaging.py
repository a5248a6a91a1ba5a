"""What is built and installed is what lies here: wheel, source distribution, editable install; in fresh environments.

The packages under src/consilience are links to the folders at the top, so it is worth a test that a build holds files
and not links. Nothing is downloaded: environments borrow this one's libraries, but not its consilience.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from dataclasses import dataclass
from email import message_from_bytes
from importlib import metadata
from pathlib import Path, PurePosixPath

import pytest

import consilience

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
FOLDERS = ("client", "common", "deploy", "server")
TEMPLATES = tuple(f"deploy/{name}" for name in ("docker", "kubernetes", "systemd"))
"""For whoever sets up machines: in the source distribution, not in the wheel."""
LIBRARIES = Path(sysconfig.get_path("purelib"))

IMPORT_ALL = """
import pkgutil, sys
import consilience
names = [module.name for module in pkgutil.walk_packages(consilience.__path__, "consilience.")]
for name in names:
    if not name.endswith(("__main__", ".build_fashion")):
        __import__(name)
print(*sorted(names), sep="\\n")
assert all(module.__file__.startswith(sys.argv[1]) for name, module in sys.modules.items()
           if name.split(".")[0] == "consilience" and getattr(module, "__file__", None)), "imported from elsewhere"
"""

LOOK = """
import sys
import consilience.client, consilience.common, consilience.deploy, consilience.server
from consilience.common.data import open_data
from consilience.common.settings import EmbeddedData
from consilience.deploy.simulation import embedded_job
assert consilience.common.__file__.startswith(sys.argv[1]), consilience.common.__file__
print(len(open_data(EmbeddedData(kind="embedded"))), embedded_job().name)
"""


@dataclass(frozen=True)
class Built:
    """A copy of the checkout's sources, and what was built from it."""

    source: Path
    sdist: Path
    wheel: Path
    direct_wheel: Path
    files: dict[str, bytes]
    """Every file of the four folders, by its path in the wheel."""


def environment() -> dict[str, str]:
    """This process's variables, without those that would measure coverage or change what is imported."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("COV", "PYTHONPATH", "VIRTUAL_ENV"))}


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment(), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    source = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*")
    for folder in (*FOLDERS, "src", "tests"):
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md"):
        shutil.copy(ROOT / name, source)
    for folder in FOLDERS:
        assert (source / "src" / "consilience" / folder).is_symlink()
    files = {
        f"consilience/{path.relative_to(source).as_posix()}": path.read_bytes()
        for folder in FOLDERS
        for path in sorted((source / folder).rglob("*"))
        if path.is_file() and path.relative_to(source).parent.as_posix() not in TEMPLATES
    }
    both, direct = source / "dist", source / "direct"
    # The wheel of `both` is built from its source distribution; the other one straight from the folders.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", both, source, cwd=source)
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", direct, source, cwd=source)
    (sdist,), (wheel,), (direct_wheel,) = both.glob("*.tar.gz"), both.glob("*.whl"), direct.glob("*.whl")
    return Built(source, sdist, wheel, direct_wheel, files)


def install(folder: Path, *what: str | Path) -> Path:
    """Make an environment, install `what` into it with pip and without a network; returns its Python."""
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    # To build, setuptools alone: pip must not see this environment's consilience, or it might replace it.
    tools = folder / "tools"
    tools.mkdir()
    for path in LIBRARIES.iterdir():
        if path.name.startswith(("setuptools", "_distutils_hack")):
            (tools / path.name).symlink_to(path)
    (packages / "tools.pth").write_text(f"{tools}\n")
    offline = ("--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--quiet")
    run(sys.executable, "-m", "pip", "--python", python, "install", *offline, *what, cwd=folder)
    # To run, every library. A folder that a .pth names comes last, and .pth files in it do not count.
    (packages / "tools.pth").write_text(f"{LIBRARIES}\n{sysconfig.get_path('platlib')}\n")
    return python


def check_command_line(python: Path, folder: Path) -> None:
    command = python.with_name("consilience")
    assert run(command, "--version", cwd=folder).strip() == f"consilience {consilience.__version__}"


def members(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as file:
        for entry in file.infolist():
            assert (entry.external_attr >> 16) & 0o170000 in (0, 0o100000), f"{entry.filename} is no plain file"
        return {name: file.read(name) for name in file.namelist()}


def info(held: dict[str, bytes], name: str) -> bytes:
    return held[f"consilience-{consilience.__version__}.dist-info/{name}"]


def test_the_version_is_the_same_everywhere() -> None:
    assert metadata.version("consilience") == consilience.__version__
    assert f"## {consilience.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_licence_is_the_whole_apache_licence() -> None:
    digest = hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest()
    assert digest == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"  # of the foundation's own text


def test_the_wheel_holds_every_file_of_the_four_folders_and_nothing_else(built: Built) -> None:
    held = members(built.wheel)
    packaged = {name: data for name, data in held.items() if ".dist-info/" not in name}
    top = {name: (ROOT / "src" / name).read_bytes() for name in packaged if name.count("/") == 1}
    assert sorted(top) == ["consilience/__init__.py", "consilience/__main__.py", "consilience/py.typed"]
    assert sorted(packaged) == sorted(built.files | top)
    assert packaged == built.files | top
    assert members(built.direct_wheel).keys() == held.keys()
    for name in ("deploy/example/fashion.npz", "deploy/example/job.yaml", "server/templates/report.html.j2"):
        assert f"consilience/{name}" in packaged
    assert len(packaged["consilience/deploy/example/fashion.npz"]) > 2_000_000


def test_the_wheel_says_its_licences_and_what_it_needs(built: Built) -> None:
    held = members(built.wheel)
    said = message_from_bytes(info(held, "METADATA"))
    assert said["License-Expression"] == "Apache-2.0 AND MIT"
    assert said.get_all("License-File") == ["LICENSE", "deploy/example/LICENSE-fashion-mnist"]
    assert info(held, "licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert b"Zalando SE" in info(held, "licenses/deploy/example/LICENSE-fashion-mnist")
    assert {"vision", "onnx", "sklearn", "partition", "all", "test"} <= set(said.get_all("Provides-Extra", []))
    assert b"consilience = consilience.__main__:main" in info(held, "entry_points.txt")
    needed = [line for line in said.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert any(line.startswith("flwr") for line in needed)
    assert not any(line.startswith(("torchvision", "onnx", "skops", "pytest")) for line in needed)


def test_the_source_distribution_holds_files_and_no_links_or_tests(built: Built) -> None:
    with tarfile.open(built.sdist) as file:
        entries = file.getmembers()
        assert [entry.name for entry in entries if not (entry.isreg() or entry.isdir())] == []
        names = {PurePosixPath(*PurePosixPath(entry.name).parts[1:]).as_posix() for entry in entries if entry.isreg()}
    assert {f"src/{name}" for name in built.files} <= names
    assert {"LICENSE", "deploy/example/LICENSE-fashion-mnist", "CHANGELOG.md", "README.md", "pyproject.toml"} <= names
    templates = {path.relative_to(ROOT).as_posix() for folder in TEMPLATES for path in (ROOT / folder).iterdir()}
    assert len(templates) >= 8
    assert templates <= names
    assert [name for name in names if name.startswith(("tests", "benchmarks", "docs", "."))] == []


def test_the_wheel_works_in_an_environment_of_its_own(built: Built, tmp_path: Path) -> None:
    python = install(tmp_path, built.wheel)
    place = str(tmp_path / "venv")
    imported = run(python, "-c", IMPORT_ALL, place, cwd=tmp_path).split()
    modules = [name for name in built.files if name.endswith(".py") and "/example/" not in name]
    expected = {name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in modules}
    assert expected <= set(imported)
    assert run(python, "-c", LOOK, place, cwd=tmp_path).split() == ["5000", "fashion"]
    check_command_line(python, tmp_path)


def test_the_source_distribution_installs(built: Built, tmp_path: Path) -> None:
    python = install(tmp_path, built.sdist)
    assert run(python, "-c", LOOK, str(tmp_path / "venv"), cwd=tmp_path).split() == ["5000", "fashion"]
    check_command_line(python, tmp_path)


def test_an_editable_install_follows_the_folders(built: Built, tmp_path: Path) -> None:
    source = shutil.copytree(built.source, tmp_path / "source", symlinks=True, ignore=shutil.ignore_patterns("build"))
    python = install(tmp_path, "--editable", source)
    assert run(python, "-c", LOOK, str(source), cwd=tmp_path).split() == ["5000", "fashion"]
    (source / "common" / "added_later.py").write_text('SAID = "there at once"\n')
    said = run(python, "-c", "from consilience.common.added_later import SAID; print(SAID)", cwd=tmp_path)
    assert said == "there at once\n"
    check_command_line(python, tmp_path)
