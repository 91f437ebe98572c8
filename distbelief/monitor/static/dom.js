// Dom: makes and fills elements. Text only: what a worker says is never read as markup.

export const byId = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

/** An element with its attributes and children; a string is text. */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

/** Text, set only if it is another one: what does not change costs no layout. */
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** A number of the API: its text, itself in data-value, or a dash and the reason why it is missing. */
export function show(node, value, text, reason = "Not known yet.") {
  const missing = value === null || value === undefined;
  say(node, missing ? "–" : text);
  const raw = missing ? "" : String(value);
  if (node.dataset.value !== raw) node.dataset.value = raw;
  const title = missing ? reason : "";
  if (node.title !== title) node.title = title;
}

export function showKey(key, value, text, reason) {
  const node = document.querySelector(`[data-key="${key}"]`);
  if (node) show(node, value, text, reason);
}

const SHAPES = {
  dot: "M6 2.5a3.5 3.5 0 1 0 .01 0z",
  square: "M2.5 2.5h7v7h-7z",
  diamond: "M6 .8 11.2 6 6 11.2.8 6z",
  cross: "M2 2l8 8M10 2l-8 8",
  back: "M3.2 3.2A4.2 4.2 0 1 1 1.9 7M3.3.6v3h3",
  plus: "M6 1.5v9M1.5 6h9",
  minus: "M1.5 6h9",
  triangle: "M6 1.2 11 10.4H1z",
  tick: "M1.5 6.5 4.8 9.8 10.5 2.5",
};
/** Mark of a status or an event: [shape, colour, is filled]. */
export const MARKS = {
  starting: ["dot", "dim", false], ok: ["dot", "ok", true], watch: ["square", "push", true],
  slow: ["diamond", "hot", true], stalled: ["diamond", "hot", false], down: ["cross", "bad", false],
  recovering: ["back", "accent", false], draining: ["dot", "accent", false], left: ["minus", "dim", false],
  median: ["dot", "dim", false],
};
export const EVENT_MARKS = {
  join: ["plus", "ok", false], crash: ["cross", "bad", false], recover: ["back", "accent", false],
  drain: ["minus", "accent", false], leave: ["minus", "dim", false], quarantine: ["triangle", "warn", true],
  checkpoint: ["diamond", "faint", true], storage: ["triangle", "bad", true], state: ["dot", "faint", true],
  scale: ["diamond", "accent", false], config: ["diamond", "accent", false], error: ["cross", "bad", false],
  slow: ["triangle", "hot", true], well: ["tick", "ok", false],
};
export const shapePath = (() => {
  const paths = new Map();
  return (name) => {
    if (!paths.has(name)) paths.set(name, new Path2D(SHAPES[name]));
    return paths.get(name);
  };
})();

export function makeMark([shape, colour, filled], label = "") {
  const svg = document.createElementNS(SVG, "svg");
  const path = document.createElementNS(SVG, "path");
  svg.append(path);
  svg.setAttribute("class", "mark");
  svg.setAttribute("viewBox", "0 0 12 12");
  svg.setAttribute("aria-hidden", "true");
  setMark(svg, [shape, colour, filled], label);
  return svg;
}

export function setMark(svg, [shape, colour, filled], label = "") {
  const key = `${shape} ${colour} ${filled}`;
  if (svg.dataset.mark === key) return;
  svg.dataset.mark = key;
  if (label) svg.dataset.status = label;
  const path = svg.firstChild;
  path.setAttribute("d", SHAPES[shape]);
  path.style.fill = filled ? `var(--${colour})` : "none";
  path.style.stroke = `var(--${colour})`;
  path.style.strokeWidth = filled ? "0" : "1.7";
  path.style.strokeLinecap = "round";
  path.style.strokeLinejoin = "round";
}

/** Radio group of buttons: [[value, text]]. Returns: a function that checks one. */
export function radios(root, choices, choose) {
  const buttons = choices.map(([value, text, title]) =>
    el("button", { type: "button", role: "radio", "data-value": value, title, onclick: () => choose(value) }, text));
  root.replaceChildren(...buttons);
  root.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    event.stopPropagation();
    const at = buttons.indexOf(document.activeElement);
    const next = buttons[(at + step + buttons.length) % buttons.length];
    next.focus();
    choose(next.dataset.value);
  });
  return (value) => {
    for (const button of buttons) {
      const on = button.dataset.value === value;
      button.setAttribute("aria-checked", String(on));
      button.tabIndex = on ? 0 : -1;
    }
    if (!choices.some(([one]) => one === value)) buttons[0].tabIndex = 0;
  };
}

/** To the clipboard, also where the page is not secure; the button says so for a moment. */
export async function copy(text, button) {
  let done = false;
  try {
    await navigator.clipboard.writeText(text);
    done = true;
  } catch {
    const area = el("textarea", { "aria-hidden": "true" });
    area.value = text;
    area.className = "unseen";
    document.body.append(area);
    area.select();
    done = document.execCommand("copy");
    area.remove();
  }
  const before = button.textContent;
  button.textContent = done ? "Copied" : "Copy failed";
  setTimeout(() => { button.textContent = before; }, 1400);
}
