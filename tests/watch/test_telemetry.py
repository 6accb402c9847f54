"""Lines and counters, as an operator sees them."""

from __future__ import annotations

import io
import logging
import sys
import threading
import time
from collections.abc import Iterator

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from proxy.core.model import Call, Outcome
from proxy.watch.logs import FIELD_LIMIT_BYTES, QUEUE_LIMIT, LineFormat, LogWriter, Redactor, set_up, tear_down
from proxy.watch.telemetry import LABEL_LIMIT, Telemetry
from tests.waiting import PATIENCE_S

FORGERIES = [
    'x\r\n{"level":"info","event":"forged"}',
    "x\nWARNING forged",
    "\x1b[2J\x1b[31mred",
    "a\u2028b\u2029c\u0085d\x0be",
    "\x00\x07\x7f\x9b31m",
    "\u202etxt.exe\u2066\ufeff",
    '","level":"critical","x":"',
    "a\\",
    "\ud800",
    "U" * 1_000_000,
    "\u2028" * 5_000,
]
SECRETS = {
    "bearer": "Authorization: Bearer canary-client-0123456789",
    "openai": "sk-proj-canary0123456789abcdef",
    "google": "AIzaSyCanary0123456789_abcdefghij",
    "database": "postgresql://ibid:canary-pw@db:5432/x",
    "header": "x-api-key: canary-header-value",
    "query": "https://h/p?access_token=canary-query-value&x=1",
    "json": '{"api_key": "canary-json-value"}',
    "jwt": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJjYW5hcnkifQ.canarysig",
    "known": "this is the canary value of a known secret",
}
KNOWN = "canary value of a known secret"


def outcome(**changes: object) -> Outcome:
    fields: dict[str, object] = {
        "request_id": "r-1", "ts_ms": 1_790_000_000_000, "tenant": "t" * 64, "namespace": "", "tag": "",
        "dialect": "openai", "endpoint": "/v1/chat/completions", "stream": False, "model_requested": "gpt-5",
        "model_served": "gpt-5", "upstream": "openai", "mechanism": "cache.exact", "outcome": "ok",
        "cache_status": "HIT", "reason": "hit", "status": 200, "similarity": None, "entry_id": 7, "retry_of": None,
        "usage": None, "usage_basis": "measured", "calls": (), "ttft_ms": None, "total_ms": 0.2, "baseline_ms": 900.0,
        "tier": "default",
        "key_id": None, "team": "",
    }  # fmt: skip
    return Outcome(**(fields | changes))  # type: ignore[arg-type]


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


@pytest.fixture(params=[True, False], ids=["json", "text"])
def writer(request: pytest.FixtureRequest, stream: io.StringIO) -> Iterator[LogWriter]:
    writer = set_up("DEBUG", as_json=request.param, stream=stream, secrets=[KNOWN])
    yield writer
    tear_down(writer)


def lines_of(writer: LogWriter, stream: io.StringIO) -> list[str]:
    writer.flush()
    text = stream.getvalue()
    assert text.endswith("\n") or not text
    return text.splitlines()  # splits at every character any reader may take for a line end


@pytest.mark.parametrize("value", FORGERIES, ids=range(len(FORGERIES)))
def test_one_event_is_one_printable_line_whatever_its_fields_hold(
    writer: LogWriter, stream: io.StringIO, value: str
) -> None:
    log = logging.getLogger("proxy.somewhere")
    log.info("event", extra={"agent": value, 'odd"name\n': 1})
    log.info("said %s", value)
    log.info(value)
    Telemetry(writer).lookup(outcome(model_requested=value, request_id=value, reason=value))
    try:
        raise ValueError(value)
    except ValueError:
        log.exception("failed")
    lines = lines_of(writer, stream)
    assert len(lines) == 5
    for line in lines:
        assert line.isprintable()
        line.encode()
        assert len(line.encode()) < 5 * 2 * FIELD_LIMIT_BYTES
        if line.startswith("{"):
            fields = orjson.loads(line)
            assert fields["level"] in ("info", "error")
            assert all(len(v.encode()) <= FIELD_LIMIT_BYTES for v in fields.values() if isinstance(v, str))


