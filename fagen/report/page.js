"use strict";
// What a point says when it is pointed at, and where else its candidate is drawn. Without it the page is whole but mute.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const tip = document.getElementById("tip");
  const REACH = 26; // pixels
  let held = null;

  const node = (name, text, className) => {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  };
  const plain = (value) => (value === true ? "yes" : value === false ? "no" : String(value));
  const time = (s) => {
    const [size, unit] = s >= 1 ? [1, "s"] : s >= 1e-3 ? [1e-3, "ms"] : [1e-6, "us"];
    return `${Number((s / size).toPrecision(4))} ${unit}`;
  };
  const read = (section, i) => Object.fromEntries(data.fields.map((name, at) => [name, section.points[i][at]]));

  function say(section, i) {
    const point = read(section, i);
    const ratio = section.best && point.seconds ? ` · ${(point.seconds / section.best).toFixed(2)}× the best` : "";
    const head = node("div", point.seconds ? time(point.seconds) + ratio : point.outcome, "head");
    let more = `candidate ${point.n}${point.family ? `, ${point.family}` : ""}`;
    if (point.outcome === "constraint") more = "illegal, not built";
    if (point.spread) more += `, ± ${time(point.spread)}`;
    if (point.samples) more += ` of ${point.samples} samples`;
    head.append(node("small", more));
    const list = node("dl");
    for (const [name, value] of Object.entries(point.config)) {
      const differs = name in section.default && section.default[name] !== value;
      list.append(node("dt", name), node("dd", plain(value), differs ? "differs" : ""));
    }
    tip.replaceChildren(head, list);
    if (point.reason) tip.append(node("p", point.reason));
    const facts = Object.entries(point.facts).map(([name, value]) => `${name.replaceAll("_", " ")} ${value}`);
    if (facts.length) tip.append(node("p", facts.join(" · ")));
    if (point.throttle) tip.append(node("p", `throttled: ${plain(point.throttle)}`));
    tip.hidden = false;
  }

  function place(x, y) {
    const box = tip.getBoundingClientRect();
    const left = x + 18 + box.width > innerWidth ? x - 18 - box.width : x + 18;
    tip.style.left = `${Math.max(6, left)}px`;
    tip.style.top = `${Math.max(6, Math.min(y - 20, innerHeight - box.height - 6))}px`;
  }

  function ring(root, i) {
    for (const old of root.querySelectorAll(".ring")) old.remove();
    if (i === null) return;
    for (const mark of root.querySelectorAll(`[data-i="${i}"]`)) {
      const { x, y, width, height } = mark.getBBox();
      const made = document.createElementNS("http://www.w3.org/2000/svg", "circle");
      for (const [name, value] of [["cx", x + width / 2], ["cy", y + height / 2], ["r", 8], ["class", "ring"]])
        made.setAttribute(name, value);
      mark.ownerSVGElement.append(made);
    }
  }

  function hide(root) {
    held = null;
    tip.hidden = true;
    tip.classList.remove("held");
    ring(root, null);
  }

  function hold(key, root) {
    held = key;
    tip.classList.add("held");
    if (key === null) hide(root);
  }

  function watch(svg, root, section) {
    let marks = null, at = -1; // found when first asked for; the one that is shown
    const all = () => (marks ??= [...svg.querySelectorAll("[data-i]")].map((mark) => {
      const { x, y, width, height } = mark.getBBox();
      return { i: mark.dataset.i, x: x + width / 2, y: y + height / 2 };
    }).sort((a, b) => a.x - b.x || a.y - b.y));
    const onScreen = (mark) => new DOMPoint(mark.x, mark.y).matrixTransform(svg.getScreenCTM());
    const show = (index, x, y) => {
      at = index;
      say(section, all()[index].i);
      ring(root, all()[index].i);
      place(x, y);
    };
    const nearest = (event) => {
      const inside = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
      const reach = REACH / svg.getScreenCTM().a;
      let found = -1, least = reach * reach;
      all().forEach((mark, index) => {
        const distance = (mark.x - inside.x) ** 2 + (mark.y - inside.y) ** 2;
        if (distance < least) [found, least] = [index, distance];
      });
      return found;
    };
    svg.addEventListener("pointermove", (event) => {
      if (held !== null) return;
      const found = nearest(event);
      if (found < 0) hide(root);
      else show(found, event.clientX, event.clientY);
    });
    svg.addEventListener("pointerleave", () => held === null && hide(root));
    svg.addEventListener("click", (event) => {
      const found = nearest(event);
      if (found < 0 || held === all()[found].i) return hide(root);
      held = null;
      show(found, event.clientX, event.clientY);
      hold(all()[found].i, root);
    });
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (event.key === "Escape") hide(root);
      else if (event.key === "Enter" && at >= 0) hold(held === null ? all()[at].i : null, root);
      else if (step && all().length) {
        event.preventDefault();
        held = null;
        const next = at < 0 ? (step > 0 ? 0 : all().length - 1) : Math.min(all().length - 1, Math.max(0, at + step));
        const { x, y } = onScreen(all()[next]);
        show(next, x, y);
      }
    });
    svg.addEventListener("blur", () => held === null && hide(root));
  }

  for (const root of document.querySelectorAll("[data-section]"))
    for (const svg of root.querySelectorAll("svg.points")) watch(svg, root, data.sections[root.dataset.section]);
  document.addEventListener("click", (event) => {
    if (held !== null && !event.target.closest("svg.points, #tip"))
      for (const root of document.querySelectorAll("[data-section]")) hide(root);
  });
  for (const button of document.querySelectorAll("button.copy")) {
    if (!navigator.clipboard) continue; // a page from a file has it in some browsers only
    button.hidden = false;
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(button.dataset.copy);
      button.textContent = "copied";
    });
  }
  addEventListener("beforeprint", () => hide(document));
})();
