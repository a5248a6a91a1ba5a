"""The templates of deploy/: units, images, compose files and manifests, tried as far as they can be without a cluster.

systemd's own verdicts, hadolint and the Kubernetes schema are asked where they are installed.
"""

from __future__ import annotations

import ctypes.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from consilience.client.health import health_server
from consilience.client.ledger_head import comes_back_with_state, head_path
from consilience.common.errors import REGISTRY
from consilience.common.settings import SiteSettings
from consilience.common.settings_file import parse_settings
from consilience.deploy.processes import free_ports
from helpers import sandbox
from helpers.commands import command_of
from helpers.pages import ROOT

DEPLOY = ROOT / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
COMPOSE = {"server": "compose.yaml", "site": "compose-site.yaml"}
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
SWITCHES = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
FLEET, CONTROL, HEALTH = 9092, 9093, 9094
MOST_EXPOSED = 3.0

systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


def runs(command: list[str], **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=False, **more)


def taken(words: list[str]) -> None:
    """Fail unless the command line takes these words."""
    command, left = command_of(*words)
    command.make_context("consilience", left)


# systemd


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.stem)
def test_a_unit_starts_a_command_of_ours_stops_in_time_and_gives_up_when_only_people_can_help(unit: Path) -> None:
    held = sandbox.options(unit)
    (start,) = held["ExecStart"]
    program, *words = start.split()
    assert Path(program).name == "consilience"
    taken(words)
    assert set(SWITCHES.items()) <= {tuple(line.split("=", 1)) for line in held["Environment"]}
    assert held["User"] == ["consilience"]
    assert int(held["TimeoutStopSec"][0]) >= 10
    assert held["Restart"] == ["on-failure"]
    final = set(map(int, held["RestartPreventExitStatus"][0].split()))
    assert final <= {2, *REGISTRY}
    assert {3, 15} <= final
    assert not final & {1, 10, 16, 18, 21, 22}  # time, or somebody elsewhere, mends these
    assert {17, 19, 20} <= final or "server" in unit.stem


@systemd
@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.stem)
def test_systemd_knows_every_option_of_a_unit_and_finds_little_exposed(unit: Path, tmp_path: Path) -> None:
    here = tmp_path / unit.name
    here.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", unit.read_text(), flags=re.MULTILINE))
    verified = runs(["systemd-analyze", "verify", "--man=no", str(here)])
    assert (verified.returncode, verified.stdout + verified.stderr) == (0, "")
    judged = runs(["systemd-analyze", "security", "--offline=true", "--no-pager", str(here)])
    (exposure,) = re.findall(r"exposure level for \S+: ([0-9.]+)", judged.stdout)
    assert float(exposure) < MOST_EXPOSED
    here.write_text(here.read_text().replace("NoNewPrivileges=", "NoNewPrivilege="))
    assert "NoNewPrivilege" in runs(["systemd-analyze", "verify", "--man=no", str(here)]).stderr


@systemd
def test_systemd_takes_the_graphics_drop_in(tmp_path: Path) -> None:
    unit = tmp_path / UNITS[0].name
    unit.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", UNITS[0].read_text(), flags=re.MULTILINE))
    (tmp_path / f"{unit.name}.d").mkdir()
    shutil.copy(DEPLOY / "systemd" / "gpu.conf", tmp_path / f"{unit.name}.d")
    verified = runs(["systemd-analyze", "verify", "--man=no", str(unit)])
    assert (verified.returncode, verified.stdout + verified.stderr) == (0, "")


def test_both_units_forbid_the_same() -> None:
    server, site = (
        re.findall(r"^# What it may do.*", unit.read_text(), flags=re.DOTALL | re.MULTILINE) for unit in UNITS
    )
    assert server == site
    assert len(server[0]) > 500


@systemd
@pytest.mark.slow
@pytest.mark.skipif(ctypes.util.find_library("seccomp") is None, reason="libseccomp is not installed")
@pytest.mark.skipif(not sys.platform.startswith("linux") or os.geteuid() != 0, reason="needs root on Linux")
def test_torch_and_sockets_work_under_what_a_unit_forbids() -> None:
    """A job with every process under the unit takes a minute; its parts that a filter could break, less."""
    tried = """
import pathlib, socket, ssl, subprocess, sys
import grpc, torch
from consilience.common.identity import make_key
from consilience.common.child import child_command
net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(2704, 2))
loss = net(torch.rand(8, 1, 28, 28)).square().mean(); loss.backward(); torch.optim.SGD(net.parameters(), 0.1).step()
socket.create_server(("127.0.0.1", 0)); socket.getaddrinfo("localhost", 1)
import concurrent.futures as f
server = grpc.server(f.ThreadPoolExecutor()); port = server.add_insecure_port("127.0.0.1:0"); server.start()
grpc.channel_ready_future(grpc.insecure_channel(f"127.0.0.1:{port}")).result(20)
assert subprocess.run(child_command("this")).returncode == 0
refused = 0
for forbidden in (lambda: pathlib.Path("/etc/consilience").write_text(""), lambda: socket.socket(socket.AF_PACKET),
                  lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW), lambda: __import__("os").chroot("/")):
    try:
        forbidden()
    except OSError:
        refused += 1
print("refused", refused)
"""
    before = [sys.executable, str(ROOT / "tests" / "helpers" / "sandbox.py"), str(UNITS[0])]
    done = runs([*before, sys.executable, "-c", tried])
    if done.returncode and "unshare" in done.stderr:
        pytest.skip("this machine lets nobody make a mount namespace")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "refused 4"


