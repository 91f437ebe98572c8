// Search: find a worker by a part of its name or of its node's.

import { get } from "./answers.js";
import { byId, el, makeMark, MARKS, say } from "./dom.js";
import { times } from "./format.js";
import { choose } from "./state.js";

const SHOWN = 12;
let asked = 0;

async function look(input, list, note) {
  const mine = (asked += 1);
  try {
    const { items, total } = await get(`workers?limit=${SHOWN}&sort=-ratio&q=${encodeURIComponent(input.value.trim())}`);
    if (mine !== asked) return;
    list.replaceChildren(...items.map((w) => el("li", {}, el("button", { type: "button", onclick: () => pick(w.id) }, makeMark(MARKS[w.status] ?? MARKS.starting), w.id, el("small", {}, `${w.node} · ${w.status} · ${w.ratio === null ? "–" : times(w.ratio)}`)))));
    say(note, total > SHOWN ? `The ${SHOWN} stalest of ${total}` : total ? `${total} found` : "No worker or node has that in its name.");
  } catch (error) {
    say(note, error.message);
  }
}

function pick(worker) {
  byId("search-dialog").close();
  choose({ worker });
}

export function openSearch() {
  const dialog = byId("search-dialog");
  if (dialog.open) return;
  const list = el("ul", { class: "results" }), note = el("p", { class: "hint", role: "status" });
  const input = el("input", { id: "search-input", type: "search", "aria-label": "Name of a worker or node", placeholder: "w17 or node-3", autocomplete: "off", spellcheck: "false" });
  input.addEventListener("input", () => look(input, list, note));
  dialog.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && document.activeElement === input) list.querySelector("button")?.click();
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const all = [input, ...list.querySelectorAll("button")];
    all[Math.max(0, Math.min(all.length - 1, all.indexOf(document.activeElement) + step))].focus();
  });
  dialog.replaceChildren(
    el("header", {}, el("h2", { id: "search-title" }, "Find a worker"), el("button", { type: "button", class: "tool square", "aria-label": "Close", onclick: () => dialog.close() }, "✕")),
    el("div", { class: "body" }, input, note, list),
  );
  dialog.onclose = () => dialog.replaceChildren();
  dialog.showModal();
  input.focus();
  look(input, list, note);
}
