"""The Helm chart as helm renders it: accepted by Kubernetes, confined, and refused where it cannot work."""

from __future__ import annotations

import ipaddress
from functools import cache
from typing import Any

import pytest
import yaml

from stream_xp.adapters.webhook import may_connect
from tests.deploy.kubernetes import RELEASES, faults, resources
from tests.deploy.tools import ROOT, helm

CHART = str(ROOT / "deploy" / "helm" / "stream-xp")
SASL = {
    "kafka.bootstrap": "kafka-1:9093\\,kafka-2:9093",
    "kafka.saslUsername": "stream-xp",
    "kafka.saslPasswordSecret.name": "kafka-password",
    "kafka.caSecret.name": "kafka-ca",
}
EVERYTHING = {
    **SASL,
    "kafka.clientCertSecret.name": "kafka-client",
    "topics.mode": "job",
    "worker.autoscaling.enabled": "true",
    "api.tokenSecret.name": "api-token",
    "notify.enabled": "true",
    "notify.replicas": "2",
    "notify.allowedHosts[0]": "ci.example.com",
    "notify.allowedHosts[1]": "hooks.slack.com",
    "notify.secret.name": "notify",
    "notify.targets[0].name": "ci",
    "notify.targets[0].url": "https://ci.example.com/hooks/stream-xp",
    "notify.targets[0].secret_file": "/etc/stream-xp/notify-secrets/ci-keys",
    "notify.targets[0].events": "{stop,ship}",
    "notify.targets[1].name": "chat",
    "notify.targets[1].url_file": "/etc/stream-xp/notify-secrets/chat-url",
    "notify.targets[1].format": "slack",
    "metrics.serviceMonitor.enabled": "true",
    "metrics.serviceMonitor.labels.release": "kube-prometheus-stack",
    "image.digest": "sha256:" + "0" * 64,
    "image.pullSecrets[0].name": "registry",
    "worker.nodeSelector.disk": "fast",
}
STRIMZI = {
    **SASL,
    "topics.mode": "strimzi",
    "topics.strimziCluster": "main",
    "topics.strimziNamespace": "kafka",
}
PLAIN = {"kafka.bootstrap": "kafka:9092", "kafka.securityProtocol": "PLAINTEXT", "api.enabled": "false"}
INSTALLS = {"sasl": SASL, "everything": EVERYTHING, "strimzi": STRIMZI, "plain": PLAIN}


def arguments(values: dict[str, str]) -> list[str]:
    return [part for name, value in values.items() for part in ("--set", f"{name}={value}")]


def rendered(values: dict[str, str]) -> list[dict[str, Any]]:
    return resources(_text(tuple(arguments(values))))


@cache
def _text(chosen: tuple[str, ...]) -> str:
    done = helm("template", "stream-xp", CHART, "--namespace", "checkout", *chosen)
    assert done.returncode == 0, done.stderr
    return done.stdout


def of_kind(found: list[dict[str, Any]], kind: str) -> dict[str, dict[str, Any]]:
    return {one["metadata"]["name"]: one for one in found if one["kind"] == kind}


