// Reads a chart out where the pointer is. The page is complete without it.
for (const svg of document.querySelectorAll("svg[data-points]")) {
  const data = JSON.parse(svg.dataset.points), figure = svg.parentElement, [x0, x1] = data.x;
  const [, , width, height] = svg.getAttribute("viewBox").split(" ").map(Number), left = 52, right = 14;
  let line, box;
  svg.addEventListener("pointerleave", () => { line?.remove(); box?.remove(); line = box = null; });
  svg.addEventListener("pointermove", (event) => {
    const area = svg.getBoundingClientRect(), at = (event.clientX - area.left) / area.width * width;
    const x = x0 + (at - left) / (width - left - right) * (x1 - x0);
    const rows = data.series.map(([name, , xs, ys]) => {
      let k = 0;
      for (let i = 1; i < xs.length; i++) if (Math.abs(xs[i] - x) < Math.abs(xs[k] - x)) k = i;
      return [name, xs[k], ys[k]];
    });
    const nearest = rows.reduce((a, b) => Math.abs(b[1] - x) < Math.abs(a[1] - x) ? b : a)[1];
    if (!line) {
      line = document.createElementNS("http://www.w3.org/2000/svg", "line");
      line.setAttribute("class", "cross"); svg.append(line);
      box = document.createElement("div"); box.className = "read"; figure.append(box);
    }
    const place = left + (nearest - x0) / (x1 - x0) * (width - left - right);
    for (const [name, value] of [["x1", place], ["x2", place], ["y1", 12], ["y2", height - 34]]) line.setAttribute(name, value);
    box.textContent = data.label + " " + nearest + rows.map(([name, , y]) => "   " + name + " " + y).join("");
    const limit = figure.clientWidth - box.offsetWidth - 8;
    box.style.left = Math.max(8, Math.min(limit, place / width * area.width - box.offsetWidth / 2 + svg.offsetLeft)) + "px";
    box.style.top = svg.offsetTop + 4 + "px";
  });
}
