"""Compose, chart, image and code name the same settings, ports, topics and commands."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from typing import Any

import click
import pytest
import yaml

from stream_xp.adapters.kafka_admin import load_topics
from stream_xp.cli import COMMANDS, main
from stream_xp.services.notify.service import JOIN_S
from stream_xp.services.notify.targets import MAX_TARGETS, Event, Format, TargetFields, load_targets
from stream_xp.settings import Settings
from tests.deploy.kubernetes import faults, resources
from tests.deploy.test_chart import EVERYTHING, STRIMZI, of_kind, pods, rendered
from tests.deploy.test_compose import STREAM_XP, mounted, services
from tests.deploy.tools import ROOT

DEPLOY = ROOT / "deploy"


def chart_environments() -> dict[str, dict[str, str]]:
    found = rendered(EVERYTHING)
    shared = of_kind(found, "ConfigMap")["stream-xp"]["data"]
    environments = {}
    for name, pod in pods(found).items():
        (container,) = pod["containers"]
        environments[name] = {one["name"]: one["value"] for one in container.get("env", [])}
        if "envFrom" in container:
            environments[name] |= shared
    return environments


def compose_environments() -> dict[str, dict[str, str]]:
    return {name: services()[name]["environment"] for name in STREAM_XP}


def load(environ: dict[str, str], tmp_path: Any) -> Settings:
    """What the program makes of an environment, with the files that it names."""
    there = dict(environ)
    for name, value in environ.items():
        if name.endswith("_FILE") and value.startswith("/etc/stream-xp/"):
            file = tmp_path / value.strip("/").replace("/", "-")
            file.write_text("0" * 40)
            there[name] = str(file)
    return Settings.load(there)


def test_every_program_loads_the_settings_it_is_given(tmp_path: Any) -> None:
    environments = {**chart_environments(), **compose_environments()}
    assert len(environments) == 9
    for name, environ in environments.items():
        settings = load(environ, tmp_path)
        assert settings.security.security_protocol == environ["STREAM_XP_SECURITY_PROTOCOL"], name


def test_defaults_of_the_chart_are_what_the_program_gets(tmp_path: Any) -> None:
    values = yaml.safe_load((DEPLOY / "helm" / "stream-xp" / "values.yaml").read_text())
    settings = load(chart_environments()["stream-xp-worker"], tmp_path)
    kafka = values["kafka"]
    assert (settings.prefix, settings.group_id) == (kafka["prefix"], kafka["groupId"])
    assert (settings.partitions, settings.replication, settings.min_insync_replicas) == (
        kafka["partitions"],
        kafka["replication"],
        kafka["minInsyncReplicas"],
    )
    assert settings.bootstrap == "kafka-1:9093,kafka-2:9093"
    assert settings.security.sasl_mechanism == kafka["saslMechanism"]
    # A worker that is ended must leave its group before it is killed.
    assert 1000 * values["worker"]["terminationGracePeriodSeconds"] > settings.session_timeout_ms


def test_ports(tmp_path: Any) -> None:
    chart, composed = chart_environments(), compose_environments()
    found = rendered(EVERYTHING)
    metrics, api = load(composed["worker"], tmp_path), load(composed["api"], tmp_path)
    assert metrics.metrics_port == load(chart["stream-xp-worker"], tmp_path).metrics_port == 9464
    assert api.api_port == load(chart["stream-xp-api"], tmp_path).api_port == Settings().api_port
    notify = load(composed["notify"], tmp_path)
    assert (
        notify.metrics_port == load(chart["stream-xp-notify"], tmp_path).metrics_port == metrics.metrics_port
    )
    for name, port in (
        ("stream-xp-worker", metrics.metrics_port),
        ("stream-xp-api", api.api_port),
        ("stream-xp-notify", notify.metrics_port),
    ):
        assert [one["containerPort"] for one in pods(found)[name]["containers"][0]["ports"]] == [port]
        assert [one["port"] for one in of_kind(found, "Service")[name]["spec"]["ports"]] == [port]
    # In a container loopback is nobody else's; outside of one it is the default.
    assert {metrics.metrics_host, notify.metrics_host, api.api_host} == {"0.0.0.0"}
    assert {Settings().metrics_host, Settings().api_host} == {"127.0.0.1"}
    assert [port["target"] for port in services()["api"]["ports"]] == [api.api_port]


def test_commands_and_options_are_there() -> None:
    given = [services()[name]["command"] for name in STREAM_XP]
    for pod in pods(rendered(EVERYTHING)).values():
        (container,) = pod["containers"]
        given.append(container["args"])
        given += [
            container[probe]["exec"]["command"][1:]
            for probe in ("startupProbe", "livenessProbe", "readinessProbe")
            if "exec" in container.get(probe, {})
        ]
    assert len(given) == 15
    for words in given:
        assert words[0] in COMMANDS, words
        command, rest = main.get_command(click.Context(main), words[0]), words[1:]
        if isinstance(command, click.Group):
            command, rest = command.commands[rest[0]], rest[1:]
        assert command is not None
        options = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in rest if word.startswith("--")} <= options, words


def test_the_paths_of_probes_and_gates_are_routes() -> None:
    routes = pytest.importorskip("stream_xp.services.api.routes")
    known = {(route.method, re.sub(r"\{\w+\}", "*", route.path)) for route in (*routes.READS, *routes.WRITES)}
    (container,) = pods(rendered(EVERYTHING))["stream-xp-api"]["containers"]
    probes = {
        container[probe]["httpGet"]["path"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")
    }
    assert {("GET", path) for path in probes} <= known
    assert ("GET", "/readyz") in known
    assert "8080/readyz" in services()["api"]["healthcheck"]["test"][-1]
    for file in (DEPLOY / "flagger").glob("*.yaml"):
        for canary in resources(file.read_text()):
            for hook in canary["spec"]["analysis"]["webhooks"]:
                assert ("POST", "/flagger/" + hook["type"]) in known
                assert hook["url"].endswith(":8080/flagger/" + hook["type"])
                assert hook["metadata"].keys() == {"experiment", "arm"}
    for file in (DEPLOY / "argo").glob("*.yaml"):
        for template in resources(file.read_text()):
            for metric in template["spec"]["metrics"]:
                path = re.sub(r"\{\{[\w.]+\}\}", "*", metric["provider"]["web"]["url"]).removeprefix(
                    "http://*"
                )
                assert ("GET", path.partition("?")[0]) in known


def test_the_conditions_of_argo_read_fields_that_are_always_there() -> None:
    gates = pytest.importorskip("stream_xp.services.api.gates")
    required = set(gates.AnalysisData.__struct_fields__)
    for file in (DEPLOY / "argo").glob("*.yaml"):
        for template in resources(file.read_text()):
            for metric in template["spec"]["metrics"]:
                conditions = metric["successCondition"] + " " + metric["failureCondition"]
                assert set(re.findall(r"result\.(\w+)", conditions)) == {"ok", "breached"} <= required


@pytest.mark.parametrize("folder", ["argo", "flagger", "strimzi"])
def test_the_examples_are_what_their_operators_take(folder: str) -> None:
    files = sorted((DEPLOY / folder).glob("*.yaml"))
    assert files
    for file in files:
        for one in resources(file.read_text()):
            assert faults(one, "1.37.0") == []


def test_the_address_of_the_examples_is_that_of_the_chart() -> None:
    service = of_kind(rendered(EVERYTHING), "Service")["stream-xp-api"]
    address = f"{service['metadata']['name']}.stream-xp:{service['spec']['ports'][0]['port']}"
    for folder in ("argo", "flagger"):
        for file in (DEPLOY / folder).glob("*.yaml"):
            assert set(re.findall(r"stream-xp-api[\w.:-]*", file.read_text())) == {address}


def test_an_api_of_the_chart_answers_to_the_names_of_its_service(tmp_path: Any) -> None:
    settings = load(chart_environments()["stream-xp-api"], tmp_path)
    assert set(settings.api_allowed_hosts) >= {
        "stream-xp-api",
        "stream-xp-api.checkout",
        "stream-xp-api.checkout.svc",
        "stream-xp-api.checkout.svc.cluster.local",
    }
    assert settings.api_token is not None
    assert load(compose_environments()["api"], tmp_path).api_token is None


def test_the_topics_of_strimzi_are_the_declared_ones() -> None:
    wanted = {
        topic.name: (topic.partitions, topic.replication, topic.config)
        for topic in load_topics("xp.", 12, replication=3, min_insync_replicas=2)
    }
    plain = resources((DEPLOY / "strimzi" / "topics.yaml").read_text())
    for found in (plain, list(of_kind(rendered(STRIMZI), "KafkaTopic").values())):
        given = {
            one["spec"]["topicName"]: (
                one["spec"]["partitions"],
                one["spec"]["replicas"],
                {name: str(value) for name, value in one["spec"]["config"].items()},
            )
            for one in found
        }
        assert given == wanted
    for one in of_kind(rendered(STRIMZI), "KafkaTopic").values():
        assert one["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
        assert one["metadata"]["labels"]["strimzi.io/cluster"] == "main"
        assert one["metadata"]["namespace"] == "kafka"


def test_the_generated_files_are_as_generated() -> None:
    command = [sys.executable, str(DEPLOY / "strimzi" / "generate.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_image_runs_as_the_chart_says() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    (user,) = re.findall(r"^USER (\d+):(\d+)$", text, re.MULTILINE)
    security = pods(rendered(EVERYTHING))["stream-xp-worker"]["securityContext"]
    assert user == (str(security["runAsUser"]), str(security["runAsGroup"]))
    (health,) = re.findall(r"^HEALTHCHECK .* CMD (\[.*\])$", text, re.MULTILINE)
    assert json.loads(health) == ["stream-xp", "health"]
    assert len(re.findall(r"^FROM ", text, re.MULTILINE)) == 2
    named = set(re.findall(r"STREAM_XP_[A-Z_]+(?==)", text))
    assert named == {"STREAM_XP_HEALTH_FILE"}
    assert "/tmp/stream-xp-health" in text
    assert chart_environments()["stream-xp-worker"]["STREAM_XP_HEALTH_FILE"] == "/tmp/stream-xp-health"
    assert chart_environments()["stream-xp-notify"]["STREAM_XP_HEALTH_FILE"] == "/tmp/stream-xp-health"
    for name in ("worker", "notify"):
        assert compose_environments()[name]["STREAM_XP_HEALTH_FILE"] == "/tmp/stream-xp-health"


# --- what is in the image -------------------------------------------------------------------------------------------


def pins(lock: str) -> dict[str, str]:
    """Version of each package that a lock names."""
    return dict(re.findall(r"^([a-z0-9._-]+)==([^ ;]+)", (ROOT / lock).read_text(), re.MULTILINE))


def names(requirements: list[str]) -> set[str]:
    return {re.match(r"[A-Za-z0-9._-]+", one)[0].lower() for one in requirements}


def test_the_image_holds_what_the_program_and_its_traces_need_at_the_versions_that_are_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    image, tested = pins("deploy/requirements.lock"), pins("requirements.lock")
    assert names(project["dependencies"]) | names(extras["otel"]) <= image.keys()
    assert not (names(extras["dev"]) | names(extras["embedded"])) & image.keys()
    assert image.items() <= tested.items()
    text = (DEPLOY / "Dockerfile").read_text()
    assert "--require-hashes -r deploy/requirements.lock" in text
    (made,) = re.findall(
        r"^\t\$\(COMPILE\) .*deploy/requirements.lock.*$", (ROOT / "Makefile").read_text(), re.MULTILINE
    )
    assert re.findall(r"--extra (\S+)", made) == ["otel"]


# --- notify ------------------------------------------------------------------------------------------------------


def targets_option(words: list[str]) -> str:
    return words[words.index("--targets") + 1]


def test_a_notifier_of_the_chart_reads_its_targets_and_their_secrets(tmp_path: Any) -> None:
    pod = pods(rendered(EVERYTHING))["stream-xp-notify"]
    (container,) = pod["containers"]
    mounts = {one["mountPath"]: one["name"] for one in container["volumeMounts"]}
    volumes = {one["name"]: one for one in pod["volumes"]}
    folder, _, file = targets_option(container["args"]).rpartition("/")
    name = volumes[mounts[folder]]["configMap"]["name"]
    text = of_kind(rendered(EVERYTHING), "ConfigMap")[name]["data"][file]
    secrets = "/etc/stream-xp/notify-secrets"
    # Without `items` each entry of a secret is a file of its name.
    assert volumes[mounts[secrets]]["secret"] == {"secretName": "notify", "defaultMode": 288}
    (tmp_path / "ci-keys").write_text("whsec_" + "A" * 44)
    (tmp_path / "chat-url").write_text("https://hooks.slack.com/services/T0/B0/x")
    path = tmp_path / "targets.yaml"
    path.write_text(text.replace(secrets, str(tmp_path)))
    ci, chat = load_targets(path, load(chart_environments()["stream-xp-notify"], tmp_path), {})
    assert (ci.name, ci.where.host, len(ci.keys), ci.events) == (
        "ci",
        "ci.example.com",
        1,
        {Event.STOP, Event.SHIP},
    )
    assert (chat.where.host, chat.where.path, chat.format) == (
        "hooks.slack.com",
        "/services/T0/B0/x",
        Format.SLACK,
    )


def test_the_values_of_a_target_are_the_fields_of_its_file() -> None:
    schema = json.loads((DEPLOY / "helm" / "stream-xp" / "values.schema.json").read_text())
    notify = schema["properties"]["notify"]["properties"]
    target = notify["targets"]["items"]
    # A pod is given no variables of the user's.
    assert target["properties"].keys() == set(TargetFields.__struct_fields__) - {"url_env", "secret_env"}
    assert target["properties"]["events"]["items"]["enum"] == list(Event)
    assert target["properties"]["format"]["enum"] == list(Format)
    assert notify["targets"]["maxItems"] == MAX_TARGETS
    (signals,) = [
        one
        for one in load_topics("xp.", 12, replication=3, min_insync_replicas=2)
        if one.name == "xp.signals"
    ]
    assert notify["replicas"]["maximum"] == signals.partitions


def test_a_notifier_of_compose_sends_to_the_inbox_beside_it(tmp_path: Any) -> None:
    notify, inbox = services()["notify"], services()["inbox"]
    folder, _, file = targets_option(notify["command"]).rpartition("/")
    (target,) = load_targets(
        mounted("notify")[folder] / file, load(notify["environment"], tmp_path), notify["environment"]
    )
    assert (target.where.host, target.where.port) == ("inbox", int(inbox["command"][0]))
    assert target.allow_private


def test_a_notifier_may_end_its_attempt_before_it_is_killed() -> None:
    pod = of_kind(rendered(EVERYTHING), "Deployment")["stream-xp-notify"]["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > JOIN_S
    assert services()["notify"]["stop_grace_period"] == f"{pod['terminationGracePeriodSeconds']}s"
