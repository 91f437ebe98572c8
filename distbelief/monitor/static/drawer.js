// The drawer: all that is known of one worker.

import { act, get, getText, isReport } from "./api.js";
import { $, make, setText } from "./dom.js";
import { bytes, clock, number, ratio, seconds, whole } from "./format.js";
import { Plot, ticks } from "./plot.js";
import { MARKS, PHASES, phaseBar } from "./ranking.js";
import { setView, view } from "./state.js";
import { theme } from "./theme.js";

const COLORS = ["compute", "fetch", "push", "data"];

export class Drawer {
  constructor() {
    this.box = $("drawer");
    this.box.addEventListener("close", () => setView({ id: "" }));
    this.box.addEventListener("click", (event) => { if (event.target === this.box) this.box.close(); });
    this.actions = false;
  }

  async open(name) {
    this.name = name;
    if (view.id !== name) setView({ id: name });
    this.build(name);
    if (!this.box.open) this.box.showModal();
    await this.refresh(true);
  }

  build(name) {
    const buttons = [make("button", { class: "button", on: { click: () => this.copy() } }, "Copy")];
    if (this.actions && !isReport) buttons.push(make("button", { class: "button", on: { click: () => this.drain() } }, "Drain"));
    buttons.push(make("button", { class: "button", "aria-label": "Close", on: { click: () => this.box.close() } }, "✕"));
    this.lag = make("canvas", { role: "img", "aria-label": `Staleness of ${name}` });
    this.phases = make("canvas", { role: "img", "aria-label": `Time in a step of ${name}` });
    this.perShard = make("canvas", { role: "img", "aria-label": `Staleness of ${name} at each shard` });
    this.list = make("dl");
    this.bar = make("div");
    this.log = make("pre", { tabindex: "0", "aria-label": "Last lines of its log" }, "…");
    this.checks = make("dl");
    this.error = make("p", { class: "dim", role: "status" });
    this.box.replaceChildren(
      make("div", { class: "head" }, make("h2", { id: "drawer-title" }, name), make("span", { class: "chip", id: "drawer-status" }, "…"), make("span", { class: "space" }), ...buttons),
      this.error, this.bar, this.list,
      make("h3", {}, "Staleness, × fair share"), this.lag, make("h3", {}, "Time in a step"), this.phases,
      make("h3", {}, "Staleness at each shard"), this.perShard, make("h3", {}, "Last lines of its log"), this.log,
      make("h3", {}, "Self-checks of the counters"), this.checks,
    );
  }

  async refresh(withLog = false) {
    if (!this.box.open) return;
    let found;
    try {
      found = await get(`workers/${encodeURIComponent(this.name)}?window=900`);
    } catch (error) {
      setText(this.error, error.message);
      return;
    }
    setText(this.error, "");
    this.found = found;
    setText($("drawer-status"), `${MARKS[found.status] ?? ""} ${found.status}`);
    const rows = {
      Behind: `${whole(found.lag)} updates, ${ratio(found.ratio)} its fair share`,
      "Took parameters": found.seconds === null ? "–" : seconds(found.seconds) + " ago",
      Step: seconds(found.step_s),
      Phases: PHASES.map((p) => `${p} ${seconds(found.phases_s[p])}`).join(" · "),
      "Share of updates": found.share_of_updates === null ? "–" : (found.share_of_updates * 100).toFixed(2) + " %",
      Pushes: `${whole(found.pushes)}, ${whole(found.samples)} samples`,
      "Blamed phase": found.blame ? `${found.blame}, ${number(found.excess)}× the median` : "none",
      Process: `${found.host || "?"} · pid ${found.pid ?? "?"} · incarnation ${found.inc ?? "?"} · ${found.device ?? "?"}`,
      Memory: bytes(found.rss_bytes),
      Sent: `${bytes(found.sent_bytes)}, received ${bytes(found.received_bytes)}`,
      Retries: `${whole(found.retries)}, restarts ${whole(found.restarts)}`,
    };
    this.list.replaceChildren(...Object.entries(rows).flatMap(([name, text]) => [make("dt", {}, name), make("dd", {}, text)]));
    this.bar.replaceChildren(phaseBar(found.phases_s));
    this.draw();
    if (withLog) this.readLog();
  }

  showChecks(checks) {
    if (!this.box.open) return;
    this.checks.replaceChildren(...checks.flatMap((one) => [make("dt", {}, one.ok === null ? "○" : one.ok ? "✓" : "✕"), make("dd", {}, one.text)]));
  }

  async readLog() {
    try {
      const lines = await getText("logs/" + encodeURIComponent(this.name));
      setText(this.log, lines.trim() || "nothing was written");
      this.log.scrollTop = this.log.scrollHeight;
    } catch (error) {
      setText(this.log, error.message);
    }
  }

  draw() {
    const { series, shards } = this.found;
    const t = theme();
    this.lines(this.lag, series.t, [[series.ratio, t.hot]], ratio);
    this.lines(this.phases, series.t, COLORS.map((phase) => [series[phase], t[phase]]), seconds);
    const names = Object.keys(shards).slice(0, 4);
    if (names.length) this.lines(this.perShard, shards[names[0]].t, names.map((name, i) => [shards[name].staleness, t[COLORS[i]]]), whole);
  }

