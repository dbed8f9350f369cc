// Images in, answers out, all in the page. What the model needs to know stands as JSON in it; bytes come from scripts
// beside or in it, packed by gzip and base64, since a page that was opened from disk may not fetch files.
"use strict";
(() => {
  const facts = JSON.parse(document.getElementById("facts").textContent);
  const status = document.getElementById("status"), results = document.getElementById("results");
  const TOP = 5; // bars that are shown
  const STRIP = 1 << 22; // pixels of a photo that are looked at together: phones have no canvas for all of a large one
  const ONE = 1 << 22; // of weights, as Pillow has them

  // --- the model ---

  async function bytesOf(name) {
    const packed = (self.peftVit ?? {})[name];
    if (packed) {
      const text = atob(packed), bytes = new Uint8Array(text.length);
      for (let k = 0; k < text.length; k++) bytes[k] = text.charCodeAt(k);
      return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
    }
    const { url, files } = facts.runtime;
    if (!url || !files[name]) throw new Error("a file that belongs beside this page is missing: copy the whole folder");
    try {
      return await (await fetch(url + name, { integrity: files[name], credentials: "omit" })).arrayBuffer();
    } catch {
      throw new Error(`${new URL(url).host} was not reached; go online and load the page again, or export with --offline`);
    }
  }

  async function load() {
    const [script, wasm] = await Promise.all(Object.keys(facts.runtime.files).map(bytesOf));
    const ort = await import(URL.createObjectURL(new Blob([script], { type: "text/javascript" })));
    Object.assign(ort.env.wasm, { wasmBinary: wasm, numThreads: 1 });
    const session = await ort.InferenceSession.create(new Uint8Array(await bytesOf("model.onnx")));
    return (images) => session.run({ images: new ort.Tensor("float32", images, [1, 3, facts.size, facts.size]) });
  }

  // --- an image as training sees it ---

  const sinc = (x) => (x ? Math.sin(Math.PI * x) / (Math.PI * x) : 1);
  const KERNELS = { // how far they reach, and their values there
    bilinear: [1, (x) => 1 - x],
    bicubic: [2, (x) => (x < 1 ? (1.5 * x - 2.5) * x * x + 1 : ((2.5 - 0.5 * x) * x - 4) * x + 2)],
    lanczos: [3, (x) => sinc(x) * sinc(x / 3)],
  };

  // Of each of the `made` pixels that `length` pixels become: the first one that it is made of, and their weights. The kernel is widened
  // where the image shrinks, which is antialiasing.
  function weights(length, made) {
    const scale = length / made, wide = Math.max(1, scale), table = [];
    for (let k = 0, nearest = scale / 2; k < made; k++, nearest += scale) {
      if (facts.interpolation === "nearest") {
        table.push({ first: Math.floor(nearest), parts: [ONE] });
        continue;
      }
      const [reach, kernel] = KERNELS[facts.interpolation], centre = (k + 0.5) * scale;
      const first = Math.max(0, Math.trunc(centre - reach * wide + 0.5));
      const end = Math.min(length, Math.trunc(centre + reach * wide + 0.5));
      const values = Array.from({ length: end - first }, (_, place) => {
        const away = Math.abs((first + place - centre + 0.5) / wide);
        return away < reach ? kernel(away) : 0;
      });
      const sum = values.reduce((a, b) => a + b);
      const parts = values.map((value) => Math.sign(value) * Math.round(Math.abs(value / sum) * ONE));
      table.push({ first, parts });
    }
    return table;
  }

  // Resample all lines of an image, or all columns, to so many pixels of 8 bits.
  function resampled({ values, width, height }, length, down) {
    const table = weights(down ? height : width, length), channels = facts.channels;
    const [columns, rows] = down ? [width, length] : [length, height];
    const step = channels * (down ? width : 1), made = new Uint8ClampedArray(rows * columns * channels);
    for (let y = 0, place = 0; y < rows; y++) {
      for (let x = 0; x < columns; x++) {
        const { first, parts } = table[down ? y : x];
        const start = channels * (down ? first * width + x : y * width + first);
        for (let channel = 0; channel < channels; channel++, place++) {
          let sum = ONE / 2;
          for (let k = 0, from = start + channel; k < parts.length; k++, from += step) sum += parts[k] * values[from];
          made[place] = Math.floor(sum / ONE); // the array clips
        }
      }
    }
    return { values: made, width: columns, height: rows };
  }

  // All pixels on white, (height, width, 3 or 1): grey where training was.
  function pixels(bitmap) {
    const { width, height } = bitmap, rows = Math.max(1, Math.min(height, Math.floor(STRIP / width)));
    const canvas = Object.assign(document.createElement("canvas"), { width, height: rows });
    const context = canvas.getContext("2d", { alpha: false, willReadFrequently: true });
    const values = new Uint8ClampedArray(height * width * facts.channels);
    for (let top = 0, place = 0; top < height; top += rows) {
      context.fillStyle = "white";
      context.fillRect(0, 0, width, rows);
      context.drawImage(bitmap, 0, -top);
      const { data } = context.getImageData(0, 0, width, Math.min(rows, height - top));
      for (let k = 0; k < data.length; k += 4) {
        if (facts.channels === 1) {
          values[place++] = (19595 * data[k] + 38470 * data[k + 1] + 7471 * data[k + 2] + 32768) >> 16; // ITU-R 601-2
        } else {
          for (let channel = 0; channel < 3; channel++) values[place++] = data[k + channel];
        }
      }
    }
    return { values, width, height };
  }

  const rounded = (x) => (x % 1 === 0.5 ? 2 * Math.round(x / 2) : Math.round(x)); // half to even, as Python does

  // How long a side of an image becomes, and where it begins on the square.
  const SIDES = {
    squash: () => facts.size,
    letterbox: (side, sides) => Math.max(1, rounded(side / (Math.max(...sides) / facts.size))),
    crop: (side, sides) => Math.floor((facts.size * side) / Math.min(...sides)),
  };
  const start = (gap) => (gap > 0 ? Math.floor(gap / 2) : -rounded(-gap / 2));

  // (3, S, S) float32, normalised. Since version 13 Pillow begins with columns where they shrink by more than twice as
  // many pixels.
  function prepared(bitmap) {
    const { size, channels, mean, std, ground } = facts, given = [bitmap.width, bitmap.height];
    const [width, height] = given.map((side) => SIDES[facts.resize](side, given)), tall = bitmap.height - height;
    const image = pixels(bitmap), columnsFirst = facts.pillow >= 13 && tall > 0 && tall > 2 * (bitmap.width - width);
    const [first, second] = columnsFirst ? [height, width] : [width, height];
    const { values } = resampled(resampled(image, first, columnsFirst), second, !columnsFirst);
    const left = start(size - width), top = start(size - height);
    return Float32Array.from({ length: 3 * size * size }, (_, place) => {
      const channel = Math.floor(place / (size * size)), source = Math.min(channel, channels - 1);
      const x = (place % size) - left, y = (Math.floor(place / size) % size) - top;
      const inside = x >= 0 && x < width && y >= 0 && y < height;
      const value = inside ? values[(y * width + x) * channels + source] : ground[source];
      return Math.fround(Math.fround(value / 255) - Math.fround(mean[channel])) / Math.fround(std[channel]);
    });
  }

  // --- what it says ---

  const percent = (share) => `${(100 * share).toFixed(1)} %`;

  const number = (value) => String(Number(value.toPrecision(4)));
  const byShare = (shares) => shares.map((share, k) => ({ name: facts.classes[k], share, k })).sort((a, b) => b.share - a.share);
  const namesOf = (answers) => answers.map(({ name }) => name).join(", ") || "none";

  // Between places on a line, constant beyond.
  function interpolated(x, at, values) {
    const k = at.findIndex((place) => place >= x);
    if (k <= 0) return values[k < 0 ? values.length - 1 : 0];
    return values[k - 1] + ((values[k] - values[k - 1]) * (x - at[k - 1])) / (at[k] - at[k - 1]);
  }

  // Of what kinds outputs are: what is told in a line, bars, which of them are bold, and what is promised.
  const KINDS = {
    classes(outputs) {
      const largest = Math.max(...outputs);
      const shares = Array.from(outputs, (z) => Math.exp((z - largest) / facts.temperature));
      const sum = shares.reduce((a, b) => a + b), answers = byShare(shares.map((share) => share / sum));
      const within = facts.set && answers.filter(({ share }, k) => !k || 1 - share <= facts.set.threshold);
      const rest = percent(answers.slice(TOP).reduce((all, { share }) => all + share, 0));
      const others = answers.length > TOP ? `${answers.length - TOP} other classes together: ${rest}` : "";
      const said = `${answers[0].name}, ${percent(answers[0].share)}`;
      return { said, told: "", bars: answers.slice(0, TOP), bold: ({ k }) => k === answers[0].k, others, within };
    },
    labels(outputs) {
      const answers = byShare(Array.from(outputs, (z) => 1 / (1 + Math.exp(-z / facts.temperature))));
      const bold = ({ share, k }) => share >= facts.thresholds[k], told = answers.filter(bold);
      const within = facts.set && answers.filter(({ share }) => share >= facts.set.threshold);
      const bars = answers.filter((answer, place) => place < TOP || bold(answer));
      const others = answers.length > bars.length ? `${answers.length - bars.length} other labels are less probable` : "";
      return { said: namesOf(told), told: `Labels: ${namesOf(told)}`, bars, bold, others, within };
    },
    numbers(outputs) {
      const said = Array.from(outputs, (z, k) => {
        const value = facts.center[k] + facts.spread[k] * z, { half_widths: widths, at, scale } = facts.set ?? {};
        const reach = facts.set && widths[k] * interpolated(value, at[k], scale[k]);
        return `${facts.classes[k]} ${number(value)}${facts.set ? ` (${number(value - reach)} to ${number(value + reach)})` : ""}`;
      }).join("; ");
      return { said, told: said, bars: [], others: "", within: null };
    },
  };

  function show(item, { told, bars, bold, others, within }, distance) {
    item.querySelector(".told").textContent = told;
    for (const answer of bars) {
      const bar = document.createElement("li"), ground = document.createElement("div");
      const texts = [answer.name, percent(answer.share)];
      for (const text of texts) bar.append(Object.assign(document.createElement("span"), { textContent: text }));
      ground.append(document.createElement("div"));
      ground.firstChild.style.width = percent(answer.share).replace(" ", "");
      bar.append(ground);
      bar.dataset.share = answer.share;
      bar.classList.toggle("first", bold(answer));
      item.querySelector(".bars").append(bar);
    }
    item.querySelector(".others").textContent = others;
    if (within) {
      item.querySelector(".set").textContent = `Set at ${Math.round(100 * facts.set.coverage)} %: ${namesOf(within)}`;
    }
    item.querySelector(".warn").hidden = !(facts.unlike !== null && distance > facts.unlike);
  }

  // --- where it looked: how much less sure of its class it is with each part in the mean color (arXiv 1311.2901) ---

  const CELLS = 4, SHOWN = 224, VEIL = 110, MOST = 0.75; // grey, and how much of it lies over what does not matter

  async function drops(images, run) {
    const { size } = facts, area = size * size, end = (k) => Math.round((k * size) / CELLS), found = [];
    const means = [0, 1, 2].map((channel) => images.subarray(channel * area, (channel + 1) * area).reduce((a, b) => a + b) / area);
    const outputs = Array.from((await run(images)).logits.data), best = outputs.indexOf(Math.max(...outputs));
    const sure = (logits) => {
      const largest = Math.max(...logits);
      return logits[best] - largest - Math.log(logits.reduce((sum, z) => sum + Math.exp(z - largest), 0));
    };
    for (let k = 0; k < CELLS * CELLS; k++) {
      const covered = images.slice(), row = Math.floor(k / CELLS), column = k % CELLS;
      for (let channel = 0; channel < 3; channel++) {
        for (let y = end(row); y < end(row + 1); y++) {
          const line = channel * area + y * size;
          covered.fill(means[channel], line + end(column), line + end(column + 1));
        }
      }
      found.push(sure(outputs) - sure(Array.from((await run(covered)).logits.data)));
    }
    return found;
  }

  // The image as the model gets it, under a grey veil where nothing mattered.
  function lit(bitmap, found) {
    const given = [bitmap.width, bitmap.height], scale = SHOWN / facts.size, most = Math.max(...found, 1e-6);
    const [width, height] = given.map((side) => SIDES[facts.resize](side, given));
    const [canvas, veil] = [SHOWN, CELLS].map((side) => Object.assign(document.createElement("canvas"), { width: side, height: side }));
    const alphas = found.flatMap((drop) => [VEIL, VEIL, VEIL, 255 * MOST * (1 - Math.max(drop, 0) / most)]);
    veil.getContext("2d").putImageData(new ImageData(Uint8ClampedArray.from(alphas), CELLS), 0, 0);
    const context = canvas.getContext("2d"), [left, top] = [width, height].map((side) => scale * start(facts.size - side));
    context.fillStyle = "white";
    context.fillRect(0, 0, SHOWN, SHOWN);
    context.drawImage(bitmap, left, top, scale * width, scale * height);
    context.drawImage(veil, 0, 0, SHOWN, SHOWN);
    return canvas;
  }

  async function explain(file, item, model) {
    const started = performance.now(), run = await model;
    const bitmap = await createImageBitmap(file, { colorSpaceConversion: "none" });
    const canvas = lit(bitmap, await drops(prepared(bitmap), run));
    bitmap.close();
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", "The image, clear where the model looked");
    item.querySelector(".where").replaceWith(canvas);
    item.querySelector(".looked").textContent =
      `Clear parts made it say this class: each of ${CELLS * CELLS} was covered (occlusion), in ${Math.round(performance.now() - started)} ms`;
  }

  async function look(file, item, model) {
    const name = file.name || "image";
    let bitmap, run;
    try {
      run = await model;
    } catch {
      return; // which the page says
    }
    const started = performance.now();
    try {
      bitmap = await createImageBitmap(file, { colorSpaceConversion: "none" }); // upright, as EXIF says
    } catch {
      item.querySelector("img").remove();
      item.querySelector(".took").textContent = "This is no image that the browser can read. Give a JPEG or PNG.";
      status.textContent = `${name} is no image that the browser can read.`;
      return;
    }
    try {
      const images = prepared(bitmap), ready = performance.now();
      const { logits, distance } = await run(images);
      const answer = KINDS[facts.kind](logits.data);
      show(item, answer, distance?.data[0]);
      const where = item.querySelector(".where");
      where.hidden = facts.kind !== "classes";
      where.addEventListener("click", () => {
        where.disabled = true;
        last = last.then(() => explain(file, item, model)).catch((error) => {
          status.textContent = `${name} could not be explained: ${error.message}`;
        });
      });
      const done = performance.now(), [preparing, running] = [ready - started, done - ready].map(Math.round);
      item.querySelector(".took").textContent =
        `${bitmap.width} x ${bitmap.height} pixels, read in ${preparing} ms; the model took ${running} ms`;
      status.textContent = `${name}: ${answer.said}`;
    } catch (error) {
      status.textContent = `${name} could not be looked at: ${error.message}`;
    }
    bitmap.close();
  }

  // --- the doors ---

  const model = load();
  let last = model.then(
    () => (status.textContent = "The model is ready."),
    (error) => {
      status.className = "warn";
      status.textContent = `The model can't run in this browser: ${error.message ?? error}`;
    },
  );

  function take(files, none) {
    if (!files.length) status.textContent = none;
    const items = Array.from(files, (file) => {
      const item = document.getElementById("result").content.cloneNode(true).firstChild;
      const picture = item.querySelector("img");
      picture.src = URL.createObjectURL(file);
      picture.onload = picture.onerror = () => URL.revokeObjectURL(picture.src);
      item.querySelector("h2").textContent = file.name || "image";
      last = last.then(() => look(file, item, model));
      return item;
    });
    results.prepend(...items);
  }

  for (const input of document.querySelectorAll("input")) {
    input.addEventListener("change", () => {
      take(input.files, "No image was chosen.");
      input.value = ""; // the same file may be chosen again
    });
  }
  addEventListener("paste", (event) => take(event.clipboardData.files, "The clipboard holds no image."));
  const drop = document.getElementById("drop");
  for (const [kind, over] of [["dragover", true], ["dragleave", false], ["drop", false]]) {
    addEventListener(kind, (event) => {
      event.preventDefault();
      drop.classList.toggle("over", over);
      if (kind === "drop") take(event.dataTransfer.files, "That was no file. Save the picture, and drop the file.");
    });
  }
})();
