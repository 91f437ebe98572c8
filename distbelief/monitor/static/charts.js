// The charts of the bottom row but the shards: loss, distribution, gradient norm or meter.

import { $, setText } from "./dom.js";
import { loss as lossText, number, whole } from "./format.js";
import { Plot, robust, ticks } from "./plot.js";
import { view } from "./state.js";
import { rampColor, theme } from "./theme.js";

export class LossChart {
  constructor() {
    this.plot = new Plot($("loss"), { left: 40 });
  }

  show(series) {
    this.series = series;
    this.draw();
  }

  draw() {
    const plot = this.plot;
    const g = plot.begin();
    if (!this.series) return;
    const { at, loss, loss_smooth: smooth, "ratio.p95": p95, val_loss: validation } = this.series;
    const t = theme();
    const range = robust([...loss, ...(validation ?? [])]);
    if (!range) return empty(plot, "No loss yet: a script tells it by step(closure)");
    const isLog = view.s === "log" && range[0] > 0;
    plot.setX(this.series.from, this.series.to);
    plot.setY(isLog ? Math.max(range[0], 1e-9) : range[0], range[1], isLog);
    plot.gridY(isLog ? [0.001, 0.01, 0.1, 0.2, 0.5, 1, 2, 5, 10].filter((v) => v > range[0] && v < range[1]) : ticks(range[0], range[1]), (v) => number(v));
    plot.times();
    setText($("loss-sub"), "Line colour = p95 staleness at that time" + (range[2] ? `; ${range[2]} points above` : ""));
    plot.clip(() => {
      g.globalAlpha = 0.4;
      plot.line(at, loss, t.other, 1);
      g.globalAlpha = 1;
      this.colored(at, smooth ?? loss, p95 ?? []);
      (validation ?? []).forEach((value, i) => {
        if (value === null) return;
        g.beginPath();
        g.arc(plot.x(at[i]), plot.y(value), 3.5, 0, 7);
        g.fillStyle = t.card;
        g.fill();
        g.strokeStyle = t.text;
        g.lineWidth = 1.5;
        g.stroke();
        g.lineWidth = 1;
      });
    });
    const last = [...(smooth ?? loss)].reverse().find((v) => v !== null);
    $("loss").setAttribute("aria-label", `Loss over time, now ${lossText(last ?? null)}`);
  }

  colored(at, values, p95) {
    const { plot } = this;
    const { g } = plot;
    g.lineWidth = 2.2;
    g.lineCap = "round";
    let before = null;
    for (let i = 0; i < at.length; i++) {
      if (values[i] === null) { before = null; continue; }
      const point = [plot.x(at[i]), plot.y(values[i])];
      if (before) {
        g.strokeStyle = rampColor(p95[i] ?? 1, "thin");
        g.beginPath();
        g.moveTo(...before);
        g.lineTo(...point);
        g.stroke();
      }
      before = point;
    }
    g.lineWidth = 1;
    g.lineCap = "butt";
  }
}

export class Distribution {
  constructor() {
    this.plot = new Plot($("dist"), { left: 36, right: 36, top: 16 });
  }

  show(found) {
    this.found = found;
    this.draw();
  }

  draw() {
    const plot = this.plot;
    const g = plot.begin();
    const t = theme();
    if (!this.found || !this.found.n) return empty(plot, "No update applied yet");
    const { edges, count, n, fair, p99 } = this.found;
    const used = count.map((c, i) => (c ? i : -1)).filter((i) => i >= 0);
    const [first, last] = [Math.max(0, used[0] - 2), Math.min(count.length - 1, used[used.length - 1] + 2)];
    const low = Math.max(edges[first], 0.5);
    plot.setX(low, Math.max(edges[last + 1], low * 4), true);
    const highest = Math.max(...count) / n;
    plot.setY(0, highest * 1.08);
    plot.gridY(ticks(0, highest, 3), (v) => Math.round(v * 100) + "%");
    const powers = [];
    for (let p = -1; p < 15; p++) if (2 ** p >= low && 2 ** p <= edges[last + 1]) powers.push(2 ** p);
    const every = Math.max(1, Math.ceil(powers.length / 6));
    plot.ticksX(powers.filter((_, i) => i % every === 0), (v) => (v < 1 ? "0" : whole(v)));
    let sum = 0;
    const steps = [];
    for (let i = first; i <= last; i++) {
      const [a, b] = [plot.x(Math.max(edges[i], low)), plot.x(Math.max(edges[i + 1], low * 1.05))];
      sum += count[i];
      steps.push([a, b, sum / n]);
      if (!count[i]) continue;
      const y = Math.min(plot.y(count[i] / n), plot.y1 - 1.5);
      g.fillStyle = rampColor(Math.sqrt(Math.max(edges[i], 0.5) * edges[i + 1]) / Math.max(1, fair ?? 1), "thin");
      g.fillRect(a + 0.5, y, Math.max(1.5, b - a - 1), plot.y1 - y);
    }
    g.strokeStyle = t.dim;
    g.lineWidth = 1.3;
    g.beginPath();
    const yOf = (share) => plot.y1 - share * (plot.y1 - plot.y0);
    steps.forEach(([a, b, share], i) => { if (i) g.lineTo(a, yOf(share)); else g.moveTo(a, yOf(share)); g.lineTo(b, yOf(share)); });
    g.stroke();
    g.lineWidth = 1;
    g.fillStyle = t.faint;
    g.textAlign = "left";
    g.textBaseline = "middle";
    for (const share of [0, 0.5, 1]) g.fillText(`${share * 100}%`, plot.x1 + 5, yOf(share));
    this.mark(fair, `fair ${whole(fair)}`, "right");
    this.mark(p99, `p99 ${whole(p99)}`, "left");
    setText($("dist-sub"), `${whole(n)} applied updates, last 60 s` + (n < 200 ? ": few" : ""));
    $("dist").setAttribute("aria-label", `Staleness of ${whole(n)} updates: 99 of 100 are at most ${whole(p99)}, the fair share is ${whole(fair)}`);
  }

