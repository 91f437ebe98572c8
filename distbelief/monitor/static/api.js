// The monitor's answers. In a report they are in the page itself.

const recorded = document.getElementById("recorded");
const answers = recorded ? JSON.parse(recorded.textContent) : null;

export const isReport = answers !== null;

export class ApiError extends Error {}

export async function get(path) {
  if (isReport) {
    if (!(path in answers)) throw new ApiError("not in this report");
    return answers[path].json;
  }
  const reply = await fetch("api/v1/" + path, { headers: { Accept: "application/json" } });
  const data = await reply.json();
  if (!reply.ok) throw new ApiError(data.error ? data.error.message : String(reply.status));
  return data;
}

// Bytes and what their header says of them.
export async function getHeatmap(path) {
  if (isReport) {
    if (!(path in answers)) throw new ApiError("not in this report");
    const text = atob(answers[path].bytes);
    return { info: answers[path].json, codes: Uint8Array.from(text, (c) => c.charCodeAt(0)) };
  }
  const reply = await fetch("api/v1/" + path);
  if (!reply.ok) throw new ApiError(String(reply.status));
  return {
    info: JSON.parse(reply.headers.get("X-DB-Heatmap")),
    codes: new Uint8Array(await reply.arrayBuffer()),
  };
}

export async function getText(path) {
  if (isReport) throw new ApiError("not in this report");
  const reply = await fetch(path);
  if (!reply.ok) throw new ApiError(`no log (${reply.status})`);
  return reply.text();
}

export async function act(what, body) {
  const reply = await fetch("api/v1/actions/" + what, {
    method: "POST",
    headers: { "Content-Type": "application/json", "X-DB-Token": "cookie" },
    body: JSON.stringify(body),
  });
  if (!reply.ok) throw new ApiError((await reply.json()).error.message);
}
