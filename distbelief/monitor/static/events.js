// Events: all that happened, to be searched and taken away.

import { get } from "./answers.js";
import { byId, el, EVENT_MARKS, makeMark, say } from "./dom.js";
import { clock, count, day, moment } from "./format.js";
import { on, run } from "./run.js";
import { choose, onState, state } from "./state.js";

const PAGE = 60;
const ALL = 20_000;
const KINDS = Object.keys(EVENT_MARKS);
let parts = null;
let asked = 0;
let skip = 0;

function query(limit) {
  const { kind, worker, text } = parts;
  const pairs = [["limit", limit], ["kind", kind.value], ["worker", worker.value.trim()], ["q", text.value.trim()]];
  return `events?${pairs.filter(([, v]) => v !== "").map(([k, v]) => `${k}=${encodeURIComponent(v)}`).join("&")}`;
}

async function load() {
  const mine = (asked += 1);
  try {
    const found = await get(query(Math.min(ALL, PAGE + skip)));
    if (mine !== asked || !parts) return;
    const items = found.items.slice(0, Math.max(0, found.items.length - skip)).slice(-PAGE).reverse();
    const body = items.map((e) => el("tr", {},
      el("td", { class: "mono nowrap", title: moment(e.at, run.meta?.started) }, clock(e.at)),
      el("td", { class: "nowrap" }, makeMark(EVENT_MARKS[e.kind] ?? EVENT_MARKS.state), ` ${e.kind}`),
      el("td", { class: "nowrap" }, e.who || "–"), el("td", {}, e.text.replace(/(\d)x\b/g, "$1×"))));
    parts.body.replaceChildren(...body);
    const first = found.total ? Math.min(found.total, skip + 1) : 0;
    say(parts.note, found.total ? `${first}–${Math.min(found.total, skip + items.length)} of ${count(found.total)}, newest first` : "Nothing matches.");
    parts.newer.disabled = skip === 0;
    parts.older.disabled = skip + PAGE >= found.total;
  } catch (error) {
    if (parts) say(parts.note, error.message);
  }
}

async function download() {
  try {
    const { items } = await get(query(ALL));
    const url = URL.createObjectURL(new Blob(items.map((e) => `${JSON.stringify(e)}\n`), { type: "application/x-ndjson" }));
    const link = el("a", { href: url, download: `events-${run.meta?.run ?? "run"}.jsonl` });
    link.click();
    setTimeout(() => URL.revokeObjectURL(url), 10_000);
  } catch (error) {
    say(parts.note, error.message);
  }
}

function open() {
  const dialog = byId("events-dialog");
  if (dialog.open) return;
  let timer = 0;
  const changed = () => { skip = 0; clearTimeout(timer); timer = setTimeout(load, 200); };
  const turn = (step) => { skip = Math.max(0, skip + step); load(); };
  parts = {
    kind: el("select", { onchange: changed }, el("option", { value: "" }, "all"), ...KINDS.map((k) => el("option", { value: k }, k))),
    worker: el("input", { type: "text", placeholder: "w17", autocomplete: "off", spellcheck: "false", oninput: changed }),
    text: el("input", { type: "search", placeholder: "in the text", autocomplete: "off", oninput: changed }),
    body: el("tbody"), note: el("span", { class: "hint" }),
    newer: el("button", { type: "button", class: "tool", onclick: () => turn(-PAGE) }, "Newer"), older: el("button", { type: "button", class: "tool", onclick: () => turn(PAGE) }, "Older"),
  };
  dialog.replaceChildren(
    el("header", {}, el("h2", { id: "events-title" }, "Events"), el("button", { type: "button", class: "tool square", "aria-label": "Close", onclick: () => dialog.close() }, "✕")),
    el("div", { class: "filters" }, el("label", {}, "Kind", parts.kind), el("label", {}, "Worker or shard", parts.worker), el("label", {}, "Text", parts.text), el("button", { type: "button", class: "tool", onclick: download }, "Download JSONL"), parts.newer, parts.older, parts.note),
    el("div", { class: "body", tabindex: "0", role: "region", "aria-label": "List of events" }, el("table", { class: "list" }, el("thead", {}, el("tr", {}, ...["Time", "Kind", "Who", "What"].map((t) => el("th", { scope: "col" }, t)))), parts.body)),
  );
  skip = 0;
  dialog.showModal();
  load();
}

export function startEvents() {
  const dialog = byId("events-dialog");
  dialog.addEventListener("close", () => {
    parts = null;
    dialog.replaceChildren();
    if (state.view === "events") choose({ view: "" });
  });
  const follow = () => (state.view === "events" ? open() : dialog.open && dialog.close());
  onState((changed) => changed.has("view") && follow());
  follow();
  on("events", () => parts && skip === 0 && load());
  void day;
}
