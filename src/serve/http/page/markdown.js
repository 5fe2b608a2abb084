// Markdown as it grows: rendered and cleaned by the server, at most a few times a second; code can be copied.
import { request } from "./api.js";
import { button, copy, element, following } from "./dom.js";

const PAUSE_MILLISECONDS = 120;

// Shows `html` in `element` and leaves the blocks that did not change alone: what is selected in them stays so.
function update(parent, html, before) {
  const template = element("template");
  template.innerHTML = html;
  const blocks = [...template.content.children];
  const now = blocks.map((block) => block.outerHTML);
  const same = now.findIndex((block, index) => block !== before[index]);
  const from = same < 0 ? now.length : same;
  while (parent.children.length > from) parent.lastElementChild.remove();
  parent.append(...blocks.slice(from).map(withCopy));
  return now;
}

function withCopy(block) {
  for (const code of block.matches("pre") ? [block] : block.querySelectorAll("pre")) {
    const frame = element("div", undefined, "code");
    const copier = button("Copy", async () => {
      await copy(code.textContent);
      copier.textContent = "Copied";
      setTimeout(() => { copier.textContent = "Copy"; }, 1500);
    });
    copier.setAttribute("aria-label", "Copy code");
    code.tabIndex = 0; // it may be wider than the page, and keys scroll it
    code.replaceWith(frame);
    frame.append(copier, code);
    if (code === block) block = frame;
  }
  return block;
}

// Takes a text piece by piece; `scroller` stays at its end where it was there. `whole` waits until all is shown.
export function renderer(parent, scroller) {
  let text = "", shown = "", blocks = [], working = null;
  async function render() {
    while (shown !== text) {
      const now = text;
      let html;
      try {
        html = await (await request("POST", "/markdown", now)).text();
      } catch {
        html = null; // too long, or nobody there: the text as it is
      }
      following(scroller, () => {
        if (html === null) [parent.textContent, blocks] = [now, []];
        else blocks = update(parent, html, blocks);
      });
      shown = now;
      if (shown !== text) await new Promise((resolve) => { setTimeout(resolve, PAUSE_MILLISECONDS); });
    }
    working = null;
  }
  return {
    add: (more) => { text += more; working ??= render(); },
    whole: async () => working,
  };
}
