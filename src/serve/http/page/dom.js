// Pieces of the page: elements with their text, and buttons with a name or an icon.
export const $ = (id) => document.getElementById(id);

export function element(kind, text, className) {
  const made = document.createElement(kind);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

export function button(text, act, className) {
  const made = element("button", text, className);
  made.type = "button";
  made.addEventListener("click", act);
  return made;
}

// A button that shows one of the page's drawings; `label` is its name, and its tooltip.
export function iconButton(icon, label, act) {
  const made = button(undefined, act, "icon");
  made.append($("icons").content.querySelector(`#${icon}`).cloneNode(true));
  made.firstElementChild.removeAttribute("id");
  made.setAttribute("aria-label", label);
  made.title = label;
  return made;
}

const CLOSE_TO_THE_END = 80; // pixels

// Makes a change to what `scroller` shows; it stays at its end where it was there.
export function following(scroller, change) {
  const below = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < CLOSE_TO_THE_END;
  change();
  if (below) scroller.scrollTop = scroller.scrollHeight;
}

// Where no other page may read the clipboard's interface (plain HTTP from another machine), the older way.
export async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = element("textarea", text, "hidden");
  const before = document.activeElement;
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
  before?.focus();
}
