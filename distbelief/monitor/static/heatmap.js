// Heatmap: every worker over time, with what happened on the same axis.

import { get } from "./answers.js";
import { byId, el, EVENT_MARKS, makeMark, MARKS, radios, say, shapePath } from "./dom.js";
import { clock, count, duration, seconds, times, whole } from "./format.js";
import { DOWN, Image, NONE } from "./image.js";
import { Pane } from "./painter.js";
import { chip, line, markTime, placeTip, TimePlot } from "./plot.js";
import { on, run } from "./run.js";
import { choose, onState, pointer, state } from "./state.js";
import { areaOf, onTheme, RAMP_HI, RAMP_LO, theme } from "./theme.js";

const COLS = 450, ROWS = 340;
const LANE = 26;
const RESORT_S = 10;
const DWELL_MS = 200;
const CLUSTER_PX = 13;
const TABLE_ROWS = 50;
const PHASES = ["compute", "fetch", "push", "data", "other"];
const QUIET = new Set(["well", "state"]);
const POWERS = [-1, 0, 1, 2, 3];

class Heatmap extends TimePlot {
  constructor() {
    super(byId("heat-canvas"), byId("heat-over"), { left: 60, right: 10, top: LANE, bottom: 22 });
    this.image = null;
    this.hovered = null; // {row, column}
    this.cell = null; // by keyboard
    this._busy = false;
    this._again = false;
    this._sortedAt = 0;
    this._details = new Map();
    this._dwell = 0;
    this._glyphs = [];
    this._error = "";
    onTheme(() => this.image?.repaint());
    this.canvas.addEventListener("keydown", (event) => this._key(event));
    this.canvas.addEventListener("blur", () => { this.cell = null; this.leave(); this.over.mark(); });
  }

  // Data

  get metric() {
    return state.unit === "seconds" ? "seconds" : "ratio";
  }

  _query(from, to, cols) {
    const group = state.order === "worst" ? "worst" : "node";
    const node = state.node ? `&node=${encodeURIComponent(state.node)}` : "";
    return `from=${from}&to=${to}&cols=${cols}&rows=${ROWS}&group=${group}&metric=${this.metric}${node}`;
  }

  /** All of it anew, or only the columns that have been completed since. */
  async refresh(all) {
    if (this._busy) {
      this._again ||= all;
      return;
    }
    this._busy = true;
    try {
      const { domain } = run, image = this.image;
      const end = Math.min(domain.to, run.now);
      const key = [domain.isLive ? domain.span : `${domain.from} ${domain.to}`, state.order, this.metric, state.node, run.tick?.order, domain.isLive && domain.from > (run.meta?.started ?? 0) + 1].join("|");
      const isSorted = state.order !== "worst" || run.now - this._sortedAt < RESORT_S;
      if (!all && image && key === this._key_ && isSorted) {
        const done = Math.floor(end / image.bin_s) * image.bin_s, cols = Math.round((done - image.end) / image.bin_s);
        if (cols <= 0) return;
        if (cols < 60 && state.order !== "worst") {
          const newer = await Image.load(this._query(image.end, done, cols), this.metric);
          if (image === this.image && image.append(newer)) {
            this._error = "";
            this._changed();
            return;
          }
        }
      }
      const fresh = await Image.load(this._query(Math.floor(domain.from), Math.ceil(end + 1), COLS), this.metric);
      // A column that is still open would be drawn as if it were whole.
      const open = fresh.end > end + 1 ? 1 : 0;
      if (open && fresh.cols > 1) trim(fresh);
      const room = Math.ceil(domain.span / fresh.bin_s) + 1;
      fresh.widen(Math.min(1200, Math.max(room, fresh.cols)));
      fresh.repaint();
      this.image = fresh;
      this._key_ = key;
      this._sortedAt = run.now;
      this._error = "";
      this._changed();
    } catch (error) {
      this._error = error.message;
      this._changed();
    } finally {
      this._busy = false;
      if (this._again) {
        this._again = false;
        this.refresh(true);
      }
    }
  }

