// Draws the figures of the page's JSON, in the colours of style.css, and again when the reader's scheme changes.
"use strict";

const { trials, plots } = JSON.parse(document.getElementById("figures").textContent);
const config = { responsive: true, displayModeBar: false, displaylogo: false };

// Names such as "--accent" stand for what style.css gives them in the scheme at hand.
// Only where colours stand: a class may be called "--accent".
function resolve(value, colors, key = "") {
  if (Array.isArray(value)) return value.map((inner) => resolve(inner, colors, key));
  if (value !== null && typeof value === "object") {
    return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, resolve(inner, colors, key)]));
  }
  const isName = /color(scale)?$/.test(key) && typeof value === "string" && value.startsWith("--");
  return isName ? colors.getPropertyValue(value).trim() : value;
}

function addHover(trace) {
  if (!trace.customdata) return trace;
  const hovertext = trace.customdata.map((number) => (number === null ? "" : trials[number]));
  return { ...trace, hovertext, hoverinfo: "text" };
}

const axis = {
  color: "--ink", gridcolor: "--line", linecolor: "--line", zeroline: false, automargin: true, fixedrange: true,
  spikecolor: "--muted", spikethickness: -1, spikedash: "dot",
};
const base = {
  paper_bgcolor: "rgba(0,0,0,0)",
  plot_bgcolor: "rgba(0,0,0,0)",
  font: { family: "system-ui, sans-serif", size: 12, color: "--ink" },
  margin: { l: 8, r: 12, t: 28, b: 8 },
  // Dragging scrolls the page; a finger must not be caught by a plot.
  dragmode: false,
  hovermode: "closest",
  hoverlabel: { align: "left", bgcolor: "--panel", bordercolor: "--line", font: { color: "--ink", family: "system-ui, sans-serif" } },
  legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
};

function drawPlot(id, figure) {
  const colors = getComputedStyle(document.documentElement);
  const layout = { ...base, ...figure.layout };
  layout.xaxis = { ...axis, ...figure.layout.xaxis };
  layout.yaxis = { ...axis, ...figure.layout.yaxis };
  Plotly.react(id, figure.data.map(addHover).map((trace) => resolve(trace, colors)), resolve(layout, colors), config);
}

// One after the other from the top, so that the page can be read and scrolled meanwhile.
function draw() {
  const waiting = Object.entries(plots);
  function drawNext() {
    const next = waiting.shift();
    if (next === undefined) return;
    drawPlot(...next);
    setTimeout(drawNext);
  }
  drawNext();
}

draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
