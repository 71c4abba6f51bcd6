// The EXIF orientation of a picture file, and the file without it.
//
// Browsers turn some kinds of files by it and not others, and none can be told to leave it. So the page reads it,
// makes the browser see none, and turns the pixels itself, as runtime.images does.

const ORIENTATION = 0x0112;

// Returns {orientation: 1..8, bytes: what to decode} of a file's bytes, Uint8Array.
export function upright(bytes) {
  const found = jpegExif(bytes) ?? pngExif(bytes) ?? webpExif(bytes);
  if (!found) return { orientation: 1, bytes };
  const entry = orientationEntry(bytes, found.start, found.end);
  if (!entry) return { orientation: 1, bytes };
  return { orientation: entry.value, bytes: found.without(entry) };
}

// Width and height as stored, from the first bytes of PNG, GIF, BMP, WebP and JPEG; null where they are not told.
export function storedSize(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  try {
    if (isPng(bytes)) return { width: view.getUint32(16), height: view.getUint32(20) };
    if (text(bytes, 0, 3) === "GIF") return { width: view.getUint16(6, true), height: view.getUint16(8, true) };
    if (text(bytes, 0, 2) === "BM") {
      return { width: Math.abs(view.getInt32(18, true)), height: Math.abs(view.getInt32(22, true)) };
    }
    if (text(bytes, 0, 4) === "RIFF" && text(bytes, 8, 12) === "WEBP") return webpSize(bytes, view);
    for (const { marker, start } of jpegSegments(bytes)) {
      const frame = marker >= 0xc0 && marker <= 0xcf && ![0xc4, 0xc8, 0xcc].includes(marker);
      if (frame) return { width: view.getUint16(start + 3), height: view.getUint16(start + 1) };
    }
  } catch (error) {
    if (!(error instanceof RangeError)) throw error; // the file ends early: decoding tells
  }
  return null;
}

// Whether a file is a PNG of one grey channel with 16 bits, which 8 bits would clip or halve without a word.
export function isDeepGrey(bytes) {
  return isPng(bytes) && bytes[24] === 16 && bytes[25] === 0;
}

function webpSize(bytes, view) {
  const kind = text(bytes, 12, 16);
  const three = (at) => 1 + (bytes[at] | (bytes[at + 1] << 8) | (bytes[at + 2] << 16));
  if (kind === "VP8X") return { width: three(24), height: three(27) };
  if (kind === "VP8L") {
    const packed = view.getUint32(21, true);
    return { width: (packed & 0x3fff) + 1, height: ((packed >>> 14) & 0x3fff) + 1 };
  }
  return { width: view.getUint16(26, true) & 0x3fff, height: view.getUint16(28, true) & 0x3fff };
}

function* jpegSegments(bytes) {
  if (bytes[0] !== 0xff || bytes[1] !== 0xd8) return;
  let at = 2;
  while (at + 4 <= bytes.length && bytes[at] === 0xff) {
    const marker = bytes[at + 1];
    if (marker === 0xff) { at += 1; continue; } // fill bytes
    if (marker === 0xda || marker === 0xd9) return; // pixels follow
    const length = (bytes[at + 2] << 8) | bytes[at + 3];
    yield { marker, start: at + 4, end: at + 2 + length };
    at += 2 + length;
  }
}

function jpegExif(bytes) {
  for (const { marker, start, end } of jpegSegments(bytes)) {
    if (marker === 0xe1 && text(bytes, start, start + 6) === "Exif\0\0") return patched(bytes, start + 6, end);
  }
  return null;
}

function pngExif(bytes) {
  if (!isPng(bytes)) return null;
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  for (let at = 8; at + 12 <= bytes.length; ) {
    const end = at + 12 + view.getUint32(at);
    if (text(bytes, at + 4, at + 8) === "eXIf") {
      // Without the chunk: with another value its checksum would be wrong.
      const without = () => joined(bytes.subarray(0, at), bytes.subarray(end));
      return { start: at + 8, end: end - 4, without };
    }
    at = end;
  }
  return null;
}

function webpExif(bytes) {
  if (text(bytes, 0, 4) !== "RIFF" || text(bytes, 8, 12) !== "WEBP") return null;
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  for (let at = 12; at + 8 <= bytes.length; ) {
    const length = view.getUint32(at + 4, true);
    if (text(bytes, at, at + 4) === "EXIF") {
      const named = text(bytes, at + 8, at + 14) === "Exif\0\0" ? 6 : 0;
      return patched(bytes, at + 8 + named, at + 8 + length);
    }
    at += 8 + length + (length % 2);
  }
  return null;
}

function patched(bytes, start, end) {
  const without = ({ at, little }) => {
    const copy = bytes.slice();
    new DataView(copy.buffer).setUint16(at, 1, little);
    return copy;
  };
  return { start, end, without };
}

// The orientation among the tags of a TIFF header at `start`: {value 1..8, at: where it stands, little-endian or not}.
function orientationEntry(bytes, start, end) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, Math.min(end, bytes.length));
  try {
    const order = text(bytes, start, start + 2);
    if (order !== "II" && order !== "MM") return null;
    const little = order === "II";
    const first = start + view.getUint32(start + 4, little);
    const entries = view.getUint16(first, little);
    for (let index = 0; index < entries; index += 1) {
      const at = first + 2 + 12 * index;
      const short = view.getUint16(at + 2, little) === 3;
      if (view.getUint16(at, little) === ORIENTATION && short) {
        const value = view.getUint16(at + 8, little);
        return value >= 1 && value <= 8 ? { value, at: at + 8, little } : null;
      }
    }
  } catch (error) {
    if (!(error instanceof RangeError)) throw error; // damaged tags say nothing of the pixels
  }
  return null;
}

function isPng(bytes) {
  return text(bytes, 0, 8) === "\x89PNG\r\n\x1a\n";
}

function text(bytes, start, end) {
  return String.fromCharCode(...bytes.subarray(start, end));
}

function joined(a, b) {
  const whole = new Uint8Array(a.length + b.length);
  whole.set(a);
  whole.set(b, a.length);
  return whole;
}