  _changed() {
    const image = this.image;
    this._downs = image?.runs(DOWN) ?? [];
    this._blanks = image?.runs(NONE) ?? [];
    const canvas = this.canvas;
    canvas.dataset.rows = image?.rows ?? 0;
    canvas.dataset.cols = image?.cols ?? 0;
    this._describe();
    this._hint();
    this.mark();
    this.over.mark();
    if (!byId("heat-table").hidden) this._table();
  }

  _hint() {
    const fair = run.kpi?.staleness?.fair;
    const rows = this.image?.isByNode ? "One row per node: its worst." : "One row per worker.";
    const share = fair === null || fair === undefined ? "" : ` 1× = fair share = ${whole(fair)} update${Math.round(fair) === 1 ? "" : "s"}`;
    say(byId("heat-hint"), `${rows}${share}`);
    const back = byId("node-back");
    back.hidden = !state.node;
    if (state.node) say(back, `‹ All nodes`);
  }

  _describe() {
    const kpi = run.kpi, worst = run.workers?.items?.[0];
    if (!kpi || !worst) return;
    const by = kpi.workers.by_status ?? {};
    const off = (by.slow ?? 0) + (by.stalled ?? 0) + (by.down ?? 0) + (by.watch ?? 0);
    const known = kpi.workers.alive ?? 0;
    this.label(`${Math.max(0, known - off)} of ${kpi.workers.target ?? known} workers near fair share; ${worst.id} is the worst${worst.ratio === null ? "" : ` at ${times(worst.ratio)}`}. Arrow keys move a cell, Enter opens its worker.`);
  }

  // Geometry

  get plotHeight() {
    return Math.max(1, (this.height ?? this.canvas.clientHeight) - this.margin.top - this.margin.bottom);
  }

  _layout() {
    const image = this.image, h = this.plotHeight;
    const isGrouped = state.order === "node" && !image.isByNode && !state.node;
    const groups = isGrouped ? image.groups : [{ node: "", from: 0, to: image.rows }];
    const gap = groups.length > 1 && groups.length * 3 < h / 3 ? 3 : 0;
    const row = Math.min(34, (h - gap * (groups.length - 1)) / Math.max(1, image.rows));
    let y = this.margin.top;
    const placed = groups.map((group) => {
      const top = y;
      y += (group.to - group.from) * row + gap;
      return { ...group, top };
    });
    this._placed = { groups: placed, row, bottom: y - gap };
    return this._placed;
  }

  _rowTop(r) {
    const { groups, row } = this._placed;
    const group = groups.find((g) => r < g.to) ?? groups[groups.length - 1];
    return group.top + (r - group.from) * row;
  }

  _rowAt(py) {
    const { groups, row } = this._placed ?? { groups: [] };
    for (const g of groups) if (py >= g.top && py < g.top + (g.to - g.from) * row) return g.from + Math.floor((py - g.top) / row);
    return -1;
  }

  // Drawing

