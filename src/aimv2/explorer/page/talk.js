// Questions to the server, and what the page says meanwhile.

import {tabName} from '/address.js';

const $ = (query) => document.querySelector(query);
export const tab = tabName();

export async function ask(name, query = {}) {
  return answer(await fetch(`/api/${name}?${new URLSearchParams(query)}`).catch(() => null));
}

export const post = async (name, query = {}, body = null) =>
  answer(await fetch(`/api/${name}?${new URLSearchParams({tab, ...query})}`, {method: 'POST', body}).catch(() => null));

async function answer(response) {
  if (!response) throw new Error('The explorer does not answer; is it still running in its terminal?');
  const found = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(found.error || `The explorer answered with ${response.status}.`);
  return found;
}

// While anything is under way the page says that it is busy.
let working = 0;
export async function track(promise) {
  $('main').ariaBusy = ++working > 0;
  try { return await promise; } finally { $('main').ariaBusy = --working > 0; }
}

// One question at a time of each kind: while one is under way only the newest further one waits.
export function line(status) {
  let busy = false, waiting = null;
  return async function run(task) {
    if (busy) { waiting = task; return; }
    busy = true;
    if (status.classList.contains('error')) say(status, '');
    const slow = setTimeout(() => say(status, 'Working…'), 250);
    try { await track(task()); if (status.textContent === 'Working…') say(status, ''); }
    catch (error) { say(status, error.message, true); }
    clearTimeout(slow);
    busy = false;
    if (waiting) { const next = waiting; waiting = null; run(next); }
  };
}

export function say(where, sentence, bad = false) {
  where.textContent = sentence;
  where.classList.toggle('error', bad);
}
