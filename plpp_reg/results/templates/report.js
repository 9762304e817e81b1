// Column heads that the keyboard reaches, and a box above each long table that shows the rows with what is typed in it.
for (const table of document.querySelectorAll("table.sortable")) {
  for (const head of table.tHead.rows[0].cells) {
    head.tabIndex = 0;
    head.title = "sort by this column";
    head.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        head.click();
      }
    });
  }
  if (table.querySelectorAll("tbody tr").length <= 12) continue;
  const box = document.createElement("input");
  box.type = "search";
  box.placeholder = "filter rows";
  box.setAttribute("aria-label", "Filter the rows of: " + (table.caption ? table.caption.textContent : "this table"));
  box.addEventListener("input", () => {
    const wanted = box.value.toLowerCase();
    for (const row of table.querySelectorAll("tbody tr:not(.group)")) {
      const group = row.dataset.group || "";
      row.hidden = !(row.textContent + " " + group).toLowerCase().includes(wanted);
    }
  });
  table.closest(".scroll").before(box);
}