@given(value=st.text(), key=st.text(min_size=1))
def test_any_text_survives_as_one_json_line(value: str, key: str) -> None:
    form = LineFormat(Redactor(), as_json=True)
    record = logging.makeLogRecord({"name": "n", "msg": value, "args": None, "levelname": "INFO"})
    if key not in record.__dict__:
        record.__dict__[key] = value
    line = form.record(record)
    assert line.isprintable()
    assert isinstance(orjson.loads(line), dict)


@pytest.mark.parametrize("text", SECRETS.values(), ids=SECRETS)
def test_no_secret_reaches_a_line_by_message_field_exception_or_cause(
    writer: LogWriter, stream: io.StringIO, text: str
) -> None:
    log = logging.getLogger("proxy.somewhere")
    log.debug("sent %s", text)
    log.info("event", extra={"field": text, "nested": {"headers": [text]}})
    Telemetry(writer).lookup(outcome(model_requested=text, upstream=text))
    try:
        try:
            raise OSError(text)
        except OSError as cause:
            raise RuntimeError(f"outer {text}") from cause
    except RuntimeError:
        log.exception("failed: %s", text)
    written = "\n".join(lines_of(writer, stream))
    assert "canary" not in written
    assert "[hidden]" in written


def test_a_secret_cut_by_the_field_limit_is_not_half_shown() -> None:
    redactor = Redactor([KNOWN])
    for start in range(FIELD_LIMIT_BYTES - 40, FIELD_LIMIT_BYTES + 10):
        assert "canary" not in redactor.clean("x" * start + KNOWN)
    for start in range(15_960, 16_010):
        assert "canary" not in redactor.clean("x" * start + KNOWN + "y" * 9)


def test_a_secret_learnt_later_is_hidden_in_lines_that_repeat(writer: LogWriter, stream: io.StringIO) -> None:
    telemetry = Telemetry(writer)
    telemetry.lookup(outcome(model_requested="plainword"))
    writer.flush()
    writer.form.redactor.register("plainword")
    telemetry.lookup(outcome(model_requested="plainword"))
    first, second = lines_of(writer, stream)
    assert "plainword" in first
    assert "plainword" not in second


def test_a_path_named_after_a_token_is_still_shown() -> None:
    assert Redactor().clean("admin token: /data/admin-token") == "admin token: /data/admin-token"


def test_patterns_stay_fast_on_text_made_to_slow_them() -> None:
    for evil in ("a-" * 500_000, "eyJ-" * 250_000, "key " * 250_000, "bearer " + " " * 1_000_000, "x://" * 250_000):
        began = time.thread_time()
        Redactor().clean(evil)
        assert time.thread_time() - began < 0.5


def test_uncaught_exceptions_of_threads_and_of_the_process_become_redacted_lines(
    writer: LogWriter, stream: io.StringIO
) -> None:
    def fail() -> None:
        raise RuntimeError(SECRETS["openai"])

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    try:
        fail()
    except RuntimeError as error:
        sys.excepthook(RuntimeError, error, error.__traceback__)
    lines = lines_of(writer, stream)
    assert len(lines) == 2
    assert all("RuntimeError" in line and "canary" not in line for line in lines)


def test_a_warning_is_written_without_being_asked_for(stream: io.StringIO) -> None:
    written = threading.Event()

    class Told(io.StringIO):
        def flush(self) -> None:
            written.set()

    writer = set_up("INFO", stream=Told())
    try:
        logging.getLogger("proxy").warning("now")
        assert written.wait(PATIENCE_S)
    finally:
        tear_down(writer)


def test_whatever_is_queued_wakes_the_thread_that_rests(stream: io.StringIO) -> None:
    written = threading.Semaphore(0)

    class Told(io.StringIO):
        def flush(self) -> None:
            written.release()

    writer = LogWriter(Told(), LineFormat(Redactor(), as_json=True))
    writer.start()
    for number in range(5):
        while not writer._rests:  # it has written all there was
            assert writer._thread.is_alive()
        writer.post(str, f"line {number}")
        assert written.acquire(timeout=PATIENCE_S)
    writer.close()
    assert not writer._thread.is_alive()


def test_a_full_queue_drops_lines_and_says_how_many(stream: io.StringIO) -> None:
    writer = LogWriter(stream, LineFormat(Redactor(), as_json=True))
    for _ in range(QUEUE_LIMIT + 5):
        writer.post(str, "x")
    lines = lines_of(writer, stream)
    assert writer.dropped == 5
    assert sum(line == "x" for line in lines) == QUEUE_LIMIT
    assert sum("5 log lines dropped" in line for line in lines) == 1