# Containers


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", (DEPLOY / "docker" / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines) if word]


def test_the_images_hold_no_secret_and_run_as_nobody() -> None:
    held = instructions()
    assert [rest.split(" AS ")[1] for word, rest in held if word == "FROM"] == ["build", "base", "server", "site"]
    assert [rest for word, rest in held if word == "USER"] == ["10001:10001"]
    assert [rest for word, rest in held if word == "EXPOSE"] == [str(FLEET)]
    assert [rest for word, rest in held if word == "ENTRYPOINT"] == ['["consilience"]']
    assert not [rest for word, rest in held if word == "ADD"]
    environment = " ".join(rest for word, rest in held if word == "ENV")
    assert set(SWITCHES.items()) <= set(re.findall(r"(\w+)=(\S+)", environment))
    for word, rest in held:
        if word == "CMD":
            taken(yaml.safe_load(rest))
    torch = re.findall(r'"(torch==[^"]+)"', (ROOT / "pyproject.toml").read_text())
    assert all(version in " ".join(rest for _, rest in held) for version in torch)


def test_health_checks_are_python_that_says_what_it_should() -> None:
    checks = [yaml.safe_load(rest.partition("CMD ")[2]) for word, rest in instructions() if word == "HEALTHCHECK"]
    (site,) = [check for check in checks if str(HEALTH) in check[-1]]
    assert len(checks) == 2
    for check in checks:
        compile(check[-1], "check", "exec")
    (port,) = free_ports(1)
    ready, alive = probes()
    assert site[-1].replace(" ", "") == ready.replace(" ", "")
    for state, codes in (("connected", [0, 0]), ("connecting", [1, 0])):
        with health_server(port, lambda state=state: {"status": state}):
            tried = [text.replace(str(HEALTH), str(port)) for text in (ready, alive)]
            assert [runs([sys.executable, "-c", text]).returncode for text in tried] == codes
    assert runs([sys.executable, "-c", alive.replace(str(HEALTH), str(port))]).returncode == 1


def test_hadolint_finds_nothing() -> None:
    hadolint = shutil.which("hadolint") or shutil.which("hadolint", path=sysconfig.get_path("scripts"))
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    linted = runs([hadolint, str(DEPLOY / "docker" / "Dockerfile")])
    assert (linted.returncode, linted.stdout) == (0, "")


@pytest.mark.slow
def test_the_image_is_built_from_sources_alone(tmp_path: Path) -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert rules[0] == "*"
    kept = [line[1:] for line in rules if line[0] == "!"]
    dropped = [line for line in rules[1:] if line[0] != "!"]
    names = [line.removeprefix("**/") for line in dropped if line.startswith("**/")]
    for name in kept:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns(*names))
        else:
            shutil.copy(ROOT / name, tmp_path / name)
    for name in dropped:
        if not name.startswith("**/"):
            shutil.rmtree(tmp_path / name)
    built = runs([sys.executable, "-m", "build", "--no-isolation", "--wheel", str(tmp_path)], cwd=tmp_path)
    assert built.returncode == 0, built.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        held = set(file.namelist())
    assert {"consilience/deploy/example/fashion.npz", "consilience/server/templates/report.html.j2"} <= held
    assert not [name for name in held if name.startswith(("consilience/deploy/docker", "consilience/deploy/kube"))]