  lines(canvas, at, all, text) {
    const plot = new Plot(canvas, { left: 48 });
    plot.begin();
    const known = all.flatMap(([values]) => values).filter((v) => v !== null);
    if (!known.length || at.length < 2) return;
    const top = Math.max(...known) * 1.1 || 1;
    plot.setX(at[0], at[at.length - 1]);
    plot.setY(0, top);
    plot.gridY(ticks(0, top, 2), text);
    plot.times();
    for (const [values, color] of all) plot.line(at, values, color);
  }

  async copy() {
    const text = [`worker ${this.name}`, ...[...this.list.children].map((one) => (one.tagName === "DT" ? one.textContent + ": " : one.textContent + "\n"))].join("");
    try { await navigator.clipboard.writeText(text); } catch { setText(this.error, "the browser does not allow copying here"); }
  }

  async drain() {
    try {
      await act("drain", { worker: this.name });
      setText(this.error, `${this.name} is asked to leave`);
    } catch (error) {
      setText(this.error, error.message);
    }
  }
}

export class EventLog {
  constructor(openWorker) {
    this.box = $("events");
    this.openWorker = openWorker;
    this.items = [];
    $("events-open").addEventListener("click", () => this.open());
    this.box.addEventListener("click", (event) => { if (event.target === this.box) this.box.close(); });
  }

  async open() {
    const kind = make("select", { "aria-label": "Kind" }, make("option", { value: "" }, "all kinds"), ...["join", "crash", "recover", "slow", "well", "checkpoint", "state", "drain", "leave", "storage", "quarantine", "error"].map((k) => make("option", { value: k }, k)));
    const q = make("input", { type: "search", placeholder: "text or worker", "aria-label": "Text" });
    const body = make("tbody");
    const again = async () => {
      const query = new URLSearchParams({ limit: 500 });
      if (kind.value) query.set("kind", kind.value);
      if (q.value) query.set("q", q.value);
      const { items } = await get("events?" + query).catch(() => ({ items: this.items.filter((e) => (!kind.value || e.kind === kind.value) && e.text.includes(q.value)) }));
      this.shown = items;
      body.replaceChildren(...[...items].reverse().map((e) => make("tr", {}, make("td", { class: "mono dim" }, clock(e.at)), make("td", {}, e.kind), make("td", {}, e.who), make("td", {}, e.text))));
    };
    kind.addEventListener("change", again);
    q.addEventListener("input", again);
    const save = make("button", { class: "button", on: { click: () => this.save() } }, "Download JSONL");
    this.box.replaceChildren(make("div", { class: "head" }, make("h2", { id: "events-title" }, "Events"), make("span", { class: "space" }), make("button", { class: "button", "aria-label": "Close", on: { click: () => this.box.close() } }, "✕")), make("div", { class: "filters" }, kind, q, save), make("table", {}, make("thead", {}, make("tr", {}, ...["Time", "Kind", "Who", "What"].map((text) => make("th", { scope: "col" }, text)))), body));
    this.box.showModal();
    await again();
  }

  save() {
    const text = this.shown.map((event) => JSON.stringify(event)).join("\n") + "\n";
    const link = make("a", { href: URL.createObjectURL(new Blob([text], { type: "application/jsonl" })), download: "events.jsonl" });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }
}

export function showHelp() {
  const box = $("help");
  const keys = { "?": "this help", "/": "find a worker", "1 2 3 4": "window: 5 m, 15 m, 1 h, all", space: "pause", "g n": "rows by node", "g w": "rows with the worst first", t: "light or dark", e: "events", r: "copy the link of this view", Esc: "close" };
  const words = {
    Staleness: "updates of other workers that a shard applied between a worker's fetch and its push; counted at the shard, so exact",
    "Fair share": "what everybody would have if all were equally fast: workers less one. The mean is always that, whoever is slow, so it is not shown",
    Behind: "a worker's last staleness, or how far the shards have gone since it took the parameters: what grows while it hangs",
    "Time in step": "data: waiting for a batch; compute: forward and backward; push: until the shards have answered; fetch: taking the parameters",
    Status: "watch: above 1.5× for 15 s; slow: above 2× for 30 s; stalled: no push for 10 s or 8 steps; down: lost",
  };
  box.replaceChildren(make("div", { class: "head" }, make("h2", { id: "help-title" }, "What is what"), make("span", { class: "space" }), make("button", { class: "button", "aria-label": "Close", on: { click: () => box.close() } }, "✕")), make("dl", {}, ...Object.entries(words).flatMap(([k, v]) => [make("dt", {}, k), make("dd", {}, v)])), make("h3", {}, "Keys"), make("dl", {}, ...Object.entries(keys).flatMap(([k, v]) => [make("dt", {}, make("kbd", {}, k)), make("dd", {}, v)])));
  box.showModal();
}

export function findWorker(openWorker) {
  const box = $("help");
  const input = make("input", { type: "search", "aria-label": "Worker", placeholder: "w17", autofocus: true });
  const list = make("ol", { class: "events" });
  const again = async () => {
    const { items } = await get("workers?" + new URLSearchParams({ q: input.value, limit: 12 })).catch(() => ({ items: [] }));
    list.replaceChildren(...items.map((item) => make("li", {}, make("button", { class: "link", on: { click: () => { box.close(); openWorker(item.id); } } }, item.id), make("span", { class: "dim" }, `${item.node} · ${item.status} · ${ratio(item.ratio)}`))));
  };
  input.addEventListener("input", again);
  input.addEventListener("keydown", (event) => { if (event.key === "Enter") list.querySelector("button")?.click(); });
  box.replaceChildren(make("div", { class: "head" }, make("h2", { id: "help-title" }, "Find a worker")), input, list);
  box.showModal();
  input.focus();
  again();
}

