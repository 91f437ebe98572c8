// Distribution: how wide staleness is, and how heavy its tail.

import { byId, say } from "./dom.js";
import { percent, whole } from "./format.js";
import { Pane } from "./painter.js";
import { chip, line, niceTicks } from "./plot.js";
import { on, run, wants } from "./run.js";
import { FONT, theme, thinOf } from "./theme.js";

const FEW = 200;
export const squash = (v) => Math.log2(v + 1);

/** Powers of two from lo to hi, as far apart as there is room. */
export function powerTicks(lo, hi, width) {
  const ticks = [];
  if (lo <= 0) ticks.push(0);
  for (let v = 1; v <= hi * 1.001; v *= 2) if (v >= lo * 0.999) ticks.push(v);
  const thin = Math.ceil(ticks.length / Math.max(2, Math.floor(width / 30)));
  return ticks.filter((_, i) => i % thin === 0);
}

function draw(ctx, w, h) {
  const found = run.distribution, empty = byId("dist-empty");
  const total = found?.n ?? 0;
  empty.hidden = total > 0;
  if (!total) {
    empty.textContent = found && run.state === "training" ? "No update was applied in the last minute." : "Waiting for the first updates.";
    return;
  }
  const { edges, count } = found, margin = { left: 38, right: 40, top: 10, bottom: 22 };
  let a = count.findIndex((n) => n > 0), b = count.length - 1 - [...count].reverse().findIndex((n) => n > 0);
  a = Math.max(0, a - 2);
  b = Math.min(count.length - 1, b + 1);
  const wide = w - margin.left - margin.right, tall = h - margin.top - margin.bottom, base = h - margin.bottom;
  const lo = squash(edges[a]), hi = squash(Math.max(edges[b + 1], edges[a] + 4));
  const x = (v) => margin.left + ((squash(v) - lo) / (hi - lo)) * wide;
  const most = Math.max(...count) / total;
  const ticks = niceTicks(0, most, Math.max(2, Math.floor(tall / 34))), top = Math.max(most, ticks[ticks.length - 1]);
  const y = (share) => base - (share / top) * tall;
  ctx.textBaseline = "middle";
  for (const v of ticks) {
    const py = Math.round(y(v)) + 0.5;
    line(ctx, margin.left, py, w - margin.right, py, theme.colors.grid);
    ctx.fillStyle = theme.colors.dim;
    ctx.textAlign = "right";
    ctx.fillText(`${Math.round(v * 1000) / 10}%`, margin.left - 6, py);
  }
  ctx.textAlign = "left";
  for (const v of [0, 0.5, 1]) ctx.fillText(`${v * 100}${v === 1 ? "%" : ""}`, w - margin.right + 7, base - v * tall);
  ctx.textAlign = "center";
  ctx.textBaseline = "alphabetic";
  for (const v of powerTicks(edges[a], edges[b + 1], wide)) ctx.fillText(String(v), x(v), base + 15);
  const fair = Math.max(1, found.fair ?? 1);
  let sum = 0;
  const cdf = [[x(edges[a]), base]];
  for (let i = a; i <= b; i += 1) {
    const l = x(edges[i]), r = x(edges[i + 1]), py = y(count[i] / total);
    if (count[i]) {
      ctx.fillStyle = thinOf(Math.log2(Math.max(Math.sqrt(Math.max(edges[i], 0.5) * edges[i + 1]) / fair, 0.01)));
      ctx.beginPath();
      const height = Math.max(1.5, base - py), gap = r - l > 3 ? 1 : 0;
      ctx.roundRect(l + gap / 2, base - height, Math.max(1, r - l - gap), height, [Math.min(2, height), Math.min(2, height), 0, 0]);
      ctx.fill();
    }
    sum += count[i] / total;
    cdf.push([l, base - sum * tall], [r, base - sum * tall]);
  }
  ctx.beginPath();
  cdf.forEach(([px, py], i) => (i ? ctx.lineTo(px, py) : ctx.moveTo(px, py)));
  ctx.strokeStyle = theme.colors.dim;
  ctx.lineWidth = 1.5;
  ctx.stroke();
  const chips = [];
  const mark = (v, text, row) => {
    if (v === null || v === undefined) return;
    const px = Math.round(x(v)) + 0.5;
    if (px < margin.left || px > w - margin.right) return;
    ctx.setLineDash([3, 3]);
    line(ctx, px, margin.top, px, base, theme.colors.text);
    ctx.setLineDash([]);
    chips.push(() => write(px, text, row));
  };
  const write = (px, text, row) => {
    ctx.font = `11px ${FONT}`;
    const width = ctx.measureText(text).width + 12;
    const isLeft = row === 0 ? px - width > margin.left - 10 : px + width > w - margin.right + 4;
    chip(ctx, text, isLeft ? px - 3 : px + 3, margin.top + 6 + row * 20, { align: isLeft ? "right" : "left", colour: theme.colors.dim });
  };
  mark(found.fair, `fair share ${whole(found.fair ?? 0)}`, 0);
  mark(found.p99, `p99 ${whole(found.p99 ?? 0)}`, 1);
  chips.forEach((draw) => draw());
  pane.label(`Staleness of ${total} updates: half at most ${whole(found.p50)}, 95 % at most ${whole(found.p95)}, 99 % at most ${whole(found.p99)}; fair share ${whole(fair)}. ${percent(most)} in the fullest bin.`);
}

let pane = null;
export function startDistribution() {
  pane = new Pane(byId("dist-canvas"), draw);
  wants("distribution", () => pane.isSeen);
  on("distribution", () => {
    const n = run.distribution?.n ?? 0;
    say(byId("dist-hint"), `Applied updates, last 60 s${n > 0 && n < FEW ? ` (few samples: ${n})` : ""}`);
    pane.mark();
  });
}
