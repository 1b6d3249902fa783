"""One page to try the model in a browser; nothing in it is loaded from elsewhere, and it sends to its own server alone."""

from __future__ import annotations

import base64
import hashlib

STYLE = """
:root { color-scheme: light dark;
  --page: #f6f6f4; --card: #fcfcfb; --ink: #161615; --soft: #5c5b57; --line: #dddcd6; --own: #2a6fd0; }
@media (prefers-color-scheme: dark) {
  :root { --page: #121211; --card: #1b1b1a; --ink: #f2f1ec; --soft: #b3b1a9; --line: #3a3936; --own: #6da7ec; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 860px; margin: 0 auto; padding: 20px 16px 48px; }
h1 { font-size: 1.3rem; margin: 0 0 12px; overflow-wrap: anywhere; }
#turns > div, form { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 14px;
  margin: 12px 0; }
#turns b { display: block; color: var(--soft); font-size: .8rem; font-weight: 500; }
#turns p { margin: 2px 0 0; white-space: pre-wrap; overflow-wrap: anywhere; }
#turns.text p { font-family: ui-monospace, Consolas, monospace; font-size: .9rem; }
#turns .user p { color: var(--own); }
textarea, input, select, button { font: inherit; color: inherit; background: var(--page); border: 1px solid var(--line);
  border-radius: 6px; padding: 6px 8px; }
textarea { width: 100%; min-height: 6em; resize: vertical; }
fieldset { border: 0; margin: 8px 0 0; padding: 0; display: flex; flex-wrap: wrap; gap: 8px 12px; align-items: end; }
label { color: var(--soft); font-size: .8rem; } label input, label select { display: block; color: var(--ink); }
label input { width: 7.5em; }
button { cursor: pointer; padding: 6px 16px; } button[type=submit] { background: var(--own); color: var(--card); }
button:disabled { opacity: .5; cursor: default; }
#said { color: var(--soft); font-size: .875rem; min-height: 1.5em; margin: 4px 0 0; overflow-wrap: anywhere; }
"""

