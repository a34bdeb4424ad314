"""docker-compose.yml as docker compose reads it: one command brings up everything, on this machine only."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.request
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.tools import ROOT, compose

STREAM_XP = {"topics", "worker", "api", "notify", "traffic"}
OTHERS = {"kafka", "prometheus", "alertmanager", "grafana", "inbox"}
OF_A_PROFILE = {"notify", "inbox"}


@cache
def services() -> dict[str, dict[str, Any]]:
    done = compose("--profile", "notify", "config", "--format", "json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)["services"]
    return found


def test_docker_compose_takes_the_file_and_has_everything() -> None:
    assert services().keys() == STREAM_XP | OTHERS


def test_messages_are_sent_only_where_they_are_asked_for() -> None:
    done = compose("config", "--services")
    assert set(done.stdout.split()) == (STREAM_XP | OTHERS) - OF_A_PROFILE
    for one in OF_A_PROFILE:
        assert "ports" not in services()[one]


def test_ports_are_published_on_loopback_only() -> None:
    published = {
        (name, port["host_ip"], int(port["published"]), port["target"])
        for name, service in services().items()
        for port in service.get("ports", [])
    }
    assert {host for _, host, _, _ in published} == {"127.0.0.1"}
    assert {(name, at) for name, _, at, _ in published} == {
        ("kafka", 9092),
        ("api", 8080),
        ("prometheus", 9090),
        ("alertmanager", 9093),
        ("grafana", 3000),
    }
    assert all(service.get("network_mode") != "host" for service in services().values())


def test_every_container_is_confined() -> None:
    for name, service in services().items():
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert int(service["mem_limit"]) <= 2 * 1024**3, name
        assert "privileged" not in service, name
        assert not any("docker.sock" in volume["source"] for volume in service.get("volumes", [])), name
        if name != "kafka":
            assert service["read_only"] is True, name
            assert service["cap_drop"] == ["ALL"], name
            assert service["pids_limit"] > 0, name


def test_no_password_is_in_it() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    assert re.findall(r"(?i)\b\w*(?:password|secret|token)\w*\s*[:=]\s*\S+", text) == []


def test_every_file_that_is_mounted_is_there_and_read_only() -> None:
    mounted = [
        volume
        for service in services().values()
        for volume in service.get("volumes", [])
        if volume["type"] == "bind"
    ]
    assert len(mounted) == 8
    for volume in mounted:
        assert Path(volume["source"]).exists(), volume["source"]
        assert volume["read_only"] is True, volume["source"]


def test_each_waits_for_what_it_needs() -> None:
    def conditions(name: str) -> dict[str, str]:
        return {other: how["condition"] for other, how in services()[name].get("depends_on", {}).items()}

    assert conditions("topics") == {"kafka": "service_healthy"}
    for name in ("worker", "api", "notify"):
        assert conditions(name) == {"topics": "service_completed_successfully"}
    assert conditions("traffic") == {"worker": "service_healthy"}
    for name in ("worker", "notify"):
        assert services()[name]["healthcheck"]["test"] == ["CMD", "stream-xp", "health"]


def mounted(name: str) -> dict[str, Path]:
    volumes = services()[name]["volumes"]
    return {one["target"]: Path(one["source"]) for one in volumes if one["type"] == "bind"}


def test_prometheus_scrapes_and_alerts_the_services_at_their_ports() -> None:
    files = mounted("prometheus")
    config = yaml.safe_load(files["/etc/prometheus/prometheus.yml"].read_text())
    found = {
        (job["job_name"], target)
        for job in config["scrape_configs"]
        for group in job.get("static_configs", ())
        for target in group["targets"]
    }
    found |= {
        (job["job_name"], f"{name}:{group['port']}")
        for job in config["scrape_configs"]
        for group in job.get("dns_sd_configs", ())
        for name in group["names"]
    }
    assert found == {
        (f"stream-xp-{name}", f"{name}:{service['environment']['STREAM_XP_METRICS_PORT']}")
        for name, service in services().items()
        if "STREAM_XP_METRICS_PORT" in (service.get("environment") or {})
    }
    # One that is not always there is found by its name, and not missed where it is not.
    by_name = {
        name
        for job in config["scrape_configs"]
        for group in job.get("dns_sd_configs", ())
        for name in group["names"]
    }
    assert by_name == {name for name, service in services().items() if "profiles" in service} - {"inbox"}
    (manager,) = config["alerting"]["alertmanagers"]
    assert manager["static_configs"] == [{"targets": ["alertmanager:9093"]}]
    # Relative to the file, so to /etc/prometheus.
    assert config["rule_files"] == ["rules/*.yml"]
    assert list(files["/etc/prometheus/rules"].glob("*.yml"))


def test_alertmanager_shows_alerts_and_sends_them_nowhere() -> None:
    config = yaml.safe_load(mounted("alertmanager")["/etc/alertmanager/alertmanager.yml"].read_text())
    assert config["receivers"] == [{"name": config["route"]["receiver"]}]


def test_grafana_finds_its_source_and_its_dashboards() -> None:
    files = mounted("grafana")
    (sources,) = files["/etc/grafana/provisioning/datasources"].glob("*.yml")
    (source,) = yaml.safe_load(sources.read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (providers,) = files["/etc/grafana/provisioning/dashboards"].glob("*.yml")
    (provider,) = yaml.safe_load(providers.read_text())["providers"]
    assert list(files[provider["options"]["path"]].glob("*.json"))


def test_the_inbox_prints_what_it_is_sent_as_one_line_and_takes_it() -> None:
    program = mounted("inbox")["/inbox.py"]
    with subprocess.Popen([sys.executable, program, "0"], stdout=subprocess.PIPE, text=True) as inbox:
        try:
            assert inbox.stdout is not None
            port = json.loads(inbox.stdout.readline()).rpartition(" ")[2]
            for body in (b'{"text": "*STOP* a\\nb"}', b"[]", b"\xff"):
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/", data=body, timeout=30) as answer:
                    assert answer.status == 204
            assert json.loads(inbox.stdout.readline()) == "*STOP* a\nb"
            assert json.loads(inbox.stdout.readline()) == "[]"
            assert json.loads(inbox.stdout.readline()) == "\N{REPLACEMENT CHARACTER}"
        finally:
            inbox.terminate()
