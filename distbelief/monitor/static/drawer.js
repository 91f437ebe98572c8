// Drawer: everything about one worker.

import { act, get, getLog } from "./answers.js";
import { byId, copy, el, makeMark, MARKS, say, setMark } from "./dom.js";
import { bytes, clock, count, duration, moment, percent, seconds, times, whole } from "./format.js";
import { Pane } from "./painter.js";
import { line, niceTicks, tickText, timeTicks, trace } from "./plot.js";
import { on, run } from "./run.js";
import { isReport } from "./recorded.js";
import { choose, onState, state } from "./state.js";
import { theme, thinOf } from "./theme.js";

const EVERY_S = 3;
const LINES = 50;
const PHASES = ["compute", "fetch", "push", "data", "other"];
const SHARDS_MAX = 8;
let open = null; // {name, panes, parts, detail}
let before = null;

function axes(ctx, w, h, series, hi, text) {
  const margin = { left: 46, right: 8, top: 6, bottom: 18 };
  const from = series[0], to = Math.max(series[series.length - 1], from + 1);
  const x = (t) => margin.left + ((t - from) / (to - from)) * (w - margin.left - margin.right), y = (v) => h - margin.bottom - (Math.min(v, hi) / hi) * (h - margin.top - margin.bottom);
  ctx.textBaseline = "middle";
  ctx.textAlign = "right";
  for (const v of niceTicks(0, hi, 3)) {
    line(ctx, margin.left, Math.round(y(v)) + 0.5, w - margin.right, Math.round(y(v)) + 0.5, theme.colors.grid);
    ctx.fillStyle = theme.colors.dim;
    ctx.fillText(text(v), margin.left - 6, y(v));
  }
  ctx.textAlign = "center";
  ctx.textBaseline = "alphabetic";
  for (const t of timeTicks(from, to, 4).ticks) ctx.fillText(clock(t, to - from < 240), Math.min(w - 28, Math.max(margin.left + 12, x(t))), h - 4);
  return { x, y };
}

const max = (list) => list.reduce((m, v) => (v !== null && v > m ? v : m), 0);

function drawRatio(ctx, w, h) {
  const { series } = open.detail;
  if (series.t.length < 2) return;
  const { x, y } = axes(ctx, w, h, series.t, Math.max(1.5, max(series.ratio) * 1.1), (v) => `${tickText(v)}×`);
  line(ctx, x(series.t[0]), Math.round(y(1)) + 0.5, x(series.t[series.t.length - 1]), Math.round(y(1)) + 0.5, theme.colors.faint);
  ctx.lineWidth = 1.8;
  for (let i = 1; i < series.t.length; i += 1) {
    const a = series.ratio[i - 1], b = series.ratio[i];
    if (series.down[i]) {
      ctx.fillStyle = theme.colors.bad;
      ctx.globalAlpha = 0.18;
      ctx.fillRect(x(series.t[i - 1]), y(1e9), x(series.t[i]) - x(series.t[i - 1]) + 0.5, y(0) - y(1e9));
      ctx.globalAlpha = 1;
    }
    if (a === null || b === null) continue;
    ctx.strokeStyle = thinOf(Math.log2(Math.max(b, 0.01)));
    ctx.lineWidth = 1.8;
    ctx.beginPath();
    ctx.moveTo(x(series.t[i - 1]), y(a));
    ctx.lineTo(x(series.t[i]), y(b));
    ctx.stroke();
  }
}

function drawPhases(ctx, w, h) {
  const { series } = open.detail;
  if (series.t.length < 2) return;
  const { x, y } = axes(ctx, w, h, series.t, Math.max(1e-6, max(series.step_s) * 1.05), (v) => (v ? seconds(v) : "0"));
  // Where no step ended the last one is still under way.
  const known = series.t.flatMap((_, i) => (series.step_s[i] === null ? [] : [i]));
  let base = known.map(() => 0);
  for (const phase of PHASES) {
    const top = base.map((v, k) => v + (series[phase][known[k]] ?? 0));
    ctx.beginPath();
    known.forEach((i, k) => (k ? ctx.lineTo(x(series.t[i]), y(top[k])) : ctx.moveTo(x(series.t[i]), y(top[k]))));
    for (let k = known.length - 1; k >= 0; k -= 1) ctx.lineTo(x(series.t[known[k]]), y(base[k]));
    ctx.closePath();
    ctx.fillStyle = theme.colors[phase];
    ctx.globalAlpha = 0.85;
    ctx.fill();
    ctx.globalAlpha = 1;
    base = top;
  }
}

function drawShards(ctx, w, h) {
  const shards = Object.entries(open.detail.shards).slice(0, SHARDS_MAX).filter(([, s]) => s.t.length > 1);
  if (!shards.length) return;
  const hi = Math.max(1, ...shards.map(([, s]) => max(s.staleness) * 1.1));
  const { x, y } = axes(ctx, w, h, shards[0][1].t, hi, tickText), colours = ["compute", "fetch", "push", "data"];
  shards.forEach(([, s], i) => {
    trace(ctx, s.t, s.staleness, x, y, 30);
    ctx.setLineDash(i >= 4 ? [4, 3] : []);
    ctx.strokeStyle = theme.colors[colours[i % 4]];
    ctx.lineWidth = 1.4;
    ctx.stroke();
  });
  ctx.setLineDash([]);
}

