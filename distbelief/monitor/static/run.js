// Run: what this page knows of the run, and when it asks for more of it.

import { get } from "./answers.js";
import { isReport } from "./recorded.js";
import { state, WINDOWS, zoom } from "./state.js";

const NAMES = ["loss", "loss_smooth", "val_loss", "samples_per_s", "ratio.p95", "trip.fetch_p95", "trip.push_p95", "fair"];
const SPANS = [60, 120, 300, 600, 900, 1800, 3600];
const FINE_S = 1000;
const POINTS = 600;
const EVENTS_KEPT = 400;
const listeners = new Map();
const busy = new Set();
const waiting = new Map(); // what must be asked again once it is answered

/** Everything is null until it is known. */
export const run = {
  meta: null, tick: null, snapshot: null, series: null, workers: null, distribution: null, updates: null,
  meter: null, shards: null, events: [], numEvents: 0, link: "connecting", made: null, isPaused: false, lastAt: 0, error: "",
  /** Of all charts over time. */
  domain: { from: Date.now() / 1000 - 900, to: Date.now() / 1000, span: 900, isLive: true },
  get kpi() { return this.tick?.kpi ?? this.snapshot?.kpi ?? null; },
  get findings() { return this.tick?.findings ?? this.snapshot?.findings ?? []; },
  get state() { return this.tick?.state ?? this.meta?.state ?? "waiting"; },
  get isOver() { return isReport || this.meta?.finished === true || this.meta?.live === false; },
  get now() {
    const t = this.tick?.t ?? this.meta?.t ?? Date.now() / 1000;
    return this.meta?.ended ? Math.min(t, this.meta.ended + 5) : t;
  },
};

export const on = (names, listener) => names.split(" ").forEach((name) => listeners.set(name, [...(listeners.get(name) ?? []), listener]));
export const tell = (name) => listeners.get(name)?.forEach((listener) => listener());

/** Ask once at a time for one thing; a failure leaves what was known. */
async function refresh(name, ask, isWanted = false) {
  if (busy.has(name)) {
    if (isWanted) waiting.set(name, ask);
    return;
  }
  busy.add(name);
  try {
    await ask();
    run.error = "";
    tell(name);
  } catch (error) {
    run.error = error.message;
    if (error.status === 401) tell("denied");
    tell("failed");
  } finally {
    busy.delete(name);
    const next = waiting.get(name);
    waiting.delete(name);
    if (next) refresh(name, next);
  }
}

const plain = (name, route = name) => refresh(name, async () => { run[name] = await get(route); });

/** Work out from when to when charts are. A young run fills them: its past is not blank. */
export function settle() {
  const chosen = zoom(), now = run.now, started = run.meta?.started ?? run.tick?.t ?? now - 60;
  const { domain } = run;
  if (chosen) {
    Object.assign(domain, { from: chosen[0], to: chosen[1], span: chosen[1] - chosen[0], isLive: false });
    return;
  }
  const age = Math.max(1, now - started);
  const most = WINDOWS[state.window];
  let span = SPANS.find((s) => s >= age) ?? age;
  if (run.isOver) span = Math.max(10, age);
  if (span > most) span = most;
  const from = age >= span ? now - span : started;
  Object.assign(domain, { from, to: from + span, span, isLive: true });
}

/** A column of length `bin` seconds where the run is long; 0 where seconds are kept. */
const isFine = () => run.domain.span <= FINE_S;

async function loadSeries(all) {
  await refresh("series", async () => {
    const { from, to } = run.domain, old = run.series;
    const end = Math.min(to, run.now + 1);
    if (!all && old && isFine() && old.fine && old.at.length && run.domain.isLive) {
      // The last seconds may have been open when they were read.
      const since = Math.max(old.at[old.at.length - 1] - 2, from);
      const news = await get(`series?names=${NAMES.join(",")}&from=${Math.floor(since)}&to=${Math.ceil(end)}&points=5000`);
      if (old !== run.series) return;
      const keep = old.at.findIndex((t) => t >= Math.floor(since)), drop = Math.max(0, old.at.findIndex((t) => t >= from - 2));
      for (const name of ["at", ...NAMES]) old[name] = old[name].slice(drop, keep < 0 ? undefined : keep).concat(news[name]);
      old.t = news.t;
      return;
    }
    const found = await get(`series?names=${NAMES.join(",")}&from=${Math.floor(from)}&to=${Math.ceil(Math.max(end, from + 1))}&points=${isFine() ? 5000 : POINTS}`);
    run.series = { ...found, fine: isFine() };
  }, all);
}

const WANTED = { distribution: () => true, updates: () => true, meter: () => true };
/** wants(name, fn): whether anybody looks at it now. */
export const wants = (name, check) => { WANTED[name] = check; };

/** After a tick: who looks at the same second asks the same question, and it is answered once. */
export function follow(t, { all = false } = {}) {
  if (document.hidden && !all) return;
  const due = (every, phase = 0) => all || Math.floor(t) % every === phase % every;
  if (due(isFine() ? 2 : 10) && (run.domain.isLive || all)) {
    settle(); // charts move on when there is something new to be drawn
    loadSeries(all);
  }
  if (due(2, 1)) plain("workers", "workers?limit=14");
  if (due(3)) WANTED.distribution() && plain("distribution");
  if (due(5, 1)) WANTED.updates() && plain("updates", "updates?n=1500");
  if (due(10, 3)) WANTED.meter() && plain("meter");
  if (due(5, 2)) plain("shards");
  if (due(run.state === "training" && run.snapshot ? 10 : 2, 4)) plain("snapshot");
}

export function reloadTime() {
  settle();
  run.series = null;
  loadSeries(true);
}

export const loadEvents = () => refresh("events", async () => {
  const found = await get("events?limit=200");
  run.events = found.items;
  run.numEvents = found.total;
});

export function addEvent(event) {
  const last = run.events[run.events.length - 1];
  if (last && event.seq <= last.seq) return;
  run.events.push(event);
  run.numEvents += 1;
  if (run.events.length > EVENTS_KEPT) run.events.splice(0, 100);
  tell("events");
}

export async function loadAll() {
  await Promise.all([plain("meta"), plain("snapshot")]);
  settle();
  loadEvents();
  follow(run.now, { all: true });
}
