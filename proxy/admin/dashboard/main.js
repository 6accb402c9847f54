// The frame: who is signed in, which page is shown, and in which colours.

import { get, post, remove } from "./api.js";
import { el, field, put, say, set } from "./dom.js";
import * as batches from "./batches.js";
import * as docs from "./docs.js";
import * as entries from "./entries.js";
import * as health from "./health.js";
import * as keys from "./keys.js";
import * as overview from "./overview.js";
import * as requests from "./requests.js";
import * as review from "./review.js";
import * as whatif from "./whatif.js";

// name in the address → module with `title` and `show(main, rest, query, signal)`
const PAGES = { overview, requests, entries, review, whatif, keys, batches, health, docs };

const main = document.getElementById("main");
const nav = document.getElementById("nav");
const menu = document.getElementById("menu");
const leave = document.getElementById("leave");
const TICKET = /^#ticket=(.+)$/;
let running = new AbortController();

// #/requests/r-1?status=HIT → ["requests", ["r-1"], URLSearchParams]
function address() {
  const [path, query = ""] = location.hash.replace(/^#\/?/, "").split("?");
  const [page, ...rest] = path.split("/").map((part) => {
    try {
      return decodeURIComponent(part);
    } catch {
      return part;
    }
  });
  return [page in PAGES ? page : "overview", rest, new URLSearchParams(query)];
}

async function show({ moveFocus = true } = {}) {
  running.abort();
  running = new AbortController();
  const { signal } = running;
  const [name, rest, query] = address();
  const page = PAGES[name];
  for (const link of nav.querySelectorAll("a")) {
    if (link.dataset.page === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  setMenu(false);
  document.title = `${page.title} · ibid`;
  const place = el("div", { class: `page ${name}`, "data-path": location.hash.replace(/^#\/?/, "") });
  set(main, el("h1", {}, page.title), place);
  main.setAttribute("aria-busy", "true");
  if (moveFocus) main.focus({ preventScroll: true });
  scrollTo(0, 0);
  try {
    await page.show(place, rest, query, signal);
    if (!signal.aborted) say(`${page.title} is shown`);
  } catch (error) {
    if (!signal.aborted) put(place, trouble(error));
  } finally {
    if (!signal.aborted) main.setAttribute("aria-busy", "false");
  }
}

const trouble = (error) => el("p", { class: "trouble", role: "alert" }, error.message);

function setMenu(isOpen) {
  menu.setAttribute("aria-expanded", String(isOpen));
  nav.classList.toggle("open", isOpen);
}

function askToSignIn(told = "") {
  running.abort();
  document.body.classList.add("outside");
  document.title = "Sign in · ibid";
  const [labelled, input] = field("Admin token", { type: "password", name: "token", autocomplete: "current-password",
    required: true, spellcheck: "false" });
  const answer = el("p", { class: "trouble", role: "alert" }, told);
  const form = el("form", { class: "card", onsubmit: async (event) => {
    event.preventDefault();
    answer.textContent = "";
    try {
      await post("/session", { token: input.value });
      enter();
    } catch (error) {
      answer.textContent = error.message;
      input.select();
    }
  } },
    el("input", { type: "text", autocomplete: "username", value: "admin", hidden: true, "aria-hidden": "true" }),
    labelled,
    el("button", { class: "primary" }, "Sign in"),
    answer,
    el("p", { class: "quiet" }, "The token stands in the file ", el("code", {}, "admin-token"),
      " of the data directory, or in ", el("code", {}, "IBID_ADMIN_TOKEN"),
      ". When ibid starts at a terminal, it also shows a link that works once."));
  set(main, el("h1", {}, "Sign in"), form);
  main.setAttribute("aria-busy", "false");
  input.focus();
}

function enter() {
  document.body.classList.remove("outside");
  show();
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  document.getElementById("theme").value = theme;
}

function remembered(name, value) {
  try {
    if (value !== undefined) localStorage.setItem(name, value);
    return localStorage.getItem(name);
  } catch {
    return null; // a browser that keeps nothing
  }
}

function start() {
  setTheme(remembered("theme") ?? "auto");
  document.getElementById("theme").addEventListener("change", (event) => {
    remembered("theme", event.target.value);
    setTheme(event.target.value);
  });
  put(nav, el("ul", {}, Object.entries(PAGES).map(([name, page]) =>
    el("li", {}, el("a", { href: `#/${name}`, "data-page": name }, page.title)))));
  menu.addEventListener("click", () => setMenu(menu.getAttribute("aria-expanded") !== "true"));
  document.getElementById("skip").addEventListener("click", (event) => {
    event.preventDefault();
    main.focus();
  });
  leave.addEventListener("click", async () => {
    await remove("/session");
    askToSignIn();
  });
  document.addEventListener("signedout", () => askToSignIn("Your session has ended."));
  addEventListener("hashchange", () => {
    if (TICKET.test(location.hash)) arrive();
    else if (!document.body.classList.contains("outside")) show();
  });
  arrive();
}

// By the link of a terminal, by a session that lasts, or with the token.
async function arrive() {
  const ticket = TICKET.exec(location.hash)?.[1];
  let told = "";
  if (ticket) {
    history.replaceState(null, "", "/");
    await post("/session", { ticket }).catch((error) => { told = error.message; });
  }
  const { signed_in: isSignedIn } = await get("/session");
  if (isSignedIn) enter();
  else askToSignIn(told);
}

document.body.classList.add("outside");
start();
