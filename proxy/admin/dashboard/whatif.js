// The stored questions once more under other budgets: what more hits would bring, and what they would cost in errors.

import { get, post } from "./api.js";
import { lines } from "./charts.js";
import { el, field, put, say, set } from "./dom.js";
import { count, plural, share, usd } from "./format.js";
import { table } from "./table.js";

export const title = "What if";

const BUDGETS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1];

export async function show(place, _rest, _query, signal) {
  const { rules } = await get("/cache/policy", signal);
  const now = rules.max_error_rate;
  const budgets = [...new Set([...BUDGETS, now])].sort((a, b) => a - b).slice(0, 12);
  const [limit, most] = field("Newest questions at most", { type: "number", min: 1, max: 100000, value: 2000, required: true });
  const [where, namespace] = field("Only this namespace", { spellcheck: "false" });
  const answer = el("div", { class: "page" });
  const told = el("p", { role: "status", class: "quiet" });
  const run = async (event) => {
    event.preventDefault();
    const press = event.submitter;
    press.disabled = true;
    told.textContent = "Rehearsing. This takes from seconds to a few minutes, and does not touch what is served.";
    try {
      const wanted = { max_errors: budgets, limit: Number(most.value) };
      if (namespace.value.trim()) wanted.namespace = namespace.value.trim();
      const found = await post("/cache/simulate", wanted, signal);
      told.textContent = `${plural(found.questions, "stored question")} rehearsed with ${found.model}.`;
      set(answer, ...outcome(found, now));
      say("The rehearsal is done");
    } catch (error) {
      if (!signal.aborted) told.textContent = error.message;
    } finally {
      press.disabled = false;
    }
  };
  put(place, 
    el("p", {}, "How many more answers would be served by meaning if you tolerated more errors, or fewer? ibid asks its stored "
      + `questions again from an empty cache, under each budget. Today's is ${share(now)}.`),
    el("form", { class: "row", "aria-label": "Rehearse", onsubmit: run }, limit, where, el("button", { class: "primary" }, "Rehearse")),
    told, answer);
}

function outcome(found, now) {
  const rows = found.budgets;
  if (!found.questions) return [el("p", { class: "empty" }, "No question is stored yet.")];
  let chosen = Math.max(rows.findIndex((row) => row.max_error === now), 0);
  const tiles = el("div", { class: "tiles", "aria-live": "polite" });
  const chart = el("div", {});
  const slider = el("input", { type: "range", min: 0, max: rows.length - 1, step: 1, value: chosen, id: "budget" });
  const head = el("label", { for: "budget" });
  const draw = () => {
    const row = rows[chosen];
    const today = rows.find((one) => one.max_error === now) ?? row;
    const more = row.saved_usd - today.saved_usd;
    slider.setAttribute("aria-valuetext", share(row.max_error));
    set(head, "Budget for wrong answers: ", el("strong", {}, share(row.max_error)), row.max_error === now ? " (today's)" : "");
    set(tiles, 
      tile("Served by meaning", share(row.hit_rate), `${count(row.hits)} of ${plural(found.questions, "question")}`),
      tile("Wrong, of those judged", row.error === null ? "–" : share(row.error), row.interval
        ? `${share(row.interval[0])} to ${share(row.interval[1])}; ${count(row.wrong)} of ${count(row.judged)}` : "none was judged"),
      tile("Saved", usd(row.saved_usd - row.audits_usd), more === 0 ? `audits cost ${usd(row.audits_usd)}`
        : `${usd(Math.abs(more))} ${more > 0 ? "more" : "less"} than today, audits ${usd(row.audits_usd)}`));
    set(chart, lines("Hits and errors against the budget",
      "Share served by meaning, and share wrong among those judged, for each budget. The table below has each value.",
      rows.map((one) => share(one.max_error)),
      [{ name: "served", tone: "tone-1", values: rows.map((one) => one.hit_rate) },
        { name: "wrong", tone: "tone-3", values: rows.map((one) => one.error) }],
      { format: (v) => share(v), head: "Budget", at: chosen }));
  };
  slider.addEventListener("input", () => { chosen = Number(slider.value); draw(); });
  draw();
  return [el("section", { class: "card" }, head, slider), tiles, chart,
    el("section", { class: "card" }, el("h2", {}, "Every budget"), table("Every budget", [
      { label: "Budget", cell: (row) => share(row.max_error) },
      { label: "Served", number: true, cell: (row) => `${count(row.hits)} (${share(row.hit_rate)})` },
      { label: "Wrong of judged", number: true, cell: (row) => `${count(row.wrong)} of ${count(row.judged)}` },
      { label: "Audits", number: true, cell: (row) => count(row.audits) },
      { label: "Saved", number: true, cell: (row) => usd(row.saved_usd) },
      { label: "Audits cost", number: true, cell: (row) => usd(row.audits_usd) },
    ], rows))];
}

const tile = (label, figure, told) =>
  el("section", { class: "tile" }, el("h2", {}, label), el("p", { class: "figure" }, figure), el("p", {}, told));