function chart(title, note, draw, label) {
  const canvas = el("canvas", { role: "img", "aria-label": label });
  return { nodes: [el("h3", {}, title, note), el("div", { class: "chart" }, canvas)], pane: new Pane(canvas, (ctx, w, h) => open?.detail && draw(ctx, w, h)) };
}

function facts(list) {
  return list.map(([name, text, title]) => el("div", {}, el("dt", {}, name), el("dd", { title: title ?? text }, text)));
}

function build(name) {
  const root = byId("drawer");
  const mark = makeMark(MARKS.starting), where = el("span", { class: "dim" }), chip = el("span", { class: "chip" });
  const close = el("button", { type: "button", class: "tool square", "aria-label": "Close", onclick: () => choose({ worker: "" }) }, "✕");
  const keys = (names) => el("span", { class: "keys", "aria-hidden": "true" }, ...names.map((n) => el("span", { class: `key ${n}` }, n === "data" ? "data wait" : n)));
  const staleness = chart("Staleness, × fair share", "", drawRatio, `Staleness of ${name} over time`);
  const phases = chart("Time in a step", keys(["compute", "fetch", "push", "data"]), drawPhases, `Phases of the steps of ${name} over time`);
  const shards = chart("Staleness at each shard, updates", "", drawShards, `Staleness of ${name} at each shard`);
  const parts = {
    mark, where, chip, why: el("p", { class: "hint" }), facts: el("dl", { class: "facts" }), shardNote: el("p", { class: "hint" }), log: el("pre", { class: "log", tabindex: "0", role: "log", "aria-live": "off", "aria-label": `Last lines of the log of ${name}` }, "…"),
    logPath: el("span", { class: "hint mono" }), events: el("ol"), checks: el("ul", { class: "checks", "aria-label": "Self-checks" }),
  };
  const report = el("button", { type: "button", class: "tool", onclick: () => copy(words(), report) }, "Copy report");
  const pyspy = el("button", { type: "button", class: "tool", title: "Run it on the worker's machine", onclick: () => copy(`py-spy dump --pid ${open?.detail?.pid ?? "PID"}`, pyspy) }, "Copy py-spy command");
  const foot = [report, pyspy];
  if (run.meta?.actions && !isReport) foot.push(el("button", { type: "button", class: "tool danger", onclick: (event) => drain(event.target) }, "Drain"));
  root.replaceChildren(
    el("div", { class: "top" }, el("h2", { id: "drawer-name", tabindex: "-1" }, mark, name), chip, where, close),
    el("div", { class: "body", tabindex: "0", role: "group", "aria-label": `Details of ${name}` }, parts.why, ...staleness.nodes, ...phases.nodes, ...shards.nodes, parts.shardNote, el("h3", {}, "Counters"), parts.facts, el("h3", {}, "Events"), parts.events, el("h3", {}, "Log", parts.logPath), parts.log, parts.checks),
    el("div", { class: "foot" }, ...foot),
  );
  root.hidden = false;
  open = { name, parts, panes: [staleness.pane, phases.pane, shards.pane], detail: null };
  before = document.activeElement;
  byId("drawer-name").focus({ preventScroll: true });
  refresh();
}

function shut() {
  if (!open) return;
  open.panes.forEach((pane) => pane.remove());
  open = null;
  byId("drawer").hidden = true;
  byId("drawer").replaceChildren();
  if (before?.isConnected) before.focus({ preventScroll: true });
}

async function refresh() {
  const mine = open;
  if (!mine) return;
  if (run.meta && !run.meta.worker_order.includes(mine.name)) {
    say(mine.parts.why, `There is no worker ${mine.name} in this run.`);
    return;
  }
  try {
    const window = state.window === "5m" ? 300 : state.window === "15m" ? 900 : state.window === "1h" ? 3600 : Math.min(86_400, Math.max(60, Math.ceil(run.domain.span)));
    const detail = await get(`workers/${encodeURIComponent(mine.name)}?window=${window}`);
    if (open !== mine) return;
    mine.detail = detail;
    render();
  } catch (error) {
    if (open === mine) say(mine.parts.why, `${error.message} ${error.hint ?? ""}`);
    return;
  }
  if (!mine.detail.log) {
    say(mine.parts.log, "This run has no folder, so there is no log.");
    return;
  }
  try {
    const log = await getLog(mine.name, LINES);
    if (open !== mine) return;
    const isEnd = mine.parts.log.scrollTop + mine.parts.log.clientHeight >= mine.parts.log.scrollHeight - 8;
    say(mine.parts.log, log || "Its log is empty.");
    if (isEnd) mine.parts.log.scrollTop = mine.parts.log.scrollHeight;
  } catch (error) {
    if (open === mine) say(mine.parts.log, error.status === 404 && !isReport ? "Its log is not on the monitor's machine." : error.message);
  }
}

