// App: asks for what is shown, shows what comes, and puts both together.

import { get, isReport } from "./api.js";
import { Distribution, LossChart, Norm } from "./charts.js";
import { Diagnosis } from "./diagnosis.js";
import { $, make, segments, setText } from "./dom.js";
import { Drawer, EventLog, findWorker, showHelp } from "./drawer.js";
import { clock, duration } from "./format.js";
import { drawRamp, glyph, Heatmap } from "./heatmap.js";
import { Kpis } from "./kpis.js";
import { asTable, Ranking } from "./ranking.js";
import { Shards } from "./shards.js";
import { onView, readView, setView, span, view } from "./state.js";
import { Stream } from "./stream.js";
import { onTheme, startTheme } from "./theme.js";

const STATUSES = ["starting", "ok", "watch", "slow", "stalled", "down", "recovering", "draining", "left"];
const SERIES = "loss,loss_smooth,val_loss,samples_per_s,ratio.p95,trip.fetch_p95,trip.push_p95";
const SLOW_MS = 5000;

const debug = (window.distbelief = { frames: [], seq: -1, state: "loading", errors: [] });

class App {
  constructor() {
    this.meta = null;
    this.t = 0;
    this.tick = null;
    this.isPaused = false;
    this.pausedAt = 0;
    this.lostFor = 0;
    this.events = [];
    this.loadedAt = -Infinity;
    this.isLoading = false;
    this.toggleTheme = startTheme();
    readView();
    this.kpis = new Kpis();
    this.drawer = new Drawer();
    const open = (name) => this.drawer.open(name);
    this.diagnosis = new Diagnosis(open);
    this.heatmap = new Heatmap(open, (from, to) => this.zoom(from, to));
    this.heatmap.detail = (id) => this.detailOf(id);
    this.ranking = new Ranking(open);
    this.loss = new LossChart();
    this.distribution = new Distribution();
    this.norm = new Norm();
    this.shards = new Shards();
    this.log = new EventLog(open);
    this.log.items = this.events;
    this.controls();
    onTheme(() => { this.heatmap.paintImage(); this.drawAll(); });
    onView((changes) => this.viewChanged(changes));
    addEventListener("hashchange", () => { readView(); this.showControls(); this.load(); });
    new ResizeObserver(() => this.drawAll()).observe(document.querySelector("main"));
  }

  async start() {
    try {
      await this.loadMeta();
      const snapshot = await get("snapshot");
      this.take(snapshot);
      this.norm.fair = this.heatmap.fair;
      await this.loadEvents();
      await this.load();
    } catch (error) {
      debug.errors.push(String(error));
      this.showState("lost", String(error.message ?? error));
    }
    this.stream = new Stream((kind, data) => this.hear(kind, data));
    this.stream.start();
    setInterval(() => this.everySecond(), 1000);
    if (view.id) this.drawer.open(view.id);
    debug.state = "ready";
  }

  // What comes

  hear(kind, data) {
    if (kind === "tick" || kind === "resync") {
      debug.seq = data.seq;
      if (this.isPaused) return;
      this.pending = data;
      if (!this.frame) this.frame = requestAnimationFrame(() => this.paint());
      if (kind === "resync" || (this.meta && data.order !== undefined && data.order !== this.order)) this.loadMeta();
    } else if (kind === "event") {
      this.events.push(data);
      if (this.events.length > 2000) this.events.shift();
      this.showEvents();
    } else if (kind === "meta") this.showMeta(data);
    else if (kind === "lost") this.showState("lost", data);
    else if (kind === "found") this.showState("live");
    else if (kind === "bye") this.loadMeta().catch(() => this.showState("over"));
  }

  paint() {
    this.frame = 0;
    const began = performance.now();
    const data = this.pending;
    this.pending = null;
    if (data) this.take(data);
    debug.frames.push(performance.now() - began);
    if (debug.frames.length > 600) debug.frames.shift();
    if (performance.now() - this.loadedAt > this.every()) this.load();
  }

  // Charts come again when a new column of the heatmap is complete.
  every() {
    const [from, to] = span(this.t, this.meta?.started);
    return Math.max(2000, Math.min(SLOW_MS * 2, ((to - from) / 450) * 1000));
  }

  take(data) {
    this.t = data.t ?? this.t;
    this.tick = data;
    this.heatmap.now = this.t;
    this.heatmap.fair = this.norm.fair = data.kpi.staleness.fair;
    if (data.w) {
      this.order = data.order;
      this.kpis.statuses = [...data.w.st].map((digit) => STATUSES[Number(digit)]);
    }
    this.kpis.show(data.kpi);
    const findings = data.findings ?? [];
    this.heatmap.findings = findings;
    this.diagnosis.show(findings, this.meta);
    this.waiting(data);
    const bad = findings.filter((f) => f.severity !== "info").length;
    document.title = (bad ? `⚠ ${bad} · ` : "") + `${this.meta?.name ?? "distbelief"} · distbelief`;
    if (data.checks) this.drawer.showChecks(data.checks);
    this.showLive();
  }

