// Scatter: do stale updates hurt? Norm of the gradient by staleness; or, with the meter on, how far
// a gradient is from that of the same batch on current parameters.

import { byId, radios, say } from "./dom.js";
import { digits, whole } from "./format.js";
import { powerTicks, squash } from "./distribution.js";
import { Pane } from "./painter.js";
import { chip, line, logTicks, niceTicks, robust, tickText } from "./plot.js";
import { on, run, wants } from "./run.js";
import { choose, onState, state } from "./state.js";
import { FONT, theme, thinOf } from "./theme.js";

const kind = () => state.effect || (run.meta?.meter && !run.meta?.grad_norm ? "meter" : "norm");
let pane = null, check = null;

function stay(text) {
  const empty = byId("scatter-empty");
  empty.hidden = !text;
  if (empty.textContent !== text) empty.textContent = text;
}

function xAxis(ctx, h, margin, wide, values) {
  const known = values.filter((v) => v !== null);
  const least = Math.min(...known), most = Math.max(...known);
  const lo = squash(Math.max(0, least * 0.85)), hi = Math.max(squash(most * 1.15), lo + 1);
  const x = (v) => margin.left + ((squash(v) - lo) / (hi - lo)) * wide;
  ctx.textAlign = "center";
  ctx.textBaseline = "alphabetic";
  ctx.fillStyle = theme.colors.dim;
  for (const v of powerTicks(2 ** lo - 1, 2 ** hi - 1, wide)) {
    line(ctx, Math.round(x(v)) + 0.5, margin.top, Math.round(x(v)) + 0.5, h - margin.bottom, theme.colors.grid);
    ctx.fillText(String(v), x(v), h - margin.bottom + 15);
  }
  return x;
}

function drawNorm(ctx, w, h) {
  const found = run.updates;
  if (!found) return stay("Waiting for the first pushes.");
  if (!found.lag.length && run.state !== "training") return stay("Waiting for the first pushes.");
  if (found.off) return stay("Gradient norms are off. Turn them on with --set train.log_grad_norm=true.");
  const at = found.lag.flatMap((lag, i) => (lag === null || found.grad_norm[i] === null ? [] : [i]));
  if (!at.length) return stay("No push with a norm in the last 60 s.");
  stay("");
  const margin = { left: 36, right: 12, top: 8, bottom: 22 }, wide = w - margin.left - margin.right;
  const norms = at.map((i) => found.grad_norm[i]), [low, high, , top] = robust(norms, 0.002);
  const isLog = low > 0 && high / low > 20;
  const f = isLog ? Math.log : (v) => v;
  const a = isLog ? low / 1.2 : Math.max(0, low - (high - low) * 0.15), b = isLog ? high * 1.2 : Math.max(high + (high - low) * 0.15, a + 1e-9);
  const y = (v) => h - margin.bottom - ((f(Math.min(b, Math.max(a, v))) - f(a)) / (f(b) - f(a))) * (h - margin.top - margin.bottom);
  const x = xAxis(ctx, h, margin, wide, at.map((i) => found.lag[i]));
  ctx.textAlign = "right";
  ctx.textBaseline = "middle";
  for (const v of isLog ? logTicks(a, b, 4) : niceTicks(a, b, Math.max(2, Math.floor(h / 34)))) {
    line(ctx, margin.left, Math.round(y(v)) + 0.5, w - margin.right, Math.round(y(v)) + 0.5, theme.colors.grid);
    ctx.fillStyle = theme.colors.dim;
    ctx.fillText(tickText(v), margin.left - 6, y(v));
  }
  const fair = Math.max(1, run.kpi?.staleness?.fair ?? 1);
  let worst = -1;
  const big = [];
  ctx.globalAlpha = 0.5;
  for (const i of at) {
    if (worst < 0 || found.lag[i] > found.lag[worst]) worst = i;
    const power = Math.log2(Math.max(found.lag[i] / fair, 0.01));
    if (power > 1) {
      big.push(i);
      continue;
    }
    ctx.fillStyle = thinOf(power);
    ctx.beginPath();
    ctx.arc(x(found.lag[i]), y(found.grad_norm[i]), 1.9, 0, 7);
    ctx.fill();
  }
  ctx.globalAlpha = 1;
  for (const i of big) {
    ctx.fillStyle = thinOf(Math.log2(found.lag[i] / fair));
    ctx.strokeStyle = theme.colors.card;
    ctx.lineWidth = 0.8;
    ctx.beginPath();
    ctx.arc(x(found.lag[i]), y(found.grad_norm[i]), 3.1, 0, 7);
    ctx.fill();
    ctx.stroke();
  }
  const middle = found.median;
  if (middle?.lag?.length > 1) {
    ctx.beginPath();
    middle.lag.forEach((lag, i) => (i ? ctx.lineTo(x(lag), y(middle.grad_norm[i])) : ctx.moveTo(x(lag), y(middle.grad_norm[i]))));
    ctx.strokeStyle = theme.colors.text;
    ctx.lineWidth = 2;
    ctx.stroke();
  }
  if (worst >= 0 && found.lag[worst] / fair > 2) {
    const px = x(found.lag[worst]);
    chip(ctx, found.worker[worst], Math.min(px, w - 34), Math.max(margin.top + 8, Math.min(...big.filter((i) => found.worker[i] === found.worker[worst]).map((i) => y(found.grad_norm[i]))) - 13), { align: "center", bold: true });
  }
  const rho = found.spearman;
  chip(ctx, `line = median${rho === null ? "" : ` · ρ ${digits(rho, 2)}`}`, w - margin.right, h - margin.bottom - 10, { align: "right", colour: theme.colors.dim });
  pane.label(`${at.length} pushes of the last 60 s: gradient norm by staleness${rho === null ? "" : `, rank correlation ${digits(rho, 2)}`}`);
  void top;
}

