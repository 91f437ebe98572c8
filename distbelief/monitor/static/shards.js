// Shards: is one of them the bottleneck? And how long do round trips take?

import { byId, el, say } from "./dom.js";
import { clock, count, ms, percent, whole } from "./format.js";
import { chip, niceTicks, robust, TimePlot, tickText, trace } from "./plot.js";
import { on, run } from "./run.js";
import { theme } from "./theme.js";

const SHOWN = 4;
const rows = [];

class Trips extends TimePlot {
  constructor() {
    super(byId("trip-canvas"), byId("trip-over"), { left: 40, right: 12, top: 6, bottom: 20 });
  }

  draw(ctx, w, h) {
    const series = run.series, fetch = series?.["trip.fetch_p95"] ?? [], push = series?.["trip.push_p95"] ?? [];
    const toMs = (list) => list.map((v) => (v === null ? null : v * 1000));
    const a = toMs(fetch), b = toMs(push), range = robust([...a, ...b], 0.001), empty = byId("trip-empty");
    empty.hidden = Boolean(range);
    if (!range) {
      empty.textContent = "No round trip was reported yet.";
      return;
    }
    const hi = Math.max(range[1] * 1.1, 1), { top, bottom } = this.margin;
    const y = (v) => top + (1 - Math.min(v, hi) / hi) * (h - top - bottom);
    this.valueAxis(ctx, w, h, niceTicks(0, hi, Math.max(2, Math.floor((h - top - bottom) / 26))), y, tickText);
    this.timeAxis(ctx, w, h);
    const gap = Math.max(30, 3 * (series.bin_s ?? 1));
    for (const [values, colour] of [[b, "push"], [a, "fetch"]]) {
      trace(ctx, series.at, values, (t) => this.x(t), y, gap);
      ctx.strokeStyle = theme.colors[colour];
      ctx.lineWidth = 1.5;
      ctx.stroke();
    }
    const last = (list) => [...list].reverse().find((v) => v !== null);
    const words = [["fetch", last(a)], ["push", last(b)]].filter(([, v]) => v !== undefined).map(([name, v]) => `${name} ${ms(v)}`).join(", ");
    this.label(`Round trips, p95: ${words}`);
  }

  readout(ctx, w, h, time, px) {
    const series = run.series, i = series ? series.at.findIndex((t) => t >= time) : -1;
    if (i < 0) return;
    const parts = ["fetch", "push"].flatMap((name) => {
      const v = series[`trip.${name}_p95`][i];
      return v === null || v === undefined ? [] : [`${name} ${ms(v * 1000)}`];
    });
    if (parts.length) chip(ctx, `${clock(series.at[i])}  ${parts.join("  ")}`, px > w / 2 ? px - 6 : px + 6, this.margin.top + 6, { align: px > w / 2 ? "right" : "left" });
    void h;
  }
}

function makeRow() {
  const fill = el("i"), even = el("u"), load = el("div", { class: "load", role: "img" }, fill, even);
  const row = { name: el("td"), fill, even, load, queue: el("td", { class: "num" }), apply: el("td", { class: "num" }) };
  row.root = el("tr", {}, row.name, el("td", { class: "c-bar" }, load), row.queue, row.apply);
  return row;
}

function render() {
  const items = (run.shards?.items ?? run.snapshot?.shards ?? []).map((shard, i) => {
    // The tick is newer than the list.
    const now = run.tick?.sh?.[i];
    return now && run.tick.sh.length === (run.shards?.items ?? run.snapshot.shards).length ? { ...shard, updates_per_s: now[0], queue: now[1], apply_ms: { ...shard.apply_ms, p95: now[2] }, share: now[3] } : shard;
  });
  const body = byId("shard-body");
  const wanted = items.length > SHOWN ? [...items].sort((a, b) => score(b) - score(a)).slice(0, SHOWN) : items;
  while (rows.length < wanted.length) {
    const row = makeRow();
    rows.push(row);
    body.append(row.root);
  }
  while (rows.length > wanted.length) rows.pop().root.remove();
  const most = Math.max(1.25 / Math.max(1, items.length), ...items.map((s) => s.share ?? 0));
  wanted.forEach((shard, i) => {
    const row = rows[i], isOdd = shard.hot || !["serving", "starting"].includes(shard.status);
    row.root.dataset.hot = String(isOdd);
    row.root.dataset.shard = shard.id;
    say(row.name, shard.id);
    const share = `${((shard.share ?? 0) / most) * 100}%`;
    if (row.fill.style.width !== share) row.fill.style.width = share;
    row.even.style.left = `${(1 / Math.max(1, items.length) / most) * 100}%`;
    row.load.setAttribute("aria-label", shard.updates_per_s === null ? "rate not known" : `${count(shard.updates_per_s)} updates/s`);
    say(row.queue, shard.status === "lost" || shard.status === "silent" ? shard.status : shard.queue === null ? "–" : whole(shard.queue));
    say(row.apply, shard.apply_ms.p95 === null ? "–" : ms(shard.apply_ms.p95));
    const title = `${shard.id} on ${shard.node || "?"}: ${shard.status}, ${shard.updates_per_s === null ? "–" : count(shard.updates_per_s)} updates/s (${shard.share === null ? "–" : percent(shard.share)}), version ${shard.version ?? "–"}, ${shard.parameters === null ? "–" : count(shard.parameters)} parameters${shard.saved ? `, saved ${shard.saved}` : ""}${shard.storage_error ? `; cannot save: ${shard.storage_error}` : ""}`;
    if (row.root.title !== title) row.root.title = title;
  });
  say(document.querySelector("#shards .hint"), items.length > SHOWN ? `The ${SHOWN} busiest of ${items.length}; tick = an even share` : "Tick marks an even share of the load");
  strip(items);
}

const score = (s) => (s.hot ? 1e6 : 0) + (s.status === "serving" ? 0 : 1e9) + (s.queue ?? 0) * 100 + (s.apply_ms.p95 ?? 0);

/** One is not heard: the page goes on, and says what it does not show. */
function strip(items) {
  const lost = items.filter((s) => s.status === "lost" || s.status === "silent"), bar = byId("strip");
  bar.hidden = !lost.length || run.isOver;
  byId("page").toggleAttribute("data-strip", !bar.hidden);
  if (lost.length) say(bar, `The monitor has lost contact with ${lost.map((s) => s.id).slice(0, 4).join(", ")}${lost[0].age_s === null ? "" : ` at ${clock(run.now - lost[0].age_s)}`}; what is shown is of the other ${items.length - lost.length}.`);
}

export function startShards() {
  const trips = new Trips();
  on("shards snapshot tick", render);
  on("series", () => trips.mark());
}