function sentence(d) {
  const parts = [];
  if (d.blame && d.excess !== null) parts.push(`Its ${d.blame} takes ${times(d.excess)} the fleet median.`);
  const target = run.kpi?.workers?.alive;
  if (d.share_of_updates !== null && target > 1) parts.push(`It makes ${percent(d.share_of_updates)} of all updates; an even share is ${percent(1 / target)}${d.ratio !== null && d.ratio > 2 && d.share_of_updates < 0.6 / target ? ", so it hurts less than it looks" : ""}.`);
  return parts.join(" ");
}

function render() {
  const { detail: d, parts, panes } = open;
  setMark(parts.mark, MARKS[d.status] ?? MARKS.starting, d.status);
  say(parts.chip, d.status);
  parts.chip.dataset.tone = { ok: "ok", watch: "warn", slow: "warn", stalled: "bad", down: "bad", recovering: "info", draining: "info" }[d.status] ?? "";
  say(parts.where, `${d.node}${d.pid ? ` · pid ${d.pid}` : ""}${d.device ? ` · ${d.device}` : ""}`);
  say(parts.why, sentence(d));
  const or = (v, text) => (v === null || v === undefined ? "–" : text(v));
  parts.facts.replaceChildren(...facts([
    ["Behind now", or(d.lag, (v) => `${count(v)} updates`)], ["× fair share", or(d.ratio, times)], ["Since parameters", or(d.seconds, seconds)],
    ["Step", or(d.step_s, seconds)], ["Samples/s", or(d.samples_per_s, count)], ["Loss", or(d.loss, (v) => v.toPrecision(4))],
    ["Pushes", count(d.pushes)], ["Samples", count(d.samples)], ["Share of updates", or(d.share_of_updates, percent)],
    ["Sent", bytes(d.sent_bytes)], ["Received", bytes(d.received_bytes)], ["Memory", or(d.rss_bytes, bytes)],
    ["Retries", count(d.retries)], ["Restarts", count(d.restarts)], ["Incarnation", or(d.inc, String)],
    ["Skew of shards", or(d.skew, (v) => `${count(v)} updates`)], ["Status since", or(d.since, (v) => clock(v)), or(d.since, (v) => moment(v, run.meta?.started))], ["Version", or(d.versions?.distbelief, String)],
  ]));
  const now = Object.entries(d.shards).map(([name, s]) => `${name} ${s.staleness_now ?? "–"}`);
  say(parts.shardNote, now.length > SHARDS_MAX ? `${now.slice(0, SHARDS_MAX).join(" · ")} · and ${now.length - SHARDS_MAX} more` : now.join(" · "));
  parts.events.replaceChildren(...(d.events.length ? d.events.slice(-6).reverse().map((e) => el("li", {}, el("span", { class: "mono dim" }, `${clock(e.at)} `), e.text.replace(/(\d)x\b/g, "$1×"))) : [el("li", { class: "hint" }, "Nothing has happened to it.")]));
  say(parts.logPath, d.log ?? "");
  parts.checks.replaceChildren(...(run.snapshot?.checks ?? []).map((c) => el("li", {}, makeMark(c.ok === null ? MARKS.starting : c.ok ? ["tick", "ok", false] : MARKS.down), el("span", {}, c.text))));
  panes.forEach((pane) => pane.mark());
}

function words() {
  const d = open?.detail;
  if (!d) return "";
  return [`worker ${d.id} on ${d.node} (pid ${d.pid ?? "?"}): ${d.status}`, `${d.lag ?? "?"} updates behind, ${d.ratio === null ? "?" : times(d.ratio)} fair share; step ${d.step_s === null ? "?" : seconds(d.step_s)}`,
    PHASES.map((p) => `${p} ${d.phases_s[p] === null ? "?" : seconds(d.phases_s[p])}`).join(", "), sentence(d), `pushes ${d.pushes}, retries ${d.retries}, restarts ${d.restarts}, up ${d.since === null ? "?" : duration(run.now - d.since)}`, location.href, "", open.parts.log.textContent].join("\n");
}

async function drain(button) {
  if (!confirm(`Ask ${open.name} to finish its batch and leave?`)) return;
  try {
    await act("drain", { worker: open.name });
    say(button, "Asked to leave");
  } catch (error) {
    say(button, error.status ? error.message : "The monitor did not answer");
  }
}

export function startDrawer() {
  const follow = () => {
    if (open?.name === state.worker) return;
    shut();
    if (state.worker) build(state.worker);
  };
  onState((changed) => {
    if (changed.has("worker")) follow();
    else if (changed.has("window") && open) refresh();
  });
  on("meta", () => state.worker && !open && follow());
  on("tick", () => open && !document.hidden && Math.floor(run.now) % EVERY_S === 0 && refresh());
  void whole;
}
