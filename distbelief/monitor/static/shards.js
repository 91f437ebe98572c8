// Shards: their load against an even share, and how long a round trip takes.

import { $, make, setText } from "./dom.js";
import { number } from "./format.js";
import { Plot, ticks } from "./plot.js";
import { theme } from "./theme.js";

const ROWS = 4;

export class Shards {
  constructor() {
    this.plot = new Plot($("trips"), { left: 36, top: 4 });
    const t = $("trip-legend");
    t.replaceChildren(make("span", {}, "Round trip p95, ms"), make("span", {}, make("i", { class: "fetch" }), "fetch"), make("span", {}, make("i", { class: "push" }), "push"));
  }

  show({ items }) {
    const sorted = [...items].sort((a, b) => (b.hot - a.hot) || (b.queue ?? 0) - (a.queue ?? 0));
    const shown = items.length <= ROWS ? items : sorted.slice(0, ROWS);
    const most = Math.max(...items.map((one) => one.updates_per_s ?? 0), 1e-9);
    const even = items.reduce((sum, one) => sum + (one.updates_per_s ?? 0), 0) / Math.max(1, items.length);
    const rows = shown.map((one) => {
      const bar = make("div", { class: "load", title: `${number(one.updates_per_s)} updates/s` }, make("i"), make("b"));
      bar.firstChild.style.width = `${((one.updates_per_s ?? 0) / most / 1.1) * 100}%`;
      bar.lastChild.style.left = `${(even / most / 1.1) * 100}%`;
      return make("tr", { class: one.hot ? "hot-shard" : "", title: one.storage_error ?? one.status }, make("td", {}, one.id, one.status === "serving" ? "" : ` ${one.status}`), make("td", {}, bar), make("td", { class: "n", "data-key": `shard.${one.id}.queue` }, number(one.queue)), make("td", { class: "n" }, one.apply_ms.p95 === null ? "–" : number(one.apply_ms.p95, 2) + " ms"));
    });
    if (items.length > ROWS) rows.push(make("tr", {}, make("td", { colspan: 4, class: "dim" }, `+${items.length - ROWS} more`)));
    if (!items.length) rows.push(make("tr", {}, make("td", { colspan: 4, class: "dim" }, "No shard serves yet")));
    $("shards").replaceChildren(...rows);
  }

  showTrips(series) {
    this.series = series;
    this.draw();
  }

  draw() {
    const g = this.plot.begin();
    if (!this.series) return;
    const t = theme();
    const ms = (values) => values.map((v) => (v === null ? null : v * 1000));
    const [fetch, push] = [ms(this.series["trip.fetch_p95"]), ms(this.series["trip.push_p95"])];
    const known = [...fetch, ...push].filter((v) => v !== null);
    if (!known.length) return;
    const top = Math.max(...known) * 1.1;
    this.plot.setX(this.series.from, this.series.to);
    this.plot.setY(0, top);
    this.plot.gridY(ticks(0, top, 2), (v) => number(v, 2));
    this.plot.times();
    this.plot.line(this.series.at, push, t.push, 1.3);
    this.plot.line(this.series.at, fetch, t.fetch, 1.3);
    g.lineWidth = 1;
    setText($("trips"), "");
  }
}
