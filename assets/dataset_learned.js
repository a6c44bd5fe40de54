// The Dataset tab's "What will be learned": what images have in common, share of steps per image, what the base
// says about captions and trigger words, and what the last run learned of each image.
(() => {
  const easel = window.easel;
  const { one, get, post, make, plural, later, redraw } = easel;
  const percent = (share) => `${(100 * share).toFixed(share < 0.095 ? 1 : 0)}%`;
  const median = (values) => [...values].sort((a, b) => a - b)[values.length >> 1];
  const signed = (value) => `${value < 0 ? "\u2212" : "+"}${Math.abs(value).toFixed(3)}`;
  const apart = (value, error) => `${Math.abs(value).toFixed(3)} ± ${error.toFixed(3)} ${value < 0 ? "higher" : "lower"}`;
  const MOST_MINIS = 10, MOST_ROWS = 12;
  const KINDS = {
    absorbed: ["Will be baked in", "warn"], named: ["Can be prompted away", "good"], wording: ["Can be prompted", "good"],
    odd: ["Check this caption", "bad"], meaning: ["Changes a meaning", "warn"], phrase: ["In all captions", "warn"], share: ["Many steps", "warn"], bucket: ["Alone in its size", "warn"],
  };

  let state = {};             // of /easel/insights
  let odd = [];               // images that are told by the check to have a wrong caption
  let sortMost = false, whole = { captions: false, pictures: false };

  // ---- elements -----------------------------------------------------------------------------------------------------
  const known = (name) => easel.shelf().pictures.find((picture) => picture.name === name);
  const mini = (name) => {
    const picture = known(name);
    if (!picture) return "";
    const button = make("button", { type: "button", className: "mini", title: name }, make("img", { loading: "lazy", alt: "", src: `/easel/thumb/dataset/${picture.url}` }));
    button.dataset.openPicture = name;
    button.setAttribute("aria-label", `Open ${name}`);
    return button;
  };
  const meter = (share) => {
    const bar = make("div", { className: "meter" }, make("i"));
    bar.firstChild.style.width = `${Math.max(0, Math.min(100, 100 * share))}%`;
    return bar;
  };
  const chip = (text, tone) => make("span", { className: `chip ${tone}`, textContent: text });
  const words = (text, ...more) => make("div", { className: "why grow" }, make("p", { textContent: text }), ...more);
  const rest = (count, what) => {
    const button = make("button", { type: "button", className: "own quiet", textContent: `Show ${count} more` });
    button.dataset.learnedAll = what;
    return button;
  };

  // ---- from images and captions alone ------------------------------------------------------------------
  const learnedRow = ({ kind, name, sentence, pictures = [] }) => {
    const shown = pictures.slice(0, MOST_MINIS).map(mini);
    if (pictures.length > MOST_MINIS) shown.push(make("span", { className: "small", textContent: `and ${pictures.length - MOST_MINIS} more` }));
    const [title, tone] = KINDS[kind], fixed = easel.shelf().fixed;
    if (kind === "absorbed" && name && pictures.length && !fixed) {
      const words = `Add “${name}” to ${plural(pictures.length, "caption")}`;
      shown.push(make("button", { type: "button", className: "own", textContent: words, data: { addTag: name, pictures: JSON.stringify(pictures) } }));
    }
    if (kind === "wording" && name) {
      for (const word of name.split(", ")) {
        const button = make("button", { type: "button", className: "own quiet", textContent: word, title: "Shows the images with this word" });
        button.dataset.learnedWord = word.replace(/ \(\d+\)$/, "");
        shown.push(button);
      }
      sentence = "Prompts can ask for what some captions say, or leave it out:";
    }
    return make("div", { className: "row finding" }, make("span", { className: "tag-kind" }, chip(title, fixed ? "" : tone)), words(sentence, ...(shown.length ? [make("div", { className: "minis" }, ...shown)] : [])));
  };

  const stepsSentence = (shares) => {
    const trained = shares.filter((row) => row.share > 0).sort((a, b) => a.share - b.share);
    if (!trained.length) return [];
    const [least, most] = [trained[0], trained.at(-1)], out = shares.length - trained.length;
    const held = out ? ` ${out === 1 ? "One is for validation and gets" : `${out} are for validation and get`} none.` : "";
    const even = most.share < 1.1 * least.share;
    const text = even ? `Each of the ${plural(trained.length, "image")} gets ${percent(most.share)} of the steps.` : `An image gets between ${percent(least.share)} and ${percent(most.share)} of the steps, by its repeats and by how batches are filled up.`;
    return [make("div", { className: "row" }, words(text + held, ...(even ? [] : [make("div", { className: "minis" }, mini(least.picture), make("span", { className: "small", textContent: "least" }), mini(most.picture), make("span", { className: "small", textContent: "most" }))])))];
  };

  const showFound = (check) => {
    const place = one("#learned-found"), line = one("#learned-state"), button = one("#learned-start");
    if (!place) return;
    button.hidden = check.state !== "idle" && check.state !== "failed";
    if (check.state === "working") line.textContent = `Checking ${check.done} of ${plural(check.total, "image")}`;
    else if (check.state === "failed") line.textContent = check.problem;
    else if (check.state === "idle") line.textContent = `Checking ${plural(easel.shelf().pictures.length, "image")} takes a while.`;
    line.hidden = check.state === "done";
    if (check.state !== "done") return;
    const phrases = check.problems.filter((row) => row.kind === "common phrase").map((row) => ({ kind: "phrase", sentence: row.sentence }));
    const order = ["odd", "absorbed", "meaning", "phrase", "share", "bucket", "named", "wording"];
    const rows = [...check.learned, ...phrases].sort((a, b) => order.indexOf(a.kind) - order.indexOf(b.kind));
    const told = rows.filter((row) => KINDS[row.kind][1] !== "good").length;
    const fixed = easel.shelf().fixed;
    one("#learned > summary").textContent = `What will be learned${told && !fixed ? `, ${plural(told, "note")}` : ""}`;
    if (!rows.length) rows.push({ kind: "wording", sentence: easel.shelf().pictures.length < 5 ? "Add images: with fewer than five, nothing common can be told." : "The images have nothing in common that shows without a model." });
    const intended = fixed ? [make("p", { className: "small", textContent: "The demo teaches a style: these are as intended." })] : [];
    redraw(place, ...intended, ...rows.map(learnedRow), ...stepsSentence(check.shares));
    odd = check.learned.filter((row) => row.kind === "odd").flatMap((row) => row.pictures);
    marked();
    easel.shares = new Map(check.shares.map((row) => [row.picture, row.share]));
    easel.tellAgain();
  };

  let looking = false, again = false, seen = "";
  const look = async (asked = false) => {
    if (looking) { again = true; return; }
    looking = true;
    try {
      let check = await post("check", { by_itself: !asked });
      for (;;) {
        showFound(check);
        if (check.state !== "working") break;
        await later(400);
        check = await get("check");
      }
      if (!check.problem) seen = easel.shelf().mark;
    } catch { /* asked again at the next change */ } finally { looking = false; }
    if (again) { again = false; look(); }
  };

  // ---- measured with the base ---------------------------------------------------------------------------------------------
  const BUTTONS = { captions: "#captions-start", pictures: "#pictures-start", triggers: "#trigger-propose" };
  const LINES = { captions: "#captions-state", pictures: "#pictures-state", triggers: "#trigger-state" };

  const showLine = (what, idle) => {
    const now = state[what], button = one(BUTTONS[what]), line = one(LINES[what]), stop = one(`[data-insight-cancel=${what}]`);
    if (!now || !button || !line) return;
    const working = now.state === "working";
    button.disabled = working || Boolean(now.why);
    button.title = working ? "It is being measured" : now.why || button.dataset.tip;
    stop.hidden = !working;
    line.className = now.state === "failed" ? "problem" : "small";
    const done = now.total ? `Measured ${now.done.toLocaleString("en")} of ${now.total.toLocaleString("en")}` : now.message || "Opening the base model";
    line.textContent = working ? done : now.state === "failed" ? now.message : now.why || (now.state === "done" ? (now.fresh ? idle.fresh : idle.stale) : idle.none);
  };

  const captionRow = (row) => {
    const better = row.better && known(row.better.picture) ? [make("div", { className: "minis" }, make("span", { className: "small", textContent: "better with the caption of" }), mini(row.better.picture))] : [];
    const text = row.suspect ? row.sentence : `${row.picture}: ${row.caption}`;
    // A caption that lowers the loss as usual is a strong fit; the figures are on hover.
    const usual = Math.max(1e-6, median(state.captions.found.rows.map((other) => other.fits))), share = Math.max(0, Math.min(1, row.fits / (2 * usual)));
    const word = share > 0.35 ? "strong" : share > 0.15 ? "fair" : "weak";
    const fit = make("div", { className: "row", title: `The loss is ${apart(row.fits, row.fits_error)} than with other captions, ${apart(row.helped, row.helped_error)} than with none.` },
      make("span", { className: "small", textContent: `Fit: ${word}` }), meter(share));
    return make("div", { className: "row finding" }, mini(row.picture), words(text, fit, ...better));
  };

  const showCaptions = () => {
    const found = state.captions?.found;
    showLine("captions", {
      none: "Measures how well each caption fits its image.",
      fresh: "", stale: "Images, captions or base have changed since.",
    });
    one("#captions-found").hidden = !found;
    if (!found) return;
    const suspects = found.rows.filter((row) => row.suspect && known(row.picture)), others = found.rows.filter((row) => !row.suspect && known(row.picture));
    const shown = [...suspects, ...(whole.captions ? others : others.slice(0, Math.max(0, 3 - suspects.length)))];
    const more = suspects.length + others.length - shown.length;
    const verdict = suspects.length ? `${plural(suspects.length, "caption")} likely wrong.` : "No caption fits another image better than its own. The weakest:";
    redraw(one("#captions-found"), make("p", { className: suspects.length ? "notes" : "small", textContent: verdict }), ...shown.map(captionRow), ...(more ? [rest(more, "captions")] : []));
  };

  const gainRow = (row) => {
    const helps = row.helps === null ? "no caption" : `caption helps by ${signed(row.helps)} ± ${row.helps_error.toFixed(3)}`;
    const steps = row.held_out ? "for validation" : `${percent(row.share)} of the steps`;
    const text = `Gain ${signed(row.gain)} ± ${row.standard_error.toFixed(3)}, ${Math.round(100 * row.learned)}% of the base's loss; ${helps}; ${steps}`;
    return make("div", { className: "row finding" }, mini(row.picture), words(row.suspect ? row.sentence : row.picture, meter(row.learned), make("p", { className: "small num", textContent: text })));
  };

  const showPictures = () => {
    const now = state.pictures ?? {}, found = now.found;
    showLine("pictures", {
      none: `Measures what ${now.run ? `the run ${now.run}` : "the last run"} has learned of each image.`,
      fresh: `The run ${now.run}, step ${found?.step}.`, stale: `The run ${now.run}, step ${found?.step}; there is another checkpoint since.`,
    });
    one("#pictures-found").hidden = one("#pictures-order").hidden = !found;
    if (!found) return;
    const all = found.rows.filter((row) => known(row.picture));
    const rows = sortMost ? [...all].sort((a, b) => b.learned - a.learned) : all;
    for (const button of easel.all("[data-learned-order]")) button.setAttribute("aria-pressed", (button.dataset.learnedOrder === "most") === sortMost);
    const shown = whole.pictures ? rows : rows.slice(0, MOST_ROWS);
    redraw(one("#pictures-found"), ...shown.map(gainRow), ...(rows.length > shown.length ? [rest(rows.length - shown.length, "pictures")] : []));
  };

  // Shown next to the trigger field, and only on request.
  let wordsOpen = false;
  const showWords = () => {
    const panel = one("#trigger-words"), now = state.triggers;
    if (!panel || !now) return;
    panel.hidden = !wordsOpen;
    showLine("triggers", { none: "", fresh: "", stale: "Images, captions, base or trigger word have changed since." });
    const found = now.state === "working" ? null : now.found;
    one("#trigger-found").hidden = !found;
    if (!found) return;
    const cards = found.rows.filter((row) => !row.given).map((row) => {
      const card = make("button", { type: "button", className: "own word", title: row.sentence }, make("b", { textContent: row.word, dir: "auto" }), make("span", { className: "small num", textContent: `${row.reaction.toFixed(2)}×, ${plural(row.tokens, "token")}` }));
      card.dataset.triggerWord = row.word;
      return card;
    });
    const given = found.rows.filter((row) => row.given).map((row) => make("p", { className: "small", textContent: `Now: ${row.sentence}` }));
    redraw(one("#trigger-found"), make("p", { className: "small", textContent: "How far each word moves the base's prediction, next to words of your captions: the less, the less meaning it brings along. Click one to take it." }), make("div", { className: "words" }, ...cards), ...given);
  };

  const marked = () => {
    const doubts = new Set(odd);
    if (state.captions?.fresh) for (const row of state.captions.found.rows) if (row.suspect) doubts.add(row.picture);
    const run = state.pictures?.found;
    easel.gains = new Map((run?.rows ?? []).map((row) => [row.picture, row]));
    if (state.pictures?.fresh) for (const row of run.rows) if (row.suspect) doubts.add(row.picture);
    easel.setDoubts(doubts);
  };

  const show = () => {
    if (!one("#learned")) return;
    showCaptions();
    showPictures();
    showWords();
    marked();
  };

  const following = easel.inOrder(async () => {
    state = await get("insights");
    show();
  });
  const watch = () => following().catch(() => { /* the window is away; asked again when something changes */ });
  let measuring = false;
  easel.on("insights", ({ state: now }) => { if (measuring || now === "working") watch(); measuring = now === "working"; });
  const begin = async (body) => {
    const answer = await post("insights", body);
    if (answer.problem) {
      const line = one(LINES[body.what]);
      line.className = "problem";
      line.textContent = answer.problem;
      return;
    }
    state = answer;
    show();
    // An answer that is still under way may be older.
    watch();
  };

  const takeWord = (word) => {
    const field = one("#trigger :is(input, textarea)");
    Object.getOwnPropertyDescriptor(Object.getPrototypeOf(field), "value").set.call(field, word);
    for (const kind of ["input", "blur"]) field.dispatchEvent(new Event(kind, { bubbles: kind === "input" }));
    field.focus();
  };

  // ---- events -------------------------------------------------------------------------------------------------------
  document.addEventListener("click", async (event) => {
    const target = event.target.closest("button");
    if (!target) return;
    const data = target.dataset;
    if (target.id === "learned-start") look(true);
    else if (target.id === "captions-start") { await easel.waitingSaves(); begin({ do: "begin", what: "captions" }); }
    else if (target.id === "pictures-start") begin({ do: "begin", what: "pictures" });
    else if (target.id === "trigger-propose") { wordsOpen = true; await easel.waitingSaves(); begin({ do: "begin", what: "triggers" }); }
    else if (target.id === "trigger-close") { wordsOpen = false; showWords(); one("#trigger-propose").focus(); }
    else if (data.triggerWord) takeWord(data.triggerWord);
    else if (data.insightCancel) begin({ do: "cancel", what: data.insightCancel });
    else if (data.learnedWord) {
      const field = one("#dataset-search");
      field.value = data.learnedWord;
      field.dispatchEvent(new Event("input", { bubbles: true }));
      field.scrollIntoView({ block: "center" });
    }
    else if (data.addTag) { easel.addTag(data.addTag, JSON.parse(data.pictures)); }
    else if (data.learnedAll) { whole[data.learnedAll] = true; show(); }
    else if (data.learnedOrder) { sortMost = data.learnedOrder === "most"; showPictures(); }
  });
  document.addEventListener("toggle", (event) => {
    if (event.target.id === "learned" && event.target.open) { look(); watch(); }
  }, true);

  let soon = null, mark = "";
  document.addEventListener("easel-shelf", () => {
    const panel = one("#learned"), shelf = easel.shelf();
    if (!panel) return;
    one("#trigger-propose").hidden = !shelf.pictures.length;
    if (shelf.mark === mark) return;
    mark = shelf.mark;
    clearTimeout(soon);
    soon = setTimeout(() => { if (panel.open && shelf.mark !== seen) look(); watch(); }, 600);
  });
  // Availability depends on the run; results depend on trigger word and base.
  let before = "";
  easel.settling.push(() => {
    const meter = one("#dataset-mark")?.dataset.meter ?? "", now = `${one("[data-run-state]")?.dataset.runState} ${meter}`;
    if (now === before || !one("#learned") || !easel.shelf().mark) return;
    before = now;
    clearTimeout(soon);
    soon = setTimeout(() => { if (one("#learned").open) look(); watch(); }, 600);
  });
})();
