"""The serving side on a real Apache Kafka: two workers, two replicas of the API, a notifier, and processes that die.

Everything is the program itself. A canary harms; whoever asks is told the same, before and after `kill -9`.
"""

from __future__ import annotations

import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, Self

import httpx
import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families
from webhook_receiver import KEY, Receiver, receiving, targets_file
from worker_process import CliProcess, WorkerProcess, quick, wait_for, wait_shared

from stream_xp.adapters.kafka_admin import connect, declared_topics, ensure_topics
from stream_xp.services.traffic import WORLD

if TYPE_CHECKING:
    from pathlib import Path

    from stream_xp.settings import Settings

pytestmark = [pytest.mark.broker, pytest.mark.kafka, pytest.mark.slow, pytest.mark.timeout(600)]

CANARY = "checkout-canary"
HOOKS = {
    "confirm-rollout": 403,
    "pre-rollout": 403,
    "rollout": 403,
    "confirm-traffic-increase": 403,
    "confirm-promotion": 403,
    "rollback": 200,
}
"""What Flagger is told of a stop."""
HOOK = {"name": "p", "namespace": "t", "checksum": "1", "metadata": {"experiment": CANARY, "arm": "canary"}}


class Told(NamedTuple):
    """What a replica says of the canary."""

    verdict: str
    cause: str
    decision_id: str


