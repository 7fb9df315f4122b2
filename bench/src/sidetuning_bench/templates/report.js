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
      const key = (row) => row.cells[column].textContent;
      const rows = [...table.tBodies[0].rows].sort((a, b) => key(a).localeCompare(key(b), "en", { numeric: true }));
      if (!column && down) rows.reverse();
      const missing = (row) => isNaN(number(key(row)));
      if (column) rows.sort((a, b) => missing(a) - missing(b) || (down ? -1 : 1) * (number(key(a)) - number(key(b)) || 0));
      table.tBodies[0].append(...rows);
    });
  });
}
