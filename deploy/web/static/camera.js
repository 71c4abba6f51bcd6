// Frames of a camera, and in words why there are none.

import { PictureError } from "./picture.js";

const REASONS = {
  NotAllowedError: "This page may not use the camera: allow it in the browser's settings, or choose a picture.",
  NotFoundError: "No camera is there: choose a picture instead.",
  NotReadableError: "Another program uses the camera: close it, or choose a picture.",
  OverconstrainedError: "No camera is there: choose a picture instead.",
};

// Starts a camera into a <video>; returns {frame(): canvas of the present frame, stop()}.
export async function startCamera(video) {
  if (!navigator.mediaDevices?.getUserMedia) {
    throw new PictureError("A browser gives its camera to pages from https or localhost only: choose a picture.");
  }
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" }, audio: false });
  } catch (error) {
    throw new PictureError(REASONS[error.name] ?? `The camera cannot be used (${error.message}): choose a picture.`);
  }
  video.srcObject = stream;
  await video.play();
  const canvas = new OffscreenCanvas(1, 1);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  return {
    frame() {
      [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
      context.drawImage(video, 0, 0);
      return canvas;
    },
    ended: () => stream.getTracks().every((track) => track.readyState === "ended"),
    stop() {
      for (const track of stream.getTracks()) track.stop();
      video.srcObject = null;
    },
  };
}
