// Cards of what the server keeps, made anew whenever it is asked.
import { button, element } from "./dom.js";

// A card with a heading and lines; an empty line is none.
export function card(heading, ...lines) {
  const made = element("article", undefined, "card");
  made.setAttribute("aria-label", heading);
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

// A part of a card that can be opened, and stays so when its card is made anew.
export function opened(summary, key, ...parts) {
  const made = element("details");
  const head = element("summary", summary);
  head.dataset.key = `${key} ${summary}`;
  made.append(head, ...parts);
  return made;
}

// New cards in place of the old ones. Those that say the same stay; so does what is open, and who is on a button.
export function replace(parent, cards) {
  const key = document.activeElement?.dataset?.key;
  const keyed = (root) => [...root.querySelectorAll("[data-key]")];
  const open = new Set(keyed(parent).filter((one) => one.parentElement.open).map((one) => one.dataset.key));
  for (const one of cards.flatMap(keyed)) if (open.has(one.dataset.key)) one.parentElement.open = true;
  const before = [...parent.children];
  for (const [index, now] of cards.entries()) {
    if (!before[index]) parent.append(now);
    else if (!before[index].isEqualNode(now)) before[index].replaceWith(now);
  }
  for (const old of before.slice(cards.length)) old.remove();
  if (key && document.activeElement?.dataset?.key !== key) keyed(parent).find((one) => one.dataset.key === key)?.focus();
}
