// The chat: asks, shows what is chosen of the conversation, and stops. What is said is lost with the page.
import { answer } from "./answer.js";
import { Branches } from "./branches.js";
import { $, following } from "./dom.js";
import { models } from "./models.js";
import { system } from "./settings.js";
import { answered, question, waiting } from "./turns.js";

const log = $("log");
const empty = $("empty");
let conversation = new Branches();
let running = null;

const acts = {
  ask,
  busy: () => running !== null,
  retry: (node) => reply(node.parent),
  place: (node) => conversation.place(node),
  move: (node, step) => {
    const next = conversation.move(node, step);
    if (!next) return;
    show();
    next.focus(step);
  },
};

// Brings the log to the chosen messages; those that are there already stay.
function show() {
  const elements = conversation.path().map((node) => node.element);
  if (!elements.length) elements.push(empty);
  const same = elements.findIndex((element, index) => log.children[index] !== element);
  while (log.children.length > (same < 0 ? elements.length : same)) log.lastElementChild.remove();
  if (same >= 0) log.append(...elements.slice(same));
  for (const node of conversation.path()) node.update?.(running !== null);
}

function busy(controller) {
  running = controller;
  $("send").hidden = running !== null;
  $("halt").hidden = running === null;
  log.setAttribute("aria-busy", String(running !== null));
  show();
  // whose button went away goes on writing
  if (document.activeElement === document.body) $("input").focus();
}

function ask(text, parent) {
  const node = conversation.add(parent, { role: "user", content: text });
  question(node, acts);
  return reply(node);
}

// Another answer to a question, or two side by side: the conversation goes on with the first until one is better.
async function reply(asked) {
  if (running) return;
  const talk = conversation;
  const node = talk.add(asked, { role: "assistant", content: "" });
  const names = [$("model").value, $("other").value].filter((name, index) => name || index === 0);
  waiting(node, names);
  $("status").textContent = "";
  const controller = new AbortController();
  busy(controller);
  log.scrollTop = log.scrollHeight;
  const messages = [...system(), ...talk.said(asked)];
  const found = await Promise.all(names.map((name, index) => answer(name, messages, node.sides[index].text, controller.signal)));
  node.content = found.find((one) => one.text)?.text ?? "";
  following(log, () => {
    answered(node, found, acts);
    busy(null);
  });
}

function grow() {
  $("input").style.height = "auto";
  $("input").style.height = `${$("input").scrollHeight + 2}px`;
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("input").value.trim();
  if (!text || running) return;
  $("input").value = "";
  grow();
  ask(text, conversation.last());
});
$("input").addEventListener("input", grow);
$("input").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); $("form").requestSubmit(); }
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
$("halt").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", () => {
  running?.abort();
  conversation = new Branches();
  $("status").textContent = "";
  show();
  $("input").focus();
});
models();
