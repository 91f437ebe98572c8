// Ranking: the slowest workers beside the median of the fleet, and the newest events.

import { byId, el, EVENT_MARKS, makeMark, MARKS, say, setMark } from "./dom.js";
import { clock, count, moment, seconds, times, whole } from "./format.js";
import { phaseBar } from "./heatmap.js";
import { Pane } from "./painter.js";
import { on, run } from "./run.js";
import { choose } from "./state.js";
import { onTheme, theme, thinOf } from "./theme.js";

const ROW_PX = 28, LEAST = 3, MOST = 12;
const RERANK_S = 5;
const PHASES = ["compute", "fetch", "push", "data", "other"];
const rows = [];
let order = [], rankedAt = -Infinity, median = null;

function drawSpark(ctx, w, h, values) {
  const lo = -1.2, hi = 3.2, y = (v) => h - 2 - ((Math.max(lo, Math.min(hi, Math.log2(Math.max(v, 0.01)))) - lo) / (hi - lo)) * (h - 4);
  const x = (i) => (i / Math.max(1, values.length - 1)) * w;
  ctx.lineWidth = 1.4;
  ctx.lineCap = "round";
  for (let i = 1; i < values.length; i += 1) {
    if (values[i] === null || values[i - 1] === null) continue;
    ctx.strokeStyle = thinOf(Math.log2(Math.max(values[i], 0.01)));
    ctx.beginPath();
    ctx.moveTo(x(i - 1), y(values[i - 1]));
    ctx.lineTo(x(i), y(values[i]));
    ctx.stroke();
  }
}

class Row {
  constructor(isMedian) {
    this.worker = null;
    this.mark = makeMark(isMedian ? MARKS.median : MARKS.ok);
    this.name = el("span", { class: "name" }, isMedian ? "Fleet median" : "");
    this.node = el("small");
    const canvas = isMedian ? "" : el("canvas", { role: "img", "aria-label": "Staleness of the last 15 minutes" });
    const open = isMedian ? el("span", { class: "open" }, this.mark, this.name) : el("button", { type: "button", class: "open", onclick: () => this.open() }, this.mark, this.name, this.node);
    this.lag = el("span");
    this.ratio = el("span", { class: "times" });
    this.step = el("td", { class: "num" });
    this.bar = el("div", { class: "phases", role: "img", "aria-label": "Phases of a step" });
    this.root = el("tr", { class: isMedian ? "median" : null }, el("td", {}, open), el("td", { class: "c-spark" }, canvas), el("td", { class: "num" }, this.lag, this.ratio), this.step, el("td", { class: "c-phase" }, this.bar));
    if (!isMedian) {
      this.root.addEventListener("click", (event) => event.target.closest("button") || this.open());
      this.pane = new Pane(canvas, (ctx, w, h) => this.worker && drawSpark(ctx, w, h, this.worker.spark ?? []));
    }
  }

  open() {
    if (this.worker) choose({ worker: this.worker.id });
  }

  show(worker, longest) {
    this.worker = worker;
    const { root } = this;
    if (worker.id) {
      root.dataset.worker = worker.id;
      setMark(this.mark, MARKS[worker.status] ?? MARKS.starting, worker.status);
      say(this.name, worker.id);
      say(this.node, worker.node === worker.id ? "" : worker.node);
      const title = `${worker.id} on ${worker.node}: ${worker.status}`;
      if (root.title !== title) root.title = title;
      this.pane.mark();
      this.pane.label(`Staleness of ${worker.id} in the last 15 minutes: now ${worker.ratio === null ? "not known" : times(worker.ratio)}`);
    }
    say(this.lag, worker.lag === null ? "–" : whole(worker.lag));
    say(this.ratio, worker.ratio === null ? "" : times(worker.ratio));
    say(this.step, worker.step_s === null ? "–" : seconds(worker.step_s));
    const phases = worker.phases_s ?? {}, total = PHASES.reduce((sum, p) => sum + (phases[p] ?? 0), 0);
    this.bar.hidden = total === 0;
    if (total) phaseBar(PHASES.map((p) => [p, phases[p]]), Math.max(total, 0.000001), this.bar);
    // A step that is much shorter than the longest one has a shorter bar, but one that can be read.
    this.bar.style.width = `${Math.max(0.72, Math.min(1, 0.72 + (0.28 * total) / Math.max(longest, total))) * 100}%`;
    const words = PHASES.filter((p) => phases[p]).map((p) => `${p === "data" ? "data wait" : p} ${seconds(phases[p])}`).join(", ");
    if (this.bar.getAttribute("aria-label") !== words && words) {
      this.bar.setAttribute("aria-label", words);
      this.bar.title = words;
    }
  }
}

