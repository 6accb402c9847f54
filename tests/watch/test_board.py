"""The rules, the board and the scrape example name what ibid exposes, and nothing else."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest
import yaml

from deploy.pages import gauges
from proxy.core.reasons import MEANINGS
from proxy.watch.telemetry import Telemetry

DEPLOY = Path(__file__).parents[2] / "deploy"
RULES = yaml.safe_load((DEPLOY / "prometheus/ibid.rules.yml").read_text())["groups"]
BOARD = json.loads((DEPLOY / "grafana/ibid.json").read_text())
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
TARGET = {"instance", "job"}  # labels that a scrape adds
WORDS = {
    "cache": {"HIT", "MISS", "BYPASS", "STALE", "REFRESH", "SHADOW", "AUDIT"},
    "found": {"same", "different", "skipped", "failed"},
    "code": {"overloaded"},
    "reason": set(MEANINGS),
    "job": {"ibid"},
}
"""Values that an expression may name; every other label is only grouped by, or set by a variable of the board."""


def exposed() -> dict[str, set[str]]:
    """Every series by name, and its labels."""
    found = {name: labels for name, (_, labels) in gauges().items()} | {"up": set()}
    for family in Telemetry().collect():
        labels = set(family._labelnames)
        if family.type == "counter":
            found[f"{family.name}_total"] = labels
        else:
            found |= {f"{family.name}_{part}": labels for part in ("sum", "count")}
            found[f"{family.name}_bucket"] = {*labels, "le"}
    return found


def rules() -> Iterator[dict[str, Any]]:
    return (rule for group in RULES for rule in group["rules"])


def panels() -> list[dict[str, Any]]:
    return [panel for panel in BOARD["panels"] if panel["type"] != "row"]


def expressions() -> list[str]:
    asked = [target["expr"] for panel in panels() for target in panel["targets"]]
    for variable, value in (("$__rate_interval", "1m"), ("$__range", "6h"), ("$instance", ".*")):
        asked = [text.replace(variable, value) for text in asked]
    return [rule["expr"] for rule in rules()] + asked


def parts(expression: Any) -> Iterator[Any]:
    """A PromQL expression and all in it."""
    yield expression
    inner = [getattr(expression, name, None) for name in ("lhs", "rhs", "expr", "vector_selector", "param")]
    for one in [*inner, *getattr(expression, "args", ())]:
        if isinstance(one, promql.Expr):
            yield from parts(one)


def selectors(text: str) -> Iterator[Any]:
    return (one for one in parts(promql.parse(text)) if isinstance(one, promql.VectorSelector))


RECORDED = {rule["record"]: rule["expr"] for rule in rules() if "record" in rule}


def test_there_is_something_to_check() -> None:
    assert len(expressions()) > 35
    assert len(panels()) > 15
    assert sum(len(list(selectors(text))) for text in expressions()) >= len(expressions())


@pytest.mark.parametrize("text", expressions())
def test_every_series_and_label_of_an_expression_exists(text: str) -> None:
    known = exposed()
    labels: set[str] = set(TARGET)
    for selector in selectors(text):
        assert selector.name in known or selector.name in RECORDED, selector.name
        own = known.get(selector.name, set()) | TARGET
        labels |= own
        for matcher in selector.matchers.matchers:
            assert matcher.name in own, matcher.name
            if matcher.value != ".*":
                assert set(re.split(r"\|", matcher.value)) <= WORDS[matcher.name], matcher.value
    for one in parts(promql.parse(text)):
        if isinstance(one, promql.AggregateExpr) and one.modifier is not None:
            assert set(one.modifier.labels) <= labels, one.modifier.labels


def test_a_name_that_does_not_exist_is_found_out() -> None:
    for wrong in ("ibid_request_total", 'ibid_requests_total{lane="x"}', "sum by (nothing) (ibid_vectors)"):
        with pytest.raises(AssertionError):
            test_every_series_and_label_of_an_expression_exists(wrong)


def test_what_is_shown_of_a_series_is_a_label_of_its_result() -> None:
    for panel in panels():
        for target in panel["targets"]:
            shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            grouped = re.search(r"by \(([^)]*)\)", target["expr"])
            if grouped:
                assert shown <= {name.strip() for name in grouped[1].split(",")}, panel["title"]


def test_every_alert_says_what_it_means_and_how_urgent_it_is() -> None:
    alerts = [rule for rule in rules() if "alert" in rule]
    assert len(alerts) > 8
    for alert in alerts:
        assert set(alert["annotations"]) == {"summary", "description"}
        assert alert["labels"]["severity"] in {"page", "ticket"}


def test_panels_have_places_of_their_own() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells


def test_the_containers_mount_files_that_exist_and_the_scrape_finds_ibid() -> None:
    scrape = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    (job,) = scrape["scrape_configs"]
    assert job["job_name"] == "ibid"
    host, port = job["static_configs"][0]["targets"][0].split(":")
    assert COMPOSE["services"][host]["environment"]["IBID_ADMIN"].endswith(f":{port}")
    (secret,) = COMPOSE["services"]["prometheus"]["secrets"]
    assert job["authorization"]["credentials_file"] == f"/run/secrets/{secret}"
    assert COMPOSE["secrets"][secret] == {"environment": "IBID_ADMIN_TOKEN"}
    for service in ("prometheus", "grafana"):
        for volume in COMPOSE["services"][service]["volumes"]:
            source = volume.split(":")[0]
            assert source in COMPOSE["volumes"] or (DEPLOY / source).exists(), source


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed; it comes with Prometheus")
def test_prometheus_itself_takes_the_rules() -> None:
    command = ["promtool", "check", "rules", str(DEPLOY / "prometheus/ibid.rules.yml")]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
