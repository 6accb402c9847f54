// The manual, as it is installed with this ibid.

import { get } from "./api.js";
import { el, put } from "./dom.js";
import { rendered } from "./markdown.js";

export const title = "Docs";

export async function show(place, rest, _query, signal) {
  const name = rest[0] ?? "index";
  const [{ pages }, page] = await Promise.all([get("/docs", signal), get(`/docs/${encodeURIComponent(name)}`, signal)]);
  const known = new Set(pages);
  const link = (target) => {
    const [file, part] = target.split("#");
    const other = file.replace(/\.md$/, "");
    if (file === "") return `#/docs/${name}/${part}`;
    if (file.endsWith(".md") && known.has(other)) return `#/docs/${other}${part ? `/${part}` : ""}`;
    return /^https?:\/\//.test(target) ? target : null;
  };
  const prose = el("article", { class: "prose" }, rendered(page.markdown, link));
  place.classList.add("docs-page");
  put(place, 
    el("nav", { class: "docs-list", "aria-label": "Manual" }, el("ul", {}, pages.map((one) =>
      el("li", {}, el("a", { href: `#/docs/${one}`, "aria-current": one === name ? "page" : null },
        one === "index" ? "contents" : one))))),
    prose);
  if (rest[1]) {
    const part = [...prose.querySelectorAll("[id]")].find((one) => one.id === `part-${rest[1]}`);
    part?.scrollIntoView();
  }
}
