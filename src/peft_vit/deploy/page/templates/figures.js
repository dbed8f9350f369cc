// Figures that answer: point at a value, switch series, save the data. The figures stand in
// the page without this script; their data is read when a figure is first used.
"use strict";
(() => {
  const NEAR_PT = 26; // farther from the pointer a value is not meant
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.setAttribute("role", "status");
  tip.hidden = true;
  document.body.append(tip);
  document.documentElement.classList.add("live");
  addEventListener("beforeprint", () => each(document.querySelectorAll(".fold"), (fold) => (fold.open = true)));
  const each = (items, act) => Array.prototype.forEach.call(items, act);

  function quoted(text) {
    return /[",\n]/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text;
  }

  function csv(columns) {
    const lines = [columns.map((column) => quoted(column.name)).join(",")];
    columns[0].index.forEach((_, row) => {
      lines.push(columns.map((column) => quoted(column.values[column.index[row]])).join(","));
    });
    return lines.join("\n") + "\n";
  }

  function setUp(figure) {
    const box = figure.querySelector(".drawing"), svg = box.querySelector("svg");
    const buttons = figure.querySelectorAll("button[data-series]");
    const hidden = new Set();
    let loaded = null, current = -1, ring = null;
    const data = () => (loaded ??= JSON.parse(figure.querySelector("script").textContent));

    function hide() {
      if (current < 0) return; // the tip may be another figure's
      tip.hidden = true;
      current = -1;
      ring.setAttribute("visibility", "hidden");
    }

    function show(point) {
      const { x, y, series, names, text } = data(), lines = text.values[text.index[point]].split("\n");
      tip.replaceChildren();
      each([names[series[point]], ...lines], (line, i) => {
        const part = document.createElement(i ? "div" : "b");
        part.textContent = line;
        tip.append(part);
      });
      if (!ring) {
        ring = document.createElementNS("http://www.w3.org/2000/svg", "circle");
        ring.setAttribute("class", "ring");
        ring.setAttribute("r", "6");
        svg.append(ring);
      }
      ring.setAttribute("cx", x[point]);
      ring.setAttribute("cy", y[point]);
      ring.setAttribute("visibility", "visible");
      tip.hidden = false;
      current = point;
      place();
    }

    function place() {
      if (current < 0) return;
      const at = ring.getBoundingClientRect(), own = tip.getBoundingClientRect(), edge = 6;
      const wide = document.documentElement.clientWidth, above = at.top - own.height - edge;
      tip.style.left = Math.max(edge, Math.min(at.left + at.width / 2 - own.width / 2, wide - own.width - edge)) + "px";
      tip.style.top = (above < edge ? at.bottom + edge : above) + "px";
    }

    function nearest(event) {
      const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
      const { x, y, series } = data();
      let best = -1, least = NEAR_PT ** 2;
      for (let i = 0; i < x.length; i++) {
        const distance = (x[i] - at.x) ** 2 + (y[i] - at.y) ** 2;
        if (distance < least && !hidden.has(series[i])) [best, least] = [i, distance];
      }
      return best;
    }

    function point(event) {
      const found = nearest(event);
      if (found !== current) found < 0 ? hide() : show(found);
    }

    // A cell of the confusion matrix leads to the pictures of its images.
    function follow() {
      if (current < 0) return;
      const key = data().text.values[data().text.index[current]].split("\n")[0];
      const found = [];
      each(figure.closest("article").querySelectorAll("[data-key]"), (picture) => {
        picture.classList.toggle("found", picture.dataset.key === key);
        if (picture.dataset.key === key) found.push(picture);
      });
      if (found.length) found[0].focus({ preventScroll: true }), found[0].scrollIntoView({ block: "center" });
    }

    function step(event) {
      const { series } = data(), count = series.length;
      const way = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (event.key === "Escape") hide();
      if (event.key === "Enter") follow();
      if (!way || count === 0 || hidden.size === data().names.length) return;
      event.preventDefault();
      let next = current < 0 && way < 0 ? 0 : current;
      do next = (next + way + count) % count; while (hidden.has(series[next]));
      show(next);
    }

    function all() {
      const on = hidden.size > 0;
      each(buttons, (button) => toggle(button, on));
    }

    function toggle(button, on = button.getAttribute("aria-pressed") !== "true") {
      const series = Number(button.dataset.series);
      button.setAttribute("aria-pressed", String(on));
      if (on) hidden.delete(series);
      else hidden.add(series);
      each(svg.querySelectorAll(`[data-series="${series}"]`), (part) => part.classList.toggle("off", !on));
      hide();
    }

    function save() {
      const link = document.createElement("a");
      const address = URL.createObjectURL(new Blob([csv(data().columns)], { type: "text/csv" }));
      link.href = address;
      link.download = data().file;
      link.click();
      setTimeout(() => URL.revokeObjectURL(address), 1000);
    }

    box.addEventListener("pointermove", point);
    box.addEventListener("pointerdown", point);
    box.addEventListener("click", follow);
    each(figure.querySelectorAll(".hint"), (hint) => (hint.hidden = !document.querySelector("[data-key]")));
    box.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && hide()); // a finger lifts at once
    addEventListener("pointerdown", (event) => box.contains(event.target) || hide());
    box.addEventListener("blur", hide);
    box.addEventListener("keydown", step);
    each(buttons, (button) => button.addEventListener("click", () => toggle(button)));
    each(figure.querySelectorAll("button.csv"), (button) => button.addEventListener("click", save));
    each(figure.querySelectorAll("button.all"), (button) => button.addEventListener("click", all));
    addEventListener("scroll", place, { passive: true, capture: true });
  }

  function copy(event) {
    const code = event.target.parentNode.querySelector("code");
    getSelection().selectAllChildren(code);
    document.execCommand("copy"); // navigator.clipboard is not there on pages of plain http
    event.target.textContent = "Copied";
  }

  each(document.querySelectorAll("figure:has(script)"), setUp);
  each(document.querySelectorAll(".command button"), (button) => button.addEventListener("click", copy));
})();
