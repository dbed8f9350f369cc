// Keys: 1 to 9 and letters are classes, in the order of their buttons, or digits the classes that are called so; the
// others are those of ACTIONS.
const ACTIONS = { z: "undo", s: "skip", u: "unsure", n: "new", c: "comment" };
const CLASSES = [..."123456789abdefghijklmopqrtvwxy"];

const keysOf = (names) => (names.every((name) => /^[0-9]$/.test(name)) ? names : CLASSES);
export const keyOf = (place, names) => (keysOf(names)[place] ?? "").toUpperCase();

// Calls pick(place) for the key of a class. Those of actions click their button, or go to their field.
export function listen(pick, isWall, names) {
  document.addEventListener("keydown", (event) => {
    if (event.isComposing || event.keyCode === 229) return; // a letter that is put together of several keys
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const focused = document.activeElement;
    const typing = focused.tagName === "INPUT";
    const pressed = event.key.toLowerCase();
    if (pressed === "escape" && typing) return document.getElementById("main").focus();
    if (pressed === "enter") {
      const onWall = isWall(), isButton = focused.tagName === "BUTTON" && !(onWall && focused.closest("#wall"));
      if (isButton || (focused.tagName === "SUMMARY" && !onWall)) return;
      event.preventDefault();
      const take = document.getElementById("take");
      if (take.hidden) document.getElementById("main").focus();
      else if (!event.repeat) take.click();
      return;
    }
    if (typing || event.repeat) return;
    const target = document.getElementById(ACTIONS[pressed]);
    const place = keysOf(names()).indexOf(pressed);
    if (target) target.matches("input") ? target.focus() : target.click();
    else if (place >= 0) pick(place);
    else return;
    event.preventDefault();
  });
}
