// An exported model in ONNX Runtime Web: class, map, and the check that this browser computes what others do.

const MAPS_AT_ONCE = 8; // noisy copies in one run

// Largest difference of logits, as a share of the largest one, at which the arithmetic counts as the same. Sums of
// floats in another order may move one integer code by one step, 0.02 at most so far; a wrong kernel moves all.
export const TOLERANCE = 0.05;

// Opens `described` (model.json) on an execution provider, "wasm" or "webgpu".
export async function openModel(described, provider) {
  const ort = await import(described.runtime[provider].module);
  ort.env.wasm.numThreads = 1; // more need headers that a plain web server does not send
  ort.env.wasm.wasmPaths = {
    mjs: new URL(described.runtime[provider].loader, import.meta.url).href,
    wasm: new URL(described.runtime[provider].wasm, import.meta.url).href,
  };
  const open = (name) =>
    ort.InferenceSession.create(new URL(name, import.meta.url).href, {
      executionProviders: [provider],
      logSeverityLevel: 3,
    });
  const classifying = await open(described.classOnly);
  let explaining = null;
  const { size, channels } = described.manifest.input;
  const classes = described.manifest.classes.length;
  const temperature = described.manifest.temperature ?? 1;

  async function run(images, target, outputs) {
    const n = images.length / (size[0] * size[1] * channels);
    const feeds = { image: new ort.Tensor("uint8", images, [n, ...size, channels]) };
    let session = classifying;
    if (outputs.some((name) => name !== "logits")) {
      session = explaining ??= described.classOnly === described.file ? classifying : await open(described.file);
      feeds.target = new ort.Tensor("int64", new BigInt64Array(n).fill(BigInt(target)), [n]);
    }
    const found = await session.run(feeds, outputs);
    return Object.fromEntries(outputs.map((name) => [name, Float32Array.from(found[name].data)]));
  }

  return {
    provider,

    // {logits, probabilities} of one image.
    async classify(image) {
      const { logits } = await run(image, -1, ["logits"]);
      return { logits, probabilities: softmax(logits, temperature) };
    },

    // The same with {target, map, height, width}: the largest magnitude over channels of the gradient, or a CAM.
    async explain(image, target, output = "gradient") {
      const found = await run(image, target, ["logits", output]);
      const cam = described.manifest.cams?.find((each) => each.output === output);
      const [height, width] = cam ? cam.size : size;
      const map = cam ? found[output] : largestMagnitude(found[output], channels);
      const explained = target < 0 ? largest(found.logits) : target;
      const probabilities = softmax(found.logits, temperature);
      return { logits: found.logits, probabilities, target: explained, map, height, width };
    },

    // SmoothGrad (Smilkov et al. 2017): yields the same after every few noisy copies, from the copies so far.
    async *smoothgrad(image, target, samples, noise) {
      const { logits, probabilities } = await this.classify(image);
      const explained = target < 0 ? largest(logits) : target;
      const sum = new Float64Array(image.length);
      const random = normalNumbers(1);
      for (let done = 0; done < samples; ) {
        const count = Math.min(MAPS_AT_ONCE, samples - done);
        const { gradient } = await run(noisyCopies(image, count, noise, random), explained, ["gradient"]);
        for (let index = 0; index < gradient.length; index += 1) sum[index % sum.length] += gradient[index];
        done += count;
        const map = largestMagnitude(sum, channels).map((value) => value / done);
        yield { logits, probabilities, target: explained, map, height: size[0], width: size[1], done, samples };
      }
    },

    // Largest difference from the stored logits, relative; Infinity where a class differs.
    async check() {
      let worst = 0;
      for (const { image, logits } of described.check) {
        const found = await this.classify(Uint8Array.from(atob(image), (letter) => letter.charCodeAt(0)));
        if (largest(found.logits) !== largest(logits) || found.logits.length !== classes) return Infinity;
        const scale = Math.max(...logits.map(Math.abs));
        const far = Math.max(...logits.map((value, index) => Math.abs(value - found.logits[index])));
        worst = Math.max(worst, far / scale);
      }
      return worst;
    },

    // Opens what explains, and runs it once: the first picture is then as fast as the next.
    async warmUp() {
      const output = described.outputs.find((name) => name !== "logits");
      if (output) await this.explain(new Uint8Array(size[0] * size[1] * channels), -1, output);
    },

    // Median milliseconds of class alone.
    async time(runs) {
      const image = new Uint8Array(size[0] * size[1] * channels).fill(128);
      const times = [];
      for (let index = 0; index < runs + 2; index += 1) {
        const began = performance.now();
        await this.classify(image);
        times.push(performance.now() - began);
      }
      return times.slice(2).sort((a, b) => a - b)[Math.floor(runs / 2)];
    },
  };
}

export function largest(values) {
  return values.reduce((best, value, index) => (value > values[best] ? index : best), 0);
}

function softmax(logits, temperature) {
  const top = Math.max(...logits);
  const raised = Array.from(logits, (value) => Math.exp((value - top) / temperature));
  const sum = raised.reduce((total, value) => total + value, 0);
  return raised.map((value) => value / sum);
}

// float32 [H, W] of [C, H, W].
function largestMagnitude(gradient, channels) {
  const pixels = gradient.length / channels;
  const map = new Float32Array(pixels);
  for (let index = 0; index < gradient.length; index += 1) {
    map[index % pixels] = Math.max(map[index % pixels], Math.abs(gradient[index]));
  }
  return map;
}

// As runtime.explanations.attribution.noisy_copies, with other random numbers.
function noisyCopies(image, count, noise, random) {
  const deviation = noise * (image.reduce((a, b) => Math.max(a, b)) - image.reduce((a, b) => Math.min(a, b)));
  const copies = new Uint8Array(count * image.length); // [count, H, W, C]
  for (let index = 0; index < copies.length; index += 1) {
    const level = Math.round(image[index % image.length] + deviation * random());
    copies[index] = Math.min(255, Math.max(0, level));
  }
  return copies;
}

// Normal numbers (Box and Muller 1958) from a 32-bit congruential sequence, the same in every run.
function normalNumbers(seed) {
  let state = seed >>> 0;
  const uniform = () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return (state + 0.5) / 2 ** 32;
  };
  return () => Math.sqrt(-2 * Math.log(uniform())) * Math.cos(2 * Math.PI * uniform());
}
