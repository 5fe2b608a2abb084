// The web chat. Talks to the same API as every other client; answers come as server-sent events.
const $ = (id) => document.getElementById(id);
const log = $("log");
let history = [];
let running = null;

$("key").value = sessionStorage.getItem("key") ?? "";
$("key").addEventListener("change", () => { sessionStorage.setItem("key", $("key").value); models(); });

export function headers(extra) {
  const key = $("key").value;
  return key ? { ...extra, authorization: `Bearer ${key}` } : { ...extra };
}

export async function problem(response) {
  if (response.status === 401) settings(true);
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

export async function models() {
  try {
    const response = await fetch("/v1/models", { headers: headers() });
    if (!response.ok) { $("status").textContent = await problem(response); return; }
    const names = (await response.json()).data.map((model) => model.id);
    for (const [id, first] of [["model", []], ["other", [new Option("Nobody", "")]]]) {
      const before = $(id).value;
      $(id).replaceChildren(...first, ...names.map((name) => new Option(name, name)));
      if ([...$(id).options].some((option) => option.value === before)) $(id).value = before;
    }
    $("status").textContent = "";
  } catch {
    $("status").textContent = "the server cannot be reached";
  }
}

function settings(open) {
  $("panel").hidden = !open;
  $("toggle").setAttribute("aria-expanded", String(open));
}

function turn(role, text) {
  $("empty")?.remove();
  const element = document.createElement("div");
  element.className = `turn ${role}`;
  element.textContent = text;
  log.append(element);
  log.scrollTop = log.scrollHeight;
  return element;
}

// Markdown is rendered and cleaned by the server; at most a few times a second, and once at the end.
function renderer(element) {
  let text = "", shown = "", busy = false;
  async function render() {
    if (busy || text === shown) return;
    busy = true;
    const now = text;
    try {
      const response = await fetch("/markdown", { method: "POST", body: now, headers: headers({ "content-type": "text/plain" }) });
      if (response.ok) {
        const below = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
        element.innerHTML = await response.text();
        if (below) log.scrollTop = log.scrollHeight;
      } else {
        element.textContent = now;
      }
    } catch {
      element.textContent = now;
    }
    shown = now;
    busy = false;
    setTimeout(render, 120);
  }
  return (more) => { text += more; render(); };
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ")) continue;
      if (part === "data: [DONE]") return;
      yield JSON.parse(part.slice(6));
    }
  }
}

function number(id) {
  const value = $(id).valueAsNumber;
  return Number.isNaN(value) ? undefined : value;
}

// One answer as it grows. `show` gets its text piece by piece; what it cost comes with the end.
async function answer(model, messages, element) {
  const probabilities = $("probabilities").checked;
  const show = probabilities ? null : renderer(element);
  const body = {
    model: model || undefined, messages,
    temperature: number("temperature"), top_p: number("top_p"), max_tokens: number("max_tokens"), seed: number("seed"),
    stream: true, stream_options: { include_usage: true },
    ...(probabilities ? { logprobs: true, top_logprobs: 3 } : {}),
  };
  const found = { text: "", usage: null, first: null, id: null, fingerprint: null, model: model || null };
  const start = performance.now();
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST", signal: running.signal, body: JSON.stringify(body),
      headers: headers({ "content-type": "application/json" }),
    });
    if (!response.ok) throw new Error(await problem(response));
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      found.usage = event.usage ?? found.usage;
      found.id = event.id;
      found.fingerprint = event.system_fingerprint;
      found.model = event.model;
      const choice = event.choices[0];
      if (probabilities) for (const token of choice?.logprobs?.content ?? []) element.append(shown(token));
      const more = choice?.delta?.content ?? "";
      if (more) { found.first ??= performance.now(); found.text += more; show?.(more); }
    }
  } catch (error) {
    // a TypeError is all that the browser says of a connection that failed
    if (error.name !== "AbortError") turn("wrong", error instanceof TypeError ? "the server cannot be reached" : error.message);
  }
  element.classList.remove("waiting");
  found.seconds = (performance.now() - (found.first ?? start)) / 1000;
  return found;
}

// A token, marked when the model was not sure; what else was likely is its title.
function shown(token) {
  const element = document.createElement("span");
  const likely = Math.exp(token.logprob);
  element.className = `token ${likely >= 0.5 ? "likely" : likely >= 0.1 ? "unsure" : "unlikely"}`;
  element.textContent = token.token;
  element.title = token.top_logprobs.map((other) => `${JSON.stringify(other.token)} ${Math.exp(other.logprob).toFixed(2)}`).join("\n");
  return element;
}

function system() {
  const text = $("system").value.trim();
  return text ? [{ role: "system", content: text }] : [];
}