class Replica(CliProcess):
    """`stream-xp api`, and what it has said of the canary to somebody who asks all the time."""

    def __init__(self, settings: Settings, folder: Path, *, port: int = 0) -> None:
        super().__init__(settings, folder, "api", "--api-port", str(port))
        self.told: list[Told | None] = []

    def __enter__(self) -> Self:
        self.port: int = self.wait_said("api started")["port"]
        self.client = httpx.Client(
            base_url=f"http://127.0.0.1:{self.port}", timeout=60, trust_env=False, verify=False
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        super().__exit__()

    def ask(self) -> Told:
        answer = self.client.get(f"/api/v1/experiments/{CANARY}/gate", params={"arm": "canary"}).json()
        return Told(answer["verdict"], answer["cause"], answer["decision_id"])

    def is_ready(self) -> bool:
        return self.client.get("/readyz").status_code == 200

    @contextmanager
    def asked(self) -> Iterator[None]:
        """Ask ten times a second while the block runs; `told` has each change of the answer, None for no answer."""
        over = threading.Event()

        def run() -> None:
            while not over.wait(0.1):
                try:
                    answer: Told | None = self.ask()
                except httpx.HTTPError:
                    answer = None
                if not self.told or self.told[-1] != answer:
                    self.told.append(answer)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


class Scene:
    """The processes, and where their files are."""

    def __init__(self, settings: Settings, folder: Path, workers: list[WorkerProcess]) -> None:
        self.settings, self.folder, self.workers = settings, folder, workers

    def series(self) -> dict[WorkerProcess, dict[str, dict[tuple[str, ...], float]]]:
        """Of each worker: metric to the values of its labels, by their names, to its value."""
        return {worker: scraped(worker) for worker in self.workers}

    def state_of(self, experiment: str) -> list[str]:
        """The decision state that the workers show, once for each series that says so."""
        return [
            labels[1]
            for found in self.series().values()
            for labels, value in found.get("streamxp_decision_state", {}).items()
            if labels[0] == experiment and value == 1
        ]

    def owner(self, experiment: str) -> WorkerProcess:
        (found,) = [
            worker
            for worker, series in self.series().items()
            if any(labels[0] == experiment for labels in series["streamxp_decision_state"])
        ]
        return found


def scraped(worker: WorkerProcess) -> dict[str, dict[tuple[str, ...], float]]:
    port = worker.wait_said("metrics served")["port"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        text = answer.read().decode()
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            cells = found.setdefault(sample.name, {})
            key = tuple(sample.labels[name] for name in sorted(sample.labels))
            assert key not in cells, f"{sample.name} {key} twice in one answer"
            cells[key] = sample.value
    return found


@pytest.fixture
def settings(apache_kafka: str, topic_prefix: str) -> Settings:
    found = quick(
        apache_kafka,
        topic_prefix,
        activation_delay_ms=500,
        # A busy machine is late in sending, and what is late counts for nothing.
        allowed_lateness_ms=3_000,
        session_timeout_ms=6_000,
        metrics_port=0,
    )
    with connect(found) as client:
        ensure_topics(client, declared_topics(found))
    return found


@contextmanager
def notifier(settings: Settings, folder: Path, receiver: Receiver) -> Iterator[CliProcess]:
    """`stream-xp notify` with one target, that has said it listens to the topic."""
    (folder / "key").write_text(KEY)
    path = targets_file(receiver, folder, "ci", secret=f"secret_file: {folder / 'key'}")
    options = ("--targets", str(path), "--notify-allowed-hosts", "127.0.0.1")
    with CliProcess(settings, folder, "notify", *options) as process:
        process.wait_said("notifier started")
        yield process


def stops_at(receiver: Receiver) -> list[str]:
    return [one["id"] for one in receiver.bodies if one["subject"] == CANARY]


def test_everybody_is_told_the_same_and_goes_on_being_told(settings: Settings, tmp_path: Path) -> None:
    with (
        receiving() as receiver,
        WorkerProcess(settings, tmp_path) as one,
        WorkerProcess(settings, tmp_path) as two,
        notifier(settings, tmp_path, receiver),
        Replica(settings, tmp_path) as first,
        Replica(settings, tmp_path) as second,
    ):
        scene = Scene(settings, tmp_path, [one, two])
        one.wait_started()
        two.wait_started()
        wait_shared(one, two)
        wait_for(lambda: first.is_ready() and second.is_ready(), "both replicas are ready")
        traffic = ("--seed", "3", "--units-per-s", "2000", "--harm-after", "0")
        with second.asked(), CliProcess(settings, tmp_path, "traffic", *traffic) as client:
            wait_for(
                lambda: first.ask().verdict == second.ask().verdict == "stop",
                "both replicas say stop",
            )
            stop = first.ask()
            assert stop == Told("stop", "stopped", stop.decision_id)
            every_gate_agrees(scene, first, second, stop)
            wait_for(lambda: bool(stops_at(receiver)), "the notifier has told the receiver")
            each_state_is_shown_once(scene)
            wait_for(lambda: f"{CANARY} stopped" in client.log, "the traffic has seen the stop")
            a_replica_dies_and_comes_back(scene, first, stop)
            a_worker_dies(scene, second, scene.owner(CANARY))
            assert not client.ended(), client.log
        # Whoever was asked all the time had an answer each time, and after the stop no other one.
        assert None not in second.told
        assert second.told.index(stop) == len(second.told) - 1, second.told
        assert stops_at(receiver) == [stop.decision_id]


def every_gate_agrees(scene: Scene, first: Replica, second: Replica, stop: Told) -> None:
    assert first.ask() == second.ask() == stop
    for replica in (first, second):
        ask = replica.client
        assert {hook: ask.post(f"/flagger/{hook}", json=HOOK).status_code for hook in HOOKS} == HOOKS
        argo = ask.get(f"/api/v1/experiments/{CANARY}/analysis", params={"arm": "canary"}).json()["data"]
        assert (argo["breached"], argo["ok"], argo["decision_id"]) == (True, False, stop.decision_id)
        polled = ask.get(f"/spinnaker/{CANARY}", params={"arm": "canary"}).json()
        assert polled["status"] == "TERMINAL"
        begun = ask.post(f"/canary/{CANARY}@canary", json={}).json()["canaryExecutionId"]
        # An execution that one replica began is finished by any.
        for other in (first, second):
            judged = other.client.get(f"/canary/{begun}").json()
            assert judged["complete"] is True
            assert judged["result"]["judgeResult"]["score"]["score"] == 0
    with CliProcess(scene.settings, scene.folder, "gate", CANARY, "--arm", "canary", "--json") as shell:
        assert shell.wait_ended() == 1, shell.log
        assert msgspec.json.decode(shell.log)["decision_id"] == stop.decision_id


def each_state_is_shown_once(scene: Scene) -> None:
    """The workers together show each experiment in one state, and each partition once."""
    wait_for(lambda: scene.state_of(CANARY) == ["stopped"], "a worker shows the stop, and one only")
    for experiment in WORLD:
        wait_for(lambda: len(scene.state_of(experiment)) == 1, f"{experiment} is shown once")  # noqa: B023 (at once)
    every = sorted(
        (str(partition), topic)
        for partition in range(scene.settings.partitions)
        for topic in ("exposures", "rewards")
    )

    def held() -> list[tuple[str, ...]]:
        series = scene.series().values()
        return sorted(at for found in series for at in found.get("streamxp_applied_offset", ()))

    wait_for(lambda: held() == every, "each partition is shown once")


def a_replica_dies_and_comes_back(scene: Scene, replica: Replica, stop: Told) -> None:
    """Where it was it answers again: that it is starting, then what it said before."""
    replica.kill()
    with pytest.raises(httpx.ConnectError):
        replica.ask()
    with Replica(scene.settings, scene.folder, port=replica.port) as again:
        with again.asked():
            wait_for(again.is_ready, "the replica is ready again")
            wait_for(lambda: stop in again.told, "the replica says stop again")
            time.sleep(1)
        starting = Told("invalid", "starting", "")
        assert again.told in ([stop], [starting, stop]), again.told


def a_worker_dies(scene: Scene, replica: Replica, dead: WorkerProcess) -> None:
    """The other takes over its partitions and decides on its experiments, and shows both."""
    before = {name: looks(replica, name) for name in WORLD}
    dead.kill()
    scene.workers.remove(dead)
    (survivor,) = scene.workers
    numbers = list(range(scene.settings.partitions))
    wait_for(
        lambda: survivor.events("partitions assigned")[-1]["partitions"] == numbers,
        "the surviving worker has all partitions",
    )
    wait_for(lambda: all(len(scene.state_of(name)) == 1 for name in WORLD), "it shows every experiment")
    each_state_is_shown_once(scene)
    wait_for(
        lambda: all(looks(replica, name) > before[name] for name in WORLD if name != CANARY),
        "it goes on with what is not stopped",
    )


def looks(replica: Replica, experiment: str) -> int:
    return int(replica.client.get(f"/api/v1/experiments/{experiment}/gate").json()["look"])