# A turn is kept with its whole text, so that the conversation can be sent again with the next one.
SCRIPT = """
"use strict";
const at = (id) => document.getElementById(id);
let turns = [], sending = null, model = null, asked = 0;

function headers() {
  const key = at("key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: "Bearer " + key } : {}) };
}

async function refusal(answer) {
  try { return (await answer.json()).error.message; } catch { return answer.status + " " + answer.statusText; }
}

async function find() {
  const now = ++asked;
  let said = "";
  try {
    const answer = await fetch("v1/models", { headers: headers() });
    if (now !== asked) return;
    at("locked").hidden = at("locked").hidden && answer.status !== 401;
    if (answer.ok) {
      model = (await answer.json()).data[0];
      at("name").textContent = document.title = model.id;
      at("max_tokens").max = model.max_tokens;
      at("chat").disabled = !model.chat;
      if (!model.chat) at("kind").value = "text";
      kind();
    } else said = await refusal(answer);
  } catch { said = "the server does not answer"; }
  if (now === asked) at("said").textContent = said;
}

function kind() {
  const chat = at("kind").value === "chat";
  at("turns").className = chat ? "" : "text";
  at("prompt").placeholder = chat ? "Say something" : "What the text begins with";
}

function turn(role, text) {
  const box = document.createElement("div"), who = document.createElement("b"), said = document.createElement("p");
  box.className = role;
  who.textContent = role;
  said.textContent = text;
  box.append(who, said);
  at("turns").append(box);
  return said;
}

function body(chat, prompt) {
  const found = { model: model.id, stream: true, stream_options: { include_usage: true } };
  for (const name of ["temperature", "top_p", "seed", "max_tokens"]) {
    const value = at(name).value.trim();
    if (value) found[name] = Number(value);
  }
  if (at("stop").value) found.stop = at("stop").value.replaceAll("\\\\n", "\\n");
  return { ...found, ...(chat ? { messages: [...turns, { role: "user", content: prompt }] } : { prompt }) };
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (held + value).split("\\n\\n");
    held = lines.pop();
    for (const line of lines) if (line !== "data: [DONE]") yield JSON.parse(line.slice(6));
  }
}

async function send() {
  if (!model) await find();
  if (!model) return;
  const chat = at("kind").value === "chat", prompt = at("prompt").value, started = performance.now();
  if (!chat) at("turns").replaceChildren();
  const user = chat ? turn("user", prompt) : null;
  const said = turn(chat ? "assistant" : "completion", chat ? "" : prompt);
  sending = new AbortController();
  at("send").disabled = true;
  at("end").disabled = false;
  let text = "", why = "", count = 0;
  at("said").textContent = "waiting …";
  try {
    const path = chat ? "v1/chat/completions" : "v1/completions", sent = JSON.stringify(body(chat, prompt));
    const answer = await fetch(path, { method: "POST", headers: headers(), body: sent, signal: sending.signal });
    if (!answer.ok) throw new Error(await refusal(answer));
    for await (const part of events(answer)) {
      if (part.error) throw new Error(part.error.message);
      const choice = part.choices[0];
      text += choice ? (chat ? choice.delta.content : choice.text) || "" : "";
      why = (choice && choice.finish_reason) || why;
      count = part.usage ? part.usage.completion_tokens : count;
      said.textContent = (chat ? "" : prompt) + text;
    }
    const seconds = (performance.now() - started) / 1000;
    at("said").textContent = `${count} tokens in ${seconds.toFixed(1)} s, ended by ${why}`;
  } catch (failure) {
    at("said").textContent = failure.name === "AbortError" ? "stopped" : failure.message;
  }
  if (chat && text) {
    turns.push({ role: "user", content: prompt }, { role: "assistant", content: text });
    at("prompt").value = "";
  } else if (chat) for (const box of [user, said]) box.parentElement.remove();  // it was not said; the prompt is still there
  sending = null;
  at("send").disabled = false;
  at("end").disabled = true;
}

at("form").addEventListener("submit", (event) => { event.preventDefault(); if (!sending) send(); });
at("end").addEventListener("click", () => sending && sending.abort());
at("clear").addEventListener("click", () => { turns = []; at("turns").replaceChildren(); });
at("kind").addEventListener("change", () => { turns = []; at("turns").replaceChildren(); kind(); });
at("key").addEventListener("change", find);
at("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("form").requestSubmit();
});
find();
"""

PAGE = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>qlr serve</title><link rel="icon" href="data:,"><style>{STYLE}</style></head>
<body><main>
<h1 id="name">qlr serve</h1>
<div id="turns" aria-live="polite"></div>
<form id="form">
<textarea id="prompt" aria-label="Prompt" required></textarea>
<fieldset>
<label>Kind<select id="kind"><option value="chat" id="chat">chat</option><option value="text">completion</option></select></label>
<label>Most tokens<input id="max_tokens" type="number" min="1" value="128"></label>
<label>Temperature<input id="temperature" type="number" min="0" step="any" value="0.7"></label>
<label>Top p<input id="top_p" type="number" min="0" max="1" step="any" value="1"></label>
<label>Seed<input id="seed" type="number" step="1" placeholder="any"></label>
<label>Stop before<input id="stop" placeholder="none"></label>
<label id="locked" hidden>API key<input id="key" type="password" autocomplete="off"></label>
</fieldset>
<fieldset>
<button type="submit" id="send" title="Ctrl + Enter">Send</button>
<button type="button" id="end" disabled>Stop</button>
<button type="button" id="clear">Clear</button>
</fieldset>
<p id="said" role="status"></p>
</form>
</main><script>{SCRIPT}</script></body></html>
"""


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


# Whatever a model writes stays text: only this script runs, and it reaches this server alone.
POLICY = (
    f"default-src 'none'; script-src {_hash(SCRIPT)}; style-src {_hash(STYLE)}; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