  draw(ctx, w, h) {
    const image = this.image;
    byId("heat-empty").hidden = Boolean(image && image.rows);
    if (!image || !image.rows) {
      this._empty();
      return;
    }
    const { colors } = theme;
    const names = image.isByNode || state.node || state.order === "worst" ? image.ids : [...image.groups.map((g) => g.node), ...(image.rows <= 24 ? image.ids : [])];
    ctx.font = `11.5px Inter, system-ui, sans-serif`;
    this.margin.left = Math.min(w < 500 ? 84 : 120, Math.max(48, ...names.slice(0, 700).map((n) => ctx.measureText(n).width + 14)));
    const { groups, row } = this._layout(), { from } = run.domain, { left, right, top, bottom } = this.margin;
    const width = this.plotWidth, snap = (v) => Math.round(v * this.scale) / this.scale;
    // What is known to be unknown: hatched, up to now.
    const known = Math.min(this.x(Math.min(run.now, image.end)), w - right);
    ctx.save();
    ctx.beginPath();
    ctx.rect(left, top, width, h - top - bottom);
    ctx.clip();
    const hatch = this._hatch(ctx, colors.line);
    ctx.imageSmoothingEnabled = false;
    const x0 = this.x(image.first * image.bin_s), x1 = this.x(image.end);
    const isApart = row >= 3.5;
    for (const g of groups) {
      const bottomOf = g.top + (g.to - g.from) * row;
      if (isApart) {
        for (let r = g.from; r < g.to; r += 1) {
          const y = snap(g.top + (r - g.from) * row), end = snap(g.top + (r - g.from + 1) * row) - 0.75;
          ctx.drawImage(image.canvas, 0, r, image.cols, 1, x0, y, x1 - x0, end - y);
        }
      } else ctx.drawImage(image.canvas, 0, g.from, image.cols, g.to - g.from, x0, snap(g.top), x1 - x0, snap(bottomOf) - snap(g.top));
    }
    ctx.fillStyle = hatch;
    for (const d of this._blanks) {
      const a = Math.max(left, this.x((image.first + d.from) * image.bin_s)), b = Math.min(known, this.x((image.first + d.to) * image.bin_s));
      if (b > a) ctx.fillRect(a, this._rowTop(d.row), b - a, Math.max(1, row - (isApart ? 0.75 : 0)));
    }
    const downHatch = this._hatch(ctx, colors.hatch);
    for (const d of this._downs) {
      const y = this._rowTop(d.row), a = Math.max(left, this.x((image.first + d.from) * image.bin_s)), b = Math.min(known, this.x((image.first + d.to) * image.bin_s));
      if (b < left) continue;
      const tall = Math.max(3, row - 0.75);
      ctx.fillStyle = colors.down;
      ctx.fillRect(a, y, b - a, tall);
      ctx.fillStyle = downHatch;
      ctx.fillRect(a, y, b - a, tall);
      ctx.strokeStyle = colors.bad;
      ctx.lineWidth = 1.5;
      ctx.strokeRect(a + 0.75, y + 0.25, Math.max(1, b - a - 1.5), tall - 0.5);
    }
    ctx.restore();
    void from;
    this.timeAxis(ctx, w, h, { grid: false });
    this._rowLabels(ctx, groups, row, left);
    this._lane(ctx, w, h);
    this._labels(ctx, w);
  }

  _hatch(ctx, colour) {
    const key = `${colour} ${this.scale}`;
    this._hatches ??= new Map();
    if (!this._hatches.has(key)) {
      const tile = document.createElement("canvas"), size = Math.round(6 * this.scale);
      Object.assign(tile, { width: size, height: size });
      const t = tile.getContext("2d");
      t.strokeStyle = colour;
      t.lineWidth = this.scale;
      t.beginPath();
      for (const k of [-1, 0, 1]) t.moveTo(k * size, size), t.lineTo((k + 1) * size, 0);
      t.stroke();
      const pattern = ctx.createPattern(tile, "repeat");
      pattern.setTransform(new DOMMatrix().scale(1 / this.scale));
      this._hatches.set(key, pattern);
    }
    return this._hatches.get(key);
  }

  _rowLabels(ctx, groups, row, left) {
    const { ids } = this.image;
    ctx.font = `11.5px Inter, system-ui, sans-serif`;
    ctx.textAlign = "right";
    ctx.textBaseline = "middle";
    ctx.fillStyle = theme.colors.dim;
    const fit = (text) => {
      if (ctx.measureText(text).width <= left - 10) return text;
      let n = text.length;
      while (n > 3 && ctx.measureText(`${text.slice(0, n)}…`).width > left - 10) n -= 1;
      return `${text.slice(0, n)}…`;
    };
    let last = -Infinity;
    if (groups.length > 1 && row < 12) {
      for (const g of groups) {
        const y = g.top + ((g.to - g.from) * row) / 2;
        if (y - last < 13) continue;
        ctx.fillText(fit(g.node), left - 8, y);
        last = y;
      }
      return;
    }
    for (let r = 0; r < ids.length; r += 1) {
      const y = this._rowTop(r) + row / 2;
      if (y - last < 14) continue;
      ctx.fillText(fit(ids[r]), left - 8, y);
      last = y;
    }
  }

