// One lightbox for every image of the app. Whatever carries `data-zoom` or `data-large` opens in it, with all others of
// the same value as its row: an image, a link to one, or a button with `data-src`. `data-flip` is what Space shows in its
// place (of samples the first of the row, which is the base's), `data-words` the caption. What an image was made with is read
// from its file and can be used again.
(() => {
  const { one, all, make, openTab, t } = window.easel;
  const kind = (node) => (node.dataset.large !== undefined ? "large" : "zoom");
  const rowOf = (node) => all(`[data-${kind(node)}="${CSS.escape(node.dataset[kind(node)])}"]`);
  const addressOf = (node) => node.dataset.src || node.getAttribute("href") || node.getAttribute("src");
  // The settings that a PNG holds, as other tools write them too; "" without any.
  const settingsIn = (data) => {
    const view = new DataView(data), text = (from, to, kind = "latin1") => new TextDecoder(kind).decode(data.slice(from, to));
    for (let at = 8; at + 12 <= data.byteLength; at += 12 + view.getUint32(at)) {
      const kind = text(at + 4, at + 8), [key, ...rest] = text(at + 8, at + 8 + view.getUint32(at), kind === "iTXt" ? "utf-8" : "latin1").split("\0");
      if (kind === "IDAT") break;
      if (["tEXt", "iTXt"].includes(kind) && key === "parameters") return rest.at(-1);
    }
    return "";
  };
  const readSettings = (address) => fetch(address).then((answer) => answer.arrayBuffer()).then(settingsIn).catch(() => "");
  const ZOOMS = [[t("Fit"), 0], ["1:1", 1], ["4×", 4]];

  const open = (node) => {
    const row = rowOf(node), image = make("img"), words = make("p", { className: "small" }), made = make("p", { className: "small num" });
    let at = row.indexOf(node), flipped = false, zoom = 0, settings;
    const button = (text, act, more = {}) => { const made = make("button", { type: "button", className: "own", textContent: text, ...more }); made.addEventListener("click", act); return made; };
    const flipOf = () => row[at].dataset.flip || (kind(row[at]) === "large" && at ? addressOf(row[0]) : "");
    const show = async () => {
      const base = flipOf(), { words: alt = "" } = row[at].dataset;
      flipped &&= Boolean(base);
      image.src = flipped ? base : addressOf(row[at]);
      image.alt = alt || row[at].alt || "";
      words.textContent = `${flipped ? t("Base. ") : ""}${image.alt}`;
      flip.textContent = flipped ? t("Show LoRA") : t("Show base");
      Object.assign(flip, { hidden: !base, title: t("Space") });
      for (const step of [earlier, later]) step.hidden = row.length < 2;
      scale();
      const reading = settings = readSettings(image.src), found = await reading;
      // Another image may be shown by now.
      if (reading !== settings) return;
      useIt.hidden = !found || !window.easel.useSettings;
      made.textContent = found.split("\n").at(-1);
    };
    const scale = () => {
      frame.dataset.scale = zoom;
      image.style.width = zoom ? `${(image.naturalWidth * zoom) / devicePixelRatio}px` : "";
      for (const each of zooms) each.setAttribute("aria-pressed", Number(each.dataset.scale) === zoom);
    };
    const go = (by) => { at = Math.max(0, Math.min(row.length - 1, at + by)); show(); };
    const [back, on] = kind(node) === "large" ? [t("Earlier"), t("Later")] : [t("Previous"), t("Next")];
    const earlier = button(back, () => go(-1), { title: t("Left arrow") }), later = button(on, () => go(1), { title: t("Right arrow") });
    const turn = () => { flipped = !flipped; show(); }, flip = button(t("Show base"), turn);
    const useIt = button(t("Use these settings"), async () => {
      const text = await settings;
      if (!text) return;
      box.close();
      openTab("Preview");
      window.easel.useSettings(text);
    }, { hidden: true });
    const zooms = ZOOMS.map(([text, value]) => button(text, () => { zoom = value; scale(); }, { className: "" }));
    zooms.forEach((each, index) => { each.dataset.scale = ZOOMS[index][1]; });
    const frame = make("div", { className: "lightbox-frame", tabIndex: 0, attributes: { role: "group", "aria-label": t("Image, enlarged") } }, image);
    const bar = make("div", { className: "row" }, earlier, later, make("div", { className: "seg", attributes: { role: "group", "aria-label": t("Size") } }, ...zooms), flip, useIt, button(t("Close"), () => box.close(), { className: "own primary" }));
    const box = window.easel.dialog(t("Image"), frame, words, made, bar);
    box.className = "easel-dialog lightbox";
    image.addEventListener("load", scale);
    image.addEventListener("click", () => { zoom = ZOOMS[(ZOOMS.findIndex(([, value]) => value === zoom) + 1) % ZOOMS.length][1]; scale(); });
    box.addEventListener("keydown", (event) => {
      if (event.altKey || event.ctrlKey || event.metaKey) return;
      const by = { ArrowLeft: -1, ArrowRight: 1, Home: -row.length, End: row.length }[event.key];
      if (by && !(zoom && event.target === frame)) { event.preventDefault(); go(by); }
      else if (event.key === " " && !event.target.matches("button")) { event.preventDefault(); if (!flip.hidden) turn(); }
    });
    show();
    frame.focus();
  };

  // A click on the comparison moves its slider.
  document.addEventListener("dblclick", ({ target }) => {
    const node = target.classList.contains("split") && all("#compare img[data-zoom]").at(-1);
    if (node) open(node);
  });
  document.addEventListener("click", (event) => {
    if (event.ctrlKey || event.metaKey) return;
    const { enlarge } = event.target.closest("[data-enlarge]")?.dataset ?? {};
    // Below the comparison's slider are two images; the upper one is meant.
    const node = enlarge ? all(enlarge).at(-1) : event.target.closest("[data-zoom], [data-large]");
    if (!node || node.closest("dialog.lightbox")) return;
    event.preventDefault();
    open(node);
  });
})();