def pods(found: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    owners = {**of_kind(found, "Deployment"), **of_kind(found, "Job")}
    return {name: one["spec"]["template"]["spec"] for name, one in owners.items()}


@pytest.mark.parametrize("values", INSTALLS.values(), ids=INSTALLS)
def test_helm_lint_finds_nothing(values: dict[str, str]) -> None:
    done = helm("lint", "--strict", CHART, *arguments(values))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("values", INSTALLS.values(), ids=INSTALLS)
def test_kubernetes_takes_every_resource(values: dict[str, str], release: str) -> None:
    found = rendered(values)
    assert found
    assert [fault for one in found for fault in faults(one, release)] == []


def test_the_schemas_refuse_what_kubernetes_would() -> None:
    (worker,) = of_kind(rendered(PLAIN), "Deployment").values()
    worker["spec"]["template"]["spec"]["containers"][0]["imagePullPolice"] = "Always"
    worker["spec"]["replicas"] = "two"
    assert len(faults(worker, RELEASES[-1])) == 2


def test_what_is_installed() -> None:
    found = rendered(EVERYTHING)
    names = sorted(f"{one['kind']}/{one['metadata']['name']}" for one in found)
    assert names == [
        "ConfigMap/stream-xp",
        "ConfigMap/stream-xp-notify",
        "Deployment/stream-xp-api",
        "Deployment/stream-xp-notify",
        "Deployment/stream-xp-worker",
        "HorizontalPodAutoscaler/stream-xp-worker",
        "Job/stream-xp-topics",
        "NetworkPolicy/stream-xp",
        "NetworkPolicy/stream-xp-api",
        "NetworkPolicy/stream-xp-notify",
        "NetworkPolicy/stream-xp-worker",
        "PodDisruptionBudget/stream-xp-api",
        "PodDisruptionBudget/stream-xp-notify",
        "PodDisruptionBudget/stream-xp-worker",
        "Service/stream-xp-api",
        "Service/stream-xp-notify",
        "Service/stream-xp-worker",
        "ServiceAccount/stream-xp",
        "ServiceMonitor/stream-xp",
    ]


def test_by_default_nothing_needs_an_operator_or_scales_by_itself_or_sends_anything_outside() -> None:
    found = rendered(SASL)
    assert {one["kind"] for one in found}.isdisjoint(
        {"HorizontalPodAutoscaler", "ServiceMonitor", "KafkaTopic", "Job"}
    )
    assert not [one for one in found if "notify" in one["metadata"]["name"]]


def test_every_pod_is_confined() -> None:
    found = pods(rendered(EVERYTHING))
    assert len(found) == 4
    for name, pod in found.items():
        assert pod["automountServiceAccountToken"] is False, name
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["runAsUser"] == 10001, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys(), name
        for container in pod["containers"]:
            confined = container["securityContext"]
            assert confined["readOnlyRootFilesystem"] is True, name
            assert confined["allowPrivilegeEscalation"] is False, name
            assert confined["capabilities"] == {"drop": ["ALL"]}, name
            assert "memory" in container["resources"]["limits"], name
            assert container["image"] == "stream-xp@sha256:" + "0" * 64
        kinds = {next(iter(volume.keys() - {"name"})) for volume in pod["volumes"]}
        assert kinds - {"configMap"} == {"emptyDir", "secret"}


def test_each_mount_is_a_volume_and_holds_the_file_that_a_setting_names() -> None:
    found = rendered(EVERYTHING)
    settings = of_kind(found, "ConfigMap")["stream-xp"]["data"]
    for name, pod in pods(found).items():
        (container,) = pod["containers"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        files = {"/tmp"}
        for mount in container["volumeMounts"]:
            for item in volumes.pop(mount["name"]).get("secret", {}).get("items", []):
                files.add(f"{mount['mountPath']}/{item['path']}")
        assert volumes == {}, name
        variables = {one["name"]: one["value"] for one in container.get("env", [])}
        if "envFrom" in container:
            assert container["envFrom"] == [{"configMapRef": {"name": "stream-xp"}}]
            variables |= settings
        named = {value for key, value in variables.items() if key.endswith("_FILE") and "HEALTH" not in key}
        assert len(named) == (5 if name == "stream-xp-api" else 4)
        assert named <= files, name


def test_no_secret_is_in_a_text() -> None:
    found = rendered(EVERYTHING)
    text = yaml.safe_dump_all(found)
    assert "STREAM_XP_SASL_PASSWORD:" not in text
    assert "kind: Secret" not in text


def test_the_probes_of_a_worker_look_at_progress() -> None:
    (container,) = pods(rendered(SASL))["stream-xp-worker"]["containers"]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["exec"]["command"][:2] == ["stream-xp", "health"]
        # The command starts a Python.
        assert container[probe]["timeoutSeconds"] >= 5


def test_policies_and_services_choose_the_pods() -> None:
    found = rendered(EVERYTHING)
    labels = {
        name: one["spec"]["template"]["metadata"]["labels"]
        for name, one in of_kind(found, "Deployment").items()
    }
    ports = {
        name: {port["name"]: port["containerPort"] for port in pod["containers"][0]["ports"]}
        for name, pod in pods(found).items()
        if name != "stream-xp-topics"
    }
    for name, service in of_kind(found, "Service").items():
        assert service["spec"]["selector"].items() <= labels[name].items()
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports[name].keys()
    for name, policy in of_kind(found, "NetworkPolicy").items():
        wanted = policy["spec"]["podSelector"]["matchLabels"].items()
        chosen = {deployment for deployment, have in labels.items() if wanted <= have.items()}
        assert chosen == (set(labels) if name == "stream-xp" else {name})
        for rule in policy["spec"].get("ingress", []):
            assert {port["port"] for port in rule["ports"]} <= set(ports[name].values())
            assert rule["from"]
    for name, budget in of_kind(found, "PodDisruptionBudget").items():
        assert budget["spec"]["selector"]["matchLabels"].items() <= labels[name].items()
    monitor = of_kind(found, "ServiceMonitor")["stream-xp"]
    assert monitor["metadata"]["labels"]["release"] == "kube-prometheus-stack"
    (endpoint,) = monitor["spec"]["endpoints"]
    for name in ("stream-xp-worker", "stream-xp-notify"):
        assert endpoint["port"] in ports[name]
    (relabeling,) = endpoint["relabelings"]
    assert relabeling["sourceLabels"] == ["__meta_kubernetes_service_label_app_kubernetes_io_component"]
    components = {
        service["metadata"]["labels"]["app.kubernetes.io/component"]
        for service in of_kind(found, "Service").values()
        if endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
    }
    prometheus = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    assert {relabeling["replacement"].replace("$1", one) for one in components} == {
        job["job_name"] for job in prometheus["scrape_configs"]
    }
    scaled = of_kind(found, "HorizontalPodAutoscaler")["stream-xp-worker"]["spec"]
    assert scaled["scaleTargetRef"]["name"] in labels
    assert "replicas" not in of_kind(found, "Deployment")["stream-xp-worker"]["spec"]


def test_with_no_one_named_nobody_may_call() -> None:
    closed = rendered({**SASL, "networkPolicy.apiFrom": "null", "networkPolicy.metricsFrom": "null"})
    policies = of_kind(closed, "NetworkPolicy")
    assert "ingress" not in policies["stream-xp-api"]["spec"]
    assert policies["stream-xp-api"]["spec"]["policyTypes"] == ["Ingress"]
    assert "ingress" not in policies["stream-xp-worker"]["spec"]


def test_only_a_notifier_may_send_to_the_outside_and_not_to_private_addresses() -> None:
    policies = of_kind(rendered(EVERYTHING), "NetworkPolicy")
    beyond = {name for name, one in policies.items() if name != "stream-xp" and "egress" in one["spec"]}
    assert beyond == {"stream-xp-notify"}
    (rule,) = policies["stream-xp-notify"]["spec"]["egress"]
    assert [port["port"] for port in rule["ports"]] == [443]
    for block in (one["ipBlock"] for one in rule["to"]):
        whole = ipaddress.ip_network(block["cidr"])
        closed = [ipaddress.ip_network(one) for one in block["except"]]
        assert all(one != whole and one.subnet_of(whole) for one in closed)
        # What the program itself connects to nowhere, or only where it is allowed, but for this machine.
        for address in (
            "10.1.2.3",
            "169.254.169.254",
            "100.64.0.1",
            "192.168.1.1",
            "172.31.0.1",
            "fd00::1",
            "fe80::1",
        ):
            found = ipaddress.ip_address(address)
            assert found.version != whole.version or any(found in one for one in closed)
            assert not may_connect(address, allow_private=False)
    shut = of_kind(rendered({**EVERYTHING, "networkPolicy.notifyTo": "null"}), "NetworkPolicy")
    assert "egress" not in shut["stream-xp-notify"]["spec"]
    assert shut["stream-xp-notify"]["spec"]["policyTypes"] == ["Ingress", "Egress"]


def test_one_notifier_alone_may_be_drained() -> None:
    alone = of_kind(rendered({**EVERYTHING, "notify.replicas": "1"}), "PodDisruptionBudget")
    assert "stream-xp-notify" not in alone


REFUSED = {
    "no brokers": ({"kafka.bootstrap": ""}, "kafka.bootstrap must be set"),
    "no password": (
        {"kafka.saslPasswordSecret.name": ""},
        "needs kafka.saslUsername and kafka.saslPasswordSecret",
    ),
    "no authority": ({"kafka.caSecret.name": ""}, "need kafka.caSecret.name"),
    "too few copies": ({"kafka.replication": "1"}, "kafka.minInsyncReplicas must be at most"),
    "idle workers": ({"worker.replicas": "13"}, "worker.replicas must be at most kafka.partitions"),
    "idle workers by load": (
        {"worker.autoscaling.enabled": "true", "worker.autoscaling.maxReplicas": "13"},
        "worker.autoscaling.maxReplicas must lie between",
    ),
    "no cluster": ({"topics.mode": "strimzi"}, "topics.strimziCluster must be set"),
    "a setting with a value of its own": ({"settings.STREAM_XP_PREFIX": "other."}, "STREAM_XP_PREFIX"),
    "no setting": ({"settings.PATH": "/bin"}, "PATH"),
    "a password in a value": ({"settings.STREAM_XP_SASL_PASSWORD": "hunter2"}, "STREAM_XP_SASL_PASSWORD"),
    "nobody to tell": ({"notify.enabled": "true"}, "notify.enabled needs notify.targets"),
    "nowhere to send": (
        {"notify.enabled": "true", "notify.targets[0].name": "ci"},
        "notify.enabled needs notify.allowedHosts",
    ),
    "no secret of targets": (
        {
            "notify.enabled": "true",
            "notify.allowedHosts[0]": "ci.example.com",
            "notify.targets[0].name": "ci",
            "notify.targets[0].secret_file": "/etc/stream-xp/notify-secrets/ci-keys",
        },
        "notify.secret.name must be set",
    ),
    "a key of a target in a value": (
        {"notify.targets[0].name": "ci", "notify.targets[0].secret": "whsec_AAAA"},
        "secret",
    ),
    "a file of a target that is elsewhere": (
        {"notify.targets[0].name": "ci", "notify.targets[0].url_file": "/etc/passwd"},
        "url_file",
    ),
    "an allowed host that is a pattern": ({"notify.allowedHosts[0]": "*"}, "allowedHosts"),
    "hosts of messages as a setting": (
        {"settings.STREAM_XP_NOTIFY_ALLOWED_HOSTS": "ci.example.com"},
        "STREAM_XP_NOTIFY_ALLOWED_HOSTS",
    ),
    "a misspelt value": ({"worker.replica": "3"}, "replica"),
    "a protocol that is none": ({"kafka.securityProtocol": "TLS"}, "securityProtocol"),
}


@pytest.mark.parametrize(("changed", "wanted"), REFUSED.values(), ids=REFUSED)
def test_values_that_cannot_work_are_refused_by_name(changed: dict[str, str], wanted: str) -> None:
    done = helm("template", "stream-xp", CHART, *arguments({**SASL, **changed}))
    assert done.returncode != 0
    assert wanted in done.stderr
