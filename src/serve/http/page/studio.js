// The tabs of training and adapters: what the server keeps, and what can be done with it.
import { headers, models, problem } from "/chat.js";

const $ = (id) => document.getElementById(id);
const TABS = ["chat", "training", "adapters"];
const UNDER_WAY = ["validating_files", "queued", "running", "paused"];
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
  refresh();
}

for (const [index, tab] of TABS.entries()) {
  $(`tab-${tab}`).addEventListener("click", () => choose(tab));
  $(`tab-${tab}`).addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = TABS[(index + step + TABS.length) % TABS.length];
    choose(next);
    $(`tab-${next}`).focus();
  });
}

// The server's answer, or null after a word about why there is none.
async function call(method, path, body, status) {
  const json = body !== undefined && !(body instanceof FormData);
  try {
    const response = await fetch(path, {
      method, body: json ? JSON.stringify(body) : body, headers: headers(json ? { "content-type": "application/json" } : {}),
    });
    if (response.ok) return await response.json();
    $(status).textContent = await problem(response);
  } catch {
    $(status).textContent = "the server cannot be reached";
  }
  return null;
}

function element(kind, text, className) {
  const made = document.createElement(kind);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

// `key` finds the button again when its card is made anew.
function button(text, key, act) {
  const made = element("button", text);
  made.type = "button";
  made.dataset.key = `${key} ${text}`;
  made.addEventListener("click", async () => { made.disabled = true; await act(); refresh(); });
  return made;
}

// New cards in place of the old ones; who was on a button stays there.
function replace(parent, cards) {
  const key = document.activeElement?.dataset?.key;
  parent.replaceChildren(...cards);
  if (key) [...parent.querySelectorAll("button")].find((one) => one.dataset.key === key)?.focus();
}

function size(bytes) {
  return bytes < 1 << 20 ? `${(bytes / 1024).toFixed(0)} KiB` : `${(bytes / (1 << 20)).toFixed(1)} MiB`;
}

// Losses as a line; its words are for those who do not see it.
function chart(losses) {
  const svg = $("chart").content.firstElementChild.cloneNode(true);
  const [low, high] = [Math.min(...losses), Math.max(...losses)];
  svg.setAttribute("aria-label", `Loss from ${losses[0].toFixed(3)} to ${losses.at(-1).toFixed(3)}`);
  const at = (loss, index) => `${(100 * index) / Math.max(1, losses.length - 1)},${95 - (90 * (loss - low)) / (high - low || 1)}`;
  svg.firstElementChild.setAttribute("points", losses.map(at).join(" "));
  return svg;
}

async function jobCard(job) {
  const card = element("article", undefined, "card");
  card.append(element("h2", job.fine_tuned_model ?? job.id), element("p", `${job.status} · ${job.method.type}`));
  const list = await call("GET", `/v1/fine_tuning/jobs/${job.id}/events?limit=1000`, undefined, "training-status");
  const events = list?.data ?? [];
  const steps = events.filter((event) => event.type === "metrics" && typeof event.data.train_loss === "number").reverse();
  if (steps.length > 1) card.append(chart(steps.map((event) => event.data.train_loss)));
  const last = steps.at(-1)?.data;
  if (last) card.append(element("p", `Step ${last.step} of ${last.total_steps}, loss ${last.train_loss.toFixed(4)}`, "meta"));
  if (job.error) card.append(element("p", job.error.message, "turn wrong"));
  if (UNDER_WAY.includes(job.status)) {
    const row = element("div", undefined, "rate");
    const path = `/v1/fine_tuning/jobs/${job.id}`;
    const [word, act] = job.status === "paused" ? ["Resume", "resume"] : ["Pause", "pause"];
    row.append(button(word, job.id, () => call("POST", `${path}/${act}`, undefined, "training-status")));
    row.append(button("Cancel", job.id, () => call("POST", `${path}/cancel`, undefined, "training-status")));
    card.append(row);
  }
  return card;
}

let finished = new Set();

async function jobs() {
  const list = await call("GET", "/v1/fine_tuning/jobs?limit=20", undefined, "training-status");
  if (!list?.data.length) return;
  const cards = await Promise.all(list.data.map(jobCard));
  replace($("jobs"), cards);
  const done = new Set(list.data.filter((job) => job.status === "succeeded").map((job) => job.id));
  if ([...done].some((id) => !finished.has(id))) models();
  finished = done;
}

function adapterCard(adapter) {
  const card = element("article", undefined, "card");
  const from = Object.entries(adapter.lineage).filter(([name]) => name !== "base")
    .map(([name, value]) => `${name.replace("_", " ")} ${String(value).slice(0, 40)}`);
  card.append(
    element("h2", adapter.id),
    element("p", `Generation ${adapter.generation} · ${adapter.method} · ${size(adapter.bytes)} · ${adapter.hash.slice(0, 12)}`),
    element("p", from.join(" · "), "meta"),
    element("p", `${adapter.traffic.requests} answers, ${adapter.traffic.generated_tokens} tokens`, "meta"),
  );
  const row = element("div", undefined, "rate");
  const path = `/v1/adapters/${encodeURIComponent(adapter.id)}`;
  if (adapter.generations.length > 1) row.append(button("Roll back", adapter.id, () => call("POST", `${path}/rollback`, {}, "adapters-status")));
  row.append(button("Take away", adapter.id, async () => { await call("DELETE", path, undefined, "adapters-status"); models(); }));
  card.append(row);
  return card;
}

async function adapters() {
  const list = await call("GET", "/v1/adapters", undefined, "adapters-status");
  if (!list) return;
  const none = [element("p", "No adapters yet.", "meta")];
  replace($("adapters"), list.data.length ? list.data.map(adapterCard) : none);
}

async function refresh() {
  if (document.hidden) return;
  if (shown === "training") await jobs();
  if (shown === "adapters") await adapters();
}

$("train").addEventListener("submit", async (event) => {
  event.preventDefault();
  const form = new FormData();
  form.append("purpose", "fine-tune");
  form.append("file", $("rows").files[0]);
  $("training-status").textContent = "Uploading …";
  const file = await call("POST", "/v1/files", form, "training-status");
  if (!file) return;
  const list = await call("GET", "/v1/models", undefined, "training-status");
  const epochs = $("epochs").valueAsNumber;
  const method = { type: $("method").value, [$("method").value]: { hyperparameters: Number.isNaN(epochs) ? {} : { n_epochs: epochs } } };
  const job = await call("POST", "/v1/fine_tuning/jobs", {
    model: list?.data.find((model) => !model.parent)?.id, training_file: file.id, method,
    ...($("suffix").value ? { suffix: $("suffix").value } : {}),
  }, "training-status");
  if (job) $("training-status").textContent = "";
  refresh();
});

$("load").addEventListener("submit", async (event) => {
  event.preventDefault();
  const loaded = await call("POST", "/v1/adapters", { name: $("adapter-name").value, path: $("adapter-path").value }, "adapters-status");
  if (loaded) { $("adapters-status").textContent = `${loaded.id} answers.`; models(); }
  refresh();
});

setInterval(refresh, POLL_MILLISECONDS);
