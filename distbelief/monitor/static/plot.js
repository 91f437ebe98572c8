// Plot: axes, cursor and zoom of charts; those over time share all three.

import { clock, count, digits } from "./format.js";
import { Pane, inFrame } from "./painter.js";
import { run } from "./run.js";
import { choose, pointer, state } from "./state.js";
import { FONT, theme } from "./theme.js";

const STEPS = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400, 172800, 604800];
const DRAG_PX = 5;
const DOUBLE_MS = 260;
const plots = new Set();

export function niceTicks(lo, hi, num) {
  const raw = (hi - lo) / Math.max(1, num);
  const base = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((f) => f * base).find((s) => s >= raw) ?? base * 10;
  const ticks = [];
  for (let v = Math.ceil(lo / step - 1e-9) * step; v <= hi + step * 1e-6; v += step) ticks.push(Math.abs(v) < step * 1e-6 ? 0 : v);
  return ticks;
}

export function logTicks(lo, hi, num) {
  const ticks = [];
  for (let e = Math.floor(Math.log10(lo)); e <= Math.ceil(Math.log10(hi)); e += 1) {
    for (const m of [1, 2, 5]) {
      const v = m * 10 ** e;
      if (v >= lo * 0.999 && v <= hi * 1.001) ticks.push(v);
    }
  }
  const thin = Math.ceil(ticks.length / Math.max(2, num));
  return thin > 1 ? ticks.filter((_, i) => i % thin === 0) : ticks;
}

/** Times on whole minutes, hours or days of where the viewer is. */
export function timeTicks(from, to, num) {
  const step = STEPS.find((s) => (to - from) / s <= num) ?? STEPS[STEPS.length - 1];
  const shift = new Date(from * 1000).getTimezoneOffset() * 60;
  const ticks = [];
  for (let t = Math.ceil((from - shift) / step) * step + shift; t <= to; t += step) ticks.push(t);
  return { ticks, step };
}

export const tickText = (v) => (Math.abs(v) >= 1000 ? count(v) : digits(v, 3));

/** The smallest and largest of most values: some odd ones are not to squeeze the rest. */
export function robust(values, cut = 0.01) {
  const known = Float64Array.from(values.filter((v) => v !== null && Number.isFinite(v))).sort();
  if (!known.length) return null;
  const at = (q) => known[Math.min(known.length - 1, Math.max(0, Math.round(q * (known.length - 1))))];
  return [at(cut), at(1 - cut), known[0], known[known.length - 1]];
}

/** Lines of a column over time, broken where a value is missing for longer than `gap` seconds. Of
 * what falls on one pixel the first, the extremes and the last are drawn: it looks the same. */
export function trace(ctx, at, values, x, y, gap = 30) {
  ctx.beginPath();
  let last = -Infinity, pixel = NaN, low = 0, high = 0, end = 0;
  const flush = () => {
    if (low !== end) ctx.lineTo(pixel, low);
    if (high !== end) ctx.lineTo(pixel, high);
    ctx.lineTo(pixel, end);
  };
  for (let i = 0; i < at.length; i += 1) {
    const v = values[i];
    if (v === null || v === undefined) continue;
    const px = Math.round(x(at[i]) * 2) / 2, py = y(v), isApart = at[i] - last > gap;
    last = at[i];
    if (px === pixel && !isApart) {
      low = Math.min(low, py);
      high = Math.max(high, py);
      end = py;
      continue;
    }
    if (pixel === pixel) flush();
    if (isApart) ctx.moveTo(px, py);
    pixel = px;
    low = high = end = py;
  }
  if (pixel === pixel) flush();
}

export function placeTip(tip, x, y) {
  tip.hidden = false;
  const { offsetWidth: w, offsetHeight: h } = tip;
  const left = x + 16 + w > innerWidth - 8 ? x - 16 - w : x + 16;
  tip.style.transform = `translate(${Math.max(8, Math.round(left))}px, ${Math.max(8, Math.min(innerHeight - h - 8, Math.round(y + 14)))}px)`;
}

/** A chart whose x axis is time. `over` is a canvas above it, for what follows the pointer. */
export class TimePlot extends Pane {
  constructor(canvas, over, margin) {
    super(canvas);
    this.margin = margin;
    this.over = new Pane(over, (ctx, w, h) => this.drawOver(ctx, w, h));
    plots.add(this);
    canvas.addEventListener("pointermove", (event) => this._move(event));
    canvas.addEventListener("pointerleave", () => this._leave());
    canvas.addEventListener("pointerdown", (event) => this._down(event));
    canvas.addEventListener("pointerup", (event) => this._up(event));
    canvas.addEventListener("pointercancel", () => { pointer.selection = null; markOver(); });
    canvas.addEventListener("dblclick", () => { clearTimeout(this._wait); choose({ zoom: "" }); });
  }

  remove() {
    plots.delete(this);
    this.over.remove();
    super.remove();
  }

  get plotWidth() {
    return Math.max(1, (this.width ?? this.canvas.clientWidth) - this.margin.left - this.margin.right);
  }

  x(t) {
    const { from, to } = run.domain;
    return this.margin.left + ((t - from) / (to - from)) * this.plotWidth;
  }