function drawMeter(ctx, w, h) {
  const found = run.meter;
  if (!found) return stay("Waiting for the meter.");
  if (found.off) return stay("The meter is off. Turn it on with --set train.meter=0.01: that share of pushes is computed twice.");
  const bins = found.bins;
  if (!bins?.staleness?.length) return stay(found.text || "Nothing was measured yet.");
  stay("");
  const rows = [["cosine", "cosine to a fresh gradient", [0, 1]], ["gap", "loss gap", null], ["rate", "effective rate", null]];
  const margin = { left: 50, right: 12, top: 2, bottom: 20 }, wide = w - margin.left - margin.right, each = (h - margin.bottom - margin.top) / rows.length;
  const fair = Math.max(1, run.kpi?.staleness?.fair ?? 1);
  const x = xAxis(ctx, h, margin, wide, bins.staleness);
  rows.forEach(([name, title, fixed], r) => {
    const values = bins[name], known = values.filter((v) => v !== null);
    if (!known.length) return;
    const top = margin.top + r * each + 19, bottom = margin.top + (r + 1) * each - 5;
    let lo = fixed ? Math.min(0, ...known) : Math.min(0, ...known), hi = fixed ? 1 : Math.max(0, ...known);
    if (hi - lo < 1e-12) hi = lo + 1;
    const y = (v) => bottom - ((v - lo) / (hi - lo)) * (bottom - top);
    if (r) line(ctx, margin.left, Math.round(margin.top + r * each) + 0.5, w - margin.right, Math.round(margin.top + r * each) + 0.5, theme.colors.line);
    ctx.textAlign = "right";
    ctx.textBaseline = "middle";
    ctx.fillStyle = theme.colors.dim;
    for (const v of [lo, hi]) ctx.fillText(digits(v, 2), margin.left - 6, y(v));
    line(ctx, margin.left, Math.round(y(lo)) + 0.5, w - margin.right, Math.round(y(lo)) + 0.5, theme.colors.grid);
    ctx.beginPath();
    let begun = false;
    bins.staleness.forEach((s, i) => {
      if (values[i] === null) return;
      if (begun) ctx.lineTo(x(s), y(values[i]));
      else ctx.moveTo(x(s), y(values[i]));
      begun = true;
    });
    ctx.strokeStyle = theme.colors.text;
    ctx.lineWidth = 1.6;
    ctx.stroke();
    bins.staleness.forEach((s, i) => {
      if (values[i] === null) return;
      ctx.fillStyle = thinOf(Math.log2(Math.max(s / fair, 0.01)));
      ctx.beginPath();
      ctx.arc(x(s), y(values[i]), 3.2, 0, 7);
      ctx.fill();
    });
    ctx.font = `11px ${FONT}`;
    chip(ctx, title, margin.left + 2, margin.top + r * each + 8, { colour: theme.colors.dim });
  });
  pane.label(`${found.text} ${found.n} pushes were measured twice.`);
}

function render() {
  const isMeter = kind() === "meter";
  byId("scatter").dataset.kind = isMeter ? "meter" : "norm";
  check(isMeter ? "meter" : "norm");
  say(byId("t-scatter"), isMeter ? "Is asynchrony hurting?" : "Staleness × gradient norm");
  const hint = byId("scatter-hint");
  const text = isMeter ? (run.meter && !run.meter.off ? run.meter.text : "Stale gradients beside fresh ones") : "Each dot is one push";
  say(hint, text);
  hint.title = text;
  pane.mark();
}

export function startScatter() {
  pane = new Pane(byId("scatter-canvas"), (ctx, w, h) => (kind() === "meter" ? drawMeter : drawNorm)(ctx, w, h));
  check = radios(byId("effects"), [["norm", "norm"], ["meter", "harm"]], (effect) => choose({ effect }));
  wants("updates", () => pane.isSeen && kind() === "norm");
  wants("meter", () => pane.isSeen && (kind() === "meter" || !run.meter));
  onState((changed) => changed.has("effect") && render());
  on("updates meter meta", render);
  void whole;
}
