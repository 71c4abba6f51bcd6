// Any picture to the size and channels of the model: the same arithmetic as runtime/images.

import { PictureError } from "./picture.js";

const STRIP = 256; // rows read at a time, so that a large picture is never held twice

// Returns the model's image, Uint8Array [H, W, C], of a picture; `input` is the manifest's.
export async function toModel(picture, input) {
  const [height, width] = input.size;
  let seen = { top: 0, left: 0, height: picture.height, width: picture.width };
  if (picture.height !== height || picture.width !== width) {
    if (input.resize === "none") {
      throw new PictureError(
        `The picture has ${picture.height} x ${picture.width} pixels, the model takes ${height} x ${width} only.`,
      );
    }
    seen = seenPart(picture, input);
  }
  const rgb = await resize(picture, seen, height, width);
  return input.channels === 3 ? rgb : grey(rgb);
}

// The part of a picture that the model sees: all of it or, where its input is cropped, the largest middle part.
export function seenPart({ height, width }, input) {
  const [h, w] = input.size;
  if (input.resize !== "crop" || (height === h && width === w)) return { top: 0, left: 0, height, width };
  const kept =
    width * h > height * w
      ? [height, Math.max(1, halfToEven((height * w) / h))]
      : [Math.max(1, halfToEven((width * h) / w)), width];
  return {
    top: Math.floor((height - kept[0]) / 2),
    left: Math.floor((width - kept[1]) / 2),
    height: kept[0],
    width: kept[1],
  };
}

// float32 [h', w'] of a map [h, w], bilinear with antialiasing.
export function resizeMap(map, h, w, height, width) {
  const rows = bilinearWeights(h, height);
  const columns = bilinearWeights(w, width);
  const narrowed = new Float64Array(h * width);
  for (let y = 0; y < h; y += 1) {
    for (let x = 0; x < width; x += 1) {
      const { first, weights } = columns[x];
      let sum = 0;
      for (let k = 0; k < weights.length; k += 1) sum += weights[k] * map[y * w + first + k];
      narrowed[y * width + x] = sum;
    }
  }
  const resized = new Float32Array(height * width);
  for (let y = 0; y < height; y += 1) {
    const { first, weights } = rows[y];
    for (let x = 0; x < width; x += 1) {
      let sum = 0;
      for (let k = 0; k < weights.length; k += 1) sum += weights[k] * narrowed[(first + k) * width + x];
      resized[y * width + x] = sum;
    }
  }
  return resized;
}

// RGB Uint8Array [H, W, 3] of a part of a picture, Pillow's BILINEAR: width first, rounded, then height.
async function resize(picture, seen, height, width) {
  const columns = bilinearWeights(seen.width, width);
  const narrowed = new Uint8Array(3 * seen.height * width);
  for (let top = 0; top < seen.height; top += STRIP) {
    const count = Math.min(STRIP, seen.height - top);
    const strip = await picture.rows(seen.top + top, count);
    for (let y = 0; y < count; y += 1) {
      const row = 4 * (y * picture.width + seen.left);
      for (let x = 0; x < width; x += 1) {
        const { first, weights } = columns[x];
        let [r, g, b] = [0, 0, 0];
        for (let k = 0, at = row + 4 * first; k < weights.length; k += 1, at += 4) {
          r += weights[k] * strip[at];
          g += weights[k] * strip[at + 1];
          b += weights[k] * strip[at + 2];
        }
        const into = 3 * ((top + y) * width + x);
        narrowed[into] = Math.floor(r + 0.5);
        narrowed[into + 1] = Math.floor(g + 0.5);
        narrowed[into + 2] = Math.floor(b + 0.5);
      }
    }
  }
  const rows = bilinearWeights(seen.height, height);
  const resized = new Uint8Array(3 * height * width);
  const stride = 3 * width;
  for (let y = 0; y < height; y += 1) {
    const { first, weights } = rows[y];
    for (let x = 0; x < stride; x += 1) {
      let sum = 0;
      for (let k = 0; k < weights.length; k += 1) sum += weights[k] * narrowed[(first + k) * stride + x];
      resized[y * stride + x] = Math.min(255, Math.floor(sum + 0.5));
    }
  }
  return resized;
}

// ITU-R BT.601 luma in 16-bit fixed point, as in Pillow's convert("L").
function grey(rgb) {
  const found = new Uint8Array(rgb.length / 3);
  for (let index = 0; index < found.length; index += 1) {
    const at = 3 * index;
    found[index] = (19595 * rgb[at] + 38470 * rgb[at + 1] + 7471 * rgb[at + 2] + 0x8000) >> 16;
  }
  return found;
}

// Weights of a triangle filter as wide as one target pixel, multiples of 2^-22: [target] of {first, weights}.
function bilinearWeights(source, target) {
  const ratio = source / target;
  const support = Math.max(ratio, 1);
  return Array.from({ length: target }, (_, index) => {
    const center = (index + 0.5) * ratio;
    const first = Math.max(0, Math.floor(center - support));
    const end = Math.min(source, Math.ceil(center + support) + 1);
    const raw = [];
    for (let at = first; at < end; at += 1) raw.push(Math.max(0, 1 - Math.abs(at + 0.5 - center) / support));
    const scale = 1 / raw.reduce((sum, weight) => sum + weight, 0);
    return { first, weights: Float64Array.from(raw, (weight) => Math.floor(weight * scale * 2 ** 22 + 0.5) / 2 ** 22) };
  });
}

function halfToEven(value) {
  const rounded = Math.round(value);
  return value % 1 === 0.5 && rounded % 2 === 1 ? rounded - 1 : rounded;
}
