// Shows what the server asks, and sends what is answered. The next image is shown when the label is on disk.
import { keyOf, listen } from "./keys.js";

const $ = (id) => document.getElementById(id);
const TINY = 128; // pixels a side, of images that are shown with their pixels
const EVERY_MS = 2000;
let state = { ids: null }; // as the server sent it last
let busy = false;
let sent = 0; // answers
let picked = new Set(); // classes of an image with several labels
let wrong = new Set(); // images of a wall

async function ask(path, answer) {
  const options = answer && {
    method: "POST",
    headers: { "Content-Type": "application/json", "X-Token": state.token },
    body: JSON.stringify(answer),
  };
  try {
    const response = await fetch(path, options);
    if (!response.headers.get("content-type").startsWith("application/json")) throw new Error(await response.text());
    return await response.json();
  } catch (error) {
    const ended = "peft-vit label has ended. What you labelled is in labels.csv; start it again to continue.";
    return { fault: error instanceof TypeError ? ended : error.message };
  }
}

async function send(path, answer = {}) {
  if (busy) return;
  busy = true;
  sent += 1;
  $("main").ariaBusy = "true";
  try {
    show(await ask(path, { ids: state.ids, ...answer }));
    if (!$("image").hidden) await $("image").decode().catch(() => {}); // no key answers what is not seen yet
  } finally {
    busy = false;
    $("main").ariaBusy = "false";
  }
}

function label(labels, more = {}) {
  return send("label", { labels, comment: $("comment").value, wrong: [...wrong], ...more });
}

function pick(place) {
  const name = state.classes[place];
  if (name === undefined || state.is_wall || !state.ids.length) return;
  if (state.task === "classification") return label([name]);
  picked.has(name) ? picked.delete(name) : picked.add(name);
  drawClasses();
}

function take() {
  const typed = $("new").value.trim();
  if (state.task === "regression") return label([typed]);
  if (state.task === "multilabel") return label(typed ? [...picked, typed] : [...picked]);
  if (typed && !state.is_wall) return label([typed]);
  if (state.proposed !== null) return label([state.proposed]);
}

const checks = () => state.believed !== undefined; // labels that are there

function element(tag, text, properties = {}) {
  return Object.assign(document.createElement(tag), { textContent: text, ...properties });
}

function show(told) {
  $("fault").hidden = !told.fault;
  $("fault").textContent = told.fault ?? "";
  if (!told.ids) return;
  const isOther = `${told.ids}` !== `${state.ids}`;
  state = told;
  if (isOther || !told.fault) {
    picked = new Set(told.former?.labels);
    wrong = new Set();
    $("new").value = told.task === "regression" ? [...picked].join("") : "";
    $("comment").value = told.former?.comment ?? "";
  }
  draw();
  const isTyped = state.task === "regression" || !state.classes.length; // no key is a class yet
  $(isTyped && !$("answer").hidden ? "new" : "main").focus({ preventScroll: true });
  for (const i of state.ahead) new Image().src = `images/${i}/large`;
}

function draw() {
  const one = !state.is_wall && state.ids.length === 1;
  $("question").textContent = state.is_wall
    ? `All ${state.proposed}? Click those that are not.`
    : one ? state.names[0] : state.finished;
  const first = state.classes.length || state.task === "regression" ? "" : "Type what this image shows, then Enter.";
  $("note").textContent = state.note || first;
  $("image").hidden = !one;
  if (one) Object.assign($("image"), { src: `images/${state.ids[0]}/large`, alt: `the image ${state.names[0]}` });
  $("wall").hidden = !state.is_wall;
  $("wall").replaceChildren(...(state.is_wall ? state.ids.map(thumbnail) : []));
  drawClasses();
  $("answer").hidden = !one || checks();
  $("typed").firstChild.textContent = state.task === "regression" ? "number " : "new class ";
  $("new").inputMode = state.task === "regression" ? "decimal" : "text";
  $("unsure").hidden = !one || checks();
  $("skip").hidden = !state.ids.length;
  $("skip").lastElementChild.textContent = state.is_wall ? "one by one" : state.former ? "label it later" : "skip";
  $("undo").disabled = !state.undoable;
  drawTake();
  drawProgress();
}

