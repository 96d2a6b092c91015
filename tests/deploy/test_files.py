"""The examples in deploy/: they can be read, what they name is there, and the gateway takes their settings.

They have not been applied to a cluster here. What these tests know of Kubernetes and Compose is what the references
within a file must agree on.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from gateway.app import create_app
from gateway.errors import ConfigurationError
from gateway.settings import Settings, load_settings
from sdk.cli import main
from tests.docs.pages import ROOT

DEPLOY = ROOT / "deploy"
MANIFESTS = sorted(DEPLOY.glob("ku*.yaml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HEALTH = {"/healthz", "/readyz"}


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document is not None]


def of_kind(path: Path, kind: str) -> dict[str, dict[str, Any]]:
    return {each["metadata"]["name"]: each for each in documents(path) if each["kind"] == kind}


def pods(path: Path) -> Iterator[dict[str, Any]]:
    """The specifications of all pods of a manifest."""
    for document in documents(path):
        spec = document.get("spec", {})
        groups = [spec.get("headGroupSpec"), *spec.get("workerGroupSpecs", []), spec]
        yield from (group["template"]["spec"] for group in groups if group and "template" in group)


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod.get("initContainers", []), *pod["containers"]]


def loaded(environment: dict[str, str], toml: str | None, tmp_path: Path) -> Settings:
    """What a gateway reads that is started so."""
    if toml is not None:
        (tmp_path / "tandem.toml").write_text(toml)
        environment = {**environment, "TANDEM_CONFIG": str(tmp_path / "tandem.toml")}
    return load_settings(environment)


# ---------------------------------------------------------------------------- Kubernetes


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_every_object_of_a_manifest_has_what_all_need(path: Path) -> None:
    found = documents(path)
    assert len({(each["kind"], each["metadata"]["name"]) for each in found}) == len(found)
    for each in found:
        assert re.fullmatch(r"([a-z0-9.]+/)?v[0-9]+", each["apiVersion"])
        assert re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", each["metadata"]["name"])
    assert list(pods(path))


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_what_a_manifest_refers_to_is_there(path: Path) -> None:
    # The second manifest uses the first one's secret of the database, as its head says.
    secrets = {name: each for one in MANIFESTS for name, each in of_kind(one, "Secret").items()}
    for pod in pods(path):
        volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
        for volume in volumes.values():
            if "configMap" in volume:
                assert volume["configMap"]["name"] in of_kind(path, "ConfigMap")
            else:
                assert volume["persistentVolumeClaim"]["claimName"] in of_kind(path, "PersistentVolumeClaim")
        mounted = {mount["name"] for each in containers(pod) for mount in each.get("volumeMounts", [])}
        assert mounted == set(volumes)
        for variable in [variable for each in containers(pod) for variable in each.get("env", [])]:
            if (source := variable.get("valueFrom")) is not None:
                reference = source["secretKeyRef"]
                assert reference["key"] in secrets[reference["name"]]["stringData"]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_services_find_their_pods_and_probes_their_routes(path: Path) -> None:
    served = set(create_app(Settings()).openapi()["paths"])
    assert served >= HEALTH
    for name, deployment in of_kind(path, "Deployment").items():
        template = deployment["spec"]["template"]
        labels = template["metadata"]["labels"]
        assert deployment["spec"]["selector"]["matchLabels"] == labels
        service = of_kind(path, "Service")[name]["spec"]
        assert service["selector"] == labels
        [gateway] = template["spec"]["containers"]
        ports = {port["name"]: port["containerPort"] for port in gateway["ports"]}
        assert {port["targetPort"] for port in service["ports"]} == set(ports) == {"http"}
        assert ports["http"] == 8000  # where `tandem serve` listens
        probes = [gateway[f"{kind}Probe"]["httpGet"] for kind in ("liveness", "readiness", "startup")]
        assert {probe["path"] for probe in probes} <= HEALTH
        assert {probe["port"] for probe in probes} == {"http"}


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_the_gateway_takes_a_manifests_settings_and_is_given_time_to_drain(
    path: Path, tmp_path: Path
) -> None:
    [settings] = of_kind(path, "ConfigMap").values()
    for deployment in of_kind(path, "Deployment").values():
        pod = deployment["spec"]["template"]["spec"]
        for container in containers(pod):
            given = {each["name"]: each.get("value", "") for each in container["env"]}
            assert Path(given["TANDEM_CONFIG"]).name in settings["data"]
            given["TANDEM_DATABASE_URL"] = of_kind(DEPLOY / "kubernetes.yaml", "Secret")["tandem"][
                "stringData"
            ]["database-url"]
            variables = {name: value for name, value in given.items() if name.startswith("TANDEM_")}
            read = loaded(variables, settings["data"]["tandem.toml"], tmp_path)
            assert not read.embedded
            assert read.drain_s + 10 <= pod["terminationGracePeriodSeconds"]
            places = {mount["mountPath"] for mount in container["volumeMounts"]}
            assert {str(read.data_dir), str(Path(given["TANDEM_CONFIG"]).parent)} == places
    # The test can fail: what the gateway does not know it does not take.
    with pytest.raises(ConfigurationError):
        loaded({}, settings["data"]["tandem.toml"] + 'place = "here"\n', tmp_path)


# ---------------------------------------------------------------------------- Compose and the image


def test_compose_starts_a_gateway_whose_settings_are_known(tmp_path: Path) -> None:
    [compose] = documents(DEPLOY / "compose.yaml")
    services = compose["services"]
    assert set(services) == {"gateway", "migrate", "postgres"}
    for service in services.values():
        assert set(service.get("depends_on", {})) <= set(services)
        named = {volume.partition(":")[0] for volume in service.get("volumes", [])}
        assert named <= set(compose["volumes"])
    gateway, migrate, postgres = services["gateway"], services["migrate"], services["postgres"]
    assert gateway["environment"] == migrate["environment"]
    given = {
        name: value.replace("${POSTGRES_PASSWORD}", "secret")
        for name, value in gateway["environment"].items()
    }
    read = loaded(given, None, tmp_path)
    assert [engine.base_model for engine in read.engines] == ["tandem/tiny"]
    account = postgres["environment"]
    database = f"{account['POSTGRES_USER']}:secret@postgres/{account['POSTGRES_DB']}"
    assert read.database_url == f"postgresql+asyncpg://{database}"
    assert int(gateway["stop_grace_period"].removesuffix("s")) > read.drain_s
    assert any(route in gateway["healthcheck"]["test"][-1] for route in HEALTH)
    assert gateway["image"] == migrate["image"]
    assert (DEPLOY / gateway["build"]["context"]).resolve() == ROOT
    assert (ROOT / gateway["build"]["dockerfile"]).is_file()


def test_the_image_is_made_of_what_there_is() -> None:
    text = re.sub(r"\\\n", " ", (DEPLOY / "Dockerfile").read_text())
    lines = [line.partition(" ")[::2] for line in text.splitlines() if line and not line.startswith("#")]
    said = dict(lines)
    assert next(word for word, _ in lines) == "FROM"
    version = re.fullmatch(r"python:3\.(\d+)-slim", said["FROM"])
    assert version is not None
    assert int(version[1]) >= int(PROJECT["requires-python"].rpartition(".")[2])
    [extras] = [value.partition("=")[2].split(",") for word, value in lines if word == "ARG"]
    assert set(extras) <= set(PROJECT["optional-dependencies"])
    command = [str(each) for each in yaml.safe_load(said["CMD"])]
    assert command[0] in PROJECT["scripts"]
    options = [option for option in command[2:] if option.startswith("--")]
    help_text = CliRunner().invoke(main, [command[1], "--help"]).output
    assert options and all(option in help_text for option in options)
    [data] = [line for word, line in lines if word == "ENV"]
    assert load_settings(dict([data.split("=")])).data_dir == Path(said["VOLUME"])
    sent = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"][
        "wheel"
    ]
    needed = {
        *packages["packages"],
        *PROJECT["license-files"],
        PROJECT["readme"],
        "pyproject.toml",
        "constraints.txt",
    }
    assert {line[1:] for line in sent if line.startswith("!")} == needed


def test_the_commands_of_the_manifests_exist() -> None:
    for path in MANIFESTS:
        for container in (each for pod in pods(path) for each in containers(pod)):
            words = shlex.split(" ".join(container.get("command", []) + container.get("args", [])))
            for at, word in enumerate(words):
                if word == "-m":
                    module = words[at + 1].replace(".", "/")
                    assert (ROOT / f"{module}.py").is_file()
                if word == "tandem":
                    assert words[at + 1] in main.commands
