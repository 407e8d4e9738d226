// The explorer's page. Nothing is fetched from anywhere but the server that sent it.

import {contrasts, drawCells, drawMap, drawPicture, edge, fade, frame, load} from '/draw.js';

const $ = (query, within = document) => within.querySelector(query);
const now = {        // current selection; the place is a fraction of the whole image's width and height
  picture: null, place: [0.5, 0.5], cursor: [0.5, 0.5], layer: 1, mode: 'similarity', head: 'mean', share: 0.5,
};
let about, views = [], blocks = {};

// ---- talking to the server ----

async function ask(name, query = {}) {
  return answer(await fetch(`/api/${name}?${new URLSearchParams(query)}`).catch(() => null));
}

async function answer(response) {
  if (!response) throw new Error('The explorer does not answer; is it still running in its terminal?');
  const found = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(found.error || `The explorer answered with ${response.status}.`);
  return found;
}

// While anything is under way the page says that it is busy.
let working = 0;
async function track(promise) {
  $('main').ariaBusy = ++working > 0;
  try { return await promise; } finally { $('main').ariaBusy = --working > 0; }
}

// One question at a time of each kind: while one is under way only the newest further one waits.
function line(status) {
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

function say(where, sentence, bad = false) {
  where.textContent = sentence;
  where.classList.toggle('error', bad);
}

// ---- places: of the whole picture, and of what a model sees of it ----

function patchAt(view, [x, y]) {
  const [left, top, right, bottom] = view.box;
  const held = (share, count) => Math.min(Math.max(Math.floor(share * count), 0), count - 1);
  return [held((y - top) / (bottom - top), view.rows), held((x - left) / (right - left), view.columns)];
}

function placeOf(view, row, column) {
  const [left, top, right, bottom] = view.box;
  return [left + (right - left) * (column + 0.5) / view.columns, top + (bottom - top) * (row + 0.5) / view.rows];
}

const layerOf = (model) => Math.round(now.layer * (model.depth - 1));
const percent = (share) => share >= 0.995 ? `${Math.round(100 * share)}%` : `${(100 * share).toFixed(share < 0.1 ? 1 : 0)}%`;

// ---- parts: picture, features, similarity, attention ----

function askParts(at) {
  const block = blocks.parts[at], picture = now.picture.image, layer = layerOf(about.models[at]);
  block.line(async () => {
    const {picture: colours} = await ask('pca', {model: at, image: picture, layer});
    const image = await load(colours);
    if (picture !== now.picture.image) return;
    drawCells($('.pca canvas', block.node), views[at], image);
    $('.pca canvas', block.node).setAttribute('aria-label', `Features of ${now.picture.name} after block ${layer + 1} as colours, a patch a cell`);
    await askMap(at);
  });
}

// in attention mode, a model without attention keeps showing similar patches and says so
const modeOf = (model) => model.cannot.attention ? 'similarity' : now.mode;

async function askMap(at) {
  const view = views[at], [row, column] = patchAt(view, now.place), model = about.models[at];
  const query = {model: at, image: now.picture.image, layer: layerOf(model), row, column};
  const stale = () => query.image !== now.picture.image || query.layer !== layerOf(model) || `${patchAt(views[at], now.place)}` !== `${[row, column]}`;
  const mode = modeOf(model);
  for (let more = true; more;) {
    const found = await ask(mode, query);
    if (stale() || mode !== modeOf(model)) return;
    blocks.parts[at].map = {mode, patch: [row, column], found};
    drawParts(at);
    if (mode === 'similarity') await drawOthers(at, found);
    more = mode === 'similarity' && found.compared < found.of && !stale();
  }
}

function drawParts(at) {
  const {node, map} = blocks.parts[at], view = views[at], canvas = $('.map canvas', node), under = $('#under').checked;
  drawCursor(at);
  if (!map) return;
  const {mode, patch, found} = map;
  const attends = mode === 'attention', chosen = !attends ? found.own : now.head === 'mean' ? found.mean : found.heads[now.head] || found.mean;
  const values = chosen.flat(), high = Math.max(...values), low = attends ? 0 : lowest(found);
  drawMap(canvas, view, chosen, low, high, under);
  frame(canvas, view, patch);
  const where = `row ${patch[0] + 1}, column ${patch[1] + 1}`;
  const caption = $('.map figcaption', node), bold = document.createElement('b');
  bold.textContent = attends ? 'Attention of the patch' : 'Similar patches';
  caption.replaceChildren(bold, attends
    ? `Attention of the framed patch (${where}) in block ${layerOf(about.models[at]) + 1}, ${now.head === 'mean' ? 'mean over the heads' : `head ${+now.head + 1}`}.`
    : `Cosine of every patch with the framed one (${where}).${now.mode === mode ? '' : ` ${about.models[at].cannot.attention}`}`);
  canvas.setAttribute('aria-label', `${bold.textContent}: ${caption.lastChild.textContent}`);
  $('.low', node).textContent = attends ? '0' : low.toFixed(2);
  $('.high', node).textContent = attends ? percent(high) : high.toFixed(2);
  $('.others', node).hidden = attends;
}

const lowest = (found) => Math.min(...found.own.flat(), ...found.others.flatMap((one) => one.map.flat()));

async function drawOthers(at, found) {
  const {node} = blocks.parts[at], list = $('.others ul', node), low = lowest(found), under = $('#under').checked;
  $('.others h4', node).textContent = (about.own_folder ? 'Most similar in the folder' : 'Most similar among the examples')
    + (found.compared < found.of ? ` (${found.compared} of ${found.of} read so far)` : '');
  const rows = await Promise.all(found.others.map(async (one) => {
    const view = await seen(at, one.image), item = document.createElement('li'), button = document.createElement('button');
    const canvas = document.createElement('canvas'), text = document.createElement('span'), name = nameOf(one.image);
    drawMap(canvas, view, one.map, low, 1, under);
    const cells = one.map.flat(), best = cells.indexOf(Math.max(...cells));
    frame(canvas, view, [Math.floor(best / view.columns), best % view.columns], 3);
    text.textContent = `best ${one.best.toFixed(2)} · ${name}`;
    button.type = 'button';
    button.title = `Open ${name}`;
    button.append(canvas, text);
    button.onclick = () => track(choose(one.image));
    canvas.setAttribute('role', 'img');
    canvas.setAttribute('aria-label', `Similarity to the chosen patch in ${name}`);
    item.append(button);
    return item;
  }));
  list.replaceChildren(...rows);
}

function drawCursor(at) {
  const canvas = $('.pick canvas', blocks.parts[at].node), view = views[at];
  drawPicture(canvas, view, view.image);
  frame(canvas, view, patchAt(view, now.place));
  if (`${now.cursor}` !== `${now.place}`) frame(canvas, view, patchAt(view, now.cursor), 0.5);
  const [row, column] = patchAt(view, now.cursor);
  canvas.setAttribute('aria-label', `${describe(now.picture)} as the model receives it, ${view.rows} rows and ${view.columns} columns of patches. Arrow keys move, Enter chooses: row ${row + 1}, column ${column + 1}`);
}

function pick(place) {
  now.place = now.cursor = place;
  views.forEach((_, at) => { drawCursor(at); blocks.parts[at].line(() => askMap(at)); });
}

function watchPicker(canvas, at) {
  canvas.onclick = (event) => {
    const box = canvas.getBoundingClientRect(), view = views[at];
    const column = Math.floor((event.clientX - box.left) / box.width * view.columns);
    const row = Math.floor((event.clientY - box.top) / box.height * view.rows);
    pick(placeOf(view, Math.min(Math.max(row, 0), view.rows - 1), Math.min(Math.max(column, 0), view.columns - 1)));
  };
  const moves = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]};
  canvas.onkeydown = (event) => {
    const view = views[at];
    if (event.key === 'Enter' || event.key === ' ') pick(now.cursor);
    else if (moves[event.key]) {
      const [row, column] = patchAt(view, now.cursor), [down, right] = moves[event.key];
      now.cursor = placeOf(view, Math.min(Math.max(row + down, 0), view.rows - 1), Math.min(Math.max(column + right, 0), view.columns - 1));
      views.forEach((_, other) => drawCursor(other));
    } else return;
    event.preventDefault();
  };
}

