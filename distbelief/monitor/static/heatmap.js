// Heatmap: one row a worker, one column a moment; the colour is how stale, as a multiple of the fair share.

import { getHeatmap } from "./api.js";
import { $, make } from "./dom.js";
import { clock, duration, number, utc } from "./format.js";
import { context } from "./plot.js";
import { setView, view } from "./state.js";
import { rampAt, rampColor, theme } from "./theme.js";

const GLYPHS = { join: "+", crash: "✕", recover: "↻", slow: "▲", checkpoint: "◆", config: "◇", drain: "◌", leave: "−", storage: "!", quarantine: "⊘", error: "✕", scale: "±" };
const LANE = 22;
const LEFT = 62;
const BOTTOM = 20;
const COLS = 450;
const ROWS = 340;
const GROUP_GAP = 3;

export function glyph(kind) {
  return GLYPHS[kind] ?? "·";
}

export class Heatmap {
  constructor(openWorker, zoomed) {
    this.canvas = $("heat");
    this.openWorker = openWorker;
    this.zoomed = zoomed;
    this.found = null;
    this.image = null;
    this.events = [];
    this.findings = [];
    this.meta = null;
    this.at = null;
    this.drag = null;
    this.listen();
  }

  path(from, to) {
    const query = { from: from.toFixed(1), to: to.toFixed(1), cols: COLS, rows: ROWS, group: view.o, metric: view.u };
    if (view.node) query.node = view.node;
    return "heatmap?" + new URLSearchParams(query);
  }

  async load(from, to) {
    const { info, codes } = await getHeatmap(this.path(from, to));
    if (!info.ids) Object.assign(info, namesOf(info, this.meta));
    this.found = { info, codes };
    this.paintImage();
    this.draw();
  }

  // The offscreen image, a pixel a cell: scrolling and resizing only draw it again.
  paintImage() {
    if (!this.found) return;
    const { info, codes } = this.found;
    const image = document.createElement("canvas");
    image.width = Math.max(1, info.cols);
    image.height = Math.max(1, info.rows);
    const g = image.getContext("2d");
    const pixels = g.createImageData(image.width, image.height);
    const down = parse(theme().down);
    const hatch = parse(theme().hatch);
    const table = [];
    for (let code = 2; code < 256; code++) table[code] = rampAt(this.scaled(valueOf(code, info)));
    for (let i = 0; i < codes.length; i++) {
      const code = codes[i];
      if (code === 0) continue;
      const x = i % info.cols;
      const y = (i / info.cols) | 0;
      const rgb = code === 1 ? ((x + y) % 4 < 2 ? hatch : down) : table[code];
      pixels.data.set(rgb, i * 4);
      pixels.data[i * 4 + 3] = 255;
    }
    g.putImageData(pixels, 0, 0);
    this.image = image;
  }

  // Any unit on the ramp of multiples.
  scaled(value) {
    if (view.u === "ratio") return value;
    if (view.u === "updates") return value / Math.max(1, this.fair ?? 1);
    return value / 4;
  }

  rowsOf() {
    const { info } = this.found;
    const height = this.height - LANE - BOTTOM;
    const groups = [];
    info.nodes.forEach((node, row) => {
      const last = groups[groups.length - 1];
      if (last && last.node === node && view.o !== "worst") last.rows += 1;
      else groups.push({ node, from: row, rows: 1 });
    });
    const gaps = view.o === "worst" || groups.length > 40 ? 0 : GROUP_GAP;
    const each = Math.max(0.5, (height - gaps * (groups.length - 1)) / Math.max(1, info.rows));
    let y = LANE;
    for (const group of groups) {
      group.y = y;
      y += group.rows * each + gaps;
    }
    return { groups, each, gaps };
  }