  _lane(ctx, w, h) {
    const { left, right } = this.margin, { from, to } = run.domain, y = LANE / 2 - 1;
    line(ctx, left, y + 0.5, w - right, y + 0.5, theme.colors.line);
    const shown = run.events.filter((e) => !QUIET.has(e.kind) && e.at >= from && e.at <= to).sort((a, b) => a.at - b.at);
    const clusters = [];
    for (const event of shown) {
      const x = this.x(event.at), last = clusters[clusters.length - 1];
      if (last && x - last.x < CLUSTER_PX) last.events.push(event);
      else clusters.push({ x, events: [event] });
    }
    this._glyphs = clusters;
    const bottom = this._placed.bottom;
    let lines = 0;
    for (const { x, events } of clusters) {
      const worst = pickWorst(events), [shape, colour, filled] = EVENT_MARKS[worst.kind] ?? EVENT_MARKS.state;
      if (x < left - 1) continue;
      const row = this.image.at.get(worst.who);
      if (events.length <= 4 && ["crash", "recover", "slow", "join", "drain", "error"].includes(worst.kind) && lines < 16) {
        lines += 1;
        ctx.setLineDash([2, 3]);
        ctx.globalAlpha = 0.75;
        line(ctx, Math.round(x) + 0.5, y + 8, Math.round(x) + 0.5, row === undefined ? bottom : this._rowTop(row), theme.colors[colour]);
        ctx.globalAlpha = 1;
        ctx.setLineDash([]);
      }
      ctx.save();
      ctx.fillStyle = theme.colors.card;
      ctx.fillRect(x - 7, y - 7, 14, 14);
      ctx.translate(x - 5.5, y - 5.5);
      ctx.scale(11 / 12, 11 / 12);
      ctx.strokeStyle = ctx.fillStyle = theme.colors[colour];
      ctx.lineWidth = 1.8;
      ctx.lineCap = "round";
      if (filled) ctx.fill(shapePath(shape));
      else ctx.stroke(shapePath(shape));
      ctx.restore();
      if (events.length > 1) {
        ctx.fillStyle = theme.colors.dim;
        ctx.textAlign = "left";
        ctx.textBaseline = "middle";
        ctx.font = "10.5px Inter, system-ui, sans-serif";
        ctx.fillText(String(events.length), x + 8, y + 0.5);
      }
    }
    void h;
  }

  /** Up to three words of what was wrong, where it began. */
  _labels(ctx, w) {
    const wanted = [...this._currentLabels(), ...this._pastLabels()], placed = [], told = new Set();
    const { left, right } = this.margin;
    for (const label of wanted) {
      if (placed.length >= 3) break;
      const row = this._rowOf(label.who);
      if (row < 0 || told.has(`${label.who}`)) continue;
      const y = this._rowTop(row) + this._placed.row / 2;
      const begin = this.x(this._beginOf(row, label)), end = this.x(label.to ?? Math.min(run.now, run.domain.to));
      ctx.font = "600 11px Inter, system-ui, sans-serif";
      const width = ctx.measureText(label.text).width + 10;
      let x = begin - width - 8;
      if (x < left + 4) x = end + width + 10 < w - right ? end + 8 : Math.min(Math.max(left + 6, begin + 6), w - right - width);
      const box = [x, y - 10, x + width, y + 10];
      if (end < left || begin > w - right || placed.some((b) => box[0] < b[2] && b[0] < box[2] && box[1] < b[3] && b[1] < box[3])) continue;
      chip(ctx, label.text, x, y, { bold: true });
      placed.push(box);
      told.add(label.who);
    }
  }

  _currentLabels() {
    return run.findings.filter((f) => f.id !== "quiet" && ["worker", "node"].includes(f.scope)).map((f) => ({ who: f.who, from: f.since, text: label(f) }));
  }