// ---- words ----

function askWords(at) {
  const block = blocks.words[at], picture = now.picture.image;
  if (about.models[at].cannot.caption) return;
  block.line(async () => {
    const {words} = await ask('caption', {model: at, image: picture});
    if (picture !== now.picture.image) return;
    block.words = words;
    const buttons = words.map((word, place) => {
      const button = document.createElement('button'), ends = word.text === '⏎';
      button.type = 'button';
      button.textContent = ends ? 'end' : word.text.trim() || '␣';
      button.className = ends ? 'end spaced' : place && word.text.startsWith(' ') ? 'spaced' : '';
      button.style.setProperty('--sure', `${100 * word.probability}%`);
      button.setAttribute('aria-label', `${ends ? 'end of the caption' : word.text.trim() || 'space'}, ${percent(word.probability)}`);
      button.onmouseenter = button.onfocus = button.onclick = () => drawWord(at, place);
      button.onkeydown = (event) => {
        const next = buttons[place + ({ArrowRight: 1, ArrowLeft: -1}[event.key] || NaN)];
        if (next) next.focus();
      };
      return button;
    });
    $('.caption', block.node).replaceChildren(...buttons);
    const chances = words.map((word) => word.text === '⏎' ? 1 : word.probability);
    if (words.length) drawWord(at, chances.indexOf(Math.min(...chances)));  // the least certain one
  });
}

