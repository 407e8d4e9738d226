// Pictures, maps and frames on canvases. A view is a picture as a model sees it: its pixels and its grid of patches.

const VIRIDIS = [[68, 1, 84], [71, 45, 123], [59, 82, 139], [44, 114, 142], [33, 145, 140], [40, 174, 128], [94, 201, 98],
  [173, 220, 48], [253, 231, 37]];
const DRAWN = 448;   // pixels a side, at least, that a canvas holds
const SMOOTH = 128;  // pictures of fewer pixels a side are shown pixel by pixel

export const load = (source) => new Promise((done, failed) => {
  const image = new Image();
  image.onload = () => done(image);
  image.onerror = () => failed(new Error('A picture could not be drawn.'));
  image.src = source;
});

function colour(share) {
  const at = Math.min(Math.max(share, 0), 1) * (VIRIDIS.length - 1), low = Math.min(Math.floor(at), VIRIDIS.length - 2);
  const mixed = VIRIDIS[low].map((value, band) => Math.round(value + (at - low) * (VIRIDIS[low + 1][band] - value)));
  return `rgb(${mixed})`;
}

function paper(canvas, view) {
  const scale = Math.max(1, Math.ceil(DRAWN / Math.max(view.width, view.height)));
  canvas.width = view.width * scale;
  canvas.height = view.height * scale;
  const pen = canvas.getContext('2d', {willReadFrequently: true});
  pen.imageSmoothingEnabled = view.width >= SMOOTH;
  return pen;
}

export function drawPicture(canvas, view, image, grey = false) {
  const pen = paper(canvas, view);
  if (grey) pen.filter = 'grayscale(1)';
  pen.drawImage(image, 0, 0, canvas.width, canvas.height);
  pen.filter = 'none';
  return pen;
}

export function drawCells(canvas, view, image) {  // a picture of one pixel a patch
  const pen = paper(canvas, view);
  pen.imageSmoothingEnabled = false;
  pen.drawImage(image, 0, 0, canvas.width, canvas.height);
  return pen;
}

export function drawMap(canvas, view, map, low, high, under) {
  const pen = under ? drawPicture(canvas, view, view.image, true) : paper(canvas, view);
  const wide = canvas.width / map[0].length, tall = canvas.height / map.length;
  pen.globalAlpha = under ? 0.62 : 1;
  map.forEach((row, r) => row.forEach((value, c) => {
    pen.fillStyle = colour(high > low ? (value - low) / (high - low) : 0);
    pen.fillRect(Math.round(c * wide), Math.round(r * tall), Math.ceil(wide), Math.ceil(tall));
  }));
  pen.globalAlpha = 1;
  return pen;
}

export function frame(canvas, view, [row, column], width = 1) {
  const pen = canvas.getContext('2d'), wide = canvas.width / view.columns, tall = canvas.height / view.rows;
  const inside = 3 * width * (3 * width <= wide / 6 ? 1 : -1);  // around a patch that is too small for it
  for (const [tint, thick] of [['#000', 6], ['#fff', 3]]) {
    pen.strokeStyle = tint;
    pen.lineWidth = thick * width;
    pen.strokeRect(column * wide + inside, row * tall + inside, wide - 2 * inside, tall - 2 * inside);
  }
}

export function edge(canvas, view, prefix) {  // the line between what is given and what is not
  const pen = canvas.getContext('2d'), wide = canvas.width / view.columns, tall = canvas.height / view.rows;
  const row = Math.floor(prefix / view.columns), x = (prefix % view.columns) * wide;
  for (const [tint, width] of [['#000', 4], ['#fff', 2]]) {
    pen.strokeStyle = tint;
    pen.lineWidth = width;
    pen.beginPath();
    pen.moveTo(0, (x ? row + 1 : row) * tall);
    if (x) {
      pen.lineTo(x, (row + 1) * tall);
      pen.lineTo(x, row * tall);
    }
    pen.lineTo(canvas.width, row * tall);
    pen.stroke();
  }
}

export function fade(canvas, view, prefix) {
  const pen = canvas.getContext('2d'), wide = canvas.width / view.columns, tall = canvas.height / view.rows;
  pen.fillStyle = getComputedStyle(document.documentElement).getPropertyValue('--tint');
  for (let at = prefix; at < view.rows * view.columns; at++) {
    pen.fillRect(Math.floor((at % view.columns) * wide), Math.floor(Math.floor(at / view.columns) * tall), Math.ceil(wide), Math.ceil(tall));
  }
}

export function contrasts(image, view) {  // of every patch: how much its grey values vary, row by row
  const canvas = document.createElement('canvas');
  [canvas.width, canvas.height] = [view.width, view.height];
  const pen = canvas.getContext('2d', {willReadFrequently: true}), wide = view.width / view.columns, tall = view.height / view.rows;
  pen.drawImage(image, 0, 0);
  return Array.from({length: view.rows * view.columns}, (_, at) => {
    const {data} = pen.getImageData((at % view.columns) * wide, Math.floor(at / view.columns) * tall, wide, tall);
    let sum = 0, squares = 0;
    for (let i = 0; i < data.length; i += 4) {
      const grey = data[i] + data[i + 1] + data[i + 2];
      sum += grey;
      squares += grey * grey;
    }
    return squares / (data.length / 4) - (sum / (data.length / 4)) ** 2;
  });
}

// Places: fractions of the whole picture, and patches of what a model sees of it.

export function patchAt(view, [x, y]) {
  const [left, top, right, bottom] = view.box;
  const held = (share, count) => Math.min(Math.max(Math.floor(share * count), 0), count - 1);
  return [held((y - top) / (bottom - top), view.rows), held((x - left) / (right - left), view.columns)];
}

export function placeOf(view, row, column) {
  const [left, top, right, bottom] = view.box;
  return [left + (right - left) * (column + 0.5) / view.columns, top + (bottom - top) * (row + 0.5) / view.rows];
}

// row and column from 1, held inside the grid
export const placeAt = (view, [row, column]) => placeOf(view, ...[[row, view.rows], [column, view.columns]].map(
  ([value, count]) => Math.min(Math.max(Math.round(value) || 1, 1), count) - 1));

// Objects of a drawn scene lie off its centre, where photographs have theirs.
export function firstPlace(picture, view) {
  const varied = contrasts(view.image, view), best = varied.indexOf(Math.max(...varied));
  return picture.kind === 'example' ? placeOf(view, Math.floor(best / view.columns), best % view.columns)
    : placeOf(view, Math.floor(view.rows / 2), Math.floor(view.columns / 2));
}
