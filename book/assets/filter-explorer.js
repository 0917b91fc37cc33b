/* The filter explorer of the chapter "Gradient filters": two sliders, and three figures that Vega
   draws again when one moves. The formulas are those of bnnbook/filters.py; a test compares both.
   It needs vega.min.js, an element with the id filter-explorer, and no network. */
"use strict";

const FORMULAS = {
  signals: [
    { name: "total", value: 720 },
    { name: "columns", update: "total >= 600 ? 3 : 1" },
    { name: "panel", update: "floor(total / columns) - 78" },
    { name: "alpha", value: 0.001 },
    { name: "gamma", value: 0.1 },
    { name: "p", update: "1 - alpha" },
    { name: "q", update: "1 - gamma" },
    { name: "delay", update: "p / alpha + q / gamma" },
    { name: "noiseFirst", update: "alpha / (2 - alpha)" },
    {
      name: "noiseSecond",
      update: "noiseFirst * gamma / (2 - gamma) * (1 + p * q) / (1 - p * q)",
    },
    { name: "flipsFirst", update: "2 / PI * atan(sqrt(noiseFirst))" },
    { name: "flipsSecond", update: "2 / PI * atan(sqrt(noiseFirst * gamma / (2 - gamma)))" },
  ],
  data: [
    {
      name: "impulse", // k: the age of a gradient in steps
      transform: [
        { type: "sequence", start: 0, stop: 201, as: "i" },
        { type: "formula", as: "k", expr: "round(pow(10, datum.i / 40)) - 1" },
        { type: "formula", as: "k1", expr: "datum.k + 1" },
        { type: "formula", as: "first", expr: "alpha * pow(p, datum.k)" },
        {
          type: "formula",
          as: "second",
          expr:
            "p == q ? alpha * alpha * datum.k1 * pow(p, datum.k)" +
            " : alpha * gamma * (pow(p, datum.k1) - pow(q, datum.k1)) / (p - q)",
        },
      ],
    },
    {
      name: "gain", // in decibels, over the angular frequency omega
      transform: [
        { type: "sequence", start: 0, stop: 201, as: "i" },
        { type: "formula", as: "omega", expr: "PI * pow(10, (datum.i - 200) / 36)" },
        { type: "formula", as: "u", expr: "4 * pow(sin(datum.omega / 2), 2)" },
        {
          type: "formula",
          as: "first",
          expr: "-10 * log(1 + datum.u * p / (alpha * alpha)) / LN10",
        },
        {
          type: "formula",
          as: "second",
          expr: "datum.first - 10 * log(1 + datum.u * q / (gamma * gamma)) / LN10",
        },
      ],
    },
    {
      name: "law", // flips per step over a, the rate alpha
      transform: [
        { type: "sequence", start: 0, stop: 101, as: "i" },
        { type: "formula", as: "a", expr: "pow(10, (datum.i - 100) / 20)" },
        { type: "formula", as: "first", expr: "2 / PI * atan(sqrt(datum.a / (2 - datum.a)))" },
        {
          type: "formula",
          as: "second",
          expr: "2 / PI * atan(sqrt(datum.a / (2 - datum.a) * gamma / (2 - gamma)))",
        },
      ],
    },
    {
      name: "here",
      values: [{}],
      transform: [
        { type: "formula", as: "a", expr: "alpha" },
        { type: "formula", as: "first", expr: "flipsFirst" },
        { type: "formula", as: "second", expr: "flipsSecond" },
      ],
    },
  ],
};

