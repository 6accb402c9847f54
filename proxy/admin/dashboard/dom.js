// Elements from values. Strings become text nodes and nothing else: no data is ever read as markup.

const SVG = "http://www.w3.org/2000/svg";

function fill(node, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "value") node.value = value;
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

export const el = (name, properties = {}, ...children) => fill(document.createElement(name), properties, children);

export const svg = (name, properties = {}, ...children) =>
  fill(document.createElementNS(SVG, name), properties, children);

// More children at the end, or other ones in place of all; what is false or missing is left out.
export const put = (node, ...children) => fill(node, {}, children);

export function set(node, ...children) {
  node.replaceChildren();
  return put(node, ...children);
}

// Told to a screen reader, without moving anybody.
export function say(text) {
  document.getElementById("status").textContent = text;
}

// A button; while its work runs it cannot be pressed again.
export function button(label, work, properties = {}) {
  const made = el("button", { type: "button", ...properties, onclick: async (event) => {
    made.disabled = true;
    try {
      await work(event);
    } finally {
      made.disabled = false;
    }
  } }, label);
  return made;
}

let fields = 0;

// A labelled input: [the label with the input in it, the input].
export function field(label, properties = {}, options = null) {
  const id = `field-${(fields += 1)}`;
  const input = options
    ? el("select", { id, ...properties }, options.map(([value, text]) => el("option", { value }, text)))
    : el("input", { id, ...properties });
  return [el("div", { class: "field" }, el("label", { for: id }, label), input), input];
}

// A real question in a real dialog; true when it was answered with yes.
export function confirmed(title, text, yes) {
  return new Promise((resolve) => {
    const dialog = el("dialog", { "aria-labelledby": "dialog-title" },
      el("h2", { id: "dialog-title" }, title),
      el("p", {}, text),
      el("div", { class: "row end" },
        el("button", { type: "button", onclick: () => dialog.close("no") }, "Cancel"),
        el("button", { type: "button", class: "danger", onclick: () => dialog.close("yes") }, yes)));
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(dialog.returnValue === "yes");
    });
    document.body.append(dialog);
    dialog.showModal();
  });
}