function thumbnail(i, place) {
  const button = element("button", "", { type: "button", ariaPressed: "false" });
  button.append(sized(element("img", "", { src: `images/${i}/small`, alt: state.names[place] })));
  button.addEventListener("click", (event) => {
    wrong.has(i) ? wrong.delete(i) : wrong.add(i);
    button.ariaPressed = String(wrong.has(i));
    drawTake();
    if (event.detail) $("main").focus({ preventScroll: true }); // by hand: Enter takes the others
  });
  return button;
}

function sized(image) {
  image.addEventListener("load", () => image.classList.toggle("tiny", image.naturalWidth <= TINY));
  return image;
}

function drawClasses() {
  $("classes").hidden = state.is_wall || !state.ids.length;
  $("classes").replaceChildren(...state.classes.map((name, place) => {
    const button = element("button", `${name} `, { type: "button" });
    const key = keyOf(place, state.classes);
    if (key) button.prepend(element("kbd", key), " ");
    if (state.counts) button.append(element("small", `${state.counts[name] ?? 0} + ${state.counts_of_test[name] ?? 0}`));
    button.classList.toggle("proposed", name === (state.believed ?? state.proposed));
    if (state.task === "multilabel") button.ariaPressed = String(picked.has(name));
    button.addEventListener("click", () => pick(place));
    return button;
  }));
  $("known").replaceChildren(...state.classes.map((name) => element("option", "", { value: name })));
}

function drawTake() {
  const several = state.ids.length - wrong.size;
  const typed = $("new").value.trim();
  const ofWall = several ? `takes ${several} as ${state.proposed}` : "takes none";
  const kept = checks() || (state.former && state.proposed !== null) ? `keeps ${state.proposed}` : state.proposed;
  const words = state.is_wall ? ofWall : typed || kept || "takes it";
  $("take").lastElementChild.textContent = words;
  $("take").hidden = !state.ids.length || (state.task === "classification" && state.proposed === null && !typed);
}

function drawProgress() {
  const { images = 0, ready = 0, left_out: missing, trouble } = state;
  document.title = $("title").textContent = state.title;
  $("counted").textContent = state.counted;
  $("about").textContent = state.about;
  $("computing").hidden = ready >= images;
  Object.assign($("ready"), { max: images, value: ready, title: `${ready} of ${images}` });
  $("computing").firstChild.textContent = trouble ? `${trouble} ` : `${ready} of ${images} images read by the model `;
  $("accuracy").textContent = state.accuracy ?? "";
  $("command").textContent = state.command;
  const { running, lines } = state.training ?? {};
  $("here").hidden = $("training").hidden = !state.training;
  $("untested").hidden = !state.untested;
  $("untested").firstElementChild.textContent = state.untested ?? "";
  $("tests").hidden = state.tests_first;
  $("train").disabled = $("tune").disabled = running;
  $("said").hidden = !lines?.length;
  $("said").textContent = lines?.join("\n");
  $("missing").hidden = !missing.length;
  $("missing").firstElementChild.textContent = `${missing.length} can't be labelled`;
  $("missing").lastElementChild.replaceChildren(...missing.map((line) => element("li", line)));
}

async function follow() {
  if (!busy) {
    const before = sent;
    const told = await ask("state");
    if (busy || sent !== before) return; // it may be from before an answer
    if (told.ids && `${told.ids}` === `${state.ids}`) {
      state = told;
      drawProgress();
    } else show(told);
  }
}

listen(pick, () => state.is_wall, () => state.classes);
sized($("image"));
$("take").addEventListener("click", take);
$("undo").addEventListener("click", () => send("undo"));
$("skip").addEventListener("click", () => send("refuse"));
$("unsure").addEventListener("click", () => label([], { unsure: true }));
for (const id of ["tests", "train", "tune"]) $(id).addEventListener("click", () => send(id));
$("new").addEventListener("input", drawTake);
await follow();
setInterval(follow, EVERY_MS);
