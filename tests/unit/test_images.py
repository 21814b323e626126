"""What the files of docker/ promise: no root, a health check, nothing secret in a layer, a small context."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
IMAGES = ("Dockerfile", "Dockerfile.cpu", "Dockerfile.sglang")
BUILT = ("Dockerfile.cpu",)
"""Of those, what has been built and run; the others say that they have not."""


def text_of(name: str) -> str:
    return (ROOT / "docker" / name).read_text().replace("\\\n", " ")


def last_stage(name: str) -> str:
    return text_of(name).rpartition("\nFROM ")[2]


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_is_left_without_its_compilers_stage_and_does_not_run_as_root(name: str) -> None:
    stages = re.findall(r"^FROM (\S+)(?: AS (\w+))?$", text_of(name), re.MULTILINE)
    assert [stage for _, stage in stages] == ["build", ""] and all(base.startswith("${") for base, _ in stages)
    users = re.findall(r"^USER (\S+)$", last_stage(name), re.MULTILINE)
    assert users == ["1000"] and "--uid 1000" in last_stage(name)
    assert re.search(r"^HEALTHCHECK .* CMD \[", last_stage(name), re.MULTILINE)
    assert re.search(r"^ENTRYPOINT \[", last_stage(name), re.MULTILINE)


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_says_which_version_it_is_of(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    labels = dict(re.findall(r'org\.opencontainers\.image\.(\w+)="([^"]*)"', last_stage(name)))
    assert (labels["version"], labels["licenses"]) == (project["version"], project["license"])
    assert {"title", "description", "revision"} <= labels.keys()


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_that_nobody_has_built_says_so(name: str) -> None:
    assert ("Neither built nor run yet" in text_of(name)) == (name not in BUILT)
    assert (f"| `docker/{name}` | no" in (ROOT / "docs/docker.md").read_text()) == (name not in BUILT)


@pytest.mark.parametrize("name", IMAGES)
def test_no_layer_holds_a_registrys_settings(name: str) -> None:
    """They come as a secret, which is there for one command."""
    fetches = [line for line in text_of(name).splitlines() if re.match("RUN .*make (packages|servers|kernels)", line)]
    assert fetches and all("--mount=type=secret,id=pip,target=/etc/pip.conf" in line for line in fetches)
    assert not re.search("PIP_INDEX_URL|TRUSTED|PASSWORD|TOKEN", text_of(name))


def test_the_context_is_what_is_copied() -> None:
    lines = (ROOT / ".dockerignore").read_text().split("\n")
    kept = {line[1:] for line in lines if line.startswith("!")}
    assert lines[1] == "*" and {"**/__pycache__", "**/*.so"} <= set(lines)
    assert all((ROOT / name).exists() for name in kept)
    assert {"Makefile", "requirements", "megatron_gspo", "pyproject.toml", "setup.py", "README.md", "LICENSE"} <= kept
    files = [path for name in kept for path in [ROOT / name, *(ROOT / name).rglob("*")]]
    sizes = [path.stat().st_size for path in files if path.is_file() and path.suffix not in (".so", ".pyc")]
    assert sum(sizes) < 8e6
    for name in IMAGES:
        copied = re.findall(r"^COPY (?!--from)(\S+) ", text_of(name), re.MULTILINE)
        assert all(source == "." or source.split("/")[0] in kept for source in copied)


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / "docker/compose.yaml").read_text()))


def test_the_services_are_built_here_and_need_each_other(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert set(services) == {"server", "trainer"}
    for service in services.values():
        assert (ROOT / service["build"]["dockerfile"]).is_file() and service["build"]["context"] == ".."
        assert service["init"] is True and service["user"] == "${USER_ID:-1000}"
    assert services["trainer"]["depends_on"]["server"]["condition"] == "service_healthy"
    devices = [s["deploy"]["resources"]["reservations"]["devices"][0] for s in services.values()]
    assert [device["device_ids"] for device in devices] == [["0"], ["1"]]


def test_the_services_share_a_key_that_stands_nowhere_and_publish_nothing(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert all(service["secrets"] == ["server_key"] and "ports" not in service for service in services.values())
    assert services["trainer"]["environment"]["MEGATRON_GSPO_SERVER_KEY_FILE"] == "/run/secrets/server_key"
    assert not any("--api-key" in str(service) for service in services.values())
    assert services["server"]["networks"] == services["trainer"]["networks"] == list(compose["networks"])