  draw() {
    Object.assign(this, context(this.canvas));
    const { g, width } = this;
    const t = theme();
    $("heat-empty").hidden = Boolean(this.found && this.found.info.rows);
    if (!this.found || !this.found.info.rows) return;
    const { info } = this.found;
    const { groups, each } = this.rowsOf();
    this.layout = { groups, each };
    g.imageSmoothingEnabled = false;
    const right = width - 4;
    for (const group of groups) {
      g.drawImage(this.image, 0, group.from, info.cols, group.rows, LEFT, group.y, right - LEFT, group.rows * each);
      if (each > 4.5) this.gapRows(group, each, right);
    }
    g.fillStyle = t.dim;
    g.textAlign = "right";
    g.textBaseline = "middle";
    if (view.o !== "worst") {
      let free = -Infinity;
      for (const group of groups) {
        const y = group.y + (group.rows * each) / 2;
        if (y - free < 12) continue;
        free = y;
        g.fillText(short(group.node), LEFT - 8, y);
      }
    } else if (each >= 11) info.ids.forEach((id, row) => g.fillText(short(id), LEFT - 8, LANE + (row + 0.5) * each));
    this.from = info.t0;
    this.to = info.t0 + info.cols * info.bin_s;
    this.drawTimes(right);
    this.drawEvents(right);
    this.drawLabels(right);
    this.drawCross(right);
    this.label();
  }

  gapRows(group, each, right) {
    const { g } = this;
    g.fillStyle = theme().card;
    for (let row = 1; row < group.rows; row++) g.fillRect(LEFT, Math.round(group.y + row * each) - 0.5, right - LEFT, 1);
  }

  x(at) {
    return LEFT + ((at - this.from) / (this.to - this.from)) * (this.width - 4 - LEFT);
  }

  drawTimes(right) {
    const { g, height } = this;
    const span = this.to - this.from;
    const step = [5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 14400, 43200].find((s) => span / s <= Math.max(2, (right - LEFT) / 160)) ?? 86400;
    g.fillStyle = theme().faint;
    g.textAlign = "center";
    g.textBaseline = "top";
    for (let at = Math.ceil(this.from / step) * step; at < this.to; at += step) {
      const x = this.x(at);
      if (x > LEFT + 18 && x < right - 18) g.fillText(clock(at, step < 60), x, height - BOTTOM + 6);
    }
  }

  drawEvents(right) {
    const { g } = this;
    const t = theme();
    const color = { crash: t.bad, error: t.bad, recover: t.accent, join: t.ok, slow: t.hot, storage: t.warn };
    g.strokeStyle = t.line;
    g.beginPath();
    g.moveTo(LEFT, LANE / 2 - 1);
    g.lineTo(right, LANE / 2 - 1);
    g.stroke();
    g.textAlign = "center";
    g.textBaseline = "middle";
    g.font = "bold 13px " + t.font;
    const shown = [];
    for (const event of this.events) {
      if (event.at < this.from || event.at > this.to || !(event.kind in GLYPHS)) continue;
      const x = this.x(event.at);
      const near = shown.find((one) => Math.abs(one.x - x) < 13);
      if (near) { near.count += 1; near.kind = worse(near.kind, event.kind); continue; }
      shown.push({ x, kind: event.kind, count: 1, event });
    }
    for (const { x, kind, count, event } of shown) {
      g.fillStyle = color[kind] ?? t.dim;
      if (kind === "checkpoint") { // there are many, and all is well
        g.fillStyle = t.other;
        g.font = "8px " + t.font;
        g.fillText(glyph(kind), x, LANE / 2 - 1);
        g.font = "bold 13px " + t.font;
        continue;
      }
      g.fillText(count > 1 && count < 100 ? `${glyph(kind)}` : glyph(kind), x, LANE / 2 - 1);
      if (count > 1) {
        g.font = "9px " + t.font;
        g.fillText(String(count), x + 9, LANE / 2 - 5);
        g.font = "bold 13px " + t.font;
      }
      const row = this.found.info.ids.indexOf(event.who);
      if (row < 0) continue;
      g.strokeStyle = color[kind] ?? t.faint;
      g.globalAlpha = 0.7;
      g.setLineDash([2, 3]);
      g.beginPath();
      g.moveTo(Math.round(x) + 0.5, LANE - 3);
      g.lineTo(Math.round(x) + 0.5, this.yOf(row));
      g.stroke();
      g.setLineDash([]);
      g.globalAlpha = 1;
    }
    g.font = "11px " + t.font;
  }

  yOf(row) {
    const { groups, each } = this.layout;
    const group = groups.find((one) => row >= one.from && row < one.from + one.rows);
    return group.y + (row - group.from) * each;
  }

