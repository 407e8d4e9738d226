// The explorer's page. Nothing is fetched from anywhere but the server that sent it.

import {read, write} from '/address.js';
import {Chat} from '/chat.js';
import {drawCells, drawMap, drawPicture, edge, fade, firstPlace, frame, load, patchAt, placeAt, placeOf} from '/draw.js';
import {fill, press, rove} from '/rove.js';
import {ask, line, post, say, tab, track} from '/talk.js';
import {drawChances, drawLooked, named, percent, wordButtons} from '/words.js';

const $ = (query, within = document) => within.querySelector(query);
const now = {        // current selection; the place is a fraction of the whole image's width and height
  picture: null, place: [0.5, 0.5], cursor: [0.5, 0.5], layer: 1, mode: 'similarity', head: 'mean', share: 0.5, text: '',
};
let about, album, views = [], blocks = {}, chats = [];

const layerOf = (model) => Math.round(now.layer * (model.depth - 1));
const several = () => about.models.length > 1;
const of = (at) => several() ? `, ${about.models[at].name}` : '';  // in labels, which stand in for what is seen above

// ---- parts: picture, features, similarity, attention ----

function askParts(at) {
  const block = blocks.parts[at], picture = now.picture.image, layer = layerOf(about.models[at]);
  block.line(async () => {
    const {picture: colours} = await ask('pca', {model: at, image: picture, layer});
    const image = await load(colours);
    if (picture !== now.picture.image) return;
    drawCells($('.pca canvas', block.node), views[at], image);
    $('.pca canvas', block.node).setAttribute('aria-label', `Features of ${now.picture.name} after layer ${layer} as colours, a patch a cell${of(at)}`);
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
  const attends = mode === 'attention', head = attends && found.heads[now.head];
  const chosen = !attends ? found.own : head || found.mean;
  const values = chosen.flat(), high = Math.max(...values), low = attends ? 0 : lowest(found);
  drawMap(canvas, view, chosen, low, high, under);
  frame(canvas, view, patch);
  const where = `row ${patch[0] + 1}, column ${patch[1] + 1}`;
  const caption = $('.map figcaption', node), bold = document.createElement('b');
  bold.textContent = attends ? 'Attention of the patch' : 'Similar patches';
  caption.replaceChildren(bold, attends
    ? `Attention of the framed patch (${where}) in layer ${layerOf(about.models[at])}, ${head ? `head ${now.head}` : 'mean over the heads'}${head || now.head === 'mean' ? '' : ` (it has no head ${now.head})`}.`
    : `Cosine of every patch with the framed one (${where}).${now.mode === mode ? '' : ` ${about.models[at].cannot.attention}`}`);
  canvas.setAttribute('aria-label', `${bold.textContent}: ${caption.lastChild.textContent}${of(at)}`);
  $('.low', node).textContent = attends ? '0' : low.toFixed(2);
  $('.high', node).textContent = attends ? percent(high) : high.toFixed(2);
  $('.others', node).hidden = attends;
}

const lowest = (found) => Math.min(...found.own.flat(), ...found.others.flatMap((one) => one.map.flat()));

async function drawOthers(at, found) {
  const {node} = blocks.parts[at], list = $('.others ul', node), low = lowest(found), under = $('#under').checked;
  $('.others h4', node).textContent = `Most similar ${about.own_folder ? 'in the folder' : 'among the examples'}: the best ${found.others.length} of `
    + (found.compared < found.of ? `${found.compared} images read so far, of ${found.of}` : `${found.of} images`)
    + (found.of < found.folder ? `; ${found.folder - found.of} more do not fit the memory` : '') + unreadable(found.folder);
  fill(list, await Promise.all(found.others.map(async (one) => {
    const view = await seen(at, one.image), item = document.createElement('li'), button = document.createElement('button');
    const canvas = document.createElement('canvas'), text = document.createElement('span'), name = nameOf(one.image);
    drawMap(canvas, view, one.map, low, 1, under);
    const cells = one.map.flat(), best = cells.indexOf(Math.max(...cells));
    frame(canvas, view, [Math.floor(best / view.columns), best % view.columns], 3);
    text.textContent = `best ${one.best.toFixed(2)} · ${name}`;
    button.type = 'button';
    button.title = `Open ${name}`;
    button.append(canvas, text);
    button.dataset.image = one.image;
    button.onclick = () => track(choose(one.image));
    canvas.setAttribute('role', 'img');
    canvas.setAttribute('aria-label', `Similarity to the chosen patch in ${name}${of(at)}`);
    item.append(button);
    return item;
  })));
}

const unreadable = (count) => count < album.fixed ? `; ${album.fixed - count} can't be read` : '';

function drawCursor(at) {
  const canvas = $('.pick canvas', blocks.parts[at].node), view = views[at];
  drawPicture(canvas, view, view.image);
  frame(canvas, view, patchAt(view, now.place));
  if (`${now.cursor}` !== `${now.place}`) frame(canvas, view, patchAt(view, now.cursor), 0.5);
  const [row, column] = patchAt(view, now.cursor);
  canvas.setAttribute('aria-label', `${describe(now.picture)} as the model receives it, ${view.rows} rows and ${view.columns} columns of patches. Arrow keys move, Enter chooses: row ${row + 1}, column ${column + 1}${of(at)}`);
}

function pick(place) {
  now.place = now.cursor = place;
  keep('patch');
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
    const {words, limit} = await ask('caption', {model: at, image: picture});
    if (picture !== now.picture.image) return;
    block.words = words;
    fill($('.caption', block.node), wordButtons(words, (place) => drawWord(at, place)));
    if (words.length === limit && words.at(-1).text !== '⏎') $('.caption', block.node).append(` … cut at ${limit} tokens`);
    const chances = words.map((word) => word.text === '⏎' ? 1 : word.probability);
    if (words.length) drawWord(at, chances.indexOf(Math.min(...chances)));  // the least certain one
  });
}

