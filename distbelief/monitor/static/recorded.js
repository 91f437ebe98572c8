// Recorded: the answers that a report carries, chosen from as the monitor would choose.

const element = document.getElementById("recorded");
export const isReport = element !== null;
let opened = null;

const bytesOf = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));

async function open() {
  const stream = new Blob([bytesOf(element.textContent)]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

/** All of it: {made, answers, details, logs, series, heatmaps}; see report.py. */
export const recorded = () => (opened ??= open());

/** Of what was kept of several spans of time: the shortest that has all of this one. */
function covering(kept, from, to) {
  const whole = kept.filter((one) => one.from <= from + 2 && one.to >= to - 2);
  const span = (one) => one.to - one.from;
  return (whole.length ? whole : kept).toSorted((a, b) => (whole.length ? 1 : -1) * (span(a) - span(b)))[0] ?? null;
}

function workers(all, asked) {
  const q = (asked.get("q") ?? "").toLowerCase(), sort = asked.get("sort") ?? "-ratio", field = sort.replace(/^-/, "");
  const found = all.items.filter((w) => !q || w.id.toLowerCase().includes(q) || w.node.toLowerCase().includes(q));
  const items = field === "id" ? found : found.toSorted((a, b) => (b[field] ?? -Infinity) - (a[field] ?? -Infinity));
  return { ...all, total: q ? found.length : all.total, items: items.slice(0, Number(asked.get("limit") ?? 50)) };
}

function events(all, asked) {
  const kind = asked.get("kind") ?? "", worker = asked.get("worker") ?? "", q = (asked.get("q") ?? "").toLowerCase();
  if (!kind && !worker && !q) return { ...all, items: all.items.slice(-Number(asked.get("limit") ?? 200)) };
  const found = all.items.filter((e) => (!kind || e.kind === kind) && (!worker || e.who === worker) && (!q || e.text.toLowerCase().includes(q)));
  return { ...all, total: found.length, items: found.slice(-Number(asked.get("limit") ?? 200)) };
}

/** The answer to a route, or null. */
export async function lookUp(route) {
  const { answers, details, series } = await recorded(), { pathname, searchParams: asked } = new URL(route, "http://report/");
  const name = decodeURIComponent(pathname.slice(1));
  if (name.startsWith("workers/")) return details[name.slice("workers/".length)] ?? null;
  if (name === "series") return covering(series, Number(asked.get("from")), Number(asked.get("to")));
  const answer = answers[name] ?? null;
  if (name === "workers") return workers(answer, asked);
  return name === "events" ? events(answer, asked) : answer;
}

/** {head, body} of a heatmap, or null. */
export async function lookUpCells(query) {
  const asked = new URLSearchParams(query), { heatmaps } = await recorded(), node = asked.get("node");
  const alike = heatmaps.filter((one) => one.group === asked.get("group") && one.metric === asked.get("metric"));
  const found = covering(alike, Number(asked.get("from")), Number(asked.get("to")));
  if (!found) return null;
  const { head } = found, body = bytesOf(found.cells);
  if (!node) return { head: { ...head }, body };
  const rows = head.nodes.flatMap((one, i) => (one === node && head.ids[i] !== node ? [i] : []));
  if (!rows.length) return null;
  const some = new Uint8Array(rows.length * head.cols);
  rows.forEach((r, i) => some.set(body.subarray(r * head.cols, (r + 1) * head.cols), i * head.cols));
  return { head: { ...head, rows: rows.length, ids: rows.map((i) => head.ids[i]), nodes: rows.map(() => node) }, body: some };
}

/** The end of a log, or null. */
export async function lookUpText(name) {
  return (await recorded()).logs[name] ?? null;
}
