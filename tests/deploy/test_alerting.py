"""From a harmful event to an alert that fires: a worker, Prometheus and Alertmanager with the files of deploy/.

Of the files only addresses and the two intervals of Prometheus are substituted; what is kept is in the test's folder.
How long it took is told by the event's own time and the alert's, and where other programs have the processors, the
time for which they kept these from running is not counted: what is waited for in the test has a deadline that only
ends one that hangs.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families
from promql import DEPLOY, known_series
from worker_process import WorkerProcess, now_ms, prepare, quick, sending, wait_for

from stream_xp.adapters.kafka_admin import declared_topics
from stream_xp.domain.experiment import ExperimentSpec
from stream_xp.services.publish import plan_application, publish
from stream_xp.settings import Settings

if TYPE_CHECKING:
    from stream_xp.adapters.embedded_broker import EmbeddedBroker
    from stream_xp.adapters.topic_writer import TopicWriter

pytestmark = [pytest.mark.broker, pytest.mark.slow, pytest.mark.timeout(1_200)]

WITHIN_S = 30.0
"""From the first harmful event to the alert in Alertmanager's API; a healthy run lasts as long."""
INTERVALS = {
    "scrape_interval: 5s": "scrape_interval: 2s",
    "scrape_timeout: 4s": "scrape_timeout: 2s",
    "evaluation_interval: 5s": "evaluation_interval: 2s",
}
"""With those of the file it takes at most six seconds more, which a busy machine may need for itself."""
PROGRAMS = ("prometheus", "prometheus-alertmanager")


@pytest.fixture(autouse=True)
def _programs() -> None:
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        pytest.skip(f"no {' and no '.join(missing)} on PATH: apt-get install {' '.join(PROGRAMS)}")


def design(name: str) -> ExperimentSpec:
    """The canary of examples/, with a window that is over at once."""
    return msgspec.convert(
        {
            "experiment": name,
            "owner": "tests",
            "hypothesis": "the canary fails no more often",
            "unit": "member",
            "planned_sample": 4000,
            "arms": [{"key": "stable", "weight": 0.5, "control": True}, {"key": "canary", "weight": 0.5}],
            "metrics": [
                {
                    "key": "errors",
                    "kind": "conversion",
                    "role": "guardrail",
                    "direction": "decrease",
                    "attribution_window": "200ms",
                    "margin": {"absolute": 0.005},
                    "critical": True,
                }
            ],
        },
        ExperimentSpec,
    )


class Members:
    """Members of one experiment who meet errors, at a rate per arm."""

    def __init__(self, settings: Settings, experiment: str, *, canary: float) -> None:
        self._settings = settings
        self._experiment = experiment
        self._rates = {"stable": 0.02, "canary": canary}
        self._dice = random.Random(experiment)
        self._count = 0
        self.first_error_ms: int | None = None
        """Time of the first error of the canary, as the event has it."""

    def coming(self, *, per_s: float = 200.0) -> AbstractContextManager[None]:
        """Send them in the background for as long as the block takes."""
        return sending(self._settings, self._send, per_s=per_s, every_s=0.5)

    def _send(self, writer: TopicWriter) -> None:
        self._count += 1
        unit, arm = f"{self._experiment}-{self._count}", ("stable", "canary")[self._count % 2]
        shared = {"unit": unit, "time": now_ms(), "experiment": self._experiment}
        events = [("exposures", {"id": f"x{unit}", "arm": arm})]
        if self._dice.random() < self._rates[arm]:
            events.append(("rewards", {"id": f"r{unit}", "metric": "errors"}))
            if arm == "canary" and self.first_error_ms is None:
                self.first_error_ms = shared["time"]
        for topic, event in events:
            value = json.dumps(shared | event).encode()
            writer.send(self._settings.topic(topic), key=unit.encode(), value=value)


