// Samples and charts of the Train tab share one time axis and one cursor: the scrubber, the columns of samples and the cursor
// of the chart show the same step.
(() => {
  const { one, all, later, t } = window.easel;
  const PAUSE = 1000;
  let at = null, run = "", last = [];

  const stepsOf = (scrubber) => (scrubber?.dataset.steps ? scrubber.dataset.steps.split(",").map(Number) : []);
  const chart = () => one("#run-chart");

  // Shows a step (the newest for null): marks its column of samples, brings it into view, moves scrubber and chart.
  const show = (step, scrolls = true) => {
    const scrubber = one("#scrubber"), steps = stepsOf(scrubber);
    at = step === null || step >= steps.at(-1) ? null : step;
    if (!steps.length) return;
    const index = step === null ? steps.length - 1 : steps.reduce((best, each, i) => (Math.abs(each - step) < Math.abs(steps[best] - step) ? i : best), 0);
    if (Number(scrubber.value) !== index) scrubber.value = index;
    scrubber.setAttribute("aria-valuetext", steps[index] ? t("step {step}", { step: steps[index].toLocaleString("en") }) : t("base"));
    for (const figure of all("#samples figure")) figure.classList.toggle("on", Number(figure.dataset.step) === steps[index]);
    const scroll = one(".samples-scroll"), figure = one("#samples figure.on"), pinned = one("#samples figure.pinned");
    if (!figure) return;
    // Manual scrolling stays, until another step is shown.
    const same = last[0] === scroll && last[1] === index;
    last = [scroll, index];
    const left = figure.offsetLeft - (figure === pinned || !pinned ? 0 : pinned.offsetWidth + 12), right = figure.offsetLeft + figure.offsetWidth;
    const hidden = left < scroll.scrollLeft || right > scroll.scrollLeft + scroll.clientWidth;
    if (hidden && !same && scrolls) scroll.scrollLeft = (left + right - scroll.clientWidth) / 2;
    if (chart()) window.charts.placeOf(chart()).point(step ?? steps[index]);
  };

  // Columns of evenly spaced steps are above their places on the chart's axis, where all of them fit.
  const align = () => {
    const node = chart(), scroll = one(".samples-scroll");
    if (!node || !scroll?.clientWidth) return;
    const steps = [...new Set(all("#samples .strip:first-of-type figure").map((figure) => Number(figure.dataset.step)))], gap = steps[1] - steps[0];
    const even = steps.length > 2 && scroll.scrollWidth <= scroll.clientWidth && steps.every((step, i) => step === steps[0] + i * gap);
    one(".timeline").classList.toggle("aligned", even);
    const range = even ? `${steps[0] - gap / 2},${steps.at(-1) + gap / 2}` : "";
    if ((node.dataset.range ?? "") === range) return;
    if (range) Object.assign(node.dataset, { range, gap }); else delete node.dataset.range;
    if (window.charts.placeOf(node).charts.length) window.charts.placeOf(node).draw();
  };

  let loaded = "";
  const wanted = () => {
    const node = chart(), state = one("#run-status")?.dataset;
    return node?.offsetParent && state && !document.hidden ? [node.dataset.source, node.dataset.compare, state.state, state.step, one("#verdict")?.textContent].join("|") : "";
  };
  const stale = () => wanted() && (wanted() !== loaded || !one(".chart-head", chart()));
  // Takes the curves; how long to wait before the next time, as long ones come less often.
  const take = async () => {
    const node = chart(), now = wanted(), { source, compare } = node.dataset;
    const answer = await fetch(compare ? `${source}?compare=${encodeURIComponent(compare)}` : source);
    const { charts, tables, note } = await answer.json();
    // Another run may be shown by now.
    if (chart() !== node || node.dataset.source !== source || node.dataset.compare !== compare) return 1;
    loaded = now;
    one(".chart-table > div", node).innerHTML = tables;
    one(".chart-table", node).hidden = !tables;
    window.charts.placeOf(node).take(charts, note);
    return PAUSE + charts.flatMap(({ curves }) => curves).reduce((sum, { x }) => sum + x.length, 0) / 2;
  };
  let busy = false;
  const load = async () => {
    if (busy || !stale()) return;
    busy = true;
    // What fails is tried again with the next change of the page.
    const pause = await take().catch(() => 0);
    await later(pause || PAUSE);
    busy = false;
    if (pause) load();
  };

  const settle = () => {
    const name = one("#run-status")?.dataset.shownRun ?? "";
    if (name !== run) { run = name; at = null; }
    load();
    align();
    show(at);
  };
  window.easel.settling.push(settle);
  addEventListener("resize", align);
  document.addEventListener("visibilitychange", settle);
  document.addEventListener("input", ({ target }) => {
    if (target.id !== "scrubber") return;
    const steps = stepsOf(target), index = Number(target.value);
    show(index === steps.length - 1 ? null : steps[index]);
  });
  document.addEventListener("keydown", (event) => {
    const scrubber = one("#scrubber"), by = { ArrowLeft: -1, ArrowRight: 1 }[event.key], index = Number(scrubber?.value) + by;
    if (!by || event.altKey || event.ctrlKey || event.metaKey || !event.target.matches(".samples-scroll")) return;
    event.preventDefault();
    show(stepsOf(scrubber)[index] ?? at);
  });
  document.addEventListener("chart-step", ({ detail }) => show(detail));
  // A column is chosen by the pointer and by the focus that the keyboard brings to its image.
  for (const kind of ["pointerover", "focusin"]) document.addEventListener(kind, ({ target }) => {
    const figure = target.closest?.("#samples figure:not(.ghost)");
    if (figure) show(Number(figure.dataset.step), kind === "focusin");
  });
})();
