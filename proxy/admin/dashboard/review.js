// Near-misses and audits, one at a time: two questions, two answers, and a verdict that the judge learns from.

import { at, get, post } from "./api.js";
import { el, put, say, set } from "./dom.js";
import { plural, share, when, words } from "./format.js";
import { answerOf } from "./entries.js";
import { facts } from "./table.js";
import { marked } from "./words.js";

export const title = "Review";

const KINDS = {
  "near-misses": ["Near-misses", "forwarded, because the stored question was not close enough",
    "Same answer", "Other answer"],
  audit: ["Audits", "served, and asked again upstream to compare", "Right", "Wrong"],
};

export async function show(place, rest, _query, signal) {
  const kind = rest[0] in KINDS ? rest[0] : "near-misses";
  const [, about, right, wrong] = KINDS[kind];
  const choice = el("div", { class: "choice", role: "group", "aria-label": "What to review" },
    Object.entries(KINDS).map(([name, [label]]) => el("button", { type: "button", "aria-pressed": String(name === kind),
      onclick: () => { location.hash = `#/review/${name}`; } }, label)));
  const told = el("p", { class: "quiet" });
  const card = el("section", { class: "card", tabindex: "0", "aria-label": "Comparison" });
  put(place, el("div", { class: "row between" }, choice, told), card,
    el("p", { class: "quiet" }, `These were ${about}. With the comparison in focus: `, el("kbd", {}, "R"), ` ${right.toLowerCase()}, `,
      el("kbd", {}, "W"), ` ${wrong.toLowerCase()}, `, el("kbd", {}, "→"), " next, ", el("kbd", {}, "←"), " previous."));

  const items = [];
  let cursor = null;
  let position = 0;
  const load = async () => {
    const page = await get(at(`/cache/${kind}`, { limit: 50, cursor }), signal);
    items.push(...page.comparisons);
    cursor = page.next_cursor;
  };
  const go = async (step) => {
    const next = position + step;
    if (next < 0) return;
    if (next >= items.length && cursor) await load();
    if (next >= items.length) { say("That was the last one"); return; }
    position = next;
    await draw();
  };
  const judge = async (verdict) => {
    const item = items[position];
    try {
      const about = kind === "audit" ? { request_id: item.request_id } : { comparison_id: item.id };
      await post("/cache/feedback", { ...about, verdict });
    } catch (error) {
      say(error.message);
      card.querySelector(".verdict").textContent = error.message;
      return;
    }
    Object.assign(item, { source: "feedback", p_same: verdict === "right" ? 1 : 0 });
    say(`Marked: ${verdict === "right" ? right : wrong}`);
    await (position + 1 < items.length || cursor ? go(1) : draw());
  };
  const draw = async () => {
    const item = items[position];
    told.textContent = `${position + 1} of ${items.length}${cursor ? "+" : ""}`;
    const [asked, kept] = marked(item.asked ?? "", item.prompt ?? "");
    const [askedAnswer, keptAnswer] = [el("p", { class: "answer", tabindex: "0" }), el("p", { class: "answer", tabindex: "0" })];
    set(card, 
      el("div", { class: "sides" },
        side("Asked", item.asked === null ? [lost("The question of this request was not kept.")] : asked, askedAnswer),
        side("Stored", item.prompt === null ? [lost("The entry is gone.")] : kept, keptAnswer)),
      el("div", { class: "row" },
        el("button", { type: "button", class: "primary", onclick: () => judge("right") }, right),
        el("button", { type: "button", class: "danger", onclick: () => judge("wrong") }, wrong),
        el("button", { type: "button", class: "quiet", onclick: () => go(-1), disabled: position === 0 }, "Previous"),
        el("button", { type: "button", class: "quiet", onclick: () => go(1) }, "Next"),
        el("p", { class: "verdict" }, item.source === "feedback" ? `Marked: ${item.p_same > 0.5 ? right : wrong}` : "")),
      facts([
        ["When", when(item.ts)], ["Similarity", item.similarity.toFixed(4)],
        ["Answers alike, by the comparer", share(item.p_same, 0)], ["Compared by", item.comparer],
        ["Standing", words(item.standing)],
        ["Request", el("a", { href: `#/requests/${encodeURIComponent(item.request_id)}` }, item.request_id)],
        ["Entry", el("a", { href: `#/entries/${item.entry_id}` }, String(item.entry_id))],
      ]));
    await Promise.all([fillAnswer(askedAnswer, item.asked_entry_id, signal),
      fillAnswer(keptAnswer, item.prompt === null ? null : item.entry_id, signal)]);
    if (card.contains(askedAnswer)) {
      const texts = [askedAnswer.textContent, keptAnswer.textContent];
      if (texts.every(Boolean)) {
        const [one, other] = marked(...texts);
        set(askedAnswer, ...one);
        set(keptAnswer, ...other);
      }
    }
  };
  card.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !items.length) return;
    const work = { r: () => judge("right"), w: () => judge("wrong"), ArrowRight: () => go(1), ArrowLeft: () => go(-1) }[event.key];
    if (!work) return;
    event.preventDefault();
    work();
  });
  await load();
  if (!items.length) {
    set(card, el("p", { class: "empty" }, "Nothing to review yet."));
    return;
  }
  await draw();
  told.textContent = `${position + 1} of ${plural(items.length, "comparison")}${cursor ? " and more" : ""}`;
  card.focus({ preventScroll: true });
}

const lost = (text) => el("span", { class: "quiet" }, text);

const side = (label, question, answer) => el("div", { class: "side" }, el("h2", {}, label), el("p", {}, question), answer);

async function fillAnswer(place, entryId, signal) {
  if (!entryId) { place.removeAttribute("tabindex"); return; }
  const found = (await get(at("/cache/entries", { ids: entryId, limit: 1 }), signal)).entries;
  if (!found.length) return;
  const entry = await get(`/cache/entries/${entryId}`, signal);
  place.textContent = answerOf(entry.answer.message);
}
