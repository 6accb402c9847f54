// Whether all is well, and the numbers behind it.

import { get } from "./api.js";
import { el, put } from "./dom.js";
import { bytes, count, ms, plural, share, span, when, words } from "./format.js";
import { shape } from "./requests.js";
import { facts, table } from "./table.js";

export const title = "Health";

export async function show(place, _rest, _query, signal) {
  const [stats, policy, ping] = await Promise.all([get("/cache/stats", signal), get("/cache/policy", signal), get("/cache/ping", signal)]);
  const { degraded, entries, requests, hot, ledger, judge, lanes, reindex, flights, ...gauges } = stats;
  put(place, 
    degraded.length
      ? el("section", { class: "card" }, el("h2", {}, `${plural(degraded.length, "part")} degraded`), table("Degraded parts", [
        { label: "Part", whole: true, cell: (one) => words(one.part) },
        { label: "Reason", cell: (one) => words(one.reason) },
        { label: "For", whole: true, cell: (one) => span(Date.now() - one.since_ms) },
        { label: "Why", wide: true, cell: (one) => one.why || "–" },
        { label: "What to do", wide: true, cell: (one) => one.do },
      ], degraded))
      : el("p", { class: "sound" }, "Everything is sound"),
    el("div", { class: "pair" },
      card("Cache", [["Entries", count(entries.entries)], ["Their size", bytes(entries.bytes)],
        ["Out of service", count(entries.quarantined)], ["Damaged", count(entries.damaged)],
        ["Oldest", when(entries.oldest_ms)], ["Newest", when(entries.newest_ms)],
        ["In memory", `${plural(hot.rows, "row")}, ${bytes(hot.bytes)}`], ["Forwards under way", count(flights)]]),
      card("Since the start", Object.entries(requests).map(([name, n]) => [name === "all" ? "Requests" : words(name), count(n)])),
      card("Ledger", [["State", words(ledger.state)], ["Written", count(ledger.written)], ["Waiting", count(ledger.waiting)],
        ["On file, not in SQL yet", bytes(ledger.journal_bytes)], ["Spilled", count(ledger.spilled)],
        ["Refused", count(ledger.refused)], ["Lost", count(ledger.dropped)], ["Database answers in", ms(ping.database_ms)]]),
      el("section", { class: "card" }, el("h2", {}, "This process"), shape("This process", gauges),
        el("p", { class: "quiet" }, el("a", { href: "/metrics" }, "Metrics"), " for Prometheus, ",
          el("a", { href: "/openapi.json" }, "routes"), " for programs"))),
    el("section", { class: "card" }, el("h2", {}, "Evidence"),
      el("p", { class: "quiet" }, `What the judge knows, level by level. The budget is ${share(policy.rules.max_error_rate)}.`),
      table("Evidence by level", [
        { label: "Level", head: true, wide: true, cell: (level) => [words(level.level), level.name ? ` ${level.name}` : ""].join("") },
        { label: "Hits", number: true, cell: (level) => count(Math.round(level.hits)) },
        { label: "Audited", number: true, cell: (level) => count(level.audited) },
        { label: "Counted wrong", number: true, cell: (level) => String(level.wrong) },
        { label: "Labels", number: true, cell: (level) => count(Math.round(level.labelled)) },
        { label: "Share wrong, measured", number: true, cell: (level) => measured(level.regions?.alike) },
        { label: "Room", cell: (level) => (level.has_room ? "yes" : el("span", { class: "badge warn" }, "none left")) },
      ], policy.evidence.slice(0, 100), { empty: "Nothing was compared yet." })),
    el("section", { class: "card" }, el("h2", {}, "Learning, lanes, index"),
      facts([["Answers compared by", policy.comparer], ["Refused pairs", count(judge.refused_pairs)],
        ["Audits under way", count(judge.auditing)], ["Comparisons under way", count(judge.comparing)],
        ["Room to learn", policy.learning.has_room ? "yes" : "none left"],
        ["Embedding anew", reindex ? `${count(reindex.done)} of ${count(reindex.total)}${reindex.running ? ", running" : ""}` : "not needed"]]),
      shape("Lanes", lanes)),
    el("details", {}, el("summary", {}, "All of it as JSON"), el("pre", { tabindex: "0" }, JSON.stringify({ stats, policy }, null, 2))),
  );
}

const card = (title, pairs) => el("section", { class: "card" }, el("h2", {}, title), facts(pairs));

const measured = (region) => (region && region.share_wrong !== null
  ? `${share(region.share_wrong)} (${share(region.interval[0])} to ${share(region.interval[1])})` : "–");
