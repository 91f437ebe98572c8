// One sentence: who is slow, since when, why, and what to do.

import { $, setText } from "./dom.js";

const ANNOUNCE_MS = 15000;

export class Diagnosis {
  constructor(inspect) {
    this.findings = [];
    this.saidAt = -Infinity;
    this.said = "";
    $("inspect").addEventListener("click", () => this.findings[0] && inspect(this.findings[0].who));
    $("copy-report").addEventListener("click", () => this.copy());
  }

  show(findings, info) {
    this.findings = findings;
    this.info = info;
    const worst = findings[0];
    if (!worst) return;
    const box = $("diagnosis");
    box.className = "diagnosis" + (worst.severity === "info" ? "" : " " + worst.severity);
    setText(box.querySelector(".sign"), { info: "✓", warn: "⚠", error: "✕" }[worst.severity]);
    const text = worst.text;
    // Who listens to the page hears of it when it is another one, and not each second.
    const now = performance.now();
    const isOther = worst.id !== this.said;
    $("finding").setAttribute("aria-live", isOther && now - this.saidAt > ANNOUNCE_MS ? "polite" : "off");
    if (isOther) { this.said = worst.id; this.saidAt = now; }
    setText($("finding"), text);
    setText($("finding-more"), findings.length > 1 ? `+${findings.length - 1} more` : "");
    $("finding-more").title = findings.slice(1).map((f) => f.text).join("\n");
    $("inspect").hidden = worst.scope !== "worker";
    setText($("inspect"), "Inspect " + worst.who);
  }

  async copy() {
    const lines = [this.info ? `distbelief run ${this.info.run}` : "distbelief", ...this.findings.map((f) => "- " + f.text), location.href.split("?")[0] + location.hash];
    try {
      await navigator.clipboard.writeText(lines.join("\n"));
      setText($("copy-report"), "Copied");
    } catch {
      setText($("copy-report"), "Not allowed");
    }
    setTimeout(() => setText($("copy-report"), "Copy report"), 1500);
  }
}
