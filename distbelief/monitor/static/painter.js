// Painter: draws all canvases, once after each news and only those that can be seen.

import { FONT, onTheme } from "./theme.js";

const FRAMES_MAX = 600;
const GATHER_MS = 60;
const BUDGET_MS = 8;
const panes = new Set();
const jobs = new Set();
let isAsked = false;
let began = 0;

/** Milliseconds of each frame, from its begin until the browser has laid out and painted it. */
export const frames = [];
const after = new MessageChannel();
after.port1.onmessage = () => {
  frames.push(performance.now() - began);
  if (frames.length > FRAMES_MAX) frames.shift();
};

function paint() {
  isAsked = false;
  clearTimeout(timer);
  timer = 0;
  began = performance.now();
  for (const job of jobs) job();
  jobs.clear();
  for (const pane of panes) {
    // What is not done in this frame is in the next one: nobody sees one chart 16 ms before another.
    if (pane.isDue && performance.now() - began > BUDGET_MS) {
      ask();
      break;
    }
    try {
      pane.paintIfDue();
    } catch (error) {
      console.error(error); // one chart that fails takes no other with it
    }
  }
  after.port2.postMessage(0);
}

export function ask() {
  if (isAsked) return;
  isAsked = true;
  requestAnimationFrame(paint);
}

let timer = 0;
/** A little later: answers to one tick come one after the other, and are painted together. */
function askLater() {
  if (isAsked || timer) return;
  timer = setTimeout(ask, GATHER_MS);
}

/** Do this in the next frame, once; `news`: it can wait for more of its kind. */
export function inFrame(job, news = false) {
  jobs.add(job);
  if (news) askLater();
  else ask();
}

const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) entry.target.pane.see(entry.isIntersecting);
});
const sized = new ResizeObserver((entries) => {
  for (const entry of entries) entry.target.pane?.mark();
});

/** A canvas, and who draws it: draw(context, width, height) in CSS pixels. */
export class Pane {
  constructor(canvas, draw = null) {
    this.canvas = canvas;
    this.isDirty = true;
    this.isSeen = false;
    if (draw) this.draw = draw;
    canvas.pane = this;
    panes.add(this);
    seen.observe(canvas);
    sized.observe(canvas);
  }

  /** Its data, size or theme is another one. */
  mark() {
    this.isDirty = true;
    if (this.isSeen) askLater();
  }

  see(isSeen) {
    this.isSeen = isSeen;
    if (isSeen && this.isDirty) ask();
  }

  remove() {
    panes.delete(this);
    seen.unobserve(this.canvas);
    sized.unobserve(this.canvas);
  }

  get isDue() {
    return this.isDirty && this.isSeen;
  }

  paintIfDue() {
    if (!this.isDue) return;
    const width = this.canvas.clientWidth, height = this.canvas.clientHeight, scale = devicePixelRatio || 1;
    if (!width || !height) return;
    this.isDirty = false;
    const w = Math.round(width * scale), h = Math.round(height * scale);
    if (this.canvas.width !== w || this.canvas.height !== h) Object.assign(this.canvas, { width: w, height: h });
    const ctx = this.canvas.getContext("2d");
    ctx.setTransform(scale, 0, 0, scale, 0, 0);
    ctx.clearRect(0, 0, width, height);
    ctx.font = `11px ${FONT}`;
    ctx.lineJoin = "bevel";
    Object.assign(this, { scale, width, height }); // asking the canvas each time costs a layout
    this.draw(ctx, width, height);
  }

  /** What is to be seen, in one sentence. */
  label(text) {
    if (this.canvas.getAttribute("aria-label") !== text) this.canvas.setAttribute("aria-label", text);
  }
}

onTheme(() => panes.forEach((pane) => pane.mark()));
