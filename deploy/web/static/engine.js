// The page's side of the model's thread, and the choice of what computes.

const RUNS = 9; // timed runs by which the faster of two providers is found

// A worker that answers: ask(task, request, onPartial) -> promise of its result.
export function startWorker() {
  const worker = new Worker(new URL("./worker.js", import.meta.url), { type: "module" });
  const waiting = new Map();
  let last = 0;
  worker.onmessage = ({ data: { id, partial, result, error } }) => {
    const { resolve, reject, onPartial } = waiting.get(id);
    if (partial) {
      onPartial?.(partial);
      return;
    }
    waiting.delete(id);
    if (error === undefined) resolve(result);
    else reject(new Error(error));
  };
  worker.onerror = (event) => {
    for (const { reject } of waiting.values()) reject(new Error(event.message || "its script cannot be loaded"));
    waiting.clear();
  };
  const ask = (task, request = {}, onPartial = undefined) =>
    new Promise((resolve, reject) => {
      last += 1;
      waiting.set(last, { resolve, reject, onPartial });
      worker.postMessage({ id: last, task, request });
    });
  return { ask, stop: () => worker.terminate() };
}

// Opens the model on WebAssembly, which every browser has.
export async function openEngine(described) {
  const engine = startWorker();
  const { difference } = await engine.ask("open", { described, provider: "wasm" });
  return { ...engine, provider: "wasm", difference };
}

// The same on WebGPU where there is one, it computes the same, and it is faster; otherwise null and why.
export async function fasterOnWebGpu(described, engine) {
  if (!described.runtime.webgpu) return { engine: null, reason: "" };
  if (!(await navigator.gpu?.requestAdapter())) return { engine: null, reason: "no WebGPU here" };
  const candidate = startWorker();
  try {
    const { difference } = await candidate.ask("open", { described, provider: "webgpu" });
    const [mine, other] = [await candidate.ask("time", { runs: RUNS }), await engine.ask("time", { runs: RUNS })];
    if (mine.milliseconds < other.milliseconds) {
      return { engine: { ...candidate, provider: "webgpu", difference }, reason: "" };
    }
    candidate.stop();
    return { engine: null, reason: `WebGPU is slower here: ${mine.milliseconds.toFixed(1)} ms` };
  } catch (error) {
    candidate.stop();
    return { engine: null, reason: `WebGPU left out: ${error.message}` };
  }
}
