// The slowest workers, and the fleet's median to hold them against.

import { $, make } from "./dom.js";
import { ratio, seconds, whole } from "./format.js";
import { context } from "./plot.js";
import { rampColor, theme } from "./theme.js";

export const MARKS = { starting: "○", ok: "●", watch: "■", slow: "◆", stalled: "◇", down: "✕", recovering: "↻", draining: "◌", left: "−" };
const MARK_COLORS = { ok: "--ok", watch: "--warn", slow: "--hot", stalled: "--hot", down: "--bad", recovering: "--accent" };
export const PHASES = ["compute", "fetch", "push", "data", "other"];
const ROWS = 6;
const AGAIN_MS = 5000;

export function phaseLegend(box) {
  box.replaceChildren(...PHASES.slice(0, 4).map((phase) => make("span", {}, make("i", { class: phase }), phase === "data" ? "data wait" : phase)));
}

export function phaseBar(phases, longest) {
  const box = make("div", { class: "phases", role: "img" });
  const total = PHASES.reduce((sum, phase) => sum + (phases[phase] ?? 0), 0);
  for (const phase of PHASES) {
    const part = make("i", { class: phase });
    part.style.width = `${((phases[phase] ?? 0) / (longest || total || 1)) * 100}%`;
    box.append(part);
  }
  box.setAttribute("aria-label", PHASES.filter((p) => phases[p]).map((p) => `${p} ${seconds(phases[p])}`).join(", ") || "not known");
  return box;
}

export class Ranking {
  constructor(openWorker) {
    this.openWorker = openWorker;
    this.order = [];
    this.rankedAt = -Infinity;
    this.body = $("ranking");
    phaseLegend($("phase-legend"));
  }

  show({ items, median }) {
    const now = performance.now();
    const held = this.body.contains(document.activeElement) || this.body.matches(":hover");
    const byName = new Map(items.map((item) => [item.id, item]));
    // A row that somebody points at does not move.
    if (!this.order.length || (now - this.rankedAt > AGAIN_MS && !held)) {
      this.order = items.slice(0, ROWS).map((item) => item.id);
      this.rankedAt = now;
    }
    const rows = this.order.map((name) => byName.get(name)).filter(Boolean);
    for (const item of items) if (rows.length < ROWS && !rows.includes(item)) rows.push(item);
    const longest = 0;
    const focused = document.activeElement?.dataset?.worker;
    this.body.replaceChildren(...rows.map((item) => this.row(item, longest)), this.medianRow(median));
    if (focused) this.body.querySelector(`[data-worker="${CSS.escape(focused)}"]`)?.focus();
    this.items = rows;
    this.median = median;
    this.draw();
  }

  row(item) {
    const mark = make("span", { "aria-hidden": "true" }, MARKS[item.status]);
    mark.style.color = `var(${MARK_COLORS[item.status] ?? "--dim"})`;
    const button = make("button", { "data-worker": item.id, title: `${item.id} on ${item.node || "?"}: ${item.status}`, on: { click: () => this.openWorker(item.id) } }, mark, make("span", {}, item.id), make("span", { class: "dim small" }, item.node));
    const behind = make("td", { class: "n" }, make("span", { "data-key": `worker.${item.id}.lag` }, whole(item.lag)), " ", make("span", { class: "dim" }, ratio(item.ratio)));
    const line = make("canvas", { "aria-hidden": "true" });
    return make("tr", { "data-status": item.status }, make("td", {}, button), make("td", {}, line), behind, make("td", { class: "n" }, seconds(item.step_s)), make("td", {}, phaseBar(item.phases_s)));
  }

  medianRow(median) {
    return make("tr", { class: "median" }, make("td", {}, "○ Fleet median"), make("td", {}), make("td", { class: "n" }, whole(median.lag), " ", ratio(median.ratio)), make("td", { class: "n" }, seconds(median.step_s)), make("td", {}, phaseBar(median.phases_s ?? {})));
  }

  draw() {
    this.body.querySelectorAll("canvas").forEach((canvas, i) => sparkOf(canvas, this.items[i].spark));
  }
}

// log2 of the multiple of fair share, each piece in its colour.
export function sparkOf(canvas, values) {
  const { g, width, height } = context(canvas);
  const y = (v) => height - 3 - ((Math.log2(Math.min(Math.max(v, 0.5), 8)) + 1) / 4) * (height - 6);
  g.strokeStyle = theme().line;
  g.beginPath();
  g.moveTo(0, y(1));
  g.lineTo(width, y(1));
  g.stroke();
  g.lineWidth = 1.5;
  for (let i = 1; i < values.length; i++) {
    if (values[i] === null || values[i - 1] === null) continue;
    g.strokeStyle = rampColor(Math.max(values[i], values[i - 1]), "thin");
    g.beginPath();
    g.moveTo(((i - 1) / (values.length - 1)) * width, y(values[i - 1]));
    g.lineTo((i / (values.length - 1)) * width, y(values[i]));
    g.stroke();
  }
}

export function asTable(box, { items, total }) {
  const head = ["Worker", "Node", "Status", "Behind", "×", "Step", "Share of updates"];
  const rows = items.map((item) => make("tr", {}, ...[item.id, item.node, item.status, whole(item.lag), ratio(item.ratio), seconds(item.step_s), item.share_of_updates === null ? "–" : (item.share_of_updates * 100).toFixed(1) + " %"].map((text) => make("td", {}, text))));
  const caption = make("caption", { class: "small dim" }, `${items.length} of ${total} workers, the stalest first`);
  box.replaceChildren(make("table", {}, caption, make("thead", {}, make("tr", {}, ...head.map((text) => make("th", { scope: "col" }, text)))), make("tbody", {}, ...rows)));
}