/** How many rows there is room for. */
function room() {
  const box = document.querySelector(".rank-table"), head = box.querySelector("thead").offsetHeight || 22;
  if (matchMedia("(max-width: 1079px)").matches) return 6;
  return Math.max(LEAST, Math.min(MOST, Math.floor((box.clientHeight - head) / ROW_PX) - 1));
}

function render() {
  const found = run.workers;
  if (!found) return;
  const byName = new Map(found.items.map((w) => [w.id, w])), body = byId("rank-body"), num = Math.min(room(), found.items.length);
  const held = rows.find((row) => row.root.matches(":hover, :focus-within"));
  if (run.now - rankedAt >= RERANK_S || order.length < num || order.slice(0, num).some((id) => !byName.has(id))) {
    let next = found.items.map((w) => w.id);
    if (held?.worker && byName.has(held.worker.id)) {
      const place = rows.indexOf(held);
      next = next.filter((id) => id !== held.worker.id);
      next.splice(place, 0, held.worker.id);
    }
    order = next;
    rankedAt = run.now;
  }
  while (rows.length < num) {
    const row = new Row(false);
    rows.push(row);
    body.insertBefore(row.root, median?.root ?? null);
  }
  while (rows.length > num) {
    const row = rows.pop();
    row.pane.remove();
    row.root.remove();
  }
  if (!median) {
    median = new Row(true);
    body.append(median.root);
  }
  const shown = order.slice(0, num).map((id) => byName.get(id)).filter(Boolean);
  const sum = (w) => PHASES.reduce((s, p) => s + (w.phases_s?.[p] ?? 0), 0);
  const longest = Math.max(0.000001, ...shown.map(sum));
  shown.forEach((worker, i) => rows[i].show(worker, longest));
  median.show(found.median, longest);
}

const recent = [];
function renderEvents() {
  const list = byId("recent"), events = run.events.filter((e) => e.kind !== "well").slice(-4).reverse();
  while (recent.length < events.length) {
    const item = { mark: makeMark(EVENT_MARKS.state), time: el("time"), text: el("span") };
    item.root = el("li", {}, item.time, item.mark, item.text);
    recent.push(item);
    list.append(item.root);
  }
  recent.forEach((item, i) => {
    const event = events[i];
    item.root.hidden = !event;
    if (!event) return;
    say(item.time, clock(event.at));
    item.time.title = moment(event.at, run.meta?.started);
    setMark(item.mark, EVENT_MARKS[event.kind] ?? EVENT_MARKS.state);
    say(item.text, event.text.replace(/(\d)x\b/g, "$1×"));
    item.text.title = event.text;
  });
  if (!events.length && !list.dataset.empty) {
    list.dataset.empty = "yes";
    list.append(el("li", { class: "hint" }, "Nothing has happened yet."));
  } else if (events.length && list.dataset.empty) {
    list.querySelector(".hint")?.remove();
    delete list.dataset.empty;
  }
  say(byId("all-events"), `All ${run.numEvents < 10_000 ? run.numEvents : count(run.numEvents)}`);
}

export function startRanking() {
  on("workers", render);
  on("events", renderEvents);
  byId("all-events").addEventListener("click", () => choose({ view: "events" }));
  new ResizeObserver(() => render()).observe(document.querySelector(".rank-table"));
  onTheme(() => void theme);
}
