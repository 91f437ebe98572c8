// Numbers and times as people read them. Missing is a dash, never 0.

export const DASH = "–";

export function number(value, digits = 3) {
  if (value === null || value === undefined || !Number.isFinite(value)) return DASH;
  const size = Math.abs(value);
  if (size >= 1e9) return trim(value / 1e9, digits) + " G";
  if (size >= 1e6) return trim(value / 1e6, digits) + " M";
  if (size >= 1e4) return trim(value / 1e3, digits) + " k";
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return trim(value, digits);
}

function trim(value, digits) {
  if (value === 0) return "0";
  const size = Math.max(0, Math.ceil(Math.log10(Math.abs(value) + 1e-12)));
  const text = value.toFixed(Math.max(0, Math.min(digits, digits - size)));
  return text.includes(".") ? text.replace(/\.?0+$/, "") : text;
}

export function whole(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return DASH;
  return value >= 1e5 ? number(value) : Math.round(value).toLocaleString("en");
}

export function loss(value) {
  if (value === null || value === undefined) return DASH;
  return Math.abs(value) >= 1000 ? value.toExponential(2) : value.toFixed(Math.abs(value) < 10 ? 3 : 2);
}

export function ratio(value) {
  return value === null || value === undefined ? DASH : value.toFixed(1) + "×";
}

export function seconds(value) {
  if (value === null || value === undefined) return DASH;
  if (value < 0.0995) return (value * 1000).toFixed(value < 0.00995 ? 1 : 0) + " ms";
  if (value < 99.5) return value.toFixed(value < 9.95 ? 2 : 1) + " s";
  return duration(value);
}

export function duration(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return DASH;
  const total = Math.max(0, Math.round(value));
  const [h, m, s] = [Math.floor(total / 3600), Math.floor(total / 60) % 60, total % 60];
  if (h) return `${h}h ${String(m).padStart(2, "0")}m`;
  return m ? `${m}m ${String(s).padStart(2, "0")}s` : `${s}s`;
}

export function bytes(value) {
  if (value === null || value === undefined) return DASH;
  return number(value) + "B";
}

export function clock(at, withSeconds = true) {
  const d = new Date(at * 1000);
  const two = (n) => String(n).padStart(2, "0");
  return `${two(d.getHours())}:${two(d.getMinutes())}` + (withSeconds ? `:${two(d.getSeconds())}` : "");
}

export function utc(at) {
  return new Date(at * 1000).toISOString().slice(11, 19) + " UTC";
}
