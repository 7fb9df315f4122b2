// Sorts the summary by a column; without scripts the table stays in the order of the runs.
const number = (text) => parseFloat(text.replaceAll(",", "").replace("−", "-"));
for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") !== "descending";
      for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const text = (row) => row.cells[column].textContent;
      const order = (a, b) => number(text(a)) - number(text(b)) || text(a).localeCompare(text(b), "en", { numeric: true });
      const missing = (row) => text(row) === "–";
      const rows = [...table.tBodies[0].rows];
      table.tBodies[0].append(...rows.sort((a, b) => missing(a) - missing(b) || (down ? -1 : 1) * order(a, b)));
    });
  });
}

// Shows the pictures as they were after a task; without scripts they are those of the end.
const slider = document.querySelector("#moment");
if (slider) {
  const names = slider.dataset.names.split(",");
  slider.hidden = false;
  slider.addEventListener("input", () => {
    for (const part of document.querySelectorAll("[data-moment]")) part.hidden = part.dataset.moment !== slider.value;
    document.querySelector("#moment-name").textContent = `${slider.value}: ${names[slider.value - 1]}`;
  });
}
