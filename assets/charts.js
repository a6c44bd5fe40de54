// Charts of the window and of a run's report, drawn with uPlot. `lora_core/report/plots.py` writes those of a place as JSON;
// where there are several, buttons choose one. Hovering and the arrow keys show the values and the sample of a step, dragging
// and plus zoom, a double click and Escape show everything.
(() => {
  const COLOURS = { smooth: "accent", second: "second", third: "third", raw: "faint" }, DASHES = { second: [6, 4], third: [2, 3] };
  const HEIGHT = 220, AXIS = 48, MOST_DOTS = 40, INCREMENTS = Array.from({ length: 21 }, (_, i) => [1, 2, 5][i % 3] * 10 ** Math.floor(i / 3));
  const make = (tag, properties = {}, ...inside) => {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...inside);
    return made;
  };
  // A report speaks English.
  const t = window.easel?.t ?? ((text) => text);
  const token = (name) => getComputedStyle(document.body).getPropertyValue(`--${name}`).trim();
  const family = getComputedStyle(document.body).fontFamily;
  const number = (value) => value.toLocaleString("en", { maximumSignificantDigits: 4 });
  const nearest = (xs, x) => {
    let low = 0, high = xs.length - 1;
    while (high - low > 1) { const middle = (low + high) >> 1; if (xs[middle] < x) low = middle; else high = middle; }
    return x - xs[low] <= xs[high] - x ? low : high;
  };
  // The moving average over about `steps` steps, with the bias of the start taken out.
  const average = ({ x, y }, steps) => {
    const decay = steps ? Math.exp((x[0] - x[1]) / steps) : 0;
    let total = 0, weight = 0;
    return y.map((value) => {
      total = decay * total + value;
      weight = decay * weight + 1;
      return total / weight;
    });
  };

  // A choice in one place holds for the next, as when another run is shown; a report has no storage of its own.
  const kept = { title: "", log: false, steps: Number((window.easel && localStorage.getItem("easel-smoothing")) ?? 50) };

  class Place {
    constructor(node) {
      Object.assign(this, { node, charts: [], shown: 0, at: null, hidden: new Set(), index: -1 });
      const button = (textContent, onclick, more = {}) => make("button", { type: "button", className: "own quiet", textContent, onclick, ...more });
      this.choice = make("div", { className: "seg", role: "group", ariaLabel: t("Chart") });
      this.logs = button(t("Log scale"), () => { kept.log = !kept.log; this.draw(); });
      const slider = make("input", { type: "range", min: 0, max: 200, step: 5, value: kept.steps, ariaLabel: t("Smoothing of the loss, in steps") });
      slider.oninput = () => {
        kept.steps = Number(slider.value);
        if (window.easel) localStorage.setItem("easel-smoothing", kept.steps);
        this.draw();
      };
      this.smoothing = make("label", { className: "small smoothing" }, `${t("Smoothing")} `, slider);
      this.whole = button(t("Show all"), () => { this.reset(); this.box.focus(); }, { hidden: true, title: t("Double click or Escape") });
      this.keys = make("p", { className: "keys small" });
      this.box = make("div", { className: "chart-box", onkeydown: (event) => this.press(event), onblur: () => this.leave() });
      this.tip = make("div", { className: "chart-tip", ariaHidden: "true", hidden: true });
      this.line = make("i", { className: "chart-at" });
      this.note = make("p", { className: "small chart-note" });
      this.head = make("div", { className: "chart-head" }, this.choice, this.keys, make("span", { className: "grow" }), this.smoothing, this.logs, this.whole);
      new ResizeObserver(() => { if (this.plot && this.width && this.width !== this.plot.width) this.plot.setSize({ width: this.width, height: HEIGHT }); }).observe(this.box);
    }

    get width() { return this.box.clientWidth; }
    get chart() { return this.charts[this.shown]; }

    // Takes new data; zoom, hidden curves and choices stay.
    take(charts, note = "") {
      for (const { curves } of charts) for (const { name, hidden } of curves) if (hidden && !this.known?.has(name)) this.hidden.add(name);
      this.known = new Set(charts.flatMap(({ curves }) => curves.map(({ name }) => name)));
      this.charts = charts;
      this.shown = Math.max(0, charts.findIndex(({ title }) => title === kept.title));
      this.note.textContent = note;
      this.draw();
    }

    choose(shown) { this.shown = shown; kept.title = this.chart.title; this.draw(); }

    // The columns that uPlot draws: of a noisy curve the raw values and their average, of a band its edges.
    columns() {
      return this.chart.curves.flatMap((curve) => {
        const { name, x, y, error, style, noisy } = curve, stroke = () => token(COLOURS[style]), show = !this.hidden.has(name);
        const line = { curve, y, stroke, show, width: 2, dash: noisy ? undefined : DASHES[style], points: { show: !noisy && x.length <= MOST_DOTS, size: 5, fill: stroke } };
        if (noisy) return [{ ...line, width: 1, alpha: this.chart.curves.length > 1 ? 0.15 : 0.35, edge: true }, { ...line, y: average(curve, kept.steps) }];
        const edge = (sign) => ({ curve, y: y.map((value, i) => value + sign * error[i]), show, edge: true, band: stroke, width: 0, points: { show: false } });
        return error.length ? [edge(1), edge(-1), line] : [line];
      });
    }

    range({ data, series }, low, high) {
      if (low === null) return [0, 1];
      const from = nearest(data[0], series[0].min), to = nearest(data[0], series[0].max) + 1;
      // A single outlier must not flatten the curve.
      if (this.list.some(({ curve }) => curve.noisy)) high = Math.max(...this.list.map(({ curve, show, edge }, i) => {
        const values = show ? data[i + 1].slice(from, to).filter(Number.isFinite).sort((a, b) => a - b) : [];
        return values[Math.floor((curve.noisy && edge ? 0.98 : 1) * (values.length - 1))] ?? low;
      }));
      // What does not move has an axis too.
      if (high - low <= 1e-6 * Math.abs(high)) [low, high] = [low - Math.abs(low) / 10, high + Math.abs(high) / 10];
      if (this.logs.ariaPressed === "true") return [low * 0.95, high * 1.05];
      return uPlot.rangeNum(low > 0 && low < high / 3 ? 0 : low, high, 0.08, false);
    }

    draw() {
      const { chart } = this, zoom = this.zoomed && this.plot ? { ...this.plot.scales.x } : null;
      this.box.hidden = !chart;
      this.controls();
      if (!chart || !this.width) return;
      if (!window.uPlot) { load(); return; }
      this.list = this.columns();
      const data = uPlot.join(this.list.map(({ curve, y }) => [curve.x, y])), xs = data[0];
      // The axis of the samples, else all data.
      const asked = chart.x === "Step" ? this.node.dataset.range?.split(",").map(Number) : null;
      this.full = asked ? [Math.min(asked[0], xs[0]), Math.max(asked[1], xs.at(-1))] : [xs[0], xs.length > 1 ? xs.at(-1) : xs[0] + 1];
      this.least = Math.min(xs[0], 0);
      const kind = JSON.stringify([chart.title, chart.logX, this.logs.ariaPressed, this.list.map(({ curve, show, points }) => [curve.name, show, points.show])]);
      if (this.plot && this.kind === kind) {
        this.plot.setData(data, !zoom);
        if (zoom) this.plot.setScale("x", zoom);
        return;
      }
      this.kind = kind;
      this.plot?.destroy();
      const bands = this.list.flatMap((column, i) => (column.band && this.list[i + 1].band ? [{ series: [i + 1, i + 2], fill: () => `${column.band()}24` }] : []));
      const axis = { stroke: () => token("muted"), font: `12px ${family}`, ticks: { show: false } };
      // Below samples the ticks are under them, else at round numbers; beyond the data there are none.
      const incrs = (_, __, low) => (asked && low === this.full[0] ? [Number(this.node.dataset.gap)] : INCREMENTS);
      const xTicks = (_, ticks) => ticks.map((tick) => (tick === null || tick < this.least ? "" : chart.logX ? tick.toExponential(0) : number(tick)));
      this.plot = new uPlot({
        width: this.width, height: HEIGHT, legend: { show: false }, bands, padding: [8, 24, 0, 0],
        scales: {
          x: { time: false, distr: chart.logX ? 3 : 1, range: (u, low, high) => (low === u.data[0][0] && high === u.data[0].at(-1) ? this.full : [low, high]) },
          y: { distr: this.logs.ariaPressed === "true" ? 3 : 1, range: (...given) => this.range(...given) },
        },
        axes: [
          { ...axis, size: 28, gap: 4, grid: { show: false }, space: 56, values: xTicks, ...(chart.x === "Step" ? { incrs } : {}) },
          { ...axis, size: AXIS, gap: 6, space: 34, grid: { stroke: () => token("line"), width: 1 }, values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : `${number(tick)}${chart.unit}`)) },
        ],
        series: [{}, ...this.list.map(({ curve, y, edge, band, ...options }) => ({ spanGaps: true, ...options }))],
        cursor: { y: false, move: (u, left, top) => [left < 0 ? left : u.valToPos(u.data[0][u.posToIdx(left)], "x"), top], drag: { x: true, y: false, dist: 4 }, points: { size: 9, show: (_, i) => !this.list[i - 1].edge && make("div") } },
        hooks: { drawAxes: [() => this.shade()], draw: [() => this.mark()], setCursor: [() => this.follow()], setScale: [(_, key) => key === "x" && this.scaled()] },
      }, data, this.box);
      this.plot.over.append(this.line, this.tip);
      if (zoom) this.plot.setScale("x", zoom);
      this.place();
      // A box without a chart has no value to say and nothing to focus.
      Object.assign(this.box, { role: "slider", tabIndex: 0 });
      this.name();
    }

    // The controls that fit the chart shown.
    controls() {
      const curves = this.chart?.curves ?? [], noisy = curves.some((curve) => curve.noisy);
      const key = ({ name, style, error }) => make("button", {
        type: "button", className: `key ${style}`, textContent: error.length ? `${name} \u00b1 2 SE` : name, ariaPressed: !this.hidden.has(name), title: t("Show or hide"),
        onclick: () => { if (!this.hidden.delete(name)) this.hidden.add(name); const at = curves.findIndex((curve) => curve.name === name); this.draw(); this.keys.children[at].focus(); },
      });
      this.smoothing.hidden = !noisy;
      this.logs.hidden = !noisy || curves.some(({ y }) => y.some((value) => value <= 0));
      this.logs.ariaPressed = kept.log && !this.logs.hidden;
      // A button that is pressed while new data comes stays.
      const now = JSON.stringify([this.shown, this.charts.map(({ title }) => title), curves.map(({ name, style, error }) => [name, style, error.length > 0, this.hidden.has(name)])]);
      if (now === this.shows) return;
      this.shows = now;
      this.choice.replaceChildren(...this.charts.map(({ title }, i) => make("button", { type: "button", textContent: title, ariaPressed: i === this.shown, onclick: () => { this.choose(i); this.choice.children[i].focus(); } })));
      this.choice.hidden = this.charts.length < 2;
      this.keys.replaceChildren(...(curves.length > 1 || curves.some(({ error }) => error.length) ? curves.map(key) : []));
    }

    shade() {
      const { ctx, bbox } = this.plot, { between } = this.chart;
      if (!between) return;
      const [left, right] = between.map((x) => this.plot.valToPos(x, "x", true));
      ctx.fillStyle = `${token("accent")}18`;
      ctx.fillRect(left, bbox.top, Math.max(2, right - left), bbox.height);
    }

    mark() {
      const { mark } = this.chart, { ctx, bbox } = this.plot;
      this.place();
      if (!mark || mark.x < this.plot.scales.x.min || mark.x > this.plot.scales.x.max) return;
      const [x, y] = [this.plot.valToPos(mark.x, "x", true), this.plot.valToPos(mark.y, "y", true)], ratio = devicePixelRatio;
      const right = x > bbox.left + bbox.width / 2;
      ctx.save();
      ctx.strokeStyle = ctx.fillStyle = token("good");
      ctx.setLineDash([2 * ratio, 3 * ratio]);
      ctx.beginPath();
      ctx.moveTo(bbox.left, y);
      ctx.lineTo(bbox.left + bbox.width, y);
      ctx.stroke();
      ctx.beginPath();
      ctx.arc(x, y, 5 * ratio, 0, 2 * Math.PI);
      ctx.fill();
      ctx.font = `${12 * ratio}px ${family}`;
      ctx.textAlign = right ? "right" : "left";
      ctx.fillText(mark.text, x + (right ? -8 : 8) * ratio, y - bbox.top < 24 * ratio ? y + 18 * ratio : y - 10 * ratio);
      ctx.restore();
    }

    // ---- cursor ----------------------------------------------------------------------------------------------------
    point(x) { this.at = x; if (this.plot) this.place(); }

    place() {
      const left = this.at === null ? -1 : this.plot.valToPos(this.at, "x");
      this.line.hidden = !(left >= 0 && left <= this.plot.over.clientWidth);
      this.line.style.left = `${left}px`;
    }

    follow() {
      const { cursor, data, over } = this.plot;
      this.tip.hidden = !(cursor.left >= 0 && cursor.idx !== null);
      if (this.tip.hidden) return;
      this.index = cursor.idx;
      const x = data[0][this.index], facts = this.facts(x), sample = this.chart.x === "Step" && this.sample(x);
      this.tip.replaceChildren(
        ...(sample ? [make("img", { src: sample.src, alt: "" })] : []), make("b", { textContent: this.title(x) }),
        make("dl", {}, ...facts.flatMap(([name, value]) => [make("dt", { textContent: name }), make("dd", { textContent: value })])),
      );
      const wide = over.clientWidth, own = this.tip.offsetWidth, left = cursor.left > wide / 2 ? cursor.left - own - 12 : cursor.left + 12;
      const at = this.list.findIndex(({ edge, show }) => show && !edge) + 1, high = this.plot.valToPos(data[at]?.[cursor.idxs[at]] ?? 0, "y") < over.clientHeight / 2;
      this.tip.style.left = `${Math.max(-AXIS, Math.min(left, wide - own))}px`;
      this.tip.style.top = high ? `${over.clientHeight - this.tip.offsetHeight - 8}px` : "8px";
      this.name(x, facts);
      if (this.chart.x === "Step") this.node.dispatchEvent(new CustomEvent("chart-step", { bubbles: true, detail: x }));
    }

    title(x) { return `${t(this.chart.x)} ${number(x)}${this.chart.mark?.x === x ? t(", best") : ""}`; }

    // The values at x of the chart shown, then of the others at the same place.
    facts(x) {
      const shown = [this.chart, ...this.charts.filter((chart) => chart !== this.chart && chart.x === this.chart.x)];
      return shown.flatMap((chart) => chart.curves.filter(({ name }) => !this.hidden.has(name)).map((curve) => {
        const at = nearest(curve.x, x), error = curve.error[at], y = curve.noisy ? average(curve, kept.steps)[at] : curve.y[at];
        const name = curve.noisy ? `${curve.name}${t(", smoothed")}` : curve.name;
        return [chart === this.chart || curve.noisy ? name : `${chart.title}, ${name}`, `${number(y)}${chart.unit}${error ? ` \u00b1 ${error.toPrecision(2)}` : ""}`];
      }));
    }

    sample(x) {
      const there = [...document.querySelectorAll("figure[data-step] img, img[data-step]")].map((image) => [Math.abs(image.closest("[data-step]").dataset.step - x), image]);
      return there.reduce((a, b) => (b[0] < a[0] ? b : a), [Infinity, null])[1];
    }

    name(x = this.plot.data[0].at(-1), facts = this.facts(x)) {
      const { data } = this.plot;
      Object.assign(this.box, {
        ariaLabel: this.chart.label, ariaValueMin: data[0][0], ariaValueMax: data[0].at(-1), ariaValueNow: x,
        ariaValueText: `${this.title(x)}: ${facts.map((fact) => fact.join(" ")).join(", ")}`,
      });
    }

    leave() { this.plot?.setCursor({ left: -10, top: -10 }); }

    // ---- zoom and keys --------------------------------------------------------------------------------------------
    get zoomed() { return !this.whole.hidden; }

    scaled() {
      if (!this.plot) return;
      const { min, max } = this.plot.scales.x;
      this.whole.hidden = min === this.full[0] && max === this.full[1];
    }

    reset() { const xs = this.plot.data[0]; this.plot.setScale("x", { min: xs[0], max: xs.at(-1) }); }

    zoom(by) {
      const { min, max } = this.plot.scales.x, middle = this.plot.data[0][this.index] ?? (min + max) / 2, half = ((max - min) / 2) * by;
      const [low, high] = [Math.max(this.full[0], middle - half), Math.min(this.full[1], middle + half)];
      if (by > 1 && low === this.full[0] && high === this.full[1]) this.reset();
      else this.plot.setScale("x", { min: low, max: high });
      if (this.index >= 0) this.move();
    }

    // Puts the cursor at a point, once uPlot has applied the scale, as it does in a microtask.
    move() {
      const { index, plot } = this;
      queueMicrotask(() => { if (plot === this.plot) plot.setCursor({ left: plot.valToPos(plot.data[0][index], "x"), top: 0 }); });
    }

    press(event) {
      if (!this.plot || event.ctrlKey || event.metaKey || event.altKey) return;
      const xs = this.plot.data[0], { key } = event, by = { ArrowLeft: -1, ArrowRight: 1, PageDown: -10, PageUp: 10, Home: -Infinity, End: Infinity }[key];
      if (by) {
        this.index = Math.max(0, Math.min(xs.length - 1, (this.index < 0 ? xs.length - 1 : this.index) + by));
        const { min, max } = this.plot.scales.x, x = xs[this.index];
        if (x < min || x > max) this.plot.setScale("x", x < min ? { min: x, max: x + max - min } : { min: x - max + min, max: x });
        this.move();
      } else if (key === "+" || key === "=") this.zoom(0.5);
      else if (key === "-") this.zoom(2);
      else if (key === "Escape" && this.zoomed) this.reset();
      else return;
      event.preventDefault();
    }
  }

  const places = new WeakMap(), drawn = () => [...document.querySelectorAll(".chart")].flatMap((node) => places.get(node) ?? []);
  // A report has uPlot; the window loads it with the first chart in sight, as most visits begin elsewhere.
  const { uplot } = document.currentScript.dataset;
  let loading = null;
  const load = () => {
    if (loading) return;
    const onload = () => drawn().forEach((place) => place.draw());
    const onerror = () => { loading.remove(); setTimeout(() => { loading = null; onload(); }, 2000); };
    loading = make("script", { src: uplot, onload, onerror });
    document.head.append(loading);
  };
  const placeOf = (node) => {
    if (!places.has(node)) places.set(node, new Place(node));
    const place = places.get(node);
    // Gradio keeps the node, but not foreign content, when its HTML changes.
    if (place.head.parentElement !== node) node.prepend(place.head, place.box, place.note);
    return place;
  };
  // Draws new and newly visible charts.
  const settle = () => {
    for (const node of document.querySelectorAll(".chart[data-chart]")) {
      const place = placeOf(node);
      if (!place.charts.length) place.take(JSON.parse(node.dataset.chart));
      else if (!place.plot && place.width) place.draw();
    }
  };
  const repaint = () => { for (const { plot } of drawn()) plot?.redraw(); };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
  document.addEventListener("click", (event) => { if (event.target.closest("[data-theme-switch]")) requestAnimationFrame(repaint); });
  document.addEventListener("toggle", settle, true);
  window.easel?.settling.push(settle);
  window.charts = { placeOf, settle };
  settle();
})();
