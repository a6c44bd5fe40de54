// The browser's half of the window: choosing pictures, writing captions, the slider between base and LoRA.
//
// All of it works by delegation on the document, because the page's pieces of HTML are replaced as runs go on.
(() => {
  const one = (selector, within = document) => within.querySelector(selector);
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const post = async (path, body, options = {}) => {
    const answer = await fetch(`/easel/${path}`, {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), ...options,
    });
    if (!answer.ok) throw new Error(await answer.text());
    return answer.json();
  };
  const press = (id) => document.getElementById(id)?.click();
  const openTab = (name) => all("[role=tab]").find((tab) => tab.textContent.trim() === name)?.click();
  window.easel = { openTab };

  // ---- pictures -----------------------------------------------------------------------------------------------
  let chosen = null;   // the name of the picture shown large
  let filter = "all";
  const saved = new Map();     // captions as they were before typing began
  const waiting = new Map();   // captions typed but not yet saved, by picture

  const thumbs = () => all("#dataset-grid [data-picture]");
  const visible = () => thumbs().filter((thumb) => !thumb.hidden);
  const bare = (thumb) => !thumb.dataset.caption.trim();
  const readOnly = () => Boolean(one("[data-captions-fixed]"));

  const say = (state, text) => {
    const chip = one("#caption-state");
    if (!chip) return;
    chip.dataset.state = state;
    chip.textContent = text;
    chip.className = `chip ${{ saved: text === "Saved" ? "good" : "", saving: "", error: "bad" }[state]}`;
  };

  const showTokens = ({ tokens = null, limit = 75, cut = "" } = {}) => {
    const place = one("#caption-tokens"), rest = one("#caption-cut");
    if (!place) return;
    place.textContent = tokens == null ? "" : `${tokens} of ${limit} tokens`;
    place.classList.toggle("over", Boolean(cut));
    rest.hidden = !cut;
    rest.textContent = cut ? `Not read: ${cut}` : "";
  };

  const countTokens = async (name, text) => {
    try {
      const answer = await post("tokens", { text });
      if (name === chosen) showTokens(answer);
    } catch { showTokens(); }
  };

  const show = (thumb, focus = false) => {
    const panel = one("#picture-detail");
    if (!panel) return;
    const image = one("#picture-big img"), crop = one("#picture-big .crop"), area = one("#caption textarea");
    thumbs().forEach((other) => {
      other.classList.toggle("on", other === thumb);
      other.tabIndex = other === thumb ? 0 : -1;
      other.setAttribute("aria-pressed", other === thumb);
    });
    panel.dataset.none = thumb ? "" : "1";
    all("button", panel).forEach((button) => { button.disabled = !thumb; });
    area.disabled = !thumb;
    if (!thumb) {
      chosen = null;
      image.hidden = crop.hidden = true;
      area.value = "";
      one("#picture-facts").textContent = "Choose a picture to see it large and to write its caption.";
      one("#caption-state").textContent = "";
      showTokens();
      return;
    }
    const leaving = chosen;
    chosen = thumb.dataset.picture;
    if (leaving && leaving !== chosen && waiting.has(leaving)) save(leaving);
    image.hidden = crop.hidden = false;
    if (image.getAttribute("src") !== thumb.dataset.big) image.src = thumb.dataset.big;
    image.alt = chosen;
    const [width, height] = thumb.dataset.ratio.split(" / ").map(Number), frame = one("#picture-big");
    frame.style.aspectRatio = thumb.dataset.ratio;
    frame.style.setProperty("--ratio", width / height);
    crop.style.inset = (([left, top, right, bottom]) => `${top} ${right} ${bottom} ${left}`)(thumb.dataset.crop.split(" "));
    one("#picture-facts").textContent = `${chosen}, ${thumb.dataset.facts}, crop shown`;
    const text = waiting.has(chosen) ? waiting.get(chosen).text : thumb.dataset.caption;
    if (area.value !== text) area.value = text;
    area.readOnly = readOnly();
    one("#leave-out").hidden = readOnly();
    if (!waiting.has(chosen)) say("saved", readOnly() ? "Read only" : text ? "Saved" : "No caption");
    countTokens(chosen, text);
    if (focus) { thumb.focus({ preventScroll: true }); thumb.scrollIntoView({ block: "nearest" }); }
  };

  const applyFilter = () => {
    for (const thumb of thumbs()) {
      thumb.classList.toggle("bare", bare(thumb));
      thumb.hidden = filter === "bare" ? !bare(thumb) : filter === "small" ? thumb.dataset.small !== "1" : false;
    }
    const counts = { all: thumbs().length, bare: thumbs().filter(bare).length, small: all("#dataset-grid [data-small='1']").length };
    for (const button of all("[data-filter]")) {
      button.setAttribute("aria-pressed", button.dataset.filter === filter);
      const number = one("b", button), text = String(counts[button.dataset.filter]);
      if (number.textContent !== text) number.textContent = text;
    }
  };

  const move = (by) => {
    const shown = visible(), at = shown.findIndex((thumb) => thumb.dataset.picture === chosen);
    const next = shown[Math.min(shown.length - 1, Math.max(0, at + by))];
    if (next) show(next, true);
  };

  const columns = () => {
    const shown = visible();
    return Math.max(1, shown.filter((thumb) => thumb.offsetTop === shown[0].offsetTop).length);
  };

  // ---- captions: saved as they are typed, the picture's name travelling with the text --------------------------------
  const save = async (name, options = {}) => {
    const entry = waiting.get(name);
    if (!entry) return;
    clearTimeout(entry.timer);
    const { text } = entry;
    const before = (saved.get(name) ?? text).trim();
    saved.set(name, text);
    try {
      const answer = await post("caption", { picture: name, text }, options);
      if (answer.problem) throw new Error(answer.problem);
      if (waiting.get(name) === entry) waiting.delete(name);
      if (name === chosen && !waiting.has(name)) { say("saved", "Saved"); showTokens(answer); }
      // The counts below the grid change only when a caption appears or goes.
      if (!before !== !text.trim()) press("refresh");
    } catch (error) {
      if (name === chosen) say("error", `Not saved: ${error.message || "the window does not answer"}`);
    }
  };

  const typed = (area) => {
    if (!chosen || area.readOnly) return;
    const name = chosen, text = area.value;
    clearTimeout(waiting.get(name)?.timer);
    waiting.set(name, { text, timer: setTimeout(() => save(name), 300) });
    say("saving", "Saving");
    const thumb = thumbs().find((other) => other.dataset.picture === name);
    if (!saved.has(name)) saved.set(name, thumb?.dataset.caption ?? "");
    if (thumb) thumb.dataset.caption = text;
    applyFilter();
  };
  addEventListener("pagehide", () => { for (const name of waiting.keys()) save(name, { keepalive: true }); });

  const leaveOut = async () => {
    const name = chosen;
    const answer = await post("leave-out", { picture: name });
    if (answer.problem) return say("error", answer.problem);
    const shown = visible(), at = shown.findIndex((thumb) => thumb.dataset.picture === name);
    chosen = (shown[at + 1] || shown[at - 1])?.dataset.picture ?? null;
    press("refresh");
  };

  // ---- base against LoRA ----------------------------------------------------------------------------------------
  const split = (value) => document.documentElement.style.setProperty("--split", `${value}%`);
  const markWorking = () => {
    const state = one("#preview-state");
    if (state) { state.dataset.state = "working"; state.className = "small num"; state.textContent = "Drawing"; }
  };

  // A tab's contents come into being when it is first opened.
  const drawFirst = (tries = 40) => {
    const ready = one("#generate") && one("#preview-state") && one("#prompt textarea")?.value;
    if (!ready && tries) return setTimeout(() => drawFirst(tries - 1), 100);
    if (!one("#preview-base")) press("generate");
  };

  // ---- one listener a kind of event -----------------------------------------------------------------------------
  document.addEventListener("click", (event) => {
    const target = event.target.closest("button, a, [data-picture]");
    if (!target) return;
    const data = target.dataset;
    if (data.picture !== undefined) show(target, true);
    else if (data.filter) { filter = data.filter; applyFilter(); }
    else if (data.step) move(Number(data.step));
    else if (target.id === "leave-out") leaveOut();
    else if (target.id === "generate") markWorking();
    else if (data.press) press(data.press);
    else if (data.tab) openTab(data.tab);
    else if (data.showPreview !== undefined) { openTab("Preview"); drawFirst(); }
    else if (data.runShow) post("run", { do: "show", run: data.runShow }).then(() => press("refresh"));
    else if (data.runResume) post("run", { do: "resume", run: data.runResume }).then(() => press("refresh"));
    else if (data.copy !== undefined) navigator.clipboard.writeText(data.copy).then(() => { target.textContent = "Copied"; });
    else if (data.themeSwitch !== undefined) {
      const dark = document.body.classList.toggle("dark");
      localStorage.setItem("easel-theme", dark ? "dark" : "light");
    }
  });

  document.addEventListener("input", (event) => {
    if (event.target.closest("#caption")) typed(event.target);
    else if (event.target.classList.contains("split")) split(event.target.value);
    else if (event.target.closest("#strength") && one("#preview-result")) markWorking();
  });

  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); press("generate"); return; }
    if (!event.target.closest("#dataset-grid")) return;
    const by = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns(), ArrowUp: -columns(), Home: -1e6, End: 1e6 }[event.key];
    if (by !== undefined) { event.preventDefault(); move(by); }
  });

  // ---- what must follow when Gradio replaces a piece ----------------------------------------------------------------
  let lastNames = null, lastMeter = null;
  const settle = () => {
    const title = one("[data-page-title]")?.dataset.pageTitle;
    if (title && document.title !== title) document.title = title;
    // Gradio patches a piece in place: nodes stay the same, what was added to them here may be gone.
    const names = one("#picture-detail") ? thumbs().map((thumb) => thumb.dataset.picture).join("|") : null;
    const mine = thumbs().find((thumb) => thumb.dataset.picture === chosen);
    if (names !== null && (names !== lastNames || (mine && !mine.classList.contains("on")))) {
      lastNames = names;
      for (const thumb of thumbs()) if (waiting.has(thumb.dataset.picture)) thumb.dataset.caption = waiting.get(thumb.dataset.picture).text;
      show(mine || thumbs()[0] || null);
    }
    if (names) applyFilter();
    // Another base, limit or trigger word counts in another way.
    const meter = one("[data-meter]")?.dataset.meter ?? null;
    if (meter !== lastMeter) {
      lastMeter = meter;
      if (chosen && one("#caption textarea")) countTokens(chosen, one("#caption textarea").value);
    }
    const slider = one("input.split"), place = parseFloat(document.documentElement.style.getPropertyValue("--split"));
    if (slider && !Number.isNaN(place) && document.activeElement !== slider) slider.value = place;
    // A disabled button says why: the reason stands in the page, the pointer finds it too.
    const start = one("#start"), why = one("#start-why");
    if (start) start.title = start.disabled && why ? why.textContent : "";
  };
  let asked = false;
  new MutationObserver(() => {
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => { asked = false; settle(); });
  }).observe(document.documentElement, { childList: true, subtree: true, attributes: true, attributeFilter: ["data-page-title", "data-meter", "disabled"] });

  const theme = localStorage.getItem("easel-theme");
  if (theme) document.body.classList.toggle("dark", theme === "dark");
})();
