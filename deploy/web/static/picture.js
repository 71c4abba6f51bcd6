// Pictures on their way in: from a file or a camera to upright RGBA rows.

import { isDeepGrey, storedSize, upright } from "./upright.js";

// Pillow warns from here on: four bytes a pixel are 360 MB, more than a phone gives a page.
const MOST_PIXELS = 89_478_485;
const TILE = 2048; // pixels on a side, which every graphics processor takes

// What a user can mend, in one line.
export class PictureError extends Error {}

// A decoded picture, upright: {width, height, close(),
//   rows(top, count): RGBA Uint8Array of so many rows, draw(context, width, height): draws all of it at that size}.
export async function readPicture(blob) {
  const name = blob.name ?? "the picture";
  const whole = new Uint8Array(await blob.arrayBuffer());
  if (whole.length === 0) throw new PictureError(`${name} is empty: copy it again.`);
  const size = storedSize(whole);
  if (size && size.width * size.height > MOST_PIXELS) {
    throw new PictureError(
      `${name} has ${size.width} x ${size.height} pixels, at most ${MOST_PIXELS.toLocaleString("en")} are read: ` +
        "make it smaller.",
    );
  }
  if (isDeepGrey(whole)) throw new PictureError(`${name} has 16 bits a pixel, expected 8: save it with 8 bits.`);
  const { orientation, bytes } = upright(whole);
  let bitmap;
  try {
    bitmap = await createImageBitmap(new Blob([bytes]), {
      premultiplyAlpha: "none", // which would lose the colours of transparent pixels
      colorSpaceConversion: "none", // the network was trained on the file's own numbers
    });
  } catch {
    throw new PictureError(`${name} is no picture that this browser can read: save it as PNG or JPEG.`);
  }
  if (bitmap.width * bitmap.height > MOST_PIXELS) {
    bitmap.close();
    throw new PictureError(`${name} has more than ${MOST_PIXELS.toLocaleString("en")} pixels: make it smaller.`);
  }
  return uprightPicture(bitmap, orientation);
}

// What stands on a canvas, as readPicture gives it.
export function canvasPicture(canvas) {
  const { width, height } = canvas;
  const rows = async (top, count) => canvas.getContext("2d").getImageData(0, top, width, count).data;
  const draw = (context, w, h) => context.drawImage(canvas, 0, 0, w, h);
  return { width, height, rows, draw, close() {} };
}

// Which stored column and row the upright pixel (x, y) comes from, by EXIF orientation; W, H are the stored size.
const STORED = {
  1: (x, y) => [x, y],
  2: (x, y, W) => [W - 1 - x, y],
  3: (x, y, W, H) => [W - 1 - x, H - 1 - y],
  4: (x, y, W, H) => [x, H - 1 - y],
  5: (x, y) => [y, x],
  6: (x, y, W, H) => [y, H - 1 - x],
  7: (x, y, W, H) => [W - 1 - y, H - 1 - x],
  8: (x, y, W) => [W - 1 - y, x],
};

// The same as a canvas's transformation [a, b, c, d, e, f] of stored positions to upright ones.
const TURNED = {
  1: () => [1, 0, 0, 1, 0, 0],
  2: (W) => [-1, 0, 0, 1, W, 0],
  3: (W, H) => [-1, 0, 0, -1, W, H],
  4: (W, H) => [1, 0, 0, -1, 0, H],
  5: () => [0, 1, 1, 0, 0, 0],
  6: (W, H) => [0, 1, -1, 0, H, 0],
  7: (W, H) => [0, -1, -1, 0, H, W],
  8: (W) => [0, -1, 1, 0, 0, W],
};

function uprightPicture(bitmap, orientation) {
  const { width: W, height: H } = bitmap;
  const [width, height] = orientation >= 5 ? [H, W] : [W, H];
  const stored = STORED[orientation];
  const readTile = tileReader();
  const rows = async (top, count) => {
    const found = new Uint8Array(4 * width * count);
    const into = new Uint32Array(found.buffer);
    for (let left = 0; left < width; left += TILE) {
      const wide = Math.min(TILE, width - left);
      const [xa, ya] = stored(left, top, W, H);
      const [xb, yb] = stored(left + wide - 1, top + count - 1, W, H);
      const [sx, sy] = [Math.min(xa, xb), Math.min(ya, yb)];
      const [sw, sh] = [Math.abs(xa - xb) + 1, Math.abs(ya - yb) + 1];
      const tile = new Uint32Array((await readTile(bitmap, sx, sy, sw, sh)).buffer);
      // Turning is affine: one step along the upright row and one down the column are steps in the tile.
      const start = (ya - sy) * sw + xa - sx;
      const [xr, yr] = stored(left + 1, top, W, H);
      const [xd, yd] = stored(left, top + 1, W, H);
      const [right, down] = [(yr - ya) * sw + xr - xa, (yd - ya) * sw + xd - xa];
      for (let y = 0; y < count; y += 1) {
        const [from, to] = [start + y * down, y * width + left];
        for (let x = 0; x < wide; x += 1) into[to + x] = tile[from + x * right];
      }
    }
    return found;
  };
  const draw = (context, w, h) => {
    context.save();
    context.scale(w / width, h / height);
    context.transform(...TURNED[orientation](W, H));
    context.drawImage(bitmap, 0, 0);
    context.restore();
  };
  return { width, height, rows, draw, close: () => bitmap.close() };
}

// Reads RGBA as it is stored. A 2D canvas multiplies by alpha and cannot undo it; a texture leaves pixels alone.
function tileReader() {
  const gl = new OffscreenCanvas(1, 1).getContext("webgl2");
  if (!gl) return readByCanvas; // exact for pictures without transparency
  gl.bindTexture(gl.TEXTURE_2D, gl.createTexture());
  gl.bindFramebuffer(gl.FRAMEBUFFER, gl.createFramebuffer());
  gl.pixelStorei(gl.UNPACK_PREMULTIPLY_ALPHA_WEBGL, false);
  gl.pixelStorei(gl.UNPACK_COLORSPACE_CONVERSION_WEBGL, gl.NONE);
  const texture = gl.getParameter(gl.TEXTURE_BINDING_2D);
  return async (bitmap, x, y, width, height) => {
    const tile = await createImageBitmap(bitmap, x, y, width, height, { premultiplyAlpha: "none" });
    gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA, gl.RGBA, gl.UNSIGNED_BYTE, tile);
    tile.close();
    gl.framebufferTexture2D(gl.FRAMEBUFFER, gl.COLOR_ATTACHMENT0, gl.TEXTURE_2D, texture, 0);
    const pixels = new Uint8Array(4 * width * height);
    gl.readPixels(0, 0, width, height, gl.RGBA, gl.UNSIGNED_BYTE, pixels);
    return gl.isContextLost() ? readByCanvas(bitmap, x, y, width, height) : pixels;
  };
}

async function readByCanvas(bitmap, x, y, width, height) {
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, x, y, width, height, 0, 0, width, height);
  return new Uint8Array(context.getImageData(0, 0, width, height).data.buffer);
}