  _pastLabels() {
    const found = [], events = run.events;
    for (let i = events.length - 1; i >= 0; i -= 1) {
      const e = events[i];
      if (e.kind === "crash") {
        const back = events.slice(i).find((o) => o.kind === "recover" && o.who === e.who);
        found.push({ who: e.who, from: e.at, to: back?.at, text: back ? `${e.who} crashed, back in ${duration(back.at - e.at)}` : `${e.who} crashed`, isDown: true });
      } else if (e.kind === "slow" && e.detail?.id?.startsWith("slow:")) {
        const well = events.slice(i).find((o) => o.kind === "well" && o.detail?.id === e.detail.id);
        const phase = /\b(compute|fetch|push|data) takes/.exec(e.text)?.[1];
        if (well) found.push({ who: e.who, from: e.at - 30, to: well.at, text: `${e.who} slow${phase ? ` ${phase}` : ""}` });
      }
    }
    return found;
  }

  _rowOf(who) {
    const { at, nodes } = this.image;
    if (at.has(who)) return at.get(who);
    const members = nodes.flatMap((n, i) => (n === who ? [i] : []));
    return members.length ? members[members.length >> 1] : -1;
  }

  /** When it really began: the rule needs half a minute to be sure. */
  _beginOf(row, { from, isDown }) {
    if (isDown) return from;
    const image = this.image;
    let c = Math.min(image.cols - 1, image.column(from));
    const start = c;
    while (c > 0 && start - c < 60) {
      const code = image.codeAt(row, c - 1);
      if (code < 2 || image.value(code) < (this.metric === "ratio" ? 1.5 : 2)) break;
      c -= 1;
    }
    return Math.min(from, (image.first + c) * image.bin_s);
  }

  // Pointer and keys

  hover(px, py, event) {
    const row = this._rowAt(py);
    const glyph = py < LANE ? this._glyphs.find((g) => Math.abs(g.x - px) < 9) : null;
    this.canvas.style.cursor = glyph || row >= 0 ? "crosshair" : "default";
    if (glyph) {
      this.hovered = null;
      this._eventTip(glyph.events, event.clientX, event.clientY);
      return;
    }
    if (!this.image || row < 0 || px < this.margin.left) {
      this.leave();
      return;
    }
    this.hovered = { row, t: this.timeAt(px) };
    this._tip(this.hovered, event.clientX, event.clientY);
  }

  leave() {
    this.hovered = null;
    clearTimeout(this._dwell);
    byId("tip").hidden = true;
  }

  click(px, py) {
    const row = this._rowAt(py);
    if (this.image && row >= 0 && px >= this.margin.left - 60) this._open(row);
  }

  _open(row) {
    const { ids, nodes, isByNode } = this.image;
    if (isByNode) choose({ node: nodes[row] });
    else if (!ids[row].includes("..")) choose({ worker: ids[row] });
    else choose({ node: nodes[row] });
  }

