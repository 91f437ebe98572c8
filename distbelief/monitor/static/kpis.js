// Kpis: the five cards that say how the run is doing.

import { byId, say, show, showKey } from "./dom.js";
import { clock, count, digits, duration, loss, percent, times, whole } from "./format.js";
import { Pane } from "./painter.js";
import { line, robust, trace } from "./plot.js";
import { on, run } from "./run.js";
import { areaOf, FONT, theme } from "./theme.js";

const STATUS_COLOURS = ["line", "calm", "push", "hot", "bad", "bad", "accent", "accent", "line"];
const STATUSES = ["starting", "ok", "watch", "slow", "stalled", "down", "recovering", "draining", "left"];
const CELLS_MAX = 64;
const PER_ROW = 32;

function spark(column, colour, fromZero) {
  return (ctx, w, h) => {
    const series = run.series;
    if (!series) return;
    const values = series[column].some((v) => v !== null) ? series[column] : series[column.replace("_smooth", "")];
    const range = robust(values, 0.002);
    if (!range) return;
    const lo = fromZero ? 0 : range[0], hi = Math.max(range[1] * (fromZero ? 1.05 : 1), lo + 1e-9);
    const { from, to } = run.domain;
    const x = (t) => ((t - from) / (to - from)) * w, y = (v) => h - 3 - ((Math.min(v, hi) - lo) / (hi - lo)) * (h - 7);
    trace(ctx, series.at, values, x, y, 60);
    ctx.strokeStyle = theme.colors[colour];
    ctx.lineWidth = 1.5;
    ctx.stroke();
    // The ground below: from its first point to its last.
    const known = values.flatMap((v, i) => (v === null ? [] : [i]));
    ctx.lineTo(x(series.at[known[known.length - 1]]), h);
    ctx.lineTo(x(series.at[known[0]]), h);
    ctx.closePath();
    ctx.globalAlpha = 0.1;
    ctx.fillStyle = theme.colors[colour];
    ctx.fill();
    ctx.globalAlpha = 1;
  };
}

function drawScale(ctx, w, h) {
  const stale = run.kpi?.staleness;
  const top = Math.max(8, h - 21), lo = -1, hi = 3, x = (p) => 1 + ((Math.max(lo, Math.min(hi, p)) - lo) / (hi - lo)) * (w - 2);
  ctx.save();
  ctx.beginPath();
  ctx.roundRect(0, top, w, 6, 2);
  ctx.clip();
  for (let i = 0; i < 80; i += 1) {
    ctx.fillStyle = areaOf(lo + (i / 80) * (hi - lo));
    ctx.fillRect((i / 80) * w, top, w / 80 + 1, 6);
  }
  ctx.restore();
  ctx.strokeStyle = theme.colors.line;
  ctx.lineWidth = 1;
  ctx.strokeRect(0.5, top + 0.5, w - 1, 5);
  ctx.fillStyle = theme.colors.dim;
  ctx.font = `10.5px ${FONT}`;
  ctx.textBaseline = "alphabetic";
  [-1, 0, 1, 2, 3].forEach((p) => {
    ctx.textAlign = p === lo ? "left" : p === hi ? "right" : "center";
    ctx.fillText(p < 0 ? "½×" : `${2 ** p}×`, x(p), top + 17);
  });
  if (!stale) return;
  const fair = Math.max(1, stale.fair ?? 1);
  for (const value of [stale.p50, stale.p95, stale.max]) {
    if (value === null) continue;
    const px = x(Math.log2(Math.max(value / fair, 0.01)));
    ctx.fillStyle = theme.colors.text;
    ctx.beginPath();
    ctx.moveTo(px - 4, top - 5);
    ctx.lineTo(px + 4, top - 5);
    ctx.lineTo(px, top);
    ctx.fill();
    line(ctx, px, top, px, top + 6, theme.colors.text);
  }
}

/** Status of each cell: of workers, or where they are many the worst of each node. */
function statuses() {
  const st = run.tick?.w?.st ?? "";
  return [...st].map(Number);
}

function drawCells(ctx, w, h) {
  let list = statuses();
  const rank = [0, 1, 3, 5, 6, 7, 4, 2, 0];
  const cap = Math.max(PER_ROW, Math.floor(w / 6)) * Math.max(2, Math.floor(h / 9));
  if (list.length > cap) {
    const size = Math.ceil(list.length / cap);
    list = Array.from({ length: Math.ceil(list.length / size) }, (_, i) => list.slice(i * size, (i + 1) * size).reduce((a, b) => (rank[b] > rank[a] ? b : a)));
  }
  if (!list.length) return;
  const perRow = list.length <= CELLS_MAX ? Math.min(PER_ROW, list.length) : Math.ceil(list.length / Math.max(2, Math.floor(h / 9)));
  const rows = Math.ceil(list.length / perRow);
  const cw = Math.min(26, w / perRow), ch = Math.min(12, h / rows);
  const top = h - rows * ch;
  list.forEach((status, i) => {
    const x = (i % perRow) * cw, y = top + Math.floor(i / perRow) * ch, pad = cw > 4 ? 1 : 0.25;
    ctx.fillStyle = ctx.strokeStyle = theme.colors[STATUS_COLOURS[status]];
    ctx.beginPath();
    ctx.roundRect(x + pad, y + 1, Math.max(1, cw - 2 * pad), ch - 2, 1.5);
    if (status === 4 || status === 5 || status === 0) {
      ctx.lineWidth = 1.3;
      ctx.stroke();
    } else ctx.fill();
    if (status === 5) line(ctx, x + pad, y + ch - 1, x + cw - pad, y + 1, theme.colors.bad);
  });
}