  timeAt(px) {
    const { from, to } = run.domain;
    return Math.min(to, Math.max(from, from + ((px - this.margin.left) / this.plotWidth) * (to - from)));
  }

  timeAxis(ctx, w, h, { grid = true } = {}) {
    const { from, to } = run.domain, { left, right, top, bottom } = this.margin;
    const { ticks, step } = timeTicks(from, to, Math.max(2, Math.floor(this.plotWidth / 110)));
    ctx.textAlign = "center";
    ctx.textBaseline = "alphabetic";
    for (const t of ticks) {
      const x = Math.round(this.x(t)) + 0.5;
      if (grid) line(ctx, x, top, x, h - bottom, theme.colors.grid);
      const text = step >= 86400 ? new Date(t * 1000).toLocaleDateString([], { month: "short", day: "numeric" }) : clock(t, step < 60);
      const half = ctx.measureText(text).width / 2;
      if (x + half > w - 2 || x - half < left - 30) continue;
      ctx.fillStyle = theme.colors.dim;
      ctx.fillText(text, x, h - bottom + 15);
    }
    void right;
  }

  valueAxis(ctx, w, h, ticks, y, text = tickText) {
    ctx.textAlign = "right";
    ctx.textBaseline = "middle";
    for (const v of ticks) {
      const py = Math.round(y(v)) + 0.5;
      line(ctx, this.margin.left, py, w - this.margin.right, py, theme.colors.grid);
      ctx.fillStyle = theme.colors.dim;
      ctx.fillText(text(v), this.margin.left - 6, py);
    }
  }

  drawOver(ctx, w, h) {
    const { top, bottom } = this.margin, { time, selection } = pointer;
    if (selection) {
      const [a, b] = selection.map((t) => this.x(t));
      ctx.globalAlpha = 0.16;
      ctx.fillStyle = theme.colors.accent;
      ctx.fillRect(Math.min(a, b), top, Math.abs(b - a), h - top - bottom);
      ctx.globalAlpha = 1;
    }
    const { from, to } = run.domain;
    if (time !== null && time >= from && time <= to) {
      const x = Math.round(this.x(time)) + 0.5;
      ctx.setLineDash([3, 3]);
      line(ctx, x, top, x, h - bottom, theme.colors.dim);
      ctx.setLineDash([]);
      this.readout(ctx, w, h, time, x);
    }
  }

  /** What is shown beside the cursor. */
  readout() {}

  _at(event) {
    const box = this.canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  }

  _move(event) {
    const [px, py] = this._at(event);
    pointer.time = this.timeAt(px);
    if (this._begin !== undefined && Math.abs(px - this._begin) > DRAG_PX) pointer.selection = [this.timeAt(this._begin), pointer.time];
    markOver();
    this.hover?.(px, py, event);
  }

  /** While zoomed a second click may follow, which ends the zoom and opens nothing. */
  _clicked(px, py) {
    clearTimeout(this._wait);
    if (state.zoom) this._wait = setTimeout(() => this.click?.(px, py), DOUBLE_MS);
    else this.click?.(px, py);
  }

  _leave() {
    pointer.time = null;
    markOver();
    this.leave?.();
  }

  _down(event) {
    if (event.button !== 0 || event.pointerType === "touch") return;
    this._begin = this._at(event)[0];
    this.canvas.setPointerCapture(event.pointerId);
  }

  _up(event) {
    const [px, py] = this._at(event);
    const chosen = pointer.selection;
    const begin = this._begin;
    this._begin = undefined;
    pointer.selection = null;
    markOver();
    if (chosen && Math.abs(chosen[1] - chosen[0]) >= 2) {
      const [from, to] = chosen.sort((a, b) => a - b);
      choose({ zoom: `${Math.floor(from)}-${Math.ceil(to)}` });
    } else if (event.button === 0 && (begin === undefined || Math.abs(px - begin) <= DRAG_PX)) this._clicked(px, py);
  }
}

export function line(ctx, x0, y0, x1, y1, colour) {
  ctx.strokeStyle = colour;
  ctx.lineWidth = 1;
  ctx.beginPath();
  ctx.moveTo(x0, y0);
  ctx.lineTo(x1, y1);
  ctx.stroke();
}

export function markOver() {
  inFrame(() => plots.forEach((plot) => { plot.over.isDirty = true; }));
}

/** All charts over time: the domain has moved. */
export function markTime() {
  for (const plot of plots) plot.mark(), plot.over.mark();
}

/** Some words on a ground of their own. Returns: their width. */
export function chip(ctx, text, x, y, { align = "left", bold = false, colour = theme.colors.text } = {}) {
  ctx.font = `${bold ? 600 : 500} 11px ${FONT}`;
  const w = ctx.measureText(text).width + 10;
  const left = align === "left" ? x : align === "right" ? x - w : x - w / 2;
  ctx.globalAlpha = 0.92;
  ctx.fillStyle = theme.colors.card;
  ctx.beginPath();
  ctx.roundRect(left, y - 8.5, w, 17, 4);
  ctx.fill();
  ctx.globalAlpha = 1;
  ctx.fillStyle = colour;
  ctx.textAlign = "left";
  ctx.textBaseline = "middle";
  ctx.fillText(text, left + 5, y + 0.5);
  ctx.font = `11px ${FONT}`;
  return w;
}