  _key(event) {
    if (!this.image || event.ctrlKey || event.metaKey || event.altKey) return;
    const { image } = this;
    const last = Math.min(image.cols - 1, image.column(Math.min(run.now, run.domain.to - 0.001)));
    const first = Math.max(0, image.column(run.domain.from));
    const cell = this.cell ?? { row: 0, column: last };
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], Home: [0, -image.cols], End: [0, image.cols], PageUp: [-8, 0], PageDown: [8, 0] };
    if (event.key === "Enter") {
      event.preventDefault();
      this._open(cell.row);
      return;
    }
    const move = moves[event.key];
    if (!move) return;
    event.preventDefault();
    event.stopPropagation();
    this.cell = this.cell
      ? { row: clamp(cell.row + move[0], 0, image.rows - 1), column: clamp(cell.column + move[1], first, last) }
      : cell;
    const t = (image.first + this.cell.column + 0.5) * image.bin_s;
    pointer.time = t;
    this.hovered = { row: this.cell.row, t };
    const box = this.canvas.getBoundingClientRect();
    this._tip(this.hovered, box.left + this.x(t), box.top + this._rowTop(this.cell.row));
    this.label(`${image.ids[this.cell.row]} at ${clock(t)}: ${this._words(this.hovered)}`);
    markTime();
  }

  readout(ctx, w, h, time, x) {
    const at = this.hovered;
    if (!at || !this.image || !this._placed) return;
    const y = Math.round(this._rowTop(at.row) + this._placed.row / 2) + 0.5;
    ctx.setLineDash([3, 3]);
    line(ctx, this.margin.left, y, w - this.margin.right, y, theme.colors.dim);
    ctx.setLineDash([]);
    ctx.strokeStyle = theme.colors.text;
    const tall = Math.max(4, this._placed.row);
    ctx.strokeRect(Math.round(x) - 3.5, y - tall / 2 - 1, 7, tall + 1);
    void h;
    void time;
  }

  _fairAt(t) {
    const series = run.series;
    if (series?.fair) {
      for (let i = series.at.length - 1; i >= 0; i -= 1) if (series.at[i] <= t && series.fair[i] !== null) return Math.max(1, series.fair[i]);
    }
    return Math.max(1, run.kpi?.staleness?.fair ?? 1);
  }

  _words({ row, t }) {
    const value = this.image.value(this.image.codeAt(row, this.image.column(t)));
    if (value === null) return "no data";
    if (Number.isNaN(value)) return "down";
    if (this.metric === "seconds") return `${seconds(value)} since it took parameters`;
    return `${times(value)} fair share, about ${whole(value * this._fairAt(t))} updates behind`;
  }

  _tip(at, cx, cy) {
    const { image } = this, id = image.ids[at.row], node = image.nodes[at.row];
    const value = image.value(image.codeAt(at.row, image.column(at.t)));
    const rows = [];
    if (value === null) rows.push(["Staleness", at.t > image.end ? "not there yet" : "no data"]);
    else if (Number.isNaN(value)) rows.push(["Status", "down"]);
    else if (this.metric === "seconds") rows.push(["Since parameters", seconds(value)]);
    else {
      rows.push(["Staleness", `${whole(value * this._fairAt(at.t))} updates`]);
      rows.push(["× fair share", times(value)]);
    }
    const head = el("div", { class: "row" }, el("b", {}, id), el("span", {}, `${id === node ? "" : `${node} · `}${clock(at.t)}`));
    const tip = byId("tip"), isWorker = !image.isByNode && !id.includes("..");
    const detail = isWorker ? this._details.get(id) : null;
    const extra = [];
    if (detail) {
      const i = nearest(detail.series.t, at.t);
      if (i >= 0) {
        const step = detail.series.step_s[i];
        if (step) {
          rows.push(["Step", seconds(step)]);
          extra.push(phaseBar(PHASES.map((p) => [p, detail.series[p][i]]), step));
        }
      }
      rows.push(["Now", detail.status]);
    }
    tip.replaceChildren(head, ...rows.map(([name, text]) => el("div", { class: "row" }, el("span", {}, name), el("b", {}, text))), ...extra);
    placeTip(tip, cx, cy);
    clearTimeout(this._dwell);
    if (isWorker && (!detail || performance.now() - detail.askedAt > 15_000)) {
      this._dwell = setTimeout(() => this._ask(id, at, cx, cy), DWELL_MS);
    }
  }

  async _ask(id, at, cx, cy) {
    try {
      const window = Math.min(86_400, Math.max(60, Math.ceil(run.now - run.domain.from)));
      const detail = await get(`workers/${encodeURIComponent(id)}?window=${window}`);
      if (this._details.size > 40) this._details.clear();
      this._details.set(id, { ...detail, askedAt: performance.now() });
      if (this.hovered === at) this._tip(at, cx, cy);
    } catch {
      // The card shows what it has.
    }
  }

  _eventTip(events, cx, cy) {
    const tip = byId("tip");
    const lines = events.slice(-6).map((e) => el("div", { class: "row" }, makeMark(EVENT_MARKS[e.kind] ?? EVENT_MARKS.state), el("span", {}, `${clock(e.at)} ${e.text}`)));
    if (events.length > 6) lines.unshift(el("div", { class: "row" }, el("span", {}, `${events.length - 6} more before`)));
    tip.replaceChildren(...lines);
    placeTip(tip, cx, cy);
  }

  // States without a picture, and the table

  _empty() {
    const box = byId("heat-empty"), { snapshot } = run;
    const waiting = snapshot?.waiting;
    const lines = [];
    const hasPushed = waiting?.workers[0] > 0 && !this.image;
    box.classList.toggle("loading", hasPushed && !this._error);
    if (hasPushed) lines.push(el("span", {}, this._error ? `The heatmap could not be loaded: ${this._error}` : "Loading"));
    else if (this._error && !run.meta) lines.push(el("b", {}, "The monitor does not answer"), el("span", {}, this._error));
    else if (run.state === "waiting" || !waiting) {
      lines.push(el("b", {}, "No run yet"), el("span", {}, "Nobody has told this monitor of a run. Start one:"), el("code", {}, "distbelief launch distbelief.toml"));
    } else if (run.isOver) lines.push(el("b", {}, "Nothing was recorded"), el("span", {}, "The run ended before any worker had pushed."), el("code", {}, `distbelief logs ${run.meta?.run ?? ""}`));
    else {
      const [w, wt] = waiting.workers, [s, st] = waiting.shards;
      lines.push(el("b", {}, "Waiting for the first push"), el("span", {}, `${w} of ${wt ?? "?"} workers have pushed, ${s} of ${st ?? "?"} shards are ready${waiting.elapsed_s === null ? "" : `; ${duration(waiting.elapsed_s)} since the start`}.`),
        el("code", {}, `distbelief logs ${run.meta?.run ?? ""}`));
    }
    const text = lines.map((l) => l.textContent).join(" ");
    if (box.dataset.text !== text) {
      box.dataset.text = text;
      box.replaceChildren(...lines);
    }
  }

  toggleTable() {
    const table = byId("heat-table"), isOn = table.hidden;
    table.hidden = !isOn;
    byId("heat").hidden = isOn;
    byId("as-table").setAttribute("aria-pressed", String(isOn));
    if (isOn) this._table();
    else table.replaceChildren();
  }

  async _table() {
    const root = byId("heat-table");
    if (root.matches(":hover, :focus-within") && root.firstChild) return;
    try {
      const { items } = await get(`workers?limit=${TABLE_ROWS}&sort=${state.order === "worst" ? "-ratio" : "id"}`);
      if (root.hidden) return;
      const head = el("tr", {}, ...["Worker", "Node", "Status", "Behind", "× fair share", "Since parameters"].map((t, i) => el("th", { scope: "col", class: i > 2 ? "num" : null }, t)));
      const rows = items.map((w) => el("tr", {},
        el("td", {}, w.id), el("td", {}, w.node), el("td", {}, w.status), el("td", { class: "num" }, w.lag === null ? "–" : count(w.lag)),
        el("td", { class: "num" }, w.ratio === null ? "–" : times(w.ratio)), el("td", { class: "num" }, w.seconds === null ? "–" : seconds(w.seconds))));
      root.tabIndex = 0;
      root.setAttribute("role", "region");
      root.setAttribute("aria-label", "Staleness by worker, as a table");
      root.replaceChildren(el("table", { class: "list" }, el("thead", {}, head), el("tbody", {}, ...rows)));
    } catch (error) {
      root.replaceChildren(el("p", { class: "hint" }, error.message));
    }
  }
}

