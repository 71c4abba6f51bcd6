// The page: where pictures come from, and what is shown of them.

import { startCamera } from "./camera.js";
import { drawnSize, drawOverlay, whereInWords } from "./drawing.js";
import { fasterOnWebGpu, openEngine } from "./engine.js";
import { centred, drawingPad } from "./pad.js";
import { canvasPicture, readPicture } from "./picture.js";
import { toModel } from "./resizing.js";
import { classRows, factRows, methodOptions, milliseconds, percent } from "./words.js";

const NOISE = 0.15; // of SmoothGrad, as in runtime.explanations.attribution
const SAMPLES = 32;
const SPOKEN_MS = 2000; // a screen reader is told of a new class at most so often
const SLOW_PIXELS = 4_000_000; // a phone prepares a picture of more in a second or longer

const $ = (id) => document.getElementById(id);
const described = await (await fetch("model.json")).json();
const { manifest } = described;

let engine = null;
let camera = null;
let picture = null; // present one, and what it was made of on screen
let shown = null; // what was last found in it
let busy = false;
let again = false;
let spoken = -Infinity; // the first answer does not wait
let settled = ""; // what the state says while nothing works
const source = document.createElement("canvas");

function problem(text) {
  $("problem").textContent = text;
  $("problem").hidden = !text;
}

// Tells that a large picture is worked on, and gives the browser the time to draw that.
function tellWork() {
  $("state").textContent = "Working on the picture ...";
  return new Promise((drawn) => setTimeout(drawn, 50));
}

function settle(text) {
  settled = text;
  $("state").textContent = text;
}

function show(next) {
  if (next !== picture) picture?.close();
  picture = next;
  const { width, height } = drawnSize(picture);
  [source.width, source.height] = [width, height];
  const context = source.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingEnabled = width < picture.width; // tiny pictures keep their pixels
  context.imageSmoothingQuality = "high";
  picture.draw(context, width, height);
  $("stage").hidden = false;
  update();
}

// Computes what is asked of the present picture; while it does, the newest wish waits and older ones are dropped.
async function update() {
  if (!engine || !picture) return;
  if (busy) {
    again = true;
    return;
  }
  busy = true;
  try {
    do {
      again = false;
      const of = picture;
      const began = performance.now();
      const image = await toModel(of, manifest.input);
      const prepared = performance.now() - began;
      const request = { image, target: Number($("target").value), method: $("method").value, samples: SAMPLES, noise: NOISE };
      const found = await engine.ask("explain", request, (partial) => {
        if (again) engine.ask("interrupt"); // a newer wish waits
        else present(partial, of, prepared);
      });
      if (!found.stopped) present(found, of, prepared);
    } while (again);
    problem("");
  } catch (error) {
    problem(error.message);
  } finally {
    busy = false;
    if ($("state").textContent !== settled) settle(settled);
  }
}

function present(found, of, prepared) {
  shown = { found, of };
  redraw();
  const ranked = classRows(found.probabilities, manifest.classes);
  const [best] = ranked;
  const said = `${best.label}, ${percent(best.probability)}`;
  if (!camera || performance.now() - spoken > SPOKEN_MS) {
    if ($("answer").textContent !== said) $("answer").textContent = said;
    spoken = performance.now();
  }
  $("classes").replaceChildren(...ranked.map(classRow));
  const part = found.done ? `, ${found.done} of ${found.samples} noisy copies` : "";
  const what = found.map ? `class and map${part}` : "class";
  $("times").textContent =
    `${milliseconds(found.milliseconds)} for ${what}, ${milliseconds(prepared)} to prepare the picture, on ${engine.provider}`;
  const explained = found.map ? manifest.classes[found.target] : "";
  const where = found.map ? whereInWords(found) : "";
  const words = found.map ? `Pixels that ${explained} depends on: ${where}.` : "The picture, without a map.";
  if (!camera) $("where").textContent = words;
  $("overlay").setAttribute("aria-label", words);
}

function redraw() {
  if (!shown) return;
  const { found, of } = shown;
  drawOverlay(source, $("overlay"), found.map ? found : null, of, manifest.input, Number($("strength").value));
}

function classRow({ label, probability }) {
  const row = document.createElement("li");
  const bar = document.createElement("progress");
  [bar.max, bar.value] = [1, probability];
  bar.setAttribute("aria-hidden", "true");
  const [name, number] = [document.createElement("span"), document.createElement("span")];
  [name.textContent, number.textContent] = [label, percent(probability)];
  row.append(bar, name, number);
  return row;
}

