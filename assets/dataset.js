// The Dataset tab's grid, large view and caption editor, rendered from /easel/dataset.
//
// Names and captions are untrusted: they are inserted as text, never as HTML.
(() => {
  const { one, all, get, post, make, plural, t, toast, fill, refocus } = window.easel;
  const MOST_STEPS = 200, MOST_CHIPS = 100, KEPT = "easel-picture";
  const SIDE = 112, GAP = 10, EDGE = 4;  // of a cell at least, between two, and around all, in pixels
  const BEYOND = 800, SOON = 300;  // pixels above and below the window: cells exist, and the next ones are made
  const EMPTY = {
    none: [t("No images yet"), t("Take images of one thing or one style. Describe each image in its caption: the LoRA learns what captions leave out.")],
    filter: [t("Nothing matches"), t("No image fits this filter. Choose All, or clear the search field.")],
  };

  let shelf = { mark: "", pictures: [], left_out: [], fixed: false };
  let chosen = null;            // the name of the image shown large, which arrow keys move
  let picked = new Set();       // the names that are selected; actions are for these, or for the chosen one
  let anchor = { name: null, kept: new Set() };  // where a range begins, and the selection before it
  let filter = "all";
  let twins = new Set(); // from the check
  let doubts = new Set(); // from the base, and from the last run
  let seen = [];                // the images that the filter lets through, in order
  let places = new Map();       // where in that order each of them is, by name
  let cells = new Map();        // name to element, of the images in view, some beyond, and the chosen one
  let columns = 1, wide = 0;    // of the grid: how many, and its width when they were counted
  const edits = new Map();      // name to { past, future, base }: captions that Ctrl+Z goes back to
  const waiting = new Map();    // captions typed but not yet saved, by image

  const pictures = () => (filter === "out" ? shelf.left_out : shelf.pictures);
  let byName = new Map();       // of the images that the grid shows
  const named = (name) => byName.get(name);
  const kind = () => (filter === "out" ? "left-out" : "dataset");
  const bare = (picture) => !picture.caption.trim();
  const grid = () => one("#dataset-grid [role=listbox]");
  const acted = () => (picked.size ? [...picked] : chosen ? [chosen] : []);
  // Where the keyboard enters the grid: at the chosen image, or where the filter hides it at the first.
  const tabStop = () => (places.has(chosen) ? chosen : seen[0]?.name);

  // ---- the grid -------------------------------------------------------------------------------------------------
  const thumb = (picture, src) => make("div", { className: "thumb", title: picture.name, draggable: true, data: { picture: picture.name }, attributes: { role: "option" } },
    make("img", { decoding: "async", alt: "", draggable: false, src }), make("em"));

  const describe = (picture) => {
    const { name } = picture, cell = cells.get(name), at = places.get(name), marks = [];
    if (!cell) return;
    if (bare(picture)) marks.push(t("uncaptioned"));
    if (picture.held) marks.push(t("validation"));
    if (picture.small) marks.push(t("small"));
    if (twins.has(name)) marks.push(t("duplicate"));
    if (doubts.has(name)) marks.unshift(t("in doubt"));
    // Only differences are written: setting the same value costs the browser as much as a change.
    const looks = [name === chosen, name === tabStop(), picked.has(name), at, columns, wide, seen.length, ...marks].join();
    if (cell.looks === looks) return;
    cell.looks = looks;
    const [on, too] = [name === chosen, picked.has(name)], pitch = (wide + GAP) / columns;
    Object.assign(cell, { tabIndex: name === tabStop() ? 0 : -1, ariaSelected: too, ariaPosInSet: at + 1, ariaSetSize: seen.length, ariaLabel: [name, ...marks].join(", ") });
    Object.assign(cell.style, { width: `${pitch - GAP}px`, left: `${EDGE + (at % columns) * pitch}px`, top: `${EDGE + Math.floor(at / columns) * pitch}px` });
    cell.classList.toggle("on", on);
    cell.classList.toggle("too", too);
    // Two chips fit into one line of the smallest cell.
    cell.lastChild.textContent = marks.slice(0, 2).join(", ").length < 17 ? marks.slice(0, 2).join(", ") : marks[0];
    cell.lastChild.hidden = !marks.length;
  };

  // Only the cells in view and some beyond exist. Two strips replace the others above and below: more cells are
  // made as soon as one of them comes near, because of scrolling or of what unfolds above.
  const strips = [make("i"), make("i")];
  const near = new IntersectionObserver((entries) => { if (entries.some((one) => one.isIntersecting)) lay(); }, { rootMargin: `${SOON}px 0px` });
  const resized = new ResizeObserver(() => { if (grid() && grid().clientWidth !== wide + 2 * EDGE) lay(); });
  const lay = () => {
    const place = grid();
    if (!place) return;
    resized.observe(place);
    place.hidden = !seen.length;
    if (seen.length && !place.clientWidth) return;  // the tab is hidden
    wide = place.clientWidth - 2 * EDGE;
    columns = Math.max(1, Math.floor((wide + GAP) / (SIDE + GAP)));
    const pitch = (wide + GAP) / columns, rows = Math.ceil(seen.length / columns), top = place.getBoundingClientRect().top + EDGE;
    const [first, last] = [-BEYOND, innerHeight + BEYOND + pitch].map((y) => Math.min(rows, Math.max(0, Math.floor((y - top) / pitch))));
    const now = seen.slice(first * columns, last * columns), at = places.get(tabStop()), old = cells;
    const wanted = at < first * columns ? [seen[at], ...now] : at >= last * columns ? [...now, seen[at]] : now;
    cells = new Map();
    for (const picture of wanted) {
      const src = `/easel/thumb/${kind()}/${picture.url}`, before = old.get(picture.name);
      cells.set(picture.name, before?.firstChild.getAttribute("src") === src ? before : thumb(picture, src));
    }
    for (const [name, cell] of old) if (cells.get(name) !== cell) {
      // Images that are not shown any more would hold up those that are.
      if (!cell.firstChild.complete) cell.firstChild.removeAttribute("src");
      cell.remove();
    }
    let next = place.firstElementChild;
    for (const cell of [...strips, ...cells.values()]) if (cell === next) next = next.nextElementSibling; else place.insertBefore(cell, next);
    wanted.forEach(describe);
    place.style.height = `${rows * pitch - GAP + 2 * EDGE}px`;
    for (const [strip, from, to] of [[strips[0], 0, first], [strips[1], last, rows]]) {
      strip.hidden = from === to;
      Object.assign(strip.style, { top: `${from * pitch}px`, height: `${(to - from) * pitch}px` });
      // Observed again, each is checked once more.
      near.unobserve(strip);
      near.observe(strip);
    }
  };

  const fits = {
    all: () => true, bare, small: (p) => p.small, twins: (p) => twins.has(p.name), held: (p) => p.held, out: () => true,
    doubt: (p) => doubts.has(p.name),
  };
  const applyFilter = () => {
    if (!grid()) return;
    const words = (one("#dataset-search")?.value ?? "").trim().toLowerCase();
    // An image whose caption is being edited stays visible even if it no longer matches.
    const written = document.activeElement === one("#caption textarea") ? chosen : null;
    const found = (picture) => !words || picture.name.toLowerCase().includes(words) || picture.caption.toLowerCase().includes(words);
    seen = pictures().filter((picture) => (fits[filter](picture) && found(picture)) || picture.name === written);
    places = new Map(seen.map((picture, at) => [picture.name, at]));
    lay();
    for (const button of all("[data-filter]")) {
      const which = button.dataset.filter;
      button.setAttribute("aria-pressed", which === filter);
      const count = which === "out" ? shelf.left_out.length : shelf.pictures.filter(fits[which]).length;
      one("b", button).textContent = String(count);
      // Empty filters are hidden, except for the two most used.
      button.hidden = !count && !["all", "bare"].includes(which) && which !== filter;
    }
    const nothing = !seen.length, [title, text] = EMPTY[shelf.pictures.length || shelf.left_out.length ? "filter" : "none"];
    one("#grid-empty").hidden = !nothing;
    if (nothing) one("#grid-empty").replaceChildren(make("h3", { textContent: title }), make("p", { className: "small", textContent: text }));
    const any = shelf.pictures.length + shelf.left_out.length > 0;
    one("#dataset-filters").hidden = !any;
    one("#dataset-tools").hidden = !shelf.pictures.length;
    one("#bulk").hidden = one("#check").hidden = one("#concepts").hidden = one("#trigger-to-all").hidden = !shelf.pictures.length || shelf.fixed;
    one("#dataset-drop").dataset.some = any;
    one("#dataset-title").textContent = any ? plural(shelf.pictures.length, "image") : t("Drop images, a folder or a .zip");
    showSelection();
    document.dispatchEvent(new CustomEvent("easel-shelf"));
  };

  const chooseFilter = (name) => {
    const other = (name === "out") !== (filter === "out");
    filter = name;
    forget();
    if (other) render(); else { applyFilter(); if (!places.has(chosen)) show(seen[0]?.name ?? null); }
  };

  // ---- the large view -------------------------------------------------------------------------------------------
  const say = (state, text) => {
    const chip = one("#caption-state");
    if (!chip) return;
    chip.dataset.state = state;
    chip.textContent = text;
    chip.className = `chip ${{ saved: text === t("Saved") ? "good" : "", saving: "", error: "bad" }[state]}`;
  };

  const showTokens = ({ tokens = null, limit = 75, cut = "" } = {}) => {
    const place = one("#caption-tokens"), rest = one("#caption-cut");
    if (!place) return;
    place.textContent = tokens == null ? "" : t("{tokens} of {limit} tokens", { tokens, limit });
    place.classList.toggle("over", Boolean(cut));
    rest.hidden = !cut;
    rest.textContent = rest.title = cut ? t("Not read: {cut}", { cut }) : "";
  };

  let counting = 0;
  const countTokens = async (name, text) => {
    const number = ++counting, answer = await post("tokens", { text, picture: name });
    if (name === chosen && number === counting) showTokens(answer);
  };

  const facts = (picture) => {
    const [width, height] = picture.size, [[wide, high], ...others] = picture.buckets;
    const also = others.length ? t(" and {sizes}", { sizes: others.map((size) => size.join(" × ")).join(", ") }) : "";
    const more = picture.repeats > 1 ? t(", {count} repeats", { count: picture.repeats }) : "";
    const { shares, gains } = window.easel, share = shares?.get(picture.name), gain = gains?.get(picture.name);
    const steps = share === undefined ? "" : t(", {share}% of the steps", { share: (100 * share).toFixed(1) });
    const learned = gain ? t(", {share}% of its loss gained by the last run", { share: Math.round(100 * gain.learned) }) : "";
    const cropped = String(picture.whole) === String(picture.size) ? "" : t(" of {whole}", { whole: picture.whole.join(" × ") }), shown = picture.mask ? t("crop and mask") : t("crop");
    const [, , , , x, y] = picture.box ?? [], focus = x === undefined ? "" : t(", focus at {x}% across and {y}% down", { x: Math.round(100 * x), y: Math.round(100 * y) });
    return t("{width} × {height}{cropped}, trained at {wide} × {high}{more}, {shown} shown", { width, height, cropped, wide, high, more: also + focus + more + steps + learned, shown });
  };

  const showNothing = () => {
    chosen = null;
    one("#picture-big img").hidden = one("#picture-big .crop").hidden = true;
    showMask();
    one("#caption textarea").value = "";
    one("#picture-facts").textContent = t("Choose an image to see it large and to write its caption.");
    one("#picture-name").textContent = one("#caption-state").textContent = "";
    one("#caption-undo").hidden = true;
    showTokens();
    showTags();
  };

  const tagsOf = (picture) => new Set(picture.caption.split(/[,\n]/).map((tag) => tag.trim()).filter(Boolean));
  const commonTags = (members) => {
    const [first, ...others] = members.map(tagsOf);
    return [...(first ?? [])].filter((tag) => others.every((tags) => tags.has(tag)));
  };

  // A caption of tags can be edited tag by tag; sentences and alternatives on several lines are left alone.
  const splitTags = (text) => text.split(",").map((tag) => tag.trim()).filter(Boolean);
  const showTags = () => {
    const place = one("#picture-tags"), area = one("#caption textarea"), tags = splitTags(area.value);
    const common = popular().filter(([, count]) => count > 1).map(([tag]) => tag);
    place.hidden = !chosen || area.readOnly || area.disabled || (tags.length === 1 && !common.includes(tags[0])) || area.value.includes("\n");
    favourites = place.hidden ? [] : common.filter((tag) => !tags.includes(tag)).slice(0, 9);
    if (place.hidden) return place.replaceChildren();
    const chips = tags.slice(0, MOST_CHIPS).map((tag, index) => make("span", { className: "chip" }, make("span", { textContent: tag, dir: "auto" }),
      make("button", { type: "button", textContent: "×", data: { tagOut: index }, attributes: { "aria-label": t("Remove the tag {tag}", { tag }) } })));
    const field = make("input", { type: "text", id: "tag-in", placeholder: t("Add a tag"), autocomplete: "off", dir: "auto", attributes: { list: "known-tags", "aria-label": t("Add a tag") } });
    const more = tags.length > MOST_CHIPS ? [make("span", { className: "small", textContent: t("and {count} more", { count: (tags.length - MOST_CHIPS).toLocaleString("en") }) })] : [];
    const often = favourites.map((tag, index) => make("button", { type: "button", className: "often", data: { tagIn: tag }, title: t("Adds the tag; in the grid its key does") }, make("kbd", { textContent: index + 1 }), make("span", { textContent: tag, dir: "auto" })));
    refocus(place, () => fill(place, ...chips, ...more, field, ...often));
  };
  const putTags = (tags) => {
    const area = one("#caption textarea");
    area.value = tags.join(", ");
    write(chosen, area.value);
    showTags();
  };
  const addTags = (text) => {
    const tags = splitTags(one("#caption textarea").value), more = splitTags(text).filter((tag) => !tags.includes(tag));
    if (more.length) putTags([...tags, ...more]);
  };
  // The tags of all captions, the most frequent first, as of when the images were loaded.
  let favourites = [], counted = { of: null, tags: [] };
  const popular = () => {
    const counts = new Map();
    if (counted.of !== shelf) {
      for (const picture of shelf.pictures) for (const tag of tagsOf(picture)) counts.set(tag, (counts.get(tag) ?? 0) + 1);
      counted = { of: shelf, tags: [...counts].sort((a, b) => b[1] - a[1]).slice(0, 60) };
    }
    return counted.tags;
  };

  // The bar above the grid, and what the panel tells of several images.
  const showSelection = () => {
    const bar = one("#selection-bar"), count = picked.size, out = filter === "out";
    if (!bar) return;
    bar.hidden = !count;
    one("#grid-keys").parentElement.hidden = Boolean(count);
    one("#grid-keys").hidden = !seen.length;
    const members = acted().map(named).filter(Boolean), held = members.length > 0 && members.every((picture) => picture.held);
    one("#selection-count").textContent = count ? t("{count} selected", { count: count.toLocaleString("en") }) : "";
    // In the bar, and below the image, where they say how many.
    for (const button of all("[data-bulk]", bar)) button.hidden = out || shelf.fixed;
    for (const [does, words, hidden] of [["validation", held ? t("Use for training") : t("Use for validation"), out || shelf.fixed], ["exclude", out ? t("Include") : t("Exclude"), shelf.fixed]]) {
      for (const button of all(`[data-select=${does}]`)) {
        button.textContent = button.id && count ? `${words} ${count}` : words;
        button.hidden = hidden;
      }
    }
    const note = one("#picture-several"), tags = count > 1 ? commonTags(members) : [];
    note.hidden = count < 2;
    one("b", note).textContent = t("{images} selected", { images: plural(count, "image") });
    one("#common-tags").replaceChildren(make("span", { className: "small", textContent: tags.length ? t("In all captions:") : t("Their captions have no tag in common.") }),
      ...tags.slice(0, 12).map((tag) => make("span", { className: "chip", dir: "auto", textContent: tag })));
    one("#caption > span").textContent = count > 1 ? t("Caption of this image alone") : t("Caption");
  };

  const showButtons = () => {
    const out = filter === "out";
    if (named(chosen)) one("#leave-out").title = out ? t("Puts it back among the images") : t("Moves it aside within the project; Excluded shows it");
    one("#crop-start").hidden = one("#mask-start").hidden = shelf.fixed || out;
    lay();
    grid().toggleAttribute("data-picked", picked.size > 0);
    showSelection();
  };

  // Black parts of the mask darken the image below.
  const showMask = ({ mask = null } = {}) => {
    const image = one("#picture-big .mask");
    image.hidden = !mask;
    const address = `/easel/picture/${kind()}/${mask}`;
    if (mask && image.getAttribute("src") !== address) image.src = address;
  };

  const show = (name, focus = false) => {
    const panel = one("#picture-detail");
    if (!panel) return;
    const picture = named(name), area = one("#caption textarea"), leaving = chosen;
    panel.dataset.none = picture ? "" : "1";
    for (const button of all("button", panel)) {
      if (button.id === "detail-close") continue;
      button.disabled = !picture;
      button.title = picture ? button.dataset.tip ?? button.getAttribute("aria-label") ?? "" : t("No image is chosen.");
    }
    area.disabled = !picture;
    if (leaving && leaving !== name && waiting.has(leaving)) save(leaving);
    if (leaving !== name) stopCropping();
    window.easel.leaveMask?.(name);
    if (!picture) { showNothing(); showButtons(); return; }
    chosen = name;
    const image = one("#picture-big img"), crop = one("#picture-big .crop"), frame = one("#picture-big");
    image.hidden = crop.hidden = false;
    const address = `/easel/picture/${kind()}/${picture.url}`;
    if (image.getAttribute("src") !== address) image.src = address;
    image.alt = name;
    showMask(picture);
    frame.style.aspectRatio = picture.whole.join(" / ");
    frame.style.setProperty("--ratio", picture.whole[0] / picture.whole[1]);
    const [left, top, right, bottom] = picture.crop;
    if (!box) crop.style.inset = `${top}% ${right}% ${bottom}% ${left}%`;
    one("#picture-name").textContent = one("#picture-name").title = name;
    one("#picture-facts").textContent = facts(picture);
    const text = waiting.get(name)?.text ?? picture.caption, fixed = shelf.fixed || filter === "out";
    if (area.value !== text) area.value = text;
    area.readOnly = fixed;
    one("#caption-undo").hidden = fixed || !edits.get(name)?.past.length;
    try { sessionStorage.setItem(KEPT, JSON.stringify([window.easel.project, name])); } catch { /* storage is off */ }
    if (!waiting.has(name)) say("saved", fixed ? t("Read only") : text ? t("Saved") : t("Uncaptioned"));
    countTokens(name, text);
    showTags();
    showButtons();
    keepAddress();
    if (focus) { cells.get(name)?.focus({ preventScroll: true }); cells.get(name)?.scrollIntoView({ block: "nearest" }); }
  };

  // ---- choosing -------------------------------------------------------------------------------------------------
  const forget = () => { picked = new Set(); anchor = { name: null, kept: new Set() }; };
  const tellSelection = () => { showButtons(); document.dispatchEvent(new CustomEvent("easel-shelf")); };

  // Focus and selection are two things: arrows move the focus, Space, Ctrl and Shift select, Esc clears.
  const choose = (name, { toggle = false, range = false, keep = false, focus = true } = {}) => {
    if (range && chosen) {
      const [a, b] = [places.get(anchor.name) ?? places.get(chosen) ?? 0, places.get(name)].sort((x, y) => x - y);
      picked = new Set([...anchor.kept, ...seen.slice(a, b + 1).map((p) => p.name)]);
    } else {
      if (toggle && !picked.delete(name)) picked.add(name);
      if (!toggle && !keep) forget();
      anchor = { name, kept: new Set(picked) };
    }
    show(name, focus);
    document.dispatchEvent(new CustomEvent("easel-shelf"));
  };

  const move = (by, { range = false, focus = true } = {}) => {
    const next = seen[Math.min(seen.length - 1, Math.max(0, (places.get(chosen) ?? -1) + by))];
    if (next) choose(next.name, { range, focus, keep: true });
  };

  const clear = () => { forget(); tellSelection(); };

  // ---- captions: saved while typing, together with the image's name --------------------------------
  // One request at a time: of two in flight, the older text might arrive last.
  let sent = Promise.resolve();
  const send = (body, options) => {
    sent = options.keepalive ? post("caption", body, options) : sent.then(() => post("caption", body, options));
    return sent;
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
    const answer = await send({ picture: name, text }, { ...options, keep: `caption of ${name}` }), { away, arrival } = answer;
    if (away && name === chosen) say("error", t("Not saved yet, retrying"));
    if (arrival) arrival.then((answer) => take(name, entry, answer)); else take(name, entry, answer);
  };
  const take = (name, entry, answer) => {
    const { problem } = answer, history = edits.get(name);
    if (!problem) {
      saves += 1;
      if (waiting.get(name) === entry) waiting.delete(name);
      // Nothing else changed meanwhile, so the images need not be reloaded.
      const [revision, ...rest] = shelf.mark.split(" ");
      if (revision === String(answer.before)) shelf.mark = [answer.revision, ...rest].join(" ");
      if (name === chosen && !waiting.has(name)) { say("saved", t("Saved")); showTokens(answer); one("#caption-undo").hidden = !history?.past.length; }
      return;
    }
    if (name === chosen) say("error", t("Not saved: {problem}", { problem }));
  };

  const write = (name, text, goingBack = false) => {
    const picture = named(name), entry = waiting.get(name);
    if (!picture) return;
    clearTimeout(entry?.timer);
    if (!edits.has(name)) edits.set(name, { past: [], future: [], base: picture.caption });
    waiting.set(name, { text, goingBack, timer: setTimeout(() => save(name), 300) });
    if (name === chosen) say("saving", t("Saving"));
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
    showTags();
    one("#caption-undo").hidden = !history.past.length;
  };

  // Before the shared listener, which sends what is unsent again: of two texts the newest.
  addEventListener("pagehide", () => { for (const name of waiting.keys()) save(name, { keepalive: true }); }, true);

  // ---- actions on images ---------------------------------------------------------------------------------
  const act = async (path, body) => {
    const answer = await post(path, body);
    if (answer.problem) say("error", answer.problem);
    return answer.problem ? null : answer;
  };

  // Does an action later, as undo and redo do, and loads the images anew; whether it could.
  const doing = (path, body) => async () => {
    if (!(await act(path, body))) return false;
    await load();
    return true;
  };

  // One at a time, none lost: what the next key press acts on is known once the previous action is done.
  const turn = window.easel.inTurns(), inTurn = (action) => turn(action).catch((error) => say("error", error.message));
  const leaveOut = (names) => inTurn(() => leaveNow(names ?? acted()));
  const leaveNow = async (names) => {
    if (!names.length || shelf.fixed) return;
    const back = filter === "out", [does, undoes] = back ? ["take-back", "leave-out"] : ["leave-out", "take-back"];
    await Promise.all(names.map((name) => save(name)));
    const [undo, redo] = [undoes, does].map((path) => doing(path, { pictures: names }));
    forget();
    if (await redo()) did(t(back ? "{images} included." : "{images} excluded.", { images: plural(names.length, "image") }), undo, redo);
  };

  const holdOut = () => inTurn(async () => {
    const names = acted(), on = !names.every((name) => named(name)?.held);
    if (!names.length || shelf.fixed || filter === "out") return;
    const [undo, redo] = [!on, on].map((on) => doing("hold-out", { pictures: names, on }));
    if (await redo()) did(t(on ? "{images} used for validation." : "{images} used for training.", { images: plural(names.length, "image") }), undo, redo);
  });

  // ---- the crop: a box over the image, as shares of its sides, that is dragged or moved by keys -------------------
  const LEAST = 0.05;
  let box = null, held = null;  // the box while it is changed; the drag: where it began, and the edges that move
  const limit = (value, low = 0, high = 1) => Math.min(high, Math.max(low, value));
  const drawBox = () => {
    const place = one("#picture-big .crop"), [left, top, right, bottom] = box.map((edge) => 100 * edge);
    place.style.inset = `${top}% ${100 - right}% ${100 - bottom}% ${left}%`;
    place.setAttribute("aria-label", t("Crop, from {left}% to {right}% across and from {top}% to {bottom}% down", { left: Math.round(left), right: Math.round(right), top: Math.round(top), bottom: Math.round(bottom) }));
  };
  // Moves these edges (left, top, right, bottom) by shares of the sides; all four keep the size of the box.
  const moveEdges = (from, edges, by) => {
    box = from.map((edge, index) => {
      if (!edges[index]) return edge;
      const axis = index % 2, low = from[axis], high = from[axis + 2];
      if (edges[axis] && edges[axis + 2]) return edge + limit(by[axis], -low, 1 - high);
      return index < 2 ? limit(edge + by[axis], 0, high - LEAST) : limit(edge + by[axis], low + LEAST, 1);
    });
    drawBox();
  };
  const cropping = (on) => {
    const place = one("#picture-big .crop");
    place.classList.toggle("edit", on);
    one("#crop-bar").hidden = !on;
    for (const [name, value] of [["tabindex", 0], ["role", "group"], ["aria-describedby", "crop-keys"]]) if (on) place.setAttribute(name, value); else place.removeAttribute(name);
    if (!on) place.removeAttribute("aria-label");
  };
  const startCropping = () => {
    window.easel.leaveMask();
    box = (named(chosen).box ?? [0, 0, 1, 1]).slice(0, 4);
    cropping(true);
    drawBox();
    one("#picture-big .crop").focus();
  };
  const stopCropping = () => {
    if (!box) return;
    const inside = one("#picture-detail").contains(document.activeElement);
    box = held = null;
    cropping(false);
    const picture = named(chosen);
    if (picture) { const [left, top, right, bottom] = picture.crop; one("#picture-big .crop").style.inset = `${top}% ${right}% ${bottom}% ${left}%`; }
    if (inside) one("#crop-start").focus();
  };
  const applyCrop = (edges, name = chosen) => inTurn(async () => {
    const [undo, redo] = [named(name)?.box, edges].map((box) => doing("crop", { picture: name, box }));
    if (!(await redo())) return;
    if (chosen === name) stopCropping();
    did(edges ? t("1 image cropped.") : t("1 image uncropped."), undo, redo);
  });
  // The box as the crop, with the focus point where that is inside; or the middle of the box as focus point of the crop that there is.
  const cropTo = () => {
    const [x, y] = (named(chosen).box ?? []).slice(4);
    applyCrop(x >= box[0] && x <= box[2] && y >= box[1] && y <= box[3] ? [...box, x, y] : box);
  };
  const focusHere = () => applyCrop([...(named(chosen).box ?? [0, 0, 1, 1]).slice(0, 4), (box[0] + box[2]) / 2, (box[1] + box[3]) / 2]);
  const pointAt = ({ clientX, clientY }) => {
    const frame = one("#picture-big").getBoundingClientRect();
    return [(clientX - frame.left) / frame.width, (clientY - frame.top) / frame.height];
  };
  document.addEventListener("pointerdown", (event) => {
    const target = event.target.closest?.(".crop.edit");
    if (!target) return;
    event.preventDefault();
    target.focus();
    target.setPointerCapture(event.pointerId);
    const inside = target.getBoundingClientRect(), reach = Math.min(18, inside.width / 4, inside.height / 4);
    const near = [event.clientX - inside.left, event.clientY - inside.top, inside.right - event.clientX, inside.bottom - event.clientY].map((gap) => gap < reach);
    held = { from: box, at: pointAt(event), edges: near.some(Boolean) ? near : [true, true, true, true] };
  });
  document.addEventListener("pointermove", (event) => {
    if (held) moveEdges(held.from, held.edges, pointAt(event).map((now, axis) => now - held.at[axis]));
  });
  for (const end of ["pointerup", "pointercancel"]) document.addEventListener(end, () => { held = null; });
  document.addEventListener("keydown", (event) => {
    if (!box || !event.target.closest?.("#picture-detail")) return;
    const by = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key], on = event.target.classList.contains("crop");
    if (event.key === "Escape") stopCropping();
    else if (on && event.key === "Enter") cropTo();
    else if (on && by) moveEdges(box, event.shiftKey ? [false, false, true, true] : [true, true, true, true], by.map((step) => step / 100));
    else return;
    event.preventDefault();
    event.stopPropagation();
  }, true);

  // ---- undo: a note for ten seconds, and Ctrl+Z for as long as the page is open -----------------------------------
  const journal = { past: [], future: [] };
  // Records an edit, with functions that undo and redo it; both answer whether they could.
  const did = (text, undo, redo) => {
    journal.past.push({ text, undo, redo });
    journal.past.splice(0, journal.past.length - MOST_STEPS);
    journal.future = [];
    toast(text, "", () => step(false));
  };
  // Something noted was taken back in another way.
  const undone = (undo) => { const at = journal.past.findLastIndex((entry) => entry.undo === undo); if (at >= 0) journal.past.splice(at, 1); };
  const step = (forward) => inTurn(async () => {
    const [from, into] = forward ? [journal.future, journal.past] : [journal.past, journal.future], entry = from.pop();
    if (!entry) return;
    if (!(await entry[forward ? "redo" : "undo"]())) { from.push(entry); return; }
    into.push(entry);
    toast(t(forward ? "Done again: {text}" : "Undone: {text}", { text: entry.text }), "", forward ? () => step(false) : null);
  });
  document.addEventListener("keydown", (event) => {
    const key = event.key.toLowerCase(), writes = event.target.closest?.("input:not([type=checkbox]), textarea, select");
    if (!(event.ctrlKey || event.metaKey) || !["z", "y"].includes(key) || writes || !grid()?.offsetParent) return;
    event.preventDefault();
    const forward = key === "y" || event.shiftKey;
    if (event.target.closest?.("#picture-tags")) goBack(forward); else step(forward);
  });

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
        // The images may be here before the stream's first message, which says it too.
        window.easel.project ??= answer.project;
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
      say("error", error instanceof TypeError ? t("The window does not answer") : error.message);
      setTimeout(load, 3000);
    }).finally(() => { loading = null; });
    return loading;
  };

  const render = () => {
    const place = grid(), before = seen.map((picture) => picture.name), at = places.get(chosen) ?? -1;
    if (!place) return;
    // A removed cell loses the keyboard focus, even if it is inserted again at once.
    const focused = place.contains(document.activeElement);
    byName = new Map(pictures().map((picture) => [picture.name, picture]));
    place.dataset.mark = shelf.mark;
    picked = new Set([...picked].filter(named));
    applyFilter();
    const typing = document.activeElement === one("#caption textarea") && waiting.has(chosen);
    if (typing) return;
    const neighbour = [...before.slice(at + 1), ...before.slice(0, Math.max(0, at)).reverse()].find((name) => places.has(name));
    show([chosen, kept()].find(named) ?? neighbour ?? seen[0]?.name ?? null);
    if (focused) cells.get(chosen)?.focus({ preventScroll: true });
  };

  // What was chosen before the page was loaded again, as it is when the server comes back.
  const kept = () => {
    if (chosen) return null;
    try { const [project, name] = JSON.parse(sessionStorage.getItem(KEPT)); return project === window.easel.project ? name : null; } catch { return null; }
  };

  // The address names the image shown; one that is followed shows its own.
  let address = "";
  const keepAddress = () => {
    const [, name] = window.easel.place();
    if (document.documentElement.dataset.tab !== "dataset" || !chosen) return;
    if (name && name !== chosen && location.hash !== address) {
      if (named(name)) choose(name, { focus: false });
      else toast(t("There is no image {name} here; look in Excluded or in the trash.", { name }), "bad");
    }
    if (name !== chosen) window.easel.setAddress("dataset", chosen);
    address = location.hash;
  };

  // The images are asked for while Gradio still builds the page.
  let meter = null, first = load().finally(() => { first = null; window.easel.settle(); });
  window.easel.settling.push(() => {
    const mark = one("#dataset-mark");
    if (!mark || !grid()) return;
    window.easel.project ??= mark.dataset.project;
    one("#trigger :is(input, textarea)")?.setAttribute("dir", "auto");
    if (window.easel.project !== mark.dataset.project) {
      // Another page opened another project: everything here belongs to the old one.
      if (!window.easel.joining) { window.easel.reopen(); return; }
      // This page did, by its demo or its import.
      window.easel.project = mark.dataset.project;
      window.easel.joining = false;
    }
    if (first) { /* the list is on its way */ }
    else if (mark.dataset.mark !== shelf.mark && mark.dataset.mark !== asked) { asked = mark.dataset.mark; load(); }
    // Gradio may have rebuilt the tab.
    else if (grid().dataset.mark === undefined && shelf.mark) render();
    // What counts tokens has changed since the caption was shown.
    if (meter !== null && mark.dataset.meter !== meter && chosen) countTokens(chosen, one("#caption textarea").value);
    meter = mark.dataset.meter;
    keepAddress();
  });

  const ACTS = {
    "crop-start": startCropping, "mask-start": stopCropping, "crop-apply": cropTo, "crop-focus": focusHere, "crop-cancel": stopCropping,
    "crop-whole": () => applyCrop(null), "caption-undo": () => goBack(), "detail-close": () => editOnPhone(false),
  };
  // ---- one listener per event type -------------------------------------------------------------------------------
  document.addEventListener("click", (event) => {
    const target = event.target.closest("button, [data-picture]");
    if (!target) return;
    const data = target.dataset;
    if (target.id === "use-demo") {
      window.easel.joining = true;
      setTimeout(() => { window.easel.joining = false; }, 60_000);
    }
    if (data.picture !== undefined && target.classList.contains("thumb")) {
      const toggle = event.ctrlKey || event.metaKey;
      // Ctrl adds to the image that is open.
      if (toggle && !picked.size && chosen && chosen !== data.picture) picked.add(chosen);
      choose(data.picture, { toggle, range: event.shiftKey });
      if (!toggle && !event.shiftKey) editOnPhone(true);
    }
    else if (data.filter) chooseFilter(data.filter);
    else if (data.step) move(Number(data.step), { focus: false });
    else if (data.select === "clear") { clear(); cells.get(chosen)?.focus(); }
    else if (data.select === "exclude") leaveOut().then(() => { if (!target.id) cells.get(chosen)?.focus({ preventScroll: true }); });
    else if (data.select === "validation") holdOut();
    else if (data.tagIn) addTags(data.tagIn);
    else if (data.tagOut) putTags(splitTags(one("#caption textarea").value).filter((_, index) => index !== Number(data.tagOut)));
    else ACTS[target.id]?.();
  });

  document.addEventListener("input", (event) => {
    if (event.target.closest("#caption") && chosen && !event.target.readOnly) { write(chosen, event.target.value); showTags(); }
    else if (event.target.id === "dataset-search") applyFilter();
  });

  // On a phone the editor fills the screen.
  const editOnPhone = (on) => document.documentElement.classList.toggle("editing", on);

  const inCaption = (event) => {
    const area = event.target, key = event.key.toLowerCase();
    const control = event.ctrlKey || event.metaKey;
    if (control && (key === "z" || key === "y")) { event.preventDefault(); if (!area.readOnly) goBack(key === "y" || event.shiftKey); }
    else if (key === "pagedown" || key === "pageup") { event.preventDefault(); move(key === "pagedown" ? 1 : -1, { focus: false }); }
    else if (key === "escape") { event.preventDefault(); editOnPhone(false); cells.get(chosen)?.focus(); }
  };

  const inGrid = (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns, Home: -1e6, End: 1e6 }[event.key];
    const control = event.ctrlKey || event.metaKey;
    if (by !== undefined) { event.preventDefault(); move(by, { range: event.shiftKey }); }
    else if (event.key === " ") { event.preventDefault(); choose(chosen, { toggle: true }); }
    else if (event.key === "Enter" && !control) { event.preventDefault(); editOnPhone(true); one("#caption textarea").focus(); }
    else if (event.key === "Delete") { event.preventDefault(); leaveOut(); }
    else if (event.key === "Escape") clear();
    else if (!control && favourites[event.key - 1]) { event.preventDefault(); addTags(favourites[event.key - 1]); }
    else if (control && event.key.toLowerCase() === "a") { event.preventDefault(); picked = new Set(places.keys()); tellSelection(); }
  };

  document.addEventListener("focusin", (event) => {
    if (event.target.id === "tag-in") one("#known-tags").replaceChildren(...popular().map(([value]) => make("option", { value })));
    else if (event.target.closest?.("#dataset-grid .thumb") && !places.has(chosen)) choose(event.target.dataset.picture, { keep: true });
  });
  document.addEventListener("keydown", (event) => {
    if (event.target.closest?.("#caption")) inCaption(event);
    else if (event.target.id === "tag-in" && event.key === "Enter") {
      const { value } = event.target;
      event.preventDefault();
      event.target.value = "";
      addTags(value);
      one("#tag-in")?.focus();
    }
    else if (event.target.closest?.("#picture-detail") && event.key === "Escape") { editOnPhone(false); cells.get(chosen)?.focus(); }
    else if (event.target.closest?.("#dataset-grid .thumb")) inGrid(event);
    else if (event.key === "Escape" && event.target.closest?.("#selection-bar")) { clear(); cells.get(chosen)?.focus(); }
  });

  // API for the other scripts.
  Object.assign(window.easel, {
    load, inTurn, leaveOut, did, undone, choose, chooseFilter,
    shelf: () => shelf,
    chosenPicture: () => named(chosen),
    picked: () => [...picked],
    waitingSaves: () => Promise.all([...waiting.keys()].map((name) => save(name))),
    open: (name) => { if (filter !== "all") { filter = "all"; render(); } choose(name); },
    // The images that a bulk edit applies to, null for all.
    scope: () => (picked.size ? [...picked] : seen.length < shelf.pictures.length ? [...places.keys()] : null),
    setDoubts: (names) => {
      window.easel.tellAgain();
      if (names.size === doubts.size && [...names].every((name) => doubts.has(name))) return;
      doubts = names;
      applyFilter();
    },
    // The facts of the shown image have changed.
    tellAgain: () => { if (named(chosen)) one("#picture-facts").textContent = facts(named(chosen)); },
    setTwins: (names) => { twins = new Set(names); applyFilter(); },
  });
})();
