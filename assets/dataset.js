// The Dataset tab's grid, large view and caption editor, rendered from /easel/dataset.
//
// Names and captions are untrusted: they are inserted as text, never as HTML.
(() => {
  const { one, all, get, post, press, make } = window.easel;
  const MOST_STEPS = 200;
  const EMPTY = {
    none: ["No pictures yet", "15 to 30 sharp pictures of one thing or one style are plenty. Write beside each what is in it; what you do not write is what gets learned."],
    filter: ["Nothing matches", "No picture fits this filter. Choose All, or empty the search field."],
  };

  let shelf = { mark: "", pictures: [], left_out: [], fixed: false };
  let chosen = null;            // the name of the picture shown large
  let several = new Set();      // the names that an action is for, where it is more than one
  let filter = "all";
  let twins = new Set();        // told by the check
  let doubts = new Set();       // told by the base, and by the last run
  let cells = new Map();        // name to button
  const edits = new Map();      // name to { past, future, base }: captions that Ctrl+Z goes back to
  const waiting = new Map();    // captions typed but not yet saved, by picture

  const pictures = () => (filter === "out" ? shelf.left_out : shelf.pictures);
  const named = (name) => pictures().find((picture) => picture.name === name);
  const kind = () => (filter === "out" ? "left-out" : "dataset");
  const bare = (picture) => !picture.caption.trim();
  const grid = () => one("#dataset-grid [role=listbox]");
  const shown = () => pictures().filter((picture) => cells.get(picture.name) && !cells.get(picture.name).hidden);
  const acted = () => (several.size > 1 ? [...several] : chosen ? [chosen] : []);

  // ---- the grid -------------------------------------------------------------------------------------------------
  // Native lazy loading requests every image that was ever scrolled past, and the visible ones wait behind them.
  const near = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      const image = target.firstChild;
      if (isIntersecting) image.src = image.dataset.src;
      else if (!image.complete) image.removeAttribute("src");
    }
  }, { rootMargin: "250px 0px" });

  const thumb = (picture) => {
    const image = make("img", { decoding: "async", alt: "" });
    image.dataset.src = `/easel/thumb/${kind()}/${picture.url}`;
    const cell = make("button", { type: "button", className: "thumb", tabIndex: -1 }, image, make("em"));
    cell.setAttribute("role", "option");
    cell.dataset.picture = picture.name;
    near.observe(cell);
    return cell;
  };

  const describe = (picture) => {
    const cell = cells.get(picture.name), marks = [];
    if (bare(picture)) marks.push("no caption");
    if (picture.held) marks.push("held out");
    if (picture.small) marks.push("small");
    if (twins.has(picture.name)) marks.push("twin");
    if (doubts.has(picture.name)) marks.unshift("in doubt");
    // Two chips fit into one line of the smallest cell.
    cell.lastChild.textContent = marks.slice(0, 2).join(", ").length < 17 ? marks.slice(0, 2).join(", ") : marks[0];
    cell.lastChild.hidden = !marks.length;
    cell.title = picture.name;
    cell.setAttribute("aria-label", [picture.name, ...marks].join(", "));
  };

  const draw = () => {
    const place = grid();
    if (!place) return false;
    const old = cells;
    cells = new Map();
    for (const picture of pictures()) {
      const before = old.get(picture.name);
      const same = before?.isConnected && before.firstChild.dataset.src === `/easel/thumb/${kind()}/${picture.url}`;
      if (before && !same) near.unobserve(before);
      cells.set(picture.name, same ? before : thumb(picture));
      describe(picture);
    }
    place.replaceChildren(...cells.values());
    place.dataset.mark = shelf.mark;
    return true;
  };

  const fits = {
    all: () => true, bare, small: (p) => p.small, twins: (p) => twins.has(p.name), held: (p) => p.held, out: () => true,
    doubt: (p) => doubts.has(p.name),
  };
  const applyFilter = () => {
    if (!grid()) return;
    const words = (one("#dataset-search")?.value ?? "").trim().toLowerCase();
    for (const picture of pictures()) {
      const found = !words || picture.name.toLowerCase().includes(words) || picture.caption.toLowerCase().includes(words);
      // An image whose caption is being edited stays visible even if it no longer matches.
      const written = picture.name === chosen && document.activeElement === one("#caption textarea");
      cells.get(picture.name).hidden = !(found && fits[filter](picture)) && !written;
    }
    for (const button of all("[data-filter]")) {
      const which = button.dataset.filter;
      button.setAttribute("aria-pressed", which === filter);
      const count = which === "out" ? shelf.left_out.length : shelf.pictures.filter(fits[which]).length;
      one("b", button).textContent = String(count);
      // Empty filters are hidden, except for the two most used.
      button.hidden = !count && !["all", "bare"].includes(which) && which !== filter;
    }
    const nothing = !shown().length, [title, text] = EMPTY[shelf.pictures.length || shelf.left_out.length ? "filter" : "none"];
    one("#grid-empty").hidden = !nothing;
    if (nothing) one("#grid-empty").replaceChildren(make("h3", { textContent: title }), make("p", { className: "small", textContent: text }));
    one("#grid-keys").hidden = nothing;
    const any = shelf.pictures.length + shelf.left_out.length > 0;
    one("#dataset-filters").hidden = !any;
    one("#dataset-tools").hidden = one("#trigger-to-all").hidden = !shelf.pictures.length || shelf.fixed;
    document.dispatchEvent(new CustomEvent("easel-shelf"));
  };

  // ---- the large view -------------------------------------------------------------------------------------------
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

  let counting = 0;
  const countTokens = async (name, text) => {
    const number = ++counting, answer = await post("tokens", { text }).catch(() => undefined);
    if (name === chosen && number === counting) showTokens(answer);
  };

  const facts = (picture) => {
    const [width, height] = picture.size, [wide, high] = picture.bucket;
    const more = picture.repeats > 1 ? `, ${picture.repeats} repeats` : "";
    const { shares, gains } = window.easel, share = shares?.get(picture.name), gain = gains?.get(picture.name);
    const steps = share === undefined ? "" : `, ${(100 * share).toFixed(1)}% of the steps`;
    const learned = gain ? `, ${Math.round(100 * gain.learned)}% of its loss gained by the last run` : "";
    return `${picture.name}, ${width} × ${height}, trained at ${wide} × ${high}${more}${steps}${learned}, crop shown`;
  };

  const showNothing = () => {
    chosen = null;
    one("#picture-big img").hidden = one("#picture-big .crop").hidden = true;
    one("#caption textarea").value = "";
    one("#picture-facts").textContent = "Choose a picture to see it large and to write its caption.";
    one("#caption-state").textContent = "";
    one("#caption-undo").hidden = true;
    showTokens();
  };

  const showButtons = () => {
    const picture = named(chosen), out = filter === "out", count = several.size > 1 ? ` ${several.size}` : "";
    const leave = one("#leave-out"), hold = one("#hold-out");
    leave.textContent = `${out ? "Take back" : "Leave out"}${count}`;
    leave.title = out ? "Puts it back among the pictures" : "Moves it aside within the project; Left out shows it";
    hold.textContent = `${picture?.held ? "Train on" : "Hold out"}${count}`;
    leave.hidden = shelf.fixed;
    hold.hidden = shelf.fixed || out;
    for (const [name, cell] of cells) {
      const on = several.size > 1 ? several.has(name) : name === chosen;
      cell.classList.toggle("on", name === chosen);
      cell.classList.toggle("too", on && name !== chosen);
      cell.setAttribute("aria-selected", on);
      cell.tabIndex = name === chosen ? 0 : -1;
    }
  };

  const show = (name, focus = false) => {
    const panel = one("#picture-detail");
    if (!panel) return;
    const picture = named(name), area = one("#caption textarea"), leaving = chosen;
    panel.dataset.none = picture ? "" : "1";
    for (const button of all("button", panel)) {
      button.disabled = !picture;
      button.dataset.tip ??= button.title;
      button.title = picture ? button.dataset.tip : "No picture is chosen.";
    }
    area.disabled = !picture;
    if (leaving && leaving !== name && waiting.has(leaving)) save(leaving);
    if (!picture) { showNothing(); showButtons(); return; }
    chosen = name;
    const image = one("#picture-big img"), crop = one("#picture-big .crop"), frame = one("#picture-big");
    image.hidden = crop.hidden = false;
    const address = `/easel/picture/${kind()}/${picture.url}`;
    if (image.getAttribute("src") !== address) image.src = address;
    image.alt = name;
    frame.style.aspectRatio = picture.size.join(" / ");
    frame.style.setProperty("--ratio", picture.size[0] / picture.size[1]);
    const [left, top, right, bottom] = picture.crop;
    crop.style.inset = `${top}% ${right}% ${bottom}% ${left}%`;
    one("#picture-facts").textContent = facts(picture);
    const text = waiting.get(name)?.text ?? picture.caption, fixed = shelf.fixed || filter === "out";
    if (area.value !== text) area.value = text;
    area.readOnly = fixed;
    one("#caption-undo").hidden = fixed || !edits.get(name)?.past.length;
    if (!waiting.has(name)) say("saved", fixed ? "Read only" : text ? "Saved" : "No caption");
    countTokens(name, text);
    showButtons();
    if (focus) { cells.get(name).focus({ preventScroll: true }); cells.get(name).scrollIntoView({ block: "nearest" }); }
  };

  // ---- choosing -------------------------------------------------------------------------------------------------
  const choose = (name, { toggle = false, range = false, focus = true } = {}) => {
    if (range && chosen) {
      const names = shown().map((p) => p.name), [a, b] = [names.indexOf(chosen), names.indexOf(name)].sort((x, y) => x - y);
      if (!several.size) several.add(chosen);
      names.slice(a, b + 1).forEach((other) => several.add(other));
    } else if (toggle) {
      if (!several.size && chosen && chosen !== name) several.add(chosen);
      if (!several.delete(name)) several.add(name);
    } else several = new Set();
    show(name, focus);
    document.dispatchEvent(new CustomEvent("easel-shelf"));
  };

  const move = (by, { range = false, focus = true } = {}) => {
    const names = shown().map((picture) => picture.name), at = names.indexOf(chosen);
    const next = names[Math.min(names.length - 1, Math.max(0, at + by))];
    if (next !== undefined) choose(next, { range, focus });
  };

  const columns = () => Math.max(1, getComputedStyle(grid()).gridTemplateColumns.split(" ").length);

  // ---- captions: saved while typing, together with the image's name --------------------------------
  // One request at a time: of two in flight, the older text might arrive last.
  let sent = Promise.resolve();
  const send = (body, options) => {
    const answer = options.keepalive ? post("caption", body, options) : sent.then(() => post("caption", body, options));
    sent = answer.catch(() => {});
    return answer;
  };

  const save = async (name, options = {}) => {
    const entry = waiting.get(name);
    if (!entry) return;
    clearTimeout(entry.timer);
    const { text } = entry, history = edits.get(name);
    if (history && history.base !== text) {
      if (!entry.goingBack) { history.past.push(history.base); history.past.splice(0, history.past.length - MOST_STEPS); history.future = []; }
      history.base = text;
    }
    const before = entry.before;
    try {
      const answer = await send({ picture: name, text }, options);
      if (answer.problem) throw new Error(answer.problem);
      saves += 1;
      if (waiting.get(name) === entry) waiting.delete(name);
      // Nothing else changed meanwhile, so the images need not be reloaded.
      const [revision, ...rest] = shelf.mark.split(" ");
      if (revision === String(answer.before)) shelf.mark = [answer.revision, ...rest].join(" ");
      if (name === chosen && !waiting.has(name)) { say("saved", "Saved"); showTokens(answer); one("#caption-undo").hidden = !history?.past.length; }
      // The counts below the grid change only when a caption is added or removed.
      if (!before.trim() !== !text.trim()) press("refresh");
    } catch (error) {
      if (name === chosen) say("error", `Not saved: ${error.message || "the window does not answer"}`);
    }
  };

  const write = (name, text, goingBack = false) => {
    const picture = named(name), entry = waiting.get(name);
    if (!picture) return;
    clearTimeout(entry?.timer);
    if (!edits.has(name)) edits.set(name, { past: [], future: [], base: picture.caption });
    waiting.set(name, { text, goingBack, before: entry?.before ?? picture.caption, timer: setTimeout(() => save(name), 300) });
    if (name === chosen) say("saving", "Saving");
    picture.caption = text;
    describe(picture);
    // The image stays visible until another is selected, even if it no longer matches the filter.
    for (const button of all("[data-filter]")) if (button.dataset.filter === "bare") one("b", button).textContent = String(shelf.pictures.filter(bare).length);
  };

  const goBack = (forward = false) => {
    const name = chosen;
    if (waiting.has(name)) save(name);
    const history = edits.get(name), from = forward ? history?.future : history?.past;
    if (!from?.length) return;
    const text = from.pop();
    (forward ? history.past : history.future).push(history.base);
    history.base = text;
    one("#caption textarea").value = text;
    write(name, text, true);
    one("#caption-undo").hidden = !history.past.length;
  };

  addEventListener("pagehide", () => { for (const name of waiting.keys()) save(name, { keepalive: true }); });

  // ---- actions on images ---------------------------------------------------------------------------------
  const act = async (path, body) => {
    try {
      const answer = await post(path, body);
      if (answer.problem) { say("error", answer.problem); return null; }
      return answer;
    } catch (error) { say("error", error.message || "The window does not answer"); return null; }
  };

  // One at a time: the target of the next key press is known once the previous image is gone.
  let leaving = Promise.resolve();
  const leaveOut = (names) => { leaving = leaving.then(() => leaveNow(names ?? acted())).catch((error) => say("error", error.message)); return leaving; };
  const leaveNow = async (names) => {
    if (!names.length || shelf.fixed) return;
    await Promise.all(names.map((name) => save(name)));
    if (!(await act(filter === "out" ? "take-back" : "leave-out", { pictures: names }))) return;
    several = new Set();
    await load();
    press("refresh");
  };

  const holdOut = async () => {
    const names = acted(), on = !named(chosen)?.held;
    if (!names.length || shelf.fixed || filter === "out") return;
    if (!(await act("hold-out", { pictures: names, on }))) return;
    await load();
    press("refresh");
  };

  // ---- loading the images, and reloading after changes ------------------------------------------------------
  let loading = null, again = false, saves = 0, asked = null;
  const load = async () => {
    if (loading) { again = true; return loading; }
    loading = (async () => {
      do {
        again = false;
        const saved = saves, answer = await get("dataset");
        // A caption was saved meanwhile: the response may be older.
        if (saved !== saves) { again = true; continue; }
        if (answer.problem) throw new Error(answer.problem);
        shelf = answer;
        for (const picture of shelf.pictures) {
          const entry = waiting.get(picture.name), history = edits.get(picture.name);
          if (entry) picture.caption = entry.text;
          // Changed by a bulk edit or another page: undo still goes back to the earlier text.
          else if (history && history.base !== picture.caption) { history.past.push(history.base); history.base = picture.caption; }
        }
        if (!shelf.left_out.length && filter === "out") filter = "all";
        render();
      } while (again);
    })().catch((error) => {
      say("error", error instanceof TypeError ? "The window does not answer" : error.message);
      setTimeout(load, 3000);
    }).finally(() => { loading = null; });
    return loading;
  };

  const render = () => {
    const before = [...cells].filter(([, cell]) => !cell.hidden).map(([name]) => name), at = before.indexOf(chosen);
    // A removed cell loses the keyboard focus, even if it is inserted again at once.
    const focused = grid()?.contains(document.activeElement);
    if (!draw()) return;
    several = new Set([...several].filter((name) => cells.has(name)));
    applyFilter();
    const typing = document.activeElement === one("#caption textarea") && waiting.has(chosen);
    if (typing) return;
    const left = new Set(shown().map((picture) => picture.name));
    const neighbour = [...before.slice(at + 1), ...before.slice(0, Math.max(0, at)).reverse()].find((name) => left.has(name));
    show(named(chosen) ? chosen : neighbour ?? [...left][0] ?? null);
    if (focused) cells.get(chosen)?.focus({ preventScroll: true });
  };

  let meter = null;
  window.easel.settling.push(() => {
    const mark = one("#dataset-mark");
    if (!mark || !grid()) return;
    window.easel.project ??= mark.dataset.project;
    // Another page opened another project: everything here belongs to the old one.
    if (window.easel.project !== mark.dataset.project) { location.reload(); return; }
    if (mark.dataset.mark !== shelf.mark && mark.dataset.mark !== asked) { asked = mark.dataset.mark; load(); }
    // Gradio may have rebuilt the tab.
    else if (grid().dataset.mark === undefined && shelf.mark) render();
    if (mark.dataset.meter !== meter) {
      meter = mark.dataset.meter;
      if (chosen && one("#caption textarea")) countTokens(chosen, one("#caption textarea").value);
    }
  });

  // ---- one listener per event type -------------------------------------------------------------------------------
  document.addEventListener("click", (event) => {
    const target = event.target.closest("button, [data-picture]");
    if (!target) return;
    const data = target.dataset;
    if (data.picture !== undefined && target.classList.contains("thumb")) choose(data.picture, { toggle: event.ctrlKey || event.metaKey, range: event.shiftKey });
    else if (data.filter) {
      const other = (data.filter === "out") !== (filter === "out");
      filter = data.filter;
      several = new Set();
      if (other) render(); else { applyFilter(); if (!shown().some((p) => p.name === chosen)) show(shown()[0]?.name ?? null); }
    } else if (data.step) move(Number(data.step), { focus: false });
    else if (target.id === "leave-out") leaveOut();
    else if (target.id === "hold-out") holdOut();
    else if (target.id === "caption-undo") goBack();
  });

  document.addEventListener("input", (event) => {
    if (event.target.closest("#caption") && chosen && !event.target.readOnly) write(chosen, event.target.value);
    else if (event.target.id === "dataset-search") applyFilter();
  });

  const inCaption = (event) => {
    const area = event.target, key = event.key.toLowerCase();
    const control = event.ctrlKey || event.metaKey;
    if (control && (key === "z" || key === "y")) { event.preventDefault(); if (!area.readOnly) goBack(key === "y" || event.shiftKey); }
    else if (key === "pagedown" || key === "pageup") { event.preventDefault(); move(key === "pagedown" ? 1 : -1, { focus: false }); }
    else if (key === "escape") { event.preventDefault(); cells.get(chosen)?.focus(); }
  };

  const inGrid = (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns(), ArrowUp: -columns(), Home: -1e6, End: 1e6 }[event.key];
    const control = event.ctrlKey || event.metaKey;
    if (by !== undefined) { event.preventDefault(); move(by, { range: event.shiftKey }); }
    else if (event.key === " ") { event.preventDefault(); choose(chosen, { toggle: true }); }
    else if (event.key === "Enter" && !control) { event.preventDefault(); one("#caption textarea").focus(); }
    else if (event.key === "Delete") { event.preventDefault(); leaveOut(); }
    else if (event.key === "Escape") { several = new Set(); showButtons(); }
    else if (control && event.key.toLowerCase() === "a") { event.preventDefault(); several = new Set(shown().map((p) => p.name)); showButtons(); document.dispatchEvent(new CustomEvent("easel-shelf")); }
  };

  document.addEventListener("keydown", (event) => {
    if (event.target.closest?.("#caption")) inCaption(event);
    else if (event.target.closest?.("#dataset-grid .thumb")) inGrid(event);
  });

  // API for the other scripts.
  Object.assign(window.easel, {
    load, leaveOut,
    shelf: () => shelf,
    waitingSaves: () => Promise.all([...waiting.keys()].map((name) => save(name))),
    open: (name) => { if (filter !== "all") { filter = "all"; render(); } choose(name); },
    // The images that a bulk edit applies to, null for all.
    scope: () => (several.size > 1 ? [...several] : shown().length < shelf.pictures.length ? shown().map((p) => p.name) : null),
    setDoubts: (names) => {
      window.easel.tellAgain();
      if (names.size === doubts.size && [...names].every((name) => doubts.has(name))) return;
      doubts = names;
      for (const picture of pictures()) if (cells.has(picture.name)) describe(picture);
      applyFilter();
    },
    // The facts of the shown image have changed.
    tellAgain: () => { if (named(chosen)) one("#picture-facts").textContent = facts(named(chosen)); },
    setTwins: (names) => { twins = new Set(names); for (const picture of pictures()) describe(picture); applyFilter(); },
  });
})();
