// Values under the pointer: every chart carries its positions and texts, so nothing is computed here but the nearest step.
"use strict";
for (const svg of document.querySelectorAll("svg[data-chart]")) {
  const chart = JSON.parse(svg.dataset.chart);
  const cursor = svg.querySelector(".cursor");
  const figure = svg.closest("figure");
  let tip = null;

  function show(event) {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    let nearest = 0;
    chart.x.forEach((at, i) => {
      if (Math.abs(at - x) < Math.abs(chart.x[nearest] - x)) nearest = i;
    });
    cursor.setAttribute("x1", chart.x[nearest]);
    cursor.setAttribute("x2", chart.x[nearest]);
    cursor.setAttribute("visibility", "visible");
    if (!tip) {
      tip = document.createElement("div");
      tip.className = "tip";
      figure.append(tip);
    }
    tip.replaceChildren(`step ${chart.steps[nearest]}`);
    for (const series of chart.series) {
      const row = document.createElement("div");
      const label = document.createElement("span");
      label.className = `c${series.color}`;
      label.textContent = series.label;
      row.append(label, series.text[nearest]);
      tip.append(row);
    }
    const frame = figure.getBoundingClientRect();
    const at = (chart.x[nearest] / svg.viewBox.baseVal.width) * box.width + box.left - frame.left;
    const left = at + 12 + tip.offsetWidth > frame.width ? at - 12 - tip.offsetWidth : at + 12;
    tip.style.left = `${Math.max(4, left)}px`;
    tip.style.top = `${box.top - frame.top + 8}px`;
  }

  function hide() {
    cursor.setAttribute("visibility", "hidden");
    if (tip) tip.remove();
    tip = null;
  }

  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", hide);
}
