// One stream for all tabs: a browser gives an origin six connections, and a stream takes one for good.

const ports = new Set();
let source = null;
let last = null;

function tell(message) {
  for (const port of ports) port.postMessage(message);
}

function open() {
  if (source) return;
  source = new EventSource("api/v1/stream");
  source.onopen = () => tell({ kind: "open" });
  source.onerror = () => tell({ kind: "error", closed: source.readyState === 2 });
  for (const kind of ["tick", "event", "finding", "meta", "bye"]) {
    source.addEventListener(kind, (event) => {
      const message = { kind, data: JSON.parse(event.data) };
      if (kind === "tick") last = message;
      tell(message);
      if (kind === "bye") close();
    });
  }
}

function close() {
  if (source) source.close();
  source = null;
}

self.onconnect = (event) => {
  const port = event.ports[0];
  port.onmessage = (message) => {
    if (message.data === "on") {
      ports.add(port);
      open();
      if (last) port.postMessage(last);
    } else {
      ports.delete(port);
      if (!ports.size) close();
    }
  };
};
