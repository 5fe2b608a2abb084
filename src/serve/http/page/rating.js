// What people think of answers: thumbs for one, a vote between two. The server keeps it, to learn from.
import { call } from "./api.js";
import { $, button, iconButton } from "./dom.js";

async function keep(body) {
  const kept = await call($("status"), "POST", "/v1/feedback", body);
  if (kept) $("status").textContent = "Kept, to learn from.";
  return kept !== null;
}

function of(found) {
  const { messages, text, model, id, fingerprint } = found;
  return { messages, answer: text, model, id, ...(fingerprint ? { system_fingerprint: fingerprint } : {}) };
}

function settle(buttons, pressed) {
  for (const one of buttons) {
    one.disabled = true;
    one.setAttribute("aria-pressed", String(one === pressed));
  }
}

// Two buttons for an answer.
export function thumbs(found) {
  const buttons = [["up", "Good answer"], ["down", "Bad answer"]].map(([word, label]) => {
    const made = iconButton(word, label, async () => {
      if (await keep({ ...of(found), rating: word })) settle(buttons, made);
    });
    made.setAttribute("aria-pressed", "false");
    return made;
  });
  return buttons;
}

// A button for each of two answers; `chosen` hears which is better.
export function votes(pair, chosen) {
  const buttons = pair.map((found, index) => {
    const worse = pair[1 - index];
    const made = button("This one is better", async () => {
      if (!await keep({ ...of(found), rejected: worse.text, rejected_model: worse.model })) return;
      settle(buttons, made);
      chosen(index);
    });
    made.setAttribute("aria-pressed", "false");
    return made;
  });
  return buttons;
}
