// Plot: a canvas with axes. Sizes are CSS pixels; the canvas has as many as the screen.

import { theme } from "./theme.js";
import { clock } from "./format.js";

const BRIDGE = 4;

export function context(canvas) {
  const box = canvas.getBoundingClientRect();
  const [width, height] = [Math.max(1, Math.floor(box.width)), Math.max(1, Math.floor(box.height))];
  const scale = window.devicePixelRatio || 1;
  if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
  }
  const g = canvas.getContext("2d");
  g.setTransform(scale, 0, 0, scale, 0, 0);
  g.clearRect(0, 0, width, height);
  g.font = "11px " + theme().font;
  return { g, width, height };
}

export class Plot {
  constructor(canvas, { left = 36, right = 10, top = 8, bottom = 20 } = {}) {
    this.canvas = canvas;
    this.pad = { left, right, top, bottom };
  }

  begin() {
    Object.assign(this, context(this.canvas));
    const { left, right, top, bottom } = this.pad;
    this.x0 = left;
    this.x1 = this.width - right;
    this.y0 = top;
    this.y1 = this.height - bottom;
    return this.g;
  }

  setX(from, to, log = false) {
    [this.from, this.to, this.logX] = [from, to, log];
  }

  setY(low, high, log = false) {
    [this.low, this.high, this.logY] = [low, high, log];
  }

  x(value) {
    const [a, b, v] = this.logX ? [Math.log2(this.from), Math.log2(this.to), Math.log2(value)] : [this.from, this.to, value];
    return this.x0 + ((v - a) / (b - a || 1)) * (this.x1 - this.x0);
  }

  y(value) {
    const [a, b, v] = this.logY ? [Math.log(this.low), Math.log(this.high), Math.log(value)] : [this.low, this.high, value];
    return this.y1 - ((v - a) / (b - a || 1)) * (this.y1 - this.y0);
  }

  gridY(ticks, text = String, right = false) {
    const { g } = this;
    const t = theme();
    g.textBaseline = "middle";
    g.textAlign = right ? "left" : "right";
    for (const tick of ticks) {
      const y = Math.round(this.y(tick)) + 0.5;
      if (!right) {
        g.strokeStyle = t.line;
        g.beginPath();
        g.moveTo(this.x0, y);
        g.lineTo(this.x1, y);
        g.stroke();
      }
      g.fillStyle = t.faint;
      g.fillText(text(tick), right ? this.x1 + 5 : this.x0 - 6, y);
    }
  }

  ticksX(ticks, text) {
    const { g } = this;
    g.fillStyle = theme().faint;
    g.textBaseline = "top";
    for (const tick of ticks) {
      const x = this.x(tick);
      if (x < this.x0 - 1 || x > this.x1 + 1) continue;
      const half = g.measureText(text(tick)).width / 2;
      g.textAlign = "center";
      g.fillText(text(tick), Math.min(Math.max(x, half), this.width - half), this.y1 + 6);
    }
  }

  times() {
    const span = this.to - this.from;
    const steps = [5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 14400, 28800, 86400];
    const step = steps.find((s) => span / s <= Math.max(2, (this.x1 - this.x0) / 110)) ?? 86400;
    const ticks = [];
    for (let at = Math.ceil(this.from / step) * step; at <= this.to; at += step) ticks.push(at);
    this.ticksX(ticks, (at) => clock(at, step < 60));
  }

  line(xs, ys, color, width = 1.5, from = 0) {
    const { g } = this;
    g.strokeStyle = color;
    g.lineWidth = width;
    g.lineJoin = "round";
    g.beginPath();
    let last = -Infinity;
    for (let i = from; i < xs.length; i++) {
      if (ys[i] === null || ys[i] === undefined) continue;
      const [x, y] = [this.x(xs[i]), this.y(ys[i])];
      // Not everything is heard of in every bin; a longer hole stays one.
      if (i - last <= BRIDGE) g.lineTo(x, y); else g.moveTo(x, y);
      last = i;
    }
    g.stroke();
    g.lineWidth = 1;
  }

  clip(draw) {
    const { g } = this;
    g.save();
    g.beginPath();
    g.rect(this.x0, this.y0 - 2, this.x1 - this.x0, this.y1 - this.y0 + 4);
    g.clip();
    draw();
    g.restore();
  }
}

// Round numbers between two, about `count` of them.
export function ticks(low, high, count = 3) {
  const raw = (high - low) / Math.max(1, count);
  if (!(raw > 0)) return [low];
  const ten = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((k) => k * ten).find((s) => s >= raw);
  const found = [];
  for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + 1e-9; v += step) found.push(Number(v.toPrecision(12)));
  return found;
}

// The range that most values are in: single ones far out do not flatten the rest.
export function robust(values) {
  const sorted = values.filter((v) => v !== null && Number.isFinite(v)).sort((a, b) => a - b);
  if (!sorted.length) return null;
  const at = (q) => sorted[Math.min(sorted.length - 1, Math.floor(q * sorted.length))];
  let [low, high] = [at(0.01), at(0.99)];
  if (low === high) [low, high] = [low - Math.abs(low) * 0.1 - 1e-9, high + Math.abs(high) * 0.1 + 1e-9];
  const room = (high - low) * 0.06;
  return [low - room, high + room, sorted.filter((v) => v > high + room).length];
}

// A small line without axes.
export function spark(canvas, values, color, { zero = false, area = false } = {}) {
  const { g, width, height } = context(canvas);
  const known = values.filter((v) => v !== null && v !== undefined);
  if (known.length < 2) return;
  const high = Math.max(...known);
  const low = zero ? 0 : Math.min(...known);
  const x = (i) => (i / (values.length - 1)) * width;
  const y = (v) => height - 2 - ((v - low) / (high - low || 1)) * (height - 4);
  g.beginPath();
  let first = null;
  let lastX = 0;
  values.forEach((v, i) => {
    if (v === null || v === undefined) return;
    if (first === null) { first = x(i); g.moveTo(x(i), y(v)); } else g.lineTo(x(i), y(v));
    lastX = x(i);
  });
  g.strokeStyle = color;
  g.lineWidth = 1.5;
  g.stroke();
  if (area) {
    g.lineTo(lastX, height);
    g.lineTo(first, height);
    g.globalAlpha = 0.1;
    g.fillStyle = color;
    g.fill();
    g.globalAlpha = 1;
  }
}
