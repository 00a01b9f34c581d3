// SPDX-License-Identifier: Apache-2.0
// Thumbnails beside the pointer, and classes on their own.
const map = document.getElementById("map");
if (map) {
  const tip = map.querySelector(".tip");
  const [thumb, text] = tip.children;
  const points = [...map.querySelectorAll("svg[role] use")];
  const columns = Math.ceil(Math.sqrt(points.length));
  points.forEach((point, i) => {
    const title = point.querySelector("title");
    const words = title.textContent;
    title.remove();
    point.addEventListener("pointerenter", event => {
      thumb.style.setProperty("--column", i % columns);
      thumb.style.setProperty("--row", Math.floor(i / columns));
      text.textContent = words;
      tip.hidden = false;
      const x = event.clientX + 14, y = event.clientY + 14;
      tip.style.left = Math.min(x, innerWidth - tip.offsetWidth - 8) + "px";
      tip.style.top = Math.min(y, innerHeight - tip.offsetHeight - 8) + "px";
    });
    point.addEventListener("pointerleave", () => { tip.hidden = true; });
  });
  const buttons = [...map.querySelectorAll("button")];
  const pressed = button => button.getAttribute("aria-pressed") === "true";
  for (const button of buttons) {
    button.addEventListener("click", () => {
      button.setAttribute("aria-pressed", !pressed(button));
      const shown = buttons.filter(pressed).map(b => b.dataset.class);
      for (const point of points) {
        const dims = shown.length && !shown.includes(point.dataset.class);
        point.classList.toggle("dim", dims);
      }
    });
  }
}
