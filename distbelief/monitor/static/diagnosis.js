// Diagnosis: the sentence that says what is wrong, with whom, and what to do.

import { byId, copy, el, say } from "./dom.js";
import { count, day, clock, loss, pretty, times, whole } from "./format.js";
import { on, run } from "./run.js";
import { choose, state } from "./state.js";

const SIGNS = {
  error: "M10 2.2 18 17H2zM10 8v4M10 14.6v.1", warn: "M10 2.2 18 17H2zM10 8v4M10 14.6v.1",
  info: "M10 2a8 8 0 1 0 .01 0zM10 9v5M10 6.2v.1", quiet: "M10 2a8 8 0 1 0 .01 0zM6.4 10.2l2.5 2.5 4.8-5",
};
const ANNOUNCE_MS = 15_000;
const PHASE = /\b(compute|fetch|push|data)\b/;
let announcedAt = -Infinity;
let announced = "";

/** The sentence with its numbers and names made to stand out. */
function spell(finding) {
  const parts = [], text = pretty(finding.text);
  const cut = finding.action ? text.indexOf(finding.action) : -1;
  const head = cut > 0 ? text.slice(0, cut) : text;
  const tokens = head.split(/(\b\d[\d.,]*×|\b\d+(?:\.\d+)? (?:min|s|h)\b|\b(?:compute|fetch|push|data)\b(?= takes))/);
  const emphasise = (piece) => {
    if (!finding.who || !piece.includes(finding.who)) return [piece];
    const at = piece.indexOf(finding.who);
    return [piece.slice(0, at), el("b", { class: "mono" }, finding.who), piece.slice(at + finding.who.length)];
  };
  for (const token of tokens) {
    if (/^\d/.test(token)) parts.push(el("b", {}, token));
    else if (PHASE.test(token) && token.length < 8) {
      const patch = el("i", { class: `patch ${token}`, "aria-hidden": "true" });
      parts.push(patch, token);
    } else parts.push(...emphasise(token));
  }
  if (cut > 0) parts.push(el("span", { class: "action" }, text.slice(cut)));
  return parts;
}

function isWorker(finding) {
  return finding && run.meta?.worker_order?.includes(finding.who);
}

function render() {
  const root = byId("diagnosis"), findings = run.findings;
  const first = findings[0];
  if (!first) return;
  const isWell = first.id === "quiet" && (run.kpi?.workers?.alive ?? 0) > 0;
  const kind = isWell ? "quiet" : first.severity;
  root.dataset.severity = kind;
  byId("sign").setAttribute("d", SIGNS[kind] ?? SIGNS.info);
  const sentence = byId("sentence");
  if (sentence.dataset.text !== first.text) {
    sentence.dataset.text = first.text;
    sentence.replaceChildren(...spell(first));
    sentence.title = pretty(first.text);
  }
  const more = byId("more");
  more.hidden = findings.length < 2;
  say(more, `+${findings.length - 1} more`);
  if (findings.length < 2) close();
  const inspect = byId("inspect"), canInspect = isWorker(first) || (first.scope === "node" && run.meta?.nodes.includes(first.who));
  inspect.hidden = !canInspect;
  if (canInspect) say(inspect, `Inspect ${first.who}`);
  if (!byId("findings").hidden) list();
  const isNews = first.text.replace(/[\d.]+/g, "#") !== announced;
  if (isNews && performance.now() - announcedAt > ANNOUNCE_MS) {
    announced = first.text.replace(/[\d.]+/g, "#");
    announcedAt = performance.now();
    say(byId("announce"), pretty(first.text));
  }
}

function list() {
  byId("findings").replaceChildren(...run.findings.map((f) => el("li", {}, el("button", { type: "button", onclick: () => { inspect(f); close(); } }, ...spell(f)))));
}

function close() {
  byId("findings").hidden = true;
  byId("more").setAttribute("aria-expanded", "false");
}

function inspect(finding) {
  if (isWorker(finding)) choose({ worker: finding.who });
  else if (finding.scope === "node") choose({ node: finding.who, order: "node" });
}

/** What one pastes into an issue. */
export function report() {
  const { meta, kpi } = run, lines = [];
  const or = (value, text) => (value === null || value === undefined ? "not known" : text(value));
  lines.push(`distbelief ${meta?.version ?? ""} · run ${meta?.run ?? "?"} (${meta?.name ?? "?"}) · ${run.state} · ${day(run.now)} ${clock(run.now)}`);
  for (const f of run.findings) lines.push(`- ${f.severity}: ${pretty(f.text)}`);
  if (kpi) {
    const s = kpi.staleness;
    lines.push(`loss ${or(kpi.loss, loss)} · ${or(kpi.samples_per_s, count)} samples/s · ${or(kpi.updates_per_s, count)} updates/s · workers ${kpi.workers.alive}/${or(kpi.workers.target, String)}`);
    lines.push(`staleness p50 ${or(s.p50, whole)} p95 ${or(s.p95, whole)} p99 ${or(s.p99, whole)} max ${or(s.max, whole)} (fair share ${or(s.fair, whole)})`);
  }
  for (const w of run.workers?.items?.slice(0, 5) ?? []) lines.push(`${w.id} ${w.node} ${w.status}: ${or(w.lag, whole)} behind, ${or(w.ratio, times)}, step ${or(w.step_s, (v) => `${v.toFixed(3)} s`)}${w.blame ? `, ${w.blame} ${times(w.excess)} the median` : ""}`);
  lines.push(location.href);
  return lines.join("\n");
}

export const copyReport = () => copy(report(), byId("copy"));

export function startDiagnosis() {
  byId("copy").addEventListener("click", copyReport);
  byId("inspect").addEventListener("click", () => inspect(run.findings[0]));
  byId("more").addEventListener("click", () => {
    const isOpen = byId("findings").hidden;
    byId("findings").hidden = !isOpen;
    byId("more").setAttribute("aria-expanded", String(isOpen));
    if (isOpen) list();
  });
  document.addEventListener("click", (event) => byId("diagnosis").contains(event.target) || close());
  on("tick snapshot meta", render);
  void state;
}
