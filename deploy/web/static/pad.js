// The field to draw on: white on black, with a finger, a mouse or the keyboard.

const PEN = 22; // pixels wide, of a field of 280: as broad as the strokes of handwritten digits
const STEP = 10; // pixels of an arrow key
const BOX = 20 / 28; // share of the side that a digit of MNIST fills

// Calls onChange with the canvas whenever ink was added or removed.
export function drawingPad(canvas, pen, onChange) {
  const context = canvas.getContext("2d", { willReadFrequently: true });
  let last = null;
  let key = { x: canvas.width / 2, y: canvas.height / 2, down: false };

  function line(from, to) {
    context.strokeStyle = context.fillStyle = "#fff";
    [context.lineWidth, context.lineCap] = [PEN, "round"];
    context.beginPath();
    context.moveTo(from.x, from.y);
    context.lineTo(to.x + 0.01, to.y);
    context.stroke();
    onChange();
  }
  const at = ({ clientX, clientY }) => {
    const box = canvas.getBoundingClientRect();
    return {
      x: ((clientX - box.left) * canvas.width) / box.width,
      y: ((clientY - box.top) * canvas.height) / box.height,
    };
  };
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    last = at(event);
    line(last, last);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!last) return;
    const next = at(event);
    line(last, next);
    last = next;
  });
  for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => (last = null));

  const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  canvas.addEventListener("keydown", (event) => {
    if (event.key === " ") {
      key.down = !key.down;
      if (key.down) line(key, key);
    } else if (event.key in ARROWS) {
      const [dx, dy] = ARROWS[event.key];
      const kept = (value, size) => Math.min(size - STEP, Math.max(STEP, value));
      const next = { ...key, x: kept(key.x + dx * STEP, canvas.width), y: kept(key.y + dy * STEP, canvas.height) };
      if (key.down) line(key, next);
      key = next;
    } else return;
    event.preventDefault();
    const percent = (value, size) => Math.round((100 * value) / size);
    pen.textContent = `Pen ${key.down ? "down" : "up"}, ${percent(key.x, canvas.width)} % from the left, ${percent(key.y, canvas.height)} % from the top.`;
  });

  function clear() {
    [context.fillStyle, key, pen.textContent] = ["#000", { x: 140, y: 140, down: false }, ""];
    context.fillRect(0, 0, canvas.width, canvas.height);
    onChange();
  }
  clear();
  return { clear };
}

// The ink in a box of 20/28 of the side, its centre of mass in the middle, as MNIST's digits were prepared (LeCun et
// al. 1998); null where there is none. Returns a canvas.
export function centred(canvas) {
  const { width, height } = canvas;
  const pixels = canvas.getContext("2d").getImageData(0, 0, width, height).data;
  let [left, top, right, bottom, mass, sumX, sumY] = [width, height, -1, -1, 0, 0, 0];
  for (let y = 0; y < height; y += 1) {
    for (let x = 0; x < width; x += 1) {
      const ink = pixels[4 * (y * width + x)];
      if (ink === 0) continue;
      [left, right] = [Math.min(left, x), Math.max(right, x)];
      [top, bottom] = [Math.min(top, y), Math.max(bottom, y)];
      [mass, sumX, sumY] = [mass + ink, sumX + ink * x, sumY + ink * y];
    }
  }
  if (mass === 0) return null;
  const scale = (BOX * Math.min(width, height)) / Math.max(right - left + 1, bottom - top + 1);
  const made = new OffscreenCanvas(width, height);
  const context = made.getContext("2d", { willReadFrequently: true });
  context.fillRect(0, 0, width, height);
  context.imageSmoothingQuality = "high";
  context.translate(width / 2 - scale * (sumX / mass + 0.5), height / 2 - scale * (sumY / mass + 0.5));
  context.scale(scale, scale);
  context.drawImage(canvas, 0, 0);
  return made;
}
