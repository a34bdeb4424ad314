"""The rules as a PrometheusRule for the operator: `python deploy/prometheus/prometheus_rule.py --write`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import yaml

HERE = Path(__file__).parent
RULES = HERE / "rules"
FILE = HERE.parent / "kubernetes" / "prometheusrule.yaml"
HEAD = """# Written by `python deploy/prometheus/prometheus_rule.py --write` from deploy/prometheus/rules.
#
# The operator takes only rules whose labels its `ruleSelector` selects, by default none: give `metadata.labels` what
# yours asks for. `release: kube-prometheus-stack` is what the chart of that name asks for, installed under that name.
"""


def groups() -> list[dict[str, Any]]:
    """Every group of every file, by file name."""
    found: list[dict[str, Any]] = []
    for file in sorted(RULES.glob("*.yml")):
        found += yaml.safe_load(file.read_text())["groups"]
    return found


def resource() -> str:
    """The whole file."""
    rule = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "stream-xp", "labels": {"release": "kube-prometheus-stack"}},
        "spec": {"groups": groups()},
    }
    return HEAD + yaml.safe_dump(rule, sort_keys=False, width=120)


@click.command()
@click.option("--check", "action", flag_value="check", default=True, help="Exit 1 if it is not as generated.")
@click.option("--write", "action", flag_value="write", help="Write it.")
def main(action: str) -> None:
    """Check or write the PrometheusRule."""
    if action == "write":
        FILE.write_text(resource())
    elif FILE.read_text() != resource():
        click.echo(f"{FILE}: not as generated; run python {Path(__file__).name} --write", err=True)
        raise click.exceptions.Exit(1)


if __name__ == "__main__":
    main()
