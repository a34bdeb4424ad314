"""Routes that read: what they show, pages, health, and the OpenAPI document against what is answered."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest
from api_process import BEARER, SERVER, TOKEN, serving
from gate_world import NOW_MS, World, config, order, record, result, signal, spec, world_in

from stream_xp.domain.decision import Action, RolloutStatus
from stream_xp.domain.operator import OperatorAction
from stream_xp.services.api.endpoints import Progress
from stream_xp.services.api.routes import READS, WRITES
from stream_xp.settings import Secret

if TYPE_CHECKING:
    from pathlib import Path

    import httpx

ONE = "/api/v1/experiments/checkout"


def full() -> World:
    """A world with something behind every route."""
    world = world_in("pass")
    world.put("config", config(RolloutStatus.RUNNING))
    world.put("signals", signal(Action.SHIP, proposed=True))
    world.put("signals", order(OperatorAction.PAUSE))
    return world


def test_an_experiment_and_what_is_said_of_it() -> None:
    with serving(full()) as (client, _):
        detail = client.get(ONE).json()
        assert (detail["proposed"], detail["latched"], detail["paused_by"]) == ("s1", None, "kim")
        assert detail["record"]["spec"]["experiment"] == "checkout"
        assert detail["gate"]["verdict"] == "continue"
        assert client.get(f"{ONE}/result").json()["look"] == 7
        assert client.get(f"{ONE}/config").json()["status"] == "running"
        said = client.get(f"{ONE}/signals").json()["items"]
        assert [(one["id"], one["action"], one["by"], one["proposed"]) for one in said] == [
            ("s1", "ship", None, True),
            ("o1", "pause", "kim", False),
        ]
        (point,) = client.get(f"{ONE}/history").json()["items"]
        assert (point["look"], point["units"]["canary"], len(point["metrics"])) == (7, 2400, 4)
        (summary,) = client.get("/api/v1/experiments").json()["items"]
        assert (summary["verdict"], summary["look"], summary["evaluated_ms"]) == (
            "continue",
            7,
            NOW_MS - 1_700,
        )


def test_what_is_not_there_is_404() -> None:
    with serving(world_in("no data")) as (client, _):
        assert [client.get(f"{ONE}/{what}").status_code for what in ("result", "config")] == [404, 404]
        assert client.get(f"{ONE}/history").json()["items"] == []
        for what in ("", "/result", "/history", "/signals", "/config"):
            answer = client.get(f"/api/v1/experiments/chekout{what}")
            assert (answer.status_code, list(answer.json())) == (404, ["error"])


def test_lists_come_in_pages() -> None:
    world = World()
    for number in range(7):
        key = f"e{number}"
        world.put("experiments", record(spec(experiment=key)), key)
    world.put("experiments", None, "e3")  # a tombstone
    world.read()
    with serving(world) as (client, _):
        seen: list[str] = []
        after, pages = "", 0
        while after is not None:
            page = client.get("/api/v1/experiments", params={"limit": 2, "after": after}).json()
            seen += [one["experiment"] for one in page["items"]]
            after, pages = page["next"], pages + 1
        assert (seen, pages) == (["e0", "e1", "e2", "e4", "e5", "e6"], 3)
        for limit in ("0", "501", "-1", "two", "1e3", "", "٣"):
            assert client.get("/api/v1/experiments", params={"limit": limit}).status_code == 400, limit


def test_signals_and_history_are_cut_to_the_newest() -> None:
    world = world_in("pass")
    for look in range(8, 12):
        world.put("results", result(look=look))
        world.put("signals", order(OperatorAction.PAUSE, identity=f"p{look}"))
    with serving(world) as (client, _):
        looks = client.get(f"{ONE}/history", params={"limit": 2}).json()["items"]
        assert [one["look"] for one in looks] == [10, 11]
        said = client.get(f"{ONE}/signals", params={"limit": 2}).json()["items"]
        assert [one["id"] for one in said] == ["p10", "p11"]


@pytest.mark.parametrize(
    ("read_ms", "progress_ms", "failed", "alive", "ready"),
    [
        (NOW_MS - 1_000, NOW_MS - 1_000, False, 200, 200),
        # It still reads what stood there when it began.
        (None, NOW_MS - 1_000, False, 200, 503),
        (None, NOW_MS - 60_001, False, 503, 503),
        # The brokers are silent: not ready, and after a minute not alive.
        (NOW_MS - 15_001, NOW_MS - 15_001, False, 200, 503),
        (NOW_MS - 60_001, NOW_MS - 60_001, False, 503, 503),
        # A backlog is worked off.
        (NOW_MS - 90_000, NOW_MS, False, 200, 503),
        (NOW_MS, NOW_MS, True, 503, 503),
    ],
)
def test_health_looks_at_progress(
    read_ms: int | None, progress_ms: int, *, failed: bool, alive: int, ready: int
) -> None:
    world = world_in("pass")
    with serving(world) as (client, api):
        api.progress = lambda: Progress(read_ms, progress_ms, 0, failed=failed)
        found = [client.get("/healthz"), client.get("/readyz")]
        assert [answer.status_code for answer in found] == [alive, ready]
        for answer in found:
            assert (
                (answer.json()["status"] == "ok")
                == (answer.status_code == 200)
                == (answer.json()["reason"] == "")
            )


# --- OpenAPI -----------------------------------------------------------------------------------------------------


def writing(world: World) -> World:
    found = World(api_token=Secret(TOKEN))
    world.settings = found.settings
    return world


def test_the_document_has_every_route_and_no_other() -> None:
    with serving(writing(full())) as (client, _):
        paths = client.get("/openapi.json").json()["paths"]
    found = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    assert found == {(route.method, route.path) for route in (*READS, *WRITES)}
    assert len({route.name for route in (*READS, *WRITES)}) == len(READS) + len(WRITES)


def checked(document: dict[str, Any], answer: httpx.Response, path: str) -> None:
    """Hold an answer against the document."""
    responses = document["paths"][path][answer.request.method.lower()]["responses"]
    content = responses[str(answer.status_code)]["content"]
    kind = answer.headers["content-type"].partition(";")[0]
    assert kind in content, f"{path}: {answer.status_code} is {kind}"
    if kind == "application/json":
        schema = {**content[kind]["schema"], "components": document["components"]}
        jsonschema.Draft202012Validator(schema).validate(answer.json())


@pytest.mark.parametrize("state", ["pass", "stop", "continue", "invalid", "no data", "service restarting"])
def test_answers_are_as_the_document_says(state: str) -> None:
    world = writing(world_in(state))
    reads = [route for route in READS if route.method == "GET" and route.path != "/canary/{execution}"]
    with serving(world) as (client, _):
        document = client.get("/openapi.json").json()
        for route in reads:
            answer = client.get(route.path.replace("{experiment}", "checkout"))
            checked(document, answer, route.path)
        checked(document, client.post("/canary/checkout", json={}), "/canary/{canary_config}")
        checked(document, client.post("/flagger/rollout", json={}), "/flagger/rollout")


def test_a_whole_world_is_as_the_document_says() -> None:
    with serving(writing(full())) as (client, _):
        document = client.get("/openapi.json").json()
        for what in ("", "/result", "/history", "/signals", "/config", "/gate", "/analysis"):
            checked(document, client.get(ONE + what), "/api/v1/experiments/{experiment}" + what)
    with serving(writing(world_in("stop"))) as (client, _):
        begun = client.post("/canary/checkout@canary", json={}).json()["canaryExecutionId"]
        checked(document, client.get(f"/canary/{begun}"), "/canary/{execution}")
        for key in ("reason", "nothing"):
            path = "/api/v1/experiments/{experiment}/orders/stop"
            url = path.replace("{experiment}", "chekout")
            checked(document, client.post(url, json={key: "r"}, headers=BEARER), path)


@pytest.mark.slow
def test_schemathesis_finds_no_fault_and_no_broken_schema(tmp_path: Path) -> None:
    """A bounded run, in a process of its own; orders change nothing here, since no broker is there to take them."""
    checks = (
        "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,"
        "missing_required_header,unsupported_method"
    )
    with serving(writing(full()), place=_refuse):
        command = [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{SERVER.url}/openapi.json"),
            *("--checks", checks, "--max-examples", "10", "--phases", "examples,coverage,fuzzing"),
            *("--header", f"Authorization: Bearer {TOKEN}", "--generation-deterministic"),
        ]
        ended = subprocess.run(
            command,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"NO_COLOR": "1"},
        )
    assert ended.returncode == 0, ended.stdout[-6000:] + ended.stderr[-2000:]


def _refuse(*_: Any, **__: Any) -> Any:
    from stream_xp.errors import ConfigError  # noqa: PLC0415

    raise ConfigError("it would change nothing")
