// What it brings, how wrong it is, how fast, and whether all is well.

import { at, get, named, objects } from "./api.js";
import { bars, gauge, lines, spread } from "./charts.js";
import { el, put, set } from "./dom.js";
import { count, ms, nusd, plural, share, span, usd, usdMark, words } from "./format.js";
import { table } from "./table.js";

export const title = "Overview";

const FAMILIES = ["cached", "streaming", "batch", "edge", "hybrid", "speculative"];
const SPANS = { "24h": ["24 hours", 24, "hour"], "7d": ["7 days", 7, "day"], "30d": ["30 days", 30, "day"],
  "90d": ["90 days", 90, "day"] };
const UNIT_MS = { hour: 3_600_000, day: 86_400_000 };

export async function show(place, _rest, query, signal) {
  const since = query.get("since") in SPANS ? query.get("since") : "30d";
  const [about, n, unit] = SPANS[since];
  put(place, choice(since));
  const savings = (groups) => get(at("/savings", { group_by: groups, since }), signal).then(objects);
  const [periods, families, policy, stats, latency, tops] = await Promise.all([
    savings(unit), savings(`${unit},strategy`), get("/cache/policy", signal), get("/cache/stats", signal),
    named("latency_lately", since, signal), named("top_entries", since, signal),
  ]);
  const shown = slots(n, unit);
  const byLabel = new Map(periods.map((row) => [String(row[unit]), row]));
  const rows = shown.map((slot) => byLabel.get(slot.key) ?? null);
  set(place, 
    el("div", { class: "row between" }, choice(since), standing(stats.degraded)),
    trouble(stats.degraded),
    tiles(rows, families.filter((row) => shown.some((slot) => slot.key === String(row[unit]))), policy, about),
    savedChart(shown, families, unit, about),
    el("div", { class: "pair lean" }, hitChart(shown, rows, unit), latencyTable(latency)),
    await topEntries(tops, about, signal),
  );
}

const choice = (since) =>
  el("div", { class: "choice", role: "group", "aria-label": "Period" }, Object.entries(SPANS).map(([key, [label]]) =>
    el("button", { type: "button", "aria-pressed": String(key === since),
      onclick: () => { location.hash = `#/overview?since=${key}`; } }, label)));

// The last n hours or days in UTC, oldest first: {key as the ledger spells it, label}.
function slots(n, unit) {
  const size = UNIT_MS[unit];
  const last = Math.floor(Date.now() / size) * size;
  return Array.from({ length: n }, (_, i) => {
    const iso = new Date(last - (n - 1 - i) * size).toISOString();
    return unit === "day" ? { key: iso.slice(0, 10), label: iso.slice(5, 10) }
      : { key: String(Date.parse(iso)), label: iso.slice(11, 16) };
  });
}

const standing = (degraded) => (degraded.length ? null : el("p", { class: "sound" }, "Everything is sound"));

const trouble = (degraded) => degraded.length > 0 && el("section", { class: "notice", "aria-label": "Degraded" },
  el("h2", {}, `${plural(degraded.length, "part")} degraded`),
  el("ul", {}, degraded.map((one) => el("li", {}, el("strong", {}, words(one.part)), ": ", words(one.reason), ", for ",
    span(Date.now() - one.since_ms), ". ", el("span", { class: "quiet" }, one.do)))));

const sum = (rows, name) => rows.reduce((total, row) => total + (row?.[name] ?? 0), 0);

function tiles(rows, families, policy, about) {
  const [saved, baseline] = [sum(rows, "saved_usd"), sum(rows, "baseline_usd")];
  const [asked, hits] = [sum(rows, "requests"), sum(rows, "hits")];
  const { learning } = policy;
  return el("div", { class: "tiles" },
    tile("Saved", usd(saved), baseline ? `${share(saved / baseline)} of ${usd(baseline)} in ${about}` : `in ${about}`),
    tile("Hit rate", asked ? share(hits / asked) : "–", `${count(hits)} of ${plural(asked, "request")}`),
    wrongTile(policy),
    tile("Net of learning", nusd(learning.earned - learning.spent),
      `hits by meaning earned ${nusd(learning.earned)}, ${plural(learning.audits, "audit")} cost ${nusd(learning.spent)}`,
      learning.has_room ? null : "the budget for learning is spent"));
}