  detailOf(id) {
    const at = this.meta?.worker_order.indexOf(id) ?? -1;
    if (at < 0 || !this.tick?.w || this.tick.w.lag.length !== this.meta.worker_order.length) return null;
    const lag = this.tick.w.lag[at];
    return `now ${lag ?? "–"} behind, ${STATUSES[Number(this.tick.w.st[at])]}`;
  }

  everySecond() {
    if (this.isPaused || this.lostFor) this.showLive();
    if (!document.hidden) this.drawer.refresh();
  }

  // What is asked for

  async loadMeta() {
    this.showMeta(await get("meta"));
  }

  async loadEvents() {
    const { items } = await get("events?limit=500");
    this.events.splice(0, this.events.length, ...items);
    this.showEvents();
  }

  async load() {
    if (this.isLoading) { this.isDue = true; return; }
    this.isLoading = true;
    this.loadedAt = performance.now();
    const [from, to] = span(this.t || Date.now() / 1000, this.meta?.started);
    const range = `from=${from.toFixed(1)}&to=${to.toFixed(1)}`;
    const path = (name) => (isReport ? name : null);
    const parts = [
      get(path("series") ?? `series?names=${SERIES}&${range}&points=500`).then((series) => {
        this.kpis.series = series;
        this.kpis.draw();
        this.loss.show(series);
        this.shards.showTrips(series);
      }),
      this.heatmap.load(from, to),
      get(path("workers") ?? "workers?sort=-ratio&limit=50").then((found) => {
        this.ranking.show(found);
        this.found = found;
        if (!$("heat-table").hidden) asTable($("heat-table"), found);
      }),
      get(path("distribution") ?? "distribution?window=60").then((found) => this.distribution.show(found)),
      Promise.all([get(path("updates") ?? "updates?window=60&n=1500"), get("meter")]).then(([updates, meter]) => this.norm.show(updates, meter)),
      get("shards").then((found) => this.shards.show(found)),
      get("snapshot").then((found) => { this.drawer.showChecks(found.checks); this.waiting(found); }),
    ];
    for (const one of await Promise.allSettled(parts)) if (one.status === "rejected") debug.errors.push(String(one.reason));
    this.isLoading = false;
    debug.loads = (debug.loads ?? 0) + 1;
    if (this.isDue) { this.isDue = false; this.load(); }
  }

  // What is shown

  showMeta(meta) {
    this.meta = this.heatmap.meta = meta;
    this.drawer.actions = meta.actions;
    setText($("run-name"), meta.name || "distbelief");
    setText($("run-id"), meta.run);
    const chip = $("run-state");
    setText(chip.querySelector("b"), meta.state);
    chip.className = "chip" + (meta.state === "training" ? " good" : meta.exit === "failed" ? " bad" : "");
    const rule = [meta.algo === "downpour" ? "Downpour SGD" : meta.algo, `fetch ${meta.n_fetch ?? "–"} · push ${meta.n_push ?? "–"}`, meta.optimizer, meta.engine].filter(Boolean);
    setText($("run-algo"), rule.join(" · "));
    if (meta.finished) this.showState("over");
  }

  showEvents() {
    const items = this.events;
    setText($("events-total"), String(items.length));
    // Of many checkpoints the newest is news.
    const newest = items.findLast((event) => event.kind === "checkpoint");
    const recent = items.filter((event) => event.kind !== "checkpoint" || event === newest).slice(-4).reverse();
    $("recent").replaceChildren(...recent.map((event) => make("li", { title: event.text }, make("time", { class: "mono" }, clock(event.at)), make("span", { class: `glyph g-${event.kind}`, "aria-hidden": "true" }, glyph(event.kind)), make("span", {}, event.text))));
    if (!recent.length) $("recent").append(make("li", { class: "dim" }, "Nothing has happened yet"));
    this.heatmap.events = items;
    this.heatmap.draw();
  }

  waiting(data) {
    const box = $("heat-empty");
    if (this.heatmap.found && this.heatmap.found.info.rows) { box.hidden = true; return; }
    box.hidden = false;
    const state = this.meta?.state;
    const said = data.waiting;
    if (state === "waiting" || !this.meta) {
      box.replaceChildren("No run has been heard of. Start one:", make("code", {}, "distbelief launch --workers 4"));
    } else if (said) {
      box.replaceChildren("Waiting for the first push.", make("span", {}, `${said.workers[0]} of ${said.workers[1]} workers have joined, ${said.shards[0]} of ${said.shards[1]} shards are ready` + (said.elapsed_s === null ? "" : ` · ${duration(said.elapsed_s)}`)));
    }
  }

  showState(state, what) {
    debug.link = state;
    this.lostFor = state === "lost" ? (typeof what === "number" ? what : 1) : 0;
    this.isOver = this.isOver || state === "over";
    document.querySelector("main").classList.toggle("stale", state === "lost" && !this.isOver);
    this.showLive();
  }

