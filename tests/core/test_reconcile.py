"""Exports of providers, told apart by their header, against the ledger: equal or the line that is not."""

from __future__ import annotations

import csv
import io
from datetime import date
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core import invoice
from proxy.core.errors import ConfigError
from proxy.core.invoice import COST, COUNTERS, NOT_BATCH, Key
from proxy.core.reconcile import DIFFERS, EQUAL, ONLY_INVOICE, ONLY_LEDGER, Billed, reconcile

DAY_S = 1_795_305_600  # 2026-11-22 00:00 UTC
OPENAI = (
    "start_time,end_time,start_time_iso,end_time_iso,num_model_requests,project_id,user_id,api_key_id,model,batch,"
    "service_tier,input_tokens,output_tokens,input_cached_tokens,input_audio_tokens,output_audio_tokens\n"
)
EMBEDDINGS = "start_time,end_time,start_time_iso,end_time_iso,input_tokens,num_model_requests,project_id,model\n"
COSTS = (
    "start_time,end_time,start_time_iso,end_time_iso,amount_value,amount_currency,quantity,quantity_unit,line_item,"
    "user_id,api_key_id,project_id,organization_id,project_name,organization_name,user_email,api_source\n"
)
ANTHROPIC = (
    "usage_date_utc,model_version,api_key,workspace,usage_type,context_window,usage_input_tokens_no_cache,"
    "usage_input_tokens_cache_write_5m,usage_input_tokens_cache_write_1h,usage_input_tokens_cache_read,"
    "usage_output_tokens,web_search_count,inference_geo,speed\n"
)
ANTHROPIC_COSTS = (
    "usage_date_utc,model,workspace,api_key,usage_type,context_window,token_type,cost_usd,list_price_usd,cost_type,"
    "inference_geo,speed\n"
)
PLAIN = "day,model,tier,calls,in_tok,cache_read_tok,out_tok,cost_usd\n"


def read(text: str) -> invoice.Invoice:
    return invoice.read(io.StringIO(text, newline=""), "bill.csv")


def bucket(hour: int = 0, hours: int = 24) -> str:
    return f"{DAY_S + hour * 3600},{DAY_S + (hour + hours) * 3600},iso,iso"


def billed(model: str = "gpt-4o", tier: str = "default", **changes: int) -> Billed:
    counters = {"calls": 2, "in_tok": 100, "cache_read_tok": 40, "cache_write_tok": 0, "out_tok": 10, "cost_nusd": 350,
                "estimated": 0}  # fmt: skip
    return Billed("2026-11-22", model, tier, **{**counters, **changes})


def statuses(text: str, *rows: Billed) -> list[tuple[str, str, str]]:
    found = reconcile(read(text), rows)
    assert len(found.rows()) == len(found.lines) + 1
    assert all(len(row) == len(found.columns) for row in found.rows())
    return [(line.key.model, line.key.tier, line.status) for line in found.lines]


def test_openai_usage_by_tier_project_and_hour_is_summed_to_the_ledgers_lines() -> None:
    text = OPENAI + (
        f"{bucket(0, 1)},1,p1,,,gpt-4o-2024-08-06,false,default,60,6,40,0,0\n"
        f"{bucket(23, 1)},1,p2,,,gpt-4o-2024-08-06,false,default,40,4,0,0,0\n"
        f"{bucket()},7,p1,,,gpt-4o-2024-08-06,true,,70,7,,,\n"
        f"{bucket()},3,p1,,,gpt-5.4,false,flex,30,3,0,0,0\n"
    )
    found = read(text)
    assert (found.shape.provider, found.tiers) == ("openai", "each")
    assert found.measures == ("calls", "in_tok", "cache_read_tok", "out_tok")
    line = found.lines[Key("2026-11-22", "gpt-4o-2024-08-06", "default")]
    assert (line.number, line.counters) == (2, {"calls": 2, "in_tok": 100, "cache_read_tok": 40, "out_tok": 10})
    rows = [
        billed("gpt-4o-2024-08-06"),
        billed("gpt-4o-2024-08-06", "batch", calls=7, in_tok=70, cache_read_tok=0, out_tok=7),
        billed("gpt-5.4", "flex", calls=3, in_tok=30, cache_read_tok=0, out_tok=3),
    ]
    assert {status for *_, status in statuses(text, *rows)} == {EQUAL}


