// The web chat. Talks to the same API as every other client; answers come as server-sent events.
const $ = (id) => document.getElementById(id);
const log = $("log");
let history = [];
let running = null;

$("key").value = sessionStorage.getItem("key") ?? "";
$("key").addEventListener("change", () => { sessionStorage.setItem("key", $("key").value); models(); });

function headers(extra) {
  const key = $("key").value;
  return key ? { ...extra, authorization: `Bearer ${key}` } : { ...extra };
}

async function problem(response) {
  if (response.status === 401) settings(true);
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

async function models() {
  try {
    const response = await fetch("/v1/models", { headers: headers() });
    if (!response.ok) { $("status").textContent = await problem(response); return; }
    const before = $("model").value;
    $("model").replaceChildren(...(await response.json()).data.map((model) => new Option(model.id, model.id)));
    if ([...$("model").options].some((option) => option.value === before)) $("model").value = before;
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

async function ask(question) {
  turn("user", question);
  history.push({ role: "user", content: question });
  $("status").textContent = "";
  const element = turn("assistant waiting", "");
  const show = renderer(element);
  const system = $("system").value.trim();
  const body = {
    model: $("model").value || undefined,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...history],
    temperature: number("temperature"), top_p: number("top_p"), max_tokens: number("max_tokens"), seed: number("seed"),
    stream: true, stream_options: { include_usage: true },
  };
  running = new AbortController();
  busy(true);
  const start = performance.now();
  let answer = "", usage = null, first = null;
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST", signal: running.signal, body: JSON.stringify(body),
      headers: headers({ "content-type": "application/json" }),
    });
    if (!response.ok) throw new Error(await problem(response));
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      usage = event.usage ?? usage;
      const more = event.choices[0]?.delta?.content ?? "";
      if (more) { first ??= performance.now(); answer += more; show(more); }
    }
  } catch (error) {
    // a TypeError is all that the browser says of a connection that failed
    if (error.name !== "AbortError") turn("wrong", error instanceof TypeError ? "the server cannot be reached" : error.message);
  }
  element.classList.remove("waiting");
  if (answer) history.push({ role: "assistant", content: answer });
  else { history.pop(); element.remove(); }
  if (usage) {
    const seconds = (performance.now() - (first ?? start)) / 1000;
    const speed = usage.completion_tokens > 1 ? `, ${((usage.completion_tokens - 1) / seconds).toFixed(1)} tokens/s` : "";
    $("status").textContent = `${usage.prompt_tokens} + ${usage.completion_tokens} tokens${speed}`;
  }
  running = null;
  busy(false);
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
