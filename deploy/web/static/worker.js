// The model's own thread: the page answers while it computes. One message in, one or several out, with the same id.

import { openModel, TOLERANCE } from "./model.js";

let model = null;
let latest = 0; // id of the newest request: an older SmoothGrad stops for it

async function open({ described, provider }) {
  model = await openModel(described, provider);
  const difference = await model.check();
  if (!(difference <= TOLERANCE)) {
    const far = Number.isFinite(difference) ? `${(100 * difference).toFixed(1)} % off` : "another class";
    throw new Error(`computes other numbers than where the page was made (${far})`);
  }
  await model.warmUp();
  return { difference };
}

async function explain(request, id) {
  const { image, target, method, samples, noise } = request;
  const began = performance.now();
  if (method === "none") return { ...(await model.classify(image)), milliseconds: performance.now() - began };
  if (method !== "smoothgrad") {
    return { ...(await model.explain(image, target, method)), milliseconds: performance.now() - began };
  }
  let found = null;
  for await (found of model.smoothgrad(image, target, samples, noise)) {
    found.milliseconds = performance.now() - began;
    if (found.done < samples) postMessage({ id, partial: found });
    await new Promise((resolve) => setTimeout(resolve)); // let a newer request in
    if (id !== latest) return { stopped: true };
  }
  return found;
}

const TASKS = { open, explain, interrupt: async () => ({}), time: async ({ runs }) => ({ milliseconds: await model.time(runs) }) };

let before = Promise.resolve(); // one after the other: a session runs one request at a time

onmessage = ({ data: { id, task, request } }) => {
  latest = id;
  before = before.then(async () => {
    try {
      postMessage({ id, result: await TASKS[task](request, id) });
    } catch (error) {
      postMessage({ id, error: error?.message ?? String(error) });
    }
  });
};
