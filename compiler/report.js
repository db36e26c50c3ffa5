// Details next to the pointer, or next to what has the focus. Without scripts the browser shows the same titles itself.
(() => {
  const tip = document.getElementById("tip");
  const texts = new Map();
  for (const place of document.querySelectorAll(".tip-at")) {
    const title = place.querySelector(":scope > title");
    texts.set(place, title ? title.textContent : place.getAttribute("title"));
    if (title) title.remove();
    place.removeAttribute("title");
  }
  const move = (x, y) => {
    const { width, height } = tip.getBoundingClientRect();
    const left = Math.min(Math.max(8, x + 14), window.innerWidth - width - 8);
    const top = y + 18 + height > window.innerHeight ? y - height - 12 : y + 18;
    tip.style.left = `${left}px`;
    tip.style.top = `${Math.max(8, top)}px`;
  };
  const show = (place, x, y) => {
    tip.textContent = texts.get(place);
    tip.hidden = false;
    move(x, y);
  };
  const hide = () => { tip.hidden = true; };
  for (const place of texts.keys()) {
    place.addEventListener("pointerenter", (event) => show(place, event.clientX, event.clientY));
    place.addEventListener("pointermove", (event) => move(event.clientX, event.clientY));
    place.addEventListener("pointerleave", hide);
    place.addEventListener("focus", () => {
      const box = place.getBoundingClientRect();
      show(place, box.left, box.bottom - 8);
    });
    place.addEventListener("blur", hide);
  }
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
  window.addEventListener("scroll", hide, { passive: true });
})();
