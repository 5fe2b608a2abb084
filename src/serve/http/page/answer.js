// One answer as it grows: its text, what it cost, and how likely its tokens were.
import { events, request } from "./api.js";
import { $, element, following } from "./dom.js";
import { renderer } from "./markdown.js";
import { sampling } from "./settings.js";

// Fills `parent`, until `signal`. What comes back has the text so far, also where it ended early (`stopped`, `error`).
export async function answer(model, messages, parent, signal) {
  const how = sampling();
  const shown = how.logprobs ? null : renderer(parent, $("log"));
  const found = { text: "", usage: null, id: null, fingerprint: null, sources: [], model, messages, stopped: false, error: null };
  const began = performance.now();
  let first = null, parts = 0;
  try {
    const body = { ...how, model: model || undefined, messages, stream: true, stream_options: { include_usage: true } };
    const response = await request("POST", "/v1/chat/completions", body, signal);
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      found.usage = event.usage ?? found.usage;
      found.id = event.id;
      found.fingerprint = event.system_fingerprint;
      found.model = event.model;
      const choice = event.choices[0];
      found.sources = choice?.sources ?? found.sources;
      const tokens = (how.logprobs && choice?.logprobs?.content) || [];
      if (tokens.length) following($("log"), () => parent.append(...tokens.map(token)));
      const more = choice?.delta?.content ?? "";
      if (more) {
        first ??= performance.now();
        parts += 1;
      }
      found.text += more;
      if (more) shown?.add(more);
    }
  } catch (error) {
    found.stopped = error.name === "AbortError";
    if (!found.stopped) found.error = error.message;
  }
  // with retrieval many tokens come at once, and the first ones took time, too
  const since = 2 * parts < (found.usage?.completion_tokens ?? 0) ? began : first;
  found.seconds = first === null ? 0 : (performance.now() - since) / 1000;
  await shown?.whole();
  return found;
}

// A token, marked where the model was not sure; what else was likely is its tooltip.
function token(one) {
  const likely = Math.exp(one.logprob);
  const made = element("span", one.token, `token ${likely >= 0.5 ? "likely" : likely >= 0.1 ? "unsure" : "unlikely"}`);
  const lines = one.top_logprobs.map((other) => `${JSON.stringify(other.token)} ${Math.exp(other.logprob).toFixed(2)}`);
  made.title = lines.join("\n");
  // where nothing hovers, a tap tells
  made.addEventListener("click", () => { $("status").textContent = lines.join("  "); });
  return made;
}

// The passages that an answer was written under; their texts are there for whoever opens them.
export function sources(found) {
  const made = element("details", undefined, "sources");
  const names = [...new Set(found.sources.map((one) => one.source))];
  made.append(element("summary", `Sources: ${names.join(", ")}`));
  for (const { source, text } of found.sources) {
    const quote = element("blockquote", text);
    made.append(element("p", source, "meta"), quote);
  }
  return made;
}

// Who answered, what it cost, and how it ended.
export function told(found) {
  const parts = [found.model];
  if (found.usage) {
    const { prompt_tokens: asked, completion_tokens: said } = found.usage;
    parts.push(`${asked} + ${said} tokens`);
    if (said > 1 && found.seconds > 0) parts.push(`${((said - 1) / found.seconds).toFixed(1)} tokens/s`);
  }
  if (found.stopped) parts.push("stopped");
  return parts.filter((part) => part).join(" · ");
}
