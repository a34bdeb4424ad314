"""The requests of Flagger, Argo Rollouts, Orca and Spinnaker as they send them, and what they make of the answers.

What each peer does is written down here by itself (docs/gates.md says from where), so that no code of the service
says what the service should answer.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest
from api_process import serving
from click.testing import CliRunner
from gate_world import NOW_MS, STATES, world_in

from stream_xp.cli import gate as gate_command
from stream_xp.cli import main
from stream_xp.domain.gate import Verdict

if TYPE_CHECKING:
    import httpx

HOOK = {
    "name": "podinfo",
    "namespace": "test",
    "phase": "Progressing",
    "checksum": "85d557f47b",
    "metadata": {"experiment": "checkout", "arm": "canary"},
}
GATE_HOOKS = (
    "confirm-rollout",
    "pre-rollout",
    "rollout",
    "confirm-traffic-increase",
    "confirm-promotion",
    "rollback",
)
KAYENTA_QUERY = {
    "application": "checkout",
    "metricsAccountName": "prod",
    "configurationAccountName": "prod",
    "storageAccountName": "prod",
}


def no_constant(word: str) -> None:
    raise AssertionError(f"{word} is no JSON")


def strict(body: bytes) -> Any:
    """JSON as Go and Java read it: without NaN and Infinity."""
    return json.loads(body, parse_constant=no_constant)


# --- Flagger -----------------------------------------------------------------------------------------------------


def flagger(client: httpx.Client, hook: str) -> bool:
    """Whether Flagger goes on: a status of at most 202, where a service that is reached says 200 or 403."""
    answer = client.post(f"/flagger/{hook}", json=HOOK)
    assert answer.status_code in (200, 403)
    lines = answer.text.splitlines()
    assert len(lines) == 1
    assert 0 < len(lines[0]) <= 240
    return answer.status_code == 200


def flagger_says(client: httpx.Client) -> Verdict | str:
    """What a canary with all hooks does next."""
    opened = {hook: flagger(client, hook) for hook in GATE_HOOKS}
    assert opened["confirm-traffic-increase"] == opened["confirm-promotion"]
    if opened["rollback"]:
        # A rollback call that is lost must still end in a rollback.
        assert not any(opened[hook] for hook in GATE_HOOKS if hook != "rollback")
        return Verdict.STOP
    assert opened["rollout"]
    return Verdict.PASS if opened["confirm-promotion"] else "hold"


@pytest.mark.parametrize("state", STATES)
def test_flagger_in_every_state(state: str) -> None:
    with serving(world_in(state)) as (client, _):
        verdict = STATES[state].verdict
        assert flagger_says(client) == (verdict if verdict in (Verdict.PASS, Verdict.STOP) else "hold")


def test_flagger_begins_before_there_are_data_and_not_what_is_known_to_be_wrong() -> None:
    begins = {"no data", "stale data", "continue", "pass", "shipped", "paused"}
    never = {
        "stop",
        "stop by hand",
        "arm closed",
        "another arm shipped",
        "unknown experiment",
        "archived",
        "invalid",
        "service restarting",
        "brokers silent",
    }
    for state in begins | never:
        with serving(world_in(state)) as (client, _):
            assert [flagger(client, hook) for hook in ("confirm-rollout", "pre-rollout")] == [
                state in begins
            ] * 2


def test_flagger_fails_a_rollout_without_data_at_the_deadline_and_not_before() -> None:
    world = world_in("no data", gate_no_data_deadline_ms=60_000)
    with serving(world) as (client, _):
        # The experiment has stood for an hour without data, this rollout begins now.
        assert flagger(client, "rollout")
        world.clock.advance_to(NOW_MS + 60_000)
        world.read()
        assert flagger(client, "rollout")
        world.clock.advance_to(NOW_MS + 60_001)
        assert not flagger(client, "rollout")
        # Without data nothing says that it should be rolled back at once.
        assert not flagger(client, "rollback")
        another = HOOK | {"checksum": "another"}
        assert client.post("/flagger/rollout", json=another).status_code == 200


def test_flagger_is_told_4xx_where_a_hook_names_nothing() -> None:
    with serving(world_in("stop")) as (client, _):
        for hook in GATE_HOOKS:
            for body in (HOOK | {"metadata": {}}, HOOK | {"metadata": {"experiment": ["a"]}}, []):
                assert client.post(f"/flagger/{hook}", json=body).status_code == 400
        typo = HOOK | {"metadata": {"experiment": "chekout", "arm": "canary"}}
        assert client.post("/flagger/rollback", json=typo).status_code == 403
        assert client.post("/flagger/confirm-promotion", json=typo).status_code == 403


def test_flagger_events_are_heard() -> None:
    event = HOOK | {
        "metadata": HOOK["metadata"] | {"eventMessage": "m", "eventType": "Normal", "timestamp": "1"}
    }  # type: ignore[operator]
    with serving(world_in("stop")) as (client, _):
        for hook in ("event", "post-rollout"):
            assert client.post(f"/flagger/{hook}", json=event).status_code == 200
        assert client.get("/api/v1/service").json()["gates"]["event"] == 2


# --- Argo Rollouts: the web metric -----------------------------------------------------------------------------


def argo_web(client: httpx.Client) -> Verdict | str:
    """Measure with successCondition `result.ok` and failureCondition `result.breached`."""
    answer = client.get("/api/v1/experiments/checkout/analysis", params={"arm": "canary"})
    assert 200 <= answer.status_code < 300, "Argo would count an error"
    result = strict(answer.content)["data"]
    assert sum((result["ok"], result["breached"], result["inconclusive"])) == 1
    assert not any(value is None for value in result.values())
    assert not any(value is None for metric in result["metrics"] for value in metric.values())
    for name in ("score", "n_control", "n_treatment", "data_age_seconds"):
        assert isinstance(result[name], int | float)
    if result["breached"]:
        return Verdict.STOP
    return Verdict.PASS if result["ok"] else "hold"


@pytest.mark.parametrize("state", STATES)
def test_argo_web_metric_in_every_state(state: str) -> None:
    with serving(world_in(state)) as (client, _):
        verdict = STATES[state].verdict
        assert argo_web(client) == (verdict if verdict in (Verdict.PASS, Verdict.STOP) else "hold")


def test_the_web_metric_shows_the_evidence() -> None:
    with serving(world_in("pass")) as (client, _):
        result = client.get("/api/v1/experiments/checkout/analysis?variant=canary").json()["data"]
    assert (result["n_control"], result["n_treatment"], result["data_age_seconds"]) == (5000, 2400, 2.0)
    assert {metric["arm"] for metric in result["metrics"]} == {"canary"}
    (errors,) = (metric for metric in result["metrics"] if metric["role"] == "guardrail")
    assert errors == {
        "name": "errors",
        "role": "guardrail",
        "arm": "canary",
        "state": "safe",
        "control_units": 5000,
        "arm_units": 2400,
        "estimate": 0.004,
        "lower": -0.002,
        "upper": 0.009,
        "log_e": -2.0,
        "threshold_log_e": 3.0,
        "margin": 0.01,
    }


# --- Kayenta's clients -----------------------------------------------------------------------------------------


def argo_kayenta(client: httpx.Client, end: str, *, marginal: int = 75) -> Verdict | str:
    """Argo's provider: look the config up by name, post, then poll the execution."""
    query = {"application": "checkout", "configurationAccountName": "prod"}
    found = client.get("/canaryConfig", params=query)
    assert found.status_code == 200
    named = [one for one in strict(found.content) if one["name"] == "checkout@canary"]
    if not named:
        return "error"
    assert isinstance(named[0]["updatedTimestamp"], int)
    scope = {
        "scope": "app=checkout",
        "location": "default",
        "step": 60,
        "start": "2027-01-15T07:00:00Z",
        "end": end,
    }
    body = {
        "scopes": {"default": {"controlScope": scope, "experimentScope": scope}},
        "thresholds": {"pass": 95, "marginal": marginal},
    }
    begun = client.post(f"/canary/{named[0]['id']}", params=KAYENTA_QUERY, json=body)
    if begun.status_code != 200:
        return "error"
    identity = strict(begun.content)["canaryExecutionId"]
    polled = client.get(f"/canary/{identity}")
    assert polled.status_code == 200
    answer = strict(polled.content)
    if answer["complete"] is not True:
        return "running"
    score = int(answer["result"]["judgeResult"]["score"]["score"])
    if score >= 95:
        return Verdict.PASS
    return "hold" if score >= marginal else Verdict.STOP