const clamp = (v, lo, hi) => Math.max(lo, Math.min(hi, v));
const label = (f) => `${f.who} ${f.phase && f.id.startsWith("slow") ? `slow ${f.phase}` : f.short.replace(f.who, "").trim()}`.replace(/(\d)x\b/g, "$1×");
const RANKS = ["error", "crash", "slow", "storage", "quarantine", "recover", "drain", "leave", "join", "scale", "config", "checkpoint"];
const pickWorst = (events) => events.reduce((a, b) => (rank(b) < rank(a) ? b : a));
const rank = (e) => (RANKS.indexOf(e.kind) + 99) % 99;

function trim(image) {
  const cols = image.cols - 1, cells = new Uint8Array(image.rows * cols);
  for (let r = 0; r < image.rows; r += 1) cells.set(image.codes.subarray(r * image.cols, r * image.cols + cols), r * cols);
  image.codes = cells;
  image.cols = cols;
}

function nearest(at, t) {
  if (!at.length || t < at[0] - 30) return -1;
  let lo = 0, hi = at.length - 1;
  while (lo < hi) {
    const mid = (lo + hi + 1) >> 1;
    if (at[mid] <= t) lo = mid;
    else hi = mid - 1;
  }
  return lo;
}

/** One bar of the phases of a step. */
export function phaseBar(parts, whole, into = null) {
  const bar = into ?? el("div", { class: "phases", "aria-hidden": "true" });
  while (bar.children.length < parts.length) bar.append(el("i"));
  parts.forEach(([name, value], i) => {
    const part = bar.children[i];
    if (part.className !== name) part.className = name;
    const width = `${((value ?? 0) / whole) * 100}%`;
    if (part.style.width !== width) part.style.width = width;
    part.hidden = !value || value / whole < 0.004;
  });
  return bar;
}