class Receiver:
    """Whoever is on call: keeps what Alertmanager posts."""

    def __init__(self) -> None:
        posts: list[Any] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                posts.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.posts = posts
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@contextmanager
def program(folder: Path, *command: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program until the block ends."""
    with (folder / f"{command[0]}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def free_address() -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{taken.getsockname()[1]}"


def installed(folder: Path, file: Path, changes: dict[str, str]) -> Path:
    """A file of deploy/ with these addresses and intervals in place of its own, and nothing else changed."""
    text = file.read_text()
    for ours, theirs in changes.items():
        assert ours in text, ours
        text = text.replace(ours, theirs)
    (folder / file.name).write_text(text)
    return folder / file.name


def get(address: str, path: str) -> Any:
    with urllib.request.urlopen(f"http://{address}{path}", timeout=30) as answer:
        return json.load(answer)


def is_ready(address: str, process: subprocess.Popen[bytes]) -> bool:
    assert process.poll() is None
    try:
        with urllib.request.urlopen(f"http://{address}/-/ready", timeout=5):
            return True
    except (OSError, urllib.error.HTTPError):
        return False


class Monitoring:
    """Prometheus and Alertmanager, running.

    Attributes:
        pids: of both.
    """

    def __init__(self, prometheus: str, alertmanager: str, receiver: Receiver, pids: tuple[int, ...]) -> None:
        self._prometheus, self._alertmanager, self.receiver = prometheus, alertmanager, receiver
        self.pids = pids

    def alerts(self) -> list[dict[str, Any]]:
        """Those that fire, as Alertmanager has them."""
        return [alert["labels"] | {"state": alert["status"]["state"]} for alert in self._alerts()]

    def told_ms(self) -> int:
        """When Prometheus last told Alertmanager of an alert; the first time, as long as it has told once."""
        (alert,) = self._alerts()
        return round(datetime.fromisoformat(alert["updatedAt"]).timestamp() * 1000)

    def _alerts(self) -> Any:
        return get(self._alertmanager, "/api/v2/alerts?active=true&silenced=true&inhibited=true")

    def value(self, query: str) -> float | None:
        found = get(self._prometheus, f"/api/v1/query?query={quote(query)}")["data"]["result"]
        return float(found[0]["value"][1]) if found else None

    def faults(self) -> list[str]:
        """What keeps it from seeing anything: a target that is down, a rule that cannot be evaluated."""
        targets = get(self._prometheus, "/api/v1/targets")["data"]["activeTargets"]
        groups = get(self._prometheus, "/api/v1/rules")["data"]["groups"]
        down = [target["lastError"] or "never scraped" for target in targets if target["health"] != "up"]
        rules = [rule for group in groups for rule in group["rules"]]
        wrong = [f"{rule['name']}: {rule.get('lastError')}" for rule in rules if rule["health"] != "ok"]
        return [*down, *wrong, *([] if targets else ["no target"]), *([] if rules else ["no rule"])]


class KeptWaiting:
    """For how long processes could have run, and something else had the processors, since this was made (Linux).

    Of each process the thread that waited longest counts: an event is in one thread of each after the other.
    """

    def __init__(self, pids: Iterable[int]) -> None:
        self._pids = tuple(pids)
        self._before = {pid: self._by_thread_ns(pid) for pid in self._pids}

    def total_s(self) -> float:
        """Of all processes together."""
        return sum(self._longest_ns(pid) for pid in self._pids) / 1e9

    def _longest_ns(self, pid: int) -> int:
        before = self._before[pid]
        return max((ns - before.get(thread, 0) for thread, ns in self._by_thread_ns(pid).items()), default=0)

    @staticmethod
    def _by_thread_ns(pid: int) -> dict[str, int]:
        found = {}
        for file in Path(f"/proc/{pid}/task").glob("*/schedstat"):
            with suppress(OSError):  # a thread that has just ended
                found[file.parent.name] = int(file.read_text().split()[1])
        return found


@contextmanager
def monitoring(folder: Path, worker: str) -> Iterator[Monitoring]:
    with ExitStack() as stack:
        receiver = Receiver()
        stack.callback(receiver.close)
        shutil.copytree(DEPLOY / "prometheus" / "rules", folder / "rules")
        prometheus, alertmanager = free_address(), free_address()
        routes = {"oncall:8080": receiver.address, "chat:8080": receiver.address}
        of_alertmanager = installed(folder, DEPLOY / "alertmanager" / "alertmanager.yml", routes)
        scraped = {"worker:9464": worker, "alertmanager:9093": alertmanager}
        of_prometheus = installed(folder, DEPLOY / "prometheus" / "prometheus.yml", scraped | INTERVALS)
        alerting = program(
            folder,
            "prometheus-alertmanager",
            f"--config.file={of_alertmanager}",
            f"--storage.path={folder / 'alertmanager'}",
            f"--web.listen-address={alertmanager}",
            "--cluster.listen-address=",
        )
        scraping = program(
            folder,
            "prometheus",
            f"--config.file={of_prometheus}",
            f"--storage.tsdb.path={folder / 'prometheus'}",
            f"--web.listen-address={prometheus}",
        )
        pids = []
        for address, running in ((alertmanager, alerting), (prometheus, scraping)):
            process = stack.enter_context(running)
            pids.append(process.pid)
            wait_for(
                lambda address=address, process=process: is_ready(address, process), f"{address} is ready"
            )
        found = Monitoring(prometheus, alertmanager, receiver, tuple(pids))
        wait_for(lambda: not found.faults(), "the worker is scraped and every rule was evaluated")
        yield found


def scrape(address: str) -> dict[tuple[str, str], float]:
    """Every series of the worker, by name and labels."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    return {
        (sample.name, json.dumps(sample.labels, sort_keys=True)): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def assert_metrics_are_those_of_the_definitions(address: str) -> None:
    ours = {name: json.loads(labels) for name, labels in scrape(address) if name.startswith("streamxp_")}
    known = known_series()
    assert len(ours) > 40
    for name, labels in ours.items():
        assert set(labels) <= known[name]


def test_a_breach_fires_in_alertmanager_and_health_does_not(
    embedded_broker: EmbeddedBroker, topic_prefix: str, tmp_path: Path
) -> None:
    settings = quick(
        embedded_broker.bootstrap,
        topic_prefix,
        broker="embedded",
        metrics_port=0,
        # As deployed: on a busy machine a worker is silent for seconds, and an event takes them to arrive.
        session_timeout_ms=Settings().session_timeout_ms,
        allowed_lateness_ms=3_000,
    )
    for topic in declared_topics(settings):
        embedded_broker.create_topic(topic.name, topic.partitions)
    prepare(settings, design("healthy"))
    with WorkerProcess(settings, tmp_path) as worker:
        worker.wait_started()
        address = worker.metrics_address()
        with monitoring(tmp_path, address) as watched:
            with Members(settings, "healthy", canary=0.02).coming():
                assert_health_is_quiet(watched)
            publish(settings, plan_application(settings, design("checkout"), now_ms=now_ms()))
            time.sleep(settings.activation_delay_ms / 1000)
            harmed = Members(settings, "checkout", canary=0.4)
            # Those on the way of an event; the broker is in this process, as are its senders.
            kept = KeptWaiting((os.getpid(), worker.process.pid, *watched.pids))
            with harmed.coming():
                assert_harm_fires(watched, harmed, kept)
            assert_metrics_are_those_of_the_definitions(address)
            wait_for(lambda: not watched.faults(), "the worker is scraped and every rule was evaluated")
        # How it ends is for tests/broker/test_worker.py: it has three seconds for that, which a busy machine may need.
        assert not worker.ended(), worker.log


def assert_health_is_quiet(watched: Monitoring) -> None:
    """Nothing fires for WITHIN_S, and that is not because nobody looks."""
    ends_s = time.monotonic() + WITHIN_S
    while time.monotonic() < ends_s:
        assert watched.alerts() == []
        time.sleep(0.5)
    # On a busy machine a scrape can take too long, and what it would have shown is not there until the next.
    wait_for(lambda: not watched.faults(), "the worker is scraped and every rule was evaluated")
    units = 'sum(streamxp_arm_units{experiment="healthy"})'
    wait_for(lambda: (watched.value(units) or 0) > 500, "500 units of the healthy experiment are counted")
    breached = 'max(streamxp_guardrail_breached{experiment="healthy"})'
    wait_for(lambda: watched.value(breached) is not None, "the guardrail of the healthy experiment is shown")
    assert watched.value(f"max_over_time({breached}[10m:1s])") == 0
    running = 'sum(streamxp_decision_state{experiment="healthy", state="running"})'
    wait_for(lambda: watched.value(running) == 1, "the healthy experiment runs")
    assert watched.alerts() == []
    assert watched.receiver.posts == []


def assert_harm_fires(watched: Monitoring, harmed: Members, kept: KeptWaiting) -> None:
    breach = {
        "alertname": "StreamxpGuardrailBreached",
        "experiment": "checkout",
        "metric": "errors",
        "arm": "canary",
        "severity": "critical",
        "state": "active",
    }
    wait_for(lambda: bool(watched.alerts()), "an alert fires")
    kept_s = kept.total_s()
    assert watched.alerts() == [breach]
    assert harmed.first_error_ms is not None
    took_s = (watched.told_ms() - harmed.first_error_ms) / 1000
    print(f"{took_s:.1f} s from the first harmful event to the alert in Alertmanager's API", end=", ")
    print(f"in which its programs were kept from running for {kept_s:.1f} s")
    assert took_s - kept_s <= WITHIN_S
    wait_for(lambda: bool(watched.receiver.posts), "whoever is on call is told")
    (post,) = watched.receiver.posts
    assert (post["status"], post["receiver"]) == ("firing", "oncall")
    assert [alert["labels"]["experiment"] for alert in post["alerts"]] == ["checkout"]
    # Applications were told to stop too: the alert stays although nothing harmful is served any more.
    state = 'sum(streamxp_decision_state{experiment="checkout", state="stopped"})'
    wait_for(lambda: watched.value(state) == 1, "the experiment is stopped")
    assert watched.alerts() == [breach]
