// Tokens that a model wrote, as buttons, and what it looked at and expected at one of them.

import {drawMap} from '/draw.js';

export const percent = (share) => `${(100 * share).toFixed(1)}%`;
export const named = (text) => text === '⏎' ? 'end of the caption' : text.trim() ? `“${text.trim()}”` : 'a space';

export const wordButtons = (words, choose) => words.map((word, place) => {
  const button = document.createElement('button'), ends = word.text === '⏎';
  button.type = 'button';
  button.textContent = ends ? 'end' : word.text.trim() || '␣';
  button.className = ends ? 'end spaced' : place && /^\s/.test(word.text) ? 'spaced' : '';
  button.style.setProperty('--sure', `${100 * word.probability}%`);
  button.setAttribute('aria-label', `${ends ? 'end of the caption' : word.text.trim() || 'space'}, ${percent(word.probability)}`);
  button.onmouseenter = button.onfocus = button.onclick = () => choose(place);
  return button;
});

// `what`: whose attention it is
export function drawLooked(figure, view, {attention, share}, what, of) {
  const canvas = figure.querySelector('canvas');
  drawMap(canvas, view, attention, 0, Math.max(...attention.flat()), true);
  canvas.setAttribute('aria-label', `${what}${of}`);
  figure.querySelector('figcaption').textContent = `${what}: ${percent(share)} of its attention is on the image, the rest on earlier tokens.`;
}

export function drawChances(place, word) {
  const list = document.createElement('ul');
  for (const [text, chance] of word.alternatives) {
    const item = document.createElement('li'), [name, bar, number] = ['span', 'i', 'span'].map((kind) => document.createElement(kind));
    name.textContent = named(text);
    bar.style.setProperty('--sure', `${100 * chance}%`);
    number.textContent = percent(chance);
    item.className = text === word.text ? 'chosen' : '';
    item.append(name, bar, number);
    list.append(item);
  }
  place.replaceChildren(list);
}