async function take(blob) {
  leave();
  try {
    const read = await readPicture(blob);
    if (read.width * read.height > SLOW_PIXELS && engine) await tellWork();
    show(read);
    problem("");
  } catch (error) {
    problem(error.message);
  }
}

// Ends the camera and the drawing field, before another source is used.
function leave() {
  camera?.stop();
  camera = null;
  $("video").hidden = $("pad").hidden = true;
  for (const id of ["camera", "draw"]) $(id).setAttribute("aria-pressed", "false");
}

async function toggleCamera() {
  const off = camera === null;
  leave();
  if (!off) return;
  try {
    const mine = (camera = await startCamera($("video")));
    problem("");
    $("video").hidden = false;
    $("camera").setAttribute("aria-pressed", "true");
    const next = () => {
      if (camera !== mine) return;
      if (mine.ended()) {
        leave();
        problem("The camera was switched off: choose a picture, or use it again.");
        return;
      }
      if (!busy && !document.hidden && $("video").videoWidth) show(canvasPicture(mine.frame()));
      requestAnimationFrame(next);
    };
    next();
  } catch (error) {
    leave();
    problem(error.message);
  }
}

let pad = null;

function toggleDrawing() {
  const off = $("pad").hidden;
  leave();
  if (!off) return;
  $("pad").hidden = false;
  $("draw").setAttribute("aria-pressed", "true");
  pad ??= drawingPad($("ink"), $("pen"), () => {
    const ink = centred($("ink"));
    if (ink) show(canvasPicture(ink));
  });
  $("ink").focus();
}

function listen() {
  $("file").addEventListener("change", ({ target }) => {
    if (target.files[0]) take(target.files[0]);
    target.value = ""; // so that the same file can be chosen again
  });
  $("camera").addEventListener("click", toggleCamera);
  $("draw").addEventListener("click", toggleDrawing);
  $("clear").addEventListener("click", () => pad.clear());
  $("strength").addEventListener("input", redraw);
  for (const id of ["target", "method"]) $(id).addEventListener("change", update);
  for (const kind of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(kind, (event) => {
      event.preventDefault();
      $("drop").classList.toggle("over", kind === "dragover");
      if (kind !== "drop") return;
      const [file] = event.dataTransfer.files;
      if (file) take(file);
      else problem("What was dropped is no file: save the picture first, then drop it.");
    });
  }
  document.addEventListener("paste", (event) => {
    const [file] = event.clipboardData.files;
    if (file) take(file);
  });
}

function fill() {
  $("target").append(...manifest.classes.map((label, index) => new Option(label, index)));
  $("method").append(...methodOptions(described).map(([value, label]) => new Option(label, value)));
  // Handwriting is drawn where the network takes grey pictures of single letters or digits.
  $("draw").hidden = manifest.input.channels !== 1 || !manifest.classes.every((label) => [...label].length === 1);
  $("examples").hidden = described.examples.length === 0;
  for (const example of described.examples) {
    const [row, button, image] = ["li", "button", "img"].map((name) => document.createElement(name));
    [button.type, image.src, image.alt] = ["button", example.file, `Example ${example.label}`];
    button.addEventListener("click", async () => take(await (await fetch(example.file)).blob()));
    button.append(image);
    row.append(button);
    $("examples").append(row);
  }
  for (const [term, text] of factRows(described)) {
    const [name, value] = [document.createElement("dt"), document.createElement("dd")];
    [name.textContent, value.textContent] = [term, text];
    $("facts").append(name, value);
  }
  const title = manifest.data ? `${manifest.arch}, trained on ${manifest.data}` : manifest.arch;
  $("title").textContent = document.title = title;
}

async function start() {
  fill();
  listen();
  try {
    engine = await openEngine(described);
  } catch (error) {
    settle("The network does not run in this browser.");
    problem(`This browser ${error.message}. Update it, or take another one.`);
    return;
  }
  const ready = (by, more) => {
    const check = `checked on ${described.check.length} pictures, logits within ${engine.difference.toExponential(0)}`;
    settle(`Ready: ${[by, check, more].filter(Boolean).join("; ")}.`);
  };
  ready("WebAssembly", "");
  update();
  const { engine: faster, reason } = await fasterOnWebGpu(described, engine);
  if (faster) {
    engine.stop();
    engine = faster;
  }
  ready(faster ? "WebGPU" : "WebAssembly", reason);
}

await start();
// Only pages from https or localhost may keep themselves for use without a network.
navigator.serviceWorker?.register("sw.js").catch(() => {});