def orca(client: httpx.Client, *, passing: int = 95, marginal: int = 75) -> str:
    """Orca's canary stage with one interval: what its typed client reads, then the monitor and the aggregate."""
    accounts = strict(client.get("/credentials").content)
    assert all(isinstance(one["name"], str) and isinstance(one["type"], str) for one in accounts)
    scope = {
        "scope": "checkout-v042",
        "location": "eu",
        "start": "2027-01-15T07:00:00Z",
        "end": "2027-01-15T08:00:00Z",
        "step": 60,
        "extendedScopeParams": {},
    }
    body = {
        "scopes": {"default": {"controlScope": scope, "experimentScope": scope}},
        "thresholds": {"pass": passing, "marginal": marginal},
    }
    query = KAYENTA_QUERY | {"parentPipelineExecutionId": "01"}
    begun = client.post("/canary/checkout@canary", params=query, json=body)
    if begun.status_code != 200:
        return "error"
    identity = strict(begun.content)["canaryExecutionId"]
    answer = client.get(f"/canary/{identity}", params={"storageAccountName": "prod"})
    assert answer.status_code == 200
    found = strict(answer.content)
    assert isinstance(found["application"], str)
    status = found["status"].upper()
    assert status in ("RUNNING", "SUCCEEDED", "TERMINAL", "CANCELED")
    if status != "SUCCEEDED":
        return "running"
    judged = found["result"]["judgeResult"]
    assert isinstance(judged["score"]["score"], int)
    assert isinstance(judged["score"]["classification"], str)
    assert isinstance(judged["score"]["classificationReason"], str)
    assert found["result"]["canaryDuration"].startswith("PT")
    assert found["endTimeIso"].endswith("Z")
    for one in judged["results"]:
        assert isinstance(one["controlMetadata"]["stats"]["count"], int)
        assert one["classification"] in ("High", "Low", "Pass", "Nodata", "NodataFailMetric", "Error")
    cancelled = client.put(f"/pipelines/{identity}/cancel", content=b"")
    assert (cancelled.status_code, strict(cancelled.content)) == (200, {})
    score = judged["score"]["score"]
    if score <= marginal:
        return "failed in the interval"
    return "succeeded" if score >= passing else "failed at the end"