  showLive() {
    const button = $("live");
    const text = button.querySelector("span");
    button.className = "button";
    if (this.isOver || isReport) {
      button.classList.add("over");
      const exit = this.meta?.exit ? `, ${this.meta.exit}` : "";
      setText(text, this.meta?.ended ? `Finished ${clock(this.meta.ended, false)}${exit}` : isReport ? "Report" : "Finished");
    } else if (this.lostFor) {
      button.classList.add("warn");
      const age = Math.max(this.lostFor, this.stream ? (performance.now() - this.stream.heardAt) / 1000 : 0);
      setText(text, Number.isFinite(age) ? `Reconnecting, last data ${duration(age)} ago` : "Reconnecting");
    } else if (this.isPaused) {
      button.classList.add("warn");
      setText(text, `Paused, ${duration((performance.now() - this.pausedAt) / 1000)} behind: resume`);
    } else setText(text, this.tick && this.tick.age_s > 5 ? `No reports for ${duration(this.tick.age_s)}` : "Live 1 s");
  }

  drawAll() {
    this.kpis.draw();
    this.heatmap.draw();
    this.loss.draw();
    this.distribution.draw();
    this.norm.draw();
    this.shards.draw();
    if (this.ranking.items) this.ranking.draw();
    drawRamp($("ramp"));
  }

  // What is chosen

  controls() {
    this.setters = [
      segments($("windows"), [["5m", "5m"], ["15m", "15m"], ["1h", "1h"], ["all", "All"]], view.w, (w) => setView({ w, z: "" })),
      segments($("units"), [["ratio", "× fair share"], ["updates", "updates"], ["seconds", "seconds"]], view.u, (u) => setView({ u })),
      segments($("orders"), [["node", "By node"], ["worst", "Worst first"]], view.o, (o) => setView({ o, node: "" })),
      segments($("loss-scale"), [["linear", "linear"], ["log", "log"]], view.s, (s) => setView({ s })),
      segments($("norm-kind"), [["norm", "norm"], ["meter", "meter"]], view.k, (k) => setView({ k })),
    ];
    $("live").addEventListener("click", () => this.pause());
    $("help-open").addEventListener("click", showHelp);
    $("help").addEventListener("click", (event) => { if (event.target === $("help")) $("help").close(); });
    $("heat-table-open").addEventListener("click", () => {
      const box = $("heat-table");
      box.hidden = !box.hidden;
      $("heat-table-open").setAttribute("aria-expanded", String(!box.hidden));
      setText($("heat-table-open"), box.hidden ? "Show as table" : "Show as chart");
      if (!box.hidden && this.found) asTable(box, this.found);
    });
    addEventListener("keydown", (event) => this.key(event));
  }

  showControls() {
    [view.w, view.u, view.o, view.s, view.k].forEach((value, i) => this.setters[i](value));
  }

  viewChanged(changes) {
    if ("s" in changes) this.loss.draw();
    if ("k" in changes) this.norm.draw();
    if ("w" in changes || "u" in changes || "o" in changes || "z" in changes || "node" in changes) this.load();
    const unit = { ratio: "1× = fair share", updates: "updates behind", seconds: "seconds since it took the parameters" }[view.u];
    const zoomed = view.z ? " · zoomed, double-click to leave" : "";
    setText($("heat-sub"), `${view.node ? view.node + " · " : ""}One row per worker · ${unit}${zoomed}`);
    drawRamp($("ramp"));
  }

  zoom(from, to) {
    if (from === null) setView({ z: "", node: "" });
    else setView({ z: `${from.toFixed(0)}-${to.toFixed(0)}` });
  }

  pause() {
    if (this.isOver) return;
    this.isPaused = !this.isPaused;
    this.pausedAt = performance.now();
    this.showLive();
  }

  key(event) {
    if (event.target.matches("input, select, textarea") || event.ctrlKey || event.metaKey || event.altKey) return;
    if (document.querySelector("dialog[open]") && event.key !== "Escape") return;
    const before = this.keyBefore;
    this.keyBefore = event.key;
    setTimeout(() => { this.keyBefore = ""; }, 900);
    if (before === "g" && event.key === "n") { setView({ o: "node" }); this.showControls(); }
    else if (before === "g" && event.key === "w") { setView({ o: "worst", node: "" }); this.showControls(); }
    else if ("1234".includes(event.key)) { setView({ w: ["5m", "15m", "1h", "all"][Number(event.key) - 1], z: "" }); this.showControls(); }
    else if (event.key === "?") showHelp();
    else if (event.key === "/") findWorker((name) => this.drawer.open(name));
    else if (event.key === "t") this.toggleTheme();
    else if (event.key === "e") this.log.open();
    else if (event.key === "r") navigator.clipboard?.writeText(location.href.replace(/\?[^#]*/, ""));
    else if (event.key === " " && !event.target.matches("button, [tabindex]")) this.pause();
    else return;
    event.preventDefault();
  }
}

const app = new App();
debug.app = app;
app.start();
