// Theme: light or dark, the colours of both for canvases, and the ramp of staleness.

const STOPS = [-1, 0.12, 0.75, 1.35, 2, 2.6, 3.2];
const AREA = {
  light: ["#f3f5f8", "#e6eaf0", "#f6d494", "#ee9350", "#cf4b50", "#8a2062", "#3a0f40"],
  dark: ["#1a212b", "#242e3c", "#4b3274", "#983c88", "#df5f6b", "#fbb061", "#fdf0b0"],
};
const THIN = {
  light: ["#a9b8cc", "#93a7c1", "#d8a657", "#e8843f", "#cf4b50", "#8a2062", "#3a0f40"],
  dark: ["#4a5d77", "#5f7796", "#8a6cb4", "#bd5d9d", "#ea6f6c", "#fbb061", "#fdf0b0"],
};
const NAMES = ["page", "card", "line", "raised", "text", "dim", "faint", "compute", "fetch", "push", "data", "other", "accent", "ok", "warn", "bad", "hot", "calm", "down", "hatch", "grid"];
const KEY = "distbelief.theme";
const system = matchMedia("(prefers-color-scheme: dark)");
const forced = matchMedia("(forced-colors: active)");
const listeners = new Set();

export const theme = { name: "light", colors: {}, area: [], thin: [], areaRgb: new Uint32Array(256) };
export const FONT = 'Inter, system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif';
export const RAMP_LO = STOPS[0], RAMP_HI = STOPS[STOPS.length - 1];
export const isStill = matchMedia("(prefers-reduced-motion: reduce)");

const place = (power) => Math.max(0, Math.min(255, Math.round(((power - RAMP_LO) / (RAMP_HI - RAMP_LO)) * 255)));
/** Colour of a log2 of a ratio: of areas, and of lines and dots. */
export const areaOf = (power) => theme.area[place(power)];
export const thinOf = (power) => theme.thin[place(power)];
export const areaRgbOf = (power) => theme.areaRgb[place(power)];

function ramp(colors) {
  const rgb = colors.map((c) => [1, 3, 5].map((i) => parseInt(c.slice(i, i + 2), 16)));
  return Array.from({ length: 256 }, (_, i) => {
    const power = RAMP_LO + (i / 255) * (RAMP_HI - RAMP_LO);
    let k = 0;
    while (k < STOPS.length - 2 && power > STOPS[k + 1]) k += 1;
    const f = (power - STOPS[k]) / (STOPS[k + 1] - STOPS[k]);
    return rgb[k].map((v, c) => Math.round(v + f * (rgb[k + 1][c] - v)));
  });
}

function remembered() {
  try {
    return localStorage.getItem(KEY) ?? "";
  } catch {
    return ""; // storage is off
  }
}

function read() {
  const chosen = remembered();
  theme.name = chosen === "light" || chosen === "dark" ? chosen : system.matches ? "dark" : "light";
  document.documentElement.dataset.theme = theme.name;
  // A variable is read as it is written; a property of an element has been worked out.
  const probe = document.createElement("i");
  document.body.append(probe);
  for (const name of NAMES) {
    probe.style.color = `var(--${name})`;
    theme.colors[name] = getComputedStyle(probe).color;
  }
  if (forced.matches) {
    probe.style.color = "CanvasText";
    const text = getComputedStyle(probe).color;
    for (const name of ["text", "dim", "faint", "bad", "hatch"]) theme.colors[name] = text;
  }
  probe.remove();
  const area = ramp(AREA[theme.name]);
  const css = ([r, g, b]) => `rgb(${r} ${g} ${b})`;
  theme.area = area.map(css);
  theme.thin = ramp(THIN[theme.name]).map(css);
  area.forEach(([r, g, b], i) => { theme.areaRgb[i] = (255 << 24) | (b << 16) | (g << 8) | r; });
  for (const listener of listeners) listener();
}

export const onTheme = (listener) => listeners.add(listener);

export function switchTheme() {
  try {
    localStorage.setItem(KEY, theme.name === "dark" ? "light" : "dark");
  } catch {
    return;
  }
  read();
}

export function startTheme() {
  system.addEventListener("change", read);
  forced.addEventListener("change", read);
  addEventListener("storage", (event) => event.key === KEY && read());
  read();
}