NO_CONFIG = ("unknown experiment", "service restarting")
PAST, FUTURE = "2027-01-15T08:00:00Z", "2027-01-15T09:00:00.5+00:00"


@pytest.mark.parametrize("state", STATES)
def test_kayentas_clients_in_every_state(state: str) -> None:
    verdict = STATES[state].verdict
    final = verdict in (Verdict.PASS, Verdict.STOP)
    with serving(world_in(state)) as (client, _):
        if state in NO_CONFIG:
            assert (argo_kayenta(client, FUTURE), orca(client)) == ("error", "error")
            return
        # Until the end of the scope only what is final ends it.
        assert argo_kayenta(client, FUTURE) == (verdict if final else "running")
        assert argo_kayenta(client, PAST) == (verdict if final else "hold")
        expected = {Verdict.PASS: "succeeded", Verdict.STOP: "failed in the interval"}
        # Orca has no third answer: what is not proven goes on to the next interval, and fails after the last.
        assert orca(client) == expected.get(verdict, "failed at the end")


@pytest.mark.parametrize(("passing", "marginal"), [(95, 75), (76, 75), (80, 80), (100, 1), (50, 49)])
def test_what_is_inconclusive_passes_under_no_thresholds(passing: int, marginal: int) -> None:
    for state in ("continue", "invalid"):
        with serving(world_in(state)) as (client, _):
            assert orca(client, passing=passing, marginal=marginal) != "succeeded"
            # Thresholds that are equal leave no room between them.
            assert argo_kayenta(client, PAST, marginal=95) == Verdict.STOP
    with serving(world_in("stop")) as (client, _):
        assert orca(client, passing=passing, marginal=marginal) == "failed in the interval"


