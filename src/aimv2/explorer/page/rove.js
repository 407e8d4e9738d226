// Groups of buttons with one tab stop each: arrow keys, Home and End move within the group.

const buttons = (group) => [...group.querySelectorAll('button')];

function stopAt(group, chosen) {
  for (const one of buttons(group)) one.tabIndex = one === chosen ? 0 : -1;
}

// The nearest button of the next row, or of the one before.
function across(all, at, down) {
  const top = (one) => one.getBoundingClientRect().top, left = all[at].getBoundingClientRect().left;
  const beyond = all.filter((one) => down * (top(one) - top(all[at])) > 1);
  const row = beyond.filter((one) => Math.abs(top(one) - top(down > 0 ? beyond[0] : beyond.at(-1))) <= 1);
  const away = (one) => Math.abs(one.getBoundingClientRect().left - left);
  return row.sort((a, b) => away(a) - away(b))[0];
}

export function rove(group) {
  group.addEventListener('focusin', (event) => stopAt(group, event.target.closest('button')));
  group.addEventListener('keydown', (event) => {
    const all = buttons(group), at = all.indexOf(document.activeElement);
    const moves = {ArrowRight: () => all[at + 1], ArrowLeft: () => all[at - 1], Home: () => all[0], End: () => all.at(-1),
      ArrowDown: () => across(all, at, 1), ArrowUp: () => across(all, at, -1)};
    if (at < 0 || !moves[event.key]) return;
    event.preventDefault();
    moves[event.key]()?.focus();
  });
}

// Replaces what a group holds; focus and tab stop stay with the same picture, or else with the same place.
export function fill(group, rows) {
  const before = buttons(group), held = before.findIndex((one) => one === document.activeElement);
  const stop = before[held >= 0 ? held : before.findIndex((one) => one.tabIndex === 0)];
  group.replaceChildren(...rows);
  const all = buttons(group), same = stop && all.find((one) => one.dataset.image && one.dataset.image === stop.dataset.image);
  const next = same || all[Math.min(Math.max(held, 0), all.length - 1)];
  stopAt(group, next);
  if (held >= 0) next?.focus();
}

export function press(group, chosen) {  // marks a button as chosen, where Tab then leads, and scrolls the group to it
  for (const one of buttons(group)) one.setAttribute('aria-pressed', one === chosen);
  stopAt(group, chosen || buttons(group)[0]);
  if (!chosen) return;
  const [inner, outer] = [chosen, group].map((one) => one.getBoundingClientRect());
  if (inner.left < outer.left || inner.right > outer.right) group.scrollLeft += inner.left - outer.left;
}
