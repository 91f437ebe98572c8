// Format: numbers as people read them. None of these is asked for what is missing.

export const MISSING = "–";
const trim = (text) => text.replace(/\.0+$|(\.\d*?)0+$/, "$1");

/** Three digits: 9.48 k, 450 k, 1.20 M. */
export function count(v) {
  const a = Math.abs(v);
  if (a < 1000) return Number.isInteger(v) ? String(v) : digits(v, 3);
  for (const [unit, size] of [["k", 1e3], ["M", 1e6], ["G", 1e9], ["T", 1e12]]) {
    const n = v / size;
    if (Math.abs(n) < 999.5) return `${trim(n.toPrecision(3))} ${unit}`;
  }
  return v.toExponential(1);
}
export const digits = (v, n = 3) => (v === 0 ? "0" : Math.abs(v) >= 10 ** n || Math.abs(v) < 1e-4 ? trim(Number(v.toPrecision(n)).toString()) : trim(v.toPrecision(n)));
export const loss = (v) => (Math.abs(v) >= 1000 || (v !== 0 && Math.abs(v) < 0.001) ? v.toExponential(2) : Math.abs(v) >= 0.1 ? v.toFixed(3) : v.toPrecision(3));
export const times = (v) => `${v < 9.95 ? v.toFixed(1) : v < 1000 ? Math.round(v) : count(v)}×`;
export const whole = (v) => (Math.abs(v) < 10000 ? String(Math.round(v)) : count(Math.round(v)));
export function seconds(v) {
  if (v < 0.001) return `${digits(v * 1e6, 2)} µs`;
  if (v < 0.1) return `${digits(v * 1e3, 2)} ms`;
  return v < 100 ? `${v.toFixed(2)} s` : duration(v);
}
export const ms = (v) => `${v < 10 ? v.toFixed(1) : whole(v)} ms`;
export function duration(v) {
  const s = Math.max(0, Math.round(v));
  const d = Math.floor(s / 86400), h = Math.floor(s / 3600) % 24, m = Math.floor(s / 60) % 60;
  if (d) return `${d}d ${h}h`;
  if (h) return `${h}h ${String(m).padStart(2, "0")}m`;
  return m ? `${m}m ${String(s % 60).padStart(2, "0")}s` : `${s} s`;
}
export function bytes(v) {
  for (const [unit, size] of [["TB", 1e12], ["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) if (v >= size) return `${trim((v / size).toPrecision(3))} ${unit}`;
  return `${Math.round(v)} B`;
}
export const percent = (v) => `${trim((v * 100).toFixed(v < 0.01 ? 2 : 1))} %`;
const two = (n) => String(n).padStart(2, "0");
export function clock(t, withSeconds = true) {
  const d = new Date(t * 1000);
  return `${two(d.getHours())}:${two(d.getMinutes())}${withSeconds ? `:${two(d.getSeconds())}` : ""}`;
}
export function day(t) {
  const d = new Date(t * 1000);
  return `${d.getFullYear()}-${two(d.getMonth() + 1)}-${two(d.getDate())}`;
}
/** Local time, UTC, and how long after the run's begin. */
export function moment(t, started) {
  const utc = new Date(t * 1000).toISOString().slice(11, 19);
  return `${day(t)} ${clock(t)} local, ${utc} UTC${started ? `, ${duration(t - started)} into the run` : ""}`;
}
/** "5.3x" as the API's sentences have it. */
export const pretty = (text) => text.replace(/(\d)x\b/g, "$1×");