def test_what_an_export_does_not_tell_apart_is_not_compared_apart() -> None:
    """The dashboard leaves the column of a dimension empty that it was not asked to group by."""
    flex, batch = billed(tier="flex"), billed(tier="batch")
    text = OPENAI + f"{bucket()},6,,,,gpt-4o,,,300,30,120,,\n"
    assert statuses(text, billed(), flex, batch) == [("gpt-4o", "all", EQUAL)]
    text = OPENAI + f"{bucket()},4,,,,gpt-4o,false,,200,20,80,,\n{bucket()},2,,,,gpt-4o,true,,100,10,40,,\n"
    assert statuses(text, billed(), flex, batch) == [("gpt-4o", "batch", EQUAL), ("gpt-4o", NOT_BATCH, EQUAL)]
    text = OPENAI + f"{bucket()},6,,,,,,,300,30,120,,\n"
    assert statuses(text, billed(), billed("gpt-5"), billed("o3")) == [("all", "all", EQUAL)]


def test_openai_embeddings_and_costs() -> None:
    text = EMBEDDINGS + f"{bucket()},100,2,p,text-embedding-3-small\n"
    found = read(text)
    assert (found.shape.operations, found.measures) == ("embeddings", ("calls", "in_tok"))
    assert read(OPENAI + f"{bucket()},1,,,,m,,,1,1,0,,\n").shape.operations == "others"
    costs = COSTS + (
        f"{bucket()},,,,,,,,,,,,,\n"
        f'{bucket()},0.000000200000000000000000000000,usd,100,tokens,"gpt-4o-2024-08-06, input",,,,,,,,\n'
        f'{bucket()},0.000000150000000000000000000000,usd,10,tokens,"gpt-4o-2024-08-06, output",,,,,,,,\n'
    )
    assert read(costs).measures == (COST,)
    assert statuses(costs, billed("gpt-4o-2024-08-06"), billed("free", cost_nusd=0)) == [
        ("gpt-4o-2024-08-06", "all", EQUAL)
    ]
    assert statuses(costs, billed("gpt-4o-2024-08-06", cost_nusd=352)) == [("gpt-4o-2024-08-06", "all", DIFFERS)]
    with pytest.raises(ConfigError, match=r"bill\.csv, line 2: amount_currency is 'eur'"):
        read(COSTS + f"{bucket()},1.0,eur,1,tokens,x,,,,,,,,\n")


def test_anthropic_usage_and_costs() -> None:
    usage = ANTHROPIC + (
        "2026-11-22,claude-haiku-4-5-20251001,k1,Default,standard,≤ 200k,50,5,1,40,6,0,global,\n"
        "2026-11-22,claude-haiku-4-5-20251001,k2,Default,standard,≤ 200k,3,0,1,0,4,0,global,\n"
        "2026-11-22,claude-haiku-4-5-20251001,k1,Default,batch,≤ 200k,9,0,0,0,9,0,global,\n"
    )
    ours = billed("claude-haiku-4-5-20251001", cache_write_tok=7)
    batch = billed("claude-haiku-4-5-20251001", "batch", in_tok=9, cache_read_tok=0, out_tok=9)
    assert read(usage).measures == ("in_tok", "cache_read_tok", "cache_write_tok", "out_tok")
    assert statuses(usage, ours, batch) == [("claude-haiku-4-5-20251001", "batch", EQUAL),
                                            ("claude-haiku-4-5-20251001", "default", EQUAL)]  # fmt: skip
    costs = ANTHROPIC_COSTS + (
        "2026-11-22,Claude Haiku 4.5,Default,k,message,≤ 200k,input_no_cache,0.19,0.19,token,global,\n"
        "2026-11-22,Claude Haiku 4.5,Default,k,message,≤ 200k,output,0.03,0.03,token,global,\n"
    )
    for nusd, status in ((220_000_000, EQUAL), (229_000_000, EQUAL), (231_000_000, DIFFERS), (0, DIFFERS)):
        assert statuses(costs, billed("claude-haiku-4-5-20251001", cost_nusd=nusd)) == [
            ("claude-haiku-4-5", "default", status)
        ], nusd


def test_an_alias_is_compared_with_its_snapshots_and_two_snapshots_are_not_mixed() -> None:
    def line(model: str, calls: int) -> str:
        return f"2026-11-22,{model},default,{calls}\n"

    header = "day,model,tier,calls\n"
    text = header + line("gpt-4o-2024-05-13", 1) + line("gpt-4o-2024-08-06", 3)
    assert statuses(text, billed("gpt-4o", calls=4)) == [("gpt-4o", "default", EQUAL)]
    assert statuses(text, billed("gpt-4o-2024-05-13", calls=1), billed("gpt-4o-2024-08-06", calls=3)) == [
        ("gpt-4o-2024-05-13", "default", EQUAL), ("gpt-4o-2024-08-06", "default", EQUAL)
    ]  # fmt: skip
    assert statuses(header + line("gpt-4o-2024-05-13", 1), billed("gpt-4o-2024-08-06", calls=1)) == [
        ("gpt-4o-2024-05-13", "default", ONLY_INVOICE), ("gpt-4o-2024-08-06", "default", ONLY_LEDGER)
    ]  # fmt: skip


