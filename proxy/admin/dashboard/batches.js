// Batches of every tenant, and how far they are.

import { at, get } from "./api.js";
import { button, el, put, set, svg } from "./dom.js";
import { count, plural, until, when, words } from "./format.js";
import { table } from "./table.js";

export const title = "Batches";

const PARTS = [["succeeded", "tone-1"], ["errored", "tone-5"], ["expired", "tone-3"], ["cancelled", "tone-6"]];

export async function show(place, _rest, _query, signal) {
  const list = el("div", {});
  const more = el("div", { class: "row" });
  put(place, list, more);
  let rows = [];
  let cursor = null;
  const load = async () => {
    const page = await get(at("/batches", { limit: 50, cursor }), signal);
    rows = [...rows, ...page.batches];
    cursor = page.next_cursor;
    set(list, table("Batches, newest first", [
      { label: "Batch", whole: true, cell: (job) => el("span", { class: "mono" }, job.id) },
      { label: "State", cell: (job) => el("span", { class: `badge ${job.status === "completed" ? "hit" : ""}` }, words(job.status)) },
      { label: "Done", cell: progress },
      { label: "Lines", number: true, cell: (job) => count(job.total) },
      { label: "Failed", number: true, cell: (job) => count(job.errored + job.expired) },
      { label: "Endpoint", whole: true, cell: (job) => job.path },
      { label: "Handed in", whole: true, cell: (job) => when(job.created_ms) },
      { label: "Due", whole: true, cell: (job) => until(job.deadline_ms) },
      { label: "Whose", cell: (job) => job.key_id || job.tenant.slice(0, 8) },
    ], rows, { empty: "No batch was handed in." }));
    set(more, ...(cursor ? [button("Older", load)] : []));
  };
  await load();
}

function progress(job) {
  let x = 0;
  const done = PARTS.reduce((sum, [name]) => sum + job[name], 0);
  return el("div", { class: "whole" },
    svg("svg", { width: 120, height: 10, viewBox: "0 0 120 10", role: "img", "aria-label": `${plural(done, "line")} of ${count(job.total)} done` },
      svg("line", { x1: 0, x2: 120, y1: 5, y2: 5, class: "track" }),
      PARTS.map(([name, tone]) => {
        const width = job.total ? (job[name] / job.total) * 120 : 0;
        const bar = width > 0 && svg("rect", { class: tone, x, y: 0, width, height: 10 });
        x += width;
        return bar;
      })));
}