def test_a_closed_stream_or_an_odd_field_does_not_end_the_log(stream: io.StringIO) -> None:
    writer = LogWriter(stream, LineFormat(Redactor(), as_json=True))
    writer.post(int, "not a number")
    writer.post(str, "after")
    assert [line[-5:] for line in lines_of(writer, stream)][-1] == "after"
    stream.close()
    writer.post(str, "more")
    writer.flush()


def test_a_lookup_line_has_the_stable_keys(stream: io.StringIO) -> None:
    writer = LogWriter(stream, LineFormat(Redactor(), as_json=True))
    steps = {"plan": 0.1, "exact": 0.2, "embed": 5.0, "search": 0.3, "judge": 0.05}
    Telemetry(writer).lookup(
        outcome(cache_status="MISS", mechanism=None, reason="numbers", similarity=0.913, entry_id=None),
        steps,
        scope=bytes.fromhex("0a1b2c3d4e"),
        age_s=12.5,
    )
    fields = orjson.loads(lines_of(writer, stream)[0])
    assert fields | {"ts": ""} == {
        "ts": "", "level": "info", "logger": "proxy.lookup", "event": "lookup", "request_id": "r-1",
        "verdict": "near-miss", "tier": "", "reason": "numbers", "status": 200, "outcome": "ok", "upstream": "openai",
        "model": "gpt-5", "total_ms": 0.2, "scope": "0a1b2c3d", "similarity": 0.913, "entry": None, "age_s": 12.5,
        "plan_ms": 0.1, "exact_ms": 0.2, "embed_ms": 5.0, "search_ms": 0.3, "judge_ms": 0.05,
    }  # fmt: skip


def test_lookups_leave_no_line_when_the_level_is_above_info(stream: io.StringIO) -> None:
    writer = LogWriter(stream, LineFormat(Redactor(), as_json=True))
    telemetry = Telemetry(writer, level=logging.WARNING)
    assert not telemetry.log_lookups
    telemetry.lookup(outcome())
    assert lines_of(writer, stream) == []
    assert telemetry.count("HIT") == 1


def samples(telemetry: Telemetry) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    text = telemetry.exposition().decode()
    return {
        (s.name, frozenset(s.labels.items())): s.value for f in text_string_to_metric_families(text) for s in f.samples
    }


def test_metrics_add_up_and_histograms_are_cumulative() -> None:
    telemetry = Telemetry()
    call = Call("c", 0, "openai", "gpt-5", "answer", "default", True, None, "none", 200, None, 800.0)
    telemetry.lookup(outcome(), {"plan": 0.5, "embed": 4.0, "forward": 99.0}, saved_nusd=1_500_000_000)
    telemetry.lookup(outcome(total_ms=3.0))
    telemetry.lookup(outcome(mechanism=None, cache_status="MISS", calls=(call,), total_ms=801.0), cost_nusd=250)
    telemetry.lookup(outcome(mechanism="stream.coalesce"))
    telemetry.veto("numbers")
    telemetry.fault("embedder_busy")
    telemetry.fault("odd")
    telemetry.watch("ibid_queue", "Waiting", lambda: 3, queue="store")
    telemetry.watch("ibid_queue", "Waiting", lambda: 4, queue="embed")
    got = samples(telemetry)

    def value(name: str, **labels: str) -> float:
        return got[name, frozenset(labels.items())]

    assert value("ibid_requests_total", cache="HIT", tier="exact", reason="hit", status="200") == 2
    assert value("ibid_collapsed_total") == 1
    assert value("ibid_saved_usd_total", lane="exact") == 1.5
    assert value("ibid_cost_usd_total", upstream="openai") == pytest.approx(2.5e-7)
    assert value("ibid_guard_veto_total", guard="numbers") == 1
    assert value("ibid_faults_total", room="embedder", reason="embedder_busy") == 1
    assert value("ibid_faults_total", room="cache", reason="odd") == 1
    assert value("ibid_queue", queue="store") == 3
    assert value("ibid_queue", queue="embed") == 4
    assert value("ibid_request_seconds_bucket", lane="exact", le="0.00025") == 1
    assert value("ibid_request_seconds_bucket", lane="exact", le="0.005") == 2
    assert value("ibid_request_seconds_bucket", lane="exact", le="+Inf") == 2
    assert value("ibid_request_seconds_sum", lane="exact") == pytest.approx(0.0032)
    assert value("ibid_upstream_seconds_count", upstream="openai") == 1
    assert value("ibid_lookup_seconds_sum") == pytest.approx(0.0045)
    assert value("ibid_embed_seconds_count") == 1
    assert telemetry.count() == 4


