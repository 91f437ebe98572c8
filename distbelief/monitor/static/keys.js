// Keys: what the keyboard does, and the page that says so.

import { byId, el } from "./dom.js";
import { copyReport } from "./diagnosis.js";
import { togglePause } from "./header.js";
import { openSearch } from "./search.js";
import { choose, onState, state } from "./state.js";
import { switchTheme } from "./theme.js";

const KEYS = [["?", "this page"], ["/", "find a worker"], ["1 – 4", "window: 5 min, 15 min, 1 h, all"], ["space", "pause and go on"], ["g n", "order by node"], ["g w", "worst first"], ["t", "light or dark"], ["e", "all events"], ["r", "copy report and link"], ["Esc", "close, or end a zoom"], ["arrows", "on the heatmap: move the cell; Enter opens its worker"]];
const MEANINGS = [
  ["Staleness", "How many updates of other workers a shard has applied between a worker's taking parameters and its update's being applied. Counted at the shard, where it is true; of a worker, the largest over all shards."],
  ["Behind, lag", "Staleness of its last update or the updates since it last took parameters, whichever is more. So it grows while a worker hangs."],
  ["Fair share", "What staleness is on average with so many workers: with A of them, (A − 1) · (n_fetch / n_push + 1) / 2. A slow worker does not change that average, which is why it is not shown."],
  ["× fair share", "Lag divided by fair share. About 1× is normal in any fleet; above 2× for half a minute a worker is called slow."],
  ["p50, p95, max", "Half of all updates applied in the last 60 s were at most p50 behind; 95 % at most p95."],
  ["Phases", "Compute: forward and backward. Fetch: waiting for parameters. Push: packing a gradient and waiting for leave to send it. Data wait: for the next batch. What is left is other."],
  ["Status", "● ok, ■ watch: above 1.5× for 15 s, ◆ slow: above 2× for 30 s, ◇ stalled: no push for 10 s and 8 of its own steps, ✕ down, ↻ recovering: back for less than 30 s."],
  ["Heatmap", "A cell is the worst value of a worker in that time. Hatched: no data; hatched with a red edge: down. Above 256 workers a row is the worst of a node. Drag to zoom, double-click to end it."],
  ["Loss", "Thin: mean of each second. Bold: smoothed over some seconds, coloured by the p95 of staleness at that time. Circles: on validation data."],
  ["Distribution", "Share of updates by staleness; the line is how many have at most that much."],
  ["Norm and harm", "Each push's gradient norm by staleness. With the meter on: how a stale gradient compares with that of the same batch on current parameters. Cosine 1: the same direction. Loss gap: how far the loss has moved meanwhile. Effective rate: the part of the step that goes the right way."],
  ["Shards", "Updates applied a second beside an even share, messages that wait, and how long one update takes in 95 % of cases."],
  ["–", "Not known. It is never shown as 0; point at it for the reason."],
];

function open() {
  const dialog = byId("help-dialog");
  if (dialog.open) return;
  dialog.replaceChildren(
    el("header", {}, el("h2", { id: "help-title" }, "Keys and meanings"), el("button", { type: "button", class: "tool square", "aria-label": "Close", onclick: () => dialog.close() }, "✕")),
    el("div", { class: "body", tabindex: "0", role: "region", "aria-label": "Keys and meanings" }, el("h3", {}, "Keys"), el("dl", { class: "meanings" }, ...KEYS.flatMap(([key, text]) => [el("dt", {}, el("kbd", {}, key)), el("dd", {}, text)])),
      el("h3", {}, "What the numbers mean"), el("dl", { class: "meanings" }, ...MEANINGS.flatMap(([word, text]) => [el("dt", {}, word), el("dd", {}, text)]))),
  );
  dialog.showModal();
}

export function startKeys() {
  const dialog = byId("help-dialog");
  dialog.addEventListener("close", () => {
    dialog.replaceChildren();
    if (state.view === "help") choose({ view: "" });
  });
  const follow = () => (state.view === "help" ? open() : dialog.open && dialog.close());
  onState((changed) => changed.has("view") && follow());
  follow();
  byId("help").addEventListener("click", () => choose({ view: "help" }));
  byId("find").addEventListener("click", openSearch);
  let isAfterG = false;
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
    if (event.target.closest("input, select, textarea")) return;
    if (event.key === "Escape") {
      if (document.querySelector("dialog[open]")) return;
      if (!byId("findings").hidden) byId("more").click();
      else if (state.worker) choose({ worker: "" });
      else if (state.zoom) choose({ zoom: "" });
      return;
    }
    if (document.querySelector("dialog[open]")) return;
    const key = isAfterG ? `g${event.key}` : event.key;
    isAfterG = event.key === "g" && !isAfterG;
    const act = {
      "?": () => choose({ view: "help" }), "/": openSearch, 1: () => choose({ window: "5m", zoom: "" }), 2: () => choose({ window: "15m", zoom: "" }), 3: () => choose({ window: "1h", zoom: "" }), 4: () => choose({ window: "all", zoom: "" }),
      gn: () => choose({ order: "node" }), gw: () => choose({ order: "worst" }), t: switchTheme, e: () => choose({ view: "events" }), r: copyReport,
      " ": event.target.closest("button, a, summary") ? null : togglePause,
    }[key];
    if (!act) return;
    event.preventDefault();
    act();
  });
}
