// What the page shows, in its address: Back, Forward, a reload and a copied address show it again.

const AGAIN = 1000;  // milliseconds within which a further change of the same kind is the same step of Back
let last = {what: '', when: -AGAIN};

export const read = () => Object.fromEntries(new URLSearchParams(location.search));

// `what` changed: a step of Back; '': nothing did, the address is only completed.
export function write(state, what, title) {
  const query = new URLSearchParams(Object.entries(state).filter(([, value]) => value !== ''));
  const again = !what || (what === last.what && performance.now() - last.when < AGAIN);
  last = {what, when: performance.now()};
  if (`?${query}` !== location.search) history[again ? 'replaceState' : 'pushState'](null, '', `?${query}`);
  document.title = title;
}

// This tab's own name, by which the server knows the images that were added in it; a reload keeps it.
export function tabName() {
  const name = sessionStorage.getItem('tab') || crypto.getRandomValues(new Uint32Array(4)).join('-').slice(0, 40);
  sessionStorage.setItem('tab', name);
  return name;
}
