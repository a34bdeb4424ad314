"""The file of targets: what it may say, what is refused with its line, and what never shows itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import msgspec
import pytest
from click.testing import CliRunner

from stream_xp.cli import main
from stream_xp.domain.decision import Action, Signal
from stream_xp.domain.operator import OrderSignal
from stream_xp.services.notify.targets import Event, Format, Target, event_of, load_targets
from stream_xp.services.spec_file import SpecFaults
from stream_xp.settings import Settings

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "topics" / "golden"
KEY = "whsec_Y2FuYXJ5LWNhbmFyeS1jYW5hcnktY2FuYXJ5"
SETTINGS = Settings(notify_allowed_hosts=("ci.example.com", "Hooks.Slack.com", "[fd00::1]"))
CI = "- {name: ci, url: 'https://ci.example.com/hook', secret_env: CI_KEY}\n"
ENVIRON = {"CI_KEY": KEY, "CHAT_URL": "https://hooks.slack.com/services/T0/B0/canary"}

Load: TypeAlias = Callable[[str], tuple[Target, ...]]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def read(targets: str) -> tuple[Target, ...]:
        path = tmp_path / "targets.yaml"
        path.write_text("targets:\n" + targets)
        return load_targets(path, SETTINGS, ENVIRON)

    return read


def decision(name: str = "signal.v1") -> Signal:
    return msgspec.json.decode((GOLDEN / f"{name}.json").read_bytes(), type=Signal)


def order() -> OrderSignal:
    return msgspec.json.decode((GOLDEN / "operator.v1.json").read_bytes(), type=OrderSignal)


def test_defaults(load: Load) -> None:
    [target] = load(CI)
    assert (target.name, target.where.host, target.format) == ("ci", "ci.example.com", Format.CLOUDEVENT)
    assert target.events == {Event.STOP, Event.SHIP, Event.PROPOSED}
    assert (target.experiments, target.allow_private, target.ca_file) == ("*", False, None)


def test_the_address_and_keys_may_be_in_files_beside_it(load: Load, tmp_path: Path) -> None:
    (tmp_path / "url").write_text("https://hooks.slack.com/services/T0/B0/canary\n")
    (tmp_path / "keys").write_text(KEY + "\n" + KEY + "\n")
    [target] = load("- {name: chat, url_file: url, secret_file: keys, format: slack}\n")
    assert target.where.path == "/services/T0/B0/canary"
    assert len(target.keys) == 2


def test_a_chat_needs_no_key(load: Load) -> None:
    assert load("- {name: chat, url_env: CHAT_URL, format: slack}\n")[0].keys == ()


def test_nothing_secret_shows_itself(load: Load) -> None:
    targets = load(CI + "- {name: chat, url_env: CHAT_URL, format: slack}\n")
    shown = repr(targets) + str(targets) + repr(targets[0].sender())
    assert "canary" not in shown.lower()
    assert repr(targets[0].keys) == "Keys(1)"


@pytest.mark.parametrize(
    ("targets", "fault"),
    [
        (" []\n", ":2:2: targets: has 0 entries, needs at least 1"),
        (
            "- {name: ci, secret_env: CI_KEY}\n",
            ":2:3: targets[0]: must have one of url, url_file and url_env",
        ),
        (
            "- {name: ci, url: 'https://ci.example.com/', url_env: CHAT_URL, secret_env: CI_KEY}\n",
            ":2:3: targets[0]: must have one of url, url_file and url_env",
        ),
        (
            "- name: ci\n  url: https://ci.example.com.evil.com/\n  secret_env: CI_KEY\n",
            (
                ":3:8: targets[0].url: has the host ci.example.com.evil.com, "
                "which STREAM_XP_NOTIFY_ALLOWED_HOSTS does not name"
            ),
        ),
        (
            "- name: ci\n  url: http://ci.example.com/\n  secret_env: CI_KEY\n",
            ":3:8: targets[0].url: must start with https:// where allow_http is not true",
        ),
        (
            "- name: ci\n  url: https://ci.example.com/\n",
            ":2:3: targets[0]: must have one of secret_file and secret_env; only slack may have none",
        ),
        (
            "- name: ci\n  url: https://ci.example.com/\n  secret_env: NONE\n",
            ":4:15: targets[0].secret_env: names an environment variable that is not set",
        ),
        (
            "- name: ci\n  url: https://ci.example.com/\n  secret_file: none\n",
            ":4:16: targets[0].secret_file: names no file that can be read and holds 1 to 65536 bytes of text",
        ),
        (
            "- name: ci\n  url: https://ci.example.com/\n  secret_env: CHAT_URL\n",
            ":4:15: targets[0].secret_env: key 1 must be whsec_ and the base64 of 24 to 64 random bytes",
        ),
        (
            CI + CI,
            ":2:10: targets[0].name: is the name of another target too",
        ),
        (
            "- name: ci\n  url: https://ci.example.com/\n  secret_env: CI_KEY\n  ca_file: none.pem\n",
            ":5:12: targets[0].ca_file: cannot load",
        ),
        (
            "- name: ci\n  url: https://ci.example.com/\n  secret_env: CI_KEY\n  events: [stopp]\n",
            ":5:12: targets[0].events[0]: must be one of stop, ship,",
        ),
        (
            "- name: ci\n  url: https://ci.example.com/\n  secret_env: CI_KEY\n  retries: 3\n",
            ":5:3: targets[0].retries: unknown field",
        ),
        (
            "- name: a b\n  url: https://ci.example.com/\n  secret_env: CI_KEY\n",
            ":2:9: targets[0].name: must be",
        ),
    ],
)
def test_a_fault_has_its_line_and_rule(load: Load, targets: str, fault: str) -> None:
    with pytest.raises(SpecFaults) as refused:
        load(targets)
    assert any(f"targets.yaml{fault}" in line for line in refused.value.lines()), refused.value.lines()


@pytest.mark.parametrize("field", ["secret", "secret_env", "secret_file"])
def test_a_secret_in_the_file_is_refused_and_not_repeated(load: Load, field: str) -> None:
    with pytest.raises(SpecFaults) as refused:
        load(f"- {{name: ci, url: 'https://ci.example.com/canary', {field}: {KEY}}}\n")
    assert KEY not in str(refused.value)
    assert "canary" not in str(refused.value)


def test_plain_http_only_where_it_is_allowed(load: Load) -> None:
    [target] = load(
        "- {name: ci, url: 'http://ci.example.com:8080/', secret_env: CI_KEY, allow_http: true, allow_private: true}\n"
    )
    assert (target.where.tls, target.allow_private) == (False, True)


def test_hosts_are_allowed_by_their_exact_names_in_any_case(load: Load) -> None:
    load("- {name: a, url: 'https://HOOKS.slack.com/', secret_env: CI_KEY}\n")
    load("- {name: a, url: 'https://[fd00::1]/', secret_env: CI_KEY}\n")
    for host in ("example.com", "a.ci.example.com", "ci.example.co"):
        with pytest.raises(SpecFaults, match="does not name"):
            load(f"- {{name: a, url: 'https://{host}/', secret_env: CI_KEY}}\n")


def test_a_target_is_told_what_it_asked_for(load: Load) -> None:
    [usual] = load(CI)
    [orders] = load(CI.replace("name:", "events: [orders, allocate], experiments: '*-bandit', name:"))
    [ramps] = load(CI.replace("name:", "experiments: 'player-*', name:"))
    stop, allocate, proposed = decision(), decision("signal.allocate.v1"), decision("signal.proposed.v1")
    assert [usual.wants(one) for one in (stop, allocate, proposed, order())] == [True, False, True, False]
    assert [orders.wants(one) for one in (stop, allocate, proposed, order())] == [False, True, False, False]
    assert [ramps.wants(one) for one in (stop, proposed)] == [False, True]


def test_a_proposal_is_no_stop_and_no_ship() -> None:
    assert event_of(decision("signal.proposed.v1")) is Event.PROPOSED


def test_every_action_is_an_event() -> None:
    told = decision()
    for action in Action:
        data = msgspec.structs.replace(
            told.data, decision=msgspec.structs.replace(told.data.decision, action=action)
        )
        assert event_of(msgspec.structs.replace(told, data=data)) == action


def test_the_command_checks_a_file(tmp_path: Path) -> None:
    path = tmp_path / "targets.yaml"
    path.write_text("targets:\n" + CI)
    call = ["notify", "--check", "--targets", str(path)]
    environ = {"CI_KEY": KEY, "STREAM_XP_NOTIFY_ALLOWED_HOSTS": "ci.example.com"}
    good = CliRunner().invoke(main, call, env=environ)
    assert (good.exit_code, good.output) == (0, "")
    refused = CliRunner().invoke(main, call, env={"CI_KEY": KEY})
    assert refused.exit_code == 2
    assert "targets.yaml:2:19: targets[0].url: has the host ci.example.com" in refused.stderr
    assert KEY not in refused.stderr


def test_the_example_is_valid(tmp_path: Path) -> None:
    for name in ("ci-keys", "chat-url"):
        (tmp_path / name).write_text(KEY if name == "ci-keys" else ENVIRON["CHAT_URL"])
    path = tmp_path / "targets.yaml"
    path.write_text((ROOT / "examples" / "notify" / "targets.yaml").read_text().replace("/run/secrets/", ""))
    settings = Settings(notify_allowed_hosts=("ci.example.com", "hooks.slack.com"))
    assert [one.format for one in load_targets(path, settings, {})] == [Format.CLOUDEVENT, Format.SLACK]
