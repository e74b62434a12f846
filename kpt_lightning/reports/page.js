"use strict";
// Runs in the head, so that a kept choice of colours holds before the first paint.
(() => {
  const root = document.documentElement;
  const KEPT = "kpt-report-theme";

  function kept() {
    try { return localStorage.getItem(KEPT); } catch { return null; } // a browser may forbid storage
  }

  function keep(theme) {
    try { localStorage.setItem(KEPT, theme); } catch { return; }
  }

  if (["light", "dark"].includes(kept())) root.dataset.theme = kept();
  root.classList.add("js");

  function themeButton() {
    const button = document.getElementById("theme");
    const system = matchMedia("(prefers-color-scheme: dark)");
    const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
    const name = () => { button.textContent = dark() ? "Light colours" : "Dark colours"; };
    button.addEventListener("click", () => {
      root.dataset.theme = dark() ? "light" : "dark";
      keep(root.dataset.theme);
      name();
    });
    system.addEventListener("change", name);
    name();
  }

  // One text for the mark under the pointer or in focus; the arrow keys go from mark to mark.
  function charts() {
    const tip = document.getElementById("tip");
    let at = null;
    for (const mark of document.querySelectorAll(".mark")) {
      const title = mark.querySelector("title");
      mark.setAttribute("aria-label", title.textContent);
      title.remove(); // else the browser shows a second text
    }

    function hide() {
      tip.hidden = true;
      if (at) at.classList.remove("at");
      at = null;
    }

    function show(mark) {
      if (mark === at) return;
      hide();
      at = mark;
      at.classList.add("at");
      tip.textContent = mark.getAttribute("aria-label");
      tip.hidden = false;
      const box = mark.getBoundingClientRect();
      const left = Math.min(Math.max(8, box.left + box.width / 2 - tip.offsetWidth / 2), root.clientWidth - tip.offsetWidth - 8);
      const above = box.top - tip.offsetHeight - 10;
      tip.style.left = `${Math.max(8, left) + scrollX}px`;
      tip.style.top = `${(above > 0 ? above : box.bottom + 10) + scrollY}px`;
    }

    function nearest(marks, x, y) {
      let best = null, distance = Infinity;
      for (const mark of marks) {
        const box = mark.getBoundingClientRect();
        const away = Math.hypot(box.left + box.width / 2 - x, (box.top + box.height / 2 - y) / 4);
        if (away < distance) [best, distance] = [mark, away];
      }
      return best;
    }

    for (const plot of document.querySelectorAll(".plot")) {
      const marks = [...plot.querySelectorAll(".mark")];
      plot.addEventListener("pointermove", (event) => show(nearest(marks, event.clientX, event.clientY)));
      plot.addEventListener("pointerdown", (event) => show(nearest(marks, event.clientX, event.clientY)));
      plot.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") hide(); });
      plot.addEventListener("focusin", (event) => { if (event.target.matches(".mark")) show(event.target); });
      plot.addEventListener("focusout", hide);
      plot.addEventListener("keydown", (event) => {
        const place = marks.indexOf(event.target);
        const to = { ArrowLeft: place - 1, ArrowRight: place + 1, Home: 0, End: marks.length - 1 }[event.key];
        if (place < 0 || to === undefined) return;
        event.preventDefault();
        const next = marks[Math.min(Math.max(to, 0), marks.length - 1)];
        event.target.setAttribute("tabindex", "-1");
        next.setAttribute("tabindex", "0");
        next.focus();
      });
    }
    addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
  }

  function percent(before, after) {
    const change = after / before - 1;
    if (Math.abs(change) < 0.0005) return "0.0\u00a0%";
    const text = Math.abs(change) < 9 ? `${change < 0 ? "" : "+"}${(100 * change).toFixed(1)}\u00a0%` : `×${(change + 1).toPrecision(3)}`;
    return text.replace("-", "−");
  }

  function twoRuns() {
    const table = document.getElementById("facts");
    if (!table) return;
    const data = JSON.parse(document.getElementById("data").textContent);
    const [before, after] = ["run-before", "run-after"].map((id) => document.getElementById(id));
    const all = document.getElementById("all-facts");

    function cell(tag, text) {
      const made = document.createElement(tag);
      made.append(Object.assign(document.createElement("bdi"), { textContent: text }));
      return made;
    }

    function rows(section) {
      const [old, now] = [before, after].map((choice) => {
        const facts = data.tables[data.runs[choice.value].facts[section]];
        return new Map(facts.map(([name, text, number]) => [name, [text, number]]));
      });
      return [...new Set([...old.keys(), ...now.keys()])].map((name) => {
        const [then, next] = [old, now].map((facts) => facts.get(name) ?? ["none", null]);
        const change = then[1] && next[1] !== null ? percent(then[1], next[1]) : then[0] === next[0] ? "" : "different";
        return { name, then: then[0], next: next[0], change };
      });
    }

    function line({ name, then, next, change }, counts) {
      const made = document.createElement("tr");
      const heading = cell("th", name);
      heading.scope = "row";
      const last = document.createElement("td");
      if (change && counts) {
        const sign = Object.assign(document.createElement("span"), { textContent: "≠ " });
        sign.setAttribute("aria-hidden", "true");
        last.append(sign);
      }
      if (counts || change !== "different") last.append(change);
      if (counts) made.className = change ? "unlike" : "equal";
      made.append(heading, cell("td", then), cell("td", next), last);
      return made;
    }

    function count() {
      const unlike = table.querySelectorAll(".unlike").length;
      document.getElementById("unlike").textContent = `${unlike}\u00a0${unlike === 1 ? "difference" : "differences"}.`;
      for (const part of table.tBodies) part.classList.toggle("alike", !part.querySelector("tr:not(.part, .equal)"));
    }

    function draw() {
      for (const part of [...table.tBodies]) part.remove();
      for (const [section, heading] of Object.entries(data.sections)) {
        const counts = !data.uncounted.includes(section);
        const lines = rows(section).map((row) => line(row, counts));
        if (!lines.length) continue;
        const part = document.createElement("tbody");
        const head = Object.assign(document.createElement("tr"), { className: "part" });
        head.append(Object.assign(document.createElement("th"), { textContent: heading, colSpan: 4, scope: "rowgroup" }));
        part.append(head, ...lines);
        table.append(part);
      }
      count();
    }

    before.addEventListener("change", draw);
    after.addEventListener("change", draw);
    all.addEventListener("change", () => table.classList.toggle("all", all.checked));
    document.addEventListener("click", (event) => {
      const button = event.target.closest(".choose");
      if (!button) return;
      before.value = button.dataset.before;
      after.value = button.dataset.after;
      draw();
      document.getElementById("two-runs").focus();
    });
    count();
  }

  document.addEventListener("DOMContentLoaded", () => {
    themeButton();
    charts();
    twoRuns();
  });
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")];
    for (const each of opened) each.open = true;
  });
  addEventListener("afterprint", () => { for (const each of opened) each.open = false; });
})();
