// Details next to the pointer, or next to what has the focus. Without scripts the browser shows the same titles itself.
(() => {
  const tip = document.getElementById("tip");
  const texts = new Map();
  let focused = null;
  for (const place of document.querySelectorAll(".tip-at")) {
    const title = place.querySelector(":scope > title");
    texts.set(place, title ? title.textContent : place.getAttribute("title"));
    if (title) title.remove();
    place.removeAttribute("title");
  }
  const move = (x, y) => {
    const { width, height } = tip.getBoundingClientRect();
    const left = Math.min(x + 14, window.innerWidth - width - 8);
    const top = y + 18 + height > window.innerHeight ? y - height - 12 : y + 18;
    tip.style.left = `${Math.max(8, left)}px`;
    tip.style.top = `${Math.max(8, top)}px`;
  };
  const show = (place, x, y) => {
    tip.textContent = texts.get(place);
    tip.hidden = false;
    move(x, y);
  };
  const hide = () => {
    tip.hidden = true;
    focused = null;
  };
  const follow = () => {
    if (!focused) return;
    const box = focused.getBoundingClientRect();
    move(box.left, box.bottom - 8);
  };
  for (const place of texts.keys()) {
    place.addEventListener("pointerenter", (event) => { focused = null; show(place, event.clientX, event.clientY); });
    place.addEventListener("pointermove", (event) => { if (!focused) move(event.clientX, event.clientY); });
    place.addEventListener("pointerleave", () => { if (!focused) hide(); });
    place.addEventListener("focus", () => { show(place, 0, 0); focused = place; follow(); });
    place.addEventListener("blur", hide);
  }
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
  window.addEventListener("scroll", follow, { passive: true });
})();
