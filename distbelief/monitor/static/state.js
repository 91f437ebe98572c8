// State of the view: window, unit, order, zoom, worker. It lives in the address, so a link shows the same.

const DEFAULTS = { w: "15m", u: "ratio", o: "node", s: "linear", k: "norm", z: "", id: "", node: "" };
const listeners = [];

export const WINDOWS = { "5m": 300, "15m": 900, "1h": 3600, all: 86400 };

export const view = { ...DEFAULTS };

export function readView() {
  const said = new URLSearchParams(location.hash.slice(1));
  for (const name of Object.keys(DEFAULTS)) view[name] = said.get(name) ?? DEFAULTS[name];
  if (!(view.w in WINDOWS)) view.w = DEFAULTS.w;
}

export function setView(changes) {
  Object.assign(view, changes);
  const said = new URLSearchParams();
  for (const [name, value] of Object.entries(view)) if (value !== DEFAULTS[name]) said.set(name, value);
  const text = said.toString();
  history.replaceState(null, "", text ? "#" + text : location.pathname + location.search);
  for (const call of listeners) call(changes);
}

export function onView(call) {
  listeners.push(call);
}

// [from, to] in unix seconds.
export function span(now, started) {
  if (view.z) {
    const [from, to] = view.z.split("-").map(Number);
    if (to > from) return [from, to];
  }
  const from = now - WINDOWS[view.w];
  // A run that is younger than the window fills it.
  return [started ? Math.min(Math.max(from, started), now - 60) : from, now];
}