function drawWord(at, place) {
  const {node, words} = blocks.words[at], word = words[place], view = views[at], canvas = $('.looked canvas', node);
  [...$('.caption', node).children].forEach((button, other) => button.setAttribute('aria-pressed', other === place));
  drawMap(canvas, view, word.attention, 0, Math.max(...word.attention.flat()), true);
  const shown = (text) => text === '⏎' ? 'end of the caption' : text.trim() ? `“${text.trim()}”` : 'a space';
  canvas.setAttribute('aria-label', `Attention of the decoder at ${shown(word.text)}`);
  $('.looked figcaption', node).textContent = `Attention of the decoder at ${shown(word.text)}: ${percent(word.share)} of its attention is on the image, the rest on earlier tokens.`;
  const list = document.createElement('ul');
  for (const [text, chance] of word.alternatives) {
    const item = document.createElement('li'), [name, bar, number] = ['span', 'i', 'span'].map((kind) => document.createElement(kind));
    name.textContent = shown(text);
    bar.style.setProperty('--sure', `${100 * chance}%`);
    number.textContent = percent(chance);
    item.className = text === word.text ? 'chosen' : '';
    item.append(name, bar, number);
    list.append(item);
  }
  $('.word', node).replaceChildren(list);
}

// ---- next patches ----

function askNext(at) {
  const block = blocks.next[at], query = {model: at, image: now.picture.image, share: now.share};
  $('.rolled', block.node).hidden = true;
  if (about.models[at].cannot.paint) return;
  block.line(async () => {
    const found = await ask('painting', query), image = await load(found.picture), view = views[at], total = view.rows * view.columns;
    if (query.image !== now.picture.image || query.share !== now.share) return;
    const [given, predicted, truth] = ['.given', '.predicted', '.truth'].map((name) => $(`${name} canvas`, block.node));
    drawPicture(given, view, view.image);
    fade(given, view, found.prefix);
    drawPicture(predicted, view, image);
    edge(predicted, view, found.prefix);
    drawPicture(truth, view, view.image);
    $('.given span', block.node).textContent = `the first ${found.prefix} of ${total} patches.`;
    $('.predicted span', block.node).textContent = `each patch after the line, from the true ones before it. Error ${found.loss.toFixed(2)}; a flat grey patch has 1.`;
    $('.note', block.node).textContent = found.note;
    given.setAttribute('aria-label', `The first ${found.prefix} patches of ${now.picture.name}`);
    predicted.setAttribute('aria-label', `Predicted patches after the first ${found.prefix}, error ${found.loss.toFixed(2)}`);
    truth.setAttribute('aria-label', describe(now.picture));
  });
}

function roll() {
  views.forEach((view, at) => {
    const block = blocks.next[at], query = {model: at, image: now.picture.image, share: now.share, rolled: 1};
    if (about.models[at].cannot.paint) return;
    block.line(async () => {
      const found = await ask('painting', query), image = await load(found.picture), canvas = $('.rolled canvas', block.node);
      if (query.image !== now.picture.image || query.share !== now.share) return;
      drawPicture(canvas, views[at], image);
      edge(canvas, views[at], found.prefix);
      canvas.setAttribute('aria-label', `The rest, generated after the first ${found.prefix} patches`);
      $('.rolled span', block.node).textContent = `each patch from the generated ones before it. Error ${found.loss.toFixed(2)}.`;
      $('.rolled', block.node).hidden = false;
    });
  });
}

// ---- search ----

function find(text) {
  about.models.forEach((model, at) => {
    const block = blocks.search[at];
    if (model.cannot.search) return;
    block.text = text;
    block.line(async () => {
      for (let more = true; more;) {
        const found = await ask('search', {model: at, text});
        if (block.text !== text) return;
        drawResults(at, found);
        more = found.compared < found.of;
      }
    });
  });
}

