// The tabs: one view at a time, by mouse or arrows. The view that is shown is told so, and again every now and then.
import { $ } from "./dom.js";
import { adapters } from "./adapters.js";
import { jobs } from "./training.js";

const REFRESH = { chat: () => {}, training: jobs, adapters };
const TABS = Object.keys(REFRESH);
const POLL_MILLISECONDS = 2000;
let shown = "chat";

function choose(name) {
  shown = name;
  for (const tab of TABS) {
    const chosen = tab === name;
    $(`view-${tab}`).hidden = !chosen;
    $(`tab-${tab}`).setAttribute("aria-selected", String(chosen));
    $(`tab-${tab}`).tabIndex = chosen ? 0 : -1;
  }
  REFRESH[name]();
}

for (const [index, tab] of TABS.entries()) {
  $(`tab-${tab}`).addEventListener("click", () => choose(tab));
  $(`tab-${tab}`).addEventListener("keydown", (event) => {
    const to = { ArrowRight: index + 1, ArrowLeft: index - 1 + TABS.length, Home: 0, End: TABS.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    choose(TABS[to % TABS.length]);
    $(`tab-${shown}`).focus();
  });
}

document.addEventListener("key-given", () => REFRESH[shown]());
setInterval(() => { if (!document.hidden) REFRESH[shown](); }, POLL_MILLISECONDS);