function drawWord(at, place) {
  const {node, words} = blocks.words[at], word = words[place];
  press($('.caption', node), $('.caption', node).children[place]);
  drawLooked($('.looked', node), views[at], word, `Attention of the decoder at ${named(word.text)}`, of(at));
  drawChances($('.word', node), word);
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
    given.setAttribute('aria-label', `The first ${found.prefix} patches of ${now.picture.name}${of(at)}`);
    predicted.setAttribute('aria-label', `Predicted patches after the first ${found.prefix}, error ${found.loss.toFixed(2)}${of(at)}`);
    truth.setAttribute('aria-label', `${describe(now.picture)}${of(at)}`);
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
      canvas.setAttribute('aria-label', `The rest, generated after the first ${found.prefix} patches${of(at)}`);
      $('.rolled span', block.node).textContent = `each patch from the generated ones before it. Error ${found.loss.toFixed(2)}.`;
      $('.rolled', block.node).hidden = false;
    });
  });
}

// ---- search ----

function search(text) {  // '': nothing is searched for
  about.models.forEach((model, at) => {
    const block = blocks.search[at];
    if (model.cannot.search) return;
    block.text = text;
    if (!text) { say($('.status', block.node), ''); return fill($('.results', block.node), []); }
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
    + ` The best ${found.ranked.length} of ` + (found.compared < found.of ? `${found.compared} images read so far, of ${found.of}…` : `${found.of} images${unreadable(found.of)}.`)
    + (found.tokens ? ` Of the text only the first ${found.tokens} tokens count.` : ''));
  fill($('.results', node), found.ranked.map((one, rank) => {
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
  }));
}

// ---- choosing a picture ----

let pictures = [], turn = 0;
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
  album = await ask('images', {tab});
  pictures = album.images.map((picture, at) => ({...picture, own: at < album.images.length - album.fixed}));
  $('#left-out').textContent = album.left_out;
  fill($('#strip'), pictures.map((picture) => {
    const item = document.createElement('li'), button = document.createElement('button'), image = document.createElement('img');
    image.src = `/api/thumbnail/${picture.image}.png`;
    image.loading = 'lazy';
    image.alt = button.title = describe(picture);
    button.type = 'button';
    button.dataset.image = picture.image;
    button.onclick = () => track(choose(picture.image));
    button.onkeydown = (event) => { if (event.key === 'Delete' && picture.own) attempt(remove(picture)); };
    button.append(image);
    item.append(button);
    return item;
  }));
}

