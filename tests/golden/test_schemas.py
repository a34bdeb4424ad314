"""The JSON Schemas follow from the types, and the samples fit schema and type alike."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner
from jsonschema import Draft202012Validator, FormatChecker, ValidationError

from stream_xp.adapters.kafka_admin import topics_dir
from stream_xp.domain.ages import Ages
from stream_xp.domain.codec import RawRecord, decode_exposure, decode_reward
from stream_xp.domain.dead_letter import DeadLetter
from stream_xp.domain.decision import Result
from stream_xp.domain.experiment import ExperimentRecord, ExperimentSpec
from stream_xp.domain.experiment_rules import record_rules
from stream_xp.domain.layers import Champion, Layer, Overlap
from stream_xp.domain.rollout import Allocation, BurnIn, Conclusion, Delay, Monitors, Ramp, Stage
from stream_xp.domain.statistics import ExperimentStatistics, PartitionStatistics, merge
from stream_xp.services import schemas
from stream_xp.services.spec_file import load_spec, parse_spec

SCHEMAS = topics_dir() / "schemas"
GOLDEN = topics_dir() / "golden"
EXAMPLES = Path(__file__).parents[2] / "examples"
SAMPLES = sorted(path.name for path in GOLDEN.glob("*.json"))
EVENTS = [name for name in SAMPLES if name.startswith(("exposure", "reward"))]
PLAIN = [name for name in SAMPLES if "cloudevent" not in name]
DECODERS = {"exposure": decode_exposure, "reward": decode_reward}
LATER_MS = 4_000_000_000_000


def record_of(sample: str) -> str:
    return sample.partition(".")[0]


def validator(record: str) -> Draft202012Validator:
    schema = json.loads((SCHEMAS / f"{record}.v1.json").read_text())
    return Draft202012Validator(schema, format_checker=FormatChecker())


def raw_event(sample: str) -> RawRecord:
    value = (GOLDEN / sample).read_bytes()
    headers = (("content-type", b"application/cloudevents+json"),) if "cloudevent" in sample else ()
    return RawRecord(b"member-17", value, headers, LATER_MS)


def test_the_files_are_as_generated() -> None:
    assert schemas.differences(SCHEMAS) == []


def test_check_names_a_file_that_is_not_as_generated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(SCHEMAS, tmp_path / "schemas")
    monkeypatch.setattr(schemas, "topics_dir", lambda: tmp_path)
    (tmp_path / "schemas" / "reward.v1.json").write_text("{}")
    (tmp_path / "schemas" / "old.v1.json").write_text("{}")
    checked = CliRunner().invoke(schemas.main, ["--check"])
    assert checked.exit_code == 1
    assert [line.split(":")[0] for line in checked.stderr.splitlines()] == ["old.v1.json", "reward.v1.json"]
    (tmp_path / "schemas" / "old.v1.json").unlink()
    assert CliRunner().invoke(schemas.main, ["--write"]).exit_code == 0
    assert CliRunner().invoke(schemas.main, []).exit_code == 0


@pytest.mark.parametrize("name", sorted(schemas.schemas()))
def test_each_schema_is_a_schema_and_says_what_it_is(name: str) -> None:
    schema = schemas.schemas()[name]
    Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["$id"].endswith(f"/{name}")
    assert schema["title"]
    assert schema["description"]
    assert "Attributes:" not in json.dumps(schema)


def test_attributes_become_descriptions_under_their_names_on_the_wire() -> None:
    definitions = schemas.schemas()["result.v1.json"]["$defs"]
    assert definitions["Outcomes"]["properties"]["in"]["description"] == "records read."
    evidence = definitions["Evidence"]["properties"]
    assert evidence["lower"]["description"] == evidence["upper"]["description"]


def test_every_record_has_a_sample() -> None:
    assert {record_of(sample) for sample in SAMPLES} == {record_of(name) for name in schemas.schemas()}


@pytest.mark.parametrize("sample", SAMPLES)
def test_each_sample_fits_its_schema(sample: str) -> None:
    validator(record_of(sample)).validate(json.loads((GOLDEN / sample).read_bytes()))


NOT_WHOLE = ("unknown", "minimal", "older")


@pytest.mark.parametrize("sample", [name for name in PLAIN if not any(word in name for word in NOT_WHOLE)])
def test_each_sample_decodes_and_encodes_to_itself(sample: str) -> None:
    raw = (GOLDEN / sample).read_bytes()
    decoded = msgspec.json.decode(raw, type=schemas.RECORDS[record_of(sample)])
    assert json.loads(msgspec.json.encode(decoded)) == json.loads(raw)


@pytest.mark.parametrize("sample", [name for name in SAMPLES if "older" in name])
def test_what_an_older_release_wrote_is_read_as_if_it_had_the_defaults(sample: str) -> None:
    kind = schemas.RECORDS[record_of(sample)]
    raw, whole = ((GOLDEN / name).read_bytes() for name in (sample, sample.replace(".older", "")))
    assert json.loads(raw) != json.loads(whole)
    assert msgspec.json.decode(raw, type=kind) == msgspec.json.decode(whole, type=kind)


@pytest.mark.parametrize("sample", [name for name in SAMPLES if record_of(name) == "experiment"])
def test_the_sample_records_keep_the_rules(sample: str) -> None:
    record = msgspec.json.decode((GOLDEN / sample).read_bytes(), type=ExperimentRecord)
    assert record_rules(record, record.spec.experiment) == []


@pytest.mark.parametrize("sample", EVENTS)
def test_each_event_passes_the_worker(sample: str) -> None:
    event = DECODERS[record_of(sample).partition("-")[0]](raw_event(sample))
    assert event.unit == "member-17"
    assert event.source == ("/checkout/web" if "cloudevent" in sample else event.source)


@pytest.mark.parametrize("record", ["exposure", "reward"])
def test_a_field_of_the_future_is_ignored(record: str) -> None:
    decode = DECODERS[record]
    assert decode(raw_event(f"{record}.unknown-field.v1.json")) == decode(raw_event(f"{record}.v1.json"))


@pytest.mark.parametrize("record", ["exposure", "reward"])
def test_defaults_fill_what_is_left_out(record: str) -> None:
    event = DECODERS[record](raw_event(f"{record}.minimal.v1.json"))
    written = json.loads(msgspec.json.encode(event))
    validator(record).validate(written)
    assert written["source"] == ""


@pytest.mark.parametrize("missing", ["specversion", "id", "source", "type", "data", "time"])
def test_an_envelope_without_an_attribute_fits_no_schema(missing: str) -> None:
    envelope = json.loads((GOLDEN / "exposure-cloudevent.v1.json").read_bytes())
    del envelope[missing]
    with pytest.raises(ValidationError):
        validator("exposure-cloudevent").validate(envelope)


def test_a_spec_of_the_future_fits_no_schema() -> None:
    spec = json.loads((GOLDEN / "experiment-spec.v1.json").read_bytes())
    with pytest.raises(ValidationError):
        validator("experiment-spec").validate({**spec, "holdouts": 0.05})


def test_the_sample_hashes_are_true() -> None:
    record = msgspec.json.decode((GOLDEN / "experiment.v1.json").read_bytes(), type=ExperimentRecord)
    assert (
        record.design_hash
        == record.spec.design_hash()
        == load_spec(EXAMPLES / "canary/spec.yaml").design_hash()
    )
    for example in ("bandit", "ramp"):
        spec = load_spec(EXAMPLES / example / "spec.yaml")
        raw = (GOLDEN / f"experiment.{example}.v1.json").read_bytes()
        moving = msgspec.json.decode(raw, type=ExperimentRecord)
        assert (moving.spec, moving.design_hash) == (spec, spec.design_hash())
    for example, sample in (("search", "layer"), ("holdout", "holdout")):
        spec = load_spec(EXAMPLES / f"many-experiments/{example}.yaml")
        raw = (GOLDEN / f"experiment.{sample}.v1.json").read_bytes()
        beside = msgspec.json.decode(raw, type=ExperimentRecord)
        assert (beside.spec, beside.design_hash) == (spec, spec.design_hash())
    for sample, example in (("events", "api-canary"), ("products", "recommendations")):
        raw = (GOLDEN / f"statistics.{sample}.v1.json").read_bytes()
        spec = load_spec(EXAMPLES / example / "spec.yaml")
        assert msgspec.json.decode(raw, type=PartitionStatistics).design_hash == spec.design_hash()
    letter = msgspec.json.decode((GOLDEN / "deadletter.v1.json").read_bytes(), type=DeadLetter)
    assert letter.value is not None
    assert (letter.value_bytes, letter.value_sha256) == (9, hashlib.sha256(letter.value).hexdigest())


@pytest.mark.parametrize("sample", [name for name in SAMPLES if record_of(name) == "statistics"])
def test_the_sample_statistics_are_canonical_and_conserved(sample: str) -> None:
    raw = (GOLDEN / sample).read_bytes()
    statistics = msgspec.json.decode(raw, type=PartitionStatistics)
    assert statistics.statistics.canonical() == msgspec.json.encode(json.loads(raw)["statistics"])
    assert merge([statistics.statistics, ExperimentStatistics()]) == statistics.statistics
    assert statistics.exposure_outcomes.conserved()
    assert statistics.reward_outcomes.conserved()


def test_the_sample_results_units_are_those_expected() -> None:
    result = msgspec.json.decode((GOLDEN / "result.v1.json").read_bytes(), type=Result)
    assert sum(arm.units for arm in result.arms) == pytest.approx(sum(a.expected_units for a in result.arms))


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*/spec.yaml")), ids=lambda path: path.parent.name)
def test_each_example_is_valid(file: Path) -> None:
    spec = load_spec(file)
    validator("experiment-spec").validate(json.loads(msgspec.json.encode(spec)))


# What `xp.experiments` holds of these files since before a spec could say how it moves. A hash that changes splits
# a running experiment in two.
OLD_HASHES = {
    "api-canary": "6e39701b2441be434337601d4ae54e98e0f2365f885e5e125efd22ac67bde111",
    "artwork": "2130899ea6778a7c534c8e5d8bd668a95a0e231851326bf51bede7819de25d1f",
    "canary": "6c3e11e34cd409e5067185365b2a31b7235a377d3f748a1947009532e2b5c3be",
    "open-bandit": "3325959475c1fb7ce4268181ce7748724a86c52778cf701dded879d4b80a3f09",
    "recommendations": "0294c871cefa00b9e1b2cf8b0c65e8e0fa1957f545bf99155104a69ce9112447",
}


@pytest.mark.parametrize("example", OLD_HASHES)
def test_the_design_of_a_spec_without_the_later_fields_is_what_it_was(example: str) -> None:
    assert load_spec(EXAMPLES / example / "spec.yaml").design_hash() == OLD_HASHES[example]


def test_the_files_in_the_documentation_are_valid() -> None:
    """The first block is a file; those after it are what may be added to it."""
    text = (EXAMPLES.parent / "docs" / "experiment-file.md").read_text()
    whole, *added = [block.partition("```")[0] for block in text.split("```yaml\n")[1:]]
    assert len(added) == 3
    for sections in ("", *added):
        parse_spec((whole + sections).encode(), "experiment-file.md")


@pytest.mark.parametrize(
    "section",
    [
        ExperimentSpec,
        Conclusion,
        Ramp,
        Stage,
        Allocation,
        BurnIn,
        Delay,
        Monitors,
        Layer,
        Overlap,
        Champion,
        Ages,
    ],
    ids=lambda one: one.__name__,
)
def test_the_documentation_names_every_field(section: type[msgspec.Struct]) -> None:
    text = (EXAMPLES.parent / "docs" / "experiment-file.md").read_text()
    prefix = {Stage: "stages[].", BurnIn: "burn_in.", Delay: "delay."}.get(section, "")
    nested = {"burn_in"}
    fields = [name for name in section.__struct_fields__ if name not in nested]
    assert [name for name in fields if f"| `{prefix}{name}` |" not in text] == []


def test_there_are_examples() -> None:
    assert {"canary", "artwork", "ramp", "bandit"} <= {
        path.parent.name for path in EXAMPLES.glob("*/spec.yaml")
    }