def test_rows_tell_both_sides_their_difference_and_the_total() -> None:
    text = PLAIN + "2026-11-22,gpt-4o,default,2,101,40,10,0.00000035\n2026-11-22,other,flex,1,5,0,1,0.5\n"
    found = reconcile(read(text), [billed(estimated=1), billed("mine", calls=1, unpriced=1)])
    assert found.columns == (
        "line", "day", "model", "tier", "status", "invoice_calls", "ledger_calls", "calls_difference", "invoice_in_tok",
        "ledger_in_tok", "in_tok_difference", "invoice_cache_read_tok", "ledger_cache_read_tok",
        "cache_read_tok_difference", "invoice_out_tok", "ledger_out_tok", "out_tok_difference", "invoice_usd",
        "ledger_usd", "difference_nusd", "estimated", "unpriced",
    )  # fmt: skip
    day = "2026-11-22"
    assert found.rows() == [
        (2, day, "gpt-4o", "default", DIFFERS,
         2, 2, 0, 101, 100, 1, 40, 40, 0, 10, 10, 0, 3.5e-7, 3.5e-7, 0, 1, 0),
        (None, day, "mine", "default", ONLY_LEDGER,
         0, 1, -1, 0, 100, -100, 0, 40, -40, 0, 10, -10, 0.0, 3.5e-7, -350, 0, 1),
        (3, day, "other", "flex", ONLY_INVOICE,
         1, 0, 1, 5, 0, 5, 0, 0, 0, 1, 0, 1, 0.5, 0.0, 500_000_000, 0, 0),
        (None, "total", "", "", DIFFERS,
         3, 3, 0, 106, 200, -94, 40, 80, -40, 11, 20, -9, 0.50000035, 7e-7, 499_999_650, 1, 1),
    ]  # fmt: skip
    assert found.unequal() == {DIFFERS: 1, ONLY_LEDGER: 1, ONLY_INVOICE: 1}
    columns, rows = found.brief()
    assert columns == (
        "line", "day", "model", "tier", "status", "calls", "in_tok", "cache_read_tok", "out_tok", "usd", "estimated",
        "unpriced",
    )  # fmt: skip
    assert rows[0] == (2, day, "gpt-4o", "default", DIFFERS, "2", "101 - 100 = 1", "40", "10", "0.00000035", 1, 0)
    assert rows[1][-3] == "0 - 0.00000035 = -0.00000035"
    assert rows[3][5:] == ("3", "106 - 200 = -94", "40 - 80 = -40", "11 - 20 = -9",
                           "0.50000035 - 0.0000007 = 0.49999965", 1, 1)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no header of a known export; expected one of: OpenAI completions usage"),
        ("date,name,amount\n1,2,3\n", "plain .day, model., and a counter or cost_usd"),
        ("day,model\n2026-11-22,m\n", "no header"),
        ("day,model,calls,calls\n", "no header"),
        (PLAIN + "2026-11-22,m,default,1,1,1\n", "line 2: has 6 columns, its header 8"),
        (PLAIN + "22.11.2026,m,default,1,1,1,1,1\n", "line 2: day is '22.11.2026', not a day"),
        (PLAIN + "2026-11-22,m,default,1.5,1,1,1,1\n", "line 2: calls is '1.5', not a whole number"),
        (PLAIN + "2026-11-22,m,default,-1,1,1,1,1\n", "line 2: calls is '-1'"),
        (PLAIN + "2026-11-22,m,default,1,1,1,1,NaN\n", "line 2: cost_usd is 'NaN', not an amount"),
        (PLAIN + "2026-11-22,m,default,1,1,1,1,1e999\n", "line 2: cost_usd is '1e999'"),
        (PLAIN + "2026-11-22,m,default,1,1,1,1,1e-99999999\n", "line 2: cost_usd"),
        (PLAIN + '2026-11-22,m,default,1,1,1,1,"1\n', "line 2: unexpected end of data"),
        (PLAIN + "\n2026-11-22,m,default,1,1,1,1,1\n2026-11-22,m,default,x,1,1,1,1\n", "line 4: calls"),
        (OPENAI + f"{bucket(0, 48)},1,,,,m,,,1,1,0,,\n", "line 2: its start_time and end_time are not within one day"),
        (OPENAI + f"{bucket(12, 24)},1,,,,m,,,1,1,0,,\n", "line 2: its start_time"),
        (OPENAI + "99999999999999,99999999999999,i,i,1,,,,m,,,1,1,0,,\n", "line 2: its start_time"),
        (ANTHROPIC + "yesterday,m,k,w,standard,,1,1,1,1,1,0,,\n", "line 2: usage_date_utc is 'yesterday'"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        read(text)
    assert refused.value.message.startswith("bill.csv")


def test_a_quoted_field_a_byte_order_mark_and_other_encodings(tmp_path) -> None:
    path = tmp_path / "bill.csv"
    path.write_bytes(b"\xef\xbb\xbf" + PLAIN.replace("\n", "\r\n").encode() + b'"2026-11-22","a, b",,1,1,0,1,0\r\n')
    with path.open(encoding="utf-8-sig", newline="") as file:
        assert list(invoice.read(file, "b").lines) == [Key("2026-11-22", "a, b", "all")]
    path.write_bytes(PLAIN.encode() + b"2026-11-22,\xff,,1,1,0,1,0\n")
    with path.open(encoding="utf-8-sig", newline="") as file, pytest.raises(ConfigError, match="not UTF-8"):
        invoice.read(file, "b")


counts = st.integers(0, 10**12)
ledgers = st.dictionaries(
    st.tuples(
        st.dates(date(2025, 1, 1), date(2026, 12, 31)),
        st.sampled_from(["gpt-4o", "gpt-4o-2024-08-06", "claude-haiku-4-5-20251001", "ünï, \"quoted\"", "x"]),
        st.sampled_from(["default", "flex", "batch", "priority"]),
    ),
    st.tuples(st.integers(1, 10**6), counts, counts, counts, counts, st.integers(0, 10**15)),
    min_size=1, max_size=12,
)  # fmt: skip


def written(ledger, columns=(*COUNTERS, "cost_usd"), splits=()) -> str:
    """The ledger as a plain export; a key in `splits` as two lines."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["day", "model", "tier", *columns])
    for (day, model, tier), (*counted, nusd) in ledger.items():
        values = dict(zip((*COUNTERS, "cost_usd"), [*counted, nusd], strict=True))
        halves = [{name: value // 2 for name, value in values.items()}] if (day, model, tier) in splits else []
        rest = {name: value - sum(half[name] for half in halves) for name, value in values.items()}
        for part in [*halves, rest]:
            told = {**part, "cost_usd": f"{Decimal(part['cost_usd']).scaleb(-9):f}"}
            writer.writerow([day, model, tier, *(told[name] for name in columns)])
    return out.getvalue()


def rows_of(ledger) -> list[Billed]:
    return [Billed(day.isoformat(), model, tier, *values) for (day, model, tier), values in ledger.items()]


@given(ledger=ledgers, data=st.data())
def test_equal_ledgers_reconcile_to_equal(ledger, data) -> None:
    splits = data.draw(st.sets(st.sampled_from(sorted(ledger, key=str))))
    found = reconcile(read(written(ledger, splits=splits)), rows_of(ledger))
    assert {line.status for line in found.lines} == {EQUAL}
    assert found.total.status == EQUAL
    assert found.unequal() == {}
    assert found.total.invoice.cost_nusd == sum(values[-1] for values in ledger.values())


@given(ledger=ledgers, data=st.data())
def test_one_changed_counter_is_found_on_its_line(ledger, data) -> None:
    told = read(written(ledger))
    key = data.draw(st.sampled_from(sorted(ledger, key=str)))
    place = data.draw(st.integers(0, 5))
    by = data.draw(st.integers(1, 10**9))
    by = by if place < 5 else by + ledger[key][0] // 2 + 2  # beyond what rounding each call explains
    changed = list(ledger[key])
    changed[place] += by
    found = reconcile(told, rows_of({**ledger, key: tuple(changed)}))
    (wrong,) = [line for line in found.lines if line.status != EQUAL]
    assert (wrong.key.day, wrong.key.model, wrong.key.tier) == (key[0].isoformat(), *key[1:])
    assert wrong.status == DIFFERS
    assert wrong.invoice.number == 2 + list(ledger).index(key)
    row = found.rows()[found.lines.index(wrong)]
    names = [*(f"{name}_difference" for name in COUNTERS), "difference_nusd"]
    assert [row[found.columns.index(name)] for name in names] == [-by if index == place else 0 for index in range(6)]


@given(ledger=ledgers, data=st.data())
def test_a_line_of_one_side_alone_is_named(ledger, data) -> None:
    key = data.draw(st.sampled_from([(day, "only", "flex") for day, *_ in ledger]))
    extra = {**ledger, key: (3, 1, 1, 1, 1, 1_000_000)}
    for told, booked, status in ((extra, ledger, ONLY_INVOICE), (ledger, extra, ONLY_LEDGER)):
        found = reconcile(read(written(told)), rows_of(booked))
        assert [line.status for line in found.lines if line.status != EQUAL] == [status]


@given(st.decimals(0, 10**6, places=30))
def test_amounts_are_read_exactly(usd) -> None:
    line = read(f"day,model,cost_usd\n2026-11-22,m,{usd:f}\n").lines[Key("2026-11-22", "m", "all")]
    assert line.cost_nusd == Fraction(usd) * 10**9
    assert line.slack_nusd == Fraction(1, 10**21) / 2