function drawLegend(ctx, w) {
  const steps = 60, isSeconds = state.unit === "seconds";
  const lo = RAMP_LO, hi = 3;
  ctx.save();
  ctx.beginPath();
  ctx.roundRect(4, 2, w - 8, 8, 2);
  ctx.clip();
  for (let i = 0; i < steps; i += 1) {
    ctx.fillStyle = areaOf(isSeconds ? RAMP_LO + (i / steps) * (RAMP_HI - RAMP_LO) : lo + (i / steps) * (hi - lo));
    ctx.fillRect(4 + (i / steps) * (w - 8), 2, (w - 8) / steps + 1, 8);
  }
  ctx.restore();
  ctx.strokeStyle = theme.colors.line;
  ctx.strokeRect(4.5, 2.5, w - 9, 7);
  ctx.fillStyle = theme.colors.dim;
  ctx.textBaseline = "top";
  const fair = Math.max(1, run.kpi?.staleness?.fair ?? 1);
  const texts = isSeconds ? [-1, 1, 3, 6].map((p) => [(p + 1) / 7, p < 0 ? "½ s" : `${2 ** p} s`])
    : POWERS.map((p) => [(p - lo) / (hi - lo), state.unit === "updates" ? whole(fair * 2 ** p) : p < 0 ? "½×" : `${2 ** p}×`]);
  texts.forEach(([f, text], i) => {
    ctx.textAlign = i === 0 ? "left" : i === texts.length - 1 ? "right" : "center";
    ctx.fillText(text, i === 0 ? 2 : i === texts.length - 1 ? w - 2 : 4 + f * (w - 8), 15);
  });
}

export function startHeatmap() {
  const map = new Heatmap();
  const legend = new Pane(byId("legend"), drawLegend);
  const checkUnit = radios(byId("units"), [["ratio", "× fair share"], ["updates", "updates"], ["seconds", "seconds"]], (unit) => choose({ unit }));
  const checkOrder = radios(byId("orders"), [["node", "By node"], ["worst", "Worst first"]], (order) => choose({ order }));
  checkUnit(state.unit);
  checkOrder(state.order);
  byId("as-table").addEventListener("click", () => map.toggleTable());
  byId("node-back").addEventListener("click", () => choose({ node: "" }));
  onState((changed) => {
    checkUnit(state.unit);
    checkOrder(state.order);
    if (changed.has("unit")) legend.mark();
    if (changed.has("unit") || changed.has("order") || changed.has("node")) {
      map.leave();
      map.refresh(map.metric !== map.image?.metric || changed.has("order") || changed.has("node"));
      map._hint();
    }
  });
  let legendFair = null;
  on("tick", () => {
    if (!document.hidden) map.refresh(false);
    const fair = run.kpi?.staleness?.fair;
    if (fair !== legendFair) {
      legendFair = fair;
      legend.mark();
      map._hint();
    }
  });
  on("events snapshot meta", () => map.mark());
  on("workers", () => map._describe());
  on("time", () => map.refresh(true));
  return map;
}
void MARKS;
