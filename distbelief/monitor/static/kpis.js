// The five numbers at the top.

import { $, put, setText } from "./dom.js";
import { duration, loss, number, whole } from "./format.js";
import { context, spark } from "./plot.js";
import { rampColor, theme } from "./theme.js";

const STATUS_COLOR = { starting: "other", ok: "ok", watch: "warn", slow: "hot", stalled: "hot", down: "bad", recovering: "accent", draining: "other", left: "other" };

export class Kpis {
  constructor() {
    this.kpi = null;
    this.series = null;
    this.statuses = [];
  }

  show(kpi) {
    this.kpi = kpi;
    put("kpi.loss", loss(kpi.loss));
    const slope = kpi.loss_slope_per_min;
    const element = document.querySelector('[data-key="kpi.loss_slope_per_min"]');
    setText(element, slope === null ? "" : `${slope < 0 ? "▼" : "▲"} ${number(Math.abs(slope), 2)} /min`);
    element.style.color = slope !== null && slope > 0 ? "var(--warn)" : "var(--ok)";
    put("kpi.samples_per_s", number(kpi.samples_per_s));
    for (const q of ["p50", "p95", "max"]) put("kpi.staleness." + q, whole(kpi.staleness[q]));
    const { staleness } = kpi;
    const isHot = staleness.max !== null && staleness.fair > 0 && staleness.max / Math.max(1, staleness.fair) > 2;
    document.querySelector('[data-key="kpi.staleness.max"]').classList.toggle("hot", isHot);
    put("kpi.workers.alive", whole(kpi.workers.alive));
    put("kpi.workers.target", whole(kpi.workers.target));
    this.progress(kpi.progress);
    this.draw();
  }

  progress(p) {
    const isTime = p.unit === "seconds";
    put("kpi.progress.done", p.done === null ? whole(p.samples) : isTime ? duration(p.done) : p.unit === "epochs" ? p.done.toFixed(p.done < 10 ? 2 : 1) : whole(p.done));
    const total = p.total ? ` / ${isTime ? duration(p.total) : whole(p.total)}` : "";
    setText($("progress-of"), `${total} ${isTime ? "" : p.unit === "none" ? "samples" : (p.unit ?? "")}`.trim());
    const share = p.share === null || p.share === undefined ? 0 : Math.min(1, p.share);
    $("progress-bar").style.width = (share * 100).toFixed(2) + "%";
    $("progress-bar").parentElement.setAttribute("aria-valuenow", Math.round(share * 100));
    const left = p.eta_s === null ? (p.elapsed_s !== null && p.elapsed_s < 60 ? "ETA after warm-up" : "no ETA") : "ETA " + duration(p.eta_s);
    const epoch = p.unit !== "epochs" && p.epoch !== null && p.epoch !== undefined ? ` · epoch ${p.epoch.toFixed(1)}` : "";
    setText($("eta"), left + epoch + (p.elapsed_s === null ? "" : ` · ${duration(p.elapsed_s)} so far`));
  }

  draw() {
    const t = theme();
    if (this.series) {
      spark($("spark-loss"), this.series.loss_smooth ?? this.series.loss, t.accent, { area: true });
      spark($("spark-rate"), this.series.samples_per_s, t.fetch, { zero: true, area: true });
    }
    if (this.kpi) this.scale(this.kpi.staleness);
    this.cells();
  }

  // Three pointers on a scale from half to eight times the fair share.
  scale({ p50, p95, max, fair }) {
    const { g, width, height } = context($("scale"));
    const t = theme();
    const y = height - 17;
    for (let x = 0; x < width; x++) {
      g.fillStyle = rampColor(2 ** (-1 + (x / width) * 4));
      g.fillRect(x, y, 1, 5);
    }
    g.fillStyle = t.dim;
    g.font = "10px " + t.font;
    g.textBaseline = "top";
    ["½×", "1×", "2×", "4×", "8×"].forEach((text, i) => {
      g.textAlign = i === 0 ? "left" : i === 4 ? "right" : "center";
      g.fillText(text, (i / 4) * width, y + 7);
    });
    if (fair === null || p50 === null) return;
    const place = (v) => ((Math.log2(Math.max(v / Math.max(fair, 1), 0.5)) + 1) / 4) * width;
    g.fillStyle = t.text;
    for (const v of [p50, p95, max]) {
      const x = Math.min(Math.max(place(v), 4), width - 4);
      g.beginPath();
      g.moveTo(x - 4, y - 8);
      g.lineTo(x + 4, y - 8);
      g.lineTo(x, y - 2);
      g.fill();
      g.fillRect(x - 0.5, y - 4, 1, 9);
    }
    $("scale").setAttribute("aria-label", `Median ${whole(p50)}, 95th percentile ${whole(p95)}, maximum ${whole(max)} updates; the fair share is ${whole(fair)}`);
  }

  // A cell a worker, up to 128; above, a bar of shares. Bad ones stand above the line of the others.
  cells() {
    const { g, width, height } = context($("cells"));
    const t = theme();
    const by = this.kpi ? this.kpi.workers.by_status : {};
    const text = Object.entries(by).filter(([, n]) => n).map(([s, n]) => `${n} ${s}`).join(", ");
    $("cells").setAttribute("aria-label", text || "No workers yet");
    const names = this.statuses.length ? this.statuses : Object.entries(by).flatMap(([s, n]) => Array(n).fill(s));
    if (names.length > 128) {
      let x = 0;
      const total = names.length;
      for (const [status, n] of Object.entries(by)) {
        if (!n) continue;
        g.fillStyle = t[STATUS_COLOR[status]];
        const wide = Math.max(2, (n / total) * width);
        g.fillRect(x, height - 12, wide - 1, 10);
        x += wide;
      }
      return;
    }
    const rows = names.length > 32 ? 2 : 1;
    const per = Math.max(1, Math.ceil(names.length / rows));
    const each = Math.min(12, width / per);
    names.forEach((status, i) => {
      const [x, row] = [(i % per) * each, Math.floor(i / per)];
      g.fillStyle = t[STATUS_COLOR[status]] ?? t.other;
      g.globalAlpha = status === "ok" || status === "left" ? 0.45 : 1;
      const tall = rows === 1 ? 12 : 7;
      const y = height - rows * (tall + 3) + row * (tall + 3) + (status === "ok" ? 1 : -1);
      g.beginPath();
      g.roundRect(x, y, Math.max(2, each - 2), tall, 1.5);
      g.fill();
      g.globalAlpha = 1;
    });
  }
}