  drawLabels(right) {
    const { g } = this;
    const t = theme();
    g.textBaseline = "middle";
    g.textAlign = "left";
    const taken = [];
    for (const finding of this.findings.filter((f) => f.severity !== "info").slice(0, 3)) {
      const { info } = this.found;
      const rows = finding.scope === "node" ? info.nodes.map((n, i) => (n === finding.who ? i : -1)).filter((i) => i >= 0) : [info.ids.indexOf(finding.who)];
      if (!rows.length || rows[0] < 0) continue;
      const y = (this.yOf(rows[0]) + this.yOf(rows[rows.length - 1]) + this.layout.each) / 2;
      if (taken.some((other) => Math.abs(other - y) < 18)) continue;
      taken.push(y);
      const text = finding.short;
      const wide = g.measureText(text).width + 12;
      const x = Math.min(Math.max(this.x(finding.since) - wide - 6, LEFT + 4), right - wide - 4);
      g.fillStyle = t.card;
      g.strokeStyle = t.line;
      g.beginPath();
      g.roundRect(x, y - 9, wide, 18, 4);
      g.fill();
      g.stroke();
      g.fillStyle = t.text;
      g.fillText(text, x + 6, y + 0.5);
    }
  }

  drawCross(right) {
    const { g, height } = this;
    const t = theme();
    if (this.drag) {
      g.fillStyle = t.accent;
      g.globalAlpha = 0.15;
      g.fillRect(Math.min(this.drag.x, this.drag.to), LANE, Math.abs(this.drag.to - this.drag.x), height - LANE - BOTTOM);
      g.globalAlpha = 1;
    }
    if (!this.at) return;
    const x = LEFT + ((this.at.col + 0.5) / this.found.info.cols) * (right - LEFT);
    g.strokeStyle = t.dim;
    g.beginPath();
    g.moveTo(Math.round(x) + 0.5, LANE);
    g.lineTo(Math.round(x) + 0.5, height - BOTTOM);
    g.stroke();
    g.strokeStyle = t.accent;
    g.strokeRect(LEFT - 0.5, this.yOf(this.at.row) - 0.5, right - LEFT + 1, Math.max(3, this.layout.each) + 1);
  }

  cellAt(px, py) {
    if (!this.found || !this.layout || px < LEFT || py < LANE || py > this.height - BOTTOM) return null;
    const { info } = this.found;
    const col = Math.floor(((px - LEFT) / (this.width - 4 - LEFT)) * info.cols);
    for (const group of this.layout.groups) {
      const row = Math.floor((py - group.y) / this.layout.each);
      if (row >= 0 && row < group.rows) return { row: group.from + row, col: Math.min(Math.max(col, 0), info.cols - 1) };
    }
    return null;
  }

  // What is in a cell, for the card and for the tests.
  cell({ row, col }) {
    const { info, codes } = this.found;
    const code = codes[row * info.cols + col];
    return { id: info.ids[row], node: info.nodes[row], at: info.t0 + col * info.bin_s, code, value: code > 1 ? valueOf(code, info) : null };
  }

  showCard() {
    const card = $("hover");
    card.hidden = !this.at;
    if (!this.at) return;
    const cell = this.cell(this.at);
    const what = cell.code === 0 ? "no data" : cell.code === 1 ? "down" : { ratio: `${number(cell.value)}× its fair share`, updates: `${number(cell.value)} updates behind`, seconds: `${number(cell.value)} s since it took the parameters` }[view.u];
    const detail = this.detail ? this.detail(cell.id) : null;
    card.replaceChildren(make("b", {}, `${cell.id} · ${cell.node}`), what, make("div", {}, `${clock(cell.at)} · ${utc(cell.at)} · ${duration(Math.max(0, this.now - cell.at))} ago`), detail ? make("div", {}, detail) : null);
    const x = LEFT + ((this.at.col + 0.5) / this.found.info.cols) * (this.width - 4 - LEFT);
    const y = this.yOf(this.at.row);
    card.style.left = Math.max(0, Math.min(x + 12, this.width - card.offsetWidth - 6)) + "px";
    card.style.top = (y + 70 > this.height ? y - card.offsetHeight - 8 : y + 12) + "px";
  }

