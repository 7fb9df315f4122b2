// Sorts the summary by a column; without scripts the table stays in the order of the runs.
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
      const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => key(a).localeCompare(key(b), "en", { numeric: true }));
      if (column) rows.sort((a, b) => (key(a) === "") - (key(b) === "") || (down ? -1 : 1) * (key(a) - key(b)));
      else if (down) rows.reverse();
      table.tBodies[0].append(...rows);
    });
  });
}