function eta(progress) {
  const { eta_s: left, elapsed_s: elapsed, epoch, unit } = progress;
  const parts = [];
  if (run.isOver) parts.push(elapsed === null ? "Ended" : `Took ${duration(elapsed)}`);
  else if (left !== null) parts.push(elapsed !== null && elapsed < 60 ? "ETA after warm-up" : `ETA ${duration(left)} (${clock(run.now + left, false)})`);
  else if (run.state === "waiting") parts.push("No run yet");
  else if (progress.total === null) parts.push("No end is set");
  else parts.push("ETA not known yet");
  if (epoch !== null && unit !== "epochs") parts.push(`epoch ${digits(epoch, 2)}`);
  else if (progress.updates !== null && unit !== "updates") parts.push(`${count(progress.updates)} updates`);
  return parts.join(" · ");
}

export function startKpis() {
  const panes = {
    loss: new Pane(byId("spark-loss"), spark("loss_smooth", "compute", false)),
    rate: new Pane(byId("spark-rate"), spark("samples_per_s", "fetch", true)),
    scale: new Pane(byId("scale"), drawScale),
    cells: new Pane(byId("cells"), drawCells),
  };
  const update = () => {
    const { kpi } = run;
    if (!kpi) return;
    const none = run.state === "waiting" || run.state === "starting" ? "The run has not begun to train." : "The monitor was told nothing of it.";
    showKey("kpi.loss", kpi.loss, kpi.loss === null ? "" : loss(kpi.loss), `No loss yet: ${none}`);
    byId("val").hidden = kpi.val_loss === null;
    showKey("kpi.val_loss", kpi.val_loss, kpi.val_loss === null ? "" : loss(kpi.val_loss), "Not evaluated yet.");
    const slope = byId("slope"), per = kpi.loss_slope_per_min;
    show(slope, per, per === null ? "" : `${per <= 0 ? "▼" : "▲"} ${digits(Math.abs(per), 2)} /min`, "");
    if (per === null) say(slope, "");
    slope.dataset.tone = per !== null && per > 0 ? "bad" : "ok";
    showKey("kpi.samples_per_s", kpi.samples_per_s, kpi.samples_per_s === null ? "" : count(kpi.samples_per_s), none);
    showKey("kpi.updates_per_s", kpi.updates_per_s, kpi.updates_per_s === null ? "" : count(kpi.updates_per_s), none);
    const s = kpi.staleness, why = "No update was applied in the last 60 s.";
    for (const key of ["p50", "p95", "max"]) showKey(`kpi.staleness.${key}`, s[key], s[key] === null ? "" : whole(s[key]), why);
    const fair = Math.max(1, s.fair ?? 1);
    byId("stale-max").style.color = s.max !== null && s.max / fair >= 2 ? "var(--hot)" : "";
    if (s.max !== null) byId("stale-max").title = `${times(s.max / fair)} fair share${s.worst ? `, ${s.worst}` : ""}`;
    panes.scale.label(s.p50 === null ? "No staleness yet" : `Staleness: half of all updates are at most ${whole(s.p50)} behind, 95 % at most ${whole(s.p95)}, the worst ${whole(s.max)}; fair share is ${whole(fair)}`);
    const { alive, target, by_status: by } = kpi.workers;
    showKey("kpi.workers.alive", alive, String(alive), none);
    showKey("kpi.workers.target", target, String(target), "The launcher has not said how many.");
    panes.cells.label(STATUSES.filter((name) => by?.[name]).map((name) => `${by[name]} ${name}`).join(", ") || "No workers yet");
    panes.cells.canvas.title = panes.cells.canvas.getAttribute("aria-label");
    const p = kpi.progress;
    const done = byId("done");
    show(done, p.done, p.done === null ? "" : p.unit === "seconds" ? duration(p.done) : p.unit === "epochs" ? digits(p.done, 3) : count(p.done), none);
    if (p.done === null && p.updates !== null) {
      show(done, p.updates, count(p.updates));
      say(byId("of"), "updates");
    } else say(byId("of"), p.total === null ? (p.unit === "none" ? "" : p.unit) : p.unit === "seconds" ? `/ ${duration(p.total)}` : `/ ${count(p.total)} ${p.unit}`);
    byId("bar").setAttribute("aria-valuenow", String(Math.round((p.share ?? 0) * 100)));
    byId("bar").title = p.share === null ? "How far it is is not known." : percent(p.share);
    byId("bar-fill").style.width = `${(p.share ?? 0) * 100}%`;
    const left = byId("eta");
    left.dataset.value = p.eta_s ?? "";
    say(left, eta(p));
    panes.scale.mark();
    panes.cells.mark();
  };
  on("tick snapshot", update);
  on("series", () => { panes.loss.mark(); panes.rate.mark(); });
}