function drawResults(at, found) {
  const {node} = blocks.search[at], likely = found.by === 'likelihood';
  say($('.status', node), (likely ? 'By the decoder: how many nats likelier the text is with this picture than on average.' : 'By the cosine of text and picture.')
    + (found.compared < found.of ? ` ${found.compared} of ${found.of} images read so far…` : ` ${found.of} images.`));
  const rows = found.ranked.map((one, rank) => {
    const item = document.createElement('li'), button = document.createElement('button'), image = document.createElement('img');
    const text = document.createElement('span'), score = document.createElement('b');
    image.src = `/api/thumbnail/${one.image}.png`;
    image.loading = 'lazy';
    image.alt = describe(one);
    score.textContent = `${rank + 1}. ${likely && one.score >= 0 ? '+' : ''}${one.score.toFixed(2)} `;
    text.append(score, describe(one));
    button.type = 'button';
    button.dataset.image = one.image;
    button.append(image, text);
    button.onclick = () => { track(choose(one.image)); $('#parts').scrollIntoView(); };
    item.append(button);
    return item;
  });
  $('.results', node).replaceChildren(...rows);
}

// ---- choosing a picture ----

let pictures = [];
const known = new Map();  // what models see of pictures
const describe = (picture) => picture.says || picture.name;
const nameOf = (number) => { const found = pictures.find((one) => one.image === number); return found ? describe(found) : 'a picture'; };

async function seen(at, number) {
  const key = `${at} ${number}`;
  if (!known.has(key)) {
    const view = await ask('seen', {model: at, image: number});
    known.set(key, {...view, image: await load(view.picture)});
    if (known.size > 300) known.delete(known.keys().next().value);
  }
  return known.get(key);
}

async function list() {
  pictures = (await ask('images')).images;
  $('#strip').replaceChildren(...pictures.map((picture) => {
    const item = document.createElement('li'), button = document.createElement('button'), image = document.createElement('img');
    image.src = `/api/thumbnail/${picture.image}.png`;
    image.loading = 'lazy';
    image.alt = button.title = describe(picture);
    button.type = 'button';
    button.dataset.image = picture.image;
    button.onclick = () => track(choose(picture.image));
    button.append(image);
    item.append(button);
    return item;
  }));
}

// Objects of a drawn scene lie off its centre, where photographs have theirs.
function firstPlace(picture, view) {
  const varied = contrasts(view.image, view), best = varied.indexOf(Math.max(...varied));
  return picture.kind === 'example' ? placeOf(view, Math.floor(best / view.columns), best % view.columns)
    : placeOf(view, Math.floor(view.rows / 2), Math.floor(view.columns / 2));
}

async function choose(number) {
  const picture = pictures.find((one) => one.image === number);
  try {
    const found = await Promise.all(about.models.map((_, at) => seen(at, number)));
    now.picture = picture;
    views = found;
  } catch (error) { return say($('#message'), error.message, true); }
  say($('#message'), '');
  now.place = now.cursor = firstPlace(picture, views[0]);
  for (const button of document.querySelectorAll('#strip button')) button.setAttribute('aria-pressed', +button.dataset.image === number);
  $('#drawn-as').textContent = picture.says ? `Caption of this example: “${picture.says}”.` : '';
  views.forEach((view, at) => {
    $('.size', blocks.parts[at].node).textContent = `${view.width} × ${view.height} pixels, ${view.columns} × ${view.rows} patches.`;
    blocks.parts[at].map = null;
    $('.caption', blocks.words[at].node).replaceChildren();
    $('.word', blocks.words[at].node).replaceChildren();
    drawCursor(at);
    askParts(at);
    askWords(at);
    askNext(at);
  });
}

async function add(request) {
  try {
    const picture = await answer(await request);
    await list();
    await choose(picture.image);
  } catch (error) { say($('#message'), error.message, true); }
}

function upload(file) {
  if (!file) return;
  if (file.size > about.upload_bytes) {
    return say($('#message'), `${file.name} has ${(file.size / 1e6).toFixed(1)} MB; up to ${about.upload_bytes / 1e6} MB are accepted.`, true);
  }
  say($('#message'), '');
  track(add(fetch(`/api/upload?${new URLSearchParams({name: file.name})}`, {method: 'POST', body: file}).catch(() => null)));
}

// ---- the page ----

