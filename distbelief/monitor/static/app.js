// App: starts the page. What comes is taken into `run`, and everything that shows it is told.

import { startDiagnosis } from "./diagnosis.js";
import { startDistribution } from "./distribution.js";
import { byId, say } from "./dom.js";
import { startDrawer } from "./drawer.js";
import { startEvents } from "./events.js";
import { startHeader } from "./header.js";
import { startHeatmap } from "./heatmap.js";
import { startKeys } from "./keys.js";
import { startKpis } from "./kpis.js";
import { startLoss } from "./loss.js";
import { frames, inFrame } from "./painter.js";
import { markTime } from "./plot.js";
import { startRanking } from "./ranking.js";
import { isReport, recorded } from "./recorded.js";
import { addEvent, follow, loadAll, loadEvents, on, reloadTime, run, settle, tell } from "./run.js";
import { startScatter } from "./scatter.js";
import { startShards } from "./shards.js";
import { onState, startState, state } from "./state.js";
import { Stream } from "./stream.js";
import { startTheme } from "./theme.js";

/** Held back while paused: the newest tick, and events. */
let held = null, heldEvents = [];
const stream = new Stream(hear, (link) => setLink(link));

const tellTick = () => tell("tick");

function takeTick(tick) {
  const isNew = !run.tick || tick.seq >= run.tick.seq || tick.t < run.tick.t - 5;
  if (!isNew) return;
  run.lastAt = performance.now();
  run.tickAt = tick.t;
  if (run.isPaused) {
    held = tick;
    return;
  }
  const isFirst = !run.tick;
  run.tick = tick;
  if (run.isOver && !isFirst) return;
  follow(tick.t);
  inFrame(tellTick, true);
}

function hear(kind, data) {
  if (kind === "tick") takeTick(data);
  else if (kind === "event") run.isPaused ? heldEvents.push(data) : addEvent(data);
  else if (kind === "finding" && run.tick) run.tick.findings = data.items;
  else if (kind === "meta") {
    const isOther = run.meta && (data.run !== run.meta.run || data.attempt !== run.meta.attempt || data.resync);
    run.meta = data;
    if (isOther) {
      run.tick = null;
      restart();
    }
    stream.rest(run.isOver);
    if (run.isOver) setLink("finished");
    tell("meta");
  } else if (kind === "resync") {
    run.snapshot = data;
    restart();
  } else if (kind === "bye") {
    run.meta = run.meta && { ...run.meta, finished: data.reason === "ended" || run.meta.finished, exit: data.exit ?? run.meta.exit };
    setLink(run.isOver ? "finished" : "reconnecting");
    tell("meta");
  }
}

async function restart() {
  await loadAll();
  reloadTime();
  tell("time");
}

function setLink(link) {
  stream.rest(run.isOver);
  const next = run.isOver && link !== "denied" ? "finished" : link;
  if (next === run.link) return;
  const wasAway = run.link === "reconnecting";
  run.link = next;
  tell("link");
  // What was missed while it was away is asked for.
  if (next === "live" && wasAway) restart();
}

function start() {
  startTheme();
  startState();
  startHeader();
  startDiagnosis();
  startKpis();
  startHeatmap();
  startRanking();
  startLoss();
  startDistribution();
  startScatter();
  startShards();
  startDrawer();
  startEvents();
  startKeys();
  onState((changed) => {
    if (!changed.has("window") && !changed.has("zoom")) return;
    settle();
    markTime();
    reloadTime();
    tell("time");
  });
  on("resume", () => {
    heldEvents.forEach(addEvent);
    heldEvents = [];
    const tick = held;
    held = null;
    if (tick) takeTick(tick);
    reloadTime();
    tell("time");
  });
  on("series", markTime);
  on("denied", () => setLink("denied"));
  on("failed", () => {
    if (!run.meta && !run.tick) say(byId("sentence"), `The monitor does not answer: ${run.error}`);
  });
  document.addEventListener("visibilitychange", () => {
    if (document.hidden || !run.tick || run.isPaused || run.isOver) return;
    loadEvents();
    reloadTime();
    tell("time");
  });
  window.distbelief = {
    frames, state, run,
    get seq() { return run.tick?.seq ?? null; },
    get transport() { return stream.transport; },
  };
  restart().then(() => {
    stream.reset(run.snapshot?.seq ?? -1);
    if (run.isOver) setLink("finished");
    tell("tick");
  });
  if (isReport) showRecorded();
  else stream.start();
}

/** Of a report there is one tick, the last. */
async function showRecorded() {
  const { made, tick } = await recorded();
  run.made = made;
  takeTick(tick);
  setLink("finished");
  tell("link");
}

start();
