"""Worker, API and gates on the embedded broker: harm comes in as events, and every gate says stop."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import httpx
import msgspec
import pytest
from embedded_world import apply, send, settings_with_topics, until
from worker_process import DEADLINE_S

from stream_xp.services.api.server import ServerThread, Service
from stream_xp.services.worker import WorkerThread
from stream_xp.settings import Secret, Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from stream_xp.adapters.embedded_broker import EmbeddedBroker

pytestmark = [pytest.mark.broker, pytest.mark.slow]

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

    def send(self, units: range, *, harmed: bool = False) -> None:
        """Expose units; those of the canary all have an error, if it is harmed."""
        arms = ("stable", "canary")
        send(self.settings, units, experiment="checkout", arms=arms, harm="errors" if harmed else None)

    def until(self, condition: Callable[[], object]) -> None:
        try:
            until(condition, worker=self.worker)
        except AssertionError as error:
            error.add_note(str(self.get("/gate")))
            raise


@pytest.fixture
def stand(embedded_broker: EmbeddedBroker) -> Iterator[Stand]:
    settings = settings_with_topics(embedded_broker, api_token=Secret(TOKEN))
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
    apply(stand.settings, DESIGN)
    stand.until(lambda: stand.get("/gate")["cause"] == "no_data")
    time.sleep(1.0)  # the spec must govern before its first exposure
    stand.send(range(40))
    stand.until(lambda: stand.get("/gate")["verdict"] == "continue")
    # A partition that is heard of before it has a watermark makes the data invalid once more.
    hooks = ("rollout", "confirm-promotion", "rollback")
    stand.until(lambda: [stand.hook(name) for name in hooks] == [200, 403, 403])
    undecided = stand.shell("--arm", "canary")
    assert (undecided.returncode, undecided.stdout.split(":")[0]) == (2, "continue"), undecided.stderr

    stand.send(range(40, 640), harmed=True)
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
    apply(stand.settings, DESIGN)
    time.sleep(1.0)
    stand.send(range(40))
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
    # Another topic than that of the config, which may be read later.
    wanted = [("stop", "alertmanager"), ("reset", "kim (by api)")]
    stand.until(lambda: [(one["action"], one["by"]) for one in stand.get("/signals")["items"]] == wanted)
    assert stand.get("/gate")["verdict"] != "stop"


def test_the_process_serves_until_it_is_told_to_end(embedded_broker: EmbeddedBroker) -> None:
    settings = settings_with_topics(embedded_broker)
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
        assert process.wait(DEADLINE_S) == 0


def test_a_gate_that_cannot_ask_is_no_answer() -> None:
    command = [sys.executable, "-m", "stream_xp", "gate", "checkout"]
    wrong = subprocess.run([*command, "--no-such-option"], capture_output=True, text=True, check=False)
    refused = subprocess.run(
        [*command, "--bootstrap", "kafka:9092"], capture_output=True, text=True, check=False
    )
    assert (wrong.returncode, refused.returncode) == (3, 3)
    assert "STREAM_XP_SECURITY_PROTOCOL" in refused.stderr
