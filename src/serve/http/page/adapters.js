// The adapters: what they come from, their size and traffic; loading, the generation before, taking them away.
import { call } from "./api.js";
import { action, actions, card, replace, size } from "./cards.js";
import { $, element } from "./dom.js";
import { models } from "./models.js";

const status = $("adapters-status");

function adapterCard(adapter) {
  const from = Object.entries(adapter.lineage).filter(([name]) => name !== "base")
    .map(([name, value]) => `${name.replace("_", " ")} ${String(value).slice(0, 40)}`);
  const made = card(
    adapter.id,
    `Generation ${adapter.generation} · ${adapter.method} · ${size(adapter.bytes)} · ${adapter.hash.slice(0, 12)}`,
    from.join(" · "),
    `Answers: ${adapter.traffic.requests}, with ${adapter.traffic.generated_tokens} tokens`,
  );
  const path = `/v1/adapters/${encodeURIComponent(adapter.id)}`;
  const row = actions();
  if (adapter.generations.length > 1) {
    row.append(action("Roll back", adapter.id, () => call(status, "POST", `${path}/rollback`, {}), adapters));
  }
  row.append(action("Take away", adapter.id, async () => { await call(status, "DELETE", path); await models(); }, adapters));
  made.append(row);
  return made;
}

export async function adapters() {
  const list = await call(status, "GET", "/v1/adapters");
  if (!list) return;
  const none = [element("p", "No adapters yet.", "meta")];
  replace($("adapters"), list.data.length ? list.data.map(adapterCard) : none);
}

$("load").addEventListener("submit", async (event) => {
  event.preventDefault();
  const loaded = await call(status, "POST", "/v1/adapters", { name: $("adapter-name").value, path: $("adapter-path").value });
  if (loaded) {
    status.textContent = `${loaded.id} answers.`;
    models();
  }
  adapters();
});
