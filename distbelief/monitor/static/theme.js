// Light and dark: colours for what is drawn. What the style sheet says is read, not said again.

import { $ } from "./dom.js";

const RAMPS = {
  light: {
    area: ["#f3f5f8", "#e6eaf0", "#f6d494", "#ee9350", "#cf4b50", "#8a2062", "#3a0f40"],
    thin: ["#a9b8cc", "#93a7c1", "#d8a657", "#e8843f", "#cf4b50", "#8a2062", "#3a0f40"],
  },
  dark: {
    area: ["#1a212b", "#242e3c", "#4b3274", "#983c88", "#df5f6b", "#fbb061", "#fdf0b0"],
    thin: ["#4a5d77", "#5f7796", "#8a6cb4", "#bd5d9d", "#ea6f6c", "#fbb061", "#fdf0b0"],
  },
};
// log2 of multiples of the fair share
const STOPS = [-1, 0.12, 0.75, 1.35, 2, 2.6, 3.2];
const NAMES = ["page", "card", "line", "text", "dim", "faint", "compute", "fetch", "push", "data", "other",
  "accent", "ok", "warn", "bad", "hot", "soft", "down", "hatch"];

let colors = null;
const listeners = [];

export function theme() {
  if (colors) return colors;
  const style = getComputedStyle(document.documentElement);
  colors = { name: document.documentElement.dataset.theme };
  for (const name of NAMES) colors[name] = style.getPropertyValue("--" + name).trim();
  colors.font = style.fontFamily;
  return colors;
}

export function onTheme(call) {
  listeners.push(call);
}

export function startTheme() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const stored = () => { try { return localStorage.getItem("distbelief-theme"); } catch { return null; } };
  const apply = (name) => {
    document.documentElement.dataset.theme = name;
    colors = null;
    for (const call of listeners) call();
  };
  apply(stored() ?? (dark.matches ? "dark" : "light"));
  dark.addEventListener("change", () => { if (!stored()) apply(dark.matches ? "dark" : "light"); });
  const toggle = () => {
    const name = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    try { localStorage.setItem("distbelief-theme", name); } catch { /* not remembered then */ }
    apply(name);
  };
  $("theme").addEventListener("click", toggle);
  return toggle;
}

function rgb(hex) {
  return [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
}

// [r, g, b] of a multiple of the fair share.
export function rampAt(value, kind = "area") {
  const colors = RAMPS[theme().name === "dark" ? "dark" : "light"][kind];
  const x = Math.log2(Math.max(value, 1e-6));
  if (x <= STOPS[0]) return rgb(colors[0]);
  for (let i = 1; i < STOPS.length; i++) {
    if (x <= STOPS[i]) {
      const share = (x - STOPS[i - 1]) / (STOPS[i] - STOPS[i - 1]);
      const [a, b] = [rgb(colors[i - 1]), rgb(colors[i])];
      return a.map((v, k) => Math.round(v + (b[k] - v) * share));
    }
  }
  return rgb(colors[colors.length - 1]);
}

export function rampColor(value, kind = "area") {
  const [r, g, b] = rampAt(value, kind);
  return `rgb(${r} ${g} ${b})`;
}
