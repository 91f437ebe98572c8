// Header: which run, in which state, since when; the window of time, and whether data still comes.

import { byId, el, radios, say, show } from "./dom.js";
import { clock, day, duration, moment } from "./format.js";
import { isReport } from "./recorded.js";
import { on, run, settle, tell } from "./run.js";
import { choose, onState, state } from "./state.js";
import { switchTheme, theme } from "./theme.js";

const WORDS = { waiting: "Waiting", starting: "Starting", training: "Training", stopping: "Stopping", saving: "Saving", evaluating: "Evaluating", ended: "Ended" };
const TONES = { waiting: "", starting: "info", training: "ok", stopping: "warn", saving: "info", evaluating: "info", ended: "info" };
const GOOD = ["done", "finished", "target", "epochs", "updates", "seconds", "ok"];
const plainIcon = byId("icon").href;
const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);

function drawIcon(colour) {
  const canvas = document.createElement("canvas");
  Object.assign(canvas, { width: 64, height: 64 });
  const ctx = canvas.getContext("2d");
  [["#2f6fdf", 2, 2], ["#8fb2f2", 34, 2], ["#8fb2f2", 2, 34], ["#b0305f", 34, 34]].forEach(([fill, x, y]) => {
    ctx.fillStyle = fill;
    ctx.beginPath();
    ctx.roundRect(x, y, 28, 28, 8);
    ctx.fill();
  });
  if (colour) {
    ctx.fillStyle = "#fff";
    ctx.beginPath();
    ctx.arc(48, 16, 16, 0, 7);
    ctx.fill();
    ctx.fillStyle = colour;
    ctx.beginPath();
    ctx.arc(48, 16, 12, 0, 7);
    ctx.fill();
  }
  return canvas.toDataURL("image/png");
}

function showMeta() {
  const { meta } = run;
  if (!meta) return;
  show(byId("run-name"), meta.name, meta.name, "No run was announced yet.");
  show(byId("run-id"), meta.run, meta.run === meta.name ? "" : meta.run, "");
  if (meta.run === null) say(byId("run-id"), "");
  const line = [];
  const sub = (name, value) => value !== null && value !== undefined && line.push(" · ", "n", el("sub", {}, name), ` ${value}`);
  line.push(meta.algo === "downpour" ? "Downpour SGD" : String(meta.algo ?? ""));
  sub("fetch", meta.n_fetch);
  sub("push", meta.n_push);
  if (meta.optimizer) line.push(` · ${capital(meta.optimizer)}`);
  if (meta.run !== null) byId("algo").replaceChildren(...line);
  byId("algo").title = byId("algo").textContent;
}

function showState() {
  const { meta } = run, word = run.state, chip = byId("state-chip");
  const exit = meta?.exit;
  let tone = TONES[word] ?? "", text = WORDS[word] ?? capital(word);
  if (word === "ended") {
    const isGood = exit === null || exit === undefined || GOOD.includes(exit);
    text = isGood ? "Finished" : capital(exit);
    tone = isGood ? "ok" : exit === "stopped" || exit === "interrupted" ? "warn" : "bad";
  }
  chip.dataset.tone = tone;
  say(chip, text);
  chip.title = meta?.started ? `Began ${moment(meta.started)}` : "";
  const by = run.kpi?.workers?.by_status ?? {};
  const bad = (by.down ?? 0) + (by.stalled ?? 0), slow = by.slow ?? 0;
  const alarm = [by.down && `${by.down} down`, by.stalled && `${by.stalled} stalled`, slow && `${slow} slow`].filter(Boolean)[0];
  const title = `${run.isOver || !alarm ? "" : `⚠ ${alarm} · `}${meta?.name ? `${meta.name} · ` : ""}distbelief`;
  if (document.title !== title) document.title = title;
  const dot = run.isOver ? "" : bad ? "#c4302b" : slow ? "#e8843f" : "";
  const icon = byId("icon");
  if (icon.dataset.dot !== dot) {
    icon.dataset.dot = dot;
    icon.type = dot ? "image/png" : "image/svg+xml";
    icon.href = dot ? drawIcon(dot) : plainIcon;
  }
}

function showLink() {
  const button = byId("live"), { meta } = run;
  let link = run.isPaused ? "paused" : run.link, text = "Connecting";
  const behind = Math.round((performance.now() - run.lastAt) / 1000);
  if (link === "finished" || (run.isOver && link !== "paused")) {
    link = "finished";
    if (isReport) text = run.made ? `Report of ${day(run.made)} ${clock(run.made, false)}` : "Report";
    else text = meta?.ended ? `Finished ${clock(meta.ended, false)}${meta.exit ? `, ${meta.exit}` : ""}` : meta?.live === false ? "Recording" : "Finished";
  } else if (link === "paused") text = `Paused, ${duration(run.tickAt - run.tick.t)} behind: Resume`;
  else if (link === "reconnecting") text = run.lastAt ? `Reconnecting, last data ${duration(behind)} ago` : "Reconnecting";
  else if (link === "denied") text = "Not allowed: open the printed link";
  else if (link === "live") text = "Live 1 s";
  button.dataset.link = link;
  document.body.dataset.link = link;
  button.setAttribute("aria-pressed", String(run.isPaused));
  button.title = link === "live" ? "Pause ( space )" : link === "paused" ? "Go on ( space )" : "";
  say(byId("live-text"), text);
}

export function togglePause() {
  if (run.isOver || !run.tick) return;
  run.isPaused = !run.isPaused;
  showLink();
  if (!run.isPaused) tell("resume");
}

export function startHeader() {
  const check = radios(byId("windows"), [["5m", "5m"], ["15m", "15m"], ["1h", "1h"], ["all", "All"]], (window) => choose({ window, zoom: "" }));
  const windows = () => {
    check(state.window);
    byId("unzoom").hidden = !state.zoom;
  };
  windows();
  onState(windows);
  byId("unzoom").addEventListener("click", () => choose({ zoom: "" }));
  byId("live").addEventListener("click", togglePause);
  byId("theme").addEventListener("click", switchTheme);
  byId("save").hidden = isReport;
  on("meta", () => { showMeta(); showState(); showLink(); });
  on("tick snapshot", () => { showState(); showLink(); });
  on("link", showLink);
  setInterval(() => run.link !== "live" || run.isPaused ? showLink() : null, 1000);
  void settle;
  void theme;
}
