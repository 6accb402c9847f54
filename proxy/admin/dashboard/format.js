// Numbers for people: as many digits as say something, and never in scientific notation.

const DAY_MS = 86_400_000;

export const count = (n) => (n ?? 0).toLocaleString("en");

// The same digits for like sizes, so that a column lines up.
export function usd(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size === 0) return "$0";
  const sign = value < 0 ? "−" : "";
  if (size < 0.0000005) return `${sign}<$0.000001`;
  const digits = size >= 1000 ? 0 : size >= 1 ? 2 : size >= 0.01 ? 4 : 6;
  return `${sign}$${size.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits })}`;
}

// For an axis: no more digits than its round numbers need.
export function usdMark(value) {
  const text = Math.abs(value).toLocaleString("en", { minimumFractionDigits: 2, maximumFractionDigits: 9 });
  return `${value < 0 ? "−" : ""}$${text}`;
}

export const nusd = (value) => usd(value === null || value === undefined ? value : value / 1e9);

export function share(value, digits = null) {
  if (value === null || value === undefined) return "–";
  const percent = value * 100;
  const fine = digits ?? (percent === 0 || percent >= 10 ? 0 : percent >= 1 ? 1 : 2);
  return `${Number(percent.toFixed(fine))} %`;
}

export function ms(value) {
  if (value === null || value === undefined) return "–";
  if (value >= 60_000) return `${(value / 60_000).toFixed(1)} min`;
  if (value >= 1000) return `${(value / 1000).toFixed(value >= 10_000 ? 0 : 1)} s`;
  return `${value >= 10 ? Math.round(value) : value >= 1 ? value.toFixed(1) : value.toFixed(2)} ms`;
}

export function bytes(value) {
  if (!value) return "0 B";
  const step = Math.min(Math.floor(Math.log2(value) / 10), 4);
  return `${(value / 1024 ** step).toFixed(step ? 1 : 0)} ${["B", "KiB", "MiB", "GiB", "TiB"][step]}`;
}

const two = (n) => String(n).padStart(2, "0");

// In the reader's own time zone: 14:03:22 today, else with its date.
export function when(epochMs) {
  if (!epochMs) return "–";
  const t = new Date(epochMs);
  const clock = `${two(t.getHours())}:${two(t.getMinutes())}:${two(t.getSeconds())}`;
  const isToday = t.toDateString() === new Date().toDateString();
  return isToday ? clock : `${t.getFullYear()}-${two(t.getMonth() + 1)}-${two(t.getDate())} ${clock.slice(0, 5)}`;
}

// A span: 42 s, 3 min, 5 h, 12 d.
export function span(milliseconds) {
  const s = Math.max(Math.round(milliseconds / 1000), 0);
  if (s < 90) return `${s} s`;
  if (s < 5400) return `${Math.round(s / 60)} min`;
  if (s < 48 * 3600) return `${Math.round(s / 3600)} h`;
  return `${Math.round((s * 1000) / DAY_MS)} d`;
}

export const ago = (epochMs) => (epochMs ? `${span(Date.now() - epochMs)} ago` : "never");
export const until = (epochMs) => {
  if (!epochMs) return "no end";
  const left = epochMs - Date.now();
  return left > 0 ? `in ${span(left)}` : `${span(-left)} ago`;
};

export const words = (name) => String(name).replaceAll("_", " ");

export const plural = (n, one, many = `${one}s`) => `${count(n)} ${n === 1 ? one : many}`;
