// Answers: what the monitor says, asked for over HTTP. In a report they lie in the page itself.

import { isReport, lookUp, lookUpCells, lookUpText } from "./recorded.js";

export class Refused extends Error {
  constructor(status, body) {
    super(body?.error?.message ?? `The monitor answered ${status}.`);
    this.status = status;
    this.hint = body?.error?.hint ?? "";
  }
}

async function ask(route) {
  const reply = await fetch(route, { cache: "no-store" });
  if (reply.ok) return reply;
  throw new Refused(reply.status, await reply.json().catch(() => null));
}

/** Of a report: null is no answer. */
function known(answer) {
  if (answer === null) throw new Refused(404, { error: { message: "That is not in this report." } });
  return answer;
}

/** JSON of a route below api/v1/. Throws: Refused, TypeError where nobody answers. */
export async function get(route) {
  return isReport ? known(await lookUp(route)) : (await ask(`api/v1/${route}`)).json();
}

/** Cells of the heatmap: {head, body}. */
export async function getCells(query) {
  if (isReport) return known(await lookUpCells(query));
  const reply = await ask(`api/v1/heatmap?${query}`);
  return { head: JSON.parse(reply.headers.get("X-DB-Heatmap")), body: new Uint8Array(await reply.arrayBuffer()) };
}

/** The end of a process's log. */
export async function getLog(name, lines) {
  return isReport ? known(await lookUpText(name)) : (await ask(`logs/${encodeURIComponent(name)}?lines=${lines}`)).text();
}

export async function act(what, body) {
  const reply = await fetch(`api/v1/actions/${what}`, { method: "POST", headers: { "Content-Type": "application/json", "X-DB-Token": "page" }, body: JSON.stringify(body) });
  if (!reply.ok) throw new Refused(reply.status, await reply.json().catch(() => null));
}