  label() {
    const { info, codes } = this.found;
    let worst = { value: 0 };
    for (let row = 0; row < info.rows; row++) {
      let newest = 0;
      for (let col = info.cols - 1; col >= 0 && !newest; col--) newest = codes[row * info.cols + col];
      const value = newest > 1 ? valueOf(newest, info) : 0;
      if (value > worst.value) worst = { value, id: info.ids[row] };
    }
    const unit = { ratio: "× fair share", updates: " updates", seconds: " s" }[view.u];
    this.canvas.setAttribute("aria-label", `Staleness of ${info.rows} rows over ${duration(this.to - this.from)}` + (worst.id ? `; the worst now is ${worst.id} at ${number(worst.value)}${unit}` : ""));
  }

  listen() {
    const { canvas } = this;
    const place = (event) => {
      const box = canvas.getBoundingClientRect();
      return [event.clientX - box.left, event.clientY - box.top];
    };
    canvas.addEventListener("pointermove", (event) => {
      const [x, y] = place(event);
      if (this.drag) this.drag.to = Math.max(LEFT, Math.min(x, this.width - 4));
      this.at = this.cellAt(x, y);
      this.draw();
      this.showCard();
    });
    canvas.addEventListener("pointerleave", () => { this.at = null; this.draw(); this.showCard(); });
    canvas.addEventListener("pointerdown", (event) => {
      const [x] = place(event);
      if (event.pointerType === "mouse" && x > LEFT && this.found) this.drag = { x, to: x };
    });
    addEventListener("pointerup", (event) => {
      if (!this.drag) return;
      const { x, to } = this.drag;
      this.drag = null;
      if (Math.abs(to - x) > 8) {
        const at = (px) => this.from + ((px - LEFT) / (this.width - 4 - LEFT)) * (this.to - this.from);
        this.zoomed(at(Math.min(x, to)), at(Math.max(x, to)));
      } else if (event.target === canvas && this.at) this.open();
    });
    canvas.addEventListener("dblclick", () => this.zoomed(null, null));
    canvas.addEventListener("blur", () => { this.at = null; this.draw(); this.showCard(); });
    canvas.addEventListener("keydown", (event) => {
      if (!this.found || !this.found.info.rows) return;
      const { rows, cols } = this.found.info;
      const at = this.at ?? { row: 0, col: cols - 1 };
      const to = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      if (event.key === "Enter" && this.at) return this.open();
      if (event.key === "Home") this.at = { row: at.row, col: 0 };
      else if (event.key === "End") this.at = { row: at.row, col: cols - 1 };
      else if (to) this.at = this.at ? { row: clamp(at.row + to[0], rows), col: clamp(at.col + to[1], cols) } : at;
      else return;
      event.preventDefault();
      this.draw();
      this.showCard();
    });
  }

  open() {
    const { id, node } = this.cell(this.at);
    if (id === node && !view.node) setView({ node });
    else this.openWorker(id);
  }
}

export function valueOf(code, info) {
  return 2 ** (info.lo + ((code - 2) / 253) * (info.hi - info.lo));
}

// For many workers the header has no room for names: they are in the order of meta.
function namesOf(info, meta) {
  const ids = (meta && meta.worker_order) || [];
  return { ids: ids.slice(0, info.rows), nodes: ids.slice(0, info.rows).map(() => "") };
}

function clamp(value, end) {
  return Math.min(Math.max(value, 0), end - 1);
}

function worse(a, b) {
  const order = ["error", "crash", "slow", "storage", "quarantine", "recover", "drain", "leave", "join"];
  const rank = (kind) => (order.includes(kind) ? order.indexOf(kind) : 99);
  return rank(b) < rank(a) ? b : a;
}

function short(name) {
  return name.length > 9 ? name.slice(0, 8) + "…" : name;
}

function parse(hex) {
  return [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
}

export function drawRamp(canvas) {
  const { g, width, height } = context(canvas);
  for (let x = 0; x < width; x++) {
    g.fillStyle = rampColor(2 ** (-1 + (x / width) * 4));
    g.fillRect(x, 0, 1, 9);
  }
  g.fillStyle = theme().dim;
  g.font = "10px " + theme().font;
  g.textBaseline = "bottom";
  const unit = { ratio: ["½×", "1×", "2×", "4×", "8×"], updates: ["½", "1", "2", "4", "8"], seconds: ["2 s", "4 s", "8 s", "16 s", "32 s"] }[view.u];
  unit.forEach((text, i) => {
    g.textAlign = i === 0 ? "left" : i === 4 ? "right" : "center";
    g.fillText(text, (i / 4) * width, height);
  });
}