function facts(model) {
  const item = document.createElement('li'), name = document.createElement('b');
  const input = model.image_size ? `${model.image_size} × ${model.image_size} pixels` : 'images of any size';
  name.textContent = model.name;
  item.append(name, ` ${model.architecture === model.name ? '' : `(${model.architecture}) `}${model.kind}, ${(model.parameters / 1e6).toFixed(1)}M parameters, ${model.depth} blocks, ${input}, patches of ${model.patch}`);
  return item;
}

function makeBlocks(section, what) {
  const place = $(`#${section} .models`);
  blocks[section] = about.models.map((model) => {
    const node = $(`#t-${section}`).content.firstElementChild.cloneNode(true), status = $('.status', node);
    $('h3', node).textContent = model.name;
    place.append(node);
    const why = model.cannot[what];
    if (why) {
      say(status, why);
      for (const part of node.querySelectorAll('.figures, .looked, .note')) part.hidden = true;
    }
    return {node, line: line(status)};
  });
  if (section === 'parts' && about.models.every((model) => model.cannot.attention)) $('[name=mode][value=attention]').disabled = true;
  if (what && about.models.every((model) => model.cannot[what])) {
    for (const control of document.querySelectorAll(`#${section} :is(input, select, button)`)) control.disabled = true;
    if (section === 'words') $('#words .lead').hidden = true;
  }
}

function sayLayer() {
  $('#layer-said').textContent = about.models.map((model) => `block ${layerOf(model) + 1} of ${model.depth}`).join(', ');
}

function watch() {
  $('#open').onclick = () => $('#file').click();
  $('#file').onchange = (event) => { upload(event.target.files[0]); event.target.value = ''; };
  $('#example').onclick = () => track(add(fetch('/api/example', {method: 'POST'}).catch(() => null)));
  const layer = $('#layer'), deepest = Math.max(...about.models.map((model) => model.depth));
  layer.max = deepest;
  layer.value = deepest;
  layer.oninput = () => { now.layer = deepest > 1 ? (layer.value - 1) / (deepest - 1) : 1; sayLayer(); views.forEach((_, at) => askParts(at)); };
  for (const mode of document.querySelectorAll('[name=mode]')) mode.onchange = () => {
    now.mode = mode.value;
    $('#head-label').hidden = now.mode !== 'attention';
    views.forEach((_, at) => blocks.parts[at].line(() => askMap(at)));
  };
  const heads = Math.max(...about.models.map((model) => model.heads));
  $('#head').append(new Option('mean', 'mean'), ...Array.from({length: heads}, (_, head) => new Option(head + 1, head)));
  $('#head').onchange = (event) => { now.head = event.target.value; views.forEach((_, at) => drawParts(at)); };
  $('#under').onchange = () => views.forEach((_, at) => {
    drawParts(at);
    if (now.mode === 'similarity' && blocks.parts[at].map) track(drawOthers(at, blocks.parts[at].map.found));
  });
  const saidShare = () => { $('#share-said').textContent = `${$('#share').value}% of the patches`; };
  $('#share').oninput = (event) => { now.share = event.target.value / 100; saidShare(); views.forEach((_, at) => askNext(at)); };
  saidShare();
  $('#roll').onclick = roll;
  $('#ask').onsubmit = (event) => { event.preventDefault(); const text = $('#text').value.trim(); if (text) find(text); };
  $('#text').maxLength = about.longest_text;
  $('#text').placeholder = about.own_folder ? 'two dogs play in the snow' : 'a large red circle at the top left';
  let depth = 0;
  const shown = (by) => { depth = Math.max(0, depth + by); $('#drop').hidden = !depth; };
  addEventListener('dragenter', () => shown(1));
  addEventListener('dragleave', () => shown(-1));
  addEventListener('dragover', (event) => event.preventDefault());
  addEventListener('drop', (event) => { event.preventDefault(); depth = 0; shown(0); upload(event.dataTransfer.files[0]); });
}

async function start() {
  about = await ask('about');
  document.body.className = about.models.length > 1 ? 'several' : 'one';
  $('#facts').append(...about.models.map(facts));
  for (const [section, what] of [['parts', null], ['words', 'caption'], ['next', 'paint'], ['search', 'search']]) makeBlocks(section, what);
  blocks.parts.forEach(({node}, at) => watchPicker($('.pick canvas', node), at));
  for (const sentence of new Set(about.models.map((model) => model.stored).filter(Boolean))) {
    $('#stored').append(` ${sentence}`);
  }
  watch();
  sayLayer();
  await list();
  if (pictures.length) await choose(pictures[0].image);
}

track(start()).catch((error) => say($('#message'), error.message, true));