  mark(value, text, align) {
    const { g } = this.plot;
    if (value === null || value < 0.5) return;
    const x = this.plot.x(value);
    if (x < this.plot.x0 || x > this.plot.x1) return;
    g.strokeStyle = theme().dim;
    g.setLineDash([3, 3]);
    g.beginPath();
    g.moveTo(x, this.plot.y0 - 6);
    g.lineTo(x, this.plot.y1);
    g.stroke();
    g.setLineDash([]);
    g.fillStyle = theme().dim;
    g.textAlign = align;
    g.fillText(text, x + (align === "right" ? -4 : 4), this.plot.y0 - 4);
  }
}

export class Norm {
  constructor() {
    this.plot = new Plot($("norm"));
  }

  show(updates, meter) {
    this.updates = updates;
    this.meter = meter;
    $("norm-kind").hidden = meter.off || updates.off;
    this.draw();
  }

  draw() {
    const box = $("norm-empty");
    box.hidden = true;
    const g = this.plot.begin();
    if (!this.updates) return;
    const showsMeter = !this.meter.off && (view.k === "meter" || this.updates.off);
    setText($("t-norm"), showsMeter ? "Is asynchrony hurting?" : "Staleness × gradient norm");
    setText($("norm-sub"), showsMeter ? this.meter.text || "Cosine of gradients by updates between them" : "Each dot is one applied update");
    if (showsMeter) return this.drawMeter();
    if (this.updates.off) {
      box.hidden = false;
      box.textContent = "";
      box.append("Gradient norms are off. Turn them on with", Object.assign(document.createElement("code"), { textContent: "--set train.log_grad_norm=true" }));
      return;
    }
    const { lag, grad_norm: norm, median, spearman } = this.updates;
    const range = robust(norm);
    if (!range || !lag.length) return empty(this.plot, "No update applied yet");
    const t = theme();
    const top = Math.max(4, ...lag) * 1.25;
    const low = Math.max(0.5, Math.min(...lag.filter((v) => v > 0), top / 8) * 0.8);
    this.plot.setX(low, top, true);
    const isLog = range[0] > 0 && range[1] / range[0] > 20;
    this.plot.setY(isLog ? range[0] : Math.max(0, range[0]), range[1], isLog);
    this.plot.gridY(isLog ? [0.001, 0.01, 0.1, 1, 10, 100].filter((v) => v > range[0] && v < range[1]) : ticks(this.plot.low, range[1]), (v) => number(v));
    const powers = [];
    for (let p = 0; p < 14; p++) if (2 ** p >= low && 2 ** p <= top) powers.push(2 ** p);
    this.plot.ticksX(powers, whole);
    const fair = Math.max(1, this.fair ?? 1);
    this.plot.clip(() => {
      lag.forEach((value, i) => {
        if (norm[i] === null) return;
        const multiple = value / fair;
        g.globalAlpha = multiple > 2 ? 0.9 : 0.35;
        g.fillStyle = rampColor(multiple, "thin");
        g.beginPath();
        g.arc(this.plot.x(Math.max(value, low)), this.plot.y(norm[i]), multiple > 2 ? 3.2 : 1.8, 0, 7);
        g.fill();
      });
      g.globalAlpha = 1;
      if (median && median.lag.length > 1) this.plot.line(median.lag.map((v) => Math.max(v, low)), median.grad_norm, t.text, 2);
    });
    $("norm").title = spearman === null ? "" : `Spearman's rank correlation ${spearman.toFixed(2)}`;
    $("norm").setAttribute("aria-label", `Gradient norm against staleness of ${lag.length} updates; rank correlation ${spearman === null ? "not known" : spearman.toFixed(2)}`);
  }

  drawMeter() {
    const { staleness, cosine, bins } = this.meter;
    if (!staleness.length) return empty(this.plot, "No step measured yet");
    const { g } = this.plot;
    const t = theme();
    this.plot.setX(0.8, Math.max(4, ...staleness) * 1.2, true);
    this.plot.setY(Math.min(0, ...cosine), 1.02);
    this.plot.gridY([0, 0.5, 1], (v) => number(v));
    const powers = [];
    for (let p = 0; p < 14; p++) if (2 ** p <= this.plot.to) powers.push(2 ** p);
    this.plot.ticksX(powers, whole);
    staleness.forEach((value, i) => {
      g.globalAlpha = 0.5;
      g.fillStyle = t.compute;
      g.beginPath();
      g.arc(this.plot.x(Math.max(1, value)), this.plot.y(cosine[i]), 2.2, 0, 7);
      g.fill();
    });
    g.globalAlpha = 1;
    if (bins && bins.staleness.length) {
      this.plot.line(bins.staleness, bins.cosine, t.text, 2);
      this.plot.line(bins.staleness, bins.rate.map((v) => Math.min(v, 1.02)), t.push, 1.5);
    }
    $("norm").setAttribute("aria-label", `Cosine of a gradient with the one on newer parameters, against the updates between; ${this.meter.text ?? ""}`);
  }
}

function empty(plot, text) {
  const { g } = plot;
  g.fillStyle = theme().dim;
  g.textAlign = "center";
  g.textBaseline = "middle";
  g.fillText(text, plot.width / 2, plot.height / 2);
}
