// How a question and an answer look: their text, and what can be done with them.
import { sources, told } from "./answer.js";
import { button, copy, element, iconButton } from "./dom.js";
import { thumbs, votes } from "./rating.js";

// Makes what goes back and forth between a message's versions; `place` says which is shown, `move` shows another.
function versions(node, { place, move }) {
  const row = element("span", undefined, "versions");
  const where = element("span");
  const back = iconButton("previous", "Previous version", () => move(node, -1));
  const forth = iconButton("next", "Next version", () => move(node, 1));
  row.append(back, where, forth);
  node.update = (busy) => {
    const [number, count] = place(node);
    row.hidden = count < 2;
    where.textContent = `${number} of ${count}`;
    back.disabled = busy || number === 1;
    forth.disabled = busy || number === count;
    for (const one of node.element.querySelectorAll("[data-asks]")) one.disabled = busy;
  };
  // who went to another version stays on the button that led there
  node.focus = (step) => {
    const [one, other] = step < 0 ? [back, forth] : [forth, back];
    (one.disabled ? other : one).focus();
  };
  return row;
}

// A button that asks the model anew, and so not while it answers.
function asking(icon, label, act) {
  const made = iconButton(icon, label, act);
  made.dataset.asks = "";
  return made;
}

function tools(...buttons) {
  const row = element("div", undefined, "tools");
  row.append(...buttons);
  return row;
}

export function question(node, acts) {
  node.element = element("article", undefined, "turn user");
  node.element.setAttribute("aria-label", "Question");
  const text = element("div", node.content, "text");
  const row = tools(asking("edit", "Edit question", () => edit(node, [text, row], acts)), versions(node, acts));
  node.element.append(text, row);
}

// The question's text becomes a field; sending it makes another version of the question.
function edit(node, hidden, acts) {
  const form = element("form", undefined, "edit");
  form.setAttribute("aria-label", "Edit question");
  const field = element("textarea", node.content);
  field.setAttribute("aria-label", "Question");
  field.rows = Math.min(8, node.content.split("\n").length + 1);
  const send = element("button", "Send");
  const close = () => {
    form.remove();
    for (const one of hidden) one.hidden = false;
    hidden[1].querySelector("button").focus();
  };
  form.append(field, button("Cancel", close), send);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (acts.busy()) return; // it waits in its field
    const said = field.value.trim();
    close();
    if (said && said !== node.content) acts.ask(said, node.parent);
  });
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { event.stopPropagation(); close(); }
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); form.requestSubmit(); }
  });
  for (const one of hidden) one.hidden = true;
  node.element.append(form);
  field.focus();
}

// An answer's place, while there is nothing in it; `names` has one model, or two that answer side by side.
export function waiting(node, names) {
  node.element = element("article", undefined, names.length > 1 ? "turn pair" : "turn assistant");
  node.element.setAttribute("aria-label", names.length > 1 ? "Two answers" : "Answer");
  node.sides = names.map((name) => {
    const side = names.length > 1 ? element("section") : node.element;
    if (side !== node.element) side.setAttribute("aria-label", `Answer of ${name}`);
    const text = element("div", undefined, "text waiting");
    const meta = element("p", name, "meta");
    side.append(text, meta);
    if (side !== node.element) node.element.append(side);
    return { side, text, meta };
  });
}

// The answer is there, or why there is none.
export function answered(node, found, acts) {
  for (const [index, { side, text, meta }] of node.sides.entries()) {
    const one = found[index];
    text.classList.remove("waiting");
    meta.textContent = told(one);
    if (one.sources.length) side.insertBefore(sources(one), meta);
    if (one.error) side.insertBefore(element("p", one.error, "wrong"), meta);
  }
  const row = tools(asking("retry", "Answer again", () => acts.retry(node)));
  const whole = found.filter((one) => one.text);
  if (found.length === 1 && whole.length) row.prepend(iconButton("copy", "Copy answer", () => copy(node.content)), ...thumbs(found[0]));
  if (whole.length === 2) {
    const buttons = votes(found, (better) => {
      node.content = found[better].text;
      for (const [index, { side }] of node.sides.entries()) side.classList.toggle("chosen", index === better);
    });
    for (const [index, { side }] of node.sides.entries()) side.append(buttons[index]);
  }
  row.append(versions(node, acts));
  node.element.append(row);
}