def test_kayenta_requests_that_cannot_mean_anything_are_refused() -> None:
    with serving(world_in("pass")) as (client, _):
        zero = {"thresholds": {"pass": 95, "marginal": 0}}  # a stop would not fail
        upside_down = {"thresholds": {"pass": 10, "marginal": 75}}
        no_time = {"scopes": {"default": {"experimentScope": {"end": "soon"}}}}
        for body in (zero, upside_down, no_time, {"thresholds": {"pass": "95"}}):
            assert client.post("/canary/checkout", json=body).status_code == 400, body
        for path in ("/canary/chekout", "/canary/checkout@stable", "/canary/checkout@"):
            expected = 200 if path.endswith("@") else 404
            assert client.post(path, json={}).status_code == expected
        assert client.post("/canary/", json={}).status_code == 404  # Argo, with a config it did not find
        for identity in ("x", "e30", "%00", "A" * 1000):
            assert client.get(f"/canary/{identity}").status_code == 404
            assert client.put(f"/pipelines/{identity}/cancel").status_code == 404


# --- Spinnaker's webhook stage ---------------------------------------------------------------------------------


def spinnaker(client: httpx.Client) -> Verdict | str:
    """The stage with `waitForCompletion`: it posts, then polls by each way that it knows."""
    url = "/spinnaker/checkout?arm=canary"
    posted = client.post(url, json={"pipeline": "deploy"})
    assert posted.status_code == 200
    status_urls = (url, posted.headers["location"], posted.json()["statusUrl"])
    answers = [client.get(one) for one in status_urls]
    assert {answer.status_code for answer in answers} == {200}
    words = {strict(answer.content)["status"] for answer in (posted, *answers)}
    assert len(words) == 1
    assert isinstance(strict(posted.content)["progress"], str)
    return {"SUCCEEDED": Verdict.PASS, "TERMINAL": Verdict.STOP, "RUNNING": "hold"}[words.pop()]


@pytest.mark.parametrize("state", STATES)
def test_spinnakers_webhook_stage_in_every_state(state: str) -> None:
    with serving(world_in(state)) as (client, _):
        verdict = STATES[state].verdict
        assert spinnaker(client) == (verdict if verdict in (Verdict.PASS, Verdict.STOP) else "hold")


def test_spinnaker_is_sent_to_an_address_that_a_header_can_hold() -> None:
    with serving(world_in("pass")) as (client, _):
        name = "caf\u00e9 \U0001f600\r\nx: y"
        answer = client.post("/spinnaker/" + quote(name), params={"arm": name})
        assert (answer.status_code, answer.json()["status"]) == (200, "RUNNING")
        assert answer.headers["location"] == answer.json()["statusUrl"]
        assert client.get(answer.headers["location"]).json()["statusUrl"] == answer.headers["location"]


# --- all of them -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", STATES)
def test_all_gates_agree(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In each state every peer does the same, and the shell says so too."""
    world = world_in(state)
    monkeypatch.setattr(gate_command, "ask", lambda *_, **__: world.view.verdict("checkout", "canary"))
    shell = CliRunner().invoke(main, ["gate", "checkout", "--arm", "canary"])
    with serving(world) as (client, _):
        plain = client.get("/api/v1/experiments/checkout/gate?arm=canary").json()["verdict"]
        listed = client.get("/api/v1/experiments").json()["items"]
        kayenta = argo_kayenta(client, PAST)
        said = {flagger_says(client), argo_web(client), spinnaker(client)}
    assert len(said) == 1
    (what,) = said
    assert {"pass": Verdict.PASS, "stop": Verdict.STOP}.get(plain, "hold") == what
    assert {0: Verdict.PASS, 1: Verdict.STOP, 2: "hold", 3: "hold"}[shell.exit_code] == what
    assert (shell.exit_code == 3) == (plain == "invalid")
    assert kayenta == ("error" if state in NO_CONFIG else what)
    # The list is of all treatments together, so a gate on one of them may be closed where it is open.
    assert [one["experiment"] for one in listed] == ([] if state == "unknown experiment" else ["checkout"])
