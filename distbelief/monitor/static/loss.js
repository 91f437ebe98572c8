// Loss: is it learning, and did staleness move it?

import { byId, radios } from "./dom.js";
import { clock, loss, times } from "./format.js";
import { chip, line, logTicks, niceTicks, robust, TimePlot, trace } from "./plot.js";
import { on, run } from "./run.js";
import { choose, onState, state } from "./state.js";
import { theme, thinOf } from "./theme.js";

const STOPS = 60;

class Loss extends TimePlot {
  constructor() {
    super(byId("loss-canvas"), byId("loss-over"), { left: 40, right: 12, top: 8, bottom: 22 });
  }

  draw(ctx, w, h) {
    const series = run.series, empty = byId("loss-empty");
    const raw = series?.loss ?? [], smooth = series?.loss_smooth?.some((v) => v !== null) ? series.loss_smooth : raw;
    const val = (series?.val_loss ?? []).filter((v) => v !== null);
    const range = robust([...raw, ...smooth]) ?? robust(val);
    empty.hidden = Boolean(range);
    if (!range) {
      empty.textContent = run.state === "training" ? "No loss was reported in this span of time." : "The loss comes with the first steps.";
      return;
    }
    let [lo, hi] = range;
    // There are few of these, and each counts.
    for (const v of val) lo = Math.min(lo, v), hi = Math.max(hi, v);
    const most = range[3], isLog = state.loss === "log" && lo > 0;
    if (hi - lo < 1e-9) hi = lo + Math.max(1e-6, Math.abs(lo) * 0.1);
    const pad = isLog ? 1.04 : (hi - lo) * 0.05;
    const [a, b] = isLog ? [lo / pad, hi * pad] : [lo - pad, hi + pad];
    const f = isLog ? Math.log : (v) => v;
    const { top, bottom, left, right } = this.margin;
    const y = (v) => top + (1 - (f(Math.max(isLog ? 1e-12 : -Infinity, v)) - f(a)) / (f(b) - f(a))) * (h - top - bottom);
    const ticks = isLog ? logTicks(a, b, 5) : niceTicks(a, b, Math.max(2, Math.floor((h - top - bottom) / 30)));
    this.valueAxis(ctx, w, h, ticks, y);
    this.timeAxis(ctx, w, h);
    ctx.save();
    ctx.beginPath();
    ctx.rect(left, top - 4, w - left - right + 4, h - top - bottom + 8);
    ctx.clip();
    const x = (t) => this.x(t), gap = Math.max(30, 3 * (series.bin_s ?? 1));
    const paint = this._gradient(ctx, series, x, left, w - right);
    trace(ctx, series.at, raw, x, y, gap);
    ctx.strokeStyle = paint;
    ctx.globalAlpha = 0.4;
    ctx.lineWidth = 1;
    ctx.stroke();
    ctx.globalAlpha = 1;
    trace(ctx, series.at, smooth, x, y, gap);
    ctx.strokeStyle = paint;
    ctx.lineWidth = 2.2;
    ctx.stroke();
    ctx.restore();
    this._y = y;
    series.val_loss.forEach((v, i) => {
      if (v === null) return;
      ctx.beginPath();
      ctx.arc(x(series.at[i]), y(v), 3, 0, 7);
      ctx.fillStyle = theme.colors.card;
      ctx.fill();
      ctx.strokeStyle = theme.colors.text;
      ctx.lineWidth = 1.8;
      ctx.stroke();
    });
    const over = raw.filter((v) => v !== null && v > b).length;
    if (over) chip(ctx, `${over} point${over > 1 ? "s" : ""} above`, w - right, top + 6, { align: "right", colour: theme.colors.dim });
    void most;
    for (const bad of run.events) {
      if (!/NaN/.test(bad.text) || bad.at < run.domain.from || bad.at > run.domain.to) continue;
      line(ctx, x(bad.at), top - 4, x(bad.at), top + 8, theme.colors.bad);
    }
    const last = [...smooth].reverse().find((v) => v !== null);
    this.label(`Loss from ${loss(range[3])} to ${loss(range[2])} in this window; now ${loss(last)}`);
  }

  /** The line's colour at a time is the p95 of staleness then. */
  _gradient(ctx, series, x, left, right) {
    const paint = ctx.createLinearGradient(left, 0, right, 0), ratio = series["ratio.p95"];
    const step = Math.max(1, Math.floor(series.at.length / STOPS));
    let any = false;
    for (let i = 0; i < series.at.length; i += step) {
      let worst = 0;
      for (let k = i; k < Math.min(i + step, ratio.length); k += 1) worst = Math.max(worst, ratio[k] ?? 0);
      const place = (x(series.at[i]) - left) / (right - left);
      if (worst <= 0 || place < 0 || place > 1) continue;
      paint.addColorStop(place, thinOf(Math.log2(worst)));
      any = true;
    }
    return any ? paint : theme.colors.compute;
  }

  readout(ctx, w, h, time, px) {
    const series = run.series;
    if (!series || !this._y) return;
    const i = series.at.findIndex((t) => t >= time);
    if (i < 0) return;
    const v = series.loss_smooth[i] ?? series.loss[i], ratio = series["ratio.p95"][i];
    if (v === null || v === undefined) return;
    ctx.beginPath();
    ctx.arc(px, this._y(v), 3.2, 0, 7);
    ctx.fillStyle = theme.colors.text;
    ctx.fill();
    const text = `${clock(series.at[i])}  ${loss(v)}${ratio === null ? "" : `  p95 ${times(ratio)}`}`;
    chip(ctx, text, px > w / 2 ? px - 8 : px + 8, this.margin.top + 6, { align: px > w / 2 ? "right" : "left" });
    void h;
  }
}

export function startLoss() {
  const chart = new Loss();
  const check = radios(byId("loss-scale"), [["linear", "linear"], ["log", "log"]], (kind) => choose({ loss: kind }));
  check(state.loss);
  onState((changed) => {
    check(state.loss);
    if (changed.has("loss")) chart.mark();
  });
  on("series", () => chart.mark());
}
