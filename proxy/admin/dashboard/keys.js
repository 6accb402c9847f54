// Virtual keys: who may ask, for how much, and what is spent. A secret is told once and nowhere kept.

import { get, post } from "./api.js";
import { button, confirmed, el, field, put, set } from "./dom.js";
import { count, until, usd, when } from "./format.js";
import { facts, table } from "./table.js";

export const title = "Keys";

const FIELDS = [["project", "Project", "Whose entries it reads and writes"], ["name", "Name", "What it is for"],
  ["limit_usd", "US dollars at most", "10/day"], ["limit_requests", "Requests at most", "1000/hour"],
  ["limit_tokens", "Tokens at most", "1000000/month"], ["models", "Models", "gpt-4o*, claude-*"],
  ["plan", "Plan", "exact,semantic"], ["expires", "Ends", "90d, or a date"]];
const LISTS = new Set(["limit_usd", "limit_requests", "limit_tokens", "models"]);

export const show = (place, rest, _query, signal) => (rest[0] ? showOne(place, rest[0], signal) : showList(place, signal));

const state = (key) => el("span", { class: `badge ${key.state === "active" ? "hit" : "warn"}` }, key.state);
// Money comes as exact decimals in text, counts as numbers.
const amount = (limit, name) => (limit.kind === "usd" ? usd(Number(limit[name])) : count(limit[name]));
const worded = (limit) => `${amount(limit, "amount")}${limit.kind === "usd" ? "" : ` ${limit.kind}`} per ${limit.window}`;
const limits = (key) => key.limits.map(worded).join(", ") || "none";

async function showList(place, signal) {
  const list = el("div", {});
  const told = el("div", { "aria-live": "polite" });
  const load = async () => {
    const { keys } = await get("/cache/keys", signal);
    set(list, table("Virtual keys, newest first", [
      { label: "Key", whole: true, cell: (key) => el("a", { href: `#/keys/${encodeURIComponent(key.id)}` }, key.name || key.id) },
      { label: "Project", cell: (key) => key.project },
      { label: "State", cell: state },
      { label: "Limits", cell: limits },
      { label: "Models", cell: (key) => key.models.join(", ") || "all" },
      { label: "Made", whole: true, cell: (key) => when(key.created_ms) },
      { label: "Ends", whole: true, cell: (key) => (key.expires_ms ? when(key.expires_ms) : "no end") },
    ], keys, { empty: "No virtual key yet. Without one, clients use the providers' own keys." }));
  };
  await load();
  const fields = FIELDS.map(([name, label, hint]) => [name, ...field(label, { placeholder: hint, spellcheck: "false",
    required: name === "project", autocomplete: "off" })]);
  const make = async (event) => {
    event.preventDefault();
    const wanted = {};
    for (const [name, , input] of fields) {
      const text = input.value.trim();
      if (text) wanted[name] = LISTS.has(name) ? text.split(",").map((part) => part.trim()).filter(Boolean) : text;
    }
    try {
      set(told, secret(await post("/cache/keys", wanted)));
      event.target.reset();
      await load();
    } catch (error) {
      set(told, el("p", { class: "trouble" }, error.message));
    }
  };
  put(place, list, el("section", { class: "card" }, el("h2", {}, "New key"),
    el("form", { class: "row", "aria-label": "New key", onsubmit: make }, fields.map(([, labelled]) => labelled),
      el("button", { class: "primary" }, "Make")), told));
}

// Shown once; ibid itself keeps only a digest.
const secret = (key) => el("div", { class: "notice" }, el("p", {}, el("strong", {}, "Copy this secret now. "), "It is shown this once."),
  el("pre", { tabindex: "0" }, key.secret),
  button("Copy", async (event) => {
    await navigator.clipboard.writeText(key.secret);
    event.target.textContent = "Copied";
  }));

async function showOne(place, id, signal) {
  const key = await get(`/cache/keys/${encodeURIComponent(id)}`, signal);
  const told = el("div", { "aria-live": "polite" });
  const change = (verb, title, text, yes, done) => button(yes, async () => {
    if (!(await confirmed(title, text, yes))) return;
    try {
      done(await post(`/cache/keys/${encodeURIComponent(id)}/${verb}`, {}));
    } catch (error) {
      set(told, el("p", { class: "trouble" }, error.message));
    }
  }, { class: verb === "revoke" ? "danger" : null });
  put(place, 
    el("p", {}, el("a", { href: "#/keys" }, "All keys"), " · ", el("a", { href: `#/requests?team=${encodeURIComponent(key.project)}` }, "Its project's requests")),
    el("section", { class: "card" }, el("div", { class: "row between" }, el("h2", {}, key.name || key.id), state(key)),
      facts([["Key", key.id], ["Project", key.project], ["Models", key.models.join(", ") || "all"], ["Plan", key.plan],
        ["Made", when(key.created_ms)], ["Rotated", key.rotated_ms && when(key.rotated_ms)],
        ["Revoked", key.revoked_ms && when(key.revoked_ms)], ["Ends", key.expires_ms ? when(key.expires_ms) : "no end"]]),
      el("h3", {}, "Limits"), table("Limits", [
        { label: "At most", cell: worded },
        { label: "Spent", number: true, cell: (limit) => amount(limit, "spent") },
        { label: "Held for requests under way", number: true, cell: (limit) => amount(limit, "held") },
        { label: "Left", number: true, cell: (limit) => amount(limit, "remaining") },
        { label: "Starts anew", whole: true, cell: (limit) => until(limit.resets_ms) },
      ], key.limits, { empty: "None." }),
      key.state === "active" && el("div", { class: "row" },
        change("rotate", "Give it a new secret?", "The old secret is void at once.", "Rotate",
          (made) => set(told, secret(made))),
        change("revoke", "Revoke this key?", "Whoever uses it is refused from now on. This cannot be undone.", "Revoke",
          () => { location.hash = "#/keys"; })),
      told));
}