@pytest.mark.parametrize("side", COMPOSE)
def test_a_compose_file_takes_every_right_and_publishes_one_port_at_most(side: str) -> None:
    raw = yaml.safe_load((DEPLOY / "docker" / COMPOSE[side]).read_text())
    service = raw["services"][side]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["user"] == "10001:10001"
    assert service["tmpfs"][0].startswith("/tmp:")
    assert not {"privileged", "cap_add", "network_mode", "pid", "devices"} & set(service)
    assert service.get("ports", []) == ([f"{FLEET}:{FLEET}"] if side == "server" else [])
    build = service["build"]
    assert (DEPLOY / "docker" / build["context"] / build["dockerfile"]).resolve() == DEPLOY / "docker" / "Dockerfile"
    assert build["target"] == side
    assert int(service["stop_grace_period"].removesuffix("s")) >= 10
    text = (DEPLOY / "docker" / COMPOSE[side]).read_text()
    for line in re.findall(rf"run --rm {side} (.*)|exec {side} consilience (.*)", text):
        words = "".join(line).replace('"..."', "x").split()
        taken(words)


# Kubernetes


def resources() -> list[dict[str, Any]]:
    return [held for path in MANIFESTS for held in yaml.safe_load_all(path.read_text())]


def resource(kind: str, name: str) -> dict[str, Any]:
    (found,) = [held for held in resources() if (held["kind"], held["metadata"]["name"]) == (kind, name)]
    return found


def pods() -> list[dict[str, Any]]:
    held = [each for each in resources() if each["kind"] in ("StatefulSet", "Deployment")]
    assert len(held) == 2
    return [each["spec"]["template"]["spec"] for each in held]


def probes() -> tuple[str, str]:
    """Return the site's readiness and liveness programs."""
    (site,) = resource("Deployment", "consilience-site")["spec"]["template"]["spec"]["containers"]
    assert site["startupProbe"]["exec"] == site["livenessProbe"]["exec"]
    ready, alive = site["readinessProbe"]["exec"]["command"], site["livenessProbe"]["exec"]["command"]
    assert ready[:2] == alive[:2] == ["python", "-c"]
    return ready[2], alive[2]


def test_the_manifests_fit_the_schema_of_kubernetes() -> None:
    with warnings.catch_warnings(action="ignore"):
        kubernetes_validate = pytest.importorskip("kubernetes_validate")
        newest = kubernetes_validate.latest_version()
        for held in resources():
            kubernetes_validate.validate(held, newest, strict=True)
        broken = resource("Deployment", "consilience-site")
        broken["spec"]["replica"] = broken["spec"].pop("replicas")
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(broken, newest, strict=True)


@pytest.mark.parametrize("index", [0, 1])
def test_pods_are_restricted(index: int) -> None:
    pod = pods()[index]
    assert pod["automountServiceAccountToken"] is False
    about = pod["securityContext"]
    assert about["runAsNonRoot"] is True
    assert about["runAsUser"] == about["fsGroup"] == 10001
    assert about["seccompProfile"] == {"type": "RuntimeDefault"}
    assert about["fsGroupChangePolicy"] == "OnRootMismatch"  # else keys become open to the group
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    named = {volume["name"] for volume in pod["volumes"]} | {"data"}
    for container in [*pod["initContainers"], *pod["containers"]]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert "memory" in container["resources"]["limits"]
        assert {mount["name"] for mount in container["volumeMounts"]} <= named
        if "args" in container:
            taken(container["args"])


def test_the_server_opens_one_port_and_the_site_none() -> None:
    assert [port["port"] for port in resource("Service", "consilience-server")["spec"]["ports"]] == [FLEET]
    server = resource("NetworkPolicy", "consilience-server")["spec"]
    assert [port["port"] for rule in server["ingress"] for port in rule["ports"]] == [FLEET]
    assert server["egress"] == []
    site = resource("NetworkPolicy", "consilience-site")["spec"]
    assert (site["policyTypes"], site["ingress"]) == (["Ingress", "Egress"], [])
    assert sorted(port["port"] for rule in site["egress"] for port in rule["ports"]) == [53, 53, FLEET]
    assert [held for held in resources() if held["kind"] == "Service"] == [resource("Service", "consilience-server")]
    assert not any(str(CONTROL) in yaml.safe_dump(held) for held in resources())
    assert "ports" not in pods()[1]["containers"][0]


def test_the_site_settings_of_the_manifest_are_ours_and_lie_in_its_volumes() -> None:
    raw = yaml.safe_load(resource("ConfigMap", "consilience-site")["data"]["site.yaml"])
    settings = parse_settings(raw, SiteSettings, source="site.yaml", folder=Path("/settings"))
    assert settings.health_port == HEALTH
    (site,) = pods()[1]["containers"]
    mounts = {mount["mountPath"]: mount.get("readOnly", False) for mount in site["volumeMounts"]}
    assert mounts[str(settings.state)] is False
    assert mounts[str(head_path(settings).parent)] is False
    assert not comes_back_with_state(settings)
    for path in (settings.key.parent, settings.kit.parent, *(pool.parent for pool in settings.pools)):
        assert mounts[str(path)] is True
    assert not [held for held in resources() if held["kind"] == "Secret"]
