"use strict";
// all that it needs stands in the page, which can be read without it

for (const table of document.querySelectorAll(".sortable")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
    button.addEventListener("click", () => {
      const ascending = head.getAttribute("aria-sort") !== "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      const sign = ascending ? 1 : -1;
      const order = (one, other) => sign * value(one).localeCompare(value(other), "en", {numeric: true});
      const numbers = (one, other) => sign * (value(one) - value(other));
      body.append(...[...body.rows].sort("value" in body.rows[0].cells[column].dataset ? numbers : order));
    });
  });
}

const shown = document.getElementById("shown");
document.addEventListener("click", event => {
  const cell = event.target.closest(".matrix a");
  if (cell) {
    event.preventDefault();
    const gallery = document.getElementById(cell.hash.slice(1)).cloneNode(true);
    gallery.querySelector("h3").id = "shown-title";
    shown.replaceChildren(...gallery.childNodes);
    shown.showModal();
  } else if (event.target === shown || event.target.closest("dialog .close")) { // the first is what is around it
    event.preventDefault();
    shown.close();
  }
});

const told = document.getElementById("told");
document.addEventListener("pointermove", event => {
  const mark = event.target.closest(".chart .mark-symbol [aria-label]");
  told.hidden = !mark;
  if (!mark) return;
  told.textContent = mark.getAttribute("aria-label");
  told.style.left = `${Math.min(event.clientX + 12, innerWidth - told.offsetWidth - 4)}px`;
  told.style.top = `${event.clientY - told.offsetHeight - 10}px`;
});

addEventListener("beforeprint", () => {
  for (const closed of document.querySelectorAll("details:not([open])")) closed.open = true;
});
