// The picture with the map over it, as runtime.explanations.explanation draws it, and the map in words.

import { resizeMap, seenPart } from "./resizing.js";

const SHORTEST = 480; // pixels that the shorter side is drawn with at least
const LONGEST = 960;
const BRIGHT_PERCENTILE = 99;
const PLACES = [
  "at the top left", "at the top", "at the top right", "at the left", "in the middle", "at the right",
  "at the bottom left", "at the bottom", "at the bottom right",
];

// Size on screen of a picture, whole multiples of it where it is tiny.
export function drawnSize({ width, height }) {
  const shorter = Math.min(width, height);
  let scale = shorter < SHORTEST ? Math.ceil(SHORTEST / shorter) : 1;
  scale = Math.min(scale, LONGEST / Math.max(width, height));
  return { width: Math.max(1, Math.round(scale * width)), height: Math.max(1, Math.round(scale * height)) };
}

// Draws the map over a picture.
//   source: canvas with the picture, of the drawn size
//   into: canvas to draw on
//   explained: {map, height, width}, or null for the picture alone
//   picture: its size, by which the part that the model saw is found
export function drawOverlay(source, into, explained, picture, input, strength) {
  const { width, height } = source;
  [into.width, into.height] = [width, height];
  const context = into.getContext("2d", { willReadFrequently: true });
  context.drawImage(source, 0, 0);
  if (!explained) return;
  const drawn = context.getImageData(0, 0, width, height);
  const part = seenPart(picture, input);
  const [top, left] = [Math.round((part.top * height) / picture.height), Math.round((part.left * width) / picture.width)];
  const seenHeight = Math.min(height - top, Math.round((part.height * height) / picture.height));
  const seenWidth = Math.min(width - left, Math.round((part.width * width) / picture.width));
  const map = resizeMap(explained.map, explained.height, explained.width, seenHeight, seenWidth);
  const bright = Math.max(percentile(map, BRIGHT_PERCENTILE), 1.17549435e-38);
  const pixels = drawn.data;
  for (let y = 0; y < height; y += 1) {
    for (let x = 0; x < width; x += 1) {
      const at = 4 * (y * width + x);
      const inside = y >= top && y < top + seenHeight && x >= left && x < left + seenWidth;
      const level = inside ? Math.min(1, map[(y - top) * seenWidth + x - left] / bright) : 0;
      const grey = (pixels[at] + pixels[at + 1] + pixels[at + 2]) / 3;
      const opacity = strength * Math.sqrt(level);
      for (let color = 0; color < 3; color += 1) {
        const heat = 255 * Math.min(1, Math.max(0, 3 * level - color));
        pixels[at + color] = Math.round((1 - opacity) * grey + opacity * heat);
      }
    }
  }
  context.putImageData(drawn, 0, 0);
}

// Where most of a map lies, in words: for those who do not see it.
export function whereInWords({ map, height, width }) {
  const sums = new Float64Array(9);
  let all = 0;
  for (let y = 0; y < height; y += 1) {
    for (let x = 0; x < width; x += 1) {
      const value = map[y * width + x];
      sums[3 * Math.floor((3 * y) / height) + Math.floor((3 * x) / width)] += value;
      all += value;
    }
  }
  if (!(all > 0)) return "no pixel";
  const best = sums.indexOf(Math.max(...sums));
  return `${Math.round((100 * sums[best]) / all)} % of the map ${PLACES[best]}`;
}

function percentile(values, percent) {
  const sorted = Float32Array.from(values).sort();
  const at = ((sorted.length - 1) * percent) / 100;
  const below = Math.floor(at);
  const above = Math.min(sorted.length - 1, below + 1);
  return sorted[below] + (at - below) * (sorted[above] - sorted[below]);
}
