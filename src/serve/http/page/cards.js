// Cards of what the server keeps, made anew whenever it is asked.
import { button, element } from "./dom.js";

// A card with a heading and lines; an empty line is none.
export function card(heading, ...lines) {
  const made = element("article", undefined, "card");
  made.append(element("h2", heading), ...lines.filter((line) => line).map((line) => element("p", line)));
  return made;
}

// Bytes in a unit that fits.
export function size(bytes) {
  const [unit, word] = bytes < 1 << 20 ? [1 << 10, "KiB"] : bytes < 1 << 30 ? [1 << 20, "MiB"] : [1 << 30, "GiB"];
  return `${(bytes / unit).toFixed(unit === 1 << 10 ? 0 : 1)} ${word}`;
}

// A button of a card; `key` finds it again when its card is made anew. `refresh` makes them anew.
export function action(text, key, act, refresh) {
  const made = button(text, async () => { made.disabled = true; await act(); refresh(); });
  made.dataset.key = `${key} ${text}`;
  return made;
}

export function actions(...buttons) {
  const row = element("div", undefined, "tools");
  row.append(...buttons);
  return row;
}

// New cards in place of the old ones; who was on a button stays there.
export function replace(parent, cards) {
  const key = document.activeElement?.dataset?.key;
  parent.replaceChildren(...cards);
  if (key) [...parent.querySelectorAll("button")].find((one) => one.dataset.key === key)?.focus();
}
