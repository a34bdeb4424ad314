"""Worker, API and gates on the embedded broker: harm comes in as events, and every gate says stop."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import httpx
import msgspec
import pytest
from worker_process import DEADLINE_S

from stream_xp.adapters.kafka_admin import declared_topics
from stream_xp.adapters.topic_writer import TopicWriter
from stream_xp.domain.experiment import ExperimentSpec
from stream_xp.services.api.server import ServerThread, Service
from stream_xp.services.publish import plan_application, publish
from stream_xp.services.worker import WorkerThread
from stream_xp.settings import Secret, Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from stream_xp.adapters.embedded_broker import EmbeddedBroker

pytestmark = [pytest.mark.broker, pytest.mark.slow]

"""For whatever machine; everything ends as soon as it is done."""
TOKEN = "t" * 40
BEARER = {"authorization": f"Bearer {TOKEN}"}
DESIGN = {
    "experiment": "checkout",
    "owner": "tests",
    "hypothesis": "the canary is as good",
    "unit": "request",
    "planned_sample": 4000,
    "arms": [{"key": "stable", "weight": 0.5, "control": True}, {"key": "canary", "weight": 0.5}],
    "metrics": [
        {
            "key": "errors",
            "kind": "conversion",
            "attribution_window": "100ms",
            "role": "guardrail",
            "direction": "decrease",
            "margin": {"absolute": 0.1},
        },
    ],
}
HOOK = {"name": "podinfo", "namespace": "test", "phase": "Progressing", "checksum": "85d557f47b"}
WITH = {"metadata": {"experiment": "checkout", "arm": "canary"}}


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def send(settings: Settings, units: range, *, harmed: bool = False) -> None:
    with TopicWriter(settings) as writer:
        for unit in units:
            arm = ("stable", "canary")[unit % 2]
            event = {"time": now_ms(), "source": "/app", "unit": f"u{unit}"}
            shown = event | {"id": f"e{unit}", "experiment": "checkout", "arm": arm, "weight_epoch": 0}
            sent = [("exposures", shown)]
            if harmed and arm == "canary":
                sent.append(("rewards", event | {"id": f"r{unit}", "metric": "errors"}))
            for topic, body in sent:
                writer.send(settings.topic(topic), key=f"u{unit}".encode(), value=msgspec.json.encode(body))


class Stand:
    """A worker and an API on one broker."""

    def __init__(self, settings: Settings, client: httpx.Client, worker: WorkerThread) -> None:
        self.settings = settings
        self.client = client
        self.worker = worker

    def get(self, what: str) -> Any:
        return self.client.get(f"/api/v1/experiments/checkout{what}").json()

    def hook(self, name: str) -> int:
        return self.client.post(f"/flagger/{name}", json=HOOK | WITH).status_code

    def shell(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        shared = ("--bootstrap", self.settings.bootstrap, "--broker", "embedded")
        command = [sys.executable, "-m", "stream_xp", "gate", "checkout", *arguments, *shared]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            self.worker.check()
            assert time.monotonic() < deadline, self.get("/gate")
            time.sleep(0.1)


@pytest.fixture
def stand(embedded_broker: EmbeddedBroker) -> Iterator[Stand]:
    settings = Settings(
        bootstrap=embedded_broker.bootstrap,
        broker="embedded",
        partitions=2,
        allowed_lateness_ms=300,
        activation_delay_ms=500,
        idle_grace_ms=500,
        api_token=Secret(TOKEN),
    )
    for topic in declared_topics(settings):
        embedded_broker.create_topic(topic.name, topic.partitions)
    service = Service(settings)
    with (
        WorkerThread(settings) as worker,
        service.follower,
        ServerThread(service.app) as server,
        httpx.Client(base_url=server.url, timeout=60, trust_env=False, verify=False) as client,
    ):
        yield Stand(settings, client, worker)
        worker.check()


def test_harm_comes_in_and_every_gate_says_stop(stand: Stand) -> None:
    stand.until(lambda: stand.client.get("/readyz").status_code == 200)
    assert stand.get("/gate")["cause"] == "unknown_experiment"
    spec = msgspec.convert(DESIGN, ExperimentSpec)
    publish(stand.settings, plan_application(stand.settings, spec, now_ms=now_ms()))
    stand.until(lambda: stand.get("/gate")["cause"] == "no_data")
    time.sleep(1.0)  # the spec must govern before its first exposure
    send(stand.settings, range(40))
    stand.until(lambda: stand.get("/gate")["verdict"] == "continue")
    assert [stand.hook(name) for name in ("rollout", "confirm-promotion", "rollback")] == [200, 403, 403]
    undecided = stand.shell("--arm", "canary")
    assert (undecided.returncode, undecided.stdout.split(":")[0]) == (2, "continue"), undecided.stderr

    send(stand.settings, range(40, 640), harmed=True)
    stand.until(lambda: stand.get("/gate")["verdict"] == "stop")
    assert [stand.hook(name) for name in ("rollback", "rollout", "confirm-promotion")] == [200, 403, 403]
    assert stand.get("/analysis?arm=canary")["data"]["breached"] is True
    assert stand.client.get("/spinnaker/checkout").json()["status"] == "TERMINAL"
    begun = stand.client.post("/canary/checkout@canary", json={}).json()["canaryExecutionId"]
    judged = stand.client.get(f"/canary/{begun}").json()["result"]["judgeResult"]
    assert judged["score"]["score"] == 0
    stopped = stand.shell("--wait", "--json")
    assert stopped.returncode == 1, stopped.stderr
    assert msgspec.json.decode(stopped.stdout)["decision_id"] == stand.get("/gate")["decision_id"]
    assert stand.get("/config")["status"] == "stopped" or stand.get("/gate")["verdict"] == "stop"
    assert stand.get("/history")["items"]
    assert stand.client.get("/api/v1/service").json()["passed_over"] == {}


def test_an_alert_and_an_order_through_the_api_are_enacted(stand: Stand) -> None:
    spec = msgspec.convert(DESIGN, ExperimentSpec)
    publish(stand.settings, plan_application(stand.settings, spec, now_ms=now_ms()))
    time.sleep(1.0)
    send(stand.settings, range(40))
    stand.until(lambda: stand.get("/gate")["verdict"] == "continue")
    alert = {
        "status": "firing",
        "labels": {"alertname": "CheckoutErrors", "experiment": "checkout"},
        "startsAt": "2027-01-15T07:59:00Z",
        "fingerprint": "c8fef55b1fe2f6a8",
    }
    url = "/api/v1/alertmanager"
    assert stand.client.post(url, json={"version": "4", "alerts": [alert]}).status_code == 401
    answer = stand.client.post(url, json={"version": "4", "alerts": [alert]}, headers=BEARER)
    assert answer.json()["alerts"][0]["did"] == "ordered", answer.text
    stand.until(lambda: stand.get("/gate")["verdict"] == "stop")
    stand.until(lambda: stand.get("/config")["status"] == "stopped")
    assert stand.hook("rollback") == 200
    repeated = stand.client.post(url, json={"version": "4", "alerts": [alert]}, headers=BEARER)
    assert repeated.json()["alerts"][0]["did"] == "known"
    body = {"reason": "a false alarm", "actor": "kim"}
    reset = stand.client.post("/api/v1/experiments/checkout/orders/reset", json=body, headers=BEARER)
    assert reset.status_code == 202, reset.text
    stand.until(lambda: stand.get("")["config"]["status"] == "running")
    assert stand.get("/gate")["verdict"] != "stop"
    listed = [(one["action"], one["by"]) for one in stand.get("/signals")["items"]]
    assert listed == [("stop", "alertmanager"), ("reset", "kim (by api)")]


def test_the_process_serves_until_it_is_told_to_end(embedded_broker: EmbeddedBroker) -> None:
    settings = Settings(bootstrap=embedded_broker.bootstrap, broker="embedded")
    for topic in declared_topics(settings):
        embedded_broker.create_topic(topic.name, topic.partitions)
    shared = ("--bootstrap", settings.bootstrap, "--broker", "embedded", "--api-port", "0")
    command = [sys.executable, "-m", "stream_xp", "api", *shared]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        started = next(line for line in process.stderr if '"api started"' in line)
        port = msgspec.json.decode(started)["port"]
        deadline = time.monotonic() + DEADLINE_S
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, verify=False) as client:
            while client.get("/readyz").status_code != 200:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            assert client.get("/healthz").json()["status"] == "ok"
        process.terminate()
        assert process.wait(60) == 0


def test_a_gate_that_cannot_ask_is_no_answer() -> None:
    command = [sys.executable, "-m", "stream_xp", "gate", "checkout"]
    wrong = subprocess.run([*command, "--no-such-option"], capture_output=True, text=True, check=False)
    refused = subprocess.run(
        [*command, "--bootstrap", "kafka:9092"], capture_output=True, text=True, check=False
    )
    assert (wrong.returncode, refused.returncode) == (3, 3)
    assert "STREAM_XP_SECURITY_PROTOCOL" in refused.stderr
