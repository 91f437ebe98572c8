// Shared: the worker that all tabs of one monitor share. It holds their one stream of events, as
// a browser opens six connections to a place and no more. What it hears it hands on as text.

const RETRY_MS = 3000;
const HIDDEN_MS = 60_000;
const ports = new Map(); // port -> is hidden
const last = {}; // kind -> newest text, for who comes later
let source = null;
let seq = null;
let timer = null;
let sleeping = null;
let status = "connecting";

function tell(message) {
  for (const port of ports.keys()) port.postMessage(message);
}

function become(next) {
  status = next;
  tell({ kind: "status", status });
}

function open() {
  clearTimeout(timer);
  if (source) return;
  source = new EventSource(`api/v1/stream${seq === null ? "" : `?after=${seq}`}`);
  source.onopen = () => become("open");
  source.onerror = () => {
    become("lost");
    if (source && source.readyState === EventSource.CLOSED) {
      close();
      timer = setTimeout(open, RETRY_MS);
    }
  };
  for (const kind of ["tick", "event", "finding", "meta", "bye"]) {
    source.addEventListener(kind, (event) => {
      if (event.lastEventId) seq = event.lastEventId;
      if (kind === "tick" || kind === "meta") last[kind] = event.data;
      tell({ kind, data: event.data });
      if (kind === "bye") {
        // Whoever says so ends; the next run may come to the same place.
        seq = null;
        close();
        timer = setTimeout(open, 5 * RETRY_MS);
      }
    });
  }
}

function close() {
  source?.close();
  source = null;
}

function judge() {
  clearTimeout(sleeping);
  if ([...ports.values()].every(Boolean)) sleeping = setTimeout(() => { clearTimeout(timer); close(); }, ports.size ? HIDDEN_MS : 0);
  else open();
}

onconnect = ({ ports: [port] }) => {
  ports.set(port, false);
  port.onmessage = ({ data }) => {
    if (data.gone) ports.delete(port);
    else if ("hidden" in data) ports.set(port, data.hidden);
    judge();
  };
  port.postMessage({ kind: "status", status });
  for (const [kind, data] of Object.entries(last)) port.postMessage({ kind, data, old: true });
  judge();
};