(() => {
  const COLORS = { first: "var(--explorer-first)", second: "var(--explorer-second)" };
  const LEFT = { minExtent: 34, maxExtent: 34 };
  const INK = Object.fromEntries(
    ["domainColor", "labelColor", "tickColor", "titleColor"].map((key) => [key, "currentColor"])
  );
  const STYLE = `
    #filter-explorer { --explorer-first: #0072b2; --explorer-second: #c24e00; margin: 1rem 0; }
    html[data-theme="dark"] #filter-explorer
      { --explorer-first: #56b4e9; --explorer-second: #f0a35e; }
    #filter-explorer .sliders { display: flex; flex-wrap: wrap; gap: 0.3rem 2rem; }
    #filter-explorer label { flex: 1 1 15rem; }
    #filter-explorer input { width: 100%; margin: 0; min-height: 1.5rem; accent-color: currentcolor; }
    #filter-explorer output { font-variant-numeric: tabular-nums; }
    #filter-explorer .key { margin: 0.3rem 0; }
    #filter-explorer .key span { font-weight: 600; }
    #filter-explorer svg { display: block; max-width: 100%; margin-bottom: 0.6rem; }
    @media print { #filter-explorer { display: none; } }`;

  const curve = (data, x, name) => ({
    type: "line",
    from: { data },
    clip: true,
    encode: {
      update: {
        x: { scale: "x", field: x },
        y: { scale: "y", field: name },
        stroke: { value: COLORS[name] },
        strokeWidth: { value: 2 },
        strokeDash: { value: name === "first" ? [5, 3] : [] },
        // what has sunk to zero has no logarithm
        defined: { signal: `domain("y")[0] < 0 || datum.${name} > 0` },
      },
    },
  });
  const dot = (name) => ({
    type: "symbol",
    from: { data: "here" },
    clip: true,
    encode: {
      update: {
        x: { scale: "x", field: "a" },
        y: { scale: "y", field: name },
        fill: { value: COLORS[name] },
        size: { value: 70 },
      },
    },
  });
  const panel = ({ data, x, xTitle, xDomain, yTitle, yDomain, yType, marks }) => ({
    type: "group",
    encode: { update: { width: { signal: "panel" }, height: { value: 190 } } },
    scales: [
      { name: "x", type: "log", domain: xDomain, range: [0, { signal: "panel" }] },
      { name: "y", type: yType || "log", domain: yDomain, range: [190, 0] },
    ],
    axes: [
      { orient: "bottom", scale: "x", title: xTitle, format: ".0e" },
      { orient: "left", scale: "y", title: yTitle, format: yType ? "d" : ".0e", ...LEFT },
    ].map((axis) => ({ tickCount: 5, labelOverlap: true, titleFontWeight: "normal", ...INK,
      ...axis })),
    marks: [curve(data, x, "first"), curve(data, x, "second"), ...(marks || [])],
  });

  const SPEC = {
    ...FORMULAS,
    description: "Impulse response, frequency response and flip-rate law of one and two averages",
    autosize: "pad",
    padding: 2,
    layout: { columns: { signal: "columns" }, padding: 12, align: "each" },
    marks: [
      panel({
        data: "impulse", x: "k1", xTitle: "age of a gradient + 1 (steps)", xDomain: [1, 1e5],
        yTitle: "its weight in g", yDomain: [1e-7, 1],
      }),
      panel({
        data: "gain", x: "omega", xTitle: "frequency (radians a step)",
        xDomain: [1e-5, Math.PI], yTitle: "gain (dB)", yDomain: [-120, 0], yType: "linear",
      }),
      panel({
        data: "law", x: "a", xTitle: "α", xDomain: [1e-5, 1], yTitle: "flips a step",
        yDomain: [1e-5, 1], marks: [dot("first"), dot("second")],
      }),
    ],
  };

  const digits = (value, count = 3) => value.toLocaleString("en-US", {
    maximumSignificantDigits: count, useGrouping: false,
  });

  function slider(name, letter, least, start, says) {
    const label = document.createElement("label");
    const value = document.createElement("output");
    const input = document.createElement("input");
    Object.assign(input, { type: "range", min: least, max: 0, step: 0.05, value: start });
    input.id = `filter-explorer-${name}`;
    input.setAttribute("aria-label", `${name}, ${says}`);
    value.htmlFor = input.id;
    label.append(`${says} ${letter} = `, value, input);
    const rate = () => Math.pow(10, Number(input.value));
    const show = () => {
      value.textContent = digits(rate());
      input.setAttribute("aria-valuetext", value.textContent);
    };
    return { label, input, rate, show };
  }

  function start() {
    const place = document.getElementById("filter-explorer");
    if (!place || !window.vega) return;
    const style = document.createElement("style");
    style.textContent = STYLE;
    document.head.append(style);
    place.setAttribute("role", "group");
    place.setAttribute("aria-label", "Filter explorer");
    const alpha = slider("alpha", "α", -5, -3, "rate of the slow average,");
    const gamma = slider("gamma", "γ", -3, -1, "rate of the momentum,");
    const sliders = document.createElement("div");
    sliders.className = "sliders";
    sliders.append(alpha.label, gamma.label);
    const key = document.createElement("p");
    key.className = "key";
    key.innerHTML =
      `<span style="color: ${COLORS.first}">- - first order</span>, α alone &nbsp; ` +
      `<span style="color: ${COLORS.second}">— second order</span>, α and γ`;
    const figure = document.createElement("div");
    const says = document.createElement("p");
    says.setAttribute("aria-live", "polite");
    place.replaceChildren(sliders, key, figure, says);

    const view = new vega.View(vega.parse(SPEC), {
      renderer: "svg", container: figure, hover: false, logLevel: vega.Warn,
    });
    const redraw = () => {
      alpha.show();
      gamma.show();
      view.signal("total", figure.clientWidth || 720);
      view.signal("alpha", alpha.rate()).signal("gamma", gamma.rate()).run();
      const every = (name) => digits(1 / view.signal(name));
      says.textContent =
        `Two averages: mean delay ${digits(view.signal("delay"), 4)} steps; on white noise one flip ` +
        `every ${every("flipsSecond")} steps. The slow one alone: one every ` +
        `${every("flipsFirst")} steps.`;
    };
    alpha.input.addEventListener("input", redraw);
    gamma.input.addEventListener("input", redraw);
    window.addEventListener("resize", redraw);
    redraw();
    place.view = view; // for the test
  }

  if (typeof document !== "undefined") {
    if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
    else start();
  }
})();
