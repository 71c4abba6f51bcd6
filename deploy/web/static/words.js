// What the page says: classes, methods, times, facts.

const SHOWN_CLASSES = 5;
const CAMS = { gradcam: "Grad-CAM", hirescam: "HiResCAM", layercam: "LayerCAM" };

// [{label, probability}], the most probable classes first.
export function classRows(probabilities, classes) {
  return Array.from(probabilities, (probability, index) => ({ label: classes[index], probability }))
    .sort((a, b) => b.probability - a.probability)
    .slice(0, SHOWN_CLASSES);
}

// [[value, label]] of the methods that the file can do.
export function methodOptions({ outputs, manifest }) {
  const options = [];
  if (outputs.includes("gradient")) options.push(["gradient", "Gradient"], ["smoothgrad", "SmoothGrad"]);
  for (const { output, method, layer } of manifest.cams ?? []) {
    options.push([output, `${CAMS[method] ?? method}, ${layer}`]);
  }
  return [...options, ["none", "No map"]];
}

export function factRows({ manifest, sha256, file, bytes, runtime }) {
  const [height, width] = manifest.input.size;
  const bits = [...new Set(manifest.layers.map((layer) => layer.bits).filter(Boolean))].sort((a, b) => a - b);
  const rows = [
    ["Picture", `${height} x ${width} pixels, ${manifest.input.channels === 1 ? "grey" : "colour"}`],
    ["Classes", manifest.classes.length > 20 ? `${manifest.classes.length}` : manifest.classes.join(", ")],
    ["Numbers", bits.length ? `integers of ${bits.join(", ")} bits` : "floats"],
  ];
  if ("test_accuracy" in manifest.metrics) rows.push(["Test accuracy", `${manifest.metrics.test_accuracy.toFixed(2)} %`]);
  if ((manifest.temperature ?? 1) !== 1) rows.push(["Temperature", manifest.temperature.toFixed(3)]);
  rows.push(["File", `${file}, ${bytes.toLocaleString("en")} bytes, sha256 ${sha256}`]);
  rows.push(["Runtime", `ONNX Runtime Web ${runtime.version}`]);
  return rows;
}

export function percent(probability) {
  return `${(100 * probability).toFixed(1)} %`;
}

export function milliseconds(time) {
  return `${time.toFixed(time < 10 ? 1 : 0)} ms`;
}
