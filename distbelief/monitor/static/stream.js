// Stream: brings what the monitor says. From the shared worker; where there is none, or it is
// silent, by asking for what came after the last number.

const SILENT_MS = 5000;
const POLL_MS = 2000;

export class Stream {
  /** hear(kind, data) for each message; link(word) for live, reconnecting, denied. */
  constructor(hear, link) {
    this._hear = hear;
    this._link = link;
    this._seq = -1;
    this._heardAt = 0;
    this._isStill = false;
    this._isPolling = false;
    this._port = null;
    this.transport = "none";
  }

  start() {
    try {
      if (typeof SharedWorker === "undefined") throw new Error("no SharedWorker");
      const worker = new SharedWorker(new URL("shared.js", import.meta.url), { name: location.pathname });
      this._port = worker.port;
      this._port.onmessage = ({ data }) => this._take(data);
      this._port.start();
      document.addEventListener("visibilitychange", () => this._port.postMessage({ hidden: document.hidden }));
      addEventListener("pagehide", () => this._port.postMessage({ gone: true }));
      addEventListener("pageshow", (event) => event.persisted && location.reload());
    } catch {
      this._port = null; // asking will do
    }
    setInterval(() => this._watch(), 1000);
    if (!this._port) this._poll();
  }

  /** Whether nothing is missed when it is silent: the run is over. */
  rest(isStill) {
    this._isStill = isStill;
  }

  /** All up to this number is known. */
  reset(seq) {
    this._seq = Math.max(this._seq, seq);
  }

  _take({ kind, data, status, old }) {
    if (kind === "status") {
      if (status === "lost" && !this._isStill) this._link("reconnecting");
      return;
    }
    this.transport = "stream";
    this._give(kind, JSON.parse(data), old);
  }

  _give(kind, data, old = false) {
    if (kind === "tick") {
      this._seq = Math.max(this._seq, data.seq);
      if (!old) {
        this._heardAt = performance.now();
        this._link("live");
      }
    }
    if (kind === "meta" && data.resync) this._seq = data.seq;
    this._hear(kind, data);
  }

  _watch() {
    if (document.hidden || this._isStill || this._isPolling) return;
    if (performance.now() - this._heardAt > (this._heardAt || this._port ? SILENT_MS : 0) && performance.now() > SILENT_MS) this._poll();
  }

  async _poll() {
    this._isPolling = true;
    try {
      while (!this._isStill && (this.transport !== "stream" || performance.now() - this._heardAt > SILENT_MS)) {
        if (!document.hidden) await this._ask();
        await new Promise((done) => setTimeout(done, POLL_MS));
      }
    } finally {
      this._isPolling = false;
    }
  }

  async _ask() {
    try {
      if (this._seq < 0) return; // the first answers bring a number to go on from
      const reply = await fetch(`api/v1/delta?after=${this._seq}`, { cache: "no-store" });
      if (reply.status === 401 || reply.status === 403) {
        this._link("denied");
        return;
      }
      if (reply.status === 410) {
        const now = await (await fetch("api/v1/snapshot", { cache: "no-store" })).json();
        this._seq = now.seq;
        this._hear("resync", now);
        this._link("live");
        return;
      }
      if (!reply.ok) throw new Error(String(reply.status));
      const items = await reply.json();
      this.transport = "poll";
      for (const { event, seq, data } of items) {
        this._give(event, data);
        this._seq = Math.max(this._seq, seq);
      }
      // The transport says how it came; a stream that speaks again takes over.
    } catch {
      this._link("reconnecting");
    }
  }
}