// `at`: row and column of the first model's patch, from 1; `what`: see keep.
async function choose(number, at = null, what = 'image') {
  const mine = ++turn;
  let picture;
  try {
    picture = pictures.find((one) => one.image === number) || await ask('entry', {image: number});
    const found = await Promise.all(about.models.map((_, at) => seen(at, number)));
    if (mine !== turn) return;
    now.picture = picture;
    views = found;
  } catch (error) { return say($('#message'), error.message, true); }
  say($('#message'), '');
  now.place = now.cursor = at ? placeAt(views[0], at) : firstPlace(picture, views[0]);
  keep(what);
  press($('#strip'), [...document.querySelectorAll('#strip button')].find((one) => +one.dataset.image === number));
  $('#remove').hidden = !picture.own;
  for (const chat of chats) chat.restart();
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

async function upload(files) {
  const wrong = [], before = pictures.filter((one) => one.own);
  let latest = null;
  say($('#message'), '');
  for (const file of files) {
    try {
      if (file.size > about.upload_bytes) throw new Error(`${file.name} has ${(file.size / 1e6).toFixed(1)} MB; up to ${about.upload_bytes / 1e6} MB are accepted.`);
      before.push(latest = await post('upload', {name: file.name}, file));
    } catch (error) { wrong.push(files.length > 1 && !error.message.startsWith(file.name) ? `${file.name}: ${error.message}` : error.message); }
  }
  if (latest) await added(latest, before);
  if (wrong.length) say($('#message'), wrong.join(' '), true);
}

async function added(latest, before) {
  await list();
  const gone = before.filter((one) => !pictures.some((other) => other.image === one.image)).map(describe);
  say($('#notice'), gone.length ? `Up to ${album.kept} added images are kept; removed: ${gone.join(', ')}.` : '');
  await choose(latest.image);
}

const example = async () => added(await post('example'), pictures.filter((one) => one.own));

async function remove(picture) {
  const at = pictures.findIndex((one) => one.image === picture.image);
  await post('remove', {image: picture.image});
  await list();
  if (picture.image === now.picture?.image) await choose((pictures[at] || pictures[0]).image);
}

const attempt = (promise) => track(promise).catch((error) => say($('#message'), error.message, true));

// ---- the address ----

// Puts what is shown into the address; `what` changed, '' where nothing did.
function keep(what) {
  if (!now.picture) return;
  const [row, column] = patchAt(views[0], now.place), [model, other] = about.models.map((one) => one.name);
  const state = {model, other: other || '', image: now.picture.image, layer: $('#layer').value, row: row + 1, column: column + 1,
    mode: now.mode === 'similarity' ? '' : now.mode, head: now.head === 'mean' ? '' : now.head, plain: $('#under').checked ? '' : 1,
    given: now.share === 0.5 ? '' : Math.round(100 * now.share), text: now.text};
  write(state, what, `${describe(now.picture)}, layer ${state.layer} · AIMV2 explorer`);
}

// Shows what the address says: at the start, and after Back or Forward.
async function restore() {
  const before = now.text, state = read(), known = Number.isInteger(+state.image), at = state.row && state.column ? [+state.row, +state.column] : null;
  $('#layer').value = state.layer ?? $('#layer').max;
  now.mode = state.mode === 'attention' && !$('[value=attention]').disabled ? 'attention' : 'similarity';
  $(`[value=${now.mode}]`).checked = true;
  $('#head').value = state.head ?? 'mean';
  if (!$('#head').value) $('#head').value = 'mean';
  $('#under').checked = !state.plain;
  $('#share').value = state.given ?? 50;
  $('#text').value = now.text = state.text ?? '';
  readControls();
  if (now.picture && +state.image === now.picture.image) {
    now.place = now.cursor = at ? placeAt(views[0], at) : firstPlace(now.picture, views[0]);
    views.forEach((_, at) => { drawCursor(at); askParts(at); askNext(at); });
  } else if (known) await choose(+state.image, at, '');
  if (!now.picture && pictures.length) {
    const why = $('#message').textContent;
    await choose(pictures[0].image, null, '');
    if (known) say($('#message'), why, true);
  }
  const here = about.models.map((one) => one.name), there = [state.model, state.other].filter(Boolean);
  if (there.length && `${there}` !== `${here}`) say($('#message'), `This address was made with ${there.join(' and ')}; shown is ${here.join(' and ')}.`, true);
  if (now.text !== before) search(now.text);
}

// ---- the page ----

function facts(model) {
  const item = document.createElement('li'), name = document.createElement('b');
  const input = model.image_size ? `${model.image_size} × ${model.image_size} pixels` : 'images of any size';
  name.textContent = model.name;
  item.append(name, ` ${model.architecture === model.name ? '' : `(${model.architecture}) `}${model.kind}, ${(model.parameters / 1e6).toFixed(1)}M parameters, ${model.depth} layers, ${input}, patches of ${model.patch}`);
  return item;
}

function makeBlocks(section, what) {
  const place = $(`#${section} .models`);
  blocks[section] = about.models.map((model, at) => {
    const node = $(`#t-${section}`).content.firstElementChild.cloneNode(true), status = $('.status', node);
    $('h3', node).textContent = model.name;
    if (several()) [node.role, node.ariaLabel] = ['group', model.name];
    for (const one of node.querySelectorAll('[aria-label]')) one.ariaLabel += of(at);
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

function makeChats() {  // none: no model answers, and the page has no such part
  makeBlocks('chat', null);
  chats = blocks.chat.flatMap((block, at) => about.models[at].chat
    ? [new Chat(at, block, () => ({image: now.picture.image, view: views[at]}), of(at))] : []);
  blocks.chat.forEach(({node}, at) => { if (!about.models[at].chat) node.remove(); });
  $('#chat').hidden = !chats.length;
}

function sayLayer() {
  const said = about.models.map((model) => model.depth > 1 ? `layer ${layerOf(model)} of 0 to ${model.depth - 1}` : 'layer 0, the only one');
  const same = new Set(said).size === 1;
  $('#layer-said').textContent = same ? said[0] : said.map((text, at) => `${text} (${about.models[at].name})`).join(', ');
}

function readControls() {
  const layer = $('#layer');
  now.layer = layer.max > 0 ? layer.value / layer.max : 1;
  now.share = $('#share').value / 100;
  now.head = $('#head').value;
  $('#head-label').hidden = now.mode !== 'attention';
  $('#share-said').textContent = `${$('#share').value}% of the patches`;
  sayLayer();
}

function watch() {
  $('#open').onclick = () => $('#file').click();
  $('#file').onchange = (event) => { const files = [...event.target.files]; event.target.value = ''; attempt(upload(files)); };
  $('#example').onclick = () => attempt(example());
  $('#remove').onclick = () => attempt(remove(now.picture));
  const layer = $('#layer');
  layer.max = Math.max(...about.models.map((model) => model.depth)) - 1;
  layer.oninput = () => { readControls(); views.forEach((_, at) => askParts(at)); keep('layer'); };
  for (const mode of document.querySelectorAll('[name=mode]')) mode.onchange = () => {
    now.mode = mode.value;
    readControls();
    views.forEach((_, at) => blocks.parts[at].line(() => askMap(at)));
    keep('mode');
  };
  const heads = Math.max(...about.models.map((model) => model.heads));
  $('#head').append(new Option('mean', 'mean'), ...Array.from({length: heads}, (_, head) => new Option(head, head)));
  $('#head').onchange = () => { readControls(); views.forEach((_, at) => drawParts(at)); keep('head'); };
  $('#under').onchange = () => {
    views.forEach((_, at) => {
      drawParts(at);
      if (now.mode === 'similarity' && blocks.parts[at].map) track(drawOthers(at, blocks.parts[at].map.found));
    });
    keep('under');
  };
  $('#share').oninput = () => { readControls(); views.forEach((_, at) => askNext(at)); keep('given'); };
  $('#roll').onclick = roll;
  $('#ask').onsubmit = (event) => { event.preventDefault(); const text = $('#text').value.trim(); if (text) { now.text = text; keep('text'); search(text); } };
  $('#talk').onsubmit = (event) => {
    event.preventDefault();
    const text = $('#question').value.trim();
    if (!text || !now.picture || chats.some((chat) => chat.busy)) return;  // an answer at a time; the text stays
    $('#question').value = '';
    for (const chat of chats) chat.put(text, () => { $('#question').value ||= text; });
  };
  $('#restart').onclick = () => { for (const chat of chats) chat.restart(); };
  $('#text').placeholder = about.own_folder ? 'two dogs play in the snow' : 'a large red circle at the top left';
  let depth = 0;
  const shown = (by) => { depth = Math.max(0, depth + by); $('#drop').hidden = !depth; };
  addEventListener('dragenter', () => shown(1));
  addEventListener('dragleave', () => shown(-1));
  addEventListener('dragover', (event) => event.preventDefault());
  addEventListener('drop', (event) => { event.preventDefault(); depth = 0; shown(0); if (event.dataTransfer.files.length) attempt(upload([...event.dataTransfer.files])); });
  addEventListener('popstate', () => attempt(restore()));
  for (const group of document.querySelectorAll('#strip, .others ul, .results, .caption')) rove(group);
}

async function start() {
  about = await ask('about');
  document.body.className = several() ? 'several' : 'one';
  $('#facts').append(...about.models.map(facts));
  for (const [section, what] of [['parts', null], ['words', 'caption'], ['next', 'paint'], ['search', 'search']]) makeBlocks(section, what);
  makeChats();
  blocks.parts.forEach(({node}, at) => watchPicker($('.pick canvas', node), at));
  const stored = about.models.filter((model) => model.stored), same = new Set(about.models.map((model) => model.stored)).size === 1;
  for (const model of same ? stored.slice(0, 1) : stored) $('#stored').append(` ${same ? '' : `${model.name}: `}${model.stored}`);
  watch();
  await list();
  await restore();
}

attempt(start());