def test_invented_labels_cannot_grow_the_metrics_without_bound() -> None:
    telemetry = Telemetry()
    for n in range(LABEL_LIMIT * 2):
        telemetry.lookup(outcome(reason=f"r{n}", upstream=f"u{n}"), cost_nusd=1)
        telemetry.fault(f"f{n}")
    text = telemetry.exposition().decode()
    assert text.count("ibid_requests_total{") <= LABEL_LIMIT + 1
    assert text.count("ibid_cost_usd_total{") <= LABEL_LIMIT + 1
    assert telemetry.count() == LABEL_LIMIT * 2


def exposed(telemetry: Telemetry) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(telemetry.exposition().decode())
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def test_who_asked_what_is_counted_and_bounded_and_shows_no_secret() -> None:
    telemetry = Telemetry()
    for _ in range(3):
        telemetry.lookup(outcome(namespace="shop", team="web"), saved_nusd=5_000)
    telemetry.lookup(outcome(model_requested="sk-proj-canary0123456789abcdef", cache_status="MISS"), cost_nusd=7_000)
    for long in ("m" * 500 + "1", "m" * 500 + "2"):  # alike once they are cut
        telemetry.lookup(outcome(model_requested=long))
    text = telemetry.exposition().decode()
    assert 'ibid_asked_total{cache="HIT",model="gpt-5",namespace="shop",team="web"} 3.0' in text
    assert 'ibid_asked_saved_usd_total{model="gpt-5",namespace="shop",team="web"} 1.5e-05' in text
    assert "canary" not in text
    assert f'ibid_asked_total{{cache="HIT",model="{"m" * 64}",namespace="",team=""}} 2.0' in text
    for number in range(LABEL_LIMIT + 50):
        telemetry.lookup(outcome(namespace=f"n{number}"))
    asked = {labels: n for (name, labels), n in exposed(telemetry).items() if name == "ibid_asked_total"}
    assert len(asked) == LABEL_LIMIT
    assert sum(asked.values()) == telemetry.count()
    other = ("other",) * 4
    assert asked[tuple(sorted(zip(("cache", "model", "namespace", "team"), other, strict=True)))] == 54


def test_lines_are_sampled_evenly_but_none_that_failed_or_was_slow(stream: io.StringIO) -> None:
    writer = set_up("INFO", as_json=True, stream=stream)
    telemetry = Telemetry(writer, sample=0.25, slow_ms=1000.0)
    for number in range(100):
        telemetry.lookup(outcome(request_id=f"ok-{number}"))
    telemetry.lookup(outcome(request_id="failed", status=502, outcome="error"))
    telemetry.lookup(outcome(request_id="left", outcome="cancelled"))
    telemetry.lookup(outcome(request_id="slow", total_ms=1000.0), {"exact": 1.5, "forward": 998.0})
    tear_down(writer)
    lines = [orjson.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["request_id"] for line in lines[-3:]] == ["failed", "left", "slow"]
    assert len(lines) == 25 + 3
    assert (lines[-1]["level"], lines[-1]["event"], lines[-1]["forward_ms"]) == ("warning", "slow_request", 998.0)
    assert {line["level"] for line in lines[:-1]} == {"info"}


@pytest.mark.parametrize(("level", "written"), [(logging.WARNING, 1), (logging.ERROR, 0)])
def test_a_slow_request_has_the_level_of_a_warning(stream: io.StringIO, level: int, written: int) -> None:
    writer = set_up("DEBUG", as_json=True, stream=stream)
    telemetry = Telemetry(writer, level=level, slow_ms=1000.0)
    telemetry.lookup(outcome())
    telemetry.lookup(outcome(total_ms=5000.0))
    tear_down(writer)
    assert len(stream.getvalue().splitlines()) == written
