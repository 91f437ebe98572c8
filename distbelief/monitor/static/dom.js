// Elements. Text is set as text, whatever a worker is called.

export function $(id) {
  return document.getElementById(id);
}

export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "on") for (const [what, call] of Object.entries(value)) element.addEventListener(what, call);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined).map(String_or_node));
  return element;
}

function String_or_node(child) {
  return child instanceof Node ? child : String(child);
}

export function setText(element, text) {
  if (element && element.textContent !== text) element.textContent = text;
}

export function put(key, text) {
  setText(document.querySelector(`[data-key="${key}"]`), text);
}

// A row of choices of which one is taken, by mouse or arrow keys.
export function segments(box, choices, chosen, choose) {
  box.replaceChildren();
  const buttons = choices.map(([value, label]) => {
    const button = make("button", { role: "radio", type: "button", "data-value": value }, label);
    button.addEventListener("click", () => take(value));
    return button;
  });
  box.append(...buttons);
  box.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    event.stopPropagation();
    const at = buttons.indexOf(document.activeElement);
    const next = buttons[(at + step + buttons.length) % buttons.length];
    next.focus();
    take(next.dataset.value);
  });
  function show(value) {
    for (const button of buttons) {
      const is = button.dataset.value === value;
      button.setAttribute("aria-checked", String(is));
      button.tabIndex = is ? 0 : -1;
    }
  }
  function take(value) {
    show(value);
    choose(value);
  }
  show(chosen);
  return show;
}
