// State: what the viewer has chosen. It is in the address, so that a link shows the same.

const DEFAULTS = { window: "15m", unit: "ratio", order: "node", worker: "", node: "", zoom: "", loss: "linear", effect: "", view: "" };
const ALLOWED = {
  window: ["5m", "15m", "1h", "all"], unit: ["ratio", "updates", "seconds"], order: ["node", "worst"],
  loss: ["linear", "log"], effect: ["", "norm", "meter"], view: ["", "events", "help"],
};
export const WINDOWS = { "5m": 300, "15m": 900, "1h": 3600, all: Infinity };
const listeners = new Set();

/** What the pointer does; in no link. */
export const pointer = { time: null, selection: null };
export const state = { ...DEFAULTS };

/** Change some of it, and tell those who listen which. */
export function choose(changes) {
  const changed = Object.keys(changes).filter((key) => state[key] !== changes[key]);
  if (!changed.length) return;
  Object.assign(state, changes);
  const text = Object.entries(state).filter(([key, value]) => value !== DEFAULTS[key])
    .map(([key, value]) => `${key}=${encodeURIComponent(value)}`).join("&");
  history.replaceState(null, "", text ? `#${text}` : `${location.pathname}${location.search}`);
  for (const listener of listeners) listener(new Set(changed));
}

export const onState = (listener) => listeners.add(listener);

/** [from, to] of a zoom, or null. */
export function zoom() {
  const [from, to] = state.zoom.split("-").map(Number);
  return state.zoom && from < to ? [from, to] : null;
}

function read() {
  const asked = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  const next = { ...DEFAULTS };
  for (const key of Object.keys(DEFAULTS)) {
    const value = asked[key];
    if (value === undefined || value.length > 80) continue;
    if (ALLOWED[key] ? ALLOWED[key].includes(value) : key !== "zoom" || /^\d+(\.\d+)?-\d+(\.\d+)?$/.test(value)) next[key] = value;
  }
  choose(next);
}

export function startState() {
  addEventListener("hashchange", read);
  read();
}
