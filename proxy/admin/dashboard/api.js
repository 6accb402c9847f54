// The admin's JSON, asked by the cookie of this browser's session.

export class Refusal extends Error {
  constructor(status, message, code) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

async function send(method, path, body, signal) {
  const init = { method, signal, headers: {}, credentials: "same-origin", cache: "no-store" };
  if (body !== undefined) {
    init.headers["Content-Type"] = "application/json";
    init.body = JSON.stringify(body);
  }
  let answer;
  try {
    answer = await fetch(path, init);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal(0, "ibid does not answer", "unreachable");
  }
  const value = await answer.json().catch(() => ({}));
  if (answer.ok) return value;
  const told = value.error ?? {};
  if (answer.status === 401) document.dispatchEvent(new Event("signedout"));
  throw new Refusal(answer.status, told.message ?? `status ${answer.status}`, told.code);
}

export const get = (path, signal) => send("GET", path, undefined, signal);
export const post = (path, body, signal) => send("POST", path, body, signal);
export const patch = (path, body) => send("PATCH", path, body);
export const remove = (path) => send("DELETE", path);

// A path with its query; what is empty is left out.
export function at(path, query) {
  const pairs = Object.entries(query).filter(([, value]) => value !== undefined && value !== null && value !== "");
  return pairs.length ? `${path}?${new URLSearchParams(pairs)}` : path;
}

// A table of {columns, rows} as objects.
export const objects = ({ columns, rows }) =>
  rows.map((row) => Object.fromEntries(columns.map((name, i) => [name, row[i]])));

// A named query of the ledger, as objects.
export const named = async (name, since, signal) => objects(await post("/savings/query", { name, since }, signal));