async function ask(question) {
  turn("user", question);
  history.push({ role: "user", content: question });
  $("status").textContent = "";
  const messages = [...system(), ...history];
  running = new AbortController();
  busy(true);
  if ($("other").value) await two(messages);
  else await one(messages);
  running = null;
  busy(false);
}

async function one(messages) {
  const element = turn("assistant waiting", "");
  const found = await answer($("model").value, messages, element);
  if (!found.text) { history.pop(); element.remove(); return; }
  history.push({ role: "assistant", content: found.text });
  ratings(messages, found);
  tell([found]);
}

// Two answers side by side. The conversation goes on with the one that is better, or with the first.
async function two(messages) {
  const pair = turn("pair", "");
  const sides = ["model", "other"].map((id) => {
    const side = document.createElement("div");
    const name = document.createElement("p");
    name.className = "meta";
    name.textContent = $(id).value;
    const text = document.createElement("div");
    text.className = "turn assistant waiting";
    side.append(name, text);
    pair.append(side);
    return { side, text, model: $(id).value };
  });
  const found = await Promise.all(sides.map(({ model, text }) => answer(model, messages, text)));
  if (!found[0].text || !found[1].text) {
    const left = found[0].text || found[1].text;
    if (left) history.push({ role: "assistant", content: left });
    else { history.pop(); pair.remove(); }
    return;
  }
  const said = { role: "assistant", content: found[0].text };
  history.push(said);
  tell(found);
  const buttons = sides.map(({ side }, index) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = "This one is better";
    button.setAttribute("aria-pressed", "false");
    const row = document.createElement("div");
    row.className = "rate";
    row.append(button);
    side.append(row);
    button.addEventListener("click", async () => {
      const [better, worse] = [found[index], found[1 - index]];
      const kept = await feedback({
        messages, answer: better.text, model: better.model, id: better.id,
        rejected: worse.text, rejected_model: worse.model,
        ...(better.fingerprint ? { system_fingerprint: better.fingerprint } : {}),
      });
      if (!kept) return;
      said.content = better.text;
      sides.forEach((one, number) => one.side.classList.toggle("chosen", number === index));
      buttons.forEach((one, number) => { one.disabled = true; one.setAttribute("aria-pressed", String(number === index)); });
    });
    return button;
  });
}

function ratings(messages, found) {
  const row = document.createElement("div");
  row.className = "rate";
  for (const [word, label, sign] of [["up", "Good answer", "👍"], ["down", "Bad answer", "👎"]]) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = sign;
    button.setAttribute("aria-label", label);
    button.setAttribute("aria-pressed", "false");
    button.addEventListener("click", async () => {
      const kept = await feedback({
        messages, answer: found.text, model: found.model, id: found.id, rating: word,
        ...(found.fingerprint ? { system_fingerprint: found.fingerprint } : {}),
      });
      if (!kept) return;
      for (const other of row.children) { other.disabled = true; other.setAttribute("aria-pressed", String(other === button)); }
    });
    row.append(button);
  }
  log.append(row);
  log.scrollTop = log.scrollHeight;
}

async function feedback(body) {
  try {
    const response = await fetch("/v1/feedback", {
      method: "POST", body: JSON.stringify(body), headers: headers({ "content-type": "application/json" }),
    });
    $("status").textContent = response.ok ? "Kept, to learn from." : await problem(response);
    return response.ok;
  } catch {
    $("status").textContent = "the server cannot be reached";
    return false;
  }
}

function tell(found) {
  $("status").textContent = found.filter((one) => one.usage).map(({ usage, seconds }) => {
    const speed = usage.completion_tokens > 1 ? `, ${((usage.completion_tokens - 1) / seconds).toFixed(1)} tokens/s` : "";
    return `${usage.prompt_tokens} + ${usage.completion_tokens} tokens${speed}`;
  }).join(" · ");
}

function busy(now) {
  $("send").hidden = now;
  $("stop").hidden = !now;
  if (!now) $("input").focus();
}

function grow() {
  $("input").style.height = "auto";
  $("input").style.height = `${$("input").scrollHeight + 2}px`;
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = $("input").value.trim();
  if (!question || running) return;
  $("input").value = "";
  grow();
  ask(question);
});
$("input").addEventListener("input", grow);
$("input").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); $("form").requestSubmit(); }
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
$("stop").addEventListener("click", () => running?.abort());
$("toggle").addEventListener("click", () => settings($("panel").hidden));
$("clear").addEventListener("click", () => {
  running?.abort();
  history = [];
  log.replaceChildren();
  $("status").textContent = "";
  $("input").focus();
});
models();
