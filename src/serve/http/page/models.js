// Who answers: the names of the models and adapters, in both lists.
import { call } from "./api.js";
import { $, element } from "./dom.js";

function option(name, value) {
  const made = element("option", name);
  made.value = value;
  return made;
}

export async function models() {
  const list = await call($("status"), "GET", "/v1/models");
  if (!list) return;
  for (const [id, first] of [["model", []], ["other", [option("Nobody", "")]]]) {
    const before = $(id).value;
    $(id).replaceChildren(...first, ...list.data.map((model) => option(model.id, model.id)));
    if ([...$(id).options].some((one) => one.value === before)) $(id).value = before;
  }
  $("status").textContent = "";
}

document.addEventListener("key-given", models);