const tile = (label, figure, ...told) => el("section", { class: "tile" }, el("h2", {}, label),
  el("p", { class: "figure" }, figure), told.filter(Boolean).map((text) => el("p", {}, text)));

// The share of wrong answers among those served by meaning, as it was measured over the whole installation.
function wrongTile({ rules, evidence }) {
  const budget = rules.max_error_rate;
  const region = evidence.find((level) => level.level === "installation")?.regions?.alike;
  const title = "Wrong answers, by meaning";
  if (!region || region.share_wrong === null) {
    return tile(title, "–", `nothing compared yet; the budget is ${share(budget)}`);
  }
  const [low, high] = region.interval;
  const told = `${share(low)} to ${share(high)}, from ${plural(region.pairs, "comparison")}; budget ${share(budget)}`;
  return el("section", { class: "tile" }, el("h2", {}, title),
    el("p", { class: `figure ${low > budget ? "bad" : ""}` }, share(region.share_wrong)),
    gauge(region.share_wrong, region.interval, budget), el("p", {}, told));
}

function savedChart(shown, families, unit, about) {
  const cells = new Map(families.map((row) => [`${row[unit]} ${row.strategy}`, row.saved_usd]));
  const series = FAMILIES.map((name, i) => ({ name, tone: `tone-${i + 1}`,
    values: shown.map((slot) => cells.get(`${slot.key} ${name}`) ?? 0) }))
    .filter((one, i) => i === 0 || one.values.some((value) => value !== 0));
  const total = series.reduce((all, one) => all + sum(one.values.map((v) => ({ v })), "v"), 0);
  return bars("Saved, by strategy", `Saved in ${about}, by strategy: ${usd(total)} in all. The table below has each value.`,
    shown.map((slot) => slot.label), series, { format: usd, mark: usdMark, head: unit === "day" ? "Day (UTC)" : "Hour (UTC)" });
}

function hitChart(shown, rows, unit) {
  const rate = rows.map((row) => (row && row.requests ? row.hits / row.requests : null));
  const money = rows.map((row) => (row && row.baseline_usd ? row.saved_usd / row.baseline_usd : null));
  return lines("Hit rate", "Hit rate over time, as a share of requests and of money. The table below has each value.",
    shown.map((slot) => slot.label), [{ name: "of requests", tone: "tone-1", values: rate },
      { name: "of money", tone: "tone-3", values: money }],
    { format: (v) => share(v, 0), head: unit === "day" ? "Day (UTC)" : "Hour (UTC)", top: 1 });
}

const latencyTable = (rows) => el("section", { class: "card" }, el("h2", {}, "Latency by lane"),
  table("Latency by lane", [
    { label: "Lane", whole: true, cell: (row) => row.lane },
    { label: "Requests", number: true, cell: (row) => count(row.requests) },
    { label: "First byte", number: true, cell: (row) => ms(row.ttft_p50_ms) },
    { label: "Median", number: true, cell: (row) => ms(row.p50_ms) },
    { label: "95 %", number: true, cell: (row) => ms(row.p95_ms) },
    { label: "Spread", cell: (row) => spread(row.p50_ms, row.p95_ms) },
  ], rows, { empty: "No request yet." }),
  el("p", { class: "quiet" }, "Of the newest 5,000 requests of the period."));

async function topEntries(tops, about, signal) {
  const best = tops.slice(0, 10);
  const known = new Map();
  if (best.length) {
    const ids = best.map((row) => row.entry_id).join(",");
    for (const entry of (await get(at("/cache/entries", { ids }), signal)).entries) known.set(entry.id, entry);
  }
  return el("section", { class: "card" }, el("h2", {}, `Entries that saved most, ${about}`),
    table("Entries that saved most", [
      { label: "Question", wide: true, cell: (row) => (known.has(row.entry_id)
        ? el("a", { href: `#/entries/${row.entry_id}`, class: "clip" }, known.get(row.entry_id).prompt || "(not text)")
        : el("span", { class: "quiet" }, `entry ${row.entry_id}, gone since`)) },
      { label: "Model", whole: true, cell: (row) => known.get(row.entry_id)?.model },
      { label: "Hits", number: true, cell: (row) => count(row.hits) },
      { label: "Saved", number: true, cell: (row) => usd(row.saved_usd) },
    ], best, { empty: "No answer was served from the cache yet." }));
}
