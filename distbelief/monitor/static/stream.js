// What is new, as it comes: from the stream that all tabs share, or by asking where that cannot be had.

import { get, isReport } from "./api.js";

const POLL_MS = 2000;
const SILENCE_MS = 5000;

export class Stream {
  // on: called with (kind, data) of each message, and with ("lost", seconds), ("found").
  constructor(on) {
    this.on = on;
    this.seq = -1;
    this.heardAt = performance.now();
    this.isLost = false;
    this.isOver = false;
    this.isPolling = false;
    this.port = null;
  }

  start() {
    if (isReport) return;
    try {
      const worker = new SharedWorker("shared.js", { name: "distbelief " + location.pathname });
      this.port = worker.port;
      this.port.onmessage = (event) => this.take(event.data.kind, event.data.data);
      this.port.start();
      this.port.postMessage("on");
    } catch {
      this.port = null; // some browsers have none: ask instead
      this.heardAt = -Infinity;
    }
    document.addEventListener("visibilitychange", () => this.look());
    addEventListener("pagehide", () => this.port && this.port.postMessage("off"));
    setInterval(() => this.look(), 1000);
  }

  take(kind, data) {
    if (kind === "open" || kind === "error") return;
    this.heardAt = performance.now();
    if (this.isLost) {
      this.isLost = false;
      this.on("found", null);
    }
    if (data && data.seq !== undefined) {
      if (data.seq < this.seq && kind !== "meta") return;
      this.seq = Math.max(this.seq, data.seq);
    }
    if (kind === "bye") this.isOver = true;
    this.on(kind, data);
  }

  look() {
    if (document.hidden || this.isOver) return;
    const silent = performance.now() - this.heardAt;
    if ((!this.port || silent > SILENCE_MS) && !this.isPolling) this.poll();
  }

  async poll() {
    this.isPolling = true;
    try {
      const path = "delta?after=" + this.seq;
      const reply = await fetch("api/v1/" + path);
      if (reply.status === 410 || this.seq < 0) {
        const tick = await get("snapshot");
        this.take("resync", tick);
      } else {
        const answer = await reply.json();
        const messages = Array.isArray(answer) ? answer : answer.items;
        for (const one of messages) this.take(one.kind ?? one.event, one.data);
        if (!messages.length) throw new Error("nothing new");
      }
    } catch {
      const silent = (performance.now() - this.heardAt) / 1000;
      if (silent > SILENCE_MS / 1000) {
        this.isLost = true;
        this.on("lost", silent);
      }
    }
    setTimeout(() => { this.isPolling = false; }, POLL_MS - 100);
  }
}
